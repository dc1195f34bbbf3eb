// Dropout on the input of a LoRA A, as PEFT applies it: a function of (key of the sequence, module, element), never of the
// place in the batch.
//
//   out[t, i] = word ≥ threshold ? bf16(x[t, i]·keep) : 0      word = Philox(key, (e/4, module))[e % 4], e = t·inputs + i
//
// with t counted from the start of its sequence. x, out: bf16 [tokens, inputs], in which the sequences lie one after the
// other; offsets: u32 [sequences + 1]; keys: u64 [sequences]; threshold = p·2³², keep = 1/(1 − p).
//
// A block of the grid's y is a sequence. A thread takes the four elements of one Philox block (N = 4), or one of them where
// `inputs` is not a multiple of 4. Bytes: 4 an element. Bound: memory; ten rounds of two 32-bit products for four elements
// stay below it.
#include <philox.cuh>
#include <vector.cuh>

template <u32 N>
__device__ __forceinline__ void dropout(global<bf16> out, global<const bf16> x, global<const u32> offsets,
                                        global<const u64> keys, u32 inputs, u32 module, u64 threshold, float keep) {
    const u32 first = load_global<u32>(offsets + blockIdx.y), last = load_global<u32>(offsets + blockIdx.y + 1);
    const u64 e = (u64(blockIdx.x) * FLAT_THREADS + threadIdx.x) * N;
    if (e >= u64(last - first) * inputs) return;
    const u64 key = load_global<u64>(keys + blockIdx.y), block = e / 4;
    const vec<u32, 4> words =
        philox4x32(vec<u32, 4>{{u32(block), u32(block >> 32), module, 0}}, u32(key), u32(key >> 32));
    const u64 at = u64(first) * inputs + e;
    float v[N];
    load_run(v, x + at);
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        const bool kept = words[j] >= threshold;
        if constexpr (N == 4) v[j] = kept ? v[j] * keep : 0;
        if constexpr (N == 1)
            if (e % 4 == j) v[0] = kept ? v[0] * keep : 0;
    }
    store_run(out + at, v);
}

#define DROPOUT(name, N)                                                                                        \
    extern "C" __global__ void __launch_bounds__(FLAT_THREADS)                                                 \
        name(global<bf16> out, global<const bf16> x, global<const u32> offsets, global<const u64> keys,        \
             u32 inputs, u32 module, u64 threshold, float keep) {                                              \
        dropout<N>(out, x, offsets, keys, inputs, module, threshold, keep);                                    \
    }                                                                                                          \
    ENTRY(name)
DROPOUT(dropout_4, 4)
DROPOUT(dropout_1, 1)
