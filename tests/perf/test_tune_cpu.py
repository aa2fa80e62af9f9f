"""Tuning on a CPU: our kernels against oneDNN's, for each layer with a packed weight."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.profiler import profile

import resnet_kernels as rk
from helpers.own_kernels import skip_unless_compiled
from resnet_kernels.cli import main as cli
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.models.resnet_v1 import BasicBlock
from resnet_kernels.ops import tuned_table


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


def test_training_and_bfloat16_have_no_choice(folder):
    fused, x = rk.fuse(net()), torch.randn(2, 16, 24, 24)
    half = rk.fuse(net().bfloat16())
    for result, what in (
        (rk.tune(fused.train(), x, training=True, progress=False), "training"),
        (rk.tune(half, x.bfloat16(), progress=False), "bfloat16"),
    ):
        assert str(result).startswith("nothing to tune: ") and str(result).endswith(f"not in {what}")
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_command(folder, capsys):
    arguments = ["tune", "--device", "cpu", "--model", "d2l_resnet18", "--image-size", "32", "--batch-size", "1"]
    assert cli.main([*arguments, "--seconds", "10"]) == 0
    assert "packed conv" in capsys.readouterr().out and list(folder.glob("*threads.json"))
