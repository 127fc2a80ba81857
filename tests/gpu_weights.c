// gpu_weights.c - experts on the device: where every element lies, every way in, and every way back
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "gpu.h"
#include "sources.h"

#include <pthread.h>

// ---- what must lie there, from the description of the layout alone --------------------------------------------------

// Which feature of which half lies in packed row p of a gated W1.
static int64_t gated_feature(int64_t p, int *up)
{
    int64_t q = p % 32, f = p / 32 * 16;
    *up = q >= 16;
    return f + (q % 16 < 8 ? 2 * (q % 8) : 2 * (q % 8) + 1);
}

static int64_t plain_row(int64_t p) { return p / 32 * 32 + 4 * (p % 8) + p % 32 / 8; }

typedef struct matrix_of {
    int32_t role, up_role, expert; // up_role 0: not gated
    int64_t rows, columns;         // gated: of one half
    int64_t first_row, first_column; // of this rank's slice
} matrix_of;

static float matrix_value(const matrix_of *m, int64_t packed, int64_t k)
{
    int up = 0;
    int64_t row = m->up_role != 0 ? gated_feature(packed, &up) : plain_row(packed);
    if (row >= m->rows || k >= m->columns) return 0;
    return value_of(up ? m->up_role : m->role, m->expert, m->first_row + row, m->first_column + k);
}

// 1 when `blocks` hold the matrix; *bytes: their size.
static int matrix_lies(const unsigned char *blocks, const matrix_of *m, int32_t dtype, size_t *bytes)
{
    int64_t rows = m->up_role != 0 ? 2 * m->rows : m->rows, slabs = (rows + 127) / 128, ks = (m->columns + 63) / 64;
    for (int64_t slab = 0; slab < slabs; slab++)
        for (int64_t kb = 0; kb < ks; kb++)
            for (int64_t r = 0; r < 128; r++)
                for (int64_t e = 0; e < 64; e++) {
                    const unsigned char *block = blocks + (slab * ks + kb) * 16384;
                    int64_t chunk = (e / 8) ^ (r & 7);
                    float value = moe__load(block + r * 128 + chunk * 16 + e % 8 * 2, dtype, 0);
                    if (value == matrix_value(m, slab * 128 + r, kb * 64 + e)) continue;
                    printf("%s of expert %d: packed row %d, k %d holds %g\n", moe_role_string(m->role), m->expert,
                           (int)(slab * 128 + r), (int)(kb * 64 + e), (double)value);
                    return 0;
                }
    *bytes = (size_t)(slabs * ks) * 16384;
    return 1;
}

static int bias_lies(const unsigned char *at, int32_t role, int32_t expert, int64_t n, int64_t first)
{
    float value;
    for (int64_t i = 0; i < n; i++) {
        memcpy(&value, at + 4 * i, 4);
        if (value != value_of(role, expert, first + i, 0)) return 0;
    }
    return 1;
}

static int zeros(const unsigned char *at, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (at[i] != 0) return 0;
    return 1;
}

static size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

// 1 when the block at `memory` is the expert's, of features [first, first + features).
static int block_lies(const unsigned char *memory, const moe_layer_desc *l, int32_t expert, int64_t first,
                      int64_t features, size_t *bytes)
{
    int gated = moe_activation_is_gated(l->activation.kind);
    int32_t dtype = dtype_of(l->format);
    matrix_of w1 = { gated ? MOE_TENSOR_GATE : MOE_TENSOR_UP, gated ? MOE_TENSOR_UP : 0, expert, features,
                     l->hidden_size, first, 0 };
    matrix_of w2 = { MOE_TENSOR_DOWN, 0, expert, l->hidden_size, features, 0, first };
    size_t at = 0, size = 0;
    if (!matrix_lies(memory, &w1, dtype, &at)) return 0;
    if (l->gemm1_bias) {
        size_t n = (size_t)features * 4;
        if (gated && !bias_lies(memory + at, MOE_TENSOR_GATE_BIAS, expert, features, first)) return 0;
        if (!bias_lies(memory + at + (gated ? n : 0), MOE_TENSOR_UP_BIAS, expert, features, first)) return 0;
        if (gated) n *= 2;
        if (!zeros(memory + at + n, aligned(n) - n)) return 0;
        at += aligned(n);
    }
    if (!matrix_lies(memory + at, &w2, dtype, &size)) return 0;
    at += size;
    if (l->gemm2_bias) {
        size_t n = (size_t)l->hidden_size * 4;
        if (!bias_lies(memory + at, MOE_TENSOR_DOWN_BIAS, expert, l->hidden_size, 0)) return 0;
        if (!zeros(memory + at + n, aligned(n) - n)) return 0;
        at += aligned(n);
    }
    *bytes = at;
    return 1;
}

// All bytes of the blocks, as the table of addresses finds them; *bytes: of one.
static unsigned char *download(const moe_weights *w, size_t *bytes)
{
    size_t blocks = (size_t)w->layout.blocks;
    uint64_t *table = (uint64_t *)malloc((blocks + 1) * 8);
    unsigned char *memory;
    *bytes = (size_t)w->layout.expert.bytes;
    memory = (unsigned char *)malloc(blocks * *bytes + 1);
    gpu_get(table, moe__device_addresses(w), (blocks + 1) * 8);
    for (size_t i = 0; i < blocks; i++)
        gpu_get(memory + i * *bytes, (const void *)(uintptr_t)table[i], *bytes);
    free(table);
    return memory;
}

static void check_blocks(const moe_weights *w, const moe_layer_desc *l, const char *what)
{
    size_t bytes, size = 0;
    unsigned char *memory = download(w, &bytes);
    for (int32_t e = 0; e < l->num_experts; e++) {
        int32_t local = moe__layer_local(&w->layer, e);
        if (local < 0) continue;
        if (!block_lies(memory + (size_t)local * bytes, l, e, w->layout.expert.first_feature,
                        w->layout.expert.features, &size))
            test_fail2(__FILE__, __LINE__, what, "lies wrong");
        CHECK_EQ(size, bytes);
    }
    free(memory);
}

TEST(blocks_lie_as_the_kernels_read_them)
{
    static const int32_t sizes[][2] = { { 8, 8 }, { 72, 40 }, { 136, 72 }, { 64, 200 }, { 264, 136 } };
    if (!gpu_open()) return;
    for (int s = 0; s < 5; s++)
        for (int gated = 0; gated < 2; gated++)
            for (int bias = 0; bias < 2; bias++) {
                moe_layer_desc l = make_layer(sizes[s][0], sizes[s][1], 3,
                                              (s + bias) % 2 == 0 ? MOE_FORMAT_BF16 : MOE_FORMAT_F16, gated);
                moe_weights_info info = { 0 };
                moe_weights *w;
                char what[64];
                snprintf(what, sizeof what, "H %d I %d, gated %d, bias %d", sizes[s][0], sizes[s][1], gated, bias);
                l.gemm1_bias = l.gemm2_bias = bias;
                if ((w = make_weights(gpu.ctx, &l, 1)) == NULL) continue;
                check_blocks(w, &l, what);
                CHECK_OK(moe_weights_get_info(w, &info, &err));
                CHECK_EQ(info.layout_id, (uint32_t)MOE__LAYOUT_TILES_16);
                CHECK_EQ(info.expert_bytes, w->layout.expert.bytes);
                CHECK_EQ(info.weight_bytes, 3 * info.expert_bytes + 256);
                for (int32_t e = 0; e < 3; e++) CHECK(expert_reads(w, &l, e));
                moe_weights_destroy(w);
            }
}

// ---- ways in --------------------------------------------------------------------------------------------------------

// The same tensor with its data in device memory.
static void set_from_device(moe_weights *w, source s)
{
    const void *host = s.t.data;
    s.t.memory = MOE_MEMORY_DEVICE;
    s.t.data = gpu_copy(host, (size_t)s.t.data_bytes);
    CHECK_OK(moe_weights_set_tensor(w, &s.t, &err));
    s.t.data = host;
    source_free(&s);
    gpu_release();
}

static void set_either(moe_weights *w, source s, int device)
{
    if (device) set_from_device(w, s);
    else set_source(w, s);
}

TEST(every_source_layout_from_host_and_from_device)
{
    if (!gpu_open()) return;
    for (int device = 0; device < 2; device++)
        for (int32_t layout = MOE_LAYOUT_MAJOR_K; layout <= MOE_LAYOUT_BLOCK_MAJOR_K; layout++)
            for (int32_t halves = MOE_HALVES_SEPARATE; halves <= MOE_HALVES_INTERLEAVED_UP_GATE; halves++) {
                enum { H = 64, I = 128 };
                moe_layer_desc l = make_layer(H, I, 2, MOE_FORMAT_BF16, 1);
                int32_t d = halves % 2 ? MOE_DTYPE_BF16 : layout % 2 ? MOE_DTYPE_F32 : MOE_DTYPE_F16;
                int32_t order = layout == MOE_LAYOUT_MAJOR_K ? halves % 3 : 0, stack = halves % 2 ? 2 : 0;
                moe_weights *w = NULL;
                char what[64];
                l.gemm1_bias = l.gemm2_bias = 1;
                snprintf(what, sizeof what, "layout %d, halves %d, device %d", layout, halves, device);
                CHECK_OK(moe_weights_create(gpu.ctx, &l, NULL, &w, &err));
                if (w == NULL) continue;
                for (int32_t e = stack ? -1 : 0; e < (stack ? 0 : 2); e++) {
                    static const int32_t roles[] = { MOE_TENSOR_UP, MOE_TENSOR_GATE, MOE_TENSOR_UP_BIAS,
                                                     MOE_TENSOR_GATE_BIAS };
                    if (halves > MOE_HALVES_SEPARATE) {
                        set_either(w, make_source(MOE_TENSOR_GATE_UP, e, stack, 2 * I, H, d, layout, halves, order, 0),
                                   device);
                        set_either(w, make_source(MOE_TENSOR_GATE_UP_BIAS, e, stack, 2 * I, 0, d, layout, halves,
                                                  order, 0), device);
                    } else {
                        for (int r = 0; r < 4; r++)
                            set_either(w, make_source(roles[r], e, stack, I, r < 2 ? H : 0, d, layout, halves, order,
                                                      0), device);
                    }
                    set_either(w, make_source(MOE_TENSOR_DOWN, e, stack, H, I, d, layout, 0, order, 0), device);
                    set_either(w, make_source(MOE_TENSOR_DOWN_BIAS, e, stack, H, 0, d, layout, 0, order, 0), device);
                }
                CHECK_OK(moe_weights_seal(w, &err));
                check_blocks(w, &l, what);
                moe_weights_destroy(w);
            }
}

// Sizes that do not fill tiles, and slices that begin within one: by the kernel, since the sources are on the device.
TEST(odd_sizes_and_slices_from_device)
{
    static const int32_t sizes[][3] = { { 72, 40, 1 }, { 8, 136, 1 }, { 200, 48, 2 }, { 64, 88, 3 } }; // H, I, ranks
    if (!gpu_open()) return;
    CHECK(moe__pack_kernel(gpu.ctx) != NULL);
    for (int s = 0; s < 4; s++)
        for (int32_t rank = 0; rank < sizes[s][2]; rank++)
            for (int variant = 0; variant < 4; variant++) {
                int32_t h = sizes[s][0], n = sizes[s][1];
                int32_t layout = variant % 2 ? MOE_LAYOUT_MAJOR_MN : MOE_LAYOUT_UNSET; // unset: output-major
                int32_t halves = variant / 2 ? MOE_HALVES_INTERLEAVED : MOE_HALVES_UP_GATE;
                moe_layer_desc l = make_layer(h, n, 2, variant == 1 ? MOE_FORMAT_F16 : MOE_FORMAT_BF16, 1);
                int32_t d = variant == 3 ? MOE_DTYPE_F32 : MOE_DTYPE_BF16;
                moe_weights *w = NULL;
                char what[64];
                l.parallel.tp_size = sizes[s][2];
                l.parallel.tp_rank = rank;
                snprintf(what, sizeof what, "H %d I %d, rank %d, variant %d", h, n, rank, variant);
                CHECK_OK(moe_weights_create(gpu.ctx, &l, NULL, &w, &err));
                if (w == NULL) continue;
                if (!w->layout.tiled) { // a slice that the kernels of products do not take
                    moe_weights_destroy(w);
                    continue;
                }
                for (int32_t e = 0; e < 2; e++) {
                    set_from_device(w, make_source(MOE_TENSOR_GATE_UP, e, 0, 2 * n, h, d, layout, halves, 0, 0));
                    set_from_device(w, make_source(MOE_TENSOR_DOWN, e, 0, h, n, d, layout, 0, 0, 0));
                }
                CHECK_OK(moe_weights_seal(w, &err));
                check_blocks(w, &l, what);
                moe_weights_destroy(w);
            }
}

static int32_t give_rows(void *user, int32_t role, int32_t expert, int32_t row, float *out)
{
    const moe_layer_desc *l = (const moe_layer_desc *)user;
    int32_t n = role == MOE_TENSOR_DOWN ? l->intermediate_size : l->hidden_size;
    for (int32_t i = 0; i < n; i++) out[i] = value_of(role, expert, row, i);
    return 0;
}

TEST(rows_by_a_callback_and_slices_of_ranks)
{
    static const int32_t map[5] = { 1, -1, 0, -1, 2 };
    if (!gpu_open()) return;
    for (int32_t rank = 0; rank < 2; rank++) {
        moe_layer_desc l = make_layer(72, 48, 5, MOE_FORMAT_BF16, 1);
        moe_weights *w = NULL;
        l.parallel.tp_size = 2;
        l.parallel.tp_rank = rank;
        l.parallel.expert_map = map;
        l.parallel.local_experts = 3;
        CHECK_OK(moe_weights_create(gpu.ctx, &l, NULL, &w, &err));
        if (w == NULL) return;
        for (int32_t e = 0; e < 5; e++)
            for (int32_t role = MOE_TENSOR_GATE; role <= MOE_TENSOR_DOWN; role++) {
                moe_tensor t;
                if (role == MOE_TENSOR_GATE_UP) continue;
                memset(&t, 0, sizeof t);
                t.role = role;
                t.expert = e;
                t.rows = give_rows;
                t.rows_user = &l;
                CHECK_OK(moe_weights_set_tensor(w, &t, &err));
            }
        CHECK_OK(moe_weights_seal(w, &err));
        CHECK_EQ(w->layout.expert.features, 24);
        check_blocks(w, &l, rank == 0 ? "first rank" : "second rank");
        moe_weights_destroy(w);
    }
}

// Two shared experts side by side, whole or one after the other, each half of its own.
TEST(shared_experts_lie_side_by_side)
{
    enum { H = 72, S = 24 };
    if (!gpu_open()) return;
    for (int apart = 0; apart < 2; apart++)
        for (int gated = 0; gated < 2; gated++) {
            moe_layer_desc l = make_layer(H, 40, 2, MOE_FORMAT_F16, gated);
            moe_weights *w = NULL;
            l.shared.count = 2;
            l.shared.intermediate_size = S;
            CHECK_OK(moe_weights_create(gpu.ctx, &l, NULL, &w, &err));
            if (w == NULL) return;
            for (int32_t e = 0; e < 2; e++) set_plain_expert(w, &l, e);
            for (int32_t role = MOE_TENSOR_SHARED_GATE; role <= MOE_TENSOR_SHARED_DOWN; role++) {
                int down = role == MOE_TENSOR_SHARED_DOWN;
                if (role == MOE_TENSOR_SHARED_GATE_UP || (role == MOE_TENSOR_SHARED_GATE && !gated)) continue;
                if (!apart) {
                    set_source(w, make_source(role, -1, 0, down ? H : 2 * S, down ? 2 * S : H, MOE_DTYPE_F32, 0, 0, 0,
                                              0));
                    continue;
                }
                for (int32_t i = 1; i >= 0; i--) { // values of the whole, cut out of it
                    source s = make_source(role, -1, 0, down ? H : S, down ? S : H, MOE_DTYPE_F32, 0, 0, 0, 0);
                    for (int r = 0; r < (down ? H : S); r++)
                        for (int c = 0; c < (down ? S : H); c++)
                            put_value(s.memory, MOE_DTYPE_F32, (int64_t)r * (down ? S : H) + c,
                                      down ? value_of(role, -1, r, i * S + c) : value_of(role, -1, i * S + r, c));
                    s.t.index = i;
                    set_source(w, s);
                }
            }
            CHECK_OK(moe_weights_seal(w, &err));
            if (gated) CHECK(reads_as(w, MOE_TENSOR_SHARED_GATE, -1, 2 * S, H, 0, 0));
            CHECK(reads_as(w, MOE_TENSOR_SHARED_UP, -1, 2 * S, H, 0, 0));
            CHECK(reads_as(w, MOE_TENSOR_SHARED_DOWN, -1, H, 2 * S, 0, 0));
            {
                matrix_of w1 = { gated ? MOE_TENSOR_SHARED_GATE : MOE_TENSOR_SHARED_UP,
                                 gated ? MOE_TENSOR_SHARED_UP : 0, -1, 2 * S, H, 0, 0 };
                matrix_of w2 = { MOE_TENSOR_SHARED_DOWN, 0, -1, H, 2 * S, 0, 0 };
                size_t bytes = (size_t)w->layout.shared.bytes, size = 0, more = 0;
                unsigned char *memory = (unsigned char *)malloc(bytes);
                uint64_t address = 0;
                gpu_get(&address, moe__device_addresses(w) + 2, 8);
                gpu_get(memory, (const void *)(uintptr_t)address, bytes);
                CHECK(matrix_lies(memory, &w1, MOE_DTYPE_F16, &size));
                CHECK(matrix_lies(memory + size, &w2, MOE_DTYPE_F16, &more));
                CHECK_EQ(size + more, bytes);
                free(memory);
            }
            moe_weights_destroy(w);
        }
}

TEST(tables_and_ids_from_device_memory)
{
    enum { ROWS = 5 };
    int64_t ids[ROWS] = { 2, 0, 1, 2, 1 };
    moe_layer_desc l = make_layer(8, 8, 3, MOE_FORMAT_BF16, 0);
    moe_weights *w = NULL;
    moe_tensor t;
    float row[8];
    if (!gpu_open()) return;
    l.routing.forced_rows = ROWS;
    l.routing.bias_rows = 1;
    CHECK_OK(moe_weights_create(gpu.ctx, &l, NULL, &w, &err));
    if (w == NULL) return;
    for (int32_t e = 0; e < 3; e++) set_plain_expert(w, &l, e);
    set_from_device(w, make_source(MOE_TENSOR_ROUTER, -1, 0, 3, 8, MOE_DTYPE_BF16, 0, 0, 0, 0));
    set_from_device(w, make_source(MOE_TENSOR_SELECT_BIAS, -1, 0, 3, 0, MOE_DTYPE_F32, 0, 0, 0, 0));
    memset(&t, 0, sizeof t);
    t.role = MOE_TENSOR_FORCED_IDS;
    t.expert = -1;
    t.dtype = MOE_DTYPE_I64;
    t.rank = 2;
    t.dims[0] = ROWS;
    t.dims[1] = 1;
    t.data_bytes = sizeof ids;
    t.memory = MOE_MEMORY_DEVICE;
    ids[3] = 3;
    t.data = gpu_copy(ids, sizeof ids);
    CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_DATA, "tensor.data");
    ids[3] = 2;
    t.data = gpu_copy(ids, sizeof ids);
    CHECK_OK(moe_weights_set_tensor(w, &t, &err));
    gpu_release();
    CHECK_OK(moe_weights_seal(w, &err));
    CHECK(reads_as(w, MOE_TENSOR_ROUTER, -1, 3, 8, 0, 0));
    for (int i = 0; i < ROWS; i++) {
        CHECK_OK(moe_weights_read_row(w, MOE_TENSOR_FORCED_IDS, -1, i, row, &err));
        CHECK_EQ((int)row[0], (int)ids[i]);
    }
    moe_weights_destroy(w);
    CHECK_OK(moe_weights_create(gpu.cpu, &l, NULL, &w, &err));
    CHECK_ERR(moe_weights_set_tensor(w, &t, &err), MOE_ERROR_UNSUPPORTED, "tensor.memory");
    moe_weights_destroy(w);
}

typedef struct set_job {
    moe_weights *w;
    const moe_layer_desc *l;
    int32_t expert, failures;
} set_job;

static void *set_expert_thread(void *user)
{
    set_job *job = (set_job *)user;
    moe_error own;
    for (int32_t role = MOE_TENSOR_GATE; role <= MOE_TENSOR_DOWN; role++) {
        int32_t h = job->l->hidden_size, i = job->l->intermediate_size, down = role == MOE_TENSOR_DOWN;
        source s;
        if (role == MOE_TENSOR_GATE_UP) continue;
        s = make_source(role, job->expert, 0, down ? h : i, down ? i : h, MOE_DTYPE_F32, 0, 0, 0, 0);
        job->failures += moe_weights_set_tensor(job->w, &s.t, &own) != MOE_OK;
        job->failures += moe_weights_set_tensor(job->w, &s.t, &own) != MOE_ERROR_STATE; // set before
        source_free(&s);
    }
    return NULL;
}

TEST(several_threads_set_different_experts)
{
    enum { EXPERTS = 6 };
    moe_layer_desc l = make_layer(72, 40, EXPERTS, MOE_FORMAT_BF16, 1);
    pthread_t threads[EXPERTS];
    set_job jobs[EXPERTS];
    moe_weights *w = NULL;
    if (!gpu_open()) return;
    CHECK_OK(moe_weights_create(gpu.ctx, &l, NULL, &w, &err));
    if (w == NULL) return;
    for (int32_t e = 0; e < EXPERTS; e++) {
        jobs[e].w = w;
        jobs[e].l = &l;
        jobs[e].expert = e;
        jobs[e].failures = 0;
        CHECK_EQ(pthread_create(&threads[e], NULL, set_expert_thread, &jobs[e]), 0);
    }
    for (int32_t e = 0; e < EXPERTS; e++) {
        pthread_join(threads[e], NULL);
        CHECK_EQ(jobs[e].failures, 0);
    }
    CHECK_OK(moe_weights_seal(w, &err));
    check_blocks(w, &l, "threads");
    moe_weights_destroy(w);
}

// ---- memory ---------------------------------------------------------------------------------------------------------

TEST(the_callers_device_memory_holds_the_experts)
{
    moe_layer_desc l = make_layer(72, 40, 3, MOE_FORMAT_BF16, 1);
    moe_weights_desc desc;
    moe_plan_info info;
    moe_weights *w = NULL;
    unsigned char host[256];
    if (!gpu_open()) return;
    memset(&desc, 0, sizeof desc);
    memset(&info, 0, sizeof info);
    CHECK_OK(moe_plan_query(gpu.ctx, &l, NULL, &info, &err));
    desc.memory = gpu_make((size_t)info.weight_bytes);
    desc.memory_bytes = info.weight_bytes;
    CHECK_ERR(moe_weights_create(gpu.ctx, &l, &desc, &w, &err), MOE_ERROR_ARGUMENT, "desc.memory"); // not the host's
    desc.memory_kind = MOE_MEMORY_DEVICE;
    CHECK_ERR(moe_weights_create(gpu.cpu, &l, &desc, &w, &err), MOE_ERROR_UNSUPPORTED, "desc.memory_kind");
    desc.memory_bytes--;
    CHECK_ERR(moe_weights_create(gpu.ctx, &l, &desc, &w, &err), MOE_ERROR_ARGUMENT, "desc.memory_bytes");
    desc.memory_bytes++;
    desc.memory = (char *)desc.memory + 16;
    CHECK_ERR(moe_weights_create(gpu.ctx, &l, &desc, &w, &err), MOE_ERROR_ARGUMENT, "desc.memory");
    desc.memory = (char *)desc.memory - 16;
    CHECK(w == NULL);
    CHECK_OK(moe_weights_create(gpu.ctx, &l, &desc, &w, &err));
    if (w == NULL) return;
    for (int32_t e = 0; e < 3; e++) set_plain_expert(w, &l, e);
    CHECK_OK(moe_weights_seal(w, &err));
    CHECK(moe__device_block(w, 0) == (moe__cu_ptr)(uintptr_t)desc.memory);
    check_blocks(w, &l, "the caller's memory");
    moe_weights_destroy(w);
    gpu_get(host, desc.memory, sizeof host); // still there
    CHECK(!zeros(host, sizeof host));
    gpu_release();
}

// The layer's output for 5 tokens whose slots go to experts 0, 1 and 2.
static void run_layer(const moe_plan *plan, const moe_weights *w, const moe_layer_desc *l, void *stream, float *out)
{
    enum { T = 5 };
    size_t n = (size_t)(T * l->hidden_size);
    uint16_t *x = (uint16_t *)malloc(n * 2);
    int32_t ids[T];
    float weights[T];
    moe_execute_args args;
    moe_plan_info info;
    uint64_t seed = 9;
    memset(&args, 0, sizeof args);
    memset(&info, 0, sizeof info);
    CHECK_OK(moe_plan_get_info(plan, &info, &err));
    for (size_t i = 0; i < n; i++) x[i] = moe__f32_to_bf16((float)((int)(test_random_u32(&seed) % 9) - 4) / 8);
    for (int t = 0; t < T; t++) {
        ids[t] = t % 3;
        weights[t] = 0.5f + (float)t / 8;
    }
    args.input_mode = MOE_INPUT_IDS;
    args.num_tokens = T;
    args.x = gpu_copy(x, n * 2);
    args.ids = gpu_copy(ids, sizeof ids);
    args.weights = gpu_copy(weights, sizeof weights);
    args.out = gpu_make(n * 4);
    args.workspace = gpu_make_raw((size_t)info.workspace_bytes);
    args.workspace_bytes = info.workspace_bytes;
    CHECK_EQ(moe_execute(plan, w, &args, stream), MOE_OK);
    gpu_get(out, args.out, n * 4);
    gpu_release();
    free(x);
}

// Expert `expert` gets the values of `like`, in the order of the stream.
static void replace_by(moe_weights *w, const moe_layer_desc *l, int32_t expert, int32_t like, void *stream)
{
    int32_t h = l->hidden_size, i = l->intermediate_size;
    source s[3];
    moe_tensor t[3];
    for (int j = 0; j < 3; j++) {
        s[j] = make_source(j == 0 ? MOE_TENSOR_GATE : j == 1 ? MOE_TENSOR_UP : MOE_TENSOR_DOWN, like, 0, j < 2 ? i : h,
                           j < 2 ? h : i, MOE_DTYPE_F32, 0, 0, 0, 0);
        t[j] = s[j].t;
        t[j].expert = expert;
    }
    CHECK_OK(moe_weights_replace_expert(w, expert, t, 3, stream, &err));
    for (int j = 0; j < 3; j++) source_free(&s[j]);
}

// Experts in page-locked host memory, of the driver's and registered: they lie there, kernels read them there, and a
// replaced one is replaced there. Outputs are those of experts in device memory.
TEST(experts_in_host_memory_that_the_device_addresses)
{
    enum { HIDDEN = 72, N = 5 * HIDDEN };
    moe_layer_desc l = make_layer(HIDDEN, 40, 3, MOE_FORMAT_BF16, 1);
    moe_plan_desc plan_desc;
    moe_plan_info info;
    moe_plan *plan = NULL;
    moe_weights *w, *mapped = NULL;
    void *stream;
    float want[2][N], got[N];
    if (!gpu_open_driver()) return;
    memset(&plan_desc, 0, sizeof plan_desc);
    memset(&info, 0, sizeof info);
    plan_desc.max_tokens = 5;
    plan_desc.out_dtype = MOE_DTYPE_F32;
    REQUIRE_OK(moe_plan_create(gpu.ctx, &l, &plan_desc, &plan, &err));
    REQUIRE_OK(moe_plan_get_info(plan, &info, &err));
    stream = gpu_stream();
    w = make_weights(gpu.ctx, &l, 1);
    run_layer(plan, w, &l, stream, want[0]);
    replace_by(w, &l, 1, 7, stream);
    run_layer(plan, w, &l, stream, want[1]);
    CHECK(memcmp(want[0], want[1], sizeof want[0]) != 0);
    moe_weights_destroy(w);
    for (int registered = 0; registered < 2; registered++) {
        moe_weights_desc desc;
        size_t bytes = (size_t)info.weight_bytes, size = 0;
        void *owned = registered ? malloc(bytes + 4096) : NULL;
        const unsigned char *host;
        memset(&desc, 0, sizeof desc);
        desc.memory_bytes = bytes;
        desc.memory_kind = MOE_MEMORY_HOST;
        if (registered) {
            desc.memory = (char *)owned + (4096 - (uintptr_t)owned % 4096) % 4096;
            if (!gpu_large()) // devices of some machines address all of the host's memory
                CHECK_ERR(moe_weights_create(gpu.ctx, &l, &desc, &mapped, &err), MOE_ERROR_ARGUMENT, "desc.memory");
        }
        gpu_enter();
        if (registered) GPU_CALL(gpu_calls.host_register(desc.memory, bytes, 2));
        else GPU_CALL(gpu_calls.host_alloc(&desc.memory, bytes, 2));
        gpu_leave();
        host = (const unsigned char *)desc.memory;
        if (gpu_calls.leaks != NULL) { // no device memory for the addresses
            int before = gpu_calls.leaks(NULL, 0);
            setenv("MOE_EMU_FAIL", "cuMemAlloc:1=2", 1);
            GPU_CALL(gpu_calls.init(0));
            CHECK_ERR(moe_weights_create(gpu.ctx, &l, &desc, &mapped, &err), MOE_ERROR_MEMORY, "");
            unsetenv("MOE_EMU_FAIL");
            GPU_CALL(gpu_calls.init(0));
            CHECK_EQ(gpu_calls.leaks(NULL, 0), before);
        }
        CHECK_OK(moe_weights_create(gpu.ctx, &l, &desc, &mapped, &err));
        if (mapped != NULL) {
            for (int32_t e = 0; e < 3; e++) set_plain_expert(mapped, &l, e);
            CHECK_OK(moe_weights_seal(mapped, &err));
            for (int32_t e = 0; e < 3; e++) {
                CHECK(block_lies(host + (size_t)e * mapped->layout.expert.bytes, &l, e, 0, 40, &size));
                CHECK(expert_reads(mapped, &l, e));
            }
            run_layer(plan, mapped, &l, stream, got);
            CHECK(memcmp(got, want[0], sizeof got) == 0);
            replace_by(mapped, &l, 1, 7, stream);
            CHECK(block_lies(host + mapped->layout.expert.bytes, &l, 7, 0, 40, &size));
            run_layer(plan, mapped, &l, stream, got);
            CHECK(memcmp(got, want[1], sizeof got) == 0);
            moe_weights_destroy(mapped);
        }
        gpu_enter();
        if (registered) GPU_CALL(gpu_calls.host_unregister(desc.memory));
        else GPU_CALL(gpu_calls.host_free(desc.memory));
        gpu_leave();
        free(owned);
    }
    gpu_stream_end(stream);
    moe_plan_destroy(plan);
}

// Host memory: the tables, and one expert while a tensor is set, replaced, saved.
TEST(host_memory_holds_at_most_one_expert)
{
    moe_layer_desc l = make_layer(136, 72, 8, MOE_FORMAT_BF16, 1);
    moe_context_desc desc;
    moe_context *ctx = NULL;
    moe_weights *w = NULL, *loaded = NULL;
    moe_weights_info info;
    source s[3];
    moe_tensor t[3];
    counter memory;
    uint64_t base, before;
    const char *path = test_temp("gpu_weights_memory.moe");
    if (!gpu_open()) return;
    memset(&desc, 0, sizeof desc);
    memset(&memory, 0, sizeof memory);
    memset(&info, 0, sizeof info);
    desc.backend = MOE_BACKEND_CUDA;
    desc.allocator.alloc = counter_alloc;
    desc.allocator.free = counter_free;
    desc.allocator.user = &memory;
    CHECK_OK(moe_context_create(&desc, &ctx, &err));
    if (ctx == NULL) return;
    before = memory.now;
    CHECK_OK(moe_weights_create(ctx, &l, NULL, &w, &err));
    CHECK_OK(moe_weights_get_info(w, &info, &err));
    base = memory.now;
    CHECK(base - before < info.expert_bytes);
    memory.peak = 0;
    for (int32_t e = 0; e < 8; e++) set_plain_expert(w, &l, e);
    CHECK_EQ(memory.peak - base, info.expert_bytes);
    CHECK_EQ(memory.now, base);
    CHECK_OK(moe_weights_seal(w, &err));
    memory.peak = 0;
    for (int i = 0; i < 3; i++) {
        int down = i == 2;
        s[i] = make_source(i == 0 ? MOE_TENSOR_GATE : down ? MOE_TENSOR_DOWN : MOE_TENSOR_UP, 3, 0, down ? 136 : 72,
                           down ? 72 : 136, MOE_DTYPE_BF16, 0, 0, 0, 0);
        t[i] = s[i].t;
    }
    CHECK_OK(moe_weights_replace_expert(w, 3, t, 3, NULL, &err));
    CHECK_EQ(memory.peak - base, info.expert_bytes);
    for (int i = 0; i < 3; i++) source_free(&s[i]);
    memory.peak = 0;
    CHECK_OK(moe_weights_save(w, path, &err));
    CHECK(memory.peak - base < info.expert_bytes + 4096);
    CHECK_EQ(memory.now, base);
    memory.peak = 0;
    CHECK_OK(moe_weights_load(ctx, &l, path, &loaded, &err));
    CHECK(memory.peak < 2 * base);
    moe_weights_destroy(loaded);
    moe_weights_destroy(w);
    CHECK_EQ(memory.now, before);
    moe_context_destroy(ctx);
    CHECK_EQ(memory.blocks, 0);
    remove(path);
}

// ---- ways back ------------------------------------------------------------------------------------------------------

static void flip(const char *path, long at)
{
    FILE *file = fopen(path, "r+b");
    int c;
    if (file == NULL) { test_fail(__FILE__, __LINE__, "no file"); return; }
    fseek(file, at, at < 0 ? SEEK_END : SEEK_SET);
    c = fgetc(file);
    fseek(file, -1, SEEK_CUR);
    fputc(c ^ 16, file);
    fclose(file);
}

TEST(saved_weights_come_back_to_the_device_and_to_no_other_back_end)
{
    moe_layer_desc l = make_layer(72, 40, 3, MOE_FORMAT_F16, 1);
    moe_weights *w, *cpu, *loaded = NULL;
    char path[1024], other[1024];
    size_t bytes;
    unsigned char *a, *b;
    if (!gpu_open()) return;
    snprintf(path, sizeof path, "%s", test_temp("gpu_weights.moe"));
    snprintf(other, sizeof other, "%s", test_temp("gpu_weights_cpu.moe"));
    l.gemm1_bias = 1;
    w = make_weights(gpu.ctx, &l, 1);
    cpu = make_weights(gpu.cpu, &l, 1);
    CHECK_OK(moe_weights_save(w, path, &err));
    CHECK_OK(moe_weights_save(cpu, other, &err));
    CHECK_OK(moe_weights_load(gpu.ctx, &l, path, &loaded, &err));
    if (loaded != NULL) {
        moe_weights_info one = { 0 }, two = { 0 };
        check_blocks(loaded, &l, "loaded");
        a = download(w, &bytes);
        b = download(loaded, &bytes);
        CHECK(memcmp(a, b, 3 * bytes) == 0);
        free(a);
        free(b);
        CHECK_OK(moe_weights_get_info(w, &one, &err));
        CHECK_OK(moe_weights_get_info(loaded, &two, &err));
        CHECK(memcmp(&one, &two, sizeof one) == 0);
        moe_weights_destroy(loaded);
    }
    CHECK_ERR(moe_weights_load(gpu.cpu, &l, path, &loaded, &err), MOE_ERROR_FORMAT, "");
    CHECK_CONTAINS(err.text, "packed for CUDA");
    CHECK_ERR(moe_weights_load(gpu.ctx, &l, other, &loaded, &err), MOE_ERROR_FORMAT, "");
    CHECK_CONTAINS(err.text, "packed for the CPU");
    for (int i = 0; i < 3; i++) { // in the header, in an expert, in the last table
        long at = i == 0 ? 60 : i == 1 ? 20000 : -1;
        flip(path, at);
        CHECK_ERR(moe_weights_load(gpu.ctx, &l, path, &loaded, &err), MOE_ERROR_FORMAT, "");
        CHECK(loaded == NULL);
        flip(path, at);
    }
    CHECK_OK(moe_weights_load(gpu.ctx, &l, path, &loaded, &err));
    moe_weights_destroy(loaded);
    moe_weights_destroy(w);
    moe_weights_destroy(cpu);
    remove(path);
    remove(other);
}

// In the order of the caller's stream; a refused replacement leaves the expert as it is.
TEST(a_replaced_expert_lies_there_and_a_refused_one_does_not)
{
    moe_layer_desc l = make_layer(72, 40, 3, MOE_FORMAT_BF16, 0), named = l;
    moe_weights *w;
    moe_tensor t[2];
    source s[2];
    size_t bytes, size = 0;
    unsigned char *memory;
    void *stream;
    if (!gpu_open_driver()) return;
    w = make_weights(gpu.ctx, &l, 1);
    stream = gpu_stream();
    s[0] = make_source(MOE_TENSOR_UP, 7, 0, 40, 72, MOE_DTYPE_F32, MOE_LAYOUT_MAJOR_MN, 0, 0, 0); // values of expert 7
    s[1] = make_source(MOE_TENSOR_DOWN, 7, 0, 72, 40, MOE_DTYPE_F32, 0, 0, 0, 0);
    for (int i = 0; i < 2; i++) {
        t[i] = s[i].t;
        t[i].expert = 1;
    }
    CHECK_ERR(moe_weights_replace_expert(w, 1, t, 1, stream, &err), MOE_ERROR_MISSING, "tensors");
    check_blocks(w, &l, "refused");
    t[1].data = gpu_copy(s[1].t.data, (size_t)t[1].data_bytes);
    t[1].memory = MOE_MEMORY_DEVICE;
    CHECK_OK(moe_weights_replace_expert(w, 1, t, 2, stream, &err));
    gpu_release();
    memory = download(w, &bytes);
    CHECK(block_lies(memory, &named, 0, 0, 40, &size));
    CHECK(block_lies(memory + bytes, &named, 7, 0, 40, &size));
    CHECK(block_lies(memory + 2 * bytes, &named, 2, 0, 40, &size));
    free(memory);
    gpu_stream_end(stream);
    source_free(&s[0]);
    source_free(&s[1]);
    moe_weights_destroy(w);
}

// The n-th call of a driver function fails: an error, nothing left behind, and the tensor is not set.
TEST(failures_of_the_driver_are_errors)
{
    static const char *const functions[] = { "cuMemAlloc", "cuMemsetD8Async", "cuMemcpyHtoDAsync",
                                             "cuMemcpyDtoHAsync" };
    moe_layer_desc l = make_layer(16, 8, 2, MOE_FORMAT_BF16, 1);
    char path[1024];
    if (!gpu_open_driver()) return;
    if (gpu_calls.leaks == NULL) {
        test_skip("the driver lets nothing fail on demand");
        return;
    }
    snprintf(path, sizeof path, "%s", test_temp("gpu_weights_fail.moe"));
    for (int f = 0; f < 4; f++) {
        int before = gpu_calls.leaks(NULL, 0), failed = 1, n = 0;
        for (int nth = 1; failed; nth++, n++) {
            moe_weights *w = NULL, *loaded = NULL;
            char value[64];
            moe_error own;
            int result;
            memset(&own, 0, sizeof own);
            snprintf(value, sizeof value, "%s:%d=2", functions[f], nth);
            setenv("MOE_EMU_FAIL", value, 1);
            GPU_CALL(gpu_calls.init(0));
            result = moe_weights_create(gpu.ctx, &l, NULL, &w, &own);
            for (int32_t e = 0; e < 2 && result == MOE_OK; e++)
                for (int32_t role = MOE_TENSOR_GATE; role <= MOE_TENSOR_DOWN && result == MOE_OK; role++) {
                    int down = role == MOE_TENSOR_DOWN;
                    source s;
                    if (role == MOE_TENSOR_GATE_UP) continue;
                    s = make_source(role, e, 0, down ? 16 : 8, down ? 8 : 16, MOE_DTYPE_F32, 0, 0, 0, 0);
                    result = moe_weights_set_tensor(w, &s.t, &own);
                    if (result != MOE_OK) CHECK_OK(moe_weights_set_tensor(w, &s.t, &err)); // once more
                    source_free(&s);
                }
            if (result == MOE_OK) result = moe_weights_seal(w, &own);
            if (result == MOE_OK) result = moe_weights_save(w, path, &own);
            if (result == MOE_OK) result = moe_weights_load(gpu.ctx, &l, path, &loaded, &own);
            failed = result != MOE_OK;
            CHECK_EQ(own.code, result);
            unsetenv("MOE_EMU_FAIL");
            GPU_CALL(gpu_calls.init(0));
            if (!failed) check_blocks(loaded, &l, functions[f]);
            moe_weights_destroy(w);
            moe_weights_destroy(loaded);
            CHECK_EQ(gpu_calls.leaks(NULL, 0), before);
            REQUIRE(nth < 40);
        }
        printf("%s: %d failures\n", functions[f], n - 1);
        CHECK(n > 2);
    }
    remove(path);
}

TEST_MAIN(T(blocks_lie_as_the_kernels_read_them) T(every_source_layout_from_host_and_from_device)
          T(odd_sizes_and_slices_from_device)
          T(rows_by_a_callback_and_slices_of_ranks) T(shared_experts_lie_side_by_side)
          T(tables_and_ids_from_device_memory) T(several_threads_set_different_experts)
          T(the_callers_device_memory_holds_the_experts)
          T(experts_in_host_memory_that_the_device_addresses) T(host_memory_holds_at_most_one_expert)
          T(saved_weights_come_back_to_the_device_and_to_no_other_back_end)
          T(a_replaced_expert_lies_there_and_a_refused_one_does_not) T(failures_of_the_driver_are_errors))
