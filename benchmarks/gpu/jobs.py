"""python -m benchmarks.gpu.jobs FILE: lists the problems that a GPU session checks and tunes, on a machine without a GPU.

A problem is a convolution, a BN, a link of several layers or a stem that a running network looks up with
`ops.tuned_table.choice`. GPU time is scarce, so the networks run here, in fp16 on the CPU, and the list travels as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from resnet_kernels.kernels.geometry import Geometry
from resnet_kernels.models import by_name
from resnet_kernels.ops.batch_norm_act import NormProblem
from resnet_kernels.ops.conv_problem import ConvProblem
from resnet_kernels.perf.tuning import problems
from resnet_kernels.runtime.gpu import multi_layer
from resnet_kernels.runtime.gpu.multi_layer import LinkProblem, StemProblem

# (network, image size). 75 leaves every tile ragged; 224 is the size that is timed.
INFERENCE = (
    ("resnet50", 224),
    ("resnet18", 224),
    ("resnet_v2_50", 224),
    ("resnet152", 224),
    ("resnet50", 75),
    ("resnet_v2_50", 75),
)
TRAINING = (("resnet50", 224), ("resnet_v2_50", 224))
_TYPES = {kind.__name__: kind for kind in (ConvProblem, NormProblem, LinkProblem, StemProblem, Geometry)}


class Noted(NamedTuple):
    """Problems that one network looks up in a table, each with the number of lookups in a call."""

    network: str
    image_size: int
    training: bool
    problems: list[tuple[Hashable, int]]


def note(network: str, image_size: int, training: bool) -> Noted:
    """Runs a network once on the CPU as if it were a Hopper GPU, and returns the problems that it looks up."""
    torch.manual_seed(0)
    model = by_name.build(network).to(torch.float16)
    model = model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]  # PyTorch's types lack memory_format
    x = by_name.image_batch(model, 2, image_size)
    # A run looks for links only on devices where their kernels run.
    with mock.patch.object(multi_layer, "takes_links", lambda device: True):
        return Noted(network, image_size, training, problems.note(model, x, training=training))


def to_json(value: Any) -> Any:
    """Converts a problem to lists; a named tuple becomes {its type: its fields}."""
    if isinstance(value, tuple) and type(value).__name__ in _TYPES:
        return {type(value).__name__: [to_json(field) for field in value]}
    return [to_json(item) for item in value] if isinstance(value, (tuple, list)) else value


def from_json(value: Any) -> Any:
    """Inverse of `to_json`."""
    if isinstance(value, dict):
        ((name, fields),) = value.items()
        return _TYPES[name](*map(from_json, fields))
    return tuple(map(from_json, value)) if isinstance(value, list) else value


def read(path: Path) -> list[Noted]:
    """Reads the file that `main` has written."""
    rows = json.loads(path.read_text())
    return [
        Noted(network, size, training, [(from_json(asked), calls) for asked, calls in noted])
        for network, size, training, noted in rows
    ]


def main() -> int:
    wanted = [(*row, False) for row in INFERENCE] + [(*row, True) for row in TRAINING]
    rows = [[*noted[:3], to_json(noted.problems)] for noted in (note(*row) for row in wanted)]
    Path(sys.argv[1]).write_text(json.dumps(rows, indent=0) + "\n")
    print(f"{sum(len(row[3]) for row in rows)} problems of {len(rows)} networks: {sys.argv[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
