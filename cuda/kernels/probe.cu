// The two ceilings that every kernel is measured against: what the tensor cores do when nothing else has to be done, and
// what the memory moves when nothing has to be computed.
//
//   probe_mma     rounds · 4 products m16n8k16 a warp, all operands in registers
//   probe_copy    out = in
//
// probe_mma: out fp32 [blocks, 256]. A block is 8 warps, two for each of the four tensor cores of an SM; the 4
// accumulators of a warp do not depend on each other, so that a product need not wait for the one before it. Operands are
// pseudorandom and never 0: a multiplier that is fed zeros takes less power and clocks higher. What comes out is written, so
// that the compiler cannot leave it out. Operations: 4096 a product.
//
// probe_copy: `count` words of 16 bytes, 4 a thread, neighbours in a warp side by side. Bytes: 32 a word, 16 read and 16
// written.
//
// Bound: tensor cores, and memory: these are the bounds.
#include <ptx.cuh>

constexpr u32 THREADS = 256;
constexpr u32 CHAINS = 4;
constexpr u32 RUN = 4;

// Two bf16 between 0.5 and 2 in magnitude, of any sign, from a number (a step of a multiplicative hash).
__device__ __forceinline__ u32 operand(u32 i) {
    const u32 random = (i + 1) * 2654435761u;
    // Sign and the seven bits of the mantissa are random, the exponent is 126 or 127.
    return (random & 0x80ff80ffu) | 0x3f003f00u;
}

extern "C" __global__ void __launch_bounds__(THREADS) probe_mma(global<float> out, u32 rounds) {
    const u32 thread = blockIdx.x * THREADS + threadIdx.x;
    FragmentA a;
    FragmentB b;
    FragmentC c[CHAINS];
#pragma unroll
    for (u32 i = 0; i < 4; i++) a.a[i] = operand(6 * thread + i);
#pragma unroll
    for (u32 i = 0; i < 2; i++) b.b[i] = operand(6 * thread + 4 + i);
#pragma unroll
    for (u32 chain = 0; chain < CHAINS; chain++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) c[chain].c[i] = float(chain + i);
#pragma unroll 4
    for (u32 round = 0; round < rounds; round++)
#pragma unroll
        for (u32 chain = 0; chain < CHAINS; chain++) mma_m16n8k16(c[chain], a, b);
    float sum = 0;
#pragma unroll
    for (u32 chain = 0; chain < CHAINS; chain++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) sum += c[chain].c[i];
    store_global(out + thread, sum);
}
ENTRY(probe_mma)

extern "C" __global__ void __launch_bounds__(THREADS) probe_copy(global<u32> out, global<const u32> in, u64 count) {
    const u64 first = u64(blockIdx.x) * THREADS * RUN + threadIdx.x;
    vec<u32, 4> words[RUN];
#pragma unroll
    for (u32 i = 0; i < RUN; i++)
        if (first + i * THREADS < count) words[i] = load_global<vec<u32, 4>>(in + 4 * (first + i * THREADS));
#pragma unroll
    for (u32 i = 0; i < RUN; i++)
        if (first + i * THREADS < count) store_global(out + 4 * (first + i * THREADS), words[i]);
}
ENTRY(probe_copy)
