// Rotary position embedding of queries and keys, in place, and its gradient (the rotation back).
//
//   (x[i], x[i + d/2]) ← (x[i]·cos − x[i + d/2]·sin, x[i + d/2]·cos + x[i]·sin)      angle = position · frequency[i]
//
// q: bf16 [tokens, heads, d]; k: bf16 [tokens, kv_heads, d] (kv_heads may be 0); positions: u32 [tokens]; cos, sin: fp32
// [longest, d/2], made on the host with the magnitude multiplied in, so that the angles are those of the CPU backend to
// the bit. `direction` is +1, or −1 for the gradient. Products and sum in fp32, one rounding to bf16.
//
// A thread takes 8 pairs (1 where d/2 is not a multiple of 8). Bytes: 4 an element, the tables come from the caches.
// Bound: memory.
#include <vector.cuh>

template <u32 N>
__device__ __forceinline__ void rotate(global<bf16> q, global<bf16> k, global<const u32> positions,
                                       global<const float> cos, global<const float> sin, u32 tokens, u32 heads,
                                       u32 kv_heads, u32 half, float direction) {
    const u32 runs = half / N, all_heads = heads + kv_heads;
    const u32 i = blockIdx.x * FLAT_THREADS + threadIdx.x;  // the launcher has checked that it fits
    if (i >= tokens * all_heads * runs) return;
    const u32 run = i % runs, head = i / runs % all_heads, token = i / runs / all_heads;
    global<bf16> x = head < heads ? q + (u64(token) * heads + head) * 2 * half
                                  : k + (u64(token) * kv_heads + (head - heads)) * 2 * half;
    x += run * N;
    const u64 angle = u64(load_global<u32>(positions + token)) * half + run * N;
    float a[N], b[N], c[N], s[N];
    load_run(a, x);
    load_run(b, x + half);
    load_run(c, cos + angle);
    load_run(s, sin + angle);
#pragma unroll
    for (u32 j = 0; j < N; j++) {
        const float p = a[j], r = b[j], signed_sin = direction * s[j];
        a[j] = p * c[j] - r * signed_sin;
        b[j] = r * c[j] + p * signed_sin;
    }
    store_run(x, a);
    store_run(x + half, b);
}

#define ROPE(name, N)                                                                                       \
    extern "C" __global__ void __launch_bounds__(FLAT_THREADS)                                             \
        name(global<bf16> q, global<bf16> k, global<const u32> positions, global<const float> cos,         \
             global<const float> sin, u32 tokens, u32 heads, u32 kv_heads, u32 half, float direction) {    \
        rotate<N>(q, k, positions, cos, sin, tokens, heads, kv_heads, half, direction);                    \
    }                                                                                                      \
    ENTRY(name)
ROPE(rope_8, 8)
ROPE(rope_1, 1)
