"""Result of a `tune`, for `print`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...fusion.report import table


@dataclass(frozen=True)
class TunedLayer:
    """One layer, or several that could share a launch, at one batch size.

    layer: its shapes, as in the table's key. candidates: number of candidates; refused: number of them that gave wrong numbers
    or failed. winner: the record's winner; None if no candidate is right, or memory did not suffice. seconds: the winner's
    time, in a CUDA graph where there are graphs. gain: the default's time over the winner's; 1 if the default won,
    None if nothing won or the default gives wrong numbers.
    """

    layer: str
    batch: int
    candidates: int
    refused: int
    winner: str | None
    seconds: float | None
    gain: float | None


@dataclass(frozen=True)
class TuneResult:
    """Layers in the order of measurement, the costliest first; `print` it for a table.

    path: the table's file, None if there was nothing to tune; reason: why there was nothing. known: number of layers that
    these versions had measured before. left: number of layers for which the time did not suffice.
    """

    layers: tuple[TunedLayer, ...] = ()
    path: Path | None = None
    known: int = 0
    left: int = 0
    reason: str = ""

    def __iter__(self) -> Iterator[TunedLayer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        if self.reason:
            return f"nothing to tune: {self.reason}"
        cells = [
            (
                row.layer,
                str(row.batch),
                f"{row.candidates} ({row.refused} refused)" if row.refused else str(row.candidates),
                row.winner or "none",
                "" if row.seconds is None else f"{1e6 * row.seconds:.1f}",
                "" if row.gain is None else f"{row.gain:.2f}x",
            )
            for row in self.layers
        ]
        measured = len(self.layers) - self.known
        lines = [f"{measured} problems measured, {self.known} known already: {self.path}"]
        if self.left:
            lines.append(f"{self.left} were left when the time was up: tuning again goes on")
        return "\n".join((table(("layer", "batch", "candidates", "winner", "us", "gain"), cells), *lines))
