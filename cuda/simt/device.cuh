// kernels/device.cuh for the host: the same names, with every access checked and counted.
#pragma once
#include <simt.h>

#define __device__
#define __global__ __attribute__((visibility("default")))
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __grid_constant__

#define threadIdx (simt::machine().current->index)
#define blockIdx (simt::machine().block)
#define blockDim (simt::Dim{simt::machine().config->threads, 1, 1})
#define gridDim (simt::machine().config->grid)

#define SIMT_WHERE const char *file = __builtin_FILE(), u32 line = __builtin_LINE()

struct alignas(8) uint2 {
    u32 x, y;
};
struct alignas(16) uint4 {
    u32 x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) int2 {
    i32 x, y;
};
struct alignas(16) int4 {
    i32 x, y, z, w;
};
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ── Arithmetic: each rounds once, as the instruction of that name does ──

template <typename To, typename From>
inline To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    static_assert(std::is_trivially_copyable<To>::value && std::is_trivially_copyable<From>::value, "plain data");
    To to;
    memcpy(static_cast<void*>(&to), &from, sizeof(To));
    return to;
}

inline float __uint_as_float(u32 x) { return bits_as<float>(x); }
inline u32 __float_as_uint(float x) { return bits_as<u32>(x); }
inline float __int_as_float(i32 x) { return bits_as<float>(x); }
inline i32 __float_as_int(float x) { return bits_as<i32>(x); }
inline u32 __umulhi(u32 x, u32 y) { return u32(u64(x) * y >> 32); }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(u32(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline u32 __funnelshift_r(u32 low, u32 high, u32 shift) { return u32((u64(high) << 32 | low) >> (shift & 31)); }
inline u32 __funnelshift_l(u32 low, u32 high, u32 shift) { return u32((u64(high) << 32 | low) << (shift & 31) >> 32); }
// The bytes of {y, x} that the nibbles of `selector` name; bit 3 of a nibble would copy a sign, which nobody needs.
inline u32 __byte_perm(u32 x, u32 y, u32 selector) {
    const u64 bytes = u64(y) << 32 | x;
    u32 result = 0;
    for (u32 i = 0; i < 4; i++) result |= u32(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
// The fast functions of the GPU have errors of their own; here they are exact.
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float exp2_approx(float x) { return x < -126 ? 0 : std::exp2(x); }
inline float rsqrtf(float x) { return float(1.0 / std::sqrt(double(x))); }
template <typename T>
inline T min(T x, T y) {
    return y < x ? y : x;
}
template <typename T>
inline T max(T x, T y) {
    return x < y ? y : x;
}

struct bf16 {
    u16 bits;
};

inline float to_f32(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
inline float to_f32(float x) { return x; }
// cvt.rn.bf16.f32: nearest, ties to even; every NaN becomes 0x7fff.
inline bf16 to_bf16(float x) {
    if (x != x) return {0x7fff};
    const u32 bits = __float_as_uint(x);
    return {u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline u32 pack_bf16(float low, float high) { return to_bf16(low).bits | u32(to_bf16(high).bits) << 16; }
inline float low_f32(u32 pair) { return __uint_as_float(pair << 16); }
inline float high_f32(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

template <typename T, u32 N>
struct alignas(sizeof(T) * N) vec {
    T at[N];
    T& operator[](u32 i) { return at[i]; }
    const T& operator[](u32 i) const { return at[i]; }
};

// ── Pointers without a dereference ──

template <typename T>
class global {
    u64 word;  // the address, and above it the number of its buffer + 1, or 0

   public:
    typedef T element;
    global() = default;
    explicit global(u64 word) : word(word) {}
    global(std::nullptr_t) : word(0) {}
    template <typename U, typename = typename std::enable_if<std::is_same<const U, T>::value>::type>
    global(global<U> other) : word(other.raw()) {}
    u64 raw() const { return word; }
    global operator+(i64 n) const { return global(word + n * i64(sizeof(T))); }
    global operator-(i64 n) const { return global(word - n * i64(sizeof(T))); }
    global& operator+=(i64 n) { return *this = *this + n; }
    global& operator-=(i64 n) { return *this = *this - n; }
    global& operator++() { return *this += 1; }
    i64 operator-(global other) const { return i64(word - other.word) / i64(sizeof(T)); }
    bool operator==(global other) const { return word == other.word; }
    bool operator!=(global other) const { return word != other.word; }
    bool operator==(std::nullptr_t) const { return (word & simt::ADDRESS) == 0; }
    bool operator!=(std::nullptr_t) const { return (word & simt::ADDRESS) != 0; }
    explicit operator bool() const { return (word & simt::ADDRESS) != 0; }
};
static_assert(sizeof(global<float>) == 8, "as on the GPU");

template <typename T>
class shared {
    u8* address;
    u32 index;  // of its array

   public:
    typedef T element;
    shared() = default;
    shared(u8* address, u32 slot) : address(address), index(slot) {}
    template <typename U, typename = typename std::enable_if<std::is_same<const U, T>::value>::type>
    shared(shared<U> other) : address(other.raw()), index(other.slot()) {}
    u8* raw() const { return address; }
    u32 slot() const { return index; }
    shared operator+(i64 n) const { return shared(address + n * i64(sizeof(T)), index); }
    shared operator-(i64 n) const { return shared(address - n * i64(sizeof(T)), index); }
    shared& operator+=(i64 n) { return *this = *this + n; }
    i64 operator-(shared other) const { return (address - other.address) / i64(sizeof(T)); }
};

template <typename To, typename From>
inline global<To> global_cast(global<From> p) {
    static_assert(std::is_const<To>::value || !std::is_const<From>::value, "casts const away");
    return global<To>(p.raw());
}
template <typename To, typename From>
inline shared<To> shared_cast(shared<From> p) {
    return shared<To>(p.raw(), p.slot());
}

template <typename V, typename T>
inline V load_global(global<T> p, SIMT_WHERE) {
    V value;
    memcpy(static_cast<void*>(&value), simt::global_address(p.raw(), sizeof(V), false, {file, line}), sizeof(V));
    return value;
}
template <typename V, typename T>
inline void store_global(global<T> p, const V& value, SIMT_WHERE) {
    static_assert(!std::is_const<T>::value, "an input is not written");
    memcpy(simt::global_address(p.raw(), sizeof(V), true, {file, line}), &value, sizeof(V));
}
template <typename V, typename T>
inline V load_shared(shared<T> p, SIMT_WHERE) {
    V value;
    memcpy(static_cast<void*>(&value), simt::shared_address(p.raw(), p.slot(), sizeof(V), false, {file, line}), sizeof(V));
    return value;
}
template <typename V, typename T>
inline void store_shared(shared<T> p, const V& value, SIMT_WHERE) {
    memcpy(simt::shared_address(p.raw(), p.slot(), sizeof(V), true, {file, line}), &value, sizeof(V));
}

template <typename T, u32 N, u32 TAG = 0>
inline shared<T> static_shared(SIMT_WHERE) {
    static const char identity = 0;  // one for every array
    simt::Machine& m = simt::machine();
    auto found = m.slot_of.find(&identity);
    if (found == m.slot_of.end()) {
        const u32 bytes = (sizeof(T) * N + 15) / 16 * 16;
        const u32 dynamic = (m.config->dynamic_shared + 127) / 128 * 128;
        if (m.used + bytes > dynamic + simt::MOST_STATIC_SHARED)
            simt::fail({file, line}, "more than 48 KiB of static shared memory");
        u8* begin = m.base + m.used;
        m.used += bytes;
        m.slots.push_back({begin, begin + sizeof(T) * N});
        found = m.slot_of.emplace(&identity, u32(m.slots.size() - 1)).first;
    }
    return shared<T>(m.slots[found->second].begin, found->second);
}
inline shared<u8> dynamic_shared() { return shared<u8>(simt::machine().base, 0); }

inline u32 atomic_add_global(global<u32> p, u32 value, SIMT_WHERE) {
    u32* at = reinterpret_cast<u32*>(simt::global_address(p.raw(), 4, true, {file, line}));
    const u32 before = *at;
    *at = before + value;
    return before;
}

// ── Barriers and warp operations ──

#define __syncthreads() simt::barrier({__FILE__, __LINE__})
#define __threadfence() ((void)0)
#define __trap() simt::fail({__FILE__, __LINE__}, "__trap")

inline void __syncwarp(u32 mask = FULL, SIMT_WHERE) {
    simt::collective("__syncwarp", mask, nullptr, {file, line},
                     [](void**) { simt::warp_of(*simt::machine().current).epoch++; });
}

namespace simt {
template <typename T>
struct Exchange {
    T in, out;
    u32 source;
};

template <typename T>
inline T shuffle(const char* name, u32 mask, T value, u32 source, Where where) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    Exchange<T> mine{value, value, source};
    collective(name, mask, &mine, where, [&](void** operands) {
        for (u32 i = 0; i < WARP; i++) {
            if (!(mask >> i & 1)) continue;
            auto& lane = *static_cast<Exchange<T>*>(operands[i]);
            if (!(mask >> lane.source & 1)) fail(where, "%s: lane %u reads lane %u, which is not in mask %08x", name, i, lane.source, mask);
            lane.out = static_cast<Exchange<T>*>(operands[lane.source])->in;
        }
    });
    return mine.out;
}

inline u32 lane_index() { return machine().current->thread % WARP; }

struct Vote {
    u64 in, out;
};

template <typename Fold>
inline u64 vote(const char* name, u32 mask, u64 value, Where where, Fold fold) {
    Vote mine{value, 0};
    collective(name, mask, &mine, where, [&](void** operands) {
        u64 result = 0;
        bool first = true;
        for (u32 i = 0; i < WARP; i++)
            if (mask >> i & 1) {
                result = fold(first, result, static_cast<Vote*>(operands[i])->in, i);
                first = false;
            }
        for (u32 i = 0; i < WARP; i++)
            if (mask >> i & 1) static_cast<Vote*>(operands[i])->out = result;
    });
    return mine.out;
}
}  // namespace simt

template <typename T>
inline T __shfl_sync(u32 mask, T value, u32 source, u32 width = WARP, SIMT_WHERE) {
    const u32 lane = simt::lane_index();
    return simt::shuffle("__shfl_sync", mask, value, lane / width * width + source % width, {file, line});
}
template <typename T>
inline T __shfl_xor_sync(u32 mask, T value, u32 distance, u32 width = WARP, SIMT_WHERE) {
    const u32 lane = simt::lane_index(), source = lane ^ distance;
    return simt::shuffle("__shfl_xor_sync", mask, value, source / width <= lane / width ? source : lane, {file, line});
}
template <typename T>
inline T __shfl_up_sync(u32 mask, T value, u32 distance, u32 width = WARP, SIMT_WHERE) {
    const u32 lane = simt::lane_index();
    return simt::shuffle("__shfl_up_sync", mask, value, lane % width >= distance ? lane - distance : lane, {file, line});
}
template <typename T>
inline T __shfl_down_sync(u32 mask, T value, u32 distance, u32 width = WARP, SIMT_WHERE) {
    const u32 lane = simt::lane_index();
    return simt::shuffle("__shfl_down_sync", mask, value, lane % width + distance < width ? lane + distance : lane, {file, line});
}
inline u32 __ballot_sync(u32 mask, bool predicate, SIMT_WHERE) {
    return u32(simt::vote("__ballot_sync", mask, predicate, {file, line},
                          [](bool, u64 all, u64 one, u32 lane) { return all | one << lane; }));
}
inline int __any_sync(u32 mask, bool predicate, SIMT_WHERE) {
    return int(simt::vote("__any_sync", mask, predicate, {file, line}, [](bool, u64 all, u64 one, u32) { return all | one; }));
}
inline int __all_sync(u32 mask, bool predicate, SIMT_WHERE) {
    return int(simt::vote("__all_sync", mask, predicate, {file, line},
                          [](bool first, u64 all, u64 one, u32) { return first ? one : all & one; }));
}
inline u32 __reduce_add_sync(u32 mask, u32 value, SIMT_WHERE) {
    return u32(simt::vote("__reduce_add_sync", mask, value, {file, line}, [](bool, u64 all, u64 one, u32) { return all + one; }));
}
inline u32 __reduce_max_sync(u32 mask, u32 value, SIMT_WHERE) {
    return u32(simt::vote("__reduce_max_sync", mask, value, {file, line},
                          [](bool first, u64 all, u64 one, u32) { return first ? one : std::max(all, one); }));
}
inline u32 __reduce_min_sync(u32 mask, u32 value, SIMT_WHERE) {
    return u32(simt::vote("__reduce_min_sync", mask, value, {file, line},
                          [](bool first, u64 all, u64 one, u32) { return first ? one : std::min(all, one); }));
}
inline u32 __reduce_or_sync(u32 mask, u32 value, SIMT_WHERE) {
    return u32(simt::vote("__reduce_or_sync", mask, value, {file, line}, [](bool, u64 all, u64 one, u32) { return all | one; }));
}

// ── The table of entries ──

namespace simt {
template <typename P>
struct ParameterOf {
    static constexpr Parameter value{sizeof(P), 0};
    static P read(void* at, i32) {
        P p;
        memcpy(static_cast<void*>(&p), at, sizeof(P));
        return p;
    }
};
template <typename T>
struct ParameterOf<global<T>> {
    static constexpr Parameter value{8, std::is_const<T>::value ? 1u : 2u};
    static global<T> read(void* at, i32 region) {
        u64 address;
        memcpy(&address, at, 8);
        return global<T>(region < 0 ? address : address | u64(region + 1) << TAG_SHIFT);
    }
};

template <typename F, F* kernel>
struct Call;
template <typename... P, void (*kernel)(P...)>
struct Call<void(P...), kernel> {
    static constexpr Parameter parameters[sizeof...(P) + 1] = {ParameterOf<P>::value..., {0, 0}};
    template <size_t... I>
    static void unpack(void* const* arguments, const i32* regions, std::index_sequence<I...>) {
        (void)arguments, (void)regions;
        kernel(ParameterOf<P>::read(arguments[I], regions[I])...);
    }
    static void body(void* const* arguments, const i32* regions) {
        unpack(arguments, regions, std::index_sequence_for<P...>{});
    }
    static Entry entry() { return {parameters, u32(sizeof...(P)), &body}; }
};
}  // namespace simt

#define ENTRY(kernel)                                                                           \
    extern "C" __attribute__((visibility("default"))) const simt::Entry simt_entry_##kernel = \
        simt::Call<decltype(kernel), &kernel>::entry();
