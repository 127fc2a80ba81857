// cuda_graph.c - a layer captured once and replayed with other tokens, and with another number of them
//
//     cc -o cuda_graph examples/cuda_graph.c -l:libcuda.so.1 -lpthread && ./cuda_graph
//
// The layer of cuda_layer.c for up to 4 tokens. num_tokens is the most that the graph serves; how many there are is
// read from num_tokens_dev when it runs. What lies behind them is left as it was.
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include <stdio.h>

// ---- the engine's part ----
int cuInit(unsigned), cuDeviceGet(int *, int), cuDevicePrimaryCtxRetain(void **, int), cuCtxSetCurrent(void *);
int cuDevicePrimaryCtxRelease_v2(int), cuMemAlloc_v2(uint64_t *, size_t), cuMemFree_v2(uint64_t);
int cuStreamCreate(void **, unsigned), cuStreamSynchronize(void *), cuStreamDestroy_v2(void *);
int cuMemcpyHtoD_v2(uint64_t, const void *, size_t), cuMemcpyDtoH_v2(void *, uint64_t, size_t);
int cuStreamBeginCapture_v2(void *, int), cuStreamEndCapture(void *, void **);
int cuGraphInstantiateWithFlags(void **, void *, unsigned long long), cuGraphLaunch(void *, void *);
int cuGraphExecDestroy(void *), cuGraphDestroy(void *);

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
enum { H = 8, MOST = 4 };

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
    uint16_t x[MOST][H] = { { 0 } };
    float logits[MOST][2] = { { 0 } }, out[MOST][H];
    int32_t count = 0;
    void *graph, *replay;
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
    layer.routing.top_k = 2;
    desc.max_tokens = 64;
    desc.out_dtype = MOE_DTYPE_F32;
    where.backend = MOE_BACKEND_CUDA;
    where.cuda_context = context;

    if (moe_context_create(&where, &ctx, &err) || moe_weights_create(ctx, &layer, NULL, &weights, &err)) goto failed;
    for (int32_t e = 0; e < 2; e++)
        if (set(weights, MOE_TENSOR_GATE, e, one, &err) || set(weights, MOE_TENSOR_UP, e, one, &err) ||
            set(weights, MOE_TENSOR_DOWN, e, e == 0 ? two : minus_one, &err)) goto failed;
    if (moe_weights_seal(weights, &err) || moe_plan_create(ctx, &layer, &desc, &plan, &err) ||
        moe_plan_get_info(plan, &info, &err)) goto failed;

    args.input_mode = MOE_INPUT_LOGITS;
    args.num_tokens = MOST;
    args.num_tokens_dev = (const int32_t *)device_memory(sizeof count, &count);
    args.x = device_memory(sizeof x, x);
    args.logits = device_memory(sizeof logits, logits);
    args.out = device_memory(sizeof out, x);
    args.workspace = device_memory((size_t)info.workspace_bytes, NULL);
    args.workspace_bytes = info.workspace_bytes;
    if (moe_execute_check(plan, weights, &args, &err)) goto failed;
    if (cuStreamBeginCapture_v2(stream, 0) || moe_execute(plan, weights, &args, stream) ||
        cuStreamEndCapture(stream, &graph) || cuGraphInstantiateWithFlags(&replay, graph, 0)) {
        fprintf(stderr, "the layer was not captured\n");
        return 1;
    }
    for (count = 1; count <= MOST; count += 3) { // 1 token, then 4
        for (int t = 0; t < count; t++) {
            x[t][0] = one;
            x[t][1] = three;
            logits[t][t % 2] = 1.0986123f; // log 3: weights 3/4 and 1/4
        }
        cuMemcpyHtoD_v2((uint64_t)(uintptr_t)args.x, x, sizeof x);
        cuMemcpyHtoD_v2((uint64_t)(uintptr_t)args.logits, logits, sizeof logits);
        cuMemcpyHtoD_v2((uint64_t)(uintptr_t)args.num_tokens_dev, &count, sizeof count);
        cuGraphLaunch(replay, stream);
        cuStreamSynchronize(stream);
        cuMemcpyDtoH_v2(out, (uint64_t)(uintptr_t)args.out, sizeof out);
        for (int t = 0; t < MOST; t++) printf("%d of %d: %.4f %.4f\n", t, count, out[t][0], out[t][1]);
    }
    cuGraphExecDestroy(replay); // before the plan whose kernels it launches
    cuGraphDestroy(graph);
    moe_plan_destroy(plan);
    moe_weights_destroy(weights);
    moe_context_destroy(ctx);
    end_engine(device, stream);
    return 0;
failed:
    fprintf(stderr, "%s\n", err.text);
    return 1;
}
