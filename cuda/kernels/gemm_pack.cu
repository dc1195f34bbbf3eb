// The order in which the matrix products read an NF4 weight [outputs, inputs], and the way back to bf16.
//
//   gemm_pack      row-major codes, as bitsandbytes has them, to units
//   gemm_unpack    out[o, i] = bf16(NF4[code]·absmax[(o·inputs + i) >> shift]), row-major, from units
//
// A unit is 32 outputs × 16 inputs: 256 bytes, row after row of 8 bytes. The units of 32 outputs lie one after the other in the
// order of the inputs, then those of the next 32. Rows beyond the last output hold zeros.
//
//     inputs        0..16      16..32             A warp dequantises a unit, a lane a row of it. A tile of 128 outputs × 32
//     outputs   ┌──────────┬──────────┬──         inputs (Y = X·Wᵀ) is four runs of 512 bytes, one of 32 outputs × 128
//       0..32   │ unit 0   │ unit 1   │           inputs (dX = dY·W) is one of 2 KiB: no sector is read in part.
//               ├──────────┼──────────┼──
//      32..64   │ unit n   │ unit n+1 │           n = inputs/16
//
// inputs is a multiple of 32 and of the block of scales, 1 << shift elements.
//
// Packing: a thread moves 8 bytes; a quarter of a warp reads 32 bytes of two rows. Unpacking: a thread takes 8 elements, a warp
// 64 elements of four rows, all of every sector read and written.
// Bytes: packing 1 an element, once in the life of a weight; unpacking 2.5 and the scales. Bound: memory.
#include <gemm_units.cuh>
#include <vector.cuh>

constexpr u32 EMPTY = NF4_ZERO * 0x11111111u;

extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
    gemm_pack(global<u8> packed, global<const u8> codes, u32 outputs, u32 inputs) {
    // Groups of 8 rows × 4 units, which a warp moves.
    const u32 lane = threadIdx.x % WARP, across = (inputs / UNIT + 3) / 4;
    const u64 group = u64(blockIdx.x) * (FLAT_THREADS / WARP) + threadIdx.x / WARP;
    const u32 row = u32(group / across) * 8 + lane / 4, unit = u32(group % across) * 4 + lane % 4;
    if (row >= (outputs + PANEL - 1) / PANEL * PANEL || unit >= inputs / UNIT) return;
    vec<u32, 2> codes_of_row = {{EMPTY, EMPTY}};
    if (row < outputs) codes_of_row = load_global<vec<u32, 2>>(codes + (u64(row) * inputs + unit * UNIT) / 2);
    store_global(packed + row_of_unit(row, unit, inputs), codes_of_row);
}
ENTRY(gemm_pack)

extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
    gemm_unpack(global<bf16> out, global<const u8> packed, Absmax absmax, u32 shift, u32 outputs, u32 inputs) {
    shared<float> table = static_shared<float, 16>();
    if (threadIdx.x < 16) store_shared(table + threadIdx.x, NF4_CODES[threadIdx.x]);
    __syncthreads();
    const u32 lane = threadIdx.x % WARP, across = (inputs + 63) / 64;
    const u64 group = u64(blockIdx.x) * (FLAT_THREADS / WARP) + threadIdx.x / WARP;
    const u32 row = u32(group / across) * 4 + lane / 8, i = u32(group % across) * 64 + lane % 8 * 8;
    if (row >= outputs || i >= inputs) return;
    const u64 at = u64(row) * inputs + i;
    const u32 codes = load_global<u32>(packed + (row_of_unit(row, i / UNIT, inputs) + i % UNIT / 2));
    float x[8];
    dequantize_8(x, codes, table, absmax_of(absmax, at >> shift));
    store_run(out + at, x);
}
ENTRY(gemm_unpack)
