// Attention of new tokens over cached keys and values of one text, for generation.
//
//   s[j] = scale·q·k[j] for the keys that query `position` sees: position − window < j ≤ position
//   out = bf16(Σ e^(s[j] − max)·v[j] / Σ e^(s[j] − max))
//
// q, out: bf16 [rows, heads, head_dim], of the tokens at past, past + 1, …; k, v: bf16 [past + rows, kv_heads, head_dim];
// heads are a multiple of kv_heads, each group of them shares a key head. Everything between is fp32.
//
// As Flash-Decoding does it: keys in chunks of CHUNK, counted from the first key of the text, each chunk with its own
// maximum, sum and weighted values, left in scratch; a second kernel combines the chunks in order. A row sees nothing of
// the number of rows, and with one row there are kv_heads·chunks blocks.
//
// A block: one row, one chunk, up to HEADS query heads of one key head. Some lanes of a warp (the power of two that covers
// head_dim in runs of 16 bytes) share a key, so a warp reads 512 consecutive bytes of as many keys as fit; scores are
// summed by a butterfly over the lanes of a key. Then warp h makes the probabilities of head h, then the values are summed
// as the keys were read: over the keys of a lane, by a butterfly over the lanes of an element, over the warps in order.
//
// Bytes: 4 for every element of a key head that is seen, once a row and for every HEADS query heads; 8·(head_dim + 2) of
// scratch a head and chunk (at 4 query heads a key head and head_dim 128: a sixteenth
// of the keys and values). Bound: memory.
#include <reduce.cuh>
#include <vector.cuh>

constexpr u32 CHUNK = 128;
constexpr u32 WARPS = 4;
constexpr u32 THREADS = WARPS * WARP;
constexpr u32 HEADS = 4;
constexpr u32 BATCH = 4;  // loads of a lane that are under way together

struct Shape {
    u32 heads, kv_heads, head_dim;
    u32 window;  // 0: none
    u32 past;
    u32 chunks;  // most that a row sees
    u32 tiles;   // of HEADS query heads that a key head has
    float scale;
};

// Keys first .. last that a query sees.
struct Seen {
    u32 first, last;
};

__device__ __forceinline__ Seen seen_by(const Shape& shape, u32 row) {
    const u32 last = shape.past + row + 1;
    return {shape.window > 0 && last > shape.window ? last - shape.window : 0, last};
}

// Calls f(key of the chunk, run) for this lane's runs of RUN elements from `element` on of the keys first .. last, counted
// in the chunk; zeros for the others, of which each lane has as many.
template <u32 RUN, typename F>
__device__ __forceinline__ void over_keys(global<const bf16> keys, u32 stride, u32 lanes, bool inside, Seen seen, F f) {
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, at_a_time = WARP / lanes;
    const u32 first = warp * at_a_time + lane / lanes, step = WARPS * at_a_time;
    for (u32 pass = 0; pass < CHUNK; pass += BATCH * step) {
        vec<bf16, RUN> packed[BATCH];
#pragma unroll
        for (u32 b = 0; b < BATCH; b++) {
            const u32 key = pass + b * step + first;
            packed[b] = vec<bf16, RUN>{};
            if (inside && key >= seen.first && key < seen.last)
                packed[b] = load_global<vec<bf16, RUN>>(keys + u64(key) * stride);
        }
#pragma unroll
        for (u32 b = 0; b < BATCH; b++) {
            if (pass + b * step >= CHUNK) continue;
            float x[RUN];
            widen(x, packed[b]);
            f(pass + b * step + first, x);
        }
    }
}

// Where element e of a tile of RUN · 32 lies among the warps' sums: both halves of the runs of 8 apart and shifted by half
// the banks, so that neither writing halves of runs nor reading elements meets a conflict.
template <u32 RUN>
__device__ __forceinline__ u32 place(u32 e) {
    return RUN == 1 ? e : e / 4 % 2 * (WARP * RUN / 2 + 16) + e / 8 * 4 + e % 4;
}

template <u32 RUN>
__device__ __forceinline__ void attend(global<float> scratch, global<float> statistics, global<const bf16> q,
                                       global<const bf16> k, global<const bf16> v, const Shape& shape, u32 first_row) {
    constexpr u32 TILE = WARP * RUN, PITCH = TILE + 32;  // elements of a head at a time
    const u32 row = first_row + blockIdx.z, group = shape.heads / shape.kv_heads, d = shape.head_dim;
    const u32 kv_head = blockIdx.y / shape.tiles, first_head = blockIdx.y % shape.tiles * HEADS;
    const u32 count = min(HEADS, group - first_head), head = kv_head * group + first_head;
    Seen seen = seen_by(shape, row);
    const u32 chunk = seen.first / CHUNK + blockIdx.x, start = chunk * CHUNK;
    if (start >= seen.last) return;
    seen = {seen.first > start ? seen.first - start : 0, min(seen.last - start, CHUNK)};

    shared<float> scores = static_shared<float, HEADS * CHUNK, 0>();
    shared<float> parts = static_shared<float, WARPS * HEADS * PITCH, 1>();
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, stride = shape.kv_heads * d;
    u32 lanes = 1;  // of a key
    while (lanes < WARP && lanes * RUN < d) lanes *= 2;
    const u32 mine = lane % lanes * RUN;
    const u64 column = u64(start) * stride + kv_head * d;

    for (u32 tile = 0; tile < d; tile += TILE) {
        const u32 element = tile + mine;
        vec<bf16, RUN> queries[HEADS];
#pragma unroll
        for (u32 h = 0; h < HEADS; h++) {
            queries[h] = vec<bf16, RUN>{};
            if (h < count && element < d)
                queries[h] = load_global<vec<bf16, RUN>>(q + ((u64(row) * shape.heads + head + h) * d + element));
        }
        over_keys<RUN>(k + (column + element), stride, lanes, element < d, seen, [&](u32 key, const float(&x)[RUN]) {
#pragma unroll
            for (u32 h = 0; h < HEADS; h++) {
                if (h >= count) continue;
                float query[RUN], sum = 0;
                widen(query, queries[h]);
#pragma unroll
                for (u32 i = 0; i < RUN; i++) sum = fmaf(query[i], x[i], sum);
                for (u32 distance = lanes / 2; distance > 0; distance /= 2)
                    sum += __shfl_xor_sync(FULL, sum, distance);
                if (lane % lanes == 0) {
                    if (tile > 0) sum += load_shared<float>(scores + (h * CHUNK + key));
                    store_shared(scores + (h * CHUNK + key), sum);
                }
            }
        });
    }
    __syncthreads();

    const u64 slot = (u64(blockIdx.z) * shape.heads + head) * shape.chunks + blockIdx.x;  // of the first head
    if (warp < count) {
        shared<float> of_head = scores + warp * CHUNK;
        float p[CHUNK / WARP], most = -3.402823466e38f, sum = 0;
#pragma unroll
        for (u32 i = 0; i < CHUNK / WARP; i++) {
            const u32 key = i * WARP + lane;
            p[i] = load_shared<float>(of_head + key) * shape.scale;
            if (key >= seen.first && key < seen.last) most = larger(p[i], most);
        }
        most = warp_max(most);
#pragma unroll
        for (u32 i = 0; i < CHUNK / WARP; i++) {
            const u32 key = i * WARP + lane;
            p[i] = key >= seen.first && key < seen.last ? expf(p[i] - most) : 0;
            sum += p[i];
            store_shared(of_head + key, p[i]);
        }
        sum = warp_sum(sum);
        if (lane == 0) store_global(statistics + (slot + warp * shape.chunks) * 2, vec<float, 2>{{most, sum}});
    }
    __syncthreads();

    for (u32 tile = 0; tile < d; tile += TILE) {
        const u32 element = tile + mine;
        float sum[HEADS][RUN] = {};
        over_keys<RUN>(v + (column + element), stride, lanes, element < d, seen, [&](u32 key, const float(&x)[RUN]) {
#pragma unroll
            for (u32 h = 0; h < HEADS; h++) {
                if (h >= count) continue;
                const float p = load_shared<float>(scores + (h * CHUNK + key));
#pragma unroll
                for (u32 i = 0; i < RUN; i++) sum[h][i] = fmaf(p, x[i], sum[h][i]);
            }
        });
#pragma unroll
        for (u32 h = 0; h < HEADS; h++) {
            if (h >= count) continue;
#pragma unroll
            for (u32 i = 0; i < RUN; i++)
                for (u32 distance = lanes; distance < WARP; distance *= 2)
                    sum[h][i] += __shfl_xor_sync(FULL, sum[h][i], distance);
            constexpr u32 FOUR = RUN < 4 ? RUN : 4;
#pragma unroll
            for (u32 i = 0; i < RUN; i += FOUR) {
                vec<float, FOUR> four;
#pragma unroll
                for (u32 j = 0; j < FOUR; j++) four[j] = sum[h][i + j];
                if (lane < lanes) store_shared(parts + ((warp * HEADS + h) * PITCH + place<RUN>(mine + i)), four);
            }
        }
        __syncthreads();
        const u32 width = min(TILE, d - tile);
        for (u32 i = threadIdx.x; i < count * width; i += THREADS) {
            const u32 h = i / width, e = i % width;
            float total = 0;
#pragma unroll
            for (u32 w = 0; w < WARPS; w++)
                total += load_shared<float>(parts + ((w * HEADS + h) * PITCH + place<RUN>(e)));
            store_global(scratch + ((slot + h * shape.chunks) * d + tile + e), total);
        }
        __syncthreads();
    }
}

// Grid: x chunks, y kv_heads · tiles, z rows from first_row on.
#define ATTEND(name, RUN)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                                        \
        name(global<float> scratch, global<float> statistics, global<const bf16> q, global<const bf16> k,           \
             global<const bf16> v, Shape shape, u32 first_row) {                                                    \
        attend<RUN>(scratch, statistics, q, k, v, shape, first_row);                                                \
    }                                                                                                               \
    ENTRY(name)
ATTEND(cached_attention_8, 8)
ATTEND(cached_attention_1, 1)

// Grid: x heads, y rows from first_row on.
extern "C" __global__ void __launch_bounds__(THREADS)
    cached_attention_combine(global<bf16> out, global<const float> scratch, global<const float> statistics, Shape shape,
                             u32 first_row) {
    const u32 row = first_row + blockIdx.y, d = shape.head_dim;
    const Seen seen = seen_by(shape, row);
    const u32 chunks = (seen.last - 1) / CHUNK - seen.first / CHUNK + 1;
    const u64 slot = (u64(blockIdx.y) * shape.heads + blockIdx.x) * shape.chunks;
    float most = -3.402823466e38f;
    for (u32 c = 0; c < chunks; c++) most = larger(load_global<float>(statistics + (slot + c) * 2), most);
    for (u32 element = threadIdx.x; element < d; element += THREADS) {
        float total = 0, sum = 0;
        for (u32 c = 0; c < chunks; c++) {
            const vec<float, 2> s = load_global<vec<float, 2>>(statistics + (slot + c) * 2);
            const float weight = expf(s[0] - most);
            total = fmaf(s[1], weight, total);
            sum = fmaf(load_global<float>(scratch + ((slot + c) * d + element)), weight, sum);
        }
        store_global(out + ((u64(row) * shape.heads + blockIdx.x) * d + element), to_bf16(sum / total));
    }
}
ENTRY(cached_attention_combine)
