"""python -m benchmarks.stress [--seconds 60] [--seed 0] [--only NAME ...]: load and interruptions, on the CPU.

    threads     threads call fused and plain models, while others fuse, unfuse and explain models of their own
    beside      threads call one model, while others fuse, unfuse, explain, refresh, copy and pickle it
    sizes       images of random sizes; how long fused calls take beside eager's
    edits       random edits of weights, settings, modes, modules and hooks between calls
    interrupts  Ctrl-C at random moments of `explain` and `fuse_`
    memory      models that are fused, called and dropped

Each result is compared with eager in fp64. What load breaks is gross: old weights, another call's image. So a result may err
by twenty times the budget of resnet_kernels.ops.error_budget; whether it keeps the budget itself is for the tests.

Each section runs in a process of its own, so a crash or a hang costs one section. The exit status is 1 if anything went wrong.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import pickle
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import resnet_kernels as rk
from resnet_kernels.fusion.report import table
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.ops import error_budget

_BUDGETS = 20
_MOST_FAILURES = 5
_GRACE_S = 90.0  # beyond a section's seconds: starting Python, and the last action


@dataclass
class Outcome:
    """What a section did, its figures in words, and what went wrong."""

    done: int = 0
    figures: str = ""
    failures: list[str] = field(default_factory=list)


def network() -> nn.Module:
    """A small ResNet with all kinds of blocks' operations, in eval mode, with BNs that do something."""
    model = rk.models.ResNet(rk.models.resnet_v1.BasicBlock, [1, 1, 1, 1], num_classes=10)
    return randomise_batch_norms_(model).eval()


class Judge:
    """What a model gives on an input, and how far a result may be from it."""

    def __init__(self, plain: nn.Module, x: Tensor):
        with torch.no_grad():
            self._truth = copy.deepcopy(plain).double()(x.double())
            eager = error_budget.relative_error(plain(x), self._truth)
        self._most = _BUDGETS * error_budget.budget(eager, x.dtype, x.device)

    def why_wrong(self, y: Tensor) -> str | None:
        """None for a result that is right."""
        if y.shape != self._truth.shape:
            return f"shape {tuple(y.shape)}, eager's is {tuple(self._truth.shape)}"
        error = error_budget.relative_error(y, self._truth)
        return None if error <= self._most else f"errs by {error:.1e}, {self._most:.1e} is allowed"


class Crowd:
    """Threads that repeat actions until the time is up or something goes wrong."""

    def __init__(self, seconds: float):
        self.outcome = Outcome()
        self._end = time.monotonic() + seconds
        self._threads: list[threading.Thread] = []
        self._counts: dict[str, int] = {}

    def add(self, name: str, action: Callable[[], str | None], number: int = 1) -> None:
        """An action returns what is wrong, or None."""
        self._counts[name] = 0

        def repeat() -> None:
            while time.monotonic() < self._end and not self.outcome.failures:
                try:
                    wrong = action()
                except Exception as error:
                    wrong = f"{type(error).__name__}: {error}"
                if wrong:
                    self.outcome.failures.append(f"{name}: {wrong}")
                self._counts[name] += 1

        self._threads += [threading.Thread(target=repeat, daemon=True) for _ in range(number)]

    def run(self) -> Outcome:
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)  # threads take turns a thousand times as often as by default
        before = pytorch_itself()
        try:
            for thread in self._threads:
                thread.start()
            for thread in self._threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        if pytorch_itself() != before:
            self.outcome.failures.append("nn.Module's own methods are not what they were")
        self.outcome.done = sum(self._counts.values())
        self.outcome.figures = ", ".join(f"{name} {count}" for name, count in self._counts.items())
        return self.outcome


def pytorch_itself() -> tuple[object, ...]:
    """What fusing may never change."""
    return nn.Module.__call__, nn.Module.__getattr__, nn.Module.__setattr__, torch.conv2d, torch.relu


def threads(seconds: float, dice: random.Random) -> Outcome:
    plain, x = network(), torch.randn(1, 3, 32, 32)
    judge, report = Judge(plain, x), str(rk.explain(plain))
    models = [plain, rk.fuse(plain), rk.fuse(plain, freeze=True)]

    def call() -> str | None:
        with torch.no_grad():
            return judge.why_wrong(dice.choice(models)(x))

    def fuse() -> str | None:
        own = copy.deepcopy(plain)
        found = str(rk.fuse_(own))
        rk.unfuse_(own)
        if type(own) is not type(plain):
            return "unfuse_ left another class"
        return None if found == report else f"another report than alone:\n{found}"

    def explain() -> str | None:
        return None if str(rk.explain(copy.deepcopy(plain))) == report else "another report than alone"

    crowd = Crowd(seconds)
    crowd.add("calls", call, 3)
    crowd.add("fuse_ + unfuse_", fuse, 2)
    crowd.add("explain", explain)
    return crowd.run()


def beside(seconds: float, dice: random.Random) -> Outcome:
    model, x = network(), torch.randn(1, 3, 32, 32)
    judge = Judge(copy.deepcopy(model), x)

    def call(of: nn.Module = model) -> str | None:
        with torch.no_grad():
            return judge.why_wrong(of(x))

    def verb() -> None:
        dice.choice((rk.fuse_, rk.unfuse_, rk.explain, rk.refresh, nn.Module.state_dict))(model)

    def duplicate() -> str | None:
        return call(copy.deepcopy(model) if dice.random() < 0.5 else pickle.loads(pickle.dumps(model)))

    crowd = Crowd(seconds)
    crowd.add("calls", call, 2)
    crowd.add("verbs", verb, 2)
    crowd.add("copies", duplicate)
    return crowd.run()


def sizes(seconds: float, dice: random.Random) -> Outcome:
    outcome, end, ratios = Outcome(), time.monotonic() + seconds, []
    pairs = [
        (model, rk.fuse(model), c)
        for model, c in ((network(), 3), (randomise_batch_norms_(rk.models.d2l_resnet18()).eval(), 1))
    ]
    while time.monotonic() < end and len(outcome.failures) < _MOST_FAILURES:
        plain, fused, channels = dice.choice(pairs)
        x = torch.randn(dice.randint(1, 4), channels, dice.randint(8, 96), dice.randint(8, 96))
        took: dict[nn.Module, float] = {}
        with torch.no_grad():
            fused(x)  # packs
            for model in dice.sample((plain, fused), 2):
                begin = time.perf_counter()
                y = model(x)
                took[model] = time.perf_counter() - begin
                if model is fused and (wrong := Judge(plain, x).why_wrong(y)):
                    outcome.failures.append(f"{tuple(x.shape)}: {wrong}")
        ratios.append(took[fused] / took[plain])
        outcome.done += 1
    if ratios:
        low, *_, high = statistics.quantiles(ratios, n=10) if len(ratios) > 1 else ratios * 2
        spread = f"{statistics.median(ratios):.2f} of eager's time, from {low:.2f} to {high:.2f} in 8 of 10"
        outcome.figures = f"a fused call takes {spread}"
    return outcome


Edit = Callable[[nn.Module, random.Random], object]


def _convolution(model: nn.Module, dice: random.Random) -> nn.Conv2d:
    return dice.choice([m for m in model.modules() if isinstance(m, nn.Conv2d)])


def _norm(model: nn.Module, dice: random.Random) -> nn.BatchNorm2d:
    return dice.choice([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)])


def _scale_weight(model: nn.Module, dice: random.Random) -> None:
    with torch.no_grad():
        _convolution(model, dice).weight.mul_(dice.uniform(0.9, 1.1))


def _drop_filter(model: nn.Module, dice: random.Random) -> None:
    weight = _convolution(model, dice).weight
    weight.data[dice.randrange(len(weight))] = 0


def _replace_weight(model: nn.Module, dice: random.Random) -> None:
    conv = _convolution(model, dice)
    conv.weight = nn.Parameter(conv.weight.detach() * 0.95)


def _pad_otherwise(model: nn.Module, dice: random.Random) -> None:
    conv = _convolution(model, dice)
    conv.padding_mode = dice.choice(("zeros", "circular", "replicate"))


def _train_a_step(model: nn.Module, dice: random.Random) -> None:
    torch.manual_seed(dice.randrange(1000))
    model.train()
    model(torch.randn(2, 3, 32, 32))
    model.eval()


def _swap_activation(model: nn.Module, dice: random.Random) -> None:
    model.get_submodule("layer1.0").add_module("relu", dice.choice((nn.ReLU, nn.Identity, nn.LeakyReLU))())


def _hook(model: nn.Module, dice: random.Random) -> None:
    dice.choice([*model.children()]).register_forward_hook(lambda module, inputs, y: y * 0.5)


def _load(model: nn.Module, dice: random.Random) -> None:
    model.load_state_dict({name: t * 0.99 if t.is_floating_point() else t for name, t in model.state_dict().items()})


EDITS: dict[str, Edit] = {
    "scale a weight": _scale_weight,
    "zero a filter through .data": _drop_filter,
    "a new parameter": _replace_weight,
    "a BN's eps": lambda model, dice: setattr(_norm(model, dice), "eps", dice.choice((1e-5, 1e-3, 0.1))),
    "a BN's variance": lambda model, dice: _norm(model, dice).running_var.data.mul_(1.1),  # type: ignore[union-attr]
    "padding_mode": _pad_otherwise,
    "a forward in train()": _train_a_step,
    "another activation": _swap_activation,
    "a hook": _hook,
    "load_state_dict": _load,
    "to another memory format": lambda model, dice: model.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
    "one module in train()": lambda model, dice: _norm(model, dice).train(),
    "eval()": lambda model, dice: model.eval(),
}


def edits(seconds: float, dice: random.Random) -> Outcome:
    outcome, end = Outcome(), time.monotonic() + seconds
    while time.monotonic() < end and len(outcome.failures) < _MOST_FAILURES:
        plain = network()
        fused, history = rk.fuse(plain), []
        for _ in range(12):
            name, seed = dice.choice([*EDITS]), dice.randrange(2**31)
            history.append(name)
            for model in (plain, fused):
                EDITS[name](model, random.Random(seed))
            x = torch.randn(2, 3, 32, 32)
            before = copy.deepcopy(plain)  # a BN in train() mode changes in each call
            with torch.no_grad():
                y = fused(x)
                wrong = Judge(before, x).why_wrong(y)
                plain(x)
            outcome.done += 1
            if wrong:
                outcome.failures.append(f"after {', '.join(history)}: {wrong}")
                break
    outcome.figures = f"{len(EDITS)} kinds of edit"
    return outcome


def interrupts(seconds: float, dice: random.Random) -> Outcome:
    outcome, end, came = Outcome(), time.monotonic() + seconds, 0
    if not hasattr(signal, "setitimer"):
        outcome.figures = "not here: there are no timers that interrupt"
        return outcome
    plain, x = network(), torch.randn(1, 3, 32, 32)
    judge, before = Judge(plain, x), pytorch_itself()
    begin = time.perf_counter()
    rk.fuse(plain)
    longest = time.perf_counter() - begin
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    while time.monotonic() < end and len(outcome.failures) < _MOST_FAILURES:
        model, state = copy.deepcopy(plain), torch.get_rng_state()
        signal.setitimer(signal.ITIMER_REAL, dice.uniform(1e-4, longest))
        try:
            dice.choice((rk.fuse_, rk.explain))(model)
        except KeyboardInterrupt:
            came += 1
        finally:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:  # at the last moment
                signal.setitimer(signal.ITIMER_REAL, 0)
        outcome.done += 1
        changed = [
            what
            for what, same in {
                "nn.Module's methods": pytorch_itself() == before,
                "the trace function": sys.gettrace() is None,
                "garbage collection": gc.isenabled(),
                "the random generator": torch.equal(torch.get_rng_state(), state),
            }.items()
            if not same
        ]
        with torch.no_grad():
            wrong = judge.why_wrong(model(x)) or judge.why_wrong(plain(x))
        if changed or wrong:
            outcome.failures.append("; ".join([f"not as before: {', '.join(changed)}"] * bool(changed) + [wrong or ""]))
            gc.enable()
    signal.signal(signal.SIGALRM, handler)
    outcome.figures = f"{came} interrupted"
    return outcome


def resident_megabytes() -> float | None:
    """The process's memory; None where /proc doesn't say."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return None


def memory(seconds: float, dice: random.Random) -> Outcome:
    outcome, end, seen = Outcome(), time.monotonic() + seconds, []
    x = torch.randn(1, 3, 64, 64)
    weights = 0.0
    gc.disable()  # what dies with its last reference needs no collector
    while time.monotonic() < end or outcome.done < 6:
        fused = rk.fuse(rk.models.resnet18().eval())
        weights = sum(p.numel() * p.element_size() for p in fused.parameters()) / 1e6
        with torch.no_grad():
            fused(x)
        gone = weakref.ref(fused)
        del fused
        if gone() is not None:
            outcome.failures.append("a fused model outlives its last reference")
            break
        outcome.done += 1
        if (megabytes := resident_megabytes()) is not None:
            seen.append(megabytes)
    gc.enable()
    if len(seen) > 5:
        early, late = seen[len(seen) // 3], seen[-1]
        outcome.figures = (
            f"{early:.0f} MB after a third of them, {late:.0f} MB after the last; one has {weights:.0f} MB of weights"
        )
        # The allocator keeps a model's pages or two; models that stay would be as many as there were since.
        if late - early > 0.5 * weights * (len(seen) - len(seen) // 3):
            outcome.failures.append(f"memory grew: {outcome.figures}")
    elif not outcome.failures:
        outcome.figures = "memory can't be measured here: there is no /proc"
    return outcome


SECTIONS: dict[str, Callable[[float, random.Random], Outcome]] = {
    "threads": threads,
    "beside": beside,
    "sizes": sizes,
    "edits": edits,
    "interrupts": interrupts,
    "memory": memory,
}


def in_a_process(name: str, seconds: float, seed: int) -> Outcome:
    """Runs a section in a child process."""
    command = [sys.executable, "-m", "benchmarks.stress", "--child", name, f"--seconds={seconds}", f"--seed={seed}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + _GRACE_S)
    except subprocess.TimeoutExpired:
        return Outcome(failures=[f"hangs: no end {_GRACE_S:.0f} s after its time"])
    if done.returncode:
        return Outcome(failures=[f"the process ended with {done.returncode}: {done.stderr[-600:]}"])
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


def main(arguments: list[str] | None = None) -> int:
    """Runs the sections, prints a row for each as it ends, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="for all sections together (default: 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=[*SECTIONS], metavar="NAME", help=", ".join(SECTIONS)
    )
    parser.add_argument("--child", choices=SECTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        torch.manual_seed(options.seed)
        outcome = SECTIONS[options.child](options.seconds, random.Random(options.seed))
        print(json.dumps(asdict(outcome)))
        return 0
    share, rows, failed = options.seconds / len(options.only), [], False
    for name in options.only:
        print(f"{name}: {share:.0f} s", file=sys.stderr, flush=True)
        outcome = in_a_process(name, share, options.seed)
        rows.append((name, str(outcome.done), "wrong" if outcome.failures else "right", outcome.figures))
        for failure in outcome.failures:
            failed = True
            print(f"  {name}: {failure}", file=sys.stderr, flush=True)
    print(table(("section", "actions", "result", "figures"), rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
