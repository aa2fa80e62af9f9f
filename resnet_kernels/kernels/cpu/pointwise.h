/* Layers that are no convolutions: scale, shift, residual and activation of each value, and pools of windows of pixels. */

static int64_t no_scratch(const Convolution *c)
{
    (void)c;
    return 0;
}

/* Finishes `count` pixels from pixel `row` on: act(x * scale + bias + residual). */
static void finish_pixels(const Output *out, int64_t row, int64_t count, const float *x)
{
    int64_t channels = out->c_out, whole = channels / WIDTH * WIDTH;
    int only_scales = out->scale && !out->bias && !out->residual && !out->quick && !out->last;
    for (int64_t end = row + count; row < end; row++, x += channels) {
        float *y = out->y + row * channels;
        if (only_scales)
            for (int64_t k = 0; k < whole; k += WIDTH)
                store(y + k, load(x + k) * load(out->scale + k));
        else
            for (int64_t k = 0; k < whole; k += WIDTH)
                finish_vector(out, row, k, load(x + k));
        finish_channels(out, row, 1, whole, x + whole, 0);
        activate_rows(out, row, 1, 0, channels);
    }
}

static int64_t elementwise_tasks(const Convolution *c) { return blocks(c->batch * c->out_h * c->out_w, c->block); }

/* One task: `block` pixels. */
static void elementwise_run(const Convolution *c, int64_t task, float *scratch)
{
    int64_t begin = task * c->block, end = least(begin + c->block, c->batch * c->out_h * c->out_w);
    Output out = output_of(c, 0);
    (void)scratch;
    finish_pixels(&out, begin, end - begin, c->x + begin * c->c_out);
}

static int64_t gate_tasks(const Convolution *c) { return c->batch * blocks(c->out_h * c->out_w, c->block); }

static int64_t gate_scratch(const Convolution *c) { return c->c_out; }

/* One task: `block` pixels of an image, whose gates are their scale. */
static void gate_run(const Convolution *c, int64_t task, float *gates)
{
    int64_t area = c->out_h * c->out_w, per_image = blocks(area, c->block), image = task / per_image, channels = c->c_out;
    int64_t begin = task % per_image * c->block, end = least(area, begin + c->block);
    Output out = output_of(c, image * area);
    memcpy(gates, c->gates + image * channels, sizeof(float) * channels);
    activate_floats((int)c->gate, NULL, gates, channels);
    out.scale = gates;
    finish_pixels(&out, begin, end - begin, c->x + (image * area + begin) * channels);
}

/* Panels of channels of a task of a pool; all of them if nothing is said. */
static int64_t pool_panels(const Convolution *c) { return c->panels ? c->panels : panels_of(c, PANEL); }

static int64_t pool_tasks(const Convolution *c)
{
    return c->batch * blocks(c->pool_h, c->block) * blocks(panels_of(c, PANEL), pool_panels(c));
}

static float larger_one(float a, float b) { return b > a || b != b ? b : a; }

/* The pixels of x below a pooled pixel: rows h0 to h1, columns w0 to w1. What lies in the padding is left out. */
typedef struct {
    int64_t h0, h1, w0, w1;
} Window;

static Window window_of(const Convolution *c, int64_t h, int64_t w)
{
    int64_t top = h * c->pool_stride - c->pool_top, left = w * c->pool_stride - c->pool_left;
    return (Window){most(0, top), least(c->in_h, top + c->pool_kernel), most(0, left), least(c->in_w, left + c->pool_kernel)};
}

/* One task: `block` pooled rows of an image, some panels. `average` is known at compile time. An average adds up rows, and then their sums:
 * one chain over all pixels would err more than torch.mean does. */
INLINE void pool_run(const Convolution *c, int64_t task, int average)
{
    int64_t across = blocks(panels_of(c, PANEL), pool_panels(c)), first_k = task % across * pool_panels(c) * PANEL;
    int64_t per_image = blocks(c->pool_h, c->block), block = task / across, image = block / per_image, channels = c->c_in;
    int64_t begin = block % per_image * c->block, end = least(c->pool_h, begin + c->block);
    int64_t end_k = least(channels, first_k + pool_panels(c) * PANEL);
    const float *x = c->x + image * c->in_h * c->in_w * channels;
    for (int64_t h = begin; h < end; h++)
        for (int64_t w = 0; w < c->pool_w; w++) {
            Window at = window_of(c, h, w);
            float count = (float)((at.h1 - at.h0) * (at.w1 - at.w0));
            float *y = c->y + ((image * c->pool_h + h) * c->pool_w + w) * channels;
            const float *first = x + (at.h0 * c->in_w + at.w0) * channels;
            int64_t k = first_k;
            /* Four vectors of a pixel are two or four lines: one at a time, each would be fetched on its own. */
            for (; average && k + 4 * WIDTH <= end_k; k += 4 * WIDTH) {
                Vector sums[4] = {{0}, {0}, {0}, {0}};
                for (int64_t i = at.h0; i < at.h1; i++) {
                    Vector rows[4] = {{0}, {0}, {0}, {0}};
                    for (int64_t j = at.w0; j < at.w1; j++)
                        UNROLLED(q, 4)
                            rows[q] += load(x + (i * c->in_w + j) * channels + k + q * WIDTH);
                    UNROLLED(q, 4)
                        sums[q] += rows[q];
                }
                UNROLLED(q, 4)
                    store(y + k + q * WIDTH, sums[q] / count);
            }
            for (; k + WIDTH <= end_k; k += WIDTH) {
                Vector v = average ? (Vector){0} : load(first + k);
                for (int64_t i = at.h0; i < at.h1; i++) {
                    Vector row = average ? (Vector){0} : v;
                    for (int64_t j = at.w0; j < at.w1; j++) {
                        Vector pixel = load(x + (i * c->in_w + j) * channels + k);
                        row = average ? row + pixel : larger(row, pixel);
                    }
                    v = average ? v + row : row;
                }
                store(y + k, average ? v / count : v);
            }
            for (; k < end_k; k++) {
                float v = average ? 0 : first[k];
                for (int64_t i = at.h0; i < at.h1; i++) {
                    float row = average ? 0 : v;
                    for (int64_t j = at.w0; j < at.w1; j++) {
                        float pixel = x[(i * c->in_w + j) * channels + k];
                        row = average ? row + pixel : larger_one(row, pixel);
                    }
                    v = average ? v + row : row;
                }
                y[k] = average ? v / count : v;
            }
        }
}

static void max_pool_run(const Convolution *c, int64_t task, float *scratch)
{
    (void)scratch;
    pool_run(c, task, 0);
}

static void average_pool_run(const Convolution *c, int64_t task, float *scratch)
{
    (void)scratch;
    pool_run(c, task, 1);
}
