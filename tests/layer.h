// layer.h - random layers for the tests of execution: a description, its weights, a plan, inputs, and the reference's
// answer
//
// Included behind moe.h and test.h. A fixture is zero-initialised; set `layer`, `plan_desc`, `context_desc` and the
// sizes, then fixture_open(); fixture_close() in every case. Members that are NULL were not needed.
#ifndef LAYER_H
#define LAYER_H

#include "quantized.h"

typedef struct fixture {
    moe_context_desc context_desc;
    moe_layer_desc layer;
    moe_plan_desc plan_desc;
    uint32_t pruned;          // bit per routed expert: a constant in place of matrices
    uint64_t seed;
    float matrix_scale;       // multiplies the matrices of experts; 0: 1, negative: 0
    moe_context *ctx;
    moe_weights *weights;
    moe_plan *plan;
    moe_plan_info info;
    int tokens, experts_end;
    moe_execute_args args;    // inputs and outputs of `tokens` tokens
    float *x32;               // x as the plan's x_dtype rounds it
    unsigned char *memory;    // all of them
    size_t out_bytes;
    float *reference;         // [T][H]
} fixture;

TEST_UNUSED static moe_layer_desc small_layer(int format, int activation)
{
    moe_layer_desc layer;
    memset(&layer, 0, sizeof layer);
    layer.hidden_size = 72;
    layer.intermediate_size = 40;
    layer.num_experts = 12;
    layer.format = format;
    layer.activation.kind = activation;
    layer.routing.score = MOE_SCORE_SOFTMAX;
    layer.routing.score_order = MOE_SCORE_BEFORE_TOPK;
    layer.routing.renormalize = MOE_RENORMALIZE_SUM;
    layer.routing.top_k = 4;
    return layer;
}

// Deterministic in (seed, role, expert), so that ranks of one layer have the same tensors.
static float *random_tensor(uint64_t seed, int role, int expert, size_t count, float scale)
{
    uint64_t state = seed * 1000003 + (uint64_t)role * 8191 + (uint64_t)(expert + 1);
    float *data = (float *)malloc(count * sizeof data[0] + 1);
    for (size_t i = 0; i < count; i++) data[i] = test_random_float(&state) * scale;
    return data;
}

static int is_matrix(int role)
{
    return role == MOE_TENSOR_GATE || role == MOE_TENSOR_UP || role == MOE_TENSOR_DOWN ||
           role == MOE_TENSOR_SHARED_GATE || role == MOE_TENSOR_SHARED_UP || role == MOE_TENSOR_SHARED_DOWN;
}

static int set_random(fixture *f, int role, int expert, int rows, int columns, float scale, moe_error *err)
{
    moe_tensor t;
    int matrix = rows > 1 || is_matrix(role) || role == MOE_TENSOR_ROUTER, result, format = f->layer.format;
    float *data = random_tensor(f->seed, role, expert, (size_t)rows * (size_t)columns, scale);
    if (is_matrix(role) && f->matrix_scale != 0)
        for (int i = 0; i < rows * columns; i++) data[i] *= f->matrix_scale < 0 ? 0 : f->matrix_scale;
    if (role >= MOE_TENSOR_SHARED_GATE && f->layer.shared.format != 0) format = f->layer.shared.format;
    if (is_matrix(role) && format > MOE_FORMAT_F16) {
        moe_quantize_desc q;
        result = quantized_make(&q, format, f->layer.format_block, f->layer.scale_dtype, data, rows, columns, err);
        if (result == MOE_OK)
            result = set_quantized(f->weights, role, expert, &q, 0.02f + 0.005f * (float)(expert + 1), err);
        quantized_free(&q);
        free(data);
        return result;
    }
    memset(&t, 0, sizeof t);
    t.role = role;
    t.expert = expert;
    t.index = -1;
    t.dtype = MOE_DTYPE_F32;
    t.rank = matrix ? 2 : 1;
    t.dims[0] = matrix ? rows : columns;
    t.dims[1] = matrix ? columns : 0;
    t.data = data;
    t.data_bytes = (uint64_t)rows * (uint64_t)columns * 4;
    if (role >= MOE_TENSOR_ALPHA && role <= MOE_TENSOR_LIMIT)
        for (int i = 0; i < columns; i++) data[i] = data[i] + 1.5f;
    if (role == MOE_TENSOR_PER_EXPERT_SCALE || role == MOE_TENSOR_ROUTER_GLOBAL_SCALE)
        for (int i = 0; i < rows * columns; i++) data[i] = data[i] + 1;
    result = moe_weights_set_tensor(f->weights, &t, err);
    free(data);
    return result;
}

static int set_expert(fixture *f, int id, moe_error *err)
{
    const moe_layer_desc *l = &f->layer;
    int gated = moe_activation_is_gated(l->activation.kind) == 1, h = l->hidden_size, i = l->intermediate_size, result;
    if (id < l->num_experts && id < 32 && (f->pruned >> id & 1u) != 0)
        return set_random(f, MOE_TENSOR_CONSTANT, id, 1, h, 1, err);
    if ((gated && (result = set_random(f, MOE_TENSOR_GATE, id, i, h, 0.4f, err)) != 0) ||
        (result = set_random(f, MOE_TENSOR_UP, id, i, h, 0.4f, err)) != 0 ||
        (result = set_random(f, MOE_TENSOR_DOWN, id, h, i, 0.4f, err)) != 0)
        return result;
    if (l->gemm1_bias && gated && (result = set_random(f, MOE_TENSOR_GATE_BIAS, id, 1, i, 1, err)) != 0) return result;
    if (l->gemm1_bias && (result = set_random(f, MOE_TENSOR_UP_BIAS, id, 1, i, 1, err)) != 0) return result;
    return l->gemm2_bias ? set_random(f, MOE_TENSOR_DOWN_BIAS, id, 1, h, 1, err) : MOE_OK;
}

static int set_common(fixture *f, moe_error *err)
{
    const moe_layer_desc *l = &f->layer;
    const moe_routing_desc *r = &l->routing;
    int gated = moe_activation_is_gated(l->activation.kind) == 1, h = l->hidden_size, result = 0;
    int shared = l->shared.count * l->shared.intermediate_size, ranked = l->num_experts + r->special_experts;
    int router = l->router.input_size > 0 ? l->router.input_size : h,
        width = ranked + (r->extra_scored ? r->extra_slots : 0);
    if (shared > 0) {
        if (gated) result |= set_random(f, MOE_TENSOR_SHARED_GATE, -1, shared, h, 0.4f, err);
        result |= set_random(f, MOE_TENSOR_SHARED_UP, -1, shared, h, 0.4f, err);
        result |= set_random(f, MOE_TENSOR_SHARED_DOWN, -1, h, shared, 0.4f, err);
        if (l->shared.gate) result |= set_random(f, MOE_TENSOR_SHARED_TOKEN_GATE, -1, 1, h, 0.3f, err);
    }
    result |= set_random(f, MOE_TENSOR_ROUTER, -1, width, router, 0.3f, err);
    if (l->router.bias) result |= set_random(f, MOE_TENSOR_ROUTER_BIAS, -1, 1, width, 1, err);
    if (l->router.input_scale) result |= set_random(f, MOE_TENSOR_ROUTER_INPUT_SCALE, -1, 1, router, 1, err);
    if (r->global_scale) result |= set_random(f, MOE_TENSOR_ROUTER_GLOBAL_SCALE, -1, 1, 1, 0.5f, err);
    if (r->bias_rows > 0) result |= set_random(f, MOE_TENSOR_SELECT_BIAS, -1, r->bias_rows, ranked, 0.1f, err);
    if (r->per_expert_scale) result |= set_random(f, MOE_TENSOR_PER_EXPERT_SCALE, -1, 1, ranked, 0.5f, err);
    if (l->activation.per_expert)
        for (int role = MOE_TENSOR_ALPHA; role <= MOE_TENSOR_LIMIT; role++)
            result |= set_random(f, role, -1, 1, l->num_experts, 1, err);
    if (l->row_norm) result |= set_random(f, MOE_TENSOR_ROW_NORM, -1, 1, h, 1, err);
    if (r->special_kind == MOE_SPECIAL_CONSTANT && !l->parallel.omit_common)
        for (int s = 0; s < r->special_experts; s++)
            result |= set_random(f, MOE_TENSOR_CONSTANT, l->num_experts + s, 1, h, 1, err);
    return result;
}

static void fixture_close(fixture *f)
{
    moe_plan_destroy(f->plan);
    moe_weights_destroy(f->weights);
    moe_context_destroy(f->ctx);
    free(f->memory);
    free(f->x32);
    free(f->reference);
    f->plan = NULL;
    f->weights = NULL;
    f->ctx = NULL;
    f->memory = NULL;
    f->x32 = f->reference = NULL;
}

static size_t dtype_bytes(int dtype) { return (size_t)moe_dtype_bits(dtype) / 8; }

// Places an area at the end of *bytes and returns its offset.
static size_t area(size_t *bytes, size_t size)
{
    size_t at = *bytes;
    *bytes += (size + 255) / 256 * 256 + 256;
    return at;
}

static void fixture_inputs(fixture *f)
{
    const moe_plan_desc *d = &f->plan->desc; // resolved
    size_t t = (size_t)f->tokens, h = (size_t)f->layer.hidden_size, k = (size_t)f->info.slots,
           w = (size_t)f->info.router_width;
    size_t bytes = 0, x, logits, out, ids, weights, rows, counts, faults, workspace;
    uint64_t state = f->seed + 77;
    size_t out_rows = t * k > t ? t * k : t;
    x = area(&bytes, t * h * dtype_bytes(d->x_dtype));
    logits = area(&bytes, t * w * dtype_bytes(d->logits_dtype));
    f->out_bytes = out_rows * h * dtype_bytes(d->out_dtype);
    out = area(&bytes, f->out_bytes);
    ids = area(&bytes, t * k * 4);
    weights = area(&bytes, t * k * 4);
    rows = area(&bytes, t * k * 4);
    counts = area(&bytes, (size_t)f->layer.num_experts * 4);
    faults = area(&bytes, MOE_FAULTS * 4);
    workspace = area(&bytes, (size_t)f->info.workspace_bytes);
    f->memory = (unsigned char *)malloc(bytes + 256);
    memset(f->memory, 0xff, bytes + 256);
    {
        unsigned char *base = f->memory + (256 - (uintptr_t)f->memory % 256) % 256;
        f->x32 = (float *)malloc(t * h * 4 + 1);
        for (size_t i = 0; i < t * h; i++) {
            moe__store(base + x, d->x_dtype, (int64_t)i, test_random_float(&state));
            f->x32[i] = moe__load(base + x, d->x_dtype, (int64_t)i);
        }
        for (size_t i = 0; i < t * w; i++)
            moe__store(base + logits, d->logits_dtype, (int64_t)i, 3 * test_random_float(&state));
        memset(&f->args, 0, sizeof f->args);
        f->args.input_mode = MOE_INPUT_LOGITS;
        f->args.num_tokens = f->tokens;
        f->args.x = base + x;
        f->args.logits = base + logits;
        f->args.out = base + out;
        f->args.out_ids = (int32_t *)(void *)(base + ids);
        f->args.out_weights = (float *)(void *)(base + weights);
        f->args.out_row_of_slot = (int32_t *)(void *)(base + rows);
        f->args.out_expert_counts = (int32_t *)(void *)(base + counts);
        f->args.out_faults = (uint32_t *)(void *)(base + faults);
        f->args.workspace = base + workspace;
        f->args.workspace_bytes = f->info.workspace_bytes;
    }
}

// 0 when everything was made.
static int fixture_open(fixture *f, moe_error *err)
{
    int ids_end = f->layer.num_experts + f->layer.routing.special_experts + f->layer.routing.extra_slots, result;
    if (f->tokens == 0) f->tokens = 9;
    if (f->seed == 0) f->seed = 1;
    if (f->plan_desc.max_tokens == 0) f->plan_desc.max_tokens = f->tokens > 0 ? f->tokens : 1;
    if (f->tokens < 0) f->tokens = 0;
    f->experts_end = ids_end;
    if ((result = moe_context_create(&f->context_desc, &f->ctx, err)) != 0 ||
        (result = moe_weights_create(f->ctx, &f->layer, NULL, &f->weights, err)) != 0)
        return result;
    for (int id = 0; id < ids_end; id++) {
        if (id >= f->layer.num_experts && id < f->layer.num_experts + f->layer.routing.special_experts) continue;
        if (id >= f->layer.num_experts && f->layer.parallel.omit_common) continue;
        if ((result = set_expert(f, id, err)) != 0) return result;
    }
    if ((result = set_common(f, err)) != 0 || (result = moe_weights_seal(f->weights, err)) != 0 ||
        (result = moe_plan_create(f->ctx, &f->layer, &f->plan_desc, &f->plan, err)) != 0 ||
        (result = moe_plan_get_info(f->plan, &f->info, err)) != 0)
        return result;
    fixture_inputs(f);
    f->reference = (float *)calloc((size_t)f->tokens * (size_t)f->layer.hidden_size + 1, sizeof(float));
    return MOE_OK;
}

// f->reference = the answer for given ids and weights.
TEST_UNUSED static int fixture_reference(fixture *f, const int32_t *ids, const float *weights, moe_error *err)
{
    moe_reference_layer_args r;
    memset(&r, 0, sizeof r);
    r.num_tokens = f->tokens;
    r.intermediate_dtype = f->plan_desc.intermediate_dtype;
    r.x = f->x32;
    r.ids = ids;
    r.weights = weights;
    r.shared_gate = f->args.shared_gate;
    r.rows = moe_weights_row;
    r.rows_user = f->weights;
    r.out = f->reference;
    return moe_reference_layer(&f->layer, &r, err);
}

// Values of out that are not the reference's, to the bit; 0 is right.
TEST_UNUSED static int fixture_differs(const fixture *f)
{
    int count = 0, h = f->layer.hidden_size, dtype = f->plan->desc.out_dtype;
    int64_t stride = f->args.out_stride == 0 ? h : f->args.out_stride;
    for (int t = 0; t < f->tokens; t++)
        for (int i = 0; i < h; i++) {
            float expected = moe__round_to(f->reference[(size_t)t * (size_t)h + (size_t)i], dtype);
            float got = moe__load(f->args.out, dtype, t * stride + i);
            if (memcmp(&expected, &got, sizeof got) != 0) count++;
        }
    return count;
}

// Execution and the reference give the same bits.
TEST_UNUSED static void check_layer(fixture *f, const char *file, int line, const char *what)
{
    moe_error err;
    int result, differs;
    char text[160];
    memset(&err, 0, sizeof err);
    result = fixture_open(f, &err);
    if (result == MOE_OK) result = moe_execute_check(f->plan, f->weights, &f->args, &err);
    if (result == MOE_OK) result = moe_execute(f->plan, f->weights, &f->args, NULL);
    if (result == MOE_OK) result = fixture_reference(f, f->args.out_ids, f->args.out_weights, &err);
    if (result != MOE_OK) {
        test_fail2(file, line, what, err.code != 0 ? err.text : moe_result_string(result));
    } else if ((differs = fixture_differs(f)) != 0) {
        snprintf(text, sizeof text, "%d of %d values differ", differs, f->tokens * f->layer.hidden_size);
        test_fail2(file, line, what, text);
    }
    fixture_close(f);
}

#define CHECK_LAYER(f, what) check_layer((f), __FILE__, __LINE__, (what))

#endif // LAYER_H
