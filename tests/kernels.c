// kernels.c - compiles every kernel that a layer could choose, for each kind of chip, with this machine's NVRTC; no GPU
//
//     kernels TABLE                   writes what each needs (`make kernels`)
//     kernels --check TABLE [NAME...] compiles again and compares (`make check-kernels`); only what has one of the NAMEs
//     kernels --plan                  seconds that compiling a plan's kernels takes: Qwen3-30B's layer, on an H200
//     kernels --log FILE              what a log of ptxas says, or why the kernel is not taken
//
// A kernel that spills, that ptxas has something to say of (C7508, C7510 and C7512 are wgmma that waits for itself), or
// that needs more than its chip has, is not taken. The numbers of a table hold for one version of NVRTC: where there is
// none of it, --check looks only whether the table is of moe.h's text, and says "omitted".
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"

#include <stdio.h>

#if defined(__GNUC__)
#  pragma GCC diagnostic ignored "-Wunused-function"
#endif

enum { MAX_KERNELS = 2048, MAX_LOG = 1 << 16, MAX_TABLE = 1 << 19, LINES_SHOWN = 20 };

typedef struct usage {
    int registers, stack, spills, smem; // smem: not counting dynamic
} usage;

typedef struct kernel {
    moe__instance instance; // smem_bytes: the most of any layer
    int chip;
    usage used;
    unsigned long long bytes;
} kernel;

// Shared memory that a CTA can ask for.
static const struct { const char *name; int arch, smem; } chips[] = {
    { "sm_80", 80, 166912 }, { "sm_86", 86, 101376 }, { "sm_89", 89, 101376 },
    { "sm_90a", 90, 232448 }, { "sm_100f", 100, 232448 }, { "sm_120f", 120, 101376 }
};
enum { CHIPS = sizeof chips / sizeof chips[0] };

static kernel kernels[MAX_KERNELS];
static int num_kernels;
static char **names; // parts of names of the kernels that are wanted
static int num_names; // 0: all

static void stop(const char *what, const char *name)
{
    fprintf(stderr, "kernels: %s: %s\n", name, what);
    exit(1);
}

// ---- which kernels --------------------------------------------------------------------------------------------------

static void add(const moe__instance *instance, int chip)
{
    kernel *k = kernels;
    while (k < kernels + num_kernels && (k->chip != chip || strcmp(k->instance.name, instance->name) != 0)) k++;
    if (k == kernels + MAX_KERNELS) stop("too many kernels", instance->name);
    if (k == kernels + num_kernels) {
        num_kernels++;
        k->instance = *instance;
        k->chip = chip;
    }
    if (strcmp(k->instance.defines, instance->defines) != 0 || strcmp(k->instance.entry, instance->entry) != 0)
        stop("is the name of two kernels", instance->name);
    if (k->instance.smem_bytes < instance->smem_bytes) k->instance.smem_bytes = instance->smem_bytes;
}

// The name ends at a tab, a line's end or the end.
static int is_wanted(const char *name)
{
    for (int i = 0; i < num_names; i++) {
        const char *found = strstr(name, names[i]);
        if (found != NULL && found < name + strcspn(name, "\t\n")) return 1;
    }
    return num_names == 0;
}

// What tells products apart: types of the matrices, of x and of the output, and GEMM 1's activation: the
// usual one, any gated one, any other.
typedef struct product {
    int format, activation, x_dtype, out_dtype;
    int block, scale_dtype; // of codes
} product;

static const product products[] = {
    { MOE_FORMAT_BF16, MOE_ACTIVATION_SWIGLU, MOE_DTYPE_BF16, MOE_DTYPE_BF16, 0, 0 },
    { MOE_FORMAT_BF16, MOE_ACTIVATION_RELU2, MOE_DTYPE_F32, MOE_DTYPE_F32, 0, 0 },
    { MOE_FORMAT_F16, MOE_ACTIVATION_SWIGLU, MOE_DTYPE_F16, MOE_DTYPE_F16, 0, 0 },
    { MOE_FORMAT_BF16, MOE_ACTIVATION_SITU, MOE_DTYPE_BF16, MOE_DTYPE_BF16, 0, 0 },
    { MOE_FORMAT_F16, MOE_ACTIVATION_SITU, MOE_DTYPE_F16, MOE_DTYPE_F16, 0, 0 },
#define CODES(format, block, scale_dtype) \
    { format, MOE_ACTIVATION_SWIGLU, MOE_DTYPE_BF16, MOE_DTYPE_BF16, block, scale_dtype }
    CODES(MOE_FORMAT_FP8_PER_CHANNEL, 0, 0), // per tensor: the same kernels
    CODES(MOE_FORMAT_FP8_BLOCK, 128, 0), CODES(MOE_FORMAT_FP8_BLOCK, 32, 0), CODES(MOE_FORMAT_MXFP8, 0, 0),
    CODES(MOE_FORMAT_NVFP4, 0, 0), CODES(MOE_FORMAT_NVFP4_W4A16, 0, 0), CODES(MOE_FORMAT_MXFP4_W4A16, 0, 0),
    CODES(MOE_FORMAT_MXFP4_W4A8, 0, 0), CODES(MOE_FORMAT_INT4_W4A16, 32, 0),
    CODES(MOE_FORMAT_INT4_W4A16, 128, MOE_DTYPE_F32)
#undef CODES
};
enum { PRODUCTS = sizeof products / sizeof products[0] };

static void resolve(moe_layer_desc *layer, moe_plan_desc *plan, int preset, int top_k, int extra_slots)
{
    moe_error err;
    if (moe_routing_preset(preset, &layer->routing, &err) != MOE_OK) stop(err.text, "preset");
    layer->routing.top_k = top_k;
    layer->routing.extra_slots = extra_slots;
    if (moe__layer_resolve(layer, &err) != MOE_OK ||
        moe__plan_desc_resolve(plan, layer, top_k + extra_slots, &err) != MOE_OK)
        stop(err.text, "layer");
}

// tile: of the products, with rows of each type; 0: without them.
static void add_layer(int experts, int preset, int extra_slots, const product *made, int tile, int chip)
{
    moe_layer_desc layer;
    moe_plan_desc plan;
    moe__instance instances[MOE__KERNELS];
    moe__gemm_sets sets;
    memset(&layer, 0, sizeof layer);
    memset(&plan, 0, sizeof plan);
    layer.num_experts = experts;
    layer.hidden_size = layer.intermediate_size = 128;
    layer.format = made->format;
    layer.format_block = made->block;
    layer.scale_dtype = made->scale_dtype;
    layer.activation.kind = made->activation;
    plan.x_dtype = made->x_dtype;
    plan.out_dtype = made->out_dtype;
    plan.max_tokens = 65536;
    resolve(&layer, &plan, preset, experts < MOE_MAX_TOP_K ? experts : MOE_MAX_TOP_K, extra_slots);
    memset(&sets, 0, sizeof sets);
    if (tile > 0 && moe__tile_built(made->format, tile) == NULL) return;
    if (tile > 0) {
        moe__tile_chip any;
        moe__tile_problem p = moe__tile_problem_of(&layer, &plan, 64);
        moe__tile_chip_make(&any, chips[chip].arch, 100, chips[chip].smem, chips[chip].smem + 1024, 0, 0);
        sets.count = 2;
        for (int i = 0; i < 2; i++) {
            if (!moe__set_take(&sets.set[i], &p, &any, tile)) stop("has no kernels", "tile");
            sets.set[i].rows_dtype = i == 0 ? (int32_t)MOE_DTYPE_F32 : p.dtype;
        }
    }
    moe__instances_select(&layer, &plan, &sets, chips[chip].arch, instances);
    for (int i = 0; i < MOE__KERNELS; i++)
        if (instances[i].entry != NULL) add(&instances[i], chip);
}

static int by_name(const void *a, const void *b)
{
    const kernel *left = (const kernel *)a, *right = (const kernel *)b;
    int order = strcmp(left->instance.name, right->instance.name);
    return order != 0 ? order : strcmp(chips[left->chip].name, chips[right->chip].name);
}

// Every width of a router with one routing of each kind, and beside the last kind, any routing, as many unscored slots
// as there can be: they are ids that widen nothing.
static void list_kernels(void)
{
    static const int presets[] = { MOE_ROUTING_DEFAULT, MOE_ROUTING_SIGMOID, MOE_ROUTING_RENORMALIZE };
    static const int tiles[] = { 16, 32, 64, 128 };
    int kept = 0;
    for (int chip = 0; chip < CHIPS; chip++) {
        moe__instance pack;
        moe__pack_instance(chips[chip].arch, &pack);
        add(&pack, chip);
    }
    for (int chip = 0; chip < CHIPS; chip++)
        for (int experts = 1; experts <= MOE_MAX_EXPERTS; experts++) {
            int rest = MOE_MAX_EXPERTS - experts;
            for (int i = 0; i < 3; i++) add_layer(experts, presets[i], 0, &products[i], 0, chip);
            for (int i = 0; i < 4 && experts == 64; i++)
                for (int j = 0; j < PRODUCTS; j++) add_layer(experts, MOE_ROUTING_LLAMA4, 0, &products[j], tiles[i], chip);
            add_layer(experts, MOE_ROUTING_LLAMA4, 0, &products[0], 0, chip);
            if (rest > MOE_MAX_EXTRA_SLOTS) rest = MOE_MAX_EXTRA_SLOTS;
            if (rest > 0) add_layer(experts, MOE_ROUTING_LLAMA4, rest, &products[0], 0, chip);
        }
    for (int i = 0; i < num_kernels; i++)
        if (is_wanted(kernels[i].instance.name)) kernels[kept++] = kernels[i];
    num_kernels = kept;
    qsort(kernels, (size_t)num_kernels, sizeof kernels[0], by_name);
}

// ---- compiling ------------------------------------------------------------------------------------------------------

// Lines of `ptxas -v` without news. All others are a reason to refuse: what they say is not always called a warning.
static int is_usual(const char *line)
{
    static const char *const usual[] = { "bytes gmem", "Compiling entry function", "Function properties for",
                                         "Compile time =" };
    if (strncmp(line, "ptxas info", 10) != 0 || strstr(line, "(C7") != NULL) return 0;
    for (size_t i = 0; i < sizeof usual / sizeof usual[0]; i++)
        if (strstr(line, usual[i]) != NULL) return 1;
    return 0;
}

static int number_before(const char *line, const char *what)
{
    const char *p = strstr(line, what);
    if (p == NULL) return 0;
    while (p > line && p[-1] == ' ') p--;
    while (p > line && p[-1] >= '0' && p[-1] <= '9') p--;
    return atoi(p);
}

// Takes the log apart into lines. NULL, or the line for which the kernel is not taken.
static const char *read_log(char *log, usage *used)
{
    int seen = 0;
    memset(used, 0, sizeof *used);
    for (char *line = strtok(log, "\r\n"); line != NULL; line = strtok(NULL, "\r\n")) {
        if (strstr(line, "bytes stack frame") != NULL) {
            used->stack = number_before(line, "bytes stack frame");
            used->spills = number_before(line, "bytes spill stores") + number_before(line, "bytes spill loads");
            if (used->spills > 0) return line;
            seen |= 1;
        } else if (strstr(line, ": Used ") != NULL) {
            used->registers = number_before(line, "registers");
            used->smem = number_before(line, "bytes smem");
            seen |= 2;
        } else if (!is_usual(line)) {
            return line;
        }
    }
    return seen == 3 ? NULL : "the log does not say what the kernel needs";
}

// Takes over what the compiler says of one kernel. Returns whether it may stay.
static int take(moe_context *ctx, moe__build *build, kernel *k)
{
    static char log[MAX_LOG];
    const moe__nvrtc *nvrtc = &ctx->jit->nvrtc;
    const char *defect = NULL;
    size_t size = 0;
    moe_error err;
    int total;
    if (moe__compile_fetch(ctx, build, &err) != MOE_OK) {
        printf("%s\n", err.text);
        return 0;
    }
    k->bytes = build->bytes;
    moe__build_drop(ctx, build);
    log[0] = 0;
    if (nvrtc->nvrtcGetProgramLogSize(build->program, &size) != 0 || size > sizeof log ||
        nvrtc->nvrtcGetProgramLog(build->program, log) != 0)
        defect = "its log cannot be had";
    if (defect == NULL) defect = read_log(log, &k->used);
    if (defect != NULL) printf("%s, %s: %s\n", k->instance.name, build->chip, defect);
    total = k->used.smem + k->instance.smem_bytes;
    if (total <= chips[k->chip].smem) return defect == NULL;
    printf("%s, %s: %d bytes of shared memory, the chip has %d\n", k->instance.name, build->chip, total,
           chips[k->chip].smem);
    return 0;
}

// All kernels of a chip, on the threads of the context. Returns how many may not stay.
static int compile_chip(moe_context *ctx, int chip)
{
    static moe__build builds[MAX_KERNELS];
    static moe__instance instances[MAX_KERNELS];
    static moe__build *wanted[MAX_KERNELS];
    static kernel *of[MAX_KERNELS];
    moe__compile compile;
    int count = 0, bad = 0;
    for (int i = 0; i < num_kernels; i++) {
        if (kernels[i].chip != chip) continue;
        instances[count] = kernels[i].instance;
        strcat(instances[count].defines, " --ptxas-options=-v");
        moe__build_init(&builds[count], &instances[count], chips[chip].name);
        wanted[count] = &builds[count];
        of[count++] = &kernels[i];
    }
    compile.jit = ctx->jit;
    compile.wanted = wanted;
    moe__parallel(ctx, count, moe__compile_task, &compile);
    for (int i = 0; i < count; i++) {
        bad += !take(ctx, wanted[i], of[i]);
        if (wanted[i]->program != NULL) ctx->jit->nvrtc.nvrtcDestroyProgram(&wanted[i]->program);
    }
    return bad;
}

// Without a driver; NVRTC for the newest chips. err.code: what is missing.
static moe_context *open_compiler(moe_error *err)
{
    moe_context_desc desc;
    moe_jit_desc jit;
    moe_context *ctx;
    memset(&desc, 0, sizeof desc);
    memset(&jit, 0, sizeof jit);
    desc.backend = MOE_BACKEND_CPU;
    desc.threads = 2;
    jit.cache_mode = MOE_CACHE_OFF;
    if (moe_context_create(&desc, &ctx, err) != MOE_OK || moe__jit_open(ctx, &jit, err) != MOE_OK ||
        moe__source_join(ctx, err) != MOE_OK)
        stop(err->text, "context");
    err->code = moe__jit_compiler(ctx, chips[CHIPS - 1].arch, err);
    return ctx;
}

// ---- the table ------------------------------------------------------------------------------------------------------

static void table_head(char *head, size_t size, int version)
{
    snprintf(head, size, "# NVRTC %d.%d, kernel text %.16s; written by make kernels\n", version / 1000,
             version % 1000 / 10, moe__kernel_digest());
}

static void table_text(char *text, int version)
{
    size_t at;
    table_head(text, MAX_TABLE, version);
    strcat(text, "instance\tchip\tregisters\tstack\tspills\tstatic smem\tdynamic smem at most\tcubin bytes\n");
    at = strlen(text);
    for (int i = 0; i < num_kernels && at + 256 < MAX_TABLE; i++) {
        const kernel *k = &kernels[i];
        at += (size_t)sprintf(text + at, "%s\t%s\t%d\t%d\t%d\t%d\t%d\t%llu\n", k->instance.name, chips[k->chip].name,
                              k->used.registers, k->used.stack, k->used.spills, k->used.smem, k->instance.smem_bytes,
                              k->bytes);
    }
}

static void read_file(const char *path, char *text, size_t room)
{
    FILE *file = fopen(path, "rb");
    size_t size = file != NULL ? fread(text, 1, room - 1, file) : 0;
    if (file == NULL) stop("cannot be opened", path);
    fclose(file);
    text[size] = 0;
}

static size_t line_length(const char *p) { return strcspn(p, "\n") + (p[strcspn(p, "\n")] == '\n'); }

// Prints the lines of `a` that `b` has not.
static int lines_missing(const char *a, const char *b, char mark)
{
    int missing = 0;
    for (; *a != 0; a += line_length(a)) {
        size_t length = line_length(a);
        const char *p = b;
        while (*p != 0 && (line_length(p) != length || memcmp(p, a, length) != 0)) p += line_length(p);
        if (*p == 0 && missing++ < LINES_SHOWN) printf("%c %.*s", mark, (int)length, a);
    }
    return missing;
}

// Leaves the two lines at the top and the rows of kernels that are wanted.
static void keep_rows(char *table)
{
    char *out = table;
    int row = 0;
    for (char *p = table; *p != 0; row++) {
        size_t length = line_length(p);
        if (row < 2 || is_wanted(p)) {
            memmove(out, p, length);
            out += length;
        }
        p += length;
    }
    *out = 0;
}

// Of this moe.h's text? Returns the version of NVRTC that the table is of.
static int table_version(const char *table, const char *path)
{
    char head[128];
    int major = 0, minor = 0;
    if (sscanf(table, "# NVRTC %d.%d", &major, &minor) != 2) stop("has no NVRTC version in its first line", path);
    table_head(head, sizeof head, major * 1000 + minor * 10);
    if (strncmp(table, head, strlen(head)) != 0) stop("is of another kernel text: run make kernels", path);
    return major * 1000 + minor * 10;
}

static int compare(const char *committed, const char *now, const char *path)
{
    if (strcmp(committed, now) == 0) return 0;
    lines_missing(committed, now, '-');
    lines_missing(now, committed, '+');
    stop("differs from what was compiled: run make kernels", path);
    return 1;
}

// ---- commands -------------------------------------------------------------------------------------------------------

static int show_log(const char *path)
{
    static char log[MAX_LOG];
    usage used;
    const char *defect;
    read_file(path, log, sizeof log);
    defect = read_log(log, &used);
    if (defect != NULL) stop(defect, path);
    printf("registers %d, stack %d, spills %d, smem %d\n", used.registers, used.stack, used.spills, used.smem);
    return 0;
}

// Returns how many may not stay.
static int compile_all(moe_context *ctx)
{
    int bad = 0;
    list_kernels();
    if (num_kernels == 0) stop("no kernel's name has this in it", num_names > 0 ? names[0] : "");
    for (int chip = 0; chip < CHIPS; chip++) {
        if (!moe__nvrtc_knows(&ctx->jit->nvrtc, chips[chip].arch)) stop("NVRTC does not know it", chips[chip].name);
        bad += compile_chip(ctx, chip);
    }
    printf("%d kernels compiled, %d of them not to be taken, %.1f s of processor time\n", num_kernels, bad,
           (double)clock() / CLOCKS_PER_SEC);
    return bad;
}

// Compares where NVRTC is the one that the table was made with.
static int check(moe_context *ctx, const moe_error *missing, const char *path)
{
    static char committed[MAX_TABLE], now[MAX_TABLE];
    int version;
    read_file(path, committed, sizeof committed);
    version = table_version(committed, path);
    if (missing->code != MOE_OK || ctx->jit->nvrtc.version != version) {
        printf("omitted: what the kernels need: no NVRTC %d.%d, which the table is of\n", version / 1000,
               version % 1000 / 10);
        return 0;
    }
    if (compile_all(ctx) != 0) return 1;
    table_text(now, version);
    keep_rows(committed);
    return compare(committed, now, path);
}

static int write_table(moe_context *ctx, const moe_error *missing, const char *path)
{
    static char now[MAX_TABLE];
    FILE *file;
    if (missing->code != MOE_OK) stop(missing->text, "NVRTC");
    if (compile_all(ctx) != 0) return 1;
    table_text(now, ctx->jit->nvrtc.version);
    file = fopen(path, "wb");
    if (file == NULL || fputs(now, file) == EOF || fclose(file) != 0) stop("cannot be written", path);
    return 0;
}

typedef struct job {
    moe__compile compile;
    double seconds[MOE__KERNELS]; // of the processor
} job;

static void compile_one(void *arg, int32_t index)
{
    job *j = (job *)arg;
    struct timespec begin, end;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &begin);
    moe__compile_task(&j->compile, index);
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end);
    j->seconds[index] = (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
}

// As moe_plan_create() compiles them, on two threads.
static int time_plan(moe_context *ctx, const moe_error *missing)
{
    moe__instance instances[MOE__KERNELS];
    moe__build builds[MOE__KERNELS], *wanted[MOE__KERNELS];
    moe_layer_desc layer;
    moe_plan_desc plan;
    moe__gemm_sets sets;
    const moe__tile_known *chip = moe__tile_chips;
    struct timespec begin, end;
    job j;
    double sum = 0;
    int count = 0;
    if (missing->code != MOE_OK) stop(missing->text, "NVRTC");
    memset(&layer, 0, sizeof layer);
    memset(&plan, 0, sizeof plan);
    layer.num_experts = 128;
    layer.hidden_size = 2048;
    layer.intermediate_size = 768;
    layer.format = MOE_FORMAT_BF16;
    layer.activation.kind = MOE_ACTIVATION_SWIGLU;
    layer.router.dtype = MOE_DTYPE_BF16;
    plan.max_tokens = 8192;
    resolve(&layer, &plan, MOE_ROUTING_RENORMALIZE, 8, 0);
    while (strcmp(chip->name, "H200") != 0) chip++;
    moe__sets_make(&layer, &plan, &chip->chip, &sets);
    moe__instances_select(&layer, &plan, &sets, chip->chip.arch, instances);
    for (int i = 0; i < MOE__KERNELS; i++) {
        int same = 0;
        for (int k = 0; k < count; k++) same |= strcmp(wanted[k]->instance->name, instances[i].name) == 0;
        if (instances[i].entry == NULL || same) continue;
        moe__build_init(&builds[count], &instances[i], "sm_90a");
        wanted[count] = &builds[count];
        count++;
    }
    j.compile.jit = ctx->jit;
    j.compile.wanted = wanted;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    moe__parallel(ctx, count, compile_one, &j);
    clock_gettime(CLOCK_MONOTONIC, &end);
    for (int i = 0; i < count; i++) {
        printf("%6.2f s  %s\n", j.seconds[i], wanted[i]->instance->name);
        sum += j.seconds[i];
        if (wanted[i]->program != NULL) ctx->jit->nvrtc.nvrtcDestroyProgram(&wanted[i]->program);
    }
    printf("%6.2f s of the processor, %.2f s on two threads\n", sum,
           (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec));
    return 0;
}

int main(int argc, char **argv)
{
    int checks = argc >= 3 && strcmp(argv[1], "--check") == 0, plan = argc == 2 && strcmp(argv[1], "--plan") == 0, code;
    moe_context *ctx;
    moe_error err;
    if (argc == 3 && strcmp(argv[1], "--log") == 0) return show_log(argv[2]);
    if (!checks && !plan && (argc != 2 || argv[1][0] == '-'))
        stop("usage: kernels TABLE | --check TABLE [NAME...] | --plan | --log FILE", "arguments");
    ctx = open_compiler(&err);
    if (checks) {
        names = argv + 3;
        num_names = argc - 3;
        code = check(ctx, &err, argv[2]);
    } else if (plan) {
        code = time_plan(ctx, &err);
    } else {
        code = write_table(ctx, &err, argv[1]);
    }
    moe__jit_close(ctx);
    moe_context_destroy(ctx);
    return code;
}
