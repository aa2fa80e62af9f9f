"""Benchmarks of fused against eager PyTorch and its peers: `python -m pytest benchmarks`, with pytest-benchmark's own options.

    cases.py            what is measured, as data
    subjects.py         a subject as a plain module
    workload.py         a case's data, and what a contender makes of it
    contenders/         base.py: the interface;  ours.py: eager and ours;  peers.py: everybody else, with settings
    parity.py           the gate before the clock
    harness.py          a case measured: all its contenders made ready, gated, timed in turns
    extra_info.py       FLOPs, bytes, ceilings, versions, a model's time by kernel
    neighbours.py       how busy other processes keep the machine
    test_benchmarks.py  a benchmark a contender;  conftest.py: --full, and the tables at the end
    gpu/                a session on a GPU: jobs.py, checks.py (act 1), run.sh (act 2: session.py and its sections)
    tools/              readme_tables, costs, image_sizes, interference, trim: python -m benchmarks.tools.NAME

    python -m pytest benchmarks -k "model and not backward"    some of it
    python -m pytest benchmarks --full                         networks at real sizes by batch, bfloat16 on the CPU, all peers
    python -m pytest benchmarks --benchmark-max-time=5         longer, steadier: seconds for each contender against eager
    python -m pytest benchmarks --benchmark-json=out.json      all samples and extra_info; Ctrl-C keeps the cases that are done

All contenders of a case take turns in the same rounds, and pytest-benchmark is shown those samples, so its tables, comparisons
and histograms are as fair as the ratios at the end. Use a quiet machine all the same (neighbours.py says why); a file has what
others did meanwhile.

The file is pytest-benchmark's; resnet_kernels/perf/schema.py has the types of what is ours in it. At its top that is `absent`,
a list of {contender, reason, cases}. For each benchmark, `group` is the case, `stats.data` are seconds in the order of the
rounds (sample k of each contender of a group is of the same round). These are in `extra_info`:

    schema              1
    case                the group
    system              "torchvision", "slim", "d2l" or "d2l-keras"
    level               "op", "block", "stage" or "model"
    subject             what is measured: "resnet50", "bottleneck_256"
    direction           "forward" or "forward-backward"
    dtype               "float32", "bfloat16" or "float16"
    batch, image_size   of the input; image_size is its height and width
    contender, label    its name, and one for a plot's legend
    ours                whether it is resnet_kernels
    settings, version   in a line each: the contender's settings, its package and version
    device              "cpu (AVX512)";  device_type: "cpu" or "cuda"
    driver, cuda, cudnn, torch, triton      versions, or null
    threads, tf32       PyTorch's CPU threads; whether convolutions of float32 may run in TF32
    parity_error, parity_budget             relative norm error against fp64, and what it may be: twice eager's + one rounding
    parity_failure      "", or of what a peer is over budget: its time is reported all the same (ours has none then)
    prepare_s, gate_s   seconds that making it ready (copying, compiling, capturing) and comparing it with fp64 took
    p20, p80            seconds
    gflop               1e9 FLOPs of a call, of convolutions and matmuls
    hbm_gb              1e9 bytes that per-layer fusion has to move, null where nothing counts them (forward-backward, but for
                        ops that only stream)
    img_per_s, gflop_per_s, tflop_per_s, gb_per_s          by the median
    ceilings            {tflop_per_s, gb_per_s, source}: what this device reaches, measured in the same session
    roofline_seconds    least seconds of a call by these ceilings; by FLOPs alone where hbm_gb is null
    roofline_share      of the median. Bytes count as if each kernel had to read from memory, so it may pass 1 where a CPU's
                        caches hold them
    roofline_bound      "FLOP" or "HBM": what bounds most of it
    saved_mib           MiB kept for the backward pass; null in forward passes and where it can't be seen
    interleaved_ratio_to_eager, interleaved_ratio_to_fused  median of time / the other's of the same round; with _p20, _p80.
                        Missing where there is no other
    input_copies        copies of the inputs that calls went through, so that a GPU's L2 cache had lost each; 1: no rotation
    busy_elsewhere      cores that other processes kept busy during the rounds, or null
    kernels             models run by eager, fused and compile, with --full; missing otherwise. A row for each call of a module
                        or fused step: {path, call, layer, name, kind, backward, seconds, flops, hbm_bytes}; layer is the same
                        for eager and fused, kind "conv", "bn" or "rest"; flops and hbm_bytes null where unknown (compile,
                        backward)
"""
