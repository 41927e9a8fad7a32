// Dropout by the number of the sample, in the order of training/models/layers/dropout.rs: Philox 4x32 with ten rounds
// (training/random.rs) draws four values' bits at a time.

typedef unsigned long long Word;

#define THREADS 256

struct Draw {
    unsigned words[4];
};

__device__ inline Draw philox(Draw counter, unsigned key, unsigned other_key) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const Word even = (Word)0xD2511F53u * counter.words[0];
        const Word odd = (Word)0xCD9E8D57u * counter.words[2];
        const Draw next = {{(unsigned)(odd >> 32) ^ counter.words[1] ^ key, (unsigned)odd,
                            (unsigned)(even >> 32) ^ counter.words[3] ^ other_key, (unsigned)even}};
        counter = next;
        key += 0x9E3779B9u;
        other_key += 0xBB67AE85u;
    }
    return counter;
}

/// Each value is dropped whose bits are below `threshold`; the others are multiplied by `scale`. A sample has
/// `sample_values`, and the first one the number `first_sample`. A thread takes four values of a sample.
extern "C" __global__ void __launch_bounds__(THREADS)
    dropout(const float *values, float *result, int samples, int sample_values, Word first_sample, int key,
            int other_key, int threshold, float scale) {
    const unsigned draws = (sample_values + 3) / 4;
    const unsigned stride = gridDim.x * THREADS;
    for (unsigned index = blockIdx.x * THREADS + threadIdx.x; index < samples * draws; index += stride) {
        const unsigned row = index / draws, draw = index % draws;
        const Word sample = first_sample + row;
        const Draw counter = {{(unsigned)sample, (unsigned)(sample >> 32), draw, 0u}};
        const Draw bits = philox(counter, (unsigned)key, (unsigned)other_key);
#pragma unroll
        for (int each = 0; each < 4; each++) {
            const unsigned within = 4 * draw + each;
            const unsigned place = row * sample_values + within;
            if (within < (unsigned)sample_values) {
                const bool is_dropped = bits.words[each] < (unsigned)threshold;
                result[place] = is_dropped ? 0.0f : __fmul_rn(values[place], scale);
            }
        }
    }
}
