// Rows by index: the embedding, and the labelled rows.
//
//   gather_rows     out[i] = table[index[i]]      the embedding (index = tokens), h of the labelled positions
//   scatter_rows    out[index[i]] = x[i]          the gradient back to all positions; the launcher has cleared `out`, and no
//                                                 index comes twice
//
// out, table, x: bf16, rows of `cols`; index: u32 [rows]. Indices were checked on the host, where they come from.
//
// A thread moves 8 elements (1 where cols is not a multiple of 8). Bytes: 4 an element. Bound: memory.
#include <vector.cuh>

template <u32 N, bool SCATTER>
__device__ __forceinline__ void move(global<bf16> out, global<const bf16> x, global<const u32> index, u32 rows, u32 cols) {
    const u32 runs = cols / N;
    const u32 i = blockIdx.x * FLAT_THREADS + threadIdx.x;  // the launcher has checked that it fits
    if (i >= rows * runs) return;
    const u64 row = i / runs, col = i % runs * N, other = load_global<u32>(index + row);
    const u64 from = (SCATTER ? row : other) * cols + col, to = (SCATTER ? other : row) * cols + col;
    store_global(out + to, load_global<vec<bf16, N>>(x + from));
}

#define ROWS(name, N, SCATTER)                                                                               \
    extern "C" __global__ void __launch_bounds__(FLAT_THREADS)                                              \
        name(global<bf16> out, global<const bf16> x, global<const u32> index, u32 rows, u32 cols) {         \
        move<N, SCATTER>(out, x, index, rows, cols);                                                        \
    }                                                                                                       \
    ENTRY(name)
ROWS(gather_rows_8, 8, false)
ROWS(gather_rows_1, 1, false)
ROWS(scatter_rows_8, 8, true)
ROWS(scatter_rows_1, 1, true)
