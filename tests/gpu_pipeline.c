// gpu_pipeline.c - the miniature of a GEMM's main loop (pipeline.cu.inc) against plain C, in numbers that sum exactly
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "gpu.h"
#include "gpu_text.h"

enum { CTAS = 3, BLOCKS_MAX = 11, TOKENS = 40, ROWS_MAX = 64 };
enum { STAGE = 16384 + 8192 + 1024, SMEM = 4 * STAGE + 64, THREADS = 384 };

typedef struct pipeline_args {
    const void *weights, *x, *weight_scale, *x_scale, *token_of_row;
    void *y;
    int32_t blocks, rows;
} pipeline_args;

static unsigned char weights[CTAS * BLOCKS_MAX * 128 * 128], packed[sizeof weights], x[TOKENS * BLOCKS_MAX * 128];
static float weight_scale[CTAS * BLOCKS_MAX], x_scale[TOKENS * BLOCKS_MAX], y[ROWS_MAX * CTAS * 128];
static int32_t token_of_row[ROWS_MAX];

// -2, -1, 0, 1 or 2 in e4m3.
static unsigned char small(unsigned n)
{
    static const unsigned char values[5] = { 0xc0, 0xb8, 0x00, 0x38, 0x40 };
    return values[n % 5];
}

static float value(unsigned char e4m3)
{
    float magnitude = (e4m3 & 0x7f) == 0x40 ? 2.0f : (e4m3 & 0x7f) == 0x38 ? 1.0f : 0.0f;
    return e4m3 > 0x7f ? -magnitude : magnitude;
}

static void make(int blocks)
{
    static const float scales[4] = { 0.5f, 1, 2, 4 };
    uint32_t seed = 12345u + (uint32_t)blocks;
    int row_bytes = blocks * 128;
    for (int i = 0; i < CTAS * 128 * row_bytes; i++) weights[i] = small((seed = seed * 1664525u + 1013904223u) >> 16);
    for (int i = 0; i < TOKENS * row_bytes; i++) x[i] = small((seed = seed * 1664525u + 1013904223u) >> 16);
    for (int i = 0; i < CTAS * blocks; i++) weight_scale[i] = scales[i * 7 % 4];
    for (int i = 0; i < TOKENS * blocks; i++) x_scale[i] = scales[i * 5 % 4];
    for (int i = 0; i < ROWS_MAX; i++) token_of_row[i] = i * 29 % TOKENS;
    for (int slab = 0; slab < CTAS; slab++)
        for (int k = 0; k < blocks; k++)
            for (int r = 0; r < 128; r++)
                for (int j = 0; j < 8; j++)
                    memcpy(packed + ((slab * blocks + k) * 128 + r) * 128 + (j ^ (r & 7)) * 16,
                           weights + (slab * 128 + r) * row_bytes + k * 128 + j * 16, 16);
}

static float expected(int blocks, int row, int feature)
{
    float total = 0;
    int token = token_of_row[row];
    for (int k = 0; k < blocks; k++) {
        float sum = 0;
        for (int i = k * 128; i < k * 128 + 128; i++)
            sum += value(weights[feature * blocks * 128 + i]) * value(x[token * blocks * 128 + i]);
        total += x_scale[token * blocks + k] * weight_scale[feature / 128 * blocks + k] * sum;
    }
    return total;
}

static void run(moe_context *ctx, moe__cu_function function, int blocks, int rows)
{
    pipeline_args args;
    char text[160];
    (void)ctx;
    make(blocks);
    args.weights = gpu_copy(packed, (size_t)(CTAS * blocks * 128 * 128));
    args.x = gpu_copy(x, (size_t)(TOKENS * blocks * 128));
    args.weight_scale = gpu_copy(weight_scale, (size_t)(CTAS * blocks) * 4);
    args.x_scale = gpu_copy(x_scale, (size_t)(TOKENS * blocks) * 4);
    args.token_of_row = gpu_copy(token_of_row, (size_t)rows * 4);
    args.y = gpu_make((size_t)(rows * CTAS * 128) * 4);
    args.blocks = blocks;
    args.rows = rows;
    GPU_CALL(gpu_text_launch(function, CTAS, THREADS, 1, 0, SMEM, &args));
    gpu_get(y, args.y, (size_t)(rows * CTAS * 128) * 4);
    for (int r = 0; r < rows; r++)
        for (int f = 0; f < CTAS * 128; f++) {
            float want = expected(blocks, r, f), got = y[r * CTAS * 128 + f];
            if (got == want) continue;
            snprintf(text, sizeof text, "%d blocks, row %d, feature %d: %g, not %g", blocks, r, f, (double)got,
                     (double)want);
            test_fail(__FILE__, __LINE__, text);
            gpu_release();
            return;
        }
    gpu_release();
}

TEST(pipeline_gives_the_exact_sums)
{
    moe_context *ctx;
    moe__cu_function function;
    if (!gpu_open()) return;
    if (gpu.cuda->arch != 90) { test_not_here("wgmma is an instruction of compute capability 9.0"); return; }
    if ((ctx = gpu_text_open("tests/pipeline.cu.inc")) == NULL) return;
    function = gpu_text_load(ctx, "pipeline", sizeof(pipeline_args), THREADS, SMEM);
    if (function != NULL) {
        run(ctx, function, 1, 64);
        run(ctx, function, 3, 1);
        run(ctx, function, 4, 37);
        run(ctx, function, BLOCKS_MAX, 64); // every stage several times
    }
    moe_context_destroy(ctx);
}

TEST_MAIN(
    T(pipeline_gives_the_exact_sums)
)
