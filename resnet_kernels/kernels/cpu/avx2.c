/* The kernels for AVX2 with FMA: 6 rows x 16 channels are 12 accumulators, which leaves 4 of 16 registers for operands. */
#include "convolution.h"
#if defined(__x86_64__)
#include <string.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define WIDTH 8
#define ROWS 6
#define KERNELS rk_avx2
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
