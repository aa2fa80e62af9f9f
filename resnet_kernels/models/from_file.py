"""Models from a user's own Python file: "path.py:build" names a file and a function in it that returns an nn.Module.

The file may also define `example_input()`: a batch of images, (N, C, H, W), that the model takes.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

_FUNCTION, _EXAMPLE = "build", "example_input"


def is_file(name: str) -> bool:
    """Whether a model's name is that of a file: "path.py" or "path.py:FUNCTION"."""
    return _split(name) is not None


def build(name: str) -> nn.Module:
    """Runs the file and calls its function, without arguments.

    Args:
        name: "path.py:FUNCTION", or "path.py", whose function is `build`.

    Raises:
        ValueError: if there is no such file or function, if the function needs arguments, or if either raises.
        TypeError: if the function returns no nn.Module.
    """
    path, function = _split(name) or (name, "")
    model = _call(path, function, _function(path, function))
    if not isinstance(model, nn.Module):
        raise TypeError(f"--model: {function}() in {path} must return an nn.Module, got {_kind(model)}")
    return model


def example_input(name: str) -> Tensor | None:
    """Returns what the file's `example_input()` returns, a batch of images; None if the file defines no such function.

    Raises:
        ValueError: as `build`, and if the tensor isn't a batch of images.
        TypeError: if the function returns no tensor.
    """
    path, _ = _split(name) or (name, "")
    function = getattr(_run(str(path)), _EXAMPLE, None)
    if function is None:
        return None
    x = _call(path, _EXAMPLE, function)
    if not isinstance(x, Tensor):
        raise TypeError(f"--model: {_EXAMPLE}() in {path} must return a tensor, (N, C, H, W), got {_kind(x)}")
    if x.dim() != 4 or not x.numel() or not x.is_floating_point():
        got = f"{tuple(x.shape)} of {str(x.dtype).removeprefix('torch.')}"
        raise ValueError(
            f"--model: {_EXAMPLE}() in {path} must return images, (N, C, H, W), in floating point, got {got}"
        )
    return x.detach()


def _split(name: str) -> tuple[str, str] | None:
    if name.endswith(".py"):
        return name, _FUNCTION
    path, _, function = name.rpartition(":")
    return (path, function) if path.endswith(".py") else None


def _function(path: str, name: str) -> Callable[..., Any]:
    module = _run(path)
    function = getattr(module, name, None)
    if callable(function):
        return function
    own = sorted(
        key
        for key, value in vars(module).items()
        if callable(value) and not key.startswith("_") and getattr(value, "__module__", None) == module.__name__
    )
    raise ValueError(f"--model: {path} has no function {name!r}; it has {', '.join(own) or 'no functions'}")


@functools.cache
def _run(path: str) -> ModuleType:
    """Runs a file as a module, once a process. Its folder can be imported from, as if Python had been started with it."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--model: there is no file {path}")
    # A name of its own: "timm.py" may be the file's name, and classes are looked up by their module's name when pickled.
    name = f"_resnet_kernels_model_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file.absolute())
    assert spec is not None and spec.loader is not None  # the name ends with .py
    module = importlib.util.module_from_spec(spec)
    folder = str(file.absolute().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(f"--model: {path} can't be run: {_what(error, path)}") from error
    return module


def _call(path: str, name: str, function: Callable[..., Any]) -> Any:
    try:
        inspect.signature(function).bind()
    except TypeError:
        raise ValueError(
            f"--model: {name} in {path} is called without arguments, but needs some: {name}{inspect.signature(function)}"
        ) from None
    except ValueError:
        pass  # a callable of C, which has no signature
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise ValueError(f"--model: {name}() in {path} raises {_what(error, path)}") from error


def _what(error: BaseException, path: str) -> str:
    """Returns an error as one line, with the last line of the file that it came through."""
    first = next(iter(str(error).strip().splitlines()), "")
    text = f"{type(error).__name__}: {first}" if first else type(error).__name__
    if isinstance(error, SyntaxError):
        return text  # it names the line itself
    file = str(Path(path).absolute())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{text} (line {lines[-1]})" if lines else text


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
