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

// Both kernels of the router's product are there, and every one that a plan would run.
TEST(what_is_embedded)
{
    moe_layer_desc layer = { .num_experts = 64, .routing = { .top_k = 2 } };
    moe_plan_desc plan = { .max_tokens = 5 };
    moe__instance instances[MOE__KERNELS];
    int32_t count = 0, used = 0;
    moe__instances_ptx(&layer, &plan, instances);
    for (int i = 0; i < MOE__KERNELS; i++) {
        if (instances[i].entry == NULL) continue;
        used++;
        CHECK(moe__ptx_find(&instances[i]) != NULL);
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
    T(what_is_embedded)
    T(a_plan_that_has_none_says_what_was_tried)
)
