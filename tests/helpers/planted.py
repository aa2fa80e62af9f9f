"""Bugs planted into the source of the package's kernels, which tests have to catch."""

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest


def planted(kernel: str, tmp_path: Path, old: str, new: str) -> ModuleType:
    """A module of kernels/ ("epilogue", "sm90.stem"), with a piece of its source replaced."""
    room, _, name = f"resnet_kernels.kernels.{kernel}".rpartition(".")
    source = inspect.getsource(importlib.import_module(f"{room}.{name}"))
    assert old in source, f"the kernel no longer has {old!r}: plant this bug anew"
    path = tmp_path / f"planted_{name}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"{room}.planted_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def plant(name: str, kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a module in the place of one of the package's kernels."""
    monkeypatch.setattr(importlib.import_module("resnet_kernels.kernels"), name, kernel, raising=False)
    monkeypatch.setitem(sys.modules, f"resnet_kernels.kernels.{name}", kernel)
