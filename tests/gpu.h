// gpu.h - the CUDA back end beside the CPU one: a context of each, memory on the device, one layer in both
//
// Included behind moe.h and test.h. Where there is no device, gpu_open() leaves the test out; with MOE_TEST_GPU=1 (real
// hardware: large sizes too) it fails. Memory of gpu_make() is filled with GPU_POISON and lies between guards that
// gpu_release() checks, except on the emulated device, whose own bounds are checked there: an allocation each.
#ifndef GPU_H
#define GPU_H

#include <dlfcn.h>

enum { GPU_GUARD = 512, GPU_BLOCKS = 96, GPU_POISON = 0x5a, GPU_GUARD_BYTE = 0xc3 };

typedef struct gpu_block {
    moe__cu_ptr at; // of the allocation
    size_t bytes;   // of the caller's part
} gpu_block;

static struct {
    moe_context *ctx, *cpu;
    const moe__cuda *cuda;
    int tried;
    gpu_block blocks[GPU_BLOCKS];
    int count;
    void (*closing)(void); // of a program's own contexts, before those above
} gpu;

// MOE_TEST_GPU=1: real hardware.
TEST_UNUSED static int gpu_large(void)
{
    const char *value = getenv("MOE_TEST_GPU");
    return value != NULL && value[0] == '1';
}

static size_t gpu_guard(void) { return gpu_large() ? GPU_GUARD : 0; }

static void gpu_message(void *user, int32_t level, const char *text)
{
    (void)user;
    if (level <= MOE_LOG_WARNING || getenv("MOE_TEST_LOG") != NULL) printf("%s\n", text);
}

// ---- device ---------------------------------------------------------------------------------------------------------

static void gpu_symbol(void *library, const char *name, void *function)
{
    void *symbol = library == NULL ? NULL : dlsym(library, name);
    memcpy(function, &symbol, sizeof symbol);
}

static void *gpu_library(void)
{
    const char *path = getenv("MOE_CUDA_LIB");
    return dlopen(path != NULL && path[0] != 0 ? path : "libcuda.so.1", RTLD_NOW);
}

// Ends both contexts. The emulated driver knows what still lives, or went with its context: nothing may.
static void gpu_close(void)
{
    static char text[4096];
    int (*leaks)(char *text, size_t bytes);
    gpu_symbol(gpu_library(), "emu_leaks", &leaks);
    if (gpu.closing != NULL) gpu.closing();
    moe_context_destroy(gpu.ctx);
    moe_context_destroy(gpu.cpu);
    if (leaks != NULL && leaks(text, sizeof text) != 0) test_fail2(__FILE__, __LINE__, "leaked", text);
}

// Both contexts, once for the program, with these settings of the compiler and the cache; 0: the test is left out, or
// has failed.
TEST_UNUSED static int gpu_open_with(const moe_jit_desc *jit)
{
    moe_context_desc desc;
    moe_error err;
    if (gpu.ctx != NULL) return 1;
    memset(&desc, 0, sizeof desc);
    memset(&err, 0, sizeof err);
    if (jit != NULL) desc.jit = *jit;
    desc.log = gpu_message;
    desc.backend = MOE_BACKEND_CUDA;
    if (!gpu.tried && moe_context_create(&desc, &gpu.ctx, &err) == MOE_OK) {
        desc.backend = MOE_BACKEND_CPU;
        if (moe_context_create(&desc, &gpu.cpu, &err) == MOE_OK) {
            gpu.cuda = gpu.ctx->cuda;
            test_last = gpu_close;
            return 1;
        }
    }
    gpu.tried = 1;
    if (gpu_large()) test_fail(__FILE__, __LINE__, err.text);
    else test_skip(err.text[0] != 0 ? err.text : "no device");
    return 0;
}

TEST_UNUSED static int gpu_open(void) { return gpu_open_with(NULL); }

#define GPU_CALL(call) gpu_check((call), #call, __LINE__)
static void gpu_check(int result, const char *what, int line)
{
    char text[256];
    if (result == 0) return;
    snprintf(text, sizeof text, "%.200s returned %d", what, result);
    test_fail(__FILE__, line, text);
}

static void gpu_enter(void) { GPU_CALL(gpu.cuda->cuCtxPushCurrent(gpu.cuda->context)); }

static void gpu_leave(void)
{
    moe__cu_context top;
    GPU_CALL(gpu.cuda->cuCtxPopCurrent(&top));
}

TEST_UNUSED static void gpu_sync(void)
{
    gpu_enter();
    GPU_CALL(gpu.cuda->cuCtxSynchronize());
    gpu_leave();
}

static void *gpu_allocate(size_t bytes, int poison)
{
    moe__cu_ptr at = 0;
    size_t guard = gpu_guard();
    if (bytes == 0 || gpu.count == GPU_BLOCKS) return NULL;
    gpu_enter();
    GPU_CALL(gpu.cuda->cuMemAlloc(&at, bytes + 2 * guard));
    if (guard > 0) GPU_CALL(gpu.cuda->cuMemsetD8(at, GPU_GUARD_BYTE, bytes + 2 * guard));
    if (poison) GPU_CALL(gpu.cuda->cuMemsetD8(at + guard, GPU_POISON, bytes));
    GPU_CALL(gpu.cuda->cuCtxSynchronize());
    gpu_leave();
    gpu.blocks[gpu.count].at = at;
    gpu.blocks[gpu.count++].bytes = bytes;
    return (void *)(uintptr_t)(at + guard);
}

// Device memory of `bytes`, poisoned; NULL for none.
TEST_UNUSED static void *gpu_make(size_t bytes) { return gpu_allocate(bytes, 1); }

// The same, never written: on the emulated device reading it is reported.
TEST_UNUSED static void *gpu_make_raw(size_t bytes) { return gpu_allocate(bytes, gpu_large()); }

// Complete on return, for every stream.
TEST_UNUSED static void gpu_put(void *to, const void *from, size_t bytes)
{
    gpu_enter();
    if (bytes > 0) GPU_CALL(gpu.cuda->cuMemcpyHtoD((moe__cu_ptr)(uintptr_t)to, from, bytes));
    GPU_CALL(gpu.cuda->cuCtxSynchronize());
    gpu_leave();
}

// Waits for everything enqueued before.
TEST_UNUSED static void gpu_get(void *to, const void *from, size_t bytes)
{
    gpu_enter();
    GPU_CALL(gpu.cuda->cuCtxSynchronize());
    if (bytes > 0 && from != NULL) GPU_CALL(gpu.cuda->cuMemcpyDtoH(to, (moe__cu_ptr)(uintptr_t)from, bytes));
    gpu_leave();
}

// A copy on the device of `bytes` of the host's; NULL for NULL.
TEST_UNUSED static void *gpu_copy(const void *from, size_t bytes)
{
    void *to = from == NULL ? NULL : gpu_make(bytes);
    if (to != NULL) gpu_put(to, from, bytes);
    return to;
}

static int gpu_guard_broken(moe__cu_ptr at)
{
    unsigned char bytes[GPU_GUARD];
    gpu_get(bytes, (const void *)(uintptr_t)at, sizeof bytes);
    for (size_t i = 0; i < sizeof bytes; i++)
        if (bytes[i] != GPU_GUARD_BYTE) return 1;
    return 0;
}

// Frees all that gpu_make() gave since, and checks that nothing beside it was written.
TEST_UNUSED static void gpu_release(void)
{
    size_t guard = gpu_guard();
    gpu_sync();
    for (int i = 0; i < gpu.count; i++) {
        const gpu_block *block = &gpu.blocks[i];
        if (guard > 0 && (gpu_guard_broken(block->at) || gpu_guard_broken(block->at + guard + block->bytes)))
            test_fail(__FILE__, __LINE__, "memory beside a buffer was written");
        gpu_enter();
        GPU_CALL(gpu.cuda->cuMemFree(block->at));
        gpu_leave();
    }
    gpu.count = 0;
}

// ---- streams, graphs and the driver's log: functions that moe.h has no use for --------------------------------------

typedef struct gpu_driver {
    int (*stream_create)(void **stream, unsigned flags);
    int (*stream_destroy)(void *stream);
    int (*stream_synchronize)(void *stream);
    int (*begin_capture)(void *stream, int mode);
    int (*end_capture)(void *stream, void **graph);
    int (*instantiate)(void **exec, void *graph, unsigned long long flags);
    int (*graph_launch)(void *exec, void *stream);
    int (*exec_destroy)(void *exec);
    int (*graph_destroy)(void *graph);
    int (*copy_async)(moe__cu_ptr to, const void *from, size_t bytes, void *stream);
    int (*host_alloc)(void **at, size_t bytes, unsigned flags); // page-locked; flags 2: the device addresses it
    int (*host_free)(void *at);
    int (*host_register)(void *at, size_t bytes, unsigned flags); // the same of memory that is there
    int (*host_unregister)(void *at);
    int (*memory_info)(size_t *free_bytes, size_t *total);
    void (*log_begin)(void);                // of the emulated driver alone: NULL elsewhere
    const char *(*log_end)(void);           // the calls since, a line each
    int (*leaks)(char *text, size_t bytes); // of the emulated driver alone: how many things live
    int (*init)(unsigned flags);
} gpu_driver;

static gpu_driver gpu_calls;

// 1 when the functions are there; the device is open.
TEST_UNUSED static int gpu_open_driver(void)
{
    void *library;
    if (!gpu_open()) return 0;
    if (gpu_calls.stream_create != NULL) return 1;
    library = gpu_library();
    if (library == NULL) {
        test_fail(__FILE__, __LINE__, "the driver that is open cannot be opened again");
        return 0;
    }
    gpu_symbol(library, "cuStreamCreate", &gpu_calls.stream_create);
    gpu_symbol(library, "cuStreamDestroy_v2", &gpu_calls.stream_destroy);
    gpu_symbol(library, "cuStreamSynchronize", &gpu_calls.stream_synchronize);
    gpu_symbol(library, "cuStreamBeginCapture_v2", &gpu_calls.begin_capture);
    gpu_symbol(library, "cuStreamEndCapture", &gpu_calls.end_capture);
    gpu_symbol(library, "cuGraphInstantiateWithFlags", &gpu_calls.instantiate);
    gpu_symbol(library, "cuGraphLaunch", &gpu_calls.graph_launch);
    gpu_symbol(library, "cuGraphExecDestroy", &gpu_calls.exec_destroy);
    gpu_symbol(library, "cuGraphDestroy", &gpu_calls.graph_destroy);
    gpu_symbol(library, "cuMemcpyHtoDAsync_v2", &gpu_calls.copy_async);
    gpu_symbol(library, "cuMemHostAlloc", &gpu_calls.host_alloc);
    gpu_symbol(library, "cuMemFreeHost", &gpu_calls.host_free);
    gpu_symbol(library, "cuMemHostRegister_v2", &gpu_calls.host_register);
    gpu_symbol(library, "cuMemHostUnregister", &gpu_calls.host_unregister);
    gpu_symbol(library, "cuMemGetInfo_v2", &gpu_calls.memory_info);
    gpu_symbol(library, "emu_log_begin", &gpu_calls.log_begin);
    gpu_symbol(library, "emu_log_end", &gpu_calls.log_end);
    gpu_symbol(library, "emu_leaks", &gpu_calls.leaks);
    gpu_symbol(library, "cuInit", &gpu_calls.init);
    return gpu_calls.stream_create != NULL;
}

// A stream that does not wait for the legacy one.
TEST_UNUSED static void *gpu_stream(void)
{
    void *stream = NULL;
    gpu_enter();
    GPU_CALL(gpu_calls.stream_create(&stream, 1));
    gpu_leave();
    return stream;
}

TEST_UNUSED static void gpu_stream_end(void *stream)
{
    gpu_enter();
    GPU_CALL(gpu_calls.stream_synchronize(stream));
    GPU_CALL(gpu_calls.stream_destroy(stream));
    gpu_leave();
}

#include "quantized.h"

// ---- a layer in both contexts ---------------------------------------------------------------------------------------

// Zero-initialise; set layer (hidden and intermediate size may stay 0), desc, router.
typedef struct pair {
    moe_layer_desc layer;
    moe_plan_desc desc;
    int router;              // the layer has a router matrix
    uint64_t seed;
    int any_codes;           // matrices are codes at random, and every x has one value alone
    moe_weights *weights[2]; // [0] CPU, [1] GPU
    moe_plan *plan[2];
    moe_plan_info info[2];
} pair;

static int pair_tensor(moe_weights *weights, int role, int expert, int rank, int64_t d0, int64_t d1, int64_t d2,
                       int dtype, const void *data, moe_error *err)
{
    moe_tensor t;
    memset(&t, 0, sizeof t);
    t.role = role;
    t.expert = expert;
    t.index = -1;
    t.dtype = dtype;
    t.rank = rank;
    t.dims[0] = d0;
    t.dims[1] = d1;
    t.dims[2] = d2;
    t.data = data;
    t.data_bytes = (uint64_t)(d0 * (rank > 1 ? d1 : 1) * (rank > 2 ? d2 : 1) * moe_dtype_bits(dtype) / 8);
    return moe_weights_set_tensor(weights, &t, err);
}

// Multiples of `step` that a type of codes has, the largest of them at a random place of every 8: scales are powers of
// two then, or their formats' own. Of e4m3 that is 7, for 448 / 64.
TEST_UNUSED static float *pair_code_values(int64_t count, int dtype, float step, uint64_t *state)
{
    static const float fp4[] = { 0, 0.5f, 1, 1.5f, 2, 3, 4, 6 };
    const int every = 8;
    float *v = (float *)malloc((size_t)count * sizeof v[0] + 4);
    uint32_t place = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t draw = test_random_u32(state);
        float code = dtype == MOE_DTYPE_E2M1   ? fp4[draw / 2 % 8]
                     : dtype == MOE_DTYPE_INT4 ? (float)(draw / 2 % 9)
                                               : (float)(draw / 2 % 28) * 0.25f;
        if (i % every == 0) place = test_random_u32(state) % (uint32_t)every;
        if (i % every == place) code = dtype == MOE_DTYPE_E2M1 ? 6 : dtype == MOE_DTYPE_INT4 ? 8 : 7;
        else if (dtype == MOE_DTYPE_INT4 && code > 7) code = 7;
        v[i] = draw % 2 == 0 || (dtype == MOE_DTYPE_INT4 && code == 8) ? -code * step : code * step;
    }
    return v;
}

// One matrix of codes. Rows, groups of 32, or square blocks have steps of their own, as the format allows.
static int pair_codes(const pair *p, moe_weights *weights, int role, int expert, int64_t rows, int64_t columns,
                      moe_error *err)
{
    const moe_layer_desc *l = &p->layer;
    const moe__scheme s = moe__weight_scheme(l->format, l->format_block, l->scale_dtype);
    const int64_t r = s.rows > 0 ? s.rows : rows, c = s.columns > 0 ? s.columns : columns;
    uint64_t state = p->seed * 77 + (uint64_t)(role * 1000 + expert + 1);
    float *values = pair_code_values(rows * columns, s.dtype, 0.125f, &state);
    float input = (expert + 1) % 4 == 3 ? 0.5f : 0.25f;
    moe_quantize_desc q;
    int result;
    for (int64_t i = 0; i < rows * columns && s.rows > 0; i++)
        values[i] *= (float)(1 << ((i / columns / r * 5 + i % columns / c * 3) % 3));
    quantized_begin(&q, l->format, l->format_block, l->scale_dtype, values, rows, columns);
    q.global_scale = moe__scheme_has_global(&s) ? 0.0625f : 0;
    result = moe_quantize(&q, err);
    for (uint64_t i = 0; i < q.codes_bytes && p->any_codes; i++) {
        uint32_t code = test_random_u32(&state) & 255u;
        ((unsigned char *)q.codes)[i] = (unsigned char)(s.dtype == MOE_DTYPE_E4M3 && code % 128 == 127 ? 1 : code);
    }
    if (result == 0) result = set_quantized(weights, role, expert, &q, input, err);
    quantized_free(&q);
    free(values);
    return result;
}

// The matrices and vectors of `role`, of every routed and always-on expert or of the shared ones, on a grid: multiples
// of `step` within 4 of it, so that sums are exact.
static int pair_grid(const pair *p, moe_weights *weights, int role, int64_t rows, int64_t columns, float step,
                     moe_error *err)
{
    const moe_routing_desc *r = &p->layer.routing;
    int stacked = role < MOE_TENSOR_SHARED_GATE, vector = columns == 0, result;
    int extra = stacked && !p->layer.parallel.omit_common ? r->extra_slots : 0;
    int64_t experts = stacked ? p->layer.num_experts : 1, each = rows * (vector ? 1 : columns);
    int64_t count = (experts + extra) * each;
    uint64_t state = p->seed * 77 + (uint64_t)role;
    if (!vector && moe__role_matrix(role) >= 0 && p->layer.format > MOE_FORMAT_F16 &&
        (stacked || p->layer.shared.format == 0 || p->layer.shared.format == p->layer.format)) {
        result = 0;
        for (int i = 0; i < experts + extra && result == 0; i++)
            result = pair_codes(p, weights, role, !stacked ? -1 : i < experts ? i : i + r->special_experts, rows,
                                columns, err);
        return result;
    }
    float *data = (float *)malloc((size_t)count * sizeof data[0]);
    for (int64_t i = 0; i < count; i++) data[i] = step * (float)((int)(test_random_u32(&state) % 9) - 4);
    if (stacked)
        result = pair_tensor(weights, role, -1, vector ? 2 : 3, experts, rows, columns, MOE_DTYPE_F32, data, err);
    else result = pair_tensor(weights, role, -1, vector ? 1 : 2, rows, columns, 0, MOE_DTYPE_F32, data, err);
    for (int i = 0; i < extra && result == 0; i++)
        result = pair_tensor(weights, role, p->layer.num_experts + r->special_experts + i, vector ? 1 : 2, rows,
                             columns, 0, MOE_DTYPE_F32, data + (experts + i) * each, err);
    free(data);
    return result;
}

// Matrices, biases and parameters of a layer whose products run.
static int pair_products(const pair *p, moe_weights *weights, moe_error *err)
{
    const moe_layer_desc *l = &p->layer;
    int64_t h = l->hidden_size, i = l->intermediate_size, s = (int64_t)l->shared.count * l->shared.intermediate_size;
    int gated = moe__layer_is_gated(l), result = pair_grid(p, weights, MOE_TENSOR_UP, i, h, 0.125f, err);
    if (result == 0 && gated) result = pair_grid(p, weights, MOE_TENSOR_GATE, i, h, 0.125f, err);
    if (result == 0) result = pair_grid(p, weights, MOE_TENSOR_DOWN, h, i, 0.125f, err);
    if (result == 0 && l->gemm1_bias) result = pair_grid(p, weights, MOE_TENSOR_UP_BIAS, i, 0, 0.5f, err);
    if (result == 0 && l->gemm1_bias && gated) result = pair_grid(p, weights, MOE_TENSOR_GATE_BIAS, i, 0, 0.5f, err);
    if (result == 0 && l->gemm2_bias) result = pair_grid(p, weights, MOE_TENSOR_DOWN_BIAS, h, 0, 0.5f, err);
    if (result == 0 && s > 0) result = pair_grid(p, weights, MOE_TENSOR_SHARED_UP, s, h, 0.125f, err);
    if (result == 0 && s > 0 && gated) result = pair_grid(p, weights, MOE_TENSOR_SHARED_GATE, s, h, 0.125f, err);
    if (result == 0 && s > 0) result = pair_grid(p, weights, MOE_TENSOR_SHARED_DOWN, h, s, 0.125f, err);
    if (result == 0 && l->shared.gate)
        result = pair_grid(p, weights, MOE_TENSOR_SHARED_TOKEN_GATE, h, 0, 0.0625f, err);
    if (result == 0 && l->row_norm) result = pair_grid(p, weights, MOE_TENSOR_ROW_NORM, h, 0, 0.125f, err);
    return result;
}

// Matrices of zeros: the stages do not read them.
static int pair_experts(const pair *p, moe_weights *weights, moe_error *err)
{
    const moe_layer_desc *l = &p->layer;
    int64_t e = l->num_experts, h = l->hidden_size, i = l->intermediate_size;
    void *zeros = calloc((size_t)(e * h * i), 2);
    int first = l->num_experts + l->routing.special_experts, result;
    result = pair_tensor(weights, MOE_TENSOR_UP, -1, 3, e, i, h, MOE_DTYPE_BF16, zeros, err);
    if (result == 0) result = pair_tensor(weights, MOE_TENSOR_DOWN, -1, 3, e, h, i, MOE_DTYPE_BF16, zeros, err);
    for (int id = first; result == 0 && id < first + l->routing.extra_slots && !l->parallel.omit_common; id++) {
        result = pair_tensor(weights, MOE_TENSOR_UP, id, 2, i, h, 0, MOE_DTYPE_BF16, zeros, err);
        if (result == 0) result = pair_tensor(weights, MOE_TENSOR_DOWN, id, 2, h, i, 0, MOE_DTYPE_BF16, zeros, err);
    }
    free(zeros);
    return result;
}

static int pair_table(const pair *p, moe_weights *weights, int role, int64_t rows, int64_t columns, float scale,
                      float offset, moe_error *err)
{
    uint64_t state = p->seed * 1000003 + (uint64_t)role;
    float *data = (float *)malloc((size_t)(rows * columns) * sizeof data[0]);
    int rank = role == MOE_TENSOR_ROUTER || (role == MOE_TENSOR_SELECT_BIAS && rows > 1) ? 2 : 1, result;
    for (int64_t i = 0; i < rows * columns; i++) data[i] = offset + scale * test_random_float(&state);
    for (int64_t i = 0; i < rows * columns && role == MOE_TENSOR_ROUTER; i++)
        if (p->layer.router.dtype == MOE_DTYPE_BF16) data[i] = moe__bf16_to_f32(moe__f32_to_bf16(data[i]));
    result = pair_tensor(weights, role, -1, rank, rank == 2 ? rows : columns, columns, 0, MOE_DTYPE_F32, data, err);
    free(data);
    return result;
}

// Random rows of distinct ids.
static int pair_forced(const pair *p, moe_weights *weights, moe_error *err)
{
    const moe_routing_desc *r = &p->layer.routing;
    int ranked = p->layer.num_experts + r->special_experts, k = r->top_k, result;
    int32_t *ids = (int32_t *)malloc((size_t)r->forced_rows * (size_t)k * sizeof ids[0]);
    uint64_t state = p->seed + 5;
    for (int i = 0; i < r->forced_rows; i++) {
        int start = (int)(test_random_u32(&state) % (uint32_t)ranked);
        for (int j = 0; j < k; j++) ids[i * k + j] = (start + j) % ranked;
    }
    result = pair_tensor(weights, MOE_TENSOR_FORCED_IDS, -1, 2, r->forced_rows, k, 0, MOE_DTYPE_I32, ids, err);
    free(ids);
    return result;
}

static int pair_fill(const pair *p, moe_weights *weights, moe_error *err)
{
    const moe_layer_desc *l = &p->layer;
    const moe_routing_desc *r = &l->routing;
    int ranked = l->num_experts + r->special_experts, width = ranked + (r->extra_scored ? r->extra_slots : 0),
        input = l->router.input_size > 0 ? l->router.input_size : l->hidden_size,
        result = l->format == MOE_FORMAT_F32 ? pair_experts(p, weights, err) : pair_products(p, weights, err);
    if (result == 0 && p->router) result = pair_table(p, weights, MOE_TENSOR_ROUTER, width, input, 0.3f, 0, err);
    if (result == 0 && l->router.bias) result = pair_table(p, weights, MOE_TENSOR_ROUTER_BIAS, 1, width, 1, 0, err);
    if (result == 0 && l->router.input_scale)
        result = pair_table(p, weights, MOE_TENSOR_ROUTER_INPUT_SCALE, 1, input, 1, 0, err);
    if (result == 0 && r->global_scale)
        result = pair_table(p, weights, MOE_TENSOR_ROUTER_GLOBAL_SCALE, 1, 1, 0.5f, 1, err);
    if (result == 0 && r->bias_rows > 0)
        result = pair_table(p, weights, MOE_TENSOR_SELECT_BIAS, r->bias_rows, ranked, 0.2f, 0, err);
    if (result == 0 && r->per_expert_scale)
        result = pair_table(p, weights, MOE_TENSOR_PER_EXPERT_SCALE, 1, ranked, 0.5f, 1, err);
    for (int role = MOE_TENSOR_ALPHA; role <= MOE_TENSOR_LIMIT && result == 0 && l->activation.per_expert; role++)
        result = pair_table(p, weights, role, 1, l->num_experts, 0.5f, 1, err);
    if (result == 0 && r->forced_rows > 0) result = pair_forced(p, weights, err);
    return result == 0 ? moe_weights_seal(weights, err) : result;
}

static void pair_close(pair *p)
{
    for (int i = 0; i < 2; i++) {
        moe_plan_destroy(p->plan[i]);
        moe_weights_destroy(p->weights[i]);
        p->plan[i] = NULL;
        p->weights[i] = NULL;
    }
}

// 0 when everything was made; pair_close() in every case.
TEST_UNUSED static int pair_open(pair *p, moe_error *err)
{
    moe_context *ctx[2];
    int result = 0;
    ctx[0] = gpu.cpu;
    ctx[1] = gpu.ctx;
    if (p->layer.hidden_size == 0) p->layer.hidden_size = 8;
    if (p->layer.intermediate_size == 0) p->layer.intermediate_size = 8;
    if (p->layer.format == 0) { // stages alone: no products are compiled
        p->layer.format = MOE_FORMAT_F32;
        p->layer.activation.kind = MOE_ACTIVATION_SILU;
        if (p->desc.x_dtype == 0) p->desc.x_dtype = MOE_DTYPE_BF16;
    }
    for (int i = 0; i < 2 && result == 0; i++) {
        result = moe_weights_create(ctx[i], &p->layer, NULL, &p->weights[i], err);
        if (result == 0) result = pair_fill(p, p->weights[i], err);
        if (result == 0) result = moe_plan_create(ctx[i], &p->layer, &p->desc, &p->plan[i], err);
        if (result == 0) result = moe_plan_get_info(p->plan[i], &p->info[i], err);
    }
    return result;
}

// ---- a call on both -------------------------------------------------------------------------------------------------

// Inputs on the host, in the plan's types; NULL where there are none.
typedef struct call {
    int mode, tokens;
    uint32_t flags;
    int held;            // what num_tokens_dev holds; -1: there is none
    int64_t stride;      // of logits
    const void *logits, *ids, *weights, *token_ids;
    const int32_t *bias_index;
    int tile;            // 0: moe_route(); else moe_permute()
} call;

enum { // parts of an answer, words of 4 bytes
    ANSWER_IDS, ANSWER_WEIGHTS, ANSWER_EXPERTS, ANSWER_FAULTS, ANSWER_ROW_OF_SLOT, ANSWER_SLOT_OF_ROW, ANSWER_OFFSETS,
    ANSWER_COUNTS, ANSWER_TILE_EXPERT, ANSWER_TILE_LIMIT, ANSWER_TILES, ANSWER_PARTS
};

static const char *const answer_names[ANSWER_PARTS] = {
    "ids", "weights", "expert counts", "faults", "row of slot", "slot of row", "offsets", "counts", "tile expert",
    "tile limit", "tiles"
};

typedef struct answer {
    int result;
    uint32_t *part[ANSWER_PARTS]; // NULL: not asked for
    size_t words[ANSWER_PARTS];
} answer;

static void answer_free(answer *a)
{
    for (int i = 0; i < ANSWER_PARTS; i++) free(a->part[i]);
    memset(a, 0, sizeof *a);
}

static void answer_make(answer *a, const pair *p, const call *c)
{
    size_t slots = (size_t)c->tokens * (size_t)p->info[0].slots, local = (size_t)p->info[0].local_experts, rows = 0;
    memset(a, 0, sizeof *a);
    a->words[ANSWER_IDS] = slots;
    a->words[ANSWER_WEIGHTS] = slots;
    a->words[ANSWER_EXPERTS] = (size_t)p->layer.num_experts;
    a->words[ANSWER_FAULTS] = MOE_FAULTS;
    if (c->tile > 0) {
        rows = (size_t)moe_permutation_rows((int64_t)slots, (int32_t)local, c->tile);
        a->words[ANSWER_ROW_OF_SLOT] = slots;
        a->words[ANSWER_SLOT_OF_ROW] = rows;
        a->words[ANSWER_OFFSETS] = local + 1;
        a->words[ANSWER_COUNTS] = local;
        a->words[ANSWER_TILE_EXPERT] = a->words[ANSWER_TILE_LIMIT] = rows / (size_t)c->tile;
        a->words[ANSWER_TILES] = 1;
    }
    for (int i = 0; i < ANSWER_PARTS; i++) {
        if (a->words[i] == 0) continue;
        a->part[i] = (uint32_t *)malloc(a->words[i] * 4);
        memset(a->part[i], GPU_POISON, a->words[i] * 4);
    }
}

// Places of the outputs in args and permutation; `at` are host or device pointers.
static void answer_place(void *const *at, moe_execute_args *args, moe_permutation *out)
{
    args->out_ids = (int32_t *)at[ANSWER_IDS];
    args->out_weights = (float *)at[ANSWER_WEIGHTS];
    args->out_expert_counts = (int32_t *)at[ANSWER_EXPERTS];
    args->out_faults = (uint32_t *)at[ANSWER_FAULTS];
    out->row_of_slot = (int32_t *)at[ANSWER_ROW_OF_SLOT];
    out->slot_of_row = (int32_t *)at[ANSWER_SLOT_OF_ROW];
    out->expert_offsets = (int32_t *)at[ANSWER_OFFSETS];
    out->expert_counts = (int32_t *)at[ANSWER_COUNTS];
    out->tile_expert = (int32_t *)at[ANSWER_TILE_EXPERT];
    out->tile_limit = (int32_t *)at[ANSWER_TILE_LIMIT];
    out->num_tiles = (int32_t *)at[ANSWER_TILES];
}

static int call_run(const pair *p, int side, const moe_execute_args *args, const moe_permutation *out, void *stream)
{
    if (out->tile > 0) return moe_permute(p->plan[side], p->weights[side], args, out, stream);
    return moe_route(p->plan[side], p->weights[side], args, stream);
}

static int or_else(int dtype, int otherwise) { return dtype == 0 ? otherwise : dtype; }

static size_t dtype_size(int dtype) { return (size_t)moe_dtype_bits(dtype) / 8; }

static void call_args(const call *c, const pair *p, moe_execute_args *args, moe_permutation *out)
{
    memset(args, 0, sizeof *args);
    memset(out, 0, sizeof *out);
    args->input_mode = c->mode;
    args->num_tokens = c->tokens;
    args->flags = c->flags;
    args->logits_stride = c->stride;
    out->tile = c->tile;
    (void)p;
}

TEST_UNUSED static void call_cpu(const pair *p, const call *c, answer *a)
{
    moe_execute_args args;
    moe_permutation out;
    int32_t held = c->held;
    unsigned char *memory = (unsigned char *)malloc((size_t)p->info[0].workspace_bytes + 256);
    void *at[ANSWER_PARTS];
    answer_make(a, p, c);
    call_args(c, p, &args, &out);
    args.logits = c->logits;
    args.ids = c->ids;
    args.weights = c->weights;
    args.token_ids = c->token_ids;
    args.bias_index = c->bias_index;
    args.num_tokens_dev = held >= 0 ? &held : NULL;
    args.workspace = memory + (256 - (uintptr_t)memory % 256) % 256;
    args.workspace_bytes = p->info[0].workspace_bytes;
    for (int i = 0; i < ANSWER_PARTS; i++) at[i] = a->part[i];
    answer_place(at, &args, &out);
    a->result = call_run(p, 0, &args, &out, NULL);
    free(memory);
}

// Inputs copied to the device, outputs made there; everything lives until gpu_release().
TEST_UNUSED static void call_gpu_begin(const pair *p, const call *c, const answer *a, moe_execute_args *args,
                                       moe_permutation *out, void **at)
{
    size_t tokens = (size_t)c->tokens, slots = tokens * (size_t)p->info[0].slots,
           width = (size_t)p->info[0].router_width, stride = c->stride != 0 ? (size_t)c->stride : width;
    size_t ids = dtype_size(or_else(p->desc.ids_dtype, MOE_DTYPE_I32)),
           logits = dtype_size(or_else(p->desc.logits_dtype, MOE_DTYPE_F32)),
           weights = dtype_size(or_else(p->desc.weights_dtype, MOE_DTYPE_F32));
    int32_t held = c->held;
    call_args(c, p, args, out);
    if (tokens > 0) args->logits = gpu_copy(c->logits, ((tokens - 1) * stride + width) * logits);
    args->ids = gpu_copy(c->ids, slots * (c->mode == MOE_INPUT_PACKED ? 4 : ids));
    args->weights = gpu_copy(c->weights, slots * weights);
    args->token_ids = gpu_copy(c->token_ids, tokens * ids);
    args->bias_index = (const int32_t *)gpu_copy(c->bias_index, tokens * 4);
    args->num_tokens_dev = held >= 0 ? (const int32_t *)gpu_copy(&held, 4) : NULL;
    args->workspace = gpu_make_raw((size_t)p->info[1].workspace_bytes);
    args->workspace_bytes = p->info[1].workspace_bytes;
    for (int i = 0; i < ANSWER_PARTS; i++) at[i] = gpu_make(a->words[i] * 4);
    answer_place(at, args, out);
}

TEST_UNUSED static void call_gpu(const pair *p, const call *c, answer *a)
{
    moe_execute_args args;
    moe_permutation out;
    void *at[ANSWER_PARTS];
    answer_make(a, p, c);
    call_gpu_begin(p, c, a, &args, &out, at);
    a->result = call_run(p, 1, &args, &out, NULL);
    for (int i = 0; i < ANSWER_PARTS; i++) gpu_get(a->part[i], at[i], a->words[i] * 4);
    gpu_release();
}

// "" when b says what a says; tile tables end with the tiles.
TEST_UNUSED static const char *answer_differs(const answer *a, const answer *b)
{
    static char text[160];
    if (a->result != b->result) {
        snprintf(text, sizeof text, "results %d and %d", a->result, b->result);
        return text;
    }
    for (int i = 0; i < ANSWER_PARTS; i++) {
        size_t n = a->words[i];
        if (n > 0 && (i == ANSWER_TILE_EXPERT || i == ANSWER_TILE_LIMIT) && a->part[ANSWER_TILES][0] < n)
            n = a->part[ANSWER_TILES][0];
        for (size_t j = 0; j < n; j++) {
            if (a->part[i][j] == b->part[i][j]) continue;
            snprintf(text, sizeof text, "%s [%d]: 0x%08x and 0x%08x", answer_names[i], (int)j, (unsigned)a->part[i][j],
                     (unsigned)b->part[i][j]);
            return text;
        }
    }
    return "";
}

// Both back ends give the same words for the call.
TEST_UNUSED static void check_call(const pair *p, const call *c, const char *file, int line, const char *what)
{
    answer a, b;
    const char *differs;
    call_cpu(p, c, &a);
    call_gpu(p, c, &b);
    differs = answer_differs(&a, &b);
    if (differs[0] != 0 || a.result != MOE_OK) test_fail2(file, line, what, differs[0] != 0 ? differs : "refused");
    answer_free(&a);
    answer_free(&b);
}

#define CHECK_CALL(p, c, what) check_call((p), (c), __FILE__, __LINE__, (what))

// ---- random inputs --------------------------------------------------------------------------------------------------

// Random inputs of a call, in the plan's types.
typedef struct inputs {
    call c;
    void *logits, *ids, *weights, *token_ids;
    int32_t *bias_index;
} inputs;

TEST_UNUSED static void inputs_free(inputs *in)
{
    free(in->logits);
    free(in->ids);
    free(in->weights);
    free(in->token_ids);
    free(in->bias_index);
    memset(in, 0, sizeof *in);
}

static void store_id(void *ids, int dtype, int64_t at, int64_t id)
{
    if (dtype == MOE_DTYPE_I64) ((int64_t *)ids)[at] = id;
    else ((int32_t *)ids)[at] = (int32_t)id;
}

// grain: logits are multiples of 1 / grain in [-6, 6), so that a small one makes ties.
TEST_UNUSED static void inputs_logits(inputs *in, const pair *p, int tokens, int grain, uint64_t seed)
{
    const moe_routing_desc *r = &p->layer.routing;
    int width = p->info[0].router_width, dtype = or_else(p->desc.logits_dtype, MOE_DTYPE_F32);
    int ids_dtype = or_else(p->desc.ids_dtype, MOE_DTYPE_I32);
    int64_t stride = in->c.stride > 0 ? in->c.stride : width, count = tokens > 0 ? (tokens - 1) * stride + width : 0;
    in->c.mode = MOE_INPUT_LOGITS;
    in->c.tokens = tokens;
    in->c.held = -1;
    in->logits = malloc((size_t)count * 4 + 4);
    for (int64_t i = 0; i < count; i++)
        moe__store(in->logits, dtype, i,
                   (float)(int)(test_random_u32(&seed) % (uint32_t)(12 * grain)) / (float)grain - 6);
    in->c.logits = in->logits;
    if (r->forced_rows > 0 || r->marked_token_hi > r->marked_token_lo) {
        in->token_ids = malloc((size_t)tokens * 8 + 8);
        for (int t = 0; t < tokens; t++)
            store_id(in->token_ids, ids_dtype, t,
                     r->forced_rows > 0 && test_random_u32(&seed) % 4 != 0
                         ? (int64_t)(test_random_u32(&seed) % (uint32_t)r->forced_rows)
                     : r->marked_token_hi > r->marked_token_lo ? r->marked_token_lo : 0);
        in->c.token_ids = in->token_ids;
    }
    if (r->bias_rows > 2) {
        in->bias_index = (int32_t *)malloc((size_t)tokens * 4 + 4);
        for (int t = 0; t < tokens; t++)
            in->bias_index[t] = (int32_t)(test_random_u32(&seed) % (uint32_t)r->bias_rows);
        in->c.bias_index = in->bias_index;
    }
}

// The caller's ids: distinct within a token more often than not, some -1, one past the end where flags allow it.
TEST_UNUSED static void inputs_ids(inputs *in, const pair *p, int tokens, int packed, uint32_t flags, uint64_t seed)
{
    const moe_layer_desc *l = &p->layer;
    int end = l->num_experts + l->routing.special_experts + l->routing.extra_slots, slots = p->info[0].slots;
    int ids_dtype = packed ? MOE_DTYPE_I32 : or_else(p->desc.ids_dtype, MOE_DTYPE_I32);
    int dtype = or_else(p->desc.weights_dtype, MOE_DTYPE_F32);
    int64_t count = (int64_t)tokens * slots;
    in->c.mode = packed ? MOE_INPUT_PACKED : MOE_INPUT_IDS;
    in->c.tokens = tokens;
    in->c.held = -1;
    in->c.flags = flags;
    in->ids = malloc((size_t)count * 8 + 8);
    in->weights = malloc((size_t)count * 4 + 4);
    for (int64_t i = 0; i < count; i++) {
        uint32_t draw = test_random_u32(&seed);
        int64_t id = draw % 16 == 0 ? -1 : (int64_t)(test_random_u32(&seed) % (uint32_t)end);
        float weight = (float)(test_random_u32(&seed) % 256) / 128 - 1;
        if ((flags & MOE_EXECUTE_ID_E_IS_NONE) != 0 && draw % 16 == 1) id = end;
        if (packed) store_id(in->ids, ids_dtype, i, (int32_t)((uint32_t)id << 16 | moe__f32_to_bf16(weight)));
        else store_id(in->ids, ids_dtype, i, id);
        moe__store(in->weights, dtype, i, weight);
    }
    in->c.ids = in->ids;
    if (!packed) in->c.weights = in->weights;
}

// A pair with this routing, E experts; 0 (and nothing to close) when the descriptor is refused.
TEST_UNUSED static int pair_make(pair *p, const moe_routing_desc *routing, int experts)
{
    moe_error err;
    memset(&err, 0, sizeof err);
    p->layer.num_experts = experts;
    p->layer.routing = *routing;
    if (p->seed == 0) p->seed = 1;
    if (pair_open(p, &err) == MOE_OK) return 1;
    test_fail2(__FILE__, __LINE__, err.member, err.text);
    pair_close(p);
    return 0;
}

TEST_UNUSED static moe_routing_desc preset(int method, int k)
{
    moe_routing_desc r;
    moe_routing_preset(method, &r, NULL);
    if (r.top_k == 0) r.top_k = k;
    if (r.group_rule != MOE_GROUP_NONE) { r.groups = 8; r.groups_kept = 4; }
    if (r.special_kind != 0) r.special_experts = 16;
    return r;
}

#endif // GPU_H
