// moe_layer.c - runs one MoE layer of a checkpoint folder and shows what it found and did
//
//     cc -O2 -o moe_layer examples/moe_layer.c -lpthread && ./moe_layer tests/golden/qwen3_moe --layer 1
//
// Everything about the layer comes from config.json and the tensors. A golden.safetensors beside them (layers.N.x,
// .logits, .ids, .weights, .out) is what another implementation computed: the output must then agree to 1e-5 of each
// row's maximum. A CHECKSUMS file beside them is verified first.
#ifndef _WIN32
#  define _POSIX_C_SOURCE 200809L // clock_gettime
#endif
#define MOE_IMPLEMENTATION
#include "../moe.h"

#include <math.h> // frexp
#include <stdio.h>
#include <time.h>

#define TOLERANCE 1e-5 // of a row's largest output

typedef struct job {
    const char *folder, *input, *logits_in, *token_ids_in, *output, *ids_out, *weights_out, *html, *svg;
    int32_t index, tokens; // --layer and --tokens; -1 and 0 when not given
    moe_checkpoint *ckpt, *golden;
    moe_layer_desc layer;
    moe_fact *facts;
    int32_t num_facts, router_size, slots, width, num_checksums;
    moe_context *ctx;
    moe_context_info machine;
    moe_weights *weights;
    moe_plan *plan;
    float *x, *router_x, *logits, *chosen_weights, *out;
    int32_t *token_ids, *chosen_ids, *counts;
    void *workspace;
    const char *x_source, *logits_source;
    double *errors, worst, seconds; // errors: per token, NULL without golden output
    int32_t worst_token, failed;
    char verdict[400];
} job;

static double absolute(double v) { return v < 0 ? -v : v; }

static int32_t busiest(const job *j)
{
    int32_t most = 0;
    for (int32_t e = 1; e < j->layer.num_experts; e++)
        if (j->counts[e] > j->counts[most]) most = e;
    return most;
}

#include "moe_layer_picture.h"

static int fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fprintf(stderr, "moe_layer: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    return 1;
}

static void *take(uint64_t count, size_t size) // zeroed, or the program ends
{
    void *p = count > SIZE_MAX / size ? NULL : calloc((size_t)count + 1, size);
    if (p == NULL) exit(fail("no memory for %llu x %u bytes", (unsigned long long)count, (unsigned)size));
    return p;
}

// ---- NumPy files ----------------------------------------------------------------------------------------------------

// The value behind 'key': in the header's dictionary, or NULL.
static const char *npy_value(const char *header, const char *key)
{
    const char *p = strstr(header, key);
    if (p == NULL || (p = strchr(p, ':')) == NULL) return NULL;
    for (p++; *p == ' ';) p++;
    return p;
}

static int npy_check(const char *path, const char *header, const char *type, int rank, int64_t *dims)
{
    const char *p = npy_value(header, "'descr'");
    int n = 0;
    if (p == NULL || strncmp(p, type, strlen(type)) != 0)
        return fail("%s: dtype is %.6s, %s is needed", path, p != NULL ? p : "not given", type);
    p = npy_value(header, "'fortran_order'");
    if (p == NULL || strncmp(p, "False", 5) != 0)
        return fail("%s: fortran_order is not False: save it with numpy.ascontiguousarray()", path);
    p = npy_value(header, "'shape'");
    if (p == NULL || *p++ != '(') return fail("%s: the header has no shape", path);
    while (*p != ')' && *p != 0) {
        char *end;
        long long value = strtoll(p, &end, 10);
        if (end == p || value < 0 || value > INT32_MAX) return fail("%s: the shape is not readable", path);
        if (n < rank) dims[n] = value;
        n++;
        for (p = end; *p == ',' || *p == ' ';) p++;
    }
    return n == rank ? 0 : fail("%s: the array has %d dimensions, %d are needed", path, n, rank);
}

// Reads a C-order array of 4-byte elements: type is "'<f4'" or "'<i4'".
static int npy_read(const char *path, const char *type, int rank, int64_t *dims, void **out)
{
    unsigned char fixed[12] = { 0 };
    char *header = NULL;
    size_t bytes, count = 1, fixed_bytes = 10;
    FILE *f = fopen(path, "rb");
    int failed = 1;
    *out = NULL;
    if (f == NULL) return fail("%s: cannot be opened: %s", path, strerror(errno));
    if (fread(fixed, 1, 10, f) != 10 || memcmp(fixed, "\x93NUMPY", 6) != 0) fail("%s: is not a .npy file", path);
    else if (fixed[6] < 1 || fixed[6] > 3) fail("%s: .npy version %d is not known, 1 to 3 are", path, fixed[6]);
    else if (fixed[6] > 1 && fread(fixed + fixed_bytes, 1, 2, f) != 2) fail("%s: ends inside its header", path);
    else {
        bytes = (size_t)fixed[8] + 256 * (size_t)fixed[9] + 65536 * (size_t)fixed[10] + 16777216 * (size_t)fixed[11];
        if (bytes > 65536) failed = fail("%s: the header of %lu bytes is too long", path, (unsigned long)bytes);
        else {
            header = (char *)take(bytes, 1);
            failed = fread(header, 1, bytes, f) == bytes ? npy_check(path, header, type, rank, dims)
                                                         : fail("%s: ends inside its header", path);
        }
    }
    for (int i = 0; i < rank && !failed; i++) count *= (size_t)dims[i];
    if (!failed) {
        *out = take(count, 4);
        if (fread(*out, 4, count, f) != count || fgetc(f) != EOF)
            failed = fail("%s: the data is not the %lu values that the shape says", path, (unsigned long)count);
    }
    free(header);
    fclose(f);
    return failed;
}

static int npy_write(const char *path, const char *type, int64_t rows, int64_t columns, const void *data)
{
    char header[129];
    size_t count = (size_t)rows * (size_t)columns;
    FILE *f = fopen(path, "wb");
    int good;
    if (f == NULL) return fail("%s: cannot be written: %s", path, strerror(errno));
    memset(header, ' ', sizeof header);
    header[snprintf(header, sizeof header, "{'descr': %s, 'fortran_order': False, 'shape': (%lld, %lld), }", type,
                    (long long)rows, (long long)columns)] = ' ';
    header[117] = '\n'; // 10 + 118 is a multiple of 64
    good = fwrite("\x93NUMPY\x01\x00\x76\x00", 1, 10, f) == 10 && fwrite(header, 1, 118, f) == 118 &&
           fwrite(data, 4, count, f) == count;
    return fclose(f) == 0 && good ? 0 : fail("%s: writing failed: %s", path, strerror(errno));
}

// ---- input ----------------------------------------------------------------------------------------------------------

static void path_in(const job *j, const char *name, char *path, size_t size)
{
    snprintf(path, size, "%s/%s", j->folder, name);
}

// Every file that CHECKSUMS lists has the FNV-1a 64 sum that it lists.
static int verify_checksums(job *j)
{
    char path[1024], line[512], name[400], recorded[17];
    FILE *list;
    path_in(j, "CHECKSUMS", path, sizeof path);
    list = fopen(path, "r");
    if (list == NULL) return 0;
    for (int number = 1; fgets(line, sizeof line, list) != NULL; number++) {
        uint64_t sum = 0xcbf29ce484222325u;
        char found[17];
        int c, left = 0;
        FILE *f;
        if (sscanf(line, "%16[0-9a-f] %399[^\r\n]", recorded, name) != 2 || strlen(recorded) != 16)
            left = fail("%s, line %d: is not \"<16 hexadecimal digits>  <file>\"", path, number);
        else {
            char file[1024];
            path_in(j, name, file, sizeof file);
            f = fopen(file, "rb");
            if (f == NULL) left = fail("%s: CHECKSUMS lists it, but it cannot be opened: %s", file, strerror(errno));
            else {
                while ((c = getc(f)) != EOF) sum = (sum ^ (unsigned)c) * 0x100000001b3u;
                fclose(f);
                snprintf(found, sizeof found, "%016llx", (unsigned long long)sum);
                if (strcmp(found, recorded) != 0)
                    left = fail("%s: its FNV-1a sum is %s, CHECKSUMS records %s: the file is not the one that was"
                                " recorded", file, found, recorded);
            }
        }
        if (left) { fclose(list); return 1; }
        j->num_checksums++;
    }
    fclose(list);
    return 0;
}

// layers.N.`what` of the golden file. Returns 0 and sizes, or 1 when it is not there.
static int golden_find(const job *j, const char *what, moe_checkpoint_tensor *t)
{
    char name[64];
    snprintf(name, sizeof name, "layers.%d.%s", j->index, what);
    return j->golden == NULL || moe_checkpoint_find(j->golden, name, t, NULL) != MOE_OK;
}

// Rows of a golden f32 or i32 tensor, copied; NULL and a message when it has another shape.
static void *golden_rows(const job *j, const moe_checkpoint_tensor *t, int32_t dtype, int64_t columns)
{
    void *copy;
    if (t->rank != 2 || t->dims[0] < j->tokens || t->dims[1] != columns || t->dtype != dtype) {
        fail("golden.safetensors: %s is [%lld, %lld] %s, [%d, %lld] %s is needed", t->name, (long long)t->dims[0],
             (long long)t->dims[1], moe_dtype_string(t->dtype), j->tokens, (long long)columns, moe_dtype_string(dtype));
        return NULL;
    }
    copy = take((uint64_t)j->tokens * (uint64_t)columns, 4);
    memcpy(copy, t->data, (size_t)j->tokens * (size_t)columns * 4);
    return copy;
}

static float *random_rows(int32_t rows, int32_t columns) // xorshift from a fixed seed; uniform in [-1, 1)
{
    uint32_t state = 2463534242u;
    float *values = (float *)take((uint64_t)rows * (uint64_t)columns, sizeof *values);
    for (size_t i = 0; i < (size_t)rows * (size_t)columns; i++) {
        state ^= state << 13; state ^= state >> 17; state ^= state << 5;
        values[i] = (float)(state >> 8) / 8388608.0f - 1.0f;
    }
    return values;
}

// An array of `columns` columns from a .npy file; sets or checks the number of tokens.
static int read_rows(job *j, const char *path, const char *member, int32_t columns, float **out)
{
    int64_t dims[2];
    if (npy_read(path, "'<f4'", 2, dims, (void **)out)) return 1;
    if (dims[1] != columns)
        return fail("%s is [%lld, %lld]: this layer needs %d columns (%s)", path, (long long)dims[0],
                    (long long)dims[1], columns, member);
    if (j->tokens == 0) j->tokens = (int32_t)dims[0];
    if (dims[0] < j->tokens || dims[0] == 0)
        return fail("%s has %lld rows, %d tokens are needed", path, (long long)dims[0], j->tokens);
    return 0;
}

static int read_token_ids(job *j)
{
    moe_checkpoint_tensor t;
    int64_t dims[1];
    if (j->token_ids_in != NULL) {
        if (npy_read(j->token_ids_in, "'<i4'", 1, dims, (void **)&j->token_ids)) return 1;
        if (dims[0] < j->tokens)
            return fail("%s has %lld values, %d tokens are needed", j->token_ids_in, (long long)dims[0], j->tokens);
        return 0;
    }
    if (j->input != NULL)
        return fail("this layer takes experts from a table by token id: give them with --token-ids I.npy (int32 [T])");
    j->token_ids = (int32_t *)take((uint64_t)j->tokens, sizeof *j->token_ids);
    if (golden_find(j, "token_ids", &t) || t.dtype != MOE_DTYPE_I64 || t.dims[0] < j->tokens) {
        for (int32_t i = 0; i < j->tokens; i++) j->token_ids[i] = i % j->layer.routing.forced_rows;
    } else {
        for (int32_t i = 0; i < j->tokens; i++) {
            int64_t id;
            memcpy(&id, (const char *)t.data + (size_t)i * 8, 8);
            j->token_ids[i] = (int32_t)id;
        }
    }
    return 0;
}

// x, the router's input and token ids: from --input, else the golden file, else a seeded generator.
static int read_input(job *j)
{
    moe_checkpoint_tensor t;
    int32_t hidden = j->layer.hidden_size, own_input = j->router_size != hidden;
    if (j->logits_in != NULL && read_rows(j, j->logits_in, "router width", j->width, &j->logits)) return 1;
    j->logits_source = j->logits_in != NULL ? j->logits_in : "the layer's own router";
    if (j->input != NULL) {
        j->x_source = j->input;
        if (read_rows(j, j->input, "hidden_size", hidden, &j->x)) return 1;
        if (own_input && j->logits_in == NULL)
            return fail("the router of this layer reads %d values, the experts %d: give --logits too", j->router_size,
                        hidden);
    } else if (golden_find(j, "x", &t) == 0) {
        j->x_source = "golden.safetensors";
        if (j->tokens == 0) j->tokens = (int32_t)t.dims[0];
        if ((j->x = (float *)golden_rows(j, &t, MOE_DTYPE_F32, hidden)) == NULL) return 1;
        if (golden_find(j, "router_x", &t) == 0 &&
            (j->router_x = (float *)golden_rows(j, &t, MOE_DTYPE_F32, j->router_size)) == NULL) return 1;
    } else {
        j->x_source = "seeded random numbers in [-1, 1)";
        if (j->tokens == 0) j->tokens = 32;
        j->x = random_rows(j->tokens, hidden);
        if (own_input) j->router_x = random_rows(j->tokens, j->router_size);
    }
    return j->layer.routing.forced_rows > 0 ? read_token_ids(j) : 0;
}

// ---- run ------------------------------------------------------------------------------------------------------------

static int open_layer(job *j)
{
    moe_error err;
    char path[1024];
    FILE *f;
    if (moe_checkpoint_open(j->folder, NULL, &j->ckpt, &err)) return fail("%s", err.text);
    path_in(j, "golden.safetensors", path, sizeof path);
    if ((f = fopen(path, "rb")) != NULL) {
        fclose(f);
        if (moe_checkpoint_open(path, NULL, &j->golden, &err)) return fail("%s", err.text);
    }
    if (j->index < 0) return 0;
    if (moe_checkpoint_layer(j->ckpt, j->index, &j->layer, &err) ||
        moe_checkpoint_facts(j->ckpt, j->index, NULL, 0, &j->num_facts, &err)) return fail("%s", err.text);
    j->facts = (moe_fact *)take((uint64_t)j->num_facts, sizeof *j->facts);
    if (moe_checkpoint_facts(j->ckpt, j->index, j->facts, j->num_facts, &j->num_facts, &err))
        return fail("%s", err.text);
    j->router_size = j->layer.router.input_size != 0 ? j->layer.router.input_size : j->layer.hidden_size;
    return 0;
}

static int prepare(job *j, moe_plan_info *info)
{
    moe_error err;
    moe_plan_desc desc;
    memset(&desc, 0, sizeof desc);
    memset(info, 0, sizeof *info);
    desc.x_dtype = desc.out_dtype = desc.intermediate_dtype = MOE_DTYPE_F32;
    if (moe_context_create(NULL, &j->ctx, &err) || moe_context_get_info(j->ctx, &j->machine, &err) ||
        moe_plan_query(j->ctx, &j->layer, &desc, info, &err)) return fail("%s", err.text);
    j->width = info->router_width;
    j->slots = info->slots;
    if (read_input(j)) return 1;
    desc.max_tokens = j->tokens;
    if (moe_weights_from_checkpoint(j->ctx, j->ckpt, &j->layer, &j->weights, &err) ||
        moe_plan_create(j->ctx, &j->layer, &desc, &j->plan, &err) || moe_plan_get_info(j->plan, info, &err))
        return fail("%s", err.text);
    return 0;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int run(job *j)
{
    moe_error err;
    moe_plan_info info;
    moe_execute_args args;
    uint64_t n;
    double start = now();
    if (prepare(j, &info)) return 1;
    n = (uint64_t)j->tokens;
    j->workspace = take(info.workspace_bytes + 256, 1);
    j->out = (float *)take(n * (uint64_t)j->layer.hidden_size, sizeof *j->out);
    j->chosen_ids = (int32_t *)take(n * (uint64_t)j->slots, sizeof *j->chosen_ids);
    j->chosen_weights = (float *)take(n * (uint64_t)j->slots, sizeof *j->chosen_weights);
    j->counts = (int32_t *)take((uint64_t)j->layer.num_experts, sizeof *j->counts);
    memset(&args, 0, sizeof args);
    args.input_mode = MOE_INPUT_LOGITS;
    args.num_tokens = j->tokens;
    args.token_ids = j->token_ids;
    args.out = j->out;
    args.out_ids = j->chosen_ids;
    args.out_weights = j->chosen_weights;
    args.out_expert_counts = j->counts;
    args.workspace = (char *)j->workspace + (256 - (uintptr_t)j->workspace % 256) % 256;
    args.workspace_bytes = info.workspace_bytes;
    if (j->logits_in == NULL) {
        int32_t code;
        j->logits = (float *)take(n * (uint64_t)j->width, sizeof *j->logits);
        args.x = j->router_x != NULL ? j->router_x : j->x;
        if ((code = moe_router_logits(j->plan, j->weights, &args, j->logits, NULL)) != MOE_OK)
            return fail("the router's logits: %s", moe_result_string(code));
    }
    args.x = j->x;
    args.logits = j->logits;
    if (moe_execute_check(j->plan, j->weights, &args, &err)) return fail("%s", err.text);
    for (int i = 0; i < 1000 && (i == 0 || now() - start < 1.0); i++) { // the best of up to a second
        double before = now(), seconds;
        if (moe_execute(j->plan, j->weights, &args, NULL)) return fail("moe_execute failed");
        seconds = now() - before;
        if (i == 0 || seconds < j->seconds) j->seconds = seconds;
    }
    return 0;
}

// ---- comparison -----------------------------------------------------------------------------------------------------

// Whether token t chose the golden experts, in any order.
static int same_experts(const job *j, const int32_t *golden, int32_t t)
{
    int32_t k = j->layer.routing.top_k;
    for (int32_t a = 0; a < k; a++) {
        int32_t found = 0;
        for (int32_t b = 0; b < k; b++) found |= j->chosen_ids[t * j->slots + b] == golden[t * k + a];
        if (!found) return 0;
    }
    return 1;
}

static int compare(job *j)
{
    moe_checkpoint_tensor t_out, t_ids;
    int32_t hidden = j->layer.hidden_size;
    float *golden;
    int32_t *ids;
    if (j->input != NULL || j->logits_in != NULL || golden_find(j, "out", &t_out) || golden_find(j, "ids", &t_ids))
        return 0;
    golden = (float *)golden_rows(j, &t_out, MOE_DTYPE_F32, hidden);
    ids = (int32_t *)golden_rows(j, &t_ids, MOE_DTYPE_I32, j->layer.routing.top_k);
    if (golden == NULL || ids == NULL) { free(golden); free(ids); return 1; }
    j->errors = (double *)take((uint64_t)j->tokens, sizeof *j->errors);
    for (int32_t t = 0; t < j->tokens; t++) {
        double largest = 1e-30, error = 0;
        for (int32_t i = 0; i < hidden; i++) {
            size_t at = (size_t)t * (size_t)hidden + (size_t)i;
            double want = golden[at], difference = absolute(j->out[at] - want);
            if (absolute(want) > largest) largest = absolute(want);
            if (!(difference <= error)) error = difference;
        }
        j->errors[t] = error / largest;
        if (!(j->errors[t] <= j->worst)) { j->worst = j->errors[t]; j->worst_token = t; }
        if (!j->failed && !same_experts(j, ids, t)) {
            j->failed = 1;
            snprintf(j->verdict, sizeof j->verdict, "token %d: other experts were chosen than %s has", t, t_ids.name);
        }
    }
    if (!j->failed && !(j->worst <= TOLERANCE)) {
        j->failed = 1;
        snprintf(j->verdict, sizeof j->verdict, "token %d: the output differs from %s by %.2e of the row's maximum, "
                 "1e-5 is allowed", j->worst_token, t_out.name, j->worst);
    }
    free(golden);
    free(ids);
    return 0;
}

// ---- report: text ---------------------------------------------------------------------------------------------------

static int list_layers(const job *j)
{
    moe_error err;
    int32_t count = 0, *indices;
    if (moe_checkpoint_layers(j->ckpt, NULL, 0, &count, &err)) return fail("%s", err.text);
    indices = (int32_t *)take((uint64_t)count, sizeof *indices);
    moe_checkpoint_layers(j->ckpt, indices, count, &count, &err);
    printf("%s: %d tensors, %d MoE layer%s; run one with --layer N\n", j->folder, moe_checkpoint_count(j->ckpt), count,
           count == 1 ? "" : "s");
    for (int32_t i = 0; i < count; i++) {
        moe_layer_desc l;
        if (moe_checkpoint_layer(j->ckpt, indices[i], &l, &err)) printf("  layer %d: %s\n", indices[i], err.text);
        else
            printf("  layer %d: %d experts, %d per token, H %d, I %d, %s, %s, routing %s\n", indices[i], l.num_experts,
                   l.routing.top_k, l.hidden_size, l.intermediate_size, moe_format_string(l.format),
                   moe_activation_string(l.activation.kind),
                   moe_routing_method_string(moe_routing_method_of(&l.routing)));
    }
    free(indices);
    return 0;
}

static void report(const job *j)
{
    static const char bar[] = "########################################";
    int32_t experts = j->layer.num_experts, most = j->counts[busiest(j)], shown = experts < 64 ? experts : 64;
    printf("%s, layer %d\n", j->folder, j->index);
    if (j->num_checksums > 0) printf("%d files are as CHECKSUMS records them\n", j->num_checksums);
    printf("\n%-34s %-22s %s\n", "inferred", "value", "from");
    for (int32_t i = 0; i < j->num_facts; i++)
        printf("  %-32s %-22s %s\n", j->facts[i].name, j->facts[i].value, j->facts[i].source);
    printf("\n%d tokens from %s; logits from %s\n\nload: tokens per expert, of %d\n", j->tokens, j->x_source,
           j->logits_source, j->tokens);
    for (int32_t e = 0; e < shown; e++)
        printf("  %4d  %-40.*s %d\n", e, most == 0 ? 0 : (int)(40 * (int64_t)j->counts[e] / most), bar, j->counts[e]);
    if (shown < experts)
        printf("  ... and %d more; the busiest is expert %d with %d\n", experts - shown, busiest(j), most);
    printf("\n%.3f ms for %d tokens, best of several runs (%s, %s, %d threads)\n", j->seconds * 1e3, j->tokens,
           j->machine.name, j->machine.isa, j->machine.threads);
    if (j->errors == NULL) printf("no golden output to compare with\n");
    else if (!j->failed)
        printf("experts as in golden.safetensors; largest error %.2e of a row's maximum (token %d; 1e-5 is allowed)\n",
               j->worst, j->worst_token);
}

// ---- report: files --------------------------------------------------------------------------------------------------

static int write_report(const job *j, const char *path, int is_page)
{
    FILE *f = fopen(path, "wb");
    int good;
    if (f == NULL) return fail("%s: cannot be written: %s", path, strerror(errno));
    if (is_page) page(f, j);
    else picture(f, j, 1);
    good = !ferror(f);
    return fclose(f) == 0 && good ? 0 : fail("%s: writing failed", path);
}

static int write_all(const job *j)
{
    int64_t rows = j->tokens;
    return (j->output != NULL && npy_write(j->output, "'<f4'", rows, j->layer.hidden_size, j->out)) ||
           (j->ids_out != NULL && npy_write(j->ids_out, "'<i4'", rows, j->slots, j->chosen_ids)) ||
           (j->weights_out != NULL && npy_write(j->weights_out, "'<f4'", rows, j->slots, j->chosen_weights)) ||
           (j->html != NULL && write_report(j, j->html, 1)) || (j->svg != NULL && write_report(j, j->svg, 0));
}

// ---- command line ---------------------------------------------------------------------------------------------------

static int usage(void)
{
    fprintf(stderr, "usage: moe_layer DIR [--layer N] [--tokens T] [--input X.npy] [--logits L.npy]\n"
            "                 [--token-ids I.npy] [--output Y.npy] [--ids I.npy] [--weights W.npy]\n"
            "                 [--html FILE] [--svg FILE]\n"
            "Without --layer it lists the MoE layers of the checkpoint folder DIR.\n");
    return 2;
}

static int parse_number(const char *text, int32_t low, int32_t *out)
{
    char *end;
    long value = strtol(text, &end, 10);
    if (*text == 0 || *end != 0 || value < low || value > 1000000) return 1;
    *out = (int32_t)value;
    return 0;
}

static int parse(job *j, int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        const char *a = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL, **target = NULL;
        if (a[0] != '-' && j->folder == NULL) { j->folder = a; continue; }
        if (value == NULL) return fail("%s has no value, or is not known", a), usage();
        i++;
        if (strcmp(a, "--layer") == 0) {
            if (parse_number(value, 0, &j->index)) return fail("--layer is %s: it must be a number from 0", value), 2;
        } else if (strcmp(a, "--tokens") == 0) {
            if (parse_number(value, 1, &j->tokens)) return fail("--tokens is %s: it must be 1..1000000", value), 2;
        } else {
            if (strcmp(a, "--input") == 0) target = &j->input;
            if (strcmp(a, "--logits") == 0) target = &j->logits_in;
            if (strcmp(a, "--token-ids") == 0) target = &j->token_ids_in;
            if (strcmp(a, "--output") == 0) target = &j->output;
            if (strcmp(a, "--ids") == 0) target = &j->ids_out;
            if (strcmp(a, "--weights") == 0) target = &j->weights_out;
            if (strcmp(a, "--html") == 0) target = &j->html;
            if (strcmp(a, "--svg") == 0) target = &j->svg;
            if (target == NULL) return fail("%s is not known", a), usage();
            *target = value;
        }
    }
    return j->folder == NULL ? usage() : 0;
}

int main(int argc, char **argv)
{
    static job j;
    int code;
    j.index = -1;
    if ((code = parse(&j, argc, argv)) != 0) return code;
    code = verify_checksums(&j) || open_layer(&j);
    if (!code && j.index < 0) code = list_layers(&j);
    else if (!code) {
        code = run(&j) || compare(&j);
        if (!code) report(&j);
        if (!code) code = write_all(&j);
        if (!code && j.failed) code = fail("FAILED: %s", j.verdict);
    }
    moe_plan_destroy(j.plan);
    moe_weights_destroy(j.weights);
    moe_context_destroy(j.ctx);
    moe_checkpoint_close(j.golden);
    moe_checkpoint_close(j.ckpt);
    free(j.facts); free(j.x); free(j.router_x); free(j.logits); free(j.chosen_weights); free(j.out);
    free(j.token_ids); free(j.chosen_ids); free(j.counts); free(j.workspace); free(j.errors);
    return code;
}
