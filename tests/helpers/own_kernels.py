"""Our CPU kernels in tests: whether they are here, and tests that are about oneDNN."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from helpers.oracle import assert_within_budget
from resnet_kernels.kernels.cpu import convolution, library, plans
from resnet_kernels.kernels.cpu.convolution import Preactivation
from resnet_kernels.kernels.cpu.library import Library, Missing
from resnet_kernels.kernels.cpu.plans import Pool, Shapes
from resnet_kernels.kernels.geometry import Geometry
from resnet_kernels.ops import cpu_candidates


def skip_unless_compiled() -> Library:
    """The compiled library; skips where there is none."""
    found = library.find()
    if isinstance(found, Missing):
        pytest.skip(f"needs our compiled CPU kernels: {found.reason}")
    return found


@pytest.fixture
def onednn_alone(monkeypatch):
    """No kernel of ours is a choice, as without a C compiler."""
    monkeypatch.setattr(cpu_candidates, "_own_by_rule", lambda *arguments, **options: [])


def group_sizes() -> list[int]:
    """Channels of groups that our kernels take, of each kind that they know: several in a vector, one, whole panels."""
    vector = skip_unless_compiled().panel // 2
    return [*(size for size in (2, 4, 8, 16) if size <= vector), 2 * vector, 4 * vector]


def of_groups(groups: int, c_in: int) -> tuple[str, ...]:
    """The kernels for convolutions of so many groups, with as many outputs as inputs."""
    return ("winograd", "direct") if groups == 1 else ("depthwise",) if groups == c_in else ("grouped",)


def is_fused_convolution(event: str) -> bool:
    """Whether a profiler's event is a convolution on the CPU with all that follows it: oneDNN's, or a kernel of ours."""
    return "mkldnn::_convolution_pointwise" in event or event.startswith("resnet_kernels::conv_bias_act.")


def assert_like_eager(y: Tensor, eager: Tensor, oracle: Tensor, what: str = "") -> None:
    """The very NaN, inf and -inf of eager; all else within its budget.

    fp64 has fewer inf, and more NaN: PyTorch multiplies it with its padding, where oneDNN leaves that out.
    """
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(y), kind(eager)), f"{what}: {kind.__name__} differs from eager"
    finite = eager.isfinite() & oracle.isfinite()
    y, eager, oracle = (values.where(finite, 0) for values in (y, eager, oracle))
    assert_within_budget(y, eager, oracle, what)


@pytest.fixture
def threads_as_before():
    """A test may set the number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bind(
    name: str,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    preactivation: tuple[Tensor, Tensor, bool] | None = None,
    pool: Pool | None = None,
    copies: bool | None = None,
) -> Callable[..., Tensor]:
    """A kernel for these operands, on PyTorch's threads; few tasks are no reason against it."""
    if copies is None:
        copies = name != "winograd" and plans.copies(x.shape, weight.shape)
    shapes, threads = Shapes(tuple(x.shape), tuple(weight.shape), geometry, copies, pool), torch.get_num_threads()
    assert "too few tasks" in (plans.why_not(name, shapes, x.dtype, threads) or "too few tasks")
    packed = convolution.pack(name, weight)
    assert packed is not None
    bound = convolution.Bound(name, shapes, packed, scale, bias, threads)
    return bound if preactivation is None else partial(bound, preactivation=Preactivation(*preactivation))
