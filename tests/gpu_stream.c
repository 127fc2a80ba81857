// gpu_stream.c - the stages only enqueue: streams, graphs, captures of other threads, orders of destruction, host time
#ifndef _GNU_SOURCE
#  define _GNU_SOURCE // clock_gettime
#endif
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "gpu.h"
#include <pthread.h>
#include <time.h>

enum { CAPTURE_GLOBAL = 0 };

// A call whose inputs and outputs stay on the device while the inputs' contents change.
typedef struct resident {
    const pair *p;
    call c;
    moe_execute_args args;
    moe_permutation out;
    void *at[ANSWER_PARTS];
    answer a;
} resident;

static void resident_begin(resident *r, const pair *p, const call *c)
{
    memset(r, 0, sizeof *r);
    r->p = p;
    r->c = *c;
    answer_make(&r->a, p, c);
    call_gpu_begin(p, c, &r->a, &r->args, &r->out, r->at);
}

// What the device holds now is what the CPU gives for `c`.
static void resident_check(resident *r, const call *c, const char *what)
{
    answer want;
    call_cpu(r->p, c, &want);
    r->a.result = MOE_OK;
    for (int i = 0; i < ANSWER_PARTS; i++) gpu_get(r->a.part[i], r->at[i], r->a.words[i] * 4);
    if (answer_differs(&want, &r->a)[0] != 0) test_fail2(__FILE__, __LINE__, what, answer_differs(&want, &r->a));
    answer_free(&want);
}

// What a replay leaves alone must not be what an earlier one wrote.
static void resident_poison(const resident *r)
{
    gpu_enter();
    for (int i = 0; i < ANSWER_PARTS; i++)
        if (r->at[i] != NULL)
            GPU_CALL(gpu.cuda->cuMemsetD8((moe__cu_ptr)(uintptr_t)r->at[i], GPU_POISON, r->a.words[i] * 4));
    GPU_CALL(gpu.cuda->cuCtxSynchronize());
    gpu_leave();
}

static void *capture(const resident *r, void *stream)
{
    void *graph = NULL, *exec = NULL;
    gpu_enter();
    GPU_CALL(gpu_calls.begin_capture(stream, CAPTURE_GLOBAL));
    gpu_leave();
    CHECK_EQ(call_run(r->p, 1, &r->args, &r->out, stream), MOE_OK);
    gpu_enter();
    GPU_CALL(gpu_calls.end_capture(stream, &graph));
    GPU_CALL(gpu_calls.instantiate(&exec, graph, 0));
    GPU_CALL(gpu_calls.graph_destroy(graph));
    gpu_leave();
    return exec;
}

// One capture, replayed with other logits and other numbers of tokens, fewer and more than before.
static void check_replays(int most, int tile, const int *held, int replays)
{
    moe_routing_desc r = preset(MOE_ROUTING_DEEPSEEK_V3, 4);
    pair p = { 0 };
    inputs in = { 0 };
    resident res;
    void *stream, *exec;
    p.desc.max_tokens = most;
    if (!pair_make(&p, &r, 64)) return;
    inputs_logits(&in, &p, most, 64, 1);
    in.c.tile = tile;
    in.c.held = 0;
    resident_begin(&res, &p, &in.c);
    stream = gpu_stream();
    exec = capture(&res, stream);
    for (int i = 0; i < replays; i++) {
        call c;
        inputs again = { 0 };
        int32_t tokens = held[i];
        inputs_logits(&again, &p, most, 64, (uint64_t)i + 2);
        c = again.c;
        c.tile = tile;
        c.held = tokens;
        resident_poison(&res);
        gpu_put((void *)(uintptr_t)res.args.logits, again.logits, (size_t)most * 64 * 4);
        gpu_put((void *)(uintptr_t)res.args.num_tokens_dev, &tokens, 4);
        gpu_enter();
        GPU_CALL(gpu_calls.graph_launch(exec, stream));
        GPU_CALL(gpu_calls.stream_synchronize(stream));
        gpu_leave();
        resident_check(&res, &c, "replay");
        inputs_free(&again);
    }
    gpu_enter();
    GPU_CALL(gpu_calls.exec_destroy(exec));
    gpu_leave();
    gpu_stream_end(stream);
    gpu_release();
    answer_free(&res.a);
    inputs_free(&in);
    pair_close(&p);
}

TEST(a_graph_is_replayed_with_other_inputs_and_numbers_of_tokens)
{
    static const int few[] = { 5, 24, 0, 1, 23 }, many[] = { 1030, 3, 1100 };
    if (!gpu_open_driver()) return;
    check_replays(24, 8, few, 5);
    check_replays(24, 0, few, 5);
    check_replays(1100, 16, many, 3);
    check_replays(1100, 0, many, 3);
}

// Two streams, each with a workspace and tensors of its own, work on one plan at the same time.
TEST(two_streams_share_a_plan)
{
    moe_routing_desc r = preset(MOE_ROUTING_RENORMALIZE, 4);
    pair p = { 0 };
    inputs in[2];
    resident res[2];
    void *stream[2];
    if (!gpu_open_driver()) return;
    p.desc.max_tokens = 1100;
    if (!pair_make(&p, &r, 32)) return;
    memset(in, 0, sizeof in);
    for (int i = 0; i < 2; i++) {
        inputs_logits(&in[i], &p, i == 0 ? 1050 : 1100, 64, (uint64_t)i + 1);
        in[i].c.tile = 8 << i;
        resident_begin(&res[i], &p, &in[i].c);
        stream[i] = gpu_stream();
    }
    for (int i = 0; i < 4; i++)
        CHECK_EQ(call_run(&p, 1, &res[i % 2].args, &res[i % 2].out, stream[i % 2]), MOE_OK);
    for (int i = 0; i < 2; i++) {
        resident_check(&res[i], &in[i].c, "stream");
        gpu_stream_end(stream[i]);
        answer_free(&res[i].a);
        inputs_free(&in[i]);
    }
    gpu_release();
    pair_close(&p);
}

// The router's product, routing and sorting from its logits, each launched while the one before may still run, and the
// same again behind it: the second round writes what the first one's last kernel reads.
TEST(stages_follow_each_other_by_programmatic_launch)
{
    static const int sizes[] = { 20, 1030 };
    if (!gpu_open_driver()) return;
    for (int i = 0; i < 2; i++) {
        moe_routing_desc r = preset(MOE_ROUTING_RENORMALIZE, 2);
        pair p = { 0 };
        call c;
        resident res;
        int tokens = sizes[i];
        uint64_t seed = 4;
        uint16_t *x = (uint16_t *)malloc((size_t)tokens * 16 * 2);
        float *logits = (float *)malloc((size_t)tokens * 12 * 4), *out;
        void *stream, *workspace;
        p.router = 1;
        p.layer.router.input_size = 16;
        p.desc.max_tokens = tokens;
        if (!pair_make(&p, &r, 12)) return;
        for (int j = 0; j < tokens * 16; j++) x[j] = moe__f32_to_bf16(test_random_float(&seed));
        memset(&c, 0, sizeof c);
        c.mode = MOE_INPUT_LOGITS;
        c.tokens = tokens;
        c.held = -1;
        c.tile = 8;
        c.logits = logits;
        memset(logits, 0, (size_t)tokens * 12 * 4);
        resident_begin(&res, &p, &c);
        out = (float *)(uintptr_t)res.args.logits;
        res.args.x = gpu_copy(x, (size_t)tokens * 16 * 2);
        res.args.flags = MOE_EXECUTE_PDL_IN;
        workspace = malloc((size_t)p.info[0].workspace_bytes + 256);
        stream = gpu_stream();
        for (int round = 0; round < 2; round++) {
            CHECK_EQ(moe_router_logits(p.plan[1], p.weights[1], &res.args, out, stream), MOE_OK);
            CHECK_EQ(call_run(&p, 1, &res.args, &res.out, stream), MOE_OK);
        }
        gpu_stream_end(stream);
        {
            moe_execute_args args;
            memset(&args, 0, sizeof args);
            args.num_tokens = tokens;
            args.x = x;
            args.workspace = (char *)workspace + (256 - (uintptr_t)workspace % 256) % 256;
            args.workspace_bytes = p.info[0].workspace_bytes;
            CHECK_EQ(moe_router_logits(p.plan[0], p.weights[0], &args, logits, NULL), MOE_OK);
        }
        resident_check(&res, &c, "chain");
        gpu_release();
        answer_free(&res.a);
        pair_close(&p);
        free(workspace);
        free(logits);
        free(x);
    }
}

// The first stage call may follow at once, on any stream: what a plan copied to the device is there.
TEST(a_plan_that_was_made_can_be_used)
{
    moe_routing_desc r = preset(MOE_ROUTING_RENORMALIZE, 2);
    pair p = { 0 };
    inputs in = { 0 };
    resident res;
    int32_t map[16];
    void *stream;
    moe_error err;
    memset(&err, 0, sizeof err);
    if (!gpu_open_driver()) return;
    for (int e = 0; e < 16; e++) map[e] = e % 2 == 0 ? e / 2 : -1;
    p.layer.parallel.local_experts = 8;
    p.layer.parallel.expert_map = map;
    p.desc.max_tokens = 20;
    if (!pair_make(&p, &r, 16)) return;
    inputs_logits(&in, &p, 20, 64, 1);
    in.c.tile = 8;
    resident_begin(&res, &p, &in.c);
    stream = gpu_stream();
    moe_plan_destroy(p.plan[1]);
    CHECK_OK(moe_plan_create(gpu.ctx, &p.layer, &p.desc, &p.plan[1], &err));
    CHECK_EQ(call_run(&p, 1, &res.args, &res.out, stream), MOE_OK);
    gpu_stream_end(stream);
    resident_check(&res, &in.c, "at once");
    gpu_release();
    answer_free(&res.a);
    inputs_free(&in);
    pair_close(&p);
}

// A stage of two kernels without tokens, and behind it one with tokens in the same workspace: the first kernel of the
// second stage must not meet the first kernel of the first.
TEST(a_stage_without_tokens_keeps_the_order)
{
    moe_routing_desc r = preset(MOE_ROUTING_RENORMALIZE, 2);
    pair p = { 0 };
    inputs in[2];
    resident res[2];
    void *stream;
    memset(in, 0, sizeof in);
    if (!gpu_open_driver()) return;
    p.desc.max_tokens = 20;
    if (!pair_make(&p, &r, 600)) return;
    for (int i = 0; i < 2; i++) {
        inputs_logits(&in[i], &p, 20 * i, 64, 1);
        in[i].c.tile = 8;
        resident_begin(&res[i], &p, &in[i].c);
        res[i].args.flags = MOE_EXECUTE_PDL_IN;
    }
    res[1].args.workspace = res[0].args.workspace;
    stream = gpu_stream();
    for (int i = 0; i < 2; i++) CHECK_EQ(call_run(&p, 1, &res[i].args, &res[i].out, stream), MOE_OK);
    gpu_stream_end(stream);
    for (int i = 0; i < 2; i++) {
        resident_check(&res[i], &in[i].c, "behind no tokens");
        answer_free(&res[i].a);
        inputs_free(&in[i]);
    }
    gpu_release();
    pair_close(&p);
}

// ---- another thread's capture ---------------------------------------------------------------------------------------

typedef struct capturer {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int captures, made; // the capture has begun; the other thread has made its plan
    const resident *r;
    void *stream, *exec;
} capturer;

static void *capturer_run(void *user)
{
    capturer *c = (capturer *)user;
    void *graph = NULL;
    gpu_enter();
    GPU_CALL(gpu_calls.begin_capture(c->stream, CAPTURE_GLOBAL));
    gpu_leave();
    pthread_mutex_lock(&c->lock);
    c->captures = 1;
    pthread_cond_broadcast(&c->changed);
    while (!c->made) pthread_cond_wait(&c->changed, &c->lock);
    pthread_mutex_unlock(&c->lock);
    CHECK_EQ(call_run(c->r->p, 1, &c->r->args, &c->r->out, c->stream), MOE_OK);
    gpu_enter();
    GPU_CALL(gpu_calls.end_capture(c->stream, &graph));
    GPU_CALL(gpu_calls.instantiate(&c->exec, graph, 0));
    GPU_CALL(gpu_calls.graph_destroy(graph));
    gpu_leave();
    return NULL;
}

// Weights sealed and plans made, kernels compiled and loaded, leave a capture of another thread intact.
TEST(a_plan_is_made_while_another_thread_captures)
{
    moe_routing_desc r = preset(MOE_ROUTING_RENORMALIZE, 4);
    pair p = { 0 }, other = { 0 };
    inputs in = { 0 };
    resident res;
    capturer c;
    pthread_t thread;
    if (!gpu_open_driver()) return;
    p.desc.max_tokens = 20;
    if (!pair_make(&p, &r, 48)) return;
    inputs_logits(&in, &p, 20, 64, 1);
    in.c.tile = 8;
    resident_begin(&res, &p, &in.c);
    memset(&c, 0, sizeof c);
    pthread_mutex_init(&c.lock, NULL);
    pthread_cond_init(&c.changed, NULL);
    c.r = &res;
    c.stream = gpu_stream();
    REQUIRE(pthread_create(&thread, NULL, capturer_run, &c) == 0);
    pthread_mutex_lock(&c.lock);
    while (!c.captures) pthread_cond_wait(&c.changed, &c.lock);
    pthread_mutex_unlock(&c.lock);
    r.bias_rows = 1;
    other.router = 1;
    other.desc.max_tokens = 3000;
    CHECK(pair_make(&other, &r, 300)); // instances that this program has not loaded yet
    pthread_mutex_lock(&c.lock);
    c.made = 1;
    pthread_cond_broadcast(&c.changed);
    pthread_mutex_unlock(&c.lock);
    pthread_join(thread, NULL);
    resident_poison(&res);
    gpu_enter();
    GPU_CALL(gpu_calls.graph_launch(c.exec, c.stream));
    GPU_CALL(gpu_calls.stream_synchronize(c.stream));
    GPU_CALL(gpu_calls.exec_destroy(c.exec));
    gpu_leave();
    resident_check(&res, &in.c, "captured");
    gpu_stream_end(c.stream);
    pthread_cond_destroy(&c.changed);
    pthread_mutex_destroy(&c.lock);
    gpu_release();
    answer_free(&res.a);
    inputs_free(&in);
    pair_close(&p);
    pair_close(&other);
}

// ---- enqueue only ---------------------------------------------------------------------------------------------------

// Every stage calls nothing of the driver but what enqueues a kernel and what asks for or switches the context.
TEST(the_stages_only_enqueue)
{
    static const char *const legal[] = { "cuLaunchKernelEx", "cuCtxGetCurrent", "cuCtxPushCurrent_v2",
                                         "cuCtxPopCurrent_v2", "cuCtxPushCurrent", "cuCtxPopCurrent" };
    moe_routing_desc r = preset(MOE_ROUTING_DEEPSEEK_V3, 4);
    int most = 1100, launches = 0;
    pair p = { 0 };
    static char log[1 << 16];
    char *line;
    if (!gpu_open_driver()) return;
    if (gpu_calls.log_begin == NULL) {
        test_skip("the driver keeps no log of its calls");
        return;
    }
    p.router = 1;
    p.desc.max_tokens = most;
    if (!pair_make(&p, &r, 64)) return;
    for (int tile = 0; tile < 2; tile++)
        for (int tokens = 9; tokens <= most; tokens += most - 9) {
            inputs in = { 0 };
            resident res;
            void *x, *logits;
            inputs_logits(&in, &p, tokens, 64, 1);
            in.c.tile = tile * 8;
            resident_begin(&res, &p, &in.c);
            x = gpu_make((size_t)tokens * 8 * 2);
            logits = gpu_make((size_t)tokens * 64 * 4);
            gpu_calls.log_begin();
            CHECK_EQ(call_run(&p, 1, &res.args, &res.out, NULL), MOE_OK);
            res.args.x = x;
            CHECK_EQ(moe_router_logits(p.plan[1], p.weights[1], &res.args, (float *)logits, NULL), MOE_OK);
            snprintf(log, sizeof log, "%s", gpu_calls.log_end());
            for (line = strtok(log, "\n"); line != NULL; line = strtok(NULL, "\n")) {
                char name[64] = "";
                int known = 0;
                sscanf(line, "%63s", name); // then thread, stream, capture, result
                for (int i = 0; i < 6; i++) known |= strcmp(name, legal[i]) == 0;
                launches += strcmp(name, "cuLaunchKernelEx") == 0;
                if (!known) test_fail2(__FILE__, __LINE__, "a stage calls", line);
            }
            gpu_release();
            answer_free(&res.a);
            inputs_free(&in);
        }
    CHECK_EQ(launches, 2 * (1 + 1) + 2 * (2 + 1)); // T = 9 routes in one launch, T = 1100 in two; one for the router
    pair_close(&p);
}

static double now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}

static int launch_nothing(const moe__cu_launch_config *config, moe__cu_function function, void **params, void **extra)
{
    (void)config;
    (void)function;
    (void)params;
    (void)extra;
    return 0;
}

// Host time of a stage call outside the driver's own: measured with a launch that returns at once.
TEST(a_stage_takes_less_than_a_microsecond_of_the_host)
{
    moe_routing_desc r = preset(MOE_ROUTING_DEEPSEEK_V3, 8);
    pair p = { 0 };
    inputs in = { 0 };
    resident res;
    double best[2] = { 1e9, 1e9 };
    moe__cuda *cuda;
    if (!gpu_open()) return;
    p.router = 1;
    p.desc.max_tokens = 1200;
    if (!pair_make(&p, &r, 256)) return;
    for (int stage = 0; stage < 2; stage++) {
        inputs_logits(&in, &p, stage == 0 ? 64 : 1200, 64, 1);
        in.c.tile = 8;
        resident_begin(&res, &p, &in.c);
        gpu_enter();
        cuda = (moe__cuda *)(uintptr_t)gpu.cuda;
        {
            int (*launch)(const moe__cu_launch_config *, moe__cu_function, void **, void **) = cuda->cuLaunchKernelEx;
            cuda->cuLaunchKernelEx = launch_nothing;
            for (int batch = 0; batch < 50; batch++) {
                double begin = now_us(), us;
                for (int i = 0; i < 200; i++) call_run(&p, 1, &res.args, &res.out, NULL);
                us = (now_us() - begin) / 200;
                if (us < best[stage]) best[stage] = us;
            }
            cuda->cuLaunchKernelEx = launch;
        }
        gpu_leave();
        gpu_release();
        answer_free(&res.a);
        inputs_free(&in);
    }
    printf("host time of moe_permute(): %.3f us with one launch, %.3f us with two\n", best[0], best[1]);
#if !defined(TEST_SANITIZED)
    CHECK(best[0] <= 1 && best[1] <= 1);
#endif
    pair_close(&p);
}

// A stage leaves the thread's current context as it was: none, this one, or none again.
TEST(the_current_context_stays)
{
    moe_routing_desc r = preset(MOE_ROUTING_RENORMALIZE, 2);
    pair p = { 0 };
    inputs in = { 0 };
    resident res;
    moe__cu_context current = NULL;
    if (!gpu_open()) return;
    p.desc.max_tokens = 4;
    if (!pair_make(&p, &r, 8)) return;
    inputs_logits(&in, &p, 4, 64, 1);
    in.c.tile = 8;
    resident_begin(&res, &p, &in.c);
    for (int entered = 0; entered < 2; entered++) {
        if (entered) gpu_enter();
        CHECK_EQ(call_run(&p, 1, &res.args, &res.out, NULL), MOE_OK);
        GPU_CALL(gpu.cuda->cuCtxGetCurrent(&current));
        CHECK(current == (entered ? gpu.cuda->context : NULL));
        if (entered) gpu_leave();
    }
    resident_check(&res, &in.c, "current");
    gpu_release();
    answer_free(&res.a);
    inputs_free(&in);
    pair_close(&p);
}

// Plans and weights go in any order, contexts last; the work has finished.
TEST(any_order_of_destruction)
{
    if (!gpu_open()) return;
    for (int order = 0; order < 2; order++) {
        moe_routing_desc r = preset(MOE_ROUTING_MINIMAX2, 2);
        moe_context_desc desc;
        moe_error err;
        moe_context *own = NULL, *before = gpu.ctx;
        const moe__cuda *cuda = gpu.cuda;
        pair p = { 0 };
        inputs in = { 0 };
        answer got, want;
        memset(&desc, 0, sizeof desc);
        desc.backend = MOE_BACKEND_CUDA;
        REQUIRE_OK(moe_context_create(&desc, &own, &err));
        gpu.ctx = own;
        gpu.cuda = own->cuda;
        p.desc.max_tokens = 4;
        if (pair_make(&p, &r, 8)) {
            inputs_logits(&in, &p, 4, 64, 1);
            call_gpu(&p, &in.c, &got);
            call_cpu(&p, &in.c, &want);
            CHECK_STR(answer_differs(&want, &got), "");
            for (int i = 0; i < 2; i++)
                if (i == order) { moe_plan_destroy(p.plan[1]); p.plan[1] = NULL; }
                else { moe_weights_destroy(p.weights[1]); p.weights[1] = NULL; }
            answer_free(&got);
            answer_free(&want);
            inputs_free(&in);
            pair_close(&p);
        }
        moe_context_destroy(own);
        gpu.ctx = before;
        gpu.cuda = cuda;
    }
}

// Sealing and plan making with the n-th call of a driver function failing: refused, nothing is left, and then it works.
TEST(failures_of_the_driver_leave_nothing_behind)
{
    static const char *const functions[] = { "cuMemAlloc", "cuMemcpyHtoDAsync" };
    moe_routing_desc r = preset(MOE_ROUTING_MINIMAX2, 2);
    int32_t map[16];
    if (!gpu_open_driver()) return;
    if (gpu_calls.leaks == NULL) {
        test_skip("the driver lets nothing fail on demand");
        return;
    }
    for (int e = 0; e < 16; e++) map[e] = e % 2 == 0 ? e / 2 : -1; // so that the plan has a table, too
    for (int f = -1; f < 2; f++) // first without a failure: modules stay with the context
        for (int nth = f < 0 ? 3 : 1; nth <= 3; nth++) { // weights, plan, nobody
            pair p = { 0 };
            char value[64];
            int before = gpu_calls.leaks(NULL, 0), result;
            moe_error err;
            memset(&err, 0, sizeof err);
            p.layer.num_experts = 16;
            p.layer.routing = r;
            p.layer.parallel.local_experts = 8;
            p.layer.parallel.expert_map = map;
            p.desc.max_tokens = 4;
            snprintf(value, sizeof value, "%s:%d=2", f < 0 ? "none" : functions[f], nth);
            setenv("MOE_EMU_FAIL", value, 1);
            GPU_CALL(gpu_calls.init(0));
            result = pair_open(&p, &err);
            unsetenv("MOE_EMU_FAIL");
            GPU_CALL(gpu_calls.init(0));
            CHECK_EQ(result != MOE_OK, nth < 3);
            CHECK_EQ(err.code, result);
            CHECK_EQ(p.plan[1] == NULL, nth < 3);
            if (nth == 1 && p.weights[1] != NULL) CHECK_OK(moe_weights_seal(p.weights[1], &err)); // once more
            pair_close(&p);
            if (f >= 0) CHECK_EQ(gpu_calls.leaks(NULL, 0), before);
        }
}

// A launch that the driver refuses is a result, and leaves the thread's context as it was.
TEST(a_launch_that_fails_is_reported)
{
    moe_routing_desc r = preset(MOE_ROUTING_RENORMALIZE, 2);
    pair p = { 0 };
    inputs in = { 0 };
    resident res;
    moe__cu_context current = NULL;
    if (!gpu_open_driver()) return;
    if (gpu_calls.leaks == NULL) {
        test_skip("the driver lets nothing fail on demand");
        return;
    }
    p.desc.max_tokens = 1100;
    if (!pair_make(&p, &r, 8)) return;
    for (int nth = 1; nth <= 2; nth++) { // the second one of two launches, too
        char value[64];
        inputs_logits(&in, &p, 1100, 64, 1);
        in.c.tile = 8;
        resident_begin(&res, &p, &in.c);
        snprintf(value, sizeof value, "cuLaunchKernelEx:%d=701", nth);
        setenv("MOE_EMU_FAIL", value, 1);
        GPU_CALL(gpu_calls.init(0));
        CHECK_EQ(call_run(&p, 1, &res.args, &res.out, NULL), MOE_ERROR_LAUNCH);
        unsetenv("MOE_EMU_FAIL");
        GPU_CALL(gpu_calls.init(0));
        GPU_CALL(gpu.cuda->cuCtxGetCurrent(&current));
        CHECK(current == NULL);
        CHECK_EQ(call_run(&p, 1, &res.args, &res.out, NULL), MOE_OK);
        resident_check(&res, &in.c, "after a failure");
        gpu_release();
        answer_free(&res.a);
        inputs_free(&in);
    }
    pair_close(&p);
}

// The same candidates, sizes and layout before a plan is made as of the plan, and the launches that a shape takes.
TEST(query_says_what_create_chooses)
{
    static const struct { int experts, tokens, one, two; } shapes[] = { { 64, 20, 1, 0 }, { 64, 5000, 1, 1 },
                                                                        { 600, 20, 0, 1 }, { 512, 1024, 1, 0 } };
    if (!gpu_open()) return;
    for (int i = 0; i < 4; i++) {
        moe_routing_desc r = preset(MOE_ROUTING_RENORMALIZE, 2);
        pair p = { 0 };
        moe_plan_info info;
        moe_error err;
        int arch = gpu.cuda->arch;
        memset(&info, 0, sizeof info);
        memset(&err, 0, sizeof err);
        p.desc.max_tokens = shapes[i].tokens;
        if (!pair_make(&p, &r, shapes[i].experts)) continue;
        CHECK_OK(moe_plan_query(gpu.ctx, &p.layer, &p.desc, &info, &err));
        CHECK(memcmp(&info, &p.info[1], sizeof info) == 0);
        CHECK_EQ(info.candidates[0].chosen, shapes[i].one);
        CHECK_EQ(info.candidates[1].chosen, arch < 90 && shapes[i].tokens > 64 ? 1 : shapes[i].two);
        CHECK_EQ(info.candidates[2].chosen, info.candidates[1].chosen);
        for (int j = 0; j < info.num_candidates; j++)
            CHECK_EQ(info.candidates[j].reason[0] == 0, info.candidates[j].chosen);
        CHECK_EQ(info.layout_id, p.info[0].layout_id);
        pair_close(&p);
    }
}

// What this version does not run on the device says so, before and at the call.
TEST(layers_are_refused_with_a_reason)
{
    moe_routing_desc r = preset(MOE_ROUTING_RENORMALIZE, 2);
    pair p = { 0 };
    inputs in = { 0 };
    resident res;
    moe_error err;
    int reasons = 0;
    void *x, *out, *rows;
    if (!gpu_open()) return;
    memset(&err, 0, sizeof err);
    p.desc.max_tokens = 4;
    if (!pair_make(&p, &r, 8)) return;
    for (int i = 0; i < p.info[1].num_candidates; i++) reasons += p.info[1].candidates[i].reason[0] != 0;
    CHECK(reasons > 0);
    inputs_logits(&in, &p, 4, 64, 1);
    resident_begin(&res, &p, &in.c);
    x = gpu_make(4 * 8 * 2);
    out = gpu_make(4 * 8 * 2);
    rows = gpu_make(64);
    CHECK_ERR(moe_execute_check(p.plan[1], p.weights[1], &res.args, &err), MOE_ERROR_ARGUMENT, "args.x");
    res.args.x = x;
    res.args.out = out;
    CHECK_ERR(moe_execute_check(p.plan[1], p.weights[1], &res.args, &err), MOE_ERROR_UNSUPPORTED, "plan");
    CHECK_CONTAINS(err.text, "f32");
    CHECK_EQ(moe_execute(p.plan[1], p.weights[1], &res.args, NULL), MOE_ERROR_UNSUPPORTED);
    res.args.input_mode = MOE_INPUT_IDS;
    res.args.ids = res.args.out_ids;
    res.args.weights = res.args.out_weights;
    CHECK_EQ(moe_finalize(p.plan[1], p.weights[1], &res.args, rows, MOE_DTYPE_F32, res.args.out_ids, NULL),
             MOE_ERROR_UNSUPPORTED);
    gpu_release();
    answer_free(&res.a);
    inputs_free(&in);
    pair_close(&p);
}

TEST_MAIN(
    T(a_graph_is_replayed_with_other_inputs_and_numbers_of_tokens)
    T(two_streams_share_a_plan)
    T(stages_follow_each_other_by_programmatic_launch)
    T(a_plan_that_was_made_can_be_used)
    T(a_stage_without_tokens_keeps_the_order)
    T(a_plan_is_made_while_another_thread_captures)
    T(the_stages_only_enqueue)
    T(a_stage_takes_less_than_a_microsecond_of_the_host)
    T(the_current_context_stays)
    T(any_order_of_destruction)
    T(failures_of_the_driver_leave_nothing_behind)
    T(a_launch_that_fails_is_reported)
    T(query_says_what_create_chooses)
    T(layers_are_refused_with_a_reason)
)
