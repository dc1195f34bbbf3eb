// AdamW for all adapters at once, with the clipping of the global norm: two launches a step.
//
//   square_sum    partial[b] = Σ g² over the chunk b of the gradients, in fp64
//   adamw         norm = √(Σ partial)·scale      clip = max_norm > 0 ? min(1, max_norm/(norm + 1e-6)) : 1
//                 g ← g·float(scale·clip)
//                 m ← β₁·m + (1 − β₁)·g      v ← β₂·v + (1 − β₂)·g²
//                 p ← p·(1 − lr·wd) − step_size·(m/(√v/root + ε))      working ← bf16(p)
//
// with step_size = lr/(1 − β₁ᵗ), root = √(1 − β₂ᵗ), computed on the host in fp64; the order of operations is that of
// torch.optim.AdamW. The tensors of all adapters lie one after the other in flat arrays of `count` elements: p, g, m, v
// fp32, working bf16. `scale` is 1/labelled tokens.
//
// Order: the gradients are cut into at most PARTIALS chunks, a function of `count` alone; within a chunk thread t of 256
// takes the elements 4t, 4t + 1024, … in order, then the block's threads are added by a butterfly, then every block of the
// second launch adds the partial sums, thread i the partial sum i, by the same butterfly.
//
// Bytes: square_sum 4 an element; adamw 30 (16 read, 12 + 2 written). Bound: memory. fp64: one multiply and add an element,
// 1/64 of the fp32 rate on Orin: a third of the time that the memory takes, in other units.
#include <reduce.cuh>
#include <vector.cuh>

constexpr u32 PARTIALS = 256;
constexpr u32 RUN = 4;
static_assert(PARTIALS == FLAT_THREADS, "each thread of a block takes one partial sum");

extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
    square_sum(global<double> partial, global<const float> x, u64 count, u64 chunk) {
    const u64 start = blockIdx.x * chunk, end = min(start + chunk, count);
    double sum = 0;
    for (u64 i = start + threadIdx.x * RUN; i < end; i += FLAT_THREADS * RUN) {
        float v[RUN];
        if (i + RUN <= end)
            load_run(v, x + i);
        else
#pragma unroll
            for (u32 j = 0; j < RUN; j++) v[j] = i + j < end ? load_global<float>(x + i + j) : 0;
#pragma unroll
        for (u32 j = 0; j < RUN; j++) sum += double(v[j]) * double(v[j]);
    }
    sum = block_sum<FLAT_THREADS, 0>(sum);
    if (threadIdx.x == 0) store_global(partial + blockIdx.x, sum);
}
ENTRY(square_sum)

// AdamWConstants of cuda/src/ops/adamw.rs.
struct Constants {
    double scale, max_norm;
    float step_size, root, decay, beta1, beta2, rest1, rest2, epsilon;
};

// `norm` receives the norm before clipping.
extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
    adamw(global<float> value, global<bf16> working, global<float> m, global<float> v, global<double> norm,
          global<const float> gradient, global<const double> partial, u32 partials, Constants c, u64 count) {
    const double mine = threadIdx.x < partials ? load_global<double>(partial + threadIdx.x) : 0.0;
    const double total = sqrt(block_sum<FLAT_THREADS, 0>(mine)) * c.scale;
    if (blockIdx.x == 0 && threadIdx.x == 0) store_global(norm, total);
    // Not `min`, which would hide a NaN.
    const double clip = c.max_norm / (total + 1e-6);
    const float scale = float(c.max_norm > 0 && !(clip >= 1.0) ? clip * c.scale : c.scale);
    over_elements<RUN>(count, [&](auto width, u64 i) {
        constexpr u32 N = decltype(width)::value;
        float p[N], g[N], first[N], second[N];
        load_run(p, value + i);
        load_run(g, gradient + i);
        load_run(first, m + i);
        load_run(second, v + i);
#pragma unroll
        for (u32 j = 0; j < N; j++) {
            const float x = g[j] * scale;
            first[j] = c.beta1 * first[j] + c.rest1 * x;
            second[j] = c.beta2 * second[j] + c.rest2 * (x * x);
            const float denominator = sqrtf(second[j]) / c.root + c.epsilon;
            p[j] = p[j] * c.decay - c.step_size * (first[j] / denominator);
        }
        store_run(value + i, p);
        store_run(working + i, p);
        store_run(m + i, first);
        store_run(v + i, second);
    });
}
ENTRY(adamw)
