// test_prepare.c - weights as TRTLLM-Gen takes them: layouts and their inverses, sizes, and padding of each half
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"

static const int64_t row_counts[] = { 1, 7, 8, 127, 128, 129, 704, 2880 };
static const int64_t column_counts[] = { 1, 3, 4, 5, 45 };

static unsigned char *numbered(size_t bytes)
{
    unsigned char *data = (unsigned char *)malloc(bytes + 1);
    for (size_t i = 0; i < bytes; i++) data[i] = (unsigned char)(i * 167 + i / 251 + 1);
    return data;
}

// ---- scales ---------------------------------------------------------------------------------------------------------

// A walk over the tiles in the order that they lie in, as the swizzle is drawn: 128x4 is 32 rows of 16 bytes, in which
// the four quarters of the tile lie side by side.
static void swizzle_by_walk(const unsigned char *src, unsigned char *dst, int64_t rows, int64_t columns, int size,
                            int tile_rows)
{
    size_t at = 0;
    for (int64_t r0 = 0; r0 < rows; r0 += tile_rows)
        for (int64_t c0 = 0; c0 < columns; c0 += 4)
            for (int i = 0; i < (tile_rows == 128 ? 32 : 8); i++)
                for (int quarter = 0; quarter < (tile_rows == 128 ? 4 : 1); quarter++)
                    for (int c = 0; c < 4; c++, at += (size_t)size) {
                        int64_t row = r0 + quarter * 32 + i, column = c0 + c;
                        memset(dst + at, 0, (size_t)size);
                        if (row < rows && column < columns)
                            memcpy(dst + at, src + (row * columns + column) * size, (size_t)size);
                    }
}

TEST(scales_swizzle_and_come_back)
{
    for (int layout = MOE_SCALES_128X4; layout <= MOE_SCALES_8X4; layout++)
        for (size_t r = 0; r < sizeof row_counts / sizeof row_counts[0]; r++)
            for (size_t c = 0; c < sizeof column_counts / sizeof column_counts[0]; c++)
                for (int size = 1; size <= 4; size *= 2) {
                    int64_t rows = row_counts[r], columns = column_counts[c];
                    int64_t count = moe_scales_count(layout, rows, columns);
                    int64_t tile = layout == MOE_SCALES_128X4 ? 128 : 8;
                    size_t linear = (size_t)(rows * columns * size), swizzled = (size_t)(count * size);
                    unsigned char *src = numbered(linear), *dst = (unsigned char *)malloc(swizzled);
                    unsigned char *want = (unsigned char *)malloc(swizzled), *back = (unsigned char *)malloc(linear);
                    CHECK_EQ(count, (rows + tile - 1) / tile * tile * ((columns + 3) / 4 * 4));
                    memset(dst, 0xee, swizzled);
                    CHECK_OK(moe_scales_convert(src, MOE_SCALES_LINEAR, dst, layout, rows, columns, size, &err));
                    swizzle_by_walk(src, want, rows, columns, size, (int)tile);
                    CHECK(memcmp(dst, want, swizzled) == 0);
                    CHECK_OK(moe_scales_convert(dst, layout, back, MOE_SCALES_LINEAR, rows, columns, size, &err));
                    CHECK(memcmp(src, back, linear) == 0);
                    free(src);
                    free(dst);
                    free(want);
                    free(back);
                }
}

// ---- rows -----------------------------------------------------------------------------------------------------------

TEST(rows_shuffle_as_the_tables_say)
{
    // FlashInfer's index tables: row n of the result is this row of the input.
    static const int from_32[32] = { 0, 4, 8,  12, 16, 20, 24, 28, 1, 5, 9,  13, 17, 21, 25, 29,
                                     2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31 };
    static const int from_16[16] = { 0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15 };
    unsigned char src[96], dst[96], back[96];
    for (int i = 0; i < 96; i++) src[i] = (unsigned char)i;
    CHECK_OK(moe_rows_convert(src, 0, MOE_ROWS_NATURAL, dst, 0, MOE_ROWS_SHUFFLED_128, 96, 1, &err));
    for (int i = 0; i < 96; i++) CHECK_EQ(dst[i], i / 32 * 32 + from_32[i % 32]);
    CHECK_OK(moe_rows_convert(dst, 0, MOE_ROWS_SHUFFLED_128, back, 0, MOE_ROWS_NATURAL, 96, 1, &err));
    CHECK(memcmp(src, back, 96) == 0);
    CHECK_OK(moe_rows_convert(src, 0, MOE_ROWS_NATURAL, dst, 0, MOE_ROWS_SHUFFLED_64, 96, 1, &err));
    for (int i = 0; i < 96; i++) CHECK_EQ(dst[i], i / 16 * 16 + from_16[i % 16]);
}

TEST(interleave_and_shuffle_in_one)
{
    // [up; gate] of I = 64 rows each: 0, 2, ..14 | I, I + 2, .. | 1, 3, .. | I + 1, ..
    unsigned char src[128], one[128], two[128], step[128], back[128];
    for (int i = 0; i < 128; i++) src[i] = (unsigned char)i;
    CHECK_OK(moe_rows_convert(src, MOE_HALVES_UP_GATE, 0, one, MOE_HALVES_INTERLEAVED_UP_GATE, MOE_ROWS_SHUFFLED_128,
                              128, 1, &err));
    for (int i = 0; i < 32; i++) CHECK_EQ(one[i], (i / 8 % 2 == 1 ? 64 : 0) + i % 8 * 2 + i / 16);
    CHECK_OK(moe_rows_convert(src, MOE_HALVES_UP_GATE, 0, step, MOE_HALVES_INTERLEAVED_UP_GATE, 0, 128, 1, &err));
    // out[2i] = in[i], out[2i + 1] = in[I + i]
    for (int i = 0; i < 64; i++) CHECK(step[2 * i] == i && step[2 * i + 1] == 64 + i);
    CHECK_OK(moe_rows_convert(step, 0, 0, two, 0, MOE_ROWS_SHUFFLED_128, 128, 1, &err));
    CHECK(memcmp(one, two, 128) == 0);
    CHECK_OK(moe_rows_convert(one, MOE_HALVES_INTERLEAVED_UP_GATE, MOE_ROWS_SHUFFLED_128, back, MOE_HALVES_GATE_UP, 0,
                              128, 1, &err));
    for (int i = 0; i < 128; i++) CHECK_EQ(back[i], (i + 64) % 128); // and gate first
}

TEST(every_order_of_rows_comes_back)
{
    const int64_t rows = 704, row_bytes = 5;
    unsigned char *src = numbered((size_t)(rows * row_bytes)), *dst = numbered((size_t)(rows * row_bytes));
    unsigned char *back = numbered((size_t)(rows * row_bytes));
    for (int from = MOE_HALVES_GATE_UP; from <= MOE_HALVES_INTERLEAVED_UP_GATE; from++)
        for (int to = MOE_HALVES_GATE_UP; to <= MOE_HALVES_INTERLEAVED_UP_GATE; to++)
            for (int order = 0; order < 9; order++) {
                CHECK_OK(moe_rows_convert(src, from, order % 3, dst, to, order / 3, rows, row_bytes, &err));
                CHECK(from == to && order % 4 == 0 ? memcmp(src, dst, (size_t)(rows * row_bytes)) == 0 : 1);
                CHECK_OK(moe_rows_convert(dst, to, order / 3, back, from, order % 3, rows, row_bytes, &err));
                CHECK(memcmp(src, back, (size_t)(rows * row_bytes)) == 0);
            }
    free(src);
    free(dst);
    free(back);
}

// ---- layouts --------------------------------------------------------------------------------------------------------

TEST(layouts_convert_and_come_back)
{
    for (int size = 1; size <= 4; size *= 2) {
        const int64_t rows = 37, columns = 3 * 128 / size, block = 128 / size;
        const size_t bytes = (size_t)(rows * columns * size);
        unsigned char *src = numbered(bytes), *dst = numbered(bytes), *back = numbered(bytes);
        for (int from = MOE_LAYOUT_MAJOR_K; from <= MOE_LAYOUT_BLOCK_MAJOR_K; from++)
            for (int to = MOE_LAYOUT_MAJOR_K; to <= MOE_LAYOUT_BLOCK_MAJOR_K; to++) {
                CHECK_OK(moe_layout_convert(src, from, dst, to, rows, columns, size, &err));
                CHECK_OK(moe_layout_convert(dst, to, back, from, rows, columns, size, &err));
                CHECK(memcmp(src, back, bytes) == 0);
            }
        CHECK_OK(moe_layout_convert(src, MOE_LAYOUT_MAJOR_K, dst, MOE_LAYOUT_BLOCK_MAJOR_K, rows, columns, size, &err));
        CHECK_OK(moe_layout_convert(src, MOE_LAYOUT_MAJOR_K, back, MOE_LAYOUT_MAJOR_MN, rows, columns, size, &err));
        for (int64_t k = 0; k < columns; k++)
            for (int64_t row = 0; row < rows; row++) {
                const unsigned char *element = src + (row * columns + k) * size;
                CHECK(memcmp(dst + ((k / block * rows + row) * block + k % block) * size, element, (size_t)size) == 0);
                CHECK(memcmp(back + (k * rows + row) * size, element, (size_t)size) == 0);
            }
        free(src);
        free(dst);
        free(back);
    }
}

// ---- sizes ----------------------------------------------------------------------------------------------------------

TEST(sizes_that_the_kernels_need)
{
    static const struct { int format, gated, hidden, inner, padded_hidden, padded_inner, rows2; } cases[] = {
        { MOE_FORMAT_MXFP4_W4A8, 1, 2880, 2880, 3072, 2944, 2944 },        // gpt-oss
        { MOE_FORMAT_MXFP4_W4A16, 1, 2880, 2880, 3072, 2944, 2944 },
        { MOE_FORMAT_NVFP4, 0, 2688, 1856, 2816, 1920, 2688 },             // Nemotron-3-Nano
        { MOE_FORMAT_NVFP4, 0, 2688, 464, 2816, 512, 2688 },               // a quarter of it
        { MOE_FORMAT_NVFP4, 1, 2816, 704, 2816, 704, 2816 },               // Gemma 4: 2 * 704 is 11 tiles
        { MOE_FORMAT_NVFP4, 1, 2816, 352, 2816, 384, 2816 },               // 2 * 352 is none
        { MOE_FORMAT_NVFP4, 1, 2816, 176, 2816, 192, 2816 },
        { MOE_FORMAT_NVFP4_W4A16, 1, 4096, 192, 4096, 192, 4096 },
        { MOE_FORMAT_FP8_PER_TENSOR, 1, 5120, 176, 5120, 192, 5120 },
        { MOE_FORMAT_FP8_PER_TENSOR, 0, 5120, 176, 5120, 256, 5120 },
        { MOE_FORMAT_FP8_PER_CHANNEL, 1, 5000, 64, 5120, 64, 5120 },
        { MOE_FORMAT_FP8_BLOCK, 1, 7168, 192, 7168, 256, 7168 },
        { MOE_FORMAT_MXFP8, 1, 2880, 704, 2944, 768, 2944 },
        { MOE_FORMAT_INT4_W4A16, 1, 7168, 2048, 7168, 2048, 7168 },
        { MOE_FORMAT_INT4_W4A16, 1, 2880, 704, 3072, 768, 2944 },
        { MOE_FORMAT_BF16, 1, 2880, 192, 2944, 256, 2944 },
        { MOE_FORMAT_F16, 0, 2048, 768, 2048, 768, 2048 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        moe_alignment a;
        int group;
        memset(&a, 0, sizeof a);
        a.format = cases[i].format;
        a.format_block = a.format == MOE_FORMAT_INT4_W4A16 ? 32 : 0;
        a.gated = cases[i].gated;
        a.hidden_size = cases[i].hidden;
        a.intermediate_size = cases[i].inner;
        CHECK_OK(moe_align(&a, &err));
        CHECK_EQ(a.padded_hidden, cases[i].padded_hidden);
        CHECK_EQ(a.padded_intermediate, cases[i].padded_inner);
        CHECK_EQ(a.gemm2_rows, cases[i].rows2);
        CHECK_EQ(a.gemm1_rows, (1 + a.gated) * a.padded_intermediate);
        CHECK_EQ(a.gemm1_rows % 128, 0);
        group = moe__weight_scheme(a.format, a.format_block, 0).columns;
        if (group > 0) {
            CHECK_EQ(a.padded_hidden % (group <= 32 ? 4 * group : group), 0);
            CHECK_EQ(a.scale_columns1, a.padded_hidden / group);
            CHECK_EQ(a.scale_columns2, a.padded_intermediate / group);
        }
        CHECK_EQ(a.scale_rows1, a.format == MOE_FORMAT_FP8_BLOCK         ? a.gemm1_rows / 128
                                : a.format == MOE_FORMAT_FP8_PER_TENSOR ? 1
                                : a.format <= MOE_FORMAT_F16            ? 0
                                                                        : a.gemm1_rows);
    }
}

// ---- the half boundary ----------------------------------------------------------------------------------------------

enum { H = 16, I = 40, PADDED = 64, TOKENS = 3 };

// A kernel that knows one size: the first `inner` rows are gate, the others up.
static void layer(int inner, const float *w13, const float *w2, const float *x, float *out)
{
    for (int t = 0; t < TOKENS; t++) {
        float mid[PADDED];
        for (int i = 0; i < inner; i++) {
            float gate = 0, up = 0;
            for (int k = 0; k < H; k++) {
                gate += w13[i * H + k] * x[t * H + k];
                up += w13[(inner + i) * H + k] * x[t * H + k];
            }
            mid[i] = gate * moe__sigmoidf(gate) * up;
        }
        for (int r = 0; r < H; r++) {
            float sum = 0;
            for (int i = 0; i < inner; i++) sum += w2[r * inner + i] * mid[i];
            out[t * H + r] = sum;
        }
    }
}

TEST(zeros_behind_both_halves_at_once_move_their_boundary)
{
    static float w13[2 * I * H], w2[H * I], x[TOKENS * H], bad[2 * PADDED * H], good[2 * PADDED * H];
    static float w2_padded[H * PADDED];
    float want[TOKENS * H], got[TOKENS * H], off = 0;
    uint64_t state = 3;
    for (int i = 0; i < 2 * I * H; i++) w13[i] = test_random_float(&state);
    for (int i = 0; i < H * I; i++) w2[i] = test_random_float(&state);
    for (int i = 0; i < TOKENS * H; i++) x[i] = test_random_float(&state);
    layer(I, w13, w2, x, want);
    CHECK_OK(moe_align_pad(w2, H, I * 4, w2_padded, H, PADDED * 4, 0, MOE_PART_DATA, MOE_DTYPE_F32, &err));

    // What upstream did (vLLM up to 0.28, SGLang's helpers): all rows first, then all zeros. Rows of up become gate's.
    memcpy(bad, w13, sizeof w13);
    layer(PADDED, bad, w2_padded, x, got);
    for (int i = 0; i < TOKENS * H; i++) off = got[i] - want[i] > off ? got[i] - want[i] : off;
    CHECK(off > 0.1f);

    CHECK_OK(moe_align_pad(w13, 2 * I, H * 4, good, 2 * PADDED, H * 4, MOE_HALVES_GATE_UP, MOE_PART_DATA, MOE_DTYPE_F32,
                           &err));
    layer(PADDED, good, w2_padded, x, got);
    for (int i = 0; i < TOKENS * H; i++) CHECK_EQ(got[i], want[i]);
}

TEST(padding_of_scales_is_finite)
{
    static const struct { int dtype; uint32_t scale, data; } types[] = {
        { MOE_DTYPE_F32, 0x3f800000, 0 }, { MOE_DTYPE_BF16, 0x3f80, 0 }, { MOE_DTYPE_F16, 0x3c00, 0 },
        { MOE_DTYPE_E4M3, 0, 0 },         { MOE_DTYPE_UE8M0, 0x7f, 0 },
    };
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
        for (int part = types[i].dtype == MOE_DTYPE_UE8M0; part < 2; part++) {
            int size = moe_dtype_bits(types[i].dtype) / 8;
            unsigned char src[2 * 3 * 4], dst[4 * 5 * 4];
            memset(src, 0x11, sizeof src);
            CHECK_OK(moe_align_pad(src, 2, 3 * size, dst, 4, 5 * size, MOE_HALVES_GATE_UP, part, types[i].dtype, &err));
            for (int row = 0; row < 4; row++)
                for (int c = 0; c < 5; c++) {
                    uint32_t got = 0, added = part == 1 ? types[i].scale : types[i].data;
                    uint32_t want = row % 2 == 0 && c < 3 ? 0x11111111 : added;
                    memcpy(&got, dst + (row * 5 + c) * size, (size_t)size);
                    CHECK_EQ(got, size == 4 ? want : want & ((1u << 8 * size) - 1));
                }
        }
}

// ---- refusals -------------------------------------------------------------------------------------------------------

TEST(wrong_arguments_are_named)
{
    unsigned char a[4096], b[4096];
    moe_alignment al;
    memset(a, 0, sizeof a);
    CHECK_EQ(moe_scales_count(0, 1, 1), -1);
    CHECK_EQ(moe_scales_count(MOE_SCALES_128X4, -1, 1), -1);
    CHECK_EQ(moe_scales_count(MOE_SCALES_128X4, INT64_MAX / 2, 4096), -1);
    CHECK_EQ(moe_scales_count(MOE_SCALES_128X4, 0, 7), 0);
#define SCALES(src, sl, dst, dl, r, c, e) moe_scales_convert(src, sl, dst, dl, r, c, e, &err)
    CHECK_ERR(SCALES(a, 0, b, 1, 1, 1, 1), MOE_ERROR_ARGUMENT, "src_layout");
    CHECK_ERR(SCALES(a, 1, b, 9, 1, 1, 1), MOE_ERROR_ARGUMENT, "dst_layout");
    CHECK_ERR(SCALES(a, 2, b, 3, 1, 1, 1), MOE_ERROR_ARGUMENT, "dst_layout");
    CHECK_ERR(SCALES(a, 1, b, 2, -1, 1, 1), MOE_ERROR_ARGUMENT, "rows");
    CHECK_ERR(SCALES(a, 1, b, 2, 1, 1, 3), MOE_ERROR_ARGUMENT, "element_bytes");
    CHECK_ERR(SCALES(NULL, 1, b, 2, 1, 1, 1), MOE_ERROR_ARGUMENT, "src");
    CHECK_ERR(SCALES(a, 1, a + 3, 2, 2, 4, 1), MOE_ERROR_ARGUMENT, "dst");
    CHECK_CONTAINS(err.text, "overlaps");
    CHECK_OK(SCALES(NULL, 1, NULL, 2, (int64_t)1 << 60, 0, 1)); // at once
    CHECK_ERR(SCALES(a, 1, NULL, 2, 1, 1, 1), MOE_ERROR_ARGUMENT, "dst");
#define ROWS(src, sh, so, dst, dh, d, r, bytes) moe_rows_convert(src, sh, so, dst, dh, d, r, bytes, &err)
    CHECK_ERR(ROWS(a, 6, 0, b, 2, 0, 2, 1), MOE_ERROR_ARGUMENT, "src_halves");
    CHECK_ERR(ROWS(a, 2, 3, b, 2, 0, 2, 1), MOE_ERROR_ARGUMENT, "src_order");
    CHECK_ERR(ROWS(a, 2, 0, b, 0, 0, 2, 1), MOE_ERROR_ARGUMENT, "dst_halves");
    CHECK_ERR(ROWS(a, 2, 0, b, 3, 0, 3, 1), MOE_ERROR_ARGUMENT, "rows");
    CHECK_ERR(ROWS(a, 0, 0, b, 0, 1, 33, 1), MOE_ERROR_ARGUMENT, "dst_order");
    CHECK_ERR(ROWS(a, 0, 0, b, 0, 0, 2, -1), MOE_ERROR_ARGUMENT, "row_bytes");
    CHECK_ERR(ROWS(NULL, 0, 0, b, 0, 0, 2, 1), MOE_ERROR_ARGUMENT, "src");
    CHECK_ERR(ROWS(b, 0, 0, b + 1, 0, 0, 2, 1), MOE_ERROR_ARGUMENT, "dst");
    CHECK_OK(ROWS(b, 0, 0, b + 2, 0, 0, 2, 1));
    CHECK_OK(ROWS(NULL, 0, 0, NULL, 0, 0, (int64_t)1 << 60, 0));
#define LAYOUT(src, sl, dst, dl, r, c, e) moe_layout_convert(src, sl, dst, dl, r, c, e, &err)
    CHECK_ERR(LAYOUT(a, 0, b, 1, 1, 1, 1), MOE_ERROR_ARGUMENT, "src_layout");
    CHECK_ERR(LAYOUT(a, 1, b, 3, 1, 127, 1), MOE_ERROR_ARGUMENT, "dst_layout");
    CHECK_ERR(LAYOUT(a, 1, b, 2, 1, -1, 1), MOE_ERROR_ARGUMENT, "columns");
    CHECK_ERR(LAYOUT(a, 1, b, 2, 1, 1, 8), MOE_ERROR_ARGUMENT, "element_bytes");
    CHECK_ERR(LAYOUT(a, 1, NULL, 2, 1, 1, 1), MOE_ERROR_ARGUMENT, "dst");
    CHECK_ERR(LAYOUT(a + 7, 1, a, 2, 2, 2, 2), MOE_ERROR_ARGUMENT, "dst");
    CHECK_OK(LAYOUT(NULL, 1, NULL, 2, (int64_t)1 << 60, 0, 1));
#define PAD(r, rb, dr, drb, halves, part, dtype) moe_align_pad(a, r, rb, b, dr, drb, halves, part, dtype, &err)
    CHECK_ERR(PAD(4, 4, 3, 4, 0, 0, MOE_DTYPE_F32), MOE_ERROR_ARGUMENT, "dst_rows");
    CHECK_ERR(PAD(4, 4, 5, 4, 2, 0, MOE_DTYPE_F32), MOE_ERROR_ARGUMENT, "dst_rows");
    CHECK_ERR(PAD(4, 6, 4, 8, 0, 0, MOE_DTYPE_F32), MOE_ERROR_ARGUMENT, "row_bytes");
    CHECK_ERR(PAD(4, 8, 4, 4, 0, 0, MOE_DTYPE_F32), MOE_ERROR_ARGUMENT, "dst_row_bytes");
    CHECK_ERR(PAD(3, 4, 4, 4, 2, 0, MOE_DTYPE_F32), MOE_ERROR_ARGUMENT, "rows");
    CHECK_ERR(PAD(4, 4, 4, 4, 7, 0, MOE_DTYPE_F32), MOE_ERROR_ARGUMENT, "halves");
    CHECK_ERR(PAD(4, 4, 4, 4, 0, 2, MOE_DTYPE_F32), MOE_ERROR_ARGUMENT, "part");
    CHECK_ERR(PAD(4, 4, 4, 4, 0, 0, MOE_DTYPE_I32), MOE_ERROR_ARGUMENT, "dtype");
    CHECK_ERR(PAD(4, 4, 4, 4, 0, 1, MOE_DTYPE_E2M1), MOE_ERROR_ARGUMENT, "dtype");
    CHECK_ERR(PAD(4, 4, 4, 4, 0, 1, MOE_DTYPE_E5M2), MOE_ERROR_ARGUMENT, "dtype");
    CHECK_ERR(PAD(4, 4, 4, 4, 0, 0, MOE_DTYPE_UE8M0), MOE_ERROR_ARGUMENT, "dtype");
    memset(&al, 0, sizeof al);
    al.format = MOE_FORMAT_F32;
    al.hidden_size = al.intermediate_size = 8;
    CHECK_ERR(moe_align(&al, &err), MOE_ERROR_ARGUMENT, "alignment.format");
    al.format = MOE_FORMAT_INT4_W4A16;
    CHECK_ERR(moe_align(&al, &err), MOE_ERROR_ARGUMENT, "alignment.format_block");
    al.format = MOE_FORMAT_NVFP4;
    al.gated = 3;
    CHECK_ERR(moe_align(&al, &err), MOE_ERROR_ARGUMENT, "alignment.gated");
    al.gated = 1;
    al.hidden_size = 0;
    CHECK_ERR(moe_align(&al, &err), MOE_ERROR_ARGUMENT, "alignment.hidden_size");
    al.hidden_size = 8;
    al.intermediate_size = -1;
    CHECK_ERR(moe_align(&al, &err), MOE_ERROR_ARGUMENT, "alignment.intermediate_size");
    CHECK_ERR(moe_align(NULL, &err), MOE_ERROR_ARGUMENT, "alignment");
}

TEST_MAIN(
    T(scales_swizzle_and_come_back)
    T(rows_shuffle_as_the_tables_say)
    T(interleave_and_shuffle_in_one)
    T(every_order_of_rows_comes_back)
    T(layouts_convert_and_come_back)
    T(sizes_that_the_kernels_need)
    T(zeros_behind_both_halves_at_once_move_their_boundary)
    T(padding_of_scales_is_finite)
    T(wrong_arguments_are_named))
