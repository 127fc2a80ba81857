// gpu_route.c - routing on the device gives the CPU's ids, order and weights to the bit: every method, member of the
// descriptor, size and input mode; and counts what it must not route
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "gpu.h"

enum { LARGE = 65536 };

static void check_logits(pair *p, const moe_routing_desc *routing, int experts, int tokens, int grain, const char *what)
{
    inputs in;
    char text[160];
    if (p->desc.max_tokens == 0) p->desc.max_tokens = tokens > 0 ? tokens : 1;
    if (!pair_make(p, routing, experts)) return;
    memset(&in, 0, sizeof in);
    inputs_logits(&in, p, tokens, grain, p->seed * 77 + (uint64_t)tokens);
    snprintf(text, sizeof text, "%.80s, E %d, k %d, T %d", what, experts, routing->top_k, tokens);
    CHECK_CALL(p, &in.c, text);
    inputs_free(&in);
    pair_close(p);
}

static const int methods[] = {
    MOE_ROUTING_DEFAULT, MOE_ROUTING_RENORMALIZE, MOE_ROUTING_DEEPSEEK_V3, MOE_ROUTING_LLAMA4,
    MOE_ROUTING_RENORMALIZE_NAIVE, MOE_ROUTING_TOPK, MOE_ROUTING_SIGMOID_RENORM, MOE_ROUTING_MINIMAX2,
    MOE_ROUTING_SIGMOID, MOE_ROUTING_TOPK_SIGMOID, MOE_ROUTING_DEEPSEEK_V4, MOE_ROUTING_SIMULATED,
    MOE_ROUTING_DEEPSEEK_V2, MOE_ROUTING_DEEPSEEK_V41, MOE_ROUTING_ERNIE45, MOE_ROUTING_LONGCAT, MOE_ROUTING_GEMMA4,
    MOE_ROUTING_PHIMOE, MOE_ROUTING_MISTRAL4, MOE_ROUTING_INKLING, MOE_ROUTING_KOLIBRI
};
enum { METHODS = sizeof methods / sizeof methods[0] };

// DeepSeek-V4.1 needs to know which tokens are marked.
static void complete(moe_routing_desc *r)
{
    if (r->bias_rows == 2) { r->marked_token_lo = 100; r->marked_token_hi = 101; }
}

TEST(every_method_gives_the_bits_of_the_cpu)
{
    static const int dtypes[] = { MOE_DTYPE_F32, MOE_DTYPE_BF16, MOE_DTYPE_F16 };
    if (!gpu_open()) return;
    for (int m = 0; m < METHODS; m++)
        for (int i = 0; i < 3; i++) {
            moe_routing_desc r = preset(methods[m], i == 0 ? 8 : i == 1 ? 1 : 6);
            pair p = { 0 };
            complete(&r);
            p.desc.logits_dtype = dtypes[(m + i) % 3];
            check_logits(&p, &r, 64, i == 0 ? 9 : i == 1 ? 1 : 33, i == 2 ? 2 : 4096,
                         moe_routing_method_string(methods[m]));
        }
}

TEST(every_number_of_experts_and_choices)
{
    static const int experts[] = { 1, 2, 3, 7, 31, 32, 33, 60, 100, 127, 128, 129, 160, 255, 256, 257, 288, 320, 384,
                                   385, 500, 512, 513, 768, 1000, 1024, 1025, 1536, 2047, 2048 };
    static const int choices[] = { 1, 2, 3, 8, 22, 31, 32 };
    if (!gpu_open()) return;
    for (int e = 0; e < (int)(sizeof experts / sizeof experts[0]); e++)
        for (int i = 0; i < 2; i++) {
            int k = choices[(e + 3 * i) % 7];
            moe_routing_desc r = preset(i == 0 ? MOE_ROUTING_RENORMALIZE_NAIVE : MOE_ROUTING_MINIMAX2, 1);
            pair p = { 0 };
            r.top_k = k < experts[e] ? k : experts[e];
            check_logits(&p, &r, experts[e], 5, 4096, "sizes");
        }
}

TEST(every_number_of_tokens)
{
    static const int tokens[] = { 0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64,
                                  65, 127, 128, 129, 255, 256, 257, 500, 512, 1000, 1023, 1024, 1025, 2000, 4096, 8191,
                                  8192, 16385, LARGE };
    if (!gpu_open()) return;
    for (int i = 0; i < (int)(sizeof tokens / sizeof tokens[0]); i++) {
        moe_routing_desc r = preset(MOE_ROUTING_DEEPSEEK_V3, 8);
        pair p = { 0 };
        if (!gpu_large() && tokens[i] > 64) break;
        check_logits(&p, &r, 256, tokens[i], 4096, "tokens");
    }
}

// The launch is chosen by num_tokens, not by the plan's maximum, and more tokens than one launch takes use two.
TEST(one_plan_takes_every_number_of_tokens)
{
    pair p = { 0 };
    moe_routing_desc r = preset(MOE_ROUTING_DEEPSEEK_V3, 4);
    static const int tokens[] = { 0, 1, 50, 1025, 1024, 5000 };
    int count = gpu_large() ? 6 : 5;
    if (!gpu_open()) return;
    p.desc.max_tokens = tokens[count - 1] > 1100 ? tokens[count - 1] : 1100;
    if (!pair_make(&p, &r, 32)) return;
    for (int i = 0; i < count; i++) {
        inputs in = { 0 };
        char text[40];
        snprintf(text, sizeof text, "T %d", tokens[i]);
        inputs_logits(&in, &p, tokens[i], 64, 5);
        CHECK_CALL(&p, &in.c, text);
        inputs_free(&in);
    }
    pair_close(&p);
}

TEST(every_member_of_the_descriptor)
{
    if (!gpu_open()) return;
    for (int variant = 0; variant < 40; variant++) {
        moe_routing_desc r = preset(MOE_ROUTING_RENORMALIZE_NAIVE, 4);
        pair p = { 0 };
        int experts = 48;
        char text[40];
        p.seed = 3 + (uint64_t)variant;
        switch (variant) {
        case 0: r.logit_multiplier = 0.7f; break;
        case 1: r.logit_softcap = 5; break;
        case 2: r.bias_rows = 1; break;
        case 3: r.bias_rows = 5; break;
        case 4: r.bias_rows = 2; r.marked_token_lo = 10; r.marked_token_hi = 12; break;
        case 5: r.bias_rows = 1; r.select = MOE_SELECT_LOGIT; break;
        case 6: r.groups = 6; r.groups_kept = 2; r.group_rule = MOE_GROUP_MAX; break;
        case 7: r.groups = 6; r.groups_kept = 2; r.group_rule = MOE_GROUP_TOP2_SUM; break;
        case 8: r.groups = 4; r.group_rule = MOE_GROUP_EACH; break;
        case 9: r.groups = 2; r.group_rule = MOE_GROUP_EACH; r.top_k = 8; r.bias_rows = 1; break;
        case 10: r = preset(MOE_ROUTING_DEEPSEEK_V3, 4); r.group_excluded = MOE_EXCLUDED_ZERO; break;
        case 11: r.renormalize_epsilon = 0.25f; break;
        case 12: r.renormalize = MOE_RENORMALIZE_CLAMP_MIN; r.renormalize_epsilon = 0.75f; break;
        case 13: r.score = MOE_SCORE_RAW; r.zero_sum = MOE_ZERO_SUM_ONE; break;
        case 14: r.scale = 2.5f; break;
        case 15: r.scale = 2.5f; r.scale_on = MOE_SCALE_ON_OUTPUT; break;
        case 16: r.per_expert_scale = 1; break;
        case 17: r.weight_on = MOE_WEIGHT_ON_INPUT; break;
        case 18: r.forced_rows = 20; break;
        case 19: r.forced_rows = 20; r.marked_token_lo = 30; r.marked_token_hi = 31; break;
        case 20: r.special_experts = 9; r.special_kind = MOE_SPECIAL_ZERO; break;
        case 21: r.special_experts = 9; r.special_kind = MOE_SPECIAL_IDENTITY; r.per_expert_scale = 1; break;
        case 22: r.special_experts = 40; r.special_kind = MOE_SPECIAL_SKIP; break;
        case 23: r.extra_slots = 2; break;
        case 24: r.extra_slots = 8; r.extra_weight = 0.5f; r.scale = 3; break;
        case 25: r.extra_slots = 2; r.extra_scored = 1; break;
        case 26: r.extra_slots = 3; r.extra_scored = 1; r.score = MOE_SCORE_SIGMOID; r.global_scale = 1; break;
        case 27: r.score_order = MOE_SCORE_AFTER_TOPK; r.renormalize = 0; r.extra_slots = 2; r.extra_scored = 1; break;
        case 28: r = preset(MOE_ROUTING_PHIMOE, 2); break;
        case 29: r = preset(MOE_ROUTING_PHIMOE, 2); r.logit_softcap = 3; r.scale = 1.5f; break;
        case 30: r.simulate = MOE_SIMULATE_UNIFORM; r.simulate_seed = 9; break;
        case 31: r.simulate = MOE_SIMULATE_ZIPF; r.simulate_seed = 10; break;
        case 32: r.simulate = MOE_SIMULATE_ONE_HOT; break;
        case 33: r.simulate = MOE_SIMULATE_ROUND_ROBIN; break;
        case 34: r.simulate = MOE_SIMULATE_ZIPF; r.extra_slots = 2; r.scale = 2; break;
        case 35: r.global_scale = 1; r.scale = 0.3f; break;
        case 36: r.score = MOE_SCORE_SQRT_SOFTPLUS; r.score_order = MOE_SCORE_AFTER_TOPK; r.bias_rows = 1; break;
        case 37: r.groups = 48; r.groups_kept = 7; r.group_rule = MOE_GROUP_MAX; break;
        case 38: r.groups = 3; r.groups_kept = 3; r.group_rule = MOE_GROUP_TOP2_SUM; experts = 51; break;
        default: r.groups = 16; r.groups_kept = 3; r.group_rule = MOE_GROUP_TOP2_SUM; r.top_k = 9; break;
        }
        snprintf(text, sizeof text, "variant %d", variant);
        check_logits(&p, &r, experts, 17, variant % 2 == 0 ? 4096 : 4, text);
    }
}

// Any legal descriptor, drawn member by member.
TEST(random_descriptors)
{
    int rounds = gpu_large() || test_full() ? 400 : 40, made = 0;
    uint64_t seed = 2026;
    if (!gpu_open()) return;
    for (int i = 0; made < rounds && i < 40 * rounds; i++) {
        moe_routing_desc r;
        moe_layer_desc layer;
        pair p = { 0 };
        char text[40];
        int experts = 1 + (int)(test_random_u32(&seed) % (i % 5 == 0 ? 600 : 64));
        memset(&r, 0, sizeof r);
#define DRAW(n) ((int)(test_random_u32(&seed) % (uint32_t)(n)))
        r.score = 1 + DRAW(4);
        r.score_order = 1 + DRAW(2);
        r.select = DRAW(3);
        r.top_k = 1 + DRAW(DRAW(3) == 0 ? 32 : 8);
        if (DRAW(4) == 0) r.logit_multiplier = 0.5f;
        if (DRAW(4) == 0) r.logit_softcap = 3;
        r.bias_rows = DRAW(2) == 0 ? 0 : 1 + 2 * DRAW(2);
        if (DRAW(2) == 0) { r.groups = 1 + DRAW(8); r.groups_kept = 1 + DRAW(r.groups); r.group_rule = 1 + DRAW(3); }
        if (r.group_rule == MOE_GROUP_EACH) r.groups_kept = 0;
        r.group_excluded = DRAW(2);
        r.renormalize = DRAW(3);
        if (r.renormalize != 0) { r.renormalize_epsilon = DRAW(2) == 0 ? 0 : 0.125f; r.zero_sum = DRAW(2); }
        if (DRAW(3) == 0) { r.scale = 1.7f; r.scale_on = DRAW(2); }
        r.per_expert_scale = DRAW(4) == 0;
        r.forced_rows = DRAW(6) == 0 ? 1 + DRAW(50) : 0;
        if (DRAW(6) == 0) { r.special_experts = 1 + DRAW(16); r.special_kind = 1 + DRAW(3); }
        if (DRAW(6) == 0) { r.extra_slots = 1 + DRAW(8); r.extra_scored = DRAW(2); }
        r.global_scale = DRAW(8) == 0;
        if (DRAW(10) == 0) r.sparse_mixer = 0.05f;
#undef DRAW
        memset(&layer, 0, sizeof layer);
        layer.hidden_size = layer.intermediate_size = 8;
        layer.num_experts = experts;
        layer.format = MOE_FORMAT_F32; // no products are compiled
        layer.activation.kind = MOE_ACTIVATION_SILU;
        layer.routing = r;
        if (moe_layer_resolve(&layer, NULL) != MOE_OK) continue;
        made++;
        p.seed = (uint64_t)i + 1;
        snprintf(text, sizeof text, "draw %d", i);
        check_logits(&p, &r, experts, 1 + (int)(test_random_u32(&seed) % 20), i % 3 == 0 ? 1 : 512, text);
    }
    CHECK_EQ(made, rounds);
}

// ---- contents -------------------------------------------------------------------------------------------------------

static void set_logits(inputs *in, const pair *p, int token, int kind)
{
    int width = p->info[0].router_width;
    float *row = (float *)in->logits + (int64_t)token * width;
    for (int e = 0; e < width; e++) {
        if (kind == 0) row[e] = 1.5f;
        if (kind == 1) row[e] = e % 2 == 0 ? 0.0f : -0.0f;
        if (kind == 2) row[e] = -MOE__INFINITY;
        if (kind == 3 && e % 3 != 1) row[e] = -MOE__INFINITY;
        if (kind == 4) row[e] = e == width - 1 ? -3e38f : -MOE__INFINITY;
        if (kind == 5) row[e] = e % 2 == 0 ? 3e38f : -3e38f;
        if (kind == 6) row[e] = (float)(e - width / 2) * 1e-41f; // denormals
        if (kind == 7) row[e] = -200.0f - (float)(e % 4);
    }
}

TEST(ties_infinities_and_extremes)
{
    static const int chosen[] = { MOE_ROUTING_DEFAULT, MOE_ROUTING_RENORMALIZE, MOE_ROUTING_DEEPSEEK_V3,
                                  MOE_ROUTING_TOPK, MOE_ROUTING_SIGMOID_RENORM, MOE_ROUTING_DEEPSEEK_V4,
                                  MOE_ROUTING_DEEPSEEK_V2, MOE_ROUTING_PHIMOE, MOE_ROUTING_MISTRAL4,
                                  MOE_ROUTING_INKLING };
    if (!gpu_open()) return;
    for (int m = 0; m < (int)(sizeof chosen / sizeof chosen[0]); m++) {
        moe_routing_desc r = preset(chosen[m], 6);
        pair p = { 0 };
        inputs in = { 0 };
        p.desc.max_tokens = 16;
        if (!pair_make(&p, &r, 40)) continue;
        inputs_logits(&in, &p, 16, 4, 9);
        for (int t = 0; t < 8; t++) set_logits(&in, &p, 2 * t, t);
        CHECK_CALL(&p, &in.c, moe_routing_method_string(chosen[m]));
        inputs_free(&in);
        pair_close(&p);
    }
}

// Rows further apart than they are wide, and at an address that is a multiple of the element's size only.
TEST(strides_and_unaligned_logits)
{
    static const int dtypes[] = { MOE_DTYPE_F32, MOE_DTYPE_BF16, MOE_DTYPE_F16 };
    if (!gpu_open()) return;
    for (int i = 0; i < 6; i++) {
        moe_routing_desc r = preset(MOE_ROUTING_DEEPSEEK_V3, 4);
        pair p = { 0 };
        inputs in = { 0 };
        answer a, b;
        moe_execute_args args;
        moe_permutation out;
        void *at[ANSWER_PARTS];
        size_t size = dtype_size(dtypes[i % 3]), bytes;
        unsigned char *shifted;
        p.desc.logits_dtype = dtypes[i % 3];
        p.desc.max_tokens = 12;
        if (!pair_make(&p, &r, 64)) continue;
        in.c.stride = i < 3 ? 67 : 64;
        inputs_logits(&in, &p, 12, 256, 9);
        bytes = (11 * (size_t)in.c.stride + 64) * size;
        call_cpu(&p, &in.c, &a);
        answer_make(&b, &p, &in.c);
        call_gpu_begin(&p, &in.c, &b, &args, &out, at);
        shifted = (unsigned char *)gpu_make(bytes + size) + size;
        gpu_put(shifted, in.logits, bytes);
        args.logits = shifted;
        b.result = call_run(&p, 1, &args, &out, NULL);
        for (int j = 0; j < ANSWER_PARTS; j++) gpu_get(b.part[j], at[j], b.words[j] * 4);
        CHECK_STR(answer_differs(&a, &b), "");
        gpu_release();
        answer_free(&a);
        answer_free(&b);
        inputs_free(&in);
        pair_close(&p);
    }
}

TEST(ids_and_weights_of_the_caller)
{
    static const int ids[] = { MOE_DTYPE_I32, MOE_DTYPE_I64 };
    static const int weights[] = { MOE_DTYPE_F32, MOE_DTYPE_BF16, MOE_DTYPE_F16 };
    if (!gpu_open()) return;
    for (int i = 0; i < 12; i++) {
        moe_routing_desc r = preset(MOE_ROUTING_DEFAULT, i % 2 == 0 ? 4 : 7);
        pair p = { 0 };
        inputs in = { 0 };
        char text[40];
        if (i >= 6) { r.extra_slots = 1; r.special_experts = 3; r.special_kind = MOE_SPECIAL_IDENTITY; }
        p.desc.ids_dtype = ids[i % 2];
        p.desc.weights_dtype = weights[i % 3];
        p.desc.max_tokens = 40;
        if (!pair_make(&p, &r, 29)) continue;
        inputs_ids(&in, &p, i == 5 ? 1 : 37, i % 4 == 3, i % 2 == 0 ? MOE_EXECUTE_ID_E_IS_NONE : 0, (uint64_t)i + 1);
        snprintf(text, sizeof text, "variant %d", i);
        CHECK_CALL(&p, &in.c, text);
        inputs_free(&in);
        pair_close(&p);
    }
}

// ---- what is counted ------------------------------------------------------------------------------------------------

// Runs the call on the device and compares ids and weights with `want`, faults with these four.
static void check_faults(const pair *p, const call *c, const answer *want, uint32_t nan, uint32_t id, uint32_t token_id,
                         uint32_t counts)
{
    answer got;
    call_gpu(p, c, &got);
    CHECK_EQ(got.result, MOE_OK);
    CHECK_EQ(got.part[ANSWER_FAULTS][MOE_FAULT_NAN_LOGITS], nan);
    CHECK_EQ(got.part[ANSWER_FAULTS][MOE_FAULT_IDS], id);
    CHECK_EQ(got.part[ANSWER_FAULTS][MOE_FAULT_TOKEN_IDS], token_id);
    CHECK_EQ(got.part[ANSWER_FAULTS][MOE_FAULT_COUNTS], counts);
    for (int i = ANSWER_IDS; i <= ANSWER_EXPERTS; i++)
        for (size_t j = 0; j < want->words[i]; j++) {
            if (got.part[i][j] == want->part[i][j]) continue;
            test_fail_numbers(__FILE__, __LINE__, answer_names[i], (double)want->part[i][j], (double)got.part[i][j]);
            break;
        }
    answer_free(&got);
}

// A NaN or +inf sorts last, as -inf does; its token is counted once, and routed with the rest.
TEST(nan_and_infinite_logits_sort_last_and_are_counted)
{
    static const int chosen[] = { MOE_ROUTING_DEFAULT, MOE_ROUTING_DEEPSEEK_V3, MOE_ROUTING_RENORMALIZE };
    if (!gpu_open()) return;
    for (int m = 0; m < 3; m++) {
        moe_routing_desc r = preset(chosen[m], 4);
        pair p = { 0 };
        inputs in = { 0 };
        answer want;
        float *logits;
        p.desc.max_tokens = 20;
        if (!pair_make(&p, &r, 64)) continue;
        inputs_logits(&in, &p, 20, 64, 11);
        logits = (float *)in.logits;
        logits[3 * 64 + 5] = logits[3 * 64 + 60] = logits[19 * 64] = logits[7 * 64 + 63] = -MOE__INFINITY;
        call_cpu(&p, &in.c, &want);
        logits[3 * 64 + 5] = logits[3 * 64 + 60] = moe__bits_f32(0x7fc00000u);
        logits[19 * 64] = moe__bits_f32(0xffc12345u);
        logits[7 * 64 + 63] = MOE__INFINITY;
        check_faults(&p, &in.c, &want, 3, 0, 0, 0);
        answer_free(&want);
        inputs_free(&in);
        pair_close(&p);
    }
}

TEST(ids_out_of_range_are_dropped_and_counted)
{
    if (!gpu_open()) return;
    for (int packed = 0; packed < 2; packed++) {
        moe_routing_desc r = preset(MOE_ROUTING_DEFAULT, 4);
        pair p = { 0 };
        inputs in = { 0 };
        answer want;
        int32_t *ids;
        p.desc.max_tokens = 20;
        if (!pair_make(&p, &r, 24)) continue;
        inputs_ids(&in, &p, 20, packed, 0, 3);
        ids = (int32_t *)in.ids;
        for (int i = 0; i < 5; i++) ids[i * 13] = packed ? (int32_t)0xffff3f80u : -1;
        call_cpu(&p, &in.c, &want);
        for (int i = 0; i < 5; i++)
            ids[i * 13] = packed ? (24 + i) << 16 | 0x3f80 : i == 0 ? 24 : i == 1 ? -2 : i << 28;
        check_faults(&p, &in.c, &want, 0, 5, 0, 0);
        answer_free(&want);
        inputs_free(&in);
        pair_close(&p);
    }
}

TEST(token_ids_and_bias_rows_out_of_range_are_dropped_and_counted)
{
    moe_routing_desc r = preset(MOE_ROUTING_DEEPSEEK_V4, 4);
    pair p = { 0 };
    inputs in = { 0 };
    answer want;
    int32_t *ids;
    if (!gpu_open()) return;
    r.forced_rows = 10;
    r.bias_rows = 3;
    p.desc.max_tokens = 9;
    if (!pair_make(&p, &r, 24)) return;
    inputs_logits(&in, &p, 9, 64, 4);
    call_cpu(&p, &in.c, &want);
    ids = (int32_t *)in.token_ids;
    ids[2] = 10;
    ids[4] = -1;
    in.bias_index[7] = 3;
    in.bias_index[8] = -1;
    for (int t = 2; t < 9; t++)
        for (int j = 0; j < 4 && (t == 2 || t == 4 || t >= 7); j++) {
            uint32_t *id = &want.part[ANSWER_IDS][t * 4 + j];
            want.part[ANSWER_EXPERTS][*id]--;
            *id = 0xffffffffu;
            want.part[ANSWER_WEIGHTS][t * 4 + j] = 0;
        }
    check_faults(&p, &in.c, &want, 0, 0, 4, 0);
    answer_free(&want);
    inputs_free(&in);
    pair_close(&p);
}

// The count on the device is read there; rows past it stay as they were. One that is out of range routes nothing.
TEST(the_number_of_tokens_is_read_on_the_device)
{
    static const int held[] = { 0, 1, 17, 30 };
    moe_routing_desc r = preset(MOE_ROUTING_RENORMALIZE, 4);
    pair p = { 0 };
    inputs in = { 0 };
    answer want;
    if (!gpu_open()) return;
    p.desc.max_tokens = 30;
    if (!pair_make(&p, &r, 24)) return;
    inputs_logits(&in, &p, 30, 64, 4);
    for (int i = 0; i < 4; i++) {
        in.c.held = held[i];
        CHECK_CALL(&p, &in.c, "held");
    }
    in.c.held = 0;
    call_cpu(&p, &in.c, &want);
    in.c.held = 31;
    check_faults(&p, &in.c, &want, 0, 0, 0, 1);
    in.c.held = 0x7fffffff;
    check_faults(&p, &in.c, &want, 0, 0, 0, 1);
    answer_free(&want);
    inputs_free(&in);
    pair_close(&p);
}

TEST_MAIN(
    T(every_method_gives_the_bits_of_the_cpu)
    T(every_number_of_experts_and_choices)
    T(every_number_of_tokens)
    T(one_plan_takes_every_number_of_tokens)
    T(every_member_of_the_descriptor)
    T(random_descriptors)
    T(ties_infinities_and_extremes)
    T(strides_and_unaligned_logits)
    T(ids_and_weights_of_the_caller)
    T(nan_and_infinite_logits_sort_last_and_are_counted)
    T(ids_out_of_range_are_dropped_and_counted)
    T(token_ids_and_bias_rows_out_of_range_are_dropped_and_counted)
    T(the_number_of_tokens_is_read_on_the_device)
)
