"""Interface of a contender."""

from __future__ import annotations

import importlib.metadata

from ..cases import Case
from ..parity import Gate
from ..workload import Runner, Workload


class Contender:
    """One way to run a case.

    name: its name in ids and files. label: its name in tables and plots. settings: its best known settings in a line, kept
    with each result. ours: its wrong numbers fail the benchmark; a peer's are reported. own_threads: it has a pool of CPU
    threads beside PyTorch's. package: the distribution whose version is reported.
    """

    name: str
    label: str
    settings: str
    ours = False
    own_threads = False
    package = "torch"

    def covers(self, case: Case, full: bool) -> bool:
        """Whether it takes part in a case if it is installed; full: whether the run has --full."""
        raise NotImplementedError

    def why_absent(self, case: Case) -> str | None:
        """The reason why it can't take part on this machine; None if it can."""
        return None

    def prepare(self, workload: Workload) -> Runner:
        """Returns a runner for the workload: copies, compiles, exports. An exception costs a peer only its own row."""
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
