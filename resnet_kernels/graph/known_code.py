"""What is known about code: whose it is, and whether it may do more than compute."""

from __future__ import annotations

import dis
import os
import sysconfig
import types
import warnings
import weakref
from functools import cache
from typing import Any

import torch
from torch import nn

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
# PyTorch's decorators, which call what they decorate: torch.no_grad as a decorator, and those for torch.compile.
DECORATORS = tuple(_TORCH + name.replace("/", os.sep) for name in ("utils/_contextlib.py", "_compile.py", "_dynamo/"))
# PyTorch's Python code that changes a state of the process or of the thread.
_STATEFUL = tuple(
    _TORCH + name.replace("/", os.sep)
    for name in (
        "random.py", "cuda/random.py", "cuda/streams.py", "cuda/nvtx.py", "autograd/grad_mode.py", "autograd/profiler.py",
        "autograd/graph.py", "autograd/anomaly_mode.py", "amp/", "cuda/amp/", "cpu/amp/", "utils/_device.py",
        "profiler/", "distributed/", "backends/", "serialization.py",
    )
)  # fmt: skip
# Modules of Python's library whose functions leave everything as it is.
_PURE_MODULES = frozenset(
    {"collections", "_collections_abc", "functools", "typing", "enum", "abc", "_weakrefset", "dataclasses", "operator",
     "types", "copy", "copyreg", "numbers", "math", "itertools", "inspect", "re", "contextlib"}
)  # fmt: skip
_PURE_C = frozenset({"math", "_operator", "operator", "_functools", "_collections", "itertools", "cmath"})
_PURE_BUILTINS = frozenset(
    {"abs", "all", "any", "ascii", "bin", "callable", "chr", "dir", "divmod", "format", "getattr", "hasattr", "hash", "hex",
     "id", "isinstance", "issubclass", "iter", "len", "locals", "max", "min", "next", "oct", "ord", "pow", "repr", "round",
     "sorted", "sum", "vars", "__build_class__", "__import__"}
)  # fmt: skip
WITH = frozenset({"BEFORE_WITH", "SETUP_WITH", "BEFORE_ASYNC_WITH", "SETUP_ASYNC_WITH"})
ATTRIBUTES = frozenset({"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "STORE_ATTR", "DELETE_ATTR"})
GLOBALS = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})
FREE = frozenset({"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"})
_WATCHED = frozenset(
    {*WITH, *ATTRIBUTES, *GLOBALS, *FREE, "LOAD_SPECIAL", "LOAD_CONST", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF",
     "DELETE_DEREF"}
)  # fmt: skip
# Functions of PyTorch that ask for a state of the thread or the process, which may be another one in the next call. Those that
# ask a tensor are not meant, nor those that are the same in all fused calls (is_scripting, is_tracing).
_ASKS_A_TENSOR = frozenset(
    {"is_tensor", "is_storage", "is_complex", "is_conj", "is_distributed", "is_floating_point", "is_inference", "is_neg",
     "is_nonzero", "is_same_size", "is_signed", "get_device"}
)  # fmt: skip
AMBIENT = frozenset(
    name
    for name in (*vars(torch), *vars(torch._C))
    if name.lstrip("_").startswith(("is_", "are_", "get_")) and name not in _ASKS_A_TENSOR
)
ASKS_FOR_TENSORS, IS_TENSOR = "its forward asks whether a value is a Tensor", torch.is_tensor.__code__
# A context that leaves everything as it was before: detectron2's Conv2d enters it.
QUIET_CONTEXT, *_ENTERED = (
    getattr(warnings.catch_warnings, name).__code__ for name in ("__init__", "__enter__", "__exit__")
)
QUIET_CODE = frozenset({QUIET_CONTEXT, *_ENTERED})
TENSOR_CLASSES = frozenset({"Tensor", "Parameter", "TensorType", "FloatTensor", "TensorBase"})

_instructions: weakref.WeakKeyDictionary[types.CodeType, dict[int, tuple[str, Any]]] = weakref.WeakKeyDictionary()


@cache
def origin_of(file: str) -> str:
    """Whose code a file holds: "user" (other libraries too), "torch", "ours" or "python"."""
    if file.startswith(_TORCH):
        return "torch"
    if file.startswith(_OURS):
        # Our networks are read as any user's are.
        return "user" if file.startswith(_OURS + "models" + os.sep) else "ours"
    if file.startswith("<frozen") or (file.startswith(_STDLIB) and "site-packages" not in file):
        return "python"
    return "user"


@cache
def is_stateful(file: str) -> bool:
    """Whether functions of a file may do more than compute."""
    if origin_of(file) == "python":
        name = file[len(_STDLIB) :].split(os.sep)[0].removesuffix(".py")
        return file.startswith(_STDLIB) and name not in _PURE_MODULES  # what is frozen is Python's import
    return file.startswith(_STATEFUL)


# Instructions that an argument of isinstance is made of, and by how much they change the number of arguments.
_PUSHES = frozenset(
    {"LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK", "LOAD_DEREF", "LOAD_CONST", "LOAD_SMALL_INT", *GLOBALS}
)
_CALLS = frozenset({"CALL", "CALL_FUNCTION"})
_plain_asks: weakref.WeakKeyDictionary[types.CodeType, dict[int, int]] = weakref.WeakKeyDictionary()


def plain_asks_of(code: types.CodeType) -> dict[int, int]:
    """The calls isinstance(x, C) in a code object: where a class of tensors is loaded, by offset, and the offset of the call.

    x and C are names, or attributes or elements of such; C may be a tuple of them.
    """
    if (found := _plain_asks.get(code)) is None:
        instructions = [i for i in dis.get_instructions(code) if i.opname != "CACHE"]
        found = _plain_asks[code] = {}
        for start, first in enumerate(instructions):
            if first.opname in GLOBALS and first.argval == "isinstance":
                found.update(_loads_of_call(instructions[start + 1 :]))
    return found


def _loads_of_call(instructions: list[dis.Instruction]) -> dict[int, int]:
    arguments = 0
    loads: list[int] = []
    for instruction in instructions:
        name, value = instruction.opname, instruction.argval
        if name in _CALLS:
            return dict.fromkeys(loads, instruction.offset) if arguments == value == 2 else {}
        if name in _PUSHES:
            arguments += 1
        elif name == "BUILD_TUPLE":
            arguments += 1 - value
        elif name == "BINARY_SUBSCR":
            arguments -= 1
        elif name not in ("LOAD_ATTR", "PRECALL"):
            return {}
        if value in TENSOR_CLASSES:
            loads.append(instruction.offset)
    return {}


def instructions_of(code: types.CodeType) -> dict[int, tuple[str, Any]]:
    """The instructions of a code object that an observer looks at, by offset."""
    if (found := _instructions.get(code)) is None:
        found = {i.offset: (i.opname, i.argval) for i in dis.get_instructions(code) if i.opname in _WATCHED}
        _instructions[code] = found
    return found


def is_torch(value: Any) -> bool:
    """Whether a function, a class or a Python module is PyTorch's."""
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return isinstance(name, str) and name.split(".")[0] == "torch" and not isinstance(value, nn.Module)


def is_impure(value: Any) -> bool:
    """Whether a value is a function written in C that may do more than compute."""
    if type(value).__name__ == "cython_function_or_method":
        return True
    if not isinstance(value, (types.BuiltinFunctionType, types.MethodWrapperType)):
        return False
    owner = getattr(value, "__self__", None)
    if isinstance(owner, types.ModuleType) and owner.__name__ == "builtins":
        return value.__name__ not in _PURE_BUILTINS
    if isinstance(owner, type) and owner.__module__ == "builtins":
        return False  # tuple.__new__ in a namedtuple, dict.fromkeys: they make new objects
    if not isinstance(owner, (types.ModuleType, type)):
        owner = type(owner)
    library = owner.__name__ if isinstance(owner, types.ModuleType) else owner.__module__
    return library not in _PURE_C and library.split(".")[0] != "torch"
