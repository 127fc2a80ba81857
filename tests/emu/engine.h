// Inside the engine: threads as fibers, clocks, shadow memory, operations.
//   engine.cc  memory, operations, the scheduler
//   check.cc   clocks, shadow memory, races, reports, the compiler's callbacks
//   sync.cc    warps, barriers, atomics, clusters, mbarriers
//   async.cc   copies that complete later
//   matrix.cc  wgmma, mma.sync, ldmatrix, stmatrix
//
// One lock covers everything: at any time one host thread is inside, and on it one fiber runs or the scheduler.
#ifndef EMU_ENGINE_H
#define EMU_ENGINE_H

#include "emu.h"

#include <string.h>

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int32_t i32;
typedef int64_t i64;
typedef float f32;

enum {
    STACK_BYTES = 128 << 10,
    AGENTS = 64,                // per CTA: copies and products in flight that have an identity of their own
    SMEM_WINDOW = 1024,         // shared addresses begin here, behind what the system keeps
    SMEM_MAX = 228 << 10,
    CLUSTER_SHIFT = 24,         // of a remote shared address: rank + 1
    GROUP_MAX = 16              // CTAs of a cluster
};

// ---- identities and clocks ------------------------------------------------------------------------------------------

// A point in somebody's execution: CTA (29 bits; numbered over the process's life), thread or agent in it (12), clock
// (21), and how memory was touched (2). Agents follow the threads: n + t is thread t's cp.async, 2 n + i a bulk copy.
typedef u64 epoch;
enum { ATOMIC = 1, ASYNC = 2 };
inline epoch make_epoch(u32 cta, u32 who, u32 clock, u32 how)
{
    return (u64)cta << 35 | (u64)who << 23 | (u64)clock << 2 | how;
}
inline u32 epoch_cta(epoch e) { return (u32)(e >> 35); }
inline u32 epoch_who(epoch e) { return (u32)(e >> 23) & 4095; }
inline u32 epoch_clock(epoch e) { return (u32)(e >> 2) & 0x1fffff; }

template <class T> struct ref {             // counted pointer; one thread at a time
    T *p = nullptr;
    ref() {}
    ref(T *q) : p(q) { if (p) p->refs++; }
    ref(const ref &o) : p(o.p) { if (p) p->refs++; }
    ref(ref &&o) : p(o.p) { o.p = nullptr; }
    ref &operator=(ref o) { T *t = p; p = o.p; o.p = t; return *this; }
    ~ref() { if (p && --p->refs == 0) T::free(p); }
    T *operator->() const { return p; }
    explicit operator bool() const { return p != nullptr; }
    bool operator==(const ref &o) const { return p == o.p; }
};

// Operations that are known to have ended: all before `floor`, and those in `bits` from there on.
struct known_ops {
    u32 refs = 0, floor = 0;
    std::vector<u64> bits;
    bool has(u32 op) const
    {
        if (op < floor) return true;
        u32 i = op - floor;
        return i / 64 < bits.size() && bits[i / 64] >> i % 64 & 1;
    }
    void add(u32 op);
    static void free(known_ops *k) { delete k; }
};
typedef ref<known_ops> known_ref;
known_ref known_join(const known_ref &a, const known_ref &b);
known_ref known_with(const known_ref &a, u32 op);

// Clocks of one CTA's threads and agents.
struct dense {
    u32 refs, cta, op, n;
    u32 c[1];
    static void free(dense *d) { ::free(d); }
};
typedef ref<dense> dense_ref;
dense_ref dense_new(u32 cta, u32 op, u32 n);

// What has happened before: CTAs in order of their number, and whole operations. Never changed once shared.
struct clock_set {
    u32 refs = 0;
    known_ref known;
    std::vector<dense_ref> ctas;
    const dense *find(u32 cta) const;
    static void free(clock_set *c) { delete c; }
};
typedef ref<clock_set> clock_ref;
clock_ref clock_join(const clock_ref &a, const clock_ref &b);
// `base` with these clocks of one CTA raised.
struct raise { u32 who, clock; };
clock_ref clock_raise(const clock_ref &base, u32 cta, u32 op, u32 n, const raise *list, size_t count);

// ---- shadow memory --------------------------------------------------------------------------------------------------

// Of four bytes: who wrote them last; who has touched them since (readers, and the atomics, whichever way they went).
// Where single bytes were touched, the cell is split: `sub` is a block of four cells, one a byte.
struct cell {
    epoch w;
    epoch r[3];
    u32 sub;
    u8 written;                 // bytes that have been written at all
    u8 mbar;                    // part of an mbarrier
    u8 pad[2];
};

struct memory_range {
    u8 *base;
    size_t bytes;
    enum where { DEVICE, HOST, SMEM, FREED } kind;
    cell *cells;
    u32 number;                 // of the allocation; of the CTA
    struct cta *owner;          // SMEM
};

// ---- running kernels ------------------------------------------------------------------------------------------------

struct thread;
struct warp_state;
struct cta;
struct grid;

// What an asynchronous operation in flight does when it completes, and who is told.
struct async_op {
    size_t index;               // in the device's list
    u32 kind;
    cta *owner;
    thread *issuer;
    epoch id;
    u32 group;
    u8 *dst;
    const u8 *src;
    u32 bytes, src_bytes;
    cta *bar_cta;               // mbarrier that gets its bytes
    u8 *bar;
    const char *name;
    epoch read_id;              // of a store's read of shared memory
    bool captured;              // the source has been read, into captured_bytes
    std::vector<u8> captured_bytes;
};

struct bulk_id {
    u32 group;
    epoch id, read_id;
};

struct thread {
    void *sp;
    u8 *stack;                  // lowest address
    cta *block;
    warp_state *warp;
    u32 tid;
    u32 clock, copy_known;      // own clock; cp.async of this thread known to be complete
    clock_ref base;
    clock_ref release_fence, cta_fence, acquire_pending;
    clock_ref proxy_base;       // what was known at the last fence_proxy_async()
    u32 proxy_clock;            // own clock then
    bool ready, done;
    bool cluster_arrived;
    bool waited;                // has returned from grid_wait()
    u32 cluster_phase;
    const char *why;            // in what it waits
    u64 why_detail;
    // collective operations of the warp
    u32 value, operand, result;
    // cp.async
    u32 copy_clock, copy_group;
    std::vector<u32> copy_ends; // clock at the end of each group
    std::vector<async_op *> copies;
    std::vector<std::pair<u32, u8 *>> copy_bars; // mbarriers that wait for copies up to a clock
    // bulk copies
    u32 bulk_group;
    std::vector<async_op *> bulks;
    std::vector<bulk_id> bulk_ids;               // stores that nobody has waited for
    u32 barriers;               // named barriers that it has arrived at, a bit each
    const u8 *poll_at;
    u32 poll_value;
    void *matrix;               // arguments of a collective matrix operation
};

struct warp_state {
    cta *block;
    u32 first, lanes;           // threads
    u32 ready;                  // lanes that can run
    size_t index;               // in the scheduler's list, or -1
    u32 op, arrived;            // collective in progress
    u32 leader;                 // elect()
    u32 regs;
    struct wgmma_state *wgmma = nullptr;
};

// Arrivals at something that many arrive at: one join when it completes, whatever their number.
struct arrivals {
    struct one {
        clock_ref base;
        cta *block;
        u32 tid, clock, copies;
    };
    std::vector<one> list;
    clock_ref extra;
    void add(thread *t);        // t goes on to its next clock
    clock_ref sum() const;
    void clear() { list.clear(); extra = nullptr; }
};

struct barrier_state {
    u32 expected = 0;
    std::vector<thread *> waiting;
    arrivals come;
};

struct mbarrier {
    u8 *at;
    cta *block;
    u32 count, pending, phase, phases;
    i64 tx;
    bool live, fenced;
    const thread *init_thread;
    arrivals near, far;         // of this CTA; of others in the cluster
    clock_ref near_clock, far_clock; // of the last complete phase
    std::vector<thread *> waiting;
};

struct group;                   // the CTAs of a cluster

struct cta {
    grid *g;
    group *cluster;
    u32 rank, id[3], serial, sm;
    u32 n, left;                // threads; those not ended
    u8 *smem;
    u32 smem_bytes;
    memory_range smem_range;
    std::vector<thread *> threads;
    std::vector<warp_state> warps;
    barrier_state bars[16];
    std::deque<mbarrier> mbars;
    u32 agent_next, agent_clock[AGENTS];
    u32 regs_free;
    std::vector<thread *> regs_waiting;
    std::unordered_map<const void *, clock_ref> released;   // by words of its shared memory
    std::map<u64, epoch> remote;    // last accesses to it by threads of other CTAs
    clock_ref end_clock;            // of its threads that have ended, in a cluster
    u32 in_flight;              // asynchronous operations that use its shared memory
    bool launched_dependents, waited, ended;
    u32 width() const { return 2 * n + AGENTS; }
};

struct group {
    std::vector<cta *> ctas;
    u32 left;                   // CTAs with threads
    std::vector<thread *> waiting;
    arrivals come;
    clock_ref released;
    u32 phase = 0;
};

struct grid {
    emu_op *op;
    std::vector<u32> order;     // clusters not started yet, last first
    u32 total, ended, launched; // CTAs
    u32 cluster_size;
    u32 reserve;                // shared memory of a CTA on its multiprocessor
    std::vector<group *> groups;
};

struct edge {
    emu_op *from;
    bool programmatic;
};

struct emu_op {
    emu_device *dev;
    u32 serial, refs;
    emu_op_desc desc;
    std::vector<u8> args_room;
    u8 *args = nullptr;
    std::vector<edge> preds;    // those not ended
    enum state { QUEUED, RUNNING, ENDED } state = QUEUED;
    int status = EMU_OK;
    known_ref known_start, known_waited, known_end;
    clock_ref start_clock, wait_clock;
    bool any_programmatic = false, any_waited = false;
    u32 launched_waited = 0;    // CTAs that had waited when they let dependents start
    std::unique_ptr<grid> g;
    std::vector<thread *> waiting;      // in grid_wait()
};

struct sm_state {
    u32 threads, ctas, smem;
};

struct emu_device {
    emu_device_config cfg;
    u64 seed, rng;
    int status = EMU_OK;
    std::map<u8 *, memory_range> memory;
    memory_range *recent[4] = {};
    u32 allocations = 0;
    size_t freed_bytes = 0;
    std::deque<u8 *> freed;
    std::vector<emu_op *> queue;        // not ended, in order of submission
    std::vector<sm_state> sms;
    std::vector<warp_state *> ready;
    std::vector<async_op *> flying;
    known_ref host_known;
    std::unordered_map<const void *, clock_ref> released;   // by words that were written with release
    u32 soft_ctas = 2;                  // a multiprocessor's residents, unless the device gets stuck
    u64 spins = 0;
    u32 random() { rng ^= rng << 13; rng ^= rng >> 7; rng ^= rng << 17; return (u32)(rng >> 32); }
    u32 random(u32 n) { return (u32)((u64)random() * n >> 32); }
};

// ---- the running fiber ----------------------------------------------------------------------------------------------

extern thread *self;            // NULL in the scheduler
extern emu_device *running;     // whose scheduler runs

void yield_blocked(const char *why, u64 detail = 0);    // until wake()
void yield_ready();                                     // lets others run
void wake(thread *t);
void sometimes_yield();
void complete(async_op *a);                             // async.cc
void forget_async(emu_device *dev, emu_op *op);
void step_random_async(emu_device *dev);
void finish_cp_async(cta *c);
void cp_async_arrives(mbarrier *m);
void require_global(const void *p, u32 bytes, const char *name);
void end_matrix(warp_state *w);
void cluster_thread_ends(thread *t);                    // sync.cc
std::string describe_wait(const thread *t);
bool collective(u32 op, const char *name);              // true: the last lane, which resolves it
void end_collective(warp_state *w);
cta *resolve(u32 addr, u32 bytes, const char *name, u8 **p);
mbarrier *find_mbar(cta *c, u8 *bar, const char *name);
void mbar_arrives(mbarrier *m, u32 count, thread *t, const clock_ref &extra, const char *name);
void mbar_bytes(mbarrier *m, u32 bytes, const clock_ref &clock);
[[noreturn]] void fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));
void report_op(emu_op *op, int status, const std::string &text);
[[noreturn]] void leave_fiber();
std::string describe_address(const void *p);
std::string describe_thread(const thread *t);
void require(int capability, const char *name);

// ---- checks (check.cc) ----------------------------------------------------------------------------------------------

enum access_kind { READ, WRITE, READ_ATOMIC, WRITE_ATOMIC, READ_ASYNC, WRITE_ASYNC };
// Who touches memory: an epoch and what it knows.
struct actor {
    epoch id;
    const clock_set *base;
    const thread *owner;        // NULL: a copy or fill of the host
    const emu_op *op;
    const char *name;           // wrapper, or NULL for a plain access
};
actor thread_actor(const char *name, u32 how);
bool knows(const actor &a, epoch e);
memory_range *find_range(emu_device *dev, const void *p, size_t bytes, bool *partly);
void check_access(const actor &a, const void *p, size_t bytes, access_kind kind, u32 align, bool may_be_unwritten);
void check_range(const actor &a, memory_range *m, const u8 *p, size_t bytes, access_kind kind, bool may_be_unwritten);
void copy_written(emu_device *dev, const actor &a, u8 *dst, const u8 *src, size_t bytes);
void set_written(memory_range *m, const u8 *p, size_t bytes, bool on);
void check_constant(const actor &a, const void *p, size_t bytes);   // not written by the same kernel
std::string describe_epoch(epoch e);
void check_proxy(const thread *t, memory_range *m, const u8 *p, size_t bytes, const char *name);
void register_cta(u32 serial, cta *c, emu_op *op);
u32 next_cta_serial();
const emu_op *op_of(epoch e);
clock_ref thread_clock(const thread *t);                // base and own clocks
clock_ref release_clock(thread *t);                     // the same, and the thread goes on to its next clock
void acquire(thread *t, const clock_ref &c);

#endif
