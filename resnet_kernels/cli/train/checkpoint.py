"""Checkpoints: written whole or not at all, and checked before they are used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

VERSION = 1
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
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    return state


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{_plain(v)}" if k == "name" else f"{k}={_plain(v)}" for k, v in value.items())
    return str(value)
