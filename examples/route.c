// route.c - routing alone: which experts take a token, and with what weight, under several methods
//
//     cc -o route examples/route.c -lpthread && ./route
//
// moe_reference_route() needs no context, no weights and no plan. The last line shows a refusal.
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include <stdio.h>

static void show(const char *name, const moe_routing_desc *routing, const float *logits, const float *bias)
{
    moe_error err;
    moe_reference_route_args args = { 0 };
    int32_t ids[MOE_MAX_SLOTS];
    float weights[MOE_MAX_SLOTS];
    args.num_tokens = 1;
    args.num_experts = 8;
    args.logits = logits;
    args.bias = bias;
    args.out_ids = ids;
    args.out_weights = weights;
    if (moe_reference_route(routing, &args, &err)) {
        printf("%-18s %s\n", name, err.text);
        return;
    }
    printf("%-18s", name);
    for (int32_t i = 0; i < routing->top_k; i++) printf(" %d:%.4f", ids[i], weights[i]);
    printf("\n");
}

int main(void)
{
    static const int32_t methods[] = { MOE_ROUTING_DEFAULT, MOE_ROUTING_RENORMALIZE, MOE_ROUTING_SIGMOID,
                                       MOE_ROUTING_DEEPSEEK_V3, MOE_ROUTING_DEEPSEEK_V4 };
    const float logits[8] = { 0.5f, -1.0f, 2.0f, 0.25f, 1.5f, -0.5f, 0.0f, 1.75f };
    const float bias[8] = { 0, 0, -0.5f, 0, 0, 0.25f, 0, 0 }; // used by those methods that choose with one
    moe_error err;
    moe_routing_desc routing;
    for (size_t i = 0; i < sizeof methods / sizeof methods[0]; i++) {
        if (moe_routing_preset(methods[i], &routing, &err)) {
            fprintf(stderr, "%s\n", err.text);
            return 1;
        }
        routing.top_k = 2;
        if (methods[i] == MOE_ROUTING_DEEPSEEK_V3) { // 2 groups of 4 experts, the better one is kept
            routing.groups = 2;
            routing.groups_kept = 1;
            routing.scale = 2.5f;
        }
        show(moe_routing_method_string(methods[i]), &routing, logits, bias);
    }
    routing.groups = 3;
    routing.groups_kept = 1;
    routing.group_rule = MOE_GROUP_MAX;
    show("three groups", &routing, logits, bias);
    return 0;
}
