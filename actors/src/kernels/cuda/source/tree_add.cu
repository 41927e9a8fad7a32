// Sums of partial gradients in the canonical tree: always left + right, and position decides which is which.

typedef unsigned long long Word;

#define THREADS 256
/// Levels of the largest tree: 256 shards.
#define LEVELS_MAX 8

/// left += right.
extern "C" __global__ void __launch_bounds__(THREADS) tree_add(float *left, const float *right, Word count) {
    const Word stride = (Word)gridDim.x * THREADS;
    for (Word index = (Word)blockIdx.x * THREADS + threadIdx.x; index < count; index += stride) {
        left[index] = __fadd_rn(left[index], right[index]);
    }
}

/// The sum of 2^level vectors of `count` values, which lie one after the other: each element by a binary counter, whose
/// digit l holds the sum of an aligned subtree of 2^l vectors.
extern "C" __global__ void __launch_bounds__(THREADS)
    tree_fold(const float *partials, float *sum, Word count, int level) {
    const Word stride = (Word)gridDim.x * THREADS;
    for (Word index = (Word)blockIdx.x * THREADS + threadIdx.x; index < count; index += stride) {
        float digits[LEVELS_MAX + 1];
#pragma unroll
        for (int digit = 0; digit <= LEVELS_MAX; digit++) {
            digits[digit] = 0.0f;
        }
        float value = 0.0f;
        for (int shard = 0; shard < 1 << level; shard++) {
            value = partials[shard * count + index];
            bool carries = true;
#pragma unroll
            for (int digit = 0; digit <= LEVELS_MAX; digit++) {
                if (carries && (shard >> digit & 1)) {
                    value = __fadd_rn(digits[digit], value);
                } else if (carries) {
                    digits[digit] = value;
                    carries = false;
                }
            }
        }
        sum[index] = value;
    }
}
