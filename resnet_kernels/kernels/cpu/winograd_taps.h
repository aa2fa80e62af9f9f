/* Winograd's transform of 3x3 taps, G g G^T, in fp64: each value is rounded once.
 *
 * In training a weight is packed in each step, so this takes vectors. Packing repairs the few channels that need it one by one.
 */

_Static_assert(PANEL <= MOST_PANEL, "each channel of a panel has a bit");

/* As many floats as there are doubles in a register. */
enum { HALF = WIDTH / 2 };
typedef float Half __attribute__((vector_size(4 * HALF)));
typedef float AnyHalf __attribute__((vector_size(4 * HALF), aligned(4), may_alias));
typedef double Wide __attribute__((vector_size(8 * HALF)));
typedef int32_t HalfBits __attribute__((vector_size(4 * HALF)));

INLINE HalfBits signs_differ(Half a, Half b) { return ((a > 0) ^ (b > 0)) | ((a < 0) ^ (b < 0)); }

/* Of HALF channels. Returns all bits of those that packing has to look at: a value is not finite, or a tap that is computed
 * back, as taps_of does, has another sign. */
INLINE HalfBits transform_half(const float *taps, int64_t step, float *u, int64_t plane)
{
    Half g[9], v[16], strange = {0};
    Wide wide[9], e[12], ends;
#define LOAD(i) g[i] = *(const AnyHalf *)(taps + i * step), wide[i] = __builtin_convertvector(g[i], Wide);
    REPEAT_9(LOAD)
#define COLUMN(j) \
    ends = wide[j] + wide[6 + j]; \
    e[j] = wide[j], e[3 + j] = (ends + wide[3 + j]) * 0.5, e[6 + j] = (ends - wide[3 + j]) * 0.5, e[9 + j] = wide[6 + j];
    REPEAT_3(COLUMN)
#define ROW(i) \
    ends = e[3 * i] + e[3 * i + 2]; \
    v[4 * i] = __builtin_convertvector(e[3 * i], Half); \
    v[4 * i + 1] = __builtin_convertvector((ends + e[3 * i + 1]) * 0.5, Half); \
    v[4 * i + 2] = __builtin_convertvector((ends - e[3 * i + 1]) * 0.5, Half); \
    v[4 * i + 3] = __builtin_convertvector(e[3 * i + 2], Half);
    REPEAT_4(ROW)
#define STORE(i) *(AnyHalf *)(u + i * plane) = v[i], strange += v[i] * 0;
    REPEAT_16(STORE)
#undef LOAD
#undef COLUMN
#undef ROW
#undef STORE
    return signs_differ((v[5] - v[9]) - (v[6] - v[10]), g[4]) | signs_differ(v[1] - v[2], g[1])
           | signs_differ(v[13] - v[14], g[7]) | signs_differ(v[4] - v[8], g[3]) | signs_differ(v[7] - v[11], g[5])
           | (strange != 0);
}

static uint32_t transform_taps(const float *taps, int64_t step, float *u, int64_t plane)
{
    HalfBits bits = {0}, found = {0};
    uint32_t odd = 0;
    for (int i = 0; i < HALF; i++)
        bits[i] = 1 << i;
    for (int first = 0; first < PANEL; first += HALF)
        found |= (transform_half(taps + first, step, u + first, plane) & bits) << first;
    for (int i = 0; i < HALF; i++)
        odd |= (uint32_t)found[i];
    return odd;
}
