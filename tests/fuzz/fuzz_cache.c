// clang -g -O1 -fsanitize=fuzzer,address,undefined tests/fuzz/fuzz_cache.c -o build/fuzz_cache -lpthread
// build/fuzz_cache -max_total_time=20 build/new
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../../moe.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) // an entry of the cache folder; its first byte repairs parts
{
    moe__build build;
    unsigned char *entry;
    if (size < 1) return 0;
    memset(&build, 0, sizeof build);
    entry = (unsigned char *)malloc(size);
    memcpy(entry, data + 1, size - 1);
    size--;
    if (size >= MOE__ENTRY_HEADER) {
        if ((data[0] & 1) != 0) memcpy(entry, "moe.cubn", 8);
        if ((data[0] & 1) != 0) moe__put_le(entry + 8, MOE__ENTRY_FORMAT, 4);
        if ((data[0] & 2) != 0) memcpy(entry + 16, build.key, 32);
        if ((data[0] & 4) != 0) moe__put_le(entry + 48, size - MOE__ENTRY_HEADER, 8);
        if ((data[0] & 8) != 0) moe__sha256_of(entry + MOE__ENTRY_HEADER, size - MOE__ENTRY_HEADER, entry + 56);
    }
    if (moe__entry_defect(&build, entry, size) == NULL) { // then it is what was written
        unsigned char digest[32];
        if (size < MOE__ENTRY_HEADER) __builtin_trap();
        moe__sha256_of(entry + MOE__ENTRY_HEADER, size - MOE__ENTRY_HEADER, digest);
        if (memcmp(digest, entry + 56, 32) != 0) __builtin_trap();
    }
    free(entry);
    return 0;
}
