"""PyTorch's own tools on fused models: tracing, compiling, copying, saving, casting, functional calls."""

import copy
import io
import pickle

import pytest
import torch
import torch.fx

import resnet_kernels as rk
from helpers.oracle import skip_unless_runnable
from helpers.small_resnet import close, ran_fused, small_resnet


def test_symbolic_trace_and_feature_extraction(model, x):
    fused = rk.fuse(model)
    traced, plain = torch.fx.symbolic_trace(fused), torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes] == [n.target for n in plain.graph.nodes]
    with torch.no_grad():
        close(traced(x), model(x))


def test_torch_jit_trace(model, x):
    fused = rk.fuse(model)
    with torch.no_grad():
        close(torch.jit.trace(fused, x, check_trace=False)(x), model(x))


def test_torch_compile(model, x):
    """On the CPU the compiler gets the model's own graph, whole."""
    compiled = torch.compile(rk.fuse(model), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(x), model(x))


def test_torch_compile_sees_the_fused_ops(model, device):
    skip_unless_runnable("triton", device, torch.float32)
    stage = copy.deepcopy(model.layer1).to(device)
    fused = rk.fuse(stage, backend="triton")
    graphs = []

    def record(graph, example_inputs):
        graphs.append(graph)
        return graph

    x = torch.randn(1, 64, 6, 6, device=device)
    with torch.no_grad():
        compiled = torch.compile(fused, fullgraph=True, backend=record)
        close(compiled(x), stage(x))
    calls = [node for node in graphs[0].graph.nodes if "conv_bias_act" in str(node.target)]
    assert len(calls) == 7  # three and three convolutions, and a shortcut


@pytest.mark.parametrize("copy_of", [
    copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: copy.copy(m)
], ids=("deepcopy", "pickle", "copy"))  # fmt: skip
def test_copies(model, x, copy_of):
    fused = rk.fuse(model)
    with torch.no_grad():
        expected = fused(x)
        twin = copy_of(fused)
        assert type(twin) is type(fused) and isinstance(twin.layer1[0], rk.models.resnet_v1.Bottleneck)
        assert ran_fused(twin, x) == 6 and torch.equal(twin(x), expected)
        if copy_of is copy.deepcopy:
            twin.layer1[0].conv1.weight.zero_()
            assert torch.equal(fused(x), expected) and not torch.equal(twin(x), expected)
        assert len(rk.explain(rk.unfuse_(twin)).fused) == 6


def test_torch_save_of_the_whole_model(model, x):
    buffer = io.BytesIO()
    fused = rk.fuse(model)
    with torch.no_grad():
        expected = fused(x)
        torch.save(fused, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        assert torch.equal(loaded(x), expected) and ran_fused(loaded, x) == 6


def test_state_dict_round_trips(model, x):
    fused, other = rk.fuse(model), small_resnet()
    with torch.no_grad():
        for p in fused.parameters():
            p.mul_(1.1)
        other.load_state_dict(fused.state_dict())
        close(fused(x), other(x))
        fresh = rk.fuse(small_resnet())
        fresh(x)
        fresh.load_state_dict(model.state_dict())
        close(fresh(x), model(x))


def test_double_and_back(model, x):
    fused = rk.fuse(model)
    with torch.no_grad():
        fused(x)
        wide = fused.double()
        with pytest.warns(RuntimeWarning, match='"cpu" backend runs float32 and bfloat16, got torch.float64'):
            wide(x.double())
        torch.testing.assert_close(wide(x.double()), copy.deepcopy(model).double()(x.double()), rtol=0, atol=0)
        fused.float()
        assert ran_fused(fused, x) == 6


def test_to_bfloat16(model, x):
    skip_unless_runnable("cpu", torch.device("cpu"), torch.bfloat16)
    fused = rk.fuse(model)
    with torch.no_grad():
        fused(x)
        fused.to(torch.bfloat16)
        assert fused(x.bfloat16()).dtype == torch.bfloat16 and ran_fused(fused, x.bfloat16()) == 6
        fused.float()
        assert ran_fused(fused, x) == 6


def test_replicas_of_data_parallel_run_on_their_own_parameters(model, x):
    """nn.DataParallel's replicas share __dict__ entries, the fused state among them, and run in threads."""
    fused = rk.fuse(model)
    with torch.no_grad():
        fused(x)
        blocks_ = fused.layer1[0], fused.layer1[0]._replicate_for_data_parallel()
        block, replica = blocks_
        for name in list(replica._modules):
            replica._modules[name] = copy.deepcopy(block._modules[name])
        for p in replica.modules():
            for tensor in p._parameters.values():
                if tensor is not None:
                    tensor.mul_(1.5)
        inputs = torch.randn(1, 64, 8, 8)
        for _ in range(2):
            for b in blocks_:
                close(b(inputs), type(b)._rk_original_class.forward(b, inputs))


def test_functorch_forward_ad_and_vmap(model, x):
    fused, stage = rk.fuse(model), model.layer1
    batch = torch.randn(3, 2, 64, 8, 8)
    with torch.no_grad():
        close(torch.vmap(fused.layer1)(batch), torch.vmap(stage)(batch))
        _, ours = torch.func.jvp(fused.layer1, (batch[0],), (batch[1],))
        _, theirs = torch.func.jvp(stage, (batch[0],), (batch[1],))
    close(ours, theirs)
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(batch[0], batch[1])
        tangents = [torch.autograd.forward_ad.unpack_dual(m(dual)).tangent for m in (fused.layer1, stage)]
    close(*tangents)


def test_functional_call_uses_the_given_parameters(model, x):
    fused = rk.fuse(model)
    given = {name: p * 1.2 for name, p in model.named_parameters()}
    with torch.no_grad():
        fused(x)
        close(torch.func.functional_call(fused, given, (x,)), torch.func.functional_call(model, given, (x,)))
        close(fused(x), model(x))
