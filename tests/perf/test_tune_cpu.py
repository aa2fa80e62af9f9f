"""Tuning on a CPU: our kernels against oneDNN's, for each layer with a packed weight."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.profiler import profile

import resnet_kernels as rk
from helpers.oracle import assert_within_budget
from helpers.own_kernels import skip_unless_compiled
from resnet_kernels.cli import main as cli
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.models.resnet_v1 import BasicBlock
from resnet_kernels.ops import tuned_table
from resnet_kernels.perf.tuning import tune_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for tables, empty at first."""
    skip_unless_compiled()
    monkeypatch.setenv(tuned_table.CACHE_VARIABLE, str(tmp_path))
    tuned_table.forget()
    yield tmp_path
    monkeypatch.undo()
    tuned_table.forget()


def net():
    torch.manual_seed(0)
    return randomise_batch_norms_(nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16)).eval())


def kernels_of(fused, x):
    with torch.no_grad(), profile() as profiled:
        fused(x)
    names = {event.key for event in profiled.key_averages()}
    return {name for name in names if name.startswith(("resnet_kernels::conv_bias_act.", "mkldnn::_convolution"))}


def test_a_cpu_is_measured_and_runs_by_it_from_the_next_call_on(folder):
    model, x = net(), torch.randn(2, 16, 24, 24)
    fused = rk.fuse(model)
    for _ in range(2):
        assert kernels_of(fused, x) <= {f"resnet_kernels::conv_bias_act.{name}" for name in ("winograd", "direct")}
    result = rk.tune(fused, x, seconds=0.4, progress=False)
    assert len(result) == 1 and result.layers[0].candidates == 3 and not result.layers[0].refused
    assert result.layers[0].layer.startswith("packed conv 16x24x24->16 3x3/1")
    key = tuned_table.device_key(torch.device("cpu"))
    assert result.path == folder / key.file_name and f"{torch.get_num_threads()} threads" in key.capability
    table = json.loads(result.path.read_text())
    assert [record["dtype"] for record in table["records"]] == ["fp32"]
    for winner in ("direct", "onednn", "winograd"):
        table["records"][0]["winner"] = winner
        result.path.write_text(json.dumps(table))
        tuned_table.forget()
        ran = kernels_of(fused, x)
        expected = "mkldnn::_convolution" if winner == "onednn" else f"resnet_kernels::conv_bias_act.{winner}"
        assert ran and all(name.startswith(expected) for name in ran)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_table_is_of_one_number_of_threads(folder):
    fused, x, threads = rk.fuse(net()), torch.randn(2, 16, 24, 24), torch.get_num_threads()
    first = rk.tune(fused, x, seconds=0.2, progress=False).path
    try:
        torch.set_num_threads(threads + 1)
        assert rk.tune(fused, x, seconds=0.2, progress=False).path != first
    finally:
        torch.set_num_threads(threads)


def test_bfloat16_has_no_choice(folder):
    half = rk.fuse(net().bfloat16())
    result = rk.tune(half, torch.randn(2, 16, 24, 24).bfloat16(), progress=False)
    assert str(result).startswith("nothing to tune: ") and str(result).endswith("not in bfloat16")
    assert not list(folder.iterdir())


def train_step(model, x, grad_y):
    """y, and then all gradients and buffers, of a forward and backward."""
    x = x.detach().to(next(model.parameters()).dtype).requires_grad_()
    with profile() as profiled:
        y = model(x)
        y.backward(grad_y.to(y.dtype))
    ran = sum(event.count for event in profiled.key_averages() if event.key.endswith("conv_bias_act.winograd"))
    return ran, [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("weights", (torch.contiguous_format, torch.channels_last), ids=str)
def test_training_is_measured_and_runs_by_it(weights, folder, monkeypatch):
    monkeypatch.setattr(tune_model, "SECONDS_STEP", 0.2)
    model, plain = net().train().to(memory_format=weights), torch.randn(2, 16, 24, 24)
    x, grad_y, fused = plain.contiguous(memory_format=torch.channels_last), torch.randn(2, 16, 24, 24), rk.fuse(model)
    assert train_step(copy.deepcopy(fused), x, grad_y)[0] == 0
    before = [tensor.clone() for tensor in fused.state_dict().values()]
    result = rk.tune(fused, x, training=True, seconds=0.4, progress=False)
    assert all(map(torch.equal, before, fused.state_dict().values()))
    assert [layer.layer for layer in result] == ["trained conv 16x24x24->16 3x3/1 p1,1,1,1 d1 g1"]
    table = json.loads(result.path.read_text())
    (step,) = [record for record in table["records"] if record["key"].startswith("training ")]
    assert step["key"].startswith("training 16x24x24 in Sequential of ") and step["batch"] == 2
    for whole, each, ran in (("own", "winograd", 8), ("own", "eager", 0), ("eager", "winograd", 0)):
        for record in table["records"]:
            record["winner"] = whole if record is step else each
        result.path.write_text(json.dumps(table))
        tuned_table.forget()
        # Forward and backward of four convolutions; of other sizes nothing is known.
        found, ours = train_step(copy.deepcopy(fused), x, grad_y)
        assert found == ran and train_step(copy.deepcopy(fused), x[:, :, 2:], grad_y[:, :, 2:])[0] == 0
        # Eager's gradients are more accurate in its own layout.
        if weights == torch.contiguous_format:
            assert train_step(copy.deepcopy(fused), plain, grad_y)[0] == 0
        assert ("trains on own kernels" in str(rk.explain(fused))) == (whole == "own")
        _, eager = train_step(copy.deepcopy(model), x, grad_y)
        _, truth = train_step(copy.deepcopy(model).double(), x, grad_y)
        assert ours[0].stride() == eager[0].stride()
        for i, values in enumerate(zip(ours, eager, truth, strict=True)):
            if values[0].is_floating_point():
                assert_within_budget(*values, f"value {i}")
            else:
                assert torch.equal(values[0], values[1])


@pytest.mark.slow
def test_command(folder, capsys):
    arguments = ["tune", "--device", "cpu", "--model", "d2l_resnet18", "--image-size", "32", "--batch-size", "1"]
    assert cli.main([*arguments, "--seconds", "10"]) == 0
    assert "packed conv" in capsys.readouterr().out and list(folder.glob("*threads.json"))
