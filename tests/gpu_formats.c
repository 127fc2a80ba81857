// gpu_formats.c - layers of codes on the device against moe_reference_layer()
//
// Values are multiples of powers of two that the codes have, and every scale is a power of two, so that the sums of
// GEMM 1 are exact, and the intermediate's codes are the reference's. GEMM 2 then differs by the order of its sums and
// by a rounding of each product, where the intermediate has scales that are not powers of two: gpu_layer.c's bound.
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "gpu.h"
#include "gpu_text.h"

#include <math.h>
#include "gpu_layer.h"

typedef struct variant {
    int format, block, scale_dtype;
    int exact; // sums of both products
} variant;

static const variant variants[] = {
    { MOE_FORMAT_FP8_PER_TENSOR, 0, 0, 0 },
    { MOE_FORMAT_FP8_PER_CHANNEL, 0, 0, 0 },
    { MOE_FORMAT_FP8_BLOCK, 128, 0, 0 },
    { MOE_FORMAT_FP8_BLOCK, 64, MOE_DTYPE_BF16, 0 },
    { MOE_FORMAT_FP8_BLOCK, 32, MOE_DTYPE_UE8M0, 0 },
    { MOE_FORMAT_MXFP8, 0, 0, 0 },
    { MOE_FORMAT_NVFP4, 0, 0, 0 },
    { MOE_FORMAT_NVFP4_W4A16, 0, 0, 1 },
    { MOE_FORMAT_MXFP4_W4A16, 0, 0, 1 },
    { MOE_FORMAT_MXFP4_W4A8, 0, 0, 0 },
    { MOE_FORMAT_INT4_W4A16, 32, 0, 1 },
    { MOE_FORMAT_INT4_W4A16, 64, MOE_DTYPE_F16, 1 },
    { MOE_FORMAT_INT4_W4A16, 128, MOE_DTYPE_F32, 1 },
};
enum { VARIANTS = sizeof variants / sizeof variants[0] };

static moe_layer_desc layer_of(const variant *v, int kind)
{
    moe_layer_desc l;
    memset(&l, 0, sizeof l);
    l.hidden_size = v->block > 64 ? 256 : 192;
    l.intermediate_size = v->block > 64 ? 128 : 64;
    l.num_experts = 5;
    l.format = v->format;
    l.format_block = v->block;
    l.scale_dtype = v->scale_dtype;
    l.activation.kind = kind;
    l.routing = preset(MOE_ROUTING_RENORMALIZE, 2);
    return l;
}

static const char *name_of(const variant *v)
{
    static char text[64];
    snprintf(text, sizeof text, "%s %d %s", moe_format_string(v->format), v->block, moe_dtype_string(v->scale_dtype));
    return text;
}

TEST(every_format_is_within_the_bound_of_the_reference)
{
    static const int tokens[] = { 1, 19, 70 };
    if (!gpu_open()) return;
    for (int v = 0; v < VARIANTS; v++) {
        moe_layer_desc l = layer_of(&variants[v], MOE_ACTIVATION_RELU);
        pair p;
        memset(&p, 0, sizeof p);
        p.desc.x_dtype = MOE_DTYPE_BF16;
        if (!open_layer(&p, &l, 70)) continue;
        for (int i = 0; i < 3; i++) {
            layer_call c = logits_of(tokens[i]);
            check_layer(&p, &c, variants[v].exact, name_of(&variants[v]));
        }
        pair_close(&p);
    }
}

TEST_MAIN(T(every_format_is_within_the_bound_of_the_reference))
