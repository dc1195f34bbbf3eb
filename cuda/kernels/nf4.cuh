// 4-bit NormalFloat (QLoRA, arXiv 2305.14314, appendix E), as bitsandbytes stores it: two codes a byte, the first element
// in the high nibble; a block of elements shares one scale (absmax), which may itself be quantised.
#pragma once
#include <device.cuh>

// The sixteen values. A __device__ array: an index known at compile time folds to a constant, another is a load.
__device__ const float NF4_CODES[16] = {
    -1.0f,         -0.6961928f,  -0.52507305f, -0.3949175f,  -0.28444138f, -0.18477343f, -0.091050036f, 0.0f,
    0.0795803f,    0.1609302f,   0.2461123f,   0.33791524f,  0.44070983f,  0.562617f,    0.72295684f,   1.0f,
};

// Code of zero, which fills the last nibble of an odd number of elements.
constexpr u32 NF4_ZERO = 7;

// Scales of the blocks. Plain: absmax[b]. Nested: map[codes[b]]·nested[b >> nested_shift] + offset, in this order.
struct Absmax {
    global<const float> plain;  // null when nested
    global<const u8> codes;
    global<const float> map;
    global<const float> nested;
    u32 nested_shift;
    float offset;
};

__device__ __forceinline__ float absmax_of(const Absmax& a, u64 block) {
    if (a.plain != nullptr) return load_global<float>(a.plain + block);
    const float value = load_global<float>(a.map + load_global<u8>(a.codes + block));
    return value * load_global<float>(a.nested + (block >> a.nested_shift)) + a.offset;
}
