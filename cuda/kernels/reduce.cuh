// Sums and maxima over a warp and a block, in one fixed order. Every thread gets the result.
//
// Over a warp: a butterfly over the distances 16, 8, 4, 2, 1. Addition commutes, so all lanes compute the same bits.
// Over a block: each warp its own, then the first warp over the warps' results.
#pragma once
#include <device.cuh>

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (u32 distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(FULL, x, distance);
    return x;
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (u32 distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(FULL, x, distance);
    return x;
}

// The larger; NaN if either is.
__device__ __forceinline__ float larger(float x, float y) { return x > y || x != x ? x : y; }

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (u32 distance = 16; distance > 0; distance /= 2) x = larger(x, __shfl_xor_sync(FULL, x, distance));
    return x;
}

// THREADS is blockDim.x, a multiple of 32. Two barriers. TAG tells uses in one kernel apart, so that the storage of one
// can be written while the last is still being read.
template <u32 THREADS, u32 TAG, typename T>
__device__ __forceinline__ T block_sum(T x) {
    constexpr u32 WARPS = THREADS / WARP;
    x = warp_sum(x);
    if (WARPS == 1) return x;
    shared<T> partial = static_shared<T, WARPS, TAG>();
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (lane == 0) store_shared(partial + warp, x);
    __syncthreads();
    // All warps add all partial sums: nothing has to be handed back.
    x = warp_sum(lane < WARPS ? load_shared<T>(partial + lane) : T(0));
    __syncthreads();
    return x;
}

template <u32 THREADS, u32 TAG>
__device__ __forceinline__ float block_max(float x) {
    constexpr u32 WARPS = THREADS / WARP;
    x = warp_max(x);
    if (WARPS == 1) return x;
    shared<float> partial = static_shared<float, WARPS, TAG>();
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (lane == 0) store_shared(partial + warp, x);
    __syncthreads();
    x = warp_max(load_shared<float>(partial + (lane < WARPS ? lane : 0)));
    __syncthreads();
    return x;
}
