"""Reading a module: which convolutions, BNs, adds and ReLUs it runs, in which order, as data.

A block is read, never assumed. Its own `forward` is traced with torch.fx, on a shallow copy, so that whatever the author
wrote (stride on the 1x1, biases, a pooled shortcut, other names) is what comes out:

    Recipe     a residual block, or a Sequential of convolutions, whose whole forward is made of steps we have:
                   conv1+bn1+relu -> conv2+bn2+relu -> downsample.0+downsample.1 -> conv3+bn3+add+relu
    ContainerPlan   any other module, the network itself say: only the runs conv+bn+relu among its own children, each called
               once and seen by nobody else (the stem), with the max-pool that may follow; the rest of its forward stays
               Python

"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.fx
from torch import nn

from .fusible import (
    POOLS,
    has_act,
    is_batch_norm,
    is_plain_max_pool,
    is_quiet,
    is_wrapper,
    original_class,
    shared_children,
    signature,
    why_not_bn,
    why_not_conv,
    why_not_patched,
)
from .recipe import CallStep, CannotRead, ContainerPlan, ConvStep, NormStep, Recipe
from .tracing import is_add, is_relu_function, mutates, trace


class _Reader:
    """Turns a traced graph into values and steps: first what each node means, then which of them make one kernel."""

    def __init__(self, module: nn.Module, training: bool = False, into_wrappers: bool = False):
        self.module = module
        self.graph = trace(module, training, into_wrappers)
        self.children = dict(module.named_modules())
        self.kind: dict[torch.fx.Node, str] = {}

    def is_residual(self) -> bool:
        """Whether the graph adds two values, as a residual block does."""
        return any(is_add(node) for node in self.graph.nodes)

    def has_own_conv(self) -> bool:
        return any(
            node.op == "call_module" and isinstance(self.children[node.target], nn.modules.conv._ConvNd)
            for node in self.graph.nodes
        )

    def has_wrappers(self) -> bool:
        return any(child is not None and is_wrapper(child) for child in self.module._modules.values())

    def recipe(self) -> Recipe:
        """The module's whole forward as steps. Raises CannotRead if there is one that we don't have."""
        # Only what is seen as a whole is sure to be a block: the network itself keeps its wrappers.
        into_wrappers = self.has_wrappers()
        recipe = (_Reader(self.module, into_wrappers=True) if into_wrappers else self)._recipe()
        return replace(recipe, trains=self._in_training(_Reader._recipe, into_wrappers) == recipe)

    def _in_training(self, what: Callable, into_wrappers: bool = False):
        """What reading the module in train() mode gives, where its forward may do something else; None if it can't be read."""
        try:
            return what(_Reader(self.module, True, into_wrappers))
        except CannotRead:
            return None

    def _recipe(self) -> Recipe:
        nodes = list(self.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        x = inputs[0]
        result = next(node for node in nodes if node.op == "output").args[0]
        if not isinstance(result, torch.fx.Node):
            raise CannotRead("its forward returns more than one tensor")
        for node in nodes:
            self._classify(node)
        alias = self._resolve_identities(nodes)
        self._check_mutation(nodes, x, alias)
        users: dict[torch.fx.Node, list[torch.fx.Node]] = {node: [] for node in nodes}
        for node in nodes:
            if self.kind.get(node) not in (None, "identity", "output"):
                for argument in self._operands(node, alias):
                    users[argument].append(node)
        users[alias[result]].append(None)  # the caller
        heads = self._group(nodes, users, alias)
        return self._schedule(x, alias[result], heads, alias)

    def _classify(self, node: torch.fx.Node) -> None:
        if node.op == "placeholder":
            self.kind[node] = "input"
        elif node.op == "output":
            self.kind[node] = "output"
        elif node.op == "call_module":
            self.kind[node] = self._classify_module(node)
        elif is_relu_function(node):
            self.kind[node] = "relu"
        elif is_add(node):
            if node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
                raise CannotRead(f"its add has other arguments than two tensors ({node.format_node()})")
            self.kind[node] = "add"
        elif node.op == "get_attr":
            raise CannotRead(f"its forward reads the attribute {node.target}")
        else:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            raise CannotRead(f"its forward calls {name}")

    def _classify_module(self, node: torch.fx.Node) -> str:
        child, path = self.children[node.target], node.target
        if len(node.args) != 1 or node.kwargs:
            raise CannotRead(f"{path} is called with more than one argument")
        if isinstance(child, nn.modules.conv._ConvNd):
            reason = why_not_conv(child)
            if reason:
                raise CannotRead(f"{path} {reason}")
            return "conv"
        if is_batch_norm(child):
            reason = why_not_bn(child)
            if reason:
                raise CannotRead(f"{path} {reason}")
            return "bn"
        reason = why_not_patched(child)
        if reason:
            raise CannotRead(f"{path} {reason}")
        if type(child) is nn.ReLU:
            return "relu"
        if is_quiet(child):
            return "identity"
        if type(child) in POOLS:
            return "call"
        if isinstance(child, nn.modules.lazy.LazyModuleMixin) and child.has_uninitialized_params():
            raise CannotRead(f"{path} is lazy and not materialised yet: run the model once, then fuse")
        what = "norm" if "norm" in type(child).__name__.lower() else "module"
        raise CannotRead(f"{path} is a {type(child).__name__}, a {what} that is not fused")

    def _operands(self, node: torch.fx.Node, alias: dict) -> list[torch.fx.Node]:
        arguments = node.args[:2] if self.kind[node] == "add" else node.args[:1]
        if not all(isinstance(a, torch.fx.Node) for a in arguments):
            raise CannotRead(f"its forward computes with a constant ({node.format_node()})")
        return [alias[a] for a in arguments]

    def _resolve_identities(self, nodes: list[torch.fx.Node]) -> dict[torch.fx.Node, torch.fx.Node]:
        alias = {}
        for node in nodes:
            alias[node] = alias[node.args[0]] if self.kind.get(node) == "identity" else node
        return alias

    def _check_mutation(self, nodes: list[torch.fx.Node], x: torch.fx.Node, alias: dict) -> None:
        # An in-place ReLU or add may only write over a value that nobody else reads: a recipe has no aliasing.
        readers: dict[torch.fx.Node, int] = {}
        for node in nodes:
            for argument in node.all_input_nodes:
                if self.kind.get(node) != "identity":
                    readers[alias[argument]] = readers.get(alias[argument], 0) + 1
        for node in nodes:
            if node.op in ("call_module", "call_function", "call_method") and mutates(node, self.children):
                target = alias[node.args[0]]
                if target is x or readers.get(target, 0) > 1:
                    raise CannotRead(f"{node.target} writes over a value that is used elsewhere")

    def _group(self, nodes, users, alias) -> dict[torch.fx.Node, dict]:
        """Maps the last node of each kernel to what the kernel holds."""
        order = {node: i for i, node in enumerate(nodes)}
        taken: dict[torch.fx.Node, dict] = {}
        for node in nodes:
            if self.kind.get(node) == "conv":
                group = dict(kind="conv", conv=node.target, bn=None, relu=False, x=self._operands(node, alias)[0])
                taken[node] = group
            elif self.kind.get(node) in ("bn", "relu", "add", "call"):
                sources = self._operands(node, alias)
                taken[node] = self._absorb(node, sources, taken, users, order) or self._own_group(node, sources)
        return taken

    def _own_group(self, node, sources) -> dict:
        kind = self.kind[node]
        if kind == "bn":
            return dict(kind="norm", bn=node.target, relu=self._has_relu(node), x=sources[0])
        is_module = kind == "call"
        return dict(kind="call", what=node.target if is_module else kind, is_module=is_module, inputs=sources)

    def _has_relu(self, bn: torch.fx.Node) -> bool:
        child = self.children[bn.target]
        return has_act(child) and type(child.act) is nn.ReLU

    def _absorb(self, node, sources, taken, users, order) -> dict | None:
        """Puts a BN, add or ReLU into the kernel that made its input, if that input has no other reader."""
        kind = self.kind[node]
        candidates = [
            s for s in sources if s in taken and len(users[s]) == 1 and self._accepts(taken[s], kind)
        ]  # fmt: skip
        if kind == "add" and len(sources) == 2 and sources[0] is sources[1]:
            return None
        if not candidates:
            return None
        # Both sides of an add may end in a convolution: the deeper branch takes the add, the shortcut is its residual.
        source = max(candidates, key=lambda s: (self._depth(s, taken), order[s]))
        group = dict(taken.pop(source))
        if kind == "bn":
            group["bn"], group["relu"] = node.target, self._has_relu(node)
        elif kind == "add":
            group["residual"] = next((s for s in sources if s is not source), None)
        elif group["kind"] == "call":
            group["what"] = "add_relu"
        else:
            group["relu"] = True
        return group

    @staticmethod
    def _accepts(group: dict, kind: str) -> bool:
        if group["kind"] == "call":
            return kind == "relu" and group["what"] == "add"
        if kind == "bn":
            return not (group["bn"] or group["relu"] or "residual" in group)
        if kind == "add":
            return not (group["relu"] or "residual" in group)
        return kind == "relu" and not group["relu"]

    def _depth(self, node, taken) -> int:
        group = taken.get(node)
        if group is None:
            return 0
        inputs = group["inputs"] if group["kind"] == "call" else [group["x"], group.get("residual")]
        return (group["kind"] == "conv") + max((self._depth(i, taken) for i in inputs if i is not None), default=0)

    def _schedule(self, x, result, groups, alias) -> Recipe:
        """Orders the kernels by need, numbers their values, and notes where each value is needed last."""
        slots = {x: 0}
        ordered: list[tuple[dict, list[int], int]] = []

        def visit(node):
            if node in slots:
                return slots[node]
            group = groups[node]
            wanted = group["inputs"] if group["kind"] == "call" else [group["x"]]
            # Main path first, as eager does; the residual is made just before it is needed.
            inputs = [visit(n) for n in wanted]
            if group.get("residual") is not None:
                inputs.append(visit(group["residual"]))
            slots[node] = len(slots)
            ordered.append((group, inputs, slots[node]))
            return slots[node]

        visit(result)
        last_use = {}
        made_by_conv = set()
        for i, (group, inputs, out) in enumerate(ordered):
            last_use.update({value: i for value in inputs})
            if group["kind"] == "conv":
                made_by_conv.add(out)
        last_use[slots[result]] = len(ordered)
        steps = []
        for i, (group, inputs, out) in enumerate(ordered):
            frees = tuple(sorted({value for value in inputs if last_use[value] == i}))
            if group["kind"] == "call":
                steps.append(CallStep(group["what"], group["is_module"], tuple(inputs), out, frees))
                continue
            residual = inputs[1] if "residual" in group else None
            if group["kind"] == "norm":
                steps.append(NormStep(group["bn"], group["relu"], inputs[0], out, residual, frees))
                continue
            # values[0] is the caller's own; a stage may hand it over for keeps (fused_container.py).
            overwrites = (
                residual is not None
                and residual != inputs[0]
                and residual in frees
                and (residual in made_by_conv or residual == 0)
            )
            conv, bn, relu = group["conv"], group["bn"], group["relu"]
            steps.append(ConvStep(conv, bn, relu, inputs[0], out, residual, overwrites, frees))
        if not made_by_conv:
            raise CannotRead("it runs no convolution of its own")
        modules = tuple(sorted({node.target for node in self.graph.nodes if node.op == "call_module"}))
        containers = {
            ".".join(path.split(".")[:i]) for path in modules for i in range(1, path.count(".") + 1)
        }  # fmt: skip
        return Recipe(tuple(steps), slots[result], (*modules, *sorted(containers)), signature(self.module))

    def container_plan(self) -> ContainerPlan:
        """The runs conv+bn+relu(+max-pool) among the container's own children, each called once and with one reader."""
        plan = self._container_plan()
        return replace(plan, trains=self._in_training(_Reader._container_plan) == plan)

    def _container_plan(self) -> ContainerPlan:
        calls: dict[str, int] = {}
        for node in self.graph.nodes:
            if node.op == "call_module":
                calls[node.target] = calls.get(node.target, 0) + 1
        shared = shared_children(self.module)

        def own(node, accepts) -> bool:
            return (
                node.op == "call_module"
                and "." not in node.target
                and calls[node.target] == 1
                and node.target not in shared
                and len(node.args) == 1
                and not node.kwargs
                and accepts(self.children[node.target])
            )

        runs, absorbed = {}, []
        for node in self.graph.nodes:
            if not own(node, lambda m: why_not_conv(m) is None):
                continue
            bn = self._only_reader(node)
            if bn is not None and own(bn, lambda m: is_batch_norm(m) and not has_act(m) and why_not_bn(m) is None):
                last = bn
            else:
                bn, last = None, node
            relu = self._only_reader(last)
            if relu is None or not own(relu, lambda m: type(m) is nn.ReLU and why_not_patched(m) is None):
                relu = None
            followers = tuple(follower.target for follower in (bn, relu) if follower is not None)
            if followers:
                steps = [ConvStep(node.target, bn.target if bn else None, relu is not None, x=0, out=1, frees=(0,))]
                pool = None if relu is None else self._only_reader(relu)
                if pool is not None and own(pool, is_plain_max_pool):
                    steps.append(CallStep(pool.target, True, (1,), 2, frees=(1,)))
                    followers += (pool.target,)
                members = (node.target, *followers)
                own_signature = tuple((name, original_class(self.children[name])) for name in members)
                runs[node.target] = Recipe(tuple(steps), len(steps), members, own_signature, whole=False)
                absorbed.extend(followers)
        x = next(node for node in self.graph.nodes if node.op == "placeholder")
        first = self._only_reader(x)
        entry = first.target if first is not None and first.op == "call_module" and first.target in runs else None
        return ContainerPlan(runs, tuple(absorbed), tuple(self.module._modules), entry)

    @staticmethod
    def _only_reader(node: torch.fx.Node) -> torch.fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None


def read(module: nn.Module) -> _Reader:
    """Traces a module.

    Raises:
        CannotRead: with the reason, as the report shows it.
    """
    return _Reader(module)
