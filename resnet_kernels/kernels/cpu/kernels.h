/* The kernels of one instruction set, as the table KERNELS. The includer gives WIDTH, floats of a vector, and ROWS. */
#include "vectors.h"

#include "direct.h"
#include "winograd.h"
#include "grouped.h"
#include "depthwise.h"
#include "pointwise.h"
#include "winograd_taps.h"

/* As many independent chains as the micro-kernel has: each FMA has to wait for the one before it in its chain. They start
 * differently: equal ones would be computed once. */
static void multiply_add(int64_t steps, float *floats)
{
    Vector x = load(floats), y = load(floats + WIDTH);
#define START(i) Vector a##i = x + i, b##i = y - (i + 1);
    JOIN(REPEAT_, ROWS)(START)
    for (int64_t step = 0; step < steps; step++) {
#define STEP(i) a##i = a##i * x + y, b##i = b##i * x + y;
        JOIN(REPEAT_, ROWS)(STEP)
    }
#define SUM(i) y += a##i + b##i;
    JOIN(REPEAT_, ROWS)(SUM)
    store(floats, y);
}

const Kernels KERNELS = {
    PANEL,
    ROWS,
    {
        [DIRECT] = {direct_tasks, direct_scratch, direct_run},
        [WINOGRAD] = {winograd_tasks, winograd_scratch, winograd_run},
        [GROUPED] = {row_tasks, grouped_scratch, grouped_run},
        [DEPTHWISE] = {row_tasks, no_scratch, depthwise_run},
        [ELEMENTWISE] = {elementwise_tasks, no_scratch, elementwise_run},
        [GATE] = {gate_tasks, gate_scratch, gate_run},
        [MAX_POOL] = {pool_tasks, no_scratch, max_pool_run},
        [AVERAGE_POOL] = {pool_tasks, no_scratch, average_pool_run},
    },
    2 * 2 * WIDTH * ROWS,
    multiply_add,
    transform_taps,
};
