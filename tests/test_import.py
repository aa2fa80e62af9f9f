"""Rule 5: importing the package probes no GPU, imports no Triton, patches nothing, and takes no time."""

import json
import subprocess
import sys

PROBE = """
import json, sys, time
import torch
import torch.fx, torch.library
patched = (torch.nn.Module.__call__, torch.nn.Conv2d.forward, torch.conv2d)
before = set(sys.modules)
start = time.perf_counter()
import resnet_kernels
seconds = time.perf_counter() - start
print(json.dumps({
    "seconds": seconds,
    "new": sorted(m for m in set(sys.modules) - before if not m.startswith("resnet_kernels")),
    "cuda": torch.cuda.is_initialized(),
    "same": patched == (torch.nn.Module.__call__, torch.nn.Conv2d.forward, torch.conv2d),
}))
"""


def test_import_has_no_side_effects():
    values = json.loads(
        subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout
    )
    assert not values["cuda"] and values["same"]
    heavy = {m.split(".")[0] for m in values["new"]} & {"triton", "torchvision", "timm", "matplotlib", "numpy"}
    assert not heavy, heavy
    assert "torch._dynamo" not in values["new"] and "torch._inductor" not in values["new"]
