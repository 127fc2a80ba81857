// Linked to the shared library: a caller must say which version of a struct it has.
#define MOE_DLL
#include "../../moe.h"
#include <stdio.h>
#include <string.h>

int main(void)
{
    moe_error err;
    moe_context *ctx;
    moe_context_desc desc;
    memset(&desc, 0, sizeof desc);
    if (moe_context_create(&desc, &ctx, &err) != MOE_ERROR_ARGUMENT || strstr(err.member, "struct_size") == NULL) {
        printf("struct_size 0 was not refused: %s\n", err.text);
        return 1;
    }
    desc.struct_size = (uint32_t)sizeof desc;
    if (moe_context_create(&desc, &ctx, &err)) {
        printf("%s\n", err.text);
        return 1;
    }
    moe_context_destroy(ctx);
    return 0;
}
