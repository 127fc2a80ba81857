// The emulated driver's streams, events, copies and launches, and the table behind cuGetProcAddress.
#include "driver.h"

#include <dlfcn.h>
#include <string.h>
#include <time.h>

#include <algorithm>

extern thread_local bool in_host_function;

// ---- operations -----------------------------------------------------------------------------------------------------

op::~op()
{
    emu_release(handle);
}

// Calls a host function as hardware does: from where no call of the driver is allowed.
static void host_function(void *data)
{
    const work *w = (const work *)data;
    in_host_function = true;
    w->call(w->data);
    in_host_function = false;
}

static emu_op_desc describe(const work &w)
{
    emu_op_desc d = {};
    static const emu_op_kind kinds[] = { EMU_OP_KERNEL, EMU_OP_COPY, EMU_OP_FILL, EMU_OP_HOST, EMU_OP_EMPTY };
    d.kind = kinds[w.kind];
    d.kernel = w.function ? w.function->kernel : nullptr;
    d.args = w.args.data();
    for (int i = 0; i < 3; i++) {
        d.grid[i] = w.grid[i];
        d.block[i] = w.block[i];
        d.cluster[i] = w.cluster[i];
    }
    d.smem_bytes = w.smem;
    d.dst = w.dst;
    d.src = w.src;
    d.bytes = w.kind == WORK_FILL ? w.bytes * w.width : w.bytes;
    d.value = w.value;
    d.width = w.width;
    return d;
}

// The context holds what an operation needs until it has run, also when its stream or event has moved on.
static void remember(CUctx_st *ctx, const op_ptr &o, const std::vector<op_edge> &before)
{
    auto over = [](const op_ptr &each) { return each->ended; };
    auto &pending = ctx->pending;
    if (pending.size() % 64 == 63)
        pending.erase(std::remove_if(pending.begin(), pending.end(), over), pending.end());
    pending.push_back(o);
    for (const op_edge &e : before)
        if (!e.from->ended) o->before.push_back(e.from);
}

static void mark_ended(const op_ptr &last)
{
    std::vector<op_ptr> next(1, last);
    while (!next.empty()) {
        op_ptr o = next.back();
        next.pop_back();
        if (!o->ended) next.insert(next.end(), o->before.begin(), o->before.end());
        o->ended = true;
        o->before.clear();
    }
}

// From the last on: each is held by those behind it, and their destructors would nest.
void forget_pending(CUctx_st *ctx)
{
    while (!ctx->pending.empty()) ctx->pending.pop_back();
}

op_ptr submit(CUctx_st *ctx, const work &w, const std::vector<op_edge> &before)
{
    emu_op_desc d = describe(w);
    std::vector<emu_op *> from;
    std::vector<unsigned char> programmatic;
    for (const op_edge &e : before) {
        from.push_back(e.from->handle);
        programmatic.push_back(e.programmatic);
    }
    work kept = w;
    if (w.kind == WORK_HOST) {
        auto own = std::make_shared<work>(w);
        d.call = host_function;
        d.data = own.get();
        kept.keeps = own;
    }
    emu_op *handle = emu_submit(ctx->dev->engine, &d, from.data(), programmatic.data(), (int)from.size());
    op_ptr o = std::make_shared<op>(handle, kept);
    remember(ctx, o, before);
    return o;
}

static CUresult code_of(int status)
{
    switch (status) {
    case EMU_OK: return CUDA_SUCCESS;
    case EMU_ILLEGAL_ADDRESS: return CUDA_ERROR_ILLEGAL_ADDRESS;
    case EMU_MISALIGNED: return CUDA_ERROR_MISALIGNED_ADDRESS;
    default: return CUDA_ERROR_LAUNCH_FAILED;
    }
}

CUresult wait_for(CUctx_st *ctx, const op_ptr &o)
{
    CUresult code = o && !o->ended ? code_of(emu_wait(o->handle)) : CUDA_SUCCESS;
    if (code) ctx->sticky = code;
    else if (o) mark_ended(o);
    return ctx->sticky;
}

CUresult wait_for_all(CUctx_st *ctx)
{
    CUresult code = code_of(emu_wait_all(ctx->dev->engine));
    if (code) ctx->sticky = code;
    else for (const op_ptr &o : ctx->pending) o->ended = true;
    return ctx->sticky;
}

// Legacy stream: behind every blocking stream's work. Blocking streams: behind the legacy stream's.
std::vector<op_edge> edges_before(CUstream_st *s, bool programmatic)
{
    std::vector<op_edge> edges;
    if (s->tail) edges.push_back({ s->tail, programmatic && s->tail->function });
    for (const op_ptr &o : s->waits) edges.push_back({ o, false });
    CUstream_st *legacy = s->ctx->legacy;
    if (s == legacy) {
        for (CUstream_st *other : s->ctx->streams)
            if (!(other->flags & CU_STREAM_NON_BLOCKING) && other->tail) edges.push_back({ other->tail, false });
    } else if (!(s->flags & CU_STREAM_NON_BLOCKING) && legacy->tail) {
        edges.push_back({ legacy->tail, false });
    }
    return edges;
}

CUresult set_tail(CUstream_st *s, const op_ptr &o)
{
    s->tail = o;
    s->waits.clear();
    return CUDA_SUCCESS;
}

CUresult enqueue(CUstream_st *s, work w)
{
    if (s->cap) return capture_node(s, w);
    return set_tail(s, submit(s->ctx, w, edges_before(s, w.programmatic)));
}

// ---- streams --------------------------------------------------------------------------------------------------------

CUstream_st *create_stream(CUctx_st *ctx, unsigned flags, int priority)
{
    CUstream_st *s = new CUstream_st;
    s->ctx = ctx;
    s->number = ++drv().last_stream;
    s->flags = flags;
    s->priority = priority;
    ctx->streams.insert(s);
    return s;
}

void destroy_stream(CUstream_st *s)
{
    if (s->cap) end_capture(s->cap);
    s->ctx->streams.erase(s);
    delete s;
}

void destroy_context_streams(CUctx_st *ctx)
{
    while (!ctx->streams.empty()) destroy_stream(*ctx->streams.begin());
    delete ctx->legacy;
}

CUstream_st *call::stream(CUstream handle, bool asks)
{
    if (code) return nullptr;
    CUstream_st *s = handle;
    uintptr_t special = (uintptr_t)handle;
    if (special <= 1) {
        s = ctx->legacy;
        if ((code = check_implicit(ctx, asks))) return nullptr;
    } else if (special == 2) {
        CUstream_st *&own = ctx->per_thread[std::this_thread::get_id()];
        if (!own) {
            own = create_stream(ctx, 0, 0);
            own->number = -2;
        }
        s = own;
    } else {
        bool known = false;
        for (CUctx_st *each : drv().contexts) known = known || each->streams.count(s);
        if (!known) {
            code = CUDA_ERROR_INVALID_HANDLE;
            return nullptr;
        }
    }
    stream_number = s->number;
    capture_state = !s->cap ? 0 : s->cap->invalidated ? 2 : 1;
    return s;
}

EMU_API CUresult cuStreamCreateWithPriority(CUstream *out, unsigned flags, int priority)
{
    call c("cuStreamCreateWithPriority", call::CONTEXT);
    if (c.code) return c.code;
    if (!out || flags > CU_STREAM_NON_BLOCKING) return c(CUDA_ERROR_INVALID_VALUE);
    *out = create_stream(c.ctx, flags, std::min(0, std::max(-5, priority)));
    return CUDA_SUCCESS;
}

EMU_API CUresult cuStreamCreate(CUstream *out, unsigned flags)
{
    call c("cuStreamCreate", call::CONTEXT);
    if (c.code) return c.code;
    if (!out || flags > CU_STREAM_NON_BLOCKING) return c(CUDA_ERROR_INVALID_VALUE);
    *out = create_stream(c.ctx, flags, 0);
    return CUDA_SUCCESS;
}

// Queued work goes on.
EMU_API CUresult cuStreamDestroy_v2(CUstream handle)
{
    call c("cuStreamDestroy", call::CONTEXT);
    CUstream_st *s = (uintptr_t)handle <= 2 ? nullptr : c.stream(handle);
    if (!s) return c.code ? c.code : c(CUDA_ERROR_INVALID_HANDLE);
    destroy_stream(s);
    return CUDA_SUCCESS;
}

EMU_API CUresult cuStreamGetPriority(CUstream handle, int *priority)
{
    call c("cuStreamGetPriority", call::CONTEXT);
    CUstream_st *s = c.stream(handle);
    if (!s) return c.code;
    if (!priority) return c(CUDA_ERROR_INVALID_VALUE);
    *priority = s->priority;
    return CUDA_SUCCESS;
}

EMU_API CUresult cuStreamGetFlags(CUstream handle, unsigned *flags)
{
    call c("cuStreamGetFlags", call::CONTEXT);
    CUstream_st *s = c.stream(handle);
    if (!s) return c.code;
    if (!flags) return c(CUDA_ERROR_INVALID_VALUE);
    *flags = s->flags;
    return CUDA_SUCCESS;
}

EMU_API CUresult cuStreamGetCtx(CUstream handle, CUcontext *ctx)
{
    call c("cuStreamGetCtx", call::CONTEXT);
    CUstream_st *s = c.stream(handle);
    if (!s) return c.code;
    if (!ctx) return c(CUDA_ERROR_INVALID_VALUE);
    *ctx = s->ctx;
    return CUDA_SUCCESS;
}

// A stream's own end: its tail and what it was told to wait for.
static CUresult wait_for_stream(CUstream_st *s)
{
    work nothing;
    set_tail(s, submit(s->ctx, nothing, edges_before(s, false)));
    return wait_for(s->ctx, s->tail);
}

EMU_API CUresult cuStreamSynchronize(CUstream handle)
{
    call c("cuStreamSynchronize", call::CONTEXT);
    CUstream_st *s = c.stream(handle);
    if (!s) return c.code;
    if (CUresult r = check_not_capturing(s)) return c(r);
    if (CUresult r = check_unsafe()) return c(r);
    return c(wait_for_stream(s));
}

// The device works a little each time it is asked.
static CUresult poll(CUctx_st *ctx, const op_ptr &o)
{
    return !o || o->ended || emu_done(o->handle) ? wait_for(ctx, o) : CUDA_ERROR_NOT_READY;
}

EMU_API CUresult cuStreamQuery(CUstream handle)
{
    call c("cuStreamQuery", call::CONTEXT);
    CUstream_st *s = c.stream(handle);
    if (!s) return c.code;
    if (CUresult r = check_not_capturing(s)) return c(r);
    if (CUresult r = check_unsafe()) return c(r);
    return c(poll(s->ctx, s->tail));
}

EMU_API CUresult cuLaunchHostFunc(CUstream handle, CUhostFn function, void *data)
{
    call c("cuLaunchHostFunc", call::CONTEXT);
    CUstream_st *s = c.stream(handle);
    if (!s) return c.code;
    if (!function) return c(CUDA_ERROR_INVALID_VALUE);
    work w;
    w.kind = WORK_HOST;
    w.call = function;
    w.data = data;
    return c(enqueue(s, w));
}

// ---- events ---------------------------------------------------------------------------------------------------------

bool call::event(CUevent e)
{
    if (code) return false;
    for (CUctx_st *each : drv().contexts)
        if (each->events.count(e)) return true;
    code = CUDA_ERROR_INVALID_HANDLE;
    return false;
}

EMU_API CUresult cuEventCreate(CUevent *out, unsigned flags)
{
    call c("cuEventCreate", call::CONTEXT);
    if (c.code) return c.code;
    if (!out || flags > 7) return c(CUDA_ERROR_INVALID_VALUE);
    *out = new CUevent_st;
    (*out)->ctx = c.ctx;
    (*out)->flags = flags;
    c.ctx->events.insert(*out);
    return CUDA_SUCCESS;
}

EMU_API CUresult cuEventDestroy_v2(CUevent e)
{
    call c("cuEventDestroy", call::CONTEXT);
    if (!c.event(e)) return c.code;
    e->ctx->events.erase(e);
    delete e;
    return CUDA_SUCCESS;
}

static void read_clock(void *data)
{
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    ((event_clock *)data)->seconds = (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static CUresult record(const char *function, CUevent e, CUstream handle)
{
    call c(function, call::CONTEXT);
    CUstream_st *s = c.stream(handle);
    if (!s || !c.event(e)) return c.code;
    if (e->ctx != s->ctx) return c(CUDA_ERROR_INVALID_HANDLE);
    if (s->cap) {
        if (s->cap->invalidated) return c(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        e->cap_id = s->cap->id;
        e->cap_nodes = s->cap_deps;
        return CUDA_SUCCESS;
    }
    work w;
    w.kind = e->flags & CU_EVENT_DISABLE_TIMING ? WORK_EMPTY : WORK_HOST;
    e->clock = std::make_shared<event_clock>();
    w.call = read_clock;
    w.data = e->clock.get();
    w.keeps = e->clock;
    enqueue(s, w);
    e->recorded = s->tail;
    e->cap_id = 0;
    return CUDA_SUCCESS;
}

EMU_API CUresult cuEventRecord(CUevent e, CUstream handle)
{
    return record("cuEventRecord", e, handle);
}

EMU_API CUresult cuEventRecordWithFlags(CUevent e, CUstream handle, unsigned)
{
    return record("cuEventRecordWithFlags", e, handle);
}

EMU_API CUresult cuEventSynchronize(CUevent e)
{
    call c("cuEventSynchronize", call::CONTEXT | call::UNSAFE);
    if (!c.event(e)) return c.code;
    return c(e->cap_id ? CUDA_ERROR_CAPTURED_EVENT : wait_for(e->ctx, e->recorded));
}

EMU_API CUresult cuEventQuery(CUevent e)
{
    call c("cuEventQuery", call::CONTEXT | call::UNSAFE);
    if (!c.event(e)) return c.code;
    return c(e->cap_id ? CUDA_ERROR_CAPTURED_EVENT : poll(e->ctx, e->recorded));
}

static CUresult elapsed(float *ms, CUevent a, CUevent b)
{
    call c("cuEventElapsedTime", call::CONTEXT);
    if (!c.event(a) || !c.event(b)) return c.code;
    if (!ms || a->cap_id || b->cap_id) return c(CUDA_ERROR_INVALID_VALUE);
    if (!a->recorded || !b->recorded || ((a->flags | b->flags) & CU_EVENT_DISABLE_TIMING))
        return c(CUDA_ERROR_INVALID_HANDLE);
    if (!a->recorded->ended || !b->recorded->ended) return c(CUDA_ERROR_NOT_READY);
    *ms = (float)(1e3 * (b->clock->seconds - a->clock->seconds));
    return CUDA_SUCCESS;
}

EMU_API CUresult cuEventElapsedTime(float *ms, CUevent a, CUevent b)
{
    return elapsed(ms, a, b);
}

EMU_API CUresult cuEventElapsedTime_v2(float *ms, CUevent a, CUevent b)
{
    return elapsed(ms, a, b);
}

// ---- copies and fills -----------------------------------------------------------------------------------------------

namespace {

bool is_pageable(const void *p)
{
    uintptr_t at = (uintptr_t)p;
    auto i = drv().memory.upper_bound(at);
    if (i != drv().memory.begin() && at - std::prev(i)->first < std::prev(i)->second.bytes) return false;
    auto f = drv().freed.upper_bound(at);
    return f == drv().freed.begin() || at - std::prev(f)->first >= std::prev(f)->second;
}

// An asynchronous copy from pageable memory has taken the bytes when the call returns; one to pageable memory has
// arrived. Pinned memory is read and written when the copy runs. A captured copy reads at every launch.
CUresult copy(CUstream_st *s, void *dst, const void *src, size_t bytes, bool synchronous)
{
    work w;
    w.kind = WORK_COPY;
    w.dst = dst;
    w.src = src;
    w.bytes = bytes;
    if (!bytes) return CUDA_SUCCESS;
    if (!s->cap && is_pageable(src)) {
        auto staged = std::make_shared<std::vector<char>>((const char *)src, (const char *)src + bytes);
        w.src = staged->data();
        w.keeps = staged;
    }
    if (CUresult r = enqueue(s, w)) return r;
    bool returns_late = synchronous || is_pageable(dst);
    return returns_late && !s->cap ? wait_for(s->ctx, s->tail) : CUDA_SUCCESS;
}

CUresult copy_call(const char *function, CUstream handle, uint64_t dst, const void *src, size_t bytes, bool synchronous)
{
    call c(function, call::CONTEXT);
    CUstream_st *s = c.stream(handle);
    if (!s || (synchronous && c(check_unsafe()))) return c.code;
    if (bytes && (!dst || !src)) return c(CUDA_ERROR_INVALID_VALUE);
    return c(copy(s, (void *)dst, src, bytes, synchronous));
}

CUresult fill_call(const char *function, CUstream handle, uint64_t dst, unsigned value, unsigned width, size_t count)
{
    call c(function, call::CONTEXT);
    CUstream_st *s = c.stream(handle);
    if (!s) return c.code;
    if (count && (!dst || dst % width)) return c(CUDA_ERROR_INVALID_VALUE);
    work w;
    w.kind = WORK_FILL;
    w.dst = (void *)dst;
    w.bytes = count;
    w.value = value;
    w.width = width;
    return c(count ? enqueue(s, w) : CUDA_SUCCESS);
}

} // namespace

EMU_API CUresult cuMemcpy(CUdeviceptr dst, CUdeviceptr src, size_t bytes)
{
    return copy_call("cuMemcpy", nullptr, dst, (const void *)src, bytes, true);
}

EMU_API CUresult cuMemcpyHtoD_v2(CUdeviceptr dst, const void *src, size_t bytes)
{
    return copy_call("cuMemcpyHtoD", nullptr, dst, src, bytes, true);
}

EMU_API CUresult cuMemcpyDtoH_v2(void *dst, CUdeviceptr src, size_t bytes)
{
    return copy_call("cuMemcpyDtoH", nullptr, (uint64_t)dst, (const void *)src, bytes, true);
}

// Within the device a "synchronous" copy or fill only enqueues on the legacy stream.
EMU_API CUresult cuMemcpyDtoD_v2(CUdeviceptr dst, CUdeviceptr src, size_t bytes)
{
    return copy_call("cuMemcpyDtoD", nullptr, dst, (const void *)src, bytes, false);
}

EMU_API CUresult cuMemcpyAsync(CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream s)
{
    return copy_call("cuMemcpyAsync", s, dst, (const void *)src, bytes, false);
}

EMU_API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr dst, const void *src, size_t bytes, CUstream s)
{
    return copy_call("cuMemcpyHtoDAsync", s, dst, src, bytes, false);
}

EMU_API CUresult cuMemcpyDtoHAsync_v2(void *dst, CUdeviceptr src, size_t bytes, CUstream s)
{
    return copy_call("cuMemcpyDtoHAsync", s, (uint64_t)dst, (const void *)src, bytes, false);
}

EMU_API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream s)
{
    return copy_call("cuMemcpyDtoDAsync", s, dst, (const void *)src, bytes, false);
}

EMU_API CUresult cuMemsetD8_v2(CUdeviceptr dst, unsigned char value, size_t count)
{
    return fill_call("cuMemsetD8", nullptr, dst, value, 1, count);
}

EMU_API CUresult cuMemsetD16_v2(CUdeviceptr dst, unsigned short value, size_t count)
{
    return fill_call("cuMemsetD16", nullptr, dst, value, 2, count);
}

EMU_API CUresult cuMemsetD32_v2(CUdeviceptr dst, unsigned value, size_t count)
{
    return fill_call("cuMemsetD32", nullptr, dst, value, 4, count);
}

EMU_API CUresult cuMemsetD8Async(CUdeviceptr dst, unsigned char value, size_t count, CUstream s)
{
    return fill_call("cuMemsetD8Async", s, dst, value, 1, count);
}

EMU_API CUresult cuMemsetD16Async(CUdeviceptr dst, unsigned short value, size_t count, CUstream s)
{
    return fill_call("cuMemsetD16Async", s, dst, value, 2, count);
}

EMU_API CUresult cuMemsetD32Async(CUdeviceptr dst, unsigned value, size_t count, CUstream s)
{
    return fill_call("cuMemsetD32Async", s, dst, value, 4, count);
}

// ---- launches -------------------------------------------------------------------------------------------------------

namespace {

CUresult read_attributes(const CUlaunchConfig &config, work *w)
{
    for (unsigned i = 0; i < config.numAttrs; i++) {
        const CUlaunchAttribute &a = config.attrs[i];
        switch (a.id) {
        case CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION:
            w->cluster[0] = a.value.clusterDim.x;
            w->cluster[1] = a.value.clusterDim.y;
            w->cluster[2] = a.value.clusterDim.z;
            break;
        case CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION:
            w->programmatic = a.value.programmaticStreamSerializationAllowed != 0;
            break;
        case CU_LAUNCH_ATTRIBUTE_IGNORE: case CU_LAUNCH_ATTRIBUTE_PRIORITY:
        case CU_LAUNCH_ATTRIBUTE_ACCESS_POLICY_WINDOW: case CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE:
        case CU_LAUNCH_ATTRIBUTE_MEM_SYNC_DOMAIN_MAP: case CU_LAUNCH_ATTRIBUTE_MEM_SYNC_DOMAIN:
        case CU_LAUNCH_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
            break;
        default:
            return CUDA_ERROR_NOT_SUPPORTED;
        }
    }
    return CUDA_SUCCESS;
}

// What hardware refuses when the launch is made.
CUresult check_launch(const CUctx_st *ctx, const work &w)
{
    unsigned threads = w.block[0] * w.block[1] * w.block[2], cluster = w.cluster[0] * w.cluster[1] * w.cluster[2];
    for (int i = 0; i < 3; i++) {
        if (!w.grid[i] || !w.block[i]) return CUDA_ERROR_INVALID_VALUE;
        if (!w.cluster[i] || w.grid[i] % w.cluster[i]) return CUDA_ERROR_INVALID_CLUSTER_SIZE;
    }
    if (w.grid[0] > 2147483647u || w.grid[1] > 65535 || w.grid[2] > 65535) return CUDA_ERROR_INVALID_VALUE;
    if (w.block[0] > 1024 || w.block[1] > 1024 || w.block[2] > 64 || threads > 1024) return CUDA_ERROR_INVALID_VALUE;
    if (threads > w.function->kernel->threads) return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
    if (w.smem > (unsigned)w.function->max_dynamic_smem) return CUDA_ERROR_INVALID_VALUE;
    if (cluster > 1 && ctx->dev->capability < 90) return CUDA_ERROR_NOT_SUPPORTED;
    if (cluster > 16 || (cluster > 8 && !w.function->non_portable_cluster)) return CUDA_ERROR_INVALID_CLUSTER_SIZE;
    return CUDA_SUCCESS;
}

// Entries have one argument: kernelParams[0], or the buffer of `extra` (1: pointer, 2: size, 0: end).
CUresult read_arguments(work *w, void **params, void **extra)
{
    size_t bytes = w->function->kernel->args_bytes;
    const void *from = params ? params[0] : nullptr;
    for (int i = 0; !params && extra && extra[i]; i += 2) {
        if (extra[i] == (void *)1) from = extra[i + 1];
        else if (extra[i] == (void *)2 && *(const size_t *)extra[i + 1] != bytes) return CUDA_ERROR_INVALID_VALUE;
    }
    if (bytes && !from) return CUDA_ERROR_INVALID_VALUE;
    w->args.assign((const unsigned char *)from, (const unsigned char *)from + bytes);
    return CUDA_SUCCESS;
}

CUresult launch(const char *function, CUfunc_st *f, const CUlaunchConfig &config, void **params, void **extra)
{
    call c(function, call::CONTEXT);
    CUstream_st *s = c.stream(config.hStream);
    if (!s) return c.code;
    if (!is_function(f) || f->module->ctx != s->ctx) return c(CUDA_ERROR_INVALID_HANDLE);
    work w;
    w.kind = WORK_KERNEL;
    w.function = f;
    w.grid[0] = config.gridDimX, w.grid[1] = config.gridDimY, w.grid[2] = config.gridDimZ;
    w.block[0] = config.blockDimX, w.block[1] = config.blockDimY, w.block[2] = config.blockDimZ;
    w.smem = config.sharedMemBytes;
    if (CUresult r = read_attributes(config, &w)) return c(r);
    if (CUresult r = check_launch(s->ctx, w)) return c(r);
    if (CUresult r = read_arguments(&w, params, extra)) return c(r);
    return c(enqueue(s, w));
}

} // namespace

EMU_API CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                unsigned bz, unsigned smem, CUstream s, void **params, void **extra)
{
    CUlaunchConfig config = { gx, gy, gz, bx, by, bz, smem, s, nullptr, 0 };
    return launch("cuLaunchKernel", f, config, params, extra);
}

EMU_API CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **params, void **extra)
{
    CUlaunchConfig none = {};
    return launch("cuLaunchKernelEx", config ? f : nullptr, config ? *config : none, params, extra);
}

// ---- names ----------------------------------------------------------------------------------------------------------

EMU_API CUresult cuGetErrorName(CUresult code, const char **name)
{
    static const struct { CUresult code; const char *name; } names[] = {
        { 0, "CUDA_SUCCESS" }, { 1, "CUDA_ERROR_INVALID_VALUE" }, { 2, "CUDA_ERROR_OUT_OF_MEMORY" },
        { 3, "CUDA_ERROR_NOT_INITIALIZED" }, { 34, "CUDA_ERROR_STUB_LIBRARY" }, { 100, "CUDA_ERROR_NO_DEVICE" },
        { 101, "CUDA_ERROR_INVALID_DEVICE" }, { 200, "CUDA_ERROR_INVALID_IMAGE" },
        { 201, "CUDA_ERROR_INVALID_CONTEXT" }, { 209, "CUDA_ERROR_NO_BINARY_FOR_GPU" },
        { 218, "CUDA_ERROR_INVALID_PTX" }, { 221, "CUDA_ERROR_JIT_COMPILER_NOT_FOUND" },
        { 222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION" }, { 400, "CUDA_ERROR_INVALID_HANDLE" },
        { 500, "CUDA_ERROR_NOT_FOUND" }, { 600, "CUDA_ERROR_NOT_READY" }, { 700, "CUDA_ERROR_ILLEGAL_ADDRESS" },
        { 701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" }, { 702, "CUDA_ERROR_LAUNCH_TIMEOUT" },
        { 709, "CUDA_ERROR_CONTEXT_IS_DESTROYED" }, { 712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED" },
        { 713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED" }, { 716, "CUDA_ERROR_MISALIGNED_ADDRESS" },
        { 719, "CUDA_ERROR_LAUNCH_FAILED" }, { 800, "CUDA_ERROR_NOT_PERMITTED" }, { 801, "CUDA_ERROR_NOT_SUPPORTED" },
        { 803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" }, { 900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" },
        { 901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED" }, { 902, "CUDA_ERROR_STREAM_CAPTURE_MERGE" },
        { 903, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED" }, { 904, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED" },
        { 905, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION" }, { 906, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT" },
        { 907, "CUDA_ERROR_CAPTURED_EVENT" }, { 908, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD" },
        { 910, "CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE" }, { 912, "CUDA_ERROR_INVALID_CLUSTER_SIZE" },
        { 999, "CUDA_ERROR_UNKNOWN" }
    };
    if (!name) return CUDA_ERROR_INVALID_VALUE;
    *name = nullptr;
    for (const auto &n : names)
        if (n.code == code) *name = n.name;
    return *name ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EMU_API CUresult cuGetErrorString(CUresult code, const char **text)
{
    return cuGetErrorName(code, text);
}

namespace {

// The name that cuGetProcAddress is asked for, the exported one, and the CUDA version that brought it.
struct symbol {
    const char *name, *suffix;
    int since;
};
const symbol symbols[] = {
    { "cuInit", "", 2000 }, { "cuDriverGetVersion", "", 2020 }, { "cuDeviceGetCount", "", 2000 },
    { "cuDeviceGet", "", 2000 }, { "cuDeviceGetName", "", 2000 }, { "cuDeviceGetUuid", "", 9020 },
    { "cuDeviceGetUuid", "_v2", 11040 }, { "cuDeviceTotalMem", "_v2", 3020 }, { "cuDeviceGetAttribute", "", 2000 },
    { "cuDeviceGetPCIBusId", "", 4010 }, { "cuDevicePrimaryCtxRetain", "", 7000 },
    { "cuDevicePrimaryCtxRelease", "_v2", 11000 }, { "cuDevicePrimaryCtxReset", "_v2", 11000 },
    { "cuDevicePrimaryCtxSetFlags", "_v2", 11000 }, { "cuDevicePrimaryCtxGetState", "", 7000 },
    { "cuCtxCreate", "_v2", 3020 }, { "cuCtxCreate", "_v4", 12050 }, { "cuCtxDestroy", "_v2", 4000 },
    { "cuCtxPushCurrent", "_v2", 4000 }, { "cuCtxPopCurrent", "_v2", 4000 }, { "cuCtxSetCurrent", "", 4000 },
    { "cuCtxGetCurrent", "", 4000 }, { "cuCtxGetDevice", "", 2000 }, { "cuCtxGetApiVersion", "", 3020 },
    { "cuCtxGetStreamPriorityRange", "", 5050 }, { "cuCtxSynchronize", "", 2000 }, { "cuMemAlloc", "_v2", 3020 },
    { "cuMemFree", "_v2", 3020 }, { "cuMemAllocAsync", "", 11020 }, { "cuMemFreeAsync", "", 11020 },
    { "cuMemHostAlloc", "", 2020 }, { "cuMemAllocHost", "_v2", 3020 }, { "cuMemFreeHost", "", 2000 },
    { "cuMemHostRegister", "_v2", 6050 }, { "cuMemHostUnregister", "", 4000 },
    { "cuMemHostGetDevicePointer", "_v2", 3020 }, { "cuMemGetInfo", "_v2", 3020 },
    { "cuMemGetAddressRange", "_v2", 3020 }, { "cuPointerGetAttribute", "", 4000 },
    { "cuPointerGetAttributes", "", 7000 }, { "cuModuleLoadData", "", 2000 }, { "cuModuleLoadDataEx", "", 2010 },
    { "cuModuleUnload", "", 2000 }, { "cuModuleGetFunction", "", 2000 }, { "cuModuleGetGlobal", "_v2", 3020 },
    { "cuFuncGetAttribute", "", 2020 }, { "cuFuncSetAttribute", "", 9000 }, { "cuFuncSetCacheConfig", "", 3000 },
    { "cuFuncGetName", "", 12030 }, { "cuFuncGetModule", "", 11000 }, { "cuFuncLoad", "", 12040 },
    { "cuFuncGetParamInfo", "", 12040 }, { "cuOccupancyMaxActiveBlocksPerMultiprocessor", "", 6050 },
    { "cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags", "", 7000 },
    { "cuOccupancyMaxActiveClusters", "", 11070 }, { "cuOccupancyMaxPotentialClusterSize", "", 11070 },
    { "cuTensorMapEncodeTiled", "", 12000 }, { "cuStreamCreate", "", 2000 },
    { "cuStreamCreateWithPriority", "", 5050 }, { "cuStreamDestroy", "_v2", 4000 }, { "cuStreamGetPriority", "", 5050 },
    { "cuStreamGetFlags", "", 5050 }, { "cuStreamGetCtx", "", 9020 }, { "cuStreamSynchronize", "", 2000 },
    { "cuStreamQuery", "", 2000 }, { "cuStreamWaitEvent", "", 3020 }, { "cuLaunchHostFunc", "", 10000 },
    { "cuEventCreate", "", 2000 }, { "cuEventDestroy", "_v2", 4000 }, { "cuEventRecord", "", 2000 },
    { "cuEventRecordWithFlags", "", 11010 }, { "cuEventSynchronize", "", 2000 }, { "cuEventQuery", "", 2000 },
    { "cuEventElapsedTime", "", 2000 }, { "cuEventElapsedTime", "_v2", 12080 }, { "cuMemcpy", "", 4000 },
    { "cuMemcpyHtoD", "_v2", 3020 }, { "cuMemcpyDtoH", "_v2", 3020 }, { "cuMemcpyDtoD", "_v2", 3020 },
    { "cuMemcpyAsync", "", 4000 }, { "cuMemcpyHtoDAsync", "_v2", 3020 }, { "cuMemcpyDtoHAsync", "_v2", 3020 },
    { "cuMemcpyDtoDAsync", "_v2", 3020 }, { "cuMemsetD8", "_v2", 3020 }, { "cuMemsetD16", "_v2", 3020 },
    { "cuMemsetD32", "_v2", 3020 }, { "cuMemsetD8Async", "", 3020 }, { "cuMemsetD16Async", "", 3020 },
    { "cuMemsetD32Async", "", 3020 }, { "cuLaunchKernel", "", 4000 }, { "cuLaunchKernelEx", "", 11060 },
    { "cuGetErrorName", "", 6000 }, { "cuGetErrorString", "", 6000 }, { "cuGetProcAddress", "", 11030 },
    { "cuGetProcAddress", "_v2", 12000 }, { "cuStreamBeginCapture", "_v2", 10010 },
    { "cuStreamEndCapture", "", 10000 }, { "cuStreamIsCapturing", "", 10000 },
    { "cuStreamGetCaptureInfo", "_v2", 11030 }, { "cuStreamGetCaptureInfo", "_v3", 12030 },
    { "cuThreadExchangeStreamCaptureMode", "", 10010 }, { "cuGraphCreate", "", 10000 },
    { "cuGraphDestroy", "", 10000 }, { "cuGraphGetNodes", "", 10000 }, { "cuGraphNodeGetType", "", 10000 },
    { "cuGraphInstantiate", "WithFlags", 11040 }, { "cuGraphInstantiateWithFlags", "", 11040 },
    { "cuGraphLaunch", "", 10000 }, { "cuGraphUpload", "", 11010 }, { "cuGraphExecDestroy", "", 10000 },
    { "cuGraphExecUpdate", "_v2", 12000 }
};

// The newest version that the caller and this driver both know. status: 0 found, 1 no such name, 2 newer than asked.
void *find_symbol(const char *name, int version, int *status)
{
    Dl_info info;
    void *found = nullptr;
    *status = 1;
    if (host_missing(name) || !dladdr((const void *)find_symbol, &info)) return nullptr;
    void *self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    for (const symbol &s : symbols) {
        if (strcmp(s.name, name) != 0 || s.since > driver_version()) continue;
        if (s.since > version && !found) *status = 2;
        if (s.since > version) continue;
        found = dlsym(self, (std::string(name) + s.suffix).c_str());
        *status = 0;
    }
    if (self) dlclose(self);
    return found;
}

} // namespace

EMU_API CUresult cuGetProcAddress_v2(const char *name, void **out, int version, uint64_t, int *status)
{
    call c("cuGetProcAddress", call::ANY);
    int own;
    if (c.code) return c.code;
    if (!name || !out || version > driver_version()) return c(CUDA_ERROR_INVALID_VALUE);
    *out = find_symbol(name, version, status ? status : &own);
    return c(*out || status ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND);
}

EMU_API CUresult cuGetProcAddress(const char *name, void **out, int version, uint64_t flags)
{
    return cuGetProcAddress_v2(name, out, version, flags, nullptr);
}
