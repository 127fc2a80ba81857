// hello.c - a layer of two experts, built in memory: no files, one token
//
//     cc -o hello examples/hello.c -lpthread && ./hello
//
// H = 2, I = 2, f32. Expert 0 doubles what its gate lets through, expert 1 negates it; the token goes to both.
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include <stdio.h>

// Row-major [out, in], as nn.Linear stores it: gate [I, H], up [I, H], down [H, I].
static const float gate[2][4] = { { 1, 0, 0, 1 }, { 1, 0, 0, 1 } };
static const float up[2][4] = { { 1, 0, 0, 1 }, { 1, 0, 0, 1 } };
static const float down[2][4] = { { 2, 0, 0, 2 }, { -1, 0, 0, -1 } };

static int32_t set(moe_weights *weights, int32_t role, int32_t expert, const float *data, moe_error *err)
{
    moe_tensor t = { 0 };
    t.role = role;
    t.expert = expert;
    t.dtype = MOE_DTYPE_F32;
    t.rank = 2;
    t.dims[0] = t.dims[1] = 2;
    t.data = data;
    t.data_bytes = 4 * sizeof(float);
    return moe_weights_set_tensor(weights, &t, err);
}

int main(void)
{
    moe_error err;
    moe_layer_desc layer = { 0 };
    moe_context *ctx;
    moe_weights *weights;
    moe_plan *plan;
    moe_plan_desc desc = { 0 };
    moe_execute_args args = { 0 };
    float x[2] = { 1, 3 }, logits[2] = { 0, 1.0986123f /* log 3 */ }, out[2];
    int32_t ids[2];
    float chosen[2];
    static uint64_t workspace[1 << 16]; // moe_plan_info says how much; 256-aligned below

    layer.hidden_size = 2;
    layer.intermediate_size = 2;
    layer.num_experts = 2;
    layer.format = MOE_FORMAT_F32;
    layer.activation.kind = MOE_ACTIVATION_SWIGLU;
    if (moe_routing_preset(MOE_ROUTING_RENORMALIZE, &layer.routing, &err)) goto failed;
    layer.routing.top_k = 2;
    desc.max_tokens = 1;

    if (moe_context_create(NULL, &ctx, &err) || moe_weights_create(ctx, &layer, NULL, &weights, &err)) goto failed;
    for (int32_t e = 0; e < 2; e++)
        if (set(weights, MOE_TENSOR_GATE, e, gate[e], &err) || set(weights, MOE_TENSOR_UP, e, up[e], &err) ||
            set(weights, MOE_TENSOR_DOWN, e, down[e], &err)) goto failed;
    if (moe_weights_seal(weights, &err) || moe_plan_create(ctx, &layer, &desc, &plan, &err)) goto failed;

    args.input_mode = MOE_INPUT_LOGITS;
    args.num_tokens = 1;
    args.x = x;
    args.logits = logits;
    args.out = out;
    args.out_ids = ids;
    args.out_weights = chosen;
    args.workspace = (char *)workspace + (256 - (uintptr_t)workspace % 256) % 256;
    args.workspace_bytes = sizeof workspace - 256;
    if (moe_execute_check(plan, weights, &args, &err) || moe_execute(plan, weights, &args, NULL)) goto failed;

    printf("experts %d and %d, weights %.3f and %.3f, output %.4f %.4f\n", ids[0], ids[1], chosen[0], chosen[1], out[0],
           out[1]);
    moe_plan_destroy(plan);
    moe_weights_destroy(weights);
    moe_context_destroy(ctx);
    return 0;
failed:
    fprintf(stderr, "%s\n", err.text);
    return 1;
}
