# hello.py - routes a token from Python, with ctypes and the shared library; and an error with its text
#
#     make lib && python3 examples/ffi/hello.py
#
# Nothing but the standard library. The shared library wants struct_size, so that a newer one can tell old callers.
import ctypes as c
import os
import sys

lib = c.CDLL(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "build", "libmoe.so"))


class Error(c.Structure):
    _fields_ = [("code", c.c_int32), ("member", c.c_char * 92), ("text", c.c_char * 672)]


class Routing(c.Structure):  # moe_routing_desc, member by member
    _fields_ = [(name, c.c_float if name in ("logit_multiplier", "logit_softcap", "renormalize_epsilon", "scale",
                                             "extra_weight", "sparse_mixer") else c.c_int32)
                for name in """struct_size score score_order select top_k logit_multiplier logit_softcap bias_rows groups
                groups_kept group_rule group_excluded renormalize renormalize_epsilon zero_sum scale scale_on
                per_expert_scale weight_on forced_rows marked_token_lo marked_token_hi special_experts special_kind
                extra_slots extra_scored extra_weight sparse_mixer global_scale simulate simulate_seed""".split()]
    _fields_ += [("reserved", c.c_uint32 * 5)]


class RouteArgs(c.Structure):  # moe_reference_route_args
    _fields_ = [("struct_size", c.c_uint32), ("num_tokens", c.c_int32), ("num_experts", c.c_int32),
                ("ids_dtype", c.c_int32), ("logits", c.c_void_p), ("bias", c.c_void_p), ("bias_index", c.c_void_p),
                ("per_expert_scale", c.c_void_p), ("forced_ids", c.c_void_p), ("token_ids", c.c_void_p),
                ("global_scale", c.c_float), ("reserved0", c.c_int32), ("out_ids", c.c_void_p),
                ("out_weights", c.c_void_p), ("reserved", c.c_uint32 * 4)]


def check(result, err):
    if result != 0:
        raise ValueError(err.text.decode())


def route(logits, top_k, method=1):  # MOE_ROUTING_RENORMALIZE
    err, routing, args = Error(), Routing(struct_size=c.sizeof(Routing)), RouteArgs(struct_size=c.sizeof(RouteArgs))
    check(lib.moe_routing_preset(method, c.byref(routing), c.byref(err)), err)
    routing.struct_size, routing.top_k = c.sizeof(Routing), top_k
    values, ids, weights = (c.c_float * len(logits))(*logits), (c.c_int32 * top_k)(), (c.c_float * top_k)()
    args.num_tokens, args.num_experts = 1, len(logits)
    args.logits, args.out_ids, args.out_weights = c.addressof(values), c.addressof(ids), c.addressof(weights)
    check(lib.moe_reference_route(c.byref(routing), c.byref(args), c.byref(err)), err)
    return list(ids), [round(w, 4) for w in weights]


print("moe.h", lib.moe_version())
print("experts %s, weights %s" % route([0.5, -1.0, 2.0, 1.5], 2))
try:
    route([0.5, -1.0, 2.0, 1.5], 5)
    sys.exit("top_k 5 of 4 experts was not refused")
except ValueError as refusal:
    print(refusal)
