// bench_layer.c - whole layers on the GPU, logits to output, beside the ceilings of the machine in the same run
//
//     cc -O2 -o build/bench_layer bench/bench_layer.c -ldl -lpthread -lm
//     build/bench_layer [result.json [LAYER or FORMAT [TOKENS]]]
//
// Runs in the repository's root: the stream's text is read from bench/. Tiles are those that moe_plan_autotune() finds
// fastest. Up to 512 tokens a time is the slope between graphs of few and of many layers, one after the other, each
// with logits of its own, two graphs with different ones in turn. From 1,024 on it is one layer in a graph: "rested",
// each after 60 ms of idle, and "sustained", the last half of 0.3 s back to back. A floor is the time of a bare stream
// of the layer's bytes (weights of the experts that have tokens, once; input and output), measured in the same run.
#define _POSIX_C_SOURCE 200809L
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"

#include "../tests/own_text.h"
#include "../tests/quantized.h"
#include "bench.h"

#include <math.h>

enum { MAX_TOKENS = 16384, MAX_INPUTS = 64 };

typedef struct shape {
    const char *name;
    int experts, top_k, hidden, features, activation;
    int local; // experts of this rank, the first ones
    const char *format_name;
    int format, block;
} shape;

#define BF16 "bf16", MOE_FORMAT_BF16, 0
static const shape shapes[] = {
    { "Qwen3-235B", 128, 8, 4096, 1536, MOE_ACTIVATION_SWIGLU, 128, BF16 },
    { "Qwen3-30B", 128, 8, 2048, 768, MOE_ACTIVATION_SWIGLU, 128, BF16 },
    { "gpt-oss sizes", 128, 4, 2880, 2880, MOE_ACTIVATION_SWIGLU, 128, BF16 },
    { "E512 k22 relu2", 512, 22, 2048, 1024, MOE_ACTIVATION_RELU2, 512, BF16 },
    { "32 of 256 experts", 256, 8, 7168, 2048, MOE_ACTIVATION_SWIGLU, 32, BF16 },
#define CODES(name, format, block) \
    { "Qwen3-235B", 128, 8, 4096, 1536, MOE_ACTIVATION_SWIGLU, 128, name, format, block }
    CODES("fp8 per tensor", MOE_FORMAT_FP8_PER_TENSOR, 0),
    CODES("fp8 per channel", MOE_FORMAT_FP8_PER_CHANNEL, 0),
    CODES("fp8 block 128", MOE_FORMAT_FP8_BLOCK, 128),
    CODES("mxfp8", MOE_FORMAT_MXFP8, 0),
    CODES("nvfp4", MOE_FORMAT_NVFP4, 0),
    CODES("nvfp4 w4a16", MOE_FORMAT_NVFP4_W4A16, 0),
    CODES("mxfp4 w4a16", MOE_FORMAT_MXFP4_W4A16, 0),
    CODES("mxfp4 w4a8", MOE_FORMAT_MXFP4_W4A8, 0),
    CODES("int4 g32", MOE_FORMAT_INT4_W4A16, 32),
    CODES("int4 g128", MOE_FORMAT_INT4_W4A16, 128),
#undef CODES
};

static int is_gated(const shape *s) { return s->activation == MOE_ACTIVATION_SWIGLU; }

typedef struct layer_bench {
    const shape *shape;
    moe_plan *plan;
    moe_weights *weights;
    moe_execute_args args;
    uint64_t logits;     // `inputs` times [T, E] f32
    size_t logits_bytes; // of one
    int inputs;
} layer_bench;

// ---- the stream ----

typedef struct stream_args {
    uint64_t from, pieces, sink;
} stream_args;

static moe_context *own_stream; // its context
static moe__cu_function stream_function;
static stream_args stream_of;

// A context of its own, whose kernel text has the stream behind it.
static moe_context *open_stream(void)
{
    moe_context_desc desc;
    moe_context *own = NULL;
    moe__instance instance;
    moe_error err;
    memset(&desc, 0, sizeof desc);
    desc.backend = MOE_BACKEND_CUDA;
    desc.jit.cache_mode = MOE_CACHE_OFF;
    if (moe_context_create(&desc, &own, &err) || own_text_join(own, "bench/stream.cu.inc", &err)) fail("stream", &err);
    memset(&instance, 0, sizeof instance);
    instance.entry = "moe_k_stream";
    snprintf(instance.name, sizeof instance.name, "stream");
    instance.args_bytes = (int32_t)sizeof(stream_args);
    instance.threads = 128;
    instance.smem_bytes = 12 * 16384 + 128;
    if (moe__jit_load(own, &instance, 1, &stream_function, &err)) fail("stream", &err);
    return own;
}

static void enqueue_stream(void *user, int set, int index)
{
    moe__cu_launch_config config;
    stream_args args = stream_of;
    void *params[1] = { &args };
    (void)user;
    args.from += (uint64_t)((set * 8 + index) % 8) * 16384 * 4096;
    memset(&config, 0, sizeof config);
    config.gridDimX = (unsigned)cuda->sms;
    config.blockDimX = 128;
    config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1;
    config.sharedMemBytes = 12 * 16384 + 128;
    config.hStream = stream;
    CALL(cuda->cuLaunchKernelEx(&config, stream_function, params, NULL));
}

// us of a bare stream of so many bytes; nodes begin 64 MiB apart in `room` bytes from `from` on.
static double measure_stream(uint64_t from, uint64_t room, double bytes)
{
    row r;
    uint64_t most = room - 8ull * 16384 * 4096;
    memset(&r, 0, sizeof r);
    stream_of.from = from;
    stream_of.pieces = (uint64_t)(bytes < (double)most ? bytes : (double)most) / 16384;
    if (stream_of.pieces == 0) stream_of.pieces = 1;
    measure(enqueue_stream, NULL, 4, bytes > 5e8 ? 12 : 24, &r);
    return r.us * (bytes / ((double)stream_of.pieces * 16384));
}

// ---- layers ----

static void enqueue_layer(void *user, int set, int index)
{
    const layer_bench *b = (const layer_bench *)user;
    moe_execute_args args = b->args;
    moe_error err;
    args.logits = (const void *)(uintptr_t)(b->logits + (uint64_t)((set * 31 + index) % b->inputs) * b->logits_bytes);
    if (moe_execute(b->plan, b->weights, &args, stream) != MOE_OK) {
        moe_execute_check(b->plan, b->weights, &args, &err);
        fail("execute", &err);
    }
}

// Every expert has the same values, each in memory of its own.
static moe_weights *make_weights(const moe_layer_desc *layer)
{
    moe_weights *weights;
    moe_error err;
    uint64_t state = 1;
    size_t count = (size_t)layer->hidden_size * (size_t)layer->intermediate_size;
    uint16_t *data = (uint16_t *)malloc(count * sizeof data[0]);
    if (moe_weights_create(ctx, layer, NULL, &weights, &err)) fail("weights", &err);
    for (size_t i = 0; i < count; i++)
        data[i] = moe__f32_to_bf16((float)((int)(random_u32(&state) % 2001) - 1000) * 3e-5f);
    for (int i = 0; i < 3 * layer->parallel.local_experts; i++) {
        moe_tensor t;
        if (i % 3 == 0 && layer->activation.kind != MOE_ACTIVATION_SWIGLU) continue;
        memset(&t, 0, sizeof t);
        t.role = i % 3 == 0 ? MOE_TENSOR_GATE : i % 3 == 1 ? MOE_TENSOR_UP : MOE_TENSOR_DOWN;
        t.expert = i / 3;
        t.index = -1;
        t.dtype = MOE_DTYPE_BF16;
        t.rank = 2;
        t.dims[0] = i % 3 == 2 ? layer->hidden_size : layer->intermediate_size;
        t.dims[1] = i % 3 == 2 ? layer->intermediate_size : layer->hidden_size;
        t.data = data;
        t.data_bytes = count * 2;
        if (moe_weights_set_tensor(weights, &t, &err)) fail("tensor", &err);
    }
    if (moe_weights_seal(weights, &err)) fail("seal", &err);
    free(data);
    return weights;
}

// One matrix of codes of expert 0, with all that belongs to it.
static void set_codes(moe_weights *weights, const moe_layer_desc *layer, int role)
{
    const int64_t h = layer->hidden_size, f = layer->intermediate_size;
    const int64_t n = role == MOE_TENSOR_DOWN ? h : f, k = h + f - n;
    float *values = (float *)malloc((size_t)(n * k) * sizeof values[0]);
    uint64_t state = 1;
    moe_quantize_desc q;
    moe_error err;
    for (int64_t i = 0; i < n * k; i++) values[i] = (float)((int)(random_u32(&state) % 2001) - 1000) * 3e-5f;
    quantized_begin(&q, layer->format, layer->format_block, layer->scale_dtype, values, n, k);
    if (moe_quantize(&q, &err)) fail("quantize", &err);
    if (set_quantized(weights, role, 0, &q, layer->format == MOE_FORMAT_NVFP4 ? 1e-3f : 0, &err)) fail("tensor", &err);
    quantized_free(&q);
    free(values);
}

// Every expert is a copy of the first one.
static moe_weights *make_codes(const moe_layer_desc *layer)
{
    moe_weights *weights;
    moe_error err;
    void *block;
    if (moe_weights_create(ctx, layer, NULL, &weights, &err)) fail("weights", &err);
    set_codes(weights, layer, MOE_TENSOR_GATE);
    set_codes(weights, layer, MOE_TENSOR_UP);
    set_codes(weights, layer, MOE_TENSOR_DOWN);
    block = malloc((size_t)weights->layout.expert.bytes);
    CALL(cuda->cuMemcpyDtoH(block, moe__device_block(weights, 0), (size_t)weights->layout.expert.bytes));
    for (int e = 1; e < layer->parallel.local_experts; e++) {
        CALL(cuda->cuMemcpyHtoD(moe__device_block(weights, e), block, (size_t)weights->layout.expert.bytes));
        weights->expert_set[e] = weights->expert_set[0];
    }
    free(block);
    if (moe_weights_seal(weights, &err)) fail("seal", &err);
    return weights;
}

// Bytes of an expert's matrices in the format, as checkpoints have them.
static double expert_bytes(const shape *s)
{
    const moe__scheme w = moe__weight_scheme(s->format, s->block, 0);
    double values = (is_gated(s) ? 3.0 : 2.0) * s->hidden * s->features, bits = moe_dtype_bits(w.dtype);
    if (w.columns > 0) bits += (double)moe_dtype_bits(w.scale_dtype) / w.columns / w.rows;
    return values * bits / 8;
}

// Logits whose k best are k draws without replacement: of equal experts, of 1 / (rank + 1), expert 5 and others; on a
// rank with some of the experts, of none of those ("empty"), or of number 5 alone ("one local").
static void fill_logits(const layer_bench *b, const char *load, int tokens)
{
    uint64_t state = 7;
    int experts = b->shape->experts;
    float *host = (float *)malloc(b->logits_bytes);
    for (int i = 0; i < b->inputs; i++) {
        for (int j = 0; j < tokens * experts; j++) {
            int e = j % experts;
            float u = ((float)(random_u32(&state) & 0xffffff) + 0.5f) / 16777216.0f;
            host[j] = -logf(-logf(u));
            if (load[0] == 'z') host[j] -= logf((float)(e + 1));
            if ((load[0] == 'e' || load[4] == 'l') && e < b->shape->local) host[j] -= 60;
            if (load[0] == 'o' && e == 5) host[j] = 30;
        }
        CALL(cuda->cuMemcpyHtoD(b->logits + (uint64_t)i * b->logits_bytes, host, b->logits_bytes));
    }
    free(host);
}

// Experts here that have tokens, and rows of theirs, on the average of the inputs.
static double active_experts(layer_bench *b, double *rows_of)
{
    int32_t counts[1024], active = 0;
    double slots = 0;
    uint64_t at = device_memory(sizeof counts);
    b->args.out_expert_counts = (int32_t *)(uintptr_t)at;
    for (int i = 0; i < b->inputs; i++) {
        enqueue_layer(b, 0, i);
        CALL(cuda->cuStreamSynchronize((moe__cu_stream)stream));
        CALL(cuda->cuMemcpyDtoH(counts, at, sizeof counts));
        for (int e = 0; e < b->shape->local; e++) {
            active += counts[e] > 0;
            slots += counts[e];
        }
    }
    b->args.out_expert_counts = NULL;
    CALL(cuda->cuMemFree(at));
    *rows_of = slots / b->inputs;
    return (double)active / b->inputs;
}

static void rest(void)
{
    struct timespec pause = { 0, 60000000 };
    nanosleep(&pause, NULL);
}

// One layer in a graph, in two states of the chip; two graphs with different logits in turn.
static void measure_long(layer_bench *b, row *rested, row *sustained)
{
    double us[2048];
    void *graph[2];
    int count = 0;
    double total = 0;
    for (int i = 0; i < 2; i++) graph[i] = record(enqueue_layer, b, i, 1);
    for (int i = 0; i < 4; i++) time_graph(graph[i % 2]);
    for (int i = 0; i < 9; i++) {
        rest();
        us[i] = time_graph(graph[i % 2]);
    }
    row_times(rested, us, 9);
    for (; total < 3e5 && count < 2048; count++) total += us[count] = time_graph(graph[count % 2]);
    row_times(sustained, us + count / 2, count - count / 2);
    for (int i = 0; i < 2; i++) CALL(cu.exec_destroy(graph[i]));
}

static void bench_tokens(layer_bench *b, const char *load, int tokens, const char *config)
{
    const shape *s = b->shape;
    double active, slots, room;
    row *r = row_next(s->name, load, "layer", tokens);
    r->config = config;
    r->format = s->format_name;
    b->args.num_tokens = tokens;
    b->logits_bytes = (size_t)tokens * (size_t)s->experts * 4;
    b->inputs = tokens > 1024 ? 2 : MAX_INPUTS;
    b->logits = device_memory((size_t)b->inputs * b->logits_bytes);
    fill_logits(b, load, tokens);
    active = active_experts(b, &slots);
    room = (double)b->weights->layout.tables;
    r->bytes = active * expert_bytes(s) + 4.0 * tokens * s->hidden;
    r->flops = (is_gated(s) ? 6.0 : 4.0) * s->hidden * s->features * slots;
    if (own_stream != NULL)
        r->floor_us = measure_stream((uint64_t)b->weights->device_blocks, (uint64_t)room, r->bytes);
    if (tokens < 1024) {
        measure(enqueue_layer, b, 4, tokens > 64 ? 14 : 24, r);
        print_row(r);
    } else {
        row *sustained = &rows[rows_count++];
        *sustained = *r;
        r->config = "rested";
        sustained->config = "sustained";
        measure_long(b, r, sustained);
        print_row(r);
        print_row(sustained);
    }
    CALL(cuda->cuMemFree((moe__cu_ptr)b->logits));
}

static void make_plan(layer_bench *b, const moe_layer_desc *layer, uint32_t flags)
{
    moe_plan_desc desc;
    moe_plan_info info;
    moe_error err;
    memset(&desc, 0, sizeof desc);
    memset(&info, 0, sizeof info);
    desc.max_tokens = MAX_TOKENS;
    desc.flags = flags;
    moe_plan_destroy(b->plan);
    if (moe_plan_create(ctx, layer, &desc, &b->plan, &err) || moe_plan_autotune(b->plan, b->weights, NULL, &err) ||
        moe_plan_get_info(b->plan, &info, &err))
        fail("plan", &err);
    if (b->args.workspace != NULL) CALL(cuda->cuMemFree((moe__cu_ptr)(uintptr_t)b->args.workspace));
    b->args.workspace = (void *)(uintptr_t)device_memory((size_t)info.workspace_bytes);
    b->args.workspace_bytes = info.workspace_bytes;
}

static void bench_shape(const shape *s, int only)
{
    static const int tokens[] = { 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384 };
    static const char *const loads[][3] = { { "uniform", "one hot", "zipf" }, { "uniform", "empty", "one local" } };
    moe_layer_desc layer;
    layer_bench b;
    const int codes = s->format != MOE_FORMAT_BF16, loads_of = codes ? 1 : 3;
    size_t x_bytes = (size_t)MAX_TOKENS * (size_t)s->hidden * 2;
    uint64_t state = 3;
    uint16_t *x = (uint16_t *)malloc(x_bytes);
    memset(&layer, 0, sizeof layer);
    memset(&b, 0, sizeof b);
    b.shape = s;
    layer.hidden_size = s->hidden;
    layer.intermediate_size = s->features;
    layer.num_experts = s->experts;
    layer.format = s->format;
    layer.format_block = s->block;
    layer.activation.kind = s->activation;
    moe_routing_preset(MOE_ROUTING_RENORMALIZE_NAIVE, &layer.routing, NULL);
    layer.routing.top_k = s->top_k;
    layer.parallel.omit_common = 1; // logits come from elsewhere
    layer.parallel.local_experts = s->local;
    b.weights = codes ? make_codes(&layer) : make_weights(&layer);
    b.args.input_mode = MOE_INPUT_LOGITS;
    make_plan(&b, &layer, 0);
    b.args.x = (const void *)(uintptr_t)device_memory(x_bytes);
    b.args.out = (void *)(uintptr_t)device_memory(x_bytes);
    for (size_t i = 0; i < x_bytes / 2; i++)
        x[i] = moe__f32_to_bf16((float)((int)(random_u32(&state) % 2001) - 1000) * 1e-3f);
    CALL(cuda->cuMemcpyHtoD((moe__cu_ptr)(uintptr_t)b.args.x, x, x_bytes));
    for (int l = 0; l < loads_of; l++)
        for (int i = 0; i < (int)(sizeof tokens / sizeof tokens[0]); i++) {
            if (only != 0 && tokens[i] != only) continue;
            if (only == 0 && codes && (tokens[i] & 0x24a9) != tokens[i]) continue; // 1, 8, 32, 128, 1024, 8192
            if (only == 0 && l > 0 && tokens[i] != 8 && tokens[i] != 128 && tokens[i] != 4096) continue;
            bench_tokens(&b, loads[s->local < s->experts][l], tokens[i], "");
        }
    if (!codes) make_plan(&b, &layer, MOE_PLAN_BATCH_INVARIANT);
    for (int i = 0; i < (int)(sizeof tokens / sizeof tokens[0]) && !codes; i++)
        if (only != 0 ? tokens[i] == only : tokens[i] == 1 || tokens[i] == 8 || tokens[i] == 32 || tokens[i] == 128)
            bench_tokens(&b, "uniform", tokens[i], "batch invariant");
    moe_plan_destroy(b.plan);
    moe_weights_destroy(b.weights);
    CALL(cuda->cuMemFree((moe__cu_ptr)(uintptr_t)b.args.workspace));
    CALL(cuda->cuMemFree((moe__cu_ptr)(uintptr_t)b.args.x));
    CALL(cuda->cuMemFree((moe__cu_ptr)(uintptr_t)b.args.out));
    free(x);
}

// Gate and up of 32 experts, on the device in the order of the caller's, into tiles; bytes: read and written.
static void bench_pack(int32_t layout, const char *name)
{
    enum { EXPERTS = 32, HIDDEN = 4096, FEATURES = 1536, REPEAT = 9 };
    const size_t bytes = (size_t)EXPERTS * 2 * FEATURES * HIDDEN * 2;
    moe_layer_desc layer;
    moe_tensor t;
    moe_error err;
    double us[REPEAT];
    uint64_t source = device_memory(bytes);
    row *r = row_next("32 experts, H 4096 I 1536", name, "pack", 0);
    memset(&layer, 0, sizeof layer);
    memset(&t, 0, sizeof t);
    layer.hidden_size = HIDDEN;
    layer.intermediate_size = FEATURES;
    layer.num_experts = EXPERTS;
    layer.format = MOE_FORMAT_BF16;
    layer.activation.kind = MOE_ACTIVATION_SWIGLU;
    moe_routing_preset(MOE_ROUTING_RENORMALIZE_NAIVE, &layer.routing, NULL);
    layer.routing.top_k = 8;
    t.role = MOE_TENSOR_GATE_UP;
    t.expert = t.index = -1;
    t.dtype = MOE_DTYPE_BF16;
    t.layout = layout;
    t.halves = MOE_HALVES_GATE_UP;
    t.rank = 3;
    t.dims[0] = EXPERTS;
    t.dims[1] = layout == MOE_LAYOUT_MAJOR_MN ? HIDDEN : 2 * FEATURES;
    t.dims[2] = layout == MOE_LAYOUT_MAJOR_MN ? 2 * FEATURES : HIDDEN;
    t.memory = MOE_MEMORY_DEVICE;
    t.data = (const void *)(uintptr_t)source;
    t.data_bytes = bytes;
    CALL(cuda->cuMemsetD8((moe__cu_ptr)source, 1, bytes));
    for (int i = 0; i < REPEAT; i++) {
        struct timespec begin, end;
        moe_weights *weights;
        if (moe_weights_create(ctx, &layer, NULL, &weights, &err)) fail("weights", &err);
        clock_gettime(CLOCK_MONOTONIC, &begin);
        if (moe_weights_set_tensor(weights, &t, &err)) fail("tensor", &err);
        clock_gettime(CLOCK_MONOTONIC, &end);
        us[i] = 1e6 * (double)(end.tv_sec - begin.tv_sec) + 1e-3 * (double)(end.tv_nsec - begin.tv_nsec);
        moe_weights_destroy(weights);
    }
    row_times(r, us + 1, REPEAT - 1); // the first compiles
    r->bytes = 2.0 * (double)bytes;
    print_row(r);
    printf("%.2f TB/s\n", 1e-6 * r->bytes / r->us);
    CALL(cuda->cuMemFree((moe__cu_ptr)source));
}

int main(int argc, char **argv)
{
    char ceilings[64];
    if (!bench_open()) return 0;
    if (cuda->arch >= 90) own_stream = open_stream();
    snprintf(ceilings, sizeof ceilings, "\"launch_us\": %.3f", measure_launch());
    print_head();
    if (argc < 3 || strstr("pack", argv[2]) != NULL) {
        bench_pack(MOE_LAYOUT_MAJOR_K, "output-major");
        bench_pack(MOE_LAYOUT_MAJOR_MN, "input-major");
    }
    for (int i = 0; i < (int)(sizeof shapes / sizeof shapes[0]); i++)
        if (argc < 3 || strstr(shapes[i].name, argv[2]) != NULL || strstr(shapes[i].format_name, argv[2]) != NULL)
            bench_shape(&shapes[i], argc > 3 ? atoi(argv[3]) : 0);
    if (argc > 1) write_json(argv[1], ceilings);
    moe_context_destroy(own_stream);
    moe_context_destroy(ctx);
    return 0;
}
