"""A corpus of files that are no snapshots but say so: each has a name, its bytes, and what the one line must say.

Pickles are put together opcode by opcode, because no pickler writes most of them. What would run leaves a trace:
`builtins.HOSTILE_RAN`, or the file `hostile_ran` in the working folder.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator

import torch

from tests.checkpoints.snapshots import TINY, persistent, storing, tiny, write_snapshot

TRACE = "HOSTILE_RAN"
TRACE_FILE = "hostile_ran"
SHELL = f"touch {TRACE_FILE}"
CODE = f"import builtins; builtins.{TRACE} = True"

Case = tuple[str, bytes, str]
_TRUST = "which no published network needs: do not trust it"


def pickled(body: bytes, protocol: int = 4) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


def name(path: str) -> bytes:
    module, _, attribute = path.rpartition(".")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def stacked(path: str) -> bytes:
    module, _, attribute = path.rpartition(".")
    return text(module) + text(attribute) + b"\x93"


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def binary(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


def whole(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(whole, values)) + b"t"


def entry(body: bytes, protocol: int = 4) -> bytes:
    """{'ema': body}."""
    return pickled(b"}" + text("ema") + body + b"s", protocol)


def record(class_name: str, state: bytes) -> bytes:
    """A persistent object with a state that `state` makes."""
    items = text("type") + text("class") + text("version") + b"K\x06" + text("module_src") + text(CODE)
    items += text("class_name") + text(class_name) + text("state") + state
    return name("torch_utils.persistence._reconstruct_persistent_obj") + b"}(" + items + b"u\x85R"


def module(state: bytes) -> bytes:
    """A ModuleDict with a state that `state` makes."""
    return name("torch.nn.modules.container.ModuleDict") + b")\x81" + state + b"b"


def storage_blob(numel: int = 4, claimed: int | None = None, root: bytes | None = None, written: int = 4) -> bytes:
    """A storage as torch.save wrote it before zip; `claimed` in the pickle, `numel` in front of `written` floats."""
    claim = numel if claimed is None else claimed
    identity = b"(" + text("storage") + name("torch.FloatStorage") + text("0") + text("cpu") + whole(claim) + b"Nt"
    system = b"}" + text("little_endian") + b"\x88s"
    parts = [whole(0x1950A86A20F9469CFC6C), whole(1001), system, identity + b"Q" if root is None else root]
    parts.append(b"]" + text("0") + b"a")
    return b"".join(pickled(part, 2) for part in parts) + struct.pack("<q", numel) + b"\0" * (4 * written)


def storage(blob: bytes) -> bytes:
    return name("torch.storage._load_from_bytes") + binary(blob) + b"\x85R"


def tensor(shape: bytes, stride: bytes, offset: bytes = b"K\0", blob: bytes | None = None) -> bytes:
    head = name("torch._utils._rebuild_tensor_v2") + b"(" + storage(storage_blob() if blob is None else blob)
    return head + offset + shape + stride + b"\x89" + name("collections.OrderedDict") + b")Rt" + b"R"


def zip_blob(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return file.getvalue()


def zip_storage(size: int = 16, claimed: int = 4, **changed: bytes) -> dict[str, bytes]:
    identity = b"(" + text("storage") + name("torch.FloatStorage") + text("0") + text("cpu") + whole(claimed) + b"tQ"
    return {"x/data.pkl": pickled(identity, 2), "x/byteorder": b"little", "x/data/0": b"\0" * size, **changed}


_FOREIGN = """
os.system posix.system nt.system subprocess.Popen subprocess.check_output pty.spawn builtins.eval builtins.exec
builtins.getattr builtins.__import__ builtins.compile builtins.open builtins.setattr builtins.globals
__builtin__.eval __builtin__.getattr functools.partial functools.reduce operator.attrgetter operator.methodcaller
codecs.encode codecs.decode _codecs.decode copyreg._reconstructor copyreg.__newobj__ copyreg.add_extension
importlib.import_module runpy._run_code pickle.loads _pickle.loads marshal.loads types.FunctionType
types.CodeType sys.exit webbrowser.open timeit.timeit pdb.run bdb.Bdb.run code.interact torch.load
torch.serialization.load torch.jit.load torch.hub.load torch._utils._rebuild_wrapper_subclass
torch._tensor._rebuild_from_type_v2 torch.nn.modules.linear.Linear torch.storage.UntypedStorage
numpy.core.multiarray._reconstruct numpy.ndarray numpy.load collections.defaultdict collections.namedtuple
collections.OrderedDict.fromkeys dnnlib.util.call_func_by_name dnnlib.util.EasyDict.__init__
torch_utils.persistence.import_hook torch_utils.persistence._src_to_module torch_utils.persistence._Meta
training.networks.EDMPrecond sign_fast.models.EDMPrecond sign_fast.checkpoints.published.records.Record
sign_fast.checkpoints.published.snapshot._read asyncio.run ctypes.CDLL shutil.rmtree tempfile.mktemp
"""


def foreign_names() -> Iterator[Case]:
    for path in _FOREIGN.split():
        words = text(CODE if path.rpartition(".")[2] in ("eval", "exec", "compile") else SHELL)
        yield f"calls {path}", entry(name(path) + words + b"\x85R"), f"names {path}, {_TRUST}"
    call = text(SHELL) + b"\x85"
    for route, body in {
        "REDUCE of a stacked name": stacked("os.system") + call + b"R",
        "NEWOBJ": name("os.system") + call + b"\x81",
        "NEWOBJ_EX": name("os.system") + call + b"}\x92",
        "OBJ": b"(" + name("os.system") + text(SHELL) + b"o",
        "INST": b"(" + text(SHELL) + b"ios\nsystem\n",
        "never called": name("os.system") + b"0N",
        "named by memo": text("os") + b"\x940" + text("system") + b"\x940" + b"h\0h\1\x93" + call + b"R",
        "inside a tuple": b"K\1" + name("os.system") + b"\x86",
    }.items():
        yield f"os.system by {route}", entry(body), f"names os.system, {_TRUST}"
    known = name("dnnlib.util.EasyDict") + b")"
    yield "EasyDict by NEWOBJ_EX", entry(known + b"}\x92"), f"uses the pickle opcode NEWOBJ_EX, {_TRUST}"
    yield "EasyDict by OBJ", entry(b"(" + name("dnnlib.util.EasyDict") + b"o"), "uses the pickle opcode OBJ"
    yield "INST of a known class", entry(b"(icollections\nOrderedDict\n"), "names collections.OrderedDict"
    yield (
        "a name of control characters",
        entry(text("os\x1b[2J\n") + text("sys\ntem") + b"\x93"),
        r"os\\x1b\[2J\\n\.sys",
    )
    yield "a name that is a number", entry(b"K\1K\2\x93"), "names a global by what is no text"
    yield "a name without end", entry(b"c" + b"a" * 5000), "a name in it does not end"
    yield "a long name", entry(text("a" * 10**6) + text("b" * 10**6) + b"\x93"), "names aaa.*, which no published"


def abused_constructors() -> Iterator[Case]:
    persistence = name("torch_utils.persistence._reconstruct_persistent_obj")
    attributes = b"}" + text("__code__") + text("x") + b"s"
    for what, target in {
        "a function": persistence,
        "a class": name("dnnlib.util.EasyDict"),
        "a storage type": name("torch.FloatStorage"),
        "a table": b"}",
        "a list": b"]",
        "a number": b"K\1",
        "a persistent object": record("EDMLoss", b"}"),
        "a tensor": tensor(numbers((4,)), numbers((1,))),
        "a built module": module(b"}"),
    }.items():
        yield f"BUILD of {what}", entry(target + attributes + b"b"), "sets the state of"
        yield f"BUILD with slots of {what}", entry(target + b"N" + attributes + b"\x86b"), "sets the state of"
        if what not in ("a table", "a list"):
            yield f"SETITEM of {what}", entry(target + text("a") + b"Ns"), "sets items of"
            yield f"APPEND to {what}", entry(target + b"Na"), "appends to"
        yield f"REDUCE of {what}", entry(target + b"(K\1K\1K\1K\1K\1K\1K\1K\1tR"), "calls|makes a"
        yield f"BUILD from a tuple of {what}", entry(target + b"(K\1K\1tb" + b"0"), "sets the state of"
    yield "NEWOBJ of what is no class", entry(persistence + b"}\x85\x81"), "calls Constructor"
    yield "REDUCE without a tuple", entry(persistence + b"}R"), "calls Constructor"
    for args in (b"}", b"N", b"]"):
        yield f"a persistent object of {args!r}", entry(persistence + args + b"\x85R"), "without type, version"
    yield "EasyDict of pairs", entry(name("dnnlib.util.EasyDict") + b"}\x85R"), "makes a EasyDict of 1 arguments"
    pairs = b"](" + text("a") + name("os.system") + b"\x86e"
    yield "OrderedDict of pairs", entry(name("collections.OrderedDict") + pairs + b"\x85R"), "names os.system"
    yield "OrderedDict of a list", entry(name("collections.OrderedDict") + b"]\x85R"), "makes a OrderedDict of 1"
    yield (
        "OrderedDict in attributes",
        entry(name("collections.OrderedDict") + b")R" + attributes + b"b"),
        "state of dict",
    )
    yield (
        "encode by another codec",
        entry(name("_codecs.encode") + text("x") + text("rot13") + b"\x86R"),
        "not written as",
    )
    yield (
        "encode of what is not latin",
        entry(name("_codecs.encode") + text("σ") + text("latin1") + b"\x86R"),
        "not written",
    )
    yield "a set of tables", entry(name("builtins.set") + b"]}a\x85R"), "neither text nor number"
    yield "NumPy's objects", entry(name("numpy.dtype") + text("O") + b"\x85R"), "NumPy's type 'O'"
    number = name("numpy.core.multiarray.scalar") + name("numpy.dtype") + text("f8") + b"\x85R"
    yield "NumPy's number of a wrong size", entry(number + binary(b"x" * 7) + b"\x86R"), "of a wrong size"
    yield "NumPy's big-endian", entry(name("numpy.dtype") + text("f8") + b"\x85RK\3" + text(">") + b"\x86b"), "state of"
    yield "a persistent id", entry(text("x") + b"Q"), "has a persistent id where none belongs"


def nested_pickles() -> Iterator[Case]:
    run = name("os.system") + text(SHELL) + b"\x85R"
    for what, blob, line in (
        ("a plain pickle", pickled(run), "names os.system"),
        ("behind the magic number", storage_blob(root=run), "names os.system"),
        ("a zip", zip_blob({"x/data.pkl": pickled(run)}), "names os.system"),
        ("itself", storage_blob(root=storage(b"")), r"names torch\.storage\._load_from_bytes"),
        ("a persistent object", storage_blob(root=record("X", b"}")), "names torch_utils.persistence"),
        ("a module", storage_blob(root=b"(" + text("module") + b"NNNtQ"), "where a storage belongs|does not name"),
        ("nothing", b"", "is truncated"),
        ("a tar", b"storages" + b"\0" * 600, "is damaged"),
        ("no storage", storage_blob(root=b"K\1"), "does not name those"),
        ("big-endian", storage_blob().replace(b"\x88s", b"\x89s"), "big-endian"),
    ):
        yield f"a storage that is {what}", entry(storage(blob)), line
    yield "a storage of text", entry(name("torch.storage._load_from_bytes") + text("x") + b"\x85R"), "not in bytes"
    for what, (numel, claimed, written) in {
        "larger in its pickle": (4, 2**40, 4),
        "smaller in its pickle": (4, 1, 4),
        "larger in both": (2**61, 2**61, 4),
        "negative": (-1, -1, 0),
        "followed by more": (4, 4, 9),
        "cut": (4, 4, 3),
    }.items():
        blob = storage_blob(numel, claimed, written=written)
        yield f"a storage {what}", entry(storage(blob)), "is of another size|without type|more follows"
    odd = b"(" + text("storage") + name("torch.FloatStorage") + text("0") + text("cpu") + whole(4)
    yield "a storage that is a view", entry(storage(storage_blob(root=odd + b"]tQ"))), "view of another"
    yield (
        "a storage without type",
        entry(storage(storage_blob(root=b"(" + text("storage") + b"NNNNNtQ"))),
        "without type",
    )


def archives() -> Iterator[Case]:
    good = zip_blob(zip_storage())
    end = good.rfind(b"PK\x05\x06")
    directory = struct.unpack("<I", good[end + 16 : end + 20])[0]

    def patched(at: int, layout: str, value: int) -> bytes:
        data = bytearray(good)
        struct.pack_into(layout, data, at, value)
        return bytes(data)

    doubled = io.BytesIO()
    with zipfile.ZipFile(doubled, "w") as archive:
        for member, data in [*zip_storage().items(), ("x/data/1", b"\0" * 16)]:
            archive.writestr(member, data)
    twice = doubled.getvalue().replace(b"x/data/1", b"x/data/0")
    bomb = zip_blob(zip_storage(2**24, 2**22), zipfile.ZIP_DEFLATED)
    cases = {
        "compressed": (bomb, "compressed or encrypted"),
        "with a name twice": (twice, "two files named 'x/data/0'"),
        "with ../": (zip_blob(zip_storage(**{"x/../../out": b""})), "unsafe file name 'x/../../out'"),
        "with an absolute name": (zip_blob(zip_storage(**{"/etc/out": b""})), "unsafe file name '/etc/out'"),
        "with a backslash": (zip_blob(zip_storage(**{"x\\..\\out": b""})), "unsafe file name"),
        "encrypted": (patched(directory + 8, "<H", 1), "compressed or encrypted"),
        "of two sizes": (patched(directory + 20, "<I", 1), "compressed or encrypted"),
        "with a wrong checksum": (patched(directory + 16, "<I", 1), "the checksum of 'x/data.pkl' does not fit"),
        "reaching out": (
            patched(directory + 20, "<I", 2**30)[: directory + 24] + struct.pack("<I", 2**30) + good[directory + 28 :],
            "reaches out of it",
        ),
        "whose directory lies elsewhere": (patched(end + 16, "<I", directory - 1), "does not fit|another size"),
        "whose directory is far away": (patched(end + 16, "<I", 2**31), "does not fit"),
        "of a million files": (
            patched(end + 10, "<H", 60000)[: end + 8] + b"\x60\xea\x60\xea" + good[end + 12 :],
            "not fit",
        ),
        "with a comment": (good[:-2] + b"\1\0x", "is truncated, or no archive"),
        "whose file is elsewhere": (patched(directory + 42, "<I", 7), "is not where the directory says"),
        "without its pickle": (zip_blob({"x/data/0": b""}), r"without the data\.pkl"),
        "without its storage": (zip_blob({"x/data.pkl": zip_storage()["x/data.pkl"]}), "lacks its storage '0'"),
        "whose storage is short": (zip_blob(zip_storage(15)), "15 bytes that claims 4 elements"),
        "whose storage is long": (zip_blob(zip_storage(17)), "17 bytes that claims 4 elements"),
        "of a big-endian machine": (zip_blob(zip_storage(**{"x/byteorder": b"big"})), "big-endian"),
        "with files inside each other": (_overlapping(), "whose files overlap"),
    }
    for what, (data, line) in cases.items():
        yield f"a storage in an archive {what}", entry(storage(data)), line
        yield f"an archive {what}", data, f"{line}|holds Storage"


def _overlapping() -> bytes:
    """Two entries of the directory for one file's bytes: the second lies in the first one's content."""
    inner = zip_blob({"y": b"1"})
    inner = inner[: inner.find(b"PK\x01\x02")]
    outer = zip_blob({"x/data.pkl": inner})
    start = outer.find(b"PK\x01\x02")
    begin = outer.find(inner)
    first = outer[start : outer.rfind(b"PK\x05\x06")]
    second = struct.pack(
        "<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, 0, 0, 33, zlib.crc32(b"1"), 1, 1, 1, 0, 0, 0, 0, 0, begin
    )
    second += b"y"
    size = len(first) + len(second)
    return outer[:start] + first + second + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 2, 2, size, start, 0)


def tensors() -> Iterator[Case]:
    out, one = "reaches out of its storage", numbers((1,))
    for what, (shape, stride, offset, line) in {
        "larger than its storage": (numbers((5,)), one, b"K\0", out),
        "of a product that overflows": (numbers((2**32, 2**32)), numbers((0, 0)), b"K\0", out),
        "of one value a million times": (numbers((10**6,)), numbers((0,)), b"K\0", out),
        "with a stride out of it": (numbers((2,)), numbers((4,)), b"K\0", out),
        "with a huge stride": (numbers((2,)), numbers((2**63,)), b"K\0", out),
        "with a negative stride": (numbers((2,)), numbers((-1,)), b"K\1", "has -1 where a tensor's sizes are"),
        "with a negative size": (numbers((-4,)), one, b"K\0", "has -4 where"),
        "with a negative offset": (numbers((2,)), one, whole(-2), "has -2 where"),
        "with an offset out of it": (numbers((2,)), one, whole(2**62), out),
        "of floats": (b"G\x40\0\0\0\0\0\0\0\x85", one, b"K\0", r"has 2\.0 where"),
        "of truth values": (b"\x88\x85", one, b"K\0", "has True where"),
        "of more strides than sizes": (one, numbers((1, 1)), b"K\0", "too many dimensions, or without"),
        "of many dimensions": (numbers((1,) * 100), numbers((1,) * 100), b"K\0", "too many dimensions"),
        "of a list": (b"]", b"]", b"K\0", "a tensor that is none"),
        "of a number of a thousand bits": (whole(2**1000) + b"\x85", one, b"K\0", out),
    }.items():
        yield f"a tensor {what}", entry(tensor(shape, stride, offset)), line
    yield (
        "a tensor without a storage",
        entry(name("torch._utils._rebuild_tensor_v2") + b"(NK\0))\x89)tR"),
        "that is none",
    )
    yield "a parameter that is none", entry(name("torch._utils._rebuild_parameter") + b"N\x89)\x87R"), "no tensor"


def _arguments(body: bytes) -> bytes:
    return entry(record("EDMPrecond", b"}(" + text("_init_kwargs") + b"}" + text("channel_mult") + body + b"su"))


def bombs() -> Iterator[Case]:
    laughs = (
        b"]("
        + text("ha") * 2
        + b"e\x940"
        + b"](h\0h\0e\x94"
        + b"".join(b"0](" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"e\x94" for i in range(1, 100))
    )
    towers = b"K\1\x85\x94" + b"".join(b"0h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(100))
    yield "a billion laughs of lists", pickled(laughs), "holds list, not the table"
    yield "a billion laughs as the network", entry(laughs), "holds no network of this library"
    yield "a billion laughs of tuples", entry(towers), "holds no network"
    yield "a billion laughs as argument", _arguments(laughs), "without end"
    yield "a billion laughs of tuples as argument", _arguments(towers), "without end"
    yield "a tower of tuples as a key", entry(b"}" + towers + b"Ns"), "a key that is tuple"
    modules = (
        module(b"}")
        + b"\x940"
        + b"".join(
            module(
                b"}" + text("_modules") + b"}(" + text("a") + b"h" + bytes([i]) + text("b") + b"h" + bytes([i]) + b"us"
            )
            + b"\x940"
            for i in range(30)
        )
    )
    network = record(
        "EDMPrecond", b"}(" + text("_init_kwargs") + b"}" + text("_modules") + b"}" + text("m") + b"h\x1esu"
    )
    yield "a billion laughs of modules", pickled(modules + b"}" + text("ema") + network + b"s"), "without end"
    for what, opening, closing in (
        ("tuples", b"", b"\x85"),
        ("lists", b"]", b"a"),
        ("tables", b"}" + text("a"), b"s"),
    ):
        deep = opening * 100_000 + b"N" + closing * 100_000
        yield f"100,000 nested {what}", entry(deep), "holds no network"
        yield f"100,000 nested {what} as argument", _arguments(deep), "without end|as argument channel_mult"
    deep = b"N" + b"\x85" * 100_000
    yield "a deep tuple as a key", entry(b"}" + deep + b"Ns"), "a key that is tuple"
    yield "a deep tuple in a set", entry(b"\x8f(" + deep + b"\x90"), "neither text nor number"
    yield "a deep tuple in a frozen set", entry(b"(" + deep + b"\x91"), "neither text nor number"
    made = name("torch.nn.modules.container.ModuleDict") + b")\x81}" + text("_modules") + b"}" + text("m")
    chain = made * 5000 + b"N" + b"ssb" * 5000
    network = record(
        "EDMPrecond", b"}(" + text("_init_kwargs") + b"}" + text("_modules") + b"}" + text("m") + chain + b"su"
    )
    yield "5,000 nested modules", entry(network), "nested without end"
    yield "a list in itself", entry(b"]\x94h\0a"), "holds no network"
    yield "a table in itself", entry(b"}\x94" + text("a") + b"h\0s"), "holds no network"
    yield "a state in itself", entry(record("EDMPrecond", b"}\x94" + text("_init_kwargs") + b"h\0s")), "'_init_kwargs'"
    yield "the root in itself", pickled(b"}\x94" + text("ema") + b"h\0s"), "holds no network"

    collisions = b"".join(b"".join((whole(i * (2**61 - 1)), b"N")) for i in range(1, 2000))
    yield "keys that collide", entry(b"}(" + collisions + b"u"), "a key that is"
    yield "a memo of a huge index", entry(b"Nr\xff\xff\xff\xff"), "keeps more than it has"
    yield "a memo recalled before it is kept", entry(b"h\7"), "recalls what it has not kept"
    yield "endless operations", pickled(b"N0" * 600_000), "takes more than 1,000,000 operations"
    items = b"]q\0(" + b"".join(b"J" + struct.pack("<i", i) for i in range(20_000)) + b"e0"
    sets = name("builtins.set") + b"q\x010" + b"h\x01h\0\x85R" * 10_000
    yield "a list made a set ten thousand times", pickled(items + sets + b"N"), "takes more than 1,000,000 operations"
    yield "a million marks", pickled(b"(" * 1_100_000), "takes more than 1,000,000 operations"
    big = text("x" * 10**5) + b"\x940"
    encode = name("_codecs.encode") + b"h\0" + text("latin1") + b"\x86R0"
    yield "bytes made again and again", pickled(big + encode * 300), "repeats its content beyond its own size"
    blob = binary(storage_blob(25_000, written=25_000)) + b"\x940"
    again = name("torch.storage._load_from_bytes") + b"h\0\x85R0"
    yield "a storage read again and again", pickled(blob + again * 300), "repeats its content beyond its own size"
    zipped = binary(zip_blob(zip_storage(10**5, 25_000))) + b"\x940"
    yield "an archive read again and again", pickled(zipped + again * 300), "repeats its content beyond its own size"


def opcodes() -> Iterator[Case]:
    cut = "is truncated"
    yield "bytes of 2⁶³", entry(b"\x8e" + struct.pack("<Q", 2**63)), cut
    yield "bytes of 2³¹", entry(b"B" + struct.pack("<I", 2**31)), cut
    yield "text of 2⁶³", entry(b"\x8d" + struct.pack("<Q", 2**63)), cut
    yield "text that is none", entry(b"X" + struct.pack("<I", 2) + b"\xff\xfe"), "a text in it is none"
    yield "a frame of 2⁶³", pickled(b"\x95" + struct.pack("<Q", 2**63) + b"}"), cut
    yield "a number of 2³¹ bytes", entry(b"\x8b" + struct.pack("<i", 2**31 - 1)), "uses the pickle opcode LONG4"
    yield "a number of a negative size", entry(b"\x8b" + struct.pack("<i", -1)), "uses the pickle opcode LONG4"
    for opcode, body in {
        "INT": b"I1\n", "LONG": b"L" + b"9" * 5000 + b"L\n", "FLOAT": b"F1\n", "STRING": b"S'a'\n", "UNICODE": b"Va\n",
        "GET": b"g0\n", "PUT": b"Np4294967295\n", "PERSID": b"Px\n", "EXT1": b"\x82\1", "EXT2": b"\x83\1\0",
        "EXT4": b"\x84\1\0\0\0", "DUP": b"N2", "BYTEARRAY8": b"\x96" + struct.pack("<Q", 2**40), "NEXT_BUFFER": b"\x97",
        "READONLY_BUFFER": b"N\x98", "LIST": b"(l", "DICT": b"(d", "BINSTRING": b"T\1\0\0\0a",
        "SHORT_BINSTRING": b"U\1a",
    }.items():  # fmt: skip
        yield f"the opcode {opcode}", entry(body), f"uses the pickle opcode {opcode}, {_TRUST}"
    less = "takes more than it has put"
    for what, body in {
        "SETITEM": b"s", "APPENDS": b"](", "REDUCE": b"R", "BUILD": b"}b", "POP": b"0", "POP_MARK": b"1",
        "TUPLE3": b"N\x87", "a mark as a value": b"(\x85", "a mark as a call": b"((R", "MEMOIZE": b"\x94",
        "STACK_GLOBAL": b"\x93",
    }.items():  # fmt: skip
        yield f"{what} of nothing", b"\x80\4" + body + (b"e." if what == "APPENDS" else b"."), f"{less}|one value|holds"
    yield "items of half a pair", entry(b"}(Nu"), "sets items of"
    yield "no end", b"\x80\4}", cut
    yield "nothing but an end", pickled(b""), "other than one value"
    yield "two values", pickled(b"}}"), "other than one value"
    yield "only a protocol", b"\x80\4", cut
    yield "a byte that is no opcode", entry(b"\xfe"), "is no opcode"


def cases() -> list[Case]:
    """(name, bytes, what the one line must match)."""
    groups = (foreign_names, abused_constructors, nested_pickles, archives, tensors, bombs, opcodes)
    found = [case for group in groups for case in group()]
    assert len({case[0] for case in found}) == len(found)
    return found


def harmless() -> list[tuple[str, bytes]]:
    """Files that load, and carry source that would leave a trace."""
    good = write_snapshot({"ema": persistent(tiny(), TINY, module_src=CODE), "loss_fn": storing("X", code=CODE)})
    file = io.BytesIO()
    torch.save(torch.zeros(1), file)
    return [("a snapshot whose source would run", good)]
