"""A GPU that computes nothing: Triton's own launcher over a fake driver, and tensors of which nobody reads an element.

Memory: an address is handed out once and never again, so a freed tensor's address stays a freed tensor's. Pages are
reserved, not mapped, so a batch of 256 images takes neither memory nor time.
Operations: PyTorch's give an output of the right shape, dtype and strides, and leave its elements alone; views are views;
the package's own run, and launch.
Launches: Triton's launcher takes the arguments and encodes the descriptors; before that each address, in an argument, in a
descriptor, or in a table of addresses, has to lie in a tensor that is alive, a descriptor's view with all its elements.
Kernels are compiled as far as shared memory and descriptors need it: what follows is half of the time, and test_compile.py's.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler, driver
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

CPU, META = torch.device("cpu"), torch.device("meta")
_ALIGNMENT = 512  # of PyTorch's allocator for CUDA
_LEAST_ADDRESS = 2**40  # no size is as large
_NORESERVE = 0x4000  # mmap's flag of that name on Linux
_NOT_MADE = "// not made here"


# The package's operations in Python, by name, as it registers them.
_OWN: dict[str, Callable] = {}


class _Library(torch.library.Library):
    def impl(self, name, kernel, dispatch_key="", **options):
        if self.ns == "resnet_kernels" and dispatch_key == "CompositeExplicitAutograd":
            _OWN[name] = kernel
        return super().impl(name, kernel, dispatch_key, **options)


class Memory:
    """Addresses without pages; `owner` says whether one of them belongs to a tensor that is alive."""

    def __init__(self, size: int = 2**44):
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        self.start = self._next = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.end = self.start + size
        self._starts: list[int] = []
        self._blocks: list[tuple[int, StorageWeakRef]] = []

    def tensor(self, shape, strides, dtype: torch.dtype) -> Tensor:
        """A new tensor of zeros."""
        elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides)) if 0 not in shape else 0
        size = elements * dtype.itemsize
        storage = torch._C._construct_storage_from_data_pointer(self._next, CPU, size)
        self._starts.append(self._next)
        self._blocks.append((self._next + size, StorageWeakRef(storage)))
        # A gap behind each: an address one past the end is nobody's.
        self._next += (size // _ALIGNMENT + 1) * _ALIGNMENT
        return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape), tuple(strides))

    def why_not(self, first: int, last: int) -> str | None:
        """What is wrong with a kernel that reads bytes from `first` to `last`; None if one live tensor holds them."""
        if not self.start <= first < self.end:
            return "lies in no tensor's memory"
        index = bisect_right(self._starts, first) - 1
        end, storage = self._blocks[index]
        if storage.expired():
            return "lies in a tensor that was freed"
        return None if first < end and last < end else f"leaves its tensor by {max(first, last) - end + 1} bytes"


MEMORY = Memory()
LAUNCHED: Counter[str] = Counter()  # by kernel
SPANS: list[dict[str, tuple[int, int]]] = []  # by launch, where each tensor lies; no tensors: they have to die
_MADE: list[str] = []


class Shapes(TorchDispatchMode):
    """Runs every operation of PyTorch on shapes alone."""

    def __init__(self):
        super().__init__()
        self.called: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.called[str(func)] += 1
        if func.namespace == "resnet_kernels":
            with self:
                return _OWN[func._schema.name.split("::")[1]](*args, **kwargs)
        if func is torch.ops.aten.lift_fresh.default:
            # torch.tensor: its elements are real, a table of addresses perhaps.
            return self._real(args[0])
        if func.overloadpacket is torch.ops.aten.set_ and isinstance(args[1], torch.UntypedStorage):
            # A deep copy brings memory of PyTorch's own.
            storage = MEMORY.tensor((args[1].nbytes(),), (1,), torch.uint8).untyped_storage()
            return func(args[0], storage, *args[2:])
        returns = func._schema.returns
        written = [argument.name for argument in func._schema.arguments if argument.is_write]
        if written:
            given = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
            out = tuple(given[name] for name in written)
            return out[0] if len(returns) == 1 else out
        if any(r.alias_info for r in returns) or func is torch.ops.aten._local_scalar_dense.default:
            # A view, or, like `contiguous`, made of operations that copy.
            with self:
                output = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if output is NotImplemented else output
        to_meta = lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=META)  # noqa: E731
        args, kwargs = pytree.tree_map_only(Tensor, to_meta, (args, kwargs))
        if "device" in {argument.name for argument in func._schema.arguments}:
            kwargs["device"] = META
        outputs = func(*args, **kwargs)
        return pytree.tree_map_only(Tensor, lambda t: MEMORY.tensor(t.shape, t.stride(), t.dtype), outputs)

    @staticmethod
    def _real(tensor: Tensor) -> Tensor:
        return MEMORY.tensor(tensor.shape, tensor.stride(), tensor.dtype).copy_(tensor)


def why_not(argument: object) -> str | None:
    """What is wrong with an argument of a launch: memory that is not there; None if nothing is."""
    if isinstance(argument, TensorDescriptor | GluonDescriptor):
        first, width = argument.base.data_ptr(), argument.base.dtype.itemsize
        last = first + sum((size - 1) * stride for size, stride in zip(argument.shape, argument.strides)) * width
        reason = MEMORY.why_not(first, last + width - 1)
        return reason and f"a view of {argument.shape}, {reason}"
    if not isinstance(argument, Tensor) or not argument.numel():
        return None
    if reason := MEMORY.why_not(argument.data_ptr(), argument.data_ptr() + argument.element_size() - 1):
        return f"a tensor of {tuple(argument.shape)}, {reason}"
    # A table of addresses, perhaps.
    values = argument.flatten().tolist() if argument.dtype == torch.int64 else ()
    reasons = (MEMORY.why_not(value, value) for value in values if value >= _LEAST_ADDRESS)
    return next((f"an address in it {reason}" for reason in reasons if reason), None)


def check(kernel: str, arguments: dict[str, object]) -> None:
    for name, argument in arguments.items():
        if reason := why_not(argument):
            raise AssertionError(f"{kernel}: {name}, {reason}")


def note(kernel: str, arguments: dict[str, object]) -> None:
    LAUNCHED[kernel] += 1
    tensors = {name: t for name, t in arguments.items() if isinstance(t, Tensor)}
    SPANS.append({name: (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for name, t in tensors.items()})


unwatched: dict[str, Callable] = {}


@contextlib.contextmanager
def nothing_checked() -> Iterator[None]:
    """What remains is what the host does on a GPU: for measuring its time, on tensors of any memory."""
    from resnet_kernels.kernels import launching

    watched = launching.Prepared.launch, Launcher.__call__
    launching.Prepared.launch, Launcher.__call__ = unwatched["launch"], driver.CudaLauncher.__call__
    try:
        yield
    finally:
        launching.Prepared.launch, Launcher.__call__ = watched


def watch_later_launches() -> None:
    """Those that go past Triton's launcher to its C function are checked and counted like the first ones."""
    from resnet_kernels.kernels import launching

    actual = unwatched["launch"] = launching.Prepared.launch

    def launch(self, device, tensors, addresses):
        kernel = self._compiled.metadata.name
        given = [0 if t is None else t.data_ptr() for t in tensors.values()]
        assert addresses == given, f"{kernel}: launched with other addresses than its tensors'"
        described = {
            name: launching._descriptor(t, self._views[name])
            for name, t in tensors.items()
            if t is not None and name in self._views
        }
        check(kernel, {**tensors, **described})
        actual(self, device, tensors, addresses)
        assert self.is_direct, f"{kernel}: Triton's C function was not found"
        note(kernel, tensors)

    launching.Prepared.launch = launch


class Launcher(driver.CudaLauncher):
    """Triton's own, that looks at the arguments first and counts afterwards."""

    def __init__(self, src, metadata):
        super().__init__(src, metadata)
        self.kernel, self.names, self._own = metadata.name, src.fn.arg_names, self.launch
        _MADE.append(metadata.name)
        assert metadata.enable_fp_fusion, f"{self.kernel}: the launcher leaves enable_fp_fusion to Triton's default"

    def __call__(self, *args):
        if self.launch is not self._own:
            return super().__call__(*args)  # somebody looks at what would be launched
        # Grid, stream, function, two metadata, two hooks come before the arguments.
        arguments = dict(zip(self.names, args[9:], strict=True))
        check(self.kernel, arguments)
        super().__call__(*args)
        note(self.kernel, arguments)


class Driver(driver.CudaDriver):
    """Triton's driver for CUDA, of one H200 on which stream 0 is current."""

    def __init__(self):
        self.utils = driver.CudaUtils()
        self.launcher_cls = Launcher
        self.get_device_capability = lambda device=0: (9, 0)
        self.get_current_stream = lambda device=0: 0
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class _Allocated(Exception):
    """Triton is about to lower to LLVM's dialect, behind the passes that allocate memory."""


def _stop(passes, *arguments) -> None:
    raise _Allocated(passes)


_make_llir = compiler.CUDABackend.make_llir


def _allocate(self, src, metadata, options, capability) -> str:
    """Triton's own make_llir as far as it allocates, and what a launch reads of its metadata."""
    try:
        _make_llir(self, src, metadata, options, capability)
        raise RuntimeError("this Triton lowers in another way: nothing stopped it")
    except _Allocated as stop:
        stop.args[0].run(src, "make_llir")
    metadata["num_warps"] = src.get_int_attr("ttg.total-num-warps") or metadata["num_warps"]
    metadata["shared"] = src.get_int_attr("ttg.shared")
    metadata["tmem_size"] = src.get_int_attr("ttg.tensor_memory_size")
    for kind in ("global", "profile"):
        metadata[f"{kind}_scratch_size"] = src.get_int_attr(f"ttg.{kind}_scratch_memory_size") or 0
        metadata[f"{kind}_scratch_align"] = src.get_int_attr(f"ttg.{kind}_scratch_memory_alignment") or 1
    metadata["name"] = src.get_entry_func_name()
    return _NOT_MADE


def install() -> None:
    """Puts the stand-in in the GPU's place before the package is imported; CPU tensors then pass for a GPU's."""
    assert "resnet_kernels" not in sys.modules
    torch.library.Library = _Library
    compiler.CUDABackend.make_llir = _allocate
    compiler.nvidia.passes.ttgpuir.add_to_llvmir = _stop
    # Fences and barriers take no memory, but half of the time that is left.
    compiler.nvidia.passes.ttnvgpuir.add_proxy_fence_insertion = lambda *arguments: None
    compiler.nvidia.passes.ttgpuir.add_membar = lambda *arguments: None
    compiler.CUDABackend.make_ptx = lambda self, src, metadata, options, capability: _NOT_MADE
    compiler.CUDABackend.make_cubin = lambda self, src, metadata, options, capability: _NOT_MADE.encode()
    triton.runtime.driver.set_active(Driver())

    from resnet_kernels.kernels import target
    from resnet_kernels.kernels.sm90 import (
        chain,
        conv,
        specialized_chain,
        specialized_conv,
        specialized_stem,
        stem,
        tap_sharing,
    )
    from resnet_kernels.ops import backends, onednn
    from resnet_kernels.runtime import eligibility

    watch_later_launches()
    backends._why_not_triton = lambda device_type, dtype: (
        None if dtype in backends._TRITON_DTYPES else f"does not run {dtype}"
    )
    # Its probe runs in a thread of its own, where tensors have numbers; here they have none.
    onednn.why_not = lambda dtype: "can't run on tensors without numbers"
    backends.why_never.cache_clear()
    assert not target.is_interpreted(), "TRITON_INTERPRET must not be set"
    target.is_hopper = lambda device: True
    for module in (conv, chain, stem, tap_sharing, specialized_conv, specialized_chain, specialized_stem):
        module.multiprocessors = lambda device: 132
    # Shapes is a mode in which a fused model would run eager.
    eligibility.is_ordinary = lambda x: type(x) in (Tensor, torch.nn.Parameter)


def launches_that_reached_the_driver() -> int:
    return ctypes.CDLL("libcuda.so.1").rehearsal_launches()


def compiled() -> int:
    """Kernels that were compiled, or found in Triton's cache."""
    return len(_MADE)
