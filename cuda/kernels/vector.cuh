// Runs of elements as floats: 8 bf16 are one access of 16 bytes, 8 floats are two.
#pragma once
#include <device.cuh>

// A number of elements as a type, to be handed to a generic lambda.
template <u32 N>
struct Width {
    static constexpr u32 value = N;
};

// Threads of a block of a flat operation.
constexpr u32 FLAT_THREADS = 256;

// To floats, exactly; to bf16, nearest.
template <u32 N>
__device__ __forceinline__ void widen(float (&x)[N], const vec<bf16, N>& packed) {
    if constexpr (N % 2 == 0) {
        const vec<u32, N / 2> pairs = bits_as<vec<u32, N / 2>>(packed);
#pragma unroll
        for (u32 i = 0; i < N / 2; i++) x[2 * i] = low_f32(pairs[i]), x[2 * i + 1] = high_f32(pairs[i]);
    } else {
        static_assert(N == 1, "runs are even or of 1");
        x[0] = to_f32(packed[0]);
    }
}

template <u32 N>
__device__ __forceinline__ vec<bf16, N> narrow(const float (&x)[N]) {
    if constexpr (N % 2 == 0) {
        vec<u32, N / 2> pairs;
#pragma unroll
        for (u32 i = 0; i < N / 2; i++) pairs[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
        return bits_as<vec<bf16, N>>(pairs);
    } else {
        static_assert(N == 1, "runs are even or of 1");
        return vec<bf16, 1>{{to_bf16(x[0])}};
    }
}

// N elements at p, which is aligned to a run. T is bf16, const bf16, float or const float.
template <u32 N, typename T>
__device__ __forceinline__ void load_run(float (&x)[N], global<T> p) {
    if constexpr (sizeof(T) == 2) {
        widen(x, load_global<vec<bf16, N>>(p));
    } else {
        constexpr u32 FOUR = N < 4 ? N : 4;
#pragma unroll
        for (u32 i = 0; i < N; i += FOUR) {
            const vec<float, FOUR> part = load_global<vec<float, FOUR>>(p + i);
#pragma unroll
            for (u32 j = 0; j < FOUR; j++) x[i + j] = part[j];
        }
    }
}

template <u32 N>
__device__ __forceinline__ void store_run(global<bf16> p, const float (&x)[N]) {
    store_global(p, narrow(x));
}

template <u32 N>
__device__ __forceinline__ void store_run(global<float> p, const float (&x)[N]) {
    constexpr u32 FOUR = N < 4 ? N : 4;
#pragma unroll
    for (u32 i = 0; i < N; i += FOUR) {
        vec<float, FOUR> part;
#pragma unroll
        for (u32 j = 0; j < FOUR; j++) part[j] = x[i + j];
        store_global(p + i, part);
    }
}

// Calls f(Width<RUN>, first element) for this thread's run of `count` elements, or f(Width<1>, element) for each of a
// last short run. RUN is 16 bytes of the widest array, so that a warp uses all of every sector it touches.
template <u32 RUN, typename F>
__device__ __forceinline__ void over_elements(u64 count, F f) {
    const u64 first = (u64(blockIdx.x) * FLAT_THREADS + threadIdx.x) * RUN;
    if (first + RUN <= count)
        f(Width<RUN>{}, first);
    else
        for (u64 i = first; i < count; i++) f(Width<1>{}, i);
}
