"""Checkpoints: written whole or not at all, and checked before they are used."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...perf.tuning import table_file

VERSION = 1
# What a row of the history holds.
ROW = ("loss", "accuracy", "validation_loss", "validation_accuracy")
KEYS = {"version", "settings", "epoch", "history", "model", "optimizer", "scheduler", "scaler", "rng"}


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a state; whatever stops it, the file is the old one or the new one.

    Args:
        path: the file; its directory is made if need be.
        state: KEYS without the version.

    Raises:
        OSError: if the directory can't be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"version": VERSION, **state, "checksum": _checksum(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Makes the directory, and tries to write there: what keeps a checkpoint from being saved shows before training.

    Raises:
        ValueError: if that fails.
    """
    try:
        table_file.check_writable(path.parent)
    except OSError as error:
        raise ValueError(f"--output: {path.parent} can't be written to: {error.strerror or error}") from error
    if path.exists() and not path.is_file():
        raise ValueError(f"--output: {path} is there and is no file")


def set_aside(path: Path) -> Path:
    """Renames an earlier run's checkpoint, to a name that no other has, and returns it."""
    names = (path.with_name(f"{path.stem}.earlier{f'-{i}' if i > 1 else ''}{path.suffix}") for i in itertools.count(1))
    return path.replace(next(name for name in names if not name.exists()))


def _remove_left_behind(path: Path) -> None:
    """Removes the temporary files of processes that were killed while they wrote."""
    for left in path.parent.glob(f"{path.name}.*.tmp"):
        pid = left.name.removeprefix(f"{path.name}.").removesuffix(".tmp")
        if pid.isdecimal() and int(pid) != os.getpid() and not _is_alive(int(pid)):
            with contextlib.suppress(OSError):
                left.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # another user's
    return True


def _checksum(state: Any) -> str:
    """Returns a digest of all values: PyTorch reads a file whose bits have changed without a word."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key, item in value.items():
                digest.update(f"{key!r}:".encode())
                add(item)
        elif isinstance(value, list | tuple):
            digest.update(f"{len(value)}[".encode())
            for item in value:
                add(item)
        else:
            digest.update(f"{value!r},".encode())

    add({name: state[name] for name in sorted(state)})
    return digest.hexdigest()


def load(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Reads a state, its tensors on the CPU.

    Args:
        path: the file.
        settings: the settings of this run (`Settings.fingerprint`); the checkpoint must have the same.

    Raises:
        ValueError: if there is no file, if it is damaged, or if another program, version or run wrote it.
    """
    if not path.is_file():
        raise ValueError(f"--resume: there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file raises whatever the archive's reader or the unpickler stumbles upon.
    except Exception as error:
        raise ValueError(f"--resume: {path} is damaged, or no checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict) or not KEYS <= set(state) or not isinstance(state["settings"], dict):
        raise ValueError(f"--resume: {path} is not a checkpoint of this command")
    if state["version"] != VERSION:
        raise ValueError(f"--resume: {path} has version {state['version']!r}, this command reads {VERSION}")
    different = [
        f"{name} {_plain(state['settings'].get(name))}, not {_plain(value)}"
        for name, value in settings.items()
        if state["settings"].get(name) != value
    ]
    if different:
        raise ValueError(f"--resume: {path} was trained with {'; '.join(different)}")
    # Files of before have none.
    if "checksum" in state and state["checksum"] != _checksum({name: state[name] for name in KEYS - {"version"}}):
        raise ValueError(f"--resume: {path} is damaged: its values are not those that were saved")
    if (reason := _why_damaged(state)) is not None:
        raise ValueError(f"--resume: {path} is damaged: {reason}")
    return state


def check_fits(state: dict[str, Any], live: dict[str, Any], shapes: list[torch.Size]) -> None:
    """Checks the parts whose own `load_state_dict` takes anything: a wrong one would fail after an epoch, or train wrongly.

    Args:
        state: from `load`.
        live: the state of the run that is to go on, which has made no step yet.
        shapes: of the optimizer's parameters.

    Raises:
        ValueError: a number, a list or a tensor is not where the run has one.
    """
    _check_like("scheduler", state["scheduler"], live["scheduler"])
    _check_like("scaler", state["scaler"], live["scaler"])
    loaded, own = state["optimizer"], live["optimizer"]
    if not isinstance(loaded.get("param_groups"), list) or not isinstance(loaded.get("state"), dict):
        raise ValueError("the optimizer has no state and param_groups")
    _check_like("param_groups", loaded["param_groups"], own["param_groups"])
    for index, values in loaded["state"].items():
        if type(index) is not int or not 0 <= index < len(shapes) or not isinstance(values, dict):
            raise ValueError(f"the optimizer's state has no parameter {index!r}")
        for name, value in values.items():
            # A count of steps is a single number, all else is as large as the parameter.
            if isinstance(value, Tensor) and (value.shape == shapes[index] or (name == "step" and value.dim() == 0)):
                continue
            if value is not None and not (name == "step" and _is_number(value)):
                raise ValueError(f"the optimizer's {name} of parameter {index} does not fit the parameter")


def _why_damaged(state: dict[str, Any]) -> str | None:
    history, rng = state["history"], state["rng"]
    if not isinstance(history, list) or not all(map(_is_row, history)):
        return f"its history must hold a row of {', '.join(ROW)} for each epoch"
    if type(state["epoch"]) is not int or state["epoch"] != len(history):
        return f"its epoch must be that of its history, {len(history)}, got {state['epoch']!r}"
    for name in ("model", "optimizer", "scheduler", "scaler", "rng"):
        if not isinstance(state[name], dict):
            return f"its {name} must be a dict, got {type(state[name]).__name__}"
    if not all(isinstance(tensor, Tensor) for tensor in state["model"].values()):
        return "its model must hold tensors"
    if not isinstance(rng.get("cpu"), Tensor) or not isinstance(rng.get("cuda", rng["cpu"]), Tensor):
        return "its rng must hold the generators' states"
    return None


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and all(_is_number(row.get(name)) for name in ROW)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _check_like(name: str, loaded: Any, live: Any) -> None:
    """Raises ValueError unless what is loaded has the structure of what is live, as far as both have it."""
    if isinstance(live, dict) and isinstance(loaded, dict):
        for key in live.keys() & loaded.keys():
            _check_like(f"{name}.{key}", loaded[key], live[key])
    elif isinstance(live, list | tuple) and isinstance(loaded, list | tuple) and len(live) == len(loaded):
        for i, (one, other) in enumerate(zip(loaded, live)):
            _check_like(f"{name}[{i}]", one, other)
    elif type(loaded) is not type(live) and not (_is_number(loaded) and _is_number(live)):
        raise ValueError(f"{name} must be {_plain(live)!r} or the like, got {_plain(loaded)[:80]!r}")
    elif isinstance(live, list | tuple):
        raise ValueError(f"{name} must have {len(live)} entries, got {len(loaded)}")
    elif isinstance(loaded, float) and not _is_number(loaded):
        raise ValueError(f"{name} must be finite, got {loaded}")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{_plain(v)}" if k == "name" else f"{k}={_plain(v)}" for k, v in value.items())
    return str(value)
