// One call of each part, for builds with options switched off and for links without libraries. Prints nothing and
// returns 0, or the number of the call that failed.
#define MOE_IMPLEMENTATION
#include "../../moe.h"
#include <stdio.h>

static const float matrix[16] = { 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1 };

static int32_t identity_row(void *user, int32_t role, int32_t expert, int32_t row, float *out)
{
    (void)user;
    (void)expert;
    if (role != MOE_TENSOR_GATE && role != MOE_TENSOR_UP && role != MOE_TENSOR_DOWN) return 1; // there are no others
    memcpy(out, matrix + 4 * row, 4 * sizeof(float));
    return 0;
}

static int32_t fill(moe_weights *weights, moe_error *err)
{
    static const int32_t roles[3] = { MOE_TENSOR_GATE, MOE_TENSOR_UP, MOE_TENSOR_DOWN };
    for (int32_t i = 0; i < 9; i++) {
        moe_tensor t;
        memset(&t, 0, sizeof t);
        t.role = roles[i % 3];
        t.expert = i / 3;
        t.dtype = MOE_DTYPE_F32;
        t.rank = 2;
        t.dims[0] = t.dims[1] = 4;
        t.data = matrix;
        t.data_bytes = sizeof matrix;
        if (moe_weights_set_tensor(weights, &t, err)) return err->code;
    }
    return moe_weights_seal(weights, err);
}

static void make_layer(moe_layer_desc *layer)
{
    memset(layer, 0, sizeof *layer);
    layer->hidden_size = layer->intermediate_size = 4;
    layer->num_experts = 3;
    layer->format = MOE_FORMAT_F32;
    layer->activation.kind = MOE_ACTIVATION_SWIGLU;
    moe_routing_preset(MOE_ROUTING_RENORMALIZE, &layer->routing, NULL);
    layer->routing.top_k = 1;
}

static int run(moe_context *ctx, moe_error *err)
{
    static uint64_t workspace[1 << 16];
    moe_layer_desc layer;
    moe_weights *weights;
    moe_plan *plan;
    moe_plan_info info;
    moe_execute_args args;
    moe_reference_layer_args reference;
    float x[4] = { 1, 2, 3, 4 }, logits[3] = { 0, 1, 0 }, out[4], expected[4], weight = 1;
    int32_t id = 1;
    make_layer(&layer);
    if (moe_layer_resolve(&layer, err)) return 10;
    if (moe_weights_create(ctx, &layer, NULL, &weights, err) || fill(weights, err)) return 11;
    memset(&info, 0, sizeof info);
    if (moe_plan_create(ctx, &layer, NULL, &plan, err) || moe_plan_get_info(plan, &info, err)) return 12;
    memset(&args, 0, sizeof args);
    args.input_mode = MOE_INPUT_LOGITS;
    args.num_tokens = 1;
    args.x = x;
    args.logits = logits;
    args.out = out;
    args.workspace = (char *)workspace + (256 - (uintptr_t)workspace % 256) % 256;
    args.workspace_bytes = sizeof workspace - 256;
    if (info.workspace_bytes > args.workspace_bytes) { // max_tokens is 8192 by default
        moe_plan_desc desc;
        memset(&desc, 0, sizeof desc);
        desc.max_tokens = 1;
        moe_plan_destroy(plan);
        if (moe_plan_create(ctx, &layer, &desc, &plan, err)) return 13;
    }
    if (moe_execute_check(plan, weights, &args, err) || moe_execute(plan, weights, &args, NULL)) return 14;
    memset(&reference, 0, sizeof reference);
    reference.num_tokens = 1;
    reference.x = x;
    reference.ids = &id;
    reference.weights = &weight;
    reference.rows = identity_row;
    reference.out = expected;
    if (moe_reference_layer(&layer, &reference, err)) return 15;
    if (memcmp(out, expected, sizeof out) != 0) return 16;
#ifndef MOE_NO_FILES
    {
        const char *path = getenv("PARTS_FILE");
        moe_weights *loaded;
        if (moe_weights_save(weights, path, err) || moe_weights_load(ctx, &layer, path, &loaded, err)) return 17;
        moe_weights_destroy(loaded);
    }
#endif
    moe_plan_destroy(plan);
    moe_weights_destroy(weights);
    return 0;
}

static int check(moe_error *err)
{
    moe_context *ctx;
    moe_reference_route_args route;
    moe_routing_desc routing;
    float logits[3] = { 0, 1, 0 }, weight;
    int32_t id;
    uint16_t half;
    int code;
    if (moe_version() != MOE_VERSION) return 1;
    if (moe_convert(logits, MOE_DTYPE_F32, &half, MOE_DTYPE_BF16, 1, err)) return 2;
    if (moe_routing_preset(MOE_ROUTING_DEFAULT, &routing, err)) return 3;
    routing.top_k = 1;
    memset(&route, 0, sizeof route);
    route.num_tokens = 1;
    route.num_experts = 3;
    route.logits = logits;
    route.out_ids = &id;
    route.out_weights = &weight;
    if (moe_reference_route(&routing, &route, err) || id != 1) return 4;
#ifndef MOE_NO_CONFIG
    {
        static const char json[] = "{\"model_type\": \"mixtral\", \"hidden_size\": 8, \"intermediate_size\": 8,"
                                   "\"num_local_experts\": 4, \"num_experts_per_tok\": 2, \"hidden_act\": \"silu\","
                                   "\"num_hidden_layers\": 1}";
        moe_layer_desc layer;
        moe_tensor_name name;
        if (moe_layer_from_config(json, sizeof json - 1, NULL, 0, 0, &layer, err) || layer.num_experts != 4) return 5;
        if (moe_tensor_from_name("model.layers.3.block_sparse_moe.experts.2.w1.weight", &name, err)) return 6;
    }
#endif
#ifndef MOE_NO_CHECKPOINT
    {
        moe_checkpoint *ckpt;
        int32_t count;
        if (moe_checkpoint_open("tests/golden/mixtral", NULL, &ckpt, err)) return 7;
        if (moe_checkpoint_layers(ckpt, NULL, 0, &count, err) || count != 1) return 8;
        moe_checkpoint_close(ckpt);
    }
#endif
    if (moe_context_create(NULL, &ctx, err)) return 9;
    code = run(ctx, err);
    moe_context_destroy(ctx);
    return code;
}

// The back end for GPUs, which MOE_NO_CUDA leaves out. Where the environment names a library by a path that is not
// absolute, it is refused, unless MOE_NO_ENV leaves the environment alone.
static int check_cuda(moe_error *err)
{
    const char *library = getenv("MOE_CUDA_LIB");
    moe_context_desc desc;
    moe_context *ctx;
    int32_t result;
    memset(&desc, 0, sizeof desc);
    desc.backend = MOE_BACKEND_CUDA;
    result = moe_context_create(&desc, &ctx, err);
    if (result == MOE_OK) moe_context_destroy(ctx);
#if defined(MOE_NO_CUDA)
    (void)library;
    if (result == MOE_OK || strstr(err->text, "MOE_NO_CUDA") == NULL) return 18;
#elif defined(MOE_NO_ENV)
    if (library != NULL && result != MOE_OK && strstr(err->text, library) != NULL) return 19;
#else
    if (library != NULL && library[0] != '/' && (result == MOE_OK || strstr(err->text, library) == NULL)) return 20;
#endif
    return 0;
}

int main(void)
{
    moe_error err;
    int code = check(&err);
    if (code == 0) code = check_cuda(&err);
    if (code != 0) printf("call %d: %s\n", code, err.text);
    return code;
}
