// SPDX-License-Identifier: Apache-2.0
// A stand-in for the CUDA driver: keeps a log of the calls, fails where told to, and runs the kernels on the CPU.
//
// The image decides what cuModuleLoadDataEx does: one that contains "refuse" is refused with a JIT log. Contexts are
// the numbers 0x100 + device; each thread has a stack of them.
#include <mutex>
#include <string>
#include <ucontext.h>
#include <vector>

#include "cuda_words.h"

extern const HostKernel host_kernels[];

Place threadIdx, blockIdx, gridDim, blockDim;
unsigned char host_slots[1024][16];

namespace {

enum { kStack = 128 * 1024, kMost = 1024 };
enum State { kReady, kAtBlock, kAtWarp, kDone };

ucontext_t scheduler, fibers[kMost];
State states[kMost];
std::vector<char> stacks;
const HostKernel *running;
const void *running_buffer;
size_t running_size;

void fiber() {
    const unsigned me = threadIdx.x;
    running->run(running_buffer, running_size);
    states[me] = kDone;
}

// Releases the fibers [from, to) if all that are not done wait for the same thing; returns whether any was released.
bool release(unsigned from, unsigned to, State waiting) {
    bool any = false;
    for (unsigned i = from; i < to; ++i) {
        if (states[i] == kDone) continue;
        if (states[i] != waiting) return false;
        any = true;
    }
    for (unsigned i = from; i < to; ++i)
        if (states[i] == waiting) states[i] = kReady;
    return any;
}

void run_block(unsigned threads) {
    for (unsigned i = 0; i < threads; ++i) {
        getcontext(&fibers[i]);
        fibers[i].uc_stack.ss_sp = &stacks[(size_t)i * kStack];
        fibers[i].uc_stack.ss_size = kStack;
        fibers[i].uc_link = &scheduler;
        makecontext(&fibers[i], fiber, 0);
        states[i] = kReady;
    }
    for (;;) {
        bool moved = false, done = true;
        for (unsigned i = 0; i < threads; ++i) {
            if (states[i] == kReady) {
                threadIdx.x = i;
                swapcontext(&scheduler, &fibers[i]);
                moved = true;
            }
            done = done && states[i] == kDone;
        }
        if (done) return;
        for (unsigned i = 0; i < threads; i += 32) moved |= release(i, i + 32, kAtWarp);
        moved |= release(0, threads, kAtBlock);
        if (!moved) {
            fprintf(stderr, "kernel %s: threads of a block wait for different barriers\n", running->name);
            abort();
        }
    }
}

std::mutex lock;
std::string record;
int driver_version = 12080, capability = 80, devices = 1, launches = 0;
std::string failing;
int failing_status, launch_runs = 1;
thread_local std::vector<size_t> contexts;

int enter(const char *call, const std::string &detail = "") {
    std::lock_guard<std::mutex> hold(lock);
    record += call;
    if (!detail.empty()) record += " " + detail;
    record += "\n";
    return failing == call ? failing_status : 0;
}

std::string number(size_t n) { return std::to_string(n); }

}  // namespace

void host_wait(int barrier) {
    const unsigned me = threadIdx.x;
    states[me] = barrier == kBlockBarrier ? kAtBlock : kAtWarp;
    swapcontext(&fibers[me], &scheduler);
    threadIdx.x = me;
}

extern "C" {

// ---- control, for the tests

void fake_reset() {
    record.clear(), failing.clear(), contexts.clear();
    driver_version = 12080, capability = 80, devices = 1, launches = 0, launch_runs = 1;
}
void fake_set(const char *what, int value) {
    const std::string name = what;
    if (name == "version") driver_version = value;
    if (name == "capability") capability = value;
    if (name == "devices") devices = value;
    if (name == "run") launch_runs = value;
    if (name == "context") contexts.assign(value ? 1 : 0, (size_t)value);
}
void fake_fail(const char *call, int status) { failing = call, failing_status = status; }
const char *fake_log() { return record.c_str(); }
int fake_context_depth() { return (int)contexts.size(); }
size_t fake_context() { return contexts.empty() ? 0 : contexts.back(); }

// ---- the driver

int cuInit(unsigned) { return enter("cuInit"); }
int cuDriverGetVersion(int *version) { *version = driver_version; return enter("cuDriverGetVersion"); }
int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal >= devices ? 101 : enter("cuDeviceGet", number(ordinal));
}
int cuDeviceGetAttribute(int *value, int attribute, int) {
    *value = attribute == 75 ? capability / 10 : capability % 10;
    return enter("cuDeviceGetAttribute");
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = (void *)(size_t)(0x100 + device);
    return enter("cuDevicePrimaryCtxRetain", number(device));
}
int cuCtxGetCurrent(void **context) {
    *context = (void *)fake_context();
    return failing == "cuCtxGetCurrent" ? failing_status : 0;
}
int cuCtxSetCurrent(void *context) {
    if (contexts.empty()) contexts.push_back(0);
    contexts.back() = (size_t)context;
    return enter("cuCtxSetCurrent", number((size_t)context));
}
int cuCtxPushCurrent_v2(void *context) {
    contexts.push_back((size_t)context);
    return enter("cuCtxPushCurrent", number((size_t)context));
}
int cuCtxPopCurrent_v2(void **context) {
    if (contexts.empty()) return 201;
    *context = (void *)contexts.back();
    contexts.pop_back();
    return enter("cuCtxPopCurrent");
}
int cuModuleLoadDataEx(void **module, const void *image, unsigned count, const int *options, void **values) {
    const std::string start((const char *)image, strnlen((const char *)image, 32));
    *module = (void *)0x5000;
    if (int status = enter("cuModuleLoadDataEx", start.substr(0, start.find('\n')))) return status;
    if (contexts.empty() || contexts.back() == 0) return 201;
    if (start.find("refuse") == std::string::npos) return 0;
    char *log = nullptr;
    size_t bytes = 0;
    for (unsigned i = 0; i < count; ++i) {
        if (options[i] == 5) log = (char *)values[i];
        if (options[i] == 6) bytes = (size_t)values[i];
    }
    if (log) snprintf(log, bytes, "ptxas says no");
    return 218;
}
int cuModuleGetFunction(void **function, void *, const char *name) {
    if (int status = enter("cuModuleGetFunction", name)) return status;
    for (const HostKernel *kernel = host_kernels; kernel->name; ++kernel)
        if (!strcmp(kernel->name, name)) {
            *function = (void *)kernel;
            return 0;
        }
    return 500;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **params, void **extra) {
    const HostKernel *kernel = (const HostKernel *)function;
    char detail[200];
    snprintf(detail, sizeof detail, "%s grid %u,%u,%u block %u,%u,%u shared %u stream %zu context %zu", kernel->name,
             gx, gy, gz, bx, by, bz, shared, (size_t)stream, fake_context());
    if (int status = enter("cuLaunchKernel", detail)) return status;
    if (gx == 0 || params || !extra || extra[0] != (void *)1 || extra[2] != (void *)2 || extra[4]) return 1;
    if (contexts.empty() || contexts.back() == 0) return 201;
    if (!launch_runs) return 0;
    std::lock_guard<std::mutex> hold(lock);
    if (stacks.empty()) stacks.resize((size_t)kMost * kStack);
    running = kernel, running_buffer = extra[1], running_size = *(size_t *)extra[3];
    gridDim.x = gx, blockDim.x = bx;
    for (blockIdx.x = 0; blockIdx.x < gx; ++blockIdx.x) run_block(bx);
    return 0;
}
int cuGetErrorName(int status, const char **text) {
    *text = status == 218 ? "CUDA_ERROR_INVALID_PTX" : status == 201 ? "CUDA_ERROR_INVALID_CONTEXT" : "CUDA_ERROR";
    return status == 999 ? 1 : 0;
}
int cuGetErrorString(int status, const char **text) {
    *text = "words of the driver";
    return status == 999 ? 1 : 0;
}

}  // extern "C"
