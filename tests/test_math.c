// The fp32 functions of >>math: rounded as stated, the same bits from every compiler and instruction set.
// MOE_TEST_FULL=1 looks at every float from 2^-26 up to the end of the range, else at one in about five hundred.
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include <math.h>

// ---- errors against double libm ----

static double sigmoid64(double x) { return x < 0 ? exp(x) / (1 + exp(x)) : 1 / (1 + exp(-x)); }
static double softplus64(double x) { return (x > 0 ? x : 0) + log1p(exp(-fabs(x))); }
static double sqrt_softplus64(double x) { return sqrt(softplus64(x)); }

// Distance in units of the last place that a float has at `wanted`.
static double ulps(float got, double wanted)
{
    int exponent;
    double unit;
    if (isnan(wanted) || isnan(got)) return isnan(wanted) && isnan(got) ? 0 : 1e30;
    if (isinf((float)wanted) || isinf(got)) return (float)wanted == got ? 0 : 1e30;
    frexp(wanted, &exponent);
    unit = ldexp(1, exponent - 24);
    if (unit < 1.401298464324817e-45) unit = 1.401298464324817e-45; // the smallest denormal
    return fabs((double)got - wanted) / unit;
}

static double worst_of(float (*f)(float), double (*g)(double), uint32_t first, uint32_t last, uint32_t stride)
{
    double worst = 0;
    for (uint64_t bits = first; bits <= last; bits += stride) {
        float x = moe__bits_f32((uint32_t)bits);
        double error = ulps(f(x), g((double)x));
        if (!(error <= worst)) worst = error;
    }
    return worst;
}

// Largest error for |x| in [0, high], of one sign. Every binade's ends are looked at; dense from 2^-26 up in full mode,
// since below it all of these functions are a constant, or x times one.
static double worst_error(float (*f)(float), double (*g)(double), float high, int negative)
{
    uint32_t sign = negative ? 0x80000000u : 0, end = moe__f32_bits(high), dense = 0x32800000u;
    double worst = worst_of(f, g, sign, sign + (dense < end ? dense : end), 6007), error;
    if (end > dense) {
        error = worst_of(f, g, sign + dense, sign + end, test_full() ? 1 : 503);
        if (error > worst) worst = error;
    }
    for (uint32_t binade = 0; binade < 0x7f800000u && binade <= end; binade += 0x800000u)
        for (uint32_t bits = binade > 4 ? binade - 4 : 0; bits < binade + 4 && bits <= end; bits++) {
            error = ulps(f(moe__bits_f32(sign | bits)), g((double)moe__bits_f32(sign | bits)));
            if (error > worst) worst = error;
        }
    return worst;
}

static void check_error(const char *name, float (*f)(float), double (*g)(double), float low, float high, double limit)
{
    double worst = worst_error(f, g, high, 0), other = low < 0 ? worst_error(f, g, -low, 1) : 0;
    char text[128];
    if (other > worst) worst = other;
    snprintf(text, sizeof text, "%s is off by up to %.3f ulp, stated is %.2f", name, worst, limit);
    if (test_full()) printf("%s: %.3f ulp\n", name, worst);
    if (!(worst <= limit)) test_fail(__FILE__, __LINE__, text);
}

TEST(exp_is_within_1_03_ulp) { check_error("exp", moe__expf, exp, -120.0f, 100.0f, 1.03); }
TEST(log1p_is_within_1_43_ulp) { check_error("log1p", moe__log1pf, log1p, 0, 3.4028235e38f, 1.43); }
TEST(tanh_is_within_1_34_ulp) { check_error("tanh", moe__tanhf, tanh, -20.0f, 20.0f, 1.34); }
TEST(erf_is_within_1_11_ulp) { check_error("erf", moe__erff, erf, -10.0f, 10.0f, 1.11); }
TEST(sigmoid_is_within_2_41_ulp) { check_error("sigmoid", moe__sigmoidf, sigmoid64, -120.0f, 120.0f, 2.41); }
TEST(softplus_is_within_1_71_ulp) { check_error("softplus", moe__softplusf, softplus64, -120.0f, 120.0f, 1.71); }
TEST(sqrt_softplus_is_within_1_34_ulp)
{
    check_error("sqrt_softplus", moe__sqrt_softplusf, sqrt_softplus64, -215.0f, 120.0f, 1.34);
}

TEST(ends_of_the_ranges_are_what_the_comments_say)
{
    const float inf = moe__bits_f32(0x7f800000u), nan = moe__bits_f32(0x7fc00000u), big = 3.4028235e38f;
    float (*all[])(float) = { moe__expf, moe__log1pf, moe__tanhf, moe__erff, moe__sigmoidf, moe__softplusf,
                              moe__sqrt_softplusf, moe__sqrtf, moe__sqrtf_exact };
    for (int i = 0; i < 9; i++) CHECK(moe__is_nan(all[i](nan)));
    CHECK_EQ(moe__expf(inf), inf);
    CHECK_EQ(moe__expf(-inf), 0.0f);
    CHECK_EQ(moe__expf(88.7228317f), 3.40279851e38f);
    CHECK_EQ(moe__expf(88.7228394f), inf);
    CHECK_EQ(moe__expf(big), inf);
    CHECK_EQ(moe__expf(-big), 0.0f);
    CHECK_EQ(moe__expf(0), 1.0f);
    CHECK_EQ(moe__expf(-103.9f), 1.401298464e-45f); // the smallest denormal
    CHECK_EQ(moe__log1pf(inf), inf);
    CHECK_EQ(moe__log1pf(0), 0.0f);
    CHECK(moe__is_nan(moe__log1pf(-0.5f)));
    CHECK_EQ(moe__tanhf(inf), 1.0f);
    CHECK_EQ(moe__tanhf(-inf), -1.0f);
    CHECK_EQ(moe__erff(inf), 1.0f);
    CHECK_EQ(moe__erff(-big), -1.0f);
    CHECK_EQ(moe__sigmoidf(-inf), 0.0f);
    CHECK_EQ(moe__sigmoidf(inf), 1.0f);
    CHECK_EQ(moe__sigmoidf(0), 0.5f);
    CHECK_EQ(moe__softplusf(inf), inf);
    CHECK_EQ(moe__softplusf(-inf), 0.0f);
    CHECK_EQ(moe__sqrt_softplusf(-inf), 0.0f);
    CHECK_EQ(moe__sqrtf(-0.0f), 0.0f);
    CHECK_EQ(moe__f32_bits(moe__sqrtf(-0.0f)), 0x80000000u);
    CHECK(moe__is_nan(moe__sqrtf(-1.0f)));
}

TEST(odd_functions_are_odd_bit_by_bit)
{
    uint64_t state = 7;
    for (int i = 0; i < 100000; i++) {
        float x = moe__bits_f32(test_random_u32(&state) & 0x7fffffffu);
        if (moe__is_nan(x)) continue;
        CHECK_EQ(moe__f32_bits(moe__tanhf(-x)), moe__f32_bits(moe__tanhf(x)) ^ 0x80000000u);
        CHECK_EQ(moe__f32_bits(moe__erff(-x)), moe__f32_bits(moe__erff(x)) ^ 0x80000000u);
    }
}

// ---- fused multiply-add and square root against the instructions ----

#if defined(__GNUC__) && defined(__x86_64__)
#  define HAS_INSTRUCTION() __builtin_cpu_supports("fma")
static float fma_instruction(float a, float b, float c)
{
    __asm__("vfmadd231ss %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
    return c;
}
#elif defined(__GNUC__) && defined(__aarch64__)
#  define HAS_INSTRUCTION() 1
static float fma_instruction(float a, float b, float c)
{
    float out;
    __asm__("fmadd %s0, %s1, %s2, %s3" : "=w"(out) : "w"(a), "w"(b), "w"(c));
    return out;
}
#else
#  define HAS_INSTRUCTION() 0
static float fma_instruction(float a, float b, float c) { return moe__fmaf(a, b, c); }
#endif

static void check_fma(float a, float b, float c)
{
    float wanted = fma_instruction(a, b, c), soft = moe__fmaf_exact(a, b, c), used = moe__fmaf(a, b, c);
    int nan = moe__is_nan(wanted);
    char text[160];
    if (nan ? moe__is_nan(soft) && moe__is_nan(used)
            : moe__f32_bits(soft) == moe__f32_bits(wanted) && moe__f32_bits(used) == moe__f32_bits(wanted)) return;
    snprintf(text, sizeof text, "%.9g * %.9g + %.9g is %.9g, got %.9g and %.9g", (double)a, (double)b, (double)c,
             (double)wanted, (double)soft, (double)used);
    test_fail(__FILE__, __LINE__, text);
}

TEST(fma_in_software_is_the_instruction_bit_by_bit)
{
    static const uint32_t special[] = {
        0, 1, 2, 3, 0x007fffffu, 0x00800000u, 0x00800001u, 0x00ffffffu, 0x01000000u, 0x33800000u, 0x33ffffffu,
        0x34000000u, 0x34000001u, 0x3f000000u, 0x3f7fffffu, 0x3f800000u, 0x3f800001u, 0x3fffffffu, 0x40000000u,
        0x4b000000u, 0x4b000001u, 0x4b7fffffu, 0x4b800000u, 0x5f800000u, 0x7effffffu, 0x7f000000u, 0x7f7ffffeu,
        0x7f7fffffu, 0x7f800000u, 0x7f800001u, 0x7fc00000u, 0x1f800000u, 0x20000001u, 0x0d000003u,
    };
    const int count = (int)(sizeof special / sizeof special[0]), runs = test_full() ? 100000000 : 10000000;
    uint64_t state = 2026;
    if (!HAS_INSTRUCTION()) { test_skip("this processor has no fused multiply-add"); return; }
    for (int i = 0; i < 8 * count * count * count; i++) {
        uint32_t signs = (uint32_t)i % 8;
        int j = i / 8;
        check_fma(moe__bits_f32(special[j % count] | signs << 31),
                  moe__bits_f32(special[j / count % count] | (signs >> 1) << 31),
                  moe__bits_f32(special[j / count / count] | (signs >> 2) << 31));
    }
    for (int i = 0; i < runs; i++) {
        uint32_t a = test_random_u32(&state), b = test_random_u32(&state), c = test_random_u32(&state);
        uint32_t kind = a >> 5 & 7;
        float x = moe__bits_f32(a), y = moe__bits_f32(b), z = moe__bits_f32(c);
        if (kind < 3) z = -(x * y);                                          // all but the product's tail cancels
        if (kind == 1) z = moe__bits_f32(moe__f32_bits(z) + (b >> 3 & 3));
        if (kind == 3) { x = moe__bits_f32((a & 0x80ffffffu) | 0x3f000000u); // near ties: few bits in factors
                         y = moe__bits_f32((b & 0x8000f000u) | 0x3f800000u);
                         z = moe__bits_f32((c & 0x81fff000u) | 0x3e000000u); }
        if (kind == 4) { x = moe__bits_f32((a & 0x83ffffffu) | 0x1c000000u); // denormal results
                         y = moe__bits_f32((b & 0x83ffffffu) | 0x1c000000u);
                         z = moe__bits_f32(c & 0x81ffffffu); }
        check_fma(x, y, z);
    }
}

TEST(square_root_by_integers_is_the_instruction_bit_by_bit)
{
    uint64_t state = 9;
    for (int i = 0; i < 3000000; i++) {
        uint32_t bits = i < 4096 ? (uint32_t)i : test_random_u32(&state);
        float x = moe__bits_f32(i % 2 ? bits & 0x7fffffffu : i % 64 == 0 ? bits & 0x007fffffu : bits);
        float a = moe__sqrtf(x), b = moe__sqrtf_exact(x), c = (float)sqrt((double)x);
        if (moe__is_nan(c) ? moe__is_nan(a) && moe__is_nan(b)
                           : moe__f32_bits(a) == moe__f32_bits(c) && moe__f32_bits(b) == moe__f32_bits(c)) continue;
        test_fail_numbers(__FILE__, __LINE__, "square root", (double)x, (double)b);
    }
}

TEST(a_rounded_product_is_not_fused_with_a_sum)
{
    // (1 + e)^2 rounds to 1 + 2e; fused with - (1 + 2e) it would leave e^2.
    volatile float a = 1.00000012f, minus = -1.00000024f;
    CHECK_EQ(moe__mulf(a, a) + minus, 0.0f);
    CHECK(moe__fmaf(a, a, minus) > 0);
}

// ---- the bits ----

// Over 2^18 inputs of all exponents and both signs.
static uint64_t digest(float (*f)(float))
{
    uint64_t hash = 0xcbf29ce484222325u;
    for (uint64_t i = 0; i < 1u << 18; i++) {
        uint32_t bits = moe__f32_bits(f(moe__bits_f32((uint32_t)(i * 16411u))));
        if ((bits & 0x7fffffffu) > 0x7f800000u) bits = 0x7fc00000u; // which NaN is the machine's business
        hash = (hash ^ bits) * 0x100000001b3u;
    }
    return hash;
}

TEST(every_compiler_and_machine_gives_these_bits)
{
    const struct { const char *name; float (*f)(float); uint64_t digest; } table[] = {
        { "exp", moe__expf, 0x87ea0901f85dd1a8u },
        { "log1p", moe__log1pf, 0x8f72f9b043feae6bu },
        { "tanh", moe__tanhf, 0x268132c3777e1600u },
        { "erf", moe__erff, 0xc135512e04fa060au },
        { "sigmoid", moe__sigmoidf, 0x67030711a3577dceu },
        { "softplus", moe__softplusf, 0x0725776fce79b97fu },
        { "sqrt_softplus", moe__sqrt_softplusf, 0xbd72453422b8577eu },
        { "sqrt", moe__sqrtf, 0xb16fed05e639876eu },
    };
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        uint64_t got = digest(table[i].f);
        char text[96];
        snprintf(text, sizeof text, "%s has digest 0x%016llx", table[i].name, (unsigned long long)got);
        if (got != table[i].digest) test_fail(__FILE__, __LINE__, text);
    }
}

TEST_MAIN(T(exp_is_within_1_03_ulp) T(log1p_is_within_1_43_ulp) T(tanh_is_within_1_34_ulp) T(erf_is_within_1_11_ulp)
          T(sigmoid_is_within_2_41_ulp) T(softplus_is_within_1_71_ulp) T(sqrt_softplus_is_within_1_34_ulp)
          T(ends_of_the_ranges_are_what_the_comments_say) T(odd_functions_are_odd_bit_by_bit)
          T(fma_in_software_is_the_instruction_bit_by_bit) T(square_root_by_integers_is_the_instruction_bit_by_bit)
          T(a_rounded_product_is_not_fused_with_a_sum) T(every_compiler_and_machine_gives_these_bits))
