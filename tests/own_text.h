// own_text.h - a file of device code behind the kernel text of a context, for tests and benches
//
// Included behind moe.h. The context must have no cache: its keys stand for the text without what is added here. Then
// entry "x" of the file compiles with -DMOE_K_X, which only an #if in the file asks for.
#ifndef OWN_TEXT_H
#define OWN_TEXT_H

#include <stdio.h>

// MOE_ERROR_FILE: the file cannot be read, or is longer than 256 KB.
static int32_t own_text_join(moe_context *ctx, const char *path, moe_error *err)
{
    static char text[1 << 18];
    const moe_allocator *allocator = &ctx->desc.allocator;
    FILE *file = fopen(path, "rb");
    size_t length = 0;
    char *joined;
    int32_t result;
    if (file != NULL) {
        length = fread(text, 1, sizeof text, file);
        fclose(file);
    }
    if (file == NULL || length == sizeof text)
        return moe__fail(err, MOE_ERROR_FILE, "", "%q cannot be read, or is too long", path);
    text[length] = 0;
    if ((result = moe__source_join(ctx, err)) != MOE_OK) return result;
    joined = (char *)moe__alloc(allocator, ctx->jit->source_bytes + length);
    strcpy(joined, ctx->jit->source);
    strcat(joined, text);
    moe__free(allocator, ctx->jit->source, ctx->jit->source_bytes);
    ctx->jit->source = joined;
    ctx->jit->source_bytes += length;
    return MOE_OK;
}

#endif
