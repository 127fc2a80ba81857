// Small types: every code, every rounding case, and moe_convert's refusals.
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"

// Nearest even by brute force: among all codes of the format, the nearest in double; ties to the even code.
static double f16_value(uint16_t code)
{
    int exponent = code >> 10 & 31, mantissa = code & 1023;
    double value = exponent == 0 ? mantissa / 16777216.0 : (1024 + mantissa) / 16777216.0;
    for (int i = 1; i < exponent; i++) value *= 2;
    return code & 0x8000 ? -value : value;
}

TEST(every_f16_code_widens_exactly)
{
    for (uint32_t code = 0; code < 65536; code++) {
        float wide = moe__f16_to_f32((uint16_t)code);
        if ((code >> 10 & 31) == 31) CHECK((code & 1023) != 0 ? moe__is_nan(wide) : !moe__is_finite(wide));
        else CHECK_EQ((double)wide, f16_value((uint16_t)code));
        CHECK_EQ(moe__f32_bits(wide) >> 31, code >> 15);
    }
}

TEST(every_16_bit_code_survives_a_round_trip)
{
    for (uint32_t code = 0; code < 65536; code++) {
        float half = moe__f16_to_f32((uint16_t)code), brain = moe__bf16_to_f32((uint16_t)code);
        if (moe__is_nan(half)) CHECK(moe__is_nan(moe__f16_to_f32(moe__f32_to_f16(half))));
        else CHECK_EQ(moe__f32_to_f16(half), code);
        if (moe__is_nan(brain)) CHECK(moe__is_nan(moe__bf16_to_f32(moe__f32_to_bf16(brain))));
        else CHECK_EQ(moe__f32_to_bf16(brain), code);
    }
}

// Between each pair of neighbours: just below the middle, the middle (to even), just above it.
TEST(narrowing_goes_to_the_nearest_and_ties_to_even)
{
    for (uint32_t code = 0; code < 0x7c00; code++) {
        double low = f16_value((uint16_t)code), high = code == 0x7bff ? 65536.0 : f16_value((uint16_t)(code + 1));
        float middle = (float)((low + high) / 2); // exact: one bit more than f16 has
        CHECK_EQ(moe__f32_to_f16(middle), code + (code & 1));
        CHECK_EQ(moe__f32_to_f16(moe__bits_f32(moe__f32_bits(middle) - 1)), code);
        CHECK_EQ(moe__f32_to_f16(moe__bits_f32(moe__f32_bits(middle) + 1)), code + 1);
        CHECK_EQ(moe__f32_to_f16(-middle), (code + (code & 1)) | 0x8000);
    }
    for (uint32_t code = 0; code < 0x7f80; code++) {
        uint32_t middle = code << 16 | 0x8000;
        CHECK_EQ(moe__f32_to_bf16(moe__bits_f32(middle)), code + (code & 1));
        CHECK_EQ(moe__f32_to_bf16(moe__bits_f32(middle - 1)), code);
        CHECK_EQ(moe__f32_to_bf16(moe__bits_f32(middle + 1)), code + 1);
    }
}

TEST(overflow_gives_infinity_and_nan_stays_nan)
{
    CHECK_EQ(moe__f32_to_f16(65519.996f), 0x7bff);
    CHECK_EQ(moe__f32_to_f16(65520.0f), 0x7c00);
    CHECK_EQ(moe__f32_to_f16(-3.0e38f), 0xfc00);
    CHECK_EQ(moe__f32_to_bf16(3.4e38f), 0x7f80);
    CHECK(moe__is_nan(moe__bf16_to_f32(moe__f32_to_bf16(moe__bits_f32(0x7f800001))))); // payload in the dropped bits
    CHECK(moe__is_nan(moe__f16_to_f32(moe__f32_to_f16(moe__bits_f32(0x7f800001)))));
}

TEST(convert_goes_between_all_three_types)
{
    float source[3] = { 1.0f, -2.5f, 0.333333343f }, back[3];
    uint16_t half[3], brain[3];
    CHECK_OK(moe_convert(source, MOE_DTYPE_F32, half, MOE_DTYPE_F16, 3, &err));
    CHECK_OK(moe_convert(half, MOE_DTYPE_F16, brain, MOE_DTYPE_BF16, 3, &err));
    CHECK_OK(moe_convert(brain, MOE_DTYPE_BF16, back, MOE_DTYPE_F32, 3, &err));
    CHECK_EQ(back[0], 1.0f);
    CHECK_EQ(back[1], -2.5f);
    CHECK_NEAR(back[2], 1.0 / 3, 1.0 / 512);
}

// Every line of data/dtypes.tsv: all codes, and every rounding case beside them.
TEST(small_types_are_those_of_ml_dtypes)
{
    static const struct { const char *name; int dtype, nibbles; } types[] = {
        { "e4m3", MOE_DTYPE_E4M3, 0 }, { "e5m2", MOE_DTYPE_E5M2, 0 }, { "ue8m0", MOE_DTYPE_UE8M0, 0 },
        { "e2m1", MOE_DTYPE_E2M1, 1 }, { "int4", MOE_DTYPE_INT4, 1 }
    };
    char name[16], way[16], a[16], b[16];
    FILE *f = fopen(test_data("data/dtypes.tsv"), "r");
    int lines = 0;
    REQUIRE(f != NULL);
    REQUIRE(fscanf(f, "%*s %*s %*s %*s") == 0);
    while (fscanf(f, "%15s %15s %15s %15s", name, way, a, b) == 4) {
        int t = 0, wide = strcmp(way, "wide") == 0;
        uint32_t from = (uint32_t)strtoul(a, NULL, 16), to = (uint32_t)strtoul(b, NULL, 16);
        unsigned char code[2] = { 0xa5, 0xa5 };
        float value[3];
        while (t < 4 && strcmp(types[t].name, name) != 0) t++;
        REQUIRE(strcmp(types[t].name, name) == 0);
        if (wide) { // three in a row: both halves of a byte
            code[0] = (unsigned char)(types[t].nibbles ? from * 17 : from);
            code[1] = code[0];
            CHECK_OK(moe_convert(code, types[t].dtype, value, MOE_DTYPE_F32, types[t].nibbles ? 3 : 2, &err));
            for (int i = 0; i < (types[t].nibbles ? 3 : 2); i++)
                CHECK(strcmp(b, "nan") == 0 ? moe__is_nan(value[i]) : moe__f32_bits(value[i]) == to);
        } else {
            value[0] = value[1] = value[2] = moe__bits_f32(from);
            CHECK_OK(moe_convert(value, MOE_DTYPE_F32, code, types[t].dtype, types[t].nibbles ? 3 : 1, &err));
            CHECK_EQ(code[0], types[t].nibbles ? to * 17 : to);
            CHECK_EQ(code[1], types[t].nibbles ? 0xa0 | to : 0xa5);
        }
        lines++;
    }
    fclose(f);
    CHECK_EQ(lines, 3961);
}

TEST(nan_and_negative_scales_have_the_codes_that_the_gpu_gives)
{
    const float odd[5] = { moe__bits_f32(0xffc00001), -1.0f, -0.0f, 0.0f, -3e38f };
    static const int types[] = { MOE_DTYPE_E4M3, MOE_DTYPE_E5M2, MOE_DTYPE_UE8M0, MOE_DTYPE_E2M1, MOE_DTYPE_INT4 };
    static const unsigned char want[5][5] = { { 0x7f, 0xb8, 0x80, 0x00, 0xfe }, { 0x7f, 0xbc, 0x80, 0x00, 0xfb },
                                              { 0xff, 0xff, 0x00, 0x00, 0xff }, { 0xa7, 0x08, 0x0f, 0, 0 },
                                              { 0xf0, 0x00, 0x08, 0, 0 } };
    for (int t = 0; t < 5; t++) {
        unsigned char code[5] = { 0 };
        CHECK_OK(moe_convert(odd, MOE_DTYPE_F32, code, types[t], 5, &err));
        for (int i = 0; i < 5; i++) CHECK_EQ(code[i], want[t][i]);
    }
}

TEST(convert_refuses_what_it_cannot_do)
{
    float value = 1;
    CHECK_ERR(moe_convert(NULL, MOE_DTYPE_F32, &value, MOE_DTYPE_F32, 1, &err), MOE_ERROR_ARGUMENT, "src");
    CHECK_ERR(moe_convert(&value, MOE_DTYPE_F32, NULL, MOE_DTYPE_F32, 1, &err), MOE_ERROR_ARGUMENT, "dst");
    CHECK_ERR(moe_convert(&value, MOE_DTYPE_I32, &value, MOE_DTYPE_F32, 1, &err), MOE_ERROR_ARGUMENT, "src_dtype");
    CHECK_ERR(moe_convert(&value, MOE_DTYPE_F32, &value, MOE_DTYPE_U8, 1, &err), MOE_ERROR_ARGUMENT, "dst_dtype");
    CHECK_ERR(moe_convert(&value, MOE_DTYPE_F32, &value, MOE_DTYPE_F32, -1, &err), MOE_ERROR_ARGUMENT, "n");
    CHECK_OK(moe_convert(NULL, MOE_DTYPE_F32, NULL, MOE_DTYPE_F32, 0, &err));
}

TEST(numbers_in_messages_need_no_locale)
{
    static const struct { double value; const char *text; } cases[] = {
        { 0, "0" }, { -7, "-7" }, { 0.1, "0.1" }, { 2.5, "2.5" }, { 1.702, "1.702" }, { 1e-20, "1e-20" },
        { 1e10, "10000000000" }, { 0.176777, "0.176777" }, { 1e300, "1e300" }, { 448, "448" }, { 0.000025, "0.000025" },
    };
    char buffer[64];
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        moe__text text = moe__text_make(buffer, sizeof buffer);
        moe__text_double(&text, cases[i].value);
        CHECK_STR(buffer, cases[i].text);
    }
}

TEST(messages_are_cut_at_a_character_and_escaped)
{
    char buffer[8], wide[300];
    moe__text text = moe__text_make(buffer, sizeof buffer);
    moe__text_string(&text, "abcdef\xc3\xa9gh"); // 6 bytes, then a two-byte character that does not fit
    CHECK_STR(buffer, "abcdef");
    text = moe__text_make(wide, sizeof wide);
    moe__text_quoted(&text, "a\nb\x7f");
    CHECK_STR(wide, "\"a\\x0ab\\x7f\"");
}

TEST_MAIN(
    T(every_f16_code_widens_exactly)
    T(every_16_bit_code_survives_a_round_trip)
    T(narrowing_goes_to_the_nearest_and_ties_to_even)
    T(overflow_gives_infinity_and_nan_stays_nan)
    T(convert_goes_between_all_three_types)
    T(small_types_are_those_of_ml_dtypes)
    T(nan_and_negative_scales_have_the_codes_that_the_gpu_gives)
    T(convert_refuses_what_it_cannot_do)
    T(numbers_in_messages_need_no_locale)
    T(messages_are_cut_at_a_character_and_escaped))
