// gpu_ptx.c - each wrapper of moe_kernels.cu.inc against C that knows nothing of it: on the emulated device, which has
// its own definition of every wrapper, and on hardware. The kernels: gpu_ptx.cu.inc.
#ifndef _GNU_SOURCE
#  define _GNU_SOURCE // fork
#endif
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "gpu.h"
#include "gpu_text.h"
#include <math.h>
#include <sys/wait.h>
#include <unistd.h>

// ---- programs -------------------------------------------------------------------------------------------------------

enum { CORE, HOPPER, WGMMA, PROGRAMS };

static moe_context *context; // its text is the kernel text with gpu_ptx.cu.inc behind it
static moe__cu_module modules[PROGRAMS];

typedef struct launch {
    const char *entry;
    int ctas, threads, smem; // smem: dynamic, bytes
    int ctas_y;              // 0: 1
    int cluster;             // 0: none
    int dependent;           // may start while the launch before it runs
} launch;

// struct ptx_args
typedef struct words {
    const void *in;
    void *out, *aux;
    uint32_t n, p, q, r;
} words;

static void close_programs(void)
{
    moe_context_destroy(context);
    gpu_close();
}

// All kernels of a program are in the module that its first one is loaded from.
static void load_program(int which)
{
    static const char *const first[PROGRAMS] = { "ptx_threads", "ptx_cluster", "ptx_registers" },
                      *const defines[PROGRAMS] = { "-DPTX_CORE", "-DPTX_HOPPER", "-DPTX_WGMMA" };
    static const int threads[PROGRAMS] = { 96, 64, 384 };
    moe__instance instance;
    moe__cu_function function = NULL;
    moe_error err;
    memset(&instance, 0, sizeof instance);
    instance.entry = first[which];
    snprintf(instance.name, sizeof instance.name, "gpu_ptx");
    snprintf(instance.defines, sizeof instance.defines, "%s", defines[which]);
    instance.args_bytes = sizeof(words);
    instance.threads = threads[which];
    if (moe__jit_load(context, &instance, 1, &function, &err) != MOE_OK) test_fail(__FILE__, __LINE__, err.text);
    for (const moe__kernel *k = context->jit->kernels; k != NULL && function != NULL; k = k->next)
        if (k->function == function) modules[which] = k->module;
}

// 1 when this program is loaded; else the test is left out or has failed.
static int open_program(int which)
{
    static const int least[PROGRAMS] = { 80, 90, 90 };
    if (!gpu_open()) return 0;
    if (gpu.cuda->arch < least[which] || (which == WGMMA && strcmp(gpu.cuda->chip, "sm_90a") != 0)) {
        test_not_here("the chip has no such instructions");
        return 0;
    }
    if (context == NULL) {
        context = gpu_text_open(test_data("gpu_ptx.cu.inc"));
        test_last = close_programs;
    }
    if (context != NULL && modules[which] == NULL) load_program(which);
    return modules[which] != NULL;
}

// Enqueued on the legacy stream; gpu_get() waits.
static void enqueue(const launch *l, void *args)
{
    moe__cu_function function = NULL;
    gpu_enter();
    for (int i = 0; i < PROGRAMS && function == NULL; i++)
        if (modules[i] != NULL && gpu.cuda->cuModuleGetFunction(&function, modules[i], l->entry) != 0) function = NULL;
    if (function == NULL) test_fail2(__FILE__, __LINE__, "no kernel", l->entry);
    else GPU_CALL(gpu_text_launch_grid(function, l->ctas, l->ctas_y > 0 ? l->ctas_y : 1, l->threads, l->cluster,
                                       l->dependent, l->smem, args));
    gpu_leave();
}

// Device memory of zeros.
static void *zeros(size_t bytes)
{
    void *host = calloc(bytes, 1), *at = gpu_copy(host, bytes);
    free(host);
    return at;
}

// Launches, and returns the `count` words of a.out; freed by the caller.
static uint32_t *run(const launch *l, words *a, size_t count)
{
    uint32_t *got = (uint32_t *)malloc(count * 4 + 4);
    a->out = gpu_make(count * 4);
    enqueue(l, a);
    gpu_get(got, a->out, count * 4);
    return got;
}

static void check_words(const char *what, const uint32_t *got, const uint32_t *want, size_t count, int line)
{
    char text[160];
    size_t wrong = 0, first = 0;
    for (size_t i = count; i-- > 0;)
        if (got[i] != want[i]) { wrong++; first = i; }
    if (wrong == 0) return;
    snprintf(text, sizeof text, "%d of %d words, [%d] is 0x%08x, not 0x%08x", (int)wrong, (int)count, (int)first,
             (unsigned)got[first], (unsigned)want[first]);
    test_fail2(__FILE__, line, what, text);
}

#define CHECK_WORDS(what, got, want, count) check_words((what), (got), (want), (count), __LINE__)

static uint32_t *random_words(size_t count, uint64_t seed)
{
    uint32_t *w = (uint32_t *)malloc(count * 4);
    for (size_t i = 0; i < count; i++) w[i] = test_random_u32(&seed);
    return w;
}

static uint32_t float_word(float v)
{
    uint32_t u;
    memcpy(&u, &v, 4);
    return u;
}

static float word_float(uint32_t u)
{
    float v;
    memcpy(&v, &u, 4);
    return v;
}

static int is_nan_word(uint32_t u) { return (u & 0x7fffffff) > 0x7f800000; }

// ---- threads, warps, barriers ---------------------------------------------------------------------------------------

// In a process of its own: what traps takes its context along. 0: it failed as it should; 2: there is no device.
static int trap_in_child(uint32_t thread)
{
    launch l = { "ptx_trap", 1, 32, 0, 0, 0, 0 };
    words a = { 0 };
    if (freopen("/dev/null", "w", stderr) == NULL || !open_program(CORE)) return 2;
    a.n = thread;
    a.out = gpu_make(128);
    enqueue(&l, &a);
    gpu_enter();
    return gpu.cuda->cuCtxSynchronize() != 0 ? 0 : 1;
}

TEST(trap_ends_a_launch) // first: the child opens the device, this process has not
{
    for (uint32_t thread = 5; thread < 64; thread += 50) { // the second is no thread of the launch
        int status = 0;
        pid_t child;
        fflush(stdout);
        child = fork();
        if (child == 0) {
            unsetenv("MOE_EMU_REPORT");
            _exit(trap_in_child(thread));
        }
        REQUIRE(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status));
        if (WEXITSTATUS(status) == 2) {
            test_skip("no device");
            return;
        }
        CHECK_EQ(WEXITSTATUS(status), thread == 5 ? 0 : 1);
    }
}

TEST(threads_know_where_they_are)
{
    launch l = { "ptx_threads", 3, 96, 4096, 2, 0, 0 };
    words a = { 0 };
    uint32_t *got, want[6 * 96 * 10];
    if (!open_program(CORE)) return;
    for (uint32_t b = 0; b < 6; b++)
        for (uint32_t t = 0; t < 96; t++) {
            const uint32_t one[10] = { t, 96, b % 3, b / 3, 3, t % 32, t / 32, 4096, 0, 100 };
            memcpy(want + (b * 96 + t) * 10, one, sizeof one);
        }
    got = run(&l, &a, 6 * 96 * 10);
    CHECK_WORDS("threads", got, want, 6 * 96 * 10);
    free(got);
    gpu_release();
}

TEST(shuffles)
{
    launch l = { "ptx_shuffles", 1, 32, 0, 0, 0, 0 };
    words a = { 0 };
    uint32_t *in = random_words(32, 1), *got, want[32 * 256];
    if (!open_program(CORE)) return;
    in[3] = 0x7fa00001; // a NaN that says more: floats are moved as they are
    a.in = gpu_copy(in, 128);
    a.p = 7;
    for (int s = 0; s < 32; s++)
        for (int i = 0; i < 32; i++) {
            uint32_t *w = want + s * 256 + i;
            w[0] = w[128] = in[(i * 7 + s) & 31];
            w[32] = w[160] = in[i ^ s];
            w[64] = w[192] = in[i - s >= 0 ? i - s : i];
            w[96] = w[224] = in[i + s < 32 ? i + s : i];
        }
    got = run(&l, &a, 32 * 256);
    CHECK_WORDS("shuffles", got, want, 32 * 256);
    free(got);
    free(in);
    gpu_release();
}

TEST(votes_matches_and_reductions)
{
    enum { STEPS = 40 };
    launch l = { "ptx_votes", 1, 32, 0, 0, 0, 0 };
    words a = { 0 };
    uint32_t *in = random_words(STEPS * 32, 2), *got, want[STEPS * 224];
    if (!open_program(CORE)) return;
    for (int i = 0; i < 20 * 32; i++) in[i] %= 5;
    for (int s = 0; s < STEPS; s++) {
        const uint32_t *v = in + s * 32;
        uint32_t votes = 0, max = 0, min = ~0u, sum = 0, any = 0;
        for (int i = 0; i < 32; i++) {
            votes |= (v[i] & 1) << i;
            max = v[i] > max ? v[i] : max;
            min = v[i] < min ? v[i] : min;
            sum += v[i];
            any |= v[i];
        }
        for (int i = 0; i < 32; i++) {
            uint32_t same = 0, *w = want + s * 224 + i;
            for (int j = 0; j < 32; j++) same |= (uint32_t)(v[j] == v[i]) << j;
            w[0] = votes;
            w[32] = same;
            w[64] = max;
            w[96] = min;
            w[128] = sum;
            w[160] = any;
            w[192] = 1;
        }
    }
    a.in = gpu_copy(in, STEPS * 128);
    a.n = STEPS;
    got = run(&l, &a, STEPS * 224);
    CHECK_WORDS("votes", got, want, STEPS * 224);
    free(got);
    free(in);
    gpu_release();
}

TEST(named_barriers)
{
    enum { ROUNDS = 20 };
    static const uint32_t ids[7][2] = { { 1, 15 }, { 2, 14 }, { 3, 13 }, { 4, 12 }, { 5, 11 }, { 6, 10 }, { 8, 9 } };
    launch l = { "ptx_named_barriers", 1, 128, 512, 0, 0, 0 };
    uint32_t want[ROUNDS * 64];
    if (!open_program(CORE)) return;
    for (uint32_t r = 0; r < ROUNDS; r++)
        for (uint32_t t = 0; t < 64; t++) want[r * 64 + t] = r * 100 + 63 - ((t + 1) & 63);
    for (int i = 0; i < 7; i++) {
        words a = { 0 };
        uint32_t *got;
        a.n = ROUNDS;
        a.p = ids[i][0];
        a.q = ids[i][1];
        got = run(&l, &a, ROUNDS * 64);
        CHECK_WORDS("named barriers", got, want, ROUNDS * 64);
        free(got);
    }
    gpu_release();
}

// ---- atomics, order, memory -----------------------------------------------------------------------------------------

TEST(atomics_count_each_thread_once)
{
    enum { BLOCKS = 12, THREADS = BLOCKS * 64 };
    launch l = { "ptx_atomics", BLOCKS, 64, 512, 0, 0, 0 };
    words a = { 0 };
    uint32_t *in = random_words(THREADS, 3), *got, aux[64 + THREADS], max = 0, tickets = 0;
    uint64_t marks = 0;
    if (!open_program(CORE)) return;
    a.in = gpu_copy(in, THREADS * 4);
    a.aux = zeros(sizeof aux);
    got = run(&l, &a, BLOCKS * 68);
    gpu_get(aux, a.aux, sizeof aux);
    for (int b = 0; b < BLOCKS; b++) {
        uint32_t want[68] = { 64, 0, 64 * 63 / 2, 0 };
        for (int i = 0; i < 64; i++) {
            want[1] = in[b * 64 + i] > want[1] ? in[b * 64 + i] : want[1];
            want[4 + i] = 1;
        }
        max = want[1] > max ? want[1] : max;
        CHECK_WORDS("shared memory", got + b * 68, want, 68);
        tickets += (uint32_t)b * 3 + 1;
    }
    CHECK_EQ(aux[0], THREADS);
    CHECK_EQ(aux[1], THREADS * (THREADS - 1) / 2);
    CHECK_EQ(aux[2], max);
    CHECK_EQ(aux[3], BLOCKS);
    CHECK_EQ(aux[4], tickets);
    for (int i = 0; i < THREADS; i++) {
        CHECK(aux[64 + i] > 0 && aux[64 + i] <= THREADS);
        marks += aux[64 + i];
    }
    CHECK_EQ(marks, (uint64_t)THREADS * (THREADS + 1) / 2);
    free(got);
    free(in);
    gpu_release();
}

TEST(release_and_acquire_between_blocks)
{
    enum { ROUNDS = 30 };
    launch l = { "ptx_messages", 2, 64, 0, 0, 0, 0 };
    words a = { 0 };
    uint32_t *in = random_words(64, 4), *got, want[64], before[64];
    if (!open_program(CORE)) return;
    memcpy(want, in, sizeof want);
    for (uint32_t r = 0; r < ROUNDS; r++) {
        for (int t = 0; t < 64 && r > 0; t++) want[t] = want[t] * 3 + r;
        memcpy(before, want, sizeof want);
        for (int t = 0; t < 64; t++) want[t] = before[t ^ 5] + 1;
    }
    a.in = gpu_copy(in, 256);
    a.aux = zeros(512);
    a.n = ROUNDS;
    got = run(&l, &a, 64);
    CHECK_WORDS("messages", got, want, 64);
    free(got);
    free(in);
    gpu_release();
}

TEST(fence_inside_a_block)
{
    launch l = { "ptx_fence_cta", 1, 64, 256, 0, 0, 0 };
    words a = { 0 };
    uint32_t *in = random_words(32, 5), *got, want[32];
    if (!open_program(CORE)) return;
    for (int i = 0; i < 32; i++) want[i] = in[i ^ 1];
    a.in = gpu_copy(in, 128);
    got = run(&l, &a, 32);
    CHECK_WORDS("fence", got, want, 32);
    free(got);
    free(in);
    gpu_release();
}

TEST(loads)
{
    launch l = { "ptx_loads", 1, 64, 0, 0, 0, 0 };
    words a = { 0 };
    uint32_t *in = random_words(256, 6), *got, want[576];
    if (!open_program(CORE)) return;
    for (int t = 0; t < 64; t++) {
        memcpy(want + 4 * t, in + 4 * t, 16);
        memcpy(want + 256 + 4 * t, in + 4 * (63 - t), 16);
        want[512 + t] = in[3 * t];
    }
    a.in = gpu_copy(in, 1024);
    got = run(&l, &a, 576);
    CHECK_WORDS("loads", got, want, 576);
    free(got);
    free(in);
    gpu_release();
}

// ---- cp.async, mbarriers --------------------------------------------------------------------------------------------

TEST(cp_async_fills_with_zeros)
{
    launch l = { "ptx_cp_async", 1, 64, 2560, 0, 0, 0 };
    words a = { 0 };
    uint32_t *in = random_words(320, 7), *got, want[896];
    if (!open_program(CORE)) return;
    memset(want, 0, sizeof want);
    for (int t = 0; t < 64; t++) {
        memcpy(want + t * 4, in + t * 4, (size_t)t % 17);
        memcpy(want + 256 + t, in + 256 + t, (size_t)t % 5);
        memcpy(want + 320 + t * 4, in + (63 - t) * 4, 16);
    }
    memcpy(want + 576, want, 320 * 4);
    a.in = gpu_copy(in, 1280);
    got = run(&l, &a, 896);
    CHECK_WORDS("cp.async", got, want, 896);
    free(got);
    free(in);
    gpu_release();
}

// The phase of a parity "has completed" when the current one has the other parity.
TEST(mbarrier_phases_and_parity)
{
    static const uint32_t want[] = { 0, 1, 0, 1, 0, 1, 1, 0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 1, 1, 0 };
    launch l = { "ptx_mbarrier", 1, 32, 64, 0, 0, 0 }, phases = { "ptx_mbarrier_phases", 1, 128, 1024, 0, 0, 0 };
    words a = { 0 };
    uint32_t *got, read[10 * 128];
    if (!open_program(CORE)) return;
    got = run(&l, &a, 20);
    CHECK_WORDS("mbarrier", got, want, 20);
    free(got);
    for (uint32_t i = 0; i < 1280; i++) read[i] = i / 128 * 1000 + (i % 128 + 37) % 128;
    a.n = 10;
    got = run(&phases, &a, 1280);
    CHECK_WORDS("phases", got, read, 1280);
    free(got);
    gpu_release();
}

// ---- formats --------------------------------------------------------------------------------------------------------

typedef struct format {
    int mantissa, exponent, bias;
    uint32_t largest, infinity, nan; // of the positive half; infinity 0: saturates
} format;

enum { BF16, F16, E4M3, E5M2, FORMATS };
static const format formats[FORMATS] = {
    { 7, 8, 127, 0x7f7f, 0x7f80, 0x7fff }, { 10, 5, 15, 0x7bff, 0x7c00, 0x7fff },
    { 3, 4, 7, 0x7e, 0, 0x7f }, { 2, 5, 15, 0x7b, 0, 0x7f }
};

static int format_bits(const format *f) { return 1 + f->exponent + f->mantissa; }

// The number that a code without its sign stands for, were there no infinities and NaNs.
static double code_value(const format *f, uint32_t code)
{
    int e = (int)(code >> f->mantissa);
    double m = (double)(code & ((1u << f->mantissa) - 1));
    return e == 0 ? ldexp(m, 1 - f->bias - f->mantissa) : ldexp(m + ldexp(1, f->mantissa), e - f->bias - f->mantissa);
}

// The nearest code, by bisection among all of them; even at the middle.
static uint32_t narrow(const format *f, uint32_t word)
{
    uint32_t sign = word >> 31 << (format_bits(f) - 1), lo = 0, hi = f->largest + 1;
    double v = fabs((double)word_float(word)), below, above;
    if (is_nan_word(word)) return f->nan;
    while (hi - lo > 1) {
        uint32_t middle = lo + (hi - lo) / 2;
        if (code_value(f, middle) <= v) lo = middle;
        else hi = middle;
    }
    below = v - code_value(f, lo);
    above = code_value(f, lo + 1) - v;
    if (above < below || (above == below && lo % 2 == 1)) lo++;
    if (lo > f->largest) lo = f->infinity != 0 ? f->infinity : f->largest;
    return sign | lo;
}

static uint32_t narrow2(const format *f, uint32_t lo, uint32_t hi)
{
    return narrow(f, lo) | narrow(f, hi) << format_bits(f);
}

TEST(f16_and_e4m3_widen_exactly)
{
    launch l = { "ptx_widen", 8, 256, 0, 0, 0, 0 };
    words a = { 0 };
    uint32_t *got, wrong = 0, first = 0;
    if (!open_program(CORE)) return;
    a.p = gpu.cuda->arch >= 89;
    got = run(&l, &a, 131072);
    for (uint32_t i = 65536; i-- > 0;) {
        uint32_t mag = i & 0x7fff, want = float_word((float)code_value(&formats[F16], mag)) | i >> 15 << 31;
        if (mag == 0x7c00) want = 0x7f800000 | i >> 15 << 31;
        if (mag > 0x7c00 ? is_nan_word(got[i]) : got[i] == want) continue;
        wrong++;
        first = i;
    }
    for (uint32_t i = 65536; i-- > 0 && a.p;)
        for (int h = 0; h < 2; h++) {
            uint32_t code = i >> 8 * h & 255, value = got[65536 + i] >> 16 * h & 0xffff;
            uint32_t want = narrow(&formats[F16], float_word((float)code_value(&formats[E4M3], code & 127)));
            if ((code & 127) == 127 ? (value & 0x7fff) > 0x7c00 : value == (want | code >> 7 << 15)) continue;
            wrong++;
            first = 65536 + i;
        }
    if (wrong > 0) test_fail_numbers(__FILE__, __LINE__, "wrong ones, the first of them", wrong, first);
    free(got);
    gpu_release();
}

// Every exponent with mantissas at and beside the middle between two codes, then random words.
static uint32_t *narrow_inputs(uint32_t count)
{
    uint32_t *in = random_words(count, 8), at = 0;
    for (uint32_t e = 0; e < 512; e++)
        for (int m = 0; m < 24 && at + 3 < count; m++) {
            uint32_t word = e << 23 | (in[at] & 0x7fffff & ~((1u << m) - 1)) | (m > 0 ? 1u << (m - 1) : 0);
            in[at++] = word;
            in[at++] = (word & 0x7fffff) != 0 ? word - 1 : word;
            in[at++] = word + 1;
        }
    return in;
}

TEST(floats_narrow_to_the_nearest_even)
{
    const uint32_t count = 48 * 1024;
    launch l = { "ptx_narrow", 8, 256, 0, 0, 0, 0 };
    words a = { 0 };
    uint32_t *in = narrow_inputs(count), *got, *want = (uint32_t *)calloc(count, 16);
    if (!open_program(CORE)) return;
    a.in = gpu_copy(in, count * 4);
    a.n = count;
    a.p = gpu.cuda->arch >= 89;
    for (uint32_t i = 0; i < count; i++)
        for (int f = 0; f < (a.p ? 4 : 2); f++) want[4 * i + (uint32_t)f] = narrow2(&formats[f], in[i], in[i ^ 1]);
    got = run(&l, &a, count * 4);
    CHECK_WORDS("bf16x2, f16x2, e4m3x2, e5m2x2", got, want, count * 4);
    free(want);
    free(got);
    free(in);
    gpu_release();
}

static double bf16_double(uint32_t code)
{
    uint32_t word = code << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

// Codes below and above of those that lie around x y + z, by exact sums of the parts' differences: the nearer one, or
// the even one. Products of 8 bits each are exact in double; so is what is left of them next to a code.
static uint32_t fma_code(double x, double y, double z)
{
    double product = x * y, near = product + z, rest = fabs(product) > fabs(z) ? z - (near - product)
                                                                              : product - (near - z);
    uint32_t sign = near < 0 || (near == 0 && signbit(near)), code = 0, below;
    if (sign) {
        near = -near;
        rest = -rest;
    }
    for (uint32_t bit = 1u << 14; bit > 0; bit >>= 1) // the largest code that is not above
        if ((code | bit) < 0x7f80) {
            double over = bf16_double(code | bit) - near;
            if (over < 0 || (over == 0 && rest >= 0)) code |= bit;
        }
    below = code;
    if (below < 0x7f7f) {
        double down = near - bf16_double(below), up = bf16_double(below + 1) - near;
        if (down > up || (down == up && (rest > 0 || (rest == 0 && below % 2 == 1)))) code++;
    } else if (near - bf16_double(below) >= ldexp(1, 119)) {
        code = 0x7f80;
    }
    return code | sign << 15;
}

// Codes of every size, denormal ones and results too; exponents of the addend beside those of the product.
TEST(pairs_of_bf16_multiply_and_add)
{
    const uint32_t count = 65536;
    launch l = { "ptx_fma_bf16x2", 8, 256, 0, 0, 0, 0 };
    words a = { 0 };
    uint32_t *in = random_words(count * 3, 11), *got, *want = (uint32_t *)malloc(count * 4);
    if (!open_program(CORE)) return;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t *x = in + 3 * i;
        want[i] = 0;
        for (int h = 0; h < 32; h += 16) {
            uint32_t c[3];
            double v[3];
            for (int j = 0; j < 3; j++) {
                c[j] = x[j] >> h & 0xffff;
                if ((c[j] & 0x7f80) == 0x7f80) c[j] &= 0xbfff; // neither infinite nor NaN
                if (i % 8 == 1) c[j] &= 0x81ff;                // small exponents
            }
            if (i % 4 == 0) { // a sum of like sizes
                int e = (int)(c[0] >> 7 & 255) + (int)(c[1] >> 7 & 255) - 127 + (int)(x[2] >> 7 % 9);
                e = e < 0 ? 0 : e > 254 ? 254 : e;
                c[2] = (c[2] & 0x807f) | (uint32_t)e << 7;
            }
            if (i % 16 == 3) c[2] = 0x8000;
            if (i % 16 == 7) c[1] = 0x7e80; // 2^126
            for (int j = 0; j < 3; j++) {
                v[j] = bf16_double(c[j]);
                x[j] = (x[j] & ~(0xffffu << h)) | c[j] << h;
            }
            want[i] |= fma_code(v[0], v[1], v[2]) << h;
        }
    }
    a.in = gpu_copy(in, count * 12);
    a.n = count;
    got = run(&l, &a, count);
    CHECK_WORDS("fma.rn.bf16x2", got, want, count);
    free(want);
    free(got);
    free(in);
    gpu_release();
}

static void bit_counts(const uint32_t *in, uint32_t *w)
{
    uint32_t u = in[0], left = u << (in[1] & 31), right = u >> (in[1] & 31);
    uint64_t x = (uint64_t)u << 32 | in[1], y = (uint64_t)in[1] << 32 | in[2];
    uint64_t xl = x & 0xffffffff, xh = x >> 32, yl = y & 0xffffffff, yh = y >> 32;
    uint64_t middle = (xl * yl >> 32) + (xh * yl & 0xffffffff) + (xl * yh & 0xffffffff);
    uint64_t high = xh * yh + (xh * yl >> 32) + (xl * yh >> 32) + (middle >> 32);
    w[0] = w[2] = 0;
    w[1] = 32;
    for (uint32_t i = 0; i < 32; i++) {
        w[0] += u >> i & 1;
        if (right >> i & 1) w[1] = 31 - i;
        if (w[2] == 0 && (left >> i & 1)) w[2] = i + 1;
    }
    w[3] = (uint32_t)high;
    w[4] = (uint32_t)(high >> 32);
}

// Random words; of every fourth one the exponents lie together, so that sums cancel.
TEST(arithmetic_rounds_as_c_does)
{
    const uint32_t count = 32768;
    launch l = { "ptx_arithmetic", 8, 256, 0, 0, 0, 0 };
    words a = { 0 };
    uint32_t *in = random_words(count * 3, 9), *got, *want = (uint32_t *)malloc(count * 36);
    if (!open_program(CORE)) return;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t *x = in + 3 * i, *w = want + 9 * i;
        for (int j = 0; j < 3 && i % 4 == 0; j++) x[j] = (x[j] & 0x81ffffff) | 0x3e000000;
        if (i % 4 == 0) x[2] = float_word(-word_float(x[0]) * word_float(x[1])) ^ (i % 8 == 0 ? 0 : 1);
        volatile float f = word_float(x[0]), g = word_float(x[1]), h = word_float(x[2]), product = f * g;
        w[0] = float_word(sqrtf(f));
        w[1] = float_word(f / g);
        w[2] = float_word(fmaf(f, g, h));
        w[3] = float_word(product + h);
        bit_counts(x, w + 4);
    }
    a.in = gpu_copy(in, count * 12);
    a.n = count;
    got = run(&l, &a, count * 9);
    for (uint32_t i = 0; i < count * 9; i++)
        if (i % 9 < 4 && is_nan_word(got[i]) && is_nan_word(want[i])) got[i] = want[i];
    CHECK_WORDS("sqrt, /, fmaf, * +, popc, clz, ffs, umulhi64", got, want, count * 9);
    free(want);
    free(got);
    free(in);
    gpu_release();
}

// ---- warp matrices --------------------------------------------------------------------------------------------------

// Which element of 16 bits element e of lane l's word of matrix m is: rows of 8 x 16 bits, which the lanes 8 m ..
// 8 m + 7 name.
static int matrix_element(int m, int l, int e, int trans)
{
    int row = trans ? l % 4 * 2 + e : l / 4, column = trans ? l / 4 : l % 4 * 2 + e, lane = 8 * m + row;
    return (5 * lane + 3) % 32 * 8 + column;
}

static uint32_t element_of(const uint32_t *words_of, int at) { return words_of[at / 2] >> at % 2 * 16 & 0xffff; }

static const struct { int count, trans, at; } matrix_forms[6] = {
    { 1, 0, 0 }, { 1, 1, 1 }, { 2, 0, 2 }, { 2, 1, 4 }, { 4, 0, 6 }, { 4, 1, 10 }
};

TEST(ldmatrix_in_all_forms)
{
    launch l = { "ptx_ldmatrix", 1, 32, 2560, 0, 0, 0 };
    words a = { 0 };
    uint32_t *in = random_words(128, 10), *got, want[14 * 32];
    if (!open_program(CORE)) return;
    for (int f = 0; f < 6; f++)
        for (int m = 0; m < matrix_forms[f].count; m++)
            for (int i = 0; i < 32; i++)
                want[(matrix_forms[f].at + m) * 32 + i] =
                    element_of(in, matrix_element(m, i, 0, matrix_forms[f].trans)) |
                    element_of(in, matrix_element(m, i, 1, matrix_forms[f].trans)) << 16;
    a.in = gpu_copy(in, 512);
    got = run(&l, &a, 14 * 32);
    CHECK_WORDS("ldmatrix", got, want, 14 * 32);
    free(got);
    free(in);
    gpu_release();
}

TEST(stmatrix_in_all_forms)
{
    static const int counts[6] = { 1, 2, 4, 1, 2, 4 };
    launch l = { "ptx_stmatrix", 1, 32, 512, 0, 0, 0 };
    words a = { 0 };
    uint32_t *in = random_words(128, 11), *got, want[6 * 128];
    if (!open_program(HOPPER)) return;
    memset(want, 0, sizeof want);
    for (int f = 0; f < 6; f++)
        for (int m = 0; m < counts[f]; m++)
            for (int i = 0; i < 64; i++) {
                int at = matrix_element(m, i / 2, i % 2, f >= 3);
                want[f * 128 + at / 2] |= (in[i / 2 * 4 + m] >> i % 2 * 16 & 0xffff) << at % 2 * 16;
            }
    a.in = gpu_copy(in, 512);
    got = run(&l, &a, 6 * 128);
    CHECK_WORDS("stmatrix", got, want, 6 * 128);
    free(got);
    free(in);
    gpu_release();
}

// Small whole numbers, their sums exact in every order; `grid` of them are what every format holds.
static int whole(uint64_t *seed, int grid) { return (int)(test_random_u32(seed) % (uint32_t)(2 * grid + 1)) - grid; }

static int element_bytes(int type) { return type <= F16 ? 2 : 1; }

static void put_element(void *to, int type, size_t at, int value)
{
    uint32_t code = narrow(&formats[type], float_word((float)value));
    if (type <= F16) ((uint16_t *)to)[at] = (uint16_t)code;
    else ((uint8_t *)to)[at] = (uint8_t)code;
}

// One product of 16 x 8 over 32 bytes of K: a[32][4], b[32][2], d[32][4], and what it gives.
static void make_mma(int type, uint64_t *seed, uint32_t *in, uint32_t *want)
{
    int per_word = 4 / element_bytes(type), k = 8 * per_word, a[16][32], b[8][32], d[16][8];
    for (int i = 0; i < 16 * k; i++) a[i / k][i % k] = whole(seed, 8);
    for (int i = 0; i < 8 * k; i++) b[i / k][i % k] = whole(seed, 8);
    for (int i = 0; i < 128; i++) d[i / 8][i % 8] = whole(seed, 100);
    for (int i = 0; i < 32; i++) {
        for (int w = 0; w < 4; w++)
            for (int e = 0; e < per_word; e++)
                put_element(in + i * 4 + w, type, (size_t)e,
                            a[i / 4 + w % 2 * 8][w / 2 * 4 * per_word + i % 4 * per_word + e]);
        for (int w = 0; w < 2; w++)
            for (int e = 0; e < per_word; e++)
                put_element(in + 128 + i * 2 + w, type, (size_t)e, b[i / 4][w * 4 * per_word + i % 4 * per_word + e]);
        for (int w = 0; w < 4; w++) {
            int row = i / 4 + w / 2 * 8, column = i % 4 * 2 + w % 2, sum = d[row][column];
            in[192 + i * 4 + w] = float_word((float)sum);
            for (int j = 0; j < k; j++) sum += a[row][j] * b[column][j];
            want[i * 4 + w] = float_word((float)sum);
        }
    }
}

TEST(mma_adds_products)
{
    enum { STEPS = 8 };
    static const char *const names[] = { "mma_bf16", "mma_f16", "mma_e4m3" };
    launch l = { "ptx_mma", 1, 32, 0, 0, 0, 0 };
    uint64_t seed = 12;
    if (!open_program(CORE)) return;
    for (int type = 0; type < (gpu.cuda->arch >= 89 ? 3 : 2); type++) {
        words a = { 0 };
        uint32_t in[STEPS * 320], want[STEPS * 128], *got;
        for (int s = 0; s < STEPS; s++) make_mma(type, &seed, in + s * 320, want + s * 128);
        a.in = gpu_copy(in, sizeof in);
        a.n = STEPS;
        a.p = (uint32_t)type;
        got = run(&l, &a, STEPS * 128);
        CHECK_WORDS(names[type], got, want, STEPS * 128);
        free(got);
    }
    gpu_release();
}

// ---- clusters -------------------------------------------------------------------------------------------------------

static void expect_cluster(const uint32_t *in, uint32_t block, uint32_t *w)
{
    uint32_t first = block / 4 * 4, rank = block % 4;
    memset(w, 0, 326 * 4);
    w[0] = rank;
    w[1] = 4;
    memcpy(w + 2, in + (first + (rank + 1) % 4) * 64, 256);
    memcpy(w + 66, in + (first + (rank + 2) % 4) * 64, 256);
    for (uint32_t i = 0; i < 64; i++) w[130 + i] = (first + (rank + 1) % 4) * 1000 + i;
    w[194] = rank == 0 ? 256 : 0;
    w[195] = 4 * (64 * 63 / 2) + 64 * (0 + 1 + 2 + 3);
    w[196] = float_word(0.25f * 4 * (64 * 65 / 2));
    for (uint32_t i = 0; i < 128; i++) w[198 + i] = rank == 0 ? 0x00010001 : 0;
}

TEST(shared_memory_of_other_blocks)
{
    launch l = { "ptx_cluster", 8, 64, 2048, 0, 4, 0 };
    words a = { 0 };
    uint32_t *in = random_words(512, 13), *got, want[8 * 326];
    if (!open_program(HOPPER)) return;
    for (uint32_t b = 0; b < 8; b++) expect_cluster(in, b, want + b * 326);
    a.in = gpu_copy(in, 2048);
    got = run(&l, &a, 8 * 326);
    CHECK_WORDS("cluster", got, want, 8 * 326);
    free(got);
    free(in);
    gpu_release();
}

TEST(mbarriers_of_other_blocks)
{
    launch l = { "ptx_cluster_barriers", 8, 64, 1088, 0, 4, 0 };
    words a = { 0 };
    uint32_t *in = random_words(512, 14), *got;
    if (!open_program(HOPPER)) return;
    a.in = gpu_copy(in, 2048);
    got = run(&l, &a, 8 * 164);
    for (uint32_t b = 0; b < 8; b++) {
        uint32_t want[164], first = b / 4 * 4, rank = b % 4;
        memset(want, 0, sizeof want);
        for (uint32_t i = 0; i < 4; i++) want[32 + i] = (first + i) * 10 + rank;
        for (uint32_t i = 0; i < 4; i++) want[160 + i] = i == rank ? 0 : (first + i) * 100 + rank;
        memcpy(want + 96, in + (first + (rank + 3) % 4) * 64, 256);
        for (int i = 0; i < 3; i++) want[i] = 1;
        CHECK_WORDS("parities", got + b * 164, want, 6);
        CHECK_WORDS("words", got + b * 164 + 32, want + 32, 132);
    }
    free(got);
    free(in);
    gpu_release();
}

TEST(multicast_to_the_blocks_of_a_mask)
{
    static const uint32_t masks[] = { 15, 11, 6, 8, 1 };
    launch l = { "ptx_multicast", 4, 128, 1088, 0, 4, 0 };
    uint32_t *in = random_words(256, 15);
    if (!open_program(HOPPER)) return;
    for (int m = 0; m < 5; m++) {
        words a = { 0 };
        uint32_t *got;
        a.in = gpu_copy(in, 1024);
        a.p = masks[m];
        got = run(&l, &a, 4 * 256);
        for (int b = 0; b < 4; b++) {
            uint32_t want[256];
            memcpy(want, in, sizeof want);
            for (int i = 0; i < 128 && (masks[m] >> b & 1) == 0; i++) want[i] = 77;
            CHECK_WORDS("multicast", got + b * 256, want, 256);
        }
        free(got);
    }
    free(in);
    gpu_release();
}

// ---- bulk copies ----------------------------------------------------------------------------------------------------

static float bf16_float(uint32_t code) { return word_float(code << 16); }

TEST(bulk_copies_and_sums)
{
    launch l = { "ptx_bulk", 1, 128, 4160, 0, 0, 0 };
    words a = { 0 };
    uint32_t *in = random_words(1024, 16), *got, aux[648], want[648], tail[4];
    if (!open_program(HOPPER)) return;
    memset(aux, 0, sizeof aux);
    for (uint32_t i = 0; i < 256; i++) { // floats, of both widths, that cancel here and there
        in[256 + i] = (in[256 + i] & 0x83ffffff) | 0x3c000000;
        aux[256 + i] = (in[i] & 0x83ffffff) | 0x3c000000;
        in[512 + i] = (in[512 + i] & 0x83ff83ff) | 0x3c003c00;
        aux[512 + (i & 127)] = (in[768 + (i & 127)] & 0x83ff83ff) | 0x3c003c00;
    }
    memcpy(want, aux, sizeof want);
    for (uint32_t i = 0; i < 256; i++) {
        want[i] = in[i] + i;
        want[256 + i] = float_word(word_float(aux[256 + i]) + word_float(in[256 + i]));
    }
    for (int i = 0; i < 256; i++) {
        uint16_t x = ((uint16_t *)(aux + 512))[i], y = ((uint16_t *)(in + 512))[i];
        ((uint16_t *)(want + 512))[i] = (uint16_t)narrow(&formats[BF16], float_word(bf16_float(x) + bf16_float(y)));
    }
    want[640] = tail[3] = 9;
    for (int i = 644; i < 648; i++) want[i] = 5;
    tail[0] = want[17];
    tail[1] = want[256];
    tail[2] = want[512];
    a.in = gpu_copy(in, 4096);
    a.aux = gpu_copy(aux, sizeof aux);
    got = run(&l, &a, 1028);
    CHECK_WORDS("to shared memory", got, in, 1024);
    CHECK_WORDS("after the waits", got + 1024, tail, 4);
    gpu_get(aux, a.aux, sizeof aux);
    CHECK_WORDS("stored", aux, want, 256);
    CHECK_WORDS("sums of f32", aux + 256, want + 256, 256);
    CHECK_WORDS("sums of bf16", aux + 512, want + 512, 136);
    free(got);
    free(in);
    gpu_release();
}

TEST(mbarrier_counts_bytes)
{
    static const uint32_t notes[12] = { 0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 1, 0 };
    launch l = { "ptx_mbarrier_bytes", 1, 32, 320, 0, 0, 0 };
    words a = { 0 };
    uint32_t *in = random_words(16, 17), *got;
    if (!open_program(HOPPER)) return;
    a.in = gpu_copy(in, 64);
    got = run(&l, &a, 28);
    CHECK_WORDS("parities", got, notes, 12);
    CHECK_WORDS("bytes", got + 12, in, 16);
    free(got);
    free(in);
    gpu_release();
}

// ---- dependent launches ---------------------------------------------------------------------------------------------

TEST(dependent_launches)
{
    enum { BLOCKS = 4, TOTAL = BLOCKS * 64, CHAIN = 6 };
    launch l = { "ptx_dependent", BLOCKS, 64, 0, 0, 0, 0 };
    if (!open_program(HOPPER)) return;
    for (l.dependent = 0; l.dependent < 2; l.dependent++) {
        uint32_t *in = random_words(2 * TOTAL, 70), got[2 * TOTAL], want[2][2 * TOTAL];
        void *buffers[CHAIN + 1];
        memcpy(want[0], in, sizeof want[0]);
        buffers[0] = gpu_copy(in, sizeof want[0]);
        for (int i = 1; i <= CHAIN; i++) buffers[i] = gpu_make(sizeof want[0]);
        for (int i = 0; i < CHAIN; i++) {
            words a = { 0 };
            const uint32_t *from = want[i % 2];
            uint32_t *to = want[1 - i % 2];
            a.in = buffers[i];
            a.out = buffers[i + 1];
            a.n = 100;
            enqueue(&l, &a);
            for (uint32_t g = 0; g < TOTAL; g++) {
                uint32_t v = from[g], w = from[TOTAL + (g * 7 + 3) % TOTAL];
                to[g] = v + w;
                for (uint32_t r = 0; r < 100; r++) w = w * 5 + v;
                to[TOTAL + g] = w;
            }
        }
        gpu_get(got, buffers[CHAIN], sizeof got);
        CHECK_WORDS(l.dependent ? "dependent" : "one after the other", got, want[CHAIN % 2], 2 * TOTAL);
        free(in);
        gpu_release();
    }
}

// ---- warpgroup matrices ---------------------------------------------------------------------------------------------

static const int product_n[] = { 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256 };

// struct ptx_wgmma_args
typedef struct products {
    const void *a, *a_regs, *b, *start;
    void *out;
} products;

// Byte `at` of row r of an operand of 128 bytes of K: 0 none, 1 128-byte swizzle, 2 64, 3 32.
static uint32_t operand_byte(int layout, uint32_t rows, uint32_t r, uint32_t at)
{
    uint32_t width = layout == 0 ? 16 : 256u >> layout, p = at / width * rows * width + r * width + at % width;
    return layout == 0 ? p : p ^ (p >> 7 & (width / 16 - 1)) << 4;
}

// Images of `rows` rows of whole numbers in the four layouts.
static void *operand_images(int type, const int *values, uint32_t rows)
{
    uint32_t eb = (uint32_t)element_bytes(type), k = 128 / eb;
    uint8_t *images = (uint8_t *)malloc(4 * rows * 128);
    void *device;
    for (int layout = 0; layout < 4; layout++)
        for (uint32_t i = 0; i < rows * k; i++)
            put_element(images + layout * rows * 128 + operand_byte(layout, rows, i / k, i % k * eb), type, 0,
                        values[i]);
    device = gpu_copy(images, 4 * rows * 128);
    free(images);
    return device;
}

// A in registers: word i of thread t, K step s.
static void *operand_registers(int type, const int *values)
{
    uint32_t eb = (uint32_t)element_bytes(type), k = 128 / eb, regs[4 * 128 * 4];
    for (uint32_t w = 0; w < 2048; w++) {
        uint32_t s = w / 512, t = w / 4 % 128, i = w % 4, row = t / 32 * 16 + t % 32 / 4 + i % 2 * 8;
        for (uint32_t e = 0; e < 4 / eb; e++)
            put_element(&regs[w], type, e, values[row * k + (s * 32 + i / 2 * 16 + t % 4 * 4) / eb + e]);
    }
    return gpu_copy(regs, sizeof regs);
}

// Thread t's sum i is of this row of a and of b.
static void sum_place(uint32_t t, uint32_t i, uint32_t *row, uint32_t *column)
{
    *row = t / 32 * 16 + t % 32 / 4 + (i >> 1 & 1) * 8;
    *column = i / 4 * 8 + t % 4 * 2 + (i & 1);
}

static int dot(const int *a, const int *b, uint32_t k)
{
    int sum = 0;
    for (uint32_t i = 0; i < k; i++) sum += a[i] * b[i];
    return sum;
}

static void check_products(int type, uint32_t n)
{
    static const char *const names[FORMATS] = { "bf16", "f16", "e4m3", "e5m2" };
    uint32_t k = 128 / (uint32_t)element_bytes(type), half = n / 2, count = 128 * half;
    char entry[32];
    launch l = { NULL, 8, 128, 0, 0, 0, 0 };
    products p;
    uint64_t seed = 80 + n;
    int *a = (int *)malloc(64 * k * sizeof a[0]), *b = (int *)malloc(n * k * sizeof b[0]);
    uint32_t *start = (uint32_t *)malloc(count * 4), *got = (uint32_t *)malloc(16 * count * 4),
             *want[2] = { (uint32_t *)malloc(count * 4), (uint32_t *)malloc(count * 4) };
    for (uint32_t i = 0; i < 64 * k; i++) a[i] = whole(&seed, 4);
    for (uint32_t i = 0; i < n * k; i++) b[i] = whole(&seed, 4);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t row, column;
        int from = whole(&seed, 100), sum;
        sum_place(i / half, i % half, &row, &column);
        sum = dot(a + row * k, b + column * k, k);
        start[i] = float_word((float)from);
        want[0][i] = float_word((float)sum);
        want[1][i] = float_word((float)(sum + from));
    }
    p.a = operand_images(type, a, 64);
    p.a_regs = operand_registers(type, a);
    p.b = operand_images(type, b, n);
    p.start = gpu_copy(start, count * 4);
    p.out = gpu_make(16 * count * 4);
    snprintf(entry, sizeof entry, "ptx_%s_%d", names[type], (int)n);
    l.entry = entry;
    l.smem = 8192 + (int)n * 128;
    enqueue(&l, &p);
    gpu_get(got, p.out, 16 * count * 4);
    for (uint32_t c = 0; c < 16; c++) {
        char what[64];
        snprintf(what, sizeof what, "%s, layout %d, %s, accumulate %d", entry, (int)(c / 2 & 3), c % 2 ? "rs" : "ss",
                 (int)(c / 8));
        CHECK_WORDS(what, got + c * count, want[c / 8], count);
    }
    free(want[0]);
    free(want[1]);
    free(got);
    free(start);
    free(b);
    free(a);
    gpu_release();
}

static void check_type(int type)
{
    if (!open_program(WGMMA)) return;
    for (size_t i = 0; i < sizeof product_n / sizeof product_n[0]; i++) check_products(type, (uint32_t)product_n[i]);
}

TEST(wgmma_of_bf16) { check_type(BF16); }
TEST(wgmma_of_f16) { check_type(F16); }
TEST(wgmma_of_e4m3) { check_type(E4M3); }
TEST(wgmma_of_e5m2) { check_type(E5M2); }

TEST(wgmma_groups_complete_in_order)
{
    launch l = { "ptx_wgmma_groups", 1, 128, 8192 + 64 * 128, 0, 0, 0 };
    products p = { 0 };
    uint64_t seed = 90;
    int a[64 * 64], b[64 * 64];
    uint32_t want[8192], got[8192];
    if (!open_program(WGMMA)) return;
    for (int i = 0; i < 4096; i++) {
        a[i] = whole(&seed, 4);
        b[i] = whole(&seed, 4);
    }
    for (uint32_t i = 0; i < 4096; i++) {
        uint32_t row, column;
        sum_place(i / 32, i % 32, &row, &column);
        want[i] = float_word((float)dot(a + row * 64, b + column * 64, 64));
        want[4096 + i] = float_word((float)dot(a + row * 64, b + column * 64, 32));
    }
    p.a = operand_images(BF16, a, 64);
    p.b = operand_images(BF16, b, 64);
    p.out = gpu_make(sizeof got);
    enqueue(&l, &p);
    gpu_get(got, p.out, sizeof got);
    CHECK_WORDS("groups", got, want, 8192);
    gpu_release();
}

// ---- registers ------------------------------------------------------------------------------------------------------

TEST(registers_change_hands)
{
    launch l = { "ptx_registers", 1, 384, 0, 0, 0, 0 };
    words a = { 0 };
    uint32_t *in = random_words(64, 71), *got, want[384];
    if (!open_program(WGMMA)) return;
    for (uint32_t t = 0; t < 384; t++) {
        uint32_t v[64], sum = 0;
        for (uint32_t i = 0; i < 64; i++) v[i] = in[i] + t * i;
        for (int r = 0; r < 3; r++)
            for (int i = 0; i < 64; i++) v[i] = v[i] * 5 + v[(i + 17) & 63];
        for (int i = 0; i < 64; i++) sum ^= v[i];
        want[t] = t < 128 ? in[t & 63] + t : sum;
    }
    a.in = gpu_copy(in, 256);
    got = run(&l, &a, 384);
    CHECK_WORDS("registers", got, want, 384);
    free(got);
    free(in);
    gpu_release();
}

// ---- tensor copies --------------------------------------------------------------------------------------------------

enum { TENSOR_U8 = 0, TENSOR_F32 = 7, TENSOR_BF16 = 9 }; // of cuda.h

// struct ptx_map_args
typedef struct map_args {
    uint64_t map[16];
    const void *in;
    void *out;
    int32_t at[3];
    uint32_t bytes, rank, p;
    uint32_t padding[6];
} map_args;

typedef struct tensor {
    int type, element, rank, swizzle;
    uint64_t dims[3], strides[2];
    uint32_t box[3];
} tensor;

static int (*encode_tiled)(void *map, int type, uint32_t rank, void *base, const uint64_t *dims,
                           const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave,
                           int swizzle, int promotion, int fill);

// 1 when there are tensor maps.
static int open_tensors(void)
{
    if (!open_program(HOPPER)) return 0;
    gpu_symbol(gpu_library(), "cuTensorMapEncodeTiled", &encode_tiled);
    if (encode_tiled == NULL) test_fail(__FILE__, __LINE__, "no cuTensorMapEncodeTiled");
    return encode_tiled != NULL;
}

static uint32_t box_bytes(const tensor *t)
{
    return t->box[0] * t->box[1] * (t->rank > 2 ? t->box[2] : 1) * (uint32_t)t->element;
}

static uint64_t tensor_bytes(const tensor *t) { return t->strides[t->rank - 2] * t->dims[t->rank - 1]; }

static map_args *make_map(const tensor *t, void *base)
{
    static map_args storage[2];
    map_args *a = (map_args *)(((uintptr_t)storage + 63) / 64 * 64);
    static const uint32_t steps[3] = { 1, 1, 1 };
    memset(a, 0, sizeof *a);
    gpu_enter();
    GPU_CALL(encode_tiled(a->map, t->type, (uint32_t)t->rank, base, t->dims, t->strides, t->box, steps, 0, t->swizzle,
                          0, 0));
    gpu_leave();
    a->bytes = box_bytes(t);
    a->rank = (uint32_t)t->rank;
    return a;
}

// Where byte i of the box lies in shared memory, and in the tensor; -1: outside of it. A row that is written ends at a
// multiple of 16 bytes (seen on an H200).
static int64_t box_byte(const tensor *t, const int32_t *at, uint32_t i, int write, uint32_t *place)
{
    uint32_t width = t->box[0] * (uint32_t)t->element, element = i % width / (uint32_t)t->element;
    uint32_t row = i / width, y = row % t->box[1], z = row / t->box[1];
    int64_t c[3];
    static const uint32_t masks[4] = { 0, 1, 3, 7 };
    c[0] = at[0] + (int64_t)element;
    c[1] = at[1] + (int64_t)y;
    c[2] = t->rank > 2 ? at[2] + (int64_t)z : 0;
    *place = i ^ (i >> 7 & masks[t->swizzle]) << 4;
    for (int k = 0; k < t->rank; k++) {
        int64_t end = (int64_t)t->dims[k];
        if (k == 0 && write) end = (end * t->element + 15) / 16 * 16 / t->element;
        if (c[k] < 0 || c[k] >= end) return -1;
    }
    return c[0] * t->element + (int64_t)(i % (uint32_t)t->element) + c[1] * (int64_t)t->strides[0] +
           (t->rank > 2 ? c[2] * (int64_t)t->strides[1] : 0);
}

static const tensor tensors[] = {
    { TENSOR_BF16, 2, 2, 0, { 100, 20, 0 }, { 256, 0 }, { 64, 8, 0 } },
    { TENSOR_BF16, 2, 2, 3, { 100, 20, 0 }, { 256, 0 }, { 64, 16, 0 } },
    { TENSOR_BF16, 2, 2, 2, { 100, 20, 0 }, { 208, 0 }, { 32, 16, 0 } },
    { TENSOR_BF16, 2, 2, 1, { 100, 20, 0 }, { 256, 0 }, { 16, 24, 0 } },
    { TENSOR_U8, 1, 2, 3, { 300, 17, 0 }, { 304, 0 }, { 128, 8, 0 } },
    { TENSOR_F32, 4, 2, 3, { 50, 30, 0 }, { 256, 0 }, { 32, 16, 0 } },
    { TENSOR_F32, 4, 2, 0, { 50, 30, 0 }, { 256, 0 }, { 4, 5, 0 } },
    { TENSOR_BF16, 2, 3, 3, { 100, 7, 5 }, { 256, 2048 }, { 64, 4, 3 } },
    { TENSOR_U8, 1, 3, 0, { 48, 6, 4 }, { 48, 288 }, { 32, 4, 2 } }
};

// A box begins at a multiple of 16 bytes of its row, inside or outside of the tensor: x is in these units.
static const int32_t corners[][3] = { { 0, 0, 0 }, { 2, 3, 1 }, { -1, -2, -1 }, { 9, 15, 3 }, { 50, 40, 9 } };

static void corner(const tensor *t, int c, int32_t *at)
{
    memcpy(at, corners[c], sizeof corners[c]);
    at[0] *= 16 / t->element;
}

TEST(tensor_loads_of_boxes_that_stick_out)
{
    if (!open_tensors()) return;
    for (size_t n = 0; n < sizeof tensors / sizeof tensors[0]; n++) {
        const tensor *t = &tensors[n];
        uint64_t bytes = tensor_bytes(t);
        uint32_t *data = random_words(bytes / 4, 18 + n), box = box_bytes(t);
        launch l = { "ptx_tensor_load", 1, 128, 0, 0, 0, 0 };
        void *base = gpu_copy(data, bytes);
        l.smem = (int)box + 16;
        for (int c = 0; c < 5; c++) {
            map_args *a = make_map(t, base);
            uint8_t *want = (uint8_t *)calloc(box, 1), *got = (uint8_t *)malloc(box);
            corner(t, c, a->at);
            for (uint32_t i = 0; i < box; i++) {
                uint32_t place;
                int64_t from = box_byte(t, a->at, i, 0, &place);
                if (from >= 0) want[place] = ((uint8_t *)data)[from];
            }
            a->out = gpu_make(box);
            enqueue(&l, a);
            gpu_get(got, a->out, box);
            CHECK_WORDS(c < 2 ? "inside" : "sticks out", (uint32_t *)got, (uint32_t *)want, box / 4);
            free(got);
            free(want);
        }
        free(data);
        gpu_release();
    }
}

TEST(tensor_multicast)
{
    launch l = { "ptx_tensor_multicast", 2, 128, 0, 0, 2, 0 };
    const tensor *t = &tensors[1];
    uint32_t *data, box = box_bytes(t);
    if (!open_tensors()) return;
    data = random_words(tensor_bytes(t) / 4, 40);
    l.smem = (int)box + 16;
    for (uint32_t mask = 1; mask < 4; mask++) {
        map_args *a = make_map(t, gpu_copy(data, tensor_bytes(t)));
        uint32_t *want = (uint32_t *)malloc(2 * box), *got = (uint32_t *)malloc(2 * box);
        a->at[1] = 2;
        a->p = mask;
        for (uint32_t i = 0; i < box / 2; i++) want[i] = 77;
        for (uint32_t i = 0; i < 2 * box; i++) {
            uint32_t place, block = i / box;
            int64_t from = box_byte(t, a->at, i % box, 0, &place);
            if (mask >> block & 1) ((uint8_t *)want)[block * box + place] = from < 0 ? 0 : ((uint8_t *)data)[from];
        }
        a->out = gpu_make(2 * box);
        enqueue(&l, a);
        gpu_get(got, a->out, 2 * box);
        CHECK_WORDS("tensor multicast", got, want, box / 2);
        free(got);
        free(want);
    }
    free(data);
    gpu_release();
}

// What the box adds to element `at` of the tensor.
static void add_element(const tensor *t, uint8_t *at, const uint8_t *v)
{
    if (t->type == TENSOR_F32) {
        float x, y;
        memcpy(&x, at, 4);
        memcpy(&y, v, 4);
        x += y;
        memcpy(at, &x, 4);
    } else {
        uint16_t x, y;
        memcpy(&x, at, 2);
        memcpy(&y, v, 2);
        x = (uint16_t)narrow(&formats[BF16], float_word(bf16_float(x) + bf16_float(y)));
        memcpy(at, &x, 2);
    }
}

static void store_box(const tensor *t, const int32_t *at, uint8_t *data, const uint8_t *box, int add)
{
    for (uint32_t i = 0; i < box_bytes(t); i += (uint32_t)t->element) {
        uint32_t place;
        int64_t to = box_byte(t, at, i, 1, &place);
        if (to < 0) continue;
        if (add) add_element(t, data + to, box + place);
        else memcpy(data + to, box + place, (size_t)t->element);
    }
}

TEST(tensor_stores_and_sums_are_clipped)
{
    if (!open_tensors()) return;
    for (int n = 0; n < 7; n++)
        for (int add = 0; add < (tensors[n].type == TENSOR_U8 ? 1 : 2); add++) {
            const tensor *t = &tensors[n];
            uint64_t bytes = tensor_bytes(t), seed = 60;
            uint32_t *data = random_words(bytes / 4, 50), *box = random_words(box_bytes(t) / 4, 51);
            uint32_t mask = t->type == TENSOR_F32 ? 0x83ffffff : 0x83ff83ff;
            uint32_t set = t->type == TENSOR_F32 ? 0x3c000000 : 0x3c003c00;
            launch l = { "ptx_tensor_store", 1, 128, 0, 0, 0, 0 };
            void *base;
            for (uint64_t i = 0; i < bytes / 4; i++) data[i] = (data[i] & mask) | set;
            for (uint32_t i = 0; i < box_bytes(t) / 4; i++) box[i] = (test_random_u32(&seed) & mask) | set;
            base = gpu_copy(data, bytes);
            l.smem = (int)box_bytes(t);
            for (int c = 0; c < 5; c++) {
                map_args *a = make_map(t, base);
                corner(t, c, a->at);
                if (a->at[0] < 0) continue; // a box that is written begins inside: an H200 stops the kernel otherwise
                a->p = (uint32_t)add;
                a->in = gpu_copy(box, box_bytes(t));
                enqueue(&l, a);
                store_box(t, a->at, (uint8_t *)data, (const uint8_t *)box, add);
            }
            {
                uint32_t *got = (uint32_t *)malloc(bytes);
                gpu_get(got, base, bytes);
                CHECK_WORDS(add ? "tensor sums" : "tensor stores", got, data, bytes / 4);
                free(got);
            }
            free(box);
            free(data);
            gpu_release();
        }
}

TEST_MAIN(
    T(trap_ends_a_launch)
    T(threads_know_where_they_are)
    T(shuffles)
    T(votes_matches_and_reductions)
    T(named_barriers)
    T(atomics_count_each_thread_once)
    T(release_and_acquire_between_blocks)
    T(fence_inside_a_block)
    T(loads)
    T(cp_async_fills_with_zeros)
    T(mbarrier_phases_and_parity)
    T(f16_and_e4m3_widen_exactly)
    T(floats_narrow_to_the_nearest_even)
    T(arithmetic_rounds_as_c_does)
    T(pairs_of_bf16_multiply_and_add)
    T(ldmatrix_in_all_forms)
    T(stmatrix_in_all_forms)
    T(mma_adds_products)
    T(shared_memory_of_other_blocks)
    T(mbarriers_of_other_blocks)
    T(multicast_to_the_blocks_of_a_mask)
    T(bulk_copies_and_sums)
    T(mbarrier_counts_bytes)
    T(dependent_launches)
    T(wgmma_of_bf16)
    T(wgmma_of_f16)
    T(wgmma_of_e4m3)
    T(wgmma_of_e5m2)
    T(wgmma_groups_complete_in_order)
    T(registers_change_hands)
    T(tensor_loads_of_boxes_that_stick_out)
    T(tensor_multicast)
    T(tensor_stores_and_sums_are_clipped)
)
