// CUDA C on the host: blocks one after the other, the threads of a block as coroutines that meet at barriers.
// Declared by hand: the headers would take most of a compilation's time.
typedef decltype(sizeof(0)) size_t;
extern "C" {
void *memcpy(void *, const void *, size_t);
void *memset(void *, int, size_t);
void abort(void);
float expf(float), logf(float), sqrtf(float), tanhf(float), erff(float), sinf(float), cosf(float), fabsf(float);
float powf(float, float);
}

#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
// `__shared__` is defined before each function: blocks run one after the other, so that a block's memory may be the
// function's, in a section of its own that is poisoned before each block.

struct Dim3 { unsigned int x, y, z; };
static Dim3 threadIdx, blockIdx, blockDim, gridDim;

static inline float __uint_as_float(unsigned int bits) { float v; memcpy(&v, &bits, 4); return v; }
static inline unsigned int __float_as_uint(float v) { unsigned int bits; memcpy(&bits, &v, 4); return bits; }
static inline int __ffs(unsigned int v) { return __builtin_ffs((int)v); }
static inline unsigned int atomicExch(unsigned int *at, unsigned int v) { unsigned int old = *at; *at = v; return old; }

// A coroutine's registers are on its own stack; `to` takes over where it left off.
extern "C" void clip_host_switch(void **from, void *to);
asm(R"(
.text
.type clip_host_switch, @function
clip_host_switch:
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
)");

enum Wait { READY, AT_BLOCK, AT_WARP, DONE };
struct Thread { void *at; Wait wait; Dim3 index; char *stack; };

static const size_t STACK = 64 << 10;
static Thread threads[1024];
static size_t thread_count;
static size_t current;
static void *scheduler;
static void (*entry)(void **);
static void **entry_arguments;
static unsigned int exchange[1024];
// Of the threads of a block: who runs first, second, ...
static unsigned int sequence[1024];
static char *shared_begin, *shared_end;
static int shared_poison;

// Number `i` of `count` in one of the orders: 0 ascending, 1 descending, others as if shuffled.
static size_t in_order(size_t i, size_t count, unsigned int order) {
    if (order == 0) return i;
    if (order == 1) return count - 1 - i;
    size_t step = 1000003ull * order;
    for (;; step++) {
        size_t a = step, b = count;
        while (b) { size_t rest = a % b; a = b; b = rest; }
        if (a == 1) break;
    }
    return (i * (step % count) + order) % count;
}

static void wait(Wait kind) {
    Thread &self = threads[current];
    self.wait = kind;
    clip_host_switch(&self.at, scheduler);
    threadIdx = threads[current].index;
}

static void __syncthreads() { wait(AT_BLOCK); }
static void __syncwarp() { wait(AT_WARP); }
static int __syncthreads_or(int v) {
    exchange[current] = v;
    wait(AT_BLOCK);
    int all = 0;
    for (size_t i = 0; i < thread_count; i++) all |= exchange[i];
    wait(AT_BLOCK);
    return all;
}
static float __shfl_xor_sync(unsigned int, float v, int lane) {
    exchange[current] = __float_as_uint(v);
    wait(AT_WARP);
    float other = __uint_as_float(exchange[current ^ (size_t)lane]);
    wait(AT_WARP);
    return other;
}
static unsigned int __ballot_sync(unsigned int, int v) {
    exchange[current] = v != 0;
    wait(AT_WARP);
    unsigned int votes = 0;
    size_t first = current / 32 * 32;
    for (size_t i = first; i < first + 32 && i < thread_count; i++) votes |= exchange[i] << (i - first);
    wait(AT_WARP);
    return votes;
}

static void body() {
    entry(entry_arguments);
    threads[current].wait = DONE;
    clip_host_switch(&threads[current].at, scheduler);
    abort();
}

// One block. False if threads wait for others that never come.
static bool run_block() {
    if (shared_begin != shared_end) memset(shared_begin, shared_poison, shared_end - shared_begin);
    for (size_t i = 0; i < thread_count; i++) {
        Thread &t = threads[i];
        // As if it had been switched away from just before `body`.
        void **top = (void **)(t.stack + STACK - 8);
        *--top = (void *)body;
        for (int r = 0; r < 6; r++) *--top = nullptr;
        t.at = top;
        t.wait = READY;
    }
    for (;;) {
        size_t done = 0, ran = 0;
        for (size_t turn = 0; turn < thread_count; turn++) {
            size_t i = sequence[turn];
            Thread &t = threads[i];
            if (t.wait == DONE) done++;
            if (t.wait != READY) continue;
            ran++;
            current = i;
            threadIdx = t.index;
            clip_host_switch(&scheduler, t.at);
        }
        if (done == thread_count) return true;
        if (ran) continue;
        // Everybody waits: whoever is complete goes on.
        size_t released = 0, at_block = 0;
        for (size_t i = 0; i < thread_count; i++) at_block += threads[i].wait == AT_BLOCK;
        if (at_block == thread_count) {
            for (size_t i = 0; i < thread_count; i++) threads[i].wait = READY;
            continue;
        }
        for (size_t first = 0; first < thread_count; first += 32) {
            size_t end = first + 32 < thread_count ? first + 32 : thread_count, waiting = 0;
            for (size_t i = first; i < end; i++) waiting += threads[i].wait == AT_WARP;
            if (waiting != end - first) continue;
            for (size_t i = first; i < end; i++) threads[i].wait = READY;
            released++;
        }
        if (!released) return false;
    }
}

// What a launch is besides its function and arguments.
struct Terms {
    const unsigned int *grid;
    unsigned int threads, order;
    char *stacks, *shared_begin, *shared_end;
    int poison;
};

extern "C" int clip_host_run(void (*function)(void **), void **arguments, const Terms *terms) {
    const unsigned int *grid = terms->grid;
    entry = function;
    entry_arguments = arguments;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {terms->threads, 1, 1};
    thread_count = terms->threads;
    shared_begin = terms->shared_begin;
    shared_end = terms->shared_end;
    shared_poison = terms->poison;
    for (size_t i = 0; i < thread_count; i++) {
        threads[i].stack = terms->stacks + i * STACK;
        threads[i].index = {(unsigned int)i, 0, 0};
        exchange[i] = 0;
        sequence[i] = in_order(i, thread_count, terms->order);
    }
    const size_t blocks = (size_t)grid[0] * grid[1] * grid[2];
    for (size_t turn = 0; turn < blocks; turn++) {
        const size_t block = in_order(turn, blocks, terms->order);
        const size_t plane = (size_t)grid[0] * grid[1];
        blockIdx = {(unsigned int)(block % grid[0]), (unsigned int)(block % plane / grid[0]),
                    (unsigned int)(block / plane)};
        if (!run_block()) return 1;
    }
    return 0;
}
