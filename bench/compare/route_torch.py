"""route_torch.py - routing as torch does it, and as vLLM's and SGLang's own kernels do where they are installed

    python3 bench/compare/route_torch.py [result.json]

E256 k8, logits to ids, weights and the expert-sorted order; each implementation captured in graphs of 10 and of 60, the
slope between them per call, median of 25. The same rows as bench_gpu.c's route_permute.
"""
import json
import sys

import torch

E, K, TILE = 256, 8, 8
TOKENS = [1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
SHORT, LONG, REPEATS = 10, 60, 25


def torch_softmax(logits):
    weights, ids = torch.topk(torch.softmax(logits.float(), dim=-1), K, dim=-1)
    return ids, weights / weights.sum(dim=-1, keepdim=True)


def torch_deepseek(logits):
    """Sigmoid scores, 8 groups ranked by the sum of their two best, 4 kept."""
    scores = torch.sigmoid(logits.float())
    tokens = scores.shape[0]
    groups = scores.view(tokens, 8, E // 8).topk(2, dim=-1)[0].sum(dim=-1)
    kept = torch.zeros_like(groups).scatter_(1, groups.topk(4, dim=-1)[1], 1)
    masked = scores.masked_fill(kept.repeat_interleave(E // 8, dim=1) == 0, float("-inf"))
    ids = masked.topk(K, dim=-1)[1]
    weights = scores.gather(1, ids)
    return ids, weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)


def torch_align(ids):
    order = torch.sort(ids.flatten(), stable=True)[1]
    counts = torch.zeros(E, dtype=torch.int64, device=ids.device).scatter_add_(
        0, ids.flatten(), torch.ones_like(ids.flatten()))
    return order, torch.cumsum((counts + TILE - 1) // TILE * TILE, 0)


def with_torch_align(route):
    def run(logits):
        ids, weights = route(logits)
        return ids, weights, torch_align(ids)
    return run


def vllm_rows():
    try:
        from vllm import _custom_ops as ops
        from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
    except Exception as error:
        print("vLLM is left out:", error)
        return {}

    def softmax(logits):
        tokens = logits.shape[0]
        weights = torch.empty(tokens, K, dtype=torch.float32, device="cuda")
        ids = torch.empty(tokens, K, dtype=torch.int32, device="cuda")
        source = torch.empty(tokens, K, dtype=torch.int32, device="cuda")
        ops.topk_softmax(weights, ids, source, logits.float(), True)
        return ids, weights, moe_align_block_size(ids, TILE, E)
    return {("vllm", "E256 k8 softmax"): softmax}


def record(run, inputs, nodes):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(nodes):
            run(inputs[i % len(inputs)])
    return graph


def milliseconds(graph):
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def slope(run, inputs):
    for _ in range(3):
        run(inputs[0])
    torch.cuda.synchronize()
    short, long = record(run, inputs, SHORT), record(run, inputs, LONG)
    for _ in range(3):
        milliseconds(short), milliseconds(long)
    times = sorted((milliseconds(long) - milliseconds(short)) * 1e3 / (LONG - SHORT) for _ in range(REPEATS))
    return times[len(times) // 2], times[0], times[-1]


def main():
    stages = {("torch", "E256 k8 softmax"): with_torch_align(torch_softmax),
              ("torch", "E256 k8 DeepSeek-V3"): with_torch_align(torch_deepseek)}
    stages.update(vllm_rows())
    rows = []
    for (who, layer), run in stages.items():
        for tokens in TOKENS:
            inputs = [torch.randn(tokens, E, device="cuda") for _ in range(min(LONG, max(2, 1 << 20 // tokens)))]
            try:
                us, least, most = slope(run, inputs)
            except Exception as error:
                print(f"{who} {layer} T {tokens}: {error}")
                continue
            print(f"{who:8s} {layer:22s} {tokens:6d} {us:9.2f} {least:9.2f} {most:9.2f}", flush=True)
            rows.append({"layer": layer, "format": "", "load": "uniform", "tokens": tokens, "stage": "route_permute",
                         "us": round(us, 3), "us_min": round(least, 3), "us_max": round(most, 3), "config": who})
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            json.dump({"chip": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
