// AdamW in place over a flat vector, in one pass, with a digest of what was written.
//
// Elementwise, no operation fused, in the order of kernels/update.rs. The digest (kernels/cuda/digest.rs) is a sum
// modulo 2^64, so that neither the order of threads nor the number of blocks shows in it.

typedef unsigned long long Word;

#define THREADS 256

__device__ inline Word mix(Word word) {
    word ^= word >> 32;
    word *= 0xd6e8feb86659fd93ULL;
    word ^= word >> 29;
    word *= 0xbf58476d1ce4e5b9ULL;
    return word ^ word >> 32;
}

/// The sum over the block, in the first thread. It may be called again at once: only that thread reads the first sum, and
/// only it writes it.
__device__ inline Word block_sum(Word value, Word *sums) {
    sums[threadIdx.x] = value;
    __syncthreads();
    for (unsigned width = THREADS / 2; width >= 1; width /= 2) {
        if (threadIdx.x < width) {
            sums[threadIdx.x] += sums[threadIdx.x + width];
        }
        __syncthreads();
    }
    return sums[0];
}

/// `first` is the position of the vector's first element in the whole; `digest` holds two sums that are added to.
extern "C" __global__ void __launch_bounds__(THREADS)
    adamw(float *params, float *means, float *squares, const float *grads, Word count, Word first, Word *digest,
          float scale, float beta1, float one_minus_beta1, float beta2, float one_minus_beta2, float epsilon,
          float inverse_square_correction, float keep, float rate) {
    __shared__ Word sums[THREADS];
    Word low = 0, high = 0;
    const Word stride = (Word)gridDim.x * THREADS;
    for (Word index = (Word)blockIdx.x * THREADS + threadIdx.x; index < count; index += stride) {
        const float grad = __fmul_rn(scale, grads[index]);
        const float fresh_mean = __fmul_rn(one_minus_beta1, grad);
        const float mean = __fadd_rn(__fmul_rn(beta1, means[index]), fresh_mean);
        const float fresh_square = __fmul_rn(one_minus_beta2, __fmul_rn(grad, grad));
        const float square = __fadd_rn(__fmul_rn(beta2, squares[index]), fresh_square);
        const float corrected = __fmul_rn(square, inverse_square_correction);
        const float root = __fadd_rn(__fsqrt_rn(corrected), epsilon);
        const float step = __fmul_rn(rate, __fdiv_rn(mean, root));
        const float param = __fsub_rn(__fmul_rn(keep, params[index]), step);
        params[index] = param;
        means[index] = mean;
        squares[index] = square;
        const Word key = (first + index) * 0x9e3779b97f4a7c15ULL;
        const Word p = __float_as_uint(param), m = __float_as_uint(mean), s = __float_as_uint(square);
        low += mix(key ^ (p | m << 32));
        high += mix(~key ^ (s | (p ^ m) << 32));
    }
    low = block_sum(low, sums);
    high = block_sum(high, sums);
    if (threadIdx.x == 0) {
        atomicAdd(digest, low);
        atomicAdd(digest + 1, high);
    }
}
