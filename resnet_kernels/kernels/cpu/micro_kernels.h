/* The micro-kernels for 1 to ROWS rows, and their TABLE. The includer gives NAME and SECOND (micro_kernel.h). */
#define M 1
#include "micro_kernel.h"
#define M 2
#include "micro_kernel.h"
#define M 3
#include "micro_kernel.h"
#define M 4
#include "micro_kernel.h"
#define M 5
#include "micro_kernel.h"
#define M 6
#include "micro_kernel.h"
#if ROWS > 6
#define M 7
#include "micro_kernel.h"
#define M 8
#include "micro_kernel.h"
#endif
#if ROWS > 8
#define M 9
#include "micro_kernel.h"
#define M 10
#include "micro_kernel.h"
#define M 11
#include "micro_kernel.h"
#define M 12
#include "micro_kernel.h"
#endif

static MicroKernel *const TABLE[] = {
    JOIN(NAME, 1), JOIN(NAME, 2), JOIN(NAME, 3), JOIN(NAME, 4), JOIN(NAME, 5), JOIN(NAME, 6),
#if ROWS > 6
    JOIN(NAME, 7), JOIN(NAME, 8),
#endif
#if ROWS > 8
    JOIN(NAME, 9), JOIN(NAME, 10), JOIN(NAME, 11), JOIN(NAME, 12),
#endif
};

#undef NAME
#undef SECOND
#undef TABLE
