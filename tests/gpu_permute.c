// gpu_permute.c - rows in expert order on the device: the CPU's tables, to the word, for every tile, part of the
// experts and number of tokens, from logits and from the caller's ids
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"
#include "gpu.h"

static void check_permute(const pair *p, inputs *in, int tile, const char *what)
{
    char text[160];
    in->c.tile = tile;
    snprintf(text, sizeof text, "%.80s, T %d, tile %d", what, in->c.tokens, tile);
    CHECK_CALL(p, &in->c, text);
}

TEST(every_tile_and_every_part_of_the_experts)
{
    static const int tiles[] = { 1, 8, 48, 64, 128 };
    if (!gpu_open()) return;
    for (int local = 1; local <= 24; local += local == 1 ? 6 : 17)
        for (int kind = 0; kind < 3; kind++) {
            moe_routing_desc r = preset(MOE_ROUTING_RENORMALIZE, 3);
            pair p = { 0 };
            inputs in = { 0 };
            char text[60];
            p.layer.parallel.local_experts = local;
            p.layer.parallel.expert_offset = local == 24 ? 0 : 3;
            p.desc.max_tokens = 50;
            if (!pair_make(&p, &r, 24)) continue;
            snprintf(text, sizeof text, "local %d, kind %d", local, kind);
            if (kind == 0) inputs_logits(&in, &p, 50, 64, 7);
            else inputs_ids(&in, &p, kind == 1 ? 50 : 1, kind == 2, MOE_EXECUTE_ID_E_IS_NONE, 8);
            for (int i = 0; i < 5; i++) check_permute(&p, &in, tiles[i], text);
            inputs_free(&in);
            pair_close(&p);
        }
}

// Experts by a map, always-on experts behind them, common ones left out on all ranks but one.
TEST(mapped_and_common_experts)
{
    if (!gpu_open()) return;
    for (int variant = 0; variant < 4; variant++) {
        moe_routing_desc r = preset(MOE_ROUTING_RENORMALIZE, 4);
        pair p = { 0 };
        inputs in = { 0 };
        int32_t map[40];
        for (int e = 0; e < 40; e++) map[e] = e % 4 == 1 ? 9 - e / 4 : -1;
        r.extra_slots = 2;
        if (variant >= 2) { r.special_experts = 5; r.special_kind = MOE_SPECIAL_ZERO; }
        p.layer.parallel.local_experts = 10;
        p.layer.parallel.expert_map = map;
        p.layer.parallel.omit_common = variant % 2;
        p.desc.max_tokens = 33;
        if (!pair_make(&p, &r, 40)) continue;
        inputs_logits(&in, &p, 33, 64, 21);
        check_permute(&p, &in, 16, "map, logits");
        inputs_free(&in);
        inputs_ids(&in, &p, 33, 0, 0, 22);
        check_permute(&p, &in, 8, "map, ids");
        inputs_free(&in);
        pair_close(&p);
    }
}

TEST(every_number_of_tokens_and_experts)
{
    static const int tokens[] = { 0, 1, 2, 5, 8, 9, 16, 31, 33, 64, 100, 128, 129, 256, 700, 1024, 1025, 3000, 8192,
                                  40000, 65536 };
    static const int experts[] = { 8, 32, 64, 200, 256, 384, 512, 600, 1024, 2048 };
    if (!gpu_open()) return;
    for (int i = 0; i < (int)(sizeof tokens / sizeof tokens[0]); i++) {
        moe_routing_desc r = preset(MOE_ROUTING_RENORMALIZE, 8);
        pair p = { 0 };
        inputs in = { 0 };
        if (!gpu_large() && tokens[i] > 64) break;
        p.desc.max_tokens = tokens[i] > 0 ? tokens[i] : 1;
        if (!pair_make(&p, &r, experts[i % 10])) continue;
        inputs_logits(&in, &p, tokens[i], 4096, 7);
        check_permute(&p, &in, i % 2 == 0 ? 64 : 8, "sizes");
        inputs_free(&in);
        inputs_ids(&in, &p, tokens[i], 0, 0, 9);
        check_permute(&p, &in, i % 2 == 0 ? 8 : 128, "sizes, ids");
        inputs_free(&in);
        pair_close(&p);
    }
}

// More tokens than one launch takes, also where the emulated device runs it.
TEST(more_tokens_than_one_launch_takes)
{
    moe_routing_desc r = preset(MOE_ROUTING_RENORMALIZE, 2);
    pair p = { 0 };
    inputs in = { 0 };
    if (!gpu_open()) return;
    p.desc.max_tokens = 1100;
    if (!pair_make(&p, &r, 16)) return;
    inputs_logits(&in, &p, 1100, 64, 7);
    check_permute(&p, &in, 16, "two launches");
    inputs_free(&in);
    inputs_ids(&in, &p, 1099, 0, 0, 8);
    check_permute(&p, &in, 8, "two launches, ids");
    inputs_free(&in);
    pair_close(&p);
}

// Wider routers than one launch takes.
TEST(more_experts_than_one_launch_takes)
{
    if (!gpu_open()) return;
    for (int experts = 513; experts <= 2048; experts += 1535) {
        moe_routing_desc r = preset(MOE_ROUTING_RENORMALIZE, 8);
        pair p = { 0 };
        inputs in = { 0 };
        p.desc.max_tokens = 40;
        if (!pair_make(&p, &r, experts)) continue;
        inputs_logits(&in, &p, 40, 4096, 7);
        check_permute(&p, &in, 8, "wide");
        inputs_free(&in);
        inputs_ids(&in, &p, 40, 0, 0, 8);
        check_permute(&p, &in, 1, "wide, ids");
        inputs_free(&in);
        pair_close(&p);
    }
}

// One expert takes every token; all slots empty.
TEST(hot_experts_and_empty_slots)
{
    if (!gpu_open()) return;
    for (int hot = 0; hot < 2; hot++) {
        moe_routing_desc r = preset(MOE_ROUTING_RENORMALIZE, 4);
        pair p = { 0 };
        inputs in = { 0 };
        int32_t *ids;
        p.desc.max_tokens = 64;
        if (!pair_make(&p, &r, 32)) continue;
        inputs_ids(&in, &p, 64, 0, 0, 3);
        ids = (int32_t *)in.ids;
        for (int i = 0; i < 256; i++) ids[i] = hot ? 17 : -1;
        check_permute(&p, &in, 8, hot ? "one expert" : "empty");
        inputs_free(&in);
        pair_close(&p);
    }
}

TEST(the_count_on_the_device_leaves_the_bound_as_it_is)
{
    static const int held[] = { 0, 1, 13, 20 };
    if (!gpu_open()) return;
    for (int kind = 0; kind < 2; kind++) {
        moe_routing_desc r = preset(MOE_ROUTING_RENORMALIZE, 4);
        pair p = { 0 };
        inputs in = { 0 };
        p.desc.max_tokens = 20;
        if (!pair_make(&p, &r, 16)) continue;
        if (kind == 0) inputs_logits(&in, &p, 20, 64, 3);
        else inputs_ids(&in, &p, 20, 0, 0, 3);
        for (int i = 0; i < 4; i++) {
            in.c.held = held[i];
            check_permute(&p, &in, 8, "held");
        }
        inputs_free(&in);
        pair_close(&p);
    }
}

// Each table alone is what it is among all.
TEST(every_table_may_be_left_out)
{
    moe_routing_desc r = preset(MOE_ROUTING_RENORMALIZE, 3);
    pair p = { 0 };
    inputs in = { 0 };
    answer want, got;
    if (!gpu_open()) return;
    p.desc.max_tokens = 25;
    if (!pair_make(&p, &r, 20)) return;
    inputs_logits(&in, &p, 25, 64, 5);
    in.c.tile = 8;
    call_cpu(&p, &in.c, &want);
    for (int part = 0; part < ANSWER_PARTS; part++) {
        moe_execute_args args;
        moe_permutation out;
        void *at[ANSWER_PARTS];
        size_t words = want.words[part];
        answer_make(&got, &p, &in.c);
        call_gpu_begin(&p, &in.c, &got, &args, &out, at);
        for (int i = 0; i < ANSWER_PARTS; i++)
            if (i != part) at[i] = NULL;
        answer_place(at, &args, &out);
        CHECK_EQ(call_run(&p, 1, &args, &out, NULL), MOE_OK);
        gpu_get(got.part[part], at[part], words * 4);
        if (part == ANSWER_TILE_EXPERT || part == ANSWER_TILE_LIMIT) words = want.part[ANSWER_TILES][0];
        if (memcmp(want.part[part], got.part[part], words * 4) != 0)
            test_fail2(__FILE__, __LINE__, "alone", answer_names[part]);
        gpu_release();
        answer_free(&got);
    }
    answer_free(&want);
    inputs_free(&in);
    pair_close(&p);
}

TEST(two_runs_give_the_same_words)
{
    moe_routing_desc r = preset(MOE_ROUTING_DEEPSEEK_V3, 8);
    pair p = { 0 };
    inputs in = { 0 };
    answer first, again;
    if (!gpu_open()) return;
    p.desc.max_tokens = gpu_large() ? 8192 : 60;
    if (!pair_make(&p, &r, 256)) return;
    inputs_logits(&in, &p, p.desc.max_tokens, 4096, 5);
    in.c.tile = 8;
    call_gpu(&p, &in.c, &first);
    for (int i = 0; i < 3; i++) {
        call_gpu(&p, &in.c, &again);
        for (int j = 0; j < ANSWER_PARTS; j++)
            if (memcmp(first.part[j], again.part[j], first.words[j] * 4) != 0)
                test_fail2(__FILE__, __LINE__, "again", answer_names[j]);
        answer_free(&again);
    }
    answer_free(&first);
    inputs_free(&in);
    pair_close(&p);
}

// Refused on the host, before anything is enqueued.
TEST(arguments_are_checked)
{
    moe_routing_desc r = preset(MOE_ROUTING_RENORMALIZE, 3);
    pair p = { 0 };
    inputs in = { 0 };
    answer a;
    moe_execute_args good, bad;
    moe_permutation out, wrong;
    void *at[ANSWER_PARTS];
    if (!gpu_open()) return;
    p.desc.max_tokens = 9;
    if (!pair_make(&p, &r, 20)) return;
    inputs_logits(&in, &p, 9, 64, 5);
    in.c.tile = 8;
    answer_make(&a, &p, &in.c);
    call_gpu_begin(&p, &in.c, &a, &good, &out, at);
#define REFUSED(statement) \
    do { \
        bad = good; \
        wrong = out; \
        statement; \
        CHECK_EQ(moe_permute(p.plan[1], p.weights[1], &bad, &wrong, NULL), MOE_ERROR_ARGUMENT); \
    } while (0)
    REFUSED(bad.logits = NULL);
    REFUSED(bad.logits = (const char *)good.logits + 2);
    REFUSED(bad.logits_stride = 19);
    REFUSED(bad.num_tokens = 10);
    REFUSED(bad.num_tokens = -1);
    REFUSED(bad.workspace = NULL);
    REFUSED(bad.workspace = (char *)good.workspace + 128);
    REFUSED(bad.workspace_bytes = 16);
    REFUSED(bad.out_ids = (int32_t *)(void *)((char *)good.out_ids + 2));
    REFUSED(bad.input_mode = MOE_INPUT_SORTED);
    REFUSED(wrong.tile = 0);
    REFUSED(wrong.slot_of_row = (int32_t *)(void *)((char *)out.slot_of_row + 1));
#undef REFUSED
    CHECK_EQ(moe_permute(p.plan[1], NULL, &good, &out, NULL), MOE_ERROR_ARGUMENT);
    CHECK_EQ(moe_permute(p.plan[1], p.weights[0], &good, &out, NULL), MOE_ERROR_ARGUMENT);
    CHECK_EQ(moe_permute(p.plan[1], p.weights[1], &good, &out, NULL), MOE_OK);
    gpu_release();
    answer_free(&a);
    inputs_free(&in);
    pair_close(&p);
}

TEST_MAIN(
    T(every_tile_and_every_part_of_the_experts)
    T(mapped_and_common_experts)
    T(every_number_of_tokens_and_experts)
    T(more_tokens_than_one_launch_takes)
    T(more_experts_than_one_launch_takes)
    T(hot_experts_and_empty_slots)
    T(the_count_on_the_device_leaves_the_bound_as_it_is)
    T(every_table_may_be_left_out)
    T(two_runs_give_the_same_words)
    T(arguments_are_checked)
)
