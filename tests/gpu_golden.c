// gpu_golden.c - the golden checkpoints through the kernels: transformers' own modules, in fp32, against products of 16
// bits
//
// Weights and x are stored in 16 bits, so that what differs is the intermediate, which the kernels round, x times the
// weight where that is on the input, and the order of sums. The bound is that: u = 2^-8 (bf16) or 2^-11 (f16) of the
// sum of |intermediate x matrix element|, through the norm of a row where there is one, and what rounding the input
// does.
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "gpu.h"
#include "golden.h"

// ---- bounds ---------------------------------------------------------------------------------------------------------

typedef struct bounds {
    moe__reference ref;
    moe_reference_layer_args args;
    moe_layer_desc layer;
    float *memory;
    double *row;    // [H] of one expert's row
    double unit;
} bounds;

static void bounds_open(bounds *b, const moe_layer_desc *layer, const moe_weights *cpu)
{
    size_t wide = 8192, h = (size_t)layer->hidden_size;
    memset(b, 0, sizeof *b);
    b->layer = *layer;
    CHECK_EQ(moe__layer_resolve(&b->layer, &err), MOE_OK);
    b->args.rows = moe_weights_row;
    b->args.rows_user = (void *)(uintptr_t)cpu;
    b->ref.layer = &b->layer;
    b->ref.args = &b->args;
    b->ref.mid_dtype = MOE_DTYPE_F32;
    b->memory = (float *)malloc((3 * wide + 3 * h) * sizeof(float));
    b->ref.weight = b->memory;
    b->ref.gate = b->memory + wide;
    b->ref.up = b->memory + 2 * wide;
    b->ref.x = b->memory + 3 * wide;
    b->ref.row = b->ref.x + h;
    b->ref.total = b->ref.row + h;
    b->row = (double *)malloc(2 * h * sizeof(double));
    b->unit = layer->format == MOE_FORMAT_F16 ? ldexp(1, -11) : ldexp(1, -8);
}

static void bounds_close(bounds *b)
{
    free(b->memory);
    free(b->row);
}

// b->row = how far an expert's row may be off for this x: -1 the shared ones.
static void bound_expert(bounds *b, int32_t expert)
{
    int32_t h = b->layer.hidden_size, n = b->layer.intermediate_size;
    double norm_of_row = 0, norm_of_error = 0, scale;
    if (expert < 0) n = b->layer.shared.count * b->layer.shared.intermediate_size;
    CHECK_EQ(moe__reference_expert(&b->ref, expert, NULL), MOE_OK);
    for (int32_t r = 0; r < h; r++) {
        b->row[r] = 0;
        moe__reference_read(&b->ref, expert < 0 ? MOE_TENSOR_SHARED_DOWN : MOE_TENSOR_DOWN, expert, r);
        for (int32_t i = 0; i < n; i++) b->row[r] += fabs((double)b->ref.gate[i] * b->ref.weight[i]) * b->unit;
    }
    if (!b->layer.row_norm || expert < 0) return;
    moe__reference_read(&b->ref, MOE_TENSOR_ROW_NORM, -1, 0);
    for (int32_t r = 0; r < h; r++) {
        double factor = 1 + (double)b->ref.weight[r], v = b->ref.row[r] * factor;
        b->row[r] *= fabs(factor);
        norm_of_row += v * v;
        norm_of_error += b->row[r] * b->row[r];
    }
    scale = 1 / sqrt(norm_of_row / h + b->layer.row_norm_epsilon);
    for (int32_t r = 0; r < h; r++) { // first order, twice over
        double v = fabs(b->ref.row[r] * (1 + (double)b->ref.weight[r]));
        b->row[r] = 2 * scale * (b->row[r] + v * sqrt(norm_of_error / norm_of_row));
    }
}

// What rounding x times the weight moves an expert's row by, added to b->row.
static void bound_input(bounds *b, int32_t expert, const float *x, float weight)
{
    int32_t h = b->layer.hidden_size;
    float *exact = (float *)malloc((size_t)h * 4);
    memcpy(exact, b->ref.row, (size_t)h * 4);
    for (int32_t i = 0; i < h; i++)
        b->ref.x[i] = moe__round_to(x[i] * weight, moe__format_dtype(b->layer.format));
    CHECK_EQ(moe__reference_expert(&b->ref, expert, NULL), MOE_OK);
    for (int32_t i = 0; i < h; i++) b->row[i] += fabs((double)exact[i] - b->ref.row[i]);
    free(exact);
}

// out [H] = how far a token may be off.
static void bound_token(bounds *b, const float *x, const int32_t *ids, const float *weights, int slots, double *out)
{
    const moe_layer_desc *l = &b->layer;
    int32_t h = l->hidden_size, on_input = l->routing.weight_on == MOE_WEIGHT_ON_INPUT;
    double scale = l->routing.scale_on == MOE_SCALE_ON_OUTPUT ? l->routing.scale : 1;
    for (int32_t i = 0; i < h; i++) out[i] = 0;
    for (int j = 0; j < slots; j++) {
        if (ids[j] < 0 || (ids[j] >= l->num_experts && ids[j] < l->num_experts + l->routing.special_experts)) continue;
        for (int32_t i = 0; i < h; i++) b->ref.x[i] = on_input ? x[i] * weights[j] : x[i];
        bound_expert(b, ids[j]);
        if (on_input) bound_input(b, ids[j], x, weights[j]);
        for (int32_t i = 0; i < h; i++) out[i] += (on_input ? 1 : fabs((double)weights[j])) * b->row[i] * fabs(scale);
    }
    if (l->shared.count > 0) {
        memcpy(b->ref.x, x, (size_t)h * 4);
        bound_expert(b, -1);
        for (int32_t i = 0; i < h; i++) out[i] += fabs((double)l->shared.scale) * b->row[i]; // a gate is below 1
    }
    for (int32_t i = 0; i < h; i++) out[i] *= fabs((double)l->output_scale);
}

// ---- a layer --------------------------------------------------------------------------------------------------------

typedef struct stored {
    float *x, *router_x, *logits, *out, *weights;
    int32_t *ids;
    void *token_ids;
    int router_width, k;
} stored;

static stored stored_of(const golden *g)
{
    stored s;
    s.router_width = s.k = 0;
    s.x = (float *)golden_tensor(g, "x", NULL);
    s.router_x = (float *)golden_tensor(g, "router_x", NULL);
    s.logits = (float *)golden_tensor(g, "logits", &s.router_width);
    s.out = (float *)golden_tensor(g, "out", NULL);
    s.weights = (float *)golden_tensor(g, "weights", NULL);
    s.ids = (int32_t *)golden_tensor(g, "ids", &s.k);
    s.token_ids = golden_tensor(g, "token_ids", NULL);
    return s;
}

static void stored_free(stored *s)
{
    free(s->x); free(s->router_x); free(s->logits); free(s->out); free(s->weights); free(s->ids); free(s->token_ids);
}

static void compare_bounded(const golden *g, const stored *s, const moe_layer_desc *layer, const moe_weights *cpu,
                            const int32_t *ids, const float *weights, const float *got)
{
    bounds b;
    double *allowed = (double *)malloc((size_t)g->hidden * sizeof(double));
    bounds_open(&b, layer, cpu);
    for (int t = 0; t < g->tokens; t++) {
        double largest = 0;
        if (is_tied(g->file, g->layer, t)) continue;
        bound_token(&b, s->x + t * g->hidden, ids + t * g->slots, weights + t * g->slots, g->slots, allowed);
        for (int i = 0; i < g->hidden; i++)
            if (fabs((double)s->out[t * g->hidden + i]) > largest) largest = fabs((double)s->out[t * g->hidden + i]);
        for (int i = 0; i < g->hidden; i++) {
            double difference = fabs((double)s->out[t * g->hidden + i] - (double)got[t * g->hidden + i]);
            char text[160];
            if (difference <= allowed[i] + 1e-5 * largest) continue; // as close as the CPU without rounding
            snprintf(text, sizeof text, "token %d, %d: off by %.3g of %.3g, %.3g allowed", t, i, difference, largest,
                     allowed[i]);
            golden_fail(g, __LINE__, text);
            t = g->tokens;
            break;
        }
    }
    free(allowed);
    bounds_close(&b);
}

static void run_layer(golden *g, const moe_layer_desc *layer, const moe_plan *plan, const moe_weights *weights,
                      const moe_weights *cpu, const moe_plan_info *info, int twice)
{
    stored s = stored_of(g);
    size_t tokens = (size_t)g->tokens, values = tokens * (size_t)g->hidden, slots = tokens * (size_t)info->slots;
    float *got = (float *)malloc(values * 4), *again = (float *)malloc(values * 4);
    float *got_weights = (float *)malloc(slots * 4), *made = (float *)malloc(tokens * (size_t)s.router_width * 4 + 4);
    int32_t *ids = (int32_t *)malloc(slots * 4);
    moe_execute_args a;
    void *made_at;
    g->slots = info->slots;
    g->top_k = layer->routing.top_k;
    memset(&a, 0, sizeof a);
    a.input_mode = MOE_INPUT_LOGITS;
    a.num_tokens = g->tokens;
    a.x = gpu_copy(s.x, values * 4);
    a.logits = gpu_copy(s.logits, tokens * (size_t)s.router_width * 4);
    a.token_ids = gpu_copy(s.token_ids, tokens * (plan->desc.ids_dtype == MOE_DTYPE_I64 ? 8 : 4));
    a.out = gpu_make(values * 4);
    a.out_ids = (int32_t *)gpu_make(slots * 4);
    a.out_weights = (float *)gpu_make(slots * 4);
    a.workspace = gpu_make_raw((size_t)info->workspace_bytes);
    a.workspace_bytes = info->workspace_bytes;
    if (moe_execute_check(plan, weights, &a, &err) != MOE_OK) golden_fail(g, __LINE__, err.text);
    else if (moe_execute(plan, weights, &a, NULL) != MOE_OK) golden_fail(g, __LINE__, "execute");
    gpu_get(ids, a.out_ids, slots * 4);
    gpu_get(got_weights, a.out_weights, slots * 4);
    gpu_get(got, a.out, values * 4);
    golden_compare_routing(g, ids, got_weights, s.ids, s.weights);
    compare_bounded(g, &s, layer, cpu, ids, got_weights, got);
    if (twice) {
        a.out = gpu_make(values * 4);
        if (moe_execute(plan, weights, &a, NULL) != MOE_OK) golden_fail(g, __LINE__, "execute again");
        gpu_get(again, a.out, values * 4);
        if (memcmp(got, again, values * 4) != 0) golden_fail(g, __LINE__, "two runs differ");
    }
    made_at = gpu_make(tokens * (size_t)s.router_width * 4);
    if (s.router_x != NULL) a.x = gpu_copy(s.router_x, tokens * (size_t)layer->router.input_size * 4);
    if (moe_router_logits(plan, weights, &a, (float *)made_at, NULL) != MOE_OK)
        golden_fail(g, __LINE__, "router logits");
    gpu_get(made, made_at, tokens * (size_t)s.router_width * 4);
    golden_compare(g, made, s.logits, s.router_width, 1e-5, 1, "router logits");
    gpu_release();
    free(got);
    free(again);
    free(got_weights);
    free(made);
    free(ids);
    stored_free(&s);
}

// 1 when the kernels ran it; a layer that they do not run is refused with the reason.
static int check_layer(golden *g, moe_checkpoint *ckpt, int number, int twice)
{
    moe_layer_desc layer;
    moe_weights *weights = NULL, *cpu = NULL;
    moe_plan *plan = NULL;
    moe_plan_desc desc;
    moe_plan_info info;
    const char *refusal = NULL;
    memset(&info, 0, sizeof info);
    golden_layer(g, number, &desc);
    desc.intermediate_dtype = 0;
    if (moe_checkpoint_layer(ckpt, number, &layer, &err) || moe__layer_resolve(&layer, &err) ||
        moe_weights_from_checkpoint(gpu.cpu, ckpt, &layer, &cpu, &err) ||
        moe_weights_from_checkpoint(gpu.ctx, ckpt, &layer, &weights, &err) ||
        moe_plan_create(gpu.ctx, &layer, &desc, &plan, &err) || moe_plan_get_info(plan, &info, &err)) {
        golden_fail(g, __LINE__, err.text);
    } else if ((refusal = moe__products_refusal(&plan->layer)) != NULL) {
        moe_execute_args a;
        memset(&a, 0, sizeof a);
        a.input_mode = MOE_INPUT_LOGITS;
        a.num_tokens = 1;
        a.out = gpu_make(4096);
        a.x = a.logits = a.token_ids = a.out;
        a.workspace = gpu_make((size_t)info.workspace_bytes);
        a.workspace_bytes = info.workspace_bytes;
        CHECK_ERR(moe_execute_check(plan, weights, &a, &err), MOE_ERROR_UNSUPPORTED, "plan");
        CHECK_CONTAINS(err.text, refusal);
        printf("%s: %s\n", g->where, refusal);
        gpu_release();
    } else {
        run_layer(g, &layer, plan, weights, cpu, &info, twice);
    }
    moe_plan_destroy(plan);
    moe_weights_destroy(weights);
    moe_weights_destroy(cpu);
    return refusal == NULL;
}

TEST(checkpoints_give_the_outputs_of_transformers)
{
    int ran = 0, layers = 0;
    if (!gpu_open()) return;
    for (int i = 0; i < GOLDENS; i++) {
        golden g;
        moe_checkpoint *ckpt;
        int32_t numbers[GOLDEN_LAYERS];
        int count = golden_open(&g, golden_names[i], &ckpt, numbers);
        for (int j = 0; j < count; j++) ran += check_layer(&g, ckpt, numbers[j], gpu_large() || i % 8 == 0);
        layers += count;
        golden_close(&g, ckpt);
    }
    printf("%d layers of %d\n", ran, layers);
    CHECK(layers - ran <= 2);
}

TEST_MAIN(T(checkpoints_give_the_outputs_of_transformers))
