// What the attention kernels share: which keys a query sees, and which tile of which example a block takes.
#pragma once
#include <device.cuh>

constexpr float LOG2_E = 1.44269504088896340736f;

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

// Positions are counted from the start of the example. A window of 2³² − 1 is none. A key behind the query gives a
// difference that wraps around to more than any position, so one comparison is enough.
__device__ __forceinline__ bool sees(u32 query, u32 key, u32 window) { return query - key < min(window, query + 1); }

// First key that a query sees; the last is its own.
__device__ __forceinline__ u32 first_key_of(u32 query, u32 window) {
    return query >= window ? query - window + 1 : 0;
}

// One past the last query that sees a key; the first is its own.
__device__ __forceinline__ u32 end_of_queries_of(u32 key, u32 len, u32 window) {
    return len - key > window ? key + window : len;
}

// A run of tokens of one example.
struct Tile {
    u32 start;  // of the example, in the batch
    u32 len;    // of the example
    u32 first;  // of the tile, in the example
};

// warp: tile `index` of ROWS tokens of the batch, false when there are fewer. Tiles begin where their example begins, so
// that what is computed for a token is a function of its example. Takes 32 examples a step; every lane gets the result.
template <u32 ROWS>
__device__ __forceinline__ bool find_tile(Tile& tile, global<const u32> cu_seqlens, u32 sequences, u32 index) {
    const u32 lane = threadIdx.x % WARP;
#pragma unroll 1
    for (u32 base = 0; base < sequences; base += WARP) {
        u32 start = 0, len = 0;
        if (base + lane < sequences) {
            start = load_global<u32>(cu_seqlens + base + lane);
            len = load_global<u32>(cu_seqlens + base + lane + 1) - start;
        }
        const u32 tiles = (len + ROWS - 1) / ROWS;
        u32 end = tiles;  // of the tiles of the examples up to this lane's
#pragma unroll
        for (u32 distance = 1; distance < WARP; distance *= 2) {
            const u32 before = __shfl_up_sync(FULL, end, distance);
            if (lane >= distance) end += before;
        }
        const u32 found = __ballot_sync(FULL, index < end);
        if (found != 0) {
            const u32 owner = u32(__ffs(i32(found))) - 1;
            tile.start = __shfl_sync(FULL, start, owner);
            tile.len = __shfl_sync(FULL, len, owner);
            tile.first = (index - __shfl_sync(FULL, end - tiles, owner)) * ROWS;
            return true;
        }
        index -= __shfl_sync(FULL, end, WARP - 1);
    }
    return false;
}

// What a launch is for. `Shape` of ops/attention.rs, in this order.
struct Attention {
    u32 sequences, heads, kv_heads, head_dim, window;
    float scale;
};
