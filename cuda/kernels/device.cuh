// What every kernel stands on: types, checked memory access, warp and block reductions.
//
// A kernel touches memory only through the functions of this file and of ptx.cuh. On the GPU they are single
// instructions. The stand-in (simt/device.cuh, same names) checks and counts each of them: `global` and `shared` are
// plain pointers here and classes without a dereference there, so that an access around them does not compile.
//
// Compiled with --fmad=false: a product and a sum are contracted only where the source says fmaf. So what a kernel
// rounds can be read off its source, and is the same here, in the stand-in and on the CPU backend.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

constexpr u32 WARP = 32;
constexpr u32 FULL = 0xffffffffu;

// A kernel that can be launched. The stand-in makes its table of entries of these.
#define ENTRY(kernel)

template <typename T>
using global = T*;
template <typename T>
using shared = T*;

// bfloat16: the upper half of a float.
struct bf16 {
    u16 bits;
};

__device__ __forceinline__ float to_f32(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
__device__ __forceinline__ float to_f32(float x) { return x; }

// Nearest, ties to even. PTX ISA, "Data Movement and Conversion Instructions: cvt"; sm_80.
__device__ __forceinline__ bf16 to_bf16(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// Two at once; `low` lies at the lower address.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

__device__ __forceinline__ float low_f32(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_f32(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// 2^x with an error of 2 units in the last place; 0 where that is below 2^-126, which spares three instructions of four.
// PTX ISA, "Floating Point Instructions: ex2".
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// N elements moved as one; N · sizeof(T) is 1, 2, 4, 8 or 16 bytes.
template <typename T, u32 N>
struct alignas(sizeof(T) * N) vec {
    T at[N];
    __device__ __forceinline__ T& operator[](u32 i) { return at[i]; }
    __device__ __forceinline__ const T& operator[](u32 i) const { return at[i]; }
};

template <u32 BYTES>
struct Word;
template <>
struct Word<1> {
    typedef u8 type;
};
template <>
struct Word<2> {
    typedef u16 type;
};
template <>
struct Word<4> {
    typedef u32 type;
};
template <>
struct Word<8> {
    typedef uint2 type;
};
template <>
struct Word<16> {
    typedef uint4 type;
};

template <typename To, typename From>
__device__ __forceinline__ To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

// Reads a V at p. Through a pointer to const the read-only path is taken (ld.global.nc): what a kernel receives as
// const is not written during its launch, by anyone; the launchers refuse such arguments.
template <typename V, typename T>
__device__ __forceinline__ V load_global(const T* p) {
    typedef typename Word<sizeof(V)>::type W;
    return bits_as<V>(__ldg(reinterpret_cast<const W*>(p)));
}
template <typename V, typename T>
__device__ __forceinline__ V load_global(T* p) {
    typedef typename Word<sizeof(V)>::type W;
    return bits_as<V>(*reinterpret_cast<const W*>(p));
}
template <typename V, typename T>
__device__ __forceinline__ void store_global(T* p, const V& value) {
    typedef typename Word<sizeof(V)>::type W;
    *reinterpret_cast<W*>(p) = bits_as<W>(value);
}
template <typename V, typename T>
__device__ __forceinline__ V load_shared(const T* p) {
    typedef typename Word<sizeof(V)>::type W;
    const W word = *reinterpret_cast<const W*>(p);  // a copy: behind a reference its alignment is forgotten
    return bits_as<V>(word);
}
template <typename V, typename T>
__device__ __forceinline__ void store_shared(T* p, const V& value) {
    typedef typename Word<sizeof(V)>::type W;
    *reinterpret_cast<W*>(p) = bits_as<W>(value);
}

template <typename To, typename From>
__device__ __forceinline__ To* global_cast(From* p) {
    return reinterpret_cast<To*>(p);
}
template <typename To, typename From>
__device__ __forceinline__ To* shared_cast(From* p) {
    return reinterpret_cast<To*>(p);
}

// N elements of shared memory of the block, aligned to 16 bytes. TAG tells arrays of one type and length apart.
template <typename T, u32 N, u32 TAG = 0>
__device__ __forceinline__ shared<T> static_shared() {
    __shared__ __align__(16) T storage[N];
    return storage;
}

// The shared memory asked for at the launch, aligned to 16 bytes.
__device__ __forceinline__ shared<u8> dynamic_shared() {
    extern __shared__ __align__(16) u8 storage[];
    return storage;
}

// Integers only: a sum of floats by atomics has no order.
__device__ __forceinline__ u32 atomic_add_global(u32* p, u32 value) { return atomicAdd(p, value); }
