// The other one; see static_a.c.
#define MOE_STATIC
#define MOE_NO_THREADS
#define MOE_NO_CONFIG
#define MOE_NO_CPU_SIMD
#define MOE_IMPLEMENTATION
#include "../../moe.h"

int static_b(void);

int static_b(void)
{
    moe_error err;
    moe_context *ctx;
    if (moe_context_create(NULL, &ctx, &err)) return 3;
    moe_context_destroy(ctx);
    return 0;
}
