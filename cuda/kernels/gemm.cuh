// What the matrix products have in common: how a block finds its tile, fragments from shared memory, the LoRA tail, the
// epilogue. gemm.cu and gemm_nf4.cu differ in how operands reach shared memory.
//
//   out_p[m, n] = bf16((Σ_k left_p[m, k]·right_p[k, n] + Σ_j down_p[m, j]·up_p[j, n])·scale_p + bias_p[n])
//   or, SUM:     out[m, n] = bf16(Σ_p Σ_k left_p[m, k]·right_p[k, n] + Σ_p Σ_j down_p[m, j]·up_p[j, n])
//
// for up to three parts p. NT: `right` and `up` are stored [n, k], as W is for Y = X·Wᵀ. NN: [k, n], as W is for dX = dY·W.
//
// The order of a sum is the same in every kernel: the parts in order, each in ascending steps of 16 products (one mma), then
// the tails of the parts in order, in steps of 16. A step that the last one of a tile fills with zeros changes nothing. So a
// row's result depends on neither the tile, the path nor the other rows.
#pragma once
#include <nf4.cuh>
#include <philox.cuh>
#include <ptx.cuh>
#include <vector.cuh>

// ops/linear.rs has the same structures.
struct Part {
    global<const bf16> left;   // [m, depth], rows left_stride apart; readable, and 0, up to the next multiple of 8
    global<const bf16> right;  // dense: NT [columns, depth], NN [depth, columns]
    global<const u8> packed;   // or in NF4, in the order of gemm_pack.cu
    Absmax absmax;
    global<const float> bias;  // [columns] or null
    global<const bf16> down;   // [m, rank]
    global<const bf16> up;     // NT [columns, rank], NN [rank, columns]
    global<bf16> out;          // [m, columns], rows out_stride apart; float for the kernels that say so
    u64 threshold;             // of dropout: p·2³², 0 when there is none
    u32 left_stride, depth, columns, rank;
    u32 out_stride, block_shift;
    u32 first_tile;  // of columns, unless SUM; 2³² − 1 where there is no part
    u32 first_step;  // tile of the sum, if SUM; likewise
    u32 row_blocks;  // blocks of scales of a row of the weight
    u32 module;
    float scale, keep;
};

constexpr u32 MOST_PARTS = 3;

struct Group {
    Part parts[MOST_PARTS];
    global<const u32> offsets;  // of the sequences, for dropout
    global<const u64> keys;
    u32 sequences, count, m;
    u32 n_tiles;  // of columns, of all parts together
    u32 steps;    // tiles of the sum, if SUM
    u32 padding;
};

constexpr u32 DEPTH = 32;  // of a tile: two steps of mma
constexpr u32 STEPS = DEPTH / 16;

// Rows × columns of a block, how its warps share them, and how many tiles of depth it holds.
template <u32 ROWS, u32 COLUMNS, u32 WARPS_M, u32 WARPS_N, u32 RING = 4>
struct Tile {
    static constexpr u32 STAGES = RING;
    static constexpr u32 M = ROWS, N = COLUMNS;
    static constexpr u32 THREADS = WARPS_M * WARPS_N * WARP;
    static constexpr u32 ACROSS = WARPS_N;                  // warps side by side
    static constexpr u32 WARP_M = M / WARPS_M, WARP_N = N / WARPS_N;
    static constexpr u32 MI = WARP_M / 16, NI = WARP_N / 8;  // fragments of a warp
    static constexpr u32 LEFT = M * DEPTH, RIGHT = N * DEPTH;  // elements
    static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0, "fragments are loaded two at a time");
    static_assert((NI & (NI - 1)) == 0 && NI <= 8, "multiply_tile flips bits below NI");
};

typedef Tile<128, 128, 2, 4> Large;
typedef Tile<64, 64, 2, 2> Medium;
typedef Tile<32, 64, 2, 2> Small;
typedef Tile<64, 16, 4, 1, 8> Narrow;  // few blocks, little to compute: what is in flight is what it is fast by

// Shared memory holds tiles with rows of CHUNKS · 16 bytes. Which eight of these 16-byte pieces meet in one pass through the
// banks is either a column of eight rows (ldmatrix) or a run of a row (copies): a row's pieces are rotated by XOR, so that
// neither meets a bank twice. The place in elements of a piece:
template <u32 CHUNKS>
__device__ __forceinline__ u32 swizzled(u32 row, u32 chunk) {
    constexpr u32 ROWS = CHUNKS < 8 ? 8 / CHUNKS : 1;     // that share a line of 128 bytes
    constexpr u32 MASK = (CHUNKS < 8 ? CHUNKS : 8) - 1;
    return (row * CHUNKS + (chunk ^ (row / ROWS & MASK))) * 8;
}

constexpr u32 LEFT_CHUNKS = DEPTH / 8;
// Pieces of a row of the right tile: NT [n, depth], NN [depth, n].
template <typename T, bool NN>
constexpr u32 right_chunks() {
    return NN ? T::N / 8 : DEPTH / 8;
}

template <typename T>
using Accumulators = FragmentC[T::MI][T::NI];

// Where a warp and a lane stand in the block's tile.
template <typename T>
struct Place {
    u32 warp_m, warp_n, lane;
    __device__ __forceinline__ Place()
        : warp_m(threadIdx.x / WARP / T::ACROSS * T::WARP_M),
          warp_n(threadIdx.x / WARP % T::ACROSS * T::WARP_N),
          lane(threadIdx.x % WARP) {}
};

// acc += left·right over one tile of DEPTH. The places of all fragments follow from that of the first: eight rows further the
// rotation is the same, and the bits of a piece's number that differ are flipped through it.
template <typename T, bool NN>
__device__ __forceinline__ void multiply_tile(Accumulators<T>& acc, shared<bf16> left, shared<bf16> right) {
    constexpr u32 CHUNKS = right_chunks<T, NN>();
    const Place<T> at;
    const u32 lane = at.lane;
    const u32 a0 = swizzled<LEFT_CHUNKS>(at.warp_m + lane % 16, lane / 16);
    const u32 b0 = NN ? swizzled<CHUNKS>(lane % 16, at.warp_n / 8 + lane / 16)
                      : swizzled<CHUNKS>(at.warp_n + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (u32 step = 0; step < STEPS; step++) {
        FragmentA a[T::MI];
#pragma unroll
        for (u32 i = 0; i < T::MI; i++) ldmatrix<4>(a[i].a, left + (a0 ^ 16 * step) + i * 16 * DEPTH);
#pragma unroll
        for (u32 j = 0; j < T::NI; j += 2) {
            u32 b[4];
            if constexpr (NN)
                ldmatrix<4, true>(b, right + (b0 ^ 8 * j) + step * 16 * T::N);
            else
                ldmatrix<4>(b, right + (b0 ^ 16 * step) + j * 8 * DEPTH);
#pragma unroll
            for (u32 i = 0; i < T::MI; i++) {
                mma_m16n8k16(acc[i][j], a[i], FragmentB{{b[0], b[1]}});
                mma_m16n8k16(acc[i][j + 1], a[i], FragmentB{{b[2], b[3]}});
            }
        }
    }
}

// ── The LoRA tail: its operands are r wide, and go from global memory straight into fragments ──

// Elements (row, column) and (row, column + 1) of a matrix [rows, columns], 0 outside of it.
__device__ __forceinline__ u32 load_pair(global<const bf16> x, u32 row, u32 column, u32 rows, u32 columns) {
    if (row >= rows || column >= columns) return 0;
    global<const bf16> at = x + (u64(row) * columns + column);
    if (columns % 2 == 0) return load_global<u32>(at);
    const u32 low = load_global<bf16>(at).bits;
    return column + 1 < columns ? low | u32(load_global<bf16>(at + 1).bits) << 16 : low;
}

// `first` is the row of the fragment's first element, `k` its first column.
__device__ __forceinline__ FragmentA down_fragment(const Part& part, u32 m, u32 first, u32 k) {
    const u32 g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    FragmentA a;
#pragma unroll
    for (u32 i = 0; i < 4; i++)
        a.a[i] = load_pair(part.down, first + g + i % 2 * 8, k + 2 * t + i / 2 * 8, m, part.rank);
    return a;
}

template <bool NN>
__device__ __forceinline__ FragmentB up_fragment(const Part& part, u32 first, u32 k) {
    const u32 g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    FragmentB b;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        const u32 row = k + 2 * t + 8 * i, column = first + g;
        if constexpr (NN) {
            b.b[i] = 0;
#pragma unroll
            for (u32 j = 0; j < 2; j++)
                if (row + j < part.rank && column < part.columns)
                    b.b[i] |= u32(load_global<bf16>(part.up + (u64(row + j) * part.columns + column)).bits) << 16 * j;
        } else {
            b.b[i] = load_pair(part.up, column, row, part.columns, part.rank);
        }
    }
    return b;
}

// Dropout of dropout.cu on a fragment of dX, whose row r and column c is element t·columns + c of its sequence.
struct Token {
    u64 first, key;  // its first element in the sequence; the sequence's key
};

__device__ __forceinline__ Token token_of(const Group& group, u32 row, u32 columns) {
    u32 low = 0, high = group.sequences;
    row = min(row, group.m - 1);  // rows outside are not stored
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (load_global<u32>(group.offsets + middle) <= row)
            low = middle;
        else
            high = middle;
    }
    return {u64(row - load_global<u32>(group.offsets + low)) * columns, load_global<u64>(group.keys + low)};
}

__device__ __forceinline__ vec<u32, 4> words_of(u64 element, u32 module, u64 key) {
    const u64 block = element / 4;
    return philox4x32(vec<u32, 4>{{u32(block), u32(block >> 32), module, 0}}, u32(key), u32(key >> 32));
}

// Masks a fragment whose first element is (row, column). With QUADS, rows are a multiple of 4 long, and a block of Philox is
// four neighbours of one; two lanes share it: one computes that of row g, the other that of row g + 8.
template <bool QUADS>
__device__ __forceinline__ void drop(FragmentC& c, const Group& group, const Part& part, const Token& mine, u32 row,
                                     u32 column) {
    const bool odd = threadIdx.x % 2;
    u32 word[4];
    if constexpr (QUADS) {
        const vec<u32, 4> words = words_of(mine.first + (column & ~3u), part.module, mine.key);
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const u32 other = __shfl_xor_sync(FULL, odd ? words[i] : words[2 + i], 1);
            word[i] = odd ? other : words[i];
            word[2 + i] = odd ? words[2 + i] : other;
        }
    } else {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const Token token = token_of(group, row + i / 2 * 8, part.columns);
            const u64 element = token.first + column + i % 2;
            const vec<u32, 4> words = words_of(element, part.module, token.key);
#pragma unroll
            for (u32 j = 0; j < 4; j++)
                if (element % 4 == j) word[i] = words[j];
        }
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) c.c[i] = word[i] >= part.threshold ? c.c[i] * part.keep : 0;
}

// acc += down·up of one part. With dropout the product goes through the mask first, in an accumulator of its own.
template <typename T, bool NN, bool QUADS>
__device__ __forceinline__ void add_tail(Accumulators<T>& acc, const Group& group, const Part& part, u32 m0, u32 n0) {
    const Place<T> at;
    if (NN && part.threshold != 0) {
#pragma unroll
        for (u32 i = 0; i < T::MI; i++) {
            const u32 row = m0 + at.warp_m + 16 * i, mine = row + at.lane / 4;
            const Token token = token_of(group, at.lane % 2 ? mine + 8 : mine, part.columns);
#pragma unroll
            for (u32 j = 0; j < T::NI; j++) {
                const u32 column = n0 + at.warp_n + 8 * j;
                FragmentC own = {};
                for (u32 k = 0; k < part.rank; k += 16)
                    mma_m16n8k16(own, down_fragment(part, group.m, row, k), up_fragment<NN>(part, column, k));
                drop<QUADS>(own, group, part, token, mine, column + at.lane % 4 * 2);
#pragma unroll
                for (u32 e = 0; e < 4; e++) acc[i][j].c[e] += own.c[e];
            }
        }
        return;
    }
    for (u32 k = 0; k < part.rank; k += 16) {
        FragmentA a[T::MI];
#pragma unroll
        for (u32 i = 0; i < T::MI; i++) a[i] = down_fragment(part, group.m, m0 + at.warp_m + 16 * i, k);
#pragma unroll
        for (u32 j = 0; j < T::NI; j++) {
            const FragmentB b = up_fragment<NN>(part, n0 + at.warp_n + 8 * j, k);
#pragma unroll
            for (u32 i = 0; i < T::MI; i++) mma_m16n8k16(acc[i][j], a[i], b);
        }
    }
}

// ── Epilogue ──

// Two neighbours of a row.
template <typename Out>
__device__ __forceinline__ void store_pair(global<Out> row, u32 column, u32 columns, bool even, float x, float y) {
    const float pair[2] = {x, y};
    if (even) {
        if (column < columns) store_run<2>(row + column, pair);
        return;
    }
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        const float one[1] = {pair[i]};
        if (column + i < columns) store_run<1>(row + (column + i), one);
    }
}

// out = (acc·scale + bias), rounded once.
template <typename T, typename Out>
__device__ __forceinline__ void store_tile(const Accumulators<T>& acc, const Part& part, u32 m, u32 m0, u32 n0) {
    const Place<T> at;
    const u32 g = at.lane / 4, t = at.lane % 4, columns = part.columns;
    const global<Out> out = global_cast<Out>(part.out);
    const bool quads = (columns | part.out_stride) % 4 == 0, even = (columns | part.out_stride) % 2 == 0;
#pragma unroll
    for (u32 j = 0; j < T::NI; j += 2) {
        const u32 column = n0 + at.warp_n + 8 * j + 2 * t;
        float bias[4] = {0, 0, 0, 0};
        if (part.bias != nullptr) {
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                const u32 c = column + e / 2 * 8 + e % 2;
                if (c < columns) bias[e] = load_global<float>(part.bias + c);
            }
        }
#pragma unroll
        for (u32 i = 0; i < T::MI; i++) {
#pragma unroll
            for (u32 h = 0; h < 2; h++) {
                const u32 row = m0 + at.warp_m + 16 * i + 8 * h + g;
                float v[4];
#pragma unroll
                for (u32 e = 0; e < 4; e++) v[e] = acc[i][j + e / 2].c[2 * h + e % 2] * part.scale + bias[e];
                const global<Out> to = out + u64(row) * part.out_stride;
                if (sizeof(Out) == 2 && quads) {
                    // Two lanes exchange pairs: each stores four neighbours, and a row's eight stores fill a sector.
                    const u32 near = pack_bf16(v[0], v[1]), far = pack_bf16(v[2], v[3]);
                    const u32 other = __shfl_xor_sync(FULL, t % 2 ? near : far, 1);
                    const vec<u32, 2> four = t % 2 ? vec<u32, 2>{{other, far}} : vec<u32, 2>{{near, other}};
                    const u32 c = t % 2 ? column + 6 : column;
                    if (row < m && c < columns) store_global(to + c, four);
                } else if (row < m) {
                    store_pair<Out>(to, column, columns, even, v[0], v[1]);
                    store_pair<Out>(to, column + 8, columns, even, v[2], v[3]);
                }
            }
        }
    }
}

// ── A block ──

// Where tile `tile` of a block's sum lies: in which part, and how deep in it.
template <bool SUM>
struct Position {
    u32 part, k;
    __device__ __forceinline__ Position(const Group& group, u32 first, u32 tile) : part(first), k(tile * DEPTH) {
        if constexpr (SUM) {
#pragma unroll
            for (u32 p = 1; p < MOST_PARTS; p++)
                if (tile >= group.parts[p].first_step) part = p, k = (tile - group.parts[p].first_step) * DEPTH;
        }
    }
};

// Asks for ROWS rows of CHUNKS pieces of a row-major matrix [rows, width], from (row, column) on.
template <u32 ROWS, u32 CHUNKS, u32 THREADS>
__device__ __forceinline__ void copy_tile(shared<bf16> to, global<const bf16> x, u32 row, u32 column, u32 rows, u32 width,
                                          u32 stride) {
    constexpr u32 APART = THREADS / CHUNKS;  // rows of one copy
    static_assert(APART % 8 == 0, "a thread's rows are rotated alike");
    const u32 first = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    if (APART > ROWS && first >= ROWS) return;
    row += first, column += 8 * chunk;
    to += swizzled<CHUNKS>(first, chunk);
    x += u64(row) * stride + column;
#pragma unroll
    for (u32 i = 0; i < ROWS; i += APART)
        cp_async<16>(to + i * CHUNKS * 8, x + u64(i) * stride, row + i < rows && column < width);
}

template <typename T>
__device__ __forceinline__ void copy_left(shared<bf16> to, const Part& part, u32 m, u32 m0, u32 k) {
    copy_tile<T::M, LEFT_CHUNKS, T::THREADS>(to, part.left, m0, k, m, part.depth, part.left_stride);
}

constexpr u32 BAND = 8;  // tiles of rows that are worked on side by side, so that what they share stays in the second-level cache

// main_loop(acc, first, tiles, m0, n0) sums `tiles` tiles of depth from part `first` on. QUADS: columns are a multiple of 4.
template <typename T, bool NN, bool SUM, typename Out, bool QUADS, typename Main>
__device__ __forceinline__ void product(const Group& group, Main main_loop) {
    const u32 m_tiles = (group.m + T::M - 1) / T::M, band = blockIdx.x / (BAND * group.n_tiles);
    const u32 in_band = blockIdx.x % (BAND * group.n_tiles), rows = min(BAND, m_tiles - band * BAND);
    const u32 m0 = (band * BAND + in_band % rows) * T::M, tile = in_band / rows;
    u32 first = 0, last = group.count;
    if constexpr (!SUM) {
#pragma unroll
        for (u32 p = 1; p < MOST_PARTS; p++) first += tile >= group.parts[p].first_tile;
        last = first + 1;
    }
    const u32 n0 = (tile - group.parts[first].first_tile) * T::N;
    Accumulators<T> acc = {};
    const u32 tiles = SUM ? group.steps : (group.parts[first].depth + DEPTH - 1) / DEPTH;
    main_loop(acc, first, tiles, m0, n0);
    for (u32 p = first; p < last; p++) add_tail<T, NN, QUADS>(acc, group, group.parts[p], m0, n0);
    store_tile<T, Out>(acc, group.parts[first], group.m, m0, n0);
}
