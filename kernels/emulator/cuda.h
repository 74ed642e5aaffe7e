// CUDA's words under g++, so that a .cu file runs on a CPU: a block at a time, a fiber for each of its threads.
//
// A fiber is a stack and a saved stack pointer; it runs until its thread returns or waits. Two things are waited for:
//
//   block barrier   __syncthreads: released when every thread of the block stands at the same one
//   warp operation  shuffles, votes, __syncwarp: the lanes named by the mask leave their operands, the last one to
//                   arrive computes all results
//
// What CUDA leaves undefined is an error here, with kernel, block, thread, file and line: threads at different
// barriers, a thread that returned before a barrier, lanes at different operations, a mask without its own lane, a
// deadlock. Shared memory is static, filled with 0xff (NaN) before each block. Threads run in one of three orders.
//
// Under AddressSanitizer fibers are announced to it; under ThreadSanitizer each CUDA thread is a TSan fiber that
// synchronises at barriers and warp operations and nowhere else, so that a missing barrier is a data race, whatever
// order the threads ran in. Blocks run one after another: a race between blocks is not seen.
//
// Not emulated: what differs in rounding (fused multiply-add, fast division), memory order, time.
#ifndef GPUNET_EMULATOR
#define GPUNET_EMULATOR

#ifndef __x86_64__
#error "the emulator switches fibers in x86-64 assembly"
#endif

#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define __global__
#define __device__
#define __shared__ static __attribute__((section("gpunet_shared")))

#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#define QUIET __attribute__((no_sanitize_thread, noinline))
#elif defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
void __asan_unpoison_memory_region(const volatile void*, size_t);
}
#define QUIET __attribute__((no_sanitize_address, noinline))
#else
#define QUIET __attribute__((noinline))
#endif

// What CUDA has in the global namespace, beside the overloads that <math.h> brings.
template <class T>
inline T min(T a, T b) { return b < a ? b : a; }
template <class T>
inline T max(T a, T b) { return a < b ? b : a; }

extern "C" {
extern char __start_gpunet_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_gpunet_shared[] __attribute__((weak, visibility("hidden")));
void gpunet_switch(void** save, void* load) __attribute__((visibility("hidden")));
}

// Callee-saved registers to the old stack, the stack pointers exchanged, registers from the new one: 3 ns.
asm(R"(
.text
.local gpunet_switch
.type gpunet_switch, @function
gpunet_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size gpunet_switch, . - gpunet_switch
)");

struct Index {
    unsigned int x, y, z;
};
static Index threadIdx, blockIdx, blockDim = {256, 1, 1}, gridDim;

namespace emulator {

const int COUNT = 256, LANES = 32;   // threads of a block, of a warp
const size_t STACK = 64 << 10;       // bytes of a fiber
const unsigned long long END = 0x5ac4e9d07b1f3268ull;  // stands at the end of each stack; gone: it was too small
const size_t STAGGER = 320;          // bytes between the tops of neighbours' stacks: else all share one cache set

enum Waits { RUNS, AT_BARRIER, AT_WARP, RETURNED };

struct Thread {
    void* pointer;  // of its stack, while another runs
    char* stack;
    size_t size;
    Waits waits;
    const char *what, *file;  // what it waits at
    int line;
    unsigned int mask;
    unsigned long long operand, result;
    int source;       // the lane whose operand it wants, or what `what` says
    void *tsan, *fake;
};

static Thread threads[COUNT];
static Thread host;  // whoever called gpunet_run
static int now;      // the thread that runs
static void (*body)(void**);
static void** arguments;
static const char* kernel;
static char* message;
static int room;
static bool failed, made;

// Addresses that ThreadSanitizer knows meetings by. Two take turns: who is first to leave a barrier may reach the next
// one before the last has left, and that must not look like an order between the two.
static char block_begins, block_ends, barriers[2], warps[COUNT / LANES][2];
static int barrier_count, warp_count[COUNT / LANES];

QUIET static void fail(const char* format, ...) {
    if (failed) return;
    failed = true;
    int used = snprintf(message, room, "%s: block %u: ", kernel, blockIdx.x);
    va_list list;
    va_start(list, format);
    vsnprintf(message + used, used < room ? room - used : 0, format, list);
    va_end(list);
}

QUIET static void enter(Thread* from, Thread* to) {
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(to->tsan, 1);  // 1: a switch orders nothing
#elif defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from->fake, to->stack, to->size);
#endif
    gpunet_switch(&from->pointer, to->pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from->fake, nullptr, nullptr);
#endif
}

QUIET static void yield() { enter(&threads[now], &host); }

QUIET static void released(void* address) {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(address);
#else
    (void)address;
#endif
}

QUIET static void acquired(void* address) {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(address);
#else
    (void)address;
#endif
}

// What every fiber runs: one thread of each block, for ever.
QUIET static void live() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    for (;;) {
        acquired(&block_begins);
        body(arguments);
        released(&block_ends);
        threads[now].waits = RETURNED;
        yield();
    }
}

// A fresh fiber, or one whose thread was abandoned in the middle.
QUIET static void begin(int t) {
    Thread& thread = threads[t];
    static char* stacks;  // one mapping: a process may have some 65,000, and guard pages for each stack would be two
    if (!stacks) {
        stacks = (char*)mmap(nullptr, (COUNT + 1) * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stacks == MAP_FAILED) abort();
    }
    thread.stack = stacks + (t + 1) * STACK;  // below the first lies room to overflow into
    thread.size = STACK;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(thread.stack, thread.size);
#elif defined(__SANITIZE_THREAD__)
    if (!thread.tsan) thread.tsan = __tsan_create_fiber(0);
#endif
    *(unsigned long long*)thread.stack = END;
    void** top = (void**)(thread.stack + STACK - t % 16 * STAGGER);
    *--top = nullptr;        // where `live` would return to
    *--top = (void*)live;    // popped by the first switch
    for (int i = 0; i < 6; i++) *--top = nullptr;
    thread.pointer = top;
}

QUIET static void wait(Waits waits, const char* what, const char* file, int line) {
    Thread& me = threads[now];
    me.waits = waits;
    me.what = what;
    me.file = file;
    me.line = line;
}

static inline const char* short_name(const char* file) {
    const char* slash = strrchr(file, '/');
    return slash ? slash + 1 : file;
}

QUIET static void differ(int a, int b) {
    const Thread &x = threads[a], &y = threads[b];
    if (y.waits == RETURNED)
        fail("thread %d waits at %s (%s:%d), but thread %d has returned", a, x.what, short_name(x.file), x.line, b);
    else
        fail("thread %d waits at %s (%s:%d), but thread %d at %s (%s:%d)", a, x.what, short_name(x.file), x.line, b,
             y.what, short_name(y.file), y.line);
}

QUIET static void barrier(const char* file, int line) {
    wait(AT_BARRIER, "__syncthreads", file, line);
    char* meeting = &barriers[barrier_count % 2];
    released(meeting);
    yield();
    acquired(meeting);
}

// Leaves an operand, and returns when all lanes of the mask have. The last one computes every lane's result.
QUIET static unsigned long long meet(const char* what, unsigned int mask, unsigned long long operand, int source,
                                     const char* file, int line) {
    const int first = now / LANES * LANES;
    Thread& me = threads[now];
    wait(AT_WARP, what, file, line);
    me.mask = mask;
    me.operand = operand;
    me.source = source;
    if (!(mask >> now % LANES & 1)) fail("thread %d: %s (%s:%d): its lane is not in the mask %08x", now, what,
                                         short_name(file), line, mask);
    bool all = true;
    for (int lane = 0; lane < LANES && !failed; lane++) {
        if (!(mask >> lane & 1)) continue;
        const Thread& other = threads[first + lane];
        if (other.waits == AT_WARP && (other.line != line || other.mask != mask || strcmp(other.what, what)))
            differ(now, first + lane);
        if (other.waits == RETURNED || other.waits == AT_BARRIER) differ(now, first + lane);
        all = all && other.waits == AT_WARP;
    }
    char* meeting = &warps[first / LANES][warp_count[first / LANES] % 2];
    released(meeting);
    if (all && !failed) {
        warp_count[first / LANES]++;
        unsigned int votes = 0;
        for (int lane = 0; lane < LANES; lane++)
            if (mask >> lane & 1 && threads[first + lane].operand) votes |= 1u << lane;
        for (int lane = 0; lane < LANES; lane++) {
            if (!(mask >> lane & 1)) continue;
            Thread& other = threads[first + lane];
            const int from = other.source;
            if (from >= 0 && from < LANES && !(mask >> from & 1))
                fail("thread %d: %s (%s:%d): reads lane %d, which is not in the mask %08x", first + lane, what,
                     short_name(file), line, from, mask);
            other.result = from < 0 ? votes : from < LANES ? threads[first + from].operand : other.operand;
            other.waits = RUNS;
        }
    } else {
        yield();
    }
    acquired(meeting);
    return me.result;
}

template <class T>
static inline T shuffle(const char* what, unsigned int mask, T value, int source, const char* file, int line) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    unsigned long long bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = meet(what, mask, bits, source < 0 || source >= LANES ? LANES : source, file, line);
    memcpy(&value, &bits, sizeof(T));
    return value;
}

static inline int lane() { return now % LANES; }

QUIET static int in_order(int step, int order) {
    if (order == 1) return COUNT - 1 - step;
    return order == 2 ? step * 77 % COUNT : step;  // 77 is odd, so every thread has its turn
}

// Not memset: the sanitizers would take it for a write of the program's.
QUIET static void poison(char* memory, size_t size) {
    asm volatile("rep stosb" : "+D"(memory), "+c"(size) : "a"(0xff) : "memory");
}

// One block; false after an error.
QUIET static bool run_block(int order) {
    poison(__start_gpunet_shared, __stop_gpunet_shared - __start_gpunet_shared);
    for (int t = 0; t < COUNT; t++) threads[t].waits = RUNS;
    released(&block_begins);
    for (;;) {
        int running = 0, returned = 0;
        for (int step = 0; step < COUNT; step++) {
            const int t = in_order(step, order);
            if (threads[t].waits == RUNS) {
                running++;
                now = t;
                threadIdx.x = t;
                enter(&host, &threads[t]);
                if (*(unsigned long long*)threads[t].stack != END)
                    fail("thread %d: its local variables take more than the %d KB of its stack", t, (int)(STACK >> 10));
                if (failed) return false;
            }
            returned += threads[t].waits == RETURNED;
        }
        if (returned == COUNT) {
            acquired(&block_ends);
            return true;
        }
        if (running) continue;
        int first = -1;  // nobody runs: all must stand at one barrier
        for (int t = 0; t < COUNT; t++)
            if (threads[t].waits != RETURNED) {
                first = t;
                break;
            }
        for (int t = 0; t < COUNT; t++)
            if (threads[t].waits == AT_WARP) {
                for (int i = t / LANES * LANES; i < t / LANES * LANES + LANES; i++)
                    if (threads[t].mask >> i % LANES & 1 && threads[i].waits != AT_WARP) differ(t, i);
                return false;
            }
        for (int t = 0; t < COUNT; t++) {
            const Thread &a = threads[first], &b = threads[t];
            if (b.waits != AT_BARRIER || b.line != a.line || strcmp(a.file, b.file)) {
                differ(first, t);
                return false;
            }
        }
        for (int t = 0; t < COUNT; t++) threads[t].waits = RUNS;
        barrier_count++;
    }
}

}  // namespace emulator

// For blockIdx.x = 0 .. blocks - 1 calls `call(arguments)` in 256 threads. order: 0 forward, 1 backward, 2 mixed.
// Returns 0, or 1 with what went wrong in `message`.
extern "C" QUIET int gpunet_run(void (*call)(void**), void** arguments, unsigned int blocks, int order,
                                const char* kernel, char* message, int room) {
    using namespace emulator;
    body = call;
    emulator::arguments = arguments;
    emulator::kernel = kernel;
    emulator::message = message;
    emulator::room = room;
    failed = false;
    gridDim = {blocks, 1, 1};
#if defined(__SANITIZE_THREAD__)
    host.tsan = __tsan_get_current_fiber();
#elif defined(__SANITIZE_ADDRESS__)
    if (!host.stack) {
        pthread_attr_t attributes;
        pthread_getattr_np(pthread_self(), &attributes);
        pthread_attr_getstack(&attributes, (void**)&host.stack, &host.size);
        pthread_attr_destroy(&attributes);
    }
#endif
    if (!made)
        for (int t = 0; t < COUNT; t++) begin(t);
    made = true;
    for (unsigned int b = 0; b < blocks && !failed; b++) {
        blockIdx = {b, 0, 0};
        run_block(order);
    }
    if (failed) made = false;  // threads stand in the middle of the kernel: their fibers begin anew
    return failed;
}

#define __syncthreads() emulator::barrier(__FILE__, __LINE__)
#define __syncwarp() (void)emulator::meet("__syncwarp", 0xffffffffu, 0, -1, __FILE__, __LINE__)
#define __threadfence_system() (void)0
#define __shfl_sync(mask, value, from) \
    emulator::shuffle("__shfl_sync", mask, value, (from) & 31, __FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, bits) \
    emulator::shuffle("__shfl_xor_sync", mask, value, emulator::lane() ^ (bits), __FILE__, __LINE__)
#define __shfl_down_sync(mask, value, by) \
    emulator::shuffle("__shfl_down_sync", mask, value, emulator::lane() + (int)(by), __FILE__, __LINE__)
#define __shfl_up_sync(mask, value, by) \
    emulator::shuffle("__shfl_up_sync", mask, value, emulator::lane() - (int)(by), __FILE__, __LINE__)
#define __ballot_sync(mask, predicate) \
    (unsigned int)emulator::meet("__ballot_sync", mask, (predicate) != 0, -1, __FILE__, __LINE__)

#endif
