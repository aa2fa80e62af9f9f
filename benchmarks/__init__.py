"""Benchmarks of fused against eager PyTorch and its peers: `python -m pytest benchmarks`, with pytest-benchmark's own options.

    cases.py            the cases, as data
    subjects.py         the plain module of each subject
    workload.py         a case's tensors, and runners: a contender made ready for them
    contenders/         base.py: the interface;  ours.py: eager and ours;  peers.py, foreign.py: the peers, with their settings
    parity.py           the parity gate before the timing
    harness.py          the measurement of a case: prepares and gates all contenders, then times them in rounds
    extra_info.py       FLOPs, bytes, ceilings, versions, a model's time by kernel
    neighbors.py       the number of cores that other processes keep busy
    test_benchmarks.py  one benchmark per contender;  conftest.py: --full, and the tables at the end
    gpu/                a session on a GPU: jobs.py, checks.py (act 1), run.sh (act 2: session.py and its sections)
    serving/            a server's view: callers, processes, a busy neighbor (tools/serving.py)
    tools/              readme_tables, costs, image_sizes, interference, trim: python -m benchmarks.tools.NAME

    python -m pytest benchmarks -k "model and not backward"    some of the benchmarks
    python -m pytest benchmarks --full                         networks at real sizes by batch, bfloat16 on the CPU, all peers
    python -m pytest benchmarks --benchmark-max-time=5         longer, steadier: seconds for each contender against eager
    python -m pytest benchmarks --benchmark-json=out.json      all samples and extra_info; Ctrl-C keeps the cases that are done

All contenders of a case take turns in the same rounds, and pytest-benchmark is shown those samples, so its tables, comparisons
and histograms are as fair as the ratios at the end. Use a quiet machine all the same: neighbors.py says why, and each result
records how busy others were.

The JSON file has pytest-benchmark's format; resnet_kernels/perf/schema.py has the types of our fields. Its top level adds
`absent`, a list of {contender, reason, cases}. In each benchmark `group` is the case, and `stats.data` holds seconds in the
order of the rounds: sample k of every contender of a group comes from the same round. These are in `extra_info`:

    schema              1
    case                the case's name, as in `group`
    system              "torchvision", "slim", "d2l" or "d2l-keras"
    level               "op", "block", "stage" or "model"
    subject             the subject's name: "resnet50", "bottleneck_256"
    direction           "forward" or "forward-backward"
    dtype               "float32", "bfloat16" or "float16"
    batch, image_size   of the input; image_size is its height and width
    contender, label    the contender's name, and its name in a plot's legend
    ours                whether the contender is resnet_kernels
    settings, version   in a line each: the contender's settings, its package and version
    device              "cpu (AVX512)";  device_type: "cpu" or "cuda"
    driver, cuda, cudnn, torch, triton      versions, or null
    threads, tf32       PyTorch's CPU threads; whether convolutions of float32 may run in TF32
    parity_error, parity_budget             relative norm error against fp64, and its budget: twice eager's + one rounding
    parity_failure      "", or the tensor of a peer that exceeds the budget. A peer's time is reported all the same; ours would
                        have none
    prepare_s, gate_s   seconds for preparing the contender (copying, compiling, capturing) and for comparing it with fp64
    p20, p80            seconds
    gflop               1e9 FLOPs of a call, of convolutions and matmuls
    hbm_gb              1e9 bytes that per-layer fusion has to move, null where nothing counts them (forward-backward, except
                        for ops that only stream)
    img_per_s, gflop_per_s, tflop_per_s, gb_per_s          by the median
    ceilings            {tflop_per_s, gb_per_s, source}: rates that this device reaches, measured in the same session
    roofline_seconds    least seconds of a call by these ceilings; by FLOPs alone where hbm_gb is null
    roofline_share      roofline_seconds / median. Bytes count as if each kernel had to read from memory, so the share may
                        exceed 1 where a CPU's caches hold them
    roofline_bound      "FLOP" or "HBM": the ceiling that bounds most of the call
    saved_mib           MiB kept for the backward pass; null in forward passes and where they can't be seen
    interleaved_ratio_to_eager, interleaved_ratio_to_fused  median of time / the other's of the same round; with _p20, _p80.
                        Missing where there is no other
    input_copies        copies of the inputs that calls rotate through, so that each has left a GPU's L2 cache by its next
                        turn; 1: no rotation
    busy_elsewhere      cores that other processes kept busy during the rounds, or null
    kernels             models run by eager, fused and compile, with --full; missing otherwise. A row for each call of a module
                        or fused step: {path, call, layer, name, kind, backward, seconds, flops, hbm_bytes}; layer is the same
                        for eager and fused, kind "conv", "bn" or "rest"; flops and hbm_bytes null where unknown (compile,
                        backward)
"""
