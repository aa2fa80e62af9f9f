/* Convolutions of groups of one channel: a vector of y is a sum of vectors of x, a tap each, times vectors of weights.
 *
 * x is read where it lies, and taps in the padding are left out. Several pixels of a row are computed at once: neighbors share
 * columns of x, which are read once. All channels of these pixels follow one after the other, as they lie in memory. Where channels
 * don't fill the last vector, it is computed with some that come before, which are not stored.
 */

/* Pixels of a row of y, all channels of a task. */
typedef struct {
    const Convolution *c;
    int64_t first, end;        /* channels */
    int64_t rows;              /* of taps inside the image */
    const float *x;            /* their first row, at the image's first column */
    const float *w;            /* their first row of weights */
    int64_t x_step, w_step;    /* from one row of taps to the next */
    int64_t w_tap;             /* from one tap to the next */
    int64_t left;              /* column of x under the first pixel's first tap; negative in the padding */
    int64_t row, count;        /* pixels: the first one's number, and how many are stored */
} Pixels;

/* Stores `count` pixels' sums of WIDTH channels from `at` on, of which those from `first` on are wanted. Where something is added, they
 * lack all from there on. */
static void store_lanes(const Output *out, int64_t row, int64_t count, int64_t at, int64_t first, float sums[][WIDTH])
{
    for (int64_t r = 0; r < count; r++) {
        int64_t begin = (row + r) * out->step + at, lane = first - at;
        float *y = out->y + begin, *lanes = sums[r];
        /* The channels before belong to another task, which may write over its share of the residual meanwhile. */
        for (int64_t k = lane; k < WIDTH && (out->residual || out->last); k++) {
            float v = quick_one(out, out->residual ? lanes[k] + out->residual[begin + k] : lanes[k], at + k);
            lanes[k] = out->last ? v + out->last[begin + k] : v;
        }
        for (; lane % 4; lane++)
            y[lane] = lanes[lane];
        for (; lane < WIDTH; lane += 4)
            memcpy(y + lane, lanes + lane, 4 * sizeof(float));
    }
}

/* Loops that vanish: vectors in an array of known size become registers. */
#define UNROLLED(i, count) _Pragma("GCC unroll 32") for (int i = 0; i < (count); i++)

/* Computes up to `pixels` pixels. Called with constants: each case of a kernel is a function without loops over columns. */
INLINE void depthwise_pixels(const Pixels *p, const Output *out, const int pixels, const int kernel, const int stride)
{
    const int64_t channels = out->c_out, columns = p->c->in_w;
    float sums[8][WIDTH];
    for (int64_t k = p->first; k < p->end; k += WIDTH) {
        int64_t at = least(k, channels - WIDTH);
        Vector s[8], weights[5];
        UNROLLED(r, pixels)
            s[r] = (Vector){0};
        const float *x = p->x + at, *w = p->w + at;
        for (int64_t i = 0; i < p->rows; i++, x += p->x_step, w += p->w_step) {
            UNROLLED(j, kernel)
                weights[j] = load(w + j * p->w_tap);
            UNROLLED(q, (pixels - 1) * stride + kernel) {
                int64_t column = p->left + q;
                if ((uint64_t)column >= (uint64_t)columns)
                    continue;
                Vector v = load(x + column * channels);
                UNROLLED(r, pixels) {
                    const int j = q - r * stride;
                    if (j >= 0 && j < kernel)
                        s[r] += v * weights[j];
                }
            }
        }
        if (out->scale) {
            Vector scale = load(out->scale + at);
            UNROLLED(r, pixels)
                s[r] *= scale;
        }
        if (out->bias) {
            Vector bias = load(out->bias + at);
            UNROLLED(r, pixels)
                s[r] += bias;
        }
        int adds = out->residual || out->last;
        if (out->quick && !adds)
            UNROLLED(r, pixels)
                s[r] = quick_of(out, s[r], at);
        if (!adds && at == k && p->count == pixels) {
            float *y = out->y + p->row * channels + at;
            UNROLLED(r, pixels)
                store(y + r * channels, s[r]);
        } else {
            UNROLLED(r, pixels)
                store(sums[r], s[r]);
            store_lanes(out, p->row, p->count, at, k, sums);
        }
    }
}

typedef void DepthwisePixels(const Pixels *pixels, const Output *out);

#define DEPTHWISE_PIXELS(PIXELS, K, S) \
    static void depthwise_##PIXELS##_##K##_##S(const Pixels *pixels, const Output *out) \
    { \
        depthwise_pixels(pixels, out, PIXELS, K, S); \
    }
#define DEPTHWISE_SIZES(K, S) DEPTHWISE_PIXELS(4, K, S) DEPTHWISE_PIXELS(7, K, S) DEPTHWISE_PIXELS(8, K, S)
DEPTHWISE_SIZES(3, 1)
DEPTHWISE_SIZES(3, 2)
DEPTHWISE_SIZES(5, 1)
DEPTHWISE_SIZES(5, 2)

#define DEPTHWISE_CASES(K, S) {depthwise_4_##K##_##S, depthwise_7_##K##_##S, depthwise_8_##K##_##S}
/* For kernels of 3 and 5 columns, strides of 1 and 2, and up to 4, 7 and 8 pixels. */
static DepthwisePixels *const depthwise_cases[2][2][3] = {
    {DEPTHWISE_CASES(3, 1), DEPTHWISE_CASES(3, 2)},
    {DEPTHWISE_CASES(5, 1), DEPTHWISE_CASES(5, 2)},
};

/* Any kernel, one pixel. */
static void depthwise_any(const Pixels *p, const Output *out)
{
    const Convolution *c = p->c;
    for (int64_t k = p->first; k < p->end; k += WIDTH) {
        int64_t at = least(k, c->c_out - WIDTH), lanes = least(WIDTH, c->c_out);
        float x_lanes[WIDTH] = {0}, w_lanes[WIDTH] = {0};
        Vector sum = {0};
        for (int64_t i = 0; i < p->rows; i++)
            for (int64_t j = 0; j < c->kernel_w; j++) {
                int64_t column = p->left + j * c->dilation_w;
                if (column < 0 || column >= c->in_w)
                    continue;
                const float *x = p->x + i * p->x_step + column * c->c_out, *w = p->w + i * p->w_step + j * p->w_tap;
                if (at < 0) {
                    memcpy(x_lanes, x, sizeof(float) * lanes);
                    memcpy(w_lanes, w, sizeof(float) * lanes);
                    sum += load(x_lanes) * load(w_lanes);
                } else {
                    sum += load(x + at) * load(w + at);
                }
            }
        if (k + WIDTH <= c->c_out) {
            finish_vector(out, p->row, k, sum);
        } else {
            store(x_lanes, sum);
            finish_channels(out, p->row, 1, k, x_lanes + (at < 0 ? 0 : k - at), 0);
        }
    }
}

/* One task: `block` output rows of an image, some panels. */
static void depthwise_run(const Convolution *c, int64_t task, float *scratch)
{
    int64_t panels = panels_of(c, PANEL), across = blocks(panels, c->panels), block = task / across;
    int64_t first = task % across * c->panels * PANEL, end = least(c->c_out, first + c->panels * PANEL);
    int64_t per_image = blocks(c->out_h, c->block), image = block / per_image;
    int64_t begin = block % per_image * c->block, last = least(c->out_h, begin + c->block);
    int64_t in_row = c->in_w * c->c_in;
    int is_known = (c->kernel_w == 3 || c->kernel_w == 5) && c->stride_w <= 2 && c->dilation_w == 1 && c->c_out >= WIDTH;
    DepthwisePixels *const *cases = depthwise_cases[c->kernel_w == 5][c->stride_w == 2];
    Output out = output_of(c, image * c->out_h * c->out_w);
    Pixels p = {c, first, end, 0, NULL, NULL, c->dilation_h * in_row, c->kernel_w * panels * PANEL, panels * PANEL, 0, 0, 0};
    (void)scratch;
    for (int64_t h = begin; h < last; h++) {
        int64_t top = h * c->stride_h - c->pad_top, i = top < 0 ? blocks(-top, c->dilation_h) : 0;
        int64_t bottom = top < c->in_h ? least(c->kernel_h, blocks(c->in_h - top, c->dilation_h)) : 0;
        p.rows = bottom - i;
        p.x = c->x + image * c->in_h * in_row + (top + i * c->dilation_h) * in_row;
        p.w = c->weight + i * p.w_step;
        for (int64_t w = 0; w < c->out_w; w += p.count) {
            int64_t rest = c->out_w - w, size = rest % 8 == 0 ? 8 : rest % 7 == 0 ? 7 : rest <= 4 ? 4 : 8;
            p.left = w * c->stride_w - c->pad_left;
            p.row = h * c->out_w + w;
            p.count = is_known ? least(size, rest) : 1;
            (is_known ? cases[size == 8 ? 2 : size == 7] : depthwise_any)(&p, &out);
            activate_rows(&out, p.row, p.count, first, end);
        }
    }
}
