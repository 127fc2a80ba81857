// Numbers and names of other stacks: every cell of the version tables, what lies between and beyond them, and every
// activation name. The tables below are written out release by release, not by the rule that the library uses.
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"

enum { NONE = -100, UNSPECIFIED = -101 }; // no such number; a number that means "unspecified" or "invalid"

typedef struct routing_release {
    int32_t stack;
    const char *versions; // in words separated by spaces
    int32_t number[12];
} routing_release;

#define DEFAULT_TO_NAIVE \
    MOE_ROUTING_DEFAULT, MOE_ROUTING_RENORMALIZE, MOE_ROUTING_DEEPSEEK_V3, MOE_ROUTING_LLAMA4, \
    MOE_ROUTING_RENORMALIZE_NAIVE
static const routing_release routing_releases[] = {
    { MOE_STACK_FLASHINFER, "0.2.10 0.2.10.post1",
      { DEFAULT_TO_NAIVE, UNSPECIFIED, NONE, NONE, NONE, NONE, NONE, NONE } },
    { MOE_STACK_FLASHINFER, "0.2.11 0.2.12 0.2.13",
      { DEFAULT_TO_NAIVE, NONE, NONE, NONE, NONE, NONE, NONE, NONE } },
    { MOE_STACK_FLASHINFER, "0.2.14 0.2.14.post1 0.3.0 0.4.1 0.5.3 0.6.0 0.6.7 0.6.7.post3 v0.6.7",
      { DEFAULT_TO_NAIVE, MOE_ROUTING_TOPK, UNSPECIFIED, NONE, NONE, NONE, NONE, NONE } },
    { MOE_STACK_FLASHINFER, "0.6.8 0.6.8rc1 0.6.9 0.6.10 0.6.10.post2",
      { DEFAULT_TO_NAIVE, MOE_ROUTING_TOPK, MOE_ROUTING_SIGMOID_RENORM, MOE_ROUTING_MINIMAX2, UNSPECIFIED, NONE, NONE,
        NONE } },
    { MOE_STACK_FLASHINFER, "0.6.11 0.6.12 0.6.13 0.6.14 0.6.15 0.6.16 0.6.17 0.6.17+cu129",
      { DEFAULT_TO_NAIVE, MOE_ROUTING_TOPK, MOE_ROUTING_SIGMOID_RENORM, MOE_ROUTING_MINIMAX2, MOE_ROUTING_SIGMOID,
        UNSPECIFIED, NONE, NONE } },
    { MOE_STACK_FLASHINFER, "0.6.18 0.6.18rc1 0.6.19 0.7.0 0.7.1 0.7.2 0.7.2.post1 0.7.2.post1+cu130",
      { DEFAULT_TO_NAIVE, MOE_ROUTING_TOPK, MOE_ROUTING_SIGMOID_RENORM, MOE_ROUTING_MINIMAX2, MOE_ROUTING_SIGMOID,
        MOE_ROUTING_TOPK_SIGMOID, UNSPECIFIED, NONE } },
    { MOE_STACK_VLLM, "0.28.0 0.28 0.29.0 0.30.0 0.31.1 0.32.0 0.33.0 0.33.0rc2",
      { DEFAULT_TO_NAIVE, MOE_ROUTING_TOPK, MOE_ROUTING_SIGMOID_RENORM, MOE_ROUTING_MINIMAX2, MOE_ROUTING_SIGMOID,
        UNSPECIFIED, NONE, NONE } },
    { MOE_STACK_SGLANG, "0.5.16 0.5.17 0.5.18 0.5.19 0.5.20 0.5.21 0.5.22 0.5.23 0.5.23.post1",
      { DEFAULT_TO_NAIVE, MOE_ROUTING_TOPK, MOE_ROUTING_SIGMOID_RENORM, MOE_ROUTING_MINIMAX2, MOE_ROUTING_SIGMOID,
        UNSPECIFIED, NONE, NONE } },
};

// The next word of a list into `word`; NULL at the end.
static const char *next_word(const char *list, char *word)
{
    size_t length = strcspn(list, " ");
    if (length == 0) return NULL;
    memcpy(word, list, length);
    word[length] = 0;
    return list + length + (list[length] == ' ');
}

static void check_routing_cell(int32_t stack, const char *version, int32_t value, int32_t expected)
{
    int32_t method = 12345, result = moe_routing_from_foreign(stack, version, value, &method, &err);
    char text[900];
    if (expected >= 0 ? result == MOE_OK && method == expected && err.code == 0
                      : result == MOE_ERROR_ARGUMENT && method == MOE_ROUTING_UNSPECIFIED &&
                            strcmp(err.member, "value") == 0 && strstr(err.text, version) != NULL &&
                            (strstr(err.text, "unspecified") != NULL) == (expected == UNSPECIFIED))
        return;
    snprintf(text, sizeof text, "stack %d %.40s number %d: %d, %d, %.600s", stack, version, value, result, method,
             err.text);
    test_fail(__FILE__, __LINE__, text);
}

TEST(every_routing_number_of_every_release_is_translated_or_refused)
{
    for (size_t i = 0; i < sizeof routing_releases / sizeof routing_releases[0]; i++) {
        const routing_release *release = &routing_releases[i];
        char version[32];
        for (const char *p = release->versions; (p = next_word(p, version)) != NULL;) {
            for (int32_t n = 0; n < 12; n++) check_routing_cell(release->stack, version, n, release->number[n]);
            for (int32_t n = 12; n < 120; n++)
                check_routing_cell(release->stack, version, n,
                                   release->stack == MOE_STACK_VLLM && n >= 100 && n <= 102 ? n : NONE);
            check_routing_cell(release->stack, version, -1, NONE);
            check_routing_cell(release->stack, version, INT32_MIN, NONE);
        }
    }
}

TEST(vllms_private_numbers_are_deepseek_v4_custom_and_simulated)
{
    int32_t method;
    REQUIRE_OK(moe_routing_from_foreign(MOE_STACK_VLLM, "0.33.0", 100, &method, &err));
    CHECK_EQ(method, (int32_t)MOE_ROUTING_DEEPSEEK_V4);
    REQUIRE_OK(moe_routing_from_foreign(MOE_STACK_VLLM, "0.33.0", 101, &method, &err));
    CHECK_EQ(method, (int32_t)MOE_ROUTING_CUSTOM);
    REQUIRE_OK(moe_routing_from_foreign(MOE_STACK_VLLM, "0.33.0", 102, &method, &err));
    CHECK_EQ(method, (int32_t)MOE_ROUTING_SIMULATED);
}

TEST(nine_is_a_method_to_flashinfer_and_unspecified_to_the_engines_that_pin_it)
{
    int32_t method;
    CHECK_OK(moe_routing_from_foreign(MOE_STACK_FLASHINFER, "0.7.2.post1", 9, &method, &err));
    CHECK_EQ(method, (int32_t)MOE_ROUTING_TOPK_SIGMOID);
    CHECK_ERR(moe_routing_from_foreign(MOE_STACK_VLLM, "0.33.0", 9, &method, &err), MOE_ERROR_ARGUMENT, "value");
    CHECK_ERR(moe_routing_from_foreign(MOE_STACK_SGLANG, "0.5.23", 9, &method, &err), MOE_ERROR_ARGUMENT, "value");
}

TEST(releases_outside_the_tables_are_refused_and_the_known_ones_named)
{
    const struct { int32_t stack; const char *version, *newest; } unknown[] = {
        { MOE_STACK_FLASHINFER, "0.2.9", "0.2.10 to 0.7.2" },  { MOE_STACK_FLASHINFER, "0.1.0", "0.7.2" },
        { MOE_STACK_FLASHINFER, "0.7.3", "0.2.10 to 0.7.2" },  { MOE_STACK_FLASHINFER, "0.8.0rc1", "0.7.2" },
        { MOE_STACK_FLASHINFER, "0.7.10", "0.7.2" },           { MOE_STACK_FLASHINFER, "1.0", "0.7.2" },
        { MOE_STACK_VLLM, "0.27.9", "0.28.0 to 0.33" },        { MOE_STACK_VLLM, "0.34.0", "0.33" },
        { MOE_STACK_VLLM, "1.0.0", "0.33" },                   { MOE_STACK_SGLANG, "0.5.15.post9", "0.5.16 to 0.5.23" },
        { MOE_STACK_SGLANG, "0.5.24", "0.5.23" },              { MOE_STACK_SGLANG, "0.6.0", "0.5.23" },
    };
    for (size_t i = 0; i < sizeof unknown / sizeof unknown[0]; i++) {
        int32_t method = 5;
        CHECK_ERR(moe_routing_from_foreign(unknown[i].stack, unknown[i].version, 0, &method, &err),
                  MOE_ERROR_UNSUPPORTED, "version");
        CHECK_CONTAINS(err.text, unknown[i].newest);
        CHECK_CONTAINS(err.text, unknown[i].version);
        CHECK_EQ(method, (int32_t)MOE_ROUTING_UNSPECIFIED);
    }
}

TEST(what_is_no_version_is_refused)
{
    static const char *const bad[] = { "", "v", "0", "7", "abc", "0.", "0..7", ".7.2", "0.7.2 ", "0.7.2/x", "latest",
                                       "0.7.2\n", "-0.7.2", "0.7.2\xff", "0.99999999999", "0,7,2" };
    moe_activation_desc act;
    int32_t method;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        CHECK_ERR(moe_routing_from_foreign(MOE_STACK_FLASHINFER, bad[i], 0, &method, &err), MOE_ERROR_ARGUMENT,
                  "version");
        CHECK_ERR(moe_activation_from_foreign(MOE_STACK_FLASHINFER, bad[i], 3, &act, &err), MOE_ERROR_ARGUMENT,
                  "version");
    }
}

TEST(illegal_arguments_are_refused_by_name)
{
    moe_activation_desc act;
    int32_t method;
    CHECK_ERR(moe_routing_from_foreign(MOE_STACK_UNSET, "0.7.2", 0, &method, &err), MOE_ERROR_ARGUMENT, "stack");
    CHECK_ERR(moe_routing_from_foreign(4, "0.7.2", 0, &method, &err), MOE_ERROR_ARGUMENT, "stack");
    CHECK_ERR(moe_routing_from_foreign(-1, "0.7.2", 0, &method, &err), MOE_ERROR_ARGUMENT, "stack");
    CHECK_ERR(moe_routing_from_foreign(MOE_STACK_VLLM, NULL, 0, &method, &err), MOE_ERROR_ARGUMENT, "version");
    CHECK_ERR(moe_routing_from_foreign(MOE_STACK_VLLM, "0.33.0", 0, NULL, &err), MOE_ERROR_ARGUMENT, "out_method");
    CHECK_EQ(moe_routing_from_foreign(MOE_STACK_VLLM, "0.34.0", 0, &method, NULL), (int32_t)MOE_ERROR_UNSUPPORTED);
    CHECK_ERR(moe_activation_from_foreign(0, "0.7.2", 0, &act, &err), MOE_ERROR_ARGUMENT, "stack");
    CHECK_ERR(moe_activation_from_foreign(9, "0.7.2", 0, &act, &err), MOE_ERROR_ARGUMENT, "stack");
    CHECK_ERR(moe_activation_from_foreign(MOE_STACK_FLASHINFER, NULL, 0, &act, &err), MOE_ERROR_ARGUMENT, "version");
    CHECK_ERR(moe_activation_from_foreign(MOE_STACK_FLASHINFER, "0.7.2", 0, NULL, &err), MOE_ERROR_ARGUMENT, "out");
}

// ---- activations ----------------------------------------------------------------------------------------------------

typedef struct activation_release {
    const char *versions;
    int32_t number[14];
} activation_release;

#define GELU_TO_RELU2 \
    MOE_ACTIVATION_GELU_ERF, MOE_ACTIVATION_RELU, MOE_ACTIVATION_SILU, MOE_ACTIVATION_SWIGLU, \
    MOE_ACTIVATION_GEGLU_ERF, MOE_ACTIVATION_SWIGLU, MOE_ACTIVATION_RELU2
static const activation_release activation_releases[] = {
    { "0.2.10 0.2.14 0.3.1 0.4.0 0.4.1",
      { MOE_ACTIVATION_SWIGLU, MOE_ACTIVATION_GEGLU_ERF, NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE,
        NONE, NONE } },
    { "0.5.0 0.5.3 0.6.0 0.6.8 0.6.12 0.6.12.post1",
      { GELU_TO_RELU2, MOE_ACTIVATION_IDENTITY, UNSPECIFIED, NONE, NONE, NONE, NONE, NONE } },
    { "0.6.13",
      { GELU_TO_RELU2, MOE_ACTIVATION_SWIGLU_STEP, MOE_ACTIVATION_IDENTITY, UNSPECIFIED, NONE, NONE, NONE, NONE } },
    { "0.6.14 0.6.15",
      { GELU_TO_RELU2, MOE_ACTIVATION_SWIGLU_STEP, MOE_ACTIVATION_GEGLU_TANH, MOE_ACTIVATION_IDENTITY, UNSPECIFIED,
        NONE, NONE, NONE } },
    { "0.6.16 0.6.17 0.6.18 0.6.19",
      { GELU_TO_RELU2, MOE_ACTIVATION_SWIGLU_STEP, MOE_ACTIVATION_GEGLU_TANH, MOE_ACTIVATION_IDENTITY,
        MOE_ACTIVATION_SITU, UNSPECIFIED, NONE, NONE } },
    { "0.7.0 0.7.1 0.7.2 0.7.2.post1",
      { GELU_TO_RELU2, MOE_ACTIVATION_SWIGLU_STEP, MOE_ACTIVATION_GEGLU_TANH, MOE_ACTIVATION_IDENTITY,
        MOE_ACTIVATION_SITU, UNSPECIFIED, MOE_ACTIVATION_RELU2_CLAMP, NONE } },
};

static void check_activation_cell(const char *version, int32_t value, int32_t expected)
{
    moe_activation_desc act;
    int32_t result = moe_activation_from_foreign(MOE_STACK_FLASHINFER, version, value, &act, &err);
    char text[900];
    if (expected >= 0 ? result == MOE_OK && act.kind == expected && err.code == 0
                      : result == MOE_ERROR_ARGUMENT && act.kind == 0 && strcmp(err.member, "value") == 0 &&
                            (strstr(err.text, "invalid") != NULL) == (expected == UNSPECIFIED))
        return;
    snprintf(text, sizeof text, "%.40s number %d: %d, %s, %.600s", version, value, result,
             moe_activation_string(act.kind), err.text);
    test_fail(__FILE__, __LINE__, text);
}

TEST(every_activation_number_of_every_release_is_translated_or_refused)
{
    for (size_t i = 0; i < sizeof activation_releases / sizeof activation_releases[0]; i++) {
        char version[32];
        for (const char *p = activation_releases[i].versions; (p = next_word(p, version)) != NULL;) {
            for (int32_t n = 0; n < 14; n++) check_activation_cell(version, n, activation_releases[i].number[n]);
            check_activation_cell(version, -1, NONE);
            check_activation_cell(version, INT32_MAX, NONE);
        }
    }
}

TEST(constants_of_translated_activations_are_the_stacks_own)
{
    moe_activation_desc act;
    REQUIRE_OK(moe_activation_from_foreign(MOE_STACK_FLASHINFER, "0.7.2", 10, &act, &err));
    CHECK_EQ(act.alpha, 1.0f);
    CHECK_EQ(act.beta, 1.0f);
    REQUIRE_OK(moe_activation_from_foreign(MOE_STACK_FLASHINFER, "0.7.2", 5, &act, &err));
    CHECK_EQ(act.per_expert, 1); // SwigluBias takes alpha, beta and limit from tables
    REQUIRE_OK(moe_activation_from_foreign(MOE_STACK_FLASHINFER, "0.7.2", 3, &act, &err));
    CHECK_EQ(act.per_expert, 0);
    CHECK_EQ(act.limit, 0.0f);
}

TEST(engines_that_name_activations_by_words_are_pointed_to_the_names)
{
    moe_activation_desc act;
    CHECK_ERR(moe_activation_from_foreign(MOE_STACK_VLLM, "0.33.0", 3, &act, &err), MOE_ERROR_UNSUPPORTED, "stack");
    CHECK_CONTAINS(err.text, "moe_activation_from_name");
    CHECK_ERR(moe_activation_from_foreign(MOE_STACK_SGLANG, "0.5.23", 3, &act, &err), MOE_ERROR_UNSUPPORTED, "stack");
    CHECK_CONTAINS(err.text, "SGLang");
}

TEST(activation_releases_outside_the_table_are_refused)
{
    moe_activation_desc act;
    CHECK_ERR(moe_activation_from_foreign(MOE_STACK_FLASHINFER, "0.7.3", 3, &act, &err), MOE_ERROR_UNSUPPORTED,
              "version");
    CHECK_CONTAINS(err.text, "0.2.10 to 0.7.2");
    CHECK_ERR(moe_activation_from_foreign(MOE_STACK_FLASHINFER, "0.2.9", 3, &act, &err), MOE_ERROR_UNSUPPORTED,
              "version");
}

// ---- names ----------------------------------------------------------------------------------------------------------

TEST(activation_names_mean_what_config_files_mean)
{
    static const struct { const char *name; int32_t gated, plain; float alpha, beta, limit; } names[] = {
        { "silu", MOE_ACTIVATION_SWIGLU, MOE_ACTIVATION_SILU, 0, 0, 0 },
        { "swish", MOE_ACTIVATION_SWIGLU, MOE_ACTIVATION_SILU, 0, 0, 0 },
        { "swiglu", MOE_ACTIVATION_SWIGLU, NONE, 0, 0, 0 },
        { "swigluoai", MOE_ACTIVATION_SWIGLU, NONE, 1.702f, 1, 7 },
        { "swigluoai_uninterleave", MOE_ACTIVATION_SWIGLU, NONE, 1.702f, 1, 7 },
        { "swiglustep", MOE_ACTIVATION_SWIGLU_STEP, NONE, 0, 0, 7 },
        { "gelu", MOE_ACTIVATION_GEGLU_ERF, MOE_ACTIVATION_GELU_ERF, 0, 0, 0 },
        { "geglu", MOE_ACTIVATION_GEGLU_ERF, NONE, 0, 0, 0 },
        { "gelu_tanh", MOE_ACTIVATION_GEGLU_TANH, MOE_ACTIVATION_GELU_TANH, 0, 0, 0 },
        { "gelu_pytorch_tanh", MOE_ACTIVATION_GEGLU_TANH, MOE_ACTIVATION_GELU_TANH, 0, 0, 0 },
        { "gelu_new", MOE_ACTIVATION_GEGLU_TANH, MOE_ACTIVATION_GELU_TANH, 0, 0, 0 },
        { "gelu_fast", MOE_ACTIVATION_GEGLU_TANH, MOE_ACTIVATION_GELU_TANH, 0, 0, 0 },
        { "geglu_tanh", MOE_ACTIVATION_GEGLU_TANH, NONE, 0, 0, 0 },
        { "situ", MOE_ACTIVATION_SITU, NONE, 4, 25, 0 },
        { "silu_no_mul", NONE, MOE_ACTIVATION_SILU, 0, 0, 0 },
        { "gelu_no_mul", NONE, MOE_ACTIVATION_GELU_ERF, 0, 0, 0 },
        { "gelu_tanh_no_mul", NONE, MOE_ACTIVATION_GELU_TANH, 0, 0, 0 },
        { "relu", NONE, MOE_ACTIVATION_RELU, 0, 0, 0 },
        { "relu2", NONE, MOE_ACTIVATION_RELU2, 0, 0, 0 },
        { "relu_squared", NONE, MOE_ACTIVATION_RELU2, 0, 0, 0 },
        { "relu2_no_mul", NONE, MOE_ACTIVATION_RELU2, 0, 0, 0 },
        { "identity", NONE, MOE_ACTIVATION_IDENTITY, 0, 0, 0 },
        { "linear", NONE, MOE_ACTIVATION_IDENTITY, 0, 0, 0 },
    };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        for (int32_t gated = 0; gated < 2; gated++) {
            moe_activation_desc act;
            int32_t expected = gated ? names[i].gated : names[i].plain;
            if (expected == NONE) {
                CHECK_ERR(moe_activation_from_name(names[i].name, gated, &act, &err), MOE_ERROR_ARGUMENT, "name");
                CHECK_CONTAINS(err.text, gated ? "which is not gated" : "which is gated");
                CHECK_EQ(act.kind, 0);
                CHECK_EQ(act.limit, 0.0f);
                continue;
            }
            CHECK_OK(moe_activation_from_name(names[i].name, gated, &act, &err));
            CHECK_EQ(act.kind, expected);
            CHECK_EQ(act.alpha, names[i].alpha);
            CHECK_EQ(act.beta, names[i].beta);
            CHECK_EQ(act.limit, names[i].limit);
            CHECK_EQ(moe_activation_is_gated(act.kind), gated);
        }
}

TEST(an_unknown_activation_name_gets_the_list_of_legal_ones)
{
    moe_activation_desc act;
    CHECK_ERR(moe_activation_from_name("mish", 1, &act, &err), MOE_ERROR_ARGUMENT, "name");
    CHECK_CONTAINS(err.text, "\"mish\"");
    CHECK_CONTAINS(err.text, "silu, swish, swiglu, swigluoai, swigluoai_uninterleave, swiglustep, gelu, geglu, "
                             "gelu_tanh, gelu_pytorch_tanh, gelu_new, gelu_fast, geglu_tanh, situ");
    CHECK_ERR(moe_activation_from_name("SiLU", 0, &act, &err), MOE_ERROR_ARGUMENT, "name");
    CHECK_CONTAINS(err.text, "relu2_no_mul, identity, linear");
    CHECK_ERR(moe_activation_from_name("", 1, &act, &err), MOE_ERROR_ARGUMENT, "name");
    CHECK_ERR(moe_activation_from_name(NULL, 1, &act, &err), MOE_ERROR_ARGUMENT, "name");
    CHECK_ERR(moe_activation_from_name("silu", 2, &act, &err), MOE_ERROR_ARGUMENT, "gated");
    CHECK_ERR(moe_activation_from_name("silu", 1, NULL, &err), MOE_ERROR_ARGUMENT, "out");
}

TEST(every_activation_and_method_has_a_name_of_its_own)
{
    for (int32_t a = -1; a < 200; a++) {
        int32_t gated = a >= 1 && a <= 5 ? 1 : a >= 32 && a <= 38 ? 0 : -1;
        CHECK_EQ(moe_activation_is_gated(a), gated);
        CHECK_EQ(strcmp(moe_activation_string(a), "?") == 0, gated < 0);
        CHECK_EQ(strcmp(moe_routing_method_string(a), "?") == 0, (a > 9 && a < 100) || a > 111);
        for (int32_t b = -1; b < a; b++) {
            if (gated >= 0) CHECK(strcmp(moe_activation_string(a), moe_activation_string(b)) != 0);
            if (strcmp(moe_routing_method_string(a), "?") != 0)
                CHECK(strcmp(moe_routing_method_string(a), moe_routing_method_string(b)) != 0);
        }
    }
}

TEST_MAIN(T(every_routing_number_of_every_release_is_translated_or_refused)
          T(vllms_private_numbers_are_deepseek_v4_custom_and_simulated)
          T(nine_is_a_method_to_flashinfer_and_unspecified_to_the_engines_that_pin_it)
          T(releases_outside_the_tables_are_refused_and_the_known_ones_named) T(what_is_no_version_is_refused)
          T(illegal_arguments_are_refused_by_name)
          T(every_activation_number_of_every_release_is_translated_or_refused)
          T(constants_of_translated_activations_are_the_stacks_own)
          T(engines_that_name_activations_by_words_are_pointed_to_the_names)
          T(activation_releases_outside_the_table_are_refused) T(activation_names_mean_what_config_files_mean)
          T(an_unknown_activation_name_gets_the_list_of_legal_ones)
          T(every_activation_and_method_has_a_name_of_its_own))
