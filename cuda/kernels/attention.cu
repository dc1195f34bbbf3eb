// Causal attention on tensor cores, without a T × T matrix (FlashAttention-2, arXiv 2307.08691), for heads that are 64 or
// 128 wide. Multiples of 8 between these are filled up with zeros to 128 in shared memory.
//
//   s[i, j] = q[i]·k[j]      p[i, j] = e^(scale · (s[i, j] − most))      over the keys that query i sees, most = max_j s[i, j]
//   out[i] = bf16(Σ_j bf16(p[i, j]) · v[j] / Σ_j p[i, j])      log_sum[i] = scale · most + ln Σ_j p[i, j]
//
// q, out: bf16 [tokens, heads, d]; k, v: bf16 [tokens, kv_heads, d]; log_sum: fp32 [tokens, heads]. Accumulators and sums
// are fp32. `most` is the largest score so far: what was summed before is multiplied by 2^(old − new), in base 2 with
// log₂e in the scale. So p is rounded before it is divided; the CPU backend divides, then rounds.
//
// A block takes 64 queries of one head, four warps 16 each, whose fragments stay in registers. It walks the keys in tiles
// of 64 from a multiple of 64 in the example on: tiles that no query of the block sees are not visited, and only those
// that some query sees in part are masked. While a tile is computed the next is copied to the other half of shared
// memory; one barrier a tile. Order of a sum: tiles ascending, inside a tile that of mma; for the sum of p a lane's own
// columns ascending, the four lanes at the end.
//
// Bytes: 4·d + 4 a query and head, and 4·d for each key of each tile, which the second-level cache gives as far as it holds
// the keys of a head (4·d·T: 1 MiB at T = 2048, d = 128). Bound: shared memory. A warp of 16 rows uses a fragment of k or v
// once: 512 bytes for two mma, so 4 cycles of the banks (128 bytes a cycle) for 4 of the tensor cores (1024 products a
// cycle of an SM of sm_87), which can at best run side by side; the exponentials come on top. 32 rows a warp would halve
// that and need twice the accumulators: more registers than there are beside the queries.
#include <attention_tiles.cuh>

constexpr u32 THREADS = ROWS / PART * WARP;

// PADDED: heads of a.head_dim elements, fewer than D.
template <u32 D, bool PADDED>
__device__ __forceinline__ void forward(global<bf16> out, global<float> log_sum, global<const bf16> q, global<const bf16> k,
                                        global<const bf16> v, global<const u32> cu_seqlens, const Attention& a) {
    constexpr u32 TILE = ROWS * D;
    const u32 lane = threadIdx.x % WARP, t = lane % 4, head = blockIdx.x % a.heads;
    const u32 d = PADDED ? a.head_dim : D;
    // The last tiles see the most keys: they begin first.
    Tile tile;
    if (!find_tile<ROWS>(tile, cu_seqlens, a.sequences, (gridDim.x - 1 - blockIdx.x) / a.heads)) return;
    const u32 part = threadIdx.x / WARP * PART, query = tile.first + part;  // this warp's first
    const u64 q_stride = u64(a.heads) * d, stride = u64(a.kv_heads) * d;  // of a token
    const u64 q_first = (tile.start + tile.first) * q_stride + head * d;
    const u64 kv_first = tile.start * stride + head / (a.heads / a.kv_heads) * d;
    const u32 begin = first_key_of(tile.first, a.window) / ROWS * ROWS, end = min(tile.first + ROWS, tile.len);

    // Keys and values of a stage, one after the other.
    shared<bf16> stages = shared_cast<bf16>(dynamic_shared());
    auto copy_keys = [&](u32 stage, u32 key) {
        const u64 at = kv_first + key * stride;
        shared<bf16> to = stages + stage * 2 * TILE;
        copy_tile<D, ROWS, THREADS>(to, k + at, stride, tile.len - key, d);
        copy_tile<D, ROWS, THREADS>(to + TILE, v + at, stride, tile.len - key, d);
        cp_async_commit();
    };
    // The queries go through the second stage.
    copy_tile<D, ROWS, THREADS>(stages + 2 * TILE, q + q_first, q_stride, tile.len - tile.first, d);
    cp_async_commit();
    copy_keys(0, begin);
    cp_async_wait<1>();
    __syncthreads();
    FragmentA queries[D / 16];
#pragma unroll
    for (u32 i = 0; i < D / 16; i++) queries[i] = left_factor<D>(stages + 2 * TILE, part, i);

    const float c = a.scale * LOG2_E;
    FragmentC sums[D / 8] = {};
    float most[2] = {minus_infinity(), minus_infinity()}, sum[2] = {};
    u32 stage = 0;
#pragma unroll 1
    for (u32 key = begin; key < end; key += ROWS, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();
        if (key + ROWS < end) copy_keys(stage ^ 1, key + ROWS);
        shared<bf16> keys = stages + stage * 2 * TILE;
        FragmentC s[ROWS / 8] = {};
        multiply_by_rows<D, ROWS>(s, [&](u32 i) { return queries[i]; }, keys);
        if (key + ROWS - 1 > query || query + PART - 1 - key >= a.window) {
#pragma unroll
            for (u32 i = 0; i < ROWS / 2; i++)
                if (!sees(query + lane / 4 + i % 4 / 2 * 8, key + i / 4 * 8 + 2 * t + i % 2, a.window))
                    s[i / 4].c[i % 4] = minus_infinity();
        }
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            float larger_one = most[r];
#pragma unroll
            for (u32 n = 0; n < ROWS / 8; n++) larger_one = fmaxf(larger_one, fmaxf(s[n].c[2 * r], s[n].c[2 * r + 1]));
            larger_one = row_max(larger_one);
            // A row that has not seen a key yet: any finite number makes all of its exponentials 0.
            const float base = larger_one == minus_infinity() ? 0.0f : larger_one * c;
            const float factor = exp2_approx(most[r] * c - base);
            float total = 0;
#pragma unroll
            for (u32 n = 0; n < ROWS / 8; n++) {
#pragma unroll
                for (u32 e = 2 * r; e < 2 * r + 2; e++) {
                    s[n].c[e] = exp2_approx(fmaf(s[n].c[e], c, -base));
                    total += s[n].c[e];
                }
            }
            most[r] = larger_one;
            sum[r] = sum[r] * factor + total;
#pragma unroll
            for (u32 n = 0; n < D / 8; n++) sums[n].c[2 * r] *= factor, sums[n].c[2 * r + 1] *= factor;
        }
        multiply_by_columns<D, ROWS>(sums, s, keys + TILE);
    }
    __syncthreads();

    const u32 rows = rows_from(query, tile.len);
    const u64 first = u64(tile.start + query) * a.heads + head;
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        sum[r] = row_sum(sum[r]);
        const float inverse = 1.0f / sum[r];
#pragma unroll
        for (u32 n = 0; n < D / 8; n++) sums[n].c[2 * r] *= inverse, sums[n].c[2 * r + 1] *= inverse;
        const u32 row = lane / 4 + r * 8;
        if (t == 0 && row < rows) store_global(log_sum + first + row * a.heads, most[r] * a.scale + logf(sum[r]));
    }
    store_part<D>(out + first * d, q_stride, rows, d, sums, stages + part * D);
}

// Shared memory holds two blocks of heads of 128 (64 KiB each), which may use 255 registers, and four of 64.
#define FORWARD(name, D, PADDED, BLOCKS)                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                       \
        name(global<bf16> out, global<float> log_sum, global<const bf16> q, global<const bf16> k, global<const bf16> v, \
             global<const u32> cu_seqlens, Attention a) {                                                               \
        forward<D, PADDED>(out, log_sum, q, k, v, cu_seqlens, a);                                                       \
    }                                                                                                                   \
    ENTRY(name)
FORWARD(attention_64, 64, false, 4)
FORWARD(attention_128, 128, false, 3)
FORWARD(attention_padded, 128, true, 2)
