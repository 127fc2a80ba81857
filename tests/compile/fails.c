// Tests that fail in every way, for group_frame.sh.
#include <stdint.h>
typedef struct moe_error { int32_t code; char member[92], text[672]; } moe_error;
#include "../test.h"

static int32_t refused(moe_error *err)
{
    err->code = -1;
    strcpy(err->member, "a.b");
    strcpy(err->text, "moe: a.b is 1");
    return -1;
}

static int32_t accepted(moe_error *err) { err->code = 0; return 0; }

TEST(good)
{
    moe_error err;
    CHECK(1);
    CHECK_EQ(1, 1u);
    CHECK_NEAR(1, 1.5, 0.5);
    CHECK_STR("a", "a");
    CHECK_CONTAINS("abc", "bc");
    CHECK_OK(accepted(&err));
    CHECK_ERR(refused(&err), -1, "a.b");
    CHECK_ERR(refused(&err), -1, NULL);
}

TEST(check_condition) { CHECK(0); }
TEST(check_eq) { CHECK_EQ(1, 2); }
TEST(check_near) { CHECK_NEAR(1, 1.5, 0.25); CHECK_NEAR(0.0 / (double)(test_now.failures - 1), 0, 1); }
TEST(check_str) { CHECK_STR("a", "b"); }
TEST(check_contains) { CHECK_CONTAINS("abc", "d"); }
TEST(check_ok) { moe_error err; CHECK_OK(refused(&err)); }
TEST(check_err_accepted) { moe_error err; CHECK_ERR(accepted(&err), -1, NULL); }
TEST(check_err_member) { moe_error err; CHECK_ERR(refused(&err), -1, "a"); }
TEST(crash) { raise(SIGSEGV); }
TEST(leaves) { exit(0); }
TEST(hangs) { for (;;) signal(SIGUSR1, SIG_IGN); }
TEST(omits) { test_skip("why"); }

TEST_MAIN(T(good) T(check_condition) T(check_eq) T(check_near) T(check_str) T(check_contains) T(check_ok)
          T(check_err_accepted) T(check_err_member) T(crash) T(leaves) T(hangs) T(omits))
