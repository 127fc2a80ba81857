// What threads do together: collectives of a warp, barriers, atomics, clusters, mbarriers.
#include "engine.h"

#include <stdio.h>
#include <stdlib.h>

#include <algorithm>


// ---- arrivals -------------------------------------------------------------------------------------------------------

void arrivals::add(thread *t)
{
    list.push_back({ t->base, t->block, t->tid, t->clock, t->copy_known });
    t->clock++;
}

clock_ref arrivals::sum() const
{
    clock_ref s = extra;
    const clock_set *last = nullptr;
    for (const one &a : list) {
        if (a.base.p != last) s = clock_join(s, a.base);
        last = a.base.p;
    }
    std::vector<raise> raised;
    for (size_t i = 0, j; i < list.size(); i = j) {
        const cta *c = list[i].block;
        raised.clear();
        for (j = i; j < list.size() && list[j].block == c; j++) {
            raised.push_back({ list[j].tid, list[j].clock });
            if (list[j].copies) raised.push_back({ c->n + list[j].tid, list[j].copies });
        }
        s = clock_raise(s, c->serial, c->g->op->serial, c->width(), raised.data(), raised.size());
    }
    return s;
}

// ---- facts ----------------------------------------------------------------------------------------------------------

extern "C" {

u32 emu_tid() { return self->tid; }
u32 emu_ntid() { return self->block->n; }
u32 emu_cta() { return self->block->id[0]; }
u32 emu_cta_y() { return self->block->id[1]; }
u32 emu_ncta() { return self->block->g->op->desc.grid[0]; }
u8 *emu_smem() { return self->block->smem; }
u32 emu_smem_bytes() { return self->block->smem_bytes; }
u32 emu_cluster_rank()
{
    require(90, "cluster_rank");
    return self->block->rank;
}
u32 emu_cluster_size()
{
    require(90, "cluster_size");
    return self->block->g->cluster_size;
}

u32 emu_saddr(const void *p)
{
    size_t at = (size_t)((const u8 *)p - self->block->smem);
    if (at > self->block->smem_bytes)
        fail(EMU_ILLEGAL_ADDRESS, "saddr: %s is not in shared memory", describe_address(p).c_str());
    return (u32)at + SMEM_WINDOW;
}

void emu_trap()
{
    fail(EMU_LAUNCH_FAILED, "trap()");
}
}

// ---- collectives of a warp ------------------------------------------------------------------------------------------

bool collective(u32 op, const char *name)
{
    thread *t = self;
    warp_state *w = t->warp;
    if (w->arrived && w->op != op)
        fail(EMU_LAUNCH_FAILED, "%s: lanes of the warp are in different collective operations", name);
    w->op = op;
    w->arrived |= 1u << (t->tid & 31);
    if (w->arrived == (w->lanes == 32 ? ~0u : (1u << w->lanes) - 1)) return true;
    yield_blocked(name);
    return false;
}

void end_collective(warp_state *w)
{
    w->arrived = 0;
    for (u32 i = 0; i < w->lanes; i++)
        if (w->block->threads[w->first + i] != self) wake(w->block->threads[w->first + i]);
}

static u32 shuffled(thread **lane, const warp_state *w, u32 op, u32 i)
{
    u32 o = lane[i]->operand, from = i;
    switch (op) {
    case EMU_SHFL: from = o & 31; break;
    case EMU_SHFL_XOR: from = (i ^ o) < 32 ? i ^ o : i; break;
    case EMU_SHFL_UP: from = i >= o ? i - o : i; break;
    default: from = o < 32 && i + o < 32 ? i + o : i;
    }
    return lane[from < w->lanes ? from : i]->value;
}

static void reduce(thread **lane, const warp_state *w, u32 op)
{
    u32 all = op == EMU_REDUX_MIN ? ~0u : 0;
    for (u32 i = 0; i < w->lanes; i++) {
        u32 v = lane[i]->value;
        switch (op) {
        case EMU_REDUX_MAX: all = std::max(all, v); break;
        case EMU_REDUX_MIN: all = std::min(all, v); break;
        case EMU_REDUX_ADD: all += v; break;
        case EMU_BALLOT: all |= (v ? 1u : 0u) << i; break;
        default: all |= v;
        }
    }
    for (u32 i = 0; i < w->lanes; i++) lane[i]->result = all;
}

static void resolve_warp(warp_state *w, u32 op)
{
    thread **lane = &w->block->threads[w->first];
    switch (op) {
    case EMU_SHFL: case EMU_SHFL_XOR: case EMU_SHFL_UP: case EMU_SHFL_DOWN:
        for (u32 i = 0; i < w->lanes; i++) lane[i]->result = shuffled(lane, w, op, i);
        break;
    case EMU_MATCH_ANY:
        for (u32 i = 0; i < w->lanes; i++) {
            lane[i]->result = 0;
            for (u32 j = 0; j < w->lanes; j++) lane[i]->result |= (lane[j]->value == lane[i]->value ? 1u : 0u) << j;
        }
        break;
    case EMU_ELECT:
        for (u32 i = 0; i < w->lanes; i++) lane[i]->result = i == w->leader;
        break;
    default: reduce(lane, w, op);
    }
}

extern "C" u32 emu_warp(u32 op, u32 value, u32 operand)
{
    static const char *const names[] = { "shfl", "shfl_xor", "shfl_up", "shfl_down", "ballot", "match_any", "redux_max",
                                         "redux_min", "redux_add", "redux_or", "elect" };
    thread *t = self;
    if (op >= EMU_REDUX_MAX && op != EMU_ELECT) require(80, names[op]);
    t->value = value;
    t->operand = operand;
    if (!collective(op, names[op])) return t->result;
    resolve_warp(t->warp, op);
    end_collective(t->warp);
    return t->result;
}

extern "C" void emu_warp_sync()
{
    if (!collective(EMU_WARP_SYNC, "warp_sync")) return;
    warp_state *w = self->warp;
    arrivals come;
    for (u32 i = 0; i < w->lanes; i++) come.add(w->block->threads[w->first + i]);
    clock_ref sum = come.sum();
    for (u32 i = 0; i < w->lanes; i++) w->block->threads[w->first + i]->base = sum;
    end_collective(w);
}

// ---- barriers of a CTA ----------------------------------------------------------------------------------------------

static void at_barrier(u32 id, u32 threads, bool wait, const char *name)
{
    thread *t = self;
    barrier_state &b = t->block->bars[id];
    if (b.come.list.empty()) b.expected = threads;
    if (b.expected != threads)
        fail(EMU_LAUNCH_FAILED, "%s: barrier %u is used with %u and with %u threads", name, id, b.expected, threads);
    if (t->barriers >> id & 1) fail(EMU_LAUNCH_FAILED, "%s: arrives at barrier %u a second time", name, id);
    t->barriers |= 1u << id;
    b.come.add(t);
    if (b.come.list.size() < threads) {
        if (!wait) return;
        b.waiting.push_back(t);
        yield_blocked(name, id + 1);
        return;
    }
    clock_ref sum = b.come.sum();
    for (const arrivals::one &a : b.come.list) t->block->threads[a.tid]->barriers &= ~(1u << id);
    b.come.clear();
    for (thread *u : b.waiting) {
        u->base = sum;
        wake(u);
    }
    b.waiting.clear();
    if (wait) t->base = sum;
}

extern "C" void emu_cta_sync()
{
    at_barrier(0, self->block->n, true, "cta_sync");
}

extern "C" void emu_bar(u32 id, u32 threads, bool wait)
{
    const char *name = wait ? "bar_sync" : "bar_arrive";
    if (id > 15) fail(EMU_LAUNCH_FAILED, "%s: barrier %u, there are 0..15", name, id);
    if (!threads || threads % 32 || threads > (self->block->n + 31) / 32 * 32)
        fail(EMU_LAUNCH_FAILED, "%s: %u threads in a block of %u; a multiple of 32", name, threads, self->block->n);
    at_barrier(id, threads, wait, name);
}

// ---- atomics and fences ---------------------------------------------------------------------------------------------

static u32 update(u32 op, u32 *p, u32 value)
{
    u32 old = *p;
    if (op == EMU_ADD) *p = old + value;
    if (op == EMU_MAX) *p = std::max(old, value);
    if (op == EMU_STORE) *p = value;
    return old;
}

// Synchronises through one word: `map` holds what its last writes have released.
static void order_word(std::unordered_map<const void *, clock_ref> &map, const void *p, u32 op, u32 order, bool shared)
{
    thread *t = self;
    auto i = map.find(p);
    if (i != map.end() && op != EMU_STORE) {
        if (order & EMU_ACQUIRE) acquire(t, i->second);
        else t->acquire_pending = clock_join(t->acquire_pending, i->second);
    }
    if (op == EMU_LOAD) return;
    clock_ref out = t->release_fence;
    if (shared) out = clock_join(out, t->cta_fence);
    if (order & EMU_RELEASE) out = clock_join(out, release_clock(t));
    if (op == EMU_STORE) {
        if (out) map[p] = out;
        else if (i != map.end()) map.erase(i);
    } else if (out) {
        clock_ref &to = map[p];
        to = clock_join(to, out);
    }
}

static void count_poll(const void *p, u32 value)
{
    if (self->poll_at == p && self->poll_value == value) {
        running->spins++;
        yield_ready();
        return;
    }
    running->spins = 0;
    self->poll_at = (const u8 *)p;
    self->poll_value = value;
}

extern "C" u32 emu_atomic(u32 op, u32 order, const void *p, u32 value, const char *name)
{
    sometimes_yield();
    bool load = op == EMU_LOAD;
    check_access(thread_actor(name, load ? 3 : ATOMIC), p, 4, load ? READ_ATOMIC : WRITE_ATOMIC, 4, op == EMU_STORE);
    u32 old = update(op, (u32 *)p, value);
    cta *c = self->block;
    bool shared = (size_t)((const u8 *)p - c->smem) < c->smem_bytes;
    order_word(shared ? c->released : running->released, p, op, order, shared);
    if (load) count_poll(p, old);
    return old;
}

extern "C" void emu_fence(u32 kind)
{
    thread *t = self;
    if (kind == EMU_FENCE_GPU || kind == EMU_FENCE_CTA) {
        acquire(t, t->acquire_pending);
        t->acquire_pending = nullptr;
        (kind == EMU_FENCE_GPU ? t->release_fence : t->cta_fence) = release_clock(t);
        return;
    }
    require(90, kind == EMU_FENCE_ASYNC ? "fence_proxy_async" : "fence_mbar_init");
    for (mbarrier &m : t->block->mbars)
        if (m.init_thread == t) m.fenced = true;
    if (kind != EMU_FENCE_ASYNC) return;
    t->proxy_base = t->base;
    t->proxy_clock = ++t->clock;
}

extern "C" void emu_load(void *dst, const void *src, u32 bytes, bool nc, const char *name)
{
    actor a = thread_actor(name, 0);
    check_access(a, src, bytes, READ, bytes, false);
    if (nc) check_constant(a, src, bytes);
    memcpy(dst, src, bytes);
}

extern "C" void emu_prefetch(const void *) {}

// ---- clusters -------------------------------------------------------------------------------------------------------

extern "C" u32 emu_mapa(const void *p, u32 rank)
{
    require(90, "mapa");
    if (rank >= self->block->g->cluster_size)
        fail(EMU_LAUNCH_FAILED, "mapa: block %u of a cluster of %u", rank, self->block->g->cluster_size);
    return emu_saddr(p) | (rank + 1) << CLUSTER_SHIFT;
}

cta *resolve(u32 addr, u32 bytes, const char *name, u8 **p)
{
    cta *c = self->block;
    u32 rank = addr >> CLUSTER_SHIFT, at = (addr & ((1u << CLUSTER_SHIFT) - 1)) - SMEM_WINDOW;
    if (rank > c->cluster->ctas.size())
        fail(EMU_ILLEGAL_ADDRESS, "%s: 0x%x is no shared address of the cluster", name, addr);
    if (rank) c = c->cluster->ctas[rank - 1];
    if (at > c->smem_bytes || bytes > c->smem_bytes - at)
        fail(EMU_ILLEGAL_ADDRESS, "%s: %u bytes at smem+%d of block %u of the cluster, which has %u", name, bytes,
             (int)at, c->rank, c->smem_bytes);
    if (!c->left) fail(EMU_ILLEGAL_ADDRESS, "%s: block %u of the cluster has ended", name, c->rank);
    if (c != self->block)
        c->remote[(u64)self->block->serial << 12 | self->tid] = thread_actor(name, 0).id;
    *p = c->smem + at;
    return c;
}

static u8 *remote(u32 addr, u32 bytes, const char *name, access_kind kind, u32 how)
{
    u8 *p;
    require(90, name);
    cta *c = resolve(addr, bytes, name, &p);
    if (addr & (bytes - 1)) fail(EMU_MISALIGNED, "%s: 0x%x needs %u-byte alignment", name, addr, bytes);
    check_range(thread_actor(name, how), &c->smem_range, p, bytes, kind, false);
    return p;
}

extern "C" void emu_load_cluster(void *dst, u32 addr, u32 bytes, const char *name)
{
    u8 *p = remote(addr, bytes, name, READ, 0);
    memcpy(dst, p, bytes);
}

extern "C" void emu_store_cluster(u32 addr, u32 value)
{
    u8 *p = remote(addr, 4, "st_cluster", WRITE, 0);
    memcpy(p, &value, 4);
}

extern "C" u32 emu_atomic_cluster(u32 addr, u32 value, bool is_float, const char *name)
{
    sometimes_yield();
    u32 *p = (u32 *)remote(addr, 4, name, WRITE_ATOMIC, ATOMIC), old = *p;
    if (is_float) {
        f32 a, b;
        memcpy(&a, &old, 4);
        memcpy(&b, &value, 4);
        a += b;
        memcpy(p, &a, 4);
    } else {
        *p = old + value;
    }
    return old;
}

static void cluster_completes(group *g)
{
    u32 live = 0;
    for (const cta *c : g->ctas) live += c->left;
    if (g->come.list.empty() || g->come.list.size() < live) return;
    g->released = g->come.sum();
    g->come.clear();
    g->phase++;
    for (thread *t : g->waiting) wake(t);
    g->waiting.clear();
}

extern "C" void emu_cluster_arrive()
{
    require(90, "cluster_arrive");
    thread *t = self;
    group *g = t->block->cluster;
    if (t->cluster_arrived) fail(EMU_LAUNCH_FAILED, "cluster_arrive: a second time without cluster_wait");
    t->cluster_arrived = true;
    t->cluster_phase = g->phase;
    g->come.add(t);
    cluster_completes(g);
}

extern "C" void emu_cluster_wait()
{
    thread *t = self;
    group *g = t->block->cluster;
    if (!t->cluster_arrived) fail(EMU_LAUNCH_FAILED, "cluster_wait: without cluster_arrive");
    while (g->phase == t->cluster_phase) {
        g->waiting.push_back(t);
        yield_blocked("cluster_wait");
    }
    t->cluster_arrived = false;
    acquire(t, g->released);
}

// A block of a cluster may end only when no other block can still be touching its shared memory.
void cluster_thread_ends(thread *t)
{
    cta *c = t->block;
    arrivals last;
    last.add(t);
    c->end_clock = clock_join(c->end_clock, last.sum());
    if (!c->left) {
        actor a = { 0, c->end_clock.p, nullptr, c->g->op, nullptr };
        for (const auto &r : c->remote)
            if (!knows(a, r.second))
                fail(EMU_LAUNCH_FAILED, "block %u of the cluster ends, not ordered after the access to its shared "
                     "memory by %s", c->rank, describe_epoch(r.second).c_str());
    }
    cluster_completes(c->cluster);
}

// ---- mbarriers ------------------------------------------------------------------------------------------------------

static const u64 MBAR_MAGIC = 0x6d62617200000000ull;

static void set_mbar_cells(cta *c, u8 *bar, bool on)
{
    cell *x = c->smem_range.cells + (bar - c->smem) / 4;
    x[0].mbar = x[1].mbar = on;
    x[0].written = x[1].written = on ? 15 : 0;
}

mbarrier *find_mbar(cta *c, u8 *bar, const char *name)
{
    if ((size_t)(bar - c->smem) >= c->smem_bytes || c->smem_bytes - (size_t)(bar - c->smem) < 8)
        fail(EMU_ILLEGAL_ADDRESS, "%s: no mbarrier of this block: %s", name, describe_address(bar).c_str());
    if ((bar - c->smem) & 7)
        fail(EMU_MISALIGNED, "%s: mbarrier at %s needs 8-byte alignment", name, describe_address(bar).c_str());
    u64 v;
    memcpy(&v, bar, 8);
    u32 i = (u32)v;
    if ((v >> 32 << 32) != MBAR_MAGIC || i >= c->mbars.size() || !c->mbars[i].live || c->mbars[i].at != bar)
        fail(EMU_LAUNCH_FAILED, "%s: %s holds no mbarrier", name, describe_address(bar).c_str());
    check_range(thread_actor(name, 3), &c->smem_range, bar, 8, READ_ATOMIC, true);
    return &c->mbars[i];
}

static void mbar_init(u8 *bar, u32 count)
{
    cta *c = self->block;
    if ((uintptr_t)bar & 7) fail(EMU_MISALIGNED, "mbar_init: %s needs 8-byte alignment", describe_address(bar).c_str());
    if (!count || count > 0xfffff) fail(EMU_LAUNCH_FAILED, "mbar_init: count %u, legal are 1..1048575", count);
    if ((size_t)(bar - c->smem) >= c->smem_bytes)
        fail(EMU_ILLEGAL_ADDRESS, "mbar_init: %s is not in shared memory", describe_address(bar).c_str());
    check_access(thread_actor("mbar_init", 0), bar, 8, WRITE, 8, true);
    mbarrier m = {};
    m.at = bar;
    m.block = c;
    m.count = m.pending = count;
    m.live = true;
    m.init_thread = self;
    u64 v = MBAR_MAGIC | c->mbars.size();
    memcpy(bar, &v, 8);
    c->mbars.push_back(m);
    set_mbar_cells(c, bar, true);
}

static void mbar_check(mbarrier *m)
{
    if (m->pending || m->tx) return;
    m->phase ^= 1;
    m->phases++;
    m->pending = m->count;
    m->near_clock = m->near.sum();
    m->far_clock = clock_join(m->near_clock, m->far.sum());
    m->near.clear();
    m->far.clear();
    for (thread *t : m->waiting) wake(t);
    m->waiting.clear();
    running->spins = 0;
}

// t: the thread whose clock it releases, or NULL; extra: what else is known to have happened.
void mbar_arrives(mbarrier *m, u32 count, thread *t, const clock_ref &extra, const char *name)
{
    if (count > m->pending) {
        std::string text = std::string(name) + ": more arrivals than the " + std::to_string(m->count) +
                           " of a phase at the mbarrier smem+" + std::to_string(m->at - m->block->smem);
        if (self) fail(EMU_LAUNCH_FAILED, "%s", text.c_str());
        report_op(m->block->g->op, EMU_LAUNCH_FAILED, text);
        return;
    }
    arrivals &to = !t || t->block == m->block ? m->near : m->far;
    if (t) to.add(t);
    to.extra = clock_join(to.extra, extra);
    m->pending -= count;
    mbar_check(m);
}

void mbar_bytes(mbarrier *m, u32 bytes, const clock_ref &clock)
{
    m->tx -= bytes;
    m->near.extra = clock_join(m->near.extra, clock);
    mbar_check(m);
}

static void expect(mbarrier *m, u32 bytes)
{
    m->tx += bytes;
    if (m->tx > 0xfffff) fail(EMU_LAUNCH_FAILED, "mbar_expect_tx: more than 1048575 bytes at once");
}

static void mbar_op(u32 op, cta *c, u8 *bar, u32 count, u32 bytes, const char *name)
{
    sometimes_yield();
    mbarrier *m = find_mbar(c, bar, name);
    if (op != EMU_MBAR_ARRIVE) expect(m, bytes);
    if (op != EMU_MBAR_EXPECT_TX) mbar_arrives(m, count, self, nullptr, name);
    else mbar_check(m);
}

extern "C" void emu_mbar(u32 op, u64 *bar, u32 count, u32 bytes)
{
    static const char *const names[] = { "mbar_init", "mbar_inval", "mbar_arrive", "mbar_expect_tx",
                                         "mbar_arrive_expect_tx", "cp_async_mbar_arrive" };
    u8 *at = (u8 *)bar;
    cta *c = self->block;
    if (op >= EMU_MBAR_EXPECT_TX && op <= EMU_MBAR_ARRIVE_EXPECT_TX) require(90, names[op]);
    if (op == EMU_MBAR_ARRIVE && count != 1) require(90, "mbar_arrive_n");
    if (op == EMU_MBAR_INIT) {
        mbar_init(at, count);
    } else if (op == EMU_MBAR_INVAL) {
        mbarrier *m = find_mbar(c, at, names[op]);
        if (!m->waiting.empty()) fail(EMU_LAUNCH_FAILED, "mbar_inval: %s is waited for", describe_address(bar).c_str());
        set_mbar_cells(c, at, false);
        check_access(thread_actor(names[op], 0), bar, 8, WRITE, 8, true);
        m->live = false;
        memset(bar, 0xff, 8);
    } else if (op == EMU_MBAR_CP_ASYNC) {
        cp_async_arrives(find_mbar(c, at, names[op]));
    } else {
        mbar_op(op, c, at, count, bytes, names[op]);
    }
}

extern "C" void emu_mbar_remote(u32 op, u32 addr, u32 bytes)
{
    const char *name = op == EMU_MBAR_ARRIVE ? "mbar_arrive_cluster" : "mbar_arrive_expect_tx_cluster";
    u8 *bar;
    require(90, name);
    cta *c = resolve(addr, 8, name, &bar);
    mbar_op(op, c, bar, 1, bytes, name);
}

static bool passed(mbarrier *m, u32 parity, bool cluster)
{
    if (parity > 1) fail(EMU_LAUNCH_FAILED, "mbar_wait: parity %u, legal are 0 and 1", parity);
    if (m->phase == parity) return false;
    acquire(self, cluster ? m->far_clock : m->near_clock);
    return true;
}

extern "C" bool emu_mbar_test(u64 *bar, u32 parity)
{
    sometimes_yield();
    bool done = passed(find_mbar(self->block, (u8 *)bar, "mbar_test"), parity, false);
    if (!done) count_poll(bar, parity);
    return done;
}

extern "C" void emu_mbar_wait(u64 *bar, u32 parity, bool cluster)
{
    const char *name = cluster ? "mbar_wait_cluster" : "mbar_wait";
    if (cluster) require(90, name);
    sometimes_yield();
    for (;;) {
        mbarrier *m = find_mbar(self->block, (u8 *)bar, name);
        if (passed(m, parity, cluster)) return;
        m->waiting.push_back(self);
        yield_blocked(name, (u64)(uintptr_t)bar | parity);
    }
}

std::string describe_wait(const thread *t)
{
    char text[160] = "";
    if (!strncmp(t->why, "mbar_wait", 9)) {
        u8 *bar = (u8 *)(uintptr_t)(t->why_detail & ~1ull);
        for (const mbarrier &m : t->block->mbars)
            if (m.live && m.at == bar)
                snprintf(text, sizeof text,
                         "(smem+%d, parity %d): %u phases done, %u of %u arrivals and %lld bytes missing",
                         (int)(bar - t->block->smem), (int)(t->why_detail & 1), m.phases, m.pending, m.count,
                         (long long)m.tx);
    } else {
        const barrier_state &b = t->block->bars[(t->why_detail - 1) & 15];
        snprintf(text, sizeof text, "(%u): %zu of %u threads", (u32)t->why_detail - 1, b.come.list.size(), b.expected);
    }
    return text;
}

// ---- registers ------------------------------------------------------------------------------------------------------

enum { EMU_SETMAXNREG = 100 };

extern "C" void emu_setmaxnreg(u32 regs, bool inc)
{
    const char *name = inc ? "reg_inc" : "reg_dec";
    require(90, name);
    if (regs < 24 || regs > 256 || regs % 8)
        fail(EMU_LAUNCH_FAILED, "%s: %u registers; a multiple of 8 in 24..256", name, regs);
    if (!collective(EMU_SETMAXNREG, name)) return;
    warp_state *w = self->warp;
    cta *c = self->block;
    if (inc ? regs < w->regs : regs > w->regs)
        fail(EMU_LAUNCH_FAILED, "%s: from %u to %u registers", name, w->regs, regs);
    while (inc && c->regs_free < (regs - w->regs) * 32) {
        c->regs_waiting.push_back(self);
        yield_blocked(name);
    }
    c->regs_free += w->regs * 32;
    c->regs_free -= regs * 32;
    w->regs = regs;
    for (thread *t : c->regs_waiting) wake(t);
    c->regs_waiting.clear();
    end_collective(w);
}
