// Routing: moe_reference_route against vectors from numpy in float64 (tests/data/routing), against a plain second
// implementation, and member by member. What is promised about bits is compared as bits.
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"

enum { MAX_T = 64, MAX_W = MOE_MAX_EXPERTS };

static float route_logits[MAX_T * MAX_W];
static int32_t ids[MAX_T * MOE_MAX_SLOTS];
static float weights[MAX_T * MOE_MAX_SLOTS];

static float inf(void) { return moe__bits_f32(0x7f800000u); }
static float nan_(void) { return moe__bits_f32(0x7fc00000u); }

static moe_routing_desc preset(int32_t method, int32_t top_k)
{
    moe_routing_desc r;
    moe_routing_preset(method, &r, NULL);
    r.top_k = top_k;
    return r;
}

static moe_reference_route_args args_of(int32_t tokens, int32_t experts, const float *logits)
{
    moe_reference_route_args a;
    memset(&a, 0, sizeof a);
    a.num_tokens = tokens;
    a.num_experts = experts;
    a.logits = logits;
    a.out_ids = ids;
    a.out_weights = weights;
    memset(ids, 0x55, sizeof ids);
    memset(weights, 0x55, sizeof weights);
    return a;
}

static int32_t route(const moe_routing_desc *r, int32_t tokens, int32_t experts, const float *logits, const float *bias)
{
    moe_reference_route_args a = args_of(tokens, experts, logits);
    a.bias = bias;
    return moe_reference_route(r, &a, &err);
}

static void random_logits(uint64_t seed, int32_t count, float range)
{
    for (int32_t i = 0; i < count; i++) route_logits[i] = range * test_random_float(&seed);
}

// Methods that need no table but a bias.
static const int32_t plain_methods[] = {
    MOE_ROUTING_DEFAULT, MOE_ROUTING_RENORMALIZE, MOE_ROUTING_DEEPSEEK_V3, MOE_ROUTING_RENORMALIZE_NAIVE,
    MOE_ROUTING_TOPK, MOE_ROUTING_SIGMOID_RENORM, MOE_ROUTING_MINIMAX2, MOE_ROUTING_SIGMOID, MOE_ROUTING_TOPK_SIGMOID,
    MOE_ROUTING_DEEPSEEK_V4, MOE_ROUTING_DEEPSEEK_V2, MOE_ROUTING_ERNIE45, MOE_ROUTING_LONGCAT, MOE_ROUTING_PHIMOE,
    MOE_ROUTING_MISTRAL4, MOE_ROUTING_KOLIBRI,
};
enum { PLAIN = sizeof plain_methods / sizeof plain_methods[0] };

// ---- tables in files ------------------------------------------------------------------------------------------------

typedef struct tsv {
    char *text;
    char *cells[4096];
    int32_t columns, rows;
} tsv;

static int tsv_read(tsv *t, const char *path)
{
    FILE *file = fopen(path, "rb");
    long size;
    int32_t cells = 0;
    memset(t, 0, sizeof *t);
    if (file == NULL) return 0;
    fseek(file, 0, SEEK_END);
    size = ftell(file);
    rewind(file);
    t->text = (char *)calloc((size_t)size + 1, 1);
    if (fread(t->text, 1, (size_t)size, file) != (size_t)size) size = 0;
    fclose(file);
    for (char *p = t->text; *p != 0;) {
        char *end = p + strcspn(p, "\t\n");
        if (cells == 4096) return 0;
        t->cells[cells++] = p;
        if (*end == '\n' && t->columns == 0) t->columns = cells;
        p = *end != 0 ? end + 1 : end;
        *end = 0;
    }
    t->rows = t->columns > 0 ? cells / t->columns - 1 : 0;
    return t->rows > 0;
}

static const char *tsv_cell(const tsv *t, int32_t row, const char *column)
{
    for (int32_t c = 0; c < t->columns; c++)
        if (strcmp(t->cells[c], column) == 0) return t->cells[(row + 1) * t->columns + c];
    printf("no column %s\n", column);
    exit(2);
}

static int32_t tsv_int(const tsv *t, int32_t row, const char *column)
{
    return (int32_t)atol(tsv_cell(t, row, column));
}

static float tsv_float(const tsv *t, int32_t row, const char *column) { return (float)atof(tsv_cell(t, row, column)); }

// Index of a cell in "a b c".
static int32_t tsv_word(const tsv *t, int32_t row, const char *column, const char *words)
{
    const char *cell = tsv_cell(t, row, column);
    int32_t index = 0;
    for (const char *p = words; *p != 0; index++) {
        size_t length = strcspn(p, " ");
        if (length == strlen(cell) && strncmp(p, cell, length) == 0) return index;
        p += length + (p[length] != 0);
    }
    printf("column %s: unknown word %s\n", column, cell);
    exit(2);
}

static moe_routing_desc routing_of_row(const tsv *t, int32_t row)
{
    moe_routing_desc r;
    int32_t rule = tsv_word(t, row, "group_rule", "none max top2 each");
    memset(&r, 0, sizeof r);
    r.top_k = tsv_int(t, row, "top_k");
    r.score = 1 + tsv_word(t, row, "score", "raw softmax sigmoid sqrt_softplus");
    r.score_order = 1 + tsv_word(t, row, "score_when", "before after");
    r.select = 1 + tsv_word(t, row, "select", "score logit");
    r.bias_rows = tsv_int(t, row, "bias_rows");
    if (rule != 0) { r.groups = tsv_int(t, row, "groups"); r.groups_kept = tsv_int(t, row, "groups_kept"); }
    r.group_rule = rule;
    r.group_excluded = strcmp(tsv_cell(t, row, "group_excluded"), "zero") == 0 ? MOE_EXCLUDED_ZERO : 0;
    r.renormalize = tsv_word(t, row, "renorm", "off sum clamp");
    r.renormalize_epsilon = tsv_float(t, row, "epsilon");
    r.scale = tsv_float(t, row, "scale");
    r.scale_on = tsv_word(t, row, "scale_on", "weights output");
    r.weight_on = tsv_word(t, row, "weight_on", "output input");
    r.per_expert_scale = tsv_int(t, row, "per_expert_scale");
    r.special_experts = tsv_int(t, row, "zero_experts");
    r.special_kind = tsv_word(t, row, "zero_kind", "none zero identity skip constant");
    r.logit_multiplier = tsv_float(t, row, "logit_multiplier");
    r.logit_softcap = tsv_float(t, row, "softcap");
    r.extra_scored = tsv_int(t, row, "renorm_shared");
    r.extra_slots = r.extra_scored ? tsv_int(t, row, "shared_experts") : 0;
    r.sparse_mixer = tsv_int(t, row, "sparse_mixer") ? tsv_float(t, row, "jitter") : 0;
    return r;
}

// ---- the oracle -----------------------------------------------------------------------------------------------------

static const void *oracle_tensor(const moe_checkpoint *ckpt, const char *name, const char *part, int32_t *rows)
{
    moe_checkpoint_tensor tensor;
    char full[96];
    static double copies[8][70000];
    static int next;
    snprintf(full, sizeof full, "%s.%s", name, part);
    *rows = 0;
    if (moe_checkpoint_find(ckpt, full, &tensor, &err) != MOE_OK) return NULL;
    *rows = (int32_t)tensor.dims[0];
    next = (next + 1) % 8;
    if (tensor.data_bytes > sizeof copies[0]) { printf("%s is too large\n", full); exit(2); }
    memcpy(copies[next], tensor.data, (size_t)tensor.data_bytes); // aligned
    return copies[next];
}

static void compare_case(const moe_checkpoint *ckpt, const char *name, const moe_routing_desc *r, int32_t experts,
                         int32_t tokens)
{
    int32_t k = r->top_k, x = r->extra_slots, slots = k + x, rows, wrong_ids = 0, token_ids[MAX_T];
    moe_reference_route_args a;
    const int32_t *expected, *given;
    const double *w, *shared;
    double worst = 0;
    moe_routing_desc routing = *r;
    a = args_of(tokens, experts, (const float *)oracle_tensor(ckpt, name, "logits", &rows));
    REQUIRE(a.logits != NULL && rows == tokens);
    a.bias = (const float *)oracle_tensor(ckpt, name, "bias", &rows);
    a.bias_index = (const int32_t *)oracle_tensor(ckpt, name, "bias_index", &rows);
    a.per_expert_scale = (const float *)oracle_tensor(ckpt, name, "per_expert_scale", &rows);
    given = (const int32_t *)oracle_tensor(ckpt, name, "token_ids", &rows);
    a.forced_ids = (const int32_t *)oracle_tensor(ckpt, name, "forced", &routing.forced_rows);
    if (given != NULL) { // -1: a token that leaves the table, for which this library has marked tokens
        routing.marked_token_lo = routing.forced_rows;
        routing.marked_token_hi = routing.forced_rows + 1;
        for (int32_t t = 0; t < tokens; t++) token_ids[t] = given[t] < 0 ? routing.forced_rows : given[t];
        a.token_ids = token_ids;
    }
    REQUIRE_OK(moe_reference_route(&routing, &a, &err));
    expected = (const int32_t *)oracle_tensor(ckpt, name, "ids", &rows);
    w = (const double *)oracle_tensor(ckpt, name, "weights", &rows);
    shared = (const double *)oracle_tensor(ckpt, name, "shared_weights", &rows);
    REQUIRE(expected != NULL && w != NULL && (x == 0 || shared != NULL));
    for (int32_t t = 0; t < tokens; t++)
        for (int32_t j = 0; j < slots; j++) {
            int32_t want = j < k ? expected[t * k + j] : experts + r->special_experts + j - k;
            double value = j < k ? w[t * k + j] : shared[t * x + j - k], error;
            if (r->special_kind == MOE_SPECIAL_SKIP && want >= experts) want = -1;
            wrong_ids += ids[t * slots + j] != want;
            error = (double)weights[t * slots + j] - value;
            error = (error < 0 ? -error : error) / ((value < 0 ? -value : value) + 1e-37);
            if (!(error <= worst)) worst = error;
        }
    if (wrong_ids != 0 || !(worst <= 1e-6)) {
        char text[128];
        snprintf(text, sizeof text, "%s: %d wrong ids, weights off by %.3g", name, wrong_ids, worst);
        test_fail(__FILE__, __LINE__, text);
    }
}

TEST(ids_and_weights_are_those_of_float64_in_every_oracle_case)
{
    static tsv t;
    moe_checkpoint *ckpt;
    REQUIRE(tsv_read(&t, test_data("data/routing/oracle.tsv")));
    REQUIRE_OK(moe_checkpoint_open(test_data("data/routing/oracle.safetensors"), NULL, &ckpt, &err));
    CHECK(t.rows >= 50);
    for (int32_t row = 0; row < t.rows; row++) {
        moe_routing_desc r = routing_of_row(&t, row);
        compare_case(ckpt, tsv_cell(&t, row, "case"), &r, tsv_int(&t, row, "num_experts"), tsv_int(&t, row, "tokens"));
    }
    moe_checkpoint_close(ckpt);
    free(t.text);
}

static int32_t method_named(const char *name)
{
    for (int32_t m = 0; m < 200; m++)
        if (strcmp(moe_routing_method_string(m), name) == 0) return m;
    return MOE_ROUTING_UNSPECIFIED;
}

TEST(presets_are_the_members_of_the_oracle_cases_that_name_them)
{
    static tsv t;
    REQUIRE(tsv_read(&t, test_data("data/routing/oracle.tsv")));
    for (int32_t row = 0; row < t.rows; row++) {
        const char *name = tsv_cell(&t, row, "preset");
        moe_routing_desc r = routing_of_row(&t, row), p;
        int32_t experts = tsv_int(&t, row, "num_experts");
        if (strcmp(name, "-") == 0) continue;
        REQUIRE_OK(moe_routing_preset(method_named(name), &p, &err));
        p.top_k = r.top_k;
        p.scale = r.scale;
        p.groups = r.groups;
        p.groups_kept = r.groups_kept;
        p.special_experts = r.special_experts;
        if (tsv_int(&t, row, "forced_ids") || p.bias_rows == 2) p.bias_rows = r.bias_rows;
        if (p.score_order == MOE_SCORE_AFTER_TOPK && r.renormalize) p.renormalize = r.renormalize; // Kolibri: by config
        r.zero_sum = p.zero_sum;         // the table has no column for these two
        r.global_scale = p.global_scale;
        if (p.groups == 0) { r.group_rule = p.group_rule; r.group_excluded = p.group_excluded; }
        CHECK_OK(moe__routing_resolve(&r, experts, &err));
        CHECK_OK(moe__routing_resolve(&p, experts, &err));
        if (memcmp(&r, &p, sizeof r) != 0) test_fail2(__FILE__, __LINE__, "differs", tsv_cell(&t, row, "case"));
    }
    free(t.text);
}

// ---- a second implementation: k times the best of what is left ------------------------------------------------------

static void naive_ids(const moe_routing_desc *r, int32_t experts, const float *key, int32_t *out)
{
    static float left[MAX_W];
    static char gone[MAX_W];
    int32_t size = r->groups > 1 ? experts / r->groups : experts;
    memcpy(left, key, (size_t)experts * sizeof left[0]);
    memset(gone, 0, sizeof gone);
    if (r->groups > 1) {
        char keep[MAX_W] = { 0 };
        for (int32_t n = 0; n < r->groups_kept; n++) {
            int32_t best = -1;
            float value = 0;
            for (int32_t g = 0; g < r->groups; g++) {
                float first = -inf(), second = -inf(), rank;
                for (int32_t e = g * size; e < (g + 1) * size; e++) {
                    float x = key[e];
                    if (x > first) { float y = first; first = x; x = y; }
                    if (x > second) second = x;
                }
                rank = r->group_rule == MOE_GROUP_MAX ? first : first + second;
                if (!keep[g] && (best < 0 || rank > value)) { best = g; value = rank; }
            }
            keep[best] = 1;
        }
        for (int32_t e = 0; e < experts; e++)
            if (!keep[e / size]) left[e] = r->group_excluded == MOE_EXCLUDED_ZERO ? 0 : -inf();
    }
    for (int32_t j = 0; j < r->top_k; j++) {
        int32_t best = -1;
        for (int32_t e = 0; e < experts; e++)
            if (!gone[e] && (best < 0 || left[e] > left[best])) best = e;
        gone[best] = 1;
        out[j] = best;
    }
}

static float score_of(int32_t score, float x)
{
    if (score == MOE_SCORE_SIGMOID) return moe__sigmoidf(x);
    return score == MOE_SCORE_SQRT_SOFTPLUS ? moe__sqrt_softplusf(x) : x;
}

// Few distinct logits, so that ties are everywhere; both signs, both zeros, -inf.
static void check_against_naive(int32_t experts, int32_t k, int32_t score, int32_t bias, int32_t groups, int32_t rule,
                                int32_t excluded, uint64_t seed)
{
    static float key[MAX_W], b[MAX_W];
    moe_routing_desc r;
    int32_t want[MOE_MAX_TOP_K];
    memset(&r, 0, sizeof r);
    r.score = score;
    r.score_order = MOE_SCORE_BEFORE_TOPK;
    r.top_k = k;
    r.bias_rows = bias;
    r.groups = groups;
    r.groups_kept = groups > 1 ? (groups + 1) / 2 : 0;
    r.group_rule = rule;
    r.group_excluded = excluded;
    for (int32_t e = 0; e < experts; e++) {
        uint32_t draw = test_random_u32(&seed) % 16;
        route_logits[e] = draw == 0 ? -inf() : draw == 1 ? -0.0f : ((float)draw - 8) * 0.5f;
        b[e] = ((float)(test_random_u32(&seed) % 4) - 2) * 0.25f;
        key[e] = score_of(score, route_logits[e]) + (bias ? b[e] : 0.0f);
    }
    REQUIRE_OK(route(&r, 1, experts, route_logits, b));
    naive_ids(&r, experts, key, want);
    for (int32_t j = 0; j < k; j++) {
        float w = score_of(score, route_logits[want[j]]);
        CHECK_EQ(ids[j], want[j]);
        CHECK_EQ(weights[j], w == -inf() ? 0 : w);
    }
}

TEST(top_k_is_k_times_the_best_of_the_rest_at_every_size)
{
    static const int32_t sizes[][2] = { { 1, 1 }, { 2, 1 }, { 2, 2 }, { 7, 3 }, { 32, 32 }, { 33, 32 }, { 60, 4 },
                                        { 64, 32 }, { 256, 8 }, { 512, 22 }, { 2047, 31 }, { 2048, 32 }, { 2048, 1 } };
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        for (int32_t n = 0; n < 12; n++) {
            const int32_t scores[] = { MOE_SCORE_RAW, MOE_SCORE_SIGMOID, MOE_SCORE_SQRT_SOFTPLUS };
            check_against_naive(sizes[i][0], sizes[i][1], scores[n % 3], n / 3 % 2, 0, 0, 0, 100 * i + (uint64_t)n);
        }
}

TEST(groups_are_ranked_and_masked_as_the_rules_say)
{
    static const int32_t sizes[][3] = { { 8, 4, 2 }, { 256, 8, 8 }, { 128, 8, 8 }, { 160, 6, 8 }, { 2048, 32, 64 },
                                        { 12, 3, 3 }, { 2048, 32, 1024 }, { 6, 2, 2 } };
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        for (int32_t n = 0; n < 16; n++) {
            int32_t score = n % 2 ? MOE_SCORE_SIGMOID : MOE_SCORE_RAW;
            int32_t rule = n / 2 % 2 ? MOE_GROUP_MAX : MOE_GROUP_TOP2_SUM;
            check_against_naive(sizes[i][0], sizes[i][1], score, n / 4 % 2, sizes[i][2], rule,
                                n / 8 ? MOE_EXCLUDED_ZERO : MOE_EXCLUDED_NEG_INF, 1000 + 100 * i + (uint64_t)n);
        }
}

TEST(one_group_each_takes_its_share_in_group_order)
{
    float logits[12] = { 1, 2, 3, 4, 9, 8, 7, 6, 0, 5, 5, 0 };
    static const int32_t want[6] = { 3, 2, 4, 5, 9, 10 };
    moe_routing_desc r = preset(MOE_ROUTING_RENORMALIZE_NAIVE, 6);
    float sum = 0;
    r.groups = 3;
    r.group_rule = MOE_GROUP_EACH;
    REQUIRE_OK(route(&r, 1, 12, logits, NULL));
    for (int32_t j = 0; j < 6; j++) { CHECK_EQ(ids[j], want[j]); sum += weights[j]; }
    CHECK_NEAR(sum, 1, 1e-6);
}

// ---- special numbers ------------------------------------------------------------------------------------------------

TEST(ties_go_to_the_lower_id)
{
    for (int32_t m = 0; m < PLAIN; m++) {
        float logits[40], bias[40];
        moe_routing_desc r = preset(plain_methods[m], 4);
        for (int32_t e = 0; e < 40; e++) { logits[e] = 1.5f; bias[e] = -0.25f; }
        REQUIRE_OK(route(&r, 1, 40, logits, bias));
        for (int32_t j = 0; j < 4; j++) CHECK_EQ(ids[j], j);
    }
}

TEST(tied_groups_go_to_the_lower_group)
{
    float logits[8] = { 0, 1, 0, 1, 0, 1, 0, 1 }, bias[8] = { 0 };
    moe_routing_desc r = preset(MOE_ROUTING_DEEPSEEK_V3, 2);
    r.groups = 4;
    r.groups_kept = 2;
    REQUIRE_OK(route(&r, 1, 8, logits, bias));
    CHECK_EQ(ids[0], 1);
    CHECK_EQ(ids[1], 3);
}

TEST(minus_zero_equals_zero)
{
    float logits[6] = { -0.0f, 0.0f, -0.0f, 0.0f, -1, -2 };
    const int32_t methods[] = { MOE_ROUTING_TOPK, MOE_ROUTING_RENORMALIZE, MOE_ROUTING_TOPK_SIGMOID };
    for (int32_t m = 0; m < 3; m++) {
        moe_routing_desc r = preset(methods[m], 4);
        REQUIRE_OK(route(&r, 1, 6, logits, NULL));
        for (int32_t j = 0; j < 4; j++) CHECK_EQ(ids[j], j);
    }
}

TEST(minus_infinity_is_chosen_last_and_weighs_nothing)
{
    for (int32_t m = 0; m < PLAIN; m++) {
        float logits[8] = { -inf(), 2, -inf(), -inf(), 1, -inf(), -inf(), -inf() }, bias[8] = { 0 };
        moe_routing_desc r = preset(plain_methods[m], 4);
        REQUIRE_OK(route(&r, 1, 8, logits, bias));
        CHECK_EQ(ids[0], 1);
        CHECK_EQ(ids[1], 4);
        CHECK_EQ(ids[2], 0);
        CHECK_EQ(ids[3], plain_methods[m] == MOE_ROUTING_PHIMOE ? 0 : 2); // its rounds find nothing else, and weigh 0
        CHECK(weights[0] > 0 && weights[1] > 0);
        CHECK_EQ(weights[2], 0.0f);
        CHECK_EQ(weights[3], 0.0f);
    }
}

TEST(a_token_without_any_finite_logit_has_weights_of_zero)
{
    for (int32_t m = 0; m < PLAIN; m++) {
        float logits[8], bias[8] = { 0 };
        moe_routing_desc r = preset(plain_methods[m], 2);
        for (int32_t e = 0; e < 8; e++) logits[e] = -inf();
        REQUIRE_OK(route(&r, 1, 8, logits, bias));
        CHECK_EQ(ids[0], 0);
        CHECK_EQ(weights[0], 0.0f);
        CHECK_EQ(weights[1], 0.0f);
    }
}

TEST(nan_and_plus_infinity_are_refused_by_token_and_expert)
{
    for (int32_t m = 0; m < PLAIN; m++)
        for (int32_t e = 0; e < 8; e += 7) {
            float logits[24] = { 0 }, bias[8] = { 0 };
            moe_routing_desc r = preset(plain_methods[m], 2);
            char where[64];
            snprintf(where, sizeof where, "token 2, expert %d is NaN", e);
            logits[16 + e] = nan_();
            CHECK_ERR(route(&r, 3, 8, logits, bias), MOE_ERROR_DATA, "args.logits");
            CHECK_CONTAINS(err.text, where);
            CHECK_EQ(ids[2 * 2], -1);
            CHECK_EQ(weights[2 * 2 + 1], 0.0f);
            logits[16 + e] = moe__bits_f32(0xffc00001u); // the sign of a NaN says nothing
            CHECK_ERR(route(&r, 3, 8, logits, bias), MOE_ERROR_DATA, "args.logits");
            logits[16 + e] = inf();
            CHECK_ERR(route(&r, 3, 8, logits, bias), MOE_ERROR_DATA, "args.logits");
            CHECK_CONTAINS(err.text, "+inf");
        }
}

TEST(a_bias_that_is_no_number_is_refused)
{
    float logits[8] = { 0 }, bias[8] = { 0 };
    moe_routing_desc r = preset(MOE_ROUTING_MINIMAX2, 2);
    bias[5] = nan_();
    CHECK_ERR(route(&r, 1, 8, logits, bias), MOE_ERROR_DATA, "args.bias");
    bias[5] = -inf();
    CHECK_OK(route(&r, 1, 8, logits, bias));
}

TEST(a_multiplier_that_overflows_is_refused)
{
    float logits[4] = { 1, 3e38f, 0, 0 };
    moe_routing_desc r = preset(MOE_ROUTING_SIGMOID, 2);
    r.logit_multiplier = 2;
    CHECK_ERR(route(&r, 1, 4, logits, NULL), MOE_ERROR_DATA, "args.logits");
    CHECK_CONTAINS(err.text, "expert 1");
}

TEST(all_negative_logits_choose_the_least_negative)
{
    for (int32_t m = 0; m < PLAIN; m++) {
        float logits[8] = { -9, -3, -8, -2, -7, -1, -6, -5 }, bias[8];
        moe_routing_desc r = preset(plain_methods[m], 2);
        for (int32_t e = 0; e < 8; e++) bias[e] = -2; // keys below zero
        REQUIRE_OK(route(&r, 1, 8, logits, bias));
        CHECK_EQ(ids[0], 5);
        CHECK_EQ(ids[1], 3);
    }
}

TEST(a_bias_chooses_and_does_not_weigh)
{
    float logits[4] = { 0, 0, 0, 0 }, bias[4] = { 0, -1, 5, 1 };
    moe_routing_desc r = preset(MOE_ROUTING_DEEPSEEK_V3, 2);
    r.scale = 2.5f;
    REQUIRE_OK(route(&r, 1, 4, logits, bias));
    CHECK_EQ(ids[0], 2);
    CHECK_EQ(ids[1], 3);
    CHECK_EQ(weights[0], 1.25f);
    CHECK_EQ(weights[1], 1.25f);
}

TEST(ids_and_weights_of_k_equal_to_e_are_all_experts)
{
    for (int32_t m = 0; m < PLAIN; m++) {
        float logits[5] = { 3, 1, 4, 1, 5 }, bias[5] = { 0 };
        static const int32_t want[5] = { 4, 2, 0, 1, 3 };
        moe_routing_desc r = preset(plain_methods[m], 5);
        REQUIRE_OK(route(&r, 1, 5, logits, bias));
        for (int32_t j = 0; j < 5; j++) CHECK_EQ(ids[j], want[j]);
    }
}

TEST(one_expert_gets_everything)
{
    float logit = -3, bias = 1;
    const int32_t methods[] = { MOE_ROUTING_DEFAULT, MOE_ROUTING_RENORMALIZE, MOE_ROUTING_RENORMALIZE_NAIVE,
                                MOE_ROUTING_MINIMAX2, MOE_ROUTING_SIGMOID_RENORM, MOE_ROUTING_PHIMOE };
    for (int32_t m = 0; m < 6; m++) {
        moe_routing_desc r = preset(methods[m], 1);
        REQUIRE_OK(route(&r, 1, 1, &logit, &bias));
        CHECK_EQ(ids[0], 0);
        CHECK_EQ(weights[0], 1.0f);
    }
}

// ---- weights --------------------------------------------------------------------------------------------------------

TEST(softmax_then_division_equals_softmax_of_the_chosen)
{
    moe_routing_desc before = preset(MOE_ROUTING_RENORMALIZE_NAIVE, 8), after = preset(MOE_ROUTING_RENORMALIZE, 8);
    static float first[MAX_T * 8];
    random_logits(3, MAX_T * 128, 6);
    REQUIRE_OK(route(&before, MAX_T, 128, route_logits, NULL));
    memcpy(first, weights, sizeof first);
    REQUIRE_OK(route(&after, MAX_T, 128, route_logits, NULL));
    for (int32_t i = 0; i < MAX_T * 8; i++) // four roundings more, each half a unit
        CHECK_NEAR(first[i], weights[i], 4 * 1.2e-7 * (double)weights[i]);
}

TEST(a_sum_has_32_lanes_and_a_butterfly)
{
    float x[100], lane[32];
    uint64_t seed = 5;
    for (int32_t i = 0; i < 100; i++) x[i] = test_random_float(&seed) * (i % 7 == 0 ? 1e6f : 1);
    for (int32_t n = 1; n <= 100; n++) {
        for (int32_t l = 0; l < 32; l++) {
            lane[l] = 0;
            for (int32_t i = l; i < n; i += 32) lane[l] += x[i];
        }
        for (int32_t mask = 16; mask >= 1; mask /= 2) {
            float next[32];
            for (int32_t l = 0; l < 32; l++) next[l] = lane[l] + lane[l ^ mask];
            memcpy(lane, next, sizeof lane);
        }
        for (int32_t l = 0; l < 32; l++) CHECK_EQ(lane[l], lane[0]);
        CHECK_EQ(moe__lane_sum(x, n), lane[0]);
    }
}

TEST(renormalisation_follows_its_rule_when_the_sum_is_not_positive)
{
    float negative[3] = { -1, -3, -9 }, zero[3] = { 1, -1, -9 };
    moe_routing_desc r = preset(MOE_ROUTING_TOPK, 2);
    r.renormalize = MOE_RENORMALIZE_SUM;
    REQUIRE_OK(route(&r, 1, 3, negative, NULL));
    CHECK_EQ(weights[0], 0.25f);
    CHECK_EQ(weights[1], 0.75f);
    r.zero_sum = MOE_ZERO_SUM_ONE;
    REQUIRE_OK(route(&r, 1, 3, negative, NULL));
    CHECK_EQ(weights[0], -1.0f);
    CHECK_EQ(weights[1], -3.0f);
    REQUIRE_OK(route(&r, 1, 3, zero, NULL));
    CHECK_EQ(weights[0], 1.0f);
    CHECK_EQ(weights[1], -1.0f);
    r.zero_sum = MOE_ZERO_SUM_DIVIDE;
    r.renormalize_epsilon = 0.5f;
    REQUIRE_OK(route(&r, 1, 3, zero, NULL));
    CHECK_EQ(weights[0], 2.0f);
    r.renormalize = MOE_RENORMALIZE_CLAMP_MIN;
    REQUIRE_OK(route(&r, 1, 3, zero, NULL));
    CHECK_EQ(weights[0], 2.0f);
    REQUIRE_OK(route(&r, 1, 3, negative, NULL));
    CHECK_EQ(weights[0], -2.0f);
}

TEST(the_scale_is_applied_once_and_where_it_belongs)
{
    float logits[4] = { 0, 1, 2, 3 }, plain[2], per_expert[4] = { 1, 1, 3, 0.5f };
    moe_routing_desc r = preset(MOE_ROUTING_INKLING, 2);
    moe_reference_route_args a;
    r.extra_slots = 0;
    r.bias_rows = 0;
    REQUIRE_OK(route(&r, 1, 4, logits, NULL));
    plain[0] = weights[0];
    plain[1] = weights[1];
    r.scale = 3;
    REQUIRE_OK(route(&r, 1, 4, logits, NULL));
    CHECK_EQ(weights[0], plain[0] * 3);
    a = args_of(1, 4, logits);
    a.global_scale = 0.5f;
    a.per_expert_scale = per_expert;
    r.per_expert_scale = 1;
    REQUIRE_OK(moe_reference_route(&r, &a, &err));
    CHECK_EQ(weights[0], plain[0] * 1.5f * 0.5f); // expert 3
    CHECK_EQ(weights[1], plain[1] * 1.5f * 3);
    r.scale_on = MOE_SCALE_ON_OUTPUT;
    REQUIRE_OK(moe_reference_route(&r, &a, &err));
    CHECK_EQ(weights[0], plain[0] * 0.5f);
}

TEST(soft_cap_and_multiplier_act_before_the_score)
{
    float logits[3] = { 10, -4, 2 };
    moe_routing_desc r = preset(MOE_ROUTING_TOPK, 3);
    r.logit_multiplier = 0.5f;
    REQUIRE_OK(route(&r, 1, 3, logits, NULL));
    CHECK_EQ(weights[0], 5.0f);
    CHECK_EQ(weights[1], 1.0f);
    CHECK_EQ(weights[2], -2.0f);
    r.logit_softcap = 2;
    REQUIRE_OK(route(&r, 1, 3, logits, NULL));
    CHECK_NEAR(weights[0], 2 * 0.98661429815143028, 1e-6); // 2 tanh(5 / 2)
    CHECK_NEAR(weights[1], 2 * 0.46211715726000976, 1e-6);
    CHECK_NEAR(weights[2], 2 * -0.76159415595576486, 1e-6);
}

TEST(the_sparse_mixer_weighs_each_round_for_itself)
{
    // Round one: 1.00 and 0.99 are within 2 eps of each other, 0.5 is not. Round two: 0.99 alone.
    float logits[3] = { 0.99f, 1, 0.5f };
    moe_routing_desc r = preset(MOE_ROUTING_PHIMOE, 2);
    REQUIRE_OK(route(&r, 1, 3, logits, NULL));
    CHECK_EQ(ids[0], 1);
    CHECK_EQ(ids[1], 0);
    CHECK_NEAR(weights[0], 0.50249997916687, 1e-6); // 1 / (1 + e^-0.01)
    CHECK_EQ(weights[1], 1.0f);
    CHECK_EQ(r.sparse_mixer, 0.01f);
}

// ---- tables, marked tokens, special and always-on experts -----------------------------------------------------------

TEST(forced_ids_come_from_the_table_and_weights_from_the_scores)
{
    float logits[8] = { 0, 0, 5, 5, 0, 0, 5, 5 };
    const int32_t table[6] = { 0, 1, 1, 0, 3, 0 }, token32[2] = { 2, 1 };
    const int64_t token64[2] = { 2, 1 };
    moe_routing_desc r = preset(MOE_ROUTING_SIGMOID, 2);
    moe_reference_route_args a;
    r.forced_rows = 3;
    for (int32_t wide = 0; wide < 2; wide++) {
        a = args_of(2, 4, logits);
        a.forced_ids = table;
        a.ids_dtype = wide ? MOE_DTYPE_I64 : 0;
        a.token_ids = wide ? (const void *)token64 : (const void *)token32;
        REQUIRE_OK(moe_reference_route(&r, &a, &err));
        CHECK_EQ(ids[0], 3);
        CHECK_EQ(ids[1], 0);
        CHECK_EQ(ids[2], 1);
        CHECK_EQ(ids[3], 0);
        CHECK_EQ(weights[0], moe__sigmoidf(5));
        CHECK_EQ(weights[1], 0.5f);
    }
}

TEST(token_ids_outside_the_forced_table_are_refused_and_marked_ones_leave_it)
{
    float logits[4] = { 0, 1, 2, 3 };
    const int32_t table[2] = { 0, 1 };
    int32_t token[1] = { 2 };
    moe_routing_desc r = preset(MOE_ROUTING_SIGMOID, 1);
    moe_reference_route_args a = args_of(1, 4, logits);
    r.forced_rows = 2;
    a.forced_ids = table;
    a.token_ids = token;
    CHECK_ERR(moe_reference_route(&r, &a, &err), MOE_ERROR_DATA, "args.token_ids");
    token[0] = -1;
    CHECK_ERR(moe_reference_route(&r, &a, &err), MOE_ERROR_DATA, "args.token_ids");
    r.marked_token_lo = 1;
    r.marked_token_hi = 3;
    token[0] = 2;
    CHECK_OK(moe_reference_route(&r, &a, &err));
    CHECK_EQ(ids[0], 3);
    token[0] = 1;
    CHECK_OK(moe_reference_route(&r, &a, &err));
    CHECK_EQ(ids[0], 3);
    token[0] = 0;
    CHECK_OK(moe_reference_route(&r, &a, &err));
    CHECK_EQ(ids[0], 0);
}

TEST(forced_ids_out_of_range_are_refused)
{
    float logits[4] = { 0 };
    int32_t table[4] = { 0, 1, 2, 4 }, token[1] = { 0 };
    moe_routing_desc r = preset(MOE_ROUTING_SIGMOID, 2);
    moe_reference_route_args a = args_of(1, 4, logits);
    r.forced_rows = 2;
    a.forced_ids = table;
    a.token_ids = token;
    CHECK_ERR(moe_reference_route(&r, &a, &err), MOE_ERROR_DATA, "args.forced_ids");
    table[3] = -1;
    CHECK_ERR(moe_reference_route(&r, &a, &err), MOE_ERROR_DATA, "args.forced_ids");
}

TEST(a_second_bias_row_is_for_marked_tokens_or_for_those_that_name_it)
{
    float logits[12] = { 0 }, bias[8] = { 9, 0, 0, 0, 0, 0, 0, 9 };
    const int32_t token[3] = { 5, 6, 7 }, index[3] = { 1, 0, 1 };
    int32_t wrong[3] = { 0, 2, 0 };
    moe_routing_desc r = preset(MOE_ROUTING_DEEPSEEK_V41, 1);
    moe_reference_route_args a = args_of(3, 4, logits);
    r.marked_token_lo = 6;
    r.marked_token_hi = 7;
    a.bias = bias;
    a.token_ids = token;
    REQUIRE_OK(moe_reference_route(&r, &a, &err));
    CHECK_EQ(ids[0], 0);
    CHECK_EQ(ids[1], 3);
    CHECK_EQ(ids[2], 0);
    a.bias_index = index;
    REQUIRE_OK(moe_reference_route(&r, &a, &err));
    CHECK_EQ(ids[0], 3);
    CHECK_EQ(ids[1], 0);
    CHECK_EQ(ids[2], 3);
    a.bias_index = wrong;
    CHECK_ERR(moe_reference_route(&r, &a, &err), MOE_ERROR_DATA, "args.bias_index");
    wrong[1] = -1;
    CHECK_ERR(moe_reference_route(&r, &a, &err), MOE_ERROR_DATA, "args.bias_index");
}

TEST(special_experts_are_reported_by_id_and_skipped_ones_as_nothing)
{
    float logits[6] = { 0, 1, 2, 5, 4, 3 }, bias[6] = { 0 }, scale[6] = { 1, 1, 1, 1, 2, 1 };
    for (int32_t kind = MOE_SPECIAL_ZERO; kind <= MOE_SPECIAL_CONSTANT; kind++) {
        moe_routing_desc r = preset(MOE_ROUTING_LONGCAT, 4);
        moe_reference_route_args a = args_of(1, 4, logits);
        r.special_experts = 2;
        r.special_kind = kind;
        r.renormalize = MOE_RENORMALIZE_SUM;
        r.per_expert_scale = 1;
        a.bias = bias;
        a.per_expert_scale = scale;
        REQUIRE_OK(moe_reference_route(&r, &a, &err));
        CHECK_EQ(ids[0], 3);
        CHECK_EQ(ids[1], kind == MOE_SPECIAL_SKIP ? -1 : 4);
        CHECK_EQ(ids[2], kind == MOE_SPECIAL_SKIP ? -1 : 5);
        CHECK_EQ(ids[3], 2);
        // e^0 + e^-1 + e^-2 + e^-3: what is skipped still counts in the sum
        CHECK_NEAR(weights[0], 0.64391425988797, 1e-6);
        CHECK_NEAR(weights[1], kind == MOE_SPECIAL_SKIP ? 0 : 2 * 0.23688281808991, 1e-6);
        CHECK_NEAR(weights[3], 0.03205860328008, 1e-6);
    }
}

TEST(fixed_always_on_experts_follow_the_chosen_with_their_own_weight)
{
    float logits[4] = { 0, 1, 2, 5 };
    moe_routing_desc r = preset(MOE_ROUTING_RENORMALIZE, 2);
    r.extra_slots = 2;
    r.extra_weight = 0.25f;
    r.scale = 2;
    REQUIRE_OK(route(&r, 1, 4, logits, NULL));
    CHECK_EQ(ids[2], 4);
    CHECK_EQ(ids[3], 5);
    CHECK_EQ(weights[2], 0.25f);
    CHECK_EQ(weights[3], 0.25f);
    CHECK_NEAR(weights[0] + weights[1], 2, 1e-6);
    r.extra_weight = 0;
    REQUIRE_OK(route(&r, 1, 4, logits, NULL));
    CHECK_EQ(weights[3], 1.0f);
}

TEST(scored_always_on_experts_are_inside_the_renormalisation)
{
    float logits[6] = { 0, 1, 2, 5, -1, 3 }, bias[4] = { 0 };
    double s[4], sum = 0;
    moe_routing_desc r = preset(MOE_ROUTING_INKLING, 2);
    r.scale = 8;
    REQUIRE_OK(route(&r, 1, 4, logits, bias));
    s[0] = (double)moe__sigmoidf(5);
    s[1] = (double)moe__sigmoidf(2);
    s[2] = (double)moe__sigmoidf(-1);
    s[3] = (double)moe__sigmoidf(3);
    for (int32_t j = 0; j < 4; j++) sum += s[j];
    CHECK_EQ(ids[0], 3);
    CHECK_EQ(ids[1], 2);
    CHECK_EQ(ids[2], 4);
    CHECK_EQ(ids[3], 5);
    for (int32_t j = 0; j < 4; j++) CHECK_NEAR(weights[j], 8 * s[j] / sum, 1e-6);
    r.score = MOE_SCORE_SOFTMAX; // over the whole width
    r.renormalize = MOE_RENORMALIZE_OFF;
    r.scale = 1;
    REQUIRE_OK(route(&r, 1, 4, logits, bias));
    CHECK_NEAR(weights[0], 0.82463712, 1e-6);
    CHECK_NEAR(weights[3], 0.11160250, 1e-6);
}

// ---- simulated routing ----------------------------------------------------------------------------------------------

TEST(simulated_ids_are_legal_distinct_and_the_same_every_time)
{
    for (int32_t kind = MOE_SIMULATE_UNIFORM; kind <= MOE_SIMULATE_ROUND_ROBIN; kind++)
        for (int32_t experts = 8; experts <= 2048; experts *= 16) {
            moe_routing_desc r = preset(MOE_ROUTING_SIMULATED, 8);
            static int32_t first[MAX_T * 8];
            r.simulate = kind;
            r.simulate_seed = 11;
            REQUIRE_OK(route(&r, MAX_T, experts, NULL, NULL));
            memcpy(first, ids, sizeof first);
            for (int32_t t = 0; t < MAX_T; t++)
                for (int32_t j = 0; j < 8; j++) {
                    CHECK(first[t * 8 + j] >= 0 && first[t * 8 + j] < experts);
                    CHECK_EQ(weights[t * 8 + j], 0.125f);
                    for (int32_t i = 0; i < j; i++) CHECK(first[t * 8 + i] != first[t * 8 + j]);
                }
            REQUIRE_OK(route(&r, MAX_T, experts, NULL, NULL));
            CHECK(memcmp(first, ids, sizeof first) == 0);
            r.simulate_seed = 12;
            REQUIRE_OK(route(&r, MAX_T, experts, NULL, NULL));
            CHECK_EQ(memcmp(first, ids, sizeof first) != 0, kind == MOE_SIMULATE_UNIFORM || kind == MOE_SIMULATE_ZIPF);
        }
}

TEST(simulated_loads_have_their_shape)
{
    double count[4][16] = { { 0 } };
    for (int32_t kind = MOE_SIMULATE_UNIFORM; kind <= MOE_SIMULATE_ROUND_ROBIN; kind++)
        for (uint32_t seed = 0; seed < 64; seed++) {
            moe_routing_desc r = preset(MOE_ROUTING_SIMULATED, 1);
            r.simulate = kind;
            r.simulate_seed = seed;
            REQUIRE_OK(route(&r, MAX_T, 16, NULL, NULL));
            for (int32_t t = 0; t < MAX_T; t++) count[kind - 1][ids[t]]++;
        }
    for (int32_t e = 0; e < 16; e++) { // 4096 draws: standard deviation below 32
        CHECK_NEAR(count[0][e], 256, 90);
        CHECK_NEAR(count[1][e], 4096 / 3.380729 / (e + 1), 140);
        CHECK_EQ(count[2][e], e == 0 ? 4096.0 : 0.0);
        CHECK_EQ(count[3][e], 256.0);
    }
}

// ---- rows in expert order -------------------------------------------------------------------------------------------

enum { P_EXPERTS = 8, P_TOKENS = 50, P_SLOTS = 3, P_ROWS = 50 * 3 * 64 };

// Tables of moe_permute() against the rule: experts ascending, each from a multiple of the tile, slots in order inside.
static void check_permutation(const moe_plan *plan, int32_t first, int32_t local, int32_t tile, const int32_t *slot_ids)
{
    static int32_t row_of[P_TOKENS * P_SLOTS], slot_of[P_ROWS], tile_expert[P_ROWS], tile_limit[P_ROWS];
    int32_t offsets[P_EXPERTS + 1], counts[P_EXPERTS], tiles = -1, row = 0, t = 0;
    int64_t rows_max = moe_permutation_rows(P_TOKENS * P_SLOTS, local, tile);
    moe_execute_args a;
    moe_permutation p;
    memset(&a, 0, sizeof a);
    memset(&p, 0, sizeof p);
    REQUIRE(rows_max > 0 && rows_max <= P_ROWS);
    memset(slot_of, 0x55, sizeof slot_of);
    a.input_mode = MOE_INPUT_IDS;
    a.flags = MOE_EXECUTE_ID_E_IS_NONE;
    a.num_tokens = P_TOKENS;
    a.ids = slot_ids;
    p.tile = tile;
    p.row_of_slot = row_of;
    p.slot_of_row = slot_of;
    p.expert_offsets = offsets;
    p.expert_counts = counts;
    p.tile_expert = tile_expert;
    p.tile_limit = tile_limit;
    p.num_tiles = &tiles;
    REQUIRE(moe_permute(plan, NULL, &a, &p, NULL) == MOE_OK);
    for (int32_t e = 0; e < local; e++) {
        int32_t begin = row;
        CHECK_EQ(offsets[e], begin);
        for (int32_t s = 0; s < P_TOKENS * P_SLOTS; s++) {
            if (slot_ids[s] != first + e) continue;
            CHECK_EQ(row_of[s], row);
            CHECK_EQ(slot_of[row], s);
            row++;
        }
        CHECK_EQ(counts[e], row - begin);
        for (int32_t r = begin; r < row; r += tile, t++) {
            CHECK_EQ(tile_expert[t], e);
            CHECK_EQ(tile_limit[t], row - r < tile ? row : r + tile);
        }
        for (; row % tile != 0; row++) CHECK_EQ(slot_of[row], -1);
    }
    CHECK_EQ(offsets[local], row);
    CHECK_EQ(tiles, t);
    CHECK(row <= rows_max);
    for (int32_t s = 0; s < P_TOKENS * P_SLOTS; s++)
        if (slot_ids[s] < first || slot_ids[s] >= first + local) CHECK_EQ(row_of[s], -1);
}

TEST(rows_are_in_expert_order_for_every_tile_and_every_part_of_the_experts)
{
    static const int32_t tiles[] = { 1, 8, 48, 64 };
    moe_layer_desc layer;
    moe_context *ctx;
    moe_plan *plan;
    uint64_t seed = 3;
    memset(&layer, 0, sizeof layer);
    layer.hidden_size = layer.intermediate_size = 16;
    layer.num_experts = P_EXPERTS;
    layer.format = MOE_FORMAT_F32;
    layer.activation.kind = MOE_ACTIVATION_SWIGLU;
    layer.routing = preset(MOE_ROUTING_DEFAULT, P_SLOTS);
    REQUIRE_OK(moe_context_create(NULL, &ctx, &err));
    for (int32_t local = 1; local <= P_EXPERTS; local += 3)
        for (int32_t kind = 0; kind < 4; kind++) {
            int32_t slot_ids[P_TOKENS * P_SLOTS];
            layer.parallel.local_experts = local;
            layer.parallel.expert_offset = local == P_EXPERTS ? 0 : 1;
            REQUIRE_OK(moe_plan_create(ctx, &layer, NULL, &plan, &err));
            for (int32_t s = 0; s < P_TOKENS * P_SLOTS; s++) // any; with -1 and E; one hot expert; nothing at all
                slot_ids[s] = kind == 0 ? (int32_t)(test_random_u32(&seed) % P_EXPERTS)
                            : kind == 1 ? (int32_t)(test_random_u32(&seed) % (P_EXPERTS + 2)) - 1
                            : kind == 2 ? (s % 16 == 0 ? 1 : 2) : -1;
            for (int32_t i = 0; i < 4; i++)
                check_permutation(plan, layer.parallel.expert_offset, local, tiles[i], slot_ids);
            moe_plan_destroy(plan);
        }
    moe_context_destroy(ctx);
}

TEST(the_bound_of_rows_holds_in_the_worst_case_and_no_more)
{
    // Worst: every expert but one has a single slot, the last one all others.
    for (int32_t tile = 1; tile <= 192; tile += 7)
        for (int32_t local = 1; local <= 16; local++)
            for (int64_t slots = 0; slots <= 400; slots += 9) {
                int64_t full = slots < local ? slots : local, rest = slots - full, rows;
                rows = (full > 0 ? (full - 1) * tile + (1 + rest + tile - 1) / tile * tile : 0);
                CHECK_EQ(moe_permutation_rows(slots, local, tile), rows);
            }
    CHECK_EQ(moe_permutation_rows(-1, 4, 8), (int64_t)-1);
    CHECK_EQ(moe_permutation_rows(8, 0, 8), (int64_t)-1);
    CHECK_EQ(moe_permutation_rows(8, 4, 0), (int64_t)-1);
}

// ---- bits -----------------------------------------------------------------------------------------------------------

TEST(every_compiler_and_machine_routes_to_the_same_bits)
{
    uint64_t hash = 0xcbf29ce484222325u;
    static float bias[256];
    char text[64];
    uint64_t seed = 77;
    random_logits(78, MAX_T * 256, 8);
    for (int32_t e = 0; e < 256; e++) bias[e] = 0.1f * test_random_float(&seed);
    for (int32_t m = 0; m < PLAIN; m++)
        for (int32_t soft = 0; soft < 2; soft++) {
            moe_routing_desc r = preset(plain_methods[m], 8);
            if (r.group_rule != MOE_GROUP_NONE) { r.groups = 8; r.groups_kept = 4; }
            if (soft) { r.logit_multiplier = 0.7f; r.logit_softcap = 5; r.scale = 1.7f; }
            REQUIRE_OK(route(&r, MAX_T, 256, route_logits, bias));
            for (int32_t i = 0; i < MAX_T * 8; i++) {
                hash = (hash ^ (uint32_t)ids[i]) * 0x100000001b3u;
                hash = (hash ^ moe__f32_bits(weights[i])) * 0x100000001b3u;
            }
        }
    snprintf(text, sizeof text, "digest 0x%016llx", (unsigned long long)hash);
    if (hash != 0x26bac781b5f0b9ceu) test_fail(__FILE__, __LINE__, text);
}

// ---- members --------------------------------------------------------------------------------------------------------

typedef struct bad_member {
    const char *member;
    size_t offset;
    int32_t value;
    float real; // used when value is REAL
} bad_member;
enum { REAL = -99999 };

// A legal descriptor that switches everything on that can be on together.
static moe_routing_desc full_routing(void)
{
    moe_routing_desc r = preset(MOE_ROUTING_DEEPSEEK_V3, 4);
    r.groups = 4;
    r.groups_kept = 2;
    return r;
}

TEST(every_illegal_member_is_refused_by_name)
{
#define BAD(name, value) { #name, offsetof(moe_routing_desc, name), value, 0 }
#define BAD_REAL(name, value) { #name, offsetof(moe_routing_desc, name), REAL, value }
    const bad_member bad[] = {
        BAD(score, 0), BAD(score, 5), BAD(score, -1), BAD(score_order, 0), BAD(score_order, 3), BAD(select, 3),
        BAD(select, -1), BAD(top_k, 0), BAD(top_k, -1), BAD(top_k, 33), BAD(top_k, 9), BAD(bias_rows, -1),
        BAD(bias_rows, 1025), BAD(groups, 3), BAD(groups, -1), BAD(groups, 32), BAD(groups, 16),
        BAD(groups_kept, 0), BAD(groups_kept, 5), BAD(groups_kept, -1), BAD(group_rule, 0), BAD(group_rule, 4),
        BAD(group_excluded, 2), BAD(renormalize, 3), BAD(renormalize, -1), BAD(zero_sum, 2), BAD(scale_on, 2),
        BAD(per_expert_scale, 2), BAD(weight_on, 2), BAD(forced_rows, -1), BAD(marked_token_lo, -1),
        BAD(marked_token_lo, 1), BAD(marked_token_hi, -1), BAD(special_experts, -1), BAD(special_kind, 5),
        BAD(extra_slots, -1), BAD(extra_slots, 9), BAD(extra_scored, 2), BAD(global_scale, 2), BAD(simulate, 5),
        BAD_REAL(logit_multiplier, -1), BAD_REAL(logit_softcap, -1), BAD_REAL(renormalize_epsilon, -1e-9f),
        BAD_REAL(sparse_mixer, -1),
    };
    const bad_member reals[] = { BAD_REAL(logit_multiplier, 0), BAD_REAL(logit_softcap, 0),
                                 BAD_REAL(renormalize_epsilon, 0), BAD_REAL(scale, 0), BAD_REAL(extra_weight, 0),
                                 BAD_REAL(sparse_mixer, 0) };
    char member[96];
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        moe_routing_desc r = full_routing();
        if (bad[i].value == REAL) memcpy((char *)&r + bad[i].offset, &bad[i].real, sizeof(float));
        else memcpy((char *)&r + bad[i].offset, &bad[i].value, sizeof(int32_t));
        snprintf(member, sizeof member, "layer.routing.%s", bad[i].member);
        CHECK_ERR(moe__routing_resolve(&r, 16, &err), MOE_ERROR_ARGUMENT, member);
    }
    for (size_t i = 0; i < 12; i++) {
        moe_routing_desc r = full_routing();
        float value = i % 2 ? nan_() : -inf();
        memcpy((char *)&r + reals[i / 2].offset, &value, sizeof value);
        snprintf(member, sizeof member, "layer.routing.%s", reals[i / 2].member);
        CHECK_ERR(moe__routing_resolve(&r, 16, &err), MOE_ERROR_ARGUMENT, member);
    }
}

static void check_refused(moe_routing_desc r, int32_t experts, const char *member)
{
    char path[96];
    snprintf(path, sizeof path, "layer.routing.%s", member);
    CHECK_ERR(moe__routing_resolve(&r, experts, &err), MOE_ERROR_ARGUMENT, path);
}

TEST(members_that_do_not_go_together_are_refused_by_name)
{
    moe_routing_desc r = full_routing();
    check_refused(r, 18, "groups");
    r.top_k = 9; // 2 groups of 4
    check_refused(r, 16, "top_k");
    r = full_routing();
    r.special_experts = 2;
    check_refused(r, 16, "special_kind");
    r.special_kind = MOE_SPECIAL_ZERO;
    check_refused(r, 16, "groups");
    r = full_routing();
    r.groups = 0;
    check_refused(r, 16, "groups_kept");
    r = full_routing();
    r.groups = 16; // of one expert each
    check_refused(r, 16, "groups");
    r = full_routing();
    r.group_rule = MOE_GROUP_EACH;
    check_refused(r, 16, "groups_kept");
    r.groups_kept = 0;
    r.top_k = 6;
    check_refused(r, 16, "top_k");
    r.top_k = 8;
    check_refused(r, 4, "top_k");
    r = preset(MOE_ROUTING_RENORMALIZE, 4);
    r.select = MOE_SELECT_SCORE;
    check_refused(r, 16, "select");
    r = preset(MOE_ROUTING_DEFAULT, 4);
    check_refused(r, 3, "top_k");
    r.special_experts = 2000;
    check_refused(r, 64, "special_experts");
    r = preset(MOE_ROUTING_DEFAULT, 4);
    r.extra_slots = 1;
    check_refused(r, 2048, "extra_slots");
    r = preset(MOE_ROUTING_SIMULATED, 4);
    r.special_experts = 8;
    r.special_kind = MOE_SPECIAL_ZERO;
    check_refused(r, 3, "top_k");
    r = preset(MOE_ROUTING_DEFAULT, 4);
    r.reserved[4] = 1;
    check_refused(r, 16, "reserved");
}

TEST(a_sparse_mixer_goes_with_nothing_else)
{
    const moe_routing_desc base = preset(MOE_ROUTING_PHIMOE, 2);
    moe_routing_desc r = base;
    r.score = MOE_SCORE_SIGMOID;
    check_refused(r, 16, "score");
    r = base;
    r.score_order = MOE_SCORE_BEFORE_TOPK;
    check_refused(r, 16, "score_order");
    r = base;
    r.bias_rows = 1;
    check_refused(r, 16, "bias_rows");
    r = base;
    r.groups = 2;
    r.groups_kept = 1;
    r.group_rule = MOE_GROUP_MAX;
    check_refused(r, 16, "groups");
    r = base;
    r.renormalize = MOE_RENORMALIZE_SUM;
    check_refused(r, 16, "renormalize");
    r = base;
    r.forced_rows = 4;
    check_refused(r, 16, "forced_rows");
    r = base;
    r.extra_slots = r.extra_scored = 1;
    check_refused(r, 16, "extra_scored");
}

TEST(zero_members_become_their_defaults)
{
    moe_routing_desc r = preset(MOE_ROUTING_DEFAULT, 4);
    r.groups = r.groups_kept = 1;
    r.special_kind = MOE_SPECIAL_SKIP;
    r.marked_token_lo = r.marked_token_hi = 5;
    r.extra_scored = 1;
    REQUIRE_OK(moe__routing_resolve(&r, 16, &err));
    CHECK_EQ(r.struct_size, (uint32_t)sizeof r);
    CHECK_EQ(r.select, (int32_t)MOE_SELECT_SCORE);
    CHECK_EQ(r.scale, 1.0f);
    CHECK_EQ(r.logit_multiplier, 1.0f);
    CHECK_EQ(r.extra_weight, 1.0f);
    CHECK_EQ(r.groups, 0);
    CHECK_EQ(r.groups_kept, 0);
    CHECK_EQ(r.special_kind, 0);
    CHECK_EQ(r.marked_token_hi, 0);
    CHECK_EQ(r.extra_scored, 0);
    r = preset(MOE_ROUTING_KOLIBRI, 4);
    REQUIRE_OK(moe__routing_resolve(&r, 16, &err));
    CHECK_EQ(r.select, (int32_t)MOE_SELECT_LOGIT);
    r = full_routing();
    r.group_rule = MOE_GROUP_EACH;
    r.groups_kept = 0;
    REQUIRE_OK(moe__routing_resolve(&r, 16, &err));
    CHECK_EQ(r.groups_kept, 4);
}

TEST(resolving_twice_changes_nothing)
{
    for (int32_t m = 0; m < PLAIN; m++) {
        moe_routing_desc r = preset(plain_methods[m], 2), again;
        REQUIRE_OK(moe__routing_resolve(&r, 16, &err));
        again = r;
        REQUIRE_OK(moe__routing_resolve(&again, 16, &err));
        CHECK(memcmp(&r, &again, sizeof r) == 0);
    }
}

TEST(illegal_arguments_of_the_reference_are_refused_by_name)
{
    float logits[8] = { 0 }, bias[16] = { 0 };
    int32_t token[1] = { 0 };
    moe_routing_desc r = preset(MOE_ROUTING_DEEPSEEK_V3, 2);
    moe_reference_route_args good = args_of(1, 8, logits), a;
    good.bias = bias;
    CHECK_OK(moe_reference_route(&r, &good, &err));
    CHECK_ERR(moe_reference_route(NULL, &good, &err), MOE_ERROR_ARGUMENT, "routing");
    CHECK_ERR(moe_reference_route(&r, NULL, &err), MOE_ERROR_ARGUMENT, "args");
#define REFUSED(change, member) \
    do { a = good; change; CHECK_ERR(moe_reference_route(&r, &a, &err), MOE_ERROR_ARGUMENT, member); } while (0)
    REFUSED(a.struct_size = 4, "args.struct_size");
    REFUSED(a.num_experts = 0, "args.num_experts");
    REFUSED(a.num_experts = 2049, "args.num_experts");
    REFUSED(a.num_tokens = -1, "args.num_tokens");
    REFUSED(a.logits = NULL, "args.logits");
    REFUSED(a.bias = NULL, "args.bias");
    REFUSED(a.out_ids = NULL, "args.out_ids");
    REFUSED(a.out_weights = NULL, "args.out_weights");
    REFUSED(a.ids_dtype = MOE_DTYPE_F32, "args.ids_dtype");
    REFUSED(a.global_scale = nan_(), "args.global_scale");
    REFUSED(a.global_scale = 2, "args.global_scale");
    REFUSED(a.num_experts = 1, "routing.top_k");
    r.bias_rows = 2;
    REFUSED((void)0, "args.bias_index");
    r.marked_token_hi = 1;
    REFUSED((void)0, "args.token_ids");
    REFUSED((a.token_ids = token, a.bias = NULL), "args.bias");
    r = preset(MOE_ROUTING_SIGMOID, 2);
    r.forced_rows = 1;
    REFUSED(a.token_ids = token, "args.forced_ids");
    REFUSED(a.forced_ids = token, "args.token_ids");
    r.forced_rows = 0;
    r.per_expert_scale = 1;
    REFUSED((void)0, "args.per_expert_scale");
    r.struct_size = 8;
    REFUSED((void)0, "routing.struct_size");
    r = preset(MOE_ROUTING_SIGMOID, 2);
    a = good;
    a.num_tokens = 0;
    a.logits = NULL;
    CHECK_OK(moe_reference_route(&r, &a, &err));
}

// ---- names ----------------------------------------------------------------------------------------------------------

TEST(a_preset_is_recognised_as_its_method)
{
    for (int32_t m = 0; m < 200; m++) {
        moe_routing_desc r;
        if (strcmp(moe_routing_method_string(m), "?") == 0) {
            CHECK_ERR(moe_routing_preset(m, &r, &err), MOE_ERROR_ARGUMENT, "method");
            continue;
        }
        REQUIRE_OK(moe_routing_preset(m, &r, &err));
        CHECK_EQ(moe_routing_method_of(&r), m);
        if (m == MOE_ROUTING_CUSTOM) continue;
        if (r.top_k == 0) r.top_k = 4;
        if (m == MOE_ROUTING_LONGCAT) r.special_experts = 8;
        if (m == MOE_ROUTING_DEEPSEEK_V2 || m == MOE_ROUTING_DEEPSEEK_V3 || m == MOE_ROUTING_MISTRAL4)
            { r.groups = 4; r.groups_kept = 2; r.scale = 2.5f; }
        CHECK_EQ(moe_routing_method_of(&r), m);
        REQUIRE_OK(moe__routing_resolve(&r, 16, &err));
        CHECK_EQ(moe_routing_method_of(&r), m);
        r.logit_softcap = 3;
        CHECK_EQ(moe_routing_method_of(&r), m == MOE_ROUTING_SIMULATED ? m : (int32_t)MOE_ROUTING_CUSTOM);
    }
    CHECK_EQ(moe_routing_method_of(NULL), (int32_t)MOE_ROUTING_CUSTOM);
}

TEST(what_no_name_says_is_custom)
{
    moe_routing_desc r = preset(MOE_ROUTING_DEFAULT, 4);
    r.bias_rows = 1;
    r.per_expert_scale = 1;
    CHECK_EQ(moe_routing_method_of(&r), (int32_t)MOE_ROUTING_CUSTOM);
    r = preset(MOE_ROUTING_LLAMA4, 2);
    CHECK_EQ(moe_routing_method_of(&r), (int32_t)MOE_ROUTING_CUSTOM);
    r = preset(MOE_ROUTING_DEEPSEEK_V3, 8);
    r.scale = 2.5f;
    r.scale_on = MOE_SCALE_ON_OUTPUT;
    CHECK_EQ(moe_routing_method_of(&r), (int32_t)MOE_ROUTING_CUSTOM);
    r = preset(MOE_ROUTING_MINIMAX2, 8);
    r.renormalize_epsilon = 1e-6f;
    CHECK_EQ(moe_routing_method_of(&r), (int32_t)MOE_ROUTING_CUSTOM);
    r.renormalize_epsilon = 0; // no fp32 sum differs
    CHECK_EQ(moe_routing_method_of(&r), (int32_t)MOE_ROUTING_MINIMAX2);
    r = preset(MOE_ROUTING_DEEPSEEK_V4, 6);
    r.forced_rows = 100;
    r.bias_rows = 0;
    CHECK_EQ(moe_routing_method_of(&r), (int32_t)MOE_ROUTING_DEEPSEEK_V4);
}

TEST(unspecified_is_always_an_error)
{
    moe_routing_desc r;
    CHECK_ERR(moe_routing_preset(MOE_ROUTING_UNSPECIFIED, &r, &err), MOE_ERROR_ARGUMENT, "method");
    CHECK_STR(moe_routing_method_string(MOE_ROUTING_UNSPECIFIED), "Unspecified");
    CHECK_ERR(moe_routing_preset(0, NULL, &err), MOE_ERROR_ARGUMENT, "out");
}

// ---- fields ---------------------------------------------------------------------------------------------------------

static moe_routing_fields fields_of(const char *score)
{
    moe_routing_fields f;
    memset(&f, 0, sizeof f);
    f.num_experts = 64;
    f.top_k = 4;
    f.score = score;
    return f;
}

TEST(illegal_fields_are_refused_by_name)
{
    moe_routing_fields good = fields_of("sigmoid"), f;
    moe_routing_desc r;
#define FIELD(change, code, member) \
    do { \
        f = good; \
        change; \
        CHECK_ERR(moe_routing_from_fields(&f, &r, &err), code, member); \
        CHECK_EQ(r.top_k, 0); \
    } while (0)
    FIELD(f.num_experts = 0, MOE_ERROR_ARGUMENT, "fields.num_experts");
    FIELD(f.num_experts = 2049, MOE_ERROR_ARGUMENT, "fields.num_experts");
    FIELD(f.top_k = 0, MOE_ERROR_ARGUMENT, "fields.top_k");
    FIELD(f.top_k = 33, MOE_ERROR_ARGUMENT, "fields.top_k");
    FIELD((f.top_k = 5, f.num_experts = 4), MOE_ERROR_ARGUMENT, "fields.top_k");
    FIELD(f.renormalize = 2, MOE_ERROR_ARGUMENT, "fields.renormalize");
    FIELD(f.has_bias = -1, MOE_ERROR_ARGUMENT, "fields.has_bias");
    FIELD(f.weight_on_input = 2, MOE_ERROR_ARGUMENT, "fields.weight_on_input");
    FIELD(f.groups = 5, MOE_ERROR_ARGUMENT, "fields.groups");
    FIELD(f.groups = -1, MOE_ERROR_ARGUMENT, "fields.groups");
    FIELD(f.groups = 8, MOE_ERROR_ARGUMENT, "fields.groups_kept");
    FIELD((f.groups = 8, f.groups_kept = 9), MOE_ERROR_ARGUMENT, "fields.groups_kept");
    FIELD(f.groups_kept = 2, MOE_ERROR_ARGUMENT, "fields.groups_kept");
    FIELD((f.groups = 32, f.groups_kept = 1), MOE_ERROR_ARGUMENT, "fields.top_k");
    FIELD(f.scale = inf(), MOE_ERROR_ARGUMENT, "fields.scale");
    FIELD(f.epsilon = -1, MOE_ERROR_ARGUMENT, "fields.epsilon");
    FIELD(f.epsilon = nan_(), MOE_ERROR_ARGUMENT, "fields.epsilon");
    FIELD(f.score = NULL, MOE_ERROR_ARGUMENT, "fields.score");
    FIELD(f.score = "tanh", MOE_ERROR_ARGUMENT, "fields.score");
    CHECK_CONTAINS(err.text, "\"sqrtsoftplus\"");
    FIELD(f.struct_size = 1, MOE_ERROR_ARGUMENT, "fields.struct_size");
    FIELD((f.groups = 8, f.groups_kept = 4), MOE_ERROR_UNSUPPORTED, "fields.groups");
    CHECK_ERR(moe_routing_from_fields(NULL, &r, &err), MOE_ERROR_ARGUMENT, "fields");
    CHECK_ERR(moe_routing_from_fields(&good, NULL, &err), MOE_ERROR_ARGUMENT, "out");
}

TEST(fields_of_known_models_give_their_methods)
{
    moe_routing_fields f = fields_of("sigmoid");
    moe_routing_desc r;
    f.has_bias = f.renormalize = 1;
    f.groups = 8;
    f.groups_kept = 4;
    f.scale = 2.5f;
    f.epsilon = 1e-20f;
    REQUIRE_OK(moe_routing_from_fields(&f, &r, &err));
    CHECK_EQ(moe_routing_method_of(&r), (int32_t)MOE_ROUTING_DEEPSEEK_V3);
    CHECK_EQ(r.scale, 2.5f);
    CHECK_EQ(r.groups_kept, 4);
    f = fields_of("sigmoid");
    f.top_k = 1;
    f.weight_on_input = 1;
    REQUIRE_OK(moe_routing_from_fields(&f, &r, &err));
    CHECK_EQ(moe_routing_method_of(&r), (int32_t)MOE_ROUTING_LLAMA4);
    f = fields_of("softmax");
    f.scale = 16;
    f.groups = 8;
    f.groups_kept = 3;
    REQUIRE_OK(moe_routing_from_fields(&f, &r, &err));
    CHECK_EQ(moe_routing_method_of(&r), (int32_t)MOE_ROUTING_DEEPSEEK_V2);
    f = fields_of("softmax");
    f.has_bias = f.renormalize = 1;
    REQUIRE_OK(moe_routing_from_fields(&f, &r, &err));
    CHECK_EQ(moe_routing_method_of(&r), (int32_t)MOE_ROUTING_ERNIE45);
    f = fields_of("sqrtsoftplus");
    f.has_bias = f.renormalize = 1;
    f.epsilon = 1e-20f;
    f.scale = 1.5f;
    REQUIRE_OK(moe_routing_from_fields(&f, &r, &err));
    CHECK_EQ(moe_routing_method_of(&r), (int32_t)MOE_ROUTING_DEEPSEEK_V4);
}

// vLLM's table tells which *kernel method* fits; this library answers with a descriptor. Where the answers differ:
enum { REFUSED_ = -2 };
static const struct {
    const char *score;
    int32_t renormalize, groups, bias, ours;
    const char *reason;
} differences[] = {
    { "sigmoid", 0, 0, 1, MOE_ROUTING_CUSTOM, "no number fixes it, the descriptor does: biased choice, plain weights" },
    { "sigmoid", 0, 8, 1, MOE_ROUTING_CUSTOM, "DeepSeek-V3 with norm_topk_prob false: no number, but a descriptor" },
    { "sigmoid", 0, 8, 0, REFUSED_, "vLLM's method drops the groups; how they rank without a bias is not known" },
    { "sigmoid", 1, 8, 0, REFUSED_, "vLLM's method drops the groups; how they rank without a bias is not known" },
    { "softmax", 0, 0, 1, MOE_ROUTING_LONGCAT, "LongCat-Flash routes so; vLLM has no number for it" },
    { "softmax", 1, 0, 1, MOE_ROUTING_ERNIE45, "Ernie 4.5 routes so; vLLM has no number for it" },
    { "softmax", 0, 8, 0, MOE_ROUTING_DEEPSEEK_V2, "vLLM's Default drops the groups; DeepSeek-V2's rank by maximum" },
    { "softmax", 1, 8, 0, REFUSED_, "vLLM's method drops the groups; DeepSeek-V2 and Mistral-4 rank them differently" },
    { "sqrtsoftplus", 0, 0, 0, MOE_ROUTING_CUSTOM, "no number, but a descriptor: scores as weights" },
    { "sqrtsoftplus", 0, 0, 1, MOE_ROUTING_CUSTOM, "no number, but a descriptor: biased choice, plain weights" },
    { "sqrtsoftplus", 1, 0, 0, MOE_ROUTING_CUSTOM, "DeepSeekV4 has a bias; without one the descriptor says the rest" },
    { "sqrtsoftplus", 1, 8, 0, REFUSED_, "vLLM's method drops the groups; no model has them" },
    { "sqrtsoftplus", 1, 8, 1, REFUSED_, "vLLM's method drops the groups; no model has them" },
};
enum { DIFFERENCES = sizeof differences / sizeof differences[0] };

TEST(vllms_decision_table_is_ours_but_for_the_listed_rows)
{
    static tsv t;
    int32_t used[DIFFERENCES] = { 0 }, equal = 0;
    REQUIRE(tsv_read(&t, test_data("data/configs/vllm_decision.tsv")));
    for (int32_t row = 0; row < t.rows; row++) {
        moe_routing_fields f = fields_of(tsv_cell(&t, row, "scoring_func"));
        moe_routing_desc r;
        int32_t theirs = REFUSED_, ours = REFUSED_, expected;
        f.top_k = tsv_int(&t, row, "top_k");
        f.renormalize = tsv_int(&t, row, "renormalize");
        f.groups = tsv_int(&t, row, "num_expert_group");
        f.groups_kept = f.groups / 2;
        f.has_bias = tsv_int(&t, row, "has_bias");
        if (moe_routing_from_foreign(MOE_STACK_VLLM, "0.33.0", tsv_int(&t, row, "number"), &theirs, NULL) != MOE_OK)
            theirs = REFUSED_;
        if (moe_routing_from_fields(&f, &r, &err) == MOE_OK) {
            ours = moe_routing_method_of(&r);
            CHECK_OK(moe__routing_resolve(&r, f.num_experts, &err));
        } else {
            CHECK(err.text[0] != 0);
        }
        expected = theirs;
        for (int32_t d = 0; d < DIFFERENCES; d++)
            if (strcmp(differences[d].score, f.score) == 0 && differences[d].renormalize == f.renormalize &&
                differences[d].groups == f.groups && differences[d].bias == f.has_bias) {
                expected = differences[d].ours;
                used[d]++;
                CHECK(expected != theirs && differences[d].reason[0] != 0);
            }
        equal += ours == theirs;
        if (ours != expected) test_fail_numbers(__FILE__, __LINE__, "row, ours", row + 2, ours);
    }
    for (int32_t d = 0; d < DIFFERENCES; d++) CHECK_EQ(used[d], 2); // k = 1 and k = 8
    CHECK_EQ(equal + 2 * DIFFERENCES, t.rows);
    free(t.text);
}

TEST_MAIN(T(ids_and_weights_are_those_of_float64_in_every_oracle_case)
          T(presets_are_the_members_of_the_oracle_cases_that_name_them)
          T(top_k_is_k_times_the_best_of_the_rest_at_every_size) T(groups_are_ranked_and_masked_as_the_rules_say)
          T(one_group_each_takes_its_share_in_group_order) T(ties_go_to_the_lower_id)
          T(tied_groups_go_to_the_lower_group) T(minus_zero_equals_zero)
          T(minus_infinity_is_chosen_last_and_weighs_nothing) T(a_token_without_any_finite_logit_has_weights_of_zero)
          T(nan_and_plus_infinity_are_refused_by_token_and_expert) T(a_bias_that_is_no_number_is_refused)
          T(a_multiplier_that_overflows_is_refused) T(all_negative_logits_choose_the_least_negative)
          T(a_bias_chooses_and_does_not_weigh) T(ids_and_weights_of_k_equal_to_e_are_all_experts)
          T(one_expert_gets_everything) T(softmax_then_division_equals_softmax_of_the_chosen)
          T(a_sum_has_32_lanes_and_a_butterfly) T(renormalisation_follows_its_rule_when_the_sum_is_not_positive)
          T(the_scale_is_applied_once_and_where_it_belongs) T(soft_cap_and_multiplier_act_before_the_score)
          T(the_sparse_mixer_weighs_each_round_for_itself) T(forced_ids_come_from_the_table_and_weights_from_the_scores)
          T(token_ids_outside_the_forced_table_are_refused_and_marked_ones_leave_it)
          T(forced_ids_out_of_range_are_refused) T(a_second_bias_row_is_for_marked_tokens_or_for_those_that_name_it)
          T(special_experts_are_reported_by_id_and_skipped_ones_as_nothing)
          T(fixed_always_on_experts_follow_the_chosen_with_their_own_weight)
          T(scored_always_on_experts_are_inside_the_renormalisation)
          T(simulated_ids_are_legal_distinct_and_the_same_every_time) T(simulated_loads_have_their_shape)
          T(rows_are_in_expert_order_for_every_tile_and_every_part_of_the_experts)
          T(the_bound_of_rows_holds_in_the_worst_case_and_no_more)
          T(every_compiler_and_machine_routes_to_the_same_bits) T(every_illegal_member_is_refused_by_name)
          T(members_that_do_not_go_together_are_refused_by_name) T(a_sparse_mixer_goes_with_nothing_else)
          T(zero_members_become_their_defaults) T(resolving_twice_changes_nothing)
          T(illegal_arguments_of_the_reference_are_refused_by_name) T(a_preset_is_recognised_as_its_method)
          T(what_no_name_says_is_custom) T(unspecified_is_always_an_error) T(illegal_fields_are_refused_by_name)
          T(fields_of_known_models_give_their_methods) T(vllms_decision_table_is_ours_but_for_the_listed_rows))
