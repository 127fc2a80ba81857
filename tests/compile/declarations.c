// The declarations alone.
#include "../../moe.h"
