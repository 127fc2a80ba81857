// test_driver.c - the emulated driver and NVRTC themselves: order, events, capture, failures, leaks, the log
//
// cc -std=gnu99 -o build/emu/test_driver tests/emu/test_driver.c -ldl -lpthread; runs in the repository's root
#include "cuda_abi.h"
#include "../test.h"

#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

typedef struct nvrtc_program *nvrtcProgram;

// ---- the two libraries ----------------------------------------------------------------------------------------------

#define DRIVER(X) \
    X(cuInit, "", (unsigned)) \
    X(cuGetProcAddress, "_v2", (const char *, void **, int, uint64_t, int *)) \
    X(cuDriverGetVersion, "", (int *)) \
    X(cuDeviceGetCount, "", (int *)) \
    X(cuDeviceGetAttribute, "", (int *, int, CUdevice)) \
    X(cuDevicePrimaryCtxRetain, "", (CUcontext *, CUdevice)) \
    X(cuDevicePrimaryCtxRelease, "_v2", (CUdevice)) \
    X(cuDevicePrimaryCtxReset, "_v2", (CUdevice)) \
    X(cuCtxSetCurrent, "", (CUcontext)) \
    X(cuCtxSynchronize, "", (void)) \
    X(cuMemAlloc, "_v2", (CUdeviceptr *, size_t)) \
    X(cuMemFree, "_v2", (CUdeviceptr)) \
    X(cuMemFreeAsync, "", (CUdeviceptr, CUstream)) \
    X(cuMemHostAlloc, "", (void **, size_t, unsigned)) \
    X(cuMemFreeHost, "", (void *)) \
    X(cuMemHostRegister, "_v2", (void *, size_t, unsigned)) \
    X(cuMemHostGetDevicePointer, "_v2", (CUdeviceptr *, void *, unsigned)) \
    X(cuMemHostUnregister, "", (void *)) \
    X(cuMemcpyHtoD, "_v2", (CUdeviceptr, const void *, size_t)) \
    X(cuMemcpyDtoH, "_v2", (void *, CUdeviceptr, size_t)) \
    X(cuMemcpyHtoDAsync, "_v2", (CUdeviceptr, const void *, size_t, CUstream)) \
    X(cuMemcpyDtoHAsync, "_v2", (void *, CUdeviceptr, size_t, CUstream)) \
    X(cuMemsetD32Async, "", (CUdeviceptr, unsigned, size_t, CUstream)) \
    X(cuPointerGetAttribute, "", (void *, int, CUdeviceptr)) \
    X(cuModuleLoadData, "", (CUmodule *, const void *)) \
    X(cuModuleUnload, "", (CUmodule)) \
    X(cuModuleGetFunction, "", (CUfunction *, CUmodule, const char *)) \
    X(cuFuncSetAttribute, "", (CUfunction, int, int)) \
    X(cuFuncGetParamInfo, "", (CUfunction, size_t, size_t *, size_t *)) \
    X(cuLaunchKernelEx, "", (const CUlaunchConfig *, CUfunction, void **, void **)) \
    X(cuLaunchHostFunc, "", (CUstream, CUhostFn, void *)) \
    X(cuStreamCreate, "", (CUstream *, unsigned)) \
    X(cuStreamDestroy, "_v2", (CUstream)) \
    X(cuStreamSynchronize, "", (CUstream)) \
    X(cuStreamQuery, "", (CUstream)) \
    X(cuStreamWaitEvent, "", (CUstream, CUevent, unsigned)) \
    X(cuEventCreate, "", (CUevent *, unsigned)) \
    X(cuEventDestroy, "_v2", (CUevent)) \
    X(cuEventRecord, "", (CUevent, CUstream)) \
    X(cuEventQuery, "", (CUevent)) \
    X(cuEventSynchronize, "", (CUevent)) \
    X(cuEventElapsedTime, "", (float *, CUevent, CUevent)) \
    X(cuStreamBeginCapture, "_v2", (CUstream, int)) \
    X(cuStreamEndCapture, "", (CUstream, CUgraph *)) \
    X(cuStreamIsCapturing, "", (CUstream, int *)) \
    X(cuThreadExchangeStreamCaptureMode, "", (int *)) \
    X(cuGraphGetNodes, "", (CUgraph, CUgraphNode *, size_t *)) \
    X(cuGraphInstantiate, "WithFlags", (CUgraphExec *, CUgraph, unsigned long long)) \
    X(cuGraphLaunch, "", (CUgraphExec, CUstream)) \
    X(cuGraphExecUpdate, "_v2", (CUgraphExec, CUgraph, CUgraphExecUpdateResultInfo *)) \
    X(cuGraphDestroy, "", (CUgraph)) \
    X(cuGraphExecDestroy, "", (CUgraphExec)) \
    X(cuTensorMapEncodeTiled, "", (CUtensorMap *, int, uint32_t, void *, const uint64_t *, const uint64_t *, \
                                   const uint32_t *, const uint32_t *, int, int, int, int)) \
    X(emu_leaks, "", (char *, size_t)) \
    X(emu_log_begin, "", (void))
#define NVRTC(X) \
    X(nvrtcVersion, "", (int *, int *)) \
    X(nvrtcCreateProgram, "", (nvrtcProgram *, const char *, const char *, int, void *, void *)) \
    X(nvrtcCompileProgram, "", (nvrtcProgram, int, const char *const *)) \
    X(nvrtcGetCUBINSize, "", (nvrtcProgram, size_t *)) \
    X(nvrtcGetCUBIN, "", (nvrtcProgram, char *)) \
    X(nvrtcGetPTXSize, "", (nvrtcProgram, size_t *)) \
    X(nvrtcGetPTX, "", (nvrtcProgram, char *)) \
    X(nvrtcGetProgramLogSize, "", (nvrtcProgram, size_t *)) \
    X(nvrtcGetProgramLog, "", (nvrtcProgram, char *)) \
    X(nvrtcDestroyProgram, "", (nvrtcProgram *))

#define POINTER(name, suffix, arguments) int (*name) arguments;
static struct { DRIVER(POINTER) NVRTC(POINTER) const char *(*log_end)(void); } cu;

static void find(void *library, const char *name, void *pointer)
{
    void *symbol = dlsym(library, name);
    memcpy(pointer, &symbol, sizeof symbol);
    if (symbol == NULL) {
        printf("no %s\n", name);
        exit(1);
    }
}

static void open_libraries(void)
{
    void *driver = dlopen("build/emu/libcuda.so.1", RTLD_NOW), *nvrtc = dlopen("build/emu/libnvrtc.so.13", RTLD_NOW);
    if (driver == NULL || nvrtc == NULL) {
        printf("%s\n", dlerror());
        exit(1);
    }
#define FIND_DRIVER(name, suffix, arguments) find(driver, #name suffix, &cu.name);
#define FIND_NVRTC(name, suffix, arguments) find(nvrtc, #name suffix, &cu.name);
    DRIVER(FIND_DRIVER)
    NVRTC(FIND_NVRTC)
    find(driver, "emu_log_end", &cu.log_end);
}

// ---- programs -------------------------------------------------------------------------------------------------------

// add: p[i] += FACTOR * value, once by thread i of the grid. twice: p[i] = 2 p[i], behind the grid in front of it.
// box: the 8 x 4 words of the map from column x, row y on.
static const char kernels[] =
    "struct test_args { u32 *p; u32 count, value; };\n"
    "MOE_ENTRY(add, test_args, 64, 1)\n"
    "{\n"
    "    u32 i = cta() * ntid() + tid();\n"
    "    if (i < a.count) a.p[i] += FACTOR * a.value;\n"
    "}\n"
    "MOE_ENTRY(twice, test_args, 64, 1)\n"
    "{\n"
    "    u32 i = cta() * ntid() + tid();\n"
    "    grid_wait();\n"
    "    if (i < a.count) a.p[i] *= 2;\n"
    "}\n"
    "struct box_args { tensor_map map; u32 *out; i32 x, y; };\n"
    "MOE_ENTRY(box, box_args, 32, 1)\n"
    "{\n"
    "    u64 *bar = (u64 *)(smem() + 128);\n"
    "    if (tid() == 0) {\n"
    "        mbar_init(bar, 1);\n"
    "        fence_mbar_init();\n"
    "        mbar_arrive_expect_tx(bar, 128);\n"
    "        tma_load_2d(smem(), &a.map, a.x, a.y, bar);\n"
    "    }\n"
    "    warp_sync();\n"
    "    mbar_wait(bar, 0);\n"
    "    a.out[tid()] = ((const u32 *)smem())[tid()];\n"
    "}\n";
typedef struct test_args { CUdeviceptr p; uint32_t count, value; } test_args;
typedef struct box_args { CUtensorMap map; CUdeviceptr out; int32_t x, y; } box_args;

typedef struct image { char *bytes; size_t size; } image;

static char *read_text(const char *path)
{
    FILE *f = fopen(path, "rb");
    char *text = (char *)calloc(1, 1 << 20);
    if (f == NULL || text == NULL || fread(text, 1, (1 << 20) - 1, f) == 0) printf("cannot read %s\n", path);
    if (f != NULL) fclose(f);
    return text;
}

// The kernel text with the two kernels behind it, compiled for a chip; bytes NULL: refused, *result says how.
static image compile(const char *chip, const char *define, int want_ptx, int *result)
{
    char option[64], *text = read_text("moe_kernels.cu.inc");
    const char *options[] = { option, "--std=c++17", "--fmad=false", "-DMOE_K_NONE", define };
    nvrtcProgram p;
    image made = { NULL, 0 };
    snprintf(option, sizeof option, "--gpu-architecture=%s", chip);
    strcat(text, kernels);
    CHECK_EQ(cu.nvrtcCreateProgram(&p, text, "test.cu", 0, NULL, NULL), 0);
    *result = cu.nvrtcCompileProgram(p, 5, options);
    if (*result == 0) {
        CHECK_EQ((want_ptx ? cu.nvrtcGetPTXSize : cu.nvrtcGetCUBINSize)(p, &made.size), 0);
        made.bytes = (char *)malloc(made.size);
        CHECK_EQ((want_ptx ? cu.nvrtcGetPTX : cu.nvrtcGetCUBIN)(p, made.bytes), 0);
    } else if (*result == 6) {
        size_t size;
        CHECK_EQ(cu.nvrtcGetProgramLogSize(p, &size), 0);
        made.size = size;
        char *log = (char *)malloc(size);
        CHECK_EQ(cu.nvrtcGetProgramLog(p, log), 0);
        printf("%s\n", log);
        free(log);
    }
    CHECK_EQ(cu.nvrtcDestroyProgram(&p), 0);
    free(text);
    return made;
}

static image sm90(void)
{
    static image made;
    int result = 0;
    if (made.bytes == NULL) made = compile("sm_90a", "-DFACTOR=1", 0, &result);
    CHECK_EQ(result, 0);
    return made;
}

// ---- one device, opened by each test --------------------------------------------------------------------------------

static struct {
    CUcontext ctx;
    CUmodule module;
    CUfunction add, twice;
    CUdeviceptr p;
} dev;
enum { COUNT = 100 };

static void open_device(void)
{
    CHECK_EQ(cu.cuInit(0), 0);
    CHECK_EQ(cu.cuDevicePrimaryCtxRetain(&dev.ctx, 0), 0);
    CHECK_EQ(cu.cuCtxSetCurrent(dev.ctx), 0);
    CHECK_EQ(cu.cuModuleLoadData(&dev.module, sm90().bytes), 0);
    CHECK_EQ(cu.cuModuleGetFunction(&dev.add, dev.module, "add"), 0);
    CHECK_EQ(cu.cuModuleGetFunction(&dev.twice, dev.module, "twice"), 0);
    CHECK_EQ(cu.cuMemAlloc(&dev.p, COUNT * 4), 0);
    CHECK_EQ(cu.cuMemsetD32Async(dev.p, 1, COUNT, NULL), 0);
    CHECK_EQ(cu.cuCtxSynchronize(), 0);
}

static void close_device(void)
{
    char text[1024];
    CHECK_EQ(cu.cuMemFree(dev.p), 0);
    CHECK_EQ(cu.cuModuleUnload(dev.module), 0);
    CHECK_EQ(cu.cuDevicePrimaryCtxRelease(0), 0);
    CHECK_EQ(cu.cuCtxSetCurrent(NULL), 0);
    if (cu.emu_leaks(text, sizeof text) != 0) test_fail2(__FILE__, __LINE__, "leaked", text);
}

// The device after a failure: everything of it is gone, and remembered as leaked once.
static void reset_device(void)
{
    CHECK_EQ(cu.cuDevicePrimaryCtxReset(0), 0);
    CHECK_EQ(cu.cuCtxSetCurrent(NULL), 0);
    CHECK(cu.emu_leaks(NULL, 0) > 0);
    CHECK_EQ(cu.emu_leaks(NULL, 0), 0);
}

static int launch(CUfunction f, CUstream s, CUdeviceptr p, uint32_t value, int programmatic)
{
    test_args args = { p, COUNT, value };
    void *params[] = { &args };
    CUlaunchAttribute attribute;
    CUlaunchConfig config = { 2, 1, 1, 64, 1, 1, 0, s, &attribute, programmatic ? 1 : 0 };
    memset(&attribute, 0, sizeof attribute);
    attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
    int result = cu.cuLaunchKernelEx(&config, f, params, NULL);
    memset(&args, 0xff, sizeof args); // the launch has copied them
    return result;
}

static int add(CUstream s, uint32_t value) { return launch(dev.add, s, dev.p, value, 0); }

// Every element is `value`.
static void check_all(uint32_t value)
{
    uint32_t out[COUNT];
    CHECK_EQ(cu.cuMemcpyDtoH(out, dev.p, sizeof out), 0);
    for (int i = 0; i < COUNT; i++)
        if (out[i] != value) {
            CHECK_EQ(out[i], value);
            return;
        }
}

static CUstream stream(unsigned flags)
{
    CUstream s = NULL;
    CHECK_EQ(cu.cuStreamCreate(&s, flags), 0);
    return s;
}

// The failure is expected: its report goes to a file of this test, not to the screen's readers.
static char *report_path(void)
{
    static char path[1100];
    snprintf(path, sizeof path, "%s", test_temp("test_driver.report"));
    unlink(path);
    setenv("MOE_EMU_REPORT", path, 1);
    return path;
}

// ---- start ----------------------------------------------------------------------------------------------------------

TEST(devices_are_what_the_environment_says)
{
    int count, value, version;
    CUcontext ctx;
    setenv("MOE_EMU_DEVICES", "80,90", 1);
    setenv("MOE_EMU_DRIVER_VERSION", "12040", 1);
    CHECK_EQ(cu.cuInit(0), 0);
    CHECK_EQ(cu.cuDeviceGetCount(&count), 0);
    CHECK_EQ(count, 2);
    CHECK_EQ(cu.cuDriverGetVersion(&version), 0);
    CHECK_EQ(version, 12040);
    CHECK_EQ(cu.cuDeviceGetAttribute(&value, 97, 0), 0);
    CHECK_EQ(value, 163 * 1024);
    CHECK_EQ(cu.cuDeviceGetAttribute(&value, 97, 1), 0);
    CHECK_EQ(value, 227 * 1024);
    CHECK_EQ(cu.cuDeviceGetAttribute(&value, 120, 0), 0);
    CHECK_EQ(value, 0);
    CHECK_EQ(cu.cuDevicePrimaryCtxRetain(&ctx, 2), CUDA_ERROR_INVALID_DEVICE);
    setenv("MOE_EMU_DEVICES", "none", 1);
    CHECK_EQ(cu.cuInit(0), CUDA_ERROR_NO_DEVICE);
    unsetenv("MOE_EMU_DEVICES");
    unsetenv("MOE_EMU_DRIVER_VERSION");
    CHECK_EQ(cu.cuInit(0), 0);
}

TEST(symbols_newer_than_the_driver_are_not_found)
{
    void *f = NULL;
    int status;
    CHECK_EQ(cu.cuGetProcAddress("cuMemAlloc", &f, 12000, 0, &status), 0);
    CHECK_EQ(status, 0);
    CHECK(f != NULL && memcmp(&f, &cu.cuMemAlloc, sizeof f) == 0);
    CHECK_EQ(cu.cuGetProcAddress("cuFuncGetParamInfo", &f, 12000, 0, &status), 0);
    CHECK_EQ(status, 2);
    CHECK(f == NULL);
    CHECK_EQ(cu.cuGetProcAddress("cuTensorMapEncodeTiled", &f, 12000, 0, &status), 0);
    CHECK(f != NULL && memcmp(&f, &cu.cuTensorMapEncodeTiled, sizeof f) == 0);
    CHECK_EQ(cu.cuGetProcAddress("cuNoSuchFunction", &f, 12000, 0, &status), 0);
    CHECK_EQ(status, 1);
    CHECK_EQ(cu.cuGetProcAddress("cuMemAlloc", &f, 99000, 0, &status), CUDA_ERROR_INVALID_VALUE);
    setenv("MOE_EMU_MISSING", "cuLaunchKernelEx,cuMemAlloc", 1);
    CHECK_EQ(cu.cuInit(0), 0);
    CHECK_EQ(cu.cuGetProcAddress("cuMemAlloc", &f, 12000, 0, &status), 0);
    CHECK_EQ(status, 1);
    CHECK(f == NULL);
    unsetenv("MOE_EMU_MISSING");
    CHECK_EQ(cu.cuInit(0), 0);
}

TEST(injected_faults_hit_the_call_they_name)
{
    CUdeviceptr p, q;
    setenv("MOE_EMU_FAIL", "cuMemAlloc:2=2,cuStreamCreate:0=999", 1);
    open_device(); // its own allocation is the first
    CUstream s;
    CHECK_EQ(cu.cuMemAlloc(&p, 64), CUDA_ERROR_OUT_OF_MEMORY);
    CHECK_EQ(cu.cuMemAlloc(&q, 64), 0);
    CHECK_EQ(cu.cuStreamCreate(&s, 0), CUDA_ERROR_UNKNOWN);
    CHECK_EQ(cu.cuStreamCreate(&s, 0), CUDA_ERROR_UNKNOWN);
    unsetenv("MOE_EMU_FAIL");
    CHECK_EQ(cu.cuInit(0), 0);
    CHECK_EQ(cu.cuMemFree(q), 0);
    close_device();
}

TEST(memory_ends)
{
    CUdeviceptr p;
    setenv("MOE_EMU_MEMORY", "1048576", 1);
    open_device();
    CHECK_EQ(cu.cuMemAlloc(&p, 1048576), CUDA_ERROR_OUT_OF_MEMORY);
    CHECK_EQ(cu.cuMemAlloc(&p, 1000000), 0);
    CHECK_EQ(cu.cuMemFree(p), 0);
    CHECK_EQ(cu.cuMemFree(p), CUDA_ERROR_INVALID_VALUE);
    close_device();
    unsetenv("MOE_EMU_MEMORY");
}

TEST(pointers_say_what_they_are)
{
    unsigned type = 0;
    int here = 0;
    void *pinned;
    CUdeviceptr p = 0;
    open_device();
    CHECK_EQ(cu.cuPointerGetAttribute(&type, 2, dev.p + 12), 0);
    CHECK_EQ(type, CU_MEMORYTYPE_DEVICE);
    CHECK_EQ(cu.cuPointerGetAttribute(&type, 2, (CUdeviceptr)(uintptr_t)&here), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(cu.cuMemHostAlloc(&pinned, 64, 0), 0);
    CHECK_EQ(cu.cuPointerGetAttribute(&type, 2, (CUdeviceptr)(uintptr_t)pinned), 0);
    CHECK_EQ(type, CU_MEMORYTYPE_HOST);
    CHECK_EQ(cu.cuMemHostGetDevicePointer(&p, (char *)pinned + 8, 0), 0);
    CHECK_EQ(p, (CUdeviceptr)(uintptr_t)pinned + 8);
    CHECK_EQ(cu.cuMemFreeHost(pinned), 0);
    CHECK_EQ(cu.cuMemHostGetDevicePointer(&p, &here, 0), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(cu.cuMemHostGetDevicePointer(&p, (void *)(uintptr_t)dev.p, 0), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(cu.cuMemHostRegister(&here, sizeof here, 0), 0);
    CHECK_EQ(cu.cuMemHostGetDevicePointer(&p, &here, 0), 0);
    CHECK_EQ(cu.cuMemHostRegister(&here, sizeof here, 0), CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
    CHECK_EQ(cu.cuMemHostUnregister(&here), 0);
    CHECK_EQ(cu.cuMemHostUnregister(&here), CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
    close_device();
}

// ---- images ---------------------------------------------------------------------------------------------------------

TEST(images_run_on_their_chip_alone)
{
    CUmodule m;
    int result;
    image other = compile("sm_80", "-DFACTOR=1", 0, &result);
    CHECK_EQ(result, 0);
    open_device();
    CHECK_EQ(cu.cuModuleLoadData(&m, other.bytes), CUDA_ERROR_NO_BINARY_FOR_GPU);
    other.bytes[other.size - 100] ^= 1;
    CHECK_EQ(cu.cuModuleLoadData(&m, other.bytes), CUDA_ERROR_INVALID_IMAGE);
    other.bytes[20] ^= 1;
    CHECK_EQ(cu.cuModuleLoadData(&m, other.bytes), CUDA_ERROR_INVALID_IMAGE);
    CHECK_EQ(cu.cuModuleLoadData(&m, "garbage"), CUDA_ERROR_INVALID_IMAGE);
    close_device();
    free(other.bytes);
}

TEST(two_modules_share_nothing)
{
    CUmodule m;
    CUfunction ten_times;
    int result;
    image other = compile("sm_90a", "-DFACTOR=10", 0, &result);
    CHECK_EQ(result, 0);
    REQUIRE(other.bytes != NULL);
    open_device();
    CHECK_EQ(cu.cuModuleLoadData(&m, other.bytes), 0);
    CHECK_EQ(cu.cuModuleGetFunction(&ten_times, m, "add"), 0);
    CHECK_EQ(launch(ten_times, NULL, dev.p, 1, 0), 0);
    CHECK_EQ(add(NULL, 1), 0);
    check_all(12);
    CHECK_EQ(cu.cuModuleUnload(m), 0);
    CHECK_EQ(add(NULL, 1), 0);
    check_all(13);
    close_device();
    free(other.bytes);
}

TEST(ptx_is_compiled_by_a_driver_that_knows_its_version)
{
    int result;
    image ptx = compile("compute_80", "-DFACTOR=1", 1, &result);
    CUmodule m;
    CUfunction f;
    CHECK_EQ(result, 0);
    REQUIRE(ptx.bytes != NULL);
    open_device();
    CHECK_EQ(cu.cuModuleLoadData(&m, ptx.bytes), 0);
    CHECK_EQ(cu.cuModuleGetFunction(&f, m, "add"), 0);
    CHECK_EQ(cu.cuModuleGetFunction(&f, m, "subtract"), CUDA_ERROR_NOT_FOUND);
    CHECK_EQ(cu.cuModuleUnload(m), 0);
    setenv("MOE_EMU_DRIVER_VERSION", "12040", 1);
    CHECK_EQ(cu.cuInit(0), 0);
    CHECK_EQ(cu.cuModuleLoadData(&m, ptx.bytes), CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
    unsetenv("MOE_EMU_DRIVER_VERSION");
    CHECK_EQ(cu.cuInit(0), 0);
    close_device();
    free(ptx.bytes);
}

TEST(embedded_ptx_is_compiled_from_its_source)
{
    static const char ptx[] = "// moe: -DMOE_K_NONE\n.version 8.1\n.target sm_80\n.address_size 64\n";
    CUmodule m;
    unsetenv("MOE_EMU_PTX_SOURCE");
    open_device();
    CHECK_EQ(cu.cuModuleLoadData(&m, ptx), CUDA_ERROR_JIT_COMPILER_NOT_FOUND);
    setenv("MOE_EMU_PTX_SOURCE", "moe_kernels.cu.inc", 1);
    CHECK_EQ(cu.cuModuleLoadData(&m, ptx), 0);
    CHECK_EQ(cu.cuModuleUnload(m), 0);
    unsetenv("MOE_EMU_PTX_SOURCE");
    close_device();
}

TEST(nvrtc_refuses_what_it_does_not_know)
{
    int result, major, minor;
    CHECK_EQ(cu.nvrtcVersion(&major, &minor), 0);
    CHECK_EQ(major, 13);
    setenv("MOE_EMU_ARCHS", "75,80", 1);
    compile("sm_90a", "-DFACTOR=1", 0, &result);
    CHECK_EQ(result, 5);
    unsetenv("MOE_EMU_ARCHS");
    compile("sm_80a", "-DFACTOR=1", 0, &result);
    CHECK_EQ(result, 5);
    setenv("MOE_EMU_FAIL", "nvrtcCompileProgram:1=9", 1);
    CHECK_EQ(cu.nvrtcVersion(&major, &minor), 0);
    compile("sm_90a", "-DFACTOR=1", 0, &result);
    CHECK_EQ(result, 9);
    unsetenv("MOE_EMU_FAIL");
    CHECK_EQ(cu.nvrtcVersion(&major, &minor), 0);
}

// ---- order ----------------------------------------------------------------------------------------------------------

TEST(a_stream_keeps_its_order)
{
    open_device();
    CUstream s = stream(CU_STREAM_NON_BLOCKING);
    for (int i = 0; i < 4; i++) CHECK_EQ(add(s, 1), 0);
    CHECK_EQ(launch(dev.twice, s, dev.p, 0, 1), 0);
    CHECK_EQ(add(s, 1), 0);
    CHECK_EQ(cu.cuStreamSynchronize(s), 0);
    check_all(11);
    CHECK_EQ(cu.cuStreamDestroy(s), 0);
    close_device();
}

TEST(events_order_streams)
{
    CUevent e, done;
    float ms = -1;
    open_device();
    CUstream s = stream(CU_STREAM_NON_BLOCKING), t = stream(CU_STREAM_NON_BLOCKING);
    CHECK_EQ(cu.cuEventCreate(&e, 0), 0);
    CHECK_EQ(cu.cuEventCreate(&done, 0), 0);
    CHECK_EQ(add(s, 2), 0);
    CHECK_EQ(cu.cuEventRecord(e, s), 0);
    CHECK_EQ(cu.cuStreamWaitEvent(t, e, 0), 0);
    CHECK_EQ(launch(dev.twice, t, dev.p, 0, 0), 0);
    CHECK_EQ(cu.cuEventRecord(done, t), 0);
    CHECK_EQ(cu.cuEventElapsedTime(&ms, e, done), CUDA_ERROR_NOT_READY);
    CHECK_EQ(cu.cuEventSynchronize(done), 0);
    CHECK_EQ(cu.cuEventElapsedTime(&ms, e, done), 0);
    CHECK(ms >= 0);
    check_all(6);
    CHECK_EQ(cu.cuEventDestroy(e), 0);
    CHECK_EQ(cu.cuEventDestroy(done), 0);
    CHECK_EQ(cu.cuStreamDestroy(s), 0);
    CHECK_EQ(cu.cuStreamDestroy(t), 0);
    close_device();
}

TEST(blocking_streams_wait_for_the_legacy_stream)
{
    open_device();
    CUstream s = stream(0), t = stream(0);
    CHECK_EQ(add(s, 1), 0);
    CHECK_EQ(launch(dev.twice, NULL, dev.p, 0, 0), 0);
    CHECK_EQ(add(t, 5), 0);
    CHECK_EQ(cu.cuStreamSynchronize(t), 0);
    check_all(9);
    CHECK_EQ(cu.cuStreamDestroy(s), 0);
    CHECK_EQ(cu.cuStreamDestroy(t), 0);
    close_device();
}

TEST(streams_without_an_event_race)
{
    report_path();
    open_device();
    CUstream s = stream(CU_STREAM_NON_BLOCKING), t = stream(CU_STREAM_NON_BLOCKING);
    CHECK_EQ(add(s, 1), 0);
    CHECK_EQ(add(t, 1), 0);
    CHECK_EQ(cu.cuCtxSynchronize(), CUDA_ERROR_LAUNCH_FAILED);
    CHECK_EQ(cu.cuMemFree(dev.p), CUDA_ERROR_LAUNCH_FAILED); // a context does not get over it
    reset_device();
    char *report = read_text(test_temp("test_driver.report"));
    CHECK_CONTAINS(report, "race");
    CHECK_CONTAINS(report, "add");
    free(report);
    unsetenv("MOE_EMU_REPORT");
}

TEST(nothing_runs_before_somebody_waits)
{
    uint32_t *pinned, early;
    open_device();
    CUstream s = stream(CU_STREAM_NON_BLOCKING);
    CHECK_EQ(cu.cuMemHostAlloc((void **)&pinned, COUNT * 4, 0), 0);
    memset(pinned, 0, COUNT * 4);
    CHECK_EQ(add(s, 1), 0);
    CHECK_EQ(cu.cuMemcpyDtoHAsync(pinned, dev.p, COUNT * 4, s), 0);
    early = pinned[0];
    CHECK_EQ(early, 0);
    for (int asked = 0; cu.cuStreamQuery(s) == CUDA_ERROR_NOT_READY; asked++) REQUIRE(asked < 100000);
    CHECK_EQ(pinned[0], 2);
    CHECK_EQ(cu.cuMemFreeHost(pinned), 0);
    CHECK_EQ(cu.cuStreamDestroy(s), 0);
    close_device();
}

TEST(copies_take_pageable_bytes_at_once_and_pinned_ones_late)
{
    uint32_t local[COUNT], *pinned;
    open_device();
    CUstream s = stream(CU_STREAM_NON_BLOCKING);
    for (int i = 0; i < COUNT; i++) local[i] = 7;
    CHECK_EQ(cu.cuMemcpyHtoDAsync(dev.p, local, sizeof local, s), 0);
    for (int i = 0; i < COUNT; i++) local[i] = 8;
    CHECK_EQ(cu.cuStreamSynchronize(s), 0);
    check_all(7);
    CHECK_EQ(cu.cuMemHostAlloc((void **)&pinned, sizeof local, 0), 0);
    for (int i = 0; i < COUNT; i++) pinned[i] = 7;
    CHECK_EQ(cu.cuMemcpyHtoDAsync(dev.p, pinned, sizeof local, s), 0);
    for (int i = 0; i < COUNT; i++) pinned[i] = 9;
    CHECK_EQ(cu.cuStreamSynchronize(s), 0);
    check_all(9);
    CHECK_EQ(cu.cuMemFreeHost(pinned), 0);
    CHECK_EQ(cu.cuStreamDestroy(s), 0);
    close_device();
}

static void in_host_function(void *data)
{
    CUdeviceptr p;
    *(int *)data = cu.cuMemAlloc(&p, 4);
}

TEST(host_functions_run_in_order_and_may_not_call_the_driver)
{
    int seen = 0;
    open_device();
    CHECK_EQ(cu.cuLaunchHostFunc(NULL, in_host_function, &seen), 0);
    CHECK_EQ(seen, 0);
    CHECK_EQ(cu.cuCtxSynchronize(), 0);
    CHECK_EQ(seen, CUDA_ERROR_NOT_PERMITTED);
    close_device();
}

static void *adds(void *data)
{
    CUstream s = NULL;
    CUdeviceptr p = 0;
    uint32_t out[COUNT];
    long wrong = 0;
    wrong += cu.cuCtxSetCurrent(dev.ctx) != 0;
    wrong += cu.cuStreamCreate(&s, CU_STREAM_NON_BLOCKING) != 0;
    wrong += cu.cuMemAlloc(&p, sizeof out) != 0;
    for (int round = 0; round < 5; round++) {
        wrong += cu.cuMemsetD32Async(p, 1, COUNT, s) != 0;
        for (int i = 0; i < 5; i++) wrong += launch(dev.add, s, p, 1, 0) != 0;
        wrong += cu.cuMemcpyDtoHAsync(out, p, sizeof out, s) != 0;
        wrong += cu.cuStreamSynchronize(s) != 0;
        for (int i = 0; i < COUNT; i++) wrong += out[i] != 6;
    }
    wrong += cu.cuMemFree(p) != 0;
    wrong += cu.cuStreamDestroy(s) != 0;
    *(long *)data = wrong;
    return NULL;
}

TEST(four_threads_at_once)
{
    pthread_t threads[4];
    long wrong[4];
    open_device();
    for (int i = 0; i < 4; i++) REQUIRE(pthread_create(&threads[i], NULL, adds, &wrong[i]) == 0);
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        CHECK_EQ(wrong[i], 0);
    }
    close_device();
}

// ---- refusals and failures ------------------------------------------------------------------------------------------

static int launch_as(unsigned grid, unsigned block, unsigned smem, unsigned cluster)
{
    test_args args = { dev.p, 0, 0 };
    void *params[] = { &args };
    CUlaunchAttribute attribute;
    memset(&attribute, 0, sizeof attribute);
    attribute.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim.x = cluster;
    attribute.value.clusterDim.y = attribute.value.clusterDim.z = 1;
    CUlaunchConfig config = { grid, 1, 1, block, 1, 1, smem, NULL, &attribute, 1 };
    return cu.cuLaunchKernelEx(&config, dev.add, params, NULL);
}

TEST(launches_that_hardware_refuses)
{
    size_t offset, bytes;
    open_device();
    CHECK_EQ(launch_as(1, 64, 0, 1), 0);
    CHECK_EQ(launch_as(0, 64, 0, 1), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(launch_as(1, 0, 0, 1), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(launch_as(1, 65, 0, 1), CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);
    CHECK_EQ(launch_as(1, 64, 48 * 1024 + 1, 1), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(cu.cuFuncSetAttribute(dev.add, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 227 * 1024), 0);
    CHECK_EQ(launch_as(1, 64, 227 * 1024, 1), 0);
    CHECK_EQ(cu.cuFuncSetAttribute(dev.add, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 228 * 1024),
             CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(launch_as(4, 64, 0, 2), 0);
    CHECK_EQ(launch_as(3, 64, 0, 2), CUDA_ERROR_INVALID_CLUSTER_SIZE);
    CHECK_EQ(launch_as(16, 64, 0, 16), CUDA_ERROR_INVALID_CLUSTER_SIZE);
    CHECK_EQ(cu.cuFuncSetAttribute(dev.add, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1), 0);
    CHECK_EQ(launch_as(16, 64, 0, 16), 0);
    CHECK_EQ(cu.cuFuncGetParamInfo(dev.add, 0, &offset, &bytes), 0);
    CHECK_EQ(bytes, sizeof(test_args));
    CHECK_EQ(cu.cuFuncGetParamInfo(dev.add, 1, &offset, &bytes), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(cu.cuCtxSynchronize(), 0);
    close_device();
}

TEST(freed_memory_that_queued_work_uses_is_reported)
{
    CUdeviceptr p;
    report_path();
    open_device();
    CHECK_EQ(cu.cuMemAlloc(&p, COUNT * 4), 0);
    CHECK_EQ(cu.cuMemsetD32Async(p, 0, COUNT, NULL), 0);
    CHECK_EQ(cu.cuCtxSynchronize(), 0);
    CHECK_EQ(launch(dev.add, NULL, p, 1, 0), 0);
    CHECK_EQ(cu.cuMemFree(p), 0);
    CHECK(cu.cuCtxSynchronize() != 0);
    reset_device();
    char *report = read_text(test_temp("test_driver.report"));
    CHECK_CONTAINS(report, "freed");
    free(report);
    unsetenv("MOE_EMU_REPORT");
}

TEST(memory_freed_in_stream_order_is_not)
{
    CUdeviceptr p;
    open_device();
    CHECK_EQ(cu.cuMemAlloc(&p, COUNT * 4), 0);
    CHECK_EQ(cu.cuMemsetD32Async(p, 0, COUNT, NULL), 0);
    CHECK_EQ(launch(dev.add, NULL, p, 1, 0), 0);
    CHECK_EQ(cu.cuMemFreeAsync(p, NULL), 0);
    CHECK_EQ(cu.cuCtxSynchronize(), 0);
    close_device();
}

TEST(out_of_bounds_is_an_illegal_address)
{
    report_path();
    open_device();
    CHECK_EQ(launch(dev.add, NULL, dev.p + 4, 1, 0), 0);
    CHECK_EQ(cu.cuCtxSynchronize(), CUDA_ERROR_ILLEGAL_ADDRESS);
    reset_device();
    unsetenv("MOE_EMU_REPORT");
}

TEST(leaks_are_listed)
{
    char text[1024];
    CUmodule m;
    CUdeviceptr p;
    open_device();
    CUstream s = stream(0);
    CHECK_EQ(cu.cuModuleLoadData(&m, sm90().bytes), 0);
    CHECK_EQ(cu.cuMemAlloc(&p, 12345), 0);
    CHECK_EQ(cu.cuMemFree(dev.p), 0);
    CHECK_EQ(cu.cuModuleUnload(dev.module), 0);
    CHECK_EQ(cu.emu_leaks(text, sizeof text), 4);
    CHECK_CONTAINS(text, "primary context");
    CHECK_CONTAINS(text, "module");
    CHECK_CONTAINS(text, "12345 bytes");
    CHECK_CONTAINS(text, "stream");
    CHECK_EQ(cu.cuStreamDestroy(s), 0);
    CHECK_EQ(cu.cuMemFree(p), 0);
    CHECK_EQ(cu.cuDevicePrimaryCtxRelease(0), 0);
    CHECK_EQ(cu.cuCtxSetCurrent(NULL), 0);
    CHECK_EQ(cu.emu_leaks(text, sizeof text), 1); // the module went with its context, and is remembered once
    CHECK_CONTAINS(text, "module");
    CHECK_EQ(cu.emu_leaks(text, sizeof text), 0);
}

TEST(unloading_code_that_is_still_to_run_is_reported)
{
    report_path();
    open_device();
    CHECK_EQ(add(NULL, 1), 0);
    CHECK_EQ(cu.cuModuleUnload(dev.module), CUDA_ERROR_LAUNCH_FAILED);
    reset_device();
    unsetenv("MOE_EMU_REPORT");
}

// ---- the log --------------------------------------------------------------------------------------------------------

TEST(the_log_has_a_line_per_call)
{
    open_device();
    CUstream s = stream(CU_STREAM_NON_BLOCKING);
    CHECK_EQ(cu.emu_log_begin(), 0);
    CHECK_EQ(add(NULL, 1), 0);
    CHECK_EQ(add((CUstream)(uintptr_t)12345, 1), CUDA_ERROR_INVALID_HANDLE);
    const char *log = cu.log_end();
    CHECK(strncmp(log, "cuLaunchKernelEx ", 17) == 0);
    CHECK_CONTAINS(log, " legacy - 0\n");
    CHECK_CONTAINS(log, " - - 400\n");
    CHECK_EQ(cu.cuStreamSynchronize(s), 0);
    CHECK(strstr(cu.log_end(), "cuStreamSynchronize") == NULL);
    CHECK_EQ(cu.cuStreamDestroy(s), 0);
    CHECK_EQ(cu.cuCtxSynchronize(), 0);
    close_device();
}

// ---- tensor maps ----------------------------------------------------------------------------------------------------

enum { COLUMNS = 12, LINES = 6, BOX_X = 8, BOX_Y = 4 };

// u32 [LINES][COLUMNS] at p, boxes of [BOX_Y][BOX_X], zeros outside.
static int encode(CUtensorMap *map, CUdeviceptr p, uint64_t stride, uint32_t box_x)
{
    const uint64_t dims[2] = { COLUMNS, LINES };
    const uint32_t box[2] = { box_x, BOX_Y }, steps[2] = { 1, 1 };
    return cu.cuTensorMapEncodeTiled(map, 2, 2, (void *)(uintptr_t)p, dims, &stride, box, steps, 0, 0, 0, 0);
}

TEST(tensor_maps_are_encoded_for_kernels)
{
    box_args args;
    void *params[] = { &args };
    CUfunction f;
    CUdeviceptr p;
    uint32_t in[LINES * COLUMNS], out[BOX_X * BOX_Y];
    CUlaunchConfig config = { 1, 1, 1, 32, 1, 1, 256, NULL, NULL, 0 };
    memset(&args, 0, sizeof args);
    open_device();
    CHECK_EQ(cu.cuMemAlloc(&p, sizeof in), 0);
    for (int i = 0; i < LINES * COLUMNS; i++) in[i] = 1000 + (uint32_t)i;
    CHECK_EQ(cu.cuMemcpyHtoD(p, in, sizeof in), 0);
    CHECK_EQ(encode(&args.map, p + 4, COLUMNS * 4, BOX_X), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(encode(&args.map, p, COLUMNS * 4 + 4, BOX_X), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(encode(&args.map, p, COLUMNS * 4, 257), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(encode(NULL, p, COLUMNS * 4, BOX_X), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ(encode(&args.map, p, COLUMNS * 4, BOX_X), 0);
    args.out = dev.p;
    args.x = 8;
    args.y = 3;
    CHECK_EQ(cu.cuModuleGetFunction(&f, dev.module, "box"), 0);
    CHECK_EQ(cu.cuLaunchKernelEx(&config, f, params, NULL), 0);
    CHECK_EQ(cu.cuMemcpyDtoH(out, dev.p, sizeof out), 0);
    for (int i = 0; i < BOX_X * BOX_Y; i++) {
        int x = args.x + i % BOX_X, y = args.y + i / BOX_X;
        CHECK_EQ(out[i], x < COLUMNS && y < LINES ? in[y * COLUMNS + x] : 0);
    }
    CHECK_EQ(cu.cuMemFree(p), 0);
    close_device();
}

// ---- capture and graphs ---------------------------------------------------------------------------------------------

static CUgraphExec instantiate(CUgraph g)
{
    CUgraphExec e = NULL;
    CHECK_EQ(cu.cuGraphInstantiate(&e, g, 0), 0);
    CHECK_EQ(cu.cuGraphDestroy(g), 0);
    return e;
}

TEST(a_captured_graph_runs_again_and_again)
{
    CUgraph g;
    size_t nodes = 0;
    int status;
    open_device();
    CUstream s = stream(CU_STREAM_NON_BLOCKING);
    CHECK_EQ(cu.cuStreamBeginCapture(s, CU_STREAM_CAPTURE_MODE_GLOBAL), 0);
    CHECK_EQ(cu.cuStreamIsCapturing(s, &status), 0);
    CHECK_EQ(status, CU_STREAM_CAPTURE_STATUS_ACTIVE);
    CHECK_EQ(add(s, 1), 0);
    CHECK_EQ(launch(dev.twice, s, dev.p, 0, 1), 0);
    CHECK_EQ(cu.cuStreamEndCapture(s, &g), 0);
    check_all(1);
    CHECK_EQ(cu.cuGraphGetNodes(g, NULL, &nodes), 0);
    CHECK_EQ(nodes, 2);
    CUgraphExec e = instantiate(g);
    for (int i = 0; i < 3; i++) CHECK_EQ(cu.cuGraphLaunch(e, s), 0);
    CHECK_EQ(cu.cuStreamSynchronize(s), 0);
    check_all(22);
    CHECK_EQ(cu.cuGraphExecDestroy(e), 0);
    CHECK_EQ(cu.cuStreamDestroy(s), 0);
    close_device();
}

TEST(captured_streams_fork_and_join)
{
    CUgraph g;
    CUevent fork, joined;
    CUdeviceptr q;
    open_device();
    CUstream s = stream(CU_STREAM_NON_BLOCKING), t = stream(CU_STREAM_NON_BLOCKING);
    CHECK_EQ(cu.cuMemAlloc(&q, COUNT * 4), 0);
    CHECK_EQ(cu.cuEventCreate(&fork, CU_EVENT_DISABLE_TIMING), 0);
    CHECK_EQ(cu.cuEventCreate(&joined, CU_EVENT_DISABLE_TIMING), 0);
    for (int join = 0; join < 2; join++) {
        CHECK_EQ(cu.cuStreamBeginCapture(s, CU_STREAM_CAPTURE_MODE_GLOBAL), 0);
        CHECK_EQ(add(s, 1), 0);
        CHECK_EQ(cu.cuEventRecord(fork, s), 0);
        CHECK_EQ(cu.cuStreamWaitEvent(t, fork, 0), 0);
        CHECK_EQ(cu.cuMemsetD32Async(q, 3, COUNT, t), 0);
        CHECK_EQ(cu.cuEventRecord(joined, t), 0);
        CHECK_EQ(launch(dev.twice, s, dev.p, 0, 0), 0);
        if (join) CHECK_EQ(cu.cuStreamWaitEvent(s, joined, 0), 0);
        if (join) CHECK_EQ(launch(dev.add, s, q, 1, 0), 0);
        CHECK_EQ(cu.cuStreamEndCapture(s, &g), join ? 0 : CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
    }
    CUgraphExec e = instantiate(g);
    CHECK_EQ(cu.cuGraphLaunch(e, s), 0);
    CHECK_EQ(cu.cuStreamSynchronize(s), 0);
    check_all(4);
    CHECK_EQ(cu.cuGraphExecDestroy(e), 0);
    CHECK_EQ(cu.cuEventDestroy(fork), 0);
    CHECK_EQ(cu.cuEventDestroy(joined), 0);
    CHECK_EQ(cu.cuStreamDestroy(s), 0);
    CHECK_EQ(cu.cuStreamDestroy(t), 0);
    CHECK_EQ(cu.cuMemFree(q), 0);
    close_device();
}

TEST(a_graph_is_updated_in_place)
{
    CUgraph g;
    CUgraphExec e = NULL;
    CUgraphExecUpdateResultInfo info;
    open_device();
    CUstream s = stream(CU_STREAM_NON_BLOCKING);
    for (int i = 0; i < 3; i++) {
        CHECK_EQ(cu.cuStreamBeginCapture(s, CU_STREAM_CAPTURE_MODE_RELAXED), 0);
        for (int k = 0; k <= i / 2; k++) CHECK_EQ(add(s, i == 0 ? 10 : 20), 0);
        CHECK_EQ(cu.cuStreamEndCapture(s, &g), 0);
        if (i == 0) {
            e = instantiate(g);
            continue;
        }
        CHECK_EQ(cu.cuGraphExecUpdate(e, g, &info), i == 1 ? 0 : CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE);
        CHECK_EQ(cu.cuGraphDestroy(g), 0);
    }
    CHECK_EQ(cu.cuGraphLaunch(e, s), 0);
    CHECK_EQ(cu.cuStreamSynchronize(s), 0);
    check_all(21);
    CHECK_EQ(cu.cuGraphExecDestroy(e), 0);
    CHECK_EQ(cu.cuStreamDestroy(s), 0);
    close_device();
}

// What breaks a capture: each returns hardware's code, and the end says that the capture is gone.
enum { ALLOC, MODULE, SYNC, LEGACY, COPY, QUERY, OTHER_EVENT, BREAKS };

static int break_capture(int how, CUstream s, CUevent e)
{
    CUdeviceptr p;
    CUmodule m;
    switch (how) {
    case ALLOC: return cu.cuMemAlloc(&p, 4);
    case MODULE: return cu.cuModuleLoadData(&m, sm90().bytes);
    case SYNC: return cu.cuStreamSynchronize(s);
    case LEGACY: return add(NULL, 1);
    case COPY: return cu.cuMemcpyDtoH(&p, dev.p, 4);
    case QUERY: return cu.cuStreamQuery(s);
    default: return cu.cuStreamWaitEvent(s, e, 0);
    }
}

TEST(illegal_calls_end_a_capture)
{
    static const int codes[BREAKS] = {
        CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
        CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
        CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
        CUDA_ERROR_STREAM_CAPTURE_ISOLATION
    };
    CUgraph g;
    CUevent e;
    int status;
    open_device();
    CUstream s = stream(0);
    CHECK_EQ(cu.cuEventCreate(&e, 0), 0);
    CHECK_EQ(cu.cuEventRecord(e, NULL), 0);
    for (int how = 0; how < BREAKS; how++) {
        CHECK_EQ(cu.cuStreamBeginCapture(s, CU_STREAM_CAPTURE_MODE_GLOBAL), 0);
        CHECK_EQ(add(s, 1), 0);
        CHECK_EQ(cu.cuStreamIsCapturing(NULL, &status), CUDA_ERROR_STREAM_CAPTURE_IMPLICIT); // and it goes on
        CHECK_EQ(break_capture(how, s, e), codes[how]);
        CHECK_EQ(cu.cuStreamIsCapturing(s, &status), 0);
        CHECK_EQ(status, CU_STREAM_CAPTURE_STATUS_INVALIDATED);
        CHECK_EQ(add(s, 1), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        CHECK_EQ(cu.cuStreamEndCapture(s, &g), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        CHECK(g == NULL);
    }
    check_all(1);
    CHECK_EQ(cu.cuStreamBeginCapture(NULL, 0), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    CHECK_EQ(cu.cuEventDestroy(e), 0);
    CHECK_EQ(cu.cuStreamDestroy(s), 0);
    close_device();
}

static int mode_of_other;

static void *allocates(void *data)
{
    CUdeviceptr p = 0;
    int mode = mode_of_other;
    cu.cuCtxSetCurrent(dev.ctx);
    cu.cuThreadExchangeStreamCaptureMode(&mode);
    *(int *)data = cu.cuMemAlloc(&p, 4);
    if (p != 0) cu.cuMemFree(p);
    return NULL;
}

// [capture's mode][other thread's mode]: whether the other thread's allocation is legal.
TEST(capture_modes_bind_other_threads)
{
    static const int legal[3][3] = { { 0, 1, 1 }, { 1, 1, 1 }, { 1, 1, 1 } };
    CUgraph g;
    open_device();
    CUstream s = stream(CU_STREAM_NON_BLOCKING);
    for (int mode = 0; mode < 3; mode++)
        for (mode_of_other = 0; mode_of_other < 3; mode_of_other++) {
            pthread_t thread;
            int result = -1, ok = legal[mode][mode_of_other];
            CHECK_EQ(cu.cuStreamBeginCapture(s, mode), 0);
            CHECK_EQ(add(s, 1), 0);
            REQUIRE(pthread_create(&thread, NULL, allocates, &result) == 0);
            pthread_join(thread, NULL);
            CHECK_EQ(result, ok ? 0 : CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
            CHECK_EQ(cu.cuStreamEndCapture(s, &g), ok ? 0 : CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
            if (g != NULL) CHECK_EQ(cu.cuGraphDestroy(g), 0);
        }
    CHECK_EQ(cu.cuStreamDestroy(s), 0);
    close_device();
}

int main(int argc, char **argv)
{
    static const test_entry table[] = {
        T(devices_are_what_the_environment_says)
        T(symbols_newer_than_the_driver_are_not_found)
        T(injected_faults_hit_the_call_they_name)
        T(memory_ends)
        T(pointers_say_what_they_are)
        T(images_run_on_their_chip_alone)
        T(two_modules_share_nothing)
        T(ptx_is_compiled_by_a_driver_that_knows_its_version)
        T(embedded_ptx_is_compiled_from_its_source)
        T(nvrtc_refuses_what_it_does_not_know)
        T(a_stream_keeps_its_order)
        T(events_order_streams)
        T(blocking_streams_wait_for_the_legacy_stream)
        T(streams_without_an_event_race)
        T(nothing_runs_before_somebody_waits)
        T(copies_take_pageable_bytes_at_once_and_pinned_ones_late)
        T(host_functions_run_in_order_and_may_not_call_the_driver)
        T(four_threads_at_once)
        T(launches_that_hardware_refuses)
        T(freed_memory_that_queued_work_uses_is_reported)
        T(memory_freed_in_stream_order_is_not)
        T(out_of_bounds_is_an_illegal_address)
        T(leaks_are_listed)
        T(unloading_code_that_is_still_to_run_is_reported)
        T(the_log_has_a_line_per_call)
        T(tensor_maps_are_encoded_for_kernels)
        T(a_captured_graph_runs_again_and_again)
        T(captured_streams_fork_and_join)
        T(a_graph_is_updated_in_place)
        T(illegal_calls_end_a_capture)
        T(capture_modes_bind_other_threads)
    };
    open_libraries();
    return test_main(table, (int)(sizeof table / sizeof table[0]), __FILE__, argc, argv);
}
