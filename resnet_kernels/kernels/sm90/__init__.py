"""Kernels for Hopper (compute capability 9.0; fp16, bf16): tiles travel by TMA, products run on wgmma.

    conv            the convolution, with a merged shortcut or K split; conv_device, conv_tiles: its device functions and tiles
    tap_sharing     a 3x3 that loads a filter row's columns once for two columns of pixels; chosen by a table alone
    chain           a bottleneck's 3x3, conv3 + add + ReLU and the next one's conv1
    stem            7x7/2 convolution + BN + ReLU + max-pool

Each has a _layout, in plain Python: the predicate that says which shapes it takes, its tiles, and the views of its tensors.
"""
