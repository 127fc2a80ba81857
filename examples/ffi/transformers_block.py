# transformers_block.py - the MoE blocks of a Qwen3-MoE model in PyTorch, computed by moe.h; compared with transformers
#
#     make lib && python3 examples/ffi/transformers_block.py
#
# With a GPU in bf16, on torch's memory and stream; else on the CPU in f32. Without torch or transformers it runs
# hello.c's layer from plain arrays and says what is missing. `--layout` prints where ctypes puts the members.
import ctypes as c
import json
import os
import sys

lib = c.CDLL(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "build", "libmoe.so"))


def struct(name, text):  # "i role part, q4 dims": type, length of arrays, members; _rest: what is not used here
    types = {"i": c.c_int32, "I": c.c_uint32, "q": c.c_int64, "Q": c.c_uint64, "P": c.c_void_p, "s": c.c_char}
    fields = []
    for part in text.split(","):
        code, *names = part.split()
        kind, count = types[code[0]], int(code[1:] or 0)
        fields += [(member, kind * count if count else kind) for member in names]
    return type(name, (c.Structure,), {"_fields_": fields})


Error = struct("moe_error", "i code, s92 member, s672 text")
Layer = struct("moe_layer_desc", "I struct_size, i layer_index hidden_size intermediate_size num_experts, s412 _rest")
Context = struct("moe_context_desc", "I struct_size, i backend device threads, P cuda_context, s200 _rest")
Tensor = struct("moe_tensor", "I struct_size, i role part expert index dtype rank layout halves row_order memory "
                "reserved0, q4 dims, P data, Q data_bytes, P rows rows_user name, i scale_layout, I3 reserved")
PlanDesc = struct("moe_plan_desc", "I struct_size flags, i max_tokens max_rows x_dtype logits_dtype ids_dtype "
                  "weights_dtype out_dtype intermediate_dtype, I8 reserved")
PlanInfo = struct("moe_plan_info", "I struct_size layout_id, Q weight_bytes workspace_bytes, i slots router_width "
                  "local_experts num_candidates, s1280 candidates, P tiles_text, i tiles_text_bytes tiles_tokens "
                  "num_tiles tile_rows tile_measured, I reserved, s192 gemm1 gemm2")
Args = struct("moe_execute_args", "I struct_size flags, i input_mode num_tokens, P num_tokens_dev x, q x_stride, "
              "P x_scale logits, q logits_stride, P ids weights token_ids bias_index counts_or_offsets, "
              "i rows_per_expert expected_rows, P shared_gate out, q out_stride, P out_ids out_weights "
              "out_row_of_slot out_expert_counts out_faults workspace, Q workspace_bytes, i sm_limit reserved0, "
              "P done_signal gemm2_start_event, P4 reserved")
CPU, CUDA = 1, 2                             # moe_backend
F32, BF16 = 1, 2                             # moe_dtype
GATE, UP, GATE_UP, DOWN = 1, 2, 3, 4         # moe_tensor_role
HALVES_GATE_UP, INPUT_LOGITS = 2, 1


def make(kind, **members):
    return kind(struct_size=c.sizeof(kind), **members)


class Moe:
    """A layer, its weights and a plan; memory is given by address, of the device where the back end is CUDA."""
    context = {}  # one for each back end

    def __init__(self, config, index, backend, dtype, max_tokens):
        self.backend, self.layer, self.err = backend, make(Layer), Error()
        self.weights, self.plan, self.info = c.c_void_p(), c.c_void_p(), make(PlanInfo)
        if backend not in Moe.context:
            Moe.context[backend] = c.c_void_p()
            self.call("moe_context_create", c.byref(make(Context, backend=backend)), c.byref(Moe.context[backend]))
        self.call("moe_layer_from_config", config, c.c_size_t(len(config)), None, c.c_size_t(0), c.c_int32(index),
                  c.byref(self.layer))
        self.call("moe_weights_create", Moe.context[backend], c.byref(self.layer), None, c.byref(self.weights))
        desc = make(PlanDesc, max_tokens=max_tokens, x_dtype=dtype)  # logits: f32
        self.call("moe_plan_create", Moe.context[backend], c.byref(self.layer), c.byref(desc), c.byref(self.plan))
        self.call("moe_plan_get_info", self.plan, c.byref(self.info))

    def call(self, name, *args):
        if getattr(lib, name)(*args, c.byref(self.err)) != 0:
            raise ValueError(self.err.text.decode())

    def set(self, role, dims, dtype, address, nbytes, expert=-1, halves=0):
        tensor = make(Tensor, role=role, expert=expert, index=-1, dtype=dtype, rank=len(dims), halves=halves,
                      memory=self.backend == CUDA, data=address, data_bytes=nbytes)
        tensor.dims[:len(dims)] = dims
        self.call("moe_weights_set_tensor", self.weights, c.byref(tensor))

    def seal(self):
        self.call("moe_weights_seal", self.weights)

    def run(self, tokens, x, logits, out, workspace, stream=None):
        args = make(Args, input_mode=INPUT_LOGITS, num_tokens=tokens, x=x, logits=logits, out=out,
                    workspace=-workspace % 256 + workspace, workspace_bytes=self.info.workspace_bytes)
        if lib.moe_execute(self.plan, self.weights, c.byref(args), c.c_void_p(stream)) != 0:
            self.call("moe_execute_check", self.plan, self.weights, c.byref(args))  # says why
            raise RuntimeError("a launch was refused")

    def __del__(self):
        lib.moe_plan_destroy(self.plan)
        lib.moe_weights_destroy(self.weights)


def hello():
    config = dict(model_type="qwen3_moe", hidden_size=2, moe_intermediate_size=2, num_experts=2, num_hidden_layers=1,
                  num_experts_per_tok=2, norm_topk_prob=True, hidden_act="silu", torch_dtype="float32")
    moe = Moe(json.dumps(config).encode(), 0, CPU, F32, 1)
    for expert, scale in enumerate((2.0, -1.0)):
        for role in (GATE, UP, DOWN):
            one = scale if role == DOWN else 1.0
            matrix = (c.c_float * 4)(one, 0, 0, one)
            moe.set(role, [2, 2], F32, c.addressof(matrix), c.sizeof(matrix), expert)
    moe.seal()
    x, logits, out = (c.c_float * 2)(1, 3), (c.c_float * 2)(0, 1.0986123), (c.c_float * 2)()
    room = c.create_string_buffer(moe.info.workspace_bytes + 256)
    moe.run(1, c.addressof(x), c.addressof(logits), c.addressof(out), c.addressof(room))
    print("hello.c: %.4f %.4f" % tuple(out))


def layout():
    for kind in (Error, Layer, Context, Tensor, PlanDesc, PlanInfo, Args):
        print("struct %s %d" % (kind.__name__, c.sizeof(kind)))
        for member, _ in kind._fields_:
            place = getattr(kind, member)
            if member != "_rest":
                print("member %s.%s %d %d" % (kind.__name__, member, place.offset, place.size))


def compare(torch, transformers):
    cuda = torch.cuda.is_available()
    device, kind, code = ("cuda", torch.bfloat16, BF16) if cuda else ("cpu", torch.float32, F32)
    hidden, inner, experts, top_k, most = (2048, 768, 128, 8, 2048) if cuda else (64, 32, 8, 2, 64)

    class Block(torch.nn.Module):
        """Takes the place of a Qwen3MoeSparseMoeBlock: its router in torch, its experts in moe.h."""

        def __init__(self, block, config, index):
            super().__init__()
            self.router = block.gate.weight.float()
            self.moe = Moe(config, index, CUDA if cuda else CPU, code, most)
            many = block.experts
            if hasattr(many, "gate_up_proj"):
                gate_up, down = many.gate_up_proj, many.down_proj
            else:  # before transformers 5: a module for each expert
                gate_up = torch.stack([torch.cat([e.gate_proj.weight, e.up_proj.weight]) for e in many])
                down = torch.stack([e.down_proj.weight for e in many])
            if cuda:
                torch.cuda.synchronize()  # moe.h reads the tensors on a stream of its own
            for role, t in ((GATE_UP, gate_up.contiguous()), (DOWN, down.contiguous())):
                self.moe.set(role, list(t.shape), code, t.data_ptr(), t.nbytes,
                             halves=HALVES_GATE_UP if role == GATE_UP else 0)
            self.moe.seal()
            self.room = torch.empty(self.moe.info.workspace_bytes + 256, dtype=torch.uint8, device=device)

        def forward(self, x):
            flat = x.reshape(-1, hidden).contiguous()
            logits = torch.nn.functional.linear(flat.float(), self.router)
            out = torch.empty_like(flat)
            stream = torch.cuda.current_stream().cuda_stream if cuda else None
            self.moe.run(flat.shape[0], flat.data_ptr(), logits.data_ptr(), out.data_ptr(), self.room.data_ptr(),
                         stream)
            return out.reshape(x.shape)

    def output(block, x):
        y = block(x)
        return (y[0] if isinstance(y, tuple) else y).float()

    torch.manual_seed(1)
    config = transformers.Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=inner, intermediate_size=inner, num_experts=experts,
        num_experts_per_tok=top_k, norm_topk_prob=True, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, vocab_size=64, torch_dtype=str(kind).split(".")[1],
        experts_implementation="eager")
    text = config.to_json_string(use_diff=False).encode()
    model = transformers.Qwen3MoeModel(config).to(device, kind).eval()
    worst = 0
    for index, layer in enumerate(model.layers):
        theirs = layer.mlp
        for weight in theirs.parameters():
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        ours = Block(theirs, text, index)
        x = [torch.randn(1, tokens, hidden, device=device, dtype=kind) for tokens in (1, 7, most)]
        results = [(output(ours, v), output(theirs, v)) for v in x]
        theirs.float()  # the same block and weights in f32: what both are measured against
        for v, (y, other) in zip(x, results):
            exact = output(theirs, v.float())
            apart = [((a - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item() for a in (y, other)]
            print("layer %d, %4d tokens: from f32, moe.h %.2e, transformers %.2e" % (index, v.shape[1], *apart))
            worst = max(worst, apart[0])
        layer.mlp = ours
    ids = torch.arange(16, device=device).reshape(1, 16)
    if not torch.isfinite(model(ids).last_hidden_state).all():
        sys.exit("the model's output is not finite")
    print("%d layers of %d experts replaced, farthest token %.2e" % (len(model.layers), experts, worst))
    # bf16: intermediate, row and output are rounded by at most 2^-9 each, twice that for what their errors add up to;
    # f32: sums of 64 terms in another order.
    if not worst < (2 ** -7 if cuda else 1e-5):
        sys.exit("too far")


if "--layout" in sys.argv[1:]:
    layout()
    sys.exit()
hello()
try:
    import torch
    import transformers
except ImportError as missing:
    print("not compared: %s" % missing)
    sys.exit()
with torch.no_grad():
    compare(torch, transformers)
