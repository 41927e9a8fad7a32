// What the kernels need of CUDA, on a CPU: so that tests can run their very source where no GPU is.
//
// A block's threads are contexts of one system thread, which run in turns from one barrier to the next, in ascending
// or in descending order: where a barrier is missing, the two orders differ. Blocks run one after the other.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <ucontext.h>

#define __device__
#define __global__
#define __shared__ static thread_local
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct Position {
    unsigned x, y, z;
};

static thread_local Position threadIdx, blockIdx, blockDim, gridDim;

// None of these may be fused: the file is compiled with -ffp-contract=off.
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return std::sqrt(a); }
static inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }

static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dsub_rn(double a, double b) { return a - b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __ddiv_rn(double a, double b) { return a / b; }
static inline float __double2float_rn(double a) { return (float)a; }

static inline double __longlong_as_double(long long bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static inline unsigned long long atomicAdd(unsigned long long *to, unsigned long long value) {
    const unsigned long long before = *to;
    *to += value;
    return before;
}

namespace emulation {

enum class Wait { None, Block, Warp, Ended };

struct Thread {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(64 << 10);
    Wait waits = Wait::None;
    /// The bits of what it gives to others of its warp.
    uint64_t given = 0;
};

struct Block {
    ucontext_t scheduler;
    std::vector<std::unique_ptr<Thread>> threads;
    std::function<void()> kernel;
    size_t current = 0;
};

static thread_local Block *block = nullptr;

/// Lets the other threads come to the same barrier.
static void wait(Wait barrier) {
    Thread &thread = *block->threads[block->current];
    thread.waits = barrier;
    swapcontext(&thread.context, &block->scheduler);
}

static void enter() {
    block->kernel();
    wait(Wait::Ended);
}

/// One round: each thread runs to its next barrier or its end. False where they came to different ones, which on a GPU is
/// undefined behaviour; a warp's barrier is checked over the whole block, so kernels here call it uniformly.
static bool run_round(Block &all, bool descending) {
    const size_t count = all.threads.size();
    for (size_t turn = 0; turn < count; turn++) {
        all.current = descending ? count - 1 - turn : turn;
        Thread &thread = *all.threads[all.current];
        threadIdx = {(unsigned)all.current, 0, 0};
        swapcontext(&all.scheduler, &thread.context);
    }
    for (const auto &thread : all.threads) {
        if (thread->waits != all.threads[0]->waits) {
            return false;
        }
    }
    return true;
}

static void prepare(Thread &thread) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;
    thread.waits = Wait::None;
    makecontext(&thread.context, enter, 0);
}

/// Runs a kernel over a grid. False where the threads of a block diverge at a barrier.
static bool launch(const unsigned *grid, unsigned threads, bool descending, std::function<void()> kernel) {
    Block all;
    block = &all;
    for (unsigned thread = 0; thread < threads; thread++) {
        all.threads.push_back(std::make_unique<Thread>());
    }
    all.kernel = std::move(kernel);
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {threads, 1, 1};
    for (unsigned z = 0; z < grid[2]; z++) {
        for (unsigned y = 0; y < grid[1]; y++) {
            for (unsigned x = 0; x < grid[0]; x++) {
                blockIdx = {x, y, z};
                for (auto &thread : all.threads) {
                    prepare(*thread);
                }
                do {
                    if (!run_round(all, descending)) {
                        return false;
                    }
                } while (all.threads[0]->waits != Wait::Ended);
            }
        }
    }
    return true;
}

} // namespace emulation

static inline void __syncthreads() { emulation::wait(emulation::Wait::Block); }

static inline void __syncwarp() { emulation::wait(emulation::Wait::Warp); }

namespace emulation {

/// Gives `value` to the warp, and takes that of the thread `from` of the block.
template <typename Value>
static Value exchange(Value value, size_t from) {
    std::memcpy(&block->threads[block->current]->given, &value, sizeof value);
    wait(Wait::Warp);
    Value received;
    std::memcpy(&received, &block->threads[from]->given, sizeof received);
    // Nobody gives the next value before all have read this one.
    wait(Wait::Warp);
    return received;
}

} // namespace emulation

static inline float __shfl_xor_sync(unsigned, float value, int mask) {
    return emulation::exchange(value, emulation::block->current ^ (size_t)mask);
}

/// Of the `width` threads around this one, the value of the one at `place`.
static inline double __shfl_sync(unsigned, double value, int place, int width) {
    const size_t me = emulation::block->current;
    return emulation::exchange(value, me - me % (size_t)width + (size_t)place);
}
