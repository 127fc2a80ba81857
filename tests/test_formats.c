// test_formats.c - quantised formats: quantisers, weights in every dialect, and execution to the bits of the reference
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "layer.h"

#include <math.h>

// Every format with each of its blocks and types of scales; sizes that its groups divide.
typedef struct variant {
    int format, block, scale_dtype, hidden, inner;
} variant;

static const variant variants[] = {
    { MOE_FORMAT_FP8_PER_TENSOR, 0, 0, 72, 40 },
    { MOE_FORMAT_FP8_PER_CHANNEL, 0, 0, 72, 40 },
    { MOE_FORMAT_FP8_BLOCK, 128, 0, 256, 128 },
    { MOE_FORMAT_FP8_BLOCK, 128, MOE_DTYPE_UE8M0, 128, 256 },
    { MOE_FORMAT_FP8_BLOCK, 64, 0, 192, 64 },
    { MOE_FORMAT_FP8_BLOCK, 32, 0, 96, 160 },
    { MOE_FORMAT_MXFP8, 0, 0, 96, 160 },
    { MOE_FORMAT_NVFP4, 0, 0, 80, 176 },
    { MOE_FORMAT_NVFP4_W4A16, 0, 0, 80, 48 },
    { MOE_FORMAT_MXFP4_W4A16, 0, 0, 96, 32 },
    { MOE_FORMAT_MXFP4_W4A8, 0, 0, 160, 96 },
    { MOE_FORMAT_INT4_W4A16, 32, 0, 96, 160 },
    { MOE_FORMAT_INT4_W4A16, 64, MOE_DTYPE_F16, 192, 64 },
    { MOE_FORMAT_INT4_W4A16, 128, MOE_DTYPE_F32, 128, 640 },
};
enum { VARIANTS = sizeof variants / sizeof variants[0] };

static fixture fixture_of(const variant *v, int activation)
{
    fixture f;
    memset(&f, 0, sizeof f);
    f.layer = small_layer(v->format, activation);
    f.layer.format_block = v->block;
    f.layer.scale_dtype = v->scale_dtype;
    f.layer.hidden_size = v->hidden;
    f.layer.intermediate_size = v->inner;
    f.context_desc.threads = 2;
    return f;
}

static const char *name_of(const variant *v)
{
    static char text[64];
    snprintf(text, sizeof text, "%s %d", moe_format_string(v->format), v->block);
    return text;
}

// ---- quantisers -----------------------------------------------------------------------------------------------------

// All values of a type; 4-bit ones once.
static int values_of(int dtype, double *values)
{
    int count = dtype == MOE_DTYPE_E2M1 || dtype == MOE_DTYPE_INT4 ? 16 : 256;
    for (int i = 0; i < count; i++) {
        unsigned char code = (unsigned char)i;
        float value;
        (void)moe_convert(&code, dtype, &value, MOE_DTYPE_F32, 1, NULL);
        values[i] = moe__is_nan(value) ? 1e300 : value;
    }
    return count;
}

// Whether no code is nearer to x than `code`; of two as near, the even one was taken.
static int is_nearest(const double *values, int count, double x, int code)
{
    for (int i = 0; i < count; i++) {
        double mine = fabs(values[code] - x), other = fabs(values[i] - x);
        if (other < mine) return 0;
        if (other == mine && values[i] != values[code] && (code & 1) != 0) return 0;
    }
    return 1;
}

static uint32_t scale_bits(const moe_quantize_desc *q, int dtype, int64_t index)
{
    int bytes = moe_dtype_bits(dtype) / 8;
    uint32_t code = 0;
    memcpy(&code, (const char *)q->scales + index * bytes, (size_t)bytes); // little-endian machines alone run this
    return code;
}

// The scale by the formulas in double precision: it is within one rounding of its type, or the power of two above.
static void check_scale(const moe__scheme *s, double amax, double low, double high, double global, uint32_t bits)
{
    float got = 0;
    double want = amax / (s->dtype == MOE_DTYPE_E4M3 ? 448 : 6);
    if (s->scale_dtype == MOE_DTYPE_F32) got = moe__bits_f32(bits);
    else (void)moe_convert(&bits, s->scale_dtype, &got, MOE_DTYPE_F32, 1, NULL);
    if (s->rule == MOE__SCALE_INT4) want = (high * 8 / 7 > -low ? high * 8 / 7 : -low) / 8;
    if (s->scale_dtype == MOE_DTYPE_UE8M0) {
        CHECK(got >= want * (1 - 1e-6));
        CHECK(got < 2 * want * (1 + 1e-6) || bits == 0);
    } else if (s->scale_dtype == MOE_DTYPE_E4M3) {
        double values[256];
        CHECK(is_nearest(values, values_of(MOE_DTYPE_E4M3, values), (double)(float)(want / global), (int)bits) ||
              fabs(got - want / global) <= fabs(want / global) / 16 * 1.000001);
    } else {
        double tolerance = s->scale_dtype == MOE_DTYPE_F32 ? 1e-6 : s->scale_dtype == MOE_DTYPE_F16 ? 1e-3 : 4e-3;
        if (s->scale_dtype == MOE_DTYPE_F32 && s->rule == MOE__SCALE_AMAX && want < 1e-12 / 448) want = 1e-12 / 448;
        CHECK_NEAR(got, want, want * tolerance + 1e-8 * (s->scale_dtype == MOE_DTYPE_F16));
    }
}

TEST(codes_are_the_nearest_and_scales_their_formulas)
{
    for (int v = 0; v < VARIANTS; v++) {
        moe__scheme s = moe__weight_scheme(variants[v].format, variants[v].block, variants[v].scale_dtype);
        int rows = 67, columns = variants[v].hidden, count;
        float *x = random_tensor(5, 3, v, (size_t)rows * (size_t)columns, 1), *back;
        double values[256];
        moe_quantize_desc q;
        for (int i = 0; i < columns; i++) {
            x[i] = 0;                                        // a row of zeros
            x[columns + i] *= 1e-30f;                        // a dead one
            x[2 * columns + i] = i % 3 == 0 ? 1e4f : -3e-3f; // far apart
        }
        REQUIRE_OK(quantized_make(&q, variants[v].format, variants[v].block, variants[v].scale_dtype, x, rows, columns,
                                  &err));
        back = (float *)malloc((size_t)rows * (size_t)columns * 4);
        q.values = back;
        CHECK_OK(moe_dequantize(&q, &err));
        count = values_of(s.dtype, values);
        for (int row = 0; row < rows; row++)
            for (int i = 0; i < columns; i++) {
                int r = s.rows > 0 ? s.rows : rows, c = s.columns > 0 ? s.columns : columns, code;
                int64_t at = (int64_t)row * columns + i, scale_at = row / r * ((columns + c - 1) / c) + i / c;
                uint32_t bits = scale_bits(&q, s.scale_dtype, scale_at);
                float scale = moe__widen(&bits, s.scale_dtype, 0);
                if (s.rule == MOE__SCALE_GLOBAL) scale = scale * q.global_scale;
                if (row % r == 0 && i % c == 0) {
                    double amax = 0, low = 0, high = 0;
                    for (int y = row; y < rows && y < row + r; y++)
                        for (int z = i; z < columns && z < i + c; z++) {
                            double value = x[y * columns + z];
                            amax = fabs(value) > amax ? fabs(value) : amax;
                            low = value < low ? value : low;
                            high = value > high ? value : high;
                        }
                    check_scale(&s, amax, low, high, q.global_scale, bits);
                }
                code = moe__is_4_bits(s.dtype) ? ((unsigned char *)q.codes)[at / 2] >> (at % 2 * 4) & 15
                                               : ((unsigned char *)q.codes)[at];
                if (scale != 0) CHECK(is_nearest(values, count, (double)(x[at] / scale), code));
                else CHECK_EQ(code, 0);
                CHECK_EQ(back[at], (float)values[code] * scale);
                CHECK(moe__is_finite(back[at]));
            }
        free(back);
        free(x);
        quantized_free(&q);
    }
}

TEST(rows_of_activations_are_rounded_as_moe_quantize_does)
{
    for (int v = 0; v < VARIANTS; v++) {
        moe__scheme s = moe__activation_scheme(variants[v].format, variants[v].scale_dtype);
        int n = 256;
        float *x = random_tensor(6, 1, v, (size_t)n, 3), back[256];
        moe_quantize_desc q;
        unsigned char codes[256], scales[1024];
        if (moe__scheme_is_float(&s)) { free(x); continue; }
        memset(&q, 0, sizeof q);
        q.format = variants[v].format;
        q.format_block = variants[v].block;
        q.scale_dtype = variants[v].scale_dtype;
        q.activations = 1;
        q.dtype = MOE_DTYPE_F32;
        q.rows = 1;
        q.columns = n;
        q.values = x;
        q.codes = codes;
        q.codes_bytes = (uint64_t)(n * moe_dtype_bits(s.dtype) / 8);
        q.scales = scales;
        q.scales_bytes = (uint64_t)((s.columns > 0 ? n / s.columns : 1) * moe_dtype_bits(s.scale_dtype) / 8);
        q.global_scale = moe__scheme_has_global(&s) || s.rows == 0 ? 0.0125f : 0;
        REQUIRE_OK(moe_quantize(&q, &err));
        q.values = back;
        CHECK_OK(moe_dequantize(&q, &err));
        moe__round_row(&s, q.global_scale, x, n);
        CHECK(memcmp(x, back, sizeof back) == 0);
        free(x);
    }
}

TEST(quantize_refuses_by_name)
{
    float values[64] = { 1, 2, 3 };
    unsigned char codes[64], scales[64];
    moe_quantize_desc good, q;
    memset(&good, 0, sizeof good);
    good.format = MOE_FORMAT_NVFP4;
    good.dtype = MOE_DTYPE_F32;
    good.rows = 2;
    good.columns = 32;
    good.values = values;
    good.codes = codes;
    good.codes_bytes = 32;
    good.scales = scales;
    good.scales_bytes = 4;
    q = good;
    CHECK_OK(moe_quantize(&q, &err));
    CHECK_NEAR(q.global_scale, 3 / 2688.0, 1e-9);
#define BAD(change, code, member) \
    do { \
        q = good; \
        change; \
        CHECK_ERR(moe_quantize(&q, &err), code, member); \
    } while (0)
    BAD(q.struct_size = 4, MOE_ERROR_ARGUMENT, "desc.struct_size");
    BAD(q.format = 0, MOE_ERROR_ARGUMENT, "desc.format");
    BAD(q.format = MOE_FORMAT_BF16, MOE_ERROR_ARGUMENT, "desc.format");
    BAD((q.format = MOE_FORMAT_MXFP4_W4A16, q.activations = 1), MOE_ERROR_ARGUMENT, "desc.format");
    BAD(q.format_block = 32, MOE_ERROR_ARGUMENT, "desc.format_block");
    BAD(q.scale_dtype = MOE_DTYPE_F32, MOE_ERROR_ARGUMENT, "desc.scale_dtype");
    CHECK_CONTAINS(err.text, "nvfp4 are e4m3");
    BAD(q.activations = 2, MOE_ERROR_ARGUMENT, "desc.activations");
    BAD(q.dtype = MOE_DTYPE_E4M3, MOE_ERROR_ARGUMENT, "desc.dtype");
    BAD(q.rows = -1, MOE_ERROR_ARGUMENT, "desc.rows");
    BAD(q.rows = INT64_MAX / 8, MOE_ERROR_ARGUMENT, "desc.rows");
    BAD(q.columns = 0, MOE_ERROR_ARGUMENT, "desc.columns");
    BAD(q.columns = 24, MOE_ERROR_ARGUMENT, "desc.columns");
    CHECK_CONTAINS(err.text, "every 16 values");
    BAD(q.codes_bytes = 64, MOE_ERROR_ARGUMENT, "desc.codes_bytes");
    BAD(q.scales_bytes = 5, MOE_ERROR_ARGUMENT, "desc.scales_bytes");
    BAD(q.values = NULL, MOE_ERROR_ARGUMENT, "desc.values");
    BAD(q.codes = NULL, MOE_ERROR_ARGUMENT, "desc.codes");
    BAD(q.scales = NULL, MOE_ERROR_ARGUMENT, "desc.scales");
    BAD(q.global_scale = -1, MOE_ERROR_ARGUMENT, "desc.global_scale");
    BAD(q.global_scale = MOE__INFINITY, MOE_ERROR_ARGUMENT, "desc.global_scale");
    values[33] = MOE__INFINITY;
    BAD((void)0, MOE_ERROR_DATA, "desc.values");
    CHECK_CONTAINS(err.text, "row 1, column 1");
#undef BAD
    CHECK_ERR(moe_quantize(NULL, &err), MOE_ERROR_ARGUMENT, "desc");
    CHECK_ERR(moe_dequantize(NULL, &err), MOE_ERROR_ARGUMENT, "desc");
}

// ---- layers ---------------------------------------------------------------------------------------------------------

TEST(every_format_gives_the_bits_of_the_reference)
{
    static const char *const isas[] = { "scalar", "avx2", "avx512", "neon" };
    for (int v = 0; v < VARIANTS; v++)
        for (int i = 0; i < 4; i++) {
            fixture f = fixture_of(&variants[v], i % 2 == 0 ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_RELU2);
            int isa = 0;
            while (strcmp(moe__isa_names[isa], isas[i]) != 0) isa++;
            if (!moe__isa_available(isa)) continue;
            f.context_desc.isa = isas[i];
            f.tokens = 1 + 12 * i;
            CHECK_LAYER(&f, name_of(&variants[v]));
            f = fixture_of(&variants[v], MOE_ACTIVATION_GEGLU_TANH);
            f.context_desc.isa = isas[i];
            f.tokens = 70; // many rows of an expert
            f.layer.num_experts = 5;
            CHECK_LAYER(&f, name_of(&variants[v]));
        }
}

TEST(formats_with_everything_beside_them)
{
    for (int v = 0; v < VARIANTS; v++) {
        fixture f = fixture_of(&variants[v], MOE_ACTIVATION_SWIGLU);
        f.layer.gemm1_bias = f.layer.gemm2_bias = 1;
        f.layer.routing.extra_slots = 1;
        f.layer.shared.count = 2;
        f.layer.shared.intermediate_size = variants[v].inner;
        f.layer.shared.gate = 1;
        if (v % 2 == 1) f.layer.shared.format = MOE_FORMAT_BF16 + v / 2 % 2;
        if (v % 3 == 0) f.layer.routing.weight_on = MOE_WEIGHT_ON_INPUT;
        if (v % 4 == 0) f.pruned = 5;
        CHECK_LAYER(&f, name_of(&variants[v]));
        f = fixture_of(&variants[v], MOE_ACTIVATION_SWIGLU);
        f.plan_desc.intermediate_dtype = MOE_DTYPE_F32 + v % 3;
        f.layer.row_norm = 1;
        CHECK_LAYER(&f, name_of(&variants[v]));
    }
}

// A slice of a rank has the rows and columns of the whole, also where it begins inside a block of scales.
TEST(slices_that_cut_a_block_have_the_values_of_the_whole)
{
    for (int v = 0; v < VARIANTS; v++) {
        fixture whole = fixture_of(&variants[v], MOE_ACTIVATION_SWIGLU);
        int h = variants[v].hidden, inner = variants[v].inner, ranks, seen = 0;
        float *a = (float *)malloc(1024 * 4), *b = (float *)malloc(1024 * 4);
        whole.layer.num_experts = 2;
        whole.layer.routing.top_k = 1;
        whole.layer.shared.count = 2;
        whole.layer.shared.intermediate_size = inner;
        REQUIRE_OK(fixture_open(&whole, &err));
        ranks = inner / 32 < 2 ? 1 : inner / 32 < 5 ? inner / 32 : 5;
        for (int rank = 0; rank < ranks; rank++) {
            fixture f = fixture_of(&variants[v], MOE_ACTIVATION_SWIGLU);
            int first, count;
            f.layer.num_experts = 2;
            f.layer.routing.top_k = 1;
            f.layer.shared = whole.layer.shared;
            f.layer.parallel.tp_size = ranks;
            f.layer.parallel.tp_rank = rank;
            REQUIRE_OK(fixture_open(&f, &err));
            first = f.weights->layout.expert.first_feature;
            count = f.weights->layout.expert.features;
            seen += count;
            for (int i = 0; i < count; i++)
                for (int role = MOE_TENSOR_GATE; role <= MOE_TENSOR_UP; role++) {
                    CHECK_OK(moe_weights_read_row(whole.weights, role, 1, first + i, a, &err));
                    CHECK_OK(moe_weights_read_row(f.weights, role, 1, i, b, &err));
                    CHECK(memcmp(a, b, (size_t)h * 4) == 0);
                }
            for (int i = 0; i < h; i++) {
                CHECK_OK(moe_weights_read_row(whole.weights, MOE_TENSOR_DOWN, 1, i, a, &err));
                CHECK_OK(moe_weights_read_row(f.weights, MOE_TENSOR_DOWN, 1, i, b, &err));
                CHECK(memcmp(a + first, b, (size_t)count * 4) == 0);
            }
            first = f.weights->layout.shared.first_feature;
            count = f.weights->layout.shared.features;
            for (int i = 0; i < count; i++) {
                CHECK_OK(moe_weights_read_row(whole.weights, MOE_TENSOR_SHARED_UP, -1, first + i, a, &err));
                CHECK_OK(moe_weights_read_row(f.weights, MOE_TENSOR_SHARED_UP, -1, i, b, &err));
                CHECK(memcmp(a, b, (size_t)h * 4) == 0);
            }
            fixture_close(&f);
            f = fixture_of(&variants[v], MOE_ACTIVATION_SWIGLU);
            f.layer.parallel.tp_size = ranks;
            f.layer.parallel.tp_rank = rank;
            CHECK_LAYER(&f, name_of(&variants[v]));
        }
        CHECK_EQ(seen, inner);
        fixture_close(&whole);
        free(a);
        free(b);
    }
}

TEST(saved_weights_come_back)
{
    for (int v = 0; v < VARIANTS; v++) {
        fixture f = fixture_of(&variants[v], MOE_ACTIVATION_SWIGLU);
        moe_weights *loaded = NULL;
        char path[1024];
        snprintf(path, sizeof path, "%s", test_temp("test_formats.moe"));
        f.layer.shared.count = 1;
        f.layer.shared.intermediate_size = variants[v].inner;
        REQUIRE_OK(fixture_open(&f, &err));
        CHECK_OK(moe_weights_save(f.weights, path, &err));
        CHECK_OK(moe_weights_load(f.ctx, &f.layer, path, &loaded, &err));
        CHECK_EQ(moe_execute(f.plan, loaded, &f.args, NULL), MOE_OK);
        CHECK_OK(fixture_reference(&f, f.args.out_ids, f.args.out_weights, &err));
        CHECK_EQ(fixture_differs(&f), 0);
        moe_weights_destroy(loaded);
        remove(path);
        fixture_close(&f);
    }
}

TEST_MAIN(
    T(codes_are_the_nearest_and_scales_their_formulas)
    T(rows_of_activations_are_rounded_as_moe_quantize_does)
    T(quantize_refuses_by_name)
    T(every_format_gives_the_bits_of_the_reference)
    T(formats_with_everything_beside_them)
    T(slices_that_cut_a_block_have_the_values_of_the_whole)
    T(saved_weights_come_back))
