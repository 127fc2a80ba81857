// gpu_fallback.c - without NVRTC and without a cache, embedded PTX gives the CPU's words; where there is none, an error
// says what was tried
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "gpu.h"

static const moe_jit_desc no_compiler = { .nvrtc_library = "/nowhere/libnvrtc.so.13", .cache_mode = MOE_CACHE_OFF };

static int fallback_open(void) { return gpu_open_with(&no_compiler); }

static void check_both(const pair *p, const call *given, const char *what)
{
    call c = *given;
    char text[120];
    snprintf(text, sizeof text, "%.60s, route", what);
    CHECK_CALL(p, &c, text);
    c.tile = 16;
    snprintf(text, sizeof text, "%.60s, permute", what);
    CHECK_CALL(p, &c, text);
}

TEST(routing_and_permuting)
{
    static const int experts[] = { 8, 40, 128, 200, 256, 384, 512 };
    static const int tokens[] = { 1, 9, 33, 17, 65, 5, 12 };
    if (!fallback_open()) return;
    for (int i = 0; i < 7; i++) {
        moe_routing_desc r = preset(i % 2 == 0 ? MOE_ROUTING_RENORMALIZE : MOE_ROUTING_DEEPSEEK_V3, 4);
        pair p = { 0 };
        inputs in = { 0 };
        char text[60];
        p.desc.max_tokens = tokens[i];
        if (!pair_make(&p, &r, experts[i])) continue;
        CHECK(p.plan[1]->stages.ptx);
        snprintf(text, sizeof text, "E %d, T %d", experts[i], tokens[i]);
        inputs_logits(&in, &p, tokens[i], 256, 7);
        check_both(&p, &in.c, text);
        inputs_free(&in);
        inputs_ids(&in, &p, tokens[i], i % 2, 0, 9);
        check_both(&p, &in.c, text);
        inputs_free(&in);
        pair_close(&p);
    }
}

static void check_router(int experts, int tokens, float grain)
{
    moe_routing_desc routing = preset(MOE_ROUTING_RENORMALIZE, 1);
    moe_execute_args args;
    pair p = { 0 };
    float x[40 * 48], want[40 * 64], got[40 * 64], *out;
    unsigned char *memory;
    uint64_t seed = 5;
    p.router = 1;
    p.layer.router.input_size = 48;
    p.desc.x_dtype = MOE_DTYPE_F32;
    p.desc.max_tokens = tokens;
    if (!pair_make(&p, &routing, experts)) return;
    for (int i = 0; i < tokens * 48; i++) x[i] = test_random_float(&seed) * grain;
    memset(&args, 0, sizeof args);
    args.input_mode = MOE_INPUT_LOGITS;
    args.num_tokens = tokens;
    args.x = x;
    args.workspace_bytes = p.info[0].workspace_bytes;
    memory = (unsigned char *)malloc((size_t)args.workspace_bytes + 256);
    args.workspace = memory + (256 - (uintptr_t)memory % 256) % 256;
    CHECK_EQ(moe_router_logits(p.plan[0], p.weights[0], &args, want, NULL), MOE_OK);
    free(memory);
    args.x = gpu_copy(x, (size_t)tokens * 48 * 4);
    args.workspace_bytes = p.info[1].workspace_bytes;
    args.workspace = gpu_make_raw((size_t)args.workspace_bytes);
    out = (float *)gpu_make((size_t)(tokens * experts) * 4);
    CHECK_EQ(moe_router_logits(p.plan[1], p.weights[1], &args, out, NULL), MOE_OK);
    gpu_get(got, out, (size_t)(tokens * experts) * 4);
    CHECK(memcmp(want, got, (size_t)(tokens * experts) * 4) == 0);
    gpu_release();
    pair_close(&p);
}

TEST(router_logits)
{
    if (!fallback_open()) return;
    check_router(24, 3, 2);
    check_router(64, 40, 1);
}

// Whole layers of bf16: the bits of the reference, whose sums of these values are exact.
static void check_layer(int activation, int out_dtype, int tokens)
{
    enum { H = 72, SLOTS = 2 };
    moe_reference_layer_args r;
    moe_execute_args args;
    pair p = { 0 };
    float *x = (float *)malloc((size_t)tokens * H * 4), *want = (float *)malloc((size_t)tokens * H * 4);
    float *weights = (float *)malloc((size_t)tokens * SLOTS * 4);
    int32_t *ids = (int32_t *)malloc((size_t)tokens * SLOTS * 4);
    uint16_t *narrow = (uint16_t *)malloc((size_t)tokens * H * 2);
    uint8_t *got = (uint8_t *)malloc((size_t)tokens * H * 4);
    uint64_t seed = 11;
    int bytes = moe_dtype_bits(out_dtype) / 8, wrong = 0;
    p.layer.hidden_size = H;
    p.layer.intermediate_size = 40;
    p.layer.format = MOE_FORMAT_BF16;
    p.layer.activation.kind = activation;
    p.layer.shared.count = 1;
    p.layer.shared.intermediate_size = 40;
    p.layer.shared.gate = 1;
    p.desc.max_tokens = tokens;
    p.desc.out_dtype = out_dtype;
    p.router = 1;
    if (pair_make(&p, &(moe_routing_desc){ .score = MOE_SCORE_SOFTMAX, .score_order = MOE_SCORE_BEFORE_TOPK,
                                           .top_k = SLOTS }, 6)) {
        CHECK(p.plan[1]->stages.ptx && p.plan[1]->sets.count == 1);
        for (int i = 0; i < tokens * H; i++) {
            x[i] = (float)((int)(test_random_u32(&seed) % 9) - 4) * 0.25f;
            narrow[i] = moe__f32_to_bf16(x[i]);
        }
        for (int i = 0; i < tokens * SLOTS; i++) {
            ids[i] = (int32_t)(test_random_u32(&seed) % 7) - 1;
            weights[i] = (float)(test_random_u32(&seed) % 8) * 0.125f;
        }
        memset(&r, 0, sizeof r);
        r.num_tokens = tokens;
        r.rows_dtype = MOE_DTYPE_BF16;
        r.x = x;
        r.ids = ids;
        r.weights = weights;
        r.rows = moe_weights_row;
        r.rows_user = p.weights[0];
        r.out = want;
        CHECK_OK(moe_reference_layer(&p.layer, &r, &err));
        memset(&args, 0, sizeof args);
        args.input_mode = MOE_INPUT_IDS;
        args.num_tokens = tokens;
        args.x = gpu_copy(narrow, (size_t)tokens * H * 2);
        args.ids = gpu_copy(ids, (size_t)tokens * SLOTS * 4);
        args.weights = gpu_copy(weights, (size_t)tokens * SLOTS * 4);
        args.out = gpu_make((size_t)(tokens * H * bytes));
        args.workspace_bytes = p.info[1].workspace_bytes;
        args.workspace = gpu_make_raw((size_t)args.workspace_bytes);
        CHECK_OK(moe_execute_check(p.plan[1], p.weights[1], &args, &err));
        CHECK_EQ(moe_execute(p.plan[1], p.weights[1], &args, NULL), MOE_OK);
        gpu_get(got, args.out, (size_t)(tokens * H * bytes));
        for (int i = 0; i < tokens * H; i++)
            wrong += moe__load(got, out_dtype, i) != moe__round_to(want[i], out_dtype);
        CHECK_EQ(wrong, 0);
        gpu_release();
        pair_close(&p);
    }
    free(x);
    free(want);
    free(weights);
    free(ids);
    free(narrow);
    free(got);
}

TEST(layers)
{
    if (!fallback_open()) return;
    check_layer(MOE_ACTIVATION_RELU, MOE_DTYPE_F32, 5);
    check_layer(MOE_ACTIVATION_RELU, MOE_DTYPE_BF16, 70);
}

// Every kernel that a plan would run: of layers with these types of x and output, gated and not, and no other.
TEST(what_is_embedded)
{
    static const int out[] = { MOE_DTYPE_BF16, MOE_DTYPE_F32 }, xs[] = { MOE_DTYPE_BF16, MOE_DTYPE_F32, MOE_DTYPE_F16 };
    char names[64][sizeof ((moe__instance *)0)->name];
    int32_t count = 0, used = 0;
    moe__tile_chip chip;
    moe__tile_chip_make(&chip, 80, 108, 166912, 167936, 0, 0);
    for (int i = 0; i < 24; i++) {
        moe_layer_desc layer = { .num_experts = 64, .hidden_size = 64, .intermediate_size = 64 };
        moe_plan_desc plan = { .max_tokens = 5 };
        moe__instance instances[MOE__KERNELS];
        moe__gemm_sets sets;
        int products;
        layer.routing.top_k = 2;
        layer.format = i % 2 == 0 ? MOE_FORMAT_BF16 : MOE_FORMAT_F16;
        layer.activation.kind = i / 2 % 2 == 0 ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_RELU;
        layer.routing.score = MOE_SCORE_SOFTMAX;
        layer.routing.score_order = MOE_SCORE_AFTER_TOPK;
        plan.out_dtype = out[i / 4 % 2];
        plan.x_dtype = xs[i / 8];
        REQUIRE_OK(moe_layer_resolve(&layer, &err));
        moe__sets_ptx(&layer, &plan, &chip, &sets);
        products = layer.format == MOE_FORMAT_BF16 && plan.x_dtype == MOE_DTYPE_BF16;
        CHECK_EQ(sets.count, products);
        moe__instances_ptx(&layer, &plan, &sets, instances);
        for (int k = 0; k < MOE__KERNELS; k++) {
            int at = 0;
            if (instances[k].entry == NULL) continue;
            CHECK(moe__ptx_find(&instances[k]) != NULL);
            while (at < used && strcmp(names[at], instances[k].name) != 0) at++;
            if (at == used) strcpy(names[used++], instances[k].name);
        }
    }
    CHECK(moe__kernel_ptx(&count) != NULL);
    CHECK_EQ(count, used);
}

TEST(a_plan_that_has_none_says_what_was_tried)
{
    moe_routing_desc r = preset(MOE_ROUTING_RENORMALIZE, 4);
    moe_error err;
    pair p = { 0 };
    if (!fallback_open()) return;
    memset(&err, 0, sizeof err);
    p.layer.num_experts = 513;
    p.layer.routing = r;
    p.desc.max_tokens = 4;
    p.seed = 1;
    CHECK_EQ(pair_open(&p, &err), MOE_ERROR_NVRTC);
    CHECK(strstr(err.text, "embedded PTX has no kernel route_e32_sm80") != NULL);
    CHECK(strstr(err.text, "up to 512 experts") != NULL);
    CHECK(strstr(err.text, "/nowhere/libnvrtc.so.13") != NULL);
    CHECK(p.plan[1] == NULL);
    pair_close(&p);
}

TEST_MAIN(
    T(routing_and_permuting)
    T(router_logits)
    T(layers)
    T(what_is_embedded)
    T(a_plan_that_has_none_says_what_was_tried)
)
