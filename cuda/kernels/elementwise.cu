// Flat operations: add, scale, cast.
//
//   add_bf16       y[i] = bf16(y[i] + x[i])        6 bytes an element
//   scale_f32      x[i] = factor · x[i]            8
//   cast_to_bf16   y[i] = bf16(x[i])               6
//   cast_to_f32    y[i] = x[i]                     6
//
// Bound: memory. A thread moves 16 bytes of the widest array (8 or 4 elements); nothing is read twice.
#include <vector.cuh>

extern "C" __global__ void __launch_bounds__(FLAT_THREADS) add_bf16(global<bf16> y, global<const bf16> x, u64 count) {
    over_elements<8>(count, [&](auto width, u64 i) {
        constexpr u32 N = decltype(width)::value;
        float a[N], b[N];
        load_run(a, y + i);
        load_run(b, x + i);
#pragma unroll
        for (u32 j = 0; j < N; j++) a[j] += b[j];
        store_run(y + i, a);
    });
}
ENTRY(add_bf16)

extern "C" __global__ void __launch_bounds__(FLAT_THREADS) scale_f32(global<float> x, float factor, u64 count) {
    over_elements<4>(count, [&](auto width, u64 i) {
        constexpr u32 N = decltype(width)::value;
        float a[N];
        load_run(a, x + i);
#pragma unroll
        for (u32 j = 0; j < N; j++) a[j] *= factor;
        store_run(x + i, a);
    });
}
ENTRY(scale_f32)

extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
    cast_to_bf16(global<bf16> y, global<const float> x, u64 count) {
    over_elements<4>(count, [&](auto width, u64 i) {
        constexpr u32 N = decltype(width)::value;
        float a[N];
        load_run(a, x + i);
        store_run(y + i, a);
    });
}
ENTRY(cast_to_bf16)

extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
    cast_to_f32(global<float> y, global<const bf16> x, u64 count) {
    over_elements<4>(count, [&](auto width, u64 i) {
        constexpr u32 N = decltype(width)::value;
        float a[N];
        load_run(a, x + i);
        store_run(y + i, a);
    });
}
ENTRY(cast_to_f32)
