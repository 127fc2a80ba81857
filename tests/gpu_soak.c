// gpu_soak.c - small random layers, over and over: every output has the hash that it had the first time, and device
// memory stays what it was
//
// A round executes every call once, in random order on random streams, on outputs that are poisoned first; calls of one
// layer share its plan and weights, each has a workspace of its own. A run makes everything anew. MOE_SOAK says how
// many executes there are in all. The hash of all first outputs is printed, so that processes can be compared too.
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "gpu.h"

enum { LAYERS_MAX = 8, CALLS_MAX = 16, STREAMS = 3, RUNS = 3 };

typedef struct soak_layer {
    moe_layer_desc desc;
    moe_weights *weights;
    moe_plan *plan;
    moe_plan_info info;
    int most; // tokens
} soak_layer;

typedef struct soak_call {
    const soak_layer *layer;
    moe_execute_args args;
    unsigned char *out; // on the device
    size_t out_bytes;
    uint64_t hash;      // of the first output
} soak_call;

static struct {
    soak_layer layer[LAYERS_MAX];
    soak_call call[CALLS_MAX];
    void *stream[STREAMS];
    int layers, calls;
} soak;

static int drawn(uint64_t *state, int n) { return (int)(test_random_u32(state) % (uint32_t)n); }

// ---- layers ---------------------------------------------------------------------------------------------------------

static int set_random(moe_weights *w, int role, int64_t experts, int64_t rows, int64_t columns, uint64_t *state)
{
    int64_t n = experts * rows * columns;
    float *data = (float *)malloc((size_t)n * sizeof data[0]);
    moe_error err;
    int result;
    for (int64_t i = 0; i < n; i++) data[i] = 0.25f * test_random_float(state);
    result = pair_tensor(w, role, -1, 3, experts, rows, columns, MOE_DTYPE_F32, data, &err);
    free(data);
    return result;
}

static void layer_open(soak_layer *s, int number)
{
    static const int sizes[] = { 72, 40, 64, 136, 200, 256 }, experts[] = { 6, 16, 33, 64 };
    static const int kinds[] = { MOE_ACTIVATION_SWIGLU, MOE_ACTIVATION_RELU };
    uint64_t state = (uint64_t)number * 7919 + 3;
    moe_layer_desc *l = &s->desc;
    moe_plan_desc desc;
    moe_error err;
    int e, h, i;
    memset(s, 0, sizeof *s);
    memset(&desc, 0, sizeof desc);
    l->hidden_size = h = gpu_large() ? sizes[drawn(&state, 6)] : 72;
    l->intermediate_size = i = gpu_large() ? sizes[drawn(&state, 6)] : 40;
    l->num_experts = e = gpu_large() ? experts[drawn(&state, 4)] : 6;
    l->format = gpu_large() && number % 3 == 2 ? MOE_FORMAT_F16 : MOE_FORMAT_BF16;
    l->activation.kind = kinds[number % 2];
    l->routing = preset(MOE_ROUTING_RENORMALIZE, gpu_large() ? 1 + drawn(&state, 6) : 3);
    desc.max_tokens = s->most = gpu_large() ? 1 + drawn(&state, 300) : 12;
    desc.max_rows = e + s->most * l->routing.top_k;
    if (number % 4 == 3) desc.flags = MOE_PLAN_BATCH_INVARIANT;
    REQUIRE_OK(moe_weights_create(gpu.ctx, l, NULL, &s->weights, &err));
    if (number % 2 == 0) CHECK_EQ(set_random(s->weights, MOE_TENSOR_GATE, e, i, h, &state), MOE_OK);
    CHECK_EQ(set_random(s->weights, MOE_TENSOR_UP, e, i, h, &state), MOE_OK);
    CHECK_EQ(set_random(s->weights, MOE_TENSOR_DOWN, e, h, i, &state), MOE_OK);
    REQUIRE_OK(moe_weights_seal(s->weights, &err));
    REQUIRE_OK(moe_plan_create(gpu.ctx, l, &desc, &s->plan, &err));
    REQUIRE_OK(moe_plan_get_info(s->plan, &s->info, &err));
}

// ---- calls ----------------------------------------------------------------------------------------------------------

// An expert by load: uniform, all to one, or about 1 / rank.
static int drawn_expert(int load, int experts, uint64_t *state)
{
    int e = drawn(state, experts);
    if (load == 1) return experts / 2;
    return load == 2 ? drawn(state, e + 1) : e;
}

// Logits or ids, whose experts follow the load; counts or offsets of rows. Returns the rows of x.
static int choose_experts(const soak_layer *s, moe_execute_args *args, int load, uint64_t *state)
{
    int e = s->desc.num_experts, k = s->info.slots, t = args->num_tokens, width = s->info.router_width;
    int rows = args->input_mode == MOE_INPUT_MASKED || args->input_mode == MOE_INPUT_SORTED;
    size_t n = rows ? (size_t)e + 1 : (size_t)t * (size_t)(args->input_mode == MOE_INPUT_LOGITS ? width : k);
    uint32_t *words = (uint32_t *)calloc(n + 1, 4);
    float *weights = (float *)calloc(n + 1, 4);
    const void *on_device;
    for (size_t j = 0; j < n; j++) weights[j] = test_random_float(state);
    if (args->input_mode == MOE_INPUT_LOGITS) {
        memcpy(words, weights, n * 4);
        for (int token = 0; token < t; token++) {
            float high = 3 + weights[(size_t)token * (size_t)width];
            memcpy(&words[token * width + drawn_expert(load, e, state)], &high, 4);
        }
    } else if (rows) { // of each expert, or the running sum
        int per_expert = args->rows_per_expert;
        t = e * per_expert;
        args->num_tokens = 0;
        for (int i = 0; i < e; i++)
            words[i] = (uint32_t)(load != 1 ? drawn(state, per_expert + 1) : i == e / 2 ? per_expert : 0);
        if (args->input_mode == MOE_INPUT_SORTED) {
            uint32_t sum = 0;
            for (int i = 0; i <= e; i++) {
                uint32_t count = i < e ? words[i] : 0;
                words[i] = sum;
                sum += count;
            }
            t = (int)sum;
        }
    } else {
        for (size_t j = 0; j < n; j++) {
            int id = drawn(state, 8) == 0 ? -1 : drawn_expert(load, e, state);
            words[j] = (uint32_t)id;
            if (args->input_mode == MOE_INPUT_PACKED) words[j] = words[j] << 16 | moe__f32_to_bf16(weights[j]);
        }
    }
    on_device = gpu_copy(words, n * 4);
    if (rows) args->counts_or_offsets = (const int32_t *)on_device;
    else if (args->input_mode == MOE_INPUT_LOGITS) args->logits = on_device;
    else args->ids = on_device;
    if (args->input_mode == MOE_INPUT_IDS) args->weights = gpu_copy(weights, n * 4);
    free(words);
    free(weights);
    return t;
}

static void call_open(soak_call *c, const soak_layer *s, int number)
{
    static const int modes[] = { MOE_INPUT_LOGITS, MOE_INPUT_IDS, MOE_INPUT_SORTED, MOE_INPUT_PACKED, MOE_INPUT_MASKED,
                                 MOE_INPUT_LOGITS };
    uint64_t state = (uint64_t)number * 104729 + 11;
    int rows, h = s->desc.hidden_size;
    moe_error err;
    uint16_t *x;
    memset(c, 0, sizeof *c);
    c->layer = s;
    c->args.input_mode = modes[number % 6];
    c->args.num_tokens = number % 16 == 15 ? 0 : 1 + drawn(&state, s->most);
    c->args.rows_per_expert = 1 + s->most * s->info.slots / (2 * s->desc.num_experts);
    rows = choose_experts(s, &c->args, number % 3, &state);
    c->out_bytes = ((size_t)rows * (size_t)h * 2 + 7) / 8 * 8;
    x = (uint16_t *)calloc(c->out_bytes + 2, 1);
    for (int i = 0; i < rows * h; i++) moe__store(x, s->weights->layout.dtype, i, test_random_float(&state));
    c->args.x = gpu_copy(x, c->out_bytes);
    c->args.out = c->out = (unsigned char *)gpu_make(c->out_bytes);
    c->args.workspace = gpu_make((size_t)s->info.workspace_bytes);
    c->args.workspace_bytes = s->info.workspace_bytes;
    CHECK_OK(moe_execute_check(s->plan, s->weights, &c->args, &err));
    free(x);
}

static uint64_t hash_of(const unsigned char *data, size_t bytes)
{
    uint64_t hash = 14695981039346656037u, word;
    for (size_t i = 0; i < bytes; i += 8) {
        memcpy(&word, data + i, 8);
        hash = (hash ^ word) * 1099511628211u;
        hash ^= hash >> 29;
    }
    return hash;
}

static uint64_t hash_of_output(const soak_call *c)
{
    unsigned char *out = (unsigned char *)malloc(c->out_bytes + 8);
    uint64_t hash;
    gpu_get(out, c->out, c->out_bytes);
    hash = hash_of(out, c->out_bytes);
    free(out);
    return hash;
}

static uint64_t hash_of_poison(const soak_call *c)
{
    unsigned char *out = (unsigned char *)malloc(c->out_bytes + 8);
    uint64_t hash;
    memset(out, GPU_POISON, c->out_bytes);
    hash = hash_of(out, c->out_bytes);
    free(out);
    return hash;
}

static void execute(const soak_call *c, void *stream)
{
    gpu_enter();
    if (c->out_bytes > 0)
        GPU_CALL(gpu.cuda->cuMemsetD8Async((moe__cu_ptr)(uintptr_t)c->out, GPU_POISON, c->out_bytes,
                                           (moe__cu_stream)stream));
    gpu_leave();
    if (moe_execute(c->layer->plan, c->layer->weights, &c->args, stream) != MOE_OK)
        test_fail(__FILE__, __LINE__, "moe_execute() was refused");
}

// ---- rounds and runs ------------------------------------------------------------------------------------------------

static size_t memory_free(void)
{
    size_t bytes = 0, total;
    gpu_sync();
    gpu_enter();
    GPU_CALL(gpu_calls.memory_info(&bytes, &total));
    gpu_leave();
    return bytes;
}

// Every call once; how many outputs differ from the first. `first`: these are the first.
static int soak_round(int first, uint64_t *state)
{
    int order[CALLS_MAX], differ = 0;
    for (int i = 0; i < soak.calls; i++) {
        int j = drawn(state, i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    for (int i = 0; i < soak.calls; i++) execute(&soak.call[order[i]], soak.stream[drawn(state, STREAMS)]);
    for (int i = 0; i < soak.calls; i++) {
        soak_call *c = &soak.call[i];
        uint64_t hash = hash_of_output(c);
        if (first) c->hash = hash;
        if (hash == c->hash) continue;
        differ++;
        printf("call %d, mode %d, %d tokens: 0x%016llx, was 0x%016llx\n", i, c->args.input_mode, c->args.num_tokens,
               (unsigned long long)hash, (unsigned long long)c->hash);
    }
    return differ;
}

static void run_open(int run)
{
    for (int i = 0; i < soak.layers; i++) layer_open(&soak.layer[i], i);
    for (int i = 0; i < STREAMS; i++) soak.stream[i] = gpu_stream();
    for (int i = 0; i < soak.calls; i++) {
        uint64_t hash = soak.call[i].hash;
        call_open(&soak.call[i], &soak.layer[i % soak.layers], i);
        soak.call[i].hash = run == 0 ? 0 : hash;
    }
}

static void run_close(void)
{
    for (int i = 0; i < STREAMS; i++) gpu_stream_end(soak.stream[i]);
    gpu_release();
    for (int i = 0; i < soak.layers; i++) {
        moe_plan_destroy(soak.layer[i].plan);
        moe_weights_destroy(soak.layer[i].weights);
    }
}

TEST(outputs_keep_their_hash_and_memory_stays)
{
    const char *value = getenv("MOE_SOAK");
    long executes, done = 0;
    size_t after_first = 0;
    uint64_t state = 5, all = 0;
    int differ = 0;
    if (!gpu_open_driver()) return;
    executes = value != NULL ? strtol(value, NULL, 10) : gpu_large() ? 20000 : 36;
    soak.layers = gpu_large() ? LAYERS_MAX : 2;
    soak.calls = gpu_large() ? 16 : 6;
    for (int run = 0; run < RUNS; run++) {
        size_t before, after;
        run_open(run);
        differ += soak_round(run == 0, &state);
        done += soak.calls;
        before = memory_free();
        for (; done < executes * (run + 1) / RUNS; done += soak.calls) differ += soak_round(0, &state);
        after = memory_free();
        CHECK_EQ(before, after);
        for (int i = 0; i < soak.calls && run == 0; i++) {
            const soak_call *c = &soak.call[i];
            all = (all ^ c->hash) * 1099511628211u;
            if (c->out_bytes > 0) CHECK(c->hash != hash_of_poison(c));
        }
        run_close();
        if (run == 0) after_first = memory_free();
    }
    CHECK_EQ(memory_free(), after_first);
    CHECK_EQ(differ, 0);
    printf("%ld executes of %d calls in %d runs, %d outputs differ; all first outputs: 0x%016llx\n", done, soak.calls,
           (int)RUNS, differ, (unsigned long long)all);
}

TEST_MAIN(T(outputs_keep_their_hash_and_memory_stays))
