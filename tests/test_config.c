// test_config.c - what moe_layer_from_config() makes of every family's config.json, of damaged ones and of hostile ones
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"

enum { MAX_COLUMNS = 64, MAX_LINE = 4096 };

// ---- files ---------------------------------------------------------------------------------------------------------

static char *read_text(const char *path, size_t *size)
{
    FILE *f = fopen(path, "rb");
    char *text;
    long length;
    *size = 0;
    if (f == NULL) return NULL;
    fseek(f, 0, SEEK_END);
    length = ftell(f);
    fseek(f, 0, SEEK_SET);
    text = (char *)malloc((size_t)length + 1);
    if (text != NULL) *size = fread(text, 1, (size_t)length, f);
    if (text != NULL) text[*size] = 0;
    fclose(f);
    return text;
}

typedef struct table {
    char *text, *next;
    char *columns[MAX_COLUMNS];
    char *cells[MAX_COLUMNS];
    int num_columns;
    char header[MAX_LINE];
} table;

static int split(char *line, char **cells)
{
    int n = 0;
    for (char *p = line; n < MAX_COLUMNS; p++) {
        cells[n++] = p;
        p = strchr(p, '\t');
        if (p == NULL) break;
        *p = 0;
    }
    return n;
}

static int table_row(table *t)
{
    char *line = t->next, *end;
    if (line == NULL || *line == 0) return 0;
    end = strchr(line, '\n');
    t->next = end == NULL ? NULL : end + 1;
    if (end != NULL) *end = 0;
    return split(line, t->cells);
}

static int table_open(table *t, const char *path)
{
    size_t size;
    memset(t, 0, sizeof *t);
    t->text = t->next = read_text(path, &size);
    if (t->text == NULL || !table_row(t)) return 0;
    memcpy(t->columns, t->cells, sizeof t->columns);
    while (t->num_columns < MAX_COLUMNS && t->columns[t->num_columns] != NULL) t->num_columns++;
    return 1;
}

static const char *cell(const table *t, const char *column)
{
    for (int i = 0; i < t->num_columns; i++)
        if (strcmp(t->columns[i], column) == 0) return t->cells[i];
    test_fail2(__FILE__, __LINE__, "the table has no column", column);
    return "";
}

static double number(const table *t, const char *column) { return strtod(cell(t, column), NULL); }

// ---- rows of expected.tsv ------------------------------------------------------------------------------------------

static void differ(const table *t, const char *what, const char *got, const char *expected)
{
    char text[400];
    snprintf(text, sizeof text, "%s layer %s: %s is %s, expected %s", cell(t, "file"), cell(t, "layer"), what, got,
             expected);
    test_fail(__FILE__, __LINE__, text);
}

static void check_number(const table *t, const char *column, double got)
{
    char text[40];
    double expected = number(t, column), size = expected < 0 ? -expected : expected;
    if (test_near(got, expected, size * 1e-6)) return;
    snprintf(text, sizeof text, "%g", got);
    differ(t, column, text, cell(t, column));
}

static void check_word(const table *t, const char *column, const char *got)
{
    if (strcmp(got, cell(t, column)) != 0) differ(t, column, got, cell(t, column));
}

static const char *pick(const char *const *words, int count, int index) { return index >= 0 &&
                                                                         index < count ? words[index] : "?"; }

static const char *activation_word(const moe_activation_desc *a)
{
    if (a->kind == MOE_ACTIVATION_SWIGLU && a->beta != 0) return "swiglu_oai";
    if (a->kind == MOE_ACTIVATION_SWIGLU && a->limit != 0) return "swiglu_clamp";
    return moe_activation_string(a->kind);
}

static void check_routing(const table *t, const moe_layer_desc *layer)
{
    static const char *const scores[] = { "?", "raw", "softmax", "sigmoid", "sqrt_softplus" };
    static const char *const orders[] = { "?", "before", "after" }, *const selects[] = { "?", "score", "logit" };
    static const char *const rules[] = { "none", "max", "top2", "each" }, *const excluded[] = { "-inf", "zero" };
    static const char *const renorms[] = { "off", "sum", "clamp" }, *const on[] = { "weights", "output" };
    static const char *const weight_on[] = { "output", "input" };
    static const char *const specials[] = { "none", "zero", "identity", "skip", "constant" };
    const moe_routing_desc *r = &layer->routing;
    int grouped = r->groups > 1;
    check_number(t, "top_k", r->top_k);
    check_word(t, "score", pick(scores, 5, r->score));
    check_word(t, "score_when", pick(orders, 3, r->score_order));
    check_word(t, "select", pick(selects, 3, r->select));
    check_number(t, "bias_rows", r->bias_rows);
    check_number(t, "has_bias", r->bias_rows > 0);
    check_number(t, "groups", grouped ? r->groups : 1);
    if (r->group_rule != MOE_GROUP_EACH) check_number(t, "groups_kept", grouped ? r->groups_kept : 1);
    check_word(t, "group_rule", pick(rules, 4, r->group_rule));
    if (grouped && r->group_rule != MOE_GROUP_EACH) check_word(t, "group_excluded", pick(excluded, 2,
                                                                                         r->group_excluded));
    check_word(t, "renorm", pick(renorms, 3, r->renormalize));
    check_number(t, "epsilon", (double)r->renormalize_epsilon);
    check_number(t, "scale", (double)r->scale);
    check_word(t, "scale_on", pick(on, 2, r->scale_on));
    check_word(t, "weight_on", pick(weight_on, 2, r->weight_on));
    check_number(t, "per_expert_scale", r->per_expert_scale);
    check_number(t, "zero_experts", r->special_experts);
    check_word(t, "zero_kind", pick(specials, 5, r->special_kind));
    check_number(t, "forced_ids", r->forced_rows > 0);
    check_number(t, "logit_multiplier", (double)r->logit_multiplier);
    check_number(t, "softcap", (double)r->logit_softcap);
    check_number(t, "renorm_shared", r->extra_scored);
    check_number(t, "sparse_mixer", r->sparse_mixer != 0);
    if (r->sparse_mixer != 0) check_number(t, "jitter", (double)r->sparse_mixer);
}

// Shared experts of a model with latent experts read another width than the layer's, so they are left to the caller.
static void check_shared(const table *t, const moe_layer_desc *layer)
{
    const moe_shared_desc *s = &layer->shared;
    int latent = strcmp(cell(t, "hidden_size"), cell(t, "model_hidden_size")) != 0;
    if (latent) {
        CHECK_EQ(s->count, 0);
        return;
    }
    if (layer->routing.extra_scored) {
        check_number(t, "shared_experts", layer->routing.extra_slots);
        return;
    }
    check_number(t, "shared_experts", s->count);
    if (s->count == 0) return;
    check_number(t, "shared_intermediate", (double)s->count * s->intermediate_size);
    check_word(t, "shared_gate", s->gate ? "sigmoid" : "none");
    check_word(t, "shared_activation", activation_word(&s->activation));
    check_number(t, "shared_limit", (double)s->activation.limit);
}

static void check_layer(const table *t, const moe_layer_desc *layer)
{
    const moe_activation_desc *a = &layer->activation;
    int oai = a->kind == MOE_ACTIVATION_SWIGLU && a->beta != 0, situ = a->kind == MOE_ACTIVATION_SITU;
    check_number(t, "hidden_size", layer->hidden_size);
    check_number(t, "model_hidden_size", layer->router.input_size);
    check_number(t, "intermediate_size", layer->intermediate_size);
    check_number(t, "num_experts", layer->num_experts);
    check_routing(t, layer);
    check_word(t, "activation", activation_word(a));
    check_number(t, "limit", (double)a->limit);
    check_number(t, "alpha", oai || situ ? (double)a->alpha : 0.0);
    check_number(t, "beta", (double)a->beta);
    check_number(t, "biases", layer->gemm1_bias && layer->gemm2_bias);
    check_number(t, "output_scale", (double)layer->output_scale);
    check_number(t, "row_norm", layer->row_norm);
    check_shared(t, layer);
}

static void walk_expected(int facts_only)
{
    table t;
    int rows = 0;
    REQUIRE(table_open(&t, test_data("data/configs/expected.tsv")));
    while (table_row(&t)) {
        static moe_fact facts[64];
        char path[200];
        moe_layer_desc layer;
        int32_t count = 0, index = (int32_t)number(&t, "layer"), result;
        size_t size;
        char *json;
        snprintf(path, sizeof path, "data/configs/%s", cell(&t, "file"));
        json = read_text(test_data(path), &size);
        REQUIRE(json != NULL);
        rows++;
        result = moe_layer_from_config(json, size, NULL, 0, index, &layer, &err);
        if (number(&t, "is_moe") == 0) {
            if (result != MOE_ERROR_MISSING) differ(&t, "result", moe_result_string(result), "MOE_ERROR_MISSING");
        } else if (result != MOE_OK) {
            differ(&t, "result", err.text, "a layer");
        } else if (!facts_only) {
            check_layer(&t, &layer);
        } else {
            CHECK_OK(moe_facts_from_config(json, size, NULL, 0, index, facts, 64, &count, &err));
            CHECK(count >= 10 && count <= 64);
            for (int32_t i = 0; i < count && i < 64; i++) {
                CHECK(facts[i].name[0] != 0 && facts[i].value[0] != 0 && facts[i].source[0] != 0);
                CHECK(strcmp(facts[i].value, "?") != 0);
                for (int32_t j = 0; j < i; j++) CHECK(strcmp(facts[i].name, facts[j].name) != 0);
            }
        }
        free(json);
    }
    printf("rows of expected.tsv: %d\n", rows);
    CHECK(rows > 300);
    free(t.text);
}

TEST(every_family_gives_the_layer_that_its_own_code_means) { walk_expected(0); }
TEST(every_fact_has_a_value_and_a_source_and_is_told_once) { walk_expected(1); }

// ---- quantisation --------------------------------------------------------------------------------------------------

static const char *format_word(const moe_layer_desc *layer)
{
    static char text[40];
    static const struct { int32_t format; const char *word; } words[] = {
        { MOE_FORMAT_F32, "fp32" }, { MOE_FORMAT_BF16, "bf16" }, { MOE_FORMAT_F16, "fp16" },
        { MOE_FORMAT_FP8_PER_TENSOR, "fp8_per_tensor" }, { MOE_FORMAT_FP8_PER_CHANNEL, "fp8_per_channel" },
        { MOE_FORMAT_MXFP8, "mxfp8" }, { MOE_FORMAT_NVFP4, "nvfp4_w4a4" }, { MOE_FORMAT_NVFP4_W4A16, "nvfp4_w4a16" },
        { MOE_FORMAT_MXFP4_W4A16, "mxfp4_w4a16" }, { MOE_FORMAT_MXFP4_W4A8, "mxfp4_w4a8" },
    };
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++)
        if (words[i].format == layer->format) return words[i].word;
    if (layer->format == MOE_FORMAT_FP8_BLOCK) snprintf(text, sizeof text, "fp8_block_%d", layer->format_block);
    else snprintf(text, sizeof text, "int4_g%d", layer->format_block);
    return text;
}

static const char host[] = "{\"model_type\":\"qwen3_moe\",\"hidden_size\":2048,\"moe_intermediate_size\":768,"
                           "\"num_experts\":128,\"num_experts_per_tok\":8,\"num_hidden_layers\":48,"
                           "\"dtype\":\"bfloat16\"}";

TEST(every_quantisation_config_gives_its_format_or_a_refusal)
{
    table t;
    REQUIRE(table_open(&t, test_data("data/configs/quant/expected.tsv")));
    while (table_row(&t)) {
        char path[200];
        moe_layer_desc layer;
        moe_tensor_name what;
        size_t size;
        char *json;
        int separate = strstr(cell(&t, "file"), "hf_quant_config") != NULL;
        int32_t index = 0, result;
        snprintf(path, sizeof path, "data/configs/quant/%s", cell(&t, "file"));
        json = read_text(test_data(path), &size);
        REQUIRE(json != NULL);
        if (strcmp(cell(&t, "module"), "-") != 0) {
            CHECK_OK(moe_tensor_from_name(cell(&t, "module"), &what, &err));
            index = what.layer;
        }
        if (separate) result = moe_layer_from_config(host, sizeof host - 1, json, size, index, &layer, &err);
        else result = moe_layer_from_config(json, size, NULL, 0, index, &layer, &err);
        if (strcmp(cell(&t, "format"), "refused") == 0) {
            CHECK_EQ(result, MOE_ERROR_UNSUPPORTED);
            CHECK_CONTAINS(err.text, "FP3_SECRET");
        } else if (result != MOE_OK) {
            test_fail2(__FILE__, __LINE__, cell(&t, "file"), err.text);
        } else if (strcmp(format_word(&layer), cell(&t, "format")) != 0) {
            test_fail2(__FILE__, __LINE__, cell(&t, "file"), format_word(&layer));
        }
        free(json);
    }
    free(t.text);
}

static int32_t layer_of(const char *json, int32_t index, moe_layer_desc *layer)
{
    return moe_layer_from_config(json, strlen(json), NULL, 0, index, layer, &err);
}

TEST(scales_of_the_type_ue8m0_are_told)
{
    moe_layer_desc layer;
    size_t size;
    char *json = read_text(test_data("data/configs/quant/fp8_block_ue8m0_32.json"), &size);
    REQUIRE(json != NULL);
    CHECK_OK(moe_layer_from_config(json, size, NULL, 0, 0, &layer, &err));
    CHECK_EQ(layer.scale_dtype, MOE_DTYPE_UE8M0);
    free(json);
}

static int32_t with_exceptions(const char *exceptions, int32_t index, moe_layer_desc *layer)
{
    char json[1200];
    snprintf(json, sizeof json,
             "%.*s,\"quantization_config\":{\"quant_method\":\"fp8\",\"weight_block_size\":[128,128],"
             "\"ignore\":[%s]}}", (int)(sizeof host - 2), host, exceptions);
    return layer_of(json, index, layer);
}

TEST(layers_that_quantisation_excepts_keep_the_models_type)
{
    moe_layer_desc layer;
    CHECK_OK(with_exceptions("\"lm_head\",\"model.layers.3.mlp.gate\",\"re:.*mlp.gate$\",\"model.layers.*.self_attn*\"",
                             3,
                             &layer));
    CHECK_EQ(layer.format, MOE_FORMAT_FP8_BLOCK);
    CHECK_OK(with_exceptions("\"model.layers.3.mlp.experts\"", 3, &layer));
    CHECK_EQ(layer.format, MOE_FORMAT_BF16);
    CHECK_OK(with_exceptions("\"model.layers.3.mlp.experts\"", 4, &layer));
    CHECK_EQ(layer.format, MOE_FORMAT_FP8_BLOCK);
    CHECK_OK(with_exceptions("\"model.layers.3\"", 3, &layer));
    CHECK_EQ(layer.format, MOE_FORMAT_BF16);
    CHECK_OK(with_exceptions("\"model.layers.3\"", 30, &layer));
    CHECK_EQ(layer.format, MOE_FORMAT_FP8_BLOCK);
    CHECK_OK(with_exceptions("\"re:.*layers\\\\.3\\\\..*\"", 3, &layer));
    CHECK_EQ(layer.format, MOE_FORMAT_BF16);
    CHECK_OK(with_exceptions("\"model.layers.3*\"", 3, &layer));
    CHECK_EQ(layer.format, MOE_FORMAT_BF16);
}

// ---- damage --------------------------------------------------------------------------------------------------------

static char *read_config(const char *name, size_t *size)
{
    char path[200];
    snprintf(path, sizeof path, "data/configs/%s", name);
    return read_text(test_data(path), size);
}

TEST(a_truncated_config_is_an_error_or_the_same_layer)
{
    static const struct { const char *file; int32_t layer; } cases[] = {
        { "deepseek_v3.json", 3 }, { "gemma4.json", 0 }, { "nemotron_h_puzzle.json", 3 }, { "qwen3_moe_mixed.json", 1 },
    };
    for (int c = 0; c < 4; c++) {
        moe_layer_desc whole, part;
        size_t size;
        char *json = read_config(cases[c].file, &size);
        int32_t index = cases[c].layer;
        REQUIRE(json != NULL);
        CHECK_OK(moe_layer_from_config(json, size, NULL, 0, index, &whole, &err));
        for (size_t n = 0; n <= size; n++) {
            char *copy = (char *)malloc(n + 1); // of this size, so that a sanitizer sees a read behind it
            REQUIRE(copy != NULL);
            memcpy(copy, json, n);
            if (moe_layer_from_config(copy, n, NULL, 0, index, &part, &err) == MOE_OK)
                CHECK(memcmp(&part, &whole, sizeof part) == 0);
            else
                CHECK(err.code != MOE_OK && err.text[0] != 0);
            free(copy);
        }
        free(json);
    }
}

// Replaces the value of each member of the config in turn, at every level, by something of another type.
TEST(a_key_of_the_wrong_type_is_refused_or_ignored_but_never_misread)
{
    static const struct { const char *file; int32_t layer; } cases[] = {
        { "deepseek_v2.json", 3 }, { "deepseek_v41.json", 3 }, { "ernie4_5_moe.json", 3 }, { "longcat_flash.json", 3 },
        { "cohere2_moe.json", 3 }, { "step3p5.json", 44 }, { "nemotron_h_super.json", 3 }, { "inkling.json", 3 },
        { "hunyuan_v1_moe_lists.json", 3 }, { "dbrx.json", 3 }, { "jamba.json", 3 }, { "kimi_k3.json", 3 },
    };
    static const char *const values[] = { "null", "true", "-1", "1e999", "\"x\"", "[]", "[[[1]]]", "{}",
                                         "99999999999999999999",
                                          "0.5", "NaN", "{\"__float__\":\"Infinity\"}" };
    static const char *const needed[] = { "\"hidden_size\"", "\"num_experts_per_tok\"", "\"n_routed_experts\"" };
    moe_layer_desc layer;
    int refused = 0, tried = 0;
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        size_t size;
        char *json = read_config(cases[c].file, &size), *changed = (char *)malloc(size + 64);
        int towers = json != NULL && strstr(json, "vision_config") != NULL; // whose sizes are of no interest
        REQUIRE(json != NULL && changed != NULL);
        CHECK_OK(moe_layer_from_config(json, size, NULL, 0, cases[c].layer, &layer, &err));
        for (size_t colon = 0; colon < size; colon++) {
            const char *begin = json + colon + 2, *end;
            if (json[colon] != ':' || json[colon + 1] != ' ') continue;
            end = moe__json_skip(begin, json + size);
            for (size_t v = 0; v < sizeof values / sizeof values[0]; v++) {
                int n = snprintf(changed, size + 64, "%.*s%s%s", (int)(begin - json), json, values[v], end);
                int32_t result;
                if (n < 0 || (size_t)n >= size + 64) continue;
                result = moe_layer_from_config(changed, (size_t)n, NULL, 0, cases[c].layer, &layer, &err);
                tried++;
                refused += result != MOE_OK;
                CHECK(result == MOE_OK || (result == err.code && err.text[0] != 0));
                for (int i = 0; i < 3; i++) {
                    size_t length = strlen(needed[i]);
                    if (!towers && colon >= length && memcmp(json + colon - length, needed[i], length) == 0)
                        CHECK(result != MOE_OK);
                }
            }
        }
        free(changed);
        free(json);
    }
    printf("values of a wrong type: %d tried, %d refused\n", tried, refused);
    CHECK(refused > tried / 10);
}

TEST(refusals_name_the_key_with_its_nesting_and_the_value)
{
    moe_layer_desc layer;
    CHECK_ERR(layer_of("{\"model_type\":\"qwen3_vl_moe\",\"text_config\":{\"model_type\":\"qwen3_vl_moe_text\","
                       "\"hidden_size\":\"wide\",\"moe_intermediate_size\":8,\"num_experts\":4,"
                       "\"num_experts_per_tok\":2}}", 0,
                       &layer), MOE_ERROR_FORMAT, "text_config.hidden_size");
    CHECK_CONTAINS(err.text, "\"wide\"");
    CHECK_CONTAINS(err.text, "an integer");
    CHECK_ERR(layer_of("{\"model_type\":\"mixtral\",\"hidden_size\":8,\"intermediate_size\":8,\"num_local_experts\":4}",
                       0,
                       &layer), MOE_ERROR_MISSING, "layer.routing.top_k");
    CHECK_CONTAINS(err.text, "num_experts_per_tok");
    CHECK_ERR(layer_of("{\"model_type\":\"mixtral\",\"hidden_size\":8,\"intermediate_size\":8,\"num_local_experts\":4,"
                       "\"num_experts_per_tok\":[2,2,2]}", 3, &layer), MOE_ERROR_FORMAT, "num_experts_per_tok");
    CHECK_CONTAINS(err.text, "3 entries");
    CHECK_ERR(layer_of("{\"model_type\":\"deepseek_v3\",\"hidden_size\":8,\"moe_intermediate_size\":8,"
                       "\"n_routed_experts\":16,"
                       "\"num_experts_per_tok\":2,\"scoring_func\":\"softmax\"}", 3, &layer), MOE_ERROR_UNSUPPORTED,
                       "scoring_func");
    CHECK_ERR(layer_of("{\"model_type\":\"mixtral\",\"hidden_size\":8,\"intermediate_size\":8,\"num_local_experts\":4,"
                       "\"num_experts_per_tok\":2,\"num_hidden_layers\":4}",
                       4, &layer), MOE_ERROR_MISSING, "layer_index");
    CHECK_ERR(layer_of("{\"model_type\":\"qwen3_moe\",\"hidden_size\":8,\"moe_intermediate_size\":8,\"num_experts\":4,"
                       "\"num_experts_per_tok\":2,\"mlp_only_layers\":[1]}",
                       1, &layer), MOE_ERROR_MISSING, "layer_index");
    CHECK_CONTAINS(err.text, "mlp_only_layers");
    CHECK_ERR(layer_of("[1]", 0, &layer), MOE_ERROR_FORMAT, "");
    CHECK_ERR(layer_of("{\"a\":}", 0, &layer), MOE_ERROR_FORMAT, "");
    CHECK_CONTAINS(err.text, "byte 5");
}

#define UNKNOWN "{\"model_type\":\"nobody\",\"hidden_size\":8,\"moe_intermediate_size\":8,\"num_experts\":16," \
                "\"num_experts_per_tok\":2"

TEST(an_unknown_model_is_inferred_from_its_keys_or_refused_by_the_keys_that_decide)
{
    moe_layer_desc layer;
    CHECK_OK(layer_of(UNKNOWN ",\"scoring_func\":\"softmax\",\"norm_topk_prob\":true}", 0, &layer));
    CHECK_EQ(moe_routing_method_of(&layer.routing), MOE_ROUTING_RENORMALIZE_NAIVE);
    CHECK_OK(layer_of(UNKNOWN ",\"scoring_func\":\"sigmoid\",\"norm_topk_prob\":true,"
                              "\"topk_method\":\"noaux_tc\",\"n_group\":4,"
                      "\"topk_group\":2,\"routed_scaling_factor\":2.5}", 0, &layer));
    CHECK_EQ(moe_routing_method_of(&layer.routing), MOE_ROUTING_DEEPSEEK_V3);
    CHECK_ERR(layer_of(UNKNOWN "}", 0, &layer), MOE_ERROR_MISSING, "layer.routing");
    CHECK_CONTAINS(err.text, "scoring_func");
    CHECK_ERR(layer_of(UNKNOWN ",\"scoring_func\":\"softmax\"}", 0, &layer), MOE_ERROR_MISSING, "layer.routing");
    CHECK_CONTAINS(err.text, "norm_topk_prob");
    CHECK_ERR(layer_of(UNKNOWN ",\"scoring_func\":\"sigmoid\",\"norm_topk_prob\":true}", 0, &layer),
              MOE_ERROR_UNSUPPORTED,
              "layer.routing");
    CHECK_CONTAINS(err.text, "use_routing_bias");
    CHECK_ERR(layer_of(UNKNOWN ",\"scoring_func\":\"softmax\",\"norm_topk_prob\":true,\"n_group\":4,\"topk_group\":2}",
                       0,
                       &layer), MOE_ERROR_UNSUPPORTED, "n_group");
    CHECK_ERR(layer_of("{\"hidden_size\":8,\"intermediate_size\":8,\"num_experts\":16,\"num_experts_per_tok\":2,"
                       "\"scoring_func\":\"softmax\",\"norm_topk_prob\":true}", 0, &layer), MOE_ERROR_MISSING,
                       "layer.intermediate_size");
}

TEST(layers_behind_the_model_are_those_of_its_speculation)
{
    moe_layer_desc layer;
    size_t size;
    char *json = read_config("deepseek_v3.json", &size);
    REQUIRE(json != NULL);
    CHECK_OK(moe_layer_from_config(json, size, NULL, 0, 61, &layer, &err)); // num_nextn_predict_layers is 1
    CHECK_EQ(layer.num_experts, 256);
    CHECK_ERR(moe_layer_from_config(json, size, NULL, 0, 62, &layer, &err), MOE_ERROR_MISSING, "layer_index");
    free(json);
}

TEST(where_files_lie_follows_the_family)
{
    static const struct { const char *file; int32_t layer, halves, layout; } cases[] = {
        { "mixtral.json", 0, MOE_HALVES_SEPARATE, MOE_LAYOUT_MAJOR_K },
        { "llama4.json", 0, MOE_HALVES_GATE_UP, MOE_LAYOUT_MAJOR_MN },
        { "gpt_oss.json", 0, MOE_HALVES_INTERLEAVED, MOE_LAYOUT_MAJOR_K }, // MXFP4; converted files are input-major
        { "inkling.json", 2, MOE_HALVES_INTERLEAVED, MOE_LAYOUT_MAJOR_K },
        { "gemma4.json", 0, MOE_HALVES_GATE_UP, MOE_LAYOUT_MAJOR_K },
        { "qwen3_vl_moe.json", 0, MOE_HALVES_GATE_UP, MOE_LAYOUT_UNSET }, // two layouts under one name
        { "dbrx.json", 0, MOE_HALVES_SEPARATE, MOE_LAYOUT_UNSET },        // down lies otherwise than gate and up
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        moe_layer_desc layer;
        size_t size;
        char *json = read_config(cases[i].file, &size);
        REQUIRE(json != NULL);
        CHECK_OK(moe_layer_from_config(json, size, NULL, 0, cases[i].layer, &layer, &err));
        CHECK_EQ(layer.source.halves, cases[i].halves);
        CHECK_EQ(layer.source.layout, cases[i].layout);
        free(json);
    }
}

TEST(image_tokens_of_deepseek_v41_use_the_second_bias)
{
    moe_layer_desc layer;
    CHECK_OK(layer_of("{\"model_type\":\"deepseek_v41\",\"hidden_size\":8,\"moe_intermediate_size\":8,"
                      "\"n_routed_experts\":16,"
                      "\"num_experts_per_tok\":2,\"image_sentinel_lo\":1000,\"num_hash_layers\":1,"
                      "\"vocab_size\":2000}", 0,
                      &layer));
    CHECK_EQ(layer.routing.marked_token_lo, 1000);
    CHECK_EQ(layer.routing.marked_token_hi, 1005);
    CHECK_EQ(layer.routing.bias_rows, 2);
    CHECK_EQ(layer.routing.forced_rows, 2000);
}

TEST(the_router_of_gemma4_and_the_two_widths_of_latent_experts_are_told)
{
    moe_layer_desc layer;
    size_t size;
    char *json = read_config("gemma4.json", &size);
    REQUIRE(json != NULL);
    CHECK_OK(moe_layer_from_config(json, size, NULL, 0, 0, &layer, &err));
    CHECK_EQ(layer.router.rms_norm, 1);
    CHECK_EQ(layer.router.input_scale, 1);
    CHECK_NEAR(layer.router.input_multiplier * layer.router.input_multiplier * 2816, 1, 1e-5);
    free(json);
    json = read_config("nemotron_h_super.json", &size);
    REQUIRE(json != NULL);
    CHECK_OK(moe_layer_from_config(json, size, NULL, 0, 1, &layer, &err));
    CHECK_EQ(layer.hidden_size, 1024);
    CHECK_EQ(layer.router.input_size, 4096);
    free(json);
}

TEST(facts_tell_key_nesting_and_default)
{
    moe_fact facts[64];
    int32_t count = 0, seen = 0;
    size_t size;
    char *json = read_config("qwen3_5_moe.min.json", &size);
    REQUIRE(json != NULL);
    REQUIRE_OK(moe_facts_from_config(json, size, NULL, 0, 0, facts, 64, &count, &err));
    for (int32_t i = 0; i < count; i++) {
        if (strcmp(facts[i].name, "routing.top_k") == 0) {
            CHECK_STR(facts[i].source, "text_config.num_experts_per_tok");
            CHECK_STR(facts[i].value, "8");
            seen++;
        }
        if (strcmp(facts[i].name, "activation.kind") == 0) {
            CHECK_STR(facts[i].source, "default of qwen3_5_moe_text");
            seen++;
        }
    }
    CHECK_EQ(seen, 2);
    CHECK_OK(moe_facts_from_config(json, size, NULL, 0, 0, facts, 1, &count, &err)); // counts all, writes one
    CHECK(count > 10);
    CHECK_OK(moe_facts_from_config(json, size, NULL, 0, 0, NULL, 0, &count, &err));
    CHECK(count > 10);
    free(json);
}

TEST(wrong_arguments_are_refused_by_name)
{
    moe_layer_desc layer;
    moe_tensor_name what;
    moe_fact fact;
    int32_t count;
    CHECK_ERR(moe_layer_from_config(NULL, 0, NULL, 0, 0, &layer, &err), MOE_ERROR_ARGUMENT, "json");
    CHECK_ERR(moe_layer_from_config("{}", 2, NULL, 4, 0, &layer, &err), MOE_ERROR_ARGUMENT, "quant_json");
    CHECK_ERR(moe_layer_from_config("{}", 2, NULL, 0, -1, &layer, &err), MOE_ERROR_ARGUMENT, "layer_index");
    CHECK_ERR(moe_layer_from_config("{}", 2, NULL, 0, 0, NULL, &err), MOE_ERROR_ARGUMENT, "out");
    CHECK_ERR(moe_facts_from_config("{}", 2, NULL, 0, 0, NULL, 1, &count, &err), MOE_ERROR_ARGUMENT, "facts");
    CHECK_ERR(moe_facts_from_config("{}", 2, NULL, 0, 0, &fact, -1, &count, &err), MOE_ERROR_ARGUMENT, "capacity");
    CHECK_ERR(moe_facts_from_config("{}", 2, NULL, 0, 0, &fact, 1, NULL, &err), MOE_ERROR_ARGUMENT, "count");
    CHECK_ERR(moe_tensor_from_name(NULL, &what, &err), MOE_ERROR_ARGUMENT, "name");
    CHECK_ERR(moe_tensor_from_name("x", NULL, &err), MOE_ERROR_ARGUMENT, "out");
    CHECK_EQ(moe_layer_from_config(NULL, 0, NULL, 0, 0, &layer, NULL), MOE_ERROR_ARGUMENT);
}

// ---- tensor names --------------------------------------------------------------------------------------------------

TEST(tensor_names_of_every_scheme_are_understood)
{
    static const struct { const char *name; int32_t layer, expert, role, part, index; } cases[] = {
        { "model.layers.7.mlp.experts.12.up_proj.weight", 7, 12, MOE_TENSOR_UP, MOE_PART_DATA, -1 },
        { "model.layers.0.block_sparse_moe.experts.3.w1.weight", 0, 3, MOE_TENSOR_GATE, 0, -1 },
        { "model.layers.0.block_sparse_moe.experts.3.w2.weight", 0, 3, MOE_TENSOR_DOWN, 0, -1 },
        { "model.layers.0.block_sparse_moe.experts.3.w3.weight", 0, 3, MOE_TENSOR_UP, 0, -1 },
        { "model.layers.3.mlp.experts.255.gate_proj.weight_scale_inv", 3, 255, MOE_TENSOR_GATE, MOE_PART_SCALE, -1 },
        { "model.layers.3.mlp.experts.255.down_proj.weight_scale_2", 3, 255, MOE_TENSOR_DOWN, MOE_PART_GLOBAL_SCALE,
         -1 },
        { "model.layers.3.mlp.experts.1.down_proj.weight_packed", 3, 1, MOE_TENSOR_DOWN, MOE_PART_DATA, -1 },
        { "model.layers.3.mlp.experts.1.down_proj.weight_shape", 3, 1, MOE_TENSOR_DOWN, MOE_PART_SHAPE, -1 },
        { "model.layers.3.mlp.experts.1.down_proj.weight_global_scale", 3, 1, MOE_TENSOR_DOWN,
          MOE_PART_GLOBAL_SCALE_RECIPROCAL, -1 },
        { "model.layers.3.mlp.experts.1.up_proj.input_global_scale", 3, 1, MOE_TENSOR_UP,
         MOE_PART_INPUT_SCALE_RECIPROCAL, -1 },
        { "model.layers.3.mlp.experts.1.up_proj.input_scale", 3, 1, MOE_TENSOR_UP, MOE_PART_INPUT_SCALE, -1 },
        { "model.layers.5.mlp.experts.gate_up_proj_blocks", 5, -1, MOE_TENSOR_GATE_UP, MOE_PART_DATA, -1 },
        { "model.layers.5.mlp.experts.gate_up_proj_scales", 5, -1, MOE_TENSOR_GATE_UP, MOE_PART_SCALE, -1 },
        { "model.layers.5.mlp.experts.gate_up_proj_bias", 5, -1, MOE_TENSOR_GATE_UP_BIAS, MOE_PART_DATA, -1 },
        { "model.layers.5.mlp.experts.down_proj_bias", 5, -1, MOE_TENSOR_DOWN_BIAS, MOE_PART_DATA, -1 },
        { "model.layers.5.mlp.router.bias", 5, -1, MOE_TENSOR_ROUTER_BIAS, 0, -1 },
        { "model.language_model.layers.4.mlp.experts.gate_up_proj", 4, -1, MOE_TENSOR_GATE_UP, 0, -1 },
        { "language_model.model.layers.4.feed_forward.experts.down_proj", 4, -1, MOE_TENSOR_DOWN, 0, -1 },
        { "language_model.model.layers.4.feed_forward.shared_expert.gate_proj.weight", 4, -1, MOE_TENSOR_SHARED_GATE, 0,
         -1 },
        { "thinker.model.layers.4.mlp.gate.weight", 4, -1, MOE_TENSOR_ROUTER, 0, -1 },
        { "layers.2.ffn.gate.tid2eid", 2, -1, MOE_TENSOR_FORCED_IDS, 0, -1 },
        { "layers.2.ffn.gate.bias", 2, -1, MOE_TENSOR_SELECT_BIAS, 0, 0 },
        { "layers.2.ffn.gate.bias_vl", 2, -1, MOE_TENSOR_SELECT_BIAS, 0, 1 },
        { "layers.2.ffn.experts.11.w1.scale", 2, 11, MOE_TENSOR_GATE, MOE_PART_SCALE, -1 },
        { "layers.9.experts.11.w3.weight", 9, 11, MOE_TENSOR_UP, 0, -1 },
        { "layers.9.gate.weight", 9, -1, MOE_TENSOR_ROUTER, 0, -1 },
        { "backbone.layers.1.mixer.experts.7.up_proj.weight", 1, 7, MOE_TENSOR_UP, 0, -1 },
        { "backbone.layers.1.mixer.gate.e_score_correction_bias", 1, -1, MOE_TENSOR_SELECT_BIAS, 0, 0 },
        { "transformer.blocks.39.ffn.experts.mlp.v1", 39, -1, MOE_TENSOR_UP, 0, -1 },
        { "transformer.blocks.39.ffn.router.layer.weight", 39, -1, MOE_TENSOR_ROUTER, 0, -1 },
        { "model.layers.1.block_sparse_moe.input_linear.weight", 1, -1, MOE_TENSOR_GATE_UP, 0, -1 },
        { "model.layers.1.shared_mlp.output_linear.weight", 1, -1, MOE_TENSOR_SHARED_DOWN, 0, -1 },
        { "model.layers.1.moe.gate_proj.weight", 1, -1, MOE_TENSOR_GATE, 0, -1 },
        { "model.layers.1.moe.router_bias", 1, -1, MOE_TENSOR_SELECT_BIAS, 0, 0 },
        { "model.layers.1.share_expert.up_proj.weight", 1, -1, MOE_TENSOR_SHARED_UP, 0, -1 },
        { "model.layers.1.mlp.moe_statics.e_score_correction_bias", 1, -1, MOE_TENSOR_SELECT_BIAS, 0, 0 },
        { "model.layers.1.mlp.expert_bias", 1, -1, MOE_TENSOR_SELECT_BIAS, 0, 0 },
        { "model.layers.1.mlp.gate.wg.weight", 1, -1, MOE_TENSOR_ROUTER, 0, -1 },
        { "model.layers.1.mlp.shared_expert_gate.weight", 1, -1, MOE_TENSOR_SHARED_TOKEN_GATE, 0, -1 },
        { "model.language_model.layers.1.router.per_expert_scale", 1, -1, MOE_TENSOR_PER_EXPERT_SCALE, 0, -1 },
        { "model.language_model.layers.1.router.scale", 1, -1, MOE_TENSOR_ROUTER_INPUT_SCALE, 0, -1 },
        { "model.llm.layers.1.mlp.gate.global_scale", 1, -1, MOE_TENSOR_ROUTER_GLOBAL_SCALE, 0, -1 },
        { "model.language_model.layers.1.mlp.experts.post_expert_norm.weight", 1, -1, MOE_TENSOR_ROW_NORM, 0, -1 },
        { "model.layers.1.mlp.experts.9.approx_value", 1, 9, MOE_TENSOR_CONSTANT, 0, -1 },
        { "language_model.model.layers.1.mlp.experts.fc1.weight", 1, -1, MOE_TENSOR_GATE_UP, 0, -1 },
        { "model.layers.1.mlp.experts.gate_up_proj_weight_scale_2", 1, -1, MOE_TENSOR_GATE_UP, MOE_PART_GLOBAL_SCALE,
         -1 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        moe_tensor_name what;
        if (moe_tensor_from_name(cases[i].name, &what, &err) != MOE_OK || what.layer != cases[i].layer ||
            what.expert != cases[i].expert || what.role != cases[i].role || what.part != cases[i].part ||
            what.index != cases[i].index)
            test_fail2(__FILE__, __LINE__, "misread", cases[i].name);
    }
}

TEST(names_of_other_tensors_are_refused)
{
    static const char *const names[] = {
        "", "model", "model.layers.", "model.layers.x.mlp.experts.0.up_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.experts.x.up_proj.weight", "model.layers.1.mlp.experts.00.up_proj.weight",
        "model.layers.01.mlp.experts.0.up_proj.weight", "model.layers.-1.mlp.experts.0.up_proj.weight",
        "model.layers.99999999999.mlp.experts.0.up_proj.weight",
        "model.layers.1.mlp.experts.99999999999.up_proj.weight",
        "model.layers.1.mlp.experts.1.up_proj.weight.more", "model.layers.1.mlp.experts.1.up_proj.qzeros",
        "mtp.layers.0.mlp.experts.0.up_proj.weight", "model.visual.blocks.0.mlp.experts.0.up_proj.weight",
        "vision_model.layers.0.mlp.gate.weight", "talker.model.layers.0.mlp.gate.weight", "lm_head.weight",
        "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.shared_experts.gate_proj.bias",
        "model.layers.1.mlp.gate.e_score_correction_biased",
    };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        moe_tensor_name what;
        if (moe_tensor_from_name(names[i], &what, &err) != MOE_ERROR_MISSING)
            test_fail2(__FILE__, __LINE__, "taken for a tensor of a MoE layer", names[i]);
        CHECK_EQ(what.role, MOE_TENSOR_UNSET);
    }
}

TEST_MAIN(
    T(every_family_gives_the_layer_that_its_own_code_means)
    T(every_fact_has_a_value_and_a_source_and_is_told_once)
    T(every_quantisation_config_gives_its_format_or_a_refusal)
    T(scales_of_the_type_ue8m0_are_told)
    T(layers_that_quantisation_excepts_keep_the_models_type)
    T(a_truncated_config_is_an_error_or_the_same_layer)
    T(a_key_of_the_wrong_type_is_refused_or_ignored_but_never_misread)
    T(refusals_name_the_key_with_its_nesting_and_the_value)
    T(an_unknown_model_is_inferred_from_its_keys_or_refused_by_the_keys_that_decide)
    T(layers_behind_the_model_are_those_of_its_speculation)
    T(where_files_lie_follows_the_family)
    T(image_tokens_of_deepseek_v41_use_the_second_bias)
    T(the_router_of_gemma4_and_the_two_widths_of_latent_experts_are_told)
    T(facts_tell_key_nesting_and_default)
    T(wrong_arguments_are_refused_by_name)
    T(tensor_names_of_every_scheme_are_understood)
    T(names_of_other_tensors_are_refused)
)
