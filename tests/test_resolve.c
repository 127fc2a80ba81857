// moe_layer_resolve: every illegal member of a layer is refused by name, and defaults are what the manual says.
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"

static moe_layer_desc layer(void)
{
    moe_layer_desc l;
    memset(&l, 0, sizeof l);
    l.hidden_size = 64;
    l.intermediate_size = 48;
    l.num_experts = 8;
    l.format = MOE_FORMAT_BF16;
    l.activation.kind = MOE_ACTIVATION_SWIGLU;
    l.routing.score = MOE_SCORE_SOFTMAX;
    l.routing.score_order = MOE_SCORE_BEFORE_TOPK;
    l.routing.top_k = 2;
    return l;
}

TEST(zero_members_become_their_defaults)
{
    moe_layer_desc l = layer();
    REQUIRE_OK(moe_layer_resolve(&l, &err));
    CHECK_EQ(l.struct_size, (uint32_t)sizeof l);
    CHECK_EQ(l.activation.alpha, 1.0f);
    CHECK_EQ(l.output_scale, 1.0f);
    CHECK_EQ(l.routing.scale, 1.0f);
    CHECK_EQ(l.routing.logit_multiplier, 1.0f);
    CHECK_EQ(l.parallel.local_experts, 8);
    CHECK_EQ(l.parallel.tp_size, 1);
    CHECK_EQ(l.router.input_size, 64);
    CHECK_EQ(l.router.input_multiplier, 1.0f);
    l = layer();
    l.activation.kind = MOE_ACTIVATION_SITU;
    REQUIRE_OK(moe_layer_resolve(&l, &err));
    CHECK_EQ(l.activation.alpha, 4.0f);
    l = layer();
    l.shared.count = 2;
    l.shared.intermediate_size = 24;
    l.activation.limit = 7;
    REQUIRE_OK(moe_layer_resolve(&l, &err));
    CHECK_EQ(l.shared.scale, 1.0f);
    CHECK_EQ(l.shared.activation.kind, MOE_ACTIVATION_SWIGLU);
    CHECK_EQ(l.shared.activation.limit, 7.0f);
}

TEST(resolving_twice_changes_nothing)
{
    moe_layer_desc once = layer(), twice;
    once.shared.count = 1;
    once.shared.intermediate_size = 24;
    REQUIRE_OK(moe_layer_resolve(&once, &err));
    twice = once;
    REQUIRE_OK(moe_layer_resolve(&twice, &err));
    CHECK(memcmp(&once, &twice, sizeof once) == 0);
}

// Sets one member of a legal layer to an illegal value: the refusal must name `path`, and leave the layer as it was.
#define REFUSED(code, path, change) \
    do { \
        moe_layer_desc l = layer(), before; \
        change; \
        before = l; \
        CHECK_ERR(moe_layer_resolve(&l, &err), code, path); \
        CHECK(memcmp(&before, &l, sizeof l) == 0); \
    } while (0)
#define ILLEGAL(path, change) REFUSED(MOE_ERROR_ARGUMENT, path, change)

static float not_a_number(void) { return moe__bits_f32(0x7fc00000u); }

TEST(every_illegal_size_is_refused_by_name)
{
    ILLEGAL("layer.struct_size", l.struct_size = 4);
    ILLEGAL("layer.hidden_size", l.hidden_size = 0);
    ILLEGAL("layer.hidden_size", l.hidden_size = -64);
    ILLEGAL("layer.hidden_size", l.hidden_size = 1 << 21);
    ILLEGAL("layer.intermediate_size", l.intermediate_size = 0);
    ILLEGAL("layer.intermediate_size", l.intermediate_size = INT32_MAX);
    ILLEGAL("layer.num_experts", l.num_experts = 0);
    ILLEGAL("layer.num_experts", l.num_experts = 2049);
    ILLEGAL("layer.num_experts", l.num_experts = INT32_MIN);
    CHECK_ERR(moe_layer_resolve(NULL, &err), MOE_ERROR_ARGUMENT, "layer");
}

TEST(every_illegal_format_is_refused_by_name)
{
    ILLEGAL("layer.format", l.format = MOE_FORMAT_UNSET);
    ILLEGAL("layer.format", l.format = 13);
    ILLEGAL("layer.format", l.format = -1);
    ILLEGAL("layer.format_block", l.format_block = 128);
    ILLEGAL("layer.format_block", (l.format = MOE_FORMAT_FP8_BLOCK, l.format_block = 100));
    ILLEGAL("layer.format_block", l.format = MOE_FORMAT_INT4_W4A16);
    ILLEGAL("layer.scale_dtype", l.scale_dtype = MOE_DTYPE_F32);
    ILLEGAL("layer.hidden_size", (l.format = MOE_FORMAT_NVFP4, l.hidden_size = 72));
    ILLEGAL("layer.intermediate_size", (l.format = MOE_FORMAT_MXFP4_W4A8));
    ILLEGAL("layer.scale_dtype", (l.format = MOE_FORMAT_MXFP8, l.scale_dtype = MOE_DTYPE_I32));
}

TEST(every_illegal_flag_and_scale_is_refused_by_name)
{
    ILLEGAL("layer.gemm1_bias", l.gemm1_bias = 2);
    ILLEGAL("layer.gemm2_bias", l.gemm2_bias = -1);
    ILLEGAL("layer.row_norm", l.row_norm = 3);
    ILLEGAL("layer.row_norm_epsilon", l.row_norm_epsilon = -1);
    ILLEGAL("layer.row_norm_epsilon", l.row_norm_epsilon = not_a_number());
    ILLEGAL("layer.output_scale", l.output_scale = not_a_number());
    ILLEGAL("layer.router.rms_norm", l.router.rms_norm = 2);
    ILLEGAL("layer.router.input_scale", l.router.input_scale = 2);
    ILLEGAL("layer.router.bias", l.router.bias = 2);
    ILLEGAL("layer.router.norm_epsilon", l.router.norm_epsilon = -1e-6f);
    ILLEGAL("layer.router.input_multiplier", l.router.input_multiplier = not_a_number());
    ILLEGAL("layer.router.input_size", l.router.input_size = -1);
    ILLEGAL("layer.router.dtype", l.router.dtype = MOE_DTYPE_F16);
}

TEST(every_illegal_activation_is_refused_by_name)
{
    ILLEGAL("layer.activation.kind", l.activation.kind = MOE_ACTIVATION_UNSET);
    ILLEGAL("layer.activation.kind", l.activation.kind = 6);
    ILLEGAL("layer.activation.kind", l.activation.kind = 39);
    ILLEGAL("layer.activation.alpha", l.activation.alpha = -1);
    ILLEGAL("layer.activation.alpha", l.activation.alpha = not_a_number());
    ILLEGAL("layer.activation.beta", l.activation.beta = not_a_number());
    ILLEGAL("layer.activation.beta", (l.activation.kind = MOE_ACTIVATION_SITU, l.activation.beta = -1));
    ILLEGAL("layer.activation.limit", l.activation.limit = -7);
    ILLEGAL("layer.activation.limit", l.activation.kind = MOE_ACTIVATION_RELU2_CLAMP);
    ILLEGAL("layer.activation.per_expert", l.activation.per_expert = 2);
}

TEST(every_illegal_shared_expert_is_refused_by_name)
{
    ILLEGAL("layer.shared.count", l.shared.count = -1);
    ILLEGAL("layer.shared.count", l.shared.count = 65);
    ILLEGAL("layer.shared.count", l.shared.intermediate_size = 24);
    ILLEGAL("layer.shared.intermediate_size", l.shared.count = 1);
    ILLEGAL("layer.shared.intermediate_size", (l.shared.count = 2, l.shared.intermediate_size = 1 << 20));
    ILLEGAL("layer.shared.gate", (l.shared.count = 1, l.shared.intermediate_size = 8, l.shared.gate = 2));
    ILLEGAL("layer.shared.scale", (l.shared.count = 1, l.shared.intermediate_size = 8, l.shared.scale = not_a_number()));
    ILLEGAL("layer.shared.activation.kind",
            (l.shared.count = 1, l.shared.intermediate_size = 8, l.shared.activation.kind = 99));
    REFUSED(MOE_ERROR_UNSUPPORTED, "layer.shared.activation.kind",
            (l.shared.count = 1, l.shared.intermediate_size = 8, l.shared.activation.kind = MOE_ACTIVATION_RELU2));
}

TEST(every_illegal_rank_is_refused_by_name)
{
    static const int32_t twice[8] = { 0, 0, -1, -1, -1, -1, -1, -1 };
    static const int32_t outside[8] = { 0, 2, -1, -1, -1, -1, -1, -1 };
    static const int32_t fewer[8] = { 1, -1, -1, -1, -1, -1, -1, -1 };
    static const int32_t below[8] = { 1, -2, 0, -1, -1, -1, -1, -1 };
    ILLEGAL("layer.parallel.local_experts", l.parallel.local_experts = 9);
    ILLEGAL("layer.parallel.local_experts", l.parallel.local_experts = -1);
    ILLEGAL("layer.parallel.expert_offset", (l.parallel.local_experts = 4, l.parallel.expert_offset = 5));
    ILLEGAL("layer.parallel.expert_offset", l.parallel.expert_offset = -1);
    ILLEGAL("layer.parallel.expert_map", (l.parallel.local_experts = 2, l.parallel.expert_map = twice));
    ILLEGAL("layer.parallel.expert_map", (l.parallel.local_experts = 2, l.parallel.expert_map = outside));
    ILLEGAL("layer.parallel.expert_map", (l.parallel.local_experts = 2, l.parallel.expert_map = fewer));
    ILLEGAL("layer.parallel.expert_map", (l.parallel.local_experts = 2, l.parallel.expert_map = below));
    ILLEGAL("layer.parallel.expert_offset",
            (l.parallel.local_experts = 1, l.parallel.expert_map = fewer, l.parallel.expert_offset = 1));
    ILLEGAL("layer.parallel.omit_common", l.parallel.omit_common = 2);
    ILLEGAL("layer.parallel.tp_size", l.parallel.tp_size = -1);
    ILLEGAL("layer.parallel.tp_size", l.parallel.tp_size = 49);
    ILLEGAL("layer.parallel.tp_rank", (l.parallel.tp_size = 2, l.parallel.tp_rank = 2));
    ILLEGAL("layer.parallel.tp_rank", l.parallel.tp_rank = -1);
    REFUSED(MOE_ERROR_UNSUPPORTED, "layer.parallel.tp_size", (l.parallel.tp_size = 2, l.row_norm = 1));
}

TEST(slices_of_all_ranks_cover_the_features_once)
{
    static const int32_t sizes[] = { 1, 7, 48, 704, 2880 }, groups[] = { 1, 16, 32, 128 };
    for (int32_t s = 0; s < 5; s++)
        for (int32_t g = 0; g < 4; g++)
            for (int32_t ranks = 1; ranks <= 5; ranks++) {
                int32_t expected = 0;
                for (int32_t rank = 0; rank < ranks; rank++) {
                    moe_parallel_desc p;
                    int32_t first, count;
                    memset(&p, 0, sizeof p);
                    p.tp_size = ranks;
                    p.tp_rank = rank;
                    moe__parallel_slice(&p, sizes[s], groups[g], &first, &count);
                    if (count > 0) CHECK_EQ(first, expected);
                    if (count > 0) CHECK_EQ(first % groups[g], 0);
                    expected += count;
                }
                CHECK_EQ(expected, sizes[s]);
            }
}

TEST_MAIN(
    T(zero_members_become_their_defaults)
    T(resolving_twice_changes_nothing)
    T(every_illegal_size_is_refused_by_name)
    T(every_illegal_format_is_refused_by_name)
    T(every_illegal_flag_and_scale_is_refused_by_name)
    T(every_illegal_activation_is_refused_by_name)
    T(every_illegal_shared_expert_is_refused_by_name)
    T(every_illegal_rank_is_refused_by_name)
    T(slices_of_all_ranks_cover_the_features_once))
