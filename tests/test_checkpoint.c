// test_checkpoint.c - safetensors folders: good ones, damaged ones, the golden ones; every allocation failing
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"

#include <sys/stat.h>
#if defined(_WIN32)
#  include <direct.h>
#  define make_folder(path) _mkdir(path)
#else
#  define make_folder(path) mkdir(path, 0777)
#endif

// ---- files to open -------------------------------------------------------------------------------------------------

#define INDEX "model.safetensors.index.json"

static const char *in_folder(const char *name) // of the test's own folder
{
    char path[200];
    snprintf(path, sizeof path, "checkpoint/%s", name);
    return test_temp(path);
}

static void write_bytes(const char *name, const void *data, size_t size)
{
    FILE *f;
    remove(in_folder(name)); // cut to nothing and written again, it would be flushed by some file systems
    f = fopen(in_folder(name), "wb");
    if (f == NULL || fwrite(data, 1, size, f) != size) test_fail2(__FILE__, __LINE__, "cannot write", name);
    if (f != NULL) fclose(f);
}

static void write_text(const char *name, const char *text) { write_bytes(name, text, strlen(text)); }

// length of the header, the header, `data` bytes counting up.
static void write_tensors_as(const char *name, uint64_t length, const char *header, size_t data)
{
    size_t size = strlen(header);
    unsigned char *bytes = (unsigned char *)malloc(8 + size + data);
    for (int i = 0; i < 8; i++) bytes[i] = (unsigned char)(length >> (8 * i));
    memcpy(bytes + 8, header, size);
    for (size_t i = 0; i < data; i++) bytes[8 + size + i] = (unsigned char)i;
    write_bytes(name, bytes, 8 + size + data);
    free(bytes);
}

static void write_tensors(const char *name, const char *header, size_t data) { write_tensors_as(name, strlen(header),
                                                                                                header, data); }

// An empty folder for one test.
static void fresh_folder(void)
{
    static const char *const names[] = { INDEX, "model.safetensors", "a.safetensors", "b.safetensors", "config.json",
                                         "hf_quant_config.json", "out.bin" };
    make_folder(test_temp(""));
    make_folder(test_temp("checkpoint"));
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) remove(in_folder(names[i]));
}

static const char *folder(void) { return test_temp("checkpoint"); }

static moe_checkpoint_desc with_flags(uint32_t flags)
{
    moe_checkpoint_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.flags = flags;
    return desc;
}

// Opens mapped and read; both must agree.
static int32_t open_both(const char *path)
{
    moe_checkpoint_desc desc = with_flags(MOE_CHECKPOINT_READ);
    moe_checkpoint *ckpt = (moe_checkpoint *)&desc;
    int32_t read = moe_checkpoint_open(path, &desc, &ckpt, &err), mapped;
    CHECK((read == MOE_OK) == (ckpt != NULL));
    moe_checkpoint_close(ckpt);
    mapped = moe_checkpoint_open(path, NULL, &ckpt, &err);
    CHECK((mapped == MOE_OK) == (ckpt != NULL));
    CHECK_EQ(read, mapped);
    CHECK_EQ(mapped, err.code);
    CHECK((mapped == MOE_OK) == (err.text[0] == 0));
    moe_checkpoint_close(ckpt);
    return mapped;
}

// ---- good ones -----------------------------------------------------------------------------------------------------

TEST(a_file_gives_its_tensors_with_types_shapes_and_bytes)
{
    moe_checkpoint *ckpt;
    moe_checkpoint_tensor t;
    fresh_folder();
    write_tensors("model.safetensors",
                  "{\"__metadata__\":{\"format\":\"pt\"},\"z\":{\"dtype\":\"BF16\",\"shape\":[2,3],"
                  "\"data_offsets\":[4,16]},"
                  "\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]},"
                  "\"empty\":{\"dtype\":\"F32\",\"shape\":[0,7],\"data_offsets\":[16,16]},"
                  "\"four\":{\"dtype\":\"F4\",\"shape\":[3,2],\"data_offsets\":[16,19]},"
                  "\"scale\":{\"dtype\":\"F8_E8M0\",\"shape\":[2],\"data_offsets\":[19,21]},"
                  "\"six\":{\"dtype\":\"F6_E2M3\",\"shape\":[4],\"data_offsets\":[21,24]},"
                  "\"new\":{\"dtype\":\"F3_NEW\",\"shape\":[4],\"data_offsets\":[24,26],\"more\":[1]},"
                  "\"n\\u00e9\":{\"data_offsets\":[26,26],\"shape\":[1,1,1,1,1,1,1,0],\"dtype\":\"I64\"}}    ", 26);
    for (uint32_t flags = 0; flags < 2; flags++) {
        moe_checkpoint_desc desc = with_flags(flags);
        REQUIRE_OK(moe_checkpoint_open(in_folder("model.safetensors"), &desc, &ckpt, &err));
        CHECK_EQ(moe_checkpoint_count(ckpt), 8);
        REQUIRE_OK(moe_checkpoint_find(ckpt, "z", &t, &err));
        CHECK_STR(t.name, "z");
        CHECK_STR(t.file, "model.safetensors");
        CHECK_EQ(t.dtype, MOE_DTYPE_BF16);
        CHECK_EQ(t.rank, 2);
        CHECK(t.dims[0] == 2 && t.dims[1] == 3 && t.data_bytes == 12);
        CHECK_EQ(((const unsigned char *)t.data)[0], 4);
        CHECK_OK(moe_checkpoint_find(ckpt, "a", &t, &err));
        CHECK(t.rank == 0 && t.data_bytes == 4 && t.dtype == MOE_DTYPE_F32);
        CHECK_OK(moe_checkpoint_find(ckpt, "empty", &t, &err));
        CHECK(t.data_bytes == 0 && t.dims[1] == 7);
        CHECK_OK(moe_checkpoint_find(ckpt, "four", &t, &err));
        CHECK(t.dtype == MOE_DTYPE_E2M1 && t.data_bytes == 3 && ((const unsigned char *)t.data)[2] == 18);
        CHECK_OK(moe_checkpoint_find(ckpt, "scale", &t, &err));
        CHECK_EQ(t.dtype, MOE_DTYPE_UE8M0);
        CHECK_OK(moe_checkpoint_find(ckpt, "six", &t, &err));
        CHECK_EQ(t.dtype, MOE_DTYPE_UNSET);
        CHECK_OK(moe_checkpoint_find(ckpt, "new", &t, &err));
        CHECK(t.dtype == MOE_DTYPE_UNSET && t.data_bytes == 2);
        CHECK_OK(moe_checkpoint_find(ckpt, "n\xc3\xa9", &t, &err));
        CHECK_EQ(t.rank, 8);
        CHECK_ERR(moe_checkpoint_find(ckpt, "zz", &t, &err), MOE_ERROR_MISSING, "");
        CHECK_CONTAINS(err.text, "\"zz\"");
        CHECK(t.name == NULL);
        for (int32_t i = 0; i < 8; i++) {
            moe_checkpoint_tensor u;
            CHECK_OK(moe_checkpoint_at(ckpt, i, &t, &err));
            CHECK_OK(moe_checkpoint_find(ckpt, t.name, &u, &err));
            CHECK(u.data == t.data && u.name == t.name);
        }
        CHECK_STR(moe_checkpoint_config(ckpt, NULL), "");
        moe_checkpoint_close(ckpt);
    }
}

#define T1 "\"model.layers.4.mlp.experts.0.up_proj.weight\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}"
#define T2 "\"model.layers.9.mlp.experts.0.up_proj.weight\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}"
#define N1 "\"model.layers.4.mlp.experts.0.up_proj.weight\""
#define N2 "\"model.layers.9.mlp.experts.0.up_proj.weight\""

static void write_shards(const char *map)
{
    char index[2000];
    snprintf(index, sizeof index, "{\"metadata\":{\"total_size\":8},\"weight_map\":{%s}}", map);
    fresh_folder();
    write_text("config.json", "{\"model_type\":\"qwen3_moe\"}");
    write_text(INDEX, index);
    write_tensors("a.safetensors", "{" T1 "}", 4);
    write_tensors("b.safetensors", "{" T2 "}", 4);
}

TEST(a_folder_gives_the_tensors_of_all_shards_its_config_and_its_layers)
{
    moe_checkpoint *ckpt;
    moe_checkpoint_tensor t;
    int32_t layers[4] = { -1, -1, -1, -1 }, count;
    size_t bytes;
    write_shards(N1 ":\"a.safetensors\"," N2 ":\"b.safetensors\"");
    CHECK_EQ(open_both(folder()), MOE_OK);
    REQUIRE_OK(moe_checkpoint_open(folder(), NULL, &ckpt, &err));
    CHECK_EQ(moe_checkpoint_count(ckpt), 2);
    CHECK_OK(moe_checkpoint_find(ckpt, "model.layers.9.mlp.experts.0.up_proj.weight", &t, &err));
    CHECK_STR(t.file, "b.safetensors");
    CHECK_STR(moe_checkpoint_config(ckpt, &bytes), "{\"model_type\":\"qwen3_moe\"}");
    CHECK_EQ(bytes, strlen("{\"model_type\":\"qwen3_moe\"}"));
    CHECK_OK(moe_checkpoint_layers(ckpt, layers, 4, &count, &err));
    CHECK(count == 2 && layers[0] == 4 && layers[1] == 9 && layers[2] == -1);
    CHECK_OK(moe_checkpoint_layers(ckpt, layers + 2, 1, &count, &err));
    CHECK(count == 2 && layers[2] == 4 && layers[3] == -1);
    CHECK_OK(moe_checkpoint_layers(ckpt, NULL, 0, &count, &err));
    CHECK_EQ(count, 2);
    moe_checkpoint_close(ckpt);
    moe_checkpoint_close(NULL);
    CHECK_EQ(moe_checkpoint_count(NULL), 0);
    CHECK_STR(moe_checkpoint_config(NULL, NULL), "");
}

TEST(a_path_with_a_separator_at_its_end_and_one_in_utf8_are_opened)
{
    char path[1100];
    write_shards(N1 ":\"a.safetensors\"");
    snprintf(path, sizeof path, "%s/", folder());
    CHECK_EQ(open_both(path), MOE_OK);
    write_tensors("\xc3\xa9.safetensors", "{}", 0);
#if !defined(_WIN32) // fopen() takes no UTF-8 there, so the test cannot make the file
    CHECK_EQ(open_both(in_folder("\xc3\xa9.safetensors")), MOE_OK);
#endif
    remove(in_folder("\xc3\xa9.safetensors"));
}

TEST(many_tensors_are_found_by_name)
{
    enum { COUNT = 20000 };
    char *header = (char *)malloc(COUNT * 100), *p = header;
    moe_checkpoint *ckpt;
    int found = 0;
    fresh_folder();
    *p++ = '{';
    for (int i = COUNT - 1; i >= 0; i--) // against the order of places
        p += sprintf(p, "\"model.layers.%d.t%d\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[%d,%d]}%s", i % 61,
                     i, i,
                     i + 1, i > 0 ? "," : "}");
    write_tensors("model.safetensors", header, COUNT);
    REQUIRE_OK(moe_checkpoint_open(folder(), NULL, &ckpt, &err));
    for (int i = 0; i < COUNT; i++) {
        moe_checkpoint_tensor t;
        char name[40];
        snprintf(name, sizeof name, "model.layers.%d.t%d", i % 61, i);
        found += moe_checkpoint_find(ckpt, name, &t,
                                     &err) == MOE_OK && *(const unsigned char *)t.data == (unsigned char)i;
    }
    CHECK_EQ(found, COUNT);
    moe_checkpoint_close(ckpt);
    free(header);
}

// ---- damage --------------------------------------------------------------------------------------------------------

#define ENTRY(name, dtype, shape, begin, end) \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":[" shape "],\"data_offsets\":[" #begin "," #end "]}"

TEST(damaged_headers_are_refused_with_the_tensor_and_the_reason)
{
    static const struct { const char *header; size_t data; const char *text; } cases[] = {
        { "{" ENTRY("a", "U8", "4", 0, 4) "}", 3, "[0, 4]: the file has 3 bytes" },
        { "{" ENTRY("a", "U8", "4", 0, 4) "}", 5, "behind the last tensor" },
        { "{" ENTRY("a", "U8", "4", 4, 0) "}", 4, "[4, 0]" },
        { "{" ENTRY("a", "U8", "4", -1, 3) "}", 4, "[-1, 3]" },
        { "{" ENTRY("a", "U8", "4", 0, 5) "}", 5, "has 5 bytes: 4 elements of type U8 are 32 bits" },
        { "{" ENTRY("a", "F32", "4", 0, 4) "}", 4, "are 128 bits" },
        { "{" ENTRY("a", "F4", "3", 0, 1) "}", 1, "are 12 bits" },
        { "{" ENTRY("a", "U8", "4", 0, 4) "," ENTRY("b", "U8", "4", 2, 6) "}", 6, "overlap at byte 2" },
        { "{" ENTRY("a", "U8", "4", 0, 4) "," ENTRY("b", "U8", "4", 0, 4) "}", 4, "overlap at byte 0" },
        { "{" ENTRY("a", "U8", "4", 0, 4) "," ENTRY("b", "U8", "4", 5, 9) "}", 9, "in front of tensor \"b\"" },
        { "{" ENTRY("a", "U8", "4", 1, 5) "}", 5, "bytes 0 to 1" },
        { "{" ENTRY("a", "U8", "4", 0, 4) "," ENTRY("a", "U8", "4", 4, 8) "}", 8, "two tensors \"a\"" },
        { "{" ENTRY("a", "U8", "4", 0, 4) "," ENTRY("\\u0061", "U8", "4", 4, 8) "}", 8, "two tensors \"a\"" },
        { "{" ENTRY("a", "U8", "4294967296,4294967296", 0, 4) "}", 4, "product over 2^64" },
        { "{" ENTRY("a", "F32", "2305843009213693952,4", 0, 0) "}", 0, "has 0 bytes" },
        { "{" ENTRY("a", "U8", "9223372036854775808", 0, 4) "}", 4, "no integer" },
        { "{" ENTRY("a", "U8", "-4", 0, 4) "}", 4, "no integer" },
        { "{" ENTRY("a", "U8", "4.5", 0, 4) "}", 4, "no integer" },
        { "{" ENTRY("a", "U8", "\"4\"", 0, 4) "}", 4, "no integer" },
        { "{" ENTRY("a", "U8", "1,1,1,1,1,1,1,1,4", 0, 4) "}", 4, "more than 8 dimensions" },
        { "{" ENTRY("a", "U8", "4", 0, 9223372036854775807) "}", 4, "the file has 4 bytes" },
        { "{" ENTRY("a", "U8", "4", 0, 18446744073709551616) "}", 4, "data_offsets" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":[4]}}", 4, "data_offsets" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0]}}", 4, "data_offsets" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4,4]}}", 4, "data_offsets" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":{\"0\":0,\"1\":4}}}", 4, "data_offsets" },
        { "{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,4]}}", 4, "\"shape\"" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":4,\"data_offsets\":[0,4]}}", 4, "\"shape\"" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":{\"x\":4},\"data_offsets\":[0,4]}}", 4, "\"shape\"" },
        { "{\"a\":{\"shape\":[4],\"data_offsets\":[0,4]}}", 4, "\"dtype\"" },
        { "{\"a\":{\"dtype\":8,\"shape\":[4],\"data_offsets\":[0,4]}}", 4, "\"dtype\"" },
        { "{\"a\":[4]}", 4, "is no object" },
        { "{\"a\\u0000b\":{}}", 0, "zero byte" },
        { "{\"__metadata__\":1}", 0, "__metadata__" },
        { "{\"__metadata__\":{},\"__metadata__\":{}}", 0, "__metadata__" },
        { "[1]", 0, "begin with '{'" },
        { " {}", 0, "begin with '{'" },
        { "{}x", 0, "nothing behind the value" },
        { "{\"a\":", 0, "where it ends" },
        { "{\"\xff\":1}", 0, "UTF-8" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        int32_t result;
        fresh_folder();
        write_tensors("model.safetensors", cases[i].header, cases[i].data);
        result = open_both(folder());
        if (result != MOE_ERROR_FORMAT) test_fail2(__FILE__, __LINE__, "taken", cases[i].header);
        CHECK_CONTAINS(err.text, cases[i].text);
        CHECK_CONTAINS(err.text, "model.safetensors");
    }
}

TEST(wrong_header_lengths_are_refused)
{
    static const uint64_t lengths[] = { 0, 1, 3, 100, 100000001, 0x7fffffffffffffffu, 0xffffffffffffffffu,
                                       0xfffffffffffffff8u };
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        fresh_folder();
        write_tensors_as("model.safetensors", lengths[i], "{}", 0);
        CHECK_EQ(open_both(folder()), MOE_ERROR_FORMAT);
        CHECK_CONTAINS(err.text, "header");
    }
    for (size_t size = 0; size < 10; size++) {
        static const unsigned char bytes[10] = { 2, 0, 0, 0, 0, 0, 0, 0, '{', '}' };
        fresh_folder();
        write_bytes("model.safetensors", bytes, size);
        CHECK_EQ(open_both(folder()), MOE_ERROR_FORMAT);
    }
}

TEST(hostile_names_are_quoted_and_messages_stay_whole)
{
    char header[3000], *p = header;
    p += sprintf(p, "{\"\\u001b[31m\\n%%s%%n");
    memset(p, 'x', 600);
    p += 600;
    sprintf(p, "\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,5]}}");
    fresh_folder();
    write_tensors("model.safetensors", header, 5);
    CHECK_EQ(open_both(folder()), MOE_ERROR_FORMAT);
    CHECK_CONTAINS(err.text, "\\x1b[31m\\x0a%s%n");
    CHECK_CONTAINS(err.text, "are 32 bits");
    memset(header + 2, 'y', 2000); // longer than any name that is taken
    strcpy(header + 2002, "\":{}}");
    write_tensors("model.safetensors", header, 0);
    CHECK_EQ(open_both(folder()), MOE_ERROR_FORMAT);
    CHECK_CONTAINS(err.text, "at most 1023");
}

TEST(an_index_must_agree_with_its_shards)
{
    static const struct { const char *map; int32_t code; const char *text; } cases[] = {
        { N1 ":\"a.safetensors\"," N2 ":\"c.safetensors\"", MOE_ERROR_MISSING, "c.safetensors\" does not exist" },
        { N1 ":\"a.safetensors\"," N2 ":\"a.safetensors\"", MOE_ERROR_MISSING, "no file has it" },
        { N1 ":\"b.safetensors\"," N2 ":\"a.safetensors\"", MOE_ERROR_MISSING, "in another file than" },
        { "\"other\":\"a.safetensors\"", MOE_ERROR_MISSING, "names the tensor \"other\"" },
        { N1 ":\"../checkpoint/a.safetensors\"", MOE_ERROR_FORMAT, "plain name" },
        { N1 ":\"/etc/passwd\"", MOE_ERROR_FORMAT, "plain name" },
        { N1 ":\"..\"", MOE_ERROR_FORMAT, "plain name" },
        { N1 ":\".\"", MOE_ERROR_FORMAT, "plain name" },
        { N1 ":\"\"", MOE_ERROR_FORMAT, "plain name" },
        { N1 ":\"c:a.safetensors\"", MOE_ERROR_FORMAT, "plain name" },
        { N1 ":\"x\\\\a.safetensors\"", MOE_ERROR_FORMAT, "plain name" },
        { N1 ":\"a.safetensors\\u0000\"", MOE_ERROR_FORMAT, "zero byte" },
        { N1 ":3", MOE_ERROR_FORMAT, "no file name" },
        { "", MOE_ERROR_FORMAT, "empty" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        write_shards(cases[i].map);
        if (open_both(folder()) != cases[i].code) test_fail2(__FILE__, __LINE__, "another result", cases[i].map);
        CHECK_CONTAINS(err.text, cases[i].text);
    }
    write_shards(N1 ":\"a.safetensors\"");
    write_text(INDEX, "{\"weight_map\":[1]}");
    CHECK_EQ(open_both(folder()), MOE_ERROR_FORMAT);
    CHECK_CONTAINS(err.text, "weight_map");
    write_text(INDEX, "{\"weight_map\":{}");
    CHECK_EQ(open_both(folder()), MOE_ERROR_FORMAT);
    CHECK_CONTAINS(err.text, "is not JSON");
}

TEST(one_tensor_in_two_shards_is_refused)
{
    write_shards(N1 ":\"a.safetensors\"," N2 ":\"b.safetensors\"");
    write_tensors("b.safetensors", "{" T1 "}", 4);
    CHECK_EQ(open_both(folder()), MOE_ERROR_FORMAT);
    CHECK_CONTAINS(err.text, "both have a tensor");
}

TEST(an_index_of_too_many_files_is_refused)
{
    char *index = (char *)malloc(3000 * 40), *p = index;
    fresh_folder();
    p += sprintf(p, "{\"weight_map\":{");
    for (int i = 0; i < 3000; i++) p += sprintf(p, "%s\"t%d\":\"f%d\"", i > 0 ? "," : "", i, i);
    strcpy(p, "}}");
    write_text(INDEX, index);
    CHECK_EQ(open_both(folder()), MOE_ERROR_UNSUPPORTED);
    CHECK_CONTAINS(err.text, "more than 2048 files");
    free(index);
}

TEST(paths_that_hold_no_checkpoint_are_refused)
{
    char path[6000];
    fresh_folder();
    CHECK_EQ(open_both(folder()), MOE_ERROR_MISSING);
    CHECK_CONTAINS(err.text, "neither model.safetensors nor model.safetensors.index.json");
    CHECK_EQ(open_both(in_folder("absent")), MOE_ERROR_MISSING);
    CHECK_CONTAINS(err.text, "does not exist");
    make_folder(in_folder("model.safetensors"));
    CHECK_EQ(open_both(folder()), MOE_ERROR_FILE);
    CHECK(remove(in_folder("model.safetensors")) == 0 || rmdir(in_folder("model.safetensors")) == 0);
    write_text("model.safetensors", "");
    CHECK_EQ(open_both(folder()), MOE_ERROR_FORMAT);
    CHECK_CONTAINS(err.text, "0 bytes");
    memset(path, 'x', sizeof path - 1);
    path[sizeof path - 1] = 0;
    CHECK(open_both(path) != MOE_OK);
#if !defined(_WIN32)
    CHECK_EQ(open_both("/dev/null"), MOE_ERROR_FILE);
#endif
}

TEST(every_changed_byte_of_a_header_ends_in_a_result)
{
    static const char header[] = "{\"__metadata__\":{},\"ab\":{\"dtype\":\"U8\",\"shape\":[2,2],"
                                 "\"data_offsets\":[0,4]}}";
    unsigned char bytes[8 + sizeof header - 1 + 4] = { sizeof header - 1 };
    moe_checkpoint_desc desc = with_flags(MOE_CHECKPOINT_READ); // so that a sanitizer sees the file's end
    int opened = 0;
    memcpy(bytes + 8, header, sizeof header - 1);
    fresh_folder();
    for (size_t at = 0; at < sizeof bytes - 4; at++) {
        for (int bit = 0; bit < 8; bit += 3) {
            moe_checkpoint *ckpt;
            bytes[at] = (unsigned char)(bytes[at] ^ (1 << bit));
            write_bytes("model.safetensors", bytes, sizeof bytes);
            if (moe_checkpoint_open(in_folder("model.safetensors"), &desc, &ckpt, &err) == MOE_OK) opened++;
            else CHECK(ckpt == NULL && err.text[0] != 0);
            moe_checkpoint_close(ckpt);
            bytes[at] = (unsigned char)(bytes[at] ^ (1 << bit));
        }
    }
    CHECK(opened > 0 && opened < 60); // changed names and unknown types remain legal
}

TEST(wrong_arguments_are_refused_by_name)
{
    moe_checkpoint_desc desc = with_flags(2);
    moe_checkpoint *ckpt;
    moe_checkpoint_tensor t;
    moe_layer_desc layer;
    moe_fact fact;
    int32_t count, one;
    CHECK_ERR(moe_checkpoint_open(NULL, NULL, &ckpt, &err), MOE_ERROR_ARGUMENT, "path");
    CHECK_ERR(moe_checkpoint_open("", NULL, &ckpt, &err), MOE_ERROR_ARGUMENT, "path");
    CHECK_ERR(moe_checkpoint_open("x", NULL, NULL, &err), MOE_ERROR_ARGUMENT, "out");
    CHECK_ERR(moe_checkpoint_open("x", &desc, &ckpt, &err), MOE_ERROR_ARGUMENT, "desc.flags");
    desc = with_flags(0);
    desc.struct_size = 4;
    CHECK_ERR(moe_checkpoint_open("x", &desc, &ckpt, &err), MOE_ERROR_ARGUMENT, "desc.struct_size");
    desc = with_flags(0);
    desc.allocator.alloc = moe__default_alloc;
    CHECK_ERR(moe_checkpoint_open("x", &desc, &ckpt, &err), MOE_ERROR_ARGUMENT, "desc.allocator");
    write_shards(N1 ":\"a.safetensors\"");
    REQUIRE_OK(moe_checkpoint_open(folder(), NULL, &ckpt, &err));
    CHECK_ERR(moe_checkpoint_at(ckpt, -1, &t, &err), MOE_ERROR_ARGUMENT, "index");
    CHECK_ERR(moe_checkpoint_at(ckpt, 1, &t, &err), MOE_ERROR_ARGUMENT, "index");
    CHECK_ERR(moe_checkpoint_at(ckpt, 0, NULL, &err), MOE_ERROR_ARGUMENT, "out");
    CHECK_ERR(moe_checkpoint_at(NULL, 0, &t, &err), MOE_ERROR_ARGUMENT, "ckpt");
    CHECK_ERR(moe_checkpoint_find(ckpt, NULL, &t, &err), MOE_ERROR_ARGUMENT, "name");
    CHECK_ERR(moe_checkpoint_find(NULL, "x", &t, &err), MOE_ERROR_ARGUMENT, "ckpt");
    CHECK_ERR(moe_checkpoint_layers(ckpt, NULL, 1, &count, &err), MOE_ERROR_ARGUMENT, "indices");
    CHECK_ERR(moe_checkpoint_layers(ckpt, &one, -1, &count, &err), MOE_ERROR_ARGUMENT, "capacity");
    CHECK_ERR(moe_checkpoint_layers(ckpt, &one, 1, NULL, &err), MOE_ERROR_ARGUMENT, "count");
    CHECK_ERR(moe_checkpoint_layers(NULL, &one, 1, &count, &err), MOE_ERROR_ARGUMENT, "ckpt");
    CHECK_ERR(moe_checkpoint_layer(NULL, 0, &layer, &err), MOE_ERROR_ARGUMENT, "ckpt");
    CHECK_ERR(moe_checkpoint_layer(ckpt, 0, NULL, &err), MOE_ERROR_ARGUMENT, "out");
    CHECK_ERR(moe_checkpoint_layer(ckpt, -1, &layer, &err), MOE_ERROR_ARGUMENT, "layer_index");
    CHECK_ERR(moe_checkpoint_facts(ckpt, 0, NULL, 1, &count, &err), MOE_ERROR_ARGUMENT, "facts");
    CHECK_ERR(moe_checkpoint_facts(ckpt, 0, &fact, 1, NULL, &err), MOE_ERROR_ARGUMENT, "count");
    moe_checkpoint_close(ckpt);
    REQUIRE_OK(moe_checkpoint_open(in_folder("a.safetensors"), NULL, &ckpt, &err));
    CHECK_ERR(moe_checkpoint_layer(ckpt, 4, &layer, &err), MOE_ERROR_MISSING, "ckpt"); // no config.json
    CHECK_CONTAINS(err.text, "config.json");
    moe_checkpoint_close(ckpt);
}

// ---- layers settled by tensors -------------------------------------------------------------------------------------

#define VL_CONFIG "{\"model_type\":\"qwen3_vl_moe\",\"text_config\":{\"model_type\":\"qwen3_vl_moe_text\"," \
                  "\"hidden_size\":%d," \
                  "\"moe_intermediate_size\":%d,\"num_experts\":1,\"num_experts_per_tok\":1,\"dtype\":\"%s\"}%s}"

// One layer of one expert with fused tensors of these shapes.
static int32_t fused_layer(int h, int i, const char *dtype, const char *more, const char *type, int size, int a, int b,
                           int c,
                           int d, moe_layer_desc *layer)
{
    char text[600];
    moe_checkpoint *ckpt;
    int32_t result;
    int up = a * b * size, down = c * d * size;
    fresh_folder();
    snprintf(text, sizeof text, VL_CONFIG, h, i, dtype, more);
    write_text("config.json", text);
    snprintf(text, sizeof text,
             "{\"model.language_model.layers.0.mlp.experts.gate_up_proj\":{\"dtype\":\"%s\",\"shape\":[1,%d,%d],"
             "\"data_offsets\":[0,%d]},"
             "\"model.language_model.layers.0.mlp.experts.down_proj\":{\"dtype\":\"%s\",\"shape\":"
             "[1,%d,%d],\"data_offsets\":[%d,%d]}}", type, a, b, up, type, c, d, up, up + down);
    write_tensors("model.safetensors", text, (size_t)(up + down));
    result = moe_checkpoint_open(folder(), NULL, &ckpt, &err);
    if (result != MOE_OK) return result;
    result = moe_checkpoint_layer(ckpt, 0, layer, &err);
    moe_checkpoint_close(ckpt);
    return result;
}

TEST(shapes_tell_the_orientation_of_fused_tensors_also_where_one_alone_could_not)
{
    moe_layer_desc layer;
    CHECK_OK(fused_layer(8, 3, "bfloat16", "", "BF16", 2, 6, 8, 8, 3, &layer));
    CHECK_EQ(layer.source.layout, MOE_LAYOUT_MAJOR_K);
    CHECK_OK(fused_layer(8, 3, "bfloat16", "", "BF16", 2, 8, 6, 3, 8, &layer));
    CHECK_EQ(layer.source.layout, MOE_LAYOUT_MAJOR_MN);
    CHECK_OK(fused_layer(8, 4, "bfloat16", "", "BF16", 2, 8, 8, 8, 4, &layer)); // H = 2I: down decides
    CHECK_EQ(layer.source.layout, MOE_LAYOUT_MAJOR_K);
    CHECK_OK(fused_layer(8, 4, "bfloat16", "", "BF16", 2, 8, 8, 4, 8, &layer));
    CHECK_EQ(layer.source.layout, MOE_LAYOUT_MAJOR_MN);
    CHECK_OK(fused_layer(4, 4, "bfloat16", "", "BF16", 2, 4, 8, 4, 4, &layer)); // H = I: gate_up decides
    CHECK_EQ(layer.source.layout, MOE_LAYOUT_MAJOR_MN);
    CHECK_EQ(layer.source.halves, MOE_HALVES_GATE_UP);
}

TEST(an_orientation_that_nothing_tells_is_refused)
{
    moe_checkpoint *ckpt;
    moe_layer_desc layer;
    char text[600];
    fresh_folder();
    snprintf(text, sizeof text, VL_CONFIG, 8, 4, "bfloat16", "");
    write_text("config.json", text);
    write_tensors("model.safetensors",
                  "{\"model.language_model.layers.0.mlp.experts.gate_up_proj\":{\"dtype\":\"BF16\",\"shape\":"
                  "[1,8,8],\"data_offsets\":[0,128]}}", 128);
    REQUIRE_OK(moe_checkpoint_open(folder(), NULL, &ckpt, &err));
    CHECK_ERR(moe_checkpoint_layer(ckpt, 0, &layer, &err), MOE_ERROR_UNSUPPORTED, "layer.source.layout");
    CHECK_CONTAINS(err.text, "gate_up_proj");
    CHECK_ERR(moe_checkpoint_layer(ckpt, 1, &layer, &err), MOE_ERROR_MISSING, "layer_index");
    CHECK_EQ(layer.hidden_size, 0);
    moe_checkpoint_close(ckpt);
}

#define FP8_CONFIG ",\"quantization_config\":{\"quant_method\":\"fp8\",\"weight_block_size\":[128,128]}"

TEST(the_type_of_the_tensors_settles_the_format)
{
    moe_layer_desc layer;
    CHECK_OK(fused_layer(8, 3, "bfloat16", "", "F16", 2, 6, 8, 8, 3, &layer));
    CHECK_EQ(layer.format, MOE_FORMAT_F16);
    CHECK_OK(fused_layer(8, 3, "bfloat16", "", "F32", 4, 6, 8, 8, 3, &layer));
    CHECK_EQ(layer.format, MOE_FORMAT_F32);
    CHECK_OK(fused_layer(8, 3, "bfloat16", FP8_CONFIG, "BF16", 2, 6, 8, 8, 3,
                         &layer)); // a layer that was left as it was
    CHECK_EQ(layer.format, MOE_FORMAT_BF16);
    CHECK_EQ(layer.format_block, 0);
    CHECK_OK(fused_layer(128, 128, "bfloat16", FP8_CONFIG, "F8_E4M3", 1, 256, 128, 128, 128, &layer));
    CHECK_EQ(layer.format, MOE_FORMAT_FP8_BLOCK);
    CHECK_OK(fused_layer(16, 16, "bfloat16",
                         ",\"quantization_config\":{\"quant_method\":\"modelopt\",\"quant_algo\":\"NVFP4\"}",
                         "U8", 1, 32, 8, 16, 8, &layer)); // no input scales
    CHECK_EQ(layer.format, MOE_FORMAT_NVFP4_W4A16);
    CHECK_ERR(fused_layer(8, 3, "bfloat16", "", "F8_E4M3", 1, 6, 8, 8, 3, &layer), MOE_ERROR_FORMAT, "layer.format");
    CHECK_CONTAINS(err.text, "e4m3");
}

// ---- golden folders ------------------------------------------------------------------------------------------------

typedef struct golden {
    const char *name;
    int32_t others; // tensors beside the layer: projections around latent experts
} golden;

static const golden goldens[] = {
    { "aria", 0 }, { "cohere2_moe", 0 }, { "cohere2_moe_average", 0 }, { "cohere2_moe_sum_softmax", 0 }, { "dbrx", 0 },
    { "deepseek_v2", 0 }, { "deepseek_v3", 0 }, { "deepseek_v4", 0 }, { "dots1", 0 }, { "ernie4_5_moe", 0 },
    { "flex_olmo", 0 }, { "gemma4", 0 }, { "glm4_moe", 0 }, { "gpt_oss", 0 }, { "granitemoe", 0 }, { "granitemoeshared",
                                                                                                    0 },
    { "hunyuan_v1_moe", 0 }, { "inkling", 0 }, { "jamba", 0 }, { "kolibri1", 0 }, { "lfm2_moe", 0 }, { "llama4", 0 },
    { "longcat_flash", 0 }, { "minimax_m2", 0 }, { "minimax_m3", 0 }, { "mistral4", 0 }, { "mixtral",
                                                                                          0 }, { "muse_spark", 3 },
    { "nemotron_h", 0 }, { "nemotron_h_latent", 2 }, { "olmoe", 0 }, { "phimoe", 0 }, { "qwen2_moe", 0 },
    { "qwen3_5_moe", 0 }, { "qwen3_moe", 0 }, { "qwen3_next", 0 }, { "qwen3_vl_moe", 0 }, { "qwen3_vl_moe_resaved", 0 },
    { "step3p7", 0 },
};

static const char *golden_path(int g)
{
    char name[100];
    snprintf(name, sizeof name, "golden/%s", goldens[g].name);
    return test_data(name);
}

enum { GOLDENS = (int)(sizeof goldens / sizeof goldens[0]) };

static int64_t elements(const moe_checkpoint_tensor *t)
{
    int64_t n = 1;
    for (int32_t i = 0; i < t->rank; i++) n *= t->dims[i];
    return n;
}

// Elements that a tensor of this name has in this layer; 0 for roles whose size the layer does not fix alone.
static int64_t expected_elements(const moe_layer_desc *layer, const moe_tensor_name *what)
{
    const moe_routing_desc *r = &layer->routing;
    int64_t h = layer->hidden_size, i = layer->intermediate_size, stack = what->expert >= 0 ? 1 : layer->num_experts;
    int64_t shared = r->extra_slots > 0 ? r->extra_slots * i
                                        : (int64_t)layer->shared.count * layer->shared.intermediate_size;
    int64_t keys = layer->num_experts + r->special_experts;
    switch (what->role) {
    case MOE_TENSOR_GATE: case MOE_TENSOR_UP: case MOE_TENSOR_DOWN: return stack * h * i;
    case MOE_TENSOR_GATE_UP: return stack * 2 * h * i;
    case MOE_TENSOR_GATE_UP_BIAS: return stack * 2 * i;
    case MOE_TENSOR_DOWN_BIAS: return stack * h;
    case MOE_TENSOR_SHARED_GATE: case MOE_TENSOR_SHARED_UP: case MOE_TENSOR_SHARED_DOWN: return shared * h;
    case MOE_TENSOR_SHARED_GATE_UP: return 2 * shared * h;
    case MOE_TENSOR_SHARED_TOKEN_GATE: case MOE_TENSOR_ROW_NORM: return h;
    case MOE_TENSOR_ROUTER_INPUT_SCALE: return layer->router.input_size;
    case MOE_TENSOR_ROUTER: return (keys + (r->extra_scored ? r->extra_slots : 0)) * layer->router.input_size;
    case MOE_TENSOR_ROUTER_BIAS: case MOE_TENSOR_SELECT_BIAS: case MOE_TENSOR_PER_EXPERT_SCALE: return keys;
    case MOE_TENSOR_ROUTER_GLOBAL_SCALE: return 1;
    case MOE_TENSOR_FORCED_IDS: return (int64_t)r->forced_rows * r->top_k;
    default: return 0;
    }
}

// 1 when the layer has a place for the tensor.
static int has_place(const moe_layer_desc *layer, const moe_tensor_name *what)
{
    switch (what->role) {
    case MOE_TENSOR_SELECT_BIAS: return layer->routing.bias_rows > what->index;
    case MOE_TENSOR_ROUTER_BIAS: return layer->router.bias;
    case MOE_TENSOR_PER_EXPERT_SCALE: return layer->routing.per_expert_scale;
    case MOE_TENSOR_ROUTER_INPUT_SCALE: return layer->router.input_scale;
    case MOE_TENSOR_ROUTER_GLOBAL_SCALE: return layer->routing.global_scale;
    case MOE_TENSOR_FORCED_IDS: return layer->routing.forced_rows > 0;
    case MOE_TENSOR_ROW_NORM: return layer->row_norm;
    case MOE_TENSOR_SHARED_TOKEN_GATE: return layer->shared.gate;
    case MOE_TENSOR_GATE_UP_BIAS: return layer->gemm1_bias;
    case MOE_TENSOR_DOWN_BIAS: return layer->gemm2_bias;
    case MOE_TENSOR_GATE:
        return moe_activation_is_gated(layer->activation.kind) && layer->source.halves == MOE_HALVES_SEPARATE;
    case MOE_TENSOR_GATE_UP: return layer->source.halves != MOE_HALVES_SEPARATE;
    default: return 1;
    }
}

TEST(golden_folders_open_and_every_tensor_of_their_layers_fits_the_inferred_layer)
{
    for (int g = 0; g < GOLDENS; g++) {
        moe_checkpoint *ckpt;
        moe_layer_desc layer;
        int32_t layers[16], count = 0, others = 0, known = -1;
        REQUIRE_OK(moe_checkpoint_open(golden_path(g), NULL, &ckpt, &err));
        CHECK_OK(moe_checkpoint_layers(ckpt, layers, 16, &count, &err));
        CHECK(count >= 1 && count <= 16);
        for (int32_t i = 0; i < moe_checkpoint_count(ckpt); i++) {
            moe_checkpoint_tensor t;
            moe_tensor_name what;
            int latent;
            CHECK_OK(moe_checkpoint_at(ckpt, i, &t, &err));
            if (moe_tensor_from_name(t.name, &what, &err) != MOE_OK) { others++; continue; }
            if (what.layer != known) REQUIRE_OK(moe_checkpoint_layer(ckpt, what.layer, &layer, &err));
            known = what.layer;
            latent = layer.router.input_size != layer.hidden_size;
            if (latent && what.role >= MOE_TENSOR_SHARED_GATE &&
                what.role <= MOE_TENSOR_SHARED_DOWN) continue; // the caller's
            if (!has_place(&layer, &what)) test_fail2(__FILE__, __LINE__, "the layer has no place for it", t.name);
            if (expected_elements(&layer, &what) != elements(&t)) test_fail2(__FILE__, __LINE__, goldens[g].name,
                                                                             t.name);
        }
        if (others != goldens[g].others) test_fail2(__FILE__, __LINE__, "tensors not understood", goldens[g].name);
        moe_checkpoint_close(ckpt);
    }
}

TEST(golden_folders_give_facts_from_the_config_and_the_files)
{
    int shapes = 0;
    for (int g = 0; g < GOLDENS; g++) {
        moe_checkpoint *ckpt;
        moe_fact facts[64];
        int32_t layer = 0, count = 0, layers = 0;
        REQUIRE_OK(moe_checkpoint_open(golden_path(g), NULL, &ckpt, &err));
        CHECK_OK(moe_checkpoint_layers(ckpt, &layer, 1, &layers, &err));
        CHECK_OK(moe_checkpoint_facts(ckpt, layer, facts, 64, &count, &err));
        CHECK(count >= 10);
        for (int32_t i = 0; i < count; i++) {
            CHECK(strlen(facts[i].name) < sizeof facts[i].name && facts[i].value[0] != 0 && facts[i].source[0] != 0);
            for (int32_t j = 0; j < i; j++) CHECK(strcmp(facts[i].name, facts[j].name) != 0);
            shapes += strcmp(facts[i].source, "tensor shape") == 0;
        }
        moe_checkpoint_close(ckpt);
    }
    CHECK(shapes >= 2);
}

// ---- allocation ----------------------------------------------------------------------------------------------------

typedef struct counter {
    int calls, fail_at; // the call that returns NULL; -1: none
    int live;
    size_t bytes;
} counter;

static void *counting_alloc(void *user, size_t size, size_t align)
{
    counter *c = (counter *)user;
    void *p;
    if (c->calls++ == c->fail_at) return NULL;
    p = moe__default_alloc(NULL, size, align);
    if (p != NULL) {
        c->live++;
        c->bytes += size;
    }
    return p;
}

static void counting_free(void *user, void *ptr, size_t size)
{
    counter *c = (counter *)user;
    c->live--;
    c->bytes -= size;
    moe__default_free(NULL, ptr, size);
}

TEST(every_failing_allocation_is_reported_and_nothing_leaks)
{
    int allocations = 0, injected = 0;
    for (uint32_t flags = 0; flags < 2; flags++) {
        for (int what = 0; what < 3; what++) {
            static const char *const names[] = { "golden/mixtral", "golden/granitemoe",
                                                "golden/mixtral/golden.safetensors" };
            for (int fail_at = -1, total = 0; fail_at < total; fail_at++) {
                moe_checkpoint_desc desc = with_flags(flags);
                moe_checkpoint *ckpt;
                counter c = { 0, 0, 0, 0 };
                c.fail_at = fail_at;
                desc.allocator.alloc = counting_alloc;
                desc.allocator.free = counting_free;
                desc.allocator.user = &c;
                if (fail_at < 0) {
                    CHECK_OK(moe_checkpoint_open(test_data(names[what]), &desc, &ckpt, &err));
                    total = c.calls;
                    allocations += total;
                } else {
                    CHECK_ERR(moe_checkpoint_open(test_data(names[what]), &desc, &ckpt, &err), MOE_ERROR_MEMORY, "");
                    CHECK(ckpt == NULL);
                    injected++;
                }
                moe_checkpoint_close(ckpt);
                CHECK_EQ(c.live, 0);
                CHECK(c.bytes == 0);
            }
        }
    }
    printf("allocations %d, failures injected %d\n", allocations, injected);
    CHECK(allocations >= 30);
    CHECK_EQ(allocations, injected);
}

// ---- writing -------------------------------------------------------------------------------------------------------

TEST(a_file_is_replaced_whole_or_not_at_all)
{
    static const char old[] = "old", first[] = "new", second[] = " content";
    moe__span spans[2];
    moe_allocator allocator;
    moe__file file;
    spans[0].data = first;
    spans[0].size = 3;
    spans[1].data = second;
    spans[1].size = 8;
    memset(&allocator, 0, sizeof allocator);
    CHECK_OK(moe__allocator_resolve(&allocator, "allocator", &err));
    fresh_folder();
    write_text("out.bin", old);
    CHECK_OK(moe__file_write_atomic(in_folder("out.bin"), spans, 2, NULL, &err));
    CHECK_OK(moe__file_read(&allocator, in_folder("out.bin"), 100, &file, &err));
    CHECK_STR((const char *)file.data, "new content");
    moe__file_close(&allocator, &file);
    CHECK_ERR(moe__file_read(&allocator, in_folder("out.bin"), 5, &file, &err), MOE_ERROR_FORMAT, "");
    CHECK_ERR(moe__file_write_atomic(in_folder("absent/out.bin"), spans, 2, NULL, &err), MOE_ERROR_FILE, "");
    make_folder(in_folder("sub"));
    CHECK_ERR(moe__file_write_atomic(in_folder("sub"), spans, 2, NULL, &err), MOE_ERROR_FILE, ""); // a folder is in the way
    CHECK_OK(moe__file_map(in_folder("out.bin"), &file, &err));
    CHECK(file.size == 11 && memcmp(file.data, "new content", 11) == 0);
    moe__file_close(&allocator, &file);
    CHECK_ERR(moe__file_map(in_folder("sub"), &file, &err), MOE_ERROR_FILE, "");
    rmdir(in_folder("sub"));
}

TEST_MAIN(
    T(a_file_gives_its_tensors_with_types_shapes_and_bytes)
    T(a_folder_gives_the_tensors_of_all_shards_its_config_and_its_layers)
    T(a_path_with_a_separator_at_its_end_and_one_in_utf8_are_opened)
    T(many_tensors_are_found_by_name)
    T(damaged_headers_are_refused_with_the_tensor_and_the_reason)
    T(wrong_header_lengths_are_refused)
    T(hostile_names_are_quoted_and_messages_stay_whole)
    T(an_index_must_agree_with_its_shards)
    T(one_tensor_in_two_shards_is_refused)
    T(an_index_of_too_many_files_is_refused)
    T(paths_that_hold_no_checkpoint_are_refused)
    T(every_changed_byte_of_a_header_ends_in_a_result)
    T(wrong_arguments_are_refused_by_name)
    T(shapes_tell_the_orientation_of_fused_tensors_also_where_one_alone_could_not)
    T(an_orientation_that_nothing_tells_is_refused)
    T(the_type_of_the_tensors_settles_the_format)
    T(golden_folders_open_and_every_tensor_of_their_layers_fits_the_inferred_layer)
    T(golden_folders_give_facts_from_the_config_and_the_files)
    T(every_failing_allocation_is_reported_and_nothing_leaks)
    T(a_file_is_replaced_whole_or_not_at_all)
)
