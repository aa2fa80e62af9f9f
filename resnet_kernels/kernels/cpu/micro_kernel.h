/* The micro-kernel: M rows times one panel; included once for each M.
 *
 * The includer gives M, the beginning of its NAME, and SECOND: where the second vector of the panel finds its values of a row,
 * from those of the first. It is 0, or a group's channels if each vector is a group of its own.
 *
 * Rows are found by pointer, so that a row may be a pixel of an image, a row of zeros in its padding, or one of Winograd's
 * transformed tiles. Its loops over rows are unrolled by the preprocessor: accumulators in an array that the compiler does
 * not unroll in full are spilled to memory, at a third of the speed.
 */
#define EACH JOIN(REPEAT_, M)

/* total or y (M rows, one panel) = sum over taps and k of rows[tap][i][first_k + k] * w[tap][k]
 *
 * rows: M pointers for a tap, the next tap's `rows_step` pointers further. w: (taps, depth, panel).
 * next, next_step: memory to bring closer, some bytes with each k: the panel that is read next.
 * total: the sum of earlier blocks if `adds`; takes the new sum if `out` is NULL, or if the panel is not full.
 */
static void JOIN(NAME, M)(const float *const *rows, int64_t rows_step, int64_t taps, int64_t first_k, int64_t depth,
                                   const float *w, float *total, int64_t total_step, int adds, const Output *out,
                                   int64_t row, int64_t panel, const float *next, int64_t next_step)
{
    /* What is added is scattered over memory, two cache lines a row: it comes while the sums are made. */
    const float *added = !out ? NULL : out->residual ? out->residual : out->last;
    if (added && (panel + 1) * PANEL <= out->c_out) {
        added += row * out->step + panel * PANEL;
#define FETCH(i) fetch_added(added + i * out->step), fetch_added(added + i * out->step + WIDTH);
        EACH(FETCH)
    }
#define DECLARE(i) Vector a##i = {0}, b##i = {0};
    EACH(DECLARE)
    for (int64_t tap = 0; tap < taps; tap++, rows += rows_step) {
#define POINT(i) const float *row##i = rows[i] + first_k;
        EACH(POINT)
        for (int64_t k = 0; k < depth; k++, w += PANEL) {
            if (!SECOND) { /* groups have few weights for each row: there it costs 5% */
                fetch(next);
                if (next_step > LINE)
                    fetch(next + LINE / 4);
                next = (const float *)((const char *)next + next_step);
            }
            Vector w0 = load(w), w1 = load(w + WIDTH);
#define MULTIPLY(i) a##i += row##i[k] * w0, b##i += row##i[k + SECOND] * w1;
            EACH(MULTIPLY)
        }
    }
#define ADD(i) a##i += load(total + i * total_step), b##i += load(total + i * total_step + WIDTH);
    if (adds) {
        EACH(ADD)
    }
    if (!out || (panel + 1) * PANEL > out->c_out) {
#define STORE(i) store(total + i * total_step, a##i), store(total + i * total_step + WIDTH, b##i);
        EACH(STORE)
        if (out)
            finish_channels(out, row, M, panel * PANEL, total, total_step);
        return;
    }
    int64_t channel = panel * PANEL, at = row * out->step + channel;
    if (out->scale) {
        Vector s0 = load(out->scale + channel), s1 = load(out->scale + channel + WIDTH);
#define SCALE(i) a##i *= s0, b##i *= s1;
        EACH(SCALE)
    }
    if (out->bias) {
        Vector s0 = load(out->bias + channel), s1 = load(out->bias + channel + WIDTH);
#define SHIFT(i) a##i += s0, b##i += s1;
        EACH(SHIFT)
    }
    if (out->residual) {
        const float *residual = out->residual + at;
#define ADD_RESIDUAL(i) a##i += load(residual + i * out->step), b##i += load(residual + i * out->step + WIDTH);
        EACH(ADD_RESIDUAL)
    }
    if (out->quick == RELU) {
#define RECTIFY(i) a##i = relu(a##i), b##i = relu(b##i);
        EACH(RECTIFY)
    } else if (out->quick == RELU6) {
#define CUT(i) a##i = relu6_of(a##i), b##i = relu6_of(b##i);
        EACH(CUT)
    } else if (out->quick) {
        Vector s0 = slopes_at(out, channel), s1 = slopes_at(out, channel + WIDTH);
#define LEAK(i) a##i = leaky_relu_of(a##i, s0), b##i = leaky_relu_of(b##i, s1);
        EACH(LEAK)
    }
    if (out->last) {
        const float *last = out->last + at;
#define ADD_LAST(i) a##i += load(last + i * out->step), b##i += load(last + i * out->step + WIDTH);
        EACH(ADD_LAST)
    }
    float *y = out->y + at;
#define FINISH(i) store(y + i * out->step, a##i), store(y + i * out->step + WIDTH, b##i);
    EACH(FINISH)
}

#undef EACH
#undef FETCH
#undef DECLARE
#undef POINT
#undef MULTIPLY
#undef ADD
#undef STORE
#undef SCALE
#undef SHIFT
#undef ADD_RESIDUAL
#undef RECTIFY
#undef CUT
#undef LEAK
#undef ADD_LAST
#undef FINISH
#undef M
