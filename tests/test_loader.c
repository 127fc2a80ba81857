// Opening the CUDA driver and NVRTC: every way in which a library is not what it should be has a message of its own
// that says what was tried. No GPU: libraries are made here with the C compiler, small ones that say what a test wants.
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"

#if defined(__linux__) && !defined(MOE_NO_CUDA)
#include "fake_cuda.h"

#include <sys/wait.h>

static moe_context_desc cuda_desc(void)
{
    moe_context_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.backend = MOE_BACKEND_CUDA;
    desc.log = listen;
    desc.threads = 2;
    desc.jit.cache_mode = MOE_CACHE_OFF;
    said[0] = 0;
    return desc;
}

static void refused(const char *path, int32_t code, const char *part)
{
    moe_context_desc desc = cuda_desc();
    moe_context *ctx = (moe_context *)(uintptr_t)64;
    desc.jit.cuda_library = path;
    CHECK_ERR(moe_context_create(&desc, &ctx, &err), code, NULL);
    CHECK(ctx == NULL);
    CHECK_CONTAINS(err.text, part);
}

static const char version_12[] = "int cuDriverGetVersion(int *v) { *v = 12020; return 0; }\n";

TEST(a_missing_driver_is_listed_by_path)
{
    refused("/nonexistent/libcuda.so.1", MOE_ERROR_DRIVER, "not there: /nonexistent/libcuda.so.1");
    CHECK_CONTAINS(said, "/nonexistent/libcuda.so.1 is not there");
}

TEST(library_paths_are_absolute)
{
    refused("libcuda.so.1", MOE_ERROR_ARGUMENT, "absolute");
    CHECK_STR(err.member, "desc.jit.cuda_library");
    setenv("MOE_CUDA_LIB", "build/libcuda.so.1", 1);
    refused(NULL, MOE_ERROR_ARGUMENT, "absolute");
    CHECK_STR(err.member, "MOE_CUDA_LIB");
    unsetenv("MOE_CUDA_LIB");
}

TEST(the_environment_names_a_library)
{
    setenv("MOE_CUDA_LIB", "/nonexistent/of/environment", 1);
    refused(NULL, MOE_ERROR_DRIVER, "/nonexistent/of/environment");
    refused("/nonexistent/of/desc", MOE_ERROR_DRIVER, "/nonexistent/of/desc");
    unsetenv("MOE_CUDA_LIB");
}

TEST(a_file_that_is_no_library_says_so)
{
    char path[1500];
    fake_path(path, "text.so");
    write_text(path, "no library");
    refused(path, MOE_ERROR_DRIVER, "cannot be loaded");
}

TEST(the_stub_of_the_toolkit_is_known)
{
    static const char *const without[] = { "cuInit", NULL };
    refused(driver("stub.so", "int cuInit(unsigned f) { return 34; }\n", without), MOE_ERROR_DRIVER, "stub");
}

TEST(no_device_is_told_with_the_drivers_name_for_it)
{
    static const char *const without[] = { "cuInit", "cuGetErrorName", NULL };
    refused(driver("nodevice.so",
                   "int cuInit(unsigned f) { return 100; }\n"
                   "int cuGetErrorName(int r, const char **n) { *n = \"CUDA_ERROR_NO_DEVICE\"; return 0; }\n",
                   without),
            MOE_ERROR_DRIVER, "CUDA_ERROR_NO_DEVICE (100) in cuInit: no GPU is visible");
}

TEST(an_old_driver_is_told_with_its_version)
{
    static const char *const without[] = { "cuDriverGetVersion", NULL };
    refused(driver("old.so", "int cuDriverGetVersion(int *v) { *v = 11080; return 0; }\n", without), MOE_ERROR_DRIVER,
            "is a driver for CUDA 11.8: 12.0 or later");
}

TEST(a_missing_function_is_named)
{
    static const char *const without[] = { "cuLaunchKernelEx", "cuDriverGetVersion", NULL };
    refused(driver("nolaunch.so", version_12, without), MOE_ERROR_DRIVER, "has no cuLaunchKernelEx");
}

TEST(functions_of_later_versions_may_be_missing)
{
    static const char *const without[] = { "cuFuncGetParamInfo", "cuFuncLoad", "cuDriverGetVersion", NULL };
    refused(driver("noinfo.so", version_12, without), MOE_ERROR_DRIVER, "sees 0 CUDA devices");
    CHECK_STR(err.member, "desc.device");
}

TEST(a_device_number_past_the_last_is_refused)
{
    static const char *const without[] = { "cuDeviceGetCount", "cuDriverGetVersion", NULL };
    char more[256];
    moe_context_desc desc = cuda_desc();
    moe_context *ctx;
    snprintf(more, sizeof more, "%sint cuDeviceGetCount(int *n) { *n = 2; return 0; }\n", version_12);
    desc.jit.cuda_library = driver("two.so", more, without);
    desc.device = 2;
    CHECK_ERR(moe_context_create(&desc, &ctx, &err), MOE_ERROR_ARGUMENT, "desc.device");
    CHECK_CONTAINS(err.text, "sees 2 CUDA devices");
}

TEST(an_old_chip_is_refused)
{
    static const char *const without[] = { "cuDeviceGetCount", "cuDriverGetVersion", "cuDeviceGetAttribute",
                                           "cuDeviceGetName", NULL };
    char more[512];
    snprintf(more, sizeof more,
             "%sint cuDeviceGetCount(int *n) { *n = 1; return 0; }\n"
             "int cuDeviceGetName(char *n, int s, int d) { n[0] = 'T'; n[1] = 0; return 0; }\n"
             "int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 7 : a == 76 ? 5 : 1; return 0; }\n",
             version_12);
    refused(driver("turing.so", more, without), MOE_ERROR_UNSUPPORTED, "compute capability 7.5: 8.0");
}

// ---- NVRTC ----

static void compile_refused(const char *path, const char *chip, int32_t code, const char *part)
{
    moe_precompile_desc job;
    moe_layer_desc layer = small_layer();
    memset(&job, 0, sizeof job);
    said[0] = 0;
    job.chips = &chip;
    job.num_chips = 1;
    job.layers = &layer;
    job.num_layers = 1;
    job.threads = 2;
    job.log = listen;
    job.jit.nvrtc_library = path;
    job.jit.cache_dir = test_temp("loader_cache");
    CHECK_ERR(moe_jit_precompile(&job, &err), code, NULL);
    CHECK_CONTAINS(err.text, part);
}

TEST(nvrtc_has_messages_of_its_own)
{
    compile_refused("/nonexistent/libnvrtc.so.13", "sm_90a", MOE_ERROR_NVRTC, "not there: /nonexistent/libnvrtc.so.13");
    compile_refused("libnvrtc.so.13", "sm_90a", MOE_ERROR_ARGUMENT, "absolute");
    compile_refused(nvrtc("half.so", 12, 4, "80, 90", 0), "sm_90a", MOE_ERROR_NVRTC, "has no nvrtcGetCUBIN");
    compile_refused(nvrtc("old_nvrtc.so", 11, 8, "80, 90", 1), "sm_90a", MOE_ERROR_NVRTC, "is NVRTC 11.8: 12.0");
    compile_refused(nvrtc("hopper.so", 12, 4, "80, 90", 1), "sm_120f", MOE_ERROR_NVRTC,
                    "is NVRTC 12.4, which cannot compile for compute capability 12.0");
    compile_refused(nvrtc("no_family.so", 12, 8, "80, 90, 100", 1), "sm_100f", MOE_ERROR_NVRTC, "NVRTC 12.8");
}

// A library that alone knows its chip lies at `file` below the folder that `variable` names: a new one each time, as
// libraries stay open.
static void found_below(const char *variable, const char *file, int major)
{
    static int number;
    char prefix[32], name[256], path[1500], command[1600], words[64];
    snprintf(prefix, sizeof prefix, "prefix%d", number++);
    snprintf(name, sizeof name, "%s/%s", prefix, file);
    fake_path(path, name);
    *strrchr(path, '/') = 0;
    snprintf(command, sizeof command, "mkdir -p '%s'", path);
    if (system(command) != 0) test_fail(__FILE__, __LINE__, command);
    nvrtc(name, major, 9, "130", 1);
    fake_path(path, prefix);
    setenv(variable, path, 1);
    snprintf(words, sizeof words, "does not compile with NVRTC %d.9", major);
    compile_refused(NULL, "sm_130f", MOE_ERROR_COMPILE, words);
    CHECK_CONTAINS(said, name);
    unsetenv(variable);
}

TEST(toolkits_and_wheels_are_searched_for_nvrtc)
{
    unsetenv("MOE_NVRTC_LIB");
    found_below("CUDA_HOME", "lib64/libnvrtc.so.13", 13);
    found_below("CUDA_HOME", "lib/libnvrtc.so.13", 13);
    found_below("CUDA_PATH", "lib64/libnvrtc.so.12", 12);
    found_below("CONDA_PREFIX", "lib/libnvrtc.so.12", 12);
    found_below("VIRTUAL_ENV", "lib/python3.11/site-packages/nvidia/cu13/lib/libnvrtc.so.13", 13);
    found_below("VIRTUAL_ENV", "lib/python3.8/dist-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12", 12);
}

TEST(the_compilers_words_are_in_the_message_and_the_log)
{
    compile_refused(nvrtc("fails.so", 12, 4, "80, 90", 1), "sm_90a", MOE_ERROR_COMPILE, "NVRTC_ERROR_TEST: line 1\nline 2");
    CHECK_CONTAINS(said, "line 2\n");
    CHECK_CONTAINS(said, "NVRTC 12.4: ");
}

TEST(chips_are_checked_by_name)
{
    compile_refused(NULL, "sm_90", MOE_ERROR_ARGUMENT, "\"sm_90\"");
    compile_refused(NULL, "sm_75", MOE_ERROR_ARGUMENT, "\"sm_75\"");
    compile_refused(NULL, "compute_90", MOE_ERROR_ARGUMENT, "\"compute_90\"");
    compile_refused(NULL, "gfx942", MOE_ERROR_ARGUMENT, "\"gfx942\"");
}

#if !defined(TEST_SANITIZED)
TEST(a_process_with_more_rights_than_its_user_ignores_the_environment)
{
    pid_t child;
    int status = 0;
    if (geteuid() != 0) {
        test_skip("only root can change its user");
        return;
    }
    setenv("MOE_CUDA_LIB", "/nonexistent/of/environment", 1);
    CHECK_STR(moe__env("MOE_CUDA_LIB"), "/nonexistent/of/environment");
    child = fork();
    if (child == 0) _exit(seteuid(65534) == 0 && moe__env("MOE_CUDA_LIB") == NULL ? 0 : 1);
    waitpid(child, &status, 0);
    CHECK_EQ(status, 0);
    unsetenv("MOE_CUDA_LIB");
}
#endif

TEST_MAIN(T(a_missing_driver_is_listed_by_path) T(library_paths_are_absolute) T(the_environment_names_a_library)
          T(a_file_that_is_no_library_says_so) T(the_stub_of_the_toolkit_is_known)
          T(no_device_is_told_with_the_drivers_name_for_it) T(an_old_driver_is_told_with_its_version)
          T(a_missing_function_is_named) T(functions_of_later_versions_may_be_missing)
          T(a_device_number_past_the_last_is_refused) T(an_old_chip_is_refused) T(nvrtc_has_messages_of_its_own)
          T(toolkits_and_wheels_are_searched_for_nvrtc)
          T(the_compilers_words_are_in_the_message_and_the_log) T(chips_are_checked_by_name)
#if !defined(TEST_SANITIZED)
          T(a_process_with_more_rights_than_its_user_ignores_the_environment)
#endif
)
#else
TEST_MAIN() // the libraries that the tests open are made on Linux
#endif
