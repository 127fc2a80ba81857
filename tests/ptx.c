// ptx.c - PTX of kernels for machines without NVRTC: `make embed` puts it into moe.h. Needs no GPU.
//
//     ptx LIBNVRTC moe_kernels.cu.inc FOLDER    a file for each kernel, and their names in FOLDER/list
//
// Which kernels: moe__instances_ptx()'s, of a router as wide as it has them. A file is the compiler's text without
// indents, comments and blank lines, behind the line by which moe.h finds it.
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include <dlfcn.h>

static void stop(const char *what, const char *name)
{
    fprintf(stderr, "ptx: %s: %s\n", name, what);
    exit(1);
}

static char *read_text(const char *name)
{
    FILE *file = fopen(name, "rb");
    char *text = (char *)malloc(1 << 22);
    size_t size;
    if (file == NULL || text == NULL) stop("cannot be read", name);
    size = fread(text, 1, (1 << 22) - 1, file);
    text[size] = 0;
    fclose(file);
    return text;
}

static moe__nvrtc nvrtc;

static void open_compiler(const char *path)
{
    void *library = dlopen(path, RTLD_NOW), *symbol;
    int major = 0, minor = 0;
    if (library == NULL) stop(dlerror(), path);
#define FIND(name) \
    if ((symbol = dlsym(library, #name)) == NULL) stop("has no " #name, path); \
    memcpy(&nvrtc.name, &symbol, sizeof symbol)
    FIND(nvrtcVersion);
    FIND(nvrtcCreateProgram);
    FIND(nvrtcCompileProgram);
    FIND(nvrtcGetPTXSize);
    FIND(nvrtcGetPTX);
    FIND(nvrtcDestroyProgram);
#undef FIND
    if (nvrtc.nvrtcVersion(&major, &minor) != 0 || major * 1000 + minor * 10 != MOE__PTX_NVRTC)
        stop("is not NVRTC 12.1", path);
}

static char *compile(const moe__instance *instance, const char *source)
{
    moe__nvrtc_program program = NULL;
    moe__options options;
    size_t size = 0;
    char *ptx;
    moe__options_make(&options, instance);
    options.option[options.count++] = "--gpu-architecture=compute_80";
    if (nvrtc.nvrtcCreateProgram(&program, source, "moe", 0, NULL, NULL) != 0 ||
        nvrtc.nvrtcCompileProgram(program, options.count, options.option) != 0 ||
        nvrtc.nvrtcGetPTXSize(program, &size) != 0)
        stop("does not compile", instance->name);
    ptx = (char *)malloc(size);
    if (ptx == NULL || nvrtc.nvrtcGetPTX(program, ptx) != 0) stop("gives no PTX", instance->name);
    nvrtc.nvrtcDestroyProgram(&program);
    return ptx;
}

// All of `from` in a text to `to`, which is not longer.
static void replace(char *text, const char *from, const char *to)
{
    char *out = text;
    while (*text != 0) {
        if (strncmp(text, from, strlen(from)) == 0) {
            text += strlen(from);
            for (const char *c = to; *c != 0; c++) *out++ = *c;
        } else {
            *out++ = *text++;
        }
    }
    *out = 0;
}

// Lines without comments and spaces that mean nothing, many to a line of the file, with short names: half the size.
static void write_ptx(const char *path, const moe__instance *instance, char *ptx)
{
    FILE *file = fopen(path, "wb");
    char first[192];
    size_t column = 0;
    int body = 0;
    moe__text text = moe__text_make(first, sizeof first);
    if (file == NULL) stop("cannot be written", path);
    moe__ptx_line(instance, &text);
    fputs(first, file);
    snprintf(first, sizeof first, "%s_param_0", instance->entry);
    replace(ptx, first, "p");
    replace(ptx, "$L__BB0_", "$");
    for (char *line = strtok(ptx, "\n"); line != NULL; line = strtok(NULL, "\n")) {
        char *comment = strstr(line, "//"), *out = line;
        size_t size;
        if (comment != NULL) *comment = 0;
        for (const char *c = line; *c != 0; c++) {
            int space = *c == ' ' || *c == '\t';
            if (space && (out == line || strchr(" ,;:{[|+=", out[-1]) != NULL)) continue;
            *out++ = space ? ' ' : *c;
        }
        while (out > line && out[-1] == ' ') out--;
        *out = 0;
        // Constants that NVRTC puts into every module, and no kernel reads.
        if ((size = strlen(line)) == 0 || strstr(line, "2nv6target6detail") != NULL) continue;
        if (column > 0 && (column + size > 100 || body == 0)) {
            fputc('\n', file);
            column = 0;
        }
        body |= strncmp(line, ".address_size", 13) == 0; // those before it have a line each
        fprintf(file, "%s%s", column > 0 ? " " : "", line);
        column += size + (column > 0);
    }
    fputc('\n', file);
    if (ferror(file) | fclose(file)) stop("cannot be written", path);
}

// What embedded PTX is for: routing, and layers with x and output of these types.
static const struct { int x_dtype, out_dtype, activation; } wanted[] = {
    { MOE_DTYPE_BF16, MOE_DTYPE_BF16, MOE_ACTIVATION_SWIGLU },
    { MOE_DTYPE_BF16, MOE_DTYPE_F32, MOE_ACTIVATION_RELU2 },
    { MOE_DTYPE_F32, MOE_DTYPE_F32, MOE_ACTIVATION_RELU2 }, // the router's product alone
};

static void write_all(int i, const char *source, const char *folder, FILE *list)
{
    static char done[32][sizeof ((moe__instance *)0)->name];
    static int count;
    moe__instance instances[MOE__KERNELS];
    moe__gemm_sets sets;
    moe__tile_chip chip;
    moe_layer_desc layer;
    moe_plan_desc plan;
    char path[1024];
    memset(&layer, 0, sizeof layer);
    memset(&plan, 0, sizeof plan);
    layer.hidden_size = layer.intermediate_size = 128;
    layer.format = MOE_FORMAT_BF16;
    layer.activation.kind = wanted[i].activation;
    layer.num_experts = MOE__PTX_WIDTH;
    layer.routing.top_k = 1;
    layer.parallel.tp_size = 1;
    plan.max_tokens = 1;
    plan.x_dtype = wanted[i].x_dtype;
    plan.out_dtype = wanted[i].out_dtype;
    moe__tile_chip_make(&chip, MOE__PTX_ARCH, 100, 101376, 102400, 0, 0);
    moe__sets_ptx(&layer, &plan, &chip, &sets);
    moe__instances_ptx(&layer, &plan, &sets, instances);
    for (int k = 0; k < MOE__KERNELS; k++) {
        char *ptx;
        int at = 0;
        if (instances[k].entry == NULL) continue;
        while (at < count && strcmp(done[at], instances[k].name) != 0) at++;
        if (at < count) continue;
        strcpy(done[count++], instances[k].name);
        ptx = compile(&instances[k], source);
        snprintf(path, sizeof path, "%s/%s.ptx", folder, instances[k].name);
        write_ptx(path, &instances[k], ptx);
        fprintf(list, "%s.ptx\n", instances[k].name);
        free(ptx);
    }
}

int main(int argc, char **argv)
{
    char path[1024], *source;
    FILE *list;
    if (argc != 4) stop("usage: ptx LIBNVRTC moe_kernels.cu.inc FOLDER", "arguments");
    open_compiler(argv[1]);
    source = read_text(argv[2]);
    snprintf(path, sizeof path, "%s/list", argv[3]);
    list = fopen(path, "wb");
    if (list == NULL) stop("cannot be written", path);
    for (int i = 0; i < (int)(sizeof wanted / sizeof wanted[0]); i++) write_all(i, source, argv[3], list);
    free(source);
    return fclose(list) != 0;
}
