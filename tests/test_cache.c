// The kernel cache: whatever happens to its folder, the kernels are right, at worst compiled again. A driver and an
// NVRTC made here stand in: "compiling" gives an image that the driver knows; what was compiled is read from the log.
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"

#if defined(__linux__) && !defined(MOE_NO_CUDA) && !defined(MOE_NO_FILES)
#include "fake_cuda.h"

#include <sys/wait.h>

enum { KERNELS = 3, HEADER = MOE__ENTRY_HEADER };

static char driver_path[1500], nvrtc_path[1500], root[1500];

// Images begin with "IMAGE"; anything else is refused as CUDA_ERROR_INVALID_IMAGE. FAKE_ARCH: compute capability.
static const char driver_text[] =
    "#include <stdlib.h>\n#include <string.h>\n"
    "int cuDriverGetVersion(int *v) { *v = 12040; return 0; }\n"
    "int cuDeviceGetCount(int *n) { *n = 1; return 0; }\n"
    "int cuDeviceGetName(char *n, int s, int d) { strcpy(n, \"Fake\"); return 0; }\n"
    "int cuDeviceGetAttribute(int *v, int a, int d)\n"
    "{ const char *t = getenv(\"FAKE_ARCH\"); int c = t ? atoi(t) : 90;\n"
    "  *v = a == 75 ? c / 10 : a == 76 ? c % 10 : 100000; return 0; }\n"
    "int cuFuncGetAttribute(int *v, int a, void *f) { *v = 1024; return 0; }\n"
    "int cuFuncGetParamInfo(void *f, size_t i, size_t *o, size_t *s) { *s = 8; return 0; }\n"
    "int cuModuleLoadData(void **m, const char *p) { *m = m; return memcmp(p, \"IMAGE\", 5) == 0 ? 0 : 200; }\n"
    "int cuModuleGetFunction(void **f, void *m, const char *n) { *f = f; return 0; }\n";

// FAKE_IMAGE=bad: images that the driver refuses.
static const char nvrtc_text[] =
    "#include <stdlib.h>\n#include <string.h>\n"
    "int nvrtcVersion(int *a, int *b) { *a = 12; *b = 4; return 0; }\n"
    "const char *nvrtcGetErrorString(int r) { return \"\"; }\n"
    "int nvrtcGetNumSupportedArchs(int *n) { *n = 2; return 0; }\n"
    "int nvrtcGetSupportedArchs(int *a) { a[0] = 80; a[1] = 90; return 0; }\n"
    "int nvrtcCreateProgram(void **p) { *p = malloc(1); return 0; }\n"
    "int nvrtcDestroyProgram(void **p) { free(*p); *p = 0; return 0; }\n"
    "int nvrtcCompileProgram() { return 0; }\n"
    "int nvrtcGetCUBINSize(void *p, size_t *n) { *n = 5000; return 0; }\n"
    "int nvrtcGetCUBIN(void *p, char *c)\n"
    "{ memset(c, 7, 5000); memcpy(c, getenv(\"FAKE_IMAGE\") ? \"BAD!!\" : \"IMAGE\", 5); return 0; }\n"
    "int nvrtcGetPTXSize(void *p, size_t *n) { *n = 6; return 0; }\n"
    "int nvrtcGetPTX(void *p, char *c) { strcpy(c, \"IMAGE\"); return 0; }\n"
    "int nvrtcGetProgramLogSize(void *p, size_t *n) { *n = 1; return 0; }\n"
    "int nvrtcGetProgramLog(void *p, char *t) { *t = 0; return 0; }\n";

static int ready(void)
{
    static const char *const without[] = {
        "cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGetName", "cuDeviceGetAttribute", "cuFuncGetAttribute",
        "cuFuncGetParamInfo", "cuModuleLoadData", "cuModuleGetFunction", NULL };
    if (driver_path[0] != 0) return 1;
    unsetenv("MOE_CACHE_DIR");
    unsetenv("MOE_CACHE");
    fake_path(root, "cache_tests");
    strcpy(driver_path, driver("fake_driver.so", driver_text, without));
    strcpy(nvrtc_path, library("fake_nvrtc.so", nvrtc_text));
    return 1;
}

static void shell(const char *format, const char *path)
{
    char command[8000];
    snprintf(command, sizeof command, format, path, path, path, path);
    if (system(command) != 0) test_fail(__FILE__, __LINE__, command);
}

// A path under an emptied folder of this program's.
static const char *fresh(const char *name)
{
    static char path[4][1700];
    static int turn;
    char *p = path[turn++ % 4];
    ready();
    snprintf(p, sizeof path[0], "%s/%s", root, name);
    shell("rm -rf '%s'", p);
    shell("mkdir -p -m 755 \"$(dirname '%s')\"", p);
    return p;
}

typedef struct load_result {
    int32_t code;
    int compiled, cached, warnings, nvrtc; // lines of the log
} load_result;

static int count(const char *text, const char *part)
{
    int n = 0;
    for (const char *p = text; (p = strstr(p, part)) != NULL; p++) n++;
    return n;
}

static moe_context_desc cache_desc(const char *cache_dir)
{
    moe_context_desc desc;
    ready();
    memset(&desc, 0, sizeof desc);
    desc.backend = MOE_BACKEND_CUDA;
    desc.threads = 2;
    desc.log = listen;
    desc.jit.cuda_library = driver_path;
    desc.jit.nvrtc_library = nvrtc_path;
    desc.jit.cache_dir = cache_dir;
    return desc;
}

static void make_instances(moe__instance *instances)
{
    memset(instances, 0, KERNELS * sizeof *instances);
    for (int i = 0; i < KERNELS; i++) {
        instances[i].entry = "moe_k_sort";
        snprintf(instances[i].name, sizeof instances[i].name, "kernel%d", i);
        snprintf(instances[i].defines, sizeof instances[i].defines, "-DMOE_P_N=%d", i);
        instances[i].args_bytes = 8;
        instances[i].threads = 128;
        instances[i].smem_bytes = 50000;
    }
}

// A context that loads three kernels.
static load_result load_desc(const moe_context_desc *desc)
{
    moe__instance instances[KERNELS];
    moe__cu_function functions[KERNELS];
    moe_context *ctx;
    load_result result;
    memset(&result, 0, sizeof result);
    make_instances(instances);
    said[0] = 0;
    if ((result.code = moe_context_create(desc, &ctx, &err)) != MOE_OK) return result;
    result.code = moe__jit_load(ctx, instances, KERNELS, functions, &err);
    moe_context_destroy(ctx);
    result.compiled = count(said, "compiled by NVRTC");
    result.cached = count(said, ": from the cache") + count(said, ": from the seed folder") + count(said, "images\n");
    result.warnings = count(said, "\n2 ") + (said[0] == '2');
    result.nvrtc = count(said, "NVRTC");
    return result;
}

static load_result load(const char *cache_dir)
{
    moe_context_desc desc = cache_desc(cache_dir);
    return load_desc(&desc);
}

static void expect_at(int line, load_result r, int32_t code, int compiled, int cached)
{
    char text[1600];
    if (r.code == code && r.compiled == compiled && r.cached == cached) return;
    snprintf(text, sizeof text, "code %d, compiled %d, cached %d; expected %d, %d, %d; %s; log:\n%.500s", (int)r.code,
             r.compiled, r.cached, (int)code, compiled, cached, err.text, said);
    test_fail(__FILE__, line, text);
}
#define EXPECT(result, code, compiled, cached) expect_at(__LINE__, (result), (code), (compiled), (cached))

// The n-th entry of a folder.
static void entry_path(char *path, const char *cache, int n)
{
    moe__instance instances[KERNELS];
    moe__build build;
    char name[128], digest[17];
    make_instances(instances);
    moe__build_init(&build, &instances[n], "sm_90a");
    moe__entry_name(&build, name, sizeof name);
    moe__entry_folder(digest);
    snprintf(path, 2500, "%s/v1/%s/%s", cache, digest, name);
}

TEST(a_warm_start_compiles_nothing_and_opens_no_nvrtc)
{
    const char *cache = fresh("warm");
    load_result r = load(cache);
    EXPECT(r, MOE_OK, KERNELS, 0);
    CHECK(r.nvrtc > 0);
    r = load(cache);
    EXPECT(r, MOE_OK, 0, KERNELS);
    CHECK_EQ(r.nvrtc, 0);
}

TEST(a_context_compiles_a_kernel_once)
{
    moe_context_desc desc = cache_desc(NULL);
    moe__instance instances[KERNELS];
    moe__cu_function functions[KERNELS];
    moe_context *ctx;
    make_instances(instances);
    desc.jit.cache_mode = MOE_CACHE_OFF;
    said[0] = 0;
    REQUIRE_OK(moe_context_create(&desc, &ctx, &err));
    for (int i = 0; i < 3; i++) CHECK_OK(moe__jit_load(ctx, instances, KERNELS, functions, &err));
    CHECK_EQ(count(said, "compiled by"), KERNELS);
    moe_context_destroy(ctx);
}

TEST(sha_256_is_sha_256)
{
    static const unsigned char abc[4] = { 0xba, 0x78, 0x16, 0xbf }, empty[4] = { 0xe3, 0xb0, 0xc4, 0x42 };
    unsigned char digest[32], text[1000];
    moe__sha256 sha;
    moe__sha256_of("abc", 3, digest);
    CHECK(memcmp(digest, abc, 4) == 0);
    moe__sha256_of("", 0, digest);
    CHECK(memcmp(digest, empty, 4) == 0);
    memset(text, 'a', sizeof text);
    moe__sha256_init(&sha);
    for (int i = 0; i < 1000; i++) moe__sha256_add(&sha, text, sizeof text);
    moe__sha256_end(&sha, digest);
    CHECK(digest[0] == 0xcd && digest[1] == 0xc7 && digest[31] == 0xd0); // a million times "a"
}

TEST(a_torn_entry_is_compiled_again_and_mended)
{
    static const long lengths[] = { 0, 1, HEADER - 1, HEADER, HEADER + 1, HEADER + 4999 };
    const char *cache = fresh("torn");
    char path[2500];
    EXPECT(load(cache), MOE_OK, KERNELS, 0);
    entry_path(path, cache, 1);
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        CHECK_EQ(truncate(path, lengths[i]), 0);
        EXPECT(load(cache), MOE_OK, 1, KERNELS - 1);
        EXPECT(load(cache), MOE_OK, 0, KERNELS);
    }
    shell("echo more >>'%s'", path);
    EXPECT(load(cache), MOE_OK, 1, KERNELS - 1);
}

TEST(one_changed_byte_is_a_miss)
{
    static const long at[] = { 0, 8, 16, 47, 48, 55, 56, 87, HEADER, HEADER + 4999 };
    const char *cache = fresh("bytes");
    char path[2500];
    EXPECT(load(cache), MOE_OK, KERNELS, 0);
    entry_path(path, cache, 2);
    for (size_t i = 0; i < sizeof at / sizeof at[0]; i++) {
        FILE *file = fopen(path, "r+b");
        int byte;
        REQUIRE(file != NULL);
        fseek(file, at[i], SEEK_SET);
        byte = fgetc(file);
        fseek(file, at[i], SEEK_SET);
        fputc(byte ^ 1, file);
        fclose(file);
        EXPECT(load(cache), MOE_OK, 1, KERNELS - 1);
        EXPECT(load(cache), MOE_OK, 0, KERNELS);
    }
}

TEST(an_entry_of_another_kernel_or_chip_is_a_miss)
{
    const char *cache = fresh("other");
    char path[2500], other[2500], command[6000];
    EXPECT(load(cache), MOE_OK, KERNELS, 0);
    entry_path(path, cache, 0);
    entry_path(other, cache, 1);
    snprintf(command, sizeof command, "cp '%s' '%s'", path, other);
    CHECK_EQ(system(command), 0);
    EXPECT(load(cache), MOE_OK, 1, KERNELS - 1);
    CHECK_CONTAINS(said, "holds another kernel");
    setenv("FAKE_ARCH", "80", 1);
    EXPECT(load(cache), MOE_OK, KERNELS, 0);
    EXPECT(load(cache), MOE_OK, 0, KERNELS);
    unsetenv("FAKE_ARCH");
    EXPECT(load(cache), MOE_OK, 0, KERNELS);
}

TEST(what_the_driver_refuses_is_compiled_again)
{
    const char *cache = fresh("refused");
    char path[2500];
    FILE *file;
    moe__instance instances[KERNELS];
    moe__build build;
    unsigned char header[HEADER];
    EXPECT(load(cache), MOE_OK, KERNELS, 0);
    make_instances(instances);
    moe__build_init(&build, &instances[0], "sm_90a");
    build.image = (unsigned char *)(uintptr_t)"a whole entry of what is no image";
    build.bytes = 33;
    moe__entry_header(&build, header);
    entry_path(path, cache, 0);
    file = fopen(path, "wb");
    REQUIRE(file != NULL);
    fwrite(header, 1, sizeof header, file);
    fwrite(build.image, 1, 33, file);
    fclose(file);
    EXPECT(load(cache), MOE_OK, 1, KERNELS - 1);
    EXPECT(load(cache), MOE_OK, 0, KERNELS);
    setenv("FAKE_IMAGE", "bad", 1);
    EXPECT(load(fresh("refused2")), MOE_ERROR_LOAD, KERNELS, 0);
    CHECK_CONTAINS(err.text, "cuModuleLoadData refuses kernel kernel0 for sm_90a");
    unsetenv("FAKE_IMAGE");
}

TEST(folders_that_others_can_write_are_not_believed)
{
    const char *cache = fresh("open");
    char path[2500];
    EXPECT(load(cache), MOE_OK, KERNELS, 0);
    shell("chmod 777 '%s'", cache);
    EXPECT(load(cache), MOE_OK, KERNELS, 0);
    CHECK_CONTAINS(said, "can be written by other users");
    shell("chmod 700 '%s' && chmod 770 '%s'/v1", cache);
    EXPECT(load(cache), MOE_OK, KERNELS, 0);
    shell("chmod 700 '%s'/v1 && chmod 722 '%s'/v1/*", cache);
    EXPECT(load(cache), MOE_OK, KERNELS, 0);
    shell("chmod 700 '%s'/v1/*", cache);
    EXPECT(load(cache), MOE_OK, 0, KERNELS);
    entry_path(path, cache, 0);
    shell("chmod 666 '%s'", path);
    EXPECT(load(cache), MOE_OK, 1, KERNELS - 1); // and replaced by one of ours
    EXPECT(load(cache), MOE_OK, 0, KERNELS);
}

TEST(links_are_not_followed)
{
    const char *cache = fresh("links"), *linked = fresh("linked");
    char path[2500], command[8000];
    EXPECT(load(cache), MOE_OK, KERNELS, 0);
    snprintf(command, sizeof command, "ln -s '%s' '%s'", cache, linked);
    CHECK_EQ(system(command), 0);
    EXPECT(load(linked), MOE_OK, KERNELS, 0);
    CHECK_CONTAINS(said, "is a link or no folder");
    shell("mv '%s'/v1 '%s'/v0 && ln -s v0 '%s'/v1", cache);
    EXPECT(load(cache), MOE_OK, KERNELS, 0);
    shell("rm '%s'/v1 && mv '%s'/v0 '%s'/v1", cache);
    EXPECT(load(cache), MOE_OK, 0, KERNELS);
    entry_path(path, cache, 0);
    shell("mv '%s' '%s'.real && ln -s '%s'.real '%s'", path);
    EXPECT(load(cache), MOE_OK, 1, KERNELS - 1);
    EXPECT(load(cache), MOE_OK, 0, KERNELS);
}

TEST(what_belongs_to_another_user_is_not_believed)
{
    const char *cache = fresh("foreign");
    char path[2500];
    if (geteuid() != 0) {
        test_skip("only root can give files away");
        return;
    }
    EXPECT(load(cache), MOE_OK, KERNELS, 0);
    entry_path(path, cache, 0);
    shell("chown 65534 '%s'", path);
    EXPECT(load(cache), MOE_OK, 1, KERNELS - 1);
    EXPECT(load(cache), MOE_OK, 0, KERNELS);
    shell("chown 65534 '%s'/v1", cache);
    EXPECT(load(cache), MOE_OK, KERNELS, 0);
    CHECK_CONTAINS(said, "belongs to another user");
}

// Runs in a child as a user without rights, where this program is root; 0: as expected.
static int child_exit(int (*run)(const char *cache), const char *cache)
{
    int status = 0;
    pid_t child;
    fflush(stdout);
    child = fork();
    if (child == 0) {
        if (geteuid() == 0 && (setgid(65534) != 0 || setuid(65534) != 0)) _exit(77);
        _exit(run(cache));
    }
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + status;
}

static int compiles_all_once_said(const char *cache)
{
    load_result r = load(cache);
    return r.code != MOE_OK || r.compiled != KERNELS ? 1 : count(said, "kernels stay in memory") != 1 ? 2 : 0;
}

static int finds_all(const char *cache)
{
    load_result r = load(cache);
    return r.code != MOE_OK || r.cached != KERNELS || r.warnings != 0 ? 1 : 0;
}

TEST(a_folder_that_cannot_be_written_is_read)
{
    char base[64] = "/tmp/moe_cache_test_XXXXXX", cache[96];
    ready();
    REQUIRE(mkdtemp(base) != NULL);
    snprintf(cache, sizeof cache, "%s/cache", base);
    // The unprivileged child must be able to open the libraries.
    snprintf(driver_path, sizeof driver_path, "%s/fake_driver.so", base);
    shell("chmod 755 '%s'", base);
    {
        char command[8000], from[1500];
        fake_path(from, "fake_driver.so");
        snprintf(command, sizeof command, "cp '%s' '%s' && cp '%s' '%s/fake_nvrtc.so'", from, driver_path, nvrtc_path, base);
        CHECK_EQ(system(command), 0);
        snprintf(nvrtc_path, sizeof nvrtc_path, "%s/fake_nvrtc.so", base);
    }
    shell("mkdir -m 755 '%s'", cache);
    if (geteuid() != 0) shell("chmod 555 '%s'", cache);
    CHECK_EQ(child_exit(compiles_all_once_said, cache), 0); // root's, empty, not to be written
    if (geteuid() == 0) {
        EXPECT(load(cache), MOE_OK, KERNELS, 0);
        shell("chmod 755 '%s' '%s'/v1 '%s'/v1/* && chmod 644 '%s'/v1/*/*", cache);
        CHECK_EQ(child_exit(finds_all, cache), 0); // root's files are believed
    }
    shell("chmod 755 '%s'; rm -rf '%s'", base);
    driver_path[0] = 0; // made anew
    ready();
}

static int small_files_only(const char *cache)
{
    struct rlimit limit = { 1000, 1000 };
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0) return 3;
    return compiles_all_once_said(cache);
}

static int run_child(int (*run)(const char *cache), const char *cache)
{
    int status = 0;
    pid_t child;
    fflush(stdout);
    child = fork();
    if (child == 0) _exit(run(cache));
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + status;
}

TEST(a_limit_on_files_ends_no_process)
{
    const char *cache = fresh("limit");
    CHECK_EQ(run_child(small_files_only, cache), 0);
    EXPECT(load(cache), MOE_OK, KERNELS, 0);
}

TEST(modes_and_environment)
{
    const char *cache = fresh("modes");
    moe_context_desc desc = cache_desc(cache);
    moe_context *ctx;
    moe_context_info info;
    desc.jit.cache_mode = MOE_CACHE_READ_ONLY;
    EXPECT(load_desc(&desc), MOE_OK, KERNELS, 0);
    CHECK_EQ(access(cache, F_OK), -1);
    EXPECT(load(cache), MOE_OK, KERNELS, 0);
    EXPECT(load_desc(&desc), MOE_OK, 0, KERNELS);
    desc.jit.cache_mode = MOE_CACHE_OFF;
    EXPECT(load_desc(&desc), MOE_OK, KERNELS, 0);
    desc.jit.cache_mode = 9;
    EXPECT(load_desc(&desc), MOE_ERROR_ARGUMENT, 0, 0);
    CHECK_STR(err.member, "desc.jit.cache_mode");
    setenv("MOE_CACHE_DIR", cache, 1);
    EXPECT(load(NULL), MOE_OK, 0, KERNELS);
    setenv("MOE_CACHE", "off", 1);
    EXPECT(load(NULL), MOE_OK, KERNELS, 0);
    setenv("MOE_CACHE", "never", 1);
    EXPECT(load(NULL), MOE_ERROR_ARGUMENT, 0, 0);
    unsetenv("MOE_CACHE");
    desc = cache_desc(NULL);
    REQUIRE_OK(moe_context_create(&desc, &ctx, &err));
    memset(&info, 0, sizeof info);
    CHECK_OK(moe_context_get_info(ctx, &info, &err));
    CHECK_STR(info.cache_dir, cache);
    CHECK_STR(info.chip, "sm_90a");
    CHECK_EQ(info.driver_version, 12040);
    CHECK_EQ(info.nvrtc_version, 0);
    moe_context_destroy(ctx);
    unsetenv("MOE_CACHE_DIR");
}

TEST(a_seed_folder_serves_and_is_never_written)
{
    const char *seed = fresh("seed"), *cache = fresh("seeded");
    moe_context_desc desc = cache_desc(cache);
    load_result r;
    desc.jit.seed_dir = seed;
    EXPECT(load_desc(&desc), MOE_OK, KERNELS, 0);
    CHECK_EQ(access(seed, F_OK), -1);
    CHECK_EQ(rename(cache, seed), 0);
    r = load_desc(&desc);
    EXPECT(r, MOE_OK, 0, KERNELS);
    CHECK_EQ(r.nvrtc, 0);
    CHECK_EQ(access(cache, F_OK), -1);
}

// ---- several at once ----

static void *load_thread(void *arg)
{
    moe_context_desc desc = cache_desc((const char *)arg);
    moe__instance instances[KERNELS];
    moe__cu_function functions[KERNELS];
    intptr_t bad = 0;
    desc.log = NULL;
    make_instances(instances);
    for (int i = 0; i < 10; i++) {
        moe_context *ctx;
        moe_error error;
        if (moe_context_create(&desc, &ctx, &error) != MOE_OK) return (void *)1;
        if (moe__jit_load(ctx, instances, KERNELS, functions, &error) != MOE_OK) bad = 1;
        moe_context_destroy(ctx);
    }
    return (void *)bad;
}

static int eight_threads(const char *cache)
{
    pthread_t threads[8];
    int bad = 0;
    for (int i = 0; i < 8; i++)
        if (pthread_create(&threads[i], NULL, load_thread, (void *)(uintptr_t)cache) != 0) return 1;
    for (int i = 0; i < 8; i++) {
        void *result;
        pthread_join(threads[i], &result);
        bad |= result != NULL;
    }
    return bad;
}

static int files(const char *cache, const char *pattern)
{
    char command[4000];
    int n = -1;
    FILE *pipe;
    snprintf(command, sizeof command, "find '%s' -name '%s' | wc -l", cache, pattern);
    pipe = popen(command, "r");
    if (pipe == NULL || fscanf(pipe, "%d", &n) != 1) n = -1;
    if (pipe != NULL) pclose(pipe);
    return n;
}

TEST(two_processes_and_eight_threads_at_once)
{
    const char *cache = fresh("crowd");
    int status = 0;
    pid_t child;
    fflush(stdout);
    child = fork();
    if (child == 0) _exit(eight_threads(cache));
    CHECK_EQ(eight_threads(cache), 0);
    waitpid(child, &status, 0);
    CHECK_EQ(status, 0);
    EXPECT(load(cache), MOE_OK, 0, KERNELS);
    CHECK_EQ(files(cache, "*.bin"), KERNELS);
    CHECK_EQ(files(cache, "*.tmp"), 0);
}

TEST(killed_at_any_moment)
{
    const char *cache = fresh("killed");
    for (int i = 0; i < 30; i++) {
        pid_t child;
        fflush(stdout);
        child = fork();
        if (child == 0)
            for (int n = 0;; n++) {
                char path[2500];
                entry_path(path, cache, n % KERNELS);
                unlink(path);
                load(cache);
            }
        usleep((useconds_t)(2000 + 1700 * i));
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
        CHECK_EQ(load(cache).code, MOE_OK);
        EXPECT(load(cache), MOE_OK, 0, KERNELS);
    }
}

// ---- ahead ----

static moe_precompile_desc job_desc(const char *cache, const moe_layer_desc *layer, const char *const *chips)
{
    moe_precompile_desc job;
    ready();
    memset(&job, 0, sizeof job);
    job.chips = chips;
    job.num_chips = 1;
    job.layers = layer;
    job.num_layers = 1;
    job.threads = 2;
    job.log = listen;
    job.jit.cache_dir = cache;
    job.jit.nvrtc_library = nvrtc_path;
    said[0] = 0;
    return job;
}

static moe_jit_progress told[64];

static void tell(void *user, const moe_jit_progress *progress)
{
    int *n = (int *)user;
    if (*n < 64) told[*n] = *progress;
    ++*n;
}

TEST(precompiling_tells_every_kernel_and_skips_what_is_there)
{
    static const char *const chips[] = { "sm_80", "sm_90a" };
    const char *cache = fresh("ahead");
    moe_layer_desc layers[2];
    moe_precompile_desc job = job_desc(cache, layers, chips);
    int n = 0;
    layers[0] = layers[1] = small_layer();
    layers[1].hidden_size = 128; // the same kernels
    job.num_chips = job.num_layers = 2;
    job.progress = tell;
    job.progress_user = &n;
    REQUIRE_OK(moe_jit_precompile(&job, &err));
    REQUIRE(n > 2 && n <= 64);
    CHECK_EQ(files(cache, "*.bin"), n);
    for (int i = 0; i < n; i++) {
        CHECK_EQ(told[i].done, i + 1);
        CHECK_EQ(told[i].total, n);
        CHECK_EQ(told[i].cached, 0);
        CHECK_EQ(told[i].bytes, 5000u);
    }
    n = 0;
    said[0] = 0;
    REQUIRE_OK(moe_jit_precompile(&job, &err));
    for (int i = 0; i < n && i < 64; i++) CHECK_EQ(told[i].cached, 1);
    CHECK_EQ(count(said, "NVRTC"), 0);
    job.jit.cache_mode = MOE_CACHE_READ_ONLY;
    CHECK_ERR(moe_jit_precompile(&job, &err), MOE_ERROR_ARGUMENT, "desc.jit.cache_dir");
}

TEST(plans_find_what_was_precompiled)
{
    static const char *const chip[] = { "sm_90a" };
    const char *cache = fresh("planned");
    moe_layer_desc layer = small_layer();
    moe_precompile_desc job = job_desc(cache, &layer, chip);
    moe_context_desc desc = cache_desc(cache);
    moe_context *ctx;
    moe_plan *plan;
    REQUIRE_OK(moe_jit_precompile(&job, &err));
    REQUIRE_OK(moe_context_create(&desc, &ctx, &err));
    said[0] = 0;
    // The driver made here says 8 bytes for every kernel's arguments, which is found out after the cache has answered.
    CHECK_EQ(moe_plan_create(ctx, &layer, NULL, &plan, &err), MOE_ERROR_LOAD);
    CHECK_CONTAINS(err.text, "takes 8 bytes of arguments");
    moe_context_destroy(ctx);
}

TEST(exported_kernels_are_used_before_the_cache)
{
    static const char *const chip[] = { "sm_90a" }, *const ptx[] = { "compute_90" };
    moe_layer_desc layer = small_layer();
    moe_precompile_desc job = job_desc(fresh("export"), &layer, chip);
    moe__instance instances[KERNELS];
    moe_jit_image images[1];
    moe_context_desc desc = cache_desc(NULL);
    moe__build build;
    char path[1500], key[65];
    moe__text text = moe__text_make(key, sizeof key);
    fake_path(path, "cache_tests/kernels.c");
    CHECK_OK(moe_jit_export(&job, path, "my_kernels", &err));
    CHECK_EQ(files(root, "kernels.c"), 1);
    shell("(cat moe.h; cat '%s'; echo 'int n = my_kernels_count + sizeof my_kernels;') >'%s'.all.c && "
          "${CC:-cc} -w -c -o '%s'.o '%s'.all.c", path);
    CHECK_ERR(moe_jit_export(&job, path, "9lives", &err), MOE_ERROR_ARGUMENT, "name");
    job.chips = ptx;
    CHECK_OK(moe_jit_export(&job, path, "my_ptx", &err));
    make_instances(instances);
    for (int i = 0; i < 2; i++) { // its own image, then PTX
        moe__instance_key(&instances[0], i == 0 ? "sm_90a" : "compute_90", build.key);
        text = moe__text_make(key, sizeof key);
        moe__text_hex(&text, build.key, 32);
        images[0].key = key;
        images[0].data = "IMAGE";
        images[0].bytes = 5;
        desc.jit.images = images;
        desc.jit.num_images = 1;
        desc.jit.cache_mode = MOE_CACHE_OFF;
        EXPECT(load_desc(&desc), MOE_OK, KERNELS - 1, 1);
    }
}

TEST(trimming_keeps_what_was_written_last)
{
    const char *cache = fresh("trim");
    char path[2500];
    EXPECT(load(cache), MOE_OK, KERNELS, 0);
    for (int i = 0; i < KERNELS; i++) {
        char command[3000];
        entry_path(path, cache, i);
        snprintf(command, sizeof command, "touch -d '2020-01-0%d' '%s'", 3 - i, path);
        CHECK_EQ(system(command), 0);
    }
    snprintf(path + strlen(path), 16, ".1.0.tmp");
    shell("echo torn >'%s' && touch -d 2020-01-01 '%s'", path);
    CHECK_OK(moe_cache_trim(cache, 3 * (HEADER + 5000), &err));
    CHECK_EQ(files(cache, "*.bin"), 3);
    CHECK_EQ(files(cache, "*.tmp"), 0);
    CHECK_OK(moe_cache_trim(cache, 3 * (HEADER + 5000) - 1, &err));
    CHECK_EQ(files(cache, "*.bin"), 2);
    EXPECT(load(cache), MOE_OK, 1, 2);
    CHECK_CONTAINS(said, "kernel2 for sm_90a: compiled"); // the oldest
    CHECK_OK(moe_cache_trim(cache, 0, &err));
    CHECK_EQ(files(cache, "*"), 2); // the folder and v1
    CHECK_OK(moe_cache_trim(fresh("trim_nothing"), 0, &err));
}

// ---- memory ----

typedef struct purse {
    int left, alive;
} purse;

static void *purse_alloc(void *user, size_t size, size_t align)
{
    purse *p = (purse *)user;
    if (p->left-- <= 0) return NULL;
    p->alive++;
    return moe__default_alloc(NULL, size, align);
}

static void purse_free(void *user, void *ptr, size_t size)
{
    ((purse *)user)->alive--;
    moe__default_free(NULL, ptr, size);
}

TEST(every_allocation_may_fail)
{
    const char *cache = fresh("memory");
    for (int warm = 0; warm < 2; warm++) {
        int32_t code = MOE_ERROR_MEMORY;
        int n = 0;
        for (; code != MOE_OK && n < 200; n++) {
            moe_context_desc desc = cache_desc(cache);
            purse p = { 0, 0 };
            p.left = n;
            desc.allocator.alloc = purse_alloc;
            desc.allocator.free = purse_free;
            desc.allocator.user = &p;
            if (!warm) shell("rm -rf '%s'", cache);
            code = load_desc(&desc).code;
            CHECK(code == MOE_OK || code == MOE_ERROR_MEMORY);
            CHECK_EQ(p.alive, 0);
        }
        CHECK_EQ(code, MOE_OK);
        CHECK(n > 5);
    }
}

TEST_MAIN(T(a_warm_start_compiles_nothing_and_opens_no_nvrtc) T(a_context_compiles_a_kernel_once) T(sha_256_is_sha_256)
          T(a_torn_entry_is_compiled_again_and_mended) T(one_changed_byte_is_a_miss)
          T(an_entry_of_another_kernel_or_chip_is_a_miss) T(what_the_driver_refuses_is_compiled_again)
          T(folders_that_others_can_write_are_not_believed) T(links_are_not_followed)
          T(what_belongs_to_another_user_is_not_believed) T(a_folder_that_cannot_be_written_is_read)
          T(a_limit_on_files_ends_no_process) T(modes_and_environment) T(a_seed_folder_serves_and_is_never_written)
          T(two_processes_and_eight_threads_at_once) T(killed_at_any_moment)
          T(precompiling_tells_every_kernel_and_skips_what_is_there) T(plans_find_what_was_precompiled)
          T(exported_kernels_are_used_before_the_cache) T(trimming_keeps_what_was_written_last)
          T(every_allocation_may_fail))
#else
TEST_MAIN() // the libraries that the tests open are made on Linux
#endif
