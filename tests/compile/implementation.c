// The implementation alone, as a file of an engine has it.
#define MOE_IMPLEMENTATION
#include "../../moe.h"
