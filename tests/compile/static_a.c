// One of two files of a program that each have a private copy, under different options.
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../../moe.h"

int static_b(void);

int main(void)
{
    moe_error err;
    moe_context *ctx;
    if (moe_context_create(NULL, &ctx, &err)) return 1;
    moe_context_destroy(ctx);
    return moe_version() == MOE_VERSION ? static_b() : 2;
}
