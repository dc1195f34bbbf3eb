// Kernels with one mistake each, and kernels that use every warp operation: the stand-in is tested with them.
#include <ptx.cuh>
#include <reduce.cuh>

constexpr u32 THREADS = 64;

// ── Right ──

// out[0..256] = C + A·B of row-major A [16, 16], B [16, 8] (bf16) and C [16, 8] (fp32), by ldmatrix, mma and cp.async.
extern "C" __global__ void mma_through_ldmatrix(global<float> c, global<const bf16> a, global<const bf16> b) {
    shared<bf16> sa = static_shared<bf16, 256, 0>(), sb = static_shared<bf16, 128, 1>();
    const u32 lane = threadIdx.x, g = lane / 4, t = lane % 4;
    cp_async<16>(sa + 8 * lane, a + 8 * lane);
    if (lane < 16) cp_async<16>(sb + 8 * lane, b + 8 * lane);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    FragmentA fa;
    FragmentB fb;
    FragmentC fc;
    ldmatrix<4>(fa.a, sa + (lane % 16) * 16 + lane / 16 * 8);
    ldmatrix<2, true>(fb.b, sb + (lane % 16) * 8);
    for (u32 i = 0; i < 4; i++) fc.c[i] = load_global<float>(c + (g + i / 2 * 8) * 8 + 2 * t + i % 2);
    mma_m16n8k16(fc, fa, fb);
    for (u32 i = 0; i < 4; i++) store_global(c + (g + i / 2 * 8) * 8 + 2 * t + i % 2, fc.c[i]);
}
ENTRY(mma_through_ldmatrix)

// out[0] sum, out[1] maximum of x[0..64], in every thread; out[2..] what shuffles and votes give.
extern "C" __global__ void reductions(global<float> out, global<const float> x) {
    const float mine = load_global<float>(x + threadIdx.x);
    const float sum = block_sum<THREADS, 0>(mine), most = block_max<THREADS, 1>(mine);
    const u32 votes = __ballot_sync(FULL, mine > 0);
    const float next = __shfl_down_sync(FULL, mine, 1), first = __shfl_sync(FULL, mine, 0);
    if (threadIdx.x == THREADS - 1) {
        store_global(out, sum);
        store_global(out + 1, most);
        store_global(out + 2, float(__popc(votes)));
        store_global(out + 3, next);
        store_global(out + 4, first);
    }
}
ENTRY(reductions)

// Three groups of copies, of which the first is waited for: only its bytes are there.
extern "C" __global__ void copies_land_in_order(global<u32> out, global<const u32> x) {
    shared<u32> s = static_shared<u32, THREADS * 12>();
    const u32 i = threadIdx.x;
    for (u32 group = 0; group < 3; group++) {
        cp_async<16>(s + (group * THREADS + i) * 4, x + 4 * i, group != 1);
        cp_async_commit();
    }
    cp_async_wait<2>();
    store_global(out + 3 * i, load_shared<u32>(s + 4 * i));
    store_global(out + 3 * i + 1, load_shared<u32>(s + (2 * THREADS + i) * 4));
    cp_async_wait<0>();
    store_global(out + 3 * i + 2, load_shared<u32>(s + (THREADS + i) * 4));
}
ENTRY(copies_land_in_order)

// Loads of `stride` words apart from shared memory, for counting conflicts.
extern "C" __global__ void strided(global<u32> out, u32 stride) {
    shared<u32> s = static_shared<u32, 4096>();
    for (u32 i = threadIdx.x; i < 4096; i += THREADS) store_shared(s + i, i);
    __syncthreads();
    store_global(out + threadIdx.x, load_shared<u32>(s + threadIdx.x % WARP * stride));
}
ENTRY(strided)

// ── Wrong ──

extern "C" __global__ void reads_past_the_end(global<float> out, global<const float> x, u32 count) {
    store_global(out, load_global<float>(x + count));
}
ENTRY(reads_past_the_end)

extern "C" __global__ void writes_before_the_start(global<float> out) { store_global(out - 1, 0.0f); }
ENTRY(writes_before_the_start)

extern "C" __global__ void reads_misaligned(global<float> out, global<const float> x) {
    store_global(out, load_global<vec<float, 4>>(x + 1)[0]);
}
ENTRY(reads_misaligned)

extern "C" __global__ void reads_past_shared(global<float> out) {
    shared<float> s = static_shared<float, 32>();
    store_global(out, load_shared<float>(s + 32));
}
ENTRY(reads_past_shared)

extern "C" __global__ void reads_what_nobody_wrote(global<float> out) {
    store_global(out + threadIdx.x, load_shared<float>(static_shared<float, 64>() + threadIdx.x));
}
ENTRY(reads_what_nobody_wrote)

extern "C" __global__ void shuffles_in_half_a_warp(global<float> out) {
    if (threadIdx.x % 2) store_global(out, __shfl_xor_sync(FULL, 1.0f, 1));
}
ENTRY(shuffles_in_half_a_warp)

extern "C" __global__ void disagrees_on_the_mask(global<float> out) {
    store_global(out + threadIdx.x, __shfl_sync(threadIdx.x % WARP < 16 ? FULL : 0xffff0000u, 1.0f, 20));
}
ENTRY(disagrees_on_the_mask)

extern "C" __global__ void disagrees_on_the_operation(global<float> out) {
    float x = 1;
    if (threadIdx.x % 2)
        x = __shfl_xor_sync(FULL, x, 2);
    else
        x = __shfl_down_sync(FULL, x, 2);
    store_global(out + threadIdx.x, x);
}
ENTRY(disagrees_on_the_operation)

extern "C" __global__ void half_the_block_at_a_barrier(global<float> out) {
    if (threadIdx.x < WARP) __syncthreads();
    store_global(out + threadIdx.x, 1.0f);
}
ENTRY(half_the_block_at_a_barrier)

extern "C" __global__ void two_barriers_at_a_time(global<float> out) {
    if (threadIdx.x < WARP)
        __syncthreads();
    else {
        __syncthreads();
    }
    store_global(out + threadIdx.x, 1.0f);
}
ENTRY(two_barriers_at_a_time)

// What another warp wrote, without a barrier.
extern "C" __global__ void races(global<float> out) {
    shared<float> s = static_shared<float, THREADS>();
    store_shared(s + threadIdx.x, 1.0f);
    store_global(out + threadIdx.x, load_shared<float>(s + (threadIdx.x + WARP) % THREADS));
}
ENTRY(races)

// The classic one: written again before all have read.
extern "C" __global__ void races_in_a_loop(global<float> out) {
    shared<float> s = static_shared<float, THREADS>();
    float sum = 0;
    for (u32 i = 0; i < 2; i++) {
        store_shared(s + threadIdx.x, float(i));
        __syncthreads();
        sum += load_shared<float>(s + (threadIdx.x + WARP) % THREADS);
    }
    store_global(out + threadIdx.x, sum);
}
ENTRY(races_in_a_loop)

extern "C" __global__ void leaves_a_copy(global<float> out, global<const float> x) {
    cp_async<16>(static_shared<float, 4 * THREADS>() + 4 * threadIdx.x, x);
    cp_async_commit();
    store_global(out + threadIdx.x, 1.0f);
}
ENTRY(leaves_a_copy)

// Right on a GPU and in any order, but the sum depends on the order of the blocks.
extern "C" __global__ void sums_in_any_order(global<float> out, global<u32> turn) {
    if (threadIdx.x == 0) store_global(out + atomic_add_global(turn, 1), float(blockIdx.x));
}
ENTRY(sums_in_any_order)
