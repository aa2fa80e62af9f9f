"""Our own fp32 convolutions on the CPU, in C.

library        the compiled library: where it is, its instruction set, PyTorch's threads
plans          which convolutions they take; tasks
convolution    packed weights, launcher
run.c          what Python calls; threads take tasks from one counter
direct.h, winograd.h, grouped.h    convolutions on one micro-kernel (micro_kernel.h, vectors.h); groups narrower than a vector
               have another one (narrow_groups.h)
depthwise.h    groups of one channel
pointwise.h    layers that are no convolutions: scale and shift, adds, gates, pools
activations.h  what follows a layer: cheap activations, which kernels have inside, and others, which run over stored rows
portable.c, avx2.c, avx512.c    the same kernels for each instruction set
"""
