// Tiles of bf16 in shared memory, and the products that attention makes of them.
//
// A tile is rows of D elements, D a multiple of 64, in chunks of 16 bytes. Chunk c of row r lies at place c ^ (r % 8) of
// its row: the eight rows of one chunk, which ldmatrix fetches together, lie in all 32 banks, and so do the eight chunks
// of one row, which are copied together.
//
// A warp owns 16 rows of every product. In the layouts g = lane / 4 and t = lane % 4 (ptx.cuh): a lane has, of each 8
// columns, those at 2t and 2t + 1 in the rows g and g + 8.
#pragma once
#include <attention.cuh>
#include <ptx.cuh>

// Tokens that a block owns, and keys of a tile.
constexpr u32 ROWS = 64;
// Rows of a warp.
constexpr u32 PART = 16;

//
// place(row, 2·i + c) is place(row, c) ^ 16·i for c < 2, and eight rows further on is 8·D further on: a lane works out one
// place, and the addresses of a loop are constants beside it.
template <u32 D>
__device__ __forceinline__ u32 place(u32 row, u32 chunk) {
    return row * D + (chunk ^ (row % 8)) * 8;
}

// block: copies a tile of N rows of `d` elements, a multiple of 8 up to D, that lie `stride` elements apart. What lies
// beyond d, and rows from `rows` on, become zeros. The caller commits.
template <u32 D, u32 N, u32 THREADS>
__device__ __forceinline__ void copy_tile(shared<bf16> to, global<const bf16> from, u64 stride, u32 rows, u32 d) {
    constexpr u32 CHUNKS = D / 8;
    static_assert(THREADS % CHUNKS == 0 && N * CHUNKS % THREADS == 0, "every thread copies as much");
    const u32 chunk = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS;
    const bool inside = chunk * 8 < d;
    from += first * stride + chunk * 8;
#pragma unroll
    for (u32 row = 0; row < N; row += THREADS / CHUNKS) {
        cp_async<16>(to + place<D>(first + row, chunk), from, inside && first + row < rows);
        from += THREADS / CHUNKS * stride;
    }
}

// warp: rows `row` to `row` + 15, columns 16·i to 16·i + 15 as the left factor.
template <u32 D>
__device__ __forceinline__ FragmentA left_factor(shared<bf16> tile, u32 row, u32 i) {
    const u32 lane = threadIdx.x % WARP, at = place<D>(row + lane % 16, lane / 16);
    FragmentA a;
    ldmatrix<4>(a.a, tile + (at ^ 16 * i));
    return a;
}

// warp: c[16 × N] += A[16 × D] · Bᵀ of the first N rows of a tile; left(i) gives columns 16·i … of A.
template <u32 D, u32 N, typename Left>
__device__ __forceinline__ void multiply_by_rows(FragmentC (&c)[N / 8], Left left, shared<bf16> tile) {
    const u32 lane = threadIdx.x % WARP, at = place<D>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (u32 i = 0; i < D / 16; i++) {
        const FragmentA a = left(i);
        shared<bf16> rows = tile + (at ^ 16 * i);
#pragma unroll
        for (u32 n = 0; n < N / 16; n++) {
            u32 b[4];
            ldmatrix<4>(b, rows + n * 16 * D);
            mma_m16n8k16(c[2 * n], a, {{b[0], b[1]}});
            mma_m16n8k16(c[2 * n + 1], a, {{b[2], b[3]}});
        }
    }
}

// warp: c[16 × D] += bf16(A[16 × K]) · B of the first K rows of a tile. A lies as a product left it: two of its pieces of 8
// columns are one left factor.
template <u32 D, u32 K>
__device__ __forceinline__ void multiply_by_columns(FragmentC (&c)[D / 8], const FragmentC (&a)[K / 8],
                                                    shared<bf16> tile) {
    const u32 lane = threadIdx.x % WARP, at = place<D>(lane % 16, lane / 16);
#pragma unroll
    for (u32 k = 0; k < K / 16; k++) {
        const float(&low)[4] = a[2 * k].c, (&high)[4] = a[2 * k + 1].c;
        const FragmentA left = {{pack_bf16(low[0], low[1]), pack_bf16(low[2], low[3]), pack_bf16(high[0], high[1]),
                                 pack_bf16(high[2], high[3])}};
#pragma unroll
        for (u32 n = 0; n < D / 16; n++) {
            u32 b[4];
            ldmatrix<4, true>(b, tile + (at ^ 16 * n) + k * 16 * D);
            mma_m16n8k16(c[2 * n], left, {{b[0], b[1]}});
            mma_m16n8k16(c[2 * n + 1], left, {{b[2], b[3]}});
        }
    }
}

// warp: writes its 16 rows of a result, the first `rows` of them and of each the first `d` elements, to rows of memory that
// lie `stride` apart. They go through `own`, 16 rows of shared memory that no other warp touches any more, so that whole
// sectors are written.
template <u32 D>
__device__ __forceinline__ void store_part(global<bf16> to, u64 stride, u32 rows, u32 d, const FragmentC (&c)[D / 8],
                                           shared<bf16> own) {
    const u32 lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (u32 n = 0; n < D / 8; n++) {
        store_shared(own + place<D>(g, n) + 2 * t, pack_bf16(c[n].c[0], c[n].c[1]));
        store_shared(own + place<D>(g + 8, n) + 2 * t, pack_bf16(c[n].c[2], c[n].c[3]));
    }
    __syncwarp();
    constexpr u32 CHUNKS = D / 8;
#pragma unroll
    for (u32 i = lane; i < PART * CHUNKS; i += WARP) {
        const u32 row = i / CHUNKS, chunk = i % CHUNKS;
        if (row < rows && chunk * 8 < d)
            store_global(to + row * stride + chunk * 8, load_shared<vec<bf16, 8>>(own + place<D>(row, chunk)));
    }
}

// Rows from `first` on of which there are `len`.
__device__ __forceinline__ u32 rows_from(u32 first, u32 len) { return len > first ? len - first : 0; }

// warp: every row over the four lanes that have it.
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(FULL, x, 1);
    return x + __shfl_xor_sync(FULL, x, 2);
}
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL, x, 2));
}
