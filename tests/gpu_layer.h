// gpu_layer.h - calls of whole layers on the device beside moe_reference_layer(), from the same ids and weights, with
// the rows between GEMM 2 and finalize rounded as the plan rounds them
//
// Included behind moe.h, test.h and gpu.h.
#ifndef GPU_LAYER_H
#define GPU_LAYER_H

#include <math.h>

// What a call brings: everything on the host.
typedef struct layer_call {
    int mode, tokens, held; // held: in num_tokens_dev; -1: there is none
    uint32_t flags;
    int shared_gate;        // the caller's gate
    uint64_t seed;
} layer_call;

typedef struct layer_data {
    float *x, *logits, *old, *gate; // x, old: [T][H] exact in 16 bits
    int32_t *ids;
    float *weights;
    float *expected, *got, *again;
} layer_data;

static float *grid_values(size_t n, float step, int range, uint64_t *state)
{
    float *v = (float *)malloc(n * sizeof v[0] + 4);
    for (size_t i = 0; i < n; i++)
        v[i] = step * (float)((int)(test_random_u32(state) % (uint32_t)(2 * range + 1)) - range);
    return v;
}

static void *narrowed(const float *v, size_t n, int dtype)
{
    void *to = malloc(n * 4 + 4);
    for (size_t i = 0; i < n; i++) moe__store(to, dtype, (int64_t)i, v[i]);
    return to;
}

// Of the rows between GEMM 2 and finalize, in a call of so many tokens.
static int rows_dtype_of(const pair *p, int tokens)
{
    return p->plan[1]->sets.set[moe__set_of(&p->plan[1]->sets, tokens)].rows_dtype;
}

// Ids and weights of the CPU, then the reference.
static int expect(const pair *p, const layer_call *c, layer_data *d)
{
    size_t slots = (size_t)c->tokens * (size_t)p->info[0].slots;
    int tokens = c->held >= 0 ? c->held : c->tokens, result;
    const moe_layer_desc *l = &p->plan[0]->layer;
    moe_reference_layer_args r;
    moe_error err;
    d->ids = (int32_t *)malloc(slots * 4 + 4);
    d->weights = (float *)malloc(slots * 4 + 4);
    d->expected = (float *)calloc((size_t)c->tokens * (size_t)l->hidden_size + 1, 4);
    memset(&r, 0, sizeof r);
    if (c->mode == MOE_INPUT_LOGITS) {
        moe_reference_route_args a;
        memset(&a, 0, sizeof a);
        a.num_tokens = c->tokens;
        a.num_experts = l->num_experts;
        a.logits = d->logits;
        a.out_ids = d->ids;
        a.out_weights = d->weights;
        if ((result = moe_reference_route(&l->routing, &a, &err)) != MOE_OK) return result;
    } else {
        uint64_t state = c->seed + 3;
        for (size_t i = 0; i < slots; i++) {
            uint32_t draw = test_random_u32(&state);
            d->ids[i] = draw % 8 == 0 ? -1 : (int32_t)(draw / 8 % (uint32_t)p->plan[0]->ids_end);
            d->weights[i] = (float)((int)(test_random_u32(&state) % 64) - 32) / 64;
        }
    }
    r.num_tokens = tokens;
    r.rows_dtype = rows_dtype_of(p, c->tokens);
    r.x = d->x;
    r.ids = d->ids;
    r.weights = d->weights;
    r.shared_gate = c->shared_gate ? d->gate : NULL;
    r.rows = moe_weights_row;
    r.rows_user = p->weights[0];
    r.out = d->expected;
    result = moe_reference_layer(&p->layer, &r, &err);
    if (result != MOE_OK) test_fail2(__FILE__, __LINE__, err.member, err.text);
    return result;
}

// Inputs on the device, and args for them; everything lives until gpu_release().
static void begin_gpu(const pair *p, const layer_call *c, const layer_data *d, moe_execute_args *args)
{
    const moe_plan *plan = p->plan[1];
    size_t h = (size_t)plan->layer.hidden_size, n = (size_t)c->tokens * h, width = (size_t)plan->width;
    size_t slots = (size_t)c->tokens * (size_t)plan->slots;
    int x_dtype = plan->desc.x_dtype, out_dtype = plan->desc.out_dtype;
    void *x = narrowed(d->x, n, x_dtype), *old = narrowed(d->old, n, out_dtype);
    int32_t held = c->held;
    memset(args, 0, sizeof *args);
    args->input_mode = c->mode;
    args->flags = c->flags;
    args->num_tokens = c->tokens;
    args->num_tokens_dev = held >= 0 ? (const int32_t *)gpu_copy(&held, 4) : NULL;
    args->x = gpu_copy(x, n * dtype_size(x_dtype));
    if (c->mode == MOE_INPUT_LOGITS) args->logits = gpu_copy(d->logits, (size_t)c->tokens * width * 4);
    if (c->mode == MOE_INPUT_IDS) {
        args->ids = gpu_copy(d->ids, slots * 4);
        args->weights = gpu_copy(d->weights, slots * 4);
    }
    if (c->mode == MOE_INPUT_PACKED) {
        uint32_t *packed = (uint32_t *)malloc(slots * 4 + 4);
        for (size_t i = 0; i < slots; i++)
            packed[i] = (uint32_t)d->ids[i] << 16 | moe__f32_to_bf16(d->weights[i]);
        args->ids = gpu_copy(packed, slots * 4);
        free(packed);
    }
    args->shared_gate = c->shared_gate ? (const float *)gpu_copy(d->gate, (size_t)c->tokens * 4) : NULL;
    args->out = gpu_make(n * 4 + 16);
    if (c->flags & MOE_EXECUTE_ACCUMULATE) gpu_put(args->out, old, n * dtype_size(out_dtype));
    args->workspace = gpu_make_raw((size_t)p->info[1].workspace_bytes);
    args->workspace_bytes = p->info[1].workspace_bytes;
    free(x);
    free(old);
}

static void read_gpu(const pair *p, const moe_execute_args *args, float *out)
{
    size_t n = (size_t)args->num_tokens * (size_t)p->layer.hidden_size;
    int dtype = p->plan[1]->desc.out_dtype;
    void *values = malloc(n * 4 + 4);
    gpu_get(values, args->out, n * dtype_size(dtype));
    for (size_t i = 0; i < n; i++) out[i] = moe__load(values, dtype, (int64_t)i);
    free(values);
}

static int run_gpu(const pair *p, const layer_call *c, const layer_data *d, float *out)
{
    moe_execute_args args;
    int result;
    begin_gpu(p, c, d, &args);
    result = moe_execute(p->plan[1], p->weights[1], &args, NULL);
    read_gpu(p, &args, out);
    gpu_release();
    return result;
}

// |GEMM 2's products| of a row are at most 4 step_of_weights * (largest intermediate): taken from the outputs' size.
static double tolerance(const pair *p, const layer_call *c, double largest)
{
    int n = p->layer.intermediate_size, many = rows_dtype_of(p, c->tokens) != MOE_DTYPE_F32;
    int half = p->layer.format == MOE_FORMAT_F16 ? 11 : 8;
    double sums = 2.0 * n * ldexp(1, -24) * 8 * largest; // |products| add up to a few times the largest output
    return sums + (many ? largest * ldexp(1, -half) : 0) + largest * ldexp(1, -22);
}

static void compare(const pair *p, const layer_call *c, const layer_data *d, int exact, const char *what)
{
    size_t h = (size_t)p->layer.hidden_size, tokens = (size_t)(c->held >= 0 ? c->held : c->tokens);
    int out_dtype = p->plan[1]->desc.out_dtype;
    double largest = 0, bound = 0;
    char text[160];
    for (size_t i = 0; i < tokens * h; i++)
        if (fabs((double)d->expected[i]) > largest) largest = fabs((double)d->expected[i]);
    if (largest == 0 && tokens > 0) test_fail2(__FILE__, __LINE__, what, "expects zeros alone");
    if (!exact) bound = tolerance(p, c, largest);
    for (size_t i = 0; i < tokens * h; i++) {
        float want = d->expected[i];
        if (c->flags & MOE_EXECUTE_ACCUMULATE) want = want + d->old[i];
        want = moe__round_to(want, out_dtype);
        double slack = bound;
        if (!exact && out_dtype != MOE_DTYPE_F32)
            slack += fabs((double)want) * ldexp(1, out_dtype == MOE_DTYPE_BF16 ? -8 : -11);
        if (fabs((double)want - (double)d->got[i]) <= slack) continue; // NaN is not
        snprintf(text, sizeof text, "token %d, %d: %.9g expected, %.9g (%.3g allowed)", (int)(i / h), (int)(i % h),
                 (double)want, (double)d->got[i], slack);
        test_fail2(__FILE__, __LINE__, what, text);
        return;
    }
}

// Inputs of the call's seed, and what they give. 0: there is nothing to compare with.
static int data_make(const pair *p, const layer_call *c, layer_data *d)
{
    uint64_t state = c->seed * 31 + 7;
    size_t n = (size_t)c->tokens * (size_t)p->layer.hidden_size;
    memset(d, 0, sizeof *d);
    d->x = moe__scheme_is_float(&p->plan[0]->layout.expert.input)
               ? grid_values(n, 0.25f, 4, &state)
               : pair_code_values((int64_t)n, p->plan[0]->layout.expert.input.dtype, 0.25f, &state);
    for (size_t i = 0; i < n && !moe__scheme_is_float(&p->plan[0]->layout.expert.input); i++)
        d->x[i] *= (float)(1 << i / 128 * 2 % 3); // scales of neighbouring blocks differ
    for (size_t i = 0; i < n && p->any_codes; i++) {
        size_t h = (size_t)p->layer.hidden_size;
        d->x[i] = i % h == i / h * 37 % h ? 0.875f : 0; // 448 2^-9
    }
    d->old = grid_values(n, 0.5f, 8, &state);
    d->logits = grid_values((size_t)c->tokens * (size_t)p->plan[1]->width, 0.125f, 40, &state);
    d->gate = grid_values((size_t)c->tokens, 0.25f, 4, &state);
    d->got = (float *)malloc(n * 4 + 4);
    d->again = (float *)malloc(n * 4 + 4);
    return expect(p, c, d) == MOE_OK;
}

static void data_free(layer_data *d)
{
    free(d->x);
    free(d->old);
    free(d->logits);
    free(d->gate);
    free(d->ids);
    free(d->weights);
    free(d->expected);
    free(d->got);
    free(d->again);
}

static void check_layer(const pair *p, const layer_call *c, int exact, const char *what)
{
    layer_data d;
    size_t n = (size_t)c->tokens * (size_t)p->layer.hidden_size;
    if (data_make(p, c, &d)) {
        if (run_gpu(p, c, &d, d.got) != MOE_OK) test_fail2(__FILE__, __LINE__, what, "is refused");
        else compare(p, c, &d, exact, what);
        if (run_gpu(p, c, &d, d.again) == MOE_OK && memcmp(d.got, d.again, n * 4) != 0)
            test_fail2(__FILE__, __LINE__, what, "two runs differ");
    }
    data_free(&d);
}

static int open_layer(pair *p, const moe_layer_desc *layer, int max_tokens)
{
    moe_error err;
    memset(&err, 0, sizeof err);
    p->layer = *layer;
    p->seed = 3;
    p->desc.max_tokens = max_tokens;
    if (p->desc.out_dtype == 0) p->desc.out_dtype = MOE_DTYPE_F32;
    if (pair_open(p, &err) == MOE_OK) return 1;
    test_fail2(__FILE__, __LINE__, err.member, err.text);
    pair_close(p);
    return 0;
}

TEST_UNUSED static void check_one(const moe_layer_desc *layer, const layer_call *c, int exact, const char *what)
{
    pair p;
    memset(&p, 0, sizeof p);
    if (!open_layer(&p, layer, c->tokens)) return;
    check_layer(&p, c, exact, what);
    pair_close(&p);
}

static layer_call logits_of(int tokens)
{
    layer_call c = { 0 };
    c.mode = MOE_INPUT_LOGITS;
    c.tokens = tokens;
    c.held = -1;
    c.seed = 5;
    return c;
}

#endif // GPU_LAYER_H
