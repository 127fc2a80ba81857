// test_tiles.c - tiles of the two products: names there and back, each rule by a case that breaks it alone, the choice
// for the layers of known models on the known chips (tests/data/tiles.tsv), what a plan tells of it. No GPU.
//
// MOE_TEST_TILES=FILE writes the choices there, to replace tests/data/tiles.tsv.
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "../moe.h"
#include "test.h"

#if !defined(MOE_NO_CUDA)

// ---- chips and layers -----------------------------------------------------------------------------------------------

#define chips moe__tile_chips
enum { CHIPS = MOE__TILE_CHIPS, A100 = 0, RTX4090 = 2, H200 = 4, B200 = 6, RTX5090 = 8 };

typedef struct layer_entry {
    const char *name;
    int format, block, hidden, features, experts, top_k;
} layer_entry;

static const layer_entry layers[] = {
    { "DeepSeek-V3/fp8_block", MOE_FORMAT_FP8_BLOCK, 128, 7168, 2048, 256, 8 },
    { "Qwen3-235B/fp8_block", MOE_FORMAT_FP8_BLOCK, 128, 4096, 1536, 128, 8 },
    { "Qwen3-30B/fp8_block", MOE_FORMAT_FP8_BLOCK, 128, 2048, 768, 128, 8 },
    { "E256-I512/fp8_block", MOE_FORMAT_FP8_BLOCK, 128, 2048, 512, 256, 8 },
    { "Qwen3-235B/bf16", MOE_FORMAT_BF16, 0, 4096, 1536, 128, 8 },
    { "Qwen3-30B/bf16", MOE_FORMAT_BF16, 0, 2048, 768, 128, 8 },
    { "DeepSeek-V3/nvfp4", MOE_FORMAT_NVFP4, 0, 7168, 2048, 256, 8 },
    { "DeepSeek-V3/nvfp4_w4a16", MOE_FORMAT_NVFP4_W4A16, 0, 7168, 2048, 256, 8 },
    { "gpt-oss-120b/mxfp4_w4a8", MOE_FORMAT_MXFP4_W4A8, 0, 2880, 2880, 128, 4 },
    { "Kimi-K2/int4_w4a16", MOE_FORMAT_INT4_W4A16, 32, 7168, 2048, 384, 8 },
};
enum { LAYERS = sizeof layers / sizeof layers[0] };

static const int home[MOE__FAMILIES] = { H200, H200, B200, RTX5090 }; // a chip of each family
static const int token_counts[] = { 1, 8, 32, 128, 1024, 8192 };

static moe__tile_problem problem(const layer_entry *l, int tokens)
{
    moe__tile_problem p;
    memset(&p, 0, sizeof p);
    p.format = l->format;
    p.block = l->block;
    p.dtype = p.x_dtype = MOE_DTYPE_BF16;
    p.hidden = l->hidden;
    p.features = l->features;
    p.activation = MOE_ACTIVATION_SWIGLU;
    p.experts = p.local = l->experts;
    p.top_k = l->top_k;
    p.tokens = tokens;
    return p;
}

// A layer of this format that no rule has a reason to refuse.
static moe__tile_problem plain(int format)
{
    layer_entry l = { "", MOE_FORMAT_UNSET, 128, 8192, 4096, 64, 4 };
    l.format = format;
    return problem(&l, 512);
}

static int check(const moe__tile_row *row, const moe__tile_problem *p, int chip, int product, char *why, size_t bytes)
{
    moe__text text = moe__text_make(why, bytes);
    return moe__tile_check(row, p, &chips[chip].chip, product, &text);
}

static int multiplies(const moe__tile_row *row, int format) { return (int)(row->formats >> format & 1); }

static moe_layer_desc layer_desc(int format)
{
    moe_layer_desc l;
    memset(&l, 0, sizeof l);
    l.hidden_size = 4096;
    l.intermediate_size = 1536;
    l.num_experts = 128;
    l.format = format;
    l.activation.kind = MOE_ACTIVATION_SWIGLU;
    l.routing.score = MOE_SCORE_SOFTMAX;
    l.routing.score_order = MOE_SCORE_AFTER_TOPK;
    l.routing.top_k = 8;
    return l;
}

// ---- the tables -----------------------------------------------------------------------------------------------------

TEST(every_row_is_legal_where_it_belongs)
{
    for (int i = 0; i < MOE__TILES; i++) {
        const moe__tile_row *row = &moe__tile_rows[i];
        CHECK(row->formats != 0);
        CHECK_EQ(row->built & ~row->formats, 0u);
        for (int format = 1; format <= MOE_FORMAT_INT4_W4A16; format++) {
            moe__tile_problem p = plain(format);
            for (int product = 1; product <= 2 && multiplies(row, format); product++) {
                char why[256], text[300];
                int rule = check(row, &p, home[row->tile.family], product, why, sizeof why);
                if (rule == MOE__RULE_NONE) continue;
                snprintf(text, sizeof text, "row %d, %s, product %d: %.200s", i, moe_format_string(format), product,
                         why);
                test_fail(__FILE__, __LINE__, text);
            }
        }
    }
}

static int16_t legal_everywhere(const moe__tile_row *row, const moe__tile_problem *p)
{
    char why[256];
    for (int chip = 0; chip < CHIPS; chip++)
        for (int product = 1; product <= 2; product++)
            if (check(row, p, chip, product, why, sizeof why) != MOE__RULE_NONE) return 0;
    return 1;
}

// Kernels exist for these: moe_kernels.cu.inc's GEMM_STAGES, GEMM_THREADS and MOE_P_CTAS say the same.
TEST(the_rows_with_kernels)
{
    static const int n[] = { 16, 32, 64, 128 }, stages[] = { 4, 4, 4, 3 };
    static const int smem[] = { 73792, 81984, 98368, 98352 };
    int built = 0;
    for (int i = 0; i < MOE__TILES; i++) {
        const moe__tile_row *row = &moe__tile_rows[i];
        moe__tile_problem p = plain(MOE_FORMAT_BF16);
        moe__tile_config c;
        if ((row->built & (1u << MOE_FORMAT_BF16 | 1u << MOE_FORMAT_F16)) == 0) continue;
        REQUIRE(built < 4);
        CHECK_EQ(row->built, 1u << MOE_FORMAT_BF16 | 1u << MOE_FORMAT_F16);
        CHECK_EQ(row->tile.family, MOE__FAMILY_MMA);
        CHECK(row->tile.m == 128 && row->tile.n == n[built] && row->tile.k == 64);
        CHECK_EQ(row->tile.stages, stages[built]);
        CHECK_EQ(moe__tile_threads(&row->tile), 128);
        CHECK(moe__tile_config_make(&c, &row->tile, &p, 1));
        CHECK_EQ(moe__tile_smem(&c), smem[built]);
        CHECK_EQ(moe__tile_ctas(&c, &chips[H200].chip), built < 1 ? 3 : 2); // of 3, 81,984 bytes each do not fit
        CHECK(legal_everywhere(row, &p));
        built++;
    }
    CHECK_EQ(built, 4);
}

// Codes are widened: tokens are of 16 bits, and a scale of every weight row is in the stage.
TEST(the_rows_with_kernels_for_codes)
{
    static const struct { int format, n, stage, stages, ctas; } of[] = {
        { MOE_FORMAT_NVFP4_W4A16, 16, 8192 + 4096 + 1024, 3, 5 }, { MOE_FORMAT_NVFP4, 32, 8192 + 8192 + 1024, 3, 4 },
        { MOE_FORMAT_MXFP4_W4A16, 64, 8192 + 16384 + 512, 3, 2 },
        { MOE_FORMAT_MXFP4_W4A8, 128, 0, 0, 0 },
        { MOE_FORMAT_INT4_W4A16, 32, 8192 + 8192 + 256, 3, 3 },   { MOE_FORMAT_INT4_W4A16, 128, 0, 0, 0 },
        { MOE_FORMAT_FP8_PER_CHANNEL, 16, 16384 + 4096, 3, 3 },   { MOE_FORMAT_MXFP8, 128, 0, 0, 0 },
        { MOE_FORMAT_FP8_PER_TENSOR, 128, 16384 + 32768, 2, 2 },
        { MOE_FORMAT_FP8_BLOCK, 64, 16384 + 16384 + 512 + 256, 2, 2 },
        { MOE_FORMAT_FP8_BLOCK, 16, 16384 + 4096 + 512 + 128, 3, 3 }, { MOE_FORMAT_FP8_BLOCK, 128, 0, 0, 0 },
    };
    for (int i = 0; i < (int)(sizeof of / sizeof of[0]); i++) {
        const moe__tile_row *row = moe__tile_built(of[i].format, of[i].n);
        moe__tile_problem p = plain(of[i].format);
        moe__tile_config c;
        CHECK_EQ(row != NULL, of[i].stages > 0);
        if (row == NULL) continue;
        CHECK(moe__tile_config_make(&c, &row->tile, &p, 1));
        CHECK(c.widened && c.tokens == MOE_DTYPE_BF16 && row->tile.k == 128 && row->tile.m == 128);
        CHECK_EQ(moe__tile_stage(&c), of[i].stage);
        CHECK_EQ(row->tile.stages, of[i].stages);
        CHECK_EQ(moe__tile_smem(&c), of[i].stages * (of[i].stage + 16));
        CHECK_EQ(moe__tile_ctas(&c, &chips[H200].chip), of[i].ctas);
        CHECK(legal_everywhere(row, &p));
    }
}

// Sets of plans: the cheapest tiles for the most tokens of each, f32 rows in the first alone.
TEST(a_plan_has_a_set_for_few_some_and_many_tokens)
{
    static const int most[] = { 1, 64, 65, 512, 513, 8192 }, counts[] = { 1, 1, 2, 2, 3, 3 };
    moe_layer_desc l = layer_desc(MOE_FORMAT_BF16);
    REQUIRE_OK(moe_layer_resolve(&l, &err));
    for (int chip = 0; chip < CHIPS; chip++)
        for (int i = 0; i < 6; i++)
            for (int invariant = 0; invariant < 2; invariant++) {
                moe_plan_desc desc;
                moe__gemm_sets sets;
                memset(&desc, 0, sizeof desc);
                desc.max_tokens = most[i];
                desc.x_dtype = MOE_DTYPE_BF16;
                desc.flags = invariant ? MOE_PLAN_BATCH_INVARIANT : 0;
                moe__sets_make(&l, &desc, &chips[chip].chip, &sets);
                REQUIRE(sets.count == counts[i]);
                CHECK_EQ(sets.set[sets.count - 1].tokens, most[i]);
                CHECK(sets.count < 2 || sets.set[0].tokens == 64);
                CHECK(sets.count < 3 || sets.set[1].tokens == 512);
                for (int set = 0; set < sets.count; set++) {
                    const moe__gemm_set *own = &sets.set[set];
                    moe__tile_problem p = moe__tile_problem_of(&l, &desc, own->tokens);
                    moe__tile_choice choice;
                    moe__tile_config c;
                    moe__tiles_choose(&p, &chips[chip].chip, &choice);
                    CHECK_EQ(own->tile, moe__tile_choice_rows(&choice));
                    CHECK_EQ(own->rows_dtype, set == 0 && !invariant ? MOE_DTYPE_F32 : MOE_DTYPE_BF16);
                    CHECK(moe__tile_config_make(&c, &moe__tile_rows[choice.chosen.row[0]].tile, &p, 1));
                    CHECK(own->smem_bytes == moe__tile_smem(&c) && own->threads == moe__tile_threads(&c.tile));
                    CHECK_EQ(own->ctas, moe__tile_ctas(&c, &chips[chip].chip));
                    CHECK_EQ(moe__set_of(&sets, own->tokens), set);
                    CHECK_EQ(moe__set_of(&sets, set == 0 ? 1 : sets.set[set - 1].tokens + 1), set);
                }
            }
    l.format = MOE_FORMAT_F32; // no products: no sets
    {
        moe_plan_desc desc;
        moe__gemm_sets sets;
        memset(&desc, 0, sizeof desc);
        desc.max_tokens = 8;
        moe__sets_make(&l, &desc, &chips[H200].chip, &sets);
        CHECK_EQ(sets.count, 0);
    }
}

static void check_stage(int family, int format, int n, int bytes, int smem, int tmem);

// Bytes of a stage, of a CTA, columns of tensor memory; counted by hand.
TEST(what_tiles_take)
{
    check_stage(MOE__FAMILY_SM90, MOE_FORMAT_BF16, 128, 256 * 128 + 128 * 128, 4 * 49152 + 256 * 32 / 2 * 2 + 1024, 0);
    check_stage(MOE__FAMILY_SM90, MOE_FORMAT_FP8_BLOCK, 64, 256 * 128 + 64 * 128 + 4 + 64 * 4,
                5 * (40960 + 260) + 256 * 16 / 2 + 1024, 0);
    check_stage(MOE__FAMILY_SM90, MOE_FORMAT_INT4_W4A16, 64, 256 * 64 + 64 * 256 + 256 * 2,
                5 * (32768 + 512) + 256 * 16 / 2 * 2 + 1024, 0); // 128 weights a scale of 2 bytes
    check_stage(MOE__FAMILY_SM100, MOE_FORMAT_MXFP4_W4A8, 8, 136 * 512 + 136 * 16, // e2m1 as bytes
                3 * 136 * 528 + 128 * 8 / 2 + 1024, 8 + 4 * 4 * 2);
    check_stage(MOE__FAMILY_SM100, MOE_FORMAT_NVFP4, 256, 128 * 128 + 256 * 128 / 2 + (128 + 256) * 16, // of a pair
                4 * (32768 + 6144) + 128 * 32 / 2 / 2 + 1024, 256 + 4 * 4 * 3);
    check_stage(MOE__FAMILY_SM100, MOE_FORMAT_FP8_BLOCK, 128, 128 * 128 * 2 + 4 + 128 * 4,
                5 * (32768 + 516) + 64 * 32 + 1024, 4 * 128); // raw sums: not halved
}

TEST(types_of_the_second_product)
{
    moe__tile_problem p = plain(MOE_FORMAT_FP8_BLOCK);
    moe__tile_config c;
    const moe__tile *native = NULL;
    for (int i = 0; i < MOE__TILES && native == NULL; i++)
        if (moe__tile_rows[i].tile.family == MOE__FAMILY_SM90 && multiplies(&moe__tile_rows[i], p.format))
            native = &moe__tile_rows[i].tile;
    REQUIRE(native != NULL);
    for (int invariant = 0; invariant < 2; invariant++)
        for (p.tokens = 64; p.tokens <= 65; p.tokens++) {
            p.invariant = invariant;
            CHECK(moe__tile_config_make(&c, native, &p, 2));
            CHECK_EQ(c.out, invariant || p.tokens > 64 ? MOE_DTYPE_BF16 : MOE_DTYPE_F32);
            CHECK(c.weights == MOE_DTYPE_E4M3 && c.tokens == MOE_DTYPE_E4M3 && c.out_block == 0 && c.activation == 0);
            CHECK(moe__tile_config_make(&c, native, &p, 1));
            CHECK(c.out == MOE_DTYPE_E4M3 && c.out_block == 128 && c.activation == MOE_ACTIVATION_SWIGLU);
        }
}

// ---- rules ----------------------------------------------------------------------------------------------------------

typedef struct rule_case {
    moe__tile_row row;
    moe__tile_problem p;
    int chip, product;
} rule_case;

static int ticked[MOE__RULES];

// The first row of a family for the format, of n token rows, whose tile splits K or does not.
static rule_case from(int family, int format, int n, int split_k)
{
    rule_case r;
    memset(&r, 0, sizeof r);
    r.p = plain(format);
    r.chip = home[family];
    r.product = 1;
    for (int i = 0; i < MOE__TILES && r.row.formats == 0; i++) {
        const moe__tile_row *row = &moe__tile_rows[i];
        if (row->tile.family == family && multiplies(row, format) && row->tile.n == n && row->tile.split_k == split_k)
            r.row = *row;
    }
    return r;
}

static void check_stage(int family, int format, int n, int bytes, int smem, int tmem)
{
    rule_case r = from(family, format, n, 1);
    moe__tile_config c;
    REQUIRE(r.row.formats != 0);
    CHECK(moe__tile_config_make(&c, &r.row.tile, &r.p, 1));
    CHECK_EQ(moe__tile_stage(&c), bytes);
    CHECK_EQ(moe__tile_smem(&c), smem);
    CHECK_EQ(moe__tile_tmem(&c), tmem);
}

// Legal before, refused by this rule after one change, with a sentence that has `part`.
static void refuses(int line, const rule_case *before, const rule_case *after, int rule, const char *part)
{
    char why[256], text[400];
    int got = check(&before->row, &before->p, before->chip, before->product, why, sizeof why);
    if (before->row.formats == 0 || got != MOE__RULE_NONE) {
        snprintf(text, sizeof text, "the case begins refused by rule %d: %.200s", got, why);
        test_fail(__FILE__, line, text);
        return;
    }
    got = check(&after->row, &after->p, after->chip, after->product, why, sizeof why);
    if (got != rule || strstr(why, part) == NULL) {
        snprintf(text, sizeof text, "rule %d instead of %d, \"%.200s\" has no \"%s\"", got, rule, why, part);
        test_fail(__FILE__, line, text);
    }
    CHECK(strlen(why) < 200);
    ticked[rule] = 1;
}

#define BREAK(family, format, n, split, change, rule, part) \
    do { \
        rule_case before = from(MOE__FAMILY_##family, MOE_FORMAT_##format, n, split), r = before; \
        change; \
        refuses(__LINE__, &before, &r, MOE__RULE_##rule, part); \
    } while (0)

static void break_tiles(void)
{
    BREAK(MMA, BF16, 32, 1, r.p.format = MOE_FORMAT_NVFP4, FORMAT, "does not multiply nvfp4");
    BREAK(SM90, BF16, 64, 1, r.chip = A100, CHIP, "this chip has 8.0");
    BREAK(SM90, BF16, 64, 1, r.chip = B200, CHIP, "this chip has 10.0");
    BREAK(SM100, NVFP4, 64, 1, r.chip = RTX5090, CHIP, "this chip has 12.0");
    BREAK(SM120, NVFP4, 64, 1, r.chip = B200, CHIP, "12.0");
    BREAK(MMA, FP8_PER_TENSOR, 32, 1, r.chip = A100, CHIP_TYPE, "e4m3 from compute capability 8.9");
    BREAK(MMA, BF16, 32, 1, r.row.tile.cluster = 2, CLUSTER, "2 CTAs");
    BREAK(SM100, NVFP4, 64, 1, r.row.tile.split_k = 2, CLUSTER, "4 CTAs");
    BREAK(MMA, BF16, 32, 1, r.row.tile.gather = MOE__GATHER_TMA, GATHER, "10.0");
    BREAK(MMA, BF16, 32, 1, r.row.tile.m = 192, TILE_M, "192");
    BREAK(SM100, BF16, 32, 1, r.row.tile.m = 256, TILE_M, "at most 128");
    BREAK(MMA, BF16, 32, 1, r.row.tile.k = 32, TILE_K, "64 bytes");
    BREAK(MMA, BF16, 32, 1, r.row.tile.stages = 1, STAGES, "1 stage");
    BREAK(MMA, BF16, 32, 1, r.row.tile.epilogue_n = 24, EPILOGUE, "128x24");
    BREAK(MMA, BF16, 32, 1, r.row.tile.epilogue_m = 256, EPILOGUE, "256x32");
    BREAK(SM90, FP8_BLOCK, 64, 1, r.row.tile.k = 256, PROMOTION, "256");
    BREAK(MMA, BF16, 32, 1, r.row.tile.mma_m = 32, MMA_M, "32 rows");
    BREAK(SM100, MXFP8, 8, 1, r.row.tile.mma_m = 64, MMA_M, "64 rows");
    BREAK(MMA, BF16, 32, 1, r.row.tile.mma_n = 16, MMA_N, "not 16");
    BREAK(SM100, BF16, 8, 1, r.row.tile.mma_m = 128, MMA_N, "multiples of 16");
    BREAK(SM90, BF16, 64, 1, r.row.tile.mma_n = 264, MMA_N, "up to 256");
    BREAK(MMA, BF16, 32, 1, r.row.tile.mma_k = 8, MMA_K, "takes 16 elements of bf16");
    BREAK(SM90, BF16, 192, 1, r.row.tile.mma_n = 128, MMA_TILE, "128x192");
    BREAK(SM100, BF16, 64, 1, r.row.tile.cluster = 1, PAIR, "two CTAs");
    BREAK(SM100, BF16, 128, 1, r.row.tile.transposed = 0; r.row.tile.mma_n = 64, PAIR, "columns");
    BREAK(MMA, BF16, 32, 1, r.row.tile.stages = 12, SMEM, "12 stages");
    BREAK(MMA, FP8_BLOCK, 64, 1, r.row.tile.stages = 4; r.chip = RTX4090, SMEM, "101376");
    BREAK(SM90, BF16, 128, 1, r.row.tile.n = r.row.tile.mma_n = 256; r.row.tile.stages = 3, REGISTERS, "256");
    BREAK(SM100, FP8_BLOCK, 128, 1, r.row.tile.n = r.row.tile.mma_n = 192; r.row.tile.stages = 4, TMEM, "768");
}

static void break_layers(void)
{
    BREAK(SM100, NVFP4, 8, 2, r.p.hidden = 7680, SPLIT, "7680");
    BREAK(SM90, BF16, 64, 1, r.row.tile.scheduler = MOE__SCHEDULER_STREAM, STREAM, "64");
    BREAK(SM90, BF16, 8, 1, r.row.tile.split_k = 2, STREAM, "one CTA a part");
    BREAK(SM90, BF16, 8, 1, r.p.invariant = 1, INVARIANT, "MOE_PLAN_BATCH_INVARIANT");
    BREAK(SM100, NVFP4, 8, 2, r.p.invariant = 1, INVARIANT, "MOE_PLAN_BATCH_INVARIANT");
    BREAK(SM90, FP8_PER_TENSOR, 64, 1, r.p.hidden = 4104, ROW_BYTES, "4104");
    BREAK(SM90, FP8_PER_TENSOR, 64, 1, r.product = 2; r.p.features = 1000, ROW_BYTES, "1000");
    BREAK(SM100, MXFP8, 64, 1, r.p.hidden = 4112, GROUP, "multiple of 32");
    BREAK(SM100, NVFP4, 8, 1, r.p.hidden = 8192 + 256, SCALE_GATHER, "8448");
    BREAK(MMA, FP8_BLOCK, 8, 1, r.row.tile.m = r.row.tile.epilogue_m = 128, REQUANTISE, "64 features");
    BREAK(SM100, BF16, 64, 1, r.p.x_dtype = MOE_DTYPE_F32, X_DTYPE, "x is f32");
    BREAK(SM100, BF16, 64, 1, r.p.weight_on_input = 1, INPUT_WEIGHT, "another gather");
}

TEST(each_rule_refuses_what_breaks_it_and_says_why)
{
    memset(ticked, 0, sizeof ticked);
    break_tiles();
    break_layers();
    for (int rule = MOE__RULE_NONE + 1; rule < MOE__RULES; rule++)
        if (!ticked[rule]) test_fail_numbers(__FILE__, __LINE__, "no case breaks this rule", rule, MOE__RULES);
}

// What the rules look at in one product does not refuse the other.
TEST(rules_of_one_product_leave_the_other)
{
    rule_case r = from(MOE__FAMILY_SM100, MOE_FORMAT_BF16, 64, 1);
    char why[256];
    r.p.x_dtype = MOE_DTYPE_F32;
    r.p.weight_on_input = 1;
    CHECK_EQ(check(&r.row, &r.p, B200, 1, why, sizeof why), MOE__RULE_X_DTYPE);
    CHECK_EQ(check(&r.row, &r.p, B200, 2, why, sizeof why), MOE__RULE_NONE);
    r = from(MOE__FAMILY_MMA, MOE_FORMAT_FP8_BLOCK, 8, 1);
    r.row.tile.m = r.row.tile.epilogue_m = 128;
    CHECK_EQ(check(&r.row, &r.p, H200, 1, why, sizeof why), MOE__RULE_REQUANTISE);
    CHECK_EQ(check(&r.row, &r.p, H200, 2, why, sizeof why), MOE__RULE_NONE);
    r.p.activation = MOE_ACTIVATION_RELU2; // not gated: a slab is 128 features
    CHECK_EQ(check(&r.row, &r.p, H200, 1, why, sizeof why), MOE__RULE_NONE);
}

// ---- names ----------------------------------------------------------------------------------------------------------

static const char known_name[] =
    "bmm_E2m1_E2m1E2m1_Fp32_Ab16_Bb16_Cb16_t128x8x512u2_s5_et128x8_m128x8x64_c1x1x1_rM_TN_transOut_schPd2x1x2x3_"
    "biasFp32M_bN_ldgsts_ldgstsSf_rgTma_clmp_swiGlu_dynB_sm100f";

TEST(a_known_kernel_of_trtllm_gen_has_its_name)
{
    rule_case r = from(MOE__FAMILY_SM100, MOE_FORMAT_NVFP4, 8, 1);
    moe__tile_config c;
    char name[256];
    moe__text text = moe__text_make(name, sizeof name);
    r.p.clamp = r.p.bias1 = 1;
    CHECK(moe__tile_config_make(&c, &r.row.tile, &r.p, 1));
    moe__tile_name(&c, &text);
    CHECK_STR(name, known_name);
}

// Struct by struct, not memcmp: padding.
static int same_config(const moe__tile_config *a, const moe__tile_config *b)
{
    const moe__tile *t = &a->tile, *u = &b->tile;
    return t->family == u->family && t->m == u->m && t->n == u->n && t->k == u->k && t->unroll == u->unroll &&
           t->stages == u->stages && t->epilogue_m == u->epilogue_m && t->epilogue_n == u->epilogue_n &&
           t->mma_m == u->mma_m && t->mma_n == u->mma_n && t->mma_k == u->mma_k && t->cluster == u->cluster &&
           t->split_k == u->split_k && t->scheduler == u->scheduler && t->gather == u->gather &&
           t->transposed == u->transposed && a->weights == b->weights && a->tokens == b->tokens && a->out == b->out &&
           a->weights_block == b->weights_block && a->tokens_block == b->tokens_block &&
           a->out_block == b->out_block && a->bias == b->bias && a->clamp == b->clamp &&
           a->activation == b->activation;
}

static void check_name(const moe__tile *tile, const moe__tile_problem *p, int product)
{
    moe__tile_config c, back;
    char name[256];
    moe__text text = moe__text_make(name, sizeof name);
    REQUIRE(moe__tile_config_make(&c, tile, p, product));
    moe__tile_name(&c, &text);
    CHECK(strlen(name) < sizeof ((moe_plan_info *)0)->gemm1);
    CHECK(strchr(name, '?') == NULL);
    if (!moe__tile_parse(name, &back) || !same_config(&c, &back)) test_fail2(__FILE__, __LINE__, "not read back", name);
}

TEST(names_are_read_back)
{
    static const int activations[] = {
        MOE_ACTIVATION_SWIGLU, MOE_ACTIVATION_SWIGLU_STEP, MOE_ACTIVATION_GEGLU_ERF, MOE_ACTIVATION_GEGLU_TANH,
        MOE_ACTIVATION_SITU, MOE_ACTIVATION_SILU, MOE_ACTIVATION_GELU_ERF, MOE_ACTIVATION_GELU_TANH,
        MOE_ACTIVATION_RELU, MOE_ACTIVATION_RELU2, MOE_ACTIVATION_RELU2_CLAMP, MOE_ACTIVATION_IDENTITY,
    };
    for (int i = 0; i < MOE__TILES; i++)
        for (int format = 1; format <= MOE_FORMAT_INT4_W4A16; format++)
            for (int variant = 0; variant < 24 && multiplies(&moe__tile_rows[i], format); variant++) {
                moe__tile_problem p = plain(format);
                p.block = format == MOE_FORMAT_FP8_BLOCK ? 128 : 32;
                p.dtype = variant % 2 == 0 ? MOE_DTYPE_BF16 : MOE_DTYPE_F16;
                p.activation = activations[variant / 2];
                p.clamp = variant % 3 == 0;
                p.bias1 = variant % 2;
                p.bias2 = variant % 3 == 1;
                p.tokens = variant % 4 == 0 ? 8 : 512;
                check_name(&moe__tile_rows[i].tile, &p, 1);
                check_name(&moe__tile_rows[i].tile, &p, 2);
            }
}

TEST(other_words_are_no_name)
{
    moe__tile_config c;
    char name[256];
    CHECK(moe__tile_parse(known_name, &c));
    CHECK(!moe__tile_parse("", &c));
    for (size_t length = 0; length < strlen(known_name); length++) { // each prefix, and each with a letter changed
        memcpy(name, known_name, length);
        name[length] = 0;
        CHECK(!moe__tile_parse(name, &c));
        for (const char *letter = "_x0129aZ\x80"; *letter != 0; letter++) {
            char again[256];
            moe__text text = moe__text_make(again, sizeof again);
            strcpy(name, known_name);
            name[length] = *letter;
            if (!moe__tile_parse(name, &c)) continue;
            moe__tile_name(&c, &text); // another number of a field: a name again
            CHECK_STR(again, name);
        }
        name[0] = 0;
    }
    snprintf(name, sizeof name, "%s_", known_name);
    CHECK(!moe__tile_parse(name, &c));
    snprintf(name, sizeof name, "bmm_Fp32_Bfloat16Bfloat16_Fp32_t128x99999999999999999999x64");
    CHECK(!moe__tile_parse(name, &c));
}

TEST(no_two_rows_of_a_format_share_a_name)
{
    for (int format = 1; format <= MOE_FORMAT_INT4_W4A16; format++) {
        moe__tile_problem p = plain(format);
        for (int i = 0; i < MOE__TILES; i++)
            for (int j = 0; j < i; j++) {
                char a[256], b[256];
                moe__text x = moe__text_make(a, sizeof a), y = moe__text_make(b, sizeof b);
                if (!multiplies(&moe__tile_rows[i], format) || !multiplies(&moe__tile_rows[j], format)) continue;
                moe__tile_row_name(i, &p, 1, &x);
                moe__tile_row_name(j, &p, 1, &y);
                if (strcmp(a, b) == 0) test_fail2(__FILE__, __LINE__, "twice", a);
            }
    }
}

// ---- cost -----------------------------------------------------------------------------------------------------------

static void sum_load(const moe__tile_load *load, double *experts, double *rows)
{
    *experts = *rows = 0;
    for (int i = 0; i < load->count; i++) {
        *experts += load->classes[i].experts;
        *rows += load->classes[i].experts * load->classes[i].rows;
    }
}

// Against the plain formulas: E (1 - (1 - k / E)^T) experts with rows, T k rows.
TEST(loads_have_the_rows_of_their_tokens)
{
    for (int l = 0; l < LAYERS; l++)
        for (int t = 0; t < 6; t++) {
            moe__tile_problem p = problem(&layers[l], token_counts[t]);
            moe__tile_load load;
            double experts, rows, none = 1, k = p.top_k, e = p.experts;
            for (int i = 0; i < p.tokens; i++) none *= 1 - k / e;
            moe__tile_load_make(&load, &p, 0);
            sum_load(&load, &experts, &rows);
            CHECK_NEAR(experts, e * (1 - none), 0.01 * e * (1 - none));
            CHECK_NEAR(rows, k * p.tokens, 0.02 * k * p.tokens);
            for (int i = 0; i < load.count; i++) CHECK(load.classes[i].rows >= 1 && load.classes[i].rows <= p.tokens);
            moe__tile_load_make(&load, &p, 1);
            sum_load(&load, &experts, &rows);
            CHECK_EQ(load.classes[0].rows, p.tokens); // the hot one
            CHECK_EQ(load.classes[0].experts, 1.0);
            CHECK_NEAR(rows, k * p.tokens, 0.02 * k * p.tokens);
            CHECK(experts < e + 0.01);
        }
}

TEST(loads_at_the_edges)
{
    layer_entry all = { "", MOE_FORMAT_BF16, 0, 64, 64, 4, 4 }, one = { "", MOE_FORMAT_BF16, 0, 64, 64, 1, 1 };
    moe__tile_problem p = problem(&all, 9);
    moe__tile_load load;
    double experts, rows;
    for (int hot = 0; hot < 2; hot++) {
        p = problem(&all, 9);
        moe__tile_load_make(&load, &p, hot);
        sum_load(&load, &experts, &rows);
        CHECK_EQ(experts, 4.0);
        CHECK_EQ(rows, 36.0);
        p.local = 0; // experts of other ranks, and two that every token uses
        p.always = 2;
        moe__tile_load_make(&load, &p, hot);
        sum_load(&load, &experts, &rows);
        CHECK_EQ(experts, 2.0);
        CHECK_EQ(rows, 18.0);
        p = problem(&one, 5);
        moe__tile_load_make(&load, &p, hot);
        sum_load(&load, &experts, &rows);
        CHECK_EQ(experts, 1.0);
        CHECK_EQ(rows, 5.0);
    }
    p = problem(&layers[0], 65536);
    p.top_k = 32;
    p.experts = p.local = 2048;
    moe__tile_load_make(&load, &p, 0);
    sum_load(&load, &experts, &rows);
    CHECK_NEAR(experts, 2048, 0.5);
    CHECK_NEAR(rows, 65536.0 * 32, 65536.0 * 32 * 0.01);
}

static int64_t cost_of(int row, const moe__tile_problem *p, const moe__tile_chip *chip, int product)
{
    moe__tile_config c;
    moe__tile_config_make(&c, &moe__tile_rows[row].tile, p, product);
    return moe__tile_cost(&c, p, chip, product);
}

// No cost is below what the bytes of the weights take; faster memory and more tokens act as they do.
TEST(costs_follow_bytes_and_tokens)
{
    for (int row = 0; row < MOE__TILES; row++)
        for (int l = 0; l < LAYERS; l++) {
            moe__tile_chip chip = chips[home[moe__tile_rows[row].tile.family]].chip;
            int before = -1;
            if (!multiplies(&moe__tile_rows[row], layers[l].format)) continue;
            for (int t = 0; t < 6; t++) {
                moe__tile_problem p = problem(&layers[l], token_counts[t]);
                const moe__tile_types *types = moe__tile_types_of(p.format);
                moe__tile_chip faster = chip;
                moe__tile_load load;
                double experts, rows, bytes = moe_dtype_bits(types->weights != 0 ? types->weights : p.dtype) / 8.0;
                int64_t ns = cost_of(row, &p, &chip, 1);
                moe__tile_load_make(&load, &p, 1);
                sum_load(&load, &experts, &rows);
                CHECK((double)ns > experts * 2 * p.features * p.hidden * bytes / chip.gbps);
                faster.gbps *= 2;
                CHECK(cost_of(row, &p, &faster, 1) <= ns);
                faster = chip;
                faster.mhz *= 2;
                CHECK(cost_of(row, &p, &faster, 1) <= ns);
                CHECK(before < 0 || ns > before);
                before = (int)(ns / 100 * 97); // whole waves may make a few more tokens a little cheaper
            }
        }
}

TEST(rates_follow_the_instruction)
{
    static const int formats[] = { MOE_FORMAT_BF16, MOE_FORMAT_FP8_PER_TENSOR, MOE_FORMAT_NVFP4 };
    moe__tile_config c;
    double before = 0;
    for (int i = 0; i < 3; i++) { // twice as fast from type to type; half of it with 64 rows
        rule_case r = from(MOE__FAMILY_SM100, formats[i], 16, 1);
        double rate;
        CHECK(moe__tile_config_make(&c, &r.row.tile, &r.p, 1));
        rate = moe__tile_rate(&c, 100);
        CHECK(i == 0 || rate == 2 * before);
        before = rate;
        c.tile.mma_m = 64;
        CHECK_EQ(moe__tile_rate(&c, 100), rate / 2);
    }
}

// A rank with one of many experts: that rarely anything is there makes the tile no cheaper when it is.
TEST(fewer_tiles_than_one)
{
    layer_entry mine = { "", MOE_FORMAT_BF16, 0, 4096, 64, 256, 1 }, one = { "", MOE_FORMAT_BF16, 0, 4096, 64, 1, 1 };
    moe__tile_problem p = problem(&mine, 1), q = problem(&one, 1);
    int64_t rare, always;
    p.local = 1;
    rare = cost_of(0, &p, &chips[H200].chip, 1) - (int64_t)moe__cost_launch;
    always = cost_of(0, &q, &chips[H200].chip, 1) - (int64_t)moe__cost_launch;
    CHECK(rare > always / 10 * 6 && rare <= always);
}

// ---- choice ---------------------------------------------------------------------------------------------------------

static void choose(int layer, int tokens, int chip, moe__tile_problem *p, moe__tile_choice *choice)
{
    *p = problem(&layers[layer], tokens);
    memset(choice, 0x5a, sizeof *choice);
    moe__tiles_choose(p, &chips[chip].chip, choice);
}

static void check_choice(const moe__tile_choice *choice, const moe__tile_pair_of *pair, int built)
{
    if (pair->row[0] < 0) {
        CHECK_EQ(pair->row[1], -1);
        for (int i = 0; i < MOE__TILES; i++)
            for (int j = 0; j < MOE__TILES; j++) {
                int64_t ns;
                CHECK(choice->verdict[i][0].rule != MOE__RULE_NONE || !moe__tile_pairs(choice, i, j, built, &ns));
            }
        return;
    }
    CHECK_EQ(choice->verdict[pair->row[0]][0].rule, MOE__RULE_NONE);
    CHECK_EQ(choice->verdict[pair->row[1]][1].rule, MOE__RULE_NONE);
    CHECK_EQ(moe__tile_rows[pair->row[0]].tile.n, moe__tile_rows[pair->row[1]].tile.n);
    CHECK_EQ(moe__tile_rows[pair->row[0]].tile.family, moe__tile_rows[pair->row[1]].tile.family);
    CHECK_EQ(pair->ns, choice->verdict[pair->row[0]][0].ns + choice->verdict[pair->row[1]][1].ns);
    for (int i = 0; i < MOE__TILES; i++)
        for (int j = 0; j < MOE__TILES; j++) {
            int64_t ns;
            if (choice->verdict[i][0].rule != MOE__RULE_NONE || !moe__tile_pairs(choice, i, j, built, &ns)) continue;
            CHECK(pair->ns <= ns + ns / 100);
        }
    if (built) CHECK(choice->verdict[pair->row[0]][0].built && choice->verdict[pair->row[1]][1].built);
}

TEST(choices_are_legal_near_the_cheapest_and_the_same_twice)
{
    for (int chip = 0; chip < CHIPS; chip++)
        for (int l = 0; l < LAYERS; l++)
            for (int t = 0; t < 6; t++) {
                moe__tile_problem p;
                moe__tile_choice a, b;
                choose(l, token_counts[t], chip, &p, &a);
                choose(l, token_counts[t], chip, &p, &b);
                CHECK(a.chosen.row[0] == b.chosen.row[0] && a.chosen.row[1] == b.chosen.row[1]);
                CHECK(a.planned.row[0] == b.planned.row[0] && a.planned.row[1] == b.planned.row[1]);
                check_choice(&a, &a.chosen, 1);
                check_choice(&a, &a.planned, 0);
                CHECK(a.chosen.row[0] >= 0); // every format has kernels
            }
}

TEST(batch_invariant_choices_split_nothing)
{
    int split = 0;
    for (int chip = 0; chip < CHIPS; chip++)
        for (int l = 0; l < LAYERS; l++)
            for (int t = 0; t < 6; t++) {
                moe__tile_problem p;
                moe__tile_choice choice;
                for (int invariant = 0; invariant < 2; invariant++) {
                    choose(l, token_counts[t], chip, &p, &choice);
                    p.invariant = invariant;
                    moe__tiles_choose(&p, &chips[chip].chip, &choice);
                    for (int i = 0; i < 2 && choice.planned.row[0] >= 0; i++) {
                        const moe__tile *tile = &moe__tile_rows[choice.planned.row[i]].tile;
                        int splits = tile->split_k > 1 || tile->scheduler == MOE__SCHEDULER_STREAM;
                        CHECK(!invariant || !splits);
                        split += splits;
                    }
                }
            }
    CHECK(split > 0);
}

// The same mean of rows an expert, by tokens of one expert or of all: the tile is not the mean's.
TEST(a_tile_is_not_sized_from_the_mean)
{
    layer_entry few = { "", MOE_FORMAT_BF16, 0, 4096, 1536, 256, 1 };
    layer_entry many = { "", MOE_FORMAT_BF16, 0, 4096, 1536, 256, 32 };
    moe__tile_problem p = problem(&few, 2048), q = problem(&many, 64); // 8 rows an expert
    moe__tile_choice a, b;
    moe__tiles_choose(&p, &chips[H200].chip, &a);
    moe__tiles_choose(&q, &chips[H200].chip, &b);
    CHECK(moe__tile_choice_rows(&a) > moe__tile_choice_rows(&b)); // all 2,048 may be one expert's; only 64 can be
}

static void short_name(char *out, size_t bytes, int row)
{
    const moe__tile *t = &moe__tile_rows[row].tile;
    snprintf(out, bytes, "%s:%dx%dx%ds%dc%dk%d%s", moe__tile_families[t->family].name, t->m, t->n, t->k, t->stages,
             t->cluster, t->split_k,
             t->scheduler == MOE__SCHEDULER_STREAM ? "stream" : t->transposed ? "" : "tokensM");
}

static void pair_text(char *out, size_t bytes, const moe__tile_pair_of *pair)
{
    char a[80], b[80];
    if (pair->row[0] < 0) {
        snprintf(out, bytes, "-");
        return;
    }
    short_name(a, sizeof a, pair->row[0]);
    short_name(b, sizeof b, pair->row[1]);
    if (strcmp(a, b) == 0) snprintf(out, bytes, "%s", a);
    else snprintf(out, bytes, "%s+%s", a, b);
}

TEST(golden_choices)
{
    const char *path = getenv("MOE_TEST_TILES");
    FILE *out = path != NULL && path[0] != 0 ? fopen(path, "wb") : NULL;
    FILE *in = out == NULL ? fopen(test_data("data/tiles.tsv"), "rb") : NULL;
    char want[512], line[512];
    REQUIRE(out != NULL || in != NULL);
    for (int chip = 0; chip < CHIPS; chip++)
        for (int l = 0; l < LAYERS; l++)
            for (int t = 0; t < 6; t++) {
                moe__tile_problem p;
                moe__tile_choice choice;
                char chosen[200], planned[200];
                choose(l, token_counts[t], chip, &p, &choice);
                pair_text(chosen, sizeof chosen, &choice.chosen);
                pair_text(planned, sizeof planned, &choice.planned);
                snprintf(line, sizeof line, "%s\t%s\t%d\t%s\t%s\n", chips[chip].name, layers[l].name, token_counts[t],
                         chosen, planned);
                if (out != NULL) { fputs(line, out); continue; }
                do { // comments
                    if (fgets(want, sizeof want, in) == NULL) want[0] = 0;
                } while (want[0] == '#');
                CHECK_STR(line, want);
            }
    if (in != NULL) CHECK(fgets(want, sizeof want, in) == NULL);
    if (in != NULL) fclose(in);
    if (out != NULL) fclose(out);
}

// ---- what plans tell ------------------------------------------------------------------------------------------------

// A context that stands for a chip: asking what a plan would be calls no driver.
typedef struct standing {
    moe_context ctx;
    moe__cuda cuda;
} standing;

static void stand(standing *s, const moe__tile_chip *chip)
{
    memset(s, 0, sizeof *s);
    s->ctx.desc.backend = MOE_BACKEND_CUDA;
    s->ctx.desc.threads = 1;
    s->ctx.cuda = &s->cuda;
    s->cuda.arch = chip->arch;
    s->cuda.sms = chip->sms;
    s->cuda.smem_optin = chip->smem_cta;
    s->cuda.smem_sm = chip->smem_sm;
    s->cuda.clock_khz = chip->mhz * 1000;
    s->cuda.memory_gbps = chip->gbps;
}

static int occurrences(const char *text, const char *part)
{
    int n = 0;
    while ((text = strstr(text, part)) != NULL) {
        text += strlen(part);
        n++;
    }
    return n;
}

// "up to 64 tokens 8 rows are cheapest": so the chooser says for 64 tokens and for the power of two behind the line
// before, and not for the one behind this line.
static void check_ladder(const moe__tile_chip *chip, int format, const char *text)
{
    layer_entry layer = { "", MOE_FORMAT_UNSET, 0, 4096, 1536, 128, 8 };
    int tokens, rows, before = 0, count = 0;
    layer.format = format;
    while (sscanf(text, "up to %d tokens %d rows are cheapest", &tokens, &rows) == 2) {
        int ask[3];
        ask[0] = before == 0 ? 1 : 2 * before;
        ask[1] = tokens;
        ask[2] = 2 * tokens;
        for (int i = 0; i < 3 && ask[i] <= 8192; i++) {
            moe__tile_problem p = problem(&layer, ask[i]);
            moe__tile_choice choice;
            moe__tiles_choose(&p, chip, &choice);
            CHECK_EQ(moe__tile_choice_rows(&choice) == rows, i < 2);
        }
        before = tokens;
        count++;
        text = strchr(text, '\n') + 1;
    }
    CHECK_EQ(before, 8192);
    CHECK(count > 1);
}

// Token rows that cost least for so many tokens.
static int tile_of(const moe__tile_chip *chip, const moe_layer_desc *given, int tokens)
{
    moe_layer_desc l = *given;
    moe_plan_desc desc;
    moe__tile_problem p;
    moe__tile_choice choice;
    memset(&desc, 0, sizeof desc);
    desc.x_dtype = moe__format_dtype(l.format);
    if (moe_layer_resolve(&l, &err) != MOE_OK) return -1;
    p = moe__tile_problem_of(&l, &desc, tokens);
    moe__tiles_choose(&p, chip, &choice);
    return moe__tile_choice_rows(&choice);
}

TEST(a_plan_tells_its_tiles_and_why_not_others)
{
    static char text[32768], again[32768];
    for (int chip = 0; chip < CHIPS; chip++)
        for (int f16 = 0; f16 < 2; f16++) {
            moe_layer_desc l = layer_desc(f16 ? MOE_FORMAT_F16 : MOE_FORMAT_BF16);
            moe_plan_info info, quiet;
            standing s;
            moe__tile_config c;
            const char *first;
            char part[240];
            int rows;
            stand(&s, &chips[chip].chip);
            memset(&info, 0, sizeof info);
            memset(&quiet, 0, sizeof quiet);
            info.tiles_text = text;
            info.tiles_text_bytes = sizeof text;
            info.tiles_tokens = 8;
            memset(text, 'x', sizeof text);
            REQUIRE_OK(moe_plan_query(&s.ctx, &l, NULL, &info, &err));
            CHECK(info.tiles_text == text && info.tiles_text_bytes == (int)sizeof text && info.tiles_tokens == 8);
            rows = tile_of(&chips[chip].chip, &l, 64);
            CHECK_EQ(info.tile_rows, rows);
            CHECK_EQ(info.num_tiles, 5 + 6 + 7);
            CHECK(moe__tile_parse(info.gemm1, &c) && c.tile.n == rows && c.tile.gather == MOE__GATHER_LDGSTS);
            CHECK(moe__tile_parse(info.gemm2, &c) && c.tile.n == rows && c.out == MOE_DTYPE_F32);
            CHECK_CONTAINS(text, "; not built\n");
            if (chips[chip].chip.arch >= 90 && chips[chip].chip.arch < 120)
                CHECK_CONTAINS(text, " us, if it were there; not built\n");
            CHECK_CONTAINS(text, "chosen\n");
            CHECK_CONTAINS(text, "refused, its instructions are those of compute capability");
            check_ladder(&chips[chip].chip, l.format, text);
            snprintf(part, sizeof part, "us, not of this plan, whose tiles for 8 tokens have %d rows\n", rows);
            CHECK_CONTAINS(text, part);
            snprintf(part, sizeof part, "this plan takes %d rows up to 64 tokens, estimated\n", rows);
            CHECK_CONTAINS(text, part);
            CHECK_EQ(occurrences(text, "this plan takes"), 3);
            first = strstr(text, "gemm1 bmm_");
            REQUIRE(first != NULL);
            CHECK_EQ(occurrences(first, "\n"), 2 * info.num_tiles);
            for (int i = 0; i < 2; i++) { // exactly one line says so of each product
                snprintf(part, sizeof part, "gemm%d %s: ", i + 1, i == 0 ? info.gemm1 : info.gemm2);
                CHECK_CONTAINS(text, part);
            }
            CHECK_EQ(occurrences(text, "us, chosen\n"), 2);
            quiet.tiles_tokens = 65;
            REQUIRE_OK(moe_plan_query(&s.ctx, &l, NULL, &quiet, &err));
            CHECK_EQ(quiet.tile_rows, tile_of(&chips[chip].chip, &l, 512));
            quiet.tiles_tokens = 8;
            REQUIRE_OK(moe_plan_query(&s.ctx, &l, NULL, &quiet, &err));
            CHECK_STR(quiet.gemm1, info.gemm1);
            CHECK_EQ(quiet.num_tiles, info.num_tiles);
            for (int bytes = 1; bytes < 3000; bytes += 997) { // cut, never beyond
                memset(again, 'x', sizeof again);
                info.tiles_text = again;
                info.tiles_text_bytes = bytes;
                REQUIRE_OK(moe_plan_query(&s.ctx, &l, NULL, &info, &err));
                CHECK_EQ((int)strlen(again), bytes - 1);
                CHECK(memcmp(again, text, (size_t)bytes - 1) == 0 && again[bytes] == 'x');
            }
        }
}

TEST(any_text_fits)
{
    static char text[65536];
    for (int chip = 0; chip < CHIPS; chip++)
        for (int format = 1; format <= MOE_FORMAT_INT4_W4A16; format++) {
            moe__tile_problem p = plain(format);
            moe__tile_choice choice;
            moe__text out = moe__text_make(text, sizeof text);
            int count;
            p.hidden = 4104; // refused for reasons of their own
            p.features = 1048568;
            p.x_dtype = MOE_DTYPE_F32;
            p.clamp = p.bias1 = p.bias2 = p.invariant = 1;
            p.activation = MOE_ACTIVATION_SWIGLU_STEP;
            moe__tiles_choose(&p, &chips[chip].chip, &choice);
            moe__tiles_ladder(&p, &chips[chip].chip, 1048576, &out);
            count = moe__tiles_list(&p, &chips[chip].chip, &choice, &out);
            CHECK(strlen(text) < 32768);
            CHECK_EQ(count > 0, format != MOE_FORMAT_F32);
        }
}

TEST(wrong_wishes_are_refused_and_a_cpu_has_no_tiles)
{
    moe_layer_desc l = layer_desc(MOE_FORMAT_BF16), f32 = layer_desc(MOE_FORMAT_F32);
    moe_plan_desc desc;
    moe_plan_info info;
    moe_context *cpu;
    moe_plan *plan;
    standing s;
    char text[100] = "as it was";
    static char longer[32768];
    stand(&s, &chips[H200].chip);
    memset(&desc, 0, sizeof desc);
    memset(&info, 0, sizeof info);
    desc.max_tokens = 64;
    info.tiles_tokens = 65;
    CHECK_ERR(moe_plan_query(&s.ctx, &l, &desc, &info, &err), MOE_ERROR_ARGUMENT, "info.tiles_tokens");
    info.tiles_tokens = -1;
    CHECK_ERR(moe_plan_query(&s.ctx, &l, &desc, &info, &err), MOE_ERROR_ARGUMENT, "info.tiles_tokens");
    memset(&info, 0, sizeof info);
    info.tiles_text_bytes = -1;
    CHECK_ERR(moe_plan_query(&s.ctx, &l, &desc, &info, &err), MOE_ERROR_ARGUMENT, "info.tiles_text_bytes");
    memset(&info, 0, sizeof info);
    info.tiles_text = text;
    info.tiles_text_bytes = sizeof text;
    CHECK_OK(moe_plan_query(&s.ctx, &f32, &desc, &info, &err)); // no kernel is for f32
    CHECK_EQ(info.tile_rows, 0);
    CHECK_EQ(info.num_tiles, 0);
    CHECK_STR(info.gemm1, "");
    CHECK_STR(text, "no kernel multiplies this layer on this chip\n");
    l.hidden_size = 100; // no product of a plan has rows of 200 bytes
    info.tiles_text = longer;
    info.tiles_text_bytes = sizeof longer;
    CHECK_OK(moe_plan_query(&s.ctx, &l, &desc, &info, &err));
    CHECK_EQ(info.tile_rows, 0);
    CHECK_STR(info.gemm2, "");
    CHECK_CONTAINS(longer, "not of this plan, which has no products\n"); // the second would have them
    CHECK_CONTAINS(longer, "refused, rows of 100 elements of bf16 are not whole pieces of 16 bytes\n");
    info.tiles_text = text;
    info.tiles_text_bytes = sizeof text;
    strcpy(text, "as it was");
    REQUIRE_OK(moe_context_create(NULL, &cpu, &err));
    l.hidden_size = l.intermediate_size = 64;
    l.num_experts = 8;
    CHECK_OK(moe_plan_create(cpu, &l, &desc, &plan, &err));
    memset(&info, 0, sizeof info);
    info.tiles_text = text;
    info.tiles_text_bytes = sizeof text;
    CHECK_OK(moe_plan_get_info(plan, &info, &err));
    CHECK_EQ(info.num_tiles, 0);
    CHECK_STR(text, "as it was");
    moe_plan_destroy(plan);
    moe_context_destroy(cpu);
}

TEST(chips_that_do_not_say_are_those_of_their_kind)
{
    moe__tile_chip chip;
    moe__tile_chip_make(&chip, 90, 132, 232448, 0, 0, 0);
    CHECK(chip.gbps == 3350 && chip.mhz == 1980 && chip.smem_sm == 233472 && chip.sms == 132);
    moe__tile_chip_make(&chip, 80, 108, 166912, 167936, 1410000, 2039);
    CHECK(chip.gbps == 2039 && chip.mhz == 1410 && chip.smem_sm == 167936);
    moe__tile_chip_make(&chip, 121, 48, 101376, 102400, 0, 0);
    CHECK(chip.gbps == 1790 && chip.mhz == 2400);
    moe__tile_chip_make(&chip, 103, 0, 232448, 233472, 0, 0);
    CHECK(chip.gbps == 8000 && chip.sms == 1);
}

TEST_MAIN(
    T(every_row_is_legal_where_it_belongs)
    T(the_rows_with_kernels) T(the_rows_with_kernels_for_codes)
    T(a_plan_has_a_set_for_few_some_and_many_tokens)
    T(what_tiles_take)
    T(types_of_the_second_product)
    T(each_rule_refuses_what_breaks_it_and_says_why)
    T(rules_of_one_product_leave_the_other)
    T(a_known_kernel_of_trtllm_gen_has_its_name)
    T(names_are_read_back)
    T(other_words_are_no_name)
    T(no_two_rows_of_a_format_share_a_name)
    T(loads_have_the_rows_of_their_tokens)
    T(loads_at_the_edges)
    T(costs_follow_bytes_and_tokens)
    T(rates_follow_the_instruction)
    T(fewer_tiles_than_one)
    T(choices_are_legal_near_the_cheapest_and_the_same_twice)
    T(batch_invariant_choices_split_nothing)
    T(a_tile_is_not_sized_from_the_mean)
    T(golden_choices)
    T(a_plan_tells_its_tiles_and_why_not_others)
    T(any_text_fits)
    T(wrong_wishes_are_refused_and_a_cpu_has_no_tiles)
    T(chips_that_do_not_say_are_those_of_their_kind))

#else
TEST_MAIN() // no GPU code: no tiles
#endif
