// hooks.c - the host program supplies memory, log and threads: an allocator that counts, a logger, a parallel-for
//
//     cc -o hooks examples/hooks.c -lpthread && ./hooks tests/golden/mixtral 0
//
// Shows that moe_execute() allocates nothing, and that every byte comes back.
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include <pthread.h>
#include <stdio.h>

typedef struct memory { // of the calls in main(), which are made by one thread
    size_t bytes, peak;
    int allocations;
} memory;

static void *count_alloc(void *user, size_t size, size_t align)
{
    memory *m = (memory *)user;
    char *raw = (char *)malloc(size + align + sizeof raw), *p;
    if (raw == NULL) return NULL;
    p = raw + sizeof raw;
    p += (align - (uintptr_t)p % align) % align;
    memcpy(p - sizeof raw, &raw, sizeof raw);
    m->bytes += size;
    if (m->bytes > m->peak) m->peak = m->bytes;
    m->allocations++;
    return p;
}

static void count_free(void *user, void *ptr, size_t size)
{
    char *raw;
    memcpy(&raw, (char *)ptr - sizeof raw, sizeof raw);
    ((memory *)user)->bytes -= size;
    free(raw);
}

static void print_log(void *user, int32_t level, const char *text)
{
    (void)user;
    printf("log %d: %s\n", level, text);
}

typedef struct share { // of a loop, for one thread: every THREADS-th task
    void (*task)(void *arg, int32_t index);
    void *arg;
    int32_t first, tasks;
} share;
enum { THREADS = 2 };

static void *run_share(void *user)
{
    share *s = (share *)user;
    for (int32_t i = s->first; i < s->tasks; i += THREADS) s->task(s->arg, i);
    return NULL;
}

// An engine would hand the tasks to a pool of its own; here each loop starts its threads.
static void parallel_for(void *user, int32_t tasks, void (*task)(void *arg, int32_t index), void *arg)
{
    pthread_t threads[THREADS];
    share shares[THREADS];
    int started[THREADS] = { 0 };
    ++*(int *)user;
    for (int32_t i = 0; i < THREADS; i++) {
        shares[i].task = task;
        shares[i].arg = arg;
        shares[i].first = i;
        shares[i].tasks = tasks;
        if (i > 0) started[i] = pthread_create(&threads[i], NULL, run_share, &shares[i]) == 0;
    }
    for (int32_t i = 0; i < THREADS; i++) {
        if (!started[i]) run_share(&shares[i]); // the caller's own share, and any that got no thread
        else pthread_join(threads[i], NULL);
    }
}

int main(int argc, char **argv)
{
    memory counted = { 0, 0, 0 };
    int loops = 0, before;
    moe_error err;
    moe_layer_desc layer;
    moe_checkpoint *ckpt = NULL;
    moe_context_desc context = { 0 };
    moe_context *ctx = NULL;
    moe_weights *weights = NULL;
    moe_plan *plan = NULL;
    moe_plan_desc desc = { 0 };
    moe_plan_info info = { 0 };
    moe_execute_args args = { 0 };
    float *x, *logits;
    char *workspace;
    if (argc != 3) return fprintf(stderr, "usage: hooks DIR LAYER\n"), 2;
    context.threads = THREADS;
    context.allocator.alloc = count_alloc;
    context.allocator.free = count_free;
    context.allocator.user = &counted;
    context.log = print_log;
    context.parallel_for = parallel_for;
    context.parallel_user = &loops;
    desc.max_tokens = 64;
    desc.x_dtype = MOE_DTYPE_F32;
    if (moe_checkpoint_open(argv[1], NULL, &ckpt, &err) ||
        moe_checkpoint_layer(ckpt, (int32_t)strtol(argv[2], NULL, 10), &layer, &err) ||
        moe_context_create(&context, &ctx, &err) || moe_weights_from_checkpoint(ctx, ckpt, &layer, &weights, &err) ||
        moe_plan_create(ctx, &layer, &desc, &plan, &err) || moe_plan_get_info(plan, &info, &err))
        return fprintf(stderr, "%s\n", err.text), 1;
    x = (float *)calloc(64 * 2 * (size_t)layer.hidden_size, sizeof *x); // the input, then the output
    logits = (float *)calloc(64 * (size_t)info.router_width, sizeof *logits);
    workspace = (char *)malloc((size_t)info.workspace_bytes + 256);
    if (x == NULL || logits == NULL || workspace == NULL) return fprintf(stderr, "no memory\n"), 1;
    args.input_mode = MOE_INPUT_LOGITS;
    args.num_tokens = 64;
    args.x = x;
    args.logits = logits;
    args.out = x + 64 * (size_t)layer.hidden_size;
    args.workspace = workspace + (256 - (uintptr_t)workspace % 256) % 256;
    args.workspace_bytes = info.workspace_bytes;
    before = counted.allocations;
    if (moe_execute(plan, weights, &args, NULL)) return fprintf(stderr, "moe_execute failed\n"), 1;
    printf("%d allocations, at most %.1f KiB at a time, %d of them by moe_execute\n", counted.allocations,
           (double)counted.peak / 1024, counted.allocations - before);
    printf("parallel_for was called: %s\n", loops > 0 ? "yes" : "no");
    moe_plan_destroy(plan);
    moe_weights_destroy(weights);
    moe_context_destroy(ctx);
    moe_checkpoint_close(ckpt);
    free(x);
    free(logits);
    free(workspace);
    printf("bytes not given back: %lu\n", (unsigned long)counted.bytes);
    return counted.bytes != 0;
}
