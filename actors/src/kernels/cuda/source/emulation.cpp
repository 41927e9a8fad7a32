// The kernels as functions of a CPU, in one library for the tests.
#include "emulation.hpp"

#include "adamw.cu"
#include "affine.cu"
#include "attention.cu"
#include "convolution.cu"
#include "cross_entropy.cu"
#include "dropout.cu"
#include "embedding.cu"
#include "gelu.cu"
#include "layer_norm.cu"
#include "product.cu"
#include "softmax.cu"
#include "tree_add.cu"

#include <utility>

namespace emulation {

/// Calls a kernel with arguments as cuLaunchKernel takes them: pointers to values of the declared types.
template <typename... Parameters, size_t... Index>
static std::function<void()> bound(void (*kernel)(Parameters...), void **arguments, std::index_sequence<Index...>) {
    return [=] { kernel(*static_cast<Parameters *>(arguments[Index])...); };
}

template <typename... Parameters>
static std::function<void()> bound(void (*kernel)(Parameters...), void **arguments) {
    return bound(kernel, arguments, std::index_sequence_for<Parameters...>());
}

/// How many bytes each parameter has; what a caller must have put there.
template <typename... Parameters>
static std::vector<size_t> sizes(void (*)(Parameters...)) {
    return {sizeof(Parameters)...};
}

struct Called {
    std::function<void()> kernel;
    std::vector<size_t> sizes;
};

template <typename Kernel>
static Called called(Kernel kernel, void **arguments) {
    return {bound(kernel, arguments), sizes(kernel)};
}

static Called find(const char *name, void **arguments) {
#define KERNEL(NAME)                                                                                                  \
    if (std::strcmp(name, #NAME) == 0) {                                                                              \
        return called(NAME, arguments);                                                                               \
    }
    KERNEL(adamw)
    KERNEL(add_bias)
    KERNEL(rectifier_backward)
    KERNEL(column_sums)
    KERNEL(attention_scores)
    KERNEL(attention_shares)
    KERNEL(attention_forward)
    KERNEL(attention_slopes)
    KERNEL(attention_scores_backward)
    KERNEL(attention_backward)
    KERNEL(patches)
    KERNEL(patches_backward)
    KERNEL(cross_entropy)
    KERNEL(dropout)
    KERNEL(embedding_forward)
    KERNEL(embedding_backward)
    KERNEL(gelu_forward)
    KERNEL(gelu_backward)
    KERNEL(layer_norm_forward)
    KERNEL(layer_norm_backward)
    KERNEL(layer_norm_moments)
    KERNEL(layer_norm_parameters_backward)
    KERNEL(product_128)
    KERNEL(product_64)
    KERNEL(product_32)
    KERNEL(softmax_forward)
    KERNEL(softmax_backward)
    KERNEL(tree_add)
    KERNEL(tree_fold)
#undef KERNEL
    return {};
}

} // namespace emulation

/// 0: it ran. 1: the threads of a block came to different barriers. 2: no such kernel. 3: it takes other arguments.
extern "C" int emulate(const char *name, const unsigned *grid, unsigned threads, int descending, void **arguments,
                       const size_t *sizes, size_t count) {
    emulation::Called called = emulation::find(name, arguments);
    if (!called.kernel) {
        return 2;
    }
    if (called.sizes != std::vector<size_t>(sizes, sizes + count)) {
        return 3;
    }
    return emulation::launch(grid, threads, descending != 0, called.kernel) ? 0 : 1;
}
