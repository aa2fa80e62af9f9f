"""torch.export, AOTInductor and ONNX of a fused model: what the file holds, and that it computes the same."""

import copy
import subprocess
import sys

import pytest
import torch

import resnet_kernels as rk
from helpers.oracle import assert_within_budget, skip_unless_runnable
from helpers.tiny import ENVIRONMENT
from resnet_kernels.models.random_weights import randomise_batch_norms_

BATCH = torch.export.Dim("batch", min=1, max=64)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
pytestmark = pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\).*:FutureWarning")


@pytest.fixture
def model():
    return randomise_batch_norms_(rk.models.d2l_resnet18(3, 10, width=8, num_blocks=(1, 1)).eval())


def images(batch_size=2, layout=torch.contiguous_format):
    return torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=layout)


def check(run, model, x):
    """A result within twice eager's error against fp64."""
    with torch.no_grad():
        assert_within_budget(run(x), model(x), copy.deepcopy(model).double()(x.double()))


def operations(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("freeze", (False, True), ids=("fused", "frozen"))
@pytest.mark.parametrize("strict", (False, pytest.param(True, marks=pytest.mark.slow)), ids=("", "strict"))
@torch.no_grad()
def test_on_a_cpu_the_program_is_the_plain_models(strict, freeze, layout, model):
    """Node by node, with the model's own keys; and the fused model runs fused afterwards."""
    fused, x = rk.fuse(model, freeze=freeze), images(layout=layout)
    fused(x)
    program = torch.export.export(fused, (x,), dynamic_shapes=({0: BATCH},), strict=strict)
    assert operations(program) == operations(torch.export.export(model, (x,), strict=strict))
    assert program.state_dict.keys() == model.state_dict().keys()
    for batch_size in (1, 2, 5):
        for given in LAYOUTS:
            check(program.module(), model, images(batch_size, given))
    assert all(not row.reason for row in rk.explain(fused).fused)
    check(fused, model, x)


def test_in_training_the_program_is_the_plain_models(model):
    x = images()
    programs = [torch.export.export(net.train(), (x,)) for net in (rk.fuse(model), model)]
    assert operations(programs[0]) == operations(programs[1])


LOAD = """
import sys
import torch

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("resnet_kernels", "triton"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
x, y = torch.load(sys.argv[1])
assert torch.equal(torch.export.load(sys.argv[2]).module()(x), y)
print("the same")
"""


@pytest.mark.slow
@torch.no_grad()
def test_a_saved_program_needs_nothing_of_this_package(model, tmp_path):
    x = images()
    program = torch.export.export(rk.fuse(model), (x,))
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save((x, program.module()(x)), tmp_path / "both.pt")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "both.pt"), str(tmp_path / "model.pt2")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.stdout == "the same\n", done.stderr


@pytest.mark.parametrize("backend", ("cudnn", "triton"))
@torch.no_grad()
def test_a_gpus_backend_exports_its_operations(backend, model):
    """They are in the graph, so the package has to be imported before such a file is loaded."""
    x = images()
    program = torch.export.export(rk.fuse(model, backend=backend), (x,))
    names = operations(program)
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    assert names.count("resnet_kernels.conv_bias_act.default") == convolutions
    assert not any("batch_norm" in name or "relu" in name for name in names)
    if backend == "triton":
        skip_unless_runnable("triton", torch.device("cpu"), torch.float32)
        check(program.module(), model, x)
    plain = torch.export.export(rk.unfuse_(copy.deepcopy(rk.fuse(model, backend=backend))), (x,))
    assert not any("resnet_kernels" in name for name in operations(plain))


@torch.no_grad()
def test_normalize_is_in_the_program(model):
    mean, std = [0.5, 0.4, 0.3], [0.25, 0.5, 0.75]
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    program = torch.export.export(rk.fuse(model, normalize=(mean, std)), (x,))
    normalized = (x / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    oracle = copy.deepcopy(model).double()(normalized.double())
    assert_within_budget(program.module()(x), model(normalized), oracle)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@torch.no_grad()
def test_aot_inductor(layout, model, tmp_path):
    x = images(layout=layout)
    program = torch.export.export(rk.fuse(model), (x,), dynamic_shapes=({0: BATCH},))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    run = torch._inductor.aoti_load_package(path)
    for batch_size in (1, 2, 5):
        check(run, model, images(batch_size, layout))


@pytest.mark.slow
@torch.no_grad()
def test_aot_inductor_calls_our_operations(model, tmp_path):
    skip_unless_runnable("triton", torch.device("cpu"), torch.float32)
    x = torch.randn(2, 3, 16, 16)
    program = torch.export.export(rk.fuse(model, backend="triton"), (x,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    check(torch._inductor.aoti_load_package(path), model, x)
    load = "import sys, torch; torch._inductor.aoti_load_package(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", load, path], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode and "Could not find schema for resnet_kernels::conv_bias_act" in done.stderr


CHECKED = """
import sys, torch
run = torch._inductor.aoti_load_package(sys.argv[1])
run(torch.randn(2, 3, 32, 32))
try:
    run(torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last))
except RuntimeError as error:
    print("refused" if "unmatched stride" in str(error) else error)
"""


@pytest.mark.slow
@torch.no_grad()
def test_aot_inductor_can_refuse_other_layouts(model, tmp_path):
    """AOTInductor's, not ours: without the variable it would read the images as if they had the example's strides."""
    program = torch.export.export(rk.fuse(model), (images(),))
    environment = {**ENVIRONMENT, "AOTI_RUNTIME_CHECK_INPUTS": "1"}
    path = tmp_path / "model.pt2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AOTI_RUNTIME_CHECK_INPUTS", "1")
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    command = [sys.executable, "-c", CHECKED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "refused\n", done.stderr


@pytest.mark.slow(unless=lambda freeze: freeze)
@pytest.mark.parametrize("freeze", (False, True), ids=("fused", "frozen"))
def test_onnx(freeze, model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    file = str(tmp_path / "model.onnx")
    torch.onnx.export(rk.fuse(model, freeze=freeze), (images(),), file, dynamic_shapes=({0: BATCH},), verbose=False)
    assert {node.domain for node in onnx.load(file).graph.node} == {""}  # ONNX's own operators
    session = onnxruntime.InferenceSession(file)
    for batch_size in (1, 5):
        check(
            lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]),
            model,
            images(batch_size),
        )


@pytest.mark.slow
@torch.no_grad()
def test_onnx_has_no_operators_of_ours(model, tmp_path):
    """So such a model is unfused first, as docs/deployment.md says."""
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    fused, file = rk.fuse(model, backend="cudnn"), str(tmp_path / "model.onnx")
    with pytest.raises(torch.onnx.OnnxExporterError, match="No ONNX function found"):
        torch.onnx.export(fused, (images(),), file, verbose=False)
    torch.onnx.export(rk.unfuse_(fused), (images(),), file, verbose=False)


def test_torchscript_needs_an_unfused_model(model):
    with pytest.raises(RuntimeError):
        torch.jit.script(rk.fuse(model))
    torch.jit.script(rk.unfuse_(rk.fuse(model)))
