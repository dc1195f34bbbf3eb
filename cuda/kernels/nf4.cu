// NF4: quantisation with double quantisation, and dequantisation to bf16. Bit for bit what bitsandbytes computes on a CPU
// (daemon/backend/nf4.rs says where its order is free and what was chosen).
//
//   nf4_dequantize     out[i] = bf16(NF4[code i]·absmax[i >> shift])
//   nf4_quantize_T     absmax[b] = max |x| over the 64 elements of block b; code = number of borders below x·(1/absmax),
//                      in a last short block below x/absmax
//   absmax_mean        offset = mean of all absmax, summed in the order of PyTorch on one thread
//   absmax_nest        v = absmax − offset; nested[n] = max |v| over 256; code = nearest of the dynamic map to v·(1/nested[n]),
//                      by bitsandbytes' table of 65,536 steps
//
// Blocks are powers of two: a division of 64 bits for every eight elements would cost more than they do.
// Elements are those of a row-major matrix, `count` of them; codes: u8 [count/2 rounded up]; x: fp32 or bf16; out: bf16.
// Dequantisation: a thread takes four runs of 8 elements (one load of 4 bytes, one store of 16 each; 1 element at the end).
// The sixteen values lie in sixteen banks of shared memory: whatever the codes, no conflict. Quantisation: a warp takes a
// block, a lane two neighbours.
//
// Bytes: dequantise 2.5 an element and the scales; quantise 4.5 (fp32) or 2.5 (bf16). Bound: memory. absmax_mean is one
// warp and bound by latency: it is one sum in one order, and runs once per matrix.
#include <nf4.cuh>
#include <reduce.cuh>
#include <vector.cuh>

constexpr u32 RUNS = 4;  // of a thread

// Dequantises N codes from `index` on, which are in one block of scales.
template <u32 N>
__device__ __forceinline__ void dequantize(global<bf16> out, global<const u8> codes, const Absmax& absmax, u32 shift,
                                           shared<float> table, u64 index) {
    const float scale = absmax_of(absmax, index >> shift);
    float x[N];
    if constexpr (N == 8) {
        const u32 bytes = load_global<u32>(codes + index / 2);
#pragma unroll
        for (u32 j = 0; j < 8; j++) {
            const u32 code = bytes >> (8 * (j / 2) + (j % 2 ? 0 : 4)) & 15;
            x[j] = load_shared<float>(table + code) * scale;
        }
    } else {
        const u32 byte = load_global<u8>(codes + index / 2);
        x[0] = load_shared<float>(table + (index % 2 ? byte & 15 : byte >> 4)) * scale;
    }
    store_run(out + index, x);
}

extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
    nf4_dequantize(global<bf16> out, global<const u8> codes, Absmax absmax, u32 shift, u64 count) {
    shared<float> table = static_shared<float, 16>();
    if (threadIdx.x < 16) store_shared(table + threadIdx.x, NF4_CODES[threadIdx.x]);
    __syncthreads();
#pragma unroll
    for (u32 k = 0; k < RUNS; k++) {
        const u64 first = ((u64(blockIdx.x) * RUNS + k) * FLAT_THREADS + threadIdx.x) * 8;
        if (first + 8 <= count)
            dequantize<8>(out, codes, absmax, shift, table, first);
        else
            for (u64 i = first; i < count; i++) dequantize<1>(out, codes, absmax, shift, table, i);
    }
}
ENTRY(nf4_dequantize)

constexpr u32 BLOCK = 64;      // elements that share a scale
constexpr float TINY = 1e-38f;  // keeps the quotients of zeros finite

__device__ __forceinline__ u32 nf4_code(float quotient) {
    u32 code = 0;
#pragma unroll
    for (u32 i = 0; i < 15; i++) code += quotient > (NF4_CODES[i] + NF4_CODES[i + 1]) / 2.0f;
    return code;
}

template <typename T>
__device__ __forceinline__ void quantize(global<u8> codes, global<float> absmax, global<const T> x, u64 count) {
    const u64 block = u64(blockIdx.x) * (FLAT_THREADS / WARP) + threadIdx.x / WARP, start = block * BLOCK;
    if (start >= count) return;
    const u32 lane = threadIdx.x % WARP;
    const u64 i = start + 2 * lane;
    float v[2] = {0, 0};
#pragma unroll
    for (u32 j = 0; j < 2; j++)
        if (i + j < count) v[j] = to_f32(load_global<T>(x + i + j));
    // Magnitudes of floats order as their bits do, with NaN above infinity.
    const u32 a = __float_as_uint(v[0]) & 0x7fffffff, b = __float_as_uint(v[1]) & 0x7fffffff;
    float most = __uint_as_float(__reduce_max_sync(FULL, max(a, b)));
    u32 pair[2];
    if (start + BLOCK <= count) {
        const float scale = 1.0f / (most < TINY ? TINY : most);
#pragma unroll
        for (u32 j = 0; j < 2; j++) pair[j] = nf4_code(v[j] * scale);
    } else {
        most = most < TINY ? TINY : most;
#pragma unroll
        for (u32 j = 0; j < 2; j++) pair[j] = i + j < count ? nf4_code(v[j] / most) : NF4_ZERO;
    }
    if (i < count) store_global(codes + i / 2, u8(pair[0] << 4 | pair[1]));
    if (lane == 0) store_global(absmax + block, most);
}

#define QUANTIZE(name, T)                                                              \
    extern "C" __global__ void __launch_bounds__(FLAT_THREADS)                        \
        name(global<u8> codes, global<float> absmax, global<const T> x, u64 count) {  \
        quantize<T>(codes, absmax, x, count);                                         \
    }                                                                                 \
    ENTRY(name)
QUANTIZE(nf4_quantize_f32, float)
QUANTIZE(nf4_quantize_bf16, bf16)

// A lane is one of the 32 columns of PyTorch's cascade: four levels, each emptied into the next after 2^power additions;
// then the levels are added, then the columns eight apart with what did not fill a row between them, then the rest.
extern "C" __global__ void __launch_bounds__(WARP) absmax_mean(global<float> mean, global<const float> x, u64 count) {
    const u32 lane = threadIdx.x;
    const u64 rows = count / 8 / 4;
    u32 log2 = 0;
    while ((u64(1) << log2) < rows) log2++;
    const u32 power = max(4u, log2 / 4);
    const u64 whole = rows >> power << power, mask = (u64(1) << power) - 1;
    float level[4] = {0, 0, 0, 0};
    for (u64 i = 0; i < rows; i++) {
        level[0] += load_global<float>(x + i * WARP + lane);
        const u64 done = i + 1;
        if (done > whole || done & mask) continue;
        level[1] += level[0], level[0] = 0;
        if (done >> power & mask) continue;
        level[2] += level[1], level[1] = 0;
        if (done >> 2 * power & mask) continue;
        level[3] += level[2], level[2] = 0;
    }
    float sum = level[0];
    for (u32 j = 1; j < 4; j++) sum += level[j];
    const float column1 = __shfl_down_sync(FULL, sum, 8), column2 = __shfl_down_sync(FULL, sum, 16),
                column3 = __shfl_down_sync(FULL, sum, 24);
    const u64 extra = rows * WARP, vectors = count / 8 - rows * 4, rest = count / 8 * 8;
    if (lane < 8) {
        for (u64 j = 0; j < vectors; j++) sum += load_global<float>(x + extra + j * 8 + lane);
        sum += column1;
        sum += column2;
        sum += column3;
    }
    float total = 0;
    for (u64 i = rest; i < count; i++) total += load_global<float>(x + i);
    for (u32 j = 0; j < 8; j++) total += __shfl_sync(FULL, sum, j);
    if (lane == 0) store_global(mean, total / float(count));
}
ENTRY(absmax_mean)

constexpr u32 NESTED_BLOCK = 256;
constexpr float STEPS = 65535.0f;

extern "C" __global__ void __launch_bounds__(NESTED_BLOCK)
    absmax_nest(global<u8> codes, global<float> nested, global<const float> absmax, global<const float> mean,
                global<const float> map, u64 count) {
    shared<float> borders = static_shared<float, 256>();
    const u32 t = threadIdx.x;
    const u64 i = u64(blockIdx.x) * NESTED_BLOCK + t;
    const float next = t < 255 ? load_global<float>(map + t + 1) : 0;
    store_shared(borders + t, 0.5f * (load_global<float>(map + t) + next));
    const float v = i < count ? load_global<float>(absmax + i) - load_global<float>(mean) : 0;
    const float most = block_max<NESTED_BLOCK, 1>(fabsf(v));  // its barriers are those of the borders, too
    if (t == 0) store_global(nested + blockIdx.x, most);
    if (i >= count) return;
    u32 code = 0;
    if (most > 0) {
        const float quotient = v * (1.0f / most);
        const float inside = quotient < -1.0f ? -1.0f : quotient > 1.0f ? 1.0f : quotient;
        const u32 step = u32((inside + 1.0f) * 0.5f * STEPS + 0.5f);
        const float value = -1.0f + (2.0f * float(step)) / STEPS;
        // The number of borders below the value, of the first 255, which ascend.
#pragma unroll
        for (u32 half = 128; half > 0; half /= 2)
            if (load_shared<float>(borders + code + half - 1) < value) code += half;
    }
    store_global(codes + i, u8(code));
}
ENTRY(absmax_nest)
