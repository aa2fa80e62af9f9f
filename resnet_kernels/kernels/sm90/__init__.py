"""Kernels for Hopper (compute capability 9.0; fp16, bf16): tiles travel by TMA, products run on wgmma.

    conv            the convolution, with a merged shortcut or K split; conv_device, conv_tiles: its device functions and tiles
    tap_sharing     a 3x3 that loads a filter row's columns once for two columns of pixels; only a table chooses it
    chain           a bottleneck's 3x3, its 1x1 + add + ReLU, and the next block's first 1x1
    stem            7x7/2 convolution + BN + ReLU + max-pool
    specialized_*   the convolution, the chain and the stem with specialized warps, in Gluon; only a table chooses them
    descriptors     views of tensors as TMA sees them

A _layout file is plain Python: a predicate that says which shapes the kernel takes, tiles, and the views of the tensors.
"""
