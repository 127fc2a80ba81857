// clang -g -O1 -fsanitize=fuzzer,address,undefined tests/fuzz/fuzz_json.c -o build/fuzz_json
// build/fuzz_json -dict=tests/fuzz/json.dict -max_total_time=20 build/new tests/fuzz/corpus/json
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../../moe.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

// Everything that a caller may do with a value of a checked text.
static void walk(moe__json value, int depth)
{
    moe__json_iter iter = moe__json_begin(value);
    moe__json key, inner;
    char name[16];
    double number;
    int64_t integer;
    int32_t count = moe__json_count(value), steps = 0;
    if (depth > MOE__JSON_DEPTH + 1) __builtin_trap();
    if (moe__json_int64(value, &integer) && !moe__json_double(value, &number)) __builtin_trap();
    moe__json_string(value, name, sizeof name);
    moe__json_equals(value, "name");
    while (moe__json_step(&iter, &key, &inner)) {
        if (moe__json_string(key, name, sizeof name) < sizeof name && iter.object && key.at != NULL &&
            strlen(name) == moe__json_string(key, NULL, 0) && moe__json_find(value, name).at == NULL) __builtin_trap();
        walk(inner, depth + 1);
        if (++steps > 64) return; // wide ones are walked in part: find() is linear
    }
    if (steps != count) __builtin_trap();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    moe_error err;
    moe__json root;
    if (moe__json_parse((const char *)data, size, "text", &root, &err) == MOE_OK) walk(root, 0);
    else if (err.code != MOE_ERROR_FORMAT || err.text[0] == 0) __builtin_trap();
    return 0;
}
