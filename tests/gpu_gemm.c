// gpu_gemm.c - both products and finalize of the mma family (moe_kernels.cu.inc, >>gemm and >>finalize) against plain
// C: weights packed and tables made here, numbers on a grid so that every sum is exact and bits can be compared
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "gpu.h"
#include "gpu_text.h"

enum { F32 = MOE_DTYPE_F32, BF16 = MOE_DTYPE_BF16, F16 = MOE_DTYPE_F16 };
enum { EXPERTS_MAX = 20, BLOCK = 16384, CTAS = 3 };

// ---- kernels --------------------------------------------------------------------------------------------------------

typedef struct program {
    const char *entry;
    char defines[96];
    moe__cu_function function;
} program;

static program programs[160];

// Loaded once for the test program; NULL: a check has failed.
static moe__cu_function load(const char *entry, const char *defines, int args_bytes, int threads, int smem_bytes)
{
    program *p = programs;
    moe__instance instance;
    moe_error e;
    while (p->function != NULL && (strcmp(p->entry, entry) != 0 || strcmp(p->defines, defines) != 0)) p++;
    if (p->function != NULL) return p->function;
    memset(&instance, 0, sizeof instance);
    instance.entry = p->entry = entry;
    snprintf(p->defines, sizeof p->defines, "%s", defines);
    snprintf(instance.name, sizeof instance.name, "%s", entry);
    snprintf(instance.defines, sizeof instance.defines, "%s", defines);
    instance.args_bytes = args_bytes;
    instance.threads = threads;
    instance.smem_bytes = smem_bytes;
    if (moe__jit_load(gpu.ctx, &instance, 1, &p->function, &e) != MOE_OK) {
        p->function = NULL;
        test_fail(__FILE__, __LINE__, e.text);
    }
    return p->function;
}

static int gemm_smem(int tile)
{
    int stages = tile == 128 ? 3 : 4;
    return stages * (BLOCK + tile * 128 + 16);
}

// ---- a problem ------------------------------------------------------------------------------------------------------

typedef struct problem {
    int tile, dtype, x_dtype, rows_dtype, gated, swiglu, hidden, features; // swiglu: GEMM 1 has no other activation
    int tokens, slots, experts;
    int counts[EXPERTS_MAX]; // rows of an expert
    int identity;            // one expert for all tokens, no tables
    int held;                // tokens that num_tokens_dev says; 0: it is NULL
    int bias, weighted, per_expert, rough, rough_weights, x_pad, x_shift;
    moe_activation_desc act;
    uint64_t seed;
    // made
    float *gate[EXPERTS_MAX], *up[EXPERTS_MAX], *down[EXPERTS_MAX], *bias1[EXPERTS_MAX], *bias2[EXPERTS_MAX];
    float *x, *weights, alpha[EXPERTS_MAX], beta[EXPERTS_MAX], limit[EXPERTS_MAX];
    int32_t *slot_of_row, *expert_of_row, *tile_expert, *tile_limit, tiles, rows_max;
    uint64_t w1, b1, w2, b2, expert_bytes;
} problem;

static int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A multiple of 1/8 up to 1/2 or, rough, a float with all its bits in 1/2 .. 1.
static float draw(uint64_t *seed, int rough)
{
    uint32_t n = test_random_u32(seed);
    float v = (float)((int)(n % 9) - 4) / 8;
    if (!rough) return v;
    v = 0.5f + (float)(n >> 9) / 16777216.0f;
    return (n & 1) != 0 ? -v : v;
}

static float *draw_many(uint64_t *seed, size_t n, int rough)
{
    float *v = (float *)malloc(n * sizeof *v);
    for (size_t i = 0; i < n; i++) v[i] = draw(seed, rough);
    return v;
}

// Slots in a random order to experts, as many as counts says; the last ones go nowhere.
static void make_tables(problem *p)
{
    int total = p->tokens * p->slots, at = 0, next = 0, live = p->held > 0 ? p->held : p->tokens;
    int32_t *slot = (int32_t *)malloc((size_t)total * 4 + 4);
    for (int e = 0; e < p->experts; e++) at += ceil_div(p->counts[e], p->tile) * p->tile;
    p->rows_max = p->identity ? ceil_div(p->tokens, p->tile) * p->tile : at + p->tile;
    p->slot_of_row = (int32_t *)malloc((size_t)p->rows_max * 4);
    p->expert_of_row = (int32_t *)malloc((size_t)p->rows_max * 4);
    p->tile_expert = (int32_t *)malloc((size_t)p->rows_max * 4);
    p->tile_limit = (int32_t *)malloc((size_t)p->rows_max * 4);
    for (int r = 0; r < p->rows_max; r++) {
        p->expert_of_row[r] = p->identity && r < live ? 0 : -1;
        p->slot_of_row[r] = p->identity && r < live ? r : -1;
    }
    for (int i = 0; i < total; i++) slot[i] = i;
    for (int i = total - 1; i > 0; i--) {
        int other = (int)(test_random_u32(&p->seed) % (uint32_t)(i + 1)), held = slot[i];
        slot[i] = slot[other];
        slot[other] = held;
    }
    at = 0;
    for (int e = 0; e < p->experts && !p->identity; e++) {
        for (int i = 0; i < p->counts[e]; i++) {
            if (i % p->tile == 0) {
                p->tile_expert[p->tiles] = e;
                p->tile_limit[p->tiles++] = at + (p->counts[e] - i < p->tile ? p->counts[e] : i + p->tile);
            }
            p->slot_of_row[at + i] = slot[next++];
            p->expert_of_row[at + i] = e;
        }
        at += ceil_div(p->counts[e], p->tile) * p->tile;
    }
    if (next > total) test_fail(__FILE__, __LINE__, "the test has more rows than slots");
    free(slot);
}

static float *draw_weights(problem *p, size_t n)
{
    float *v = draw_many(&p->seed, n, p->rough_weights);
    for (size_t i = 0; i < n; i++) v[i] = moe__round_to(v[i], p->dtype);
    return v;
}

static void problem_make(problem *p)
{
    size_t h = (size_t)p->hidden, f = (size_t)p->features;
    if (p->slots == 0) p->slots = 1;
    if (p->experts == 0) p->experts = 1;
    if (p->dtype == 0) p->dtype = BF16;
    if (p->x_dtype == 0) p->x_dtype = p->dtype;
    if (p->rows_dtype == 0) p->rows_dtype = F32;
    if (p->act.kind == 0) p->act.kind = p->gated ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_RELU2;
    if (p->act.kind == MOE_ACTIVATION_SWIGLU && p->act.alpha == 0) p->act.alpha = 1;
    p->seed = p->seed * 77 + (uint64_t)(p->hidden * 1000 + p->features * 10 + p->dtype);
    for (int e = 0; e < p->experts; e++) {
        p->gate[e] = draw_weights(p, f * h);
        p->up[e] = draw_weights(p, f * h);
        p->down[e] = draw_weights(p, f * h);
        p->bias1[e] = draw_many(&p->seed, 2 * f, 0);
        p->bias2[e] = draw_many(&p->seed, h, 0);
        p->alpha[e] = 1 + (float)e / 8;
        p->beta[e] = (float)(e % 3) / 2;
        p->limit[e] = (float)(e % 2) * 1.5f;
    }
    p->x = draw_many(&p->seed, (size_t)p->tokens * h, p->rough);
    p->weights = draw_many(&p->seed, (size_t)(p->tokens * p->slots), p->rough);
    make_tables(p);
}

static void problem_free(problem *p)
{
    for (int e = 0; e < p->experts; e++) {
        free(p->gate[e]);
        free(p->up[e]);
        free(p->down[e]);
        free(p->bias1[e]);
        free(p->bias2[e]);
    }
    free(p->x);
    free(p->weights);
    free(p->slot_of_row);
    free(p->expert_of_row);
    free(p->tile_expert);
    free(p->tile_limit);
}

// Which row of the matrix, or of gate (first half) and up (second), is packed row p.
static int natural_row(int p, int gated, int features)
{
    int n = p / 32, q = p % 32 / 8, i = p % 8, f = gated ? 16 * n + 2 * i + q % 2 : 32 * n + 4 * i + q;
    if (f >= features) return -1;
    return gated && q >= 2 ? features + f : f;
}

// Rows of `second` follow those of `first` (both [rows][k]); second NULL: not gated.
static size_t pack(unsigned char *to, int dtype, const float *first, const float *second, int rows, int k)
{
    int packed = second != NULL ? ceil_div(rows, 16) * 32 : ceil_div(rows, 32) * 32;
    int slabs = ceil_div(packed, 128), blocks = ceil_div(k, 64);
    size_t bytes = (size_t)(slabs * blocks) * BLOCK;
    if (to == NULL) return bytes;
    memset(to, 0, bytes);
    for (int r = 0; r < slabs * 128; r++) {
        int row = natural_row(r, second != NULL, rows);
        const float *from = row < 0 ? NULL : row < rows ? first + (size_t)row * (size_t)k
                                                        : second + (size_t)(row - rows) * (size_t)k;
        for (int i = 0; i < k && from != NULL; i++) {
            unsigned char *block = to + (size_t)(r / 128 * blocks + i / 64) * BLOCK;
            moe__store(block + r % 128 * 128 + ((i % 64 / 8) ^ (r % 8)) * 16, dtype, i % 8, from[i]);
        }
    }
    return bytes;
}

static uint64_t up_256(uint64_t n) { return (n + 255) / 256 * 256; }

// The experts on the device, in the order of the contract; returns their table.
static const uint64_t *put_experts(problem *p)
{
    uint64_t address[EXPERTS_MAX], rows1 = (uint64_t)(p->gated ? 2 * p->features : p->features);
    p->w1 = 256; // not where the expert begins
    p->b1 = p->w1 + up_256(pack(NULL, 0, NULL, p->gated ? p->up[0] : NULL, p->features, p->hidden));
    p->w2 = p->b1 + up_256(rows1 * 4);
    p->b2 = p->w2 + up_256(pack(NULL, 0, NULL, NULL, p->hidden, p->features));
    p->expert_bytes = p->b2 + (uint64_t)p->hidden * 4;
    for (int e = 0; e < p->experts; e++) {
        unsigned char *image = (unsigned char *)calloc((size_t)p->expert_bytes, 1);
        pack(image + p->w1, p->dtype, p->gate[e], p->gated ? p->up[e] : NULL, p->features, p->hidden);
        memcpy(image + p->b1, p->bias1[e], (size_t)rows1 * 4);
        pack(image + p->w2, p->dtype, p->down[e], NULL, p->hidden, p->features);
        memcpy(image + p->b2, p->bias2[e], (size_t)p->hidden * 4);
        address[e] = (uint64_t)(uintptr_t)gpu_copy(image, (size_t)p->expert_bytes);
        free(image);
    }
    return (const uint64_t *)gpu_copy(address, (size_t)p->experts * 8);
}

static moe__rows_args put_rows(const problem *p, const uint64_t *experts)
{
    moe__rows_args r;
    memset(&r, 0, sizeof r);
    r.experts = experts;
    r.slots = p->slots;
    r.tile = p->tile;
    r.rows_max = p->rows_max;
    r.num_tokens = p->tokens;
    if (p->held > 0) r.num_tokens_dev = (const int32_t *)gpu_copy(&p->held, 4);
    if (p->identity) return r;
    r.slot_of_row = (const int32_t *)gpu_copy(p->slot_of_row, (size_t)p->rows_max * 4);
    r.tile_expert = (const int32_t *)(p->tiles > 0 ? gpu_copy(p->tile_expert, (size_t)p->tiles * 4) : gpu_make_raw(4));
    r.tile_limit = (const int32_t *)(p->tiles > 0 ? gpu_copy(p->tile_limit, (size_t)p->tiles * 4) : gpu_make_raw(4));
    r.num_tiles = (const int32_t *)gpu_copy(&p->tiles, 4);
    return r;
}

// Rows of `width` floats as the device takes them: type, elements between rows, elements before the first.
static void *put_matrix(const float *from, int dtype, int rows, int width, int64_t stride, int shift)
{
    size_t element = dtype == F32 ? 4 : 2, bytes = ((size_t)shift + (size_t)rows * (size_t)stride) * element;
    unsigned char *image = (unsigned char *)malloc(bytes + 1);
    void *at;
    memset(image, 0xff, bytes); // NaN between rows
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < width; i++)
            moe__store(image, dtype, shift + r * stride + i, from[(size_t)r * (size_t)width + (size_t)i]);
    at = gpu_copy(image, bytes);
    free(image);
    return (unsigned char *)at + (size_t)shift * element;
}

// ---- what must come out ---------------------------------------------------------------------------------------------

static float dot(const float *a, const float *b, int n)
{
    float sum = 0;
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// x of a row as GEMM 1 takes it.
static void expected_x(const problem *p, int row, float *out)
{
    int slot = p->slot_of_row[row];
    for (int i = 0; i < p->hidden; i++) {
        float v = moe__round_to(p->x[(size_t)(slot / p->slots) * (size_t)p->hidden + (size_t)i], p->x_dtype);
        if (p->weighted) v = v * p->weights[slot];
        out[i] = moe__round_to(v, p->dtype);
    }
}

static void expected_mid(const problem *p, int row, float *out)
{
    int e = p->expert_of_row[row];
    moe_activation_desc act = p->act;
    float *x = (float *)malloc((size_t)p->hidden * sizeof *x);
    if (p->per_expert) { act.alpha = p->alpha[e]; act.beta = p->beta[e]; act.limit = p->limit[e]; }
    expected_x(p, row, x);
    for (int f = 0; f < p->features; f++) {
        float g = dot(p->gate[e] + (size_t)f * (size_t)p->hidden, x, p->hidden), u = 0;
        if (p->gated) u = dot(p->up[e] + (size_t)f * (size_t)p->hidden, x, p->hidden);
        if (p->bias) g += p->bias1[e][f];
        if (p->bias && p->gated) u += p->bias1[e][p->features + f];
        out[f] = moe__round_to(moe__activate(&act, g, u), p->dtype);
    }
    free(x);
}

static void expected_row(const problem *p, int row, const float *mid, float *out)
{
    int e = p->expert_of_row[row];
    for (int i = 0; i < p->hidden; i++) {
        out[i] = dot(p->down[e] + (size_t)i * (size_t)p->features, mid, p->features);
        if (p->bias) out[i] += p->bias2[e][i];
        out[i] = moe__round_to(out[i], p->rows_dtype);
    }
}

// ---- running --------------------------------------------------------------------------------------------------------

static size_t mid_bytes(const problem *p) { return (size_t)ceil_div(p->features, 64) * (size_t)p->rows_max * 128; }

// Byte offset of a feature of a row of the intermediate.
static size_t mid_at(const problem *p, int row, int f)
{
    return ((size_t)(f / 64) * (size_t)p->rows_max + (size_t)row) * 128 +
           (size_t)(((f % 64 / 8) ^ (row % 8)) * 16 + f % 8 * 2);
}

static int launch_gemm1(const problem *p, const moe__rows_args *rows, const void *x, void *mid, int pdl)
{
    char defines[96];
    moe__gemm1_args a;
    moe__cu_function function;
    int32_t map[EXPERTS_MAX];
    float alpha[EXPERTS_MAX], beta[EXPERTS_MAX], limit[EXPERTS_MAX];
    memset(&a, 0, sizeof a);
    a.rows = *rows;
    a.x = x;
    a.x_stride = p->hidden + p->x_pad;
    a.mid = mid;
    a.w1 = p->w1;
    a.bias1 = p->bias ? p->b1 : UINT64_MAX;
    a.hidden = p->hidden;
    a.features = p->features;
    a.weights_dtype = MOE_DTYPE_F32;
    a.num_experts = p->experts;
    a.activation.kind = p->act.kind;
    a.activation.alpha = p->act.alpha;
    a.activation.beta = p->act.beta;
    a.activation.limit = p->act.limit;
    if (p->weighted)
        a.weight_on_input = gpu_copy(p->weights, (size_t)(p->tokens * p->slots) * 4);
    if (p->per_expert) { // block b is expert experts - 1 - b
        for (int e = 0; e < p->experts; e++) {
            int global = p->experts - 1 - e;
            map[e] = global;
            alpha[global] = p->alpha[e];
            beta[global] = p->beta[e];
            limit[global] = p->limit[e];
        }
        a.global_of_block = (const int32_t *)gpu_copy(map, (size_t)p->experts * 4);
        a.alpha = (const float *)gpu_copy(alpha, (size_t)p->experts * 4);
        a.beta = (const float *)gpu_copy(beta, (size_t)p->experts * 4);
        a.limit = (const float *)gpu_copy(limit, (size_t)p->experts * 4);
    }
    snprintf(defines, sizeof defines, "-DMOE_P_TILE=%d -DMOE_P_DTYPE=%d -DMOE_P_X=%d -DMOE_P_GATED=%d%s", p->tile,
             p->dtype, p->x_dtype, p->gated, p->swiglu ? " -DMOE_P_ACTIVATION=1" : "");
    function = load("moe_k_gemm1", defines, sizeof a, 128, gemm_smem(p->tile));
    if (function == NULL) return -1;
    return gpu_text_launch(function, CTAS, 128, 0, pdl, gemm_smem(p->tile), &a);
}

static int launch_gemm2(const problem *p, const moe__rows_args *rows, const void *mid, void *out, int pdl)
{
    char defines[96];
    moe__gemm2_args a;
    moe__cu_function function;
    memset(&a, 0, sizeof a);
    a.rows = *rows;
    a.mid = mid;
    a.out = out;
    a.w2 = p->w2;
    a.bias2 = p->bias ? p->b2 : UINT64_MAX;
    a.hidden = p->hidden;
    a.features = p->features;
    snprintf(defines, sizeof defines, "-DMOE_P_TILE=%d -DMOE_P_DTYPE=%d -DMOE_P_ROWS=%d", p->tile, p->dtype,
             p->rows_dtype);
    function = load("moe_k_gemm2", defines, sizeof a, 128, gemm_smem(p->tile));
    if (function == NULL) return -1;
    return gpu_text_launch(function, CTAS, 128, 0, pdl, gemm_smem(p->tile), &a);
}

// The bits of an element, for comparing.
static uint32_t bits_of(const void *data, int dtype, size_t i)
{
    return dtype == F32 ? ((const uint32_t *)data)[i] : ((const uint16_t *)data)[i];
}

static uint32_t bits_as(float v, int dtype)
{
    unsigned char memory[4] = { 0, 0, 0, 0 };
    uint32_t word;
    uint16_t half;
    moe__store(memory, dtype, 0, v);
    memcpy(&word, memory, 4);
    memcpy(&half, memory, 2);
    return dtype == F32 ? word : half;
}

static void differ(const problem *p, const char *what, int row, int column, uint32_t got, uint32_t want)
{
    char text[240];
    snprintf(text, sizeof text, "%s, tile %d, dtype %d, H %d, I %d, activation %d: row %d, column %d is 0x%x, not 0x%x",
             what, p->tile, p->dtype, p->hidden, p->features, (int)p->act.kind, row, column, (unsigned)got,
             (unsigned)want);
    test_fail(__FILE__, __LINE__, text);
}

// The intermediate: values, zeros behind them, and nothing written elsewhere.
static void check_mid(const problem *p, const unsigned char *got)
{
    float *want = (float *)malloc((size_t)p->features * sizeof *want);
    for (int r = 0; r < p->rows_max; r++) {
        if (p->expert_of_row[r] >= 0) expected_mid(p, r, want);
        for (int f = 0; f < ceil_div(p->features, 64) * 64; f++) {
            uint16_t word;
            uint32_t expected = f >= p->features ? 0 : bits_as(want[f], p->dtype);
            if (p->expert_of_row[r] < 0) expected = GPU_POISON * 257;
            memcpy(&word, got + mid_at(p, r, f), 2);
            if (word != expected) {
                differ(p, "intermediate", r, f, word, expected);
                free(want);
                return;
            }
        }
    }
    free(want);
}

// The same for numbers whose sums are not exact: each of I additions rounds once, or the chip cuts it off, which is at
// most 2^-23 of the sum of magnitudes.
static void check_rough_rows(const problem *p, const unsigned char *mid, const float *got)
{
    for (int r = 0; r < p->rows_max; r++)
        for (int i = 0; i < p->hidden && p->expert_of_row[r] >= 0; i++) {
            double sum = 0, magnitude = 0;
            float v = got[(size_t)r * (size_t)p->hidden + (size_t)i];
            for (int f = 0; f < p->features; f++) {
                double product = (double)moe__load(mid + mid_at(p, r, f), p->dtype, 0) *
                                 (double)p->down[p->expert_of_row[r]][(size_t)i * (size_t)p->features + (size_t)f];
                sum += product;
                magnitude += product < 0 ? -product : product;
            }
            if (test_near((double)v, sum, magnitude * p->features / 8388608.0)) continue;
            differ(p, "rows", r, i, moe__f32_bits(v), moe__f32_bits((float)sum));
            return;
        }
}

// Products of the intermediate that lies in `mid`.
static void check_rows(const problem *p, const unsigned char *mid, const void *got)
{
    float *in = (float *)malloc((size_t)p->features * sizeof *in);
    float *want = (float *)malloc((size_t)p->hidden * sizeof *want);
    int failed = 0;
    for (int r = 0; r < p->rows_max && !failed; r++) {
        if (p->expert_of_row[r] >= 0) {
            for (int f = 0; f < p->features; f++) in[f] = moe__load(mid + mid_at(p, r, f), p->dtype, 0);
            expected_row(p, r, in, want);
        }
        for (int i = 0; i < p->hidden && !failed; i++) {
            uint32_t word = bits_of(got, p->rows_dtype, (size_t)r * (size_t)p->hidden + (size_t)i), expected;
            expected = p->expert_of_row[r] >= 0 ? bits_as(want[i], p->rows_dtype)
                                                : GPU_POISON * (p->rows_dtype == F32 ? 0x1010101u : 0x101u);
            failed = word != expected;
            if (failed) differ(p, "rows", r, i, word, expected);
        }
    }
    free(in);
    free(want);
}

static void run_gemm1(problem p)
{
    const uint64_t *experts;
    moe__rows_args rows;
    void *mid[2], *x;
    unsigned char *got[2];
    problem_make(&p);
    experts = put_experts(&p);
    rows = put_rows(&p, experts);
    x = put_matrix(p.x, p.x_dtype, p.tokens, p.hidden, p.hidden + p.x_pad, p.x_shift);
    for (int i = 0; i < 2; i++) {
        mid[i] = gpu_make(mid_bytes(&p));
        got[i] = (unsigned char *)malloc(mid_bytes(&p));
        GPU_CALL(launch_gemm1(&p, &rows, x, mid[i], 0));
    }
    for (int i = 0; i < 2; i++) gpu_get(got[i], mid[i], mid_bytes(&p));
    check_mid(&p, got[0]);
    CHECK(memcmp(got[0], got[1], mid_bytes(&p)) == 0);
    gpu_release();
    problem_free(&p);
    free(got[0]);
    free(got[1]);
}

static void run_gemm2(problem p)
{
    moe__rows_args rows;
    size_t bytes;
    void *in, *out[2];
    unsigned char *mid, *got[2];
    problem_make(&p);
    rows = put_rows(&p, put_experts(&p));
    bytes = (size_t)p.rows_max * (size_t)p.hidden * (p.rows_dtype == F32 ? 4 : 2);
    mid = (unsigned char *)malloc(mid_bytes(&p));
    memset(mid, 0xff, mid_bytes(&p)); // NaN where no row is
    for (int r = 0; r < p.rows_max; r++)
        for (int f = 0; f < ceil_div(p.features, 64) * 64 && p.expert_of_row[r] >= 0; f++)
            moe__store(mid + mid_at(&p, r, f), p.dtype, 0, f < p.features ? draw(&p.seed, p.rough) : 0);
    in = gpu_copy(mid, mid_bytes(&p));
    for (int i = 0; i < 2; i++) {
        out[i] = gpu_make(bytes);
        got[i] = (unsigned char *)malloc(bytes);
        GPU_CALL(launch_gemm2(&p, &rows, in, out[i], 0));
    }
    for (int i = 0; i < 2; i++) gpu_get(got[i], out[i], bytes);
    if (p.rough) check_rough_rows(&p, mid, (const float *)got[0]);
    else check_rows(&p, mid, got[0]);
    CHECK(memcmp(got[0], got[1], bytes) == 0);
    gpu_release();
    problem_free(&p);
    free(mid);
    free(got[0]);
    free(got[1]);
}

// ---- finalize -------------------------------------------------------------------------------------------------------

typedef struct sums {
    int rows_dtype, out_dtype, x_dtype, tokens, held, slots, hidden;
    int no_rows, no_weights, shared, gate, special_kind, norm, global_scale, accumulate, pad;
    uint64_t seed;
} sums;

enum { SUM_EXPERTS = 10, SUM_SPECIAL = 3 };

static float *some_floats(uint64_t *seed, size_t n, int dtype)
{
    float *v = (float *)malloc(n * sizeof *v + 4);
    for (size_t i = 0; i < n; i++) v[i] = moe__round_to(test_random_float(seed) * 2 - 1, dtype);
    return v;
}

// Column `i` of what a slot adds; 0: nothing.
static int sums_slot(const sums *s, const moe__finalize_args *a, int t, int j, float *row)
{
    int slot = t * s->slots + j, r = a->rows == NULL ? -1 : a->row_of_slot[slot], h = s->hidden;
    int special = a->ids == NULL ? -1 : a->ids[slot] - SUM_EXPERTS;
    const float *rows = (const float *)a->rows, *x = (const float *)a->x;
    float lane[16] = { 0 }, scale = 1;
    if (r < 0 && (special < 0 || special >= SUM_SPECIAL || s->special_kind == MOE_SPECIAL_ZERO)) return 0;
    for (int i = 0; i < h; i++)
        row[i] = r >= 0 ? rows[r * h + i]
                 : s->special_kind == MOE_SPECIAL_IDENTITY ? x[t * h + i] : a->constants[special * h + i];
    if (r < 0 || !s->norm) return 1;
    for (int i = 0; i < h; i++) row[i] = row[i] * (1.0f + a->row_norm[i]);
    for (int i = 0; i < h; i++) lane[i % 16] = moe__fmaf(row[i], row[i], lane[i % 16]);
    for (int half = 8; half > 0; half /= 2)
        for (int l = 0; l < half; l++) lane[l] += lane[l + half];
    scale = 1.0f / moe__sqrtf(lane[0] / (float)h + a->row_norm_epsilon);
    for (int i = 0; i < h; i++) row[i] = row[i] * scale;
    return 1;
}

// The sum of token t, from floats on the host, into `total`; out: what lies there.
static void sums_token(const sums *s, const moe__finalize_args *a, int t, const float *out, float *total)
{
    float *row = (float *)malloc((size_t)s->hidden * sizeof *row);
    float scale = a->scale * (a->global_scale != NULL ? *a->global_scale : 1);
    float factor = a->shared_scale;
    if (a->shared_gate != NULL)
        factor *= a->gate_is_logit ? moe__sigmoidf(a->shared_gate[t]) : a->shared_gate[t];
    for (int i = 0; i < s->hidden; i++) total[i] = 0;
    for (int j = 0; j < s->slots; j++) {
        float weight = a->weights == NULL ? 1 : ((const float *)a->weights)[t * s->slots + j];
        if (!sums_slot(s, a, t, j, row)) continue;
        for (int i = 0; i < s->hidden; i++) total[i] = moe__fmaf(weight, row[i], total[i]);
    }
    for (int i = 0; i < s->hidden; i++) {
        float v = total[i] * scale;
        if (s->shared) v = moe__fmaf(factor, ((const float *)a->shared_rows)[t * s->hidden + i], v);
        v = v * a->output_scale;
        if (s->accumulate) v = v + out[t * s->hidden + i];
        total[i] = v;
    }
    free(row);
}

static moe__cu_function load_finalize(int rows_dtype, int out_dtype, int x_dtype, int slots)
{
    char defines[96];
    snprintf(defines, sizeof defines, "-DMOE_P_ROWS=%d -DMOE_P_OUT=%d -DMOE_P_X=%d", rows_dtype, out_dtype, x_dtype);
    return load("moe_k_finalize", defines, sizeof(moe__finalize_args), 128, slots * 4 < 1024 ? 1024 : slots * 4);
}

static void run_sums(sums s)
{
    int rows_max = s.tokens * s.slots + 3, live = s.held > 0 ? s.held : s.tokens, stride = s.hidden + s.pad;
    size_t h = (size_t)s.hidden, slots = (size_t)(s.tokens * s.slots), words = (size_t)(s.tokens * stride);
    float *rows = some_floats(&s.seed, (size_t)rows_max * h, s.rows_dtype), *weights = some_floats(&s.seed, slots, F32);
    float *shared = some_floats(&s.seed, (size_t)s.tokens * h, s.rows_dtype), *gate = some_floats(&s.seed, slots, F32);
    float *x = some_floats(&s.seed, (size_t)s.tokens * h, s.x_dtype), *norm = some_floats(&s.seed, h, F32);
    float *constants = some_floats(&s.seed, SUM_SPECIAL * h, F32), *out = some_floats(&s.seed, words, s.out_dtype);
    float *total = (float *)malloc(h * sizeof *total), global = 1.25f;
    int32_t *row_of_slot = (int32_t *)malloc(slots * 4 + 4), *ids = (int32_t *)malloc(slots * 4 + 4);
    size_t element = s.out_dtype == F32 ? 4 : 2;
    unsigned char *got = (unsigned char *)malloc((size_t)rows_max * h * 4 + words * 4);
    moe__finalize_args host, a;
    moe__cu_function function = load_finalize(s.rows_dtype, s.out_dtype, s.x_dtype, s.slots);
    int failed = 0;
    for (size_t i = 0; i < slots; i++) {
        ids[i] = (int32_t)(test_random_u32(&s.seed) % (SUM_EXPERTS + SUM_SPECIAL + 3)) - 1;
        row_of_slot[i] = (int32_t)(i * 7 % (size_t)rows_max);
        if (ids[i] < 0 || ids[i] >= SUM_EXPERTS || ids[i] == 4) row_of_slot[i] = -1;
    }
    memset(&host, 0, sizeof host);
    host.num_tokens = s.tokens;
    host.slots = s.slots;
    host.hidden = s.hidden;
    host.num_experts = SUM_EXPERTS;
    host.special_experts = SUM_SPECIAL;
    host.special_kind = s.special_kind;
    host.accumulate = s.accumulate;
    host.gate_is_logit = s.gate == 2;
    host.scale = 1.5f;
    host.shared_scale = 0.75f;
    host.output_scale = 0.875f;
    host.row_norm_epsilon = 1e-5f;
    host.x_stride = s.hidden + 1;
    host.out_stride = stride;
    a = host;
    host.row_of_slot = row_of_slot;
    if (!s.no_rows) host.rows = rows;
    if (!s.no_weights) host.weights = weights;
    if (s.shared) host.shared_rows = shared;
    if (s.gate) host.shared_gate = gate;
    if (s.special_kind != 0) { host.ids = ids; host.x = x; host.constants = constants; }
    if (s.norm) host.row_norm = norm;
    if (s.global_scale) host.global_scale = &global;
    if (!s.no_rows) a.rows = put_matrix(rows, s.rows_dtype, rows_max, s.hidden, s.hidden, 0);
    if (!s.no_rows) a.row_of_slot = (const int32_t *)gpu_copy(row_of_slot, slots * 4);
    if (s.shared) a.shared_rows = put_matrix(shared, s.rows_dtype, s.tokens, s.hidden, s.hidden, 0);
    a.weights = (const float *)gpu_copy(host.weights, slots * 4);
    a.ids = (const int32_t *)gpu_copy(host.ids, slots * 4);
    if (s.special_kind != 0) a.x = put_matrix(x, s.x_dtype, s.tokens, s.hidden, s.hidden + 1, 0);
    a.constants = (const float *)gpu_copy(host.constants, SUM_SPECIAL * h * 4);
    a.shared_gate = (const float *)gpu_copy(host.shared_gate, (size_t)s.tokens * 4);
    a.global_scale = (const float *)gpu_copy(host.global_scale, 4);
    a.row_norm = (const float *)gpu_copy(host.row_norm, h * 4);
    if (s.held > 0) a.num_tokens_dev = (const int32_t *)gpu_copy(&s.held, 4);
    a.out = s.accumulate ? put_matrix(out, s.out_dtype, s.tokens, s.hidden, stride, 0) : gpu_make(words * element);
    if (function != NULL) GPU_CALL(gpu_text_launch(function, 5, 128, 0, 0, s.slots * 4, &a));
    gpu_get(got, a.out, words * element);
    for (int t = 0; t < s.tokens && !failed; t++) {
        sums_token(&s, &host, t, out, total);
        for (int i = 0; i < stride && !failed; i++) {
            uint32_t word = bits_of(got, s.out_dtype, (size_t)(t * stride + i)), want;
            want = i < s.hidden ? bits_as(total[i], s.out_dtype) : 0xffffffffu >> (s.out_dtype == F32 ? 0 : 16);
            if (!s.accumulate && (i >= s.hidden || t >= live))
                want = GPU_POISON * (s.out_dtype == F32 ? 0x1010101u : 0x101u);
            else if (t >= live && i < s.hidden)
                want = bits_as(out[t * s.hidden + i], s.out_dtype);
            failed = word != want;
            if (failed) {
                char text[160];
                snprintf(text, sizeof text, "H %d, T %d, slots %d, types %d %d: token %d, column %d is 0x%x, not 0x%x",
                         s.hidden, s.tokens, s.slots, s.rows_dtype, s.out_dtype, t, i, (unsigned)word, (unsigned)want);
                test_fail(__FILE__, __LINE__, text);
            }
        }
    }
    gpu_release();
    free(rows);
    free(weights);
    free(shared);
    free(gate);
    free(x);
    free(norm);
    free(constants);
    free(out);
    free(total);
    free(row_of_slot);
    free(ids);
    free(got);
}

// ---- both products and finalize -------------------------------------------------------------------------------------

// Launches all three, each allowed to start before the one ahead ends; rows and output into the caller's memory.
static void run_chain(problem *p, void *got_rows, size_t row_bytes, void *got_out, size_t out_bytes)
{
    moe__rows_args rows = put_rows(p, put_experts(p));
    void *x = put_matrix(p->x, p->x_dtype, p->tokens, p->hidden, p->hidden, 0), *mid = gpu_make_raw(mid_bytes(p));
    void *out_rows = gpu_make_raw(row_bytes);
    int32_t slots = p->tokens * p->slots, *row_of_slot = (int32_t *)malloc((size_t)slots * 4);
    moe__cu_function function = load_finalize(p->rows_dtype, F32, BF16, p->slots);
    moe__finalize_args a;
    memset(&a, 0, sizeof a);
    for (int i = 0; i < slots; i++) row_of_slot[i] = -1;
    for (int r = 0; r < p->rows_max; r++)
        if (p->slot_of_row[r] >= 0) row_of_slot[p->slot_of_row[r]] = r;
    a.rows = out_rows;
    a.row_of_slot = (const int32_t *)gpu_copy(row_of_slot, (size_t)slots * 4);
    a.weights = (const float *)gpu_copy(p->weights, (size_t)slots * 4);
    a.out = gpu_make(out_bytes);
    a.out_stride = a.hidden = p->hidden;
    a.num_tokens = p->tokens;
    a.slots = p->slots;
    a.scale = a.shared_scale = a.output_scale = 1;
    GPU_CALL(launch_gemm1(p, &rows, x, mid, 1));
    GPU_CALL(launch_gemm2(p, &rows, mid, out_rows, 1));
    if (function != NULL) GPU_CALL(gpu_text_launch(function, CTAS, 128, 0, 1, p->slots * 4, &a));
    gpu_get(got_out, a.out, out_bytes);
    if (got_rows != NULL)
        for (int r = 0; r < p->rows_max; r++) // of the rows there are: others were never written
            if (p->slot_of_row[r] >= 0)
                gpu_get((char *)got_rows + (size_t)p->slot_of_row[r] * (row_bytes / (size_t)p->rows_max),
                        (char *)out_rows + (size_t)r * (row_bytes / (size_t)p->rows_max),
                        row_bytes / (size_t)p->rows_max);
    gpu_release();
    free(row_of_slot);
}

static problem chain_problem(int tile)
{
    problem p = { 0 };
    p.tile = tile;
    p.dtype = BF16;
    p.hidden = 136;
    p.features = 72;
    p.slots = 2;
    p.tokens = 21;
    p.experts = 4;
    p.counts[0] = 17;
    p.counts[1] = 5;
    p.counts[3] = 18;
    p.bias = 1;
    return p;
}

// The whole of a layer behind its routing, in numbers that round nowhere but in the intermediate.
static void check_chain(problem p)
{
    size_t h = (size_t)p.hidden, out_bytes = (size_t)p.tokens * h * 4;
    float *got, *want, *mid, *row;
    problem_make(&p);
    got = (float *)malloc(out_bytes);
    want = (float *)calloc(out_bytes, 1);
    mid = (float *)malloc((size_t)p.features * 4);
    row = (float *)malloc(h * 4);
    run_chain(&p, NULL, (size_t)p.rows_max * h * 4, got, out_bytes);
    for (int r = 0; r < p.rows_max; r++) {
        int slot = p.slot_of_row[r];
        if (slot < 0) continue;
        expected_mid(&p, r, mid);
        expected_row(&p, r, mid, row);
        for (size_t i = 0; i < h; i++) want[(size_t)(slot / p.slots) * h + i] += p.weights[slot] * row[i];
    }
    for (size_t i = 0; i < (size_t)p.tokens * h; i++)
        if (got[i] != want[i]) {
            differ(&p, "output", (int)(i / h), (int)(i % h), moe__f32_bits(got[i]), moe__f32_bits(want[i]));
            break;
        }
    problem_free(&p);
    free(got);
    free(want);
    free(mid);
    free(row);
}

// ---- tests ----------------------------------------------------------------------------------------------------------

static const int tiles[] = { 8, 16, 32, 64, 128 };

// Experts with no row, one, a whole tile, more than that, and some.
static problem problem_of(int tile, int dtype, int bias)
{
    problem p = { 0 };
    p.tile = tile;
    p.dtype = dtype;
    p.slots = 3;
    p.experts = 6;
    p.counts[1] = 1;
    p.counts[2] = tile;
    p.counts[3] = tile + 3;
    p.counts[5] = 9;
    p.tokens = tile + 8;
    p.bias = bias;
    return p;
}

TEST(first_product_in_every_tile)
{
    if (!gpu_open()) return;
    for (int i = 0; i < 5; i++) {
        problem p = problem_of(tiles[i], i % 2 == 0 ? BF16 : F16, i % 3 == 1);
        p.gated = i % 2;
        p.hidden = 72 + 64 * i;
        p.features = 136 - 32 * i;
        run_gemm1(p);
    }
}

TEST(second_product_in_every_tile)
{
    static const int types[] = { F32, F16, F32, BF16, F32 };
    if (!gpu_open()) return;
    for (int i = 0; i < 5; i++) {
        problem p = problem_of(tiles[i], i % 2 == 0 ? BF16 : F16, i % 3 == 1);
        p.rows_dtype = types[i];
        p.hidden = 136 + 64 * i;
        p.features = i == 4 ? 8 : 72 + 64 * i;
        run_gemm2(p);
    }
}

// Tiles of 1, 2, ... rows.
TEST(every_number_of_rows_in_a_tile)
{
    static const int some[] = { 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127 };
    problem p = { 0 };
    if (!gpu_open()) return;
    p.tile = 16;
    p.dtype = F16;
    p.gated = 1;
    p.hidden = p.features = 8;
    p.experts = 16;
    p.tokens = 17 * 8;
    for (int e = 0; e < 16; e++) p.counts[e] = 16 - e;
    run_gemm1(p);
    p.tile = 128;
    p.dtype = BF16;
    p.gated = 0;
    p.experts = 15;
    p.tokens = 600;
    for (int e = 0; e < 15; e++) p.counts[e] = some[e];
    run_gemm1(p);
}

TEST(long_runs_of_tiles_and_no_tile)
{
    problem p = { 0 };
    if (!gpu_open()) return;
    p.tile = 8;
    p.gated = 0;
    p.hidden = 8;
    p.features = 264;
    p.experts = 4;
    p.tokens = 1000;
    p.counts[1] = 8 * 33; // more tiles than a warp looks at in one go, and the ends of such looks
    p.counts[2] = 8 * 32 - 3;
    p.counts[3] = 8 * 51;
    run_gemm1(p);
    memset(p.counts, 0, sizeof p.counts);
    run_gemm1(p);
}

TEST(every_activation)
{
    static const int kinds[] = {
        MOE_ACTIVATION_SWIGLU, MOE_ACTIVATION_SWIGLU_STEP, MOE_ACTIVATION_GEGLU_ERF, MOE_ACTIVATION_GEGLU_TANH,
        MOE_ACTIVATION_SITU, MOE_ACTIVATION_SILU, MOE_ACTIVATION_GELU_ERF, MOE_ACTIVATION_GELU_TANH,
        MOE_ACTIVATION_RELU, MOE_ACTIVATION_RELU2, MOE_ACTIVATION_RELU2_CLAMP, MOE_ACTIVATION_IDENTITY
    };
    if (!gpu_open()) return;
    for (int i = 0; i < 26; i++) {
        problem p = { 0 };
        p.tile = 8;
        p.swiglu = i >= 24;
        p.act.kind = kinds[i / 2 % 12];
        p.act.alpha = i % 2 == 0 ? 1 : 1.702f;
        p.act.beta = i % 2 == 0 ? 0 : 1;
        p.act.limit = i % 2 == 0 ? 0 : 1.25f;
        p.gated = p.act.kind < MOE_ACTIVATION_SILU;
        p.hidden = 136;
        p.features = 72;
        p.bias = i % 2;
        p.experts = 2;
        p.tokens = 9;
        p.counts[i % 2] = 8;
        run_gemm1(p);
    }
}

TEST(activation_of_each_expert)
{
    problem p = { 0 };
    if (!gpu_open()) return;
    p.tile = 8;
    p.gated = p.per_expert = 1;
    p.hidden = 72;
    p.features = 8;
    p.experts = 5;
    p.tokens = 20;
    for (int e = 0; e < 5; e++) p.counts[e] = 4;
    run_gemm1(p);
}

// x by cp.async, rounded, weighted, at odd places.
TEST(every_kind_of_x)
{
    if (!gpu_open()) return;
    for (int i = 0; i < 8; i++) {
        static const int types[] = { BF16, F32, F16 };
        problem p = { 0 };
        p.tile = i == 4 ? 128 : 8;
        p.x_dtype = i == 4 ? F32 : types[i % 3];
        p.rough = i > 0;
        p.gated = 0;
        p.weighted = i % 2;
        p.x_pad = i == 3 ? 3 : i == 5 ? 8 : 0;
        p.x_shift = i == 6 || i == 7;
        p.hidden = 72;
        p.features = 40;
        p.slots = 2;
        p.tokens = 10;
        p.experts = 3;
        p.counts[0] = 11;
        p.counts[2] = 5;
        run_gemm1(p);
    }
}

TEST(shared_experts_have_no_tables)
{
    static const int tokens[] = { 1, 8, 13, 40 };
    if (!gpu_open()) return;
    for (int i = 0; i < 8; i++) {
        problem p = { 0 };
        p.tile = i % 2 == 0 ? 8 : 16;
        p.dtype = i % 2 == 0 ? BF16 : F16;
        p.rows_dtype = i % 2 == 0 ? F32 : F16;
        p.gated = i % 2;
        p.identity = 1;
        p.tokens = tokens[i / 2];
        p.held = i % 4 == 3 ? p.tokens - 5 : 0;
        p.hidden = i % 4 == 0 ? 40 : 200;
        p.features = 136;
        run_gemm1(p);
        run_gemm2(p);
    }
}

TEST(chained_launches)
{
    if (!gpu_open()) return;
    for (int i = 0; i < 2; i++) {
        problem p = chain_problem(i == 0 ? 8 : 32);
        p.act.kind = i == 0 ? MOE_ACTIVATION_IDENTITY : MOE_ACTIVATION_RELU;
        check_chain(p);
    }
    { // without tables: weights are asked for before the wait
        problem p = { 0 };
        p.tile = 8;
        p.dtype = BF16;
        p.act.kind = MOE_ACTIVATION_IDENTITY;
        p.identity = 1;
        p.tokens = 13;
        p.hidden = 136;
        p.features = 72;
        check_chain(p);
    }
}

TEST(random_numbers_within_bounds)
{
    if (!gpu_open()) return;
    for (int i = 0; i < 2; i++) {
        problem p = { 0 };
        p.tile = i == 0 ? 8 : 128;
        p.rough = p.rough_weights = 1;
        p.hidden = 40;
        p.features = 704;
        p.tokens = 12;
        p.counts[0] = 12;
        run_gemm2(p);
    }
}

TEST(a_row_does_not_depend_on_the_tile)
{
    static const int sizes[] = { 8, 32, 128 };
    float *rows[3];
    problem p;
    size_t words = 0, sums = 0;
    if (!gpu_open()) return;
    for (int i = 0; i < 3; i++) {
        p = chain_problem(sizes[i]);
        p.rough = p.rough_weights = 1;
        p.act.kind = MOE_ACTIVATION_IDENTITY;
        problem_make(&p);
        words = (size_t)(p.tokens * p.slots * p.hidden);
        sums = (size_t)(p.tokens * p.hidden);
        rows[i] = (float *)calloc(words + sums, 4);
        run_chain(&p, rows[i], (size_t)(p.rows_max * p.hidden) * 4, rows[i] + words, sums * 4);
        problem_free(&p);
    }
    for (int i = 1; i < 3; i++) CHECK(memcmp(rows[0], rows[i], (words + sums) * 4) == 0);
    for (int i = 0; i < 3; i++) free(rows[i]);
}

TEST(finalize_gives_the_same_bits)
{
    static const int sizes[] = { 8, 72, 704, 1032, 136 };
    static const int types[][3] = { { F32, F32, BF16 }, { BF16, BF16, F32 }, { F16, F16, F16 } };
    if (!gpu_open()) return;
    for (int i = 0; i < 30; i++) {
        sums s = { 0 };
        s.rows_dtype = types[i % 3][0];
        s.out_dtype = types[i % 3][1];
        s.x_dtype = types[i % 3][2];
        s.hidden = sizes[i % 5];
        s.tokens = 1 + i % 4 * 7;
        s.slots = 1 + i * 5 % 11;
        s.held = i % 7 == 4 && s.tokens > 3 ? s.tokens - 2 : 0;
        s.no_rows = i % 10 == 7;
        s.no_weights = i % 6 == 5;
        s.shared = i % 3 != 1;
        s.gate = i % 4 == 3 ? 1 + i % 3 / 2 : 0;
        s.norm = i % 5 == i % 2;
        s.special_kind = i % 4 == 1 ? MOE_SPECIAL_IDENTITY : i % 4 == 2 ? MOE_SPECIAL_CONSTANT
                         : i % 8 == 7 ? MOE_SPECIAL_ZERO : 0;
        s.global_scale = i % 2;
        s.accumulate = i % 5 > 2;
        s.pad = i % 9 == 2 ? 8 : i % 9 == 5 ? 1 : 0;
        s.seed = (uint64_t)i + 5;
        run_sums(s);
    }
}

// What a model has, on hardware alone: the emulated device would take minutes.
TEST(large_sizes)
{
    sums s = { 0 };
    if (!gpu_open()) return;
    if (!gpu_large()) { test_not_here("sizes for hardware"); return; }
    for (int i = 0; i < 20; i++) {
        problem p = { 0 };
        p.tile = tiles[i % 5];
        p.dtype = i % 2 == 0 ? BF16 : F16;
        p.gated = i / 10;
        p.hidden = i % 3 == 0 ? 2880 : 1856;
        p.features = i % 3 == 1 ? 2880 : 704;
        p.slots = 2;
        p.tokens = 150;
        p.experts = 12;
        p.counts[0] = 130;
        for (int e = 1; e < 12; e++) p.counts[e] = e * e % 23;
        p.bias = i % 4 == 1;
        run_gemm1(p);
        run_gemm2(p);
    }
    s.rows_dtype = s.out_dtype = s.x_dtype = BF16;
    s.slots = 3;
    s.tokens = 65536;
    s.hidden = 40;
    s.shared = 1;
    run_sums(s);
}

TEST_MAIN(
    T(first_product_in_every_tile)
    T(second_product_in_every_tile)
    T(every_number_of_rows_in_a_tile)
    T(long_runs_of_tiles_and_no_tile)
    T(every_activation)
    T(activation_of_each_expert)
    T(every_kind_of_x)
    T(shared_experts_have_no_tables)
    T(chained_launches)
    T(random_numbers_within_bounds)
    T(a_row_does_not_depend_on_the_tile)
    T(finalize_gives_the_same_bits)
    T(large_sizes)
)
