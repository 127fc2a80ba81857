// The emulated device itself: each kind of defect is reported, and its correct twin is not. By default for three seeds.
//   g++ -std=c++17 -O1 -g test_engine.cc test_kernels.o engine.cc check.cc sync.cc async.cc matrix.cc
#include "emu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <string>
#include <vector>

struct test_args {
    uint32_t *in, *out, *flag;
    int32_t broken, n;
};

static int passed, failed;

static void check(bool ok, const char *what, const std::string &detail)
{
    if (ok) {
        passed++;
        return;
    }
    failed++;
    printf("FAILED %s: %s\n", what, detail.c_str());
}

enum { WORDS = 1024 };

// A device with an input 0, 1, 2, ..., an output that nobody has written, and zeroed flags.
struct bench {
    emu_device *dev;
    uint32_t *in, *out, *flag;
    emu_op *last = nullptr;

    bench(uint64_t seed, int capability = 90)
    {
        dev = emu_device_create(capability, 6);
        emu_device_seed(dev, seed);
        in = (uint32_t *)emu_alloc(dev, WORDS * 4, false);
        out = (uint32_t *)emu_alloc(dev, WORDS * 4, false);
        flag = (uint32_t *)emu_alloc(dev, WORDS * 4, false);
        std::vector<uint32_t> values(WORDS);
        for (uint32_t i = 0; i < WORDS; i++) values[i] = i;
        copy(in, values.data(), WORDS * 4);
        emu_op_desc d = {};
        d.kind = EMU_OP_FILL;
        d.dst = flag;
        d.bytes = WORDS * 4;
        d.width = 4;
        submit(d);
        emu_wait_all(dev);
    }
    ~bench()
    {
        if (last) emu_release(last);
        emu_device_destroy(dev);
    }
    void submit(const emu_op_desc &d, bool behind = true, bool programmatic = false)
    {
        unsigned char early = programmatic;
        emu_op *op = emu_submit(dev, &d, &last, &early, behind && last ? 1 : 0);
        if (last) emu_release(last);
        last = op;
    }
    void copy(void *dst, const void *src, size_t bytes, bool behind = true)
    {
        emu_op_desc d = {};
        d.kind = EMU_OP_COPY;
        d.dst = dst;
        d.src = src;
        d.bytes = bytes;
        submit(d, behind);
    }
    void kernel(const emu_kernel *k, uint32_t grid, uint32_t cluster, int broken, bool behind = true,
                bool programmatic = false)
    {
        test_args a = { in, out, flag, broken, WORDS };
        emu_op_desc d = {};
        d.kind = EMU_OP_KERNEL;
        d.kernel = k;
        d.args = &a;
        d.grid[0] = grid;
        d.block[0] = k->threads;
        d.grid[1] = d.grid[2] = d.block[1] = d.block[2] = 1;
        d.cluster[0] = cluster;
        d.smem_bytes = 12288;
        submit(d, behind, programmatic);
    }
    void tensor()           // flag becomes a tensor map of in: 64 rows of 16 words
    {
        alignas(64) unsigned char map[128];
        uint64_t dims[2] = { 16, 64 }, stride = 64;
        uint32_t box[2] = { 32, 8 }, steps[2] = { 1, 1 };
        check(emu_tensor_map_encode(map, 2, 2, in, dims, &stride, box, steps, 0, 3, 0, 0), "tensor map", "refused");
        check(!emu_tensor_map_encode(map + 8, 2, 2, in, dims, &stride, box, steps, 0, 3, 0, 0), "tensor map", "taken");
        copy(flag, map, sizeof map);
        emu_wait(last);
    }
    std::vector<uint32_t> result()
    {
        std::vector<uint32_t> r(WORDS);
        copy(r.data(), out, WORDS * 4);
        emu_wait(last);
        return r;
    }
};

// ---- one kernel -----------------------------------------------------------------------------------------------------

#define KERNELS(X)                                                                                                     \
    X(k_smem) X(k_warp) X(k_halves) X(k_access) X(k_collectives) X(k_named) X(k_divergent) X(k_last) X(k_flag)        \
    X(k_atomics) X(k_ctas) X(k_constant) X(k_mbar) X(k_cp_async) X(k_bulk) X(k_bulk_wait) X(k_cluster) X(k_push)      \
    X(k_multicast) X(k_primary) X(k_dependent) X(k_forward) X(k_second) X(k_copy) X(k_registers) X(k_trap)      \
    X(k_wgmma) X(k_mma) X(k_convert) X(k_tensor)
#define DECLARE(name) extern "C" const emu_kernel name##__emu;
KERNELS(DECLARE)

struct one_case {
    const emu_kernel *kernel;
    uint32_t grid, cluster;
    int broken;
    const char *report;     // a part of the report; NULL: none
};

static const one_case cases[] = {
    { &k_smem__emu, 3, 1, 0, nullptr },
    { &k_smem__emu, 3, 1, 1, "read of smem+" },
    { &k_smem__emu, 3, 1, 2, "race" },
    { &k_warp__emu, 1, 1, 0, nullptr },
    { &k_warp__emu, 1, 1, 1, "race: read of smem+" },
    { &k_halves__emu, 1, 1, 0, nullptr },
    { &k_halves__emu, 1, 1, 1, "race: write of smem+" },
    { &k_access__emu, 1, 1, 0, nullptr },
    { &k_access__emu, 1, 1, 1, "write of 4 bytes out of bounds: smem+" },
    { &k_access__emu, 1, 1, 2, "read of 4 bytes out of bounds: allocation 1+4096 (of 4096 bytes)" },
    { &k_access__emu, 1, 1, 3, "read of 4 bytes out of bounds: 4 bytes in front of allocation 1" },
    { &k_access__emu, 1, 1, 4, "needs 4-byte alignment" },
    { &k_access__emu, 1, 1, 5, "needs 16-byte alignment" },
    { &k_access__emu, 1, 1, 6, "never been written" },
    { &k_access__emu, 1, 1, 7, "never been written" },
    { &k_access__emu, 1, 1, 8, "out of bounds" },
    { &k_access__emu, 1, 1, 9, "out of bounds" },
    { &k_access__emu, 1, 1, 10, "write of the kernel's arguments" },
    { &k_collectives__emu, 1, 1, 0, nullptr },
    { &k_collectives__emu, 1, 1, 1, "different collective operations" },
    { &k_collectives__emu, 1, 1, 2, "deadlock" },
    { &k_named__emu, 1, 1, 0, nullptr },
    { &k_named__emu, 1, 1, 1, "bar_sync(3): 64 of 128 threads" },
    { &k_named__emu, 1, 1, 2, "bar_" },
    { &k_named__emu, 1, 1, 3, "smem+" },
    { &k_named__emu, 1, 1, 4, "a second time" },
    { &k_divergent__emu, 1, 1, 0, nullptr },
    { &k_divergent__emu, 1, 1, 1, "thread 0-31 in cta_sync(0): 32 of 64 threads" },
    { &k_last__emu, 10, 1, 0, nullptr },
    { &k_last__emu, 10, 1, 1, "race: read of allocation 2+" },
    { &k_last__emu, 10, 1, 2, "race: read of allocation 2+" },
    { &k_flag__emu, 2, 1, 0, nullptr },
    { &k_flag__emu, 2, 1, 1, "race: read of allocation 2+0" },
    { &k_flag__emu, 2, 1, 2, "race: read of allocation 2+0" },
    { &k_flag__emu, 2, 1, 3, nullptr },
    { &k_flag__emu, 2, 1, 4, "race: read of allocation 2+0" },
    { &k_flag__emu, 2, 1, 5, "no progress" },
    { &k_atomics__emu, 1, 1, 0, nullptr },
    { &k_atomics__emu, 1, 1, 1, "race" },
    { &k_atomics__emu, 1, 1, 2, "race" },
    { &k_ctas__emu, 8, 1, 0, nullptr },
    { &k_ctas__emu, 8, 1, 1, "race: write of allocation 2+" },
    { &k_constant__emu, 1, 1, 0, nullptr },
    { &k_constant__emu, 1, 1, 1, "as constant" },
    { &k_mbar__emu, 1, 1, 0, nullptr },
    { &k_mbar__emu, 1, 1, 1, "mbarrier" },
    { &k_mbar__emu, 1, 1, 2, "race" },
    { &k_mbar__emu, 1, 1, 3, "more arrivals" },
    { &k_mbar__emu, 1, 1, 4, "1 of 32 arrivals and 0 bytes missing" },
    { &k_mbar__emu, 1, 1, 5, "holds no mbarrier" },
    { &k_mbar__emu, 1, 1, 6, "write of an mbarrier" },
    { &k_mbar__emu, 1, 1, 7, "count 0" },
    { &k_cp_async__emu, 1, 1, 0, nullptr },
    { &k_cp_async__emu, 1, 1, 1, "race: read of smem+" },
    { &k_cp_async__emu, 1, 1, 2, "race: read of smem+" },
    { &k_cp_async__emu, 1, 1, 3, "read of smem+" },
    { &k_cp_async__emu, 1, 1, 4, "race: write of smem+" },
    { &k_cp_async__emu, 1, 1, 5, "needs 16-byte alignment" },
    { &k_cp_async__emu, 1, 1, 6, "out of bounds" },
    { &k_cp_async__emu, 1, 1, 7, "race: read of smem+" },
    { &k_bulk__emu, 1, 1, 0, nullptr },
    { &k_bulk__emu, 1, 1, 1, "race" },
    { &k_bulk__emu, 1, 1, 2, "read of smem+" },
    { &k_bulk__emu, 1, 1, 3, "without fence_mbar_init()" },
    { &k_bulk__emu, 1, 1, 4, "a multiple of 16" },
    { &k_bulk__emu, 1, 1, 5, "not in global memory" },
    { &k_bulk__emu, 1, 1, 6, "was not followed by fence_proxy_async()" },
    { &k_bulk__emu, 1, 1, 7, "race: write of smem+20" },
    { &k_bulk__emu, 1, 1, 8, "the block ended while 1 asynchronous" },
    { &k_bulk__emu, 1, 1, 9, "needs 16-byte alignment" },
    { &k_bulk_wait__emu, 1, 1, 0, nullptr },
    { &k_bulk_wait__emu, 1, 1, 1, "race: read of allocation 2+12" },
    { &k_cluster__emu, 8, 4, 0, nullptr },
    { &k_cluster__emu, 8, 4, 1, "" },
    { &k_cluster__emu, 8, 4, 2, "" },
    { &k_cluster__emu, 8, 4, 3, "block 4 of a cluster of 4" },
    { &k_cluster__emu, 8, 4, 4, "is not in shared memory" },
    { &k_cluster__emu, 8, 4, 5, "without cluster_arrive" },
    { &k_cluster__emu, 8, 4, 6, "without cluster_wait" },
    { &k_cluster__emu, 8, 4, 7, "ends, not ordered after the access" },
    { &k_push__emu, 4, 2, 0, nullptr },
    { &k_push__emu, 4, 2, 1, "" },
    { &k_push__emu, 4, 2, 2, "" },
    { &k_multicast__emu, 8, 4, 0, nullptr },
    { &k_multicast__emu, 8, 4, 1, "1 of 1 arrivals and -128 bytes missing" },
    { &k_registers__emu, 1, 1, 0, nullptr },
    { &k_registers__emu, 1, 1, 1, "reg_inc" },
    { &k_trap__emu, 1, 1, 0, nullptr },
    { &k_trap__emu, 1, 1, 1, "thread 3: trap()" },
    { &k_wgmma__emu, 1, 1, 0, nullptr },
    { &k_wgmma__emu, 1, 1, 1, "trap()" },
    { &k_wgmma__emu, 1, 1, 2, "was not followed by fence_proxy_async()" },
    { &k_wgmma__emu, 1, 1, 3, "race: write of smem+" },
    { &k_wgmma__emu, 1, 1, 4, "no wgmma_fence()" },
    { &k_wgmma__emu, 1, 1, 5, "wgmma: " },
    { &k_wgmma__emu, 1, 1, 6, "row 0: smem+" },
    { &k_wgmma__emu, 1, 1, 7, "asynchronous operations still used" },
    { &k_wgmma__emu, 1, 1, 8, "different descriptors" },
    { &k_mma__emu, 1, 1, 0, nullptr },
    { &k_mma__emu, 1, 1, 1, "ldmatrix: read needs 16-byte alignment" },
    { &k_mma__emu, 1, 1, 2, "ldmatrix: " },
    { &k_convert__emu, 1, 1, 0, nullptr },
    { &k_tensor__emu, 1, 1, 0, nullptr },
    { &k_tensor__emu, 1, 1, 1, "read of smem+" },
    { &k_tensor__emu, 1, 1, 2, "the block ended while " },
    { &k_tensor__emu, 1, 1, 3, "tma_load_2d: x is -7, which is no multiple of 16 bytes" },
    { &k_tensor__emu, 1, 1, 4, "tma_store_2d: a box that begins at -8 cannot be written" },
};

// What the correct variants write, where it is not their thread's own number.
static bool right(const one_case &c, const std::vector<uint32_t> &r)
{
    const std::string name = c.kernel->name;
    uint32_t t = c.kernel->threads, n = c.grid * t;
    for (uint32_t i = 0; i < n && i < WORDS; i++) {
        uint32_t want = i;
        if (name == "k_smem") {
            if (n > WORDS) return true;
            want = i / t * t + (i + 1) % t;
        }
        if (name == "k_warp") want = i ^ 1;
        if (name == "k_collectives" || name == "k_wgmma" || name == "k_mma" || name == "k_convert" ||
            name == "k_tensor") want = 1;
        if (name == "k_last" || name == "k_halves" || name == "k_access" || name == "k_registers") want = i % t;
        if (name == "k_last") want = i;
        if (name == "k_named") want = i < 64 ? r[i] : i - 64;
        if (name == "k_flag") want = i < 2 ? 42 : r[i];
        if (name == "k_atomics") want = 128127;
        if (name == "k_ctas") want = i / 32;
        if (name == "k_constant") want = i + i / 4 * 4 + 1;
        if (name == "k_mbar") want = i < 32 ? i + 2 : r[i];
        if (name == "k_cp_async") want = (i ^ 1) * 4 + ((i ^ 1) < 16 ? (i ^ 1) * 4 + 1 : 0) + (i ^ 1);
        if (name == "k_bulk") want = i < 32 ? i + 1 : r[i];
        if (name == "k_bulk_wait") want = i < 8 ? i : i == 8 ? 3 : r[i];
        if (name == "k_cluster") want = i / 64 / 4 * 256 + (i / 64 + 1) % 4 * 64 + i % 64;
        if (name == "k_push") want = i % 32 + 7;
        if (name == "k_multicast") want = i % 32;
        if (i < n && r[i] != want) return false;
    }
    return true;
}

static void run_case(const one_case &c, uint64_t seed)
{
    bench b(seed);
    char what[128];
    snprintf(what, sizeof what, "%s, broken %d, seed %llu", c.kernel->name, c.broken, (unsigned long long)seed);
    int before = emu_reports();
    if (c.kernel == &k_tensor__emu) b.tensor();
    b.kernel(c.kernel, c.grid, c.cluster, c.broken);
    std::vector<uint32_t> r = b.result();
    int status = emu_wait_all(b.dev);
    if (c.report) {
        check(status != EMU_OK && emu_reports() == before + 1, what, "no report");
        check(strstr(emu_last_report(), c.report) != nullptr, what, std::string("the report is ") + emu_last_report());
    } else {
        check(status == EMU_OK && emu_reports() == before, what, "a report");
        check(right(c, r), what, "wrong result");
    }
}

// ---- operations -----------------------------------------------------------------------------------------------------

static void expect_report(const char *what, const char *part, int before)
{
    if (!part) {
        check(emu_reports() == before, what, emu_last_report());
        return;
    }
    check(emu_reports() > before && strstr(emu_last_report(), part), what, emu_last_report());
}

static void chains(uint64_t seed)
{
    for (int broken = 0; broken < 2; broken++) {
        int before = emu_reports();
        bench b(seed);
        b.kernel(&k_primary__emu, 20, 1, 0);
        b.kernel(&k_dependent__emu, 20, 1, broken, true, true);
        std::vector<uint32_t> r = b.result();
        expect_report("programmatic launch", broken ? "race" : nullptr, before);
        if (!broken) check(r[33] == 3, "programmatic launch", "wrong result");
    }
    for (int broken = 0; broken < 2; broken++) {
        int before = emu_reports();
        bench b(seed);
        b.kernel(&k_primary__emu, 20, 1, 0);
        b.kernel(&k_forward__emu, 20, 1, broken, true, true);
        b.kernel(&k_second__emu, 20, 1, 0, true, true);
        std::vector<uint32_t> r = b.result();
        expect_report("two programmatic launches", broken ? "race" : nullptr, before);
        if (!broken) check(r[33] == 3, "two programmatic launches", "wrong result");
    }
    for (int broken = 0; broken < 2; broken++) {
        int before = emu_reports();
        bench b(seed);
        b.kernel(&k_primary__emu, 4, 1, 0);
        b.kernel(&k_dependent__emu, 4, 1, 1, !broken);
        emu_wait_all(b.dev);
        expect_report("two kernels without an edge", broken ? "race" : nullptr, before);
    }
    for (int broken = 0; broken < 2; broken++) {
        int before = emu_reports();
        bench b(seed);
        uint32_t host[64];
        b.kernel(&k_copy__emu, 2, 1, 0);
        b.copy(host, b.out, sizeof host, !broken);
        emu_wait_all(b.dev);
        expect_report("a copy beside a kernel", broken ? "race" : nullptr, before);
    }
}

// A host that waits for one operation may use its result, and nothing of another.
static void waits(uint64_t seed)
{
    bench b(seed);
    int before = emu_reports();
    uint32_t host[32];
    b.kernel(&k_copy__emu, 1, 1, 0);
    emu_wait(b.last);
    b.copy(host, b.out, sizeof host, false);
    emu_wait(b.last);
    expect_report("an edge through the host", nullptr, before);
    check(host[7] == 7, "an edge through the host", "wrong result");
    while (!emu_done(b.last)) {}
    b.kernel(&k_copy__emu, 4, 1, 0);
    for (int i = 0; i < 100000 && !emu_done(b.last); i++) {}
    check(emu_done(b.last), "emu_done", "never");
}

static void memory(uint64_t seed)
{
    int before = emu_reports();
    {
        bench b(seed);
        b.kernel(&k_copy__emu, 1, 1, 0);
        emu_free(b.dev, b.out);
        emu_wait_all(b.dev);
        expect_report("freed too early", "freed allocation 2", before);
    }
    before = emu_reports();
    bench b(seed);
    emu_free(b.dev, b.flag);
    check(!emu_free(b.dev, b.flag), "freed twice", "accepted");
    expect_report("freed twice", "freed before", before);
    before = emu_reports();
    check(!emu_free(b.dev, b.out + 1), "not an allocation", "freed");
    uint32_t host[32];
    b.copy(host, b.in + WORDS - 8, sizeof host);
    check(emu_wait(b.last) == EMU_ILLEGAL_ADDRESS, "a copy behind the end", "accepted");
    check(emu_wait_all(b.dev) == EMU_ILLEGAL_ADDRESS, "after a report", "the device still works");
    emu_device_recover(b.dev);
    b.kernel(&k_access__emu, 1, 1, 0);
    check(b.result()[3] == 3 && emu_wait_all(b.dev) == EMU_OK, "after recovery", "the device does not work");
}

static void launches(uint64_t seed)
{
    int before = emu_reports();
    bench b(seed, 80);
    b.kernel(&k_bulk__emu, 1, 1, 0);
    emu_wait_all(b.dev);
    expect_report("a bulk copy on 8.0", "needs compute capability 9.0, this device has 8.0", before);
    before = emu_reports();
    bench c(seed, 80);
    c.kernel(&k_cluster__emu, 8, 4, 0);
    check(emu_wait_all(c.dev) == EMU_INVALID, "a cluster on 8.0", "launched");
    bench d(seed);
    d.kernel(&k_cluster__emu, 9, 4, 0);
    check(emu_wait_all(d.dev) == EMU_INVALID, "a grid that clusters do not divide", "launched");
    check(emu_device_create(70, 1) == nullptr, "capability 7.0", "created");
}

static std::string order_of_starts(uint64_t seed)
{
    static std::string *text;
    std::string s;
    text = &s;
    bench b(seed);
    for (int i = 0; i < 12; i++) {
        static const char names[] = "abcdefghijkl";
        emu_op_desc d = {};
        d.kind = EMU_OP_HOST;
        d.call = [](void *name) { *text += *(const char *)name; };
        d.data = (void *)(names + i);
        b.submit(d, false);
    }
    emu_wait_all(b.dev);
    return s;
}

static void replay()
{
    check(order_of_starts(5) == order_of_starts(5), "the same seed", "another order");
    check(order_of_starts(5) != order_of_starts(6), "another seed", "the same order");
    std::string reports[2];
    for (std::string &r : reports) {
        bench b(9);
        b.kernel(&k_smem__emu, 20, 1, 1);
        emu_wait_all(b.dev);
        r = emu_last_report();
    }
    check(reports[0].substr(0, 60) == reports[1].substr(0, 60), "replay", reports[0] + reports[1]);
    check(strstr(reports[0].c_str(), "MOE_EMU_SEED=9") != nullptr, "the seed is printed", reports[0]);
}

int main(int argc, char **argv)
{
    int seeds = argc > 1 ? atoi(argv[1]) : 3;
    if (!freopen("/dev/null", "w", stderr)) return 1;
    for (uint64_t seed = 1; seed <= (uint64_t)seeds; seed++) {
        for (const one_case &c : cases) run_case(c, seed);
        chains(seed);
        waits(seed);
        memory(seed);
        launches(seed);
    }
    replay();
    printf("test_engine: %d passed, %d failed\n", passed, failed);
    return failed != 0;
}
