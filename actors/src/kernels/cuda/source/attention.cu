// Causal attention and its gradient, in the order of kernels/attention.rs.
//
// A window has `context` tokens; a row of `projected` holds the queries of all heads, then their keys, then their values.
// What a token has to say of those up to it lies in a row of `context` values for each token and head. Those after it up
// to the end of its block count as zero and are written so; of those behind the block nothing is written or read.

#include "lanes.cuh"

#define THREADS 256

/// Queries that the CPU multiplies together.
#define BLOCK 32

/// Tokens up to the end of a token's block.
__device__ inline int block_end(int token, int context) {
    const int end = (token / BLOCK + 1) * BLOCK;
    return end < context ? end : context;
}

/// Sum of products, as one chain.
__device__ inline float dot(const float *a, const float *b, int size) {
    float sum = 0.0f;
    for (int index = 0; index < size; index++) {
        sum = __fmaf_rn(a[index], b[index], sum);
    }
    return sum;
}

/// For each query and each token up to its own: `dot` of two parts of their rows, times `scale`. `queries` and `others`
/// point to the first head's part in the first row, rows are `query_stride` and `other_stride` apart.
__device__ inline void pairs(const float *queries, int query_stride, const float *others, int other_stride,
                             float *result, long long count, int context, int heads, int size, float scale) {
    const long long step = (long long)gridDim.x * THREADS;
    for (long long index = (long long)blockIdx.x * THREADS + threadIdx.x; index < count; index += step) {
        const int other = (int)(index % context);
        const int head = (int)(index / context % heads);
        const long long row = index / context / heads;
        const int token = (int)(row % context);
        if (other <= token) {
            const float *query = queries + row * query_stride + head * size;
            const float *partner = others + (row - token + other) * other_stride + head * size;
            result[index] = __fmul_rn(dot(query, partner, size), scale);
        }
    }
}

/// The score of each query and key.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_scores(const float *projected, float *scores, long long count, int context, int heads, int size,
                     float scale) {
    const int width = heads * size;
    pairs(projected, 3 * width, projected + width, 3 * width, scores, count, context, heads, size, scale);
}

/// Of the gradient of the result, that of each query's share of each value.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_slopes(const float *projected, const float *gradient, float *slopes, long long count, int context,
                     int heads, int size) {
    const int width = heads * size;
    // A multiplication by one changes no bit.
    pairs(gradient, width, projected + 2 * width, 3 * width, slopes, count, context, heads, size, 1.0f);
}

/// As `find_row`, of rows of `context` values, and how many of them there are. Threads without a row go along with the
/// last one, whatever they read there, and write nothing.
__device__ inline bool find_query(long long rows, int context, int heads, long long &row, int &known) {
    const bool exists = find_row(rows, row);
    known = (int)(row / heads % context) + 1;
    return exists;
}

/// Scores become shares, in place: their softmax, in the order of softmax.cu. Sixteen threads a row.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_shares(float *scores, long long rows, int context, int heads) {
    long long row;
    int known;
    const bool exists = find_query(rows, context, heads, row, known);
    const int lane = threadIdx.x % LANES;
    scores += row * context;
    float largest = -infinity();
    for (int other = lane; other < known; other += LANES) {
        largest = larger(scores[other], largest);
    }
    largest = lane_largest(largest);
    float sum = 0.0f;
    for (int other = lane; other < known; other += LANES) {
        sum = __fadd_rn(sum, exponential(__fsub_rn(scores[other], largest)));
    }
    sum = lane_sum(sum);
    const int end = block_end(known - 1, context);
    for (int other = lane; other < end; other += LANES) {
        if (exists) {
            const bool is_known = other < known;
            scores[other] = is_known ? __fdiv_rn(exponential(__fsub_rn(scores[other], largest)), sum) : 0.0f;
        }
    }
}

/// Slopes of shares become slopes of scores, in place: share (slope - mean) scale, where the mean is the sum of shares
/// times slopes. Sixteen threads a row.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_scores_backward(const float *shares, float *slopes, long long rows, int context, int heads,
                              float scale) {
    long long row;
    int known;
    const bool exists = find_query(rows, context, heads, row, known);
    const int lane = threadIdx.x % LANES;
    shares += row * context;
    slopes += row * context;
    float mean = 0.0f;
    for (int other = lane; other < known; other += LANES) {
        mean = __fmaf_rn(slopes[other], shares[other], mean);
    }
    mean = lane_sum(mean);
    const int end = block_end(known - 1, context);
    for (int other = lane; other < end; other += LANES) {
        if (exists) {
            const bool is_known = other < known;
            const float centred = is_known ? __fsub_rn(slopes[other], mean) : 0.0f;
            slopes[other] = is_known ? __fmul_rn(__fmul_rn(shares[other], centred), scale) : 0.0f;
        }
    }
}

/// The values, as each token shares them: a thread for each column of each row.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_forward(const float *projected, const float *shares, float *result, long long count, int context,
                      int heads, int size) {
    const int width = heads * size;
    const long long step = (long long)gridDim.x * THREADS;
    for (long long index = (long long)blockIdx.x * THREADS + threadIdx.x; index < count; index += step) {
        const int column = (int)(index % width), head = column / size;
        const long long row = index / width;
        const int token = (int)(row % context);
        const float *of_query = shares + (row * heads + head) * context;
        const float *value = projected + (row - token) * 3 * width + 2 * width + column;
        float sum = 0.0f;
        const int end = block_end(token, context);
        for (int other = 0; other < end; other++) {
            sum = __fmaf_rn(of_query[other], value[(long long)other * 3 * width], sum);
        }
        result[index] = sum;
    }
}

/// The gradient of the projected rows, a thread for each column of each row. A query's goes through the keys up to the end
/// of its block, a key's and a value's through the queries from the beginning of theirs on, both in ascending order.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_backward(const float *projected, const float *gradient, const float *shares, const float *score_slopes,
                       float *result, long long count, int context, int heads, int size) {
    const int width = heads * size;
    const long long step = (long long)gridDim.x * THREADS;
    for (long long index = (long long)blockIdx.x * THREADS + threadIdx.x; index < count; index += step) {
        const int which = (int)(index % (3 * width)) / width, column = (int)(index % width), head = column / size;
        const long long row = index / (3 * width);
        const int token = (int)(row % context);
        const long long first = row - token;
        float sum = 0.0f;
        if (which == 0) {
            const float *slopes = score_slopes + (row * heads + head) * context;
            const float *keys = projected + first * 3 * width + width + column;
            const int end = block_end(token, context);
            for (int other = 0; other < end; other++) {
                sum = __fmaf_rn(slopes[other], keys[(long long)other * 3 * width], sum);
            }
        } else {
            const float *factors = (which == 1 ? score_slopes : shares) + (first * heads + head) * context + token;
            const float *from = which == 1 ? projected + first * 3 * width + column : gradient + first * width + column;
            const int from_stride = which == 1 ? 3 * width : width;
            for (int query = token / BLOCK * BLOCK; query < context; query++) {
                const float factor = factors[(long long)query * heads * context];
                sum = __fmaf_rn(factor, from[(long long)query * from_stride], sum);
            }
        }
        result[index] = sum;
    }
}
