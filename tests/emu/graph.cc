// The emulated driver's stream capture and graphs. A capture collects nodes; what hardware forbids during one returns
// hardware's code and invalidates it.
#include "driver.h"

#include <algorithm>

static thread_local int thread_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

// ---- capture --------------------------------------------------------------------------------------------------------

void invalidate(capture *c)
{
    c->invalidated = true;
}

// Takes the streams out of the capture. The graph is the caller's, or goes.
void end_capture(capture *c)
{
    for (CUstream_st *s : c->streams) {
        s->cap = nullptr;
        s->cap_deps.clear();
        s->cap_last = nullptr;
    }
    delete c->graph;
    drv().captures.erase(c);
    delete c;
}

// Calls that might wait, allocate or touch the legacy stream: not in a thread that captures (unless RELAXED), and not
// while any thread captures in GLOBAL mode, unless the calling thread exchanged its own mode for a laxer one.
CUresult check_unsafe()
{
    if (thread_mode == CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_SUCCESS;
    CUresult code = CUDA_SUCCESS;
    for (capture *c : drv().captures) {
        bool own = c->thread == std::this_thread::get_id() && c->mode != CU_STREAM_CAPTURE_MODE_RELAXED;
        bool other = c->mode == CU_STREAM_CAPTURE_MODE_GLOBAL && thread_mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
        if (!own && !other) continue;
        invalidate(c);
        code = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    return code;
}

CUresult check_implicit(CUctx_st *ctx, bool asks)
{
    CUresult code = CUDA_SUCCESS;
    for (CUstream_st *s : ctx->streams) {
        if (!s->cap || (s->flags & CU_STREAM_NON_BLOCKING)) continue;
        if (!asks) invalidate(s->cap);
        code = CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    }
    return code;
}

CUresult check_not_capturing(CUstream_st *s)
{
    if (!s->cap) return CUDA_SUCCESS;
    invalidate(s->cap);
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

static int node_type(work_kind kind)
{
    switch (kind) {
    case WORK_KERNEL: return CU_GRAPH_NODE_TYPE_KERNEL;
    case WORK_COPY: return CU_GRAPH_NODE_TYPE_MEMCPY;
    case WORK_FILL: return CU_GRAPH_NODE_TYPE_MEMSET;
    case WORK_HOST: return CU_GRAPH_NODE_TYPE_HOST;
    default: return CU_GRAPH_NODE_TYPE_EMPTY;
    }
}

CUresult capture_node(CUstream_st *s, const work &w)
{
    if (s->cap->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    std::unique_ptr<CUgraphNode_st> node(new CUgraphNode_st);
    node->w = w;
    node->type = node_type(w.kind);
    for (CUgraphNode_st *from : s->cap_deps) {
        bool programmatic = w.programmatic && from == s->cap_last && from->w.kind == WORK_KERNEL;
        node->edges.push_back({ from, programmatic });
    }
    s->cap_deps.assign(1, node.get());
    s->cap_last = node.get();
    s->cap->graph->nodes.push_back(std::move(node));
    return CUDA_SUCCESS;
}

EMU_API CUresult cuStreamBeginCapture_v2(CUstream handle, int mode)
{
    call c("cuStreamBeginCapture", call::CONTEXT);
    if (c.code) return c.code;
    if ((uintptr_t)handle <= 1) return c(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    CUstream_st *s = c.stream(handle);
    if (!s) return c.code;
    if (mode < 0 || mode > CU_STREAM_CAPTURE_MODE_RELAXED) return c(CUDA_ERROR_INVALID_VALUE);
    if (s->cap) return c(CUDA_ERROR_ILLEGAL_STATE);
    capture *cap = new capture;
    cap->graph = new CUgraph_st;
    cap->graph->ctx = s->ctx;
    cap->origin = s;
    cap->mode = mode;
    cap->id = ++drv().last_capture;
    cap->thread = std::this_thread::get_id();
    cap->streams.insert(s);
    drv().captures.insert(cap);
    s->cap = cap;
    s->cap_deps.clear();
    s->cap_last = nullptr;
    c.capture_state = 1;
    return CUDA_SUCCESS;
}

// Work of a stream that joined the capture must be waited for by the origin before the end: every node leads to one of
// the origin's last ones.
static bool all_joined(const capture *cap)
{
    std::set<const CUgraphNode_st *> reached(cap->origin->cap_deps.begin(), cap->origin->cap_deps.end());
    std::vector<const CUgraphNode_st *> next(reached.begin(), reached.end());
    while (!next.empty()) {
        const CUgraphNode_st *n = next.back();
        next.pop_back();
        for (const auto &e : n->edges)
            if (reached.insert(e.from).second) next.push_back(e.from);
    }
    for (const CUstream_st *s : cap->streams)
        for (const CUgraphNode_st *n : s->cap_deps)
            if (!reached.count(n)) return false;
    return true;
}

EMU_API CUresult cuStreamEndCapture(CUstream handle, CUgraph *out)
{
    call c("cuStreamEndCapture", call::CONTEXT);
    CUstream_st *s = c.stream(handle);
    if (!s) return c.code;
    if (!out) return c(CUDA_ERROR_INVALID_VALUE);
    *out = nullptr;
    capture *cap = s->cap;
    if (!cap) return c(CUDA_ERROR_ILLEGAL_STATE);
    if (cap->origin != s) return c(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
    if (cap->mode != CU_STREAM_CAPTURE_MODE_RELAXED && cap->thread != std::this_thread::get_id())
        return c(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
    CUresult code = cap->invalidated ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
                    : all_joined(cap) ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
    if (!code) {
        *out = cap->graph;
        drv().graphs.insert(cap->graph);
        cap->graph = nullptr;
    }
    end_capture(cap);
    return c(code);
}

EMU_API CUresult cuStreamIsCapturing(CUstream handle, int *status)
{
    call c("cuStreamIsCapturing", call::CONTEXT);
    CUstream_st *s = c.stream(handle, true);
    if (!s) return c.code;
    if (!status) return c(CUDA_ERROR_INVALID_VALUE);
    *status = c.capture_state;
    return CUDA_SUCCESS;
}

static CUresult capture_info(CUstream handle, int *status, uint64_t *id, CUgraph *graph, const CUgraphNode **nodes,
                             size_t *count)
{
    call c("cuStreamGetCaptureInfo", call::CONTEXT);
    CUstream_st *s = c.stream(handle, true);
    if (!s) return c.code;
    if (!status) return c(CUDA_ERROR_INVALID_VALUE);
    *status = c.capture_state;
    if (c.capture_state != CU_STREAM_CAPTURE_STATUS_ACTIVE) return CUDA_SUCCESS;
    if (id) *id = s->cap->id;
    if (graph) *graph = s->cap->graph;
    if (nodes) *nodes = s->cap_deps.data();
    if (count) *count = s->cap_deps.size();
    return CUDA_SUCCESS;
}

EMU_API CUresult cuStreamGetCaptureInfo_v2(CUstream s, int *status, uint64_t *id, CUgraph *graph,
                                           const CUgraphNode **nodes, size_t *count)
{
    return capture_info(s, status, id, graph, nodes, count);
}

EMU_API CUresult cuStreamGetCaptureInfo_v3(CUstream s, int *status, uint64_t *id, CUgraph *graph,
                                           const CUgraphNode **nodes, const CUgraphEdgeData **edges, size_t *count)
{
    if (edges) *edges = nullptr;
    return capture_info(s, status, id, graph, nodes, count);
}

EMU_API CUresult cuThreadExchangeStreamCaptureMode(int *mode)
{
    call c("cuThreadExchangeStreamCaptureMode", call::INIT);
    if (c.code) return c.code;
    if (!mode || *mode < 0 || *mode > CU_STREAM_CAPTURE_MODE_RELAXED) return c(CUDA_ERROR_INVALID_VALUE);
    std::swap(*mode, thread_mode);
    return CUDA_SUCCESS;
}

static capture *capture_of(const CUevent_st *e)
{
    for (capture *c : drv().captures)
        if (c->id == e->cap_id) return c;
    return nullptr;
}

// A stream waits for work that is being captured: it joins that capture.
static CUresult join(CUstream_st *s, const CUevent_st *e)
{
    capture *cap = capture_of(e);
    if (!cap) return CUDA_ERROR_INVALID_VALUE;
    if (cap->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (s == s->ctx->legacy) {
        invalidate(cap);
        return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    }
    if (s->cap && s->cap != cap) {
        invalidate(cap);
        invalidate(s->cap);
        return CUDA_ERROR_STREAM_CAPTURE_MERGE;
    }
    s->cap = cap;
    cap->streams.insert(s);
    for (CUgraphNode_st *n : e->cap_nodes)
        if (std::find(s->cap_deps.begin(), s->cap_deps.end(), n) == s->cap_deps.end()) s->cap_deps.push_back(n);
    return CUDA_SUCCESS;
}

EMU_API CUresult cuStreamWaitEvent(CUstream handle, CUevent e, unsigned)
{
    call c("cuStreamWaitEvent", call::CONTEXT);
    CUstream_st *s = c.stream(handle);
    if (!s || !c.event(e)) return c.code;
    if (e->cap_id) return c(join(s, e));
    if (s->cap) {
        invalidate(s->cap);
        return c(CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    }
    if (e->recorded) s->waits.push_back(e->recorded);
    return CUDA_SUCCESS;
}

// ---- graphs ---------------------------------------------------------------------------------------------------------

static std::unique_ptr<CUgraph_st> clone(const CUgraph_st *g)
{
    std::unique_ptr<CUgraph_st> copy(new CUgraph_st);
    std::map<const CUgraphNode_st *, CUgraphNode_st *> twin;
    copy->ctx = g->ctx;
    for (const auto &n : g->nodes) {
        copy->nodes.emplace_back(new CUgraphNode_st(*n));
        twin[n.get()] = copy->nodes.back().get();
    }
    for (auto &n : copy->nodes)
        for (auto &e : n->edges) e.from = twin[e.from];
    return copy;
}

bool graph_uses(const CUgraph_st *g, const CUmod_st *m)
{
    for (const auto &n : g->nodes)
        if (n->w.function && n->w.function->module == m) return true;
    return false;
}

EMU_API CUresult cuGraphCreate(CUgraph *out, unsigned flags)
{
    call c("cuGraphCreate", call::CONTEXT);
    if (c.code) return c.code;
    if (!out || flags) return c(CUDA_ERROR_INVALID_VALUE);
    *out = new CUgraph_st;
    (*out)->ctx = c.ctx;
    drv().graphs.insert(*out);
    return CUDA_SUCCESS;
}

EMU_API CUresult cuGraphDestroy(CUgraph g)
{
    call c("cuGraphDestroy", call::INIT);
    if (c.code) return c.code;
    if (!drv().graphs.erase(g)) return c(CUDA_ERROR_INVALID_VALUE);
    delete g;
    return CUDA_SUCCESS;
}

EMU_API CUresult cuGraphGetNodes(CUgraph g, CUgraphNode *nodes, size_t *count)
{
    call c("cuGraphGetNodes", call::INIT);
    if (c.code) return c.code;
    if (!count || !drv().graphs.count(g)) return c(CUDA_ERROR_INVALID_VALUE);
    size_t room = *count;
    *count = g->nodes.size();
    if (!nodes) return CUDA_SUCCESS;
    for (size_t i = 0; i < room; i++) nodes[i] = i < g->nodes.size() ? g->nodes[i].get() : nullptr;
    *count = std::min(room, g->nodes.size());
    return CUDA_SUCCESS;
}

EMU_API CUresult cuGraphNodeGetType(CUgraphNode node, int *type)
{
    call c("cuGraphNodeGetType", call::INIT);
    if (c.code) return c.code;
    if (!node || !type) return c(CUDA_ERROR_INVALID_VALUE);
    *type = node->type;
    return CUDA_SUCCESS;
}

EMU_API CUresult cuGraphInstantiateWithFlags(CUgraphExec *out, CUgraph g, unsigned long long)
{
    call c("cuGraphInstantiate", call::CONTEXT);
    if (c.code) return c.code;
    if (!out || !drv().graphs.count(g)) return c(CUDA_ERROR_INVALID_VALUE);
    *out = new CUgraphExec_st;
    (*out)->ctx = g->ctx;
    (*out)->graph = clone(g);
    drv().execs.insert(*out);
    return CUDA_SUCCESS;
}

EMU_API CUresult cuGraphExecDestroy(CUgraphExec e)
{
    call c("cuGraphExecDestroy", call::INIT);
    if (c.code) return c.code;
    if (!drv().execs.erase(e)) return c(CUDA_ERROR_INVALID_VALUE);
    delete e;
    return CUDA_SUCCESS;
}

// The nodes lie in an order in which each follows what it depends on: capture made them so.
static op_ptr run_graph(CUgraphExec_st *e, const std::vector<op_edge> &before)
{
    std::map<const CUgraphNode_st *, op_ptr> ops;
    std::set<const CUgraphNode_st *> inner;
    for (const auto &n : e->graph->nodes) {
        std::vector<op_edge> edges;
        for (const auto &d : n->edges) {
            edges.push_back({ ops[d.from], d.programmatic });
            inner.insert(d.from);
        }
        if (edges.empty()) edges = before;
        ops[n.get()] = submit(e->ctx, n->w, edges);
    }
    std::vector<op_edge> leaves = before;
    for (const auto &o : ops)
        if (!inner.count(o.first)) leaves.push_back({ o.second, false });
    return submit(e->ctx, work(), leaves);
}

EMU_API CUresult cuGraphLaunch(CUgraphExec e, CUstream handle)
{
    call c("cuGraphLaunch", call::CONTEXT);
    CUstream_st *s = c.stream(handle);
    if (!s) return c.code;
    if (!drv().execs.count(e)) return c(CUDA_ERROR_INVALID_VALUE);
    if (s->cap) return c(check_not_capturing(s));       // child graphs
    std::vector<op_edge> before = edges_before(s, false);
    if (e->last) before.push_back({ e->last, false });
    e->last = run_graph(e, before);
    return c(set_tail(s, e->last));
}

EMU_API CUresult cuGraphUpload(CUgraphExec e, CUstream handle)
{
    call c("cuGraphUpload", call::CONTEXT);
    if (!c.stream(handle)) return c.code;
    return c(drv().execs.count(e) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE);
}

// 0: `to` may take `from`'s parameters; else a CU_GRAPH_EXEC_UPDATE_ERROR_...
static int update_error(const CUgraph_st *to, const CUgraph_st *from)
{
    if (to->nodes.size() != from->nodes.size()) return 2;
    for (size_t i = 0; i < to->nodes.size(); i++) {
        const CUgraphNode_st *a = to->nodes[i].get(), *b = from->nodes[i].get();
        if (a->type != b->type) return 3;
        if (a->edges.size() != b->edges.size()) return 2;
        for (size_t k = 0; k < a->edges.size(); k++) {
            size_t at = 0;
            while (at < i && to->nodes[at].get() != a->edges[k].from) at++;
            if (from->nodes[at].get() != b->edges[k].from) return 2;
        }
    }
    return 0;
}

EMU_API CUresult cuGraphExecUpdate_v2(CUgraphExec e, CUgraph g, CUgraphExecUpdateResultInfo *info)
{
    call c("cuGraphExecUpdate", call::CONTEXT);
    if (c.code) return c.code;
    if (!info || !drv().execs.count(e) || !drv().graphs.count(g)) return c(CUDA_ERROR_INVALID_VALUE);
    *info = { update_error(e->graph.get(), g), nullptr, nullptr };
    if (info->result) return c(CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE);
    e->graph = clone(g);
    return CUDA_SUCCESS;
}
