#!/usr/bin/env python3
"""Makes the golden data: tiny checkpoints in each family's released file layout, and what transformers computes from them.

    make_golden.py [family ...]        all families when none is named

Each family function below describes one folder: the released config.json with tiny sizes (compare_transformers.py gives some
families others), the tensors of one MoE layer under their released names, and where the block sits in the model. make() draws
the tensors, writes the folder, lets transformers' own loader read it back (so the names, the orientation and the order of the
halves are its judgement, not ours), runs the MoE block in fp32 with the eager experts, and stores what went in and came out.
README.md says what is stored.
"""

import dataclasses
import json
import math
import os
import sys
import zlib
from pathlib import Path
from typing import Callable, Optional

import numpy as np
import torch
import torch.nn.functional as F
import transformers

HERE = Path(__file__).resolve().parent
BF16, F16, F32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int64
DTYPE_NAMES = {BF16: "BF16", F16: "F16", F32: "F32", I64: "I64", torch.int32: "I32"}
TIE = 1e-6  # a token whose k-th and (k+1)-th selection keys are closer than this may be routed either way


# ---- tensors ----------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Param:
    """A checkpoint tensor: shape, distribution, and stored type where it differs from the family's."""
    shape: tuple
    std: float
    mean: float = 0.0
    dtype: Optional[torch.dtype] = None
    values: Optional[Callable] = None  # draws from the generator instead of the normal distribution


def matrix(*shape, fan_in=None, gain=1.0, dtype=None):
    return Param(shape, gain / math.sqrt(fan_in or shape[-1]), dtype=dtype)


def vector(*shape, std, mean=0.0, dtype=None):
    return Param(shape, std, mean, dtype)


def selection_bias(*shape, size):
    """Evenly spread over both signs and shuffled, so that it moves choices without starving an expert."""
    def values(rng):
        spread = np.linspace(-size, size, math.prod(shape)) + rng.uniform(-0.1, 0.1, math.prod(shape)) * size
        return torch.from_numpy(rng.permutation(spread).reshape(shape).astype(np.float32))
    return Param(shape, size, dtype=F32, values=values)


def mlp(prefix, H, I, names=("gate_proj", "up_proj", "down_proj")):
    gate, up, down = names
    return {f"{prefix}.{gate}.weight": matrix(I, H), f"{prefix}.{up}.weight": matrix(I, H), f"{prefix}.{down}.weight": matrix(H, I)}


def experts(prefix, E, H, I, names=("gate_proj", "up_proj", "down_proj")):
    return {k: v for e in range(E) for k, v in mlp(f"{prefix}.{e}", H, I, names).items()}


def generator(*names):
    return np.random.default_rng([zlib.crc32(n.encode()) for n in names])


def draw(param, default, *names):
    rng = generator(*names)
    if param.values:
        return param.values(rng)
    noise = rng.standard_normal(param.shape, dtype=np.float32) * np.float32(param.std) + np.float32(param.mean)
    return torch.from_numpy(noise).to(param.dtype or default)


# ---- files ------------------------------------------------------------------------------------------------------------------

def write_safetensors(path, tensors, metadata):
    """The safetensors package writes several metadata keys in random order; this writes the same bytes every time."""
    order = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
    header, offset = {"__metadata__": dict(sorted(metadata.items()))}, 0
    for name in order:
        t, size = tensors[name], tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            f.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def write_checkpoint(folder, tensors, shards):
    """Cuts the tensors, in the order given, into shards of equal size, so experts (and often the router) are split between files."""
    size = {n: t.numel() * t.element_size() for n, t in tensors.items()}
    total = sum(size.values())
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
        return
    files, done = {}, 0
    for name in tensors:
        file = f"model-{done * shards // total + 1:05}-of-{shards:05}.safetensors"
        files.setdefault(file, {})[name] = tensors[name]
        done += size[name]
    assert len(files) == shards
    for file, part in files.items():
        write_safetensors(folder / file, part, {"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted((n, f) for f, part in files.items() for n in part))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def fnv1a64(data):
    h = 0xCBF29CE484222325
    for byte in data:
        h = ((h ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return h


# ---- selection: only to list ties, and to prove that biases and routing do something -------------------------------------------

@dataclasses.dataclass
class Selection:
    """What top-k ranks: score(logits) + bias, in groups or not."""
    score: str = "softmax"
    bias: Optional[str] = None       # suffix of the bias tensor under the layer's prefix
    groups: Optional[tuple] = None   # (number of groups, groups kept, "max" | "top2")
    prune: Optional[float] = None    # SparseMixer's threshold: a second kind of tie
    multiplier: float = 1.0          # of the logits, before the score
    experts: int = 0                 # experts that can be chosen, where the router scores more

    SCORES = {
        "raw": lambda x: x,
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        "softmax": lambda x: np.exp(x - x.max(-1, keepdims=True)) / np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True),
        "sqrtsoftplus": lambda x: np.sqrt(np.logaddexp(0, x)),
    }

    def pick(self, logits, bias, k):
        """ids as sets, and each token's smallest distance to another choice"""
        logits = logits.astype(np.float64) * self.multiplier
        key = self.SCORES[self.score](logits) + (0 if bias is None else bias.astype(np.float64))
        gap = np.full(len(key), np.inf)
        if self.groups:
            n, keep, rule = self.groups
            members = np.sort(key.reshape(len(key), n, -1), axis=-1)[:, :, ::-1]
            score = members[:, :, 0] if rule == "max" else members[:, :, :2].sum(-1)
            order = np.sort(score, axis=-1)[:, ::-1]
            gap = order[:, keep - 1] - order[:, keep]
            dropped = score < order[:, keep - 1 : keep]
            key = np.where(np.repeat(dropped, key.shape[1] // n, axis=1), -np.inf, key)
        order = np.sort(key, axis=-1)[:, ::-1]
        gap = np.minimum(gap, order[:, k - 1] - order[:, k])
        if self.prune:
            best = np.sort(logits, axis=-1)[:, ::-1]
            for m in (best[:, :1], best[:, 1:2]):
                gap = np.minimum(gap, np.abs((m - logits) / np.maximum(np.abs(logits), m) - self.prune).min(-1))
        return [set(row) for row in np.argsort(-key, axis=-1, kind="stable")[:, :k]], gap


# ---- running a block ----------------------------------------------------------------------------------------------------------

def watch(module, seen, key):
    def hook(_, args, kwargs, output):
        seen[key] = ([*args, *kwargs.values()], output)
    return module.register_forward_hook(hook, with_kwargs=True)


def run_block(block, x, router="gate", **extra):
    """The common shape: router(x) -> (logits, weights, ids), experts(x, ids, weights), block(x) -> out (or a tuple that starts with it)."""
    seen = {}
    hooks = [watch(block.get_submodule(router), seen, "router"), watch(block.experts, seen, "experts")]
    out = block(x[None], **extra)
    for hook in hooks:
        hook.remove()
    logits, weights, ids = seen["router"][1][:3]
    inputs, routed = seen["experts"]
    assert torch.equal(inputs[0].reshape(x.shape), x), "experts must have read x"
    out = out[0] if isinstance(out, tuple) else out
    return dict(logits=logits, ids=ids, weights=weights, routed=routed.reshape(x.shape), out=out.reshape(x.shape))


@dataclasses.dataclass
class Family:
    architecture: str                    # transformers' class
    config: dict                         # config.json
    layers: dict                         # MoE layer number -> {checkpoint name: Param}
    block: str                           # path of the MoE block in transformers' model, {n} the layer
    prefix: str                          # the block's prefix in the checkpoint
    select: Selection
    hidden: int                          # width of the tokens drawn
    parts: tuple = ("",)                 # what of it the checkpoint must fill (all of it, or submodules)
    dtype: torch.dtype = BF16
    shards: int = 2
    tokens: int = 24
    x_std: float = 1.0
    run: Callable = run_block            # (block, x) -> dict of golden tensors
    token_ids: int = 0                   # vocabulary, where routing needs token ids
    hash_layers: tuple = ()
    for_transformers: Optional[dict] = None  # the config as transformers must have it, where it cannot read the released one
    finish: Optional[Callable] = None    # (block, tensors): loads what transformers' loader cannot
    note: str = ""


FAMILIES = {}


def family(function):
    FAMILIES[function.__name__] = function
    return function


def draw_tensors(name, f):
    return {t: draw(p, f.dtype, name, t) for layer in f.layers.values() for t, p in layer.items()}


def write_folder(folder, f, tensors):
    (folder / "config.json").write_text(json.dumps(f.config, indent=2) + "\n")
    write_checkpoint(folder, tensors, f.shards)


def load(folder, f, dtype=F32):
    """transformers reads the folder; every MoE tensor must be found and used."""
    cls = getattr(transformers, f.architecture)
    config = cls.config_class.from_dict(f.for_transformers) if f.for_transformers else None
    model, info = cls.from_pretrained(folder, config=config, dtype=dtype, experts_implementation="eager",
                                      ignore_mismatched_sizes=f.finish is not None, output_loading_info=True)
    blocks = tuple((f"{f.block.format(n=n)}.{part}".rstrip(".") + ".") for n in f.layers for part in f.parts)
    missing = [k for k in info["missing_keys"] if k.startswith(blocks)]
    mismatched = [] if f.finish else info["mismatched_keys"]
    assert not (info["unexpected_keys"] or missing or mismatched), (missing, info)
    return model.eval()


def check_parameters(block):
    for name, t in [*block.named_parameters(), *block.named_buffers()]:
        t = t.detach().double()
        assert t.isfinite().all(), name
        assert t.std() > 0 if t.numel() > 1 else t.item() not in (0.0, 1.0), f"{name} is constant"


def make(name):
    f = FAMILIES[name]()
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    tensors = draw_tensors(name, f)
    write_folder(folder, f, tensors)
    model = load(folder, f)

    golden, meta = {}, {
        "family": name, "architecture": f.config["architectures"][0], "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0], "dtype": DTYPE_NAMES[f.dtype], "layers": ",".join(map(str, f.layers)),
    }
    if f.note:
        meta["note"] = f.note
    for n in f.layers:
        block = model.get_submodule(f.block.format(n=n))
        if f.finish:
            f.finish(block, {t.removeprefix(f.prefix.format(n=n) + "."): tensors[t] for t in f.layers[n]})
        for part in f.parts:
            check_parameters(block.get_submodule(part))
        x = draw(Param((f.tokens, f.hidden), f.x_std), BF16, name, f"x.{n}").float()
        extra = {}
        if n in f.hash_layers:
            ids = torch.from_numpy(generator(name, f"token_ids.{n}").integers(0, f.token_ids, f.tokens))
            golden[f"layers.{n}.token_ids"] = ids
            extra["input_ids"] = ids[None]
        with torch.no_grad():
            result = dict(x=x) | f.run(block, x, **extra)
        result["ids"] = result["ids"].to(torch.int32)
        for key, value in result.items():
            assert value.isfinite().all(), key
            golden[f"layers.{n}.{key}"] = value.detach().clone()
        meta[f"tied_tokens.{n}"] = json.dumps(check_routing(f, n, result, tensors))
    write_safetensors(folder / "golden.safetensors", golden, meta)
    files = sorted(p for p in folder.iterdir())
    (folder / "CHECKSUMS").write_text("".join(f"{fnv1a64(p.read_bytes()):016x}  {p.name}\n" for p in files))
    print(f"{name}: {sum(p.stat().st_size for p in folder.iterdir()) / 1024:.0f} KiB")


def check_routing(f, n, result, tensors):
    """Every expert used, the selection understood, the bias felt; returns the tokens that a last bit could route otherwise."""
    logits, ids = result["logits"].numpy(), result["ids"].numpy()
    assert len({frozenset(row) for row in ids.tolist()}) > 1
    if n in f.hash_layers:
        return []
    E = f.select.experts or logits.shape[1]
    assert set(ids.ravel()) == set(range(E)), f"layer {n}: unused experts {set(range(E)) - set(ids.ravel())}"
    bias = tensors[f"{f.prefix.format(n=n)}.{f.select.bias}"].float().numpy().reshape(-1) if f.select.bias else None
    picked, gap = f.select.pick(logits[:, :E], bias, ids.shape[1])
    tied = np.flatnonzero(gap < TIE).tolist()
    assert all(set(row) == pick or t in tied for t, (row, pick) in enumerate(zip(ids.tolist(), picked))), "selection differs"
    if bias is not None:
        assert (bias < 0).any() and (bias > 0).any()
        unbiased, _ = f.select.pick(logits[:, :E], None, ids.shape[1])
        assert 0 < sum(a != b for a, b in zip(picked, unbiased)), "bias changes nothing"
    return tied


# ---- families -----------------------------------------------------------------------------------------------------------------

W123 = ("w1", "w3", "w2")  # gate, up, down under Mixtral's names


def layers(prefix, numbers, tensors):
    return {n: tensors(prefix.format(n=n)) for n in numbers}


@family
def mixtral(E=8, k=2, H=64, I=40):
    prefix = "model.layers.{n}.block_sparse_moe"
    return Family(
        "MixtralForCausalLM",
        {"architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
         "hidden_size": H, "initializer_range": 0.02, "intermediate_size": I, "max_position_embeddings": 32768, "model_type": "mixtral",
         "num_attention_heads": 4, "num_experts_per_tok": k, "num_hidden_layers": 1, "num_key_value_heads": 2, "num_local_experts": E,
         "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
         "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0",
         "use_cache": True, "vocab_size": 128},
        layers(prefix, (0,), lambda p: experts(p + ".experts", E, H, I, W123) | {p + ".gate.weight": matrix(E, H)}),
        "model.layers.{n}.mlp", prefix, Selection("softmax"), H, shards=3)


@family
def qwen2_moe(E=12, k=4, H=64, I=32, shared=72):
    prefix = "model.layers.{n}.mlp"
    return Family(
        "Qwen2MoeForCausalLM",
        {"architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 1, "hidden_act": "silu",
         "hidden_size": H, "initializer_range": 0.02, "intermediate_size": 88, "max_position_embeddings": 8192, "max_window_layers": 1,
         "model_type": "qwen2_moe", "num_attention_heads": 4, "num_hidden_layers": 1, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
         "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
         "transformers_version": "4.39.0.dev0", "use_cache": True, "use_sliding_window": False, "vocab_size": 128,
         "decoder_sparse_step": 1, "moe_intermediate_size": I, "shared_expert_intermediate_size": shared, "num_experts_per_tok": k,
         "num_experts": E, "norm_topk_prob": False, "output_router_logits": False, "router_aux_loss_coef": 0.001},
        layers(prefix, (0,), lambda p: experts(p + ".experts", E, H, I) | mlp(p + ".shared_expert", H, shared) | {
            p + ".gate.weight": matrix(E, H), p + ".shared_expert_gate.weight": matrix(1, H)}),
        prefix, prefix, Selection("softmax"), H)


@family
def qwen3_moe(E=16, k=4, H=72, I=40):
    prefix = "model.layers.{n}.mlp"
    return Family(
        "Qwen3MoeForCausalLM",
        {"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
         "decoder_sparse_step": 1, "eos_token_id": 2, "head_dim": 16, "hidden_act": "silu", "hidden_size": H, "initializer_range": 0.02,
         "intermediate_size": 88, "max_position_embeddings": 40960, "max_window_layers": 3, "mlp_only_layers": [0],
         "model_type": "qwen3_moe", "moe_intermediate_size": I, "norm_topk_prob": True, "num_attention_heads": 4, "num_experts": E,
         "num_experts_per_tok": k, "num_hidden_layers": 3, "num_key_value_heads": 2, "output_router_logits": False,
         "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
         "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
         "use_sliding_window": False, "vocab_size": 128},
        layers(prefix, (1, 2), lambda p: experts(p + ".experts", E, H, I) | {p + ".gate.weight": matrix(E, H)}),
        prefix, prefix, Selection("softmax"), H, shards=3, tokens=64)


@family
def qwen3_next(E=8, k=3, H=64, I=40, shared=56):
    prefix = "model.layers.{n}.mlp"
    return Family(
        "Qwen3NextForCausalLM",
        {"architectures": ["Qwen3NextForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
         "decoder_sparse_step": 1, "eos_token_id": 2, "full_attention_interval": 1, "head_dim": 16, "hidden_act": "silu",
         "hidden_size": H, "initializer_range": 0.02, "intermediate_size": 88, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16,
         "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_value_head_dim": 16, "max_position_embeddings": 262144,
         "mlp_only_layers": [], "model_type": "qwen3_next", "moe_intermediate_size": I, "norm_topk_prob": True,
         "num_attention_heads": 4, "num_experts": E, "num_experts_per_tok": k, "num_hidden_layers": 1, "num_key_value_heads": 2,
         "output_router_logits": False, "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06, "rope_scaling": None,
         "rope_theta": 10000000, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": shared, "tie_word_embeddings": False,
         "torch_dtype": "bfloat16", "transformers_version": "4.57.0.dev0", "use_cache": True, "vocab_size": 128},
        layers(prefix, (0,), lambda p: experts(p + ".experts", E, H, I) | mlp(p + ".shared_expert", H, shared) | {
            p + ".shared_expert_gate.weight": matrix(1, H), p + ".gate.weight": matrix(E, H)}),
        prefix, prefix, Selection("softmax"), H)


@family
def qwen3_5_moe(E=8, k=3, H=64, I=40, shared=72):
    # released fused and output-major; transformers' mapping would also read per-expert names
    prefix = "model.language_model.layers.{n}.mlp"
    return Family(
        "Qwen3_5MoeForConditionalGeneration",
        {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "image_token_id": 120, "model_type": "qwen3_5_moe",
         "text_config": {
             "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True, "dtype": "bfloat16", "eos_token_id": 2,
             "full_attention_interval": 4, "head_dim": 16, "hidden_act": "silu", "hidden_size": H, "initializer_range": 0.02,
             "layer_types": ["linear_attention"], "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16,
             "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_value_head_dim": 16, "mamba_ssm_dtype": "float32",
             "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_5_moe_text", "moe_intermediate_size": I,
             "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "num_attention_heads": 4, "num_experts": E,
             "num_experts_per_tok": k, "num_hidden_layers": 1, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
             "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": shared, "use_cache": True, "vocab_size": 128,
             "rope_parameters": {"mrope_interleaved": True, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25,
                                 "rope_theta": 10000000, "rope_type": "default"}},
         "tie_word_embeddings": False, "transformers_version": "4.57.0.dev0", "video_token_id": 121,
         "vision_config": {"depth": 1, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 32, "in_channels": 3, "initializer_range": 0.02,
                           "intermediate_size": 48, "model_type": "qwen3_5_moe", "num_heads": 2, "num_position_embeddings": 16,
                           "out_hidden_size": H, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
         "vision_end_token_id": 122, "vision_start_token_id": 123},
        layers(prefix, (0,), lambda p: {
            p + ".experts.gate_up_proj": matrix(E, 2 * I, H), p + ".experts.down_proj": matrix(E, H, I), p + ".gate.weight": matrix(E, H),
            p + ".shared_expert_gate.weight": matrix(1, H)} | mlp(p + ".shared_expert", H, shared)),
        prefix, prefix, Selection("softmax"), H)


@family
def deepseek_v2(E=16, k=4, H=64, I=32):
    prefix = "model.layers.{n}.mlp"
    return Family(
        "DeepseekV2ForCausalLM",
        {"architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
         "bos_token_id": 1, "eos_token_id": 2, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": H,
         "initializer_range": 0.02, "intermediate_size": 88, "kv_lora_rank": 16, "max_position_embeddings": 163840,
         "model_type": "deepseek_v2", "moe_intermediate_size": I, "moe_layer_freq": 1, "n_group": 4, "n_routed_experts": E,
         "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 4, "num_experts_per_tok": k, "num_hidden_layers": 2,
         "num_key_value_heads": 4, "pretraining_tp": 1, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
         "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 16.0, "scoring_func": "softmax", "seq_aux": True,
         "tie_word_embeddings": False, "topk_group": 2, "topk_method": "group_limited_greedy", "torch_dtype": "bfloat16",
         "transformers_version": "4.39.3", "use_cache": True, "v_head_dim": 16, "vocab_size": 128},
        layers(prefix, (1,), lambda p: experts(p + ".experts", E, H, I) | {p + ".gate.weight": matrix(E, H)} | mlp(
            p + ".shared_experts", H, 2 * I)),
        prefix, prefix, Selection("softmax", groups=(4, 2, "max")), H)


def deepseek_v3_config(H, I, E, k, groups, keep):
    return {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
        "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": H, "initializer_range": 0.02,
        "intermediate_size": 88, "kv_lora_rank": 16, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
        "moe_intermediate_size": I, "moe_layer_freq": 1, "n_group": groups, "n_routed_experts": E, "n_shared_experts": 1,
        "norm_topk_prob": True, "num_attention_heads": 4, "num_experts_per_tok": k, "num_hidden_layers": 2, "num_key_value_heads": 4,
        "num_nextn_predict_layers": 1, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "rms_norm_eps": 1e-06,
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": keep,
        "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 16,
        "vocab_size": 128}


@family
def deepseek_v3(E=16, k=4, H=64, I=32):
    # released in fp8 blocks; the bf16 form is what NVIDIA and others convert it to
    prefix = "model.layers.{n}.mlp"
    return Family(
        "DeepseekV3ForCausalLM", deepseek_v3_config(H, I, E, k, 4, 2),
        layers(prefix, (1,), lambda p: {
            p + ".gate.weight": matrix(E, H, gain=2.0), p + ".gate.e_score_correction_bias": selection_bias(E, size=0.2)}
            | mlp(p + ".shared_experts", H, I) | experts(p + ".experts", E, H, I)),
        prefix, prefix, Selection("sigmoid", "gate.e_score_correction_bias", (4, 2, "top2")), H, shards=3, tokens=48)


@family
def deepseek_v4():
    # Released names have no "model." (transformers renames ffn -> mlp, gate.bias -> e_score_correction_bias); experts are released
    # in MXFP4, the rest in fp8: here all bf16, so expert_dtype and quantization_config are left out. tid2eid is released as I64.
    E, k, H, I, vocab = 8, 3, 64, 40, 64
    prefix = "layers.{n}.ffn"

    def tensors(p):
        hashed = p == prefix.format(n=0)
        table = Param((vocab, k), 0, values=lambda rng: torch.from_numpy(np.stack([rng.permutation(E)[:k] for _ in range(vocab)])))
        return experts(p + ".experts", E, H, I, W123) | mlp(p + ".shared_experts", H, I, W123) | {
            p + ".gate.weight": matrix(E, H, gain=0.4)} | (
            {p + ".gate.tid2eid": table} if hashed else {p + ".gate.bias": selection_bias(E, size=0.25)})

    return Family(
        "DeepseekV4ForCausalLM",
        {"architectures": ["DeepseekV4ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
         "compress_ratios": [0, 4, 0], "compress_rope_theta": 160000, "eos_token_id": 1, "hc_eps": 1e-06, "hc_mult": 2,
         "hc_sinkhorn_iters": 4, "head_dim": 16, "hidden_act": "silu", "hidden_size": H, "index_head_dim": 16, "index_n_heads": 2,
         "index_topk": 8, "initializer_range": 0.02, "max_position_embeddings": 1048576, "model_type": "deepseek_v4",
         "moe_intermediate_size": I, "n_routed_experts": E, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 4,
         "num_experts_per_tok": k, "num_hash_layers": 1, "num_hidden_layers": 2, "num_key_value_heads": 1,
         "num_nextn_predict_layers": 1, "o_groups": 2, "o_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
         "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 1.5, "scoring_func": "sqrtsoftplus", "sliding_window": 128,
         "swiglu_limit": 10.0, "tie_word_embeddings": False, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
         "transformers_version": "4.57.1", "use_cache": True, "vocab_size": vocab},
        layers(prefix, (0, 1), tensors), "model.layers.{n}.mlp", prefix, Selection("sqrtsoftplus", "gate.bias"), H,
        x_std=5.0, token_ids=vocab, hash_layers=(0,), note="x is large so that swiglu_limit acts; layer 0 is a hash layer")


@family
def glm4_moe(E=8, k=3, H=64, I=40):
    prefix = "model.layers.{n}.mlp"
    return Family(
        "Glm4MoeForCausalLM",
        {"architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "pad_token_id": 0,
         "eos_token_id": [1, 2, 3], "head_dim": 16, "hidden_act": "silu", "hidden_size": H, "partial_rotary_factor": 0.5,
         "initializer_range": 0.02, "intermediate_size": 88, "max_position_embeddings": 131072, "model_type": "glm4_moe",
         "moe_intermediate_size": I, "norm_topk_prob": True, "num_attention_heads": 4, "n_group": 1, "topk_group": 1,
         "n_routed_experts": E, "n_shared_experts": 1, "routed_scaling_factor": 2.5, "num_experts_per_tok": k, "first_k_dense_replace": 1,
         "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000,
         "num_nextn_predict_layers": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.54.0",
         "use_cache": True, "use_qk_norm": True, "vocab_size": 128},
        layers(prefix, (1,), lambda p: experts(p + ".experts", E, H, I) | {
            p + ".gate.e_score_correction_bias": selection_bias(E, size=0.25), p + ".gate.weight": matrix(E, H, gain=2.0, dtype=F32)}
            | mlp(p + ".shared_experts", H, I)),
        prefix, prefix, Selection("sigmoid", "gate.e_score_correction_bias"), H)


@family
def minimax_m2(E=12, k=4, H=72, I=32):
    # released in fp8 blocks: here bf16, without quantization_config; the router is released in f32
    prefix = "model.layers.{n}.block_sparse_moe"
    return Family(
        "MiniMaxM2ForCausalLM",
        {"architectures": ["MiniMaxM2ForCausalLM"], "attention_dropout": 0.0, "attn_type_list": [1], "bos_token_id": None,
         "eos_token_id": None, "head_dim": 16, "hidden_act": "silu", "hidden_size": H, "initializer_range": 0.02, "intermediate_size": I,
         "layernorm_full_attention_beta": 1.0, "layernorm_linear_attention_beta": 1.0, "layernorm_mlp_beta": 1.0,
         "max_position_embeddings": 196608, "mlp_intermediate_size": 88, "model_type": "minimax_m2", "mtp_transformer_layers": 1,
         "num_attention_heads": 4, "num_experts_per_tok": k, "num_hidden_layers": 1, "num_key_value_heads": 2, "num_local_experts": E,
         "num_mtp_modules": 3, "output_router_logits": False, "qk_norm_type": "per_layer", "rms_norm_eps": 1e-06, "rope_theta": 5000000,
         "rotary_dim": 8, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "scoring_func": "sigmoid",
         "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", "sliding_window": None, "tie_word_embeddings": False,
         "transformers_version": "4.46.1", "use_cache": True, "use_mtp": True, "use_qk_norm": True, "use_routing_bias": True,
         "vocab_size": 128},
        layers(prefix, (0,), lambda p: {p + ".e_score_correction_bias": selection_bias(E, size=0.25)} | experts(
            p + ".experts", E, H, I, W123) | {p + ".gate.weight": matrix(E, H, gain=2.0, dtype=F32)}),
        "model.layers.{n}.mlp", prefix, Selection("sigmoid", "e_score_correction_bias"), H)


def run_llama4(block, x):
    """The weight multiplies the experts' input, and every expert runs on every token (with weight 0 where it was not chosen)."""
    seen = {}
    hooks = [watch(block.router, seen, "router"), watch(block.experts, seen, "experts")]
    out, _ = block(x[None])
    for hook in hooks:
        hook.remove()
    scores, logits = seen["router"][1]
    ids = torch.topk(logits, block.top_k, dim=1).indices
    routed = seen["experts"][1].reshape(scores.shape[1], len(x), -1).sum(dim=0)
    return dict(logits=logits, ids=ids, weights=scores.gather(1, ids), routed=routed, out=out)


@family
def llama4(E=8, H=64, I=40):
    prefix = "language_model.model.layers.{n}.feed_forward"
    return Family(
        "Llama4ForConditionalGeneration",
        {"architectures": ["Llama4ForConditionalGeneration"], "boi_token_index": 120, "eoi_token_index": 121, "image_token_index": 122,
         "model_type": "llama4",
         "text_config": {
             "_attn_implementation_autoset": True, "attention_bias": False, "attention_chunk_size": 8192, "attention_dropout": 0.0,
             "bos_token_id": 1, "eos_token_id": [2, 3], "for_llm_compressor": False, "head_dim": 16, "hidden_act": "silu",
             "hidden_size": H, "initializer_range": 0.02, "interleave_moe_layer_step": 2, "intermediate_size": I,
             "intermediate_size_mlp": 88, "max_position_embeddings": 1048576, "model_type": "llama4_text", "no_rope_layers": [],
             "num_attention_heads": 4, "num_experts_per_tok": 1, "num_hidden_layers": 2, "num_key_value_heads": 2,
             "num_local_experts": E, "output_router_logits": False, "pad_token_id": 0, "rms_norm_eps": 1e-05, "rope_scaling": None,
             "rope_theta": 500000.0, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "torch_dtype": "bfloat16",
             "use_cache": True, "use_qk_norm": False, "vocab_size": 128},
         "torch_dtype": "bfloat16", "transformers_version": "4.51.0.dev0",
         "vision_config": {
             "_attn_implementation_autoset": True, "attention_dropout": 0.0, "hidden_act": "gelu", "hidden_size": 32, "image_size": 16,
             "initializer_range": 0.02, "intermediate_size": 64, "model_type": "llama4_vision_model", "multi_modal_projector_bias": False,
             "norm_eps": 1e-05, "num_attention_heads": 2, "num_channels": 3, "num_hidden_layers": 1, "patch_size": 8,
             "pixel_shuffle_ratio": 0.5, "projector_dropout": 0.0, "projector_input_dim": 32, "projector_output_dim": 32,
             "rope_theta": 10000, "vision_feature_layer": -1, "vision_feature_select_strategy": "default", "vision_output_dim": 32}},
        layers(prefix, (1,), lambda p: {
            p + ".experts.gate_up_proj": matrix(E, H, 2 * I, fan_in=H), p + ".experts.down_proj": matrix(E, I, H, fan_in=I),
            p + ".router.weight": matrix(E, H)} | mlp(p + ".shared_expert", H, I)),
        prefix, prefix, Selection("raw"), H, tokens=40, run=run_llama4,
        note="weights multiply the experts' input")


def run_gemma4(layer, x):
    """x is the residual, which the router normalises itself; the experts read it through the layer's own norm."""
    seen = {}
    hook = watch(layer.router.proj, seen, "logits")
    _, weights, ids = layer.router(x)
    hook.remove()
    inputs = layer.pre_feedforward_layernorm_2(x).to(BF16).float()
    routed = layer.experts(inputs, ids, weights)
    return dict(x=inputs, router_x=x, logits=seen["logits"][1], ids=ids, weights=weights, routed=routed, out=routed)


@family
def gemma4():
    E, k, H, I = 8, 3, 72, 40
    prefix = "model.language_model.layers.{n}"
    return Family(
        "Gemma4ForConditionalGeneration",
        {"architectures": ["Gemma4ForConditionalGeneration"], "audio_config": None, "audio_token_id": 124, "boa_token_id": 125,
         "boi_token_id": 126, "dtype": "bfloat16", "eoa_token_index": 119, "eoi_token_id": 120, "eos_token_id": [1, 2],
         "image_token_id": 121, "initializer_range": 0.02, "model_type": "gemma4",
         "text_config": {
             "attention_bias": False, "attention_dropout": 0.0, "attention_k_eq_v": True, "bos_token_id": 2, "dtype": "bfloat16",
             "enable_moe_block": True, "eos_token_id": 1, "final_logit_softcapping": 30.0, "global_head_dim": 32, "head_dim": 16,
             "hidden_activation": "gelu_pytorch_tanh", "hidden_size": H, "hidden_size_per_layer_input": 0, "initializer_range": 0.02,
             "intermediate_size": 88, "layer_types": ["full_attention"], "max_position_embeddings": 262144,
             "model_type": "gemma4_text", "moe_intermediate_size": I, "num_attention_heads": 4, "num_experts": E,
             "num_global_key_value_heads": 1, "num_hidden_layers": 1, "num_key_value_heads": 2, "num_kv_shared_layers": 0,
             "pad_token_id": 0, "rms_norm_eps": 1e-06,
             "rope_parameters": {"full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
                                 "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"}},
             "sliding_window": 1024, "tie_word_embeddings": True, "top_k_experts": k, "use_bidirectional_attention": "vision",
             "use_cache": True, "use_double_wide_mlp": False, "vocab_size": 128, "vocab_size_per_layer_input": 128},
         "tie_word_embeddings": True, "transformers_version": "5.5.0.dev0", "video_token_id": 122,
         "vision_config": {"hidden_size": 32, "intermediate_size": 48, "model_type": "gemma4_vision", "num_attention_heads": 2,
                           "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 8,
                           "position_embedding_size": 16},
         "vision_soft_tokens_per_image": 16},
        layers(prefix, (0,), lambda p: {
            p + ".experts.down_proj": matrix(E, H, I), p + ".experts.gate_up_proj": matrix(E, 2 * I, H),
            p + ".router.per_expert_scale": vector(E, std=0.3, mean=1.0), p + ".router.proj.weight": matrix(E, H, gain=8.0),
            p + ".router.scale": vector(H, std=0.3, mean=1.0)}),
        prefix, prefix, Selection("softmax"), H, parts=("router.proj", "router", "experts"), run=run_gemma4,
        note="router_x is the residual: the router RMS-normalises it without a weight (eps rms_norm_eps), multiplies by router.scale and "
             "by hidden_size ** -0.5, then projects; x is another norm of it; weights include per_expert_scale; out = routed (the dense "
             "branch and its norms stay the engine's)")


def cohere2_text(E, k, H, I, **keys):
    return {"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "eos_token_id": 3, "expert_selection_fn": "sigmoid",
            "first_k_dense_replace": 0, "head_dim": 16, "hidden_act": "silu", "hidden_size": H, "initializer_range": 0.02,
            "intermediate_size": I, "layer_norm_eps": 1e-05, "logit_scale": 0.25, "max_position_embeddings": 500000,
            "model_type": "cohere2_moe", "norm_topk_prob": True, "num_attention_heads": 4, "num_experts": E, "num_experts_per_tok": k,
            "num_hidden_layers": 1, "num_key_value_heads": 2, "num_shared_experts": 0, "pad_token_id": 0,
            "position_embedding_type": "rope_gptj", "prefix_dense_sliding_window_pattern": 1, "rms_norm_eps": None, "rope_theta": 50000,
            "rotary_pct": 1.0, "sliding_window": 4096, "tie_word_embeddings": True, "use_cache": True, "use_parallel_block": True,
            "use_qk_norm": False, "vocab_size": 128} | keys


def cohere2_tensors(E, H, I, shared):
    return lambda p: {p + ".gate.weight": matrix(E, H)} | experts(p + ".experts", E, H, I) | (
        mlp(p + ".shared_experts", H, shared * I) if shared else {})


@family
def cohere2_moe():
    """North-Mini-Code: a dense first layer of its own width, sigmoid without renormalisation, no shared experts."""
    E, k, H, I = 8, 2, 64, 40
    prefix = "model.layers.{n}.mlp"
    config = cohere2_text(E, k, H, I, first_k_dense_replace=1, layer_types=["full_attention", "sliding_attention"], norm_topk_prob=False,
                          num_hidden_layers=2, prefix_dense_intermediate_size=88, rms_norm_eps=1e-06,
                          torch_dtype="bfloat16")
    return Family("Cohere2MoeForCausalLM", {"architectures": ["Cohere2MoeForCausalLM"]} | config,
                  layers(prefix, (1,), cohere2_tensors(E, H, I, 0)), prefix, prefix, Selection("raw"), H)


@family
def cohere2_moe_average():
    """Command-A-Plus: nested under a vision model, sigmoid renormalised, shared experts as one MLP, (routed + shared) / 2."""
    E, k, H, I = 8, 3, 64, 40
    prefix = "model.language_model.layers.{n}.mlp"
    text = cohere2_text(E, k, H, I, layer_types=["sliding_attention"], num_shared_experts=2, shared_expert_combination_strategy="average")
    return Family(
        "Cohere2VisionForConditionalGeneration",
        {"alignment_intermediate_size": 64, "architectures": ["Cohere2VisionForConditionalGeneration"], "downsample_factor": 2,
         "dtype": "bfloat16", "image_token_id": 120, "model_type": "cohere2_vision", "text_config": text, "tie_word_embeddings": True,
         "transformers_version": "5.9.0",
         "vision_config": {"attention_dropout": 0.0, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 32, "image_size": 32,
                           "intermediate_size": 48, "layer_norm_eps": 1e-06, "model_type": "siglip_vision_model",
                           "num_attention_heads": 2, "num_channels": 3, "num_hidden_layers": 1, "patch_size": 8,
                           "vision_use_head": False}},
        layers(prefix, (0,), cohere2_tensors(E, H, I, 2)), prefix, prefix, Selection("raw"), H,
        note="out = (routed + shared) / 2")


@family
def cohere2_moe_sum_softmax():
    """The strategies no release uses together: softmax over the chosen (norm_topk_prob has no say), shared experts added."""
    E, k, H, I = 8, 3, 64, 32
    prefix = "model.layers.{n}.mlp"
    config = cohere2_text(E, k, H, I, expert_selection_fn="softmax", layer_types=["sliding_attention"], norm_topk_prob=False,
                          num_shared_experts=3, shared_expert_combination_strategy="sum", torch_dtype="bfloat16")
    return Family("Cohere2MoeForCausalLM", {"architectures": ["Cohere2MoeForCausalLM"]} | config,
                  layers(prefix, (0,), cohere2_tensors(E, H, I, 3)), prefix, prefix, Selection("raw"), H)


def nemotron_config(E, k, H, I, shared, pattern, **keys):
    return {"architectures": ["NemotronHForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
            "chunk_size": 128, "conv_kernel": 4, "eos_token_id": 2, "expand": 2, "head_dim": 16, "hidden_dropout": 0.0, "hidden_size": H,
            "hybrid_override_pattern": pattern, "initializer_range": 0.02, "intermediate_size": I, "layer_norm_epsilon": 1e-05,
            "mamba_head_dim": 16, "mamba_hidden_act": "silu", "mamba_num_heads": 4, "mamba_proj_bias": False,
            "mamba_ssm_cache_dtype": "float32", "max_position_embeddings": 262144, "mlp_bias": False, "mlp_hidden_act": "relu2",
            "model_type": "nemotron_h", "moe_intermediate_size": I, "moe_shared_expert_intermediate_size": shared, "n_group": 1,
            "n_groups": 2, "n_routed_experts": E, "n_shared_experts": 1, "norm_eps": 1e-05, "norm_topk_prob": True,
            "num_attention_heads": 4, "num_experts_per_tok": k, "num_hidden_layers": len(pattern), "num_key_value_heads": 2,
            "num_logits_to_keep": 1, "pad_token_id": 0, "partial_rotary_factor": 1.0, "rescale_prenorm_residual": True,
            "residual_in_fp32": False, "rope_theta": 10000, "routed_scaling_factor": 2.5, "sliding_window": None, "ssm_state_size": 16,
            "tie_word_embeddings": False, "time_step_floor": 0.0001, "time_step_limit": [0.0, math.inf], "time_step_max": 0.1,
            "time_step_min": 0.001, "topk_group": 1, "torch_dtype": "bfloat16", "transformers_version": "4.55.4", "use_bias": False,
            "use_cache": True, "use_conv_bias": True, "use_mamba_kernels": True, "vocab_size": 128} | keys


def nemotron_tensors(E, H, I, shared, latent=None):
    def pair(p, width, inner):
        return {p + ".up_proj.weight": matrix(inner, width), p + ".down_proj.weight": matrix(width, inner)}

    def tensors(p):
        found = {p + ".gate.weight": matrix(E, H, gain=2.0, dtype=F32), p + ".gate.e_score_correction_bias": selection_bias(E, size=0.25)}
        for e in range(E):
            found |= pair(f"{p}.experts.{e}", latent or H, I)
        found |= pair(p + ".shared_experts", H, shared)
        if latent:
            found |= {p + ".fc1_latent_proj.weight": matrix(latent, H), p + ".fc2_latent_proj.weight": matrix(H, latent)}
        return found
    return tensors


@family
def nemotron_h():
    E, k, H, I, shared = 8, 3, 64, 40, 72
    prefix = "backbone.layers.{n}.mixer"
    return Family("NemotronHForCausalLM", nemotron_config(E, k, H, I, shared, "ME*E"),
                  layers(prefix, (1, 3), nemotron_tensors(E, H, I, shared)), "model.layers.{n}.mixer", prefix,
                  Selection("sigmoid", "gate.e_score_correction_bias"), H, note="not gated: down(relu(up x) ** 2)")


def run_latent(block, x):
    """Router and shared experts read the hidden state, routed experts its latent projection."""
    logits, weights, ids = block.gate(x)
    inputs = block.fc1_latent_proj(x).to(BF16).float()
    routed = block.experts(inputs, ids, weights)
    return dict(x=inputs, router_x=x, logits=logits, ids=ids, weights=weights, routed=routed, out=routed, shared=block.shared_experts(x))


@family
def nemotron_h_latent():
    E, k, H, I, shared, latent = 8, 4, 72, 48, 88, 40
    prefix = "backbone.layers.{n}.mixer"
    return Family("NemotronHForCausalLM",
                  nemotron_config(E, k, H, I, shared, "ME", moe_latent_size=latent, routed_scaling_factor=5.0),
                  layers(prefix, (1,), nemotron_tensors(E, H, I, shared, latent)), "model.layers.{n}.mixer", prefix,
                  Selection("sigmoid", "gate.e_score_correction_bias"), H, run=run_latent,
                  note="router_x is the hidden state; x is fc1_latent_proj of it, rounded to bf16; out = routed, in the latent width, "
                       "before fc2_latent_proj; shared is the shared experts' output for router_x, in the hidden width")


@family
def gpt_oss(E=8, k=4, H=64, I=40):
    # the bf16 layout (unsloth's and other conversions of the MXFP4 release); H != I, so that no shape is ambiguous
    prefix = "model.layers.{n}.mlp"
    return Family(
        "GptOssForCausalLM",
        {"architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 2,
         "experts_per_token": k, "head_dim": 16, "hidden_act": "silu", "hidden_size": H, "initial_context_length": 4096,
         "initializer_range": 0.02, "intermediate_size": I, "layer_types": ["sliding_attention"],
         "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 4, "num_experts_per_tok": k,
         "num_hidden_layers": 1, "num_key_value_heads": 2, "num_local_experts": E, "output_router_logits": False, "pad_token_id": 0,
         "rms_norm_eps": 1e-05,
         "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                          "rope_type": "yarn", "truncate": False},
         "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
         "torch_dtype": "bfloat16", "transformers_version": "4.55.0.dev0", "use_cache": True, "vocab_size": 128},
        layers(prefix, (0,), lambda p: {
            p + ".experts.down_proj": matrix(E, I, H, fan_in=I), p + ".experts.down_proj_bias": vector(E, H, std=0.5),
            p + ".experts.gate_up_proj": matrix(E, H, 2 * I, fan_in=H), p + ".experts.gate_up_proj_bias": vector(E, 2 * I, std=0.5),
            p + ".router.bias": vector(E, std=0.5), p + ".router.weight": matrix(E, H, gain=0.4)}),
        prefix, prefix, Selection("raw"), H, x_std=4.0,
        run=lambda block, x: run_block(block, x, "router"),
        note="x is large so that swiglu_limit acts; logits include router.bias")


@family
def ernie4_5_moe(E=8, k=3, H=64, I=40):
    prefix = "model.layers.{n}.mlp"
    return Family(
        "Ernie4_5_MoeForCausalLM",
        {"architectures": ["Ernie4_5_MoeForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": H,
         "intermediate_size": 88, "max_position_embeddings": 131072, "model_type": "ernie4_5_moe", "num_attention_heads": 4,
         "num_key_value_heads": 2, "num_hidden_layers": 2, "pad_token_id": 0, "rms_norm_eps": 1e-05, "use_cache": False,
         "vocab_size": 128, "rope_theta": 500000.0, "use_bias": False, "moe_num_experts": E, "moe_num_shared_experts": 2,
         "moe_layer_start_index": 1, "moe_layer_end_index": 1, "moe_intermediate_size": I, "moe_capacity": [E, E, E], "moe_gate": "topk",
         "moe_k": k, "moe_layer_interval": 1, "moe_use_aux_free": True, "num_nextn_predict_layers": 1, "tie_word_embeddings": True,
         "torch_dtype": "bfloat16"},
        layers(prefix, (1,), lambda p: experts(p + ".experts", E, H, I) | {
            p + ".gate.weight": matrix(E, H, dtype=F32), p + ".moe_statics.e_score_correction_bias": selection_bias(1, E, size=0.1)}
            | mlp(p + ".shared_experts", H, 2 * I)),
        prefix, prefix, Selection("softmax", "moe_statics.e_score_correction_bias"), H)


def finish_longcat(block, tensors):
    """transformers gives the identity experts rows in gate_up_proj that no release has, so its loader refuses the stack."""
    real = block.experts.num_routed_experts
    with torch.no_grad():
        for e in range(real):
            gate, up = tensors[f"experts.{e}.gate_proj.weight"], tensors[f"experts.{e}.up_proj.weight"]
            block.experts.gate_up_proj[e] = torch.cat([gate, up]).float()
            block.experts.down_proj[e] = tensors[f"experts.{e}.down_proj.weight"].float()
        block.experts.gate_up_proj[real:] = math.pi  # never read


@family
def longcat_flash():
    E, zero, k, H, I = 8, 4, 4, 64, 40
    prefix = "model.layers.{n}.mlp"
    return Family(
        "LongcatFlashForCausalLM",
        {"architectures": ["LongcatFlashForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "attention_method": "MLA",
         "bos_token_id": 1, "eos_token_id": 2, "expert_ffn_hidden_size": I, "ffn_hidden_size": 88, "hidden_size": H, "kv_lora_rank": 16,
         "max_position_embeddings": 131072, "mla_scale_kv_lora": True, "mla_scale_q_lora": True, "model_type": "longcat_flash",
         "moe_topk": k, "n_routed_experts": E, "num_attention_heads": 4, "num_layers": 1, "q_lora_rank": 24, "qk_nope_head_dim": 16,
         "qk_rope_head_dim": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000000.0, "routed_scaling_factor": 6.0, "router_bias": False,
         "torch_dtype": "bfloat16", "transformers_version": "4.55.0", "use_cache": True, "v_head_dim": 16, "vocab_size": 128,
         "zero_expert_num": zero, "zero_expert_type": "identity"},
        layers(prefix, (0,), lambda p: experts(p + ".experts", E, H, I) | {
            p + ".router.classifier.weight": matrix(E + zero, H, dtype=F32),
            p + ".router.e_score_correction_bias": selection_bias(E + zero, size=0.05)}),
        prefix, prefix, Selection("softmax", "router.e_score_correction_bias"), H, tokens=32, finish=finish_longcat,
        run=lambda block, x: run_block(block, x, "router"), note="ids from n_routed_experts on are identity experts: weight * x")


@family
def phimoe(E=8, H=64, I=40):
    prefix = "model.layers.{n}.block_sparse_moe"

    def near_pairs(rng):
        # rows 0-1 and 2-3 nearly equal, so that SparseMixer's threshold keeps a rival and weights fall below 1
        w = rng.standard_normal((E, H), dtype=np.float32) / np.float32(math.sqrt(H))
        w[1] = w[0] + w[1] * np.float32(0.03)
        w[3] = w[2] + w[3] * np.float32(0.03)
        return torch.from_numpy(w).to(BF16)

    return Family(
        "PhimoeForCausalLM",
        {"architectures": ["PhiMoEForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
         "hidden_act": "silu", "hidden_dropout": 0.0, "hidden_size": H, "initializer_range": 0.02, "input_jitter_noise": 0.01,
         "intermediate_size": I, "lm_head_bias": True, "max_position_embeddings": 131072, "model_type": "phimoe",
         "num_attention_heads": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1, "num_key_value_heads": 2, "num_local_experts": E,
         "original_max_position_embeddings": 4096, "output_router_logits": False, "rms_norm_eps": 1e-05,
         "rope_scaling": {"long_factor": [1.0] * (H // 8), "long_mscale": 1.25, "original_max_position_embeddings": 4096,
                          "short_factor": [1.0] * (H // 8), "short_mscale": 1.25, "type": "longrope"},
         "rope_theta": 10000.0, "router_aux_loss_coef": 0.0, "router_jitter_noise": 0.01, "sliding_window": 131072,
         "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.43.3", "use_cache": True, "vocab_size": 128},
        layers(prefix, (0,), lambda p: experts(p + ".experts", E, H, I, W123) | {p + ".gate.weight": Param((E, H), 0, values=near_pairs)}),
        "model.layers.{n}.mlp", prefix, Selection("raw", prune=0.02), H, tokens=40, run=lambda block, x: run_block(block, x, "router"),
        note="SparseMixer: the weights of a token do not sum to 1")


@family
def hunyuan_v1_moe(E=8, H=64, I=40):
    # moe_topk is a list in the release too, though of equal numbers
    prefix = "model.layers.{n}.mlp"
    return Family(
        "HunYuanMoEV1ForCausalLM",
        {"add_classification_head": False, "architectures": ["HunYuanMoEV1ForCausalLM"], "attention_bias": False,
         "attention_dropout": 0.0, "attention_head_dim": 16, "bos_token_id": 1, "cla_share_factor": 2, "class_num": 0,
         "dense_list": [H, 0], "eod_token_id": 3, "eos_token_id": 2, "head_dim": 16, "hidden_act": "silu", "hidden_size": H,
         "initializer_range": 0.02, "intermediate_size": I, "kv_lora_rank": None, "max_position_embeddings": 32768, "mlp_bias": False,
         "model_type": "hunyuan_v1_moe", "moe_drop_tokens": False, "moe_intermediate_size": [I, I], "moe_layer_num_skipped": 0,
         "moe_random_routing_dropped_token": False, "moe_topk": [2, 3], "norm_type": "rms", "num_attention_heads": 4, "num_experts": E,
         "num_hidden_layers": 2, "num_key_value_heads": 2, "num_shared_expert": [1, 1], "pad_id": 0, "pad_token_id": 0, "pool_type": "last",
         "position_embedding_xdrope": False, "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": None, "qk_rope_head_dim": None,
         "rms_norm_eps": 1e-05, "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
                                                 "mscale_all_dim": 1.0, "type": "dynamic"},
         "rope_theta": 10000.0, "routed_scaling_factor": False, "sep_token_id": 4, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
         "transformers_version": "4.41.2", "use_cache": True, "use_cla": False, "use_mixed_mlp_moe": True, "use_qk_norm": True,
         "use_rotary_pos_emb": True, "v_head_dim": None, "vocab_size": 128},
        layers(prefix, (0, 1), lambda p: experts(p + ".experts", E, H, I) | {p + ".gate.wg.weight": matrix(E, H, dtype=F32)}
               | mlp(p + ".shared_mlp", H, I)),
        prefix, prefix, Selection("softmax"), H)


@family
def olmoe():
    E, k, H, I = 8, 3, 64, 32
    prefix = "model.layers.{n}.mlp"
    return Family(
        "OlmoeForCausalLM",
        {"architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None, "eos_token_id": 2,
         "hidden_act": "silu", "hidden_size": H, "initializer_range": 0.02, "intermediate_size": I, "max_position_embeddings": 4096,
         "model_type": "olmoe", "norm_topk_prob": False, "num_attention_heads": 4, "num_experts": E, "num_experts_per_tok": k,
         "num_hidden_layers": 1, "num_key_value_heads": 4, "output_router_logits": False, "pad_token_id": 1, "rope_scaling": None,
         "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "torch_dtype": "float32",
         "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 128},
        layers(prefix, (0,), lambda p: experts(p + ".experts", E, H, I) | {p + ".gate.weight": matrix(E, H)}),
        prefix, prefix, Selection("softmax"), H, dtype=F32)


def granite_config(E, k, H, I, **keys):
    return {"attention_bias": False, "attention_dropout": 0.1, "attention_multiplier": 0.015625, "bos_token_id": 1,
            "embedding_multiplier": 12.0, "eos_token_id": 1, "hidden_act": "silu", "hidden_size": H, "initializer_range": 0.02,
            "intermediate_size": I, "logits_scaling": 6.0, "max_position_embeddings": 4096, "num_attention_heads": 4,
            "num_experts_per_tok": k, "num_hidden_layers": 1, "num_key_value_heads": 2, "num_local_experts": E,
            "output_router_logits": False, "pad_token_id": 0, "residual_multiplier": 0.22, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 10000, "router_aux_loss_coef": 0.0, "tie_word_embeddings": True, "use_cache": True, "vocab_size": 128} | keys


def granite_tensors(E, H, I, p):
    return {p + ".input_linear.weight": matrix(E, 2 * I, H), p + ".output_linear.weight": matrix(E, H, I),
            p + ".router.layer.weight": matrix(E, H)}


@family
def granitemoe():
    E, k, H, I = 8, 3, 64, 40
    prefix = "model.layers.{n}.block_sparse_moe"
    return Family(
        "GraniteMoeForCausalLM",
        granite_config(E, k, H, I, architectures=["GraniteMoeForCausalLM"], model_type="granitemoe", torch_dtype="float16"),
        layers(prefix, (0,), lambda p: granite_tensors(E, H, I, p)),
        prefix, prefix, Selection("raw"), H, dtype=F16, shards=1, run=lambda block, x: run_block(block, x, "router"))


def run_granite_shared(layer, x):
    result = run_block(layer.block_sparse_moe, x, "router")
    return result | dict(out=result["routed"] + layer.shared_mlp(x))


@family
def granitemoeshared(E=8, k=2, H=64, I=40, shared=56):
    prefix = "model.layers.{n}"
    return Family(
        "GraniteMoeSharedForCausalLM",
        granite_config(E, k, H, I, architectures=["GraniteMoeSharedForCausalLM"], model_type="granitemoeshared",
                       shared_intermediate_size=shared, torch_dtype="bfloat16"),
        layers(prefix, (0,), lambda p: granite_tensors(E, H, I, p + ".block_sparse_moe") | {
            p + ".shared_mlp.input_linear.weight": matrix(2 * shared, H), p + ".shared_mlp.output_linear.weight": matrix(H, shared)}),
        prefix, prefix, Selection("raw"), H, shards=1, parts=("block_sparse_moe", "shared_mlp"), run=run_granite_shared,
        note="the shared experts are a module beside the MoE block; the layer adds both")


@family
def lfm2_moe():
    E, k, H, I = 8, 3, 64, 40
    prefix = "model.layers.{n}.feed_forward"
    return Family(
        "Lfm2MoeForCausalLM",
        {"architectures": ["Lfm2MoeForCausalLM"], "bos_token_id": 1, "conv_L_cache": 3, "conv_bias": False, "dtype": "bfloat16",
         "eos_token_id": 7, "hidden_size": H, "initializer_range": 0.02, "intermediate_size": 88,
         "layer_types": ["conv", "conv", "full_attention"], "max_position_embeddings": 128000, "model_type": "lfm2_moe",
         "moe_intermediate_size": I, "norm_eps": 1e-05, "norm_topk_prob": True, "num_attention_heads": 4, "num_dense_layers": 2,
         "num_experts": E, "num_experts_per_tok": k, "num_hidden_layers": 3, "num_key_value_heads": 2, "pad_token_id": 0,
         "rope_theta": 1000000.0, "routed_scaling_factor": 1.0, "transformers_version": "4.57.0", "use_cache": True,
         "use_expert_bias": True, "vocab_size": 128},
        layers(prefix, (2,), lambda p: {p + ".expert_bias": selection_bias(E, size=0.25)} | experts(p + ".experts", E, H, I, W123) | {
            p + ".gate.weight": matrix(E, H, gain=2.0)}),
        prefix, prefix, Selection("sigmoid", "expert_bias"), H)


@family
def mistral4():
    # released with one group; four here, so that its rule (softmax, top-2 sum) is exercised
    E, k, H, I = 16, 3, 64, 32
    prefix = "language_model.model.layers.{n}.mlp"
    return Family(
        "Mistral3ForConditionalGeneration",
        {"architectures": ["Mistral3ForConditionalGeneration"], "dtype": "bfloat16", "image_token_index": 10, "model_type": "mistral3",
         "multimodal_projector_bias": False, "projector_hidden_act": "gelu", "spatial_merge_size": 2,
         "text_config": {
             "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "first_k_dense_replace": 0,
             "head_dim": 16, "hidden_act": "silu", "hidden_size": H, "initializer_range": 0.02, "intermediate_size": 88,
             "kv_lora_rank": 16, "max_position_embeddings": 1048576, "model_type": "mistral4", "moe_intermediate_size": I, "n_group": 4,
             "n_routed_experts": E, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 4, "num_experts_per_tok": k,
             "num_hidden_layers": 1, "num_key_value_heads": 4, "pad_token_id": 11, "pretraining_tp": 1, "q_lora_rank": 24,
             "qk_head_dim": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "rms_norm_eps": 1e-06, "rope_interleave": True,
             "rope_parameters": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 128.0, "llama_4_scaling_beta": 0.1,
                                 "max_position_embeddings": 1048576, "mscale": 1.0, "mscale_all_dim": 1.0,
                                 "original_max_position_embeddings": 8192, "partial_rotary_factor": 0.5, "rope_theta": 10000.0,
                                 "rope_type": "yarn", "type": "yarn"},
             "routed_scaling_factor": 1.0, "sliding_window": None, "tie_word_embeddings": False, "topk_group": 2, "use_cache": True,
             "v_head_dim": 16, "vocab_size": 128},
         "tie_word_embeddings": False, "transformers_version": "5.3.0.dev0",
         "vision_config": {"attention_dropout": 0.0, "head_dim": 16, "hidden_act": "silu", "hidden_size": 32, "image_size": 32,
                           "initializer_range": 0.02, "intermediate_size": 48, "model_type": "pixtral", "num_attention_heads": 2,
                           "num_channels": 3, "num_hidden_layers": 1, "patch_size": 8},
         "vision_feature_layer": -1},
        layers(prefix, (0,), lambda p: {
            p + ".experts.down_proj": matrix(E, H, I), p + ".experts.gate_up_proj": matrix(E, 2 * I, H), p + ".gate.weight": matrix(E, H)}
            | mlp(p + ".shared_experts", H, I)),
        prefix.replace("language_model.model", "model.language_model"), prefix, Selection("softmax", groups=(4, 2, "top2")), H)


def run_inkling(block, x):
    """The router also scores the shared experts, and renormalises over them; their weights multiply the intermediate."""
    result = run_block(block, x)
    _, _, _, gammas = block.gate(x)
    return result | dict(logits=F.linear(x, block.gate.weight), shared_weights=gammas)


@family
def inkling():
    # intermediate_size is the experts' width in the released config, since dense_intermediate_size is there too
    E, n_shared, k, H, I = 8, 2, 3, 64, 40
    prefix = "model.llm.layers.{n}.mlp"
    return Family(
        "InklingForConditionalGeneration",
        {"architectures": ["InklingForConditionalGeneration"], "model_type": "inkling_mm_model", "eos_token_id": 2,
         "text_config": {
             "model_max_length": 1048576, "torch_dtype": "bfloat16", "hidden_size": H, "num_hidden_layers": 2, "vocab_size": 128,
             "unpadded_vocab_size": 120, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "d_rel": 4, "rel_extent": 16,
             "q_bias": False, "o_bias": False, "log_scaling_n_floor": 128000, "log_scaling_alpha": 0.1, "rms_norm_eps": 1e-06,
             "use_embed_norm": True, "local_layer_ids": [0], "dense_mlp_idx": 1, "use_sconv": True, "sconv_kernel_size": 4,
             "logits_mup_width_multiplier": 24.0, "final_logit_softcapping": None, "swa_head_dim": 16, "swa_num_attention_heads": 4,
             "swa_num_key_value_heads": 2, "sliding_window_size": 8, "n_routed_experts": E, "num_experts_per_tok": k,
             "n_shared_experts": n_shared, "shared_expert_sink": True, "dense_intermediate_size": 88, "intermediate_size": I,
             "route_scale": 8.0, "use_gate_bias": True, "gate_activation": "sigmoid", "norm_after_topk": True, "use_global_scale": True},
         "audio_config": {"decoder_dmodel": H, "n_mel_bins": 4, "mel_vocab_size": 16},
         "vision_config": {"decoder_dmodel": H, "patch_size": 40, "temporal_patch_size": 2, "n_channels": 3, "n_layers": 8,
                           "hidden_size": 32, "num_attention_heads": 2},
         "mtp_config": {"num_nextn_predict_layers": 1}},
        layers(prefix, (1,), lambda p: {
            p + ".experts.w13_weight": matrix(E, 2 * I, H), p + ".experts.w2_weight": matrix(E, H, I),
            p + ".gate.bias": selection_bias(E, size=0.25), p + ".gate.global_scale": vector(1, std=0.1, mean=1.3, dtype=F32),
            p + ".gate.weight": matrix(E + n_shared, H), p + ".shared_experts.shared_w13_weight": matrix(n_shared, 2 * I, H),
            p + ".shared_experts.shared_w2_weight": matrix(n_shared, H, I)}),
        prefix.replace("llm", "language_model"), prefix, Selection("sigmoid", "gate.bias", experts=E), H, run=run_inkling,
        note="w13 rows alternate gate and up; the last two logits are the shared experts', and shared_weights their weights")


def run_muse_spark(block, x):
    """x is the hidden state; pre_expert_proj, pre_expert_norm and post_expert_proj stay the engine's."""
    _, weights, ids = block.gate(x)
    inputs = block.pre_expert_norm(block.pre_expert_proj(x)).to(BF16).float()
    routed = block.experts(inputs, ids, weights)
    return dict(x=inputs, router_x=x, logits=F.linear(x, block.gate.weight), ids=ids, weights=weights, routed=routed, out=routed)


@family
def muse_spark():
    E, k, H, inner, I = 8, 3, 72, 64, 40
    prefix = "model.language_model.layers.{n}.mlp"
    return Family(
        "MuseSparkForConditionalGeneration",
        {"architectures": ["MuseSparkForConditionalGeneration"], "dtype": "bfloat16", "model_type": "muse_spark", "image_token_id": 120,
         "video_token_id": 121, "audio_token_id": 122, "out_hidden_size": 64, "projector_hidden_act": "gelu", "projector_hidden_size": 32,
         "text_config": {
             "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "final_logit_softcapping": 20.0,
             "head_dim": 16, "hidden_act": "silu", "hidden_size": H, "initializer_range": 0.02, "intermediate_size": 88,
             "layer_rope_theta": [500000.0, 0], "layer_types": ["sliding_attention", "full_attention"],
             "max_position_embeddings": 1048576, "mlp_layer_types": ["dense", "sparse"], "model_type": "muse_spark_text",
             "moe_hidden_size": inner, "moe_intermediate_size": I, "num_attention_heads": 4, "num_experts_per_tok": k,
             "num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": E, "output_multiplier": 0.1767766952966369,
             "output_router_logits": False, "pad_token_id": None, "post_norm_eps": 1e-08, "qk_scale_factor": 5.4730064863875,
             "residual_gate_temperature": 0.3, "rms_norm_eps": 1e-05, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
             "routed_scaling_factor": 1.5, "sliding_window": 2048, "tie_word_embeddings": False, "use_cache": True, "vocab_size": 128},
         "vision_config": {"hidden_act": "gelu", "hidden_size": 32, "intermediate_size": 48, "merge_size": 2,
                           "model_type": "muse_spark_vision", "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 4,
                           "patch_temporal": 2, "pos_emb_height": 4, "pos_emb_width": 4, "max_position_embeddings": 16},
         "audio_config": {"depths": [1, 1], "hidden_sizes": [8, 16], "model_type": "muse_spark_audio", "num_hidden_layers": 2,
                          "out_hidden_size": H, "patch_sizes": [4, 2]}},
        layers(prefix, (1,), lambda p: {
            p + ".experts.down_proj": matrix(E, inner, I), p + ".experts.gate_up_proj": matrix(E, 2 * I, inner),
            p + ".experts.post_expert_norm.weight": vector(inner, std=0.3),
            p + ".gate.e_score_correction_bias": selection_bias(E, size=0.15),
            p + ".gate.weight": matrix(E, H, gain=5.0, dtype=F32), p + ".post_expert_proj.weight": matrix(H, inner),
            p + ".pre_expert_norm.weight": vector(inner, std=0.3), p + ".pre_expert_proj.weight": matrix(inner, H)}),
        prefix, prefix, Selection("sigmoid", "gate.e_score_correction_bias", multiplier=0.1767766952966369), H,
        run=run_muse_spark,
        note="router_x is the hidden state; x is pre_expert_norm(pre_expert_proj(router_x)), rounded to bf16; logits are before "
             "output_multiplier; out = routed, before post_expert_proj; post_expert_norm ran without its bf16 rounding: all here is fp32")


@family
def minimax_m3():
    # the router is released in f32, as M2's; in the file gate and up of the shared experts are apart, and the scale is the block's
    E, k, H, I, shared = 8, 2, 64, 40, 56
    prefix = "language_model.model.layers.{n}.block_sparse_moe"
    return Family(
        "MiniMaxM3SparseForConditionalGeneration",
        {"architectures": ["MiniMaxM3SparseForConditionalGeneration"], "image_token_index": 120, "model_type": "minimax_m3_vl",
         "projector_hidden_size": 64,
         "text_config": {
             "attention_output_gate": False, "bos_token_id": 1, "dense_intermediate_size": 88, "eos_token_id": 2, "head_dim": 16,
             "hidden_act": "swigluoai", "hidden_size": H, "intermediate_size": I, "max_position_embeddings": 1048576,
             "model_type": "minimax_m3_vl_text", "moe_layer_freq": [0, 1], "n_shared_experts": 1, "norm_topk_prob": True,
             "num_attention_heads": 4, "num_experts_per_tok": k, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": E,
             "partial_rotary_factor": 0.5, "qk_norm_type": "per_head", "rms_norm_eps": 1e-06, "rope_theta": 5000000, "rotary_dim": 8,
             "routed_scaling_factor": 2.0, "scoring_func": "sigmoid", "shared_intermediate_size": shared, "swiglu_alpha": 1.702,
             "swiglu_limit": 7.0, "tie_word_embeddings": False, "use_gemma_norm": True, "use_qk_norm": True, "use_routing_bias": True,
             "vocab_size": 128},
         "tie_word_embeddings": False, "torch_dtype": "bfloat16", "video_token_index": 121,
         "vision_config": {"hidden_size": 32, "image_size": 28, "intermediate_size": 48, "model_type": "minimax_m3_vl_vision",
                           "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 14}},
        layers(prefix, (1,), lambda p: experts(p + ".experts", E, H, I, W123) | {
            p + ".e_score_correction_bias": selection_bias(E, size=0.25), p + ".gate.weight": matrix(E, H, gain=0.5, dtype=F32)}
            | mlp(p + ".shared_experts", H, shared)),
        "model.language_model.layers.{n}.mlp", prefix, Selection("sigmoid", "e_score_correction_bias"), H, x_std=4.0,
        note="x is large so that swiglu_limit acts; out = routed * routed_scaling_factor + shared: the scale is not in the weights")


@family
def step3p7():
    # Step-3.5 and 3.7: stacked but separate gate and up; a limit for each layer, 0.0 for none, the MTP layer's appended
    E, k, H, I, shared = 8, 3, 64, 40, 56
    prefix = "model.layers.{n}"
    return Family(
        "Step3p7ForConditionalGeneration",
        {"architectures": ["Step3p7ForConditionalGeneration"], "image_token_id": 120, "model_type": "step3p7",
         "text_config": {
             "attention_other_setting": {"attention_type": "sliding_attention", "head_dim": 16, "num_attention_groups": 2,
                                         "num_attention_heads": 4},
             "bos_token_id": 1, "eos_token_id": [2, 3], "head_dim": 16, "hidden_size": H, "intermediate_size": 88,
             "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"],
             "max_position_embeddings": 262144, "model_type": "step3p5", "moe_every_n_layer": 1, "moe_intermediate_size": I,
             "moe_layer_offset": 0, "moe_layers_enum": "1,2", "moe_num_experts": E, "moe_router_activation": "sigmoid",
             "moe_router_scaling_factor": 3.0, "moe_top_k": k, "need_fp32_gate": True, "norm_expert_weight": True,
             "num_attention_groups": 2, "num_attention_heads": 4, "num_hidden_layers": 3, "num_nextn_predict_layers": 1,
             "partial_rotary_factors": [0.5, 1.0, 1.0, 1.0], "rms_norm_eps": 1e-05, "rope_theta": [5000000.0, 10000.0, 10000.0, 10000.0],
             "share_expert_dim": shared, "sliding_window": 512, "swiglu_limits": [0.0, 0.0, 3.5, 0.0],
             "swiglu_limits_shared": [0.0, 0.0, 5.0, 0.0], "torch_dtype": "bfloat16", "use_head_wise_attn_gate": True, "use_moe": True,
             "use_moe_router_bias": True, "vocab_size": 128},
         "vision_config": {"heads": 2, "hidden_act": "quick_gelu", "image_size": 28, "layers": 1, "ls_init_value": 0.1, "mlp_ratio": 2.0,
                           "model_type": "perception_encoder", "num_channels": 3, "patch_size": 14, "width": 32}},
        layers(prefix, (1, 2), lambda p: {
            p + ".moe.down_proj.weight": matrix(E, H, I), p + ".moe.gate.weight": matrix(E, H, gain=0.5),
            p + ".moe.gate_proj.weight": matrix(E, I, H), p + ".moe.router_bias": selection_bias(E, size=0.25),
            p + ".moe.up_proj.weight": matrix(E, I, H)} | mlp(p + ".share_expert", H, shared)),
        "model.language_model.layers.{n}.mlp", prefix, Selection("sigmoid", "moe.router_bias"), H, x_std=4.0,
        note="x is large so that the limits act (layer 2 only); out = routed * moe_router_scaling_factor + shared: the scale is not in "
             "the weights")


@family
def jamba():
    E, k, H, I = 8, 2, 64, 40
    prefix = "model.layers.{n}.feed_forward"
    return Family(
        "JambaForCausalLM",
        {"architectures": ["JambaForCausalLM"], "attention_dropout": 0.0, "attn_layer_offset": 4, "attn_layer_period": 8,
         "bos_token_id": 1, "eos_token_id": 2, "expert_layer_offset": 1, "expert_layer_period": 2, "hidden_act": "silu", "hidden_size": H,
         "initializer_range": 0.02, "intermediate_size": I, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_state": 16,
         "mamba_dt_rank": 4, "mamba_expand": 2, "mamba_proj_bias": False, "max_position_embeddings": 262144, "model_type": "jamba",
         "num_attention_heads": 4, "num_experts": E, "num_experts_per_tok": k, "num_hidden_layers": 2, "num_key_value_heads": 2,
         "num_logits_to_keep": 1, "output_router_logits": False, "pad_token_id": 0, "rms_norm_eps": 1e-06, "router_aux_loss_coef": 0.001,
         "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
         "use_cache": True, "use_mamba_kernels": True, "vocab_size": 128},
        layers(prefix, (1,), lambda p: experts(p + ".experts", E, H, I) | {p + ".router.weight": matrix(E, H)}),
        prefix, prefix, Selection("softmax"), H, run=lambda block, x: run_block(block, x, "router"))


def run_dbrx(block, x):
    """The router gives logits only; the block turns them into weights."""
    logits = block.router(x[None])
    weights, ids = block.route_tokens_to_experts(logits)
    routed = block.experts(x[None], ids, weights)[0]
    return dict(logits=logits, ids=ids, weights=weights, routed=routed, out=block(x[None])[0])


@family
def dbrx():
    # The release has an integer where transformers 5 insists on a float, and no ffn_config.hidden_size, for which transformers falls
    # back on the release's own width: it is given its own copy of the config.
    E, k, H, I = 8, 3, 64, 40
    prefix = "transformer.blocks.{n}.ffn"
    config = {
        "architectures": ["DbrxForCausalLM"], "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "model_type": "", "rope_theta": 500000},
        "d_model": H, "emb_pdrop": 0.0,
        "ffn_config": {"ffn_act_fn": {"name": "silu"}, "ffn_hidden_size": I, "model_type": "", "moe_jitter_eps": 0, "moe_loss_weight": 0.05,
                       "moe_normalize_expert_weights": 1, "moe_num_experts": E, "moe_top_k": k, "uniform_expert_assignment": False},
        "initializer_range": 0.02, "max_seq_len": 32768, "model_type": "dbrx", "n_heads": 4, "n_layers": 1,
        "output_router_logits": False, "resid_pdrop": 0.0, "router_aux_loss_coef": 0.05, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.38.2", "use_cache": True, "vocab_size": 128}
    for_transformers = config | {"ffn_config": config["ffn_config"] | {"hidden_size": H, "moe_normalize_expert_weights": 1.0}}
    return Family(
        "DbrxForCausalLM", config,
        layers(prefix, (0,), lambda p: {
            p + ".experts.mlp.v1": matrix(E * I, H), p + ".experts.mlp.w1": matrix(E * I, H),
            p + ".experts.mlp.w2": matrix(E * I, H, fan_in=I), p + ".router.layer.weight": matrix(E, H)}),
        prefix, prefix, Selection("softmax"), H, run=run_dbrx, for_transformers=for_transformers)


@family
def aria():
    E, k, H, I = 8, 3, 64, 40
    prefix = "language_model.model.layers.{n}.mlp"
    return Family(
        "AriaForConditionalGeneration",
        {"architectures": ["AriaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 9, "model_type": "aria",
         "projector_patch_to_query_dict": {"4": 2},
         "text_config": {
             "attention_bias": False, "hidden_size": H, "intermediate_size": I, "max_position_embeddings": 65536,
             "model_type": "aria_text", "moe_intermediate_size": I, "moe_num_experts": E, "moe_num_shared_experts": 2, "moe_topk": k,
             "num_attention_heads": 4, "num_hidden_layers": 1, "num_key_value_heads": 4, "rope_theta": 5000000, "vocab_size": 128},
         "torch_dtype": "bfloat16", "transformers_version": "4.48.0.dev0",
         "vision_config": {"hidden_size": 32, "image_size": 28, "intermediate_size": 48, "model_type": "idefics3_vision",
                           "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 14},
         "vision_feature_layer": -1},
        layers(prefix, (0,), lambda p: {
            p + ".experts.fc1.weight": matrix(E, H, 2 * I, fan_in=H), p + ".experts.fc2.weight": matrix(E, I, H, fan_in=I),
            p + ".router.weight": matrix(E, H)} | mlp(p + ".shared_experts", H, 2 * I)),
        prefix.replace("language_model.model", "model.language_model"), prefix, Selection("raw"), H,
        run=lambda block, x: run_block(block, x, "router"))


@family
def flex_olmo():
    E, k, H, I = 7, 5, 64, 40
    prefix = "model.layers.{n}.mlp"
    return Family(
        "FlexOlmoForCausalLM",
        {"architectures": ["FlexOlmoForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": None,
         "eos_token_id": 2, "hidden_act": "silu", "hidden_size": H, "initializer_range": 0.02, "intermediate_size": I,
         "max_position_embeddings": 4096, "model_type": "flex_olmo", "norm_topk_prob": False, "num_attention_heads": 4, "num_experts": E,
         "num_experts_per_tok": k, "num_hidden_layers": 1, "num_key_value_heads": 4, "output_router_logits": False, "pad_token_id": 1,
         "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False,
         "torch_dtype": "bfloat16", "transformers_version": "4.54.0.dev0", "use_cache": True, "vocab_size": 128},
        layers(prefix, (0,), lambda p: experts(p + ".experts", E, H, I) | {p + ".gate.weight": matrix(E, H)}),
        prefix, prefix, Selection("softmax"), H)


@family
def dots1(E=8, k=3, H=64, I=40):
    prefix = "model.layers.{n}.mlp"
    return Family(
        "Dots1ForCausalLM",
        {"architectures": ["Dots1ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 2,
         "first_k_dense_replace": 1, "head_dim": 16, "hidden_act": "silu", "hidden_size": H, "initializer_range": 0.02,
         "intermediate_size": 88, "max_position_embeddings": 32768, "max_window_layers": 62, "model_type": "dots1",
         "moe_intermediate_size": I, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": E, "n_shared_experts": 2,
         "norm_topk_prob": True, "num_attention_heads": 4, "num_experts_per_tok": k, "num_hidden_layers": 2, "num_key_value_heads": 4,
         "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000000, "routed_scaling_factor": 2.5,
         "scoring_func": "noaux_tc", "sliding_window": None, "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc",
         "torch_dtype": "bfloat16", "transformers_version": "4.46.3", "use_cache": True, "use_sliding_window": False, "vocab_size": 128},
        layers(prefix, (1,), lambda p: experts(p + ".experts", E, H, I) | {
            p + ".gate.e_score_correction_bias": selection_bias(E, size=0.25), p + ".gate.weight": matrix(E, H, gain=2.0)}
            | mlp(p + ".shared_experts", H, 2 * I)),
        prefix, prefix, Selection("sigmoid", "gate.e_score_correction_bias"), H)


@family
def kolibri1():
    # the selection bias lies outside the mlp prefix, and is added to logits, not to scores
    E, k, H, I, shared = 8, 3, 64, 40, 56
    prefix = "model.layers.{n}"
    return Family(
        "Kolibri1ForCausalLM",
        {"architectures": ["Kolibri1ForCausalLM"], "attention_dropout": 0.0, "eos_token_id": [2, 3], "head_dim": 16, "hidden_act": "silu",
         "hidden_size": H, "initializer_range": 0.02, "layer_types": ["sliding_attention"], "max_position_embeddings": 262144,
         "model_type": "kolibri1", "moe_intermediate_size": I, "norm_topk_prob": False, "num_attention_heads": 4, "num_experts": E,
         "num_experts_per_tok": k, "num_hidden_layers": 1, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
         "shared_expert_intermediate_size": shared, "sliding_window": 513, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
         "use_cache": True, "use_sliding_window": True, "vocab_size": 128},
        layers(prefix, (0,), lambda p: experts(p + ".mlp.experts", E, H, I) | {p + ".mlp.gate.weight": matrix(E, H)} | mlp(
            p + ".mlp.shared_experts", H, shared) | {p + ".moe.router.expert_bias": selection_bias(E, size=0.6)}),
        prefix + ".mlp", prefix, Selection("raw", "moe.router.expert_bias"), H)


def qwen3_vl(transposed):
    E, k, H, I = 8, 3, 64, 40
    prefix = "model.language_model.layers.{n}.mlp"
    fused = {".experts.down_proj": matrix(E, I, H, fan_in=I), ".experts.gate_up_proj": matrix(E, H, 2 * I, fan_in=H)} if transposed else {
        ".experts.down_proj": matrix(E, H, I), ".experts.gate_up_proj": matrix(E, 2 * I, H)}
    return Family(
        "Qwen3VLMoeForConditionalGeneration",
        {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "image_token_id": 120, "model_type": "qwen3_vl_moe",
         "text_config": {
             "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "decoder_sparse_step": 1, "dtype": "bfloat16",
             "eos_token_id": 2, "head_dim": 16, "hidden_act": "silu", "hidden_size": H, "initializer_range": 0.02,
             "intermediate_size": 88, "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_vl_moe_text",
             "moe_intermediate_size": I, "norm_topk_prob": True, "num_attention_heads": 4, "num_experts": E, "num_experts_per_tok": k,
             "num_hidden_layers": 1, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
             "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"}, "rope_theta": 5000000,
             "use_cache": True, "vocab_size": 128},
         "tie_word_embeddings": False, "transformers_version": "4.57.0.dev0", "video_token_id": 121,
         "vision_config": {"deepstack_visual_indexes": [0], "depth": 1, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 32,
                           "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 48, "model_type": "qwen3_vl_moe",
                           "num_heads": 2, "num_position_embeddings": 16, "out_hidden_size": H, "patch_size": 4, "spatial_merge_size": 2,
                           "temporal_patch_size": 2},
         "vision_end_token_id": 122, "vision_start_token_id": 123},
        layers(prefix, (0,), lambda p: {p + name: param for name, param in fused.items()} | {p + ".gate.weight": matrix(E, H)}),
        prefix, prefix, Selection("softmax"), H)


@family
def qwen3_vl_moe():
    """as released: input-major"""
    return qwen3_vl(True)


@family
def qwen3_vl_moe_resaved():
    """as transformers 5 saves it: the same names, output-major"""
    return qwen3_vl(False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in sys.argv[1:] or FAMILIES:
        make(name)
