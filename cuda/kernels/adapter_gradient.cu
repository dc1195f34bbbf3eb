// The gradients of the adapters of a group of layers that share their input:
//
//   dB += dYᵀ·U      [outputs, r], U = scale·drop(X)·Aᵀ as the forward pass kept it
//   dA += Gᵀ·drop(X) [r, inputs],  G = scale·dY·B
//
// Both are a sum over tokens t of wide[t, w]·thin[t, j]: dY with U, X with G. wide, thin: bf16; gradients: fp32; products
// accumulate in fp32.
//
// Order: the tokens of a sequence are cut into chunks of CHUNK, counted from its own first token. A chunk's product p is
// summed by itself, and the chunks are added to the gradient one after the other, in the order of sequences and chunks:
// g = ((g + p₀) + p₁) + … So how sequences are dealt to micro-batches cannot be seen in the result.
//
// A block takes WIDE columns of a wide operand and all columns of up to three thin ones that go with it, so that X is
// read once for all layers of the group. Eight warps, 16 wide columns each; STEP tokens at a time through shared memory,
// STAGES deep; both operands lie there as they come, [token, column], and ldmatrix transposes both. Eight rows lie in
// different banks: wide rows are padded by 16 bytes, of thin ones the pieces of 16 bytes are exchanged (`thin_at`).
//
// Whole: a block walks all chunks and adds each to the gradient itself (grid y = z = 1). Split: a block computes one
// chunk and leaves p in scratch, for adapter_gradient_sum; for groups that have fewer tiles than the GPU has room.
// Chunk c of sequence s has slot offsets[s]/CHUNK + s + c: slots of different chunks differ, and there are at most
// tokens/CHUNK + sequences.
//
// Bytes: 2 for each element of a wide operand, once; thin ones (r/width as many) once for every WIDE columns, from the
// second-level cache. Split: 8·r/CHUNK more for each wide element (at r = 16 and three layers on X: 3/4 of X's own). The
// gradient itself 8 an element (whole: a chunk, in the cache). Bound: memory; at 64 columns the tensor cores need half the
// time.
#include <ptx.cuh>
#include <vector.cuh>

constexpr u32 CHUNK = 256;
constexpr u32 STEP = 32;
constexpr u32 STAGES = 3;
constexpr u32 WIDE = 128;
constexpr u32 THIN = 64;
constexpr u32 THREADS = 256;
constexpr u32 WIDE_STRIDE = WIDE + 8;
constexpr u32 SEGMENTS = 3, JOBS = 6;

// Columns first .. first + columns of a thin operand [tokens, stride], and where their products go: element (w, j) of the
// gradient at w·across + j·along.
struct Segment {
    global<const bf16> thin;
    global<float> gradient;
    u64 partial;  // the gradient's first element in a slot of scratch
    u32 across, along, stride, first, columns;
    u32 run;   // elements that can be copied at a time: 8, 4, 2 or 1
    u32 tile;  // its first tile of 8 columns in the block
    u32 padding;
};

struct Job {
    global<const bf16> wide;  // [tokens, width]
    u32 width;
    u32 first_block;  // in the grid's x
    u32 segments;
    u32 tiles;  // of 8 columns, of all segments
    Segment segment[SEGMENTS];
};

struct Jobs {
    Job job[JOBS];
    u32 count, padding;
};

// Where column j of token t lies. Piece j/8 is moved to j/8 ^ f with f the three low bits of t reversed: the same piece of
// eight rows, two pieces of four, four of two and eight of one lie in eight different places, so neither ldmatrix nor a copy
// of 8, 16, 32 or 64 columns meets a conflict.
__device__ __forceinline__ u32 thin_at(u32 t, u32 j) {
    const u32 reversed = (t & 1) << 2 | (t & 2) | (t >> 2 & 1);
    return t * THIN + (j ^ reversed << 3);
}

template <u32 RUN>
__device__ __forceinline__ void copy_thin(shared<bf16> to, const Segment& segment, u32 first, u32 last) {
    const u32 pieces = segment.columns / RUN;
    for (u32 i = threadIdx.x; i < STEP * pieces; i += THREADS) {
        const u32 t = i / pieces, j = i % pieces * RUN;
        const bool inside = first + t < last;
        shared<bf16> at = to + thin_at(t, segment.tile * 8 + j);
        global<const bf16> from = segment.thin + (u64(first + t) * segment.stride + segment.first + j);
        if constexpr (RUN > 1)
            cp_async<2 * RUN>(at, from, inside);
        else
            store_shared(at, inside ? load_global<bf16>(from) : bf16{0});
    }
}

// Tokens first .. first + STEP, zeros from `last` on. Columns between the segments stay what they were: they reach
// accumulators that nobody reads.
__device__ __forceinline__ void copy_step(shared<bf16> wide, shared<bf16> thin, const Job& job, u32 column, u32 first,
                                          u32 last) {
    if (job.width % 8 == 0) {
#pragma unroll
        for (u32 i = threadIdx.x; i < STEP * WIDE / 8; i += THREADS) {
            const u32 t = i / (WIDE / 8), w = i % (WIDE / 8) * 8;
            cp_async<16>(wide + (t * WIDE_STRIDE + w), job.wide + (u64(first + t) * job.width + column + w),
                         first + t < last && column + w < job.width);
        }
    } else {
        for (u32 i = threadIdx.x; i < STEP * WIDE; i += THREADS) {
            const u32 t = i / WIDE, w = i % WIDE;
            const bool inside = first + t < last && column + w < job.width;
            store_shared(wide + (t * WIDE_STRIDE + w),
                         inside ? load_global<bf16>(job.wide + (u64(first + t) * job.width + column + w)) : bf16{0});
        }
    }
    for (u32 s = 0; s < job.segments; s++) {
        const Segment& segment = job.segment[s];
        if (segment.run == 8)
            copy_thin<8>(thin, segment, first, last);
        else if (segment.run == 4)
            copy_thin<4>(thin, segment, first, last);
        else if (segment.run == 2)
            copy_thin<2>(thin, segment, first, last);
        else
            copy_thin<1>(thin, segment, first, last);
    }
}

// The product of tokens first .. last, at most CHUNK of them.
__device__ __forceinline__ void multiply(FragmentC (&sum)[THIN / 8], const Job& job, u32 column, u32 first, u32 last) {
    shared<bf16> wide = static_shared<bf16, STAGES * STEP * WIDE_STRIDE, 0>();
    shared<bf16> thin = static_shared<bf16, STAGES * STEP * THIN, 1>();
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 steps = (last - first + STEP - 1) / STEP;
#pragma unroll
    for (u32 n = 0; n < THIN / 8; n++) sum[n] = FragmentC{{0, 0, 0, 0}};
    __syncthreads();  // the last chunk's tiles are still being read
#pragma unroll
    for (u32 stage = 0; stage < STAGES - 1; stage++) {
        if (stage < steps)
            copy_step(wide + stage * STEP * WIDE_STRIDE, thin + stage * STEP * THIN, job, column,
                      first + stage * STEP, last);
        cp_async_commit();
    }
    // Rows of the four matrices of an ldmatrix. wide is A [16 w × 16 t], stored transposed: (t 0, w 0), (t 0, w 8),
    // (t 8, w 0), (t 8, w 8). thin is B [16 t × 16 j]: (t 0, j 0), (t 8, j 0), (t 0, j 8), (t 8, j 8).
    const u32 wide_row = (lane / 16 * 8 + lane % 8) * WIDE_STRIDE + warp * 16 + lane / 8 % 2 * 8;
    for (u32 step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        const u32 next = step + STAGES - 1, to = next % STAGES, stage = step % STAGES;
        if (next < steps)
            copy_step(wide + to * STEP * WIDE_STRIDE, thin + to * STEP * THIN, job, column, first + next * STEP,
                      last);
        cp_async_commit();
#pragma unroll
        for (u32 k = 0; k < STEP; k += 16) {
            FragmentA a;
            ldmatrix<4, true>(a.a, wide + ((stage * STEP + k) * WIDE_STRIDE + wide_row));
#pragma unroll
            for (u32 n = 0; n < THIN / 8; n += 2) {
                if (n >= job.tiles) continue;
                u32 b[4];
                ldmatrix<4, true>(b, thin + ((stage * STEP + k) * THIN + thin_at(lane % 16, n * 8 + lane / 16 * 8)));
                mma_m16n8k16(sum[n], a, FragmentB{{b[0], b[1]}});
                if (n + 1 < job.tiles) mma_m16n8k16(sum[n + 1], a, FragmentB{{b[2], b[3]}});
            }
        }
    }
}

template <u32 N>
__device__ __forceinline__ void put(global<float> at, vec<float, N> value, bool add) {
    if (add) {
        const vec<float, N> old = load_global<vec<float, N>>(at);
#pragma unroll
        for (u32 i = 0; i < N; i++) value[i] = old[i] + value[i];
    }
    store_global(at, value);
}

// To scratch at `slot`, or added to the gradients where slot is null.
__device__ __forceinline__ void leave(const FragmentC (&sum)[THIN / 8], const Job& job, u32 column, global<float> slot) {
    const u32 lane = threadIdx.x % WARP, row = column + threadIdx.x / WARP * 16 + lane / 4;
    const bool add = slot == nullptr;
#pragma unroll
    for (u32 n = 0; n < THIN / 8; n++) {
        if (n >= job.tiles) continue;
        u32 s = 0;
#pragma unroll
        for (u32 i = 1; i < SEGMENTS; i++)
            if (i < job.segments && n >= job.segment[i].tile) s = i;
        const Segment& segment = job.segment[s];
        const u32 j = (n - segment.tile) * 8 + lane % 4 * 2;
        global<float> base = add ? segment.gradient : slot + segment.partial;
        const bool pairs = segment.along == 1 && segment.across % 2 == 0;  // then columns and first are even, too
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const u32 w = row + half * 8;
            if (w >= job.width) continue;
            global<float> at = base + (u64(w) * segment.across + u64(segment.first + j) * segment.along);
            const float x = sum[n].c[2 * half], y = sum[n].c[2 * half + 1];
            if (pairs) {
                if (j < segment.columns) put(at, vec<float, 2>{{x, y}}, add);
            } else {
                if (j < segment.columns) put(at, vec<float, 1>{{x}}, add);
                if (j + 1 < segment.columns) put(at + segment.along, vec<float, 1>{{y}}, add);
            }
        }
    }
}

// Grid: x the tiles of all jobs; split, y the chunks of the longest sequence and z the sequences.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    adapter_gradient(global<float> scratch, global<const u32> offsets, Jobs jobs, u32 sequences, u64 slot_elements) {
    u32 number = 0;
    while (number + 1 < jobs.count && blockIdx.x >= jobs.job[number + 1].first_block) number++;
    const Job& job = jobs.job[number];
    const u32 column = (blockIdx.x - job.first_block) * WIDE;
    const bool split = scratch != nullptr;
    const u32 first_sequence = split ? blockIdx.z : 0, last_sequence = split ? blockIdx.z + 1 : sequences;
    for (u32 s = first_sequence; s < last_sequence; s++) {
        const u32 begin = load_global<u32>(offsets + s), end = load_global<u32>(offsets + s + 1);
        const u32 chunks = (end - begin + CHUNK - 1) / CHUNK;
        const u32 first_chunk = split ? blockIdx.y : 0, last_chunk = split ? min(blockIdx.y + 1, chunks) : chunks;
        for (u32 c = first_chunk; c < last_chunk; c++) {
            FragmentC sum[THIN / 8];
            const u32 first = begin + c * CHUNK;
            multiply(sum, job, column, first, min(first + CHUNK, end));
            leave(sum, job, column, split ? scratch + u64(begin / CHUNK + s + c) * slot_elements : nullptr);
        }
    }
}
ENTRY(adapter_gradient)

struct Gradient {
    global<float> gradient;
    u64 partial;
    u64 count;
};

struct Gradients {
    Gradient at[JOBS];
};

// Adds the chunks that were left in scratch, in order. Grid: x the runs of four elements, y the gradients.
extern "C" __global__ void __launch_bounds__(FLAT_THREADS)
    adapter_gradient_sum(Gradients gradients, global<const float> scratch, global<const u32> offsets, u32 sequences,
                         u64 slot_elements) {
    const Gradient& to = gradients.at[blockIdx.y];
    over_elements<4>(to.count, [&](auto width, u64 i) {
        constexpr u32 N = decltype(width)::value;
        float sum[N];
        load_run(sum, to.gradient + i);
        u32 begin = load_global<u32>(offsets);
        for (u32 s = 0; s < sequences; s++) {
            const u32 end = load_global<u32>(offsets + s + 1), chunks = (end - begin + CHUNK - 1) / CHUNK;
            for (u32 c = 0; c < chunks; c++) {
                float part[N];
                load_run(part, scratch + (u64(begin / CHUNK + s + c) * slot_elements + to.partial + i));
#pragma unroll
                for (u32 j = 0; j < N; j++) sum[j] += part[j];
            }
            begin = end;
        }
        store_run(to.gradient + i, sum);
    });
}
ENTRY(adapter_gradient_sum)
