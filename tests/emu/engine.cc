// Memory, operations and the scheduler of the emulated device.
#include "engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <set>

thread *self;
emu_device *running;

static std::recursive_mutex lock;
static u32 last_serial;
static void *scheduler_sp;
typedef std::lock_guard<std::recursive_mutex> guard;

// ---- fibers ---------------------------------------------------------------------------------------------------------

extern "C" void emu_switch(void **save, void *to);
#if defined(__x86_64__)
asm(R"(.text
.globl emu_switch
.hidden emu_switch
.type emu_switch, @function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
enum { SAVED_WORDS = 6, ENTRY_WORD = 6 };
#elif defined(__aarch64__)
asm(R"(.text
.globl emu_switch
.hidden emu_switch
.type emu_switch, %function
emu_switch:
    stp x29, x30, [sp, #-160]!
    stp x19, x20, [sp, #16]
    stp x21, x22, [sp, #32]
    stp x23, x24, [sp, #48]
    stp x25, x26, [sp, #64]
    stp x27, x28, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #16]
    ldp x21, x22, [sp, #32]
    ldp x23, x24, [sp, #48]
    ldp x25, x26, [sp, #64]
    ldp x27, x28, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    ldp x29, x30, [sp], #160
    ret
)");
enum { SAVED_WORDS = 20, ENTRY_WORD = 1 };
#else
#error "the emulated device switches fibers on x86-64 and aarch64"
#endif

static const u64 CANARY = 0x5ca1ab1e0ddba115ull;
static std::vector<thread *> spare_threads;

static thread *new_thread()
{
    static u8 *next, *end;
    if (spare_threads.empty()) {
        if (next == end) {
            size_t bytes = (size_t)STACK_BYTES * 256;
            int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
            next = (u8 *)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
            if (next == MAP_FAILED) abort();
            end = next + bytes;
        }
        thread *t = new thread();
        t->stack = next;
        next += STACK_BYTES;
        return t;
    }
    thread *t = spare_threads.back();
    spare_threads.pop_back();
    return t;
}

static void free_thread(thread *t)
{
    u8 *stack = t->stack;
    *t = thread();
    t->stack = stack;
    spare_threads.push_back(t);
}

void leave_fiber()
{
    emu_switch(&self->sp, scheduler_sp);
    abort();
}

static void thread_ends()
{
    self->done = true;
    self->warp->ready &= ~(1u << (self->tid & 31));
    self->block->left--;
    if (self->block->cluster->ctas.size() > 1) cluster_thread_ends(self);
}

static void fiber_main()
{
    emu_op *op = self->block->g->op;
    op->desc.kernel->run(op->args);
    thread_ends();
    leave_fiber();
}

static void prepare_fiber(thread *t)
{
    *(u64 *)t->stack = CANARY;
    u64 *top = (u64 *)(t->stack + STACK_BYTES) - 8;
    u64 *sp = top - SAVED_WORDS - 2;
    memset(sp, 0, (SAVED_WORDS + 2) * sizeof *sp);
    sp[ENTRY_WORD] = (u64)fiber_main;
    t->sp = sp;
}

void yield_ready()
{
    emu_switch(&self->sp, scheduler_sp);
}

void yield_blocked(const char *why, u64 detail)
{
    self->ready = false;
    self->why = why;
    self->why_detail = detail;
    self->warp->ready &= ~(1u << (self->tid & 31));
    emu_switch(&self->sp, scheduler_sp);
}

void wake(thread *t)
{
    if (t->ready || t->done) return;
    t->ready = true;
    warp_state *w = t->warp;
    w->ready |= 1u << (t->tid & 31);
    if (w->index != (size_t)-1) return;
    w->index = running->ready.size();
    running->ready.push_back(w);
}

void sometimes_yield()
{
    if (running->random(4) == 0) yield_ready();
}

static void drop_ready(emu_device *dev, warp_state *w)
{
    if (w->index == (size_t)-1) return;
    dev->ready[w->index] = dev->ready.back();
    dev->ready[w->index]->index = w->index;
    dev->ready.pop_back();
    w->index = (size_t)-1;
}

// ---- CTAs -----------------------------------------------------------------------------------------------------------

struct smem_room {
    u8 *bytes;
    cell *cells;
};
static std::vector<smem_room> spare_smem;

static smem_room new_smem(u32 bytes)
{
    smem_room r;
    if (spare_smem.empty()) {
        r.bytes = (u8 *)aligned_alloc(1024, SMEM_MAX);
        r.cells = (cell *)malloc(SMEM_MAX / 4 * sizeof(cell));
    } else {
        r = spare_smem.back();
        spare_smem.pop_back();
    }
    memset(r.bytes, 0xff, bytes);
    memset((void *)r.cells, 0, (bytes + 3) / 4 * sizeof(cell));
    return r;
}

static u32 launch_registers(const emu_kernel *k)
{
    u32 threads = (k->threads + 127) / 128 * 128, ctas = std::max(1u, k->min_ctas);
    return std::min(65536 / (threads * ctas) / 8 * 8, 248u);
}

static void start_threads(emu_device *dev, cta *c)
{
    c->threads.resize(c->n);
    c->warps.resize((c->n + 31) / 32);
    for (u32 i = 0; i < c->warps.size(); i++) {
        warp_state &w = c->warps[i];
        w = warp_state();
        w.block = c;
        w.first = i * 32;
        w.lanes = std::min(32u, c->n - w.first);
        w.leader = dev->random(w.lanes);
        w.regs = launch_registers(c->g->op->desc.kernel);
        w.index = (size_t)-1;
    }
    for (u32 i = 0; i < c->n; i++) {
        thread *t = c->threads[i] = new_thread();
        t->block = c;
        t->warp = &c->warps[i / 32];
        t->tid = i;
        t->clock = 1;
        t->base = c->g->op->start_clock;
        prepare_fiber(t);
        wake(t);
    }
}

static cta *new_cta(emu_device *dev, grid *g, group *cluster, u32 linear, u32 sm)
{
    const emu_op_desc &d = g->op->desc;
    cta *c = new cta();
    c->g = g;
    c->cluster = cluster;
    c->rank = (u32)cluster->ctas.size();
    c->id[0] = linear % d.grid[0];
    c->id[1] = linear / d.grid[0] % d.grid[1];
    c->id[2] = linear / d.grid[0] / d.grid[1];
    c->sm = sm;
    c->n = c->left = d.block[0] * d.block[1] * d.block[2];
    c->smem_bytes = d.smem_bytes;
    smem_room r = new_smem(c->smem_bytes);
    c->smem = r.bytes;
    c->smem_range = { r.bytes, c->smem_bytes, memory_range::SMEM, r.cells, 0, c };
    c->serial = next_cta_serial();
    register_cta(c->serial, c, g->op);
    cluster->ctas.push_back(c);
    sm_state &s = dev->sms[sm];
    s.ctas++;
    s.threads += c->n;
    s.smem += g->reserve;
    return c;
}

static void free_cta(cta *c)
{
    for (thread *t : c->threads)
        if (t) free_thread(t);
    for (warp_state &w : c->warps) end_matrix(&w);
    spare_smem.push_back({ c->smem, c->smem_range.cells });
    delete c;
}

static void leave_sm(emu_device *dev, cta *c)
{
    sm_state &s = dev->sms[c->sm];
    s.ctas--;
    s.threads -= c->n;
    s.smem -= c->g->reserve;
}

static bool has_room(const emu_device *dev, const sm_state &s, const grid *g, u32 threads)
{
    const emu_device_config &f = dev->cfg;
    return s.ctas < std::min(f.ctas_per_sm, dev->soft_ctas) && s.threads + threads <= f.threads_per_sm &&
           s.smem + g->reserve <= f.smem_per_sm;
}

// Starts one cluster if there is room for all of its CTAs at once.
static bool place_cluster(emu_device *dev, grid *g)
{
    const emu_op_desc &d = g->op->desc;
    u32 threads = d.block[0] * d.block[1] * d.block[2], sms = (u32)dev->sms.size(), at[GROUP_MAX];
    if (d.sm_limit) sms = std::min(sms, d.sm_limit);
    std::vector<sm_state> trial(dev->sms.begin(), dev->sms.begin() + sms);
    u32 from = dev->random(sms);
    for (u32 i = 0; i < g->cluster_size; i++) {
        u32 k = 0;
        while (k < sms && !has_room(dev, trial[(from + k) % sms], g, threads)) k++;
        if (k == sms) return false;
        at[i] = (from + k) % sms;
        trial[at[i]].ctas++;
        trial[at[i]].threads += threads;
        trial[at[i]].smem += g->reserve;
        from = dev->random(sms);
    }
    u32 first = g->order.back();
    g->order.pop_back();
    group *q = new group();
    q->left = g->cluster_size;
    g->groups.push_back(q);
    // A cluster's CTAs are neighbours in x; clusters along y and z are one CTA thick.
    u32 per_row = d.grid[0] / g->cluster_size, row = first / per_row, x = first % per_row * g->cluster_size;
    for (u32 i = 0; i < g->cluster_size; i++) new_cta(dev, g, q, row * d.grid[0] + x + i, at[i]);
    for (cta *c : q->ctas) start_threads(dev, c);
    return true;
}

static bool place(emu_device *dev)
{
    std::vector<grid *> open;
    for (emu_op *op : dev->queue)
        if (op->state == emu_op::RUNNING && op->g && !op->g->order.empty()) open.push_back(op->g.get());
    bool any = false;
    while (!open.empty()) {
        u32 i = dev->random((u32)open.size());
        if (place_cluster(dev, open[i])) any = true;
        else open.erase(open.begin() + i);
        if (i < open.size() && open[i]->order.empty()) open.erase(open.begin() + i);
    }
    return any;
}

// ---- operations -----------------------------------------------------------------------------------------------------

static void release_op(emu_op *op)
{
    if (--op->refs) return;
    for (edge &e : op->preds) release_op(e.from);
    delete op;
}

static void drop_preds(emu_op *op)
{
    for (edge &e : op->preds) release_op(e.from);
    op->preds.clear();
}

static clock_ref clock_of(const known_ref &k)
{
    clock_ref c(new clock_set);
    c->known = k;
    return c;
}

// What an operation behind a full edge to `op` knows.
static known_ref known_after(const emu_op *op)
{
    return known_with(known_join(op->known_end, op->known_waited), op->serial);
}

// What a kernel knows that starts before this one has ended: what this one knew when all its CTAs let it start.
static known_ref known_early(const emu_op *op)
{
    const u32 *grid = op->desc.grid;
    bool all = op->launched_waited == grid[0] * grid[1] * grid[2] && op->known_waited;
    return all ? known_join(op->known_start, op->known_waited) : op->known_start;
}

static bool pred_allows(const edge &e)
{
    const emu_op *f = e.from;
    if (f->state == emu_op::ENDED) return true;
    return e.programmatic && f->state == emu_op::RUNNING && f->g && f->g->launched == f->g->total;
}

static bool can_start(const emu_op *op)
{
    if (op->state != emu_op::QUEUED) return false;
    for (const edge &e : op->preds)
        if (!pred_allows(e)) return false;
    return true;
}

static bool preds_ended(const emu_op *op)
{
    for (const edge &e : op->preds)
        if (e.from->state != emu_op::ENDED) return false;
    return true;
}

// Whoever waits in grid_wait() goes on; what it then knows.
static void end_waiting(emu_op *op)
{
    if (!op->known_waited) {
        known_ref k = op->known_start;
        for (const edge &e : op->preds)
            k = known_with(known_join(k, e.programmatic ? e.from->known_end : known_after(e.from)), e.from->serial);
        op->known_waited = k;
        op->wait_clock = clock_of(k);
    }
    for (thread *t : op->waiting) wake(t);
    op->waiting.clear();
}

static void free_grid(emu_op *op)
{
    if (!op->g) return;
    for (group *q : op->g->groups) {
        for (cta *c : q->ctas) free_cta(c);
        delete q;
    }
    op->g.reset();
}

static void try_end(emu_device *dev, emu_op *op)
{
    if (!preds_ended(op)) return;
    end_waiting(op);
    if (op->g && op->g->ended < op->g->total) return;
    op->state = emu_op::ENDED;
    op->known_end = known_with(op->any_waited ? known_join(op->known_start, op->known_waited) : op->known_start,
                               op->serial);
    free_grid(op);
    drop_preds(op);
    dev->queue.erase(std::find(dev->queue.begin(), dev->queue.end(), op));
    std::vector<emu_op *> rest = dev->queue;
    for (emu_op *o : rest)
        if (o->state == emu_op::RUNNING)
            for (const edge &e : o->preds)
                if (e.from == op) {
                    try_end(dev, o);
                    break;
                }
    release_op(op);
}

// After a report the device is lost: whatever runs or is queued ends with the same status.
static void abandon(emu_device *dev, int status)
{
    dev->status = status;
    for (async_op *a : dev->flying) delete a;
    dev->flying.clear();
    dev->ready.clear();
    dev->released.clear();
    std::vector<emu_op *> all;
    all.swap(dev->queue);
    for (emu_op *op : all) {
        op->state = emu_op::ENDED;
        if (op->status == EMU_OK) op->status = status;
        free_grid(op);
        op->known_end = known_with(op->known_start, op->serial);
    }
    for (emu_op *op : all) {
        drop_preds(op);
        release_op(op);
    }
    for (sm_state &s : dev->sms) s = {};
}

static std::string cannot_launch(const emu_device *dev, const emu_op_desc &d)
{
    const emu_device_config &f = dev->cfg;
    u64 threads = (u64)d.block[0] * d.block[1] * d.block[2];
    u32 cluster = std::max(1u, d.cluster[0]);
    std::string of = std::string("kernel ") + d.kernel->name + ": ";
    if (!threads || threads > 1024 || threads > d.kernel->threads)
        return of + std::to_string(threads) + " threads a block, at most " + std::to_string(d.kernel->threads);
    if (d.smem_bytes > f.smem_per_cta)
        return of + std::to_string(d.smem_bytes) + " bytes of shared memory, at most " + std::to_string(f.smem_per_cta);
    if (!d.grid[0] || !d.grid[1] || !d.grid[2]) return of + "an empty grid";
    if (cluster > GROUP_MAX || (cluster > 1 && f.cluster_max == 1) || d.grid[0] % cluster || d.cluster[1] > 1 ||
        d.cluster[2] > 1)
        return of + "a cluster of " + std::to_string(cluster) + " blocks in a grid of " + std::to_string(d.grid[0]);
    return "";
}

static void start_kernel(emu_device *dev, emu_op *op)
{
    const emu_op_desc &d = op->desc;
    std::string why = cannot_launch(dev, d);
    if (!why.empty()) {
        report_op(op, EMU_INVALID, why);
        return;
    }
    grid *g = new grid();
    op->g.reset(g);
    g->op = op;
    g->cluster_size = std::max(1u, d.cluster[0]);
    g->total = d.grid[0] * d.grid[1] * d.grid[2];
    g->reserve = (d.smem_bytes + dev->cfg.smem_reserved + 127) / 128 * 128;
    u32 clusters = g->total / g->cluster_size;
    for (u32 i = 0; i < clusters; i++) g->order.push_back(clusters - 1 - i);
    // Blocks start in no promised order.
    u32 how = dev->random(3);
    if (how == 1) std::reverse(g->order.begin(), g->order.end());
    if (how == 2)
        for (u32 i = clusters; i > 1; i--) std::swap(g->order[i - 1], g->order[dev->random(i)]);
    place(dev);
}

static memory_range *device_range(emu_device *dev, const actor &a, const void *p, size_t bytes)
{
    bool partly;
    memory_range *m = find_range(dev, p, bytes, &partly);
    if (m && (partly || m->kind == memory_range::FREED)) check_access(a, p, bytes, WRITE, 1, true);
    return m && m->kind == memory_range::DEVICE ? m : nullptr;
}

static void copy_or_fill(emu_device *dev, emu_op *op)
{
    const emu_op_desc &d = op->desc;
    u32 serial = next_cta_serial();
    register_cta(serial, nullptr, op);
    actor a = { make_epoch(serial, 0, 1, 0), op->start_clock.p, nullptr, op, nullptr };
    if (!d.bytes) return;
    memory_range *to = device_range(dev, a, d.dst, d.bytes);
    if (d.kind == EMU_OP_COPY) {
        memory_range *from = device_range(dev, a, d.src, d.bytes);
        if (from) check_range(a, from, (const u8 *)d.src, d.bytes, READ, true);
        if (to) check_range(a, to, (u8 *)d.dst, d.bytes, WRITE, true);
        memmove(d.dst, d.src, d.bytes);
        if (to) copy_written(dev, a, (u8 *)d.dst, (const u8 *)d.src, d.bytes);
        return;
    }
    if (to) check_range(a, to, (u8 *)d.dst, d.bytes, WRITE, true);
    for (size_t i = 0; i + d.width <= d.bytes; i += d.width) memcpy((u8 *)d.dst + i, &d.value, d.width);
}

static void start_op(emu_device *dev, emu_op *op)
{
    op->state = emu_op::RUNNING;
    for (const edge &e : op->preds)
        op->known_start = known_join(op->known_start, e.programmatic ? known_early(e.from) : known_after(e.from));
    op->start_clock = clock_of(op->known_start);
    switch (op->desc.kind) {
    case EMU_OP_KERNEL: start_kernel(dev, op); break;
    case EMU_OP_HOST: op->desc.call(op->desc.data); break;
    case EMU_OP_EMPTY: break;
    default:
        try {
            copy_or_fill(dev, op);
        } catch (int) {
        }
    }
    if (op->status != EMU_OK) abandon(dev, op->status);
    else try_end(dev, op);
}

// ---- dependent launches ---------------------------------------------------------------------------------------------

extern "C" void emu_grid_wait()
{
    emu_op *op = self->block->g->op;
    op->any_waited = true;
    while (!preds_ended(op)) {
        op->waiting.push_back(self);
        yield_blocked("grid_wait");
    }
    self->waited = self->block->waited = true;
    if (op->preds.empty()) return;
    end_waiting(op);
    acquire(self, op->wait_clock);
}

extern "C" void emu_grid_launch()
{
    cta *c = self->block;
    if (c->launched_dependents) return;
    c->launched_dependents = true;
    c->g->launched++;
    c->g->op->launched_waited += self->waited;
    sometimes_yield();
}

// ---- the scheduler --------------------------------------------------------------------------------------------------

static void end_cta(emu_device *dev, cta *c)
{
    grid *g = c->g;
    c->ended = true;
    finish_cp_async(c);
    if (c->in_flight)
        report_op(g->op, EMU_LAUNCH_FAILED, describe_thread(c->threads[0]) + ": the block ended while " +
                  std::to_string(c->in_flight) + " asynchronous operations still used its shared memory");
    for (warp_state &w : c->warps) drop_ready(dev, &w);
    leave_sm(dev, c);
    if (!c->launched_dependents) {
        g->launched++;
        g->op->launched_waited += c->waited;
    }
    g->ended++;
    group *q = c->cluster;
    if (--q->left == 0) {
        for (cta *e : q->ctas) free_cta(e);
        g->groups.erase(std::find(g->groups.begin(), g->groups.end(), q));
        delete q;
    }
    if (g->op->status != EMU_OK) return;
    if (g->ended == g->total) try_end(dev, g->op);
    place(dev);
}

static void run_warp(emu_device *dev, warp_state *w)
{
    cta *c = w->block;
    emu_op *op = c->g->op;
    u32 turn = dev->random(32);
    for (u32 i = 0; i < 32; i++) {
        u32 lane = (turn + i) & 31;
        if (!(w->ready >> lane & 1)) continue;
        self = c->threads[w->first + lane];
        emu_switch(&scheduler_sp, self->sp);
        thread *t = self;
        self = nullptr;
        if (op->status == EMU_OK && *(u64 *)t->stack != CANARY)
            report_op(op, EMU_LAUNCH_FAILED, describe_thread(t) + ": the stack of the emulated thread is too small");
        if (op->status != EMU_OK) {
            abandon(dev, op->status);
            return;
        }
    }
    if (!w->ready) drop_ready(dev, w);
    if (!c->left) {
        end_cta(dev, c);
        if (dev->status == EMU_OK && op->status != EMU_OK) abandon(dev, op->status);
    }
}

static std::string waiting_list(emu_device *dev)
{
    std::string text;
    u32 lines = 0;
    for (emu_op *op : dev->queue) {
        if (!op->g) continue;
        for (group *q : op->g->groups)
            for (cta *c : q->ctas)
                for (u32 i = 0, j; i < c->n && lines < 40; i = j) {
                    const thread *t = c->threads[i];
                    for (j = i + 1; j < c->n; j++) {
                        const thread *u = c->threads[j];
                        if (u->done != t->done || (!t->done && (u->ready != t->ready || u->why != t->why ||
                                                                u->why_detail != t->why_detail))) break;
                    }
                    if (t->done) continue;
                    lines++;
                    text += "\n       " + describe_thread(t);
                    if (j - i > 1) text += "-" + std::to_string(j - 1);
                    text += (t->ready ? std::string(" can run") : std::string(" in ") + t->why);
                    if (!t->ready && t->why_detail) text += describe_wait(t);
                }
    }
    return text;
}

static void stuck(emu_device *dev, const char *what)
{
    for (emu_op *op : dev->queue)
        if (op->state == emu_op::RUNNING) {
            report_op(op, EMU_LAUNCH_FAILED, std::string(what) + ":" + waiting_list(dev));
            abandon(dev, op->status);
            return;
        }
    fprintf(stderr, "emu: an operation waits for one that was never submitted\n");
    abandon(dev, EMU_LAUNCH_FAILED);
}

static emu_op *random_startable(emu_device *dev)
{
    emu_op *found = nullptr;
    u32 n = 0;
    for (emu_op *op : dev->queue)
        if (can_start(op) && dev->random(++n) == 0) found = op;
    return found;
}

// One step of something that can go on.
static void step(emu_device *dev)
{
    if (!dev->flying.empty() && dev->random(8) == 0) {
        step_random_async(dev);
        return;
    }
    if (dev->ready.empty() || dev->random(32) == 0) {
        emu_op *op = random_startable(dev);
        if (op) {
            start_op(dev, op);
            return;
        }
    }
    if (!dev->ready.empty()) {
        if (dev->spins > 1000000) stuck(dev, "no progress, threads poll for a value that nobody stores");
        else run_warp(dev, dev->ready[dev->random((u32)dev->ready.size())]);
        if (dev->spins > 100000 && dev->soft_ctas < dev->cfg.ctas_per_sm) {
            dev->soft_ctas = dev->cfg.ctas_per_sm;
            place(dev);
        }
        return;
    }
    if (!dev->flying.empty()) {
        step_random_async(dev);
        return;
    }
    if (dev->soft_ctas < dev->cfg.ctas_per_sm) {
        dev->soft_ctas = dev->cfg.ctas_per_sm;
        if (place(dev)) return;
    }
    stuck(dev, "deadlock");
}

static void run_until_ended(emu_device *dev, emu_op *op)
{
    emu_device *before = running;
    running = dev;
    while (op ? op->state != emu_op::ENDED : !dev->queue.empty()) step(dev);
    running = before;
}

// ---- interface ------------------------------------------------------------------------------------------------------

emu_device_config emu_config(int capability, int sms)
{
    static const emu_device_config known[] = {
        { 80, 0, 2048, 32, 164 << 10, 163 << 10, 1024, 1 }, { 86, 0, 1536, 16, 100 << 10, 99 << 10, 1024, 1 },
        { 89, 0, 1536, 24, 100 << 10, 99 << 10, 1024, 1 },  { 90, 0, 2048, 32, 228 << 10, 227 << 10, 1024, 8 },
        { 100, 0, 2048, 32, 228 << 10, 227 << 10, 1024, 8 }, { 120, 0, 1536, 24, 100 << 10, 99 << 10, 1024, 8 }
    };
    for (emu_device_config c : known)
        if (c.capability == capability) {
            c.sms = sms;
            return c;
        }
    return {};
}

emu_device *emu_device_create(int capability, int sms)
{
    const char *env = getenv("MOE_EMU_SMS"), *seed = getenv("MOE_EMU_SEED");
    if (!sms) sms = env && *env ? atoi(env) : 6;
    emu_device_config cfg = emu_config(capability, std::max(1, sms));
    if (!cfg.capability) return nullptr;
    emu_device *dev = new emu_device();
    dev->cfg = cfg;
    dev->sms.resize((size_t)cfg.sms);
    emu_device_seed(dev, seed && *seed ? strtoull(seed, nullptr, 0) : 1);
    return dev;
}

void emu_device_seed(emu_device *dev, uint64_t seed)
{
    dev->seed = seed;
    dev->rng = seed * 0x9e3779b97f4a7c15ull ^ 0x2545f4914f6cdd1dull;
    if (!dev->rng) dev->rng = 1;
    for (int i = 0; i < 8; i++) dev->random();
}

const emu_device_config *emu_device_info(const emu_device *dev) { return &dev->cfg; }

void emu_device_recover(emu_device *dev)
{
    guard g(lock);
    abandon(dev, EMU_LAUNCH_FAILED);
    dev->status = EMU_OK;
}

static void free_cells(memory_range *m)
{
    if (m->cells) munmap(m->cells, (m->bytes + 3) / 4 * sizeof(cell));
    m->cells = nullptr;
}

void emu_device_destroy(emu_device *dev)
{
    guard g(lock);
    abandon(dev, EMU_LAUNCH_FAILED);
    for (auto &i : dev->memory) {
        free_cells(&i.second);
        if (i.second.number) free(i.second.base);
    }
    delete dev;
}

static void add_range(emu_device *dev, u8 *p, size_t bytes, memory_range::where kind, u32 number)
{
    size_t room = (bytes + 3) / 4 * sizeof(cell);
    void *cells = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (cells == MAP_FAILED) abort();
    dev->memory[p] = { p, bytes, kind, (cell *)cells, number, nullptr };
}

void *emu_alloc(emu_device *dev, size_t bytes, bool host)
{
    guard g(lock);
    u8 *p = bytes ? (u8 *)aligned_alloc(256, (bytes + 255) / 256 * 256 + 256) : nullptr;
    if (!p) return nullptr;
    memset(p, host ? 0 : 0xff, bytes);
    add_range(dev, p, bytes, host ? memory_range::HOST : memory_range::DEVICE, ++dev->allocations);
    return p;
}

static void forget(emu_device *dev, memory_range *m)
{
    for (memory_range *&r : dev->recent) r = nullptr;
    for (auto i = dev->released.begin(); i != dev->released.end();)
        if ((size_t)((const u8 *)i->first - m->base) < m->bytes) i = dev->released.erase(i);
        else ++i;
    free_cells(m);
}

bool emu_free(emu_device *dev, void *p)
{
    guard g(lock);
    auto i = dev->memory.find((u8 *)p);
    if (i == dev->memory.end() || i->second.kind == memory_range::FREED || !i->second.number) {
        emu_op blame;
        emu_device *before = running;
        running = dev;
        report_op(&blame, EMU_ILLEGAL_ADDRESS, "emu_free: " + (i != dev->memory.end() && i->second.number
                  ? describe_address(p) + ", freed before" : describe_address(p)));
        running = before;
        return false;
    }
    forget(dev, &i->second);
    i->second.kind = memory_range::FREED;
    dev->freed.push_back((u8 *)p);
    dev->freed_bytes += i->second.bytes;
    while (dev->freed_bytes > (64u << 20) && dev->freed.size() > 1) {
        auto old = dev->memory.find(dev->freed.front());
        dev->freed_bytes -= old->second.bytes;
        free(old->first);
        dev->memory.erase(old);
        dev->freed.pop_front();
    }
    return true;
}

void emu_host_register(emu_device *dev, void *p, size_t bytes)
{
    guard g(lock);
    add_range(dev, (u8 *)p, bytes, memory_range::HOST, 0);
}

void emu_host_unregister(emu_device *dev, void *p)
{
    guard g(lock);
    auto i = dev->memory.find((u8 *)p);
    if (i == dev->memory.end() || i->second.number) return;
    forget(dev, &i->second);
    dev->memory.erase(i);
}

emu_op *emu_submit(emu_device *dev, const emu_op_desc *desc, emu_op *const *preds, const unsigned char *programmatic,
                   int count)
{
    guard g(lock);
    emu_op *op = new emu_op();
    op->dev = dev;
    op->serial = ++last_serial;
    op->refs = 1;
    op->desc = *desc;
    op->known_start = dev->host_known;
    if (desc->kind == EMU_OP_KERNEL) {
        const emu_kernel *k = desc->kernel;
        op->args_room.resize(k->args_bytes + k->args_align + 64);
        size_t align = std::max(64u, k->args_align);
        op->args = (u8 *)(((uintptr_t)op->args_room.data() + align - 1) / align * align);
        if (k->args_bytes) memcpy(op->args, desc->args, k->args_bytes);
    }
    for (int i = 0; i < count; i++) {
        bool kernels = desc->kind == EMU_OP_KERNEL && preds[i]->desc.kind == EMU_OP_KERNEL;
        bool early = kernels && programmatic && programmatic[i];
        op->preds.push_back({ preds[i], early });
        op->any_programmatic |= early;
        preds[i]->refs++;
    }
    if (dev->status != EMU_OK) {
        op->status = dev->status;
        op->state = emu_op::ENDED;
        drop_preds(op);
        return op;
    }
    op->refs++;
    dev->queue.push_back(op);
    return op;
}

void emu_release(emu_op *op)
{
    guard g(lock);
    release_op(op);
}

int emu_wait(emu_op *op)
{
    guard g(lock);
    emu_device *dev = op->dev;
    run_until_ended(dev, op);
    if (op->status != EMU_OK) return op->status;
    dev->host_known = known_join(dev->host_known, known_after(op));
    return dev->status;
}

int emu_wait_all(emu_device *dev)
{
    guard g(lock);
    std::vector<emu_op *> all = dev->queue;
    for (emu_op *op : all) op->refs++;
    run_until_ended(dev, nullptr);
    for (emu_op *op : all) release_op(op);
    known_ref k(new known_ops);
    k->floor = last_serial + 1;
    dev->host_known = k;
    return dev->status;
}

bool emu_done(emu_op *op)
{
    guard g(lock);
    emu_device *dev = op->dev, *before = running;
    running = dev;
    for (u32 i = dev->random(64); i > 0 && op->state != emu_op::ENDED; i--) step(dev);
    running = before;
    if (op->state != emu_op::ENDED) return false;
    dev->host_known = known_join(dev->host_known, known_after(op));
    return true;
}
