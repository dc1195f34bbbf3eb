// RMSNorm (arXiv 1910.07467) with the residual addition in front of it, and its gradient.
//
//   s = 1/√(mean(x²) + ε)      y = bf16((x·s)·w)
//   forward            y = norm(x)
//   with residual      x = bf16(x + delta), then y = norm(x)
//   backward           g = dy·w      dx = bf16(s·g − (mean(g·x)·s³)·x)      or dx = bf16(dx + …)
//
// x, y, delta, dy, dx: bf16 [rows, cols]; w: fp32 [cols]; all sums in fp32.
//
// A warp takes a row, lane l the runs l, l + 32, … of 8 elements (of 1 where cols is not a multiple of 8). What a lane
// has read stays in registers as bf16, up to KEPT runs; the rest of a longer row is read again, from the caches.
//
// Bytes: forward 4 an element, with residual 8, backward 6 (8 when adding), plus w once. Bound: memory.
#include <reduce.cuh>
#include <vector.cuh>

constexpr u32 ROWS = 8;  // rows of a block, a warp each
constexpr u32 THREADS = ROWS * WARP;

__device__ __forceinline__ float inverse_rms(float squares, u32 cols, float epsilon) {
    return 1.0f / sqrtf(squares / float(cols) + epsilon);
}

// Calls f(run, place) for the runs of this lane: the first KEPT with a place among registers, the others with -1.
template <u32 KEPT, typename F>
__device__ __forceinline__ void over_runs(u32 runs, F f) {
    const u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 k = 0; k < KEPT; k++)
        if (k * WARP + lane < runs) f(k * WARP + lane, int(k));
    for (u32 run = KEPT * WARP + lane; run < runs; run += WARP) f(run, -1);
}

// Runs of 8 that a lane keeps, in 32 registers: rows of 2048.
constexpr u32 KEPT = 8;

// X is global<bf16> with a residual, else global<const bf16>.
template <u32 N, bool RESIDUAL, typename X>
__device__ __forceinline__ void forward(global<bf16> y, X x, global<const bf16> delta, global<const float> weight,
                                        u32 rows, u32 cols, float epsilon) {
    const u32 row = blockIdx.x * ROWS + threadIdx.x / WARP;
    if (row >= rows) return;
    const u64 start = u64(row) * cols;
    vec<bf16, N> kept[KEPT];
    float squares = 0;
    over_runs<KEPT>(cols / N, [&](u32 run, int place) {
        const u64 at = start + run * N;
        vec<bf16, N> packed = load_global<vec<bf16, N>>(x + at);
        float v[N];
        widen(v, packed);
        if constexpr (RESIDUAL) {
            float d[N];
            load_run(d, delta + at);
#pragma unroll
            for (u32 i = 0; i < N; i++) v[i] += d[i];
            packed = narrow(v);
            store_global(x + at, packed);
            widen(v, packed);
        }
        if (place >= 0) kept[place] = packed;
#pragma unroll
        for (u32 i = 0; i < N; i++) squares += v[i] * v[i];
    });
    const float s = inverse_rms(warp_sum(squares), cols, epsilon);
    over_runs<KEPT>(cols / N, [&](u32 run, int place) {
        const u64 at = start + run * N;
        float v[N], w[N];
        widen(v, place >= 0 ? kept[place] : load_global<vec<bf16, N>>(x + at));
        load_run(w, weight + run * N);
#pragma unroll
        for (u32 i = 0; i < N; i++) v[i] = v[i] * s * w[i];
        store_run(y + at, v);
    });
}

// Of x and of dy: rows of 1024, in 32 registers.
constexpr u32 KEPT_BACKWARD = 4;

template <u32 N, bool ADD>
__device__ __forceinline__ void backward(global<bf16> dx, global<const bf16> dy, global<const bf16> x,
                                         global<const float> weight, u32 rows, u32 cols, float epsilon) {
    const u32 row = blockIdx.x * ROWS + threadIdx.x / WARP;
    if (row >= rows) return;
    const u64 start = u64(row) * cols;
    vec<bf16, N> kept_x[KEPT_BACKWARD], kept_dy[KEPT_BACKWARD];
    float squares = 0, products = 0;
    auto take = [&](float(&v)[N], float(&g)[N], const vec<bf16, N>& px, const vec<bf16, N>& pdy, u32 run) {
        float w[N];
        load_run(w, weight + run * N);
        widen(v, px);
        widen(g, pdy);
#pragma unroll
        for (u32 i = 0; i < N; i++) g[i] = g[i] * w[i];
    };
    over_runs<KEPT_BACKWARD>(cols / N, [&](u32 run, int place) {
        const u64 at = start + run * N;
        const vec<bf16, N> px = load_global<vec<bf16, N>>(x + at), pdy = load_global<vec<bf16, N>>(dy + at);
        if (place >= 0) kept_x[place] = px, kept_dy[place] = pdy;
        float v[N], g[N];
        take(v, g, px, pdy, run);
#pragma unroll
        for (u32 i = 0; i < N; i++) squares += v[i] * v[i], products += g[i] * v[i];
    });
    const float s = inverse_rms(warp_sum(squares), cols, epsilon);
    const float c = warp_sum(products) / float(cols) * (s * s * s);
    over_runs<KEPT_BACKWARD>(cols / N, [&](u32 run, int place) {
        const u64 at = start + run * N;
        float v[N], g[N], d[N];
        take(v, g, place >= 0 ? kept_x[place] : load_global<vec<bf16, N>>(x + at),
             place >= 0 ? kept_dy[place] : load_global<vec<bf16, N>>(dy + at), run);
        if constexpr (ADD) load_run(d, dx + at);
#pragma unroll
        for (u32 i = 0; i < N; i++) d[i] = ADD ? d[i] + (s * g[i] - c * v[i]) : s * g[i] - c * v[i];
        store_run(dx + at, d);
    });
}

#define FORWARD(name, N)                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS)                                               \
        name(global<bf16> y, global<const bf16> x, global<const float> weight, u32 rows, u32 cols,      \
             float epsilon) {                                                                           \
        forward<N, false>(y, x, nullptr, weight, rows, cols, epsilon);                                  \
    }                                                                                                   \
    ENTRY(name)
FORWARD(rms_norm_8, 8)
FORWARD(rms_norm_1, 1)

#define FORWARD_RESIDUAL(name, N)                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS)                                               \
        name(global<bf16> y, global<bf16> x, global<const bf16> delta, global<const float> weight,      \
             u32 rows, u32 cols, float epsilon) {                                                       \
        forward<N, true>(y, x, delta, weight, rows, cols, epsilon);                                     \
    }                                                                                                   \
    ENTRY(name)
FORWARD_RESIDUAL(rms_norm_residual_8, 8)
FORWARD_RESIDUAL(rms_norm_residual_1, 1)

#define BACKWARD(name, N, ADD)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                 \
        name(global<bf16> dx, global<const bf16> dy, global<const bf16> x, global<const float> weight,    \
             u32 rows, u32 cols, float epsilon) {                                                         \
        backward<N, ADD>(dx, dy, x, weight, rows, cols, epsilon);                                         \
    }                                                                                                     \
    ENTRY(name)
BACKWARD(rms_norm_backward_8, 8, false)
BACKWARD(rms_norm_backward_1, 1, false)
BACKWARD(rms_norm_backward_add_8, 8, true)
BACKWARD(rms_norm_backward_add_1, 1, true)
