// What completes later: cp.async, bulk copies, st.async. Each completes at a moment that the generator picks, or when it
// is waited for at the latest; until then its destination is NaN, and both its ends count as being touched.
#include "engine.h"

#include <stdio.h>
#include <stdlib.h>

#include <algorithm>

enum emu_bulk_kind { EMU_G2S, EMU_S2G, EMU_S2S, EMU_RED_F32, EMU_RED_BF16, EMU_CP_ASYNC, EMU_ST_ASYNC }; // device.h's first
enum emu_type { EMU_BF16, EMU_F16, EMU_E4M3, EMU_E5M2 };

extern "C" u32 emu_encode(u32 type, f32 v);
extern "C" f32 emu_decode(u32 type, u32 bits);

// ---- flying ---------------------------------------------------------------------------------------------------------

static async_op *launch(u32 kind, cta *owner, epoch id, u8 *dst, const u8 *src, u32 bytes, const char *name)
{
    async_op *a = new async_op();
    a->kind = kind;
    a->owner = owner;
    a->issuer = self;
    a->id = id;
    a->dst = dst;
    a->src = src;
    a->bytes = a->src_bytes = bytes;
    a->name = name;
    a->index = running->flying.size();
    running->flying.push_back(a);
    return a;
}

static void land(async_op *a)
{
    std::vector<async_op *> &f = running->flying;
    f[a->index] = f.back();
    f[a->index]->index = a->index;
    f.pop_back();
}

static void erase(std::vector<async_op *> &list, async_op *a)
{
    auto i = std::find(list.begin(), list.end(), a);
    if (i != list.end()) list.erase(i);
}

// A new identity among the CTA's agents.
static epoch new_agent(cta *c)
{
    u32 slot = c->agent_next++ % AGENTS, clock = ++c->agent_clock[slot];
    return make_epoch(c->serial, 2 * c->n + slot, clock, ASYNC);
}

static clock_ref agent_clock(const cta *c, epoch id, const clock_ref &base)
{
    raise r = { epoch_who(id), epoch_clock(id) };
    return clock_raise(base, c->serial, c->g->op->serial, c->width(), &r, 1);
}

static actor agent_actor(epoch id, const char *name)
{
    return { id, self->base.p, self, self->block->g->op, name };
}

void step_random_async(emu_device *dev)
{
    complete(dev->flying[dev->random((u32)dev->flying.size())]);
}

// ---- cp.async -------------------------------------------------------------------------------------------------------

// Arrivals of cp_async_mbar_arrive() whose copies are all complete.
static void copies_arrive(thread *t)
{
    while (!t->copy_bars.empty()) {
        u32 clock = t->copy_bars.front().first;
        for (const async_op *a : t->copies)
            if (epoch_clock(a->id) <= clock) return;
        u8 *bar = t->copy_bars.front().second;
        t->copy_bars.erase(t->copy_bars.begin());
        raise r = { t->block->n + t->tid, clock };
        cta *c = t->block;
        for (mbarrier &m : c->mbars)
            if (m.live && m.at == bar)
                mbar_arrives(&m, 1, nullptr, clock_raise(clock_ref(), c->serial, c->g->op->serial, c->width(), &r, 1),
                             "cp_async_mbar_arrive");
    }
}

void cp_async_arrives(mbarrier *m)
{
    require(80, "cp_async_mbar_arrive");
    self->copy_bars.push_back({ self->copy_clock, m->at });
    copies_arrive(self);
}

static void complete_cp_async(async_op *a)
{
    thread *t = a->issuer;
    memcpy(a->dst, a->src, a->src_bytes);
    memset(a->dst + a->src_bytes, 0, a->bytes - a->src_bytes);
    erase(t->copies, a);
    a->owner->in_flight--;
    copies_arrive(t);
}

static void require_smem(const void *p, u32 bytes, const char *name)
{
    const cta *c = self->block;
    size_t at = (size_t)((const u8 *)p - c->smem);
    if (at > c->smem_bytes || bytes > c->smem_bytes - at)
        fail(EMU_ILLEGAL_ADDRESS, "%s: %u bytes at %s are not in shared memory", name, bytes, describe_address(p).c_str());
}

extern "C" void emu_cp_async(void *dst, const void *src, u32 bytes, u32 src_bytes)
{
    const char *name = bytes == 16 ? "cp_async_16" : "cp_async_4";
    thread *t = self;
    cta *c = t->block;
    require(80, name);
    if (src_bytes > bytes) fail(EMU_LAUNCH_FAILED, "%s: reads %u bytes", name, src_bytes);
    require_smem(dst, bytes, name);
    epoch id = make_epoch(c->serial, c->n + t->tid, ++t->copy_clock, ASYNC);
    actor who = agent_actor(id, name);
    if ((uintptr_t)src & (bytes - 1)) fail(EMU_MISALIGNED, "%s: source %s needs %u-byte alignment", name,
                                           describe_address(src).c_str(), bytes);
    if (src_bytes) check_access(who, src, src_bytes, READ_ASYNC, 1, true);
    check_access(who, dst, bytes, WRITE_ASYNC, bytes, true);
    if (src_bytes) copy_written(running, who, (u8 *)dst, (const u8 *)src, src_bytes);
    memset(dst, 0xff, bytes);
    async_op *a = launch(EMU_CP_ASYNC, c, id, (u8 *)dst, (const u8 *)src, bytes, name);
    a->src_bytes = src_bytes;
    a->group = t->copy_group;
    t->copies.push_back(a);
    c->in_flight++;
}

extern "C" void emu_cp_async_commit()
{
    self->copy_group++;
    self->copy_ends.push_back(self->copy_clock);
}

extern "C" void emu_cp_async_wait(u32 left)
{
    thread *t = self;
    sometimes_yield();
    if (t->copy_group < left) return;
    u32 groups = t->copy_group - left;
    for (size_t i = 0; i < t->copies.size();) {
        if (t->copies[i]->group < groups) complete(t->copies[i]);
        else i++;
    }
    if (groups) t->copy_known = std::max(t->copy_known, t->copy_ends[groups - 1]);
}

// What a block may leave behind when it ends: copies that nobody waits for, and stores whose source has been read.
void finish_cp_async(cta *c)
{
    if (!c->in_flight && running->flying.empty()) return;
    std::vector<async_op *> own;
    for (async_op *a : running->flying)
        if (a->owner == c && (a->kind == EMU_CP_ASYNC || a->captured)) own.push_back(a);
    for (async_op *a : own) complete(a);
}

// ---- bulk copies ----------------------------------------------------------------------------------------------------

static void bulk_alignment(const void *dst, const void *src, u32 bytes, const char *name)
{
    if (bytes % 16) fail(EMU_MISALIGNED, "%s: %u bytes; a multiple of 16", name, bytes);
    for (const void *p : { dst, src })
        if ((uintptr_t)p & 15) fail(EMU_MISALIGNED, "%s: %s needs 16-byte alignment", name, describe_address(p).c_str());
}

// The mbarrier at the same place in another block of the cluster.
static mbarrier *bar_for_async(cta *c, u8 *bar, const char *name)
{
    mbarrier *m = find_mbar(c, bar, name);
    if (!m->fenced)
        fail(EMU_LAUNCH_FAILED, "%s: the mbarrier smem+%d was initialised without fence_mbar_init() or "
             "fence_proxy_async()", name, (int)(bar - c->smem));
    return m;
}

static void touch_destination(const actor &who, cta *c, u8 *dst, u32 bytes)
{
    check_range(who, &c->smem_range, dst, bytes, WRITE_ASYNC, true);
    memset(dst, 0xff, bytes);
}

static void bulk_to_smem(void *dst, const void *src, u32 bytes, u64 *bar, u32 mask, const char *name)
{
    cta *c = self->block;
    require_smem(dst, bytes, name);
    require_global(src, bytes, name);
    epoch id = new_agent(c);
    actor who = agent_actor(id, name);
    check_access(who, src, bytes, READ_ASYNC, 16, true);
    if (!mask) mask = 1u << c->rank;
    for (u32 i = 0; i < 16; i++) {
        if (!(mask >> i & 1)) continue;
        if (i >= c->cluster->ctas.size()) fail(EMU_LAUNCH_FAILED, "%s: block %u of a cluster of %zu", name, i,
                                               c->cluster->ctas.size());
        cta *to = c->cluster->ctas[i];
        u32 at = (u32)((u8 *)dst - c->smem), bar_at = (u32)((u8 *)bar - c->smem);
        u8 *p;
        if (to != c) resolve((at + SMEM_WINDOW) | (i + 1) << CLUSTER_SHIFT, bytes, name, &p);
        bar_for_async(to, to->smem + bar_at, name);
        touch_destination(who, to, to->smem + at, bytes);
        copy_written(running, who, to->smem + at, (const u8 *)src, bytes);
        async_op *a = launch(EMU_G2S, c, id, to->smem + at, (const u8 *)src, bytes, name);
        a->bar_cta = to;
        a->bar = to->smem + bar_at;
        to->in_flight++;
    }
}

static void bulk_to_global(u32 kind, void *dst, const void *src, u32 bytes, const char *name)
{
    thread *t = self;
    cta *c = t->block;
    require_smem(src, bytes, name);
    epoch read_id = new_agent(c), id = new_agent(c);
    check_proxy(t, &c->smem_range, (const u8 *)src, bytes, name);
    check_access(agent_actor(read_id, name), src, bytes, READ_ASYNC, 16, true);
    bool reduces = kind != EMU_S2G;
    if (reduces) id |= ATOMIC, id &= ~(epoch)ASYNC;
    require_global(dst, bytes, name);
    actor who = agent_actor(id, name);
    check_access(who, dst, bytes, reduces ? WRITE_ATOMIC : WRITE_ASYNC, 16, !reduces);
    if (!reduces) {
        copy_written(running, who, (u8 *)dst, (const u8 *)src, bytes);
        memset(dst, 0xff, bytes);
    }
    async_op *a = launch(kind, c, id, (u8 *)dst, (const u8 *)src, bytes, name);
    a->read_id = read_id;
    a->group = t->bulk_group;
    t->bulks.push_back(a);
    t->bulk_ids.push_back({ t->bulk_group, id, read_id });
    c->in_flight++;
}

void require_global(const void *p, u32 bytes, const char *name)
{
    bool partly;
    memory_range *m = find_range(running, p, bytes, &partly);
    if (!m || partly || m->kind == memory_range::FREED)
        fail(EMU_ILLEGAL_ADDRESS, "%s: %u bytes at %s are not in global memory", name, bytes, describe_address(p).c_str());
}

extern "C" void emu_bulk(u32 kind, void *dst, const void *src, u32 bytes, u64 *bar, u32 mask, const char *name)
{
    require(90, name);
    bulk_alignment(dst, src, bytes, name);
    if (kind == EMU_G2S) bulk_to_smem(dst, src, bytes, bar, mask & 0xffff, name);
    else bulk_to_global(kind, dst, src, bytes, name);
}

extern "C" void emu_bulk_cluster(u32 dst, const void *src, u32 bytes, u32 bar)
{
    const char *name = "bulk_s2s_cluster";
    cta *c = self->block;
    u8 *to, *bar_at;
    require(90, name);
    if (bytes % 16 || dst % 16) fail(EMU_MISALIGNED, "%s: %u bytes to 0x%x; multiples of 16", name, bytes, dst);
    require_smem(src, bytes, name);
    cta *target = resolve(dst, bytes, name, &to);
    if (resolve(bar, 8, name, &bar_at) != target)
        fail(EMU_LAUNCH_FAILED, "%s: the mbarrier is not in the block of the destination", name);
    bar_for_async(target, bar_at, name);
    check_proxy(self, &c->smem_range, (const u8 *)src, bytes, name);
    epoch id = new_agent(c);
    actor who = agent_actor(id, name);
    check_access(who, src, bytes, READ_ASYNC, 16, true);
    touch_destination(who, target, to, bytes);
    copy_written(running, who, to, (const u8 *)src, bytes);
    async_op *a = launch(EMU_S2S, c, id, to, (const u8 *)src, bytes, name);
    a->bar_cta = target;
    a->bar = bar_at;
    target->in_flight++;
    if (target != c) c->in_flight++;
}

extern "C" void emu_st_async(u32 addr, u32 value, u32 bar)
{
    const char *name = "st_async";
    u8 *to, *bar_at;
    require(90, name);
    if (addr % 4) fail(EMU_MISALIGNED, "%s: 0x%x needs 4-byte alignment", name, addr);
    cta *target = resolve(addr, 4, name, &to);
    if (resolve(bar, 8, name, &bar_at) != target)
        fail(EMU_LAUNCH_FAILED, "%s: the mbarrier is not in the block of the destination", name);
    bar_for_async(target, bar_at, name);
    epoch id = new_agent(self->block);
    touch_destination(agent_actor(id, name), target, to, 4);
    async_op *a = launch(EMU_ST_ASYNC, self->block, id, to, nullptr, 4, name);
    a->captured_bytes.resize(4);
    memcpy(a->captured_bytes.data(), &value, 4);
    a->bar_cta = target;
    a->bar = bar_at;
    target->in_flight++;
}

extern "C" void emu_bulk_prefetch(const void *src, u32 bytes)
{
    require(90, "bulk_prefetch");
    bulk_alignment(src, src, bytes, "bulk_prefetch");
    require_global(src, bytes, "bulk_prefetch");
}

extern "C" void emu_bulk_commit()
{
    require(90, "bulk_commit");
    self->bulk_group++;
}

// Its source has been read: the shared memory may be used again.
static void capture(async_op *a)
{
    if (a->captured) return;
    a->captured = true;
    a->captured_bytes.assign(a->src, a->src + a->bytes);
    a->owner->in_flight--;
}

extern "C" void emu_bulk_wait(u32 left, bool read)
{
    thread *t = self;
    require(90, "bulk_wait");
    sometimes_yield();
    if (t->bulk_group < left) return;
    u32 groups = t->bulk_group - left;
    std::vector<async_op *> all = t->bulks;
    for (async_op *a : all) {
        if (a->group >= groups) continue;
        if (read) capture(a);
        else complete(a);
    }
    // Of everything of these groups, complete before or now.
    for (size_t i = 0; i < t->bulk_ids.size();) {
        bulk_id &b = t->bulk_ids[i];
        if (b.group >= groups) {
            i++;
            continue;
        }
        t->base = agent_clock(t->block, b.read_id, t->base);
        if (!read) t->base = agent_clock(t->block, b.id, t->base);
        if (!read) t->bulk_ids.erase(t->bulk_ids.begin() + (long)i);
        else i++;
    }
}

static void add_elements(async_op *a, const u8 *src)
{
    if (a->kind == EMU_RED_F32) {
        for (u32 i = 0; i < a->bytes / 4; i++) {
            f32 x, y;
            memcpy(&x, a->dst + 4 * i, 4);
            memcpy(&y, src + 4 * i, 4);
            x += y;
            memcpy(a->dst + 4 * i, &x, 4);
        }
        return;
    }
    for (u32 i = 0; i < a->bytes / 2; i++) {
        u16 x, y;
        memcpy(&x, a->dst + 2 * i, 2);
        memcpy(&y, src + 2 * i, 2);
        x = (u16)emu_encode(EMU_BF16, emu_decode(EMU_BF16, x) + emu_decode(EMU_BF16, y));
        memcpy(a->dst + 2 * i, &x, 2);
    }
}

static void complete_at_bar(async_op *a)
{
    for (mbarrier &m : a->bar_cta->mbars)
        if (m.live && m.at == a->bar) {
            mbar_bytes(&m, a->bytes, agent_clock(a->owner, a->id, clock_ref()));
            return;
        }
    report_op(a->owner->g->op, EMU_LAUNCH_FAILED, std::string(a->name) + ": its mbarrier was invalidated before it completed");
}

void complete(async_op *a)
{
    const u8 *src = a->captured_bytes.empty() ? a->src : a->captured_bytes.data();
    land(a);
    switch (a->kind) {
    case EMU_CP_ASYNC: complete_cp_async(a); break;
    case EMU_G2S: case EMU_S2S: case EMU_ST_ASYNC:
        memcpy(a->dst, src, a->bytes);
        a->bar_cta->in_flight--;
        if (a->kind == EMU_S2S && a->bar_cta != a->owner) a->owner->in_flight--;
        complete_at_bar(a);
        break;
    default:
        if (a->kind == EMU_S2G) memcpy(a->dst, src, a->bytes);
        else add_elements(a, src);
        if (!a->captured) a->owner->in_flight--;
        erase(a->issuer->bulks, a);
    }
    running->spins = 0;
    delete a;
}

// ---- small floating-point formats -----------------------------------------------------------------------------------

// Exponent bits, mantissa bits, bias; fp8 saturates, E4M3 has no infinity.
struct small_format {
    int exponent, mantissa, bias;
    bool saturates, infinity;
};
static const small_format formats[] = { { 8, 7, 127, false, true }, { 5, 10, 15, false, true }, { 4, 3, 7, true, false },
                                        { 5, 2, 15, true, true } };

extern "C" u32 emu_encode(u32 type, f32 v)
{
    const small_format &f = formats[type];
    u32 u, m = (u32)f.mantissa;
    memcpy(&u, &v, 4);
    u32 sign = u >> 31 << (f.exponent + f.mantissa), mag = u & 0x7fffffff, top = (1u << (f.exponent + f.mantissa)) - 1;
    u32 inf = ((1u << f.exponent) - 1) << m, largest = f.infinity ? inf - 1 : top - 1;
    if (mag > 0x7f800000) return top;
    int e = (int)(mag >> 23) - 127 + f.bias;
    u64 fraction = (mag & 0x7fffff) | (mag >> 23 ? 0x800000 : 0);
    if (mag >> 23 == 0) e++;
    int drop = 23 - f.mantissa + (e < 1 ? 1 - e : 0);
    u64 kept = drop > 40 ? 0 : fraction >> drop, rest = drop > 40 ? 0 : fraction - (kept << drop);
    if (drop <= 40 && (rest > 1ull << (drop - 1) || (rest == 1ull << (drop - 1) && (kept & 1)))) kept++;
    u64 bits = e < 1 ? kept : ((u64)e << m) + kept - (1ull << m);
    if (bits > largest) return sign | (f.saturates ? largest : inf);
    return sign | (u32)bits;
}

extern "C" f32 emu_decode(u32 type, u32 bits)
{
    const small_format &f = formats[type];
    u32 e = bits >> f.mantissa & ((1u << f.exponent) - 1), m = bits & ((1u << f.mantissa) - 1), sign = bits >> (f.exponent + f.mantissa) & 1;
    bool top = e == (1u << f.exponent) - 1;
    f32 v;
    u32 u;
    if (top && f.infinity) u = 0x7f800000 | m << (23 - f.mantissa);
    else if (top && !f.infinity && m == (1u << f.mantissa) - 1) u = 0x7fc00000;
    else {
        v = __builtin_ldexpf((f32)(e ? m + (1u << f.mantissa) : m), (int)(e ? e : 1) - f.bias - f.mantissa);
        memcpy(&u, &v, 4);
    }
    u |= sign << 31;
    memcpy(&v, &u, 4);
    return v;
}
