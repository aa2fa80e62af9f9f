/* The kernels of one instruction set, as the table KERNELS. The includer gives WIDTH, floats of a vector, and ROWS. */
#include "vectors.h"

#include "direct.h"
#include "winograd.h"

const Kernels KERNELS = {
    PANEL,
    ROWS,
    {direct_tasks, direct_scratch, direct_run},
    {winograd_tasks, winograd_scratch, winograd_run},
};
