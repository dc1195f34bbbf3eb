// The products of generation: a few rows against a frozen weight, with the adapter.
//
//   y[m, o] = bf16(Σ x[m, k]·W[o, k] + Σ u[m, j]·B[o, j] + bias[o])      logits: the sum in fp32, without rounding
//
// x: bf16 [rows, inputs], rows ≤ 8; W: [outputs, inputs], bf16, or NF4 in units (gemm_pack.cu) whose value is
// bf16(NF4[code]·absmax); u: bf16 [rows, r]; B: bf16 [outputs, r]; bias: fp32 [outputs]; y: bf16 [rows, outputs].
//
// mma with W as its left side, 16 outputs, and x as its right, 8 rows: what is computed for a row is the same whatever the
// others are, and eight rows cost what one costs. Both sides come from global memory straight into fragments. Rows of the
// left side and k may be numbered in any way that both sides agree on, so a lane's part of the fragments is what it can
// read at 16 bytes a time:
//
//   k        lane t of the four that share a row has a run of k of its own: 32 codes (two units), or 8 bf16; a product
//            takes four of each run
//   outputs  lane g of the eight has outputs 2g and 2g + 1 of 16, which lie side by side in a unit
//
// A block takes 32 outputs, a panel of units. Its four warps share k: warp w the steps w, w + 4, …; the last thing that
// warp 0 adds is the adapter. Then the four sums of an output are added in order. The next step's weights are under way
// while one is computed.
//
// Where rows of W do not start at multiples of 16 bytes, or NF4 is not in units but row-major (`row_of_unit` needs inputs
// that are a multiple of the block of scales), a warp takes an output, a lane every 32nd element (small_elements).
//
// Bytes: the weight once, 2 or 0.5 an element and the scales; x (rows·inputs·2) for each 32 outputs, from the caches.
// Bound: memory; NF4 in 30 W mode by shared memory, from which each code's value is read (16 values in 16 banks, no
// conflicts): 8 SMs at 612 MHz look up 157·10⁹ codes a second, 78 GB/s of weight.
#include <gemm_units.cuh>
#include <ptx.cuh>
#include <reduce.cuh>
#include <vector.cuh>

constexpr u32 WARPS = 4;
constexpr u32 THREADS = WARPS * WARP;
constexpr u32 OUTPUTS = PANEL;  // of a block
constexpr u32 ROWS = 8;         // of x, at most

struct Operands {
    global<bf16> y;          // either
    global<float> logits;    // or
    global<const bf16> x, down, b;
    global<const float> bias;  // or null
    u32 rows, inputs, outputs, rank;
};

__device__ __forceinline__ void finish(const Operands& p, u32 row, u32 output, float sum) {
    if (p.bias != nullptr) sum += load_global<float>(p.bias + output);
    const u64 at = u64(row) * p.outputs + output;
    if (p.y != nullptr)
        store_global(p.y + at, to_bf16(sum));
    else
        store_global(p.logits + at, sum);
}

// Outputs of a lane: two of the first 16 of the block, two of the others.
__device__ __forceinline__ u32 output_of(u32 i) {
    return blockIdx.x * OUTPUTS + i / 2 * 16 + threadIdx.x % WARP / 4 * 2 + i % 2;
}

struct DenseWeight {
    global<const bf16> weight;

    static constexpr u32 RUN = 8;
    struct Piece {
        vec<u32, 4> pairs[4];
    };

    __device__ __forceinline__ void prepare() const {}

    __device__ __forceinline__ Piece fetch(const Operands& p, u32 k) const {
        Piece piece;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            piece.pairs[i] = vec<u32, 4>{{0, 0, 0, 0}};
            if (k < p.inputs && output_of(i) < p.outputs)
                piece.pairs[i] = load_global<vec<u32, 4>>(weight + (u64(output_of(i)) * p.inputs + k));
        }
        return piece;
    }

    __device__ __forceinline__ float scale(const Piece&, u32) const { return 1; }

    // Elements 2n and 2n + 1 of the run of output i.
    __device__ __forceinline__ u32 pair(const Piece& piece, u32 i, u32 n, float) const { return piece.pairs[i][n]; }

    __device__ __forceinline__ float element(u64 index) const { return to_f32(load_global<bf16>(weight + index)); }
};

struct Nf4Weight {
    global<const u8> codes;  // in units, or row-major for `element`
    const Absmax& absmax;
    u32 shift;
    shared<float> values;  // [16]
    shared<float> map;     // [256], of nested scales

    static constexpr u32 RUN = 32;
    // Codes of 16 inputs of two outputs each, and scales, which if nested are codes themselves with their factors.
    struct Piece {
        vec<u32, 4> codes[2][2];  // first or second 16 outputs; first or second unit
        u32 scale[4];
        float nested[4];
    };

    __device__ __forceinline__ void prepare() const {
        if (threadIdx.x < 16) store_shared(values + threadIdx.x, NF4_CODES[threadIdx.x]);
        if (absmax.plain == nullptr)
            for (u32 i = threadIdx.x; i < 256; i += THREADS) store_shared(map + i, load_global<float>(absmax.map + i));
        __syncthreads();
    }

    // The panel's last outputs may lie outside: their codes are there, their scales are 0.
    __device__ __forceinline__ Piece fetch(const Operands& p, u32 k) const {
        Piece piece;
#pragma unroll
        for (u32 tile = 0; tile < 2; tile++)
#pragma unroll
            for (u32 unit = 0; unit < 2; unit++) {
                piece.codes[tile][unit] = vec<u32, 4>{{0, 0, 0, 0}};
                if (k < p.inputs)
                    piece.codes[tile][unit] =
                        load_global<vec<u32, 4>>(codes + row_of_unit(output_of(2 * tile), k / UNIT + unit, p.inputs));
            }
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            piece.scale[i] = 0, piece.nested[i] = 0;
            if (k >= p.inputs || output_of(i) >= p.outputs) continue;
            const u64 block = (u64(output_of(i)) * p.inputs + k) >> shift;
            if (absmax.plain != nullptr) {
                piece.scale[i] = load_global<u32>(absmax.plain + block);
            } else {
                piece.scale[i] = load_global<u8>(absmax.codes + block);
                piece.nested[i] = load_global<float>(absmax.nested + (block >> absmax.nested_shift));
            }
        }
        return piece;
    }

    // As absmax_of.
    __device__ __forceinline__ float scale(const Piece& piece, u32 i) const {
        if (absmax.plain != nullptr) return __uint_as_float(piece.scale[i]);
        return load_shared<float>(map + piece.scale[i]) * piece.nested[i] + absmax.offset;
    }

    __device__ __forceinline__ u32 pair(const Piece& piece, u32 i, u32 n, float scale) const {
        const u32 byte = piece.codes[i / 2][n / 8][i % 2 * 2 + n / 4 % 2] >> n % 4 * 8;
        return pack_bf16(load_shared<float>(values + (byte >> 4 & 15)) * scale,
                         load_shared<float>(values + (byte & 15)) * scale);
    }

    __device__ __forceinline__ float element(u64 index) const {
        const u32 byte = load_global<u8>(codes + index / 2);
        const float value = load_shared<float>(values + (index % 2 ? byte & 15 : byte >> 4));
        return to_f32(to_bf16(value * absmax_of(absmax, index >> shift)));
    }
};

// Two neighbours of a row of r elements, zeros beyond it.
__device__ __forceinline__ u32 pair_of(global<const bf16> row, u32 j, u32 r) {
    const u32 low = j < r ? load_global<bf16>(row + j).bits : 0, high = j + 1 < r ? load_global<bf16>(row + (j + 1)).bits : 0;
    return low | high << 16;
}

// sum += B·uᵀ
__device__ __forceinline__ void add_adapter(FragmentC (&sum)[2], const Operands& p) {
    const u32 row = threadIdx.x % WARP / 4, column = threadIdx.x % 4 * 2;
    for (u32 j = column; j < p.rank + column; j += 16) {
        FragmentB u = {{0, 0}};
        if (row < p.rows) {
            global<const bf16> from = p.down + u64(row) * p.rank;
            u = {{pair_of(from, j, p.rank), pair_of(from, j + 8, p.rank)}};
        }
#pragma unroll
        for (u32 tile = 0; tile < 2; tile++) {
            FragmentA b = {{0, 0, 0, 0}};
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                const u32 output = output_of(2 * tile + half);
                if (output >= p.outputs) continue;
                global<const bf16> from = p.b + u64(output) * p.rank;
                b.a[half] = pair_of(from, j, p.rank), b.a[half + 2] = pair_of(from, j + 8, p.rank);
            }
            mma_m16n8k16(sum[tile], b, u);
        }
    }
}

template <typename W>
__device__ __forceinline__ void product(const Operands& p, const W& weight) {
    constexpr u32 RUN = W::RUN, STEP = 4 * RUN;
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, row = lane / 4, run = lane % 4 * RUN;
    weight.prepare();
    FragmentC sum[2] = {};
    typename W::Piece next = weight.fetch(p, warp * STEP + run);
    for (u32 step = warp * STEP; step < p.inputs; step += WARPS * STEP) {
        const typename W::Piece piece = next;
        next = weight.fetch(p, step + WARPS * STEP + run);
        const u32 k = step + run;
        vec<u32, 4> x[RUN / 8];
#pragma unroll
        for (u32 i = 0; i < RUN / 8; i++) {
            x[i] = vec<u32, 4>{{0, 0, 0, 0}};
            if (row < p.rows && k < p.inputs) x[i] = load_global<vec<u32, 4>>(p.x + (u64(row) * p.inputs + k + 8 * i));
        }
        float scale[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) scale[i] = weight.scale(piece, i);
#pragma unroll
        for (u32 n = 0; n < RUN / 2; n += 2) {
            const FragmentB b = {{x[n / 4][n % 4], x[n / 4][n % 4 + 1]}};
#pragma unroll
            for (u32 tile = 0; tile < 2; tile++) {
                const u32 i = 2 * tile;
                const FragmentA a = {{weight.pair(piece, i, n, scale[i]), weight.pair(piece, i + 1, n, scale[i + 1]),
                                      weight.pair(piece, i, n + 1, scale[i]),
                                      weight.pair(piece, i + 1, n + 1, scale[i + 1])}};
                mma_m16n8k16(sum[tile], a, b);
            }
        }
    }
    if (warp == 0 && p.down != nullptr) add_adapter(sum, p);

    // [warp, row, output]. Rows PITCH apart: the pairs of half a warp, four rows of four, lie in 32 banks.
    constexpr u32 PITCH = OUTPUTS + 4;
    shared<float> parts = static_shared<float, WARPS * ROWS * PITCH, 2>();
#pragma unroll
    for (u32 tile = 0; tile < 2; tile++)
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const u32 output = tile * 16 + lane / 4 * 2, column = lane % 4 * 2 + i;
            const vec<float, 2> pair = {{sum[tile].c[i], sum[tile].c[i + 2]}};
            store_shared(parts + ((warp * ROWS + column) * PITCH + output), pair);
        }
    __syncthreads();
    for (u32 i = threadIdx.x; i < p.rows * OUTPUTS; i += THREADS) {
        const u32 row = i / OUTPUTS, output = blockIdx.x * OUTPUTS + i % OUTPUTS;
        if (output >= p.outputs) continue;
        float total = 0;
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) total += load_shared<float>(parts + ((w * ROWS + row) * PITCH + i % OUTPUTS));
        finish(p, row, output, total);
    }
}

template <typename W>
__device__ __forceinline__ void elements(const Operands& p, const W& weight) {
    weight.prepare();
    const u32 output = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (output >= p.outputs) return;
    float sum[ROWS] = {};
    for (u32 k = lane; k < p.inputs; k += WARP) {
        const float w = weight.element(u64(output) * p.inputs + k);
#pragma unroll
        for (u32 m = 0; m < ROWS; m++)
            if (m < p.rows) sum[m] = fmaf(to_f32(load_global<bf16>(p.x + (u64(m) * p.inputs + k))), w, sum[m]);
    }
    for (u32 j = lane; p.down != nullptr && j < p.rank; j += WARP) {
        const float b = to_f32(load_global<bf16>(p.b + (u64(output) * p.rank + j)));
#pragma unroll
        for (u32 m = 0; m < ROWS; m++)
            if (m < p.rows) sum[m] = fmaf(to_f32(load_global<bf16>(p.down + (u64(m) * p.rank + j))), b, sum[m]);
    }
#pragma unroll
    for (u32 m = 0; m < ROWS; m++) {
        const float total = warp_sum(sum[m]);
        if (m < p.rows && lane == 0) finish(p, m, output, total);
    }
}

#define DENSE(name, f)                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                                        \
        name(global<bf16> y, global<float> logits, global<const bf16> x, u64 first, global<const bf16> down,        \
             global<const bf16> b, global<const float> bias, u32 rows, u32 inputs, u32 outputs, u32 rank,           \
             global<const bf16> weight) {                                                                           \
        f(Operands{y, logits, x + first, down, b, bias, rows, inputs, outputs, rank}, DenseWeight{weight});         \
    }                                                                                                               \
    ENTRY(name)
DENSE(small_dense, product)
DENSE(small_elements_dense, elements)

#define NF4(name, f)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                                        \
        name(global<bf16> y, global<float> logits, global<const bf16> x, u64 first, global<const bf16> down,        \
             global<const bf16> b, global<const float> bias, u32 rows, u32 inputs, u32 outputs, u32 rank,           \
             global<const u8> codes, Absmax absmax, u32 shift) {                                                    \
        f(Operands{y, logits, x + first, down, b, bias, rows, inputs, outputs, rank},                               \
          Nf4Weight{codes, absmax, shift, static_shared<float, 16, 0>(), static_shared<float, 256, 1>()});          \
    }                                                                                                               \
    ENTRY(name)
NF4(small_nf4, product)
NF4(small_elements_nf4, elements)
