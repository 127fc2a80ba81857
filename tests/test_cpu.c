// test_cpu.c - every kernel set gives the scalar kernels' bits, for every type, size and number of threads
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "layer.h"

enum { WIDEST = 2880 };

static void *aligned(size_t bytes) { return moe__default_alloc(NULL, bytes, 256); }
static void freed(void *p) { moe__default_free(NULL, p, 0); }

// Values over many magnitudes, so that a wrong order of additions shows in the last bits.
static float wild(uint64_t *state)
{
    float value = test_random_float(state);
    return value * moe__bits_f32((120 + test_random_u32(state) % 12) << 23);
}

static void fill(void *data, int dtype, int n, int padded, uint64_t *state)
{
    for (int i = 0; i < padded; i++) moe__store(data, dtype, i, i < n ? wild(state) : 0);
}

static const int sizes[] = { 8, 40, 72, 704, 1856, WIDEST };

typedef struct operands {
    float *x[MOE__CELL_ROWS];
    const float *rows[MOE__CELL_ROWS];
    void *w[MOE__STRIP_COLS];
    const void *weights[MOE__STRIP_COLS];
    int padded;
} operands;

static void make_operands(operands *o, int dtype, int n, uint64_t *state)
{
    o->padded = (n + 31) / 32 * 32;
    for (int i = 0; i < MOE__CELL_ROWS; i++) {
        o->rows[i] = o->x[i] = (float *)aligned(WIDEST * 4 + 256);
        fill(o->x[i], MOE_DTYPE_F32, n, o->padded, state);
    }
    for (int i = 0; i < MOE__STRIP_COLS; i++) {
        o->weights[i] = o->w[i] = aligned(WIDEST * 4 + 256);
        fill(o->w[i], dtype, n, o->padded, state);
    }
}

static void free_operands(operands *o)
{
    for (int i = 0; i < MOE__CELL_ROWS; i++) freed(o->x[i]);
    for (int i = 0; i < MOE__STRIP_COLS; i++) freed(o->w[i]);
}

// The contract, written once more: element k belongs to lane k % 16.
static float contract(const float *x, const void *w, int dtype, int n)
{
    float lane[16] = { 0 };
    for (int k = 0; k < n; k++) lane[k & 15] = moe__fmaf(x[k], moe__load(w, dtype, k), lane[k & 15]);
    for (int i = 0; i < 8; i++) lane[i] += lane[i + 8];
    for (int i = 0; i < 4; i++) lane[i] += lane[i + 4];
    return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

static int available(int isa, const moe__kernels **kernels)
{
    *kernels = moe__kernels_of(isa);
    return moe__isa_available(isa);
}

TEST(dot_products_of_all_kernel_sets_follow_the_contract)
{
    uint64_t state = 11;
    for (int dtype = MOE_DTYPE_F32; dtype <= MOE_DTYPE_F16; dtype++)
        for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
            operands o;
            make_operands(&o, dtype, sizes[s], &state);
            for (int isa = MOE__ISA_SCALAR; isa <= MOE__ISA_NEON; isa++) {
                const moe__kernels *kernels;
                float sums[MOE__CELL_ROWS * MOE__CELL_COLS * MOE__LANES], dots[MOE__CELL_ROWS * MOE__CELL_COLS];
                int wrong = 0;
                if (!available(isa, &kernels)) continue;
                kernels->tile[dtype - 1](o.rows, o.weights, o.padded, 1, 64, sums);
                kernels->reduce(sums, MOE__CELL_ROWS * MOE__CELL_COLS, dots);
                for (int r = 0; r < MOE__CELL_ROWS; r++)
                    for (int c = 0; c < MOE__CELL_COLS; c++) {
                        float expected = contract(o.x[r], o.w[c], dtype, sizes[s]);
                        wrong += memcmp(&expected, &dots[r * MOE__CELL_COLS + c], 4) != 0;
                    }
                kernels->strip[dtype - 1](o.x[0], o.weights, o.padded, 1, 128, sums);
                kernels->reduce(sums, MOE__STRIP_COLS, dots);
                for (int c = 0; c < MOE__STRIP_COLS; c++) {
                    float expected = contract(o.x[0], o.w[c], dtype, sizes[s]);
                    wrong += memcmp(&expected, &dots[c], 4) != 0;
                }
                if (wrong != 0) test_fail_numbers(__FILE__, __LINE__, moe__isa_names[isa], dtype, sizes[s]);
            }
            free_operands(&o);
        }
}

TEST(a_dot_product_in_blocks_of_k_has_the_same_bits)
{
    uint64_t state = 5;
    operands o;
    make_operands(&o, MOE_DTYPE_BF16, WIDEST, &state);
    for (int isa = MOE__ISA_SCALAR; isa <= MOE__ISA_NEON; isa++) {
        const moe__kernels *kernels;
        float whole[MOE__CELL_ROWS * MOE__CELL_COLS * MOE__LANES], blocks[MOE__CELL_ROWS * MOE__CELL_COLS * MOE__LANES];
        if (!available(isa, &kernels)) continue;
        kernels->tile[1](o.rows, o.weights, WIDEST, 1, 0, whole);
        for (int k = 0; k < WIDEST; k += 416) {
            const float *x[MOE__CELL_ROWS];
            const void *w[MOE__CELL_COLS];
            for (int i = 0; i < MOE__CELL_ROWS; i++) x[i] = o.x[i] + k;
            for (int i = 0; i < MOE__CELL_COLS; i++) w[i] = (const uint16_t *)o.w[i] + k;
            kernels->tile[1](x, w, moe__min32(416, WIDEST - k), k == 0, 0, blocks);
        }
        CHECK(memcmp(whole, blocks, sizeof whole) == 0);
    }
    free_operands(&o);
}

TEST(f16_weights_widen_exactly_also_when_denormal)
{
    uint16_t *w = (uint16_t *)aligned(32 * 2);
    float *x = (float *)aligned(32 * 4);
    const void *weights[MOE__STRIP_COLS];
    for (int i = 0; i < 32; i++) {
        w[i] = 0;
        x[i] = i == 0 ? 1.0f : 0.0f;
    }
    for (int c = 0; c < MOE__STRIP_COLS; c++) weights[c] = w;
    for (int isa = MOE__ISA_SCALAR; isa <= MOE__ISA_NEON; isa++) {
        const moe__kernels *kernels;
        int wrong = 0;
        if (!available(isa, &kernels)) continue;
        for (uint32_t bits = 0; bits < 0x10000; bits++) {
            float sums[MOE__STRIP_COLS * MOE__LANES], dots[MOE__STRIP_COLS];
            if ((bits & 0x7c00) == 0x7c00 || bits == 0x8000) continue; // infinities, NaN, -0
            w[0] = (uint16_t)bits;
            kernels->strip[2](x, weights, 32, 1, 0, sums);
            kernels->reduce(sums, MOE__STRIP_COLS, dots);
            wrong += dots[0] != moe__f16_to_f32((uint16_t)bits);
        }
        CHECK_EQ(wrong, 0);
    }
    freed(w);
    freed(x);
}

TEST(vector_sigmoid_has_the_scalar_bits)
{
    uint32_t step = test_full() ? 1 : 613;
    for (int isa = MOE__ISA_SCALAR + 1; isa <= MOE__ISA_NEON; isa++) {
        const moe__kernels *kernels;
        int wrong = 0, wrong_nan = 0;
        if (!available(isa, &kernels)) continue;
        for (uint64_t first = 0; first < 0x100000000u; first += 16 * (uint64_t)step) {
            float x[16], y[16];
            for (uint32_t i = 0; i < 16; i++) y[i] = x[i] = moe__bits_f32((uint32_t)first + i * step);
            kernels->sigmoid(y, 16);
            for (int i = 0; i < 16; i++) {
                float expected = moe__sigmoidf(x[i]);
                if (moe__is_nan(expected)) wrong_nan += !moe__is_nan(y[i]);
                else wrong += memcmp(&expected, &y[i], 4) != 0;
            }
        }
        CHECK_EQ(wrong, 0);
        CHECK_EQ(wrong_nan, 0);
    }
}

TEST(add_scaled_has_the_scalar_bits_at_every_length)
{
    uint64_t state = 9;
    float x[67], start[67], scalar[67], vector[67];
    for (int i = 0; i < 67; i++) {
        x[i] = wild(&state);
        start[i] = wild(&state);
    }
    for (int isa = MOE__ISA_SCALAR + 1; isa <= MOE__ISA_NEON; isa++) {
        const moe__kernels *kernels;
        if (!available(isa, &kernels)) continue;
        for (int n = 0; n <= 67; n++) {
            memcpy(scalar, start, sizeof start);
            memcpy(vector, start, sizeof start);
            moe__scalar_add_scaled(0.3f, x, scalar, n);
            kernels->add_scaled(0.3f, x, vector, n);
            CHECK(memcmp(scalar, vector, sizeof scalar) == 0);
        }
    }
}

// Tiles of every shape: rows and columns that fill no cell, and more than one K block.
// All codes but NaN, with scales of every size: products of what moe_convert() widens.
TEST(codes_widen_on_every_instruction_set)
{
    static const float sizes[] = { 1, 0.3f, 1e-42f, 7e-39f, 1e29f, -3.14159f, 0, 1e-20f };
    unsigned char codes[256];
    float values[256], scales[32], out[256];
    moe__scale_run run = { scales, 0, 0 };
    for (int i = 0; i < 256; i++) codes[i] = (unsigned char)(i % 128 == 127 ? 3 : i);
    for (int isa = MOE__ISA_SCALAR; isa <= MOE__ISA_NEON; isa++) {
        const moe__kernels *kernels;
        if (!available(isa, &kernels)) continue;
        for (int turn = 0; turn < 8; turn++)
            for (int dtype = MOE_DTYPE_E4M3; dtype <= MOE_DTYPE_INT4; dtype++) {
                int wrong = 0;
                if (dtype != MOE_DTYPE_E4M3 && dtype != MOE_DTYPE_E2M1 && dtype != MOE_DTYPE_INT4) continue;
                for (int i = 0; i < 32; i++) scales[i] = sizes[(i + turn) % 8];
                run.first = turn;
                run.shift = turn % 5;
                kernels->widen[moe__is_4_bits(dtype)](dtype == MOE_DTYPE_E4M3 ? codes : codes + 64,
                                                      moe__nibbles_of(dtype), &run, 256, 64, out);
                CHECK_OK(moe_convert(dtype == MOE_DTYPE_E4M3 ? codes : codes + 64, dtype, values, MOE_DTYPE_F32, 256,
                                     &err));
                for (int i = 0; i < 256; i++) {
                    float expected = values[i] * scales[(turn + i / 16) >> (turn % 5)];
                    wrong += memcmp(&expected, &out[i], 4) != 0;
                }
                if (wrong != 0) test_fail_numbers(__FILE__, __LINE__, moe__isa_names[isa], dtype, wrong);
            }
    }
}

TEST(dots_of_a_task_are_single_dots)
{
    enum { N = 1184, COLS = MOE__TASK_COLS, ROWS = MOE__TASK_ROWS };
    uint64_t state = 21;
    float *x = (float *)aligned(ROWS * N * 4), *scratch = (float *)aligned(MOE__SCRATCH * 4);
    uint16_t *w = (uint16_t *)aligned((COLS + 8) * N * 2);
    moe__cpu_matrix matrix;
    fill(x, MOE_DTYPE_F32, ROWS * N, ROWS * N, &state);
    fill(w, MOE_DTYPE_BF16, COLS * N, (COLS + 8) * N, &state);
    memset(&matrix, 0, sizeof matrix);
    matrix.w = (const unsigned char *)w;
    matrix.dtype = MOE_DTYPE_BF16;
    matrix.row_bytes = N * 2;
    matrix.n = N;
    for (int isa = MOE__ISA_SCALAR; isa <= MOE__ISA_NEON; isa++) {
        static const int rows[] = { 1, 2, 3, 4, 5, 31, 32 }, cols[] = { 1, 2, 3, 7, 94, 95, 96 };
        const moe__kernels *kernels;
        if (!available(isa, &kernels)) continue;
        for (int i = 0; i < 7; i++)
            for (int j = 0; j < 7; j++) {
                const float *row[ROWS + MOE__WIDE_ROWS];
                float *dots = scratch + MOE__SUMS;
                int wrong = 0;
                if (isa == MOE__ISA_SCALAR && rows[i] * cols[j] > 300) continue;
                for (int r = 0; r < rows[i]; r++) row[r] = x + r * N;
                memset(scratch, 0xff, MOE__SCRATCH * 4);
                matrix.cols = cols[j];
                moe__cpu_dots(kernels, &matrix, row, rows[i], scratch, dots);
                for (int r = 0; r < rows[i]; r += rows[i] > 5 ? 15 : 1)
                    for (int c = 0; c < cols[j]; c++) {
                        float expected = contract(x + r * N, w + c * N, MOE_DTYPE_BF16, N);
                        wrong += memcmp(&expected, &dots[r * MOE__TASK_COLS + c], 4) != 0;
                    }
                if (wrong != 0) test_fail_numbers(__FILE__, __LINE__, moe__isa_names[isa], rows[i], cols[j]);
            }
    }
    freed(x);
    freed(w);
    freed(scratch);
}

// Every task covers rows and columns of its own, and together they cover all.
TEST(tasks_cover_every_row_and_column_once)
{
    static const int counts[] = { 0, 1, 0, 3, 33, 0, 65, 64, 200, 0 };
    enum { BLOCKS = 10, COLS = 130 };
    fixture f;
    moe__cpu cpu;
    moe_error err;
    int32_t offsets[BLOCKS + 1] = { 0 }, begin[BLOCKS + 2], tasks, wrong = 0;
    static unsigned char seen[400][COLS];
    memset(&f, 0, sizeof f);
    memset(&cpu, 0, sizeof cpu);
    f.layer = small_layer(MOE_FORMAT_BF16, MOE_ACTIVATION_SILU);
    f.layer.num_experts = BLOCKS;
    f.layer.intermediate_size = COLS;
    f.layer.hidden_size = 8;
    REQUIRE_OK(fixture_open(&f, &err));
    for (int g = 0; g < BLOCKS; g++) offsets[g + 1] = offsets[g] + counts[g];
    cpu.layer = &f.plan->layer;
    cpu.weights = f.weights;
    cpu.blocks = BLOCKS;
    cpu.offsets = offsets;
    cpu.task_begin = begin;
    tasks = moe__cpu_split(&cpu, 1);
    for (int i = 0; i < tasks; i++) {
        moe__cpu_task task;
        moe__cpu_task_at(&cpu, i, -1, &task);
        for (int r = task.first; r < task.first + task.rows; r++) {
            wrong += r < offsets[task.group] || r >= offsets[task.group + 1] || task.rows > MOE__TASK_ROWS;
            for (int c = task.col; c < task.col + task.cols; c++) seen[r][c]++;
        }
    }
    for (int r = 0; r < offsets[BLOCKS]; r++)
        for (int c = 0; c < COLS; c++) wrong += seen[r][c] != 1;
    CHECK_EQ(wrong, 0);
    fixture_close(&f);
}

#if defined(MOE__X86) || defined(MOE__NEON)
// The kernels' text with 16 lanes at a time, as the AVX-512 set has it, on any machine: plain C in place of intrinsics.
// Macros, because such vectors cannot be passed where the machine has none.
typedef float wide_f32 __attribute__((vector_size(64)));
typedef int32_t wide_i32 __attribute__((vector_size(64)));
#define WIDE(i, value) \
    __extension__({ \
        wide_f32 wide_##i; \
        for (int i = 0; i < 16; i++) wide_##i[i] = (value); \
        wide_##i; \
    })
#define wide_load(p) WIDE(at_load, (p)[at_load])
#define wide_bf16(p) WIDE(at_bf16, moe__bf16_to_f32((p)[at_bf16]))
#define wide_f16(p) WIDE(at_f16, moe__f16_to_f32((p)[at_f16]))
#define wide_set1(x) WIDE(at_set1, (x))
#define wide_fma(a, b, c) WIDE(at_fma, moe__fmaf((a)[at_fma], (b)[at_fma], (c)[at_fma]))
#define wide_max(a, b) WIDE(at_max, (a)[at_max] > (b)[at_max] ? (a)[at_max] : (b)[at_max])
#define wide_store(p, v) \
    do { \
        wide_f32 wide_stored = (v); \
        memcpy((p), &wide_stored, sizeof wide_stored); \
    } while (0)
#undef MOE__KEEP // these vectors are wider than a register
#define MOE__KEEP(v) (void)0
MOE__VECTOR_KERNELS(wide, , wide_f32, wide_i32, 16, wide_load, wide_bf16, wide_f16, wide_set1, wide_fma, wide_max,
                    wide_store)

TEST(the_kernels_text_holds_for_16_lanes)
{
    static const moe__kernels kernels = { { wide_tile_f32, wide_tile_bf16, wide_tile_f16 },
                                          { wide_strip_f32, wide_strip_bf16, wide_strip_f16 },
                                          moe__scalar_reduce, wide_add_scaled, wide_sigmoid, { NULL, NULL, NULL },
                                          { moe__scalar_widen_8, moe__scalar_widen_4 }, { NULL, NULL } };
    uint64_t state = 31;
    float x[64], y[64];
    for (int dtype = MOE_DTYPE_F32; dtype <= MOE_DTYPE_F16; dtype++) {
        operands o;
        float sums[MOE__CELL_ROWS * MOE__CELL_COLS * MOE__LANES];
        float expected[MOE__CELL_ROWS * MOE__CELL_COLS * MOE__LANES];
        make_operands(&o, dtype, 712, &state);
        for (int first = 1; first >= 0; first--) {
            kernels.tile[dtype - 1](o.rows, o.weights, o.padded, first, 64, sums);
            moe__kernels_of(MOE__ISA_SCALAR)->tile[dtype - 1](o.rows, o.weights, o.padded, first, 64, expected);
            CHECK(memcmp(sums, expected, sizeof sums) == 0);
        }
        for (int first = 1; first >= 0; first--) {
            kernels.strip[dtype - 1](o.x[0], o.weights, o.padded, first, 64, sums);
            moe__kernels_of(MOE__ISA_SCALAR)->strip[dtype - 1](o.x[0], o.weights, o.padded, first, 64, expected);
            CHECK(memcmp(sums, expected, MOE__STRIP_COLS * MOE__LANES * sizeof sums[0]) == 0);
        }
        free_operands(&o);
    }
    for (int i = 0; i < 64; i++) y[i] = x[i] = 40 * wild(&state);
    kernels.sigmoid(x, 64);
    for (int i = 0; i < 64; i++) CHECK_EQ(x[i], moe__sigmoidf(y[i]));
    memset(x, 0, sizeof x);
    kernels.add_scaled(0.7f, y, x, 61);
    for (int i = 0; i < 61; i++) CHECK_EQ(x[i], moe__fmaf(0.7f, y[i], 0));
}
#else
TEST(the_kernels_text_holds_for_16_lanes)
{
    CHECK(moe__kernels_of(MOE__ISA_AVX512) == moe__kernels_of(MOE__ISA_SCALAR)); // this build has no vector kernels
}
#endif

// One layer, all kernel sets and 1, 2 and 7 threads.
static void check_same(int hidden, int inner, int format, int activation, int tokens)
{
    static const int threads[] = { 1, 2, 7 };
    unsigned char *first = NULL;
    size_t bytes = 0;
    moe_error err;
    for (int isa = MOE__ISA_SCALAR; isa <= MOE__ISA_NEON; isa++)
        for (int i = 0; i < 3; i++) {
            fixture f;
            if (!moe__isa_available(isa) || (isa == MOE__ISA_SCALAR && i > 0)) continue;
            memset(&f, 0, sizeof f);
            f.context_desc.isa = moe__isa_names[isa];
            f.context_desc.threads = threads[i];
            f.layer = small_layer(format, activation);
            f.layer.hidden_size = hidden;
            f.layer.intermediate_size = inner;
            f.layer.num_experts = 3;
            f.layer.routing.top_k = 2;
            f.layer.shared.count = 1;
            f.layer.shared.intermediate_size = 40;
            f.layer.shared.gate = 1;
            f.tokens = tokens;
            REQUIRE_OK(fixture_open(&f, &err));
            CHECK_EQ(moe_execute(f.plan, f.weights, &f.args, NULL), MOE_OK);
            if (first == NULL) {
                bytes = (size_t)tokens * (size_t)hidden * dtype_bytes(f.plan->desc.out_dtype);
                first = (unsigned char *)malloc(bytes);
                memcpy(first, f.args.out, bytes);
            } else if (memcmp(first, f.args.out, bytes) != 0) {
                test_fail_numbers(__FILE__, __LINE__, moe__isa_names[isa], hidden, threads[i]);
            }
            fixture_close(&f);
        }
    free(first);
}

TEST(layers_have_the_same_bits_with_every_kernel_set_and_number_of_threads)
{
    for (int format = MOE_FORMAT_F32; format <= MOE_FORMAT_F16; format++) {
        check_same(8, 40, format, MOE_ACTIVATION_SWIGLU, 40);
        check_same(40, 8, format, MOE_ACTIVATION_RELU2, 40);
        check_same(72, 72, format, MOE_ACTIVATION_GEGLU_TANH, 37);
        check_same(704, 72, format, MOE_ACTIVATION_SWIGLU, 7);
    }
    check_same(1856, 40, MOE_FORMAT_BF16, MOE_ACTIVATION_SILU, 3);
    check_same(40, 1856, MOE_FORMAT_F16, MOE_ACTIVATION_SITU, 2);
    check_same(WIDEST, 72, MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU, 2);
    check_same(72, WIDEST, MOE_FORMAT_F32, MOE_ACTIVATION_SWIGLU, 2);
}

TEST(the_isa_of_the_context_is_the_one_that_runs)
{
    moe_layer_desc layer = small_layer(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
    for (int isa = MOE__ISA_SCALAR; isa <= MOE__ISA_NEON; isa++) {
        moe_context_desc desc;
        moe_context *ctx;
        moe_plan_info info;
        moe_error err;
        int chosen = 0;
        char name[32];
        if (!moe__isa_available(isa)) continue;
        memset(&desc, 0, sizeof desc);
        memset(&info, 0, sizeof info);
        desc.isa = moe__isa_names[isa];
        REQUIRE_OK(moe_context_create(&desc, &ctx, &err));
        CHECK_OK(moe_plan_query(ctx, &layer, NULL, &info, &err));
        snprintf(name, sizeof name, "cpu_%s_bf16", moe__isa_names[isa]);
        for (int i = 0; i < info.num_candidates; i++) {
            chosen += info.candidates[i].chosen;
            if (info.candidates[i].chosen) CHECK_STR(info.candidates[i].name, name);
            CHECK((info.candidates[i].reason[0] == 0) == (info.candidates[i].chosen == 1));
        }
        CHECK_EQ(chosen, 1);
        moe_context_destroy(ctx);
    }
}

TEST_MAIN(
    T(dot_products_of_all_kernel_sets_follow_the_contract)
    T(a_dot_product_in_blocks_of_k_has_the_same_bits)
    T(f16_weights_widen_exactly_also_when_denormal)
    T(vector_sigmoid_has_the_scalar_bits)
    T(add_scaled_has_the_scalar_bits_at_every_length)
    T(codes_widen_on_every_instruction_set)
    T(dots_of_a_task_are_single_dots)
    T(tasks_cover_every_row_and_column_once)
    T(the_kernels_text_holds_for_16_lanes)
    T(layers_have_the_same_bits_with_every_kernel_set_and_number_of_threads)
    T(the_isa_of_the_context_is_the_one_that_runs)
)
