// gpu_layer.c - whole layers on the device against moe_reference_layer(): from the same ids and weights, with the rows
// between GEMM 2 and finalize rounded as the plan rounds them
//
// Inputs and matrices are small multiples of powers of two, so that the sums of GEMM 1 are exact. With an activation
// that keeps that (ReLU) GEMM 2's are too, and the outputs must be the reference's bits. With the others the
// intermediate has the reference's bits, and GEMM 2 adds n products in another order: either order is off by at most (n
// - 1) 2^-24 of the sum of their absolute values; rows of 16 bits may then be rounded to neighbours.
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "gpu.h"
#include "gpu_text.h"
#include "gpu_layer.h"

#include <math.h>
#include <time.h>

enum { H = 72, I = 40, EXPERTS = 6, TOP_K = 3 };

static moe_layer_desc layer_of(int format, int kind)
{
    moe_layer_desc l;
    memset(&l, 0, sizeof l);
    l.hidden_size = H;
    l.intermediate_size = I;
    l.num_experts = EXPERTS;
    l.format = format;
    l.activation.kind = kind;
    l.routing = preset(MOE_ROUTING_RENORMALIZE, TOP_K);
    return l;
}

TEST(a_layer_has_the_bits_of_the_reference_where_sums_are_exact)
{
    static const int tokens[] = { 1, 3, 17, 64, 65, 129, 700, 4097 };
    if (!gpu_open()) return;
    for (int format = MOE_FORMAT_BF16; format <= MOE_FORMAT_F16; format++) {
        moe_layer_desc l = layer_of(format, MOE_ACTIVATION_RELU);
        pair p;
        int count = gpu_large() ? 8 : format == MOE_FORMAT_BF16 ? 6 : 5;
        char text[64];
        memset(&p, 0, sizeof p);
        if (!open_layer(&p, &l, tokens[count - 1])) continue;
        for (int i = 0; i < count; i++) {
            layer_call c = logits_of(tokens[i]);
            snprintf(text, sizeof text, "%s, T %d", moe_format_string(format), tokens[i]);
            check_layer(&p, &c, 1, text);
        }
        pair_close(&p);
    }
}

TEST(gated_activations_are_within_the_bound)
{
    layer_call c = logits_of(19);
    if (!gpu_open()) return;
    for (int kind = MOE_ACTIVATION_SWIGLU; kind <= MOE_ACTIVATION_SITU; kind++) {
        moe_layer_desc l = layer_of(MOE_FORMAT_BF16, kind);
        if (kind == MOE_ACTIVATION_SWIGLU) { l.activation.limit = 3; l.activation.alpha = 1.5f; l.activation.beta = 1; }
        check_one(&l, &c, 0, moe_activation_string(kind));
    }
}

// Always-on experts have no parameters of their own: they take the layer's.
TEST(parameters_of_each_expert_beside_always_on_experts)
{
    layer_call c = logits_of(11);
    moe_layer_desc l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
    if (!gpu_open()) return;
    l.activation.alpha = 3;
    l.activation.beta = 4;
    l.activation.limit = 0.5f;
    l.activation.per_expert = 1;
    check_one(&l, &c, 0, "parameters of each expert's own");
    l.routing.extra_slots = 2;
    l.routing.extra_weight = 0.5f;
    check_one(&l, &c, 0, "always-on experts");
    l.gemm1_bias = l.gemm2_bias = 1;
    l.routing.special_experts = 2;
    l.routing.special_kind = MOE_SPECIAL_ZERO;
    check_one(&l, &c, 0, "always-on experts behind special ones, biases");
    l.parallel.expert_offset = 2;
    l.parallel.local_experts = 3;
    check_one(&l, &c, 0, "always-on experts behind a range");
}

TEST(biases_norms_and_weights_on_the_input)
{
    layer_call c = logits_of(9);
    moe_layer_desc l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_RELU);
    if (!gpu_open()) return;
    l.gemm1_bias = l.gemm2_bias = 1;
    check_one(&l, &c, 1, "biases");
    l.activation.kind = MOE_ACTIVATION_SWIGLU;
    check_one(&l, &c, 0, "biases, gated");
    l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_RELU);
    l.row_norm = 1;
    l.row_norm_epsilon = 1e-5f;
    check_one(&l, &c, 1, "row norm");
    l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_RELU);
    l.routing.weight_on = MOE_WEIGHT_ON_INPUT;
    c.mode = MOE_INPUT_IDS; // whose weights leave x exact in 16 bits
    check_one(&l, &c, 1, "weight on the input");
}

TEST(shared_and_special_experts)
{
    layer_call c = logits_of(21);
    moe_layer_desc l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_RELU);
    if (!gpu_open()) return;
    l.shared.count = 2;
    l.shared.intermediate_size = 24;
    l.shared.scale = 0.5f;
    l.output_scale = 2;
    check_one(&l, &c, 1, "shared");
    l.shared.gate = 1;
    check_one(&l, &c, 1, "shared, gate of the layer");
    c.shared_gate = 1;
    check_one(&l, &c, 1, "shared, gate of the caller");
    c = logits_of(70);
    check_one(&l, &c, 1, "shared, many tokens");
    c = logits_of(11);
    l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_RELU);
    l.routing.special_experts = 2;
    l.routing.special_kind = MOE_SPECIAL_IDENTITY;
    check_one(&l, &c, 1, "identity experts");
    l.routing.weight_on = MOE_WEIGHT_ON_INPUT; // of those with matrices
    c.mode = MOE_INPUT_IDS;
    check_one(&l, &c, 1, "identity experts, weights on the input");
    c = logits_of(11);
    l.routing.weight_on = MOE_WEIGHT_ON_OUTPUT;
    l.routing.special_kind = MOE_SPECIAL_ZERO;
    check_one(&l, &c, 1, "zero experts");
}

TEST(inputs_of_every_mode_and_ranks)
{
    layer_call c = logits_of(23);
    moe_layer_desc l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_RELU);
    pair p;
    if (!gpu_open()) return;
    memset(&p, 0, sizeof p);
    if (open_layer(&p, &l, 100)) {
        c.mode = MOE_INPUT_IDS;
        check_layer(&p, &c, 1, "ids");
        c.mode = MOE_INPUT_PACKED;
        check_layer(&p, &c, 1, "packed");
        c.flags = MOE_EXECUTE_ACCUMULATE;
        check_layer(&p, &c, 1, "accumulate");
        c = logits_of(40);
        c.held = 13;
        check_layer(&p, &c, 1, "count on the device");
        c.tokens = 90;
        check_layer(&p, &c, 1, "count on the device, many");
        pair_close(&p);
    }
    c = logits_of(23);
    l.parallel.expert_offset = 2;
    l.parallel.local_experts = 3;
    check_one(&l, &c, 1, "a range of the experts");
    l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_RELU);
    l.intermediate_size = 48;
    l.parallel.tp_size = 2;
    l.parallel.tp_rank = 1;
    l.gemm2_bias = 1;
    check_one(&l, &c, 1, "the second of two tensor-parallel ranks");
}

// Sizes around the tiles' and the kernels' own, experts without a token among them.
TEST(sizes_experts_top_k_and_tokens)
{
    static const struct { int hidden, inner, experts, top_k, tokens, gated, held; } cases[] = {
        { 8, 8, 1, 1, 1, 0, -1 },    { 8, 136, 2, 2, 3, 1, -1 },   { 136, 8, 64, 8, 17, 0, -1 },
        { 136, 200, 5, 1, 33, 1, -1 }, { 264, 72, 33, 4, 3, 0, -1 }, { 72, 264, 8, 8, 66, 0, -1 },
        { 64, 128, 64, 6, 129, 1, -1 }, { 200, 136, 17, 3, 40, 0, 0 }, { 128, 64, 3, 3, 100, 0, 0 },
        { 704, 1856, 16, 6, 40, 1, -1 }, { 2880, 2880, 32, 4, 17, 0, -1 }, { 4096, 8, 128, 2, 4097, 1, -1 },
        { 2048, 72, 512, 22, 129, 0, -1 },
    };
    if (!gpu_open()) return;
    for (int i = 0; i < (gpu_large() ? 13 : 9); i++) {
        moe_layer_desc l = layer_of(i % 2 ? MOE_FORMAT_F16 : MOE_FORMAT_BF16,
                                    cases[i].gated ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_RELU);
        layer_call c = logits_of(cases[i].tokens);
        char text[96];
        l.hidden_size = cases[i].hidden;
        l.intermediate_size = cases[i].inner;
        l.num_experts = cases[i].experts;
        l.routing = preset(MOE_ROUTING_RENORMALIZE, cases[i].top_k);
        c.held = cases[i].held;
        c.seed = (uint64_t)i;
        snprintf(text, sizeof text, "H %d I %d E %d k %d T %d", cases[i].hidden, cases[i].inner, cases[i].experts,
                 cases[i].top_k, cases[i].tokens);
        check_one(&l, &c, !cases[i].gated && cases[i].hidden < 512, text);
    }
}

// All tokens to one expert, to one that is another rank's, to nobody.
TEST(loads_that_are_not_even)
{
    moe_layer_desc l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_RELU);
    pair p;
    if (!gpu_open()) return;
    l.parallel.expert_offset = 1;
    l.parallel.local_experts = 4;
    memset(&p, 0, sizeof p);
    if (!open_layer(&p, &l, 80)) return;
    for (int tokens = 40; tokens <= 80; tokens += 40)
        for (int id = -1; id < 3; id++) {
            layer_call c = logits_of(tokens);
            layer_data d;
            uint64_t state = 5;
            size_t n = (size_t)tokens * H, slots = (size_t)tokens * TOP_K;
            moe_reference_layer_args r;
            char what[64];
            memset(&d, 0, sizeof d);
            c.mode = MOE_INPUT_IDS;
            d.x = grid_values(n, 0.25f, 4, &state);
            d.old = grid_values(n, 0.5f, 8, &state);
            d.ids = (int32_t *)malloc(slots * 4);
            d.weights = grid_values(slots, 0.25f, 8, &state);
            for (size_t i = 0; i < slots; i++) d.ids[i] = id;
            d.expected = (float *)malloc(n * 4);
            d.got = (float *)malloc(n * 4);
            memset(&r, 0, sizeof r);
            r.num_tokens = tokens;
            r.rows_dtype = rows_dtype_of(&p, tokens);
            r.x = d.x;
            r.ids = d.ids;
            r.weights = d.weights;
            r.rows = moe_weights_row;
            r.rows_user = p.weights[0];
            r.out = d.expected;
            CHECK_OK(moe_reference_layer(&p.layer, &r, &err));
            CHECK_EQ(run_gpu(&p, &c, &d, d.got), MOE_OK);
            snprintf(what, sizeof what, "T %d, all to %d", tokens, id);
            for (size_t i = 0; i < n; i++)
                if (d.expected[i] != d.got[i]) {
                    test_fail2(__FILE__, __LINE__, what, "differs");
                    break;
                }
            free(d.x);
            free(d.old);
            free(d.ids);
            free(d.weights);
            free(d.expected);
            free(d.got);
        }
    pair_close(&p);
}

// No tokens: nothing is read or written, and NULL will do for what is not.
TEST(no_tokens_is_no_work)
{
    moe_layer_desc l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_RELU);
    moe_execute_args a;
    pair p;
    if (!gpu_open()) return;
    memset(&p, 0, sizeof p);
    memset(&a, 0, sizeof a);
    if (!open_layer(&p, &l, 4)) return;
    a.input_mode = MOE_INPUT_LOGITS;
    a.workspace = gpu_make((size_t)p.info[1].workspace_bytes);
    a.workspace_bytes = p.info[1].workspace_bytes;
    CHECK_EQ(moe_execute(p.plan[1], p.weights[1], &a, NULL), MOE_OK);
    gpu_release();
    pair_close(&p);
}

TEST(a_small_layer_takes_half_a_second_of_the_processor_at_most)
{
    moe_layer_desc l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
    layer_call c = logits_of(8);
    layer_data d;
    pair p;
    if (!gpu_open()) return;
    l.hidden_size = 256;
    l.intermediate_size = 128;
    l.num_experts = 16;
    memset(&p, 0, sizeof p);
    if (!open_layer(&p, &l, 8)) return;
    if (data_make(&p, &c, &d)) {
        clock_t start = clock();
        CHECK_OK(run_gpu(&p, &c, &d, d.got));
        CHECK(clock() - start <= CLOCKS_PER_SEC / 2);
        compare(&p, &c, &d, 0, "256 x 128, 16 experts");
    }
    data_free(&d);
    pair_close(&p);
}

TEST(types_of_inputs_and_outputs)
{
    static const int types[][2] = { { MOE_DTYPE_F32, MOE_DTYPE_BF16 }, { MOE_DTYPE_F16, MOE_DTYPE_F16 },
                                    { MOE_DTYPE_BF16, MOE_DTYPE_F32 } };
    if (!gpu_open()) return;
    for (int i = 0; i < 3; i++) {
        moe_layer_desc l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_RELU);
        layer_call c = logits_of(7);
        pair p;
        char text[64];
        memset(&p, 0, sizeof p);
        p.desc.x_dtype = types[i][0];
        p.desc.out_dtype = types[i][1];
        snprintf(text, sizeof text, "x %s, out %s", moe_dtype_string(types[i][0]), moe_dtype_string(types[i][1]));
        if (!open_layer(&p, &l, 7)) continue;
        check_layer(&p, &c, 1, text);
        pair_close(&p);
    }
}

// Tokens alone, among 31 others, among all of 70 (8,192 on hardware), and with all in the opposite order: their rows.
TEST(a_token_does_not_depend_on_its_batch)
{
    const int many = gpu_large() ? 8192 : 70;
    moe_layer_desc l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
    layer_call all = logits_of(many), some = logits_of(32), one = logits_of(1);
    layer_data d;
    uint64_t state = 99;
    pair p;
    int differ = 0;
    float *rows = (float *)malloc((size_t)many * H * 4), *turned = (float *)malloc((size_t)many * H * 4), row[32 * H];
    if (!gpu_open()) return;
    memset(&p, 0, sizeof p);
    memset(&d, 0, sizeof d);
    p.desc.flags = MOE_PLAN_BATCH_INVARIANT;
    d.x = grid_values((size_t)many * H, 0.01f, 400, &state);
    d.old = grid_values((size_t)many * H, 1, 1, &state);
    d.logits = grid_values((size_t)many * EXPERTS, 0.125f, 40, &state);
    if (open_layer(&p, &l, many)) {
        layer_data back = d;
        CHECK_EQ(run_gpu(&p, &all, &d, rows), MOE_OK);
        for (int t = 0; t + 32 <= many; t += many / 3) {
            layer_data part = d;
            part.x = d.x + t * H;
            part.logits = d.logits + t * EXPERTS;
            CHECK_EQ(run_gpu(&p, &one, &part, row), MOE_OK);
            differ += memcmp(row, rows + t * H, H * 4) != 0;
            CHECK_EQ(run_gpu(&p, &some, &part, row), MOE_OK);
            differ += memcmp(row, rows + t * H, sizeof row) != 0;
        }
        back.x = (float *)malloc((size_t)many * H * 4);
        back.logits = (float *)malloc((size_t)many * EXPERTS * 4);
        for (int t = 0; t < many; t++) {
            memcpy(back.x + (many - 1 - t) * H, d.x + t * H, H * 4);
            memcpy(back.logits + (many - 1 - t) * EXPERTS, d.logits + t * EXPERTS, EXPERTS * 4);
        }
        CHECK_EQ(run_gpu(&p, &all, &back, turned), MOE_OK);
        for (int t = 0; t < many; t++) differ += memcmp(turned + (many - 1 - t) * H, rows + t * H, H * 4) != 0;
        CHECK_EQ(differ, 0);
        free(back.x);
        free(back.logits);
        pair_close(&p);
    }
    free(d.x);
    free(d.old);
    free(d.logits);
    free(rows);
    free(turned);
}

// The calls of the driver that a line of its log names; anything but launches and the context's stack is a failure.
static int count_launches(const char *log)
{
    int launches = 0;
    for (const char *line = log; *line != 0; line += strcspn(line, "\n") + (line[strcspn(line, "\n")] == '\n')) {
        char name[64] = "";
        sscanf(line, "%63s", name);
        if (strcmp(name, "cuLaunchKernelEx") == 0) launches++;
        else if (strncmp(name, "cuCtx", 5) != 0) test_fail2(__FILE__, __LINE__, "moe_execute() calls", name);
    }
    return launches;
}

// A graph of one call, replayed with other inputs at the same addresses.
static void check_replay(const pair *p, int tokens)
{
    layer_call first = logits_of(tokens), other = logits_of(tokens);
    layer_data a, b;
    moe_execute_args args;
    void *stream = gpu_stream(), *graph = NULL, *exec = NULL, *x;
    size_t n = (size_t)tokens * H;
    int k0 = tokens <= p->plan[1]->stages.one_tokens ? 1 : 2;
    other.seed = 17;
    if (data_make(p, &first, &a) && data_make(p, &other, &b)) {
        begin_gpu(p, &first, &a, &args);
        gpu_enter();
        GPU_CALL(gpu_calls.begin_capture(stream, 0));
        gpu_leave();
        if (gpu_calls.log_begin != NULL) gpu_calls.log_begin();
        CHECK_EQ(moe_execute(p->plan[1], p->weights[1], &args, stream), MOE_OK);
        if (gpu_calls.log_begin != NULL) CHECK_EQ(count_launches(gpu_calls.log_end()), k0 + 3);
        gpu_enter();
        GPU_CALL(gpu_calls.end_capture(stream, &graph));
        GPU_CALL(gpu_calls.instantiate(&exec, graph, 0));
        gpu_leave();
        for (int turn = 0; turn < 2; turn++) {
            const layer_data *d = turn == 0 ? &b : &a;
            x = narrowed(d->x, n, p->plan[1]->desc.x_dtype);
            gpu_put((void *)(uintptr_t)args.x, x, n * 2);
            gpu_put((void *)(uintptr_t)args.logits, d->logits, (size_t)tokens * EXPERTS * 4);
            free(x);
            gpu_enter();
            GPU_CALL(gpu.cuda->cuMemsetD8((moe__cu_ptr)(uintptr_t)args.out, GPU_POISON, n * 4));
            GPU_CALL(gpu.cuda->cuCtxSynchronize());
            GPU_CALL(gpu_calls.graph_launch(exec, stream));
            GPU_CALL(gpu_calls.stream_synchronize(stream));
            gpu_leave();
            read_gpu(p, &args, d->got);
            compare(p, &first, d, 1, turn == 0 ? "replayed with other inputs" : "replayed with the first inputs");
        }
        gpu_enter();
        GPU_CALL(gpu_calls.exec_destroy(exec));
        GPU_CALL(gpu_calls.graph_destroy(graph));
        gpu_leave();
        gpu_release();
        data_free(&b);
    }
    data_free(&a);
    gpu_stream_end(stream);
}

TEST(a_layer_only_enqueues_and_is_replayed_from_a_graph)
{
    moe_layer_desc l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_RELU);
    pair p;
    if (!gpu_open_driver()) return;
    memset(&p, 0, sizeof p);
    if (!open_layer(&p, &l, 70)) return;
    check_replay(&p, 20);
    check_replay(&p, 70);
    pair_close(&p);
}

// Calls of one plan and one set of weights in flight at the same time.
TEST(two_streams_with_two_workspaces)
{
    moe_layer_desc l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_RELU);
    layer_call c[2];
    layer_data d[2];
    moe_execute_args args[2];
    void *stream[2];
    pair p;
    if (!gpu_open_driver()) return;
    memset(&p, 0, sizeof p);
    if (!open_layer(&p, &l, 70)) return;
    for (int i = 0; i < 2; i++) {
        c[i] = logits_of(i == 0 ? 33 : 70);
        c[i].seed = 5 + (uint64_t)i;
        stream[i] = gpu_stream();
        REQUIRE(data_make(&p, &c[i], &d[i]));
        begin_gpu(&p, &c[i], &d[i], &args[i]);
    }
    for (int turn = 0; turn < 4; turn++)
        CHECK_EQ(moe_execute(p.plan[1], p.weights[1], &args[turn % 2], stream[turn % 2]), MOE_OK);
    gpu_sync();
    for (int i = 0; i < 2; i++) {
        read_gpu(&p, &args[i], d[i].got);
        compare(&p, &c[i], &d[i], 1, i == 0 ? "on the first stream" : "on the second stream");
    }
    gpu_release();
    for (int i = 0; i < 2; i++) {
        gpu_stream_end(stream[i]);
        data_free(&d[i]);
    }
    pair_close(&p);
}

// A context of another device beside the program's; each has kernels, weights and plans of its own.
TEST(several_devices_in_one_process)
{
    moe_layer_desc l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_RELU);
    layer_call c = logits_of(20);
    moe_context_desc desc;
    moe_context *first, *second;
    moe_error err;
    pair here, there;
    int count = 0;
    if (!gpu_open()) return;
    GPU_CALL(gpu.cuda->cuDeviceGetCount(&count));
    if (count < 2) {
        test_skip("there is one device");
        return;
    }
    memset(&here, 0, sizeof here);
    memset(&there, 0, sizeof there);
    memset(&desc, 0, sizeof desc);
    desc.backend = MOE_BACKEND_CUDA;
    desc.device = 1;
    desc.log = gpu_message;
    REQUIRE(moe_context_create(&desc, &second, &err) == MOE_OK);
    CHECK(second->cuda->device != gpu.cuda->device);
    if (!open_layer(&here, &l, 20)) return;
    first = gpu.ctx;
    gpu.ctx = second;
    gpu.cuda = second->cuda;
    if (open_layer(&there, &l, 20)) check_layer(&there, &c, 1, "on the second device");
    gpu.ctx = first;
    gpu.cuda = first->cuda;
    check_layer(&here, &c, 1, "on the first device");
    pair_close(&there);
    pair_close(&here);
    moe_context_destroy(second);
}

// The event lies between the products: a log of the driver's calls, and another stream that waits for it.
TEST(an_event_is_recorded_before_the_second_product)
{
    moe_layer_desc l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_RELU);
    layer_call c = logits_of(20);
    layer_data d;
    moe_execute_args args;
    pair p;
    int (*create)(void **event, unsigned flags), (*destroy)(void *event), (*wait)(void *stream, void *event, unsigned);
    void *event = NULL, *stream, *other;
    if (!gpu_open_driver()) return;
    gpu_symbol(gpu_library(), "cuEventCreate", &create);
    gpu_symbol(gpu_library(), "cuEventDestroy_v2", &destroy);
    gpu_symbol(gpu_library(), "cuStreamWaitEvent", &wait);
    memset(&p, 0, sizeof p);
    if (!open_layer(&p, &l, 20)) return;
    stream = gpu_stream();
    other = gpu_stream();
    gpu_enter();
    GPU_CALL(create(&event, 0));
    gpu_leave();
    if (data_make(&p, &c, &d)) {
        begin_gpu(&p, &c, &d, &args);
        args.gemm2_start_event = event;
        if (gpu_calls.log_begin != NULL) gpu_calls.log_begin();
        CHECK_EQ(moe_execute(p.plan[1], p.weights[1], &args, stream), MOE_OK);
        if (gpu_calls.log_begin != NULL) {
            const char *log = gpu_calls.log_end(), *record = strstr(log, "cuEventRecord"), *at = log;
            int before = 0, after = 0;
            REQUIRE(record != NULL);
            for (; (at = strstr(at, "cuLaunchKernelEx")) != NULL; at++) *(at < record ? &before : &after) += 1;
            CHECK_EQ(before, 2); // routing, GEMM 1
            CHECK_EQ(after, 2);
        }
        gpu_enter();
        GPU_CALL(wait(other, event, 0));
        GPU_CALL(gpu_calls.stream_synchronize(other));
        GPU_CALL(gpu_calls.stream_synchronize(stream));
        GPU_CALL(destroy(event));
        gpu_leave();
        read_gpu(&p, &args, d.got);
        compare(&p, &c, &d, 1, "with an event");
        gpu_release();
    }
    data_free(&d);
    gpu_stream_end(stream);
    gpu_stream_end(other);
    pair_close(&p);
}

static moe_tensor tensor_of(int role, int expert, int rows, int columns, const float *data)
{
    moe_tensor t;
    memset(&t, 0, sizeof t);
    t.role = role;
    t.expert = expert;
    t.index = -1;
    t.dtype = MOE_DTYPE_F32;
    t.rank = columns > 0 ? 2 : 1;
    t.dims[0] = rows;
    t.dims[1] = columns;
    t.data = data;
    t.data_bytes = (uint64_t)rows * (uint64_t)(columns > 0 ? columns : 1) * 4;
    return t;
}

TEST(a_replaced_expert_is_the_new_one)
{
    moe_layer_desc l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_RELU);
    layer_call c = logits_of(12);
    pair p;
    uint64_t state = 12;
    float *up = grid_values(I * H, 0.125f, 4, &state), *down = grid_values(H * I, 0.125f, 4, &state);
    moe_tensor t[2];
    if (!gpu_open()) return;
    memset(&p, 0, sizeof p);
    t[0] = tensor_of(MOE_TENSOR_UP, 4, I, H, up);
    t[1] = tensor_of(MOE_TENSOR_DOWN, 4, H, I, down);
    if (open_layer(&p, &l, 12)) {
        for (int side = 0; side < 2; side++)
            CHECK_OK(moe_weights_replace_expert(p.weights[side], 4, t, 2, NULL, &err));
        check_layer(&p, &c, 1, "replaced");
        pair_close(&p);
    }
    free(up);
    free(down);
}

// Weights of these values with experts 2 and 5 pruned, in place of the pair's.
static void prune(pair *p, const float *up, const float *down, const float *constant)
{
    moe_tensor norm = tensor_of(MOE_TENSOR_ROW_NORM, -1, H, 0, constant);
    for (int side = 0; side < 2; side++) {
        moe_weights_destroy(p->weights[side]);
        CHECK_OK(moe_weights_create(side == 0 ? gpu.cpu : gpu.ctx, &p->layer, NULL, &p->weights[side], &err));
        for (int e = 0; e < EXPERTS; e++) {
            moe_tensor t = tensor_of(MOE_TENSOR_CONSTANT, e, H, 0, constant);
            if (e == 2 || e == 5) {
                CHECK_OK(moe_weights_set_tensor(p->weights[side], &t, &err));
                continue;
            }
            t = tensor_of(MOE_TENSOR_UP, e, p->layer.intermediate_size, H, up);
            CHECK_OK(moe_weights_set_tensor(p->weights[side], &t, &err));
            t = tensor_of(MOE_TENSOR_DOWN, e, H, p->layer.intermediate_size, down);
            CHECK_OK(moe_weights_set_tensor(p->weights[side], &t, &err));
        }
        if (p->layer.row_norm) CHECK_OK(moe_weights_set_tensor(p->weights[side], &norm, &err));
        CHECK_OK(moe_weights_seal(p->weights[side], &err));
    }
}

static void check_pruned(int row_norm)
{
    moe_layer_desc l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_RELU);
    layer_call few = logits_of(20), many = logits_of(70);
    uint64_t state = 12;
    float *up = grid_values(I * H, 0.125f, 4, &state), *down = grid_values(H * I, 0.125f, 4, &state);
    float *constant = grid_values(H, 0.5f, 4, &state);
    const char *path = test_temp("pruned.moe");
    moe_tensor t[2];
    moe_weights *loaded;
    pair p;
    l.row_norm = row_norm;
    l.row_norm_epsilon = 1e-5f;
    memset(&p, 0, sizeof p);
    if (open_layer(&p, &l, 70)) {
        prune(&p, up, down, constant);
        check_layer(&p, &few, 1, "pruned, few tokens");
        check_layer(&p, &many, 1, "pruned, many tokens");
        t[0] = tensor_of(MOE_TENSOR_CONSTANT, 1, H, 0, constant); // one more, while the others are in use
        for (int side = 0; side < 2; side++)
            CHECK_OK(moe_weights_replace_expert(p.weights[side], 1, t, 1, NULL, &err));
        check_layer(&p, &few, 1, "pruned later");
        CHECK_OK(moe_weights_save(p.weights[1], path, &err));
        REQUIRE_OK(moe_weights_load(gpu.ctx, &p.layer, path, &loaded, &err));
        moe_weights_destroy(p.weights[1]);
        p.weights[1] = loaded;
        check_layer(&p, &few, 1, "pruned, saved and loaded");
        t[0] = tensor_of(MOE_TENSOR_UP, 2, I, H, up); // back
        t[1] = tensor_of(MOE_TENSOR_DOWN, 2, H, I, down);
        for (int side = 0; side < 2; side++)
            CHECK_OK(moe_weights_replace_expert(p.weights[side], 2, t, 2, NULL, &err));
        check_layer(&p, &few, 1, "with matrices again");
        pair_close(&p);
    }
    free(up);
    free(down);
    free(constant);
}

TEST(a_pruned_expert_gives_its_constant)
{
    if (gpu_open()) check_pruned(0);
}

TEST(the_constant_of_a_pruned_expert_has_no_norm)
{
    if (gpu_open()) check_pruned(1);
}

TEST(pruned_experts_of_a_later_tensor_parallel_rank_give_zeros)
{
    moe_layer_desc l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_RELU);
    layer_call c = logits_of(20);
    uint64_t state = 12;
    float *up = grid_values(48 * H, 0.125f, 4, &state), *down = grid_values(H * 48, 0.125f, 4, &state);
    float *constant = grid_values(H, 0.5f, 4, &state);
    pair p;
    if (!gpu_open()) return;
    l.intermediate_size = 48;
    for (int rank = 0; rank < 2; rank++) {
        memset(&p, 0, sizeof p);
        l.parallel.tp_size = 2;
        l.parallel.tp_rank = rank;
        if (!open_layer(&p, &l, 20)) break;
        prune(&p, up, down, constant);
        check_layer(&p, &c, 1, rank == 0 ? "rank 0" : "rank 1");
        pair_close(&p);
    }
    free(up);
    free(down);
    free(constant);
}

// ---- rows in expert order -------------------------------------------------------------------------------------------

// What a call with rows brings: counts, or where `offsets` says so first rows; out on both sides.
typedef struct rows_call {
    int mode, rows_per_expert, held; // held: rows of x and out
    uint32_t flags;
    const int32_t *table;
    int weights;                     // the caller's
} rows_call;

static void rows_args(const pair *p, const rows_call *c, moe_execute_args *a, uint64_t seed)
{
    memset(a, 0, sizeof *a);
    a->input_mode = c->mode;
    a->flags = c->flags;
    a->rows_per_expert = c->rows_per_expert;
    a->expected_rows = (int32_t)(seed % 2);
    a->counts_or_offsets = c->table;
    (void)p;
}

// Bits of the CPU (with rows of 16 bits within their rounding), in every row of out, those that stay as they were among
// them; faults, too.
static void check_rows(const pair *p, const rows_call *c, const char *what)
{
    size_t h = (size_t)p->layer.hidden_size, n = (size_t)c->held * h, table = (size_t)p->info[0].local_experts + 1;
    int x_dtype = p->plan[1]->desc.x_dtype, out_dtype = p->plan[1]->desc.out_dtype;
    int masked = c->mode == MOE_INPUT_MASKED;
    size_t out_bytes = n * dtype_size(out_dtype), ws = (size_t)p->info[0].workspace_bytes;
    uint64_t state = p->seed * 19 + (uint64_t)c->held;
    float *values = grid_values(n, 0.25f, 4, &state), *old = grid_values(n, 0.5f, 8, &state);
    float *exact = grid_values((size_t)c->held, 0.25f, 8, &state);
    int weights_dtype = p->plan[1]->desc.weights_dtype;
    void *weights = narrowed(exact, (size_t)c->held, weights_dtype);
    void *x = narrowed(values, n, x_dtype), *start = narrowed(old, n, out_dtype), *got = malloc(out_bytes + 4);
    unsigned char *memory = (unsigned char *)malloc(ws + 256), *cpu = (unsigned char *)malloc(out_bytes + 4);
    uint32_t faults[2][MOE_FAULTS], done[EXPERTS];
    moe_execute_args a;
    int results[2];
    rows_args(p, c, &a, state);
    a.x = x;
    a.weights = c->weights ? weights : NULL;
    memcpy(cpu, start, out_bytes);
    a.out = cpu;
    a.out_faults = faults[0];
    a.workspace = memory + (256 - (uintptr_t)memory % 256) % 256;
    a.workspace_bytes = ws;
    results[0] = moe_execute(p->plan[0], p->weights[0], &a, NULL);
    rows_args(p, c, &a, state);
    a.counts_or_offsets = (const int32_t *)gpu_copy(c->table, (masked ? table - 1 : table) * 4);
    a.x = gpu_copy(x, n * dtype_size(x_dtype));
    a.weights = c->weights ? gpu_copy(weights, (size_t)c->held * dtype_size(weights_dtype)) : NULL;
    a.out = gpu_copy(start, out_bytes);
    a.out_faults = (uint32_t *)gpu_make(sizeof faults[1]);
    a.workspace = gpu_make_raw((size_t)p->info[1].workspace_bytes);
    a.workspace_bytes = p->info[1].workspace_bytes;
    for (int e = 0; e < EXPERTS; e++) done[e] = 1000;
    if (c->weights) a.done_signal = (uint32_t *)gpu_copy(done, sizeof done);
    results[1] = moe_execute(p->plan[1], p->weights[1], &a, NULL);
    gpu_get(faults[1], a.out_faults, sizeof faults[1]);
    gpu_get(got, a.out, out_bytes);
    if (a.done_signal != NULL) gpu_get(done, a.done_signal, sizeof done);
    for (int e = 0; e < p->info[1].local_experts && a.done_signal != NULL; e++) {
        int rows = masked ? c->table[e] : c->table[e + 1] - c->table[e];
        if (done[e] != 1000u + (uint32_t)(results[0] == MOE_OK ? rows : 0))
            test_fail2(__FILE__, __LINE__, what, "another number of rows was signalled");
    }
    gpu_release();
    CHECK_EQ(results[1], MOE_OK); // contents are not refused there
    if (results[0] != MOE_OK && results[0] != MOE_ERROR_DATA) test_fail2(__FILE__, __LINE__, what, "refused");
    if (memcmp(faults[0], faults[1], sizeof faults[0]) != 0) test_fail2(__FILE__, __LINE__, what, "other faults");
    for (size_t i = 0; i < n; i++) {
        double want = moe__load(cpu, out_dtype, (int64_t)i), is = moe__load(got, out_dtype, (int64_t)i), slack = 0;
        char text[96];
        if (out_dtype == MOE_DTYPE_BF16) // rows are rounded to it, and what comes of them
            slack = ldexp(fabs(want - (double)moe__load(start, out_dtype, (int64_t)i)) + 2 * fabs(want), -8);
        if (c->flags & MOE_EXECUTE_ROWS_OUT) slack = 0; // rounding twice is rounding once
        if (fabs(want - is) <= slack) continue;
        snprintf(text, sizeof text, "row %d, %d: %g expected, %g", (int)(i / h), (int)(i % h), want, is);
        test_fail2(__FILE__, __LINE__, what, text);
        break;
    }
    if (results[0] != MOE_OK && memcmp(got, start, out_bytes) != 0)
        test_fail2(__FILE__, __LINE__, what, "something was written");
    free(values);
    free(old);
    free(exact);
    free(weights);
    free(x);
    free(start);
    free(got);
    free(memory);
    free(cpu);
}

static void check_rows_modes(const pair *p, const char *what)
{
    static const int32_t counts[][EXPERTS] = { { 3, 0, 7, 1, 0, 5 }, { 0, 0, 0, 0, 0, 0 }, { 0, 9, 0, 0, 0, 9 },
                                               { 1, 1, 1, 1, 1, 10 }, { -1, 2, 0, 0, 0, 1 }, { 9, 9, 9, 9, 9, 9 } };
    char text[96];
    for (int i = 0; i < 6; i++)
        for (int mode = MOE_INPUT_MASKED; mode <= MOE_INPUT_SORTED; mode++) {
            static const uint32_t flags[] = { 0, MOE_EXECUTE_ACCUMULATE, MOE_EXECUTE_ROWS_OUT };
            int32_t offsets[EXPERTS + 1] = { 0 };
            rows_call c;
            memset(&c, 0, sizeof c);
            for (int e = 0; e < EXPERTS; e++) offsets[e + 1] = offsets[e] + counts[i][e];
            c.mode = mode;
            c.rows_per_expert = 9;
            c.held = mode == MOE_INPUT_MASKED ? 9 * EXPERTS : 60;
            c.table = mode == MOE_INPUT_MASKED ? counts[i] : offsets;
            c.flags = flags[(i + mode) % 3];
            c.weights = i % 2 == 0;
            snprintf(text, sizeof text, "%s, mode %d, counts %d, flags %u", what, mode, i, (unsigned)c.flags);
            check_rows(p, &c, text);
        }
}

TEST(rows_in_expert_order_have_the_bits_of_the_cpu)
{
    if (!gpu_open()) return;
    for (int many = 0; many < 2; many++)
        for (int kind = 0; kind < 4; kind++) {
            static const char *const names[] = { "plain", "scale and bias", "weight on the input",
                                                 "weight of 16 bits on the input" };
            moe_layer_desc l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_RELU);
            pair p;
            memset(&p, 0, sizeof p);
            p.desc.max_rows = 50; // the last counts make 54
            if (many) p.desc.out_dtype = MOE_DTYPE_BF16; // what rows are rounded to
            if (kind == 1) l.output_scale = 0.5f;
            if (kind == 1) l.gemm2_bias = 1;
            if (kind >= 2) l.routing.weight_on = MOE_WEIGHT_ON_INPUT;
            if (kind == 3) p.desc.weights_dtype = many ? MOE_DTYPE_F16 : MOE_DTYPE_BF16;
            if (!open_layer(&p, &l, many ? 65 : 16)) continue;
            check_rows_modes(&p, names[kind]);
            pair_close(&p);
        }
}

// Rows of slots and which is whose, as the CPU has them; with finalize they make the layer's output.
static void check_rows_out(const pair *p, int tokens, int finalize, const char *what)
{
    size_t h = (size_t)p->layer.hidden_size, slots = (size_t)tokens * TOP_K, n = slots * h, t = (size_t)tokens;
    int width = p->plan[1]->width, rows_dtype = p->plan[1]->desc.out_dtype;
    uint64_t state = 77;
    float *x = grid_values(t * h, 0.25f, 4, &state), *logits = grid_values(t * (size_t)width, 0.125f, 40, &state);
    void *narrow = narrowed(x, t * h, MOE_DTYPE_BF16);
    unsigned char *out[2], *memory = (unsigned char *)malloc((size_t)p->info[0].workspace_bytes + 256);
    int32_t *map[2];
    float *weights[2], *whole = (float *)malloc(t * h * 4), *summed = (float *)malloc(t * h * 4);
    moe_execute_args a;
    void *ids_at, *rows_at;
    for (int side = 0; side < 2; side++) {
        out[side] = (unsigned char *)malloc(n * 4);
        memset(out[side], 0x11, n * 4);
        map[side] = (int32_t *)malloc(slots * 4);
        weights[side] = (float *)malloc(slots * 4);
    }
    memset(&a, 0, sizeof a);
    a.input_mode = MOE_INPUT_LOGITS;
    a.flags = MOE_EXECUTE_ROWS_OUT;
    a.num_tokens = tokens;
    a.x = narrow;
    a.logits = logits;
    a.out = out[0];
    a.out_row_of_slot = map[0];
    a.out_weights = weights[0];
    a.workspace = memory + (256 - (uintptr_t)memory % 256) % 256;
    a.workspace_bytes = p->info[0].workspace_bytes;
    CHECK_EQ(moe_execute(p->plan[0], p->weights[0], &a, NULL), MOE_OK);
    a.x = gpu_copy(narrow, t * h * 2);
    a.logits = gpu_copy(logits, t * (size_t)width * 4);
    a.out = rows_at = gpu_copy(out[1], n * 4);
    a.out_row_of_slot = (int32_t *)gpu_make(slots * 4);
    a.out_weights = (float *)gpu_make(slots * 4);
    a.out_ids = (int32_t *)(ids_at = gpu_make(slots * 4));
    a.workspace = gpu_make_raw((size_t)p->info[1].workspace_bytes);
    a.workspace_bytes = p->info[1].workspace_bytes;
    CHECK_EQ(moe_execute(p->plan[1], p->weights[1], &a, NULL), MOE_OK);
    gpu_get(out[1], a.out, n * 4);
    gpu_get(map[1], a.out_row_of_slot, slots * 4);
    gpu_get(weights[1], a.out_weights, slots * 4);
    if (memcmp(map[0], map[1], slots * 4) != 0) test_fail2(__FILE__, __LINE__, what, "other rows of slots");
    if (memcmp(weights[0], weights[1], slots * 4) != 0) test_fail2(__FILE__, __LINE__, what, "other weights");
    if (memcmp(out[0], out[1], n * 4) != 0) test_fail2(__FILE__, __LINE__, what, "other rows"); // the rest, too
    if (finalize) { // the rows, weighted and summed, are the layer's output
        a.flags = 0;
        a.out = gpu_make(t * h * 4);
        CHECK_EQ(moe_execute(p->plan[1], p->weights[1], &a, NULL), MOE_OK); // a map of rows, too
        gpu_get(whole, a.out, t * h * 4);
        gpu_get(map[1], a.out_row_of_slot, slots * 4);
        if (memcmp(map[0], map[1], slots * 4) != 0) test_fail2(__FILE__, __LINE__, what, "other rows of slots, whole");
        a.input_mode = MOE_INPUT_IDS;
        a.ids = ids_at;
        a.weights = a.out_weights;
        a.out_ids = NULL;
        a.out_weights = NULL;
        a.logits = NULL;
        a.out = gpu_make(t * h * 4);
        CHECK_EQ(moe_finalize(p->plan[1], p->weights[1], &a, rows_at, rows_dtype, a.out_row_of_slot, NULL), MOE_OK);
        gpu_get(summed, a.out, t * h * 4);
        if (memcmp(whole, summed, t * h * dtype_size(rows_dtype)) != 0)
            test_fail2(__FILE__, __LINE__, what, "finalize makes another sum");
        CHECK_EQ(moe_finalize(p->plan[1], p->weights[1], &a, (char *)rows_at + 4, rows_dtype, a.out_row_of_slot, NULL),
                 MOE_ERROR_ARGUMENT);
        CHECK_EQ(moe_finalize(p->plan[1], p->weights[1], &a, rows_at, MOE_DTYPE_F16, a.out_row_of_slot, NULL),
                 MOE_ERROR_UNSUPPORTED);
    }
    gpu_release();
    for (int side = 0; side < 2; side++) {
        free(out[side]);
        free(map[side]);
        free(weights[side]);
    }
    free(whole);
    free(summed);
    free(x);
    free(logits);
    free(narrow);
    free(memory);
}

typedef struct await_args { // of moe_k_await_rows
    const void *done, *rows;
    void *copy;
    uint32_t count, words;
} await_args;

// A kernel on another stream, enqueued first, copies an expert's rows as soon as their signal says that they are there.
TEST(a_signal_says_that_rows_are_there)
{
    enum { MOST = 9 };
    static const int32_t counts[EXPERTS] = { 3, 0, 7, 1, 0, 5 };
    moe_layer_desc l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_RELU);
    moe_execute_args a;
    moe_context *text;
    moe__cu_function function;
    await_args w;
    uint64_t state = 3;
    uint32_t zeros[EXPERTS] = { 0 };
    float *values = grid_values(MOST * EXPERTS * H, 0.25f, 4, &state), *out, got[2][7 * H];
    void *x = narrowed(values, MOST * EXPERTS * H, MOE_DTYPE_BF16), *stream;
    pair p;
    if (!gpu_open_driver()) return;
    memset(&p, 0, sizeof p);
    p.desc.max_rows = MOST * EXPERTS;
    text = gpu_text_open(test_data("gpu_signal.cu.inc"));
    function = gpu_text_load(text, "moe_k_await_rows", (int)sizeof w, 128, 0);
    if (open_layer(&p, &l, 8)) {
        stream = gpu_stream();
        memset(&a, 0, sizeof a);
        a.input_mode = MOE_INPUT_MASKED;
        a.rows_per_expert = MOST;
        a.counts_or_offsets = (const int32_t *)gpu_copy(counts, sizeof counts);
        a.x = gpu_copy(x, MOST * EXPERTS * H * 2);
        a.out = out = (float *)gpu_make(MOST * EXPERTS * H * 4);
        a.workspace = gpu_make_raw((size_t)p.info[1].workspace_bytes);
        a.workspace_bytes = p.info[1].workspace_bytes;
        a.done_signal = (uint32_t *)gpu_copy(zeros, sizeof zeros);
        w.done = a.done_signal + 2;
        w.rows = out + 2 * MOST * H;
        w.copy = gpu_make(sizeof got[0]);
        w.count = 7;
        w.words = 7 * H;
        CHECK_EQ(gpu_text_launch(function, 1, 128, 0, 0, 0, &w), 0); // on the legacy stream
        CHECK_EQ(moe_execute(p.plan[1], p.weights[1], &a, stream), MOE_OK);
        gpu_get(got[0], w.copy, sizeof got[0]);
        gpu_get(got[1], out + 2 * MOST * H, sizeof got[1]);
        CHECK(memcmp(got[0], got[1], sizeof got[0]) == 0);
        gpu_release();
        gpu_stream_end(stream);
        pair_close(&p);
    }
    moe_context_destroy(text);
    free(values);
    free(x);
}

TEST(rows_go_out_without_padding)
{
    static const int tokens[] = { 1, 33, 64, 65, 130 };
    if (!gpu_open()) return;
    for (int i = 0; i < 5; i++)
        for (int rank = 0; rank < 2; rank++) {
            moe_layer_desc l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_RELU);
            pair p;
            char what[64];
            memset(&p, 0, sizeof p);
            if (tokens[i] > 64) p.desc.out_dtype = MOE_DTYPE_BF16;
            if (rank) {
                l.parallel.expert_offset = 1;
                l.parallel.local_experts = 4;
                l.row_norm = i == 1;
                l.row_norm_epsilon = 1e-5f;
            }
            snprintf(what, sizeof what, "T %d, rank %d", tokens[i], rank);
            if (!open_layer(&p, &l, tokens[i])) continue;
            if (l.row_norm == 0) check_rows_out(&p, tokens[i], 1, what);
            else check_rows_out(&p, tokens[i], 0, what);
            pair_close(&p);
        }
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

TEST(tiles_do_not_change_a_bit)
{
    static const int32_t rows[] = { 16, 32, 64, 128 };
    moe_layer_desc l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_RELU);
    layer_call few = logits_of(20), some = logits_of(70);
    pair p;
    if (!gpu_open()) return;
    l.shared.count = 1;
    l.shared.intermediate_size = 40;
    memset(&p, 0, sizeof p);
    if (!open_layer(&p, &l, 600)) return;
    CHECK_EQ(p.plan[1]->sets.count, 3);
    for (int i = 0; i < 4; i++) {
        int32_t tiles[MOE__SETS];
        char what[64];
        for (int j = 0; j < MOE__SETS; j++) tiles[j] = rows[(i + j) % 4];
        CHECK_OK(moe__plan_take(p.plan[1], tiles, &err));
        CHECK_OK(moe_plan_get_info(p.plan[1], &p.info[1], &err));
        snprintf(what, sizeof what, "tiles of %d and %d rows", (int)tiles[0], (int)tiles[1]);
        check_layer(&p, &few, 1, what);
        check_layer(&p, &some, 1, what);
    }
    pair_close(&p);
}

typedef struct measured {
    int calls, last, total;
    double us[2][200]; // of T = 1 and T = 8, by token rows
} measured;

static void on_measured(void *user, const moe_autotune_progress *progress)
{
    measured *m = (measured *)user;
    CHECK_EQ(progress->done, m->last + 1);
    CHECK(progress->tokens == 1 || progress->tokens == 8);
    CHECK(progress->us > 0 && progress->tile_rows < 200);
    m->us[progress->tokens == 8][progress->tile_rows] = progress->us;
    m->last = progress->done;
    m->total = progress->total;
    m->calls++;
}

// Of T = 1 and T = 8: the tiles whose times are least, each relative to the fastest.
static int fastest(const measured *m)
{
    double least[2] = { 1e30, 1e30 }, best = 1e30;
    int rows = 0;
    for (int i = 0; i < 2; i++)
        for (int n = 0; n < 200; n++)
            if (m->us[i][n] > 0 && m->us[i][n] < least[i]) least[i] = m->us[i][n];
    for (int n = 0; n < 200; n++) {
        double score = m->us[0][n] / least[0] + m->us[1][n] / least[1];
        if (m->us[0][n] > 0 && score < best) {
            best = score;
            rows = n;
        }
    }
    return rows;
}

static int tuned_info(const moe_plan *plan, int tokens, int *rows)
{
    moe_plan_info info;
    memset(&info, 0, sizeof info);
    info.tiles_tokens = tokens;
    CHECK_OK(moe_plan_get_info(plan, &info, &err));
    *rows = info.tile_rows;
    return info.tile_measured;
}

// The only file of measured tiles below a cache folder.
static int find_measured(const char *folder, char path[1200])
{
    char command[1300];
    FILE *list;
    snprintf(command, sizeof command, "find '%s' -name 'tiles-*.txt'", folder);
    list = popen(command, "r");
    if (list == NULL || fgets(path, 1200, list) == NULL) path[0] = 0;
    if (list != NULL) pclose(list);
    path[strcspn(path, "\n")] = 0;
    return path[0] != 0;
}

TEST(tiles_are_measured_once_and_kept)
{
    moe_layer_desc l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU);
    layer_call c = logits_of(8);
    moe_context_desc desc;
    moe_autotune_desc tune;
    moe_context *before, *own;
    moe_plan *plan;
    measured m;
    pair p;
    char path[1200], folder[1024];
    int rows;
    if (!gpu_open()) return;
    memset(&p, 0, sizeof p);
    memset(&desc, 0, sizeof desc);
    memset(&tune, 0, sizeof tune);
    memset(&m, 0, sizeof m);
    snprintf(folder, sizeof folder, "%s", test_temp("measured"));
    desc.backend = MOE_BACKEND_CUDA;
    desc.log = gpu_message;
    desc.jit.cache_dir = folder;
    tune.progress = on_measured;
    tune.progress_user = &m;
    tune.budget_ms = 600000;
    REQUIRE(moe_context_create(&desc, &own, &err) == MOE_OK);
    before = gpu.ctx;
    gpu.ctx = own;
    gpu.cuda = own->cuda;
    if (open_layer(&p, &l, 8)) {
        CHECK_EQ(tuned_info(p.plan[1], 8, &rows), 0);
        CHECK_ERR(moe_plan_autotune(NULL, p.weights[1], NULL, &err), MOE_ERROR_ARGUMENT, "plan");
        CHECK_ERR(moe_plan_autotune(p.plan[1], NULL, NULL, &err), MOE_ERROR_ARGUMENT, "weights");
        tune.budget_ms = -1;
        CHECK_ERR(moe_plan_autotune(p.plan[1], p.weights[1], &tune, &err), MOE_ERROR_ARGUMENT, "desc.budget_ms");
        tune.budget_ms = 600000;
        CHECK_OK(moe_plan_autotune(p.plan[0], p.weights[0], &tune, &err)); // a CPU has nothing to choose
        CHECK_EQ(m.calls, 0);
        CHECK_OK(moe_plan_autotune(p.plan[1], p.weights[1], &tune, &err));
        CHECK_EQ(m.calls, 8); // four tiles, one and eight tokens
        CHECK(m.last == m.total && m.total == 8);
        CHECK_EQ(tuned_info(p.plan[1], 8, &rows), 1);
        CHECK_EQ(rows, fastest(&m));
        CHECK_OK(moe_plan_get_info(p.plan[1], &p.info[1], &err));
        check_layer(&p, &c, 0, "with measured tiles");
        CHECK_OK(moe_plan_autotune(p.plan[1], p.weights[1], &tune, &err)); // known
        CHECK_EQ(m.calls, 8);
        REQUIRE(find_measured(folder, path));
        REQUIRE_OK(moe_plan_create(own, &l, &p.desc, &plan, &err)); // another plan finds it
        CHECK_EQ(tuned_info(plan, 8, &rows), 1);
        CHECK_EQ(rows, fastest(&m));
        CHECK_OK(moe_plan_autotune(plan, p.weights[1], &tune, &err));
        CHECK_EQ(m.calls, 8);
        moe_plan_destroy(plan);
        p.desc.max_tokens = 7; // other numbers of tokens are another question
        REQUIRE_OK(moe_plan_create(own, &l, &p.desc, &plan, &err));
        CHECK_EQ(tuned_info(plan, 7, &rows), 0);
        moe_plan_destroy(plan);
        p.desc.max_tokens = 8;
        for (int i = 0; i < 3; i++) { // cut, of another key, of tiles that there are not: passed over
            static const char *const damage[] = { "head -c 90", "sed 's/^[0-9a-f]/g/'",
                                                  "sed 's/_t128x[0-9]*/_t128x24/'" };
            char command[8000];
            snprintf(command, sizeof command, "%s '%s' >'%s.new' && cp '%s' '%s.old' && mv '%s.new' '%s'", damage[i],
                     path, path, path, path, path, path);
            CHECK_EQ(system(command), 0);
            REQUIRE_OK(moe_plan_create(own, &l, &p.desc, &plan, &err));
            CHECK_EQ(tuned_info(plan, 8, &rows), 0);
            moe_plan_destroy(plan);
            snprintf(command, sizeof command, "mv '%s.old' '%s'", path, path);
            CHECK_EQ(system(command), 0);
        }
        CHECK_EQ(remove(path), 0);
        REQUIRE_OK(moe_plan_create(own, &l, &p.desc, &plan, &err));
        CHECK_EQ(tuned_info(plan, 8, &rows), 0);
        memset(&m, 0, sizeof m);
        tune.budget_ms = 1; // ends within the first of them: nothing is decided, nothing kept
        CHECK_OK(moe_plan_autotune(plan, p.weights[1], &tune, &err));
        if (!gpu_large()) { // a real device may be done by then
            CHECK_EQ(m.calls, 0);
            CHECK_EQ(tuned_info(plan, 8, &rows), 0);
            CHECK(!find_measured(folder, path));
        }
        moe_plan_destroy(plan);
        pair_close(&p);
    }
    gpu.ctx = before;
    gpu.cuda = before->cuda;
    moe_context_destroy(own);
}

TEST(what_is_not_built_is_refused_by_name)
{
    moe_layer_desc l = layer_of(MOE_FORMAT_BF16, MOE_ACTIVATION_RELU);
    moe_execute_args good, a;
    pair p;
    if (!gpu_open()) return;
    memset(&p, 0, sizeof p);
    memset(&good, 0, sizeof good);
    if (!open_layer(&p, &l, 4)) return;
    good.input_mode = MOE_INPUT_LOGITS;
    good.num_tokens = 4;
    good.x = gpu_make(4 * H * 2);
    good.logits = gpu_make(4 * EXPERTS * 4);
    good.out = gpu_make(4 * H * 4);
    good.workspace = gpu_make((size_t)p.info[1].workspace_bytes);
    good.workspace_bytes = p.info[1].workspace_bytes;
#define REFUSED(change, code, text) \
    do { \
        a = good; \
        change; \
        CHECK_ERR(moe_execute_check(p.plan[1], p.weights[1], &a, &err), code, text); \
        CHECK_EQ(moe_execute(p.plan[1], p.weights[1], &a, NULL), code); \
    } while (0)
    CHECK_OK(moe_execute_check(p.plan[1], p.weights[1], &good, &err));
    REFUSED(a.done_signal = (uint32_t *)good.out, MOE_ERROR_ARGUMENT, "args.done_signal");
    REFUSED(a.flags = MOE_EXECUTE_ROWS_OUT; a.out_row_of_slot = (int32_t *)good.workspace;
            a.done_signal = (uint32_t *)((char *)good.workspace + 2), MOE_ERROR_ARGUMENT, "args.done_signal");
    REFUSED(a.out = (char *)good.out + 2, MOE_ERROR_ARGUMENT, "args.out");
    REFUSED(a.x = (const char *)good.x + 1, MOE_ERROR_ARGUMENT, "args.x");
#undef REFUSED
    gpu_release();
    pair_close(&p);
}

TEST_MAIN(T(a_layer_has_the_bits_of_the_reference_where_sums_are_exact) T(gated_activations_are_within_the_bound)
          T(parameters_of_each_expert_beside_always_on_experts)
          T(biases_norms_and_weights_on_the_input) T(shared_and_special_experts) T(inputs_of_every_mode_and_ranks)
          T(sizes_experts_top_k_and_tokens) T(loads_that_are_not_even)
          T(no_tokens_is_no_work) T(a_small_layer_takes_half_a_second_of_the_processor_at_most)
          T(types_of_inputs_and_outputs) T(a_token_does_not_depend_on_its_batch)
          T(a_layer_only_enqueues_and_is_replayed_from_a_graph) T(tiles_do_not_change_a_bit)
          T(tiles_are_measured_once_and_kept) T(a_signal_says_that_rows_are_there)
          T(two_streams_with_two_workspaces) T(several_devices_in_one_process)
          T(an_event_is_recorded_before_the_second_product) T(a_replaced_expert_is_the_new_one)
          T(a_pruned_expert_gives_its_constant) T(the_constant_of_a_pruned_expert_has_no_norm)
          T(pruned_experts_of_a_later_tensor_parallel_rank_give_zeros)
          T(rows_in_expert_order_have_the_bits_of_the_cpu) T(rows_go_out_without_padding)
          T(what_is_not_built_is_refused_by_name))
