/* Vectors of WIDTH floats in the compiler's own notation, the epilogue, and products of rows with panels.
 *
 * GCC and Clang lower a vector of any width to what the instruction set has, so each WIDTH runs on each machine.
 */
#include <string.h>

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define PANEL (2 * WIDTH)

typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef float AnyVector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias)); /* in memory, at any address */
typedef int32_t Bits __attribute__((vector_size(4 * WIDTH)));

#define INLINE static inline __attribute__((always_inline))

INLINE Vector load(const float *p) { return *(const AnyVector *)p; }
INLINE void store(float *p, Vector v) { *(AnyVector *)p = v; }

/* NaN is no less than zero, so it stays, as in torch.relu. */
INLINE Vector relu(Vector v) { return (Vector)((Bits)v & ~(v <= (Vector){0})); }
INLINE float relu_one(float v) { return v <= 0 ? 0 : v; }

/* Where results go: `y` and `residual` at row 0 and channel 0, one row `step` floats behind the other; channels exist up to
 * `c_out`, while panels are always full. */
typedef struct {
    float *y;
    const float *residual, *scale, *bias;
    int64_t step, c_out;
    int quick; /* an activation that takes few instructions: kernels have it inside */
    int later; /* another one, for activate_rows: once the rows are stored */
    float slope;
    const float *slopes;
    const float *last, *later_last; /* as residual, added behind `quick` and behind `later` */
} Output;

#include "activations.h"

/* Finishes rows of sums of the last channels, from `first` on. */
static void finish_channels(const Output *out, int64_t row, int64_t count, int64_t first, const float *sums, int64_t step)
{
    for (int64_t r = 0; r < count; r++, row++, sums += step)
        for (int64_t k = first; k < out->c_out; k++) {
            int64_t at = row * out->step + k;
            float sum = sums[k - first];
            if (out->scale)
                sum *= out->scale[k];
            if (out->bias)
                sum += out->bias[k];
            if (out->residual)
                sum += out->residual[at];
            sum = quick_one(out, sum, k);
            out->y[at] = out->last ? sum + out->last[at] : sum;
        }
}

#define REPEAT_1(F) F(0)
#define REPEAT_2(F) REPEAT_1(F) F(1)
#define REPEAT_3(F) REPEAT_2(F) F(2)
#define REPEAT_4(F) REPEAT_3(F) F(3)
#define REPEAT_5(F) REPEAT_4(F) F(4)
#define REPEAT_6(F) REPEAT_5(F) F(5)
#define REPEAT_7(F) REPEAT_6(F) F(6)
#define REPEAT_8(F) REPEAT_7(F) F(7)
#define REPEAT_9(F) REPEAT_8(F) F(8)
#define REPEAT_10(F) REPEAT_9(F) F(9)
#define REPEAT_11(F) REPEAT_10(F) F(10)
#define REPEAT_12(F) REPEAT_11(F) F(11)

enum { LINE = 64 }; /* bytes of a cache line */

/* Brings a line of what is added to results into the L1 cache. */
INLINE void fetch_added(const float *p) { __builtin_prefetch(p, 0, 3); }

/* Brings a line of weights closer. The L1 cache has room for two blocks of a panel of AVX2's; a block of AVX-512's fills it, so the
 * next one waits in the L2 cache: networks take 2 to 4% less time at batch 1 (AMD EPYC, Zen 4). */
INLINE void fetch(const float *p)
{
#if WIDTH > 8
    __builtin_prefetch(p, 0, 2);
#else
    __builtin_prefetch(p, 0, 3);
#endif
}

typedef void MicroKernel(const float *const *rows, int64_t rows_step, int64_t taps, int64_t first_k, int64_t depth,
                         const float *w, float *total, int64_t total_step, int adds, const Output *out, int64_t row,
                         int64_t panel, const float *next, int64_t next_step);

#define NAME micro_kernel_
#define SECOND 0
#define TABLE micro_kernels
#include "micro_kernels.h"

/* For groups of WIDTH channels: a panel is two groups. */
#define NAME two_groups_
#define SECOND WIDTH
#define TABLE two_groups
#include "micro_kernels.h"

/* Whether all rows of some taps lie in the padding, as 8 of 9 taps of a 1x1 image do. */
static int are_zeros(const float *const *rows, int64_t rows_step, int64_t taps, int64_t count, const float *zeros)
{
    for (int64_t tap = 0; tap < taps; tap++)
        for (int64_t r = 0; r < count; r++)
            if (rows[tap * rows_step + r] != zeros)
                return 0;
    return 1;
}

/* Rows times panels: `count` rows of `taps` x `depth` values, found by rows[tap * rows_step + row].
 *
 * kernels: micro_kernels or two_groups. w: panels `first` to `last` of (panel, taps, depth, PANEL), from panel 0 on.
 * total: (count, last - first, PANEL), for unfinished sums; the result itself if `out` is NULL. total_step: from row to row.
 * large: whether the weights exceed the caches. after: weights that are read next. zeros: the row of taps in the padding, or
 * NULL.
 */
static void multiply(MicroKernel *const *kernels, const float *const *rows, int64_t rows_step, int64_t taps, int64_t depth,
                     int64_t count, const float *w, int64_t first, int64_t last, float *total, int64_t total_step,
                     const Output *out, int large, const float *after, const float *zeros)
{
    int64_t pieces = blocks(depth, SUM_BLOCK), piece = blocks(depth, pieces); /* of a tap */
    int64_t together = most(1, SUM_BLOCK / depth);                            /* taps */
    int64_t groups = blocks(count, ROWS);
    int64_t end = taps, summed = 0;
    while (zeros && end > together && are_zeros(rows + (end - together) * rows_step, rows_step, together, count, zeros))
        end -= together;
    for (int64_t tap = 0; tap < end; tap += together) {
        int64_t taps_now = least(together, end - tap);
        if (zeros && tap + taps_now < end && are_zeros(rows + tap * rows_step, rows_step, taps_now, count, zeros))
            continue;
        for (int64_t k = 0; k < depth; k += piece) {
            int64_t depth_now = least(piece, depth - k);
            int ends = tap + taps_now == end && k + depth_now == depth;
            for (int64_t panel = first; panel < last; panel++) {
                const float *w_now = w + ((panel * taps + tap) * depth + k) * PANEL;
                /* Panels of a large weight come from memory: a prefetch saves a quarter of the time at 512 channels. Where
                 * weights are few, the rows come from there on their first use: 5 to 15% of a 1x1 layer at batch 8. */
                int fetches_rows = !large && panel == first;
                const float *next = panel + 1 < last ? w_now + taps * depth * PANEL
                                    : ends           ? after
                                                     : w + ((first * taps + tap) * depth + k + depth_now) * PANEL;
                int64_t share = PANEL * taps_now * depth_now / groups;
                /* Groups of nearly equal size: a rest of one row would take as long as four. */
                for (int64_t group = 0, row = 0; group < groups; group++) {
                    int64_t size = (count - row) / (groups - group);
                    const float *soon = next + group * share;
                    if (fetches_rows && group + 1 < groups)
                        soon = rows[tap * rows_step + row + size] + k;
                    int64_t soon_step = fetches_rows ? LINE : 4 * PANEL / groups;
                    kernels[size - 1](rows + tap * rows_step + row, rows_step, taps_now, k, depth_now, w_now,
                                      total + row * total_step + (panel - first) * PANEL, total_step, summed > 0,
                                      ends ? out : NULL, row, panel, soon, soon_step);
                    row += size;
                }
            }
            summed++;
        }
    }
    if (out)
        activate_rows(out, 0, count, first * PANEL, last * PANEL);
}
