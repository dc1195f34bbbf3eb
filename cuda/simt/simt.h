// The stand-in for a GPU: runs the kernels of kernels/*.cu as host C++, one block after the other.
//
//   thread   a fiber with its own stack; it runs until it has to wait for others, or ends
//   warp     32 fibers; a warp operation is computed when the last lane of its mask has arrived
//   block    1 to 1024 fibers over one shared memory, which is poisoned (all ones: NaN) when the block starts
//   grid     blocks in ascending order, descending order or shuffled, and so are the threads that may run; the same
//            bits have to come out
//
// One fiber's life:
//
//             ┌─────────────── others have arrived ────────────────┐
//             ▼                                                     │
//   ready ─► running ─► waits in a warp operation or at a barrier ──┘
//             └──────► exited
//
// What is a fault here, with file, line, block and thread: an access outside the buffer that the pointer was passed
// for, misaligned, or a write to an input; a warp operation whose lanes disagree on the operation, the place or the
// mask, or whose mask names a lane that has exited; a barrier that not all threads reach, or reach at different places;
// two threads that touch one word of shared memory without a barrier between them, one of them writing; copies still
// under way when a thread exits; a block in which everybody waits.
//
// What it cannot show: the time anything takes; caches; bits that the hardware chooses (the order of sums in mma,
// expf); races in global memory between blocks, except as results that depend on the order of the schedule.
//
// One .cu file is one shared library with a copy of all this; a launch is one call of simt_run and stays on the thread
// that calls it.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include <cmath>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN 1
#endif

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
typedef int32_t i32;
typedef long long i64;

constexpr u32 WARP = 32;
constexpr u32 FULL = 0xffffffffu;

namespace simt {

struct Dim {
    u32 x, y, z;
};

// ── What Rust and this header tell each other; cuda/src/simt.rs has the same in Rust ──

// A buffer that was passed to the launch.
struct Region {
    u64 begin, end;
    u32 writable, padding;
};

struct Config {
    Dim grid;
    u32 threads;
    u32 dynamic_shared;
    u32 order;  // 0 ascending, 1 descending, 2 shuffled by `seed`
    u32 count;  // whether counters beyond the cheap ones are wanted
    u64 seed;
    const Region* regions;
    u32 region_count;
    u32 argument_count;
    void* const* arguments;        // as for cuLaunchKernel
    const i32* argument_regions;   // region of a pointer argument, or -1
};

struct Counters {
    u64 threads, barriers, warp_operations, mma, ldmatrix, cp_async;
    u64 global_loads, global_stores;              // instructions of a warp
    u64 global_load_bytes, global_store_bytes;    // asked for by the lanes
    u64 global_load_sectors, global_store_sectors;  // 32-byte sectors that these instructions touch, each by itself
    u64 unique_load_sectors, unique_store_sectors;  // different sectors over the launch: what has to cross the memory bus
    u64 shared_accesses;                            // instructions of a warp
    u64 shared_wavefronts;                          // passes through the banks that they take
    u64 bank_conflicts;                             // passes beyond those that the size of the access needs
    u64 shared_bytes;                               // static and dynamic shared memory of a block
};

struct Report {
    Counters counters;
    char fault[1000];  // empty: none
};

struct Parameter {
    u32 bytes;
    u32 pointer;  // 0: a value; 1: pointer to const; 2: pointer
};

// ── Fibers ──

#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.local simt_switch
.type simt_switch, @function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simt_switch, .-simt_switch
)");
constexpr size_t FRAME_WORDS = 8;  // six registers, the address, and 8 bytes: as if called, the stack is then off by 8
constexpr size_t RETURN_WORD = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.local simt_switch
.type simt_switch, %function
simt_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size simt_switch, .-simt_switch
)");
constexpr size_t FRAME_WORDS = 20;
constexpr size_t RETURN_WORD = 11;  // x30
#else
#error "simt_switch is written for x86-64 and aarch64"
#endif
extern "C" void simt_switch(void** save, void* load) __attribute__((visibility("hidden")));

#ifdef SIMT_ASAN
constexpr size_t STACK = 256 * 1024;
#else
constexpr size_t STACK = 64 * 1024;
#endif
constexpr u32 MOST_THREADS = 1024;
// Static shared memory of a block, without asking for more (CUDA C++ Programming Guide, "Compute Capabilities").
constexpr u32 MOST_STATIC_SHARED = 48 * 1024;

struct Where {
    const char* file;
    u32 line;
};

struct Fault {};  // thrown by fail(), caught where a fiber begins

// A copy to shared memory that has been issued and has not landed.
struct Copy {
    u8* to;
    const u8* from;  // null: zeros
    u32 bytes, group;
    Where where;
};

struct Access {
    Where where;
    u32 kind, occurrence, lane, bytes;
    u64 address;
};
enum Kind : u32 { LOAD_GLOBAL, STORE_GLOBAL, SHARED };

struct Seen {
    Where where;
    u32 kind, count;
};

struct Lane {
    void* sp = nullptr;
    u8* stack = nullptr;
    Dim index{};
    u32 thread = 0;
    bool exited = false;
    const char* waits = nullptr;
    Where where{};
    u32 group = 0;  // number of the group of copies that is open
    std::vector<Copy> copies;
    std::vector<Seen> seen;
#ifdef SIMT_ASAN
    void* fake_stack = nullptr;
#endif
};

struct Collective {
    const char* name;
    Where where;
    u32 mask, arrived;
    void* operand[WARP];
};

struct Warp {
    u32 exited = 0, epoch = 0;
    std::vector<Collective> waiting;
    std::vector<Access> trace;
};

// Last accesses of a word of shared memory, to find races.
struct Shadow {
    u32 block_epoch_w = 0, warp_epoch_w = 0, block_epoch_r = 0, warp_epoch_r = 0;
    u16 writer = 0, reader = 0;
    bool readers = false, reader_warps = false;  // several lanes, several warps
};

struct Slot {
    u8 *begin, *end;
};

struct Machine {
    const Config* config = nullptr;
    Report* report = nullptr;
    Dim block{};
    Lane lanes[MOST_THREADS];
    Warp warps[MOST_THREADS / WARP];
    Lane* current = nullptr;
    void* scheduler = nullptr;
    std::vector<u32> ready;
    size_t next = 0;
    u32 living = 0, arrived = 0, epoch = 1;
    Where barrier{};
    bool failed = false;
    u64 random = 0;
    std::vector<u8> storage;  // shared memory: dynamic first, then the static slots
    u8* base = nullptr;
    u32 used = 0;
    std::vector<Shadow> shadow;
    std::vector<Slot> slots;
    std::map<const void*, u32> slot_of;
    std::vector<std::vector<u64>> loaded, stored;  // a bit for every sector of every region
    void (*body)(void* const*, const i32*) = nullptr;
#ifdef SIMT_ASAN
    const void* scheduler_bottom = nullptr;
    size_t scheduler_size = 0;
    void* scheduler_fake_stack = nullptr;
#endif
    ~Machine() {
        for (Lane& lane : lanes)
            if (lane.stack) munmap(lane.stack, STACK);
    }
};

// Of this thread; made by launch().
inline thread_local Machine* instance = nullptr;
inline Machine& machine() { return *instance; }

inline Counters& counters() { return machine().report->counters; }

inline const char* base_name(const char* file) {
    const char* slash = file ? strrchr(file, '/') : nullptr;
    return slash ? slash + 1 : file ? file : "?";
}

// Ends the launch; the first fault is kept.
[[noreturn]] __attribute__((format(printf, 2, 3))) inline void fail(Where where, const char* format, ...) {
    Machine& m = machine();
    if (!m.failed) {
        m.failed = true;
        char what[700];
        va_list list;
        va_start(list, format);
        vsnprintf(what, sizeof what, format, list);
        va_end(list);
        const Lane* lane = m.current;
        snprintf(m.report->fault, sizeof m.report->fault, "%s:%u: %s (block %u,%u,%u, thread %u)", base_name(where.file),
                 where.line, what, m.block.x, m.block.y, m.block.z, lane ? lane->thread : 0);
    }
    throw Fault{};
}

inline u64 random_word() {
    u64& x = machine().random;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return x;
}

inline Warp& warp_of(const Lane& lane) { return machine().warps[lane.thread / WARP]; }

// Gives control to the scheduler until somebody makes this fiber ready.
inline void wait_for_others(const char* what, Where where) {
    Machine& m = machine();
    Lane& me = *m.current;
    me.waits = what;
    me.where = where;
#ifdef SIMT_ASAN
    __sanitizer_start_switch_fiber(&me.fake_stack, m.scheduler_bottom, m.scheduler_size);
#endif
    simt_switch(&me.sp, m.scheduler);
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(me.fake_stack, &m.scheduler_bottom, &m.scheduler_size);
#endif
    me.waits = nullptr;
    if (m.failed) throw Fault{};
}

inline void exit_fiber(Lane& me) {
    Machine& m = machine();
    me.exited = true;
#ifdef SIMT_ASAN
    __sanitizer_start_switch_fiber(nullptr, m.scheduler_bottom, m.scheduler_size);
#endif
    simt_switch(&me.sp, m.scheduler);
    abort();  // nobody resumes a fiber that has exited
}

inline void flush(Warp& warp);

inline void leave(Lane& me) {
    Machine& m = machine();
    Warp& warp = warp_of(me);
    if (!me.copies.empty()) fail(me.copies.front().where, "this copy is still under way when the thread exits");
    for (const Collective& c : warp.waiting)
        if (c.mask >> (me.thread % WARP) & 1)
            fail(c.where, "%s waits for lane %u, which exits", c.name, me.thread % WARP);
    if (m.arrived) fail(m.barrier, "thread %u exits, others wait at this barrier", me.thread);
    warp.exited |= 1u << (me.thread % WARP);
    m.living--;
}

inline void fiber() {
    Machine& m = machine();
    Lane& me = *m.current;
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_bottom, &m.scheduler_size);
#endif
    try {
        m.body(m.config->arguments, m.config->argument_regions);
        leave(me);
    } catch (const Fault&) {
    }
    exit_fiber(me);
}

inline void start(Lane& lane) {
    if (!lane.stack) {
        void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stack == MAP_FAILED) {
            perror("stack of a fiber");
            abort();
        }
        lane.stack = static_cast<u8*>(stack);
        mprotect(stack, 4096, PROT_NONE);  // an overflow ends here
    }
#ifdef SIMT_ASAN
    __asan_unpoison_memory_region(lane.stack + 4096, STACK - 4096);  // of the fiber that had it before
    lane.fake_stack = nullptr;
#endif
    void** frame = reinterpret_cast<void**>(lane.stack + STACK - 64) - FRAME_WORDS;
    memset(frame, 0, FRAME_WORDS * sizeof(void*));
    frame[RETURN_WORD] = reinterpret_cast<void*>(&fiber);
    lane.sp = frame;
    lane.exited = false;
    lane.waits = nullptr;
    lane.group = 0;
    lane.copies.clear();
    lane.seen.clear();
}

inline void make_ready(u32 thread) { machine().ready.push_back(thread); }

// ── Warp operations and barriers ──

// Waits for all lanes of `mask` to arrive at the same operation; then the last one computes it over the lanes'
// operands and all go on.
template <typename Compute>
inline void collective(const char* name, u32 mask, void* operand, Where where, Compute compute) {
    Machine& m = machine();
    Lane& me = *m.current;
    Warp& warp = warp_of(me);
    const u32 lane = me.thread % WARP, bit = 1u << lane;
    if (!(mask & bit)) fail(where, "%s: lane %u is not in its own mask %08x", name, lane, mask);
    if (mask & warp.exited) fail(where, "%s: mask %08x names lanes that have exited (%08x)", name, mask, warp.exited);
    size_t at = 0;
    while (at < warp.waiting.size() && !(warp.waiting[at].mask & mask)) at++;
    if (at == warp.waiting.size()) warp.waiting.push_back({name, where, mask, 0, {}});
    Collective& c = warp.waiting[at];
    if (c.mask != mask || strcmp(c.name, name) || c.where.line != where.line || strcmp(c.where.file, where.file))
        fail(where, "lane %u is in %s with mask %08x while lanes %08x wait in %s with mask %08x at %s:%u", lane, name,
             mask, c.arrived, c.name, c.mask, base_name(c.where.file), c.where.line);
    c.arrived |= bit;
    c.operand[lane] = operand;
    if (c.arrived != mask) {
        wait_for_others(name, where);
        return;
    }
    compute(c.operand);
    counters().warp_operations++;
    const u32 first = me.thread - lane;
    warp.waiting.erase(warp.waiting.begin() + at);
    if (mask == FULL) flush(warp);
    const bool down = m.config->order == 1;
    for (u32 i = 0; i < WARP; i++) {
        const u32 other = down ? WARP - 1 - i : i;
        if (other != lane && mask >> other & 1) make_ready(first + other);
    }
}

inline void barrier(Where where) {
    Machine& m = machine();
    if (m.living != m.config->threads)
        fail(where, "__syncthreads, but %u of %u threads have exited", m.config->threads - m.living, m.config->threads);
    if (m.arrived == 0)
        m.barrier = where;
    else if (m.barrier.line != where.line || strcmp(m.barrier.file, where.file))
        fail(where, "__syncthreads, while %u threads wait in the one at %s:%u", m.arrived, base_name(m.barrier.file),
             m.barrier.line);
    if (++m.arrived < m.config->threads) {
        wait_for_others("__syncthreads", where);
        return;
    }
    m.arrived = 0;
    m.epoch++;
    counters().barriers++;
    const u32 threads = m.config->threads, me = m.current->thread;
    for (u32 w = 0; w < threads / WARP; w++) flush(m.warps[w]);
    const bool down = m.config->order == 1;
    for (u32 i = 0; i < threads; i++) {
        const u32 other = down ? threads - 1 - i : i;
        if (other != me) make_ready(other);
    }
}

// ── Counting ──

inline bool operator<(const Access& a, const Access& b) {
    if (a.where.line != b.where.line) return a.where.line < b.where.line;
    if (a.where.file != b.where.file) return a.where.file < b.where.file;
    if (a.kind != b.kind) return a.kind < b.kind;
    if (a.occurrence != b.occurrence) return a.occurrence < b.occurrence;
    return a.lane < b.lane;
}

inline bool same_instruction(const Access& a, const Access& b) {
    return a.where.line == b.where.line && a.where.file == b.where.file && a.kind == b.kind && a.occurrence == b.occurrence;
}

// The n-th access of a lane through one line of source belongs to the n-th of the other lanes: one instruction.
inline void trace(Kind kind, u64 address, u32 bytes, Where where) {
    Machine& m = machine();
    if (!m.config->count) return;
    Lane& me = *m.current;
    u32 occurrence = 0;
    bool found = false;
    for (Seen& s : me.seen)
        if (s.where.line == where.line && s.where.file == where.file && s.kind == kind) {
            occurrence = ++s.count;
            found = true;
            break;
        }
    if (!found) me.seen.push_back({where, kind, 0});
    warp_of(me).trace.push_back({where, kind, occurrence, me.thread % WARP, bytes, address});
}

// Passes through the 32 banks of 4 bytes: different words of one bank take one each.
inline u32 wavefronts(const Access* first, const Access* last) {
    std::vector<u64> words[32];
    u32 most = 0;
    for (const Access* a = first; a != last; a++)
        for (u64 word = a->address / 4; word <= (a->address + a->bytes - 1) / 4; word++) {
            auto& bank = words[word % 32];
            if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
            most = std::max<u32>(most, u32(bank.size()));
        }
    return most;
}

inline void count_shared(const Access* first, const Access* last) {
    Counters& c = counters();
    c.shared_accesses++;
    // 8 bytes a lane go in two halves of the warp, 16 in four quarters.
    const u32 lanes = first->bytes <= 4 ? 32 : first->bytes == 8 ? 16 : 8;
    while (first != last) {
        const Access* end = first;
        while (end != last && end->lane / lanes == first->lane / lanes) end++;
        const u32 passes = wavefronts(first, end);
        c.shared_wavefronts += passes;
        c.bank_conflicts += passes - 1;
        first = end;
    }
}

inline void count_global(const Access* first, const Access* last) {
    std::vector<u64> sectors;
    u64 bytes = 0;
    for (const Access* a = first; a != last; a++) {
        bytes += a->bytes;
        for (u64 sector = a->address / 32; sector <= (a->address + a->bytes - 1) / 32; sector++) sectors.push_back(sector);
    }
    std::sort(sectors.begin(), sectors.end());
    const u64 unique = std::unique(sectors.begin(), sectors.end()) - sectors.begin();
    Counters& c = counters();
    if (first->kind == LOAD_GLOBAL) {
        c.global_loads++, c.global_load_bytes += bytes, c.global_load_sectors += unique;
    } else {
        c.global_stores++, c.global_store_bytes += bytes, c.global_store_sectors += unique;
    }
}

inline void flush(Warp& warp) {
    if (warp.trace.empty()) return;
    std::sort(warp.trace.begin(), warp.trace.end());
    const Access *first = warp.trace.data(), *end = first + warp.trace.size();
    while (first != end) {
        const Access* last = first;
        while (last != end && same_instruction(*first, *last)) last++;
        first->kind == SHARED ? count_shared(first, last) : count_global(first, last);
        first = last;
    }
    warp.trace.clear();
    Machine& m = machine();
    const size_t index = &warp - m.warps;
    for (u32 i = 0; i < WARP; i++) m.lanes[index * WARP + i].seen.clear();
}

// ── Memory ──

constexpr u32 TAG_SHIFT = 48;  // user addresses have 47 or 48 bits
constexpr u64 ADDRESS = (u64(1) << TAG_SHIFT) - 1;

// The host address behind a pointer into global memory, after all checks.
inline u8* global_address(u64 word, u32 bytes, bool write, Where where) {
    Machine& m = machine();
    const u64 address = word & ADDRESS, tag = word >> TAG_SHIFT;
    const Region* region = nullptr;
    if (tag) {
        region = m.config->regions + (tag - 1);
    } else {  // a pointer that came inside a structure: any buffer of the launch will do
        for (u32 i = 0; i < m.config->region_count && !region; i++) {
            const Region& r = m.config->regions[i];
            if (address >= r.begin && address < r.end && (r.writable || !write)) region = &r;
        }
        if (!region) fail(where, "%s of %u bytes at %#llx, which is in no buffer of this launch", write ? "write" : "read", bytes, address);
    }
    const char* what = write ? "write" : "read";
    if (address < region->begin || address + bytes > region->end)
        fail(where, "%s of %u bytes at offset %lld of a buffer of %llu bytes", what, bytes,
             (long long)(address - region->begin), region->end - region->begin);
    if (address % bytes) fail(where, "%s of %u bytes at address %#llx, which is not aligned to that", what, bytes, address);
    if (write && !region->writable) fail(where, "write to an input");
    if (m.config->count) {
        auto& bits = (write ? m.stored : m.loaded)[region - m.config->regions];
        const u64 first = region->begin / 32;
        for (u64 s = address / 32; s <= (address + bytes - 1) / 32; s++) bits[(s - first) / 64] |= u64(1) << (s - first) % 64;
        trace(write ? STORE_GLOBAL : LOAD_GLOBAL, address, bytes, where);
    }
    return reinterpret_cast<u8*>(address);
}

inline void race(Where where, const char* what, u32 other, const char* did) {
    fail(where, "race: %s a word of shared memory that thread %u %s, without a barrier between them", what, other, did);
}

// Notes an access of the running thread to shared memory; whether another one's is in the way.
inline void watch(const u8* p, u32 bytes, bool write, Where where) {
    Machine& m = machine();
    const u32 thread = m.current->thread, warp_epoch = m.warps[thread / WARP].epoch;
    const size_t first = (p - m.base) / 4, last = (p - m.base + bytes - 1) / 4;
    // Halves of a word that two threads write are no race.
    if (bytes < 4) return;
    for (size_t i = first; i <= last; i++) {
        Shadow& s = m.shadow[i];
        if (s.block_epoch_w == m.epoch && s.writer != thread &&
            (s.writer / WARP != thread / WARP || s.warp_epoch_w == warp_epoch))
            race(where, write ? "writes" : "reads", s.writer, "has written");
        if (write) {
            const bool other = s.reader != thread || s.readers;
            if (s.block_epoch_r == m.epoch && other &&
                (s.reader_warps || s.reader / WARP != thread / WARP || s.warp_epoch_r == warp_epoch))
                race(where, "writes", s.reader, "has read");
            s.writer = u16(thread), s.block_epoch_w = m.epoch, s.warp_epoch_w = warp_epoch;
        } else if (s.block_epoch_r != m.epoch) {
            s.reader = u16(thread), s.readers = s.reader_warps = false;
            s.block_epoch_r = m.epoch, s.warp_epoch_r = warp_epoch;
        } else {
            s.readers |= s.reader != thread;
            s.reader_warps |= s.reader / WARP != thread / WARP;
            s.warp_epoch_r = std::max(s.warp_epoch_r, warp_epoch);
            if (s.reader / WARP == thread / WARP) s.reader = u16(thread);
        }
    }
}

inline u8* shared_range(u8* p, u32 slot, u32 bytes, const char* what, Where where) {
    Machine& m = machine();
    const Slot& s = m.slots[slot];
    if (p < s.begin || p + bytes > s.end)
        fail(where, "%s of %u bytes at offset %lld of a shared array of %lld bytes", what, bytes, (long long)(p - s.begin),
             (long long)(s.end - s.begin));
    if ((p - m.base) % bytes) fail(where, "%s of %u bytes in shared memory, not aligned to that", what, bytes);
    return p;
}

inline u8* shared_address(u8* p, u32 slot, u32 bytes, bool write, Where where) {
    shared_range(p, slot, bytes, write ? "write" : "read", where);
    watch(p, bytes, write, where);
    trace(SHARED, p - machine().base, bytes, where);
    return p;
}

// ── Launch ──

typedef void (*Body)(void* const*, const i32*);

struct Entry {
    const Parameter* parameters;
    u32 count;
    Body body;
};

inline void begin_block(Machine& m) {
    const u32 threads = m.config->threads;
    memset(m.base, 0xff, m.storage.size() - 128);
    m.ready.clear();
    m.next = 0;
    m.living = threads;
    m.arrived = 0;
    m.epoch++;
    for (u32 w = 0; w < threads / WARP; w++) {
        m.warps[w].exited = 0;
        m.warps[w].waiting.clear();
        m.warps[w].trace.clear();
    }
    for (u32 i = 0; i < threads; i++) {
        const u32 thread = m.config->order == 1 ? threads - 1 - i : i;
        m.lanes[thread].thread = thread;
        m.lanes[thread].index = {thread, 0, 0};
        start(m.lanes[thread]);
        make_ready(thread);
    }
}

inline void resume(Machine& m, Lane& lane) {
    m.current = &lane;
#ifdef SIMT_ASAN
    __sanitizer_start_switch_fiber(&m.scheduler_fake_stack, lane.stack, STACK);
#endif
    simt_switch(&m.scheduler, lane.sp);
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(m.scheduler_fake_stack, nullptr, nullptr);
#endif
    m.current = nullptr;
}

inline void run_block(Machine& m) {
    begin_block(m);
    while (m.next < m.ready.size() && !m.failed) {
        if (m.config->order == 2) std::swap(m.ready[m.next], m.ready[m.next + random_word() % (m.ready.size() - m.next)]);
        const u32 thread = m.ready[m.next++];
        if (m.next > 4096) {
            m.ready.erase(m.ready.begin(), m.ready.begin() + m.next);
            m.next = 0;
        }
        resume(m, m.lanes[thread]);
    }
    if (m.failed) return;
    if (m.living) {
        for (u32 i = 0; i < m.config->threads; i++) {
            Lane& lane = m.lanes[i];
            if (lane.exited) continue;
            try {
                m.current = &lane;
                fail(lane.where, "waits in %s for ever: the others wait elsewhere or have exited", lane.waits);
            } catch (const Fault&) {
            }
            m.current = nullptr;
            return;
        }
    }
    for (u32 w = 0; w < m.config->threads / WARP; w++) flush(m.warps[w]);
    m.report->counters.threads += m.config->threads;
}

inline u64 bits_set(const std::vector<std::vector<u64>>& maps) {
    u64 sum = 0;
    for (const auto& map : maps)
        for (u64 word : map) sum += __builtin_popcountll(word);
    return sum;
}

inline void launch(const Entry& entry, const Config& config, Report& report) {
    static thread_local std::unique_ptr<Machine> owner;
    if (!owner) owner.reset(new Machine);
    instance = owner.get();
    Machine& m = *instance;
    m.config = &config;
    m.report = &report;
    m.failed = false;
    m.body = entry.body;
    m.random = config.seed * 2 + 1;
    m.storage.assign(config.dynamic_shared + MOST_STATIC_SHARED + 256, 0);
    m.base = m.storage.data() + (128 - reinterpret_cast<uintptr_t>(m.storage.data()) % 128) % 128;
    m.shadow.assign(m.storage.size() / 4 + 1, Shadow{});
    m.slots.assign(1, Slot{m.base, m.base + config.dynamic_shared});
    m.slot_of.clear();
    m.used = (config.dynamic_shared + 127) / 128 * 128;
    m.loaded.clear(), m.stored.clear();
    for (u32 i = 0; config.count && i < config.region_count; i++) {
        const Region& r = config.regions[i];
        const u64 sectors = r.end / 32 - r.begin / 32 + 1;
        m.loaded.emplace_back(sectors / 64 + 1, 0);
        m.stored.emplace_back(sectors / 64 + 1, 0);
    }
    const u64 blocks = u64(config.grid.x) * config.grid.y * config.grid.z;
    std::vector<u64> order(blocks);
    for (u64 i = 0; i < blocks; i++) order[i] = config.order == 1 ? blocks - 1 - i : i;
    for (u64 i = 0; config.order == 2 && i + 1 < blocks; i++) std::swap(order[i], order[i + random_word() % (blocks - i)]);
    for (u64 b : order) {
        m.block = {u32(b % config.grid.x), u32(b / config.grid.x % config.grid.y), u32(b / config.grid.x / config.grid.y)};
        run_block(m);
        if (m.failed) break;
    }
    report.counters.shared_bytes = m.used;
    report.counters.unique_load_sectors = bits_set(m.loaded);
    report.counters.unique_store_sectors = bits_set(m.stored);
    m.config = nullptr;
    m.report = nullptr;
}

}  // namespace simt

// Runs an entry; 0, or 1 with the fault in the report.
extern "C" __attribute__((visibility("default"))) int simt_run_entry(const simt::Entry* entry, const simt::Config* config,
                                                                    simt::Report* report) {
    simt::launch(*entry, *config, *report);
    return report->fault[0] != 0;
}
