"""A pickle machine that can do nothing but build inert values.

Python's own unpickler imports what a file names, sets attributes of whatever lies on its stack, hashes keys of any
depth and allocates what a memo index asks for; restricting `find_class` stops the first of these only. So the opcodes
are read here: the three dozen that picklers of protocols 2 to 5 write for plain data, each with its own check. Calls go
to the constructors of a fixed table and to nothing else. Work and memory are proportional to the file's size.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from .records import Constructor, RefusedError, build, is_key, say

MAX_OPERATIONS = 1_000_000  # the largest published network takes about 95,000
_MAX_NAME = 200  # of a global
_MAX_PROTOCOL = 5

Persistent = Callable[[Any], Any]
_Mark = object()


class Budget:
    """What all pickles of one file may use together.

    Args:
        file_bytes: size of the file: each of its bytes may be read once as a pickle, once as part of a storage and be
            copied once; a pickle that has more done to them repeats itself.
    """

    def __init__(self, file_bytes: int) -> None:
        self.operations = MAX_OPERATIONS
        self.bytes = 3 * file_bytes + 4096

    def spend_operations(self, count: int = 1) -> None:
        self.operations -= count
        if self.operations < 0:
            raise RefusedError(f"takes more than {MAX_OPERATIONS:,} operations to read")

    def spend_bytes(self, count: int) -> None:
        self.bytes -= count
        if self.bytes < 0:
            raise RefusedError("repeats its content beyond its own size")


class Machine:
    """Reads one pickle.

    Args:
        data: bytes in which it lies.
        table: (module, name) -> `Constructor` or `StorageType`: all that it may name.
        budget: of the whole file.
        persistent: turns a persistent id into a value; None refuses them.
        at: where it begins; after `run`, where it ended.
    """

    def __init__(
        self,
        data: memoryview,
        table: dict[tuple[str, str], Any],
        budget: Budget,
        persistent: Persistent | None = None,
        at: int = 0,
    ) -> None:
        self.data = data
        self.table = table
        self.budget = budget
        self.persistent = persistent
        self.at = at
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The value.

        Raises:
            RefusedError: the pickle is damaged, too large, or asks for anything that is not on the table.
        """
        handlers, spend, data, size = _HANDLERS, self.budget.spend_operations, self.data, len(self.data)
        while True:
            spend()
            if self.at >= size:
                raise RefusedError("is truncated: fetch it again")
            opcode = data[self.at]
            self.at += 1
            if opcode == 0x2E:  # STOP
                break
            handler = handlers.get(opcode)
            if handler is None:
                raise RefusedError(self._unknown(opcode))
            handler(self)
        if len(self.stack) != 1 or self.stack[0] is _Mark:
            raise RefusedError("is damaged: a pickle in it ends with other than one value")
        return self.stack[0]

    def _unknown(self, opcode: int) -> str:
        from pickletools import opcodes

        known = next((o for o in opcodes if o.code == chr(opcode)), None)
        if known is None:
            return f"is damaged, or no snapshot: byte {self.at - 1} of a pickle in it is no opcode"
        if known.name == "INST":
            return _foreign(self._line(), self._line())
        return f"uses the pickle opcode {known.name}, which no published network needs: do not trust it"

    # reading

    def _take(self, count: int) -> memoryview:
        end = self.at + count
        if end > len(self.data):
            raise RefusedError("is truncated: fetch it again")
        piece = self.data[self.at : end]
        self.at = end
        return piece

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _line(self) -> str:
        piece = bytes(self.data[self.at : self.at + _MAX_NAME + 1])
        end = piece.find(b"\n")
        if end < 0:
            raise RefusedError("is damaged: a name in it does not end")
        self.at += end + 1
        return _text(piece[:end])

    # the stack

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _pop(self) -> Any:
        if not self.stack or self.stack[-1] is _Mark:
            raise RefusedError("is damaged: a pickle in it takes more than it has put")
        return self.stack.pop()

    def _top(self) -> Any:
        value = self._pop()
        self.stack.append(value)
        return value

    def _pop_mark(self) -> list[Any]:
        """What was put since the last mark."""
        items: list[Any] = []
        while self.stack:
            value = self.stack.pop()
            if value is _Mark:
                items.reverse()
                return items
            items.append(value)
        raise RefusedError("is damaged: a pickle in it takes more than it has put")

    def _remember(self, index: int) -> None:
        if index > MAX_OPERATIONS:  # picklers count from 0
            raise RefusedError("is damaged: a pickle in it keeps more than it has")
        self.memo[index] = self._top()

    def _recall(self, index: int) -> None:
        if index not in self.memo:
            raise RefusedError("is damaged: a pickle in it recalls what it has not kept")
        self.stack.append(self.memo[index])

    # containers

    def _append(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is not list:
            raise RefusedError(f"appends to {say(target)}")
        target.extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is not dict or len(items) % 2:
            raise RefusedError(f"sets items of {say(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not is_key(key):
                raise RefusedError(f"has a table with a key that is {say(key)}")
            target[key] = value

    def _add(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is not set or not all(map(is_key, items)):
            raise RefusedError(f"adds to {say(target)} what is neither text nor number")
        target.update(items)

    # names and calls

    def _name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise RefusedError("names a global by what is no text")
        entry = self.table.get((module, name))
        if entry is None:
            raise RefusedError(_foreign(module, name))
        self.stack.append(entry)

    def _call(self, new: bool) -> None:
        args, function = self._pop(), self._pop()
        if not isinstance(function, Constructor) or type(args) is not tuple or (new and not function.new):
            raise RefusedError(f"calls {say(function)}")
        # a set is made of a list, item by item, and the same list may be given a thousand times
        self.budget.spend_operations(sum(len(item) for item in args if type(item) is list))
        try:
            self.stack.append(function.make(*args))
        except TypeError as error:  # too many arguments, or too few
            raise RefusedError(f"makes a {function.name} of {len(args)} arguments") from error

    def _build(self) -> None:
        state = self._pop()
        build(self._top(), state)

    def _proto(self) -> None:
        version = self._take(1)[0]
        if version > _MAX_PROTOCOL:
            raise RefusedError(f"is of pickle protocol {version}: protocols 2 to {_MAX_PROTOCOL} are read")

    def _frame(self) -> None:
        if self._number("<Q") > len(self.data) - self.at:
            raise RefusedError("is truncated: fetch it again")

    def _persid(self) -> None:
        if self.persistent is None:
            raise RefusedError("has a persistent id where none belongs")
        self.stack.append(self.persistent(self._pop()))

    def _frozen(self) -> None:
        items = self._pop_mark()
        if not all(map(is_key, items)):
            raise RefusedError("has a set of what is neither text nor number")
        self.stack.append(frozenset(items))


def _foreign(module: str, name: str) -> str:
    where = repr(f"{module[:_MAX_NAME]}.{name[:_MAX_NAME]}")[1:-1]  # without control characters
    return f"names {where}, which no published network needs: do not trust it"


def _text(data: memoryview | bytes) -> str:
    try:
        return str(data, "utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise RefusedError("is damaged: a text in it is none") from error


def _stack_global(m: Machine) -> None:
    name, module = m._pop(), m._pop()
    m._name(module, name)


def _pair(m: Machine) -> list[Any]:
    value, key = m._pop(), m._pop()
    return [key, value]


def _tuple(m: Machine, count: int) -> None:
    items = [m._pop() for _ in range(count)]
    m._push(tuple(reversed(items)))


def _pop_any(m: Machine) -> None:
    if not m.stack:
        raise RefusedError("is damaged: a pickle in it takes more than it has put")
    m.stack.pop()


_HANDLERS: dict[int, Callable[[Machine], Any]] = {
    0x80: Machine._proto,
    0x95: Machine._frame,
    0x28: lambda m: m._push(_Mark),
    0x30: _pop_any,
    0x31: lambda m: m._pop_mark(),  # POP_MARK
    0x4E: lambda m: m._push(None),
    0x88: lambda m: m._push(True),
    0x89: lambda m: m._push(False),
    0x4A: lambda m: m._push(m._number("<i")),
    0x4B: lambda m: m._push(m._number("<B")),
    0x4D: lambda m: m._push(m._number("<H")),
    0x8A: lambda m: m._push(int.from_bytes(m._take(m._number("<B")), "little", signed=True)),  # LONG1
    0x47: lambda m: m._push(m._number(">d")),
    0x8C: lambda m: m._push(_text(m._take(m._number("<B")))),
    0x58: lambda m: m._push(_text(m._take(m._number("<I")))),
    0x8D: lambda m: m._push(_text(m._take(m._number("<Q")))),
    0x43: lambda m: m._push(m._take(m._number("<B"))),
    0x42: lambda m: m._push(m._take(m._number("<I"))),
    0x8E: lambda m: m._push(m._take(m._number("<Q"))),
    0x29: lambda m: m._push(()),
    0x74: lambda m: m._push(tuple(m._pop_mark())),
    0x85: lambda m: _tuple(m, 1),
    0x86: lambda m: _tuple(m, 2),
    0x87: lambda m: _tuple(m, 3),
    0x5D: lambda m: m._push([]),
    0x61: lambda m: m._append([m._pop()]),
    0x65: lambda m: m._append(m._pop_mark()),
    0x7D: lambda m: m._push({}),
    0x73: lambda m: m._set(_pair(m)),
    0x75: lambda m: m._set(m._pop_mark()),
    0x8F: lambda m: m._push(set()),
    0x90: lambda m: m._add(m._pop_mark()),
    0x91: Machine._frozen,
    0x63: lambda m: m._name(m._line(), m._line()),
    0x93: _stack_global,
    0x52: lambda m: m._call(new=False),
    0x81: lambda m: m._call(new=True),
    0x62: Machine._build,
    0x71: lambda m: m._remember(m._number("<B")),
    0x72: lambda m: m._remember(m._number("<I")),
    0x94: lambda m: m._remember(len(m.memo)),
    0x68: lambda m: m._recall(m._number("<B")),
    0x6A: lambda m: m._recall(m._number("<I")),
    0x51: Machine._persid,
}
