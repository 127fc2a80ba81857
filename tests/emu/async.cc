// What completes later: cp.async, bulk and tensor copies, st.async. Each completes when the generator says so, or
// when it is waited for at the latest; until then its destination is NaN, and both its ends count as being touched.
// What they rest on, by section of the PTX ISA:
//
//     groups and mbarriers                   "Completion Mechanisms for Asynchronous Copy Operations"; "cp.async",
//                                            "cp.async.commit_group", "cp.async.wait_group"
//     bytes that a phase waits for           "Tracking asynchronous operations by the mbarrier object":
//                                            "Expect-tx operation", "Complete-tx operation"; "st.async";
//                                            "cp.async.mbarrier.arrive"
//     reads are done, writes are done        "cp.async.bulk.wait_group", with and without .read
//     sums                                   "cp.reduce.async.bulk", "cp.reduce.async.bulk.tensor": each element by
//                                            itself, relaxed; bf16 rounds to nearest even, subnormals kept (.noftz)
//     boxes, what lies outside, swizzles     "Tensors": "Bounding Box", "Out of Boundary Access", "Swizzling Modes"
//     order against ordinary accesses        "Async proxy", "membar / fence": fence.proxy.async, for shared memory; one
//                                            that is missing for global memory is not reported
//     conversions                            "cvt": round to nearest even; .satfinite; one NaN of each format
#include "engine.h"

#include <stdio.h>
#include <stdlib.h>

#include <algorithm>

extern "C" u32 emu_saddr(const void *p);
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
        fail(EMU_ILLEGAL_ADDRESS, "%s: %u bytes at %s are not in shared memory", name, bytes,
             describe_address(p).c_str());
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
        if ((uintptr_t)p & 15)
            fail(EMU_MISALIGNED, "%s: %s needs 16-byte alignment", name, describe_address(p).c_str());
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
        fail(EMU_ILLEGAL_ADDRESS, "%s: %u bytes at %s are not in global memory", name, bytes,
             describe_address(p).c_str());
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
    if (a->src) // a tensor copy has collected its rows when it was issued
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
    report_op(a->owner->g->op, EMU_LAUNCH_FAILED,
              std::string(a->name) + ": its mbarrier was invalidated before it completed");
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

// ---- tensor copies --------------------------------------------------------------------------------------------------

struct tensor_map {
    u64 magic, base;
    u32 type, rank, element, swizzle, fill; // swizzle: 0 none, 1 32 bytes, 2 64, 3 128
    u32 box[5];
    u64 dims[5], strides[4];
};
static_assert(sizeof(tensor_map) == 128, "as large as the driver's");
static const u64 TENSOR_MAGIC = 0x656d7574656e736full;
enum { TENSOR_F32 = 7, TENSOR_BF16 = 9, TENSOR_TYPES = 13 };

bool emu_tensor_map_encode(void *map, int type, uint32_t rank, void *base, const uint64_t *dims,
                           const uint64_t *strides, const uint32_t *box, const uint32_t *steps,
                           int interleave, int swizzle, int, int fill)
{
    static const u8 sizes[TENSOR_TYPES] = { 1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4 };
    tensor_map m = {};
    if (type < 0 || type >= TENSOR_TYPES || rank < 1 || rank > 5) return false;
    if (interleave || swizzle < 0 || swizzle > 3) return false;
    if (((uintptr_t)base | (uintptr_t)map) & 15 || (uintptr_t)map & 63) return false;
    m.magic = TENSOR_MAGIC;
    m.base = (u64)(uintptr_t)base;
    m.type = (u32)type;
    m.rank = rank;
    m.element = sizes[type];
    m.swizzle = (u32)swizzle;
    m.fill = (u32)fill;
    for (u32 i = 0; i < rank; i++) {
        if (!dims[i] || dims[i] > 1ull << 32 || !box[i] || box[i] > 256 || steps[i] != 1) return false;
        m.dims[i] = dims[i];
        m.box[i] = box[i];
        if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40)) return false;
        if (i + 1 < rank) m.strides[i] = strides[i];
    }
    u32 inner = box[0] * m.element;
    if (inner % 16 || (swizzle && inner > 16u << swizzle)) return false;
    memcpy(map, &m, sizeof m);
    return true;
}

// One row of the box: where it lies in shared memory and in the tensor, and which of its elements exist.
struct tensor_row {
    u32 offset, first, count;
    u64 address;
};

// A row that is written ends at a multiple of 16 bytes, behind the tensor's last element where that is none: an H200
// does so (2026-11-23); what is read ends with the tensor.
static std::vector<tensor_row> tensor_rows(const tensor_map &m, const i32 *at, bool write)
{
    std::vector<tensor_row> rows;
    u32 total = 1, inner = m.box[0] * m.element;
    for (u32 i = 1; i < m.rank; i++) total *= m.box[i];
    for (u32 r = 0; r < total; r++) {
        u64 address = m.base;
        bool inside = true;
        for (u32 i = 1, left = r; i < m.rank; i++) {
            i64 x = at[i] + (i64)(left % m.box[i]);
            left /= m.box[i];
            inside &= x >= 0 && x < (i64)m.dims[i];
            address += (u64)x * m.strides[i - 1];
        }
        i64 last = (i64)m.dims[0];
        if (write) last = (last * m.element + 15) / 16 * 16 / m.element;
        i64 from = std::max<i64>(0, -(i64)at[0]), to = std::min<i64>(m.box[0], last - at[0]);
        u32 count = inside && to > from ? (u32)(to - from) : 0;
        rows.push_back({ r * inner, (u32)from, count, address + (u64)((at[0] + from) * (i64)m.element) });
    }
    return rows;
}

static const tensor_map &map_of(const void *map, u32 rank, const char *name)
{
    const tensor_map *m = (const tensor_map *)map;
    require(90, name);
    check_access(thread_actor(name, 0), map, sizeof *m, READ, 64, false);
    if (m->magic != TENSOR_MAGIC)
        fail(EMU_LAUNCH_FAILED, "%s: no tensor map at %s", name, describe_address(map).c_str());
    if (m->rank != rank) fail(EMU_LAUNCH_FAILED, "%s: the tensor map has %u dimensions", name, m->rank);
    return *m;
}

// What an H200 answers with an illegal instruction (2026-11-23): the place along the first dimension is a multiple of 16
// bytes, and a box that is written does not begin before the tensor.
static void check_corner(const tensor_map &m, const i32 *at, bool write, const char *name)
{
    if ((i64)at[0] * m.element % 16 != 0)
        fail(EMU_LAUNCH_FAILED, "%s: x is %d, which is no multiple of 16 bytes", name, at[0]);
    for (u32 i = 0; i < m.rank && write; i++)
        if (at[i] < 0) fail(EMU_LAUNCH_FAILED, "%s: a box that begins at %d cannot be written", name, at[i]);
}

static u32 box_bytes(const tensor_map &m, const void *smem_at, const char *name)
{
    u32 bytes = m.element;
    for (u32 i = 0; i < m.rank; i++) bytes *= m.box[i];
    require_smem(smem_at, bytes, name);
    if ((uintptr_t)smem_at & 127)
        fail(EMU_MISALIGNED, "%s: %s needs 128-byte alignment", name, describe_address(smem_at).c_str());
    return bytes;
}

// Swizzles the byte at shared address p: 16-byte chunks change places within 32, 64 or 128 bytes.
static u32 swizzled(const tensor_map &m, u32 p)
{
    return m.swizzle ? p ^ (p >> 7 & ((1u << m.swizzle) - 1)) << 4 : p;
}

static std::vector<u8> read_box(const tensor_map &m, const i32 *at, u32 bytes, u32 start, const actor &who)
{
    std::vector<u8> box(bytes);
    u16 nan16 = 0x7fff;
    for (const tensor_row &r : tensor_rows(m, at, false)) {
        std::vector<u8> row(m.box[0] * m.element);
        for (u32 i = 0; m.fill && m.element == 2 && i < m.box[0]; i++) memcpy(&row[i * 2], &nan16, 2);
        if (m.fill && m.element != 2) std::fill(row.begin(), row.end(), 0xff);
        if (r.count) {
            check_access(who, (const void *)r.address, r.count * m.element, READ_ASYNC, 1, true);
            memcpy(&row[r.first * m.element], (const void *)r.address, r.count * m.element);
        }
        for (u32 i = 0; i < row.size(); i++) box[swizzled(m, start + r.offset + i) - start] = row[i];
    }
    return box;
}

extern "C" void emu_tma_load(void *dst, const void *map, u32 rank, const i32 *at, u64 *bar, u32 mask, const char *name)
{
    cta *c = self->block;
    const tensor_map &m = map_of(map, rank, name);
    u32 bytes = box_bytes(m, dst, name), start = emu_saddr(dst);
    check_corner(m, at, false, name);
    epoch id = new_agent(c);
    actor who = agent_actor(id, name);
    std::vector<u8> box = read_box(m, at, bytes, start, who);
    mask = mask ? mask & 0xffff : 1u << c->rank;
    for (u32 i = 0; i < GROUP_MAX; i++) {
        if (!(mask >> i & 1)) continue;
        if (i >= c->cluster->ctas.size())
            fail(EMU_LAUNCH_FAILED, "%s: block %u of a cluster of %zu", name, i, c->cluster->ctas.size());
        cta *to = c->cluster->ctas[i];
        u8 *p = to->smem + (start - SMEM_WINDOW), *b = to->smem + ((u8 *)bar - c->smem);
        if (to != c) resolve(start | (i + 1) << CLUSTER_SHIFT, bytes, name, &p);
        bar_for_async(to, b, name);
        touch_destination(who, to, p, bytes);
        async_op *a = launch(EMU_G2S, c, id, p, nullptr, bytes, name);
        a->captured_bytes = box;
        a->bar_cta = to;
        a->bar = b;
        to->in_flight++;
    }
}

extern "C" void emu_tma_store(const void *map, u32 rank, const i32 *at, const void *src, bool add, const char *name)
{
    thread *t = self;
    cta *c = t->block;
    const tensor_map &m = map_of(map, rank, name);
    u32 bytes = box_bytes(m, src, name), start = emu_saddr(src);
    check_corner(m, at, true, name);
    if (add && m.type != TENSOR_F32 && m.type != TENSOR_BF16) fail(EMU_LAUNCH_FAILED, "%s: of f32 and bf16", name);
    epoch read_id = new_agent(c), id = new_agent(c);
    check_proxy(t, &c->smem_range, (const u8 *)src, bytes, name);
    check_access(agent_actor(read_id, name), src, bytes, READ_ASYNC, 16, true);
    if (add) id = (id | ATOMIC) & ~(epoch)ASYNC;
    actor who = agent_actor(id, name);
    for (const tensor_row &r : tensor_rows(m, at, true)) {
        if (!r.count) continue;
        u8 *dst = (u8 *)(uintptr_t)r.address;
        u32 n = r.count * m.element;
        check_access(who, dst, n, add ? WRITE_ATOMIC : WRITE_ASYNC, 1, !add);
        u32 kind = !add ? EMU_S2G : m.type == TENSOR_F32 ? EMU_RED_F32 : EMU_RED_BF16;
        async_op *a = launch(kind, c, id, dst, nullptr, n, name);
        for (u32 i = 0; i < n; i++)
            a->captured_bytes.push_back(c->smem[swizzled(m, start + r.offset + r.first * m.element + i) - SMEM_WINDOW]);
        if (!add) memset(dst, 0xff, n);
        a->read_id = read_id;
        a->group = t->bulk_group;
        t->bulks.push_back(a);
        c->in_flight++;
    }
    t->bulk_ids.push_back({ t->bulk_group, id, read_id });
}

// ---- small floating-point formats -----------------------------------------------------------------------------------

// Exponent bits, mantissa bits, bias; fp8 saturates, E4M3 has no infinity.
struct small_format {
    int exponent, mantissa, bias;
    bool saturates, infinity;
};
static const small_format formats[] = {
    { 8, 7, 127, false, true }, { 5, 10, 15, false, true }, { 4, 3, 7, true, false }, { 5, 2, 15, true, true }
};

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

// One rounding of each half: to odd in double and then in f32, which loses nothing on the way to bf16. The product of
// two bf16 is exact in double.
extern "C" u32 emu_fma_bf16x2(u32 a, u32 b, u32 c)
{
    u32 out = 0;
    for (u32 shift = 0; shift < 32; shift += 16) {
        const double product = (double)emu_decode(EMU_BF16, a >> shift & 0xffffu)
                               * (double)emu_decode(EMU_BF16, b >> shift & 0xffffu);
        const double addend = (double)emu_decode(EMU_BF16, c >> shift & 0xffffu);
        double sum = product + addend;
        const double rest = __builtin_fabs(product) > __builtin_fabs(addend) ? addend - (sum - product)
                                                                             : product - (sum - addend);
        if (rest < 0 || rest > 0) {
            u64 word;
            memcpy(&word, &sum, 8);
            if ((rest < 0) != (sum < 0)) word--;
            word |= 1;
            memcpy(&sum, &word, 8);
        }
        f32 near = (f32)sum;
        if ((double)near != sum && sum == sum) {
            u32 word;
            memcpy(&word, &near, 4);
            if (__builtin_fabs((double)near) > __builtin_fabs(sum)) word--;
            word |= 1;
            memcpy(&near, &word, 4);
        }
        out |= emu_encode(EMU_BF16, near) << shift;
    }
    return out;
}

extern "C" f32 emu_decode(u32 type, u32 bits)
{
    const small_format &f = formats[type];
    u32 e = bits >> f.mantissa & ((1u << f.exponent) - 1), m = bits & ((1u << f.mantissa) - 1);
    u32 sign = bits >> (f.exponent + f.mantissa) & 1;
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
