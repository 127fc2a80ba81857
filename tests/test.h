// test.h - the test programs' frame: checks, a table of tests, one closing line
//
//     #define MOE_STATIC
//     #define MOE_IMPLEMENTATION
//     #include "../moe.h"
//     #include "test.h"
//
//     TEST(ties_go_to_the_lower_id) { moe_error err; CHECK_OK(moe_...(&err)); CHECK_EQ(ids[0], 0); }
//     TEST_MAIN(T(ties_go_to_the_lower_id))
//
// A failed check prints where and what, and the test goes on; REQUIRE leaves it. A test passes when no check of it failed.
// Checks are made on the main thread. Arguments of a program: only tests whose name contains one of them run; --list.
// The last line is "NAME: N passed, N failed[, N skipped]"; the exit code is 0 only when none failed.
#ifndef TEST_H
#define TEST_H

#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__)
#  define TEST_UNUSED __attribute__((unused))
#else
#  define TEST_UNUSED
#endif

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#  define TEST_SANITIZED 1
#elif defined(__has_feature)
#  if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#    define TEST_SANITIZED 1
#  endif
#endif

typedef struct test_entry {
    const char *name;
    void (*run)(void);
} test_entry;

typedef struct test_state {
    const char *current;      // test that runs
    int failures;             // failed checks of it
    int skipped;              // 1: it asked to be left out; 2: it has no place here
    char paths[8][1024];      // of test_data and test_temp, used in turn
    int next_path;
} test_state;

static test_state test_now;

#ifdef MOE_H
TEST_UNUSED static moe_error err; // for tests that declare none of their own
#endif

// ---- checks ---------------------------------------------------------------------------------------------------------

static void test_fail(const char *file, int line, const char *what)
{
    test_now.failures++;
    if (test_now.failures <= 20) printf("%s:%d: %s: %s\n", file, line, test_now.current, what);
    if (test_now.failures == 20) printf("%s:%d: %s: further failures are not printed\n", file, line, test_now.current);
    fflush(stdout);
}

TEST_UNUSED static void test_fail2(const char *file, int line, const char *what, const char *values)
{
    char text[2048];
    snprintf(text, sizeof text, "%s: %s", what, values);
    test_fail(file, line, text);
}

TEST_UNUSED static void test_fail_numbers(const char *file, int line, const char *what, double a, double b)
{
    char text[128];
    snprintf(text, sizeof text, "%.17g, %.17g", a, b);
    test_fail2(file, line, what, text);
}

TEST_UNUSED static int test_near(double a, double b, double tolerance)
{
    if (a == b) return 1; // infinities
    return (a > b ? a - b : b - a) <= tolerance; // false for NaN
}

TEST_UNUSED static void test_check_string(const char *file, int line, const char *what, const char *a, const char *b)
{
    char text[1800];
    if (a != NULL && b != NULL && strcmp(a, b) == 0) return;
    snprintf(text, sizeof text, "\"%.800s\" and \"%.800s\"", a != NULL ? a : "(NULL)", b != NULL ? b : "(NULL)");
    test_fail2(file, line, what, text);
}

TEST_UNUSED static void test_check_contains(const char *file, int line, const char *what, const char *text,
                                            const char *part)
{
    char values[1800];
    if (text != NULL && strstr(text, part) != NULL) return;
    snprintf(values, sizeof values, "\"%.800s\" has no \"%.800s\"", text != NULL ? text : "(NULL)", part);
    test_fail2(file, line, what, values);
}

TEST_UNUSED static void test_check_result(const char *file, int line, const char *what, long result, long error_code,
                                          const char *text)
{
    char values[1024];
    if (result == 0 && error_code == 0) return;
    snprintf(values, sizeof values, "returned %ld, err.code %ld: %.800s", result, error_code, text);
    test_fail2(file, line, what, values);
}

TEST_UNUSED static void test_check_refusal(const char *file, int line, const char *what, long result, long code,
                                           long error_code, const char *error_member, const char *member,
                                           const char *text)
{
    char values[1200];
    if (result == code && error_code == code && text[0] != 0 &&
        (member == NULL || strcmp(member, error_member) == 0)) return;
    snprintf(values, sizeof values, "returned %ld, err.code %ld, member \"%.90s\", text \"%.600s\"; expected %ld, member \"%.90s\"",
             result, error_code, error_member, text, code, member != NULL ? member : "(any)");
    test_fail2(file, line, what, values);
}

#define CHECK(condition) \
    do { if (!(condition)) test_fail(__FILE__, __LINE__, #condition); } while (0)
#define REQUIRE(condition) \
    do { if (!(condition)) { test_fail(__FILE__, __LINE__, #condition); return; } } while (0)
#define CHECK_EQ(a, b) \
    do { \
        __typeof__(a) test_a_ = (a); \
        __typeof__(b) test_b_ = (b); \
        if (!(test_a_ == test_b_)) \
            test_fail_numbers(__FILE__, __LINE__, "CHECK_EQ(" #a ", " #b ")", (double)test_a_, (double)test_b_); \
    } while (0)
#define CHECK_NEAR(a, b, tolerance) \
    do { \
        double test_a_ = (double)(a), test_b_ = (double)(b); \
        if (!test_near(test_a_, test_b_, (double)(tolerance))) \
            test_fail_numbers(__FILE__, __LINE__, "CHECK_NEAR(" #a ", " #b ", " #tolerance ")", test_a_, test_b_); \
    } while (0)
#define CHECK_STR(a, b) test_check_string(__FILE__, __LINE__, "CHECK_STR(" #a ", " #b ")", (a), (b))
#define CHECK_CONTAINS(text, part) \
    test_check_contains(__FILE__, __LINE__, "CHECK_CONTAINS(" #text ", " #part ")", (text), (part))

// A call that takes &err, `err` being the moe_error in scope: it must succeed, or be refused with this code and, where
// `member` is not NULL, with exactly this member.
#define CHECK_OK(call) \
    do { \
        long test_result_ = (err.code = 0, err.text[0] = 0, (long)(call)); \
        test_check_result(__FILE__, __LINE__, #call, test_result_, (long)err.code, err.text); \
    } while (0)
#define REQUIRE_OK(call) \
    do { \
        int test_before_ = test_now.failures; \
        CHECK_OK(call); \
        if (test_now.failures != test_before_) return; \
    } while (0)
#define CHECK_ERR(call, expected, member_path) \
    do { \
        long test_result_ = (err.code = 0, err.text[0] = 0, err.member[0] = 0, (long)(call)); \
        test_check_refusal(__FILE__, __LINE__, #call, test_result_, (long)(expected), (long)err.code, err.member, \
                           (member_path), err.text); \
    } while (0)

// ---- what tests need ------------------------------------------------------------------------------------------------

// Leaves the running test out; `return` after it. The runner names it, and under CI=true it counts as failed.
// What this test is about does not exist here (an instruction of another chip): neither passed nor left out.
TEST_UNUSED static void test_not_here(const char *why)
{
    test_now.skipped = 2;
    printf("not here %s: %s\n", test_now.current, why);
}

TEST_UNUSED static void test_skip(const char *why)
{
    test_now.skipped = 1;
    printf("skipped %s: %s\n", test_now.current, why);
    fflush(stdout);
}

static const char *test_path(const char *variable, const char *otherwise, const char *name)
{
    char *path = test_now.paths[test_now.next_path++ % 8];
    const char *folder = getenv(variable);
    if (folder == NULL || folder[0] == 0) folder = otherwise;
    snprintf(path, sizeof test_now.paths[0], "%.500s/%.500s", folder, name);
    return path;
}

// Path of a file under tests/; programs run in the repository's root. Valid for the next seven paths.
TEST_UNUSED static const char *test_data(const char *name) { return test_path("MOE_TEST_DATA", "tests", name); }

// Path of a file that the test may write.
TEST_UNUSED static const char *test_temp(const char *name) { return test_path("MOE_TEST_TEMP", "build", name); }

TEST_UNUSED static int test_asked(const char *variable)
{
    const char *value = getenv(variable);
    return value != NULL && value[0] != 0 && value[0] != '0';
}

// The slow, exhaustive variant of a test was asked for (make check), or one for slow machines (valgrind).
TEST_UNUSED static int test_full(void) { return test_asked("MOE_TEST_FULL"); }
TEST_UNUSED static int test_small(void) { return test_asked("MOE_TEST_SMALL"); }

// splitmix64; any seed.
TEST_UNUSED static uint32_t test_random_u32(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ (z >> 31)) >> 32);
}

// A multiple of 2^-23 in [-1, 1).
TEST_UNUSED static float test_random_float(uint64_t *state)
{
    return (float)((int32_t)(test_random_u32(state) >> 8) - (1 << 23)) / (float)(1 << 23);
}

// ---- main -----------------------------------------------------------------------------------------------------------

static void test_crashed(int number)
{
    printf("crashed with signal %d in %s\n", number, test_now.current);
    fflush(stdout);
    signal(number, SIG_DFL);
    raise(number);
}

static int test_chosen(const char *name, int argc, char **argv)
{
    if (argc < 2) return 1;
    for (int i = 1; i < argc; i++)
        if (strstr(name, argv[i]) != NULL) return 1;
    return 0;
}

// Called behind the last test, where a program sets it; its checks fail as a test's do.
static void (*test_last)(void);

static int test_main(const test_entry *tests, int count, const char *file, int argc, char **argv)
{
    int passed = 0, failed = 0, skipped = 0;
    const char *name = file;
    for (const char *p = file; *p != 0; p++)
        if (*p == '/' || *p == '\\') name = p + 1;
    if (argc == 2 && strcmp(argv[1], "--list") == 0) {
        for (int i = 0; i < count; i++) printf("%s\n", tests[i].name);
        return 0;
    }
    signal(SIGABRT, test_crashed);
    signal(SIGFPE, test_crashed);
#ifndef TEST_SANITIZED
    signal(SIGSEGV, test_crashed);
#endif
    for (int i = 0; i < count; i++) {
        if (!test_chosen(tests[i].name, argc, argv)) continue;
        test_now.current = tests[i].name;
        test_now.failures = test_now.skipped = 0;
        tests[i].run();
        if (test_now.failures > 0) { failed++; printf("FAILED %s\n", tests[i].name); }
        else if (test_now.skipped) skipped += test_now.skipped == 1;
        else passed++;
    }
    test_now.current = "what the tests left behind";
    test_now.failures = 0;
    if (test_last != NULL) test_last();
    if (test_now.failures > 0) failed++;
    printf("%.*s: %d passed, %d failed", (int)strcspn(name, "."), name, passed, failed);
    if (skipped > 0) printf(", %d skipped", skipped);
    printf("\n");
    return failed != 0;
}

#define TEST(name) static void test__##name(void)
#define T(name) { #name, test__##name },
#define TEST_MAIN(tests) \
    int main(int argc, char **argv) \
    { \
        static const test_entry table[] = { tests }; \
        return test_main(table, (int)(sizeof table / sizeof table[0]), __FILE__, argc, argv); \
    }

#endif // TEST_H
