// The gradient of attention.cu (FlashAttention-2, arXiv 2307.08691, algorithm 2), with a fixed order and no atomics: keys
// and queries have a kernel each, and the scores are computed twice.
//
//   p[i, j] = e^(scale · q[i]·k[j] − log_sum[i])      ds[i, j] = p[i, j] · (dout[i]·v[j] − delta[i]) · scale
//   dv[j] = Σ_h Σ_i bf16(p[i, j]) · dout[i]      dk[j] = Σ_h Σ_i bf16(ds[i, j]) · q[i]      h: query heads of the group
//   dq[i] = Σ_j bf16(ds[i, j]) · k[j]
//
// q, dout, dq: bf16 [tokens, heads, d]; k, v, dk, dv: bf16 [tokens, kv_heads, d]; log_sum, delta: fp32 [tokens, heads],
// delta[i] = out[i]·dout[i] of attention_any.cu. Accumulators are fp32.
//
// dkv: a block takes 64 keys of one kv head and walks the group's heads in order, and in each the tiles of queries that see
// some of the keys, ascending, from the block's first key on; the next tile is copied while one is computed. Products lie
// transposed, keys are their rows: so p and ds are left factors as they come out. Eight warps, two for each 16 keys: the
// first has the scores, p and dv, the second dout·v, ds and dk, each two products of one size and one accumulator. p goes
// from the first to the second through shared memory, in fp32, as it lies. Two barriers a tile.
// dq: a block takes 64 queries of one head, four warps 16 each, and walks the tiles of keys as the forward pass does.
//
// The heads of a group are added in one accumulator, where the CPU backend sums each head by itself first; otherwise what
// is rounded, and where, is the same.
//
// Bytes: dkv 8·d a key and kv head, and 4·d + 8 for each query and head of each tile; dq 6·d + 8 a query and head, and 4·d
// for each key of each tile; what tiles read comes from the second-level cache as far as it holds a head's rows.
// Bound: shared memory, as in the forward pass; 7 products where one pass with atomics would make 5. With few kv heads and
// a short example dkv has fewer blocks than fill a GPU, the price of its order.
#include <attention_tiles.cuh>

// PADDED: heads of a.head_dim elements, fewer than D.
template <u32 D, bool PADDED, u32 QUERIES>
__device__ __forceinline__ void gradient_of_keys(global<bf16> dk, global<bf16> dv, global<const bf16> q,
                                                 global<const bf16> k, global<const bf16> v, global<const bf16> dout,
                                                 global<const float> log_sum, global<const float> delta,
                                                 global<const u32> cu_seqlens, const Attention& a) {
    constexpr u32 THREADS = 2 * ROWS / PART * WARP, TILE = ROWS * D, STEP = QUERIES * D;
    const u32 lane = threadIdx.x % WARP, t = lane % 4, kv_head = blockIdx.x % a.kv_heads, group = a.heads / a.kv_heads;
    const u32 d = PADDED ? a.head_dim : D;
    // The first tiles are seen by the most queries: they begin first.
    Tile tile;
    if (!find_tile<ROWS>(tile, cu_seqlens, a.sequences, blockIdx.x / a.kv_heads)) return;
    // Warps w and w + 4 share the keys and, on the hardware, a quarter of the SM.
    const u32 pair = threadIdx.x / WARP % 4, part = pair * PART, key = tile.first + part;
    const bool second = threadIdx.x / WARP >= 4;
    const u64 q_stride = u64(a.heads) * d, stride = u64(a.kv_heads) * d;  // of a token
    const u64 kv_first = (tile.start + tile.first) * stride + kv_head * d;
    const u32 end = end_of_queries_of(min(tile.first + ROWS, tile.len) - 1, tile.len, a.window);

    // Keys, values; two stages of queries and gradients; two stages of log_sum and delta; p of every pair.
    shared<bf16> rows = shared_cast<bf16>(dynamic_shared()), stages = rows + 2 * TILE;
    shared<float> numbers = shared_cast<float>(stages + 4 * STEP);
    shared<float> exchange = numbers + 4 * QUERIES + pair * QUERIES * PART + lane * 4;
    auto copy_queries = [&](u32 stage, u32 head, u32 query) {
        const u32 there = tile.len - query;
        const u64 first = u64(tile.start + query) * a.heads + head;
        copy_tile<D, QUERIES, THREADS>(stages + stage * 2 * STEP, q + first * d, q_stride, there, d);
        copy_tile<D, QUERIES, THREADS>(stages + stage * 2 * STEP + STEP, dout + first * d, q_stride, there, d);
        if (threadIdx.x < 2 * QUERIES) {
            const u32 i = threadIdx.x % QUERIES;
            cp_async<4>(numbers + stage * 2 * QUERIES + threadIdx.x,
                        (threadIdx.x < QUERIES ? log_sum : delta) + first + u64(i) * a.heads, i < there);
        }
        cp_async_commit();
    };
    copy_tile<D, ROWS, THREADS>(rows, k + kv_first, stride, tile.len - tile.first, d);
    copy_tile<D, ROWS, THREADS>(rows + TILE, v + kv_first, stride, tile.len - tile.first, d);
    copy_queries(0, kv_head * group, tile.first);

    // This warp's: k, then v. Its 16 rows are read by no other warp, and take its result at the end.
    shared<bf16> own = rows + (second ? TILE : 0);
    const float c = a.scale * LOG2_E;
    FragmentC sums[D / 8] = {};
    u32 stage = 0, head = kv_head * group, query = tile.first;
#pragma unroll 1
    while (head < (kv_head + 1) * group) {
        cp_async_wait<0>();
        __syncthreads();
        const bool more = query + QUERIES < end;
        const u32 next_head = more ? head : head + 1, next_query = more ? query + QUERIES : tile.first;
        if (next_head < (kv_head + 1) * group) copy_queries(stage ^ 1, next_head, next_query);
        shared<bf16> queries = stages + stage * 2 * STEP;
        // The number of a query: log_sum in the first warp, delta in the second.
        shared<float> number = numbers + stage * 2 * QUERIES + (second ? QUERIES : 0) + 2 * t;
        FragmentC s[QUERIES / 8] = {};
        multiply_by_rows<D, QUERIES>(
            s, [&](u32 i) { return left_factor<D>(own, part, i); }, queries + (second ? STEP : 0));
        if (!second) {
            if (key + PART - 1 > query || query + QUERIES - 1 - key >= a.window || query + QUERIES > tile.len) {
#pragma unroll
                for (u32 r = 0; r < 2; r++) {
                    // By how many queries, from its own on, the key is seen.
                    const u32 its_key = key + lane / 4 + r * 8, seen_by = min(rows_from(its_key, tile.len), a.window);
#pragma unroll
                    for (u32 i = 0; i < QUERIES / 4; i++)
                        if (query + i / 2 * 8 + 2 * t + i % 2 - its_key >= seen_by)
                            s[i / 2].c[2 * r + i % 2] = minus_infinity();
                }
            }
#pragma unroll
            for (u32 n = 0; n < QUERIES / 8; n++) {
                const vec<float, 2> log = load_shared<vec<float, 2>>(number + n * 8);
#pragma unroll
                for (u32 e = 0; e < 4; e++) s[n].c[e] = exp2_approx(fmaf(s[n].c[e], c, -(log[e % 2] * LOG2_E)));
                store_shared(exchange + n * 4 * WARP, bits_as<vec<float, 4>>(s[n]));
            }
        }
        __syncthreads();
        if (second) {
#pragma unroll
            for (u32 n = 0; n < QUERIES / 8; n++) {
                const vec<float, 2> its_delta = load_shared<vec<float, 2>>(number + n * 8);
                const vec<float, 4> p = load_shared<vec<float, 4>>(exchange + n * 4 * WARP);
#pragma unroll
                for (u32 e = 0; e < 4; e++) s[n].c[e] = p[e] * (s[n].c[e] - its_delta[e % 2]) * a.scale;
            }
        }
        multiply_by_columns<D, QUERIES>(sums, s, queries + (second ? 0 : STEP));
        stage ^= 1, head = next_head, query = next_query;
    }
    store_part<D>((second ? dk : dv) + kv_first + part * stride, stride, rows_from(key, tile.len), d, sums,
                  own + part * D);
}

// KEYS: of a tile, that are computed at a time.
template <u32 D, bool PADDED, u32 KEYS>
__device__ __forceinline__ void gradient_of_queries(global<bf16> dq, global<const bf16> q, global<const bf16> k,
                                                    global<const bf16> v, global<const bf16> dout,
                                                    global<const float> log_sum, global<const float> delta,
                                                    global<const u32> cu_seqlens, const Attention& a) {
    constexpr u32 THREADS = ROWS / PART * WARP, TILE = ROWS * D;
    const u32 lane = threadIdx.x % WARP, t = lane % 4, head = blockIdx.x % a.heads;
    const u32 d = PADDED ? a.head_dim : D;
    Tile tile;
    if (!find_tile<ROWS>(tile, cu_seqlens, a.sequences, (gridDim.x - 1 - blockIdx.x) / a.heads)) return;
    const u32 part = threadIdx.x / WARP * PART, query = tile.first + part, rows = rows_from(query, tile.len);
    const u64 q_stride = u64(a.heads) * d, stride = u64(a.kv_heads) * d;  // of a token
    const u64 q_first = (tile.start + tile.first) * q_stride + head * d;
    const u64 kv_first = tile.start * stride + head / (a.heads / a.kv_heads) * d;
    const u32 begin = first_key_of(tile.first, a.window) / ROWS * ROWS, end = min(tile.first + ROWS, tile.len);

    shared<bf16> stages = shared_cast<bf16>(dynamic_shared());
    auto copy_keys = [&](u32 stage, u32 key) {
        const u64 at = kv_first + key * stride;
        shared<bf16> to = stages + stage * 2 * TILE;
        copy_tile<D, ROWS, THREADS>(to, k + at, stride, tile.len - key, d);
        copy_tile<D, ROWS, THREADS>(to + TILE, v + at, stride, tile.len - key, d);
        cp_async_commit();
    };
    copy_tile<D, ROWS, THREADS>(stages + 2 * TILE, q + q_first, q_stride, tile.len - tile.first, d);
    copy_tile<D, ROWS, THREADS>(stages + 3 * TILE, dout + q_first, q_stride, tile.len - tile.first, d);
    cp_async_commit();
    copy_keys(0, begin);
    cp_async_wait<1>();
    __syncthreads();
    FragmentA queries[D / 16], gradients[D / 16];
#pragma unroll
    for (u32 i = 0; i < D / 16; i++) {
        queries[i] = left_factor<D>(stages + 2 * TILE, part, i);
        gradients[i] = left_factor<D>(stages + 3 * TILE, part, i);
    }
    const u64 first = u64(tile.start + query) * a.heads + head;
    float log[2] = {}, its_delta[2] = {};
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        const u32 row = lane / 4 + r * 8;
        if (row < rows) {
            log[r] = load_global<float>(log_sum + first + row * a.heads) * LOG2_E;
            its_delta[r] = load_global<float>(delta + first + row * a.heads);
        }
    }

    const float c = a.scale * LOG2_E;
    FragmentC sums[D / 8] = {};
    u32 stage = 0;
#pragma unroll 1
    for (u32 tile_key = begin; tile_key < end; tile_key += ROWS, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();
        if (tile_key + ROWS < end) copy_keys(stage ^ 1, tile_key + ROWS);
#pragma unroll 1
        for (u32 row = 0; row < ROWS; row += KEYS) {
            const u32 key = tile_key + row;
            shared<bf16> keys = stages + stage * 2 * TILE + row * D;
            FragmentC s[KEYS / 8] = {}, ds[KEYS / 8] = {};
            multiply_by_rows<D, KEYS>(s, [&](u32 i) { return queries[i]; }, keys);
            multiply_by_rows<D, KEYS>(ds, [&](u32 i) { return gradients[i]; }, keys + TILE);
            if (key + KEYS - 1 > query || query + PART - 1 - key >= a.window) {
#pragma unroll
                for (u32 i = 0; i < KEYS / 2; i++)
                    if (!sees(query + lane / 4 + i % 4 / 2 * 8, key + i / 4 * 8 + 2 * t + i % 2, a.window))
                        s[i / 4].c[i % 4] = minus_infinity();
            }
#pragma unroll
            for (u32 i = 0; i < KEYS / 2; i++) {
                const u32 r = i % 4 / 2;
                float& x = ds[i / 4].c[i % 4];
                x = exp2_approx(fmaf(s[i / 4].c[i % 4], c, -log[r])) * (x - its_delta[r]) * a.scale;
            }
            multiply_by_columns<D, KEYS>(sums, ds, keys);
        }
    }
    __syncthreads();
    store_part<D>(dq + first * d, q_stride, rows, d, sums, stages + part * D);
}

#define BACKWARD(suffix, D, PADDED, QUERIES, DKV_BLOCKS, KEYS, DQ_BLOCKS)                                               \
    extern "C" __global__ void __launch_bounds__(2 * ROWS / PART * WARP, DKV_BLOCKS) attention_dkv_##suffix(           \
        global<bf16> dk, global<bf16> dv, global<const bf16> q, global<const bf16> k, global<const bf16> v,            \
        global<const bf16> dout, global<const float> log_sum, global<const float> delta, global<const u32> cu_seqlens, \
        Attention a) {                                                                                                 \
        gradient_of_keys<D, PADDED, QUERIES>(dk, dv, q, k, v, dout, log_sum, delta, cu_seqlens, a);                    \
    }                                                                                                                  \
    ENTRY(attention_dkv_##suffix)                                                                                      \
    extern "C" __global__ void __launch_bounds__(ROWS / PART * WARP, DQ_BLOCKS) attention_dq_##suffix(                 \
        global<bf16> dq, global<const bf16> q, global<const bf16> k, global<const bf16> v, global<const bf16> dout,    \
        global<const float> log_sum, global<const float> delta, global<const u32> cu_seqlens, Attention a) {           \
        gradient_of_queries<D, PADDED, KEYS>(dq, q, k, v, dout, log_sum, delta, cu_seqlens, a);                        \
    }                                                                                                                  \
    ENTRY(attention_dq_##suffix)
BACKWARD(64, 64, false, 64, 2, 32, 3)
BACKWARD(128, 128, false, 32, 2, 16, 2)
BACKWARD(padded, 128, true, 32, 1, 16, 2)
