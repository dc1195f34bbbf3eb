// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four random words for a counter
// and a key, with no state. The same function as daemon/backend/philox.rs.
#pragma once
#include <device.cuh>

__device__ __forceinline__ vec<u32, 4> philox4x32(vec<u32, 4> counter, u32 key0, u32 key1) {
#pragma unroll
    for (u32 round = 0; round < 10; round++) {
        if (round > 0) key0 += 0x9e3779b9u, key1 += 0xbb67ae85u;
        const u64 a = u64(0xd2511f53u) * counter[0], b = u64(0xcd9e8d57u) * counter[2];
        counter = vec<u32, 4>{{u32(b >> 32) ^ counter[1] ^ key0, u32(b), u32(a >> 32) ^ counter[3] ^ key1, u32(a)}};
    }
    return counter;
}
