// A libcuda.so.1 for machines without a GPU: the functions of the driver that cuda/src/driver.rs calls, over the kernels
// that simt.h runs. A program that loads it goes the way it goes on a Jetson, through cudarc and the driver's launcher, and
// gets the bits of the stand-in.
//
//   program ─► cudarc ─► cuLaunchKernel ─► queue ──synchronize, copy, free──► simt_run_entry in kernels/*.so
//                                            └─ a fault: the context is lost, that call and every later one says so
//
// Memory is the host's, poisoned when it is taken; allocations are known, so a kernel that leaves them, reads what was
// freed or writes to `const` memory faults (700; the text goes to standard error). Kernels, copies on the device and
// memsets wait in the queue until somebody looks, as on a stream; parameters are copied at the launch.
//
// What is real in a cubin: its ELF header, its architecture and the names of its `.text.` sections. Its code is not
// looked at: a kernel is the entry of that name in `kernels/*.so` beside this library.
//
// The environment, for tests:
//
//   FINETUNED_LIBCUDA_DEVICE  sm=87,multiprocessors=16,memory=68719476736,integrated=1,driver=12020,devices=1,depth=1024
//                             Any of these may be left out. `depth` is the length of the queue; with 0 a kernel has
//                             ended when its launch returns, and the next call says how.
//   FINETUNED_LIBCUDA_FAIL    CODE@[FUNCTION:]N,...  the N-th call (of that function, without its _v2) returns CODE.
//                             CODE~FUNCTION:N        it succeeds, and what it has put in the queue fails with CODE.
//   FINETUNED_LIBCUDA_ONCE    a file: the first injected failure makes it, and where it is none happens, so that the next
//                             process goes well
//   FINETUNED_LIBCUDA_LOG     a file that gets a line for every call: its number, its name, the kernel or the bytes, CODE
//
// Codes that lose the context (`is_sticky`) are returned by every later call; others once.
#include <simt.h>

#include <chrono>
#include <cstdarg>
#include <deque>
#include <dirent.h>
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <functional>
#include <mutex>
#include <string>
#include <unistd.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// ── Codes of the driver API (CUresult) ──

enum Code : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    INVALID_HANDLE = 400,
    NOT_READY = 600,
    NOT_FOUND = 500,
    ILLEGAL_ADDRESS = 700,
    MISALIGNED_ADDRESS = 716,
    LAUNCH_FAILED = 719,
};

struct Name {
    int code;
    const char* name;
};
constexpr Name NAMES[] = {
    {0, "CUDA_SUCCESS"},
    {1, "CUDA_ERROR_INVALID_VALUE"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY"},
    {3, "CUDA_ERROR_NOT_INITIALIZED"},
    {4, "CUDA_ERROR_DEINITIALIZED"},
    {100, "CUDA_ERROR_NO_DEVICE"},
    {101, "CUDA_ERROR_INVALID_DEVICE"},
    {200, "CUDA_ERROR_INVALID_IMAGE"},
    {201, "CUDA_ERROR_INVALID_CONTEXT"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE"},
    {218, "CUDA_ERROR_INVALID_PTX"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"},
    {304, "CUDA_ERROR_OPERATING_SYSTEM"},
    {400, "CUDA_ERROR_INVALID_HANDLE"},
    {500, "CUDA_ERROR_NOT_FOUND"},
    {600, "CUDA_ERROR_NOT_READY"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"},
    {702, "CUDA_ERROR_LAUNCH_TIMEOUT"},
    {709, "CUDA_ERROR_CONTEXT_IS_DESTROYED"},
    {710, "CUDA_ERROR_ASSERT"},
    {714, "CUDA_ERROR_HARDWARE_STACK_ERROR"},
    {715, "CUDA_ERROR_ILLEGAL_INSTRUCTION"},
    {716, "CUDA_ERROR_MISALIGNED_ADDRESS"},
    {717, "CUDA_ERROR_INVALID_ADDRESS_SPACE"},
    {718, "CUDA_ERROR_INVALID_PC"},
    {719, "CUDA_ERROR_LAUNCH_FAILED"},
    {999, "CUDA_ERROR_UNKNOWN"},
};

// Codes whose documentation says that the process has to end to go on.
bool is_sticky(int code) {
    return code == 700 || code == 702 || code == 709 || code == 710 || (code >= 714 && code <= 719);
}

// ── State ──

struct Device {
    u64 devices = 1, driver = 12020, sm = 87, multiprocessors = 16, clock_khz = 1300500;
    u64 shared_per_block = 163 * 1024, shared_per_multiprocessor = 164 * 1024, l2 = 4 << 20;
    u64 integrated = 1, memory = u64(64) << 30, depth = 1024;
};

// A failure that was asked for.
struct Injected {
    int code;
    bool later;
    std::string function;  // empty: any
    u64 number;
    u64 seen = 0;
};

typedef int (*Run)(const simt::Entry*, const simt::Config*, simt::Report*);

struct Function {
    std::string name;
    const simt::Entry* entry;
    Run run;
    u32 most_dynamic_shared = simt::MOST_STATIC_SHARED;
};

struct Module {
    std::vector<std::string> kernels;
    std::vector<std::unique_ptr<Function>> functions;
};

// A moment, once the queue has come to it.
struct Event {
    bool reached = false;
    std::chrono::steady_clock::time_point at;
};

struct State {
    std::mutex mutex;
    Device device;
    std::vector<Injected> injected;
    std::string once;
    int log = -1;
    bool read = false, initialized = false;
    u64 calls = 0, allocated = 0;
    int failed = SUCCESS;  // to be returned by the next call, or by all
    int retained = 0;
    std::map<u64, u64> allocations;  // begin, bytes
    std::map<void*, std::unique_ptr<Module>> modules;
    std::map<void*, std::unique_ptr<int>> streams;
    std::map<void*, std::shared_ptr<Event>> events;
    std::vector<void*> libraries;
    std::deque<std::function<int()>> queue;
};

// Never destroyed: other threads may call while the process exits.
State& state() {
    static State* only = new State;
    return *only;
}

char context;  // there is one, and this is its address
thread_local void* current = nullptr;

void complain(const char* format, ...) __attribute__((format(printf, 1, 2)));
void complain(const char* format, ...) {
    char text[1400];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    fprintf(stderr, "stand-in libcuda: %s\n", text);
}

// ── The environment ──

[[noreturn]] void refuse(const char* variable, const char* what) {
    complain("%s: cannot read `%s`", variable, what);
    _exit(121);  // a test that asks for something else than it means must not pass
}

void read_device(Device& device, const char* text) {
    struct Key {
        const char* name;
        u64* value;
    };
    const Key keys[] = {
        {"devices", &device.devices},
        {"driver", &device.driver},
        {"sm", &device.sm},
        {"multiprocessors", &device.multiprocessors},
        {"integrated", &device.integrated},
        {"memory", &device.memory},
        {"depth", &device.depth},
    };
    std::string rest(text);
    while (!rest.empty()) {
        const size_t comma = rest.find(',');
        const std::string item = rest.substr(0, comma);
        rest = comma == std::string::npos ? "" : rest.substr(comma + 1);
        const size_t equals = item.find('=');
        bool known = false;
        for (const Key& key : keys)
            if (equals != std::string::npos && item.substr(0, equals) == key.name) {
                char* end = nullptr;
                *key.value = strtoull(item.c_str() + equals + 1, &end, 10);
                known = *end == 0 && end != item.c_str() + equals + 1;
            }
        if (!known) refuse("FINETUNED_LIBCUDA_DEVICE", item.c_str());
    }
}

void read_failures(std::vector<Injected>& injected, const char* text) {
    std::string rest(text);
    while (!rest.empty()) {
        const size_t comma = rest.find(',');
        const std::string item = rest.substr(0, comma);
        rest = comma == std::string::npos ? "" : rest.substr(comma + 1);
        const size_t at = item.find_first_of("@~"), colon = item.find(':');
        if (at == std::string::npos) refuse("FINETUNED_LIBCUDA_FAIL", item.c_str());
        const bool later = item[at] == '~', named = colon != std::string::npos;
        const std::string function = named ? item.substr(at + 1, colon - at - 1) : "";
        const int code = atoi(item.c_str());
        const u64 number = strtoull(item.c_str() + (named ? colon : at) + 1, nullptr, 10);
        bool known = false;
        for (const Name& name : NAMES) known |= name.code == code;
        // cudarc takes a code for a value of an enumeration: one that it does not know must not reach it.
        bool queued = false;
        for (const char* name : {"cuLaunchKernel", "cuMemcpyDtoDAsync", "cuMemsetD8Async"}) queued |= function == name;
        if (!known || code == SUCCESS || number == 0 || (later && !queued)) refuse("FINETUNED_LIBCUDA_FAIL", item.c_str());
        injected.push_back({code, later, function, number});
    }
}

void read_environment(State& s) {
    s.read = true;
    if (const char* text = getenv("FINETUNED_LIBCUDA_DEVICE")) read_device(s.device, text);
    if (const char* text = getenv("FINETUNED_LIBCUDA_FAIL")) read_failures(s.injected, text);
    if (const char* text = getenv("FINETUNED_LIBCUDA_ONCE")) s.once = text;
    if (const char* text = getenv("FINETUNED_LIBCUDA_LOG")) s.log = open(text, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
}

// Whether a failure may happen, and that one has.
bool may_fail(State& s) {
    if (s.once.empty()) return true;
    const int file = open(s.once.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (file < 0) return false;
    close(file);
    s.once.clear();  // the rest of this process's
    return true;
}

// ── Calls ──

// From the beginning of a function to its end: the lock, the count, and what failed before it.
struct Call {
    State& s;
    std::lock_guard<std::mutex> alone;
    const char* name;
    int code = SUCCESS;    // not 0: the function has to return it
    int of_work = SUCCESS;  // what the work that is put in the queue shall fail with
    char detail[200] = "";

    Call(const char* name, bool with_context) : s(state()), alone(s.mutex), name(name) {
        if (!s.read) read_environment(s);
        s.calls++;
        const std::string full(name);
        const std::string plain = full.size() > 3 && full.compare(full.size() - 3, 3, "_v2") == 0 ? full.substr(0, full.size() - 3) : full;
        // Counted even when the call fails for another reason.
        int at_once = SUCCESS;
        for (Injected& i : s.injected) {
            if (!(i.function.empty() || i.function == plain) || ++i.seen != i.number) continue;
            if (s.failed || !may_fail(s)) continue;
            (i.later ? of_work : at_once) = i.code;
        }
        if (s.failed) {
            code = s.failed;
            if (!is_sticky(code)) s.failed = SUCCESS;
        } else if (at_once) {
            code = at_once;
            if (is_sticky(code)) lose(code);
        } else if (!s.initialized && strcmp(name, "cuInit") != 0) {
            code = NOT_INITIALIZED;
        } else if (with_context && !current) {
            code = INVALID_CONTEXT;
        }
    }

    ~Call() {
        if (s.log < 0) return;
        char line[400];
        const int length = snprintf(line, sizeof line, "%llu %s%s%s %d\n", s.calls, name, *detail ? " " : "", detail, code);
        if (write(s.log, line, size_t(length)) != length) complain("the log cannot be written");
    }

    void lose(int with) {
        s.failed = with;
        s.queue.clear();
    }

    int end(int with = SUCCESS) { return code = with; }

    // Everything in the queue, in order; the code of the first that fails.
    int drain() {
        while (!s.queue.empty()) {
            const std::function<int()> work = std::move(s.queue.front());
            s.queue.pop_front();
            const int code = work();
            if (code) {
                if (is_sticky(code)) lose(code);
                return code;
            }
        }
        return SUCCESS;
    }

    void enqueue(std::function<int()> work) {
        const int failure = of_work;
        s.queue.push_back(failure ? std::function<int()>([failure] { return failure; }) : std::move(work));
        // A full queue makes the caller wait; what fails meanwhile is said by the next call.
        if (s.queue.size() > s.device.depth) s.failed = drain();
    }
};

// Whether a function needs a current context.
constexpr bool ANYWHERE = false, IN_CONTEXT = true;

#define BEGIN(where)                 \
    Call call(__func__, where);      \
    if (call.code) return call.code; \
    State& s = call.s;               \
    (void)s

// The allocation that holds an address.
std::map<u64, u64>::const_iterator holding(const State& s, u64 address) {
    auto next = s.allocations.upper_bound(address);
    if (next == s.allocations.begin()) return s.allocations.end();
    --next;
    return address < next->first + next->second ? next : s.allocations.end();
}

bool inside(const State& s, u64 address, size_t bytes) {
    const auto found = holding(s, address);
    return found != s.allocations.end() && bytes <= found->first + found->second - address;
}

// ── Cubins and kernels ──

// The names of the kernels in a cubin; a code when the driver would refuse it.
int read_cubin(const Device& device, const u8* image, std::vector<std::string>& kernels) {
    constexpr u16 CUDA = 190;
    constexpr u8 BEFORE_CUDA_13 = 7;  // ABI version; the next one has the architecture elsewhere
    Elf64_Ehdr header;
    memcpy(&header, image, sizeof header);
    if (memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_machine != CUDA)
        return INVALID_IMAGE;
    const u32 sm = header.e_flags & 0xff;
    // Code runs on its own major version, and on minor versions from its own on.
    if (header.e_ident[EI_ABIVERSION] == BEFORE_CUDA_13 && (sm / 10 != device.sm / 10 || sm > device.sm)) return NO_BINARY_FOR_GPU;
    std::vector<Elf64_Shdr> sections(header.e_shnum);
    for (u32 i = 0; i < header.e_shnum; i++)
        memcpy(&sections[i], image + header.e_shoff + i * header.e_shentsize, sizeof(Elf64_Shdr));
    const char* names = reinterpret_cast<const char*>(image) + sections[header.e_shstrndx].sh_offset;
    constexpr char CODE[] = ".text.";
    for (const Elf64_Shdr& section : sections)
        if (strncmp(names + section.sh_name, CODE, strlen(CODE)) == 0) kernels.push_back(names + section.sh_name + strlen(CODE));
    return SUCCESS;
}

// The libraries of the kernels, from the directory beside this library.
void open_libraries(State& s) {
    if (!s.libraries.empty()) return;
    Dl_info own;
    if (!dladdr(reinterpret_cast<void*>(&state), &own)) return;
    std::string directory(own.dli_fname);
    directory = directory.substr(0, directory.rfind('/') + 1) + "kernels";
    DIR* listing = opendir(directory.c_str());
    if (!listing) return complain("there is no %s", directory.c_str());
    std::vector<std::string> names;
    while (const dirent* entry = readdir(listing)) {
        const std::string name(entry->d_name);
        if (name.size() > 3 && name.compare(name.size() - 3, 3, ".so") == 0) names.push_back(directory + "/" + name);
    }
    closedir(listing);
    for (const std::string& name : names) {
        void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (library)
            s.libraries.push_back(library);
        else
            complain("%s", dlerror());
    }
}

std::unique_ptr<Function> find_kernel(State& s, const char* name) {
    open_libraries(s);
    for (void* library : s.libraries) {
        const void* entry = dlsym(library, (std::string("simt_entry_") + name).c_str());
        void* run = dlsym(library, "simt_run_entry");
        if (entry && run)
            return std::unique_ptr<Function>(new Function{name, static_cast<const simt::Entry*>(entry), reinterpret_cast<Run>(run)});
    }
    return nullptr;
}

// ── A launch ──

struct Launch {
    const Function* function;
    simt::Dim grid;
    u32 threads, shared;
    std::vector<std::vector<u8>> arguments;
};

int code_of(const char* fault) {
    if (strstr(fault, "not aligned")) return MISALIGNED_ADDRESS;
    const char* of_memory[] = {"of a buffer of", "in no buffer", "write to an input"};
    for (const char* text : of_memory)
        if (strstr(fault, text)) return ILLEGAL_ADDRESS;
    return LAUNCH_FAILED;
}

int run(const State& s, const Launch& launch) {
    const simt::Entry& entry = *launch.function->entry;
    std::vector<simt::Region> regions;
    const auto add = [&](u64 address, bool writable) {
        const auto found = holding(s, address);
        if (found == s.allocations.end()) return -1;
        regions.push_back({found->first, found->first + found->second, writable, 0});
        return int(regions.size()) - 1;
    };
    std::vector<void*> arguments;
    std::vector<i32> argument_regions;
    for (u32 i = 0; i < entry.count; i++) {
        const std::vector<u8>& bytes = launch.arguments[i];
        arguments.push_back(const_cast<u8*>(bytes.data()));
        argument_regions.push_back(-1);
        // A word of a structure that is an address inside an allocation may be meant as one.
        for (size_t at = 0; at + 8 <= bytes.size(); at += 8) {
            u64 word;
            memcpy(&word, bytes.data() + at, 8);
            const i32 region = add(word, entry.parameters[i].pointer != 1);
            if (entry.parameters[i].pointer) argument_regions.back() = region;
        }
    }
    simt::Config config{};
    config.grid = launch.grid;
    config.threads = launch.threads;
    config.dynamic_shared = launch.shared;
    config.regions = regions.data();
    config.region_count = u32(regions.size());
    config.argument_count = entry.count;
    config.arguments = arguments.data();
    config.argument_regions = argument_regions.data();
    std::unique_ptr<simt::Report> report(new simt::Report{});
    if (launch.function->run(&entry, &config, report.get()) == 0) return SUCCESS;
    const int code = code_of(report->fault);
    complain("%s<<<%ux%ux%u, %u, %u>>>: %s (%d)", launch.function->name.c_str(), launch.grid.x, launch.grid.y, launch.grid.z,
             launch.threads, launch.shared, report->fault, code);
    return code;
}

}  // namespace

// ── The driver API ──

EXPORT int cuGetErrorName(int code, const char** text) {
    for (const Name& name : NAMES)
        if (name.code == code) {
            *text = name.name;
            return SUCCESS;
        }
    *text = nullptr;
    return INVALID_VALUE;
}

EXPORT int cuGetErrorString(int code, const char** text) { return cuGetErrorName(code, text); }

EXPORT int cuDriverGetVersion(int* version) {
    State& s = state();
    std::lock_guard<std::mutex> alone(s.mutex);
    if (!s.read) read_environment(s);
    *version = int(s.device.driver);
    return SUCCESS;
}

EXPORT int cuInit(unsigned) {
    BEGIN(ANYWHERE);
    if (s.device.devices == 0) return call.end(NO_DEVICE);
    s.initialized = true;
    return call.end();
}

EXPORT int cuDeviceGetCount(int* count) {
    BEGIN(ANYWHERE);
    *count = int(s.device.devices);
    return call.end();
}

EXPORT int cuDeviceGet(int* device, int index) {
    BEGIN(ANYWHERE);
    if (index < 0 || u64(index) >= s.device.devices) return call.end(INVALID_DEVICE);
    *device = index;
    return call.end();
}

EXPORT int cuDeviceGetName(char* text, int length, int) {
    BEGIN(ANYWHERE);
    snprintf(text, size_t(length), "stand-in of sm_%llu", s.device.sm);
    return call.end();
}

EXPORT int cuDeviceTotalMem_v2(size_t* bytes, int) {
    BEGIN(ANYWHERE);
    *bytes = s.device.memory;
    return call.end();
}

EXPORT int cuDeviceGetAttribute(int* value, int attribute, int) {
    BEGIN(ANYWHERE);
    const Device& d = s.device;
    switch (attribute) {  // numbers of CUdevice_attribute
        case 13: *value = int(d.clock_khz); break;
        case 16: *value = int(d.multiprocessors); break;
        case 18: *value = int(d.integrated); break;
        // An AGX Orin's memory: 3,200 MHz, 256 bits.
        case 36: *value = 3200000; break;
        case 37: *value = 256; break;
        case 38: *value = int(d.l2); break;
        case 75: *value = int(d.sm / 10); break;
        case 76: *value = int(d.sm % 10); break;
        case 81: *value = int(d.shared_per_multiprocessor); break;
        case 97: *value = int(d.shared_per_block); break;
        default: complain("attribute %d is not known here", attribute); return call.end(INVALID_VALUE);
    }
    return call.end();
}

EXPORT int cuDevicePrimaryCtxRetain(void** handle, int) {
    BEGIN(ANYWHERE);
    s.retained++;
    *handle = &context;
    return call.end();
}

EXPORT int cuDevicePrimaryCtxSetFlags_v2(int, unsigned) {
    BEGIN(ANYWHERE);
    return call.end();
}

EXPORT int cuDevicePrimaryCtxRelease_v2(int) {
    BEGIN(ANYWHERE);
    if (s.retained == 0) return call.end(INVALID_CONTEXT);
    snprintf(call.detail, sizeof call.detail, "allocations=%zu modules=%zu streams=%zu", s.allocations.size(), s.modules.size(),
             s.streams.size());
    if (--s.retained == 0) {
        call.drain();
        for (const auto& allocation : s.allocations) free(reinterpret_cast<void*>(allocation.first));
        s.allocations.clear();
        s.allocated = 0;
        s.modules.clear();
        s.streams.clear();
    }
    return call.end();
}

EXPORT int cuCtxSetCurrent(void* handle) {
    BEGIN(ANYWHERE);
    if (handle && (handle != &context || s.retained == 0)) return call.end(INVALID_CONTEXT);
    current = handle;
    return call.end();
}

EXPORT int cuCtxSynchronize() {
    BEGIN(IN_CONTEXT);
    return call.end(call.drain());
}

EXPORT int cuStreamCreate(void** stream, unsigned) {
    BEGIN(IN_CONTEXT);
    std::unique_ptr<int> made(new int);
    *stream = made.get();
    s.streams[*stream] = std::move(made);
    return call.end();
}

EXPORT int cuStreamSynchronize(void* stream) {
    BEGIN(IN_CONTEXT);
    if (!s.streams.count(stream)) return call.end(INVALID_HANDLE);
    return call.end(call.drain());
}

EXPORT int cuStreamDestroy_v2(void* stream) {
    BEGIN(IN_CONTEXT);
    const int code = call.drain();
    return call.end(s.streams.erase(stream) ? code : int(INVALID_HANDLE));
}

EXPORT int cuEventCreate(void** event, unsigned) {
    BEGIN(IN_CONTEXT);
    std::shared_ptr<Event> made = std::make_shared<Event>();
    *event = made.get();
    s.events[*event] = made;
    return call.end();
}

EXPORT int cuEventRecord(void* event, void* stream) {
    BEGIN(IN_CONTEXT);
    const auto found = s.events.find(event);
    if (found == s.events.end() || !s.streams.count(stream)) return call.end(INVALID_HANDLE);
    const std::shared_ptr<Event> recorded = found->second;
    recorded->reached = false;
    call.enqueue([recorded] {
        recorded->at = std::chrono::steady_clock::now();
        recorded->reached = true;
        return int(SUCCESS);
    });
    return call.end();
}

EXPORT int cuEventSynchronize(void* event) {
    BEGIN(IN_CONTEXT);
    if (!s.events.count(event)) return call.end(INVALID_HANDLE);
    return call.end(call.drain());
}

// The host's time between two places in the queue, which is no speed of anything.
EXPORT int cuEventElapsedTime(float* milliseconds, void* from, void* to) {
    BEGIN(IN_CONTEXT);
    const auto a = s.events.find(from), b = s.events.find(to);
    if (a == s.events.end() || b == s.events.end()) return call.end(INVALID_HANDLE);
    if (!a->second->reached || !b->second->reached) return call.end(NOT_READY);
    *milliseconds = std::chrono::duration<float, std::milli>(b->second->at - a->second->at).count();
    return call.end();
}

EXPORT int cuEventDestroy_v2(void* event) {
    BEGIN(IN_CONTEXT);
    return call.end(s.events.erase(event) ? int(SUCCESS) : int(INVALID_HANDLE));
}

EXPORT int cuModuleLoadData(void** handle, const void* image) {
    BEGIN(IN_CONTEXT);
    std::unique_ptr<Module> module(new Module);
    const int code = read_cubin(s.device, static_cast<const u8*>(image), module->kernels);
    if (code) return call.end(code);
    *handle = module.get();
    s.modules[*handle] = std::move(module);
    return call.end();
}

EXPORT int cuModuleUnload(void* handle) {
    BEGIN(IN_CONTEXT);
    const int code = call.drain();
    return call.end(s.modules.erase(handle) ? code : int(INVALID_HANDLE));
}

EXPORT int cuModuleGetFunction(void** handle, void* module, const char* name) {
    BEGIN(IN_CONTEXT);
    snprintf(call.detail, sizeof call.detail, "%s", name);
    const auto found = s.modules.find(module);
    if (found == s.modules.end()) return call.end(INVALID_HANDLE);
    const std::vector<std::string>& kernels = found->second->kernels;
    if (std::find(kernels.begin(), kernels.end(), name) == kernels.end()) return call.end(NOT_FOUND);
    std::unique_ptr<Function> function = find_kernel(s, name);
    if (!function) {
        complain("the cubin has %s, and no library in kernels/", name);
        return call.end(NOT_FOUND);
    }
    *handle = function.get();
    found->second->functions.push_back(std::move(function));
    return call.end();
}

EXPORT int cuFuncSetAttribute(void* handle, int attribute, int value) {
    BEGIN(IN_CONTEXT);
    Function& function = *static_cast<Function*>(handle);
    constexpr int MOST_DYNAMIC_SHARED = 8;
    if (attribute != MOST_DYNAMIC_SHARED || value < 0 || u64(value) > s.device.shared_per_block) return call.end(INVALID_VALUE);
    function.most_dynamic_shared = u32(value);
    return call.end();
}

EXPORT int cuMemGetInfo_v2(size_t* free, size_t* total) {
    BEGIN(IN_CONTEXT);
    *total = s.device.memory;
    *free = s.device.memory - s.allocated;
    return call.end();
}

EXPORT int cuMemAlloc_v2(u64* address, size_t bytes) {
    BEGIN(IN_CONTEXT);
    snprintf(call.detail, sizeof call.detail, "%zu", bytes);
    if (bytes == 0) return call.end(INVALID_VALUE);
    if (bytes > s.device.memory - s.allocated) return call.end(OUT_OF_MEMORY);
    void* memory = nullptr;
    if (posix_memalign(&memory, 512, bytes)) return call.end(OUT_OF_MEMORY);
    memset(memory, 0xff, bytes);  // nobody may count on what is in fresh memory
    *address = reinterpret_cast<u64>(memory);
    s.allocations[*address] = bytes;
    s.allocated += bytes;
    return call.end();
}

EXPORT int cuMemFree_v2(u64 address) {
    BEGIN(IN_CONTEXT);
    const int code = call.drain();
    if (code) return call.end(code);
    const auto found = s.allocations.find(address);
    if (found == s.allocations.end()) return call.end(INVALID_VALUE);
    s.allocated -= found->second;
    s.allocations.erase(found);
    free(reinterpret_cast<void*>(address));
    return call.end();
}

EXPORT int cuMemcpyHtoDAsync_v2(u64 to, const void* from, size_t bytes, void*) {
    BEGIN(IN_CONTEXT);
    snprintf(call.detail, sizeof call.detail, "%zu", bytes);
    const int code = call.drain();
    if (code) return call.end(code);
    if (!inside(s, to, bytes)) return call.end(INVALID_VALUE);
    memcpy(reinterpret_cast<void*>(to), from, bytes);
    return call.end();
}

EXPORT int cuMemcpyDtoHAsync_v2(void* to, u64 from, size_t bytes, void*) {
    BEGIN(IN_CONTEXT);
    snprintf(call.detail, sizeof call.detail, "%zu", bytes);
    const int code = call.drain();
    if (code) return call.end(code);
    if (!inside(s, from, bytes)) return call.end(INVALID_VALUE);
    memcpy(to, reinterpret_cast<const void*>(from), bytes);
    return call.end();
}

EXPORT int cuMemcpyDtoDAsync_v2(u64 to, u64 from, size_t bytes, void*) {
    BEGIN(IN_CONTEXT);
    snprintf(call.detail, sizeof call.detail, "%zu", bytes);
    if (!inside(s, to, bytes) || !inside(s, from, bytes)) return call.end(INVALID_VALUE);
    call.enqueue([=] {
        memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
        return int(SUCCESS);
    });
    return call.end();
}

EXPORT int cuMemsetD8Async(u64 at, unsigned char byte, size_t bytes, void*) {
    BEGIN(IN_CONTEXT);
    snprintf(call.detail, sizeof call.detail, "%zu", bytes);
    if (!inside(s, at, bytes)) return call.end(INVALID_VALUE);
    call.enqueue([=] {
        memset(reinterpret_cast<void*>(at), byte, bytes);
        return int(SUCCESS);
    });
    return call.end();
}

EXPORT int cuLaunchKernel(void* handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                          void* stream, void** parameters, void** extra) {
    BEGIN(IN_CONTEXT);
    const Function* function = static_cast<const Function*>(handle);
    snprintf(call.detail, sizeof call.detail, "%s", function->name.c_str());
    if (!s.streams.count(stream)) return call.end(INVALID_HANDLE);
    // Limits of every architecture from sm_80 on (CUDA C++ Programming Guide, "Compute Capabilities").
    const bool grid = gx > 0 && gy > 0 && gz > 0 && gx <= 0x7fffffff && gy <= 0xffff && gz <= 0xffff;
    const bool block = bx > 0 && bx <= simt::MOST_THREADS && bx % WARP == 0 && by == 1 && bz == 1;
    if (!grid || !block || extra || shared > function->most_dynamic_shared) return call.end(INVALID_VALUE);
    Launch launch{function, {gx, gy, gz}, bx, shared, {}};
    for (u32 i = 0; i < function->entry->count; i++) {
        const u8* value = static_cast<const u8*>(parameters[i]);
        launch.arguments.emplace_back(value, value + function->entry->parameters[i].bytes);
    }
    call.enqueue([&s, launch] { return run(s, launch); });
    return call.end();
}
