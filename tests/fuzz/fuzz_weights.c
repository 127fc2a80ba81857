// clang -g -O1 -fsanitize=fuzzer,address,undefined tests/fuzz/fuzz_weights.c -o build/fuzz_weights -lpthread
// build/fuzz_weights -max_total_time=20 build/new
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../../moe.h"

#include <stdio.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { KINDS = 3 };

static moe_layer_desc make_layer(int kind)
{
    static const int32_t formats[KINDS] = { MOE_FORMAT_F32, MOE_FORMAT_FP8_BLOCK, MOE_FORMAT_NVFP4 };
    moe_layer_desc layer;
    memset(&layer, 0, sizeof layer);
    layer.hidden_size = layer.intermediate_size = 32;
    layer.num_experts = 2;
    layer.format = formats[kind];
    if (layer.format == MOE_FORMAT_FP8_BLOCK) layer.format_block = 32;
    layer.activation.kind = MOE_ACTIVATION_SWIGLU;
    layer.routing.score = MOE_SCORE_SOFTMAX;
    layer.routing.score_order = MOE_SCORE_BEFORE_TOPK;
    layer.routing.top_k = 1;
    layer.routing.forced_rows = 2;
    return layer;
}

// A saved layer of zeros, but for factors of 1.
static unsigned char *make_file(moe_context *ctx, int kind, const char *path, size_t *size)
{
    static const unsigned char zeros[32 * 32 * 4];
    static const int32_t roles[3] = { MOE_TENSOR_GATE, MOE_TENSOR_UP, MOE_TENSOR_DOWN };
    const float one = 1;
    moe_layer_desc layer = make_layer(kind);
    moe__scheme s = moe__weight_scheme(layer.format, layer.format_block, 0);
    unsigned char *bytes;
    moe_weights *w;
    moe__file file;
    if (moe_weights_create(ctx, &layer, NULL, &w, NULL) != MOE_OK) __builtin_trap();
    for (int32_t e = 0; e < 2; e++)
        for (int i = 0; i < 3; i++)
            for (int32_t part = 0; part < 5; part++) {
                moe_tensor t;
                memset(&t, 0, sizeof t);
                t.role = roles[i];
                t.part = part;
                t.expert = e;
                t.dtype = part == 0 ? s.dtype : part == 1 ? s.scale_dtype : MOE_DTYPE_F32;
                t.rank = part < 2 ? 2 : 0;
                t.dims[0] = part == 0 || s.rows <= 1 ? 32 : 1;
                t.dims[1] = part == 0 ? 32 : s.columns > 0 ? 32 / s.columns : 1;
                t.data = part < 2 ? (const void *)zeros : &one;
                t.data_bytes = part < 2 ? (uint64_t)(t.dims[0] * t.dims[1] * moe_dtype_bits(t.dtype) / 8) : 4;
                (void)moe_weights_set_tensor(w, &t, NULL); // what the format does not have is refused
            }
    {
        moe_tensor t;
        const int32_t ids[2] = { 0, 1 };
        memset(&t, 0, sizeof t);
        t.role = MOE_TENSOR_FORCED_IDS;
        t.dtype = MOE_DTYPE_I32;
        t.rank = 2;
        t.dims[0] = 2;
        t.dims[1] = 1;
        t.data = ids;
        t.data_bytes = sizeof ids;
        if (moe_weights_set_tensor(w, &t, NULL) != MOE_OK) __builtin_trap();
    }
    if (moe_weights_seal(w, NULL) != MOE_OK || moe_weights_save(w, path, NULL) != MOE_OK) __builtin_trap();
    moe_weights_destroy(w);
    if (moe__file_map(path, &file, NULL) != MOE_OK) __builtin_trap();
    *size = (size_t)file.size;
    bytes = (unsigned char *)malloc(*size);
    memcpy(bytes, file.data, *size);
    moe__file_close(&ctx->desc.allocator, &file);
    return bytes;
}

static void sum(unsigned char *bytes, size_t from, size_t to, size_t at)
{
    moe__hash hash = moe__hash_begin();
    uint64_t value;
    moe__hash_add(&hash, bytes + from, to - from);
    value = moe__hash_end(&hash);
    memcpy(bytes + at, &value, 8);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) // kind, then changes: offset (2), value (2)
{
    static moe_context *ctx;
    static unsigned char *files[KINDS];
    static size_t sizes[KINDS];
    static char path[64];
    unsigned char *copy;
    moe_layer_desc layer;
    moe_weights *w;
    uint32_t header;
    size_t length;
    FILE *f;
    int kind;
    if (ctx == NULL) {
        moe_context_desc desc;
        memset(&desc, 0, sizeof desc);
        desc.threads = 1;
        if (moe_context_create(&desc, &ctx, NULL) != MOE_OK) __builtin_trap();
        snprintf(path, sizeof path, "/tmp/moe_fuzz_weights_%d", (int)getpid());
        for (int i = 0; i < KINDS; i++) files[i] = make_file(ctx, i, path, &sizes[i]);
    }
    if (size < 2) return 0;
    kind = data[0] % KINDS;
    length = (data[1] & 15) == 0 ? sizes[kind] - data[1] : sizes[kind]; // some cut short
    copy = (unsigned char *)malloc(length);
    memcpy(copy, files[kind], length);
    for (size_t at = 2; at + 4 <= size; at += 4) {
        size_t to = (size_t)(data[at] | data[at + 1] << 8) % (length - 2);
        memcpy(copy + to, data + at + 2, 2);
    }
    memcpy(&header, copy + 16, 4); // sums that fit, or nothing behind them would ever be reached
    if (header >= 56 && header <= length) {
        size_t offset = ((size_t)header + 255) / 256 * 256;
        if (offset <= length && (data[1] & 16) == 0) sum(copy, offset, length, 40);
        sum(copy, 0, header - 8, header - 8);
    }
    if ((f = fopen(path, "wb")) == NULL || fwrite(copy, 1, length, f) != length) __builtin_trap();
    fclose(f);
    free(copy);
    layer = make_layer(kind);
    if (moe_weights_load(ctx, &layer, path, &w, NULL) == MOE_OK) {
        float row[32];
        for (int32_t role = 1; role < MOE_TENSOR_ROLES; role++)
            for (int32_t e = -1; e < 2; e++) (void)moe_weights_read_row(w, role, e, 1, row, NULL);
        moe_weights_destroy(w);
    }
    return 0;
}
