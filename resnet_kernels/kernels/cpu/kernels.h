/* The kernels of one instruction set, as the table KERNELS. The includer gives WIDTH, floats of a vector, and ROWS. */
#include "vectors.h"

#include "direct.h"
#include "winograd.h"

/* As many independent chains as the micro-kernel has: each FMA has to wait for the one before it in its chain. */
static void multiply_add(int64_t steps, float *floats)
{
    Vector x = load(floats), y = load(floats + WIDTH);
#define START(i) Vector a##i = x, b##i = y;
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
    {direct_tasks, direct_scratch, direct_run},
    {winograd_tasks, winograd_scratch, winograd_run},
    2 * 2 * WIDTH * ROWS,
    multiply_add,
};
