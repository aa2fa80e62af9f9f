/* Layers one after the other in one parallel region: a whole network, or a single convolution.
 *
 * Each layer is a phase: threads take its tasks one by one, and go on to the next layer when none is left. A thread that
 * comes late, because it has lost its core to another process, finds its share done. Only a task in flight is waited for, and
 * only by a layer that needs its result.
 */
#include <stdatomic.h>
#include <string.h>
#include <time.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#include "convolution.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* A tensor: floats behind one of a call's addresses. program.py has the same fields in the same order. */
typedef struct {
    int64_t base; /* -1: there is none */
    int64_t at;
} Place;

typedef struct {
    int64_t kind;  /* DIRECT, WINOGRAD, ... */
    int64_t needs; /* how many of the first layers have to be done before: it reads what they write, or writes over it */
    int64_t tasks;
    Place x, residual, gates, y;
    Convolution convolution; /* without these four */
} Layer;

/* Of a call: how many tasks of a layer are taken, and done. One cache line each. */
typedef struct {
    atomic_int_least64_t taken, done;
    char apart[48];
} Phase;

typedef struct {
    const Kernels *kernels;
    const Layer *layers;
    int64_t first, end;
    float *const *bases;
    Phase *phases;
    float *scratch;
    int64_t scratch_step;
    atomic_int_least64_t next_thread;
    atomic_int finished; /* layers, in any order: what sleeping threads wait for */
    atomic_int sleeping;
} Call;

/* For how long a thread spins before it sleeps: longer than tasks take, shorter than the time slice of a busy neighbor. */
enum { SPIN_NS = 200000 };

static int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void pause_briefly(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static int is_done(const Call *call, int64_t layer)
{
    return atomic_load(&call->phases[layer].done) >= call->layers[layer].tasks;
}

/* Waits until a layer is done. A thread that sleeps leaves its core to the one that it waits for. */
static void wait_for(Call *call, int64_t layer)
{
    for (int64_t start = nanoseconds(); nanoseconds() - start < SPIN_NS;)
        for (int i = 0; i < 16; i++) {
            if (is_done(call, layer))
                return;
            pause_briefly();
        }
    atomic_fetch_add(&call->sleeping, 1);
    for (;;) {
        int seen = atomic_load(&call->finished);
        if (is_done(call, layer))
            break;
#if defined(__linux__)
        syscall(SYS_futex, &call->finished, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
#else
        (void)seen;
        sched_yield();
#endif
    }
    atomic_fetch_sub(&call->sleeping, 1);
}

static void announce_done(Call *call)
{
    atomic_fetch_add(&call->finished, 1);
#if defined(__linux__)
    if (atomic_load(&call->sleeping) > 0)
        syscall(SYS_futex, &call->finished, FUTEX_WAKE_PRIVATE, 1 << 30, NULL, NULL, 0);
#endif
}

static float *address_of(const Call *call, Place place)
{
    return place.base < 0 ? NULL : call->bases[place.base] + place.at;
}

/* What one thread does in a call. */
static void take_part(void *argument)
{
    Call *call = argument;
    float *scratch = call->scratch + atomic_fetch_add(&call->next_thread, 1) * call->scratch_step;
    int64_t done = call->first;
    for (int64_t i = call->first; i < call->end; i++) {
        const Layer *layer = &call->layers[i];
        Phase *phase = &call->phases[i];
        if (atomic_load(&phase->taken) >= layer->tasks)
            continue;
        for (; done < layer->needs; done++)
            if (!is_done(call, done))
                wait_for(call, done);
        Convolution convolution = layer->convolution;
        convolution.x = address_of(call, layer->x);
        convolution.residual = address_of(call, layer->residual);
        convolution.gates = address_of(call, layer->gates);
        convolution.y = address_of(call, layer->y);
        void (*run)(const Convolution *, int64_t, float *) = call->kernels->kinds[layer->kind].run;
        for (int64_t task; (task = atomic_fetch_add(&phase->taken, 1)) < layer->tasks;) {
            run(&convolution, task, scratch);
            if (atomic_fetch_add(&phase->done, 1) + 1 == layer->tasks)
                announce_done(call);
        }
    }
}

/* Threads in the calls of this process. Callers that come while others run use the threads that are left: with as many
 * threads each as there are cores, they would only wait for each other. */
static atomic_int_least64_t threads_in_use;

#if defined(__linux__)
static void none_in_use(void) { atomic_store(&threads_in_use, 0); }

/* The child of a fork has none of its parent's threads. */
static void __attribute__((constructor)) watch_forks(void) { pthread_atfork(NULL, NULL, none_in_use); }
#endif

static void run_layers(Call *call, int64_t threads, Parallel *parallel)
{
    int64_t most_tasks = 1;
    for (int64_t i = call->first; i < call->end; i++) {
        atomic_store(&call->phases[i].taken, 0);
        atomic_store(&call->phases[i].done, 0);
        most_tasks = most(most_tasks, call->layers[i].tasks);
    }
    threads = least(most_tasks, most(1, threads - atomic_load(&threads_in_use)));
    atomic_fetch_add(&threads_in_use, threads);
    if (parallel && threads > 1)
        parallel(take_part, call, (unsigned)threads, 0);
    else
        take_part(call);
    atomic_fetch_sub(&threads_in_use, threads);
}

/* Number of tasks of a layer, whose addresses need not be known. */
EXPORT int64_t rk_tasks(int64_t number, int64_t kind, const Convolution *convolution)
{
    return rk_kernels(number)->kinds[kind].tasks(convolution);
}

/* Floats of scratch memory that each thread needs for a layer. */
EXPORT int64_t rk_scratch(int64_t number, int64_t kind, const Convolution *convolution)
{
    return rk_kernels(number)->kinds[kind].scratch(convolution);
}

/* Bytes that rk_run needs for each layer. */
EXPORT int64_t rk_phase(void) { return sizeof(Phase); }

/* Runs layers `first` to `end` of a program.
 *
 * bases: the addresses that the layers' places refer to. phases: rk_phase bytes for each layer of the program. scratch:
 * `threads` times `scratch_step` floats, the latter at least rk_scratch of each layer. threads: at most; a call has fewer
 * tasks, or other calls may run.
 */
EXPORT void rk_run(int64_t number, const Layer *layers, int64_t first, int64_t end, float *const *bases, Phase *phases,
                   int64_t threads, Parallel *parallel, float *scratch, int64_t scratch_step)
{
    Call call = {rk_kernels(number), layers, first, end, bases, phases, scratch, scratch_step, 0, 0, 0};
    run_layers(&call, threads, parallel);
}

/* Runs one layer with addresses of its own. scratch: as in rk_run. */
EXPORT void rk_convolve(int64_t number, int64_t kind, const Convolution *convolution, int64_t threads, Parallel *parallel,
                        float *scratch, int64_t scratch_step)
{
    float *const bases[] = {(float *)convolution->x, (float *)convolution->residual,
                            (float *)convolution->gates, convolution->y};
    Layer layer = {kind, 0, rk_tasks(number, kind, convolution), {0, 0}, {1, 0}, {2, 0}, {3, 0}, *convolution};
    Phase phase;
    rk_run(number, &layer, 0, 1, bases, &phase, threads, parallel, scratch, scratch_step);
}
