"""Benchmarks of fused against eager PyTorch: `python -m pytest benchmarks`, with pytest-benchmark's own options.

    cases.py            what is measured, as data
    harness.py          a case made runnable: its contenders, and the gate of parity before each
    conftest.py         --full, and the table of interleaved ratios at the end
    test_benchmarks.py  a benchmark a contender

    run_gpu.sh          one command for a GPU machine: gpu_session.py and its sections, ceilings.py

    python -m pytest benchmarks -k "model and not backward"    some of it
    python -m pytest benchmarks --full                         ResNet-50 at 224x224 and torch.compile, too
    python -m pytest benchmarks --benchmark-max-time=5         longer, steadier; the interleaved rounds as well
    python -m pytest benchmarks --benchmark-json=out.json      all samples and extra_info

A run on a busy machine still has fair ratios at its end, but only there: pytest-benchmark times one contender after the
other, and its tables show the machine's drift, too.
"""
