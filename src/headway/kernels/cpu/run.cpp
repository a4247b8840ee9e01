// Runs steps on all threads, through the kernels of the best instruction set that the machine has.

#include "steps.h"
#include <atomic>
#include <chrono>
#include <cstdio>
#include <sched.h>
#include <thread>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define HEADWAY_X86 1
#include <immintrin.h>
#else
#define HEADWAY_X86 0
#endif

#define LEVEL 0
#define TARGET
namespace portable {
#include "kernels.h"
}

#if HEADWAY_X86
#define LEVEL 2
#define TARGET __attribute__((target("avx2,fma,f16c")))
namespace avx2 {
#include "kernels.h"
}

#define LEVEL 3
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))
namespace avx512 {
#include "kernels.h"
}

#define LEVEL 4
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
namespace vnni {
#include "kernels.h"
}
#endif

struct Kernels {
    const char *name;
    i64 (*item_count)(const Step &, i64);
    void (*run_step)(const Step &, i64, i64, i64, i64);
    bool (*usable)();
};

static const Kernels LEVELS[] = {
    {"portable", portable::item_count, portable::run_step, [] { return true; }},
#if HEADWAY_X86
    {"avx2", avx2::item_count, avx2::run_step,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
    {"avx512", avx512::item_count, avx512::run_step,
     [] { return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"); }},
    {"avx512-vnni", vnni::item_count, vnni::run_step,
     [] { return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512dq"); }},
#endif
};

static const Kernels *chosen = nullptr;

static i64 nanoseconds() {
    return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Threads meet here after each step. They spin for a while, since steps take microseconds, and then let others run.
// Whoever comes last does what only one can do before the others go on.
class Meeting {
    std::atomic<int> waiting{0}, round{0};

  public:
    std::atomic<i64> lost{0};  // nanoseconds that were waited longer than the patience

    template <class Work> void arrive(int threads, const Work &alone) {
        const int now = round.load(std::memory_order_relaxed);
        if (waiting.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            waiting.store(0, std::memory_order_relaxed);
            alone();
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; spins < PATIENCE; ++spins) {
            if (round.load(std::memory_order_acquire) != now) return;
#if HEADWAY_X86
            _mm_pause();
#endif
        }
        const i64 began = nanoseconds();
        while (round.load(std::memory_order_acquire) == now) sched_yield();
        lost.fetch_add(nanoseconds() - began, std::memory_order_relaxed);
    }

    static const int PATIENCE = 1000;  // some 20 microseconds
};

// Whether so many threads find a core each, by what the system says of the tasks that want one now; no, if it is silent.
static bool room_for(int threads) {
    int wanting = 0, found = 0;
    if (FILE *load = fopen("/proc/loadavg", "r")) {
        found = fscanf(load, "%*f %*f %*f %d/", &wanting);
        fclose(load);
    }
    return found == 1 && wanting - 1 + threads <= int(std::thread::hardware_concurrency());
}

// How many threads a run takes. Where another process has taken a core, threads wait for the one that lost its core,
// for milliseconds at a time, and one thread alone is faster: then the next runs have one, until the system tells of a
// free core; where it does not, all threads are tried again after so many runs, at longer and longer intervals. Only
// runs of few rows are judged: with many, steps are longer than such waits.
class Crowding {
    static const i64 FEW = 16, LEAST = 8, MOST = 256;
    std::atomic<i64> alone{0}, penalty{0};

  public:
    int threads(int asked, i64 T) {
        if (asked == 1 || T > FEW || alone.load(std::memory_order_relaxed) <= 0) return asked;
        const i64 left = alone.fetch_sub(1, std::memory_order_relaxed) - 1;
        if (left % LEAST || !room_for(asked)) return 1;
        alone.store(0, std::memory_order_relaxed);
        return asked;
    }

    // lost: of `took`, by all threads but the one that was waited for.
    void judge(i64 lost, i64 took, int threads, i64 T) {
        if (threads == 1 || T > FEW) return;
        i64 runs = penalty.load(std::memory_order_relaxed);
        if (lost * 5 < took * 2 * (threads - 1)) {
            penalty.store(runs / 2, std::memory_order_relaxed);
            return;
        }
        runs = runs * 2 < LEAST ? LEAST : runs * 2 > MOST ? MOST : runs * 2;
        penalty.store(runs, std::memory_order_relaxed);
        alone.store(runs, std::memory_order_relaxed);
    }
};

static Crowding crowding;

extern "C" {

// The sizes of the structs of steps.h, by which Python sees whether it was written for this build. Ends with 0.
const i64 *hw_sizes() {
    static const i64 sizes[] = {sizeof(Matrix), sizeof(Coded), sizeof(Norm), sizeof(Linear), sizeof(Columns), sizeof(Heads),
                                sizeof(Attend), sizeof(Gather), 0};
    return sizes;
}

// The instruction sets that this machine can run, from the least, as one text with spaces.
const char *hw_levels() {
    static char text[64];
    int end = 0;
    for (const Kernels &level : LEVELS)
        if (level.usable()) end += snprintf(text + end, sizeof text - end, end ? " %s" : "%s", level.name);
    return text;
}

// Use the instruction set of this name from now on; "" is the best. Returns whether the machine has it.
int hw_use_level(const char *name) {
    for (const Kernels &level : LEVELS)
        if (level.usable() && (!*name || !__builtin_strcmp(level.name, name))) {
            chosen = &level;
            if (*name) return 1;
        }
    return !*name;
}

// Run `count` steps over T rows on `threads` threads. Each takes a share of what is left of a step's items whenever it has
// none, so that all are done at about the same time, and one that lost its core holds up the others by one share only.
// Steps of a single item, such as norms of one row, are taken at the meeting before them. `counters` holds one for each.
void hw_run(const Step *steps, i64 count, i64 T, int threads, std::atomic<i64> *counters) {
    if (!chosen) hw_use_level("");
    const Kernels &kernels = *chosen;
    Meeting meeting;
    const i64 began = nanoseconds();
    for (i64 s = 0; s < count; ++s) counters[s].store(0, std::memory_order_relaxed);
    threads = crowding.threads(threads, T);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#ifdef _OPENMP
        const int here = omp_get_num_threads(), thread = omp_get_thread_num();
#else
        const int here = 1, thread = 0;
#endif
        for (i64 s = 0, next; s < count; s = next) {
            const i64 items = kernels.item_count(steps[s], T);
            for (i64 begin = 0, end; begin < items;) {
                end = begin + (items - begin) / (2 * here) + 1;
                if (!counters[s].compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
                kernels.run_step(steps[s], T, begin, end, thread);
                begin = end;
            }
            for (next = s + 1; next < count && kernels.item_count(steps[next], T) == 1;) ++next;
            meeting.arrive(here, [&] {
                for (i64 single = s + 1; single < next; ++single) kernels.run_step(steps[single], T, 0, 1, thread);
            });
        }
    }
    crowding.judge(meeting.lost.load(), nanoseconds() - began, threads, T);
}
}
