#!/usr/bin/env python3
"""compare_transformers.py - layers on this machine's GPU beside transformers' own modules in bf16, both against fp32

    make lib && python3 tests/compare_transformers.py [family ...]

The folders of tests/golden are read twice by transformers' loader, in fp32 and in bf16 on the GPU, and once by moe.h. All
get the same tokens, other than those stored there. Error: root mean square over the tokens whose experts all three agree
on, relative to the fp32 module's output. moe.h passes where its error is at most 1.1 times that of transformers in bf16.
"""
import ctypes
import sys
from pathlib import Path

import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "golden"), str(HERE.parent / "bench" / "compare")]
import layer_torch  # structs of moe.h by name
import make_golden

# Released in bf16; the router reads what the experts read, and routing needs no token ids.
FAMILIES = ("mixtral qwen2_moe qwen3_moe qwen3_next qwen3_5_moe deepseek_v2 deepseek_v3 dots1 glm4_moe minimax_m2 llama4 "
            "gpt_oss ernie4_5_moe hunyuan_v1_moe phimoe").split()
TOKENS = 256
Struct, INPUT_LOGITS, BACKEND_CUDA = layer_torch.Struct, layer_torch.INPUT_LOGITS, layer_torch.BACKEND_CUDA


class Moe:
    """One layer of a checkpoint's folder."""
    context = ctypes.c_void_p()

    def __init__(self, folder, index):
        self.error, self.info, layer = Struct("moe_error"), Struct("moe_plan_info"), Struct("moe_layer_desc")
        self.weights, self.plan, checkpoint = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        if not Moe.context:
            desc = Struct("moe_context_desc", backend=BACKEND_CUDA, device=torch.cuda.current_device())
            self.call("context_create", desc.memory, ctypes.byref(Moe.context))
        self.call("checkpoint_open", str(folder).encode(), None, ctypes.byref(checkpoint))
        self.call("checkpoint_layer", checkpoint, ctypes.c_int32(index), layer.memory)
        self.call("weights_from_checkpoint", Moe.context, checkpoint, layer.memory, ctypes.byref(self.weights))
        desc = Struct("moe_plan_desc", max_tokens=TOKENS)
        self.call("plan_create", Moe.context, layer.memory, desc.memory, ctypes.byref(self.plan))
        self.call("plan_get_info", self.plan, self.info.memory)
        layer_torch.Moe.lib.moe_checkpoint_close(checkpoint)
        self.room = torch.empty(self.info["workspace_bytes"] + 256, dtype=torch.uint8, device="cuda")

    def call(self, name, *args):
        if getattr(layer_torch.Moe.lib, "moe_" + name)(*args, self.error.memory) != 0:
            raise RuntimeError(self.error.text("text"))

    def run(self, x):
        """Output and the chosen experts of each token."""
        address, stream = self.room.data_ptr(), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        logits = torch.empty(len(x), self.info["router_width"], dtype=torch.float32, device="cuda")
        ids = torch.empty(len(x), self.info["slots"], dtype=torch.int32, device="cuda")
        out = torch.empty_like(x)
        args = Struct("moe_execute_args", input_mode=INPUT_LOGITS, num_tokens=len(x), x=x.data_ptr(),
                      logits=logits.data_ptr(), out=out.data_ptr(), out_ids=ids.data_ptr(),
                      workspace=-address % 256 + address, workspace_bytes=self.info["workspace_bytes"])
        self.call("execute_check", self.plan, self.weights, args.memory)
        for code in (layer_torch.Moe.lib.moe_router_logits(self.plan, self.weights, args.memory,
                                                           ctypes.c_void_p(logits.data_ptr()), stream),
                     layer_torch.Moe.lib.moe_execute(self.plan, self.weights, args.memory, stream)):
            if code != 0:
                raise RuntimeError("refused with code %d" % code)
        return out, ids

    def close(self):
        layer_torch.Moe.lib.moe_plan_destroy(self.plan)
        layer_torch.Moe.lib.moe_weights_destroy(self.weights)


def load(folder, name, family, dtype):
    """A model by transformers' loader, on the GPU, and the tensors that its files hold."""
    cls = getattr(transformers, family.architecture)
    config = cls.config_class.from_dict(family.for_transformers) if family.for_transformers else None
    model = cls.from_pretrained(folder, config=config, dtype=dtype, experts_implementation="eager",
                                ignore_mismatched_sizes=family.finish is not None).eval()
    for n in family.layers:
        if family.finish:
            tensors = {t: make_golden.draw(p, family.dtype, name, t) for t, p in family.layers[n].items()}
            prefix = family.prefix.format(n=n) + "."
            family.finish(model.get_submodule(family.block.format(n=n)),
                          {t.removeprefix(prefix): v.to(dtype) for t, v in tensors.items()})
    return model.cuda()


def compare(name):
    """Lines of a table; how many failed."""
    family, folder, failed = make_golden.FAMILIES[name](), HERE / "golden" / name, 0
    models = {dtype: load(folder, name, family, dtype) for dtype in (torch.float32, torch.bfloat16)}
    for n in family.layers:
        x = make_golden.Param((TOKENS, family.hidden), family.x_std)
        x = make_golden.draw(x, torch.bfloat16, name, f"compare.{n}").cuda()
        runs = []
        for dtype, model in models.items():
            result = family.run(model.get_submodule(family.block.format(n=n)), x.to(dtype))
            runs.append((result["out"].float(), result["ids"]))
        moe = Moe(folder, n)
        out, ids = moe.run(x)
        moe.close()
        k = runs[0][1].shape[1]
        sets = [torch.sort(i[:, :k].long(), dim=1)[0] for i in (runs[0][1], runs[1][1], ids)]
        same = (sets[0] == sets[1]).all(1) & (sets[0] == sets[2]).all(1)
        exact = runs[0][0][same]
        theirs, ours = ((y.float()[same] - exact).norm() / exact.norm() for y in (runs[1][0], out))
        good = same.sum() >= TOKENS // 2 and ours <= 1.1 * theirs
        failed += not good
        print("%-16s layer %d: %3d tokens routed alike, error of transformers %.2e, of moe.h %.2e%s" % (
            name, n, same.sum(), theirs, ours, "" if good else " FAILED"))
    return failed


def main():
    passed = failed = 0
    for name in sys.argv[1:] or FAMILIES:
        try:
            bad = compare(name)
        except Exception as error:  # one family less, counted
            print("%s: FAILED, %s: %s" % (name, type(error).__name__, str(error)[:300]))
            bad = 1
        failed += bad > 0
        passed += bad == 0
    print("compare_transformers: %d passed, %d failed" % (passed, failed))
    sys.exit(failed > 0)


if __name__ == "__main__":
    with torch.no_grad():
        main()
