// prewarm.c - fills a cache folder with the kernels of a model's MoE layer, for chips that need not be here; no GPU
//
//     cc -O2 examples/prewarm.c -o prewarm -lpthread && ./prewarm /var/cache/moe config.json sm_90a sm_100f
//
// With a glibc before 2.34 also -ldl. Without a config: common routing shapes; without chips: sm_90a.
//
// An engine that is started with MOE_CACHE_DIR=/var/cache/moe (or has the folder in an image, as jit.seed_dir) then
// makes its plans in milliseconds and needs no NVRTC.
#define MOE_IMPLEMENTATION
#include "../moe.h"

#include <stdio.h>

enum { MAX_LAYERS = 8 };

static void show(void *user, const moe_jit_progress *p)
{
    *(uint64_t *)user += p->bytes;
    printf("%3d/%d  %-32s %-8s %7llu bytes%s\n", (int)p->done, (int)p->total, p->name, p->chip,
           (unsigned long long)p->bytes, p->cached ? "  there already" : "");
    fflush(stdout);
}

static void complain(void *user, int32_t level, const char *text)
{
    (void)user;
    if (level <= MOE_LOG_WARNING) fprintf(stderr, "%s\n", text);
}

// Kernels depend on the number of experts and on types, hardly on sizes.
static int common_shapes(moe_layer_desc *layers, moe_error *err)
{
    static const int experts[] = { 8, 64, 128, 256, 384, 512 };
    int count = (int)(sizeof experts / sizeof experts[0]);
    for (int i = 0; i < count; i++) {
        memset(&layers[i], 0, sizeof layers[i]);
        layers[i].num_experts = experts[i];
        layers[i].hidden_size = 2048;
        layers[i].intermediate_size = 768;
        layers[i].format = MOE_FORMAT_BF16;
        layers[i].activation.kind = MOE_ACTIVATION_SWIGLU;
        if (moe_routing_preset(MOE_ROUTING_RENORMALIZE, &layers[i].routing, err) != MOE_OK) return 0;
        layers[i].routing.top_k = experts[i] < 64 ? 2 : 8;
    }
    return count;
}

// The layer of a config.json in the middle of the model: the first ones may be dense.
static int config_shape(const char *path, moe_layer_desc *layer, moe_error *err)
{
    static char text[1 << 20];
    FILE *file = fopen(path, "rb");
    size_t length = file != NULL ? fread(text, 1, sizeof text, file) : 0;
    if (file == NULL) {
        fprintf(stderr, "%s: cannot be opened\n", path);
        exit(1);
    }
    fclose(file);
    for (int index = 0; index < 64; index++)
        if (moe_layer_from_config(text, length, NULL, 0, index, layer, err) == MOE_OK) return 1;
    return 0;
}

int main(int argc, char **argv)
{
    static const char *const hopper[] = { "sm_90a" };
    moe_layer_desc layers[MAX_LAYERS];
    moe_precompile_desc job;
    moe_error err;
    uint64_t bytes = 0;
    int config = argc > 2 && strstr(argv[2], ".json") != NULL, first = 2 + config;
    if (argc < 2) {
        fprintf(stderr, "usage: %s FOLDER [CONFIG.json] [CHIP...]\n", argv[0]);
        return 2;
    }
    memset(&job, 0, sizeof job);
    memset(&err, 0, sizeof err);
    job.layers = layers;
    job.num_layers = config ? config_shape(argv[2], layers, &err) : common_shapes(layers, &err);
    job.chips = argc > first ? (const char *const *)(argv + first) : hopper;
    job.num_chips = argc > first ? argc - first : 1;
    job.jit.cache_dir = argv[1];
    job.jit.cache_mode = MOE_CACHE_READ_WRITE;
    job.log = complain;
    job.progress = show;
    job.progress_user = &bytes;
    if (job.num_layers == 0 || moe_jit_precompile(&job, &err) != MOE_OK) {
        fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    printf("%llu bytes in %s\n", (unsigned long long)bytes, argv[1]);
    return 0;
}
