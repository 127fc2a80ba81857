// sources.h - tensors of weights in every layout of the field, whose values are known from their places; an allocator
// that counts
//
// Included behind moe.h and test.h.
#ifndef SOURCES_H
#define SOURCES_H

// ---- an allocator that counts, and fails when asked -----------------------------------------------------------------

typedef struct counter {
    uint64_t now, peak, calls, fail_at; // fail_at: this call returns NULL, 1 is the first; 0: none does
    int64_t blocks;
} counter;

TEST_UNUSED static void *counter_alloc(void *user, size_t size, size_t align)
{
    counter *c = (counter *)user;
    if (++c->calls == c->fail_at) return NULL;
    c->now += size;
    if (c->now > c->peak) c->peak = c->now;
    c->blocks++;
    return moe__default_alloc(NULL, size, align);
}

TEST_UNUSED static void counter_free(void *user, void *ptr, size_t size)
{
    counter *c = (counter *)user;
    c->now -= size;
    c->blocks--;
    moe__default_free(NULL, ptr, size);
}

// ---- layers and their tensors in natural order ----------------------------------------------------------------------

TEST_UNUSED static moe_layer_desc make_layer(int32_t hidden, int32_t inner, int32_t experts, int32_t format,
                                             int32_t gated)
{
    moe_layer_desc layer;
    memset(&layer, 0, sizeof layer);
    layer.hidden_size = hidden;
    layer.intermediate_size = inner;
    layer.num_experts = experts;
    layer.format = format;
    layer.activation.kind = gated ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_RELU2;
    layer.routing.score = MOE_SCORE_SOFTMAX;
    layer.routing.score_order = MOE_SCORE_BEFORE_TOPK;
    layer.routing.top_k = 1;
    return layer;
}

// A value that every float type holds, of a tensor, row and column.
static float value_of(int32_t role, int32_t expert, int64_t row, int64_t column)
{
    uint32_t h = (uint32_t)role * 2654435761u ^ (uint32_t)(expert + 7) * 2246822519u ^ (uint32_t)row * 3266489917u ^
                 (uint32_t)column * 668265263u;
    h ^= h >> 15;
    h *= 2246822519u;
    h ^= h >> 13;
    return (float)((int32_t)(h & 255u) - 128) / 32.0f;
}

static int32_t dtype_of(int32_t format)
{
    return format == MOE_FORMAT_F32 ? MOE_DTYPE_F32 : format == MOE_FORMAT_BF16 ? MOE_DTYPE_BF16 : MOE_DTYPE_F16;
}

static int64_t bytes_of(int32_t dtype)
{
    return dtype == MOE_DTYPE_F32 || dtype == MOE_DTYPE_I32 ? 4 : dtype == MOE_DTYPE_I64 ? 8 : 2;
}

static void put_value(void *data, int32_t dtype, int64_t index, float value)
{
    uint16_t narrow = 0;
    if (dtype == MOE_DTYPE_F32) { memcpy((char *)data + 4 * index, &value, 4); return; }
    (void)moe_convert(&value, MOE_DTYPE_F32, &narrow, dtype, 1, NULL);
    memcpy((char *)data + 2 * index, &narrow, 2);
}

// The natural row (of the separate tensor) and role behind row j of a fused one.
static int32_t fused_role(int32_t halves, int64_t j, int64_t inner, int32_t gate, int32_t up, int64_t *row)
{
    switch (halves) {
    case MOE_HALVES_GATE_UP: *row = j < inner ? j : j - inner; return j < inner ? gate : up;
    case MOE_HALVES_UP_GATE: *row = j < inner ? j : j - inner; return j < inner ? up : gate;
    case MOE_HALVES_INTERLEAVED: *row = j / 2; return (j & 1) == 0 ? gate : up;
    default: *row = j / 2; return (j & 1) == 0 ? up : gate;
    }
}

// shuffle_matrix_a as its users write it: row n of the result is this row of the input.
static int64_t shuffled_from(int32_t order, int64_t n)
{
    int64_t b = order == MOE_ROWS_SHUFFLED_128 ? 32 : 16, s = b / 8;
    if (order == MOE_ROWS_NATURAL) return n;
    return b * (n / b) + n % 8 * s + n % b / 8;
}

typedef struct source {
    moe_tensor t;
    unsigned char *memory;
} source;

TEST_UNUSED static void source_free(source *s) { free(s->memory); }

// A tensor of values value_of(role, ...) with rows x columns in natural order (fused: rows of both halves), stored as
// asked; `shift` misaligns it. expert -1: a stack of `stack`.
static source make_source(int32_t role, int32_t expert, int32_t stack, int64_t rows, int64_t columns, int32_t dtype,
                          int32_t layout, int32_t halves, int32_t order, int32_t shift)
{
    source s;
    int64_t size = bytes_of(dtype), b = 128 / size, count = stack > 0 ? stack : 1;
    int32_t vector = columns == 0, at = 0;
    int32_t gate = role == MOE_TENSOR_GATE_UP ? MOE_TENSOR_GATE : role == MOE_TENSOR_GATE_UP_BIAS ? MOE_TENSOR_GATE_BIAS
                                                                                            : MOE_TENSOR_SHARED_GATE;
    if (vector) columns = 1;
    memset(&s, 0, sizeof s);
    s.t.role = role;
    s.t.expert = expert;
    s.t.index = -1;
    s.t.dtype = dtype;
    s.t.layout = layout;
    s.t.halves = halves;
    s.t.row_order = order;
    s.t.data_bytes = (uint64_t)(count * rows * columns * size);
    s.memory = (unsigned char *)malloc((size_t)s.t.data_bytes + 8);
    s.t.data = s.memory + shift;
    if (stack > 0) s.t.dims[at++] = stack;
    if (vector) {
        s.t.dims[at++] = rows;
    } else if (layout == MOE_LAYOUT_MAJOR_MN) {
        s.t.dims[at++] = columns;
        s.t.dims[at++] = rows;
    } else if (layout == MOE_LAYOUT_BLOCK_MAJOR_K) {
        s.t.dims[at++] = columns / b;
        s.t.dims[at++] = rows;
        s.t.dims[at++] = b;
    } else {
        s.t.dims[at++] = rows;
        s.t.dims[at++] = columns;
    }
    s.t.rank = at;
    for (int64_t e = 0; e < count; e++)
        for (int64_t n = 0; n < rows; n++)
            for (int64_t c = 0; c < columns; c++) {
                int64_t row = shuffled_from(order, n), place = n * columns + c;
                int32_t own = role;
                if (halves > MOE_HALVES_SEPARATE) own = fused_role(halves, row, rows / 2, gate, gate + 1, &row);
                if (layout == MOE_LAYOUT_MAJOR_MN && !vector) place = c * rows + n;
                if (layout == MOE_LAYOUT_BLOCK_MAJOR_K && !vector) place = (c / b * rows + n) * b + c % b;
                put_value(s.memory + shift, dtype, e * rows * columns + place,
                          value_of(own, stack > 0 ? (int32_t)e : expert, row, vector ? 0 : c));
            }
    return s;
}

static void set_source(moe_weights *weights, source s)
{
    CHECK_OK(moe_weights_set_tensor(weights, &s.t, &err));
    memset(s.memory, 0xee, (size_t)s.t.data_bytes); // may be freed on return
    source_free(&s);
}

// Gate, up, down and the biases of one expert, in the plain layout.
static void set_plain_expert(moe_weights *w, const moe_layer_desc *l, int32_t e)
{
    int32_t h = l->hidden_size, i = l->intermediate_size, d = dtype_of(l->format);
    if (moe_activation_is_gated(l->activation.kind)) {
        set_source(w, make_source(MOE_TENSOR_GATE, e, 0, i, h, d, 0, 0, 0, 0));
        if (l->gemm1_bias) set_source(w, make_source(MOE_TENSOR_GATE_BIAS, e, 0, i, 0, d, 0, 0, 0, 0));
    }
    set_source(w, make_source(MOE_TENSOR_UP, e, 0, i, h, d, 0, 0, 0, 0));
    if (l->gemm1_bias) set_source(w, make_source(MOE_TENSOR_UP_BIAS, e, 0, i, 0, d, 0, 0, 0, 0));
    set_source(w, make_source(MOE_TENSOR_DOWN, e, 0, h, i, d, 0, 0, 0, 0));
    if (l->gemm2_bias) set_source(w, make_source(MOE_TENSOR_DOWN_BIAS, e, 0, h, 0, d, 0, 0, 0, 0));
}

TEST_UNUSED static moe_weights *make_weights(moe_context *ctx, const moe_layer_desc *layer, int32_t seal)
{
    moe_weights *w = NULL;
    CHECK_OK(moe_weights_create(ctx, layer, NULL, &w, &err));
    for (int32_t e = 0; w != NULL && e < layer->num_experts; e++) set_plain_expert(w, layer, e);
    if (w != NULL && seal) CHECK_OK(moe_weights_seal(w, &err));
    return w;
}

// 1 when `rows` rows of `columns` values read back as value_of(role, expert, first row + r, first column + c).
static int reads_as(const moe_weights *w, int32_t role, int32_t expert, int64_t rows, int64_t columns,
                    int64_t first_row, int64_t first_column)
{
    static float row[4096];
    int32_t vector = columns == 0;
    for (int32_t r = 0; r < (vector ? 1 : rows); r++) {
        if (moe_weights_read_row(w, role, expert, r, row, &err) != MOE_OK) {
            printf("%s\n", err.text);
            return 0;
        }
        for (int64_t c = 0; c < (vector ? rows : columns); c++)
            if (row[c] != (vector ? value_of(role, expert, first_row + c, 0)
                                  : value_of(role, expert, first_row + r, first_column + c))) {
                printf("%s of expert %d differs at row %d, column %d\n", moe_role_string(role), expert, r, (int)c);
                return 0;
            }
    }
    return 1;
}

TEST_UNUSED static int expert_reads(const moe_weights *w, const moe_layer_desc *l, int32_t e)
{
    int32_t h = l->hidden_size, i = l->intermediate_size, gated = moe_activation_is_gated(l->activation.kind);
    return (!gated || reads_as(w, MOE_TENSOR_GATE, e, i, h, 0, 0)) && reads_as(w, MOE_TENSOR_UP, e, i, h, 0, 0) &&
           reads_as(w, MOE_TENSOR_DOWN, e, h, i, 0, 0) &&
           (!l->gemm1_bias || ((!gated || reads_as(w, MOE_TENSOR_GATE_BIAS, e, i, 0, 0, 0)) &&
                               reads_as(w, MOE_TENSOR_UP_BIAS, e, i, 0, 0, 0))) &&
           (!l->gemm2_bias || reads_as(w, MOE_TENSOR_DOWN_BIAS, e, h, 0, 0, 0));
}

#endif // SOURCES_H
