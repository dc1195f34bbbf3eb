// The PTX instructions of Ampere that CUDA C++ has no name for, each as one function. simt/ptx.cuh has the same
// functions with the same fragment layouts for the host.
//
// Sections refer to the PTX ISA. Every function marked "warp" is executed by all 32 lanes together. In the layouts
// g = lane / 4 and t = lane % 4.
#pragma once
#include <device.cuh>

// Fragments of mma.m16n8k16 (section "Matrix Fragments for mma.m16n8k16 with floating point type"); a u32 holds two
// bf16, the one with the lower index in the lower half:
//
//   A [16 × 16], row-major   a[0] (g, 2t..2t+1)   a[1] (g+8, 2t..)   a[2] (g, 2t+8..)   a[3] (g+8, 2t+8..)
//   B [16 × 8], by columns   b[0] (2t..2t+1, g)   b[1] (2t+8.., g)
//   C [16 × 8]               c[0], c[1] (g, 2t..2t+1)   c[2], c[3] (g+8, 2t..2t+1)
struct FragmentA {
    u32 a[4];
};
struct FragmentB {
    u32 b[2];
};
struct FragmentC {
    float c[4];
};

// warp: C += A·B with fp32 accumulation. "Warp Level Matrix Multiply-Accumulate Instructions: mma"; sm_80.
// The order of the sixteen products is the hardware's; the same on every GPU of one architecture.
__device__ __forceinline__ void mma_m16n8k16(FragmentC& c, const FragmentA& a, const FragmentB& b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c.c[0]), "+f"(c.c[1]), "+f"(c.c[2]), "+f"(c.c[3])
        : "r"(a.a[0]), "r"(a.a[1]), "r"(a.a[2]), "r"(a.a[3]), "r"(b.b[0]), "r"(b.b[1]));
}

// A pointer into shared memory as these instructions want it.
__device__ __forceinline__ u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// warp: N matrices of 8 × 8 elements of 16 bits ("Warp Level Matrix Load Instruction: ldmatrix"; sm_75). Lane 8i + j
// gives the address of row j of matrix i, 16 bytes, aligned to 16; for N < 4 the other lanes' addresses are ignored,
// but have to lie in shared memory. out[i] of a lane: elements 2t and 2t+1 of row g of matrix i; with `transpose`,
// elements g of rows 2t and 2t+1.
template <u32 N, bool TRANSPOSE = false, typename T>
__device__ __forceinline__ void ldmatrix(u32 (&out)[N], shared<T> row) {
    const u32 address = shared_address(row);
    static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
    if constexpr (N == 1 && !TRANSPOSE)
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(out[0]) : "r"(address) : "memory");
    if constexpr (N == 1 && TRANSPOSE)
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                     : "=r"(out[0])
                     : "r"(address)
                     : "memory");
    if constexpr (N == 2 && !TRANSPOSE)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(out[0]), "=r"(out[1])
                     : "r"(address)
                     : "memory");
    if constexpr (N == 2 && TRANSPOSE)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(out[0]), "=r"(out[1])
                     : "r"(address)
                     : "memory");
    if constexpr (N == 4 && !TRANSPOSE)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(address)
                     : "memory");
    if constexpr (N == 4 && TRANSPOSE)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(address)
                     : "memory");
}

// Copies BYTES (4, 8 or 16; both sides aligned to that) from global to shared memory without a register, or writes
// zeros when `inside` is false, in which case `from` is not read. "Data Movement and Conversion Instructions: cp.async";
// sm_80. 16 bytes go around the first-level cache (.cg), 4 and 8 cannot.
//
// The bytes are there after the thread that issued the copy has committed and waited; for other threads, after a
// barrier that follows.
template <u32 BYTES, typename T, typename U>
__device__ __forceinline__ void cp_async(shared<T> to, global<U> from, bool inside = true) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    const u32 address = shared_address(to);
    const u32 bytes = inside ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(BYTES), "r"(bytes)
                     : "memory");
}

// Ends a group: all copies that this thread has issued since the last one. "cp.async.commit_group".
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's latest groups are under way. "cp.async.wait_group".
template <u32 PENDING>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
