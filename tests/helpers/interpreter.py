"""Triton's interpreter, without the work that changes nothing: half of its time, in kernels of many small steps.

What a kernel computes stays as it is; test_interpreter.py says so. What another Triton doesn't have is left alone.
"""

from __future__ import annotations

import dataclasses
import functools


def hurry() -> None:
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    for shortcut in (_no_unheard_overflow_checks, _patch_once_a_launch, _remember_dtypes):
        try:
            shortcut(interpreter)
        except AttributeError:
            pass  # a Triton that is made differently


def _no_unheard_overflow_checks(interpreter) -> None:
    """Each integer sum and product is computed in int64 again, for an assertion that is dropped unless `debug` is set."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _patch_once_a_launch(interpreter) -> None:
    """triton.language is patched for a launch, and again, by what each function is that the kernel calls, for nothing new."""
    patch, language = interpreter._patch_lang, interpreter.tl
    patched: set[int] = set()  # modules, by the launch under way

    @functools.cache
    def modules(fn) -> frozenset[int]:
        return frozenset(id(m) for m in fn.__globals__.values() if m is language or m is language.core)

    def patch_once(fn):
        if modules(fn) <= patched:
            return None  # a function that a kernel calls; nobody restores after it
        scope = patch(fn)
        patched.update(modules(fn))
        restore = scope.restore

        def restore_all() -> None:
            patched.clear()
            restore()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_once


def _remember_dtypes(interpreter) -> None:
    """The table from Triton's dtypes to NumPy's is built anew for each look-up."""
    look_up, found = interpreter._get_np_dtype, {}

    def remembered(dtype):
        dtype = dtype.scalar
        if dtype.name not in found:
            found[dtype.name] = look_up(dtype)
        return found[dtype.name]

    interpreter._get_np_dtype = remembered
