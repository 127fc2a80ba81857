// test_execute.c - plans and execution refuse what is wrong, by code, member and value, and leave the output alone
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "layer.h"

static fixture plain(void)
{
    fixture f;
    memset(&f, 0, sizeof f);
    f.layer = small_layer(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
    f.context_desc.threads = 2;
    return f;
}

// The check says code and member; execute gives the same code and does not touch out.
static void refused(fixture *f, const moe_execute_args *args, int code, const char *member, const char *text, int line)
{
    moe_error err;
    int result;
    memset(&err, 0, sizeof err);
    if (args->out != NULL) memset(f->args.out, 0x5a, f->out_bytes);
    result = moe_execute_check(f->plan, f->weights, args, &err);
    if (result != code || err.code != code || strcmp(err.member, member) != 0 || strstr(err.text, text) == NULL) {
        char got[900];
        snprintf(got, sizeof got, "%d, \"%s\", \"%s\"; expected %d, \"%s\", \"%s\"", result, err.member, err.text, code,
                 member, text);
        test_fail2(__FILE__, line, "moe_execute_check", got);
    }
    result = moe_execute(f->plan, f->weights, args, NULL);
    if (result != code) test_fail_numbers(__FILE__, line, "moe_execute", result, code);
    for (size_t i = 0; i < f->out_bytes && args->out != NULL; i++)
        if (((unsigned char *)f->args.out)[i] != 0x5a) {
            test_fail(__FILE__, line, "out was touched");
            break;
        }
}

#define REFUSED(change, code, member, text) \
    do { \
        moe_execute_args a = f.args; \
        change; \
        refused(&f, &a, (code), (member), (text), __LINE__); \
    } while (0)

TEST(every_argument_of_execute_is_checked_by_name)
{
    fixture f = plain();
    float one = 1;
    moe_error err;
    REQUIRE_OK(fixture_open(&f, &err));
    REFUSED(a.struct_size = 8, MOE_ERROR_ARGUMENT, "args.struct_size", "is 8");
    REFUSED(a.flags = 64, MOE_ERROR_ARGUMENT, "args.flags", "is 64");
    REFUSED(a.flags = MOE_EXECUTE_ACCUMULATE | MOE_EXECUTE_ROWS_OUT, MOE_ERROR_ARGUMENT, "args.flags",
            "ACCUMULATE and ROWS_OUT");
    REFUSED(a.input_mode = MOE_INPUT_UNSET, MOE_ERROR_ARGUMENT, "args.input_mode", "is not set");
    REFUSED(a.input_mode = 6, MOE_ERROR_ARGUMENT, "args.input_mode", "is 6");
    REFUSED(a.input_mode = -1, MOE_ERROR_ARGUMENT, "args.input_mode", "is -1");
    REFUSED(a.num_tokens = -1, MOE_ERROR_ARGUMENT, "args.num_tokens", "0..9");
    REFUSED(a.num_tokens = 10, MOE_ERROR_ARGUMENT, "args.num_tokens", "is 10");
    REFUSED(a.x = NULL, MOE_ERROR_ARGUMENT, "args.x", "is NULL");
    REFUSED(a.x_stride = 71, MOE_ERROR_ARGUMENT, "args.x_stride", "at least 72");
    REFUSED(a.x_stride = -72, MOE_ERROR_ARGUMENT, "args.x_stride", "is -72");
    REFUSED(a.x_scale = &one, MOE_ERROR_ARGUMENT, "args.x_scale", "bf16 has no scales");
    REFUSED(a.logits = NULL, MOE_ERROR_ARGUMENT, "args.logits", "is NULL");
    REFUSED(a.logits_stride = 11, MOE_ERROR_ARGUMENT, "args.logits_stride", "at least 12");
    REFUSED(a.out = NULL, MOE_ERROR_ARGUMENT, "args.out", "is NULL");
    REFUSED(a.out_stride = 1, MOE_ERROR_ARGUMENT, "args.out_stride", "is 1");
    REFUSED(a.shared_gate = &one, MOE_ERROR_ARGUMENT, "args.shared_gate", "layer.shared.count is 0");
    REFUSED(a.workspace = NULL, MOE_ERROR_ARGUMENT, "args.workspace", "is NULL");
    REFUSED(a.workspace = (char *)a.workspace + 64, MOE_ERROR_ARGUMENT, "args.workspace", "aligned to 256");
    REFUSED(a.workspace_bytes -= 1, MOE_ERROR_ARGUMENT, "args.workspace_bytes", "this plan needs");
    REFUSED((a.flags = MOE_EXECUTE_ROWS_OUT, a.out_row_of_slot = NULL), MOE_ERROR_ARGUMENT, "args.out_row_of_slot",
            "is NULL");
    REFUSED((a.input_mode = MOE_INPUT_IDS, a.weights = &one), MOE_ERROR_ARGUMENT, "args.ids", "is NULL");
    REFUSED((a.input_mode = MOE_INPUT_IDS, a.ids = &one), MOE_ERROR_ARGUMENT, "args.weights", "is NULL");
    REFUSED(a.input_mode = MOE_INPUT_PACKED, MOE_ERROR_ARGUMENT, "args.ids", "is NULL");
    REFUSED(a.input_mode = MOE_INPUT_SORTED, MOE_ERROR_ARGUMENT, "args.counts_or_offsets", "is NULL");
    REFUSED((a.input_mode = MOE_INPUT_MASKED, a.counts_or_offsets = a.out_ids), MOE_ERROR_ARGUMENT,
            "args.rows_per_expert", "is 0");
    REFUSED((a.input_mode = MOE_INPUT_MASKED, a.counts_or_offsets = a.out_ids, a.rows_per_expert = 1 << 30),
            MOE_ERROR_ARGUMENT, "args.rows_per_expert", "is 1073741824");
    REFUSED((a.input_mode = MOE_INPUT_SORTED, a.counts_or_offsets = a.out_ids, a.num_tokens_dev = a.out_ids),
            MOE_ERROR_ARGUMENT, "args.num_tokens_dev", "is set");
    CHECK_EQ(moe_execute(NULL, f.weights, &f.args, NULL), MOE_ERROR_ARGUMENT);
    CHECK_EQ(moe_execute(f.plan, NULL, &f.args, NULL), MOE_ERROR_ARGUMENT);
    CHECK_EQ(moe_execute(f.plan, f.weights, NULL, NULL), MOE_ERROR_ARGUMENT);
    CHECK_ERR(moe_execute_check(NULL, f.weights, &f.args, &err), MOE_ERROR_ARGUMENT, "plan");
    CHECK_ERR(moe_execute_check(f.plan, NULL, &f.args, &err), MOE_ERROR_ARGUMENT, "weights");
    CHECK_ERR(moe_execute_check(f.plan, f.weights, NULL, &err), MOE_ERROR_ARGUMENT, "args");
    CHECK_EQ(moe_execute_check(f.plan, f.weights, &f.args, NULL), MOE_OK);
    fixture_close(&f);
}

TEST(bad_logits_are_named_and_counted)
{
    for (int dtype = MOE_DTYPE_F32; dtype <= MOE_DTYPE_F16; dtype++) {
        fixture f = plain();
        moe_error err;
        f.plan_desc.logits_dtype = dtype;
        REQUIRE_OK(fixture_open(&f, &err));
        moe__store((void *)(uintptr_t)f.args.logits, dtype, 3 * 12 + 7, moe__bits_f32(0x7fc00000u));
        REFUSED((void)a, MOE_ERROR_DATA, "args.logits[3][7]", "args.logits[3][7] is NaN");
        CHECK_EQ(f.args.out_faults[MOE_FAULT_NAN_LOGITS], 1u);
        CHECK_EQ(f.args.out_faults[MOE_FAULT_IDS], 0u);
        moe__store((void *)(uintptr_t)f.args.logits, dtype, 3 * 12 + 7, MOE__INFINITY);
        REFUSED((void)a, MOE_ERROR_DATA, "args.logits[3][7]", "is +inf");
        moe__store((void *)(uintptr_t)f.args.logits, dtype, 3 * 12 + 7, -MOE__INFINITY);
        CHECK_OK(moe_execute_check(f.plan, f.weights, &f.args, &err));
        CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
        CHECK_EQ(f.args.out_faults[MOE_FAULT_NAN_LOGITS], 0u);
        fixture_close(&f);
    }
}

TEST(bad_ids_are_named_and_counted)
{
    for (int wide = 0; wide < 2; wide++) {
        fixture f = plain();
        int32_t ids[36];
        int64_t wide_ids[36];
        float weights[36] = { 0 };
        moe_error err;
        f.plan_desc.ids_dtype = wide ? MOE_DTYPE_I64 : MOE_DTYPE_I32;
        REQUIRE_OK(fixture_open(&f, &err));
        for (int i = 0; i < 36; i++) ids[i] = i % 12;
        ids[9] = 300;
        ids[10] = -2;
        ids[30] = 12;
        for (int i = 0; i < 36; i++) wide_ids[i] = ids[i];
        if (wide) wide_ids[10] = (int64_t)1 << 40;
        f.args.input_mode = MOE_INPUT_IDS;
        f.args.ids = wide ? (void *)wide_ids : (void *)ids;
        f.args.weights = weights;
        REFUSED((void)a, MOE_ERROR_DATA, "args.ids[2][1]", "args.ids[2][1] is 300: ids are 0..11, or -1");
        CHECK_EQ(f.args.out_faults[MOE_FAULT_IDS], 3u);
        CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_ERROR_DATA);
        f.args.flags = MOE_EXECUTE_ID_E_IS_NONE;
        CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_ERROR_DATA);
        CHECK_EQ(f.args.out_faults[MOE_FAULT_IDS], 2u);
        ids[9] = ids[10] = 1;
        wide_ids[9] = wide_ids[10] = 1;
        CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
        REFUSED(a.flags = 0, MOE_ERROR_DATA, "args.ids[7][2]", "ID_E_IS_NONE would allow");
        fixture_close(&f);
    }
}

TEST(packed_ids_out_of_range_are_refused)
{
    fixture f = plain();
    int32_t ids[36];
    moe_error err;
    REQUIRE_OK(fixture_open(&f, &err));
    for (int i = 0; i < 36; i++) ids[i] = (i % 12) << 16 | 0x3f80;
    f.args.input_mode = MOE_INPUT_PACKED;
    f.args.ids = ids;
    ids[35] = 12 << 16;
    REFUSED((void)a, MOE_ERROR_DATA, "args.ids[8][3]", "is 12");
    ids[35] = (int32_t)0xfffe3f80u;
    REFUSED((void)a, MOE_ERROR_DATA, "args.ids[8][3]", "is -2");
    fixture_close(&f);
}

TEST(counts_and_offsets_out_of_range_are_refused)
{
    fixture f = plain();
    int32_t counts[12] = { 0 }, offsets[13] = { 0 }, tokens = 10;
    static uint16_t rows[12 * 8 * 72];
    moe_error err;
    f.plan_desc.max_rows = 20;
    REQUIRE_OK(fixture_open(&f, &err));
    REFUSED(a.num_tokens_dev = &tokens, MOE_ERROR_DATA, "args.num_tokens_dev", "holds 10");
    CHECK_EQ(f.args.out_faults[MOE_FAULT_COUNTS], 1u);
    tokens = -1;
    REFUSED(a.num_tokens_dev = &tokens, MOE_ERROR_DATA, "args.num_tokens_dev", "holds -1");
    f.args.x = rows;
    f.args.input_mode = MOE_INPUT_MASKED;
    f.args.counts_or_offsets = counts;
    f.args.rows_per_expert = 8;
    counts[4] = 9;
    REFUSED((void)a, MOE_ERROR_DATA, "args.counts_or_offsets[4]", "is 9: it must be 0..8");
    CHECK_EQ(f.args.out_faults[MOE_FAULT_COUNTS], 1u);
    counts[4] = -1;
    REFUSED((void)a, MOE_ERROR_DATA, "args.counts_or_offsets[4]", "is -1");
    counts[4] = counts[5] = counts[6] = 8;
    REFUSED((void)a, MOE_ERROR_DATA, "args.counts_or_offsets[6]", "makes 24 rows, the plan has max_rows 20");
    f.args.input_mode = MOE_INPUT_SORTED;
    f.args.counts_or_offsets = offsets;
    offsets[0] = 1;
    REFUSED((void)a, MOE_ERROR_DATA, "args.counts_or_offsets[0]", "is 1");
    offsets[0] = 0;
    offsets[3] = 5;
    REFUSED((void)a, MOE_ERROR_DATA, "args.counts_or_offsets[4]", "is 0");
    for (int e = 4; e < 13; e++) offsets[e] = 21;
    REFUSED((void)a, MOE_ERROR_DATA, "args.counts_or_offsets[4]", "is 21");
    fixture_close(&f);
}

TEST(token_ids_and_bias_rows_out_of_range_are_refused)
{
    fixture f = plain();
    int64_t table[6 * 4], ids[9] = { 0, 1, 2, 3, 4, 5, 0, 1, 2 };
    int32_t bias_rows[9] = { 0 };
    moe_tensor t;
    moe_error err;
    f.layer.routing.forced_rows = 6;
    f.layer.routing.bias_rows = 3;
    f.layer.routing.marked_token_lo = 100;
    f.layer.routing.marked_token_hi = 110;
    f.plan_desc.ids_dtype = MOE_DTYPE_I64;
    fixture_open(&f, &err); // ends at seal: the forced ids are missing
    CHECK_EQ(err.code, MOE_ERROR_MISSING);
    memset(&t, 0, sizeof t);
    for (int i = 0; i < 24; i++) table[i] = i % 12;
    t.role = MOE_TENSOR_FORCED_IDS;
    t.expert = -1;
    t.dtype = MOE_DTYPE_I64;
    t.rank = 2;
    t.dims[0] = 6;
    t.dims[1] = 4;
    t.data = table;
    t.data_bytes = sizeof table;
    CHECK_OK(moe_weights_set_tensor(f.weights, &t, &err));
    CHECK_OK(moe_weights_seal(f.weights, &err));
    REQUIRE_OK(moe_plan_create(f.ctx, &f.layer, &f.plan_desc, &f.plan, &err));
    CHECK_OK(moe_plan_get_info(f.plan, &f.info, &err));
    fixture_inputs(&f);
    REFUSED((void)a, MOE_ERROR_ARGUMENT, "args.token_ids", "is NULL");
    f.args.token_ids = ids;
    CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
    for (int i = 0; i < 36; i++) CHECK_EQ(f.args.out_ids[i], (int32_t)table[ids[i / 4] * 4 + i % 4]);
    ids[8] = 6;
    REFUSED((void)a, MOE_ERROR_DATA, "args.token_ids[8]", "is 6: the table of forced ids has rows 0..5");
    CHECK_EQ(f.args.out_faults[MOE_FAULT_TOKEN_IDS], 1u);
    ids[8] = -1;
    REFUSED((void)a, MOE_ERROR_DATA, "args.token_ids[8]", "is -1");
    ids[8] = 105; // marked
    CHECK_OK(moe_execute_check(f.plan, f.weights, &f.args, &err));
    f.args.bias_index = bias_rows;
    CHECK_OK(moe_execute_check(f.plan, f.weights, &f.args, &err));
    bias_rows[2] = 3;
    REFUSED((void)a, MOE_ERROR_DATA, "args.bias_index[2]", "is 3: it must be 0..2");
    bias_rows[2] = -1;
    REFUSED((void)a, MOE_ERROR_DATA, "args.bias_index[2]", "is -1");
    fixture_close(&f);
}

TEST(weights_of_another_shape_are_refused)
{
    static const char *const member = "weights";
    moe_error err;
    for (int i = 0; i < 12; i++) {
        fixture f = plain(), other = plain();
        int32_t map[12] = { 0, 1, 2, 3, -1, -1, -1, -1, -1, -1, -1, -1 };
        moe_plan *plan;
        REQUIRE_OK(fixture_open(&f, &err));
        switch (i) {
        case 0: other.layer.hidden_size = 80; break;
        case 1: other.layer.intermediate_size = 48; break;
        case 2: other.layer.num_experts = 13; break;
        case 3: other.layer.format = MOE_FORMAT_F16; break;
        case 4: other.layer.activation.kind = MOE_ACTIVATION_SILU; break;
        case 5: other.layer.gemm1_bias = 1; break;
        case 6: other.layer.shared.count = other.layer.shared.intermediate_size = 1; break;
        case 7: other.layer.parallel.local_experts = 4; break;
        case 8: other.layer.parallel.tp_size = 2; break;
        case 9: other.layer.row_norm = 1; break;
        case 10: other.layer.parallel.local_experts = 4; other.layer.parallel.expert_map = map; break;
        default: other.layer.routing.bias_rows = 1; break;
        }
        plan = NULL;
        REQUIRE_OK(moe_plan_create(f.ctx, &other.layer, NULL, &plan, &err));
        CHECK_ERR(moe_execute_check(plan, f.weights, &f.args, &err), MOE_ERROR_ARGUMENT, member);
        CHECK_EQ(moe_execute(plan, f.weights, &f.args, NULL), MOE_ERROR_ARGUMENT);
        moe_plan_destroy(plan);
        fixture_close(&f);
    }
}

TEST(ranks_of_weights_and_plan_must_agree)
{
    fixture f = plain(), other = plain();
    moe_plan *plan;
    moe_error err;
    f.layer.parallel.tp_size = other.layer.parallel.tp_size = 2;
    other.layer.parallel.tp_rank = 1;
    REQUIRE_OK(fixture_open(&f, &err));
    REQUIRE_OK(moe_plan_create(f.ctx, &other.layer, NULL, &plan, &err));
    CHECK_ERR(moe_execute_check(plan, f.weights, &f.args, &err), MOE_ERROR_ARGUMENT, "weights");
    moe_plan_destroy(plan);
    fixture_close(&f);
    f = plain();
    f.layer.parallel.local_experts = other.layer.parallel.local_experts = 6;
    f.layer.parallel.expert_offset = 6;
    other.layer.parallel.tp_size = other.layer.parallel.tp_rank = 0;
    REQUIRE_OK(fixture_open(&f, &err));
    REQUIRE_OK(moe_plan_create(f.ctx, &other.layer, NULL, &plan, &err));
    CHECK_ERR(moe_execute_check(plan, f.weights, &f.args, &err), MOE_ERROR_ARGUMENT, "weights");
    moe_plan_destroy(plan);
    fixture_close(&f);
}

TEST(unsealed_weights_and_those_of_another_context_are_refused)
{
    fixture f = plain(), other = plain();
    moe_weights *unsealed;
    moe_error err;
    REQUIRE_OK(fixture_open(&f, &err));
    REQUIRE_OK(fixture_open(&other, &err));
    CHECK_ERR(moe_execute_check(f.plan, other.weights, &f.args, &err), MOE_ERROR_ARGUMENT, "weights");
    CHECK_OK(moe_weights_create(f.ctx, &f.layer, NULL, &unsealed, &err));
    CHECK_ERR(moe_execute_check(f.plan, unsealed, &f.args, &err), MOE_ERROR_STATE, "weights");
    CHECK_EQ(moe_execute(f.plan, unsealed, &f.args, NULL), MOE_ERROR_STATE);
    moe_weights_destroy(unsealed);
    fixture_close(&other);
    fixture_close(&f);
}

TEST(one_plan_serves_every_layer_of_its_shape)
{
    fixture f = plain(), other = plain();
    moe_weights *mine;
    moe_error err;
    f.seed = 1;
    REQUIRE_OK(fixture_open(&f, &err));
    other.seed = 2;
    other.layer.layer_index = 5;
    REQUIRE_OK(fixture_open(&other, &err));
    moe_weights_destroy(other.weights);
    other.weights = NULL;
    REQUIRE_OK(moe_weights_create(f.ctx, &other.layer, NULL, &mine, &err));
    other.weights = mine;
    for (int id = 0; id < 12; id++) CHECK_OK(set_expert(&other, id, &err));
    CHECK_OK(set_common(&other, &err));
    CHECK_OK(moe_weights_seal(mine, &err));
    CHECK_EQ(moe_execute(f.plan, mine, &f.args, NULL), MOE_OK);
    free(other.x32);
    other.x32 = f.x32;
    CHECK_OK(fixture_reference(&other, f.args.out_ids, f.args.out_weights, &err));
    for (int i = 0; i < 9 * 72; i++)
        CHECK_EQ(moe__load(f.args.out, MOE_DTYPE_BF16, i), moe__round_to(other.reference[i], MOE_DTYPE_BF16));
    other.x32 = NULL;
    moe_weights_destroy(mine);
    other.weights = NULL;
    fixture_close(&other);
    fixture_close(&f);
}

TEST(every_member_of_a_plan_desc_is_checked)
{
    moe_layer_desc layer = small_layer(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
    moe_plan_desc desc;
    moe_plan_info info;
    moe_plan *plan;
    moe_context *ctx;
    moe_error err;
    REQUIRE_OK(moe_context_create(NULL, &ctx, &err));
#define BAD(member, value) \
    do { \
        memset(&desc, 0, sizeof desc); \
        memset(&info, 0, sizeof info); \
        desc.member = (value); \
        plan = (moe_plan *)&desc; \
        CHECK_ERR(moe_plan_create(ctx, &layer, &desc, &plan, &err), MOE_ERROR_ARGUMENT, "desc." #member); \
        CHECK(plan == NULL); \
        CHECK_ERR(moe_plan_query(ctx, &layer, &desc, &info, &err), MOE_ERROR_ARGUMENT, "desc." #member); \
    } while (0)
    BAD(struct_size, 4);
    BAD(flags, 2);
    BAD(max_tokens, -1);
    BAD(max_tokens, INT32_MAX);
    BAD(max_rows, -1);
    BAD(x_dtype, MOE_DTYPE_E4M3);
    BAD(logits_dtype, MOE_DTYPE_F64);
    BAD(ids_dtype, MOE_DTYPE_U32);
    BAD(weights_dtype, 99);
    BAD(out_dtype, -1);
    BAD(intermediate_dtype, MOE_DTYPE_E2M1);
#undef BAD
    memset(&info, 0, sizeof info);
    CHECK_ERR(moe_plan_create(NULL, &layer, NULL, &plan, &err), MOE_ERROR_ARGUMENT, "ctx");
    CHECK_ERR(moe_plan_create(ctx, NULL, NULL, &plan, &err), MOE_ERROR_ARGUMENT, "layer");
    CHECK_ERR(moe_plan_create(ctx, &layer, NULL, NULL, &err), MOE_ERROR_ARGUMENT, "out");
    CHECK_ERR(moe_plan_query(NULL, &layer, NULL, &info, &err), MOE_ERROR_ARGUMENT, "ctx");
    CHECK_ERR(moe_plan_query(ctx, NULL, NULL, &info, &err), MOE_ERROR_ARGUMENT, "layer");
    CHECK_ERR(moe_plan_query(ctx, &layer, NULL, NULL, &err), MOE_ERROR_ARGUMENT, "info");
    CHECK_ERR(moe_plan_get_info(NULL, &info, &err), MOE_ERROR_ARGUMENT, "plan");
    layer.routing.top_k = 13;
    CHECK_ERR(moe_plan_create(ctx, &layer, NULL, &plan, &err), MOE_ERROR_ARGUMENT, "layer.routing.top_k");
    layer = small_layer(MOE_FORMAT_FP8_BLOCK, MOE_ACTIVATION_SWIGLU);
    layer.hidden_size = layer.intermediate_size = 128;
    layer.intermediate_size = 100;
    CHECK_ERR(moe_plan_create(ctx, &layer, NULL, &plan, &err), MOE_ERROR_ARGUMENT, "layer.intermediate_size");
    moe_plan_destroy(NULL);
    moe_context_destroy(ctx);
}

TEST(sizes_whose_products_overflow_are_refused)
{
    moe_layer_desc layer = small_layer(MOE_FORMAT_F32, MOE_ACTIVATION_SWIGLU);
    moe_plan_desc desc;
    moe_plan *plan;
    moe_context *ctx;
    moe_error err;
    memset(&desc, 0, sizeof desc);
    REQUIRE_OK(moe_context_create(NULL, &ctx, &err));
    layer.hidden_size = layer.intermediate_size = 1 << 20;
    layer.num_experts = 2048;
    layer.routing.top_k = 32;
    desc.max_tokens = 1 << 22;
    CHECK_ERR(moe_plan_create(ctx, &layer, &desc, &plan, &err), MOE_ERROR_ARGUMENT, "desc.max_tokens");
    moe_context_destroy(ctx);
}

TEST(query_reports_what_create_needs)
{
    moe_layer_desc layer = small_layer(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
    moe_plan_desc desc;
    moe_plan_info a, b;
    moe_weights_info w;
    fixture f = plain();
    moe_error err;
    f.layer.routing.extra_slots = 2;
    f.layer.routing.special_experts = 3;
    f.layer.routing.special_kind = MOE_SPECIAL_ZERO;
    f.layer.parallel.local_experts = 5;
    layer = f.layer;
    REQUIRE_OK(fixture_open(&f, &err));
    memset(&a, 0, sizeof a);
    memset(&b, 0, sizeof b);
    memset(&w, 0, sizeof w);
    desc = f.plan_desc;
    CHECK_OK(moe_plan_query(f.ctx, &layer, &desc, &a, &err));
    CHECK_OK(moe_plan_get_info(f.plan, &b, &err));
    CHECK_OK(moe_weights_get_info(f.weights, &w, &err));
    CHECK(memcmp(&a, &b, sizeof a) == 0);
    CHECK_EQ(a.weight_bytes, w.weight_bytes);
    CHECK_EQ(a.layout_id, w.layout_id);
    CHECK_EQ(a.slots, 6);
    CHECK_EQ(a.router_width, 15);
    CHECK_EQ(a.local_experts, 7);
    CHECK(a.workspace_bytes % 256 == 0);
    CHECK_EQ(a.num_candidates, 4);
    fixture_close(&f);
}

TEST(the_plan_keeps_its_own_expert_map)
{
    fixture f = plain();
    int32_t map[12];
    moe_error err;
    uint16_t first[9 * 72];
    for (int e = 0; e < 12; e++) map[e] = e % 2 == 0 ? e / 2 : -1;
    f.layer.parallel.local_experts = 6;
    f.layer.parallel.expert_map = map;
    REQUIRE_OK(fixture_open(&f, &err));
    CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
    memcpy(first, f.args.out, sizeof first);
    memset(map, 0x7f, sizeof map);
    CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
    CHECK(memcmp(first, f.args.out, sizeof first) == 0);
    fixture_close(&f);
}

static int allocations, failing;

static void *failing_alloc(void *user, size_t size, size_t align)
{
    return ++allocations == failing ? NULL : moe__default_alloc(user, size, align);
}

static int outstanding;
static void counted_free(void *user, void *p, size_t size)
{
    outstanding--;
    moe__default_free(user, p, size);
}
static void *counted_alloc(void *user, size_t size, size_t align)
{
    void *p = failing_alloc(user, size, align);
    outstanding += p != NULL;
    return p;
}

TEST(plan_create_fails_cleanly_when_memory_is_out)
{
    moe_layer_desc layer = small_layer(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
    moe_context_desc desc;
    moe_context *ctx;
    moe_plan *plan;
    moe_error err;
    int needed;
    memset(&desc, 0, sizeof desc);
    desc.allocator.alloc = counted_alloc;
    desc.allocator.free = counted_free;
    allocations = failing = outstanding = 0;
    REQUIRE_OK(moe_context_create(&desc, &ctx, &err));
    allocations = 0;
    CHECK_OK(moe_plan_create(ctx, &layer, NULL, &plan, &err));
    needed = allocations;
    moe_plan_destroy(plan);
    for (failing = 1; failing <= needed; failing++) {
        allocations = 0;
        CHECK_ERR(moe_plan_create(ctx, &layer, NULL, &plan, &err), MOE_ERROR_MEMORY, "");
        CHECK(plan == NULL);
    }
    failing = 0;
    moe_context_destroy(ctx);
    CHECK(needed > 0);
    CHECK_EQ(outstanding, 0);
}

TEST(the_stages_check_their_arguments)
{
    fixture f = plain();
    moe_execute_args a;
    moe_permutation p;
    static float logits[9 * 12], rows[36 * 72];
    int32_t row_of_slot[36];
    moe_error err;
    REQUIRE_OK(fixture_open(&f, &err));
    CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
    memcpy(row_of_slot, f.args.out_row_of_slot, sizeof row_of_slot);
    // router_logits
    CHECK_EQ(moe_router_logits(f.plan, f.weights, &f.args, logits, NULL), MOE_OK);
    CHECK_EQ(moe_router_logits(NULL, f.weights, &f.args, logits, NULL), MOE_ERROR_ARGUMENT);
    CHECK_EQ(moe_router_logits(f.plan, NULL, &f.args, logits, NULL), MOE_ERROR_ARGUMENT);
    CHECK_EQ(moe_router_logits(f.plan, f.weights, NULL, logits, NULL), MOE_ERROR_ARGUMENT);
    CHECK_EQ(moe_router_logits(f.plan, f.weights, &f.args, NULL, NULL), MOE_ERROR_ARGUMENT);
    a = f.args;
    a.x = NULL;
    CHECK_EQ(moe_router_logits(f.plan, f.weights, &a, logits, NULL), MOE_ERROR_ARGUMENT);
    // route
    a = f.args;
    a.logits = NULL;
    CHECK_EQ(moe_route(f.plan, f.weights, &a, NULL), MOE_ERROR_ARGUMENT);
    CHECK_EQ(moe_route(NULL, f.weights, &f.args, NULL), MOE_ERROR_ARGUMENT);
    CHECK_EQ(moe_route(f.plan, NULL, &f.args, NULL), MOE_ERROR_ARGUMENT);
    CHECK_EQ(moe_route(f.plan, f.weights, NULL, NULL), MOE_ERROR_ARGUMENT);
    a = f.args;
    a.input_mode = MOE_INPUT_SORTED;
    CHECK_EQ(moe_route(f.plan, f.weights, &a, NULL), MOE_ERROR_ARGUMENT);
    // permute
    memset(&p, 0, sizeof p);
    p.tile = 8;
    a = f.args;
    a.input_mode = MOE_INPUT_IDS;
    a.ids = f.args.out_ids;
    CHECK_EQ(moe_permute(f.plan, NULL, &a, &p, NULL), MOE_OK);
    CHECK_EQ(moe_permute(NULL, NULL, &a, &p, NULL), MOE_ERROR_ARGUMENT);
    CHECK_EQ(moe_permute(f.plan, NULL, NULL, &p, NULL), MOE_ERROR_ARGUMENT);
    CHECK_EQ(moe_permute(f.plan, NULL, &a, NULL, NULL), MOE_ERROR_ARGUMENT);
    CHECK_EQ(moe_permute(f.plan, NULL, &f.args, &p, NULL), MOE_ERROR_ARGUMENT); // LOGITS needs weights
    CHECK_EQ(moe_permute(f.plan, f.weights, &f.args, &p, NULL), MOE_OK);
    p.tile = 0;
    CHECK_EQ(moe_permute(f.plan, NULL, &a, &p, NULL), MOE_ERROR_ARGUMENT);
    p.tile = 8;
    a.num_tokens = 10;
    CHECK_EQ(moe_permute(f.plan, NULL, &a, &p, NULL), MOE_ERROR_ARGUMENT);
    a.num_tokens = 9;
    f.args.out_ids[4] = 12;
    CHECK_EQ(moe_permute(f.plan, NULL, &a, &p, NULL), MOE_ERROR_DATA);
    f.args.out_ids[4] = 0;
    // finalize
    a.weights = f.args.out_weights;
    CHECK_EQ(moe_finalize(f.plan, f.weights, &a, rows, MOE_DTYPE_F32, row_of_slot, NULL), MOE_OK);
    CHECK_EQ(moe_finalize(NULL, f.weights, &a, rows, MOE_DTYPE_F32, row_of_slot, NULL), MOE_ERROR_ARGUMENT);
    CHECK_EQ(moe_finalize(f.plan, NULL, &a, rows, MOE_DTYPE_F32, row_of_slot, NULL), MOE_ERROR_ARGUMENT);
    CHECK_EQ(moe_finalize(f.plan, f.weights, NULL, rows, MOE_DTYPE_F32, row_of_slot, NULL), MOE_ERROR_ARGUMENT);
    CHECK_EQ(moe_finalize(f.plan, f.weights, &a, NULL, MOE_DTYPE_F32, row_of_slot, NULL), MOE_ERROR_ARGUMENT);
    CHECK_EQ(moe_finalize(f.plan, f.weights, &a, rows, MOE_DTYPE_E4M3, row_of_slot, NULL), MOE_ERROR_ARGUMENT);
    CHECK_EQ(moe_finalize(f.plan, f.weights, &a, rows, MOE_DTYPE_F32, NULL, NULL), MOE_ERROR_ARGUMENT);
    a.out = NULL;
    CHECK_EQ(moe_finalize(f.plan, f.weights, &a, rows, MOE_DTYPE_F32, row_of_slot, NULL), MOE_ERROR_ARGUMENT);
    fixture_close(&f);
}

// LOGITS gives what moe_route() and then moe_permute() of its ids give; IDS and PACKED report what they read.
TEST(permuting_logits_routes_and_sorts_in_one)
{
    fixture f = { 0 };
    moe_execute_args a;
    moe_permutation p, q;
    int32_t rows[2][36], slots[2][256], offsets[2][13], counts[2][12], ids[36], expert_counts[12];
    float weights[36];
    moe_error err;
    f.layer = small_layer(MOE_FORMAT_F32, MOE_ACTIVATION_SWIGLU);
    REQUIRE_OK(fixture_open(&f, &err));
    memset(&p, 0, sizeof p);
    p.tile = 8;
    q = p;
    p.row_of_slot = rows[0];
    p.slot_of_row = slots[0];
    p.expert_offsets = offsets[0];
    p.expert_counts = counts[0];
    q.row_of_slot = rows[1];
    q.slot_of_row = slots[1];
    q.expert_offsets = offsets[1];
    q.expert_counts = counts[1];
    REQUIRE(moe_permutation_rows(36, 12, 8) <= 256);
    memset(slots, 0x55, sizeof slots);
    CHECK_EQ(moe_route(f.plan, f.weights, &f.args, NULL), MOE_OK);
    memcpy(ids, f.args.out_ids, sizeof ids);
    memcpy(weights, f.args.out_weights, sizeof weights);
    memcpy(expert_counts, f.args.out_expert_counts, sizeof expert_counts);
    a = f.args;
    a.input_mode = MOE_INPUT_IDS;
    a.ids = ids;
    a.weights = NULL;
    a.workspace = NULL;
    memset(f.args.out_ids, 0xff, sizeof ids);
    memset(f.args.out_weights, 0x55, sizeof weights);
    memset(f.args.out_expert_counts, 0xff, sizeof expert_counts);
    CHECK_EQ(moe_permute(f.plan, NULL, &a, &p, NULL), MOE_OK);
    CHECK_EQ(moe__f32_bits(f.args.out_weights[35]), 0x55555555u); // no weights were given
    CHECK(memcmp(ids, f.args.out_ids, sizeof ids) == 0);
    CHECK(memcmp(expert_counts, f.args.out_expert_counts, sizeof expert_counts) == 0);
    a.weights = weights;
    memset(f.args.out_weights, 0xff, sizeof weights);
    CHECK_EQ(moe_permute(f.plan, f.weights, &a, &p, NULL), MOE_OK);
    CHECK(memcmp(weights, f.args.out_weights, sizeof weights) == 0);
    memset(f.args.out_ids, 0xff, sizeof ids);
    memset(f.args.out_weights, 0xff, sizeof weights);
    memset(f.args.out_expert_counts, 0xff, sizeof expert_counts);
    CHECK_EQ(moe_permute(f.plan, f.weights, &f.args, &q, NULL), MOE_OK);
    CHECK(memcmp(rows[0], rows[1], sizeof rows[0]) == 0);
    CHECK(memcmp(slots[0], slots[1], (size_t)moe_permutation_rows(36, 12, 8) * 4) == 0);
    CHECK(memcmp(offsets[0], offsets[1], sizeof offsets[0]) == 0);
    CHECK(memcmp(counts[0], counts[1], sizeof counts[0]) == 0);
    CHECK(memcmp(ids, f.args.out_ids, sizeof ids) == 0);
    CHECK(memcmp(weights, f.args.out_weights, sizeof weights) == 0);
    CHECK(memcmp(expert_counts, f.args.out_expert_counts, sizeof expert_counts) == 0);
    a = f.args;
    a.workspace_bytes = 16;
    CHECK_EQ(moe_permute(f.plan, f.weights, &a, &q, NULL), MOE_ERROR_ARGUMENT);
    fixture_close(&f);
}

TEST(a_layer_without_a_router_refuses_router_logits)
{
    fixture f = plain();
    float logits[12];
    moe_weights *bare;
    moe_error err;
    REQUIRE_OK(fixture_open(&f, &err));
    REQUIRE_OK(moe_weights_create(f.ctx, &f.layer, NULL, &bare, &err));
    moe_weights_destroy(f.weights);
    f.weights = bare;
    for (int id = 0; id < 12; id++) CHECK_OK(set_expert(&f, id, &err));
    CHECK_OK(moe_weights_seal(bare, &err));
    CHECK_EQ(moe_router_logits(f.plan, bare, &f.args, logits, NULL), MOE_ERROR_STATE);
    CHECK_EQ(moe_execute(f.plan, bare, &f.args, NULL), MOE_OK);
    fixture_close(&f);
}

static int32_t broken_rows(void *user, int32_t role, int32_t expert, int32_t row, float *out)
{
    (void)user; (void)expert; (void)row;
    memset(out, 0, (role == MOE_TENSOR_DOWN ? 40 : 72) * sizeof out[0]); // I 40, H 72
    return role == MOE_TENSOR_DOWN ? 17 : role == MOE_TENSOR_CONSTANT ? 1 : 0;
}

TEST(the_reference_checks_its_arguments)
{
    moe_layer_desc layer = small_layer(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
    moe_reference_layer_args good, a;
    static float x[72], out[72];
    int32_t ids[4] = { 1, 2, 3, -1 };
    float weights[4] = { 1, 1, 1, 1 };
    moe_error err;
    memset(&good, 0, sizeof good);
    good.num_tokens = 1;
    good.x = x;
    good.ids = ids;
    good.weights = weights;
    good.out = out;
    good.rows = broken_rows;
#define BAD(change, code, member) \
    do { a = good; change; CHECK_ERR(moe_reference_layer(&layer, &a, &err), (code), (member)); } while (0)
    BAD((void)0, MOE_ERROR_DATA, "args.rows");
    CHECK_CONTAINS(err.text, "returned 17 for row 0 of down of expert 1");
    BAD(a.struct_size = 3, MOE_ERROR_ARGUMENT, "args.struct_size");
    BAD(a.num_tokens = -1, MOE_ERROR_ARGUMENT, "args.num_tokens");
    BAD(a.x = NULL, MOE_ERROR_ARGUMENT, "args.x");
    BAD(a.ids = NULL, MOE_ERROR_ARGUMENT, "args.ids");
    BAD(a.weights = NULL, MOE_ERROR_ARGUMENT, "args.weights");
    BAD(a.out = NULL, MOE_ERROR_ARGUMENT, "args.out");
    BAD(a.rows = NULL, MOE_ERROR_ARGUMENT, "args.rows");
    BAD(a.intermediate_dtype = MOE_DTYPE_E4M3, MOE_ERROR_ARGUMENT, "args.intermediate_dtype");
    BAD(a.rows_dtype = 77, MOE_ERROR_ARGUMENT, "args.rows_dtype");
    ids[2] = 12;
    ids[0] = ids[1] = -1;
    BAD((void)0, MOE_ERROR_DATA, "args.ids");
    CHECK_CONTAINS(err.text, "[0][2] is 12");
#undef BAD
    CHECK_ERR(moe_reference_layer(NULL, &good, &err), MOE_ERROR_ARGUMENT, "layer");
    CHECK_ERR(moe_reference_layer(&layer, NULL, &err), MOE_ERROR_ARGUMENT, "args");
    good.num_tokens = 0;
    CHECK_OK(moe_reference_layer(&layer, &good, &err));
}

TEST_MAIN(
    T(every_argument_of_execute_is_checked_by_name)
    T(bad_logits_are_named_and_counted)
    T(bad_ids_are_named_and_counted)
    T(packed_ids_out_of_range_are_refused)
    T(counts_and_offsets_out_of_range_are_refused)
    T(token_ids_and_bias_rows_out_of_range_are_refused)
    T(weights_of_another_shape_are_refused)
    T(ranks_of_weights_and_plan_must_agree)
    T(unsealed_weights_and_those_of_another_context_are_refused)
    T(one_plan_serves_every_layer_of_its_shape)
    T(every_member_of_a_plan_desc_is_checked)
    T(sizes_whose_products_overflow_are_refused)
    T(query_reports_what_create_needs)
    T(the_plan_keeps_its_own_expert_map)
    T(plan_create_fails_cleanly_when_memory_is_out)
    T(the_stages_check_their_arguments)
    T(permuting_logits_routes_and_sorts_in_one)
    T(a_layer_without_a_router_refuses_router_logits)
    T(the_reference_checks_its_arguments)
)
