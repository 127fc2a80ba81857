// test_embed.c - the kernel text inside the header is the file, byte for byte
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"

TEST(joined_pieces_are_the_file)
{
    static char text[1 << 20];
    int32_t count = 0;
    FILE *file = fopen("moe_kernels.cu.inc", "rb");
    REQUIRE(file != NULL);
    const size_t size = fread(text, 1, sizeof text, file);
    fclose(file);
    REQUIRE(size > 0 && size < sizeof text);
    const char *const *pieces = moe__kernel_pieces(&count);
    size_t at = 0;
    for (int32_t i = 0; i < count; i++) {
        const size_t length = strlen(pieces[i]);
        CHECK(length > 0 && length <= 4000);
        REQUIRE(length <= size - at);
        CHECK(memcmp(text + at, pieces[i], length) == 0);
        at += length;
    }
    CHECK_EQ(at, size);
}

TEST(digest_is_that_of_the_pieces)
{
    int32_t count = 0;
    const char *const *pieces = moe__kernel_pieces(&count);
    unsigned char digest[32];
    char hex[65];
    moe__sha256 sha;
    moe__sha256_init(&sha);
    for (int32_t i = 0; i < count; i++) moe__sha256_add(&sha, pieces[i], strlen(pieces[i]));
    moe__sha256_end(&sha, digest);
    for (int i = 0; i < 32; i++) snprintf(hex + 2 * i, 3, "%02x", (unsigned)digest[i]);
    CHECK_STR(moe__kernel_digest(), hex);
}

TEST_MAIN(
    T(joined_pieces_are_the_file)
    T(digest_is_that_of_the_pieces))
