// Cross-entropy of a chunk of labelled rows, with the gradient in the place of the logits.
//
//   loss[r] = ln Σ e^(x[r] − max) − (x[r, target] − max)
//   g[r, i] = bf16(e^(x[r, i] − max) / Σ − [i = target])        not divided by the number of tokens
//
// logits x: fp32 [rows, stride] of which `vocabulary` columns count, stride a multiple of 8; targets: i32 [rows], inside
// the vocabulary; loss: fp64 [rows]. The gradient lies where the logits lay: row r is bf16 [stride] from the byte where row
// r of the logits began (so its rows are 2·stride elements apart), zero from `vocabulary` to `stride`.
//
// In place without a copy: a block writes elements [c·W, (c+1)·W) as bf16 after it has read them as fp32. Their bytes are
// those of the fp32 elements [c·W/2, (c+1)·W/2), all of which were read before the barrier of step c.
//
// A block takes a row. First pass: each thread keeps the maximum and the sum of its elements, rescaled when the maximum
// grows, then both are combined in a fixed order. Second pass: the gradient.
//
// Bytes: 10 an element (4 + 4 read, 2 written), the second read from the second-level cache as far as it holds the row;
// 4 without the gradient. Bound: memory.
#include <reduce.cuh>
#include <vector.cuh>

constexpr u32 THREADS = 512;
constexpr u32 RUN = 8;
constexpr u32 STEP = THREADS * RUN;
// Below every finite logit, and finite: the difference to itself is 0 and not NaN.
constexpr float LOWEST = -3.402823466e38f;

// Calls f(first, values) for this thread's runs of a row; values beyond the vocabulary are −infinity.
template <typename F>
__device__ __forceinline__ void over_row(global<float> row, u32 vocabulary, F f) {
    for (u32 first = threadIdx.x * RUN; first < vocabulary; first += STEP) {
        float x[RUN];
        load_run(x, row + first);
#pragma unroll
        for (u32 j = 0; j < RUN; j++)
            if (first + j >= vocabulary) x[j] = -__int_as_float(0x7f800000);
        f(x);
    }
}

struct Softmax {
    float most, sum;
};

__device__ __forceinline__ Softmax softmax_of_row(global<float> row, u32 vocabulary) {
    float most = LOWEST, sum = 0;
    over_row(row, vocabulary, [&](const float(&x)[RUN]) {
        float larger_one = most;
#pragma unroll
        for (u32 j = 0; j < RUN; j++) larger_one = larger(x[j], larger_one);
        sum *= expf(most - larger_one);
        most = larger_one;
#pragma unroll
        for (u32 j = 0; j < RUN; j++) sum += expf(x[j] - most);
    });
    const float top = block_max<THREADS, 0>(most);
    return {top, block_sum<THREADS, 1>(sum * expf(most - top))};
}

template <bool GRADIENT>
__device__ __forceinline__ void cross_entropy(global<double> loss, global<float> logits, global<const i32> targets,
                                              u32 vocabulary, u32 stride) {
    const u32 r = blockIdx.x;
    global<float> row = logits + u64(r) * stride;
    const u32 target = u32(load_global<i32>(targets + r));
    const float at_target = load_global<float>(row + target);
    const Softmax s = softmax_of_row(row, vocabulary);
    if (threadIdx.x == 0) store_global(loss + r, double(logf(s.sum)) - double(at_target - s.most));
    if constexpr (GRADIENT) {
        global<bf16> out = global_cast<bf16>(row);
        const float inverse = 1.0f / s.sum;
        for (u32 base = 0; base < stride; base += STEP) {
            const u32 first = base + threadIdx.x * RUN;
            float x[RUN];
            if (first < stride) load_run(x, row + first);
            __syncthreads();
            if (first >= stride) continue;
#pragma unroll
            for (u32 j = 0; j < RUN; j++) {
                x[j] = expf(x[j] - s.most) * inverse;
                if (first + j == target) x[j] -= 1.0f;
                if (first + j >= vocabulary) x[j] = 0;
            }
            store_run(out + first, x);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy_loss(global<double> loss, global<float> logits, global<const i32> targets, u32 vocabulary, u32 stride) {
    cross_entropy<false>(loss, logits, targets, vocabulary, stride);
}
ENTRY(cross_entropy_loss)

extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy_gradient(global<double> loss, global<float> logits, global<const i32> targets, u32 vocabulary,
                           u32 stride) {
    cross_entropy<true>(loss, logits, targets, vocabulary, stride);
}
ENTRY(cross_entropy_gradient)
