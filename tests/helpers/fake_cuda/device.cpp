// SPDX-License-Identifier: Apache-2.0
// Four CUDA devices for a torch without CUDA: memory, streams and events of their own, the arithmetic of the CPU.
//
// [Note: What is checked]
//   Operations run at once, in the order of the host; that is one of the orders which a GPU may take. What a GPU may do
//   otherwise is checked, not played:
//   - Streams. Each operation ticks its stream's vector clock; events and waits join clocks. Memory remembers who used
//     it and when. A use that is not after the last conflicting use of another stream is a race, and raises.
//   - Memory that is freed while another stream may use it, without record_stream, is a race too.
//   - The host. A copy into page-locked memory that does not block leaves 0xFF bytes (NaN) there until the host waits
//     for its stream; a copy out of it remembers what it read, and the host must not have changed that by then.
//   - The host's reach. Device addresses are mapped without access: host code that follows one dies with SIGSEGV.
//     Fresh and freed device memory holds 0xFF bytes.
//   - Devices. Operands on different devices are refused as CUDA refuses them.
//   What the host sees of a race goes to the list of violations as well: errors in other threads may get lost.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pthread.h>
#include <sys/mman.h>
#include <torch/library.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstring>
#include <functional>
#include <list>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::IValue;
using c10::Stream;

enum { kDevices = 4, kStreams = 16, kAgents = kDevices * kStreams };
constexpr size_t kArena = size_t(32) << 30, kRound = 512;
using Clock = std::array<uint64_t, kAgents>;

std::recursive_mutex mutex;
using Hold = std::lock_guard<std::recursive_mutex>;

// ---- who is when

Clock host_clock{}, stream_clock[kAgents]{};
std::vector<std::string> violations;
thread_local int current_device = 0, current_stream[kDevices];
int streams_made[kDevices];
bool strict = true;

int agent_of(const Stream &stream) { return stream.device_index() * kStreams + int(stream.id()); }
int current_agent(int device) { return device * kStreams + current_stream[device]; }
void join(Clock &into, const Clock &from) {
    for (int i = 0; i < kAgents; ++i) into[i] = std::max(into[i], from[i]);
}
std::string name_of(int agent) {
    return "stream " + std::to_string(agent % kStreams) + " of cuda:" + std::to_string(agent / kStreams);
}
void violate(const std::string &what) {
    if (!strict) return;
    violations.push_back(what);
    TORCH_CHECK(false, "fake CUDA: ", what);
}
// One more operation of a stream begins, after all that the host has waited for.
void tick(int agent) {
    join(stream_clock[agent], host_clock);
    ++stream_clock[agent][agent];
}

// ---- graphs: operations that are remembered and made again

struct Graph {
    std::vector<std::function<void()>> steps;
    std::vector<Tensor> keep, made;               // memory that must stay; host tensors over what comes into being
    std::vector<std::pair<Tensor, Tensor>> undo;  // host tensor over what is changed, contents before
};
std::map<int, Graph> &graphs = *new std::map<int, Graph>;  // for good: tensors cannot die after torch
Graph *capturing = nullptr;
void refuse_in_capture(const char *what) {
    TORCH_CHECK(!capturing, "CUDA error: operation not permitted when stream is capturing: ", what);
}

// ---- memory

struct Use {
    const char *begin, *end;
    int agent;
    bool write;
    bool operator<(const Use &o) const {
        return std::tie(begin, end, agent, write) < std::tie(o.begin, o.end, o.agent, o.write);
    }
};
struct Block {
    char *begin;
    size_t size;
    int device, home;  // device -1: page-locked host memory; home -1: a graph's
    std::map<Use, std::pair<uint64_t, std::string>> uses;
    std::set<int> agents, recorded;
};

std::map<const char *, Block> blocks;  // by their first address
char *device_base, *kernel_base;       // the same pages twice: without access, and for operations
size_t arena_used;
std::map<size_t, std::vector<size_t>> freed;  // offsets by size
struct Stats {
    int64_t now, peak, total;
} stats[kDevices];

Block *block_of(const void *address) {
    auto after = blocks.upper_bound((const char *)address);
    if (after == blocks.begin()) return nullptr;
    Block &block = std::prev(after)->second;
    return (const char *)address < block.begin + block.size ? &block : nullptr;
}
bool is_device_address(const void *p) { return p >= device_base && p < device_base + kArena; }
char *reach(const void *p) { return is_device_address(p) ? kernel_base + ((char *)p - device_base) : (char *)p; }

void use(const char *begin, size_t bytes, int agent, bool write, const std::string &what) {
    Block *block = bytes && !capturing ? block_of(begin) : nullptr;
    if (!block) return;
    const Clock &now = stream_clock[agent];
    const char *end = begin + bytes;
    block->agents.insert(agent);
    if (block->agents.size() > 1)
        for (auto &[old, when] : block->uses)
            if (old.agent != agent && (write || old.write) && old.begin < end && begin < old.end &&
                now[old.agent] < when.first)
                violate("race: " + what + (write ? " writes" : " reads") + " on " + name_of(agent) + " what " +
                        when.second + (old.write ? " wrote" : " read") + " on " + name_of(old.agent) +
                        ", and did not wait for it");
    block->uses[Use{begin, end, agent, write}] = {now[agent], what};
}

size_t extent(const Tensor &t) {
    if (t.numel() == 0) return 0;
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    return (size_t(last) + 1) * t.element_size();
}
void use(const Tensor &t, int agent, bool write, const std::string &what) {
    use((const char *)t.const_data_ptr(), extent(t), agent, write, what);
}

void free_device(void *p) {
    Hold hold(mutex);
    auto at = blocks.find((char *)p);
    if (at == blocks.end()) return;
    Block &block = at->second;
    stats[block.device].now -= int64_t(block.size);
    if (strict)
        for (auto &[old, when] : block.uses)
            if (block.home >= 0 && old.agent != block.home && !block.recorded.count(old.agent) &&
                stream_clock[block.home][old.agent] < when.first && host_clock[old.agent] < when.first) {
                violations.push_back("race: memory of " + name_of(block.home) + " is freed while " + when.second +
                                     " may use it on " + name_of(old.agent) + ", without record_stream");
                break;
            }
    memset(reach(p), 0xFF, block.size);
    freed[block.size].push_back(size_t((char *)p - device_base));
    blocks.erase(at);
}
void free_pinned(void *p) {
    Hold hold(mutex);
    blocks.erase((char *)p);
    free(p);
}

struct DeviceMemory final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        const Device device(c10::kCUDA, DeviceIndex(current_device));
        if (!bytes) return {nullptr, nullptr, &free_device, device};
        Hold hold(mutex);
        const size_t size = (bytes + kRound - 1) / kRound * kRound;
        auto &spare = freed[size];
        size_t offset;
        if (!spare.empty()) {
            offset = spare.back();
            spare.pop_back();
        } else {
            TORCH_CHECK(arena_used + size <= kArena, "CUDA out of memory (fake)");
            offset = arena_used;
            arena_used += size + kRound;  // a gap, so that an overrun is not a neighbour's use
        }
        char *p = device_base + offset;
        memset(reach(p), 0xFF, size);
        const int home = capturing ? -1 : current_agent(device.index());
        Block &block = blocks[p] = Block{p, size, device.index(), home, {}, {home}, {}};
        // whoever had these pages before may still use them, up to here in the order of this stream
        if (home >= 0) block.uses[Use{p, p + size, home, true}] = {stream_clock[home][home], "the memory's former owner"};
        Stats &s = stats[device.index()];
        s.now += int64_t(size), s.peak = std::max(s.peak, s.now), ++s.total;
        return {p, p, &free_device, device};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &free_device; }
    void copy_data(void *to, const void *from, size_t n) const override { memcpy(reach(to), reach(from), n); }
} device_memory;

struct PinnedMemory final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        void *p = nullptr;
        if (bytes) {
            TORCH_CHECK(!posix_memalign(&p, 4096, bytes), "no page-locked memory (fake)");
            memset(p, 0xFF, bytes);
            Hold hold(mutex);
            blocks[(char *)p] = Block{(char *)p, bytes, -1, -1, {}, {}, {}};
        }
        return {p, p, &free_pinned, Device(c10::kCPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
    void copy_data(void *to, const void *from, size_t n) const override { memcpy(to, from, n); }
} pinned_memory;

bool is_pinned(const void *p) {
    Hold hold(mutex);
    Block *block = block_of(p);
    return block && block->device < 0;
}

// ---- copies that the host has not waited for

struct Pending {
    Tensor host, data;  // write: `data` goes to `host`; read: `data` was read of `host`
    bool write;
    int agent;
    uint64_t when;
    std::string what;
    char *begin() const { return (char *)host.data_ptr(); }
    size_t size() const { return host.nbytes(); }
    bool over(const Pending &o) const { return begin() < o.begin() + o.size() && o.begin() < begin() + size(); }
};
std::list<Pending> pending;

bool is_poison(const char *p, size_t n) { return n == 0 || (uint8_t(*p) == 0xFF && !memcmp(p, p + 1, n - 1)); }
void poison(const Pending &p) { memset(p.begin(), 0xFF, p.size()); }
void deliver(const Pending &p) { memcpy(p.begin(), p.data.const_data_ptr(), p.size()); }
std::string unchanged(const Pending &p) {
    if (!memcmp(p.begin(), p.data.const_data_ptr(), p.size())) return "";
    return "page-locked memory was changed while " + p.what + " might still read it";
}

// The host has come to know more of the streams: copies that are done by now take effect.
void settle() {
    std::vector<Pending> done;
    std::string wrong;
    for (auto at = pending.begin(); at != pending.end();) {
        if (host_clock[at->agent] < at->when) {
            ++at;
            continue;
        }
        if (at->write && !is_poison(at->begin(), at->size()))
            wrong = "page-locked memory was changed while " + at->what + " might still write it";
        done.push_back(*at);
        at = pending.erase(at);
    }
    for (auto &p : done)
        if (p.write) deliver(p);
    for (auto &p : pending)
        if (p.write) poison(p);
    for (auto &p : done)
        if (!p.write && wrong.empty()) wrong = unchanged(p);
    if (!wrong.empty()) violate(wrong);
}
void host_waits(const Clock &clock) {
    refuse_in_capture("the host waits");
    Hold hold(mutex);
    join(host_clock, clock);
    settle();
}

// ---- streams and events

struct Event {
    Clock clock;
    bool polled;
    std::chrono::steady_clock::time_point time;
};
bool is_done(const Clock &clock) {
    for (int i = 0; i < kAgents; ++i)
        if (host_clock[i] < clock[i]) return false;
    return true;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
    static Stream stream(int device, int id) {
        return Stream(Stream::UNSAFE, Device(c10::kCUDA, DeviceIndex(device)), id);
    }
    c10::DeviceType type() const override { return c10::kCUDA; }
    Device exchangeDevice(Device d) const override {
        const int before = current_device;
        setDevice(d);
        return Device(c10::kCUDA, DeviceIndex(before));
    }
    Device getDevice() const override { return Device(c10::kCUDA, DeviceIndex(current_device)); }
    void setDevice(Device d) const override {
        TORCH_CHECK(d.index() < kDevices, "CUDA error: invalid device ordinal");
        if (d.index() >= 0) current_device = d.index();
    }
    void uncheckedSetDevice(Device d) const noexcept override {
        if (d.index() >= 0 && d.index() < kDevices) current_device = d.index();
    }
    static int index(Device d) { return d.index() < 0 ? current_device : d.index(); }
    Stream getStream(Device d) const override { return stream(index(d), current_stream[index(d)]); }
    Stream getDefaultStream(Device d) const override { return stream(index(d), 0); }
    Stream getNewStream(Device d, int) const override {
        Hold hold(mutex);
        int &made = streams_made[index(d)];
        return stream(index(d), 1 + made++ % (kStreams - 1));
    }
    Stream getStreamFromGlobalPool(Device d, bool) const override { return getNewStream(d, 0); }
    Stream exchangeStream(Stream s) const override {
        const int before = current_stream[s.device_index()];
        current_stream[s.device_index()] = int(s.id());
        return stream(s.device_index(), before);
    }
    void *getStreamNativeHandle(const Stream s) const override { return (void *)size_t(s.id() ? agent_of(s) + 1 : 0); }
    void destroyEvent(void *event, const DeviceIndex) const noexcept override { delete (Event *)event; }
    void record(void **event, const Stream &s, const DeviceIndex, const c10::EventFlag) const override {
        Hold hold(mutex);
        if (!*event) *event = new Event();
        tick(agent_of(s));
        *(Event *)*event = Event{stream_clock[agent_of(s)], false, std::chrono::steady_clock::now()};
    }
    void block(void *event, const Stream &s) const override {
        Hold hold(mutex);
        if (event) join(stream_clock[agent_of(s)], ((Event *)event)->clock);
    }
    bool poll(const Clock &clock, bool &polled) const {  // not done yet when asked for the first time
        if (is_done(clock)) return true;
        if (polled) host_waits(clock);
        polled = !polled;
        return !polled;
    }
    bool queryEvent(void *event) const override {
        Hold hold(mutex);
        return !event || poll(((Event *)event)->clock, ((Event *)event)->polled);
    }
    bool queryStream(const Stream &s) const override {
        static bool polled[kAgents];
        Hold hold(mutex);
        return poll(stream_clock[agent_of(s)], polled[agent_of(s)]);
    }
    void synchronizeEvent(void *event) const override {
        if (event) host_waits(((Event *)event)->clock);
    }
    void synchronizeStream(const Stream &s) const override { host_waits(stream_clock[agent_of(s)]); }
    void synchronizeDevice(const DeviceIndex d) const override {
        Hold hold(mutex);
        const int device = d < 0 ? current_device : d;
        for (int i = 0; i < kStreams; ++i) join(host_clock, stream_clock[device * kStreams + i]);
        settle();
    }
    void recordDataPtrOnStream(const c10::DataPtr &data, const Stream &s) const override {
        Hold hold(mutex);
        if (Block *block = block_of(data.get())) block->recorded.insert(agent_of(s));
    }
    double elapsedTime(void *first, void *last, const DeviceIndex) const override {
        Hold hold(mutex);
        TORCH_CHECK(first && last, "Both events must be recorded before calculating elapsed time.");
        TORCH_CHECK(is_done(((Event *)last)->clock), "CUDA error: device not ready");
        return std::chrono::duration<double, std::milli>(((Event *)last)->time - ((Event *)first)->time).count();
    }
    DeviceIndex deviceCount() const noexcept override { return kDevices; }
    c10::DeviceCapability getDeviceCapability(Device) const override { return {}; }
};

// ---- random numbers: a CPU generator for each device, whose state stands in for the CPU's while an operation draws

struct Generator final : at::CPUGeneratorImpl {
    explicit Generator(int device) : at::CPUGeneratorImpl(c10::default_rng_seed_val) {
        device_ = Device(c10::kCUDA, DeviceIndex(device));
        key_set_ = c10::DispatchKeySet(c10::DispatchKey::CUDA);
    }
};
const at::Generator &default_generator(int device) {
    static const auto made = [] {
        std::array<at::Generator, kDevices> all;
        for (int d = 0; d < kDevices; ++d) all[size_t(d)] = at::make_generator<Generator>(d);
        return all;
    }();
    return made[size_t(device < 0 ? current_device : device)];
}
struct Draw {
    at::Generator cuda, cpu = at::detail::getDefaultCPUGenerator();
    c10::intrusive_ptr<c10::TensorImpl> before;
    explicit Draw(at::Generator g) : cuda(std::move(g)), before(cpu.unsafeGetGeneratorImpl()->get_state()) {
        cpu.unsafeGetGeneratorImpl()->set_state(*cuda.unsafeGetGeneratorImpl()->get_state());
    }
    ~Draw() {
        cuda.unsafeGetGeneratorImpl()->set_state(*cpu.unsafeGetGeneratorImpl()->get_state());
        cpu.unsafeGetGeneratorImpl()->set_state(*before);
    }
};

struct Hooks final : at::CUDAHooksInterface {
    void init() const override {}
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasCUDA() const override { return true; }
    bool hasPrimaryContext(DeviceIndex) const override { return true; }
    DeviceIndex deviceCount() const override { return kDevices; }
    int getNumGPUs() const override { return kDevices; }
    DeviceIndex current_device() const override { return DeviceIndex(::current_device); }
    DeviceIndex getCurrentDevice() const override { return current_device(); }
    void setCurrentDevice(DeviceIndex d) const override { ::current_device = d; }
    DeviceIndex exchangeDevice(DeviceIndex d) const override {
        return d < 0 ? current_device() : DeviceIndex(std::exchange(::current_device, int(d)));
    }
    DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { return exchangeDevice(d); }
    bool isPinnedPtr(const void *p) const override { return is_pinned(p); }
    at::Allocator *getPinnedMemoryAllocator() const override { return &pinned_memory; }
    at::Allocator *getCUDADeviceAllocator() const override { return &device_memory; }
    Device getDeviceFromPtr(void *p) const override {
        Hold hold(mutex);
        Block *block = block_of(p);
        TORCH_CHECK(block && block->device >= 0, "not device memory");
        return Device(c10::kCUDA, DeviceIndex(block->device));
    }
    const at::Generator &getDefaultGenerator(DeviceIndex d) const override { return default_generator(d); }
    at::Generator getNewGenerator(DeviceIndex d) const override {
        const int device = d < 0 ? ::current_device : d;
        static bool given[kDevices];  // the first one that Python makes is the default one
        return std::exchange(given[device], true) ? at::make_generator<Generator>(device) : default_generator(device);
    }
    void deviceSynchronize(DeviceIndex d) const override { Guard().synchronizeDevice(d); }
};

// ---- operations

// A CPU tensor over the memory of a device tensor.
Tensor on_host(const Tensor &t) {
    const auto options = t.options().device(c10::kCPU).requires_grad(false);
    if (t.numel() == 0) return at::empty_strided(t.sizes(), t.strides(), options);
    return at::from_blob(reach(t.const_data_ptr()), t.sizes(), t.strides(), options);
}
Tensor on_device(const Tensor &t, Device device) {
    Tensor made = at::empty_strided(t.sizes(), t.strides(), t.options().device(device));
    if (extent(t)) memcpy(reach(made.data_ptr()), t.const_data_ptr(), extent(t));
    if (t.unsafeGetTensorImpl()->is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
    return made;
}

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
    TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
    c10::DeviceGuard guard(device.value_or(Device(c10::kCUDA)));
    return at::detail::empty_generic(size, &device_memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                     c10::dtype_or_default(dtype), format);
}
Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool> pin) {
    TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
    c10::DeviceGuard guard(device.value_or(Device(c10::kCUDA)));
    return at::detail::empty_strided_generic(size, stride, &device_memory,
                                             c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

void resize_storage(c10::StorageImpl *storage, size_t bytes) {
    c10::DeviceGuard guard(storage->device());
    c10::DataPtr fresh = device_memory.allocate(bytes);
    if (const size_t keep = std::min(bytes, storage->nbytes())) memcpy(reach(fresh.get()), reach(storage->data()), keep);
    storage->set_data_ptr_noswap(std::move(fresh));
    storage->set_nbytes(bytes);
}
void fit(const Tensor &t) {
    const size_t need = t.numel() ? t.storage_offset() * t.element_size() + extent(t) : 0;
    if (need > t.storage().nbytes()) resize_storage(t.storage().unsafeGetStorageImpl(), need);
}
const Tensor &resize(const Tensor &self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
    self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
    fit(self);
    return self;
}
Tensor &set_part(Tensor &self, at::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
    auto *impl = self.unsafeGetTensorImpl();
    impl->set_storage_keep_dtype(std::move(source));
    impl->set_storage_offset(offset);
    if (stride.data() && (stride.size() || size.empty()))
        impl->set_sizes_and_strides(size, stride);
    else
        impl->set_sizes_contiguous(size);
    fit(self);
    return self;
}
Tensor &set_storage(Tensor &self, at::Storage source) {
    const int64_t n = int64_t(source.nbytes() / self.element_size());
    return set_part(self, std::move(source), 0, {n}, {});
}
Tensor &set_tensor(Tensor &self, const Tensor &source) {
    return set_part(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}
Tensor &set_nothing(Tensor &self) {
    return set_part(self, at::empty({0}, self.options()).storage(), 0, {0}, {});
}

Tensor &copy(Tensor &self, const Tensor &source, bool non_blocking) {
    if (self.is_same(source) || self.numel() == 0) return self;
    const Tensor src = source.sizes() == self.sizes() ? source : source.expand(self.sizes());
    Hold hold(mutex);
    const int agent = current_agent((src.is_cuda() ? src : self).device().index());
    const bool alike = src.scalar_type() == self.scalar_type() && source.sizes() == self.sizes();
    tick(agent);
    if (self.is_cuda() && src.is_cuda()) {
        const int other = current_agent(self.device().index());
        tick(other);
        join(stream_clock[agent], stream_clock[other]);
        use(src, agent, false, "copy_");
        use(self, agent, true, "copy_");
        join(stream_clock[other], stream_clock[agent]);
        Tensor to = on_host(self), from = on_host(src);
        if (capturing) {
            capturing->keep.insert(capturing->keep.end(), {self, src});
            capturing->undo.emplace_back(to, to.clone());
            capturing->steps.push_back([to, from] { to.copy_(from); });
        }
        to.copy_(from);
        return self;
    }
    refuse_in_capture("a copy from or to the host");
    const Tensor &host = self.is_cuda() ? src : self;
    const bool pinned = host.numel() && is_pinned(host.const_data_ptr());
    Pending copying{host, {}, !self.is_cuda(), agent, 0, self.is_cuda() ? "a copy to the device" : "a copy to the host"};
    if (pinned) use(host, agent, !self.is_cuda(), copying.what);
    bool wait = !non_blocking;
    if (self.is_cuda()) {
        const bool later = non_blocking && pinned && host.is_contiguous() && alike;
        std::vector<const Pending *> due;
        for (auto &p : pending)
            if (pinned && p.write && host.is_contiguous() && p.over(copying)) due.push_back(&p), deliver(p);
        on_host(self).copy_(src);
        use(self, agent, true, copying.what);
        if (later) copying.data = host.detach().clone(), copying.when = stream_clock[agent][agent];
        for (auto *p : due) poison(*p);
        if (later) pending.push_back(copying);
    } else {
        use(src, agent, false, copying.what);
        copying.data = on_host(src).to(self.scalar_type()).contiguous().clone();
        if (non_blocking && pinned && self.is_contiguous()) {
            for (auto at = pending.begin(); at != pending.end();) {
                const bool read = !at->write && at->over(copying);
                const std::string wrong = read ? unchanged(*at) : "";
                if (!wrong.empty()) violate(wrong);
                at = read ? pending.erase(at) : std::next(at);
            }
            copying.when = stream_clock[agent][agent];
            poison(copying);
            pending.push_back(copying);
        } else {
            host_waits(stream_clock[agent]);  // what came before it on the stream is done
            self.copy_(copying.data);
            wait = false;
        }
    }
    if (wait) host_waits(stream_clock[agent]);
    return self;
}
Tensor copy_from(const Tensor &self, const Tensor &to, bool non_blocking) {
    Tensor target = to;
    return copy(target, self, non_blocking);
}
void record_stream(Tensor &self, Stream s) { Guard().recordDataPtrOnStream(self.storage().data_ptr(), s); }

bool waits(const std::string &name) {  // operations whose results the host has to see
    static const std::set<std::string> names{"aten::_local_scalar_dense", "aten::equal",   "aten::nonzero",
                                             "aten::masked_select",       "aten::_unique2", "aten::unique_dim",
                                             "aten::unique_consecutive",  "aten::bincount"};
    return names.count(name) > 0;
}
bool takes_host_indices(const std::string &name) {
    return name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_" ||
           name == "aten::index_put";
}

// One call of the boxed fallback: device tensors become CPU tensors over their memory, and back.
struct Call {
    const c10::OperatorHandle &op;
    torch::jit::Stack &stack;
    const std::string name = op.schema().name();
    std::optional<Device> device{};
    std::vector<std::pair<Tensor, Tensor>> pairs{};  // original, stand-in
    std::vector<std::pair<Tensor, Tensor>> grown{};  // of empty ones that grew: its memory, stand-in
    std::vector<Tensor> fresh{};                     // for each result, the device tensor made of it or none

    template <class F>
    void each(IValue &value, F f) {
        if (value.isTensor()) {
            if (value.toTensor().defined()) value = f(value.toTensor());
        } else if (value.isTensorList()) {
            auto list = value.toTensorList().copy();
            for (size_t i = 0; i < list.size(); ++i)
                if (Tensor t = list.get(i); t.defined()) list.set(i, f(t));
            value = list;
        } else if (value.isOptionalTensorList()) {
            auto list = value.toOptionalTensorList().copy();
            for (size_t i = 0; i < list.size(); ++i)
                if (auto t = list.get(i); t && t->defined()) list.set(i, std::optional<Tensor>(f(*t)));
            value = list;
        }
    }
    void find_device(size_t begin) {
        for (size_t i = begin; i < stack.size(); ++i) {
            if (stack[i].isDevice() && stack[i].toDevice().is_cuda() && !device) {
                const Device named = stack[i].toDevice();
                device = named.has_index() ? named : Device(c10::kCUDA, DeviceIndex(current_device));
            }
            each(stack[i], [&](const Tensor &t) {
                if (t.is_cuda() && (!device || t.dim())) device = t.device();
                return t;
            });
        }
        for (size_t i = begin; i < stack.size(); ++i)
            each(stack[i], [&](const Tensor &t) {
                TORCH_CHECK(t.device() == *device || (t.is_cpu() && t.dim() == 0) ||
                                (t.is_cpu() && takes_host_indices(name)),
                            "Expected all tensors to be on the same device, but found at least two devices, ", *device,
                            " and ", t.device(), "! (when checking an argument of ", name, ")");
                return t;
            });
    }
    Tensor stand_in(const Tensor &t, bool write, int agent) {
        if (!t.is_cuda()) return t;
        use(t, agent, write, name);
        for (auto &[original, made] : pairs)
            if (original.is_same(t)) return made;
        pairs.emplace_back(t, on_host(t));
        return pairs.back().second;
    }
    Tensor original(const Tensor &t, int agent) {
        fresh.emplace_back();
        for (auto &[original, made] : pairs)
            if (made.is_same(t)) return original;
        const char *p = (const char *)t.const_data_ptr();
        if (t.numel() && p >= kernel_base && p < kernel_base + kArena)
            for (auto &[from, made] : pairs) {
                const char *base = reach(from.storage().data());
                if (p < base || p >= base + from.storage().nbytes()) continue;
                Tensor view = at::detail::make_tensor<c10::TensorImpl>(
                    c10::TensorImpl::VIEW, c10::Storage(from.storage()), from.key_set(), t.dtype());
                view.unsafeGetTensorImpl()->set_storage_offset((p - base) / int64_t(t.element_size()));
                view.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides());
                return view;
            }
        Tensor made = on_device(t, *device);
        use(made, agent, true, name);
        fresh.back() = made;
        return made;
    }
    void run() {
        const auto &schema = op.schema();
        const size_t begin = stack.size() - schema.arguments().size();
        find_device(begin);
        TORCH_CHECK(device, name, " has no device");
        c10::DeviceGuard guard(*device);
        Hold hold(mutex);
        const int agent = current_agent(device->index());
        tick(agent);
        std::optional<at::Generator> generator;
        for (size_t i = begin; i < stack.size(); ++i) {
            const auto *alias = schema.arguments()[i - begin].alias_info();
            const bool write = alias && alias->isWrite();
            if (stack[i].isDevice()) stack[i] = Device(c10::kCPU);
            if (stack[i].isGenerator()) {
                generator = stack[i].toGenerator();
                stack[i] = IValue();
            }
            each(stack[i], [&](const Tensor &t) {
                Tensor made = stand_in(t, write, agent);
                if (capturing && write && t.is_cuda() && t.numel()) capturing->undo.emplace_back(made, made.clone());
                return made;
            });
        }
        const torch::jit::Stack inputs(stack.begin() + long(begin), stack.end());
        if (waits(name)) host_waits(stream_clock[agent]);
        {
            std::optional<Draw> draw;
            if (generator || op.hasTag(at::Tag::nondeterministic_seeded))
                draw.emplace(generator ? *generator : default_generator(device->index()));
            op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
        }
        for (auto &[original, made] : pairs)
            if (original.sizes() != made.sizes()) {  // an empty `out` that grew
                resize(original, made.sizes(), {});
                original.unsafeGetTensorImpl()->set_sizes_and_strides(made.sizes(), made.strides());
                memcpy(reach(original.data_ptr()), made.const_data_ptr(), extent(made));
                grown.emplace_back(on_host(original), made);
            }
        for (size_t i = stack.size() - schema.returns().size(); i < stack.size(); ++i)
            each(stack[i], [&](const Tensor &t) { return original(t, agent); });
        if (capturing) capture(inputs);
    }
    void capture(const torch::jit::Stack &inputs) {
        std::vector<Tensor> results;
        for (const Tensor &t : fresh) {
            results.push_back(t.defined() ? on_host(t) : t);
            if (t.defined()) capturing->keep.push_back(t), capturing->made.push_back(results.back());
        }
        for (auto &[original, made] : pairs) capturing->keep.push_back(original);
        const auto again = [handle = op, inputs, results, grown = grown] {
            torch::jit::Stack stack = inputs;
            handle.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
            size_t number = 0;
            Call call{handle, stack};
            for (size_t i = stack.size() - handle.schema().returns().size(); i < stack.size(); ++i)
                call.each(stack[i], [&](const Tensor &t) {
                    if (const Tensor &to = results[number++]; to.defined()) to.copy_(t);
                    return t;
                });
            for (auto &[to, from] : grown) to.copy_(from);
        };
        capturing->steps.push_back(again);
    }
};
void fallback(const c10::OperatorHandle &op, c10::DispatchKeySet, torch::jit::Stack *stack) {
    Call{op, *stack}.run();
}

// Maps the memory twice. A forked child maps its own in the same place: there, as with CUDA, the parent's is lost.
void map() {
    const int file = memfd_create("fake_cuda", 0), fixed = device_base ? MAP_FIXED : 0;
    TORCH_CHECK(file >= 0 && !ftruncate(file, kArena), "no memory file");
    const int flags = MAP_SHARED | MAP_NORESERVE | fixed;
    device_base = (char *)mmap(device_base, kArena, PROT_NONE, flags, file, 0);
    kernel_base = (char *)mmap(kernel_base, kArena, PROT_READ | PROT_WRITE, flags, file, 0);
    TORCH_CHECK(device_base != MAP_FAILED && kernel_base != MAP_FAILED, "no address space");
    close(file);
}
bool prepare() {
    map();
    pthread_atfork(nullptr, nullptr, map);
    c10::SetAllocator(c10::kCUDA, &device_memory, 1);
    // torch made its hooks for CUDA when it was imported, before a registry could be told; they hold no data
    static Hooks hooks;
    memcpy((void *)&at::detail::getCUDAHooks(), (void *)&hooks, sizeof(void *));
    return true;
}
const bool prepared = prepare();

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
    m.impl("empty.memory_format", empty);
    m.impl("empty_strided", empty_strided);
    m.impl("as_strided", at::native::as_strided_tensorimpl);
    m.impl("view", at::native::view);
    m.impl("_reshape_alias", at::native::_reshape_alias);
    m.impl("resize_", resize);
    m.impl("set_.source_Storage_storage_offset", set_part);
    m.impl("set_.source_Storage", set_storage);
    m.impl("set_.source_Tensor", set_tensor);
    m.impl("set_", set_nothing);
    m.impl("copy_", copy);
    m.impl("_copy_from", copy_from);
    m.impl("record_stream", record_stream);
}
TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

extern "C" {
int fc_devices() { return kDevices; }
int fc_device() { return current_device; }
void fc_set_device(int device) { Guard().setDevice(Device(c10::kCUDA, DeviceIndex(device))); }
int fc_stream(int device) { return current_stream[device]; }
void fc_set_stream(int device, int id) { current_stream[device] = id; }
int fc_synchronize(int device) {  // says whether something was wrong; no error crosses from here into Python
    try {
        Guard().synchronizeDevice(DeviceIndex(device));
    } catch (const std::exception &) {
        return 1;
    }
    return 0;
}
int64_t fc_memory(int device, int what) {
    const Stats &s = stats[device];
    return what == 0 ? s.now : what == 1 ? s.peak : what == 2 ? s.total : int64_t(kArena);
}
void fc_reset_peak(int device) { stats[device].peak = stats[device].now; }
void fc_resize(void *storage, size_t bytes) { resize_storage((c10::StorageImpl *)storage, bytes); }
void fc_graph_begin(int id) {
    Hold hold(mutex);
    capturing = &(graphs[id] = Graph());
}
void fc_graph_end() {  // nothing of it has happened yet
    Hold hold(mutex);
    at::AutoDispatchBelowADInplaceOrView below;
    for (auto at = capturing->undo.rbegin(); at != capturing->undo.rend(); ++at) at->first.copy_(at->second);
    for (const Tensor &t : capturing->made)
        if (extent(t)) memset(t.data_ptr(), 0xFF, extent(t));
    capturing->undo.clear();
    capturing = nullptr;
}
void fc_graph_replay(int id) {
    Hold hold(mutex);
    at::AutoDispatchBelowADInplaceOrView below;
    const int agent = current_agent(current_device);
    tick(agent);
    for (const Tensor &t : graphs[id].keep) use(t, agent, true, "a replayed graph");
    for (auto &step : graphs[id].steps) step();
}
void fc_graph_reset(int id) {
    Hold hold(mutex);
    graphs.erase(id);
}
int fc_capturing() { return capturing != nullptr; }
int fc_violations() { return int(violations.size()); }
const char *fc_violation(int i) { return violations[size_t(i)].c_str(); }
void fc_forget() {
    Hold hold(mutex);
    for (int d = 0; d < kDevices; ++d)
        for (int i = 0; i < kStreams; ++i) join(host_clock, stream_clock[d * kStreams + i]);
    try {
        settle();
    } catch (...) {
    }
    violations.clear();
}
// Opens device memory to the host while a launched kernel runs, and closes it again.
void fc_open(int open) { mprotect(device_base, kArena, open ? PROT_READ | PROT_WRITE : PROT_NONE); }
}
