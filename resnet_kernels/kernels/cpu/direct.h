/* Any convolution as rows times panels: a row is an output pixel, whose taps are found by pointer.
 *
 * Nothing of x is copied, except where it has to be padded, activated or turned into NHWC first (`copies`): then a task copies
 * the rows of x that it needs. Kernel rows are contiguous in a copy, so the three channels of a stem's taps become one run.
 */

/* Points to the taps of output pixels `begin` to `end`, counted through the batch. */
static void point_to_pixels(const Convolution *c, int64_t begin, int64_t end, const float *zeros, const float **rows)
{
    int64_t count = end - begin, out_w = c->out_w, area = c->out_h * out_w;
    for (int64_t r = 0; r < count; r++) {
        int64_t image = (begin + r) / area, pixel = (begin + r) % area;
        int64_t top = pixel / out_w * c->stride_h - c->pad_top, left = pixel % out_w * c->stride_w - c->pad_left;
        const float *x = c->x + image * c->in_h * c->in_w * c->c_in;
        for (int64_t i = 0; i < c->kernel_h; i++) {
            int64_t h = top + i * c->dilation_h;
            for (int64_t j = 0; j < c->kernel_w; j++) {
                int64_t w = left + j * c->dilation_w;
                int inside = h >= 0 && h < c->in_h && w >= 0 && w < c->in_w;
                rows[(i * c->kernel_w + j) * count + r] = inside ? x + (h * c->in_w + w) * c->c_in : zeros;
            }
        }
    }
}

INLINE Vector activate(const Convolution *c, int64_t channel, Vector v)
{
    v = v * load(c->pre_scale + channel) + load(c->pre_shift + channel);
    return c->pre_relu ? relu(v) : v;
}

static float activate_one(const Convolution *c, int64_t channel, float v)
{
    v = v * c->pre_scale[channel] + c->pre_shift[channel];
    return c->pre_relu ? relu_one(v) : v;
}

/* Width of a copied row: what the kernel reaches from the first output pixel to the last. */
static int64_t copied_width(const Convolution *c)
{
    return (c->out_w - 1) * c->stride_w + (c->kernel_w - 1) * c->dilation_w + 1;
}

/* Taps of a copy: a kernel's row is one run of pixels, unless it is dilated. */
static int64_t copied_run(const Convolution *c) { return c->dilation_w == 1 ? c->kernel_w : 1; }

static int64_t copied_height(const Convolution *c, int64_t rows)
{
    return (rows - 1) * c->stride_h + (c->kernel_h - 1) * c->dilation_h + 1;
}

/* Floats of scratch memory for `rows` output rows, which `convolve_copied` lays out: pointers, the copy, unfinished sums. */
static int64_t copied_scratch(const Convolution *c, int64_t rows, int64_t panels)
{
    int64_t count = rows * c->out_w, taps = c->kernel_h * c->kernel_w / copied_run(c);
    return 2 * taps * count + copied_height(c, rows) * copied_width(c) * c->c_in + count * panels * PANEL;
}

/* Copies `channels` channels of pixels of x from channel `first` on; the next pixel of x is x_column floats further, that of the
 * copy `step`. */
static void copy_pixels(const Convolution *c, const float *x, int64_t pixels, int64_t first, int64_t channels, int64_t step,
                        float *to)
{
    int64_t whole = channels / WIDTH * WIDTH;
    if (c->x_channel != 1) {
        for (int64_t k = 0; k < channels; k++)
            for (int64_t j = 0; j < pixels; j++) {
                float v = x[(first + k) * c->x_channel + j * c->x_column];
                to[j * step + k] = c->pre_scale ? activate_one(c, first + k, v) : v;
            }
        return;
    }
    x += first;
    if (!c->pre_scale && channels == step && c->x_column == step) {
        memcpy(to, x, sizeof(float) * pixels * step);
        return;
    }
    for (int64_t j = 0; j < pixels; j++, x += c->x_column, to += step) {
        if (c->pre_scale) {
            for (int64_t k = 0; k < whole; k += WIDTH)
                store(to + k, activate(c, first + k, load(x + k)));
            for (int64_t k = whole; k < channels; k++)
                to[k] = activate_one(c, first + k, x[k]);
        } else {
            for (int64_t k = 0; k < whole; k += WIDTH)
                store(to + k, load(x + k));
            for (int64_t k = whole; k < channels; k++)
                to[k] = x[k];
        }
    }
}

/* Copies `channels` channels, from channel `first` on, of the rows of x below output rows `begin` to `end` of an image: (rows,
 * copied_width, step), with zeros in the padding and behind the channels. */
static void copy_rows(const Convolution *c, int64_t image, int64_t begin, int64_t end, int64_t first, int64_t channels,
                      int64_t step, float *copy)
{
    int64_t width = copied_width(c), height = copied_height(c, end - begin), top = begin * c->stride_h - c->pad_top;
    int64_t left = most(0, least(width, c->pad_left)), right = most(left, least(width, c->in_w + c->pad_left));
    for (int64_t i = 0; i < height; i++, copy += width * step) {
        int inside = top + i >= 0 && top + i < c->in_h;
        if (!inside || channels < step)
            memset(copy, 0, sizeof(float) * width * step);
        if (!inside)
            continue;
        const float *x = c->x + image * c->x_image + (top + i) * c->x_row + (left - c->pad_left) * c->x_column;
        memset(copy, 0, sizeof(float) * left * step);
        copy_pixels(c, x, right - left, first, channels, step, copy + left * step);
        memset(copy + right * step, 0, sizeof(float) * (width - right) * step);
    }
}

/* Computes output rows `begin` to `end` of an image from copied rows of x. */
static void convolve_copied(const Convolution *c, int64_t image, int64_t begin, int64_t end, int64_t first, int64_t last,
                            float *scratch, const Output *out)
{
    int64_t count = (end - begin) * c->out_w, c_in = c->c_in, width = copied_width(c);
    int64_t height = copied_height(c, end - begin), run = copied_run(c), across = c->kernel_w / run;
    int64_t taps = c->kernel_h * across, depth = run * c_in;
    const float **rows = (const float **)scratch;
    float *copy = scratch + 2 * taps * count, *total = copy + height * width * c_in;
    copy_rows(c, image, begin, end, 0, c_in, c_in, copy);
    for (int64_t tap = 0; tap < taps; tap++)
        for (int64_t r = 0; r < count; r++) {
            int64_t h = r / c->out_w * c->stride_h + tap / across * c->dilation_h;
            int64_t w = r % c->out_w * c->stride_w + tap % across * c->dilation_w;
            rows[tap * count + r] = copy + (h * width + w) * c_in;
        }
    multiply(micro_kernels, rows, count, taps, depth, count, c->weight, first, last, total, (last - first) * PANEL, out, 0,
             c->weight, NULL);
}

static Output output_at(const Convolution *c, float *y, const float *residual, int64_t step)
{
    int activation = (int)c->activation, is_quick = activation <= LEAKY_RELU || activation == PRELU;
    const float *last = c->adds_last ? residual : NULL;
    return (Output){
        .y = y,
        .residual = c->adds_last ? NULL : residual,
        .scale = c->scale,
        .bias = c->bias,
        .step = step,
        .c_out = c->c_out,
        .quick = is_quick ? activation : NO_ACTIVATION,
        .later = is_quick ? NO_ACTIVATION : activation,
        .slope = (float)c->slope,
        .slopes = c->slopes,
        .last = is_quick ? last : NULL,
        .later_last = is_quick ? NULL : last,
    };
}

static Output output_of(const Convolution *c, int64_t pixel)
{
    int64_t at = pixel * c->c_out;
    return output_at(c, c->y + at, c->residual ? c->residual + at : NULL, c->c_out);
}

/* The maximum that keeps a NaN, as torch's does. */
INLINE Vector larger(Vector a, Vector b)
{
    Bits keep = ~(b > a) & ~(b != b);
    return (Vector)(((Bits)a & keep) | ((Bits)b & ~keep));
}

/* Most rows of the convolution that a task with a max-pool needs. */
static int64_t pooled_rows(const Convolution *c)
{
    return least(c->out_h, (c->block - 1) * c->pool_stride + c->pool_kernel);
}

/* One task of a convolution with a max-pool behind it: `block` pooled rows of an image, all panels. */
static void pooled(const Convolution *c, int64_t task, float *scratch)
{
    int64_t per_image = blocks(c->pool_h, c->block), image = task / per_image;
    int64_t begin = task % per_image * c->block, end = least(c->pool_h, begin + c->block);
    int64_t panels = panels_of(c, PANEL), step = panels * PANEL;
    int64_t top = most(0, begin * c->pool_stride - c->pool_top);
    int64_t bottom = least(c->out_h, (end - 1) * c->pool_stride - c->pool_top + c->pool_kernel);
    float *rows = scratch;
    Output out = output_at(c, rows, NULL, step);
    convolve_copied(c, image, top, bottom, 0, panels, scratch + pooled_rows(c) * c->out_w * step, &out);
    for (int64_t h = begin; h < end; h++)
        for (int64_t w = 0; w < c->pool_w; w++) {
            int64_t h0 = h * c->pool_stride - c->pool_top, w0 = w * c->pool_stride - c->pool_left;
            int64_t h1 = least(c->out_h, h0 + c->pool_kernel), w1 = least(c->out_w, w0 + c->pool_kernel);
            h0 = most(0, h0), w0 = most(0, w0);
            float *y = c->y + ((image * c->pool_h + h) * c->pool_w + w) * c->c_out;
            for (int64_t k = 0; k < c->c_out; k += WIDTH) {
                Vector v = load(rows + ((h0 - top) * c->out_w + w0) * step + k);
                for (int64_t i = h0; i < h1; i++)
                    for (int64_t j = w0; j < w1; j++)
                        v = larger(v, load(rows + ((i - top) * c->out_w + j) * step + k));
                if (k + WIDTH <= c->c_out) {
                    store(y + k, v);
                } else {
                    float channels[WIDTH];
                    store(channels, v);
                    memcpy(y + k, channels, sizeof(float) * (c->c_out - k));
                }
            }
        }
}

static void direct_run(const Convolution *c, int64_t task, float *scratch)
{
    if (c->pool_h) {
        pooled(c, task, scratch);
        return;
    }
    int64_t panels = panels_of(c, PANEL), across = blocks(panels, c->panels);
    int64_t first = task % across * c->panels, last = least(panels, first + c->panels), block = task / across;
    if (c->copies) {
        int64_t per_image = blocks(c->out_h, c->block), image = block / per_image;
        int64_t begin = block % per_image * c->block, end = least(c->out_h, begin + c->block);
        Output out = output_of(c, (image * c->out_h + begin) * c->out_w);
        convolve_copied(c, image, begin, end, first, last, scratch, &out);
        return;
    }
    int64_t pixels = c->batch * c->out_h * c->out_w, begin = block * c->block, end = least(pixels, begin + c->block);
    int64_t taps = c->kernel_h * c->kernel_w;
    const float **rows = (const float **)scratch;
    float *zeros = scratch + 2 * taps * c->block, *total = zeros + c->c_in;
    memset(zeros, 0, sizeof(float) * c->c_in);
    point_to_pixels(c, begin, end, zeros, rows);
    Output out = output_of(c, begin);
    multiply(micro_kernels, rows, end - begin, taps, c->c_in, end - begin, c->weight, first, last, total,
             (last - first) * PANEL, &out, 0, c->weight, zeros);
}

/* Number of tasks of `block` output rows of an image and some panels. */
static int64_t row_tasks(const Convolution *c)
{
    return c->batch * blocks(c->out_h, c->block) * blocks(panels_of(c, PANEL), c->panels);
}

static int64_t direct_tasks(const Convolution *c)
{
    if (c->pool_h)
        return c->batch * blocks(c->pool_h, c->block);
    if (c->copies)
        return row_tasks(c);
    return blocks(c->batch * c->out_h * c->out_w, c->block) * blocks(panels_of(c, PANEL), c->panels);
}

static int64_t direct_scratch(const Convolution *c)
{
    int64_t panels = panels_of(c, PANEL), rows = pooled_rows(c);
    if (c->pool_h)
        return rows * c->out_w * panels * PANEL + copied_scratch(c, rows, panels);
    if (c->copies)
        return copied_scratch(c, c->block, c->panels);
    return 2 * c->kernel_h * c->kernel_w * c->block + c->c_in + c->block * c->panels * PANEL;
}
