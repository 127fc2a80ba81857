// gpu_formats.c - layers of codes on the device against moe_reference_layer()
//
// Values are multiples of powers of two that the codes have, and every scale is a power of two, so that the sums of
// GEMM 1 are exact, and the intermediate's codes are the reference's. GEMM 2 then differs by the order of its sums and
// by a rounding of each product, where the intermediate has scales that are not powers of two: gpu_layer.h's bound.
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "gpu.h"
#include "gpu_text.h"
#include "gpu_layer.h"

typedef struct variant {
    int format, block, scale_dtype;
    int exact; // sums of both products
} variant;

static const variant variants[] = {
    { MOE_FORMAT_FP8_PER_TENSOR, 0, 0, 0 },
    { MOE_FORMAT_FP8_PER_CHANNEL, 0, 0, 0 },
    { MOE_FORMAT_FP8_BLOCK, 128, 0, 0 },
    { MOE_FORMAT_FP8_BLOCK, 64, MOE_DTYPE_BF16, 0 },
    { MOE_FORMAT_FP8_BLOCK, 32, MOE_DTYPE_UE8M0, 0 },
    { MOE_FORMAT_MXFP8, 0, 0, 0 },
    { MOE_FORMAT_NVFP4, 0, 0, 0 },
    { MOE_FORMAT_NVFP4_W4A16, 0, 0, 1 },
    { MOE_FORMAT_MXFP4_W4A16, 0, 0, 1 },
    { MOE_FORMAT_MXFP4_W4A8, 0, 0, 0 },
    { MOE_FORMAT_INT4_W4A16, 32, 0, 1 },
    { MOE_FORMAT_INT4_W4A16, 64, MOE_DTYPE_F16, 1 },
    { MOE_FORMAT_INT4_W4A16, 128, MOE_DTYPE_F32, 1 },
};
enum { VARIANTS = sizeof variants / sizeof variants[0] };

static moe_layer_desc layer_of(const variant *v, int kind)
{
    moe_layer_desc l;
    memset(&l, 0, sizeof l);
    l.hidden_size = v->block > 64 ? 256 : 192;
    l.intermediate_size = v->block > 64 ? 128 : 64;
    l.num_experts = 5;
    l.format = v->format;
    l.format_block = v->block;
    l.scale_dtype = v->scale_dtype;
    l.activation.kind = kind;
    l.routing = preset(MOE_ROUTING_RENORMALIZE, 2);
    return l;
}

static const char *name_of(const variant *v)
{
    static char text[64];
    snprintf(text, sizeof text, "%s %d %s", moe_format_string(v->format), v->block, moe_dtype_string(v->scale_dtype));
    return text;
}

TEST(every_format_is_within_the_bound_of_the_reference)
{
    static const int tokens[] = { 1, 19, 70 };
    if (!gpu_open()) return;
    for (int v = 0; v < VARIANTS; v++) {
        moe_layer_desc l = layer_of(&variants[v], MOE_ACTIVATION_RELU);
        pair p;
        memset(&p, 0, sizeof p);
        p.desc.x_dtype = MOE_DTYPE_BF16;
        if (!open_layer(&p, &l, 70)) continue;
        for (int i = 0; i < 3; i++) {
            layer_call c = logits_of(tokens[i]);
            check_layer(&p, &c, variants[v].exact, name_of(&variants[v]));
        }
        pair_close(&p);
    }
}

// All codes, in both products; x has one value, so that GEMM 1 adds nothing.
TEST(every_code_has_its_value)
{
    if (!gpu_open()) return;
    for (int v = 0; v < VARIANTS; v++) {
        moe_layer_desc l = layer_of(&variants[v], MOE_ACTIVATION_IDENTITY);
        layer_call c = logits_of(33);
        pair p;
        memset(&p, 0, sizeof p);
        p.any_codes = 1;
        p.desc.x_dtype = MOE_DTYPE_BF16;
        if (!open_layer(&p, &l, 33)) continue;
        check_layer(&p, &c, 0, name_of(&variants[v]));
        pair_close(&p);
    }
}

// Rows of matrices and input scales come back from the device as they do from the host.
static void compare_rows(const pair *p, const char *what)
{
    static const int roles[] = { MOE_TENSOR_GATE, MOE_TENSOR_UP, MOE_TENSOR_DOWN, MOE_TENSOR_SHARED_UP,
                                 MOE_TENSOR_INPUT_SCALES };
    float a[1024], b[1024];
    int count = 0;
    for (int i = 0; i < 5; i++)
        for (int row = 0; row < 1024; row += 1 + row % 3) {
            int expert = i == 3 ? -1 : row % p->layer.num_experts;
            memset(a, 0, sizeof a);
            memset(b, 0, sizeof b);
            if (moe_weights_read_row(p->weights[0], roles[i], expert, row, a, NULL) != MOE_OK) break;
            CHECK_OK(moe_weights_read_row(p->weights[1], roles[i], expert, row, b, &err));
            for (int k = 0; k < 1024; k++) a[k] += 0.0f, b[k] += 0.0f; // -0 as 0
            if (memcmp(a, b, sizeof a) != 0) {
                test_fail2(__FILE__, __LINE__, what, moe_role_string(roles[i]));
                return;
            }
            count++;
        }
    CHECK(count > 50);
}

// Gates, biases, shared experts of the same format and of bf16, always-on ones, slices that cut groups.
TEST(formats_with_everything_beside_them)
{
    if (!gpu_open()) return;
    for (int v = 0; v < VARIANTS; v++) {
        moe_layer_desc l = layer_of(&variants[v], v % 2 ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_GEGLU_TANH);
        layer_call c = logits_of(21);
        pair p;
        char text[96];
        l.gemm1_bias = l.gemm2_bias = v % 3 != 0;
        l.activation.limit = v % 2 && v % 4 == 1 ? 3 : 0.0f;
        l.shared.count = 1;
        l.shared.intermediate_size = l.intermediate_size;
        l.shared.scale = 1;
        if (v % 3 == 1) l.shared.format = MOE_FORMAT_BF16;
        l.routing.extra_slots = v % 4 == 2;
        l.routing.extra_weight = 0.5f;
        if (v % 3 == 2 || variants[v].block > 32) { // features 32.., or 96.., of whole groups no more
            l.intermediate_size = variants[v].block > 64 ? 384 : 192;
            l.shared.intermediate_size = l.intermediate_size;
            l.parallel.tp_size = variants[v].block > 32 ? 4 : 2;
            l.parallel.tp_rank = 1;
        }
        memset(&p, 0, sizeof p);
        p.desc.x_dtype = v % 5 == 0 ? MOE_DTYPE_F32 : v % 5 == 1 ? MOE_DTYPE_F16 : MOE_DTYPE_BF16;
        if (!open_layer(&p, &l, 21)) continue;
        snprintf(text, sizeof text, "%s, with everything", name_of(&variants[v]));
        check_layer(&p, &c, 0, text);
        compare_rows(&p, text);
        pair_close(&p);
    }
}

// Sizes that are no whole tiles, or tiles that are no whole groups; large ones on hardware.
TEST(sizes_of_formats)
{
    static const struct { int variant, hidden, inner, experts, top_k, tokens; } cases[] = {
        { 1, 72, 40, 4, 2, 9 },      { 5, 96, 160, 4, 2, 33 },   { 7, 144, 80, 4, 2, 17 },    { 8, 96, 32, 3, 1, 129 },
        { 10, 160, 96, 5, 2, 5 },    { 2, 384, 128, 3, 2, 17 },  { 6, 176, 464, 3, 2, 3 },
        { 8, 2880, 2880, 16, 4, 17 }, { 9, 2880, 2880, 16, 4, 33 }, { 7, 704, 1856, 16, 6, 40 },
        { 1, 704, 1856, 8, 2, 65 },   { 0, 2688, 1856, 8, 2, 40 },  { 5, 2880, 704, 8, 2, 65 },
        { 10, 2688, 1856, 16, 6, 33 }, { 2, 4096, 1536, 16, 8, 20 }, { 7, 256, 128, 512, 22, 129 },
        { 12, 4096, 1536, 16, 8, 1 }, { 10, 160, 96, 5, 2, 4097 },  { 5, 96, 160, 4, 2, 4097 },
    };
    if (!gpu_open()) return;
    for (int i = 0; i < (gpu_large() ? 19 : 7); i++) {
        const variant *v = &variants[cases[i].variant];
        moe_layer_desc l = layer_of(v, i % 2 ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_RELU);
        layer_call c = logits_of(cases[i].tokens);
        char text[96];
        l.hidden_size = cases[i].hidden;
        l.intermediate_size = cases[i].inner;
        l.num_experts = cases[i].experts;
        l.routing = preset(MOE_ROUTING_RENORMALIZE, cases[i].top_k);
        snprintf(text, sizeof text, "%s H %d I %d T %d", name_of(v), cases[i].hidden, cases[i].inner, cases[i].tokens);
        check_one(&l, &c, 0, text);
    }
}

// The same bits with tiles of other sizes, of values whose sums are not exact.
TEST(tiles_do_not_change_a_bit_of_formats)
{
    static const int of[] = { 0, 2, 5, 6, 8, 10 }, rows[] = { 16, 32, 64, 128 };
    if (!gpu_open()) return;
    for (int i = 0; i < 6; i++) {
        moe_layer_desc l = layer_of(&variants[of[i]], MOE_ACTIVATION_SWIGLU);
        layer_call c = logits_of(50);
        uint64_t state = 17;
        layer_data d;
        pair p;
        size_t n = (size_t)c.tokens * (size_t)l.hidden_size;
        float *first = (float *)calloc(n, 4), *other = (float *)calloc(n, 4);
        int ran = 0;
        memset(&p, 0, sizeof p);
        memset(&d, 0, sizeof d);
        p.desc.x_dtype = MOE_DTYPE_BF16;
        d.x = grid_values(n, 0.01f, 400, &state);
        d.old = grid_values(n, 1, 1, &state);
        d.logits = grid_values((size_t)(c.tokens * l.num_experts), 0.125f, 40, &state);
        if (!open_layer(&p, &l, c.tokens)) continue;
        for (int j = 0; j < 4; j++) {
            int32_t tiles[MOE__SETS] = { 0 };
            if (moe__tile_built(l.format, rows[j]) == NULL) continue;
            tiles[0] = rows[j];
            CHECK_OK(moe__plan_take(p.plan[1], tiles, &err));
            CHECK_OK(moe_plan_get_info(p.plan[1], &p.info[1], &err));
            CHECK_EQ(run_gpu(&p, &c, &d, ran == 0 ? first : other), MOE_OK);
            if (ran++ > 0 && memcmp(first, other, n * 4) != 0) test_fail(__FILE__, __LINE__, name_of(&variants[of[i]]));
        }
        CHECK(ran >= 2);
        free(first);
        free(other);
        free(d.x);
        free(d.old);
        free(d.logits);
        pair_close(&p);
    }
}

// Ids, counts on the device, weights on the input; a rank with some of the experts.
TEST(inputs_of_formats)
{
    static const int of[] = { 0, 2, 6, 7, 10 };
    if (!gpu_open()) return;
    for (int i = 0; i < 5; i++) {
        moe_layer_desc l = layer_of(&variants[of[i]], MOE_ACTIVATION_RELU);
        layer_call c = logits_of(23);
        pair p;
        memset(&p, 0, sizeof p);
        l.parallel.expert_offset = 1;
        l.parallel.local_experts = 3;
        if (!open_layer(&p, &l, 90)) continue;
        c.mode = MOE_INPUT_IDS;
        check_layer(&p, &c, 0, "ids");
        c.mode = MOE_INPUT_PACKED;
        c.flags = MOE_EXECUTE_ACCUMULATE;
        check_layer(&p, &c, 0, "packed, accumulated");
        c = logits_of(80);
        c.held = 13;
        check_layer(&p, &c, 0, "count on the device");
        pair_close(&p);
        l.routing.weight_on = MOE_WEIGHT_ON_INPUT;
        memset(&p, 0, sizeof p);
        if (!open_layer(&p, &l, 23)) continue;
        c = logits_of(23);
        c.mode = MOE_INPUT_IDS; // weights are multiples of powers of two
        check_layer(&p, &c, 0, "weights on the input");
        pair_close(&p);
    }
}

static moe_layer_desc tiny(int format)
{
    variant v = { 0, 0, 0, 0 };
    v.format = format;
    return layer_of(&v, MOE_ACTIVATION_RELU);
}

// What CUDA does not take of what the formats have: by name, and the CPU takes it.
TEST(what_tiles_cannot_hold_is_refused_by_name)
{
    moe_layer_desc l = tiny(MOE_FORMAT_MXFP4_W4A16);
    unsigned char *scales = (unsigned char *)malloc(64 * 192);
    moe_weights *w;
    moe_plan *plan;
    moe_plan_desc desc;
    moe_execute_args a;
    moe_plan_info info;
    if (!gpu_open()) return;
    memset(scales, 127 + 34, 64 * 192);
    for (int side = 0; side < 2; side++) {
        REQUIRE_OK(moe_weights_create(side == 0 ? gpu.cpu : gpu.ctx, &l, NULL, &w, &err));
        if (side == 0) {
            CHECK_OK(set_part(w, MOE_TENSOR_UP, 0, MOE_PART_SCALE, MOE_DTYPE_UE8M0, 64, 6, scales, 64 * 6, &err));
        } else {
            CHECK_ERR(set_part(w, MOE_TENSOR_UP, 0, MOE_PART_SCALE, MOE_DTYPE_UE8M0, 64, 6, scales, 64 * 6, &err),
                      MOE_ERROR_DATA, "tensor.data");
            CHECK_CONTAINS(err.text, "a scale above 2^33");
        }
        moe_weights_destroy(w);
    }
    l = tiny(MOE_FORMAT_NVFP4_W4A16);
    memset(scales, 0xb8, 64 * 192);
    for (int side = 0; side < 2; side++) {
        REQUIRE_OK(moe_weights_create(side == 0 ? gpu.cpu : gpu.ctx, &l, NULL, &w, &err));
        CHECK_ERR(set_part(w, MOE_TENSOR_UP, 0, MOE_PART_SCALE, MOE_DTYPE_E4M3, 64, 12, scales, 64 * 12, &err),
                  MOE_ERROR_DATA, "tensor.data");
        CHECK_CONTAINS(err.text, "a scale below 0");
        moe_weights_destroy(w);
    }
    free(scales);
    l = tiny(MOE_FORMAT_MXFP8);
    memset(&desc, 0, sizeof desc);
    memset(&a, 0, sizeof a);
    memset(&info, 0, sizeof info);
    desc.max_tokens = 3;
    desc.intermediate_dtype = MOE_DTYPE_F32;
    REQUIRE_OK(moe_weights_create(gpu.ctx, &l, NULL, &w, &err));
    REQUIRE_OK(moe_plan_create(gpu.ctx, &l, &desc, &plan, &err));
    REQUIRE_OK(moe_plan_get_info(plan, &info, &err));
    a.input_mode = MOE_INPUT_LOGITS;
    a.num_tokens = 3;
    a.x = a.logits = a.out = gpu_make(3 * 192 * 4);
    a.workspace = gpu_make((size_t)info.workspace_bytes);
    a.workspace_bytes = info.workspace_bytes;
    for (int e = 0; e < l.num_experts; e++) {
        pair p;
        memset(&p, 0, sizeof p);
        p.layer = l;
        CHECK_OK(pair_codes(&p, w, MOE_TENSOR_UP, e, 64, 192, &err));
        CHECK_OK(pair_codes(&p, w, MOE_TENSOR_DOWN, e, 192, 64, &err));
    }
    CHECK_OK(moe_weights_seal(w, &err));
    CHECK_EQ(moe_route(plan, w, &a, NULL), MOE_OK);
    CHECK_ERR(moe_execute_check(plan, w, &a, &err), MOE_ERROR_UNSUPPORTED, "plan");
    CHECK_CONTAINS(err.text, "desc.intermediate_dtype is a float type");
    gpu_release();
    moe_plan_destroy(plan);
    moe_weights_destroy(w);
}

// A query says of every tile whether codes are widened, and why they are not multiplied as they are.
TEST(a_query_says_that_codes_are_widened)
{
    moe_layer_desc l = tiny(MOE_FORMAT_FP8_PER_CHANNEL);
    moe_plan_info info;
    char text[16384];
    if (!gpu_open()) return;
    memset(&info, 0, sizeof info);
    info.tiles_text = text;
    info.tiles_text_bytes = sizeof text;
    CHECK_OK(moe_plan_query(gpu.ctx, &l, NULL, &info, &err));
    CHECK(info.layout_id == MOE__LAYOUT_TILES_8 && info.tile_rows > 0);
    CHECK_CONTAINS(info.gemm1, "_E4m3Bfloat16_Fp32");
    CHECK_CONTAINS(text, ", codes widened to bf16: ");
    CHECK_CONTAINS(text, ", codes multiplied as they are");
    if (gpu.cuda->arch == 90) CHECK_CONTAINS(text, "which this chip emulates");
    if (gpu.cuda->arch == 80) CHECK_CONTAINS(text, "multiplies e4m3 from compute capability 8.9 on");
}

// Files of weights for CUDA, and experts that are replaced.
TEST(weights_of_codes_are_saved_and_replaced)
{
    moe_layer_desc l = tiny(MOE_FORMAT_NVFP4);
    layer_call c = logits_of(12);
    const char *path = "build/tmp/gpu_formats.weights";
    pair p;
    if (!gpu_open()) return;
    memset(&p, 0, sizeof p);
    if (!open_layer(&p, &l, 12)) return;
#ifndef MOE_NO_FILES
    CHECK_OK(moe_weights_save(p.weights[1], path, &err));
    moe_weights_destroy(p.weights[1]);
    p.weights[1] = NULL;
    REQUIRE_OK(moe_weights_load(gpu.ctx, &l, path, &p.weights[1], &err));
    remove(path);
    check_layer(&p, &c, 0, "loaded");
#endif
    {
        moe_tensor t[12];
        int n = 0;
        float globals[2] = { 0.125f, 0.25f };
        unsigned char *codes = (unsigned char *)malloc(192 * 64 / 2), *scales = (unsigned char *)malloc(192 * 64 / 16);
        for (int i = 0; i < 192 * 64 / 2; i++) codes[i] = (unsigned char)(i * 37 + 11);
        for (int i = 0; i < 192 * 64 / 16; i++) scales[i] = (unsigned char)(0x30 + i % 17);
        memset(t, 0, sizeof t);
        for (int down = 0; down < 2; down++)
            for (int part = 0; part < 4; part++, n++) {
                t[n].role = down ? MOE_TENSOR_DOWN : MOE_TENSOR_UP;
                t[n].part = part == 3 ? MOE_PART_INPUT_SCALE : MOE_PART_DATA + part;
                t[n].expert = 3;
                t[n].index = -1;
                t[n].dtype = part == 0 ? MOE_DTYPE_E2M1 : part == 1 ? MOE_DTYPE_E4M3 : MOE_DTYPE_F32;
                t[n].rank = part < 2 ? 2 : 0;
                t[n].dims[0] = down ? 192 : 64;
                t[n].dims[1] = (down ? 64 : 192) / (part == 1 ? 16 : 1);
                t[n].data = part == 0 ? (const void *)codes : part == 1 ? (const void *)scales : &globals[part - 2];
                t[n].data_bytes = part == 0 ? 192 * 64 / 2 : part == 1 ? 192 * 64 / 16 : 4;
            }
        for (int side = 0; side < 2; side++)
            CHECK_OK(moe_weights_replace_expert(p.weights[side], 3, t, n, NULL, &err));
        free(codes);
        free(scales);
    }
    compare_rows(&p, "replaced");
    check_layer(&p, &c, 0, "replaced");
    pair_close(&p);
}

#ifndef MOE_NO_CHECKPOINT
static void *golden_of(const moe_checkpoint *data, const char *name, moe_checkpoint_tensor *t)
{
    void *copy;
    if (moe_checkpoint_find(data, name, t, &err) != MOE_OK) return NULL;
    copy = malloc((size_t)t->data_bytes);
    memcpy(copy, t->data, (size_t)t->data_bytes);
    return copy;
}

// Checkpoints that transformers, compressed-tensors and modelopt quantised: rows of matrices as on the CPU, and outputs
// as near to those of the exact layer as the CPU's.
TEST(checkpoints_that_others_quantised)
{
    static const char *const folders[] = { "fp8_block",    "fp8_block_ue8m0", "fp8_tensor",  "fp8_channel", "mxfp8",
                                           "nvfp4_packed", "nvfp4_modelopt",  "int4_packed", "gpt_oss" };
    if (!gpu_open()) return;
    for (int n = 0; n < (int)(sizeof folders / sizeof folders[0]); n++) {
        char path[160];
        moe_checkpoint *ckpt = NULL, *data = NULL;
        moe_checkpoint_tensor x_of, t;
        moe_layer_desc layer;
        float *x, *weights, *want, *got[2];
        int32_t *ids;
        double far[2] = { 0, 0 };
        pair p;
        memset(&p, 0, sizeof p);
        snprintf(path, sizeof path, "quantized/%s", folders[n]);
        REQUIRE_OK(moe_checkpoint_open(test_data(path), NULL, &ckpt, &err));
        snprintf(path, sizeof path, "quantized/%s/golden.safetensors", folders[n]);
        REQUIRE_OK(moe_checkpoint_open(test_data(path), NULL, &data, &err));
        REQUIRE_OK(moe_checkpoint_layer(ckpt, 0, &layer, &err));
        x = (float *)golden_of(data, "layers.0.x", &x_of);
        ids = (int32_t *)golden_of(data, "layers.0.ids", &t);
        weights = (float *)golden_of(data, "layers.0.weights", &t);
        want = (float *)golden_of(data, "layers.0.out", &t);
        p.layer = layer;
        p.desc.max_tokens = (int32_t)x_of.dims[0];
        p.desc.x_dtype = MOE_DTYPE_BF16;
        p.desc.out_dtype = MOE_DTYPE_F32;
        for (int side = 0; side < 2; side++) {
            moe_context *ctx = side == 0 ? gpu.cpu : gpu.ctx;
            size_t values = (size_t)(x_of.dims[0] * x_of.dims[1]), slots;
            void *narrow = narrowed(x, values, MOE_DTYPE_BF16);
            moe_execute_args a;
            REQUIRE_OK(moe_weights_from_checkpoint(ctx, ckpt, &layer, &p.weights[side], &err));
            REQUIRE_OK(moe_plan_create(ctx, &layer, &p.desc, &p.plan[side], &err));
            REQUIRE_OK(moe_plan_get_info(p.plan[side], &p.info[side], &err));
            slots = (size_t)x_of.dims[0] * (size_t)p.info[side].slots;
            memset(&a, 0, sizeof a);
            got[side] = (float *)malloc(values * 4);
            a.input_mode = MOE_INPUT_IDS;
            a.num_tokens = (int32_t)x_of.dims[0];
            a.x = side == 0 ? narrow : gpu_copy(narrow, values * 2);
            a.ids = side == 0 ? (const void *)ids : gpu_copy(ids, slots * 4);
            a.weights = side == 0 ? (const void *)weights : gpu_copy(weights, slots * 4);
            a.out = side == 0 ? (void *)got[0] : gpu_make(values * 4);
            a.workspace_bytes = p.info[side].workspace_bytes;
            a.workspace = side == 0 ? moe__default_alloc(NULL, (size_t)a.workspace_bytes, 256)
                                    : gpu_make_raw((size_t)a.workspace_bytes);
            CHECK_OK(moe_execute_check(p.plan[side], p.weights[side], &a, &err));
            CHECK_EQ(moe_execute(p.plan[side], p.weights[side], &a, NULL), MOE_OK);
            if (side == 1) gpu_get(got[1], a.out, values * 4);
            else moe__default_free(NULL, a.workspace, (size_t)a.workspace_bytes);
            for (size_t i = 0; i < values; i++)
                far[side] += ((double)got[side][i] - want[i]) * ((double)got[side][i] - want[i]);
            free(narrow);
        }
        gpu_release();
        printf("%s: %s, distance %.3g, the CPU's %.3g\n", folders[n], moe_format_string(layer.format), sqrt(far[1]),
               sqrt(far[0]));
        CHECK(far[1] <= 1.1 * far[0]);
        compare_rows(&p, folders[n]);
        free(got[0]);
        free(got[1]);
        free(x);
        free(ids);
        free(weights);
        free(want);
        pair_close(&p);
        moe_checkpoint_close(ckpt);
        moe_checkpoint_close(data);
    }
}
#else
TEST(checkpoints_that_others_quantised) { test_skip("no checkpoints in this build"); }
#endif

TEST_MAIN(T(every_format_is_within_the_bound_of_the_reference) T(every_code_has_its_value)
          T(formats_with_everything_beside_them) T(sizes_of_formats) T(tiles_do_not_change_a_bit_of_formats)
          T(inputs_of_formats)
          T(what_tiles_cannot_hold_is_refused_by_name) T(weights_of_codes_are_saved_and_replaced)
          T(a_query_says_that_codes_are_widened) T(checkpoints_that_others_quantised))
