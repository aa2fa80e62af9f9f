/* The kernels for AVX-512: 12 rows x 32 channels are 24 accumulators of 32 registers; FMA reads a broadcast from memory. */
#include "convolution.h"
#if defined(__x86_64__)
#include <string.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx2,fma")
#endif
#define WIDTH 16
#define ROWS 12
#define KERNELS rk_avx512
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
