"""python -m benchmarks.tools.serving: measures a server's view of a model on this CPU.

    threads     1, 2, 4 and 8 callers of one model, as threads of one process
    processes   as many processes, each with a copy of the model
    neighbor    one caller on all cores, alone and beside a process that burns a core; threads that wait spin, or sleep
    batches     one caller whose batch changes in each call, from 1 to 8 at random; peak memory over 200 calls

Callers are closed loops of single images. `threads` and `processes` are measured with all cores in each call, and with one.
The contenders take turns in short rounds, and each figure is the median of the rounds. Before it is timed, each contender's
output has to be within the error budget of fp64, or the command fails.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resnet_kernels.cli.arguments import at_least, positive_float
from resnet_kernels.cli.terminal import announce
from resnet_kernels.fusion.report import table
from resnet_kernels.kernels.cpu import library
from resnet_kernels.models import by_name
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.ops import device_key
from resnet_kernels.perf.environment import environment

from ..neighbors import Neighbors
from ..serving import models, plot
from ..serving.loops import Figures, Load, Loop, Station
from ..serving.models import MAKERS, Demand
from ..serving.workers import COUNTS, Workers, busy_neighbor

ROUNDS = 4
BATCHES, CALLS = tuple(range(1, 9)), 200
_CALLS_END_S = 600.0  # where calls are counted, not seconds
# Of GNU OpenMP, whose threads PyTorch's operations and our kernels run on: by default they spin for some milliseconds.
WAITING = {"spin": {}, "sleep": {"OMP_WAIT_POLICY": "PASSIVE"}}


@dataclass(frozen=True)
class Row:
    """A contender in one configuration.

    threads: intra-op threads of a call. waiting: what PyTorch's threads do while they wait, "spin" or "sleep". peak_MB,
    growth_MB: peak resident memory of the contender's own process, and how much of it came in the counted calls.
    """

    section: str
    contender: str
    callers: int
    threads: int
    figures: Figures
    rounds: tuple[Figures, ...] = field(repr=False)
    waiting: str = "spin"
    neighbor: bool = False
    peak_MB: float | None = None
    growth_MB: float | None = None


@dataclass(frozen=True)
class Job:
    """What sections measure: names of contenders, files they are made from, seconds of a configuration and contender."""

    folder: Path
    names: Sequence[str]
    seconds: float
    cores: int
    counts: Sequence[int] = COUNTS
    calls: int = CALLS
    say: Callable[[str], None] = lambda what: None

    def in_turns(
        self, what: str, run: Callable[[str, int, Load], list[Loop]], callers: int = 1, loads: Sequence[Load] = ()
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Runs rounds, and yields each contender's name and the figures of its row.

        run: lets callers call a contender, as `Station.round` does. loads: one per round; `seconds` in all if none is given.
        """
        found: dict[str, list[Figures]] = {name: [] for name in self.names}
        for number, load in enumerate(loads or [Load(self.seconds / ROUNDS)] * ROUNDS, 1):
            for name in self.names:
                self.say(f"{what}, round {number} of {ROUNDS}: {name}")
                found[name].append(Figures.of(run(name, callers, load)))
        for name, rounds in found.items():
            yield name, {"figures": Figures.median(rounds), "rounds": tuple(rounds)}


def per_call(cores: int) -> list[int]:
    """Intra-op threads to measure: all cores, and one."""
    return sorted({cores, 1}, reverse=True)


def threads(job: Job) -> list[Row]:
    rows = []
    for count in per_call(job.cores):
        # A call on one thread leaves the other cores to other calls.
        station = Station(job.folder, job.names, Demand(count, streams=job.cores // count))
        for callers in job.counts:
            what = f"{callers} threads, {count} intra-op"
            for name, found in job.in_turns(what, station.round, callers):
                rows.append(Row("threads", name, callers, count, **found))
    return rows


def processes(job: Job) -> list[Row]:
    rows = []
    for count in per_call(job.cores):
        job.say(f"starting {max(job.counts)} processes")
        with Workers(job.folder, job.names, Demand(count), max(job.counts)) as workers:
            for callers in job.counts:
                what = f"{callers} processes, {count} intra-op"
                for name, found in job.in_turns(what, workers.round, callers):
                    rows.append(Row("processes", name, callers, count, **found))
    return rows


def neighbor(job: Job) -> list[Row]:
    rows = []
    with contextlib.ExitStack() as stack:
        job.say("starting processes")
        workers = {
            waiting: stack.enter_context(Workers(job.folder, job.names, Demand(job.cores), 1, variables))
            for waiting, variables in WAITING.items()
        }
        for busy in (False, True):
            with busy_neighbor() if busy else contextlib.nullcontext():
                for waiting, of in workers.items():
                    what = f"{'beside a neighbor' if busy else 'alone'}, threads {waiting}"
                    for name, found in job.in_turns(what, of.round):
                        rows.append(Row("neighbor", name, 1, job.cores, waiting=waiting, neighbor=busy, **found))
    return rows


def batches(job: Job) -> list[Row]:
    rows = []
    with contextlib.ExitStack() as stack:
        job.say("starting processes")
        demand = Demand(job.cores, any_batch=True)
        # A process each: memory is a process's.
        workers = {name: stack.enter_context(Workers(job.folder, [name], demand, 1)) for name in job.names}
        for name, of in workers.items():
            of.round(name, 1, Load(_CALLS_END_S, BATCHES, calls=len(BATCHES)))
        before = {name: of.peak_megabytes()[0] for name, of in workers.items()}
        loads = [Load(_CALLS_END_S, BATCHES, job.calls // ROUNDS, seed) for seed in range(ROUNDS)]

        def run(name: str, callers: int, load: Load) -> list[Loop]:
            return workers[name].round(name, callers, load)

        for name, found in job.in_turns("batches", run, loads=loads):
            (peak,), first = workers[name].peak_megabytes(), before[name]
            growth = None if peak is None or first is None else peak - first
            rows.append(Row("batches", name, 1, job.cores, peak_MB=peak, growth_MB=growth, **found))
    return rows


SECTIONS: dict[str, Callable[[Job], list[Row]]] = {
    "threads": threads,
    "processes": processes,
    "neighbor": neighbor,
    "batches": batches,
}


def as_table(rows: Sequence[Row]) -> str:
    """Lays out the rows of one section."""
    section = rows[0].section
    eager = {(r.callers, r.threads, r.waiting, r.neighbor): r.figures for r in rows if r.contender == "eager"}
    extra = {"neighbor": ("neighbor", "waiting threads"), "batches": ("peak MB", "growth MB")}.get(section, ())
    cells = []
    for row in rows:
        base = eager.get((row.callers, row.threads, row.waiting, row.neighbor))
        more: tuple[str, ...] = ()
        if section == "neighbor":
            more = ("busy" if row.neighbor else "none", row.waiting)
        elif section == "batches":
            more = tuple("" if value is None else f"{value:.0f}" for value in (row.peak_MB, row.growth_MB))
        cells.append(
            (
                str(row.callers),
                str(row.threads),
                *more,
                row.contender,
                f"{row.figures.p50_ms:.1f}",
                f"{row.figures.p99_ms:.1f}",
                f"{row.figures.images_per_s:.1f}",
                f"{row.figures.images_per_s / base.images_per_s:.2f}" if base else "",
            )
        )
    head = (section if section in ("threads", "processes") else "callers", "intra-op", *extra, "contender")
    return table((*head, "p50 ms", "p99 ms", "images/s", "times eager's"), cells)


def _kernels() -> str:
    """Which CPU kernels serve, without the library's path, which is this machine's."""
    found = library.library_or_none()
    return library.describe().removesuffix("" if found is None else f": {found.path}")


def write_plot(file: Path, rows: Sequence[Row], title: str) -> None:
    """Draws the sections with several callers."""
    from resnet_kernels.cli.report.plot_style import save

    ways: dict[str, dict[str, dict[int, Figures]]] = {}
    for row in rows:
        if row.section in ("threads", "processes"):
            way = f"callers as {row.section}, {row.threads} intra-op thread{'s' * (row.threads > 1)}"
            ways.setdefault(way, {}).setdefault(row.contender, {})[row.callers] = row.figures
    curves = {way: [plot.Curve(*item) for item in found.items()] for way, found in ways.items()}
    figure = plot.draw(curves, [*MAKERS], title)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(save(figure, "png"))


def measure(model: nn.Module, size: int, sections: Sequence[str], **options: Any) -> tuple[list[Row], dict[str, str]]:
    """Measures sections and prints each one's table.

    Args:
        model: a network in eval mode.
        size: height and width of its images.
        sections: of `SECTIONS`.
        **options: of `Job`: seconds, cores and the rest.

    Returns:
        The rows, and the absent contenders with their reasons.

    Raises:
        WrongNumbers, WorkerError: A contender's numbers are wrong, here or in a process.
    """
    with tempfile.TemporaryDirectory() as folder:
        options.get("say", lambda what: None)("exporting the network")
        absent = models.export(model, size, Path(folder))
        for name, reason in absent.items():
            print(f"absent: {name}: {reason}", flush=True)
        job = Job(Path(folder), [name for name in MAKERS if name not in absent], **options)
        rows = []
        for section in sections:
            print(f"{section} ...", file=sys.stderr, flush=True)
            found = SECTIONS[section](job)
            job.say("")
            print(f"{as_table(found)}\n", flush=True)
            rows += found
    return rows, absent


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18", help="of rk.models, torchvision:NAME or timm:NAME")
    parser.add_argument("--size", type=at_least(1), default=224, help="height and width of images (default: 224)")
    parser.add_argument(
        "--seconds", type=positive_float, default=5.0, help="of each contender and configuration (default: 5)"
    )
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads(), help="default: all cores")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[*SECTIONS], metavar="SECTION")
    parser.add_argument("--write", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="needs matplotlib, and threads or processes")
    options = parser.parse_args(arguments)
    if options.plot is not None:
        if not {"threads", "processes"} & {*options.only}:
            parser.error("--plot needs the section threads or processes")
        if importlib.util.find_spec("matplotlib") is None:
            parser.error("--plot needs matplotlib: pip install 'resnet_kernels[report]'")
    torch.manual_seed(0)
    try:
        model = randomise_batch_norms_(by_name.build(options.network)).eval()
    except ValueError as error:
        parser.error(str(error))
    print(library.describe(), flush=True)
    others = Neighbors()
    time.sleep(1)
    busy = others.cores()
    print("" if busy is None else f"before: other processes keep {busy:.1f} cores busy", flush=True)
    rows, absent = measure(
        model, options.size, options.only, seconds=options.seconds, cores=options.threads, say=announce(False)
    )
    if options.write is not None:
        values = {
            "cpu": device_key.cpu_name(),
            "network": options.network,
            "size": options.size,
            "seconds": options.seconds,
            "cores": options.threads,
            "kernels": _kernels(),
            "busy_before": busy,
            "absent": absent,
            "measured": environment(torch.device("cpu")),
            "rows": [asdict(row) for row in rows],
        }
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    if options.plot is not None:
        write_plot(options.plot, rows, f"{options.network}, {options.size}x{options.size}, {device_key.cpu_name()}")


if __name__ == "__main__":
    main()
