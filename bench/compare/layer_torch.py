"""layer_torch.py - whole bf16 layers as torch and a plain Triton layer do them, beside moe.h in the same process

    make lib && python3 bench/compare/layer_torch.py [result.json [30B|235B]]

Softmax, top-k, renormalised, SwiGLU; logits to output ("layer"), and both products with the activation ("gemms"):
  torch   torch._grouped_mm twice, with torch's own top-k, sort, gather, silu, scatter-add
  triton  one grouped GEMM kernel twice, torch's top-k and sums; of CONFIGS the fastest for each number of tokens
  moe.h   build/libmoe.so after moe_plan_autotune(), on torch's memory and stream
  stream  a Triton kernel that only reads as many bytes of the weights
Results are compared first. Then graphs are replayed, each of the six once in a round, two graphs with different logits
in turn; median, least and most of 25 rounds. Up to 512 tokens a time is the slope between graphs of few and of many
layers, each layer with logits of its own; from 1,024 on it is one layer, each after 60 ms of idle ("rested").
"""
import ctypes
import datetime
import json
import os
import struct
import sys
import time

import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

E, K = 128, 8
SHAPES = {"Qwen3-30B": (2048, 768), "Qwen3-235B": (4096, 1536)}  # H, I
TOKENS = [1, 8, 32, 64, 128, 256, 512, 1024, 2048, 8192]
FEW, MANY, REPEATS, RESTED_FROM, REST_S = 4, 14, 25, 1024, 0.06
NEAR = 2e-2  # of the largest value of a row
# BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, warps, stages
CONFIGS = [(16, 64, 128, 1, 4, 4), (16, 128, 64, 1, 4, 4), (16, 128, 128, 1, 4, 3), (32, 64, 128, 1, 4, 4),
           (32, 128, 64, 1, 4, 4), (64, 64, 128, 8, 4, 3), (64, 128, 64, 8, 4, 4), (64, 128, 128, 8, 8, 3),
           (128, 128, 64, 8, 8, 4), (128, 256, 64, 8, 8, 3)]
ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")


# ---- moe.h ----

BACKEND_CUDA, DTYPE_BF16, GATE_UP, DOWN, HALVES_GATE_UP, MEMORY_DEVICE, INPUT_LOGITS = 2, 2, 3, 4, 2, 1, 1


def read_layout():
    """{struct: {member: (offset, size)}}; member "": size of the whole."""
    layout = {}
    with open(os.path.join(ROOT, "tests", "data", "abi_layout.txt")) as file:
        for what, name, *numbers in map(str.split, file):
            kind, _, member = name.partition(".")
            layout.setdefault(kind, {})[member] = (0, int(numbers[0])) if what == "struct" else tuple(map(int, numbers))
    return layout


class Struct:
    """A struct of moe.h by name; its members are integers and addresses."""
    layout = read_layout()

    def __init__(self, kind, **members):
        self.at = Struct.layout[kind]
        self.memory = ctypes.create_string_buffer(self.at[""][1])
        if "struct_size" in self.at:
            self["struct_size"] = self.at[""][1]
        for name, value in members.items():
            self[name] = value

    def __setitem__(self, name, value):
        at, size = self.at[name]
        if isinstance(value, list):  # of int64
            struct.pack_into("%dq" % len(value), self.memory, at, *value)
        else:
            struct.pack_into("i" if size == 4 else "q", self.memory, at, value)

    def __getitem__(self, name):
        at, size = self.at[name]
        return struct.unpack_from("i" if size == 4 else "q", self.memory, at)[0]

    def text(self, name):
        at, size = self.at[name]
        return self.memory.raw[at:at + size].split(b"\0")[0].decode()


class Moe:
    """A layer of moe.h with tensors of torch's; room: tokens at most."""
    lib = ctypes.CDLL(os.path.join(ROOT, "build", "libmoe.so"))
    context = ctypes.c_void_p()

    def __init__(self, hidden, inner, gate_up, down, room):
        self.error, self.info = Struct("moe_error"), Struct("moe_plan_info")
        self.weights, self.plan = ctypes.c_void_p(), ctypes.c_void_p()
        config = json.dumps(dict(
            model_type="qwen3_moe", hidden_size=hidden, moe_intermediate_size=inner, num_experts=E,
            num_experts_per_tok=K, norm_topk_prob=True, num_hidden_layers=1, hidden_act="silu",
            torch_dtype="bfloat16")).encode()
        layer = Struct("moe_layer_desc")
        if not Moe.context:
            desc = Struct("moe_context_desc", backend=BACKEND_CUDA, device=torch.cuda.current_device())
            self.call("context_create", desc.memory, ctypes.byref(Moe.context))
        self.call("layer_from_config", config, ctypes.c_size_t(len(config)), None, ctypes.c_size_t(0),
                  ctypes.c_int32(0), layer.memory)
        self.call("weights_create", Moe.context, layer.memory, None, ctypes.byref(self.weights))
        torch.cuda.synchronize()  # moe.h reads the tensors on a stream of its own
        for role, halves, source in ((GATE_UP, HALVES_GATE_UP, gate_up), (DOWN, 0, down)):
            tensor = Struct("moe_tensor", role=role, expert=-1, index=-1, dtype=DTYPE_BF16, rank=3, halves=halves,
                            memory=MEMORY_DEVICE, dims=list(source.shape), data=source.data_ptr(),
                            data_bytes=source.numel() * 2)
            self.call("weights_set_tensor", self.weights, tensor.memory)
        self.call("weights_seal", self.weights)
        desc = Struct("moe_plan_desc", max_tokens=room)
        self.call("plan_create", Moe.context, layer.memory, desc.memory, ctypes.byref(self.plan))
        self.call("plan_autotune", self.plan, self.weights, None)
        self.call("plan_get_info", self.plan, self.info.memory)
        self.workspace = torch.empty(self.info["workspace_bytes"] + 256, dtype=torch.uint8, device="cuda")

    def call(self, name, *args):
        if getattr(Moe.lib, "moe_" + name)(*args, self.error.memory) != 0:
            raise RuntimeError(self.error.text("text"))

    def config(self, tokens):
        """Token rows of the tiles that a call of so many tokens gets."""
        info = Struct("moe_plan_info", tiles_tokens=tokens)
        self.call("plan_get_info", self.plan, info.memory)
        return "%d rows" % info["tile_rows"]

    def run(self, x, logits):
        out = torch.empty_like(x)
        address = self.workspace.data_ptr()
        args = Struct("moe_execute_args", input_mode=INPUT_LOGITS, num_tokens=x.shape[0], x=x.data_ptr(),
                      logits=logits.data_ptr(), out=out.data_ptr(), workspace=-address % 256 + address,
                      workspace_bytes=self.info["workspace_bytes"])
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        if Moe.lib.moe_execute(self.plan, self.weights, args.memory, stream) != 0:
            self.call("execute_check", self.plan, self.weights, args.memory)  # says why
            raise RuntimeError("a launch was refused")
        return out

    def close(self):
        Moe.lib.moe_plan_destroy(self.plan)
        Moe.lib.moe_weights_destroy(self.weights)


# ---- torch ----

def route(logits):
    weights, ids = torch.topk(torch.softmax(logits, dim=-1), K, dim=-1)
    return ids, weights / weights.sum(dim=-1, keepdim=True)


def count(ids):
    return torch.zeros(E, dtype=torch.int64, device=ids.device).scatter_add_(
        0, ids.flatten(), torch.ones_like(ids.flatten()))


class Torch:
    def __init__(self, gate_up, down):
        self.gate_up, self.down = gate_up.transpose(1, 2), down.transpose(1, 2)

    def sort(self, x, ids):
        order = torch.sort(ids.flatten(), stable=True)[1]
        return order, torch.cumsum(count(ids), 0).to(torch.int32), x[order // K]

    def first(self, rows, ends):
        return torch._grouped_mm(rows, self.gate_up, offs=ends)

    def activate(self, halves):
        gate, up = halves.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def second(self, rows, ends):
        return torch._grouped_mm(rows, self.down, offs=ends)

    def run(self, x, logits):
        ids, weights = route(logits)
        order, ends, rows = self.sort(x, ids)
        rows = self.second(self.activate(self.first(rows, ends)), ends)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        out.index_add_(0, order // K, rows * weights.flatten()[order, None])
        return out.to(x.dtype)

    def gemms(self, x, logits):
        _, ends, rows = self.sort(x, route(logits)[0])
        return lambda: self.second(self.activate(self.first(rows, ends)), ends)


# ---- Triton ----

@triton.jit(do_not_specialize=["slots", "blocks"])
def grouped_gemm(a, b, c, slot_of_row, expert_of_block, weights, N, D, experts, slots, blocks, per_row,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
                 GATED: tl.constexpr):
    """c[slot] = a[slot // per_row] b[expert]^T: times the slot's weight, or silu(gate) * up where b has both [2N, D].

    BLOCK_M rows of one expert in a block, padded with the slot `slots`; BLOCK_N rows of b; N and D divide evenly.
    """
    COLUMNS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    tiles = N // COLUMNS
    pid = tl.program_id(0)
    first = pid // (GROUP_M * tiles) * GROUP_M
    height = tl.minimum(blocks - first, GROUP_M)
    within = pid % (GROUP_M * tiles)
    block = first + within % height
    expert = tl.load(expert_of_block + block).to(tl.int64)
    if expert >= experts:
        return
    slot = tl.load(slot_of_row + block * BLOCK_M + tl.arange(0, BLOCK_M))
    here = slot < slots
    column = within // height * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, BLOCK_K)
    a_at = a + (slot // per_row)[:, None] * D + k[None, :]
    b_at = b + expert * (N * 2 if GATED else N) * D + column[None, :] * D + k[:, None]
    sums = tl.zeros((BLOCK_M, COLUMNS), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, COLUMNS), dtype=tl.float32)
    for _ in range(0, D // BLOCK_K):
        rows = tl.load(a_at, mask=here[:, None], other=0.0)
        sums = tl.dot(rows, tl.load(b_at), sums)
        if GATED:
            up = tl.dot(rows, tl.load(b_at + N * D), up)
        a_at += BLOCK_K
        b_at += BLOCK_K
    if GATED:
        sums = sums * tl.sigmoid(sums) * up
    else:
        sums = sums * tl.load(weights + slot, mask=here, other=0.0)[:, None]
    tl.store(c + slot[:, None] * N + column[None, :], sums.to(c.dtype.element_ty), mask=here[:, None])


class Triton:
    def __init__(self, gate_up, down, config):
        self.gate_up, self.down, self.config = gate_up, down, config

    def sort(self, ids):
        """Slots in the order of experts, each expert's padded to whole blocks; the expert of each block, or E."""
        slots, tile = ids.numel(), self.config[0]
        if slots * 4 <= E:  # a block for each slot is cheaper than a sort
            rows = torch.full((slots, tile), slots, dtype=torch.int32, device=ids.device)
            rows[:, 0] = torch.arange(slots, device=ids.device)
            return rows, ids.flatten(), slots
        active = min(E, slots)
        blocks = (slots - active) // tile + active
        counts = count(ids)
        padded = (counts + tile - 1) // tile * tile
        ends = torch.cumsum(padded, 0)
        experts, order = torch.sort(ids.flatten(), stable=True)
        shift = ends - padded - (torch.cumsum(counts, 0) - counts)  # of an expert's rows by the padding before it
        at = torch.arange(slots, device=ids.device) + shift[experts]
        rows = torch.full((blocks * tile,), slots, dtype=torch.int32, device=ids.device)
        rows[at] = order.to(torch.int32)
        starts = torch.arange(0, blocks * tile, tile, device=ids.device)
        return rows, torch.searchsorted(ends, starts, right=True), blocks

    def product(self, a, b, out, order, weights, per_row):
        tile_m, tile_n, tile_k, group, warps, stages = self.config
        rows, experts, blocks = order
        gated = weights is None
        width = out.shape[1]
        grid = (blocks * (width // (tile_n // 2 if gated else tile_n)),)
        grouped_gemm[grid](a, b, out, rows, experts, out if gated else weights, width, b.shape[2], E, out.shape[0],
                           blocks, per_row, BLOCK_M=tile_m, BLOCK_N=tile_n, BLOCK_K=tile_k, GROUP_M=group, GATED=gated,
                           num_warps=warps, num_stages=stages)

    def multiply(self, x, weights, order):
        slots = x.shape[0] * K
        inner = torch.empty(slots, self.down.shape[2], dtype=x.dtype, device=x.device)
        rows = torch.empty(slots, x.shape[1], dtype=x.dtype, device=x.device)
        self.product(x, self.gate_up, inner, order, None, K)
        self.product(inner, self.down, rows, order, weights, 1)
        return rows

    def run(self, x, logits):
        ids, weights = route(logits)
        return self.multiply(x, weights, self.sort(ids)).view(-1, K, x.shape[1]).sum(dim=1)

    def gemms(self, x, logits):
        ids, weights = route(logits)
        order = self.sort(ids)
        return lambda: self.multiply(x, weights, order)


# ---- stream ----

@triton.jit
def read(a, b, sums, start, blocks, a_blocks, all_blocks, BLOCK: tl.constexpr):
    """Reads `blocks` blocks of a and b, which have all_blocks together, from block `start` on and around."""
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for i in range(tl.program_id(0), blocks, tl.num_programs(0)):
        block = ((start + i) % all_blocks).to(tl.int64)
        at = tl.where(block < a_blocks, a + block * BLOCK, b + (block - a_blocks) * BLOCK)
        total += tl.load(at + tl.arange(0, BLOCK))
    tl.store(sums + tl.program_id(0), tl.sum(total))


class Stream:
    """Reads that follow each other read different weights, so that none are in the L2."""
    BLOCK = 8192

    def __init__(self, gate_up, down, size):
        self.a, self.b = gate_up.view(torch.int32), down.view(torch.int32)
        self.parts, self.all = self.a.numel() // self.BLOCK, (self.a.numel() + self.b.numel()) // self.BLOCK
        self.blocks, self.next = round(size / 4 / self.BLOCK), 0
        self.grid = 8 * torch.cuda.get_device_properties(0).multi_processor_count
        self.sums = torch.empty(self.grid, dtype=torch.int32, device=gate_up.device)

    def gemms(self, x, logits):
        start, self.next = self.next, (self.next + self.blocks) % self.all
        return lambda: read[(self.grid,)](self.a, self.b, self.sums, start, self.blocks, self.parts, self.all,
                                          BLOCK=self.BLOCK, num_warps=8)


# ---- timing ----

def record(nodes):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for node in nodes:
            node()
    return graph


def microseconds(graph):
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


class Timing:
    """Graphs of one stage: of each of two sets of inputs, a short one and, below RESTED_FROM tokens, a long one."""

    def __init__(self, make, inputs, rested):
        self.times, self.rested, self.graphs = [], rested, []
        self.nodes = [make(logits) for logits in inputs]  # kept: the graphs use what they hold
        half = len(inputs) // 2
        for i in range(2):
            mine = self.nodes[i * half:(i + 1) * half]
            self.graphs.append((record(mine),) if rested else (record(mine[:FEW]), record(mine)))
        for graphs in self.graphs:
            for graph in graphs:
                microseconds(graph)
        torch.cuda.synchronize()

    def round(self, index):
        if self.rested:
            time.sleep(REST_S)
            self.times.append(microseconds(self.graphs[index % 2][0]))
        else:
            long, short = self.graphs[index % 2][1], self.graphs[(index + 1) % 2][0]
            self.times.append((microseconds(long) - microseconds(short)) / (MANY - FEW))


def fastest(gate_up, down, x, inputs):
    """The Triton layer with the configuration that takes the least time."""
    best, least, mean = None, float("inf"), x.shape[0] * K / E
    for config in CONFIGS:
        if not mean / 8 <= config[0] <= max(32, 4 * mean):
            continue
        layer = Triton(gate_up, down, config)
        try:
            layer.run(x, inputs[0])
        except OutOfResources:
            continue
        torch.cuda.synchronize()
        graph = record([lambda logits=logits: layer.run(x, logits) for logits in inputs[:2]])
        microseconds(graph)
        us = sorted(microseconds(graph) for _ in range(5))[2]
        if us < least:
            best, least = layer, us
    return best


def compare(results):
    for name, result in results.items():
        for other, values in results.items():
            most = values.float().abs().amax(dim=1)
            apart = ((result.float() - values.float()).abs().amax(dim=1) / most).max().item()
            if not apart < NEAR:
                sys.exit(f"{name} and {other} are {apart:.1e} of a row's largest value apart")


def run_tokens(name, ours, gate_up, down, tokens):
    hidden, inner = SHAPES[name]
    rested = tokens >= RESTED_FROM
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    # No two logits of a token are so near that rounding decides which expert it gets.
    inputs = [torch.rand(tokens, E, device="cuda").argsort(dim=1).float() / 32
              for _ in range(2 if rested else 2 * MANY)]
    theirs, plain = Torch(gate_up, down), fastest(gate_up, down, x, inputs)
    compare({"torch": theirs.run(x, inputs[0]), "triton": plain.run(x, inputs[0]), "moe.h": ours.run(x, inputs[0])})
    active = sum((count(route(logits)[0]) > 0).sum().item() for logits in inputs) / len(inputs)
    stream = Stream(gate_up, down, active * 6 * hidden * inner)
    tiles = "x".join(map(str, plain.config[:3])) + " group %d warps %d stages %d" % plain.config[3:]
    stages = {("torch", "layer", ""): lambda logits: lambda: theirs.run(x, logits),
              ("moe.h", "layer", ours.config(tokens)): lambda logits: lambda: ours.run(x, logits),
              ("triton", "layer", tiles): lambda logits: lambda: plain.run(x, logits),
              ("torch", "gemms", ""): lambda logits: theirs.gemms(x, logits),
              ("triton", "gemms", tiles): lambda logits: plain.gemms(x, logits),
              ("stream", "gemms", ""): lambda logits: stream.gemms(x, logits)}
    timings = {stage: Timing(make, inputs, rested) for stage, make in stages.items()}
    for index in range(REPEATS):
        for timing in timings.values():
            timing.round(index)
    rows = []
    for (who, stage, tiles), timing in timings.items():
        us = sorted(timing.times)
        config = ", ".join(filter(None, (who, "rested" if rested else "", tiles)))
        print(f"{name:12s} {stage:6s} {tokens:6d} {us[REPEATS // 2]:10.2f} {us[0]:10.2f} {us[-1]:10.2f}  {config}",
              flush=True)
        rows.append({"layer": name, "format": "bf16", "load": "uniform", "tokens": tokens, "stage": stage,
                     "us": round(us[REPEATS // 2], 3), "us_min": round(us[0], 3), "us_max": round(us[-1], 3),
                     "bytes": round(active * 6 * hidden * inner + 4 * tokens * hidden),
                     "flops": 6 * tokens * K * hidden * inner, "config": config})
    return rows


def main():
    rows, driver, only = [], ctypes.c_int(), sys.argv[2] if len(sys.argv) > 2 else ""
    torch.manual_seed(1)
    print(f"{'layer':12s} {'stage':6s} {'tokens':>6s} {'us':>10s} {'us min':>10s} {'us max':>10s}")
    for name, (hidden, inner) in SHAPES.items():
        if only not in name:
            continue
        gate_up = torch.randn(E, 2 * inner, hidden, device="cuda", dtype=torch.bfloat16).mul_(hidden ** -0.5)
        down = torch.randn(E, hidden, inner, device="cuda", dtype=torch.bfloat16).mul_(inner ** -0.5)
        ours = Moe(hidden, inner, gate_up, down, max(TOKENS))
        for tokens in TOKENS:
            rows += run_tokens(name, ours, gate_up, down, tokens)
        torch.cuda.synchronize()
        ours.close()
        del ours, gate_up, down
        torch.cuda.empty_cache()
    Moe.lib.moe_context_destroy(Moe.context)
    if len(sys.argv) > 1:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(driver))
        result = {"chip": torch.cuda.get_device_name(), "driver": str(driver.value),
                  "commit": os.environ.get("MOE_COMMIT", ""), "date": str(datetime.date.today()), "ceilings": {},
                  "torch": torch.__version__, "triton": triton.__version__, "rows": rows}
        with open(sys.argv[1], "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
