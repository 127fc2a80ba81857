// gpu_router.c - the router's own product on the device gives the CPU's logits to the bit
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "gpu.h"

typedef struct product {
    pair p;
    int tokens, held;
    int64_t stride; // of x
    size_t x_bytes, words;
    void *x;
    float *want, *got;
} product;

static void product_free(product *r)
{
    free(r->x);
    free(r->want);
    free(r->got);
    pair_close(&r->p);
}

static int product_open(product *r, int experts, int input, uint64_t seed)
{
    moe_routing_desc routing = preset(MOE_ROUTING_RENORMALIZE, 1);
    int dtype = or_else(r->p.desc.x_dtype, MOE_DTYPE_BF16);
    int64_t stride = r->stride > 0 ? r->stride : input, count = r->tokens > 0 ? (r->tokens - 1) * stride + input : 0;
    r->p.router = 1;
    r->p.layer.router.input_size = input;
    r->p.seed = seed;
    if (r->p.desc.max_tokens == 0) r->p.desc.max_tokens = r->tokens > 0 ? r->tokens : 1;
    if (!pair_make(&r->p, &routing, experts)) return 0;
    r->x_bytes = (size_t)count * dtype_size(dtype);
    r->x = malloc(r->x_bytes + 4);
    for (int64_t i = 0; i < count; i++) moe__store(r->x, dtype, i, test_random_float(&seed) * 2);
    r->words = (size_t)r->tokens * (size_t)experts;
    r->want = (float *)malloc(r->words * 4 + 4);
    r->got = (float *)malloc(r->words * 4 + 4);
    memset(r->want, GPU_POISON, r->words * 4);
    return 1;
}

static void product_args(const product *r, int side, moe_execute_args *args)
{
    memset(args, 0, sizeof *args);
    args->input_mode = MOE_INPUT_LOGITS;
    args->num_tokens = r->tokens;
    args->x_stride = r->stride;
    args->workspace_bytes = r->p.info[side].workspace_bytes;
}

static void product_run(product *r, const char *what)
{
    moe_execute_args args;
    unsigned char *memory = (unsigned char *)malloc((size_t)r->p.info[0].workspace_bytes + 256);
    uint32_t faults[MOE_FAULTS] = { 9, 9, 9, 9 }, zero[MOE_FAULTS] = { 0 };
    int32_t held = r->held;
    float *out;
    product_args(r, 0, &args);
    args.x = r->x;
    args.num_tokens_dev = held > 0 ? &held : NULL;
    args.workspace = memory + (256 - (uintptr_t)memory % 256) % 256;
    CHECK_EQ(moe_router_logits(r->p.plan[0], r->p.weights[0], &args, r->want, NULL), MOE_OK);
    free(memory);
    product_args(r, 1, &args);
    args.x = gpu_copy(r->x, r->x_bytes);
    args.num_tokens_dev = held > 0 ? (const int32_t *)gpu_copy(&held, 4) : NULL;
    args.workspace = gpu_make_raw((size_t)r->p.info[1].workspace_bytes);
    args.out_faults = (uint32_t *)gpu_make(sizeof faults);
    out = (float *)gpu_make(r->words * 4);
    CHECK_EQ(moe_router_logits(r->p.plan[1], r->p.weights[1], &args, out, NULL), MOE_OK);
    gpu_get(r->got, out, r->words * 4);
    if (r->tokens > 0) {
        gpu_get(faults, args.out_faults, sizeof faults);
        CHECK(memcmp(faults, zero, sizeof zero) == 0);
    }
    for (size_t i = 0; i < r->words; i++)
        if (moe__f32_bits(r->want[i]) != moe__f32_bits(r->got[i])) {
            char text[160];
            snprintf(text, sizeof text, "%.80s: logit %d is %.9g, not %.9g", what, (int)i, (double)r->got[i],
                     (double)r->want[i]);
            test_fail(__FILE__, __LINE__, text);
            break;
        }
    gpu_release();
}

TEST(every_type_and_size)
{
    static const int dtypes[] = { MOE_DTYPE_BF16, MOE_DTYPE_F16, MOE_DTYPE_F32 };
    static const int inputs_of[] = { 1, 8, 15, 16, 17, 32, 40, 100, 256, 1000 };
    static const int experts[] = { 1, 8, 33, 64, 130 };
    static const int tokens[] = { 1, 2, 5, 8, 9, 17, 0 };
    if (!gpu_open()) return;
    for (int i = 0; i < 30; i++) {
        product r = { 0 };
        char text[80];
        r.tokens = tokens[i % 7];
        r.p.desc.x_dtype = dtypes[i % 3];
        if (i % 4 == 3) r.stride = inputs_of[i % 10] + 3;
        snprintf(text, sizeof text, "H %d, E %d, T %d, %s", inputs_of[i % 10], experts[i % 5], r.tokens,
                 moe_dtype_string(dtypes[i % 3]));
        if (product_open(&r, experts[i % 5], inputs_of[i % 10], (uint64_t)i + 3)) product_run(&r, text);
        product_free(&r);
    }
}

TEST(norm_scale_multiplier_and_bias)
{
    if (!gpu_open()) return;
    for (int variant = 0; variant < 16; variant++) {
        product r = { 0 };
        char text[80];
        r.tokens = 5;
        r.p.layer.router.rms_norm = variant & 1;
        r.p.layer.router.norm_epsilon = variant & 1 ? 1e-6f : 0;
        r.p.layer.router.input_scale = variant >> 1 & 1;
        r.p.layer.router.input_multiplier = variant & 4 ? 0.125f : 0;
        r.p.layer.router.bias = variant >> 3 & 1;
        snprintf(text, sizeof text, "variant %d", variant);
        if (product_open(&r, 24, variant % 3 == 0 ? 72 : 130, 5)) product_run(&r, text);
        product_free(&r);
    }
}

// A matrix of bf16 values is kept as bf16; one value that is none makes it f32.
TEST(the_matrix_keeps_its_values)
{
    if (!gpu_open()) return;
    for (int i = 0; i < 6; i++) { // values of f32, one of it, of bf16; and layers that say what they are
        static const int narrows[] = { 0, 1, 2, 0, 2, 2 };
        static const int dtypes[] = { 0, 0, 0, MOE_DTYPE_F32, MOE_DTYPE_F32, MOE_DTYPE_BF16 };
        int narrow = narrows[i];
        product r = { 0 };
        r.tokens = 3;
        r.p.layer.router.dtype = dtypes[i];
        if (product_open(&r, 16, 64, 5)) {
            for (int side = 0; side < 2; side++) { // weights of our own instead of the random ones
                moe_error err;
                float matrix[16 * 64];
                moe_weights *weights = NULL;
                uint64_t seed = 8;
                for (int j = 0; j < 16 * 64; j++)
                    matrix[j] = moe__bf16_to_f32(moe__f32_to_bf16(test_random_float(&seed))) +
                                (narrow == 0 || (narrow == 1 && j == 1023) ? 1e-4f : 0);
                memset(&err, 0, sizeof err);
                CHECK_OK(moe_weights_create(side == 0 ? gpu.cpu : gpu.ctx, &r.p.layer, NULL, &weights, &err));
                CHECK_OK(pair_experts(&r.p, weights, &err));
                CHECK_OK(pair_tensor(weights, MOE_TENSOR_ROUTER, -1, 2, 16, 64, 0, MOE_DTYPE_F32, matrix, &err));
                CHECK_OK(moe_weights_seal(weights, &err));
                moe_weights_destroy(r.p.weights[side]);
                r.p.weights[side] = weights;
            }
            CHECK_EQ(r.p.weights[1]->device.router_bf16, narrow == 2 && dtypes[i] != MOE_DTYPE_F32);
            CHECK_EQ(r.p.plan[1]->stages.kernel[MOE__KERNEL_ROUTER_F32] != NULL, dtypes[i] != MOE_DTYPE_BF16);
            CHECK_EQ(r.p.plan[1]->stages.kernel[MOE__KERNEL_ROUTER_BF16] != NULL, dtypes[i] != MOE_DTYPE_F32);
            product_run(&r, narrow == 2 ? "bf16" : "f32");
        }
        product_free(&r);
    }
}

TEST(many_tokens_and_wide_inputs)
{
    static const int sizes[][3] = { { 40, 128, 512 }, { 64, 16, 64 }, { 1, 64, 2048 }, { 1, 256, 7168 },
                                    { 8, 128, 4096 }, { 100, 256, 7168 }, { 1000, 256, 2048 }, { 8192, 128, 4096 },
                                    { 3, 2048, 1000 }, { 1, 8, 1048576 } };
    if (!gpu_open()) return;
    for (int i = 0; i < (gpu_large() ? 10 : 3); i++) {
        product r = { 0 };
        char text[80];
        r.tokens = sizes[i][0];
        snprintf(text, sizeof text, "T %d, E %d, H %d", sizes[i][0], sizes[i][1], sizes[i][2]);
        if (product_open(&r, sizes[i][1], sizes[i][2], (uint64_t)i + 30)) product_run(&r, text);
        product_free(&r);
    }
}

// The product runs for as many tokens as the device says; rows past them stay as they were.
TEST(the_number_of_tokens_is_read_on_the_device)
{
    static const int held[] = { 1, 6, 11 };
    if (!gpu_open()) return;
    for (int i = 0; i < 3; i++) {
        product r = { 0 };
        r.tokens = 11;
        r.held = held[i];
        if (product_open(&r, 24, 64, 5)) product_run(&r, "held");
        product_free(&r);
    }
}

TEST(what_the_cpu_refuses_is_refused)
{
    product r = { 0 };
    moe_execute_args good, args;
    float *out;
    if (!gpu_open()) return;
    r.tokens = 3;
    if (product_open(&r, 16, 64, 5)) {
        product_args(&r, 1, &good);
        good.x = gpu_copy(r.x, r.x_bytes);
        good.workspace = gpu_make((size_t)r.p.info[1].workspace_bytes);
        out = (float *)gpu_make(r.words * 4);
#define REFUSED(statement) \
    do { \
        args = good; \
        statement; \
        CHECK_EQ(moe_router_logits(r.p.plan[1], r.p.weights[1], &args, out, NULL), MOE_ERROR_ARGUMENT); \
    } while (0)
        REFUSED(args.x = NULL);
        REFUSED(args.x = (const char *)good.x + 1);
        REFUSED(args.x_stride = 63);
        REFUSED(args.num_tokens = 4);
        REFUSED(args.workspace_bytes = 0);
        REFUSED(args.x_scale = good.x);
#undef REFUSED
        CHECK_EQ(moe_router_logits(r.p.plan[1], r.p.weights[1], &good, NULL, NULL), MOE_ERROR_ARGUMENT);
        CHECK_EQ(moe_router_logits(r.p.plan[1], r.p.weights[1], &good, (float *)(void *)((char *)out + 2), NULL),
                 MOE_ERROR_ARGUMENT);
        gpu_release();
    }
    product_free(&r);
}

TEST_MAIN(
    T(every_type_and_size)
    T(norm_scale_multiplier_and_bias)
    T(the_matrix_keeps_its_values)
    T(many_tokens_and_wide_inputs)
    T(the_number_of_tokens_is_read_on_the_device)
    T(what_the_cpu_refuses_is_refused)
)
