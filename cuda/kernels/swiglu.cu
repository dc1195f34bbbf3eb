// The gate of a gated MLP, and its gradient in place.
//
//   s = 1/(1 + e^−gate)
//   forward     out = bf16((gate·s)·up)
//   backward    gate ← bf16(dout·up·(s·(1 + gate·(1 − s))))      up ← bf16(dout·(gate·s))
//
// All bf16, flat. `out` is a buffer of its own. The backward pass recomputes s: reading it would cost more.
//
// Bytes: forward 6 an element, backward 10. Bound: memory; the exponential and the division hide behind it.
#include <vector.cuh>

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
    swiglu(global<bf16> out, global<const bf16> gate, global<const bf16> up, u64 count) {
    over_elements<8>(count, [&](auto width, u64 i) {
        constexpr u32 N = decltype(width)::value;
        float g[N], u[N];
        load_run(g, gate + i);
        load_run(u, up + i);
#pragma unroll
        for (u32 j = 0; j < N; j++) g[j] = g[j] * sigmoid(g[j]) * u[j];
        store_run(out + i, g);
    });
}
ENTRY(swiglu)

extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
    swiglu_backward(global<bf16> gate, global<bf16> up, global<const bf16> dout, u64 count) {
    over_elements<8>(count, [&](auto width, u64 i) {
        constexpr u32 N = decltype(width)::value;
        float g[N], u[N], d[N];
        load_run(g, gate + i);
        load_run(u, up + i);
        load_run(d, dout + i);
#pragma unroll
        for (u32 j = 0; j < N; j++) {
            const float x = g[j], s = sigmoid(x);
            g[j] = d[j] * u[j] * (s * (1.0f + x * (1.0f - s)));
            u[j] = d[j] * (x * s);
        }
        store_run(gate + i, g);
        store_run(up + i, u);
    });
}
ENTRY(swiglu_backward)
