"""An interpreter for Gluon kernels, which Triton has none for: it runs their own source in Python, on CPU tensors.

A program's partitions are threads of which one runs at a time. A seeded scheduler decides at each step which one goes on, and
when a copy or a product that was started gets done, so that what the hardware may do early or late is done early and late:

- shared memory is NaN until it is written; a load by TMA makes its destination NaN until it is done;
- a product by wgmma and a store by TMA read shared memory at any time until they are waited for: if it changes in between, or
  if it was written by threads without a fence afterwards, that is an error;
- mbarriers count arrivals and bytes as the hardware does. A program whose partitions all wait for ever is an error.

Layouts are not modelled: they decide which thread holds an element, and that the compiler checks.
"""

from __future__ import annotations

import builtins
import random
import threading
import types
from collections.abc import Callable
from functools import partial
from math import prod

import torch
from torch import Tensor

from resnet_kernels.kernels.sm90.descriptors import View

CPU, META = torch.device("cpu"), torch.device("meta")


class Race(AssertionError):
    """Shared memory was used too early or too late."""


class Deadlock(AssertionError):
    """All partitions wait, and nothing is under way that could wake one."""


def launch(kernel, grid, device, tensors, fixed, prepared, views=None, *, seed=0, programs=None, **_) -> None:
    """Runs a kernel in the place of launching.launch.

    Args:
        kernel: a @gluon.jit function.
        grid: number of programs, in a tuple.
        device: not read.
        tensors: as in launching.launch. Tensors on the device "meta" have no elements: then only the schedule runs.
        fixed: as in launching.launch.
        prepared: not read.
        views: as in launching.launch.
        seed: of the scheduler.
        programs: which programs to run; None for all.
    """
    arguments = dict.fromkeys(kernel.arg_names) | dict(fixed)
    for name, tensor in tensors.items():
        if tensor is not None:
            arguments[name] = Descriptor(tensor, views[name]) if name in views else Pointer.to(tensor)
    for index in range(grid[0]) if programs is None else programs:
        program = Program(index, grid[0], random.Random(f"{seed} {index}"))
        program.device = META if any(t is not None and t.device == META for t in tensors.values()) else CPU
        program.function(kernel)(**arguments)


class Program:
    """One program: its shared memory, its partitions, and what they have started."""

    def __init__(self, index: int, count: int, dice: random.Random):
        self.index, self.count, self.dice, self.device = index, count, dice, CPU
        self.started: list[Callable[[], None]] = []  # copies that are under way
        self.partitions: list[Partition] = []
        self.current = Partition(self, "the kernel", lambda: None)
        self._functions: dict[object, types.FunctionType] = {}
        self._names = _names(self)
        # How often a copy gets done before something else, whether it is the newest one, and the partition that seldom gets
        # its turn, if one does.
        self._haste, self._newest_first, self._slow = (
            dice.choice((0.02, 0.3, 0.9)),
            dice.random() < 0.5,
            dice.randrange(6),
        )

    def function(self, kernel) -> types.FunctionType:
        """The Python function of a kernel, with what it calls interpreted as well."""
        source = kernel.fn  # which has a cheap hash; the kernel's own would be that of what it calls
        if source not in self._functions:
            names = dict(source.__globals__)
            function = types.FunctionType(source.__code__, names, source.__name__, source.__defaults__)
            self._functions[source] = function
            for name in source.__code__.co_names:
                if name in names:
                    names[name] = self._interpreted(name, names[name])
        return self._functions[source]

    def _interpreted(self, name: str, value: object) -> object:
        if name in self._names:
            return self._names[name]
        if hasattr(value, "fn") and callable(value.fn):
            return self.function(value)
        if isinstance(value, types.ModuleType):
            return _Module(self, value)
        return getattr(value, "value", value)  # a constexpr's value

    def specialize(self, functions, worker_warps, worker_registers) -> None:
        assert len(functions) == len(worker_warps) + 1 == len(worker_registers) + 1
        self.partitions = [
            Partition(self, f"{function.__name__} {i}", partial(function, *args))
            for i, (function, args) in enumerate(functions)
        ]
        while running := [p for p in self.partitions if not p.is_done]:
            ready = [p for p in running if p.is_ready()]
            if not ready and not self.started:
                waits = "; ".join(f"{p.name} waits for {p.awaited}" for p in running)
                raise Deadlock(f"program {self.index}: {waits}")
            # A copy is done at any time: at once, or when nothing else can go on.
            if self.started and (not ready or self.dice.random() < self._haste):
                self.started.pop(-1 if self._newest_first else self.dice.randrange(len(self.started)))()
                continue
            others = [p for p in ready if self.partitions.index(p) != self._slow]
            self.current = self.dice.choice(others if others and self.dice.random() < 0.95 else ready)
            self.current.go_on()
        while self.started:
            self.started.pop()()


class Partition:
    """The warps that run one function, as a thread that runs only while the scheduler waits for it."""

    def __init__(self, program: Program, name: str, body: Callable[[], None]):
        self.program, self.name = program, name
        self.is_done, self.awaited = False, ""
        self.products: list[Product] = []
        self.written: list[set[Partition]] = []  # the marks of its writes to shared memory since its last fence
        self.stores: list[bool] = []  # whether each store, in order, has read its source
        self._condition: Callable[[], bool] = lambda: True
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._failure: BaseException | None = None
        self._inference = torch.is_inference_mode_enabled()  # modes are a thread's own
        self._thread = threading.Thread(target=self._run, args=(body,), daemon=True)

    def _run(self, body: Callable[[], None]) -> None:
        self._mine.acquire()
        try:
            with torch.inference_mode(self._inference), torch.no_grad():
                body()
            assert not self.products, "the partition ends with a product in flight"
            assert all(self.stores), "the partition ends before its stores have read shared memory"
        except BaseException as failure:
            self._failure = failure
        self.is_done = True
        self._theirs.release()

    def is_ready(self) -> bool:
        return self._condition()

    def go_on(self) -> None:
        if self._thread.ident is None:
            self._thread.start()
        self._mine.release()
        self._theirs.acquire()
        if self._failure is not None:
            raise self._failure

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Gives the turn away until the condition holds."""
        self._condition, self.awaited = condition, what
        if self.program.current is self and self in self.program.partitions:
            self._theirs.release()
            self._mine.acquire()
        assert condition()

    def pause(self) -> None:
        self.wait(lambda: True, "its turn")


class Value:
    """A tensor in registers."""

    def __init__(self, data: Tensor):
        self._data = data

    @property
    def data(self) -> Tensor:
        return self._data

    @property
    def shape(self):
        return list(self.data.shape)

    @property
    def dtype(self):
        return self.data.dtype

    @property
    def type(self):
        return types.SimpleNamespace(layout=None)

    def to(self, dtype) -> Value:
        return Value(self.data.to(dtype))

    def reshape(self, shape) -> Value:
        return Value(self.data.reshape(tuple(shape)))

    def permute(self, *order) -> Value:
        return Value(self.data.permute(*order))

    def split(self) -> tuple[Value, Value]:
        assert self.data.shape[-1] == 2
        return Value(self.data[..., 0]), Value(self.data[..., 1])

    def __getitem__(self, index) -> Value:
        return Value(self.data[index])

    def __neg__(self) -> Value:
        return Value(-self.data)

    def __bool__(self) -> bool:
        return self.data.device != META and bool(self.data)


def _plain(value):
    return value.data if isinstance(value, Value) else value


def _binary(name: str):
    def operate(self, other):
        other = _plain(other)
        if isinstance(other, Pointer):
            return other + self
        return Value(getattr(self.data, name)(other))

    return operate


for _name in "add radd sub rsub mul rmul truediv rtruediv and or lt gt le ge eq".split():
    setattr(Value, f"__{_name}__", _binary(f"__{_name}__"))


class Accumulator(Value):
    """Sums of products, which may be in flight."""

    def __init__(self, data: Tensor, in_flight: list[Product]):
        super().__init__(data)
        self.in_flight = in_flight

    @property
    def data(self) -> Tensor:
        if any(not product.is_done for product in self.in_flight):
            raise Race("sums are read while a product is in flight")
        sums = self._data
        for product in self.in_flight:
            sums = product.value + (sums if product.adds else 0)
        self._data, self.in_flight = sums, []
        return sums


class Product:
    """A product by wgmma. It may read its operands at any time until it is waited for."""

    def __init__(self, a: Memory | Value, b: Memory, adds: bool):
        self.adds, self.is_done = adds, False
        self._operands = [m for m in (a, b) if isinstance(m, Memory)]
        for operand in self._operands:
            operand.must_be_fenced("a product")
        self._seen = [operand.data.clone() for operand in self._operands]
        left, right = (m.data if m.data.device == META else m.data.float() for m in (a, b))
        self.value = left @ right

    def finish(self) -> None:
        for operand, seen in zip(self._operands, self._seen):
            operand.must_be(seen, "a product")
        self.is_done = True


class Memory:
    """A view of shared memory."""

    def __init__(self, program: Program, data: Tensor, writes: list[set[Partition]]):
        # Of each stage: the partitions that wrote to it without a fence afterwards.
        self.program, self.data, self._writes = program, data, writes

    @property
    def shape(self):
        return list(self.data.shape)

    @property
    def dtype(self):
        return self.data.dtype

    def _view(self, data: Tensor) -> Memory:
        return Memory(self.program, data, self._writes)

    def index(self, i: int) -> Memory:
        assert 0 <= i < len(self.data), f"stage {i} of {len(self.data)}"
        assert len(self._writes) == len(self.data), "only a whole allocation has stages"
        return Memory(self.program, self.data[i], self._writes[i : i + 1])

    def slice(self, start: int, length: int, dim: int = 0) -> Memory:
        return self._view(self.data.narrow(dim, start, length))

    def reshape(self, shape) -> Memory:
        return self._view(self.data.view(tuple(shape)))

    def permute(self, order) -> Memory:
        return self._view(self.data.permute(*order))

    def load(self, layout) -> Value:
        self.program.current.pause()
        return Value(self.data.clone())

    def store(self, value: Value) -> None:
        assert list(value.data.shape) == self.shape and value.dtype == self.dtype
        self.program.current.pause()
        for writes in self._writes:
            writes.add(self.program.current)
            self.program.current.written.append(writes)
        if self.data.device != META:
            self.data.copy_(value.data)

    def must_be_fenced(self, reader: str) -> None:
        if any(self._writes):
            raise Race(f"{reader} reads what threads wrote, without a fence in between")

    def must_be(self, seen: Tensor, reader: str) -> None:
        if self.data.device != META and not torch.equal(self.data.nan_to_num(77), seen.nan_to_num(77)):
            raise Race(f"shared memory was written while {reader} could read it")


class Rearranged(Memory):
    """A view of shared memory by a SharedLinearLayout, to read only: `order` has the place of each element."""

    def __init__(self, program: Program, flat: Tensor, order: Tensor, writes: list[set[Partition]]):
        self.program, self.flat, self.order, self._writes = program, flat, order, writes

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        if self.flat.device == META:
            return torch.empty(*self.flat.shape[:-1], *self.order.shape, dtype=self.flat.dtype, device=META)
        return self.flat[..., self.order]

    @property
    def dtype(self):
        return self.flat.dtype

    def index(self, i: int) -> Rearranged:
        assert self.flat.dim() == 2 and 0 <= i < len(self.flat), f"stage {i} of {len(self.flat)}"
        return Rearranged(self.program, self.flat[i], self.order, self._writes[i : i + 1])

    def permute(self, order) -> Rearranged:
        return Rearranged(self.program, self.flat, self.order.permute(*order), self._writes)


def places(bases: list[list[int]], shape: list[int]) -> Tensor:
    """The place in memory of each element, by the element that each bit of a place leads to."""
    order = torch.full(tuple(shape), -1)
    for place in range(1 << len(bases)):
        at = [0] * len(shape)
        for bit, basis in enumerate(bases):
            if place >> bit & 1:
                at = [a ^ b for a, b in zip(at, basis)]
        order[tuple(at)] = place
    assert order.min() == 0, "the layout leaves elements out"
    return order


class Barrier:
    """An mbarrier: its phase ends when all arrivals, and all bytes that it expects, have come."""

    def __init__(self, count: int):
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def arrive(self, bytes: int = 0) -> None:
        assert self.pending > 0, "an mbarrier gets more arrivals than it counts"
        self.pending -= 1
        self.bytes += bytes
        self._end()

    def complete(self, bytes: int) -> None:
        self.bytes -= bytes
        self._end()

    def _end(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


class Barriers:
    """An allocation of mbarriers."""

    def __init__(self, barriers: list[Barrier | None], at: int | None, name: str = ""):
        self.barriers, self.at, self.name = barriers, at, name

    def index(self, i: int) -> Barriers:
        assert 0 <= i < len(self.barriers), f"mbarrier {i} of {len(self.barriers)}"
        return Barriers(self.barriers, i)

    @property
    def only(self) -> Barrier:
        barrier = self.barriers[self.at or 0]
        assert barrier is not None, "an mbarrier is used before it is initialized"
        return barrier


class Descriptor:
    """A tensor as TMA sees it."""

    def __init__(self, tensor: Tensor, view: View):
        self.view, self.dtype, self.layout = view, tensor.dtype, None
        self.block_shape = list(view.box)
        self.block_type = types.SimpleNamespace(nbytes=prod(view.box) * tensor.dtype.itemsize)
        self.base = tensor
        assert len(view.box) <= 5 and all(side <= 256 for side in view.box[:-1]), f"a box of {view.box}"
        assert all(stride * tensor.dtype.itemsize % 16 == 0 for stride in view.strides[:-1]), f"strides {view.strides}"
        if tensor.device != META:
            self.data = torch.as_strided(tensor, view.shape, view.strides, tensor.storage_offset() + view.offset)

    def _inside(self, at) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of the tensor that a box at `at` covers, and the part of the box that covers it."""
        spans = [
            (max(first, 0), max(min(first + side, size), 0))
            for first, side, size in zip(at, self.view.box, self.view.shape)
        ]
        spans = [(first, max(first, last)) for first, last in spans]
        there = tuple(slice(first, last) for first, last in spans)
        return there, tuple(slice(first - a, last - a) for (first, last), a in zip(spans, at))

    def read(self, at, into: Tensor) -> None:
        there, here = self._inside(at)
        into.zero_()
        into[here] = self.data[there]

    def write(self, at, values: Tensor) -> None:
        there, here = self._inside(at)
        self.data[there] = values[here]


class Pointer:
    """A pointer into a tensor, or a tensor of pointers."""

    def __init__(self, base: Tensor, offsets):
        self.base, self.offsets = base, offsets

    @classmethod
    def to(cls, tensor: Tensor) -> Pointer:
        # The elements of a dense tensor as they lie in memory.
        return cls(tensor.as_strided((tensor.numel(),), (1,)) if tensor.device != META else tensor, 0)

    def __add__(self, other) -> Pointer:
        return Pointer(self.base, self.offsets + _plain(other))


class _Module:
    """A module of jitted functions, interpreted."""

    def __init__(self, program: Program, module: types.ModuleType):
        self._program, self._module = program, module

    def __getattr__(self, name: str):
        return self._program._interpreted(name, getattr(self._module, name))


class _Language:
    """The part of gl and tl that the kernels use."""

    float32, float16, bfloat16, int32, int64 = torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64
    constexpr = object

    class PropagateNan:
        ALL = "all"

    def __init__(self, program: Program):
        self._program = program

    def program_id(self, axis: int) -> int:
        return self._program.index

    def num_programs(self, axis: int) -> int:
        return self._program.count

    static_range = staticmethod(builtins.range)

    def NVMMADistributedLayout(self, *_):
        return None

    def SharedLinearLayout(self, offset_bases, alignment=16):
        assert alignment >= 128, "TMA writes to multiples of 128 bytes"
        return offset_bases

    NVMMASharedLayout = BlockedLayout = DotOperandLayout = SliceLayout = num_warps = NVMMADistributedLayout

    def convert_layout(self, value: Value, layout) -> Value:
        return value

    def warp_specialize(self, functions, warps, registers) -> None:
        self._program.specialize(functions, warps, registers)

    def allocate_shared_memory(self, dtype, shape, layout):
        if layout == "mbarrier":
            return Barriers([None] * shape[0], None)
        data = torch.full(tuple(shape), float("nan"), dtype=dtype, device=self._program.device)
        writes: list[set[Partition]] = [set() for _ in range(shape[0])]
        if layout is not None:
            return Rearranged(self._program, data.view(shape[0], -1), places(layout, shape[1:]), writes)
        return Memory(self._program, data, writes)

    def arange(self, first: int, last: int, layout=None) -> Value:
        return Value(torch.arange(first, last))

    def full(self, shape, value, dtype, layout=None) -> Value:
        return Value(torch.full(tuple(shape), value, dtype=dtype, device=self._program.device))

    def zeros(self, shape, dtype, layout=None) -> Value:
        return self.full(shape, 0, dtype)

    def zeros_like(self, value: Value) -> Value:
        return Value(torch.zeros_like(value.data))

    def load(self, pointers: Pointer, mask=None, other=0.0) -> Value:
        offsets, base = pointers.offsets, pointers.base
        if base.device == META:
            return Value(torch.empty(offsets.shape, dtype=base.dtype, device=META))
        if mask is None:
            return Value(base[offsets])
        inside = _plain(mask).expand(offsets.shape)
        values = torch.full(offsets.shape, float(other), dtype=base.dtype)
        values[inside] = base[offsets[inside]]
        return Value(values)

    def store(self, pointers: Pointer, value: Value, mask=None) -> None:
        if pointers.base.device == META:
            return
        inside = torch.ones(value.data.shape, dtype=torch.bool) if mask is None else _plain(mask)
        pointers.base[pointers.offsets[inside]] = value.data[inside].to(pointers.base.dtype)

    def gather(self, value: Value, index: Value, axis: int) -> Value:
        return Value(value.data if value.data.device == META else value.data.gather(axis, index.data))

    def cast(self, value: int, dtype) -> int:
        return value

    def maximum(self, a, b, propagate_nan=None):
        a, b = _plain(a), _plain(b)
        if isinstance(a, int) and isinstance(b, int):
            return max(a, b)
        assert not a.is_floating_point() or propagate_nan == "all", (
            "without propagate_nan a NaN turns into the other operand"
        )
        return Value(torch.maximum(a, torch.as_tensor(b, dtype=a.dtype, device=a.device)))

    def minimum(self, a, b):
        return min(a, b)

    def min(self, value: Value, axis: int) -> Value:
        return Value(value.data.amin(axis))

    def where(self, condition, a, b) -> Value:
        parts = [torch.as_tensor(_plain(part)) for part in (condition, a, b)]
        on_meta = any(part.device == META for part in parts)
        condition, a, b = (part.to(META) if on_meta and part.dim() else part for part in parts)
        return Value(torch.where(condition, a, b))

    def abs(self, value: Value) -> Value:
        return Value(value.data.abs())

    def exp(self, value: Value) -> Value:
        return Value(value.data.exp())

    def erf(self, value: Value) -> Value:
        return Value(value.data.erf())

    def div_rn(self, a: Value, b: Value) -> Value:
        return Value(a.data / b.data)

    def static_assert(self, condition, message="") -> None:
        assert condition, message


def _names(program: Program) -> dict[str, object]:
    """What gluon_names.py exports, for the interpreter."""
    language = _Language(program)

    def init(barrier: Barriers, count: int) -> None:
        barrier.barriers[barrier.at or 0] = Barrier(count)

    def expect(barrier: Barriers, bytes: int, pred=True) -> None:
        program.current.pause()
        if pred:
            barrier.only.arrive(bytes)

    def arrive(barrier: Barriers, *, count: int = 1, pred=True) -> None:
        program.current.pause()
        for _ in range(count if pred else 0):
            barrier.only.arrive()

    def wait(barrier: Barriers, phase: int) -> None:
        assert phase in (0, 1), f"a phase of {phase}"
        only = barrier.only
        program.current.wait(lambda: only.phase & 1 != phase, f"phase {phase} of mbarrier {barrier.at}")

    def async_load(descriptor: Descriptor, at, barrier: Barriers, into: Memory, pred=True) -> None:
        assert into.shape == descriptor.block_shape and into.dtype == descriptor.dtype
        assert all(isinstance(i, int) for i in at)
        program.current.pause()
        if not pred:
            return
        on_meta = into.data.device == META
        if not on_meta:
            into.data.fill_(float("nan"))
        at, only = list(at), barrier.only

        def arrives() -> None:
            if not on_meta:
                descriptor.read(at, into.data)
            only.complete(descriptor.block_type.nbytes)

        program.started.append(arrives)

    def async_store(descriptor: Descriptor, at, source: Memory) -> None:
        assert source.shape == descriptor.block_shape and source.dtype == descriptor.dtype
        program.current.pause()
        source.must_be_fenced("a store")
        seen, partition, number = source.data.clone(), program.current, len(program.current.stores)
        partition.stores.append(False)
        at = list(at)

        def leaves() -> None:
            source.must_be(seen, "a store")
            if seen.device != META:
                descriptor.write(at, seen)
            partition.stores[number] = True

        program.started.append(leaves)

    def reinterpret(memory: Memory, dtype, shape, layout) -> Memory:
        assert layout is None and dtype == memory.dtype
        flat = memory.flat if isinstance(memory, Rearranged) else memory.data
        return Memory(program, flat.view(tuple(shape)), memory._writes * shape[0])

    def store_wait(pendings: int) -> None:
        partition = program.current
        first = max(len(partition.stores) - pendings, 0)
        partition.wait(lambda: all(partition.stores[:first]), f"all stores but {pendings}")

    def fence_async_shared() -> None:
        for writes in program.current.written:
            writes.discard(program.current)
        program.current.written.clear()

    def warpgroup_mma_init(value: Value) -> Accumulator:
        return value if isinstance(value, Accumulator) else Accumulator(value.data, [])

    def warpgroup_mma(a, b: Memory, acc: Accumulator, *, use_acc=True, is_async=False) -> Accumulator:
        assert is_async and isinstance(acc, Accumulator)
        program.current.pause()
        product = Product(a, b, bool(use_acc))
        program.current.products.append(product)
        return Accumulator(acc._data, [*acc.in_flight, product])

    def warpgroup_mma_wait(num_outstanding: int, deps):
        products = program.current.products
        program.current.pause()
        while len(products) > num_outstanding:
            products.pop(0).finish()
        return deps[0] if len(deps) == 1 else tuple(deps)

    mbarrier = types.SimpleNamespace(
        init=init, expect=expect, arrive=arrive, wait=wait, MBarrierLayout=lambda: "mbarrier"
    )
    return dict(
        gl=language, tl=language, mbarrier=mbarrier, async_load=async_load, async_store=async_store, store_wait=store_wait,
        fence_async_shared=fence_async_shared, reinterpret=reinterpret, warpgroup_mma=warpgroup_mma,
        warpgroup_mma_init=warpgroup_mma_init, warpgroup_mma_wait=warpgroup_mma_wait,
    )  # fmt: skip
