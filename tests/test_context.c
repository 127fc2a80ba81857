// Contexts: their descriptor, the allocator hook, the pool of threads, the parallel-for hook, kernel sets.
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"

static moe_context_desc context_desc(void)
{
    moe_context_desc desc;
    memset(&desc, 0, sizeof desc);
    return desc;
}

static moe_context *const poison = (moe_context *)(uintptr_t)64; // must be NULL after a refusal

TEST(all_defaults_give_a_cpu_context)
{
    moe_context *ctx = poison;
    moe_context_info info;
    memset(&info, 0, sizeof info);
    REQUIRE_OK(moe_context_create(NULL, &ctx, &err));
    CHECK_OK(moe_context_get_info(ctx, &info, &err));
    CHECK_EQ(info.backend, MOE_BACKEND_CPU);
    CHECK(info.threads >= 1);
    CHECK(info.name[0] != 0);
    CHECK(info.isa[0] != 0);
    CHECK_EQ(info.struct_size, (uint32_t)sizeof info);
    moe_context_destroy(ctx);
    moe_context_destroy(NULL);
}

static void refused(moe_context_desc desc, int32_t code, const char *member, const char *text)
{
    moe_context *ctx = poison;
    CHECK_ERR(moe_context_create(&desc, &ctx, &err), code, member);
    CHECK(ctx == NULL);
    CHECK_CONTAINS(err.text, text);
}

static void *alloc_none(void *user, size_t size, size_t align)
{
    (void)user;
    (void)size;
    (void)align;
    return NULL;
}

static void free_none(void *user, void *ptr, size_t size)
{
    (void)user;
    (void)ptr;
    (void)size;
}

TEST(every_illegal_member_is_refused_by_name)
{
    moe_context_desc desc;
    desc = context_desc(), desc.struct_size = 12, refused(desc, MOE_ERROR_ARGUMENT, "desc.struct_size", "is 12");
    desc = context_desc(), desc.backend = 7, refused(desc, MOE_ERROR_ARGUMENT, "desc.backend", "is 7");
    desc = context_desc(), desc.backend = -1, refused(desc, MOE_ERROR_ARGUMENT, "desc.backend", "is -1");
    desc = context_desc(), desc.backend = MOE_BACKEND_CUDA, desc.device_allocator.free = free_none;
    refused(desc, MOE_ERROR_ARGUMENT, "desc.device_allocator", "both");
    desc = context_desc(), desc.backend = MOE_BACKEND_CUDA, desc.device = 1, desc.cuda_context = &desc;
    refused(desc, MOE_ERROR_ARGUMENT, "desc.device", "with desc.cuda_context");
    desc = context_desc(), desc.device = 1, refused(desc, MOE_ERROR_ARGUMENT, "desc.device", "is 1");
    desc = context_desc(), desc.device = -1, refused(desc, MOE_ERROR_ARGUMENT, "desc.device", "is -1");
    desc = context_desc(), desc.threads = -1, refused(desc, MOE_ERROR_ARGUMENT, "desc.threads", "0..");
    desc = context_desc(), desc.threads = 1000000, refused(desc, MOE_ERROR_ARGUMENT, "desc.threads", "is 1000000");
    desc = context_desc(), desc.cuda_context = &desc, refused(desc, MOE_ERROR_ARGUMENT, "desc.cuda_context", "CPU");
    desc = context_desc(), desc.isa = "mmx", refused(desc, MOE_ERROR_ARGUMENT, "desc.isa", "\"mmx\"");
    desc = context_desc(), desc.allocator.alloc = alloc_none, refused(desc, MOE_ERROR_ARGUMENT, "desc.allocator", "both");
    desc = context_desc(), desc.allocator.free = free_none, refused(desc, MOE_ERROR_ARGUMENT, "desc.allocator", "both");
    CHECK_ERR(moe_context_create(NULL, NULL, &err), MOE_ERROR_ARGUMENT, "out");
}

TEST(info_refuses_null_and_wrong_sizes)
{
    moe_context *ctx;
    moe_context_info info;
    memset(&info, 0, sizeof info);
    REQUIRE_OK(moe_context_create(NULL, &ctx, &err));
    CHECK_ERR(moe_context_get_info(NULL, &info, &err), MOE_ERROR_ARGUMENT, "ctx");
    CHECK_ERR(moe_context_get_info(ctx, NULL, &err), MOE_ERROR_ARGUMENT, "info");
    info.struct_size = 1;
    CHECK_ERR(moe_context_get_info(ctx, &info, &err), MOE_ERROR_ARGUMENT, "info.struct_size");
    moe_context_destroy(ctx);
}

TEST(an_allocator_that_gives_nothing_is_an_error_of_its_own)
{
    moe_context_desc desc = context_desc();
    desc.allocator.alloc = alloc_none;
    desc.allocator.free = free_none;
    refused(desc, MOE_ERROR_MEMORY, "", "NULL");
}

TEST(errors_are_optional)
{
    moe_context_desc desc = context_desc();
    moe_context *ctx = poison;
    desc.device = 3;
    CHECK_EQ(moe_context_create(&desc, &ctx, NULL), MOE_ERROR_ARGUMENT);
    CHECK(ctx == NULL);
}

typedef struct tally {
    unsigned char done[257];
    int32_t calls;
} tally;

static void mark(void *arg, int32_t index) { ((tally *)arg)->done[index]++; }

TEST(every_task_runs_exactly_once)
{
    static const int32_t threads[] = { 1, 2, 7 };
    for (int32_t t = 0; t < 3; t++) {
        moe_context_desc desc = context_desc();
        moe_context *ctx;
        desc.threads = threads[t];
        REQUIRE_OK(moe_context_create(&desc, &ctx, &err));
        for (int32_t round = 0; round < 200; round++) {
            int32_t tasks = round % 257;
            tally seen;
            memset(&seen, 0, sizeof seen);
            moe__parallel(ctx, tasks, mark, &seen);
            for (int32_t i = 0; i < 257; i++) CHECK_EQ(seen.done[i], i < tasks);
        }
        moe_context_destroy(ctx);
    }
}

static void serial_for(void *user, int32_t tasks, void (*task)(void *arg, int32_t index), void *arg)
{
    ((tally *)user)->calls++;
    while (tasks > 0) task(arg, --tasks);
}

TEST(the_hook_replaces_the_pool)
{
    moe_context_desc desc = context_desc();
    moe_context *ctx;
    tally hook, seen;
    memset(&hook, 0, sizeof hook);
    memset(&seen, 0, sizeof seen);
    desc.threads = 4;
    desc.parallel_for = serial_for;
    desc.parallel_user = &hook;
    REQUIRE_OK(moe_context_create(&desc, &ctx, &err));
    moe__parallel(ctx, 9, mark, &seen);
    CHECK_EQ(hook.calls, 1);
    CHECK_EQ(seen.done[8], 1);
    moe_context_destroy(ctx);
}

typedef struct journal {
    char text[2048];
    int32_t lines, worst; // worst: the lowest level seen
} journal;

static void keep_line(void *user, int32_t level, const char *text)
{
    journal *j = (journal *)user;
    snprintf(j->text + strlen(j->text), sizeof j->text - strlen(j->text), "%s\n", text);
    j->lines++;
    if (level < j->worst) j->worst = level;
}

TEST(the_log_hook_is_told_what_was_decided)
{
    moe_context_desc desc = context_desc();
    moe_layer_desc layer;
    moe_context *ctx;
    moe_plan *plan;
    journal j;
    memset(&j, 0, sizeof j);
    memset(&layer, 0, sizeof layer);
    j.worst = 99;
    desc.isa = "scalar";
    desc.threads = 3;
    desc.log = keep_line;
    desc.log_user = &j;
    REQUIRE_OK(moe_context_create(&desc, &ctx, &err));
    CHECK_EQ(j.lines, 1);
    CHECK_CONTAINS(j.text, "scalar kernels, 3 threads");
    layer.hidden_size = layer.intermediate_size = layer.num_experts = 8;
    layer.format = MOE_FORMAT_F32;
    layer.activation.kind = MOE_ACTIVATION_SWIGLU;
    REQUIRE_OK(moe_routing_preset(MOE_ROUTING_RENORMALIZE, &layer.routing, &err));
    layer.routing.top_k = 2;
    REQUIRE_OK(moe_plan_create(ctx, &layer, NULL, &plan, &err));
    CHECK_CONTAINS(j.text, "plan for 8192 tokens");
    CHECK_EQ(j.worst, MOE_LOG_INFO);
    moe_plan_destroy(plan);
    moe_context_destroy(ctx);
}

TEST(every_kernel_set_that_is_reported_can_be_forced)
{
    for (int32_t isa = 0; isa < 4; isa++) {
        moe_context_desc desc = context_desc();
        moe_context *ctx = poison;
        moe_context_info info;
        memset(&info, 0, sizeof info);
        desc.isa = moe__isa_names[isa];
        if (!moe__isa_available(isa)) {
            refused(desc, MOE_ERROR_UNSUPPORTED, "desc.isa", desc.isa);
            continue;
        }
        REQUIRE_OK(moe_context_create(&desc, &ctx, &err));
        CHECK_OK(moe_context_get_info(ctx, &info, &err));
        CHECK_STR(info.isa, desc.isa);
        moe_context_destroy(ctx);
    }
}

TEST(names_are_never_null)
{
    for (int32_t i = -200; i < 200; i++) {
        CHECK(moe_result_string(i) != NULL);
        CHECK(moe_dtype_string(i) != NULL);
        CHECK(moe_format_string(i) != NULL);
        CHECK(moe_activation_string(i) != NULL);
        CHECK(moe_routing_method_string(i) != NULL);
        CHECK(moe_role_string(i) != NULL);
        CHECK((moe_dtype_bits(i) == 0) == (strcmp(moe_dtype_string(i), "?") == 0));
    }
    CHECK_STR(moe_result_string(MOE_ERROR_DATA), "MOE_ERROR_DATA");
    CHECK_EQ(moe_version(), MOE_VERSION);
}

TEST_MAIN(
    T(all_defaults_give_a_cpu_context)
    T(every_illegal_member_is_refused_by_name)
    T(info_refuses_null_and_wrong_sizes)
    T(an_allocator_that_gives_nothing_is_an_error_of_its_own)
    T(errors_are_optional)
    T(every_task_runs_exactly_once)
    T(the_hook_replaces_the_pool)
    T(the_log_hook_is_told_what_was_decided)
    T(every_kernel_set_that_is_reported_can_be_forced)
    T(names_are_never_null))
