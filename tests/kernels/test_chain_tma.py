"""The chain in the interpreter: exact on integers in every kind, the single layers' own numbers, and what it refuses."""

from dataclasses import replace

import pytest
import torch

from helpers.chains import CASES, FP16, IDENTITY, SUBSAMPLED, Case, chain, reference, shapes
from helpers.oracle import assert_within_budget
from helpers.planted import planted
from resnet_kernels.kernels.activations import RELU
from resnet_kernels.kernels.geometry import Geometry
from resnet_kernels.kernels.operands import ConvOperands

pytest.importorskip("triton", reason="Triton is not installed")

from resnet_kernels.kernels.sm90 import chain as sm90_chain
from resnet_kernels.kernels.sm90 import conv as sm90_conv
from resnet_kernels.kernels.sm90.chain import Layer, Shortcut
from resnet_kernels.kernels.sm90.chain_layout import CONFIGS, Kind, ShortcutShape, choose_config, kind_of, why_not
from resnet_kernels.kernels.sm90.conv_tiles import TmaConfig

pytestmark = pytest.mark.usefixtures("hopper_with_nan_outputs")


def kind_of_call(call: dict) -> Kind:
    _, conv2_shape, _, _, _, shortcut, next_shape = shapes(call)
    return kind_of(conv2_shape, shortcut, next_shape)


def run(call: dict, **more):
    assert why_not(*shapes(call)) is None
    return sm90_chain.launch(**call, **more)


def wrong(call: dict, **more) -> bool:
    """Whether y or z differ from the exact ones."""
    expected, outputs = reference(call), run(call, **more)
    assert all(e is None or 0 < e.abs().max() <= 2048 for e in expected), "the test's own sums must be exact"
    return any(
        (a is None) != (e is None) or (a is not None and not torch.equal(a.double().cpu(), e))
        for a, e in zip(outputs, expected)
    )


@pytest.mark.slow(unless=lambda case: case in CASES[::3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_on_integers(case, device):
    call = chain(case, device)
    assert not wrong(call)
    y, z = run(call)
    assert all(t is None or (t.dtype == FP16 and t.is_contiguous(memory_format=torch.channels_last)) for t in (y, z))
    assert not wrong(chain(case, device, norm=False))


@pytest.mark.slow(unless=lambda kind: kind in [*CONFIGS][::4])
@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: "-".join(map(str, kind)))
def test_every_shipped_config_is_exact(kind, device, monkeypatch):
    """One program that walks over several tiles; channels less than the blocks hold, steps of 32 and of 64."""
    monkeypatch.setattr(sm90_chain, "multiprocessors", lambda device: 1)
    for c_in, less in ((64, 0), (32, 8)):
        sizes = [n and n - less for n in kind]
        case = Case("", 2, c_in, 10, 8, sizes[0], 128, sizes[1], sizes[2] or IDENTITY)
        call = chain(case, device)
        assert kind_of_call(call) == kind
        config = choose_config(kind, c_in)
        assert config.block_k == c_in
        assert not wrong(call, config=replace(config, programs_per_sm=1))


@pytest.mark.slow(unless=lambda case: case is CASES[0])
@pytest.mark.parametrize("case", (CASES[0], CASES[3], CASES[8]), ids=str)
def test_every_vector_and_relu_may_be_left_out(case, device):
    call = chain(case, device)
    for layer in ("conv2", "conv3", "next_conv1", "residual"):
        own = call[layer].layer if isinstance(call[layer], Shortcut) else call[layer]
        if not isinstance(own, Layer):
            continue
        for change in (dict(scale=None), dict(shift=None), dict(scale=None, shift=None), dict(relu=not own.relu)):
            if layer == "residual" and "relu" in change:
                continue
            changed = own._replace(**change)
            assert not wrong(call | {layer: call[layer]._replace(layer=changed) if layer == "residual" else changed})
    half = {
        name: call[name]._replace(scale=call[name].scale.half(), shift=call[name].shift.half())
        for name in ("conv2", "conv3")
    }
    assert not wrong(call | half)


@pytest.mark.parametrize("case", CASES[:10], ids=str)
def test_as_accurate_as_eager(case, device):
    call = chain(case, device, real=True)
    eager = reference(call, number=lambda t: t.to(FP16))
    for name, y, own, oracle in zip("yz", run(call), eager, reference(call)):
        if y is not None:
            assert_within_budget(y, own, oracle, name)


def layer_by_layer(call: dict) -> tuple:
    """y and z by the kernel of single layers, with the chain's steps."""
    tile = TmaConfig(128, 64, 64, num_warps=4, num_stages=4, parts=1, programs_per_sm=1)

    def conv(x, layer, geometry, residual=None, block_k=64):
        config = replace(tile, block_k=block_k)
        operands = ConvOperands(
            x, layer.weight, layer.shift, residual, layer.scale, geometry, RELU if layer.relu else None
        )
        return sm90_conv.launch(operands, config)

    hidden = conv(call["x"], call["conv2"], call["geometry"])
    y = conv(hidden, call["conv3"], Geometry(), call["residual"])
    p = y
    if call["next_norm"]:
        scale, shift = (vector[:, None, None] for vector in call["next_norm"])
        p = torch.relu(y.float() * scale + shift).to(y.dtype)
    return y, conv(p, call["next_conv1"], Geometry(), block_k=32)


@pytest.mark.parametrize("case", (CASES[0], CASES[2], CASES[8]), ids=str)
def test_bit_for_bit_the_single_layers(case, device):
    """h, y and p are rounded where the single layers write them."""
    call = chain(case, device, real=True)
    for chained, single in zip(run(call), layer_by_layer(call)):
        assert torch.equal(chained, single)


def test_bf16_in_the_interpreter_is_upcast(device):
    for case in (CASES[3], CASES[8]):
        call = chain(replace(case, n=1), device, torch.bfloat16)
        expected = reference(call)
        assert expected[0].abs().max() <= 256, "y must be exact in bfloat16, so that z alone is rounded"
        for out, exact in zip(run(call), expected):
            assert torch.equal(out.cpu(), exact.to(torch.bfloat16))


def test_nan_stays_nan_and_inf_stays_inf(device):
    case = replace(CASES[0], n=1, h=12, w=12)
    call = chain(case, device, real=True)
    clean_y, clean_z = run(call)
    call["residual"][0, 3, 1, 1], call["x"][0, 5, 8, 8] = float("nan"), float("nan")
    call["residual"][0, 7, 1, 5] = float("inf")
    y, z = run(call)
    # A channel of one pixel by the residual; nine pixels, all channels, by the 3x3.
    assert y.isnan().sum() == 1 + 9 * case.c_out and y[0, :, 7:10, 7:10].isnan().all() and y[0, 3, 1, 1].isnan()
    assert y.isinf().sum() == 1 and y[0, 7, 1, 5].isposinf()
    assert z.isnan().sum() == 10 * case.next_width and z[0, :, 1, 1].isnan().all() and z[0, :, 7:10, 7:10].isnan().all()
    assert set(z[0, :, 1, 5].tolist()) <= {0.0, float("inf")} and z[0, :, 1, 5].isinf().any()
    elsewhere = ~y.isnan() & ~y.isinf()
    assert torch.equal(y[elsewhere], clean_y[elsewhere])
    beside = torch.ones(12, 12, dtype=torch.bool, device=device)
    beside[1, 1] = beside[1, 5] = False
    beside[7:10, 7:10] = False
    assert torch.equal(z[..., beside], clean_z[..., beside])


def test_layouts_and_addresses_do_not_matter(device):
    call = chain(CASES[3], device)

    def shifted(t):
        # Two or four bytes after a multiple of 16.
        storage = torch.empty(t.numel() + 1, device=device, dtype=t.dtype)[1:]
        moved = storage.as_strided(
            t.shape, t.contiguous(memory_format=torch.channels_last).stride() if t.dim() == 4 else (1,)
        )
        assert moved.copy_(t).data_ptr() % 16
        return moved

    moved = {
        name: Layer(shifted(own.weight), shifted(own.scale), torch.stack([own.shift, own.shift], 1)[:, 0], own.relu)
        for name, own in call.items()
        if isinstance(own, Layer)
    }
    shortcut = call["residual"]
    moved |= dict(x=shifted(call["x"]), residual=shortcut._replace(x=shortcut.x.contiguous()))
    assert not wrong(call | moved)


PAD = (1, 1, 1, 1)
GIVEN = dict(
    x_shape=(2, 64, 8, 8), conv2_shape=(64, 64, 3, 3), geometry=Geometry(padding=PAD), conv3_shape=(256, 64, 1, 1), dtype=FP16,
    shortcut=None, next_shape=(64, 256, 1, 1),
)  # fmt: skip
WIDE = dict(x_shape=(2, 128, 8, 8), conv2_shape=(128, 128, 3, 3), conv3_shape=(512, 128, 1, 1))
REASONS = {
    "nothing": ({}, None),
    "a projection": (dict(shortcut=ShortcutShape((2, 64, 8, 8), (256, 64, 1, 1), Geometry())), None),
    "fp32": (dict(dtype=torch.float32), "conv2: dtype must be float16 or bfloat16, got torch.float32"),
    "groups": (dict(conv2_shape=(64, 2, 3, 3), geometry=Geometry(padding=PAD, groups=32)), "conv2: groups must be 1, got 32"),
    "odd size": (dict(x_shape=(2, 64, 7, 7), geometry=Geometry((2, 2), PAD)), "conv2: stride 2 needs an even height"),
    "1x1 conv2": (dict(conv2_shape=(64, 64, 1, 1), geometry=Geometry()), "conv2 must have taps"),
    "channels of the 3x3": (
        dict(x_shape=(2, 40, 8, 8), conv2_shape=(64, 40, 3, 3)), "conv2: C_in must be a multiple of 32, got 40"
    ),
    "3x3 conv3": (dict(conv3_shape=(256, 64, 3, 3)), r"conv3: weight must have shape \(256, 64, 1, 1\)"),
    "conv3 of others": (dict(conv3_shape=(256, 32, 1, 1)), "conv3: weight must have shape"),
    "ragged output": (dict(conv3_shape=(80, 64, 1, 1), next_shape=None), "conv3: C_out must be a multiple of 32, got 80"),
    "next of others": (dict(next_shape=(64, 128, 1, 1)), r"next conv1: weight must have shape \(64, 256, 1, 1\)"),
    "ragged next": (dict(next_shape=(36, 256, 1, 1)), "next conv1: C_out must be a multiple of 8, got 36"),
    "projection of others": (
        dict(shortcut=ShortcutShape((2, 64, 8, 8), (256, 32, 1, 1), Geometry())), "shortcut: weight must have shape"
    ),
    "projection with padding": (
        dict(shortcut=ShortcutShape((2, 64, 6, 6), (256, 64, 1, 1), Geometry(padding=PAD))), "shortcut: padding must be 0"
    ),
    "projection of other pixels": (
        dict(shortcut=ShortcutShape((2, 64, 8, 8), (256, 64, 1, 1), Geometry((2, 2)))), "does not give"
    ),
    "subsampled channels": (
        dict(shortcut=ShortcutShape((2, 128, 8, 8), None, Geometry())), "shortcut: without a weight x must have 256 channels"
    ),
    "ragged projection": (
        dict(shortcut=ShortcutShape((2, 12, 8, 8), (256, 12, 1, 1), Geometry())),
        "shortcut: C_in must be a multiple of 8, got 12",
    ),
    "too wide": (
        dict(x_shape=(2, 256, 8, 8), conv2_shape=(256, 256, 3, 3), conv3_shape=(1024, 256, 1, 1), next_shape=None),
        r"no tile of Kind\(width=256, next_width=0, shortcut_in=0\)",
    ),
    "too much at once": (
        WIDE | dict(shortcut=ShortcutShape((2, 256, 8, 8), (512, 256, 1, 1), Geometry()), next_shape=(256, 512, 1, 1)),
        r"no tile of Kind\(width=128, next_width=256, shortcut_in=256\)",
    ),
    "projection of too many": (
        dict(shortcut=ShortcutShape((2, 512, 8, 8), (256, 512, 1, 1), Geometry())), "no tile of .*shortcut_in=512"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_the_predicate_says_why(name):
    change, reason = REASONS[name]
    said = why_not(**GIVEN | change)
    if reason is None:
        assert said is None
    else:
        with pytest.raises(ValueError, match=reason):
            raise ValueError(said)


def test_kinds_are_the_nets():
    assert kind_of((64, 64, 3, 3), None, None) == Kind(64, 0, 0)
    assert kind_of((40, 64, 3, 3), None, (72, 160, 1, 1)) == Kind(64, 128, 0)
    subsampled = ShortcutShape((2, 512, 8, 8), None, Geometry((2, 2)))
    assert kind_of((128, 128, 3, 3), subsampled, (256, 512, 1, 1)) == Kind(128, 256, 0)
    assert kind_of((128, 128, 3, 3), ShortcutShape((2, 72, 8, 8), (512, 72, 1, 1), Geometry()), None) == Kind(
        128, 0, 256
    )


BUG_CASES = (
    Case("", 2, 64, 9, 7, 64, 128, 64, preact=True),
    Case("", 1, 64, 24, 20, 64, 128, 64, shortcut=72, stride=2, padding=(1, 0, 1, 2)),
    Case("", 3, 96, 12, 6, 40, 64, 72, shortcut=SUBSAMPLED, stride=2),
    Case("", 1, 32, 6, 6, 32, 64, 8, preact=True, keep_sum=False),
)
KERNEL_BUGS = {
    "rows from where y's are": ("n, h - lead_h, w", "n, h, w"),
    "columns from where y's are": ("w - lead_w, KERNEL_H", "w, KERNEL_H"),
    "row skew forgotten": ("IN_PAIRS, SKEW_H, SKEW_W", "IN_PAIRS, 0, SKEW_W"),
    "column skew forgotten": ("IN_PAIRS, SKEW_H, SKEW_W", "IN_PAIRS, SKEW_H, 0"),
    "images of one tile": ("tile // (tiles_w * tiles_h) * BOX_N", "tile // (tiles_w * tiles_h) * 0"),
    "every other tile left out": ("n_tiles, tl.num_programs(0))", "n_tiles, 2 * tl.num_programs(0))"),
    "dropped ReLU of h": ("if RELU_2:", "if False:"),
    "dropped ReLU of y": ("if RELU_3:", "if False:"),
    "dropped ReLU of z": ("if RELU_1:", "if False:"),
    "swapped scale and shift of h": ("hidden, scale2_ptr, shift2_ptr", "hidden, shift2_ptr, scale2_ptr"),
    "swapped scale and shift of z": ("z, scale1_ptr, shift1_ptr", "z, shift1_ptr, scale1_ptr"),
    "y's vectors of the first block": ("scale_desc.load([channel])", "scale_desc.load([channel * 0])"),
    "shift of another block": ("shift_desc.load([channel])", "shift_desc.load([channel * 0])"),
    "the norm's vectors for y's": ("(y, scale3_desc, shift3_desc", "(y, norm_scale_desc, norm_shift_desc"),
    "the projection without its BN": ("residual, shortcut_scale_desc, shortcut_shift_desc", "residual, None, None"),
    "the projection's BN for the sum": ("(y, scale3_desc, shift3_desc, channel) + residual",
                                        "(y + residual, scale3_desc, shift3_desc, channel)"),
    "dropped residual": ("channel) + residual\n", "channel) + 0 * residual\n"),
    "residual of the first block": ("residual_desc.load([n, h, w, channel])", "residual_desc.load([n, h, w, 0])"),
    "projection of another pixel": ("residual_desc.load([n, h, w, 0])", "residual_desc.load([n, w, h, 0])"),
    "norm forgotten": ("if norm_scale_desc is not None:", "if False:"),
    "sum written where the norm is wanted": ("y if KEEP_SUM else p", "y"),
    "norm written where the sum is wanted": ("y if KEEP_SUM else p", "p"),
    "next conv1 of the sum": ("z = _dot(p,", "z = _dot(y,"),
    "z of the last block alone": ("w1_desc.load([0, channel]).T, UPCAST, z)", "w1_desc.load([0, channel]).T, UPCAST)"),
}  # fmt: skip
# These show on real numbers alone.
ROUNDING_BUGS = {
    "h not rounded": ("_dot(left, w3_desc.load([channel, 0]).T,",
                      "_dot(hidden.T, w3_desc.load([channel, 0]).T.to(tl.float32),"),
    "sum not rounded before the norm": (
        """            y = y.to(y_desc.dtype)
            p = y
            if norm_scale_desc is not None:
                p = relu(_affine_block(y.to(tl.float32),""",
        """            exact = y
            y = y.to(y_desc.dtype)
            p = y
            if norm_scale_desc is not None:
                p = relu(_affine_block(exact,""",
    ),
    "sum rounded before the residual": ("y = _affine_block(y, scale3_desc, shift3_desc, channel) + residual",
                                        "y = _affine_block(y, scale3_desc, shift3_desc, channel).to(y_desc.dtype) + residual"),
}  # fmt: skip
PLAN_BUGS = {
    "rows of the shortcut not skipped": ("stride[0] * row", "row"),
    "columns of the shortcut not skipped": ("stride[1] * channels, 1)", "channels, 1)"),
    "shortcut's rows of y's length": ("block, in_size, shortcut.geometry.stride",
                                      "block, (out_h, out_w), shortcut.geometry.stride"),
    "one tile of rows": ('for name in ("n_tiles", "tiles_h", "tiles_w", "lead_h", "lead_w")}',
                         'for name in ("n_tiles", "tiles_h", "tiles_w", "lead_h", "lead_w")} | dict(n_tiles=1)'),
    "scale of h cut off": ("WIDTH=width", "WIDTH=width - 1"),
    "z's vectors cut off": ("NEXT_WIDTH=next_shape[0] if", "NEXT_WIDTH=next_shape[0] - 1 if"),
    "y's last block": ("C_OUT=c_out", "C_OUT=c_out - config.block_c"),
}  # fmt: skip


def failures(device) -> int:
    """How many of some calls go wrong. The interpreter's one processor has one program, which walks over all tiles."""
    count = 0
    for case in BUG_CASES:
        call = chain(case, device)
        count += wrong(call, config=replace(choose_config(kind_of_call(call), case.c_in), programs_per_sm=1))
    return count


@pytest.mark.slow(unless=lambda name: name in [*KERNEL_BUGS][:2])
@pytest.mark.parametrize("name", KERNEL_BUGS)
def test_planted_bug_is_caught(name, tmp_path, device, monkeypatch):
    plant(planted("sm90.chain", tmp_path, *KERNEL_BUGS[name]), monkeypatch)
    assert failures(device) > 0


@pytest.mark.parametrize("name", ROUNDING_BUGS)
def test_planted_bug_in_rounding_is_caught(name, tmp_path, device, monkeypatch):
    plant(planted("sm90.chain", tmp_path, *ROUNDING_BUGS[name]), monkeypatch)
    call = chain(CASES[8], device, real=True)
    assert not all(torch.equal(*pair) for pair in zip(run(call), layer_by_layer(call)))


@pytest.mark.slow(unless=lambda name: name == next(iter(PLAN_BUGS)))
@pytest.mark.parametrize("name", PLAN_BUGS)
def test_planted_bug_in_the_plan_is_caught(name, tmp_path, device, monkeypatch):
    module = planted("sm90.chain_layout", tmp_path, *PLAN_BUGS[name])
    monkeypatch.setattr(sm90_chain, "plan", module.plan)
    assert failures(device) > 0


def test_nothing_planted_nothing_caught(tmp_path, device, monkeypatch):
    plant(planted("sm90.chain", tmp_path, "import annotations", "import annotations"), monkeypatch)
    module = planted("sm90.chain_layout", tmp_path, "import annotations", "import annotations")
    monkeypatch.setattr(sm90_chain, "plan", module.plan)
    assert failures(device) == 0


def plant(module, monkeypatch) -> None:
    """Puts a module's kernel in the place of the right one."""
    monkeypatch.setattr(sm90_chain, "_chain_tma_kernel", module._chain_tma_kernel)
