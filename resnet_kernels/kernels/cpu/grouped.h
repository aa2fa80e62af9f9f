/* Convolutions of groups of several channels.
 *
 * A task copies the rows of x that it needs (direct.h), panel by panel: the output channels of a panel read the same channels of
 * x, so a copy stays in the L1 cache. What follows depends on a group's output channels:
 *
 *     a multiple of PANEL    the micro-kernel, on a group's panels
 *     WIDTH                  the micro-kernel, with a group in each vector of a panel
 *     2, 4 or 8, if fewer     narrow_groups.h, with several groups in a vector
 *
 * The last two have as many input channels.
 */

#if WIDTH == 4
#define LANES(F) F(0), F(1), F(2), F(3)
#elif WIDTH == 8
#define LANES(F) F(0), F(1), F(2), F(3), F(4), F(5), F(6), F(7)
#else
#define LANES(F) F(0), F(1), F(2), F(3), F(4), F(5), F(6), F(7), F(8), F(9), F(10), F(11), F(12), F(13), F(14), F(15)
#endif
#define LANE_1(i) (i) ^ 1
#define LANE_2(i) (i) ^ 2
#define LANE_4(i) (i) ^ 4

/* A vector whose lane i is lane i ^ distance of another one. */
#if defined(__clang__)
#define EXCHANGED(distance, v) __builtin_shufflevector(v, v, LANES(LANE_##distance))
#else
#define EXCHANGED(distance, v) __builtin_shuffle(v, (Bits){LANES(LANE_##distance)})
#endif

/* Keeps GCC from reading a vector from memory for each of its products: 96 GFLOP/s instead of 80 for groups of 8 channels (AMD
 * EPYC, Zen 4, AVX-512). */
#if defined(__AVX512F__) && WIDTH == 16
#define IN_REGISTER(vector) __asm__("" : "+v"(vector));
#else
#define IN_REGISTER(vector)
#endif

#define PIXELS_3(F, r) F(0, r) F(1, r) F(2, r)
#define PIXELS_4(F, r) PIXELS_3(F, r) F(3, r)
#define PIXELS_6(F, r) PIXELS_4(F, r) F(4, r) F(5, r)
#define PIXELS_8(F, r) PIXELS_6(F, r) F(6, r) F(7, r)

#define SUMS_2(F, i) F(i, 0) F(i, 1)
#define SUMS_4(F, i) SUMS_2(F, i) F(i, 2) F(i, 3)
#define SUMS_8(F, i) SUMS_4(F, i) F(i, 4) F(i, 5) F(i, 6) F(i, 7)

/* Sums r of pixel i, moved to their output channels and added up. */
#define PAIR(i, r, q) (s##i##_##r + EXCHANGED(1, s##i##_##q))
#define MOVED_2(i) PAIR(i, 0, 1)
#define MOVED_4(i) (PAIR(i, 0, 1) + EXCHANGED(2, PAIR(i, 2, 3)))
#define MOVED_8(i) (MOVED_4(i) + EXCHANGED(4, (PAIR(i, 4, 5) + EXCHANGED(2, PAIR(i, 6, 7)))))

/* Finishes a row's sums of channels `channel` to channel + WIDTH, of which those below c_out exist. */
INLINE void finish_lanes(const Output *out, int64_t row, int64_t channel, Vector v)
{
    float sums[WIDTH];
    if (channel + WIDTH <= out->c_out) {
        finish_vector(out, row, channel, v);
        return;
    }
    store(sums, v);
    finish_channels(out, row, 1, channel, sums, 0);
}

/* GROUP sums of each of M pixels fill most registers. */
#define GROUP 2
#if ROWS > 6
#define M 8
#else
#define M 4
#endif
#include "narrow_groups.h"
#if WIDTH > 4
#define GROUP 4
#if ROWS > 6
#define M 6
#else
#define M 3
#endif
#include "narrow_groups.h"
#endif
#if WIDTH > 8
#define GROUP 8
#define M 3
#include "narrow_groups.h"
#endif

/* Most pixels that a kernel for narrow groups reads at once. */
enum { MOST_PIXELS = 8 };

static int64_t group_size(const Convolution *c) { return c->c_in / c->groups; }

/* Whether panels belong to a group each. */
static int is_wide(const Convolution *c) { return c->c_out / c->groups % PANEL == 0; }

static int is_narrow(const Convolution *c) { return !is_wide(c) && group_size(c) < WIDTH; }

/* Panels that read the same channels of x, and how many those are. */
static int64_t panels_together(const Convolution *c) { return is_wide(c) ? c->c_out / c->groups / PANEL : 1; }
static int64_t channels_together(const Convolution *c) { return is_wide(c) ? group_size(c) : PANEL; }

/* Floats of a copy from a pixel's first tap to another one. */
static int64_t offset_of_tap(const Convolution *c, int64_t tap, int64_t step)
{
    return (tap / c->kernel_w * c->dilation_h * copied_width(c) + tap % c->kernel_w * c->dilation_w) * step;
}

/* The copy, sums, pointers to each pixel's taps, offsets of taps. */
static int64_t grouped_scratch(const Convolution *c)
{
    int64_t count = c->block * c->out_w, taps = c->kernel_h * c->kernel_w;
    int64_t pointers = is_narrow(c) ? count + MOST_PIXELS + taps : taps * count;
    int64_t copied = copied_height(c, c->block) * copied_width(c) * channels_together(c);
    return copied + copied % 2 + count * panels_together(c) * PANEL + 2 * pointers;
}

/* Computes `count` pixels of panels `panel` to `last`, which read the same channels. rows: pointers to their taps, the first
 * one alone for narrow groups. offsets: of their taps. */
static void convolve_groups(const Convolution *c, const float *const *rows, int64_t count, const int64_t *offsets,
                            int64_t panel, int64_t last, float *total, const Output *out)
{
    int64_t taps = c->kernel_h * c->kernel_w, size = group_size(c);
    if (!is_narrow(c)) {
        multiply(is_wide(c) ? micro_kernels : two_groups, rows, count, taps, size, count, c->weight, panel, last, total,
                 (last - panel) * PANEL, out, 0, c->weight + last * taps * size * PANEL, NULL);
        return;
    }
    for (int64_t k = 0; k < PANEL && panel * PANEL + k < c->c_out; k += WIDTH) {
        const float *w = c->weight + panel * taps * size * PANEL + k;
        int64_t channel = panel * PANEL + k;
        if (size == 2)
            narrow_groups_2(rows, count, offsets, taps, w, out, channel, k);
#if WIDTH > 4
        else if (size == 4)
            narrow_groups_4(rows, count, offsets, taps, w, out, channel, k);
#endif
#if WIDTH > 8
        else
            narrow_groups_8(rows, count, offsets, taps, w, out, channel, k);
#endif
    }
    activate_rows(out, 0, count, panel * PANEL, last * PANEL);
}

/* One task: `block` output rows of an image, some panels. */
static void grouped_run(const Convolution *c, int64_t task, float *scratch)
{
    int64_t panels = panels_of(c, PANEL), across = blocks(panels, c->panels), together = panels_together(c);
    int64_t first = task % across * c->panels, last = least(panels, first + c->panels), block = task / across;
    int64_t per_image = blocks(c->out_h, c->block), image = block / per_image;
    int64_t begin = block % per_image * c->block, end = least(c->out_h, begin + c->block);
    int64_t count = (end - begin) * c->out_w, step = channels_together(c), width = copied_width(c);
    int64_t taps = c->kernel_h * c->kernel_w, copied = copied_height(c, c->block) * width * step;
    float *total = scratch + copied + copied % 2;
    const float **rows = (const float **)(total + c->block * c->out_w * together * PANEL);
    int64_t *offsets = (int64_t *)(rows + count + MOST_PIXELS); /* of narrow groups alone, which have one pointer a pixel */
    for (int64_t tap = 0; tap < (is_narrow(c) ? 1 : taps); tap++) {
        const float **to = rows + tap * count, *row = scratch + offset_of_tap(c, tap, step);
        for (int64_t h = 0; h < end - begin; h++, row += c->stride_h * width * step)
            for (int64_t w = 0; w < c->out_w; w++)
                *to++ = row + w * c->stride_w * step;
    }
    if (is_narrow(c)) {
        for (int64_t i = 0; i < MOST_PIXELS; i++)
            rows[count + i] = rows[0];
        for (int64_t tap = 0; tap < taps; tap++)
            offsets[tap] = offset_of_tap(c, tap, step);
    }
    Output out = output_of(c, (image * c->out_h + begin) * c->out_w);
    for (int64_t panel = first; panel < last; panel += together) {
        int64_t channel = panel / together * step;
        copy_rows(c, image, begin, end, channel, least(step, c->c_in - channel), step, scratch);
        convolve_groups(c, rows, count, offsets, panel, panel + together, total, &out);
    }
}
