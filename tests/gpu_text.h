// gpu_text.h - kernels of a test's own behind the kernel text
//
// Included behind gpu.h. gpu_text_open() makes a context whose text is moe_kernels.cu.inc with a file of tests/ behind
// it (own_text.h); gpu_text_load() compiles and loads one of its entries.
#ifndef GPU_TEXT_H
#define GPU_TEXT_H

#include "own_text.h"

// NULL: there is no device, or a check has failed.
TEST_UNUSED static moe_context *gpu_text_open(const char *path)
{
    moe_context_desc desc;
    moe_context *ctx = NULL;
    moe_error err;
    memset(&desc, 0, sizeof desc);
    desc.log = gpu_message;
    desc.backend = MOE_BACKEND_CUDA;
    desc.jit.cache_mode = MOE_CACHE_OFF;
    if (moe_context_create(&desc, &ctx, &err) != MOE_OK || own_text_join(ctx, path, &err) != MOE_OK) {
        test_fail(__FILE__, __LINE__, err.text);
        moe_context_destroy(ctx);
        return NULL;
    }
    return ctx;
}

TEST_UNUSED static moe__cu_function gpu_text_load(moe_context *ctx, const char *entry, int args_bytes, int threads,
                                                  int smem_bytes)
{
    moe__instance instance;
    moe__cu_function function = NULL;
    moe_error err;
    memset(&instance, 0, sizeof instance);
    instance.entry = entry;
    snprintf(instance.name, sizeof instance.name, "%s", entry);
    instance.args_bytes = args_bytes;
    instance.threads = threads;
    instance.smem_bytes = smem_bytes;
    if (moe__jit_load(ctx, &instance, 1, &function, &err) != MOE_OK) test_fail(__FILE__, __LINE__, err.text);
    return function;
}

// On the legacy stream; cluster 0 or 1: none; pdl: may start before the launch ahead of it ends.
TEST_UNUSED static int gpu_text_launch_grid(moe__cu_function function, int ctas, int ctas_y, int threads, int cluster,
                                            int pdl, int smem_bytes, void *args)
{
    moe__cu_launch_config config;
    moe__cu_launch_attribute attributes[2];
    void *params[1];
    int result;
    params[0] = args;
    memset(&config, 0, sizeof config);
    memset(attributes, 0, sizeof attributes);
    config.gridDimX = (unsigned)ctas;
    config.gridDimY = (unsigned)ctas_y;
    config.blockDimX = (unsigned)threads;
    config.gridDimZ = config.blockDimY = config.blockDimZ = 1;
    config.sharedMemBytes = (unsigned)smem_bytes;
    config.attrs = attributes;
    if (cluster > 1) {
        attributes[config.numAttrs].id = MOE__CU_ATTRIBUTE_CLUSTER;
        attributes[config.numAttrs].value.cluster.x = (unsigned)cluster;
        attributes[config.numAttrs].value.cluster.y = attributes[config.numAttrs].value.cluster.z = 1;
        config.numAttrs++;
    }
    if (pdl) {
        attributes[config.numAttrs].id = MOE__CU_ATTRIBUTE_PDL;
        attributes[config.numAttrs++].value.programmatic = 1;
    }
    gpu_enter();
    result = gpu.cuda->cuLaunchKernelEx(&config, function, params, NULL);
    gpu_leave();
    return result;
}

TEST_UNUSED static int gpu_text_launch(moe__cu_function function, int ctas, int threads, int cluster, int pdl,
                                       int smem_bytes, void *args)
{
    return gpu_text_launch_grid(function, ctas, 1, threads, cluster, pdl, smem_bytes, args);
}

#endif
