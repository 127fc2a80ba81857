// test_weights.c - weights: every source layout packs and reads back, refusals name the tensor, files, memory, threads
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "sources.h"

static moe_context *open_context(counter *c, int32_t threads)
{
    moe_context_desc desc;
    moe_context *ctx = NULL;
    memset(&desc, 0, sizeof desc);
    desc.threads = threads;
    if (c != NULL) {
        memset(c, 0, sizeof *c);
        desc.allocator.alloc = counter_alloc;
        desc.allocator.free = counter_free;
        desc.allocator.user = c;
    }
    CHECK_OK(moe_context_create(&desc, &ctx, &err));
    return ctx;
}

// The padding behind each row of packed matrices is zero, and so is what lies between parts.
static int padding_is_zero(const moe_weights *w)
{
    int64_t size = bytes_of(w->layout.dtype);
    for (int32_t b = 0; b < w->layout.blocks; b++) {
        const moe__block_shape *s = &w->layout.expert;
        for (int32_t m = 0; m < 2; m++) {
            int64_t rows = m == 0 ? s->rows1 : w->layer.hidden_size, ld = m == 0 ? s->ld1 : s->ld2;
            int64_t used = m == 0 ? w->layer.hidden_size : s->features;
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = used * size; i < ld * size; i++)
                    if (w->expert[b][(m == 0 ? s->w1 : s->w2) + (uint64_t)(r * ld * size + i)] != 0) return 0;
        }
    }
    return 1;
}

// ---- layouts --------------------------------------------------------------------------------------------------------

// One way of storing a layer's experts; 0 when its sizes do not allow it.
static int layout_is_legal(int32_t h, int32_t i, int32_t dtype, int32_t layout, int32_t halves, int32_t order)
{
    int64_t b = 128 / bytes_of(dtype), block = order == MOE_ROWS_SHUFFLED_128  ? 32
                                               : order == MOE_ROWS_SHUFFLED_64 ? 16
                                                                               : 1;
    if (layout == MOE_LAYOUT_BLOCK_MAJOR_K && (h % b != 0 || i % b != 0)) return 0;
    return (halves > MOE_HALVES_SEPARATE ? 2 * i : i) % block == 0 && h % block == 0;
}

static void check_layout(moe_context *ctx, int32_t h, int32_t i, int32_t format, int32_t layout, int32_t halves,
                         int32_t order, int32_t stacked)
{
    moe_layer_desc layer = make_layer(h, i, 2, format, 1);
    int32_t d = dtype_of(format), stack = stacked ? 2 : 0, shift = (h + i) / 8 % 2;
    moe_weights *w = NULL;
    layer.gemm1_bias = layer.gemm2_bias = 1;
    CHECK_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
    if (w == NULL) return;
    for (int32_t e = stacked ? -1 : 0; e < (stacked ? 0 : 2); e++) {
        if (halves > MOE_HALVES_SEPARATE) {
            set_source(w, make_source(MOE_TENSOR_GATE_UP, e, stack, 2 * i, h, d, layout, halves, order, shift));
            set_source(w, make_source(MOE_TENSOR_GATE_UP_BIAS, e, stack, 2 * i, 0, d, layout, halves, order, shift));
        } else {
            set_source(w, make_source(MOE_TENSOR_UP, e, stack, i, h, d, layout, halves, order, shift));
            set_source(w, make_source(MOE_TENSOR_GATE, e, stack, i, h, d, layout, halves, order, shift));
            set_source(w, make_source(MOE_TENSOR_UP_BIAS, e, stack, i, 0, d, layout, halves, order, shift));
            set_source(w, make_source(MOE_TENSOR_GATE_BIAS, e, stack, i, 0, d, layout, halves, order, shift));
        }
        set_source(w, make_source(MOE_TENSOR_DOWN, e, stack, h, i, d, layout, 0, order, shift));
        set_source(w, make_source(MOE_TENSOR_DOWN_BIAS, e, stack, h, 0, d, layout, 0, order, shift));
    }
    CHECK_OK(moe_weights_seal(w, &err));
    for (int32_t e = 0; e < 2; e++)
        if (!expert_reads(w, &layer, e)) {
            char what[160];
            snprintf(what, sizeof what, "H %d I %d format %d layout %d halves %d order %d stacked %d", h, i, format,
                     layout, halves, order, stacked);
            test_fail(__FILE__, __LINE__, what);
        }
    CHECK(padding_is_zero(w));
    moe_weights_destroy(w);
}

TEST(every_source_layout_reads_back_in_natural_order)
{
    static const int32_t sizes[][2] = { { 40, 72 }, { 72, 40 },   { 88, 48 }, { 64, 64 },
                                        { 96, 32 }, { 128, 192 }, { 33, 7 } };
    moe_context *ctx = open_context(NULL, 1);
    int tried = 0;
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++)
        for (int32_t format = MOE_FORMAT_F32; format <= MOE_FORMAT_F16; format++)
            for (int32_t layout = MOE_LAYOUT_UNSET; layout <= MOE_LAYOUT_BLOCK_MAJOR_K; layout++)
                for (int32_t halves = MOE_HALVES_SEPARATE; halves <= MOE_HALVES_INTERLEAVED_UP_GATE; halves++)
                    for (int32_t order = MOE_ROWS_NATURAL; order <= MOE_ROWS_SHUFFLED_64; order++) {
                        int32_t h = sizes[s][0], i = sizes[s][1];
                        if (!layout_is_legal(h, i, dtype_of(format), layout, halves, order)) continue;
                        check_layout(ctx, h, i, format, layout, halves, order, tried % 2);
                        tried++;
                    }
    check_layout(ctx, 704, 88, MOE_FORMAT_BF16, MOE_LAYOUT_MAJOR_K, MOE_HALVES_GATE_UP, MOE_ROWS_NATURAL, 1);
    check_layout(ctx, 88, 704, MOE_FORMAT_F16, MOE_LAYOUT_MAJOR_MN, MOE_HALVES_INTERLEAVED, MOE_ROWS_NATURAL, 1);
    CHECK(tried > 300);
    moe_context_destroy(ctx);
}

TEST(what_is_prepared_for_trtllm_gen_is_interleaved_then_shuffled)
{
    // The recipe for a gated W1 in bf16: [up; gate], rows alternating, rows shuffled in blocks of 32, then 128-byte
    // blocks; the two row steps in one formula, from the back end's own description.
    enum { H = 128, I = 96 };
    static uint16_t data[2 * I * H];
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = make_layer(H, I, 1, MOE_FORMAT_BF16, 1);
    moe_weights *w = NULL;
    moe_tensor t;
    for (int64_t n = 0; n < 2 * I; n++)
        for (int64_t c = 0; c < H; c++) {
            int64_t j = 32 * (n / 32) + n % 8 * 4 + n % 32 / 8, in = j % 2 == 0 ? j / 2 : I + j / 2;
            float v = in < I ? value_of(MOE_TENSOR_UP, 0, in, c) : value_of(MOE_TENSOR_GATE, 0, in - I, c);
            put_value(data, MOE_DTYPE_BF16, (c / 64 * 2 * I + n) * 64 + c % 64, v);
        }
    CHECK_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
    memset(&t, 0, sizeof t);
    t.role = MOE_TENSOR_GATE_UP;
    t.dtype = MOE_DTYPE_BF16;
    t.layout = MOE_LAYOUT_BLOCK_MAJOR_K;
    t.halves = MOE_HALVES_INTERLEAVED_UP_GATE;
    t.row_order = MOE_ROWS_SHUFFLED_128;
    t.rank = 3;
    t.dims[0] = H / 64;
    t.dims[1] = 2 * I;
    t.dims[2] = 64;
    t.data = data;
    t.data_bytes = sizeof data;
    CHECK_OK(moe_weights_set_tensor(w, &t, &err));
    CHECK(reads_as(w, MOE_TENSOR_GATE, 0, I, H, 0, 0));
    CHECK(reads_as(w, MOE_TENSOR_UP, 0, I, H, 0, 0));
    moe_weights_destroy(w);
    moe_context_destroy(ctx);
}

TEST(packed_rows_alternate_gate_and_up)
{
    // What the kernels read, not what read_row() makes of it.
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = make_layer(40, 9, 2, MOE_FORMAT_F32, 1);
    moe_weights *w;
    layer.gemm1_bias = 1;
    w = make_weights(ctx, &layer, 1);
    if (w == NULL) return;
    for (int32_t e = 0; e < 2; e++) {
        moe__block block = moe__weights_expert(w, e);
        const float *w1 = (const float *)(const void *)block.w1, *w2 = (const float *)(const void *)block.w2;
        CHECK_EQ(block.shape->rows1, 18);
        CHECK_EQ(block.shape->ld1, 64);
        CHECK_EQ(block.shape->ld2, 32);
        for (int32_t r = 0; r < 18; r++) {
            int32_t role = r % 2 == 0 ? MOE_TENSOR_GATE : MOE_TENSOR_UP;
            CHECK_EQ(block.bias1[r], value_of(r % 2 == 0 ? MOE_TENSOR_GATE_BIAS : MOE_TENSOR_UP_BIAS, e, r / 2, 0));
            for (int32_t c = 0; c < 64; c++) CHECK_EQ(w1[r * 64 + c], c < 40 ? value_of(role, e, r / 2, c) : 0);
        }
        for (int32_t r = 0; r < 40; r++)
            for (int32_t c = 0; c < 32; c++) CHECK_EQ(w2[r * 32 + c], c < 9 ? value_of(MOE_TENSOR_DOWN, e, r, c) : 0);
    }
    moe_weights_destroy(w);
    moe_context_destroy(ctx);
}

TEST(experts_without_a_gate_take_up_alone)
{
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = make_layer(40, 24, 3, MOE_FORMAT_BF16, 0);
    moe_weights *w;
    source s = make_source(MOE_TENSOR_GATE, 0, 0, 24, 40, MOE_DTYPE_BF16, 0, 0, 0, 0);
    layer.gemm1_bias = 1;
    w = make_weights(ctx, &layer, 1);
    for (int32_t e = 0; e < 3; e++) CHECK(expert_reads(w, &layer, e));
    moe_weights_destroy(w);
    CHECK_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
    CHECK_ERR(moe_weights_set_tensor(w, &s.t, &err), MOE_ERROR_ARGUMENT, "tensor.role");
    CHECK_CONTAINS(err.text, "MOE_TENSOR_UP");
    source_free(&s);
    moe_weights_destroy(w);
    moe_context_destroy(ctx);
}

TEST(other_float_types_are_rounded_to_nearest_even)
{
    // 1 + 2^-8 lies half way between two bf16 values, 1 + 3 * 2^-8 as well; f16 has 2^-11.
    static const float in[4] = { 1.00390625f, 1.01171875f, 1.00048828125f, 70000.0f };
    static const float as_bf16[4] = { 1.0f, 1.015625f, 1.0f, 70144.0f };
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = make_layer(4, 1, 1, MOE_FORMAT_BF16, 0);
    moe_weights *w = NULL;
    moe_tensor t;
    float out[4];
    memset(&t, 0, sizeof t);
    t.role = MOE_TENSOR_UP;
    t.dtype = MOE_DTYPE_F32;
    t.rank = 2;
    t.dims[0] = 1;
    t.dims[1] = 4;
    t.data = in;
    t.data_bytes = sizeof in;
    for (int32_t format = MOE_FORMAT_F32; format <= MOE_FORMAT_F16; format++) {
        layer.format = format;
        CHECK_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
        CHECK_OK(moe_weights_set_tensor(w, &t, &err));
        CHECK_OK(moe_weights_read_row(w, MOE_TENSOR_UP, 0, 0, out, &err));
        for (int i = 0; i < 4; i++) {
            if (format == MOE_FORMAT_F32) CHECK_EQ(out[i], in[i]);
            if (format == MOE_FORMAT_BF16) CHECK_EQ(out[i], as_bf16[i]);
        }
        if (format == MOE_FORMAT_F16) {
            CHECK_EQ(out[0], in[0]);
            CHECK_EQ(out[2], 1.0f);
            CHECK(out[3] > 3.4e38f); // f16 has no 70000
        }
        moe_weights_destroy(w);
    }
    moe_context_destroy(ctx);
}

// ---- ranks ----------------------------------------------------------------------------------------------------------

TEST(slices_of_tensor_parallel_ranks_make_up_the_whole)
{
    static const int32_t inner[] = { 3, 40, 41, 88 };
    moe_context *ctx = open_context(NULL, 1);
    for (int32_t n = 0; n < 4; n++)
        for (int32_t size = 1; size <= 3; size++) {
            int32_t i = inner[n], next = 0, next_shared = 0, shared = 2 * i + 6;
            for (int32_t rank = 0; rank < size; rank++) {
                moe_layer_desc layer = make_layer(40, i, 2, MOE_FORMAT_BF16, 1);
                moe_weights *w = NULL;
                const moe__block_shape *s, *ss;
                layer.gemm1_bias = layer.gemm2_bias = 1;
                layer.shared.count = 2;
                layer.shared.intermediate_size = i + 3;
                layer.parallel.tp_size = size;
                layer.parallel.tp_rank = rank;
                CHECK_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
                if (w == NULL) return;
                for (int32_t e = 0; e < 2; e++) {
                    int32_t halves = rank % 2 == 0 ? MOE_HALVES_GATE_UP : MOE_HALVES_INTERLEAVED;
                    set_source(w, make_source(MOE_TENSOR_GATE_UP, e, 0, 2 * i, 40, MOE_DTYPE_BF16, 2, halves, 0, 0));
                    set_source(w, make_source(MOE_TENSOR_GATE_UP_BIAS, e, 0, 2 * i, 0, MOE_DTYPE_F32, 0, halves, 0, 0));
                    set_source(w, make_source(MOE_TENSOR_DOWN, e, 0, 40, i, MOE_DTYPE_BF16, 1 + n % 2, 0, 0, 0));
                    set_source(w, make_source(MOE_TENSOR_DOWN_BIAS, e, 0, 40, 0, MOE_DTYPE_F32, 0, 0, 0, 0));
                }
                set_source(w,
                           make_source(MOE_TENSOR_SHARED_GATE_UP, -1, 0, 2 * shared, 40, MOE_DTYPE_BF16, 0, 2, 0, 0));
                set_source(w, make_source(MOE_TENSOR_SHARED_DOWN, -1, 0, 40, shared, MOE_DTYPE_BF16, 0, 0, 0, 0));
                CHECK_OK(moe_weights_seal(w, &err));
                s = &w->layout.expert;
                ss = &w->layout.shared;
                CHECK_EQ(s->first_feature, next);
                CHECK_EQ(ss->first_feature, next_shared);
                for (int32_t e = 0; e < 2; e++) {
                    CHECK(reads_as(w, MOE_TENSOR_GATE, e, s->features, 40, next, 0));
                    CHECK(reads_as(w, MOE_TENSOR_UP, e, s->features, 40, next, 0));
                    CHECK(reads_as(w, MOE_TENSOR_DOWN, e, 40, s->features, 0, next));
                    CHECK(reads_as(w, MOE_TENSOR_GATE_BIAS, e, s->features, 0, next, 0));
                    CHECK(reads_as(w, MOE_TENSOR_UP_BIAS, e, s->features, 0, next, 0));
                    CHECK(reads_as(w, MOE_TENSOR_DOWN_BIAS, e, 40, 0, 0, 0));
                }
                CHECK(reads_as(w, MOE_TENSOR_SHARED_GATE, -1, ss->features, 40, next_shared, 0));
                CHECK(reads_as(w, MOE_TENSOR_SHARED_UP, -1, ss->features, 40, next_shared, 0));
                CHECK(reads_as(w, MOE_TENSOR_SHARED_DOWN, -1, 40, ss->features, 0, next_shared));
                next += s->features;
                next_shared += ss->features;
                CHECK(padding_is_zero(w));
                moe_weights_destroy(w);
            }
            CHECK_EQ(next, i);
            CHECK_EQ(next_shared, shared);
        }
    moe_context_destroy(ctx);
}

TEST(experts_of_other_ranks_are_checked_but_never_read)
{
    static const int32_t map[6] = { -1, 2, -1, 0, 1, -1 };
    moe_context *ctx = open_context(NULL, 1);
    for (int32_t mapped = 0; mapped < 2; mapped++) {
        moe_layer_desc layer = make_layer(24, 8, 6, MOE_FORMAT_F32, 1);
        moe_weights *w = NULL;
        moe_weights_info info;
        memset(&info, 0, sizeof info);
        layer.parallel.local_experts = 3;
        layer.parallel.expert_map = mapped ? map : NULL;
        layer.parallel.expert_offset = mapped ? 0 : 2;
        CHECK_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
        if (w == NULL) return;
        for (int32_t e = 0; e < 6; e++) {
            int32_t local = mapped ? map[e] >= 0 : e >= 2 && e < 5;
            source s = make_source(MOE_TENSOR_GATE_UP, e, 0, 16, 24, MOE_DTYPE_F32, 0, MOE_HALVES_GATE_UP, 0, 0);
            source d = make_source(MOE_TENSOR_DOWN, e, 0, 24, 8, MOE_DTYPE_F32, 0, 0, 0, 0);
            if (!local) s.t.data = (const void *)(uintptr_t)64; // reading it would crash
            CHECK_OK(moe_weights_set_tensor(w, &s.t, &err));
            CHECK_OK(moe_weights_set_tensor(w, &d.t, &err));
            if (!local) {
                float row[24];
                s.t.dims[0]++;
                CHECK_ERR(moe_weights_set_tensor(w, &s.t, &err), MOE_ERROR_ARGUMENT, "tensor.dims");
                CHECK_ERR(moe_weights_read_row(w, MOE_TENSOR_UP, e, 0, row, &err), MOE_ERROR_ARGUMENT, "expert");
            }
            source_free(&s);
            source_free(&d);
        }
        CHECK_OK(moe_weights_seal(w, &err));
        CHECK_OK(moe_weights_get_info(w, &info, &err));
        CHECK_EQ(info.local_experts, 3);
        for (int32_t e = 0; e < 6; e++)
            if (mapped ? map[e] >= 0 : e >= 2 && e < 5) CHECK(expert_reads(w, &layer, e));
        if (mapped) CHECK(w->layer.parallel.expert_map != map); // the caller's array need not live on
        moe_weights_destroy(w);
        // a stack of all
        CHECK_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
        set_source(w, make_source(MOE_TENSOR_GATE_UP, -1, 6, 16, 24, MOE_DTYPE_F32, 0, MOE_HALVES_UP_GATE, 0, 0));
        set_source(w, make_source(MOE_TENSOR_DOWN, -1, 6, 24, 8, MOE_DTYPE_F32, 0, 0, 0, 0));
        CHECK_OK(moe_weights_seal(w, &err));
        for (int32_t e = 0; e < 6; e++)
            if (mapped ? map[e] >= 0 : e >= 2 && e < 5) CHECK(expert_reads(w, &layer, e));
        moe_weights_destroy(w);
    }
    moe_context_destroy(ctx);
}

// ---- callbacks ------------------------------------------------------------------------------------------------------

typedef struct row_source {
    int32_t rows, columns, halves, inner; // of the matrix that is yielded; columns 0: a vector of rows
    int32_t calls, last_row, last_expert, stop_at, in_order;
} row_source;

static int32_t yield_row(void *user, int32_t role, int32_t expert, int32_t row, float *out)
{
    row_source *s = (row_source *)user;
    if (s->calls++ == s->stop_at) return 42;
    if (expert == s->last_expert && row <= s->last_row) s->in_order = 0;
    s->last_row = row;
    s->last_expert = expert;
    for (int32_t c = 0; c < (s->columns == 0 ? s->rows : s->columns); c++) {
        int64_t natural = s->columns == 0 ? c : row;
        int32_t own = role;
        if (s->halves > MOE_HALVES_SEPARATE)
            own = fused_role(s->halves, natural, s->inner,
                             role == MOE_TENSOR_GATE_UP ? MOE_TENSOR_GATE : MOE_TENSOR_GATE_BIAS,
                             role == MOE_TENSOR_GATE_UP ? MOE_TENSOR_UP : MOE_TENSOR_UP_BIAS, &natural);
        out[c] = value_of(own, expert, natural, s->columns == 0 ? 0 : c);
    }
    return 0;
}

static moe_tensor rows_tensor(int32_t role, int32_t expert, int32_t halves, row_source *s)
{
    moe_tensor t;
    memset(&t, 0, sizeof t);
    t.role = role;
    t.expert = expert;
    t.halves = halves;
    t.rows = yield_row;
    t.rows_user = s;
    s->calls = 0;
    s->last_row = s->last_expert = s->stop_at = -1;
    s->in_order = 1;
    s->halves = halves;
    return t;
}

TEST(rows_from_a_callback_come_in_order_and_pack_like_data)
{
    enum { H = 40, I = 24 };
    moe_context *ctx = open_context(NULL, 1);
    for (int32_t tp = 0; tp < 2; tp++)
        for (int32_t halves = MOE_HALVES_SEPARATE; halves <= MOE_HALVES_INTERLEAVED_UP_GATE; halves++) {
            moe_layer_desc layer = make_layer(H, I, 3, MOE_FORMAT_BF16, 1);
            row_source w1 = { halves == MOE_HALVES_SEPARATE ? I : 2 * I, H, 0, I, 0, 0, 0, 0, 0 };
            row_source b1 = { halves == MOE_HALVES_SEPARATE ? I : 2 * I, 0, 0, I, 0, 0, 0, 0, 0 };
            row_source w2 = { H, I, 0, I, 0, 0, 0, 0, 0 };
            moe_weights *w = NULL;
            moe_tensor t;
            int32_t first, n;
            layer.gemm1_bias = 1;
            layer.parallel.local_experts = 2;
            layer.parallel.expert_offset = 1;
            if (tp) { layer.parallel.tp_size = 3; layer.parallel.tp_rank = 1; }
            first = tp ? 8 : 0;
            n = tp ? 8 : I;
            CHECK_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
            for (int32_t part = 0; part < (halves == MOE_HALVES_SEPARATE ? 2 : 1); part++) {
                t = rows_tensor(halves == MOE_HALVES_SEPARATE ? MOE_TENSOR_GATE + part : MOE_TENSOR_GATE_UP, -1, halves,
                                &w1);
                CHECK_OK(moe_weights_set_tensor(w, &t, &err));
                CHECK(w1.in_order);
                CHECK_EQ(w1.calls, 2 * n * (halves == MOE_HALVES_SEPARATE ? 1 : 2)); // two local experts, their slice
                t = rows_tensor(halves == MOE_HALVES_SEPARATE ? MOE_TENSOR_GATE_BIAS + part : MOE_TENSOR_GATE_UP_BIAS,
                                -1, halves, &b1);
                CHECK_OK(moe_weights_set_tensor(w, &t, &err));
                CHECK_EQ(b1.calls, 2);
            }
            t = rows_tensor(MOE_TENSOR_DOWN, 1, 0, &w2);
            CHECK_OK(moe_weights_set_tensor(w, &t, &err));
            t = rows_tensor(MOE_TENSOR_DOWN, 2, 0, &w2);
            CHECK_OK(moe_weights_set_tensor(w, &t, &err));
            CHECK_EQ(w2.calls, H);
            t = rows_tensor(MOE_TENSOR_DOWN, 0, 0, &w2); // not here
            CHECK_OK(moe_weights_set_tensor(w, &t, &err));
            CHECK_EQ(w2.calls, 0);
            CHECK_OK(moe_weights_seal(w, &err));
            for (int32_t e = 1; e < 3; e++) {
                CHECK(reads_as(w, MOE_TENSOR_GATE, e, n, H, first, 0));
                CHECK(reads_as(w, MOE_TENSOR_UP, e, n, H, first, 0));
                CHECK(reads_as(w, MOE_TENSOR_GATE_BIAS, e, n, 0, first, 0));
                CHECK(reads_as(w, MOE_TENSOR_UP_BIAS, e, n, 0, first, 0));
                CHECK(reads_as(w, MOE_TENSOR_DOWN, e, H, n, 0, first));
            }
            CHECK(padding_is_zero(w));
            moe_weights_destroy(w);
        }
    moe_context_destroy(ctx);
}

TEST(a_callback_that_stops_leaves_the_tensor_unset)
{
    counter memory;
    moe_context *ctx = open_context(&memory, 1);
    moe_layer_desc layer = make_layer(40, 24, 2, MOE_FORMAT_F16, 1);
    moe_weights *w = NULL;
    row_source s = { 24, 40, 0, 24, 0, 0, 0, 0, 0 };
    moe_tensor t;
    uint64_t before;
    CHECK_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
    before = memory.now;
    t = rows_tensor(MOE_TENSOR_UP, -1, 0, &s);
    t.name = "blk.7.up";
    s.stop_at = 30; // in the second expert
    CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_DATA, "tensor.rows");
    CHECK_CONTAINS(err.text, "blk.7.up");
    CHECK_CONTAINS(err.text, "returned 42 for row 6");
    CHECK_EQ(memory.now, before);
    t = rows_tensor(MOE_TENSOR_UP, -1, 0, &s);
    CHECK_OK(moe_weights_set_tensor(w, &t, &err)); // nothing was set
    t.dtype = MOE_DTYPE_F32;
    t.data = &s;
    CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.data");
    t = rows_tensor(MOE_TENSOR_DOWN, -1, 0, &s);
    t.layout = MOE_LAYOUT_MAJOR_MN;
    CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.rows");
    moe_weights_destroy(w);
    moe_context_destroy(ctx);
}

// ---- shared experts, tables, constants ------------------------------------------------------------------------------

TEST(shared_experts_come_in_one_block_or_one_by_one)
{
    enum { H = 40, S = 12, N = 3 };
    moe_context *ctx = open_context(NULL, 1);
    for (int32_t way = 0; way < 4; way++) { // 0 separate, 1 fused, 2 one by one, 3 one by one fused
        moe_layer_desc layer = make_layer(H, 8, 1, MOE_FORMAT_F32, 1);
        moe_weights *w;
        moe_weights_info info;
        float row[H];
        memset(&info, 0, sizeof info);
        layer.shared.count = N;
        layer.shared.intermediate_size = S;
        w = make_weights(ctx, &layer, 0);
        if (w == NULL) return;
        CHECK_OK(moe_weights_get_info(w, &info, &err));
        CHECK_EQ(info.tensors_missing, 3 * N);
        CHECK_ERR(moe_weights_read_row(w, MOE_TENSOR_SHARED_UP, -1, 0, row, &err), MOE_ERROR_MISSING, "role");
        for (int32_t turn = 0; turn < (way < 2 ? 1 : N); turn++) {
            int32_t i = way < 2 ? -1 : way == 2 ? N - 1 - turn : turn; // in any order
            int32_t rows = way < 2 ? N * S : S;
            int32_t base = way < 2 ? 0 : i * S; // of the values
            for (int32_t part = way % 2 == 0 ? 0 : 2; part < (way % 2 == 0 ? 2 : 3); part++) {
                int32_t fused = part == 2 ? 2 : 1;
                source s = make_source(MOE_TENSOR_SHARED_GATE + part, way % 2 == 0 ? -1 : 0, 0, fused * rows, H,
                                       MOE_DTYPE_F32, 0, part == 2 ? MOE_HALVES_INTERLEAVED : 0, 0, 0);
                for (int32_t r = 0; r < fused * rows; r++)
                    for (int32_t c = 0; c < H; c++) {
                        int64_t natural = r;
                        int32_t role = MOE_TENSOR_SHARED_GATE + part;
                        if (part == 2) role = fused_role(MOE_HALVES_INTERLEAVED, r, rows, role - 2, role - 1, &natural);
                        put_value(s.memory, MOE_DTYPE_F32, r * H + c, value_of(role, -1, natural + base, c));
                    }
                s.t.index = i;
                set_source(w, s);
            }
            {
                source s = make_source(MOE_TENSOR_SHARED_DOWN, -1, 0, H, rows, MOE_DTYPE_F32, 0, 0, 0, 0);
                for (int32_t r = 0; r < H; r++)
                    for (int32_t c = 0; c < rows; c++)
                        put_value(s.memory, MOE_DTYPE_F32, r * rows + c,
                                  value_of(MOE_TENSOR_SHARED_DOWN, -1, r, c + base));
                s.t.index = i;
                CHECK_OK(moe_weights_set_tensor(w, &s.t, &err));
                CHECK_ERR(moe_weights_set_tensor(w, &s.t, &err), MOE_ERROR_STATE, "tensor.role");
                s.t.index = N;
                CHECK_ERR(moe_weights_set_tensor(w, &s.t, &err), MOE_ERROR_ARGUMENT, "tensor.index");
                source_free(&s);
            }
        }
        CHECK_OK(moe_weights_seal(w, &err));
        CHECK(reads_as(w, MOE_TENSOR_SHARED_GATE, -1, N * S, H, 0, 0));
        CHECK(reads_as(w, MOE_TENSOR_SHARED_UP, -1, N * S, H, 0, 0));
        CHECK(reads_as(w, MOE_TENSOR_SHARED_DOWN, -1, H, N * S, 0, 0));
        moe_weights_destroy(w);
    }
    moe_context_destroy(ctx);
}

static moe_tensor table(int32_t role, const float *data, int32_t rank, int64_t a, int64_t b)
{
    moe_tensor t;
    memset(&t, 0, sizeof t);
    t.role = role;
    t.index = -1;
    t.dtype = MOE_DTYPE_F32;
    t.rank = rank;
    t.dims[0] = a;
    t.dims[1] = b;
    t.data = data;
    t.data_bytes = (uint64_t)(a * (rank > 1 ? b : 1)) * 4;
    return t;
}

TEST(tables_read_back_and_rows_are_padded_with_zeros)
{
    enum { H = 40, E = 5, W = 7 };
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = make_layer(H, 8, E, MOE_FORMAT_BF16, 1);
    moe_weights *w;
    moe_tensor t;
    float values[W * H], row[64];
    const float *packed;
    for (int i = 0; i < W * H; i++) values[i] = 0.1f * (float)(i + 1); // not a bf16: tables keep f32
    layer.routing.special_experts = 2;
    layer.routing.special_kind = MOE_SPECIAL_CONSTANT;
    layer.routing.bias_rows = 2;
    layer.routing.per_expert_scale = 1;
    layer.routing.global_scale = 1;
    layer.router.bias = 1;
    layer.router.input_scale = 1;
    layer.shared.count = 1;
    layer.shared.intermediate_size = 8;
    layer.shared.gate = 1;
    layer.row_norm = 1;
    layer.activation.per_expert = 1;
    layer.activation.limit = 7;
    w = make_weights(ctx, &layer, 0);
    if (w == NULL) return;
    set_source(w, make_source(MOE_TENSOR_SHARED_GATE_UP, -1, 0, 16, H, MOE_DTYPE_F32, 0, MOE_HALVES_GATE_UP, 0, 0));
    set_source(w,
               make_source(MOE_TENSOR_SHARED_DOWN, 0, 0, H, 8, MOE_DTYPE_F32, 0, 0, 0, 0)); // expert 0 is taken for -1
    t = table(MOE_TENSOR_ROUTER, values, 2, W, H);
    CHECK_OK(moe_weights_set_tensor(w, &t, &err));
    t = table(MOE_TENSOR_ROUTER_BIAS, values, 2, 1, W);
    CHECK_OK(moe_weights_set_tensor(w, &t, &err));
    t = table(MOE_TENSOR_ROUTER_INPUT_SCALE, values + 1, 1, H, 0);
    CHECK_OK(moe_weights_set_tensor(w, &t, &err));
    t = table(MOE_TENSOR_ROUTER_GLOBAL_SCALE, values + 2, 0, 1, 0);
    CHECK_OK(moe_weights_set_tensor(w, &t, &err));
    t = table(MOE_TENSOR_PER_EXPERT_SCALE, values + 3, 1, W, 0);
    CHECK_OK(moe_weights_set_tensor(w, &t, &err));
    t = table(MOE_TENSOR_SHARED_TOKEN_GATE, values + 4, 2, 1, H);
    CHECK_OK(moe_weights_set_tensor(w, &t, &err));
    t = table(MOE_TENSOR_ROW_NORM, values + 5, 1, H, 0);
    CHECK_OK(moe_weights_set_tensor(w, &t, &err));
    t = table(MOE_TENSOR_BETA, values + 6, 1, E, 0);
    CHECK_OK(moe_weights_set_tensor(w, &t, &err));
    t = table(MOE_TENSOR_SELECT_BIAS, values + 7, 2, 1, W); // [1, E]: row 1
    t.index = 1;
    CHECK_OK(moe_weights_set_tensor(w, &t, &err));
    CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_STATE, "tensor.role");
    CHECK_ERR(moe_weights_seal(w, &err), MOE_ERROR_MISSING, "weights");
    CHECK_CONTAINS(err.text, "constant of expert 5, and 2 more tensors");
    t = table(MOE_TENSOR_SELECT_BIAS, values + 8, 1, W, 0);
    t.index = 0;
    CHECK_OK(moe_weights_set_tensor(w, &t, &err));
    for (int32_t e = E; e < W; e++) {
        t = table(MOE_TENSOR_CONSTANT, values + e, 1, H, 0);
        t.expert = e;
        CHECK_OK(moe_weights_set_tensor(w, &t, &err));
        CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_STATE, "tensor.role");
    }
    CHECK_OK(moe_weights_seal(w, &err));
    for (int32_t r = 0; r < W; r++) {
        CHECK_OK(moe_weights_read_row(w, MOE_TENSOR_ROUTER, -1, r, row, &err));
        CHECK(memcmp(row, values + r * H, sizeof(float) * H) == 0);
    }
    packed = moe__weights_table(w, MOE_TENSOR_ROUTER);
    for (int32_t i = 0; i < W * w->layout.router_ld; i++)
        if (i % w->layout.router_ld >= H) CHECK_EQ(packed[i], 0.0f);
    CHECK_EQ(w->layout.router_ld, 64);
#define READS(role, expert, r, from, n) \
    do { \
        CHECK_OK(moe_weights_read_row(w, role, expert, r, row, &err)); \
        CHECK(memcmp(row, values + (from), sizeof(float) * (size_t)(n)) == 0); \
    } while (0)
    READS(MOE_TENSOR_ROUTER_BIAS, -1, 0, 0, W);
    READS(MOE_TENSOR_ROUTER_INPUT_SCALE, -1, 0, 1, H);
    READS(MOE_TENSOR_ROUTER_GLOBAL_SCALE, -1, 0, 2, 1);
    READS(MOE_TENSOR_PER_EXPERT_SCALE, -1, 0, 3, W);
    READS(MOE_TENSOR_SHARED_TOKEN_GATE, -1, 0, 4, H);
    READS(MOE_TENSOR_ROW_NORM, -1, 0, 5, H);
    READS(MOE_TENSOR_BETA, -1, 0, 6, E);
    READS(MOE_TENSOR_SELECT_BIAS, -1, 1, 7, W);
    READS(MOE_TENSOR_SELECT_BIAS, -1, 0, 8, W);
    READS(MOE_TENSOR_CONSTANT, 5, 0, 5, H);
    READS(MOE_TENSOR_CONSTANT, 6, 0, 6, H);
    CHECK_OK(moe_weights_read_row(w, MOE_TENSOR_LIMIT, -1, 0, row, &err)); // not set: the layer's
    for (int e = 0; e < E; e++) CHECK_EQ(row[e], 7.0f);
    CHECK_EQ(moe_weights_row(w, MOE_TENSOR_ALPHA, -1, 0, row), 0);
    for (int e = 0; e < E; e++) CHECK_EQ(row[e], 1.0f);
    CHECK_ERR(moe_weights_read_row(w, MOE_TENSOR_SELECT_BIAS, -1, 2, row, &err), MOE_ERROR_ARGUMENT, "row");
    CHECK_ERR(moe_weights_read_row(w, MOE_TENSOR_UP, 0, 8, row, &err), MOE_ERROR_ARGUMENT, "row");
    CHECK_ERR(moe_weights_read_row(w, MOE_TENSOR_UP, 0, -1, row, &err), MOE_ERROR_ARGUMENT, "row");
    CHECK_ERR(moe_weights_read_row(w, MOE_TENSOR_FORCED_IDS, -1, 0, row, &err), MOE_ERROR_MISSING, "role");
    CHECK_ERR(moe_weights_read_row(w, MOE_TENSOR_GATE_UP, 0, 0, row, &err), MOE_ERROR_ARGUMENT, "role");
    CHECK_ERR(moe_weights_read_row(w, 99, 0, 0, row, &err), MOE_ERROR_ARGUMENT, "role");
    CHECK_ERR(moe_weights_read_row(w, MOE_TENSOR_UP, 5, 0, row, &err), MOE_ERROR_ARGUMENT, "expert");
    CHECK_ERR(moe_weights_read_row(w, MOE_TENSOR_CONSTANT, 0, 0, row, &err), MOE_ERROR_MISSING, "role");
    moe_weights_destroy(w);
    moe_context_destroy(ctx);
}

TEST(the_selection_bias_may_come_whole_in_any_layout)
{
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = make_layer(8, 8, 4, MOE_FORMAT_F32, 0);
    float values[12], row[4];
    layer.routing.bias_rows = 3;
    for (int i = 0; i < 12; i++) values[i] = (float)i;
    for (int32_t layout = 1; layout <= 2; layout++) {
        moe_weights *w = make_weights(ctx, &layer, 0);
        moe_tensor t = table(MOE_TENSOR_SELECT_BIAS, values, 2, layout == 1 ? 3 : 4, layout == 1 ? 4 : 3);
        t.layout = layout;
        t.index = 2;
        CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.index");
        t.index = 0; // zero-initialised
        CHECK_OK(moe_weights_set_tensor(w, &t, &err));
        CHECK_OK(moe_weights_seal(w, &err));
        for (int32_t r = 0; r < 3; r++) {
            CHECK_OK(moe_weights_read_row(w, MOE_TENSOR_SELECT_BIAS, -1, r, row, &err));
            for (int e = 0; e < 4; e++) CHECK_EQ(row[e], (float)(layout == 1 ? r * 4 + e : e * 3 + r));
        }
        moe_weights_destroy(w);
    }
    moe_context_destroy(ctx);
}

TEST(forced_ids_are_checked_against_the_experts)
{
    enum { E = 6 };
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = make_layer(8, 8, E, MOE_FORMAT_F32, 1);
    moe_weights *w;
    int64_t wide[6] = { 0, 1, 2, 3, 6, 5 };
    int32_t narrow[6] = { 0, 1, 2, 3, 6, 5 };
    float row[2];
    moe_tensor t;
    layer.routing.forced_rows = 3;
    layer.routing.top_k = 2;
    layer.routing.special_experts = 1;
    layer.routing.special_kind = MOE_SPECIAL_ZERO;
    for (int32_t dtype = MOE_DTYPE_I32; dtype <= MOE_DTYPE_I64; dtype += 2) {
        w = make_weights(ctx, &layer, 0);
        if (w == NULL) return;
        t = table(MOE_TENSOR_FORCED_IDS, NULL, 2, 3, 2);
        t.dtype = dtype;
        t.data = dtype == MOE_DTYPE_I64 ? (const void *)wide : (const void *)narrow;
        t.data_bytes = dtype == MOE_DTYPE_I64 ? sizeof wide : sizeof narrow;
        for (int32_t bad = 0; bad < 3; bad++) {
            wide[3] = bad == 0 ? 7 : bad == 1 ? -1 : (int64_t)1 << 32;
            narrow[3] = bad == 0 ? 7 : bad == 1 ? -1 : INT32_MIN;
            CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_DATA, "tensor.data");
            CHECK_CONTAINS(err.text, "in row 1: ids are 0..6");
        }
        wide[3] = narrow[3] = 3;
        CHECK_OK(moe_weights_set_tensor(w, &t, &err)); // the refused ones left nothing behind
        CHECK_OK(moe_weights_seal(w, &err));
        CHECK_OK(moe_weights_read_row(w, MOE_TENSOR_FORCED_IDS, -1, 2, row, &err));
        CHECK_EQ(row[0], 6.0f);
        CHECK_EQ(row[1], 5.0f);
        moe_weights_destroy(w);
    }
    w = make_weights(ctx, &layer, 0);
    t.dtype = MOE_DTYPE_F32;
    CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.dtype");
    moe_weights_destroy(w);
    moe_context_destroy(ctx);
}

TEST(a_pruned_expert_is_a_constant_instead_of_matrices)
{
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = make_layer(40, 8, 3, MOE_FORMAT_BF16, 1);
    moe_weights *w = NULL;
    float values[40], row[40];
    moe_tensor t = table(MOE_TENSOR_CONSTANT, values, 1, 40, 0);
    source s = make_source(MOE_TENSOR_UP, 1, 0, 8, 40, MOE_DTYPE_BF16, 0, 0, 0, 0);
    for (int i = 0; i < 40; i++) values[i] = 0.3f * (float)i;
    CHECK_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
    set_plain_expert(w, &layer, 0);
    set_plain_expert(w, &layer, 2);
    t.expert = 0;
    CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_STATE, "tensor.role");
    t.expert = 1;
    CHECK_OK(moe_weights_set_tensor(w, &t, &err));
    CHECK_ERR(moe_weights_set_tensor(w, &s.t, &err), MOE_ERROR_STATE, "tensor.role");
    CHECK_CONTAINS(err.text, "matrices or a constant");
    CHECK_OK(moe_weights_seal(w, &err));
    CHECK_OK(moe_weights_read_row(w, MOE_TENSOR_CONSTANT, 1, 0, row, &err));
    CHECK(memcmp(row, values, sizeof values) == 0);
    CHECK(moe__weights_expert_constant(w, 1) != NULL && moe__weights_expert_constant(w, 0) == NULL);
    CHECK_ERR(moe_weights_read_row(w, MOE_TENSOR_UP, 1, 0, row, &err), MOE_ERROR_MISSING, "role");
    t.expert = -1;
    CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.expert");
    source_free(&s);
    moe_weights_destroy(w);
    moe_context_destroy(ctx);
}

TEST(always_on_experts_lie_behind_the_routed_and_special_ones)
{
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = make_layer(24, 8, 3, MOE_FORMAT_F32, 1);
    moe_weights *w = NULL;
    source s;
    layer.routing.special_experts = 1;
    layer.routing.special_kind = MOE_SPECIAL_IDENTITY;
    layer.routing.extra_slots = 2;
    layer.routing.extra_scored = 1;
    for (int32_t omit = 0; omit < 2; omit++) {
        layer.parallel.omit_common = omit;
        w = make_weights(ctx, &layer, omit);
        if (w == NULL) return;
        if (!omit) {
            s = make_source(MOE_TENSOR_UP, 3, 0, 8, 24, MOE_DTYPE_F32, 0, 0, 0, 0);
            CHECK_ERR(moe_weights_set_tensor(w, &s.t, &err), MOE_ERROR_ARGUMENT, "tensor.expert");
            CHECK_CONTAINS(err.text, "special");
            s.t.expert = 6;
            CHECK_ERR(moe_weights_set_tensor(w, &s.t, &err), MOE_ERROR_ARGUMENT, "tensor.expert");
            source_free(&s);
            CHECK_ERR(moe_weights_seal(w, &err), MOE_ERROR_MISSING, "weights");
            CHECK_CONTAINS(err.text, "gate of expert 4, and 5 more tensors");
            set_plain_expert(w, &layer, 4);
            set_plain_expert(w, &layer, 5);
            CHECK_OK(moe_weights_seal(w, &err));
            CHECK(expert_reads(w, &layer, 4));
            CHECK(expert_reads(w, &layer, 5));
        }
        CHECK_EQ(w->layout.blocks, omit ? 3 : 5);
        moe_weights_destroy(w);
    }
    moe_context_destroy(ctx);
}

// ---- refusals -------------------------------------------------------------------------------------------------------

TEST(a_tensor_of_the_wrong_shape_is_refused_by_name_with_the_right_one)
{
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = make_layer(2048, 768, 16, MOE_FORMAT_BF16, 1);
    moe_weights *w = NULL;
    moe_tensor t;
    static const char bytes[16];
    CHECK_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
    memset(&t, 0, sizeof t);
    t.name = "model.layers.7.mlp.experts.12.up_proj.weight";
    t.role = MOE_TENSOR_UP;
    t.expert = 12;
    t.dtype = MOE_DTYPE_BF16;
    t.rank = 2;
    t.dims[0] = 704;
    t.dims[1] = 2048;
    t.data = bytes;
    t.data_bytes = 704 * 2048 * 2;
    CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.dims");
    CHECK_STR(err.text, "moe: tensor.dims of \"model.layers.7.mlp.experts.12.up_proj.weight\" (up of expert 12) is "
                        "[704, 2048] bf16: it must be [768, 2048], from layer.intermediate_size, layer.hidden_size");
    t.role = MOE_TENSOR_GATE_UP;
    t.halves = MOE_HALVES_INTERLEAVED;
    t.layout = MOE_LAYOUT_MAJOR_MN;
    t.expert = -1;
    t.rank = 3;
    t.dims[0] = 16;
    t.dims[1] = 1536;
    t.dims[2] = 2048;
    t.name = NULL;
    CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.dims");
    CHECK_STR(err.text, "moe: tensor.dims of gate_up is [16, 1536, 2048] bf16: it must be [16, 2048, 1536], from "
                        "layer.num_experts, layer.hidden_size, 2 x layer.intermediate_size");
    t.expert = 0;
    t.layout = 0;
    CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.dims");
    CHECK_CONTAINS(err.text, "a stack of all experts has expert -1");
    t.layout = MOE_LAYOUT_BLOCK_MAJOR_K;
    CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.dims");
    CHECK_CONTAINS(err.text, "it must be [32, 1536, 64]");
    t.layout = 0;
    t.rank = 2;
    t.dims[0] = 1536;
    t.dims[1] = 2048;
    t.data_bytes = 17;
    CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.data_bytes");
    CHECK_CONTAINS(err.text, "is 17: dims and dtype make 6291456");
    t.dims[0] = INT64_MAX;
    CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.dims");
    t.rank = 5;
    CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.rank");
    moe_weights_destroy(w);
    moe_context_destroy(ctx);
}

TEST(every_member_of_a_tensor_is_refused_by_name)
{
    enum { ROLE, PART, EXPERT, EXPERT_LOW, DTYPE, DTYPE_INT, DTYPE_FP8, LAYOUT, HALVES, HALVES_FUSED, ORDER, ORDER_ROWS,
           MEMORY, MEMORY_DEVICE, DATA, RANK, BLOCK, STRUCT, PART_SCALE, NOT_OF_LAYER, CASES };
    static const char *const members[CASES] = {
        "tensor.role",      "tensor.part",      "tensor.expert",      "tensor.expert", "tensor.dtype",
        "tensor.dtype",     "tensor.dtype",     "tensor.layout",      "tensor.halves", "tensor.halves",
        "tensor.row_order", "tensor.row_order", "tensor.memory",      "tensor.memory", "tensor.data",
        "tensor.rank",      "tensor.layout",    "tensor.struct_size", "tensor.part",   "tensor.role",
    };
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = make_layer(40, 24, 2, MOE_FORMAT_F32, 1);
    moe_weights *w = NULL;
    moe_tensor none;
    CHECK_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
    for (int32_t i = 0; i < CASES; i++) {
        source s = make_source(i == HALVES_FUSED ? MOE_TENSOR_GATE_UP : MOE_TENSOR_UP, 1, 0,
                               i == HALVES_FUSED ? 48 : 24, 40, MOE_DTYPE_F32, 0, i == HALVES_FUSED ? 2 : 0, 0, 0);
        int32_t code =
            i == MEMORY_DEVICE ? MOE_ERROR_UNSUPPORTED : MOE_ERROR_ARGUMENT;
        switch (i) {
        case ROLE: s.t.role = MOE_TENSOR_ROLES; break;
        case PART: s.t.part = 7; break;
        case EXPERT: s.t.expert = 2; break;
        case EXPERT_LOW: s.t.expert = -2; break;
        case DTYPE: s.t.dtype = 0; break;
        case DTYPE_INT: s.t.dtype = MOE_DTYPE_I8; break;
        case DTYPE_FP8: s.t.dtype = MOE_DTYPE_E4M3; break;
        case LAYOUT: s.t.layout = 7; break;
        case HALVES: s.t.halves = MOE_HALVES_GATE_UP; break;
        case HALVES_FUSED: s.t.halves = MOE_HALVES_SEPARATE; break;
        case ORDER: s.t.row_order = 3; break;
        case ORDER_ROWS: s.t.row_order = MOE_ROWS_SHUFFLED_128; break;
        case MEMORY: s.t.memory = 2; break;
        case MEMORY_DEVICE: s.t.memory = MOE_MEMORY_DEVICE; break;
        case DATA: s.t.data = NULL; break;
        case RANK: s.t.rank = -1; break;
        case BLOCK: s.t.layout = MOE_LAYOUT_BLOCK_MAJOR_K; break;
        case STRUCT: s.t.struct_size = 8; break;
        case PART_SCALE: s.t.part = MOE_PART_SCALE; break;
        default: s.t.role = MOE_TENSOR_UP_BIAS; break;
        }
        CHECK_ERR(moe_weights_set_tensor(w, &s.t, &err), code, members[i]);
        source_free(&s);
    }
    memset(&none, 0, sizeof none);
    CHECK_ERR(moe_weights_set_tensor(w, &none, &err), MOE_ERROR_ARGUMENT, "tensor.role");
    CHECK_ERR(moe_weights_set_tensor(NULL, &none, &err), MOE_ERROR_ARGUMENT, "weights");
    CHECK_ERR(moe_weights_set_tensor(w, NULL, &err), MOE_ERROR_ARGUMENT, "tensor");
    CHECK_EQ(moe_weights_set_tensor(w, &none, NULL), MOE_ERROR_ARGUMENT);
    moe_weights_destroy(w);
    moe_context_destroy(ctx);
}

TEST(a_role_that_the_layer_does_not_have_is_refused_with_the_member_that_says_so)
{
    static const struct { int32_t role; const char *member; } cases[] = {
        { MOE_TENSOR_GATE_BIAS, "layer.gemm1_bias" }, { MOE_TENSOR_GATE_UP_BIAS, "layer.gemm1_bias" },
        { MOE_TENSOR_DOWN_BIAS, "layer.gemm2_bias" }, { MOE_TENSOR_SHARED_UP, "layer.shared.count" },
        { MOE_TENSOR_SHARED_DOWN, "layer.shared.count" }, { MOE_TENSOR_SHARED_TOKEN_GATE, "layer.shared.gate" },
        { MOE_TENSOR_ROUTER_BIAS, "layer.router.bias" }, { MOE_TENSOR_ROUTER_INPUT_SCALE, "layer.router.input_scale" },
        { MOE_TENSOR_ROUTER_GLOBAL_SCALE, "layer.routing.global_scale" },
        { MOE_TENSOR_SELECT_BIAS, "layer.routing.bias_rows" },
        { MOE_TENSOR_PER_EXPERT_SCALE, "layer.routing.per_expert_scale" },
        { MOE_TENSOR_FORCED_IDS, "layer.routing.forced_rows" }, { MOE_TENSOR_ALPHA, "layer.activation.per_expert" },
        { MOE_TENSOR_LIMIT, "layer.activation.per_expert" }, { MOE_TENSOR_ROW_NORM, "layer.row_norm" },
    };
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = make_layer(8, 8, 2, MOE_FORMAT_F32, 1);
    moe_weights *w = NULL;
    float value[8], row[8];
    memset(value, 0, sizeof value);
    CHECK_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        moe_tensor t = table(cases[i].role, value, 1, 8, 0);
        CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_ARGUMENT, "tensor.role");
        CHECK_CONTAINS(err.text, cases[i].member);
        if (cases[i].role == MOE_TENSOR_GATE_UP_BIAS) continue;
        CHECK_ERR(moe_weights_read_row(w, cases[i].role, 0, 0, row, &err), MOE_ERROR_MISSING, "role");
        CHECK_CONTAINS(err.text, cases[i].member);
    }
    moe_weights_destroy(w);
    moe_context_destroy(ctx);
}

TEST(a_missing_tensor_is_named_and_all_are_counted)
{
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = make_layer(24, 8, 4, MOE_FORMAT_F32, 1);
    moe_weights *w = NULL;
    moe_weights_info info;
    memset(&info, 0, sizeof info);
    layer.gemm1_bias = layer.gemm2_bias = 1;
    CHECK_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
    CHECK_OK(moe_weights_get_info(w, &info, &err));
    CHECK_EQ(info.tensors_set, 0);
    CHECK_EQ(info.tensors_missing, 24);
    CHECK_EQ(info.sealed, 0);
    for (int32_t e = 3; e >= 0; e--) {
        if (e == 2) continue;
        set_plain_expert(w, &layer, e);
    }
    set_source(w, make_source(MOE_TENSOR_GATE_UP, 2, 0, 16, 24, MOE_DTYPE_F32, 0, MOE_HALVES_GATE_UP, 0, 0));
    CHECK_ERR(moe_weights_seal(w, &err), MOE_ERROR_MISSING, "weights");
    CHECK_STR(err.text, "moe: weights lack down of expert 2, and 3 more tensors");
    set_source(w, make_source(MOE_TENSOR_GATE_UP_BIAS, 2, 0, 16, 0, MOE_DTYPE_F32, 0, MOE_HALVES_GATE_UP, 0, 0));
    set_source(w, make_source(MOE_TENSOR_DOWN, 2, 0, 24, 8, MOE_DTYPE_F32, 0, 0, 0, 0));
    CHECK_ERR(moe_weights_seal(w, &err), MOE_ERROR_MISSING, "weights");
    CHECK_STR(err.text, "moe: weights lack down bias of expert 2");
    set_source(w, make_source(MOE_TENSOR_DOWN_BIAS, 2, 0, 24, 0, MOE_DTYPE_F32, 0, 0, 0, 0));
    CHECK_OK(moe_weights_seal(w, &err));
    CHECK_OK(moe_weights_get_info(w, &info, &err));
    CHECK_EQ(info.tensors_set, 24);
    CHECK_EQ(info.tensors_missing, 0);
    CHECK_EQ(info.sealed, 1);
    moe_weights_destroy(w);
    moe_context_destroy(ctx);
}

TEST(the_router_is_optional_but_not_without_its_bias)
{
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = make_layer(8, 8, 2, MOE_FORMAT_F32, 1);
    float values[16];
    moe_tensor t = table(MOE_TENSOR_ROUTER, values, 2, 2, 8);
    moe_weights *w;
    memset(values, 0, sizeof values);
    layer.router.bias = 1;
    w = make_weights(ctx, &layer, 1); // engines may bring logits
    moe_weights_destroy(w);
    w = make_weights(ctx, &layer, 0);
    CHECK_OK(moe_weights_set_tensor(w, &t, &err));
    CHECK_ERR(moe_weights_seal(w, &err), MOE_ERROR_MISSING, "weights");
    CHECK_CONTAINS(err.text, "router bias");
    moe_weights_destroy(w);
    moe_context_destroy(ctx);
}

TEST(a_router_that_is_not_of_the_type_that_the_layer_says_is_refused)
{
    static const int dtypes[] = { 0, MOE_DTYPE_F32, MOE_DTYPE_BF16 };
    moe_context *ctx = open_context(NULL, 1);
    moe_plan *plan;
    for (int i = 0; i < 6; i++) {
        moe_layer_desc layer = make_layer(8, 8, 2, MOE_FORMAT_F32, 1);
        float values[16];
        moe_tensor t = table(MOE_TENSOR_ROUTER, values, 2, 2, 8);
        moe_execute_args args;
        moe_weights *w;
        int narrow = i % 2, dtype = dtypes[i / 2], result;
        for (int j = 0; j < 16; j++) values[j] = j == 15 && !narrow ? 0.1f : (float)j;
        layer.router.dtype = dtype;
        w = make_weights(ctx, &layer, 0);
        CHECK_OK(moe_weights_set_tensor(w, &t, &err));
        result = moe_weights_seal(w, &err);
        CHECK_EQ(result, dtype == MOE_DTYPE_BF16 && !narrow ? MOE_ERROR_DATA : MOE_OK);
        if (result != MOE_OK) CHECK_CONTAINS(err.text, "layer.router.dtype is BF16");
        layer.router.dtype = dtype == 0 ? MOE_DTYPE_F32 : 0; // another plan's
        REQUIRE_OK(moe_plan_create(ctx, &layer, NULL, &plan, &err));
        memset(&args, 0, sizeof args);
        if (result == MOE_OK) {
            CHECK_ERR(moe_execute_check(plan, w, &args, &err), MOE_ERROR_ARGUMENT, "weights");
            CHECK_CONTAINS(err.text, "layer.router.dtype");
        }
        moe_plan_destroy(plan);
        moe_weights_destroy(w);
    }
    moe_context_destroy(ctx);
}

TEST(a_tensor_given_twice_is_refused_by_name_whole_or_in_part)
{
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = make_layer(24, 8, 2, MOE_FORMAT_F32, 1);
    moe_weights *w = make_weights(ctx, &layer, 0);
    source s[4];
    float values[48];
    moe_tensor t = table(MOE_TENSOR_ROUTER, values, 2, 2, 24);
    memset(values, 0, sizeof values);
    s[0] = make_source(MOE_TENSOR_UP, 1, 0, 8, 24, MOE_DTYPE_F32, 0, 0, 0, 0);
    s[1] = make_source(MOE_TENSOR_GATE_UP, 1, 0, 16, 24, MOE_DTYPE_F32, 0, MOE_HALVES_GATE_UP, 0, 0);
    s[2] = make_source(MOE_TENSOR_DOWN, -1, 2, 24, 8, MOE_DTYPE_F32, 0, 0, 0, 0);
    s[3] = make_source(MOE_TENSOR_GATE, 0, 0, 8, 24, MOE_DTYPE_F32, 0, 0, 0, 0);
    for (int32_t i = 0; i < 4; i++) {
        s[i].t.name = "this.one";
        memset(s[i].memory, 0, (size_t)s[i].t.data_bytes);
        CHECK_ERR(moe_weights_set_tensor(w, &s[i].t, &err), MOE_ERROR_STATE, "tensor.role");
        CHECK_CONTAINS(err.text, "this.one");
        source_free(&s[i]);
    }
    CHECK(expert_reads(w, &layer, 0) && expert_reads(w, &layer, 1)); // what was refused changed nothing
    CHECK_OK(moe_weights_set_tensor(w, &t, &err));
    CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_STATE, "tensor.role");
    moe_weights_destroy(w);
    moe_context_destroy(ctx);
}

TEST(sealed_weights_refuse_tensors_and_a_second_seal)
{
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = make_layer(24, 8, 2, MOE_FORMAT_F32, 1);
    moe_weights *w = make_weights(ctx, &layer, 1);
    source s = make_source(MOE_TENSOR_UP, 1, 0, 8, 24, MOE_DTYPE_F32, 0, 0, 0, 0);
    s.t.name = "late";
    CHECK_ERR(moe_weights_set_tensor(w, &s.t, &err), MOE_ERROR_STATE, "weights");
    CHECK_CONTAINS(err.text, "late");
    CHECK_ERR(moe_weights_seal(w, &err), MOE_ERROR_STATE, "weights");
    CHECK_ERR(moe_weights_seal(NULL, &err), MOE_ERROR_ARGUMENT, "weights");
    source_free(&s);
    moe_weights_destroy(w);
    moe_context_destroy(ctx);
}

TEST(create_refuses_what_it_cannot_hold)
{
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = make_layer(24, 8, 2, MOE_FORMAT_F32, 1);
    moe_weights *w = (moe_weights *)ctx;
    moe_weights_desc desc;
    moe_weights_info info;
    static unsigned char memory[65536];
    unsigned char *aligned = memory + (256 - (uintptr_t)memory % 256) % 256;
    memset(&info, 0, sizeof info);
    memset(&desc, 0, sizeof desc);
    CHECK_ERR(moe_weights_create(NULL, &layer, NULL, &w, &err), MOE_ERROR_ARGUMENT, "ctx");
    CHECK(w == NULL);
    CHECK_ERR(moe_weights_create(ctx, NULL, NULL, &w, &err), MOE_ERROR_ARGUMENT, "layer");
    CHECK_ERR(moe_weights_create(ctx, &layer, NULL, NULL, &err), MOE_ERROR_ARGUMENT, "out");
    desc.struct_size = 4;
    CHECK_ERR(moe_weights_create(ctx, &layer, &desc, &w, &err), MOE_ERROR_ARGUMENT, "desc.struct_size");
    desc.struct_size = sizeof desc;
    desc.memory_kind = MOE_MEMORY_DEVICE;
    CHECK_ERR(moe_weights_create(ctx, &layer, &desc, &w, &err), MOE_ERROR_UNSUPPORTED, "desc.memory_kind");
    desc.memory_kind = 3;
    CHECK_ERR(moe_weights_create(ctx, &layer, &desc, &w, &err), MOE_ERROR_ARGUMENT, "desc.memory_kind");
    desc.memory_kind = MOE_MEMORY_HOST;
    desc.memory_bytes = 65536 - 256;
    CHECK_ERR(moe_weights_create(ctx, &layer, &desc, &w, &err), MOE_ERROR_ARGUMENT, "desc.memory");
    desc.memory = aligned + 16;
    CHECK_ERR(moe_weights_create(ctx, &layer, &desc, &w, &err), MOE_ERROR_ARGUMENT, "desc.memory");
    desc.memory = aligned;
    desc.memory_bytes = 100;
    CHECK_ERR(moe_weights_create(ctx, &layer, &desc, &w, &err), MOE_ERROR_ARGUMENT, "desc.memory_bytes");
    CHECK(w == NULL);
    layer.format = MOE_FORMAT_F32;
    layer.hidden_size = 0;
    CHECK_ERR(moe_weights_create(ctx, &layer, NULL, &w, &err), MOE_ERROR_ARGUMENT, "layer.hidden_size");
    layer.hidden_size = 24;
    desc.memory_bytes = 65536 - 256;
    memset(memory, 0xee, sizeof memory);
    CHECK_OK(moe_weights_create(ctx, &layer, &desc, &w, &err)); // the caller's memory, any contents
    for (int32_t e = 0; w != NULL && e < 2; e++) set_plain_expert(w, &layer, e);
    CHECK_OK(moe_weights_seal(w, &err));
    CHECK(w->expert[0] == aligned);
    CHECK(expert_reads(w, &layer, 0) && expert_reads(w, &layer, 1));
    CHECK(padding_is_zero(w));
    CHECK_OK(moe_weights_get_info(w, &info, &err));
    CHECK_EQ(aligned[info.weight_bytes], 0xee);
    moe_weights_destroy(w);
    moe_weights_destroy(NULL);
    moe_context_destroy(ctx);
}

// ---- replacing ------------------------------------------------------------------------------------------------------

static void replacement(source *s, const moe_layer_desc *l, int32_t expert, int32_t values_of)
{
    int32_t h = l->hidden_size, i = l->intermediate_size, d = dtype_of(l->format);
    s[0] = make_source(MOE_TENSOR_GATE_UP, values_of, 0, 2 * i, h, d, 0, MOE_HALVES_GATE_UP, 0, 0);
    s[1] = make_source(MOE_TENSOR_DOWN, values_of, 0, h, i, d, 0, 0, 0, 0);
    s[0].t.expert = s[1].t.expert = expert;
}

// Expert `e` holds the values made for expert `values_of`.
static int holds(const moe_weights *w, int32_t e, int32_t values_of)
{
    float row[64];
    if (moe_weights_read_row(w, MOE_TENSOR_GATE, e, 1, row, NULL) != MOE_OK) return 0;
    if (row[3] != value_of(MOE_TENSOR_GATE, values_of, 1, 3) || row[5] != value_of(MOE_TENSOR_GATE, values_of, 1, 5))
        return 0;
    if (moe_weights_read_row(w, MOE_TENSOR_DOWN, e, 2, row, NULL) != MOE_OK) return 0;
    return row[1] == value_of(MOE_TENSOR_DOWN, values_of, 2, 1) && row[7] == value_of(MOE_TENSOR_DOWN, values_of, 2, 7);
}

TEST(a_replaced_expert_holds_the_new_values_and_a_refused_one_the_old)
{
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = make_layer(40, 8, 4, MOE_FORMAT_BF16, 1);
    moe_weights *w;
    source s[2];
    moe_tensor t[3];
    float constant[40], row[40];
    layer.parallel.local_experts = 3;
    w = make_weights(ctx, &layer, 0);
    replacement(s, &layer, 2, 77);
    t[0] = s[0].t;
    t[1] = s[1].t;
    CHECK_ERR(moe_weights_replace_expert(w, 2, t, 2, NULL, &err), MOE_ERROR_STATE, "weights");
    CHECK_OK(moe_weights_seal(w, &err));
    CHECK_ERR(moe_weights_replace_expert(w, 2, t, 1, NULL, &err), MOE_ERROR_MISSING, "tensors");
    CHECK_CONTAINS(err.text, "down of expert 2");
    CHECK_ERR(moe_weights_replace_expert(w, 2, t, 0, NULL, &err), MOE_ERROR_ARGUMENT, "count");
    CHECK_ERR(moe_weights_replace_expert(w, 2, NULL, 2, NULL, &err), MOE_ERROR_ARGUMENT, "tensors");
    CHECK_ERR(moe_weights_replace_expert(w, 3, t, 2, NULL, &err), MOE_ERROR_ARGUMENT, "expert"); // another rank's
    CHECK_ERR(moe_weights_replace_expert(w, 1, t, 2, NULL, &err), MOE_ERROR_ARGUMENT, "tensor.expert");
    t[2] = t[1];
    CHECK_ERR(moe_weights_replace_expert(w, 2, t, 3, NULL, &err), MOE_ERROR_STATE, "tensor.role");
    t[1].dims[0] = 41;
    CHECK_ERR(moe_weights_replace_expert(w, 2, t, 2, NULL, &err), MOE_ERROR_ARGUMENT, "tensor.dims");
    t[1].dims[0] = 40;
    for (int32_t e = 0; e < 3; e++) CHECK(expert_reads(w, &layer, e));
    CHECK_OK(moe_weights_replace_expert(w, 2, t, 2, NULL, &err));
    CHECK(holds(w, 2, 77));
    CHECK(padding_is_zero(w));
    CHECK(expert_reads(w, &layer, 0) && expert_reads(w, &layer, 1));
    t[0] = table(MOE_TENSOR_CONSTANT, constant, 1, 40, 0); // a pruned expert, and back
    t[0].expert = 2;
    for (int i = 0; i < 40; i++) constant[i] = (float)i;
    CHECK_OK(moe_weights_replace_expert(w, 2, t, 1, NULL, &err));
    CHECK_OK(moe_weights_read_row(w, MOE_TENSOR_CONSTANT, 2, 0, row, &err));
    CHECK_EQ(row[39], 39.0f);
    t[0] = s[0].t;
    CHECK_OK(moe_weights_replace_expert(w, 2, t, 2, NULL, &err));
    CHECK(holds(w, 2, 77));
    source_free(&s[0]);
    source_free(&s[1]);
    moe_weights_destroy(w);
    moe_context_destroy(ctx);
}

// ---- files ----------------------------------------------------------------------------------------------------------

static moe_layer_desc file_layer(void)
{
    moe_layer_desc layer = make_layer(40, 9, 4, MOE_FORMAT_BF16, 1);
    layer.gemm1_bias = layer.gemm2_bias = 1;
    layer.routing.bias_rows = 2;
    layer.routing.forced_rows = 2;
    layer.routing.special_experts = 1;
    layer.routing.special_kind = MOE_SPECIAL_CONSTANT;
    layer.routing.extra_slots = 1;
    layer.shared.count = 2;
    layer.shared.intermediate_size = 5;
    layer.layer_index = 3;
    return layer;
}

// Weights with a tensor of every kind.
static moe_weights *file_weights(moe_context *ctx, const moe_layer_desc *layer)
{
    static const int32_t ids[2] = { 4, 0 };
    moe_weights *w = make_weights(ctx, layer, 0);
    float values[40];
    moe_tensor t;
    if (w == NULL) return NULL;
    for (int i = 0; i < 40; i++) values[i] = 0.7f * (float)i;
    set_plain_expert(w, layer, 5);
    t = table(MOE_TENSOR_CONSTANT, values, 1, 40, 0);
    t.expert = 4;
    CHECK_OK(moe_weights_set_tensor(w, &t, &err));
    t = table(MOE_TENSOR_SELECT_BIAS, values, 2, 2, 5);
    CHECK_OK(moe_weights_set_tensor(w, &t, &err));
    t = table(MOE_TENSOR_FORCED_IDS, NULL, 2, 2, 1);
    t.dtype = MOE_DTYPE_I32;
    t.data = ids;
    CHECK_OK(moe_weights_set_tensor(w, &t, &err));
    set_source(w, make_source(MOE_TENSOR_SHARED_GATE_UP, -1, 0, 20, 40, MOE_DTYPE_BF16, 0, MOE_HALVES_GATE_UP, 0, 0));
    set_source(w, make_source(MOE_TENSOR_SHARED_DOWN, -1, 0, 40, 10, MOE_DTYPE_BF16, 0, 0, 0, 0));
    CHECK_OK(moe_weights_seal(w, &err));
    return w;
}

static unsigned char *read_file(const char *path, size_t *size)
{
    FILE *f = fopen(path, "rb");
    unsigned char *data;
    if (f == NULL) return NULL;
    fseek(f, 0, SEEK_END);
    *size = (size_t)ftell(f);
    rewind(f);
    data = (unsigned char *)malloc(*size + 1);
    if (fread(data, 1, *size, f) != *size) *size = 0;
    fclose(f);
    return data;
}

static void write_file(const char *path, const unsigned char *data, size_t size)
{
    FILE *f;
    remove(path); // a file that is cut to nothing and written again is flushed by some file systems when it is closed
    f = fopen(path, "wb");
    if (f == NULL) return;
    fwrite(data, 1, size, f);
    fclose(f);
}

TEST(saved_weights_come_back_the_same)
{
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = file_layer();
    moe_weights *w = file_weights(ctx, &layer), *loaded = NULL;
    char path[1024], again[1024];
    unsigned char *a, *b;
    size_t size_a = 0, size_b = 0;
    float row[40];
    source s[2];
    moe_tensor t[5];
    snprintf(path, sizeof path, "%s", test_temp("test_weights.moe"));
    snprintf(again, sizeof again, "%s", test_temp("test_weights_again.moe"));
    REQUIRE_OK(moe_weights_save(w, path, &err));
    REQUIRE_OK(moe_weights_load(ctx, &layer, path, &loaded, &err));
    CHECK_EQ(loaded->sealed, 1);
    for (int32_t e = 0; e < 6; e++)
        if (e != 4) CHECK(expert_reads(loaded, &layer, e));
    CHECK(reads_as(loaded, MOE_TENSOR_SHARED_UP, -1, 10, 40, 0, 0));
    CHECK(reads_as(loaded, MOE_TENSOR_SHARED_DOWN, -1, 40, 10, 0, 0));
    CHECK_OK(moe_weights_read_row(loaded, MOE_TENSOR_CONSTANT, 4, 0, row, &err));
    CHECK_EQ(row[39], 0.7f * 39.0f);
    CHECK_OK(moe_weights_read_row(loaded, MOE_TENSOR_SELECT_BIAS, -1, 1, row, &err));
    CHECK_EQ(row[4], 0.7f * 9.0f);
    CHECK_OK(moe_weights_read_row(loaded, MOE_TENSOR_FORCED_IDS, -1, 0, row, &err));
    CHECK_EQ(row[0], 4.0f);
    CHECK_ERR(moe_weights_read_row(loaded, MOE_TENSOR_ROUTER, -1, 0, row, &err), MOE_ERROR_MISSING, "role");
    CHECK_ERR(moe_weights_seal(loaded, &err), MOE_ERROR_STATE, "weights");
    REQUIRE_OK(moe_weights_save(loaded, again, &err)); // to the byte
    a = read_file(path, &size_a);
    b = read_file(again, &size_b);
    CHECK(size_a == size_b && a != NULL && b != NULL && memcmp(a, b, size_a) == 0);
    free(b);
    // experts of mapped weights can be replaced, more than once; the file keeps its bytes
    for (int32_t round = 0; round < 3; round++) {
        replacement(s, &layer, 1, 70 + round);
        t[0] = s[0].t;
        t[1] = s[1].t;
        t[2] = table(MOE_TENSOR_GATE_BIAS, row, 1, 9, 0);
        t[3] = table(MOE_TENSOR_UP_BIAS, row, 1, 9, 0);
        t[4] = table(MOE_TENSOR_DOWN_BIAS, row, 1, 40, 0);
        t[2].expert = t[3].expert = t[4].expert = 1;
        memset(row, 0, sizeof row);
        CHECK_OK(moe_weights_replace_expert(loaded, 1, t, 5, NULL, &err));
        CHECK(holds(loaded, 1, 70 + round));
        CHECK(expert_reads(loaded, &layer, 0) && expert_reads(loaded, &layer, 2));
        source_free(&s[0]);
        source_free(&s[1]);
    }
    b = read_file(path, &size_b);
    CHECK(b != NULL && size_a == size_b && memcmp(a, b, size_a) == 0);
    REQUIRE_OK(moe_weights_save(loaded, again, &err)); // with the replaced expert
    moe_weights_destroy(loaded);
    CHECK_OK(moe_weights_load(ctx, &layer, again, &loaded, &err));
    CHECK(loaded != NULL && holds(loaded, 1, 72) && expert_reads(loaded, &layer, 3));
    free(a);
    free(b);
    remove(path);
    remove(again);
    moe_weights_destroy(loaded);
    moe_weights_destroy(w);
    moe_context_destroy(ctx);
}

TEST(every_truncation_and_every_flipped_bit_of_a_file_is_refused)
{
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = file_layer();
    moe_weights *w = file_weights(ctx, &layer), *loaded = NULL;
    char path[1024];
    unsigned char *data;
    size_t size = 0, header, step;
    snprintf(path, sizeof path, "%s", test_temp("test_weights_bad.moe"));
    REQUIRE_OK(moe_weights_save(w, path, &err));
    data = read_file(path, &size);
    REQUIRE(data != NULL);
    header = (size_t)(size - w->layout.bytes);
    for (size_t cut = 0; cut < size; cut += cut < header + 64 ? 1 : 997) {
        write_file(path, data, cut);
        CHECK_ERR(moe_weights_load(ctx, &layer, path, &loaded, &err), MOE_ERROR_FORMAT, "");
        CHECK(loaded == NULL);
    }
    data[size] = 0;
    write_file(path, data, size + 1);
    CHECK_ERR(moe_weights_load(ctx, &layer, path, &loaded, &err), MOE_ERROR_FORMAT, "");
    step = test_full() ? 1 : 101;
    for (size_t bit = 0; bit < 8 * size; bit += bit < 8 * header ? 1 : step) {
        data[bit / 8] = (unsigned char)(data[bit / 8] ^ (1u << (bit % 8)));
        write_file(path, data, size);
        data[bit / 8] = (unsigned char)(data[bit / 8] ^ (1u << (bit % 8)));
        CHECK_ERR(moe_weights_load(ctx, &layer, path, &loaded, &err), MOE_ERROR_FORMAT, "");
        CHECK_CONTAINS(err.text, "test_weights_bad.moe");
        if (loaded != NULL) { moe_weights_destroy(loaded); break; }
    }
    free(data);
    remove(path);
    CHECK_ERR(moe_weights_load(ctx, &layer, path, &loaded, &err), MOE_ERROR_MISSING, "");
    CHECK_ERR(moe_weights_load(ctx, &layer, "build", &loaded, &err), MOE_ERROR_FILE, "");
    CHECK_ERR(moe_weights_save(w, "build/no/such/folder/file", &err), MOE_ERROR_FILE, "");
    CHECK_ERR(moe_weights_save(w, NULL, &err), MOE_ERROR_ARGUMENT, "path");
    CHECK_ERR(moe_weights_load(ctx, &layer, NULL, &loaded, &err), MOE_ERROR_ARGUMENT, "path");
    moe_weights_destroy(w);
    CHECK_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
    CHECK_ERR(moe_weights_save(w, path, &err), MOE_ERROR_STATE, "weights");
    moe_weights_destroy(w);
    moe_context_destroy(ctx);
}

// Writes the file again with one 32-bit value changed and both sums right: what a forger could do.
static void forge(const char *path, const unsigned char *data, size_t size, size_t header, size_t at, uint32_t value)
{
    unsigned char *copy = (unsigned char *)malloc(size);
    moe__hash hash = moe__hash_begin();
    uint32_t header_bytes;
    uint64_t sum;
    memcpy(copy, data, size);
    memcpy(copy + at, &value, 4);
    moe__hash_add(&hash, copy + header, size - header);
    sum = moe__hash_end(&hash);
    memcpy(copy + 40, &sum, 8);
    memcpy(&header_bytes, copy + 16, 4);
    hash = moe__hash_begin();
    moe__hash_add(&hash, copy, header_bytes - 8);
    sum = moe__hash_end(&hash);
    memcpy(copy + header_bytes - 8, &sum, 8);
    write_file(path, copy, size);
    free(copy);
}

TEST(a_forged_file_with_right_checksums_does_no_harm)
{
    static const uint32_t values[] = { 0, 1, 5, 0x7fffffffu, 0x80000000u, 0xffffffffu };
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = file_layer();
    moe_weights *w = file_weights(ctx, &layer), *loaded = NULL;
    char path[1024];
    unsigned char *data;
    size_t size = 0, header;
    uint32_t header_bytes;
    float row[40];
    snprintf(path, sizeof path, "%s", test_temp("test_weights_forged.moe"));
    REQUIRE_OK(moe_weights_save(w, path, &err));
    data = read_file(path, &size);
    REQUIRE(data != NULL);
    header = (size_t)(size - w->layout.bytes);
    memcpy(&header_bytes, data + 16, 4);
    for (size_t at = 20; at + 12 <= header_bytes; at += 4)
        for (size_t v = 0; v < sizeof values / sizeof values[0]; v++) {
            if (at >= 40 && at < 48) continue; // the sum itself
            forge(path, data, size, header, at, values[v]);
            if (moe_weights_load(ctx, &layer, path, &loaded, &err) != MOE_OK) {
                CHECK(loaded == NULL && err.text[0] != 0);
                continue;
            }
            for (int32_t e = 0; e < 6; e++) // flags of what is not needed may have changed: still readable
                for (int32_t role = 1; role < MOE_TENSOR_ROLES; role++)
                    (void)moe_weights_read_row(loaded, role, e, 0, row, NULL);
            moe_weights_destroy(loaded);
        }
    forge(path, data, size, header, header + (size_t)(w->layout.tables + w->layout.table_offset[MOE_TENSOR_FORCED_IDS]), 5);
    CHECK_ERR(moe_weights_load(ctx, &layer, path, &loaded, &err), MOE_ERROR_FORMAT, "");
    CHECK_CONTAINS(err.text, "forced id");
    free(data);
    remove(path);
    moe_weights_destroy(w);
    moe_context_destroy(ctx);
}

TEST(a_file_of_another_layer_is_refused_by_the_member_that_differs)
{
    static const int32_t map[4] = { 3, 2, 1, 0 };
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = file_layer(), other;
    moe_weights *w = file_weights(ctx, &layer), *loaded = NULL;
    char path[1024];
    snprintf(path, sizeof path, "%s", test_temp("test_weights_layer.moe"));
    REQUIRE_OK(moe_weights_save(w, path, &err));
#define DIFFERS(member, value) \
    do { \
        other = layer; \
        other.member = value; \
        CHECK_ERR(moe_weights_load(ctx, &other, path, &loaded, &err), MOE_ERROR_ARGUMENT, "layer." #member); \
        CHECK_CONTAINS(err.text, "was saved with"); \
    } while (0)
    DIFFERS(layer_index, 4);
    DIFFERS(hidden_size, 41);
    DIFFERS(intermediate_size, 10);
    DIFFERS(format, MOE_FORMAT_F16);
    DIFFERS(output_scale, 0.5f);
    DIFFERS(activation.limit, 7);
    DIFFERS(activation.kind, MOE_ACTIVATION_GEGLU_TANH);
    DIFFERS(routing.scale, 2.5f);
    DIFFERS(routing.renormalize, MOE_RENORMALIZE_SUM);
    DIFFERS(router.norm_epsilon, 1e-6f);
    DIFFERS(shared.scale, 0.5f);
    DIFFERS(shared.activation.kind, MOE_ACTIVATION_GEGLU_ERF);
    DIFFERS(parallel.tp_size, 2);
    DIFFERS(parallel.local_experts, 2);
    other = layer;
    other.parallel.expert_map = map;
    CHECK_ERR(moe_weights_load(ctx, &other, path, &loaded, &err), MOE_ERROR_ARGUMENT, "layer.parallel");
    other = layer;
    other.num_experts = 3;
    CHECK_ERR(moe_weights_load(ctx, &other, path, &loaded, &err), MOE_ERROR_ARGUMENT, "layer.num_experts");
    other = layer;
    other.source.halves = MOE_HALVES_INTERLEAVED; // how the source lay does not matter
    CHECK_OK(moe_weights_load(ctx, &other, path, &loaded, &err));
    moe_weights_destroy(loaded);
    remove(path);
    moe_weights_destroy(w);
    moe_context_destroy(ctx);
}

TEST(every_member_of_the_layer_is_compared_with_the_file)
{
    // A word of the descriptor that is in no list would be a difference that goes unseen.
    unsigned char listed[sizeof(moe_layer_desc)];
    size_t parallel = offsetof(moe_layer_desc, parallel);
    memset(listed, 0, sizeof listed);
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(moe__layer_members); i++) {
        CHECK_EQ(listed[moe__layer_members[i].offset], 0);
        memset(listed + moe__layer_members[i].offset, 1, 4);
    }
#define EXCEPT(offset, bytes) memset(listed + (offset), 1, (bytes))
    EXCEPT(offsetof(moe_layer_desc, struct_size), 4);
    EXCEPT(offsetof(moe_layer_desc, reserved0), 4);
    EXCEPT(offsetof(moe_layer_desc, reserved), sizeof(((moe_layer_desc *)0)->reserved));
    EXCEPT(offsetof(moe_layer_desc, source), sizeof(moe_source_desc));
    EXCEPT(parallel + offsetof(moe_parallel_desc, expert_offset), 4); // compared as the map that follows from it
    EXCEPT(parallel + offsetof(moe_parallel_desc, expert_map), sizeof(void *));
    EXCEPT(parallel + offsetof(moe_parallel_desc, reserved), sizeof(((moe_parallel_desc *)0)->reserved));
    EXCEPT(offsetof(moe_layer_desc, activation) + offsetof(moe_activation_desc, reserved), 12);
    EXCEPT(offsetof(moe_layer_desc, shared) + offsetof(moe_shared_desc, activation) +
               offsetof(moe_activation_desc, reserved),
           12);
    EXCEPT(offsetof(moe_layer_desc, routing) + offsetof(moe_routing_desc, struct_size), 4);
    EXCEPT(offsetof(moe_layer_desc, routing) + offsetof(moe_routing_desc, reserved),
           sizeof(((moe_routing_desc *)0)->reserved));
    EXCEPT(offsetof(moe_layer_desc, router) + offsetof(moe_router_desc, reserved),
           sizeof(((moe_router_desc *)0)->reserved));
    EXCEPT(offsetof(moe_layer_desc, shared) + offsetof(moe_shared_desc, reserved),
           sizeof(((moe_shared_desc *)0)->reserved));
    for (size_t i = 0; i < sizeof listed; i += 4) {
        // Padding is after a 4-byte member and before a pointer, or at the end of a struct with one.
        size_t end = parallel + sizeof(moe_parallel_desc);
        if (listed[i] || (i >= parallel && i < end && (i == parallel + 8 || i == parallel + 12 || i + 4 == end)))
            continue;
        if (i + 4 == sizeof listed || i + 4 == parallel) continue;
        CHECK_EQ((int)i, -1);
    }
}

// ---- threads and memory ---------------------------------------------------------------------------------------------

typedef struct set_job {
    moe_weights *weights;
    moe_layer_desc layer;
    int32_t failures[16];
} set_job;

static void set_one_expert(void *arg, int32_t expert)
{
    set_job *job = (set_job *)arg;
    int32_t h = job->layer.hidden_size, i = job->layer.intermediate_size;
    source s[2];
    moe_error own;
    s[0] = make_source(MOE_TENSOR_GATE_UP, expert, 0, 2 * i, h, MOE_DTYPE_BF16, 0, MOE_HALVES_INTERLEAVED, 0, 0);
    s[1] = make_source(MOE_TENSOR_DOWN, expert, 0, h, i, MOE_DTYPE_BF16, MOE_LAYOUT_MAJOR_MN, 0, 0, 0);
    for (int32_t n = 0; n < 2; n++) {
        if (moe_weights_set_tensor(job->weights, &s[n].t, &own) != MOE_OK) job->failures[expert]++;
        if (moe_weights_set_tensor(job->weights, &s[n].t, &own) != MOE_ERROR_STATE) job->failures[expert]++;
        source_free(&s[n]);
    }
}

TEST(several_threads_may_set_different_experts)
{
    moe_context *ctx = open_context(NULL, 4);
    set_job job;
    memset(&job, 0, sizeof job);
    job.layer = make_layer(72, 40, 16, MOE_FORMAT_BF16, 1);
    REQUIRE_OK(moe_weights_create(ctx, &job.layer, NULL, &job.weights, &err));
    moe__parallel(ctx, 16, set_one_expert, &job);
    CHECK_OK(moe_weights_seal(job.weights, &err));
    for (int32_t e = 0; e < 16; e++) {
        CHECK_EQ(job.failures[e], 0);
        CHECK(expert_reads(job.weights, &job.layer, e));
    }
    moe_weights_destroy(job.weights);
    moe_context_destroy(ctx);
}

TEST(setting_and_replacing_need_at_most_one_expert_of_memory)
{
    enum { H = 96, I = 64, E = 8 };
    counter memory;
    moe_context *ctx = open_context(&memory, 1);
    moe_layer_desc layer = make_layer(H, I, E, MOE_FORMAT_BF16, 1);
    moe_weights *w = NULL;
    moe_weights_info info;
    row_source rows = { 2 * I, H, 0, I, 0, 0, 0, 0, 0 };
    source s[2];
    moe_tensor t[2];
    uint64_t base, calls;
    memset(&info, 0, sizeof info);
    CHECK_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
    CHECK_OK(moe_weights_get_info(w, &info, &err));
    base = memory.now;
    calls = memory.calls;
    memory.peak = 0;
    for (int32_t layout = 1; layout <= 3; layout++) {
        source g = make_source(layout == 1   ? MOE_TENSOR_GATE
                               : layout == 2 ? MOE_TENSOR_UP
                                             : MOE_TENSOR_DOWN,
                               -1, E, layout == 3 ? H : I, layout == 3 ? I : H,
                               layout == 2 ? MOE_DTYPE_F32 : MOE_DTYPE_BF16, layout, 0, MOE_ROWS_SHUFFLED_128, 1);
        set_source(w, g);
    }
    CHECK_EQ(memory.calls, calls); // data are copied straight into place
    moe_weights_destroy(w);
    CHECK_OK(moe_weights_create(ctx, &layer, NULL, &w, &err));
    memory.peak = 0;
    t[0] = rows_tensor(MOE_TENSOR_GATE_UP, -1, MOE_HALVES_GATE_UP, &rows);
    CHECK_OK(moe_weights_set_tensor(w, &t[0], &err));
    CHECK(memory.peak > base && memory.peak - base <= info.expert_bytes);
    printf("rows by callback: %d bytes of %d an expert\n", (int)(memory.peak - base), (int)info.expert_bytes);
    set_source(w, make_source(MOE_TENSOR_DOWN, -1, E, H, I, MOE_DTYPE_BF16, 0, 0, 0, 0));
    CHECK_OK(moe_weights_seal(w, &err));
    memory.peak = 0;
    replacement(s, &layer, 3, 9);
    t[0] = s[0].t;
    t[1] = s[1].t;
    CHECK_OK(moe_weights_replace_expert(w, 3, t, 2, NULL, &err));
    CHECK_EQ(memory.peak - base, info.expert_bytes);
    CHECK_EQ(memory.now, base);
    source_free(&s[0]);
    source_free(&s[1]);
    moe_weights_destroy(w);
    moe_context_destroy(ctx);
    CHECK_EQ(memory.now, 0u);
    CHECK_EQ(memory.blocks, 0);
}

// ---- every allocation fails once ------------------------------------------------------------------------------------

enum { DO_CREATE, DO_ROWS, DO_REPLACE, DO_SAVE, DO_LOAD, DO_LOAD_REPLACE, DO_CHECKPOINT, DO_ALL };

static void write_checkpoint(const char *path, const moe_layer_desc *layer);

typedef struct failing {
    moe_layer_desc layer;
    moe_weights *ready;      // sealed, of the same context
    moe_checkpoint *ckpt;
    char path[1024];
    source s[2];
} failing;

static int32_t do_one(int32_t what, moe_context *ctx, failing *f, moe_weights **out)
{
    row_source rows = { 8, 40, 0, 8, 0, 0, 0, 0, 0 };
    moe_tensor t[2];
    t[0] = f->s[0].t;
    t[1] = f->s[1].t;
    *out = NULL;
    switch (what) {
    case DO_CREATE: return moe_weights_create(ctx, &f->layer, NULL, out, &err);
    case DO_ROWS:
        if (moe_weights_create(ctx, &f->layer, NULL, out, &err) != MOE_OK) return err.code;
        t[0] = rows_tensor(MOE_TENSOR_UP, -1, 0, &rows);
        return moe_weights_set_tensor(*out, t, &err);
    case DO_REPLACE: return moe_weights_replace_expert(f->ready, 1, t, 2, NULL, &err);
    case DO_SAVE: return moe_weights_save(f->ready, f->path, &err);
    case DO_LOAD: return moe_weights_load(ctx, &f->layer, f->path, out, &err);
    case DO_LOAD_REPLACE:
        if (moe_weights_load(ctx, &f->layer, f->path, out, &err) != MOE_OK) return err.code;
        return moe_weights_replace_expert(*out, 1, t, 2, NULL, &err);
    case DO_CHECKPOINT: return moe_weights_from_checkpoint(ctx, f->ckpt, &f->layer, out, &err);
    default: return MOE_OK;
    }
}

TEST(every_allocation_that_fails_is_an_error_and_leaks_nothing)
{
    counter memory;
    moe_context *ctx = open_context(&memory, 1);
    failing f;
    int allocations = 0, injected = 0;
    memset(&f, 0, sizeof f);
    f.layer = make_layer(40, 8, 2, MOE_FORMAT_BF16, 1);
    f.layer.layer_index = 3;
    f.ready = make_weights(ctx, &f.layer, 1);
    snprintf(f.path, sizeof f.path, "%s", test_temp("test_weights_failing.moe"));
    replacement(f.s, &f.layer, 1, 5);
    {
        char path[1024];
        snprintf(path, sizeof path, "%s", test_temp("test_weights_failing.safetensors"));
        write_checkpoint(path, &f.layer);
        CHECK_OK(moe_checkpoint_open(path, NULL, &f.ckpt, &err));
        remove(path);
    }
    for (int32_t what = 0; what < DO_ALL; what++) {
        moe_weights *w;
        uint64_t before = memory.now, calls, needed;
        memory.calls = 0;
        CHECK_EQ(do_one(what, ctx, &f, &w), MOE_OK);
        needed = memory.calls;
        allocations += (int)needed;
        if (w != NULL) moe_weights_destroy(w);
        CHECK_EQ(memory.now, before);
        for (calls = 1; calls <= needed; calls++) {
            memory.calls = 0;
            memory.fail_at = calls;
            CHECK_EQ(do_one(what, ctx, &f, &w), MOE_ERROR_MEMORY);
            CHECK_EQ(err.code, MOE_ERROR_MEMORY);
            CHECK(memory.calls >= calls);
            injected++;
            memory.fail_at = 0;
            if (w != NULL) moe_weights_destroy(w);
            CHECK_EQ(memory.now, before);
        }
        if (what == DO_REPLACE) CHECK(holds(f.ready, 1, 5));
    }
    printf("allocations %d, failures injected %d\n", allocations, injected);
    CHECK(allocations > 6 && allocations == injected);
    moe_weights_destroy(f.ready);
    moe_checkpoint_close(f.ckpt);
    remove(f.path);
    source_free(&f.s[0]);
    source_free(&f.s[1]);
    moe_context_destroy(ctx);
    CHECK_EQ(memory.blocks, 0);
}

// ---- checkpoints ----------------------------------------------------------------------------------------------------

typedef struct st_writer { // a safetensors file in memory
    char header[65536];
    unsigned char *data;
    size_t length, bytes;
} st_writer;

static void st_begin(st_writer *f)
{
    memset(f, 0, sizeof *f);
    f->length = (size_t)snprintf(f->header, sizeof f->header, "{");
}

// The tensor of a source, under a name, with other dims when rank > 0.
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((noipa)) // gcc 12.2 fails within itself when it takes `s` apart for AVX-512 processors
#endif
static void st_add(st_writer *f, const char *name, source s, int32_t rank, int64_t d0, int64_t d1, int64_t d2)
{
    const char *type = s.t.dtype == MOE_DTYPE_F32 ? "F32" : s.t.dtype == MOE_DTYPE_BF16 ? "BF16" : "F16";
    int64_t dims[4];
    memcpy(dims, s.t.dims, sizeof dims);
    if (rank > 0) {
        dims[0] = d0;
        dims[1] = d1;
        dims[2] = d2;
    } else {
        rank = s.t.rank;
    }
    f->length += (size_t)snprintf(f->header + f->length, sizeof f->header - f->length,
                                  "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[", f->length > 1 ? "," : "", name, type);
    for (int32_t i = 0; i < rank; i++)
        f->length += (size_t)snprintf(f->header + f->length, sizeof f->header - f->length, "%s%d", i > 0 ? "," : "",
                                      (int)dims[i]);
    f->length += (size_t)snprintf(f->header + f->length, sizeof f->header - f->length, "],\"data_offsets\":[%d,%d]}",
                                  (int)f->bytes, (int)(f->bytes + s.t.data_bytes));
    f->data = (unsigned char *)realloc(f->data, f->bytes + (size_t)s.t.data_bytes);
    memcpy(f->data + f->bytes, s.t.data, (size_t)s.t.data_bytes);
    f->bytes += (size_t)s.t.data_bytes;
    source_free(&s);
}

static void st_end(st_writer *f, const char *path)
{
    unsigned char size[8];
    FILE *file = fopen(path, "wb");
    f->header[f->length++] = '}';
    while (f->length % 8 != 0) f->header[f->length++] = ' ';
    for (int i = 0; i < 8; i++) size[i] = (unsigned char)(f->length >> (8 * i));
    if (file != NULL) {
        fwrite(size, 1, 8, file);
        fwrite(f->header, 1, f->length, file);
        fwrite(f->data, 1, f->bytes, file);
        fclose(file);
    }
    free(f->data);
}

// Mixtral's names, one tensor per expert and matrix; `without` and `twice` are numbers of tensors, -1: none.
static void st_add_plain(st_writer *f, const moe_layer_desc *l, int32_t without)
{
    static const char *const names[] = { "w1", "w3", "w2" };
    int32_t n = 0, d = dtype_of(l->format), h = l->hidden_size, i = l->intermediate_size;
    for (int32_t e = 0; e < l->num_experts; e++)
        for (int32_t m = 0; m < 3; m++, n++) {
            char name[128];
            int32_t role = MOE_TENSOR_GATE + m + (m == 2);
            snprintf(name, sizeof name, "model.layers.%d.block_sparse_moe.experts.%d.%s.weight", l->layer_index, e,
                     names[m]);
            if (n != without)
                st_add(f, name, make_source(role, e, 0, m == 2 ? h : i, m == 2 ? i : h, d, 0, 0, 0, 0), 0, 0, 0, 0);
        }
}

static void write_checkpoint(const char *path, const moe_layer_desc *layer)
{
    static st_writer f;
    st_begin(&f);
    st_add_plain(&f, layer, -1);
    st_end(&f, path);
}

static moe_checkpoint *st_open(st_writer *f)
{
    moe_checkpoint *ckpt = NULL;
    moe_checkpoint_desc desc;
    char path[1024];
    memset(&desc, 0, sizeof desc);
    desc.flags = MOE_CHECKPOINT_READ;
    snprintf(path, sizeof path, "%s", test_temp("test_weights.safetensors"));
    st_end(f, path);
    CHECK_OK(moe_checkpoint_open(path, &desc, &ckpt, &err));
    remove(path);
    return ckpt;
}

TEST(a_checkpoint_with_something_missing_strange_or_misshapen_is_refused_by_name)
{
    static st_writer f;
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = make_layer(40, 24, 3, MOE_FORMAT_BF16, 1);
    layer.layer_index = 7;
    for (int32_t kind = 0; kind < 8; kind++) {
        moe_checkpoint *ckpt;
        moe_weights *w = (moe_weights *)ctx;
        st_begin(&f);
        st_add_plain(&f, &layer, kind == 1 ? 4 : kind == 2 || kind == 7 ? 5 : -1);
        if (kind == 2)
            st_add(&f, "model.layers.7.block_sparse_moe.experts.1.w2.weight",
                   make_source(MOE_TENSOR_DOWN, 1, 0, 40, 24, MOE_DTYPE_BF16, 0, 0, 0, 0), 2, 24, 40, 0);
        if (kind == 3)
            st_add(&f, "model.layers.7.block_sparse_moe.experts.1.w2.lora_A",
                   make_source(MOE_TENSOR_DOWN, 1, 0, 4, 4, MOE_DTYPE_BF16, 0, 0, 0, 0), 0, 0, 0, 0);
        if (kind == 4) // the same matrix by another scheme's name
            st_add(&f, "model.layers.7.block_sparse_moe.experts.2.up_proj.weight",
                   make_source(MOE_TENSOR_UP, 2, 0, 24, 40, MOE_DTYPE_BF16, 0, 0, 0, 0), 0, 0, 0, 0);
        if (kind == 5) {
            st_add(&f, "model.layers.8.block_sparse_moe.experts.2.strange", // another layer, and not of the experts
                   make_source(MOE_TENSOR_UP, 2, 0, 24, 40, MOE_DTYPE_BF16, 0, 0, 0, 0), 0, 0, 0, 0);
            st_add(&f, "model.layers.7.block_sparse_moe.pre_expert_norm.weight",
                   make_source(MOE_TENSOR_UP, 2, 0, 24, 40, MOE_DTYPE_BF16, 0, 0, 0, 0), 0, 0, 0, 0);
        }
        if (kind == 6)
            st_add(&f, "model.layers.7.block_sparse_moe.experts.2.w1.weight_scale",
                   make_source(MOE_TENSOR_UP, 2, 0, 1, 40, MOE_DTYPE_F32, 0, 0, 0, 0), 0, 0, 0, 0);
        if (kind == 7)
            st_add(&f, "model.layers.7.block_sparse_moe.experts.1.w2.weight",
                   make_source(MOE_TENSOR_DOWN, 1, 0, 40, 24, MOE_DTYPE_BF16, 0, 0, 0, 0), 1, 960, 0, 0);
        ckpt = st_open(&f);
        REQUIRE(ckpt != NULL);
        switch (kind) {
        case 1:
            CHECK_ERR(moe_weights_from_checkpoint(ctx, ckpt, &layer, &w, &err), MOE_ERROR_MISSING, "ckpt");
            CHECK_CONTAINS(err.text, "for layer 7, up of expert 1; that of expert 0 is "
                                     "\"model.layers.7.block_sparse_moe.experts.0.w3.weight\"");
            break;
        case 2: case 7:
            CHECK_ERR(moe_weights_from_checkpoint(ctx, ckpt, &layer, &w, &err), MOE_ERROR_FORMAT, "tensor.dims");
            CHECK_CONTAINS(err.text, "model.layers.7.block_sparse_moe.experts.1.w2.weight");
            CHECK_CONTAINS(err.text, "test_weights.safetensors");
            CHECK_CONTAINS(err.text, kind == 2 ? "is [24, 40] bf16: it must be [40, 24]" : "is [960] bf16");
            break;
        case 3:
            CHECK_ERR(moe_weights_from_checkpoint(ctx, ckpt, &layer, &w, &err), MOE_ERROR_UNSUPPORTED, "ckpt");
            CHECK_CONTAINS(err.text, "experts.1.w2.lora_A");
            CHECK_CONTAINS(err.text, "test_weights.safetensors");
            break;
        case 4:
            CHECK_ERR(moe_weights_from_checkpoint(ctx, ckpt, &layer, &w, &err), MOE_ERROR_FORMAT, "tensor.role");
            CHECK_CONTAINS(err.text, "was set before");
            break;
        case 6:
            CHECK_ERR(moe_weights_from_checkpoint(ctx, ckpt, &layer, &w, &err), MOE_ERROR_FORMAT, "tensor.part");
            break;
        default:
            CHECK_OK(moe_weights_from_checkpoint(ctx, ckpt, &layer, &w, &err));
            for (int32_t e = 0; w != NULL && e < 3; e++) CHECK(expert_reads(w, &layer, e));
            moe_weights_destroy(w);
            w = NULL;
            layer.layer_index = 6;
            CHECK_ERR(moe_weights_from_checkpoint(ctx, ckpt, &layer, &w, &err), MOE_ERROR_MISSING, "layer.layer_index");
            layer.layer_index = 7;
            break;
        }
        CHECK(w == NULL);
        CHECK_ERR(moe_weights_from_checkpoint(NULL, ckpt, &layer, &w, &err), MOE_ERROR_ARGUMENT, "ctx");
        CHECK_ERR(moe_weights_from_checkpoint(ctx, NULL, &layer, &w, &err), MOE_ERROR_ARGUMENT, "ckpt");
        CHECK_ERR(moe_weights_from_checkpoint(ctx, ckpt, NULL, &w, &err), MOE_ERROR_ARGUMENT, "layer");
        CHECK_ERR(moe_weights_from_checkpoint(ctx, ckpt, &layer, NULL, &err), MOE_ERROR_ARGUMENT, "out");
        moe_checkpoint_close(ckpt);
    }
    moe_context_destroy(ctx);
}

TEST(stacks_lie_as_their_shape_says_and_where_it_does_not_as_the_layer_says)
{
    static st_writer f;
    moe_context *ctx = open_context(NULL, 1);
    for (int32_t layout = 1; layout <= 2; layout++)
        for (int32_t square = 0; square < 2; square++) {
            moe_layer_desc layer = make_layer(48, square ? 24 : 40, 3, MOE_FORMAT_BF16, 1); // 2 I = H fits both ways
            moe_checkpoint *ckpt;
            moe_weights *w = NULL;
            st_begin(&f);
            st_add(&f, "model.layers.0.mlp.experts.gate_up_proj",
                   make_source(MOE_TENSOR_GATE_UP, -1, 3, 2 * layer.intermediate_size, 48, MOE_DTYPE_BF16, layout,
                               MOE_HALVES_INTERLEAVED, 0, 0), 0, 0, 0, 0);
            st_add(&f, "model.layers.0.mlp.experts.down_proj",
                   make_source(MOE_TENSOR_DOWN, -1, 3, 48, layer.intermediate_size, MOE_DTYPE_BF16, layout, 0, 0, 0), 0,
                   0, 0, 0);
            ckpt = st_open(&f);
            REQUIRE(ckpt != NULL);
            CHECK_ERR(moe_weights_from_checkpoint(ctx, ckpt, &layer, &w, &err), MOE_ERROR_FORMAT,
                      square ? "layer.source.layout" : "layer.source.halves");
            layer.source.halves = MOE_HALVES_INTERLEAVED;
            if (square) layer.source.layout = layout;
            CHECK_OK(moe_weights_from_checkpoint(ctx, ckpt, &layer, &w, &err));
            for (int32_t e = 0; w != NULL && e < 3; e++) CHECK(expert_reads(w, &layer, e));
            moe_weights_destroy(w);
            moe_checkpoint_close(ckpt);
        }
    moe_context_destroy(ctx);
}

TEST(dbrx_and_aria_files_are_understood)
{
    static st_writer f;
    moe_context *ctx = open_context(NULL, 1);
    for (int32_t square = 0; square < 2; square++) {
        moe_layer_desc layer = make_layer(48, square ? 48 : 24, 3, MOE_FORMAT_BF16, 1);
        int32_t i = layer.intermediate_size;
        moe_checkpoint *ckpt;
        moe_weights *w = NULL;
        st_begin(&f); // [E I, H] each, w2 input-major
        st_add(&f, "transformer.blocks.0.ffn.experts.mlp.w1",
               make_source(MOE_TENSOR_GATE, -1, 3, i, 48, MOE_DTYPE_BF16, 1, 0, 0, 0), 2, 3 * i, 48, 0);
        st_add(&f, "transformer.blocks.0.ffn.experts.mlp.v1",
               make_source(MOE_TENSOR_UP, -1, 3, i, 48, MOE_DTYPE_BF16, 1, 0, 0, 0), 2, 3 * i, 48, 0);
        st_add(&f, "transformer.blocks.0.ffn.experts.mlp.w2",
               make_source(MOE_TENSOR_DOWN, -1, 3, 48, i, MOE_DTYPE_BF16, 2, 0, 0, 0), 2, 3 * i, 48, 0);
        ckpt = st_open(&f);
        CHECK_OK(moe_weights_from_checkpoint(ctx, ckpt, &layer, &w, &err));
        for (int32_t e = 0; w != NULL && e < 3; e++) CHECK(expert_reads(w, &layer, e));
        moe_weights_destroy(w);
        moe_checkpoint_close(ckpt);
        w = NULL;
        layer.source.halves = MOE_HALVES_GATE_UP;
        layer.source.layout = MOE_LAYOUT_MAJOR_MN;
        st_begin(&f);
        st_add(&f, "language_model.model.layers.0.mlp.experts.fc1.weight",
               make_source(MOE_TENSOR_GATE_UP, -1, 3, 2 * i, 48, MOE_DTYPE_BF16, 2, 2, 0, 0), 0, 0, 0, 0);
        st_add(&f, "language_model.model.layers.0.mlp.experts.fc2.weight",
               make_source(MOE_TENSOR_DOWN, -1, 3, 48, i, MOE_DTYPE_BF16, 2, 0, 0, 0), 0, 0, 0, 0);
        ckpt = st_open(&f);
        CHECK_OK(moe_weights_from_checkpoint(ctx, ckpt, &layer, &w, &err));
        for (int32_t e = 0; w != NULL && e < 3; e++) CHECK(expert_reads(w, &layer, e));
        moe_weights_destroy(w);
        moe_checkpoint_close(ckpt);
    }
    moe_context_destroy(ctx);
}

TEST(shared_experts_inside_the_routing_become_always_on_ones)
{
    static st_writer f;
    moe_context *ctx = open_context(NULL, 1);
    moe_layer_desc layer = make_layer(48, 8, 3, MOE_FORMAT_BF16, 1);
    layer.routing.extra_slots = 2;
    layer.routing.extra_scored = 1;
    layer.routing.bias_rows = 1;
    layer.source.halves = MOE_HALVES_INTERLEAVED;
    for (int32_t shared = 0; shared < 3; shared++) { // shared_halves unset, set, and a stack of the wrong number
        moe_checkpoint *ckpt;
        moe_weights *w = NULL;
        source up = make_source(MOE_TENSOR_GATE_UP, -1, 2, 16, 48, MOE_DTYPE_BF16, 0,
                                shared == 0 ? MOE_HALVES_INTERLEAVED : MOE_HALVES_GATE_UP, 0, 0);
        layer.source.shared_halves = shared == 0 ? 0 : MOE_HALVES_GATE_UP;
        st_begin(&f);
        st_add(&f, "model.llm.layers.0.mlp.experts.w13_weight",
               make_source(MOE_TENSOR_GATE_UP, -1, 3, 16, 48, MOE_DTYPE_BF16, 0, MOE_HALVES_INTERLEAVED, 0, 0), 0, 0, 0,
               0);
        st_add(&f, "model.llm.layers.0.mlp.experts.w2_weight",
               make_source(MOE_TENSOR_DOWN, -1, 3, 48, 8, MOE_DTYPE_BF16, 0, 0, 0, 0), 0, 0, 0, 0);
        st_add(&f, "model.llm.layers.0.mlp.shared_experts.shared_w13_weight", up, shared == 2 ? 3 : 0, 1, 32, 48);
        st_add(&f, "model.llm.layers.0.mlp.shared_experts.shared_w2_weight",
               make_source(MOE_TENSOR_DOWN, -1, 2, 48, 8, MOE_DTYPE_BF16, 0, 0, 0, 0), 0, 0, 0, 0);
        st_add(&f, "model.llm.layers.0.mlp.gate.weight",
               make_source(MOE_TENSOR_ROUTER, -1, 0, 5, 48, MOE_DTYPE_BF16, 0, 0, 0, 0), 0, 0, 0, 0);
        st_add(&f, "model.llm.layers.0.mlp.gate.bias",
               make_source(MOE_TENSOR_SELECT_BIAS, -1, 0, 3, 0, MOE_DTYPE_F32, 0, 0, 0, 0), 0, 0, 0, 0);
        ckpt = st_open(&f);
        if (shared == 2) {
            CHECK_ERR(moe_weights_from_checkpoint(ctx, ckpt, &layer, &w, &err), MOE_ERROR_FORMAT, "tensor.dims");
            CHECK_CONTAINS(err.text, "layer.routing.extra_slots");
        } else {
            float row[48];
            CHECK_OK(moe_weights_from_checkpoint(ctx, ckpt, &layer, &w, &err));
            for (int32_t e = 0; w != NULL && e < 3; e++) CHECK(expert_reads(w, &layer, e));
            for (int32_t j = 0; w != NULL && j < 2; j++) { // its values were made for expert j of the stack
                CHECK_OK(moe_weights_read_row(w, MOE_TENSOR_UP, 3 + j, 5, row, &err));
                CHECK_EQ(row[7], value_of(MOE_TENSOR_UP, j, 5, 7));
                CHECK_OK(moe_weights_read_row(w, MOE_TENSOR_DOWN, 3 + j, 47, row, &err));
                CHECK_EQ(row[7], value_of(MOE_TENSOR_DOWN, j, 47, 7));
            }
        }
        moe_weights_destroy(w);
        moe_checkpoint_close(ckpt);
    }
    moe_context_destroy(ctx);
}

TEST(a_router_bias_is_added_to_logits_or_ranks_as_the_layer_says)
{
    static const char *const names[] = { "model.layers.0.mlp.gate.bias", "model.layers.0.mlp.router.bias" };
    static st_writer f;
    moe_context *ctx = open_context(NULL, 1);
    for (int32_t name = 0; name < 2; name++)
        for (int32_t ranks = 0; ranks < 2; ranks++) {
            moe_layer_desc layer = make_layer(40, 24, 3, MOE_FORMAT_BF16, 1);
            int32_t role = ranks ? MOE_TENSOR_SELECT_BIAS : MOE_TENSOR_ROUTER_BIAS;
            moe_checkpoint *ckpt;
            moe_weights *w = NULL;
            st_begin(&f);
            st_add_plain(&f, &layer, -1);
            st_add(&f, names[name], make_source(role, -1, 0, 3, 0, MOE_DTYPE_F32, 0, 0, 0, 0), 0, 0, 0, 0);
            ckpt = st_open(&f);
            CHECK_ERR(moe_weights_from_checkpoint(ctx, ckpt, &layer, &w, &err), MOE_ERROR_FORMAT, "tensor.role");
            layer.router.bias = !ranks;
            layer.routing.bias_rows = ranks;
            CHECK_OK(moe_weights_from_checkpoint(ctx, ckpt, &layer, &w, &err));
            if (w != NULL) CHECK(reads_as(w, role, -1, 3, 0, 0, 0));
            moe_weights_destroy(w);
            moe_checkpoint_close(ckpt);
        }
    moe_context_destroy(ctx);
}

// Element [i][j][k] of a checkpoint's tensor.
static float ckpt_value(const moe_checkpoint *ckpt, const char *name, int64_t i, int64_t j, int64_t k)
{
    moe_checkpoint_tensor t;
    float value = -1e30f;
    int64_t at;
    if (moe_checkpoint_find(ckpt, name, &t, &err) != MOE_OK) {
        printf("%s\n", err.text);
        return value;
    }
    at = t.rank == 3 ? (i * t.dims[1] + j) * t.dims[2] + k : t.rank == 2 ? j * t.dims[1] + k : k;
    (void)moe_convert((const char *)t.data + at * bytes_of(t.dtype), t.dtype, &value, MOE_DTYPE_F32, 1, NULL);
    return value;
}

static float read_value(const moe_weights *w, int32_t role, int32_t expert, int32_t row, int32_t column)
{
    static float values[4096];
    if (moe_weights_read_row(w, role, expert, row, values, &err) == MOE_OK) return values[column];
    printf("%s\n", err.text);
    return 1e30f;
}

static moe_weights *golden(moe_context *ctx, const char *folder, int32_t layer_index, moe_checkpoint **ckpt)
{
    moe_layer_desc layer;
    moe_weights *w = NULL;
    char name[128];
    snprintf(name, sizeof name, "golden/%s", folder);
    *ckpt = NULL;
    CHECK_OK(moe_checkpoint_open(test_data(name), NULL, ckpt, &err));
    if (*ckpt == NULL) return NULL;
    CHECK_OK(moe_checkpoint_layer(*ckpt, layer_index, &layer, &err));
    if (err.code == MOE_OK) CHECK_OK(moe_weights_from_checkpoint(ctx, *ckpt, &layer, &w, &err));
    return w;
}

TEST(real_file_layouts_land_in_the_right_places)
{
    moe_context *ctx = open_context(NULL, 1);
    moe_checkpoint *c;
    moe_weights *w;
#define SAME(role, expert, row, column, name, i, j, k) \
    CHECK_EQ(read_value(w, role, expert, row, column), ckpt_value(c, name, i, j, k))
    if ((w = golden(ctx, "mixtral", 0, &c)) != NULL) {
        SAME(MOE_TENSOR_GATE, 5, 39, 63, "model.layers.0.block_sparse_moe.experts.5.w1.weight", 0, 39, 63);
        SAME(MOE_TENSOR_UP, 7, 3, 60, "model.layers.0.block_sparse_moe.experts.7.w3.weight", 0, 3, 60);
        SAME(MOE_TENSOR_DOWN, 0, 63, 39, "model.layers.0.block_sparse_moe.experts.0.w2.weight", 0, 63, 39);
        SAME(MOE_TENSOR_ROUTER, -1, 6, 9, "model.layers.0.block_sparse_moe.gate.weight", 0, 6, 9);
    }
    moe_weights_destroy(w);
    moe_checkpoint_close(c);
    if ((w = golden(ctx, "gpt_oss", 0, &c)) != NULL) { // [E, H, 2 I], columns gate, up, gate, up
        SAME(MOE_TENSOR_GATE, 3, 17, 50, "model.layers.0.mlp.experts.gate_up_proj", 3, 50, 34);
        SAME(MOE_TENSOR_UP, 3, 17, 50, "model.layers.0.mlp.experts.gate_up_proj", 3, 50, 35);
        SAME(MOE_TENSOR_DOWN, 2, 60, 33, "model.layers.0.mlp.experts.down_proj", 2, 33, 60);
        SAME(MOE_TENSOR_GATE_BIAS, 4, 0, 11, "model.layers.0.mlp.experts.gate_up_proj_bias", 0, 4, 22);
        SAME(MOE_TENSOR_UP_BIAS, 4, 0, 11, "model.layers.0.mlp.experts.gate_up_proj_bias", 0, 4, 23);
        SAME(MOE_TENSOR_DOWN_BIAS, 4, 0, 11, "model.layers.0.mlp.experts.down_proj_bias", 0, 4, 11);
        SAME(MOE_TENSOR_ROUTER_BIAS, -1, 0, 5, "model.layers.0.mlp.router.bias", 0, 0, 5);
    }
    moe_weights_destroy(w);
    moe_checkpoint_close(c);
    if ((w = golden(ctx, "llama4", 1, &c)) != NULL) { // [E, H, 2 I], gate then up
        SAME(MOE_TENSOR_GATE, 3, 17, 50, "language_model.model.layers.1.feed_forward.experts.gate_up_proj", 3, 50, 17);
        SAME(MOE_TENSOR_UP, 3, 17, 50, "language_model.model.layers.1.feed_forward.experts.gate_up_proj", 3, 50, 57);
        SAME(MOE_TENSOR_SHARED_DOWN, -1, 50, 17,
             "language_model.model.layers.1.feed_forward.shared_expert.down_proj.weight", 0, 50, 17);
    }
    moe_weights_destroy(w);
    moe_checkpoint_close(c);
    if ((w = golden(ctx, "granitemoeshared", 0, &c)) != NULL) { // [E, 2 I, H], fused shared experts outside the block
        SAME(MOE_TENSOR_GATE, 3, 17, 50, "model.layers.0.block_sparse_moe.input_linear.weight", 3, 17, 50);
        SAME(MOE_TENSOR_UP, 3, 17, 50, "model.layers.0.block_sparse_moe.input_linear.weight", 3, 57, 50);
        SAME(MOE_TENSOR_SHARED_GATE, -1, 17, 50, "model.layers.0.shared_mlp.input_linear.weight", 0, 17, 50);
        SAME(MOE_TENSOR_SHARED_UP, -1, 17, 50, "model.layers.0.shared_mlp.input_linear.weight", 0, 56 + 17, 50);
    }
    moe_weights_destroy(w);
    moe_checkpoint_close(c);
    if ((w = golden(ctx, "inkling", 1, &c)) != NULL) { // two of ten router rows are always-on experts
        SAME(MOE_TENSOR_GATE, 3, 17, 50, "model.llm.layers.1.mlp.experts.w13_weight", 3, 34, 50);
        SAME(MOE_TENSOR_UP, 3, 17, 50, "model.llm.layers.1.mlp.experts.w13_weight", 3, 35, 50);
        SAME(MOE_TENSOR_DOWN, 9, 17, 30, "model.llm.layers.1.mlp.shared_experts.shared_w2_weight", 1, 17, 30);
        SAME(MOE_TENSOR_ROUTER, -1, 9, 50, "model.llm.layers.1.mlp.gate.weight", 0, 9, 50);
        SAME(MOE_TENSOR_SELECT_BIAS, -1, 0, 7, "model.llm.layers.1.mlp.gate.bias", 0, 0, 7);
        SAME(MOE_TENSOR_ROUTER_GLOBAL_SCALE, -1, 0, 0, "model.llm.layers.1.mlp.gate.global_scale", 0, 0, 0);
    }
    moe_weights_destroy(w);
    moe_checkpoint_close(c);
    if ((w = golden(ctx, "ernie4_5_moe", 1, &c)) != NULL) { // selection bias [1, E]
        SAME(MOE_TENSOR_SELECT_BIAS, -1, 0, 7, "model.layers.1.mlp.moe_statics.e_score_correction_bias", 0, 0, 7);
        SAME(MOE_TENSOR_SHARED_UP, -1, 79, 3, "model.layers.1.mlp.shared_experts.up_proj.weight", 0, 79, 3);
    }
    moe_weights_destroy(w);
    moe_checkpoint_close(c);
    moe_context_destroy(ctx);
}

TEST(every_layer_of_every_golden_checkpoint_loads)
{
    static const char *const folders[] = {
        "aria", "cohere2_moe", "cohere2_moe_average", "cohere2_moe_sum_softmax", "dbrx", "deepseek_v2", "deepseek_v3",
        "deepseek_v4", "dots1", "ernie4_5_moe", "flex_olmo", "gemma4", "glm4_moe", "gpt_oss", "granitemoe",
        "granitemoeshared", "hunyuan_v1_moe", "inkling", "jamba", "kolibri1", "lfm2_moe", "llama4", "longcat_flash",
        "minimax_m2", "minimax_m3", "mistral4", "mixtral", "muse_spark", "nemotron_h", "nemotron_h_latent", "olmoe",
        "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_vl_moe", "qwen3_vl_moe_resaved",
        "step3p7",
    };
    moe_context *ctx = open_context(NULL, 1);
    int loaded = 0;
    for (size_t i = 0; i < sizeof folders / sizeof folders[0]; i++) {
        moe_checkpoint *ckpt = NULL;
        int32_t layers[64], count = 0;
        char name[128];
        snprintf(name, sizeof name, "golden/%s", folders[i]);
        CHECK_OK(moe_checkpoint_open(test_data(name), NULL, &ckpt, &err));
        CHECK_OK(moe_checkpoint_layers(ckpt, layers, 64, &count, &err));
        CHECK(count > 0);
        for (int32_t n = 0; n < count; n++) {
            moe_layer_desc layer;
            moe_weights *w = NULL;
            CHECK_OK(moe_checkpoint_layer(ckpt, layers[n], &layer, &err));
            if (err.code == MOE_OK) CHECK_OK(moe_weights_from_checkpoint(ctx, ckpt, &layer, &w, &err));
            loaded += w != NULL;
            moe_weights_destroy(w);
        }
        moe_checkpoint_close(ckpt);
    }
    printf("%d layers of %d checkpoints\n", loaded, (int)(sizeof folders / sizeof folders[0]));
    moe_context_destroy(ctx);
}

TEST_MAIN(
    T(every_source_layout_reads_back_in_natural_order)
    T(what_is_prepared_for_trtllm_gen_is_interleaved_then_shuffled)
    T(packed_rows_alternate_gate_and_up)
    T(experts_without_a_gate_take_up_alone)
    T(other_float_types_are_rounded_to_nearest_even)
    T(slices_of_tensor_parallel_ranks_make_up_the_whole)
    T(experts_of_other_ranks_are_checked_but_never_read)
    T(rows_from_a_callback_come_in_order_and_pack_like_data)
    T(a_callback_that_stops_leaves_the_tensor_unset)
    T(shared_experts_come_in_one_block_or_one_by_one)
    T(tables_read_back_and_rows_are_padded_with_zeros)
    T(the_selection_bias_may_come_whole_in_any_layout)
    T(forced_ids_are_checked_against_the_experts)
    T(a_pruned_expert_is_a_constant_instead_of_matrices)
    T(always_on_experts_lie_behind_the_routed_and_special_ones)
    T(a_tensor_of_the_wrong_shape_is_refused_by_name_with_the_right_one)
    T(every_member_of_a_tensor_is_refused_by_name)
    T(a_role_that_the_layer_does_not_have_is_refused_with_the_member_that_says_so)
    T(a_missing_tensor_is_named_and_all_are_counted)
    T(the_router_is_optional_but_not_without_its_bias)
    T(a_router_that_is_not_of_the_type_that_the_layer_says_is_refused)
    T(a_tensor_given_twice_is_refused_by_name_whole_or_in_part)
    T(sealed_weights_refuse_tensors_and_a_second_seal)
    T(create_refuses_what_it_cannot_hold)
    T(a_replaced_expert_holds_the_new_values_and_a_refused_one_the_old)
    T(saved_weights_come_back_the_same)
    T(every_truncation_and_every_flipped_bit_of_a_file_is_refused)
    T(a_forged_file_with_right_checksums_does_no_harm)
    T(a_file_of_another_layer_is_refused_by_the_member_that_differs)
    T(every_member_of_the_layer_is_compared_with_the_file)
    T(several_threads_may_set_different_experts)
    T(setting_and_replacing_need_at_most_one_expert_of_memory)
    T(every_allocation_that_fails_is_an_error_and_leaks_nothing)
    T(a_checkpoint_with_something_missing_strange_or_misshapen_is_refused_by_name)
    T(stacks_lie_as_their_shape_says_and_where_it_does_not_as_the_layer_says)
    T(dbrx_and_aria_files_are_understood)
    T(shared_experts_inside_the_routing_become_always_on_ones)
    T(a_router_bias_is_added_to_logits_or_ranks_as_the_layer_says)
    T(real_file_layouts_land_in_the_right_places)
    T(every_layer_of_every_golden_checkpoint_loads)
)
