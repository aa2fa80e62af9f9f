/* Winograd's F(2x2, 3x3): 16 products for a tile of 2x2 outputs instead of 36, at stride 1.
 *
 *     Y = A^T [ sum over channels of (G g G^T) * (B^T d B) ] A
 *
 * for a 4x4 tile d of x and 3x3 taps g (Lavin and Gray, arXiv:1509.09308, section 4.1). G g G^T is packed beforehand. All
 * coefficients of B and A are 0, 1 and -1, so the error stays below that of a direct sum.
 *
 * Differences of values turn inf into NaN, and may overflow where the convolution itself does not. A tile with an output that
 * is not finite is therefore computed once more, as a direct sum.
 */

/* Panels that are computed in turn: the 16 products of their tiles stay in the L2 cache until they are transformed back. */
enum { CHUNK = 4 };

/* Floats between rows and planes whose distance would be a multiple of 4 KB: they would share sets of the L1 cache. */
enum { APART = 16 };

/* Elements of transformed weights that no L2 cache holds. */
enum { LARGE = 1 << 19 };

static int64_t tile_depth(const Convolution *c) { return blocks(c->c_in, WIDTH) * WIDTH + APART; }

typedef struct {
    int64_t image, top, left; /* of its 2x2 outputs */
} Tile;

static Tile tile_at(const Convolution *c, int64_t tile)
{
    int64_t across = blocks(c->out_w, 2), down = blocks(c->out_h, 2);
    return (Tile){tile / (across * down), tile / across % down * 2, tile % across * 2};
}

/* The tile after another one, without a division. */
INLINE Tile next_tile(const Convolution *c, Tile tile)
{
    tile.left += 2;
    if (tile.left >= c->out_w)
        tile.left = 0, tile.top += 2;
    if (tile.top >= c->out_h)
        tile.top = 0, tile.image++;
    return tile;
}

/* Points to the 16 pixels of x below a tile; NULL in the padding. Returns whether there are any in the padding. */
static int point_to_tile(const Convolution *c, Tile tile, const float **pixels)
{
    const float *x = c->x + tile.image * c->in_h * c->in_w * c->c_in;
    int padded = 0;
    for (int i = 0; i < 16; i++) {
        int64_t h = tile.top - c->pad_top + i / 4, w = tile.left - c->pad_left + i % 4;
        int inside = h >= 0 && h < c->in_h && w >= 0 && w < c->in_w;
        pixels[i] = inside ? x + (h * c->in_w + w) * c->c_in : NULL;
        padded |= !inside;
    }
    return padded;
}

#define REPEAT_16(F) REPEAT_12(F) F(12) F(13) F(14) F(15)

/* B^T d B of WIDTH channels, into 16 planes `plane` floats apart. */
INLINE void transform_in(const Vector *d, float *v, int64_t plane)
{
    Vector e[16];
#define COLUMN(j) \
    e[j] = d[j] - d[8 + j], e[4 + j] = d[4 + j] + d[8 + j], e[8 + j] = d[8 + j] - d[4 + j], e[12 + j] = d[4 + j] - d[12 + j];
    REPEAT_4(COLUMN)
#define ROW(i) \
    store(v + (4 * i) * plane, e[4 * i] - e[4 * i + 2]), store(v + (4 * i + 1) * plane, e[4 * i + 1] + e[4 * i + 2]), \
        store(v + (4 * i + 2) * plane, e[4 * i + 2] - e[4 * i + 1]), \
        store(v + (4 * i + 3) * plane, e[4 * i + 1] - e[4 * i + 3]);
    REPEAT_4(ROW)
#undef COLUMN
#undef ROW
}

/* Transforms a tile of x: v has 16 planes, and takes c_in floats, rounded up to whole vectors, in each. */
static void transform_tile(const Convolution *c, Tile tile, float *v, int64_t plane)
{
    const float *pixels[16];
    int padded = point_to_tile(c, tile, pixels);
    int64_t k = 0, c_in = c->c_in;
    Vector d[16];
    if (!padded && !c->pre_scale) {
        for (; k + WIDTH <= c_in; k += WIDTH) {
#define LOAD(i) d[i] = load(pixels[i] + k);
            REPEAT_16(LOAD)
            transform_in(d, v + k, plane);
        }
    } else {
        for (; k + WIDTH <= c_in; k += WIDTH) {
#define LOAD_INSIDE(i) \
    d[i] = pixels[i] ? load(pixels[i] + k) : (Vector){0}; \
    if (c->pre_scale && pixels[i]) \
        d[i] = activate(c, k, d[i]);
            REPEAT_16(LOAD_INSIDE)
            transform_in(d, v + k, plane);
        }
    }
    if (k == c_in)
        return;
    float rest[16][WIDTH];
    memset(rest, 0, sizeof rest);
    for (int i = 0; i < 16; i++) {
        for (int64_t r = k; pixels[i] && r < c_in; r++)
            rest[i][r - k] = c->pre_scale ? activate_one(c, r, pixels[i][r]) : pixels[i][r];
        d[i] = load(rest[i]);
    }
    transform_in(d, v + k, plane);
#undef LOAD
#undef LOAD_INSIDE
}

/* The number of a tile's pixel in row i and column j. */
INLINE int64_t pixel_of(const Convolution *c, Tile tile, int64_t i, int64_t j)
{
    return (tile.image * c->out_h + tile.top + i) * c->out_w + tile.left + j;
}

/* A^T m A of one panel of a tile: m has 16 planes. Returns false, and writes nothing, if a sum is not finite. */
static int transform_out(const Convolution *c, const Output *out, const float *m, int64_t plane, Tile tile, int64_t panel)
{
    Vector y[4][2], strange = {0};
    for (int half = 0; half < 2; half++) {
        Vector q[8], p[16];
#define LOAD(i) p[i] = load(m + i * plane + half * WIDTH);
        REPEAT_16(LOAD)
#define COLUMN(j) q[j] = p[j] + (p[4 + j] + p[8 + j]), q[4 + j] = (p[4 + j] - p[8 + j]) - p[12 + j];
        REPEAT_4(COLUMN)
#define ROW(i) \
    y[2 * i][half] = q[4 * i] + (q[4 * i + 1] + q[4 * i + 2]), \
    y[2 * i + 1][half] = (q[4 * i + 1] - q[4 * i + 2]) - q[4 * i + 3];
        REPEAT_2(ROW)
        /* Zero times inf or NaN is NaN. */
        strange += (y[0][half] * 0 + y[1][half] * 0) + (y[2][half] * 0 + y[3][half] * 0);
#undef LOAD
#undef COLUMN
#undef ROW
    }
    Bits unequal = strange != strange;
    int32_t any = 0;
    for (int i = 0; i < WIDTH; i++)
        any |= unequal[i];
    if (any)
        return 0;
    for (int64_t i = 0; i < least(2, c->out_h - tile.top); i++)
        for (int64_t j = 0; j < least(2, c->out_w - tile.left); j++) {
            const Vector *sums = y[2 * i + j];
            int64_t pixel = pixel_of(c, tile, i, j);
            if ((panel + 1) * PANEL > c->c_out) {
                float rest[PANEL];
                store(rest, sums[0]), store(rest + WIDTH, sums[1]);
                finish_channels(out, pixel, 1, panel * PANEL, rest, 0);
                activate_rows(out, pixel, 1, panel * PANEL, c->c_out);
                continue;
            }
            for (int half = 0; half < 2; half++)
                finish_vector(out, pixel, panel * PANEL + half * WIDTH, sums[half]);
            activate_rows(out, pixel, 1, panel * PANEL, (panel + 1) * PANEL);
        }
    return 1;
}

/* The taps of one panel from their transform: (9, c_in, PANEL). Packing has checked that signs and zeros survive this. */
static void taps_of(const Convolution *c, int64_t panel, float *taps)
{
    int64_t size = c->c_in * PANEL, plane = panels_of(c, PANEL) * size;
    const float *u = c->weight + panel * size;
    for (int64_t k = 0; k < size; k++) {
        float g[3][4];
        for (int j = 0; j < 4; j++) {
            const float *column = u + j * plane + k;
            g[0][j] = column[0], g[1][j] = column[4 * plane] - column[8 * plane], g[2][j] = column[12 * plane];
        }
        for (int i = 0; i < 3; i++) {
            taps[3 * i * size + k] = g[i][0];
            taps[(3 * i + 1) * size + k] = g[i][1] - g[i][2];
            taps[(3 * i + 2) * size + k] = g[i][3];
        }
    }
}

/* Computes one panel of a tile as a direct sum. patch: for 16 pixels of x. */
static void tile_directly(const Convolution *c, Tile tile, int64_t panel, const float *taps, float *patch, float *total)
{
    const float *pixels[16], *rows[9];
    point_to_tile(c, tile, pixels);
    for (int i = 0; i < 16; i++)
        for (int64_t k = 0; k < c->c_in; k++) {
            float v = pixels[i] ? pixels[i][k] : 0;
            patch[i * c->c_in + k] = c->pre_scale && pixels[i] ? activate_one(c, k, v) : v;
        }
    for (int64_t i = 0; i < least(2, c->out_h - tile.top); i++)
        for (int64_t j = 0; j < least(2, c->out_w - tile.left); j++) {
            for (int tap = 0; tap < 9; tap++)
                rows[tap] = patch + ((i + tap / 3) * 4 + j + tap % 3) * c->c_in;
            Output out = output_of(c, pixel_of(c, tile, i, j));
            /* The taps are those of this panel alone. */
            multiply(micro_kernels, rows, 1, 9, c->c_in, 1, taps - panel * 9 * c->c_in * PANEL, panel, panel + 1, total,
                     PANEL, &out, 0, taps, NULL);
        }
}

/* Brings a panel of a tile's residual closer, which is scattered over memory in pieces of two cache lines. */
static void fetch_residual(const Convolution *c, Tile tile, int64_t panel)
{
    for (int64_t i = 0; i < least(2, c->out_h - tile.top); i++)
        for (int64_t j = 0; j < least(2, c->out_w - tile.left); j++) {
            const float *residual = c->residual + pixel_of(c, tile, i, j) * c->c_out + panel * PANEL;
            for (int line = 0; line < PANEL; line += LINE / 4)
                fetch_added(residual + line);
        }
}

static void winograd_run(const Convolution *c, int64_t task, float *scratch)
{
    int64_t panels = panels_of(c, PANEL), across = blocks(panels, c->panels);
    int64_t first = task % across * c->panels, last = least(panels, first + c->panels);
    int64_t tiles = c->batch * blocks(c->out_h, 2) * blocks(c->out_w, 2);
    int64_t begin = task / across * c->block, count = least(c->block, tiles - begin);
    int64_t depth = tile_depth(c), plane_in = c->block * depth + APART, plane = c->block * CHUNK * PANEL + APART;
    int large = 16 * panels * c->c_in * PANEL > LARGE;
    const float **rows = (const float **)scratch;
    Output out = output_of(c, 0);
    float *v = scratch + 2 * 16 * c->block, *m = v + 16 * plane_in, *rest = m + 16 * plane;
    Tile first_tile = tile_at(c, begin), tile = first_tile;
    for (int64_t t = 0; t < count; t++, tile = next_tile(c, tile)) {
        transform_tile(c, tile, v + t * depth, plane_in);
        for (int i = 0; i < 16; i++)
            rows[i * c->block + t] = v + i * plane_in + t * depth;
    }
    for (int64_t chunk = first; chunk < last; chunk += CHUNK) {
        int64_t chunk_end = least(last, chunk + CHUNK);
        for (int i = 0; i < 16; i++) {
            const float *w = c->weight + i * panels * c->c_in * PANEL;
            multiply(micro_kernels, rows + i * c->block, 0, 1, c->c_in, count, w, chunk, chunk_end, m + i * plane,
                     CHUNK * PANEL, NULL, large, w + (panels + chunk) * c->c_in * PANEL, NULL);
        }
        for (int64_t panel = chunk; panel < chunk_end; panel++) {
            int has_taps = 0;
            Tile next = first_tile;
            for (int64_t t = 0; t < count; t++) {
                tile = next, next = next_tile(c, tile);
                if (c->residual && t + 1 < count)
                    fetch_residual(c, next, panel);
                if (transform_out(c, &out, m + (t * CHUNK + panel - chunk) * PANEL, plane, tile, panel))
                    continue;
                if (!has_taps)
                    taps_of(c, panel, rest);
                has_taps = 1;
                float *patch = rest + 9 * c->c_in * PANEL;
                tile_directly(c, tile, panel, rest, patch, patch + 16 * c->c_in);
            }
        }
    }
}

static int64_t winograd_tasks(const Convolution *c)
{
    int64_t tiles = c->batch * blocks(c->out_h, 2) * blocks(c->out_w, 2);
    return blocks(tiles, c->block) * blocks(panels_of(c, PANEL), c->panels);
}

static int64_t winograd_scratch(const Convolution *c)
{
    /* Pointers, transformed tiles, their products. */
    int64_t tiles = 16 * (c->block * (2 + tile_depth(c) + CHUNK * PANEL) + 2 * APART);
    return tiles + c->c_in * (9 * PANEL + 16) + PANEL;           /* a tile as a direct sum: taps, pixels, sums */
}
