// test_layer.c - moe_execute() gives the bits of moe_reference_layer() in every combination that a layer has
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "layer.h"

#include <math.h>

static fixture fixture_of(int format, int activation)
{
    fixture f;
    memset(&f, 0, sizeof f);
    f.layer = small_layer(format, activation);
    f.context_desc.threads = 2;
    return f;
}

// Parameters of an activation that make each of its branches matter.
typedef struct variant {
    int kind;
    float alpha, beta, limit;
} variant;

static const variant activations[] = {
    { MOE_ACTIVATION_SWIGLU, 0, 0, 0 },          { MOE_ACTIVATION_SWIGLU, 1.702f, 1, 0.9f },
    { MOE_ACTIVATION_SWIGLU, 0, 0, 1.1f },       { MOE_ACTIVATION_SWIGLU_STEP, 0, 0, 0.7f },
    { MOE_ACTIVATION_GEGLU_ERF, 0, 0, 0 },       { MOE_ACTIVATION_GEGLU_TANH, 0, 0, 0 },
    { MOE_ACTIVATION_SITU, 4, 25, 0 },           { MOE_ACTIVATION_SITU, 1.5f, 0, 0 },
    { MOE_ACTIVATION_SILU, 0, 0, 0 },            { MOE_ACTIVATION_GELU_ERF, 0, 0, 0 },
    { MOE_ACTIVATION_GELU_TANH, 0, 0, 0 },       { MOE_ACTIVATION_RELU, 0, 0, 0 },
    { MOE_ACTIVATION_RELU2, 0, 0, 0 },           { MOE_ACTIVATION_RELU2_CLAMP, 0, 0, 0.8f },
    { MOE_ACTIVATION_IDENTITY, 0, 0, 0 },
};

static void set_activation(moe_activation_desc *act, const variant *v)
{
    act->kind = v->kind;
    act->alpha = v->alpha;
    act->beta = v->beta;
    act->limit = v->limit;
}

TEST(every_activation_in_every_format_is_the_references_to_the_bit)
{
    for (int format = MOE_FORMAT_F32; format <= MOE_FORMAT_F16; format++)
        for (size_t i = 0; i < sizeof activations / sizeof activations[0]; i++) {
            fixture f = fixture_of(format, activations[i].kind);
            set_activation(&f.layer.activation, &activations[i]);
            CHECK_LAYER(&f, moe_activation_string(activations[i].kind));
        }
}

// Against formulas in double precision, so that the shared text of the activations is held to something else.
static double formula(const variant *v, double g, double u)
{
    double s = 1 / (1 + exp(-g)), gc = v->limit > 0 && g > v->limit ? v->limit : g, uc = u;
    if (v->limit > 0) uc = u > v->limit ? v->limit : u < -v->limit ? -v->limit : u;
    switch (v->kind) {
    case MOE_ACTIVATION_SWIGLU: return gc / (1 + exp(-(v->alpha != 0 ? v->alpha : 1) * gc)) * (uc + v->beta);
    case MOE_ACTIVATION_SWIGLU_STEP: return (v->limit > 0 && g * s > v->limit ? v->limit : g * s) * uc;
    case MOE_ACTIVATION_GEGLU_ERF: return g / 2 * (1 + erf(g / sqrt(2.0))) * u;
    case MOE_ACTIVATION_GEGLU_TANH:
        return g / 2 * (1 + tanh(sqrt(2 / 3.14159265358979) * (g + 0.044715 * g * g * g))) * u;
    case MOE_ACTIVATION_SITU:
        return v->alpha * tanh(g / v->alpha) * s * (v->beta != 0 ? v->beta * tanh(u / v->beta) : u);
    case MOE_ACTIVATION_SILU: return g * s;
    case MOE_ACTIVATION_GELU_ERF: return g / 2 * (1 + erf(g / sqrt(2.0)));
    case MOE_ACTIVATION_GELU_TANH: return g / 2 * (1 + tanh(sqrt(2 / 3.14159265358979) * (g + 0.044715 * g * g * g)));
    case MOE_ACTIVATION_RELU: return g > 0 ? g : 0;
    case MOE_ACTIVATION_RELU2: return g > 0 ? g * g : 0;
    case MOE_ACTIVATION_RELU2_CLAMP: return g > 0 ? pow(v->limit * tanh(g / v->limit), 2) : 0;
    default: return g;
    }
}

TEST(activations_are_their_formulas)
{
    for (size_t i = 0; i < sizeof activations / sizeof activations[0]; i++) {
        moe_activation_desc act;
        memset(&act, 0, sizeof act);
        set_activation(&act, &activations[i]);
        if (act.alpha == 0) act.alpha = 1;
        for (float g = -9; g < 9; g += 0.37f)
            for (float u = -3; u < 3; u += 0.71f) {
                double expected = formula(&activations[i], g, u);
                CHECK_NEAR(moe__activate(&act, g, u), expected, 2e-6 * (fabs(expected) + fabs(g) * 0.1 + 0.1));
            }
    }
}

TEST(erf_and_tanh_gelus_are_two_functions)
{
    moe_activation_desc act;
    float e, t;
    memset(&act, 0, sizeof act);
    act.kind = MOE_ACTIVATION_GELU_ERF;
    e = moe__activate(&act, 2.0f, 0);
    act.kind = MOE_ACTIVATION_GELU_TANH;
    t = moe__activate(&act, 2.0f, 0);
    CHECK_NEAR(e, 1.954499736, 1e-6);
    CHECK_NEAR(t, 1.954597694, 1e-6);
    CHECK(e != t);
}

TEST(nan_in_x_reaches_the_output)
{
    for (size_t i = 0; i < sizeof activations / sizeof activations[0]; i++) {
        fixture f = fixture_of(MOE_FORMAT_F32, activations[i].kind);
        moe_error err;
        set_activation(&f.layer.activation, &activations[i]);
        CHECK_OK(fixture_open(&f, &err));
        moe__store((void *)(uintptr_t)f.args.x, MOE_DTYPE_F32, 5, moe__bits_f32(0x7fc00000u));
        CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
        CHECK(moe__is_nan(((float *)f.args.out)[3]));
        CHECK(!moe__is_nan(((float *)f.args.out)[f.layer.hidden_size + 3]));
        fixture_close(&f);
    }
}

TEST(unrounded_intermediate_is_the_references)
{
    for (int format = MOE_FORMAT_F32; format <= MOE_FORMAT_F16; format++)
        for (int dtype = MOE_DTYPE_F32; dtype <= MOE_DTYPE_F16; dtype++) {
            fixture f = fixture_of(format, MOE_ACTIVATION_SWIGLU);
            f.plan_desc.intermediate_dtype = dtype;
            CHECK_LAYER(&f, "intermediate");
        }
}

TEST(biases_of_both_gemms)
{
    for (int bias = 1; bias < 4; bias++)
        for (int gated = 0; gated < 2; gated++) {
            fixture f = fixture_of(MOE_FORMAT_BF16, gated ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_RELU2);
            f.layer.gemm1_bias = bias & 1;
            f.layer.gemm2_bias = bias >> 1;
            CHECK_LAYER(&f, "bias");
        }
}

TEST(shared_experts_with_gate_and_scale)
{
    for (int variant = 0; variant < 8; variant++) {
        fixture f = fixture_of(variant & 4 ? MOE_FORMAT_F16 : MOE_FORMAT_BF16,
                               variant & 2 ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_GELU_TANH);
        f.layer.shared.count = 1 + (variant >> 1);
        f.layer.shared.intermediate_size = 24;
        f.layer.shared.gate = variant & 1;
        f.layer.shared.scale = variant & 4 ? 0.37f : 0;
        f.layer.output_scale = variant & 2 ? 0.5f : 0;
        CHECK_LAYER(&f, "shared");
    }
}

TEST(shared_experts_may_have_an_activation_of_their_own)
{
    fixture f = fixture_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
    f.layer.activation.limit = 0.5f;
    f.layer.shared.count = 1;
    f.layer.shared.intermediate_size = 40;
    f.layer.shared.activation.kind = MOE_ACTIVATION_GEGLU_ERF;
    CHECK_LAYER(&f, "shared activation");
}

TEST(the_callers_shared_gate_replaces_the_layers)
{
    for (int gate = 0; gate < 2; gate++) {
        fixture f = fixture_of(MOE_FORMAT_F32, MOE_ACTIVATION_SWIGLU);
        float values[9];
        moe_error err;
        f.layer.shared.count = 1;
        f.layer.shared.intermediate_size = 16;
        f.layer.shared.gate = gate;
        f.layer.shared.scale = 1.25f;
        for (int t = 0; t < 9; t++) values[t] = 0.1f * (float)t - 0.3f;
        CHECK_OK(fixture_open(&f, &err));
        f.args.shared_gate = values;
        CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
        CHECK_OK(fixture_reference(&f, f.args.out_ids, f.args.out_weights, &err));
        CHECK_EQ(fixture_differs(&f), 0);
        fixture_close(&f);
    }
}

TEST(always_on_slots_fixed_and_scored)
{
    for (int scored = 0; scored < 2; scored++) {
        fixture f = fixture_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
        f.layer.routing.extra_slots = 2;
        f.layer.routing.extra_scored = scored;
        f.layer.routing.extra_weight = 0.6f;
        f.layer.gemm1_bias = f.layer.gemm2_bias = 1;
        CHECK_LAYER(&f, "extra slots");
    }
}

TEST(special_experts_of_each_kind)
{
    for (int kind = MOE_SPECIAL_ZERO; kind <= MOE_SPECIAL_CONSTANT; kind++)
        for (int on_input = 0; on_input < 2; on_input++) {
            fixture f = fixture_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
            f.layer.routing.special_experts = 9;
            f.layer.routing.special_kind = kind;
            f.layer.routing.weight_on = on_input;
            f.tokens = 17;
            CHECK_LAYER(&f, "special");
        }
}

TEST(pruned_experts_are_constants)
{
    for (int norm = 0; norm < 2; norm++) {
        fixture f = fixture_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
        f.pruned = 0x5a5;
        f.layer.row_norm = norm;
        f.layer.gemm2_bias = 1;
        CHECK_LAYER(&f, "pruned");
    }
}

TEST(weight_on_the_input)
{
    for (int k = 1; k < 4; k++) {
        fixture f = fixture_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
        f.layer.routing.weight_on = MOE_WEIGHT_ON_INPUT;
        f.layer.routing.score = MOE_SCORE_SIGMOID;
        f.layer.routing.renormalize = MOE_RENORMALIZE_OFF;
        f.layer.routing.top_k = k;
        f.layer.shared.count = 1;
        f.layer.shared.intermediate_size = 32;
        CHECK_LAYER(&f, "weight on input");
    }
}

TEST(row_norm)
{
    for (int format = MOE_FORMAT_F32; format <= MOE_FORMAT_F16; format++) {
        fixture f = fixture_of(format, MOE_ACTIVATION_SWIGLU);
        f.layer.row_norm = 1;
        f.layer.row_norm_epsilon = 1e-8f;
        f.layer.hidden_size = 75;
        CHECK_LAYER(&f, "row norm");
    }
}

TEST(scale_on_the_output_and_output_scale)
{
    for (int global = 0; global < 2; global++) {
        fixture f = fixture_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
        f.layer.routing.scale = 2.446f;
        f.layer.routing.scale_on = MOE_SCALE_ON_OUTPUT;
        f.layer.routing.global_scale = global;
        f.layer.output_scale = 0.5f;
        f.layer.shared.count = 1;
        f.layer.shared.intermediate_size = 8;
        CHECK_LAYER(&f, "scales");
    }
}

TEST(per_expert_alpha_beta_and_limit)
{
    fixture f = fixture_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
    f.layer.activation.per_expert = 1;
    f.layer.routing.extra_slots = 1;
    CHECK_LAYER(&f, "per expert");
}

TEST(sizes_that_are_multiples_of_nothing)
{
    static const int sizes[][2] = { { 1, 1 }, { 8, 40 }, { 33, 7 }, { 97, 65 }, { 513, 49 }, { 600, 521 } };
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        for (int gated = 0; gated < 2; gated++) {
            fixture f = fixture_of(MOE_FORMAT_BF16, gated ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_SILU);
            f.layer.hidden_size = sizes[i][0];
            f.layer.intermediate_size = sizes[i][1];
            f.layer.shared.count = 1;
            f.layer.shared.intermediate_size = sizes[i][1] + 3;
            f.tokens = i < 4 ? 21 : 3;
            CHECK_LAYER(&f, "sizes");
        }
}

TEST(token_counts_experts_and_top_k)
{
    static const int cases[][3] = { // T, E, k
        { 1, 1, 1 }, { 3, 2, 2 }, { 17, 512, 22 }, { 129, 8, 1 }, { 129, 3, 3 }, { 1, 512, 8 }, { 129, 64, 6 } };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        fixture f = fixture_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
        f.layer.hidden_size = 40;
        f.layer.intermediate_size = 16;
        f.tokens = cases[i][0];
        f.layer.num_experts = cases[i][1];
        f.layer.routing.top_k = cases[i][2];
        f.context_desc.threads = 1 + (int)i % 3;
        CHECK_LAYER(&f, "counts");
    }
}

// ---- inputs and outputs ---------------------------------------------------------------------------------------------

TEST(dtypes_of_every_input_and_output)
{
    for (int x = MOE_DTYPE_F32; x <= MOE_DTYPE_F16; x++)
        for (int out = MOE_DTYPE_F32; out <= MOE_DTYPE_F16; out++) {
            fixture f = fixture_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
            f.plan_desc.x_dtype = x;
            f.plan_desc.out_dtype = out;
            f.plan_desc.logits_dtype = MOE_DTYPE_F32 + (x + out) % 3;
            CHECK_LAYER(&f, "dtypes");
        }
}

TEST(strides_leave_what_is_between_rows)
{
    fixture f = fixture_of(MOE_FORMAT_F32, MOE_ACTIVATION_SWIGLU);
    enum { T = 5, H = 72, E = 12, SX = 80, SL = 15, SO = 100 };
    static float x[T * SX], logits[T * SL], out[T * SO];
    moe_error err;
    f.tokens = T;
    CHECK_OK(fixture_open(&f, &err));
    for (int i = 0; i < T * SX; i++) x[i] = moe__bits_f32(0x7fc00000u);
    for (int i = 0; i < T * SL; i++) logits[i] = moe__bits_f32(0x7fc00000u);
    for (int i = 0; i < T * SO; i++) out[i] = 12345;
    for (int t = 0; t < T; t++) {
        memcpy(x + t * SX, f.x32 + t * H, H * sizeof x[0]);
        memcpy(logits + t * SL, (const float *)f.args.logits + t * E, E * sizeof x[0]);
    }
    f.args.x = x;
    f.args.x_stride = SX;
    f.args.logits = logits;
    f.args.logits_stride = SL;
    f.args.out = out;
    f.args.out_stride = SO;
    CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
    CHECK_OK(fixture_reference(&f, f.args.out_ids, f.args.out_weights, &err));
    CHECK_EQ(fixture_differs(&f), 0);
    for (int t = 0; t < T; t++)
        for (int i = H; i < SO; i++) CHECK_EQ(out[t * SO + i], 12345.0f);
    fixture_close(&f);
}

// out of the fixture's LOGITS run against another run into `out`.
static void check_same_out(fixture *f, moe_execute_args *args, const char *what)
{
    size_t bytes = (size_t)f->tokens * (size_t)f->layer.hidden_size * dtype_bytes(f->plan->desc.out_dtype);
    unsigned char *first = (unsigned char *)malloc(bytes), *second = (unsigned char *)malloc(bytes);
    int result = moe_execute(f->plan, f->weights, &f->args, NULL);
    memcpy(first, f->args.out, bytes);
    memset(second, 0xff, bytes);
    args->out = second;
    if (result == MOE_OK) result = moe_execute(f->plan, f->weights, args, NULL);
    if (result != MOE_OK) {
        moe_error err;
        moe_execute_check(f->plan, f->weights, args, &err);
        test_fail2(__FILE__, __LINE__, what, err.text);
    }
    if (memcmp(first, second, bytes) != 0) test_fail2(__FILE__, __LINE__, what, "the outputs differ");
    free(first);
    free(second);
}

TEST(ids_mode_is_logits_mode_after_routing)
{
    for (int variant = 0; variant < 4; variant++) {
        fixture f = fixture_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
        moe_execute_args args;
        int64_t wide[9 * 6];
        moe_error err;
        f.plan_desc.ids_dtype = variant & 1 ? MOE_DTYPE_I64 : 0;
        f.layer.routing.extra_slots = 2;
        f.layer.routing.special_experts = variant & 2 ? 4 : 0;
        f.layer.routing.special_kind = variant & 2 ? MOE_SPECIAL_IDENTITY : 0;
        f.layer.shared.count = 1;
        f.layer.shared.intermediate_size = 16;
        CHECK_OK(fixture_open(&f, &err));
        CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
        args = f.args;
        args.input_mode = MOE_INPUT_IDS;
        args.logits = NULL;
        args.ids = f.args.out_ids;
        args.weights = f.args.out_weights;
        args.out_ids = NULL;
        args.out_weights = NULL;
        for (int i = 0; i < 9 * 6; i++) wide[i] = f.args.out_ids[i];
        if (variant & 1) args.ids = wide;
        check_same_out(&f, &args, "ids");
        fixture_close(&f);
    }
}

TEST(packed_mode_is_ids_mode_with_bf16_weights)
{
    fixture f = fixture_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
    int32_t packed[9 * 4], ids[9 * 4];
    uint16_t weights[9 * 4];
    moe_execute_args args;
    moe_error err;
    f.plan_desc.weights_dtype = MOE_DTYPE_BF16;
    CHECK_OK(fixture_open(&f, &err));
    for (int i = 0; i < 36; i++) {
        ids[i] = i % 5 == 4 ? -1 : i * 7 % 12;
        weights[i] = moe__f32_to_bf16(0.1f * (float)(i % 9) - 0.2f);
        packed[i] = (int32_t)((uint32_t)ids[i] << 16 | weights[i]);
    }
    f.args.input_mode = MOE_INPUT_IDS;
    f.args.ids = ids;
    f.args.weights = weights;
    args = f.args;
    args.input_mode = MOE_INPUT_PACKED;
    args.ids = packed;
    args.weights = NULL;
    check_same_out(&f, &args, "packed");
    for (int i = 0; i < 36; i++) CHECK_EQ(f.args.out_ids[i], ids[i]);
    fixture_close(&f);
}

TEST(empty_slots_add_nothing_and_no_expert_at_all_gives_zero)
{
    fixture f = fixture_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
    int32_t ids[36];
    float weights[36];
    moe_error err;
    CHECK_OK(fixture_open(&f, &err));
    for (int i = 0; i < 36; i++) {
        ids[i] = i < 8 || i % 3 == 0 ? -1 : i % 12;
        weights[i] = 0.25f;
    }
    ids[5] = 12; // one past the last id
    f.args.input_mode = MOE_INPUT_IDS;
    f.args.flags = MOE_EXECUTE_ID_E_IS_NONE;
    f.args.ids = ids;
    f.args.weights = weights;
    CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
    CHECK_OK(fixture_reference(&f, f.args.out_ids, f.args.out_weights, &err));
    CHECK_EQ(fixture_differs(&f), 0);
    for (int i = 0; i < 2 * 72; i++) CHECK_EQ(moe__load(f.args.out, MOE_DTYPE_BF16, i), 0.0f);
    CHECK_EQ(f.args.out_ids[5], -1);
    CHECK_EQ(f.args.out_row_of_slot[5], -1);
    fixture_close(&f);
}

// Rows mode over the slots of a routed batch, then the weighted sum by hand: fma in slot order.
static void check_rows_mode(int masked, int on_input, const char *what)
{
    enum { T = 23, K = 4, H = 72, E = 12, CAP = 40 };
    fixture f = fixture_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
    static float x[E * CAP * H], out[E * CAP * H], weights[E * CAP];
    int32_t table[E + 1] = { 0 }, place[T * K];
    moe_execute_args args;
    moe_error err;
    f.tokens = T;
    f.plan_desc.max_tokens = T; // rows come in several chunks
    f.plan_desc.x_dtype = f.plan_desc.out_dtype = MOE_DTYPE_F32;
    f.layer.routing.weight_on = on_input;
    f.pruned = 4;
    REQUIRE_OK(fixture_open(&f, &err));
    CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
    for (int s = 0; s < T * K; s++) {
        int e = f.args.out_ids[s], row = f.args.out_row_of_slot[s];
        place[s] = masked ? e * CAP + table[e]++ : row;
        memcpy(x + place[s] * H, f.x32 + s / K * H, H * sizeof x[0]);
        weights[place[s]] = f.args.out_weights[s];
    }
    for (int e = 0; e < E && !masked; e++) table[e + 1] = table[e] + f.args.out_expert_counts[e];
    args = f.args;
    args.input_mode = masked ? MOE_INPUT_MASKED : MOE_INPUT_SORTED;
    args.x = x;
    args.logits = NULL;
    args.weights = on_input ? weights : NULL;
    args.counts_or_offsets = table;
    args.rows_per_expert = masked ? CAP : 0;
    args.out = out;
    CHECK_OK(moe_execute_check(f.plan, f.weights, &args, &err));
    memset(out, 0xff, sizeof out);
    CHECK_EQ(moe_execute(f.plan, f.weights, &args, NULL), MOE_OK);
    for (int t = 0; t < T; t++)
        for (int i = 0; i < H; i++) {
            float acc = 0;
            for (int j = 0; j < K; j++)
                acc = moe__fmaf(on_input ? 1 : f.args.out_weights[t * K + j], out[place[t * K + j] * H + i], acc);
            if (acc != ((float *)f.args.out)[t * H + i]) {
                test_fail2(__FILE__, __LINE__, what, "a row differs");
                t = T;
                break;
            }
        }
    fixture_close(&f);
}

TEST(sorted_rows_are_the_rows_of_ids_mode)
{
    check_rows_mode(0, 0, "sorted");
    check_rows_mode(0, 1, "sorted, weight on input");
}

TEST(masked_rows_are_the_rows_of_ids_mode)
{
    check_rows_mode(1, 0, "masked");
    check_rows_mode(1, 1, "masked, weight on input");
}

TEST(rows_past_a_count_are_not_touched)
{
    enum { E = 12, CAP = 3, H = 72 };
    fixture f = fixture_of(MOE_FORMAT_F32, MOE_ACTIVATION_SWIGLU);
    static float x[E * CAP * H], out[E * CAP * H];
    int32_t counts[E];
    moe_error err;
    CHECK_OK(fixture_open(&f, &err));
    for (int e = 0; e < E; e++) counts[e] = e % 4;
    for (int i = 0; i < E * CAP * H; i++) out[i] = x[i] = 77;
    f.args.input_mode = MOE_INPUT_MASKED;
    f.args.x = x;
    f.args.counts_or_offsets = counts;
    f.args.rows_per_expert = CAP;
    f.args.out = out;
    CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
    for (int r = 0; r < E * CAP; r++) CHECK_EQ(out[r * H + 5] != 77.0f, r % CAP < counts[r / CAP]);
    fixture_close(&f);
}

TEST(accumulate_adds_before_the_one_rounding)
{
    for (int dtype = MOE_DTYPE_F32; dtype <= MOE_DTYPE_F16; dtype++) {
        fixture f = fixture_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
        float before[9 * 72];
        moe_error err;
        f.plan_desc.out_dtype = dtype;
        CHECK_OK(fixture_open(&f, &err));
        for (int i = 0; i < 9 * 72; i++) {
            moe__store(f.args.out, dtype, i, 0.01f * (float)i - 3);
            before[i] = moe__load(f.args.out, dtype, i);
        }
        f.args.flags = MOE_EXECUTE_ACCUMULATE;
        CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
        CHECK_OK(fixture_reference(&f, f.args.out_ids, f.args.out_weights, &err));
        for (int i = 0; i < 9 * 72; i++) f.reference[i] = f.reference[i] + before[i];
        CHECK_EQ(fixture_differs(&f), 0);
        fixture_close(&f);
    }
}

TEST(rows_out_then_finalize_is_execute)
{
    for (int variant = 0; variant < 4; variant++) {
        fixture f = fixture_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
        static float rows[9 * 5 * 72], out[9 * 72];
        int32_t row_of_slot[9 * 5];
        moe_execute_args args;
        moe_error err;
        f.plan_desc.x_dtype = f.plan_desc.out_dtype = MOE_DTYPE_F32;
        f.layer.routing.extra_slots = 1;
        f.layer.routing.scale = 1.7f;
        f.layer.routing.scale_on = variant & 1;
        f.layer.routing.weight_on = variant >> 1;
        f.layer.routing.special_experts = 6;
        f.layer.routing.special_kind = variant & 1 ? MOE_SPECIAL_IDENTITY : MOE_SPECIAL_CONSTANT;
        f.layer.output_scale = 0.9f;
        f.layer.row_norm = variant == 3;
        CHECK_OK(fixture_open(&f, &err));
        CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
        args = f.args;
        args.flags = MOE_EXECUTE_ROWS_OUT;
        args.out = rows;
        args.out_row_of_slot = row_of_slot;
        CHECK_EQ(moe_execute(f.plan, f.weights, &args, NULL), MOE_OK);
        args.flags = 0;
        args.input_mode = MOE_INPUT_IDS;
        args.ids = f.args.out_ids;
        args.weights = f.args.out_weights;
        args.out = out;
        CHECK_EQ(moe_finalize(f.plan, f.weights, &args, rows, MOE_DTYPE_F32, row_of_slot, NULL), MOE_OK);
        CHECK(memcmp(out, f.args.out, sizeof out) == 0);
        fixture_close(&f);
    }
}

TEST(finalize_widens_rows_of_16_bits)
{
    for (int dtype = MOE_DTYPE_BF16; dtype <= MOE_DTYPE_F16; dtype++) {
        fixture f = fixture_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
        static uint16_t rows[36 * 72];
        static float wide[36 * 72], a[9 * 72], b[9 * 72];
        moe_error err;
        f.plan_desc.out_dtype = MOE_DTYPE_F32;
        CHECK_OK(fixture_open(&f, &err));
        CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
        for (int i = 0; i < 36 * 72; i++) {
            moe__store(rows, dtype, i, 0.003f * (float)(i % 997) - 1);
            wide[i] = moe__load(rows, dtype, i);
        }
        f.args.input_mode = MOE_INPUT_IDS;
        f.args.ids = f.args.out_ids;
        f.args.weights = f.args.out_weights;
        f.args.out = a;
        CHECK_EQ(moe_finalize(f.plan, f.weights, &f.args, rows, dtype, f.args.out_row_of_slot, NULL), MOE_OK);
        f.args.out = b;
        CHECK_EQ(moe_finalize(f.plan, f.weights, &f.args, wide, MOE_DTYPE_F32, f.args.out_row_of_slot, NULL), MOE_OK);
        CHECK(memcmp(a, b, sizeof a) == 0);
        fixture_close(&f);
    }
}

TEST(route_alone_gives_what_execute_reports)
{
    fixture f = fixture_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
    int32_t ids[36], counts[12], total[12] = { 0 };
    float weights[36];
    moe_execute_args args;
    moe_error err;
    CHECK_OK(fixture_open(&f, &err));
    CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
    args = f.args;
    args.x = NULL;
    args.out = NULL;
    args.out_ids = ids;
    args.out_weights = weights;
    args.out_expert_counts = counts;
    CHECK_EQ(moe_route(f.plan, f.weights, &args, NULL), MOE_OK);
    CHECK(memcmp(ids, f.args.out_ids, sizeof ids) == 0);
    CHECK(memcmp(weights, f.args.out_weights, sizeof weights) == 0);
    for (int i = 0; i < 36; i++) total[ids[i]]++;
    CHECK(memcmp(counts, total, sizeof total) == 0);
    fixture_close(&f);
}

TEST(router_logits_are_the_projection)
{
    for (int variant = 0; variant < 8; variant++) {
        enum { T = 37, N = 48 };
        fixture f = fixture_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
        static float x[T * N], logits[T * 60], weight[N], bias[60], scale[N], v[N];
        moe_error err;
        uint64_t state = 3;
        f.tokens = T;
        f.layer.num_experts = 59;
        f.layer.routing.special_experts = 1;
        f.layer.routing.special_kind = MOE_SPECIAL_ZERO;
        f.layer.router.input_size = N;
        f.layer.router.rms_norm = variant & 1;
        f.layer.router.norm_epsilon = 1e-5f;
        f.layer.router.input_scale = variant >> 1 & 1;
        f.layer.router.bias = variant >> 2;
        f.layer.router.input_multiplier = variant & 1 ? 0.25f : 0;
        f.plan_desc.x_dtype = MOE_DTYPE_F32;
        CHECK_OK(fixture_open(&f, &err));
        for (int i = 0; i < T * N; i++) x[i] = test_random_float(&state);
        f.args.x = x;
        CHECK_EQ(moe_router_logits(f.plan, f.weights, &f.args, logits, NULL), MOE_OK);
        if (f.layer.router.bias) CHECK_OK(moe_weights_read_row(f.weights, MOE_TENSOR_ROUTER_BIAS, -1, 0, bias, &err));
        if (f.layer.router.input_scale)
            CHECK_OK(moe_weights_read_row(f.weights, MOE_TENSOR_ROUTER_INPUT_SCALE, -1, 0, scale, &err));
        for (int t = 0; t < T; t++) {
            float norm = 1, dot;
            if (variant & 1) norm = 1.0f / moe__sqrtf(moe__reference_dot(x + t * N, x + t * N, N) / (float)N + 1e-5f);
            for (int i = 0; i < N; i++)
                v[i] = x[t * N + i] * norm * (variant & 2 ? scale[i] : 1) * (variant & 1 ? 0.25f : 1);
            for (int e = 0; e < 60; e++) {
                CHECK_OK(moe_weights_read_row(f.weights, MOE_TENSOR_ROUTER, -1, e, weight, &err));
                dot = moe__reference_dot(v, weight, N);
                if (variant & 4) dot = dot + bias[e];
                if (memcmp(&dot, &logits[t * 60 + e], 4) != 0) CHECK_EQ(logits[t * 60 + e], dot);
            }
        }
        fixture_close(&f);
    }
}

TEST(permutation_tables_agree_with_each_other)
{
    static const int tiles[] = { 1, 8, 24 };
    for (size_t i = 0; i < 3; i++) {
        enum { T = 31, K = 4, E = 12 };
        fixture f = fixture_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
        moe_permutation p;
        int32_t row_of_slot[T * K], slot_of_row[E * 24 + T * K], offsets[E + 1], counts[E], expert[64 * 4],
            limit[64 * 4], num_tiles;
        int32_t seen = 0, tile = tiles[i];
        int64_t rows_max = moe_permutation_rows(T * K, E, tile);
        moe_error err;
        memset(&p, 0, sizeof p);
        f.tokens = T;
        CHECK_OK(fixture_open(&f, &err));
        CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
        CHECK(rows_max <= (int64_t)(sizeof slot_of_row / 4));
        p.tile = tile;
        p.row_of_slot = row_of_slot;
        p.slot_of_row = slot_of_row;
        p.expert_offsets = offsets;
        p.expert_counts = counts;
        p.tile_expert = expert;
        p.tile_limit = limit;
        p.num_tiles = &num_tiles;
        f.args.input_mode = MOE_INPUT_IDS;
        f.args.ids = f.args.out_ids;
        CHECK_EQ(moe_permute(f.plan, NULL, &f.args, &p, NULL), MOE_OK);
        CHECK(num_tiles * tile <= rows_max);
        CHECK_EQ(offsets[E], num_tiles * tile);
        for (int s = 0; s < T * K; s++) {
            int row = row_of_slot[s], e = f.args.out_ids[s];
            REQUIRE(row >= offsets[e] && row < offsets[e] + counts[e]);
            CHECK_EQ(slot_of_row[row], s);
            CHECK_EQ(expert[row / tile], e);
            CHECK(row < limit[row / tile]);
            if (tile == 1) CHECK_EQ(row, f.args.out_row_of_slot[s]);
        }
        for (int r = 0; r < rows_max; r++) seen += slot_of_row[r] >= 0;
        CHECK_EQ(seen, T * K);
        for (int e = 0; e < E; e++) {
            CHECK_EQ(counts[e], f.args.out_expert_counts[e]);
            CHECK_EQ(offsets[e] % tile, 0);
        }
        fixture_close(&f);
    }
    CHECK_EQ((int)moe_permutation_rows(8, 256, 8), 64);
    CHECK_EQ((int)moe_permutation_rows(1024, 256, 8), 2816);
    CHECK_EQ((int)moe_permutation_rows(32768, 256, 128), 65280);
    CHECK_EQ((int)moe_permutation_rows(-1, 256, 8), -1);
    CHECK_EQ((int)moe_permutation_rows(1, 0, 8), -1);
    CHECK_EQ((int)moe_permutation_rows(1, 1, 0), -1);
}

TEST(num_tokens_dev_leaves_later_rows_alone)
{
    fixture f = fixture_of(MOE_FORMAT_F32, MOE_ACTIVATION_SWIGLU);
    int32_t real = 4;
    moe_error err;
    CHECK_OK(fixture_open(&f, &err));
    f.args.num_tokens_dev = &real;
    CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
    f.tokens = 4;
    CHECK_OK(fixture_reference(&f, f.args.out_ids, f.args.out_weights, &err));
    CHECK_EQ(fixture_differs(&f), 0);
    for (int i = 4 * 72; i < 9 * 72; i++) CHECK(moe__f32_bits(((float *)f.args.out)[i]) == 0xffffffffu);
    for (int i = 16; i < 36; i++) CHECK_EQ((uint32_t)f.args.out_ids[i], 0xffffffffu);
    fixture_close(&f);
}

TEST(no_tokens_is_no_work)
{
    fixture f = fixture_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
    moe_execute_args args;
    moe_error err;
    int32_t zero = 0;
    CHECK_OK(fixture_open(&f, &err));
    memset(&args, 0, sizeof args);
    args.input_mode = MOE_INPUT_LOGITS;
    args.workspace = f.args.workspace;
    args.workspace_bytes = f.args.workspace_bytes;
    CHECK_OK(moe_execute_check(f.plan, f.weights, &args, &err));
    CHECK_EQ(moe_execute(f.plan, f.weights, &args, NULL), MOE_OK);
    f.args.num_tokens_dev = &zero;
    CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
    for (int e = 0; e < 12; e++) CHECK_EQ(f.args.out_expert_counts[e], 0);
    fixture_close(&f);
}

// ---- ranks ----------------------------------------------------------------------------------------------------------

// Sum over ranks of fp32 outputs against the whole layer: within rounding of the parts.
static void check_ranks(fixture base, int ranks, void (*set_rank)(fixture *f, int rank, int ranks), const char *what)
{
    fixture whole = base;
    static float sum[17 * 72];
    moe_error err;
    double worst = 0, largest = 0;
    whole.tokens = 17;
    whole.plan_desc.out_dtype = MOE_DTYPE_F32;
    whole.plan_desc.intermediate_dtype = MOE_DTYPE_F32;
    REQUIRE_OK(fixture_open(&whole, &err));
    CHECK_EQ(moe_execute(whole.plan, whole.weights, &whole.args, NULL), MOE_OK);
    for (int i = 0; i < 17 * 72; i++) sum[i] = 0;
    for (int rank = 0; rank < ranks; rank++) {
        fixture f = base;
        f.tokens = 17;
        f.plan_desc = whole.plan_desc;
        set_rank(&f, rank, ranks);
        CHECK_OK(fixture_open(&f, &err));
        CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
        CHECK_OK(fixture_reference(&f, f.args.out_ids, f.args.out_weights, &err));
        CHECK_EQ(fixture_differs(&f), 0);
        for (int i = 0; i < 17 * 72; i++) sum[i] += ((float *)f.args.out)[i];
        fixture_close(&f);
    }
    for (int i = 0; i < 17 * 72; i++) {
        double value = ((float *)whole.args.out)[i], difference = fabs(value - sum[i]);
        if (difference > worst) worst = difference;
        if (fabs(value) > largest) largest = fabs(value);
    }
    if (!(worst < 4e-6 * largest)) test_fail_numbers(__FILE__, __LINE__, what, worst, largest);
    fixture_close(&whole);
}

static fixture ranked_layer(void)
{
    fixture f = fixture_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
    f.layer.gemm1_bias = f.layer.gemm2_bias = 1;
    f.layer.shared.count = 2;
    f.layer.shared.intermediate_size = 20;
    f.layer.shared.gate = 1;
    f.layer.routing.extra_slots = 1;
    f.layer.routing.special_experts = 5;
    f.layer.routing.special_kind = MOE_SPECIAL_IDENTITY;
    f.layer.activation.per_expert = 1;
    f.pruned = 0x24;
    return f;
}

static void set_tensor_rank(fixture *f, int rank, int ranks)
{
    f->layer.parallel.tp_size = ranks;
    f->layer.parallel.tp_rank = rank;
}

static void set_expert_rank(fixture *f, int rank, int ranks)
{
    f->layer.parallel.local_experts = 12 / ranks;
    f->layer.parallel.expert_offset = rank * (12 / ranks);
    f->layer.parallel.omit_common = rank != 1;
}

static int32_t rank_maps[4][12];

static void set_map_rank(fixture *f, int rank, int ranks)
{
    int local = 0;
    for (int e = 11; e >= 0; e--) rank_maps[rank][e] = e * 5 % ranks == rank ? local++ : -1;
    f->layer.parallel.local_experts = local;
    f->layer.parallel.expert_map = rank_maps[rank];
    f->layer.parallel.omit_common = rank != 0;
}

TEST(tensor_parallel_ranks_sum_to_the_layer)
{
    check_ranks(ranked_layer(), 2, set_tensor_rank, "tp 2");
    check_ranks(ranked_layer(), 3, set_tensor_rank, "tp 3");
}

TEST(expert_parallel_ranks_sum_to_the_layer)
{
    check_ranks(ranked_layer(), 2, set_expert_rank, "ep 2");
    check_ranks(ranked_layer(), 4, set_expert_rank, "ep 4");
}

TEST(mapped_expert_ranks_sum_to_the_layer)
{
    check_ranks(ranked_layer(), 3, set_map_rank, "ep map");
}

// ---- determinism ----------------------------------------------------------------------------------------------------

TEST(poisoned_memory_changes_no_bit)
{
    fixture f = ranked_layer();
    unsigned char first[17 * 72 * 2];
    moe_error err;
    f.tokens = 17;
    CHECK_OK(fixture_open(&f, &err));
    for (int fill = 0; fill < 3; fill++) {
        static const int bytes[] = { 0xff, 0x00, 0x7f };
        memset(f.args.workspace, bytes[fill], (size_t)f.args.workspace_bytes);
        memset(f.args.out, bytes[fill], sizeof first);
        CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
        if (fill == 0) memcpy(first, f.args.out, sizeof first);
        else CHECK(memcmp(first, f.args.out, sizeof first) == 0);
    }
    fixture_close(&f);
}

// More rows than a slice of GEMM 2 holds, one hot expert, against the same tokens one by one.
TEST(a_token_does_not_depend_on_its_batch)
{
    enum { MOST = 900, H = 2000, K = 6 };
    const int T = test_small() ? 60 : MOST; // few enough for valgrind, too few for slices
    fixture f = fixture_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
    static uint16_t all[MOST * H], one[H];
    moe_error err;
    int wrong = 0;
    f.tokens = T;
    f.layer.hidden_size = H;
    f.layer.intermediate_size = 8;
    f.layer.shared.count = 1;
    f.layer.shared.intermediate_size = 5;
    f.layer.routing.top_k = K;
    REQUIRE_OK(fixture_open(&f, &err));
    CHECK(test_small() || moe__slice_columns(&f.plan->layer, T * (K + 1)) < H);
    for (int t = 0; t < T; t++) ((float *)(uintptr_t)f.args.logits)[t * 12 + 7] = 9;
    f.args.out = all;
    CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
    for (int t = 0; t < T; t += t < 40 ? 1 : 43) {
        moe_execute_args args = f.args;
        args.num_tokens = 1;
        args.x = (const uint16_t *)f.args.x + t * H;
        args.logits = (const float *)f.args.logits + t * 12;
        args.out = one;
        CHECK_EQ(moe_execute(f.plan, f.weights, &args, NULL), MOE_OK);
        wrong += memcmp(one, all + t * H, sizeof one) != 0;
    }
    CHECK_EQ(wrong, 0);
    fixture_close(&f);
}

static int allocations;

static void *counting_alloc(void *user, size_t size, size_t align)
{
    allocations++;
    return moe__default_alloc(user, size, align);
}

TEST(execute_allocates_nothing)
{
    fixture f = ranked_layer();
    moe_error err;
    int before;
    f.context_desc.allocator.alloc = counting_alloc;
    f.context_desc.allocator.free = moe__default_free;
    CHECK_OK(fixture_open(&f, &err));
    before = allocations;
    CHECK(before > 0);
    for (int i = 0; i < 3; i++) CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
    CHECK_EQ(allocations, before);
    fixture_close(&f);
}

static void backwards(void *user, int32_t tasks, void (*task)(void *arg, int32_t index), void *arg)
{
    (*(int *)user)++;
    for (int32_t i = tasks - 1; i >= 0; i--) task(arg, i);
}

TEST(a_parallel_for_hook_does_the_work)
{
    fixture f = fixture_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
    int calls = 0;
    f.context_desc.parallel_for = backwards;
    f.context_desc.parallel_user = &calls;
    f.context_desc.threads = 3;
    CHECK_LAYER(&f, "hook");
    CHECK(calls > 0);
}

#if defined(MOE_NO_THREADS) || defined(_WIN32) // one after the other
typedef int thread_id;
#  define START_THREAD(thread, run, arg) (*(thread) = 0, (void)(run)(arg))
#  define JOIN_THREAD(thread) ((void)(thread))
#else
typedef pthread_t thread_id;
#  define START_THREAD(thread, run, arg) ((void)pthread_create((thread), NULL, (run), (arg)))
#  define JOIN_THREAD(thread) ((void)pthread_join((thread), NULL))
#endif

typedef struct concurrent {
    fixture *f;
    moe_execute_args args;
    int result;
} concurrent;

static void *execute_often(void *arg)
{
    concurrent *c = (concurrent *)arg;
    for (int i = 0; i < 5 && c->result == MOE_OK; i++)
        c->result = moe_execute(c->f->plan, c->f->weights, &c->args, NULL);
    return NULL;
}

TEST(threads_share_a_plan_with_a_workspace_each)
{
    fixture f = ranked_layer();
    concurrent c[3];
    thread_id threads[3];
    unsigned char *memory[3], *out[3];
    moe_error err;
    REQUIRE_OK(fixture_open(&f, &err));
    for (int i = 0; i < 3; i++) {
        memory[i] = (unsigned char *)moe__default_alloc(NULL, (size_t)f.args.workspace_bytes, 256);
        out[i] = (unsigned char *)malloc(9 * 72 * 2);
        c[i].f = &f;
        c[i].args = f.args;
        c[i].args.workspace = memory[i];
        c[i].args.out = out[i];
        c[i].args.out_ids = c[i].args.out_row_of_slot = c[i].args.out_expert_counts = NULL;
        c[i].args.out_weights = NULL;
        c[i].args.out_faults = NULL;
        c[i].result = MOE_OK;
    }
    CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
    for (int i = 0; i < 3; i++) START_THREAD(&threads[i], execute_often, &c[i]);
    for (int i = 0; i < 3; i++) {
        JOIN_THREAD(threads[i]);
        CHECK_EQ(c[i].result, MOE_OK);
        CHECK(memcmp(out[i], f.args.out, 9 * 72 * 2) == 0);
        moe__default_free(NULL, memory[i], (size_t)f.args.workspace_bytes);
        free(out[i]);
    }
    fixture_close(&f);
}

// ---- golden checkpoints: outputs of transformers' own modules -------------------------------------------------------

#ifndef MOE_NO_CHECKPOINT
#include "golden.h"

static void golden_run(golden *g, const moe_plan *plan, const moe_weights *weights, const moe_layer_desc *layer,
                       const moe_plan_info *info)
{
    int router_width = 0, k = 0;
    float *x = (float *)golden_tensor(g, "x", NULL), *router_x = (float *)golden_tensor(g, "router_x", NULL);
    float *logits = (float *)golden_tensor(g, "logits", &router_width), *out = (float *)golden_tensor(g, "out", NULL);
    int32_t *ids = (int32_t *)golden_tensor(g, "ids", &k);
    float *their_weights = (float *)golden_tensor(g, "weights", NULL);
    void *token_ids = golden_tensor(g, "token_ids", NULL);
    size_t slots = (size_t)g->tokens * (size_t)info->slots, values = (size_t)g->tokens * (size_t)g->hidden;
    float *got = (float *)malloc(values * 4), *got_weights = (float *)malloc(slots * 4), *made = NULL;
    int32_t *got_ids = (int32_t *)malloc(slots * 4);
    int64_t *wide_ids = (int64_t *)malloc(slots * 8);
    void *workspace = moe__default_alloc(NULL, (size_t)info->workspace_bytes, 256);
    moe_execute_args args;
    moe_error err;
    memset(&args, 0, sizeof args);
    g->slots = info->slots;
    g->top_k = layer->routing.top_k;
    if (k != g->top_k || router_width != info->router_width) {
        golden_fail(g, __LINE__, "top_k or the router's width is not the stored one");
    } else {
        args.input_mode = MOE_INPUT_LOGITS;
        args.num_tokens = g->tokens;
        args.x = x;
        args.logits = logits;
        args.token_ids = token_ids;
        args.out = got;
        args.out_ids = got_ids;
        args.out_weights = got_weights;
        args.workspace = workspace;
        args.workspace_bytes = info->workspace_bytes;
        if (moe_execute_check(plan, weights, &args, &err) != MOE_OK) golden_fail(g, __LINE__, err.text);
        else if (moe_execute(plan, weights, &args, NULL) != MOE_OK) golden_fail(g, __LINE__, "execute from logits");
        golden_compare_routing(g, got_ids, got_weights, ids, their_weights);
        golden_compare(g, got, out, g->hidden, 1e-5, 0, "outputs from logits");
        golden_slots(g, layer, ids, their_weights, got_ids, got_weights);
        for (size_t i = 0; i < slots; i++) wide_ids[i] = got_ids[i];
        args.input_mode = MOE_INPUT_IDS;
        args.ids = plan->desc.ids_dtype == MOE_DTYPE_I64 ? (void *)wide_ids : (void *)got_ids;
        args.weights = got_weights;
        args.out_ids = NULL;
        args.out_weights = NULL;
        if (moe_execute(plan, weights, &args, NULL) != MOE_OK) golden_fail(g, __LINE__, "execute from ids");
        golden_compare(g, got, out, g->hidden, 1e-5, 1, "outputs from ids");
        args.x = router_x != NULL ? router_x : x;
        made = (float *)malloc((size_t)g->tokens * (size_t)router_width * 4);
        if (moe_router_logits(plan, weights, &args, made, NULL) != MOE_OK) golden_fail(g, __LINE__, "router logits");
        golden_compare(g, made, logits, router_width, 1e-5, 1, "router logits");
    }
    moe__default_free(NULL, workspace, (size_t)info->workspace_bytes);
    free(x); free(router_x); free(logits); free(out); free(ids); free(their_weights); free(token_ids);
    free(got); free(got_weights); free(got_ids); free(wide_ids); free(made);
}

static void check_golden(const char *name)
{
    golden g;
    moe_error err;
    moe_checkpoint *ckpt;
    moe_context *ctx = NULL;
    int32_t layers[GOLDEN_LAYERS];
    int count = golden_open(&g, name, &ckpt, layers);
    if (moe_context_create(NULL, &ctx, &err)) golden_fail(&g, __LINE__, err.text);
    for (int i = 0; i < count; i++) {
        moe_layer_desc layer;
        moe_weights *weights = NULL;
        moe_plan *plan = NULL;
        moe_plan_desc desc;
        moe_plan_info info;
        memset(&info, 0, sizeof info);
        golden_layer(&g, layers[i], &desc);
        if (moe_checkpoint_layer(ckpt, layers[i], &layer, &err) ||
            moe_weights_from_checkpoint(ctx, ckpt, &layer, &weights, &err) ||
            moe_plan_create(ctx, &layer, &desc, &plan, &err) || moe_plan_get_info(plan, &info, &err))
            golden_fail(&g, __LINE__, err.text);
        else
            golden_run(&g, plan, weights, &layer, &info);
        moe_plan_destroy(plan);
        moe_weights_destroy(weights);
    }
    moe_context_destroy(ctx);
    golden_close(&g, ckpt);
}

TEST(checkpoints_give_the_outputs_of_transformers)
{
    for (int i = 0; i < GOLDENS; i++) check_golden(golden_names[i]);
}
#else
TEST(checkpoints_give_the_outputs_of_transformers) { test_skip("no checkpoints in this build"); }
#endif

TEST_MAIN(
    T(every_activation_in_every_format_is_the_references_to_the_bit)
    T(activations_are_their_formulas)
    T(erf_and_tanh_gelus_are_two_functions)
    T(nan_in_x_reaches_the_output)
    T(unrounded_intermediate_is_the_references)
    T(biases_of_both_gemms)
    T(shared_experts_with_gate_and_scale)
    T(shared_experts_may_have_an_activation_of_their_own)
    T(the_callers_shared_gate_replaces_the_layers)
    T(always_on_slots_fixed_and_scored)
    T(special_experts_of_each_kind)
    T(pruned_experts_are_constants)
    T(weight_on_the_input)
    T(row_norm)
    T(scale_on_the_output_and_output_scale)
    T(per_expert_alpha_beta_and_limit)
    T(sizes_that_are_multiples_of_nothing)
    T(token_counts_experts_and_top_k)
    T(dtypes_of_every_input_and_output)
    T(strides_leave_what_is_between_rows)
    T(ids_mode_is_logits_mode_after_routing)
    T(packed_mode_is_ids_mode_with_bf16_weights)
    T(empty_slots_add_nothing_and_no_expert_at_all_gives_zero)
    T(sorted_rows_are_the_rows_of_ids_mode)
    T(masked_rows_are_the_rows_of_ids_mode)
    T(rows_past_a_count_are_not_touched)
    T(accumulate_adds_before_the_one_rounding)
    T(rows_out_then_finalize_is_execute)
    T(finalize_widens_rows_of_16_bits)
    T(route_alone_gives_what_execute_reports)
    T(router_logits_are_the_projection)
    T(permutation_tables_agree_with_each_other)
    T(num_tokens_dev_leaves_later_rows_alone)
    T(no_tokens_is_no_work)
    T(tensor_parallel_ranks_sum_to_the_layer)
    T(expert_parallel_ranks_sum_to_the_layer)
    T(mapped_expert_ranks_sum_to_the_layer)
    T(poisoned_memory_changes_no_bit)
    T(a_token_does_not_depend_on_its_batch)
    T(execute_allocates_nothing)
    T(a_parallel_for_hook_does_the_work)
    T(threads_share_a_plan_with_a_workspace_each)
    T(checkpoints_give_the_outputs_of_transformers)
)
