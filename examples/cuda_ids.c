// cuda_ids.c - an engine that routes by itself: it brings each token's experts and weights, apart or packed
//
//     cc -o cuda_ids examples/cuda_ids.c -l:libcuda.so.1 -lpthread && ./cuda_ids
//
// The layer of cuda_layer.c; here the engine has chosen, as its own kernel or another library's would on the device.
// An id of -1 is a slot without an expert. Weights are used as they are: nothing is normalised. The router, its bias
// and everything else of routing are not needed then, but the descriptor still says how many experts a token has.
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include <stdio.h>

// ---- the engine's part ----
int cuInit(unsigned), cuDeviceGet(int *, int), cuDevicePrimaryCtxRetain(void **, int), cuCtxSetCurrent(void *);
int cuDevicePrimaryCtxRelease_v2(int), cuMemAlloc_v2(uint64_t *, size_t), cuMemFree_v2(uint64_t);
int cuStreamCreate(void **, unsigned), cuStreamSynchronize(void *), cuStreamDestroy_v2(void *);
int cuMemcpyHtoD_v2(uint64_t, const void *, size_t), cuMemcpyDtoH_v2(void *, uint64_t, size_t);

static uint64_t allocated[8];
static int allocations;

static void *device_memory(size_t bytes, const void *from)
{
    uint64_t at = 0;
    if (cuMemAlloc_v2(&at, bytes) != 0) return NULL;
    allocated[allocations++] = at;
    if (from != NULL && cuMemcpyHtoD_v2(at, from, bytes) != 0) return NULL;
    return (void *)(uintptr_t)at;
}

static void end_engine(int device, void *stream)
{
    while (allocations > 0) cuMemFree_v2(allocated[--allocations]);
    cuStreamDestroy_v2(stream);
    cuDevicePrimaryCtxRelease_v2(device);
}

// ---- the layer ----
enum { H = 8, TOKENS = 2, SLOTS = 2 };

// A multiple of the identity, [H, H], as nn.Linear stores it.
static int32_t set(moe_weights *weights, int32_t role, int32_t expert, uint16_t value, moe_error *err)
{
    uint16_t data[H * H] = { 0 };
    moe_tensor t = { 0 };
    for (int i = 0; i < H; i++) data[i * H + i] = value;
    t.role = role;
    t.expert = expert;
    t.dtype = MOE_DTYPE_BF16;
    t.rank = 2;
    t.dims[0] = t.dims[1] = H;
    t.data = data; // host memory; t.memory says when it is the device's
    t.data_bytes = sizeof data;
    return moe_weights_set_tensor(weights, &t, err);
}

int main(void)
{
    const uint16_t one = 0x3f80, two = 0x4000, minus_one = 0xbf80, three = 0x4040; // bf16
    const uint32_t quarter = 0x3e80, three_quarters = 0x3f40;
    uint16_t x[TOKENS][H] = { { one, three }, { one, three } };
    int32_t ids[TOKENS][SLOTS] = { { 1, 0 }, { -1, 0 } };
    float chosen[TOKENS][SLOTS] = { { 0.75f, 0.25f }, { 0, 0.25f } }, out[TOKENS][H];
    uint32_t packed[TOKENS][SLOTS] = { { 1u << 16 | three_quarters, 0u << 16 | quarter },
                                       { 0xffffu << 16, 0u << 16 | quarter } }; // (id << 16) | bits of the weight
    int device;
    void *context, *stream;
    moe_error err;
    moe_layer_desc layer = { 0 };
    moe_context_desc where = { 0 };
    moe_plan_desc desc = { 0 };
    moe_plan_info info = { 0 };
    moe_execute_args args = { 0 };
    moe_context *ctx;
    moe_weights *weights;
    moe_plan *plan;

    if (cuInit(0) || cuDeviceGet(&device, 0) || cuDevicePrimaryCtxRetain(&context, device) ||
        cuCtxSetCurrent(context) || cuStreamCreate(&stream, 1)) {
        fprintf(stderr, "there is no GPU\n");
        return 1;
    }
    layer.hidden_size = layer.intermediate_size = H;
    layer.num_experts = 2;
    layer.format = MOE_FORMAT_BF16;
    layer.activation.kind = MOE_ACTIVATION_SWIGLU;
    if (moe_routing_preset(MOE_ROUTING_RENORMALIZE, &layer.routing, &err)) goto failed;
    layer.routing.top_k = SLOTS;
    desc.max_tokens = 64;
    desc.out_dtype = MOE_DTYPE_F32; // ids_dtype and weights_dtype: i32 and f32 here
    where.backend = MOE_BACKEND_CUDA;
    where.cuda_context = context;

    if (moe_context_create(&where, &ctx, &err) || moe_weights_create(ctx, &layer, NULL, &weights, &err)) goto failed;
    for (int32_t e = 0; e < 2; e++)
        if (set(weights, MOE_TENSOR_GATE, e, one, &err) || set(weights, MOE_TENSOR_UP, e, one, &err) ||
            set(weights, MOE_TENSOR_DOWN, e, e == 0 ? two : minus_one, &err)) goto failed;
    if (moe_weights_seal(weights, &err) || moe_plan_create(ctx, &layer, &desc, &plan, &err) ||
        moe_plan_get_info(plan, &info, &err)) goto failed;

    args.num_tokens = TOKENS;
    args.x = device_memory(sizeof x, x);
    args.out = device_memory(sizeof out, NULL);
    args.workspace = device_memory((size_t)info.workspace_bytes, NULL);
    args.workspace_bytes = info.workspace_bytes;
    for (int i = 0; i < 2; i++) {
        args.input_mode = i == 0 ? MOE_INPUT_IDS : MOE_INPUT_PACKED;
        args.ids = i == 0 ? device_memory(sizeof ids, ids) : device_memory(sizeof packed, packed);
        args.weights = i == 0 ? device_memory(sizeof chosen, chosen) : NULL;
        if (moe_execute_check(plan, weights, &args, &err) || moe_execute(plan, weights, &args, stream)) goto failed;
        cuStreamSynchronize(stream);
        cuMemcpyDtoH_v2(out, (uint64_t)(uintptr_t)args.out, sizeof out);
        for (int t = 0; t < TOKENS; t++)
            printf("%s, token %d: %.4f %.4f\n", i == 0 ? "apart" : "packed", t, out[t][0], out[t][1]);
    }
    moe_plan_destroy(plan);
    moe_weights_destroy(weights);
    moe_context_destroy(ctx);
    end_engine(device, stream);
    return 0;
failed:
    fprintf(stderr, "%s\n", err.text);
    return 1;
}
