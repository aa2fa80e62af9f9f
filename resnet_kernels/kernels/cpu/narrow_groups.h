/* The micro-kernel for groups of fewer channels than a vector has, which is GROUP, given by the includer: M pixels times one
 * vector of output channels, whole groups.
 *
 * A vector of x and one of y cover the same groups, but each channel of y needs all channels of its group. A vector of x is
 * multiplied GROUP times as it is: the lane of channel k has a share of output channel k ^ r in sum r. The sums are moved to
 * their channels at the end, once for all taps.
 */
#define EACH JOIN(PIXELS_, M)
#define EACH_SUM JOIN(SUMS_, GROUP)
#define MOVED JOIN(MOVED_, GROUP)

/* y (count rows, channels `channel` to channel + WIDTH) = sum over taps of pixels[row] + offsets[tap], finished.
 *
 * pixels: a multiple of M pointers to the first tap, those from `count` on to memory that can be read. w: (taps, GROUP, PANEL),
 * of which a vector is read. first_k: the vector's place in a copied pixel.
 */
static void JOIN(narrow_groups_, GROUP)(const float *const *pixels, int64_t count, const int64_t *offsets, int64_t taps,
                                        const float *first_w, const Output *out, int64_t channel, int64_t first_k)
{
    for (int64_t row = 0; row < count; row += M, pixels += M) {
        const float *w = first_w;
#define POINT(i, _) const float *x##i = pixels[i] + first_k;
        EACH(POINT, _)
#define ZERO(i, r) Vector s##i##_##r = {0};
#define DECLARE(_, r) EACH(ZERO, r)
        EACH_SUM(DECLARE, _)
        for (int64_t tap = 0; tap < taps; tap++, w += GROUP * PANEL) {
            int64_t offset = offsets[tap];
#define LOAD(i, _) Vector v##i = load(x##i + offset);
            EACH(LOAD, _)
#define MULTIPLY(i, r) s##i##_##r += v##i * w##r;
#define MULTIPLY_ALL(_, r) Vector w##r = load(w + r * PANEL); IN_REGISTER(w##r) EACH(MULTIPLY, r)
            EACH_SUM(MULTIPLY_ALL, _)
        }
#define FINISH(i, _) \
    if (row + i < count) \
        finish_lanes(out, row + i, channel, MOVED(i));
        EACH(FINISH, _)
    }
}

#undef EACH
#undef EACH_SUM
#undef MOVED
#undef POINT
#undef ZERO
#undef DECLARE
#undef LOAD
#undef MULTIPLY
#undef MULTIPLY_ALL
#undef FINISH
#undef M
#undef GROUP
