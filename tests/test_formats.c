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
    { MOE_FORMAT_INT4_W4A16, 128, MOE_DTYPE_F32, 128, 256 },
};
enum { VARIANTS = sizeof variants / sizeof variants[0] };

// Where a run is slow, some of them: MOE_TEST_SMALL.
static int variant_step(void) { return test_small() ? 5 : 1; }
static int first_variant(void) { return variant_step() / 2; }

static fixture fixture_of(const variant *v, int activation)
{
    fixture f;
    memset(&f, 0, sizeof f);
    f.tokens = 3;
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
    for (int v = first_variant(); v < VARIANTS; v += variant_step()) {
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
    for (int v = first_variant(); v < VARIANTS; v += variant_step()) {
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
    for (int v = first_variant(); v < VARIANTS; v += variant_step())
        for (int i = 0; i < 4; i++) {
            fixture f = fixture_of(&variants[v], i % 2 == 0 ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_RELU2);
            int isa = 0;
            while (strcmp(moe__isa_names[isa], isas[i]) != 0) isa++;
            if (!moe__isa_available(isa)) continue;
            f.context_desc.isa = isas[i];
            f.tokens = 1 + i;
            f.layer.num_experts = 4;
            CHECK_LAYER(&f, name_of(&variants[v]));
            if (v % 4 != i) continue; // many rows of an expert
            f = fixture_of(&variants[v], MOE_ACTIVATION_GEGLU_TANH);
            f.context_desc.isa = isas[i];
            f.tokens = 18;
            f.layer.num_experts = 4;
            CHECK_LAYER(&f, name_of(&variants[v]));
        }
}

TEST(formats_with_everything_beside_them)
{
    for (int v = first_variant(); v < VARIANTS; v += variant_step()) {
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
    for (int v = first_variant(); v < VARIANTS; v += variant_step()) {
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
    for (int v = first_variant(); v < VARIANTS; v += variant_step()) {
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

// ---- dialects -------------------------------------------------------------------------------------------------------

// One matrix, its codes, and what they stand for.
typedef struct coded {
    moe_quantize_desc q;
    float *want;
} coded;

static coded coded_make(const variant *v, int rows, int columns, int seed)
{
    coded c;
    float *values = random_tensor((uint64_t)seed + 900, 1, v->format, (size_t)rows * (size_t)columns,
                                  0.7f + 0.1f * (float)seed);
    (void)quantized_make(&c.q, v->format, v->block, v->scale_dtype, values, rows, columns, &err);
    c.want = values;
    CHECK_OK(moe_dequantize(&c.q, &err));
    return c;
}

static void coded_free(coded *c)
{
    quantized_free(&c->q);
    free(c->want);
}

static int reads_as_coded(const moe_weights *w, int role, int expert, const coded *c)
{
    float row[1024];
    for (int r = 0; r < c->q.rows; r++)
        if (moe_weights_read_row(w, role, expert, r, row, &err) != MOE_OK ||
            memcmp(row, c->want + r * c->q.columns, (size_t)c->q.columns * 4) != 0)
            return 0;
    return 1;
}

// The three matrices of an expert; released when they have been compared.
static const int roles[3] = { MOE_TENSOR_GATE, MOE_TENSOR_UP, MOE_TENSOR_DOWN };

static void expert_make(const variant *v, int expert, coded *m)
{
    for (int i = 0; i < 3; i++)
        m[i] = coded_make(v, i == 2 ? v->hidden : v->inner, i == 2 ? v->inner : v->hidden, expert * 3 + i);
}

static void expert_check(const moe_weights *w, int expert, coded *m)
{
    for (int i = 0; i < 3; i++) {
        CHECK(reads_as_coded(w, roles[i], expert, &m[i]));
        coded_free(&m[i]);
    }
}

// Rows of codes (part 0) or of scales (part 1) of two matrices in one, as `halves` and `order` have them.
static unsigned char *fused(const coded *gate, const coded *up, int halves, int order, int part, size_t rows,
                            size_t *bytes)
{
    const moe_quantize_desc *g = &gate->q, *u = &up->q;
    size_t all = (size_t)(part == 0 ? g->codes_bytes : g->scales_bytes), row = all / rows;
    unsigned char *out = (unsigned char *)malloc(2 * all);
    for (size_t n = 0; n < 2 * rows; n++) {
        size_t block = order == MOE_ROWS_SHUFFLED_128 ? 32 : 16, s = block / 8;
        size_t j = order == MOE_ROWS_NATURAL ? n : block * (n / block) + n % 8 * s + n % block / 8;
        int interleaved = halves >= MOE_HALVES_INTERLEAVED, half = (int)(interleaved ? j % 2 : j / rows);
        int up_first = halves == MOE_HALVES_UP_GATE || halves == MOE_HALVES_INTERLEAVED_UP_GATE;
        const moe_quantize_desc *q = (half == 1) != up_first ? u : g;
        size_t from = interleaved ? j / 2 : j % rows;
        memcpy(out + n * row, (const char *)(part == 0 ? q->codes : q->scales) + from * row, row);
    }
    *bytes = 2 * all;
    return out;
}

static moe_layer_desc dialect_layer(const variant *v)
{
    moe_layer_desc layer = small_layer(v->format, MOE_ACTIVATION_SWIGLU);
    layer.format_block = v->block;
    layer.scale_dtype = v->scale_dtype;
    layer.hidden_size = v->hidden;
    layer.intermediate_size = v->inner;
    layer.num_experts = 2;
    layer.routing.top_k = 1;
    return layer;
}

static moe_tensor tensor_of(int role, int part, int expert, int dtype, const void *data, size_t bytes)
{
    moe_tensor t;
    memset(&t, 0, sizeof t);
    t.role = role;
    t.part = part;
    t.expert = expert;
    t.dtype = dtype;
    t.data = data;
    t.data_bytes = bytes;
    return t;
}

// The other tensors of an expert's format that a dialect has no word about.
static void set_rest(moe_weights *w, int role, int expert, const coded *c)
{
    float input = 0.5f;
    if (c->q.format == MOE_FORMAT_NVFP4 || c->q.format == MOE_FORMAT_NVFP4_W4A16)
        CHECK_OK(set_part(w, role, expert, MOE_PART_GLOBAL_SCALE, MOE_DTYPE_F32, 0, 0, &c->q.global_scale, 4, &err));
    if (c->q.format == MOE_FORMAT_NVFP4)
        CHECK_OK(set_part(w, role, expert, MOE_PART_INPUT_SCALE, MOE_DTYPE_F32, 0, 0, &input, 4, &err));
}

static void set_whole(moe_weights *w, int role, int expert, coded *c)
{
    CHECK_OK(set_quantized(w, role, expert, &c->q, 0.02f + 0.005f * (float)(expert + 1), &err));
}

// Formats whose scales belong to one row each: fused in every order, shuffled with their scales, codes in bytes.
TEST(fused_and_shuffled_codes_and_scales)
{
    for (int v = first_variant(); v < VARIANTS; v += variant_step())
        for (int halves = MOE_HALVES_GATE_UP; halves <= MOE_HALVES_INTERLEAVED_UP_GATE; halves++)
            for (int order = MOE_ROWS_NATURAL; order <= MOE_ROWS_SHUFFLED_64; order++) {
                variant one = variants[v];
                moe__scheme s = moe__weight_scheme(one.format, one.block, one.scale_dtype);
                moe_layer_desc layer;
                moe_context *ctx;
                moe_weights *w;
                moe_tensor t;
                coded m[2][3];
                if (s.rows > 1 && (order != 0 || halves >= MOE_HALVES_INTERLEAVED)) continue;
                if (s.rows != 1 && s.rows != s.columns) continue;
                if (s.rows == 0) continue;
                if (one.inner % 32 != 0) one.inner = 64;
                layer = dialect_layer(&one);
                REQUIRE_OK(moe_context_create(NULL, &ctx, &err));
                REQUIRE_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
                for (int e = 0; e < 2; e++) {
                    expert_make(&one, e, m[e]);
                    for (int part = 0; part < 2; part++) {
                        size_t bytes;
                        int64_t rows = part == 0 || s.rows == 1 ? one.inner : one.inner / s.rows;
                        unsigned char *data = fused(&m[e][0], &m[e][1], halves, order, part, (size_t)rows, &bytes);
                        t = tensor_of(MOE_TENSOR_GATE_UP, part, e, part == 0 ? s.dtype : s.scale_dtype, data, bytes);
                        t.halves = halves;
                        t.row_order = order;
                        t.rank = 2;
                        t.dims[0] = 2 * rows;
                        t.dims[1] = part == 0 ? one.hidden : s.columns == 0 ? 1 : one.hidden / s.columns;
                        if (moe_dtype_bits(t.dtype) == 4 && v % 2 == 0) {
                            t.dtype = MOE_DTYPE_U8;
                            t.dims[1] /= 2;
                        }
                        if (part == 1 && s.scale_dtype == MOE_DTYPE_UE8M0) t.dtype = MOE_DTYPE_U8;
                        CHECK_OK(moe_weights_set_tensor(w, &t, &err));
                        free(data);
                    }
                    for (int i = 0; i < 2; i++) set_rest(w, MOE_TENSOR_GATE + i, e, &m[e][i]);
                    set_whole(w, MOE_TENSOR_DOWN, e, &m[e][2]);
                }
                CHECK_OK(moe_weights_seal(w, &err));
                for (int e = 0; e < 2; e++) expert_check(w, e, m[e]);
                moe_weights_destroy(w);
                moe_context_destroy(ctx);
            }
}

// Blocks of 128 bytes of codes, and input-major codes of 8 bits.
TEST(codes_in_other_layouts)
{
    for (int v = first_variant(); v < VARIANTS; v += variant_step())
        for (int layout = MOE_LAYOUT_MAJOR_MN; layout <= MOE_LAYOUT_BLOCK_MAJOR_K; layout++) {
            variant one = variants[v];
            moe__scheme s = moe__weight_scheme(one.format, one.block, one.scale_dtype);
            int bits = moe_dtype_bits(s.dtype), block = 1024 / bits;
            moe_layer_desc layer;
            moe_context *ctx;
            moe_weights *w;
            coded m;
            unsigned char *data;
            moe_tensor t;
            size_t row;
            one.hidden = 512;
            layer = dialect_layer(&one);
            m = coded_make(&one, one.inner, one.hidden, v);
            row = (size_t)m.q.codes_bytes / (size_t)one.inner;
            data = (unsigned char *)malloc((size_t)m.q.codes_bytes);
            for (size_t r = 0; r < (size_t)one.inner; r++)
                for (size_t i = 0; i < row; i++)
                    data[layout == MOE_LAYOUT_MAJOR_MN ? i * (size_t)one.inner + r
                                                       : (i / 128 * (size_t)one.inner + r) * 128 + i % 128] =
                        ((unsigned char *)m.q.codes)[r * row + i];
            REQUIRE_OK(moe_context_create(NULL, &ctx, &err));
            REQUIRE_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
            t = tensor_of(MOE_TENSOR_UP, 0, 1, s.dtype, data, (size_t)m.q.codes_bytes);
            t.layout = layout;
            t.rank = layout == MOE_LAYOUT_MAJOR_MN ? 2 : 3;
            t.dims[0] = layout == MOE_LAYOUT_MAJOR_MN ? one.hidden : one.hidden / block;
            t.dims[1] = one.inner;
            t.dims[2] = block;
            if (layout == MOE_LAYOUT_MAJOR_MN && bits == 4) {
                CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.layout");
            } else {
                CHECK_OK(moe_weights_set_tensor(w, &t, &err));
                t = tensor_of(MOE_TENSOR_UP, MOE_PART_SCALE, 1, s.scale_dtype, m.q.scales, (size_t)m.q.scales_bytes);
                t.rank = s.rows == 0 ? 0 : 2;
                t.dims[0] = s.rows > 0 ? (one.inner + s.rows - 1) / s.rows : 0;
                t.dims[1] = s.columns > 0 ? one.hidden / s.columns : 1;
                if (s.columns == 0 && layout == MOE_LAYOUT_MAJOR_MN) { // [1, out]
                    t.dims[1] = t.dims[0];
                    t.dims[0] = 1;
                }
                CHECK_OK(moe_weights_set_tensor(w, &t, &err));
                set_rest(w, MOE_TENSOR_UP, 1, &m);
                CHECK(reads_as_coded(w, MOE_TENSOR_UP, 1, &m));
            }
            free(data);
            coded_free(&m);
            moe_weights_destroy(w);
            moe_context_destroy(ctx);
        }
}

// gpt-oss: [E, 2 I, H / 32, 16] bytes of interleaved halves, scales as bytes.
TEST(blocks_of_gpt_oss)
{
    variant one = { MOE_FORMAT_MXFP4_W4A16, 0, 0, 96, 64 };
    moe_layer_desc layer = dialect_layer(&one);
    moe_context *ctx;
    moe_weights *w;
    coded m[2][3];
    unsigned char *data[2] = { NULL, NULL };
    size_t bytes = 0;
    REQUIRE_OK(moe_context_create(NULL, &ctx, &err));
    REQUIRE_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
    for (int e = 0; e < 2; e++) expert_make(&one, e, m[e]);
    for (int part = 0; part < 2; part++) {
        moe_tensor t;
        unsigned char *all;
        for (int e = 0; e < 2; e++) data[e] = fused(&m[e][0], &m[e][1], MOE_HALVES_INTERLEAVED, 0, part, 64, &bytes);
        all = (unsigned char *)malloc(2 * bytes);
        for (int e = 0; e < 2; e++) memcpy(all + (size_t)e * bytes, data[e], bytes);
        t = tensor_of(MOE_TENSOR_GATE_UP, part, -1, MOE_DTYPE_U8, all, 2 * bytes);
        t.halves = MOE_HALVES_INTERLEAVED;
        t.rank = part == 0 ? 4 : 3;
        t.dims[0] = 2;
        t.dims[1] = 2 * one.inner;
        t.dims[2] = one.hidden / 32;
        t.dims[3] = 16;
        CHECK_OK(moe_weights_set_tensor(w, &t, &err));
        for (int e = 0; e < 2; e++) free(data[e]);
        free(all);
    }
    for (int e = 0; e < 2; e++) set_whole(w, MOE_TENSOR_DOWN, e, &m[e][2]);
    CHECK_OK(moe_weights_seal(w, &err));
    for (int e = 0; e < 2; e++) expert_check(w, e, m[e]);
    moe_weights_destroy(w);
    moe_context_destroy(ctx);
}

// compressed-tensors: eight INT4 + 8 in an int32, their shape beside them; NVFP4 with factors that divide.
TEST(codes_of_compressed_tensors)
{
    static const variant both[2] = { { MOE_FORMAT_INT4_W4A16, 32, 0, 96, 64 }, { MOE_FORMAT_NVFP4, 0, 0, 96, 64 } };
    for (int v = 0; v < 2; v++) {
        moe_layer_desc layer = dialect_layer(&both[v]);
        moe_context *ctx;
        moe_weights *w;
        coded m = coded_make(&both[v], 64, 96, 1);
        float factors[2] = { 0, 0 };
        uint32_t words[64 * 12];
        int64_t shape[2] = { 64, 96 };
        moe_tensor t;
        REQUIRE_OK(moe_context_create(NULL, &ctx, &err));
        REQUIRE_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
        memset(words, 0, sizeof words);
        for (int i = 0; i < 64 * 96; i++) {
            uint32_t code = (uint32_t)((unsigned char *)m.q.codes)[i / 2] >> (i % 2 * 4) & 15;
            words[i / 8] |= (code ^ 8) << (i % 8 * 4);
        }
        t = tensor_of(MOE_TENSOR_GATE, 0, 1, v == 0 ? MOE_DTYPE_I32 : MOE_DTYPE_U8, v == 0 ? (void *)words : m.q.codes,
                      (size_t)m.q.codes_bytes);
        t.rank = 2;
        t.dims[0] = 64;
        t.dims[1] = v == 0 ? 12 : 48;
        CHECK_OK(moe_weights_set_tensor(w, &t, &err));
        CHECK_OK(set_part(w, MOE_TENSOR_GATE, 1, MOE_PART_SCALE, v == 0 ? MOE_DTYPE_BF16 : MOE_DTYPE_E4M3, 64,
                          v == 0 ? 3 : 6, m.q.scales, m.q.scales_bytes, &err));
        t = tensor_of(MOE_TENSOR_GATE, MOE_PART_SHAPE, 1, MOE_DTYPE_I64, shape, sizeof shape);
        t.rank = 1;
        t.dims[0] = 2;
        CHECK_OK(moe_weights_set_tensor(w, &t, &err));
        shape[1] = 95;
        CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_DATA, "tensor.data");
        CHECK_CONTAINS(err.text, "[64, 95]");
        if (v == 1) {
            factors[0] = 1.0f / m.q.global_scale;
            CHECK_OK(set_part(w, MOE_TENSOR_GATE, 1, MOE_PART_GLOBAL_SCALE_RECIPROCAL, MOE_DTYPE_F32, 1, 0, factors, 4,
                              &err));
            factors[1] = 0.25f;
            CHECK_OK(set_part(w, MOE_TENSOR_GATE, 1, MOE_PART_INPUT_SCALE_RECIPROCAL, MOE_DTYPE_F32, 1, 0, factors + 1,
                              4, &err));
            factors[1] = 0.5f; // of up: the larger scale counts
            CHECK_OK(set_part(w, MOE_TENSOR_UP, 1, MOE_PART_INPUT_SCALE_RECIPROCAL, MOE_DTYPE_F32, 0, 0, factors + 1, 4,
                              &err));
            CHECK_OK(moe_weights_read_row(w, MOE_TENSOR_INPUT_SCALES, 1, 0, factors, &err));
            CHECK_EQ(factors[0], 4.0f);
            CHECK_EQ(factors[1], 0.0f);
            // The reciprocal's reciprocal may be one rounding away.
            for (int i = 0; i < 64 * 96; i++) {
                float row[96];
                if (i % 96 == 0) CHECK_OK(moe_weights_read_row(w, MOE_TENSOR_GATE, 1, i / 96, row, &err));
                CHECK_NEAR(row[i % 96], m.want[i], fabs(m.want[i]) * 3e-7);
            }
        } else {
            CHECK(reads_as_coded(w, MOE_TENSOR_GATE, 1, &m));
        }
        coded_free(&m);
        moe_weights_destroy(w);
        moe_context_destroy(ctx);
    }
}

// Scales of TRTLLM-Gen: swizzled, those of every expert on their own.
TEST(swizzled_scales)
{
    for (int v = first_variant(); v < VARIANTS; v += variant_step())
        for (int layout = MOE_SCALES_128X4; layout <= MOE_SCALES_8X4; layout++) {
            moe__scheme s = moe__weight_scheme(variants[v].format, variants[v].block, variants[v].scale_dtype);
            int rows = variants[v].inner, columns = s.columns > 0 ? variants[v].hidden / s.columns : 1;
            int size = moe_dtype_bits(s.scale_dtype) / 8;
            size_t bytes = (size_t)(moe_scales_count(layout, rows, columns) * size);
            unsigned char *all = (unsigned char *)malloc(2 * bytes);
            moe_layer_desc l = dialect_layer(&variants[v]);
            moe_context *ctx;
            moe_weights *w;
            moe_tensor t;
            coded m[2];
            REQUIRE_OK(moe_context_create(NULL, &ctx, &err));
            REQUIRE_OK(moe_weights_create(ctx, &l, NULL, &w, &err));
            for (int e = 0; e < 2; e++) m[e] = coded_make(&variants[v], rows, variants[v].hidden, e);
            t = tensor_of(MOE_TENSOR_UP, MOE_PART_SCALE, -1, s.scale_dtype, all, 2 * bytes);
            t.scale_layout = layout;
            t.rank = 3;
            t.dims[0] = 2;
            t.dims[1] = rows;
            t.dims[2] = columns;
            if (s.rows != 1 || s.columns == 0) {
                CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.scale_layout");
            } else {
                for (int e = 0; e < 2; e++)
                    CHECK_OK(moe_scales_convert(m[e].q.scales, MOE_SCALES_LINEAR, all + (size_t)e * bytes, layout, rows,
                                                columns, size, &err));
                t.data_bytes--;
                CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.data_bytes");
                t.data_bytes++;
                CHECK_OK(moe_weights_set_tensor(w, &t, &err));
                for (int e = 0; e < 2; e++) {
                    CHECK_OK(set_part(w, MOE_TENSOR_UP, e, 0, s.dtype, rows, variants[v].hidden, m[e].q.codes,
                                      m[e].q.codes_bytes, &err));
                    set_rest(w, MOE_TENSOR_UP, e, &m[e]);
                    CHECK(reads_as_coded(w, MOE_TENSOR_UP, e, &m[e]));
                }
            }
            for (int e = 0; e < 2; e++) coded_free(&m[e]);
            free(all);
            moe_weights_destroy(w);
            moe_context_destroy(ctx);
        }
}

// ggml's blocks, written here by its formulas: into formats with such codes, and rounded into float ones.
TEST(blocks_of_ggml)
{
    static const struct { int layout, bytes, format, scale_dtype; } cases[] = {
        { MOE_LAYOUT_GGML_Q4_0, 18, MOE_FORMAT_INT4_W4A16, MOE_DTYPE_F16 },
        { MOE_LAYOUT_GGML_Q4_0, 18, MOE_FORMAT_INT4_W4A16, MOE_DTYPE_F32 },
        { MOE_LAYOUT_GGML_Q4_0, 18, MOE_FORMAT_F32, 0 },
        { MOE_LAYOUT_GGML_MXFP4, 17, MOE_FORMAT_MXFP4_W4A16, 0 },
        { MOE_LAYOUT_GGML_MXFP4, 17, MOE_FORMAT_MXFP4_W4A8, 0 },
        { MOE_LAYOUT_GGML_MXFP4, 17, MOE_FORMAT_BF16, 0 },
        { MOE_LAYOUT_GGML_Q8_0, 34, MOE_FORMAT_F32, 0 },
        { MOE_LAYOUT_GGML_Q8_0, 34, MOE_FORMAT_BF16, 0 },
    };
    static const float fp4[16] = { 0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6 };
    enum { ROWS = 64, COLUMNS = 96, BLOCKS = ROWS * COLUMNS / 32 };
    for (size_t n = 0; n < sizeof cases / sizeof cases[0]; n++) {
        int block_size = cases[n].format == MOE_FORMAT_INT4_W4A16 ? 32 : 0;
        variant one = { cases[n].format, block_size, cases[n].scale_dtype, COLUMNS, ROWS };
        static float want[2][ROWS * COLUMNS];
        unsigned char *data = (unsigned char *)malloc((size_t)(2 * BLOCKS * cases[n].bytes));
        moe_layer_desc l = dialect_layer(&one);
        moe_context *ctx;
        moe_weights *w;
        moe_tensor t;
        uint64_t state = 17 + n;
        int dtype = moe__format_dtype(cases[n].format);
        for (int b = 0; b < 2 * BLOCKS; b++) {
            unsigned char *block = data + b * cases[n].bytes;
            uint16_t half = moe__f32_to_f16(0.01f + 0.001f * (float)(b % 50));
            float scale = moe__f16_to_f32(half);
            for (int i = 0; i < cases[n].bytes; i++) block[i] = (unsigned char)(test_random_u32(&state) >> 20);
            if (cases[n].layout == MOE_LAYOUT_GGML_MXFP4) {
                block[0] = (unsigned char)(120 + b % 9);
                scale = moe__bits_f32((uint32_t)block[0] << 23);
            } else {
                memcpy(block, &half, 2);
            }
            for (int i = 0; i < 32; i++) {
                unsigned char *codes = block + cases[n].bytes - (cases[n].layout == MOE_LAYOUT_GGML_Q8_0 ? 32 : 16);
                int code = i < 16 ? codes[i % 16] & 15 : codes[i % 16] >> 4;
                float value = cases[n].layout == MOE_LAYOUT_GGML_Q8_0   ? (float)(signed char)codes[i] * scale
                              : cases[n].layout == MOE_LAYOUT_GGML_Q4_0 ? (float)(code - 8) * scale
                                                                        : fp4[code] * scale;
                want[b / BLOCKS][b % BLOCKS * 32 + i] = dtype != 0 ? moe__round_to(value, dtype) : value;
            }
        }
        REQUIRE_OK(moe_context_create(NULL, &ctx, &err));
        REQUIRE_OK(moe_weights_create(ctx, &l, NULL, &w, &err));
        t = tensor_of(MOE_TENSOR_UP, 0, -1, MOE_DTYPE_U8, data, (size_t)(2 * BLOCKS * cases[n].bytes));
        t.layout = cases[n].layout;
        t.rank = 3;
        t.dims[0] = 2;
        t.dims[1] = ROWS;
        t.dims[2] = COLUMNS;
        CHECK_OK(moe_weights_set_tensor(w, &t, &err));
        for (int e = 0; e < 2; e++)
            for (int r = 0; r < ROWS; r++) {
                float row[COLUMNS];
                CHECK_OK(moe_weights_read_row(w, MOE_TENSOR_UP, e, r, row, &err));
                CHECK(memcmp(row, want[e] + r * COLUMNS, sizeof row) == 0);
            }
        CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_STATE, "tensor.role");
        t.expert = 0;
        CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.dims");
        t.rank = 2;
        t.dims[0] = ROWS;
        t.dims[1] = COLUMNS;
        CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.data_bytes");
        t.data_bytes /= 2;
        t.role = MOE_TENSOR_GATE;
        CHECK_OK(moe_weights_set_tensor(w, &t, &err));
        t.dtype = MOE_DTYPE_I8;
        CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.dtype");
        t.layout = cases[n].layout == MOE_LAYOUT_GGML_Q8_0 ? MOE_LAYOUT_GGML_Q4_0 : MOE_LAYOUT_GGML_Q8_0;
        if (dtype == 0) CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.layout");
        t.role = MOE_TENSOR_ROUTER;
        CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.layout");
        free(data);
        moe_weights_destroy(w);
        moe_context_destroy(ctx);
    }
}

// Single values: alone, stacked, and two for a fused tensor, gate first whatever its halves are.
TEST(single_values_stacked_and_fused)
{
    static const variant both[2] = { { MOE_FORMAT_FP8_PER_TENSOR, 0, 0, 72, 40 },
                                     { MOE_FORMAT_NVFP4_W4A16, 0, 0, 80, 48 } };
    for (int v = 0; v < 2; v++)
        for (int kind = 0; kind < 3; kind++) {
            moe_layer_desc layer = dialect_layer(&both[v]);
            int part = v == 0 ? MOE_PART_SCALE : MOE_PART_GLOBAL_SCALE;
            const float values[4] = { 0.5f, 2, 3, 0.125f };
            moe_context *ctx;
            moe_weights *w;
            moe_tensor t;
            REQUIRE_OK(moe_context_create(NULL, &ctx, &err));
            REQUIRE_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
            t = tensor_of(MOE_TENSOR_GATE_UP, part, -1, MOE_DTYPE_F32, values, kind == 0 ? 16 : 8);
            t.halves = MOE_HALVES_UP_GATE;
            t.rank = kind == 2 ? 1 : 2; // [E, 2], [E, 1], [E]
            t.dims[0] = 2;
            t.dims[1] = kind == 0 ? 2 : 1;
            CHECK_OK(moe_weights_set_tensor(w, &t, &err));
            CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_STATE, "tensor.role");
            for (int e = 0; e < 2; e++)
                for (int half = 0; half < 2; half++) {
                    moe__block block = moe__weights_expert(w, e);
                    float got = v == 0 ? moe__load(block.scales1, MOE_DTYPE_F32, half) : block.factors[half];
                    CHECK_EQ(got, values[kind == 0 ? e * 2 + half : e]);
                }
            moe_weights_destroy(w);
            moe_context_destroy(ctx);
        }
}

TEST(wrong_values_and_missing_ones_are_named)
{
    variant one = { MOE_FORMAT_NVFP4, 0, 0, 80, 48 };
    moe_layer_desc layer = dialect_layer(&one);
    moe_context *ctx;
    moe_weights *w;
    coded m = coded_make(&one, 48, 80, 3), down = coded_make(&one, 80, 48, 4);
    float zero = 0, infinite = MOE__INFINITY, one_value = 1, halves[2] = { 1, -1 }, read[2];
    const int64_t shape[2] = { 80, 48 };
    moe_tensor t;
    REQUIRE_OK(moe_context_create(NULL, &ctx, &err));
    REQUIRE_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
    CHECK_ERR(moe_weights_seal(w, &err), MOE_ERROR_MISSING, "weights");
    CHECK_CONTAINS(err.text, "lack gate of expert 0, and 23 more tensors");
    ((unsigned char *)m.q.scales)[7] = 0x7f;
    CHECK_ERR(set_part(w, MOE_TENSOR_UP, 0, MOE_PART_SCALE, MOE_DTYPE_E4M3, 48, 5, m.q.scales, m.q.scales_bytes, &err),
              MOE_ERROR_DATA, "tensor.data");
    CHECK_CONTAINS(err.text, "scale of up of expert 0");
    CHECK_CONTAINS(err.text, "not finite");
    ((unsigned char *)m.q.scales)[7] = 0x30;
    CHECK_OK(set_part(w, MOE_TENSOR_UP, 0, MOE_PART_SCALE, MOE_DTYPE_E4M3, 48, 5, m.q.scales, m.q.scales_bytes, &err));
    CHECK_ERR(set_part(w, MOE_TENSOR_UP, 0, MOE_PART_SCALE, MOE_DTYPE_E4M3, 48, 5, m.q.scales, m.q.scales_bytes, &err),
              MOE_ERROR_STATE, "tensor.role");
    CHECK_ERR(set_part(w, MOE_TENSOR_UP, 1, MOE_PART_SCALE, MOE_DTYPE_E4M3, 48, 6, m.q.scales, m.q.scales_bytes, &err),
              MOE_ERROR_ARGUMENT, "tensor.dims");
    CHECK_ERR(set_part(w, MOE_TENSOR_UP, 1, MOE_PART_SCALE, MOE_DTYPE_I8, 48, 5, m.q.scales, m.q.scales_bytes, &err),
              MOE_ERROR_ARGUMENT, "tensor.dtype");
    CHECK_ERR(set_part(w, MOE_TENSOR_UP, 1, MOE_PART_DATA, MOE_DTYPE_BF16, 48, 80, m.q.codes, 48 * 80 * 2, &err),
              MOE_ERROR_ARGUMENT, "tensor.dtype");
    CHECK_CONTAINS(err.text, "moe_quantize()");
    CHECK_ERR(set_part(w, MOE_TENSOR_UP, 1, MOE_PART_DATA, MOE_DTYPE_E4M3, 48, 80, m.q.codes, 48 * 80, &err),
              MOE_ERROR_ARGUMENT, "tensor.dtype");
    CHECK_ERR(set_part(w, MOE_TENSOR_UP, 1, MOE_PART_INPUT_SCALE, MOE_DTYPE_F32, 0, 0, &zero, 4, &err), MOE_ERROR_DATA,
              "tensor.data");
    t = tensor_of(MOE_TENSOR_GATE_UP, MOE_PART_INPUT_SCALE, 1, MOE_DTYPE_F32, halves, 8); // good, bad: none is kept
    t.halves = MOE_HALVES_GATE_UP;
    t.rank = 1;
    t.dims[0] = 2;
    CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_DATA, "tensor.data");
    CHECK_OK(moe_weights_read_row(w, MOE_TENSOR_INPUT_SCALES, 1, 0, read, &err));
    CHECK_EQ(read[0], 0.0f);
    CHECK_ERR(set_part(w, MOE_TENSOR_UP, 1, MOE_PART_GLOBAL_SCALE_RECIPROCAL, MOE_DTYPE_F32, 0, 0, &zero, 4, &err),
              MOE_ERROR_DATA, "tensor.data");
    CHECK_ERR(set_part(w, MOE_TENSOR_UP, 1, MOE_PART_GLOBAL_SCALE, MOE_DTYPE_F32, 0, 0, &infinite, 4, &err),
              MOE_ERROR_DATA, "tensor.data");
    layer.shared.count = 2;
    layer.shared.intermediate_size = 48;
    moe_weights_destroy(w);
    REQUIRE_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
    t = tensor_of(MOE_TENSOR_SHARED_DOWN, MOE_PART_GLOBAL_SCALE, -1, MOE_DTYPE_F32, &one_value, 4);
    t.index = 1; // one of two shared experts, but they are one matrix
    CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.index");
    t = tensor_of(MOE_TENSOR_SHARED_DOWN, MOE_PART_SHAPE, -1, MOE_DTYPE_I64, shape, 8);
    t.rank = 1;
    t.dims[0] = 1; // too short
    CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.dims");
    CHECK_ERR(set_part(w, MOE_TENSOR_ROUTER, -1, MOE_PART_SCALE, MOE_DTYPE_F32, 0, 0, &zero, 4, &err),
              MOE_ERROR_ARGUMENT, "tensor.part");
    t = tensor_of(MOE_TENSOR_INPUT_SCALES, 0, 0, MOE_DTYPE_F32, &zero, 4);
    CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.role");
    moe_weights_destroy(w);

    memset(&layer.shared, 0, sizeof layer.shared);
    REQUIRE_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
    for (int e = 0; e < 2; e++) {
        set_whole(w, MOE_TENSOR_GATE, e, &m);
        set_whole(w, MOE_TENSOR_DOWN, e, &down);
        CHECK_OK(set_part(w, MOE_TENSOR_UP, e, 0, MOE_DTYPE_E2M1, 48, 80, m.q.codes, m.q.codes_bytes, &err));
        CHECK_OK(set_part(w, MOE_TENSOR_UP, e, 1, MOE_DTYPE_E4M3, 48, 5, m.q.scales, m.q.scales_bytes, &err));
        if (e == 0) set_rest(w, MOE_TENSOR_UP, e, &m);
    }
    CHECK_ERR(moe_weights_seal(w, &err), MOE_ERROR_MISSING, "weights");
    CHECK_CONTAINS(err.text, "lack global scale of up of expert 1, and 1 more tensor");
    moe_weights_destroy(w);
    coded_free(&m);
    coded_free(&down);

    one.format = MOE_FORMAT_FP8_PER_CHANNEL; // a code that is no number; scales that bf16 cannot hold
    m = coded_make(&one, 48, 80, 3);
    layer = dialect_layer(&one);
    REQUIRE_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
    ((unsigned char *)m.q.codes)[81] = 0xff;
    CHECK_ERR(set_part(w, MOE_TENSOR_UP, 0, 0, MOE_DTYPE_E4M3, 48, 80, m.q.codes, m.q.codes_bytes, &err),
              MOE_ERROR_DATA, "tensor.data");
    CHECK_CONTAINS(err.text, "a code that is NaN");
    CHECK_ERR(set_part(w, MOE_TENSOR_UP, 0, MOE_PART_GLOBAL_SCALE, MOE_DTYPE_F32, 0, 0, &zero, 4, &err),
              MOE_ERROR_ARGUMENT, "tensor.part");
    moe_weights_destroy(w);
    coded_free(&m);
    one.format = MOE_FORMAT_INT4_W4A16;
    one.block = 32;
    one.hidden = 96;
    one.scale_dtype = MOE_DTYPE_F32;
    m = coded_make(&one, 48, 96, 3);
    layer = dialect_layer(&one);
    layer.intermediate_size = 64;
    layer.scale_dtype = 0;
    REQUIRE_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
    t = tensor_of(MOE_TENSOR_UP, MOE_PART_SCALE, 0, MOE_DTYPE_F32, m.q.scales, 64 * 3 * 4);
    t.rank = 2;
    t.dims[0] = 64;
    t.dims[1] = 3;
    m.q.scales = realloc(m.q.scales, 64 * 3 * 4);
    memset(m.q.scales, 0x3f, 64 * 3 * 4); // 0.747, of which bf16 has no more than 0.746
    t.data = m.q.scales;
    CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_DATA, "tensor.data");
    CHECK_CONTAINS(err.text, "does not hold");
    moe_weights_destroy(w);
    coded_free(&m);
    moe_context_destroy(ctx);
}

// Tensors of one expert, with the shape that compressed-tensors adds, in place of a sealed one's.
TEST(an_expert_of_codes_is_replaced)
{
    for (int v = first_variant(); v < VARIANTS; v += variant_step()) {
        moe__scheme s = moe__weight_scheme(variants[v].format, variants[v].block, variants[v].scale_dtype);
        moe_layer_desc l = dialect_layer(&variants[v]);
        moe_context *ctx;
        moe_weights *w;
        moe_tensor t[15];
        coded m[2][3];
        float input = 0.25f, inputs[2];
        int64_t shapes[3][2];
        int count = 0;
        REQUIRE_OK(moe_context_create(NULL, &ctx, &err));
        REQUIRE_OK(moe_weights_create(ctx, &l, NULL, &w, &err));
        for (int e = 0; e < 2; e++) expert_make(&variants[v], e, m[e]);
        for (int e = 0; e < 2; e++)
            for (int i = 0; i < 3; i++) set_whole(w, roles[i], e, &m[0][i]);
        CHECK_OK(moe_weights_seal(w, &err));
        for (int i = 0; i < 3; i++) {
            const moe_quantize_desc *q = &m[1][i].q;
            shapes[i][0] = q->rows;
            shapes[i][1] = q->columns;
            t[count] = tensor_of(roles[i], MOE_PART_DATA, 1, s.dtype, q->codes, (size_t)q->codes_bytes);
            t[count].rank = 2;
            t[count].dims[0] = q->rows;
            t[count++].dims[1] = q->columns;
            t[count] = tensor_of(roles[i], MOE_PART_SCALE, 1, s.scale_dtype, q->scales, (size_t)q->scales_bytes);
            t[count].rank = s.rows == 0 ? 0 : 2;
            t[count].dims[0] = s.rows > 0 ? (q->rows + s.rows - 1) / s.rows : 0;
            t[count++].dims[1] = s.columns > 0 ? (q->columns + s.columns - 1) / s.columns : 1;
            t[count] = tensor_of(roles[i], MOE_PART_SHAPE, 1, MOE_DTYPE_I64, shapes[i], 16);
            t[count].rank = 1;
            t[count++].dims[0] = 2;
            if (s.rule == MOE__SCALE_GLOBAL)
                t[count++] = tensor_of(roles[i], MOE_PART_GLOBAL_SCALE, 1, MOE_DTYPE_F32, &q->global_scale, 4);
            if (variants[v].format == MOE_FORMAT_NVFP4)
                t[count++] = tensor_of(roles[i], MOE_PART_INPUT_SCALE, 1, MOE_DTYPE_F32, &input, 4);
        }
        shapes[2][1]++;
        CHECK_ERR(moe_weights_replace_expert(w, 1, t, count, NULL, &err), MOE_ERROR_DATA, "tensor.data");
        shapes[2][1]--;
        CHECK_OK(moe_weights_replace_expert(w, 1, t, count, NULL, &err));
        CHECK_OK(moe_weights_read_row(w, MOE_TENSOR_INPUT_SCALES, 1, 0, inputs, &err));
        CHECK_EQ(inputs[0], variants[v].format == MOE_FORMAT_NVFP4 ? 0.25f : 0.0f);
        expert_check(w, 0, m[0]);
        expert_check(w, 1, m[1]);
        moe_weights_destroy(w);
        moe_context_destroy(ctx);
    }
}

// Rows of fp32 by callback become what moe_quantize() makes of the whole matrix.
static float *rows_of_callback[3];

static int32_t give_row(void *user, int32_t role, int32_t expert, int32_t row, float *out)
{
    const int *sizes = (const int *)user; // hidden, inner, row that fails
    int columns = role == MOE_TENSOR_DOWN ? sizes[1] : sizes[0];
    if (row == sizes[2] || expert * 1000 + row == sizes[2]) return 5;
    memcpy(out, rows_of_callback[moe__role_matrix(role)] + row * columns, (size_t)columns * 4);
    return 0;
}

TEST(rows_by_callback_are_quantised)
{
    for (int v = first_variant(); v < VARIANTS; v += variant_step()) {
        moe_layer_desc l = dialect_layer(&variants[v]);
        int h = variants[v].hidden, inner = variants[v].inner, sizes[3] = { 0, 0, -1 }, set = 0;
        moe_weights_info info;
        moe_context *ctx;
        moe_weights *w;
        coded m[3];
        moe_tensor t;
        REQUIRE_OK(moe_context_create(NULL, &ctx, &err));
        REQUIRE_OK(moe_weights_create(ctx, &l, NULL, &w, &err));
        for (int i = 0; i < 3; i++) {
            int rows = i == 2 ? h : inner, columns = h + inner - rows;
            rows_of_callback[i] = random_tensor(31, i, v, (size_t)rows * (size_t)columns, 1);
            m[i].want = (float *)malloc((size_t)rows * (size_t)columns * 4);
            memcpy(m[i].want, rows_of_callback[i], (size_t)rows * (size_t)columns * 4);
            CHECK_OK(quantized_make(&m[i].q, variants[v].format, variants[v].block, variants[v].scale_dtype, m[i].want,
                                    rows, columns, &err));
            CHECK_OK(moe_dequantize(&m[i].q, &err));
        }
        memset(&info, 0, sizeof info);
        sizes[0] = h;
        sizes[1] = inner;
        memset(&t, 0, sizeof t);
        t.rows = give_row;
        t.rows_user = sizes;
        for (int i = 0; i < 3; i++) {
            t.role = i == 2 ? MOE_TENSOR_DOWN : MOE_TENSOR_GATE + i;
            t.expert = i == 1 ? 1 : -1; // stacks, and one alone
            t.rank = 2;
            t.dims[0] = 1;
            CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.dims");
            t.rank = 0;
            sizes[2] = 3;
            CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_DATA, "tensor.rows");
            CHECK_CONTAINS(err.text, "returned 5 for row 3");
            sizes[2] = 1000 + 3; // of the second expert: the first is not set either
            if (i != 1) CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_DATA, "tensor.rows");
            CHECK_EQ(moe_weights_get_info(w, &info, &err), MOE_OK);
            CHECK_EQ(info.tensors_set, set);
            sizes[2] = -1;
            CHECK_OK(moe_weights_set_tensor(w, &t, &err));
            CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_STATE, "tensor.role");
            CHECK_OK(moe_weights_get_info(w, &info, &err));
            set = info.tensors_set;
            CHECK(reads_as_coded(w, t.role, 1, &m[i]));
            if (i != 1) CHECK(reads_as_coded(w, t.role, 0, &m[i]));
        }
        for (int i = 0; i < 3; i++) {
            coded_free(&m[i]);
            free(rows_of_callback[i]);
        }
        moe_weights_destroy(w);
        moe_context_destroy(ctx);
    }
}

TEST(dead_experts_give_finite_output)
{
    static const float tiny[] = { 0, 1e-23f, 1e-42f };
    for (int v = first_variant(); v < VARIANTS; v += variant_step())
        for (int i = 0; i < 3; i++) {
            fixture f = fixture_of(&variants[v], MOE_ACTIVATION_SWIGLU);
            int finite = 1;
            f.matrix_scale = tiny[i] == 0 ? -1 : tiny[i];
            REQUIRE_OK(fixture_open(&f, &err));
            CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
            for (int j = 0; j < f.tokens * variants[v].hidden; j++)
                finite = finite && moe__is_finite(moe__load(f.args.out, f.plan->desc.out_dtype, j));
            CHECK(finite);
            fixture_close(&f);
        }
}

// ---- checkpoints of others ------------------------------------------------------------------------------------------

#ifndef MOE_NO_CHECKPOINT
static const char *const golden_folders[] = { "fp8_block",    "fp8_block_ue8m0", "fp8_tensor",  "fp8_channel", "mxfp8",
                                              "nvfp4_packed", "nvfp4_modelopt",  "int4_packed", "gpt_oss" };

static void *golden_copy(const moe_checkpoint *data, const char *name, moe_checkpoint_tensor *t)
{
    void *copy;
    if (moe_checkpoint_find(data, name, t, &err) != MOE_OK) return NULL;
    copy = malloc((size_t)t->data_bytes);
    memcpy(copy, t->data, (size_t)t->data_bytes);
    return copy;
}

// Rows 8 to 39 of expert 1's matrices: to the bit, but where a package keeps a factor's reciprocal.
static void check_rows(const moe_weights *w, const moe_checkpoint *data, const char *folder)
{
    static const char *const names[3] = { "layers.0.gate", "layers.0.up", "layers.0.down" };
    double tolerance = strcmp(folder, "nvfp4_packed") == 0 ? 3e-7 : 0;
    for (int m = 0; m < 3; m++) {
        moe_checkpoint_tensor t;
        float *want = (float *)golden_copy(data, names[m], &t), row[256];
        REQUIRE(want != NULL);
        for (int r = 0; r < 32; r++) {
            int wrong = 0;
            CHECK_OK(moe_weights_read_row(w, roles[m], 1, 8 + r, row, &err));
            for (int i = 0; i < t.dims[1]; i++)
                wrong += !(fabs(row[i] - want[r * t.dims[1] + i]) <= tolerance * fabs(row[i]));
            if (wrong != 0) test_fail_numbers(__FILE__, __LINE__, folder, r, wrong);
        }
        free(want);
    }
}

TEST(checkpoints_that_others_quantised)
{
    for (int n = 0; n < (int)(sizeof golden_folders / sizeof golden_folders[0]); n++) {
        char path[160];
        moe_checkpoint *ckpt = NULL, *data = NULL;
        moe_checkpoint_tensor t;
        moe_layer_desc layer;
        moe_plan_desc desc;
        moe_plan_info info;
        moe_execute_args args;
        moe_context *ctx;
        moe_weights *w = NULL;
        moe_plan *plan;
        float *x, *out, *want;
        double worst = 0, most = 0;
        snprintf(path, sizeof path, "quantized/%s", golden_folders[n]);
        REQUIRE_OK(moe_checkpoint_open(test_data(path), NULL, &ckpt, &err));
        snprintf(path, sizeof path, "quantized/%s/golden.safetensors", golden_folders[n]);
        REQUIRE_OK(moe_checkpoint_open(test_data(path), NULL, &data, &err));
        REQUIRE_OK(moe_context_create(NULL, &ctx, &err));
        REQUIRE_OK(moe_checkpoint_layer(ckpt, 0, &layer, &err));
        REQUIRE_OK(moe_weights_from_checkpoint(ctx, ckpt, &layer, &w, &err));
        check_rows(w, data, golden_folders[n]);
        memset(&desc, 0, sizeof desc);
        memset(&info, 0, sizeof info);
        memset(&args, 0, sizeof args);
        x = (float *)golden_copy(data, "layers.0.x", &t);
        desc.max_tokens = (int32_t)t.dims[0];
        desc.x_dtype = desc.out_dtype = desc.intermediate_dtype = MOE_DTYPE_F32;
        REQUIRE_OK(moe_plan_create(ctx, &layer, &desc, &plan, &err));
        REQUIRE_OK(moe_plan_get_info(plan, &info, &err));
        out = (float *)malloc((size_t)t.data_bytes);
        args.input_mode = MOE_INPUT_IDS;
        args.num_tokens = (int32_t)t.dims[0];
        args.x = x;
        args.ids = golden_copy(data, "layers.0.ids", &t);
        args.weights = golden_copy(data, "layers.0.weights", &t);
        args.out = out;
        args.workspace = moe__default_alloc(NULL, (size_t)info.workspace_bytes, 256);
        args.workspace_bytes = info.workspace_bytes;
        CHECK_EQ(moe_execute(plan, w, &args, NULL), MOE_OK);
        want = (float *)golden_copy(data, "layers.0.out", &t);
        for (int i = 0; i < t.dims[0] * t.dims[1]; i++) {
            double off = fabs(out[i] - want[i]);
            worst = off > worst ? off : worst;
            most = fabs(want[i]) > most ? fabs(want[i]) : most;
        }
        printf("%s: %s, off by %.1e of %.2f\n", golden_folders[n], moe_format_string(layer.format), worst, most);
        CHECK(worst <= 2e-6 * most);
        moe__default_free(NULL, args.workspace, (size_t)info.workspace_bytes);
        free(x);
        free(out);
        free(want);
        free((void *)(uintptr_t)args.ids);
        free((void *)(uintptr_t)args.weights);
        moe_plan_destroy(plan);
        moe_weights_destroy(w);
        moe_context_destroy(ctx);
        moe_checkpoint_close(ckpt);
        moe_checkpoint_close(data);
    }
}
#else
TEST(checkpoints_that_others_quantised) { test_skip("no checkpoints in this build"); }
#endif

TEST_MAIN(
    T(codes_are_the_nearest_and_scales_their_formulas)
    T(rows_of_activations_are_rounded_as_moe_quantize_does)
    T(quantize_refuses_by_name)
    T(every_format_gives_the_bits_of_the_reference)
    T(formats_with_everything_beside_them)
    T(slices_that_cut_a_block_have_the_values_of_the_whole)
    T(saved_weights_come_back)
    T(fused_and_shuffled_codes_and_scales)
    T(codes_in_other_layouts)
    T(blocks_of_gpt_oss)
    T(codes_of_compressed_tensors)
    T(swizzled_scales)
    T(blocks_of_ggml)
    T(single_values_stacked_and_fused)
    T(wrong_values_and_missing_ones_are_named)
    T(an_expert_of_codes_is_replaced)
    T(rows_by_callback_are_quantised)
    T(dead_experts_give_finite_output)
    T(checkpoints_that_others_quantised))
