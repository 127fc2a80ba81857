// Linked to the shared library: a caller must say which version of a struct it has; what the library calls of its own
// functions does. Arguments: a checkpoint whose layer 1 has experts, an empty folder. With MOE_CUDA_LIB set, on a GPU.
#define MOE_DLL
#include "../../moe.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Tensors of a checkpoint, measured tiles.
static int run_layer(moe_context *ctx, const char *folder, moe_error *err)
{
    moe_checkpoint *ckpt = NULL;
    moe_weights *weights = NULL;
    moe_plan *plan = NULL;
    moe_plan_desc desc;
    moe_layer_desc layer;
    memset(&desc, 0, sizeof desc);
    desc.struct_size = (uint32_t)sizeof desc;
    desc.max_tokens = 2;
    if (moe_checkpoint_open(folder, NULL, &ckpt, err) || moe_checkpoint_layer(ckpt, 1, &layer, err) ||
        moe_weights_from_checkpoint(ctx, ckpt, &layer, &weights, err) ||
        moe_plan_create(ctx, &layer, &desc, &plan, err) || moe_plan_autotune(plan, weights, NULL, err))
        printf("%s: %s\n", folder, err->text);
    moe_plan_destroy(plan);
    moe_weights_destroy(weights);
    moe_checkpoint_close(ckpt);
    return err->code != MOE_OK;
}

// It gets as far as NVRTC, which is not there.
static int run_ahead(const char *folder, moe_error *err)
{
    static const char *const chips[] = { "sm_80" };
    moe_precompile_desc desc;
    moe_layer_desc layer;
    memset(&desc, 0, sizeof desc);
    memset(&layer, 0, sizeof layer);
    layer.struct_size = (uint32_t)sizeof layer;
    layer.hidden_size = layer.intermediate_size = 64;
    layer.num_experts = 4;
    layer.format = MOE_FORMAT_BF16;
    layer.activation.kind = MOE_ACTIVATION_SWIGLU;
    if (moe_routing_preset(MOE_ROUTING_RENORMALIZE, &layer.routing, err)) return 1;
    layer.routing.top_k = 2;
    desc.struct_size = (uint32_t)sizeof desc;
    desc.chips = chips;
    desc.layers = &layer;
    desc.num_chips = desc.num_layers = 1;
    desc.jit.cache_dir = folder;
    desc.jit.cache_mode = MOE_CACHE_READ_WRITE;
    desc.jit.nvrtc_library = "/nonexistent/libnvrtc.so";
    if (moe_jit_precompile(&desc, err) == MOE_ERROR_NVRTC) return 0;
    printf("precompile: %d %s\n", (int)err->code, err->text);
    return 1;
}

int main(int argc, char **argv)
{
    moe_error err;
    moe_context *ctx;
    moe_context_desc desc;
    if (argc != 3) return 1;
    memset(&desc, 0, sizeof desc);
    if (moe_context_create(&desc, &ctx, &err) != MOE_ERROR_ARGUMENT || strstr(err.member, "struct_size") == NULL) {
        printf("struct_size 0 was not refused: %s\n", err.text);
        return 1;
    }
    desc.struct_size = (uint32_t)sizeof desc;
    if (getenv("MOE_CUDA_LIB") != NULL) desc.backend = MOE_BACKEND_CUDA;
    if (moe_context_create(&desc, &ctx, &err)) {
        printf("%s\n", err.text);
        return 1;
    }
    if (run_layer(ctx, argv[1], &err) || run_ahead(argv[2], &err)) return 1;
    moe_context_destroy(ctx);
    return 0;
}
