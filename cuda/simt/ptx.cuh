// kernels/ptx.cuh for the host: the same functions, the same fragments.
#pragma once
#include <device.cuh>

struct FragmentA {
    u32 a[4];
};
struct FragmentB {
    u32 b[2];
};
struct FragmentC {
    float c[4];
};

namespace simt {
struct Product {
    FragmentC* c;
    const FragmentA* a;
    const FragmentB* b;
};

inline float half_of(u32 pair, u32 which) { return which ? high_f32(pair) : low_f32(pair); }

// A model of the hardware's order, not its bits: eight products at a time are added to the accumulator and rounded
// once. (A product of two bf16 is exact in float; eight and the accumulator are added in double.)
inline void multiply_fragments(void** operands) {
    float a[16][16], b[16][8];
    for (u32 lane = 0; lane < WARP; lane++) {
        const Product& p = *static_cast<Product*>(operands[lane]);
        const u32 g = lane / 4, t = lane % 4;
        for (u32 i = 0; i < 2; i++) {
            a[g][2 * t + i] = half_of(p.a->a[0], i);
            a[g + 8][2 * t + i] = half_of(p.a->a[1], i);
            a[g][2 * t + 8 + i] = half_of(p.a->a[2], i);
            a[g + 8][2 * t + 8 + i] = half_of(p.a->a[3], i);
            b[2 * t + i][g] = half_of(p.b->b[0], i);
            b[2 * t + 8 + i][g] = half_of(p.b->b[1], i);
        }
    }
    for (u32 lane = 0; lane < WARP; lane++) {
        const Product& p = *static_cast<Product*>(operands[lane]);
        const u32 g = lane / 4, t = lane % 4;
        for (u32 i = 0; i < 4; i++) {
            const u32 row = g + i / 2 * 8, col = 2 * t + i % 2;
            float sum = p.c->c[i];
            for (u32 half = 0; half < 2; half++) {
                double part = sum;
                for (u32 k = half * 8; k < half * 8 + 8; k++) part += double(a[row][k]) * double(b[k][col]);
                sum = float(part);
            }
            p.c->c[i] = sum;
        }
    }
    counters().mma++;
}
}  // namespace simt

inline void mma_m16n8k16(FragmentC& c, const FragmentA& a, const FragmentB& b, SIMT_WHERE) {
    simt::Product mine{&c, &a, &b};
    simt::collective("mma", FULL, &mine, {file, line}, simt::multiply_fragments);
}

namespace simt {
struct Rows {
    u8* row;
    u32 slot;
    u32* out;
};

// One phase for every matrix: eight rows of 16 bytes.
inline void count_ldmatrix(void** operands, u32 matrices) {
    Counters& c = counters();
    c.ldmatrix++;
    if (!machine().config->count) return;
    c.shared_accesses++;
    for (u32 i = 0; i < matrices; i++) {
        Access rows[8];
        for (u32 j = 0; j < 8; j++) {
            const Rows& lane = *static_cast<Rows*>(operands[8 * i + j]);
            rows[j] = {{nullptr, 0}, SHARED, 0, j, 16, u64(lane.row - machine().base)};
        }
        const u32 passes = wavefronts(rows, rows + 8);
        c.shared_wavefronts += passes;
        c.bank_conflicts += passes - 1;
    }
}
}  // namespace simt

template <u32 N, bool TRANSPOSE = false, typename T>
inline void ldmatrix(u32 (&out)[N], shared<T> row, SIMT_WHERE) {
    static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
    const simt::Where where{file, line};
    const u32 lane = simt::lane_index();
    if (lane < 8 * N) {
        simt::shared_range(row.raw(), row.slot(), 16, "ldmatrix", where);
        simt::watch(row.raw(), 16, false, where);
    }
    simt::Rows mine{row.raw(), row.slot(), out};
    simt::collective(TRANSPOSE ? "ldmatrix.trans" : "ldmatrix", FULL, &mine, where, [](void** operands) {
        for (u32 i = 0; i < N; i++) {
            u16 matrix[8][8];
            for (u32 j = 0; j < 8; j++) memcpy(matrix[j], static_cast<simt::Rows*>(operands[8 * i + j])->row, 16);
            for (u32 l = 0; l < WARP; l++) {
                const u32 g = l / 4, t = l % 4;
                const u16 low = TRANSPOSE ? matrix[2 * t][g] : matrix[g][2 * t];
                const u16 high = TRANSPOSE ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
                static_cast<simt::Rows*>(operands[l])->out[i] = low | u32(high) << 16;
            }
        }
        simt::count_ldmatrix(operands, N);
    });
}

// The destination is poisoned at once and written when the copy is waited for.
template <u32 BYTES, typename T, typename U>
inline void cp_async(shared<T> to, global<U> from, bool inside = true, SIMT_WHERE) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    const simt::Where where{file, line};
    u8* destination = simt::shared_address(to.raw(), to.slot(), BYTES, true, where);
    const u8* source = inside ? simt::global_address(from.raw(), BYTES, false, where) : nullptr;
    memset(destination, 0xff, BYTES);
    simt::Lane& me = *simt::machine().current;
    me.copies.push_back({destination, source, BYTES, me.group, where});
    simt::counters().cp_async++;
}

inline void cp_async_commit() { simt::machine().current->group++; }

template <u32 PENDING>
inline void cp_async_wait() {
    simt::Lane& me = *simt::machine().current;
    size_t landed = 0;
    // Group `group` is open; the PENDING before it may stay under way. Copies that were never committed are not waited
    // for.
    while (landed < me.copies.size() && me.copies[landed].group + PENDING < me.group) {
        const simt::Copy& copy = me.copies[landed++];
        simt::watch(copy.to, copy.bytes, true, copy.where);
        if (copy.from)
            memcpy(copy.to, copy.from, copy.bytes);
        else
            memset(copy.to, 0, copy.bytes);
    }
    me.copies.erase(me.copies.begin(), me.copies.begin() + landed);
}
