/* Activations. Those that take few instructions are inside the kernels. The others run in place over rows that were just stored: they
 * are in a cache, and the micro-kernels stay as they are.
 *
 * All keep a NaN, and none makes one from a finite number. At -inf they give what PyTorch gives.
 */

INLINE Vector select_of(Bits mask, Vector a, Vector b) { return (Vector)(((Bits)a & mask) | ((Bits)b & ~mask)); }
INLINE Vector all_of(float value) { return (Vector){0} + value; }
INLINE Vector magnitude(Vector v) { return (Vector)((Bits)v & 0x7fffffff); }
INLINE Vector power_of_two(Bits exponent) { return (Vector)((exponent + 127) << 23); }

/* e^x for x <= 0: 2^n * e^r with |r| <= log(2) / 2. The polynomial's largest relative error is 3.1e-9. Below -104 it is 0. */
INLINE Vector exp_below_zero(Vector x)
{
    const float round = 12582912; /* 1.5 * 2^23: a sum with it has no fraction, and an integer in its last bits */
    x = select_of(x < -104, all_of(-104), x);
    Vector sum = x * 1.44269504f + round, n = sum - round;
    Vector r = x - n * 0.693359375f + n * 2.12194440e-4f; /* log(2) in two parts, of which the first has few bits */
    Vector p = 0.0083687175f + r * 0.0013814596f;
    p = 0.041668389f + r * p;
    p = 0.16666521f + r * p;
    p = 0.49999994f + r * p;
    p = 1 + (r + r * r * p);
    /* In two factors: the smallest results are below 2^-126. */
    Bits exponent = (Bits)sum - (Bits)all_of(round), half = exponent >> 1;
    return p * power_of_two(half) * power_of_two(exponent - half);
}

/* 1 / (1 + e^-x). */
INLINE Vector sigmoid(Vector x)
{
    Vector e = exp_below_zero(-magnitude(x));
    return select_of(x < 0, e, all_of(1)) / (1 + e);
}

/* The standard normal distribution's share below x. That beyond |x| is e^(-x^2 / 2) times a polynomial in 1 / (1 + |x| / 4), whose
 * largest relative error is 1.7e-8 up to 14.5; further out the first factor is 0. */
INLINE Vector normal_cdf(Vector x)
{
    Vector distance = magnitude(x);
    distance = select_of(distance > 14.5f, all_of(14.5f), distance);
    Vector t = 1 / (1 + 0.25f * distance);
    Vector p = -0.19337855f + t * 0.033425622f;
    p = 0.38849002f + t * p;
    p = -0.32487094f + t * p;
    p = 0.29739669f + t * p;
    p = -0.016603770f + t * p;
    p = 0.12026652f + t * p;
    p = 0.095098905f + t * p;
    p = 0.10019535f + t * p;
    p = -1.9854790e-5f + t * p;
    Vector beyond = exp_below_zero(-0.5f * distance * distance) * p;
    return select_of(x < 0, beyond, 1 - beyond);
}

INLINE Vector relu6_of(Vector v) { return select_of(v > 6, all_of(6), relu(v)); }
INLINE Vector leaky_relu_of(Vector v, Vector slopes) { return select_of(v > 0, v, v * slopes); }
INLINE Vector silu_of(Vector v) { return v * sigmoid(v); }
INLINE Vector gelu_of(Vector v) { return v * normal_cdf(v); }
/* 0.5 * (1 + tanh(u)) is sigmoid(2 * u). */
INLINE Vector gelu_tanh_of(Vector v) { return v * sigmoid(v * (1.59576912f + 0.0713548163f * v * v)); }
INLINE Vector hardsigmoid_of(Vector v) { return select_of(v > 3, all_of(6), relu(v + 3)) / 6; }
INLINE Vector hardswish_of(Vector v) { return v * hardsigmoid_of(v); }

/* The slopes of LEAKY_RELU and of PRELU. */
INLINE Vector slopes_at(const Output *out, int64_t channel)
{
    return out->quick == PRELU ? load(out->slopes + channel) : all_of(out->slope);
}

/* What is inside the kernels, for the channels from `channel` on. */
INLINE Vector quick_of(const Output *out, Vector v, int64_t channel)
{
    if (out->quick == RELU)
        return relu(v);
    if (!out->quick)
        return v;
    return out->quick == RELU6 ? relu6_of(v) : leaky_relu_of(v, slopes_at(out, channel));
}

INLINE float quick_one(const Output *out, float v, int64_t channel)
{
    if (out->quick == RELU)
        return relu_one(v);
    if (!out->quick)
        return v;
    if (out->quick == RELU6)
        return v > 6 ? 6 : relu_one(v);
    return v > 0 ? v : v * (out->quick == PRELU ? out->slopes[channel] : out->slope);
}

/* Finishes a vector of sums, whose channels exist, and stores it. */
INLINE void finish_vector(const Output *out, int64_t row, int64_t channel, Vector v)
{
    int64_t at = row * out->step + channel;
    if (out->scale)
        v *= load(out->scale + channel);
    if (out->bias)
        v += load(out->bias + channel);
    if (out->residual)
        v += load(out->residual + at);
    v = quick_of(out, v, channel);
    store(out->y + at, out->last ? v + load(out->last + at) : v);
}

/* Activates `count` floats, and adds `last` to the results unless it is NULL. */
static void activate_floats(int activation, const float *last, float *p, int64_t count)
{
#define EACH_VECTOR(RESULT) \
    { \
        int64_t k = 0; \
        for (; k + WIDTH <= count; k += WIDTH) { \
            Vector v = load(p + k); \
            v = RESULT; \
            store(p + k, last ? v + load(last + k) : v); \
        } \
        if (k < count) { \
            float rest[WIDTH] = {0}; \
            memcpy(rest, p + k, sizeof(float) * (count - k)); \
            Vector v = load(rest); \
            store(rest, RESULT); \
            for (int64_t i = 0; k < count; i++, k++) \
                p[k] = last ? rest[i] + last[k] : rest[i]; \
        } \
        break; \
    }
    switch (activation) {
    case SILU:
        EACH_VECTOR(silu_of(v))
    case GELU:
        EACH_VECTOR(gelu_of(v))
    case GELU_TANH:
        EACH_VECTOR(gelu_tanh_of(v))
    case HARDSWISH:
        EACH_VECTOR(hardswish_of(v))
    case SIGMOID:
        EACH_VECTOR(sigmoid(v))
    case HARDSIGMOID:
        EACH_VECTOR(hardsigmoid_of(v))
    }
#undef EACH_VECTOR
}

static __attribute__((noinline)) void activate_later(const Output *out, int64_t row, int64_t count, int64_t first, int64_t end)
{
    int64_t channels = least(end, out->c_out) - first;
    for (int64_t at = row * out->step + first; count > 0; count--, at += out->step)
        activate_floats(out->later, out->later_last ? out->later_last + at : NULL, out->y + at, channels);
}

/* Activates channels `first` to `end`, of which those below c_out exist, of `count` rows, and adds what comes behind. Nothing is left
 * to do behind an activation that is inside the kernels. */
INLINE void activate_rows(const Output *out, int64_t row, int64_t count, int64_t first, int64_t end)
{
    if (out->later)
        activate_later(out, row, count, first, end);
}
