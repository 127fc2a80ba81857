#!/usr/bin/env python3
"""compare_transformers.py - layers on this machine's GPU beside transformers' own modules in bf16, both against fp32

    make lib && python3 tests/compare_transformers.py [family ...]        MOE_BACKEND=cpu: both on the CPU

Families of tests/golden/make_golden.py in the sizes below: a checkpoint of bf16 numbers in a temporary folder is read
by transformers' loader in fp32 and in bf16, and by moe.h. All get the same tokens. Error: root mean square over the
tokens that all three give to the same experts, relative to the fp32 module's output. moe.h passes where its error is at
most 1.1 times that of transformers in bf16, or below 1e-3, and rounding left out 5 % of the tokens at most.
"""
import ctypes
import os
import sys
import tempfile
from pathlib import Path

import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "golden"), str(HERE.parent / "bench" / "compare")]
import layer_torch  # structs of moe.h by name
import make_golden

# Released in bf16; the router reads what the experts read, and routing needs no token ids.
FAMILIES = ("mixtral qwen2_moe qwen3_moe qwen3_next qwen3_5_moe deepseek_v2 deepseek_v3 dots1 glm4_moe minimax_m2 "
            "llama4 gpt_oss ernie4_5_moe hunyuan_v1_moe phimoe").split()
SIZES = {"qwen3_moe": dict(E=64, k=8, H=1024, I=512), "deepseek_v3": dict(E=64, k=8, H=2048, I=512)}
OTHERS = dict(E=32, H=1024, I=512)
TOKENS, LEFT_OUT = 256, 256 // 20
DEVICE = "cpu" if os.environ.get("MOE_BACKEND") == "cpu" else "cuda"
Struct, INPUT_LOGITS = layer_torch.Struct, layer_torch.INPUT_LOGITS
BACKEND = layer_torch.BACKEND_CUDA if DEVICE == "cuda" else 1


class Moe:
    """One layer of a checkpoint's folder."""
    context = ctypes.c_void_p()

    def __init__(self, folder, index):
        self.error, self.info, layer = Struct("moe_error"), Struct("moe_plan_info"), Struct("moe_layer_desc")
        self.weights, self.plan, checkpoint = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        if not Moe.context:
            desc = Struct("moe_context_desc", backend=BACKEND)
            self.call("context_create", desc.memory, ctypes.byref(Moe.context))
        self.call("checkpoint_open", str(folder).encode(), None, ctypes.byref(checkpoint))
        self.call("checkpoint_layer", checkpoint, ctypes.c_int32(index), layer.memory)
        self.call("weights_from_checkpoint", Moe.context, checkpoint, layer.memory, ctypes.byref(self.weights))
        desc = Struct("moe_plan_desc", max_tokens=TOKENS)
        self.call("plan_create", Moe.context, layer.memory, desc.memory, ctypes.byref(self.plan))
        self.call("plan_get_info", self.plan, self.info.memory)
        layer_torch.Moe.lib.moe_checkpoint_close(checkpoint)
        self.room = torch.empty(self.info["workspace_bytes"] + 256, dtype=torch.uint8, device=DEVICE)

    def call(self, name, *args):
        if getattr(layer_torch.Moe.lib, "moe_" + name)(*args, self.error.memory) != 0:
            raise RuntimeError(self.error.text("text"))

    def run(self, x):
        """Output and the chosen experts of each token."""
        address = self.room.data_ptr()
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else None)
        logits = torch.empty(len(x), self.info["router_width"], dtype=torch.float32, device=DEVICE)
        ids = torch.empty(len(x), self.info["slots"], dtype=torch.int32, device=DEVICE)
        out = torch.empty_like(x)
        args = Struct("moe_execute_args", input_mode=INPUT_LOGITS, num_tokens=len(x), x=x.data_ptr(),
                      logits=logits.data_ptr(), out=out.data_ptr(), out_ids=ids.data_ptr(),
                      workspace=-address % 256 + address, workspace_bytes=self.info["workspace_bytes"])
        lib = layer_torch.Moe.lib
        if lib.moe_router_logits(self.plan, self.weights, args.memory, ctypes.c_void_p(logits.data_ptr()), stream) != 0:
            raise RuntimeError("moe_router_logits() was refused")
        self.call("execute_check", self.plan, self.weights, args.memory)  # on the CPU it reads the logits
        if lib.moe_execute(self.plan, self.weights, args.memory, stream) != 0:
            raise RuntimeError("moe_execute() was refused")
        return out, ids

    def close(self):
        layer_torch.Moe.lib.moe_plan_destroy(self.plan)
        layer_torch.Moe.lib.moe_weights_destroy(self.weights)


def compare(name, folder):
    """Lines of a table; how many failed."""
    family, failed = make_golden.FAMILIES[name](**SIZES.get(name, OTHERS)), 0
    tensors = {t: v.bfloat16().to(v.dtype) for t, v in make_golden.draw_tensors(name, family).items()}
    make_golden.write_folder(folder, family, tensors)
    models = [make_golden.load(folder, family, dtype).to(DEVICE) for dtype in (torch.float32, torch.bfloat16)]
    for n in family.layers:
        x = make_golden.Param((TOKENS, family.hidden), family.x_std)
        x = make_golden.draw(x, torch.bfloat16, name, f"compare.{n}").to(DEVICE)
        runs = [family.run(model.get_submodule(family.block.format(n=n)), x.to(model.dtype)) for model in models]
        moe = Moe(folder, n)
        out, ids = moe.run(x)
        k = runs[0]["ids"].shape[1]
        sets = [torch.sort(i[:, :k].long(), dim=1)[0] for i in (runs[0]["ids"], runs[1]["ids"], ids)]
        same = (sets[0] == sets[1]).all(1) & (sets[0] == sets[2]).all(1)
        moe.close()
        exact, left_out = runs[0]["out"][same], TOKENS - int(same.sum())
        theirs, ours = (float((y.float()[same] - exact).norm() / exact.norm()) for y in (runs[1]["out"], out))
        good = left_out <= LEFT_OUT and (ours <= 1.1 * theirs or ours < 1e-3)
        failed += not good
        print("%-16s %5d   %.2e       %.2e   %2d of %d%s" % (name, n, theirs, ours, left_out, TOKENS,
                                                             "" if good else "   FAILED"), flush=True)
    return failed


def main():
    passed = failed = 0
    print("%-16s layer   transformers   moe.h      tokens left out" % "family")
    for name in sys.argv[1:] or FAMILIES:
        try:
            with tempfile.TemporaryDirectory() as folder:
                bad = compare(name, Path(folder))
        except Exception as error:  # one family less, counted
            print("%s: FAILED, %s: %s" % (name, type(error).__name__, str(error)[:300]))
            bad = 1
        failed += bad > 0
        passed += bad == 0
    print("compare_transformers: %d passed, %d failed" % (passed, failed))
    sys.exit(failed > 0)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with torch.no_grad():
        main()
