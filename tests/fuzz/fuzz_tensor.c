// clang -g -O1 -fsanitize=fuzzer,address,undefined tests/fuzz/fuzz_tensor.c -o build/fuzz_tensor -lpthread
// build/fuzz_tensor -max_total_time=20 build/new
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../../moe.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { H = 64, I = 32, E = 2, TENSOR = 14 };

static moe_layer_desc make_layer(uint8_t format, uint8_t flags)
{
    moe_layer_desc layer;
    memset(&layer, 0, sizeof layer);
    layer.hidden_size = H;
    layer.intermediate_size = I;
    layer.num_experts = E;
    layer.format = 1 + format % MOE_FORMAT_INT4_W4A16;
    if (layer.format == MOE_FORMAT_FP8_BLOCK || layer.format == MOE_FORMAT_INT4_W4A16) layer.format_block = 32;
    if (layer.format == MOE_FORMAT_INT4_W4A16 && (flags & 8) != 0) layer.scale_dtype = MOE_DTYPE_F16;
    if (layer.format == MOE_FORMAT_FP8_BLOCK && (flags & 8) != 0) layer.scale_dtype = MOE_DTYPE_UE8M0;
    layer.activation.kind = (flags & 1) != 0 ? MOE_ACTIVATION_RELU2 : MOE_ACTIVATION_SWIGLU;
    layer.routing.score = MOE_SCORE_SOFTMAX;
    layer.routing.score_order = MOE_SCORE_BEFORE_TOPK;
    layer.routing.top_k = 1;
    if ((flags & 2) != 0) {
        layer.shared.count = 2;
        layer.shared.intermediate_size = I;
    }
    if ((flags & 4) != 0) layer.shared.format = layer.shared.count > 0 && layer.format > MOE_FORMAT_F16 ? 2 : 0;
    return layer;
}

// Members from bytes; dims are often those that the role and part should have.
static void make_tensor(const uint8_t *d, const moe_layer_desc *layer, moe_tensor *t)
{
    static const int64_t sizes[16] = { H, I, 2 * I, E, 1, 2, H / 2, I / 2, H / 8, I / 8, H / 32, I / 32, 16, 128, 0, -1 };
    moe__scheme s = moe__weight_scheme(layer->format, layer->format_block, layer->scale_dtype);
    memset(t, 0, sizeof *t);
    t->role = d[0] % (MOE_TENSOR_ROLES + 1);
    t->part = d[1] % 8;
    t->expert = d[2] % 4 - 1;
    t->dtype = d[3] % 20;
    t->rank = d[4] % 5;
    t->layout = d[5] % 8;
    t->halves = d[6] % 6;
    t->row_order = d[7] % 8 < 4 ? 0 : d[7] % 4;
    t->scale_layout = d[8] % 8 < 4 ? 0 : d[8] % 4;
    t->index = d[9] % 4 - 1;
    for (int i = 0; i < 4; i++) t->dims[i] = sizes[d[10 + i / 2] >> (i % 2 * 4) & 15];
    if (d[12] % 4 != 0 && moe__role_matrix(t->role) >= 0) { // mostly right
        int down = moe__role_matrix(t->role) == 2, fused = moe__role_is_fused(t->role);
        int64_t rows = down ? H : (fused ? 2 : 1) * I, columns = down ? I : H;
        int at = t->expert < 0;
        if (t->layout < MOE_LAYOUT_GGML_Q4_0) t->layout = 0;
        if (fused && t->halves < 2) t->halves = 2 + d[6] % 4;
        if (!fused) t->halves = 0;
        t->dtype = t->part == 0 ? s.dtype : t->part == 1 ? s.scale_dtype : MOE_DTYPE_F32;
        t->rank = at + 2;
        t->dims[0] = E;
        t->dims[at] = t->part == 0 || s.rows == 0 ? rows : (rows + s.rows - 1) / s.rows;
        t->dims[at + 1] = t->part == 0 ? columns : s.columns == 0 ? 1 : columns / s.columns;
        if (t->part > 1 || (t->part == 1 && s.rows == 0)) t->rank = at;
        if (t->layout >= MOE_LAYOUT_GGML_Q4_0) t->dtype = MOE_DTYPE_U8;
    }
}

static uint64_t bytes_of(const moe_tensor *t)
{
    uint64_t elements = 1;
    for (int i = 0; i < t->rank; i++) elements *= t->dims[i] < 0 ? 0 : (uint64_t)t->dims[i];
    if (t->layout >= MOE_LAYOUT_GGML_Q4_0 && t->layout <= MOE_LAYOUT_GGML_Q8_0)
        return elements / 32 * (uint64_t)moe__ggml_bytes(t->layout);
    if (t->scale_layout > MOE_SCALES_LINEAR && t->rank >= 2 && t->dims[t->rank - 1] >= 0 && t->dims[t->rank - 2] >= 0) {
        int64_t count = moe_scales_count(t->scale_layout, t->dims[t->rank - 2], t->dims[t->rank - 1]);
        return (uint64_t)count * (uint64_t)(t->rank == 3 && t->dims[0] > 0 ? t->dims[0] : 1) *
               (uint64_t)moe_dtype_bits(t->dtype) / 8;
    }
    return elements * (uint64_t)moe_dtype_bits(t->dtype) / 8;
}

static void run_layer(moe_context *ctx, const moe_layer_desc *layer, const moe_weights *w)
{
    moe_plan_desc desc;
    moe_plan_info info;
    moe_execute_args args;
    moe_plan *plan;
    float x[2 * H], out[2 * H], row[H];
    int32_t ids[2] = { 0, 1 };
    float weights[2] = { 1, 0.5f };
    memset(&desc, 0, sizeof desc);
    memset(&info, 0, sizeof info);
    memset(&args, 0, sizeof args);
    desc.max_tokens = 2;
    desc.x_dtype = desc.out_dtype = MOE_DTYPE_F32;
    for (int i = 0; i < 2 * H; i++) x[i] = (float)(i % 7) - 3;
    for (int32_t role = 1; role < MOE_TENSOR_ROLES; role++)
        (void)moe_weights_read_row(w, role, role == MOE_TENSOR_INPUT_SCALES ? -1 : 1, 0, row, NULL);
    if (moe_plan_create(ctx, layer, &desc, &plan, NULL) != MOE_OK) return;
    (void)moe_plan_get_info(plan, &info, NULL);
    args.input_mode = MOE_INPUT_IDS;
    args.num_tokens = 2;
    args.x = x;
    args.ids = ids;
    args.weights = weights;
    args.out = out;
    args.workspace = moe__default_alloc(NULL, (size_t)info.workspace_bytes, 256);
    args.workspace_bytes = info.workspace_bytes;
    if (moe_execute(plan, w, &args, NULL) != MOE_OK) __builtin_trap();
    moe__default_free(NULL, args.workspace, (size_t)info.workspace_bytes);
    moe_plan_destroy(plan);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) // format, flags, then tensors of 14 bytes
{
    static moe_context *ctx;
    moe_context_desc context;
    moe_layer_desc layer;
    moe_weights *w;
    moe_error err;
    if (size < 2 + TENSOR) return 0;
    memset(&context, 0, sizeof context);
    context.threads = 1;
    if (ctx == NULL && moe_context_create(&context, &ctx, NULL) != MOE_OK) __builtin_trap();
    layer = make_layer(data[0], data[1]);
    if (moe_weights_create(ctx, &layer, NULL, &w, &err) != MOE_OK) __builtin_trap();
    for (size_t at = 2; at + TENSOR <= size; at += TENSOR) {
        moe_tensor t;
        unsigned char *buffer;
        int32_t result;
        make_tensor(data + at, &layer, &t);
        t.data_bytes = bytes_of(&t) + (data[at + 13] == 0);
        if (t.data_bytes > 1 << 16) continue;
        buffer = (unsigned char *)malloc((size_t)t.data_bytes + 1); // no more than it says, to the byte
        t.data = buffer + 1;
        for (size_t i = 1; i <= t.data_bytes; i++) buffer[i] = (unsigned char)(data[(i * 7 + at) % size] & data[at + 13]);
        result = moe_weights_set_tensor(w, &t, &err);
        if (result != MOE_OK && (err.code != result || err.text[0] == 0)) __builtin_trap();
        free(buffer);
    }
    if (moe_weights_seal(w, &err) == MOE_OK) run_layer(ctx, &layer, w);
    moe_weights_destroy(w);
    return 0;
}
