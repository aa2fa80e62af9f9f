/* A layer as the kernels see it, and the kernels that each instruction set brings.
 *
 *     y = act(conv(pre(x)) * scale + bias + residual),    pre(x) = relu(x * pre_scale + pre_shift) or x itself
 *
 * Everything is fp32. y and residual are NHWC without gaps; x is too, unless `copies` says that its rows are copied first.
 * A kernel computes one task: a block of pixels (or of Winograd's tiles, or of pooled rows) times a block of panels. A panel
 * is the number of output channels that the micro-kernel computes at once. Tasks are independent of each other, so whoever
 * has a core can take the next one. `scratch` belongs to one thread, and survives from task to task.
 */
#ifndef RK_CONVOLUTION_H
#define RK_CONVOLUTION_H

#include <stdint.h>

/* convolution.py has the same fields in the same order. */
typedef struct {
    int64_t batch, c_in, in_h, in_w, c_out, out_h, out_w;
    int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
    int64_t x_image, x_channel, x_row, x_column; /* strides of x, in elements; read only where rows are copied */
    int64_t block, panels;                       /* sizes of a task: pixels, tiles or rows; panels */
    int64_t copies;                              /* whether a task copies its rows of x: padded, activated, as NHWC */
    int64_t pool_h, pool_w;                      /* output of the max-pool behind the convolution; 0 without one */
    int64_t pool_kernel, pool_stride, pool_top, pool_left;
    int64_t activation, pre_relu;
    int64_t adds_last; /* the residual comes behind the activation: y = act(conv * scale + bias) + residual, apart from y */
    int64_t groups, gate; /* gate: the activation that makes `gates` */
    double slope; /* of LEAKY_RELU */
    const float *x, *weight; /* weight: packed by a function of run.c */
    const float *scale, *bias, *residual;
    const float *pre_scale, *pre_shift; /* (c_in), both or none */
    const float *slopes;                /* (c_out), of PRELU */
    const float *gates;                 /* (batch, c_out), of GATE */
    float *y;                           /* may be residual's memory, unless `adds_last` */
} Convolution;

typedef struct {
    int64_t (*tasks)(const Convolution *);   /* number of tasks */
    int64_t (*scratch)(const Convolution *); /* floats of scratch memory that a thread needs */
    void (*run)(const Convolution *convolution, int64_t task, float *scratch);
} Kernel;

/* convolution.py, KINDS. The last four are no convolutions, and use the fields of one that they have:
 *
 *     ELEMENTWISE     act(x * scale + bias + residual)
 *     GATE            act(x * gate(gates) + residual), with gates of one pixel an image: squeeze-and-excitation
 *     MAX_POOL        a maximum, and a mean, over windows of which none lies in the padding alone
 *     AVERAGE_POOL
 */
enum { DIRECT, WINOGRAD, GROUPED, DEPTHWISE, ELEMENTWISE, GATE, MAX_POOL, AVERAGE_POOL, KINDS };

/* activations.py, KINDS, behind the answer that there is none; two that only gates have; and Leaky ReLU with a slope a channel. */
enum { NO_ACTIVATION, RELU, RELU6, LEAKY_RELU, SILU, GELU, GELU_TANH, HARDSWISH, SIGMOID, HARDSIGMOID, PRELU };

/* The kernels of one instruction set. */
typedef struct {
    int64_t panel; /* output channels of a panel */
    int64_t rows;  /* pixels that the micro-kernel computes at once */
    Kernel kinds[KINDS];
    int64_t flops;                                     /* of a step of multiply_add */
    void (*multiply_add)(int64_t steps, float *floats); /* nothing but FMAs: the most that this processor can do */
    /* G g G^T of a panel of 3x3 taps: 9 rows of floats in, 16 planes out. Returns a bit for each channel with a value that is
     * not finite, or with a tap that has another sign when it is computed back. */
    uint32_t (*transform_taps)(const float *taps, int64_t step, float *u, int64_t plane);
} Kernels;

/* The kernels by their number: 0 portable, 1 AVX2 with FMA, 2 AVX-512; NULL if this processor can't run them. */
const Kernels *rk_kernels(int64_t number);

/* GOMP_parallel of the OpenMP runtime that PyTorch has loaded: a second pool of threads would spin against PyTorch's. */
typedef void Parallel(void (*function)(void *), void *argument, unsigned threads, unsigned flags);

/* Most input channels times taps that are added up in one chain. Longer sums are added block by block: one chain over 2,048
 * errs twice as much as a matrix product's usual blocks do. A block's share of a panel, 16 KB, stays in the L1 cache. */
enum { SUM_BLOCK = 256 };

/* Most output channels of a panel. */
enum { MOST_PANEL = 32 };

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t blocks(int64_t a, int64_t size) { return (a + size - 1) / size; }
static inline int64_t panels_of(const Convolution *c, int64_t panel) { return blocks(c->c_out, panel); }

#endif
