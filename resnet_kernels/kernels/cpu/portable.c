/* The kernels for any processor: vectors of 4, which SSE and NEON have. The tests build other sizes of it. */
#include "convolution.h"
#ifndef PORTABLE_WIDTH
#define PORTABLE_WIDTH 4
#define PORTABLE_ROWS 6
#endif
#define WIDTH PORTABLE_WIDTH
#define ROWS PORTABLE_ROWS
#define KERNELS rk_portable
#include "kernels.h"
