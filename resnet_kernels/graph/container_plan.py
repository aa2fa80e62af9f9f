"""The runs of a container: convolution, BN, activation and max-pool among its own children that can run as one step or two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from ..kernels.activations import Activation
from . import activations
from .fusible import (
    has_act,
    is_batch_norm,
    is_frozen,
    is_global_average,
    is_known,
    is_plain_max_pool,
    is_prelu,
    original_class,
    shared_children,
    why_not_bn,
    why_not_conv,
    why_not_patched,
)
from .gates import averages_images
from .layouts import boundaries, layouts, prefixes
from .operations import reads_of_child, small_convolutions
from .reads import NOTHING, Reads
from .recipe import CallStep, CannotRead, Chain, ChainPart, ContainerPlan, ConvStep, Head, PReLUAt, Recipe, Step
from .tracing import trace


def container_plan(
    module: nn.Module,
    graph: torch.fx.Graph,
    children: Mapping[str, nn.Module],
    reads: Reads,
    fused: Sequence[tuple[nn.Module, Recipe | ContainerPlan]],
) -> ContainerPlan:
    """Finds the runs of a container.

    Each member of a run is the container's own child, called once, and only the next member reads its output.

    Args:
        module: the container.
        graph: its forward.
        children: its modules by path.
        reads: what the forward reads.
        fused: the modules in it that are fused by themselves, with their plans.
    """
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    shared = shared_children(module)

    def member(node: Node | None, accepts: Callable[[nn.Module], bool]) -> str | None:
        """The path of the child that a node calls, if the child may be a member of a run."""
        if node is None or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        path = str(node.target)
        single = "." not in path and calls[path] == 1 and path not in shared
        return path if single and accepts(children[path]) else None

    runs: dict[str, Recipe] = {}
    absorbed: list[str] = []
    small = small_convolutions(graph, children)
    for node in graph.nodes:
        conv = member(node, lambda m: why_not_conv(m) is None)
        if conv is None or conv in small:
            continue
        last = node
        bn = member(_only_reader(last), lambda m: is_batch_norm(m) and not has_act(m) and why_not_bn(m) is None)
        last = last if bn is None else next(iter(last.users))
        act = member(_only_reader(last), _is_activation)
        activation: Activation | PReLUAt | None = None
        if act is not None:
            activation = PReLUAt(act) if is_prelu(children[act]) else activations.of_module(children[act])
        last = last if act is None else next(iter(last.users))
        pool = member(_only_reader(last), lambda m: is_plain_max_pool(m) and why_not_patched(m) is None)
        followers = [path for path in (bn, act, pool) if path is not None]
        if not followers:
            continue
        steps: list[Step] = [ConvStep(conv, bn, activation, x=0, out=1, frees=(0,))]
        if pool is not None:
            steps.append(CallStep(pool, True, (1,), 2, frees=(1,)))
        members = (conv, *followers)
        signature = tuple((name, original_class(children[name])) for name in members)
        settings = tuple(read for name in members for read in reads_of_child(name, children[name]))
        own = Reads(settings, NOTHING)
        runs[conv] = Recipe(tuple(steps), len(steps), members, signature, whole=False, reads=own)
        absorbed += followers
    first = _only_reader(next(node for node in graph.nodes if node.op == "placeholder"))
    entry = str(first.target) if first is not None and first.op == "call_module" else None
    entry = entry if entry in runs else None
    plans = {id(child): plan for child, plan in fused}
    paths = {path: plans[id(child)] for path, child in module.named_modules() if path and id(child) in plans}
    boundary = boundaries(paths)
    called = dict.fromkeys(boundary(str(node.target)) for node in graph.nodes if node.op == "call_module")
    layout = layouts(graph, children, paths, (*runs, *absorbed))
    run_of = {name: conv for conv, recipe in runs.items() for name in recipe.modules}
    # The convolution stands for its run.
    seen, apart = (tuple(run_of.get(path, path) for path in found) for found in layout[:2])
    nodes: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            path = str(node.target)
            nodes.setdefault(run_of.get(path, boundary(path)), []).append(node)
    recipes = {path: plan if isinstance(plan, Recipe) else plan.runs for path, plan in paths.items()}
    chains = _chains(nodes, {**recipes, "": runs}, seen, apart, lambda last: _head(last, children, calls, shared))
    chains = tuple(
        chain._replace(
            around=tuple((path, (*module.get_submodule(path)._modules,)) for path in _containers(chain.parts))
        )
        for chain in chains
    )
    return ContainerPlan(
        runs,
        tuple(absorbed),
        tuple(module._modules),
        entry,
        called=tuple(called),
        seen=seen,
        apart=apart,
        outputs=layout.outputs,
        chains=chains,
        reads=reads,
    )


def _is_activation(module: nn.Module) -> bool:
    is_one = is_prelu(module) or activations.of_module(module) is not None
    return is_one and why_not_patched(module) is None


def _chains(
    called: Mapping[str, Sequence[Node]],
    recipes: Mapping[str, Mapping[str, Recipe] | Recipe],
    seen: Collection[str],
    apart: Collection[str],
    head: Callable[[Node], Head | None],
) -> tuple[Chain, ...]:
    """Finds the chains of a container.

    Args:
        called: the nodes of each module that the forward calls, down to fused ones, and of each run, in order.
        recipes: of the fused blocks by path; the runs of fused containers and, at "", of the container itself.
        seen: as in ContainerPlan.
        apart: as in ContainerPlan.
        head: finds the head behind a node.
    """
    chains: list[Chain] = []
    ends: list[Node] = []
    last: Node | None = None  # of the chain that may go on
    for member, nodes in called.items():
        parts = _chain_parts(nodes, recipes)
        if parts is None:
            last = None
            continue
        if last is not None and _follows(last, nodes[0]) and chains[-1].members[-1] not in seen and member not in apart:
            chains[-1] = Chain((*chains[-1].members, member), (*chains[-1].parts, *parts))
        else:
            chains.append(Chain((member,), parts))
            ends.append(nodes[-1])
        ends[-1] = last = nodes[-1]
    return tuple(_with_head(chain, head(end), seen) for chain, end in zip(chains, ends))


def _with_head(chain: Chain, head: Head | None, seen: Collection[str]) -> Chain:
    if head is None or chain.members[-1] in seen:
        return chain
    return Chain((*chain.members, head.first, head.linear), chain.parts, head)


def _head(
    last: Node, children: Mapping[str, nn.Module], calls: Mapping[Any, int], shared: Collection[str]
) -> Head | None:
    """The head behind a node; None if something else is there."""
    head = _modules_of_head(last, children) or _norm_of_head(last, children)
    paths = () if head is None else (head.first, head.flatten, head.linear)
    return None if any(path is not None and (calls[path] != 1 or path in shared) for path in paths) else head


def _modules_of_head(last: Node, children: Mapping[str, nn.Module]) -> Head | None:
    """A head as torchvision has it: a pool, flattening, a linear layer."""
    pool = _only_reader(last)
    flatten = None if pool is None else _only_reader(pool)
    linear = None if flatten is None else _only_reader(flatten)
    if pool is None or flatten is None or linear is None:
        return None
    if not (_calls(pool, last, children, nn.AdaptiveAvgPool2d) and _calls(linear, flatten, children, nn.Linear)):
        return None
    if _calls(flatten, pool, children, nn.Flatten):
        return Head(str(pool.target), str(flatten.target), str(linear.target))
    return Head(str(pool.target), None, str(linear.target)) if _flattens(flatten, pool) else None


def _norm_of_head(last: Node, children: Mapping[str, nn.Module]) -> Head | None:
    """A head as slim's ResNet v2 has it: conv(relu(bn(x)).mean((2, 3), keepdim=True)).flatten(1)."""
    nodes = [last]
    for _ in range(5):
        reader = _only_reader(nodes[-1])
        if reader is None:
            return None
        nodes.append(reader)
    _, norm, act, mean, conv, flatten = nodes
    bn = (
        children.get(str(norm.target))
        if norm.op == "call_module" and (norm.args, norm.kwargs) == ((last,), {})
        else None
    )
    if bn is None or not is_batch_norm(bn) or has_act(bn) or why_not_bn(bn) is not None:
        return None
    is_relu = act.op == "call_function" and act.target in (F.relu, torch.relu) and not act.kwargs.get("inplace")
    if not (
        is_relu
        and act.args == (norm,)
        and averages_images(mean)
        and mean.args[0] is act
        and _calls(conv, mean, children, nn.Conv2d)
    ):
        return None
    return Head(str(norm.target), None, str(conv.target), is_norm=True) if _flattens(flatten, conv) else None


def _does(node: Node, name: str) -> bool:
    """Whether a node calls torch's function, or a tensor's method, of a name."""
    is_function = node.op == "call_function" and node.target is getattr(torch, name)
    return is_function or (node.op == "call_method" and node.target == name)


def _flattens(node: Node, x: Node) -> bool:
    """Whether a node flattens x from the channels on."""
    return _does(node, "flatten") and (node.args, node.kwargs) in (((x, 1), {}), ((x,), {"start_dim": 1}))


def _calls(node: Node, x: Node, children: Mapping[str, nn.Module], cls: type[nn.Module]) -> bool:
    """Whether a node calls a module of this very class on x."""
    return (
        node.op == "call_module" and node.args == (x,) and not node.kwargs and type(children[str(node.target)]) is cls
    )


def head_is_as_read(pool: Any, flatten: Any, linear: Any) -> bool:
    """Whether a head's modules are what they have to be: a global average, flattening from the channels on, a product."""
    return (
        is_global_average(pool)
        and (flatten is None or (type(flatten) is nn.Flatten and (flatten.start_dim, flatten.end_dim) == (1, -1)))
        and type(linear) is nn.Linear
        and all(why_not_patched(child) is None for child in (pool, flatten, linear) if child is not None)
    )


def norm_head_is_as_read(norm: Any, conv: Any) -> bool:
    """Whether a head's modules are what they have to be: a BN with its own statistics, a product of one pixel's channels."""
    return (
        is_batch_norm(norm)
        and not has_act(norm)
        and why_not_bn(norm) is None
        and is_frozen(norm)
        and type(conv) is nn.Conv2d
        and why_not_conv(conv) is None
        and (conv.kernel_size, conv.stride, conv.groups) == ((1, 1), (1, 1), 1)
        and conv.padding in (0, (0, 0))
    )


def _chain_parts(
    nodes: Sequence[Node], recipes: Mapping[str, Mapping[str, Recipe] | Recipe]
) -> tuple[ChainPart, ...] | None:
    """The recipes that nodes stand for; None if they are something else, too, or don't run one after the other."""
    if not all(map(_follows, nodes, nodes[1:])) or len(nodes[0].args) != 1 or nodes[0].kwargs:
        return None
    parts: dict[ChainPart, None] = {}
    rest: set[str] = set()
    for node in nodes:
        path = str(node.target)
        parent, _, name = path.rpartition(".")
        runs = recipes.get(parent, {})
        # A Sequential may be a block as a whole.
        block = next((prefix for prefix in prefixes(path) if isinstance(recipes.get(prefix), Recipe)), None)
        if block is not None:
            parts[ChainPart(block, None)] = None
        elif not isinstance(runs, Recipe) and name in runs:
            parts[ChainPart(parent, name)] = None
            rest.update(f"{parent}.{other}".lstrip(".") for other in runs[name].modules)
        elif path not in rest:
            return None
    return tuple(parts) if len({node.target for node in nodes}) == len(nodes) else None


def _containers(parts: Sequence[ChainPart]) -> list[str]:
    """The paths of the nn.Sequentials around a chain's parts."""
    around = {part.path for part in parts if part.run is not None and part.path}
    return sorted(around.union(*(prefixes(part.path)[:-1] for part in parts)))


def _follows(node: Node, reader: Node) -> bool:
    """Whether a node is the only reader of another one, and reads nothing else."""
    return _only_reader(node) is reader and reader.args == (node,) and not reader.kwargs


def changes_nothing(plan: ContainerPlan, children: Mapping[str, nn.Module], fused: Collection[nn.Module]) -> bool:
    """Whether nothing that a container's forward runs can change a fused block.

    Args:
        plan: of the container.
        children: its modules by path.
        fused: the fused modules in it.
    """
    own = {name for recipe in plan.runs.values() for name in recipe.modules}
    taken = {*map(id, fused)}
    others = [child for path in plan.called if path not in own and id(child := children[path]) not in taken]
    return all(is_known(child) or _computes_only(child) for child in others)


def _computes_only(module: nn.Module) -> bool:
    """Whether a module's forward, and those of all modules that it calls, do nothing but compute."""
    try:
        graph = trace(module, False).graph
    except CannotRead:
        return False
    children = dict(module.named_modules())
    called = [children[str(node.target)] for node in graph.nodes if node.op == "call_module"]
    return all(is_known(child) or _computes_only(child) for child in called)


def _only_reader(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
