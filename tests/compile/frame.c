// tests/test.h under strict warnings.
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../../moe.h"
#include "../test.h"

TEST(frame)
{
    uint64_t seed = 1;
    REQUIRE_OK(moe_routing_preset(MOE_ROUTING_DEFAULT, NULL, &err));
    CHECK_ERR(moe_routing_preset(MOE_ROUTING_UNSPECIFIED, NULL, &err), MOE_ERROR_ARGUMENT, "method");
    CHECK_EQ(test_random_u32(&seed), 0u);
    CHECK_NEAR(test_random_float(&seed), 0, 1);
    CHECK_STR(test_data("a"), "tests/a");
    CHECK_CONTAINS(test_temp("b"), "b");
    if (!test_full()) test_skip("never run: this file is only compiled");
}

TEST_MAIN(T(frame))
