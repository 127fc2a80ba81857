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

static void write_ptx(const char *path, const moe__instance *instance, char *ptx)
{
    FILE *file = fopen(path, "wb");
    char first[192];
    moe__text text = moe__text_make(first, sizeof first);
    if (file == NULL) stop("cannot be written", path);
    moe__ptx_line(instance, &text);
    fputs(first, file);
    for (char *line = strtok(ptx, "\n"); line != NULL; line = strtok(NULL, "\n")) {
        size_t size;
        line += strspn(line, " \t");
        for (size = strlen(line); size > 0 && (line[size - 1] == ' ' || line[size - 1] == '\t'); size--) {}
        if (size == 0 || strncmp(line, "//", 2) == 0) continue;
        for (size_t i = 0; i < size; i++) fputc(line[i] == '\t' ? ' ' : line[i], file);
        fputc('\n', file);
    }
    if (ferror(file) | fclose(file)) stop("cannot be written", path);
}

int main(int argc, char **argv)
{
    moe__instance instances[MOE__KERNELS];
    moe_layer_desc layer;
    moe_plan_desc plan;
    char path[1024], *source;
    FILE *list;
    if (argc != 4) stop("usage: ptx LIBNVRTC moe_kernels.cu.inc FOLDER", "arguments");
    open_compiler(argv[1]);
    source = read_text(argv[2]);
    snprintf(path, sizeof path, "%s/list", argv[3]);
    list = fopen(path, "wb");
    if (list == NULL) stop("cannot be written", path);
    memset(&layer, 0, sizeof layer);
    memset(&plan, 0, sizeof plan);
    layer.num_experts = MOE__PTX_WIDTH;
    layer.routing.top_k = 1;
    plan.max_tokens = 1;
    moe__instances_ptx(&layer, &plan, instances);
    for (int i = 0; i < MOE__KERNELS; i++) {
        char *ptx;
        if (instances[i].entry == NULL) continue;
        ptx = compile(&instances[i], source);
        snprintf(path, sizeof path, "%s/%s.ptx", argv[3], instances[i].name);
        write_ptx(path, &instances[i], ptx);
        fprintf(list, "%s.ptx\n", instances[i].name);
        free(ptx);
    }
    free(source);
    return fclose(list) != 0;
}
