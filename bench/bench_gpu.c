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

#include <dlfcn.h>
#include <stdio.h>
#include <time.h>

enum { EXPERTS = 256, TOP_K = 8, HIDDEN = 7168, MAX_TOKENS = 16384, SHORT = 10, LONG = 60, SETS = 2, REPEATS = 25 };

typedef struct row {
    const char *layer, *stage, *config;
    int tokens;
    double us, us_min, us_max, floor_us, bytes, flops;
} row;

// ---- what moe.h's own table of the driver lacks ----

static struct {
    int (*stream_create)(void **, unsigned);
    int (*begin_capture)(void *, int);
    int (*end_capture)(void *, void **);
    int (*instantiate)(void **, void *, unsigned long long);
    int (*graph_launch)(void *, void *);
    int (*exec_destroy)(void *);
    int (*graph_destroy)(void *);
    int (*event_create)(void **, unsigned);
    int (*event_record)(void *, void *);
    int (*event_synchronize)(void *);
    int (*event_elapsed)(float *, void *, void *);
    int (*copy_on_device)(uint64_t, uint64_t, size_t, void *);
} cu;

static moe_context *ctx;
static const moe__cuda *cuda;
static void *stream, *events[2];

static void check(int result, const char *what)
{
    if (result == 0) return;
    fprintf(stderr, "bench_gpu: %s returned %d\n", what, result);
    exit(1);
}
#define CALL(call) check((call), #call)

static void symbol(void *library, const char *name, void *function)
{
    void *found = dlsym(library, name);
    if (found == NULL) {
        fprintf(stderr, "bench_gpu: the driver has no %s\n", name);
        exit(1);
    }
    memcpy(function, &found, sizeof found);
}

static void open_driver(void)
{
    const char *path = getenv("MOE_CUDA_LIB");
    void *library = dlopen(path != NULL && path[0] != 0 ? path : "libcuda.so.1", RTLD_NOW);
    if (library == NULL) check(1, "dlopen");
    symbol(library, "cuStreamCreate", &cu.stream_create);
    symbol(library, "cuStreamBeginCapture_v2", &cu.begin_capture);
    symbol(library, "cuStreamEndCapture", &cu.end_capture);
    symbol(library, "cuGraphInstantiateWithFlags", &cu.instantiate);
    symbol(library, "cuGraphLaunch", &cu.graph_launch);
    symbol(library, "cuGraphExecDestroy", &cu.exec_destroy);
    symbol(library, "cuGraphDestroy", &cu.graph_destroy);
    symbol(library, "cuEventCreate", &cu.event_create);
    symbol(library, "cuEventRecord", &cu.event_record);
    symbol(library, "cuEventSynchronize", &cu.event_synchronize);
    symbol(library, "cuEventElapsedTime", &cu.event_elapsed);
    symbol(library, "cuMemcpyDtoDAsync_v2", &cu.copy_on_device);
    CALL(cuda->cuCtxPushCurrent(cuda->context));
    CALL(cu.stream_create(&stream, 1));
    CALL(cu.event_create(&events[0], 0));
    CALL(cu.event_create(&events[1], 0));
}

static uint64_t device_memory(size_t bytes)
{
    moe__cu_ptr at = 0;
    CALL(cuda->cuMemAlloc(&at, bytes));
    return at;
}

static void fail(const char *what, const moe_error *err)
{
    fprintf(stderr, "bench_gpu: %s: %s\n", what, err->text);
    exit(1);
}

static uint32_t random_u32(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

// ---- slopes ----

// Enqueues node `index` of a graph of inputs `set`.
typedef void (*enqueue_fn)(void *user, int set, int index);

static void *record(enqueue_fn enqueue, void *user, int set, int nodes)
{
    void *graph = NULL, *exec = NULL;
    CALL(cu.begin_capture(stream, 0));
    for (int i = 0; i < nodes; i++) enqueue(user, set, i);
    CALL(cu.end_capture(stream, &graph));
    CALL(cu.instantiate(&exec, graph, 0));
    CALL(cu.graph_destroy(graph));
    return exec;
}

static double time_graph(void *exec)
{
    float ms = 0;
    CALL(cu.event_record(events[0], stream));
    CALL(cu.graph_launch(exec, stream));
    CALL(cu.event_record(events[1], stream));
    CALL(cu.event_synchronize(events[1]));
    CALL(cu.event_elapsed(&ms, events[0], events[1]));
    return (double)ms * 1e3;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

// us of one node: median, least and most of REPEATS slopes.
static void measure(enqueue_fn enqueue, void *user, row *out)
{
    void *graphs[SETS][2];
    double slopes[REPEATS];
    for (int set = 0; set < SETS; set++) {
        graphs[set][0] = record(enqueue, user, set, SHORT);
        graphs[set][1] = record(enqueue, user, set, LONG);
        for (int i = 0; i < 3; i++) time_graph(graphs[set][i % 2]);
    }
    for (int i = 0; i < REPEATS; i++)
        slopes[i] = (time_graph(graphs[i % SETS][1]) - time_graph(graphs[(i + 1) % SETS][0])) / (LONG - SHORT);
    qsort(slopes, REPEATS, sizeof slopes[0], compare);
    out->us = slopes[REPEATS / 2];
    out->us_min = slopes[0];
    out->us_max = slopes[REPEATS - 1];
    for (int set = 0; set < SETS; set++)
        for (int i = 0; i < 2; i++) CALL(cu.exec_destroy(graphs[set][i]));
}

// ---- ceilings ----

static void enqueue_empty(void *user, int set, int index)
{
    moe__cu_launch_config config;
    (void)set;
    (void)index;
    memset(&config, 0, sizeof config);
    config.gridDimX = config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1;
    config.blockDimX = 32;
    config.hStream = stream;
    CALL(cuda->cuLaunchKernelEx(&config, (moe__cu_function)user, NULL, NULL));
}

static double measure_launch(void)
{
    static const char text[] = ".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry empty() { ret; }\n";
    moe__cu_module module;
    moe__cu_function function;
    row r;
    if (cuda->cuModuleLoadData(&module, text) != 0) return 0; // the emulated device takes no PTX
    CALL(cuda->cuModuleGetFunction(&function, module, "empty"));
    measure(enqueue_empty, (void *)function, &r);
    CALL(cuda->cuModuleUnload(module));
    return r.us;
}

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
    measure(enqueue_copy, at, &r);
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

static void print_row(const row *r)
{
    printf("%-28s %-14s %6d %9.2f %9.2f %9.2f %9.2f  %s\n", r->layer, r->stage, r->tokens, r->us, r->us_min, r->us_max,
           r->floor_us, r->config);
    fflush(stdout);
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

static int bench_layer(const char *name, int method, int logits_dtype, int router, double copy, row *rows)
{
    static const int tokens[] = { 1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384 };
    moe_layer_desc layer = layer_of(method);
    moe_plan_desc desc;
    moe_plan_info info;
    moe_error err;
    stage s;
    int count = 0;
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
        row *r = &rows[count++];
        double t = tokens[i], width = router ? HIDDEN : EXPERTS;
        int dtype = router ? MOE_DTYPE_BF16 : logits_dtype;
        memset(r, 0, sizeof *r);
        r->layer = name;
        r->stage = router ? "router_logits" : "route_permute";
        r->tokens = tokens[i];
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
        r->config = "";
        s.args.flags = 0;
        measure(enqueue_stage, &s, r);
        print_row(r);
        r = &rows[count++];
        *r = r[-1];
        r->config = "programmatic";
        s.args.flags = MOE_EXECUTE_PDL_IN;
        measure(enqueue_stage, &s, r);
        print_row(r);
        CALL(cuda->cuMemFree(s.inputs));
    }
    moe_plan_destroy(s.plan);
    moe_weights_destroy(s.weights);
    return count;
}

// Three times a plan in a context of its own: the first compiles, the others read what it has left in a folder.
static int bench_plan(const char *name, int method, row *rows)
{
    char folder[] = "/tmp/moe_bench_XXXXXX";
    moe_layer_desc layer = layer_of(method);
    moe_context_desc desc;
    moe_error err;
    memset(&desc, 0, sizeof desc);
    desc.backend = MOE_BACKEND_CUDA;
    desc.jit.cache_dir = mkdtemp(folder);
    if (desc.jit.cache_dir == NULL) return 0;
    for (int i = 0; i < 3; i++) {
        struct timespec begin, end;
        moe_context *own;
        moe_plan *plan;
        row *r = &rows[i];
        if (moe_context_create(&desc, &own, &err)) fail("context", &err);
        clock_gettime(CLOCK_MONOTONIC, &begin);
        if (moe_plan_create(own, &layer, NULL, &plan, &err)) fail("plan", &err);
        clock_gettime(CLOCK_MONOTONIC, &end);
        moe_plan_destroy(plan);
        moe_context_destroy(own);
        memset(r, 0, sizeof *r);
        r->layer = name;
        r->stage = "plan_create";
        r->config = i == 0 ? "cold" : "warm";
        r->us = 1e6 * (double)(end.tv_sec - begin.tv_sec) + 1e-3 * (double)(end.tv_nsec - begin.tv_nsec);
        r->us_min = r->us_max = r->us;
        print_row(r);
    }
    moe_cache_trim(folder, 0, NULL);
    return 3;
}

static void write_json(const char *path, const moe_context_info *info, double launch, double copy, const row *rows,
                       int count)
{
    FILE *f = fopen(path, "w");
    const char *commit = getenv("MOE_COMMIT");
    time_t now = time(NULL);
    char date[32];
    if (f == NULL) {
        fprintf(stderr, "bench_gpu: %s cannot be written\n", path);
        exit(1);
    }
    strftime(date, sizeof date, "%Y-%m-%d", gmtime(&now));
    fprintf(f, "{\"chip\": \"%s\", \"driver\": \"%d\", \"commit\": \"%s\", \"date\": \"%s\",\n", info->name,
            cuda->driver_version, commit != NULL ? commit : "", date);
    fprintf(f, " \"ceilings\": {\"launch_us\": %.3f, \"copy_gb_s\": %.0f},\n \"rows\": [\n", launch, copy);
    for (int i = 0; i < count; i++)
        fprintf(f,
                "  {\"layer\": \"%s\", \"format\": \"bf16\", \"load\": \"uniform\", \"tokens\": %d, \"stage\": \"%s\", "
                "\"us\": %.3f, \"us_min\": %.3f, \"us_max\": %.3f, \"floor_us\": %.3f, \"bytes\": %.0f, "
                "\"flops\": %.0f, \"config\": \"%s\"}%s\n",
                rows[i].layer, rows[i].tokens, rows[i].stage, rows[i].us, rows[i].us_min, rows[i].us_max,
                rows[i].floor_us, rows[i].bytes, rows[i].flops, rows[i].config, i + 1 < count ? "," : "");
    fprintf(f, " ]}\n");
    fclose(f);
}

int main(int argc, char **argv)
{
    static row rows[128];
    moe_context_desc desc;
    moe_context_info info;
    moe_error err;
    double launch, copy;
    int count = 0;
    memset(&desc, 0, sizeof desc);
    memset(&info, 0, sizeof info);
    desc.backend = MOE_BACKEND_CUDA;
    if (moe_context_create(&desc, &ctx, &err) || moe_context_get_info(ctx, &info, &err)) {
        printf("bench_gpu: no device: %s\n", err.text);
        return 0;
    }
    cuda = ctx->cuda;
    open_driver();
    launch = measure_launch();
    copy = measure_copy();
    printf("%s\nceilings: empty kernel %.2f us, copy %.0f GB/s\n\n", info.name, launch, copy);
    printf("%-28s %-14s %6s %9s %9s %9s %9s\n", "layer", "stage", "tokens", "us", "us min", "us max", "floor us");
    count += bench_layer("E256 k8 softmax", MOE_ROUTING_RENORMALIZE_NAIVE, MOE_DTYPE_BF16, 0, copy, rows + count);
    count += bench_layer("E256 k8 DeepSeek-V3", MOE_ROUTING_DEEPSEEK_V3, MOE_DTYPE_F32, 0, copy, rows + count);
    count += bench_layer("E256 H7168", MOE_ROUTING_RENORMALIZE_NAIVE, MOE_DTYPE_F32, 1, copy, rows + count);
    count += bench_plan("E256 k8 DeepSeek-V3", MOE_ROUTING_DEEPSEEK_V3, rows + count);
    if (argc > 1) write_json(argv[1], &info, launch, copy, rows, count);
    moe_context_destroy(ctx);
    return 0;
}
