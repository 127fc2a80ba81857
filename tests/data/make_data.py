#!/usr/bin/env python3
"""Writes the test data of this folder.

    make_data.py routing    routing/oracle.safetensors, routing/oracle.tsv     needs numpy, safetensors
    make_data.py configs    configs/*.json, configs/expected.tsv, quant/, vllm_decision.tsv
    make_data.py dtypes     dtypes.tsv                                         needs numpy, ml_dtypes
    make_data.py check      compares configs/ with transformers' own classes    needs transformers

Everything is deterministic: the same text gives the same files, byte for byte.

routing/oracle.tsv has one row per case, in the column names of configs/expected.tsv, so that a test can build the
descriptor without knowing the method. oracle.safetensors holds, per case:
  .logits            f32 [T, W]; W = num_experts + zero_experts (+ shared_experts, last, where renorm_shared is 1)
  .bias              f32 [bias_rows, num_experts + zero_experts]
  .bias_index        i32 [T], the bias row of each token
  .token_ids         i32 [T], row of .forced; -1 is a token that leaves the table and is routed by its logits
  .forced            i32 [vocabulary, k]
  .per_expert_scale  f32 [num_experts]
  .ids               i32 [T, k], in slot order: falling key, equal keys by rising id; group by group for group_rule each
  .weights           f64 [T, k], without the scale where scale_on is output
  .shared_weights    f64 [T, shared_experts], where renorm_shared is 1
  .gap               f64 [T], the smallest difference between neighbours of the ranking down to place k + 1 (of the
                     group ranking too), relative to the size of what was added up to make the keys. Exact ties do not
                     count, because equal inputs give equal keys in every precision. All gaps are above 1e-4.
Id num_experts and up are special experts; a skip expert's weight is 0.

dtypes.tsv has conversions by ml_dtypes, both sides in hexadecimal, f32 as its bits. way wide: from every code; nan
where it is one. way narrow: to a code, from every finite code's value, the middle between each two neighbours and the
floats on both sides of it, and numbers behind the largest. What ml_dtypes leaves open is as moe_convert() says: numbers
are cut to the range first, and ue8m0 is the power of two that is not below.

configs/expected.tsv has one row per file and layer. Columns that need a word:
  source               the transformers class it was checked against; vllm (0.33, read); document (no code at hand)
  is_moe               0: this layer has no routed experts, and the row's other cells are -
  hidden_size          the experts' input; the router and the shared experts see model_hidden_size
  score_when           before: scores of all experts, then top-k; after: top-k on logits, then scores of the chosen
  groups               1 where there is no choice of groups. group_rule each: top_k / groups in every group
  scale_on             output: the routed sum is multiplied, outside the router
  limit, alpha, beta   of the routed experts. situ: alpha is the gate's constant, beta the up half's
  shared_experts       how many the config names; they are one MLP of width shared_intermediate, except where
                       renorm_shared is 1 (each has this width and its own weight)
  shared_activation    with its limit shared_limit (0: none); alpha and beta as for the routed
  output_scale         multiplies routed + shared
  jitter               the sparse mixer's threshold is 2 * jitter
NAME.min.json is NAME.json without the keys whose absence the transformers class makes good; sizes stay. Values are
those of released models as far as known, else the class's defaults; *_mixed, *_grouped, *_lists, *_limits are made up.
"""
import json
import math
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))

# --- descriptor ------------------------------------------------------------------------------------------------------

ROUTING_DEFAULTS = dict(
    num_experts=0, top_k=0, score="softmax", score_when="before", select="score", has_bias=0, bias_rows=0,
    groups=1, groups_kept=1, group_rule="none", group_excluded="-", renorm="off", epsilon=0.0, scale=1.0,
    scale_on="weights", weight_on="output", per_expert_scale=0, zero_experts=0, zero_kind="none", forced_ids=0,
    logit_multiplier=1.0, softcap=0.0, shared_experts=0, renorm_shared=0, sparse_mixer=0, jitter=0.0)


def routing(**fields):
    d = dict(ROUTING_DEFAULTS)
    unknown = set(fields) - set(d)
    assert not unknown, unknown
    d.update(fields)
    if d["has_bias"] and not d["bias_rows"]:
        d["bias_rows"] = 1
    return d


def text(value):
    """A cell of a table: integers plain, other numbers in the shortest form that reads back the same."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)
    return str(value)


def write_table(path, columns, rows):
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        f.write("\t".join(columns) + "\n")
        for row in rows:
            f.write("\t".join(text(row[c]) for c in columns) + "\n")


# --- routing: each method straight from its formula -------------------------------------------------------------------

TINY = 2.0 ** -126          # below this a float32 test cannot see a difference
WANTED_GAP = 1e-4


class Rank:
    """Top-k with the tie rule, and the record of how close the ranking was."""

    def __init__(self, np):
        self.np = np
        self.gap = math.inf

    def top(self, key, k, size=None):
        np = self.np
        size = np.abs(key) if size is None else size
        order = np.lexsort((np.arange(len(key)), -key))
        for a, b in zip(order[:k], order[1:k + 1]):
            if key[a] != key[b]:
                scale = max(size[a], size[b], TINY)
                if math.isfinite(key[a] - key[b]):
                    self.gap = min(self.gap, (key[a] - key[b]) / scale)
        return order[:k]


def methods(np):
    """name -> function(rank, descriptor, token) -> ids, weights. A token is a dict of its logits row, bias row, ..."""

    def softmax(x):
        e = np.exp(x - np.max(x))
        return e / e.sum()

    def sigmoid(x):
        with np.errstate(over="ignore"):
            return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))

    def sqrt_softplus(x):
        return np.sqrt(np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))))

    def size(s, b):
        return np.abs(s) + np.abs(b)

    def default(r, d, t):
        p = softmax(t["logits"])
        ids = r.top(p, d["top_k"])
        return ids, p[ids]

    def renormalize(r, d, t):
        ids = r.top(t["logits"], d["top_k"], np.ones(len(t["logits"])))
        return ids, softmax(t["logits"][ids])

    def renormalize_naive(r, d, t):
        ids, w = default(r, d, t)
        return ids, w / w.sum()

    def top_k_raw(r, d, t):
        ids = r.top(t["logits"], d["top_k"])
        return ids, t["logits"][ids]

    def sigmoid_plain(r, d, t):
        s = sigmoid(t["logits"])
        ids = r.top(s, d["top_k"])
        return ids, s[ids]

    def sigmoid_renorm(r, d, t):
        ids, w = sigmoid_plain(r, d, t)
        return ids, w / max(w.sum(), 1e-20)

    def flint(r, d, t):
        ids, w = sigmoid_plain(r, d, t)
        return ids, w / w.sum()

    def top_k_sigmoid(r, d, t):
        ids = r.top(t["logits"], d["top_k"])
        return ids, sigmoid(t["logits"][ids])

    def cohere2_norm(r, d, t):
        ids, w = top_k_sigmoid(r, d, t)
        return ids, w / w.sum()

    def keep_groups(r, d, key, key_size, reduce, excluded):
        n, width = d["groups"], len(key) // d["groups"]
        score = np.array([reduce(key[g * width:(g + 1) * width]) for g in range(n)])
        sizes = np.array([2 * key_size[g * width:(g + 1) * width].max() for g in range(n)])
        kept = r.top(score, d["groups_kept"], sizes)
        out = np.full(len(key), excluded)
        for g in kept:
            out[g * width:(g + 1) * width] = key[g * width:(g + 1) * width]
        return out

    def top2(x):
        return np.sort(x)[-2:].sum()

    def biased_sigmoid(eps, excluded=-math.inf, scaled=True):
        def method(r, d, t):
            s = sigmoid(t["logits"])
            key, key_size = s + t["bias"], size(s, t["bias"])
            if d["groups"] > 1:
                key = keep_groups(r, d, key, key_size, top2, excluded)
            ids = r.top(key, d["top_k"], key_size)
            w = s[ids] / (s[ids].sum() + eps)
            return ids, w * d["scale"] if scaled else w
        return method

    def deepseek_v4(r, d, t):
        s = sqrt_softplus(t["logits"])
        if "forced" in t:
            ids = t["forced"]
        else:
            ids = r.top(s + t["bias"], d["top_k"], size(s, t["bias"]))
        return ids, s[ids] / (s[ids].sum() + 1e-20) * d["scale"]

    def deepseek_v41(r, d, t):
        s = sqrt_softplus(t["logits"])
        ids = r.top(s + t["bias"], d["top_k"], size(s, t["bias"]))
        total = s[ids].sum()
        return ids, s[ids] / (total if total > 0 else 1.0) * d["scale"]

    def deepseek_v2(r, d, t):
        p = softmax(t["logits"])
        if d["groups"] > 1:
            p = keep_groups(r, d, p, p, np.max, 0.0)
        ids = r.top(p, d["top_k"])
        return ids, p[ids] * d["scale"]

    def mistral4(r, d, t):
        p = softmax(t["logits"])
        key = keep_groups(r, d, p, p, top2, 0.0) if d["groups"] > 1 else p
        ids = r.top(key, d["top_k"])
        return ids, p[ids] / (p[ids].sum() + 1e-20) * d["scale"]

    def ernie45(r, d, t):
        p = softmax(t["logits"])
        ids = r.top(p + t["bias"], d["top_k"], size(p, t["bias"]))
        return ids, p[ids] / max(p[ids].sum(), 1e-12)

    def longcat(r, d, t):
        p = softmax(t["logits"])
        ids = r.top(p + t["bias"], d["top_k"], size(p, t["bias"]))
        return ids, p[ids] * d["scale"]

    def zaya(r, d, t):
        p = softmax(t["logits"])
        ids = r.top(p + t["bias"], 1, size(p, t["bias"]))
        return ids, np.where(ids == d["num_experts"], 0.0, p[ids])

    def gemma4(r, d, t):
        p = softmax(t["logits"])
        ids = r.top(p, d["top_k"])
        return ids, p[ids] / p[ids].sum() * t["per_expert_scale"][ids]

    def phimoe(r, d, t):
        s, left = t["logits"], t["logits"].copy()
        ids, weights = [], []
        for _ in range(2):
            (e,) = r.top(left, 1)
            m = left[e]
            ratio = (m - s) / np.maximum(np.abs(s), m)
            near = np.abs(ratio - 2 * d["jitter"]).min()      # the cut-off is a decision too
            r.gap = min(r.gap, near)
            masked = np.where(ratio > 2 * d["jitter"], -math.inf, left)
            ids.append(e)
            weights.append(softmax(masked)[e])
            left[e] = -math.inf
        return np.array(ids), np.array(weights)

    def inkling(r, d, t):
        n = d["num_experts"]
        s = sigmoid(t["logits"])
        ids = r.top(s[:n] + t["bias"], d["top_k"], size(s[:n], t["bias"]))
        all_ids = np.concatenate([ids, np.arange(n, n + d["shared_experts"])])
        w = s[all_ids] / s[all_ids].sum() * d["scale"]
        return ids, w

    def kolibri(r, d, t):
        ids = r.top(t["logits"] + t["bias"], d["top_k"], size(t["logits"], t["bias"]))
        w = sigmoid(t["logits"][ids])
        return ids, w / w.sum() if d["renorm"] == "sum" else w

    def interns1_pro(r, d, t):
        p = softmax(t["logits"])
        n = d["groups"]
        width = len(p) // n
        ids = np.concatenate([g * width + r.top(p[g * width:(g + 1) * width], d["top_k"] // n) for g in range(n)])
        return ids, p[ids] / p[ids].sum()

    def laguna(r, d, t):
        c = d["softcap"]
        s = sigmoid(np.tanh(t["logits"] / c) * c)
        ids = r.top(s + t["bias"], d["top_k"], size(s, t["bias"]))
        return ids, s[ids] / s[ids].sum()

    def muse_spark(r, d, t):
        s = sigmoid(t["logits"] * d["logit_multiplier"])
        ids = r.top(s + t["bias"], d["top_k"], size(s, t["bias"]))
        return ids, s[ids] / (s[ids].sum() + 1e-15) * d["scale"]

    return dict(
        default=default, renormalize=renormalize, renormalize_naive=renormalize_naive, top_k=top_k_raw,
        sigmoid=sigmoid_plain, sigmoid_renorm=sigmoid_renorm, flint=flint, top_k_sigmoid=top_k_sigmoid,
        llama4=top_k_sigmoid, cohere2_norm=cohere2_norm, deepseek_v3=biased_sigmoid(1e-20),
        minimax2=biased_sigmoid(1e-20), minimax_m2=biased_sigmoid(0.0), lfm2=biased_sigmoid(1e-6),
        beam=biased_sigmoid(1e-20, scaled=False), axk2=biased_sigmoid(1e-20, excluded=0.0),
        deepseek_v4=deepseek_v4, deepseek_v41=deepseek_v41, deepseek_v2=deepseek_v2, mistral4=mistral4,
        ernie45=ernie45, longcat=longcat, zaya=zaya, gemma4=gemma4, phimoe=phimoe, inkling=inkling, kolibri=kolibri,
        interns1_pro=interns1_pro, laguna=laguna, muse_spark=muse_spark)


def by_fields(np, d, t):
    """The same from the descriptor's fields alone. It proves that the table's row describes the method's formula."""
    n_all = d["num_experts"] + d["zero_experts"]
    x = t["logits"] * d["logit_multiplier"]
    if d["softcap"]:
        x = np.tanh(x / d["softcap"]) * d["softcap"]
    x, x_shared = x[:n_all], x[n_all:]

    def score(v):
        if d["score"] == "raw":
            return v
        if d["score"] == "softmax":
            e = np.exp(v - v.max())
            return e / e.sum()
        s = np.maximum(v, 0) + np.log1p(np.exp(-np.abs(v)))
        return np.exp(v - s) if d["score"] == "sigmoid" else np.sqrt(s)

    def ranked(key, k):
        return np.lexsort((np.arange(len(key)), -key))[:k]

    before = d["score_when"] == "before"
    with np.errstate(invalid="ignore"):
        s = score(x) if before else None
    if s is not None and d["score"] == "sigmoid":
        s = np.where(np.isneginf(x), 0.0, s)
    key = (s if d["select"] == "score" else x) + (t["bias"] if d["has_bias"] else 0.0)
    n, width = d["groups"], n_all // d["groups"]
    weights_from_key = None
    if d["group_rule"] in ("max", "top2"):
        rows = key.reshape(n, width)
        group = rows.max(axis=1) if d["group_rule"] == "max" else np.sort(rows, axis=1)[:, -2:].sum(axis=1)
        kept = ranked(group, d["groups_kept"])
        inside = np.isin(np.arange(n_all) // width, kept)
        key = np.where(inside, key, 0.0 if d["group_excluded"] == "zero" else -math.inf)
    if d["sparse_mixer"]:
        left, ids, weights_from_key = x.copy(), [], []
        for _ in range(d["top_k"]):
            e = ranked(left, 1)[0]
            drop = (left[e] - x) / np.maximum(np.abs(x), left[e]) > 2 * d["jitter"]
            masked = np.where(drop, -math.inf, left)
            weights_from_key.append(1 / np.exp(masked - left[e]).sum())
            ids.append(e)
            left[e] = -math.inf
        ids = np.array(ids)
    elif "forced" in t:
        ids = t["forced"]
    elif d["group_rule"] == "each":
        ids = np.concatenate([g * width + ranked(key[g * width:(g + 1) * width], d["top_k"] // n) for g in range(n)])
    else:
        ids = ranked(key, d["top_k"])
    if weights_from_key is not None:
        w = np.array(weights_from_key)
    else:
        w = s[ids] if before else score(x[ids])
    if d["renorm_shared"]:
        w = np.concatenate([w, score(x_shared)])
    if d["renorm"] == "sum":
        total = w.sum() + d["epsilon"]
        w = w / (total if total > 0 else 1.0)
    elif d["renorm"] == "clamp":
        w = w / max(w.sum(), d["epsilon"])
    if d["scale_on"] == "weights":
        w = w * d["scale"]
    if d["per_expert_scale"]:
        w = w * t["per_expert_scale"][ids]
    if d["zero_kind"] == "skip":
        w = np.where(ids >= d["num_experts"], 0.0, w)
    return ids, w


# --- routing: inputs --------------------------------------------------------------------------------------------------

ALL_ROWS = ("plain", "tie", "minus_inf", "negative", "large", "equal")
BIG_ROWS = ("plain", "tie", "minus_inf", "large")


def oracle_cases():
    """name, method, preset, options of the input maker, descriptor"""
    v3 = dict(score="sigmoid", has_bias=1, renorm="sum", epsilon=1e-20)
    top2 = dict(group_rule="top2", group_excluded="-inf")
    softmax_norm = dict(renorm="sum")
    after = dict(score_when="after", select="logit")
    v4 = dict(score="sqrt_softplus", has_bias=1, renorm="sum", epsilon=1e-20)
    c = []

    def case(name, method, preset, e, k, options=None, **fields):
        c.append((name, method, preset, options or {}, routing(num_experts=e, top_k=k, **fields)))

    for e, k in ((8, 2), (60, 4), (256, 8)):
        case(f"default_{e}_{k}", "default", "Default", e, k)
    for e, k in ((8, 2), (128, 8), (512, 22), (2048, 32)):
        case(f"renormalize_{e}_{k}", "renormalize", "Renormalize", e, k, **after)
    case("deepseek_v3_256_8", "deepseek_v3", "DeepSeekV3", 256, 8, groups=8, groups_kept=4, scale=2.5, **v3, **top2)
    case("deepseek_v3_512_8", "deepseek_v3", "DeepSeekV3", 512, 8, groups=8, groups_kept=4, scale=2.5, **v3, **top2)
    case("deepseek_v3_1group_384_8", "deepseek_v3", "DeepSeekV3", 384, 8, scale=2.827, **v3)
    case("deepseek_v3_1group_512_22", "deepseek_v3", "DeepSeekV3", 512, 22, scale=5.0, **v3)
    case("deepseek_v3_1group_896_16", "deepseek_v3", "DeepSeekV3", 896, 16, scale=2.5, **v3)
    case("deepseek_v3_negative_bias_128_8", "deepseek_v3", "DeepSeekV3", 128, 8, dict(bias_shift=-1.0), scale=1.0, **v3)
    case("deepseek_v3_negative_bias_grouped_256_8", "deepseek_v3", "DeepSeekV3", 256, 8, dict(bias_shift=-1.0),
         groups=8, groups_kept=4, scale=2.5, **v3, **top2)
    for e in (16, 128):
        case(f"llama4_{e}_1", "llama4", "Llama4", e, 1, score="sigmoid", weight_on="input", **after)
    for e, k in ((60, 4), (128, 8)):
        case(f"renormalize_naive_{e}_{k}", "renormalize_naive", "RenormalizeNaive", e, k, **softmax_norm)
    case("top_k_128_8", "top_k", "TopK", 128, 8, score="raw")
    for e, k in ((60, 4), (256, 8)):
        case(f"sigmoid_renorm_{e}_{k}", "sigmoid_renorm", "SigmoidRenorm", e, k, score="sigmoid", renorm="clamp",
             epsilon=1e-20)
    for e, k in ((8, 2), (256, 8)):
        case(f"minimax2_{e}_{k}", "minimax2", "MiniMax2", e, k, **v3)
    case("sigmoid_128_8", "sigmoid", "Sigmoid", 128, 8, score="sigmoid")
    case("top_k_sigmoid_128_8", "top_k_sigmoid", "TopKSigmoid", 128, 8, score="sigmoid", **after)
    for e in (256, 384):
        case(f"deepseek_v4_{e}_6", "deepseek_v4", "DeepSeekV4", e, 6, scale=1.5 if e == 256 else 2.5, **v4)
    case("deepseek_v4_hash_256_6", "deepseek_v4", "DeepSeekV4", 256, 6, dict(forced="all"), scale=1.5, forced_ids=1,
         **dict(v4, has_bias=0))
    case("deepseek_v4_vision_256_6", "deepseek_v4", "DeepSeekV4", 256, 6, dict(forced="some"), scale=1.5,
         forced_ids=1, **v4)
    case("deepseek_v2_160_6", "deepseek_v2", "DeepSeekV2", 160, 6, groups=8, groups_kept=3, group_rule="max",
         group_excluded="zero", scale=16.0)
    case("deepseek_v2_greedy_64_6", "deepseek_v2", "DeepSeekV2", 64, 6)
    case("deepseek_v41_384_6", "deepseek_v41", "DeepSeekV41", 384, 6, scale=2.5, bias_rows=2, **dict(v4, epsilon=0.0))
    case("ernie45_64_6", "ernie45", "Ernie45", 64, 6, has_bias=1, renorm="clamp", epsilon=1e-12)
    case("longcat_512_12", "longcat", "LongCat", 512, 12, has_bias=1, scale=6.0, zero_experts=256,
         zero_kind="identity")
    case("gemma4_128_8", "gemma4", "Gemma4", 128, 8, per_expert_scale=1, **softmax_norm)
    case("phimoe_16_2", "phimoe", "PhiMoE", 16, 2, sparse_mixer=1, jitter=0.01, **after)
    case("mistral4_128_4", "mistral4", "Mistral4", 128, 4, renorm="sum", epsilon=1e-20)
    case("mistral4_grouped_128_4", "mistral4", "Mistral4", 128, 4, groups=8, groups_kept=2, group_rule="top2",
         group_excluded="zero", renorm="sum", epsilon=1e-20, scale=1.5)
    case("inkling_256_6", "inkling", "Inkling", 256, 6, score="sigmoid", has_bias=1, renorm="sum", scale=8.0,
         shared_experts=2, renorm_shared=1)
    case("kolibri_384_6", "kolibri", "Kolibri", 384, 6, score="sigmoid", has_bias=1, **after)
    case("kolibri_norm_384_6", "kolibri", "Kolibri", 384, 6, score="sigmoid", has_bias=1, renorm="sum", **after)
    case("interns1_pro_512_8", "interns1_pro", "-", 512, 8, groups=8, groups_kept=8, group_rule="each", **softmax_norm)
    case("laguna_256_8", "laguna", "-", 256, 8, score="sigmoid", has_bias=1, renorm="sum", softcap=5.0, scale=2.5,
         scale_on="output")
    case("muse_spark_256_8", "muse_spark", "-", 256, 8, score="sigmoid", has_bias=1, renorm="sum", epsilon=1e-15,
         logit_multiplier=0.1767766952966369)
    case("beam_256_8", "beam", "-", 256, 8, groups=8, groups_kept=4, scale=2.5, scale_on="output", **v3, **top2)
    case("axk2_128_8", "axk2", "-", 128, 8, groups=8, groups_kept=4, group_rule="top2", group_excluded="zero",
         scale=2.5, **v3)
    case("axk2_negative_bias_128_8", "axk2", "-", 128, 8, dict(bias_shift=-1.0), groups=8, groups_kept=4,
         group_rule="top2", group_excluded="zero", scale=2.5, **v3)
    case("minimax_m2_256_8", "minimax_m2", "-", 256, 8, score="sigmoid", has_bias=1, renorm="sum")
    case("lfm2_32_4", "lfm2", "-", 32, 4, score="sigmoid", has_bias=1, renorm="sum", epsilon=1e-6)
    case("cohere2_norm_128_8", "cohere2_norm", "-", 128, 8, score="sigmoid", renorm="sum", **after)
    case("flint_256_6", "flint", "-", 256, 6, score="sigmoid", renorm="sum")
    case("zaya_16_1", "zaya", "-", 16, 1, has_bias=1, zero_experts=1, zero_kind="skip")
    return c


class Inputs:
    """Logits whose ranking float32 can reproduce: the keys are laid out on an even grid and turned back into logits."""

    def __init__(self, np, d, options, seed):
        self.np, self.d, self.options = np, d, options
        self.rng = np.random.default_rng(seed)
        self.n = d["num_experts"] + d["zero_experts"]
        half = {"sigmoid": 0.15, "sqrt_softplus": 0.2, "raw": 0.5, "softmax": 0.5 / self.n}[d["score"]]
        if d["select"] == "logit":
            half = 0.5
        # Three pairs of experts share their bias, so that equal logits give equal keys.
        ids = self.rng.permutation(self.n)
        self.pairs = [tuple(sorted((int(ids[2 * i]), int(ids[2 * i + 1])))) for i in range(min(3, self.n // 2))]
        self.bias = []
        for _ in range(d["bias_rows"]):
            b = self.rng.permutation(np.linspace(-half, half, self.n)) + options.get("bias_shift", 0.0)
            for i, j in self.pairs:
                b[j] = b[i]
            self.bias.append(b.astype(np.float32))

    def invert(self, s):
        """the logits that give these scores, before multiplier and soft cap"""
        np, d = self.np, self.d
        if d["select"] == "score" and d["score"] == "sigmoid":
            s = np.log(s / (1 - s))
        elif d["select"] == "score" and d["score"] == "sqrt_softplus":
            s = np.log(np.expm1(s * s))
        if d["softcap"]:
            s = d["softcap"] * np.arctanh(s / d["softcap"])
        return s / d["logit_multiplier"]

    def row(self, kind, bias):
        np, d, rng, n = self.np, self.d, self.rng, self.n
        squashed = d["select"] == "score" and d["score"] in ("sigmoid", "sqrt_softplus")
        low, high = {"sigmoid": (0.2, 0.8), "sqrt_softplus": (0.5, 1.8)}[d["score"]] if squashed else (-4.0, 4.0)
        if kind == "negative":
            low, high = {"sigmoid": (0.17, 0.30), "sqrt_softplus": (0.38, 0.6)}[d["score"]] if squashed else (-9., -1.)
        # With softmax a bias of about 1/n does not shift logits; only squashed and raw keys can be aimed at.
        aimed = squashed or d["select"] == "logit" or d["score"] == "raw"
        shift = (bias - self.options.get("bias_shift", 0.0)) if d["has_bias"] and aimed else np.zeros(n)
        step = (high - low) / n
        keys = low + step * (np.arange(n) + 0.5 + rng.uniform(-0.2, 0.2, n))
        keys = rng.permutation(keys)
        if kind == "tie":
            # One pair at the top, one across the boundary between the chosen and the rest, one anywhere.
            k = d["top_k"]
            rest = np.sort(np.delete(keys, [i for pair in self.pairs for i in pair]))[::-1]
            above = k - 1 if k < 4 else k - 3
            spots = [len(rest) // 2, above] + ([0] if k >= 4 else [])
            for (i, j), spot in zip(self.pairs, spots):
                upper = rest[spot - 1] if spot else rest[0] + 2 * step
                keys[i] = keys[j] = (upper + rest[spot]) / 2
        x = self.invert(keys - shift)
        if kind == "minus_inf":
            gone = rng.permutation(n)[:n // 4]
            x[gone] = -math.inf
        if kind == "large":
            some = rng.permutation(n)
            if d["score"] == "sigmoid" and d["select"] == "score":
                # 60 and 80 both have the score 1 in float32 and in float64.
                x[some[:2]] = 80.0
                x[some[2:4]] = 80.0 if d["softcap"] or d["logit_multiplier"] != 1 else 60.0
                x[some[4:4 + n // 4]] = -80.0
            else:
                chosen = min(d["top_k"] + 2, n)
                # exp(-160) is 0 in float32 and would meet the 0 of excluded groups
                x[:] = 60.0 if d["group_excluded"] == "zero" else -80.0
                x[some[:chosen]] = 80.0 - 0.37 * np.arange(chosen)
        if kind == "equal":
            x[:] = 1.0
        if d["renorm_shared"]:
            x = np.concatenate([x, rng.uniform(-2, 2, d["shared_experts"])])
        return x.astype(np.float32)


def make_routing():
    import numpy as np
    from safetensors.numpy import save_file
    table, tensors = methods(np), {}
    rows = []
    for number, (name, method, preset, options, d) in enumerate(oracle_cases()):
        inputs = Inputs(np, d, options, [20261122, number])
        kinds = BIG_ROWS if d["num_experts"] >= 700 else ALL_ROWS
        if d["has_bias"]:
            kinds = tuple(kind for kind in kinds if kind != "equal")     # the bias alone would decide, and not clearly
        if method == "phimoe":
            kinds = ("plain", "negative", "large", "plain", "plain")     # an infinity makes its ratio inf/inf
        logits, ids, weights, shared, gaps, bias_index, token_ids = [], [], [], [], [], [], []
        forced = None
        if options.get("forced"):
            lines = [inputs.rng.permutation(d["num_experts"])[:d["top_k"]] for _ in range(16)]
            forced = np.stack(lines).astype(np.int32)
        scale = inputs.rng.permutation(np.linspace(0.5, 1.5, d["num_experts"])).astype(np.float32)
        for t, kind in enumerate(kinds):
            which = t % d["bias_rows"] if d["bias_rows"] else 0
            bias = inputs.bias[which].astype(np.float64) if d["has_bias"] else None
            for _ in range(5000):
                x = inputs.row(kind, bias)
                token = dict(logits=x.astype(np.float64), bias=bias, per_expert_scale=scale.astype(np.float64))
                word = -1
                if forced is not None and (options["forced"] == "all" or t % 2 == 0):
                    word = int(inputs.rng.integers(16))
                    token["forced"] = forced[word]
                rank = Rank(np)
                chosen, w = table[method](rank, d, token)
                if rank.gap > WANTED_GAP and np.isfinite(w).all():
                    break
            else:
                raise SystemExit(f"{name}: no {kind} row has a clear ranking")
            again, w2 = by_fields(np, d, token)
            assert (again == chosen).all(), (name, kind, again, chosen)
            assert np.allclose(w, w2, rtol=1e-12, atol=1e-300), (name, kind, w, w2)
            logits.append(x)
            ids.append(chosen)
            weights.append(w[:d["top_k"]])
            shared.append(w[d["top_k"]:])
            gaps.append(rank.gap)
            bias_index.append(which)
            token_ids.append(word)
        out = dict(logits=np.stack(logits), ids=np.stack(ids).astype(np.int32), weights=np.stack(weights),
                   gap=np.array(gaps))
        if d["has_bias"]:
            out["bias"] = np.stack(inputs.bias)
        if d["bias_rows"] > 1:
            out["bias_index"] = np.array(bias_index, np.int32)
        if forced is not None:
            out["forced"] = forced
            out["token_ids"] = np.array(token_ids, np.int32)
        if d["per_expert_scale"]:
            out["per_expert_scale"] = scale
        if d["renorm_shared"]:
            out["shared_weights"] = np.stack(shared)
        tensors.update({f"{name}.{key}": np.ascontiguousarray(value) for key, value in out.items()})
        rows.append(dict(d, case=name, preset=preset, tokens=len(kinds)))
    os.makedirs(f"{HERE}/routing", exist_ok=True)
    path = f"{HERE}/routing/oracle.safetensors"
    save_file(tensors, path)
    os.chmod(path, 0o644)
    assert os.path.getsize(path) <= 1 << 20
    write_table(f"{HERE}/routing/oracle.tsv", ["case", "preset", "tokens"] + list(ROUTING_DEFAULTS), rows)
    print(f"routing: {len(rows)} cases, {os.path.getsize(path)} bytes")


# --- configs: what each model's config.json holds, and what it means -------------------------------------------------

LAYER_DEFAULTS = dict(
    hidden_size=0, intermediate_size=0, **ROUTING_DEFAULTS, activation="swiglu", limit=0.0, alpha=0.0, beta=0.0,
    biases=0, shared_intermediate=0, shared_gate="none", shared_limit=0.0, output_scale=1.0, row_norm=0,
    shared_activation="", model_hidden_size=0)

EXPECTED_COLUMNS = [
    "file", "layer", "source", "is_moe", "hidden_size", "intermediate_size", "num_experts", "top_k", "score",
    "score_when", "select", "has_bias", "bias_rows", "groups", "groups_kept", "group_rule", "group_excluded", "renorm",
    "epsilon", "scale", "scale_on", "weight_on", "per_expert_scale", "zero_experts", "zero_kind", "forced_ids",
    "logit_multiplier", "softcap", "activation", "limit", "alpha", "beta", "biases", "shared_experts",
    "shared_intermediate", "shared_gate", "shared_limit", "output_scale", "renorm_shared", "row_norm", "sparse_mixer",
    "jitter", "shared_activation", "model_hidden_size"]

DENSE = None                # a layer without experts


def moe(hidden, inter, experts, k, *parts, **fields):
    """One MoE layer; parts are dicts of fields that several families share."""
    d = dict(LAYER_DEFAULTS, hidden_size=hidden, intermediate_size=inter, num_experts=experts, top_k=k)
    for part in parts + (fields,):
        assert not set(part) - set(d), set(part) - set(d)
        d.update(part)
    if d["has_bias"] and not d["bias_rows"]:
        d["bias_rows"] = 1
    if not d["has_bias"]:
        d["bias_rows"] = 0
    d["shared_activation"] = d["shared_activation"] or (d["activation"] if d["shared_experts"] else "-")
    d["model_hidden_size"] = d["model_hidden_size"] or hidden
    return d


NORM = dict(renorm="sum")                                               # softmax over all, top-k, / sum
AFTER = dict(score_when="after", select="logit")                        # top-k on logits, then softmax over the k
SIGMOID_AFTER = dict(score="sigmoid", score_when="after", select="logit")
BIASED = dict(score="sigmoid", has_bias=1, renorm="sum")                # sigmoid, selection bias, / sum
DSV3 = dict(BIASED, epsilon=1e-20)
TOP2 = dict(group_rule="top2", group_excluded="-inf")
SQRT = dict(score="sqrt_softplus", has_bias=1, renorm="sum", epsilon=1e-20)


def groups(n, kept, **rule):
    return dict(rule or TOP2, groups=n, groups_kept=kept)


def shared(count, width, gate="none", limit=0.0):
    """width is that of the one fused block in the checkpoint"""
    return dict(shared_experts=count, shared_intermediate=width, shared_gate=gate, shared_limit=limit)


def clamp(limit):
    return dict(activation="swiglu_clamp", limit=limit)


def oai(limit=7.0):
    return dict(activation="swiglu_oai", limit=limit, alpha=1.702, beta=1.0)


def config(model_type, architecture, **keys):
    return {"architectures": [architecture], "model_type": model_type, **keys, "rms_norm_eps": 1e-06,
            "torch_dtype": "bfloat16", "vocab_size": 262144}


def wrapped(model_type, architecture, text, **keys):
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
    return {"architectures": [architecture], "model_type": model_type, "text_config": text, "torch_dtype": "bfloat16",
            "vision_config": vision, **keys}


def nemotron(**keys):
    """Released Nemotron files hold a bare Infinity, which strict JSON has not."""
    return config("nemotron_h", "NemotronHForCausalLM", mlp_hidden_act="relu2", n_group=1, topk_group=1,
                  norm_topk_prob=True, n_shared_experts=1, mamba_hidden_act="silu", time_step_limit=[0.0, math.inf],
                  **keys)


def families():
    """file, config, source, {layer: expectation}. Sources: a transformers class, vllm or document."""
    f = []

    def add(name, source, body, layers):
        f.append((name, source, body, layers))

    # Mixtral and the softmax families
    add("mixtral", "MixtralConfig", config(
        "mixtral", "MixtralForCausalLM", hidden_act="silu", hidden_size=4096, intermediate_size=14336,
        num_experts_per_tok=2, num_hidden_layers=32, num_local_experts=8, router_aux_loss_coef=0.02,
        output_router_logits=False), {0: moe(4096, 14336, 8, 2, NORM)})
    add("qwen2_moe", "Qwen2MoeConfig", config(
        "qwen2_moe", "Qwen2MoeForCausalLM", decoder_sparse_step=1, hidden_act="silu", hidden_size=2048,
        intermediate_size=5632, moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
        num_experts_per_tok=4, num_experts=60, norm_topk_prob=False, num_hidden_layers=24),
        {0: moe(2048, 1408, 60, 4, shared(1, 5632, "sigmoid")), 23: moe(2048, 1408, 60, 4, shared(1, 5632, "sigmoid"))})
    add("qwen2_moe_57b", "Qwen2MoeConfig", config(
        "qwen2_moe", "Qwen2MoeForCausalLM", decoder_sparse_step=1, hidden_act="silu", hidden_size=3584,
        intermediate_size=18944, moe_intermediate_size=2560, shared_expert_intermediate_size=20480, mlp_only_layers=[],
        num_experts_per_tok=8, num_experts=64, norm_topk_prob=False, num_hidden_layers=28),
        {5: moe(3584, 2560, 64, 8, shared(1, 20480, "sigmoid"))})
    qwen3 = dict(hidden_act="silu", decoder_sparse_step=1, mlp_only_layers=[], num_experts=128, num_experts_per_tok=8,
                 norm_topk_prob=True, router_aux_loss_coef=0.001)
    add("qwen3_moe", "Qwen3MoeConfig", config(
        "qwen3_moe", "Qwen3MoeForCausalLM", hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536,
        num_hidden_layers=94, **qwen3), {0: moe(4096, 1536, 128, 8, NORM), 93: moe(4096, 1536, 128, 8, NORM)})
    add("qwen3_moe_30b", "Qwen3MoeConfig", config(
        "qwen3_moe", "Qwen3MoeForCausalLM", hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
        num_hidden_layers=48, **qwen3), {0: moe(2048, 768, 128, 8, NORM)})
    add("qwen3_moe_mixed", "Qwen3MoeConfig", config(
        "qwen3_moe", "Qwen3MoeForCausalLM", hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
        num_hidden_layers=48, **dict(qwen3, decoder_sparse_step=2, mlp_only_layers=[3], norm_topk_prob=False)),
        {0: DENSE, 1: moe(2048, 768, 128, 8), 3: DENSE, 4: DENSE, 5: moe(2048, 768, 128, 8)})
    add("qwen3_vl_moe", "Qwen3VLMoeConfig", wrapped(
        "qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", dict(
            model_type="qwen3_vl_moe_text", hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
            num_hidden_layers=48, **qwen3)), {0: moe(2048, 768, 128, 8, NORM)})
    add("qwen3_omni_moe", "Qwen3OmniMoeConfig", {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"], "model_type": "qwen3_omni_moe",
        "thinker_config": {"model_type": "qwen3_omni_moe_thinker", "text_config": dict(
            model_type="qwen3_omni_moe_text", hidden_size=2048, intermediate_size=768, moe_intermediate_size=768,
            num_hidden_layers=48, **qwen3)}}, {0: moe(2048, 768, 128, 8, NORM)})
    add("qwen3_next", "Qwen3NextConfig", config(
        "qwen3_next", "Qwen3NextForCausalLM", decoder_sparse_step=1, hidden_act="silu", hidden_size=2048,
        intermediate_size=5120, mlp_only_layers=[], moe_intermediate_size=512, norm_topk_prob=True, num_experts=512,
        num_experts_per_tok=10, num_hidden_layers=48, shared_expert_intermediate_size=512, full_attention_interval=4),
        {0: moe(2048, 512, 512, 10, NORM, shared(1, 512, "sigmoid"))})
    add("qwen3_5_moe", "Qwen3_5MoeConfig", wrapped(
        "qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", dict(
            model_type="qwen3_5_moe_text", hidden_act="silu", hidden_size=2048, moe_intermediate_size=512,
            num_experts=256, num_experts_per_tok=8, num_hidden_layers=40, shared_expert_intermediate_size=512,
            full_attention_interval=4)), {0: moe(2048, 512, 256, 8, NORM, shared(1, 512, "sigmoid"))})
    add("qwen3_5_moe_397b", "Qwen3_5MoeConfig", wrapped(
        "qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", dict(
            model_type="qwen3_5_moe_text", hidden_act="silu", hidden_size=4096, moe_intermediate_size=1024,
            num_experts=512, num_experts_per_tok=10, num_hidden_layers=60, shared_expert_intermediate_size=1024)),
        {59: moe(4096, 1024, 512, 10, NORM, shared(1, 1024, "sigmoid"))})
    add("qwen4_exp", "Qwen4ExpConfig", wrapped(
        "qwen4_exp", "Qwen4ExpForConditionalGeneration", dict(
            model_type="qwen4_exp_text", hidden_act="silu", hidden_size=2048, moe_intermediate_size=640,
            num_experts=512, num_experts_per_tok=10, norm_topk_prob=True, num_hidden_layers=40,
            shared_expert_intermediate_size=640)), {0: moe(2048, 640, 512, 10, NORM, shared(1, 640, "sigmoid"))})
    add("olmoe", "OlmoeConfig", config(
        "olmoe", "OlmoeForCausalLM", hidden_act="silu", hidden_size=2048, intermediate_size=1024, norm_topk_prob=False,
        num_experts=64, num_experts_per_tok=8, num_hidden_layers=16), {0: moe(2048, 1024, 64, 8)})
    add("flex_olmo", "FlexOlmoConfig", config(
        "flex_olmo", "FlexOlmoForCausalLM", hidden_act="silu", hidden_size=4096, intermediate_size=11008,
        norm_topk_prob=False, num_experts=7, num_experts_per_tok=5, num_hidden_layers=32), {0: moe(4096, 11008, 7, 5)})
    add("jamba", "JambaConfig", config(
        "jamba", "JambaForCausalLM", hidden_act="silu", hidden_size=4096, intermediate_size=14336, num_experts=16,
        num_experts_per_tok=2, num_hidden_layers=32, expert_layer_offset=1, expert_layer_period=2, attn_layer_offset=4,
        attn_layer_period=8), {0: DENSE, 1: moe(4096, 14336, 16, 2), 2: DENSE})
    dbrx = dict(ffn_hidden_size=10752, moe_jitter_eps=0.01, moe_loss_weight=0.05, moe_num_experts=16, moe_top_k=4)
    for name, keys, norm in (("dbrx", {}, NORM), ("dbrx_no_norm", {"moe_normalize_expert_weights": None}, {})):
        add(name, "DbrxConfig", {
            "architectures": ["DbrxForCausalLM"], "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
            "d_model": 6144, "ffn_config": dict(dbrx, **keys), "model_type": "dbrx",
            "n_heads": 48, "n_layers": 40, "vocab_size": 100352}, {0: moe(6144, 10752, 16, 4, norm)})
    add("minimax", "MiniMaxConfig", config(
        "minimax", "MiniMaxForCausalLM", hidden_act="silu", hidden_size=6144, intermediate_size=9216,
        num_experts_per_tok=2, num_hidden_layers=80, num_local_experts=32), {0: moe(6144, 9216, 32, 2, NORM)})
    add("minimax_text_01", "document", config(
        "minimax_text_01", "MiniMaxText01ForCausalLM", hidden_act="silu", hidden_size=6144, intermediate_size=9216,
        num_experts_per_tok=2, num_hidden_layers=80, num_local_experts=32, shared_intermediate_size=0,
        shared_moe_mode="sigmoid", postnorm=True), {0: moe(6144, 9216, 32, 2, NORM)})
    for name, per_layer in (("hunyuan_v1_moe", False), ("hunyuan_v1_moe_lists", True)):
        many = (lambda v: [v] * 32) if per_layer else (lambda v: v)
        last_k = 4 if per_layer else 8
        add(name, "HunYuanMoEV1Config", config(
            "hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", hidden_act="silu", hidden_size=4096, intermediate_size=3072,
            moe_intermediate_size=many(3072), moe_topk=[8] * 31 + [4] if per_layer else 8, num_experts=64,
            num_shared_expert=many(1), num_hidden_layers=32, use_mixed_mlp_moe=True, head_dim=128),
            {0: moe(4096, 3072, 64, 8, NORM, shared(1, 3072)), 31: moe(4096, 3072, 64, last_k, NORM, shared(1, 3072))})
    add("mellum", "MellumConfig", config(
        "mellum", "MellumForCausalLM", hidden_act="silu", hidden_size=2304, intermediate_size=7168,
        moe_intermediate_size=896, norm_topk_prob=True, num_experts=64, num_experts_per_tok=8, num_hidden_layers=28,
        mlp_layer_types=["dense"] + ["sparse"] * 27), {0: DENSE, 1: moe(2304, 896, 64, 8, NORM)})
    add("sdar_moe", "document", config(
        "sdar_moe", "SDARMoeForCausalLM", hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
        num_hidden_layers=48, **qwen3), {0: moe(2048, 768, 128, 8, NORM)})
    add("iquest_q1", "document", config(
        "iquest_q1", "IQuestQ1ForCausalLM", hidden_size=3072, intermediate_size=9216, moe_intermediate_size=1536,
        num_hidden_layers=48, **dict(qwen3, num_experts=256)), {0: moe(3072, 1536, 256, 8, NORM)})
    add("interns1_pro", "vllm", wrapped(
        "interns1_pro", "InternS1ProForConditionalGeneration", dict(
            model_type="interns1_pro_text", hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536,
            num_hidden_layers=94, router_n_groups=8, **dict(qwen3, num_experts=512))),
        {0: moe(4096, 1536, 512, 8, NORM, groups(8, 8, group_rule="each"))})

    # top-k on logits, softmax over the k
    for name, e, layers in (("gpt_oss", 128, 36), ("gpt_oss_20b", 32, 24)):
        add(name, "GptOssConfig", config(
            "gpt_oss", "GptOssForCausalLM", attention_bias=True, experts_per_token=4, hidden_act="silu",
            hidden_size=2880, intermediate_size=2880, num_experts_per_tok=4, num_hidden_layers=layers,
            num_local_experts=e, swiglu_limit=7.0, quantization_config={
                "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
                "quant_method": "mxfp4"}), {0: moe(2880, 2880, e, 4, AFTER, oai(), biases=1)})
    granite = dict(embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=6.0, hidden_act="silu")
    add("granitemoe", "GraniteMoeConfig", config(
        "granitemoe", "GraniteMoeForCausalLM", hidden_size=1536, intermediate_size=512, num_experts_per_tok=8,
        num_hidden_layers=32, num_local_experts=40, **granite), {0: moe(1536, 512, 40, 8, AFTER)})
    for name, width in (("granitemoeshared", 1024), ("granitemoeshared_none", 0)):
        add(name, "GraniteMoeSharedConfig", config(
            "granitemoeshared", "GraniteMoeSharedForCausalLM", hidden_size=1536, intermediate_size=512,
            num_experts_per_tok=6, num_hidden_layers=40, num_local_experts=62, shared_intermediate_size=width,
            **granite),
            {0: moe(1536, 512, 62, 6, AFTER, shared(1, width) if width else {})})
    add("granitemoe_swa", "GraniteMoeSWAConfig", config(
        "granitemoe_swa", "GraniteMoeSWAForCausalLM", hidden_size=1536, intermediate_size=512, num_experts_per_tok=8,
        num_hidden_layers=32, num_local_experts=64, shared_intermediate_size=1024, **granite),
        {0: moe(1536, 512, 64, 8, AFTER, shared(1, 1024))})
    add("granitemoehybrid", "GraniteMoeHybridConfig", config(
        "granitemoehybrid", "GraniteMoeHybridForCausalLM", hidden_size=4096, intermediate_size=768,
        num_experts_per_tok=10, num_hidden_layers=40, num_local_experts=72, shared_intermediate_size=1536,
        layer_types=["mamba"] * 5 + ["attention"] + ["mamba"] * 34, mamba_n_heads=128, **granite),
        {0: moe(4096, 768, 72, 10, AFTER, shared(1, 1536)), 5: moe(4096, 768, 72, 10, AFTER, shared(1, 1536))})
    add("granitemoehybrid_dense", "GraniteMoeHybridConfig", config(
        "granitemoehybrid", "GraniteMoeHybridForCausalLM", hidden_size=2048, intermediate_size=8192,
        num_experts_per_tok=0, num_hidden_layers=40, num_local_experts=0, shared_intermediate_size=8192,
        layer_types=["mamba"] * 40, mamba_n_heads=64, **granite), {0: DENSE})
    add("aria", "AriaConfig", wrapped("aria", "AriaForConditionalGeneration", dict(
        model_type="aria_text", hidden_size=2560, intermediate_size=1664, moe_num_experts=64, moe_topk=6,
        moe_num_shared_experts=2, num_hidden_layers=28)), {0: moe(2560, 1664, 64, 6, AFTER, shared(2, 3328))})
    cohere = dict(hidden_act="silu", hidden_size=4096, intermediate_size=768, num_experts=128, num_experts_per_tok=8,
                  num_hidden_layers=36, prefix_dense_intermediate_size=12288, first_k_dense_replace=1)
    for name, keys, layer in (
            ("cohere2_moe", dict(expert_selection_fn="sigmoid", norm_topk_prob=True, num_shared_experts=4,
                                 shared_expert_combination_strategy="average"),
             (SIGMOID_AFTER, NORM, shared(4, 3072), dict(output_scale=0.5))),
            ("cohere2_moe_sum", dict(expert_selection_fn="sigmoid", norm_topk_prob=False, num_shared_experts=1,
                                     shared_expert_combination_strategy="sum"), (SIGMOID_AFTER, shared(1, 768))),
            ("cohere2_moe_softmax", dict(expert_selection_fn="softmax", norm_topk_prob=False, num_shared_experts=2,
                                         shared_expert_combination_strategy="average"),
             (AFTER, shared(2, 1536), dict(output_scale=0.5))),
            ("cohere2_moe_no_shared", dict(expert_selection_fn="softmax", norm_topk_prob=True, num_shared_experts=0,
                                           shared_expert_combination_strategy="average"), (AFTER,))):
        add(name, "Cohere2MoeConfig", config("cohere2_moe", "Cohere2MoeForCausalLM", **cohere, **keys),
            {0: DENSE, 1: moe(4096, 768, 128, 8, *layer)})
    for name, e, step in (("llama4", 16, 1), ("llama4_maverick", 128, 2)):
        layer = moe(5120, 8192, e, 1, SIGMOID_AFTER, shared(1, 8192), weight_on="input")
        add(name, "Llama4Config", wrapped("llama4", "Llama4ForConditionalGeneration", dict(
            model_type="llama4_text", hidden_act="silu", hidden_size=5120, intermediate_size=8192,
            intermediate_size_mlp=16384, interleave_moe_layer_step=step, num_experts_per_tok=1, num_hidden_layers=48,
            num_local_experts=e, router_jitter_noise=0.0)), {0: layer} if step == 1 else {0: DENSE, 1: layer})
    add("gemma4", "Gemma4Config", wrapped("gemma4", "Gemma4ForConditionalGeneration", dict(
        model_type="gemma4_text", enable_moe_block=True, hidden_activation="gelu_pytorch_tanh", hidden_size=2816,
        intermediate_size=2112, moe_intermediate_size=704, num_experts=128, num_hidden_layers=30, top_k_experts=8)),
        {0: moe(2816, 704, 128, 8, NORM, activation="geglu_tanh", per_expert_scale=1)})
    add("gemma4_dense", "Gemma4Config", wrapped("gemma4", "Gemma4ForConditionalGeneration", dict(
        model_type="gemma4_text", enable_moe_block=False, hidden_activation="gelu_pytorch_tanh", hidden_size=5376,
        intermediate_size=21504, moe_intermediate_size=None, num_experts=None, num_hidden_layers=60,
        top_k_experts=None)), {0: DENSE})
    add("phimoe", "PhimoeConfig", config(
        "phimoe", "PhiMoEForCausalLM", hidden_act="silu", hidden_size=4096, input_jitter_noise=0.01,
        intermediate_size=6400, num_experts_per_tok=2, num_hidden_layers=32, num_local_experts=16,
        router_jitter_noise=0.01), {0: moe(4096, 6400, 16, 2, AFTER, sparse_mixer=1, jitter=0.01)})
    for name, model_type, moe_keys, layer in (
            ("grok1", "grok-1", dict(num_experts=8, hidden_size=6144, intermediate_size=32768, num_hidden_layers=64),
             moe(6144, 32768, 8, 2, activation="geglu_erf", softcap=30.0)),
            ("grok2", "git", dict(num_local_experts=8, hidden_size=8192, intermediate_size=32768,
                                  moe_intermediate_size=16384, num_hidden_layers=64, residual_moe=True,
                                  router_logit_softcapping=30.0),
             moe(8192, 16384, 8, 2, activation="geglu_erf", softcap=30.0))):
        add(name, "document", config(model_type, "Grok1ForCausalLM", hidden_act="gelu", num_experts_per_tok=2,
                                     **moe_keys), {0: layer})

    # DeepSeek and its relatives
    add("deepseek_v2", "DeepseekV2Config", config(
        "deepseek_v2", "DeepseekV2ForCausalLM", first_k_dense_replace=1, hidden_act="silu", hidden_size=5120,
        intermediate_size=12288, moe_intermediate_size=1536, moe_layer_freq=1, n_group=8, n_routed_experts=160,
        n_shared_experts=2, norm_topk_prob=False, num_experts_per_tok=6, num_hidden_layers=60,
        routed_scaling_factor=16.0, scoring_func="softmax", topk_group=3, topk_method="group_limited_greedy"),
        {0: DENSE, 1: moe(5120, 1536, 160, 6, groups(8, 3, group_rule="max", group_excluded="zero"),
                          shared(2, 3072), scale=16.0)})
    add("deepseek_v2_lite", "DeepseekV2Config", config(
        "deepseek_v2", "DeepseekV2ForCausalLM", first_k_dense_replace=1, hidden_act="silu", hidden_size=2048,
        intermediate_size=10944, moe_intermediate_size=1408, moe_layer_freq=1, n_group=1, n_routed_experts=64,
        n_shared_experts=2, norm_topk_prob=False, num_experts_per_tok=6, num_hidden_layers=27,
        routed_scaling_factor=1.0, scoring_func="softmax", topk_group=1, topk_method="greedy"),
        {0: DENSE, 1: moe(2048, 1408, 64, 6, shared(2, 2816))})
    v3 = dict(first_k_dense_replace=3, hidden_act="silu", hidden_size=7168, intermediate_size=18432,
              moe_intermediate_size=2048, moe_layer_freq=1, n_group=8, n_routed_experts=256, n_shared_experts=1,
              norm_topk_prob=True, num_experts_per_tok=8, num_hidden_layers=61, routed_scaling_factor=2.5,
              scoring_func="sigmoid", topk_group=4, topk_method="noaux_tc")
    fp8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    v3_layer = moe(7168, 2048, 256, 8, DSV3, groups(8, 4), shared(1, 2048), scale=2.5)
    for name, cls, arch in (("deepseek_v3", "DeepseekV3Config", "DeepseekV3ForCausalLM"),
                            ("deepseek_v32", "DeepseekV32Config", "DeepseekV32ForCausalLM")):
        add(name, cls, config(name, arch, **v3, num_nextn_predict_layers=1, quantization_config=fp8),
            {0: DENSE, 2: DENSE, 3: v3_layer, 60: v3_layer})
    kimi = dict(v3, first_k_dense_replace=1, n_group=1, topk_group=1, n_routed_experts=384, routed_scaling_factor=2.827)
    kimi_layer = moe(7168, 2048, 384, 8, DSV3, shared(1, 2048), scale=2.827)
    add("kimi_k2", "document", config("kimi_k2", "DeepseekV3ForCausalLM", **kimi, quantization_config=fp8),
        {0: DENSE, 1: kimi_layer})
    add("kimi_k25", "Kimi_K25Config", wrapped(
        "kimi_k25", "KimiK25ForConditionalGeneration", dict(model_type="kimi_k2", **kimi)), {0: DENSE, 1: kimi_layer})
    add("kimi_linear", "KimiLinearConfig", config(
        "kimi_linear", "KimiLinearForCausalLM", first_k_dense_replace=1, hidden_act="silu", hidden_size=2304,
        intermediate_size=9216, moe_intermediate_size=1024, moe_layer_freq=1, moe_renormalize=True,
        moe_router_activation_func="sigmoid", num_expert_group=1, num_experts=256, num_experts_per_token=8,
        num_hidden_layers=27, num_shared_experts=1, routed_scaling_factor=2.446, topk_group=1, use_grouped_topk=True),
        {0: DENSE, 1: moe(2304, 1024, 256, 8, DSV3, shared(1, 1024), scale=2.446)})
    add("kimi_k3", "vllm", wrapped("kimi_k3", "KimiK3ForConditionalGeneration", dict(
        model_type="kimi_linear", activation_situ_beta=4.0, activation_situ_linear_beta=25.0, first_k_dense_replace=1,
        hidden_act="situ", hidden_size=7168, intermediate_size=33792, latent_moe_use_norm=True,
        moe_intermediate_size=3072, moe_layer_freq=1, moe_renormalize=True, moe_router_activation_func="sigmoid",
        num_expert_group=1, num_experts=896, num_experts_per_token=16, num_hidden_layers=93, num_shared_experts=2,
        routed_expert_hidden_size=3584, routed_scaling_factor=2.5, topk_group=1, topk_method="noaux_tc",
        use_grouped_topk=True)),
        {0: DENSE, 1: moe(3584, 3072, 896, 16, DSV3, shared(2, 6144), scale=2.5, activation="situ", alpha=4.0,
                          beta=25.0, model_hidden_size=7168)})
    v4 = dict(expert_dtype="fp4", hidden_act="silu", n_shared_experts=1, norm_topk_prob=True, num_experts_per_tok=6,
              num_hash_layers=3, scoring_func="sqrtsoftplus", swiglu_limit=10.0, topk_method="noaux_tc")
    for name, h, i, e, scale, layers in (("deepseek_v4", 4096, 2048, 256, 1.5, 43),
                                         ("deepseek_v4_pro", 7168, 3072, 384, 2.5, 61)):
        parts = (SQRT, clamp(10.0), shared(1, i, limit=10.0), dict(scale=scale))
        add(name, "DeepseekV4Config", config(
            "deepseek_v4", "DeepseekV4ForCausalLM", hidden_size=h, moe_intermediate_size=i, n_routed_experts=e,
            num_hidden_layers=layers, routed_scaling_factor=scale, **v4),
            {0: moe(h, i, e, 6, *parts, has_bias=0, forced_ids=1), 2: moe(h, i, e, 6, *parts, has_bias=0, forced_ids=1),
             3: moe(h, i, e, 6, *parts)})
    add("deepseek_v4_resaved", "DeepseekV4Config", config(          # as transformers 5 writes it
        "deepseek_v4", "DeepseekV4ForCausalLM", hidden_size=4096, mlp_layer_types=["hash_moe"] * 2 + ["moe"] * 41,
        moe_intermediate_size=2048, n_routed_experts=256, num_hidden_layers=43, routed_scaling_factor=1.5,
        **{key: value for key, value in v4.items() if key != "num_hash_layers"}),
        {1: moe(4096, 2048, 256, 6, SQRT, clamp(10.0), shared(1, 2048, limit=10.0), scale=1.5, has_bias=0,
                forced_ids=1),
         2: moe(4096, 2048, 256, 6, SQRT, clamp(10.0), shared(1, 2048, limit=10.0), scale=1.5)})
    add("deepseek_v41", "vllm", wrapped("deepseek_v41", "DeepseekV41ForConditionalGeneration", dict(
        model_type="deepseek_v41_text", hidden_size=5120, moe_intermediate_size=2304, n_routed_experts=384,
        num_hidden_layers=61, routed_scaling_factor=2.5, **dict(v4, num_hash_layers=0))),
        {0: moe(5120, 2304, 384, 6, dict(SQRT, epsilon=0.0), clamp(10.0), shared(1, 2304, limit=10.0), bias_rows=2,
                scale=2.5)})
    for name, h, inter, i, e, dense, layers, scale in (("glm4_moe", 5120, 12288, 1536, 160, 3, 92, 2.5),
                                                       ("glm4_moe_air", 4096, 10944, 1408, 128, 1, 46, 1.0)):
        add(name, "Glm4MoeConfig", config(
            "glm4_moe", "Glm4MoeForCausalLM", first_k_dense_replace=dense, hidden_act="silu", hidden_size=h,
            intermediate_size=inter, moe_intermediate_size=i, n_group=1, n_routed_experts=e, n_shared_experts=1,
            norm_topk_prob=True, num_experts_per_tok=8, num_hidden_layers=layers, routed_scaling_factor=scale,
            topk_group=1), {0: DENSE, dense: moe(h, i, e, 8, DSV3, shared(1, i), scale=scale)})
    add("glm4_moe_lite", "Glm4MoeLiteConfig", config(
        "glm4_moe_lite", "Glm4MoeLiteForCausalLM", first_k_dense_replace=1, hidden_act="silu", hidden_size=2048,
        intermediate_size=10240, moe_intermediate_size=1536, n_group=1, n_routed_experts=64, n_shared_experts=1,
        norm_topk_prob=True, num_experts_per_tok=4, num_hidden_layers=47, routed_scaling_factor=1.8, topk_group=1,
        topk_method="noaux_tc"), {0: DENSE, 1: moe(2048, 1536, 64, 4, DSV3, shared(1, 1536), scale=1.8)})
    add("glm_moe_dsa", "GlmMoeDsaConfig", config(
        "glm_moe_dsa", "GlmMoeDsaForCausalLM", first_k_dense_replace=3, hidden_act="silu", hidden_size=6144,
        intermediate_size=12288, moe_intermediate_size=2048, n_group=1, n_routed_experts=256, n_shared_experts=1,
        norm_topk_prob=True, num_experts_per_tok=8, num_hidden_layers=78, routed_scaling_factor=2.5,
        scoring_func="sigmoid", topk_group=1, topk_method="noaux_tc"),
        {2: DENSE, 3: moe(6144, 2048, 256, 8, DSV3, shared(1, 2048), scale=2.5)})
    add("glm5_next", "Glm5NextConfig", wrapped("glm5_next", "Glm5NextForConditionalGeneration", dict(
        model_type="glm5_next_text", hidden_act="silu", hidden_size=4096, intermediate_size=12288,
        mlp_layer_types=["dense"] * 3 + ["sparse"] * 42, moe_intermediate_size=2048, n_group=1, n_routed_experts=288,
        n_shared_experts=1, norm_topk_prob=True, num_experts_per_tok=8, num_hidden_layers=45,
        routed_scaling_factor=2.5, swiglu_limit=10.0, topk_group=1)),
        {2: DENSE, 3: moe(4096, 2048, 288, 8, DSV3, clamp(10.0), shared(1, 2048, limit=10.0), scale=2.5)})
    add("glm4v_moe", "Glm4vMoeConfig", wrapped("glm4v_moe", "Glm4vMoeForConditionalGeneration", dict(
        model_type="glm4v_moe_text", first_k_dense_replace=1, hidden_act="silu", hidden_size=4096,
        intermediate_size=10944, moe_intermediate_size=1408, n_group=1, n_routed_experts=128, n_shared_experts=1,
        norm_topk_prob=True, num_experts_per_tok=8, num_hidden_layers=46, routed_scaling_factor=1.0, topk_group=1)),
        {0: DENSE, 1: moe(4096, 1408, 128, 8, DSV3, shared(1, 1408))})
    add("dots1", "Dots1Config", config(
        "dots1", "Dots1ForCausalLM", first_k_dense_replace=1, hidden_act="silu", hidden_size=4096,
        intermediate_size=10944, moe_intermediate_size=1408, moe_layer_freq=1, n_group=1, n_routed_experts=128,
        n_shared_experts=2, norm_topk_prob=True, num_experts_per_tok=6, num_hidden_layers=62,
        routed_scaling_factor=2.5, scoring_func="noaux_tc", topk_group=1),
        {0: DENSE, 1: moe(4096, 1408, 128, 6, DSV3, shared(2, 2816), scale=2.5)})
    add("dots3_note", "Dots3NoteConfig", wrapped("dots3_note", "Dots3NoteForConditionalGeneration", dict(
        model_type="dots3_note_text", first_k_dense_replace=1, hidden_act="silu", hidden_size=5120,
        intermediate_size=13824, moe_intermediate_size=1536, moe_layer_freq=1, moe_shared_expert_intermediate_size=1536,
        n_group=1, n_routed_experts=256, n_shared_experts=1, norm_topk_prob=True, num_experts_per_tok=8,
        num_hidden_layers=46, routed_scaling_factor=1.0, topk_group=1), vision_config={"moe_intermediate_size": 2112}),
        {0: DENSE, 1: moe(5120, 1536, 256, 8, DSV3, shared(1, 1536))})
    add("mimo_v2_flash", "MiMoV2FlashConfig", config(
        "mimo_v2_flash", "MiMoV2FlashForCausalLM", hidden_act="silu", hidden_size=4096, intermediate_size=16384,
        moe_intermediate_size=2048, moe_layer_freq=[0] + [1] * 47, n_group=1, n_routed_experts=256,
        n_shared_experts=None, norm_topk_prob=True, num_experts_per_tok=8, num_hidden_layers=48,
        routed_scaling_factor=None, scoring_func="sigmoid", topk_group=1, topk_method="noaux_tc"),
        {0: DENSE, 1: moe(4096, 2048, 256, 8, DSV3)})
    add("axk1", "AXK1Config", config(
        "axk1", "AXK1ForCausalLM", **dict(v3, first_k_dense_replace=1, n_routed_experts=192)),
        {0: DENSE, 1: moe(7168, 2048, 192, 8, DSV3, groups(8, 4), shared(1, 2048), scale=2.5)})
    axk2 = dict(first_k_dense_replace=1, hidden_act="silu", hidden_size=2048, intermediate_size=5120,
                moe_intermediate_size=512, n_routed_experts=128, n_shared_experts=1, norm_topk_prob=True,
                num_experts_per_tok=8, num_hidden_layers=48, routed_scaling_factor=2.5)
    axk2_parts = (DSV3, shared(1, 512), dict(scale=2.5))
    add("axk2", "AXK2Config", config("axk2", "AXK2ForCausalLM", **axk2, n_group=None, topk_group=None),
        {0: DENSE, 1: moe(2048, 512, 128, 8, *axk2_parts)})
    add("axk2_grouped", "AXK2Config", config("axk2", "AXK2ForCausalLM", **axk2, n_group=8, topk_group=4),
        {0: DENSE, 1: moe(2048, 512, 128, 8, *axk2_parts, groups(8, 4, group_rule="top2", group_excluded="zero"))})
    add("beam", "BeamConfig", config(
        "beam", "BeamForCausalLM", hidden_act="silu", hidden_size=5120, intermediate_size=20480,
        mlp_layer_types=["dense"] * 3 + ["sparse"] * 49, moe_intermediate_size=2560, n_group=8, norm_topk_prob=True,
        num_experts=256, num_experts_per_tok=8, num_hidden_layers=52, routed_scaling_factor=2.5, topk_group=4),
        {2: DENSE, 3: moe(5120, 2560, 256, 8, DSV3, groups(8, 4), scale=2.5, scale_on="output")})
    add("exaone_moe", "ExaoneMoeConfig", config(
        "exaone_moe", "ExaoneMoeForCausalLM", first_k_dense_replace=1, hidden_act="silu", hidden_size=6144,
        intermediate_size=18432, moe_intermediate_size=2048, n_group=1, norm_topk_prob=True, num_experts=128,
        num_experts_per_tok=8, num_hidden_layers=48, num_shared_experts=1, routed_scaling_factor=2.5, topk_group=1),
        {0: DENSE, 1: moe(6144, 2048, 128, 8, DSV3, shared(1, 2048), scale=2.5)})
    add("solar_open", "SolarOpenConfig", config(
        "solar_open", "SolarOpenForCausalLM", hidden_act="silu", hidden_size=4096, moe_intermediate_size=1280,
        n_group=1, n_routed_experts=128, n_shared_experts=1, norm_topk_prob=True, num_experts_per_tok=8,
        num_hidden_layers=48, routed_scaling_factor=1.0, topk_group=1, intermediate_size=10240,
        first_k_dense_replace=0), {0: moe(4096, 1280, 128, 8, DSV3, shared(1, 1280))})
    add("afmoe", "AfmoeConfig", config(
        "afmoe", "AfmoeForCausalLM", hidden_act="silu", hidden_size=2048, intermediate_size=6144,
        moe_intermediate_size=1024, num_dense_layers=2, num_experts=128, num_experts_per_tok=8, num_hidden_layers=32,
        num_shared_experts=1, route_norm=True, route_scale=2.826, score_func="sigmoid", n_group=1, topk_group=1),
        {1: DENSE, 2: moe(2048, 1024, 128, 8, DSV3, shared(1, 1024), scale=2.826)})
    add("hy_v3", "HYV3Config", config(
        "hy_v3", "HYV3ForCausalLM", enable_moe_fp32_combine=True, first_k_dense_replace=1, hidden_act="silu",
        hidden_size=4096, intermediate_size=13312, moe_intermediate_size=1536, moe_router_enable_expert_bias=True,
        moe_router_use_sigmoid=True, num_experts=192, num_experts_per_tok=8, num_hidden_layers=80,
        num_shared_experts=1, route_norm=True, router_scaling_factor=2.826),
        {0: DENSE, 1: moe(4096, 1536, 192, 8, DSV3, shared(1, 1536), scale=2.826)})
    add("hy_v4", "HYV4Config", config(
        "hy_v4", "HYV4ForCausalLM", hidden_act="silu", hidden_size=2816, intermediate_size=6912,
        moe_intermediate_size=768, n_group=1, n_routed_experts=256, n_shared_experts=1, norm_topk_prob=True,
        num_experts_per_tok=8, num_hidden_layers=34, routed_scaling_factor=2.827, swiglu_limit=10.0, topk_group=1),
        {0: DENSE, 1: moe(2816, 768, 256, 8, DSV3, clamp(10.0), shared(1, 768), scale=2.827,
                          shared_activation="swiglu")})
    add("bailing_moe_v2", "vllm", config(
        "bailing_moe", "BailingMoeV2ForCausalLM", first_k_dense_replace=1, hidden_act="silu", hidden_size=4096,
        intermediate_size=9216, moe_intermediate_size=1024, moe_router_enable_expert_bias=True,
        moe_shared_expert_intermediate_size=1024, n_group=8, norm_topk_prob=True, num_experts=256,
        num_experts_per_tok=8, num_hidden_layers=32, num_shared_experts=1, routed_scaling_factor=2.5,
        router_dtype="fp32", score_function="sigmoid", topk_group=4),
        {0: DENSE, 1: moe(4096, 1024, 256, 8, DSV3, groups(8, 4), shared(1, 1024), scale=2.5)})
    add("bailing_moe", "vllm", config(
        "bailing_moe", "BailingMoeForCausalLM", first_k_dense_replace=0, hidden_act="silu", hidden_size=2048,
        intermediate_size=5632, moe_intermediate_size=1408, norm_topk_prob=True, num_experts=64,
        num_experts_per_tok=6, num_hidden_layers=28, num_shared_experts=2),
        {0: moe(2048, 1408, 64, 6, NORM, shared(2, 2816))})
    ling3 = dict(first_k_dense_replace=2, hidden_act="silu", hidden_size=2560, intermediate_size=6144,
                 moe_intermediate_size=768, moe_router_enable_expert_bias=True,
                 moe_shared_expert_intermediate_size=768, n_group=8, norm_topk_prob=True, num_experts=512,
                 num_experts_per_tok=8, num_hidden_layers=42, num_shared_experts=1, routed_scaling_factor=2.5,
                 router_dtype="fp32", score_function="sigmoid", topk_group=4)
    ling3_layer = moe(2560, 768, 512, 8, DSV3, groups(8, 4), shared(1, 768), scale=2.5)
    add("bailing_hybrid", "BailingHybridConfig", config("bailing_hybrid", "BailingMoeV3ForCausalLM", **ling3),
        {1: DENSE, 2: ling3_layer})
    add("bailing_hybrid_limits", "vllm", config(
        "bailing_hybrid", "BailingMoeV3ForCausalLM", **ling3, expert_swiglu_limit_list=[None] * 40 + [7.0, 7.0],
        share_expert_swiglu_limit_list=[None] * 41 + [16.0]),
        {1: DENSE, 2: ling3_layer, 40: dict(ling3_layer, **clamp(7.0)),   # routed: clamp, then silu; shared: reversed
         41: dict(ling3_layer, **clamp(7.0), shared_activation="swiglu_step", shared_limit=16.0)})
    add("llada2_moe", "document", config(
        "llada2_moe", "LLaDA2MoeModelLM", first_k_dense_replace=1, hidden_act="silu", hidden_size=2048,
        intermediate_size=5120, moe_intermediate_size=512, moe_router_enable_expert_bias=True, n_group=8,
        norm_topk_prob=True, num_experts=256, num_experts_per_tok=8, num_hidden_layers=20, num_shared_experts=1,
        routed_scaling_factor=2.5, score_function="sigmoid", topk_group=4),
        {0: DENSE, 1: moe(2048, 512, 256, 8, DSV3, groups(8, 4), shared(1, 512), scale=2.5)})
    add("sarvam_moe", "vllm", config(
        "sarvam_moe", "SarvamMoEForCausalLM", first_k_dense_replace=1, hidden_act="silu", hidden_size=4096,
        intermediate_size=8192, moe_intermediate_size=1024, moe_router_enable_expert_bias=True, n_group=1,
        norm_topk_prob=True, num_experts=128, num_experts_per_tok=6, num_hidden_layers=19, num_shared_experts=1,
        routed_scaling_factor=2.5, score_function="sigmoid", topk_group=1),
        {0: DENSE, 1: moe(4096, 1024, 128, 6, DSV3, shared(1, 1024), scale=2.5)})
    add("param2_moe", "vllm", config(
        "param2_moe", "Param2MoEForCausalLM", first_k_dense_replace=1, hidden_act="silu", hidden_size=2048,
        intermediate_size=7168, moe_intermediate_size=1024, moe_router_enable_expert_bias=True,
        moe_shared_expert_intermediate_size=2048, n_group=1, norm_topk_prob=True, num_experts=64,
        num_experts_per_tok=6, num_hidden_layers=21, num_shared_experts=2, routed_scaling_factor=2.5,
        score_function="sigmoid", topk_group=1),
        {0: DENSE, 1: moe(2048, 1024, 64, 6, DSV3, shared(2, 2048), scale=2.5)})
    add("pangu_ultra_moe", "vllm", config(
        "pangu_ultra_moe", "PanguUltraMoEForCausalLM", first_k_dense_replace=3, hidden_act="silu", hidden_size=7680,
        intermediate_size=18432, moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1,
        norm_topk_prob=True, num_experts_per_tok=8, num_hidden_layers=61, routed_scaling_factor=2.5,
        router_enable_expert_bias=True),
        {2: DENSE, 3: moe(7680, 2048, 256, 8, DSV3, shared(1, 2048), scale=2.5, scale_on="output")})
    add("alice_ai", "vllm", config(
        "alice_ai", "AliceAIForCausalLM", decoder_sparse_step=1, hidden_act="silu", hidden_size=2048,
        intermediate_size=6144, mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True, num_experts=128,
        num_experts_per_tok=8, num_hidden_layers=48, shared_expert_intermediate_size=768),
        {0: moe(2048, 768, 128, 8, DSV3, shared(1, 768, "sigmoid"))})
    add("k2_horizon", "vllm", config(
        "k2_horizon", "K2HorizonForCausalLM", decoder_sparse_step=1, hidden_act="silu", hidden_size=4096,
        intermediate_size=12288, mlp_only_layers=[0], moe_gate_bias=True, moe_intermediate_size=1024,
        mova_num_experts=0, norm_topk_prob=True, num_experts=256, num_experts_per_tok=8, num_hidden_layers=48,
        num_shared_experts=1, router_scaling_factor=2.5, router_score_func="sigmoid"),
        {0: DENSE, 1: moe(4096, 1024, 256, 8, DSV3, shared(1, 1024), scale=2.5)})

    # Mistral
    add("mistral4", "Mistral4Config", config(
        "mistral4", "Mistral4ForCausalLM", first_k_dense_replace=0, hidden_act="silu", hidden_size=4096,
        intermediate_size=12288, moe_intermediate_size=2048, n_group=1, n_routed_experts=128, n_shared_experts=1,
        norm_topk_prob=True, num_experts_per_tok=4, num_hidden_layers=36, routed_scaling_factor=1.0, topk_group=1),
        {0: moe(4096, 2048, 128, 4, NORM, shared(1, 2048), epsilon=1e-20)})
    add("mistral4_grouped", "Mistral4Config", config(
        "mistral4", "Mistral4ForCausalLM", first_k_dense_replace=1, hidden_act="silu", hidden_size=4096,
        intermediate_size=12288, moe_intermediate_size=2048, n_group=8, n_routed_experts=128, n_shared_experts=1,
        norm_topk_prob=False, num_experts_per_tok=4, num_hidden_layers=36, routed_scaling_factor=1.5, topk_group=2),
        {0: DENSE, 1: moe(4096, 2048, 128, 4, groups(8, 2, group_rule="top2", group_excluded="zero"), shared(1, 2048),
                          scale=1.5)})
    add("mistral_large4", "MistralLarge4Config", wrapped(
        "mistral_large4", "MistralLarge4ForConditionalGeneration", dict(
        model_type="mistral_large4_text", first_k_dense_replace=1, hidden_act="silu", hidden_size=6144,
        intermediate_size=24576, moe_intermediate_size=6144, n_group=1, n_routed_experts=128, n_shared_experts=1,
        num_experts_per_tok=4, num_hidden_layers=72, routed_scaling_factor=1.0, topk_group=1)),
        {0: DENSE, 1: moe(6144, 6144, 128, 4, NORM, shared(1, 6144), epsilon=1e-20)})
    large3 = moe(7168, 4096, 128, 4, NORM, shared(1, 4096))
    add("mistral_large_3", "vllm", config(
        "deepseek_v3", "MistralLarge3ForCausalLM", first_k_dense_replace=3, hidden_act="silu", hidden_size=7168,
        intermediate_size=16384, moe_intermediate_size=4096, moe_layer_freq=1, n_group=1, n_routed_experts=128,
        n_shared_experts=1, norm_topk_prob=True, num_experts_per_tok=4, num_hidden_layers=61,
        routed_scaling_factor=1.0, scoring_func="softmax", topk_group=1, topk_method=None), {2: DENSE, 3: large3})
    add("mistral_large_3_params", "vllm", {
        "dim": 7168, "hidden_dim": 16384, "n_layers": 61, "n_heads": 128, "vocab_size": 131072, "norm_eps": 1e-06,
        "moe": {"expert_hidden_dim": 4096, "expert_model_parallel": 1, "first_k_dense_replace": 3,
                "num_expert_groups": 1, "num_expert_groups_per_tok": 1, "num_experts": 128, "num_experts_per_tok": 4,
                "num_shared_experts": 1, "route_every_n": 1, "routed_scale": 1.0}}, {2: DENSE, 3: large3})

    # other sigmoid families
    add("minimax_m2", "MiniMaxM2Config", config(
        "minimax_m2", "MiniMaxM2ForCausalLM", hidden_act="silu", hidden_size=3072, intermediate_size=1536,
        mlp_intermediate_size=8192, num_experts_per_tok=8, num_hidden_layers=62, num_local_experts=256,
        scoring_func="sigmoid", shared_intermediate_size=0, use_routing_bias=True, quantization_config=fp8),
        {0: moe(3072, 1536, 256, 8, BIASED)})
    m3 = dict(dense_intermediate_size=12288, hidden_act="swigluoai", hidden_size=6144, intermediate_size=3072,
              moe_layer_freq=[0] * 3 + [1] * 57, num_experts_per_tok=4, num_hidden_layers=60, num_local_experts=128,
              routed_scaling_factor=2.0, scoring_func="sigmoid", shared_intermediate_size=3072, swiglu_alpha=1.702,
              swiglu_limit=7.0, use_routing_bias=True)
    m3_layer = moe(6144, 3072, 128, 4, BIASED, oai(), shared(1, 3072, limit=7.0), scale=2.0, scale_on="output")
    add("minimax_m3", "MiniMaxM3VLConfig", wrapped(
        "minimax_m3_vl", "MiniMaxM3VLForConditionalGeneration", dict(model_type="minimax_m3_vl_text", **m3)),
        {2: DENSE, 3: m3_layer})
    limits, shared_limits = [0.0] * 43 + [7.0, 7.0], [0.0] * 44 + [16.0]
    step = dict(hidden_size=4096, intermediate_size=11264, moe_intermediate_size=1280,
                moe_layers_enum=",".join(str(i) for i in range(3, 45)), moe_num_experts=288,
                moe_router_activation="sigmoid", moe_router_scaling_factor=3.0, moe_top_k=8, need_fp32_gate=True,
                norm_expert_weight=True, num_hidden_layers=45, num_nextn_predict_layers=3, share_expert_dim=1280,
                swiglu_limits=limits + [0.0] * 3, swiglu_limits_shared=shared_limits + [0.0] * 3, use_moe=True,
                use_moe_router_bias=True)
    step_layer = moe(4096, 1280, 288, 8, BIASED, shared(1, 1280), scale=3.0, scale_on="output")
    limited = dict(activation="swiglu_step", limit=7.0)
    shared_limited = dict(shared_activation="swiglu_step", shared_limit=16.0)
    step_rows = {2: DENSE, 3: step_layer, 43: dict(step_layer, **limited),
                 44: dict(step_layer, **limited, **shared_limited)}
    add("step3p5", "Step3p7TextConfig", config("step3p5", "Step3p5ForCausalLM", **step), step_rows)
    add("step3p7", "Step3p7Config", wrapped(
        "step3p7", "Step3p7ForConditionalGeneration", dict(model_type="step3p5", **step)), step_rows)
    step5_layer = moe(5120, 1536, 288, 8, BIASED, shared(1, 1536), scale=3.0)
    add("step5", "vllm", config(
        "step5", "Step5ForCausalLM", **dict(
            step, hidden_size=5120, intermediate_size=13312, moe_intermediate_size=1536, share_expert_dim=1536,
            moe_layers_enum=",".join(str(i) for i in range(1, 45)))),
        {0: DENSE, 1: step5_layer, 44: dict(step5_layer, **limited, **shared_limited)})
    add("lfm2_moe", "Lfm2MoeConfig", config(
        "lfm2_moe", "Lfm2MoeForCausalLM", hidden_size=2048, intermediate_size=7168, moe_intermediate_size=1792,
        norm_topk_prob=True, num_dense_layers=2, num_experts=32, num_experts_per_tok=4, num_hidden_layers=24,
        routed_scaling_factor=1.0, use_expert_bias=True,
        layer_types=["conv", "conv", "full_attention", "conv", "conv", "conv"] * 4),
        {1: DENSE, 2: moe(2048, 1792, 32, 4, BIASED, epsilon=1e-6)})
    add("flint", "FlintConfig", config(
        "flint", "FlintForCausalLM", decoder_sparse_step=1, hidden_act="silu", hidden_size=2048,
        intermediate_size=6144, mlp_only_layers=[0, 1], moe_intermediate_size=512, norm_topk_prob=True,
        num_experts=256, num_experts_per_tok=6, num_hidden_layers=49, shared_expert_intermediate_size=1024),
        {1: DENSE, 2: moe(2048, 512, 256, 6, NORM, shared(1, 1024), score="sigmoid")})
    add("kolibri1", "Kolibri1Config", config(
        "kolibri1", "Kolibri1ForCausalLM", hidden_act="silu", hidden_size=2560, moe_intermediate_size=512,
        norm_topk_prob=False, num_experts=384, num_experts_per_tok=6, num_hidden_layers=50,
        shared_expert_intermediate_size=512), {0: moe(2560, 512, 384, 6, SIGMOID_AFTER, shared(1, 512), has_bias=1)})
    laguna = dict(hidden_act="silu", hidden_size=2048, intermediate_size=8192,
                  mlp_layer_types=["dense"] + ["sparse"] * 39, moe_apply_router_weight_on_input=False,
                  moe_intermediate_size=512, num_experts=256, num_experts_per_tok=8, num_hidden_layers=40,
                  shared_expert_intermediate_size=512)
    laguna_parts = (BIASED, shared(1, 512), dict(scale=2.5, scale_on="output"))
    for name, cap in (("laguna", 0.0), ("laguna_softcap", 5.0)):
        add(name, "LagunaConfig", config("laguna", "LagunaForCausalLM", **laguna, moe_routed_scaling_factor=2.5,
                                         moe_router_logit_softcapping=cap),
            {0: DENSE, 1: moe(2048, 512, 256, 8, *laguna_parts, softcap=cap)})
    add("laguna_input", "vllm", config(
        "laguna", "LagunaForCausalLM", **dict(laguna, moe_apply_router_weight_on_input=True),
        moe_routed_scaling_factor=2.5, moe_router_logit_softcapping=0.0),
        {0: DENSE, 1: moe(2048, 512, 256, 8, *laguna_parts, weight_on="input")})
    add("inkling", "InklingConfig", wrapped("inkling_mm_model", "InklingForConditionalGeneration", dict(
        model_type="inkling_text", dense_intermediate_size=24576, dense_mlp_idx=2, hidden_act="silu", hidden_size=6144,
        intermediate_size=3072, n_routed_experts=256, n_shared_experts=2, num_experts_per_tok=6, num_hidden_layers=66,
        route_scale=8.0, shared_expert_sink=True)),
        {1: DENSE, 2: moe(6144, 3072, 256, 6, BIASED, shared(2, 3072), renorm_shared=1, scale=8.0)})
    add("inkling2", "Inkling2Config", wrapped("inkling2", "Inkling2ForConditionalGeneration", dict(
        model_type="inkling2_text", hidden_act="silu", hidden_size=4608, mlp_gate_softcap=4.0, mlp_up_softcap=25.0,
        moe_intermediate_size=2304, n_routed_experts=384, num_experts_per_tok=8, num_hidden_layers=48, route_scale=8.0,
        scoring_func="sigmoid")),
        {0: moe(4608, 2304, 384, 8, DSV3, scale=8.0, activation="situ", alpha=4.0, beta=25.0)})
    add("muse_spark", "MuseSparkConfig", wrapped("muse_spark", "MuseSparkForConditionalGeneration", dict(
        model_type="muse_spark_text", hidden_act="silu", hidden_size=8192, intermediate_size=16384,
        mlp_layer_types=["dense"] + ["sparse"] * 61, moe_hidden_size=4096, moe_intermediate_size=4096,
        num_experts_per_tok=8, num_hidden_layers=62, num_local_experts=256, output_multiplier=0.1767766952966369,
        post_norm_eps=1e-08, routed_scaling_factor=1.0)),
        {0: DENSE, 1: moe(4096, 4096, 256, 8, BIASED, epsilon=1e-15, logit_multiplier=0.1767766952966369, row_norm=1,
                          model_hidden_size=8192)})

    # softmax with a selection bias
    ernie = dict(hidden_act="silu", moe_gate="topk", moe_layer_interval=1, moe_num_experts=64, moe_use_aux_free=True,
                 use_bias=False, moe_norm_min=1e-12)
    clamp_min = dict(has_bias=1, renorm="clamp", epsilon=1e-12)
    add("ernie4_5_moe", "Ernie4_5_MoeConfig", config(
        "ernie4_5_moe", "Ernie4_5_MoeForCausalLM", hidden_size=2560, intermediate_size=12288, moe_capacity=[64, 64, 64],
        moe_intermediate_size=1536, moe_k=6, moe_layer_end_index=27, moe_layer_start_index=1,
        moe_num_shared_experts=2, num_hidden_layers=28, **ernie),
        {0: DENSE, 1: moe(2560, 1536, 64, 6, clamp_min, shared(2, 3072))})
    add("ernie4_5_moe_300b", "Ernie4_5_MoeConfig", config(
        "ernie4_5_moe", "Ernie4_5_MoeForCausalLM", hidden_size=8192, intermediate_size=28672,
        moe_intermediate_size=3584, moe_k=8, moe_layer_end_index=53, moe_layer_start_index=3,
        moe_num_shared_experts=0, num_hidden_layers=54, **ernie), {2: DENSE, 3: moe(8192, 3584, 64, 8, clamp_min)})
    add("longcat_flash", "LongcatFlashConfig", config(
        "longcat_flash", "LongcatFlashForCausalLM", expert_ffn_hidden_size=2048, ffn_hidden_size=12288,
        hidden_size=6144, moe_topk=12, n_routed_experts=512, norm_topk_prob=False, num_layers=28, router_bias=False,
        routed_scaling_factor=6.0, zero_expert_num=256, zero_expert_type="identity"),
        {0: moe(6144, 2048, 512, 12, has_bias=1, scale=6.0, zero_experts=256, zero_kind="identity")})
    add("zaya", "ZayaConfig", config(
        "zaya", "ZayaForCausalLM", hidden_act="silu", hidden_size=2048, moe_intermediate_size=2048, num_experts=16,
        num_experts_per_tok=1, num_hidden_layers=40, router_hidden_size=256),
        {0: moe(2048, 2048, 16, 1, has_bias=1, zero_experts=1, zero_kind="skip")})

    # Nemotron
    nano = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
    relu2 = dict(DSV3, activation="relu2")
    add("nemotron_h_nano", "NemotronHConfig", nemotron(
        hidden_size=2688, hybrid_override_pattern=nano, intermediate_size=1856, moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712, n_routed_experts=128, num_experts_per_tok=6,
        num_hidden_layers=len(nano), routed_scaling_factor=2.5),
        {0: DENSE, 1: moe(2688, 1856, 128, 6, relu2, shared(1, 3712), scale=2.5), 5: DENSE})
    names = {"M": "linear_attention", "E": "moe", "*": "full_attention"}
    add("nemotron_h_resaved", "NemotronHConfig", dict(nemotron(     # as transformers 5 writes it
        hidden_size=2688, layers_block_type=[names[c] for c in nano], intermediate_size=1856,
        moe_intermediate_size=1856, moe_latent_size=None, moe_shared_expert_intermediate_size=3712,
        n_routed_experts=128, num_experts_per_tok=6, routed_scaling_factor=2.5),
        time_step_limit=[0.0, {"__float__": "Infinity"}]),
        {0: DENSE, 1: moe(2688, 1856, 128, 6, relu2, shared(1, 3712), scale=2.5), 5: DENSE})
    super_ = "MEMEMEM*E" * 9 + "MEMEMEM"
    add("nemotron_h_super", "NemotronHConfig", nemotron(
        hidden_size=4096, hybrid_override_pattern=super_, intermediate_size=2688, moe_intermediate_size=2688,
        moe_latent_size=1024, moe_shared_expert_intermediate_size=5376, n_routed_experts=512, num_experts_per_tok=22,
        num_hidden_layers=len(super_), routed_scaling_factor=5.0),
        {0: DENSE, 1: moe(1024, 2688, 512, 22, relu2, shared(1, 5376), scale=5.0, model_hidden_size=4096)})
    blocks = [{"block_type": "mamba"}, {"block_type": "moe", "moe_intermediate_size": 1280, "n_routed_experts": 512,
                                        "num_experts_per_tok": 4},
              {"block_type": "attention"}, {"block_type": "moe", "moe_intermediate_size": 2048,
                                            "n_routed_experts": 512, "num_experts_per_tok": 12}]
    puzzle_parts = (relu2, shared(1, 5376), dict(scale=5.0, model_hidden_size=4096))
    add("nemotron_h_puzzle", "vllm", dict(nemotron(
        hidden_size=4096, block_configs=blocks, intermediate_size=2688, moe_latent_size=1024,
        moe_shared_expert_intermediate_size=5376, num_hidden_layers=4, routed_scaling_factor=5.0),
        model_type="nemotron_h_puzzle", architectures=["NemotronHPuzzleForCausalLM"]),
        {0: DENSE, 1: moe(1024, 1280, 512, 4, *puzzle_parts), 2: DENSE, 3: moe(1024, 2048, 512, 12, *puzzle_parts)})
    return f


def save_json(path, body):
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        json.dump(body, f, indent=1)
        f.write("\n")


# --- configs: leaving out what the model type's class defaults --------------------------------------------------------

# Sizes are in every released file. All other keys about experts may be missing, if the class fills in the same value.
OMITTED = (
    "hidden_act", "hidden_activation", "decoder_sparse_step", "mlp_only_layers", "norm_topk_prob", "scoring_func",
    "score_func", "score_function", "topk_method", "first_k_dense_replace", "moe_layer_freq", "n_group", "topk_group",
    "routed_scaling_factor", "n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_renormalize",
    "moe_router_activation_func", "num_expert_group", "use_grouped_topk", "expert_layer_offset",
    "expert_layer_period", "moe_normalize_expert_weights", "moe_jitter_eps", "ffn_act_fn", "router_jitter_noise",
    "interleave_moe_layer_step", "experts_per_token", "num_hash_layers", "swiglu_limit",
    "swiglu_alpha", "mlp_layer_types", 
    "use_routing_bias", "use_expert_bias", "num_dense_layers",
    "route_norm", "route_scale", "router_scaling_factor", "moe_router_use_sigmoid", "moe_router_enable_expert_bias",
    "moe_router_activation", "norm_expert_weight", "need_fp32_gate", "use_moe", "use_moe_router_bias", "router_dtype",
    "moe_norm_min", "moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index", "moe_num_shared_experts",
    "zero_expert_num", "zero_expert_type", "router_bias", "mlp_hidden_act", "moe_latent_size",
    "moe_apply_router_weight_on_input", "moe_router_logit_softcapping", "moe_routed_scaling_factor",
    "output_multiplier", "post_norm_eps", "mlp_gate_softcap", "mlp_up_softcap",
    "shared_expert_sink", "expert_selection_fn", "shared_expert_combination_strategy", "moe_layers_enum",
    "use_mixed_mlp_moe", "enable_moe_fp32_combine", "moe_gate", "moe_use_aux_free", "moe_capacity",
    "hybrid_override_pattern")


def text_part(body):
    """the dict that holds the expert keys"""
    for key in ("thinker_config", "text_config", "ffn_config"):
        if isinstance(body.get(key), dict):
            return text_part(body[key])
    return body


def load_class(source, body):
    import transformers

    def plain(value):       # {"__float__": "Infinity"} is decoded when transformers reads a file
        if isinstance(value, dict) and list(value) == ["__float__"]:
            return float(value["__float__"])
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list) else value

    return getattr(transformers, source).from_dict(plain(json.loads(json.dumps(body))))


def minimal(source, body):
    """body without the keys whose absence the class makes good, or None if there is no such key"""
    def meaning(b, without):
        return {k: v for k, v in text_part(load_class(source, b).to_dict()).items() if k not in without}

    small, gone = json.loads(json.dumps(body)), []
    for key in OMITTED:
        part = text_part(small)
        if key not in part:
            continue
        value = part.pop(key)
        try:
            same = meaning(small, gone + [key]) == meaning(body, gone + [key])
            # A key of the class itself must come back with the value that was left out.
            found = text_part(load_class(source, small).to_dict())
            same = same and (key not in found or found[key] == value)
        except Exception:               # the class refuses a file without this key
            same = False
        if same:
            gone.append(key)
        else:
            part[key] = value
    return small if gone else None


def make_configs():
    folder = f"{HERE}/configs"
    os.makedirs(f"{folder}/quant", exist_ok=True)
    for old in os.listdir(folder):
        if old.endswith(".json"):
            os.remove(f"{folder}/{old}")
    rows, files = [], 0
    for name, source, body, layers in families():
        variants = [(f"{name}.json", body)]
        if source not in ("vllm", "document"):
            small = minimal(source, body)
            if small:
                variants.append((f"{name}.min.json", small))
        for file, content in variants:
            save_json(f"{folder}/{file}", content)
            files += 1
            for layer, d in layers.items():
                row = dict.fromkeys(EXPECTED_COLUMNS, "-") if d is DENSE else dict(d)
                rows.append(dict(row, file=file, layer=layer, source=source, is_moe=int(d is not DENSE)))
    write_table(f"{folder}/expected.tsv", EXPECTED_COLUMNS, rows)
    print(f"configs: {files} files, {len(rows)} rows")
    make_quant()
    make_vllm_decision()


# --- quantisation samples ---------------------------------------------------------------------------------------------

def quant_samples():
    """file, [(module or - for all experts, format, remark)], body"""
    host = dict(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144,
                moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
                num_hidden_layers=48)

    def number(bits, kind, strategy, group=None, dynamic=False, **more):
        return dict(num_bits=bits, type=kind, strategy=strategy, group_size=group, dynamic=dynamic, symmetric=True,
                    **more)

    def tensors(form, weights, inputs):
        return dict(host, quantization_config=dict(
            quant_method="compressed-tensors", format=form, quantization_status="compressed",
            ignore=["lm_head", "re:.*mlp.gate$"],
            config_groups={"group_0": dict(targets=["Linear"], weights=weights, input_activations=inputs,
                                           output_activations=None)}))

    def modelopt(algorithm, **more):
        return {"producer": {"name": "modelopt", "version": "0.39.0"},
                "quantization": {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8",
                                 "exclude_modules": ["lm_head", "model.layers.*.mlp.gate"], **more}}

    def modelopt_inline(inputs):
        return dict(host, quantization_config=dict(
            quant_method="modelopt", quant_algo="NVFP4", ignore=["lm_head"],
            producer={"name": "modelopt", "version": "0.41.0"},
            config_groups={"group_0": dict(
                targets=["Linear"], weights=dict(dynamic=False, num_bits=4, type="float", group_size=16),
                input_activations=inputs)}))

    def fp8(**more):
        return dict(host, quantization_config=dict(quant_method="fp8", fmt="e4m3", **more))

    four = dict(dynamic=False, num_bits=4, type="float", group_size=16)
    weight4 = number(4, "float", "tensor_group", 16)
    input4 = number(4, "float", "tensor_group", 16, dynamic="local")
    input8 = number(8, "float", "token", dynamic=True)
    expert = "backbone.layers.{}.mixer.experts.{}.{}"
    mixed = {expert.format(layer, e, p): algorithm for layer, algorithm in (
        (1, {"quant_algo": "NVFP4", "group_size": 16}), (3, {"quant_algo": "FP8"}),
        (5, {"quant_algo": "W4A16_NVFP4", "group_size": 16})) for e in (0, 1) for p in ("up_proj", "down_proj")}

    def one(name, fmt, remark, body):
        return name, [("-", fmt, remark)], body

    return [
        one("none.json", "bf16", "no quantization_config; torch_dtype", dict(host, torch_dtype="bfloat16")),
        one("none_fp16.json", "fp16", "no quantization_config; dtype, the newer key", dict(host, dtype="float16")),
        one("fp8_block.json", "fp8_block_128", "weight_scale_inv f32", fp8(
            activation_scheme="dynamic", weight_block_size=[128, 128])),
        one("fp8_block_ue8m0_32.json", "fp8_block_32", "ue8m0 scales", fp8(
            activation_scheme="dynamic", scale_fmt="ue8m0", weight_block_size=[32, 32])),
        one("fp8_per_tensor_static.json", "fp8_per_tensor", "input scales in the file", fp8(
            activation_scheme="static")),
        one("fp8_per_tensor_dynamic.json", "fp8_per_tensor", "no input scales", fp8(activation_scheme="dynamic")),
        one("mxfp8.json", "mxfp8", "quant_method fp8, block [1, 32], ue8m0", fp8(
            activation_scheme="dynamic", scale_fmt="ue8m0", weight_block_size=[1, 32])),
        one("mxfp4_gpt_oss.json", "mxfp4_w4a16", "", {
            "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880,
            "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4, "num_hidden_layers": 24,
            "swiglu_limit": 7.0, "quantization_config": {
                "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                           "model.embed_tokens", "lm_head"], "quant_method": "mxfp4"}}),
        one("deepseek_v4_fp4.json", "mxfp4_w4a8", "quantization_config is of the dense layers; expert_dtype decides", {
            "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "expert_dtype": "fp4",
            "hidden_size": 4096, "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 6,
            "num_hidden_layers": 43, "quantization_config": {
                "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
                "weight_block_size": [128, 128]}}),
        one("ct_nvfp4.json", "nvfp4_w4a4", "reciprocal global scales", tensors(
            "nvfp4-pack-quantized", weight4, input4)),
        one("ct_nvfp4a16.json", "nvfp4_w4a16", "no input scales", tensors("nvfp4-pack-quantized", weight4, None)),
        one("ct_fp8_channel.json", "fp8_per_channel", "dynamic per token", tensors(
            "float-quantized", number(8, "float", "channel"), input8)),
        one("ct_fp8_tensor.json", "fp8_per_tensor", "static", tensors(
            "float-quantized", number(8, "float", "tensor"), number(8, "float", "tensor"))),
        one("ct_fp8_block.json", "fp8_block_128", "", tensors(
            "float-quantized", number(8, "float", "block", block_structure=[128, 128]),
            number(8, "float", "group", 128, dynamic=True))),
        one("ct_int4_g32.json", "int4_g32", "", tensors("pack-quantized", number(4, "int", "group", 32), None)),
        one("ct_int4_g64.json", "int4_g64", "", tensors("pack-quantized", number(4, "int", "group", 64), None)),
        one("ct_int4_g128.json", "int4_g128", "", tensors("pack-quantized", number(4, "int", "group", 128), None)),
        one("ct_mxfp4_w4a16.json", "mxfp4_w4a16", "", tensors(
            "mxfp4-pack-quantized", number(4, "float", "group", 32, scale_dtype="torch.uint8"), None)),
        one("ct_mxfp4_w4a8.json", "mxfp4_w4a8", "", tensors(
            "mxfp4-pack-quantized", number(4, "float", "group", 32, scale_dtype="torch.uint8"), input8)),
        one("ct_mxfp8.json", "mxfp8", "", tensors(
            "mxfp8-quantized", number(8, "float", "group", 32, scale_dtype="torch.uint8"),
            number(8, "float", "group", 32, dynamic=True, scale_dtype="torch.uint8"))),
        one("modelopt_fp8.hf_quant_config.json", "fp8_per_tensor", "", modelopt("FP8")),
        one("modelopt_fp8_channel.hf_quant_config.json", "fp8_per_channel", "", modelopt("FP8_PER_CHANNEL_PER_TOKEN")),
        one("modelopt_fp8_block.hf_quant_config.json", "fp8_block_128", "", modelopt("FP8_PB_WO")),
        one("modelopt_fp8_block_alias.hf_quant_config.json", "fp8_block_128", "the older name",
            modelopt("FP8_BLOCK_SCALES")),
        one("modelopt_nvfp4.hf_quant_config.json", "nvfp4_w4a4", "", modelopt("NVFP4", group_size=16)),
        one("modelopt_w4a16_nvfp4.hf_quant_config.json", "nvfp4_w4a16", "", modelopt("W4A16_NVFP4", group_size=16)),
        one("modelopt_mxfp8.hf_quant_config.json", "mxfp8", "", modelopt("MXFP8", group_size=32)),
        one("modelopt_nvfp4.json", "nvfp4_w4a4", "inside config.json", modelopt_inline(four)),
        one("modelopt_nvfp4_null_inputs.json", "nvfp4_w4a16", "NVFP4, but every group's input_activations is null",
            modelopt_inline(None)),
        ("modelopt_mixed.hf_quant_config.json", [
            (expert.format(1, 0, "up_proj"), "nvfp4_w4a4", "per layer"),
            (expert.format(3, 1, "down_proj"), "fp8_per_tensor", "per layer"),
            (expert.format(5, 1, "up_proj"), "nvfp4_w4a16", "per layer"),
            (expert.format(7, 0, "up_proj"), "bf16", "not listed: not quantised")],
         modelopt("MIXED_PRECISION", quantized_layers=mixed)),
        one("unknown_algorithm.hf_quant_config.json", "refused", "a name nobody knows", modelopt("FP3_SECRET")),
    ]


def make_quant():
    rows = []
    for file, modules, body in quant_samples():
        save_json(f"{HERE}/configs/quant/{file}", body)
        rows += [dict(file=file, module=module, format=fmt, remark=remark or "-") for module, fmt, remark in modules]
    write_table(f"{HERE}/configs/quant/expected.tsv", ["file", "module", "format", "remark"], rows)
    print(f"quant: {len(rows)} rows")


# --- vLLM 0.33's inference of a routing method ------------------------------------------------------------------------

def vllm_method(scoring, renormalize, groups, bias):
    """The decision as a table of conditions; top_k takes no part in it any more."""
    if scoring == "sqrtsoftplus":
        return ("DeepseekV4", 100) if renormalize else ("Unspecified", 9)
    if bias:
        if scoring != "sigmoid" or not renormalize:
            return "Unspecified", 9
        return ("DeepSeekV3", 2) if groups else ("MiniMax2", 7)
    unbiased = {("sigmoid", 1): ("SigmoidRenorm", 6), ("sigmoid", 0): ("Sigmoid", 8),
                ("softmax", 1): ("RenormalizeNaive", 4), ("softmax", 0): ("Default", 0)}
    return unbiased.get((scoring, renormalize), ("Unspecified", 9))


def make_vllm_decision():
    rows = []
    for scoring in ("sigmoid", "softmax", "sqrtsoftplus", "other"):
        for top_k in (1, 8):
            for renormalize in (0, 1):
                for group in (0, 8):
                    for bias in (0, 1):
                        name, value = vllm_method(scoring, renormalize, group, bias)
                        rows.append(dict(scoring_func=scoring, top_k=top_k, renormalize=renormalize,
                                         num_expert_group=group, has_bias=bias, method=name, number=value))
    write_table(f"{HERE}/configs/vllm_decision.tsv", list(rows[0]), rows)
    print(f"vllm_decision: {len(rows)} rows")


# --- check: the expectations against transformers' own modules -------------------------------------------------------

BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "balancing_biases")


def build_layer(torch, source, config, layer):
    """the decoder layer of this index, without memory"""
    import importlib
    import inspect
    text_config = config.thinker_config.text_config if hasattr(config, "thinker_config") else config.get_text_config()
    text_config._attn_implementation = "eager"
    text_config._experts_implementation = "eager"
    module = importlib.import_module(type(text_config).__module__.replace("configuration_", "modeling_"))
    errors = []
    for name, cls in inspect.getmembers(module, inspect.isclass):
        layerish = name.endswith("DecoderLayer") or name in ("DbrxBlock", "NemotronHBlock")
        other = any(word in name for word in ("Vision", "Audio", "Talker", "Code2Wav"))
        if cls.__module__ != module.__name__ or not layerish or other:
            continue
        try:
            with torch.device("meta"):
                return cls(text_config, layer)
        except (AttributeError, KeyError, TypeError) as e:
            errors.append(f"{name}: {e}")
    raise SystemExit(f"{source}: no decoder layer could be built: {errors}")


def find(layer, wanted):
    return [(name, m) for name, m in layer.named_modules() if wanted(name.rsplit(".", 1)[-1], m)]


def expert_sizes(experts):
    """E, hidden, intermediate, gated from the parameters' shapes"""
    p = dict(experts.named_parameters())
    if "mlp.w1" in p:
        return experts.num_experts, experts.hidden_size, experts.ffn_hidden_size, True
    e, c, d = p["down_proj"].shape
    if "gate_up_proj" not in p:
        return e, c, d, False
    _, a, b = p["gate_up_proj"].shape
    return (e, c, d, True) if (a, b) == (2 * d, c) else (e, d, c, True)


def run_router(torch, np, layer, d):
    """Runs the layer's routing module on 64 random tokens, in float32. None if it has none."""
    torch.manual_seed(20261122)
    routers = find(layer, lambda n, m: n in ("gate", "router") and any(True for _ in m.parameters()))
    # The experts' own gate is the module that knows k; a shared expert's gate is a bare Linear.
    routers = [(n, m) for n, m in routers if type(m).__name__ not in ("Linear",)]
    if not routers:
        return None
    name, router = routers[0]
    parent = layer.get_submodule(name.rsplit(".", 1)[0]) if "." in name else layer
    router = router.to_empty(device="cpu").float().eval()
    with torch.no_grad():
        for p in router.parameters():
            p.normal_(0, 0.05)
        for n, p in router.named_parameters():
            if n.endswith(("norm.weight", "per_expert_scale", "scale", "global_scale")):
                p.uniform_(0.5, 1.5)
        for _, b in router.named_buffers():
            b.uniform_(-0.1, 0.1) if b.is_floating_point() else b.zero_()
    width = d["num_experts"] + d["zero_experts"]
    bias = None
    for owner in (router, parent):
        deep = owner is router
        for n, t in [*owner.named_buffers(recurse=deep), *owner.named_parameters(recurse=deep)]:
            if n.rsplit(".", 1)[-1] in BIAS_NAMES:
                bias = torch.empty(width).uniform_(-0.1, 0.1)
                if owner is router:
                    with torch.no_grad():
                        t.copy_(bias.view(t.shape))
    hidden = next((m.in_features for m in [router] if hasattr(m, "in_features")), None)
    if hidden is None:
        hidden = getattr(router, "hidden_dim", None) or getattr(router, "hidden_size", None)
    if hidden is None:
        weight = getattr(router, "weight", None)
        linear = next((m for m in router.modules() if isinstance(m, torch.nn.Linear)), None)
        hidden = weight.shape[1] if weight is not None else linear.in_features
    x = torch.randn(1, 64, hidden)
    extra = {}
    token = dict(bias=bias)
    if d["forced_ids"]:
        table = torch.stack([torch.randperm(d["num_experts"])[:d["top_k"]] for _ in range(8)])
        router.tid2eid = table
        extra["input_ids"] = torch.arange(64)[None] % 8
        token["forced"] = [table[i % 8].numpy() for i in range(64)]
    flat = type(router).__name__ not in ("AfmoeTokenChoiceRouter", "ZayaRouter")
    args = [x[0] if flat and not extra else x]
    if bias is not None and not any(n.rsplit(".", 1)[-1] in BIAS_NAMES
                                    for n, _ in list(router.named_buffers()) + list(router.named_parameters())):
        args.append(bias)
    with torch.no_grad():
        out = router(*args, **extra)
    kind = type(router).__name__
    shared_weights = None
    if kind == "DbrxRouter":
        logits = out
        weights, ids = parent.route_tokens_to_experts(logits)
    elif kind == "Llama4Router":
        scores, logits = out
        ids = logits.topk(d["top_k"], dim=-1).indices
        weights = scores.gather(1, ids)
    elif kind == "InklingTopkRouter":
        logits, weights, ids, shared_weights = out
    else:
        logits, weights, ids = out[:3]
    if d["per_expert_scale"]:
        logits = torch.log(logits)              # Gemma's router returns probabilities, and softmax(log p) = p
        token["per_expert_scale"] = router.per_expert_scale.detach().double().numpy()
    elif isinstance(getattr(router, "weight", None), torch.Tensor):
        # Some routers return logits that they have multiplied or capped; the descriptor starts from the bare product.
        product_bias = getattr(router, "bias", None)
        product_bias = None if product_bias is None else product_bias.detach()
        logits = torch.nn.functional.linear(x[0], router.weight.detach(), product_bias)
    factor = float(router.global_scale.detach()) if hasattr(router, "global_scale") else 1.0
    return dict(token, logits=logits.double().numpy(), ids=ids.numpy(), weights=weights.double().numpy() / factor,
                shared=None if shared_weights is None else shared_weights.double().numpy() / factor)


def check_routing(np, label, d, got):
    for t in range(len(got["ids"])):
        token = dict(logits=got["logits"][t], per_expert_scale=got.get("per_expert_scale"),
                     bias=None if got["bias"] is None else got["bias"].double().numpy())
        if "forced" in got:
            token["forced"] = got["forced"][t]
        ids, w = by_fields(np, d, token)
        k = d["top_k"]
        mine = sorted(zip(ids.tolist(), w[:k].tolist()))
        theirs = sorted(zip(got["ids"][t].tolist(), got["weights"][t].tolist()))
        if d["zero_kind"] == "skip":            # Zaya answers id 0 with weight 0
            mine = [(0 if i >= d["num_experts"] else i, v) for i, v in mine]
        assert [i for i, _ in mine] == [i for i, _ in theirs], (label, mine, theirs)
        assert np.allclose([v for _, v in mine], [v for _, v in theirs], rtol=2e-5, atol=1e-7), (label, mine, theirs)
        if got["shared"] is not None:
            assert np.allclose(w[k:], got["shared"][t], rtol=2e-5), label


def activation_of(experts, gated):
    act = getattr(experts, "act_fn", None) or getattr(getattr(experts, "mlp", None), "activation_fn", None)
    name = getattr(act, "__name__", type(act).__name__).lower()
    limit = next((v for v in (getattr(experts, n, None) for n in ("limit", "swiglu_limit")) if v), 0.0)
    limit = 0.0 if limit == math.inf else float(limit)
    if hasattr(experts, "alpha") or hasattr(experts, "swiglu_alpha"):
        return "swiglu_oai", limit
    if hasattr(experts, "_fp8_experts_clamp_after_activation"):
        return ("swiglu_step", limit) if limit else ("swiglu", 0.0)
    if "softcapped" in name:
        return "situ", 0.0
    if "tanh" in name:
        return "geglu_tanh", 0.0
    if "relusquared" in name:
        return "relu2", 0.0
    if act is None or "silu" in name:
        return ("swiglu_clamp", limit) if limit else ("swiglu", 0.0)
    return name, limit


def check():
    import numpy as np
    import torch
    checked = routed = 0
    for name, source, _, layers in families():
        if source in ("vllm", "document"):
            continue
        for file in (f"{name}.json", f"{name}.min.json"):
            path = f"{HERE}/configs/{file}"
            if not os.path.exists(path):
                continue
            with open(path, encoding="utf-8") as f:
                body = json.load(f)
            for index, d in layers.items():
                label = f"{file} layer {index}"
                layer = build_layer(torch, source, load_class(source, body), index)
                experts = [m for _, m in find(layer, lambda n, m: n == "experts")]
                assert bool(experts) == (d is not DENSE), label
                checked += 1
                if d is DENSE:
                    continue
                e, h, i, gated = expert_sizes(experts[0])
                wanted = (d["num_experts"], d["hidden_size"], d["intermediate_size"], d["activation"] != "relu2")
                assert (e, h, i, gated) == wanted, (label, (e, h, i, gated), wanted)
                act = activation_of(experts[0], gated)
                assert act == (d["activation"], d["limit"]), (label, act)
                params = [n.rsplit(".", 1)[-1] for n, _ in list(layer.named_parameters()) + list(layer.named_buffers())]
                assert any(n in BIAS_NAMES for n in params) == bool(d["has_bias"]), (label, "bias")
                gated_shared = bool(find(layer, lambda n, m: n == "shared_expert_gate"))
                assert gated_shared == (d["shared_gate"] == "sigmoid"), label
                blocks = find(layer, lambda n, m: "shared" in n and not n.endswith("gate") 
                              and next(m.parameters(), None) is not None)
                assert bool(blocks) == bool(d["shared_experts"]), (label, "shared")
                if blocks:
                    down = next(p for n, p in blocks[0][1].named_parameters()
                                if "down_proj" in n or "output_linear" in n)
                    wanted = (d["model_hidden_size"], d["shared_intermediate"])
                    assert tuple(down.shape[-2:]) == wanted, (label, down.shape)
                if d["scale_on"] == "output":
                    scales = [m.routed_scaling_factor for m in layer.modules() if hasattr(m, "routed_scaling_factor")]
                    assert scales == [d["scale"]], (label, scales)
                got = run_router(torch, np, layer, d)
                if got:
                    check_routing(np, label, d, got)
                    routed += 1
    print(f"check: {checked} layers built, {routed} routers run")


# --- small types ------------------------------------------------------------------------------------------------------

def make_dtypes():
    import ml_dtypes
    import numpy as np
    kinds = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e2m1": ml_dtypes.float4_e2m1fn,
             "ue8m0": ml_dtypes.float8_e8m0fnu, "int4": ml_dtypes.int4}
    rows = []
    for name, kind in kinds.items():
        codes = np.arange(16 if name in ("e2m1", "int4") else 256, dtype=np.uint8)
        wide = codes.view(np.dtype(kind)).astype(np.float32)
        for code, value in zip(codes, wide):
            bits = "nan" if np.isnan(value) else "%08x" % value.view(np.uint32)
            rows.append(dict(dtype=name, way="wide", a="%02x" % code, b=bits))
        values = np.unique(wide[np.isfinite(wide)])
        middles = ((values[:-1].astype(np.float64) + values[1:]) / 2).astype(np.float32)
        beyond = [1.5 * values[-1].astype(np.float64), 3e38, np.inf]
        if name != "ue8m0":
            beyond += [-v for v in beyond]
        given = np.concatenate([values, np.zeros(1, np.float32), middles, np.nextafter(middles, np.float32(np.inf)),
                                np.nextafter(middles, np.float32(-np.inf)),
                                np.minimum(np.array(beyond), np.inf).astype(np.float32)])
        cut = np.clip(given, values[0], values[-1])
        if name == "ue8m0":
            mantissa, exponent = np.frexp(cut.astype(np.float64))
            cut = np.ldexp(1.0, exponent - (mantissa == 0.5)).astype(np.float32)
        if name == "int4":
            cut = np.rint(cut)
        for value, code in zip(given, cut.astype(kind).view(np.uint8)):
            code &= 15 if name in ("e2m1", "int4") else 255
            rows.append(dict(dtype=name, way="narrow", a="%08x" % value.view(np.uint32), b="%02x" % code))
    write_table(os.path.join(HERE, "dtypes.tsv"), ["dtype", "way", "a", "b"], rows)


if __name__ == "__main__":
    commands = {"routing": make_routing, "configs": make_configs, "dtypes": make_dtypes, "check": check}
    for command in sys.argv[1:] or list(commands):
        commands[command]()
