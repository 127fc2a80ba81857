// own_loader.c - for engines that read tensors themselves: names are told apart by moe_tensor_from_name(), data goes in
// tensor by tensor, in whatever order it comes
//
//     cc -o own_loader examples/own_loader.c -lpthread && ./own_loader tests/golden/mixtral 0
//
// "Reading" is done here with moe_checkpoint_at(), to stay short; any pointer to the bytes will do.
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include <stdio.h>

// What the engine knows about one tensor: name, type, shape, bytes. 1: the layer took it, 0: not its, -1: refused.
static int32_t give(moe_weights *weights, const moe_layer_desc *layer, const moe_checkpoint_tensor *from,
                    moe_error *err)
{
    moe_tensor_name name;
    moe_tensor t = { 0 };
    if (moe_tensor_from_name(from->name, &name, NULL) != MOE_OK) return 0; // attention, norms, embeddings
    if (name.layer != layer->layer_index) return 0;
    t.role = name.role;
    t.part = name.part;
    t.expert = name.expert;
    t.index = name.index;
    t.dtype = from->dtype;
    t.rank = from->rank;
    for (int32_t i = 0; i < from->rank && i < 4; i++) t.dims[i] = from->dims[i];
    t.data = from->data;
    t.data_bytes = from->data_bytes;
    t.name = from->name;
    // How the family stores its fused tensors, which no name says, was inferred together with the layer.
    if (name.role == MOE_TENSOR_GATE_UP || name.role == MOE_TENSOR_GATE_UP_BIAS) t.halves = layer->source.halves;
    if (name.role == MOE_TENSOR_SHARED_GATE_UP) t.halves = layer->source.shared_halves;
    if (name.role <= MOE_TENSOR_DOWN) t.layout = layer->source.layout;
    return moe_weights_set_tensor(weights, &t, err) == MOE_OK ? 1 : -1;
}

int main(int argc, char **argv)
{
    moe_error err;
    moe_layer_desc layer;
    moe_checkpoint *ckpt = NULL;
    moe_context *ctx = NULL;
    moe_weights *weights = NULL;
    moe_weights_info info = { 0 };
    if (argc != 3) return fprintf(stderr, "usage: own_loader DIR LAYER\n"), 2;
    if (moe_checkpoint_open(argv[1], NULL, &ckpt, &err) ||
        moe_checkpoint_layer(ckpt, (int32_t)strtol(argv[2], NULL, 10), &layer, &err) ||
        moe_context_create(NULL, &ctx, &err) || moe_weights_create(ctx, &layer, NULL, &weights, &err))
        return fprintf(stderr, "%s\n", err.text), 1;
    for (int32_t i = moe_checkpoint_count(ckpt); i-- > 0;) { // last tensor first: the order does not matter
        moe_checkpoint_tensor from;
        if (moe_checkpoint_at(ckpt, i, &from, &err) || give(weights, &layer, &from, &err) < 0)
            return fprintf(stderr, "%s\n", err.text), 1;
    }
    moe_checkpoint_close(ckpt);
    if (moe_weights_seal(weights, &err) || moe_weights_get_info(weights, &info, &err)) // seal names what is missing
        return fprintf(stderr, "%s\n", err.text), 1;
    printf("%d tensors set, %d experts, %.1f KiB packed\n", info.tensors_set, info.local_experts,
           (double)info.weight_bytes / 1024);
    moe_weights_destroy(weights);
    moe_context_destroy(ctx);
    return 0;
}
