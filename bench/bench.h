// bench.h - what the programs of this folder that time a GPU share: the driver, graphs, slopes, ceilings, the result
//
// Included behind moe.h. A result is rows of {layer, load, tokens, stage, us, least and most us, what the bytes would
// take at the ceiling, bytes, flops, config}, printed as they come and written as JSON.
#ifndef BENCH_H
#define BENCH_H

#include <dlfcn.h>
#include <stdio.h>
#include <time.h>

enum { SETS = 2, REPEATS = 25 };

typedef struct row {
    const char *layer, *format, *load, *stage, *config;
    int tokens;
    double us, us_min, us_max, floor_us, bytes, flops;
} row;

static row rows[512];
static int rows_count;

static row *row_next(const char *layer, const char *load, const char *stage, int tokens)
{
    row *r = &rows[rows_count++];
    memset(r, 0, sizeof *r);
    r->layer = layer;
    r->load = load;
    r->stage = stage;
    r->config = "";
    r->format = "bf16";
    r->tokens = tokens;
    return r;
}

// ---- what moe.h's own table of the driver lacks ----

static struct {
    int (*stream_create)(void **, unsigned);
    int (*begin_capture)(void *, int);
    int (*end_capture)(void *, void **);
    int (*instantiate)(void **, void *, unsigned long long);
    int (*graph_launch)(void *, void *);
    int (*exec_destroy)(void *);
    int (*graph_destroy)(void *);
    int (*event_create)(void **, unsigned);
    int (*event_record)(void *, void *);
    int (*event_synchronize)(void *);
    int (*event_elapsed)(float *, void *, void *);
    int (*copy_on_device)(uint64_t, uint64_t, size_t, void *);
} cu;

static moe_context *ctx;
static const moe__cuda *cuda;
static void *stream, *events[2];

static void check(int result, const char *what)
{
    if (result == 0) return;
    fprintf(stderr, "bench: %s returned %d\n", what, result);
    exit(1);
}
#define CALL(call) check((call), #call)

static void symbol(void *library, const char *name, void *function)
{
    void *found = dlsym(library, name);
    if (found == NULL) {
        fprintf(stderr, "bench: the driver has no %s\n", name);
        exit(1);
    }
    memcpy(function, &found, sizeof found);
}

static void fail(const char *what, const moe_error *err)
{
    fprintf(stderr, "bench: %s: %s\n", what, err->text);
    exit(1);
}

// The context and a stream; 0: there is no device.
static int bench_open(void)
{
    const char *path = getenv("MOE_CUDA_LIB");
    void *library;
    moe_context_desc desc;
    moe_error err;
    memset(&desc, 0, sizeof desc);
    desc.backend = MOE_BACKEND_CUDA;
    if (moe_context_create(&desc, &ctx, &err) != MOE_OK) {
        printf("%s\n", err.text);
        return 0;
    }
    cuda = ctx->cuda;
    library = dlopen(path != NULL && path[0] != 0 ? path : "libcuda.so.1", RTLD_NOW);
    if (library == NULL) check(1, "dlopen");
    symbol(library, "cuStreamCreate", &cu.stream_create);
    symbol(library, "cuStreamBeginCapture_v2", &cu.begin_capture);
    symbol(library, "cuStreamEndCapture", &cu.end_capture);
    symbol(library, "cuGraphInstantiateWithFlags", &cu.instantiate);
    symbol(library, "cuGraphLaunch", &cu.graph_launch);
    symbol(library, "cuGraphExecDestroy", &cu.exec_destroy);
    symbol(library, "cuGraphDestroy", &cu.graph_destroy);
    symbol(library, "cuEventCreate", &cu.event_create);
    symbol(library, "cuEventRecord", &cu.event_record);
    symbol(library, "cuEventSynchronize", &cu.event_synchronize);
    symbol(library, "cuEventElapsedTime", &cu.event_elapsed);
    symbol(library, "cuMemcpyDtoDAsync_v2", &cu.copy_on_device);
    CALL(cuda->cuCtxPushCurrent(cuda->context));
    CALL(cu.stream_create(&stream, 1));
    CALL(cu.event_create(&events[0], 0));
    CALL(cu.event_create(&events[1], 0));
    return 1;
}

static uint64_t device_memory(size_t bytes)
{
    moe__cu_ptr at = 0;
    CALL(cuda->cuMemAlloc(&at, bytes));
    return at;
}

static uint32_t random_u32(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

// ---- slopes ----

// Enqueues node `index` of a graph of inputs `set`.
typedef void (*enqueue_fn)(void *user, int set, int index);

static void *record(enqueue_fn enqueue, void *user, int set, int nodes)
{
    void *graph = NULL, *exec = NULL;
    CALL(cu.begin_capture(stream, 0));
    for (int i = 0; i < nodes; i++) enqueue(user, set, i);
    CALL(cu.end_capture(stream, &graph));
    CALL(cu.instantiate(&exec, graph, 0));
    CALL(cu.graph_destroy(graph));
    return exec;
}

static double time_graph(void *exec)
{
    float ms = 0;
    CALL(cu.event_record(events[0], stream));
    CALL(cu.graph_launch(exec, stream));
    CALL(cu.event_record(events[1], stream));
    CALL(cu.event_synchronize(events[1]));
    CALL(cu.event_elapsed(&ms, events[0], events[1]));
    return (double)ms * 1e3;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void row_times(row *r, double *us, int count)
{
    qsort(us, (size_t)count, sizeof us[0], compare);
    r->us = us[count / 2];
    r->us_min = us[0];
    r->us_max = us[count - 1];
}

// us of one node: median, least and most of REPEATS slopes between graphs of few nodes and of many.
static void measure(enqueue_fn enqueue, void *user, int few, int many, row *out)
{
    void *graphs[SETS][2];
    double slopes[REPEATS];
    for (int set = 0; set < SETS; set++) {
        graphs[set][0] = record(enqueue, user, set, few);
        graphs[set][1] = record(enqueue, user, set, many);
        for (int i = 0; i < 3; i++) time_graph(graphs[set][i % 2]);
    }
    for (int i = 0; i < REPEATS; i++)
        slopes[i] = (time_graph(graphs[i % SETS][1]) - time_graph(graphs[(i + 1) % SETS][0])) / (many - few);
    row_times(out, slopes, REPEATS);
    for (int set = 0; set < SETS; set++)
        for (int i = 0; i < 2; i++) CALL(cu.exec_destroy(graphs[set][i]));
}

// ---- ceilings ----

static void enqueue_empty(void *user, int set, int index)
{
    moe__cu_launch_config config;
    (void)set;
    (void)index;
    memset(&config, 0, sizeof config);
    config.gridDimX = config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1;
    config.blockDimX = 32;
    config.hStream = stream;
    CALL(cuda->cuLaunchKernelEx(&config, (moe__cu_function)user, NULL, NULL));
}

static double measure_launch(void)
{
    static const char text[] = ".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry empty() { ret; }\n";
    moe__cu_module module;
    moe__cu_function function;
    row r;
    if (cuda->cuModuleLoadData(&module, text) != 0) return 0; // the emulated device takes no PTX
    CALL(cuda->cuModuleGetFunction(&function, module, "empty"));
    measure(enqueue_empty, (void *)function, 10, 60, &r);
    CALL(cuda->cuModuleUnload(module));
    return r.us;
}

// ---- results ----

static void print_head(void)
{
    printf("%-28s %-15s %-8s %-14s %6s %9s %9s %9s %9s\n", "layer", "format", "load", "stage", "tokens", "us", "us min", "us max",
           "floor us");
}

static void print_row(const row *r)
{
    printf("%-28s %-15s %-8s %-14s %6d %9.2f %9.2f %9.2f %9.2f  %s\n", r->layer, r->format, r->load, r->stage,
           r->tokens, r->us, r->us_min, r->us_max, r->floor_us, r->config);
    fflush(stdout);
}

// `ceilings`: the members of an object in JSON.
static void write_json(const char *path, const char *ceilings)
{
    FILE *f = fopen(path, "w");
    const char *commit = getenv("MOE_COMMIT");
    moe_context_info info;
    time_t now = time(NULL);
    char date[32];
    if (f == NULL) {
        fprintf(stderr, "bench: %s cannot be written\n", path);
        exit(1);
    }
    memset(&info, 0, sizeof info);
    moe_context_get_info(ctx, &info, NULL);
    strftime(date, sizeof date, "%Y-%m-%d", gmtime(&now));
    fprintf(f, "{\"chip\": \"%s\", \"driver\": \"%d\", \"commit\": \"%s\", \"date\": \"%s\",\n", info.name,
            cuda->driver_version, commit != NULL ? commit : "", date);
    fprintf(f, " \"ceilings\": {%s},\n \"rows\": [\n", ceilings);
    for (int i = 0; i < rows_count; i++)
        fprintf(f,
                "  {\"layer\": \"%s\", \"format\": \"%s\", \"load\": \"%s\", \"tokens\": %d, \"stage\": \"%s\", "
                "\"us\": %.3f, \"us_min\": %.3f, \"us_max\": %.3f, \"floor_us\": %.3f, \"bytes\": %.0f, "
                "\"flops\": %.0f, \"config\": \"%s\"}%s\n",
                rows[i].layer, rows[i].format, rows[i].load, rows[i].tokens, rows[i].stage, rows[i].us, rows[i].us_min, rows[i].us_max,
                rows[i].floor_us, rows[i].bytes, rows[i].flops, rows[i].config, i + 1 < rows_count ? "," : "");
    fprintf(f, " ]}\n");
    fclose(f);
}

#endif
