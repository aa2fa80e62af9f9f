"""Device code. Imported only when a Triton backend is asked for: Triton may be absent.

    add_relu, bn_scale_shift                    one pass each
    fold_weights                                a whole network's folded weights, in one launch
    epilogue                                    all that follows a convolution, in one pass over its output
    batch_norm_act, batch_norm_act_backward     training's BN + add + ReLU
    conv_bias_act                               the portable convolution, on any GPU

Hopper alone (compute capability 9; fp16, bf16), each with a _plan that holds its predicate, tiles and views, in plain Python:

    conv_bias_act_tma     the convolution by TMA, with a merged shortcut or K split; _parts: its device functions
    tap_sharing_tma       a 3x3 that loads a filter row's columns once for two columns of pixels; chosen by a table alone
    chain_tma             a bottleneck's 3x3, conv3 + add + ReLU and the next one's conv1
    stem                  7x7/2 convolution + BN + ReLU + max-pool

Each launcher passes enable_fp_fusion=True: a * b + c is rounded once. Triton 3.10 changes the default, and bits with it.
"""
