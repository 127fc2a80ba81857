// Inside the emulated driver (driver.cc, stream.cc, graph.cc): what the CUDA handles point to, and how calls are made.
// Everything that a stream or a graph is asked to do becomes operations with edges on the engine (emu.h).
#ifndef EMU_DRIVER_H
#define EMU_DRIVER_H

#include "cuda_abi.h"
#include "emu.h"
#include "host.h"

#include <stdint.h>

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

// ---- work -----------------------------------------------------------------------------------------------------------

enum work_kind { WORK_KERNEL, WORK_COPY, WORK_FILL, WORK_HOST, WORK_EMPTY };

// One operation before it has a place in the order: what a stream enqueues and a graph's node holds.
struct work {
    work_kind kind = WORK_EMPTY;
    CUfunc_st *function = nullptr;
    unsigned grid[3] = { 1, 1, 1 }, block[3] = { 1, 1, 1 }, cluster[3] = { 1, 1, 1 }, smem = 0;
    std::vector<unsigned char> args;
    void *dst = nullptr;
    const void *src = nullptr;
    size_t bytes = 0;                               // of a copy; elements of a fill
    unsigned value = 0, width = 1;
    CUhostFn call = nullptr;
    void *data = nullptr;
    std::shared_ptr<void> keeps;                    // staged bytes, an event's clock: lives as long as the operation
    bool programmatic = false;                      // may start before the kernel in front of it has ended
};

// An operation of the engine. Streams, events and graphs share it. ended: the program has waited for it, or for one
// behind it, so that it knows that it ran.
struct op {
    emu_op *handle;
    CUfunc_st *function;                            // of a kernel
    std::shared_ptr<void> keeps;
    std::vector<std::shared_ptr<op>> before;        // until it has ended
    bool ended = false;
    op(emu_op *h, const work &w) : handle(h), function(w.function), keeps(w.keeps) {}
    op(const op &) = delete;
    ~op();
};
typedef std::shared_ptr<op> op_ptr;

struct op_edge {
    op_ptr from;
    bool programmatic;
};

// ---- handles --------------------------------------------------------------------------------------------------------

struct device {
    int ordinal, capability;                        // 90
    emu_device *engine;
    CUctx_st *primary;
    int retained;
    unsigned flags;
};

struct CUctx_st {
    device *dev;
    unsigned flags = 0;
    bool is_primary = false;
    CUresult sticky = 0;                            // a failed kernel's code: every later call returns it
    CUstream_st *legacy = nullptr;
    std::map<std::thread::id, CUstream_st *> per_thread;
    std::set<CUstream_st *> streams;                // created and per-thread ones, without the legacy stream
    std::set<CUevent_st *> events;
    std::set<CUmod_st *> modules;
    std::vector<op_ptr> pending;                    // what has not ended, and a little that has
};

struct CUgraphNode_st {
    work w;
    int type = CU_GRAPH_NODE_TYPE_EMPTY;
    struct edge {
        CUgraphNode_st *from;
        bool programmatic;
    };
    std::vector<edge> edges;
};

struct CUgraph_st {
    CUctx_st *ctx;
    std::vector<std::unique_ptr<CUgraphNode_st>> nodes;
};

struct CUgraphExec_st {
    CUctx_st *ctx;
    std::unique_ptr<CUgraph_st> graph;
    op_ptr last;                                    // a launch waits for the one before it
};

struct capture {
    CUgraph_st *graph;                              // owned until it is handed out
    CUstream_st *origin;
    int mode;
    uint64_t id;
    std::thread::id thread;
    bool invalidated = false;
    std::set<CUstream_st *> streams;
};

struct CUstream_st {
    CUctx_st *ctx;
    long number;                                    // in the log
    unsigned flags;
    int priority;
    op_ptr tail;
    std::vector<op_ptr> waits;
    capture *cap = nullptr;
    std::vector<CUgraphNode_st *> cap_deps;         // what the next captured node depends on
    CUgraphNode_st *cap_last = nullptr;             // this stream's own last node, for a programmatic edge
};

struct event_clock {
    double seconds = -1;
};

struct CUevent_st {
    CUctx_st *ctx;
    unsigned flags;
    op_ptr recorded;
    std::shared_ptr<event_clock> clock;
    uint64_t cap_id = 0;                            // recorded last inside this capture
    std::vector<CUgraphNode_st *> cap_nodes;
};

struct CUfunc_st {
    CUmod_st *module;
    const emu_kernel *kernel;
    std::string name;
    int max_dynamic_smem = 48 * 1024, non_portable_cluster = 0;
};

struct CUmod_st {
    CUctx_st *ctx;
    void *object;                                   // dlopen's
    host_chip chip;
    std::map<std::string, std::unique_ptr<CUfunc_st>> functions;
};

struct allocation {
    CUctx_st *ctx;
    size_t bytes;
    enum kind { DEVICE, HOST, REGISTERED } kind;
};

// ---- the driver -----------------------------------------------------------------------------------------------------

struct driver {
    std::recursive_mutex lock;
    bool initialised = false;
    int version = 13000, sms = 6;
    std::vector<std::unique_ptr<device>> devices;
    std::set<CUctx_st *> contexts;
    std::set<CUgraph_st *> graphs;
    std::set<CUgraphExec_st *> execs;
    std::set<capture *> captures;
    std::map<uintptr_t, allocation> memory;
    std::map<uintptr_t, size_t> freed;              // device memory that is no more, but not the host's either
    std::vector<std::string> leaks;                 // of contexts that are gone
    long last_stream = 0;
    uint64_t last_capture = 0;
};

driver &drv();
int driver_version();

// One API call: takes the lock, injects faults, checks what every call of its class checks, logs its result.
struct call {
    enum { ANY = 0, INIT = 1, CONTEXT = 3, UNSAFE = 4 };    // UNSAFE: not while a capture forbids it
    std::unique_lock<std::recursive_mutex> guard;
    const char *name;
    CUctx_st *ctx = nullptr;
    long stream_number = 0;
    int capture_state = 0;
    CUresult code = CUDA_SUCCESS;
    call(const char *function, int needs);
    ~call();
    CUresult operator()(CUresult result) { return code = result; }
    CUstream_st *stream(CUstream handle, bool asks = false); // null: code is set. asks: invalidates no capture
    bool event(CUevent handle);                     // false: code is set
};

CUctx_st *current_context();
bool is_function(CUfunc_st *f);                     // of a module that is loaded
CUstream_st *create_stream(CUctx_st *ctx, unsigned flags, int priority);
void destroy_stream(CUstream_st *s);
void destroy_context_streams(CUctx_st *ctx);

// Enqueues; during capture adds a node instead.
CUresult enqueue(CUstream_st *s, work w);
op_ptr submit(CUctx_st *ctx, const work &w, const std::vector<op_edge> &before);
CUresult wait_for(CUctx_st *ctx, const op_ptr &o);
CUresult wait_for_all(CUctx_st *ctx);
void forget_pending(CUctx_st *ctx);
std::vector<op_edge> edges_before(CUstream_st *s, bool programmatic);
CUresult set_tail(CUstream_st *s, const op_ptr &o);

// Capture. The checks return 0 or the code that hardware returns, and invalidate what it invalidates.
CUresult capture_node(CUstream_st *s, const work &w);
void invalidate(capture *c);
CUresult check_unsafe();
CUresult check_implicit(CUctx_st *ctx, bool asks);  // legacy stream's use while a blocking stream captures
CUresult check_not_capturing(CUstream_st *s);
void end_capture(capture *c);
bool graph_uses(const CUgraph_st *g, const CUmod_st *m);

#endif
