// clang -g -O1 -fsanitize=fuzzer,address,undefined tests/fuzz/fuzz_safetensors.c -o build/fuzz_safetensors
// build/fuzz_safetensors -dict=tests/fuzz/safetensors.dict -max_total_time=20 build/new tests/fuzz/corpus/safetensors
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../../moe.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static unsigned char *copy(const moe_allocator *allocator, const void *data, size_t size)
{
    unsigned char *bytes = (unsigned char *)moe__alloc(allocator, size + 1);
    memcpy(bytes, data, size);
    return bytes;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) // a file as moe_checkpoint_open() has it in memory
{
    static const char config[] = "{\"model_type\":\"qwen3_vl_moe\",\"hidden_size\":2,\"moe_intermediate_size\":1,"
                                 "\"num_experts\":1,\"num_experts_per_tok\":1}";
    moe_allocator allocator = { moe__default_alloc, moe__default_free, NULL };
    moe_checkpoint *ckpt = (moe_checkpoint *)moe__alloc(&allocator, sizeof *ckpt);
    moe_checkpoint_tensor t;
    moe_layer_desc layer;
    int32_t layers[4], count;
    volatile unsigned char sink = 0;
    memset(ckpt, 0, sizeof *ckpt);
    ckpt->allocator = allocator;
    ckpt->config.data = copy(&allocator, config, ckpt->config.size = sizeof config - 1);
    if (moe__ckpt_add_file(ckpt, "x", NULL) != MOE_OK) return 0;
    ckpt->files[0].file.data = copy(&allocator, data, ckpt->files[0].file.size = size);
    if (moe__ckpt_read_header(&ckpt->files[0], NULL) == MOE_OK && moe__ckpt_reserve(ckpt, NULL) == MOE_OK &&
        moe__ckpt_fill(ckpt, NULL) == MOE_OK) {
        for (int32_t i = 0; moe_checkpoint_at(ckpt, i, &t, NULL) == MOE_OK; i++)
            for (uint64_t b = 0; b < t.data_bytes; b++) sink = ((const unsigned char *)t.data)[b];
        moe_checkpoint_layers(ckpt, layers, 4, &count, NULL);
        moe_checkpoint_layer(ckpt, 0, &layer, NULL);
    }
    moe_checkpoint_close(ckpt);
    return (int)(sink & 0);
}
