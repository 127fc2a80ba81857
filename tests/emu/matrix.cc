// Matrix instructions: wgmma, mma.sync, ldmatrix, stmatrix. What they rest on, by section of the PTX ISA:
//
//     lanes and registers of a fragment      "Matrix Fragments for mma.m16n8k16 ..., m16n8k32", "Register Fragments and
//                                            Shared Memory Matrix Layouts" of wgmma
//     descriptor, strides, swizzles          "Matrix Descriptor Format", "Strides", "Shared Memory Matrix Layout" of
//                                            wgmma; K-major only, no base offset
//     when registers may be touched          "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group"
//     reads of shared memory                 "Async proxy": a proxy fence stands between ordinary writes and them
//     rows of a lane                         "ldmatrix", "stmatrix"
//
// Sums are taken in fp32, K in order, which agrees with hardware where all partial sums are exact: the ISA leaves their
// order and inner precision open. tests/gpu_ptx.c holds all of this against hardware.
#include "engine.h"

#include <algorithm>

enum { MATRIX_WGMMA = 110, MATRIX_FENCE, MATRIX_COMMIT, MATRIX_WAIT, MATRIX_MMA, MATRIX_LOAD, MATRIX_STORE };

extern "C" f32 emu_decode(u32 type, u32 bits);

// ---- elements -------------------------------------------------------------------------------------------------------

static const f32 *table_of(u32 type)
{
    static std::vector<f32> tables[4];
    std::vector<f32> &t = tables[type];
    if (t.empty()) {
        t.resize(type == EMU_BF16 || type == EMU_F16 ? 65536 : 256);
        for (u32 i = 0; i < t.size(); i++) t[i] = emu_decode(type, i);
    }
    return t.data();
}

static u32 element_bytes(u32 type) { return type == EMU_BF16 || type == EMU_F16 ? 2 : 1; }

static f32 element(u32 type, const u8 *p, u32 i)
{
    if (element_bytes(type) == 1) return table_of(type)[p[i]];
    u16 v;
    memcpy(&v, p + 2 * i, 2);
    return table_of(type)[v];
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------

struct wgmma_args {
    u32 type, n;
    f32 *d;
    u64 a;
    const u32 *regs;
    u64 b;
    u32 accumulate;
};

struct accumulator {
    f32 *d[32];
    u32 n, pending;
    std::vector<f32> v;         // [16][n]
};

struct product {
    u32 type, n, group;
    u64 a, b;
    bool registers, accumulate, done;
    u32 regs[32][4];
    size_t to;
    epoch id;
};

struct wgmma_state {
    std::vector<accumulator> sums;
    std::vector<product> queue;
    u32 group = 0;
    bool fenced = false;
};

void end_matrix(warp_state *w)
{
    delete w->wgmma;
    w->wgmma = nullptr;
}

// Byte `at` of row r of a K-major operand, as an offset from the beginning of shared memory.
static u32 operand_at(u64 desc, u32 r, u32 at)
{
    u32 start = (u32)(desc & 0x3fff) << 4, lead = (u32)(desc >> 16 & 0x3fff) << 4;
    u32 stride = (u32)(desc >> 32 & 0x3fff) << 4;
    u32 mode = (u32)(desc >> 62), p;
    if (mode == 0) return start + r / 8 * stride + at / 16 * lead + r % 8 * 16 + at % 16;
    u32 width = 256u >> mode;               // 1: 128 bytes, 2: 64, 3: 32
    p = start + r / 8 * stride + r % 8 * width + at;
    return p ^ (p >> 7 & (width / 16 - 1)) << 4;
}

static void touch_operand(u64 desc, u32 first, u32 rows, epoch id)
{
    cta *c = self->block;
    actor a = { id, self->base.p, self, c->g->op, "wgmma" };
    if (desc >> 49 & 7) fail(EMU_LAUNCH_FAILED, "wgmma: descriptor %llx has a base offset", (unsigned long long)desc);
    for (u32 r = first; r < first + rows; r++)
        for (u32 at = 0; at < 32; at += 16) {
            u32 p = operand_at(desc, r, at) - SMEM_WINDOW;
            if (p + 16 > c->smem_bytes || p + 16 < 16)
                fail(EMU_ILLEGAL_ADDRESS, "wgmma: descriptor %llx, row %u: smem+%d of %u", (unsigned long long)desc, r,
                     (int)p, c->smem_bytes);
            check_proxy(self, &c->smem_range, c->smem + p, 16, "wgmma");
            check_range(a, &c->smem_range, c->smem + p, 16, READ_ASYNC, true);
        }
}

static void read_operand(const cta *c, u32 type, u64 desc, u32 row, f32 *to, size_t step)
{
    u32 per_chunk = 16 / element_bytes(type);
    for (u32 chunk = 0; chunk < 2; chunk++) {
        const u8 *p = c->smem + operand_at(desc, row, chunk * 16) - SMEM_WINDOW;
        for (u32 i = 0; i < per_chunk; i++) to[(chunk * per_chunk + i) * step] = element(type, p, i);
    }
}

// A of 16 rows from registers: words 0..3 are rows g and g + 8 of the first half of K, then of the second.
static void fragment_a(u32 type, const u32 *const *regs, f32 (*a)[32])
{
    u32 per_word = 4 / element_bytes(type);
    for (u32 lane = 0; lane < 32; lane++)
        for (u32 w = 0; w < 4; w++)
            for (u32 i = 0; i < per_word; i++)
                a[lane / 4 + (w & 1) * 8][(w >> 1) * per_word * 4 + lane % 4 * per_word + i] =
                    element(type, (const u8 *)&regs[lane][w], i);
}

static void run_product(warp_state *w, product &p)
{
    if (p.done) return;
    p.done = true;
    accumulator &sum = w->wgmma->sums[p.to];
    const cta *c = w->block;
    u32 k = 32 / element_bytes(p.type), n = p.n;
    f32 a[16][32];
    std::vector<f32> b(k * n);
    if (p.registers) {
        const u32 *regs[32];
        for (u32 i = 0; i < 32; i++) regs[i] = p.regs[i];
        fragment_a(p.type, regs, a);
    } else {
        for (u32 r = 0; r < 16; r++) read_operand(c, p.type, p.a, w->first / 32 % 4 * 16 + r, a[r], 1);
    }
    for (u32 r = 0; r < n; r++) read_operand(c, p.type, p.b, r, &b[r], n);
    if (!p.accumulate) std::fill(sum.v.begin(), sum.v.end(), 0.0f);
    for (u32 r = 0; r < 16; r++) {
        f32 *__restrict to = &sum.v[r * n];
        for (u32 i = 0; i < k; i++) {
            const f32 x = a[r][i], *__restrict row = &b[i * n];
            for (u32 j = 0; j < n; j++) to[j] += x * row[j];
        }
    }
    sum.pending--;
}

// Registers of the lanes and the rows that they hold: words 4 j ... of columns 8 j + 2 (lane % 4).
static f32 *place(accumulator &s, u32 lane, u32 i)
{
    return &s.v[(lane / 4 + (i >> 1 & 1) * 8) * s.n + i / 4 * 8 + lane % 4 * 2 + (i & 1)];
}

static size_t accumulator_of(wgmma_state *s, warp_state *w, const wgmma_args *first)
{
    for (size_t i = 0; i < s->sums.size(); i++)
        if (s->sums[i].d[0] == first->d) {
            if (s->sums[i].n != first->n) fail(EMU_LAUNCH_FAILED, "wgmma: N %u into an accumulator of N %u in flight",
                                               first->n, s->sums[i].n);
            return i;
        }
    if (!s->fenced) fail(EMU_LAUNCH_FAILED, "wgmma: no wgmma_fence() since its accumulator was last touched");
    accumulator a;
    a.n = first->n;
    a.pending = 0;
    a.v.resize(16 * a.n);
    for (u32 lane = 0; lane < 32; lane++) {
        const wgmma_args *g = (const wgmma_args *)w->block->threads[w->first + lane]->matrix;
        a.d[lane] = g->d;
        for (u32 i = 0; i < a.n / 2; i++) *place(a, lane, i) = g->d[i];
        memset(g->d, 0xff, a.n / 2 * sizeof(f32));
    }
    s->sums.push_back(a);
    return s->sums.size() - 1;
}

static void issue(warp_state *w)
{
    cta *c = w->block;
    if (!w->wgmma) w->wgmma = new wgmma_state();
    wgmma_state *s = w->wgmma;
    thread **lane = &c->threads[w->first];
    const wgmma_args *first = (const wgmma_args *)lane[0]->matrix;
    product p = {};
    for (u32 i = 0; i < 32; i++) {
        const wgmma_args *g = (const wgmma_args *)lane[i]->matrix;
        if (g->type != first->type || g->n != first->n || g->a != first->a || g->b != first->b ||
            g->accumulate != first->accumulate)
            fail(EMU_LAUNCH_FAILED, "wgmma: lanes 0 and %u give different descriptors or shapes", i);
        if (g->regs) memcpy(p.regs[i], g->regs, 16);
    }
    u32 slot = c->agent_next++ % AGENTS, clock = ++c->agent_clock[slot];
    p.id = make_epoch(c->serial, 2 * c->n + slot, clock, ASYNC);
    p.type = first->type;
    p.n = first->n;
    p.a = first->a;
    p.b = first->b;
    p.registers = first->regs != nullptr;
    p.accumulate = first->accumulate != 0;
    p.group = s->group;
    if (!p.registers) touch_operand(p.a, w->first / 32 % 4 * 16, 16, p.id);
    touch_operand(p.b, 0, p.n, p.id);
    p.to = accumulator_of(s, w, first);
    s->sums[p.to].pending++;
    s->queue.push_back(p);
    c->in_flight++;
    if (running->random(4) == 0)
        for (product &q : s->queue) run_product(w, q);
}

extern "C" void emu_wgmma(u32 type, u32 n, f32 *d, u64 a, const u32 *a_regs, u64 b, u32 accumulate)
{
    require(90, "wgmma");
    if (running->cfg.capability != 90) fail(EMU_LAUNCH_FAILED, "wgmma: exists on compute capability 9.0 only");
    warp_state *w = self->warp;
    if (w->lanes != 32 || (w->first / 128 + 1) * 128 > w->block->n)
        fail(EMU_LAUNCH_FAILED, "wgmma: needs four whole warps");
    wgmma_args args = { type, n, d, a, a_regs, b, accumulate };
    self->matrix = &args;
    if (!collective(MATRIX_WGMMA, "wgmma")) return;
    issue(w);
    end_collective(w);
}

extern "C" void emu_wgmma_fence()
{
    require(90, "wgmma_fence");
    if (!collective(MATRIX_FENCE, "wgmma_fence")) return;
    warp_state *w = self->warp;
    if (!w->wgmma) w->wgmma = new wgmma_state();
    w->wgmma->fenced = true;
    end_collective(w);
}

extern "C" void emu_wgmma_commit()
{
    require(90, "wgmma_commit");
    if (!collective(MATRIX_COMMIT, "wgmma_commit")) return;
    if (self->warp->wgmma) self->warp->wgmma->group++;
    end_collective(self->warp);
}

// Groups in front of `groups` are complete: their reads have happened, their sums are in the registers again.
static void finish_groups(warp_state *w, u32 groups)
{
    wgmma_state *s = w->wgmma;
    cta *c = w->block;
    std::vector<raise> ended;
    for (product &p : s->queue)
        if (p.group < groups) {
            run_product(w, p);
            ended.push_back({ epoch_who(p.id), epoch_clock(p.id) });
            c->in_flight--;
        }
    s->queue.erase(std::remove_if(s->queue.begin(), s->queue.end(), [&](const product &p) { return p.group < groups; }),
                   s->queue.end());
    if (ended.empty()) return;
    clock_ref before, after;
    for (u32 i = 0; i < 32; i++) {
        thread *t = c->threads[w->first + i];
        if (!after || !(before == t->base)) {
            before = t->base;
            after = clock_raise(before, c->serial, c->g->op->serial, c->width(), ended.data(), ended.size());
        }
        t->base = after;
    }
}

static void give_back(wgmma_state *s)
{
    for (size_t i = 0; i < s->sums.size(); i++) {
        accumulator &a = s->sums[i];
        bool used = false;
        for (const product &p : s->queue) used |= p.to == i;
        if (used || !a.n) continue;
        for (u32 lane = 0; lane < 32; lane++)
            for (u32 j = 0; j < a.n / 2; j++) a.d[lane][j] = *place(a, lane, j);
        a.d[0] = nullptr;
        a.n = 0;
        s->fenced = false;
    }
    if (s->queue.empty()) s->sums.clear();
}

extern "C" void emu_wgmma_wait(u32 left)
{
    require(90, "wgmma_wait");
    if (!collective(MATRIX_WAIT, "wgmma_wait")) return;
    warp_state *w = self->warp;
    wgmma_state *s = w->wgmma;
    if (s && s->group >= left) {
        finish_groups(w, s->group - left);
        give_back(s);
    }
    end_collective(w);
}

// ---- mma.sync -------------------------------------------------------------------------------------------------------

struct mma_args {
    u32 type;
    f32 *d;
    const u32 *a, *b;
};

static void multiply(warp_state *w)
{
    thread **lane = &w->block->threads[w->first];
    const mma_args *args[32];
    const u32 *regs[32];
    for (u32 i = 0; i < 32; i++) {
        args[i] = (const mma_args *)lane[i]->matrix;
        regs[i] = args[i]->a;
        if (args[i]->type != args[0]->type) fail(EMU_LAUNCH_FAILED, "mma: lanes give different types");
    }
    u32 type = args[0]->type, per_word = 4 / element_bytes(type), k = 8 * per_word;
    f32 a[16][32], b[32][8];
    fragment_a(type, regs, a);
    for (u32 i = 0; i < 32; i++)
        for (u32 x = 0; x < 2; x++)
            for (u32 e = 0; e < per_word; e++)
                b[x * per_word * 4 + i % 4 * per_word + e][i / 4] = element(type, (const u8 *)&args[i]->b[x], e);
    for (u32 i = 0; i < 32; i++)
        for (u32 x = 0; x < 4; x++) {
            u32 row = i / 4 + (x >> 1) * 8, column = i % 4 * 2 + (x & 1);
            f32 sum = args[i]->d[x];
            for (u32 j = 0; j < k; j++) sum += a[row][j] * b[j][column];
            args[i]->d[x] = sum;
        }
}

static void whole_warp(const char *name)
{
    if (self->warp->lanes != 32) fail(EMU_LAUNCH_FAILED, "%s: needs a whole warp", name);
}

extern "C" void emu_mma(u32 type, f32 *d, const u32 *a, const u32 *b)
{
    require(type == EMU_E4M3 ? 89 : 80, "mma");
    whole_warp("mma");
    mma_args args = { type, d, a, b };
    self->matrix = &args;
    if (!collective(MATRIX_MMA, "mma")) return;
    multiply(self->warp);
    end_collective(self->warp);
}

// ---- ldmatrix, stmatrix ---------------------------------------------------------------------------------------------

struct rows_args {
    u32 *r;
    u32 count;
    u8 *row;
    bool trans;
};

// Lanes 8 m .. 8 m + 7 give the rows of matrix m; lane l holds elements 2 (l % 4) and + 1 of row l / 4, or of that
// column.
static void move_rows(warp_state *w, bool store)
{
    thread **lane = &w->block->threads[w->first];
    const rows_args *first = (const rows_args *)lane[0]->matrix;
    const char *name = store ? "stmatrix" : "ldmatrix";
    thread *caller = self;
    for (u32 m = 0; m < first->count; m++) {
        u16 v[8][8];
        for (u32 r = 0; r < 8; r++) {
            self = lane[m * 8 + r];
            u8 *row = ((rows_args *)self->matrix)->row;
            if ((size_t)(row - self->block->smem) >= self->block->smem_bytes)
                fail(EMU_ILLEGAL_ADDRESS, "%s: %s is not in shared memory", name, describe_address(row).c_str());
            check_access(thread_actor(name, 0), row, 16, store ? WRITE : READ, 16, false);
            if (!store) memcpy(v[r], row, 16);
        }
        for (u32 i = 0; i < 32; i++) {
            u32 *word = &((rows_args *)lane[i]->matrix)->r[m];
            for (u32 e = 0; e < 2; e++) {
                u32 r = i / 4, column = i % 4 * 2 + e;
                u16 &x = first->trans ? v[column][r] : v[r][column];
                if (store) x = (u16)(*word >> 16 * e);
                else *word = e ? (*word & 0xffff) | (u32)x << 16 : x;
            }
        }
        for (u32 r = 0; store && r < 8; r++) memcpy(((rows_args *)lane[m * 8 + r]->matrix)->row, v[r], 16);
    }
    self = caller;
}

static void rows_together(rows_args *args, bool store, const char *name)
{
    whole_warp(name);
    self->matrix = args;
    if (!collective(store ? MATRIX_STORE : MATRIX_LOAD, name)) return;
    move_rows(self->warp, store);
    end_collective(self->warp);
}

extern "C" void emu_ldmatrix(u32 *r, u32 count, const void *row, bool trans)
{
    rows_args args = { r, count, (u8 *)row, trans };
    rows_together(&args, false, "ldmatrix");
}

extern "C" void emu_stmatrix(void *row, const u32 *r, u32 count, bool trans)
{
    require(90, "stmatrix");
    rows_args args = { (u32 *)r, count, (u8 *)row, trans };
    rows_together(&args, true, "stmatrix");
}
