// Units of an NF4 weight: gemm_pack.cu draws them.
#pragma once
#include <nf4.cuh>

constexpr u32 PANEL = 32;  // outputs of a unit
constexpr u32 UNIT = 16;   // inputs of a unit
constexpr u32 UNIT_BYTES = PANEL * UNIT / 2;

// The byte at which a unit begins: the panel-th from above, the unit-th from the left.
__device__ __forceinline__ u64 unit_at(u32 panel, u32 unit, u32 inputs) {
    return (u64(panel) * (inputs / UNIT) + unit) * UNIT_BYTES;
}

// The byte at which the codes of a row of a unit begin.
__device__ __forceinline__ u64 row_of_unit(u32 row, u32 unit, u32 inputs) {
    return unit_at(row / PANEL, unit, inputs) + row % PANEL * (UNIT / 2);
}

// Eight codes times their scale. `table` is NF4_CODES: sixteen values in sixteen banks, so that lanes never conflict.
__device__ __forceinline__ void dequantize_8(float (&x)[8], u32 codes, shared<float> table, float scale) {
    // Four codes at a time become the places of their values in bytes, 4·code; the first of two is in the high half of a byte.
    const u32 places[2] = {codes >> 2 & 0x3c3c3c3c, codes << 2 & 0x3c3c3c3c};
    const shared<u8> bytes = shared_cast<u8>(table);
#pragma unroll
    for (u32 j = 0; j < 8; j++)
        x[j] = load_shared<float>(shared_cast<float>(bytes + __byte_perm(places[j % 2], 0, 0x4440 + j / 2))) * scale;
}
