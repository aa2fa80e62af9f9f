"""Device code. Imported only when a Triton backend is asked for: Triton may be absent.

    add_relu, bn_scale_shift                    one pass each
    fold_weights                                a whole network's folded weights, in one launch
    epilogue                                    all that follows a convolution, in one pass over its output
    batch_norm_act, batch_norm_act_backward     training's BN + add + ReLU
    conv_bias_act                               the portable convolution, on any GPU
    launching                                   launches of one plan, over and over
    sm90/                                       kernels for Hopper

Each launcher passes enable_fp_fusion=True: a * b + c is rounded once. Triton 3.10 changes the default, and bits with it.
"""
