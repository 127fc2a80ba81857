// fake_cuda.h - drivers and NVRTCs that say what a test wants, made with the C compiler; and a log that is kept
//
// Included behind moe.h and test.h.
#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H

#include <unistd.h>

static char said[65536];

TEST_UNUSED static void listen(void *user, int32_t level, const char *text)
{
    size_t length = strlen(said);
    (void)user;
    snprintf(said + length, sizeof said - length, "%d %s\n", (int)level, text);
}

static void write_text(const char *path, const char *text)
{
    FILE *file = fopen(path, "w");
    if (file == NULL) exit(1);
    fputs(text, file);
    fclose(file);
}

// An absolute path under the tests' folder.
static void fake_path(char path[1500], const char *name)
{
    char here[400] = "";
    const char *temp = test_temp(name);
    if (temp[0] != '/' && getcwd(here, sizeof here - 1) != NULL) strcat(here, "/");
    snprintf(path, 1500, "%s%s", here, temp);
}

// Compiles `text` into a shared library; its path.
TEST_UNUSED static const char *library(const char *name, const char *text)
{
    static char paths[4][1500];
    static int turn;
    char source[1600], command[4096], *path = paths[turn++ % 4];
    const char *cc = getenv("CC");
    fake_path(path, name);
    snprintf(source, sizeof source, "%s.c", path);
    write_text(source, text);
    snprintf(command, sizeof command, "%s -shared -fPIC -w -o '%s' '%s'", cc != NULL ? cc : "cc", path, source);
    if (system(command) != 0) test_fail(__FILE__, __LINE__, command);
    return path;
}

// Every function of the driver returns 0, except what `more` defines, named in `without`.
TEST_UNUSED static const char *driver(const char *name, const char *more, const char *const *without)
{
    static char text[16384];
    size_t length = 0;
    static const char *const names[] = {
#define NAME(function, suffix, since, needed, parameters) #function suffix,
        MOE__CU_FUNCTIONS(NAME)
#undef NAME
    };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        int left_out = 0;
        for (int j = 0; without[j] != NULL; j++) left_out |= strcmp(without[j], names[i]) == 0;
        if (!left_out) length += (size_t)snprintf(text + length, sizeof text - length, "int %s() { return 0; }\n", names[i]);
    }
    snprintf(text + length, sizeof text - length, "%s", more);
    return library(name, text);
}

// An NVRTC that says this version and these chips, and compiles nothing.
TEST_UNUSED static const char *nvrtc(const char *name, int major, int minor, const char *archs, int whole)
{
    char text[2048];
    snprintf(text, sizeof text,
             "static const int archs[] = { %s };\n"
             "int nvrtcVersion(int *a, int *b) { *a = %d; *b = %d; return 0; }\n"
             "const char *nvrtcGetErrorString(int r) { return \"NVRTC_ERROR_TEST\"; }\n"
             "int nvrtcGetNumSupportedArchs(int *n) { *n = sizeof archs / sizeof archs[0]; return 0; }\n"
             "int nvrtcGetSupportedArchs(int *a) { __builtin_memcpy(a, archs, sizeof archs); return 0; }\n"
             "int nvrtcCreateProgram(void **p) { *p = &archs; return 0; }\n"
             "int nvrtcCompileProgram() { return 6; }\nint nvrtcGetPTXSize() { return 0; }\nint nvrtcGetPTX() { return 0; }\n"
             "int nvrtcGetProgramLogSize(void *p, unsigned long *n) { *n = 15; return 0; }\n"
             "int nvrtcGetProgramLog(void *p, char *t) { __builtin_strcpy(t, \"line 1\\nline 2\"); return 0; }\n"
             "int nvrtcDestroyProgram() { return 0; }\nint nvrtcGetCUBINSize() { return 0; }\n%s",
             archs, major, minor, whole ? "int nvrtcGetCUBIN() { return 0; }\n" : "");
    return library(name, text);
}

// A layer whose plan needs kernels.
TEST_UNUSED static moe_layer_desc small_layer(void)
{
    moe_layer_desc layer;
    memset(&layer, 0, sizeof layer);
    layer.num_experts = 8;
    layer.hidden_size = 64;
    layer.intermediate_size = 64;
    layer.format = MOE_FORMAT_BF16;
    layer.activation.kind = MOE_ACTIVATION_SWIGLU;
    moe_routing_preset(MOE_ROUTING_RENORMALIZE, &layer.routing, NULL);
    layer.routing.top_k = 2;
    return layer;
}

#endif
