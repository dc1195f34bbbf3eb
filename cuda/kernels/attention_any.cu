// Attention and its gradient for any width of a head, for the widths that attention.cu has no tiles for.
//
//   s[i, j] = scale · q[i]·k[j]      p[i, j] = e^(s[i, j]) / Σ_j e^(s[i, j])      over the keys that query i sees
//   forward   out[i] = Σ_j p[i, j] · v[j]                      log_sum[i] = ln Σ_j e^(s[i, j])
//   delta     delta[i] = out[i]·dout[i]
//   dq        ds[i, j] = p[i, j] · (dout[i]·v[j] − delta[i]) · scale      dq[i] = Σ_j bf16(ds[i, j]) · k[j]
//   dkv       dk[j] = Σ_h Σ_i bf16(ds[i, j]) · q[i]      dv[j] = Σ_h Σ_i bf16(p[i, j]) · dout[i]      h: heads of the group
//
// q, out, dout, dq: bf16 [tokens, heads, d]; k, v, dk, dv: bf16 [tokens, kv_heads, d]; log_sum, delta: fp32 [tokens, heads].
// Sums are in fp32. The forward pass rescales its sums when a larger score is met (arXiv 1805.02867), so that its p is
// bf16(e^(s − largest score so far)) and is divided by the sum at the end; the CPU backend divides before it rounds.
//
// A warp takes a query (dkv: a key) of one head and walks the keys (queries) in chunks of 32 from a multiple of 32 on. For
// the products inside a chunk a lane takes a row; for the sums over the chunk it takes the columns lane, lane + 32, …, in
// the order of the rows.
//
// Bytes: a row of k and of v for each query and key (dq: twice k; dkv: twice q and dout), from the caches where they hold
// them. Bound: the caches, and the instructions around a product without tensor cores. Nobody has measured it.
#include <attention.cuh>
#include <reduce.cuh>
#include <vector.cuh>

constexpr u32 WARPS = 4;
constexpr u32 THREADS = WARPS * WARP;
// Columns of a lane; heads are up to 512 wide.
constexpr u32 COLUMNS = 16;

// What a warp has of shared memory: two rows as floats, and the weights of two chunks.
struct Workspace {
    shared<float> row[2];
    shared<float> weights[2];
};

__device__ __forceinline__ Workspace workspace(u32 d) {
    shared<float> mine = shared_cast<float>(dynamic_shared()) + (threadIdx.x / WARP) * (2 * d + 2 * WARP);
    return {{mine, mine + d}, {mine + 2 * d, mine + 2 * d + WARP}};
}

// warp: a row to shared memory, as floats.
__device__ __forceinline__ void keep_row(shared<float> to, global<const bf16> from, u32 d) {
    for (u32 i = threadIdx.x % WARP; i < d; i += WARP) store_shared(to + i, to_f32(load_global<bf16>(from + i)));
}

// Product of a kept row with one in memory, by runs of N.
template <u32 N>
__device__ __forceinline__ float dot(shared<float> kept, global<const bf16> row, u32 d) {
    float sum = 0;
#pragma unroll 1
    for (u32 i = 0; i < d; i += N) {
        float x[N];
        load_run(x, row + i);
#pragma unroll
        for (u32 j = 0; j < N; j++) sum = fmaf(load_shared<float>(kept + i + j), x[j], sum);
    }
    return sum;
}

// warp: sums[c] += Σ_j weights[j] · rows[j], in the columns of this lane; the rows lie `stride` apart.
__device__ __forceinline__ void add_rows(float (&sums)[COLUMNS], shared<float> weights, global<const bf16> rows, u32 count,
                                         u64 stride, u32 d) {
    const u32 lane = threadIdx.x % WARP;
#pragma unroll 1
    for (u32 j = 0; j < count; j++) {
        const float weight = load_shared<float>(weights + j);
#pragma unroll
        for (u32 c = 0; c < COLUMNS; c++)
            if (c * WARP + lane < d)
                sums[c] = fmaf(weight, to_f32(load_global<bf16>(rows + j * stride + c * WARP + lane)), sums[c]);
    }
}

__device__ __forceinline__ void store_row(global<bf16> to, const float (&sums)[COLUMNS], u32 d) {
    const u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 c = 0; c < COLUMNS; c++)
        if (c * WARP + lane < d) store_global(to + c * WARP + lane, to_bf16(sums[c]));
}

__device__ __forceinline__ float rounded(float x) { return to_f32(to_bf16(x)); }

template <u32 N>
__device__ __forceinline__ void forward(global<bf16> out, global<float> log_sum, global<const bf16> q, global<const bf16> k,
                                        global<const bf16> v, global<const u32> cu_seqlens, const Attention& a) {
    const u32 lane = threadIdx.x % WARP, head = blockIdx.x % a.heads, d = a.head_dim;
    Tile tile;
    if (!find_tile<WARPS>(tile, cu_seqlens, a.sequences, blockIdx.x / a.heads)) return;
    const u32 query = tile.first + threadIdx.x / WARP;
    if (query >= tile.len) return;
    const Workspace mine = workspace(d);
    const u64 row = u64(tile.start + query) * a.heads + head, stride = u64(a.kv_heads) * d;
    const u64 keys = tile.start * stride + head / (a.heads / a.kv_heads) * d;
    keep_row(mine.row[0], q + row * d, d);
    __syncwarp();
    const float c = a.scale * LOG2_E;
    float sums[COLUMNS] = {}, sum = 0, most = minus_infinity();
    for (u32 base = first_key_of(query, a.window) / WARP * WARP; base <= query; base += WARP) {
        const u32 key = base + lane;
        const bool seen = sees(query, key, a.window);
        const float s = seen ? dot<N>(mine.row[0], k + keys + key * stride, d) : minus_infinity();
        // The first chunk has a key that is seen: `larger_one` is finite where the scores are.
        const float larger_one = larger(warp_max(s), most);
        const float factor = exp2_approx(most * c - larger_one * c);
        const float p = seen ? exp2_approx(fmaf(s, c, -(larger_one * c))) : 0.0f;
        most = larger_one;
        sum = sum * factor + warp_sum(p);
        store_shared(mine.weights[0] + lane, rounded(p));
        __syncwarp();
#pragma unroll
        for (u32 i = 0; i < COLUMNS; i++) sums[i] *= factor;
        add_rows(sums, mine.weights[0], v + keys + base * stride, min(WARP, query + 1 - base), stride, d);
        __syncwarp();
    }
    const float inverse = 1.0f / sum;
#pragma unroll
    for (u32 i = 0; i < COLUMNS; i++) sums[i] *= inverse;
    store_row(out + row * d, sums, d);
    if (lane == 0) store_global(log_sum + row, most * a.scale + logf(sum));
}

template <u32 N>
__device__ __forceinline__ void gradient_of_queries(global<bf16> dq, global<const bf16> q, global<const bf16> k,
                                                    global<const bf16> v, global<const bf16> dout,
                                                    global<const float> log_sum, global<const float> delta,
                                                    global<const u32> cu_seqlens, const Attention& a) {
    const u32 lane = threadIdx.x % WARP, head = blockIdx.x % a.heads, d = a.head_dim;
    Tile tile;
    if (!find_tile<WARPS>(tile, cu_seqlens, a.sequences, blockIdx.x / a.heads)) return;
    const u32 query = tile.first + threadIdx.x / WARP;
    if (query >= tile.len) return;
    const Workspace mine = workspace(d);
    const u64 row = u64(tile.start + query) * a.heads + head, stride = u64(a.kv_heads) * d;
    const u64 keys = tile.start * stride + head / (a.heads / a.kv_heads) * d;
    keep_row(mine.row[0], q + row * d, d);
    keep_row(mine.row[1], dout + row * d, d);
    __syncwarp();
    const float log = load_global<float>(log_sum + row) * LOG2_E, its_delta = load_global<float>(delta + row);
    float sums[COLUMNS] = {};
    for (u32 base = first_key_of(query, a.window) / WARP * WARP; base <= query; base += WARP) {
        const u32 key = base + lane;
        float ds = 0;
        if (sees(query, key, a.window)) {
            const float s = dot<N>(mine.row[0], k + keys + key * stride, d);
            const float dp = dot<N>(mine.row[1], v + keys + key * stride, d);
            ds = exp2_approx(fmaf(s, a.scale * LOG2_E, -log)) * (dp - its_delta) * a.scale;
        }
        store_shared(mine.weights[0] + lane, rounded(ds));
        __syncwarp();
        add_rows(sums, mine.weights[0], k + keys + base * stride, min(WARP, query + 1 - base), stride, d);
        __syncwarp();
    }
    store_row(dq + row * d, sums, d);
}

template <u32 N>
__device__ __forceinline__ void gradient_of_keys(global<bf16> dk, global<bf16> dv, global<const bf16> q,
                                                 global<const bf16> k, global<const bf16> v, global<const bf16> dout,
                                                 global<const float> log_sum, global<const float> delta,
                                                 global<const u32> cu_seqlens, const Attention& a) {
    const u32 lane = threadIdx.x % WARP, kv_head = blockIdx.x % a.kv_heads, d = a.head_dim;
    Tile tile;
    if (!find_tile<WARPS>(tile, cu_seqlens, a.sequences, blockIdx.x / a.kv_heads)) return;
    const u32 key = tile.first + threadIdx.x / WARP;
    if (key >= tile.len) return;
    const Workspace mine = workspace(d);
    const u64 row = u64(tile.start + key) * a.kv_heads + kv_head, stride = u64(a.heads) * d;
    keep_row(mine.row[0], k + row * d, d);
    keep_row(mine.row[1], v + row * d, d);
    __syncwarp();
    const u32 group = a.heads / a.kv_heads, end = end_of_queries_of(key, tile.len, a.window);
    float dk_sums[COLUMNS] = {}, dv_sums[COLUMNS] = {};
    for (u32 head = kv_head * group; head < (kv_head + 1) * group; head++) {
        const u64 queries = tile.start * stride + head * d;
        for (u32 base = key / WARP * WARP; base < end; base += WARP) {
            const u32 query = base + lane;
            float p = 0, ds = 0;
            if (query < end && sees(query, key, a.window)) {
                const u64 at = u64(tile.start + query) * a.heads + head;
                const float s = dot<N>(mine.row[0], q + queries + query * stride, d);
                const float dp = dot<N>(mine.row[1], dout + queries + query * stride, d);
                p = exp2_approx(fmaf(s, a.scale * LOG2_E, -(load_global<float>(log_sum + at) * LOG2_E)));
                ds = p * (dp - load_global<float>(delta + at)) * a.scale;
            }
            store_shared(mine.weights[0] + lane, rounded(p));
            store_shared(mine.weights[1] + lane, rounded(ds));
            __syncwarp();
            const u32 count = min(WARP, end - base);
            add_rows(dv_sums, mine.weights[0], dout + queries + base * stride, count, stride, d);
            add_rows(dk_sums, mine.weights[1], q + queries + base * stride, count, stride, d);
            __syncwarp();
        }
    }
    store_row(dk + row * d, dk_sums, d);
    store_row(dv + row * d, dv_sums, d);
}

#define ANY(suffix, N)                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                                      \
        attention_any_##suffix(global<bf16> out, global<float> log_sum, global<const bf16> q, global<const bf16> k, \
                               global<const bf16> v, global<const u32> cu_seqlens, Attention a) {                 \
        forward<N>(out, log_sum, q, k, v, cu_seqlens, a);                                                         \
    }                                                                                                             \
    ENTRY(attention_any_##suffix)                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                                      \
        attention_any_dq_##suffix(global<bf16> dq, global<const bf16> q, global<const bf16> k, global<const bf16> v, \
                                  global<const bf16> dout, global<const float> log_sum, global<const float> delta, \
                                  global<const u32> cu_seqlens, Attention a) {                                    \
        gradient_of_queries<N>(dq, q, k, v, dout, log_sum, delta, cu_seqlens, a);                                 \
    }                                                                                                             \
    ENTRY(attention_any_dq_##suffix)                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                                      \
        attention_any_dkv_##suffix(global<bf16> dk, global<bf16> dv, global<const bf16> q, global<const bf16> k,  \
                                   global<const bf16> v, global<const bf16> dout, global<const float> log_sum,    \
                                   global<const float> delta, global<const u32> cu_seqlens, Attention a) {        \
        gradient_of_keys<N>(dk, dv, q, k, v, dout, log_sum, delta, cu_seqlens, a);                                \
    }                                                                                                             \
    ENTRY(attention_any_dkv_##suffix)
ANY(8, 8)
ANY(1, 1)

// delta, of every width. A warp takes a row.
template <u32 N>
__device__ __forceinline__ void row_products(global<float> delta, global<const bf16> out, global<const bf16> dout, u64 rows,
                                             u32 d) {
    const u64 row = u64(blockIdx.x) * WARPS + threadIdx.x / WARP;
    if (row >= rows) return;
    float sum = 0;
    for (u32 i = threadIdx.x % WARP * N; i < d; i += WARP * N) {
        float x[N], y[N];
        load_run(x, out + row * d + i);
        load_run(y, dout + row * d + i);
#pragma unroll
        for (u32 j = 0; j < N; j++) sum = fmaf(x[j], y[j], sum);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) store_global(delta + row, sum);
}

#define DELTA(suffix, N)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_delta_##suffix(                                  \
        global<float> delta, global<const bf16> out, global<const bf16> dout, u64 rows, u32 d) {                     \
        row_products<N>(delta, out, dout, rows, d);                                                                  \
    }                                                                                                                \
    ENTRY(attention_delta_##suffix)
DELTA(4, 4)
DELTA(1, 1)
