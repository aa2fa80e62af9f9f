"""The interface of a contender."""

from __future__ import annotations

import importlib.metadata

from ..cases import Case
from ..parity import Gate
from ..workload import Runner, Workload


class Contender:
    """One way to run a case.

    name: in ids and files. label: in tables and plots. settings: its best known ones, in a line, kept with each result.
    ours: its wrong numbers fail the benchmark; a peer's are reported. own_threads: it has a pool of CPU threads beside
    PyTorch's. package: the distribution that it is, for its version.
    """

    name: str
    label: str
    settings: str
    ours = False
    own_threads = False
    package = "torch"

    def covers(self, case: Case, full: bool) -> bool:
        """Whether it takes part in a case of a run with or without --full, if it is here."""
        raise NotImplementedError

    def why_absent(self, case: Case) -> str | None:
        """Why it can't take part here and now; None if it can."""
        return None

    def prepare(self, workload: Workload) -> Runner:
        """Makes it ready: copies, compiles, exports. Whatever it raises costs a peer its own row and nothing else."""
        raise NotImplementedError

    def gate(self, workload: Workload, runner: Runner) -> Gate:
        return workload.gate(runner)

    @property
    def version(self) -> str:
        """The package and its version, or the package alone where it isn't installed."""
        try:
            return f"{self.package} {importlib.metadata.version(self.package)}"
        except importlib.metadata.PackageNotFoundError:
            return self.package
