/* What Python calls beside program.c: which instruction set runs here, changes in memory, packed weights, the processor's peak. */
#include <math.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

#include "convolution.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

extern const Kernels rk_portable, rk_avx2, rk_avx512;

const Kernels *rk_kernels(int64_t number)
{
#if defined(__x86_64__) && !defined(PORTABLE_WIDTH)
    __builtin_cpu_init();
    if (number == 2 && __builtin_cpu_supports("avx512f"))
        return &rk_avx512;
    if (number == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return &rk_avx2;
#endif
    return number == 0 ? &rk_portable : NULL;
}

/* The version of this interface. Python refuses any other. */
EXPORT int64_t rk_interface(void) { return 9; }

/* Output channels of a panel; 0 if this processor can't run the kernels of that number. */
EXPORT int64_t rk_panel(int64_t number)
{
    const Kernels *of = rk_kernels(number);
    return of ? of->panel : 0;
}

EXPORT int64_t rk_rows(int64_t number) { return rk_kernels(number)->rows; }

/* A job of several tasks, which threads take one by one: a busy core holds nobody up for longer than its task. */
typedef struct {
    void (*run)(void *job, int64_t task, int64_t thread);
    int64_t tasks;
    atomic_int_least64_t next_task, next_thread;
} Job;

static void take_tasks(void *argument)
{
    Job *job = argument;
    int64_t thread = atomic_fetch_add(&job->next_thread, 1);
    for (int64_t task; (task = atomic_fetch_add(&job->next_task, 1)) < job->tasks;)
        job->run(job, task, thread);
}

static void run_job(Job *job, int64_t threads, Parallel *parallel)
{
    if (parallel && least(threads, job->tasks) > 1)
        parallel(take_tasks, job, (unsigned)least(threads, job->tasks), 0);
    else
        take_tasks(job);
}

/* Whether memory still holds what it did: `count` pieces of `items[i]` items, `sizes[i]` bytes each and `strides[i]` bytes apart,
 * against copies without gaps. Items of weights lie far apart, so each would be a cache miss of its own: they are fetched in
 * advance. */
EXPORT int64_t rk_is_same(int64_t count, const char *const *live, const char *const *then, const int64_t *items,
                          const int64_t *sizes, const int64_t *strides)
{
    enum { AHEAD = 16 };
    for (int64_t i = 0; i < count; i++) {
        const char *p = live[i], *copy = then[i];
        int64_t size = sizes[i], stride = strides[i];
        if (stride == size) {
            if (memcmp(p, copy, (size_t)(items[i] * size)))
                return 0;
            continue;
        }
        for (int64_t k = 0; k < items[i]; k++, p += stride, copy += size) {
            if (k + AHEAD < items[i])
                __builtin_prefetch(p + AHEAD * stride, 0, 0);
            if (size == 4 ? memcmp(p, copy, 4) : memcmp(p, copy, (size_t)size))
                return 0;
        }
    }
    return 1;
}

/* Copies 64-bit words from where they are. */
EXPORT void rk_read_words(int count, const uint64_t *const *live, uint64_t *to)
{
    for (int i = 0; i < count; i++)
        to[i] = *live[i];
}

/* Whether 64-bit words still hold what they did (object_watch.py). Each is a cache miss of its own, but none waits for another. */
EXPORT int rk_are_words(int count, const uint64_t *const *live, const uint64_t *then)
{
    uint64_t differing = 0;
    for (int i = 0; i < count; i++)
        differing |= *live[i] ^ then[i];
    return differing == 0;
}

static uint64_t dict_writes;

/* Python calls this, its lock held, at each write to a dict that object_watch.py has told it of: PyDict_AddWatcher. */
EXPORT int rk_dict_written(int event, void *dict, void *key, void *value)
{
    (void)event, (void)dict, (void)key, (void)value;
    dict_writes++;
    return 0;
}

/* The address of the number of these writes. */
EXPORT const uint64_t *rk_dict_writes(void) { return &dict_writes; }

typedef struct {
    Job job;
    const Kernels *kernels;
    int64_t steps;
} Peak;

static void run_peak(void *job, int64_t task, int64_t thread)
{
    const Peak *peak = job;
    float floats[2 * 16] = {0}; /* two of the widest vectors */
    (void)task, (void)thread;
    peak->kernels->multiply_add(peak->steps, floats);
}

/* Runs FMAs and nothing else on all threads. Returns the number of FLOPs. */
EXPORT int64_t rk_peak(int64_t number, int64_t steps, int64_t threads, Parallel *parallel)
{
    Peak peak = {{run_peak, threads, 0, 0}, rk_kernels(number), steps};
    run_job(&peak.job, threads, parallel);
    return threads * steps * peak.kernels->flops;
}

typedef struct {
    Job job;
    const float *weight;
    int64_t c_out, c_in, kernel_h, kernel_w;
    int64_t stride_o, stride_c, stride_h, stride_w;
    const Kernels *kernels;
    float *packed;
    atomic_int refused;
} Pack;

static float weight_at(const Pack *pack, int64_t o, int64_t c, int64_t h, int64_t w)
{
    if (o >= pack->c_out)
        return 0;
    return pack->weight[o * pack->stride_o + c * pack->stride_c + h * pack->stride_h + w * pack->stride_w];
}

/* (panels, taps, c_in, panel). `narrow` groups have fewer channels than a vector: lane i of row r has the weight of output
 * channel i ^ r and of the input channel whose lane i is (narrow_groups.h). */
static void pack_rows(Pack *pack, int64_t task, int narrow)
{
    int64_t panel = pack->kernels->panel;
    float *to = pack->packed + task * pack->kernel_h * pack->kernel_w * pack->c_in * panel;
    float strange = 0;
    for (int64_t h = 0; h < pack->kernel_h; h++)
        for (int64_t w = 0; w < pack->kernel_w; w++)
            for (int64_t c = 0; c < pack->c_in; c++)
                for (int64_t i = 0; i < panel; i++) {
                    int64_t o = task * panel + (narrow ? i ^ c : i), k = narrow ? i % pack->c_in : c;
                    float value = weight_at(pack, o, k, h, w);
                    strange += value * 0;
                    *to++ = value;
                }
    if (strange != 0)
        atomic_store(&pack->refused, 1);
}

static void pack_direct(void *job, int64_t task, int64_t thread)
{
    (void)thread;
    pack_rows(job, task, 0);
}

/* The weight of a grouped convolution, whose c_in is a group's. */
static void pack_groups(void *job, int64_t task, int64_t thread)
{
    Pack *pack = job;
    (void)thread;
    pack_rows(pack, task, pack->c_in < pack->kernels->panel / 2);
}

/* The weight of groups of one channel: (taps, panels * panel). */
static void pack_depthwise(void *job, int64_t task, int64_t thread)
{
    Pack *pack = job;
    int64_t panel = pack->kernels->panel, step = blocks(pack->c_out, panel) * panel;
    float *to = pack->packed + task * panel, strange = 0;
    (void)thread;
    for (int64_t h = 0; h < pack->kernel_h; h++)
        for (int64_t w = 0; w < pack->kernel_w; w++, to += step)
            for (int64_t i = 0; i < panel; i++) {
                to[i] = weight_at(pack, task * panel + i, 0, h, w);
                strange += to[i] * 0;
            }
    if (strange != 0)
        atomic_store(&pack->refused, 1);
}

static int sign(float value) { return (value > 0) - (value < 0); }

/* The tap in the middle, as taps_of computes it (winograd.h). */
static float middle(float u[4][4]) { return (u[1][1] - u[2][1]) - (u[1][2] - u[2][2]); }

/* Gives the tap in the middle its sign: its four values go to a grid, where their differences are exact, and the sum is moved
 * by steps of it. A grid of the largest one's last bit suffices unless a difference has one bit more. */
static void keep_middle_sign(float u[4][4], float tap)
{
    float *values[4] = {&u[1][1], &u[2][1], &u[1][2], &u[2][2]}, first[4], largest = fabsf(tap);
    int wanted = sign(tap), exponent = 0;
    for (int i = 0; i < 4; i++)
        first[i] = *values[i], largest = fmaxf(largest, fabsf(first[i]));
    frexpf(largest, &exponent);
    for (int bits = 24; bits > 22 && sign(middle(u)) != wanted; bits--) {
        float grid = ldexpf(1, exponent - bits > -149 ? exponent - bits : -149);
        for (int i = 0; i < 4; i++)
            *values[i] = (float)(rint((double)first[i] / grid) * grid);
        for (int i = 0; i < 8 && sign(middle(u)) != wanted; i++) {
            float step = wanted > sign(middle(u)) ? grid : -grid;
            *values[i % 4] += i % 4 == 0 || i % 4 == 3 ? step : -step;
        }
    }
}

/* Changes roundings until all taps, computed back from their transform, have their signs again, zeros included: an output next
 * to an inf in x depends on nothing else. Returns whether that succeeded. */
static int keep_signs(float u[4][4], double g[3][3])
{
    /* Roundings are monotonous: what was positive may have become zero, but not negative. */
    float *larger[4] = {&u[0][1], &u[3][1], &u[1][0], &u[1][3]}, *smaller[4] = {&u[0][2], &u[3][2], &u[2][0], &u[2][3]};
    double taps[4] = {g[0][1], g[2][1], g[1][0], g[1][2]};
    for (int i = 0; i < 4; i++)
        if (sign(*larger[i] - *smaller[i]) != sign((float)taps[i]))
            *larger[i] = nextafterf(*larger[i], taps[i] > 0 ? INFINITY : -INFINITY);
    keep_middle_sign(u, (float)g[1][1]);
    int kept = sign(middle(u)) == sign((float)g[1][1]);
    kept &= sign(u[0][0]) == sign((float)g[0][0]) && sign(u[0][3]) == sign((float)g[0][2]);
    kept &= sign(u[3][0]) == sign((float)g[2][0]) && sign(u[3][3]) == sign((float)g[2][2]);
    for (int i = 0; i < 4; i++)
        kept &= sign(*larger[i] - *smaller[i]) == sign((float)taps[i]);
    return kept;
}

/* Looks closer at one output channel of transformed taps. Returns whether the kernels can take it. */
static int repair(const float taps[9][MOST_PANEL], int64_t i, float *to, int64_t plane)
{
    double g[3][3];
    float u[4][4];
    for (int j = 0; j < 9; j++)
        g[j / 3][j % 3] = taps[j][i];
    for (int j = 0; j < 16; j++)
        u[j / 4][j % 4] = to[j * plane + i];
    int taken = keep_signs(u, g);
    for (int j = 0; j < 16; j++) {
        taken &= isfinite(u[j / 4][j % 4]) != 0;
        to[j * plane + i] = u[j / 4][j % 4];
    }
    return taken;
}

/* Input channels whose taps are gathered at once: those of an output channel lie side by side, while the next output channel
 * may be a multiple of 2 KB away, and 32 of these share a few sets of the L1 cache. */
enum { GATHERED = 8 };

/* (16, panels, c_in, panel): G g G^T, computed in fp64. */
static void pack_winograd(void *job, int64_t task, int64_t thread)
{
    Pack *pack = job;
    int64_t panel = pack->kernels->panel, size = pack->c_in * panel, plane = blocks(pack->c_out, panel) * size;
    int64_t offsets[9];
    float *to = pack->packed + task * size, taps[GATHERED][9][MOST_PANEL];
    int refused = 0;
    (void)thread;
    for (int j = 0; j < 9; j++)
        offsets[j] = j / 3 * pack->stride_h + j % 3 * pack->stride_w;
    for (int64_t first = 0; first < pack->c_in; first += GATHERED) {
        int64_t count = least(GATHERED, pack->c_in - first);
        for (int64_t i = 0; i < panel; i++) {
            int64_t o = task * panel + i;
            const float *from = pack->weight + o * pack->stride_o + first * pack->stride_c;
            for (int64_t c = 0; c < count; c++, from += pack->stride_c)
                for (int j = 0; j < 9; j++)
                    taps[c][j][i] = o < pack->c_out ? from[offsets[j]] : 0;
        }
        for (int64_t c = 0; c < count; c++, to += panel) {
            uint32_t odd = pack->kernels->transform_taps(taps[c][0], MOST_PANEL, to, plane);
            for (int64_t i = 0; odd; i++, odd >>= 1)
                refused |= odd & 1 && !repair(taps[c], i, to, plane);
        }
    }
    if (refused)
        atomic_store(&pack->refused, 1);
}

/* Packs a weight of (c_out, c_in, kernel_h, kernel_w) with any strides. Returns 0, or 1 if the kernels can't take it: a value
 * is not finite, or keep_signs failed. kind: of a convolution. packed: pack_rows and pack_winograd give its shape. */
EXPORT int64_t rk_pack(int64_t number, int64_t kind, const float *weight, const int64_t *sizes, const int64_t *strides,
                       float *packed, int64_t threads, Parallel *parallel)
{
    void (*const pack_kind[])(void *, int64_t, int64_t) = {
        [DIRECT] = pack_direct, [WINOGRAD] = pack_winograd, [GROUPED] = pack_groups, [DEPTHWISE] = pack_depthwise,
    };
    const Kernels *of = rk_kernels(number);
    Pack pack = {
        {pack_kind[kind], blocks(sizes[0], of->panel), 0, 0},
        weight, sizes[0], sizes[1], sizes[2], sizes[3],
        strides[0], strides[1], strides[2], strides[3],
        of, packed, 0,
    };
    run_job(&pack.job, threads, parallel);
    return atomic_load(&pack.refused);
}
