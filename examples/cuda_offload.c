// cuda_offload.c - more experts than the device has room for: they stay in host memory, and kernels read them there
//
//     cc -o cuda_offload examples/cuda_offload.c -l:libcuda.so.1 -lpthread && ./cuda_offload
//
// 32 experts as cuda_layer.c has two; a token uses two of them. The engine gives the weights a block of page-locked
// host memory; device memory then holds a table of addresses. A call reads over the bus the experts that it uses and no
// others, so this is for few tokens, or for layers whose experts are seldom used. moe_weights_replace_expert() gives an
// expert new matrices between two calls, in the order of the stream: here, and with experts on the device.
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include <stdio.h>

// ---- the engine's part ----
int cuInit(unsigned), cuDeviceGet(int *, int), cuDevicePrimaryCtxRetain(void **, int), cuCtxSetCurrent(void *);
int cuDevicePrimaryCtxRelease_v2(int), cuMemAlloc_v2(uint64_t *, size_t), cuMemFree_v2(uint64_t);
int cuMemHostAlloc(void **, size_t, unsigned), cuMemFreeHost(void *);
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
enum { H = 8, EXPERTS = 32, MATRICES = 3 };

// Gate and up are the identity, down is `value` times it; all [H, H], as nn.Linear stores them.
static void expert_of(int32_t expert, uint16_t value, uint16_t data[MATRICES][H * H], moe_tensor t[MATRICES])
{
    static const int32_t roles[MATRICES] = { MOE_TENSOR_GATE, MOE_TENSOR_UP, MOE_TENSOR_DOWN };
    for (int m = 0; m < MATRICES; m++) {
        moe_tensor zero = { 0 };
        for (int i = 0; i < H * H; i++) data[m][i] = i % (H + 1) != 0 ? 0 : m == 2 ? value : 0x3f80 /* 1 in bf16 */;
        t[m] = zero;
        t[m].role = roles[m];
        t[m].expert = expert;
        t[m].dtype = MOE_DTYPE_BF16;
        t[m].rank = 2;
        t[m].dims[0] = t[m].dims[1] = H;
        t[m].data = data[m];
        t[m].data_bytes = sizeof data[m];
    }
}

int main(void)
{
    const uint16_t one = 0x3f80, two = 0x4000, minus_one = 0xbf80, three = 0x4040; // bf16
    uint16_t x[H] = { one, three }, data[MATRICES][H * H];
    float logits[EXPERTS] = { 0 }, out[H];
    int device;
    void *context, *stream;
    moe_error err;
    moe_tensor tensors[MATRICES];
    moe_layer_desc layer = { 0 };
    moe_context_desc where = { 0 };
    moe_weights_desc home = { 0 };
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
    layer.num_experts = EXPERTS;
    layer.format = MOE_FORMAT_BF16;
    layer.activation.kind = MOE_ACTIVATION_SWIGLU;
    if (moe_routing_preset(MOE_ROUTING_RENORMALIZE, &layer.routing, &err)) goto failed;
    layer.routing.top_k = 2;
    desc.max_tokens = 64;
    desc.out_dtype = MOE_DTYPE_F32;
    where.backend = MOE_BACKEND_CUDA;
    where.cuda_context = context;

    if (moe_context_create(&where, &ctx, &err) || moe_plan_create(ctx, &layer, &desc, &plan, &err) ||
        moe_plan_get_info(plan, &info, &err)) goto failed;
    home.memory_kind = MOE_MEMORY_HOST;
    home.memory_bytes = info.weight_bytes;
    if (cuMemHostAlloc(&home.memory, (size_t)info.weight_bytes, 2 /* CU_MEMHOSTALLOC_DEVICEMAP */)) {
        fprintf(stderr, "no page-locked memory\n");
        return 1;
    }
    if (moe_weights_create(ctx, &layer, &home, &weights, &err)) goto failed;
    for (int32_t e = 0; e < EXPERTS; e++) {
        expert_of(e, e % 2 == 0 ? two : minus_one, data, tensors);
        for (int m = 0; m < MATRICES; m++)
            if (moe_weights_set_tensor(weights, &tensors[m], &err)) goto failed;
    }
    if (moe_weights_seal(weights, &err)) goto failed;
    printf("%d experts, %llu bytes, in host memory\n", EXPERTS, (unsigned long long)info.weight_bytes);

    logits[20] = 10;
    logits[31] = 10 + 1.0986123f; // log 3: weights 3/4 and 1/4
    args.input_mode = MOE_INPUT_LOGITS;
    args.num_tokens = 1;
    args.x = device_memory(sizeof x, x);
    args.logits = device_memory(sizeof logits, logits);
    args.out = device_memory(sizeof out, NULL);
    args.workspace = device_memory((size_t)info.workspace_bytes, NULL);
    args.workspace_bytes = info.workspace_bytes;
    if (moe_execute_check(plan, weights, &args, &err)) goto failed;
    for (int i = 0; i < 2; i++) {
        if (moe_execute(plan, weights, &args, stream)) return 1;
        cuStreamSynchronize(stream);
        cuMemcpyDtoH_v2(out, (uint64_t)(uintptr_t)args.out, sizeof out);
        printf("%s: %.4f %.4f\n", i == 0 ? "experts 31 and 20" : "31 replaced", out[0], out[1]);
        if (i == 1) break;
        expert_of(31, two, data, tensors);
        if (moe_weights_replace_expert(weights, 31, tensors, MATRICES, stream, &err)) goto failed;
    }
    moe_plan_destroy(plan);
    moe_weights_destroy(weights);
    moe_context_destroy(ctx);
    cuMemFreeHost(home.memory);
    end_engine(device, stream);
    return 0;
failed:
    fprintf(stderr, "%s\n", err.text);
    return 1;
}
