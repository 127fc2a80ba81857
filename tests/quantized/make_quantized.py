#!/usr/bin/env python3
"""Makes the folders beside it: one small layer in each quantised dialect, written by the packages that write such files.

    make_quantized.py [folder ...]     needs torch, transformers, compressed-tensors, nvidia-modelopt, ml_dtypes

Codes and scales are the packages' own: transformers' Fp8Quantize (fp8_block, fp8_block_ue8m0), compressed-tensors'
compressors (fp8_tensor, fp8_channel, nvfp4_packed, mxfp8, int4_packed, and gpt_oss, whose blocks hold the same bytes),
nvidia-modelopt's NVFP4QTensor (nvfp4_modelopt). What they stand for is computed twice, by numpy and ml_dtypes from the
stored bytes, and by the package's or transformers' own dequantisation; both must agree.

golden.safetensors has, of layer 0: x, ids, weights and out [T, ...], and rows 8 to 39 of expert 1's matrices as fp32
(gate, up, down). out is computed in float64 with the dequantised matrices, x rounded to the format's codes where it has
some for activations (torch's own casts), and nothing rounded between the two products.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

HERE = Path(__file__).resolve().parent
EXPERTS, TOP_K, TOKENS, ROWS = 4, 2, 9, slice(8, 40)
E2M1 = np.array([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6], np.float32)


# ---- what stored bytes stand for, by numpy --------------------------------------------------------------------------

def numbers(t):
    """A tensor of an 8-bit float, or of a wide one, as float32."""
    kinds = {torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn, torch.float8_e8m0fnu: ml_dtypes.float8_e8m0fnu}
    if t.dtype in kinds:
        return t.view(torch.uint8).numpy().view(kinds[t.dtype]).astype(np.float32)
    return t.float().numpy()


def nibbles(t):
    b = t.numpy()
    return np.stack([b & 15, b >> 4], -1).reshape(*b.shape[:-1], -1)


def spread(scales, shape):
    return np.repeat(np.repeat(scales, shape[0] // scales.shape[0], 0), shape[1] // scales.shape[1], 1)


def times(codes, scales):
    return (codes * spread(scales, codes.shape)).astype(np.float32)


# ---- quantisers: a matrix -> its tensors by suffix, and what they stand for -----------------------------------------

def fp8_block(w, ue8m0):
    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=[128, 128],
                                                                    scale_fmt="ue8m0" if ue8m0 else "float"))
    parts = Fp8Quantize(quantizer)._quantize_one("m.weight", w)
    code, scale = parts["m.weight"], parts["m.weight_scale_inv"]
    own = Fp8Dequantize(quantizer)._dequantize_one(code, scale, torch.float32).numpy()
    value = times(numbers(code), numbers(scale))
    assert np.array_equal(value, own)
    return {"weight": code, "weight_scale_inv": scale}, value


def packed(w, preset, amax_x, group=None):
    """compressed-tensors: its scheme, its scales, its compressor."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    args = scheme.weights
    if group:
        args.group_size = group
    size = args.group_size
    state = {"weight": w}
    low, high = (w.amin(), w.amax()) if args.strategy in ("tensor",) else \
        (w.amin(1, keepdim=True), w.amax(1, keepdim=True)) if args.strategy == "channel" else \
        (w.view(w.shape[0], -1, size).amin(2), w.view(w.shape[0], -1, size).amax(2))
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(w.amin(), w.amax())
    scale, _ = calculate_qparams(low, high, args, state.get("weight_global_scale"))
    state["weight_scale"] = scale.bfloat16() if preset == "W4A16" else scale
    form = {"FP8": "float-quantized", "FP8_DYNAMIC": "float-quantized", "NVFP4": "nvfp4-pack-quantized",
            "MXFP8": "mxfp8-quantized", "MXFP4": "mxfp4-pack-quantized", "W4A16": "pack-quantized"}[preset]
    compressor = BaseCompressor.get_value_from_registry(form)
    out = compressor.compress(dict(state), scheme)
    own = compressor.decompress(dict(out), scheme)["weight"].float().numpy()
    if preset == "FP8":
        out["input_scale"] = torch.tensor([amax_x / 448])
    if preset == "NVFP4":
        out["input_global_scale"] = generate_gparam(torch.tensor(-amax_x), torch.tensor(amax_x))
    scale = out["weight_scale"]
    if preset in ("MXFP8", "MXFP4") and scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    if preset in ("FP8", "FP8_DYNAMIC", "MXFP8"):
        value = times(numbers(out["weight"]), numbers(scale).reshape(-1, 1) if scale.dim() < 2 else numbers(scale))
    elif preset == "W4A16":
        words = out["weight_packed"].numpy().view(np.uint32)
        codes = np.stack([words >> (4 * i) & 15 for i in range(8)], -1).reshape(w.shape).astype(np.float32) - 8
        value = times(codes, numbers(scale))
    else:
        multiplier = np.float32(1) / out["weight_global_scale"].numpy() if preset == "NVFP4" else np.float32(1)
        value = times(E2M1[nibbles(out["weight_packed"])], numbers(scale) * multiplier)
    assert np.allclose(value, own, rtol=2 ** -7, atol=0), preset
    return out, value


def nvfp4_modelopt(w, amax_x):
    q, scale, scale_2 = NVFP4QTensor.quantize(w, 16)
    code = q._quantized_data
    value = times(E2M1[nibbles(code)], numbers(scale) * scale_2.numpy())
    own = q.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16}).numpy()
    assert np.allclose(value, own, rtol=1e-6, atol=0)
    return {"weight": code, "weight_scale": scale, "weight_scale_2": scale_2,
            "input_scale": torch.tensor(amax_x / (448 * 6))}, value


# ---- activations, by torch's casts ----------------------------------------------------------------------------------

def to_e4m3(x, scale):
    return (torch.clamp(x / scale, -448, 448).to(torch.float8_e4m3fn).float() * scale).float()


def grouped(x, size, scale_of):
    g = x.view(x.shape[0], -1, size)
    return to_e4m3(g, scale_of(g.abs().amax(2, keepdim=True))).view(x.shape)


def up_to_power(s):
    return torch.exp2(torch.ceil(torch.log2(s)))


def to_nvfp4(x, scale):
    g = x.view(x.shape[0], -1, 16)
    block = (g.abs().amax(2, keepdim=True) / (6 * scale)).to(torch.float8_e4m3fn).float() * scale
    code = np.clip((g / block).numpy(), -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return (torch.from_numpy(code) * block).view(x.shape)


# ---- folders --------------------------------------------------------------------------------------------------------

def ct_config(preset, form, **weights):
    scheme = preset_name_to_scheme(preset, ["Linear"])
    group = json.loads(scheme.model_dump_json(exclude_none=False))
    group["weights"].update(weights)
    return {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
            "ignore": ["lm_head"], "config_groups": {"group_0": group}}


FOLDERS = {
    "fp8_block": dict(H=128, I=128, quantize=lambda w, a: fp8_block(w, False),
                      round=lambda x, a: grouped(x, 128, lambda m: torch.clamp(m, min=1e-12) / 448),
                      config={"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                              "weight_block_size": [128, 128]}),
    "fp8_block_ue8m0": dict(H=128, I=128, quantize=lambda w, a: fp8_block(w, True),
                            round=lambda x, a: grouped(x, 128, lambda m: up_to_power(m / 448)),
                            config={"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                    "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}),
    "fp8_tensor": dict(quantize=lambda w, a: packed(w, "FP8", a), round=lambda x, a: to_e4m3(x, np.float32(a / 448)),
                       config=ct_config("FP8", "float-quantized")),
    "fp8_channel": dict(quantize=lambda w, a: packed(w, "FP8_DYNAMIC", a),
                        round=lambda x, a: grouped(x, x.shape[1], lambda m: torch.clamp(m, min=1e-12) / 448),
                        config=ct_config("FP8_DYNAMIC", "float-quantized")),
    "mxfp8": dict(quantize=lambda w, a: packed(w, "MXFP8", a),
                  round=lambda x, a: grouped(x, 32, lambda m: up_to_power(m / 448)),
                  config=ct_config("MXFP8", "mxfp8-quantized")),
    "nvfp4_packed": dict(quantize=lambda w, a: packed(w, "NVFP4", a),
                         round=lambda x, a: to_nvfp4(x, np.float32(1) / np.float32(448 * 6 / np.float32(a))),
                         config=ct_config("NVFP4", "nvfp4-pack-quantized")),
    "nvfp4_modelopt": dict(quantize=nvfp4_modelopt, round=lambda x, a: to_nvfp4(x, np.float32(a / (448 * 6))),
                           modelopt={"producer": {"name": "modelopt", "version": "0.40.0"},
                                     "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None,
                                                      "group_size": 16, "exclude_modules": ["lm_head"]}}),
    "int4_packed": dict(quantize=lambda w, a: packed(w, "W4A16", a, 32), round=lambda x, a: x,
                        config=ct_config("W4A16", "pack-quantized", group_size=32)),
    "gpt_oss": dict(quantize=lambda w, a: packed(w, "MXFP4", a), round=lambda x, a: x,
                    config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn",
                            "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}),
}


def qwen3_config(H, I):
    return {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu", "hidden_size": H,
            "moe_intermediate_size": I, "intermediate_size": 2 * I, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K,
            "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "num_hidden_layers": 1,
            "torch_dtype": "bfloat16"}


def gpt_oss_config(H, I):
    return {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_act": "silu", "hidden_size": H,
            "intermediate_size": I, "num_local_experts": EXPERTS, "experts_per_token": TOP_K, "num_experts_per_tok": TOP_K,
            "swiglu_limit": 7.0, "num_hidden_layers": 1, "torch_dtype": "bfloat16"}


def fuse_gpt_oss(tensors, matrices, biases):
    """Experts apart -> stacks with gate and up rows in turn, blocks of 16 bytes; transformers reads them back."""
    both = {}
    for part in ("weight_packed", "weight_scale"):
        gate, up, down = ([tensors.pop(f"{e}.{m}.{part}") for e in range(EXPERTS)] for m in ("gate", "up", "down"))
        both[part] = (torch.stack([torch.stack([g, u], 1).flatten(0, 1) for g, u in zip(gate, up)]), torch.stack(down))
    for i, name in enumerate(("gate_up_proj", "down_proj")):
        code, scale = both["weight_packed"][i], both["weight_scale"][i].view(torch.uint8)
        blocks = code.view(*code.shape[:-1], -1, 16).contiguous()
        own = convert_moe_packed_tensors(blocks, scale, dtype=torch.bfloat16).float().transpose(1, 2).numpy()
        for e in range(EXPERTS):
            want = matrices[e, "down"] if i else np.stack([matrices[e, "gate"], matrices[e, "up"]], 1).reshape(own[e].shape)
            assert np.array_equal(own[e], want)
        tensors[f"model.layers.0.mlp.experts.{name}_blocks"] = blocks
        tensors[f"model.layers.0.mlp.experts.{name}_scales"] = scale.contiguous()
    tensors["model.layers.0.mlp.experts.gate_up_proj_bias"] = torch.from_numpy(
        np.stack([biases["gate"], biases["up"]], 2).reshape(EXPERTS, -1)).bfloat16()
    tensors["model.layers.0.mlp.experts.down_proj_bias"] = torch.from_numpy(biases["down"]).bfloat16()


def make(name):
    f, rng = FOLDERS[name], np.random.default_rng(sum(map(ord, name)))
    H, I, oss = f.get("H", 64), f.get("I", 64), name == "gpt_oss"
    draw = lambda *s: torch.from_numpy(rng.standard_normal(s).astype(np.float32)).bfloat16().float()
    x = draw(TOKENS, H)
    tensors, matrices = {}, {}
    for e in range(EXPERTS):
        for m, shape in (("gate", (I, H)), ("up", (I, H)), ("down", (H, I))):
            w = draw(*shape) * (0.5 + 0.25 * e) / shape[1] ** 0.5  # global scales differ
            amax = float(x.abs().max()) * (1 + 0.125 * e) if m != "down" else 3.0
            parts, matrices[e, m] = f["quantize"](w, amax)
            for suffix, t in parts.items():
                tensors[f"{e}.{m}.{suffix}" if oss else f"model.layers.0.mlp.experts.{e}.{m}_proj.{suffix}"] = t.contiguous()
    biases = {m: draw(EXPERTS, H if m == "down" else I).numpy() if oss else np.zeros((EXPERTS, 1)) for m in ("gate", "up", "down")}
    if oss:
        fuse_gpt_oss(tensors, matrices, biases)
        tensors["model.layers.0.mlp.router.bias"] = draw(EXPERTS).bfloat16()
    tensors["model.layers.0.mlp.router.weight" if oss else "model.layers.0.mlp.gate.weight"] = draw(EXPERTS, H).bfloat16()

    ids = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(TOKENS)]).astype(np.int32)
    weights = rng.random((TOKENS, TOP_K)).astype(np.float32)
    out = np.zeros((TOKENS, H))
    for e in range(EXPERTS):
        rounded = f["round"](x, float(x.abs().max()) * (1 + 0.125 * e)).numpy().astype(np.float64)
        gate = rounded @ matrices[e, "gate"].astype(np.float64).T + biases["gate"][e]
        up = rounded @ matrices[e, "up"].astype(np.float64).T + biases["up"][e]
        if oss:
            gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
            mid = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
        else:
            mid = gate / (1 + np.exp(-gate)) * up
        row = mid @ matrices[e, "down"].astype(np.float64).T + biases["down"][e]
        out += row * (weights * (ids == e)).sum(1, keepdims=True)
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    config = gpt_oss_config(H, I) if oss else qwen3_config(H, I)
    if "config" in f:
        config["quantization_config"] = f["config"]
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if "modelopt" in f:
        (folder / "hf_quant_config.json").write_text(json.dumps(f["modelopt"], indent=1) + "\n")
    save_file(tensors, folder / "model.safetensors")
    save_file({"layers.0.x": x, "layers.0.ids": torch.from_numpy(ids), "layers.0.weights": torch.from_numpy(weights),
               "layers.0.out": torch.from_numpy(out.astype(np.float32)),
               **{f"layers.0.{m}": torch.from_numpy(matrices[1, m][ROWS].copy()) for m in ("gate", "up", "down")}},
              folder / "golden.safetensors")


if __name__ == "__main__":
    for name in sys.argv[1:] or FOLDERS:
        make(name)
        print(name)
