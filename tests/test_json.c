// test_json.c - the JSON reader: what it takes, what it refuses and where, what it makes of strings and numbers
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"

// Parses a copy of exactly this size, so that a sanitizer sees any read behind it.
static int32_t parse_bytes(const char *text, size_t size, char **copy, moe__json *value)
{
    *copy = (char *)malloc(size > 0 ? size : 1);
    if (*copy == NULL) return MOE_ERROR_MEMORY;
    memcpy(*copy, text, size);
    return moe__json_parse(*copy, size, "text", value, &err);
}

static int32_t parse(const char *text)
{
    char *copy;
    moe__json value;
    int32_t result = parse_bytes(text, strlen(text), &copy, &value);
    free(copy);
    return result;
}

static void nested(char *out, int depth, char open, char close)
{
    memset(out, open, (size_t)depth);
    memset(out + depth, close, (size_t)depth);
    out[2 * depth] = 0;
}

TEST(what_json_is_is_taken)
{
    static const char *const good[] = {
        "{}", "[]", "0", "-0", "1.5e-3", "1E+2", "\"\"", "true", "false", "null", " \t\r\n[ 1 , 2 ] \n", "[[],{},\"\"]",
        "{\"a\":{\"b\":[1,{\"c\":null}]}}", "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\u0041\\uD83D\\uDE00\"",
        "\"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\"",
        "[NaN,Infinity,-Infinity]", "{\"a\":1,\"a\":2}", "\"\\u0000\"", "\"\x7f\"",
    };
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++)
        if (parse(good[i]) != MOE_OK) test_fail2(__FILE__, __LINE__, good[i], err.text);
}

TEST(what_json_is_not_is_refused_with_its_place)
{
    static const struct { const char *text; const char *place, *expected; } bad[] = {
        { "", "byte 0, where it ends", "a value" },
        { "  ", "byte 2, where it ends", "a value" },
        { "{", "byte 1, where it ends", "a name in quotes" },
        { "[", "byte 1, where it ends", "a value" },
        { "[1", "byte 2, where it ends", "',' or ']'" },
        { "[1 2]", "byte 3", "',' or ']'" },
        { "[1,]", "byte 3", "a value" },
        { "[,1]", "byte 1", "a value" },
        { "{\"a\":1,}", "byte 7", "a name in quotes" },
        { "{\"a\" 1}", "byte 5", "':'" },
        { "{\"a\":}", "byte 5", "a value" },
        { "{a:1}", "byte 1", "a name in quotes" },
        { "{1:1}", "byte 1", "a name in quotes" },
        { "{\"a\":1", "byte 6, where it ends", "',' or '}'" },
        { "[1}", "byte 2", "',' or ']'" },
        { "1 1", "byte 2", "nothing behind the value" },
        { "{}x", "byte 2", "nothing behind the value" },
        { "nul", "byte 0", "a value" },
        { "True", "byte 0", "a value" },
        { "'a'", "byte 0", "a value" },
        { "01", "byte 0", "a number as JSON writes it" },
        { "-", "byte 0", "a number as JSON writes it" },
        { "+1", "byte 0", "a value" },
        { "1.", "byte 0", "a number as JSON writes it" },
        { ".5", "byte 0", "a value" },
        { "1e", "byte 0", "a number as JSON writes it" },
        { "1e+", "byte 0", "a number as JSON writes it" },
        { "0x10", "byte 1", "nothing behind the value" },
        { "-NaN", "byte 0", "a number as JSON writes it" },
        { "Infinit", "byte 0", "a value" },
        { "\"abc", "byte 4, where it ends", "at the end of a string" },
        { "\"a\\", "byte 2", "an escape" },
        { "\"\\x\"", "byte 1", "an escape" },
        { "\"\\u12g4\"", "byte 1", "an escape" },
        { "\"\\u123", "byte 1", "an escape" },
        { "\"\\uD800\"", "byte 1", "a pair of surrogates" },
        { "\"\\uD800\\u0041\"", "byte 1", "a pair of surrogates" },
        { "\"\\uDC00\"", "byte 1", "a pair of surrogates" },
        { "\"\\uDC00\\uDC00\"", "byte 1", "a pair of surrogates" },
        { "\"a\nb\"", "byte 2", "no control character" },
        { "\"\x80\"", "byte 1", "valid UTF-8" },
        { "\"\xc0\xaf\"", "byte 1", "valid UTF-8" },
        { "\"\xe0\x80\xaf\"", "byte 1", "valid UTF-8" },
        { "\"\xed\xa0\x80\"", "byte 1", "valid UTF-8" },
        { "\"\xf4\x90\x80\x80\"", "byte 1", "valid UTF-8" },
        { "\"\xf5\x80\x80\x80\"", "byte 1", "valid UTF-8" },
        { "\"\xe2\x82\"", "byte 1", "valid UTF-8" },
        { "\xef\xbb\xbf{}", "byte 0", "a value" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        char place[64];
        snprintf(place, sizeof place, "text is not JSON: %s: expected", bad[i].place);
        if (parse(bad[i].text) != MOE_ERROR_FORMAT) test_fail2(__FILE__, __LINE__, "taken", bad[i].text);
        CHECK_CONTAINS(err.text, place);
        CHECK_CONTAINS(err.text, bad[i].expected);
    }
}

TEST(thirty_two_levels_are_taken_and_thirty_three_refused)
{
    char text[256];
    nested(text, 32, '[', ']');
    CHECK_EQ(parse(text), MOE_OK);
    nested(text, 33, '[', ']');
    CHECK_EQ(parse(text), MOE_ERROR_FORMAT);
    CHECK_CONTAINS(err.text, "32 levels");
    memset(text, '[', 200);
    text[200] = 0;
    CHECK_EQ(parse(text), MOE_ERROR_FORMAT);
}

TEST(every_prefix_and_every_changed_byte_ends_in_a_result)
{
    static const char text[] = "{\"a\": [1, -2.5e+10, true, {\"\\u00e9\\ud83d\\ude00\": \"x\\ny\"}], \"b\": "
    "{\"__float__\": "
                               "\"-Infinity\"}, \"c\": NaN, \"\xc3\xa9\": []}";
    size_t size = sizeof text - 1;
    int accepted = 0;
    for (size_t n = 0; n <= size; n++) {
        char *copy;
        moe__json value;
        accepted += parse_bytes(text, n, &copy, &value) == MOE_OK;
        free(copy);
    }
    CHECK_EQ(accepted, 1);
    for (size_t at = 0; at < size; at++) {
        for (int byte = 0; byte < 256; byte++) {
            char changed[sizeof text], out[16];
            char *copy;
            moe__json value, k, v;
            moe__json_iter iter;
            memcpy(changed, text, sizeof text);
            changed[at] = (char)byte;
            if (parse_bytes(changed, size, &copy, &value) == MOE_OK) { // then it can be walked
                int32_t count = moe__json_count(value), steps = 0;
                iter = moe__json_begin(value);
                while (moe__json_step(&iter, &k, &v)) {
                    double number;
                    moe__json_string(k, out, sizeof out);
                    moe__json_double(v, &number);
                    CHECK(v.at >= copy && v.end <= copy + size && v.at < v.end);
                    steps++;
                }
                CHECK_EQ(steps, count);
            }
            free(copy);
        }
    }
}

TEST(members_are_found_by_their_decoded_name_and_the_last_one_counts)
{
    static const char text[] = "{\"a\":1,\"\\u0061b\":2,\"c\":{\"a\":9},\"a\":3,\"n\\u0000\":4}";
    moe__json root, key, value;
    moe__json_iter iter;
    int64_t number = 0;
    CHECK_OK(moe__json_parse(text, sizeof text - 1, "text", &root, &err));
    CHECK(moe__json_int64(moe__json_find(root, "a"), &number) && number == 3);
    CHECK(moe__json_int64(moe__json_find(root, "ab"), &number) && number == 2);
    CHECK(moe__json_find(root, "abc").at == NULL);
    CHECK(moe__json_find(root, "").at == NULL);
    CHECK(moe__json_find(root, "n").at == NULL);
    CHECK(moe__json_int64(moe__json_find(moe__json_find(root, "c"), "a"), &number) && number == 9);
    CHECK(moe__json_find(moe__json_find(root, "a"), "a").at == NULL);
    CHECK_EQ(moe__json_count(root), 5);
    iter = moe__json_begin(root);
    CHECK(moe__json_step(&iter, &key, &value) && moe__json_equals(key, "a"));
}

TEST(elements_keep_their_order_and_their_extent)
{
    static const char text[] = " [ 10 ,\"]\\\"[\", [1,[2]] , {\"x\":\"}\"} ,-5 ] ";
    static const char *const spans[] = { "10", "\"]\\\"[\"", "[1,[2]]", "{\"x\":\"}\"}", "-5" };
    moe__json root;
    CHECK_OK(moe__json_parse(text, sizeof text - 1, "text", &root, &err));
    for (int32_t i = 0; i < 5; i++) {
        moe__json value = moe__json_element(root, i);
        CHECK(value.at != NULL && (size_t)(value.end - value.at) == strlen(spans[i]));
        CHECK(value.at != NULL && memcmp(value.at, spans[i], strlen(spans[i])) == 0);
    }
    CHECK(moe__json_element(root, 5).at == NULL);
    CHECK(moe__json_element(root, -1).at == NULL);
}

TEST(strings_are_decoded_and_never_overrun_their_place)
{
    static const char text[] = "\"a\\u00e9\\ud83d\\ude00\\n\"";
    static const char decoded[] = "a\xc3\xa9\xf0\x9f\x98\x80\n";
    moe__json value;
    CHECK_OK(moe__json_parse(text, sizeof text - 1, "text", &value, &err));
    CHECK(moe__json_equals(value, decoded));
    CHECK(!moe__json_equals(value, "a"));
    for (size_t capacity = 0; capacity <= sizeof decoded + 1; capacity++) {
        char *out = (char *)malloc(capacity > 0 ? capacity : 1);
        REQUIRE(out != NULL);
        CHECK_EQ(moe__json_string(value, out, capacity), sizeof decoded - 1);
        if (capacity > 0) CHECK(strncmp(out, decoded, strlen(out)) == 0 && strlen(out) < capacity);
        if (capacity > sizeof decoded - 1) CHECK_STR(out, decoded);
        free(out);
    }
}

static double number_of(const char *text)
{
    moe__json value;
    double number = -12345;
    if (moe__json_parse(text, strlen(text), "text", &value, &err) != MOE_OK) return -12345;
    if (!moe__json_double(value, &number)) return -12345;
    return number;
}

TEST(numbers_are_read_as_strtod_reads_them)
{
    static const char *const exact[] = { // up to 15 digits and 10^22
        "0", "-0", "1", "-1", "0.5", "1e-20", "1e22", "2.5", "2.827", "1.702", "1e-6", "1e-12", "16.0",
        "123456789012345",
        "0.001", "1E2", "1e0", "7.0", "100000e-5", "4503599627370496",
    };
    static const char *const near[] = { // a few units of the last place
        "0.1767766952966369", "3.141592653589793238462643", "1e300", "1e-300", "123456789012345678901234567890",
        "2.2250738585072014e-308",
        "1.7976931348623157e308", "0.000000000000000000000000000000000000123", "9007199254740993",
        "18446744073709551615",
    };
    for (size_t i = 0; i < sizeof exact / sizeof exact[0]; i++) CHECK(number_of(exact[i]) == strtod(exact[i], NULL));
    for (size_t i = 0; i < sizeof near / sizeof near[0]; i++) {
        double right = strtod(near[i], NULL);
        CHECK_NEAR(number_of(near[i]) / right, 1, 4e-15);
        CHECK((float)number_of(near[i]) == (float)right);
    }
    CHECK(number_of("1e999") > 1.7976931348623157e308 && number_of("-1e999") < -1.7976931348623157e308);
    CHECK(number_of("1e-999") == 0);
    CHECK(number_of("0e999999999999999999999") == 0);
    CHECK(number_of("1e-99999999999999999999999") == 0);
    CHECK(number_of("Infinity") > 1.7976931348623157e308);
    CHECK(number_of("-Infinity") < -1.7976931348623157e308);
    CHECK(number_of("NaN") != number_of("NaN"));
    CHECK(number_of("{\"__float__\": \"Infinity\"}") > 1.7976931348623157e308);
    CHECK(number_of("{\"__float__\": \"NaN\"}") != number_of("{\"__float__\": \"NaN\"}"));
    CHECK(number_of("{\"__float__\": \"1\"}") == -12345);
    CHECK(number_of("\"1\"") == -12345 && number_of("true") == -12345 && number_of("null") == -12345);
}

TEST(random_numbers_are_read_as_strtod_reads_them)
{
    uint64_t state = 7;
    for (int i = 0; i < 20000; i++) {
        char text[64];
        double right;
        snprintf(text, sizeof text, "%s%u.%ue%d", test_random_u32(&state) % 2 ? "-" : "",
                 test_random_u32(&state) % 10000,
                 test_random_u32(&state), (int)(test_random_u32(&state) % 60) - 30);
        right = strtod(text, NULL);
        if (right != 0) CHECK_NEAR(number_of(text) / right, 1, 2e-15);
    }
}

TEST(integers_are_exact_or_no_integers)
{
    static const struct { const char *text; int integer; int64_t value; } cases[] = {
        { "0", 1, 0 }, { "-0", 1, 0 }, { "8", 1, 8 }, { "-8", 1, -8 }, { "8.0", 1, 8 }, { "8e0", 1, 8 }, { "80e-1", 1,
                                                                                                          8 },
        { "9223372036854775807", 1, INT64_MAX }, { "9007199254740993", 1, 9007199254740993 },
        { "9223372036854775808", 0, 0 }, { "-9223372036854775809", 0, 0 }, { "99999999999999999999999", 0, 0 },
        { "8.5", 0, 0 }, { "1e18", 0, 0 }, { "NaN", 0, 0 }, { "Infinity", 0, 0 }, { "\"8\"", 0, 0 }, { "true", 0, 0 },
        { "[8]", 0, 0 }, { "null", 0, 0 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        moe__json value;
        int64_t number = 77;
        CHECK_OK(moe__json_parse(cases[i].text, strlen(cases[i].text), "text", &value, &err));
        if (moe__json_int64(value, &number) != cases[i].integer) test_fail(__FILE__, __LINE__, cases[i].text);
        if (cases[i].integer) CHECK_EQ(number, cases[i].value);
    }
}

TEST_MAIN(
    T(what_json_is_is_taken)
    T(what_json_is_not_is_refused_with_its_place)
    T(thirty_two_levels_are_taken_and_thirty_three_refused)
    T(every_prefix_and_every_changed_byte_ends_in_a_result)
    T(members_are_found_by_their_decoded_name_and_the_last_one_counts)
    T(elements_keep_their_order_and_their_extent)
    T(strings_are_decoded_and_never_overrun_their_place)
    T(numbers_are_read_as_strtod_reads_them)
    T(random_numbers_are_read_as_strtod_reads_them)
    T(integers_are_exact_or_no_integers)
)
