"""A kernel from scratch, with what shows that it is right: y = relu(x + scale * residual), one scale a channel.

    TRITON_INTERPRET=1 python docs/examples/new_kernel.py      (without the variable on a machine with a GPU)

Cost: two reads and one write of an activation; eager's multiplication, addition and ReLU take four and three.
docs/kernels.md explains it step by step.

Source: Bachlechner et al. 2020, "ReZero is all you need", with a scale for each channel.
"""

import importlib.util
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

# Configurations are data: tests go through all of them.
BLOCK_SIZE, NUM_WARPS = 1024, 4


@triton.jit
def _scaled_add_relu_kernel(
    x_ptr,  # (n_pixels, n_channels), channels_last memory
    residual_ptr,
    scale_ptr,  # (n_channels,)
    y_ptr,
    n_elements,
    n_channels,
    BLOCK_SIZE: tl.constexpr,
):
    # int64: a 64x112x112 activation passes 2**31 elements at batch 2675.
    offs = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offs < n_elements
    x = tl.load(x_ptr + offs, mask=mask).to(tl.float32)
    residual = tl.load(residual_ptr + offs, mask=mask).to(tl.float32)
    scale = tl.load(scale_ptr + offs % n_channels, mask=mask).to(tl.float32)
    # propagate_nan: a plain maximum turns NaN into 0, which torch.relu keeps.
    y = tl.maximum(x + scale * residual, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def launch(x: Tensor, residual: Tensor, scale: Tensor, y: Tensor | None = None) -> Tensor:
    """Returns relu(x + scale * residual): (N, C, H, W) in channels_last, scale (C,)."""
    y = torch.empty_like(x) if y is None else y
    # Programs: blocks of BLOCK_SIZE elements, in memory order.
    grid = (triton.cdiv(y.numel(), BLOCK_SIZE),)
    with torch.cuda.device_of(x):
        _scaled_add_relu_kernel[grid](
            x,
            residual,
            scale,
            y,
            y.numel(),
            x.shape[1],
            BLOCK_SIZE=BLOCK_SIZE,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return y


def reference(x: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
    """The operation in plain PyTorch: oracle (in fp64), baseline and fallback."""
    return torch.relu(x + scale[:, None, None] * residual)


def operands(dtype: torch.dtype, device: str, integers: bool) -> list[Tensor]:
    shape = (2, 6, 15, 17)  # 3060 elements: three blocks, the last one ragged
    draw = (lambda *size: torch.randint(-4, 5, size)) if integers else torch.randn
    x, residual = (draw(*shape).to(device, dtype).to(memory_format=torch.channels_last) for _ in range(2))
    return [x, residual, draw(shape[1]).to(device, dtype)]


def is_exact(launch, device: str) -> bool:
    """Small integers add up exactly in any order, so a wrong index or mask is a wrong integer."""
    given = operands(torch.float16, device, integers=True)
    # NaN: what is not written shows.
    y = launch(*given, torch.full_like(given[0], torch.nan))
    return torch.equal(y, reference(*given))


def is_within_budget(launch, dtype: torch.dtype, device: str) -> bool:
    """fp64 is the truth, and eager's own error, twice, plus one rounding, the budget: no tolerance is chosen."""
    given = operands(dtype, device, integers=False)
    truth = reference(*(t.double() for t in given))
    errors = [((y.double() - truth).norm() / truth.norm()).item() for y in (launch(*given), reference(*given))]
    return errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps / 2


BUGS = {
    "dropped ReLU": (
        "tl.maximum(x + scale * residual, 0.0, propagate_nan=tl.PropagateNan.ALL)",
        "x + scale * residual",
    ),
    "ragged tail": ("mask = offs < n_elements", "mask = offs < n_elements // BLOCK_SIZE * BLOCK_SIZE"),
    "scale of another channel": ("offs % n_channels", "offs // n_channels % n_channels"),
}


def planted(old: str, new: str, folder: str):
    """This file's launcher, with a piece of its source replaced. Never by what reads out of bounds."""
    source = Path(__file__).read_text()
    assert source.count(old) > 1, f"plant {old!r} anew"
    path = Path(folder) / f"planted_{abs(hash(new))}.py"
    path.write_text(source.replace(old, new, 1))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.launch


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("exact on integers:", is_exact(launch, device))
    for dtype in (torch.float32, torch.float16):
        print(f"within twice eager's error in {dtype}:", is_within_budget(launch, dtype, device))
    with tempfile.TemporaryDirectory() as folder:
        for name, (old, new) in BUGS.items():
            print(f"planted, {name}:", "missed" if is_exact(planted(old, new, folder), device) else "caught")


if __name__ == "__main__":
    main()
