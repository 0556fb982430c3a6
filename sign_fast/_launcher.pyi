"""Launches precompiled CUDA kernels, without torch or Triton; built from csrc/launcher."""

from collections.abc import Sequence
from typing import Any

class DriverError(RuntimeError):
    """The CUDA driver, or its library, could not do what was asked; the message says what to do about it.

    code: the CUresult, or 0 where the library is missing, too old, unusable, or was in use before a fork.
    function: what failed, e.g. "cuModuleLoadData".
    """

    code: int
    function: str

class Launcher:
    """Precompiled kernels on this process's GPUs. Every method may be called from any thread.

    driver: the CUDA driver library's name or path; nothing is opened before it is needed.

    Modules stay loaded as long as the process: captured graphs refer to them.
    """

    def __new__(cls, driver: str = "libcuda.so.1") -> Launcher: ...
    def declare(self, kernel: str, parameters: Sequence[tuple[Any, ...]]) -> None:
        """Make a kernel known by its parameters, in its order.

        parameters: (name, is_constexpr, default), after which may come whether an integer 1 is compiled in and whether
        it matters that 16 divides the value (both True: not so with Triton's do_not_specialize). A default that is a
        class, as inspect.Parameter.empty, means that there is none.

        Raises:
            TypeError: a parameter is not of that form.
            ValueError: the kernel has been declared with other parameters, or has more than 248 arguments.
        """

    def key(
        self,
        kernel: str,
        arguments: dict[str, Any],
        constants: dict[str, Any],
        num_warps: int,
        num_stages: int,
        enable_fp_fusion: bool,
    ) -> str:
        """The name of the variant that such a launch needs; see kernels/packs/key.py. Tensors may be on meta.

        Raises:
            LookupError: the kernel has not been declared.
            TypeError: an argument or constant of another type, missing, unknown or given twice; an integer of more
                than 64 bits.
        """

    def add(
        self,
        device: int,
        key: str,
        image: bytes,
        symbol: str,
        num_warps: int,
        shared_bytes: int,
        parameter_sizes: bytes,
    ) -> None:
        """Load a kernel on a device now, under that key; an image that is loaded there is not loaded again.

        Allowed while a graph is captured.

        image: ELF machine code or PTX text.
        shared_bytes: dynamic shared memory of a launch.
        parameter_sizes: one byte, a size in bytes, for each parameter of the machine code, scratch pointers included.

        Raises:
            DriverError: no driver, no such device, an image that does not fit it, no memory, an unknown symbol.
                Nothing is left behind: the same call may succeed later.
            ValueError: num_warps is not in 1 to 32, or a size not in 1 to 8.
        """

    def launch(
        self,
        device: int,
        stream: int,
        kernel: str,
        grid: tuple[int, ...],
        arguments: dict[str, Any],
        constants: dict[str, Any],
        num_warps: int,
        num_stages: int,
        enable_fp_fusion: bool,
    ) -> str | None:
        """Launch on a stream of that device: None. Where the variant has not been added there: its key.

        Tensors have to be in memory that the device reaches: nothing checks it. A grid with a 0 launches nothing.

        stream: a CUstream's address, torch.cuda.current_stream().cuda_stream.
        grid: 1 to 3 numbers of programs.

        Raises:
            DriverError: the launch failed, or CUDA was in use before this process was forked.
            LookupError, TypeError: as `key`; a tensor is on the meta device.
            ValueError: the machine code under that key takes other parameters; nothing is launched.
        """

    def driver_version(self) -> int:
        """The CUDA version that the driver supports, 12080 for 12.8; opens the library, does not initialise CUDA.

        Raises:
            DriverError: the library is missing, or supports no CUDA 12.0.
        """

    @property
    def loaded(self) -> dict[int, int]:
        """Number of modules by device."""

    @property
    def launches(self) -> int:
        """How many kernels were launched so far."""
