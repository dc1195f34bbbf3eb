// Matrix products of bf16 with sums in fp32: Y = X·Wᵀ, dX = dY·W, the logits and their gradient, and the narrow products
// U = scale·X·Aᵀ and G = scale·dY·B of a LoRA. gemm.cuh has the formula with its rounding points, and the order of the sums.
//
// Tiled (sizes in the name: rows × columns of a block): operands are copied by cp.async, 16 bytes a thread, into a ring of
// four tiles of depth 32 (eight of the narrow ones), whose pieces are swizzled; ldmatrix and mma read them without bank
// conflicts. One barrier a tile:
//
//     wait for tile k ─► barrier ─► ask for tile k + 3 ─► 2 steps of mma on tile k
//
// The kernels with `lora` in their names make the down product beside the main one (gemm.cuh, Resident).
// It needs rows of `left` and `right` that begin at multiples of 16 bytes. The general kernels need nothing: they read what
// cannot be read in pieces of 16 bytes element by element, one tile at a time.
//
// Bytes: left is read once for every tile of columns, right once for every tile of rows, most of it from the second-level
// cache; out 2 an element (4 in f32). Bound: tensor cores from about 200 rows on, memory below (reading W). Out of reach: a
// tile of 128 × 128 × 32 keeps the tensor cores of an Orin for 512 clocks and shared memory for 384 + 128 of them.
#include <gemm.cuh>

// Asks for a tile of the right operand.
template <typename T, bool NN>
__device__ __forceinline__ void copy_right(shared<bf16> to, const Part& part, u32 n0, u32 k) {
    constexpr u32 CHUNKS = right_chunks<T, NN>();
    if constexpr (NN)
        copy_tile<DEPTH, CHUNKS, T::THREADS>(to, part.right, k, n0, part.depth, part.columns, part.columns);
    else
        copy_tile<T::N, CHUNKS, T::THREADS>(to, part.right, n0, k, part.columns, part.depth, part.depth);
}

template <typename T, bool NN, bool SUM, typename Out, bool MAKES>
__device__ __forceinline__ void tiled(const Group& group) {
    constexpr u32 STAGES = T::STAGES;
    const shared<bf16> left = shared_cast<bf16>(dynamic_shared()), right = left + STAGES * T::LEFT;
    auto main_loop = [&](Accumulators<T>& acc, auto& down, u32 first, u32 tiles, u32 m0, u32 n0) {
        auto ask = [&](u32 tile) {
            if (tile < tiles) {
                const Position<SUM> at(group, first, tile);
                const Part& part = group.parts[at.part];
                const u32 stage = tile % STAGES;
                copy_left<T>(left + stage * T::LEFT, part, group.m, m0, at.k);
                copy_right<T, NN>(right + stage * T::RIGHT, part, n0, at.k);
                if constexpr (MAKES) down.copy(stage, part, at.k);
            }
            cp_async_commit();
        };
#pragma unroll
        for (u32 tile = 0; tile + 1 < STAGES; tile++) ask(tile);
        for (u32 tile = 0; tile < tiles; tile++) {
            cp_async_wait<STAGES - 2>();
            __syncthreads();
            ask(tile + STAGES - 1);  // to where the tile was that all have left behind
            const u32 stage = tile % STAGES;
            multiply_tile<T, NN>(acc, left + stage * T::LEFT, right + stage * T::RIGHT, down, stage);
            if constexpr (SUM) finish<SUM>(down, group, first, tile, tiles, m0, n0);
        }
        if constexpr (!SUM) finish<SUM>(down, group, first, tiles - 1, tiles, m0, n0);
        cp_async_wait<0>();
    };
    if constexpr (MAKES)
        product<T, NN, SUM, Out, true>(group, Resident<T, NN, SUM>(right + STAGES * T::RIGHT), main_loop);
    else
        product<T, NN, SUM, Out, true>(group, Made{}, main_loop);
}

// Eight elements of a row of a matrix [rows, width] with rows `stride` apart, 0 outside of it.
__device__ __forceinline__ vec<bf16, 8> load_piece(global<const bf16> x, u32 row, u32 column, u32 rows, u32 width,
                                                   u32 stride) {
    vec<bf16, 8> piece = {};
    if (row >= rows) return piece;
    global<const bf16> at = x + (u64(row) * stride + column);
    if (stride % 8 == 0 && column + 8 <= width) return load_global<vec<bf16, 8>>(at);
#pragma unroll
    for (u32 i = 0; i < 8; i++)
        if (column + i < width) piece[i] = load_global<bf16>(at + i);
    return piece;
}

template <bool NN, bool SUM, typename Out>
__device__ __forceinline__ void general(const Group& group) {
    typedef Medium T;
    product<T, NN, SUM, Out, false>(group, Made{}, [&](Accumulators<T>& acc, Made& down, u32 first, u32 tiles, u32 m0, u32 n0) {
        constexpr u32 CHUNKS = right_chunks<T, NN>();
        const shared<bf16> left = static_shared<bf16, T::LEFT, 0>(), right = static_shared<bf16, T::RIGHT, 1>();
        for (u32 tile = 0; tile < tiles; tile++) {
            const Position<SUM> at(group, first, tile);
            const Part& part = group.parts[at.part];
            for (u32 piece = threadIdx.x; piece < T::LEFT / 8; piece += T::THREADS) {
                const u32 row = piece / LEFT_CHUNKS, chunk = piece % LEFT_CHUNKS;
                store_shared(left + swizzled<LEFT_CHUNKS>(row, chunk),
                             load_piece(part.left, m0 + row, at.k + 8 * chunk, group.m, part.depth, part.left_stride));
            }
            for (u32 piece = threadIdx.x; piece < T::RIGHT / 8; piece += T::THREADS) {
                const u32 row = piece / CHUNKS, chunk = piece % CHUNKS;
                const u32 y = (NN ? at.k : n0) + row, x = (NN ? n0 : at.k) + 8 * chunk;
                const u32 rows = NN ? part.depth : part.columns, width = NN ? part.columns : part.depth;
                store_shared(right + swizzled<CHUNKS>(row, chunk), load_piece(part.right, y, x, rows, width, width));
            }
            __syncthreads();
            multiply_tile<T, NN>(acc, left, right, down, 0);
            __syncthreads();
        }
    });
}

#define PRODUCT(name, T, BLOCKS, BODY)                                                                        \
    extern "C" __global__ void __launch_bounds__(T::THREADS, BLOCKS) name(const __grid_constant__ Group group) { \
        BODY(group);                                                                                          \
    }                                                                                                         \
    ENTRY(name)
PRODUCT(gemm_nt_128x128, Large, 2, (tiled<Large, false, false, bf16, false>))
PRODUCT(gemm_nt_64x64, Medium, 4, (tiled<Medium, false, false, bf16, false>))
PRODUCT(gemm_nt_32x64, Small, 4, (tiled<Small, false, false, bf16, false>))
PRODUCT(gemm_nt_f32_128x128, Large, 2, (tiled<Large, false, false, float, false>))
PRODUCT(gemm_nt_f32_32x64, Small, 4, (tiled<Small, false, false, float, false>))
PRODUCT(gemm_nn_128x128, Large, 2, (tiled<Large, true, true, bf16, false>))
PRODUCT(gemm_nn_64x64, Medium, 4, (tiled<Medium, true, true, bf16, false>))
PRODUCT(gemm_nn_32x64, Small, 4, (tiled<Small, true, true, bf16, false>))
PRODUCT(gemm_nt_64x16, Narrow, 4, (tiled<Narrow, false, false, bf16, false>))
PRODUCT(gemm_nn_64x16, Narrow, 4, (tiled<Narrow, true, false, bf16, false>))
PRODUCT(gemm_nt_lora_128x128, Large, 2, (tiled<Large, false, false, bf16, true>))
PRODUCT(gemm_nt_lora_64x64, Medium, 4, (tiled<Medium, false, false, bf16, true>))
PRODUCT(gemm_nt_lora_32x64, Small, 4, (tiled<Small, false, false, bf16, true>))
PRODUCT(gemm_nn_lora_128x128, Large, 2, (tiled<Large, true, true, bf16, true>))
PRODUCT(gemm_nn_lora_64x64, Medium, 4, (tiled<Medium, true, true, bf16, true>))
PRODUCT(gemm_nn_lora_32x64, Small, 4, (tiled<Small, true, true, bf16, true>))
PRODUCT(gemm_nt_general, Medium, 4, (general<false, false, bf16>))
PRODUCT(gemm_nt_f32_general, Medium, 4, (general<false, false, float>))
PRODUCT(gemm_nn_general, Medium, 4, (general<true, true, bf16>))
PRODUCT(gemm_nn_narrow_general, Medium, 4, (general<true, false, bf16>))
