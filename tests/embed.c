// embed.c - copies moe_kernels.cu.inc and PTX of it into the generated region of moe.h (`make embed`), or says where
// the region differs (`make check-embed`). Nothing outside the region is touched. Needs no part of moe.h: it also mends
// a broken region.
//
//     embed moe.h moe_kernels.cu.inc [FOLDER]          rewrites moe.h
//     embed --check moe.h moe_kernels.cu.inc [FOLDER]  code 1 and the first line that differs
//
// FOLDER is where ptx.c left its files. Without it the region's PTX is kept; when it was not made from this text, that
// is said, and --check ends with code 1.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PIECE 4000 // bytes of a string literal; C99 promises 4,095
#define COLUMNS 120
#define PTX_MARK "// >>kernels-ptx "

typedef struct buffer {
    char *data;
    size_t size, room;
} buffer;

static void stop(const char *what, const char *name)
{
    fprintf(stderr, "embed: %s: %s\n", name, what);
    exit(2);
}

static void add(buffer *to, const char *data, size_t size)
{
    if (to->size + size + 1 > to->room) {
        to->room = 2 * (to->size + size + 1);
        to->data = (char *)realloc(to->data, to->room);
        if (!to->data) stop("out of memory", "buffer");
    }
    memcpy(to->data + to->size, data, size);
    to->size += size;
    to->data[to->size] = 0;
}

static void add_text(buffer *to, const char *text)
{
    add(to, text, strlen(text));
}

static buffer read_all(const char *name)
{
    buffer all = { NULL, 0, 0 };
    char block[65536];
    size_t got;
    FILE *file = fopen(name, "rb");
    if (!file) stop("cannot be opened", name);
    add(&all, "", 0);
    while ((got = fread(block, 1, sizeof block, file)) > 0) add(&all, block, got);
    if (ferror(file)) stop("cannot be read", name);
    fclose(file);
    return all;
}

// ---- SHA-256 --------------------------------------------------------------------------------------------------------

static uint32_t turn(uint32_t x, int by)
{
    return x >> by | x << (32 - by);
}

// The first 32 bits behind the binary point of the square or cube root of a prime, by bisection in integers.
static uint32_t root_bits(uint32_t prime, int cube)
{
    uint64_t low = 0, high = (uint64_t)1 << 37; // root * 2^32: below 2^37 for 19 squared and 7 cubed
    while (high - low > 1) {
        const uint64_t middle = (low + high) / 2;
        uint64_t limbs[4] = { (uint32_t)middle, middle >> 32, 0, 0 }, product[6] = { 1, 0, 0, 0, 0, 0 };
        for (int factor = 0; factor < (cube ? 3 : 2); factor++) {
            uint64_t next[6] = { 0, 0, 0, 0, 0, 0 };
            for (int i = 0; i < 5; i++) {
                uint64_t t = next[i] + product[i] * limbs[0];
                next[i] = (uint32_t)t;
                t = (t >> 32) + product[i] * limbs[1] + next[i + 1];
                next[i + 1] = (uint32_t)t;
                if (i < 4) next[i + 2] += t >> 32;
            }
            memcpy(product, next, sizeof next);
        }
        // middle^n <= prime * 2^(32 n)
        const uint64_t whole = cube ? product[3] | product[4] << 32 : product[2] | product[3] << 32;
        const int rest = cube ? (product[0] | product[1] | product[2]) != 0 : (product[0] | product[1]) != 0;
        if (whole < prime || (whole == prime && !rest)) low = middle;
        else high = middle;
    }
    return (uint32_t)low;
}

static void sha_block(uint32_t state[8], const uint32_t table[64], const unsigned char *p)
{
    uint32_t w[64], v[8];
    for (int i = 0; i < 16; i++, p += 4)
        w[i] = (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | (uint32_t)p[3];
    for (int i = 16; i < 64; i++) {
        const uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (turn(a, 7) ^ turn(a, 18) ^ a >> 3) + w[i - 7] + (turn(b, 17) ^ turn(b, 19) ^ b >> 10);
    }
    memcpy(v, state, sizeof v);
    for (int i = 0; i < 64; i++) {
        const uint32_t choice = (v[4] & v[5]) ^ (~v[4] & v[6]), most = (v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]);
        const uint32_t t1 = v[7] + (turn(v[4], 6) ^ turn(v[4], 11) ^ turn(v[4], 25)) + choice + table[i] + w[i];
        const uint32_t t2 = (turn(v[0], 2) ^ turn(v[0], 13) ^ turn(v[0], 22)) + most;
        memmove(v + 1, v, 7 * sizeof v[0]);
        v[4] += t1;
        v[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++) state[i] += v[i];
}

static void sha_hex(const buffer *text, char hex[65])
{
    uint32_t state[8], table[64], prime = 2;
    buffer padded = { NULL, 0, 0 };
    for (int i = 0; i < 64; prime++) {
        uint32_t divisor = 2;
        while (divisor * divisor <= prime && prime % divisor) divisor++;
        if (divisor * divisor <= prime) continue;
        if (i < 8) state[i] = root_bits(prime, 0);
        table[i++] = root_bits(prime, 1);
    }
    add(&padded, text->data, text->size);
    add(&padded, "\x80", 1);
    while (padded.size % 64 != 56) add(&padded, "", 1);
    for (int i = 56; i >= 0; i -= 8) {
        const char byte = (char)((uint64_t)text->size * 8 >> i & 255);
        add(&padded, &byte, 1);
    }
    for (size_t i = 0; i < padded.size; i += 64) sha_block(state, table, (const unsigned char *)padded.data + i);
    for (int i = 0; i < 8; i++) sprintf(hex + 8 * i, "%08lx", (unsigned long)state[i]);
    free(padded.data);
}

// ---- the region -----------------------------------------------------------------------------------------------------

// A question mark is escaped as well: two of them may begin a trigraph.
static void add_escaped(buffer *to, const char *line, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        if (line[i] == '"' || line[i] == '\\' || line[i] == '?') add(to, "\\", 1);
        add(to, line + i, 1);
    }
}

// One line of the source as one line of a literal.
static void add_line(buffer *to, const char *line, size_t size)
{
    add(to, "\"", 1);
    add_escaped(to, line, size);
    add_text(to, "\\n\"");
}

static void add_pieces(buffer *to, const char *name, const buffer *text)
{
    size_t held = 0;
    if (text->size == 0 || text->data[text->size - 1] != '\n') stop("does not end in a line feed", name);
    for (size_t at = 0; at < text->size;) {
        const size_t size = (size_t)((char *)memchr(text->data + at, '\n', text->size - at) - text->data) - at;
        for (size_t i = at; i < at + size; i++)
            if (text->data[i] < 32 || text->data[i] > 126) stop("has a byte that is not printable ASCII", name);
        if (size + 1 > PIECE) stop("has a line longer than a piece", name);
        if (at > 0) add_text(to, held + size + 1 > PIECE ? ",\n" : "\n");
        if (held + size + 1 > PIECE) held = 0;
        held += size + 1;
        add_line(to, text->data + at, size);
        at += size + 1;
    }
    add_text(to, "\n");
}

// Lines of PTX are short: a line of the header holds several.
static void add_ptx_pieces(buffer *to, const char *name, const buffer *text)
{
    size_t held = 0, column = 0, size;
    for (const char *line = text->data; *line; line += size) {
        const char *end = strchr(line, '\n');
        if (!end) stop("does not end in a line feed", name);
        size = (size_t)(end - line) + 1;
        if (size > PIECE) stop("has a line longer than a piece", name);
        for (const char *c = line; c < end; c++)
            if (*c < 32 || *c > 126) stop("has a byte that is not printable ASCII", name);
        if (held + size > PIECE) {
            add_text(to, "\",\n");
            held = column = 0;
        } else if (column > 0 && column + size + 3 > COLUMNS) {
            add_text(to, "\"\n");
            column = 0;
        }
        if (column == 0) add_text(to, "\"");
        add_escaped(to, line, size - 1);
        add_text(to, "\\n");
        held += size;
        column += size + 1 + (column == 0);
    }
    add_text(to, "\"\n");
}

// What follows the digest of the text that the PTX was made from.
static void add_ptx(buffer *to, const char *folder)
{
    char path[1024], number[96];
    buffer list;
    int count = 0;
    snprintf(path, sizeof path, "%s/list", folder);
    list = read_all(path);
    add_text(to, "#if !defined(MOE_NO_PTX)\n");
    for (char *name = strtok(list.data, "\n"); name; name = strtok(NULL, "\n"), count++) {
        snprintf(path, sizeof path, "%s/%s", folder, name);
        buffer text = read_all(path);
        snprintf(number, sizeof number, "static const char *const moe__ptx_%d[] = {\n", count);
        add_text(to, number);
        add_ptx_pieces(to, path, &text);
        add_text(to, "};\n");
        free(text.data);
    }
    if (count == 0) stop("names no file", path);
    add_text(to, "\nstatic const moe__ptx *moe__kernel_ptx(int32_t *count)\n{\n    static const moe__ptx all[] = {\n");
    for (int i = 0; i < count; i++) {
        snprintf(number, sizeof number, "        { moe__ptx_%d, MOE__ARRAY_COUNT(moe__ptx_%d) },\n", i, i);
        add_text(to, number);
    }
    add_text(to, "    };\n    *count = MOE__ARRAY_COUNT(all);\n    return all;\n}\n#endif\n#endif\n");
    free(list.data);
}

// The PTX that the header has. Returns whether it was made from the text with this digest.
static int keep_ptx(buffer *to, const buffer *header, size_t last, const char *hex)
{
    char *mark = strstr(header->data, "\n" PTX_MARK), *at;
    int fresh;
    if (!mark || mark > header->data + last) {
        add_text(to, PTX_MARK "none\n#if !defined(MOE_NO_PTX)\n"
                     "static const moe__ptx *moe__kernel_ptx(int32_t *count)\n{\n    *count = 0;\n    return NULL;\n}\n"
                     "#endif\n#endif\n");
        return 0;
    }
    at = mark + 1;
    fresh = strncmp(at + strlen(PTX_MARK), hex, 64) == 0;
    add(to, at, (size_t)(header->data + last - at));
    return fresh;
}

static buffer make_region(const char *name, const buffer *text, const char *hex)
{
    buffer region = { NULL, 0, 0 };
    add_text(&region, "#if !defined(MOE_NO_CUDA)\nstatic const char *const moe__kernel_text[] = {\n");
    add_pieces(&region, name, text);
    add_text(&region, "};\n\nstatic const char *const *moe__kernel_pieces(int32_t *count)\n{\n"
                      "    *count = MOE__ARRAY_COUNT(moe__kernel_text);\n    return moe__kernel_text;\n}\n\n"
                      "static const char *moe__kernel_digest(void)\n{\n    return \"");
    add_text(&region, hex);
    add_text(&region, "\";\n}\n\n");
    return region;
}

// Where the line with the mark begins; it has to be there once.
static char *find_mark(const char *name, const buffer *header, const char *mark)
{
    char *found = strstr(header->data, mark);
    if (!found) stop("has no mark of the region", name);
    if (strstr(found + 1, mark)) stop("has a mark of the region twice", name);
    return found + 1;
}

static int compare(const char *name, const buffer *header, size_t first, size_t last, const buffer *region)
{
    size_t line = 1, same = 0;
    while (same < region->size && same < last - first && header->data[first + same] == region->data[same]) same++;
    if (same == region->size && same == last - first) return 0;
    for (size_t i = 0; i < first + same; i++) line += header->data[i] == '\n';
    fprintf(stderr, "%s:%lu: not what moe_kernels.cu.inc gives; run make embed\n", name, (unsigned long)line);
    return 1;
}

static void replace(const char *name, const buffer *header, size_t first, size_t last, const buffer *region)
{
    FILE *file = fopen(name, "wb");
    if (!file) stop("cannot be written", name);
    fwrite(header->data, 1, first, file);
    fwrite(region->data, 1, region->size, file);
    fwrite(header->data + last, 1, header->size - last, file);
    if (ferror(file) | fclose(file)) stop("cannot be written", name);
}

int main(int argc, char **argv)
{
    const int check = argc > 1 && strcmp(argv[1], "--check") == 0;
    char hex[65];
    int fresh = 1, differs = 0;
    argv += 1 + check;
    argc -= 1 + check;
    if (argc != 2 && argc != 3) {
        fprintf(stderr, "usage: embed [--check] moe.h moe_kernels.cu.inc [FOLDER]\n");
        return 2;
    }
    buffer header = read_all(argv[0]), text = read_all(argv[1]);
    sha_hex(&text, hex);
    buffer region = make_region(argv[1], &text, hex);
    const char *begin = find_mark(argv[0], &header, "\n// >>kernels-begin");
    const size_t first = (size_t)(strchr(begin, '\n') - header.data) + 1;
    const size_t last = (size_t)(find_mark(argv[0], &header, "\n// >>kernels-end") - header.data);
    if (last < first) stop("has the marks of the region in the wrong order", argv[0]);
    if (argc == 3) {
        add_text(&region, PTX_MARK);
        add_text(&region, hex);
        add_text(&region, "  of the text with this digest\n");
        add_ptx(&region, argv[2]);
    } else {
        fresh = keep_ptx(&region, &header, last, hex);
    }
    if (check) differs = compare(argv[0], &header, first, last, &region);
    else replace(argv[0], &header, first, last, &region);
    if (!fresh) fprintf(stderr, "%s: its PTX is not of this text: make embed with NVRTC 12.1 renews it\n", argv[0]);
    free(header.data);
    free(text.data);
    free(region.data);
    return differs || (check && !fresh);
}
