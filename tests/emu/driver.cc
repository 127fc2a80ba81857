// build/emu/libcuda.so.1: the CUDA driver API over the emulated device. Here: devices, contexts, memory, modules.
// Environment beside host.h's, read by cuInit while no context lives:
//
//   MOE_EMU_DEVICES=90,80          compute capability of each device
//   MOE_EMU_SMS=6                  multiprocessors of each
//   MOE_EMU_DRIVER_VERSION=13000   functions newer than it are not found, PTX newer than it is refused
//   MOE_EMU_MEMORY=8589934592      bytes of each device
//   MOE_EMU_LEAKS=0                no list of leaked objects at exit
#include "driver.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>

// ---- start and calls ------------------------------------------------------------------------------------------------

// Never destroyed: a thread's own variables are gone before its process's exit handlers run.
static thread_local std::vector<CUctx_st *> &context_stack = *new std::vector<CUctx_st *>;
thread_local bool in_host_function;

// Never destroyed: programs call the driver from their last exit handlers.
driver &drv()
{
    static driver *d = new driver;
    return *d;
}

CUctx_st *current_context()
{
    return context_stack.empty() ? nullptr : context_stack.back();
}

call::call(const char *function, int needs) : guard(drv().lock), name(function)
{
    ctx = current_context();
    if (in_host_function) code = CUDA_ERROR_NOT_PERMITTED;
    else if (int fault = host_fault(function)) code = fault;
    else if ((needs & INIT) && !drv().initialised) code = CUDA_ERROR_NOT_INITIALIZED;
    else if ((needs & CONTEXT) == CONTEXT && !ctx) code = CUDA_ERROR_INVALID_CONTEXT;
    else if ((needs & CONTEXT) == CONTEXT && !drv().contexts.count(ctx)) code = CUDA_ERROR_CONTEXT_IS_DESTROYED;
    else if ((needs & CONTEXT) == CONTEXT && ctx->sticky) code = ctx->sticky;
    else if (needs & UNSAFE) code = check_unsafe();
}

call::~call()
{
    host_log(name, stream_number, capture_state, code);
}

int driver_version()
{
    return drv().initialised ? drv().version : atoi(host_env("MOE_EMU_DRIVER_VERSION", "13000").c_str());
}

static size_t device_bytes()
{
    return strtoull(host_env("MOE_EMU_MEMORY", "8589934592").c_str(), nullptr, 10);
}

// Kernels' shared objects look the engine's functions up in this library, which the program opened for itself alone.
static void publish_symbols()
{
    Dl_info info;
    if (dladdr((void *)publish_symbols, &info)) dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL);
}

static std::string leaks_now();

static void report_leaks()
{
    std::lock_guard<std::recursive_mutex> guard(drv().lock);
    std::string text = leaks_now();
    if (!text.empty() && host_env("MOE_EMU_LEAKS", "1") != "0") host_report("emu: leaked at exit:\n" + text);
}

static void configure(driver &d)
{
    d.version = atoi(host_env("MOE_EMU_DRIVER_VERSION", "13000").c_str());
    if (!d.contexts.empty()) return;
    d.sms = atoi(host_env("MOE_EMU_SMS", "6").c_str());
    std::vector<std::string> chips = host_split(host_env("MOE_EMU_DEVICES", "90"), ',');
    if (chips.size() == 1 && chips[0] == "none") chips.clear();
    for (auto &dev : d.devices) emu_device_destroy(dev->engine);
    d.devices.clear();
    for (const std::string &chip : chips) {
        int capability = atoi(chip.c_str());
        emu_device *engine = emu_device_create(capability, d.sms);
        if (!engine) {
            host_report("MOE_EMU_DEVICES: no chip has compute capability " + chip + "\n");
            continue;
        }
        d.devices.emplace_back(new device{ (int)d.devices.size(), capability, engine, nullptr, 0, 0 });
    }
}

EMU_API CUresult cuInit(unsigned flags)
{
    driver &d = drv();
    {
        std::lock_guard<std::recursive_mutex> guard(d.lock);
        host_read_settings();
    }
    call c("cuInit", call::ANY);
    if (c.code) return c.code;
    if (flags) return c(CUDA_ERROR_INVALID_VALUE);
    configure(d);
    if (!d.initialised) {
        publish_symbols();
        atexit(report_leaks);
    }
    d.initialised = true;
    return c(d.devices.empty() ? CUDA_ERROR_NO_DEVICE : CUDA_SUCCESS);
}

EMU_API CUresult cuDriverGetVersion(int *version)
{
    call c("cuDriverGetVersion", call::ANY);
    if (c.code) return c.code;
    if (!version) return c(CUDA_ERROR_INVALID_VALUE);
    *version = driver_version();
    return CUDA_SUCCESS;
}

// ---- devices --------------------------------------------------------------------------------------------------------

namespace {

// Per compute capability: shared memory of a multiprocessor in KB, its threads, its blocks, L2 in MB.
struct chip_facts {
    int capability, smem_kb, threads, blocks, l2_mb;
};
const chip_facts all_chips[] = {
    { 75, 64, 1024, 16, 4 },    { 80, 164, 2048, 32, 40 },  { 86, 100, 1536, 16, 6 },   { 87, 164, 1536, 16, 4 },
    { 89, 100, 1536, 24, 48 },  { 90, 228, 2048, 32, 50 },  { 100, 228, 2048, 32, 126 }, { 103, 228, 2048, 32, 126 },
    { 110, 228, 1536, 24, 32 }, { 120, 100, 1536, 24, 96 }, { 121, 100, 1536, 24, 24 }
};

const chip_facts &facts(int capability)
{
    for (const chip_facts &f : all_chips)
        if (f.capability == capability) return f;
    return all_chips[5];
}

int reserved_smem(int capability)
{
    return capability < 80 ? 0 : 1024;
}

int optin_smem(int capability)
{
    return facts(capability).smem_kb * 1024 - reserved_smem(capability);
}

device *device_of(CUdevice ordinal)
{
    driver &d = drv();
    return ordinal >= 0 && (size_t)ordinal < d.devices.size() ? d.devices[(size_t)ordinal].get() : nullptr;
}

// Attributes that an engine asks for. Others are 0, as on a chip without the feature.
int attribute(const device &dev, int id)
{
    const chip_facts &f = facts(dev.capability);
    switch (id) {
    case 1: return 1024;                                // threads per block
    case 2: case 3: return 1024;                        // block dimensions
    case 4: return 64;
    case 5: return 2147483647;                          // grid dimensions
    case 6: case 7: return 65535;
    case 8: return 48 * 1024;                           // shared memory per block
    case 9: return 65536;                               // constant memory
    case 10: return 32;                                 // warp
    case 12: case 82: return 65536;                     // registers per block, per multiprocessor
    case 13: return 1755000;                            // clock, kHz
    case 16: return drv().sms;
    case 19: case 31: case 41: case 78: case 83: case 95: case 99: return 1;
    case 36: return 2619000;                            // memory clock, kHz
    case 37: return 5120;                               // bus width
    case 38: return f.l2_mb << 20;
    case 39: return f.threads;
    case 40: return 2;                                  // copy engines
    case 75: return dev.capability / 10;
    case 76: return dev.capability % 10;
    case 81: return f.smem_kb * 1024;                   // shared memory per multiprocessor
    case 91: return 1;                                  // registered host pointers are device pointers
    case 97: return optin_smem(dev.capability);
    case 106: return f.blocks;
    case 111: return reserved_smem(dev.capability);
    case 115: return 1;                                 // cuMemAllocAsync
    case 120: return dev.capability >= 90;              // clusters
    case 127: return dev.capability >= 90;              // tensor maps
    default: return 0;
    }
}

} // namespace

EMU_API CUresult cuDeviceGetCount(int *count)
{
    call c("cuDeviceGetCount", call::INIT);
    if (c.code) return c.code;
    if (!count) return c(CUDA_ERROR_INVALID_VALUE);
    *count = (int)drv().devices.size();
    return CUDA_SUCCESS;
}

EMU_API CUresult cuDeviceGet(CUdevice *dev, int ordinal)
{
    call c("cuDeviceGet", call::INIT);
    if (c.code) return c.code;
    if (!dev) return c(CUDA_ERROR_INVALID_VALUE);
    if (!device_of(ordinal)) return c(CUDA_ERROR_INVALID_DEVICE);
    *dev = ordinal;
    return CUDA_SUCCESS;
}

EMU_API CUresult cuDeviceGetName(char *name, int bytes, CUdevice ordinal)
{
    call c("cuDeviceGetName", call::INIT);
    if (c.code) return c.code;
    device *dev = device_of(ordinal);
    if (!name || bytes <= 0) return c(CUDA_ERROR_INVALID_VALUE);
    if (!dev) return c(CUDA_ERROR_INVALID_DEVICE);
    snprintf(name, (size_t)bytes, "Emulated device %d.%d", dev->capability / 10, dev->capability % 10);
    return CUDA_SUCCESS;
}

static CUresult device_uuid(const char *function, CUuuid *uuid, CUdevice ordinal)
{
    call c(function, call::INIT);
    if (c.code) return c.code;
    device *dev = device_of(ordinal);
    if (!uuid) return c(CUDA_ERROR_INVALID_VALUE);
    if (!dev) return c(CUDA_ERROR_INVALID_DEVICE);
    memcpy(uuid->bytes, "emulated device ", 16);
    uuid->bytes[15] = (char)('0' + ordinal);
    return CUDA_SUCCESS;
}

EMU_API CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice ordinal)
{
    return device_uuid("cuDeviceGetUuid", uuid, ordinal);
}

EMU_API CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice ordinal)
{
    return device_uuid("cuDeviceGetUuid", uuid, ordinal);
}

EMU_API CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice ordinal)
{
    call c("cuDeviceTotalMem", call::INIT);
    if (c.code) return c.code;
    if (!bytes) return c(CUDA_ERROR_INVALID_VALUE);
    if (!device_of(ordinal)) return c(CUDA_ERROR_INVALID_DEVICE);
    *bytes = device_bytes();
    return CUDA_SUCCESS;
}

EMU_API CUresult cuDeviceGetAttribute(int *value, int id, CUdevice ordinal)
{
    call c("cuDeviceGetAttribute", call::INIT);
    if (c.code) return c.code;
    device *dev = device_of(ordinal);
    if (!value || id < 1) return c(CUDA_ERROR_INVALID_VALUE);
    if (!dev) return c(CUDA_ERROR_INVALID_DEVICE);
    *value = attribute(*dev, id);
    return CUDA_SUCCESS;
}

EMU_API CUresult cuDeviceGetPCIBusId(char *text, int bytes, CUdevice ordinal)
{
    call c("cuDeviceGetPCIBusId", call::INIT);
    if (c.code) return c.code;
    if (!text || bytes <= 0) return c(CUDA_ERROR_INVALID_VALUE);
    if (!device_of(ordinal)) return c(CUDA_ERROR_INVALID_DEVICE);
    snprintf(text, (size_t)bytes, "0000:%02x:00.0", 1 + ordinal);
    return CUDA_SUCCESS;
}

// ---- contexts -------------------------------------------------------------------------------------------------------

static CUctx_st *make_context(device *dev, unsigned flags)
{
    CUctx_st *ctx = new CUctx_st;
    ctx->dev = dev;
    ctx->flags = flags;
    ctx->legacy = create_stream(ctx, 0, 0);
    ctx->streams.erase(ctx->legacy);
    ctx->legacy->number = -1;
    drv().contexts.insert(ctx);
    return ctx;
}

static void unload(CUmod_st *m)
{
    m->ctx->modules.erase(m);
    dlclose(m->object);
    delete m;
}

// What the context still owns goes with it, and is remembered as leaked: hardware would free it silently.
static void destroy_context(CUctx_st *ctx)
{
    driver &d = drv();
    if (!ctx->sticky) wait_for_all(ctx);
    std::string where = " of a context that was destroyed";
    for (CUmod_st *m : ctx->modules)
        d.leaks.push_back("module with " + std::to_string(m->functions.size()) + " functions" + where);
    while (!ctx->modules.empty()) unload(*ctx->modules.begin());
    for (CUevent_st *e : ctx->events) { d.leaks.push_back("event" + where); delete e; }
    for (CUstream_st *s : ctx->streams)
        if (s->number > 0) d.leaks.push_back("stream " + std::to_string(s->number) + where);
    destroy_context_streams(ctx);
    for (auto i = d.memory.begin(); i != d.memory.end();) {
        if (i->second.ctx != ctx) { ++i; continue; }
        d.leaks.push_back("allocation of " + std::to_string(i->second.bytes) + " bytes" + where);
        emu_free(ctx->dev->engine, (void *)i->first);
        i = d.memory.erase(i);
    }
    d.contexts.erase(ctx);
    forget_pending(ctx);
    if (ctx->sticky) emu_device_recover(ctx->dev->engine);
    if (ctx->dev->primary == ctx) ctx->dev->primary = nullptr;
    delete ctx;
}

EMU_API CUresult cuDevicePrimaryCtxRetain(CUcontext *out, CUdevice ordinal)
{
    call c("cuDevicePrimaryCtxRetain", call::INIT);
    if (c.code) return c.code;
    device *dev = device_of(ordinal);
    if (!out) return c(CUDA_ERROR_INVALID_VALUE);
    if (!dev) return c(CUDA_ERROR_INVALID_DEVICE);
    if (!dev->primary) {
        dev->primary = make_context(dev, dev->flags);
        dev->primary->is_primary = true;
    }
    dev->retained++;
    *out = dev->primary;
    return CUDA_SUCCESS;
}

EMU_API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice ordinal)
{
    call c("cuDevicePrimaryCtxRelease", call::INIT);
    if (c.code) return c.code;
    device *dev = device_of(ordinal);
    if (!dev) return c(CUDA_ERROR_INVALID_DEVICE);
    if (!dev->retained) return c(CUDA_ERROR_INVALID_CONTEXT);
    if (--dev->retained == 0 && dev->primary) destroy_context(dev->primary);
    return CUDA_SUCCESS;
}

EMU_API CUresult cuDevicePrimaryCtxReset_v2(CUdevice ordinal)
{
    call c("cuDevicePrimaryCtxReset", call::INIT);
    if (c.code) return c.code;
    device *dev = device_of(ordinal);
    if (!dev) return c(CUDA_ERROR_INVALID_DEVICE);
    if (dev->primary) destroy_context(dev->primary);
    dev->retained = 0;
    return CUDA_SUCCESS;
}

EMU_API CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice ordinal, unsigned flags)
{
    call c("cuDevicePrimaryCtxSetFlags", call::INIT);
    if (c.code) return c.code;
    device *dev = device_of(ordinal);
    if (!dev) return c(CUDA_ERROR_INVALID_DEVICE);
    dev->flags = flags;
    if (dev->primary) dev->primary->flags = flags;
    return CUDA_SUCCESS;
}

EMU_API CUresult cuDevicePrimaryCtxGetState(CUdevice ordinal, unsigned *flags, int *active)
{
    call c("cuDevicePrimaryCtxGetState", call::INIT);
    if (c.code) return c.code;
    device *dev = device_of(ordinal);
    if (!flags || !active) return c(CUDA_ERROR_INVALID_VALUE);
    if (!dev) return c(CUDA_ERROR_INVALID_DEVICE);
    *flags = dev->flags;
    *active = dev->primary != nullptr;
    return CUDA_SUCCESS;
}

static CUresult create_context(CUcontext *out, unsigned flags, CUdevice ordinal)
{
    call c("cuCtxCreate", call::INIT);
    if (c.code) return c.code;
    device *dev = device_of(ordinal);
    if (!out) return c(CUDA_ERROR_INVALID_VALUE);
    if (!dev) return c(CUDA_ERROR_INVALID_DEVICE);
    *out = make_context(dev, flags);
    context_stack.push_back(*out);
    return CUDA_SUCCESS;
}

EMU_API CUresult cuCtxCreate_v2(CUcontext *out, unsigned flags, CUdevice ordinal)
{
    return create_context(out, flags, ordinal);
}

EMU_API CUresult cuCtxCreate_v4(CUcontext *out, void *params, unsigned flags, CUdevice ordinal)
{
    return params ? CUDA_ERROR_NOT_SUPPORTED : create_context(out, flags, ordinal);
}

EMU_API CUresult cuCtxDestroy_v2(CUcontext ctx)
{
    call c("cuCtxDestroy", call::INIT);
    if (c.code) return c.code;
    if (!drv().contexts.count(ctx) || ctx->is_primary) return c(CUDA_ERROR_INVALID_CONTEXT);
    if (current_context() == ctx) context_stack.pop_back();
    destroy_context(ctx);
    return CUDA_SUCCESS;
}

EMU_API CUresult cuCtxPushCurrent_v2(CUcontext ctx)
{
    call c("cuCtxPushCurrent", call::INIT);
    if (c.code) return c.code;
    if (!drv().contexts.count(ctx)) return c(CUDA_ERROR_INVALID_CONTEXT);
    context_stack.push_back(ctx);
    return CUDA_SUCCESS;
}

EMU_API CUresult cuCtxPopCurrent_v2(CUcontext *ctx)
{
    call c("cuCtxPopCurrent", call::INIT);
    if (c.code) return c.code;
    if (context_stack.empty()) return c(CUDA_ERROR_INVALID_CONTEXT);
    if (ctx) *ctx = context_stack.back();
    context_stack.pop_back();
    return CUDA_SUCCESS;
}

EMU_API CUresult cuCtxSetCurrent(CUcontext ctx)
{
    call c("cuCtxSetCurrent", call::INIT);
    if (c.code) return c.code;
    if (ctx && !drv().contexts.count(ctx)) return c(CUDA_ERROR_INVALID_CONTEXT);
    if (!context_stack.empty()) context_stack.pop_back();
    if (ctx) context_stack.push_back(ctx);
    return CUDA_SUCCESS;
}

EMU_API CUresult cuCtxGetCurrent(CUcontext *ctx)
{
    call c("cuCtxGetCurrent", call::INIT);
    if (c.code) return c.code;
    if (!ctx) return c(CUDA_ERROR_INVALID_VALUE);
    *ctx = current_context();
    return CUDA_SUCCESS;
}

EMU_API CUresult cuCtxGetDevice(CUdevice *ordinal)
{
    call c("cuCtxGetDevice", call::CONTEXT);
    if (c.code) return c.code;
    if (!ordinal) return c(CUDA_ERROR_INVALID_VALUE);
    *ordinal = c.ctx->dev->ordinal;
    return CUDA_SUCCESS;
}

EMU_API CUresult cuCtxGetApiVersion(CUcontext ctx, unsigned *version)
{
    call c("cuCtxGetApiVersion", call::INIT);
    if (c.code) return c.code;
    if (!version) return c(CUDA_ERROR_INVALID_VALUE);
    if (ctx && !drv().contexts.count(ctx)) return c(CUDA_ERROR_INVALID_CONTEXT);
    *version = 3020;
    return CUDA_SUCCESS;
}

EMU_API CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest)
{
    call c("cuCtxGetStreamPriorityRange", call::CONTEXT);
    if (c.code) return c.code;
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return CUDA_SUCCESS;
}

EMU_API CUresult cuCtxSynchronize(void)
{
    call c("cuCtxSynchronize", call::CONTEXT | call::UNSAFE);
    if (c.code) return c.code;
    return c(wait_for_all(c.ctx));
}

// ---- memory ---------------------------------------------------------------------------------------------------------

namespace {

size_t device_bytes_used(const device *dev)
{
    size_t used = 0;
    for (const auto &m : drv().memory)
        if (m.second.kind == allocation::DEVICE && m.second.ctx->dev == dev) used += m.second.bytes;
    return used;
}

CUresult allocate(CUctx_st *ctx, size_t bytes, enum allocation::kind kind, void **out)
{
    if (!out || !bytes) return CUDA_ERROR_INVALID_VALUE;
    if (kind == allocation::DEVICE && bytes > device_bytes() - std::min(device_bytes(), device_bytes_used(ctx->dev)))
        return CUDA_ERROR_OUT_OF_MEMORY;
    void *p = emu_alloc(ctx->dev->engine, bytes, kind == allocation::HOST);
    if (!p) return CUDA_ERROR_OUT_OF_MEMORY;
    drv().memory[(uintptr_t)p] = { ctx, bytes, kind };
    drv().freed.erase((uintptr_t)p);
    *out = p;
    return CUDA_SUCCESS;
}

// Queued work that still uses the memory is the caller's error, which the engine reports when the work runs. (Hardware
// happens to wait in cuMemFree; the manual of CUDA does not promise it.)
CUresult release(void *p, enum allocation::kind kind)
{
    auto found = drv().memory.find((uintptr_t)p);
    if (found == drv().memory.end() || found->second.kind != kind) return CUDA_ERROR_INVALID_VALUE;
    if (kind == allocation::REGISTERED) emu_host_unregister(found->second.ctx->dev->engine, p);
    else emu_free(found->second.ctx->dev->engine, p);
    if (kind == allocation::DEVICE) drv().freed[(uintptr_t)p] = found->second.bytes;
    drv().memory.erase(found);
    return CUDA_SUCCESS;
}

std::map<uintptr_t, allocation>::iterator range_of(uintptr_t address)
{
    auto &memory = drv().memory;
    auto i = memory.upper_bound(address);
    if (i == memory.begin()) return memory.end();
    --i;
    return address - i->first < i->second.bytes ? i : memory.end();
}

} // namespace

EMU_API CUresult cuMemAlloc_v2(CUdeviceptr *out, size_t bytes)
{
    call c("cuMemAlloc", call::CONTEXT | call::UNSAFE);
    if (c.code) return c.code;
    return c(allocate(c.ctx, bytes, allocation::DEVICE, (void **)out));
}

EMU_API CUresult cuMemFree_v2(CUdeviceptr p)
{
    call c("cuMemFree", call::CONTEXT | call::UNSAFE);
    if (c.code) return c.code;
    return c(p ? release((void *)p, allocation::DEVICE) : CUDA_SUCCESS);
}

EMU_API CUresult cuMemAllocAsync(CUdeviceptr *out, size_t bytes, CUstream stream)
{
    call c("cuMemAllocAsync", call::CONTEXT);
    CUstream_st *s = c.stream(stream);
    if (!s) return c.code;
    if (s->cap) return c(CUDA_ERROR_NOT_SUPPORTED);     // allocation nodes
    return c(allocate(c.ctx, bytes, allocation::DEVICE, (void **)out));
}

EMU_API CUresult cuMemFreeAsync(CUdeviceptr p, CUstream stream)
{
    call c("cuMemFreeAsync", call::CONTEXT);
    CUstream_st *s = c.stream(stream);
    if (!s) return c.code;
    if (s->cap) return c(CUDA_ERROR_NOT_SUPPORTED);
    auto found = drv().memory.find((uintptr_t)p);
    if (found == drv().memory.end() || found->second.kind != allocation::DEVICE) return c(CUDA_ERROR_INVALID_VALUE);
    drv().memory.erase(found);
    struct freed { emu_device *engine; void *p; };
    auto f = std::make_shared<freed>(freed{ s->ctx->dev->engine, (void *)p });
    work w;
    w.kind = WORK_HOST;
    w.call = [](void *data) { emu_free(((freed *)data)->engine, ((freed *)data)->p); };
    w.data = f.get();
    w.keeps = f;
    return c(enqueue(s, w));
}

EMU_API CUresult cuMemHostAlloc(void **out, size_t bytes, unsigned)
{
    call c("cuMemHostAlloc", call::CONTEXT | call::UNSAFE);
    if (c.code) return c.code;
    return c(allocate(c.ctx, bytes, allocation::HOST, out));
}

EMU_API CUresult cuMemAllocHost_v2(void **out, size_t bytes)
{
    call c("cuMemAllocHost", call::CONTEXT | call::UNSAFE);
    if (c.code) return c.code;
    return c(allocate(c.ctx, bytes, allocation::HOST, out));
}

EMU_API CUresult cuMemFreeHost(void *p)
{
    call c("cuMemFreeHost", call::CONTEXT | call::UNSAFE);
    if (c.code) return c.code;
    return c(p ? release(p, allocation::HOST) : CUDA_SUCCESS);
}

EMU_API CUresult cuMemHostRegister_v2(void *p, size_t bytes, unsigned)
{
    call c("cuMemHostRegister", call::CONTEXT | call::UNSAFE);
    if (c.code) return c.code;
    if (!p || !bytes) return c(CUDA_ERROR_INVALID_VALUE);
    if (range_of((uintptr_t)p) != drv().memory.end()) return c(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
    emu_host_register(c.ctx->dev->engine, p, bytes);
    drv().memory[(uintptr_t)p] = { c.ctx, bytes, allocation::REGISTERED };
    return CUDA_SUCCESS;
}

EMU_API CUresult cuMemHostUnregister(void *p)
{
    call c("cuMemHostUnregister", call::CONTEXT | call::UNSAFE);
    if (c.code) return c.code;
    return c(release(p, allocation::REGISTERED) ? CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED : CUDA_SUCCESS);
}

EMU_API CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *out, void *p, unsigned)
{
    call c("cuMemHostGetDevicePointer", call::CONTEXT);
    if (c.code) return c.code;
    auto found = range_of((uintptr_t)p);
    if (!out || found == drv().memory.end() || found->second.kind == allocation::DEVICE)
        return c(CUDA_ERROR_INVALID_VALUE);
    *out = (CUdeviceptr)p;
    return CUDA_SUCCESS;
}

EMU_API CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total)
{
    call c("cuMemGetInfo", call::CONTEXT);
    if (c.code) return c.code;
    if (!free_bytes || !total) return c(CUDA_ERROR_INVALID_VALUE);
    *total = device_bytes();
    *free_bytes = *total - std::min(*total, device_bytes_used(c.ctx->dev));
    return CUDA_SUCCESS;
}

EMU_API CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *bytes, CUdeviceptr p)
{
    call c("cuMemGetAddressRange", call::CONTEXT);
    if (c.code) return c.code;
    auto found = range_of(p);
    if (found == drv().memory.end()) return c(CUDA_ERROR_NOT_FOUND);
    if (base) *base = found->first;
    if (bytes) *bytes = found->second.bytes;
    return CUDA_SUCCESS;
}

namespace {

// False: the attribute does not exist here. Ordinary host memory has none of them but the type (0).
bool pointer_attribute(void *out, int id, CUdeviceptr p)
{
    auto found = range_of(p);
    bool known = found != drv().memory.end();
    bool on_device = known && found->second.kind == allocation::DEVICE;
    unsigned number = 0;
    switch (id) {
    case 1: *(CUcontext *)out = known ? found->second.ctx : nullptr; return known;
    case 2: number = on_device ? CU_MEMORYTYPE_DEVICE : known ? CU_MEMORYTYPE_HOST : 0; break;
    case 3: *(CUdeviceptr *)out = known ? p : 0; return known;
    case 4: *(CUdeviceptr *)out = known && !on_device ? p : 0; return known && !on_device;
    case 8: known = true; break;
    case 9: number = known ? (unsigned)found->second.ctx->dev->ordinal : (unsigned)-2; break;
    case 11: *(CUdeviceptr *)out = known ? found->first : 0; return known;
    case 12: *(size_t *)out = known ? found->second.bytes : 0; return known;
    case 13: number = known; known = true; break;
    default: return false;
    }
    *(unsigned *)out = number;
    return known;
}

} // namespace

EMU_API CUresult cuPointerGetAttribute(void *out, int id, CUdeviceptr p)
{
    call c("cuPointerGetAttribute", call::CONTEXT);
    if (c.code) return c.code;
    return c(out && pointer_attribute(out, id, p) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE);
}

EMU_API CUresult cuPointerGetAttributes(unsigned count, const int *ids, void **out, CUdeviceptr p)
{
    call c("cuPointerGetAttributes", call::CONTEXT);
    if (c.code) return c.code;
    if (!count || !ids || !out) return c(CUDA_ERROR_INVALID_VALUE);
    for (unsigned i = 0; i < count; i++) pointer_attribute(out[i], ids[i], p);
    return CUDA_SUCCESS;
}

// ---- modules and functions ------------------------------------------------------------------------------------------

namespace {

// Embedded PTX is compute_80 text for a real driver's compiler. Here it is compiled from the kernel text it came from.
CUresult compile_embedded(const host_image &image, std::string *object)
{
    std::string path = host_env("MOE_EMU_PTX_SOURCE", ""), text, log;
    if (path.empty() || image.defines.empty()) return CUDA_ERROR_JIT_COMPILER_NOT_FOUND;
    FILE *f = fopen(path.c_str(), "rb");
    if (!f) return CUDA_ERROR_JIT_COMPILER_NOT_FOUND;
    char block[65536];
    for (size_t n; (n = fread(block, 1, sizeof block, f)) > 0;) text.append(block, n);
    fclose(f);
    if (host_compile("embedded.ptx", text, image.defines, image.chip, object, &log)) return CUDA_SUCCESS;
    host_report("emu: embedded PTX: " + log + "\n");
    return CUDA_ERROR_INVALID_PTX;
}

// A cubin runs on chips of its major number from its minor on; 'a' on that chip alone, 'f' on its family. PTX runs on
// every later chip unless it is for 'a' or 'f'.
bool runs_on(const host_image &image, int capability)
{
    const host_chip &chip = image.chip;
    if (chip.variant == 'a') return chip.major_minor == capability;
    if (image.kind == HOST_IMAGE_CUBIN || chip.variant == 'f')
        return chip.major_minor / 10 == capability / 10 && chip.major_minor <= capability;
    return chip.major_minor <= capability;
}

// Opens the image as a library of its own: a new file each time, so that two modules never share a thing. Not a file in
// memory: its only path is in /proc, which a bare root lacks.
void *open_object(const std::string &object)
{
    const char *folder = getenv("TMPDIR");
    std::string path = std::string(folder && *folder ? folder : "/tmp") + "/moe_emu_XXXXXX";
    int file = mkostemp(&path[0], O_CLOEXEC);
    if (file < 0) {
        host_report("emu: module: " + path + ": " + strerror(errno) + "\n");
        return nullptr;
    }
    void *handle = nullptr;
    if (write(file, object.data(), object.size()) == (ssize_t)object.size())
        handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        const char *reason = dlerror();
        host_report(std::string("emu: module: ") + (reason ? reason : "cannot be written") + "\n");
    }
    unlink(path.c_str());
    close(file);
    return handle;
}

CUresult load(CUctx_st *ctx, const void *bytes, CUmodule *out)
{
    if (!bytes || !out) return CUDA_ERROR_INVALID_VALUE;
    host_image image = host_parse_image(bytes);
    bool is_ptx = image.kind == HOST_IMAGE_PTX || image.kind == HOST_IMAGE_PTX_TEXT;
    if (image.kind == HOST_IMAGE_BAD) return CUDA_ERROR_INVALID_IMAGE;
    if (is_ptx && image.ptx_version > host_ptx_version(drv().version)) return CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
    if (!runs_on(image, ctx->dev->capability)) return is_ptx ? CUDA_ERROR_INVALID_PTX : CUDA_ERROR_NO_BINARY_FOR_GPU;
    if (image.kind == HOST_IMAGE_PTX_TEXT)
        if (CUresult r = compile_embedded(image, &image.shared_object)) return r;
    void *object = open_object(image.shared_object);
    if (!object) return CUDA_ERROR_INVALID_IMAGE;
    CUmod_st *m = new CUmod_st;
    m->ctx = ctx;
    m->object = object;
    m->chip = image.chip;
    ctx->modules.insert(m);
    *out = m;
    return CUDA_SUCCESS;
}

bool is_module(CUmod_st *m)
{
    for (CUctx_st *ctx : drv().contexts)
        if (ctx->modules.count(m)) return true;
    return false;
}

CUresult get_function(CUmod_st *m, const char *name, CUfunction *out)
{
    if (!out || !name) return CUDA_ERROR_INVALID_VALUE;
    if (!is_module(m)) return CUDA_ERROR_INVALID_HANDLE;
    auto &slot = m->functions[name];
    if (!slot) {
        const void *kernel = dlsym(m->object, (std::string(name) + "__emu").c_str());
        if (!kernel) {
            m->functions.erase(name);
            return CUDA_ERROR_NOT_FOUND;
        }
        slot.reset(new CUfunc_st);
        slot->module = m;
        slot->kernel = (const emu_kernel *)kernel;
        slot->name = name;
    }
    *out = slot.get();
    return CUDA_SUCCESS;
}

// Hardware would run code that is gone. Here that is reported and the module stays.
CUresult unload_checked(CUmod_st *m)
{
    const char *user = nullptr;
    if (!is_module(m)) return CUDA_ERROR_INVALID_HANDLE;
    for (CUgraphExec_st *e : drv().execs)
        if (graph_uses(e->graph.get(), m)) user = "a graph that can still be launched";
    for (const op_ptr &o : m->ctx->pending)
        if (!o->ended && o->function && o->function->module == m) user = "a kernel that has not run";
    if (user) {
        host_report(std::string("emu: cuModuleUnload: ") + user + " is of this module\n");
        return m->ctx->sticky = CUDA_ERROR_LAUNCH_FAILED;
    }
    unload(m);
    return CUDA_SUCCESS;
}

} // namespace

EMU_API CUresult cuModuleLoadData(CUmodule *out, const void *image)
{
    call c("cuModuleLoadData", call::CONTEXT | call::UNSAFE);
    if (c.code) return c.code;
    return c(load(c.ctx, image, out));
}

EMU_API CUresult cuModuleLoadDataEx(CUmodule *out, const void *image, unsigned, int *, void **)
{
    call c("cuModuleLoadDataEx", call::CONTEXT | call::UNSAFE);
    if (c.code) return c.code;
    return c(load(c.ctx, image, out));
}

EMU_API CUresult cuModuleUnload(CUmodule m)
{
    call c("cuModuleUnload", call::CONTEXT | call::UNSAFE);
    if (c.code) return c.code;
    return c(unload_checked(m));
}

EMU_API CUresult cuModuleGetFunction(CUfunction *out, CUmodule m, const char *name)
{
    call c("cuModuleGetFunction", call::CONTEXT);
    if (c.code) return c.code;
    return c(get_function(m, name, out));
}

// Kernel text has no global variables.
EMU_API CUresult cuModuleGetGlobal_v2(CUdeviceptr *, size_t *, CUmodule m, const char *)
{
    call c("cuModuleGetGlobal", call::CONTEXT);
    if (c.code) return c.code;
    return c(is_module(m) ? CUDA_ERROR_NOT_FOUND : CUDA_ERROR_INVALID_HANDLE);
}

bool is_function(CUfunc_st *f)
{
    for (CUctx_st *ctx : drv().contexts)
        for (CUmod_st *m : ctx->modules)
            for (const auto &entry : m->functions)
                if (entry.second.get() == f) return true;
    return false;
}

// No registers here: as many as the launch bounds leave, at most 128.
static int registers(const CUfunc_st *f)
{
    int n = 65536 / (int)(f->kernel->threads * std::max(1u, f->kernel->min_ctas)) / 8 * 8;
    return std::min(128, n);
}

static int function_attribute(const CUfunc_st *f, int id)
{
    int chip = f->module->chip.major_minor;
    switch (id) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return (int)f->kernel->threads;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: return registers(f);
    case CU_FUNC_ATTRIBUTE_PTX_VERSION: case CU_FUNC_ATTRIBUTE_BINARY_VERSION: return chip;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: return f->max_dynamic_smem;
    case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT: return -1;
    case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED: return f->non_portable_cluster;
    default: return 0;
    }
}

EMU_API CUresult cuFuncGetAttribute(int *value, int id, CUfunction f)
{
    call c("cuFuncGetAttribute", call::CONTEXT);
    if (c.code) return c.code;
    if (!value || id < 0 || id > 15) return c(CUDA_ERROR_INVALID_VALUE);
    if (!is_function(f)) return c(CUDA_ERROR_INVALID_HANDLE);
    *value = function_attribute(f, id);
    return CUDA_SUCCESS;
}

EMU_API CUresult cuFuncSetAttribute(CUfunction f, int id, int value)
{
    call c("cuFuncSetAttribute", call::CONTEXT);
    if (c.code) return c.code;
    if (!is_function(f)) return c(CUDA_ERROR_INVALID_HANDLE);
    switch (id) {
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
        if (value < 0 || value > optin_smem(c.ctx->dev->capability)) return c(CUDA_ERROR_INVALID_VALUE);
        f->max_dynamic_smem = value;
        return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED:
        f->non_portable_cluster = value;
        return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
    case CU_FUNC_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE:
        return CUDA_SUCCESS;
    default:
        return c(CUDA_ERROR_INVALID_VALUE);
    }
}

EMU_API CUresult cuFuncSetCacheConfig(CUfunction f, int)
{
    call c("cuFuncSetCacheConfig", call::CONTEXT);
    if (c.code) return c.code;
    return c(is_function(f) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE);
}

EMU_API CUresult cuFuncGetName(const char **name, CUfunction f)
{
    call c("cuFuncGetName", call::CONTEXT);
    if (c.code) return c.code;
    if (!name) return c(CUDA_ERROR_INVALID_VALUE);
    if (!is_function(f)) return c(CUDA_ERROR_INVALID_HANDLE);
    *name = f->name.c_str();
    return CUDA_SUCCESS;
}

EMU_API CUresult cuFuncGetModule(CUmodule *m, CUfunction f)
{
    call c("cuFuncGetModule", call::CONTEXT);
    if (c.code) return c.code;
    if (!m) return c(CUDA_ERROR_INVALID_VALUE);
    if (!is_function(f)) return c(CUDA_ERROR_INVALID_HANDLE);
    *m = f->module;
    return CUDA_SUCCESS;
}

EMU_API CUresult cuFuncLoad(CUfunction f)
{
    call c("cuFuncLoad", call::CONTEXT | call::UNSAFE);
    if (c.code) return c.code;
    return c(is_function(f) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE);
}

// Every entry has one argument, a struct.
EMU_API CUresult cuFuncGetParamInfo(CUfunction f, size_t index, size_t *offset, size_t *bytes)
{
    call c("cuFuncGetParamInfo", call::CONTEXT);
    if (c.code) return c.code;
    if (!is_function(f)) return c(CUDA_ERROR_INVALID_HANDLE);
    if (!offset || index) return c(CUDA_ERROR_INVALID_VALUE);
    *offset = 0;
    if (bytes) *bytes = f->kernel->args_bytes;
    return CUDA_SUCCESS;
}

// ---- occupancy ------------------------------------------------------------------------------------------------------

static int blocks_per_sm(const CUctx_st *ctx, const CUfunc_st *f, int threads, size_t smem)
{
    int capability = ctx->dev->capability, warps = (threads + 31) / 32;
    const chip_facts &chip = facts(capability);
    int by_threads = chip.threads / (warps * 32), by_registers = 65536 / (registers(f) * warps * 32);
    int by_smem = chip.smem_kb * 1024 / std::max(1, (int)smem + reserved_smem(capability));
    if (smem > (size_t)f->max_dynamic_smem || threads > (int)f->kernel->threads) return 0;
    return std::min(std::min(by_threads, by_registers), std::min(by_smem, chip.blocks));
}

static CUresult occupancy(const char *function, int *blocks, CUfunction f, int threads, size_t smem)
{
    call c(function, call::CONTEXT);
    if (c.code) return c.code;
    if (!blocks || threads <= 0) return c(CUDA_ERROR_INVALID_VALUE);
    if (!is_function(f)) return c(CUDA_ERROR_INVALID_HANDLE);
    *blocks = blocks_per_sm(c.ctx, f, threads, smem);
    return CUDA_SUCCESS;
}

EMU_API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction f, int threads, size_t smem)
{
    return occupancy("cuOccupancyMaxActiveBlocksPerMultiprocessor", blocks, f, threads, smem);
}

EMU_API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, CUfunction f, int threads,
                                                                      size_t smem, unsigned)
{
    return occupancy("cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags", blocks, f, threads, smem);
}

static int cluster_of(const CUlaunchConfig *config)
{
    int size = 1;
    for (unsigned i = 0; i < config->numAttrs; i++)
        if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
            size = (int)(config->attrs[i].value.clusterDim.x * config->attrs[i].value.clusterDim.y *
                         config->attrs[i].value.clusterDim.z);
    return size;
}

EMU_API CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction f, const CUlaunchConfig *config)
{
    call c("cuOccupancyMaxActiveClusters", call::CONTEXT);
    if (c.code) return c.code;
    if (!clusters || !config) return c(CUDA_ERROR_INVALID_VALUE);
    if (!is_function(f)) return c(CUDA_ERROR_INVALID_HANDLE);
    int threads = (int)(config->blockDimX * config->blockDimY * config->blockDimZ), size = cluster_of(config);
    if (size <= 0 || size > 16 || (size > 8 && !f->non_portable_cluster)) return c(CUDA_ERROR_INVALID_CLUSTER_SIZE);
    *clusters = blocks_per_sm(c.ctx, f, threads, config->sharedMemBytes) * drv().sms / size;
    return CUDA_SUCCESS;
}

EMU_API CUresult cuOccupancyMaxPotentialClusterSize(int *size, CUfunction f, const CUlaunchConfig *)
{
    call c("cuOccupancyMaxPotentialClusterSize", call::CONTEXT);
    if (c.code) return c.code;
    if (!size) return c(CUDA_ERROR_INVALID_VALUE);
    if (!is_function(f)) return c(CUDA_ERROR_INVALID_HANDLE);
    *size = c.ctx->dev->capability < 90 ? 1 : f->non_portable_cluster ? 16 : 8;
    return CUDA_SUCCESS;
}

// ---- tensor maps ----------------------------------------------------------------------------------------------------

EMU_API CUresult cuTensorMapEncodeTiled(CUtensorMap *map, int type, uint32_t rank, void *base, const uint64_t *dims,
                                        const uint64_t *strides, const uint32_t *box, const uint32_t *steps,
                                        int interleave, int swizzle, int promotion, int fill)
{
    call c("cuTensorMapEncodeTiled", call::INIT);
    if (c.code) return c.code;
    bool given = map && base && dims && box && steps && (strides || rank == 1);
    bool legal = given && emu_tensor_map_encode(map, type, rank, base, dims, strides, box, steps, interleave, swizzle,
                                                promotion, fill);
    return c(legal ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE);
}

// ---- leaks and the log ----------------------------------------------------------------------------------------------

static std::string leaks_now()
{
    driver &d = drv();
    std::string text;
    for (const std::string &l : d.leaks) text += "  " + l + "\n";
    for (const CUctx_st *ctx : d.contexts) {
        text += ctx->is_primary ? "  primary context, retained " + std::to_string(ctx->dev->retained) + " times\n"
                                : std::string("  context\n");
        for (const CUmod_st *m : ctx->modules) {
            text += "  module";
            for (const auto &f : m->functions) text += " " + f.first;
            text += "\n";
        }
        for (const CUstream_st *s : ctx->streams)
            if (s->number > 0) text += "  stream " + std::to_string(s->number) + "\n";
        for (size_t i = 0; i < ctx->events.size(); i++) text += "  event\n";
    }
    for (const auto &m : d.memory) text += "  allocation of " + std::to_string(m.second.bytes) + " bytes\n";
    for (size_t i = 0; i < d.graphs.size(); i++) text += "  graph\n";
    for (size_t i = 0; i < d.execs.size(); i++) text += "  executable graph\n";
    return text;
}

// Lists what is alive, one a line, and what went with its context since the last list. Returns the number of lines.
EMU_API int emu_leaks(char *text, size_t bytes)
{
    std::lock_guard<std::recursive_mutex> guard(drv().lock);
    std::string all = leaks_now();
    drv().leaks.clear();
    if (bytes) snprintf(text, bytes, "%s", all.c_str());
    return (int)std::count(all.begin(), all.end(), '\n');
}

// Between the two every call of this process's threads is kept, a line each that begins with the function's name.
EMU_API int emu_log_begin(void)
{
    host_log_begin();
    return 0;
}

EMU_API const char *emu_log_end(void)
{
    return host_log_end();
}
