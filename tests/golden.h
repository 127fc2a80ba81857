// golden.h - tests/golden: checkpoints of each family, and what transformers' own modules make of them
//
// Included behind moe.h and test.h. golden_open(), golden_layer() for each layer, golden_close().
#ifndef GOLDEN_H
#define GOLDEN_H

#include <math.h>

enum { GOLDEN_LAYERS = 8 };

static const char *const golden_names[] = {
    "aria", "cohere2_moe", "cohere2_moe_average", "cohere2_moe_sum_softmax", "dbrx", "deepseek_v2",
    "deepseek_v3", "deepseek_v4", "dots1", "ernie4_5_moe", "flex_olmo", "gemma4", "glm4_moe", "gpt_oss",
    "granitemoe", "granitemoeshared", "hunyuan_v1_moe", "inkling", "jamba", "kolibri1", "lfm2_moe", "llama4",
    "longcat_flash", "minimax_m2", "minimax_m3", "mistral4", "mixtral", "muse_spark", "nemotron_h",
    "nemotron_h_latent", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next",
    "qwen3_vl_moe", "qwen3_vl_moe_resaved", "step3p7",
};

enum { GOLDENS = (int)(sizeof golden_names / sizeof golden_names[0]) };

// Tokens whose k-th and next experts tie in the stored logits are listed: "tied_tokens.1": "[3, 9]".
static int is_tied(const char *file, int layer, int token)
{
    char header[8192], key[64];
    const char *at;
    FILE *f = fopen(file, "rb");
    size_t n = f != NULL ? fread(header, 1, sizeof header - 1, f) : 0;
    if (f != NULL) fclose(f);
    for (size_t i = 0; i < n; i++)
        if (header[i] == 0) header[i] = ' ';
    header[n] = 0;
    snprintf(key, sizeof key, "\"tied_tokens.%d\"", layer);
    at = strstr(header, key);
    at = at != NULL ? strchr(at, '[') : NULL;
    while (at != NULL && *at != ']') {
        if (*at >= '0' && *at <= '9') {
            if (atoi(at) == token) return 1;
            while (*at >= '0' && *at <= '9') at++;
        } else {
            at++;
        }
    }
    return 0;
}

typedef struct golden {
    const char *name, *file;
    moe_checkpoint *data;
    int layer, tokens, hidden, top_k, slots;
    char where[128];
} golden;

// A tensor of the layer, aligned; NULL when there is none. Its first dimension is the tokens.
static void *golden_tensor(const golden *g, const char *what, int *columns)
{
    moe_checkpoint_tensor t;
    char name[64];
    void *copy;
    snprintf(name, sizeof name, "layers.%d.%s", g->layer, what);
    if (moe_checkpoint_find(g->data, name, &t, NULL) != MOE_OK) return NULL;
    copy = malloc((size_t)t.data_bytes + 1);
    memcpy(copy, t.data, (size_t)t.data_bytes);
    if (columns != NULL) *columns = t.rank > 1 ? (int)t.dims[1] : 1;
    return copy;
}

static void golden_fail(const golden *g, int line, const char *what) { test_fail2(__FILE__, line, g->where, what); }

// The folder, its data, and the numbers of its MoE layers; how many those are, 0: a failure was reported.
static int golden_open(golden *g, const char *name, moe_checkpoint **ckpt, int32_t *layers)
{
    static char file[1024];
    char path[160];
    moe_error err;
    int32_t count = 0;
    memset(g, 0, sizeof *g);
    memset(&err, 0, sizeof err);
    *ckpt = NULL;
    snprintf(path, sizeof path, "golden/%s/golden.safetensors", name);
    snprintf(file, sizeof file, "%s", test_data(path));
    g->file = file;
    g->name = name;
    snprintf(g->where, sizeof g->where, "%s", name);
    snprintf(path, sizeof path, "golden/%s", name);
    if (moe_checkpoint_open(test_data(path), NULL, ckpt, &err) ||
        moe_checkpoint_open(g->file, NULL, &g->data, &err) ||
        moe_checkpoint_layers(*ckpt, layers, GOLDEN_LAYERS, &count, &err))
        golden_fail(g, __LINE__, err.text);
    else if (count == 0) golden_fail(g, __LINE__, "no MoE layer was found");
    return count < GOLDEN_LAYERS ? count : GOLDEN_LAYERS;
}

// Makes `layer` the current one: its sizes, and what they make of a plan.
static void golden_layer(golden *g, int layer, moe_plan_desc *desc)
{
    moe_checkpoint_tensor t;
    char name[64];
    memset(desc, 0, sizeof *desc);
    g->layer = layer;
    snprintf(g->where, sizeof g->where, "%s layer %d", g->name, layer);
    snprintf(name, sizeof name, "layers.%d.x", layer);
    if (moe_checkpoint_find(g->data, name, &t, NULL) != MOE_OK) {
        golden_fail(g, __LINE__, "no x");
        return;
    }
    g->tokens = (int)t.dims[0];
    g->hidden = (int)t.dims[1];
    desc->max_tokens = g->tokens;
    desc->x_dtype = desc->out_dtype = desc->intermediate_dtype = MOE_DTYPE_F32;
    snprintf(name, sizeof name, "layers.%d.token_ids", layer);
    if (moe_checkpoint_find(g->data, name, &t, NULL) == MOE_OK) desc->ids_dtype = t.dtype;
}

// Rows within `tolerance` of the row's largest value.
static void golden_compare(const golden *g, const float *got, const float *expected, int columns, double tolerance,
                           int with_ties, const char *what)
{
    char text[200];
    for (int t = 0; t < g->tokens; t++) {
        double largest = 0, worst = 0;
        if (!with_ties && is_tied(g->file, g->layer, t)) continue;
        for (int i = 0; i < columns; i++) {
            double value = expected[t * columns + i], difference = fabs(value - got[t * columns + i]);
            if (fabs(value) > largest) largest = fabs(value);
            if (!(difference <= worst)) worst = difference; // NaN too
        }
        if (!(worst <= tolerance * largest)) {
            snprintf(text, sizeof text, "%s of token %d differ by %.3g, the largest is %.3g", what, t, worst, largest);
            golden_fail(g, __LINE__, text);
            return;
        }
    }
}

static void golden_compare_routing(const golden *g, const int32_t *ids, const float *weights, const int32_t *their_ids,
                                   const float *their_weights)
{
    for (int t = 0; t < g->tokens; t++) {
        if (is_tied(g->file, g->layer, t)) continue;
        for (int j = 0; j < g->top_k; j++) {
            int found = -1;
            for (int i = 0; i < g->top_k; i++)
                if (ids[t * g->slots + i] == their_ids[t * g->top_k + j]) found = i;
            if (found < 0 || !test_near(weights[t * g->slots + found], their_weights[t * g->top_k + j],
                                        1e-5 * (fabs(their_weights[t * g->top_k + j]) + 1e-3))) {
                char text[160];
                snprintf(text, sizeof text, "token %d: expert %d with weight %.7g, ours %.7g (-1: not chosen)", t,
                         their_ids[t * g->top_k + j], their_weights[t * g->top_k + j],
                         found < 0 ? -1.0 : weights[t * g->slots + found]);
                golden_fail(g, __LINE__, text);
                return;
            }
        }
    }
}

// Stored ids and weights in slot order, the always-on experts' behind them.
TEST_UNUSED static void golden_slots(const golden *g, const moe_layer_desc *layer, const int32_t *ids,
                                     const float *weights, int32_t *all_ids, float *all_weights)
{
    float *extra = (float *)golden_tensor(g, "shared_weights", NULL);
    int x = g->slots - g->top_k;
    for (int t = 0; t < g->tokens; t++)
        for (int j = 0; j < g->slots; j++) {
            int at = t * g->slots + j, e = j - g->top_k;
            all_ids[at] = e < 0 ? ids[t * g->top_k + j] : layer->num_experts + layer->routing.special_experts + e;
            all_weights[at] = e < 0           ? weights[t * g->top_k + j]
                              : extra != NULL ? extra[t * x + e]
                                              : layer->routing.extra_weight;
        }
    free(extra);
}

static void golden_close(golden *g, moe_checkpoint *ckpt)
{
    moe_checkpoint_close(g->data);
    moe_checkpoint_close(ckpt);
}

#endif // GOLDEN_H
