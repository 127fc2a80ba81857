// checkpoint_layer.c - a layer from a checkpoint folder in as few calls as there are: open, infer, load, plan, execute
//
//     cc -o checkpoint_layer examples/checkpoint_layer.c -lpthread && ./checkpoint_layer tests/golden/mixtral 0
//
// Runs 4 tokens of ones, twos, ... through the router and the experts in the checkpoint's own format.
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include <stdio.h>

int main(int argc, char **argv)
{
    enum { TOKENS = 4 };
    moe_error err;
    moe_layer_desc layer;
    moe_checkpoint *ckpt = NULL;
    moe_context *ctx = NULL;
    moe_weights *weights = NULL;
    moe_plan *plan = NULL;
    moe_plan_desc desc = { 0 };
    moe_plan_info info = { 0 };
    moe_execute_args args = { 0 };
    float *x, *out, *logits;
    char *workspace;
    if (argc != 3) return fprintf(stderr, "usage: checkpoint_layer DIR LAYER\n"), 2;
    desc.max_tokens = TOKENS;
    desc.x_dtype = MOE_DTYPE_F32; // x and out as floats, whatever the weights are
    if (moe_checkpoint_open(argv[1], NULL, &ckpt, &err) ||
        moe_checkpoint_layer(ckpt, (int32_t)strtol(argv[2], NULL, 10), &layer, &err) ||
        moe_context_create(NULL, &ctx, &err) || moe_weights_from_checkpoint(ctx, ckpt, &layer, &weights, &err) ||
        moe_plan_create(ctx, &layer, &desc, &plan, &err) || moe_plan_get_info(plan, &info, &err))
        return fprintf(stderr, "%s\n", err.text), 1;
    moe_checkpoint_close(ckpt); // the weights are packed copies

    x = (float *)malloc(TOKENS * (size_t)layer.hidden_size * sizeof *x);
    out = (float *)malloc(TOKENS * (size_t)layer.hidden_size * sizeof *out);
    logits = (float *)malloc(TOKENS * (size_t)info.router_width * sizeof *logits);
    workspace = (char *)malloc((size_t)info.workspace_bytes + 256);
    if (x == NULL || out == NULL || logits == NULL || workspace == NULL) return fprintf(stderr, "no memory\n"), 1;
    for (int32_t i = 0; i < TOKENS * layer.hidden_size; i++) x[i] = (float)(1 + i / layer.hidden_size);

    args.input_mode = MOE_INPUT_LOGITS;
    args.num_tokens = TOKENS;
    args.x = x;
    args.out = out;
    args.workspace = workspace + (256 - (uintptr_t)workspace % 256) % 256;
    args.workspace_bytes = info.workspace_bytes;
    args.logits = logits;
    if (moe_router_logits(plan, weights, &args, logits, NULL) || moe_execute_check(plan, weights, &args, &err) ||
        moe_execute(plan, weights, &args, NULL))
        return fprintf(stderr, "%s\n", err.text), 1;
    for (int32_t t = 0; t < TOKENS; t++)
        printf("token %d: %.5f %.5f %.5f ...\n", t, out[t * layer.hidden_size], out[t * layer.hidden_size + 1],
               out[t * layer.hidden_size + 2]);

    free(x);
    free(out);
    free(logits);
    free(workspace);
    moe_plan_destroy(plan);
    moe_weights_destroy(weights);
    moe_context_destroy(ctx);
    return 0;
}
