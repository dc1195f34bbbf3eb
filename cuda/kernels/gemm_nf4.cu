// Matrix products with a weight in NF4, dequantised on its way to the tensor cores: Y = X·Wᵀ and dX = dY·W from the same
// bytes. gemm.cuh has the formula and the order of the sums, gemm_pack.cu the order of the codes. The weight that is
// multiplied is bf16(NF4[code]·absmax), as nf4.cu has it, so the result is the same bits as that of dequantising first.
//
// As gemm.cu, but the right operand's tiles travel as codes, in the ring of the left's; a warp then dequantises a unit a tile
// (a lane a row of 16 codes, which it copied itself, with one scale) into one of two tiles of bf16:
//
//     wait for tile k + 1 ─► barrier ─► ask for k + 3 and the scale of k + 2 ─► dequantise k + 1 ─► 2 steps of mma on k
//
// Dequantising and multiplying do not wait for each other. inputs is a multiple of 32 and of the block of scales.
//
// Bytes: those of gemm.cu, but 0.5 an element of the weight and its scales. Bound: memory (reading W) up to some 200 rows,
// tensor cores beyond. Out of reach: 128 lookups and 64 stores of 128 bytes a tile of 128 × 128 × 32 come on top of the 384 + 64
// clocks that shared memory is busy with fragments and copies, while the tensor cores need 512: from some 1000 rows on
// dequantising the layer once is faster (ops/linear.rs, tables).
#include <gemm.cuh>
#include <gemm_units.cuh>

// The scale of a row of a unit, asked for: plain (or of a row outside: 0) when `code` is PLAIN, else its parts.
struct Scale {
    float value;
    u32 code;
};
constexpr u32 PLAIN = 256;

// Of the block that begins at input i of a row, or the last one before.
__device__ __forceinline__ Scale ask_scale(const Part& part, u32 row, u32 i) {
    const u32 block = row * part.row_blocks + (i >> part.block_shift);
    if (part.absmax.plain != nullptr) return {load_global<float>(part.absmax.plain + block), PLAIN};
    return {load_global<float>(part.absmax.nested + (block >> part.absmax.nested_shift)),
            load_global<u8>(part.absmax.codes + block)};
}

// As absmax_of.
__device__ __forceinline__ float scale_of(const Part& part, const Scale& scale) {
    if (scale.code == PLAIN) return scale.value;
    return load_global<float>(part.absmax.map + scale.code) * scale.value + part.absmax.offset;
}

// Where a warp's unit lies: NT, a warp takes units side by side, then below; NN, side by side.
template <bool NN>
struct Unit {
    u32 down, across;  // from the corner of the tile, in units
    __device__ __forceinline__ Unit() {
        const u32 warp = threadIdx.x / WARP;
        down = NN ? 0 : warp / (DEPTH / UNIT), across = NN ? warp : warp % (DEPTH / UNIT);
    }
};

template <typename T, bool NN, bool SUM, bool MAKES>
__device__ __forceinline__ void fused(const Group& group) {
    static_assert(T::THREADS / WARP * PANEL * UNIT == T::RIGHT, "a warp has a unit of every tile");
    static_assert(DEPTH == PANEL, "a tile of NN is one panel deep");
    const shared<float> table = static_shared<float, 16>();
    if (threadIdx.x < 16) store_shared(table + threadIdx.x, NF4_CODES[threadIdx.x]);
    __syncthreads();
    constexpr u32 STAGES = T::STAGES;
    constexpr u32 CODES = T::THREADS * UNIT / 2;  // bytes of a tile: 8 a thread
    const shared<bf16> left = shared_cast<bf16>(dynamic_shared()), right = left + STAGES * T::LEFT;
    const shared<bf16> beside = right + 2 * T::RIGHT + STAGES * CODES / 2;
    const shared<u8> codes = shared_cast<u8>(right + 2 * T::RIGHT) + threadIdx.x * (UNIT / 2);
    auto main_loop = [&](Accumulators<T>& acc, auto& down, u32 first, u32 tiles, u32 m0, u32 n0) {
        const Unit<NN> unit;
        const u32 lane = threadIdx.x % WARP;
        // Of this lane's row in a tile of bf16; its second half is the piece beside it.
        const u32 place = swizzled<right_chunks<T, NN>()>(PANEL * unit.down + lane, 2 * unit.across);
        // First output and first input of this warp's unit of a tile.
        auto output_of = [&](u32 k) { return NN ? k : n0 + PANEL * unit.down; };
        auto input_of = [&](u32 k) { return (NN ? n0 : k) + UNIT * unit.across; };

        auto ask = [&](u32 tile) {
            if (tile < tiles) {
                const Position<SUM> at(group, first, tile);
                const Part& part = group.parts[at.part];
                const u32 outputs = NN ? part.depth : part.columns, inputs = NN ? part.columns : part.depth;
                const u32 o = output_of(at.k), i = input_of(at.k), stage = tile % STAGES;
                copy_left<T>(left + stage * T::LEFT, part, group.m, m0, at.k);
                cp_async<8>(codes + stage * CODES,
                            part.packed + (unit_at(o / PANEL, i / UNIT, inputs) + lane * (UNIT / 2)),
                            o < outputs && i < inputs);
                if constexpr (MAKES) down.copy(stage, part, at.k);
            }
            cp_async_commit();
        };
        // 0 for rows outside: their codes may be anything.
        Scale scale = {0, PLAIN};
        auto ask_scale_of = [&](u32 tile) {
            if (tile >= tiles) return;
            const Position<SUM> at(group, first, tile);
            const Part& part = group.parts[at.part];
            const u32 outputs = NN ? part.depth : part.columns, inputs = NN ? part.columns : part.depth;
            if (!NN && at.k % (1u << part.block_shift) != 0) return;  // the same block still: they are 32 inputs at least
            const u32 o = output_of(at.k) + lane, i = input_of(at.k);
            scale = {0, PLAIN};
            if (o < outputs && i < inputs) scale = ask_scale(part, o, i);
        };
        // Dequantises a tile, whose codes this thread has waited for, and asks for the scale of the one behind it.
        auto dequantize = [&](u32 tile) {
            if (tile >= tiles) return;
            const float by = scale_of(group.parts[Position<SUM>(group, first, tile).part], scale);
            ask_scale_of(tile + 1);
            const vec<u32, 2> pair = load_shared<vec<u32, 2>>(codes + tile % STAGES * CODES);
#pragma unroll
            for (u32 h = 0; h < 2; h++) {
                float x[8];
                dequantize_8(x, pair[h], table, by);
                store_shared(right + tile % 2 * T::RIGHT + (place ^ 8 * h), narrow(x));
            }
        };

        ask_scale_of(0);
#pragma unroll
        for (u32 tile = 0; tile + 1 < STAGES; tile++) ask(tile);
        cp_async_wait<STAGES - 2>();
        dequantize(0);
        for (u32 tile = 0; tile < tiles; tile++) {
            cp_async_wait<STAGES - 3>();
            __syncthreads();
            ask(tile + STAGES - 1);
            dequantize(tile + 1);
            const u32 stage = tile % STAGES;
            multiply_tile<T, NN>(acc, left + stage * T::LEFT, right + tile % 2 * T::RIGHT, down, stage);
            if constexpr (SUM) finish<SUM>(down, group, first, tile, tiles, m0, n0);
        }
        if constexpr (!SUM) finish<SUM>(down, group, first, tiles - 1, tiles, m0, n0);
        cp_async_wait<0>();
    };
    if constexpr (MAKES)
        product<T, NN, SUM, bf16, true>(group, Resident<T, NN, SUM>(beside), main_loop);
    else
        product<T, NN, SUM, bf16, true>(group, Made{}, main_loop);
}

#define PRODUCT(name, T, BLOCKS, BODY)                                                                           \
    extern "C" __global__ void __launch_bounds__(T::THREADS, BLOCKS) name(const __grid_constant__ Group group) { \
        BODY(group);                                                                                             \
    }                                                                                                            \
    ENTRY(name)
PRODUCT(gemm_nf4_nt_128x128, Large, 2, (fused<Large, false, false, false>))
PRODUCT(gemm_nf4_nt_64x64, Medium, 4, (fused<Medium, false, false, false>))
PRODUCT(gemm_nf4_nt_32x64, Small, 4, (fused<Small, false, false, false>))
PRODUCT(gemm_nf4_nn_128x128, Large, 2, (fused<Large, true, true, false>))
PRODUCT(gemm_nf4_nn_64x64, Medium, 4, (fused<Medium, true, true, false>))
PRODUCT(gemm_nf4_nn_32x64, Small, 4, (fused<Small, true, true, false>))
PRODUCT(gemm_nf4_nt_lora_128x128, Large, 2, (fused<Large, false, false, true>))
PRODUCT(gemm_nf4_nt_lora_64x64, Medium, 4, (fused<Medium, false, false, true>))
PRODUCT(gemm_nf4_nt_lora_32x64, Small, 4, (fused<Small, false, false, true>))
PRODUCT(gemm_nf4_nn_lora_128x128, Large, 2, (fused<Large, true, true, true>))
PRODUCT(gemm_nf4_nn_lora_64x64, Medium, 4, (fused<Medium, true, true, true>))
PRODUCT(gemm_nf4_nn_lora_32x64, Small, 4, (fused<Small, true, true, true>))
