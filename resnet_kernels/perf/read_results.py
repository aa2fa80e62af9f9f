"""Reader that checks a results file of `pytest benchmarks --benchmark-json=FILE`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from .results import CaseResults, Measurement, Results, ResultsError
from .schema import CHOICES, SCHEMA, Absence, CaseInfo, Versions

_Part = TypeVar("_Part")
# Integers beyond this are no counts, and no floats either where they are divided.
_MOST = 10**18


def read(path: Path) -> Results:
    """Returns a results file's contents.

    Raises:
        ResultsError: The file can't be read, is damaged, holds nothing, or is of another schema version.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ResultsError(f"{path} is damaged: no UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{path} is damaged: {error}" if path.stat().st_size else f"{path} is empty") from error
    if not isinstance(document, dict) or not isinstance(document.get("benchmarks"), list):
        raise ResultsError(f'{path} is not from --benchmark-json: a JSON object with a list "benchmarks" is needed')
    if not document["benchmarks"]:
        raise ResultsError(f"{path} holds no benchmark: the run measured nothing")
    try:
        return _results(path, document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ResultsError):
            raise
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ResultsError(f"{path} is damaged: {what}") from error


def _results(path: Path, document: dict[str, Any]) -> Results:
    devices: dict[str, str] = {}
    versions: dict[str, str] = {}
    entries: dict[str, list[dict[str, Any]]] = {}
    for benchmark in document["benchmarks"]:
        info = benchmark["extra_info"]
        schema = info.get("schema")
        if isinstance(schema, bool) or schema != SCHEMA:
            raise ResultsError(f"{path} is of schema version {schema!r}, known here is {SCHEMA}")
        entries.setdefault(benchmark["group"], []).append(benchmark)
        case = _part(CaseInfo, info)
        device = _device(case, document)
        if devices.setdefault(case.device_type, device) != device:
            raise ValueError(f"one file from two devices, {device} and {devices[case.device_type]}")
        versions.update((name, version) for name, version in asdict(_part(Versions, info)).items() if version)
    commit = (document.get("commit_info") or {}).get("id") or ""
    absent = tuple(_part(Absence, absence) for absence in document.get("absent") or ())
    cases = {name: _case(name, benchmarks) for name, benchmarks in entries.items()}
    return Results(path, str(document.get("datetime", ""))[:10], commit[:7], devices, versions, absent, cases)


def _case(name: str, benchmarks: list[dict[str, Any]]) -> CaseResults:
    measurements = [_measurement(benchmark) for benchmark in benchmarks]
    contenders = {measurement.contender: measurement for measurement in measurements}
    if len(contenders) < len(benchmarks):
        raise ValueError(f"a contender is there twice in {name}")
    info = _part(CaseInfo, benchmarks[0]["extra_info"])
    for what in ("batch", "image_size", "threads"):
        _check_positive(what, getattr(info, what))
    case = CaseResults(**vars(info), name=name, contenders=contenders)
    if case.busy_elsewhere is not None:
        _check_finite("busy_elsewhere", case.busy_elsewhere)
    if len({len(measurement.samples) for measurement in measurements if measurement.samples}) > 1:
        raise ValueError(f"the contenders of {name} have not the same number of rounds")
    return case


def _measurement(benchmark: dict[str, Any]) -> Measurement:
    # pytest-benchmark's own storage leaves samples out unless it is told to save them.
    stats = benchmark["stats"]
    _check_positive("a median", stats["median"])
    for sample in stats.get("data") or ():
        _check_positive("a sample", sample)
    times = {"median": stats["median"], "samples": stats.get("data") or []}
    measurement = _part(Measurement, {**benchmark["extra_info"], **times})
    for ratio in measurement.ratios.values():
        _check_positive("an interleaved ratio", ratio)
    ceilings = measurement.ceilings
    rates = [measurement.roofline_share, *((ceilings.tflop_per_s, ceilings.gb_per_s) if ceilings else ())]
    for kernel in measurement.kernels:
        _check_finite("a kernel's seconds", kernel.seconds)
        rates += [kernel.flops, kernel.hbm_bytes]
    for rate in rates:
        if rate is not None:
            _check_finite("a rate, FLOPs or bytes", rate)
    return measurement


def _device(case: CaseInfo, document: dict[str, Any]) -> str:
    """Name of the machine; two files are of one machine if the names are equal."""
    if case.device_type != "cpu":
        return case.device
    brand = ((document.get("machine_info") or {}).get("cpu") or {}).get("brand_raw")
    # The number of threads is part of the name, because times with different numbers don't compare.
    return f"{case.device}{f' {brand}' if brand else ''}, {case.threads} threads"


def _part(cls: type[_Part], values: Mapping[str, Any]) -> _Part:
    """Builds a dataclass of the schema from values by field name.

    Raises:
        KeyError: A field is missing.
        ValueError: A value is of another type than its field.
    """
    assert is_dataclass(cls)
    hints, given = get_type_hints(cls), {}
    for field in fields(cls):
        if field.name in values:
            given[field.name] = _value(hints[field.name], values[field.name], field.name)
        elif type(None) in get_args(hints[field.name]):
            given[field.name] = None
        elif field.default is MISSING:
            raise KeyError(field.name)
    return cls(**given)


def _value(hint: Any, value: Any, name: str) -> Any:
    """Converts a JSON value to its annotation: an object to a dataclass, a list to a tuple, an int to a float."""
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list, got {value!r}")
        return tuple(_value(get_args(hint)[0], item, name) for item in value)
    kinds = get_args(hint) or (hint,)
    if name in CHOICES and value not in CHOICES[name]:
        raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}, got {value!r}")
    if type(value) is int and abs(value) > _MOST:
        raise ValueError(f"{name} must be at most {_MOST:.0e} in magnitude, got more")
    for kind in kinds:
        if is_dataclass(kind) and isinstance(value, dict):
            return _part(kind, value)  # type: ignore[arg-type]  # `kind` is a dataclass here
        # bool is an int to Python, and no number here.
        if type(value) is kind or (kind is float and type(value) is int):
            return value
    wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
    raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _check_positive(what: str, value: object) -> None:
    _check_finite(what, value)
    if value == 0:
        raise ValueError(f"{what} must be above 0, got 0")


def _check_finite(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{what} must be a finite number of at least 0, got {str(value)[:80]}")
