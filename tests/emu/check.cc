// Clocks, shadow memory and reports: which accesses are ordered, which bytes were written, whose they are.
#include "engine.h"

#include <elf.h>
#include <link.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>

// ---- clocks ---------------------------------------------------------------------------------------------------------

void known_ops::add(u32 op)
{
    if (has(op)) return;
    u32 i = op - floor;
    if (i / 64 >= bits.size()) bits.resize(i / 64 + 1);
    bits[i / 64] |= 1ull << i % 64;
    size_t full = 0;
    while (full < bits.size() && bits[full] == ~0ull) full++;
    if (!full) return;
    bits.erase(bits.begin(), bits.begin() + (long)full);
    floor += (u32)full * 64;
}

known_ref known_with(const known_ref &a, u32 op)
{
    if (a && a->has(op)) return a;
    known_ref k(new known_ops);
    if (a) {
        k->floor = a->floor;
        k->bits = a->bits;
    }
    k->add(op);
    return k;
}

known_ref known_join(const known_ref &a, const known_ref &b)
{
    if (!a || a == b) return b;
    if (!b) return a;
    const known_ref &low = a->floor <= b->floor ? a : b, &high = a->floor <= b->floor ? b : a;
    known_ref k(new known_ops);
    k->floor = high->floor;
    k->bits = high->bits;
    for (size_t w = 0; w < low->bits.size(); w++)
        for (u64 set = low->bits[w]; set; set &= set - 1)
            k->add(low->floor + (u32)w * 64 + (u32)__builtin_ctzll(set));
    return k;
}

dense_ref dense_new(u32 cta, u32 op, u32 n)
{
    dense *d = (dense *)malloc(sizeof *d + n * sizeof(u32));
    d->refs = 0;
    d->cta = cta;
    d->op = op;
    d->n = n;
    memset(d->c, 0, n * sizeof(u32));
    return dense_ref(d);
}

static dense_ref dense_copy(const dense *d)
{
    dense_ref e = dense_new(d->cta, d->op, d->n);
    memcpy(e->c, d->c, d->n * sizeof(u32));
    return e;
}

static dense_ref dense_join(const dense_ref &a, const dense_ref &b)
{
    if (a == b) return a;
    dense_ref e = dense_copy(a.p);
    u32 *to = e->c;
    const u32 *from = b->c;
    for (u32 i = 0; i < e->n; i++) to[i] = to[i] > from[i] ? to[i] : from[i];
    return e;
}

const dense *clock_set::find(u32 cta) const
{
    size_t lo = 0, hi = ctas.size();
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (ctas[mid]->cta < cta) lo = mid + 1;
        else hi = mid;
    }
    return lo < ctas.size() && ctas[lo]->cta == cta ? ctas[lo].p : nullptr;
}

// A barrier's or an mbarrier's waiters mostly join the same two sets: the last few joins are kept.
struct joined {
    clock_ref a, b, sum;
};
static joined recent_joins[8];
static u32 next_join;

clock_ref clock_join(const clock_ref &a, const clock_ref &b)
{
    if (!a || a == b) return b;
    if (!b) return a;
    for (const joined &j : recent_joins)
        if (j.a == a && j.b == b) return j.sum;
    clock_ref s(new clock_set);
    s->known = known_join(a->known, b->known);
    auto ended = [&](const dense_ref &d) { return s->known && s->known->has(d->op); };
    size_t i = 0, j = 0;
    while (i < a->ctas.size() || j < b->ctas.size()) {
        const dense_ref *x = i < a->ctas.size() ? &a->ctas[i] : nullptr, *y = j < b->ctas.size() ? &b->ctas[j] : nullptr;
        if (x && y && (*x)->cta == (*y)->cta) {
            if (!ended(*x)) s->ctas.push_back(dense_join(*x, *y));
            i++;
            j++;
        } else if (x && (!y || (*x)->cta < (*y)->cta)) {
            if (!ended(*x)) s->ctas.push_back(*x);
            i++;
        } else {
            if (!ended(*y)) s->ctas.push_back(*y);
            j++;
        }
    }
    recent_joins[next_join++ % 8] = { a, b, s };
    return s;
}

clock_ref clock_raise(const clock_ref &base, u32 cta, u32 op, u32 n, const raise *list, size_t count)
{
    clock_ref s(new clock_set);
    if (base) {
        s->known = base->known;
        s->ctas = base->ctas;
    }
    auto at = std::lower_bound(s->ctas.begin(), s->ctas.end(), cta,
                               [](const dense_ref &d, u32 c) { return d->cta < c; });
    if (at == s->ctas.end() || (*at)->cta != cta) at = s->ctas.insert(at, dense_new(cta, op, n));
    else *at = dense_copy(at->p);
    for (size_t i = 0; i < count; i++) (*at)->c[list[i].who] = std::max((*at)->c[list[i].who], list[i].clock);
    return s;
}

clock_ref thread_clock(const thread *t)
{
    const cta *c = t->block;
    raise own[2] = { { t->tid, t->clock }, { c->n + t->tid, t->copy_known } };
    return clock_raise(t->base, c->serial, c->g->op->serial, c->width(), own, 2);
}

clock_ref release_clock(thread *t)
{
    clock_ref c = thread_clock(t);
    t->clock++;
    return c;
}

void acquire(thread *t, const clock_ref &c)
{
    if (c) t->base = clock_join(t->base, c);
}

// ---- who is who -----------------------------------------------------------------------------------------------------

struct cta_record {
    u32 op, n, id[3];
    const char *kernel;
};
static std::vector<cta_record> records(1);

u32 next_cta_serial()
{
    records.push_back({});
    return (u32)records.size() - 1;
}

// Names outlive the code they come from.
static const char *kept_name(const char *name)
{
    static std::map<std::string, char> names;
    return names.emplace(name, 0).first->first.c_str();
}

void register_cta(u32 serial, cta *c, emu_op *op)
{
    static const char *const kinds[] = { "kernel", "copy", "fill", "host function", "empty operation" };
    cta_record &r = records[serial];
    r.op = op->serial;
    r.n = c ? c->n : 0;
    for (int i = 0; i < 3; i++) r.id[i] = c ? c->id[i] : 0;
    r.kernel = kept_name(op->desc.kind == EMU_OP_KERNEL ? op->desc.kernel->name : kinds[op->desc.kind]);
}

static std::string format(const char *f, ...) __attribute__((format(printf, 1, 2)));
static std::string format(const char *f, ...)
{
    char text[512];
    va_list list;
    va_start(list, f);
    vsnprintf(text, sizeof text, f, list);
    va_end(list);
    return text;
}

std::string describe_epoch(epoch e)
{
    const cta_record &r = records[epoch_cta(e)];
    u32 who = epoch_who(e);
    if (!r.n) return format("a %s (operation %u)", r.kernel, r.op);
    std::string at = format("of kernel %s (operation %u), block (%u,%u,%u)", r.kernel, r.op, r.id[0], r.id[1], r.id[2]);
    static const char *const hows[] = { "", " (atomic)", " (asynchronous)", " (atomic)" };
    if (who < r.n) return format("thread %u ", who) + at + hows[e & 3];
    if (who < 2 * r.n) return format("cp_async of thread %u ", who - r.n) + at;
    return "an asynchronous copy or product " + at;
}

std::string describe_thread(const thread *t)
{
    const cta *c = t->block;
    return format("kernel %s: block (%u,%u,%u) thread %u", c->g->op->desc.kernel->name, c->id[0], c->id[1], c->id[2],
                  t->tid);
}

static std::string describe_in(const memory_range *m, const void *p)
{
    size_t at = (size_t)((const u8 *)p - m->base);
    switch (m->kind) {
    case memory_range::SMEM: return format("smem+%zu (of %zu)", at, m->bytes);
    case memory_range::HOST: return format("host allocation %u+%zu (of %zu bytes)", m->number, at, m->bytes);
    case memory_range::FREED: return format("freed allocation %u+%zu (of %zu bytes)", m->number, at, m->bytes);
    default: return format("allocation %u+%zu (of %zu bytes)", m->number, at, m->bytes);
    }
}

std::string describe_address(const void *p)
{
    if (self) {
        cta *c = self->block;
        for (cta *peer : c->cluster->ctas)
            if (peer != c && (size_t)((const u8 *)p - peer->smem) < peer->smem_bytes)
                return format("block %u of the cluster: ", peer->rank) + describe_in(&peer->smem_range, p);
        if ((size_t)((const u8 *)p - c->smem) < SMEM_MAX) return describe_in(&c->smem_range, p);
    }
    auto i = running->memory.upper_bound((u8 *)p);
    if (i != running->memory.begin()) {
        const memory_range &before = std::prev(i)->second;
        size_t past = (size_t)((const u8 *)p - before.base);
        if (past < before.bytes + 4096) return describe_in(&before, p);
    }
    if (i != running->memory.end() && (size_t)(i->second.base - (const u8 *)p) < 4096)
        return format("%zu bytes in front of allocation %u", (size_t)(i->second.base - (const u8 *)p), i->second.number);
    return format("%p, no allocation of the device", p);
}

// ---- reports --------------------------------------------------------------------------------------------------------

static int report_count;
static std::string last_report;

int emu_reports() { return report_count; }
const char *emu_last_report() { return last_report.c_str(); }

static void write_report(const std::string &text)
{
    report_count++;
    last_report = "emu: " + text + format("\n     repeat with MOE_EMU_SEED=%llu\n", (unsigned long long)running->seed);
    fputs(last_report.c_str(), stderr);
    const char *name = getenv("MOE_EMU_REPORT");
    FILE *file = name && *name ? fopen(name, "a") : nullptr;
    if (!file) return;
    fputs(last_report.c_str(), file);
    fclose(file);
}

void report_op(emu_op *op, int status, const std::string &text)
{
    if (op->status != EMU_OK) return;
    op->status = status;
    write_report(text);
}

void fail(int status, const char *f, ...)
{
    char text[2048];
    va_list list;
    va_start(list, f);
    vsnprintf(text, sizeof text, f, list);
    va_end(list);
    report_op(self->block->g->op, status, describe_thread(self) + ": " + text);
    leave_fiber();
}

void require(int capability, const char *name)
{
    if (running->cfg.capability < capability)
        fail(EMU_LAUNCH_FAILED, "%s needs compute capability %d.%d, this device has %d.%d", name, capability / 10,
             capability % 10, running->cfg.capability / 10, running->cfg.capability % 10);
}

// ---- cells ----------------------------------------------------------------------------------------------------------

static std::vector<cell> sub_cells(4);
static std::vector<u32> sub_free;

static u32 split(const cell &x)
{
    u32 at;
    if (sub_free.empty()) {
        at = (u32)sub_cells.size();
        sub_cells.resize(at + 4);
    } else {
        at = sub_free.back();
        sub_free.pop_back();
    }
    for (u32 i = 0; i < 4; i++) {
        sub_cells[at + i] = x;
        sub_cells[at + i].sub = 0;
    }
    return at;
}

bool knows(const actor &a, epoch e)
{
    u32 c = epoch_cta(e), who = epoch_who(e), k = epoch_clock(e);
    if (c == epoch_cta(a.id)) {
        if (!a.owner || who == a.owner->tid) return true;
        if (who == a.owner->block->n + a.owner->tid && k <= a.owner->copy_known) return true;
    }
    if (!a.base) return false;
    const dense *d = a.base->find(c);
    if (d && who < d->n && d->c[who] >= k) return true;
    return a.base->known && a.base->known->has(records[c].op);
}

actor thread_actor(const char *name, u32 how)
{
    return { make_epoch(self->block->serial, self->tid, self->clock, how), self->base.p, self, self->block->g->op, name };
}

static const char *access_name(access_kind kind)
{
    static const char *const names[] = { "read", "write", "atomic read", "atomic update", "asynchronous read",
                                         "asynchronous write" };
    return names[kind];
}

[[noreturn]] static void refuse(const actor &a, int status, const std::string &text)
{
    std::string who = a.owner ? describe_thread(a.owner) : describe_epoch(a.id);
    report_op((emu_op *)a.op, status, who + ": " + (a.name ? std::string(a.name) + ": " : std::string()) + text);
    if (self) leave_fiber();
    throw status;                           // a copy or fill: the scheduler catches it
}

[[noreturn]] static void race(const actor &a, access_kind kind, epoch other, bool other_wrote, const u8 *p)
{
    refuse(a, EMU_LAUNCH_FAILED, std::string("race: ") + access_name(kind) + " of " + describe_address(p) +
           ", not ordered after the " + (other_wrote ? "write" : "read") + " by " + describe_epoch(other));
}

static void remember(const actor &a, cell &x, epoch id)
{
    epoch *free_slot = nullptr, *same_warp = nullptr;
    for (epoch &r : x.r) {
        if (!r) {
            if (!free_slot) free_slot = &r;
        } else if (r >> 23 == id >> 23 && (r & 3) == (id & 3)) {
            r = id;
            return;
        } else if (r >> 28 == id >> 28) {
            same_warp = &r;
        }
    }
    if (!free_slot)
        for (epoch &r : x.r)
            if (knows(a, r)) {
                free_slot = &r;
                break;
            }
    if (!free_slot) free_slot = same_warp ? same_warp : &x.r[running->random(3)];
    *free_slot = id;
}

static void touch(const actor &a, cell &x, const u8 *p, access_kind kind)
{
    const bool writes = kind == WRITE || kind == WRITE_ASYNC;
    if (writes ? x.w == a.id && !x.r[0] && !x.r[1] && !x.r[2] : x.r[0] == a.id) return;
    if (x.w && x.w != a.id && !knows(a, x.w)) race(a, kind, x.w, true, p);
    for (epoch r : x.r) {
        if (!r) continue;
        bool conflicts = writes ? true : kind == WRITE_ATOMIC ? !(r & ATOMIC) : kind == READ_ATOMIC ? false
                                                                                              : (r & 3) == ATOMIC;
        if (conflicts && !knows(a, r)) race(a, kind, r, (r & 3) == ATOMIC, p);
    }
    if (writes) {
        x.w = a.id;
        x.r[0] = x.r[1] = x.r[2] = 0;
    } else {
        remember(a, x, a.id);
    }
}

// One word's bytes [first, first + n).
static void touch_word(const actor &a, memory_range *m, size_t word, u32 first, u32 n, access_kind kind, bool lax)
{
    cell &x = m->cells[word];
    const u8 *p = m->base + word * 4;
    const u8 mask = (u8)(((1u << n) - 1) << first);
    const bool writes = kind == WRITE || kind == WRITE_ATOMIC || kind == WRITE_ASYNC;
    if (x.mbar && kind != READ_ATOMIC && kind != WRITE_ATOMIC)
        refuse(a, EMU_LAUNCH_FAILED, std::string(access_name(kind)) + " of an mbarrier at " + describe_address(p));
    if (!lax && (x.written & mask) != mask && (!writes || kind == WRITE_ATOMIC) && m->kind != memory_range::HOST)
        refuse(a, EMU_LAUNCH_FAILED, std::string(access_name(kind)) + " of " + describe_address(p + first) +
               ", which has never been written");
    if (writes) x.written |= mask;
    if (n == 4 && !x.sub) {
        touch(a, x, p, kind);
        return;
    }
    if (!x.sub) x.sub = split(x);
    for (u32 i = first; i < first + n; i++) touch(a, sub_cells[x.sub + i], p + i, kind);
    if (n < 4 || (kind != WRITE && kind != WRITE_ASYNC)) return;
    cell &low = sub_cells[x.sub];
    x.w = low.w;
    x.r[0] = x.r[1] = x.r[2] = 0;
    sub_free.push_back(x.sub);
    x.sub = 0;
}

void check_range(const actor &a, memory_range *m, const u8 *p, size_t bytes, access_kind kind, bool lax)
{
    size_t at = (size_t)(p - m->base), end = at + bytes;
    for (; at < end;) {
        u32 first = (u32)(at & 3), n = (u32)std::min<size_t>(4 - first, end - at);
        touch_word(a, m, at / 4, first, n, kind, lax);
        at += n;
    }
}

void set_written(memory_range *m, const u8 *p, size_t bytes, bool on)
{
    for (size_t at = (size_t)(p - m->base), end = at + bytes; at < end; at++) {
        u8 bit = (u8)(1u << (at & 3));
        if (on) m->cells[at / 4].written |= bit;
        else m->cells[at / 4].written &= (u8)~bit;
    }
}

// ---- ranges ---------------------------------------------------------------------------------------------------------

memory_range *find_range(emu_device *dev, const void *p, size_t bytes, bool *partly)
{
    const u8 *q = (const u8 *)p;
    *partly = false;
    for (memory_range *m : dev->recent)
        if (m && (size_t)(q - m->base) < m->bytes && bytes <= m->bytes - (size_t)(q - m->base)) return m;
    auto i = dev->memory.upper_bound((u8 *)q);
    if (i != dev->memory.begin()) {
        memory_range *m = &std::prev(i)->second;
        size_t at = (size_t)(q - m->base);
        if (at < m->bytes) {
            if (bytes > m->bytes - at) {
                *partly = true;
                return m;
            }
            if (m->kind == memory_range::FREED) return m;
            dev->recent[3] = dev->recent[2];
            dev->recent[2] = dev->recent[1];
            dev->recent[1] = dev->recent[0];
            dev->recent[0] = m;
            return m;
        }
    }
    *partly = i != dev->memory.end() && (size_t)(i->second.base - q) < bytes;
    return *partly ? &i->second : nullptr;
}

// Constants of a loaded object that hold still: reads of them are the compiler's.
struct object_search {
    uintptr_t at;
    bool found;
    uintptr_t from, to;
};

static int search_object(dl_phdr_info *info, size_t, void *data)
{
    object_search *s = (object_search *)data;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) &h = info->dlpi_phdr[i];
        uintptr_t from = info->dlpi_addr + h.p_vaddr;
        if (h.p_type != PT_LOAD || s->at < from || s->at >= from + h.p_memsz) continue;
        s->found = true;
        s->from = from;
        s->to = from + h.p_memsz;
        return 1;
    }
    return 0;
}

static bool is_constant(const void *p)
{
    static uintptr_t from, to;
    if ((uintptr_t)p >= from && (uintptr_t)p < to) return true;
    object_search s = { (uintptr_t)p, false, 0, 0 };
    dl_iterate_phdr(search_object, &s);
    if (!s.found) return false;
    from = s.from;
    to = s.to;
    return true;
}

static void check_other(const actor &a, const void *p, size_t bytes, access_kind kind, bool lax)
{
    const char *what = access_name(kind);
    const cta *c = self ? self->block : nullptr;
    if (c && (size_t)((const u8 *)p - c->g->op->args) < c->g->op->desc.kernel->args_bytes) {
        if (kind == READ) return;
        refuse(a, EMU_ILLEGAL_ADDRESS, std::string(what) + " of the kernel's arguments");
    }
    bool partly;
    memory_range *m = find_range(running, p, bytes, &partly);
    if (m && !partly && m->kind != memory_range::FREED) {
        check_range(a, m, (const u8 *)p, bytes, kind, lax);
        return;
    }
    if (m && m->kind == memory_range::FREED)
        refuse(a, EMU_ILLEGAL_ADDRESS, std::string(what) + format(" of %zu bytes of ", bytes) + describe_address(p));
    if (c && !m && kind == READ && is_constant(p)) return;
    refuse(a, EMU_ILLEGAL_ADDRESS, std::string(what) + format(" of %zu bytes out of bounds: ", bytes) + describe_address(p));
}

void check_access(const actor &a, const void *p, size_t bytes, access_kind kind, u32 align, bool lax)
{
    if ((uintptr_t)p & (align - 1))
        refuse(a, EMU_MISALIGNED, std::string(access_name(kind)) + format(" needs %u-byte alignment: ", align) +
               describe_address(p));
    if (self) {
        memory_range *m = &self->block->smem_range;
        size_t at = (size_t)((const u8 *)p - m->base);
        if (at < m->bytes && bytes <= m->bytes - at) {
            check_range(a, m, (const u8 *)p, bytes, kind, lax);
            return;
        }
        if ((size_t)((const u8 *)p - self->stack) < STACK_BYTES) return;
    }
    check_other(a, p, bytes, kind, lax);
}

// Bytes that a copy moves stay what they were, written or not.
void copy_written(emu_device *dev, const actor &a, u8 *dst, const u8 *src, size_t bytes)
{
    auto find = [&](const u8 *p) -> memory_range * {
        if (a.owner)
            for (cta *c : a.owner->block->cluster->ctas)
                if ((size_t)(p - c->smem) < c->smem_bytes) return &c->smem_range;
        bool partly;
        memory_range *m = find_range(dev, p, bytes, &partly);
        return m && !partly && m->kind == memory_range::DEVICE ? m : nullptr;
    };
    memory_range *from = find(src), *to = find(dst);
    if (!to) return;
    if (!from) {
        set_written(to, dst, bytes, true);
        return;
    }
    for (size_t i = 0; i < bytes; i++) {
        size_t s = (size_t)(src - from->base) + i;
        set_written(to, dst + i, 1, from->cells[s / 4].written >> (s & 3) & 1);
    }
}

void check_constant(const actor &a, const void *p, size_t bytes)
{
    bool partly;
    memory_range *m = find_range(running, p, bytes, &partly);
    if (!m || partly || m->kind != memory_range::DEVICE)
        refuse(a, EMU_ILLEGAL_ADDRESS, "read of " + describe_address(p) + ", which is no global memory");
    for (size_t at = (size_t)((const u8 *)p - m->base) / 4, n = bytes / 4; n > 0; n--, at++) {
        const cell &x = m->cells[at];
        epoch w = x.sub ? sub_cells[x.sub].w : x.w;
        if (w && records[epoch_cta(w)].op == a.op->serial)
            refuse(a, EMU_LAUNCH_FAILED, "reads " + describe_address(m->base + at * 4) + " as constant; it was written by " +
                   describe_epoch(w) + " of the same launch");
    }
}

// The asynchronous proxy sees what ordinary stores wrote only behind a fence, of the writer or of the reader.
void check_proxy(const thread *t, memory_range *m, const u8 *p, size_t bytes, const char *name)
{
    actor a = thread_actor(name, 0);
    actor fenced = a;
    fenced.base = t->proxy_base.p;
    size_t at = (size_t)(p - m->base) / 4, end = ((size_t)(p - m->base) + bytes + 3) / 4;
    for (; at < end; at++) {
        const cell &x = m->cells[at];
        for (u32 i = 0; i < (x.sub ? 4u : 1u); i++) {
            epoch w = x.sub ? sub_cells[x.sub + i].w : x.w;
            if (!w || (w & 3) == ASYNC || epoch_who(w) >= records[epoch_cta(w)].n) {
                // cp.async belongs to the generic proxy as well
                if (!w || epoch_who(w) < records[epoch_cta(w)].n || epoch_who(w) >= 2 * records[epoch_cta(w)].n) continue;
            }
            if (epoch_cta(w) != t->block->serial) continue;
            if (epoch_who(w) == t->tid ? t->proxy_base && epoch_clock(w) < t->proxy_clock : t->proxy_base && knows(fenced, w))
                continue;
            u32 who = epoch_who(w) < t->block->n ? epoch_who(w) : epoch_who(w) - t->block->n;
            const thread *writer = t->block->threads[who];
            if (epoch_who(w) < t->block->n && epoch_clock(w) < writer->proxy_clock) continue;
            if (epoch_who(w) >= t->block->n && writer->proxy_base && epoch_clock(w) <= writer->copy_known) continue;
            fail(EMU_LAUNCH_FAILED, "%s: reads %s through the asynchronous proxy; the write by %s was not followed by "
                 "fence_proxy_async()", name, describe_address(m->base + at * 4).c_str(), describe_epoch(w).c_str());
        }
    }
}

// ---- callbacks of the compiler --------------------------------------------------------------------------------------

static inline __attribute__((always_inline)) void plain(const void *p, size_t bytes, access_kind kind)
{
    if (!self) return;
    if ((size_t)((const u8 *)p - self->stack) < STACK_BYTES) return;
    check_access(thread_actor(nullptr, 0), p, bytes, kind, 1, false);
}

extern "C" {

#define CALLBACKS(n)                                                                                                   \
    void __tsan_read##n(void *p) { plain(p, n, READ); }                                                                \
    void __tsan_write##n(void *p) { plain(p, n, WRITE); }                                                              \
    void __tsan_unaligned_read##n(void *p) { plain(p, n, READ); }                                                      \
    void __tsan_unaligned_write##n(void *p) { plain(p, n, WRITE); }                                                    \
    void __tsan_volatile_read##n(void *p) { plain(p, n, READ); }                                                       \
    void __tsan_volatile_write##n(void *p) { plain(p, n, WRITE); }
CALLBACKS(1)
CALLBACKS(2)
CALLBACKS(4)
CALLBACKS(8)
CALLBACKS(16)

void __tsan_read_range(void *p, size_t bytes) { plain(p, bytes, READ); }
void __tsan_write_range(void *p, size_t bytes) { plain(p, bytes, WRITE); }
void __tsan_func_entry(void *) {}
void __tsan_func_exit(void *) {}
void __tsan_init() {}
void __tsan_vptr_update(void **, void *) {}
void __tsan_vptr_read(void **) {}

void *__tsan_memcpy(void *dst, const void *src, size_t bytes)
{
    plain(src, bytes, READ);
    plain(dst, bytes, WRITE);
    return memcpy(dst, src, bytes);
}

void *__tsan_memmove(void *dst, const void *src, size_t bytes)
{
    plain(src, bytes, READ);
    plain(dst, bytes, WRITE);
    return memmove(dst, src, bytes);
}

void *__tsan_memset(void *dst, int value, size_t bytes)
{
    plain(dst, bytes, WRITE);
    return memset(dst, value, bytes);
}

// -fsanitize=alignment: the compiler may take a 16-byte access apart, which hides it from the callbacks above.
struct type_mismatch {
    const char *file;
    u32 line, column;
    const void *type;
    u8 log_align, kind;
};

void __ubsan_handle_type_mismatch_v1(const type_mismatch *where, const void *p)
{
    if (!self) return;
    fail(EMU_MISALIGNED, "%s:%u: access of %s needs %u-byte alignment", where->file, where->line,
         describe_address(p).c_str(), 1u << where->log_align);
}
}
