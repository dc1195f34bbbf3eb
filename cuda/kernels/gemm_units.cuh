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
#pragma unroll
    for (u32 j = 0; j < 8; j++) {
        const u32 code = codes >> (8 * (j / 2) + (j % 2 ? 0 : 4)) & 15;
        x[j] = load_shared<float>(table + code) * scale;
    }
}
