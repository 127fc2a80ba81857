// clang -g -O1 -fsanitize=fuzzer,address,undefined tests/fuzz/fuzz_config.c -o build/fuzz_config
// build/fuzz_config -dict=tests/fuzz/config.dict -max_total_time=20 build/new tests/fuzz/corpus/config
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../../moe.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

// The input: a byte for the layer, config.json, and behind a zero byte hf_quant_config.json.
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *json = (const char *)data + 1, *quant = NULL;
    size_t json_bytes, quant_bytes = 0;
    moe_fact facts[64];
    moe_layer_desc layer, again;
    moe_error err;
    int32_t count = 0, result;
    if (size < 1) return 0;
    json_bytes = size - 1;
    quant = (const char *)memchr(json, 0, json_bytes);
    if (quant != NULL) {
        quant++;
        quant_bytes = (size_t)(json + json_bytes - quant);
        json_bytes = (size_t)(quant - 1 - json);
    }
    result = moe_layer_from_config(json, json_bytes, quant, quant_bytes, data[0], &layer, &err);
    if (result != err.code || (result != MOE_OK) != (err.text[0] != 0)) __builtin_trap();
    if (moe_facts_from_config(json, json_bytes, quant, quant_bytes, data[0], facts, 64, &count, &err) != result ||
        count > 64) __builtin_trap();
    if (result != MOE_OK) return 0;
    again = layer; // what is resolved stays as it is
    if (moe_layer_resolve(&again, &err) != MOE_OK || memcmp(&again, &layer, sizeof layer) != 0) __builtin_trap();
    return 0;
}
