"""Kernels and their launchers. All but geometry, target and layouts import Triton, which may be absent.

    add_relu, bn_scale_shift                    one pass each
    fold_weights                                the folded weights of a whole network, in one launch
    epilogue                                    all that follows a convolution, in one pass over its output
    batch_norm_act, batch_norm_act_backward     BN + add + ReLU in training; batch_norm_device, batch_norm_tiles: their parts
    conv_bias_act                               the portable convolution, on any GPU
    sm90/                                       kernels for Hopper
    first_launch                                the smallest kernel: shows whether Triton can launch
    elementwise                                 ReLU and maximum that keep a NaN
    launching                                   repeated launches of one plan
    geometry, target, layouts                   a convolution's sizes; what a device can run; operands as kernels read them

Each launcher passes enable_fp_fusion=True: a * b + c is rounded once. Triton 3.10 changes the default, and bits with it.
"""
