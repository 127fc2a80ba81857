// bench_cpu.c - speed of the CPU back end beside the two ceilings of the machine, measured in the same run
//
//     make bench            or: cc -O2 -o build/bench_cpu bench/bench_cpu.c -lpthread && build/bench_cpu [result.json]
//
// Layer: Qwen3-30B-A3B's (E128 k8 H2048 I768, swiglu) in several formats, from logits to output; random logits, other
// ones in every call, so that one token's experts (75 MB in bf16) come from memory. Floors: the active experts' bytes,
// scales among them, at the read stream of all threads, and the multiply-adds at the peak of the widest vector unit in
// use. MOE_BENCH_THREADS and MOE_BENCH_ISA choose others.
#define _POSIX_C_SOURCE 200809L // clock_gettime
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"

#include <stdio.h>
#include <time.h>

enum { HIDDEN = 2048, INNER = 768, EXPERTS = 128, TOP_K = 8, MAX_TOKENS = 512, MAX_RUNS = 400 };

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static uint32_t random_u32(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

static int fail(const char *what, const moe_error *err)
{
    fprintf(stderr, "bench_cpu: %s: %s\n", what, err->text);
    return 1;
}

// ---- ceilings ----

#define PEAK_LOOP(vec, set1, fma, store) \
    vec a0 = set1(0.1f), a1 = a0, a2 = a0, a3 = a0, a4 = a0, a5 = a0, a6 = a0, a7 = a0, a8 = a0, a9 = a0; \
    const vec b = set1(0.999f), c = set1(0.001f); \
    for (long i = 0; i < n; i++) { \
        a0 = fma(a0, b, c); a1 = fma(a1, b, c); a2 = fma(a2, b, c); a3 = fma(a3, b, c); a4 = fma(a4, b, c); \
        a5 = fma(a5, b, c); a6 = fma(a6, b, c); a7 = fma(a7, b, c); a8 = fma(a8, b, c); a9 = fma(a9, b, c); \
    } \
    store(out, a0); store(out + 16, a1); store(out + 32, a2); store(out + 48, a3); store(out + 64, a4); \
    store(out + 80, a5); store(out + 96, a6); store(out + 112, a7); store(out + 128, a8); store(out + 144, a9)

#if defined(MOE__X86)
MOE__AVX2 static void peak_avx2(long n, float *out)
{
    PEAK_LOOP(__m256, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_storeu_ps);
}
MOE__AVX512 static void peak_avx512(long n, float *out)
{
    PEAK_LOOP(__m512, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_storeu_ps);
}
#endif
#if defined(MOE__NEON)
static void peak_neon(long n, float *out) { PEAK_LOOP(float32x4_t, vdupq_n_f32, moe__neon_fma, vst1q_f32); }
#endif
static float scalar_set1(float x) { return x; }
static void scalar_store(float *out, float x) { *out = x; }
static void peak_scalar(long n, float *out) { PEAK_LOOP(float, scalar_set1, moe__fmaf, scalar_store); }

typedef struct ceiling {
    int32_t isa;
    long n;
    const uint64_t *data;
    size_t words;            // per task
    volatile float sink;
    volatile uint64_t sum;
} ceiling;

static void peak_task(void *arg, int32_t index)
{
    ceiling *c = (ceiling *)arg;
    float out[160];
    (void)index;
#if defined(MOE__X86)
    if (c->isa == MOE__ISA_AVX512) peak_avx512(c->n, out);
    else if (c->isa == MOE__ISA_AVX2) peak_avx2(c->n, out);
    else peak_scalar(c->n, out);
#elif defined(MOE__NEON)
    if (c->isa == MOE__ISA_NEON) peak_neon(c->n, out);
    else peak_scalar(c->n, out);
#else
    peak_scalar(c->n, out);
#endif
    c->sink = out[0];
}

static int32_t vector_lanes(int32_t isa)
{
    return isa == MOE__ISA_AVX512 ? 16 : isa == MOE__ISA_AVX2 ? 8 : isa == MOE__ISA_NEON ? 4 : 1;
}

// Multiply-adds of all threads, in GFLOPS (2 per multiply-add): the best of five.
static double measure_peak(moe_context *ctx)
{
    ceiling c;
    double best = 0;
    memset(&c, 0, sizeof c);
    c.isa = ctx->isa;
    c.n = c.isa == MOE__ISA_SCALAR ? 2000000 : 10000000;
    for (int i = 0; i < 5; i++) {
        double t = seconds(), rate;
        moe__parallel(ctx, ctx->desc.threads, peak_task, &c);
        t = seconds() - t;
        rate = 2.0 * 10 * (double)c.n * vector_lanes(c.isa) * ctx->desc.threads / t * 1e-9;
        if (rate > best) best = rate;
    }
    return best;
}

static void stream_task(void *arg, int32_t index)
{
    ceiling *c = (ceiling *)arg;
    const uint64_t *p = c->data + (size_t)index * c->words;
    uint64_t s[8] = { 0 };
    for (size_t i = 0; i + 8 <= c->words; i += 8) {
        s[0] ^= p[i]; s[1] ^= p[i + 1]; s[2] ^= p[i + 2]; s[3] ^= p[i + 3];
        s[4] ^= p[i + 4]; s[5] ^= p[i + 5]; s[6] ^= p[i + 6]; s[7] ^= p[i + 7];
    }
    c->sum = s[0] ^ s[1] ^ s[2] ^ s[3] ^ s[4] ^ s[5] ^ s[6] ^ s[7];
}

// Reading with all threads, in GB/s: the best of five passes over `bytes`.
static double measure_stream(moe_context *ctx, const void *data, size_t bytes)
{
    enum { TASKS = 512 };
    ceiling c;
    double best = 0;
    memset(&c, 0, sizeof c);
    c.data = (const uint64_t *)data;
    c.words = bytes / TASKS / 8;
    for (int i = 0; i < 5; i++) {
        double t = seconds(), rate;
        moe__parallel(ctx, TASKS, stream_task, &c);
        t = seconds() - t;
        rate = (double)(c.words * 8 * TASKS) / t * 1e-9;
        if (rate > best) best = rate;
    }
    return best;
}

// ---- the layer ----

// The same random matrices for every expert, as codes and scales where the format has them.
static int set_matrix(moe_weights *weights, const moe_layer_desc *layer, int32_t role, float *values, moe_error *err)
{
    int32_t rows = role == MOE_TENSOR_DOWN ? HIDDEN : INNER, columns = HIDDEN + INNER - rows, result = MOE_OK;
    moe__scheme s = moe__weight_scheme(layer->format, layer->format_block, layer->scale_dtype);
    moe_quantize_desc q;
    moe_tensor parts[3];
    int count = moe__scheme_is_float(&s) ? 1 : layer->format == MOE_FORMAT_NVFP4_W4A16 ? 3 : 2;
    memset(&q, 0, sizeof q);
    memset(parts, 0, sizeof parts);
    for (int i = 0; i < 3; i++) {
        parts[i].role = role;
        parts[i].part = MOE_PART_DATA + i; // then SCALE, GLOBAL_SCALE
        parts[i].rank = i < 2 ? 2 : 0;
        parts[i].dtype = MOE_DTYPE_F32;
    }
    parts[0].dims[0] = rows;
    parts[0].dims[1] = columns;
    parts[0].data = values;
    parts[0].data_bytes = (uint64_t)rows * (uint64_t)columns * 4;
    if (count > 1) {
        parts[0].dtype = s.dtype;
        parts[0].data_bytes = q.codes_bytes = (uint64_t)rows * (uint64_t)columns * (uint64_t)moe_dtype_bits(s.dtype) / 8;
        parts[1].dtype = s.scale_dtype;
        parts[1].dims[0] = rows / s.rows;
        parts[1].dims[1] = columns / s.columns;
        q.scales_bytes = (uint64_t)(parts[1].dims[0] * parts[1].dims[1] * moe_dtype_bits(s.scale_dtype) / 8);
        parts[1].data_bytes = q.scales_bytes;
        parts[2].data_bytes = 4;
        q.format = layer->format;
        q.format_block = layer->format_block;
        q.dtype = MOE_DTYPE_F32;
        q.rows = rows;
        q.columns = columns;
        q.values = values;
        parts[0].data = q.codes = malloc(q.codes_bytes);
        parts[1].data = q.scales = malloc(q.scales_bytes);
        parts[2].data = &q.global_scale;
        result = moe_quantize(&q, err);
    }
    for (int32_t e = 0; e < EXPERTS; e++)
        for (int i = 0; i < count && result == MOE_OK; i++) {
            parts[i].expert = e;
            result = moe_weights_set_tensor(weights, &parts[i], err);
        }
    free(q.codes);
    free(q.scales);
    return result;
}

static int make_weights(moe_context *ctx, const moe_layer_desc *layer, moe_weights **weights, moe_error *err)
{
    const size_t count = (size_t)HIDDEN * INNER;
    float *values = (float *)malloc(count * sizeof values[0]);
    uint64_t state = 1;
    int result;
    if (values == NULL) return 1;
    result = moe_weights_create(ctx, layer, NULL, weights, err);
    for (int32_t role = MOE_TENSOR_GATE; role <= MOE_TENSOR_DOWN && result == MOE_OK; role++) {
        if (role == MOE_TENSOR_GATE_UP) continue;
        for (size_t i = 0; i < count; i++) values[i] = (float)((int32_t)random_u32(&state) % 1000 - 500) * 1e-4f;
        result = set_matrix(*weights, layer, role, values, err);
    }
    free(values);
    return result == MOE_OK ? moe_weights_seal(*weights, err) : result;
}

typedef struct row {
    const char *format;
    int32_t tokens;
    double us, us_min, us_max, bytes, flops, floor_us;
} row;

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

// Calls with new logits until 1.5 s have passed: median, shortest, longest.
static int measure_layer(const moe_plan *plan, const moe_weights *weights, moe_execute_args *args, float *logits,
                         double expert_bytes, row *out)
{
    static uint64_t state = 7;
    static double us[MAX_RUNS];
    int32_t counts[EXPERTS], runs = 0, result;
    double start = seconds(), active = 0;
    args->num_tokens = out->tokens;
    args->out_expert_counts = counts;
    while (runs < MAX_RUNS && (runs < 5 || seconds() - start < 1.5)) {
        double t;
        for (int32_t i = 0; i < out->tokens * EXPERTS; i++) logits[i] = (float)(random_u32(&state) & 0xffff) * 1e-4f;
        t = seconds();
        if ((result = moe_execute(plan, weights, args, NULL)) != MOE_OK) return result;
        us[runs] = (seconds() - t) * 1e6;
        for (int32_t e = 0; e < EXPERTS; e++) active += counts[e] > 0;
        runs++;
    }
    qsort(us, (size_t)runs, sizeof us[0], compare);
    out->us = us[runs / 2];
    out->us_min = us[0];
    out->us_max = us[runs - 1];
    out->bytes = active / runs * expert_bytes;
    out->flops = 2.0 * 3 * HIDDEN * INNER * TOP_K * out->tokens;
    return MOE_OK;
}

static void write_json(const char *path, const moe_context_info *info, double stream, double peak, const row *rows,
                       int count)
{
    FILE *f = fopen(path, "w");
    const char *commit = getenv("MOE_COMMIT");
    time_t now = time(NULL);
    char date[32];
    if (f == NULL) {
        fprintf(stderr, "bench_cpu: %s cannot be written\n", path);
        exit(1);
    }
    strftime(date, sizeof date, "%Y-%m-%d", gmtime(&now));
    fprintf(f, "{\"chip\": \"%s, %d threads, %s\", \"driver\": \"\", \"commit\": \"%s\", \"date\": \"%s\",\n",
            info->name, info->threads, info->isa, commit != NULL ? commit : "", date);
    fprintf(f, " \"ceilings\": {\"stream_gb_s\": %.2f, \"fma_gflops\": %.1f},\n \"rows\": [\n", stream, peak);
    for (int i = 0; i < count; i++)
        fprintf(f,
                "  {\"layer\": \"E128 k8 H2048 I768\", \"format\": \"%s\", \"load\": \"uniform\", \"tokens\": %d, "
                "\"stage\": \"layer\", \"us\": %.1f, \"us_min\": %.1f, \"us_max\": %.1f, \"floor_us\": %.1f, "
                "\"bytes\": %.0f, \"flops\": %.0f, \"config\": \"cpu_%s\"}%s\n",
                rows[i].format, rows[i].tokens, rows[i].us, rows[i].us_min, rows[i].us_max, rows[i].floor_us, rows[i].bytes,
                rows[i].flops, info->isa, i + 1 < count ? "," : "");
    fprintf(f, " ]}\n");
    fclose(f);
}

typedef struct measured {
    const char *name;
    int32_t format, block;
} measured;

static const measured formats[] = {
    { "bf16", MOE_FORMAT_BF16, 0 },
    { "fp8 block", MOE_FORMAT_FP8_BLOCK, 128 },
    { "nvfp4 w4a16", MOE_FORMAT_NVFP4_W4A16, 0 },
    { "mxfp4 w4a16", MOE_FORMAT_MXFP4_W4A16, 0 },
    { "int4 w4a16", MOE_FORMAT_INT4_W4A16, 32 },
};
static const int32_t token_counts[] = { 1, 8, 32, 128, 512 };
enum { FORMATS = sizeof formats / sizeof formats[0], COUNTS = sizeof token_counts / sizeof token_counts[0] };

typedef struct ceilings {
    double stream, peak; // GB/s, GFLOPS; 0: not measured yet
} ceilings;

// A line for each number of tokens into rows [COUNTS].
static int bench_format(moe_context *ctx, const measured *f, moe_execute_args *args, float *logits, ceilings *most,
                        row *rows)
{
    moe_error err;
    moe_weights *weights;
    moe_plan *plan;
    moe_layer_desc layer;
    moe_plan_desc plan_desc;
    moe_plan_info info;
    double expert_bytes;
    memset(&layer, 0, sizeof layer);
    memset(&plan_desc, 0, sizeof plan_desc);
    memset(&info, 0, sizeof info);
    layer.hidden_size = HIDDEN;
    layer.intermediate_size = INNER;
    layer.num_experts = EXPERTS;
    layer.format = f->format;
    layer.format_block = f->block;
    layer.activation.kind = MOE_ACTIVATION_SWIGLU;
    plan_desc.max_tokens = MAX_TOKENS;
    if (moe_routing_preset(MOE_ROUTING_RENORMALIZE_NAIVE, &layer.routing, &err)) return fail("routing", &err);
    layer.routing.top_k = TOP_K;
    if (make_weights(ctx, &layer, &weights, &err)) return fail("weights", &err);
    if (moe_plan_create(ctx, &layer, &plan_desc, &plan, &err) || moe_plan_get_info(plan, &info, &err))
        return fail("plan", &err);
    args->workspace = moe__alloc(&ctx->desc.allocator, info.workspace_bytes);
    args->workspace_bytes = info.workspace_bytes;
    if (most->stream == 0) { // of the first format, the largest
        most->stream = measure_stream(ctx, weights->memory, (size_t)weights->layout.bytes);
        most->peak = measure_peak(ctx);
        printf("ceilings: read stream %.1f GB/s, fp32 multiply-add %.1f GFLOPS\n", most->stream, most->peak);
    }
    expert_bytes = (double)weights->layout.expert.bytes;
    printf("\nE128 k8 H2048 I768 %s\n", f->name);
    printf("%7s %12s %10s %10s %9s %9s %12s %12s\n", "tokens", "us (median)", "us min", "floor us", "GB/s", "GFLOPS",
           "us / stream", "of FMA peak");
    for (int i = 0; i < COUNTS; i++) {
        double by_stream, by_peak;
        rows[i].format = f->name;
        rows[i].tokens = token_counts[i];
        if (measure_layer(plan, weights, args, logits, expert_bytes, &rows[i]) != MOE_OK) {
            moe_execute_check(plan, weights, args, &err);
            return fail("execute", &err);
        }
        by_stream = rows[i].bytes / most->stream * 1e-3;
        by_peak = rows[i].flops / most->peak * 1e-3;
        rows[i].floor_us = by_stream > by_peak ? by_stream : by_peak;
        printf("%7d %12.0f %10.0f %10.0f %9.1f %9.1f %12.2f %11.0f%%\n", rows[i].tokens, rows[i].us, rows[i].us_min,
               rows[i].floor_us, rows[i].bytes / rows[i].us * 1e-3, rows[i].flops / rows[i].us * 1e-3,
               rows[i].us / by_stream, 100 * by_peak / rows[i].us);
    }
    printf("asked for: 1 token at most 3.00 times the stream (%.2f), 512 tokens at least 25%% of the peak (%.0f%%)\n",
           rows[0].us / (rows[0].bytes / most->stream * 1e-3),
           100 * rows[COUNTS - 1].flops / most->peak * 1e-3 / rows[COUNTS - 1].us);
    moe__free(&ctx->desc.allocator, args->workspace, info.workspace_bytes);
    moe_plan_destroy(plan);
    moe_weights_destroy(weights);
    return 0;
}

int main(int argc, char **argv)
{
    static row rows[FORMATS * COUNTS];
    ceilings most = { 0, 0 };
    moe_error err;
    moe_context *ctx;
    moe_context_desc desc;
    moe_context_info info;
    moe_execute_args args;
    float *logits = (float *)malloc((size_t)MAX_TOKENS * EXPERTS * sizeof logits[0]);
    uint16_t *x = (uint16_t *)calloc((size_t)MAX_TOKENS * HIDDEN, 2),
             *out = (uint16_t *)malloc((size_t)MAX_TOKENS * HIDDEN * 2);
    memset(&desc, 0, sizeof desc);
    memset(&info, 0, sizeof info);
    memset(&args, 0, sizeof args);
    desc.isa = getenv("MOE_BENCH_ISA");
    if (getenv("MOE_BENCH_THREADS") != NULL) desc.threads = atoi(getenv("MOE_BENCH_THREADS"));
    if (moe_context_create(&desc, &ctx, &err) || moe_context_get_info(ctx, &info, &err)) return fail("context", &err);
    for (int i = 0; i < MAX_TOKENS * HIDDEN; i++) x[i] = moe__f32_to_bf16((float)(i % 201 - 100) * 0.01f);
    args.input_mode = MOE_INPUT_LOGITS;
    args.x = x;
    args.logits = logits;
    args.out = out;
    printf("%s, %d threads, %s\n", info.name, info.threads, info.isa);
    for (int i = 0; i < FORMATS; i++)
        if (bench_format(ctx, &formats[i], &args, logits, &most, rows + i * COUNTS) != 0) return 1;
    if (argc > 1) write_json(argv[1], &info, most.stream, most.peak, rows, FORMATS * COUNTS);
    moe_context_destroy(ctx);
    free(logits);
    free(x);
    free(out);
    return 0;
}
