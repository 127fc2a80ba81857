// cuda_overlap.c - a shared expert on a second stream, beside the routed experts' second product
//
//     cc -o cuda_overlap examples/cuda_overlap.c -l:libcuda.so.1 -lpthread && ./cuda_overlap
//
// The layer of cuda_layer.c, and as a layer of its own a dense expert that every token uses. (layer.shared computes it
// in the same call, one product behind the other; this is for engines that want them at the same time.) With few tokens
// GEMM 1 keeps the whole memory bus busy; the other stream starts when it has ended and takes the SMs that sm_limit
// leaves. What runs at the same time has a workspace of its own; a plan and weights may be shared.
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include <stdio.h>

// ---- the engine's part ----
int cuInit(unsigned), cuDeviceGet(int *, int), cuDevicePrimaryCtxRetain(void **, int), cuCtxSetCurrent(void *);
int cuDevicePrimaryCtxRelease_v2(int), cuMemAlloc_v2(uint64_t *, size_t), cuMemFree_v2(uint64_t);
int cuStreamCreate(void **, unsigned), cuStreamSynchronize(void *), cuStreamDestroy_v2(void *);
int cuStreamWaitEvent(void *, void *, unsigned), cuEventCreate(void **, unsigned), cuEventDestroy_v2(void *);
int cuEventRecord(void *, void *), cuDeviceGetAttribute(int *, int, int);
int cuMemcpyHtoD_v2(uint64_t, const void *, size_t), cuMemcpyDtoH_v2(void *, uint64_t, size_t);

static uint64_t allocated[16];
static int allocations;

static void *device_memory(size_t bytes, const void *from)
{
    uint64_t at = 0;
    if (cuMemAlloc_v2(&at, bytes) != 0) return NULL;
    allocated[allocations++] = at;
    if (from != NULL && cuMemcpyHtoD_v2(at, from, bytes) != 0) return NULL;
    return (void *)(uintptr_t)at;
}

// ---- the layers ----
enum { H = 8 };

static const uint16_t one = 0x3f80, two = 0x4000, minus_one = 0xbf80, three = 0x4040; // bf16

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

// A layer of `experts` experts, all of which a token uses, and the arguments of a call with one token.
static int32_t make(moe_context *ctx, int32_t experts, moe_plan **plan, moe_weights **weights, moe_execute_args *args,
                    moe_error *err)
{
    moe_layer_desc layer = { 0 };
    moe_plan_desc desc = { 0 };
    moe_plan_info info = { 0 };
    layer.hidden_size = layer.intermediate_size = H;
    layer.num_experts = experts;
    layer.format = MOE_FORMAT_BF16;
    layer.activation.kind = MOE_ACTIVATION_SWIGLU;
    desc.max_tokens = 64;
    desc.out_dtype = MOE_DTYPE_F32;
    if (moe_routing_preset(MOE_ROUTING_RENORMALIZE, &layer.routing, err)) return err->code;
    layer.routing.top_k = experts;
    if (moe_weights_create(ctx, &layer, NULL, weights, err)) return err->code;
    for (int32_t e = 0; e < experts; e++)
        if (set(*weights, MOE_TENSOR_GATE, e, one, err) || set(*weights, MOE_TENSOR_UP, e, one, err) ||
            set(*weights, MOE_TENSOR_DOWN, e, e == 0 ? two : minus_one, err)) return err->code;
    if (moe_weights_seal(*weights, err) || moe_plan_create(ctx, &layer, &desc, plan, err) ||
        moe_plan_get_info(*plan, &info, err)) return err->code;
    args->num_tokens = 1;
    args->out = device_memory(H * sizeof(float), NULL);
    args->workspace = device_memory((size_t)info.workspace_bytes, NULL);
    args->workspace_bytes = info.workspace_bytes;
    return MOE_OK;
}

int main(void)
{
    const uint16_t x[H] = { one, three };
    const float logits[2] = { 0, 1.0986123f /* log 3 */ }, weight = 1;
    const int32_t id = 0;
    float out[2][H];
    int device, sms;
    void *context, *stream[2], *gemm1_ended, *shared_ended;
    moe_error err;
    moe_context_desc where = { 0 };
    moe_execute_args routed = { 0 }, shared = { 0 };
    moe_context *ctx;
    moe_weights *weights[2];
    moe_plan *plan[2];

    if (cuInit(0) || cuDeviceGet(&device, 0) || cuDevicePrimaryCtxRetain(&context, device) ||
        cuCtxSetCurrent(context) || cuDeviceGetAttribute(&sms, 16, device) || cuStreamCreate(&stream[0], 1) ||
        cuStreamCreate(&stream[1], 1) || cuEventCreate(&gemm1_ended, 2) || cuEventCreate(&shared_ended, 2)) {
        fprintf(stderr, "there is no GPU\n");
        return 1;
    }
    where.backend = MOE_BACKEND_CUDA;
    where.cuda_context = context;
    if (moe_context_create(&where, &ctx, &err) || make(ctx, 2, &plan[0], &weights[0], &routed, &err) ||
        make(ctx, 1, &plan[1], &weights[1], &shared, &err)) goto failed;

    routed.input_mode = MOE_INPUT_LOGITS;
    routed.x = shared.x = device_memory(sizeof x, x);
    routed.logits = device_memory(sizeof logits, logits);
    routed.gemm2_start_event = gemm1_ended;
    routed.sm_limit = sms - sms / 4;
    shared.input_mode = MOE_INPUT_IDS; // expert 0 with weight 1
    shared.ids = device_memory(sizeof id, &id);
    shared.weights = device_memory(sizeof weight, &weight);
    shared.sm_limit = sms / 4;
    if (moe_execute_check(plan[0], weights[0], &routed, &err) || moe_execute_check(plan[1], weights[1], &shared, &err))
        goto failed;
    if (moe_execute(plan[0], weights[0], &routed, stream[0]) || cuStreamWaitEvent(stream[1], gemm1_ended, 0) ||
        moe_execute(plan[1], weights[1], &shared, stream[1]) || cuEventRecord(shared_ended, stream[1]) ||
        cuStreamWaitEvent(stream[0], shared_ended, 0)) {
        fprintf(stderr, "a launch was refused\n");
        return 1;
    }
    cuStreamSynchronize(stream[0]); // behind both: here the engine would add the two outputs
    cuMemcpyDtoH_v2(out[0], (uint64_t)(uintptr_t)routed.out, sizeof out[0]);
    cuMemcpyDtoH_v2(out[1], (uint64_t)(uintptr_t)shared.out, sizeof out[1]);
    printf("routed %.4f %.4f, shared %.4f %.4f\n", out[0][0], out[0][1], out[1][0], out[1][1]);
    for (int i = 0; i < 2; i++) {
        moe_plan_destroy(plan[i]);
        moe_weights_destroy(weights[i]);
        cuStreamDestroy_v2(stream[i]);
    }
    moe_context_destroy(ctx);
    cuEventDestroy_v2(gemm1_ended);
    cuEventDestroy_v2(shared_ended);
    while (allocations > 0) cuMemFree_v2(allocated[--allocations]);
    cuDevicePrimaryCtxRelease_v2(device);
    return 0;
failed:
    fprintf(stderr, "%s\n", err.text);
    return 1;
}
