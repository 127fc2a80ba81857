// bench_gpu.c - the stages on the GPU, in graphs, beside two ceilings of the machine measured in the same run
//
//     cc -O2 -o build/bench_gpu bench/bench_gpu.c -ldl -lpthread && build/bench_gpu [result.json]
//
// Rows: routing with all permutation tables (moe_permute from logits, E256 k8), plain softmax and DeepSeek-V3's groups,
// and the router's product (moe_router_logits); each as it comes and, "programmatic", with MOE_EXECUTE_PDL_IN. A
// stage's time is the slope between graphs of 10 and of 60 of it, each node with logits of its own, two graphs with
// different inputs in turn. Ceilings: a chain of empty kernels (what a dependent launch costs) and a copy on the device
// (bytes read plus bytes written). Last, what making a plan costs with an empty folder of kernels, and with a full one.
#define _POSIX_C_SOURCE 200809L
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"

#include "bench.h"

enum { EXPERTS = 256, TOP_K = 8, HIDDEN = 7168, MAX_TOKENS = 16384, SHORT = 10, LONG = 60 };

// ---- the ceiling ----

static void enqueue_copy(void *user, int set, int index)
{
    const uint64_t *at = (const uint64_t *)user;
    (void)set;
    CALL(cu.copy_on_device(at[index % 2], at[1 - index % 2], (size_t)at[2], stream));
}

// GB/s of a copy on the device, read and write together.
static double measure_copy(void)
{
    uint64_t at[3];
    row r;
    at[2] = 256u << 20;
    at[0] = device_memory((size_t)at[2]);
    at[1] = device_memory((size_t)at[2]);
    measure(enqueue_copy, at, 10, 60, &r);
    CALL(cuda->cuMemFree(at[0]));
    CALL(cuda->cuMemFree(at[1]));
    return 2 * (double)at[2] / r.us * 1e-3;
}

// ---- stages ----

typedef struct stage {
    moe_plan *plan;
    moe_weights *weights;
    moe_execute_args args;
    moe_permutation out;
    float *logits_out;         // of the router; NULL: routing
    uint64_t inputs;           // SETS * LONG of them where they fit
    size_t input_bytes;        // of one
    int inputs_count;
} stage;

static void enqueue_stage(void *user, int set, int index)
{
    const stage *s = (const stage *)user;
    moe_execute_args args = s->args;
    const void *input = (const void *)(uintptr_t)(s->inputs + (uint64_t)((set * LONG + index) % s->inputs_count) *
                                                                  s->input_bytes);
    if (s->logits_out != NULL) {
        args.x = input;
        CALL(moe_router_logits(s->plan, s->weights, &args, s->logits_out, stream));
    } else {
        args.logits = input;
        CALL(moe_permute(s->plan, s->weights, &args, &s->out, stream));
    }
}

static moe_weights *make_weights(const moe_layer_desc *layer)
{
    static const int32_t roles[] = { MOE_TENSOR_UP, MOE_TENSOR_DOWN, MOE_TENSOR_ROUTER, MOE_TENSOR_SELECT_BIAS };
    moe_weights *weights;
    moe_error err;
    uint64_t state = 1;
    size_t most = (size_t)EXPERTS * HIDDEN;
    uint16_t *data = (uint16_t *)malloc(most * sizeof data[0]);
    if (moe_weights_create(ctx, layer, NULL, &weights, &err)) fail("weights", &err);
    for (size_t i = 0; i < most; i++)
        data[i] = moe__f32_to_bf16((float)((int)(random_u32(&state) % 2001) - 1000) * 1e-4f);
    for (int i = 0; i < 3 + (layer->routing.bias_rows > 0); i++) {
        moe_tensor t;
        memset(&t, 0, sizeof t);
        t.role = roles[i];
        t.expert = t.index = -1;
        t.dtype = MOE_DTYPE_BF16;
        t.rank = i < 2 ? 3 : i == 2 ? 2 : 1;
        t.dims[0] = EXPERTS;
        t.dims[1] = i == 0 ? layer->intermediate_size : layer->hidden_size;
        t.dims[2] = i == 0 ? layer->hidden_size : layer->intermediate_size;
        if (i == 2) t.dims[1] = layer->router.input_size;
        t.data = data;
        t.data_bytes = (uint64_t)EXPERTS * 2;
        for (int d = 1; d < t.rank; d++) t.data_bytes *= (uint64_t)t.dims[d];
        if (moe_weights_set_tensor(weights, &t, &err)) fail("tensor", &err);
    }
    if (moe_weights_seal(weights, &err)) fail("seal", &err);
    free(data);
    return weights;
}

static void make_outputs(stage *s, int tile)
{
    int64_t slots = (int64_t)MAX_TOKENS * TOP_K, rows = moe_permutation_rows(slots, EXPERTS, tile);
    uint64_t at = device_memory((size_t)(3 * slots + 3 * rows + 4 * EXPERTS + 64) * 4);
    int32_t *p = (int32_t *)(uintptr_t)at;
    s->args.out_ids = p;
    s->args.out_weights = (float *)(void *)(p + slots);
    s->out.row_of_slot = p + 2 * slots;
    s->out.slot_of_row = p + 3 * slots;
    s->out.tile_expert = p + 3 * slots + rows;
    s->out.tile_limit = p + 3 * slots + 2 * rows;
    p += 3 * slots + 3 * rows;
    s->args.out_expert_counts = p;
    s->out.expert_offsets = p + EXPERTS;
    s->out.expert_counts = p + 2 * EXPERTS + 1;
    s->out.num_tiles = p + 3 * EXPERTS + 1;
    s->args.out_faults = (uint32_t *)(void *)(p + 3 * EXPERTS + 8);
    s->out.tile = tile;
}

static void fill_inputs(stage *s, int dtype)
{
    uint64_t state = 7;
    size_t size = (size_t)moe_dtype_bits(dtype) / 8, count = s->input_bytes / size;
    unsigned char *host = (unsigned char *)malloc(s->input_bytes);
    for (int i = 0; i < s->inputs_count; i++) {
        for (size_t j = 0; j < count; j++)
            moe__store(host, dtype, (int64_t)j, (float)(random_u32(&state) & 0xffff) * 1e-4f - 3.2f);
        CALL(cuda->cuMemcpyHtoD(s->inputs + (uint64_t)i * s->input_bytes, host, s->input_bytes));
    }
    free(host);
}

static moe_layer_desc layer_of(int method)
{
    moe_layer_desc layer;
    memset(&layer, 0, sizeof layer);
    layer.hidden_size = layer.intermediate_size = 16;
    layer.router.input_size = HIDDEN;
    layer.num_experts = EXPERTS;
    layer.format = MOE_FORMAT_BF16;
    layer.activation.kind = MOE_ACTIVATION_SILU;
    moe_routing_preset(method, &layer.routing, NULL);
    layer.routing.top_k = TOP_K;
    if (layer.routing.group_rule != 0) { layer.routing.groups = 8; layer.routing.groups_kept = 4; }
    return layer;
}

static void bench_layer(const char *name, int method, int logits_dtype, int router, double copy)
{
    static const int tokens[] = { 1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384 };
    moe_layer_desc layer = layer_of(method);
    moe_plan_desc desc;
    moe_plan_info info;
    moe_error err;
    stage s;
    memset(&desc, 0, sizeof desc);
    memset(&info, 0, sizeof info);
    memset(&s, 0, sizeof s);
    desc.max_tokens = MAX_TOKENS;
    desc.logits_dtype = logits_dtype;
    if (moe_plan_create(ctx, &layer, &desc, &s.plan, &err) || moe_plan_get_info(s.plan, &info, &err))
        fail("plan", &err);
    s.weights = make_weights(&layer);
    s.args.input_mode = MOE_INPUT_LOGITS;
    s.args.workspace = (void *)(uintptr_t)device_memory((size_t)info.workspace_bytes);
    s.args.workspace_bytes = info.workspace_bytes;
    make_outputs(&s, 8);
    if (router) s.logits_out = (float *)(uintptr_t)device_memory((size_t)MAX_TOKENS * EXPERTS * 4);
    for (int i = 0; i < (int)(sizeof tokens / sizeof tokens[0]); i++) {
        row *r = row_next(name, "uniform", router ? "router_logits" : "route_permute", tokens[i]);
        double t = tokens[i], width = router ? HIDDEN : EXPERTS;
        int dtype = router ? MOE_DTYPE_BF16 : logits_dtype;
        s.args.num_tokens = tokens[i];
        s.out.tile = tokens[i] > 1024 ? 128 : 8;
        s.input_bytes = (size_t)(t * width) * (size_t)moe_dtype_bits(dtype) / 8;
        s.inputs_count = SETS * LONG;
        while (s.inputs_count > 2 && (double)s.inputs_count * (double)s.input_bytes > 512e6) s.inputs_count /= 2;
        s.inputs = device_memory((size_t)s.inputs_count * s.input_bytes);
        fill_inputs(&s, dtype);
        r->bytes = (double)s.input_bytes + (router ? EXPERTS * (2.0 * HIDDEN + 4 * t) : t * TOP_K * 16);
        r->flops = router ? 2.0 * EXPERTS * HIDDEN * t : 0;
        r->floor_us = r->bytes / copy * 1e-3;
        s.args.flags = 0;
        measure(enqueue_stage, &s, SHORT, LONG, r);
        print_row(r);
        r = &rows[rows_count++];
        *r = r[-1];
        r->config = "programmatic";
        s.args.flags = MOE_EXECUTE_PDL_IN;
        measure(enqueue_stage, &s, SHORT, LONG, r);
        print_row(r);
        CALL(cuda->cuMemFree(s.inputs));
    }
    moe_plan_destroy(s.plan);
    moe_weights_destroy(s.weights);
}

// Three times a plan in a context of its own: the first compiles, the others read what it has left in a folder.
static void bench_plan(const char *name, int method)
{
    char folder[] = "/tmp/moe_bench_XXXXXX";
    moe_layer_desc layer = layer_of(method);
    moe_context_desc desc;
    moe_error err;
    memset(&desc, 0, sizeof desc);
    desc.backend = MOE_BACKEND_CUDA;
    desc.jit.cache_dir = mkdtemp(folder);
    if (desc.jit.cache_dir == NULL) return;
    for (int i = 0; i < 3; i++) {
        struct timespec begin, end;
        moe_context *own;
        moe_plan *plan;
        row *r = row_next(name, "", "plan_create", 0);
        if (moe_context_create(&desc, &own, &err)) fail("context", &err);
        clock_gettime(CLOCK_MONOTONIC, &begin);
        if (moe_plan_create(own, &layer, NULL, &plan, &err)) fail("plan", &err);
        clock_gettime(CLOCK_MONOTONIC, &end);
        moe_plan_destroy(plan);
        moe_context_destroy(own);
        r->config = i == 0 ? "cold" : "warm";
        r->us = 1e6 * (double)(end.tv_sec - begin.tv_sec) + 1e-3 * (double)(end.tv_nsec - begin.tv_nsec);
        r->us_min = r->us_max = r->us;
        print_row(r);
    }
    moe_cache_trim(folder, 0, NULL);
}

int main(int argc, char **argv)
{
    double launch, copy;
    char ceilings[128];
    if (!bench_open()) return 0;
    launch = measure_launch();
    copy = measure_copy();
    snprintf(ceilings, sizeof ceilings, "\"launch_us\": %.3f, \"copy_gb_s\": %.0f", launch, copy);
    printf("ceilings: %s\n", ceilings);
    print_head();
    bench_layer("E256 k8 softmax", MOE_ROUTING_RENORMALIZE_NAIVE, MOE_DTYPE_BF16, 0, copy);
    bench_layer("E256 k8 DeepSeek-V3", MOE_ROUTING_DEEPSEEK_V3, MOE_DTYPE_F32, 0, copy);
    bench_layer("E256 H7168", MOE_ROUTING_RENORMALIZE_NAIVE, MOE_DTYPE_F32, 1, copy);
    bench_plan("E256 k8 DeepSeek-V3", MOE_ROUTING_DEEPSEEK_V3);
    if (argc > 1) write_json(argv[1], ceilings);
    moe_context_destroy(ctx);
    return 0;
}
