// What the matrix products have in common: how a block finds its tile, fragments from shared memory, the down product beside
// the main one, the LoRA tail, the epilogue. gemm.cu and gemm_nf4.cu differ in how operands reach shared memory.
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
    global<const bf16> left;    // [m, depth], rows left_stride apart; readable, and 0, up to the next multiple of 8
    global<const bf16> right;   // dense: NT [columns, depth], NN [depth, columns]
    global<const u8> packed;    // or in NF4, in the order of gemm_pack.cu
    Absmax absmax;
    global<const float> bias;   // [columns] or null
    global<const bf16> down;    // [m, rank]
    global<const bf16> up;      // NT [columns, rank], NN [rank, columns]
    global<const bf16> narrow;  // for the kernels that make `down` themselves: NT [rank, depth], NN [depth, rank]
    global<bf16> made;          // and where it goes, [m, rank]
    global<bf16> out;           // [m, columns], rows out_stride apart; float for the kernels that say so
    u64 threshold;              // of dropout: p·2³², 0 when there is none
    u32 left_stride, depth, columns, rank;
    u32 out_stride, block_shift;
    u32 first_tile;  // of columns, unless SUM; 2³² − 1 where there is no part
    u32 first_step;  // tile of the sum, if SUM; likewise
    u32 row_blocks;  // blocks of scales of a row of the weight
    u32 module;
    float scale, keep;
    float made_scale;
    u32 padding;
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

// ── The down product on the resident tile ──

// U or G of the rows of a block: a tile of 16 columns beside those of the main product, on the fragments of the left operand
// that are in registers anyway. Of the warps side by side, w takes 8 columns and OWN of the fragments. It is made in every block
// of a row of tiles, the same bits each time, and stored by the first.
constexpr u32 WIDTH = 16;
constexpr u32 NARROW = WIDTH * DEPTH;  // elements of a tile

template <typename T, bool NN, bool SUM>
struct Resident {
    static constexpr bool MADE = true;
    static constexpr u32 OWN = T::MI * 2 / T::ACROSS, SLOTS = SUM ? MOST_PARTS : 1;
    static_assert(OWN * T::ACROSS == T::MI * 2 && (T::ACROSS == 2 || T::ACROSS == 4), "two or four warps share 16 columns");
    FragmentC u[OWN] = {};
    shared<bf16> ring;
    u32 lane, warp_m, side, first;  // its 8 columns, its first fragment
    u32 upper;                      // all ones when that is not 0

    __device__ __forceinline__ explicit Resident(shared<bf16> ring) : ring(ring) {
        const Place<T> at;
        const u32 w = threadIdx.x / WARP % T::ACROSS;
        lane = at.lane, warp_m = at.warp_m, side = w % 2, first = w / 2 * OWN, upper = 0u - w / 2;
    }

    __device__ __forceinline__ void copy(u32 stage, const Part& part, u32 k) const {
        const shared<bf16> to = ring + stage * NARROW;
        if constexpr (NN)
            copy_tile<DEPTH, WIDTH / 8, T::THREADS>(to, part.narrow, k, 0, part.depth, part.rank, part.rank);
        else
            copy_tile<WIDTH, DEPTH / 8, T::THREADS>(to, part.narrow, 0, k, part.rank, part.depth, part.depth);
    }

    __device__ __forceinline__ void multiply(const FragmentA (&a)[T::MI], u32 stage, u32 step) {
        const shared<bf16> tile = ring + stage * NARROW;
        FragmentB b;
        if constexpr (NN)
            ldmatrix<2, true>(b.b, tile + swizzled<WIDTH / 8>(16 * step + lane % 16, side));
        else
            ldmatrix<2>(b.b, tile + swizzled<DEPTH / 8>(8 * side + lane % 8, 2 * step + lane / 8 % 2));
#pragma unroll
        for (u32 f = 0; f < OWN; f++) {
            FragmentA mine = a[f];
            if constexpr (OWN < T::MI) {
                // By bits: a choice between fragments would be one between places in memory.
#pragma unroll
                for (u32 e = 0; e < 4; e++) mine.a[e] = (a[f].a[e] & ~upper) | (a[OWN + f].a[e] & upper);
            }
            mma_m16n8k16(u[f], mine, b);
        }
    }

    __device__ __forceinline__ static shared<bf16> slot(u32 part) {
        return static_shared<bf16, SLOTS * T::M * WIDTH>() + (SUM ? part : 0) * T::M * WIDTH;
    }

    // Rounds what was summed, keeps it for the tail of part p and begins anew.
    __device__ __forceinline__ void finish(const Part& part, u32 p, u32 m, u32 m0, bool stores) {
        const u32 column = 8 * side + lane % 4 * 2;
#pragma unroll
        for (u32 f = 0; f < OWN; f++) {
#pragma unroll
            for (u32 h = 0; h < 2; h++) {
                const u32 row = warp_m + 16 * (first + f) + 8 * h + lane / 4;
                // As store_tile, whose bias is 0.
                const float x = u[f].c[2 * h] * part.made_scale + 0.0f, y = u[f].c[2 * h + 1] * part.made_scale + 0.0f;
                store_shared(slot(p) + swizzled<WIDTH / 8>(row, side) + lane % 4 * 2, pack_bf16(x, y));
                if (stores && m0 + row < m)
                    store_pair<bf16>(part.made + u64(m0 + row) * part.rank, column, part.rank, part.rank % 2 == 0, x, y);
            }
            u[f] = {};
        }
    }

    // Of the tail of part p.
    __device__ __forceinline__ FragmentA fragment(u32 p, u32 i) const {
        FragmentA a;
        ldmatrix<4>(a.a, slot(p) + swizzled<WIDTH / 8>(warp_m + 16 * i + lane % 16, lane / 16));
        return a;
    }
};

// It was made before, by a launch of its own.
struct Made {
    static constexpr bool MADE = false;
};

// acc += left·right over one tile of DEPTH, and of the down product. The places of all fragments follow from that of the first:
// eight rows further the rotation is the same, and the bits of a piece's number that differ are flipped through it.
template <typename T, bool NN, typename Down>
__device__ __forceinline__ void multiply_tile(Accumulators<T>& acc, shared<bf16> left, shared<bf16> right, Down& down,
                                              u32 stage) {
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
        if constexpr (Down::MADE) down.multiply(a, stage, step);
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
// fragment(i, k) is the fragment of `down` in row i of the warp's.
template <typename T, bool NN, bool QUADS, typename F>
__device__ __forceinline__ void add_tail(Accumulators<T>& acc, const Group& group, const Part& part, u32 m0, u32 n0,
                                         F fragment) {
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
                    mma_m16n8k16(own, fragment(i, k), up_fragment<NN>(part, column, k));
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
        for (u32 i = 0; i < T::MI; i++) a[i] = fragment(i, k);
#pragma unroll
        for (u32 j = 0; j < T::NI; j++) {
            const FragmentB b = up_fragment<NN>(part, n0 + at.warp_n + 8 * j, k);
#pragma unroll
            for (u32 i = 0; i < T::MI; i++) mma_m16n8k16(acc[i][j], a[i], b);
        }
    }
}

// ── Epilogue ──

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

template <typename T>
__device__ __forceinline__ void copy_left(shared<bf16> to, const Part& part, u32 m, u32 m0, u32 k) {
    copy_tile<T::M, LEFT_CHUNKS, T::THREADS>(to, part.left, m0, k, m, part.depth, part.left_stride);
}

// Tiles of rows that are worked on side by side, so that what they share stays in the second-level cache.
constexpr u32 BAND = 8;

// main_loop(acc, down, first, tiles, m0, n0) sums `tiles` tiles of depth from part `first` on. Down is Resident or Made. QUADS:
// columns are a multiple of 4 where there is dropout.
template <typename T, bool NN, bool SUM, typename Out, bool QUADS, typename Down, typename Main>
__device__ __forceinline__ void product(const Group& group, Down down, Main main_loop) {
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
    main_loop(acc, down, first, tiles, m0, n0);
    if constexpr (Down::MADE) __syncthreads();  // what the warps have left for the tail
    const Place<T> at;
    for (u32 p = first; p < last; p++) {
        const Part& part = group.parts[p];
        add_tail<T, NN, QUADS>(acc, group, part, m0, n0, [&](u32 i, u32 k) {
            if constexpr (Down::MADE)
                return down.fragment(p, i);
            else
                return down_fragment(part, group.m, m0 + at.warp_m + 16 * i, k);
        });
    }
    store_tile<T, Out>(acc, group.parts[first], group.m, m0, n0);
}

// Whether a part ends with this tile: then its down product is complete.
template <bool SUM>
__device__ __forceinline__ bool ends(const Group& group, u32 first, u32 tile, u32 tiles) {
    if (tile + 1 == tiles) return true;
    return SUM && Position<SUM>(group, first, tile).part != Position<SUM>(group, first, tile + 1).part;
}

// After tile `tile`: hands over the down product of a part that ends with it.
template <bool SUM, typename Down>
__device__ __forceinline__ void finish(Down& down, const Group& group, u32 first, u32 tile, u32 tiles, u32 m0, u32 n0) {
    if constexpr (Down::MADE) {
        if (!ends<SUM>(group, first, tile, tiles)) return;
        const u32 p = Position<SUM>(group, first, tile).part;
        if (group.parts[p].rank > 0) down.finish(group.parts[p], p, group.m, m0, n0 == 0);
    }
}
