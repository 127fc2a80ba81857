// A second file of a program whose implementation.c has the code; C or C++.
#include "../../moe.h"
#include <stdio.h>

int main(void)
{
    moe_error err;
    moe_routing_desc routing;
    if (moe_version() != MOE_VERSION) return 1;
    if (moe_routing_preset(MOE_ROUTING_DEFAULT, &routing, &err)) return 2;
    printf("%s\n", moe_routing_method_string(MOE_ROUTING_DEFAULT));
    return 0;
}
