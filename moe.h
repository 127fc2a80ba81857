// moe.h - v0.1.0 - Mixture-of-Experts layers in one C header - MIT licence (end of file)
//
// Runs one MoE layer: router logits -> top-k experts -> GEMM 1, activation -> GEMM 2 -> weighted sum + shared experts.
// Infers routing, activation, sizes and tensor names from a checkpoint's own files, for about sixty model families.
// Needs the C library, nothing else. This version runs on the CPU, in f32, bf16 and f16; the calls are those that a GPU
// will use.
//
// QUICK START
//
//     #define MOE_IMPLEMENTATION              // in exactly one C or C++ file
//     #include "moe.h"
//
//     moe_error       err;
//     moe_layer_desc  layer;
//     moe_checkpoint *ckpt;
//     moe_context    *ctx;
//     moe_weights    *weights;
//     moe_plan       *plan;
//     moe_plan_info   info = { 0 };
//     if (moe_checkpoint_open("Qwen3-30B-A3B", NULL, &ckpt, &err) ||      // config.json + *.safetensors, memory-mapped
//         moe_checkpoint_layer(ckpt, 3, &layer, &err) ||                  // shapes, routing, activation, format
//         moe_context_create(NULL, &ctx, &err) ||                         // NULL: best back end, all cores
//         moe_weights_from_checkpoint(ctx, ckpt, &layer, &weights, &err) ||
//         moe_plan_create(ctx, &layer, NULL, &plan, &err) ||              // NULL: dtypes of the format, 8192 tokens
//         moe_plan_get_info(plan, &info, &err))
//         return fprintf(stderr, "%s\n", err.text), 1;
//     ... fill moe_execute_args: tokens, x, logits, out, workspace of info.workspace_bytes ...
//     moe_execute(plan, weights, &args, NULL);                            // never allocates
//
// examples/ holds complete programs of a page each.
//
// WHAT IT DOES NOT DO
//     No training. No communication: it computes a rank's partial sum and leaves the exchange to the engine. Latent
//     projections, the norms around the layer, and shared experts that see another width than the routed ones (latent
//     layers: inference then gives shared.count 0) are the engine's. The router's own product is a separate call
//     (moe_router_logits), because routers may see another input than the experts do.
//
// INDEX    search for the tag
//     >>manual   life cycle, options, numerics, threads, errors, limits     >>api        types and functions
//     >>config   compiler and machine          >>base     memory, text      >>error      messages
//     >>numeric  bf16, f16                     >>sys      files             >>math       exp, log1p, tanh, erf, sqrt
//     >>json     reader                        >>routing  top-k, presets    >>layer      validation
//     >>infer    config.json -> layer          >>checkpoint  safetensors    >>context    threads, instruction sets
//     >>cuda     driver, NVRTC                 >>jit      compile, cache    >>layout     packed weights
//     >>weights  set, seal, save               >>cpu      kernels           >>instances  kernels of a plan
//     >>plan     execute and its stages        >>stages   on CUDA           >>ahead      compile without a GPU
//     >>reference  the oracle                  >>kernels  their text        >>history    changes, licence
//
// ---------------------------------------------------------------------------------------------------------------------
// >>manual
//
// VOCABULARY
//     token   one row of x                              slot   (token, choice); top_k + always-on ones per token
//     expert  two or three matrices, by a global id     row    a slot's row in expert-sorted order
//     H hidden size, I intermediate size (one half), E routed experts, k top-k, T tokens
//     plan    everything decided for one layer shape; one plan serves every layer of that shape
//
// LIFE CYCLE
//     context -> weights: create, set tensors, seal -> plan -> workspace -> execute, as often as you like -> destroy in
//     any order but: plans and weights before their context, a checkpoint any time after the last call that takes it.
//     Every destroy takes NULL. A create that fails leaves NULL in *out and nothing behind.
//     moe_weights_from_checkpoint() does create, set and seal in one; moe_weights_set_tensor() serves engines with a
//     loader of their own, and moe_tensor_from_name() tells them what a tensor is.
//
// OPTIONS    defined before the include, the same in every file
//     MOE_IMPLEMENTATION   the code, in exactly one file            MOE_STATIC        private to each including file
//     MOE_DLL              shared library: export or import         MOE_API           your own decoration
//     MOE_NO_THREADS       one thread, no thread library            MOE_NO_CPU_SIMD   scalar kernels only
//     MOE_NO_FILES         no file access; implies NO_CHECKPOINT    MOE_NO_CHECKPOINT no safetensors
//     MOE_NO_CONFIG        no JSON; implies NO_CHECKPOINT           MOE_MALLOC, MOE_FREE  default allocator
//     MOE_NO_CUDA          no GPU code at all                       MOE_NO_ENV        no variable of the environment
//     MOE_ASSERT           internal invariants; empty by default
//     -ffast-math is refused: it changes results. Other optimisation options do not. Results are those of the default
//     rounding mode with denormals: a thread that sets FTZ or DAZ gets other bits.
//
// DESCRIPTORS
//     Zero-initialise, set what you need. struct_size 0 means this header's; a shared library built with MOE_DLL wants
//     it set. A required enum has 0 = UNSET, which is refused by name. Members are only ever added at the end or out of
//     `reserved`.
//
// ROUTING
//     moe_routing_desc holds independent fields; named methods are presets of them (moe_routing_preset). Scores are
//     fp32 with this library's own exp and log1p, sums in a fixed order of 32 lanes, ties to the lower id, -0 equal to
//     +0: ids and their order are the same bits on every machine. NaN and +inf logits are errors; -inf is legal and
//     means never. Numbers from FlashInfer, vLLM or SGLang have moved from release to release, and go through
//     moe_routing_from_foreign() with the version they come from.
//
// NUMERICS
//     A dot product has 16 lanes: lane l adds elements l, l + 16, l + 32, ... in order by fused multiply-add from +0;
//     then lane i adds lane i + 8, + 4, + 2, + 1. Every instruction set and the reference follow this, so that their
//     results are the same bits. bf16 and f16 widen exactly. GEMM 1: dot, + bias, activation, one rounding to the
//     intermediate's type (that of the format; MOE_DTYPE_F32 in moe_plan_desc leaves it unrounded). GEMM 2: dot, +
//     bias, row norm. Output: fp32 sum over slots in slot order by fused multiply-add, routed scale if it is on the
//     output, + shared experts, output scale, + previous content with ACCUMULATE, one rounding. Weights are f32
//     throughout. The result for a token does not depend on other tokens, on the number of threads, or on how work is
//     split.
//
// WEIGHTS
//     Sources: gate and up apart, or fused in either order, or interleaved; output-major, input-major or in 128-byte
//     blocks; in natural order or shuffled for TRTLLM-Gen; one expert at a time or stacked; or a callback that yields
//     fp32 rows. The caller says which: nothing is guessed. Float types that differ from the format's are rounded to
//     it, to nearest even. Packed once, on arrival; the source may be freed at once; at most one expert of extra memory
//     at a time.
//
// PARALLELISM
//     moe_parallel_desc: a contiguous range or a map of local experts, and a slice of I. Routing runs over all experts
//     on every rank; each output is that rank's partial sum. With expert parallelism set omit_common on all ranks but
//     one: the others then leave out always-on, shared and special experts. With tensor parallelism every rank adds its
//     slice of the shared experts; what cannot be sliced (GEMM 2's bias, special and constant experts) is added by
//     tp_rank 0.
//
// CUDA
//     MOE_BACKEND_CUDA opens the driver (libcuda.so.1, nvcuda.dll; 12.0 or later, compute capability 8.0 or later) when
//     the context is created, and NVRTC (12.0 or later) when a kernel has to be compiled: nothing of CUDA is needed to
//     build. Before glibc 2.34 link -ldl. NVRTC is looked for where the system looks, in CUDA_HOME, CUDA_PATH, the
//     usual folders of toolkits and NVIDIA's Python wheels, that of the driver's major version first. What was tried is
//     in the message, at length in the log. Both stay loaded until the process ends. MOE_BACKEND_AUTO is the CPU.
//     The device's primary context is retained, or the caller's CUcontext taken, which must outlive this library's;
//     it is made current around calls of the driver only where it is not. Kernels are compiled and loaded by
//     moe_plan_create(), never later; that may happen while another thread captures a stream.
//
// CACHE
//     Compiled kernels are kept in a folder: desc.jit.cache_dir, else MOE_CACHE_DIR, $XDG_CACHE_HOME/moe,
//     $HOME/.cache/moe (~/Library/Caches/moe, %LOCALAPPDATA%\moe), else in memory only. An entry's name and contents
//     hold the SHA-256 of the kernels' text, options and chip; NVRTC's version is noted but not part of it, so that a
//     warm start opens no NVRTC. A folder or file counts only if it belongs to this user or root, nobody else can write it,
//     and no link leads to it from the cache folder on; whatever is wrong is a miss. Where nothing can be written,
//     kernels stay in memory, and the log says so once. No locks: any number of processes may share a folder, and it
//     may be deleted at any time. Nothing is deleted by itself: moe_cache_trim(). moe_jit_precompile() fills a folder
//     without a GPU; as desc.jit.seed_dir it serves from a read-only image. moe_jit_export() makes C of kernels.
//
// ENVIRONMENT    desc wins; not read at all by a process with more rights than its user
//     MOE_CACHE_DIR  folder    MOE_CACHE  rw, ro, off    MOE_CUDA_LIB, MOE_NVRTC_LIB  absolute paths: no other is tried
//
// STAGES ON CUDA
//     A CUDA context runs moe_route(), moe_permute() and moe_router_logits(); this version has no GEMM kernels, so
//     moe_execute() and moe_finalize() are MOE_ERROR_UNSUPPORTED there; moe_execute_check() and the plan's candidates
//     say so. Weights are packed in host memory; what the stages read is copied to the device when they are sealed.
//     Every pointer in moe_execute_args and moe_permutation is then a device address, a multiple of its elements' size;
//     calls only enqueue, and may be captured. Results are the CPU's, to the bit. Routing takes one launch up to 1,024
//     tokens (64 before compute capability 9.0, which has no clusters) at a router width up to 512, else two.
//     sm_limit is for GEMMs: the stages do not look at it.
//     Contents cannot be refused there; what the CPU refuses is counted in out_faults, and routing goes on: a NaN or
//     +inf logit (or key) counts as -inf and sorts last; an id out of range becomes -1 with weight 0; a token whose
//     token id or bias row is out of range gets ids -1. A number of tokens in num_tokens_dev that is out of range
//     routes nothing. Rows and slots past that number are left as they were; counts and tables are of what is routed.
//
// THREADS
//     Pure functions and functions of const objects: any thread, at any time. moe_weights_set_tensor(): several
//     threads, if for different experts. moe_execute(): several threads with one plan and one set of weights, each with
//     a workspace of its own; on the CPU such calls take turns on the context's pool of threads. A parallel_for hook
//     replaces that pool. Plans of one CUDA context are created in turns; kernels are compiled on its pool.
//
// ERRORS
//     A call returns MOE_OK (0) or a negative moe_result, and fills the caller's moe_error with the member at fault,
//     what it was and what is legal. No call prints, aborts or keeps a "last error". moe_execute() has no moe_error:
//     moe_execute_check() says what it would refuse, and why.
//
// LIMITS
//     E and router width up to 2,048; k up to 32, 8 always-on slots; H and I up to 1,048,576; files as large as memory
//     can address. A checkpoint that is mapped must not shrink while it is open (MOE_CHECKPOINT_READ copies it
//     instead). Quantised formats are described, inferred from checkpoints and refused by moe_weights_create() and
//     moe_plan_create().
// ---------------------------------------------------------------------------------------------------------------------
// >>api  types and functions
#ifndef MOE_H
#define MOE_H

#include <stddef.h>
#include <stdint.h>

#define MOE_VERSION_MAJOR 0
#define MOE_VERSION_MINOR 1
#define MOE_VERSION_PATCH 0
#define MOE_VERSION (MOE_VERSION_MAJOR * 10000 + MOE_VERSION_MINOR * 100 + MOE_VERSION_PATCH)

#define MOE_MAX_EXPERTS 2048 // routed + special + always-on: the width of a router
#define MOE_MAX_TOP_K 32
#define MOE_MAX_EXTRA_SLOTS 8
#define MOE_MAX_SLOTS (MOE_MAX_TOP_K + MOE_MAX_EXTRA_SLOTS)

#if (defined(MOE_NO_FILES) || defined(MOE_NO_CONFIG)) && !defined(MOE_NO_CHECKPOINT)
#  define MOE_NO_CHECKPOINT
#endif
#ifndef MOE_API
#  if defined(MOE_STATIC)
#    if defined(__GNUC__)
#      define MOE_API __attribute__((unused)) static
#    else
#      define MOE_API static
#    endif
#  elif defined(MOE_DLL) && defined(_WIN32)
#    if defined(MOE_IMPLEMENTATION)
#      define MOE_API __declspec(dllexport)
#    else
#      define MOE_API __declspec(dllimport)
#    endif
#  elif defined(MOE_DLL) && defined(__GNUC__)
#    define MOE_API __attribute__((visibility("default")))
#  else
#    define MOE_API extern
#  endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Conventions of every struct below: zero-initialise it, then set members. `struct_size` is 0 (this header's) or the
// sizeof the caller compiled with. An enum member said to be required has 0 = UNSET, which is refused by name; every
// other 0 is a default that the comment states. Booleans are 0 or 1. `reserved` is zero. Pointers in a desc are read
// during the call only, unless the comment says that they are kept.

// ---- results --------------------------------------------------------------------------------------------------------

typedef enum moe_result {
    MOE_OK = 0,
    MOE_ERROR_ARGUMENT = -1,     // a member or argument is illegal: moe_error names it
    MOE_ERROR_STATE = -2,        // the call is legal, but not now (sealed twice, executed before seal, in use)
    MOE_ERROR_DATA = -3,         // the tensors' contents are illegal (NaN logits, ids or counts out of range)
    MOE_ERROR_MEMORY = -20,      // the allocator returned NULL
    MOE_ERROR_FILE = -21,        // a file could not be opened, read or written
    MOE_ERROR_FORMAT = -22,      // a file or text is damaged or is not what it says
    MOE_ERROR_MISSING = -23,     // a key, tensor or file that is needed is not there
    MOE_ERROR_DRIVER = -40,      // no CUDA driver or device that can be used, or a call of it failed
    MOE_ERROR_NVRTC = -41,       // no NVRTC that can compile for the chip, and the kernel is nowhere else
    MOE_ERROR_COMPILE = -60,     // NVRTC refused a kernel
    MOE_ERROR_LOAD = -61,        // the driver refused a compiled kernel
    MOE_ERROR_UNSUPPORTED = -80, // legal, but this build, machine or version of the library does not do it
    MOE_ERROR_LAUNCH = -100,     // the driver refused a launch
    MOE_RESULT__FORCE32 = 0x7fffffff
} moe_result;

// What went wrong. Every fallible call outside the hot path takes one; NULL is legal. Filled on failure, and set to
// MOE_OK with empty texts on success. Plain memory of the caller's: any thread, no clean-up.
typedef struct moe_error {
    int32_t code;    // moe_result
    char member[92]; // path of the member or argument at fault, "" when there is none: "layer.routing.groups_kept"
    char text[672];  // one sentence: what it was, what is legal; always terminated, UTF-8
} moe_error;

// ---- vocabulary -----------------------------------------------------------------------------------------------------

typedef enum moe_dtype { // 4-bit types: element 2i in the low nibble of byte i
    MOE_DTYPE_UNSET = 0,
    MOE_DTYPE_F32 = 1,
    MOE_DTYPE_BF16 = 2,
    MOE_DTYPE_F16 = 3,
    MOE_DTYPE_E4M3 = 4,
    MOE_DTYPE_E5M2 = 5,
    MOE_DTYPE_E2M1 = 6,
    MOE_DTYPE_UE8M0 = 7,
    MOE_DTYPE_INT4 = 8,
    MOE_DTYPE_F64 = 9,
    MOE_DTYPE_I8 = 10,
    MOE_DTYPE_U8 = 11,
    MOE_DTYPE_I16 = 12,
    MOE_DTYPE_U16 = 13,
    MOE_DTYPE_I32 = 14,
    MOE_DTYPE_U32 = 15,
    MOE_DTYPE_I64 = 16,
    MOE_DTYPE_U64 = 17,
    MOE_DTYPE_BOOL = 18,
    MOE_DTYPE__FORCE32 = 0x7fffffff
} moe_dtype;

typedef enum moe_format { // weights x activations
    MOE_FORMAT_UNSET = 0,
    MOE_FORMAT_F32 = 1,             // CPU only
    MOE_FORMAT_BF16 = 2,
    MOE_FORMAT_F16 = 3,
    MOE_FORMAT_FP8_PER_TENSOR = 4,  // e4m3, one scale per expert matrix; activations e4m3, one scale
    MOE_FORMAT_FP8_PER_CHANNEL = 5, // e4m3, one scale per output row; activations e4m3, one scale per token
    MOE_FORMAT_FP8_BLOCK = 6,       // e4m3, square blocks of format_block; activations e4m3 1 x 128
    MOE_FORMAT_MXFP8 = 7,           // e4m3 with ue8m0 per 32, both sides
    MOE_FORMAT_NVFP4 = 8,           // e2m1 with e4m3 per 16 and a global scale, both sides (w4a4)
    MOE_FORMAT_NVFP4_W4A16 = 9,
    MOE_FORMAT_MXFP4_W4A16 = 10,    // e2m1 with ue8m0 per 32; activations bf16 or f16
    MOE_FORMAT_MXFP4_W4A8 = 11,     // the same, activations mxfp8
    MOE_FORMAT_INT4_W4A16 = 12,     // symmetric int4, a scale per format_block (32, 64 or 128) along the input
    MOE_FORMAT__FORCE32 = 0x7fffffff
} moe_format;

typedef enum moe_activation {        // g gate, u up (gated kinds); x otherwise; s() is the logistic function
    MOE_ACTIVATION_UNSET = 0,
    MOE_ACTIVATION_SWIGLU = 1,       // g' = min(g, limit), u' = clamp(u, +-limit); g' s(alpha g') (u' + beta)
    MOE_ACTIVATION_SWIGLU_STEP = 2,  // min(g s(g), limit) clamp(u, +-limit)
    MOE_ACTIVATION_GEGLU_ERF = 3,    // g/2 (1 + erf(g / sqrt 2)) u
    MOE_ACTIVATION_GEGLU_TANH = 4,   // g/2 (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) u
    MOE_ACTIVATION_SITU = 5,         // alpha tanh(g / alpha) s(g) * beta tanh(u / beta); beta 0 passes u through
    MOE_ACTIVATION_SILU = 32,        // from here on not gated: x s(x)
    MOE_ACTIVATION_GELU_ERF = 33,
    MOE_ACTIVATION_GELU_TANH = 34,
    MOE_ACTIVATION_RELU = 35,
    MOE_ACTIVATION_RELU2 = 36,       // max(x, 0)^2
    MOE_ACTIVATION_RELU2_CLAMP = 37, // (limit tanh(max(x, 0) / limit))^2
    MOE_ACTIVATION_IDENTITY = 38,
    MOE_ACTIVATION__FORCE32 = 0x7fffffff
} moe_activation;

// Numbers 0-9 mean what FlashInfer 0.6.18 means by them, and keep that meaning for ever. From 100 on they are this
// library's. Numbers of other stacks and versions go through moe_routing_from_foreign().
typedef enum moe_routing_method {
    MOE_ROUTING_UNSPECIFIED = -1,     // always an error
    MOE_ROUTING_DEFAULT = 0,          // softmax, top-k
    MOE_ROUTING_RENORMALIZE = 1,      // top-k, softmax over the chosen
    MOE_ROUTING_DEEPSEEK_V3 = 2,      // sigmoid, + bias, groups by the sum of their top 2, / sum, x scale
    MOE_ROUTING_LLAMA4 = 3,           // top-1, sigmoid; the weight multiplies the expert's input
    MOE_ROUTING_RENORMALIZE_NAIVE = 4, // softmax, top-k, / sum
    MOE_ROUTING_TOPK = 5,             // top-k, raw logits as weights
    MOE_ROUTING_SIGMOID_RENORM = 6,   // sigmoid, top-k, / sum
    MOE_ROUTING_MINIMAX2 = 7,         // sigmoid, + bias, / (sum + 1e-20), x scale
    MOE_ROUTING_SIGMOID = 8,          // sigmoid, top-k
    MOE_ROUTING_TOPK_SIGMOID = 9,     // top-k on logits, sigmoid
    MOE_ROUTING_DEEPSEEK_V4 = 100,    // sqrt(softplus), + bias, / (sum + 1e-20), x scale
    MOE_ROUTING_CUSTOM = 101,         // the descriptor is filled by hand: the preset only sets its members to 0
    MOE_ROUTING_SIMULATED = 102,      // ids from a seeded generator, weights 1/k
    MOE_ROUTING_DEEPSEEK_V2 = 103,    // softmax, groups by maximum, others 0, x scale
    MOE_ROUTING_DEEPSEEK_V41 = 104,   // V4 with a second bias for image tokens
    MOE_ROUTING_ERNIE45 = 105,        // softmax, + bias, / max(sum, 1e-12)
    MOE_ROUTING_LONGCAT = 106,        // softmax, + bias, x scale; identity experts behind the routed ones
    MOE_ROUTING_GEMMA4 = 107,         // softmax, / sum, x per-expert scale
    MOE_ROUTING_PHIMOE = 108,         // SparseMixer: two masked softmaxes
    MOE_ROUTING_MISTRAL4 = 109,       // softmax, groups by the sum of their top 2, others 0, / (sum + 1e-20), x scale
    MOE_ROUTING_INKLING = 110,        // sigmoid, + bias; two always-on experts inside the renormalisation
    MOE_ROUTING_KOLIBRI = 111,        // top-k of logit + bias, sigmoid of the logit
    MOE_ROUTING__FORCE32 = 0x7fffffff
} moe_routing_method;

typedef enum moe_score {
    MOE_SCORE_UNSET = 0,
    MOE_SCORE_RAW = 1,          // the logit itself
    MOE_SCORE_SOFTMAX = 2,
    MOE_SCORE_SIGMOID = 3,
    MOE_SCORE_SQRT_SOFTPLUS = 4, // sqrt(log(1 + exp(logit)))
    MOE_SCORE__FORCE32 = 0x7fffffff
} moe_score;

typedef enum moe_score_order {
    MOE_SCORE_ORDER_UNSET = 0,
    MOE_SCORE_BEFORE_TOPK = 1, // score all experts, then choose
    MOE_SCORE_AFTER_TOPK = 2,  // choose on logits, then score the chosen (softmax over the chosen only)
    MOE_SCORE_ORDER__FORCE32 = 0x7fffffff
} moe_score_order;

typedef enum moe_select {
    MOE_SELECT_AUTO = 0,  // score where scores come before top-k, else logit
    MOE_SELECT_SCORE = 1, // rank by score + bias
    MOE_SELECT_LOGIT = 2, // rank by logit + bias
    MOE_SELECT__FORCE32 = 0x7fffffff
} moe_select;

typedef enum moe_group_rule {
    MOE_GROUP_NONE = 0,     // legal only without groups
    MOE_GROUP_MAX = 1,      // a group ranks by its best key
    MOE_GROUP_TOP2_SUM = 2, // by the sum of its two best keys; groups need two experts
    MOE_GROUP_EACH = 3,     // no ranking: top_k / groups experts in every group, slots in group order
    MOE_GROUP_RULE__FORCE32 = 0x7fffffff
} moe_group_rule;

typedef enum moe_excluded { // the key of an expert outside the kept groups
    MOE_EXCLUDED_NEG_INF = 0,
    MOE_EXCLUDED_ZERO = 1,  // may still be chosen when kept keys are negative
    MOE_EXCLUDED__FORCE32 = 0x7fffffff
} moe_excluded;

typedef enum moe_renormalize {
    MOE_RENORMALIZE_OFF = 0,
    MOE_RENORMALIZE_SUM = 1,       // w / (sum + epsilon)
    MOE_RENORMALIZE_CLAMP_MIN = 2, // w / max(sum, epsilon)
    MOE_RENORMALIZE__FORCE32 = 0x7fffffff
} moe_renormalize;

typedef enum moe_zero_sum { // when the sum of the chosen scores is not above 0
    MOE_ZERO_SUM_DIVIDE = 0, // divide all the same; a weight of 0 stays 0
    MOE_ZERO_SUM_ONE = 1,    // take 1 for the divisor
    MOE_ZERO_SUM__FORCE32 = 0x7fffffff
} moe_zero_sum;

typedef enum moe_scale_on {
    MOE_SCALE_ON_WEIGHTS = 0,
    MOE_SCALE_ON_OUTPUT = 1, // the routed sum is multiplied, before shared experts are added; out_weights are unscaled
    MOE_SCALE_ON__FORCE32 = 0x7fffffff
} moe_scale_on;

typedef enum moe_weight_on {
    MOE_WEIGHT_ON_OUTPUT = 0,
    MOE_WEIGHT_ON_INPUT = 1, // the expert's input row is multiplied; its output is added unweighted
    MOE_WEIGHT_ON__FORCE32 = 0x7fffffff
} moe_weight_on;

typedef enum moe_special { // what a special expert adds for weight w and token x
    MOE_SPECIAL_NONE = 0,
    MOE_SPECIAL_ZERO = 1,     // nothing; its weight still counts in the renormalisation
    MOE_SPECIAL_IDENTITY = 2, // w x
    MOE_SPECIAL_SKIP = 3,     // nothing, and its slot is reported as id -1 with weight 0
    MOE_SPECIAL_CONSTANT = 4, // w c, c [H] set as MOE_TENSOR_CONSTANT
    MOE_SPECIAL__FORCE32 = 0x7fffffff
} moe_special;

typedef enum moe_simulate {
    MOE_SIMULATE_OFF = 0,
    MOE_SIMULATE_UNIFORM = 1,
    MOE_SIMULATE_ZIPF = 2,       // expert e drawn with weight 1 / (e + 1)
    MOE_SIMULATE_ONE_HOT = 3,    // every token takes experts 0..k-1
    MOE_SIMULATE_ROUND_ROBIN = 4, // slot s takes expert s mod E
    MOE_SIMULATE__FORCE32 = 0x7fffffff
} moe_simulate;

typedef enum moe_backend {
    MOE_BACKEND_AUTO = 0, // the best one that this machine runs
    MOE_BACKEND_CPU = 1,
    MOE_BACKEND_CUDA = 2,
    MOE_BACKEND__FORCE32 = 0x7fffffff
} moe_backend;

typedef enum moe_memory {
    MOE_MEMORY_HOST = 0,
    MOE_MEMORY_DEVICE = 1,
    MOE_MEMORY__FORCE32 = 0x7fffffff
} moe_memory;

// ---- descriptors ----------------------------------------------------------------------------------------------------

// Which experts a token uses, and with what weight. Fill it by hand, with moe_routing_preset(),
// moe_routing_from_fields() or moe_layer_from_config(). Order of steps, all in fp32:
//   logit = softcap(logit * multiplier) -> score -> key = (score or logit) + bias -> groups -> top_k by key, ties to
//   the lower id -> weight = unbiased score -> renormalise -> x scale -> x per-expert scale.
// Router width = num_experts + special_experts + (extra_slots if extra_scored), logits in that order. Ids: routed
// 0..E-1, special E..E+S-1, extra E+S..E+S+X-1; a token has top_k + extra_slots slots, the extra ones last.
typedef struct moe_routing_desc {
    uint32_t struct_size;
    int32_t score;             // moe_score, required
    int32_t score_order;       // moe_score_order, required
    int32_t select;            // moe_select
    int32_t top_k;             // 1..MOE_MAX_TOP_K, at most E + S; required
    float logit_multiplier;    // 0 means 1
    float logit_softcap;       // c tanh(logit / c); 0: none
    int32_t bias_rows;         // 0: no selection bias; 1: one [E+S]; n: [n, E+S] with a row index per token
    int32_t groups;            // 0 or 1: none; else E must divide by it
    int32_t groups_kept;       // 1..groups; 0 only when there are no groups, or with MOE_GROUP_EACH
    int32_t group_rule;        // moe_group_rule
    int32_t group_excluded;    // moe_excluded
    int32_t renormalize;       // moe_renormalize
    float renormalize_epsilon; // added to the sum, or its lower clamp; 0 is legal
    int32_t zero_sum;          // moe_zero_sum
    float scale;               // multiplies every weight, or the routed sum, once; 0 means 1
    int32_t scale_on;          // moe_scale_on
    int32_t per_expert_scale;  // 1: MOE_TENSOR_PER_EXPERT_SCALE [E+S] multiplies each weight last
    int32_t weight_on;         // moe_weight_on
    int32_t forced_rows;       // 0: none; else rows of MOE_TENSOR_FORCED_IDS [forced_rows, top_k]: ids come from the
                               // row of the token's id, weights from the scores as ever
    int32_t marked_token_lo;   // tokens with an id in [lo, hi) leave the forced table, and use bias row 1 where there
    int32_t marked_token_hi;   // are two rows and args.bias_index is NULL (image tokens); both 0: none
    int32_t special_experts;   // S: experts without matrices behind the routed ones
    int32_t special_kind;      // moe_special, required when special_experts > 0
    int32_t extra_slots;       // X: experts that every token uses, 0..MOE_MAX_EXTRA_SLOTS
    int32_t extra_scored;      // 1: the router scores them, inside the renormalisation (scores all in one when
                               // softmax); 0: their weight is extra_weight
    float extra_weight;        // 0 means 1; ignored when extra_scored
    float sparse_mixer;        // 0: off; else PhiMoE's jitter epsilon: k masked softmaxes, one expert each
    int32_t global_scale;      // 1: MOE_TENSOR_ROUTER_GLOBAL_SCALE [1] multiplies `scale` (Inkling)
    int32_t simulate;          // moe_simulate: ignores logits
    uint32_t simulate_seed;
    uint32_t reserved[5];
} moe_routing_desc;

// How expert outputs are made from the two halves. alpha, beta, limit: see moe_activation; per-expert tables
// (MOE_TENSOR_ALPHA, _BETA, _LIMIT) replace them where set.
typedef struct moe_activation_desc {
    int32_t kind;  // moe_activation, required
    float alpha;   // 0 means 1 (MOE_ACTIVATION_SITU: 0 means 4)
    float beta;
    float limit;   // 0: no clamp
    int32_t per_expert; // 1: MOE_TENSOR_ALPHA, _BETA, _LIMIT [E] replace the three
    uint32_t reserved[3];
} moe_activation_desc;

// The router's own projection, moe_router_logits(): logits = W (norm(x) * input_scale * multiplier) + bias.
typedef struct moe_router_desc {
    int32_t rms_norm;      // 1: x / sqrt(mean(x^2) + norm_epsilon), no weight
    float norm_epsilon;
    int32_t input_scale;   // 1: MOE_TENSOR_ROUTER_INPUT_SCALE [H]
    float input_multiplier; // 0 means 1
    int32_t bias;          // 1: MOE_TENSOR_ROUTER_BIAS
    int32_t input_size;    // 0: hidden_size; else the router's own input width (latent experts)
    uint32_t reserved[2];
} moe_router_desc;

// Experts that every token passes, outside the routing, beside the routed ones.
typedef struct moe_shared_desc {
    int32_t count;             // 0: none. Several are stored as one block of count * intermediate_size
    int32_t intermediate_size; // of one; required when count > 0
    int32_t gate;              // 1: multiplied by sigmoid(x . MOE_TENSOR_SHARED_TOKEN_GATE [H]) per token
    float scale;               // multiplies their sum; 0 means 1
    moe_activation_desc activation; // kind 0: that of the routed experts, with its parameters
    uint32_t reserved[4];
} moe_shared_desc;

// This rank's part. Expert parallelism: routing always runs over all experts; the output is the partial sum of the
// local ones. Tensor parallelism: a slice of I; the output is the partial sum of that slice (GEMM2's bias is added by
// tp_rank 0 alone).
typedef struct moe_parallel_desc {
    int32_t local_experts;       // 0: all; routed experts only
    int32_t expert_offset;       // first local expert, when expert_map is NULL
    const int32_t *expert_map;   // [num_experts] global -> local index 0..local_experts-1, or -1; each local index once
    int32_t omit_common;         // 1: leave out shared, always-on and special experts: set on all expert-parallel ranks
                                 // but one
    int32_t tp_size;             // 0 means 1
    int32_t tp_rank;
    uint32_t reserved[3];
} moe_parallel_desc;

typedef enum moe_half_order { // how gate and up rows of a fused tensor lie
    MOE_HALVES_UNSET = 0,
    MOE_HALVES_SEPARATE = 1,    // gate and up are tensors of their own
    MOE_HALVES_GATE_UP = 2,     // I gate rows, then I up rows ("w13")
    MOE_HALVES_UP_GATE = 3,     // ("w31": TRTLLM-Gen, CUTLASS)
    MOE_HALVES_INTERLEAVED = 4, // gate 0, up 0, gate 1, up 1, ... (gpt-oss)
    MOE_HALVES_INTERLEAVED_UP_GATE = 5,
    MOE_HALVES__FORCE32 = 0x7fffffff
} moe_half_order;

typedef enum moe_weight_layout {
    MOE_LAYOUT_UNSET = 0,
    MOE_LAYOUT_MAJOR_K = 1,       // [out, in]: output-major, as nn.Linear stores it
    MOE_LAYOUT_MAJOR_MN = 2,      // [in, out]: input-major (Llama 4, gpt-oss bf16, DBRX w2)
    MOE_LAYOUT_BLOCK_MAJOR_K = 3, // [in / b, out, b], b = 128 bytes of elements (TRTLLM-Gen)
    MOE_LAYOUT__FORCE32 = 0x7fffffff
} moe_weight_layout;

typedef enum moe_row_order {
    MOE_ROWS_NATURAL = 0,
    MOE_ROWS_SHUFFLED_128 = 1, // TRTLLM-Gen shuffle_matrix_a, epilogue tile 128 (blocks of 32 rows)
    MOE_ROWS_SHUFFLED_64 = 2,  // epilogue tile 64 (blocks of 16 rows)
    MOE_ROWS__FORCE32 = 0x7fffffff
} moe_row_order;

// How a checkpoint stores the layer, as far as names and config tell. Filled by moe_layer_from_config(); engines with
// a loader of their own copy it into moe_tensor. 0 where the files decide (shapes).
typedef struct moe_source_desc {
    int32_t halves; // moe_half_order
    int32_t layout; // moe_weight_layout
    int32_t shared_halves;
    uint32_t reserved[5];
} moe_source_desc;

// One layer. Required: hidden_size, intermediate_size, num_experts, format, activation.kind, routing.score,
// routing.score_order, routing.top_k.
typedef struct moe_layer_desc {
    uint32_t struct_size;
    int32_t layer_index;       // in the model, as tensor names count it; for checkpoints and saved weights only
    int32_t hidden_size;       // H as the experts see it (the latent size where there is one)
    int32_t intermediate_size; // I of one half, of the whole expert (not of a tensor-parallel slice)
    int32_t num_experts;       // E routed experts in all, not only the local ones
    int32_t format;            // moe_format, required
    int32_t format_block;      // FP8_BLOCK: 128 (0 means 128), 64 or 32; INT4: 32, 64 or 128
    int32_t scale_dtype;       // dtype of block scales; 0: the format's usual one
    int32_t gemm1_bias;        // 1: experts have MOE_TENSOR_GATE_BIAS and/or _UP_BIAS
    int32_t gemm2_bias;
    int32_t row_norm;          // 1: each GEMM2 row v becomes RMS-normalised v * (1 + w), w = MOE_TENSOR_ROW_NORM [H],
                               // before it is weighted (Muse-Spark)
    float row_norm_epsilon;
    float output_scale;        // multiplies routed + shared; 0 means 1 (Cohere2 "average": 1/2)
    int32_t reserved0;
    moe_activation_desc activation;
    moe_routing_desc routing;
    moe_router_desc router;
    moe_shared_desc shared;
    moe_parallel_desc parallel;
    moe_source_desc source;
    uint32_t reserved[8];
} moe_layer_desc;

// What a tensor is. Shapes are in the layout MOE_LAYOUT_MAJOR_K; a stacked tensor has a leading [E].
typedef enum moe_tensor_role {
    MOE_TENSOR_UNSET = 0,
    MOE_TENSOR_GATE = 1,             // [I, H]; only gated activations
    MOE_TENSOR_UP = 2,               // [I, H]; the only GEMM1 matrix when not gated
    MOE_TENSOR_GATE_UP = 3,          // [2I, H]; `halves` says how
    MOE_TENSOR_DOWN = 4,             // [H, I]
    MOE_TENSOR_GATE_BIAS = 5,        // [I]
    MOE_TENSOR_UP_BIAS = 6,          // [I]
    MOE_TENSOR_GATE_UP_BIAS = 7,     // [2I]
    MOE_TENSOR_DOWN_BIAS = 8,        // [H]
    MOE_TENSOR_SHARED_GATE = 9,      // shared experts, all in one: [count I_shared, H]; or the one that `index` says
    MOE_TENSOR_SHARED_UP = 10,
    MOE_TENSOR_SHARED_GATE_UP = 11,
    MOE_TENSOR_SHARED_DOWN = 12,     // [H, count I_shared]
    MOE_TENSOR_SHARED_TOKEN_GATE = 13, // [H] or [1, H]
    MOE_TENSOR_ROUTER = 14,          // [router width, router input size]
    MOE_TENSOR_ROUTER_BIAS = 15,     // [router width], part of the logits
    MOE_TENSOR_ROUTER_INPUT_SCALE = 16, // [H]
    MOE_TENSOR_ROUTER_GLOBAL_SCALE = 17, // [1]
    MOE_TENSOR_SELECT_BIAS = 18,     // [E + S], or [bias_rows, E + S]; `index` picks one row
    MOE_TENSOR_PER_EXPERT_SCALE = 19, // [E + S]
    MOE_TENSOR_FORCED_IDS = 20,      // [forced_rows, top_k] i32 or i64
    MOE_TENSOR_ALPHA = 21,           // [E]
    MOE_TENSOR_BETA = 22,            // [E]
    MOE_TENSOR_LIMIT = 23,           // [E]
    MOE_TENSOR_ROW_NORM = 24,        // [H]
    MOE_TENSOR_CONSTANT = 25,        // [H] of one expert; a routed expert with it needs no matrices
    MOE_TENSOR_ROLES = 26,           // number of roles
    MOE_TENSOR_ROLE__FORCE32 = 0x7fffffff
} moe_tensor_role;

// What a value of a tensor of `role` is. A quantised matrix is several tensors of one role with different parts.
typedef enum moe_tensor_part {
    MOE_PART_DATA = 0,
    MOE_PART_SCALE = 1,        // per block, row or tensor: multiplies
    MOE_PART_GLOBAL_SCALE = 2, // per tensor: multiplies (ModelOpt weight_scale_2)
    MOE_PART_GLOBAL_SCALE_RECIPROCAL = 3, // divides (compressed-tensors weight_global_scale)
    MOE_PART_INPUT_SCALE = 4,
    MOE_PART_INPUT_SCALE_RECIPROCAL = 5,
    MOE_PART_SHAPE = 6,        // compressed-tensors weight_shape
    MOE_PART__FORCE32 = 0x7fffffff
} moe_tensor_part;

// Writes row `row` of a matrix (dims[1] values), or the whole of a vector (row 0), as fp32 into out. Asked for in
// rising order, and only for what this rank has. Returns 0, or a code of its own to stop with: the call that asked
// fails with MOE_ERROR_DATA and says so. moe_reference_layer() also asks for the MOE_TENSOR_CONSTANT of every expert:
// any code but 0 there means that the expert has matrices.
typedef int32_t (*moe_row_fn)(void *user, int32_t role, int32_t expert, int32_t row, float *out);

// A tensor handed to moe_weights_set_tensor() or found in a checkpoint. `data` is read during the call only.
typedef struct moe_tensor {
    uint32_t struct_size;
    int32_t role;      // moe_tensor_role, required
    int32_t part;      // moe_tensor_part
    int32_t expert;    // global id; -1: not of one expert (stacked [E, ...]; shared, router, tables: 0 is taken too)
    int32_t index;     // MOE_TENSOR_SELECT_BIAS: row; SHARED_...: which of several; -1 or the shape of all: all
    int32_t dtype;     // moe_dtype, required unless rows is set
    int32_t rank;      // 0..4
    int32_t layout;    // moe_weight_layout; 0 means MAJOR_K
    int32_t halves;    // moe_half_order; required for fused roles, else 0
    int32_t row_order; // moe_row_order
    int32_t memory;    // moe_memory
    int32_t reserved0;
    int64_t dims[4];   // as stored: MAJOR_MN has [in, out]
    const void *data;  // contiguous, any alignment
    uint64_t data_bytes;
    moe_row_fn rows;   // instead of data: called for rows 0, 1, ... of each matrix; shape is MAJOR_K, natural order
    void *rows_user;
    const char *name;  // nullable: used in messages
    uint32_t reserved[4];
} moe_tensor;

// ---- hooks and context ----------------------------------------------------------------------------------------------

// alloc returns memory aligned to `align` (a power of two), or NULL; free gets the size back. Both are called from any
// thread that calls the library, never from inside moe_execute().
typedef struct moe_allocator {
    void *(*alloc)(void *user, size_t size, size_t align);
    void (*free)(void *user, void *ptr, size_t size);
    void *user;
} moe_allocator;

typedef enum moe_log_level {
    MOE_LOG_ERROR = 1,
    MOE_LOG_WARNING = 2,
    MOE_LOG_INFO = 3,
    MOE_LOG__FORCE32 = 0x7fffffff
} moe_log_level;

// Runs task(arg, i) once for every i in 0..tasks-1, on any threads, and returns when all are done.
typedef void (*moe_parallel_for_fn)(void *user, int32_t tasks, void (*task)(void *arg, int32_t index), void *arg);

typedef enum moe_cache_mode {
    MOE_CACHE_DEFAULT = 0,    // MOE_CACHE of the environment (rw, ro, off), else READ_WRITE
    MOE_CACHE_READ_WRITE = 1,
    MOE_CACHE_READ_ONLY = 2,
    MOE_CACHE_OFF = 3,        // kernels live as long as their context
    MOE_CACHE_MODE__FORCE32 = 0x7fffffff
} moe_cache_mode;

// A compiled kernel, as moe_jit_export() writes them.
typedef struct moe_jit_image {
    const char *key; // 64 hex digits: of the kernels' text, the options and the chip
    const void *data;
    uint64_t bytes;
} moe_jit_image;

// Where kernels come from; manual, CUDA and CACHE. Paths of libraries are absolute.
typedef struct moe_jit_desc {
    const char *cache_dir;       // NULL: MOE_CACHE_DIR, else the user's cache folder
    const char *seed_dir;        // a second folder of the same kind, never written; nullable
    const char *cuda_library;    // NULL: MOE_CUDA_LIB, else where the system looks; given: no other is tried
    const char *nvrtc_library;   // NULL: MOE_NVRTC_LIB, else the usual places; given: no other is tried
    const moe_jit_image *images; // looked at before the cache; kept: must outlive the context
    int32_t num_images;
    int32_t cache_mode;          // moe_cache_mode
    uint32_t reserved[4];
} moe_jit_desc;

typedef struct moe_context_desc {
    uint32_t struct_size;
    int32_t backend;              // moe_backend
    int32_t device;               // ordinal; the CPU has device 0
    // Threads that one call may use, the caller's among them: on the CPU for all work, with CUDA for compiling kernels.
    // 0: one per core, with CUDA 8 at most.
    int32_t threads;
    void *cuda_context;           // CUcontext of the caller's; NULL: the device's primary one
    moe_allocator allocator;      // both functions or none; none: malloc and free
    moe_allocator device_allocator; // CUDA: memory of the device; both functions or none; none: cuMemAlloc, cuMemFree
    moe_jit_desc jit;             // CUDA
    // Nullable: told, one line at a time, what creating and sealing decided; from any thread that calls the library,
    // never from moe_execute(). `text` is valid during the call.
    void (*log)(void *user, int32_t level, const char *text);
    void *log_user;
    moe_parallel_for_fn parallel_for; // nullable: then the context keeps a pool of threads - 1
    void *parallel_user;
    const char *isa;              // CPU: "scalar", "avx2", "avx512", "neon" to force a kernel set; NULL: best
    const void *reserved[6];
} moe_context_desc;

typedef struct moe_context_info {
    uint32_t struct_size;
    int32_t backend;   // moe_backend, never AUTO
    int32_t device;
    int32_t threads;
    char name[64];     // of the processor or GPU
    char isa[16];      // kernel set in use
    char chip[16];     // CUDA: what kernels are compiled for, "sm_90a"
    int32_t driver_version; // CUDA: 12040 for 12.4
    int32_t nvrtc_version;  // CUDA: of the NVRTC that was opened; 0: none was needed so far
    char cache_dir[512];    // CUDA: "": kernels stay in memory
    uint32_t reserved[8];
} moe_context_info;

typedef struct moe_context moe_context;       // one device; any thread
typedef struct moe_checkpoint moe_checkpoint; // an open folder or file; immutable, any thread
typedef struct moe_weights moe_weights;       // one layer's tensors
typedef struct moe_plan moe_plan;             // everything decided for one layer shape; immutable, any thread

MOE_API int32_t moe_version(void);                     // MOE_VERSION of the implementation
MOE_API const char *moe_result_string(int32_t result); // "MOE_OK", ...; never NULL
MOE_API const char *moe_dtype_string(int32_t dtype);   // "bf16", ...; "?" for what is none
MOE_API const char *moe_format_string(int32_t format);
MOE_API const char *moe_activation_string(int32_t activation);
MOE_API const char *moe_routing_method_string(int32_t method);
MOE_API const char *moe_role_string(int32_t role);
MOE_API int32_t moe_dtype_bits(int32_t dtype);         // 0 for what is none

// desc NULL: all defaults. On failure *out is NULL.
MOE_API int32_t moe_context_create(const moe_context_desc *desc, moe_context **out, moe_error *err);
// After everything made with it. NULL is legal, here and in every destroy.
MOE_API void moe_context_destroy(moe_context *ctx);
MOE_API int32_t moe_context_get_info(const moe_context *ctx, moe_context_info *info, moe_error *err);

// ---- compiling ahead ------------------------------------------------------------------------------------------------

typedef struct moe_jit_progress {
    int32_t done;   // kernels
    int32_t total;
    int32_t cached; // 1: it lay in the cache folder already
    int32_t reserved;
    uint64_t bytes; // of its image
    const char *name;
    const char *chip;
} moe_jit_progress;

// Kernels of plans for these layers on these chips, of which none need be here: no driver is opened.
typedef struct moe_precompile_desc {
    uint32_t struct_size;
    int32_t num_chips;
    const char *const *chips;     // "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100f", "sm_120f"
    const struct moe_layer_desc *layers; // as for moe_plan_create()
    int32_t num_layers;
    int32_t threads;              // that compile; 0: one per core
    const struct moe_plan_desc *plan; // nullable: defaults
    moe_jit_desc jit;             // cache_dir, nvrtc_library; the driver, images and the seed folder are not looked at
    moe_allocator allocator;      // as in moe_context_desc
    void (*log)(void *user, int32_t level, const char *text); // nullable
    void *log_user;
    void (*progress)(void *user, const moe_jit_progress *progress); // nullable: after each kernel; the caller's thread
    void *progress_user;
    uint32_t reserved[8];
} moe_precompile_desc;

// Fills the cache folder. Kernels that lie there already are not compiled again.
MOE_API int32_t moe_jit_precompile(const moe_precompile_desc *desc, moe_error *err);
// Writes a C file with an array `name` of moe_jit_image and `name`_count, for moe_jit_desc.images. `chips` may also
// hold "compute_80" (PTX for 8.x) and "compute_90" (for 9.0 and later), which the driver compiles when it loads them.
MOE_API int32_t moe_jit_export(const moe_precompile_desc *desc, const char *path, const char *name, moe_error *err);
// Removes entries, those written first, until at most max_bytes are left; 0: all. cache_dir NULL: the default one. Safe
// while others use the folder.
MOE_API int32_t moe_cache_trim(const char *cache_dir, uint64_t max_bytes, moe_error *err);

// ---- routing and layer: inference, validation -----------------------------------------------------------------------

// Fills *out for a named method: top_k and every size are left 0 except where the method fixes them; the caller sets
// them, and `scale`, groups, bias_rows where the model has its own. Pure.
MOE_API int32_t moe_routing_preset(int32_t method, moe_routing_desc *out, moe_error *err);

// The named method that a descriptor is, or MOE_ROUTING_CUSTOM when no name says all of it. Pure.
MOE_API int32_t moe_routing_method_of(const moe_routing_desc *routing);

// What a model file says about its router, in the words of its config.
typedef struct moe_routing_fields {
    uint32_t struct_size;
    int32_t num_experts;         // required
    int32_t top_k;               // required
    int32_t renormalize;         // norm_topk_prob
    int32_t groups;              // n_group; 0 or 1: none
    int32_t groups_kept;         // topk_group
    int32_t has_bias;            // e_score_correction_bias and the like
    int32_t weight_on_input;     // apply_router_weight_on_input
    float scale;                 // routed_scaling_factor; 0 means 1
    float epsilon;               // of the renormalisation; 0 is legal
    const char *score;           // "softmax", "sigmoid", "sqrtsoftplus"; required
    uint32_t reserved[4];
} moe_routing_fields;

// Fields -> descriptor, or a reason why no routing is known for that combination. Pure.
MOE_API int32_t moe_routing_from_fields(const moe_routing_fields *fields, moe_routing_desc *out, moe_error *err);

typedef enum moe_stack {
    MOE_STACK_UNSET = 0,
    MOE_STACK_FLASHINFER = 1,
    MOE_STACK_VLLM = 2,
    MOE_STACK_SGLANG = 3,
    MOE_STACK__FORCE32 = 0x7fffffff
} moe_stack;

// The integer that `stack` of version `version` ("0.6.18", "0.7.2.post1") uses for a routing method or an activation
// -> ours. Refused where that version has no such number, or where it means "unspecified". Pure.
MOE_API int32_t moe_routing_from_foreign(int32_t stack, const char *version, int32_t value, int32_t *out_method,
                                         moe_error *err);
MOE_API int32_t moe_activation_from_foreign(int32_t stack, const char *version, int32_t value,
                                            moe_activation_desc *out, moe_error *err);

// An activation by the name that config files use ("silu", "gelu_pytorch_tanh", "relu2", "swigluoai", ...); plain
// "gelu" is erf. An unknown name is refused with the list of legal ones. Pure.
MOE_API int32_t moe_activation_from_name(const char *name, int32_t gated, moe_activation_desc *out, moe_error *err);
MOE_API int32_t moe_activation_is_gated(int32_t activation); // 1, 0; -1 for what is none

// Validates, and fills defaults in: afterwards no 0 stands for another value. Every library call does this to its own
// copy, so calling it is optional. Pure.
MOE_API int32_t moe_layer_resolve(moe_layer_desc *layer, moe_error *err);

#ifndef MOE_NO_CONFIG
// Layer `layer_index` of a model from the text of its config.json (need not be terminated); quant_json is the text of
// hf_quant_config.json or NULL. *out is resolved. MOE_ERROR_MISSING if that layer is dense or absent, and for a key
// that is needed. Expert biases, extra tensors and the orientation of fused ones follow the model type's released
// files. Pure.
MOE_API int32_t moe_layer_from_config(const char *json, size_t json_bytes, const char *quant_json, size_t quant_bytes,
                                      int32_t layer_index, moe_layer_desc *out, moe_error *err);

// One thing that was inferred, and from which key: { "top_k", "8", "num_experts_per_tok" }.
typedef struct moe_fact {
    char name[48];   // member of moe_layer_desc
    char value[64];
    char source[80]; // key in config.json with its nesting; "default of qwen3_moe"; "tensor shape"
} moe_fact;

// The facts behind moe_layer_from_config(), in a fixed order; writes at most `capacity` and returns how many there are
// in *count. Pure.
MOE_API int32_t moe_facts_from_config(const char *json, size_t json_bytes, const char *quant_json, size_t quant_bytes,
                                      int32_t layer_index, moe_fact *facts, int32_t capacity, int32_t *count,
                                      moe_error *err);

// A checkpoint tensor's name -> what it is. MOE_ERROR_MISSING: no tensor of a MoE layer by any known naming scheme.
typedef struct moe_tensor_name {
    int32_t layer;  // as the name counts
    int32_t expert; // -1: stacked or not of an expert
    int32_t role;   // moe_tensor_role
    int32_t part;   // moe_tensor_part
    int32_t index;  // MOE_TENSOR_SELECT_BIAS: row, else -1
    uint32_t reserved[3];
} moe_tensor_name;
MOE_API int32_t moe_tensor_from_name(const char *name, moe_tensor_name *out, moe_error *err);
#endif

// ---- checkpoints ----------------------------------------------------------------------------------------------------

#ifndef MOE_NO_CHECKPOINT
typedef enum moe_checkpoint_flags {
    MOE_CHECKPOINT_READ = 1, // read files into memory instead of mapping them: safe for files that may change
    MOE_CHECKPOINT_FLAGS__FORCE32 = 0x7fffffff
} moe_checkpoint_flags;

typedef struct moe_checkpoint_desc {
    uint32_t struct_size;
    uint32_t flags;          // moe_checkpoint_flags
    moe_allocator allocator; // as in moe_context_desc
    uint32_t reserved[4];
} moe_checkpoint_desc;

typedef struct moe_checkpoint_tensor {
    const char *name; // valid until close
    const char *file; // name of the shard
    int32_t dtype;    // MOE_DTYPE_UNSET for types that safetensors knows and this library does not
    int32_t rank;     // 0..8
    int64_t dims[8];
    const void *data; // valid until close; aligned to 1 byte only
    uint64_t data_bytes;
} moe_checkpoint_tensor;

// Opens a folder with config.json and model.safetensors or model.safetensors.index.json with its shards, or one
// .safetensors file (no config then). Every header is checked here: bounds, overlaps, holes, sizes, doubled names.
// path is UTF-8. desc NULL: defaults. On failure *out is NULL.
MOE_API int32_t moe_checkpoint_open(const char *path, const moe_checkpoint_desc *desc, moe_checkpoint **out,
                                    moe_error *err);
MOE_API void moe_checkpoint_close(moe_checkpoint *ckpt);
MOE_API int32_t moe_checkpoint_count(const moe_checkpoint *ckpt); // tensors; 0 for NULL
MOE_API int32_t moe_checkpoint_at(const moe_checkpoint *ckpt, int32_t index, moe_checkpoint_tensor *out,
                                  moe_error *err);
MOE_API int32_t moe_checkpoint_find(const moe_checkpoint *ckpt, const char *name, moe_checkpoint_tensor *out,
                                    moe_error *err);
// Text of config.json ("" if there is none), valid until close.
MOE_API const char *moe_checkpoint_config(const moe_checkpoint *ckpt, size_t *bytes);
// Indices of the MoE layers whose tensors are here, ascending; at most `capacity` are written, *count has all.
MOE_API int32_t moe_checkpoint_layers(const moe_checkpoint *ckpt, int32_t *indices, int32_t capacity, int32_t *count,
                                      moe_error *err);
// As moe_layer_from_config(), then settled by the tensors' dtypes and shapes (format, orientation).
MOE_API int32_t moe_checkpoint_layer(const moe_checkpoint *ckpt, int32_t layer_index, moe_layer_desc *out,
                                     moe_error *err);
MOE_API int32_t moe_checkpoint_facts(const moe_checkpoint *ckpt, int32_t layer_index, moe_fact *facts, int32_t capacity,
                                     int32_t *count, moe_error *err);
#endif

// ---- weights --------------------------------------------------------------------------------------------------------

typedef struct moe_weights_desc {
    uint32_t struct_size;
    int32_t memory_kind;   // moe_memory of `memory`
    void *memory;          // NULL: the library allocates; else the caller's, 256-aligned, kept until destroy
    uint64_t memory_bytes; // at least moe_plan_info.weight_bytes
    uint32_t reserved[8];
} moe_weights_desc;

typedef struct moe_weights_info {
    uint32_t struct_size;
    int32_t sealed;
    uint32_t layout_id;       // of the packed layout: a plan reads one
    int32_t local_experts;
    uint64_t weight_bytes;    // packed
    uint64_t expert_bytes;    // of one routed expert's matrices and biases
    int32_t tensors_set;      // a fused tensor counts as two
    int32_t tensors_missing;  // what seal would still ask for
    uint32_t reserved[8];
} moe_weights_info;

// Empty weights of a layer. Their memory has its final size from here on; setting tensors needs at most one expert
// more.
MOE_API int32_t moe_weights_create(moe_context *ctx, const moe_layer_desc *layer, const moe_weights_desc *desc,
                                   moe_weights **out, moe_error *err);
// Packs one tensor; the source may be freed on return. Experts of other ranks are accepted and ignored, tensor-parallel
// slices are cut here. Several threads may call it for different experts; calls for one expert, or for tensors that are
// not of an expert, one at a time. MOE_ERROR_STATE when sealed or set before, MOE_ERROR_ARGUMENT for a wrong shape.
MOE_API int32_t moe_weights_set_tensor(moe_weights *weights, const moe_tensor *tensor, moe_error *err);
// Checks that nothing is missing (MOE_ERROR_MISSING names the first, and counts) and makes the weights immutable.
MOE_API int32_t moe_weights_seal(moe_weights *weights, moe_error *err);
// Gives a sealed local expert new matrices, in stream order: work enqueued before still reads the old ones, later work
// the new ones. On the CPU no moe_execute() on these weights may run meanwhile. `tensors`: all of the expert's tensors.
MOE_API int32_t moe_weights_replace_expert(moe_weights *weights, int32_t expert, const moe_tensor *tensors,
                                           int32_t count, void *stream, moe_error *err);
// Row `row` of a matrix (router, selection bias and forced ids are some too), or the whole of a vector, back as fp32,
// natural order, this rank's slice. For tests, the reference and export. Any thread.
MOE_API int32_t moe_weights_read_row(const moe_weights *weights, int32_t role, int32_t expert, int32_t row, float *out,
                                     moe_error *err);
MOE_API int32_t moe_weights_get_info(const moe_weights *weights, moe_weights_info *info, moe_error *err);
MOE_API void moe_weights_destroy(moe_weights *weights); // after the last work that uses them has finished
#ifndef MOE_NO_FILES
// Sealed weights to a file (temporary name, then rename), and back: mapped where the back end can read mapped memory.
// The file carries layout id, layer and checksums of header and data; load reads it through once to check them. A
// foreign or damaged file is MOE_ERROR_FORMAT, one of another layer MOE_ERROR_ARGUMENT with the member that differs.
MOE_API int32_t moe_weights_save(const moe_weights *weights, const char *path, moe_error *err);
MOE_API int32_t moe_weights_load(moe_context *ctx, const moe_layer_desc *layer, const char *path, moe_weights **out,
                                 moe_error *err);
#endif
#ifndef MOE_NO_CHECKPOINT
// create + every tensor of layer->layer_index + seal. Missing tensors are MOE_ERROR_MISSING, doubled and misshapen ones
// MOE_ERROR_FORMAT, those in the layer's modules that are not understood MOE_ERROR_UNSUPPORTED: all by name and file.
MOE_API int32_t moe_weights_from_checkpoint(moe_context *ctx, const moe_checkpoint *ckpt, const moe_layer_desc *layer,
                                            moe_weights **out, moe_error *err);
#endif

// ---- plans and execution --------------------------------------------------------------------------------------------

typedef enum moe_plan_flags {
    MOE_PLAN_BATCH_INVARIANT = 1, // a token's output does not depend on the other tokens of the batch
    MOE_PLAN_FLAGS__FORCE32 = 0x7fffffff
} moe_plan_flags;

typedef struct moe_plan_desc {
    uint32_t struct_size;
    uint32_t flags;             // moe_plan_flags
    int32_t max_tokens;         // 0: 8192; num_tokens of a call is at most this
    int32_t max_rows;           // MASKED and SORTED input: rows at most; 0: max_tokens * slots
    int32_t x_dtype;            // 0: the format's (bf16, f16, f32); else BF16, F16, F32
    int32_t logits_dtype;       // 0: F32; else BF16, F16, F32
    int32_t ids_dtype;          // 0: I32; else I64; of `ids` and `token_ids`
    int32_t weights_dtype;      // 0: F32; else BF16, F16; of `weights` given by the caller
    int32_t out_dtype;          // 0: as x
    int32_t intermediate_dtype; // 0: the format's activation type; F32: not rounded (CPU)
    uint32_t reserved[8];
} moe_plan_desc;

typedef struct moe_plan_candidate {
    char name[48];    // of the kernel configuration
    int32_t chosen;
    int32_t reserved;
    char reason[104]; // why not, "" when chosen
} moe_plan_candidate;

typedef struct moe_plan_info {
    uint32_t struct_size;
    uint32_t layout_id;       // packed layout of the weights that this plan reads
    uint64_t weight_bytes;
    uint64_t workspace_bytes; // for max_tokens
    int32_t slots;            // per token: top_k + extra_slots
    int32_t router_width;     // columns of `logits`
    int32_t local_experts;    // with matrices here: local routed ones, then the always-on ones
    int32_t num_candidates;
    moe_plan_candidate candidates[8];
    uint32_t reserved[8];
} moe_plan_info;

// What moe_plan_create would decide; makes and compiles nothing. plan_desc NULL: defaults.
MOE_API int32_t moe_plan_query(const moe_context *ctx, const moe_layer_desc *layer, const moe_plan_desc *desc,
                               moe_plan_info *info, moe_error *err);
// One plan serves every layer of the same shape: weights are an argument of execute.
MOE_API int32_t moe_plan_create(moe_context *ctx, const moe_layer_desc *layer, const moe_plan_desc *desc,
                                moe_plan **out, moe_error *err);
MOE_API int32_t moe_plan_get_info(const moe_plan *plan, moe_plan_info *info, moe_error *err);
MOE_API void moe_plan_destroy(moe_plan *plan); // after the last work that uses it has finished

typedef enum moe_input_mode {
    MOE_INPUT_UNSET = 0,
    MOE_INPUT_LOGITS = 1, // logits [T, router width]: the layer routes
    MOE_INPUT_IDS = 2,    // ids [T, slots], weights [T, slots]
    MOE_INPUT_PACKED = 3, // ids [T, slots] int32: (id << 16) | bf16 bits of the weight
    MOE_INPUT_MASKED = 4, // x [local_experts, rows_per_expert, H], counts [local_experts]: rows in, rows out
    MOE_INPUT_SORTED = 5, // x [rows, H] sorted by local expert, offsets [local_experts + 1]: rows in, rows out
    MOE_INPUT_MODE__FORCE32 = 0x7fffffff
} moe_input_mode;

typedef enum moe_execute_flags {
    MOE_EXECUTE_ACCUMULATE = 1, // out += result instead of out = result; not with ROWS_OUT
    MOE_EXECUTE_ROWS_OUT = 2,   // no finalize: `out` gets unweighted rows [rows, H] in expert order, out_row_of_slot
                                // the map, out_weights the weights; shared experts are left out
    MOE_EXECUTE_PDL_IN = 4,     // CUDA: the caller's preceding kernel triggers programmatic launch completion
    MOE_EXECUTE_ID_E_IS_NONE = 8, // one past the last id (E + S + X) is legal and means "nothing here", as -1 does
    MOE_EXECUTE_FLAGS__FORCE32 = 0x7fffffff
} moe_execute_flags;

enum { MOE_FAULT_NAN_LOGITS = 0, MOE_FAULT_IDS = 1, MOE_FAULT_TOKEN_IDS = 2, MOE_FAULT_COUNTS = 3, MOE_FAULTS = 4 };

// Strides are in elements between rows, 0 = packed. T = num_tokens, K = slots, El = local experts.
typedef struct moe_execute_args {
    uint32_t struct_size;
    uint32_t flags;            // moe_execute_flags
    int32_t input_mode;        // moe_input_mode, required
    int32_t num_tokens;        // T, 0..max_tokens; an upper bound where num_tokens_dev is given
    const int32_t *num_tokens_dev; // nullable: one value, 0..T, read when the work runs; rows past it are not touched
    const void *x;             // [T, H] x_dtype (MASKED, SORTED: see there)
    int64_t x_stride;
    const void *x_scale;       // quantised activations only
    const void *logits;        // [T, router width]
    int64_t logits_stride;
    const void *ids;           // [T, K], global ids, packed rows; -1: nothing here. SORTED, MASKED: unused
    const void *weights;       // [T, K] packed rows. SORTED [rows], MASKED [El, rows_per_expert]: nullable, then 1
    const void *token_ids;     // [T] ids_dtype, for forced ids and marked tokens
    const int32_t *bias_index; // [T] row of the selection bias; nullable
    const int32_t *counts_or_offsets; // MASKED [El]; SORTED [El + 1]
    int32_t rows_per_expert;   // MASKED
    int32_t expected_rows;     // MASKED: a hint of the mean count; 0: none
    const float *shared_gate;  // [T] nullable: multiplies the shared experts' sum instead of the layer's own gate
    void *out;                 // [T, H] out_dtype; rows modes and ROWS_OUT: as many rows as there are
    int64_t out_stride;
    int32_t *out_ids;          // [T, K] nullable
    float *out_weights;        // [T, K] nullable
    int32_t *out_row_of_slot;  // [T, K] nullable unless ROWS_OUT: row of each slot, -1 where it has none
    int32_t *out_expert_counts; // [num_experts] nullable: slots per global routed expert
    uint32_t *out_faults;      // [MOE_FAULTS] nullable: how many of each were found
    void *workspace;           // 256-aligned, any contents
    uint64_t workspace_bytes;
    int32_t sm_limit;          // CUDA: GEMMs
    int32_t reserved0;
    uint32_t *done_signal;     // CUDA
    void *gemm2_start_event;   // CUDA
    const void *reserved[4];
} moe_execute_args;

// Runs one layer; not on CUDA in this version. CUDA: stages enqueue on `stream` (a CUstream; NULL is the legacy one),
// allocate nothing, take no lock, never wait. CPU: `stream` is ignored, the result is complete on return; allocates
// nothing. Several threads may call it with one plan and one set of weights, each with its own workspace (on the CPU
// they take turns on the context's thread pool). All pointers stay the caller's. Returns MOE_OK, or a code;
// moe_execute_check() says why. After MOE_ERROR_DATA on the CPU only out_faults has been written. MASKED and SORTED:
// each row is weighted and scaled on its own, shared and special experts are left out, num_tokens is not used, and more
// rows than max_tokens are done in turns.
MOE_API int32_t moe_execute(const moe_plan *plan, const moe_weights *weights, const moe_execute_args *args,
                            void *stream);
// The checks of moe_execute() with words, and on the CPU also of the tensors' contents; computes nothing. On CUDA what
// a stage would refuse comes first, then that moe_execute() is not in this version.
MOE_API int32_t moe_execute_check(const moe_plan *plan, const moe_weights *weights, const moe_execute_args *args,
                                  moe_error *err);

// The stages alone. All take the same args as moe_execute() and read or write the members named here.
// logits = the router's projection of x [T, router input size]; writes f32 `logits_out` [T, router width].
MOE_API int32_t moe_router_logits(const moe_plan *plan, const moe_weights *weights, const moe_execute_args *args,
                                  float *logits_out, void *stream);
// Routing: logits (or ids) -> out_ids, out_weights, out_expert_counts.
MOE_API int32_t moe_route(const moe_plan *plan, const moe_weights *weights, const moe_execute_args *args, void *stream);

// Rows in expert order. tile: rows of a tile; every expert starts at a multiple of it (1: no padding).
// rows_max = moe_permutation_rows(T * K, El, tile), tiles_max = rows_max / tile.
typedef struct moe_permutation {
    uint32_t struct_size;
    int32_t tile;
    int32_t *row_of_slot;    // [T * K] row, or -1
    int32_t *slot_of_row;    // [rows_max] token * K + choice; -1 in padding
    int32_t *expert_offsets; // [El + 1] first row of each local expert, padded
    int32_t *expert_counts;  // [El] real rows
    int32_t *tile_expert;    // [tiles_max] local expert of a tile
    int32_t *tile_limit;     // [tiles_max] end of its real rows
    int32_t *num_tiles;      // [1]
    uint32_t reserved[4];
} moe_permutation;
MOE_API int64_t moe_permutation_rows(int64_t slots, int32_t local_experts, int32_t tile); // -1: an argument is illegal
// Sorts slots by expert, tokens in order inside an expert; every non-NULL table of `out` is filled, and the members
// that moe_route() writes. LOGITS routes first, in the same call; IDS and PACKED take args->ids [T, K] and need no
// `weights`, no workspace on the CPU, and no args->weights (out_weights is then left alone). rows_max is that of
// args->num_tokens also where num_tokens_dev holds less.
MOE_API int32_t moe_permute(const moe_plan *plan, const moe_weights *weights, const moe_execute_args *args,
                            const moe_permutation *out, void *stream);
// out[t] = sum over slots of weight * row, in slot order, fp32, one rounding; rows [rows, H] in out_dtype or F32
// (rows_dtype); with special experts and scales, as moe_execute() would after GEMM2; shared experts are not added. ids
// and weights come from args (IDS or PACKED); x is read only for identity experts.
MOE_API int32_t moe_finalize(const moe_plan *plan, const moe_weights *weights, const moe_execute_args *args,
                             const void *rows, int32_t rows_dtype, const int32_t *row_of_slot, void *stream);

// ---- reference: plain C, one thread, fp32 in a documented order (manual, NUMERICS); the oracle of every test
// ---------

typedef struct moe_reference_route_args {
    uint32_t struct_size;
    int32_t num_tokens;
    int32_t num_experts;            // E
    int32_t ids_dtype;              // of token_ids: 0 or I32, I64
    const float *logits;            // [T, router width]
    const float *bias;              // [bias_rows, E + S]
    const int32_t *bias_index;      // [T] nullable
    const float *per_expert_scale;  // [E + S]
    const int32_t *forced_ids;      // [forced_rows, top_k]
    const void *token_ids;          // [T]
    float global_scale;             // 0 means 1
    int32_t reserved0;
    int32_t *out_ids;               // [T, slots]
    float *out_weights;             // [T, slots]
    uint32_t reserved[4];
} moe_reference_route_args;
MOE_API int32_t moe_reference_route(const moe_routing_desc *routing, const moe_reference_route_args *args,
                                    moe_error *err);

typedef struct moe_reference_layer_args {
    uint32_t struct_size;
    int32_t num_tokens;
    int32_t intermediate_dtype; // 0: the format's activation type; F32: not rounded
    int32_t rows_dtype;         // 0 or F32: rows not rounded before they are weighted; BF16, F16
    const float *x;             // [T, H]
    const int32_t *ids;         // [T, slots] as moe_reference_route() gives them; -1: nothing here
    const float *weights;       // [T, slots]
    const float *shared_gate;   // [T] nullable
    moe_row_fn rows;            // every matrix and vector of the layer, this rank's slice
    void *rows_user;
    float *out;                 // [T, H]
    const void *reserved[4];
} moe_reference_layer_args;
// The whole layer behind the routing. Allocates through malloc. moe_weights_row() is a `rows` function for moe_weights.
MOE_API int32_t moe_reference_layer(const moe_layer_desc *layer, const moe_reference_layer_args *args, moe_error *err);
// A moe_row_fn over sealed weights: user is the moe_weights.
MOE_API int32_t moe_weights_row(void *user, int32_t role, int32_t expert, int32_t row, float *out);

// ---- arithmetic that others need
// -------------------------------------------------------------------------------------

// Conversions of n values; round to nearest even; saturation where the format has no infinity. dst and src: any of F32,
// BF16, F16. Pure.
MOE_API int32_t moe_convert(const void *src, int32_t src_dtype, void *dst, int32_t dst_dtype, int64_t n,
                            moe_error *err);

#ifdef __cplusplus
}
#endif
#endif // MOE_H
// ---------------------------------------------------------------------------------------------------------------------
// Implementation. Sections stand in dependency order and nothing is declared ahead, so a call can only go upward.
#ifdef MOE_IMPLEMENTATION
#ifndef MOE__IMPLEMENTED
#define MOE__IMPLEMENTED

// >>config  what the compiler and the machine offer
#if defined(__FAST_MATH__)
#  error "moe.h: -ffast-math changes the results that this library promises; compile this file without it"
#endif
#if defined(__clang__)
#  pragma STDC FP_CONTRACT OFF // for gcc, every multiply-add below is a moe__fmaf(): nothing is left to contract
#endif

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if !defined(MOE_NO_FILES) || !defined(MOE_NO_THREADS)
#  include <errno.h>
#endif
#if !defined(MOE_NO_FILES)
#  include <stdio.h>
#endif
#if defined(_WIN32)
#  if !defined(MOE_NO_FILES) || !defined(MOE_NO_THREADS) || !defined(MOE_NO_CUDA)
#    define MOE__WINDOWS 1
#  endif
#else
#  if !defined(MOE_NO_FILES)
#    include <dirent.h>
#    include <fcntl.h>
#    include <sys/mman.h>
#    include <sys/resource.h>
#    include <sys/stat.h>
#    include <unistd.h>
#  endif
#  if !defined(MOE_NO_CUDA)
#    include <dlfcn.h>
#    include <sys/stat.h>
#    include <unistd.h>
#    if defined(__linux__)
#      include <sys/auxv.h>
#    endif
#  endif
#  if !defined(MOE_NO_THREADS)
#    include <pthread.h>
#    include <unistd.h>
#  endif
#endif

#if !defined(MOE_NO_CPU_SIMD) && defined(__GNUC__) && defined(__x86_64__)
#  define MOE__X86 1
#  include <cpuid.h>
#  include <immintrin.h>
#endif
#if !defined(MOE_NO_CPU_SIMD) && defined(__GNUC__) && defined(__aarch64__)
#  define MOE__NEON 1
#  include <arm_neon.h>
#endif

#ifndef MOE_MALLOC // defaults of the allocator hook; define both
#  define MOE_MALLOC(size) malloc(size)
#  define MOE_FREE(ptr) free(ptr)
#endif
#ifndef MOE_ASSERT // internal invariants only
#  define MOE_ASSERT(condition) ((void)0)
#endif
#if defined(__GNUC__)
#  define MOE__UNUSED __attribute__((unused))
#else
#  define MOE__UNUSED
#endif
#define MOE__ARRAY_COUNT(a) ((int32_t)(sizeof(a) / sizeof((a)[0])))
enum { MOE__PATH_MAX = 4096 }; // bytes, with the terminator

// >>base  memory, checked arithmetic, text, errors

static int32_t moe__min32(int32_t a, int32_t b) { return a < b ? a : b; }
MOE__UNUSED static int32_t moe__max32(int32_t a, int32_t b) { return a > b ? a : b; }
static uint64_t moe__align_up(uint64_t n, uint64_t align) { return (n + align - 1) / align * align; }

// 1 and *out = a * b, or 0 when that does not fit.
static int32_t moe__mul(uint64_t a, uint64_t b, uint64_t *out)
{
    if (b != 0 && a > UINT64_MAX / b) return 0;
    *out = a * b;
    return 1;
}

// 1 and *out = a + b, or 0 when that does not fit.
MOE__UNUSED static int32_t moe__add(uint64_t a, uint64_t b, uint64_t *out)
{
    if (a > UINT64_MAX - b) return 0;
    *out = a + b;
    return 1;
}

// Text in a fixed buffer, always terminated; what does not fit is cut at a character.
typedef struct moe__text {
    char *data;
    size_t capacity, length;
} moe__text;

static moe__text moe__text_make(char *data, size_t capacity)
{
    moe__text text;
    text.data = data;
    text.capacity = capacity;
    text.length = 0;
    if (capacity > 0) data[0] = 0;
    return text;
}

static void moe__text_char(moe__text *text, char c)
{
    if (text->length + 1 < text->capacity) {
        text->data[text->length++] = c;
        text->data[text->length] = 0;
    } else {
        while (text->length > 0 && ((unsigned char)text->data[text->length - 1] & 0xc0) == 0x80) text->length--;
        if (text->length > 0 && (unsigned char)text->data[text->length - 1] >= 0xc0) text->length--;
        text->capacity = text->length + 1; // full from here on
        if (text->capacity > 0) text->data[text->length] = 0;
    }
}

static void moe__text_string(moe__text *text, const char *string)
{
    for (; *string != 0; string++) moe__text_char(text, *string);
}

static void moe__text_u64(moe__text *text, uint64_t value)
{
    char digits[20];
    int32_t n = 0;
    do digits[n++] = (char)('0' + (int32_t)(value % 10));
    while ((value /= 10) != 0);
    while (n > 0) moe__text_char(text, digits[--n]);
}

static void moe__text_i64(moe__text *text, int64_t value)
{
    if (value < 0) moe__text_char(text, '-');
    moe__text_u64(text, value < 0 ? 0 - (uint64_t)value : (uint64_t)value);
}

// Shortest of up to 7 digits, as %.7g would; no locale.
static void moe__text_double(moe__text *text, double value)
{
    int32_t exponent = 0, digits = 0;
    uint64_t mantissa;
    if (value != value) { moe__text_string(text, "nan"); return; }
    if (value < 0) { moe__text_char(text, '-'); value = -value; }
    if (value > 1.7976931348623157e308) { moe__text_string(text, "inf"); return; }
    if (value == 0) { moe__text_char(text, '0'); return; }
    while (value >= 1e7) { value /= 10; exponent++; }
    while (value < 1e6) { value *= 10; exponent--; }
    mantissa = (uint64_t)(value + 0.5);
    while (mantissa % 10 == 0) { mantissa /= 10; exponent++; }
    for (uint64_t m = mantissa; m != 0; m /= 10) digits++;
    if (exponent >= 0 && exponent + digits <= 15) {
        moe__text_u64(text, mantissa);
        while (exponent-- > 0) moe__text_char(text, '0');
    } else if (exponent < 0 && exponent + digits > -5) {
        uint64_t unit = 1;
        for (int32_t i = 0; i < -exponent; i++) unit *= 10;
        moe__text_u64(text, mantissa / unit);
        moe__text_char(text, '.');
        for (unit /= 10; unit != 0; unit /= 10) moe__text_char(text, (char)('0' + (int32_t)(mantissa / unit % 10)));
    } else {
        moe__text_u64(text, mantissa);
        moe__text_char(text, 'e');
        moe__text_i64(text, exponent);
    }
}

// A string from a file: quoted, control bytes escaped, long ones cut in the middle.
static void moe__text_quoted(moe__text *text, const char *string)
{
    static const char hex[] = "0123456789abcdef";
    size_t length = strlen(string);
    moe__text_char(text, '"');
    for (size_t i = 0; i < length; i++) {
        unsigned char c = (unsigned char)string[i];
        if (length > 160 && i == 60) {
            moe__text_string(text, "...");
            i = length - 80;
            while (i < length && ((unsigned char)string[i] & 0xc0) == 0x80) i++;
            if (i == length) break;
            c = (unsigned char)string[i];
        }
        if (c < 32 || c == 127) {
            moe__text_string(text, "\\x");
            moe__text_char(text, hex[c >> 4]);
            moe__text_char(text, hex[c & 15]);
        } else {
            moe__text_char(text, (char)c);
        }
    }
    moe__text_char(text, '"');
}

// %s string  %q quoted string from outside  %d int32_t  %u uint32_t  %D int64_t  %U uint64_t  %g double  %%
static void moe__text_vformat(moe__text *text, const char *format, va_list args)
{
    for (; *format != 0; format++) {
        if (*format != '%') { moe__text_char(text, *format); continue; }
        switch (*++format) {
        case 's': moe__text_string(text, va_arg(args, const char *)); break;
        case 'q': moe__text_quoted(text, va_arg(args, const char *)); break;
        case 'd': moe__text_i64(text, va_arg(args, int32_t)); break;
        case 'u': moe__text_u64(text, va_arg(args, uint32_t)); break;
        case 'D': moe__text_i64(text, va_arg(args, int64_t)); break;
        case 'U': moe__text_u64(text, va_arg(args, uint64_t)); break;
        case 'g': moe__text_double(text, va_arg(args, double)); break;
        default: moe__text_char(text, *format); break;
        }
    }
}

MOE__UNUSED static void moe__text_format(moe__text *text, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    moe__text_vformat(text, format, args);
    va_end(args);
}

// >>error  results and messages

static int32_t moe__ok(moe_error *err)
{
    if (err != NULL) memset(err, 0, sizeof *err);
    return MOE_OK;
}

// Fills err, returns code. The text is "moe: <member> <format...>" or "moe: <format...>" when member is "".
static int32_t moe__fail(moe_error *err, int32_t code, const char *member, const char *format, ...)
{
    if (err != NULL) {
        moe__text text;
        va_list args;
        memset(err, 0, sizeof *err);
        err->code = code;
        text = moe__text_make(err->member, sizeof err->member);
        moe__text_string(&text, member);
        text = moe__text_make(err->text, sizeof err->text);
        moe__text_string(&text, "moe: ");
        if (member[0] != 0) {
            moe__text_string(&text, member);
            moe__text_char(&text, ' ');
        }
        va_start(args, format);
        moe__text_vformat(&text, format, args);
        va_end(args);
    }
    return code;
}

// Common refusals, so that they read alike.
static int32_t moe__fail_null(moe_error *err, const char *argument)
{
    return moe__fail(err, MOE_ERROR_ARGUMENT, argument, "is NULL");
}

static int32_t moe__fail_memory(moe_error *err, uint64_t bytes)
{
    return moe__fail(err, MOE_ERROR_MEMORY, "", "the allocator returned NULL for %U bytes", bytes);
}

static int32_t moe__fail_range(moe_error *err, const char *member, int64_t value, int64_t low, int64_t high)
{
    return moe__fail(err, MOE_ERROR_ARGUMENT, member, "is %D: it must be %D..%D", value, low, high);
}

// Copies a desc of the caller's into a full-size zeroed one. src NULL: all zero. `name` is the argument.
static int32_t moe__copy_desc(void *dst, size_t size, const void *src, const char *name, moe_error *err)
{
    uint32_t given = 0;
    memset(dst, 0, size);
    if (src == NULL) return MOE_OK;
    memcpy(&given, src, sizeof given);
#if defined(MOE_DLL)
    if (given != (uint32_t)size) { // a shared library cannot know which header its caller was compiled with
        static const char legal[] = "";
#else
    if (given != 0 && given != (uint32_t)size) {
        static const char legal[] = "0 or ";
#endif
        char member[64];
        moe__text text = moe__text_make(member, sizeof member);
        moe__text_format(&text, "%s.struct_size", name);
        return moe__fail(err, MOE_ERROR_ARGUMENT, member, "is %u: it must be %s%u, the size in this version", given,
                         legal, (uint32_t)size);
    }
    memcpy(dst, src, size);
    return MOE_OK;
}

typedef struct moe__name { int32_t value; const char *name; } moe__name;

static const char *moe__name_find(const moe__name *names, int32_t count, int32_t value, const char *otherwise)
{
    for (int32_t i = 0; i < count; i++)
        if (names[i].value == value) return names[i].name;
    return otherwise;
}

MOE_API int32_t moe_version(void) { return MOE_VERSION; }

MOE_API const char *moe_result_string(int32_t result)
{
    static const moe__name names[] = {
        { MOE_OK, "MOE_OK" },
        { MOE_ERROR_ARGUMENT, "MOE_ERROR_ARGUMENT" },
        { MOE_ERROR_STATE, "MOE_ERROR_STATE" },
        { MOE_ERROR_DATA, "MOE_ERROR_DATA" },
        { MOE_ERROR_MEMORY, "MOE_ERROR_MEMORY" },
        { MOE_ERROR_FILE, "MOE_ERROR_FILE" },
        { MOE_ERROR_FORMAT, "MOE_ERROR_FORMAT" },
        { MOE_ERROR_MISSING, "MOE_ERROR_MISSING" },
        { MOE_ERROR_DRIVER, "MOE_ERROR_DRIVER" },
        { MOE_ERROR_NVRTC, "MOE_ERROR_NVRTC" },
        { MOE_ERROR_COMPILE, "MOE_ERROR_COMPILE" },
        { MOE_ERROR_LOAD, "MOE_ERROR_LOAD" },
        { MOE_ERROR_UNSUPPORTED, "MOE_ERROR_UNSUPPORTED" },
        { MOE_ERROR_LAUNCH, "MOE_ERROR_LAUNCH" },
    };
    return moe__name_find(names, MOE__ARRAY_COUNT(names), result, "unknown result");
}

MOE_API const char *moe_dtype_string(int32_t dtype)
{
    static const moe__name names[] = {
        { MOE_DTYPE_F32, "f32" },   { MOE_DTYPE_BF16, "bf16" }, { MOE_DTYPE_F16, "f16" },
        { MOE_DTYPE_E4M3, "e4m3" }, { MOE_DTYPE_E5M2, "e5m2" }, { MOE_DTYPE_E2M1, "e2m1" },
        { MOE_DTYPE_UE8M0, "ue8m0" }, { MOE_DTYPE_INT4, "int4" },
        { MOE_DTYPE_F64, "f64" },   { MOE_DTYPE_I8, "i8" },     { MOE_DTYPE_U8, "u8" },       { MOE_DTYPE_I16, "i16" },
        { MOE_DTYPE_U16, "u16" },   { MOE_DTYPE_I32, "i32" },   { MOE_DTYPE_U32, "u32" },     { MOE_DTYPE_I64, "i64" },
        { MOE_DTYPE_U64, "u64" },   { MOE_DTYPE_BOOL, "bool" },
    };
    return moe__name_find(names, MOE__ARRAY_COUNT(names), dtype, "?");
}

MOE_API int32_t moe_dtype_bits(int32_t dtype)
{
    switch (dtype) {
    case MOE_DTYPE_E2M1: case MOE_DTYPE_INT4: return 4;
    case MOE_DTYPE_E4M3: case MOE_DTYPE_E5M2: case MOE_DTYPE_UE8M0: case MOE_DTYPE_I8: case MOE_DTYPE_U8:
    case MOE_DTYPE_BOOL: return 8;
    case MOE_DTYPE_BF16: case MOE_DTYPE_F16: case MOE_DTYPE_I16: case MOE_DTYPE_U16: return 16;
    case MOE_DTYPE_F32: case MOE_DTYPE_I32: case MOE_DTYPE_U32: return 32;
    case MOE_DTYPE_F64: case MOE_DTYPE_I64: case MOE_DTYPE_U64: return 64;
    default: return 0;
    }
}

MOE_API const char *moe_format_string(int32_t format)
{
    static const moe__name names[] = {
        { MOE_FORMAT_F32, "f32" },
        { MOE_FORMAT_BF16, "bf16" },
        { MOE_FORMAT_F16, "f16" },
        { MOE_FORMAT_FP8_PER_TENSOR, "fp8 per tensor" },
        { MOE_FORMAT_FP8_PER_CHANNEL, "fp8 per channel" },
        { MOE_FORMAT_FP8_BLOCK, "fp8 block" },
        { MOE_FORMAT_MXFP8, "mxfp8" },
        { MOE_FORMAT_NVFP4, "nvfp4" },
        { MOE_FORMAT_NVFP4_W4A16, "nvfp4 w4a16" },
        { MOE_FORMAT_MXFP4_W4A16, "mxfp4 w4a16" },
        { MOE_FORMAT_MXFP4_W4A8, "mxfp4 w4a8" },
        { MOE_FORMAT_INT4_W4A16, "int4 w4a16" },
    };
    return moe__name_find(names, MOE__ARRAY_COUNT(names), format, "?");
}

MOE_API const char *moe_role_string(int32_t role)
{
    static const moe__name names[] = {
        { MOE_TENSOR_GATE, "gate" },
        { MOE_TENSOR_UP, "up" },
        { MOE_TENSOR_GATE_UP, "gate_up" },
        { MOE_TENSOR_DOWN, "down" },
        { MOE_TENSOR_GATE_BIAS, "gate bias" },
        { MOE_TENSOR_UP_BIAS, "up bias" },
        { MOE_TENSOR_GATE_UP_BIAS, "gate_up bias" },
        { MOE_TENSOR_DOWN_BIAS, "down bias" },
        { MOE_TENSOR_SHARED_GATE, "shared gate" },
        { MOE_TENSOR_SHARED_UP, "shared up" },
        { MOE_TENSOR_SHARED_GATE_UP, "shared gate_up" },
        { MOE_TENSOR_SHARED_DOWN, "shared down" },
        { MOE_TENSOR_SHARED_TOKEN_GATE, "shared token gate" },
        { MOE_TENSOR_ROUTER, "router" },
        { MOE_TENSOR_ROUTER_BIAS, "router bias" },
        { MOE_TENSOR_ROUTER_INPUT_SCALE, "router input scale" },
        { MOE_TENSOR_ROUTER_GLOBAL_SCALE, "router global scale" },
        { MOE_TENSOR_SELECT_BIAS, "selection bias" },
        { MOE_TENSOR_PER_EXPERT_SCALE, "per-expert scale" },
        { MOE_TENSOR_FORCED_IDS, "forced ids" },
        { MOE_TENSOR_ALPHA, "alpha" },
        { MOE_TENSOR_BETA, "beta" },
        { MOE_TENSOR_LIMIT, "limit" },
        { MOE_TENSOR_ROW_NORM, "row norm" },
        { MOE_TENSOR_CONSTANT, "constant" },
    };
    return moe__name_find(names, MOE__ARRAY_COUNT(names), role, "?");
}

// ---- allocator ----

static void *moe__default_alloc(void *user, size_t size, size_t align)
{
    // The distance to malloc's pointer is kept in front of the aligned block.
    unsigned char *raw, *aligned;
    (void)user;
    if (size > SIZE_MAX - align - sizeof(void *)) return NULL;
    raw = (unsigned char *)MOE_MALLOC(size + align + sizeof(void *));
    if (raw == NULL) return NULL;
    aligned = raw + sizeof(void *);
    aligned += (align - (uintptr_t)aligned % align) % align;
    memcpy(aligned - sizeof(void *), &raw, sizeof raw);
    return aligned;
}

static void moe__default_free(void *user, void *ptr, size_t size)
{
    void *raw;
    (void)user;
    (void)size;
    memcpy(&raw, (unsigned char *)ptr - sizeof(void *), sizeof raw);
    MOE_FREE(raw);
}

// Checks a desc's allocator and puts the default in place of an empty one.
static int32_t moe__allocator_resolve(moe_allocator *allocator, const char *member, moe_error *err)
{
    if ((allocator->alloc == NULL) != (allocator->free == NULL))
        return moe__fail(err, MOE_ERROR_ARGUMENT, member, "has only one of alloc and free: set both or none");
    if (allocator->alloc == NULL) {
        allocator->alloc = moe__default_alloc;
        allocator->free = moe__default_free;
    }
    return MOE_OK;
}

static void *moe__alloc(const moe_allocator *allocator, uint64_t size)
{
    if (size == 0) size = 1;
    if (size > SIZE_MAX) return NULL;
    return allocator->alloc(allocator->user, (size_t)size, 256);
}

static void moe__free(const moe_allocator *allocator, void *ptr, uint64_t size)
{
    if (ptr != NULL) allocator->free(allocator->user, ptr, (size_t)(size == 0 ? 1 : size));
}

// >>numeric  16-bit floats and f32  Exact widening, narrowing to nearest even; the same on every compiler and chip,
// since nothing here is left to the machine's own conversions. NaN stays NaN. Called by everything that touches
// tensors.

static uint32_t moe__f32_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float moe__bits_f32(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static int32_t moe__is_nan(float value) { return (moe__f32_bits(value) & 0x7fffffffu) > 0x7f800000u; }
MOE__UNUSED static int32_t moe__is_finite(float value) { return (moe__f32_bits(value) & 0x7f800000u) != 0x7f800000u; }

static float moe__bf16_to_f32(uint16_t value) { return moe__bits_f32((uint32_t)value << 16); }

static uint16_t moe__f32_to_bf16(float value)
{
    uint32_t bits = moe__f32_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u); // quiet, so that it stays NaN
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static float moe__f16_to_f32(uint16_t value)
{
    uint32_t sign = (uint32_t)(value & 0x8000u) << 16;
    uint32_t exponent = (value >> 10) & 31u;
    uint32_t mantissa = value & 0x3ffu;
    if (exponent == 31u) return moe__bits_f32(sign | 0x7f800000u | (mantissa << 13));
    if (exponent == 0) { // subnormal: a multiple of 2^-24, exact in f32
        float magnitude = (float)mantissa * 5.9604644775390625e-8f;
        return moe__bits_f32(moe__f32_bits(magnitude) | sign);
    }
    return moe__bits_f32(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

static uint16_t moe__f32_to_f16(float value)
{
    uint32_t bits = moe__f32_bits(value);
    uint32_t sign = (bits >> 16) & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t shift, kept, rest, half;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); // 65520 and above round to infinity
    if (magnitude >= 0x38800000u)                                    // normal: drop 13 bits, nearest even
        return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
    if (magnitude < 0x33000000u) return (uint16_t)sign;              // below 2^-25
    shift = 126u - (magnitude >> 23);                                // subnormal: bits of 2^-24
    kept = (magnitude & 0x7fffffu) | 0x800000u;
    rest = kept & ((1u << shift) - 1u);
    half = 1u << (shift - 1u);
    kept >>= shift;
    if (rest > half || (rest == half && (kept & 1u) != 0)) kept++;
    return (uint16_t)(sign | kept);
}

// One value of an F32, BF16 or F16 array; unaligned arrays are legal.
static float moe__load(const void *data, int32_t dtype, int64_t index)
{
    if (dtype == MOE_DTYPE_F32) {
        float value;
        memcpy(&value, (const char *)data + index * 4, 4);
        return value;
    } else {
        uint16_t value;
        memcpy(&value, (const char *)data + index * 2, 2);
        return dtype == MOE_DTYPE_BF16 ? moe__bf16_to_f32(value) : moe__f16_to_f32(value);
    }
}

static void moe__store(void *data, int32_t dtype, int64_t index, float value)
{
    if (dtype == MOE_DTYPE_F32) {
        memcpy((char *)data + index * 4, &value, 4);
    } else {
        uint16_t narrow = dtype == MOE_DTYPE_BF16 ? moe__f32_to_bf16(value) : moe__f32_to_f16(value);
        memcpy((char *)data + index * 2, &narrow, 2);
    }
}

static float moe__round_to(float value, int32_t dtype)
{
    if (dtype == MOE_DTYPE_BF16) return moe__bf16_to_f32(moe__f32_to_bf16(value));
    if (dtype == MOE_DTYPE_F16) return moe__f16_to_f32(moe__f32_to_f16(value));
    return value;
}

static int32_t moe__is_float_dtype(int32_t dtype)
{
    return dtype == MOE_DTYPE_F32 || dtype == MOE_DTYPE_BF16 || dtype == MOE_DTYPE_F16;
}

MOE_API int32_t moe_convert(const void *src, int32_t src_dtype, void *dst, int32_t dst_dtype, int64_t n, moe_error *err)
{
    if (src == NULL && n > 0) return moe__fail_null(err, "src");
    if (dst == NULL && n > 0) return moe__fail_null(err, "dst");
    if (n < 0) return moe__fail(err, MOE_ERROR_ARGUMENT, "n", "is %D: it must not be negative", n);
    if (!moe__is_float_dtype(src_dtype))
        return moe__fail(err, MOE_ERROR_ARGUMENT, "src_dtype", "is %d: it must be F32, BF16 or F16", src_dtype);
    if (!moe__is_float_dtype(dst_dtype))
        return moe__fail(err, MOE_ERROR_ARGUMENT, "dst_dtype", "is %d: it must be F32, BF16 or F16", dst_dtype);
    for (int64_t i = 0; i < n; i++) moe__store(dst, dst_dtype, i, moe__load(src, src_dtype, i));
    return moe__ok(err);
}

// >>sys files  whole files  Mapped, read, or written under a temporary name and renamed. Paths are UTF-8 everywhere.
// Called by the checkpoint reader and by saved weights; nothing else touches the file system.
#if defined(MOE__WINDOWS)
#  ifdef __cplusplus
extern "C" {
#  endif
__declspec(dllimport) unsigned long __stdcall GetLastError(void);
#  ifdef __cplusplus
}
#  endif

// UTF-8 -> UTF-16; bytes that are no UTF-8 become U+FFFD, which names no file.
static const wchar_t *moe__wide(wchar_t *wide, const char *path)
{
    size_t n = 0;
    const unsigned char *p = (const unsigned char *)path;
    while (*p != 0 && n + 2 < MOE__PATH_MAX) {
        uint32_t c = *p++;
        int32_t more = c < 0x80 ? 0 : c >= 0xf0 && c < 0xf8 ? 3 : c >= 0xe0 ? 2 : c >= 0xc0 ? 1 : -1;
        if (more < 0 || c >= 0xf8) { wide[n++] = (wchar_t)0xfffd; continue; }
        if (more > 0) c &= 0x3fu >> more;
        for (; more > 0 && (*p & 0xc0) == 0x80; more--) c = c << 6 | (*p++ & 0x3fu);
        if (more > 0 || c > 0x10ffff) c = 0xfffd;
        if (c >= 0x10000) {
            wide[n++] = (wchar_t)(0xd800 + ((c - 0x10000) >> 10));
            c = 0xdc00 + ((c - 0x10000) & 0x3ff);
        }
        wide[n++] = (wchar_t)c;
    }
    wide[n] = 0;
    return wide;
}

static int32_t moe__last_error(void) { return (int32_t)GetLastError(); }
static int32_t moe__error_is_missing(int32_t number) { return number == 2 || number == 3; }
#endif

#ifndef MOE_NO_FILES

typedef enum moe__path_kind {
    MOE__PATH_MISSING = 0,
    MOE__PATH_FILE = 1,
    MOE__PATH_FOLDER = 2,
    MOE__PATH_OTHER = 3 // device, pipe, not accessible
} moe__path_kind;

// Contents of a file. What was read, not mapped, has a 0 behind it.
typedef struct moe__file {
    const unsigned char *data;
    uint64_t size;
    int32_t mapped; // else the allocator's
} moe__file;

typedef struct moe__span {
    const void *data;
    uint64_t size;
} moe__span;

static int32_t moe__fail_file(moe_error *err, int32_t code, const char *path, const char *what, int32_t number)
{
    if (number == 0) return moe__fail(err, code, "", "%q %s", path, what);
    return moe__fail(err, code, "", "%q %s (system error %d)", path, what, number);
}

// folder + separator + name into path[MOE__PATH_MAX].
MOE__UNUSED static int32_t moe__path_join(char *path, const char *folder, const char *name, moe_error *err)
{
    moe__text text = moe__text_make(path, MOE__PATH_MAX);
    size_t length = strlen(folder);
    if (length + 1 + strlen(name) >= MOE__PATH_MAX)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "path", "is longer than %d bytes: %q", MOE__PATH_MAX - 1, folder);
    moe__text_string(&text, folder);
    if (length > 0 && folder[length - 1] != '/' && folder[length - 1] != '\\') moe__text_char(&text, '/');
    moe__text_string(&text, name);
    return MOE_OK;
}

#if defined(_WIN32)
// The few functions needed, with windows.h's own types spelled out, so that including it as well does no harm.
struct _SECURITY_ATTRIBUTES;
struct _OVERLAPPED;
typedef void *moe__fd;
#  ifdef __cplusplus
extern "C" {
#  endif
__declspec(dllimport) void *__stdcall CreateFileW(const wchar_t *name, unsigned long access, unsigned long share,
                                                  struct _SECURITY_ATTRIBUTES *security, unsigned long disposition,
                                                  unsigned long flags, void *from);
__declspec(dllimport) int __stdcall CloseHandle(void *handle);
__declspec(dllimport) unsigned long __stdcall GetFileSize(void *file, unsigned long *high);
__declspec(dllimport) int __stdcall ReadFile(void *file, void *data, unsigned long size, unsigned long *done,
                                             struct _OVERLAPPED *overlapped);
__declspec(dllimport) int __stdcall WriteFile(void *file, const void *data, unsigned long size, unsigned long *done,
                                              struct _OVERLAPPED *overlapped);
__declspec(dllimport) int __stdcall FlushFileBuffers(void *file);
__declspec(dllimport) void *__stdcall CreateFileMappingW(void *file, struct _SECURITY_ATTRIBUTES *security,
                                                         unsigned long protect, unsigned long high, unsigned long low,
                                                         const wchar_t *name);
__declspec(dllimport) void *__stdcall MapViewOfFile(void *mapping, unsigned long access, unsigned long high,
                                                    unsigned long low, size_t size);
__declspec(dllimport) int __stdcall UnmapViewOfFile(const void *data);
__declspec(dllimport) int __stdcall MoveFileExW(const wchar_t *from, const wchar_t *to, unsigned long flags);
__declspec(dllimport) int __stdcall DeleteFileW(const wchar_t *name);
__declspec(dllimport) int __stdcall CreateDirectoryW(const wchar_t *name, struct _SECURITY_ATTRIBUTES *security);
__declspec(dllimport) unsigned long __stdcall GetFileAttributesW(const wchar_t *name);
__declspec(dllimport) unsigned long __stdcall GetCurrentProcessId(void);
#  ifdef __cplusplus
}
#  endif

static uint32_t moe__process_id(void) { return (uint32_t)GetCurrentProcessId(); }

MOE__UNUSED static moe__path_kind moe__path_look(const char *path)
{
    wchar_t wide[MOE__PATH_MAX];
    unsigned long attributes = GetFileAttributesW(moe__wide(wide, path));
    if (attributes == 0xffffffffu)
        return moe__error_is_missing(moe__last_error()) ? MOE__PATH_MISSING : MOE__PATH_OTHER;
    return (attributes & 0x10u) != 0 ? MOE__PATH_FOLDER : MOE__PATH_FILE;
}

static int32_t moe__fd_open(const char *path, moe__fd *fd, uint64_t *size, moe_error *err)
{
    wchar_t wide[MOE__PATH_MAX];
    unsigned long low, high = 0;
    *fd = CreateFileW(moe__wide(wide, path), 0x80000000u, 1 | 2 | 4, NULL, 3, 0x80, NULL); // read, share all, existing
    if (*fd == (void *)(intptr_t)-1) {
        int32_t number = moe__last_error();
        if (moe__error_is_missing(number)) return moe__fail_file(err, MOE_ERROR_MISSING, path, "does not exist", 0);
        return moe__fail_file(err, MOE_ERROR_FILE, path, "could not be opened", number);
    }
    low = GetFileSize(*fd, &high);
    *size = (uint64_t)high << 32 | low;
    return MOE_OK;
}

static void moe__fd_close(moe__fd fd) { CloseHandle(fd); }

static int64_t moe__fd_read(moe__fd fd, void *data, uint64_t size)
{
    unsigned long done = 0;
    if (!ReadFile(fd, data, size > 1u << 30 ? 1u << 30 : (unsigned long)size, &done, NULL)) return -1;
    return (int64_t)done;
}

static int64_t moe__fd_write(moe__fd fd, const void *data, uint64_t size)
{
    unsigned long done = 0;
    if (!WriteFile(fd, data, size > 1u << 30 ? 1u << 30 : (unsigned long)size, &done, NULL)) return -1;
    return (int64_t)done;
}

static int32_t moe__fd_create(const char *path, moe__fd *fd, int32_t *exists)
{
    wchar_t wide[MOE__PATH_MAX];
    *fd = CreateFileW(moe__wide(wide, path), 0x40000000u, 0, NULL, 1, 0x80, NULL); // write, alone, new
    if (*fd != (void *)(intptr_t)-1) return 0;
    *exists = moe__last_error() == 80;
    return moe__last_error();
}

static int32_t moe__fd_flush(moe__fd fd) { return FlushFileBuffers(fd) ? 0 : moe__last_error(); }

static const void *moe__fd_map(moe__fd fd, uint64_t size)
{
    void *view = NULL, *mapping = CreateFileMappingW(fd, NULL, 2, 0, 0, NULL); // read only
    if (mapping == NULL) return NULL;
    view = MapViewOfFile(mapping, 4, 0, 0, (size_t)size);
    CloseHandle(mapping); // the view keeps it
    return view;
}

static void moe__unmap(const void *data, uint64_t size)
{
    (void)size;
    UnmapViewOfFile(data);
}

static void moe__path_remove(const char *path)
{
    wchar_t wide[MOE__PATH_MAX];
    DeleteFileW(moe__wide(wide, path));
}

static int32_t moe__path_rename(const char *from, const char *to)
{
    wchar_t wide_from[MOE__PATH_MAX], wide_to[MOE__PATH_MAX];
    return MoveFileExW(moe__wide(wide_from, from), moe__wide(wide_to, to), 1) ? 0 : moe__last_error(); // replace
}
#else
typedef int moe__fd;

// POSIX 2008 under -std=c99: glibc then hides these names, not the functions.
#  if defined(O_CLOEXEC)
#    define MOE__O_CLOEXEC O_CLOEXEC
#  elif defined(__O_CLOEXEC)
#    define MOE__O_CLOEXEC __O_CLOEXEC
#  else
#    define MOE__O_CLOEXEC 0
#  endif
#  if !defined(MOE_NO_CUDA)
#    if defined(O_NOFOLLOW)
#      define MOE__O_NOFOLLOW O_NOFOLLOW
#      define MOE__O_DIRECTORY O_DIRECTORY
#    else
#      define MOE__O_NOFOLLOW __O_NOFOLLOW
#      define MOE__O_DIRECTORY __O_DIRECTORY
#    endif
#    if !defined(__cplusplus) && defined(__STRICT_ANSI__) && defined(__GLIBC__)
int openat(int at, const char *name, int flags, ...);
int mkdirat(int at, const char *name, mode_t mode);
int unlinkat(int at, const char *name, int flags);
int renameat(int from_at, const char *from, int to_at, const char *to);
#    endif
#  endif

static uint32_t moe__process_id(void) { return (uint32_t)getpid(); }

MOE__UNUSED static moe__path_kind moe__path_look(const char *path)
{
    struct stat info;
    if (stat(path, &info) != 0) return errno == ENOENT || errno == ENOTDIR ? MOE__PATH_MISSING : MOE__PATH_OTHER;
    return S_ISDIR(info.st_mode) ? MOE__PATH_FOLDER : S_ISREG(info.st_mode) ? MOE__PATH_FILE : MOE__PATH_OTHER;
}

static int32_t moe__fd_open(const char *path, moe__fd *fd, uint64_t *size, moe_error *err)
{
    struct stat info;
    *fd = open(path, O_RDONLY | O_NONBLOCK | MOE__O_CLOEXEC); // a pipe must not hold the call up
    if (*fd < 0) {
        if (errno == ENOENT || errno == ENOTDIR)
            return moe__fail_file(err, MOE_ERROR_MISSING, path, "does not exist", 0);
        return moe__fail_file(err, MOE_ERROR_FILE, path, "could not be opened", (int32_t)errno);
    }
    if (fstat(*fd, &info) != 0 || !S_ISREG(info.st_mode) || info.st_size < 0) {
        close(*fd);
        return moe__fail_file(err, MOE_ERROR_FILE, path, "is not a file", 0);
    }
    *size = (uint64_t)info.st_size;
    return MOE_OK;
}

static void moe__fd_close(moe__fd fd) { close(fd); }

static int64_t moe__fd_read(moe__fd fd, void *data, uint64_t size)
{
    ssize_t done;
    do done = read(fd, data, size > 1u << 30 ? (size_t)1 << 30 : (size_t)size);
    while (done < 0 && errno == EINTR);
    return (int64_t)done;
}

static int64_t moe__fd_write(moe__fd fd, const void *data, uint64_t size)
{
    ssize_t done;
    do done = write(fd, data, size > 1u << 30 ? (size_t)1 << 30 : (size_t)size);
    while (done < 0 && errno == EINTR);
    return (int64_t)done;
}

static int32_t moe__fd_create(const char *path, moe__fd *fd, int32_t *exists)
{
    *fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0666);
    if (*fd >= 0) return 0;
    *exists = errno == EEXIST;
    return (int32_t)errno;
}

static int32_t moe__fd_flush(moe__fd fd)
{
    // Some file systems cannot, and the file is no worse for it.
    return fsync(fd) == 0 || errno == EINVAL || errno == ENOSYS ? 0 : (int32_t)errno;
}

static const void *moe__fd_map(moe__fd fd, uint64_t size)
{
    void *view = mmap(NULL, (size_t)size, PROT_READ, MAP_PRIVATE, fd, 0);
    return view == MAP_FAILED ? NULL : view;
}

static void moe__unmap(const void *data, uint64_t size)
{
    void *view;
    memcpy(&view, &data, sizeof view); // munmap() takes it without const
    munmap(view, (size_t)size);
}

static void moe__path_remove(const char *path) { unlink(path); }
static int32_t moe__path_rename(const char *from, const char *to) { return rename(from, to) == 0 ? 0 : (int32_t)errno; }
#endif

static void moe__file_close(const moe_allocator *allocator, moe__file *file)
{
    void *data;
    memcpy(&data, &file->data, sizeof data);
    if (file->mapped && data != NULL) moe__unmap(data, file->size);
    else moe__free(allocator, data, file->size + 1);
    memset(file, 0, sizeof *file);
}

// Maps a file read-only. What another process does to the file afterwards shows, and where it is cut off, reading
// faults.
static int32_t moe__file_map(const char *path, moe__file *out, moe_error *err)
{
    moe__fd fd;
    uint64_t size = 0;
    int32_t result;
    memset(out, 0, sizeof *out);
    if ((result = moe__fd_open(path, &fd, &size, err)) != MOE_OK) return result;
    if (size > SIZE_MAX) {
        result = moe__fail_file(err, MOE_ERROR_FILE, path, "is larger than the address space", 0);
    } else if (size > 0) {
        out->data = (const unsigned char *)moe__fd_map(fd, size);
        if (out->data == NULL) result = moe__fail_file(err, MOE_ERROR_FILE, path, "could not be mapped", 0);
        else out->mapped = 1;
    }
    if (result == MOE_OK) out->size = size;
    moe__fd_close(fd);
    return result;
}

// Reads a file of at most `limit` bytes into memory.
MOE__UNUSED static int32_t moe__file_read(const moe_allocator *allocator, const char *path, uint64_t limit,
                                          moe__file *out, moe_error *err)
{
    moe__fd fd;
    uint64_t size = 0, done = 0;
    unsigned char *data = NULL;
    int32_t result;
    memset(out, 0, sizeof *out);
    if ((result = moe__fd_open(path, &fd, &size, err)) != MOE_OK) return result;
    if (size > limit)
        result = moe__fail(err, MOE_ERROR_FORMAT, "", "%q has %U bytes: at most %U are read", path, size, limit);
    else if ((data = (unsigned char *)moe__alloc(allocator, size + 1)) == NULL)
        result = moe__fail_memory(err, size + 1);
    while (result == MOE_OK && done < size) {
        int64_t got = moe__fd_read(fd, data + done, size - done);
        if (got > 0) done += (uint64_t)got;
        else result = moe__fail_file(err, MOE_ERROR_FILE, path, got < 0 ? "could not be read" : "became shorter", 0);
    }
    moe__fd_close(fd);
    if (result != MOE_OK) {
        moe__free(allocator, data, size + 1);
        return result;
    }
    data[size] = 0;
    out->data = data;
    out->size = size;
    return MOE_OK;
}

static int32_t moe__write_all(moe__fd fd, const moe__span *spans, int32_t count)
{
    for (int32_t i = 0; i < count; i++) {
        const unsigned char *data = (const unsigned char *)spans[i].data;
        for (uint64_t done = 0; done < spans[i].size;) {
            int64_t put = moe__fd_write(fd, data + done, spans[i].size - done);
            if (put <= 0) return 0;
            done += (uint64_t)put;
        }
    }
    return 1;
}

// Writes the spans one after the other under a temporary name beside `path` and renames: readers see the old file or
// the whole new one.
MOE__UNUSED static int32_t moe__file_write_atomic(const char *path, const moe__span *spans, int32_t count,
                                                  moe_error *err)
{
    char temp[MOE__PATH_MAX];
    moe__fd fd;
    int32_t number = 0, exists = 1;
    if (strlen(path) + 32 > MOE__PATH_MAX)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "path", "is longer than %d bytes: %q", MOE__PATH_MAX - 32, path);
    for (uint32_t attempt = 0; exists && attempt < 1000; attempt++) {
        moe__text text = moe__text_make(temp, sizeof temp);
        moe__text_format(&text, "%s.%u.%u.tmp", path, moe__process_id(), attempt);
        exists = 0;
        number = moe__fd_create(temp, &fd, &exists);
    }
    if (number != 0) return moe__fail_file(err, MOE_ERROR_FILE, temp, "could not be created", number);
    if (!moe__write_all(fd, spans, count)) {
        moe__fd_close(fd);
        moe__path_remove(temp);
        return moe__fail_file(err, MOE_ERROR_FILE, temp, "could not be written", 0);
    }
    number = moe__fd_flush(fd);
    moe__fd_close(fd);
    if (number == 0) number = moe__path_rename(temp, path);
    if (number != 0) {
        moe__path_remove(temp);
        return moe__fail_file(err, MOE_ERROR_FILE, path, "could not be replaced", number);
    }
    return MOE_OK;
}
#endif // MOE_NO_FILES

// >>math  correctly rounded and polynomial fp32 functions
// The same bits on every compiler, instruction set and optimisation level, and without libm: only operations that IEEE
// 754 defines (+, -, *, /, fused multiply-add, square root) in a written order, in the default rounding mode, with
// denormals. A product that is added to is either inside moe__fmaf() or comes from moe__mulf(), so a compiler has
// nothing to contract. Called by >>routing, >>cpu and >>reference; the device code has the same text. The stated errors
// were measured against the exact result, over every float from 2^-26 to the end of the range and over samples below it
// (tests/test_math.c repeats that with MOE_TEST_FULL=1); its digests pin the bits. NaN gives NaN everywhere.
//
// Where the coefficients come from: each polynomial is a weighted minimax fit in 40-digit arithmetic (Lawson's
// reweighted least squares on 600 Chebyshev points, weight 1 / function, so that the relative error of the function is
// what is levelled). Coefficients were rounded to fp32 from the lowest up, the rest refitted after each.

#if defined(__FLT_EVAL_METHOD__)
#  if __FLT_EVAL_METHOD__ == 1 || __FLT_EVAL_METHOD__ == 2
#    error "moe.h: x87 registers are wider than float, so results would differ; compile with -msse2 -mfpmath=sse"
#  endif
#endif
#if defined(__FP_FAST_FMAF) || defined(__FMA__) || defined(__aarch64__) || defined(__ARM_FEATURE_FMA)
#  if defined(__GNUC__)
#    define MOE__FMA_INSTRUCTION 1
#  endif
#endif

static float moe__absf(float x) { return moe__bits_f32(moe__f32_bits(x) & 0x7fffffffu); }

// The sum of two doubles, rounded to `sum` already, once more to float, as if there had been one rounding: what the
// first one lost (exact, Knuth) decides the last bit, round to odd, which makes the second harmless (Boldo, Melquiond).
MOE__UNUSED static float moe__round_once(double product, double c, double sum)
{
    double part = sum - product;
    double error = (product - (sum - part)) + (c - part);
    uint64_t bits;
    memcpy(&bits, &sum, sizeof bits);
    if (error != 0 && (bits & 0x7ff0000000000000u) != 0x7ff0000000000000u && (bits & 1) == 0) {
        bits += (error > 0) == (sum > 0) ? (uint64_t)1 : ~(uint64_t)0;
        memcpy(&sum, &bits, sizeof sum);
    }
    return (float)sum;
}

// a b + c rounded once, without the instruction. The product of two floats is exact in double, so only the addition can
// round. Rounding its result again to float goes wrong in two cases alone: the double lies exactly between two floats,
// or the float is denormal.
MOE__UNUSED static inline float moe__fmaf_exact(float a, float b, float c)
{
    double product = (double)a * (double)b;
    double sum = product + (double)c;
    uint64_t bits;
    memcpy(&bits, &sum, sizeof bits);
    if ((bits & 0x1fffffffu) == 0x10000000u || (bits & 0x7fffffffffffffffu) < 0x3810000000000000u)
        return moe__round_once(product, (double)c, sum);
    return (float)sum;
}

// a b + c rounded once.
static inline float moe__fmaf(float a, float b, float c)
{
#if defined(MOE__FMA_INSTRUCTION)
    return __builtin_fmaf(a, b, c);
#else
    return moe__fmaf_exact(a, b, c);
#endif
}

// a b rounded, also where the result is added to something: gcc would fuse the two on machines that can.
static float moe__mulf(float a, float b)
{
#if defined(__GNUC__) && defined(__x86_64__)
    float product = a * b;
    __asm__("" : "+x"(product));
#elif defined(__GNUC__) && defined(__aarch64__)
    float product = a * b;
    __asm__("" : "+w"(product));
#else
    volatile float product = a * b;
#endif
    return product;
}

// Correctly rounded square root by integers, a bit at a time; negative numbers give NaN.
MOE__UNUSED static float moe__sqrtf_exact(float x)
{
    uint32_t bits = moe__f32_bits(x);
    int32_t exponent = (int32_t)(bits >> 23);
    uint64_t value, root = 0;
    if ((bits & 0x7fffffffu) == 0 || bits == 0x7f800000u || moe__is_nan(x)) return x;
    if (bits >> 31 != 0) return moe__bits_f32(0x7fc00000u);
    value = bits & 0x7fffffu;
    if (exponent == 0) {
        exponent = 1;
        while ((value >> 23) == 0) { value <<= 1; exponent--; }
    }
    value |= 0x800000u;
    exponent -= 150; // x = value 2^exponent
    if ((exponent & 1) != 0) { value <<= 1; exponent--; }
    value <<= 26; // 50 or 51 bits, so the root has 25 or 26: one more than a float at least
    exponent -= 26;
    for (uint64_t bit = (uint64_t)1 << 25; bit != 0; bit >>= 1)
        if ((root | bit) * (root | bit) <= value) root |= bit;
    root = root << 1 | (root * root != value); // the last bit says "and something more", so float rounds rightly
    exponent = exponent / 2 - 1;               // exponent is even
    return (float)root * moe__bits_f32((uint32_t)(exponent + 127) << 23); // never denormal: the product is exact
}

// Correctly rounded square root; negative numbers give NaN, -0 gives -0.
static float moe__sqrtf(float x)
{
#if defined(__GNUC__) && defined(__x86_64__)
    __asm__("sqrtss %1, %0" : "=x"(x) : "x"(x));
    return x;
#elif defined(__GNUC__) && defined(__aarch64__)
    __asm__("fsqrt %s0, %s1" : "=w"(x) : "w"(x));
    return x;
#else
    return moe__sqrtf_exact(x);
#endif
}

// e^x. x = n ln 2 + r, |r| <= ln 2 / 2; e^r = 1 + r + r^2 q(r). Overflow gives infinity, results below 2^-126 are
// denormal (one more rounding), below 2^-150 zero. At most 1.03 ulp, for every x.
static float moe__expf(float x)
{
    const float magic = 12582912.0f; // 1.5 * 2^23: what is added to it is rounded to an integer
    float n, r, q;
    int32_t k;
    if (!(x < 89.0f)) return moe__is_nan(x) ? x : moe__bits_f32(0x7f800000u);
    if (x < -104.0f) return 0;
    n = moe__fmaf(x, 1.44269502f, magic);
    k = (int32_t)(moe__f32_bits(n) - moe__f32_bits(magic));
    n = n - magic;
    r = moe__fmaf(n, -0.693147182f, x);
    r = moe__fmaf(n, 1.90465421e-9f, r); // ln 2 is 0.693147182 - 1.9e-9
    q = 0.00139406149f;
    q = moe__fmaf(q, r, 0.00836882833f);
    q = moe__fmaf(q, r, 0.0416664034f);
    q = moe__fmaf(q, r, 0.166665196f);
    q = moe__fmaf(q, r, 0.5f);
    r = moe__fmaf(r * r, q, r) + 1.0f;
    if (k >= -125 && k <= 126) return moe__bits_f32(moe__f32_bits(r) + ((uint32_t)k << 23));
    // 2^k is no float, or the result is none with all its bits: two factors, of which only the second may round.
    n = moe__bits_f32((uint32_t)(k / 2 + 127) << 23);
    return r * n * moe__bits_f32((uint32_t)(k - k / 2 + 127) << 23);
}

// log(1 + x) for x >= 0; below 0 NaN. 1 + x = 2^k (1 + f), f in [-0.293, 0.415]; log(1 + f) = f - f^2 / 2 + f^3 q(f).
// At most 1.43 ulp, for every x >= 0.
static float moe__log1pf(float x)
{
    float f, q, k;
    uint32_t e;
    if (!(x >= 0)) return moe__bits_f32(0x7fc00000u);
    if (!moe__is_finite(x)) return x;
    e = (moe__f32_bits(1.0f + x) - 0x3f3504f3u) & 0xff800000u; // exponent bits of 2^k: 1 + x over sqrt(1/2), cut
    k = (float)(e >> 23);
    f = moe__bits_f32(moe__f32_bits(x) - e); // x 2^-k; 2^-k - 1 is exact, so f has one rounding, none when k = 0
    f = f + (e < 0x10000000u ? moe__bits_f32(0x3f800000u - e) - 1.0f : -1.0f);
    q = 0.067491293f;
    q = moe__fmaf(q, f, -0.11672435f);
    q = moe__fmaf(q, f, 0.118847661f);
    q = moe__fmaf(q, f, -0.124060042f);
    q = moe__fmaf(q, f, 0.142202079f);
    q = moe__fmaf(q, f, -0.166679934f);
    q = moe__fmaf(q, f, 0.20002076f);
    q = moe__fmaf(q, f, -0.250000089f);
    q = moe__fmaf(q, f, 0.333333135f);
    q = moe__fmaf(q, f, -0.5f);
    f = moe__fmaf(f * f, q, f);
    return moe__fmaf(k, 0.693147182f, moe__fmaf(k, -1.90465421e-9f, f));
}

// x + x^3 q(x^2) for |x| < 0.6, else 1 - 2 / (e^2|x| + 1). At most 1.34 ulp, for every x.
static float moe__tanhf(float x)
{
    float a = moe__absf(x), s, q;
    if (a < 0.6f) {
        s = x * x;
        q = -0.00589796668f;
        q = moe__fmaf(q, s, 0.0207986254f);
        q = moe__fmaf(q, s, -0.0537847169f);
        q = moe__fmaf(q, s, 0.133319363f);
        q = moe__fmaf(q, s, -0.333332986f);
        return moe__fmaf(x * s, q, x);
    }
    q = 1.0f - 2.0f / (moe__expf(2.0f * a) + 1.0f);
    return x < 0 ? -q : q;
}

// x + x q(x^2) for |x| < 0.92, else 1 - exp(-|x| q(|x|)). At most 1.11 ulp, for every x.
static float moe__erff(float x)
{
    float a = moe__absf(x), s, q;
    if (a < 0.92f) {
        s = x * x;
        q = 7.99249465e-05f;
        q = moe__fmaf(q, s, -0.000804914627f);
        q = moe__fmaf(q, s, 0.00519237667f);
        q = moe__fmaf(q, s, -0.0268557277f);
        q = moe__fmaf(q, s, 0.112836257f);
        q = moe__fmaf(q, s, -0.376126289f);
        q = moe__fmaf(q, s, 0.128379166f);
        return moe__fmaf(x, q, x);
    }
    if (moe__is_nan(x)) return x;
    if (a > 4.0f) a = 4.0f; // 1 - 1.5e-8 is 1 in fp32
    q = 1.07662909e-05f;
    q = moe__fmaf(q, a, -0.000318091654f);
    q = moe__fmaf(q, a, 0.00362305064f);
    q = moe__fmaf(q, a, -0.0237204656f);
    q = moe__fmaf(q, a, 0.106187932f);
    q = moe__fmaf(q, a, 0.635181308f);
    q = moe__fmaf(q, a, 1.12864101f);
    q = 1.0f - moe__expf(-(a * q));
    return x < 0 ? -q : q;
}

// 1 / (1 + e^-x), by e^-|x|, so that nothing overflows and small results keep their precision. At most 2.41 ulp, for
// every x.
static float moe__sigmoidf(float x)
{
    float e = moe__expf(-moe__absf(x));
    return (x < 0 ? e : 1.0f) / (1.0f + e);
}

// log(1 + e^x). At most 1.71 ulp, for every x.
static float moe__softplusf(float x)
{
    float tail = moe__log1pf(moe__expf(-moe__absf(x)));
    return x > 0 ? x + tail : tail;
}

// Square root of softplus; below -20 that is e^(x / 2) to within 2^-30, and does not go through denormals. At
// most 1.34 ulp, for every x.
static float moe__sqrt_softplusf(float x)
{
    return x < -20.0f ? moe__expf(0.5f * x) : moe__sqrtf(moe__softplusf(x));
}

// >>json  JSON in place  A text is checked once, from end to end: after moe__json_parse() has succeeded, values are
// walked without errors, without allocation and without recursion, each as the span of its text. Used for config.json,
// quantisation configs, safetensors headers and indices. Beyond JSON it takes the numbers Infinity, -Infinity and NaN,
// as Python writes them.
#ifndef MOE_NO_CONFIG

enum { MOE__JSON_DEPTH = 32 };

typedef enum moe__json_kind {
    MOE__JSON_NONE = 0, // absent
    MOE__JSON_NULL,
    MOE__JSON_BOOL,
    MOE__JSON_NUMBER,
    MOE__JSON_STRING,
    MOE__JSON_ARRAY,
    MOE__JSON_OBJECT
} moe__json_kind;

typedef struct moe__json { // a value of a checked text
    const char *at, *end;
} moe__json;

typedef struct moe__json_iter {
    const char *at, *end; // behind the bracket, or behind an element
    int32_t object;
} moe__json_iter;

// ---- characters ----

static const char *moe__json_space(const char *at, const char *end)
{
    while (at < end && (*at == ' ' || *at == '\n' || *at == '\r' || *at == '\t')) at++;
    return at;
}

static int32_t moe__hex_digit(char c)
{
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
}

static int32_t moe__json_hex4(const char *at, const char *end)
{
    int32_t value = 0;
    if (end - at < 4) return -1;
    for (int32_t i = 0; i < 4; i++) {
        int32_t digit = moe__hex_digit(at[i]);
        if (digit < 0) return -1;
        value = value * 16 + digit;
    }
    return value;
}

// Length of the UTF-8 sequence at `at`, 0 when it is none: too long, a surrogate, above U+10FFFF, or cut off.
static int32_t moe__utf8_length(const char *at, const char *end)
{
    const unsigned char *p = (const unsigned char *)at;
    unsigned low = 0x80, high = 0xbf;
    int32_t length = p[0] < 0x80 ? 1 : p[0] < 0xc2 ? 0 : p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3 : p[0] < 0xf5 ? 4 : 0;
    if (length == 0 || end - at < length) return 0;
    if (p[0] == 0xe0) low = 0xa0;
    if (p[0] == 0xed) high = 0x9f;
    if (p[0] == 0xf0) low = 0x90;
    if (p[0] == 0xf4) high = 0x8f;
    if (length > 1 && (p[1] < low || p[1] > high)) return 0;
    for (int32_t i = 2; i < length; i++)
        if ((p[i] & 0xc0) != 0x80) return 0;
    return length;
}

static int32_t moe__utf8_encode(uint32_t c, char *out)
{
    if (c < 0x80) { out[0] = (char)c; return 1; }
    if (c < 0x800) {
        out[0] = (char)(0xc0 | c >> 6);
        out[1] = (char)(0x80 | (c & 0x3f));
        return 2;
    }
    if (c < 0x10000) {
        out[0] = (char)(0xe0 | c >> 12);
        out[1] = (char)(0x80 | (c >> 6 & 0x3f));
        out[2] = (char)(0x80 | (c & 0x3f));
        return 3;
    }
    out[0] = (char)(0xf0 | c >> 18);
    out[1] = (char)(0x80 | (c >> 12 & 0x3f));
    out[2] = (char)(0x80 | (c >> 6 & 0x3f));
    out[3] = (char)(0x80 | (c & 0x3f));
    return 4;
}

// The character at *at inside a string: its UTF-8 into out[4], *at moved on. Returns its length; 0 with *expected set
// when it is malformed. The closing quote is not a character.
static int32_t moe__json_char(const char **at, const char *end, char *out, const char **expected)
{
    static const char escapes[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    const char *p = *at;
    int32_t length, code;
    if ((unsigned char)*p < 0x20) { *expected = "no control character in a string"; return 0; }
    if (*p != '\\') {
        length = moe__utf8_length(p, end);
        if (length == 0) { *expected = "valid UTF-8"; return 0; }
        memcpy(out, p, (size_t)length);
        *at = p + length;
        return length;
    }
    *expected = "an escape: \\\" \\\\ \\/ \\b \\f \\n \\r \\t or \\u and four hex digits";
    if (end - p < 2) return 0;
    for (int32_t i = 0; i < 8; i++) {
        if (p[1] != escapes[i]) continue;
        out[0] = meanings[i];
        *at = p + 2;
        return 1;
    }
    if (p[1] != 'u' || (code = moe__json_hex4(p + 2, end)) < 0) return 0;
    p += 6;
    if (code >= 0xd800 && code < 0xe000) {
        int32_t low = end - p >= 6 && p[0] == '\\' && p[1] == 'u' ? moe__json_hex4(p + 2, end) : -1;
        if (code >= 0xdc00 || low < 0xdc00 || low >= 0xe000) { *expected = "a pair of surrogates"; return 0; }
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
        p += 6;
    }
    *at = p;
    return moe__utf8_encode((uint32_t)code, out);
}

// ---- the check ----

static const char *moe__json_check_string(const char *at, const char *end, const char **expected)
{
    char out[4];
    const char *wanted = NULL;
    for (at++; at < end && *at != '"';) {
        if (moe__json_char(&at, end, out, &wanted) > 0) continue;
        *expected = wanted;
        return at;
    }
    if (at < end) return at + 1;
    *expected = "'\"' at the end of a string";
    return at;
}

static const char *moe__json_digits(const char *at, const char *end)
{
    while (at < end && *at >= '0' && *at <= '9') at++;
    return at;
}

// Behind the number at `at`, or NULL when there is none.
static const char *moe__json_scan_number(const char *at, const char *end)
{
    const char *start;
    if (end - at >= 3 && memcmp(at, "NaN", 3) == 0) return at + 3;
    if (at < end && *at == '-') at++;
    if (end - at >= 8 && memcmp(at, "Infinity", 8) == 0) return at + 8;
    start = at;
    at = moe__json_digits(at, end);
    if (at == start || (at - start > 1 && *start == '0')) return NULL;
    if (at < end && *at == '.') {
        start = ++at;
        at = moe__json_digits(at, end);
        if (at == start) return NULL;
    }
    if (at < end && (*at == 'e' || *at == 'E')) {
        at++;
        if (at < end && (*at == '+' || *at == '-')) at++;
        start = at;
        at = moe__json_digits(at, end);
        if (at == start) return NULL;
    }
    return at;
}

// A value that is not a container: behind it; *expected set when there is none.
static const char *moe__json_check_scalar(const char *at, const char *end, const char **expected)
{
    static const char *const words[] = { "true", "false", "null" };
    const char *behind;
    if (at < end && *at == '"') return moe__json_check_string(at, end, expected);
    for (int32_t i = 0; i < 3; i++)
        if ((size_t)(end - at) >= strlen(words[i]) && memcmp(at, words[i], strlen(words[i])) == 0)
            return at + strlen(words[i]);
    behind = moe__json_scan_number(at, end);
    if (behind != NULL) return behind;
    *expected = at < end && (*at == '-' || (*at >= '0' && *at <= '9')) ? "a number as JSON writes it" : "a value";
    return at;
}

// A name and its colon, behind which a value stands.
static const char *moe__json_check_key(const char *at, const char *end, const char **expected)
{
    if (at == end || *at != '"') { *expected = "a name in quotes"; return at; }
    at = moe__json_check_string(at, end, expected);
    if (*expected != NULL) return at;
    at = moe__json_space(at, end);
    if (at == end || *at != ':') { *expected = "':'"; return at; }
    return moe__json_space(at + 1, end);
}

// Walks the whole text. *expected stays NULL when it is one JSON value; else the return value is where it is not.
static const char *moe__json_check(const char *at, const char *end, const char **expected)
{
    uint32_t objects = 0; // bit d: the container at depth d + 1 is an object
    int32_t depth = 0;
    for (at = moe__json_space(at, end); *expected == NULL;) {
        int32_t opened = 0;
        if (at < end && (*at == '{' || *at == '[')) {
            if (depth == MOE__JSON_DEPTH) { *expected = "at most 32 levels of nesting"; return at; }
            objects = (objects & ~((uint32_t)1 << depth)) | (uint32_t)(*at == '{') << depth;
            depth++;
            opened = 1;
            at = moe__json_space(at + 1, end);
        } else {
            at = moe__json_check_scalar(at, end, expected);
            if (*expected != NULL) return at;
            at = moe__json_space(at, end);
        }
        while (depth > 0) { // behind a value, or behind an opening bracket
            int32_t object = (int32_t)(objects >> (depth - 1) & 1);
            if (at < end && *at == (object ? '}' : ']')) {
                at = moe__json_space(at + 1, end);
                depth--;
                opened = 0;
                continue;
            }
            if (!opened) {
                if (at == end || *at != ',') { *expected = object ? "',' or '}'" : "',' or ']'"; return at; }
                at = moe__json_space(at + 1, end);
            }
            if (object) at = moe__json_check_key(at, end, expected);
            break;
        }
        if (depth == 0) {
            if (*expected == NULL && at != end) *expected = "nothing behind the value";
            return at;
        }
    }
    return at;
}

// ---- walking a checked text ----

static const char *moe__json_skip_string(const char *at)
{
    for (at++; *at != '"'; at++)
        if (*at == '\\') at++;
    return at + 1;
}

static const char *moe__json_skip(const char *at, const char *end)
{
    int32_t depth = 0;
    do {
        if (*at == '"') { at = moe__json_skip_string(at); continue; }
        if (*at == '{' || *at == '[') depth++;
        if (*at == '}' || *at == ']') depth--;
        at++;
        if (depth > 0) continue;
        if (at[-1] == '}' || at[-1] == ']') return at;
        while (at < end && *at != ',' && *at != '}' && *at != ']' && moe__json_space(at, at + 1) == at) at++;
    } while (depth > 0);
    return at;
}

static moe__json moe__json_none(void)
{
    moe__json none;
    none.at = none.end = NULL;
    return none;
}

// Checks `text` and gives its value. `name` is how messages call it: "config.json".
static int32_t moe__json_parse(const char *text, size_t size, const char *name, moe__json *out, moe_error *err)
{
    const char *expected = NULL, *stop;
    *out = moe__json_none();
    stop = moe__json_check(text, text + size, &expected);
    if (expected != NULL)
        return moe__fail(err, MOE_ERROR_FORMAT, "", "%s is not JSON: byte %U%s: expected %s", name,
                         (uint64_t)(stop - text), stop == text + size ? ", where it ends" : "", expected);
    out->at = moe__json_space(text, text + size);
    out->end = moe__json_skip(out->at, text + size);
    return MOE_OK;
}

static moe__json_kind moe__json_kind_of(moe__json value)
{
    if (value.at == NULL) return MOE__JSON_NONE;
    switch (*value.at) {
    case '{': return MOE__JSON_OBJECT;
    case '[': return MOE__JSON_ARRAY;
    case '"': return MOE__JSON_STRING;
    case 't': case 'f': return MOE__JSON_BOOL;
    case 'n': return MOE__JSON_NULL;
    default: return MOE__JSON_NUMBER;
    }
}

// Over the members of an object or the elements of an array; nothing in anything else.
static moe__json_iter moe__json_begin(moe__json value)
{
    moe__json_iter iter;
    moe__json_kind kind = moe__json_kind_of(value);
    iter.at = kind >= MOE__JSON_ARRAY ? value.at + 1 : NULL;
    iter.end = value.end;
    iter.object = kind == MOE__JSON_OBJECT;
    return iter;
}

// 1 and the next member (key: its name) or element (key: none), 0 behind the last one.
static int32_t moe__json_step(moe__json_iter *iter, moe__json *key, moe__json *value)
{
    const char *at = iter->at;
    if (at == NULL) return 0;
    at = moe__json_space(at, iter->end);
    if (*at == ',') at = moe__json_space(at + 1, iter->end);
    if (*at == '}' || *at == ']') return 0;
    *key = moe__json_none();
    if (iter->object) {
        key->at = at;
        at = key->end = moe__json_skip_string(at);
        at = moe__json_space(at, iter->end) + 1; // the colon
        at = moe__json_space(at, iter->end);
    }
    value->at = at;
    iter->at = value->end = moe__json_skip(at, iter->end);
    return 1;
}

static int32_t moe__json_count(moe__json value)
{
    moe__json_iter iter = moe__json_begin(value);
    moe__json k, v;
    int32_t count = 0;
    while (count < INT32_MAX && moe__json_step(&iter, &k, &v)) count++;
    return count;
}

// A string's bytes into out, decoded and terminated. Returns its length, which is >= capacity where it did not fit.
static size_t moe__json_string(moe__json value, char *out, size_t capacity)
{
    size_t length = 0;
    const char *at = value.at, *expected = NULL;
    if (capacity > 0) out[0] = 0;
    if (moe__json_kind_of(value) != MOE__JSON_STRING) return 0;
    for (at++; at < value.end - 1;) {
        char bytes[4];
        int32_t n = moe__json_char(&at, value.end, bytes, &expected);
        if (length + (size_t)n < capacity) {
            memcpy(out + length, bytes, (size_t)n);
            out[length + (size_t)n] = 0;
        } else {
            capacity = 0; // what follows must not close the gap
        }
        length += (size_t)n;
    }
    return length;
}

static int32_t moe__json_equals(moe__json value, const char *string)
{
    const char *at = value.at, *expected = NULL;
    if (moe__json_kind_of(value) != MOE__JSON_STRING) return 0;
    for (at++; at < value.end - 1;) {
        char bytes[4];
        int32_t n = moe__json_char(&at, value.end, bytes, &expected);
        for (int32_t i = 0; i < n; i++, string++)
            if (*string == 0 || bytes[i] != *string) return 0;
    }
    return *string == 0;
}

// Member `name` of an object, the last one where there are several, as JSON readers do; none where there is none.
static moe__json moe__json_find(moe__json object, const char *name)
{
    moe__json_iter iter = moe__json_begin(object);
    moe__json key, value, found = moe__json_none();
    if (!iter.object) return found;
    while (moe__json_step(&iter, &key, &value))
        if (moe__json_equals(key, name)) found = value;
    return found;
}

static moe__json moe__json_element(moe__json array, int32_t index)
{
    moe__json_iter iter = moe__json_begin(array);
    moe__json key, value;
    if (iter.object) return moe__json_none();
    for (int32_t i = 0; moe__json_step(&iter, &key, &value); i++)
        if (i == index) return value;
    return moe__json_none();
}

static int32_t moe__json_is_true(moe__json value) { return value.at != NULL && *value.at == 't'; }

// ---- numbers, without the locale ----

static double moe__pow10(int32_t exponent) // 0..22 is exact
{
    double result = 1, base = 10;
    for (; exponent > 0; exponent >>= 1, base *= base)
        if (exponent & 1) result *= base;
    return result;
}

// mantissa * 10^exponent: correctly rounded up to 15 digits and 10^22, else within a few units of a double's last
// place.
static double moe__decimal(uint64_t mantissa, int32_t exponent)
{
    double value = (double)mantissa;
    if (mantissa == 0) return 0;
    while (exponent < -22) {
        int32_t step = moe__min32(-22 - exponent, 22);
        if (exponent < -400) return 0;
        value /= moe__pow10(step);
        exponent += step;
    }
    if (exponent < 0) return value / moe__pow10(-exponent);
    if (exponent > 400) exponent = 400;
    for (; exponent > 22; exponent -= 22) value *= moe__pow10(22);
    return value * moe__pow10(exponent);
}

static double moe__json_scan_double(const char *at, const char *end)
{
    uint64_t mantissa = 0;
    int32_t exponent = 0, written = 0, negative = *at == '-', fraction = 0, down = 0;
    double value, infinity = 1e308 * 10;
    if (*at == 'N') return infinity - infinity;
    at += negative;
    if (*at == 'I') return negative ? -infinity : infinity;
    for (; at < end && *at != 'e' && *at != 'E'; at++) {
        if (*at == '.') { fraction = 1; continue; }
        if (mantissa < UINT64_MAX / 10 - 1) {
            mantissa = mantissa * 10 + (uint64_t)(*at - '0');
            if (fraction && exponent > -100000) exponent--;
        } else if (!fraction && exponent < 100000) {
            exponent++;
        }
    }
    if (at < end) {
        at++;
        down = *at == '-';
        if (*at == '-' || *at == '+') at++;
        for (; at < end; at++)
            if (written < 100000) written = written * 10 + (*at - '0');
    }
    value = moe__decimal(mantissa, exponent + (down ? -written : written));
    return negative ? -value : value;
}

// 1 and the number: also of {"__float__": "Infinity"}, as transformers re-saves it. 0 when the value is none.
static int32_t moe__json_double(moe__json value, double *out)
{
    if (moe__json_kind_of(value) == MOE__JSON_OBJECT) {
        static const char *const names[] = { "Infinity", "-Infinity", "NaN" };
        moe__json inner = moe__json_find(value, "__float__");
        for (int32_t i = 0; i < 3; i++) {
            if (!moe__json_equals(inner, names[i])) continue;
            *out = moe__json_scan_double(names[i], names[i] + strlen(names[i]));
            return 1;
        }
        return 0;
    }
    if (moe__json_kind_of(value) != MOE__JSON_NUMBER) return 0;
    *out = moe__json_scan_double(value.at, value.end);
    return 1;
}

// 1 and the integer when the number is one that fits, exactly; 8.0 and 8e0 are integers too.
static int32_t moe__json_int64(moe__json value, int64_t *out)
{
    uint64_t magnitude = 0;
    const char *at;
    double number;
    int32_t negative;
    if (moe__json_kind_of(value) != MOE__JSON_NUMBER) return 0;
    negative = *value.at == '-';
    for (at = value.at + negative; at < value.end && *at >= '0' && *at <= '9'; at++) {
        if (magnitude > (uint64_t)INT64_MAX / 10) return 0;
        magnitude = magnitude * 10 + (uint64_t)(*at - '0');
    }
    if (at < value.end) {
        number = moe__json_scan_double(value.at, value.end);
        if (!(number > -9007199254740992.0 && number < 9007199254740992.0)) return 0;
        *out = (int64_t)number;
        return (double)*out == number;
    }
    if (magnitude > (uint64_t)INT64_MAX) return 0;
    *out = negative ? -(int64_t)magnitude : (int64_t)magnitude;
    return 1;
}
#endif // MOE_NO_CONFIG

// >>routing  logits -> experts and weights
// moe__routing_token() is the one definition of routing: the reference and the CPU back end call it, the device text
// repeats it operation by operation. All in fp32, so ids, their order and the weights are the same bits everywhere:
// * A sum has 32 lanes: lane l adds elements l, l + 32, l + 64, ... in order to 0, then lanes are added by butterfly
//   (lane ^ 16, ^ 8, ^ 4, ^ 2, ^ 1). Softmax subtracts the maximum, and divides each exponential by their sum.
// * Keys compare as numbers: -0 equals +0, ties go to the lower id (of groups too). Slots are in falling order of key.
// * -inf is legal: the score is 0 (also the raw one, as a weight); in a softmax over nothing else every one is 0. (A
//   soft cap c makes -c of it.) NaN and +inf are errors, in logits (also when the multiplier makes them) and in keys.
// * 0 divided by any sum is 0.
// Behind resolve no 0 stands for another value, and every combination that is left is defined.

// ---- named values ----

MOE_API const char *moe_activation_string(int32_t activation)
{
    static const moe__name names[] = {
        { MOE_ACTIVATION_SWIGLU, "swiglu" },       { MOE_ACTIVATION_SWIGLU_STEP, "swiglu_step" },
        { MOE_ACTIVATION_GEGLU_ERF, "geglu_erf" }, { MOE_ACTIVATION_GEGLU_TANH, "geglu_tanh" },
        { MOE_ACTIVATION_SITU, "situ" },           { MOE_ACTIVATION_SILU, "silu" },
        { MOE_ACTIVATION_GELU_ERF, "gelu_erf" },   { MOE_ACTIVATION_GELU_TANH, "gelu_tanh" },
        { MOE_ACTIVATION_RELU, "relu" },           { MOE_ACTIVATION_RELU2, "relu2" },
        { MOE_ACTIVATION_RELU2_CLAMP, "relu2_clamp" }, { MOE_ACTIVATION_IDENTITY, "identity" },
    };
    return moe__name_find(names, MOE__ARRAY_COUNT(names), activation, "?");
}

MOE_API int32_t moe_activation_is_gated(int32_t activation)
{
    if (activation >= MOE_ACTIVATION_SWIGLU && activation <= MOE_ACTIVATION_SITU) return 1;
    if (activation >= MOE_ACTIVATION_SILU && activation <= MOE_ACTIVATION_IDENTITY) return 0;
    return -1;
}

static const moe__name moe__routing_methods[] = {
    { MOE_ROUTING_DEFAULT, "Default" },
    { MOE_ROUTING_RENORMALIZE, "Renormalize" },
    { MOE_ROUTING_DEEPSEEK_V3, "DeepSeekV3" },
    { MOE_ROUTING_LLAMA4, "Llama4" },
    { MOE_ROUTING_RENORMALIZE_NAIVE, "RenormalizeNaive" },
    { MOE_ROUTING_TOPK, "TopK" },
    { MOE_ROUTING_SIGMOID_RENORM, "SigmoidRenorm" },
    { MOE_ROUTING_MINIMAX2, "MiniMax2" },
    { MOE_ROUTING_SIGMOID, "Sigmoid" },
    { MOE_ROUTING_TOPK_SIGMOID, "TopKSigmoid" },
    { MOE_ROUTING_DEEPSEEK_V4, "DeepSeekV4" },
    { MOE_ROUTING_CUSTOM, "Custom" },
    { MOE_ROUTING_SIMULATED, "Simulated" },
    { MOE_ROUTING_DEEPSEEK_V2, "DeepSeekV2" },
    { MOE_ROUTING_DEEPSEEK_V41, "DeepSeekV41" },
    { MOE_ROUTING_ERNIE45, "Ernie45" },
    { MOE_ROUTING_LONGCAT, "LongCat" },
    { MOE_ROUTING_GEMMA4, "Gemma4" },
    { MOE_ROUTING_PHIMOE, "PhiMoE" },
    { MOE_ROUTING_MISTRAL4, "Mistral4" },
    { MOE_ROUTING_INKLING, "Inkling" },
    { MOE_ROUTING_KOLIBRI, "Kolibri" },
};

MOE_API const char *moe_routing_method_string(int32_t method)
{
    if (method == MOE_ROUTING_UNSPECIFIED) return "Unspecified";
    return moe__name_find(moe__routing_methods, MOE__ARRAY_COUNT(moe__routing_methods), method, "?");
}

// ---- validation ----

static int32_t moe__routing_slots(const moe_routing_desc *r) { return r->top_k + r->extra_slots; }

static int32_t moe__routing_width(const moe_routing_desc *r, int32_t num_experts)
{
    return num_experts + r->special_experts + (r->extra_scored ? r->extra_slots : 0);
}

// Where a routing descriptor stands in the caller's words ("layer.routing."), for messages.
typedef struct moe__routing_check {
    const char *path;
    char member[92];
    moe_error *err;
} moe__routing_check;

static const char *moe__routing_member(moe__routing_check *check, const char *name)
{
    moe__text text = moe__text_make(check->member, sizeof check->member);
    moe__text_format(&text, "%s%s", check->path, name);
    return check->member;
}

static int32_t moe__routing_refuse(moe__routing_check *check, const char *name, int32_t value, const char *legal)
{
    return moe__fail(check->err, MOE_ERROR_ARGUMENT, moe__routing_member(check, name), "is %d: %s", value, legal);
}

static int32_t moe__routing_refuse_range(moe__routing_check *check, const char *name, int32_t value, int32_t low,
                                         int32_t high)
{
    return moe__fail_range(check->err, moe__routing_member(check, name), value, low, high);
}

typedef struct moe__routing_range {
    const char *name;
    size_t offset;
    int32_t low, high;
} moe__routing_range;

// Every integer within its own range; how they go together is looked at afterwards.
static int32_t moe__routing_check_ranges(moe__routing_check *check, const moe_routing_desc *r)
{
#define MOE__RANGE(name, low, high) { #name, offsetof(moe_routing_desc, name), low, high }
    static const moe__routing_range ranges[] = {
        MOE__RANGE(score, MOE_SCORE_RAW, MOE_SCORE_SQRT_SOFTPLUS),
        MOE__RANGE(score_order, MOE_SCORE_BEFORE_TOPK, MOE_SCORE_AFTER_TOPK),
        MOE__RANGE(select, MOE_SELECT_AUTO, MOE_SELECT_LOGIT),
        MOE__RANGE(top_k, 1, MOE_MAX_TOP_K),
        MOE__RANGE(bias_rows, 0, 1024),
        MOE__RANGE(groups, 0, MOE_MAX_EXPERTS),
        MOE__RANGE(groups_kept, 0, MOE_MAX_EXPERTS),
        MOE__RANGE(group_rule, MOE_GROUP_NONE, MOE_GROUP_EACH),
        MOE__RANGE(group_excluded, MOE_EXCLUDED_NEG_INF, MOE_EXCLUDED_ZERO),
        MOE__RANGE(renormalize, MOE_RENORMALIZE_OFF, MOE_RENORMALIZE_CLAMP_MIN),
        MOE__RANGE(zero_sum, MOE_ZERO_SUM_DIVIDE, MOE_ZERO_SUM_ONE),
        MOE__RANGE(scale_on, MOE_SCALE_ON_WEIGHTS, MOE_SCALE_ON_OUTPUT),
        MOE__RANGE(per_expert_scale, 0, 1),
        MOE__RANGE(weight_on, MOE_WEIGHT_ON_OUTPUT, MOE_WEIGHT_ON_INPUT),
        MOE__RANGE(forced_rows, 0, INT32_MAX),
        MOE__RANGE(marked_token_lo, 0, INT32_MAX),
        MOE__RANGE(marked_token_hi, 0, INT32_MAX),
        MOE__RANGE(special_experts, 0, MOE_MAX_EXPERTS),
        MOE__RANGE(special_kind, MOE_SPECIAL_NONE, MOE_SPECIAL_CONSTANT),
        MOE__RANGE(extra_slots, 0, MOE_MAX_EXTRA_SLOTS),
        MOE__RANGE(extra_scored, 0, 1),
        MOE__RANGE(global_scale, 0, 1),
        MOE__RANGE(simulate, MOE_SIMULATE_OFF, MOE_SIMULATE_ROUND_ROBIN),
    };
#undef MOE__RANGE
    if (r->score == MOE_SCORE_UNSET)
        return moe__fail(check->err, MOE_ERROR_ARGUMENT, moe__routing_member(check, "score"),
                         "is not set: it must be a moe_score");
    if (r->score_order == MOE_SCORE_ORDER_UNSET)
        return moe__fail(check->err, MOE_ERROR_ARGUMENT, moe__routing_member(check, "score_order"),
                         "is not set: it must be a moe_score_order");
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(ranges); i++) {
        int32_t value;
        memcpy(&value, (const unsigned char *)r + ranges[i].offset, sizeof value);
        if (value < ranges[i].low || value > ranges[i].high)
            return moe__routing_refuse_range(check, ranges[i].name, value, ranges[i].low, ranges[i].high);
    }
    return MOE_OK;
}

static int32_t moe__routing_check_floats(moe__routing_check *check, const moe_routing_desc *r)
{
    const struct { const char *name; float value, low; const char *legal; } floats[] = {
        { "logit_multiplier", r->logit_multiplier, 0, "it must be finite and above 0 (0 means 1)" },
        { "logit_softcap", r->logit_softcap, 0, "it must be finite and above 0, or 0 for none" },
        { "renormalize_epsilon", r->renormalize_epsilon, 0, "it must be finite and not below 0" },
        { "scale", r->scale, -3.4028235e38f, "it must be finite (0 means 1)" },
        { "extra_weight", r->extra_weight, -3.4028235e38f, "it must be finite (0 means 1)" },
        { "sparse_mixer", r->sparse_mixer, 0, "it must be finite and above 0, or 0 for off" },
    };
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(floats); i++)
        if (!moe__is_finite(floats[i].value) || floats[i].value < floats[i].low)
            return moe__fail(check->err, MOE_ERROR_ARGUMENT, moe__routing_member(check, floats[i].name), "is %g: %s",
                             (double)floats[i].value, floats[i].legal);
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(r->reserved); i++)
        if (r->reserved[i] != 0)
            return moe__fail(check->err, MOE_ERROR_ARGUMENT, moe__routing_member(check, "reserved"),
                             "is not zero: zero-initialise the struct");
    return MOE_OK;
}

static int32_t moe__routing_check_groups(moe__routing_check *check, moe_routing_desc *r, int32_t num_experts)
{
    int32_t size;
    if (r->groups <= 1) {
        if (r->groups_kept > 1)
            return moe__routing_refuse(check, "groups_kept", r->groups_kept,
                                       "there are no groups, so it must be 0 (or 1)");
        r->groups = r->groups_kept = 0;
        return MOE_OK;
    }
    if (r->groups > num_experts || num_experts % r->groups != 0)
        return moe__fail(check->err, MOE_ERROR_ARGUMENT, moe__routing_member(check, "groups"),
                         "is %d: it must divide the number of experts, %d", r->groups, num_experts);
    if (r->special_experts > 0)
        return moe__routing_refuse(check, "groups", r->groups,
                                   "special experts are in no group, so with them it must be 0");
    size = num_experts / r->groups;
    if (r->group_rule == MOE_GROUP_NONE)
        return moe__routing_refuse(check, "group_rule", r->group_rule,
                                   "with groups it must say how they rank, MOE_GROUP_MAX, _TOP2_SUM or _EACH");
    if (r->group_rule == MOE_GROUP_EACH) {
        if (r->groups_kept == 0) r->groups_kept = r->groups;
        if (r->groups_kept != r->groups)
            return moe__fail(check->err, MOE_ERROR_ARGUMENT, moe__routing_member(check, "groups_kept"),
                             "is %d: MOE_GROUP_EACH keeps all, so it must be 0 or %d", r->groups_kept, r->groups);
        if (r->top_k % r->groups != 0 || r->top_k / r->groups > size)
            return moe__fail(check->err, MOE_ERROR_ARGUMENT, moe__routing_member(check, "top_k"),
                             "is %d: MOE_GROUP_EACH takes top_k / groups experts of each group, so it must be a "
                             "multiple of %d, at most %d", r->top_k, r->groups, num_experts);
        return MOE_OK;
    }
    if (r->group_rule == MOE_GROUP_TOP2_SUM && size < 2)
        return moe__fail(check->err, MOE_ERROR_ARGUMENT, moe__routing_member(check, "groups"),
                         "is %d: MOE_GROUP_TOP2_SUM needs two experts in a group, so it must be at most %d", r->groups,
                         num_experts / 2);
    if (r->groups_kept < 1 || r->groups_kept > r->groups)
        return moe__routing_refuse_range(check, "groups_kept", r->groups_kept, 1, r->groups);
    if (r->top_k > r->groups_kept * size)
        return moe__fail(check->err, MOE_ERROR_ARGUMENT, moe__routing_member(check, "top_k"),
                         "is %d: the %d groups kept have %d experts", r->top_k, r->groups_kept, r->groups_kept * size);
    return MOE_OK;
}

static int32_t moe__routing_check_sparse_mixer(moe__routing_check *check, const moe_routing_desc *r)
{
    const struct { const char *name; int32_t value, legal; const char *text; } needs[] = {
        { "score", r->score, MOE_SCORE_SOFTMAX, "sparse_mixer is a softmax, so it must be MOE_SCORE_SOFTMAX" },
        { "score_order", r->score_order, MOE_SCORE_AFTER_TOPK, "with sparse_mixer it must be MOE_SCORE_AFTER_TOPK" },
        { "bias_rows", r->bias_rows, 0, "with sparse_mixer it must be 0" },
        { "groups", r->groups, 0, "with sparse_mixer it must be 0" },
        { "renormalize", r->renormalize, 0, "with sparse_mixer it must be MOE_RENORMALIZE_OFF" },
        { "forced_rows", r->forced_rows, 0, "with sparse_mixer it must be 0" },
        { "extra_scored", r->extra_scored, 0, "with sparse_mixer it must be 0" },
    };
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(needs) && r->sparse_mixer != 0; i++)
        if (needs[i].value != needs[i].legal)
            return moe__routing_refuse(check, needs[i].name, needs[i].value, needs[i].text);
    return MOE_OK;
}

static int32_t moe__routing_check_sizes(moe__routing_check *check, const moe_routing_desc *r, int32_t num_experts)
{
    int32_t ranked = num_experts + r->special_experts;
    if (ranked > MOE_MAX_EXPERTS)
        return moe__fail(check->err, MOE_ERROR_ARGUMENT, moe__routing_member(check, "special_experts"),
                         "is %d: with %d experts it must be at most %d", r->special_experts, num_experts,
                         MOE_MAX_EXPERTS - num_experts);
    if (ranked + r->extra_slots > MOE_MAX_EXPERTS)
        return moe__fail(check->err, MOE_ERROR_ARGUMENT, moe__routing_member(check, "extra_slots"),
                         "is %d: with %d experts it must be at most %d", r->extra_slots, ranked,
                         MOE_MAX_EXPERTS - ranked);
    if (r->top_k > ranked)
        return moe__fail(check->err, MOE_ERROR_ARGUMENT, moe__routing_member(check, "top_k"),
                         "is %d: there are %d experts to choose from", r->top_k, ranked);
    if (r->simulate != MOE_SIMULATE_OFF && r->top_k > num_experts)
        return moe__fail(check->err, MOE_ERROR_ARGUMENT, moe__routing_member(check, "top_k"),
                         "is %d: simulated routing takes routed experts only, of which there are %d", r->top_k,
                         num_experts);
    if (r->special_experts > 0 && r->special_kind == MOE_SPECIAL_NONE)
        return moe__fail(check->err, MOE_ERROR_ARGUMENT, moe__routing_member(check, "special_kind"),
                         "is not set: with special experts it must be a moe_special");
    if (r->marked_token_lo > r->marked_token_hi)
        return moe__fail(check->err, MOE_ERROR_ARGUMENT, moe__routing_member(check, "marked_token_lo"),
                         "is %d: it must not be above marked_token_hi, %d", r->marked_token_lo, r->marked_token_hi);
    return MOE_OK;
}

// moe__routing_resolve() for a descriptor that the caller knows as `path`.
static int32_t moe__routing_resolve_as(moe_routing_desc *r, int32_t num_experts, const char *path, moe_error *err)
{
    moe__routing_check check;
    int32_t result;
    check.path = path;
    check.err = err;
    if ((result = moe__routing_check_ranges(&check, r)) != MOE_OK ||
        (result = moe__routing_check_floats(&check, r)) != MOE_OK ||
        (result = moe__routing_check_sizes(&check, r, num_experts)) != MOE_OK ||
        (result = moe__routing_check_groups(&check, r, num_experts)) != MOE_OK ||
        (result = moe__routing_check_sparse_mixer(&check, r)) != MOE_OK)
        return result;
    if (r->score_order == MOE_SCORE_AFTER_TOPK && r->select == MOE_SELECT_SCORE)
        return moe__routing_refuse(&check, "select", r->select,
                                   "scores come after top-k, so it must be MOE_SELECT_LOGIT");
    if (r->select == MOE_SELECT_AUTO)
        r->select = r->score_order == MOE_SCORE_BEFORE_TOPK ? MOE_SELECT_SCORE : MOE_SELECT_LOGIT;
    if (r->logit_multiplier == 0) r->logit_multiplier = 1;
    if (r->scale == 0) r->scale = 1;
    if (r->extra_slots == 0) r->extra_scored = 0;
    if (r->extra_weight == 0) r->extra_weight = 1;
    if (r->special_experts == 0) r->special_kind = MOE_SPECIAL_NONE;
    if (r->marked_token_lo == r->marked_token_hi) r->marked_token_lo = r->marked_token_hi = 0;
    r->struct_size = sizeof *r;
    return MOE_OK;
}

// Validates and fills defaults in. num_experts is in range.
static int32_t moe__routing_resolve(moe_routing_desc *r, int32_t num_experts, moe_error *err)
{
    return moe__routing_resolve_as(r, num_experts, "layer.routing.", err);
}

// ---- one token ----

// What the routing of a token needs beside its logits.
typedef struct moe__router {
    const moe_routing_desc *desc;  // resolved
    int32_t num_experts;
    const float *bias;             // [bias_rows][E + S]
    const float *per_expert_scale; // [E + S]
    const int32_t *forced_ids;     // [forced_rows][top_k], all within 0..E+S-1
    float scale;                   // of the weights: desc->scale times the global scale
} moe__router;

// Bits of what is wrong with a token. Its ids are then -1 and its weights 0.
enum {
    MOE__ROUTED = 0,
    MOE__ROUTED_NAN = 1,        // a logit or a key is NaN or +inf
    MOE__ROUTED_TOKEN_ID = 2,   // no row of the forced table
    MOE__ROUTED_BIAS_INDEX = 4  // no row of the selection bias
};

#define MOE__INFINITY moe__bits_f32(0x7f800000u)

// For one thread; 8-aligned.
static uint64_t moe__routing_scratch_bytes(const moe_routing_desc *r, int32_t num_experts)
{
    uint64_t width = (uint64_t)moe__routing_width(r, num_experts);
    uint64_t ranks = (uint64_t)moe__max32(r->top_k, r->groups_kept);
    return ranks * sizeof(uint64_t) + (3 * width + (uint64_t)r->groups) * sizeof(float);
}

static float moe__lane_sum(const float *x, int32_t n)
{
    float lane[32];
    for (int32_t l = 0; l < 32; l++) lane[l] = 0;
    for (int32_t i = 0; i < n; i += 32)
        for (int32_t l = 0; l < 32 && l < n - i; l++) lane[l] = lane[l] + x[i + l];
    for (int32_t step = 16; step > 0; step /= 2)
        for (int32_t l = 0; l < step; l++) lane[l] = lane[l] + lane[l + step];
    return lane[0];
}

// out may be x. No NaN and no +inf in x.
static void moe__softmax(const float *x, int32_t n, float *out)
{
    float best = -MOE__INFINITY, sum;
    for (int32_t i = 0; i < n; i++)
        if (x[i] > best) best = x[i];
    for (int32_t i = 0; i < n; i++) out[i] = best == -MOE__INFINITY ? 0 : moe__expf(x[i] - best);
    sum = moe__lane_sum(out, n);
    for (int32_t i = 0; i < n && sum > 0; i++) out[i] = out[i] / sum;
}

static void moe__routing_scores(int32_t score, const float *x, int32_t n, float *out)
{
    if (score == MOE_SCORE_SOFTMAX) { moe__softmax(x, n, out); return; }
    for (int32_t i = 0; i < n; i++)
        out[i] = score == MOE_SCORE_SIGMOID ? moe__sigmoidf(x[i])
                                            : score == MOE_SCORE_SQRT_SOFTPLUS ? moe__sqrt_softplusf(x[i]) : x[i];
}

// A number that is larger for a larger key, and with equal keys for a lower id.
static uint64_t moe__rank(float key, int32_t id)
{
    uint32_t bits = moe__f32_bits(key + 0.0f); // -0 becomes +0
    bits = (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
    return (uint64_t)bits << 32 | (0xffffffffu - (uint32_t)id);
}

static int32_t moe__rank_id(uint64_t rank) { return (int32_t)(0xffffffffu - (uint32_t)rank); }

// The k best of key[first .. first + n), best first. k <= n.
static void moe__top_k(const float *key, int32_t first, int32_t n, int32_t k, uint64_t *best)
{
    int32_t found = 0;
    for (int32_t i = first; i < first + n; i++) {
        uint64_t rank = moe__rank(key[i], i);
        int32_t at;
        if (found == k && rank < best[k - 1]) continue;
        if (found < k) found++;
        for (at = found - 1; at > 0 && best[at - 1] < rank; at--) best[at] = best[at - 1];
        best[at] = rank;
    }
}

// Ranks groups, and overwrites the keys of those that are not kept.
static void moe__routing_groups(const moe_routing_desc *r, int32_t num_experts, float *key, float *group,
                                uint64_t *best)
{
    int32_t size = num_experts / r->groups;
    float excluded = r->group_excluded == MOE_EXCLUDED_ZERO ? 0 : -MOE__INFINITY;
    for (int32_t g = 0; g < r->groups; g++) {
        const float *x = key + g * size;
        float first = -MOE__INFINITY, second = -MOE__INFINITY;
        for (int32_t i = 0; i < size; i++) {
            if (x[i] > first) { second = first; first = x[i]; }
            else if (x[i] > second) second = x[i];
        }
        group[g] = r->group_rule == MOE_GROUP_TOP2_SUM ? first + second : first;
    }
    moe__top_k(group, 0, r->groups, r->groups_kept, best);
    for (int32_t g = 0; g < r->groups; g++) group[g] = 0;
    for (int32_t j = 0; j < r->groups_kept; j++) group[moe__rank_id(best[j])] = 1;
    for (int32_t e = 0; e < num_experts; e++)
        if (group[e / size] == 0) key[e] = excluded;
}

// The ids of a token, best first. value: score or logit of the ranked experts. 0: a key is NaN or +inf.
static int32_t moe__routing_choose(const moe__router *router, const float *value, int32_t bias_row, float *key,
                                   float *group, uint64_t *best, int32_t *ids)
{
    const moe_routing_desc *r = router->desc;
    int32_t ranked = router->num_experts + r->special_experts;
    const float *bias = r->bias_rows > 0 ? router->bias + (int64_t)bias_row * ranked : NULL;
    for (int32_t i = 0; i < ranked; i++) {
        key[i] = bias != NULL ? value[i] + bias[i] : value[i];
        if (!(key[i] < MOE__INFINITY)) return 0;
    }
    if (r->groups > 1 && r->group_rule == MOE_GROUP_EACH) {
        int32_t size = ranked / r->groups, each = r->top_k / r->groups;
        for (int32_t g = 0; g < r->groups; g++) moe__top_k(key, g * size, size, each, best + g * each);
    } else {
        if (r->groups > 1) moe__routing_groups(r, ranked, key, group, best);
        moe__top_k(key, 0, ranked, r->top_k, best);
    }
    for (int32_t j = 0; j < r->top_k; j++) ids[j] = moe__rank_id(best[j]);
    return 1;
}

// PhiMoE: k times the best of the rest, weighted by a softmax over those of the rest that are close to it.
static void moe__routing_sparse_mixer(const moe_routing_desc *r, const float *logit, int32_t ranked, float *rest,
                                      float *near, uint64_t *best, int32_t *ids, float *weights)
{
    float threshold = 2.0f * r->sparse_mixer, sum;
    for (int32_t i = 0; i < ranked; i++) rest[i] = logit[i];
    for (int32_t j = 0; j < r->top_k; j++) {
        float top;
        moe__top_k(rest, 0, ranked, 1, best);
        ids[j] = moe__rank_id(best[0]);
        top = rest[ids[j]];
        for (int32_t i = 0; i < ranked; i++) {
            float size = moe__absf(logit[i]), far = (top - logit[i]) / (size > top ? size : top);
            near[i] = far > threshold || top == -MOE__INFINITY ? 0 : moe__expf(rest[i] - top);
        }
        sum = moe__lane_sum(near, ranked);
        weights[j] = sum > 0 ? 1.0f / sum : 0;
        rest[ids[j]] = -MOE__INFINITY;
    }
}

// Multiplier and soft cap. 0: a logit is NaN or +inf, or becomes it.
static int32_t moe__routing_logits(const moe_routing_desc *r, const float *logits, int32_t width, float *out)
{
    for (int32_t i = 0; i < width; i++) {
        float x = logits[i];
        if (r->logit_multiplier != 1) x = moe__mulf(x, r->logit_multiplier);
        if (!(x < MOE__INFINITY)) return 0;
        if (r->logit_softcap > 0) x = moe__mulf(r->logit_softcap, moe__tanhf(x / r->logit_softcap));
        out[i] = x;
    }
    return 1;
}

// Scores of the chosen, and of the always-on experts where the router scores them; renormalised.
static void moe__routing_weights(const moe__router *router, const float *logit, const float *score, const int32_t *ids,
                                 float *weights)
{
    const moe_routing_desc *r = router->desc;
    int32_t n = r->top_k + (r->extra_scored ? r->extra_slots : 0);
    float sum, divisor;
    for (int32_t j = 0; j < n; j++) weights[j] = (r->score_order == MOE_SCORE_BEFORE_TOPK ? score : logit)[ids[j]];
    if (r->score_order == MOE_SCORE_AFTER_TOPK) moe__routing_scores(r->score, weights, n, weights);
    for (int32_t j = 0; j < n; j++)
        if (weights[j] == -MOE__INFINITY) weights[j] = 0;
    if (r->renormalize == MOE_RENORMALIZE_OFF) return;
    divisor = sum = moe__lane_sum(weights, n);
    if (r->renormalize == MOE_RENORMALIZE_SUM) divisor = sum + r->renormalize_epsilon;
    else if (sum < r->renormalize_epsilon) divisor = r->renormalize_epsilon;
    if (r->zero_sum == MOE_ZERO_SUM_ONE && !(sum > 0)) divisor = 1;
    for (int32_t j = 0; j < n; j++)
        if (weights[j] != 0) weights[j] = weights[j] / divisor;
}

// Pseudo-random 32 bits of (seed, token, draw): splitmix64's finaliser.
static uint32_t moe__routing_random(uint32_t seed, int64_t token, int32_t draw)
{
    uint64_t z = (((uint64_t)seed << 32) ^ ((uint64_t)token << 6 | (uint64_t)draw)) + 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ (z >> 31)) >> 32);
}

// Draws without replacement, by integers: expert e weighs 1, or 2^24 / (e + 1); those drawn before weigh nothing.
static void moe__routing_simulate(const moe_routing_desc *r, int32_t num_experts, int64_t token, int32_t *ids)
{
    int32_t zipf = r->simulate == MOE_SIMULATE_ZIPF;
    uint64_t total = 0;
    for (int32_t j = 0; j < r->top_k; j++)
        ids[j] = r->simulate == MOE_SIMULATE_ROUND_ROBIN
                     ? (int32_t)(((uint64_t)token * (uint64_t)r->top_k + (uint64_t)j) % (uint64_t)num_experts) : j;
    if (r->simulate != MOE_SIMULATE_UNIFORM && !zipf) return;
    for (int32_t e = 0; e < num_experts; e++) total += zipf ? 0x1000000u / (uint32_t)(e + 1) : 1;
    for (int32_t j = 0; j < r->top_k; j++) {
        uint64_t at = (uint64_t)moe__routing_random(r->simulate_seed, token, j) * total >> 32;
        for (int32_t e = 0; e < num_experts; e++) {
            uint32_t weight = zipf ? 0x1000000u / (uint32_t)(e + 1) : 1;
            int32_t drawn = 0;
            for (int32_t i = 0; i < j; i++) drawn |= ids[i] == e;
            if (drawn) continue;
            if (at < weight) { ids[j] = e; total -= weight; break; }
            at -= weight;
        }
    }
}

static int32_t moe__routing_is_marked(const moe_routing_desc *r, int64_t token_id)
{
    return token_id >= r->marked_token_lo && token_id < r->marked_token_hi;
}

// Scores, choice and weights of a token that is not simulated. bias_row is in range.
static int32_t moe__routing_run(const moe__router *router, const float *logits, const int32_t *forced, int32_t bias_row,
                                void *scratch, int32_t *ids, float *weights)
{
    const moe_routing_desc *r = router->desc;
    int32_t width = moe__routing_width(r, router->num_experts), ranked = router->num_experts + r->special_experts;
    uint64_t *best = (uint64_t *)scratch;
    float *logit = (float *)(void *)(best + moe__max32(r->top_k, r->groups_kept));
    float *score = logit + width, *key = score + width, *group = key + width;
    if (!moe__routing_logits(r, logits, width, logit)) return MOE__ROUTED_NAN;
    if (r->sparse_mixer > 0) {
        moe__routing_sparse_mixer(r, logit, ranked, score, key, best, ids, weights);
        return MOE__ROUTED;
    }
    if (r->score_order == MOE_SCORE_BEFORE_TOPK) moe__routing_scores(r->score, logit, width, score);
    if (forced != NULL) memcpy(ids, forced, (size_t)r->top_k * sizeof ids[0]);
    else if (!moe__routing_choose(router, r->select == MOE_SELECT_SCORE ? score : logit, bias_row, key, group, best,
                                  ids))
        return MOE__ROUTED_NAN;
    moe__routing_weights(router, logit, score, ids, weights);
    return MOE__ROUTED;
}

// Routes one token. logits [width]; token: its number in the batch (simulated routing); token_id: from the caller's
// table, any when there is none; bias_row: -1 where the caller names none; scratch: moe__routing_scratch_bytes().
// Writes ids and weights [slots]. Returns MOE__ROUTED or what is wrong.
static int32_t moe__routing_token(const moe__router *router, const float *logits, int64_t token, int64_t token_id,
                                  int32_t bias_row, void *scratch, int32_t *ids, float *weights)
{
    const moe_routing_desc *r = router->desc;
    int32_t ranked = router->num_experts + r->special_experts, slots = moe__routing_slots(r), fault = MOE__ROUTED;
    int32_t marked = moe__routing_is_marked(r, token_id), scored = r->extra_scored && r->simulate == MOE_SIMULATE_OFF;
    const int32_t *forced = NULL;
    for (int32_t j = 0; j < slots; j++) {
        ids[j] = j < r->top_k ? -1 : ranked + j - r->top_k;
        weights[j] = j < r->top_k ? 1.0f / (float)r->top_k : r->extra_weight;
    }
    if (r->simulate != MOE_SIMULATE_OFF) {
        moe__routing_simulate(r, router->num_experts, token, ids);
        return MOE__ROUTED;
    }
    if (bias_row < 0) bias_row = r->bias_rows == 2 && marked;
    if (bias_row >= moe__max32(r->bias_rows, 1)) fault |= MOE__ROUTED_BIAS_INDEX;
    if (r->forced_rows > 0 && !marked) {
        if (token_id < 0 || token_id >= r->forced_rows) fault |= MOE__ROUTED_TOKEN_ID;
        else forced = router->forced_ids + token_id * r->top_k;
    }
    if (fault == MOE__ROUTED) fault = moe__routing_run(router, logits, forced, bias_row, scratch, ids, weights);
    for (int32_t j = 0; j < slots; j++) {
        if (fault != MOE__ROUTED) { ids[j] = -1; weights[j] = 0; continue; }
        if (j >= r->top_k && !scored) continue;
        if (r->scale_on == MOE_SCALE_ON_WEIGHTS) weights[j] = moe__mulf(weights[j], router->scale);
        if (j >= r->top_k) continue;
        if (r->per_expert_scale) weights[j] = moe__mulf(weights[j], router->per_expert_scale[ids[j]]);
        if (ids[j] >= router->num_experts && r->special_kind == MOE_SPECIAL_SKIP) { ids[j] = -1; weights[j] = 0; }
    }
    return fault;
}

// ---- named methods ----

MOE_API int32_t moe_routing_preset(int32_t method, moe_routing_desc *out, moe_error *err)
{
    static const struct {
        int32_t method, score, order, bias_rows, group_rule, excluded, renormalize;
        float epsilon;
    } table[] = {
#define MOE__PRESET(method, score, order, bias, rule, excluded, renormalize, epsilon) \
    { MOE_ROUTING_##method, MOE_SCORE_##score, MOE_SCORE_##order##_TOPK, bias, MOE_GROUP_##rule, \
      MOE_EXCLUDED_##excluded, MOE_RENORMALIZE_##renormalize, epsilon }
        MOE__PRESET(DEFAULT, SOFTMAX, BEFORE, 0, NONE, NEG_INF, OFF, 0),
        MOE__PRESET(RENORMALIZE, SOFTMAX, AFTER, 0, NONE, NEG_INF, OFF, 0),
        MOE__PRESET(DEEPSEEK_V3, SIGMOID, BEFORE, 1, TOP2_SUM, NEG_INF, SUM, 1e-20f),
        MOE__PRESET(LLAMA4, SIGMOID, AFTER, 0, NONE, NEG_INF, OFF, 0),
        MOE__PRESET(RENORMALIZE_NAIVE, SOFTMAX, BEFORE, 0, NONE, NEG_INF, SUM, 0),
        MOE__PRESET(TOPK, RAW, BEFORE, 0, NONE, NEG_INF, OFF, 0),
        MOE__PRESET(SIGMOID_RENORM, SIGMOID, BEFORE, 0, NONE, NEG_INF, CLAMP_MIN, 1e-20f),
        MOE__PRESET(MINIMAX2, SIGMOID, BEFORE, 1, NONE, NEG_INF, SUM, 1e-20f),
        MOE__PRESET(SIGMOID, SIGMOID, BEFORE, 0, NONE, NEG_INF, OFF, 0),
        MOE__PRESET(TOPK_SIGMOID, SIGMOID, AFTER, 0, NONE, NEG_INF, OFF, 0),
        MOE__PRESET(DEEPSEEK_V4, SQRT_SOFTPLUS, BEFORE, 1, NONE, NEG_INF, SUM, 1e-20f),
        MOE__PRESET(SIMULATED, RAW, BEFORE, 0, NONE, NEG_INF, OFF, 0),
        MOE__PRESET(DEEPSEEK_V2, SOFTMAX, BEFORE, 0, MAX, ZERO, OFF, 0),
        MOE__PRESET(DEEPSEEK_V41, SQRT_SOFTPLUS, BEFORE, 2, NONE, NEG_INF, SUM, 0),
        MOE__PRESET(ERNIE45, SOFTMAX, BEFORE, 1, NONE, NEG_INF, CLAMP_MIN, 1e-12f),
        MOE__PRESET(LONGCAT, SOFTMAX, BEFORE, 1, NONE, NEG_INF, OFF, 0),
        MOE__PRESET(GEMMA4, SOFTMAX, BEFORE, 0, NONE, NEG_INF, SUM, 0),
        MOE__PRESET(PHIMOE, SOFTMAX, AFTER, 0, NONE, NEG_INF, OFF, 0),
        MOE__PRESET(MISTRAL4, SOFTMAX, BEFORE, 0, TOP2_SUM, ZERO, SUM, 1e-20f),
        MOE__PRESET(INKLING, SIGMOID, BEFORE, 1, NONE, NEG_INF, SUM, 0),
        MOE__PRESET(KOLIBRI, SIGMOID, AFTER, 1, NONE, NEG_INF, OFF, 0),
#undef MOE__PRESET
    };
    if (out == NULL) return moe__fail_null(err, "out");
    memset(out, 0, sizeof *out);
    if (method == MOE_ROUTING_CUSTOM) return moe__ok(err);
    if (method == MOE_ROUTING_UNSPECIFIED)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "method", "is MOE_ROUTING_UNSPECIFIED: name a method, or fill a "
                         "moe_routing_desc");
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(table); i++) {
        if (table[i].method != method) continue;
        out->score = table[i].score;
        out->score_order = table[i].order;
        out->bias_rows = table[i].bias_rows;
        out->group_rule = table[i].group_rule;
        out->group_excluded = table[i].excluded;
        out->renormalize = table[i].renormalize;
        out->renormalize_epsilon = table[i].epsilon;
        if (method == MOE_ROUTING_LLAMA4) { out->top_k = 1; out->weight_on = MOE_WEIGHT_ON_INPUT; }
        if (method == MOE_ROUTING_SIMULATED) out->simulate = MOE_SIMULATE_UNIFORM;
        if (method == MOE_ROUTING_DEEPSEEK_V41) out->zero_sum = MOE_ZERO_SUM_ONE;
        if (method == MOE_ROUTING_LONGCAT) out->special_kind = MOE_SPECIAL_IDENTITY;
        if (method == MOE_ROUTING_GEMMA4) out->per_expert_scale = 1;
        if (method == MOE_ROUTING_PHIMOE) { out->top_k = 2; out->sparse_mixer = 0.01f; }
        if (method == MOE_ROUTING_INKLING) { out->extra_slots = 2; out->extra_scored = 1; out->global_scale = 1; }
        return moe__ok(err);
    }
    return moe__fail(err, MOE_ERROR_ARGUMENT, "method", "is %d: it must be a moe_routing_method", method);
}

// What a named method leaves to the model. The rest of the descriptor must be the preset's.
enum { MOE__FREE_SCALE = 1, MOE__FREE_GROUPS = 2, MOE__FREE_SPECIAL = 4, MOE__FREE_FORCED = 8, MOE__FREE_NORM = 16 };

// Members in one spelling: defaults filled in, what is switched off zero. An epsilon up to 1e-20 changes no fp32 sum
// that is not itself that small, so all of them count as one, and adding it as clamping to it.
static void moe__routing_normal_form(moe_routing_desc *r, int32_t free_members)
{
    r->struct_size = 0;
    r->top_k = 0;
    r->simulate_seed = 0;
    if (r->select == MOE_SELECT_AUTO)
        r->select = r->score_order == MOE_SCORE_BEFORE_TOPK ? MOE_SELECT_SCORE : MOE_SELECT_LOGIT;
    if (r->logit_multiplier == 0) r->logit_multiplier = 1;
    if (r->scale == 0 || (free_members & MOE__FREE_SCALE) != 0) r->scale = 1;
    if (r->extra_slots == 0) r->extra_scored = 0;
    if (r->extra_slots == 0 || r->extra_scored || r->extra_weight == 0) r->extra_weight = 1;
    if (r->special_experts == 0) r->special_kind = 0;
    if (r->marked_token_lo == r->marked_token_hi) r->marked_token_lo = r->marked_token_hi = 0;
    if (r->group_rule == MOE_GROUP_NONE) r->group_excluded = 0;
    if (r->groups <= 1 || (free_members & MOE__FREE_GROUPS) != 0) r->groups = r->groups_kept = 0;
    if ((free_members & MOE__FREE_FORCED) != 0) {
        if (r->forced_rows > 0 && r->bias_rows == 0) r->bias_rows = 1; // a table of ids leaves a bias without use
        r->forced_rows = r->marked_token_lo = r->marked_token_hi = 0;
    }
    if ((free_members & MOE__FREE_SPECIAL) != 0) r->special_experts = r->special_kind = 0;
    if (r->sparse_mixer > 0) r->sparse_mixer = 1;
    if ((free_members & MOE__FREE_NORM) != 0) { r->renormalize = 0; r->renormalize_epsilon = 0; }
    if (r->renormalize == MOE_RENORMALIZE_OFF) { r->renormalize_epsilon = 0; r->zero_sum = 0; }
    else if (r->renormalize_epsilon <= 1e-20f) { r->renormalize = MOE_RENORMALIZE_SUM; r->renormalize_epsilon = 0; }
}

MOE_API int32_t moe_routing_method_of(const moe_routing_desc *routing)
{
    // In this order, because later ones contain earlier ones (DeepSeek-V2 without groups and scale is Default).
    static const struct { int32_t method, free_members; } methods[] = {
        { MOE_ROUTING_DEFAULT, 0 }, { MOE_ROUTING_RENORMALIZE, 0 }, { MOE_ROUTING_RENORMALIZE_NAIVE, 0 },
        { MOE_ROUTING_TOPK, 0 }, { MOE_ROUTING_SIGMOID_RENORM, 0 }, { MOE_ROUTING_SIGMOID, 0 },
        { MOE_ROUTING_LLAMA4, 0 }, { MOE_ROUTING_TOPK_SIGMOID, 0 },
        { MOE_ROUTING_DEEPSEEK_V3, MOE__FREE_SCALE | MOE__FREE_GROUPS }, { MOE_ROUTING_MINIMAX2, MOE__FREE_SCALE },
        { MOE_ROUTING_DEEPSEEK_V4, MOE__FREE_SCALE | MOE__FREE_FORCED },
        { MOE_ROUTING_DEEPSEEK_V41, MOE__FREE_SCALE | MOE__FREE_FORCED },
        { MOE_ROUTING_DEEPSEEK_V2, MOE__FREE_SCALE | MOE__FREE_GROUPS }, { MOE_ROUTING_ERNIE45, 0 },
        { MOE_ROUTING_LONGCAT, MOE__FREE_SCALE | MOE__FREE_SPECIAL }, { MOE_ROUTING_GEMMA4, 0 },
        { MOE_ROUTING_PHIMOE, 0 }, { MOE_ROUTING_MISTRAL4, MOE__FREE_SCALE | MOE__FREE_GROUPS },
        { MOE_ROUTING_INKLING, MOE__FREE_SCALE }, { MOE_ROUTING_KOLIBRI, MOE__FREE_NORM },
    };
    moe_routing_desc given;
    if (moe__copy_desc(&given, sizeof given, routing, "routing", NULL) != MOE_OK || routing == NULL)
        return MOE_ROUTING_CUSTOM;
    if (given.simulate != MOE_SIMULATE_OFF) return MOE_ROUTING_SIMULATED;
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(methods); i++) {
        int32_t method = methods[i].method, free_members = methods[i].free_members;
        moe_routing_desc a = given, b;
        if (method == MOE_ROUTING_LLAMA4 && given.top_k > 1) continue;
        if (method == MOE_ROUTING_LONGCAT && given.special_experts > 0 && given.special_kind != MOE_SPECIAL_IDENTITY)
            continue;
        moe_routing_preset(method, &b, NULL);
        // Groups of another rule are another method; without groups the rule does not matter to these two.
        if (given.groups <= 1 && (method == MOE_ROUTING_DEEPSEEK_V2 || method == MOE_ROUTING_MISTRAL4)) {
            a.group_rule = b.group_rule;
            a.group_excluded = b.group_excluded;
        }
        moe__routing_normal_form(&a, free_members);
        moe__routing_normal_form(&b, free_members);
        if (memcmp(&a, &b, sizeof a) == 0) return method;
    }
    return MOE_ROUTING_CUSTOM;
}

// The words of a config, checked one by one.
static int32_t moe__routing_fields_check(const moe_routing_fields *f, moe_error *err)
{
    const struct { const char *name; int32_t value; } flags[] = {
        { "fields.renormalize", f->renormalize }, { "fields.has_bias", f->has_bias },
        { "fields.weight_on_input", f->weight_on_input },
    };
    int32_t kept;
    if (f->num_experts < 1 || f->num_experts > MOE_MAX_EXPERTS)
        return moe__fail_range(err, "fields.num_experts", f->num_experts, 1, MOE_MAX_EXPERTS);
    if (f->top_k < 1 || f->top_k > moe__min32(f->num_experts, MOE_MAX_TOP_K))
        return moe__fail_range(err, "fields.top_k", f->top_k, 1, moe__min32(f->num_experts, MOE_MAX_TOP_K));
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(flags); i++)
        if (flags[i].value != 0 && flags[i].value != 1)
            return moe__fail_range(err, flags[i].name, flags[i].value, 0, 1);
    if (f->groups < 0 || (f->groups > 1 && f->num_experts % f->groups != 0))
        return moe__fail(err, MOE_ERROR_ARGUMENT, "fields.groups", "is %d: it must divide the number of experts, %d",
                         f->groups, f->num_experts);
    kept = f->groups > 1 ? f->groups : 1;
    if (f->groups_kept < (f->groups > 1) || f->groups_kept > kept)
        return moe__fail_range(err, "fields.groups_kept", f->groups_kept, f->groups > 1, kept);
    if (f->groups > 1 && f->top_k > f->groups_kept * (f->num_experts / f->groups))
        return moe__fail(err, MOE_ERROR_ARGUMENT, "fields.top_k", "is %d: the %d groups kept have %d experts", f->top_k,
                         f->groups_kept, f->groups_kept * (f->num_experts / f->groups));
    if (!moe__is_finite(f->scale))
        return moe__fail(err, MOE_ERROR_ARGUMENT, "fields.scale", "is %g: it must be finite", (double)f->scale);
    if (!moe__is_finite(f->epsilon) || f->epsilon < 0)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "fields.epsilon", "is %g: it must be finite and not below 0",
                         (double)f->epsilon);
    return MOE_OK;
}

// Why no model is known that routes so, or NULL.
static const char *moe__routing_fields_reason(const moe_routing_fields *f, int32_t score)
{
    if (f->groups <= 1) return NULL;
    if (score == MOE_SCORE_SQRT_SOFTPLUS) return "no model is known that has groups and sqrt(softplus)";
    if (score == MOE_SCORE_SIGMOID)
        return f->has_bias ? NULL : "no model is known that has groups and sigmoid without a selection bias, so how "
                                    "they rank is open: fill a moe_routing_desc";
    if (f->has_bias) return "no model is known that has groups and softmax with a selection bias";
    return f->renormalize ? "groups and renormalised softmax do not say how groups rank (by their maximum in "
                            "DeepSeek-V2, by their top 2 in Mistral-4): take a preset" : NULL;
}

MOE_API int32_t moe_routing_from_fields(const moe_routing_fields *fields, moe_routing_desc *out, moe_error *err)
{
    static const moe__name scores[] = {
        { MOE_SCORE_SOFTMAX, "softmax" }, { MOE_SCORE_SIGMOID, "sigmoid" },
        { MOE_SCORE_SQRT_SOFTPLUS, "sqrtsoftplus" }, { MOE_SCORE_SQRT_SOFTPLUS, "sqrt_softplus" },
    };
    moe_routing_fields f;
    const char *reason;
    int32_t result, score = MOE_SCORE_UNSET;
    if (out == NULL) return moe__fail_null(err, "out");
    memset(out, 0, sizeof *out);
    if (fields == NULL) return moe__fail_null(err, "fields");
    if ((result = moe__copy_desc(&f, sizeof f, fields, "fields", err)) != MOE_OK) return result;
    if (f.score == NULL) return moe__fail_null(err, "fields.score");
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(scores); i++)
        if (strcmp(f.score, scores[i].name) == 0) score = scores[i].value;
    if (score == MOE_SCORE_UNSET)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "fields.score", "is %q: it must be \"softmax\", \"sigmoid\" or "
                         "\"sqrtsoftplus\"", f.score);
    if ((result = moe__routing_fields_check(&f, err)) != MOE_OK) return result;
    if ((reason = moe__routing_fields_reason(&f, score)) != NULL)
        return moe__fail(err, MOE_ERROR_UNSUPPORTED, "fields.groups", "is %d: %s", f.groups, reason);
    out->score = score;
    out->score_order = MOE_SCORE_BEFORE_TOPK;
    out->top_k = f.top_k;
    out->bias_rows = f.has_bias;
    out->scale = f.scale;
    if (f.renormalize) { out->renormalize = MOE_RENORMALIZE_SUM; out->renormalize_epsilon = f.epsilon; }
    if (f.renormalize && score == MOE_SCORE_SOFTMAX && f.has_bias) { // Ernie clamps
        out->renormalize = MOE_RENORMALIZE_CLAMP_MIN;
        out->renormalize_epsilon = f.epsilon == 0 ? 1e-12f : f.epsilon;
    }
    if (f.groups > 1) {
        out->groups = f.groups;
        out->groups_kept = f.groups_kept;
        out->group_rule = f.has_bias ? MOE_GROUP_TOP2_SUM : MOE_GROUP_MAX;
        out->group_excluded = f.has_bias ? MOE_EXCLUDED_NEG_INF : MOE_EXCLUDED_ZERO;
    }
    if (f.weight_on_input) {
        out->weight_on = MOE_WEIGHT_ON_INPUT; // Llama 4 chooses on the logit
        if (score == MOE_SCORE_SIGMOID && f.top_k == 1 && !f.has_bias && !f.renormalize)
            out->score_order = MOE_SCORE_AFTER_TOPK;
    }
    return moe__ok(err);
}

// ---- other stacks' numbers ----

typedef struct moe__version { int32_t part[4]; } moe__version;

// "0.6.18", "v0.7.2.post1", "0.7.0rc1+cu129": the dotted numbers; a suffix is looked over. 0: it is no version.
static int32_t moe__version_parse(const char *text, moe__version *out)
{
    int32_t parts = 0;
    memset(out, 0, sizeof *out);
    if (*text == 'v') text++;
    for (;;) {
        int32_t value = 0;
        if (*text < '0' || *text > '9') return 0;
        for (; *text >= '0' && *text <= '9'; text++) {
            if (value > 99999) return 0;
            value = value * 10 + (*text - '0');
        }
        if (parts < 4) out->part[parts] = value;
        parts++;
        if (text[0] != '.' || text[1] < '0' || text[1] > '9') break;
        text++;
    }
    if (parts < 2) return 0;
    for (; *text != 0; text++)
        if (!((*text >= 'a' && *text <= 'z') || (*text >= '0' && *text <= '9') || *text == '.' || *text == '+' ||
              *text == '-' || *text == '_'))
            return 0;
    return 1;
}

// -1, 0, 1. Parts of b that are -1 match anything.
static int32_t moe__version_compare(const moe__version *a, const int32_t *b)
{
    for (int32_t i = 0; i < 4; i++) {
        if (b[i] < 0) return 0;
        if (a->part[i] != b[i]) return a->part[i] < b[i] ? -1 : 1;
    }
    return 0;
}

// Numbers of a stack's enum between two versions; both ends belong to the range.
typedef struct moe__foreign {
    int32_t stack, first[4], last[4];
    int32_t numbers;     // 0..numbers-1 have a meaning
    int32_t unspecified; // -1: none
} moe__foreign;

static const moe__name moe__stacks[] = {
    { MOE_STACK_FLASHINFER, "FlashInfer" }, { MOE_STACK_VLLM, "vLLM" }, { MOE_STACK_SGLANG, "SGLang" },
};

// The range of a table that holds a version, or NULL and the reason.
static const moe__foreign *moe__foreign_find(const moe__foreign *table, int32_t count, int32_t stack, const char *text,
                                             int32_t *result, moe_error *err)
{
    moe__version version;
    const moe__foreign *first = NULL, *last = NULL;
    const char *name = moe__name_find(moe__stacks, MOE__ARRAY_COUNT(moe__stacks), stack, NULL);
    char known[64];
    moe__text range = moe__text_make(known, sizeof known);
    if (name == NULL) {
        *result = moe__fail(err, MOE_ERROR_ARGUMENT, "stack", stack == 0 ? "is not set: it must be a moe_stack"
                                                                          : "is %d: it must be a moe_stack", stack);
        return NULL;
    }
    if (text == NULL) { *result = moe__fail_null(err, "version"); return NULL; }
    if (!moe__version_parse(text, &version)) {
        *result = moe__fail(err, MOE_ERROR_ARGUMENT, "version", "is %q: it must be a release such as \"0.6.18\"", text);
        return NULL;
    }
    for (int32_t i = 0; i < count; i++) {
        if (table[i].stack != stack) continue;
        if (first == NULL) first = &table[i];
        last = &table[i];
        if (moe__version_compare(&version, table[i].first) >= 0 && moe__version_compare(&version, table[i].last) <= 0)
            return &table[i];
    }
    for (int32_t end = 0; end < 2; end++) {
        const int32_t *part = end == 0 ? first->first : last->last;
        if (end == 1) moe__text_string(&range, " to ");
        moe__text_format(&range, "%d.%d", part[0], part[1]);
        if (part[2] >= 0) moe__text_format(&range, ".%d", part[2]);
    }
    *result = moe__fail(err, MOE_ERROR_UNSUPPORTED, "version", "is %q: the numbers of %s are known from %s; other "
                        "releases may have moved them", text, name, known);
    return NULL;
}

MOE_API int32_t moe_routing_from_foreign(int32_t stack, const char *version, int32_t value, int32_t *out_method,
                                         moe_error *err)
{
    // Up to its last number each release's methods are those of moe_routing_method; "unspecified" slides behind them.
    static const moe__foreign table[] = {
        { MOE_STACK_FLASHINFER, { 0, 2, 10, 0 }, { 0, 2, 10, -1 }, 5, 5 },
        { MOE_STACK_FLASHINFER, { 0, 2, 11, 0 }, { 0, 2, 13, -1 }, 5, -1 }, // what the releases around agree on
        { MOE_STACK_FLASHINFER, { 0, 2, 14, 0 }, { 0, 6, 7, -1 }, 6, 6 },
        { MOE_STACK_FLASHINFER, { 0, 6, 8, 0 }, { 0, 6, 10, -1 }, 8, 8 },
        { MOE_STACK_FLASHINFER, { 0, 6, 11, 0 }, { 0, 6, 17, -1 }, 9, 9 },
        { MOE_STACK_FLASHINFER, { 0, 6, 18, 0 }, { 0, 7, 2, -1 }, 10, 10 },
        { MOE_STACK_VLLM, { 0, 28, 0, 0 }, { 0, 33, -1, -1 }, 9, 9 },
        { MOE_STACK_SGLANG, { 0, 5, 16, 0 }, { 0, 5, 23, -1 }, 9, 9 },
    };
    const moe__foreign *range;
    const char *name;
    int32_t result = MOE_OK;
    if (out_method == NULL) return moe__fail_null(err, "out_method");
    *out_method = MOE_ROUTING_UNSPECIFIED;
    range = moe__foreign_find(table, MOE__ARRAY_COUNT(table), stack, version, &result, err);
    if (range == NULL) return result;
    name = moe__name_find(moe__stacks, MOE__ARRAY_COUNT(moe__stacks), stack, "");
    if (value >= 0 && value == range->unspecified)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "value", "is %d: %s %s means \"unspecified\" by it", value, name,
                         version);
    if ((value >= 0 && value < range->numbers) ||
        (stack == MOE_STACK_VLLM && value >= MOE_ROUTING_DEEPSEEK_V4 && value <= MOE_ROUTING_SIMULATED)) {
        *out_method = value;
        return moe__ok(err);
    }
    return moe__fail(err, MOE_ERROR_ARGUMENT, "value", "is %d: %s %s has no such routing method; it has 0..%d%s", value,
                     name, version, range->numbers - 1, stack == MOE_STACK_VLLM ? " and 100..102" : "");
}

MOE_API int32_t moe_activation_from_foreign(int32_t stack, const char *version, int32_t value,
                                            moe_activation_desc *out, moe_error *err)
{
    static const moe__foreign table[] = {
        { MOE_STACK_FLASHINFER, { 0, 2, 10, 0 }, { 0, 4, -1, -1 }, 2, -1 },
        { MOE_STACK_FLASHINFER, { 0, 5, 0, 0 }, { 0, 6, 12, -1 }, 8, 8 },
        { MOE_STACK_FLASHINFER, { 0, 6, 13, 0 }, { 0, 6, 13, -1 }, 9, 9 },
        { MOE_STACK_FLASHINFER, { 0, 6, 14, 0 }, { 0, 6, 15, -1 }, 10, 10 },
        { MOE_STACK_FLASHINFER, { 0, 6, 16, 0 }, { 0, 6, -1, -1 }, 11, 11 },
        { MOE_STACK_FLASHINFER, { 0, 7, 0, 0 }, { 0, 7, 2, -1 }, 13, 11 },
    };
    static const int32_t kinds[6][13] = { // one row per range above; GELU is erf, since another number says tanh
        { MOE_ACTIVATION_SWIGLU, MOE_ACTIVATION_GEGLU_ERF, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 },
#define MOE__KINDS MOE_ACTIVATION_GELU_ERF, MOE_ACTIVATION_RELU, MOE_ACTIVATION_SILU, MOE_ACTIVATION_SWIGLU, \
                   MOE_ACTIVATION_GEGLU_ERF, MOE_ACTIVATION_SWIGLU, MOE_ACTIVATION_RELU2
        { MOE__KINDS, MOE_ACTIVATION_IDENTITY, 0, 0, 0, 0, 0 },
        { MOE__KINDS, MOE_ACTIVATION_SWIGLU_STEP, MOE_ACTIVATION_IDENTITY, 0, 0, 0, 0 },
        { MOE__KINDS, MOE_ACTIVATION_SWIGLU_STEP, MOE_ACTIVATION_GEGLU_TANH, MOE_ACTIVATION_IDENTITY, 0, 0, 0 },
        { MOE__KINDS, MOE_ACTIVATION_SWIGLU_STEP, MOE_ACTIVATION_GEGLU_TANH, MOE_ACTIVATION_IDENTITY,
          MOE_ACTIVATION_SITU, 0, 0 },
        { MOE__KINDS, MOE_ACTIVATION_SWIGLU_STEP, MOE_ACTIVATION_GEGLU_TANH, MOE_ACTIVATION_IDENTITY,
          MOE_ACTIVATION_SITU, 0, MOE_ACTIVATION_RELU2_CLAMP },
#undef MOE__KINDS
    };
    const moe__foreign *range;
    int32_t result = MOE_OK;
    if (out == NULL) return moe__fail_null(err, "out");
    memset(out, 0, sizeof *out);
    if (stack == MOE_STACK_VLLM || stack == MOE_STACK_SGLANG)
        return moe__fail(err, MOE_ERROR_UNSUPPORTED, "stack", "is %s: it names activations by words, for which there "
                         "is moe_activation_from_name(); its integers are those of the FlashInfer release that it pins",
                         moe__name_find(moe__stacks, MOE__ARRAY_COUNT(moe__stacks), stack, ""));
    range = moe__foreign_find(table, MOE__ARRAY_COUNT(table), stack, version, &result, err);
    if (range == NULL) return result;
    if (value >= 0 && value == range->unspecified)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "value", "is %d: FlashInfer %s means \"invalid\" by it", value,
                         version);
    if (value < 0 || value >= range->numbers)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "value", "is %d: FlashInfer %s has no such activation; it has 0..%d",
                         value, version, range->numbers - 1);
    out->kind = kinds[range - table][value];
    if (range != table && value == 5) out->per_expert = 1;               // SwigluBias: alpha, beta and limit are tables
    if (out->kind == MOE_ACTIVATION_SITU) out->alpha = out->beta = 1.0f; // FlashInfer's defaults
    return moe__ok(err);
}

MOE_API int32_t moe_activation_from_name(const char *name, int32_t gated, moe_activation_desc *out, moe_error *err)
{
    static const struct { const char *name; int32_t gated, plain; float alpha, beta, limit; } table[] = {
        { "silu", MOE_ACTIVATION_SWIGLU, MOE_ACTIVATION_SILU, 0, 0, 0 },
        { "swish", MOE_ACTIVATION_SWIGLU, MOE_ACTIVATION_SILU, 0, 0, 0 },
        { "swiglu", MOE_ACTIVATION_SWIGLU, 0, 0, 0, 0 },
        { "swigluoai", MOE_ACTIVATION_SWIGLU, 0, 1.702f, 1, 7 },
        { "swigluoai_uninterleave", MOE_ACTIVATION_SWIGLU, 0, 1.702f, 1, 7 },
        { "swiglustep", MOE_ACTIVATION_SWIGLU_STEP, 0, 0, 0, 7 },
        { "gelu", MOE_ACTIVATION_GEGLU_ERF, MOE_ACTIVATION_GELU_ERF, 0, 0, 0 },
        { "geglu", MOE_ACTIVATION_GEGLU_ERF, 0, 0, 0, 0 },
        { "gelu_tanh", MOE_ACTIVATION_GEGLU_TANH, MOE_ACTIVATION_GELU_TANH, 0, 0, 0 },
        { "gelu_pytorch_tanh", MOE_ACTIVATION_GEGLU_TANH, MOE_ACTIVATION_GELU_TANH, 0, 0, 0 },
        { "gelu_new", MOE_ACTIVATION_GEGLU_TANH, MOE_ACTIVATION_GELU_TANH, 0, 0, 0 },
        { "gelu_fast", MOE_ACTIVATION_GEGLU_TANH, MOE_ACTIVATION_GELU_TANH, 0, 0, 0 },
        { "geglu_tanh", MOE_ACTIVATION_GEGLU_TANH, 0, 0, 0, 0 },
        { "situ", MOE_ACTIVATION_SITU, 0, 4, 25, 0 },
        { "silu_no_mul", 0, MOE_ACTIVATION_SILU, 0, 0, 0 },
        { "gelu_no_mul", 0, MOE_ACTIVATION_GELU_ERF, 0, 0, 0 },
        { "gelu_tanh_no_mul", 0, MOE_ACTIVATION_GELU_TANH, 0, 0, 0 },
        { "relu", 0, MOE_ACTIVATION_RELU, 0, 0, 0 },
        { "relu2", 0, MOE_ACTIVATION_RELU2, 0, 0, 0 },
        { "relu_squared", 0, MOE_ACTIVATION_RELU2, 0, 0, 0 },
        { "relu2_no_mul", 0, MOE_ACTIVATION_RELU2, 0, 0, 0 },
        { "identity", 0, MOE_ACTIVATION_IDENTITY, 0, 0, 0 },
        { "linear", 0, MOE_ACTIVATION_IDENTITY, 0, 0, 0 },
    };
    char legal[480];
    moe__text list = moe__text_make(legal, sizeof legal);
    const char *other = NULL;
    if (out == NULL) return moe__fail_null(err, "out");
    memset(out, 0, sizeof *out);
    if (name == NULL) return moe__fail_null(err, "name");
    if (gated != 0 && gated != 1) return moe__fail_range(err, "gated", gated, 0, 1);
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(table); i++) {
        int32_t kind = gated ? table[i].gated : table[i].plain;
        if (kind != 0) moe__text_format(&list, "%s%s", list.length > 0 ? ", " : "", table[i].name);
        if (strcmp(name, table[i].name) != 0) continue;
        if (kind == 0) other = table[i].name;
        out->kind = kind;
        out->alpha = table[i].alpha;
        out->beta = table[i].beta;
        out->limit = table[i].limit;
        if (kind != 0) return moe__ok(err);
    }
    memset(out, 0, sizeof *out);
    return moe__fail(err, MOE_ERROR_ARGUMENT, "name", "is %q%s: %s it must be one of %s", name,
                     other == NULL ? "" : gated ? ", which is not gated" : ", which is gated",
                     gated ? "with gate and up" : "without a gate", legal);
}

// ---- the reference ----

static int32_t moe__route_args_check(const moe_routing_desc *r, const moe_reference_route_args *a, moe_error *err)
{
    int32_t marks = r->marked_token_lo < r->marked_token_hi && r->bias_rows == 2 && a->bias_index == NULL;
    if (r->simulate == MOE_SIMULATE_OFF) {
        if (a->logits == NULL) return moe__fail_null(err, "args.logits");
        if (r->bias_rows > 0 && a->bias == NULL) return moe__fail_null(err, "args.bias");
        if (r->bias_rows > 1 && a->bias_index == NULL && !marks)
            return moe__fail(err, MOE_ERROR_ARGUMENT, "args.bias_index", "is NULL: with %d rows of bias and no marked "
                             "tokens nothing says which row a token uses", r->bias_rows);
        if (r->per_expert_scale && a->per_expert_scale == NULL) return moe__fail_null(err, "args.per_expert_scale");
        if (r->forced_rows > 0 && a->forced_ids == NULL) return moe__fail_null(err, "args.forced_ids");
        if ((r->forced_rows > 0 || marks) && a->token_ids == NULL) return moe__fail_null(err, "args.token_ids");
    }
    if (a->ids_dtype != 0 && a->ids_dtype != MOE_DTYPE_I32 && a->ids_dtype != MOE_DTYPE_I64)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "args.ids_dtype", "is %d: it must be 0, MOE_DTYPE_I32 or "
                         "MOE_DTYPE_I64", a->ids_dtype);
    if (!moe__is_finite(a->global_scale))
        return moe__fail(err, MOE_ERROR_ARGUMENT, "args.global_scale", "is %g: it must be finite (0 means 1)",
                         (double)a->global_scale);
    if (!r->global_scale && a->global_scale != 0 && a->global_scale != 1)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "args.global_scale", "is %g, but routing.global_scale is 0",
                         (double)a->global_scale);
    if (a->out_ids == NULL) return moe__fail_null(err, "args.out_ids");
    if (a->out_weights == NULL) return moe__fail_null(err, "args.out_weights");
    return MOE_OK;
}

static int32_t moe__route_forced_check(const moe_routing_desc *r, const moe_reference_route_args *a, moe_error *err)
{
    int64_t count = (int64_t)r->forced_rows * r->top_k;
    int32_t ranked = a->num_experts + r->special_experts;
    for (int64_t i = 0; i < count; i++)
        if (a->forced_ids[i] < 0 || a->forced_ids[i] >= ranked)
            return moe__fail(err, MOE_ERROR_DATA, "args.forced_ids", "has id %d in row %D: ids are 0..%d",
                             a->forced_ids[i], i / r->top_k, ranked - 1);
    return MOE_OK;
}

// Says which token, and which of its inputs, a fault came from.
static int32_t moe__route_fault(const moe__router *router, const moe_reference_route_args *a, int32_t fault,
                                int32_t token, int64_t token_id, moe_error *err)
{
    const moe_routing_desc *r = router->desc;
    int32_t width = moe__routing_width(r, router->num_experts);
    const float *logits = a->logits + (int64_t)token * width;
    if ((fault & MOE__ROUTED_BIAS_INDEX) != 0)
        return moe__fail(err, MOE_ERROR_DATA, "args.bias_index", "of token %d is %d: it must be 0..%d", token,
                         a->bias_index[token], moe__max32(r->bias_rows, 1) - 1);
    if ((fault & MOE__ROUTED_TOKEN_ID) != 0)
        return moe__fail(err, MOE_ERROR_DATA, "args.token_ids", "of token %d is %D: the table of forced ids has rows "
                         "0..%d", token, token_id, r->forced_rows - 1);
    for (int32_t e = 0; e < width; e++)
        if (!(logits[e] < MOE__INFINITY))
            return moe__fail(err, MOE_ERROR_DATA, "args.logits", "of token %d, expert %d is %s: logits are numbers "
                             "or -inf", token, e, moe__is_nan(logits[e]) ? "NaN" : "+inf");
    for (int32_t e = 0; e < width; e++)
        if (!(logits[e] * r->logit_multiplier < MOE__INFINITY))
            return moe__fail(err, MOE_ERROR_DATA, "args.logits", "of token %d, expert %d is %g: "
                             "routing.logit_multiplier makes it infinite", token, e, (double)logits[e]);
    return moe__fail(err, MOE_ERROR_DATA, "args.bias", "makes a key of token %d NaN or +inf: biases are numbers or "
                     "-inf", token);
}

MOE_API int32_t moe_reference_route(const moe_routing_desc *routing, const moe_reference_route_args *args,
                                    moe_error *err)
{
    moe_routing_desc r;
    moe_reference_route_args a;
    moe__router router;
    void *scratch;
    int32_t result, width;
    if (routing == NULL) return moe__fail_null(err, "routing");
    if (args == NULL) return moe__fail_null(err, "args");
    if ((result = moe__copy_desc(&r, sizeof r, routing, "routing", err)) != MOE_OK ||
        (result = moe__copy_desc(&a, sizeof a, args, "args", err)) != MOE_OK)
        return result;
    if (a.num_experts < 1 || a.num_experts > MOE_MAX_EXPERTS)
        return moe__fail_range(err, "args.num_experts", a.num_experts, 1, MOE_MAX_EXPERTS);
    if ((result = moe__routing_resolve_as(&r, a.num_experts, "routing.", err)) != MOE_OK) return result;
    if (a.num_tokens < 0) return moe__fail_range(err, "args.num_tokens", a.num_tokens, 0, INT32_MAX);
    if (a.num_tokens == 0) return moe__ok(err);
    if ((result = moe__route_args_check(&r, &a, err)) != MOE_OK) return result;
    if (r.simulate == MOE_SIMULATE_OFF && (result = moe__route_forced_check(&r, &a, err)) != MOE_OK) return result;
    router.desc = &r;
    router.num_experts = a.num_experts;
    router.bias = a.bias;
    router.per_expert_scale = a.per_expert_scale;
    router.forced_ids = a.forced_ids;
    router.scale = a.global_scale == 0 ? r.scale : r.scale * a.global_scale;
    scratch = MOE_MALLOC((size_t)moe__routing_scratch_bytes(&r, a.num_experts));
    if (scratch == NULL) return moe__fail_memory(err, moe__routing_scratch_bytes(&r, a.num_experts));
    width = moe__routing_width(&r, a.num_experts);
    for (int32_t t = 0; t < a.num_tokens && result == MOE_OK; t++) {
        int64_t id = -1, at = (int64_t)t * moe__routing_slots(&r);
        int32_t fault;
        if (a.token_ids != NULL)
            id = a.ids_dtype == MOE_DTYPE_I64 ? ((const int64_t *)a.token_ids)[t] : ((const int32_t *)a.token_ids)[t];
        if (r.bias_rows > 0 && a.bias_index != NULL && a.bias_index[t] < 0) fault = MOE__ROUTED_BIAS_INDEX;
        else fault = moe__routing_token(&router, a.logits != NULL ? a.logits + (int64_t)t * width : NULL, t, id,
                                        r.bias_rows > 0 && a.bias_index != NULL ? a.bias_index[t] : -1, scratch,
                                        a.out_ids + at, a.out_weights + at);
        if (fault != MOE__ROUTED) result = moe__route_fault(&router, &a, fault, t, id, err);
    }
    MOE_FREE(scratch);
    return result == MOE_OK ? moe__ok(err) : result;
}

// >>layer  validation and defaults of a layer  moe__layer_resolve() is the one gate that every descriptor passes:
// behind it no section checks a member again, sizes are bounded so that H * I * E fits 64 bits, and 0 means 0.

enum { MOE__SIZE_MAX = 1 << 20 }; // of H and I

static int32_t moe__layer_is_gated(const moe_layer_desc *layer) { return layer->activation.kind < MOE_ACTIVATION_SILU; }

static int32_t moe__check_flag(int32_t value, const char *member, moe_error *err)
{
    if (value == 0 || value == 1) return MOE_OK;
    return moe__fail(err, MOE_ERROR_ARGUMENT, member, "is %d: it must be 0 or 1", value);
}

static int32_t moe__check_float(float value, float low, const char *member, moe_error *err)
{
    if (moe__is_finite(value) && value >= low) return MOE_OK;
    return moe__fail(err, MOE_ERROR_ARGUMENT, member, "is %g: it must be finite and at least %g", (double)value,
                     (double)low);
}

static int32_t moe__activation_resolve(moe_activation_desc *act, const char *path, moe_error *err)
{
    char member[64];
    moe__text text = moe__text_make(member, sizeof member);
    int32_t situ = act->kind == MOE_ACTIVATION_SITU;
    moe__text_format(&text, "%s.kind", path);
    if (act->kind == MOE_ACTIVATION_UNSET)
        return moe__fail(err, MOE_ERROR_ARGUMENT, member, "is not set: it must be a moe_activation");
    if (moe_activation_is_gated(act->kind) < 0)
        return moe__fail(err, MOE_ERROR_ARGUMENT, member, "is %d: it must be a moe_activation", act->kind);
    text = moe__text_make(member, sizeof member);
    moe__text_format(&text, "%s.alpha", path);
    if (!moe__is_finite(act->alpha) || act->alpha < 0)
        return moe__fail(err, MOE_ERROR_ARGUMENT, member, "is %g: it must be finite and not negative",
                         (double)act->alpha);
    text = moe__text_make(member, sizeof member);
    moe__text_format(&text, "%s.beta", path);
    if (!moe__is_finite(act->beta) || (situ && act->beta < 0))
        return moe__fail(err, MOE_ERROR_ARGUMENT, member, "is %g: it must be finite%s", (double)act->beta,
                         situ ? " and not negative (0 passes u through)" : "");
    text = moe__text_make(member, sizeof member);
    moe__text_format(&text, "%s.limit", path);
    if (!moe__is_finite(act->limit) || act->limit < 0)
        return moe__fail(err, MOE_ERROR_ARGUMENT, member, "is %g: it must be finite and not negative (0: no clamp)",
                         (double)act->limit);
    if (act->kind == MOE_ACTIVATION_RELU2_CLAMP && act->limit == 0 && !act->per_expert)
        return moe__fail(err, MOE_ERROR_ARGUMENT, member, "is 0: MOE_ACTIVATION_RELU2_CLAMP needs a positive limit");
    text = moe__text_make(member, sizeof member);
    moe__text_format(&text, "%s.per_expert", path);
    if (act->alpha == 0) act->alpha = situ ? 4.0f : 1.0f;
    return moe__check_flag(act->per_expert, member, err);
}

// Elements of a row that share a scale: H and I are multiples of it, and no tensor-parallel slice cuts it.
static int32_t moe__format_group(const moe_layer_desc *layer)
{
    switch (layer->format) {
    case MOE_FORMAT_FP8_BLOCK: case MOE_FORMAT_INT4_W4A16: return layer->format_block;
    case MOE_FORMAT_NVFP4: case MOE_FORMAT_NVFP4_W4A16: return 16;
    case MOE_FORMAT_MXFP8: case MOE_FORMAT_MXFP4_W4A16: case MOE_FORMAT_MXFP4_W4A8: return 32;
    default: return 1;
    }
}

static int32_t moe__check_group(const moe_layer_desc *layer, int32_t size, const char *member, moe_error *err)
{
    int32_t group = moe__format_group(layer);
    if (size % group == 0) return MOE_OK;
    return moe__fail(err, MOE_ERROR_ARGUMENT, member,
                     "is %d: %s has a scale for every %d elements, so it must be a multiple of that",
                     size, moe_format_string(layer->format), group);
}

static int32_t moe__format_resolve(moe_layer_desc *layer, moe_error *err)
{
    int32_t format = layer->format, block = layer->format_block;
    if (format == MOE_FORMAT_UNSET)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "layer.format", "is not set: it must be a moe_format");
    if (format < MOE_FORMAT_F32 || format > MOE_FORMAT_INT4_W4A16)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "layer.format", "is %d: it must be a moe_format", format);
    if (format == MOE_FORMAT_FP8_BLOCK) {
        if (block == 0) layer->format_block = block = 128;
        if (block != 128 && block != 64 && block != 32)
            return moe__fail(err, MOE_ERROR_ARGUMENT, "layer.format_block", "is %d: fp8 block has 128, 64 or 32",
                             block);
    } else if (format == MOE_FORMAT_INT4_W4A16) {
        if (block != 32 && block != 64 && block != 128)
            return moe__fail(err, MOE_ERROR_ARGUMENT, "layer.format_block", "is %d: int4 has 32, 64 or 128", block);
    } else if (block != 0) {
        return moe__fail(err, MOE_ERROR_ARGUMENT, "layer.format_block",
                         "is %d: %s has no block size to choose, leave it 0", block, moe_format_string(format));
    }
    if (layer->scale_dtype != 0 && format <= MOE_FORMAT_F16)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "layer.scale_dtype", "is %d: %s has no scales, leave it 0",
                         layer->scale_dtype, moe_format_string(format));
    if (layer->scale_dtype != 0 && layer->scale_dtype != MOE_DTYPE_F32 && layer->scale_dtype != MOE_DTYPE_UE8M0 &&
        layer->scale_dtype != MOE_DTYPE_BF16 && layer->scale_dtype != MOE_DTYPE_F16 &&
        layer->scale_dtype != MOE_DTYPE_E4M3)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "layer.scale_dtype",
                         "is %d: scales are f32, bf16, f16, ue8m0 or e4m3", layer->scale_dtype);
    return moe__check_group(layer, layer->hidden_size, "layer.hidden_size", err) != MOE_OK
               ? MOE_ERROR_ARGUMENT
               : moe__check_group(layer, layer->intermediate_size, "layer.intermediate_size", err);
}

static int32_t moe__parallel_resolve(moe_layer_desc *layer, moe_error *err)
{
    moe_parallel_desc *p = &layer->parallel;
    int32_t experts = layer->num_experts, result;
    if (p->local_experts == 0) p->local_experts = experts;
    if (p->local_experts < 1 || p->local_experts > experts)
        return moe__fail_range(err, "layer.parallel.local_experts", p->local_experts, 1, experts);
    if (p->expert_map != NULL) {
        unsigned char seen[MOE_MAX_EXPERTS / 8] = { 0 };
        int32_t mapped = 0;
        if (p->expert_offset != 0)
            return moe__fail(err, MOE_ERROR_ARGUMENT, "layer.parallel.expert_offset",
                             "is %d beside an expert_map: leave it 0", p->expert_offset);
        for (int32_t e = 0; e < experts; e++) {
            int32_t local = p->expert_map[e];
            if (local == -1) continue;
            if (local < 0 || local >= p->local_experts || (seen[local / 8] >> (local % 8) & 1) != 0)
                return moe__fail(err, MOE_ERROR_ARGUMENT, "layer.parallel.expert_map",
                                 "maps expert %d to %d: local indices are 0..%d, each once, or -1",
                                 e, local, p->local_experts - 1);
            seen[local / 8] = (unsigned char)(seen[local / 8] | (1u << (local % 8)));
            mapped++;
        }
        if (mapped != p->local_experts)
            return moe__fail(err, MOE_ERROR_ARGUMENT, "layer.parallel.expert_map",
                             "maps %d experts, but local_experts is %d", mapped, p->local_experts);
    } else if (p->expert_offset < 0 || p->expert_offset > experts - p->local_experts) {
        return moe__fail_range(err, "layer.parallel.expert_offset", p->expert_offset, 0, experts - p->local_experts);
    }
    if ((result = moe__check_flag(p->omit_common, "layer.parallel.omit_common", err)) != MOE_OK) return result;
    if (p->tp_size == 0) p->tp_size = 1;
    if (p->tp_size < 1 || p->tp_size > layer->intermediate_size / moe__format_group(layer))
        return moe__fail(err, MOE_ERROR_ARGUMENT, "layer.parallel.tp_size",
                         "is %d: it must be 1..%d, so that every rank has a scale group of the intermediate size",
                         p->tp_size, layer->intermediate_size / moe__format_group(layer));
    if (p->tp_rank < 0 || p->tp_rank >= p->tp_size)
        return moe__fail_range(err, "layer.parallel.tp_rank", p->tp_rank, 0, p->tp_size - 1);
    if (p->tp_size > 1 && layer->row_norm)
        return moe__fail(err, MOE_ERROR_UNSUPPORTED, "layer.parallel.tp_size",
                         "is %d with layer.row_norm: the norm needs the "
                         "whole GEMM2 row, reduce before it or use expert parallelism",
                         p->tp_size);
    return MOE_OK;
}

static int32_t moe__shared_resolve(moe_layer_desc *layer, moe_error *err)
{
    moe_shared_desc *s = &layer->shared;
    int32_t result;
    if (s->count < 0 || s->count > 64) return moe__fail_range(err, "layer.shared.count", s->count, 0, 64);
    if ((result = moe__check_flag(s->gate, "layer.shared.gate", err)) != MOE_OK) return result;
    if (s->count == 0) {
        if (s->intermediate_size != 0 || s->gate != 0)
            return moe__fail(err, MOE_ERROR_ARGUMENT, "layer.shared.count",
                             "is 0, but layer.shared has a size or a gate");
        memset(s, 0, sizeof *s);
        return MOE_OK;
    }
    if (s->intermediate_size < 1 || s->intermediate_size > MOE__SIZE_MAX / s->count)
        return moe__fail_range(err, "layer.shared.intermediate_size", s->intermediate_size, 1,
                               MOE__SIZE_MAX / s->count);
    if ((result = moe__check_float(s->scale, -3.0e38f, "layer.shared.scale", err)) != MOE_OK) return result;
    if (s->scale == 0) s->scale = 1;
    if (s->activation.kind == MOE_ACTIVATION_UNSET) s->activation = layer->activation;
    if (s->activation.per_expert) s->activation.per_expert = 0; // tables are of the routed experts
    if ((result = moe__activation_resolve(&s->activation, "layer.shared.activation", err)) != MOE_OK) return result;
    if (moe_activation_is_gated(s->activation.kind) != moe__layer_is_gated(layer))
        return moe__fail(err, MOE_ERROR_UNSUPPORTED, "layer.shared.activation.kind",
                         "is %s, the routed experts' is %s: both must be gated, or neither",
                         moe_activation_string(s->activation.kind), moe_activation_string(layer->activation.kind));
    if (layer->parallel.tp_size > s->intermediate_size * s->count)
        return moe__fail_range(err, "layer.parallel.tp_size", layer->parallel.tp_size, 1,
                               s->intermediate_size * s->count);
    return MOE_OK;
}

static int32_t moe__router_resolve(moe_layer_desc *layer, moe_error *err)
{
    moe_router_desc *r = &layer->router;
    int32_t result;
    if ((result = moe__check_flag(r->rms_norm, "layer.router.rms_norm", err)) != MOE_OK ||
        (result = moe__check_flag(r->input_scale, "layer.router.input_scale", err)) != MOE_OK ||
        (result = moe__check_flag(r->bias, "layer.router.bias", err)) != MOE_OK ||
        (result = moe__check_float(r->norm_epsilon, 0, "layer.router.norm_epsilon", err)) != MOE_OK ||
        (result = moe__check_float(r->input_multiplier, -3.0e38f, "layer.router.input_multiplier", err)) != MOE_OK)
        return result;
    if (r->input_multiplier == 0) r->input_multiplier = 1;
    if (r->input_size == 0) r->input_size = layer->hidden_size;
    if (r->input_size < 1 || r->input_size > MOE__SIZE_MAX)
        return moe__fail_range(err, "layer.router.input_size", r->input_size, 1, MOE__SIZE_MAX);
    return MOE_OK;
}

static int32_t moe__layer_resolve(moe_layer_desc *layer, moe_error *err)
{
    int32_t result;
    if (layer->hidden_size < 1 || layer->hidden_size > MOE__SIZE_MAX)
        return moe__fail_range(err, "layer.hidden_size", layer->hidden_size, 1, MOE__SIZE_MAX);
    if (layer->intermediate_size < 1 || layer->intermediate_size > MOE__SIZE_MAX)
        return moe__fail_range(err, "layer.intermediate_size", layer->intermediate_size, 1, MOE__SIZE_MAX);
    if (layer->num_experts < 1 || layer->num_experts > MOE_MAX_EXPERTS)
        return moe__fail_range(err, "layer.num_experts", layer->num_experts, 1, MOE_MAX_EXPERTS);
    if ((result = moe__format_resolve(layer, err)) != MOE_OK ||
        (result = moe__check_flag(layer->gemm1_bias, "layer.gemm1_bias", err)) != MOE_OK ||
        (result = moe__check_flag(layer->gemm2_bias, "layer.gemm2_bias", err)) != MOE_OK ||
        (result = moe__check_flag(layer->row_norm, "layer.row_norm", err)) != MOE_OK ||
        (result = moe__check_float(layer->row_norm_epsilon, 0, "layer.row_norm_epsilon", err)) != MOE_OK ||
        (result = moe__check_float(layer->output_scale, -3.0e38f, "layer.output_scale", err)) != MOE_OK ||
        (result = moe__activation_resolve(&layer->activation, "layer.activation", err)) != MOE_OK ||
        (result = moe__routing_resolve(&layer->routing, layer->num_experts, err)) != MOE_OK ||
        (result = moe__router_resolve(layer, err)) != MOE_OK ||
        (result = moe__parallel_resolve(layer, err)) != MOE_OK ||
        (result = moe__shared_resolve(layer, err)) != MOE_OK)
        return result;
    if (layer->output_scale == 0) layer->output_scale = 1;
    layer->struct_size = sizeof *layer;
    return MOE_OK;
}

// The part [*first, *first + *count) of `size` features that this rank owns, cut at multiples of `group`.
static void moe__parallel_slice(const moe_parallel_desc *parallel, int32_t size, int32_t group, int32_t *first,
                                int32_t *count)
{
    int64_t groups = (size + group - 1) / group;
    int64_t low = groups * parallel->tp_rank / parallel->tp_size * group;
    int64_t high = groups * (parallel->tp_rank + 1) / parallel->tp_size * group;
    if (high > size) high = size;
    *first = (int32_t)low;
    *count = (int32_t)(high - low);
}

// Where the matrices of expert `id` lie on this rank: 0..local_experts-1 routed, then the always-on ones; -1 elsewhere,
// and for special ids.
static int32_t moe__layer_local(const moe_layer_desc *layer, int32_t id)
{
    const moe_parallel_desc *p = &layer->parallel;
    int32_t extra;
    if (id < 0) return -1;
    if (id < layer->num_experts) {
        int32_t local = p->expert_map != NULL ? p->expert_map[id] : id - p->expert_offset;
        return local >= 0 && local < p->local_experts ? local : -1;
    }
    extra = id - layer->num_experts - layer->routing.special_experts;
    return extra >= 0 && extra < layer->routing.extra_slots && !p->omit_common ? p->local_experts + extra : -1;
}

MOE_API int32_t moe_layer_resolve(moe_layer_desc *layer, moe_error *err)
{
    moe_layer_desc copy;
    int32_t result;
    if (layer == NULL) return moe__fail_null(err, "layer");
    if ((result = moe__copy_desc(&copy, sizeof copy, layer, "layer", err)) != MOE_OK) return result;
    if ((result = moe__layer_resolve(&copy, err)) != MOE_OK) return result;
    *layer = copy;
    return moe__ok(err);
}

// >>infer names  what a checkpoint tensor is  Tables, matched from the left: the way to a layer, the block's name, the
// module's, the value's. Towers other than the language model (vision, audio, drafts) are not on the way to a layer, so
// their experts are never taken for the model's.
#ifndef MOE_NO_CONFIG

enum { MOE__LAYERS_MAX = 65536 };

enum { // where a module may stand inside a layer
    MOE__IN_MLP = 1,
    MOE__IN_SPARSE = 2,
    MOE__IN_FEED_FORWARD = 4,
    MOE__IN_FFN = 8,
    MOE__IN_MIXER = 16,
    MOE__IN_MOE = 32,
    MOE__IN_LAYER = 64,
    MOE__IN_BLOCK = 63,
    MOE__IN_ANY = 127
};

typedef struct moe__name_block { const char *name; int32_t block; } moe__name_block;

static const moe__name_block moe__name_blocks[] = {
    { "mlp.", MOE__IN_MLP },
    { "block_sparse_moe.", MOE__IN_SPARSE },
    { "feed_forward.", MOE__IN_FEED_FORWARD },
    { "ffn.", MOE__IN_FFN },
    { "mixer.", MOE__IN_MIXER },
    { "moe.", MOE__IN_MOE },
    { "", MOE__IN_LAYER },
};

typedef struct moe__name_module {
    const char *pattern; // '#' is an expert's number
    int32_t blocks, role;
    int32_t whole;       // 1: the name ends here; 0: one of moe__name_values follows
} moe__name_module;

// Longer names stand before those that they begin with.
static const moe__name_module moe__name_modules[] = {
    { "experts.#.gate_up_proj", MOE__IN_ANY, MOE_TENSOR_GATE_UP, 0 },
    { "experts.#.gate_proj", MOE__IN_ANY, MOE_TENSOR_GATE, 0 },
    { "experts.#.up_proj", MOE__IN_ANY, MOE_TENSOR_UP, 0 },
    { "experts.#.down_proj", MOE__IN_ANY, MOE_TENSOR_DOWN, 0 },
    { "experts.#.w13", MOE__IN_ANY, MOE_TENSOR_GATE_UP, 0 },
    { "experts.#.w1", MOE__IN_ANY, MOE_TENSOR_GATE, 0 },
    { "experts.#.w3", MOE__IN_ANY, MOE_TENSOR_UP, 0 },
    { "experts.#.w2", MOE__IN_ANY, MOE_TENSOR_DOWN, 0 },
    { "experts.#.linear_v", MOE__IN_ANY, MOE_TENSOR_UP, 0 }, // Grok-1
    { "experts.#.linear_1", MOE__IN_ANY, MOE_TENSOR_DOWN, 0 },
    { "experts.#.linear", MOE__IN_ANY, MOE_TENSOR_GATE, 0 },
    { "experts.#.approx_value", MOE__IN_ANY, MOE_TENSOR_CONSTANT, 1 },
    { "experts.gate_up_proj", MOE__IN_ANY, MOE_TENSOR_GATE_UP, 0 },
    { "experts.gate_proj", MOE__IN_ANY, MOE_TENSOR_GATE, 0 },
    { "experts.up_proj", MOE__IN_ANY, MOE_TENSOR_UP, 0 },
    { "experts.down_proj", MOE__IN_ANY, MOE_TENSOR_DOWN, 0 },
    { "experts.w13", MOE__IN_ANY, MOE_TENSOR_GATE_UP, 0 },
    { "experts.w1", MOE__IN_ANY, MOE_TENSOR_GATE, 0 },
    { "experts.w3", MOE__IN_ANY, MOE_TENSOR_UP, 0 },
    { "experts.w2", MOE__IN_ANY, MOE_TENSOR_DOWN, 0 },
    { "experts.fc1", MOE__IN_ANY, MOE_TENSOR_GATE_UP, 0 }, // Aria
    { "experts.fc2", MOE__IN_ANY, MOE_TENSOR_DOWN, 0 },
    { "experts.mlp.w1", MOE__IN_FFN, MOE_TENSOR_GATE, 0 }, // DBRX
    { "experts.mlp.v1", MOE__IN_FFN, MOE_TENSOR_UP, 0 },
    { "experts.mlp.w2", MOE__IN_FFN, MOE_TENSOR_DOWN, 0 },
    { "input_linear", MOE__IN_SPARSE, MOE_TENSOR_GATE_UP, 0 }, // Granite
    { "output_linear", MOE__IN_SPARSE, MOE_TENSOR_DOWN, 0 },
    { "gate_proj", MOE__IN_MOE, MOE_TENSOR_GATE, 0 }, // Step: stacked, but apart
    { "up_proj", MOE__IN_MOE, MOE_TENSOR_UP, 0 },
    { "down_proj", MOE__IN_MOE, MOE_TENSOR_DOWN, 0 },
    { "experts.post_expert_norm.weight", MOE__IN_ANY, MOE_TENSOR_ROW_NORM, 1 },
    { "experts.post_expert_norm", MOE__IN_ANY, MOE_TENSOR_ROW_NORM, 1 },
    { "experts.per_expert_scale", MOE__IN_ANY, MOE_TENSOR_PER_EXPERT_SCALE, 1 },

    { "shared_expert_gate.weight", MOE__IN_ANY, MOE_TENSOR_SHARED_TOKEN_GATE, 1 },
    { "shared_experts.gate_up_proj", MOE__IN_ANY, MOE_TENSOR_SHARED_GATE_UP, 0 },
    { "shared_experts.gate_proj", MOE__IN_ANY, MOE_TENSOR_SHARED_GATE, 0 },
    { "shared_experts.up_proj", MOE__IN_ANY, MOE_TENSOR_SHARED_UP, 0 },
    { "shared_experts.down_proj", MOE__IN_ANY, MOE_TENSOR_SHARED_DOWN, 0 },
    { "shared_experts.w1", MOE__IN_ANY, MOE_TENSOR_SHARED_GATE, 0 },
    { "shared_experts.w3", MOE__IN_ANY, MOE_TENSOR_SHARED_UP, 0 },
    { "shared_experts.w2", MOE__IN_ANY, MOE_TENSOR_SHARED_DOWN, 0 },
    { "shared_experts.shared_w13", MOE__IN_ANY, MOE_TENSOR_SHARED_GATE_UP, 0 }, // Inkling
    { "shared_experts.shared_w2", MOE__IN_ANY, MOE_TENSOR_SHARED_DOWN, 0 },
    { "shared_expert.gate_up_proj", MOE__IN_ANY, MOE_TENSOR_SHARED_GATE_UP, 0 },
    { "shared_expert.gate_proj", MOE__IN_ANY, MOE_TENSOR_SHARED_GATE, 0 },
    { "shared_expert.up_proj", MOE__IN_ANY, MOE_TENSOR_SHARED_UP, 0 },
    { "shared_expert.down_proj", MOE__IN_ANY, MOE_TENSOR_SHARED_DOWN, 0 },
    { "shared_mlp.gate_up_proj", MOE__IN_ANY, MOE_TENSOR_SHARED_GATE_UP, 0 }, // HunYuan
    { "shared_mlp.gate_proj", MOE__IN_ANY, MOE_TENSOR_SHARED_GATE, 0 },
    { "shared_mlp.up_proj", MOE__IN_ANY, MOE_TENSOR_SHARED_UP, 0 },
    { "shared_mlp.down_proj", MOE__IN_ANY, MOE_TENSOR_SHARED_DOWN, 0 },
    { "shared_mlp.input_linear", MOE__IN_ANY, MOE_TENSOR_SHARED_GATE_UP, 0 }, // Granite
    { "shared_mlp.output_linear", MOE__IN_ANY, MOE_TENSOR_SHARED_DOWN, 0 },
    { "share_expert.gate_proj", MOE__IN_ANY, MOE_TENSOR_SHARED_GATE, 0 }, // Step
    { "share_expert.up_proj", MOE__IN_ANY, MOE_TENSOR_SHARED_UP, 0 },
    { "share_expert.down_proj", MOE__IN_ANY, MOE_TENSOR_SHARED_DOWN, 0 },

    { "gate.e_score_correction_bias", MOE__IN_ANY, MOE_TENSOR_SELECT_BIAS, 1 },
    { "gate.expert_bias", MOE__IN_ANY, MOE_TENSOR_SELECT_BIAS, 1 },
    { "gate.bias_vl", MOE__IN_ANY, MOE_TENSOR_SELECT_BIAS, 1 },
    { "gate.bias", MOE__IN_ANY, MOE_TENSOR_SELECT_BIAS, 1 }, // DeepSeek's own files, Inkling
    { "gate.global_scale", MOE__IN_ANY, MOE_TENSOR_ROUTER_GLOBAL_SCALE, 1 },
    { "gate.tid2eid", MOE__IN_ANY, MOE_TENSOR_FORCED_IDS, 1 },
    { "gate.wg", MOE__IN_ANY, MOE_TENSOR_ROUTER, 0 },
    { "gate", MOE__IN_ANY, MOE_TENSOR_ROUTER, 0 },
    { "e_score_correction_bias", MOE__IN_BLOCK, MOE_TENSOR_SELECT_BIAS, 1 },
    { "experts.e_score_correction_bias", MOE__IN_ANY, MOE_TENSOR_SELECT_BIAS, 1 },
    { "moe_statics.e_score_correction_bias", MOE__IN_ANY, MOE_TENSOR_SELECT_BIAS, 1 },
    { "expert_bias", MOE__IN_BLOCK, MOE_TENSOR_SELECT_BIAS, 1 },
    { "router_bias", MOE__IN_BLOCK, MOE_TENSOR_SELECT_BIAS, 1 },
    { "router.expert_bias", MOE__IN_ANY, MOE_TENSOR_SELECT_BIAS, 1 },
    { "router.e_score_correction_bias", MOE__IN_ANY, MOE_TENSOR_SELECT_BIAS, 1 },
    { "router.per_expert_scale", MOE__IN_ANY, MOE_TENSOR_PER_EXPERT_SCALE, 1 },
    { "router.scale", MOE__IN_ANY, MOE_TENSOR_ROUTER_INPUT_SCALE, 1 },
    { "router.bias", MOE__IN_ANY, MOE_TENSOR_ROUTER_BIAS, 1 },
    { "router.classifier.bias", MOE__IN_ANY, MOE_TENSOR_ROUTER_BIAS, 1 },
    { "router.layer.bias", MOE__IN_ANY, MOE_TENSOR_ROUTER_BIAS, 1 },
    { "router.classifier", MOE__IN_ANY, MOE_TENSOR_ROUTER, 0 },
    { "router.layer", MOE__IN_ANY, MOE_TENSOR_ROUTER, 0 },
    { "router.proj", MOE__IN_ANY, MOE_TENSOR_ROUTER, 0 },
    { "router.gate", MOE__IN_ANY, MOE_TENSOR_ROUTER, 0 },
    { "router", MOE__IN_ANY, MOE_TENSOR_ROUTER, 0 },
};

typedef struct moe__name_value {
    const char *suffix;
    int32_t part, bias;
} moe__name_value;

// What a name ends with, behind '.' or '_': ".weight", "_blocks", "".
static const moe__name_value moe__name_values[] = {
    { "", MOE_PART_DATA, 0 },
    { "weight", MOE_PART_DATA, 0 },
    { "weight_packed", MOE_PART_DATA, 0 }, // compressed-tensors
    { "blocks", MOE_PART_DATA, 0 },        // gpt-oss
    { "bias", MOE_PART_DATA, 1 },
    { "weight_scale", MOE_PART_SCALE, 0 },
    { "weight_scale_inv", MOE_PART_SCALE, 0 }, // multiplies, in spite of its name
    { "scale", MOE_PART_SCALE, 0 },
    { "scale_inv", MOE_PART_SCALE, 0 },
    { "scales", MOE_PART_SCALE, 0 },
    { "weight_scale_2", MOE_PART_GLOBAL_SCALE, 0 },
    { "scale_2", MOE_PART_GLOBAL_SCALE, 0 },
    { "weight_global_scale", MOE_PART_GLOBAL_SCALE_RECIPROCAL, 0 },
    { "input_scale", MOE_PART_INPUT_SCALE, 0 },
    { "input_global_scale", MOE_PART_INPUT_SCALE_RECIPROCAL, 0 },
    { "weight_shape", MOE_PART_SHAPE, 0 },
};

// Behind `prefix` in `name`, or NULL.
static const char *moe__name_after(const char *name, const char *prefix)
{
    size_t length = strlen(prefix);
    return strncmp(name, prefix, length) == 0 ? name + length : NULL;
}

// A number below `limit` without a sign or leading zeros; behind it, or NULL.
static const char *moe__name_number(const char *name, int32_t limit, int32_t *out)
{
    const char *p = name;
    *out = 0;
    while (*p >= '0' && *p <= '9' && *out < limit) *out = *out * 10 + (*p++ - '0');
    return p == name || *out >= limit || (*name == '0' && p - name > 1) ? NULL : p;
}

// Behind "model.layers.7." and its kin, or NULL.
static const char *moe__name_layer(const char *name, int32_t *layer)
{
    static const char *const way[] = { "model.", "language_model.", "text_model.", "llm.", "backbone.", "transformer.",
                                       "thinker." };
    static const char *const lists[] = { "layers.", "blocks.", "h." };
    const char *after;
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(way);) {
        after = moe__name_after(name, way[i]);
        if (after == NULL) { i++; continue; }
        name = after;
        i = 0;
    }
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(lists); i++) {
        after = moe__name_after(name, lists[i]);
        if (after == NULL || (after = moe__name_number(after, MOE__LAYERS_MAX, layer)) == NULL ||
            *after != '.') continue;
        return after + 1;
    }
    return NULL;
}

// Behind `pattern`, which may have one '#', or NULL.
static const char *moe__name_match(const char *name, const char *pattern, int32_t *expert)
{
    *expert = -1;
    for (; *pattern != 0; pattern++) {
        if (*pattern != '#') {
            if (*name++ != *pattern) return NULL;
            continue;
        }
        name = moe__name_number(name, MOE_MAX_EXPERTS, expert);
        if (name == NULL) return NULL;
    }
    return name;
}

static int32_t moe__role_bias(int32_t role)
{
    switch (role) {
    case MOE_TENSOR_GATE: return MOE_TENSOR_GATE_BIAS;
    case MOE_TENSOR_UP: return MOE_TENSOR_UP_BIAS;
    case MOE_TENSOR_GATE_UP: return MOE_TENSOR_GATE_UP_BIAS;
    case MOE_TENSOR_DOWN: return MOE_TENSOR_DOWN_BIAS;
    default: return MOE_TENSOR_UNSET;
    }
}

// The module and value that `rest` names inside a block; 0 when it names none.
static int32_t moe__name_resolve(const char *rest, int32_t block, moe_tensor_name *out)
{
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(moe__name_modules); i++) {
        const moe__name_module *m = &moe__name_modules[i];
        const char *value = (m->blocks & block) != 0 ? moe__name_match(rest, m->pattern, &out->expert) : NULL;
        if (value == NULL) continue;
        out->part = MOE_PART_DATA;
        out->role = m->role;
        if (m->whole) {
            if (*value != 0) continue;
            if (m->role == MOE_TENSOR_SELECT_BIAS) out->index = strcmp(m->pattern, "gate.bias_vl") == 0;
            return 1;
        }
        if (*value == '.' || *value == '_') value++;
        else if (*value != 0) continue;
        for (int32_t j = 0; j < MOE__ARRAY_COUNT(moe__name_values); j++) {
            if (strcmp(value, moe__name_values[j].suffix) != 0) continue;
            out->part = moe__name_values[j].part;
            if (moe__name_values[j].bias) out->role = moe__role_bias(m->role);
            return out->role != MOE_TENSOR_UNSET;
        }
    }
    return 0;
}

MOE_API int32_t moe_tensor_from_name(const char *name, moe_tensor_name *out, moe_error *err)
{
    moe_tensor_name found;
    const char *rest;
    if (out == NULL) return moe__fail_null(err, "out");
    memset(out, 0, sizeof *out);
    if (name == NULL) return moe__fail_null(err, "name");
    memset(&found, 0, sizeof found);
    found.index = -1;
    rest = moe__name_layer(name, &found.layer);
    for (int32_t i = 0; rest != NULL && i < MOE__ARRAY_COUNT(moe__name_blocks); i++) {
        const char *inside = moe__name_after(rest, moe__name_blocks[i].name);
        if (inside == NULL || !moe__name_resolve(inside, moe__name_blocks[i].block, &found)) continue;
        *out = found;
        return moe__ok(err);
    }
    return moe__fail(err, MOE_ERROR_MISSING, "name", "is %q: no tensor of a MoE layer by any naming scheme known here",
                     name);
}

// >>infer model  config.json -> layer  A table says for each model type how it routes, how its files lie and what its
// keys mean when they are left out; readers that know every alias do the rest. A failure sticks: after the first one,
// readers return 0 and change nothing, so the code below reads as if there were none. Each fact is noted with the key
// it came from.

typedef enum moe__rule { // how a family routes; see moe_routing_method
    MOE__RULE_SOFTMAX,   // softmax, top-k, / sum or not
    MOE__RULE_AFTER,     // top-k, softmax over the chosen
    MOE__RULE_SIGMOID,   // sigmoid, top-k, / sum or not
    MOE__RULE_BIASED,    // sigmoid, + bias, groups by their top 2, / sum or not
    MOE__RULE_EACH,      // softmax, top-k / n in each of n groups
    MOE__RULE_LLAMA4,
    MOE__RULE_COHERE2,
    MOE__RULE_GEMMA4,
    MOE__RULE_PHIMOE,
    MOE__RULE_DEEPSEEK_V2,
    MOE__RULE_DEEPSEEK_V4,
    MOE__RULE_DEEPSEEK_V41,
    MOE__RULE_MISTRAL4,
    MOE__RULE_ERNIE45,
    MOE__RULE_LONGCAT,
    MOE__RULE_ZAYA,
    MOE__RULE_INKLING,
    MOE__RULE_KOLIBRI,
    MOE__RULE_AUTO       // the config's own words decide
} moe__rule;

enum { // traits of a family
    MOE__WIDE = 1,           // "intermediate_size" is the experts' where there is no narrower key
    MOE__NORM_ALWAYS = 2,    // weights are divided by their sum whatever the keys say
    MOE__NORM_NEVER = 4,
    MOE__SCALE_OUTPUT = 8,   // the scale multiplies the routed sum, not the weights
    MOE__SHARED_GATE = 16,   // sigmoid gate per token on the shared expert
    MOE__SHARED_NO_LIMIT = 32,
    MOE__LIMIT_STEP = 64,    // limits are of the step kind: clamp behind silu
    MOE__SHARED_STEP = 128,  // the shared experts' are, the routed experts' are not
    MOE__NOT_GATED = 256,
    MOE__BIASES = 512,       // experts and router have biases; swigluoai whatever "hidden_act" says (gpt-oss)
    MOE__EXCLUDED_ZERO = 1024,
    MOE__SILU = 2048,        // whatever "hidden_act" says
    MOE__BLOCK_TYPES = 4096, // a list or pattern of block types says where experts are (Nemotron)
    MOE__SITU = 8192,
    MOE__LOGIT_MULTIPLIER = 16384,
    MOE__ROW_NORM = 32768
};

typedef enum moe__file_layout { // how released files lie
    MOE__STORE_SEPARATE,       // gate, up, down: one tensor each, or one stack each
    MOE__STORE_FUSED,          // gate_up [E, 2I, H]
    MOE__STORE_FUSED_MN,       // gate_up [E, H, 2I], down [E, I, H]
    MOE__STORE_FUSED_SHAPE,    // both exist under the same names
    MOE__STORE_INTERLEAVED,    // gate_up [E, 2I, H], rows alternate
    MOE__STORE_INTERLEAVED_MN, // gate_up [E, H, 2I], columns alternate
    MOE__STORE_FLAT            // [E I, H] for all three: down is input-major (DBRX)
} moe__file_layout;

typedef struct moe__family {
    const char *types; // model types and architectures
    moe__rule rule;
    float epsilon;
    int32_t traits;
    moe__file_layout store;
    const char *defaults; // JSON: what keys mean when they are left out
} moe__family;

#define MOE__V3_KEYS(dense, groups, kept, shared, scale) \
    "\"first_k_dense_replace\":" #dense ",\"n_group\":" #groups ",\"topk_group\":" #kept \
    ",\"n_shared_experts\":" #shared ",\"routed_scaling_factor\":" #scale ",\"norm_topk_prob\":true"
#define MOE__V3_DEFAULTS(dense, groups, kept, shared, scale) "{" MOE__V3_KEYS(dense, groups, kept, shared, scale) "}"

static const moe__family moe__families[] = {
    // softmax
    { "mixtral minimax minimax_text_01", MOE__RULE_SOFTMAX, 0, MOE__WIDE | MOE__NORM_ALWAYS, MOE__STORE_SEPARATE,
     "{}" },
    { "qwen2_moe", MOE__RULE_SOFTMAX, 0, MOE__SHARED_GATE, MOE__STORE_SEPARATE, "{\"norm_topk_prob\":false}" },
    { "qwen3_moe sdar_moe iquest_q1", MOE__RULE_SOFTMAX, 0, 0, MOE__STORE_SEPARATE, "{\"norm_topk_prob\":false}" },
    { "qwen3_vl_moe qwen3_vl_moe_text", MOE__RULE_SOFTMAX, 0, MOE__NORM_ALWAYS, MOE__STORE_FUSED_SHAPE, "{}" },
    { "qwen3_omni_moe qwen3_omni_moe_thinker qwen3_omni_moe_text mellum", MOE__RULE_SOFTMAX, 0, 0, MOE__STORE_SEPARATE,
      "{\"norm_topk_prob\":true}" },
    { "qwen3_next", MOE__RULE_SOFTMAX, 0, MOE__SHARED_GATE, MOE__STORE_SEPARATE, "{\"norm_topk_prob\":true}" },
    { "qwen3_5_moe qwen3_5_moe_text", MOE__RULE_SOFTMAX, 0, MOE__NORM_ALWAYS | MOE__SHARED_GATE, MOE__STORE_FUSED,
     "{}" },
    { "qwen4_exp qwen4_exp_text", MOE__RULE_SOFTMAX, 0, MOE__SHARED_GATE, MOE__STORE_FUSED,
     "{\"norm_topk_prob\":true}" },
    { "olmoe flex_olmo", MOE__RULE_SOFTMAX, 0, MOE__WIDE, MOE__STORE_SEPARATE, "{\"norm_topk_prob\":false}" },
    { "jamba", MOE__RULE_SOFTMAX, 0, MOE__WIDE | MOE__NORM_NEVER, MOE__STORE_SEPARATE,
      "{\"expert_layer_period\":2,\"expert_layer_offset\":1}" },
    { "dbrx", MOE__RULE_SOFTMAX, 0, 0, MOE__STORE_FLAT, "{\"moe_normalize_expert_weights\":1}" },
    { "hunyuan_v1_moe", MOE__RULE_SOFTMAX, 0, MOE__WIDE | MOE__NORM_ALWAYS, MOE__STORE_SEPARATE,
      "{\"num_shared_expert\":1}" },
    { "interns1_pro interns1_pro_text", MOE__RULE_EACH, 0, 0, MOE__STORE_SEPARATE, "{\"norm_topk_prob\":true}" },
    { "bailing_moe", MOE__RULE_AUTO, 1e-20f, 0, MOE__STORE_SEPARATE,
      "{\"score_function\":\"softmax\",\"norm_topk_prob\":true}" },
    { "grok-1 grok1 Grok1ForCausalLM Grok1ModelForCausalLM", MOE__RULE_SOFTMAX, 0, MOE__WIDE | MOE__NORM_NEVER,
      MOE__STORE_SEPARATE, "{\"router_logit_softcapping\":30.0,\"hidden_act\":\"gelu\"}" },
    { "MistralLarge3ForCausalLM", MOE__RULE_SOFTMAX, 0, MOE__NORM_ALWAYS, MOE__STORE_SEPARATE,
      "{\"first_k_dense_replace\":3,\"n_shared_experts\":1}" },
    { "mistral-params", MOE__RULE_SOFTMAX, 0, MOE__NORM_ALWAYS, MOE__STORE_SEPARATE, "{}" },
    { "gemma4 gemma4_text", MOE__RULE_GEMMA4, 0, MOE__NORM_ALWAYS, MOE__STORE_FUSED,
      "{\"hidden_activation\":\"gelu_pytorch_tanh\",\"rms_norm_eps\":1e-6}" },
    { "phimoe", MOE__RULE_PHIMOE, 0, MOE__WIDE, MOE__STORE_SEPARATE, "{\"router_jitter_noise\":0.01}" },
    { "mistral4 mistral4_text", MOE__RULE_MISTRAL4, 1e-20f, 0, MOE__STORE_FUSED, MOE__V3_DEFAULTS(0, 1, 1, 1, 1.0) },
    { "mistral_large4 mistral_large4_text", MOE__RULE_MISTRAL4, 1e-20f, MOE__NORM_ALWAYS, MOE__STORE_FUSED,
      MOE__V3_DEFAULTS(1, 1, 1, 1, 1.0) },
    { "ernie4_5_moe", MOE__RULE_ERNIE45, 1e-12f, 0, MOE__STORE_SEPARATE,
      "{\"moe_num_shared_experts\":2,\"moe_norm_min\":1e-12,\"moe_layer_start_index\":1,\"moe_layer_end_index\":-1,"
      "\"moe_layer_interval\":1}" },
    { "longcat_flash", MOE__RULE_LONGCAT, 0, MOE__NORM_NEVER, MOE__STORE_SEPARATE,
      "{\"zero_expert_num\":256,\"zero_expert_type\":\"identity\",\"routed_scaling_factor\":6.0}" },
    { "zaya", MOE__RULE_ZAYA, 0, MOE__NORM_NEVER, MOE__STORE_SEPARATE, "{}" },

    // top-k on logits
    { "gpt_oss", MOE__RULE_AFTER, 0, MOE__WIDE | MOE__BIASES, MOE__STORE_INTERLEAVED_MN,
      "{\"swiglu_limit\":7.0,\"swiglu_alpha\":1.702}" },
    { "granitemoe granitemoeshared granitemoe_swa", MOE__RULE_AFTER, 0, MOE__WIDE, MOE__STORE_FUSED,
      "{\"shared_intermediate_size\":0}" },
    { "granitemoehybrid", MOE__RULE_AFTER, 0, MOE__WIDE, MOE__STORE_FUSED, "{\"shared_intermediate_size\":1024}" },
    { "aria aria_text", MOE__RULE_AFTER, 0, MOE__WIDE | MOE__SILU, MOE__STORE_FUSED_MN,
      "{\"moe_num_shared_experts\":2}" },
    { "cohere2_moe", MOE__RULE_COHERE2, 0, MOE__WIDE, MOE__STORE_SEPARATE,
      "{\"expert_selection_fn\":\"softmax\",\"norm_topk_prob\":true,\"num_shared_experts\":0,"
      "\"shared_expert_combination_strategy\":\"average\",\"first_k_dense_replace\":0}" },
    { "llama4 llama4_text", MOE__RULE_LLAMA4, 0, MOE__WIDE, MOE__STORE_FUSED_MN,
      "{\"interleave_moe_layer_step\":1,\"n_shared_experts\":1}" },
    { "kolibri1", MOE__RULE_KOLIBRI, 0, 0, MOE__STORE_SEPARATE, "{\"norm_topk_prob\":false}" },

    // sigmoid with a selection bias
    { "deepseek_v3 deepseek_v32 kimi_k2 kimi_k25", MOE__RULE_BIASED, 1e-20f, 0, MOE__STORE_SEPARATE,
      MOE__V3_DEFAULTS(3, 8, 4, 1, 2.5) },
    { "kimi_linear kimi_k3", MOE__RULE_BIASED, 1e-20f, 0, MOE__STORE_SEPARATE, MOE__V3_DEFAULTS(1, 1, 1, 1, 2.446) },
    { "glm4_moe glm4v_moe glm4v_moe_text", MOE__RULE_BIASED, 1e-20f, 0, MOE__STORE_SEPARATE,
      MOE__V3_DEFAULTS(1, 1, 1, 1, 1.0) },
    { "glm4_moe_lite", MOE__RULE_BIASED, 1e-20f, 0, MOE__STORE_SEPARATE, MOE__V3_DEFAULTS(1, 1, 1, 1, 1.8) },
    { "glm_moe_dsa", MOE__RULE_BIASED, 1e-20f, 0, MOE__STORE_SEPARATE, MOE__V3_DEFAULTS(3, 1, 1, 1, 2.5) },
    { "glm5_next glm5_next_text", MOE__RULE_BIASED, 1e-20f, 0, MOE__STORE_SEPARATE,
      "{" MOE__V3_KEYS(3, 1, 1, 1, 2.5) ",\"swiglu_limit\":10.0}" },
    { "dots1", MOE__RULE_BIASED, 1e-20f, 0, MOE__STORE_SEPARATE,
      "{\"first_k_dense_replace\":0,\"n_group\":1,\"topk_group\":1,\"routed_scaling_factor\":1.0,"
      "\"norm_topk_prob\":false}" },
    { "dots3_note dots3_note_text", MOE__RULE_BIASED, 1e-20f, 0, MOE__STORE_SEPARATE, MOE__V3_DEFAULTS(1, 1, 1, 1,
                                                                                                       1.0) },
    { "mimo_v2_flash", MOE__RULE_BIASED, 1e-20f, 0, MOE__STORE_SEPARATE, MOE__V3_DEFAULTS(1, 1, 1, 0, 1.0) },
    { "axk1", MOE__RULE_BIASED, 1e-20f, 0, MOE__STORE_SEPARATE, MOE__V3_DEFAULTS(1, 8, 4, 1, 2.5) },
    { "axk2", MOE__RULE_BIASED, 1e-20f, MOE__EXCLUDED_ZERO, MOE__STORE_SEPARATE, MOE__V3_DEFAULTS(1, 1, 1, 1, 2.5) },
    { "beam", MOE__RULE_BIASED, 1e-20f, MOE__SCALE_OUTPUT, MOE__STORE_SEPARATE, MOE__V3_DEFAULTS(3, 8, 4, 0, 2.5) },
    { "exaone_moe", MOE__RULE_BIASED, 1e-20f, 0, MOE__STORE_SEPARATE, MOE__V3_DEFAULTS(1, 1, 1, 1, 2.5) },
    { "solar_open", MOE__RULE_BIASED, 1e-20f, 0, MOE__STORE_SEPARATE, MOE__V3_DEFAULTS(0, 1, 1, 1, 1.0) },
    { "afmoe", MOE__RULE_BIASED, 1e-20f, MOE__NORM_ALWAYS, MOE__STORE_SEPARATE,
      "{\"num_dense_layers\":1,\"num_shared_experts\":2,\"route_scale\":1.0}" },
    { "hy_v3", MOE__RULE_BIASED, 1e-20f, MOE__NORM_ALWAYS, MOE__STORE_SEPARATE, MOE__V3_DEFAULTS(1, 1, 1, 1, 2.826) },
    { "hy_v4", MOE__RULE_BIASED, 1e-20f, MOE__SHARED_NO_LIMIT, MOE__STORE_SEPARATE,
      "{" MOE__V3_KEYS(1, 1, 1, 1, 2.827) ",\"swiglu_limit\":10.0}" },
    { "BailingMoeV2ForCausalLM llada2_moe sarvam_moe param2_moe", MOE__RULE_BIASED, 1e-20f, 0, MOE__STORE_SEPARATE,
      MOE__V3_DEFAULTS(0, 1, 1, 0, 1.0) },
    { "bailing_hybrid", MOE__RULE_BIASED, 1e-20f, MOE__SHARED_STEP, MOE__STORE_SEPARATE, MOE__V3_DEFAULTS(2, 8, 4, 1,
                                                                                                          2.5) },
    { "pangu_ultra_moe", MOE__RULE_BIASED, 1e-20f, MOE__SCALE_OUTPUT, MOE__STORE_SEPARATE,
      MOE__V3_DEFAULTS(3, 1, 1, 1, 1.0) },
    { "alice_ai", MOE__RULE_BIASED, 1e-20f, MOE__SHARED_GATE, MOE__STORE_SEPARATE, MOE__V3_DEFAULTS(0, 1, 1, 1, 1.0) },
    { "k2_horizon", MOE__RULE_BIASED, 1e-20f, 0, MOE__STORE_SEPARATE, MOE__V3_DEFAULTS(0, 1, 1, 0, 1.0) },
    { "nemotron_h nemotron_h_puzzle", MOE__RULE_BIASED, 1e-20f, MOE__NOT_GATED | MOE__BLOCK_TYPES, MOE__STORE_SEPARATE,
      "{\"n_group\":1,\"topk_group\":1,\"n_shared_experts\":1,\"routed_scaling_factor\":1.0,\"norm_topk_prob\":true,"
      "\"mlp_hidden_act\":\"relu2\"}" },
    { "inkling2 inkling2_text", MOE__RULE_BIASED, 1e-20f, MOE__NORM_ALWAYS | MOE__SITU, MOE__STORE_INTERLEAVED,
      "{\"route_scale\":8.0,\"mlp_gate_softcap\":4.0,\"mlp_up_softcap\":25.0}" },
    { "muse_spark muse_spark_text", MOE__RULE_BIASED, 1e-15f, MOE__NORM_ALWAYS | MOE__LOGIT_MULTIPLIER | MOE__ROW_NORM,
      MOE__STORE_FUSED,
      "{\"output_multiplier\":0.1767766952966369,\"post_norm_eps\":1e-8,\"routed_scaling_factor\":1.0}" },
    { "minimax_m2", MOE__RULE_BIASED, 0, MOE__WIDE | MOE__NORM_ALWAYS, MOE__STORE_SEPARATE, "{}" },
    { "minimax_m3 minimax_m3_vl minimax_m3_vl_text", MOE__RULE_BIASED, 0,
      MOE__WIDE | MOE__NORM_ALWAYS | MOE__SCALE_OUTPUT, MOE__STORE_SEPARATE,
      "{\"hidden_act\":\"swigluoai\",\"swiglu_alpha\":1.702,\"swiglu_limit\":7.0,\"routed_scaling_factor\":2.0}" },
    { "step3p5 step3p7", MOE__RULE_BIASED, 0, MOE__SCALE_OUTPUT | MOE__LIMIT_STEP, MOE__STORE_SEPARATE,
      "{\"norm_expert_weight\":true,\"first_k_dense_replace\":3}" },
    { "step5", MOE__RULE_BIASED, 0, MOE__LIMIT_STEP, MOE__STORE_SEPARATE,
      "{\"norm_expert_weight\":true,\"first_k_dense_replace\":1}" },
    { "lfm2_moe", MOE__RULE_BIASED, 1e-6f, 0, MOE__STORE_SEPARATE,
      "{\"num_dense_layers\":2,\"use_expert_bias\":true,\"norm_topk_prob\":true,\"routed_scaling_factor\":1.0}" },
    { "laguna", MOE__RULE_BIASED, 0, MOE__NORM_ALWAYS | MOE__SCALE_OUTPUT, MOE__STORE_SEPARATE,
      "{\"moe_routed_scaling_factor\":1.0,\"first_k_dense_replace\":1}" },
    { "flint", MOE__RULE_SIGMOID, 0, 0, MOE__STORE_SEPARATE, "{\"norm_topk_prob\":true,\"mlp_only_layers\":[0,1]}" },
    { "inkling inkling_mm_model inkling_text", MOE__RULE_INKLING, 0, MOE__WIDE, MOE__STORE_INTERLEAVED,
      "{\"n_shared_experts\":2,\"route_scale\":8.0}" },

    // DeepSeek's others
    { "deepseek_v2", MOE__RULE_DEEPSEEK_V2, 0, 0, MOE__STORE_SEPARATE,
      "{\"first_k_dense_replace\":0,\"moe_layer_freq\":1,\"n_shared_experts\":2,\"routed_scaling_factor\":1.0,"
      "\"topk_method\":\"greedy\",\"norm_topk_prob\":false}" },
    { "deepseek_v4", MOE__RULE_DEEPSEEK_V4, 1e-20f, MOE__NORM_ALWAYS, MOE__STORE_SEPARATE,
      "{\"n_shared_experts\":1,\"routed_scaling_factor\":1.5,\"swiglu_limit\":10.0,\"num_hash_layers\":3,"
      "\"vocab_size\":129280}" },
    { "deepseek_v41 deepseek_v41_text", MOE__RULE_DEEPSEEK_V41, 0, MOE__NORM_ALWAYS, MOE__STORE_SEPARATE,
      "{\"n_shared_experts\":1,\"routed_scaling_factor\":1.5,\"swiglu_limit\":10.0,\"num_hash_layers\":0,"
      "\"vocab_size\":129280}" },
};

static const moe__family moe__family_unknown = { "", MOE__RULE_AUTO, 1e-20f, 0, MOE__STORE_SEPARATE, "{}" };

// ---- keys: every name that a field has had, the preferred one first ----

static const char moe__keys_hidden[] = "hidden_size d_model dim";
static const char moe__keys_layers[] = "num_hidden_layers num_layers n_layers";
static const char moe__keys_experts[] = "num_experts num_local_experts n_routed_experts moe_num_experts";
static const char moe__keys_top_k[] = "num_experts_per_tok num_experts_per_token experts_per_token top_k_experts "
                                      "moe_top_k moe_topk moe_k";
static const char moe__keys_width[] = "moe_intermediate_size expert_ffn_hidden_size ffn_hidden_size expert_hidden_dim";
static const char moe__keys_latent[] = "moe_latent_size routed_expert_hidden_size moe_hidden_size";
static const char moe__keys_norm[] = "norm_topk_prob moe_renormalize route_norm norm_expert_weight "
                                     "moe_normalize_expert_weights";
static const char moe__keys_scale[] = "routed_scaling_factor moe_router_scaling_factor router_scaling_factor "
                                      "moe_routed_scaling_factor route_scale routed_scale";
static const char moe__keys_groups[] = "n_group num_expert_group num_expert_groups router_n_groups";
static const char moe__keys_kept[] = "topk_group num_expert_groups_per_tok";
static const char moe__keys_score[] = "scoring_func score_function score_func router_score_func moe_router_activation "
                                      "moe_router_activation_func";
static const char moe__keys_bias[] = "use_routing_bias use_expert_bias moe_router_enable_expert_bias "
                                     "use_moe_router_bias moe_use_aux_free moe_gate_bias router_enable_expert_bias";
static const char moe__keys_shared[] = "n_shared_experts num_shared_experts num_shared_expert moe_num_shared_experts";
static const char moe__keys_shared_width[] = "shared_expert_intermediate_size shared_experts_intermediate_size "
                                             "moe_shared_expert_intermediate_size shared_intermediate_size "
                                             "share_expert_dim";
static const char moe__keys_activation[] = "mlp_hidden_act hidden_activation hidden_act ffn_act_fn";
static const char moe__keys_limit[] = "swiglu_limits expert_swiglu_limit_list swiglu_limit";
static const char moe__keys_shared_limit[] = "swiglu_limits_shared share_expert_swiglu_limit_list";
static const char moe__keys_softcap[] = "moe_router_logit_softcapping router_logit_softcapping";
static const char moe__keys_dense[] = "first_k_dense_replace num_dense_layers dense_mlp_idx";

// ---- the reader ----

enum { MOE__SOURCE_MAX = 80, MOE__PREFIX_MAX = 48 };

typedef struct moe__scope { // an object that keys are looked for in
    moe__json object;
    char prefix[MOE__PREFIX_MAX];
} moe__scope;

typedef struct moe__infer {
    moe__json root, quant;
    moe__scope scopes[3]; // the layer's own entry, a part such as "ffn_config", the language model
    int32_t num_scopes;
    char text_prefix[MOE__PREFIX_MAX];
    const moe__family *family;
    char type[48], type_source[MOE__SOURCE_MAX];
    char source[MOE__SOURCE_MAX]; // of the value that was read last
    char width_source[MOE__SOURCE_MAX], score_source[MOE__SOURCE_MAX]; // "" where the config has no word for the score
    int32_t layer_index, num_layers, draft; // draft: a layer behind the model's, for speculation
    moe_layer_desc layer;
    moe_fact *facts;
    int32_t capacity, count, settling; // settling: what the files say replaces what the config said
    moe_error *err;
    int32_t result;
} moe__infer;

static void moe__copy_string(char *out, size_t capacity, const char *string)
{
    moe__text text = moe__text_make(out, capacity);
    moe__text_string(&text, string);
}

static void moe__note(moe__infer *in, const char *name, const char *source, const char *format, ...)
{
    va_list args;
    moe__text text;
    moe_fact *fact;
    int32_t at = in->settling ? 0 : in->count;
    if (in->result != MOE_OK) return;
    while (at < in->count && at < in->capacity && strcmp(in->facts[at].name, name) != 0) at++;
    if (at >= in->count) in->count++;
    if (at >= in->capacity) return;
    fact = &in->facts[at];
    memset(fact, 0, sizeof *fact);
    moe__copy_string(fact->name, sizeof fact->name, name);
    moe__copy_string(fact->source, sizeof fact->source, source);
    text = moe__text_make(fact->value, sizeof fact->value);
    va_start(args, format);
    moe__text_vformat(&text, format, args);
    va_end(args);
}

// A value as messages show it.
static void moe__json_show(moe__json value, char *out, size_t capacity)
{
    static const char *const kinds[] = { "absent", "null", "", "", "", "a list", "an object" };
    moe__text text = moe__text_make(out, capacity);
    moe__json_kind kind = moe__json_kind_of(value);
    char string[96];
    if (kind == MOE__JSON_STRING) {
        moe__json_string(value, string, sizeof string);
        moe__text_quoted(&text, string);
    } else if (kind == MOE__JSON_BOOL || kind == MOE__JSON_NUMBER) {
        for (const char *p = value.at; p < value.end && p < value.at + 40; p++) moe__text_char(&text, *p);
    } else {
        moe__text_string(&text, kinds[kind]);
    }
}

// The value read last is not what it must be.
static void moe__infer_wrong(moe__infer *in, moe__json value, const char *wanted)
{
    char shown[200];
    if (in->result != MOE_OK) return;
    moe__json_show(value, shown, sizeof shown);
    in->result = moe__fail(in->err, MOE_ERROR_FORMAT, in->source, "is %s in the config: it must be %s", shown, wanted);
}

// Place of `key` among the names in `keys`, -1 when it is none of them.
static int32_t moe__key_rank(const char *key, const char *keys)
{
    size_t length = strlen(key);
    for (int32_t rank = 0; *keys != 0; rank++) {
        size_t n = strcspn(keys, " ");
        if (n == length && memcmp(keys, key, n) == 0) return rank;
        keys += n;
        if (*keys == ' ') keys++;
    }
    return -1;
}

static void moe__infer_source(moe__infer *in, const char *prefix, const char *key, int32_t element)
{
    moe__text text = moe__text_make(in->source, sizeof in->source);
    moe__text_format(&text, "%s%s", prefix, key);
    if (element >= 0) moe__text_format(&text, "[%d]", element);
}

// The member of `object` that stands first in `keys` and is not null; a null one when there is no other.
static moe__json moe__infer_pick(moe__infer *in, moe__json object, const char *prefix, const char *keys)
{
    moe__json_iter iter = moe__json_begin(object);
    moe__json key, value, best = moe__json_none();
    int32_t best_rank = INT32_MAX;
    char name[64], best_name[64] = { 0 };
    while (moe__json_step(&iter, &key, &value)) {
        int32_t rank;
        if (moe__json_string(key, name, sizeof name) >= sizeof name || (rank = moe__key_rank(name, keys)) < 0) continue;
        if (moe__json_kind_of(value) == MOE__JSON_NULL) rank += 1000;
        if (rank > best_rank) continue; // of equal names the last one counts
        best = value;
        best_rank = rank;
        memcpy(best_name, name, sizeof name);
    }
    if (best.at != NULL && prefix != NULL) moe__infer_source(in, prefix, best_name, -1);
    return best;
}

// A field: from the config, else from the family's defaults, else none. A list has one entry for each layer.
static moe__json moe__infer_find(moe__infer *in, const char *keys, int32_t per_layer)
{
    moe__json found = moe__json_none();
    moe__text text;
    char list[MOE__SOURCE_MAX];
    int32_t entries;
    if (in->result != MOE_OK) return found;
    for (int32_t i = 0; i < in->num_scopes && found.at == NULL; i++)
        found = moe__infer_pick(in, in->scopes[i].object, in->scopes[i].prefix, keys);
    if (found.at == NULL) {
        moe__json defaults;
        defaults.at = in->family->defaults;
        defaults.end = defaults.at + strlen(defaults.at);
        text = moe__text_make(in->source, sizeof in->source);
        moe__text_format(&text, "default of %s", in->type);
        return moe__infer_pick(in, defaults, NULL, keys);
    }
    if (!per_layer || moe__json_kind_of(found) != MOE__JSON_ARRAY) return found;
    entries = moe__json_count(found);
    if (in->layer_index >= entries) {
        in->result = moe__fail(in->err, MOE_ERROR_FORMAT, in->source, "has %d entries in the config: layer %d needs "
                               "one",
                               entries, in->layer_index);
        return moe__json_none();
    }
    memcpy(list, in->source, sizeof list);
    moe__infer_source(in, "", list, in->layer_index);
    return moe__json_element(found, in->layer_index);
}

static int32_t moe__json_is_set(moe__json value) { return moe__json_kind_of(value) > MOE__JSON_NULL; }

// An integer in low..high; `absent` where the key is left out or null.
static int32_t moe__infer_int(moe__infer *in, const char *keys, int32_t low, int32_t high, int32_t absent)
{
    moe__json value = moe__infer_find(in, keys, 1);
    int64_t number;
    char wanted[64];
    moe__text text = moe__text_make(wanted, sizeof wanted);
    if (!moe__json_is_set(value) || in->result != MOE_OK) return absent;
    if (moe__json_int64(value, &number) && number >= low && number <= high) return (int32_t)number;
    moe__text_format(&text, "an integer, %d..%d", low, high);
    moe__infer_wrong(in, value, wanted);
    return absent;
}

// One that must be there.
static int32_t moe__infer_size(moe__infer *in, const char *member, const char *keys, int32_t high)
{
    int32_t value = moe__infer_int(in, keys, 0, high, 0);
    if (value > 0 || in->result != MOE_OK) return value;
    in->result = moe__fail(in->err, MOE_ERROR_MISSING, member, "is not in the config, which has no %s%q of at least 1",
                           strchr(keys, ' ') != NULL ? "key of " : "", keys);
    return 0;
}

static double moe__infer_number(moe__infer *in, const char *keys, double absent)
{
    moe__json value = moe__infer_find(in, keys, 1);
    double number;
    if (!moe__json_is_set(value) || in->result != MOE_OK) return absent;
    if (*value.at == 'f') return absent; // false: switched off (HunYuan's "routed_scaling_factor")
    if (moe__json_double(value, &number) && number > -1e30 && number < 1e30) return number;
    moe__infer_wrong(in, value, "a finite number");
    return absent;
}

static int32_t moe__infer_flag(moe__infer *in, const char *keys, int32_t absent)
{
    moe__json value = moe__infer_find(in, keys, 1);
    double number;
    if (!moe__json_is_set(value) || in->result != MOE_OK) return absent;
    if (moe__json_kind_of(value) == MOE__JSON_BOOL) return moe__json_is_true(value);
    if (moe__json_double(value, &number) && (number == 0 || number == 1)) return number == 1;
    moe__infer_wrong(in, value, "true or false");
    return absent;
}

// A string; "" where the key is left out or null.
static void moe__infer_string(moe__infer *in, const char *keys, char *out, size_t capacity)
{
    moe__json value = moe__infer_find(in, keys, 1);
    out[0] = 0;
    if (!moe__json_is_set(value) || in->result != MOE_OK) return;
    if (moe__json_kind_of(value) != MOE__JSON_STRING || moe__json_string(value, out, capacity) >= capacity)
        moe__infer_wrong(in, value, "a short string");
}

// ---- which model ----

static const moe__family *moe__family_find(const char *type)
{
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(moe__families); i++)
        if (type[0] != 0 && moe__key_rank(type, moe__families[i].types) >= 0) return &moe__families[i];
    return NULL;
}

// Takes `value` for the model's type when the table has it.
static void moe__infer_try_type(moe__infer *in, moe__json value, const char *prefix, const char *key)
{
    char type[sizeof in->type];
    const moe__family *family;
    if (in->family != NULL || moe__json_string(value, type, sizeof type) >= sizeof type) return;
    family = moe__family_find(type);
    if (family == NULL) return;
    in->family = family;
    memcpy(in->type, type, sizeof type);
    moe__infer_source(in, prefix, key, -1);
    memcpy(in->type_source, in->source, sizeof in->source);
}

// Finds the language model's object and the family. Architectures come first: where the table has one, it is because
// the model type alone says something else.
static void moe__infer_open(moe__infer *in)
{
    static const char *const inner[] = { "thinker_config", "text_config", "language_config", "llm_config" };
    moe__json levels[4], level = in->root, key, value;
    char prefixes[4][MOE__PREFIX_MAX];
    int32_t depth = 0;
    memset(prefixes, 0, sizeof prefixes);
    levels[0] = level;
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(inner) && depth < 3;) {
        moe__text text;
        value = moe__json_find(level, inner[i]);
        if (moe__json_kind_of(value) != MOE__JSON_OBJECT) { i++; continue; }
        text = moe__text_make(prefixes[depth + 1], MOE__PREFIX_MAX);
        moe__text_format(&text, "%s%s.", prefixes[depth], inner[i]);
        levels[++depth] = level = value;
        i = 0;
    }
    for (int32_t d = depth; d >= 0; d--) {
        moe__json_iter iter = moe__json_begin(moe__json_find(levels[d], "architectures"));
        while (!iter.object && moe__json_step(&iter, &key, &value))
            moe__infer_try_type(in, value, prefixes[d], "architectures");
    }
    for (int32_t d = depth; d >= 0; d--)
        moe__infer_try_type(in, moe__json_find(levels[d], "model_type"), prefixes[d], "model_type");
    memcpy(in->text_prefix, prefixes[depth], sizeof in->text_prefix);
    in->scopes[0].object = level;
    memcpy(in->scopes[0].prefix, in->text_prefix, sizeof in->text_prefix);
    in->num_scopes = 1;
}

// Puts a part of the language model's object in front of it, where keys are looked for first.
static void moe__infer_scope(moe__infer *in, moe__json object, const char *name, int32_t element)
{
    char before[MOE__SOURCE_MAX];
    moe__text text;
    if (moe__json_kind_of(object) != MOE__JSON_OBJECT || in->num_scopes == 3) return;
    memmove(&in->scopes[1], &in->scopes[0], (size_t)in->num_scopes * sizeof in->scopes[0]);
    in->num_scopes++;
    in->scopes[0].object = object;
    memcpy(before, in->source, sizeof before);
    moe__infer_source(in, in->text_prefix, name, element);
    text = moe__text_make(in->scopes[0].prefix, sizeof in->scopes[0].prefix);
    moe__text_format(&text, "%s.", in->source);
    memcpy(in->source, before, sizeof before);
}

static void moe__infer_family(moe__infer *in)
{
    moe__json text_model = in->scopes[0].object, part = moe__json_find(text_model, "moe"), type, value;
    moe__infer_scope(in, moe__json_find(text_model, "ffn_config"), "ffn_config", -1);
    type = moe__json_find(text_model, "model_type");
    if (in->family == NULL && type.at == NULL && moe__json_kind_of(part) == MOE__JSON_OBJECT) { // Mistral's params.json
        moe__infer_scope(in, part, "moe", -1);
        in->family = moe__family_find("mistral-params");
        moe__copy_string(in->type, sizeof in->type, "params.json");
        moe__copy_string(in->type_source, sizeof in->type_source, "moe");
    }
    if (in->family == NULL) {
        in->family = &moe__family_unknown;
        if (moe__json_string(type, in->type, sizeof in->type) >= sizeof in->type || in->type[0] == 0)
            moe__copy_string(in->type, sizeof in->type, "unknown type");
        moe__copy_string(in->type_source, sizeof in->type_source, "keys alone");
    }
    value = moe__json_element(moe__json_find(text_model, "block_configs"), in->layer_index);
    moe__infer_scope(in, value, "block_configs", in->layer_index);
}

// ---- which layers have experts ----

static int32_t moe__list_has(moe__json list, int32_t layer)
{
    moe__json_iter iter = moe__json_begin(list);
    moe__json key, value;
    int64_t number;
    while (!iter.object && moe__json_step(&iter, &key, &value))
        if (moe__json_int64(value, &number) && number == layer) return 1;
    return 0;
}

// "3,4,5" has 4.
static int32_t moe__text_list_has(const char *list, int32_t layer)
{
    while (*list != 0) {
        int64_t number = 0;
        int32_t digits = 0;
        for (; *list >= '0' && *list <= '9'; list++, digits++)
            if (number < 100000) number = number * 10 + (*list - '0');
        if (digits > 0 && number == layer) return 1;
        if (digits == 0) list++;
    }
    return 0;
}

// By a list of the layers' kinds: 1, 0, or -1 when there is none.
static int32_t moe__infer_listed(moe__infer *in)
{
    char name[256];
    moe__json value;
    if (in->draft) return 1;
    if ((in->family->traits & MOE__BLOCK_TYPES) != 0) {
        moe__infer_string(in, "block_type layers_block_type", name, sizeof name);
        if (name[0] != 0) return strcmp(name, "moe") == 0;
        value = moe__infer_find(in, "hybrid_override_pattern", 0);
        if (moe__json_kind_of(value) == MOE__JSON_STRING) {
            char pattern[4096];
            if (moe__json_string(value, pattern, sizeof pattern) >= sizeof pattern) pattern[0] = 0;
            if ((size_t)in->layer_index < strlen(pattern)) return pattern[in->layer_index] == 'E';
            moe__infer_wrong(in, value, "a string with one letter for each layer");
        }
        return in->result == MOE_OK ? -1 : 0;
    }
    moe__infer_string(in, "mlp_layer_types", name, sizeof name);
    if (name[0] != 0) return strcmp(name, "dense") != 0;
    value = moe__infer_find(in, "moe_layers_enum", 0);
    if (moe__json_kind_of(value) == MOE__JSON_STRING && value.end - value.at > 2) {
        char list[2048];
        if (moe__json_string(value, list, sizeof list) < sizeof list) return moe__text_list_has(list, in->layer_index);
        moe__infer_wrong(in, value, "a list of at most 2,000 letters");
    }
    value = moe__infer_find(in, "moe_layers", 0);
    if (moe__json_kind_of(value) == MOE__JSON_ARRAY) return moe__list_has(value, in->layer_index);
    return in->result == MOE_OK ? -1 : 0;
}

// 1 when a rule of the config makes this layer dense; in->source names it.
static int32_t moe__infer_is_dense(moe__infer *in)
{
    int32_t layer = in->layer_index, listed = moe__infer_listed(in), low, step;
    if (listed >= 0) return !listed;
    if (!moe__infer_flag(in, "enable_moe_block", 1) || !moe__infer_flag(in, "use_moe", 1)) return 1;
    if (layer < moe__infer_int(in, moe__keys_dense, 0, MOE__LAYERS_MAX, 0)) return 1;
    if (moe__json_kind_of(moe__infer_find(in, "moe_layer_freq", 0)) == MOE__JSON_ARRAY) {
        if (moe__infer_int(in, "moe_layer_freq", 0, 1, 1) == 0) return 1;
    } else if (layer % moe__infer_int(in, "moe_layer_freq route_every_n", 1, MOE__LAYERS_MAX, 1) != 0) {
        return 1;
    }
    if (moe__list_has(moe__infer_find(in, "mlp_only_layers", 0), layer)) return 1;
    step = moe__infer_int(in, "decoder_sparse_step interleave_moe_layer_step moe_layer_interval", 0, MOE__LAYERS_MAX,
                          1);
    if (step == 0 || (layer + 1) % step != 0) return 1;
    low = moe__infer_int(in, "expert_layer_offset", 0, MOE__LAYERS_MAX, 0);
    step = moe__infer_int(in, "expert_layer_period", 1, MOE__LAYERS_MAX, 1);
    if (layer % step != low % step) return 1;
    if (layer < moe__infer_int(in, "moe_layer_start_index", 0, MOE__LAYERS_MAX, 0)) return 1;
    step = moe__infer_int(in, "moe_layer_end_index", -1, MOE__LAYERS_MAX, -1);
    return step >= 0 && layer > step;
}

static void moe__infer_place(moe__infer *in)
{
    int32_t drafts, dense;
    moe__json kinds;
    in->num_layers = moe__infer_int(in, moe__keys_layers, 1, MOE__LAYERS_MAX, 0);
    if (in->num_layers == 0) {
        kinds = moe__infer_find(in, "layers_block_type mlp_layer_types", 0);
        in->num_layers = moe__json_count(kinds);
    }
    drafts = moe__infer_int(in, "num_nextn_predict_layers", 0, 64, 0);
    if (in->result != MOE_OK) return;
    if (in->num_layers > 0 && in->layer_index >= in->num_layers + drafts) {
        in->result = moe__fail(in->err, MOE_ERROR_MISSING, "layer_index", "is %d: the config has layers 0..%d",
                               in->layer_index, in->num_layers + drafts - 1);
        return;
    }
    in->draft = in->num_layers > 0 && in->layer_index >= in->num_layers;
    dense = moe__infer_is_dense(in);
    if (in->result == MOE_OK && dense)
        in->result = moe__fail(in->err, MOE_ERROR_MISSING, "layer_index", "is %d: that layer has no experts (%s)",
                               in->layer_index, in->source);
}

// ---- sizes ----

static void moe__infer_sizes(moe__infer *in)
{
    moe_layer_desc *layer = &in->layer;
    int32_t model = moe__infer_size(in, "layer.hidden_size", moe__keys_hidden, MOE__SIZE_MAX), latent;
    char source[MOE__SOURCE_MAX];
    memcpy(source, in->source, sizeof source);
    latent = moe__infer_int(in, moe__keys_latent, 0, MOE__SIZE_MAX, 0);
    layer->hidden_size = latent > 0 ? latent : model;
    moe__note(in, "hidden_size", latent > 0 ? in->source : source, "%d", layer->hidden_size);
    if (latent > 0 && latent != model) {
        layer->router.input_size = model;
        moe__note(in, "router.input_size", source, "%d", model);
    }
    if ((in->family->traits & MOE__WIDE) != 0) {
        layer->intermediate_size = moe__infer_int(in, moe__keys_width, 0, MOE__SIZE_MAX, 0);
        if (layer->intermediate_size == 0)
            layer->intermediate_size = moe__infer_size(in, "layer.intermediate_size", "intermediate_size",
                                                       MOE__SIZE_MAX);
    } else {
        layer->intermediate_size = moe__infer_size(in, "layer.intermediate_size", moe__keys_width, MOE__SIZE_MAX);
    }
    memcpy(in->width_source, in->source, sizeof in->source);
    moe__note(in, "intermediate_size", in->source, "%d", layer->intermediate_size);
    layer->num_experts = moe__infer_int(in, moe__keys_experts, 0, MOE_MAX_EXPERTS, 0);
    if (in->result == MOE_OK && layer->num_experts == 0)
        in->result = moe__fail(in->err, MOE_ERROR_MISSING, "layer_index", "is %d: the config says of no experts "
                               "(keys %q)",
                               in->layer_index, moe__keys_experts);
    moe__note(in, "num_experts", in->source, "%d", layer->num_experts);
    layer->routing.top_k = moe__infer_size(in, "layer.routing.top_k", moe__keys_top_k, MOE_MAX_TOP_K);
    moe__note(in, "routing.top_k", in->source, "%d", layer->routing.top_k);
}

// ---- routing ----

static const moe__name moe__score_names[] = {
    { MOE_SCORE_RAW, "raw" }, { MOE_SCORE_SOFTMAX, "softmax" }, { MOE_SCORE_SIGMOID, "sigmoid" },
    { MOE_SCORE_SQRT_SOFTPLUS, "sqrt softplus" },
};
static const moe__name moe__group_rule_names[] = {
    { MOE_GROUP_MAX, "max" }, { MOE_GROUP_TOP2_SUM, "sum of the top 2" }, { MOE_GROUP_EACH, "top_k / groups in each" },
};
static const moe__name moe__renormalize_names[] = {
    { MOE_RENORMALIZE_OFF, "off" }, { MOE_RENORMALIZE_SUM, "sum" }, { MOE_RENORMALIZE_CLAMP_MIN, "clamped sum" },
};
static const moe__name moe__special_names[] = {
    { MOE_SPECIAL_ZERO, "zero" }, { MOE_SPECIAL_IDENTITY, "identity" }, { MOE_SPECIAL_SKIP, "skip" },
    { MOE_SPECIAL_CONSTANT, "constant" },
};

// Starts from a named method; top_k stays as it was read.
static void moe__infer_preset(moe__infer *in, int32_t method)
{
    moe_routing_desc *r = &in->layer.routing;
    int32_t top_k = r->top_k;
    if (in->result != MOE_OK) return;
    in->result = moe_routing_preset(method, r, in->err);
    r->top_k = top_k;
    moe__note(in, "routing.score", in->score_source[0] != 0 ? in->score_source : in->type_source, "%s",
              moe__name_find(moe__score_names, MOE__ARRAY_COUNT(moe__score_names), r->score, "?"));
    moe__note(in, "routing.score_order", in->type_source, "%s",
              r->score_order == MOE_SCORE_BEFORE_TOPK ? "before top-k" : "after top-k");
}

static void moe__infer_bias(moe__infer *in, int32_t rows)
{
    in->layer.routing.bias_rows = rows;
    moe__note(in, "routing.bias_rows", in->type_source, "%d", rows);
}

static void moe__infer_norm(moe__infer *in, int32_t kind, float epsilon)
{
    moe_routing_desc *r = &in->layer.routing;
    int32_t traits = in->family->traits;
    int32_t norm = (traits & MOE__NORM_ALWAYS) ? 1 : (traits & MOE__NORM_NEVER) ? 0
                                                 : moe__infer_flag(in, moe__keys_norm, 0);
    const char *source = (traits & (MOE__NORM_ALWAYS | MOE__NORM_NEVER)) ? in->type_source : in->source;
    r->renormalize = norm ? kind : MOE_RENORMALIZE_OFF;
    r->renormalize_epsilon = norm ? epsilon : 0;
    moe__note(in, "routing.renormalize", source, "%s",
              moe__name_find(moe__renormalize_names, MOE__ARRAY_COUNT(moe__renormalize_names), r->renormalize, "?"));
    if (norm && epsilon != 0) moe__note(in, "routing.renormalize_epsilon", source, "%g", (double)epsilon);
}

static void moe__infer_scale(moe__infer *in)
{
    moe_routing_desc *r = &in->layer.routing;
    double scale = moe__infer_number(in, moe__keys_scale, 1);
    if (in->result != MOE_OK || scale == 1) { r->scale = 1; return; }
    if (scale == 0) { moe__infer_wrong(in, moe__infer_find(in, moe__keys_scale, 1), "a number other than 0"); return; }
    r->scale = (float)scale;
    r->scale_on = (in->family->traits & MOE__SCALE_OUTPUT) ? MOE_SCALE_ON_OUTPUT : MOE_SCALE_ON_WEIGHTS;
    moe__note(in, "routing.scale", in->source, "%g", scale);
    if (r->scale_on == MOE_SCALE_ON_OUTPUT) moe__note(in, "routing.scale_on", in->type_source, "output");
}

static void moe__infer_groups(moe__infer *in, int32_t rule, int32_t excluded)
{
    moe_routing_desc *r = &in->layer.routing;
    char source[MOE__SOURCE_MAX];
    r->groups = moe__infer_int(in, moe__keys_groups, 0, MOE_MAX_EXPERTS, 0);
    memcpy(source, in->source, sizeof source);
    r->groups_kept = 0;
    r->group_rule = MOE_GROUP_NONE;
    r->group_excluded = MOE_EXCLUDED_NEG_INF;
    if (r->groups <= 1 || in->result != MOE_OK) { r->groups = 0; return; }
    if (rule == MOE_GROUP_NONE) {
        in->result = moe__fail(in->err, MOE_ERROR_UNSUPPORTED, source, "is %d in the config: how %s ranks groups is "
                               "not known here, fill layer.routing by hand", r->groups, in->type);
        return;
    }
    r->group_rule = rule;
    r->group_excluded = excluded;
    moe__note(in, "routing.groups", source, "%d", r->groups);
    if (rule != MOE_GROUP_EACH) {
        r->groups_kept = moe__infer_size(in, "layer.routing.groups_kept", moe__keys_kept, r->groups);
        moe__note(in, "routing.groups_kept", in->source, "%d", r->groups_kept);
    }
    moe__note(in, "routing.group_rule", in->type_source, "%s",
              moe__name_find(moe__group_rule_names, MOE__ARRAY_COUNT(moe__group_rule_names), rule, "?"));
}

// Sees that the config's own word for the score is one of `allowed`; nothing to see where it has none.
static void moe__infer_check_score(moe__infer *in, const char *allowed)
{
    char score[48];
    moe__infer_string(in, moe__keys_score, score, sizeof score);
    if (in->result != MOE_OK || score[0] == 0) return;
    memcpy(in->score_source, in->source, sizeof in->source);
    if (moe__key_rank(score, allowed) >= 0) return;
    in->result = moe__fail(in->err, MOE_ERROR_UNSUPPORTED, in->source, "is %q in the config: %s is known here with "
                           "%q only; fill layer.routing by hand", score, in->type, allowed);
}

static void moe__infer_softmax(moe__infer *in)
{
    moe__infer_check_score(in, "softmax");
    moe__infer_preset(in, MOE_ROUTING_DEFAULT);
    moe__infer_norm(in, MOE_RENORMALIZE_SUM, 0);
    moe__infer_groups(in, MOE_GROUP_NONE, 0);
    moe__infer_scale(in);
}

static void moe__infer_biased(moe__infer *in)
{
    moe_routing_desc *r = &in->layer.routing;
    moe__infer_check_score(in, "sigmoid noaux_tc");
    moe__infer_preset(in, MOE_ROUTING_DEEPSEEK_V3);
    r->bias_rows = moe__infer_flag(in, moe__keys_bias, 1);
    moe__note(in, "routing.bias_rows", moe__json_is_set(moe__infer_find(in, moe__keys_bias, 1)) ? in->source
              : in->type_source, "%d", r->bias_rows);
    moe__infer_norm(in, MOE_RENORMALIZE_SUM, in->family->epsilon);
    moe__infer_groups(in, MOE_GROUP_TOP2_SUM,
                      (in->family->traits & MOE__EXCLUDED_ZERO) ? MOE_EXCLUDED_ZERO : MOE_EXCLUDED_NEG_INF);
    moe__infer_scale(in);
}

static void moe__infer_deepseek_v2(moe__infer *in)
{
    char method[48];
    moe__infer_check_score(in, "softmax");
    moe__infer_preset(in, MOE_ROUTING_DEEPSEEK_V2);
    moe__infer_norm(in, MOE_RENORMALIZE_SUM, 0);
    if (in->result == MOE_OK && in->layer.routing.renormalize != MOE_RENORMALIZE_OFF) {
        in->result = moe__fail(in->err, MOE_ERROR_UNSUPPORTED, in->source, "is true in the config: DeepSeek-V2's own "
                               "code "
                               "divides and leaves out the scale, transformers does not; fill layer.routing by hand");
        return;
    }
    moe__infer_string(in, "topk_method", method, sizeof method);
    if (in->result != MOE_OK) return;
    if (strcmp(method, "group_limited_greedy") == 0) {
        moe__infer_groups(in, MOE_GROUP_MAX, MOE_EXCLUDED_ZERO);
    } else if (strcmp(method, "greedy") == 0 || method[0] == 0) {
        in->layer.routing.groups = in->layer.routing.groups_kept = 0;
        in->layer.routing.group_rule = MOE_GROUP_NONE;
        in->layer.routing.group_excluded = MOE_EXCLUDED_NEG_INF;
    } else {
        in->result = moe__fail(in->err, MOE_ERROR_UNSUPPORTED, in->source, "is %q in the config: it must be "
                               "\"greedy\" or "
                               "\"group_limited_greedy\"", method);
    }
    moe__infer_scale(in);
}

// Layers that take ids from a table by token: the first ones, or those that a list names.
static int32_t moe__infer_is_hash(moe__infer *in)
{
    char kind[48];
    if (in->draft) return 0;
    moe__infer_string(in, "mlp_layer_types", kind, sizeof kind);
    if (kind[0] != 0) return strcmp(kind, "hash_moe") == 0;
    return in->layer_index < moe__infer_int(in, "num_hash_layers", 0, MOE__LAYERS_MAX, 0);
}

static void moe__infer_deepseek_v4(moe__infer *in, int32_t v41)
{
    moe_routing_desc *r = &in->layer.routing;
    int32_t image, rows = v41 ? 2 : 1;
    moe__infer_check_score(in, "sqrtsoftplus");
    moe__infer_preset(in, v41 ? MOE_ROUTING_DEEPSEEK_V41 : MOE_ROUTING_DEEPSEEK_V4);
    moe__infer_norm(in, MOE_RENORMALIZE_SUM, in->family->epsilon);
    image = moe__infer_int(in, "image_sentinel_lo", 0, INT32_MAX - 5, 0);
    if (image > 0) {
        r->marked_token_lo = image;
        r->marked_token_hi = image + 5;
        rows = 2;
        moe__note(in, "routing.marked_token_lo", in->source, "%d", image);
    }
    if (moe__infer_is_hash(in)) {
        char source[MOE__SOURCE_MAX];
        memcpy(source, in->source, sizeof source);
        r->forced_rows = moe__infer_size(in, "layer.routing.forced_rows", "vocab_size", INT32_MAX);
        if (image == 0) rows = 0; // ids of every token come from the table
        moe__note(in, "routing.forced_rows", source, "%d", r->forced_rows);
    }
    moe__infer_bias(in, rows);
    moe__infer_scale(in);
}

static void moe__infer_cohere2(moe__infer *in)
{
    char name[48];
    int32_t sigmoid;
    moe__infer_string(in, "expert_selection_fn", name, sizeof name);
    memcpy(in->score_source, in->source, sizeof in->source);
    sigmoid = strcmp(name, "sigmoid") == 0;
    if (in->result == MOE_OK && !sigmoid && strcmp(name, "softmax") != 0)
        in->result = moe__fail(in->err, MOE_ERROR_UNSUPPORTED, in->source, "is %q in the config: it must be "
                               "\"sigmoid\" or "
                               "\"softmax\"", name);
    moe__infer_preset(in, sigmoid ? MOE_ROUTING_TOPK_SIGMOID : MOE_ROUTING_RENORMALIZE);
    if (sigmoid) moe__infer_norm(in, MOE_RENORMALIZE_SUM, 0);
}

static void moe__infer_longcat(moe__infer *in)
{
    moe_routing_desc *r = &in->layer.routing;
    char kind[48];
    moe__infer_preset(in, MOE_ROUTING_LONGCAT);
    moe__infer_bias(in, 1);
    moe__infer_norm(in, MOE_RENORMALIZE_SUM, 0);
    r->special_experts = moe__infer_int(in, "zero_expert_num", 0, MOE_MAX_EXPERTS, 0);
    moe__note(in, "routing.special_experts", in->source, "%d", r->special_experts);
    r->special_kind = r->special_experts > 0 ? MOE_SPECIAL_IDENTITY : MOE_SPECIAL_NONE;
    moe__infer_string(in, "zero_expert_type", kind, sizeof kind);
    if (in->result == MOE_OK && r->special_experts > 0 && strcmp(kind, "identity") != 0) {
        in->result = moe__fail(in->err, MOE_ERROR_UNSUPPORTED, in->source, "is %q in the config: \"identity\" is known",
                               kind);
        return;
    }
    if (r->special_experts > 0) moe__note(in, "routing.special_kind", in->source, "identity");
    moe__infer_scale(in);
}

static void moe__infer_ernie45(moe__infer *in)
{
    moe_routing_desc *r = &in->layer.routing;
    moe__infer_preset(in, MOE_ROUTING_ERNIE45);
    moe__infer_bias(in, 1);
    r->renormalize = MOE_RENORMALIZE_CLAMP_MIN;
    moe__note(in, "routing.renormalize", in->type_source, "clamped sum");
    r->renormalize_epsilon = (float)moe__infer_number(in, "moe_norm_min", 1e-12);
    moe__note(in, "routing.renormalize_epsilon", in->source, "%g", (double)r->renormalize_epsilon);
}

static void moe__infer_zaya(moe__infer *in)
{
    moe_routing_desc *r = &in->layer.routing;
    moe__infer_preset(in, MOE_ROUTING_DEFAULT);
    moe__infer_bias(in, 1);
    r->special_experts = 1;
    r->special_kind = MOE_SPECIAL_SKIP;
    moe__note(in, "routing.special_experts", in->type_source, "1");
    moe__note(in, "routing.special_kind", in->type_source, "skip");
}

// Inkling's shared experts are always-on slots inside the renormalisation.
static void moe__infer_inkling(moe__infer *in)
{
    moe_routing_desc *r = &in->layer.routing;
    moe__infer_preset(in, MOE_ROUTING_INKLING);
    moe__infer_bias(in, 1);
    r->extra_slots = moe__infer_int(in, moe__keys_shared, 0, MOE_MAX_EXTRA_SLOTS, 0);
    r->extra_scored = r->extra_slots > 0;
    moe__note(in, "routing.extra_slots", in->source, "%d", r->extra_slots);
    r->renormalize = MOE_RENORMALIZE_SUM;
    r->renormalize_epsilon = 0;
    r->global_scale = 1;
    moe__note(in, "routing.renormalize", in->type_source, "sum");
    moe__note(in, "routing.global_scale", in->type_source, "1");
    moe__infer_scale(in);
}

// The router of Gemma 4 reads the residual through a norm of its own.
static void moe__infer_gemma4(moe__infer *in)
{
    moe_router_desc *router = &in->layer.router;
    double hidden = (double)in->layer.hidden_size;
    moe__infer_preset(in, MOE_ROUTING_GEMMA4);
    moe__infer_norm(in, MOE_RENORMALIZE_SUM, 0);
    in->layer.routing.per_expert_scale = 1;
    moe__note(in, "routing.per_expert_scale", in->type_source, "1");
    router->rms_norm = 1;
    router->input_scale = 1;
    router->norm_epsilon = (float)moe__infer_number(in, "rms_norm_eps", 1e-6);
    router->input_multiplier = in->layer.hidden_size > 0 ? moe__sqrtf((float)(1.0 / hidden)) : 1.0f;
    moe__note(in, "router.rms_norm", in->type_source, "1");
    moe__note(in, "router.norm_epsilon", in->source, "%g", (double)router->norm_epsilon);
    moe__note(in, "router.input_scale", in->type_source, "1");
    moe__note(in, "router.input_multiplier", in->type_source, "%g", (double)router->input_multiplier);
}

static void moe__infer_phimoe(moe__infer *in)
{
    double jitter = moe__infer_number(in, "router_jitter_noise", 0.01);
    char source[MOE__SOURCE_MAX];
    memcpy(source, in->source, sizeof source);
    if (in->result == MOE_OK && jitter <= 0) {
        moe__infer_wrong(in, moe__infer_find(in, "router_jitter_noise", 1), "a number above 0");
        return;
    }
    moe__infer_preset(in, MOE_ROUTING_PHIMOE);
    in->layer.routing.sparse_mixer = (float)jitter;
    moe__note(in, "routing.sparse_mixer", source, "%g", jitter);
}

// A model type that the table does not have, or one that is several: only what its keys say without doubt.
static void moe__infer_auto(moe__infer *in)
{
    char score[48], method[48];
    moe__json norm, bias;
    moe__infer_string(in, moe__keys_score, score, sizeof score);
    moe__infer_string(in, "topk_method", method, sizeof method);
    bias = moe__infer_find(in, moe__keys_bias, 1);
    norm = moe__infer_find(in, moe__keys_norm, 1);
    if (in->result != MOE_OK) return;
    if (score[0] == 0 || !moe__json_is_set(norm)) {
        in->result = moe__fail(in->err, MOE_ERROR_MISSING, "layer.routing", "cannot be told: model type %q is not "
                               "known here, and the config has no %s of %q; fill layer.routing by hand", in->type,
                               score[0] == 0 ? "score" : "rule of renormalisation",
                               score[0] == 0 ? moe__keys_score : moe__keys_norm);
        return;
    }
    if (strcmp(score, "softmax") == 0 && !moe__json_is_true(bias)) {
        moe__infer_softmax(in);
    } else if (strcmp(score, "sigmoid") == 0 && (strcmp(method, "noaux_tc") == 0 || moe__json_is_set(bias))) {
        moe__infer_biased(in);
    } else {
        in->result = moe__fail(in->err, MOE_ERROR_UNSUPPORTED, "layer.routing", "cannot be told: model type %q is "
                               "not known "
                               "here, and with score %q these decide: %q, \"topk_method\"; fill layer.routing by hand",
                               in->type, score, moe__keys_bias);
    }
}

static void moe__infer_rule(moe__infer *in)
{
    switch (in->family->rule) {
    case MOE__RULE_SOFTMAX: moe__infer_softmax(in); break;
    case MOE__RULE_AFTER: moe__infer_preset(in, MOE_ROUTING_RENORMALIZE); break;
    case MOE__RULE_SIGMOID:
        moe__infer_preset(in, MOE_ROUTING_SIGMOID);
        moe__infer_norm(in, MOE_RENORMALIZE_SUM, in->family->epsilon);
        break;
    case MOE__RULE_BIASED: moe__infer_biased(in); break;
    case MOE__RULE_EACH:
        moe__infer_preset(in, MOE_ROUTING_DEFAULT);
        moe__infer_norm(in, MOE_RENORMALIZE_SUM, 0);
        moe__infer_groups(in, MOE_GROUP_EACH, MOE_EXCLUDED_NEG_INF);
        break;
    case MOE__RULE_LLAMA4:
        moe__infer_preset(in, MOE_ROUTING_LLAMA4);
        moe__note(in, "routing.weight_on", in->type_source, "input");
        break;
    case MOE__RULE_COHERE2: moe__infer_cohere2(in); break;
    case MOE__RULE_GEMMA4: moe__infer_gemma4(in); break;
    case MOE__RULE_PHIMOE: moe__infer_phimoe(in); break;
    case MOE__RULE_DEEPSEEK_V2: moe__infer_deepseek_v2(in); break;
    case MOE__RULE_DEEPSEEK_V4: moe__infer_deepseek_v4(in, 0); break;
    case MOE__RULE_DEEPSEEK_V41: moe__infer_deepseek_v4(in, 1); break;
    case MOE__RULE_MISTRAL4:
        moe__infer_preset(in, MOE_ROUTING_MISTRAL4);
        moe__infer_norm(in, MOE_RENORMALIZE_SUM, in->family->epsilon);
        moe__infer_groups(in, MOE_GROUP_TOP2_SUM, MOE_EXCLUDED_ZERO);
        moe__infer_scale(in);
        break;
    case MOE__RULE_ERNIE45: moe__infer_ernie45(in); break;
    case MOE__RULE_LONGCAT: moe__infer_longcat(in); break;
    case MOE__RULE_ZAYA: moe__infer_zaya(in); break;
    case MOE__RULE_INKLING: moe__infer_inkling(in); break;
    case MOE__RULE_KOLIBRI:
        moe__infer_preset(in, MOE_ROUTING_KOLIBRI);
        moe__infer_bias(in, 1);
        moe__infer_norm(in, MOE_RENORMALIZE_SUM, 0);
        break;
    case MOE__RULE_AUTO: moe__infer_auto(in); break;
    }
}

// What any family's router may have besides.
static void moe__infer_routing(moe__infer *in)
{
    moe_routing_desc *r = &in->layer.routing;
    double value;
    moe__infer_rule(in);
    value = moe__infer_number(in, moe__keys_softcap, 0);
    if (value != 0) {
        r->logit_softcap = (float)value;
        moe__note(in, "routing.logit_softcap", in->source, "%g", value);
    }
    if ((in->family->traits & MOE__LOGIT_MULTIPLIER) != 0) {
        value = moe__infer_number(in, "output_multiplier", 1);
        r->logit_multiplier = (float)value;
        moe__note(in, "routing.logit_multiplier", in->source, "%g", value);
    }
    if (moe__infer_flag(in, "moe_apply_router_weight_on_input apply_router_weight_on_input", 0)) {
        r->weight_on = MOE_WEIGHT_ON_INPUT;
        moe__note(in, "routing.weight_on", in->source, "input");
    }
}

// ---- experts ----

// One activation by its config name, with the parameters that configs give apart from the name.
static void moe__infer_activation(moe__infer *in)
{
    moe_activation_desc *act = &in->layer.activation;
    int32_t traits = in->family->traits, gated = !(traits & MOE__NOT_GATED);
    char written[48], source[MOE__SOURCE_MAX];
    const char *name = written;
    moe__json value = moe__infer_find(in, moe__keys_activation, 0);
    memcpy(source, in->source, sizeof source);
    if (moe__json_kind_of(value) == MOE__JSON_OBJECT) value = moe__json_find(value, "name"); // DBRX
    if (traits & (MOE__BIASES | MOE__SILU | MOE__SITU)) {
        memcpy(source, in->type_source, sizeof source);
        name = traits & MOE__BIASES ? "swigluoai" : traits & MOE__SITU ? "situ" : "silu";
    } else if (!moe__json_is_set(value)) {
        name = "silu";
    } else if (moe__json_kind_of(value) != MOE__JSON_STRING ||
               moe__json_string(value, written, sizeof written) >= sizeof written) {
        moe__infer_wrong(in, value, "the name of an activation");
    }
    if (in->result != MOE_OK) return;
    in->result = moe_activation_from_name(name, gated, act, in->err);
    if (in->result != MOE_OK) return;
    if (act->kind == MOE_ACTIVATION_SITU) {
        act->alpha = (float)moe__infer_number(in, "activation_situ_beta mlp_gate_softcap", 4);
        act->beta = (float)moe__infer_number(in, "activation_situ_linear_beta mlp_up_softcap", 25);
    } else if (strcmp(name, "swigluoai") == 0) {
        act->alpha = (float)moe__infer_number(in, "swiglu_alpha", 1.702);
    }
    moe__note(in, "activation.kind", source, "%s", moe_activation_string(act->kind));
}

// The clamp of this layer; a limit of 0 is none.
static void moe__infer_limit(moe__infer *in, moe_activation_desc *act, const char *keys, int32_t step,
                             const char *member)
{
    char name[48];
    double limit = moe__infer_number(in, keys, 0);
    moe__text text = moe__text_make(name, sizeof name);
    if (in->result != MOE_OK || limit == 0) return;
    if (limit < 0) { moe__infer_wrong(in, moe__infer_find(in, keys, 1), "a number from 0 on"); return; }
    if (act->kind != MOE_ACTIVATION_SWIGLU && act->kind != MOE_ACTIVATION_SWIGLU_STEP) {
        in->result = moe__fail(in->err, MOE_ERROR_UNSUPPORTED, in->source, "is %g in the config: what it does to %s "
                               "is not known here", limit, moe_activation_string(act->kind));
        return;
    }
    act->limit = (float)limit;
    if (step) act->kind = MOE_ACTIVATION_SWIGLU_STEP;
    moe__text_format(&text, "%s.limit", member);
    moe__note(in, name, in->source, "%g%s", limit, step ? " behind silu" : "");
}

static void moe__infer_experts(moe__infer *in)
{
    moe_layer_desc *layer = &in->layer;
    moe_activation_desc *act = &layer->activation;
    int32_t traits = in->family->traits;
    moe__infer_activation(in);
    layer->shared.activation = *act;
    moe__infer_limit(in, act, moe__keys_limit, (traits & MOE__LIMIT_STEP) != 0, "activation");
    if (act->alpha != 0 && act->alpha != 1) moe__note(in, "activation.alpha", in->type_source, "%g",
                                                      (double)act->alpha);
    if (act->beta != 0) moe__note(in, "activation.beta", in->type_source, "%g", (double)act->beta);
    if (traits & MOE__BIASES) {
        layer->gemm1_bias = layer->gemm2_bias = layer->router.bias = 1;
        moe__note(in, "gemm1_bias", in->type_source, "1");
        moe__note(in, "gemm2_bias", in->type_source, "1");
        moe__note(in, "router.bias", in->type_source, "1");
    } else if (in->family->rule == MOE__RULE_ERNIE45 || (traits & MOE__BLOCK_TYPES)) {
        layer->gemm1_bias = layer->gemm2_bias = moe__infer_flag(in, traits & MOE__BLOCK_TYPES ? "mlp_bias" : "use_bias",
                                                                0);
        if (layer->gemm1_bias) {
            moe__note(in, "gemm1_bias", in->source, "1");
            moe__note(in, "gemm2_bias", in->source, "1");
        }
    }
    if (traits & MOE__ROW_NORM) {
        layer->row_norm = 1;
        layer->row_norm_epsilon = (float)moe__infer_number(in, "post_norm_eps", 1e-8);
        moe__note(in, "row_norm", in->type_source, "1");
        moe__note(in, "row_norm_epsilon", in->source, "%g", (double)layer->row_norm_epsilon);
    }
}

// ---- shared experts ----

static void moe__infer_shared_limit(moe__infer *in)
{
    moe_layer_desc *layer = &in->layer;
    int32_t traits = in->family->traits, own = (traits & (MOE__LIMIT_STEP | MOE__SHARED_STEP)) != 0;
    if (own) moe__infer_limit(in, &layer->shared.activation, moe__keys_shared_limit, 1, "shared.activation");
    else if (!(traits & MOE__SHARED_NO_LIMIT)) layer->shared.activation = layer->activation;
}

static void moe__infer_shared(moe__infer *in)
{
    moe_layer_desc *layer = &in->layer;
    moe_shared_desc *shared = &layer->shared;
    char source[MOE__SOURCE_MAX];
    char strategy[32];
    int32_t mixed = moe__infer_flag(in, "use_mixed_mlp_moe", 1), count, width;
    moe__json named = moe__infer_find(in, moe__keys_shared, 1);
    width = moe__infer_int(in, moe__keys_shared_width, 0, MOE__SIZE_MAX, 0);
    memcpy(source, in->source, sizeof source);
    count = moe__infer_int(in, moe__keys_shared, 0, 64, moe__json_kind_of(named) == MOE__JSON_NONE && width > 0);
    if (in->family->rule == MOE__RULE_INKLING || !mixed) count = 0; // Inkling's are slots of the routing
    if (layer->router.input_size != 0 && count > 0) {
        moe__note(in, "shared.count", in->source, "0: they read %d values, not %d; left to the caller",
                  layer->router.input_size, layer->hidden_size);
        count = 0;
    }
    if (in->result != MOE_OK || count == 0) { memset(shared, 0, sizeof *shared); return; }
    moe__note(in, "shared.count", moe__json_is_set(named) ? in->source : source, "%d", count);
    if (moe__json_is_set(moe__infer_find(in, moe__keys_shared_width, 1)) && width % count != 0) count = 1;
    shared->count = count;
    shared->intermediate_size = width > 0 ? width / count : layer->intermediate_size;
    moe__note(in, "shared.intermediate_size", width > 0 ? source : in->width_source, "%d", shared->intermediate_size);
    moe__infer_shared_limit(in);
    if (in->family->traits & MOE__SHARED_GATE) {
        shared->gate = 1;
        moe__note(in, "shared.gate", in->type_source, "1");
    }
    moe__infer_string(in, "shared_expert_combination_strategy", strategy, sizeof strategy);
    if (in->result != MOE_OK || strategy[0] == 0 || strcmp(strategy, "sum") == 0) return;
    if (strcmp(strategy, "average") != 0) {
        in->result = moe__fail(in->err, MOE_ERROR_UNSUPPORTED, in->source, "is %q in the config: it must be \"sum\" or "
                               "\"average\"", strategy);
        return;
    }
    layer->output_scale = 0.5f;
    moe__note(in, "output_scale", in->source, "0.5");
}

static const moe__name moe__halves_names[] = {
    { MOE_HALVES_SEPARATE, "separate" }, { MOE_HALVES_GATE_UP, "gate, then up" },
    { MOE_HALVES_INTERLEAVED, "gate and up alternating" },
};

static void moe__infer_store(moe__infer *in)
{
    static const int32_t halves[] = { MOE_HALVES_SEPARATE, MOE_HALVES_GATE_UP, MOE_HALVES_GATE_UP, MOE_HALVES_GATE_UP,
                                      MOE_HALVES_INTERLEAVED, MOE_HALVES_INTERLEAVED, MOE_HALVES_SEPARATE };
    static const int32_t layouts[] = { MOE_LAYOUT_MAJOR_K, MOE_LAYOUT_MAJOR_K, MOE_LAYOUT_MAJOR_MN, MOE_LAYOUT_UNSET,
                                       MOE_LAYOUT_MAJOR_K, MOE_LAYOUT_MAJOR_MN, MOE_LAYOUT_UNSET };
    moe_source_desc *source = &in->layer.source;
    source->halves = halves[in->family->store];
    source->layout = layouts[in->family->store];
    if (in->family->store == MOE__STORE_INTERLEAVED_MN && in->layer.format > MOE_FORMAT_F16)
        source->layout = MOE_LAYOUT_MAJOR_K; // gpt-oss: only files converted from its MXFP4 are input-major
    source->shared_halves = in->family->rule == MOE__RULE_INKLING ? MOE_HALVES_INTERLEAVED
                            : source->halves == MOE_HALVES_SEPARATE ? MOE_HALVES_SEPARATE : MOE_HALVES_GATE_UP;
    moe__note(in, "source.halves", in->type_source, "%s",
              moe__name_find(moe__halves_names, MOE__ARRAY_COUNT(moe__halves_names), source->halves, "?"));
    if (source->layout != MOE_LAYOUT_UNSET)
        moe__note(in, "source.layout", in->type_source, "%s",
                  source->layout == MOE_LAYOUT_MAJOR_K ? "[out, in]" : "[in, out]");
}

// ---- quantisation ----

typedef struct moe__quant { // what was found, and where
    int32_t format, block, scale;
    const char *refusal; // why there is no format
} moe__quant;

static moe__quant moe__quant_make(int32_t format, int32_t block, int32_t scale)
{
    moe__quant quant;
    quant.format = format;
    quant.block = block;
    quant.scale = scale;
    quant.refusal = NULL;
    return quant;
}

static moe__quant moe__quant_refuse(const char *why)
{
    moe__quant quant = moe__quant_make(MOE_FORMAT_UNSET, 0, 0);
    quant.refusal = why;
    return quant;
}

static moe__quant moe__quant_fp8_block(int64_t rows, int64_t columns, int32_t scale)
{
    if (rows == 1 && columns == 32) return moe__quant_make(MOE_FORMAT_MXFP8, 0, 0);
    if (rows == columns && (rows == 128 || rows == 64 || rows == 32))
        return moe__quant_make(MOE_FORMAT_FP8_BLOCK, (int32_t)rows, scale);
    return moe__quant_refuse("its fp8 blocks are neither square of 128, 64 or 32, nor 1 x 32");
}

static int64_t moe__json_int_or(moe__json value, int64_t otherwise)
{
    int64_t number;
    return moe__json_int64(value, &number) ? number : otherwise;
}

// compressed-tensors: one group of "config_groups". ModelOpt writes the same form with fewer words.
static moe__quant moe__quant_group(moe__json group)
{
    moe__json w = moe__json_find(group, "weights"), in = moe__json_find(group, "input_activations");
    moe__json strategy = moe__json_find(w, "strategy"), block = moe__json_find(w, "block_structure");
    int64_t bits = moe__json_int_or(moe__json_find(w, "num_bits"), 0);
    int64_t width = moe__json_int_or(moe__json_find(w, "group_size"), 0);
    int64_t in_bits = moe__json_is_set(in) ? moe__json_int_or(moe__json_find(in, "num_bits"), 0) : 16;
    int32_t is_float = moe__json_equals(moe__json_find(w, "type"), "float");
    if (!is_float && bits == 4 && in_bits == 16) {
        moe__json symmetric = moe__json_find(w, "symmetric");
        if (moe__json_is_set(symmetric) && !moe__json_is_true(symmetric))
            return moe__quant_refuse("its int4 has zero points: only symmetric int4 is known");
        if (width != 32 && width != 64 && width != 128)
            return moe__quant_refuse("its int4 groups have none of the sizes 32, 64, 128");
        return moe__quant_make(MOE_FORMAT_INT4_W4A16, (int32_t)width, 0);
    }
    if (is_float && bits == 4 && width == 16 && (in_bits == 4 || in_bits == 16))
        return moe__quant_make(in_bits == 4 ? MOE_FORMAT_NVFP4 : MOE_FORMAT_NVFP4_W4A16, 0, 0);
    if (is_float && bits == 4 && width == 32 && (in_bits == 8 || in_bits == 16))
        return moe__quant_make(in_bits == 8 ? MOE_FORMAT_MXFP4_W4A8 : MOE_FORMAT_MXFP4_W4A16, 0, 0);
    if (is_float && bits == 8 && in_bits == 8) {
        if (moe__json_equals(strategy, "tensor")) return moe__quant_make(MOE_FORMAT_FP8_PER_TENSOR, 0, 0);
        if (moe__json_equals(strategy, "channel")) return moe__quant_make(MOE_FORMAT_FP8_PER_CHANNEL, 0, 0);
        if (moe__json_equals(strategy, "group") && width == 32) return moe__quant_make(MOE_FORMAT_MXFP8, 0, 0);
        if (moe__json_equals(strategy, "block"))
            return moe__quant_fp8_block(moe__json_int_or(moe__json_element(block, 0), 0),
                                        moe__json_int_or(moe__json_element(block, 1), 0), 0);
        if (!moe__json_is_set(strategy)) return moe__quant_make(MOE_FORMAT_FP8_PER_TENSOR, 0, 0);
    }
    return moe__quant_refuse("its bits, type and strategy make no format that is known");
}

// A pattern of an exception list as one with '*' alone. "re:" patterns match from the left, so without '$' more may
// follow; of their signs '^', '$', ".*" and "\." are read, which is what real files use.
static void moe__quant_pattern(const char *from, moe__text *out)
{
    int32_t regular = strncmp(from, "re:", 3) == 0, open = regular;
    if (regular) from += from[3] == '^' ? 4 : 3;
    for (; *from != 0; from++) {
        if (regular && *from == '\\' && from[1] != 0) from++;
        else if (regular && *from == '.' && from[1] == '*') continue;
        else if (regular && *from == '$' && from[1] == 0) { open = 0; continue; }
        moe__text_char(out, *from);
    }
    if (open) moe__text_char(out, '*');
}

// 1 when `name` is what the pattern says, or lies in a module that it names.
static int32_t moe__glob(const char *pattern, const char *name)
{
    const char *star = NULL, *resume = NULL;
    for (;;) {
        if (*pattern == '*') {
            star = ++pattern;
            resume = name;
        } else if (*pattern == 0 && (*name == 0 || *name == '.')) {
            return 1;
        } else if (*name != 0 && *pattern == *name) {
            pattern++;
            name++;
        } else if (star != NULL && *resume != 0) {
            pattern = star;
            name = ++resume;
        } else {
            return 0;
        }
    }
}

// 1 when the pattern covers the experts of this layer under any of the names that they go by.
static int32_t moe__quant_covers(const moe__infer *in, const char *pattern)
{
    static const char *const ways[] = { "model.layers.", "model.language_model.layers.", "language_model.model.layers.",
                                        "backbone.layers.", "layers." };
    static const char *const blocks[] = { "mlp", "block_sparse_moe", "feed_forward", "ffn", "mixer", "moe" };
    static const char *const ends[] = { "0.gate_proj", "0.up_proj", "0.w1", "gate_up_proj", "up_proj" };
    char plain[192];
    moe__text text = moe__text_make(plain, sizeof plain);
    moe__quant_pattern(pattern, &text);
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(ways) * MOE__ARRAY_COUNT(blocks) * MOE__ARRAY_COUNT(ends); i++) {
        char name[96];
        text = moe__text_make(name, sizeof name);
        moe__text_format(&text, "%s%d.%s.experts.%s", ways[i / 30], in->layer_index, blocks[i / 5 % 6], ends[i % 5]);
        if (moe__glob(plain, name)) return 1;
    }
    return 0;
}

// 1 when a list of exceptions has the experts of this layer.
static int32_t moe__quant_excepts(moe__infer *in, moe__json list)
{
    moe__json_iter iter = moe__json_begin(list);
    moe__json key, value;
    char pattern[160];
    while (!iter.object && moe__json_step(&iter, &key, &value)) {
        size_t length = moe__json_string(value, pattern, sizeof pattern);
        if (length > 0 && length < sizeof pattern && moe__quant_covers(in, pattern)) return 1;
    }
    return 0;
}

// "config_groups": the group of the experts, or of every Linear.
static moe__quant moe__quant_groups(moe__infer *in, moe__json groups)
{
    moe__json_iter iter = moe__json_begin(groups);
    moe__json key, group, chosen = moe__json_none();
    int32_t best = 0;
    while (iter.object && moe__json_step(&iter, &key, &group)) {
        moe__json_iter targets = moe__json_begin(moe__json_find(group, "targets"));
        moe__json unused, target;
        int32_t rank = targets.at == NULL; // no targets: everything
        char pattern[160];
        while (!targets.object && moe__json_step(&targets, &unused, &target)) {
            size_t length = moe__json_string(target, pattern, sizeof pattern);
            if (length < sizeof pattern && moe__quant_covers(in, pattern)) rank = 3;
            else if (rank < 2 && strcmp(pattern, "Linear") == 0) rank = 2;
        }
        if (rank <= best) continue;
        best = rank;
        chosen = group;
    }
    if (best == 0) return moe__quant_make(MOE_FORMAT_UNSET, 0, 0);
    return moe__quant_group(chosen);
}

// ModelOpt's name of an algorithm.
static moe__quant moe__quant_algorithm(moe__json name)
{
    static const moe__name names[] = {
        { MOE_FORMAT_FP8_PER_TENSOR, "FP8" },      { MOE_FORMAT_FP8_PER_CHANNEL, "FP8_PER_CHANNEL_PER_TOKEN" },
        { MOE_FORMAT_FP8_BLOCK, "FP8_PB_WO" },     { MOE_FORMAT_FP8_BLOCK, "FP8_BLOCK_SCALES" },
        { MOE_FORMAT_NVFP4, "NVFP4" },             { MOE_FORMAT_NVFP4_W4A16, "W4A16_NVFP4" },
        { MOE_FORMAT_MXFP8, "MXFP8" },             { MOE_FORMAT_MXFP4_W4A8, "W4A8_MXFP4_FP8" },
        { MOE_FORMAT_MXFP4_W4A16, "W4A16_MXFP4" },
    };
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(names); i++)
        if (moe__json_equals(name, names[i].name))
            return moe__quant_make(names[i].value, names[i].value == MOE_FORMAT_FP8_BLOCK ? 128 : 0, 0);
    return moe__quant_refuse("its \"quant_algo\" is not known here");
}

// MIXED_PRECISION: the algorithm of this layer's experts; none listed: not quantised.
static moe__quant moe__quant_mixed(moe__infer *in, moe__json layers)
{
    moe__json_iter iter = moe__json_begin(layers);
    moe__json key, value;
    moe_tensor_name what;
    char name[160];
    while (iter.object && moe__json_step(&iter, &key, &value)) {
        if (moe__json_string(key, name, sizeof name) >= sizeof name) continue;
        if (moe_tensor_from_name(name, &what, NULL) != MOE_OK || what.layer != in->layer_index) continue;
        if (what.role < MOE_TENSOR_GATE || what.role > MOE_TENSOR_DOWN) continue;
        return moe__quant_algorithm(moe__json_find(value, "quant_algo"));
    }
    return moe__quant_make(MOE_FORMAT_UNSET, 0, 0);
}

static moe__quant moe__quant_modelopt(moe__infer *in, moe__json config)
{
    moe__json algorithm = moe__json_find(config, "quant_algo"), groups = moe__json_find(config, "config_groups");
    moe__quant quant;
    if (moe__quant_excepts(in, moe__json_find(config, "exclude_modules")) ||
        moe__quant_excepts(in, moe__json_find(config, "ignore")))
        return moe__quant_make(MOE_FORMAT_UNSET, 0, 0);
    if (moe__json_equals(algorithm, "MIXED_PRECISION"))
        return moe__quant_mixed(in, moe__json_find(config, "quantized_layers"));
    quant = moe__quant_algorithm(algorithm);
    if (quant.format == MOE_FORMAT_NVFP4 && moe__json_kind_of(groups) == MOE__JSON_OBJECT) {
        moe__quant group = moe__quant_groups(in, groups); // all input_activations null: only the weights are quantised
        if (group.format == MOE_FORMAT_NVFP4_W4A16) return group;
    }
    return quant;
}

static moe__quant moe__quant_fp8(moe__json config)
{
    moe__json block = moe__json_find(config, "weight_block_size");
    int32_t scale = moe__json_equals(moe__json_find(config, "scale_fmt"), "ue8m0") ? MOE_DTYPE_UE8M0 : 0;
    if (moe__json_kind_of(block) != MOE__JSON_ARRAY) return moe__quant_make(MOE_FORMAT_FP8_PER_TENSOR, 0, 0);
    return moe__quant_fp8_block(moe__json_int_or(moe__json_element(block, 0), 0),
                                moe__json_int_or(moe__json_element(block, 1), 0), scale);
}

static moe__quant moe__quant_config(moe__infer *in, moe__json config)
{
    moe__json method = moe__json_find(config, "quant_method");
    if (moe__json_is_set(moe__json_find(config, "quant_algo"))) return moe__quant_modelopt(in, config);
    if (moe__quant_excepts(in, moe__json_find(config, "ignore")) ||
        moe__quant_excepts(in, moe__json_find(config, "modules_to_not_convert")) ||
        moe__quant_excepts(in, moe__json_find(config, "ignored_layers")))
        return moe__quant_make(MOE_FORMAT_UNSET, 0, 0);
    if (moe__json_equals(method, "fp8")) return moe__quant_fp8(config);
    if (moe__json_equals(method, "mxfp4")) return moe__quant_make(MOE_FORMAT_MXFP4_W4A16, 0, 0);
    if (moe__json_equals(method, "mxfp8")) return moe__quant_make(MOE_FORMAT_MXFP8, 0, 0);
    if (moe__json_kind_of(moe__json_find(config, "config_groups")) == MOE__JSON_OBJECT)
        return moe__quant_groups(in, moe__json_find(config, "config_groups"));
    return moe__quant_refuse("its \"quant_method\" is not known here");
}

// ---- format ----

// The type of unquantised weights.
static void moe__infer_dtype(moe__infer *in)
{
    static const moe__name names[] = {
        { MOE_FORMAT_BF16, "bfloat16" }, { MOE_FORMAT_F16, "float16" }, { MOE_FORMAT_F32, "float32" },
        { MOE_FORMAT_BF16, "torch.bfloat16" }, { MOE_FORMAT_F16, "torch.float16" }, { MOE_FORMAT_F32, "torch.float32" },
    };
    moe__json value = moe__infer_find(in, "dtype torch_dtype", 0);
    if (!moe__json_is_set(value)) value = moe__infer_pick(in, in->root, "", "dtype torch_dtype");
    if (in->result != MOE_OK) return;
    if (!moe__json_is_set(value)) {
        in->layer.format = MOE_FORMAT_BF16;
        moe__note(in, "format", "default: the config has no dtype", "bf16");
        return;
    }
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(names); i++)
        if (moe__json_equals(value, names[i].name)) in->layer.format = names[i].value;
    if (in->layer.format == MOE_FORMAT_UNSET) moe__infer_wrong(in, value, "\"bfloat16\", \"float16\" or \"float32\"");
    moe__note(in, "format", in->source, "%s", moe_format_string(in->layer.format));
}

// Where the config speaks of quantisation: hf_quant_config.json, then the language model, then the top.
static moe__json moe__infer_quant_config(moe__infer *in, char *source)
{
    static const char keys[] = "quantization_config compression_config";
    moe__json config = moe__json_find(in->quant, "quantization");
    if (moe__json_kind_of(config) == MOE__JSON_OBJECT) {
        moe__copy_string(source, MOE__SOURCE_MAX, "hf_quant_config.json");
        return config;
    }
    config = moe__infer_pick(in, in->scopes[in->num_scopes - 1].object, in->text_prefix, keys);
    if (moe__json_kind_of(config) != MOE__JSON_OBJECT) config = moe__infer_pick(in, in->root, "", keys);
    memcpy(source, in->source, MOE__SOURCE_MAX);
    return moe__json_kind_of(config) == MOE__JSON_OBJECT ? config : moe__json_none();
}

static void moe__infer_format(moe__infer *in)
{
    char source[MOE__SOURCE_MAX], dtype[32];
    moe__json config;
    moe__quant quant;
    if (in->result != MOE_OK) return;
    moe__infer_string(in, "expert_dtype", dtype, sizeof dtype); // DeepSeek-V4: the rest of the model is fp8
    if (strcmp(dtype, "fp4") == 0) {
        in->layer.format = MOE_FORMAT_MXFP4_W4A8;
        moe__note(in, "format", in->source, "%s", moe_format_string(in->layer.format));
        return;
    }
    config = moe__infer_quant_config(in, source);
    if (config.at == NULL) { moe__infer_dtype(in); return; }
    quant = moe__quant_config(in, config);
    if (quant.refusal != NULL && in->result == MOE_OK) {
        char method[200];
        moe__json name = moe__json_find(config, "quant_algo");
        if (!moe__json_is_set(name)) name = moe__json_find(config, "quant_method");
        moe__json_show(name, method, sizeof method);
        in->result = moe__fail(in->err, MOE_ERROR_UNSUPPORTED, source, "(%s) gives no format: %s", method,
                               quant.refusal);
        return;
    }
    if (quant.format == MOE_FORMAT_UNSET) { moe__infer_dtype(in); return; }
    in->layer.format = quant.format;
    in->layer.format_block = quant.block;
    in->layer.scale_dtype = quant.scale;
    moe__note(in, "format", source, "%s", moe_format_string(quant.format));
    if (quant.block != 0) moe__note(in, "format_block", source, "%d", quant.block);
    if (quant.scale != 0) moe__note(in, "scale_dtype", source, "%s", moe_dtype_string(quant.scale));
}

// ---- all of it ----

// Fills in->layer, not yet resolved, and the facts. The texts are checked first, so nothing behind can leave them.
static int32_t moe__infer_layer(moe__infer *in, const char *json, size_t json_bytes, const char *quant_json,
                                size_t quant_bytes, int32_t layer_index)
{
    int32_t result;
    if (json == NULL) return moe__fail_null(in->err, "json");
    if (quant_json == NULL && quant_bytes != 0) return moe__fail_null(in->err, "quant_json");
    if (layer_index < 0 || layer_index >= MOE__LAYERS_MAX)
        return moe__fail_range(in->err, "layer_index", layer_index, 0, MOE__LAYERS_MAX - 1);
    if ((result = moe__json_parse(json, json_bytes, "config.json", &in->root, in->err)) != MOE_OK) return result;
    if (quant_json != NULL && quant_bytes != 0 &&
        (result = moe__json_parse(quant_json, quant_bytes, "hf_quant_config.json", &in->quant, in->err)) != MOE_OK)
        return result;
    if (moe__json_kind_of(in->root) != MOE__JSON_OBJECT)
        return moe__fail(in->err, MOE_ERROR_FORMAT, "", "config.json is no JSON object");
    in->layer_index = layer_index;
    in->layer.layer_index = layer_index;
    moe__infer_open(in);
    moe__infer_family(in);
    moe__note(in, "model_type", in->type_source, "%s", in->type);
    moe__infer_place(in);
    moe__infer_sizes(in);
    moe__infer_routing(in);
    moe__infer_experts(in);
    moe__infer_shared(in);
    moe__infer_format(in);
    moe__infer_store(in);
    return in->result;
}

static void moe__infer_make(moe__infer *in, moe_fact *facts, int32_t capacity, moe_error *err)
{
    memset(in, 0, sizeof *in);
    in->facts = facts;
    in->capacity = capacity;
    in->err = err;
}

// The caller's place for facts.
static int32_t moe__facts_check(const moe_fact *facts, int32_t capacity, int32_t *count, moe_error *err)
{
    if (count == NULL) return moe__fail_null(err, "count");
    *count = 0;
    if (capacity < 0) return moe__fail(err, MOE_ERROR_ARGUMENT, "capacity", "is %d: it must not be negative", capacity);
    if (facts == NULL && capacity > 0) return moe__fail_null(err, "facts");
    return MOE_OK;
}

MOE_API int32_t moe_layer_from_config(const char *json, size_t json_bytes, const char *quant_json, size_t quant_bytes,
                                      int32_t layer_index, moe_layer_desc *out, moe_error *err)
{
    moe__infer in;
    int32_t result;
    if (out == NULL) return moe__fail_null(err, "out");
    memset(out, 0, sizeof *out);
    moe__infer_make(&in, NULL, 0, err);
    result = moe__infer_layer(&in, json, json_bytes, quant_json, quant_bytes, layer_index);
    if (result != MOE_OK || (result = moe__layer_resolve(&in.layer, err)) != MOE_OK) return result;
    *out = in.layer;
    return moe__ok(err);
}

MOE_API int32_t moe_facts_from_config(const char *json, size_t json_bytes, const char *quant_json, size_t quant_bytes,
                                      int32_t layer_index, moe_fact *facts, int32_t capacity, int32_t *count,
                                      moe_error *err)
{
    moe__infer in;
    int32_t result = moe__facts_check(facts, capacity, count, err);
    if (result != MOE_OK) return result;
    moe__infer_make(&in, facts, capacity, err);
    result = moe__infer_layer(&in, json, json_bytes, quant_json, quant_bytes, layer_index);
    if (result != MOE_OK || (result = moe__layer_resolve(&in.layer, err)) != MOE_OK) return result;
    *count = in.count;
    return moe__ok(err);
}
#endif // MOE_NO_CONFIG

// >>checkpoint  safetensors files  Opens a folder or a file, believes nothing in it, and keeps a table of tensors that
// later calls only read. All checks of sizes and places are made in moe_checkpoint_open(), on the bytes as they are
// then.
#ifndef MOE_NO_CHECKPOINT

enum {
    MOE__CKPT_HEADER_MAX = 100000000, // bytes of a header, of an index, of a config
    MOE__CKPT_SHARDS_MAX = 2048,
    MOE__CKPT_NAME_MAX = 1024, // of a tensor, with the terminator
    MOE__CKPT_FILE_MAX = 256   // of a shard's file name
};

typedef struct moe__ckpt_file {
    moe__file file;
    moe__json header;
    uint64_t data; // where the tensors' bytes begin
    uint64_t hash;
    char name[MOE__CKPT_FILE_MAX];
} moe__ckpt_file;

typedef struct moe__ckpt_tensor {
    const char *name;
    int32_t file, dtype, rank;
    int64_t dims[8];
    uint64_t begin, end;  // in the file's data
    moe_tensor_name what; // role 0: of no MoE layer
} moe__ckpt_tensor;

struct moe_checkpoint {
    moe_allocator allocator;
    moe__file config, quant;
    moe__ckpt_file *files;
    moe__ckpt_tensor *tensors;
    char *names;
    uint32_t *slots; // open addressing: index of a tensor + 1, or 0
    uint64_t names_bytes, num_slots;
    int32_t num_files, files_capacity, num_tensors;
};

typedef struct moe__ckpt_dtype {
    const char *name;
    int32_t dtype, bits;
} moe__ckpt_dtype;

// Every type that safetensors has; other names are kept without a check of the size.
static const moe__ckpt_dtype moe__ckpt_dtypes[] = {
    { "F32", MOE_DTYPE_F32, 32 },      { "BF16", MOE_DTYPE_BF16, 16 },    { "F16", MOE_DTYPE_F16, 16 },
    { "F8_E4M3", MOE_DTYPE_E4M3, 8 },  { "F8_E5M2", MOE_DTYPE_E5M2, 8 },  { "F8_E8M0", MOE_DTYPE_UE8M0, 8 },
    { "F4", MOE_DTYPE_E2M1, 4 },       { "F64", MOE_DTYPE_F64, 64 },      { "I8", MOE_DTYPE_I8, 8 },
    { "U8", MOE_DTYPE_U8, 8 },         { "I16", MOE_DTYPE_I16, 16 },      { "U16", MOE_DTYPE_U16, 16 },
    { "I32", MOE_DTYPE_I32, 32 },      { "U32", MOE_DTYPE_U32, 32 },      { "I64", MOE_DTYPE_I64, 64 },
    { "U64", MOE_DTYPE_U64, 64 },      { "BOOL", MOE_DTYPE_BOOL, 8 },     { "C64", MOE_DTYPE_UNSET, 64 },
    { "F6_E2M3", MOE_DTYPE_UNSET, 6 }, { "F6_E3M2", MOE_DTYPE_UNSET, 6 }, { "F8_E4M3FNUZ", MOE_DTYPE_UNSET, 8 },
    { "F8_E5M2FNUZ", MOE_DTYPE_UNSET, 8 },
};

static uint64_t moe__hash_string(const char *string) // FNV-1a
{
    uint64_t hash = 0xcbf29ce484222325u;
    for (; *string != 0; string++) hash = (hash ^ (unsigned char)*string) * 0x100000001b3u;
    return hash;
}

// ---- headers ----

// Finds the header's JSON and the data behind it.
static int32_t moe__ckpt_read_header(moe__ckpt_file *f, moe_error *err)
{
    const unsigned char *data = f->file.data;
    char label[MOE__CKPT_FILE_MAX + 16];
    moe__text text = moe__text_make(label, sizeof label);
    uint64_t size = 0;
    if (f->file.size < 8)
        return moe__fail(err, MOE_ERROR_FORMAT, "", "%q has %U bytes: a safetensors file has at least 10", f->name,
                         f->file.size);
    for (int32_t i = 7; i >= 0; i--) size = size << 8 | data[i];
    if (size > f->file.size - 8 || size > MOE__CKPT_HEADER_MAX)
        return moe__fail(err, MOE_ERROR_FORMAT, "", "%q says that its header has %U bytes: the file has %U, and a "
                         "header at most %d", f->name, size, f->file.size, (int32_t)MOE__CKPT_HEADER_MAX);
    if (size < 2 || data[8] != '{')
        return moe__fail(err, MOE_ERROR_FORMAT, "", "%q has a header that does not begin with '{'", f->name);
    moe__text_format(&text, "the header of %q", f->name);
    f->data = 8 + size;
    return moe__json_parse((const char *)data + 8, (size_t)size, label, &f->header, err);
}

// A name from a header or an index: decoded into out[capacity].
static int32_t moe__ckpt_name(moe__json key, char *out, size_t capacity, const char *file, moe_error *err)
{
    size_t length = moe__json_string(key, out, capacity);
    if (length >= capacity)
        return moe__fail(err, MOE_ERROR_FORMAT, "", "%q: a name has %U bytes, at most %U are taken: %q", file,
                         (uint64_t)length, (uint64_t)capacity - 1, out);
    if (strlen(out) != length)
        return moe__fail(err, MOE_ERROR_FORMAT, "", "%q: a name has a zero byte in it: %q", file, out);
    return MOE_OK;
}

static int32_t moe__ckpt_shape(moe__ckpt_tensor *t, moe__json shape, const char *file, uint64_t *elements,
                               moe_error *err)
{
    moe__json_iter iter = moe__json_begin(shape);
    moe__json key, value;
    if (moe__json_kind_of(shape) != MOE__JSON_ARRAY)
        return moe__fail(err, MOE_ERROR_FORMAT, "", "%q: tensor %q has no \"shape\" array", file, t->name);
    *elements = 1;
    while (moe__json_step(&iter, &key, &value)) {
        if (t->rank == 8)
            return moe__fail(err, MOE_ERROR_FORMAT, "", "%q: tensor %q has more than 8 dimensions", file, t->name);
        if (!moe__json_int64(value, &t->dims[t->rank]) || t->dims[t->rank] < 0)
            return moe__fail(err, MOE_ERROR_FORMAT, "", "%q: dimension %d of tensor %q is no integer from 0 on", file,
                             t->rank, t->name);
        if (!moe__mul(*elements, (uint64_t)t->dims[t->rank++], elements))
            return moe__fail(err, MOE_ERROR_FORMAT, "", "%q: the dimensions of tensor %q have a product over 2^64",
                             file,
                             t->name);
    }
    return MOE_OK;
}

// One entry of a header into *t, whose name is set.
static int32_t moe__ckpt_entry(const moe__ckpt_file *f, moe__json entry, moe__ckpt_tensor *t, moe_error *err)
{
    moe__json dtype = moe__json_find(entry, "dtype"), offsets = moe__json_find(entry, "data_offsets");
    uint64_t elements = 0, bits = 0, space = f->file.size - f->data;
    int64_t begin = -1, end = -1;
    int32_t result, known = -1;
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(moe__ckpt_dtypes); i++)
        if (moe__json_equals(dtype, moe__ckpt_dtypes[i].name)) known = i;
    if (moe__json_kind_of(dtype) != MOE__JSON_STRING)
        return moe__fail(err, MOE_ERROR_FORMAT, "", "%q: tensor %q has no \"dtype\"", f->name, t->name);
    if ((result = moe__ckpt_shape(t, moe__json_find(entry, "shape"), f->name, &elements, err)) != MOE_OK) return result;
    if (moe__json_kind_of(offsets) != MOE__JSON_ARRAY || moe__json_count(offsets) != 2 ||
        !moe__json_int64(moe__json_element(offsets, 0), &begin) ||
        !moe__json_int64(moe__json_element(offsets, 1), &end))
        return moe__fail(err, MOE_ERROR_FORMAT, "", "%q: tensor %q has no \"data_offsets\" of two integers", f->name,
                         t->name);
    if (begin < 0 || end < begin || (uint64_t)end > space)
        return moe__fail(err, MOE_ERROR_FORMAT, "", "%q: tensor %q lies at [%D, %D]: the file has %U bytes of data",
                         f->name,
                         t->name, begin, end, space);
    t->begin = (uint64_t)begin;
    t->end = (uint64_t)end;
    if (known < 0) return MOE_OK;
    t->dtype = moe__ckpt_dtypes[known].dtype;
    if (!moe__mul(elements, (uint64_t)moe__ckpt_dtypes[known].bits, &bits) || bits % 8 != 0 ||
        bits / 8 != t->end - t->begin)
        return moe__fail(err, MOE_ERROR_FORMAT, "", "%q: tensor %q has %U bytes: %U elements of type %s are %U bits",
                         f->name,
                         t->name, t->end - t->begin, elements, moe__ckpt_dtypes[known].name, bits);
    return MOE_OK;
}

static int32_t moe__ckpt_before(const moe__ckpt_tensor *a, const moe__ckpt_tensor *b)
{
    return a->begin != b->begin ? a->begin < b->begin : a->end < b->end;
}

static void moe__ckpt_swap(moe__ckpt_tensor *a, moe__ckpt_tensor *b)
{
    moe__ckpt_tensor copy = *a;
    *a = *b;
    *b = copy;
}

static void moe__ckpt_sink(moe__ckpt_tensor *t, int32_t root, int32_t count)
{
    for (int32_t child; (child = 2 * root + 1) < count; root = child) {
        if (child + 1 < count && moe__ckpt_before(&t[child], &t[child + 1])) child++;
        if (!moe__ckpt_before(&t[root], &t[child])) return;
        moe__ckpt_swap(&t[root], &t[child]);
    }
}

// Sorts a file's tensors by place (a heap sort: a hostile order costs no more), then sees that each begins where the
// one before ends, and the last one ends with the file.
static int32_t moe__ckpt_check_places(const moe__ckpt_file *f, moe__ckpt_tensor *t, int32_t count, moe_error *err)
{
    uint64_t at = 0;
    for (int32_t i = count / 2 - 1; i >= 0; i--) moe__ckpt_sink(t, i, count);
    for (int32_t i = count - 1; i > 0; i--) {
        moe__ckpt_swap(&t[0], &t[i]);
        moe__ckpt_sink(t, 0, i);
    }
    for (int32_t i = 0; i < count; i++) {
        if (t[i].begin < at)
            return moe__fail(err, MOE_ERROR_FORMAT, "", "%q: tensors %q and %q overlap at byte %U", f->name,
                             t[i - 1].name,
                             t[i].name, t[i].begin);
        if (t[i].begin > at)
            return moe__fail(err, MOE_ERROR_FORMAT, "", "%q: bytes %U to %U, in front of tensor %q, belong to no "
                             "tensor",
                             f->name, at, t[i].begin, t[i].name);
        at = t[i].end;
    }
    if (at != f->file.size - f->data)
        return moe__fail(err, MOE_ERROR_FORMAT, "", "%q: bytes %U to %U, behind the last tensor, belong to no tensor",
                         f->name,
                         at, f->file.size - f->data);
    return MOE_OK;
}

// ---- the table ----

// Slot of a name: its own, or the free one where it belongs.
static uint32_t *moe__ckpt_slot(const moe_checkpoint *ckpt, const char *name)
{
    uint64_t i = moe__hash_string(name);
    for (;; i++) {
        uint32_t *slot = &ckpt->slots[i % ckpt->num_slots];
        if (*slot == 0 || strcmp(ckpt->tensors[*slot - 1].name, name) == 0) return slot;
    }
}

static int32_t moe__ckpt_enter(moe_checkpoint *ckpt, int32_t first, int32_t count, moe_error *err)
{
    for (int32_t i = first; i < first + count; i++) {
        const moe__ckpt_tensor *t = &ckpt->tensors[i], *other;
        uint32_t *slot = moe__ckpt_slot(ckpt, t->name);
        if (*slot == 0) { *slot = (uint32_t)i + 1; continue; }
        other = &ckpt->tensors[*slot - 1];
        if (other->file == t->file)
            return moe__fail(err, MOE_ERROR_FORMAT, "", "%q: there are two tensors %q", ckpt->files[t->file].name,
                             t->name);
        return moe__fail(err, MOE_ERROR_FORMAT, "", "%q and %q both have a tensor %q", ckpt->files[other->file].name,
                         ckpt->files[t->file].name, t->name);
    }
    return MOE_OK;
}

// Counts what all headers hold and allocates for it.
static int32_t moe__ckpt_reserve(moe_checkpoint *ckpt, moe_error *err)
{
    uint64_t tensors = 0, bytes;
    for (int32_t i = 0; i < ckpt->num_files; i++) {
        moe__json_iter iter = moe__json_begin(ckpt->files[i].header);
        moe__json key, value;
        while (moe__json_step(&iter, &key, &value)) {
            if (moe__json_equals(key, "__metadata__")) continue;
            ckpt->names_bytes += (uint64_t)moe__json_string(key, NULL, 0) + 1;
            tensors++;
        }
    }
    if (tensors > INT32_MAX / 2)
        return moe__fail(err, MOE_ERROR_UNSUPPORTED, "", "the checkpoint has %U tensors: at most %d are taken", tensors,
                         (int32_t)(INT32_MAX / 2));
    bytes = tensors * sizeof(moe__ckpt_tensor);
    ckpt->num_slots = tensors * 2 + 1;
    ckpt->names = (char *)moe__alloc(&ckpt->allocator, ckpt->names_bytes);
    if (ckpt->names == NULL) return moe__fail_memory(err, ckpt->names_bytes);
    ckpt->tensors = (moe__ckpt_tensor *)moe__alloc(&ckpt->allocator, bytes);
    if (ckpt->tensors == NULL) return moe__fail_memory(err, bytes);
    ckpt->num_tensors = (int32_t)tensors;
    memset(ckpt->tensors, 0, (size_t)bytes);
    bytes = ckpt->num_slots * sizeof ckpt->slots[0];
    ckpt->slots = (uint32_t *)moe__alloc(&ckpt->allocator, bytes);
    if (ckpt->slots == NULL) return moe__fail_memory(err, bytes);
    memset(ckpt->slots, 0, (size_t)bytes);
    return MOE_OK;
}

static int32_t moe__ckpt_fill(moe_checkpoint *ckpt, moe_error *err)
{
    char *names = ckpt->names;
    int32_t next = 0, result;
    for (int32_t i = 0; i < ckpt->num_files; i++) {
        const moe__ckpt_file *f = &ckpt->files[i];
        moe__json_iter iter = moe__json_begin(f->header);
        moe__json key, value;
        int32_t first = next, metadata = 0;
        while (moe__json_step(&iter, &key, &value)) {
            moe__ckpt_tensor *t = &ckpt->tensors[next];
            size_t left = (size_t)(ckpt->names + ckpt->names_bytes - names);
            if (moe__json_equals(key, "__metadata__")) {
                if (metadata++ == 0 && moe__json_kind_of(value) == MOE__JSON_OBJECT) continue;
                return moe__fail(err, MOE_ERROR_FORMAT, "", "%q: \"__metadata__\" must be one object", f->name);
            }
            result = moe__ckpt_name(key, names, left < MOE__CKPT_NAME_MAX ? left : (size_t)MOE__CKPT_NAME_MAX, f->name,
                                   err);
            if (result != MOE_OK) return result;
            t->name = names;
            t->file = i;
            names += strlen(names) + 1;
            if (moe__json_kind_of(value) != MOE__JSON_OBJECT)
                return moe__fail(err, MOE_ERROR_FORMAT, "", "%q: tensor %q is no object", f->name, t->name);
            if ((result = moe__ckpt_entry(f, value, t, err)) != MOE_OK) return result;
            if (moe_tensor_from_name(t->name, &t->what, NULL) != MOE_OK) memset(&t->what, 0, sizeof t->what);
            next++;
        }
        if ((result = moe__ckpt_check_places(f, ckpt->tensors + first, next - first, err)) != MOE_OK) return result;
        if ((result = moe__ckpt_enter(ckpt, first, next - first, err)) != MOE_OK) return result;
    }
    return MOE_OK;
}

// ---- folders ----

static int32_t moe__ckpt_add_file(moe_checkpoint *ckpt, const char *name, moe_error *err)
{
    uint64_t hash = moe__hash_string(name);
    for (int32_t i = ckpt->num_files; i-- > 0;)
        if (ckpt->files[i].hash == hash && strcmp(ckpt->files[i].name, name) == 0) return MOE_OK;
    if (ckpt->num_files == MOE__CKPT_SHARDS_MAX)
        return moe__fail(err, MOE_ERROR_UNSUPPORTED, "", "the index names more than %d files",
                         (int32_t)MOE__CKPT_SHARDS_MAX);
    if (ckpt->num_files == ckpt->files_capacity) {
        int32_t capacity = ckpt->files_capacity == 0 ? 1 : ckpt->files_capacity * 4;
        uint64_t bytes = (uint64_t)capacity * sizeof(moe__ckpt_file);
        moe__ckpt_file *files = (moe__ckpt_file *)moe__alloc(&ckpt->allocator, bytes);
        if (files == NULL) return moe__fail_memory(err, bytes);
        memset(files, 0, (size_t)bytes);
        if (ckpt->num_files > 0) memcpy(files, ckpt->files, (size_t)ckpt->num_files * sizeof *files);
        moe__free(&ckpt->allocator, ckpt->files, (uint64_t)ckpt->files_capacity * sizeof *files);
        ckpt->files = files;
        ckpt->files_capacity = capacity;
    }
    ckpt->files[ckpt->num_files].hash = hash;
    memcpy(ckpt->files[ckpt->num_files++].name, name, strlen(name) + 1);
    return MOE_OK;
}

static int32_t moe__ckpt_is_plain_name(const char *name)
{
    if (name[0] == 0 || strcmp(name, ".") == 0 || strcmp(name, "..") == 0) return 0;
    return strpbrk(name, "/\\:") == NULL;
}

// The distinct files that an index names.
static int32_t moe__ckpt_list_shards(moe_checkpoint *ckpt, moe__json map, moe_error *err)
{
    moe__json_iter iter = moe__json_begin(map);
    moe__json key, value;
    char name[MOE__CKPT_FILE_MAX];
    int32_t result;
    if (moe__json_kind_of(map) != MOE__JSON_OBJECT)
        return moe__fail(err, MOE_ERROR_FORMAT, "", "model.safetensors.index.json has no object \"weight_map\"");
    while (moe__json_step(&iter, &key, &value)) {
        if (moe__json_kind_of(value) != MOE__JSON_STRING)
            return moe__fail(err, MOE_ERROR_FORMAT, "", "model.safetensors.index.json: a value of \"weight_map\" is "
                             "no file name");
        if ((result = moe__ckpt_name(value, name, sizeof name, "model.safetensors.index.json",
                                     err)) != MOE_OK) return result;
        if (!moe__ckpt_is_plain_name(name))
            return moe__fail(err, MOE_ERROR_FORMAT, "", "model.safetensors.index.json names the file %q: it must be "
                             "a plain name in the same folder", name);
        if ((result = moe__ckpt_add_file(ckpt, name, err)) != MOE_OK) return result;
    }
    if (ckpt->num_files == 0)
        return moe__fail(err, MOE_ERROR_FORMAT, "", "model.safetensors.index.json has an empty \"weight_map\"");
    return MOE_OK;
}

// Every tensor of the index is in the file that the index names.
static int32_t moe__ckpt_check_index(const moe_checkpoint *ckpt, moe__json map, moe_error *err)
{
    moe__json_iter iter = moe__json_begin(map);
    moe__json key, value;
    char name[MOE__CKPT_NAME_MAX];
    int32_t result;
    while (moe__json_step(&iter, &key, &value)) {
        uint32_t slot;
        if ((result = moe__ckpt_name(key, name, sizeof name, "model.safetensors.index.json",
                                     err)) != MOE_OK) return result;
        slot = *moe__ckpt_slot(ckpt, name);
        if (slot != 0 && moe__json_equals(value, ckpt->files[ckpt->tensors[slot - 1].file].name)) continue;
        if (slot == 0)
            return moe__fail(err, MOE_ERROR_MISSING, "", "model.safetensors.index.json names the tensor %q: no file "
                             "has it",
                             name);
        return moe__fail(err, MOE_ERROR_MISSING, "", "model.safetensors.index.json names the tensor %q in another "
                         "file than %q, where it is", name, ckpt->files[ckpt->tensors[slot - 1].file].name);
    }
    return MOE_OK;
}

// A file of the folder, or nothing when it is not there.
static int32_t moe__ckpt_optional(const moe_checkpoint *ckpt, const char *folder, const char *name, moe__file *out,
                                  moe_error *err)
{
    char path[MOE__PATH_MAX];
    int32_t result = moe__path_join(path, folder, name, err);
    if (result != MOE_OK || moe__path_look(path) == MOE__PATH_MISSING) return result;
    return moe__file_read(&ckpt->allocator, path, MOE__CKPT_HEADER_MAX, out, err);
}

static int32_t moe__ckpt_load(moe_checkpoint *ckpt, const char *folder, const char *file, uint32_t flags,
                              moe_error *err)
{
    int32_t result = MOE_OK;
    for (int32_t i = 0; i < ckpt->num_files; i++) {
        moe__ckpt_file *f = &ckpt->files[i];
        char path[MOE__PATH_MAX];
        if (file == NULL && (result = moe__path_join(path, folder, f->name, err)) != MOE_OK) return result;
        if (flags & MOE_CHECKPOINT_READ)
            result = moe__file_read(&ckpt->allocator, file != NULL ? file : path, UINT64_MAX - 1, &f->file, err);
        else
            result = moe__file_map(file != NULL ? file : path, &f->file, err);
        if (result != MOE_OK || (result = moe__ckpt_read_header(f, err)) != MOE_OK) return result;
    }
    if ((result = moe__ckpt_reserve(ckpt, err)) != MOE_OK) return result;
    return moe__ckpt_fill(ckpt, err);
}

static int32_t moe__ckpt_open_folder(moe_checkpoint *ckpt, const char *folder, uint32_t flags, moe_error *err)
{
    static const char index_name[] = "model.safetensors.index.json";
    char path[MOE__PATH_MAX];
    moe__file index;
    moe__json map = moe__json_none();
    int32_t result;
    memset(&index, 0, sizeof index);
    if ((result = moe__ckpt_optional(ckpt, folder, "config.json", &ckpt->config, err)) != MOE_OK ||
        (result = moe__ckpt_optional(ckpt, folder, "hf_quant_config.json", &ckpt->quant, err)) != MOE_OK ||
        (result = moe__path_join(path, folder, "model.safetensors", err)) != MOE_OK)
        return result;
    if (moe__path_look(path) != MOE__PATH_MISSING) {
        if ((result = moe__ckpt_add_file(ckpt, "model.safetensors", err)) != MOE_OK) return result;
        return moe__ckpt_load(ckpt, folder, NULL, flags, err);
    }
    if ((result = moe__ckpt_optional(ckpt, folder, index_name, &index, err)) != MOE_OK) return result;
    if (index.data == NULL)
        return moe__fail(err, MOE_ERROR_MISSING, "", "%q has neither model.safetensors nor %s", folder, index_name);
    result = moe__json_parse((const char *)index.data, (size_t)index.size, index_name, &map, err);
    if (result == MOE_OK) {
        map = moe__json_find(map, "weight_map");
        result = moe__ckpt_list_shards(ckpt, map, err);
    }
    if (result == MOE_OK) result = moe__ckpt_load(ckpt, folder, NULL, flags, err);
    if (result == MOE_OK) result = moe__ckpt_check_index(ckpt, map, err);
    moe__file_close(&ckpt->allocator, &index);
    return result;
}

static int32_t moe__ckpt_open_file(moe_checkpoint *ckpt, const char *path, uint32_t flags, moe_error *err)
{
    const char *name = path;
    int32_t result;
    for (const char *p = path; *p != 0; p++)
        if (*p == '/' || *p == '\\') name = p + 1;
    if (strlen(name) >= MOE__CKPT_FILE_MAX) name = "(file with a long name)";
    if ((result = moe__ckpt_add_file(ckpt, name, err)) != MOE_OK) return result;
    return moe__ckpt_load(ckpt, NULL, path, flags, err);
}

// ---- public ----

MOE_API void moe_checkpoint_close(moe_checkpoint *ckpt)
{
    moe_allocator allocator;
    if (ckpt == NULL) return;
    allocator = ckpt->allocator;
    for (int32_t i = 0; i < ckpt->num_files; i++) moe__file_close(&allocator, &ckpt->files[i].file);
    moe__file_close(&allocator, &ckpt->config);
    moe__file_close(&allocator, &ckpt->quant);
    moe__free(&allocator, ckpt->files, (uint64_t)ckpt->files_capacity * sizeof(moe__ckpt_file));
    moe__free(&allocator, ckpt->tensors, (uint64_t)ckpt->num_tensors * sizeof(moe__ckpt_tensor));
    moe__free(&allocator, ckpt->names, ckpt->names_bytes);
    moe__free(&allocator, ckpt->slots, ckpt->num_slots * sizeof ckpt->slots[0]);
    moe__free(&allocator, ckpt, sizeof *ckpt);
}

MOE_API int32_t moe_checkpoint_open(const char *path, const moe_checkpoint_desc *desc, moe_checkpoint **out,
                                    moe_error *err)
{
    moe_checkpoint_desc d;
    moe_checkpoint *ckpt;
    int32_t result;
    if (out == NULL) return moe__fail_null(err, "out");
    *out = NULL;
    if (path == NULL) return moe__fail_null(err, "path");
    if (path[0] == 0) return moe__fail(err, MOE_ERROR_ARGUMENT, "path", "is empty: it must name a folder or a file");
    if ((result = moe__copy_desc(&d, sizeof d, desc, "desc", err)) != MOE_OK) return result;
    if ((d.flags & ~(uint32_t)MOE_CHECKPOINT_READ) != 0)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "desc.flags", "is %u: it must be 0 or MOE_CHECKPOINT_READ", d.flags);
    if ((result = moe__allocator_resolve(&d.allocator, "desc.allocator", err)) != MOE_OK) return result;
    ckpt = (moe_checkpoint *)moe__alloc(&d.allocator, sizeof *ckpt);
    if (ckpt == NULL) return moe__fail_memory(err, sizeof *ckpt);
    memset(ckpt, 0, sizeof *ckpt);
    ckpt->allocator = d.allocator;
    switch (moe__path_look(path)) {
    case MOE__PATH_FOLDER: result = moe__ckpt_open_folder(ckpt, path, d.flags, err); break;
    case MOE__PATH_FILE: result = moe__ckpt_open_file(ckpt, path, d.flags, err); break;
    case MOE__PATH_MISSING: result = moe__fail_file(err, MOE_ERROR_MISSING, path, "does not exist", 0); break;
    default: result = moe__fail_file(err, MOE_ERROR_FILE, path, "is neither a folder nor a file that can be read",
                                     0); break;
    }
    if (result != MOE_OK) {
        moe_checkpoint_close(ckpt);
        return result;
    }
    *out = ckpt;
    return moe__ok(err);
}

MOE_API int32_t moe_checkpoint_count(const moe_checkpoint *ckpt) { return ckpt == NULL ? 0 : ckpt->num_tensors; }

static void moe__ckpt_describe(const moe_checkpoint *ckpt, int32_t index, moe_checkpoint_tensor *out)
{
    const moe__ckpt_tensor *t = &ckpt->tensors[index];
    const moe__ckpt_file *f = &ckpt->files[t->file];
    out->name = t->name;
    out->file = f->name;
    out->dtype = t->dtype;
    out->rank = t->rank;
    memcpy(out->dims, t->dims, sizeof out->dims);
    out->data = f->file.data + f->data + t->begin;
    out->data_bytes = t->end - t->begin;
}

MOE_API int32_t moe_checkpoint_at(const moe_checkpoint *ckpt, int32_t index, moe_checkpoint_tensor *out, moe_error *err)
{
    if (out == NULL) return moe__fail_null(err, "out");
    memset(out, 0, sizeof *out);
    if (ckpt == NULL) return moe__fail_null(err, "ckpt");
    if (index < 0 || index >= ckpt->num_tensors)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "index", "is %d: the checkpoint has %d tensors", index,
                         ckpt->num_tensors);
    moe__ckpt_describe(ckpt, index, out);
    return moe__ok(err);
}

MOE_API int32_t moe_checkpoint_find(const moe_checkpoint *ckpt, const char *name, moe_checkpoint_tensor *out,
                                    moe_error *err)
{
    uint32_t slot;
    if (out == NULL) return moe__fail_null(err, "out");
    memset(out, 0, sizeof *out);
    if (ckpt == NULL) return moe__fail_null(err, "ckpt");
    if (name == NULL) return moe__fail_null(err, "name");
    slot = *moe__ckpt_slot(ckpt, name);
    if (slot == 0) return moe__fail(err, MOE_ERROR_MISSING, "", "the checkpoint has no tensor %q", name);
    moe__ckpt_describe(ckpt, (int32_t)slot - 1, out);
    return moe__ok(err);
}

MOE_API const char *moe_checkpoint_config(const moe_checkpoint *ckpt, size_t *bytes)
{
    int32_t have = ckpt != NULL && ckpt->config.data != NULL;
    if (bytes != NULL) *bytes = have ? (size_t)ckpt->config.size : 0;
    return have ? (const char *)ckpt->config.data : "";
}

static int32_t moe__is_expert_matrix(int32_t role) { return role >= MOE_TENSOR_GATE && role <= MOE_TENSOR_DOWN; }

MOE_API int32_t moe_checkpoint_layers(const moe_checkpoint *ckpt, int32_t *indices, int32_t capacity, int32_t *count,
                                      moe_error *err)
{
    unsigned char seen[MOE__LAYERS_MAX / 8];
    if (count == NULL) return moe__fail_null(err, "count");
    *count = 0;
    if (ckpt == NULL) return moe__fail_null(err, "ckpt");
    if (capacity < 0) return moe__fail(err, MOE_ERROR_ARGUMENT, "capacity", "is %d: it must not be negative", capacity);
    if (indices == NULL && capacity > 0) return moe__fail_null(err, "indices");
    memset(seen, 0, sizeof seen);
    for (int32_t i = 0; i < ckpt->num_tensors; i++) {
        const moe_tensor_name *what = &ckpt->tensors[i].what;
        if (moe__is_expert_matrix(what->role)) seen[what->layer / 8] |= (unsigned char)(1u << (what->layer % 8));
    }
    for (int32_t layer = 0; layer < MOE__LAYERS_MAX; layer++) {
        if ((seen[layer / 8] >> (layer % 8) & 1) == 0) continue;
        if (*count < capacity) indices[*count] = layer;
        ++*count;
    }
    return moe__ok(err);
}

// ---- a layer, settled by its tensors ----

typedef struct moe__ckpt_seen { // what the tensors of a layer tell
    const moe__ckpt_tensor *data;    // an expert's matrix
    int32_t fused, shared_fused, gemm1_bias, gemm2_bias, router_bias, input_scales;
    int32_t stacked, output_major, input_major; // stacks, and how many of them fit each orientation
} moe__ckpt_seen;

// A stack [E, a, b] against the layer's sizes.
static void moe__ckpt_see_stack(const moe__ckpt_tensor *t, const moe_layer_desc *layer, moe__ckpt_seen *seen)
{
    int64_t i = layer->intermediate_size, h = layer->hidden_size;
    int64_t out = t->what.role == MOE_TENSOR_DOWN ? h : t->what.role == MOE_TENSOR_GATE_UP ? 2 * i : i;
    int64_t in = t->what.role == MOE_TENSOR_DOWN ? i : h;
    if (t->what.expert >= 0 || t->rank != 3 || !moe__is_float_dtype(t->dtype)) return;
    seen->stacked++;
    seen->output_major += t->dims[1] == out && t->dims[2] == in;
    seen->input_major += t->dims[1] == in && t->dims[2] == out;
}

static void moe__ckpt_see(const moe_checkpoint *ckpt, const moe_layer_desc *layer, moe__ckpt_seen *seen)
{
    memset(seen, 0, sizeof *seen);
    for (int32_t i = 0; i < ckpt->num_tensors; i++) {
        const moe__ckpt_tensor *t = &ckpt->tensors[i];
        int32_t role = t->what.role, part = t->what.part;
        if (role == MOE_TENSOR_UNSET || t->what.layer != layer->layer_index) continue;
        seen->input_scales += part == MOE_PART_INPUT_SCALE || part == MOE_PART_INPUT_SCALE_RECIPROCAL;
        if (part != MOE_PART_DATA) continue;
        seen->fused |= role == MOE_TENSOR_GATE_UP;
        seen->shared_fused |= role == MOE_TENSOR_SHARED_GATE_UP;
        seen->gemm1_bias |= role >= MOE_TENSOR_GATE_BIAS && role <= MOE_TENSOR_GATE_UP_BIAS;
        seen->gemm2_bias |= role == MOE_TENSOR_DOWN_BIAS;
        seen->router_bias |= role == MOE_TENSOR_ROUTER_BIAS;
        if (!moe__is_expert_matrix(role)) continue;
        if (seen->data == NULL) seen->data = t;
        moe__ckpt_see_stack(t, layer, seen);
    }
}

static void moe__ckpt_settle_format(moe__infer *in, const moe__ckpt_seen *seen)
{
    moe_layer_desc *layer = &in->layer;
    int32_t dtype = seen->data->dtype, format = MOE_FORMAT_UNSET;
    if (dtype == MOE_DTYPE_F32) format = MOE_FORMAT_F32;
    if (dtype == MOE_DTYPE_BF16) format = MOE_FORMAT_BF16;
    if (dtype == MOE_DTYPE_F16) format = MOE_FORMAT_F16;
    if (format == MOE_FORMAT_UNSET && layer->format <= MOE_FORMAT_F16) {
        in->result = moe__fail(in->err, MOE_ERROR_FORMAT, "layer.format", "is %s by config.json, which has no "
                               "quantization "
                               "config for this layer, but tensor %q is of type %s", moe_format_string(layer->format),
                               seen->data->name, moe_dtype_string(dtype));
        return;
    }
    if (format == MOE_FORMAT_UNSET && layer->format == MOE_FORMAT_NVFP4 && seen->input_scales == 0)
        format = MOE_FORMAT_NVFP4_W4A16; // nothing to quantise activations with
    if (format == MOE_FORMAT_UNSET || format == layer->format) return;
    if (layer->format_block != 0) moe__note(in, "format_block", "tensor dtype", "0");
    layer->format = format;
    layer->format_block = 0;
    layer->scale_dtype = 0;
    moe__note(in, "format", format == MOE_FORMAT_NVFP4_W4A16 ? "no input scales" : "tensor dtype", "%s",
              moe_format_string(format));
}

static void moe__ckpt_settle_source(moe__infer *in, const moe__ckpt_seen *seen)
{
    moe_source_desc *source = &in->layer.source;
    int32_t halves = !seen->fused ? MOE_HALVES_SEPARATE
                     : source->halves == MOE_HALVES_SEPARATE ? MOE_HALVES_GATE_UP : source->halves;
    int32_t layout = source->layout;
    int32_t both = seen->output_major == seen->stacked && seen->input_major == seen->stacked;
    if (halves != source->halves)
        moe__note(in, "source.halves", "tensor names", "%s",
                  moe__name_find(moe__halves_names, MOE__ARRAY_COUNT(moe__halves_names), halves, "?"));
    source->halves = halves;
    if (!seen->shared_fused) source->shared_halves = MOE_HALVES_SEPARATE;
    else if (source->shared_halves == MOE_HALVES_SEPARATE) source->shared_halves = MOE_HALVES_GATE_UP;
    if (seen->stacked == 0 || (both && layout != MOE_LAYOUT_UNSET)) return;
    if (both) {
        in->result = moe__fail(in->err, MOE_ERROR_UNSUPPORTED, "layer.source.layout", "cannot be told: %q fits [out, "
                               "in] and [in, out]; use moe_layer_from_config() and set it", seen->data->name);
        return;
    }
    if (seen->output_major == seen->stacked) layout = MOE_LAYOUT_MAJOR_K;
    else if (seen->input_major == seen->stacked) layout = MOE_LAYOUT_MAJOR_MN;
    if (layout != source->layout)
        moe__note(in, "source.layout", "tensor shape", "%s", layout == MOE_LAYOUT_MAJOR_K ? "[out, in]" : "[in, out]");
    source->layout = layout;
}

static void moe__ckpt_settle(moe__infer *in, const moe_checkpoint *ckpt)
{
    moe_layer_desc *layer = &in->layer;
    moe__ckpt_seen seen;
    in->settling = 1;
    moe__ckpt_see(ckpt, layer, &seen);
    if (seen.data == NULL) {
        in->result = moe__fail(in->err, MOE_ERROR_MISSING, "layer_index", "is %d: the config gives that layer "
                               "experts, but the files have none of their tensors", layer->layer_index);
        return;
    }
    moe__ckpt_settle_format(in, &seen);
    if (in->result == MOE_OK) moe__ckpt_settle_source(in, &seen);
    if (seen.gemm1_bias && !layer->gemm1_bias) moe__note(in, "gemm1_bias", "tensor names", "1");
    if (seen.gemm2_bias && !layer->gemm2_bias) moe__note(in, "gemm2_bias", "tensor names", "1");
    if (seen.router_bias && !layer->router.bias) moe__note(in, "router.bias", "tensor names", "1");
    layer->gemm1_bias |= seen.gemm1_bias;
    layer->gemm2_bias |= seen.gemm2_bias;
    layer->router.bias |= seen.router_bias;
    if (in->result == MOE_OK) in->result = moe__layer_resolve(layer, in->err);
}

static int32_t moe__ckpt_infer(moe__infer *in, const moe_checkpoint *ckpt, int32_t layer_index)
{
    int32_t result;
    if (ckpt == NULL) return moe__fail_null(in->err, "ckpt");
    if (ckpt->config.data == NULL)
        return moe__fail(in->err, MOE_ERROR_MISSING, "ckpt", "has no config.json: open the folder that has it, or "
                         "fill the layer by hand");
    result = moe__infer_layer(in, (const char *)ckpt->config.data, (size_t)ckpt->config.size,
                              (const char *)ckpt->quant.data, (size_t)ckpt->quant.size, layer_index);
    if (result != MOE_OK) return result;
    moe__ckpt_settle(in, ckpt);
    return in->result;
}

MOE_API int32_t moe_checkpoint_layer(const moe_checkpoint *ckpt, int32_t layer_index, moe_layer_desc *out,
                                     moe_error *err)
{
    moe__infer in;
    int32_t result;
    if (out == NULL) return moe__fail_null(err, "out");
    memset(out, 0, sizeof *out);
    moe__infer_make(&in, NULL, 0, err);
    if ((result = moe__ckpt_infer(&in, ckpt, layer_index)) != MOE_OK) return result;
    *out = in.layer;
    return moe__ok(err);
}

MOE_API int32_t moe_checkpoint_facts(const moe_checkpoint *ckpt, int32_t layer_index, moe_fact *facts, int32_t capacity,
                                     int32_t *count, moe_error *err)
{
    moe__infer in;
    moe_fact all[64]; // here, so that what the files say can replace what the config said
    int32_t result = moe__facts_check(facts, capacity, count, err);
    if (result != MOE_OK) return result;
    moe__infer_make(&in, all, MOE__ARRAY_COUNT(all), err);
    if ((result = moe__ckpt_infer(&in, ckpt, layer_index)) != MOE_OK) return result;
    *count = moe__min32(in.count, MOE__ARRAY_COUNT(all));
    if (*count > 0 && capacity > 0) memcpy(facts, all, (size_t)moe__min32(*count, capacity) * sizeof *facts);
    return moe__ok(err);
}
#endif // MOE_NO_CHECKPOINT

// >>context  one device, its threads and hooks  The CPU's pool runs one call at a time; a task index is handed out by a
// counter under the pool's lock, which is cheap because tasks are coarse. No other section starts threads.

enum { MOE__ISA_SCALAR = 0, MOE__ISA_AVX2 = 1, MOE__ISA_AVX512 = 2, MOE__ISA_NEON = 3 };

static const char *const moe__isa_names[] = { "scalar", "avx2", "avx512", "neon" };

#if !defined(MOE_NO_THREADS)
#if defined(MOE__WINDOWS)
// The few functions needed, declared by hand: windows.h would bring its macros into the caller's file.
typedef struct moe__lock { void *opaque; } moe__lock;       // SRWLOCK
typedef struct moe__condition { void *opaque; } moe__condition; // CONDITION_VARIABLE
typedef void *moe__thread;
#ifdef __cplusplus
extern "C" {
#endif
__declspec(dllimport) void __stdcall AcquireSRWLockExclusive(void *lock);
__declspec(dllimport) void __stdcall ReleaseSRWLockExclusive(void *lock);
__declspec(dllimport) int __stdcall SleepConditionVariableSRW(void *condition, void *lock, unsigned long ms,
                                                              unsigned long flags);
__declspec(dllimport) void __stdcall WakeAllConditionVariable(void *condition);
__declspec(dllimport) void *__stdcall CreateThread(void *security, size_t stack,
                                                   unsigned long(__stdcall *start)(void *), void *arg,
                                                   unsigned long flags, unsigned long *id);
__declspec(dllimport) unsigned long __stdcall WaitForSingleObject(void *handle, unsigned long ms);
__declspec(dllimport) int __stdcall CloseHandle(void *handle);
__declspec(dllimport) unsigned long __stdcall GetActiveProcessorCount(unsigned short group);
#ifdef __cplusplus
}
#endif
static int32_t moe__lock_init(moe__lock *lock) { lock->opaque = NULL; return 1; }
static void moe__lock_destroy(moe__lock *lock) { (void)lock; }
static void moe__lock_enter(moe__lock *lock) { AcquireSRWLockExclusive(lock); }
static void moe__lock_leave(moe__lock *lock) { ReleaseSRWLockExclusive(lock); }
static int32_t moe__condition_init(moe__condition *condition) { condition->opaque = NULL; return 1; }
static void moe__condition_destroy(moe__condition *condition) { (void)condition; }
static void moe__condition_wait(moe__condition *condition, moe__lock *lock)
{
    SleepConditionVariableSRW(condition, lock, 0xffffffffu, 0);
}
static void moe__condition_wake_all(moe__condition *condition) { WakeAllConditionVariable(condition); }
static int32_t moe__cores(void) { return (int32_t)GetActiveProcessorCount(0xffff); }
#else
typedef pthread_mutex_t moe__lock;
typedef pthread_cond_t moe__condition;
typedef pthread_t moe__thread;
static int32_t moe__lock_init(moe__lock *lock) { return pthread_mutex_init(lock, NULL) == 0; }
static void moe__lock_destroy(moe__lock *lock) { pthread_mutex_destroy(lock); }
static void moe__lock_enter(moe__lock *lock) { pthread_mutex_lock(lock); }
static void moe__lock_leave(moe__lock *lock) { pthread_mutex_unlock(lock); }
static int32_t moe__condition_init(moe__condition *condition) { return pthread_cond_init(condition, NULL) == 0; }
static void moe__condition_destroy(moe__condition *condition) { pthread_cond_destroy(condition); }
static void moe__condition_wait(moe__condition *condition, moe__lock *lock) { pthread_cond_wait(condition, lock); }
static void moe__condition_wake_all(moe__condition *condition) { pthread_cond_broadcast(condition); }
static int32_t moe__cores(void)
{
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    return cores < 1 ? 1 : (int32_t)cores;
}
#endif
#else
typedef struct moe__lock { char unused; } moe__lock; // one thread: the caller sees to it that calls do not overlap
static int32_t moe__lock_init(moe__lock *lock) { lock->unused = 0; return 1; }
static void moe__lock_destroy(moe__lock *lock) { (void)lock; }
MOE__UNUSED static void moe__lock_enter(moe__lock *lock) { (void)lock; }
MOE__UNUSED static void moe__lock_leave(moe__lock *lock) { (void)lock; }
static int32_t moe__cores(void) { return 1; }
#endif

enum { MOE__THREADS_MAX = 256 };

typedef struct moe__pool {
    moe__lock turn;              // held for the length of one parallel call
#if !defined(MOE_NO_THREADS)
    moe__lock lock;              // guards the rest
    moe__condition work, done;
    moe__thread threads[MOE__THREADS_MAX];
    int32_t started;             // threads in the array
    int32_t stop;
    uint64_t call;               // counts parallel calls: a worker joins each at most once
    int32_t running;             // workers that have not finished this call
    int32_t tasks, next;
    void (*task)(void *arg, int32_t index);
    void *arg;
#endif
} moe__pool;

#if !defined(MOE_NO_CUDA)
static int32_t moe__cuda_open(moe_context *ctx, moe_error *err);
static void moe__cuda_close(moe_context *ctx);
static void moe__cuda_info(const moe_context *ctx, moe_context_info *info);
static void moe__cuda_report(const moe_context *ctx);
static int32_t moe__jit_open(moe_context *ctx, const moe_jit_desc *desc, moe_error *err);
static void moe__jit_close(moe_context *ctx);
#endif

struct moe_context {
    moe_context_desc desc;  // resolved: allocator set, backend and threads concrete
    int32_t isa;
    moe__pool pool;
#if !defined(MOE_NO_CUDA)
    struct moe__cuda *cuda; // NULL: the CPU
    struct moe__jit *jit;   // of a CUDA context, and while compiling ahead
#endif
};

#if !defined(MOE_NO_THREADS)
// Takes tasks until none is left. Called with the lock held, returns with it held.
static void moe__pool_drain(moe__pool *pool)
{
    while (pool->next < pool->tasks) {
        void (*task)(void *, int32_t) = pool->task;
        void *arg = pool->arg;
        int32_t index = pool->next++;
        moe__lock_leave(&pool->lock);
        task(arg, index);
        moe__lock_enter(&pool->lock);
    }
}

static void moe__pool_work(moe__pool *pool)
{
    uint64_t seen = 0;
    moe__lock_enter(&pool->lock);
    for (;;) {
        while (!pool->stop && pool->call == seen) moe__condition_wait(&pool->work, &pool->lock);
        if (pool->stop) break;
        seen = pool->call;
        moe__pool_drain(pool);
        if (--pool->running == 0) moe__condition_wake_all(&pool->done);
    }
    moe__lock_leave(&pool->lock);
}

#if defined(MOE__WINDOWS)
static unsigned long __stdcall moe__pool_thread(void *pool)
{
    moe__pool_work((moe__pool *)pool);
    return 0;
}
static int32_t moe__pool_start(moe__pool *pool, moe__thread *thread)
{
    *thread = CreateThread(NULL, 0, moe__pool_thread, pool, 0, NULL);
    return *thread != NULL;
}
static void moe__thread_join(moe__thread thread)
{
    WaitForSingleObject(thread, 0xffffffffu);
    CloseHandle(thread);
}
#else
static void *moe__pool_thread(void *pool)
{
    moe__pool_work((moe__pool *)pool);
    return NULL;
}
static int32_t moe__pool_start(moe__pool *pool, moe__thread *thread)
{
    return pthread_create(thread, NULL, moe__pool_thread, pool) == 0;
}
static void moe__thread_join(moe__thread thread) { pthread_join(thread, NULL); }
#endif
#endif

// A line for the caller's log hook. Formats as moe__text_vformat() says.
static void moe__log(const moe_context *ctx, int32_t level, const char *format, ...)
{
    char line[768];
    moe__text text = moe__text_make(line, sizeof line);
    va_list args;
    if (ctx->desc.log == NULL) return;
    moe__text_string(&text, "moe: ");
    va_start(args, format);
    moe__text_vformat(&text, format, args);
    va_end(args);
    ctx->desc.log(ctx->desc.log_user, level, line);
}

// task(arg, i) for i in 0..tasks-1 on the context's threads; returns when all are done. Allocates nothing.
static void moe__parallel(moe_context *ctx, int32_t tasks, void (*task)(void *arg, int32_t index), void *arg)
{
    moe__pool *pool = &ctx->pool;
    if (ctx->desc.parallel_for != NULL) {
        ctx->desc.parallel_for(ctx->desc.parallel_user, tasks, task, arg);
        return;
    }
#if !defined(MOE_NO_THREADS)
    if (pool->started > 0 && tasks > 1) {
        moe__lock_enter(&pool->turn);
        moe__lock_enter(&pool->lock);
        pool->task = task;
        pool->arg = arg;
        pool->tasks = tasks;
        pool->next = 0;
        pool->running = pool->started;
        pool->call++;
        moe__condition_wake_all(&pool->work);
        moe__pool_drain(pool);
        while (pool->running > 0) moe__condition_wait(&pool->done, &pool->lock);
        moe__lock_leave(&pool->lock);
        moe__lock_leave(&pool->turn);
        return;
    }
#endif
    (void)pool;
    for (int32_t i = 0; i < tasks; i++) task(arg, i);
}

#if defined(MOE__X86)
static int32_t moe__isa_has_avx(int32_t avx512)
{
    unsigned a, b, c, d, b7, c7, d7, xcr0, high;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    if ((c & (1u << 27)) == 0 || (c & (1u << 12)) == 0 || (c & (1u << 29)) == 0) return 0; // OSXSAVE, FMA, F16C
    __asm__("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
    if ((xcr0 & 6u) != 6u || !__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return 0;
    if ((b7 & (1u << 5)) == 0) return 0; // AVX2
    if (!avx512) return 1;
    return (xcr0 & 0xe6u) == 0xe6u && (b7 & (1u << 16)) != 0 && (b7 & (1u << 30)) != 0 &&
           (b7 & (1u << 31)) != 0; // F BW VL
}
#endif

static int32_t moe__isa_available(int32_t isa)
{
    switch (isa) {
    case MOE__ISA_SCALAR: return 1;
#if defined(MOE__X86)
    case MOE__ISA_AVX2: return moe__isa_has_avx(0);
    case MOE__ISA_AVX512: return moe__isa_has_avx(1);
#endif
#if defined(MOE__NEON)
    case MOE__ISA_NEON: return 1;
#endif
    default: return 0;
    }
}

static int32_t moe__isa_choose(const char *wanted, int32_t *isa, moe_error *err)
{
    static const int32_t best_first[] = { MOE__ISA_AVX512, MOE__ISA_AVX2, MOE__ISA_NEON, MOE__ISA_SCALAR };
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(best_first); i++) {
        *isa = best_first[i];
        if (wanted == NULL ? moe__isa_available(*isa) : strcmp(wanted, moe__isa_names[*isa]) == 0) break;
        if (i + 1 == MOE__ARRAY_COUNT(best_first))
            return moe__fail(err, MOE_ERROR_ARGUMENT, "desc.isa", "is %q: it must be \"scalar\", \"avx2\", \"avx512\", "
                             "\"neon\" or NULL", wanted);
    }
    if (!moe__isa_available(*isa))
        return moe__fail(err, MOE_ERROR_UNSUPPORTED, "desc.isa", "is %q, which this processor or build does not have; "
                         "NULL takes the best it has", wanted);
    return MOE_OK;
}

static void moe__pool_destroy(moe__pool *pool)
{
#if !defined(MOE_NO_THREADS)
    moe__lock_enter(&pool->lock);
    pool->stop = 1;
    moe__condition_wake_all(&pool->work);
    moe__lock_leave(&pool->lock);
    for (int32_t i = 0; i < pool->started; i++) moe__thread_join(pool->threads[i]);
    moe__condition_destroy(&pool->done);
    moe__condition_destroy(&pool->work);
    moe__lock_destroy(&pool->lock);
#endif
    moe__lock_destroy(&pool->turn);
}

// 0 when the machine gives no lock; fewer threads than wanted are not an error.
static int32_t moe__pool_create(moe__pool *pool, int32_t threads)
{
    if (!moe__lock_init(&pool->turn)) return 0;
#if !defined(MOE_NO_THREADS)
    if (!moe__lock_init(&pool->lock)) {
        moe__lock_destroy(&pool->turn);
        return 0;
    }
    if (!moe__condition_init(&pool->work) || !moe__condition_init(&pool->done)) {
        moe__lock_destroy(&pool->lock);
        moe__lock_destroy(&pool->turn);
        return 0;
    }
    while (pool->started < threads - 1 && moe__pool_start(pool, &pool->threads[pool->started])) pool->started++;
#endif
    (void)threads;
    return 1;
}

// Members that only one of the back ends reads.
static int32_t moe__context_check_backend(const moe_context_desc *desc, moe_error *err)
{
    if (desc->backend == MOE_BACKEND_CUDA) {
#if defined(MOE_NO_CUDA)
        return moe__fail(err, MOE_ERROR_UNSUPPORTED, "desc.backend", "is MOE_BACKEND_CUDA, which this build leaves out "
                         "(MOE_NO_CUDA); use MOE_BACKEND_AUTO or MOE_BACKEND_CPU");
#else
        if ((desc->device_allocator.alloc == NULL) != (desc->device_allocator.free == NULL))
            return moe__fail(err, MOE_ERROR_ARGUMENT, "desc.device_allocator",
                             "has only one of alloc and free: set both or none");
        if (desc->cuda_context != NULL && desc->device != 0)
            return moe__fail(err, MOE_ERROR_ARGUMENT, "desc.device", "is %d: with desc.cuda_context it must be 0, the "
                             "device is that context's", desc->device);
        return MOE_OK;
#endif
    }
    if (desc->backend != MOE_BACKEND_AUTO && desc->backend != MOE_BACKEND_CPU)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "desc.backend", "is %d: it must be a moe_backend", desc->backend);
    if (desc->device != 0)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "desc.device", "is %d: the CPU back end has device 0 only",
                         desc->device);
    if (desc->cuda_context != NULL)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "desc.cuda_context", "is set, but the back end is the CPU");
    return MOE_OK;
}

static int32_t moe__context_check(moe_context_desc *desc, int32_t *isa, moe_error *err)
{
    int32_t most = desc->backend == MOE_BACKEND_CUDA ? 8 : MOE__THREADS_MAX;
    int32_t result = moe__allocator_resolve(&desc->allocator, "desc.allocator", err);
    if (result != MOE_OK || (result = moe__context_check_backend(desc, err)) != MOE_OK) return result;
    if (desc->threads < 0 || desc->threads > MOE__THREADS_MAX)
        return moe__fail_range(err, "desc.threads", desc->threads, 0, MOE__THREADS_MAX);
    if (desc->backend == MOE_BACKEND_AUTO) desc->backend = MOE_BACKEND_CPU;
    if (desc->threads == 0) desc->threads = moe__min32(moe__cores(), most);
#if defined(MOE_NO_THREADS)
    if (desc->parallel_for == NULL) desc->threads = 1;
#endif
    return moe__isa_choose(desc->isa, isa, err);
}

// Processor name into 64 bytes; "CPU" where the machine does not say.
static void moe__cpu_name(char *name)
{
    strcpy(name, "CPU");
#if defined(MOE__X86)
    {
        unsigned words[12];
        size_t start = 0;
        for (unsigned i = 0; i < 3; i++)
            if (!__get_cpuid(0x80000002u + i, &words[4 * i], &words[4 * i + 1], &words[4 * i + 2], &words[4 * i + 3]))
                return;
        memcpy(name, words, sizeof words);
        name[sizeof words] = 0;
        while (name[start] == ' ') start++;
        memmove(name, name + start, sizeof words + 1 - start);
    }
#endif
}

// What was made, and where the machine gave less than was asked for.
static void moe__context_report(const moe_context *ctx)
{
    char name[64];
#if !defined(MOE_NO_CUDA)
    if (ctx->cuda != NULL) {
        moe__cuda_report(ctx);
        return;
    }
#endif
    moe__cpu_name(name);
    moe__log(ctx, MOE_LOG_INFO, "CPU back end on %s: %s kernels, %d threads%s", name, moe__isa_names[ctx->isa],
             ctx->desc.threads, ctx->desc.parallel_for != NULL ? " of the caller's" : "");
#if !defined(MOE_NO_THREADS)
    if (ctx->desc.parallel_for == NULL && ctx->pool.started < ctx->desc.threads - 1)
        moe__log(ctx, MOE_LOG_WARNING, "the system started %d of %d threads", ctx->pool.started + 1, ctx->desc.threads);
#endif
}

MOE_API int32_t moe_context_create(const moe_context_desc *desc, moe_context **out, moe_error *err)
{
    moe_context_desc checked;
    moe_context *ctx;
    int32_t isa = MOE__ISA_SCALAR, result;
    if (out == NULL) return moe__fail_null(err, "out");
    *out = NULL;
    if ((result = moe__copy_desc(&checked, sizeof checked, desc, "desc", err)) != MOE_OK) return result;
    if ((result = moe__context_check(&checked, &isa, err)) != MOE_OK) return result;
    ctx = (moe_context *)moe__alloc(&checked.allocator, sizeof *ctx);
    if (ctx == NULL) return moe__fail_memory(err, sizeof *ctx);
    memset(ctx, 0, sizeof *ctx);
    ctx->desc = checked;
    ctx->desc.isa = NULL; // the caller's string is not kept
    ctx->isa = isa;
    if (!moe__pool_create(&ctx->pool, checked.parallel_for != NULL ? 1 : checked.threads)) {
        moe__free(&checked.allocator, ctx, sizeof *ctx);
        return moe__fail(err, MOE_ERROR_MEMORY, "", "the system gave no lock or condition variable");
    }
#if !defined(MOE_NO_CUDA)
    if (checked.backend == MOE_BACKEND_CUDA && ((result = moe__cuda_open(ctx, err)) != MOE_OK ||
                                                (result = moe__jit_open(ctx, &checked.jit, err)) != MOE_OK)) {
        moe_context_destroy(ctx);
        return result;
    }
    memset(&ctx->desc.jit, 0, sizeof ctx->desc.jit); // the caller's strings are not kept
#endif
    moe__context_report(ctx);
    *out = ctx;
    return moe__ok(err);
}

MOE_API void moe_context_destroy(moe_context *ctx)
{
    moe_allocator allocator;
    if (ctx == NULL) return;
    allocator = ctx->desc.allocator;
#if !defined(MOE_NO_CUDA)
    moe__jit_close(ctx);
    moe__cuda_close(ctx);
#endif
    moe__pool_destroy(&ctx->pool);
    moe__free(&allocator, ctx, sizeof *ctx);
}

MOE_API int32_t moe_context_get_info(const moe_context *ctx, moe_context_info *info, moe_error *err)
{
    moe_context_info copy;
    int32_t result;
    if (ctx == NULL) return moe__fail_null(err, "ctx");
    if (info == NULL) return moe__fail_null(err, "info");
    if ((result = moe__copy_desc(&copy, sizeof copy, info, "info", err)) != MOE_OK) return result;
    memset(info, 0, sizeof *info);
    info->struct_size = sizeof *info;
    info->backend = ctx->desc.backend;
    info->device = ctx->desc.device;
    info->threads = ctx->desc.threads;
    moe__cpu_name(info->name);
    strcpy(info->isa, moe__isa_names[ctx->isa]);
#if !defined(MOE_NO_CUDA)
    if (ctx->cuda != NULL) moe__cuda_info(ctx, info);
#endif
    return moe__ok(err);
}

// >>cuda  the driver and NVRTC, opened at run time  Nothing of CUDA is needed to compile or to link: the few types are
// spelled out here, functions are found by name, and a table of them belongs to each context. Both libraries stay
// loaded until the process ends, since others in it may use them too.
#if !defined(MOE_NO_CUDA)

#if defined(_WIN32)
#  define MOE__CUDA_CALL __stdcall
#else
#  define MOE__CUDA_CALL
#endif

typedef int moe__cu_result; // CUresult
typedef int moe__cu_device;
typedef unsigned long long moe__cu_ptr;
typedef struct CUctx_st *moe__cu_context; // cuda.h's own tags: handles pass to and fro without a cast
typedef struct CUmod_st *moe__cu_module;
typedef struct CUfunc_st *moe__cu_function;
typedef struct CUstream_st *moe__cu_stream;

typedef struct moe__cu_launch_attribute { // CUlaunchAttribute
    int id;
    int pad;
    union {
        struct { unsigned x, y, z; } cluster;
        int programmatic;
        char size[64];
    } value;
} moe__cu_launch_attribute;

typedef struct moe__cu_launch_config { // CUlaunchConfig
    unsigned gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ, sharedMemBytes;
    moe__cu_stream hStream;
    moe__cu_launch_attribute *attrs;
    unsigned numAttrs;
} moe__cu_launch_config;

enum { // numbers of cuda.h
    MOE__CU_ATTRIBUTE_CLUSTER = 4,     // of a launch
    MOE__CU_ATTRIBUTE_PDL = 6,
    MOE__CU_DEVICE_SMS = 16,           // of a device
    MOE__CU_DEVICE_MAJOR = 75,
    MOE__CU_DEVICE_MINOR = 76,
    MOE__CU_DEVICE_SMEM_OPTIN = 97,
    MOE__CU_FUNCTION_MAX_THREADS = 0,  // of a function
    MOE__CU_FUNCTION_DYNAMIC_SMEM = 8,
    MOE__CU_STREAM_NON_BLOCKING = 1,
    MOE__CU_CAPTURE_RELAXED = 2,
    MOE__CU_NO_MEMORY = 2,             // results
    MOE__CU_STUB = 34,
    MOE__CU_NO_DEVICE = 100,
    MOE__DRIVER_MIN = 12000,
    MOE__ARCH_MIN = 80
};

// name, suffix of the exported symbol, the CUDA version that brought this signature, whether the driver must have it
#define MOE__CU_FUNCTIONS(X) \
    X(cuInit, "", 12000, 1, (unsigned flags)) \
    X(cuDriverGetVersion, "", 12000, 1, (int *version)) \
    X(cuGetErrorName, "", 12000, 1, (moe__cu_result result, const char **name)) \
    X(cuDeviceGetCount, "", 12000, 1, (int *count)) \
    X(cuDeviceGet, "", 12000, 1, (moe__cu_device *device, int ordinal)) \
    X(cuDeviceGetName, "", 12000, 1, (char *name, int size, moe__cu_device device)) \
    X(cuDeviceGetAttribute, "", 12000, 1, (int *value, int attribute, moe__cu_device device)) \
    X(cuDevicePrimaryCtxRetain, "", 12000, 1, (moe__cu_context *context, moe__cu_device device)) \
    X(cuDevicePrimaryCtxRelease, "_v2", 12000, 1, (moe__cu_device device)) \
    X(cuCtxPushCurrent, "_v2", 12000, 1, (moe__cu_context context)) \
    X(cuCtxPopCurrent, "_v2", 12000, 1, (moe__cu_context *context)) \
    X(cuCtxGetCurrent, "", 12000, 1, (moe__cu_context *context)) \
    X(cuCtxGetDevice, "", 12000, 1, (moe__cu_device *device)) \
    X(cuCtxSynchronize, "", 12000, 1, (void)) \
    X(cuModuleLoadData, "", 12000, 1, (moe__cu_module *module, const void *image)) \
    X(cuModuleUnload, "", 12000, 1, (moe__cu_module module)) \
    X(cuModuleGetFunction, "", 12000, 1, (moe__cu_function *function, moe__cu_module module, const char *name)) \
    X(cuFuncGetAttribute, "", 12000, 1, (int *value, int attribute, moe__cu_function function)) \
    X(cuFuncSetAttribute, "", 12000, 1, (moe__cu_function function, int attribute, int value)) \
    X(cuFuncGetParamInfo, "", 12040, 0, (moe__cu_function function, size_t index, size_t *offset, size_t *size)) \
    X(cuFuncLoad, "", 12040, 0, (moe__cu_function function)) \
    X(cuMemAlloc, "_v2", 12000, 1, (moe__cu_ptr *ptr, size_t bytes)) \
    X(cuMemFree, "_v2", 12000, 1, (moe__cu_ptr ptr)) \
    X(cuMemcpyHtoD, "_v2", 12000, 1, (moe__cu_ptr to, const void *from, size_t bytes)) \
    X(cuMemcpyDtoH, "_v2", 12000, 1, (void *to, moe__cu_ptr from, size_t bytes)) \
    X(cuMemcpyHtoDAsync, "_v2", 12000, 1, \
      (moe__cu_ptr to, const void *from, size_t bytes, moe__cu_stream stream)) \
    X(cuMemsetD8, "_v2", 12000, 1, (moe__cu_ptr to, unsigned char value, size_t bytes)) \
    X(cuStreamCreate, "", 12000, 1, (moe__cu_stream *stream, unsigned flags)) \
    X(cuStreamDestroy, "_v2", 12000, 1, (moe__cu_stream stream)) \
    X(cuStreamSynchronize, "", 12000, 1, (moe__cu_stream stream)) \
    X(cuThreadExchangeStreamCaptureMode, "", 12000, 1, (int *mode)) \
    X(cuLaunchKernelEx, "", 12000, 1, \
      (const moe__cu_launch_config *config, moe__cu_function function, void **params, void **extra))

// A context's device. Everything but the functions is a fact that does not change.
typedef struct moe__cuda {
#define MOE__MEMBER(name, suffix, since, needed, parameters) moe__cu_result(MOE__CUDA_CALL *name) parameters;
    MOE__CU_FUNCTIONS(MOE__MEMBER)
#undef MOE__MEMBER
    moe__cu_device device;
    moe__cu_context context;
    int32_t primary;        // the context is the device's own, retained
    moe__cu_stream stream;  // copies of creation and sealing
    int32_t driver_version; // 12040 for 12.4
    int32_t arch;           // compute capability: 90 for 9.0
    int32_t sms;
    int32_t smem_optin;     // bytes that one CTA can have
    char chip[16];          // what its kernels are compiled for: "sm_90a"
    char name[64];
} moe__cuda;

typedef struct moe__nvrtc_program_t *moe__nvrtc_program;

#define MOE__NVRTC_FUNCTIONS(X) \
    X(nvrtcVersion, int, (int *major, int *minor)) \
    X(nvrtcGetErrorString, const char *, (int result)) \
    X(nvrtcGetNumSupportedArchs, int, (int *count)) \
    X(nvrtcGetSupportedArchs, int, (int *archs)) \
    X(nvrtcCreateProgram, int, \
      (moe__nvrtc_program *program, const char *source, const char *name, int headers, const char *const *texts, \
       const char *const *names)) \
    X(nvrtcCompileProgram, int, (moe__nvrtc_program program, int count, const char *const *options)) \
    X(nvrtcGetCUBINSize, int, (moe__nvrtc_program program, size_t *size)) \
    X(nvrtcGetCUBIN, int, (moe__nvrtc_program program, char *cubin)) \
    X(nvrtcGetPTXSize, int, (moe__nvrtc_program program, size_t *size)) \
    X(nvrtcGetPTX, int, (moe__nvrtc_program program, char *ptx)) \
    X(nvrtcGetProgramLogSize, int, (moe__nvrtc_program program, size_t *size)) \
    X(nvrtcGetProgramLog, int, (moe__nvrtc_program program, char *log)) \
    X(nvrtcDestroyProgram, int, (moe__nvrtc_program *program))

typedef struct moe__nvrtc {
#define MOE__MEMBER(name, type, parameters) type(MOE__CUDA_CALL *name) parameters;
    MOE__NVRTC_FUNCTIONS(MOE__MEMBER)
#undef MOE__MEMBER
    int32_t version; // 12040 for 12.4; 0: not opened
    int32_t num_archs;
    int32_t archs[64];
} moe__nvrtc;

// ---- environment ----

// Variables of the environment, but not where the process runs with more rights than its user.
static const char *moe__env(const char *name)
{
#if defined(MOE_NO_ENV)
    (void)name;
    return NULL;
#else
    const char *value;
#  if !defined(_WIN32)
    if (getuid() != geteuid() || getgid() != getegid()) return NULL;
#  endif
#  if defined(__linux__)
    if (getauxval(23) != 0) return NULL; // AT_SECURE
#  endif
    value = getenv(name);
    return value == NULL || value[0] == 0 ? NULL : value;
#endif
}

static int32_t moe__path_is_absolute(const char *path)
{
#if defined(_WIN32)
    int32_t drive = ((path[0] | 32) >= 'a' && (path[0] | 32) <= 'z') && path[1] == ':';
    return (drive && (path[2] == '\\' || path[2] == '/')) || (path[0] == '\\' && path[1] == '\\');
#else
    return path[0] == '/';
#endif
}

// A folder named by an absolute path in the environment, or NULL.
static const char *moe__env_folder(const char *name)
{
    const char *folder = moe__env(name);
    return folder != NULL && moe__path_is_absolute(folder) && strlen(folder) < MOE__PATH_MAX / 2 ? folder : NULL;
}

// ---- libraries ----

// What was tried, for messages: files that are not there by name alone, others with the reason.
typedef struct moe__attempts {
    const moe_context *ctx;
    const char *what; // "the CUDA driver"
    char missing_text[640], unusable_text[640];
    moe__text missing, unusable;
} moe__attempts;

static void moe__attempts_init(moe__attempts *attempts, const moe_context *ctx, const char *what)
{
    attempts->ctx = ctx;
    attempts->what = what;
    attempts->missing = moe__text_make(attempts->missing_text, sizeof attempts->missing_text);
    attempts->unusable = moe__text_make(attempts->unusable_text, sizeof attempts->unusable_text);
}

static void moe__attempt_missing(moe__attempts *attempts, const char *path)
{
    moe__text_format(&attempts->missing, "%s%s", attempts->missing.length > 0 ? ", " : "", path);
    moe__log(attempts->ctx, MOE_LOG_INFO, "%s: %s is not there", attempts->what, path);
}

static void moe__attempt_unusable(moe__attempts *attempts, const char *path, const char *format, ...)
{
    char reason[256];
    moe__text text = moe__text_make(reason, sizeof reason);
    va_list args;
    va_start(args, format);
    moe__text_vformat(&text, format, args);
    va_end(args);
    moe__text_format(&attempts->unusable, "%s%s %s", attempts->unusable.length > 0 ? "; " : "", path, reason);
    moe__log(attempts->ctx, MOE_LOG_INFO, "%s: %s %s", attempts->what, path, reason);
}

// "tried: X is ...; not there: Y, Z"
static const char *moe__attempts_list(const moe__attempts *attempts, char *list, size_t capacity)
{
    moe__text text = moe__text_make(list, capacity);
    if (attempts->unusable.length > 0) moe__text_format(&text, "tried: %s", attempts->unusable_text);
    if (attempts->missing.length > 0)
        moe__text_format(&text, "%snot there: %s", attempts->unusable.length > 0 ? "; " : "", attempts->missing_text);
    return list;
}

#if defined(_WIN32)
#  ifdef __cplusplus
extern "C" {
#  endif
__declspec(dllimport) void *__stdcall LoadLibraryExW(const wchar_t *name, void *file, unsigned long flags);
typedef intptr_t(__stdcall *moe__windows_function)(void);
__declspec(dllimport) moe__windows_function __stdcall GetProcAddress(void *library, const char *name);
#  ifdef __cplusplus
}
#  endif

static void *moe__library_open(const char *path, moe__attempts *attempts)
{
    wchar_t wide[MOE__PATH_MAX];
    // An absolute path: its own folder is searched for what it needs; a name: the system's folder, then the path's.
    void *library = LoadLibraryExW(moe__wide(wide, path), NULL, moe__path_is_absolute(path) ? 8 : 0);
    int32_t number = library == NULL ? moe__last_error() : 0;
    if (library != NULL) return library;
    if (number == 126 || moe__error_is_missing(number)) moe__attempt_missing(attempts, path); // 126: no such module
    else moe__attempt_unusable(attempts, path, "cannot be loaded (system error %d)", number);
    return NULL;
}

static int32_t moe__library_symbol(void *library, const char *name, void *function)
{
    moe__windows_function found = GetProcAddress(library, name);
    memcpy(function, &found, sizeof found);
    return found != NULL;
}
#else
static void *moe__library_open(const char *path, moe__attempts *attempts)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    const char *why = library == NULL ? dlerror() : NULL;
    size_t length = strlen(path);
    if (library != NULL) return library;
    if (why == NULL) why = "cannot be loaded";
    if (strstr(why, "o such file") != NULL && strstr(why, path) != NULL) {
        moe__attempt_missing(attempts, path);
        return NULL;
    }
    if (strncmp(why, path, length) == 0 && why[length] == ':') why += length + 1; // the path is there already
    while (*why == ' ') why++;
    moe__attempt_unusable(attempts, path, "cannot be loaded (%s)", why);
    return NULL;
}

static int32_t moe__library_symbol(void *library, const char *name, void *function)
{
    void *found = dlsym(library, name);
    memcpy(function, &found, sizeof found);
    return found != NULL;
}
#endif

// ---- driver ----

static int32_t moe__cuda_result(moe__cu_result result) { return result == 0 ? MOE_OK : MOE_ERROR_LAUNCH; }

static const char *moe__cuda_error_name(const moe__cuda *cuda, moe__cu_result result)
{
    const char *name = NULL;
    return cuda->cuGetErrorName(result, &name) == 0 && name != NULL ? name : "an unknown error";
}

static int32_t moe__cuda_fail(const moe_context *ctx, moe_error *err, int32_t code, const char *call,
                              moe__cu_result result)
{
    return moe__fail(err, code, "", "%s failed: %s (%d)", call, moe__cuda_error_name(ctx->cuda, result),
                     (int32_t)result);
}

typedef moe__cu_result(MOE__CUDA_CALL *moe__cu_get_proc)(const char *symbol, void **function, int version,
                                                         unsigned long long flags, int *status);

// Functions of the versions that the table says: asked for by base name, or found under their exported name.
static int32_t moe__driver_symbols(moe__cuda *cuda, void *library, const char **missing)
{
    moe__cu_get_proc get_proc = NULL;
    char name[64];
    moe__text text;
    if (!moe__library_symbol(library, "cuGetProcAddress_v2", &get_proc)) get_proc = NULL;
#define MOE__LOAD(function, suffix, since, needed, parameters) \
    { \
        void *found = NULL; \
        int status = 0; \
        text = moe__text_make(name, sizeof name); \
        moe__text_string(&text, #function suffix); \
        if (get_proc != NULL && get_proc(#function, &found, since, 0, &status) == 0 && found != NULL) \
            memcpy(&cuda->function, &found, sizeof found); \
        else if (!moe__library_symbol(library, name, &cuda->function)) \
            cuda->function = NULL; \
        if (needed && cuda->function == NULL) { \
            *missing = #function; \
            return 0; \
        } \
    }
    MOE__CU_FUNCTIONS(MOE__LOAD)
#undef MOE__LOAD
    return 1;
}

// 1, or 0 with the reason among the attempts.
static int32_t moe__driver_try(moe__cuda *cuda, const char *path, moe__attempts *attempts)
{
    void *library = moe__library_open(path, attempts);
    const char *missing = NULL;
    int version = 0;
    moe__cu_result result;
    if (library == NULL) return 0;
    if (!moe__driver_symbols(cuda, library, &missing)) {
        moe__attempt_unusable(attempts, path, "has no %s: it is no CUDA driver of 12.0 or later", missing);
        return 0;
    }
    result = cuda->cuInit(0);
    if (result == MOE__CU_STUB) {
        moe__attempt_unusable(attempts, path, "is the toolkit's stub for linking, not a driver");
        return 0;
    }
    if (result != 0) {
        moe__attempt_unusable(attempts, path, "says %s (%d) in cuInit: %s", moe__cuda_error_name(cuda, result),
                              (int32_t)result,
                              result == MOE__CU_NO_DEVICE ? "no GPU is visible to this process"
                                                          : "the driver cannot be used");
        return 0;
    }
    if (cuda->cuDriverGetVersion(&version) != 0 || version < MOE__DRIVER_MIN) {
        moe__attempt_unusable(attempts, path, "is a driver for CUDA %d.%d: 12.0 or later is needed", version / 1000,
                              version % 1000 / 10);
        return 0;
    }
    cuda->driver_version = version;
    moe__log(attempts->ctx, MOE_LOG_INFO, "CUDA driver %d.%d: %s", version / 1000, version % 1000 / 10, path);
    return 1;
}

// A library that the caller or the environment names: then no other is tried. *path NULL: none is named.
static int32_t moe__library_named(const char *wanted, const char *member, const char *variable, const char **path,
                                  moe_error *err)
{
    const char *value = wanted != NULL && wanted[0] != 0 ? wanted : moe__env(variable);
    *path = value;
    if (value == NULL) return MOE_OK;
    if (value != wanted) member = variable;
    if (!moe__path_is_absolute(value))
        return moe__fail(err, MOE_ERROR_ARGUMENT, member, "is %q: it must be an absolute path", value);
    if (strlen(value) >= MOE__PATH_MAX)
        return moe__fail(err, MOE_ERROR_ARGUMENT, member, "is longer than %d bytes", MOE__PATH_MAX - 1);
    return MOE_OK;
}

static int32_t moe__driver_open(moe_context *ctx, const char *wanted, moe_error *err)
{
#if defined(_WIN32)
    static const char *const names[] = { "nvcuda.dll" };
#else
    static const char *const names[] = { "libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1" };
#endif
    moe__attempts attempts;
    const char *named;
    char list[560];
    int32_t result = moe__library_named(wanted, "desc.jit.cuda_library", "MOE_CUDA_LIB", &named, err);
    if (result != MOE_OK) return result;
    moe__attempts_init(&attempts, ctx, "CUDA driver");
    if (named != NULL && moe__driver_try(ctx->cuda, named, &attempts)) return MOE_OK;
    for (int32_t i = 0; named == NULL && i < MOE__ARRAY_COUNT(names); i++)
        if (moe__driver_try(ctx->cuda, names[i], &attempts)) return MOE_OK;
    return moe__fail(err, MOE_ERROR_DRIVER, "desc.backend", "is MOE_BACKEND_CUDA, but there is no CUDA driver that "
                     "can be used; %s", moe__attempts_list(&attempts, list, sizeof list));
}

// ---- chips ----

// What kernels for a compute capability are compiled for: the chip's own features where it has some, and one image for
// a family from 10.0 on.
static void moe__chip_name(int32_t arch, char *chip)
{
    moe__text text = moe__text_make(chip, 16);
    if (arch >= 100) moe__text_format(&text, "sm_%df", arch / 10 * 10);
    else moe__text_format(&text, "sm_%d%s", arch, arch == 90 ? "a" : "");
}

// Compute capability of a name that moe__chip_name() gives, or 0. compute_NN, where PTX is asked for, is one too.
static int32_t moe__chip_arch(const char *chip, int32_t *ptx)
{
    char canonical[16];
    int32_t arch = 0;
    const char *p;
    *ptx = strncmp(chip, "compute_", 8) == 0;
    if (!*ptx && strncmp(chip, "sm_", 3) != 0) return 0;
    for (p = chip + (*ptx ? 8 : 3); *p >= '0' && *p <= '9' && arch < 1000; p++) arch = arch * 10 + (*p - '0');
    if (arch < MOE__ARCH_MIN || arch >= 1000) return 0;
    if (*ptx) return *p == 0 ? arch : 0;
    moe__chip_name(arch, canonical);
    return strcmp(canonical, chip) == 0 ? arch : 0;
}

// ---- device ----

static int32_t moe__cuda_enter(const moe_context *ctx, int32_t *entered)
{
    const moe__cuda *cuda = ctx->cuda;
    moe__cu_context current = NULL;
    *entered = 0;
    if (cuda->cuCtxGetCurrent(&current) == 0 && current == cuda->context) return MOE_OK;
    if (cuda->cuCtxPushCurrent(cuda->context) != 0) return MOE_ERROR_DRIVER;
    *entered = 1;
    return MOE_OK;
}

static void moe__cuda_leave(const moe_context *ctx, int32_t entered)
{
    moe__cu_context popped;
    if (entered) ctx->cuda->cuCtxPopCurrent(&popped);
}

// Around calls that a capture of another thread's would forbid: loading, allocating, copying.
typedef struct moe__cuda_scope {
    int32_t entered;
    int mode;
} moe__cuda_scope;

static int32_t moe__cuda_begin(const moe_context *ctx, moe__cuda_scope *scope, moe_error *err)
{
    if (moe__cuda_enter(ctx, &scope->entered) != MOE_OK)
        return moe__fail(err, MOE_ERROR_DRIVER, "", "the CUDA context cannot be made current: it was destroyed, or an "
                         "earlier kernel of it failed");
    scope->mode = MOE__CU_CAPTURE_RELAXED;
    ctx->cuda->cuThreadExchangeStreamCaptureMode(&scope->mode);
    return MOE_OK;
}

static void moe__cuda_end(const moe_context *ctx, moe__cuda_scope *scope)
{
    ctx->cuda->cuThreadExchangeStreamCaptureMode(&scope->mode);
    moe__cuda_leave(ctx, scope->entered);
}

static int32_t moe__device_alloc(const moe_context *ctx, uint64_t bytes, moe__cu_ptr *out, moe_error *err)
{
    const moe_allocator *allocator = &ctx->desc.device_allocator;
    moe__cu_result result;
    *out = 0;
    if (allocator->alloc != NULL) {
        *out = (moe__cu_ptr)(uintptr_t)allocator->alloc(allocator->user, (size_t)bytes, 256);
        if (*out == 0)
            return moe__fail(err, MOE_ERROR_MEMORY, "", "the device allocator returned NULL for %U bytes", bytes);
        return MOE_OK;
    }
    result = ctx->cuda->cuMemAlloc(out, (size_t)bytes);
    if (result == 0) return MOE_OK;
    if (result != MOE__CU_NO_MEMORY) return moe__cuda_fail(ctx, err, MOE_ERROR_DRIVER, "cuMemAlloc", result);
    return moe__fail(err, MOE_ERROR_MEMORY, "", "the device has no %U bytes of memory left", bytes);
}

static void moe__device_release(const moe_context *ctx, moe__cu_ptr memory, uint64_t bytes)
{
    const moe_allocator *allocator = &ctx->desc.device_allocator;
    if (allocator->free != NULL) allocator->free(allocator->user, (void *)(uintptr_t)memory, (size_t)bytes);
    else ctx->cuda->cuMemFree(memory);
}

// Device memory with a copy of `from` in it; there when the call returns. Runs on a stream of the context's, so that it
// waits for nothing of the caller's and disturbs no capture.
MOE__UNUSED static int32_t moe__device_make(const moe_context *ctx, const void *from, uint64_t bytes, moe__cu_ptr *out,
                                            moe_error *err)
{
    const moe__cuda *cuda = ctx->cuda;
    moe__cuda_scope scope;
    moe__cu_result copied;
    int32_t result;
    *out = 0;
    if ((result = moe__cuda_begin(ctx, &scope, err)) != MOE_OK) return result;
    if ((result = moe__device_alloc(ctx, bytes, out, err)) == MOE_OK) {
        copied = cuda->cuMemcpyHtoDAsync(*out, from, (size_t)bytes, cuda->stream);
        if (copied == 0) copied = cuda->cuStreamSynchronize(cuda->stream);
        if (copied != 0) {
            moe__device_release(ctx, *out, bytes);
            *out = 0;
            result = moe__cuda_fail(ctx, err, MOE_ERROR_DRIVER, "copying to the device", copied);
        }
    }
    moe__cuda_end(ctx, &scope);
    return result;
}

MOE__UNUSED static void moe__device_free(const moe_context *ctx, moe__cu_ptr memory, uint64_t bytes)
{
    moe__cuda_scope scope;
    if (moe__cuda_begin(ctx, &scope, NULL) != MOE_OK) return; // the memory went with the CUDA context
    moe__device_release(ctx, memory, bytes);
    moe__cuda_end(ctx, &scope);
}

static int32_t moe__device_attribute(const moe__cuda *cuda, int attribute)
{
    int value = 0;
    return cuda->cuDeviceGetAttribute(&value, attribute, cuda->device) == 0 ? (int32_t)value : 0;
}

// The device by its number, or the one that the caller's CUDA context is on.
static int32_t moe__device_find(moe_context *ctx, moe_error *err)
{
    moe__cuda *cuda = ctx->cuda;
    moe__cu_context popped;
    moe__cu_result result;
    int count = 0;
    if (ctx->desc.cuda_context != NULL) {
        cuda->context = (moe__cu_context)ctx->desc.cuda_context;
        if ((result = cuda->cuCtxPushCurrent(cuda->context)) != 0)
            return moe__fail(err, MOE_ERROR_ARGUMENT, "desc.cuda_context", "is not a CUcontext that can be used: "
                             "cuCtxPushCurrent says %s (%d)", moe__cuda_error_name(cuda, result), (int32_t)result);
        result = cuda->cuCtxGetDevice(&cuda->device);
        cuda->cuCtxPopCurrent(&popped);
        if (result != 0) return moe__cuda_fail(ctx, err, MOE_ERROR_DRIVER, "cuCtxGetDevice", result);
        ctx->desc.device = (int32_t)cuda->device;
        return MOE_OK;
    }
    if ((result = cuda->cuDeviceGetCount(&count)) != 0)
        return moe__cuda_fail(ctx, err, MOE_ERROR_DRIVER, "cuDeviceGetCount", result);
    if (ctx->desc.device < 0 || ctx->desc.device >= count)
        return moe__fail(err, count == 0 ? MOE_ERROR_DRIVER : MOE_ERROR_ARGUMENT, "desc.device",
                         "is %d: this process sees %d CUDA device%s", ctx->desc.device, (int32_t)count,
                         count == 1 ? "" : "s");
    if ((result = cuda->cuDeviceGet(&cuda->device, ctx->desc.device)) != 0)
        return moe__cuda_fail(ctx, err, MOE_ERROR_DRIVER, "cuDeviceGet", result);
    return MOE_OK;
}

static int32_t moe__device_facts(moe_context *ctx, moe_error *err)
{
    moe__cuda *cuda = ctx->cuda;
    if (cuda->cuDeviceGetName(cuda->name, (int)sizeof cuda->name, cuda->device) != 0) strcpy(cuda->name, "GPU");
    cuda->name[sizeof cuda->name - 1] = 0;
    cuda->arch = moe__device_attribute(cuda, MOE__CU_DEVICE_MAJOR) * 10 +
                 moe__device_attribute(cuda, MOE__CU_DEVICE_MINOR);
    cuda->sms = moe__device_attribute(cuda, MOE__CU_DEVICE_SMS);
    cuda->smem_optin = moe__device_attribute(cuda, MOE__CU_DEVICE_SMEM_OPTIN);
    moe__chip_name(cuda->arch, cuda->chip);
    if (cuda->arch < MOE__ARCH_MIN)
        return moe__fail(err, MOE_ERROR_UNSUPPORTED, "desc.device", "is %d, %q of compute capability %d.%d: 8.0 or "
                         "later is needed", ctx->desc.device, cuda->name, cuda->arch / 10, cuda->arch % 10);
    return MOE_OK;
}

// The CUDA context and a stream in it.
static int32_t moe__device_open(moe_context *ctx, moe_error *err)
{
    moe__cuda *cuda = ctx->cuda;
    moe__cuda_scope scope;
    moe__cu_result created;
    int32_t result;
    if ((result = moe__device_find(ctx, err)) != MOE_OK || (result = moe__device_facts(ctx, err)) != MOE_OK)
        return result;
    if (ctx->desc.cuda_context == NULL) {
        created = cuda->cuDevicePrimaryCtxRetain(&cuda->context, cuda->device);
        if (created != 0) return moe__cuda_fail(ctx, err, MOE_ERROR_DRIVER, "cuDevicePrimaryCtxRetain", created);
        cuda->primary = 1;
    }
    if ((result = moe__cuda_begin(ctx, &scope, err)) != MOE_OK) return result;
    created = cuda->cuStreamCreate(&cuda->stream, MOE__CU_STREAM_NON_BLOCKING);
    if (created != 0) {
        cuda->stream = NULL;
        result = moe__cuda_fail(ctx, err, MOE_ERROR_DRIVER, "cuStreamCreate", created);
    }
    moe__cuda_end(ctx, &scope);
    return result;
}

// Undoes as much of moe__cuda_open() as was done.
static void moe__cuda_close(moe_context *ctx)
{
    moe__cuda *cuda = ctx->cuda;
    moe__cuda_scope scope;
    if (cuda == NULL) return;
    if (cuda->stream != NULL && moe__cuda_begin(ctx, &scope, NULL) == MOE_OK) {
        cuda->cuStreamDestroy(cuda->stream);
        moe__cuda_end(ctx, &scope);
    }
    if (cuda->primary) cuda->cuDevicePrimaryCtxRelease(cuda->device);
    moe__free(&ctx->desc.allocator, cuda, sizeof *cuda);
    ctx->cuda = NULL;
}

static int32_t moe__cuda_open(moe_context *ctx, moe_error *err)
{
    int32_t result;
    ctx->cuda = (moe__cuda *)moe__alloc(&ctx->desc.allocator, sizeof *ctx->cuda);
    if (ctx->cuda == NULL) return moe__fail_memory(err, sizeof *ctx->cuda);
    memset(ctx->cuda, 0, sizeof *ctx->cuda);
    if ((result = moe__driver_open(ctx, ctx->desc.jit.cuda_library, err)) != MOE_OK ||
        (result = moe__device_open(ctx, err)) != MOE_OK)
        moe__cuda_close(ctx);
    return result;
}

// ---- NVRTC ----

static int32_t moe__nvrtc_symbols(moe__nvrtc *nvrtc, void *library, const char **missing)
{
#define MOE__LOAD(function, type, parameters) \
    if (!moe__library_symbol(library, #function, &nvrtc->function)) { \
        *missing = #function; \
        return 0; \
    }
    MOE__NVRTC_FUNCTIONS(MOE__LOAD)
#undef MOE__LOAD
    return 1;
}

#if !defined(_WIN32)
// NVRTC opens its builtins by bare name: the ones beside it are loaded first, so that they are found. Where they are
// not there, compiling says so.
static void moe__nvrtc_builtins(const char *path, int32_t version)
{
    char builtins[MOE__PATH_MAX];
    size_t length = strlen(path);
    moe__text text;
    if (!moe__path_is_absolute(path) || length + 64 > sizeof builtins) return;
    while (path[length - 1] != '/') length--;
    memcpy(builtins, path, length);
    text = moe__text_make(builtins + length, sizeof builtins - length);
    moe__text_format(&text, "libnvrtc-builtins.so.%d.%d", version / 1000, version % 1000 / 10);
    dlopen(builtins, RTLD_NOW | RTLD_LOCAL);
}
#endif

// Family targets (sm_100f) exist since 12.9.
static int32_t moe__nvrtc_knows(const moe__nvrtc *nvrtc, int32_t arch)
{
    if (arch >= 100 && nvrtc->version < 12090) return 0;
    if (arch >= 100) arch = arch / 10 * 10;
    for (int32_t i = 0; i < nvrtc->num_archs; i++)
        if (nvrtc->archs[i] == arch) return 1;
    return 0;
}

static int32_t moe__nvrtc_facts(moe__nvrtc *nvrtc)
{
    int major = 0, minor = 0, count = 0, archs[MOE__ARRAY_COUNT(nvrtc->archs)];
    if (nvrtc->nvrtcVersion(&major, &minor) != 0) return 0;
    nvrtc->version = major * 1000 + minor * 10;
    if (nvrtc->nvrtcGetNumSupportedArchs(&count) != 0 || count < 0 || count > MOE__ARRAY_COUNT(archs) ||
        nvrtc->nvrtcGetSupportedArchs(archs) != 0)
        return 0;
    nvrtc->num_archs = count;
    for (int i = 0; i < count; i++) nvrtc->archs[i] = archs[i];
    return 1;
}

// 1 and *out, or 0 with the reason among the attempts.
static int32_t moe__nvrtc_try(moe__nvrtc *out, const char *path, int32_t arch, moe__attempts *attempts)
{
    moe__nvrtc nvrtc;
    const char *missing = NULL;
    void *library = moe__library_open(path, attempts);
    if (library == NULL) return 0;
    memset(&nvrtc, 0, sizeof nvrtc);
    if (!moe__nvrtc_symbols(&nvrtc, library, &missing)) {
        moe__attempt_unusable(attempts, path, "has no %s: it is no NVRTC of 12.0 or later", missing);
        return 0;
    }
    if (!moe__nvrtc_facts(&nvrtc)) {
        moe__attempt_unusable(attempts, path, "does not say its version and chips");
        return 0;
    }
    if (nvrtc.version < MOE__DRIVER_MIN) {
        moe__attempt_unusable(attempts, path, "is NVRTC %d.%d: 12.0 or later is needed", nvrtc.version / 1000,
                              nvrtc.version % 1000 / 10);
        return 0;
    }
    if (!moe__nvrtc_knows(&nvrtc, arch)) {
        moe__attempt_unusable(attempts, path, "is NVRTC %d.%d, which cannot compile for compute capability %d.%d",
                              nvrtc.version / 1000, nvrtc.version % 1000 / 10, arch / 10, arch % 10);
        return 0;
    }
#if !defined(_WIN32)
    moe__nvrtc_builtins(path, nvrtc.version);
#endif
    *out = nvrtc;
    moe__log(attempts->ctx, MOE_LOG_INFO, "NVRTC %d.%d: %s", nvrtc.version / 1000, nvrtc.version % 1000 / 10, path);
    return 1;
}

// Names of the library of one major version in a folder; folder NULL: by name, where the system looks.
static int32_t moe__nvrtc_try_in(moe__nvrtc *out, const char *folder, const char *below, int32_t major, int32_t arch,
                                 moe__attempts *attempts)
{
    char path[MOE__PATH_MAX];
    moe__text text = moe__text_make(path, sizeof path);
#if defined(_WIN32)
    if (folder != NULL) moe__text_format(&text, "%s\\%s\\", folder, below);
    moe__text_format(&text, "nvrtc64_%d0_0.dll", major);
#else
    if (folder != NULL) moe__text_format(&text, "%s/%s/", folder, below);
    moe__text_format(&text, "libnvrtc.so.%d", major);
#endif
    return moe__nvrtc_try(out, path, arch, attempts);
}

#if defined(_WIN32)
static int32_t moe__nvrtc_folders(moe__nvrtc *out, int32_t major, int32_t arch, moe__attempts *attempts)
{
    static const char *const below[] = { "bin\\x64", "bin" };
    const char *toolkit = moe__env_folder("CUDA_PATH");
    for (int32_t i = 0; toolkit != NULL && i < MOE__ARRAY_COUNT(below); i++)
        if (moe__nvrtc_try_in(out, toolkit, below[i], major, arch, attempts)) return 1;
    return 0;
}
#else
static int32_t moe__nvrtc_toolkits(moe__nvrtc *out, int32_t major, int32_t arch, moe__attempts *attempts)
{
#  if defined(__aarch64__)
    static const char *const below[] = { "lib64", "lib", "targets/sbsa-linux/lib" };
#  else
    static const char *const below[] = { "lib64", "lib", "targets/x86_64-linux/lib" };
#  endif
    const char *folders[5];
    char versioned[32];
    moe__text text = moe__text_make(versioned, sizeof versioned);
    moe__text_format(&text, "/usr/local/cuda-%d", major);
    folders[0] = moe__env_folder("CUDA_HOME");
    folders[1] = moe__env_folder("CUDA_PATH");
    folders[2] = "/usr/local/cuda";
    folders[3] = versioned;
    folders[4] = "/opt/cuda";
    for (int32_t f = 0; f < MOE__ARRAY_COUNT(folders); f++)
        for (int32_t i = 0; folders[f] != NULL && i < MOE__ARRAY_COUNT(below); i++)
            if (moe__nvrtc_try_in(out, folders[f], below[i], major, arch, attempts)) return 1;
    return 0;
}

// NVIDIA's wheels for Python, wherever environments keep them. Folders that are not there are not listed: they are too
// many.
static int32_t moe__nvrtc_wheels(moe__nvrtc *out, int32_t major, int32_t arch, moe__attempts *attempts)
{
    static const char *const sites[] = { "site-packages", "dist-packages" };
    const char *prefixes[5];
    char below[96];
    struct stat info;
    char home[MOE__PATH_MAX];
    const char *user = moe__env_folder("HOME");
    moe__text text = moe__text_make(home, sizeof home);
    if (user != NULL) moe__text_format(&text, "%s/.local", user);
    prefixes[0] = moe__env_folder("VIRTUAL_ENV");
    prefixes[1] = moe__env_folder("CONDA_PREFIX");
    prefixes[2] = user != NULL ? home : NULL;
    prefixes[3] = "/usr/local";
    prefixes[4] = "/usr";
    if (prefixes[1] != NULL && moe__nvrtc_try_in(out, prefixes[1], "lib", major, arch, attempts)) return 1;
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(prefixes) * 2 * 10 * 2; i++) {
        char path[MOE__PATH_MAX];
        const char *prefix = prefixes[i / 40];
        if (prefix == NULL) continue;
        text = moe__text_make(below, sizeof below);
        moe__text_format(&text, "lib/python3.%d/%s/nvidia/", 8 + i / 4 % 10, sites[i / 2 % 2]);
        if (i % 2 == 0) moe__text_format(&text, "cu%d/lib", major);
        else moe__text_string(&text, "cuda_nvrtc/lib");
        text = moe__text_make(path, sizeof path);
        moe__text_format(&text, "%s/%s/libnvrtc.so.%d", prefix, below, major);
        if (stat(path, &info) == 0 && moe__nvrtc_try(out, path, arch, attempts)) return 1;
    }
    return 0;
}

static int32_t moe__nvrtc_folders(moe__nvrtc *out, int32_t major, int32_t arch, moe__attempts *attempts)
{
    return moe__nvrtc_toolkits(out, major, arch, attempts) || moe__nvrtc_wheels(out, major, arch, attempts);
}
#endif

// An NVRTC that compiles for `arch`: of the driver's major version if there is one, since a driver may refuse what a
// newer one made; then of the older, then of the newer ones.
static int32_t moe__nvrtc_open(const moe_context *ctx, const char *wanted, int32_t arch, moe__nvrtc *out,
                               moe_error *err)
{
    int32_t driver = ctx->cuda != NULL ? ctx->cuda->driver_version / 1000 : 13, result;
    int32_t majors[3];
    moe__attempts attempts;
    const char *named;
    char list[500];
    result = moe__library_named(wanted, "desc.jit.nvrtc_library", "MOE_NVRTC_LIB", &named, err);
    if (result != MOE_OK) return result;
    majors[0] = driver;
    majors[1] = driver == 12 ? 13 : driver == 13 ? 12 : 13;
    majors[2] = driver == 12 || driver == 13 ? 0 : 12;
    moe__attempts_init(&attempts, ctx, "NVRTC");
    if (named != NULL && moe__nvrtc_try(out, named, arch, &attempts)) return MOE_OK;
    for (int32_t i = 0; named == NULL && i < 3 && majors[i] != 0; i++) {
        if (!moe__nvrtc_try_in(out, NULL, NULL, majors[i], arch, &attempts) &&
            !moe__nvrtc_folders(out, majors[i], arch, &attempts))
            continue;
        if (ctx->cuda != NULL && out->version / 1000 > driver)
            moe__log(ctx, MOE_LOG_WARNING, "NVRTC %d.%d is newer than the driver, %d.%d, which may refuse its kernels",
                     out->version / 1000, out->version % 1000 / 10, driver, ctx->cuda->driver_version % 1000 / 10);
        return MOE_OK;
    }
    return moe__fail(err, MOE_ERROR_NVRTC, "", "there is no NVRTC (libnvrtc, part of the CUDA toolkit) that can "
                     "compile for compute capability %d.%d; %s", arch / 10, arch % 10,
                     moe__attempts_list(&attempts, list, sizeof list));
}

#endif // MOE_NO_CUDA

// >>jit  kernels from the embedded text  An instance is the whole text compiled with its own definitions. Kernels come,
// in this order, from: the context itself, images that the caller brings, the cache folder, the seed folder, NVRTC,
// embedded PTX. Called when plans are created; nothing here runs when they are executed.
#if !defined(MOE_NO_CUDA)

// Of the region that `make embed` writes, at the end.
static const char *const *moe__kernel_pieces(int32_t *count); // concatenated: moe_kernels.cu.inc
static const char *moe__kernel_digest(void);                  // SHA-256 of it in hex

// ---- SHA-256 ----

typedef struct moe__sha256 {
    uint32_t state[8];
    uint64_t bytes;
    unsigned char block[64];
} moe__sha256;

static uint32_t moe__rotate(uint32_t x, int32_t n) { return x >> n | x << (32 - n); }

static void moe__sha256_block(moe__sha256 *sha, const unsigned char *p)
{
    static const uint32_t k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2
    };
    uint32_t w[64], v[8];
    for (int32_t i = 0; i < 16; i++)
        w[i] = (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 | (uint32_t)p[4 * i + 2] << 8 | p[4 * i + 3];
    for (int32_t i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (moe__rotate(a, 7) ^ moe__rotate(a, 18) ^ a >> 3) + w[i - 7] +
               (moe__rotate(b, 17) ^ moe__rotate(b, 19) ^ b >> 10);
    }
    memcpy(v, sha->state, sizeof v);
    for (int32_t i = 0; i < 64; i++) {
        uint32_t s1 = moe__rotate(v[4], 6) ^ moe__rotate(v[4], 11) ^ moe__rotate(v[4], 25);
        uint32_t t1 = v[7] + s1 + ((v[4] & v[5]) ^ (~v[4] & v[6])) + k[i] + w[i];
        uint32_t s0 = moe__rotate(v[0], 2) ^ moe__rotate(v[0], 13) ^ moe__rotate(v[0], 22);
        uint32_t t2 = s0 + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof v[0]);
        v[4] += t1;
        v[0] = t1 + t2;
    }
    for (int32_t i = 0; i < 8; i++) sha->state[i] += v[i];
}

static void moe__sha256_init(moe__sha256 *sha)
{
    static const uint32_t start[8] = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                       0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 };
    memcpy(sha->state, start, sizeof start);
    sha->bytes = 0;
}

static void moe__sha256_add(moe__sha256 *sha, const void *data, uint64_t size)
{
    const unsigned char *p = (const unsigned char *)data;
    while (size > 0) {
        uint64_t used = sha->bytes % 64, part = 64 - used < size ? 64 - used : size;
        memcpy(sha->block + used, p, (size_t)part);
        sha->bytes += part;
        p += part;
        size -= part;
        if (sha->bytes % 64 == 0) moe__sha256_block(sha, sha->block);
    }
}

static void moe__sha256_end(moe__sha256 *sha, unsigned char digest[32])
{
    static const unsigned char pad[64] = { 0x80 };
    unsigned char length[8];
    uint64_t bits = sha->bytes * 8;
    for (int32_t i = 0; i < 8; i++) length[i] = (unsigned char)(bits >> (56 - 8 * i));
    moe__sha256_add(sha, pad, 1 + (119 - sha->bytes % 64) % 64);
    moe__sha256_add(sha, length, 8);
    for (int32_t i = 0; i < 32; i++) digest[i] = (unsigned char)(sha->state[i / 4] >> (24 - 8 * (i % 4)));
}

// ---- instances ----

enum { MOE__OPTIONS_MAX = 24 };

// One kernel of a plan.
typedef struct moe__instance {
    const char *entry;   // "moe_k_sort": selects MOE_K_SORT and is the kernel's name
    char name[48];       // in messages and file names
    char defines[96];    // "-DMOE_P_X=1 -DMOE_P_Y=2"
    int32_t args_bytes;  // of its argument struct
    int32_t threads;     // of a CTA
    int32_t smem_bytes;  // dynamic shared memory at most
} moe__instance;

// Options without the chip; the text of each lies in `memory`.
typedef struct moe__options {
    const char *option[MOE__OPTIONS_MAX];
    int32_t count;
    char memory[256];
} moe__options;

static void moe__options_make(moe__options *options, const moe__instance *instance)
{
    moe__text text = moe__text_make(options->memory, sizeof options->memory);
    char *p;
    moe__text_string(&text, "--std=c++17 --fmad=false -D");
    for (const char *c = instance->entry; *c != 0; c++)
        moe__text_char(&text, *c >= 'a' && *c <= 'z' ? (char)(*c - 'a' + 'A') : *c);
    moe__text_format(&text, " %s", instance->defines);
    options->count = 0;
    for (p = options->memory; *p != 0 && options->count < MOE__OPTIONS_MAX - 1;) {
        while (*p == ' ') *p++ = 0;
        if (*p != 0) options->option[options->count++] = p;
        while (*p != 0 && *p != ' ') p++;
    }
}

// What identifies an image: the text, the options, the chip. Neither NVRTC's version nor any path or date.
static void moe__instance_key(const moe__instance *instance, const char *chip, unsigned char key[32])
{
    moe__options options;
    moe__sha256 sha;
    const char *digest = moe__kernel_digest();
    moe__options_make(&options, instance);
    moe__sha256_init(&sha);
    moe__sha256_add(&sha, "moe.h kernel 1", 15); // with the 0 behind each
    moe__sha256_add(&sha, digest, strlen(digest) + 1);
    moe__sha256_add(&sha, instance->entry, strlen(instance->entry) + 1);
    moe__sha256_add(&sha, chip, strlen(chip) + 1);
    for (int32_t i = 0; i < options.count; i++)
        moe__sha256_add(&sha, options.option[i], strlen(options.option[i]) + 1);
    moe__sha256_end(&sha, key);
}

static void moe__text_hex(moe__text *text, const unsigned char *data, int32_t count)
{
    static const char digits[] = "0123456789abcdef";
    for (int32_t i = 0; i < count; i++) {
        moe__text_char(text, digits[data[i] >> 4]);
        moe__text_char(text, digits[data[i] & 15]);
    }
}

// An image on its way from a file or the compiler into a module.
typedef struct moe__build {
    const moe__instance *instance;
    const char *chip;
    unsigned char key[32];
    unsigned char *image; // the allocator's, a 0 behind it; NULL: not found
    uint64_t bytes;
    moe__nvrtc_program program;
    int32_t compiled;     // nvrtcResult
    int32_t nvrtc_version; // of whoever compiled it
} moe__build;

static void moe__build_init(moe__build *build, const moe__instance *instance, const char *chip)
{
    memset(build, 0, sizeof *build);
    build->instance = instance;
    build->chip = chip;
    moe__instance_key(instance, chip, build->key);
}

static int32_t moe__build_alloc(const moe_context *ctx, moe__build *build, uint64_t bytes, moe_error *err)
{
    build->image = (unsigned char *)moe__alloc(&ctx->desc.allocator, bytes + 1);
    if (build->image == NULL) return moe__fail_memory(err, bytes + 1);
    build->image[bytes] = 0;
    build->bytes = bytes;
    return MOE_OK;
}

static void moe__build_drop(const moe_context *ctx, moe__build *build)
{
    moe__free(&ctx->desc.allocator, build->image, build->bytes + 1);
    build->image = NULL;
    build->bytes = 0;
}

// A kernel that the context has loaded; it stays until the context is destroyed.
typedef struct moe__kernel {
    struct moe__kernel *next;
    unsigned char key[32];
    moe__cu_module module;
    moe__cu_function function;
    int32_t smem_bytes; // dynamic shared memory that it may be launched with
} moe__kernel;

// What a context keeps for compiling and loading. Guarded by `lock`.
typedef struct moe__jit {
    moe__lock lock;
    moe__kernel *kernels;
    moe__nvrtc nvrtc;
    char *source;         // the kernels' text in one piece, made when first compiled
    uint64_t source_bytes;
    const moe_jit_image *images;
    int32_t num_images;
    int32_t cache_mode;   // moe_cache_mode
    int32_t quiet;        // the cache folder's trouble has been told
    char cache_dir[MOE__PATH_MAX]; // "": memory only
    char seed_dir[MOE__PATH_MAX];  // "": none
    char nvrtc_library[MOE__PATH_MAX];
} moe__jit;

// ---- compiling ----

static int32_t moe__source_join(const moe_context *ctx, moe_error *err)
{
    moe__jit *jit = ctx->jit;
    int32_t count = 0;
    const char *const *pieces = moe__kernel_pieces(&count);
    uint64_t bytes = 1, at = 0;
    if (jit->source != NULL) return MOE_OK;
    for (int32_t i = 0; i < count; i++) bytes += strlen(pieces[i]);
    jit->source = (char *)moe__alloc(&ctx->desc.allocator, bytes);
    if (jit->source == NULL) return moe__fail_memory(err, bytes);
    jit->source_bytes = bytes;
    for (int32_t i = 0; i < count; i++) {
        size_t length = strlen(pieces[i]);
        memcpy(jit->source + at, pieces[i], length);
        at += length;
    }
    jit->source[at] = 0;
    return MOE_OK;
}

typedef struct moe__compile {
    const moe__jit *jit;
    moe__build *const *wanted;
} moe__compile;

// One program on one thread. Allocates nothing of ours: results are fetched by the thread that called.
static void moe__compile_task(void *arg, int32_t index)
{
    const moe__compile *compile = (const moe__compile *)arg;
    const moe__jit *jit = compile->jit;
    moe__build *build = compile->wanted[index];
    char arch[32];
    moe__text text = moe__text_make(arch, sizeof arch);
    moe__options options;
    moe__text_format(&text, "--gpu-architecture=%s", build->chip);
    moe__options_make(&options, build->instance);
    options.option[options.count++] = arch;
    build->program = NULL;
    build->compiled = jit->nvrtc.nvrtcCreateProgram(&build->program, jit->source, build->instance->name, 0, NULL, NULL);
    if (build->compiled == 0)
        build->compiled = jit->nvrtc.nvrtcCompileProgram(build->program, options.count, options.option);
}

// The compiler's own words: the first lines for the log hook, the very first ones in the message.
static int32_t moe__compile_fail(const moe_context *ctx, const moe__build *build, moe_error *err)
{
    const moe__nvrtc *nvrtc = &ctx->jit->nvrtc;
    const moe_allocator *allocator = &ctx->desc.allocator;
    size_t size = 0;
    char *log = NULL;
    int32_t result, lines = 0;
    if (build->program != NULL && nvrtc->nvrtcGetProgramLogSize(build->program, &size) == 0 && size > 1)
        log = (char *)moe__alloc(allocator, size);
    if (log != NULL && nvrtc->nvrtcGetProgramLog(build->program, log) != 0) log[0] = 0;
    if (log != NULL) log[size - 1] = 0;
    result = moe__fail(err, MOE_ERROR_COMPILE, "", "kernel %s for %s does not compile with NVRTC %d.%d: %s%s%s",
                       build->instance->name, build->chip, nvrtc->version / 1000, nvrtc->version % 1000 / 10,
                       nvrtc->nvrtcGetErrorString(build->compiled), log != NULL ? ": " : "", log != NULL ? log : "");
    for (char *line = log; line != NULL && *line != 0 && lines < 40; lines++) {
        char *end = line;
        while (*end != 0 && *end != '\n') end++;
        if (*end != 0) *end++ = 0;
        moe__log(ctx, MOE_LOG_ERROR, "%s: %s", build->instance->name, line);
        line = end;
    }
    moe__free(allocator, log, size);
    return result;
}

static int32_t moe__compile_fetch(const moe_context *ctx, moe__build *build, moe_error *err)
{
    const moe__nvrtc *nvrtc = &ctx->jit->nvrtc;
    int32_t ptx = strncmp(build->chip, "compute_", 8) == 0, got, result;
    size_t size = 0;
    if (build->compiled != 0) return moe__compile_fail(ctx, build, err);
    got = ptx ? nvrtc->nvrtcGetPTXSize(build->program, &size) : nvrtc->nvrtcGetCUBINSize(build->program, &size);
    if (got != 0 || size == 0)
        return moe__fail(err, MOE_ERROR_COMPILE, "", "NVRTC %d.%d gave no %s of %s for %s: %s", nvrtc->version / 1000,
                         nvrtc->version % 1000 / 10, ptx ? "PTX" : "cubin", build->instance->name, build->chip,
                         nvrtc->nvrtcGetErrorString(got));
    if ((result = moe__build_alloc(ctx, build, size, err)) != MOE_OK) return result;
    if (ptx) nvrtc->nvrtcGetPTX(build->program, (char *)build->image);
    else nvrtc->nvrtcGetCUBIN(build->program, (char *)build->image);
    build->nvrtc_version = nvrtc->version;
    moe__log(ctx, MOE_LOG_INFO, "kernel %s for %s: compiled by NVRTC %d.%d, %U bytes", build->instance->name,
             build->chip, nvrtc->version / 1000, nvrtc->version % 1000 / 10, build->bytes);
    return MOE_OK;
}

// NVRTC for this compute capability, opened when first needed.
static int32_t moe__jit_compiler(const moe_context *ctx, int32_t arch, moe_error *err)
{
    moe__jit *jit = ctx->jit;
    if (jit->nvrtc.version != 0 && moe__nvrtc_knows(&jit->nvrtc, arch)) return MOE_OK;
    return moe__nvrtc_open(ctx, jit->nvrtc_library, arch, &jit->nvrtc, err);
}

// Compiles `count` programs for chips of one compute capability on the context's threads.
static int32_t moe__jit_compile(moe_context *ctx, moe__build *const *wanted, int32_t count, moe_error *err)
{
    moe__compile compile;
    int32_t ptx, result = moe__jit_compiler(ctx, moe__chip_arch(wanted[0]->chip, &ptx), err);
    if (result != MOE_OK || (result = moe__source_join(ctx, err)) != MOE_OK) return result;
    compile.jit = ctx->jit;
    compile.wanted = wanted;
    moe__parallel(ctx, count, moe__compile_task, &compile);
    for (int32_t i = 0; i < count; i++) {
        if (result == MOE_OK) result = moe__compile_fetch(ctx, wanted[i], err);
        if (wanted[i]->program != NULL) ctx->jit->nvrtc.nvrtcDestroyProgram(&wanted[i]->program);
    }
    return result;
}

// ---- modules ----

// The kernel must take the struct that this header fills in.
static int32_t moe__kernel_check(const moe_context *ctx, const moe__instance *instance, moe__cu_function function,
                                 moe_error *err)
{
    const moe__cuda *cuda = ctx->cuda;
    size_t offset = 0, size = 0;
    int threads = 0;
    if (cuda->cuFuncGetParamInfo != NULL && cuda->cuFuncGetParamInfo(function, 0, &offset, &size) == 0 &&
        size != (size_t)instance->args_bytes)
        return moe__fail(err, MOE_ERROR_LOAD, "", "kernel %s takes %U bytes of arguments, this build gives it %d",
                         instance->name, (uint64_t)size, instance->args_bytes);
    if (cuda->cuFuncGetAttribute(&threads, MOE__CU_FUNCTION_MAX_THREADS, function) == 0 && threads < instance->threads)
        return moe__fail(err, MOE_ERROR_LOAD, "", "kernel %s can have %d threads a CTA, %d are needed", instance->name,
                         (int32_t)threads, instance->threads);
    return MOE_OK;
}

// Raises the dynamic shared memory that a kernel may be launched with.
static int32_t moe__kernel_smem(const moe_context *ctx, moe__kernel *kernel, const moe__instance *instance,
                                moe_error *err)
{
    const moe__cuda *cuda = ctx->cuda;
    moe__cu_result result;
    if (instance->smem_bytes <= kernel->smem_bytes) return MOE_OK;
    if (instance->smem_bytes > cuda->smem_optin)
        return moe__fail(err, MOE_ERROR_UNSUPPORTED, "", "kernel %s needs %d bytes of shared memory: %s has %d a CTA",
                         instance->name, instance->smem_bytes, cuda->name, cuda->smem_optin);
    result = cuda->cuFuncSetAttribute(kernel->function, MOE__CU_FUNCTION_DYNAMIC_SMEM, instance->smem_bytes);
    if (result != 0) return moe__cuda_fail(ctx, err, MOE_ERROR_LOAD, "cuFuncSetAttribute", result);
    kernel->smem_bytes = instance->smem_bytes;
    return MOE_OK;
}

static moe__kernel *moe__kernel_find(const moe__jit *jit, const unsigned char key[32])
{
    moe__kernel *kernel = jit->kernels;
    while (kernel != NULL && memcmp(kernel->key, key, 32) != 0) kernel = kernel->next;
    return kernel;
}

// Loads an image for good. Called inside moe__cuda_begin(). MOE_ERROR_LOAD: the driver does not take it.
static int32_t moe__kernel_load(moe_context *ctx, const moe__build *build, moe__kernel **out, moe_error *err)
{
    const moe__cuda *cuda = ctx->cuda;
    const moe__instance *instance = build->instance;
    moe__kernel *kernel = (moe__kernel *)moe__alloc(&ctx->desc.allocator, sizeof *kernel);
    const char *call = "cuModuleLoadData";
    moe__cu_result loaded;
    int32_t result = MOE_OK;
    if (kernel == NULL) return moe__fail_memory(err, sizeof *kernel);
    memset(kernel, 0, sizeof *kernel);
    memcpy(kernel->key, build->key, sizeof kernel->key);
    loaded = cuda->cuModuleLoadData(&kernel->module, build->image);
    if (loaded != 0) {
        kernel->module = NULL;
    } else {
        call = "cuModuleGetFunction";
        loaded = cuda->cuModuleGetFunction(&kernel->function, kernel->module, instance->entry);
    }
    if (loaded == 0 && cuda->cuFuncLoad != NULL) { // now, not at the first launch
        call = "cuFuncLoad";
        loaded = cuda->cuFuncLoad(kernel->function);
    }
    if (loaded == 0)
        result = moe__kernel_check(ctx, instance, kernel->function, err);
    else
        result = moe__fail(err, loaded == MOE__CU_NO_MEMORY ? MOE_ERROR_MEMORY : MOE_ERROR_LOAD, "",
                           "%s refuses kernel %s for %s: %s (%d), driver %d.%d, NVRTC %d.%d", call, instance->name,
                           build->chip, moe__cuda_error_name(cuda, loaded), (int32_t)loaded,
                           cuda->driver_version / 1000, cuda->driver_version % 1000 / 10, build->nvrtc_version / 1000,
                           build->nvrtc_version % 1000 / 10);
    if (result != MOE_OK) {
        if (kernel->module != NULL) cuda->cuModuleUnload(kernel->module);
        moe__free(&ctx->desc.allocator, kernel, sizeof *kernel);
        return result;
    }
    kernel->next = ctx->jit->kernels;
    ctx->jit->kernels = kernel;
    *out = kernel;
    return MOE_OK;
}

// ---- cache ----

// An entry is a header and a cubin, named <instance>-<chip>-<half of its key>.bin in v1/<16 digits of the kernels'
// digest>/. Its name only finds it: magic, key, length and the payload's SHA-256 decide. Anything wrong is a miss.
enum {
    MOE__ENTRY_HEADER = 88,    // magic 8, format 4, NVRTC version 4, key 32, length 8, SHA-256 of the payload 32
    MOE__ENTRY_MAX = 64 << 20, // bytes of a cubin
    MOE__ENTRY_FORMAT = 1
};

typedef enum moe__place { MOE__PLACE_IMAGES, MOE__PLACE_CACHE, MOE__PLACE_SEED, MOE__PLACES } moe__place;

static const char *const moe__place_names[] = { "the caller's images", "the cache", "the seed folder" };

#if !defined(MOE_NO_FILES)
static void moe__put_le(unsigned char *p, uint64_t value, int32_t bytes)
{
    for (int32_t i = 0; i < bytes; i++) p[i] = (unsigned char)(value >> (8 * i));
}

static uint64_t moe__get_le(const unsigned char *p, int32_t bytes)
{
    uint64_t value = 0;
    for (int32_t i = bytes - 1; i >= 0; i--) value = value << 8 | p[i];
    return value;
}

static void moe__sha256_of(const void *data, uint64_t size, unsigned char digest[32])
{
    moe__sha256 sha;
    moe__sha256_init(&sha);
    moe__sha256_add(&sha, data, size);
    moe__sha256_end(&sha, digest);
}

static void moe__entry_header(const moe__build *build, unsigned char *header)
{
    memcpy(header, "moe.cubn", 8);
    moe__put_le(header + 8, MOE__ENTRY_FORMAT, 4);
    moe__put_le(header + 12, (uint64_t)(uint32_t)build->nvrtc_version, 4);
    memcpy(header + 16, build->key, 32);
    moe__put_le(header + 48, build->bytes, 8);
    moe__sha256_of(build->image, build->bytes, header + 56);
}

// NULL, or what is wrong with an entry of `size` bytes.
static const char *moe__entry_defect(const moe__build *build, const unsigned char *entry, uint64_t size)
{
    unsigned char digest[32];
    if (size < MOE__ENTRY_HEADER) return "is cut short";
    if (memcmp(entry, "moe.cubn", 8) != 0 || moe__get_le(entry + 8, 4) != MOE__ENTRY_FORMAT)
        return "is not an entry of this format";
    if (memcmp(entry + 16, build->key, 32) != 0) return "holds another kernel";
    if (moe__get_le(entry + 48, 8) != size - MOE__ENTRY_HEADER) return "is not of the length that it says";
    moe__sha256_of(entry + MOE__ENTRY_HEADER, size - MOE__ENTRY_HEADER, digest);
    return memcmp(entry + 56, digest, 32) != 0 ? "is damaged" : NULL;
}

static void moe__entry_name(const moe__build *build, char *name, size_t capacity)
{
    moe__text text = moe__text_make(name, capacity);
    moe__text_format(&text, "%s-%s-", build->instance->name, build->chip);
    moe__text_hex(&text, build->key, 16);
    moe__text_string(&text, ".bin");
}

static void moe__entry_folder(char name[17])
{
    memcpy(name, moe__kernel_digest(), 16);
    name[16] = 0;
}

// What is wrong with a cache or seed folder is told once.
static void moe__cache_trouble(const moe_context *ctx, const char *path, const char *what, int32_t number)
{
    if (ctx->jit->quiet) return;
    ctx->jit->quiet = 1;
    if (number == 0)
        moe__log(ctx, MOE_LOG_WARNING, "cache folder %q %s: kernels stay in memory", path, what);
    else
        moe__log(ctx, MOE_LOG_WARNING, "cache folder %q %s (system error %d): kernels stay in memory", path, what,
                 number);
}

#if defined(_WIN32)
// Folders of a user's profile keep others out by their access rights, which new files inherit.
typedef struct moe__folder {
    char path[MOE__PATH_MAX];
} moe__folder;

static int32_t moe__folder_open(const moe_context *ctx, const char *path, int32_t create, moe__folder *folder)
{
    wchar_t wide[MOE__PATH_MAX];
    char digest[17];
    size_t length = strlen(path);
    moe__text text = moe__text_make(folder->path, sizeof folder->path);
    (void)ctx;
    moe__entry_folder(digest);
    moe__text_format(&text, "%s\\v1\\%s", path, digest);
    for (size_t i = 3; create && i <= text.length; i++) {
        char c = folder->path[i];
        if (c != 0 && c != '\\' && c != '/') continue;
        folder->path[i] = 0;
        CreateDirectoryW(moe__wide(wide, folder->path), NULL); // there already: as well
        folder->path[i] = c;
    }
    return length > 0 && moe__path_look(folder->path) == MOE__PATH_FOLDER;
}

static void moe__folder_close(moe__folder *folder) { (void)folder; }

static int32_t moe__folder_read(const moe_context *ctx, moe__folder *folder, const char *name, moe__file *out)
{
    char path[MOE__PATH_MAX];
    return moe__path_join(path, folder->path, name, NULL) == MOE_OK &&
           moe__file_read(&ctx->desc.allocator, path, MOE__ENTRY_HEADER + MOE__ENTRY_MAX, out, NULL) == MOE_OK;
}

static int32_t moe__folder_write(moe__folder *folder, const char *name, const moe__span *spans, int32_t count)
{
    char path[MOE__PATH_MAX];
    moe_error err;
    if (moe__path_join(path, folder->path, name, &err) != MOE_OK) return 1;
    return moe__file_write_atomic(path, spans, count, &err) == MOE_OK ? 0 : 1;
}
#else
typedef struct moe__folder {
    int fd;
} moe__folder;

// A folder or file is believed if nobody but this user and root can have written it.
static const char *moe__untrusted(const struct stat *info)
{
    if (info->st_uid != geteuid() && info->st_uid != 0) return "belongs to another user";
    if ((info->st_mode & (S_IWGRP | S_IWOTH)) != 0) return "can be written by other users";
    return NULL;
}

// One step down, made where it is missing; never through a link. -1: errno says why, 0 for what *why says.
static int moe__folder_step(int at, const char *name, int32_t create, const char **why)
{
    const int flags = O_RDONLY | MOE__O_DIRECTORY | MOE__O_NOFOLLOW | MOE__O_CLOEXEC;
    struct stat info;
    int fd = at < 0 ? open(name, flags) : openat(at, name, flags);
    *why = NULL;
    if (fd < 0 && errno == ENOENT && create) {
        if ((at < 0 ? mkdir(name, 0700) : mkdirat(at, name, 0700)) != 0 && errno != EEXIST) return -1;
        fd = at < 0 ? open(name, flags) : openat(at, name, flags);
    }
    if (fd < 0) {
        if (errno == ELOOP || errno == ENOTDIR) *why = "is a link or no folder";
        return -1;
    }
    *why = fstat(fd, &info) == 0 ? moe__untrusted(&info) : "cannot be looked at";
    if (*why == NULL) return fd;
    close(fd);
    return -1;
}

// Missing folders above the cache folder itself.
static void moe__folder_parents(const char *path)
{
    char part[MOE__PATH_MAX];
    size_t length = strlen(path);
    memcpy(part, path, length + 1);
    for (size_t i = 1; i < length; i++) {
        if (part[i] != '/') continue;
        part[i] = 0;
        mkdir(part, 0700);
        part[i] = '/';
    }
}

// 1: open. 0: not there, or not to be used, which is logged.
static int32_t moe__folder_open(const moe_context *ctx, const char *path, int32_t create, moe__folder *folder)
{
    const char *why = NULL;
    char digest[17];
    const char *steps[2];
    int fd;
    moe__entry_folder(digest);
    steps[0] = "v1";
    steps[1] = digest;
    fd = moe__folder_step(-1, path, 0, &why);
    if (fd < 0 && why == NULL && errno == ENOENT && create) {
        moe__folder_parents(path);
        fd = moe__folder_step(-1, path, 1, &why);
    }
    for (int32_t i = 0; i < 2 && fd >= 0; i++) {
        int below = moe__folder_step(fd, steps[i], create, &why), number = errno;
        close(fd);
        errno = number;
        fd = below;
    }
    folder->fd = fd;
    if (fd >= 0) return 1;
    if (why != NULL) moe__cache_trouble(ctx, path, why, 0);
    else if (create || errno != ENOENT) moe__cache_trouble(ctx, path, "cannot be opened", (int32_t)errno);
    return 0;
}

static void moe__folder_close(moe__folder *folder) { close(folder->fd); }

// 1 and a file to be closed, or 0: not there, not to be believed, or not readable.
static int32_t moe__folder_read(const moe_context *ctx, moe__folder *folder, const char *name, moe__file *out)
{
    struct stat info;
    unsigned char *data = NULL;
    uint64_t size = 0, done = 0;
    int fd = openat(folder->fd, name, O_RDONLY | O_NONBLOCK | MOE__O_NOFOLLOW | MOE__O_CLOEXEC);
    memset(out, 0, sizeof *out);
    if (fd < 0) return 0;
    if (fstat(fd, &info) == 0 && S_ISREG(info.st_mode) && moe__untrusted(&info) == NULL && info.st_size > 0 &&
        info.st_size <= MOE__ENTRY_HEADER + MOE__ENTRY_MAX) {
        size = (uint64_t)info.st_size;
        data = (unsigned char *)moe__alloc(&ctx->desc.allocator, size + 1);
    }
    while (data != NULL && done < size) {
        int64_t got = moe__fd_read(fd, data + done, size - done);
        if (got <= 0) break;
        done += (uint64_t)got;
    }
    close(fd);
    out->data = data;
    out->size = size;
    if (data != NULL && done == size) return 1;
    moe__file_close(&ctx->desc.allocator, out);
    return 0;
}

// Under a name of its own, then renamed: readers see a whole entry or none. 0, or the system's error.
static int32_t moe__folder_write(moe__folder *folder, const char *name, const moe__span *spans, int32_t count)
{
    struct rlimit limit;
    char temp[192];
    uint64_t bytes = 0;
    int fd = -1, number = 0;
    for (int32_t i = 0; i < count; i++) bytes += spans[i].size;
    // Past this limit the system would send a signal that ends the process.
    if (getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY && limit.rlim_cur < bytes) return EFBIG;
    for (uint32_t attempt = 0; fd < 0 && attempt < 1000; attempt++) {
        moe__text text = moe__text_make(temp, sizeof temp);
        moe__text_format(&text, "%s.%u.%u.tmp", name, moe__process_id(), attempt);
        fd = openat(folder->fd, temp, O_WRONLY | O_CREAT | O_EXCL | MOE__O_NOFOLLOW | MOE__O_CLOEXEC, 0600);
        if (fd < 0 && errno != EEXIST) return (int32_t)errno;
    }
    if (fd < 0) return EEXIST;
    errno = 0;
    if (!moe__write_all(fd, spans, count)) number = errno != 0 ? errno : EIO;
    if (number == 0) number = moe__fd_flush(fd);
    close(fd);
    if (number == 0 && renameat(folder->fd, temp, folder->fd, name) != 0) number = errno;
    if (number != 0) unlinkat(folder->fd, temp, 0);
    return (int32_t)number;
}
#endif

static int32_t moe__cache_read(const moe_context *ctx, moe__build *build, const char *path, moe_error *err)
{
    moe__folder folder;
    moe__file file;
    char name[128];
    const char *defect;
    int32_t result = MOE_OK;
    if (path[0] == 0 || !moe__folder_open(ctx, path, 0, &folder)) return MOE_OK;
    moe__entry_name(build, name, sizeof name);
    if (moe__folder_read(ctx, &folder, name, &file)) {
        defect = moe__entry_defect(build, file.data, file.size);
        if (defect != NULL) {
            moe__log(ctx, MOE_LOG_WARNING, "cache entry %s in %q %s: passed over", name, path, defect);
        } else if ((result = moe__build_alloc(ctx, build, file.size - MOE__ENTRY_HEADER, err)) == MOE_OK) {
            memcpy(build->image, file.data + MOE__ENTRY_HEADER, (size_t)build->bytes);
            build->nvrtc_version = (int32_t)moe__get_le(file.data + 12, 4);
        }
        moe__file_close(&ctx->desc.allocator, &file);
    }
    moe__folder_close(&folder);
    return result;
}

// Puts a compiled image into the cache folder. Where that fails, the kernel is in memory all the same.
static int32_t moe__cache_write(const moe_context *ctx, const moe__build *build)
{
    moe__jit *jit = ctx->jit;
    moe__folder folder;
    moe__span spans[2];
    unsigned char header[MOE__ENTRY_HEADER];
    char name[128];
    int32_t number;
    if (jit->cache_dir[0] == 0 || jit->cache_mode != MOE_CACHE_READ_WRITE) return 0;
    if (!moe__folder_open(ctx, jit->cache_dir, 1, &folder)) return 0;
    moe__entry_header(build, header);
    moe__entry_name(build, name, sizeof name);
    spans[0].data = header;
    spans[0].size = sizeof header;
    spans[1].data = build->image;
    spans[1].size = build->bytes;
    number = moe__folder_write(&folder, name, spans, 2);
    moe__folder_close(&folder);
    if (number != 0) moe__cache_trouble(ctx, jit->cache_dir, "cannot be written", number);
    return number == 0;
}
#endif

// An image of the caller's for this name of a chip.
static int32_t moe__images_find(const moe_context *ctx, moe__build *build, const char *chip, moe_error *err)
{
    const moe__jit *jit = ctx->jit;
    unsigned char digest[32];
    char key[65];
    moe__text text = moe__text_make(key, sizeof key);
    moe__instance_key(build->instance, chip, digest);
    moe__text_hex(&text, digest, 32);
    for (int32_t i = 0; i < jit->num_images; i++) {
        const moe_jit_image *image = &jit->images[i];
        int32_t result;
        if (image->key == NULL || strcmp(image->key, key) != 0 || image->data == NULL || image->bytes == 0) continue;
        if ((result = moe__build_alloc(ctx, build, image->bytes, err)) == MOE_OK)
            memcpy(build->image, image->data, (size_t)image->bytes);
        return result;
    }
    return MOE_OK;
}

// The chip's own image, else PTX with what instances for the chip rely on: clusters from 9.0 on.
static int32_t moe__images_read(const moe_context *ctx, moe__build *build, moe_error *err)
{
    int32_t result;
    if (ctx->jit->num_images == 0) return MOE_OK;
    result = moe__images_find(ctx, build, build->chip, err);
    if (result != MOE_OK || build->image != NULL) return result;
    return moe__images_find(ctx, build, ctx->cuda->arch >= 90 ? "compute_90" : "compute_80", err);
}

// The image of a place, or none.
static int32_t moe__jit_read(const moe_context *ctx, moe__build *build, int32_t place, moe_error *err)
{
    if (place == MOE__PLACE_IMAGES) return moe__images_read(ctx, build, err);
#if !defined(MOE_NO_FILES)
    return moe__cache_read(ctx, build, place == MOE__PLACE_CACHE ? ctx->jit->cache_dir : ctx->jit->seed_dir, err);
#else
    return MOE_OK;
#endif
}

// ---- settings ----

#if !defined(MOE_NO_FILES)
// base + name into dir [MOE__PATH_MAX], if base is a usable folder of the environment's. Returns whether it is.
static int32_t moe__cache_below(char *dir, const char *variable, const char *name)
{
    const char *base = moe__env_folder(variable);
    moe__text text = moe__text_make(dir, MOE__PATH_MAX);
    if (base == NULL) return 0;
    moe__text_format(&text, "%s/%s", base, name);
    return 1;
}

// Where the cache folder is when the caller does not say.
static void moe__cache_default(char *dir)
{
    const char *given = moe__env_folder("MOE_CACHE_DIR");
    moe__text text = moe__text_make(dir, MOE__PATH_MAX);
    if (given != NULL) {
        moe__text_string(&text, given);
        return;
    }
#  if defined(_WIN32)
    moe__cache_below(dir, "LOCALAPPDATA", "moe");
#  else
    if (moe__cache_below(dir, "XDG_CACHE_HOME", "moe")) return;
#    if defined(__APPLE__)
    moe__cache_below(dir, "HOME", "Library/Caches/moe");
#    else
    moe__cache_below(dir, "HOME", ".cache/moe");
#    endif
#  endif
}
#endif

static int32_t moe__jit_path(char *out, const char *path, const char *member, moe_error *err)
{
    if (path == NULL || path[0] == 0) return MOE_OK;
    if (strlen(path) >= MOE__PATH_MAX - 64)
        return moe__fail(err, MOE_ERROR_ARGUMENT, member, "is longer than %d bytes", MOE__PATH_MAX - 65);
    strcpy(out, path);
    return MOE_OK;
}

static int32_t moe__cache_mode(int32_t wanted, int32_t *mode, moe_error *err)
{
    const char *value = moe__env("MOE_CACHE");
    *mode = wanted;
    if (wanted < MOE_CACHE_DEFAULT || wanted > MOE_CACHE_OFF)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "desc.jit.cache_mode", "is %d: it must be a moe_cache_mode", wanted);
    if (wanted != MOE_CACHE_DEFAULT) return MOE_OK;
    if (value == NULL || strcmp(value, "rw") == 0) *mode = MOE_CACHE_READ_WRITE;
    else if (strcmp(value, "ro") == 0) *mode = MOE_CACHE_READ_ONLY;
    else if (strcmp(value, "off") == 0) *mode = MOE_CACHE_OFF;
    else return moe__fail(err, MOE_ERROR_ARGUMENT, "MOE_CACHE", "is %q: it must be rw, ro or off", value);
    return MOE_OK;
}

static int32_t moe__jit_resolve(moe_context *ctx, const moe_jit_desc *desc, moe_error *err)
{
    moe__jit *jit = ctx->jit;
    int32_t result;
    if (desc->num_images < 0 || (desc->num_images > 0 && desc->images == NULL))
        return moe__fail(err, MOE_ERROR_ARGUMENT, "desc.jit.num_images", "is %d with images %s", desc->num_images,
                         desc->images == NULL ? "NULL" : "set");
    jit->images = desc->images;
    jit->num_images = desc->num_images;
    if ((result = moe__jit_path(jit->nvrtc_library, desc->nvrtc_library, "desc.jit.nvrtc_library", err)) != MOE_OK ||
        (result = moe__jit_path(jit->cache_dir, desc->cache_dir, "desc.jit.cache_dir", err)) != MOE_OK ||
        (result = moe__jit_path(jit->seed_dir, desc->seed_dir, "desc.jit.seed_dir", err)) != MOE_OK ||
        (result = moe__cache_mode(desc->cache_mode, &jit->cache_mode, err)) != MOE_OK)
        return result;
#if !defined(MOE_NO_FILES)
    if (jit->cache_dir[0] == 0) moe__cache_default(jit->cache_dir);
#endif
    if (jit->cache_mode == MOE_CACHE_OFF) jit->cache_dir[0] = 0;
    return MOE_OK;
}

// Where it should lie, once it is compiled.
static void moe__jit_write(const moe_context *ctx, const moe__build *build)
{
#if !defined(MOE_NO_FILES)
    moe__cache_write(ctx, build);
#else
    (void)ctx;
    (void)build;
#endif
}

// ---- loading ----

enum { MOE__BUILDS_MAX = 32 }; // kernels of one plan

// Looks through everything but the compiler. What the driver refuses is passed over. *out NULL: nowhere.
static int32_t moe__jit_find(moe_context *ctx, moe__build *build, moe__kernel **out, moe_error *err)
{
    *out = moe__kernel_find(ctx->jit, build->key);
    for (int32_t place = 0; *out == NULL && place < MOE__PLACES; place++) {
        moe_error refused;
        int32_t result = moe__jit_read(ctx, build, place, err);
        if (result != MOE_OK) return result;
        if (build->image == NULL) continue;
        result = moe__kernel_load(ctx, build, out, &refused);
        moe__build_drop(ctx, build);
        if (result == MOE_OK) {
            moe__log(ctx, MOE_LOG_INFO, "kernel %s for %s: from %s", build->instance->name, build->chip,
                     moe__place_names[place]);
        } else if (result == MOE_ERROR_LOAD) {
            moe__log(ctx, MOE_LOG_WARNING, "kernel %s for %s from %s is passed over: %s", build->instance->name,
                     build->chip, moe__place_names[place], refused.text);
        } else {
            if (err != NULL) *err = refused;
            return result;
        }
    }
    return MOE_OK;
}

static int32_t moe__jit_load_builds(moe_context *ctx, moe__build *builds, int32_t count, moe__kernel **kernels,
                                    moe_error *err)
{
    moe__build *missing[MOE__BUILDS_MAX];
    int32_t place[MOE__BUILDS_MAX], misses = 0, result = MOE_OK;
    for (int32_t i = 0; i < count; i++) {
        if ((result = moe__jit_find(ctx, &builds[i], &kernels[i], err)) != MOE_OK) return result;
        if (kernels[i] != NULL) continue;
        place[misses] = i;
        missing[misses++] = &builds[i];
    }
    if (misses > 0) result = moe__jit_compile(ctx, missing, misses, err);
    for (int32_t i = 0; i < misses; i++) {
        if (result == MOE_OK) result = moe__kernel_load(ctx, missing[i], &kernels[place[i]], err);
        if (result == MOE_OK) moe__jit_write(ctx, missing[i]);
        moe__build_drop(ctx, missing[i]);
    }
    return result;
}

// Kernels for the context's device, ready to launch. Calls of one context take turns.
static int32_t moe__jit_load(moe_context *ctx, const moe__instance *instances, int32_t count,
                             moe__cu_function *functions, moe_error *err)
{
    moe__build builds[MOE__BUILDS_MAX];
    moe__kernel *kernels[MOE__BUILDS_MAX];
    moe__cuda_scope scope;
    int32_t result;
    MOE_ASSERT(count <= MOE__BUILDS_MAX);
    for (int32_t i = 0; i < count; i++) moe__build_init(&builds[i], &instances[i], ctx->cuda->chip);
    moe__lock_enter(&ctx->jit->lock);
    if ((result = moe__cuda_begin(ctx, &scope, err)) == MOE_OK) {
        result = moe__jit_load_builds(ctx, builds, count, kernels, err);
        for (int32_t i = 0; i < count && result == MOE_OK; i++) {
            result = moe__kernel_smem(ctx, kernels[i], &instances[i], err);
            functions[i] = kernels[i]->function;
        }
        moe__cuda_end(ctx, &scope);
    }
    moe__lock_leave(&ctx->jit->lock);
    return result;
}

// ---- life ----

static void moe__jit_close(moe_context *ctx)
{
    moe__jit *jit = ctx->jit;
    moe__cuda_scope scope;
    int32_t entered;
    if (jit == NULL) return;
    entered = jit->kernels != NULL && moe__cuda_begin(ctx, &scope, NULL) == MOE_OK;
    while (jit->kernels != NULL) {
        moe__kernel *kernel = jit->kernels;
        jit->kernels = kernel->next;
        if (entered) ctx->cuda->cuModuleUnload(kernel->module);
        moe__free(&ctx->desc.allocator, kernel, sizeof *kernel);
    }
    if (entered) moe__cuda_end(ctx, &scope);
    moe__free(&ctx->desc.allocator, jit->source, jit->source_bytes);
    moe__lock_destroy(&jit->lock);
    moe__free(&ctx->desc.allocator, jit, sizeof *jit);
    ctx->jit = NULL;
}

static int32_t moe__jit_open(moe_context *ctx, const moe_jit_desc *desc, moe_error *err)
{
    moe__jit *jit = (moe__jit *)moe__alloc(&ctx->desc.allocator, sizeof *jit);
    int32_t result;
    if (jit == NULL) return moe__fail_memory(err, sizeof *jit);
    memset(jit, 0, sizeof *jit);
    if (!moe__lock_init(&jit->lock)) {
        moe__free(&ctx->desc.allocator, jit, sizeof *jit);
        return moe__fail(err, MOE_ERROR_MEMORY, "", "the system gave no lock");
    }
    ctx->jit = jit;
    if ((result = moe__jit_resolve(ctx, desc, err)) != MOE_OK) moe__jit_close(ctx);
    return result;
}

static void moe__cuda_info(const moe_context *ctx, moe_context_info *info)
{
    moe__text text = moe__text_make(info->cache_dir, sizeof info->cache_dir);
    strcpy(info->name, ctx->cuda->name);
    strcpy(info->chip, ctx->cuda->chip);
    info->isa[0] = 0;
    info->driver_version = ctx->cuda->driver_version;
    moe__lock_enter(&ctx->jit->lock);
    info->nvrtc_version = ctx->jit->nvrtc.version;
    moe__lock_leave(&ctx->jit->lock);
    moe__text_string(&text, ctx->jit->cache_dir);
}

static void moe__cuda_report(const moe_context *ctx)
{
    const char *dir = ctx->jit->cache_dir;
    moe__log(ctx, MOE_LOG_INFO, "CUDA back end on %s: %d SMs, kernels for %s, %s %s", ctx->cuda->name, ctx->cuda->sms,
             ctx->cuda->chip, dir[0] != 0 ? "cached in" : "not cached", dir);
}
#endif // MOE_NO_CUDA

// >>layout  how weights lie in memory  One block per expert with matrices here, then the shared experts as one more
// block, then fp32 tables. The CPU's matrices keep the checkpoint's type and are output-major rows, padded with zeros
// to 32 elements, so that a dot product has no tail; gate and up of a feature are neighbours, so that one tile holds
// both.
//
//     block   W1 [rows1][ld1]   bias1 f32 [rows1]   W2 [H][ld2]   bias2 f32 [H]     each part 256-aligned
//     rows1   gated: 2 I, row 2i gate i, row 2i + 1 up i; else I, row i
//
// Written by >>weights, read by >>cpu; the sizes are what moe_plan_query() reports.

enum { MOE__LAYOUT_CPU_ROWS = 0x43505501, MOE__LAYOUT_ALIGN = 256, MOE__ROW_ALIGN = 32 };

typedef struct moe__block_shape {
    int32_t features, first_feature; // of this rank's slice of I
    int32_t rows1, ld1, ld2;         // ld in elements
    uint64_t w1, bias1, w2, bias2;   // offsets in the block; biases UINT64_MAX when there are none
    uint64_t bytes;
} moe__block_shape;

typedef struct moe__layout {
    uint32_t id;
    int32_t dtype;                   // of the matrices
    int32_t blocks;                  // local routed experts, then always-on ones
    moe__block_shape expert, shared; // shared.bytes 0: none here
    uint64_t shared_offset;
    uint64_t table_offset[MOE_TENSOR_ROLES]; // fp32 tables (FORCED_IDS: int32); UINT64_MAX: the layer has none
    uint64_t table_count[MOE_TENSOR_ROLES];  // values; ROUTER: width * router_ld
    int32_t router_ld;
    int32_t reserved;
    uint64_t bytes;
} moe__layout;

static int32_t moe__format_dtype(int32_t format) // of the matrices; UNSET for what this version does not execute
{
    if (format == MOE_FORMAT_F32) return MOE_DTYPE_F32;
    if (format == MOE_FORMAT_BF16) return MOE_DTYPE_BF16;
    if (format == MOE_FORMAT_F16) return MOE_DTYPE_F16;
    return MOE_DTYPE_UNSET;
}

static void moe__block_make(moe__block_shape *shape, const moe_layer_desc *layer, int32_t size, int32_t bias1,
                            int32_t bias2, int32_t dtype)
{
    uint64_t element = (uint64_t)moe_dtype_bits(dtype) / 8, hidden = (uint64_t)layer->hidden_size, offset = 0;
    moe__parallel_slice(&layer->parallel, size, moe__format_group(layer), &shape->first_feature, &shape->features);
    shape->rows1 = shape->features * (moe__layer_is_gated(layer) ? 2 : 1);
    shape->ld1 = (int32_t)moe__align_up(hidden, MOE__ROW_ALIGN);
    shape->ld2 = (int32_t)moe__align_up((uint64_t)shape->features, MOE__ROW_ALIGN);
    shape->w1 = offset;
    offset = moe__align_up(offset + (uint64_t)shape->rows1 * (uint64_t)shape->ld1 * element, MOE__LAYOUT_ALIGN);
    shape->bias1 = bias1 ? offset : UINT64_MAX;
    if (bias1) offset = moe__align_up(offset + (uint64_t)shape->rows1 * 4, MOE__LAYOUT_ALIGN);
    shape->w2 = offset;
    offset = moe__align_up(offset + hidden * (uint64_t)shape->ld2 * element, MOE__LAYOUT_ALIGN);
    shape->bias2 = bias2 ? offset : UINT64_MAX;
    if (bias2) offset = moe__align_up(offset + hidden * 4, MOE__LAYOUT_ALIGN);
    shape->bytes = offset;
}

static int32_t moe__layout_table(moe__layout *layout, int32_t role, uint64_t rows, uint64_t columns)
{
    uint64_t count, bytes;
    if (!moe__mul(rows, columns, &count) || !moe__mul(count, 4, &bytes)) return 0;
    layout->table_offset[role] = layout->bytes;
    layout->table_count[role] = count;
    if (!moe__add(layout->bytes, bytes, &layout->bytes) || layout->bytes > UINT64_MAX / 2) return 0;
    layout->bytes = moe__align_up(layout->bytes, MOE__LAYOUT_ALIGN);
    return 1;
}

// Sizes and offsets of a resolved layer.
static int32_t moe__layout_make(moe__layout *layout, const moe_layer_desc *layer, moe_error *err)
{
    const moe_routing_desc *routing = &layer->routing;
    uint64_t experts = (uint64_t)layer->num_experts, hidden = (uint64_t)layer->hidden_size;
    uint64_t ranked = experts + (uint64_t)routing->special_experts,
             width = (uint64_t)moe__routing_width(routing, layer->num_experts);
    int32_t ok = 1;
    memset(layout, 0, sizeof *layout);
    memset(layout->table_offset, 0xff, sizeof layout->table_offset);
    layout->id = MOE__LAYOUT_CPU_ROWS;
    layout->dtype = moe__format_dtype(layer->format);
    if (layout->dtype == MOE_DTYPE_UNSET)
        return moe__fail(err, MOE_ERROR_UNSUPPORTED, "layer.format",
                         "is %s: this version of moe.h executes f32, bf16 and f16; "
                         "quantised formats are described and inferred, not run", moe_format_string(layer->format));
    layout->blocks = layer->parallel.local_experts + (layer->parallel.omit_common ? 0 : routing->extra_slots);
    moe__block_make(&layout->expert, layer, layer->intermediate_size, layer->gemm1_bias, layer->gemm2_bias,
                    layout->dtype);
    if (!moe__mul(layout->expert.bytes, (uint64_t)layout->blocks, &layout->bytes)) ok = 0;
    layout->shared_offset = layout->bytes;
    if (ok && layer->shared.count > 0 && !layer->parallel.omit_common) {
        moe__block_make(&layout->shared, layer, layer->shared.count * layer->shared.intermediate_size, 0, 0,
                        layout->dtype);
        ok = moe__add(layout->bytes, layout->shared.bytes, &layout->bytes);
    }
    layout->router_ld = (int32_t)moe__align_up((uint64_t)layer->router.input_size, MOE__ROW_ALIGN);
    ok = ok && moe__layout_table(layout, MOE_TENSOR_ROUTER, width, (uint64_t)layout->router_ld);
    if (layer->router.bias) ok = ok && moe__layout_table(layout, MOE_TENSOR_ROUTER_BIAS, width, 1);
    if (layer->router.input_scale)
        ok = ok && moe__layout_table(layout, MOE_TENSOR_ROUTER_INPUT_SCALE, (uint64_t)layer->router.input_size, 1);
    if (routing->global_scale) ok = ok && moe__layout_table(layout, MOE_TENSOR_ROUTER_GLOBAL_SCALE, 1, 1);
    if (routing->bias_rows > 0)
        ok = ok && moe__layout_table(layout, MOE_TENSOR_SELECT_BIAS, (uint64_t)routing->bias_rows, ranked);
    if (routing->per_expert_scale) ok = ok && moe__layout_table(layout, MOE_TENSOR_PER_EXPERT_SCALE, ranked, 1);
    if (routing->forced_rows > 0)
        ok = ok &&
             moe__layout_table(layout, MOE_TENSOR_FORCED_IDS, (uint64_t)routing->forced_rows, (uint64_t)routing->top_k);
    if (layer->activation.per_expert) {
        ok = ok && moe__layout_table(layout, MOE_TENSOR_ALPHA, experts, 1);
        ok = ok && moe__layout_table(layout, MOE_TENSOR_BETA, experts, 1);
        ok = ok && moe__layout_table(layout, MOE_TENSOR_LIMIT, experts, 1);
    }
    if (layer->row_norm) ok = ok && moe__layout_table(layout, MOE_TENSOR_ROW_NORM, hidden, 1);
    if (layer->shared.gate && layout->shared.bytes != 0)
        ok = ok && moe__layout_table(layout, MOE_TENSOR_SHARED_TOKEN_GATE, moe__align_up(hidden, MOE__ROW_ALIGN), 1);
    if (routing->special_kind == MOE_SPECIAL_CONSTANT)
        ok = ok && moe__layout_table(layout, MOE_TENSOR_CONSTANT, (uint64_t)routing->special_experts, hidden);
    if (!ok || layout->bytes > SIZE_MAX / 2)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "layer", "needs more weight memory than this machine can address");
    return MOE_OK;
}

#if !defined(MOE_NO_CUDA)
// Copies of the tables that the stages read, in one piece of device memory.
typedef struct moe__device_tables {
    moe__cu_ptr memory; // 0: none
    uint64_t bytes;
    uint64_t offset[MOE_TENSOR_ROLES]; // UINT64_MAX: not there
    int32_t router_bf16;               // every value of the router's matrix is one
    int32_t reserved;
} moe__device_tables;
#endif

struct moe_weights {
    moe_context *ctx;
    uint64_t self_bytes;      // of this struct with the arrays behind it: one allocation
    moe_layer_desc layer;     // resolved; parallel.expert_map points at the copy below
    int32_t *expert_map;      // [num_experts], or NULL
    moe__layout layout;
    unsigned char *memory;    // layout.bytes: owned, the caller's, or inside the mapping
    int32_t owns_memory;
    int32_t sealed;
    unsigned char **expert;   // [blocks] where each block lies: kernels reach experts through this table alone
    uint32_t *expert_set;     // [blocks] bit per role: set; MOE_TENSOR_CONSTANT among them
    uint32_t common_set;      // bit per role of the tables
    uint64_t shared_set[3];   // gate, up, down: bit per shared expert
    uint32_t *bias_rows_set;  // [bias_rows]
    uint32_t *constant_set;   // [special_experts]
    const void *mapping;      // of moe_weights_load(): read-only, so replaced experts lie outside; NULL: none
    uint64_t mapping_bytes;
#if !defined(MOE_NO_CUDA)
    moe__device_tables device; // made when sealed in a CUDA context
#endif
};

// One expert's matrices as the kernels take them; shared experts have the same form.
typedef struct moe__block {
    const moe__block_shape *shape;
    const unsigned char *w1, *w2; // [rows1][ld1], [H][ld2]
    const float *bias1, *bias2;   // or NULL
} moe__block;

static moe__block moe__block_at(const moe__block_shape *shape, const unsigned char *memory)
{
    moe__block block;
    block.shape = shape;
    block.w1 = memory + shape->w1;
    block.w2 = memory + shape->w2;
    block.bias1 = shape->bias1 == UINT64_MAX ? NULL : (const float *)(const void *)(memory + shape->bias1);
    block.bias2 = shape->bias2 == UINT64_MAX ? NULL : (const float *)(const void *)(memory + shape->bias2);
    return block;
}

static moe__block moe__weights_expert(const moe_weights *weights, int32_t local)
{
    return moe__block_at(&weights->layout.expert, weights->expert[local]);
}

static moe__block moe__weights_shared(const moe_weights *weights)
{
    return moe__block_at(&weights->layout.shared, weights->memory + weights->layout.shared_offset);
}

// A pruned expert's constant vector [H], stored at the start of its block; NULL when it has matrices.
static const float *moe__weights_expert_constant(const moe_weights *weights, int32_t local)
{
    if ((weights->expert_set[local] >> MOE_TENSOR_CONSTANT & 1u) == 0) return NULL;
    return (const float *)(const void *)weights->expert[local];
}

// An fp32 table, or NULL when the layer has none.
static const float *moe__weights_table(const moe_weights *weights, int32_t role)
{
    uint64_t offset = weights->layout.table_offset[role];
    return offset == UINT64_MAX ? NULL : (const float *)(const void *)(weights->memory + offset);
}

static const int32_t *moe__weights_forced_ids(const moe_weights *weights)
{
    return (const int32_t *)(const void *)moe__weights_table(weights, MOE_TENSOR_FORCED_IDS);
}

// >>weights  tensors into packed memory  A tensor is checked against the layer, then copied element by element into its
// final place: no second copy of a matrix exists at any time. A tensor that is refused changes nothing. Flags of one
// expert share a word with no other, so that several threads may fill different experts.

enum { MOE__TILE_ROWS = 128, MOE__TILE_COLUMNS = 32, MOE__RUN = 128 }; // elements copied at a time

typedef enum moe__tensor_kind {
    MOE__KIND_EXPERT = 0, // of one expert: matrix or bias, may come stacked
    MOE__KIND_SHARED = 1,
    MOE__KIND_TABLE = 2,
    MOE__KIND_CONSTANT = 3,
    MOE__KIND_IDS = 4
} moe__tensor_kind;

// What a role's tensor must be: whole, in natural order.
typedef struct moe__tensor_shape {
    int32_t kind;
    int32_t matrix;          // 0: a vector, rows x 1 where its rows follow a matrix's rows, else 1 x columns
    int32_t fused;
    int64_t rows, columns;
    const char *rows_from, *columns_from; // members of the layer; NULL for the side that is 1
} moe__tensor_shape;

static moe__tensor_shape moe__tensor_shape_make(int32_t kind, int64_t rows, int64_t columns, const char *rows_from,
                                                const char *columns_from)
{
    moe__tensor_shape shape;
    shape.kind = kind;
    shape.matrix = rows_from != NULL && columns_from != NULL;
    shape.fused = 0;
    shape.rows = rows;
    shape.columns = columns;
    shape.rows_from = rows_from;
    shape.columns_from = columns_from;
    return shape;
}

static int32_t moe__role_is_fused(int32_t role)
{
    return role == MOE_TENSOR_GATE_UP || role == MOE_TENSOR_GATE_UP_BIAS || role == MOE_TENSOR_SHARED_GATE_UP;
}

static int32_t moe__role_is_gate(int32_t role) // legal for gated activations alone
{
    return role == MOE_TENSOR_GATE || role == MOE_TENSOR_GATE_BIAS || role == MOE_TENSOR_SHARED_GATE ||
           moe__role_is_fused(role);
}

static int32_t moe__role_is_bias(int32_t role)
{
    return role >= MOE_TENSOR_GATE_BIAS && role <= MOE_TENSOR_DOWN_BIAS;
}

// Roles whose rows are output features of an expert, which a row order may shuffle.
static int32_t moe__role_has_order(int32_t role) { return role >= MOE_TENSOR_GATE && role <= MOE_TENSOR_SHARED_DOWN; }

static moe__tensor_shape moe__tensor_shape_of(const moe_layer_desc *layer, int32_t role)
{
    static const char *const hidden = "layer.hidden_size", *const inner = "layer.intermediate_size";
    static const char *const shared = "layer.shared.count * intermediate_size", *const experts = "layer.num_experts";
    static const char *const ranked = "routed and special experts";
    int64_t h = layer->hidden_size, i = layer->intermediate_size, e = layer->num_experts;
    int64_t s = (int64_t)layer->shared.count * layer->shared.intermediate_size, r = e + layer->routing.special_experts;
    int64_t w = moe__routing_width(&layer->routing, layer->num_experts);
    moe__tensor_shape shape;
    switch (role) {
    case MOE_TENSOR_GATE: case MOE_TENSOR_UP: case MOE_TENSOR_GATE_UP:
        shape = moe__tensor_shape_make(MOE__KIND_EXPERT, i, h, inner, hidden); break;
    case MOE_TENSOR_DOWN: shape = moe__tensor_shape_make(MOE__KIND_EXPERT, h, i, hidden, inner); break;
    case MOE_TENSOR_GATE_BIAS: case MOE_TENSOR_UP_BIAS: case MOE_TENSOR_GATE_UP_BIAS:
        shape = moe__tensor_shape_make(MOE__KIND_EXPERT, i, 1, inner, NULL); break;
    case MOE_TENSOR_DOWN_BIAS: shape = moe__tensor_shape_make(MOE__KIND_EXPERT, h, 1, hidden, NULL); break;
    case MOE_TENSOR_SHARED_GATE: case MOE_TENSOR_SHARED_UP: case MOE_TENSOR_SHARED_GATE_UP:
        shape = moe__tensor_shape_make(MOE__KIND_SHARED, s, h, shared, hidden); break;
    case MOE_TENSOR_SHARED_DOWN: shape = moe__tensor_shape_make(MOE__KIND_SHARED, h, s, hidden, shared); break;
    case MOE_TENSOR_ROUTER:
        shape = moe__tensor_shape_make(MOE__KIND_TABLE, w, layer->router.input_size, "router width",
                                       "layer.router.input_size"); break;
    case MOE_TENSOR_ROUTER_BIAS: shape = moe__tensor_shape_make(MOE__KIND_TABLE, 1, w, NULL, "router width"); break;
    case MOE_TENSOR_ROUTER_INPUT_SCALE:
        shape = moe__tensor_shape_make(MOE__KIND_TABLE, 1, layer->router.input_size, NULL, "layer.router.input_size");
        break;
    case MOE_TENSOR_ROUTER_GLOBAL_SCALE:
        shape = moe__tensor_shape_make(MOE__KIND_TABLE, 1, 1, NULL, "one value");
        break;
    case MOE_TENSOR_SELECT_BIAS:
        shape = moe__tensor_shape_make(MOE__KIND_TABLE, layer->routing.bias_rows, r, "layer.routing.bias_rows", ranked);
        break;
    case MOE_TENSOR_PER_EXPERT_SCALE: shape = moe__tensor_shape_make(MOE__KIND_TABLE, 1, r, NULL, ranked); break;
    case MOE_TENSOR_FORCED_IDS:
        shape = moe__tensor_shape_make(MOE__KIND_IDS, layer->routing.forced_rows, layer->routing.top_k,
                                       "layer.routing.forced_rows", "layer.routing.top_k"); break;
    case MOE_TENSOR_ALPHA: case MOE_TENSOR_BETA: case MOE_TENSOR_LIMIT:
        shape = moe__tensor_shape_make(MOE__KIND_TABLE, 1, e, NULL, experts); break;
    case MOE_TENSOR_CONSTANT: shape = moe__tensor_shape_make(MOE__KIND_CONSTANT, 1, h, NULL, hidden); break;
    default: shape = moe__tensor_shape_make(MOE__KIND_TABLE, 1, h, NULL, hidden); break; // SHARED_TOKEN_GATE, ROW_NORM
    }
    shape.fused = moe__role_is_fused(role);
    if (shape.fused) shape.rows *= 2;
    return shape;
}

// The member whose 0 says that the layer has no tensor of this role; NULL: it has.
static const char *moe__role_absent(const moe_layer_desc *layer, int32_t role)
{
    const moe_routing_desc *routing = &layer->routing;
    switch (role) {
    case MOE_TENSOR_GATE_BIAS: case MOE_TENSOR_UP_BIAS: case MOE_TENSOR_GATE_UP_BIAS:
        return layer->gemm1_bias ? NULL : "layer.gemm1_bias";
    case MOE_TENSOR_DOWN_BIAS: return layer->gemm2_bias ? NULL : "layer.gemm2_bias";
    case MOE_TENSOR_SHARED_GATE: case MOE_TENSOR_SHARED_UP: case MOE_TENSOR_SHARED_GATE_UP: case MOE_TENSOR_SHARED_DOWN:
        return layer->shared.count > 0 ? NULL : "layer.shared.count";
    case MOE_TENSOR_SHARED_TOKEN_GATE: return layer->shared.gate ? NULL : "layer.shared.gate";
    case MOE_TENSOR_ROUTER_BIAS: return layer->router.bias ? NULL : "layer.router.bias";
    case MOE_TENSOR_ROUTER_INPUT_SCALE: return layer->router.input_scale ? NULL : "layer.router.input_scale";
    case MOE_TENSOR_ROUTER_GLOBAL_SCALE: return routing->global_scale ? NULL : "layer.routing.global_scale";
    case MOE_TENSOR_SELECT_BIAS: return routing->bias_rows > 0 ? NULL : "layer.routing.bias_rows";
    case MOE_TENSOR_PER_EXPERT_SCALE: return routing->per_expert_scale ? NULL : "layer.routing.per_expert_scale";
    case MOE_TENSOR_FORCED_IDS: return routing->forced_rows > 0 ? NULL : "layer.routing.forced_rows";
    case MOE_TENSOR_ALPHA: case MOE_TENSOR_BETA: case MOE_TENSOR_LIMIT:
        return layer->activation.per_expert ? NULL : "layer.activation.per_expert";
    case MOE_TENSOR_ROW_NORM: return layer->row_norm ? NULL : "layer.row_norm";
    default: return NULL;
    }
}

// ---- refusals ----

static void moe__text_role(moe__text *text, int32_t role, int32_t expert)
{
    if (role <= MOE_TENSOR_UNSET || role >= MOE_TENSOR_ROLES) {
        moe__text_string(text, "a tensor");
        return;
    }
    moe__text_string(text, moe_role_string(role));
    if (expert >= 0) moe__text_format(text, " of expert %d", expert);
}

static void moe__text_dims(moe__text *text, const int64_t *dims, int32_t rank)
{
    moe__text_char(text, '[');
    for (int32_t i = 0; i < rank; i++) {
        if (i > 0) moe__text_string(text, ", ");
        moe__text_i64(text, dims[i]);
    }
    moe__text_char(text, ']');
}

// "moe: <member> of "name" (up of expert 3) <format...>"
static int32_t moe__fail_tensor(moe_error *err, int32_t code, const char *member, const moe_tensor *tensor,
                                const char *format, ...)
{
    char who[256], what[320];
    moe__text text = moe__text_make(who, sizeof who);
    va_list args;
    if (tensor->name != NULL) {
        moe__text_quoted(&text, tensor->name);
        moe__text_string(&text, " (");
    }
    moe__text_role(&text, tensor->role, tensor->expert);
    if (tensor->name != NULL) moe__text_char(&text, ')');
    text = moe__text_make(what, sizeof what);
    va_start(args, format);
    moe__text_vformat(&text, format, args);
    va_end(args);
    return moe__fail(err, code, member, "of %s %s", who, what);
}

// ---- checks ----

typedef struct moe__checked {
    moe_tensor tensor;       // full copy
    moe__tensor_shape shape; // of one matrix of it
    int32_t stacked;         // [E, ...]
    int32_t index;           // one of several shared experts, or one row of the selection bias; -1: all
} moe__checked;

static int32_t moe__check_dtype(const moe_tensor *t, int32_t kind, moe_error *err)
{
    if (t->dtype == MOE_DTYPE_UNSET)
        return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.dtype", t, "is not set: it must be a moe_dtype");
    if (kind == MOE__KIND_IDS) {
        if (t->dtype == MOE_DTYPE_I32 || t->dtype == MOE_DTYPE_I64) return MOE_OK;
        return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.dtype", t, "is %s: ids are i32 or i64",
                                moe_dtype_string(t->dtype));
    }
    if (moe__is_float_dtype(t->dtype)) return MOE_OK;
    if (t->dtype >= MOE_DTYPE_E4M3 && t->dtype <= MOE_DTYPE_INT4)
        return moe__fail_tensor(err, MOE_ERROR_UNSUPPORTED, "tensor.dtype", t,
                                "is %s: this version of moe.h takes f32, "
                                "bf16 and f16; quantised tensors need a newer one", moe_dtype_string(t->dtype));
    return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.dtype", t, "is %s: it must be f32, bf16 or f16",
                            moe_dtype_string(t->dtype));
}

// How the source lies: layout, halves, row order, where its bytes come from.
static int32_t moe__check_storage(const moe_tensor *t, int32_t kind, moe_error *err)
{
    if (t->layout < MOE_LAYOUT_UNSET || t->layout > MOE_LAYOUT_BLOCK_MAJOR_K)
        return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.layout", t, "is %d: it must be a moe_weight_layout",
                                t->layout);
    if (t->row_order < MOE_ROWS_NATURAL || t->row_order > MOE_ROWS_SHUFFLED_64)
        return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.row_order", t, "is %d: it must be a moe_row_order",
                                t->row_order);
    if (t->row_order != MOE_ROWS_NATURAL && !moe__role_has_order(t->role))
        return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.row_order", t,
                                "is %d: only experts' matrices and biases come shuffled", t->row_order);
    if (moe__role_is_fused(t->role)) {
        if (t->halves < MOE_HALVES_GATE_UP || t->halves > MOE_HALVES_INTERLEAVED_UP_GATE)
            return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.halves", t, "is %d: a fused tensor needs "
                                    "MOE_HALVES_GATE_UP, _UP_GATE, _INTERLEAVED or _INTERLEAVED_UP_GATE", t->halves);
    } else if (t->halves != MOE_HALVES_UNSET && t->halves != MOE_HALVES_SEPARATE) {
        return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.halves", t,
                                "is %d: the tensor is not fused, leave it 0", t->halves);
    }
    if (t->memory == MOE_MEMORY_DEVICE)
        return moe__fail_tensor(err, MOE_ERROR_UNSUPPORTED, "tensor.memory", t,
                                "is MOE_MEMORY_DEVICE: the CPU back end reads host memory only");
    if (t->memory != MOE_MEMORY_HOST)
        return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.memory", t, "is %d: it must be a moe_memory",
                                t->memory);
    if (t->rows == NULL) {
        if (t->data == NULL)
            return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.data", t, "is NULL, and so is rows");
        return moe__check_dtype(t, kind, err);
    }
    if (t->data != NULL)
        return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.data", t, "is set beside rows: leave one NULL");
    if (kind == MOE__KIND_IDS)
        return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.rows", t, "is set: ids come as i32 or i64 data");
    if (t->layout > MOE_LAYOUT_MAJOR_K || t->row_order != MOE_ROWS_NATURAL)
        return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.rows", t,
                                "is set: it yields rows in natural order, leave layout and row_order 0");
    return MOE_OK;
}

static int32_t moe__check_role(const moe_tensor *t, const moe_layer_desc *layer, moe_error *err)
{
    const char *absent;
    if (t->role == MOE_TENSOR_UNSET)
        return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.role", t, "is not set: it must be a moe_tensor_role");
    if (t->role < 0 || t->role >= MOE_TENSOR_ROLES)
        return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.role", t, "is %d: it must be a moe_tensor_role",
                                t->role);
    if (t->part < MOE_PART_DATA || t->part > MOE_PART_SHAPE)
        return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.part", t, "is %d: it must be a moe_tensor_part",
                                t->part);
    if (t->part != MOE_PART_DATA)
        return moe__fail_tensor(err, MOE_ERROR_UNSUPPORTED, "tensor.part", t,
                                "is %d, which quantised formats have: this "
                                "version of moe.h takes MOE_PART_DATA of f32, bf16 and f16", t->part);
    if ((absent = moe__role_absent(layer, t->role)) != NULL)
        return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.role", t, "does not belong to this layer: %s is 0",
                                absent);
    if (moe__role_is_gate(t->role) && !moe__layer_is_gated(layer))
        return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.role", t, "does not belong to this layer: "
                                "layer.activation.kind is %s, which has no gate; its GEMM1 matrix is MOE_TENSOR_UP",
                                moe_activation_string(layer->activation.kind));
    return MOE_OK;
}

static int32_t moe__check_expert(const moe_tensor *t, const moe_layer_desc *layer, int32_t kind, moe_error *err)
{
    int32_t routed = layer->num_experts, special = layer->routing.special_experts, extra = layer->routing.extra_slots;
    int32_t ids = routed + special + extra, e = t->expert;
    if (kind != MOE__KIND_EXPERT && kind != MOE__KIND_CONSTANT) {
        if (e == -1) return MOE_OK;
        return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.expert", t,
                                "is %d: the tensor is not of one expert, it must be -1", e);
    }
    if (e < (kind == MOE__KIND_EXPERT ? -1 : 0) || e >= ids)
        return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.expert", t, "is %d: it must be 0..%d%s", e, ids - 1,
                                kind == MOE__KIND_EXPERT ? ", or -1 for a stack of all routed experts" : "");
    if (e >= routed && e < routed + special) {
        if (kind == MOE__KIND_EXPERT)
            return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.expert", t,
                                    "is %d: experts %d..%d are special ones without matrices",
                                    e, routed, routed + special - 1);
        if (layer->routing.special_kind != MOE_SPECIAL_CONSTANT)
            return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.expert", t, "is %d, a special expert, but "
                                    "layer.routing.special_kind is not MOE_SPECIAL_CONSTANT", e);
    }
    return MOE_OK;
}

static int64_t moe__block_elements(const moe_tensor *t) { return 128 * 8 / moe_dtype_bits(t->dtype); }

// Stored dimensions of one matrix or vector; returns their number.
static int32_t moe__stored_dims(const moe_tensor *t, const moe__tensor_shape *shape, int64_t *dims)
{
    if (!shape->matrix) {
        dims[0] = shape->rows * shape->columns;
        return 1;
    }
    if (t->layout == MOE_LAYOUT_BLOCK_MAJOR_K) {
        dims[2] = moe__block_elements(t);
        dims[0] = shape->columns / dims[2];
        dims[1] = shape->rows;
        return 3;
    }
    dims[0] = t->layout == MOE_LAYOUT_MAJOR_MN ? shape->columns : shape->rows;
    dims[1] = t->layout == MOE_LAYOUT_MAJOR_MN ? shape->rows : shape->columns;
    return 2;
}

// 1 when the tensor's dims are those of the shape. A vector may have a leading 1, a single value no dims at all.
static int32_t moe__dims_fit(const moe_tensor *t, const moe__tensor_shape *shape, int64_t stack)
{
    int64_t dims[4];
    int32_t rank = moe__stored_dims(t, shape, dims), skip = 0;
    if (stack > 0) {
        if (t->rank < 1 || t->dims[0] != stack) return 0;
        skip = 1;
    } else if (!shape->matrix) {
        if (t->rank == 0) return dims[0] == 1;
        if (t->rank == 2 && t->dims[0] == 1) skip = 1;
    }
    if (t->rank != rank + skip) return 0;
    for (int32_t i = 0; i < rank; i++)
        if (t->dims[skip + i] != dims[i]) return 0;
    return 1;
}

static int32_t moe__fail_dims(const moe_tensor *t, const moe__tensor_shape *shape, int64_t stack, moe_error *err)
{
    char given[112], wanted[112], from[112];
    int64_t dims[4] = { stack, 0, 0, 0 };
    int32_t skip = stack > 0;
    int32_t rank = skip + moe__stored_dims(t, shape, dims + skip);
    int32_t swapped = t->layout == MOE_LAYOUT_MAJOR_MN;
    const char *first = swapped ? shape->columns_from : shape->rows_from;
    const char *second = swapped ? shape->rows_from : shape->columns_from;
    moe__text text = moe__text_make(given, sizeof given);
    moe__text_dims(&text, t->dims, t->rank);
    moe__text_format(&text, " %s", t->rows != NULL ? "by rows" : moe_dtype_string(t->dtype));
    text = moe__text_make(wanted, sizeof wanted);
    moe__text_dims(&text, dims, rank);
    text = moe__text_make(from, sizeof from);
    if (skip) moe__text_string(&text, "layer.num_experts, ");
    if (shape->fused && first == shape->rows_from) moe__text_string(&text, "2 x ");
    if (first != NULL) moe__text_string(&text, first);
    if (first != NULL && second != NULL) moe__text_string(&text, ", ");
    if (shape->fused && shape->matrix && second == shape->rows_from) moe__text_string(&text, "2 x ");
    if (second != NULL) moe__text_string(&text, second);
    if (t->layout == MOE_LAYOUT_BLOCK_MAJOR_K && shape->matrix)
        moe__text_string(&text, "; BLOCK_MAJOR_K: [in / block, out, block]");
    return moe__fail_tensor(
        err, MOE_ERROR_ARGUMENT, "tensor.dims", t, "is %s: it must be %s, from %s%s", given, wanted, from,
        !skip && shape->kind == MOE__KIND_EXPERT && t->rank == rank + 1 ? " (a stack of all experts has expert -1)"
                                                                        : "");
}

// One of several shared experts, or one row of the selection bias: by shape, and then by index.
static int32_t moe__check_index(moe__checked *c, const moe_layer_desc *layer, moe_error *err)
{
    const moe_tensor *t = &c->tensor;
    int32_t count = 1;
    moe__tensor_shape one = c->shape;
    if (c->shape.kind == MOE__KIND_SHARED) {
        count = layer->shared.count;
        if (t->role == MOE_TENSOR_SHARED_DOWN) one.columns /= count;
        else one.rows /= count;
        one.rows_from = t->role == MOE_TENSOR_SHARED_DOWN ? one.rows_from : "layer.shared.intermediate_size";
        one.columns_from = t->role == MOE_TENSOR_SHARED_DOWN ? "layer.shared.intermediate_size" : one.columns_from;
    } else if (t->role == MOE_TENSOR_SELECT_BIAS) {
        count = layer->routing.bias_rows;
        one.rows = 1;
        one.matrix = 0;
        one.rows_from = NULL;
    } else {
        return MOE_OK;
    }
    if (t->index < -1 || t->index >= count)
        return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.index", t, "is %d: it must be 0..%d, or -1 for all",
                                t->index, count - 1);
    if (count > 1 && ((t->rows != NULL && t->rank == 0) || moe__dims_fit(t, &c->shape, 0))) {
        if (t->index > 0)
            return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.index", t,
                                    "is %d, but the tensor has all %d: it must be -1", t->index, count);
        return MOE_OK;
    }
    if (count > 1 && t->index < 0) return MOE_OK; // the shape of all is expected, and missed
    c->shape = one;
    c->index = count == 1 ? 0 : t->index;
    return MOE_OK;
}

static int32_t moe__check_dims(moe__checked *c, const moe_layer_desc *layer, moe_error *err)
{
    moe_tensor *t = &c->tensor;
    int64_t stack = c->stacked ? layer->num_experts : 0, block;
    int32_t result;
    uint64_t bytes;
    if (t->rank < 0 || t->rank > 4)
        return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.rank", t, "is %d: it must be 0..4", t->rank);
    if (c->shape.matrix && t->layout == MOE_LAYOUT_BLOCK_MAJOR_K && c->shape.columns % moe__block_elements(t) != 0)
        return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.layout", t,
                                "is MOE_LAYOUT_BLOCK_MAJOR_K, whose blocks of %D %s elements do not divide %D (%s)",
                                moe__block_elements(t), moe_dtype_string(t->dtype), c->shape.columns,
                                c->shape.columns_from);
    if ((result = moe__check_index(c, layer, err)) != MOE_OK) return result;
    if (t->rows == NULL || t->rank != 0)
        if (!moe__dims_fit(t, &c->shape, stack)) return moe__fail_dims(t, &c->shape, stack, err);
    block = t->row_order == MOE_ROWS_SHUFFLED_128 ? 32 : t->row_order == MOE_ROWS_SHUFFLED_64 ? 16 : 1;
    if (c->shape.rows % block != 0)
        return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.row_order", t,
                                "shuffles blocks of %D rows, but there are %D rows", block, c->shape.rows);
    if (t->rows != NULL) return MOE_OK;
    bytes = (uint64_t)(c->shape.rows * c->shape.columns) * (uint64_t)(moe_dtype_bits(t->dtype) / 8);
    if (!moe__mul(bytes, stack > 0 ? (uint64_t)stack : 1, &bytes) || t->data_bytes != bytes)
        return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.data_bytes", t, "is %U: dims and dtype make %U",
                                t->data_bytes, bytes);
    return MOE_OK;
}

// The gate that every tensor passes: behind it nothing is checked again.
static int32_t moe__tensor_check(moe__checked *c, const moe_layer_desc *layer, const moe_tensor *tensor, moe_error *err)
{
    int32_t result;
    if ((result = moe__copy_desc(&c->tensor, sizeof c->tensor, tensor, "tensor", err)) != MOE_OK) return result;
    if ((result = moe__check_role(&c->tensor, layer, err)) != MOE_OK) return result;
    c->shape = moe__tensor_shape_of(layer, c->tensor.role);
    c->index = -1;
    if (c->tensor.expert == 0 && c->shape.kind != MOE__KIND_EXPERT && c->shape.kind != MOE__KIND_CONSTANT)
        c->tensor.expert = -1; // zero-initialised
    if ((result = moe__check_storage(&c->tensor, c->shape.kind, err)) != MOE_OK ||
        (result = moe__check_expert(&c->tensor, layer, c->shape.kind, err)) != MOE_OK)
        return result;
    c->stacked = c->shape.kind == MOE__KIND_EXPERT && c->tensor.expert < 0;
    return moe__check_dims(c, layer, err);
}

// ---- copying ----

// One matrix or vector on its way into packed memory. A row of the source belongs to a half and a feature; the features
// first_row .. first_row + count_rows - 1 of a half go to rows out_row + feature * out_step + half of `out`.
typedef struct moe__pack {
    const moe_tensor *tensor;
    int32_t expert;                       // told to tensor->rows
    int32_t fused, half;                  // half: of a tensor that is not fused; 0 gate, 1 up
    const unsigned char *data;            // NULL: tensor->rows
    int32_t dtype, layout, row_order;
    int64_t rows, columns;                // of the source
    int64_t first_row, count_rows, first_column, count_columns;
    unsigned char *out;
    int32_t out_dtype;
    int64_t out_ld, out_row, out_step, out_column, out_end; // zeros behind the columns, up to out_end
} moe__pack;

// Where natural row `row` of the source goes: a row of `out`, or -1.
static int64_t moe__pack_target(const moe__pack *p, int64_t row)
{
    int64_t half = p->half, feature = row;
    if (p->fused) {
        int32_t halves = p->tensor->halves;
        int32_t alternate = halves == MOE_HALVES_INTERLEAVED || halves == MOE_HALVES_INTERLEAVED_UP_GATE;
        half = alternate ? row % 2 : row / (p->rows / 2);
        feature = alternate ? row / 2 : row % (p->rows / 2);
        if (halves == MOE_HALVES_UP_GATE || halves == MOE_HALVES_INTERLEAVED_UP_GATE) half = 1 - half;
    }
    feature -= p->first_row;
    if (feature < 0 || feature >= p->count_rows) return -1;
    return p->out_row + feature * p->out_step + half;
}

// Where natural row `row` lies in the source. TRTLLM-Gen's shuffle of a block of 8 s rows takes row j to
// (j mod s) * 8 + j / s, so that an accumulator's registers hold neighbours.
static int64_t moe__pack_stored_row(const moe__pack *p, int64_t row)
{
    int64_t s = p->row_order == MOE_ROWS_SHUFFLED_128 ? 4 : 2, in_block = row % (8 * s);
    if (p->row_order == MOE_ROWS_NATURAL) return row;
    return row - in_block + in_block % s * 8 + in_block / s;
}

// n elements `stride` apart to fp32.
static void moe__widen_run(const unsigned char *in, int32_t dtype, int64_t stride, float *out, int64_t n)
{
    uint16_t narrow;
    if (dtype == MOE_DTYPE_F32) {
        for (int64_t i = 0; i < n; i++) memcpy(out + i, in + 4 * i * stride, 4);
    } else if (dtype == MOE_DTYPE_BF16) {
        for (int64_t i = 0; i < n; i++) {
            memcpy(&narrow, in + 2 * i * stride, 2);
            out[i] = moe__bf16_to_f32(narrow);
        }
    } else {
        for (int64_t i = 0; i < n; i++) {
            memcpy(&narrow, in + 2 * i * stride, 2);
            out[i] = moe__f16_to_f32(narrow);
        }
    }
}

static void moe__narrow_run(const float *in, unsigned char *out, int32_t dtype, int64_t n)
{
    uint16_t narrow;
    if (dtype == MOE_DTYPE_F32) {
        memcpy(out, in, (size_t)n * 4);
    } else if (dtype == MOE_DTYPE_BF16) {
        for (int64_t i = 0; i < n; i++) {
            narrow = moe__f32_to_bf16(in[i]);
            memcpy(out + 2 * i, &narrow, 2);
        }
    } else {
        for (int64_t i = 0; i < n; i++) {
            narrow = moe__f32_to_f16(in[i]);
            memcpy(out + 2 * i, &narrow, 2);
        }
    }
}

// n elements `stride` apart into a run of out_dtype.
static void moe__convert_run(const unsigned char *in, int32_t dtype, int64_t stride, unsigned char *out,
                             int32_t out_dtype, int64_t n)
{
    float wide[MOE__RUN];
    int64_t element = moe_dtype_bits(dtype) / 8, out_element = moe_dtype_bits(out_dtype) / 8;
    if (dtype == out_dtype && stride == 1) {
        memcpy(out, in, (size_t)(n * element));
    } else if (dtype == out_dtype && element == 2) {
        for (int64_t i = 0; i < n; i++) memcpy(out + 2 * i, in + 2 * i * stride, 2);
    } else {
        for (int64_t at = 0, run = MOE__RUN; at < n; at += run) {
            if (n - at < run) run = n - at;
            moe__widen_run(in + at * stride * element, dtype, stride, wide, run);
            moe__narrow_run(wide, out + at * out_element, out_dtype, run);
        }
    }
}

// Where the first of the columns of row `target` goes.
static unsigned char *moe__pack_out(const moe__pack *p, int64_t target)
{
    return p->out + (target * p->out_ld + p->out_column) * (moe_dtype_bits(p->out_dtype) / 8);
}

static void moe__pack_pad(const moe__pack *p, int64_t target)
{
    int64_t element = moe_dtype_bits(p->out_dtype) / 8, end = p->out_column + p->count_columns;
    if (end < p->out_end)
        memset(p->out + (target * p->out_ld + end) * element, 0, (size_t)((p->out_end - end) * element));
}

// Natural row `row` of an output-major source: in one piece, or in blocks of 128 bytes.
static void moe__pack_row(const moe__pack *p, int64_t row, int64_t target)
{
    int64_t element = moe_dtype_bits(p->dtype) / 8, stored = moe__pack_stored_row(p, row);
    int64_t block = p->layout == MOE_LAYOUT_BLOCK_MAJOR_K ? 128 / element : p->columns;
    int64_t column = p->first_column, end = column + p->count_columns;
    unsigned char *out = moe__pack_out(p, target);
    while (column < end) {
        int64_t run = block - column % block < end - column ? block - column % block : end - column;
        moe__convert_run(p->data + ((column / block * p->rows + stored) * block + column % block) * element, p->dtype,
                         1, out, p->out_dtype, run);
        out += run * (moe_dtype_bits(p->out_dtype) / 8);
        column += run;
    }
}

// Rows [first, first + count) of an input-major source: a few columns of all of them at a time, since neighbouring rows
// share the source's cache lines and pages.
static void moe__pack_across(const moe__pack *p, int64_t first, int64_t count)
{
    int64_t element = moe_dtype_bits(p->dtype) / 8, out_element = moe_dtype_bits(p->out_dtype) / 8;
    for (int64_t done = 0, n = MOE__TILE_COLUMNS; done < p->count_columns; done += n) {
        if (p->count_columns - done < n) n = p->count_columns - done;
        for (int64_t row = first; row < first + count; row++) {
            int64_t target = moe__pack_target(p, row), stored = moe__pack_stored_row(p, row);
            if (target < 0) continue;
            moe__convert_run(p->data + ((p->first_column + done) * p->rows + stored) * element, p->dtype, p->rows,
                             moe__pack_out(p, target) + done * out_element, p->out_dtype, n);
        }
    }
}

static void moe__pack_tile(const moe__pack *p, int64_t first, int64_t count)
{
    int32_t across = p->layout == MOE_LAYOUT_MAJOR_MN;
    if (across) moe__pack_across(p, first, count);
    for (int64_t row = first; row < first + count; row++) {
        int64_t target = moe__pack_target(p, row);
        if (target < 0) continue;
        if (!across) moe__pack_row(p, row, target);
        moe__pack_pad(p, target);
    }
}

static int32_t moe__pack_call(const moe__pack *p, int64_t row, float *out, moe_error *err)
{
    const moe_tensor *t = p->tensor;
    int32_t code = t->rows(t->rows_user, t->role, p->expert, (int32_t)row, out);
    if (code == 0) return MOE_OK;
    return moe__fail_tensor(err, MOE_ERROR_DATA, "tensor.rows", t, "returned %d for row %D", code, row);
}

// Rows from a callback: a buffer of one row, or of the whole vector.
static int32_t moe__pack_rows(const moe_allocator *allocator, moe__pack *p, int32_t matrix, moe_error *err)
{
    uint64_t bytes = (uint64_t)(matrix ? p->columns : p->rows * p->columns) * sizeof(float);
    float *buffer = (float *)moe__alloc(allocator, bytes);
    int32_t result = MOE_OK;
    if (buffer == NULL) return moe__fail_memory(err, bytes);
    if (!matrix) {
        result = moe__pack_call(p, 0, buffer, err);
        p->data = (const unsigned char *)buffer;
        for (int64_t row = 0; result == MOE_OK && row < p->rows; row++) moe__pack_tile(p, row, 1);
    }
    for (int64_t row = 0; matrix && result == MOE_OK && row < p->rows; row++) {
        int64_t target = moe__pack_target(p, row);
        if (target < 0) continue;
        result = moe__pack_call(p, row, buffer, err);
        if (result != MOE_OK) break;
        moe__convert_run((const unsigned char *)(buffer + p->first_column), MOE_DTYPE_F32, 1, moe__pack_out(p, target),
                         p->out_dtype, p->count_columns);
        moe__pack_pad(p, target);
    }
    p->data = NULL;
    moe__free(allocator, buffer, bytes);
    return result;
}

static int32_t moe__pack_run(const moe_allocator *allocator, moe__pack *p, int32_t matrix, moe_error *err)
{
    if (p->data == NULL) return moe__pack_rows(allocator, p, matrix, err);
    for (int64_t row = 0, n = MOE__TILE_ROWS; row < p->rows; row += n) {
        if (p->rows - row < n) n = p->rows - row;
        moe__pack_tile(p, row, n);
    }
    return MOE_OK;
}

// The source side; `position` is the place in a stack. The whole matrix goes to `out`, one row after the other.
static moe__pack moe__pack_make(const moe__checked *c, int32_t expert, int32_t position, unsigned char *out,
                                int32_t out_dtype, int64_t out_ld)
{
    moe__pack p;
    const moe_tensor *t = &c->tensor;
    memset(&p, 0, sizeof p);
    p.tensor = t;
    p.expert = expert;
    p.fused = c->shape.fused;
    p.dtype = t->rows != NULL ? MOE_DTYPE_F32 : t->dtype;
    p.layout = c->shape.matrix ? t->layout : (int32_t)MOE_LAYOUT_MAJOR_K;
    p.row_order = t->row_order;
    p.rows = c->shape.rows;
    p.columns = c->shape.columns;
    if (t->rows == NULL)
        p.data = (const unsigned char *)t->data +
                 (uint64_t)position * (uint64_t)(p.rows * p.columns) * (uint64_t)(moe_dtype_bits(t->dtype) / 8);
    p.count_rows = p.rows;
    p.count_columns = p.columns;
    p.out = out;
    p.out_dtype = out_dtype;
    p.out_ld = p.out_end = out_ld;
    p.out_step = 1;
    return p;
}

// A matrix or bias into an expert's or the shared experts' block. The source has the features from `base` on.
static int32_t moe__pack_block(const moe_weights *weights, const moe__checked *c, const moe__block_shape *shape,
                               int32_t base, int32_t expert, int32_t position, unsigned char *block, moe_error *err)
{
    int32_t role = c->tensor.role, gated = moe__layer_is_gated(&weights->layer), dtype = weights->layout.dtype;
    int32_t first = shape->first_feature - base;
    moe__pack p;
    switch (role) {
    case MOE_TENSOR_DOWN: case MOE_TENSOR_SHARED_DOWN:
        p = moe__pack_make(c, expert, position, block + shape->w2, dtype, shape->ld2);
        p.first_column = moe__max32(first, 0);
        p.out_column = first > 0 ? 0 : -first;
        p.count_columns = moe__min32(first + shape->features, (int32_t)p.columns) - p.first_column;
        if (p.out_column + p.count_columns < shape->features) p.out_end = 0; // another shared expert follows
        if (p.count_columns <= 0) return MOE_OK;
        break;
    case MOE_TENSOR_DOWN_BIAS:
        p = moe__pack_make(c, expert, position, block + shape->bias2, MOE_DTYPE_F32, 1);
        break;
    default:
        if (moe__role_is_bias(role)) p = moe__pack_make(c, expert, position, block + shape->bias1, MOE_DTYPE_F32, 1);
        else p = moe__pack_make(c, expert, position, block + shape->w1, dtype, shape->ld1);
        p.half = gated && !moe__role_is_gate(role);
        p.out_step = gated ? 2 : 1;
        p.first_row = moe__max32(first, 0);
        p.out_row = first > 0 ? 0 : -(int64_t)first * p.out_step;
        p.count_rows = moe__min32(first + shape->features, (int32_t)(p.rows / (p.fused ? 2 : 1))) - p.first_row;
        if (p.count_rows <= 0) return MOE_OK;
        break;
    }
    return moe__pack_run(&weights->ctx->desc.allocator, &p, c->shape.matrix, err);
}

// ---- setting ----

// Bits of the separate tensors that one of `role` brings.
static uint32_t moe__role_bits(int32_t role)
{
    if (role == MOE_TENSOR_GATE_UP) return 1u << MOE_TENSOR_GATE | 1u << MOE_TENSOR_UP;
    if (role == MOE_TENSOR_GATE_UP_BIAS) return 1u << MOE_TENSOR_GATE_BIAS | 1u << MOE_TENSOR_UP_BIAS;
    return 1u << role;
}

static int32_t moe__fail_doubled(const moe_tensor *t, moe_error *err)
{
    return moe__fail_tensor(err, MOE_ERROR_STATE, "tensor.role", t,
                            "was set before, alone or as half of a fused tensor");
}

// An expert is either matrices or a constant.
static int32_t moe__check_unset(const moe_tensor *t, uint32_t set, moe_error *err)
{
    uint32_t bits = moe__role_bits(t->role), constant = 1u << MOE_TENSOR_CONSTANT;
    if ((set & bits) != 0) return moe__fail_doubled(t, err);
    if (set != 0 && ((set | bits) & constant) != 0)
        return moe__fail_tensor(err, MOE_ERROR_STATE, "tensor.role", t,
                                "does not go with what was set before: an expert has matrices or a constant");
    return MOE_OK;
}

// One expert's tensor into `block`; *set are the expert's flags.
static int32_t moe__set_in_block(const moe_weights *weights, const moe__checked *c, int32_t expert, int32_t position,
                                 unsigned char *block, uint32_t *set, moe_error *err)
{
    moe_tensor named = c->tensor;
    int32_t result;
    named.expert = expert;
    if ((result = moe__check_unset(&named, *set, err)) != MOE_OK) return result;
    if (c->tensor.role == MOE_TENSOR_CONSTANT) {
        moe__pack p = moe__pack_make(c, expert, 0, block, MOE_DTYPE_F32, c->shape.columns);
        memset(block, 0, (size_t)weights->layout.expert.bytes);
        result = moe__pack_run(&weights->ctx->desc.allocator, &p, 0, err);
    } else {
        result = moe__pack_block(weights, c, &weights->layout.expert, 0, expert, position, block, err);
    }
    if (result == MOE_OK) *set |= moe__role_bits(c->tensor.role);
    return result;
}

static int32_t moe__set_expert(moe_weights *weights, const moe__checked *c, moe_error *err)
{
    int32_t local = moe__layer_local(&weights->layer, c->tensor.expert);
    if (local < 0) return MOE_OK; // another rank's
    return moe__set_in_block(weights, c, c->tensor.expert, 0, weights->expert[local], &weights->expert_set[local], err);
}

static int32_t moe__set_stacked(moe_weights *weights, const moe__checked *c, moe_error *err)
{
    int32_t result = MOE_OK, experts = weights->layer.num_experts;
    moe_tensor named = c->tensor;
    for (named.expert = 0; named.expert < experts; named.expert++) {
        int32_t local = moe__layer_local(&weights->layer, named.expert);
        if (local >= 0 && (result = moe__check_unset(&named, weights->expert_set[local], err)) != MOE_OK) return result;
    }
    for (int32_t e = 0; e < experts && result == MOE_OK; e++) {
        int32_t local = moe__layer_local(&weights->layer, e);
        uint32_t set = 0; // the flags are written last: a stack that fails is not set at all
        if (local >= 0) result = moe__set_in_block(weights, c, e, e, weights->expert[local], &set, err);
    }
    for (int32_t e = 0; e < experts && result == MOE_OK; e++) {
        int32_t local = moe__layer_local(&weights->layer, e);
        if (local >= 0) weights->expert_set[local] |= moe__role_bits(c->tensor.role);
    }
    return result;
}

static int32_t moe__set_shared(moe_weights *weights, const moe__checked *c, moe_error *err)
{
    const moe_shared_desc *shared = &weights->layer.shared;
    int32_t role = c->tensor.role, result;
    uint64_t all = shared->count == 64 ? UINT64_MAX : ((uint64_t)1 << shared->count) - 1;
    uint64_t bits = c->index < 0 ? all : (uint64_t)1 << c->index;
    int32_t gate = role != MOE_TENSOR_SHARED_UP && role != MOE_TENSOR_SHARED_DOWN,
            down = role == MOE_TENSOR_SHARED_DOWN;
    int32_t up = role == MOE_TENSOR_SHARED_UP || role == MOE_TENSOR_SHARED_GATE_UP;
    if (weights->layout.shared.bytes == 0) return MOE_OK; // another rank's
    if ((gate && (weights->shared_set[0] & bits) != 0) || (up && (weights->shared_set[1] & bits) != 0) ||
        (down && (weights->shared_set[2] & bits) != 0))
        return moe__fail_doubled(&c->tensor, err);
    result =
        moe__pack_block(weights, c, &weights->layout.shared, c->index < 0 ? 0 : c->index * shared->intermediate_size,
                        -1, 0, weights->memory + weights->layout.shared_offset, err);
    if (result != MOE_OK) return result;
    if (gate) weights->shared_set[0] |= bits;
    if (up) weights->shared_set[1] |= bits;
    if (down) weights->shared_set[2] |= bits;
    return MOE_OK;
}

static int32_t moe__set_ids(moe_weights *weights, const moe__checked *c, unsigned char *out, moe_error *err)
{
    int64_t n = c->shape.rows * c->shape.columns;
    int32_t legal = weights->layer.num_experts + weights->layer.routing.special_experts;
    for (int64_t i = 0; i < n; i++) {
        int64_t row = c->tensor.layout == MOE_LAYOUT_MAJOR_MN ? i % c->shape.rows : i / c->shape.columns;
        int64_t column = c->tensor.layout == MOE_LAYOUT_MAJOR_MN ? i / c->shape.rows : i % c->shape.columns, id = 0;
        int32_t narrow = 0;
        if (c->tensor.dtype == MOE_DTYPE_I64) {
            memcpy(&id, (const unsigned char *)c->tensor.data + i * 8, 8);
        } else {
            memcpy(&narrow, (const unsigned char *)c->tensor.data + i * 4, 4);
            id = narrow;
        }
        if (id < 0 || id >= legal)
            return moe__fail_tensor(err, MOE_ERROR_DATA, "tensor.data", &c->tensor,
                                    "has id %D in row %D: ids are 0..%d", id, row, legal - 1);
        narrow = (int32_t)id;
        memcpy(out + (row * c->shape.columns + column) * 4, &narrow, 4);
    }
    return MOE_OK;
}

// Flags of a table: one, or one for each row of the selection bias.
static int32_t moe__table_is_set(const moe_weights *weights, int32_t role, int32_t index)
{
    if (role != MOE_TENSOR_SELECT_BIAS) return (int32_t)(weights->common_set >> role & 1u);
    for (int32_t i = 0; i < weights->layer.routing.bias_rows; i++)
        if ((index < 0 || i == index) && weights->bias_rows_set[i] != 0) return 1;
    return 0;
}

static int32_t moe__set_table(moe_weights *weights, const moe__checked *c, moe_error *err)
{
    int32_t role = c->tensor.role, result;
    unsigned char *out;
    if (weights->layout.table_offset[role] == UINT64_MAX) return MOE_OK; // another rank's
    out = weights->memory + weights->layout.table_offset[role];
    if (moe__table_is_set(weights, role, c->index)) return moe__fail_doubled(&c->tensor, err);
    if (role == MOE_TENSOR_FORCED_IDS) {
        result = moe__set_ids(weights, c, out, err);
    } else {
        int64_t ld = role == MOE_TENSOR_ROUTER              ? weights->layout.router_ld
                     : role == MOE_TENSOR_SHARED_TOKEN_GATE ? (int64_t)weights->layout.table_count[role]
                                                            : c->shape.columns;
        moe__pack p = moe__pack_make(c, -1, 0, out, MOE_DTYPE_F32, ld);
        if (c->index > 0) p.out_row = c->index;
        result = moe__pack_run(&weights->ctx->desc.allocator, &p, c->shape.matrix, err);
    }
    if (result != MOE_OK) return result;
    weights->common_set |= 1u << role;
    if (role == MOE_TENSOR_SELECT_BIAS)
        for (int32_t i = 0; i < weights->layer.routing.bias_rows; i++)
            if (c->index < 0 || i == c->index) weights->bias_rows_set[i] = 1;
    return MOE_OK;
}

static int32_t moe__set_constant(moe_weights *weights, const moe__checked *c, moe_error *err)
{
    int32_t special = c->tensor.expert - weights->layer.num_experts, result;
    moe__pack p;
    if (special < 0 || special >= weights->layer.routing.special_experts) return moe__set_expert(weights, c, err);
    if (weights->constant_set[special]) return moe__fail_doubled(&c->tensor, err);
    p = moe__pack_make(c, c->tensor.expert, 0, weights->memory + weights->layout.table_offset[MOE_TENSOR_CONSTANT],
                       MOE_DTYPE_F32, c->shape.columns);
    p.out_row = special;
    result = moe__pack_run(&weights->ctx->desc.allocator, &p, 0, err);
    if (result == MOE_OK) weights->constant_set[special] = 1;
    return result;
}

MOE_API int32_t moe_weights_set_tensor(moe_weights *weights, const moe_tensor *tensor, moe_error *err)
{
    moe__checked c;
    int32_t result;
    if (weights == NULL) return moe__fail_null(err, "weights");
    if (tensor == NULL) return moe__fail_null(err, "tensor");
    if ((result = moe__tensor_check(&c, &weights->layer, tensor, err)) != MOE_OK) return result;
    if (weights->sealed)
        return moe__fail_tensor(err, MOE_ERROR_STATE, "weights", &c.tensor, "are sealed: set every tensor before "
                                "moe_weights_seal(), or use moe_weights_replace_expert()");
    switch (c.shape.kind) {
    case MOE__KIND_EXPERT:
        result = c.stacked ? moe__set_stacked(weights, &c, err) : moe__set_expert(weights, &c, err);
        break;
    case MOE__KIND_SHARED: result = moe__set_shared(weights, &c, err); break;
    case MOE__KIND_CONSTANT: result = moe__set_constant(weights, &c, err); break;
    default: result = moe__set_table(weights, &c, err); break;
    }
    return result == MOE_OK ? moe__ok(err) : result;
}

// ---- what is needed ----

typedef struct moe__missing {
    int32_t count;
    int32_t role, expert, index; // of the first
} moe__missing;

static void moe__miss(moe__missing *missing, int32_t is_set, int32_t role, int32_t expert, int32_t index)
{
    if (is_set) return;
    if (missing->count++ > 0) return;
    missing->role = role;
    missing->expert = expert;
    missing->index = index;
}

static void moe__missing_of_expert(moe__missing *missing, const moe_layer_desc *layer, int32_t expert, uint32_t set)
{
    static const int32_t matrices[] = { MOE_TENSOR_GATE, MOE_TENSOR_UP, MOE_TENSOR_DOWN,
                                        MOE_TENSOR_GATE_BIAS, MOE_TENSOR_UP_BIAS, MOE_TENSOR_DOWN_BIAS };
    if ((set >> MOE_TENSOR_CONSTANT & 1u) != 0) return;
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(matrices); i++) {
        int32_t role = matrices[i];
        if (moe__role_is_gate(role) && !moe__layer_is_gated(layer)) continue;
        if (moe__role_absent(layer, role) == NULL) moe__miss(missing, (int32_t)(set >> role & 1u), role, expert, -1);
    }
}

static void moe__missing_of_shared(moe__missing *missing, const moe_weights *weights)
{
    static const int32_t roles[] = { MOE_TENSOR_SHARED_GATE, MOE_TENSOR_SHARED_UP, MOE_TENSOR_SHARED_DOWN };
    int32_t count = weights->layout.shared.bytes != 0 ? weights->layer.shared.count : 0;
    for (int32_t i = 0; i < 3; i++)
        for (int32_t j = 0; j < count; j++)
            if (i > 0 || moe__layer_is_gated(&weights->layer))
                moe__miss(missing, (int32_t)(weights->shared_set[i] >> j & 1u), roles[i], -1, count > 1 ? j : -1);
}

// The one list of what a layer needs. The router is optional, because engines may bring logits; with it come its bias
// and scale. One of alpha, beta and limit is enough: the others keep the layer's value.
static moe__missing moe__weights_missing(const moe_weights *weights)
{
    const moe_layer_desc *layer = &weights->layer;
    const uint32_t set = weights->common_set, router = 1u << MOE_TENSOR_ROUTER;
    const uint32_t tables = 1u << MOE_TENSOR_ALPHA | 1u << MOE_TENSOR_BETA | 1u << MOE_TENSOR_LIMIT;
    int32_t first_extra = layer->num_experts + layer->routing.special_experts;
    moe__missing missing;
    memset(&missing, 0, sizeof missing);
    for (int32_t e = 0; e < first_extra + layer->routing.extra_slots; e++) {
        int32_t local = moe__layer_local(layer, e);
        if (local >= 0) moe__missing_of_expert(&missing, layer, e, weights->expert_set[local]);
        else if (e >= layer->num_experts && e < first_extra && layer->routing.special_kind == MOE_SPECIAL_CONSTANT)
            moe__miss(&missing, layer->parallel.omit_common || weights->constant_set[e - layer->num_experts] != 0,
                      MOE_TENSOR_CONSTANT, e, -1);
    }
    moe__missing_of_shared(&missing, weights);
    for (int32_t role = MOE_TENSOR_SHARED_TOKEN_GATE; role < MOE_TENSOR_CONSTANT; role++) {
        if (weights->layout.table_offset[role] == UINT64_MAX || role == MOE_TENSOR_ROUTER) continue;
        if ((tables >> role & 1u) != 0) continue;
        if ((role == MOE_TENSOR_ROUTER_BIAS || role == MOE_TENSOR_ROUTER_INPUT_SCALE) && (set & router) == 0) continue;
        if (role == MOE_TENSOR_SELECT_BIAS) {
            for (int32_t i = 0; i < layer->routing.bias_rows; i++)
                moe__miss(&missing, weights->bias_rows_set[i] != 0, role, -1, layer->routing.bias_rows > 1 ? i : -1);
        } else {
            moe__miss(&missing, (int32_t)(set >> role & 1u), role, -1, -1);
        }
    }
    if (layer->activation.per_expert) moe__miss(&missing, (set & tables) != 0, MOE_TENSOR_ALPHA, -1, -1);
    return missing;
}

// "gate of expert 3, and 5 more tensors"
static void moe__text_missing(moe__text *text, const moe__missing *missing)
{
    moe__text_role(text, missing->role, missing->expert);
    if (missing->index >= 0) moe__text_format(text, " %d", missing->index);
    if (missing->role == MOE_TENSOR_ALPHA) moe__text_string(text, ", beta or limit");
    if (missing->count == 2) moe__text_string(text, ", and 1 more tensor");
    if (missing->count > 2) moe__text_format(text, ", and %d more tensors", missing->count - 1);
}

// ---- tables on the device ----

#if !defined(MOE_NO_CUDA)
// Sizes and offsets of the tables that are set; rows of the router's matrix keep their zeros at the end.
static void moe__device_tables_make(const moe_weights *weights, moe__device_tables *device)
{
    static const int32_t roles[] = { MOE_TENSOR_ROUTER, MOE_TENSOR_ROUTER_BIAS, MOE_TENSOR_ROUTER_INPUT_SCALE,
                                     MOE_TENSOR_ROUTER_GLOBAL_SCALE, MOE_TENSOR_SELECT_BIAS,
                                     MOE_TENSOR_PER_EXPERT_SCALE, MOE_TENSOR_FORCED_IDS };
    memset(device, 0, sizeof *device);
    memset(device->offset, 0xff, sizeof device->offset);
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(roles); i++) {
        uint64_t count = weights->layout.table_count[roles[i]];
        const float *table = (const float *)(const void *)(weights->memory + weights->layout.table_offset[roles[i]]);
        if (weights->layout.table_offset[roles[i]] == UINT64_MAX || (weights->common_set >> roles[i] & 1u) == 0)
            continue;
        device->offset[roles[i]] = device->bytes;
        if (roles[i] == MOE_TENSOR_ROUTER) {
            device->router_bf16 = 1;
            for (uint64_t j = 0; j < count && device->router_bf16; j++)
                device->router_bf16 = (moe__f32_bits(table[j]) & 0xffffu) == 0;
        }
        device->bytes += roles[i] == MOE_TENSOR_ROUTER && device->router_bf16 ? count * 2 : count * 4;
        device->bytes = moe__align_up(device->bytes, MOE__LAYOUT_ALIGN);
    }
}

static int32_t moe__device_tables_upload(moe_weights *weights, moe_error *err)
{
    moe__device_tables *device = &weights->device;
    const moe_allocator *allocator = &weights->ctx->desc.allocator;
    unsigned char *staging;
    int32_t result;
    if (weights->ctx->desc.backend != MOE_BACKEND_CUDA) return MOE_OK;
    moe__device_tables_make(weights, device);
    if (device->bytes == 0) return MOE_OK;
    staging = (unsigned char *)moe__alloc(allocator, device->bytes);
    if (staging == NULL) return moe__fail_memory(err, device->bytes);
    memset(staging, 0, (size_t)device->bytes);
    for (int32_t role = 0; role < MOE_TENSOR_ROLES; role++) {
        const unsigned char *table = weights->memory + weights->layout.table_offset[role];
        uint64_t count = weights->layout.table_count[role];
        if (device->offset[role] == UINT64_MAX) continue;
        if (role != MOE_TENSOR_ROUTER || !device->router_bf16) {
            memcpy(staging + device->offset[role], table, (size_t)count * 4);
            continue;
        }
        for (uint64_t i = 0; i < count; i++) {
            uint16_t high = (uint16_t)(moe__f32_bits(((const float *)(const void *)table)[i]) >> 16);
            memcpy(staging + device->offset[role] + 2 * i, &high, 2);
        }
    }
    result = moe__device_make(weights->ctx, staging, device->bytes, &device->memory, err);
    moe__free(allocator, staging, device->bytes);
    return result;
}

// A table on the device, or NULL.
static const void *moe__device_table(const moe_weights *weights, int32_t role)
{
    uint64_t offset = weights->device.offset[role];
    return offset == UINT64_MAX ? NULL : (const void *)(uintptr_t)(weights->device.memory + offset);
}
#endif

MOE_API int32_t moe_weights_seal(moe_weights *weights, moe_error *err)
{
    moe__missing missing;
    if (weights == NULL) return moe__fail_null(err, "weights");
    if (weights->sealed) return moe__fail(err, MOE_ERROR_STATE, "weights", "are sealed already");
    missing = moe__weights_missing(weights);
    if (missing.count > 0) {
        char what[160];
        moe__text text = moe__text_make(what, sizeof what);
        moe__text_missing(&text, &missing);
        return moe__fail(err, MOE_ERROR_MISSING, "weights", "lack %s", what);
    }
#if !defined(MOE_NO_CUDA)
    {
        int32_t result = moe__device_tables_upload(weights, err);
        if (result != MOE_OK) return result;
    }
#endif
    weights->sealed = 1;
    moe__log(weights->ctx, MOE_LOG_INFO, "weights of layer %d: %d experts, %U bytes", weights->layer.layer_index,
             weights->layout.blocks, weights->layout.bytes);
    return moe__ok(err);
}

// ---- life ----

// The struct with its arrays: everything but the packed memory. `layer` is resolved.
static int32_t moe__weights_new(moe_context *ctx, const moe_layer_desc *layer, moe_weights **out, moe_error *err)
{
    moe__layout layout;
    moe_weights *weights = NULL;
    uint64_t blocks, experts = (uint64_t)layer->num_experts, bytes;
    unsigned char *at;
    int32_t result = moe__layout_make(&layout, layer, err);
    if (result != MOE_OK) return result;
    blocks = (uint64_t)layout.blocks;
    bytes = moe__align_up(sizeof *weights, 16) + blocks * (sizeof *weights->expert + sizeof *weights->expert_set);
    bytes +=
        (experts + (uint64_t)layer->routing.bias_rows + (uint64_t)layer->routing.special_experts) * sizeof(int32_t);
    weights = (moe_weights *)moe__alloc(&ctx->desc.allocator, bytes);
    if (weights == NULL) return moe__fail_memory(err, bytes);
    memset(weights, 0, (size_t)bytes);
    weights->ctx = ctx;
    weights->self_bytes = bytes;
    weights->layer = *layer;
    weights->layout = layout;
    at = (unsigned char *)weights + moe__align_up(sizeof *weights, 16);
    weights->expert = (unsigned char **)(void *)at;
    at += blocks * sizeof *weights->expert;
    weights->expert_set = (uint32_t *)(void *)at;
    at += blocks * sizeof *weights->expert_set;
    weights->bias_rows_set = (uint32_t *)(void *)at;
    at += (uint64_t)layer->routing.bias_rows * sizeof(uint32_t);
    weights->constant_set = (uint32_t *)(void *)at;
    at += (uint64_t)layer->routing.special_experts * sizeof(uint32_t);
    if (layer->parallel.expert_map != NULL) {
        weights->expert_map = (int32_t *)(void *)at;
        memcpy(weights->expert_map, layer->parallel.expert_map, (size_t)experts * sizeof(int32_t));
        weights->layer.parallel.expert_map = weights->expert_map;
    }
    *out = weights;
    return MOE_OK;
}

static void moe__weights_place(moe_weights *weights, unsigned char *memory)
{
    weights->memory = memory;
    for (int32_t i = 0; i < weights->layout.blocks; i++)
        weights->expert[i] = memory + (uint64_t)i * weights->layout.expert.bytes;
}

// Zeros what no tensor writes: the gaps between the parts of a block. Padding of rows is written with them.
static void moe__block_clear(const moe__block_shape *shape, const moe_layer_desc *layer, int32_t dtype,
                             unsigned char *block)
{
    uint64_t element = (uint64_t)moe_dtype_bits(dtype) / 8, ends[4], parts[4];
    parts[0] = (uint64_t)shape->rows1 * (uint64_t)shape->ld1 * element;
    parts[1] = shape->bias1 == UINT64_MAX ? 0 : shape->bias1 + (uint64_t)shape->rows1 * 4;
    parts[2] = shape->w2 + (uint64_t)layer->hidden_size * (uint64_t)shape->ld2 * element;
    parts[3] = shape->bias2 == UINT64_MAX ? 0 : shape->bias2 + (uint64_t)layer->hidden_size * 4;
    for (int32_t i = 0; i < 4; i++) {
        ends[i] = moe__align_up(parts[i], MOE__LAYOUT_ALIGN);
        memset(block + parts[i], 0, (size_t)(ends[i] - parts[i]));
    }
}

static void moe__weights_clear(moe_weights *weights)
{
    static const int32_t roles[] = { MOE_TENSOR_ALPHA, MOE_TENSOR_BETA, MOE_TENSOR_LIMIT };
    const moe__layout *layout = &weights->layout;
    const moe_activation_desc *act = &weights->layer.activation;
    float values[3];
    uint64_t tables = layout->shared_offset + layout->shared.bytes;
    for (int32_t i = 0; i < layout->blocks; i++)
        moe__block_clear(&layout->expert, &weights->layer, layout->dtype, weights->expert[i]);
    if (layout->shared.bytes != 0)
        moe__block_clear(&layout->shared, &weights->layer, layout->dtype, weights->memory + layout->shared_offset);
    memset(weights->memory + tables, 0, (size_t)(layout->bytes - tables));
    values[0] = act->alpha;
    values[1] = act->beta;
    values[2] = act->limit;
    for (int32_t i = 0; i < 3 && act->per_expert; i++) // tables that are not set keep the layer's value
        for (uint64_t e = 0; e < layout->table_count[roles[i]]; e++)
            memcpy(weights->memory + layout->table_offset[roles[i]] + e * 4, &values[i], 4);
}

static int32_t moe__weights_check_memory(const moe_weights_desc *desc, uint64_t bytes, moe_error *err)
{
    if (desc->memory_kind == MOE_MEMORY_DEVICE)
        return moe__fail(err, MOE_ERROR_UNSUPPORTED, "desc.memory_kind",
                         "is MOE_MEMORY_DEVICE: this version packs weights in host memory only");
    if (desc->memory_kind != MOE_MEMORY_HOST)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "desc.memory_kind", "is %d: it must be a moe_memory",
                         desc->memory_kind);
    if (desc->memory == NULL) {
        if (desc->memory_bytes == 0) return MOE_OK;
        return moe__fail(err, MOE_ERROR_ARGUMENT, "desc.memory", "is NULL, but desc.memory_bytes is %U",
                         desc->memory_bytes);
    }
    if ((uintptr_t)desc->memory % MOE__LAYOUT_ALIGN != 0)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "desc.memory", "is not aligned to %d bytes",
                         (int32_t)MOE__LAYOUT_ALIGN);
    if (desc->memory_bytes < bytes)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "desc.memory_bytes", "is %U: this layer needs %U", desc->memory_bytes,
                         bytes);
    return MOE_OK;
}

// Checks shared by create and load: a resolved copy of the layer.
static int32_t moe__weights_layer(moe_context *ctx, const moe_layer_desc *layer, moe_layer_desc *out, moe_error *err)
{
    int32_t result;
    if (ctx == NULL) return moe__fail_null(err, "ctx");
    if (layer == NULL) return moe__fail_null(err, "layer");
    if ((result = moe__copy_desc(out, sizeof *out, layer, "layer", err)) != MOE_OK) return result;
    return moe__layer_resolve(out, err);
}

MOE_API void moe_weights_destroy(moe_weights *weights)
{
    const moe_allocator *allocator;
    if (weights == NULL) return;
    allocator = &weights->ctx->desc.allocator;
#ifndef MOE_NO_FILES
    if (weights->mapping != NULL) {
        moe__file file;
        file.data = (const unsigned char *)weights->mapping;
        file.size = weights->mapping_bytes;
        file.mapped = 1;
        for (int32_t i = 0; weights->memory != NULL && i < weights->layout.blocks; i++)
            if (weights->expert[i] != weights->memory + (uint64_t)i * weights->layout.expert.bytes)
                moe__free(allocator, weights->expert[i], weights->layout.expert.bytes); // replaced
        moe__file_close(allocator, &file);
    }
#endif
#if !defined(MOE_NO_CUDA)
    if (weights->device.memory != 0) moe__device_free(weights->ctx, weights->device.memory, weights->device.bytes);
#endif
    if (weights->owns_memory) moe__free(allocator, weights->memory, weights->layout.bytes);
    moe__free(allocator, weights, weights->self_bytes);
}

MOE_API int32_t moe_weights_create(moe_context *ctx, const moe_layer_desc *layer, const moe_weights_desc *desc,
                                   moe_weights **out, moe_error *err)
{
    moe_layer_desc resolved;
    moe_weights_desc checked;
    moe_weights *weights = NULL;
    int32_t result;
    if (out == NULL) return moe__fail_null(err, "out");
    *out = NULL;
    if ((result = moe__weights_layer(ctx, layer, &resolved, err)) != MOE_OK ||
        (result = moe__copy_desc(&checked, sizeof checked, desc, "desc", err)) != MOE_OK ||
        (result = moe__weights_new(ctx, &resolved, &weights, err)) != MOE_OK)
        return result;
    result = moe__weights_check_memory(&checked, weights->layout.bytes, err);
    if (result == MOE_OK && checked.memory == NULL) {
        checked.memory = moe__alloc(&ctx->desc.allocator, weights->layout.bytes);
        weights->owns_memory = 1;
        if (checked.memory == NULL) result = moe__fail_memory(err, weights->layout.bytes);
    }
    if (result != MOE_OK) {
        moe_weights_destroy(weights); // memory is still NULL
        return result;
    }
    moe__weights_place(weights, (unsigned char *)checked.memory);
    moe__weights_clear(weights);
    *out = weights;
    return moe__ok(err);
}

MOE_API int32_t moe_weights_get_info(const moe_weights *weights, moe_weights_info *info, moe_error *err)
{
    moe_weights_info copy;
    int32_t result, set = 0;
    if (weights == NULL) return moe__fail_null(err, "weights");
    if (info == NULL) return moe__fail_null(err, "info");
    if ((result = moe__copy_desc(&copy, sizeof copy, info, "info", err)) != MOE_OK) return result;
    for (int32_t i = 0; i < weights->layout.blocks; i++)
        for (uint32_t bits = weights->expert_set[i]; bits != 0; bits &= bits - 1) set++;
    for (uint32_t bits = weights->common_set & ~(1u << MOE_TENSOR_SELECT_BIAS); bits != 0; bits &= bits - 1) set++;
    for (int32_t i = 0; i < 3; i++)
        for (uint64_t bits = weights->shared_set[i]; bits != 0; bits &= bits - 1) set++;
    for (int32_t i = 0; i < weights->layer.routing.bias_rows; i++) set += weights->bias_rows_set[i] != 0;
    for (int32_t i = 0; i < weights->layer.routing.special_experts; i++) set += weights->constant_set[i] != 0;
    memset(info, 0, sizeof *info);
    info->struct_size = sizeof *info;
    info->sealed = weights->sealed;
    info->layout_id = weights->layout.id;
    info->local_experts = weights->layout.blocks;
    info->weight_bytes = weights->layout.bytes;
    info->expert_bytes = weights->layout.expert.bytes;
    info->tensors_set = set;
    info->tensors_missing = moe__weights_missing(weights).count;
    return moe__ok(err);
}

// ---- reading back ----

static void moe__read_run(const void *data, int32_t dtype, int64_t first, int64_t stride, int64_t n, float *out)
{
    for (int64_t i = 0; i < n; i++) out[i] = moe__load(data, dtype, first + i * stride);
}

static int32_t moe__fail_row(moe_error *err, int32_t row, int64_t rows, int32_t role)
{
    return moe__fail(err, MOE_ERROR_ARGUMENT, "row", "is %d: %s has rows 0..%D here", row, moe_role_string(role),
                     rows - 1);
}

// Matrices and biases of a routed, always-on or shared expert.
static int32_t moe__read_block(const moe_weights *weights, moe__block block, int32_t role, int32_t row, float *out,
                               moe_error *err)
{
    const moe__block_shape *shape = block.shape;
    int32_t gated = moe__layer_is_gated(&weights->layer), dtype = weights->layout.dtype,
            hidden = weights->layer.hidden_size;
    int32_t down = role == MOE_TENSOR_DOWN || role == MOE_TENSOR_SHARED_DOWN, up = gated && !moe__role_is_gate(role);
    int64_t rows = moe__role_is_bias(role) ? 1 : down ? hidden : shape->features;
    if (row < 0 || row >= rows) return moe__fail_row(err, row, rows, role);
    if (role == MOE_TENSOR_DOWN_BIAS) moe__read_run(block.bias2, MOE_DTYPE_F32, 0, 1, hidden, out);
    else if (moe__role_is_bias(role)) moe__read_run(block.bias1, MOE_DTYPE_F32, up, 1 + gated, shape->features, out);
    else if (down) moe__read_run(block.w2, dtype, (int64_t)row * shape->ld2, 1, shape->features, out);
    else moe__read_run(block.w1, dtype, ((int64_t)row * (1 + gated) + up) * shape->ld1, 1, hidden, out);
    return MOE_OK;
}

static int32_t moe__read_table(const moe_weights *weights, int32_t role, int32_t row, float *out, moe_error *err)
{
    moe__tensor_shape shape = moe__tensor_shape_of(&weights->layer, role);
    const float *table = moe__weights_table(weights, role);
    int64_t ld = role == MOE_TENSOR_ROUTER ? weights->layout.router_ld : shape.columns;
    if (row < 0 || row >= shape.rows) return moe__fail_row(err, row, shape.rows, role);
    if (role != MOE_TENSOR_FORCED_IDS) {
        moe__read_run(table, MOE_DTYPE_F32, row * ld, 1, shape.columns, out);
    } else {
        const int32_t *ids = moe__weights_forced_ids(weights);
        for (int64_t i = 0; i < shape.columns; i++) out[i] = (float)ids[row * ld + i];
    }
    return MOE_OK;
}

static int32_t moe__fail_not_set(moe_error *err, int32_t role, int32_t expert)
{
    char what[64];
    moe__text text = moe__text_make(what, sizeof what);
    moe__text_role(&text, role, expert);
    return moe__fail(err, MOE_ERROR_MISSING, "role", "is %s, which was not set", what);
}

static int32_t moe__read_expert(const moe_weights *weights, int32_t role, int32_t expert, int32_t row, float *out,
                                moe_error *err)
{
    const moe_layer_desc *layer = &weights->layer;
    int32_t local = moe__layer_local(layer, expert), special = expert - layer->num_experts, hidden = layer->hidden_size;
    if (role == MOE_TENSOR_CONSTANT && special >= 0 && special < layer->routing.special_experts) {
        if (!weights->constant_set[special]) return moe__fail_not_set(err, role, expert);
        if (row != 0) return moe__fail_row(err, row, 1, role);
        moe__read_run(moe__weights_table(weights, role), MOE_DTYPE_F32, (int64_t)special * hidden, 1, hidden, out);
        return MOE_OK;
    }
    if (local < 0)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "expert", "is %d: this rank has no such expert with matrices",
                         expert);
    if ((weights->expert_set[local] >> role & 1u) == 0) return moe__fail_not_set(err, role, expert);
    if (role != MOE_TENSOR_CONSTANT)
        return moe__read_block(weights, moe__weights_expert(weights, local), role, row, out, err);
    if (row != 0) return moe__fail_row(err, row, 1, role);
    moe__read_run(moe__weights_expert_constant(weights, local), MOE_DTYPE_F32, 0, 1, hidden, out);
    return MOE_OK;
}

MOE_API int32_t moe_weights_read_row(const moe_weights *weights, int32_t role, int32_t expert, int32_t row, float *out,
                                     moe_error *err)
{
    const char *absent;
    int32_t kind, result;
    if (weights == NULL) return moe__fail_null(err, "weights");
    if (out == NULL) return moe__fail_null(err, "out");
    if (role <= MOE_TENSOR_UNSET || role >= MOE_TENSOR_ROLES)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "role", "is %d: it must be a moe_tensor_role", role);
    if (moe__role_is_fused(role))
        return moe__fail(err, MOE_ERROR_ARGUMENT, "role", "is %s: read gate and up apart", moe_role_string(role));
    if ((absent = moe__role_absent(&weights->layer, role)) != NULL)
        return moe__fail(err, MOE_ERROR_MISSING, "role", "is %s, but %s is 0", moe_role_string(role), absent);
    kind = moe__tensor_shape_of(&weights->layer, role).kind;
    if (kind == MOE__KIND_EXPERT || kind == MOE__KIND_CONSTANT) {
        result = moe__read_expert(weights, role, expert, row, out, err);
    } else if (kind == MOE__KIND_SHARED) {
        int32_t part = role == MOE_TENSOR_SHARED_DOWN ? 2 : role == MOE_TENSOR_SHARED_UP;
        if (weights->shared_set[part] == 0) return moe__fail_not_set(err, role, -1);
        result = moe__read_block(weights, moe__weights_shared(weights), role, row, out, err);
    } else {
        int32_t defaulted = role >= MOE_TENSOR_ALPHA && role <= MOE_TENSOR_LIMIT;
        if (!defaulted && (weights->common_set >> role & 1u) == 0) return moe__fail_not_set(err, role, -1);
        result = moe__read_table(weights, role, row, out, err);
    }
    return result == MOE_OK ? moe__ok(err) : result;
}

MOE_API int32_t moe_weights_row(void *user, int32_t role, int32_t expert, int32_t row, float *out)
{
    return moe_weights_read_row((const moe_weights *)user, role, expert, row, out, NULL);
}

// ---- replacing ----

// All tensors of one expert into `block`.
static int32_t moe__replace_pack(const moe_weights *weights, int32_t expert, const moe_tensor *tensors, int32_t count,
                                 unsigned char *block, uint32_t *set, moe_error *err)
{
    moe__missing missing;
    moe__block_clear(&weights->layout.expert, &weights->layer, weights->layout.dtype, block);
    for (int32_t i = 0; i < count; i++) {
        moe__checked c;
        int32_t result = moe__tensor_check(&c, &weights->layer, &tensors[i], err);
        if (result != MOE_OK) return result;
        if (c.tensor.expert != expert || (c.shape.kind != MOE__KIND_EXPERT && c.shape.kind != MOE__KIND_CONSTANT))
            return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.expert", &c.tensor,
                                    "is %d: the expert that is replaced is %d", c.tensor.expert, expert);
        if ((result = moe__set_in_block(weights, &c, expert, 0, block, set, err)) != MOE_OK) return result;
    }
    memset(&missing, 0, sizeof missing);
    moe__missing_of_expert(&missing, &weights->layer, expert, *set);
    if (missing.count > 0) {
        char what[160];
        moe__text text = moe__text_make(what, sizeof what);
        moe__text_missing(&text, &missing);
        return moe__fail(err, MOE_ERROR_MISSING, "tensors", "lack %s", what);
    }
    return MOE_OK;
}

MOE_API int32_t moe_weights_replace_expert(moe_weights *weights, int32_t expert, const moe_tensor *tensors,
                                           int32_t count, void *stream, moe_error *err)
{
    const moe_allocator *allocator;
    unsigned char *block, *old;
    uint64_t bytes;
    uint32_t set = 0;
    int32_t local, result;
    (void)stream;
    if (weights == NULL) return moe__fail_null(err, "weights");
    if (tensors == NULL) return moe__fail_null(err, "tensors");
    if (count < 1) return moe__fail(err, MOE_ERROR_ARGUMENT, "count", "is %d: it must be positive", count);
    if (!weights->sealed)
        return moe__fail(err, MOE_ERROR_STATE, "weights", "are not sealed: set the expert's tensors instead");
    if ((local = moe__layer_local(&weights->layer, expert)) < 0)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "expert", "is %d: this rank has no such expert with matrices",
                         expert);
    allocator = &weights->ctx->desc.allocator;
    bytes = weights->layout.expert.bytes;
    if ((block = (unsigned char *)moe__alloc(allocator, bytes)) == NULL) return moe__fail_memory(err, bytes);
    result = moe__replace_pack(weights, expert, tensors, count, block, &set, err);
    if (result != MOE_OK) {
        moe__free(allocator, block, bytes);
        return result;
    }
    old = weights->expert[local];
    if (weights->mapping == NULL) {
        memcpy(old, block, (size_t)bytes);
        moe__free(allocator, block, bytes);
    } else { // a mapped file is never written: the block takes its place
        weights->expert[local] = block;
        if (old != weights->memory + (uint64_t)local * bytes) moe__free(allocator, old, bytes);
    }
    weights->expert_set[local] = set;
    return moe__ok(err);
}

// ---- files ----

#ifndef MOE_NO_FILES
// A file is a header and, at a multiple of 256 bytes, the packed memory. The header is written value by value, in the
// machine's byte order, which a mark in it tells:
//
//     magic [8]   version   order mark   header bytes   layout id   u64 data offset, bytes, hash
//     number of layer members, their values   local index of each routed expert
//     number of blocks, the flags of each   flags of the tables   u64 hash of all this
//
// Both hashes are checked before anything is used. They find damage, not forgery; what a forged file could do harm with
// is checked again. Hashing reads the whole file once, about as fast as memory is read.
enum { MOE__FILE_VERSION = 1, MOE__FILE_FIXED = 48, MOE__FILE_HEADER_MAX = 1 << 20 };

static const unsigned char moe__file_magic[8] = { 'm', 'o', 'e', '.', 'h', 26, '\r', '\n' };
static const uint32_t moe__file_order = 0x01020304u;

typedef struct moe__hash {
    uint64_t lane[4];
} moe__hash;

static moe__hash moe__hash_begin(void)
{
    moe__hash hash = { { 0x243f6a8885a308d3u, 0x13198a2e03707344u, 0xa4093822299f31d0u,
                         0x082efa98ec4e6c89u } }; // of pi
    return hash;
}

// A bijection of the lane, so that no change of one word goes unseen.
static uint64_t moe__hash_step(uint64_t lane, uint64_t word)
{
    lane = (lane ^ word) * 0x9e3779b97f4a7c15u;
    return lane ^ lane >> 32;
}

// All pieces but the last are multiples of 32 bytes.
static void moe__hash_add(moe__hash *hash, const void *data, uint64_t bytes)
{
    const unsigned char *in = (const unsigned char *)data;
    uint64_t a = hash->lane[0], b = hash->lane[1], c = hash->lane[2], d = hash->lane[3], words[4];
    for (uint64_t at = 0; at < bytes; at += 32) {
        if (bytes - at < 32) {
            memset(words, 0, sizeof words);
            memcpy(words, in + at, (size_t)(bytes - at));
        } else {
            memcpy(words, in + at, 32);
        }
        a = moe__hash_step(a, words[0]);
        b = moe__hash_step(b, words[1]);
        c = moe__hash_step(c, words[2]);
        d = moe__hash_step(d, words[3]);
    }
    hash->lane[0] = a;
    hash->lane[1] = b;
    hash->lane[2] = c;
    hash->lane[3] = d;
}

static uint64_t moe__hash_end(const moe__hash *hash)
{
    uint64_t value = 0;
    for (int32_t i = 0; i < 4; i++) value = moe__hash_step(value, hash->lane[i]);
    return value;
}

// Members that a file must agree with: all but how the source lies and which experts are here, which follows as a map.
typedef struct moe__layer_member {
    const char *name;
    size_t offset;
    int32_t is_float;
} moe__layer_member;

#define MOE__MEMBER_0(member, is_float) { "layer." #member, offsetof(moe_layer_desc, member), is_float }
#define MOE__MEMBER_1(desc, group, member, is_float) \
    { "layer." #group "." #member, offsetof(moe_layer_desc, group) + offsetof(desc, member), is_float }
#define MOE__MEMBER_SHARED(member, is_float) \
    { "layer.shared.activation." #member, offsetof(moe_layer_desc, shared) + offsetof(moe_shared_desc, activation) + \
      offsetof(moe_activation_desc, member), is_float }
static const moe__layer_member moe__layer_members[] = {
    MOE__MEMBER_0(layer_index, 0),
    MOE__MEMBER_0(hidden_size, 0),
    MOE__MEMBER_0(intermediate_size, 0),
    MOE__MEMBER_0(num_experts, 0),
    MOE__MEMBER_0(format, 0),
    MOE__MEMBER_0(format_block, 0),
    MOE__MEMBER_0(scale_dtype, 0),
    MOE__MEMBER_0(gemm1_bias, 0),
    MOE__MEMBER_0(gemm2_bias, 0),
    MOE__MEMBER_0(row_norm, 0),
    MOE__MEMBER_0(row_norm_epsilon, 1),
    MOE__MEMBER_0(output_scale, 1),
    MOE__MEMBER_1(moe_activation_desc, activation, kind, 0),
    MOE__MEMBER_1(moe_activation_desc, activation, alpha, 1),
    MOE__MEMBER_1(moe_activation_desc, activation, beta, 1),
    MOE__MEMBER_1(moe_activation_desc, activation, limit, 1),
    MOE__MEMBER_1(moe_activation_desc, activation, per_expert, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, score, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, score_order, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, select, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, top_k, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, logit_multiplier, 1),
    MOE__MEMBER_1(moe_routing_desc, routing, logit_softcap, 1),
    MOE__MEMBER_1(moe_routing_desc, routing, bias_rows, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, groups, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, groups_kept, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, group_rule, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, group_excluded, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, renormalize, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, renormalize_epsilon, 1),
    MOE__MEMBER_1(moe_routing_desc, routing, zero_sum, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, scale, 1),
    MOE__MEMBER_1(moe_routing_desc, routing, scale_on, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, per_expert_scale, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, weight_on, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, forced_rows, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, marked_token_lo, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, marked_token_hi, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, special_experts, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, special_kind, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, extra_slots, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, extra_scored, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, extra_weight, 1),
    MOE__MEMBER_1(moe_routing_desc, routing, sparse_mixer, 1),
    MOE__MEMBER_1(moe_routing_desc, routing, global_scale, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, simulate, 0),
    MOE__MEMBER_1(moe_routing_desc, routing, simulate_seed, 0),
    MOE__MEMBER_1(moe_router_desc, router, rms_norm, 0),
    MOE__MEMBER_1(moe_router_desc, router, norm_epsilon, 1),
    MOE__MEMBER_1(moe_router_desc, router, input_scale, 0),
    MOE__MEMBER_1(moe_router_desc, router, input_multiplier, 1),
    MOE__MEMBER_1(moe_router_desc, router, bias, 0),
    MOE__MEMBER_1(moe_router_desc, router, input_size, 0),
    MOE__MEMBER_1(moe_shared_desc, shared, count, 0),
    MOE__MEMBER_1(moe_shared_desc, shared, intermediate_size, 0),
    MOE__MEMBER_1(moe_shared_desc, shared, gate, 0),
    MOE__MEMBER_1(moe_shared_desc, shared, scale, 1),
    MOE__MEMBER_SHARED(kind, 0),
    MOE__MEMBER_SHARED(alpha, 1),
    MOE__MEMBER_SHARED(beta, 1),
    MOE__MEMBER_SHARED(limit, 1),
    MOE__MEMBER_SHARED(per_expert, 0),
    MOE__MEMBER_1(moe_parallel_desc, parallel, local_experts, 0),
    MOE__MEMBER_1(moe_parallel_desc, parallel, omit_common, 0),
    MOE__MEMBER_1(moe_parallel_desc, parallel, tp_size, 0),
    MOE__MEMBER_1(moe_parallel_desc, parallel, tp_rank, 0),
};
#undef MOE__MEMBER_0
#undef MOE__MEMBER_1
#undef MOE__MEMBER_SHARED

// Writes or, when data is NULL, counts.
typedef struct moe__file_writer {
    unsigned char *data;
    uint64_t at;
} moe__file_writer;

static void moe__put(moe__file_writer *w, const void *value, uint64_t bytes)
{
    if (w->data != NULL) memcpy(w->data + w->at, value, (size_t)bytes);
    w->at += bytes;
}

static void moe__put_u32(moe__file_writer *w, uint32_t value) { moe__put(w, &value, 4); }
static void moe__put_u64(moe__file_writer *w, uint64_t value) { moe__put(w, &value, 8); }

static uint64_t moe__put_header(moe__file_writer *w, const moe_weights *weights, uint64_t header_bytes,
                                uint64_t data_hash)
{
    const moe_layer_desc *layer = &weights->layer;
    moe__put(w, moe__file_magic, sizeof moe__file_magic);
    moe__put_u32(w, MOE__FILE_VERSION);
    moe__put_u32(w, moe__file_order);
    moe__put_u32(w, (uint32_t)header_bytes);
    moe__put_u32(w, weights->layout.id);
    moe__put_u64(w, moe__align_up(header_bytes, MOE__LAYOUT_ALIGN));
    moe__put_u64(w, weights->layout.bytes);
    moe__put_u64(w, data_hash);
    moe__put_u32(w, (uint32_t)MOE__ARRAY_COUNT(moe__layer_members));
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(moe__layer_members); i++)
        moe__put(w, (const unsigned char *)layer + moe__layer_members[i].offset, 4);
    for (int32_t e = 0; e < layer->num_experts; e++) moe__put_u32(w, (uint32_t)moe__layer_local(layer, e));
    moe__put_u32(w, (uint32_t)weights->layout.blocks);
    moe__put(w, weights->expert_set, (uint64_t)weights->layout.blocks * 4);
    moe__put_u32(w, weights->common_set);
    if (w->data != NULL) {
        moe__hash hash = moe__hash_begin();
        moe__hash_add(&hash, w->data, w->at);
        moe__put_u64(w, moe__hash_end(&hash));
        memset(w->data + w->at, 0, (size_t)(moe__align_up(header_bytes, MOE__LAYOUT_ALIGN) - w->at));
    } else {
        w->at += 8;
    }
    return w->at;
}

MOE_API int32_t moe_weights_save(const moe_weights *weights, const char *path, moe_error *err)
{
    moe__file_writer writer = { NULL, 0 };
    moe__hash hash = moe__hash_begin();
    moe__span *spans;
    uint64_t header, padded, bytes, blocks, tail;
    int32_t result;
    if (weights == NULL) return moe__fail_null(err, "weights");
    if (path == NULL) return moe__fail_null(err, "path");
    if (!weights->sealed)
        return moe__fail(err, MOE_ERROR_STATE, "weights", "are not sealed: only complete weights are saved");
    blocks = (uint64_t)weights->layout.blocks;
    header = moe__put_header(&writer, weights, 0, 0);
    padded = moe__align_up(header, MOE__LAYOUT_ALIGN);
    bytes = padded + (blocks + 2) * sizeof *spans;
    writer.data = (unsigned char *)moe__alloc(&weights->ctx->desc.allocator, bytes);
    if (writer.data == NULL) return moe__fail_memory(err, bytes);
    writer.at = 0;
    spans = (moe__span *)(void *)(writer.data + padded);
    spans[0].data = writer.data;
    spans[0].size = padded;
    for (uint64_t i = 0; i < blocks; i++) {
        spans[i + 1].data = weights->expert[i];
        spans[i + 1].size = weights->layout.expert.bytes;
    }
    tail = weights->layout.shared_offset; // shared experts and tables
    spans[blocks + 1].data = weights->memory + tail;
    spans[blocks + 1].size = weights->layout.bytes - tail;
    for (uint64_t i = 1; i < blocks + 2; i++) moe__hash_add(&hash, spans[i].data, spans[i].size);
    moe__put_header(&writer, weights, header, moe__hash_end(&hash));
    result = moe__file_write_atomic(path, spans, (int32_t)blocks + 2, err);
    moe__free(&weights->ctx->desc.allocator, writer.data, bytes);
    return result == MOE_OK ? moe__ok(err) : result;
}

// A file as it is read; what lies past `end` is never touched.
typedef struct moe__file_reader {
    const char *path;
    const unsigned char *data;
    uint64_t at, end;
} moe__file_reader;

// Whole values only; past the end they are 0, and the lengths do not add up.
static uint32_t moe__get_u32(moe__file_reader *r)
{
    uint32_t value = 0;
    if (r->end - r->at >= 4) memcpy(&value, r->data + r->at, 4);
    r->at = r->end - r->at >= 4 ? r->at + 4 : r->end;
    return value;
}

static uint64_t moe__get_u64(moe__file_reader *r)
{
    uint64_t value = 0;
    if (r->end - r->at >= 8) memcpy(&value, r->data + r->at, 8);
    r->at = r->end - r->at >= 8 ? r->at + 8 : r->end;
    return value;
}

static int32_t moe__fail_format(moe_error *err, const char *path, const char *what)
{
    return moe__fail(err, MOE_ERROR_FORMAT, "", "%q %s", path, what);
}

// The fixed part and both sums. Leaves the reader behind the fixed part, with the header's own end.
static int32_t moe__load_fixed(moe__file_reader *r, const moe__layout *layout, uint64_t *data_offset, moe_error *err)
{
    uint64_t size = r->end, header, bytes, sum, data_sum;
    uint32_t version, order, id;
    moe__hash hash = moe__hash_begin();
    if (size < MOE__FILE_FIXED + 8)
        return moe__fail_format(err, r->path, "is too short to hold weights saved by moe.h");
    if (memcmp(r->data, moe__file_magic, sizeof moe__file_magic) != 0)
        return moe__fail_format(err, r->path, "does not hold weights saved by moe.h");
    r->at = sizeof moe__file_magic;
    version = moe__get_u32(r);
    order = moe__get_u32(r);
    header = moe__get_u32(r);
    id = moe__get_u32(r);
    *data_offset = moe__get_u64(r);
    bytes = moe__get_u64(r);
    data_sum = moe__get_u64(r);
    if (order != moe__file_order) return moe__fail_format(err, r->path, "has another byte order than this machine");
    if (version != MOE__FILE_VERSION)
        return moe__fail(err, MOE_ERROR_FORMAT, "", "%q has version %u of the file format: this moe.h reads %d",
                         r->path, version, (int32_t)MOE__FILE_VERSION);
    if (header < MOE__FILE_FIXED + 8 || header > MOE__FILE_HEADER_MAX || header > size)
        return moe__fail_format(err, r->path, "is damaged: its header does not fit in it");
    memcpy(&sum, r->data + header - 8, 8);
    moe__hash_add(&hash, r->data, header - 8);
    if (moe__hash_end(&hash) != sum)
        return moe__fail_format(err, r->path, "is damaged: the header's checksum is wrong");
    if (id != layout->id)
        return moe__fail(err, MOE_ERROR_FORMAT, "", "%q has packed layout %u: this back end reads %u", r->path, id,
                         layout->id);
    if (*data_offset != moe__align_up(header, MOE__LAYOUT_ALIGN) || *data_offset > size || bytes != size - *data_offset)
        return moe__fail_format(err, r->path, "is damaged or cut off: its parts do not make up its size");
    for (uint64_t i = header; i < *data_offset; i++)
        if (r->data[i] != 0) return moe__fail_format(err, r->path, "is damaged: there is something behind the header");
    hash = moe__hash_begin();
    moe__hash_add(&hash, r->data + *data_offset, bytes);
    if (moe__hash_end(&hash) != data_sum)
        return moe__fail_format(err, r->path, "is damaged: the data's checksum is wrong");
    r->end = header - 8;
    return MOE_OK;
}

static int32_t moe__load_layer(moe__file_reader *r, const moe_layer_desc *layer, moe_error *err)
{
    if (moe__get_u32(r) != (uint32_t)MOE__ARRAY_COUNT(moe__layer_members))
        return moe__fail_format(err, r->path, "describes its layer with other members than this moe.h");
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(moe__layer_members); i++) {
        const moe__layer_member *m = &moe__layer_members[i];
        uint32_t saved = moe__get_u32(r), wanted;
        memcpy(&wanted, (const unsigned char *)layer + m->offset, 4);
        if (saved == wanted) continue;
        if (m->is_float)
            return moe__fail(err, MOE_ERROR_ARGUMENT, m->name, "is %g, but %q was saved with %g",
                             (double)moe__bits_f32(wanted), r->path, (double)moe__bits_f32(saved));
        return moe__fail(err, MOE_ERROR_ARGUMENT, m->name, "is %d, but %q was saved with %d", (int32_t)wanted, r->path,
                         (int32_t)saved);
    }
    for (int32_t e = 0; e < layer->num_experts; e++) {
        int32_t saved = (int32_t)moe__get_u32(r), wanted = moe__layer_local(layer, e);
        if (saved != wanted)
            return moe__fail(err, MOE_ERROR_ARGUMENT, "layer.parallel",
                             "puts expert %d at local index %d, but %q was saved with %d", e, wanted, r->path, saved);
    }
    return MOE_OK;
}

// Flags, and what a forged file could do harm with.
static int32_t moe__load_flags(moe__file_reader *r, moe_weights *weights, moe_error *err)
{
    const moe_routing_desc *routing = &weights->layer.routing;
    const int32_t *ids = moe__weights_forced_ids(weights);
    int32_t legal = weights->layer.num_experts + routing->special_experts;
    if (moe__get_u32(r) != (uint32_t)weights->layout.blocks)
        return moe__fail_format(err, r->path, "is damaged: it has another number of experts than its layer");
    for (int32_t i = 0; i < weights->layout.blocks; i++) weights->expert_set[i] = moe__get_u32(r);
    weights->common_set = moe__get_u32(r);
    if (r->at != r->end) return moe__fail_format(err, r->path, "is damaged: its header has a wrong length");
    memset(weights->shared_set, 0xff, sizeof weights->shared_set);
    for (int32_t i = 0; i < routing->bias_rows; i++) weights->bias_rows_set[i] = 1;
    for (int32_t i = 0; i < routing->special_experts; i++) weights->constant_set[i] = 1;
    if (moe__weights_missing(weights).count > 0)
        return moe__fail_format(err, r->path, "is damaged: tensors are missing");
    for (uint64_t i = 0; ids != NULL && i < weights->layout.table_count[MOE_TENSOR_FORCED_IDS]; i++)
        if (ids[i] < 0 || ids[i] >= legal)
            return moe__fail_format(err, r->path, "is damaged: a forced id is out of range");
    return MOE_OK;
}

MOE_API int32_t moe_weights_load(moe_context *ctx, const moe_layer_desc *layer, const char *path, moe_weights **out,
                                 moe_error *err)
{
    moe_layer_desc resolved;
    moe_weights *weights = NULL;
    moe__file_reader reader;
    moe__file file;
    uint64_t data_offset = 0;
    void *memory;
    int32_t result;
    if (out == NULL) return moe__fail_null(err, "out");
    *out = NULL;
    if ((result = moe__weights_layer(ctx, layer, &resolved, err)) != MOE_OK) return result;
    if (path == NULL) return moe__fail_null(err, "path");
    if ((result = moe__weights_new(ctx, &resolved, &weights, err)) != MOE_OK) return result;
    if ((result = moe__file_map(path, &file, err)) == MOE_OK) {
        weights->mapping = file.data; // closed by destroy from here on
        weights->mapping_bytes = file.size;
        reader.path = path;
        reader.data = file.data;
        reader.at = 0;
        reader.end = file.size;
        result = moe__load_fixed(&reader, &weights->layout, &data_offset, err);
        if (result == MOE_OK) result = moe__load_layer(&reader, &weights->layer, err);
        if (result == MOE_OK && file.size - data_offset != weights->layout.bytes)
            result = moe__fail_format(err, path, "is damaged: its data has another size than its layer");
        if (result == MOE_OK) {
            memcpy(&memory, &file.data, sizeof memory); // never written: see moe_weights_replace_expert()
            moe__weights_place(weights, (unsigned char *)memory + data_offset);
            result = moe__load_flags(&reader, weights, err);
        }
    }
#if !defined(MOE_NO_CUDA)
    if (result == MOE_OK) result = moe__device_tables_upload(weights, err);
#endif
    if (result != MOE_OK) {
        moe_weights_destroy(weights);
        return result;
    }
    weights->sealed = 1;
    *out = weights;
    return moe__ok(err);
}
#endif // MOE_NO_FILES

// ---- checkpoints ----

#ifndef MOE_NO_CHECKPOINT
typedef struct moe__ckpt_modules { // parts of names that hold tensors of the layer and no others
    const char *name[8];
    size_t length[8];
    int32_t count;
} moe__ckpt_modules;

static void moe__ckpt_add_module(moe__ckpt_modules *modules, const char *name)
{
    static const char *const ends[] = { "experts.", "expert.", "shared_mlp.", ".gate.", ".router." };
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(ends); i++) {
        const char *found = strstr(name, ends[i]);
        size_t length;
        if (found == NULL) continue;
        length = (size_t)(found - name) + strlen(ends[i]);
        for (int32_t j = 0; j < modules->count; j++)
            if (modules->length[j] == length && memcmp(modules->name[j], name, length) == 0) return;
        if (modules->count == MOE__ARRAY_COUNT(modules->name)) return;
        modules->name[modules->count] = name;
        modules->length[modules->count++] = length;
        return;
    }
}

// Which way a stack of matrices lies: by its shape and, where that fits both ways, as the layer's source says. A stack
// whose first two dimensions are one (DBRX) has its down matrices input-major.
static int32_t moe__ckpt_orient(const moe_layer_desc *layer, moe_tensor *t, const moe__tensor_shape *shape,
                                moe_error *err)
{
    int32_t flat = t->rank == 2 && t->dims[0] % layer->num_experts == 0, by_k, by_mn;
    if (flat) {
        t->dims[2] = t->dims[1];
        t->dims[1] = t->dims[0] / layer->num_experts;
        t->dims[0] = layer->num_experts;
        t->rank = 3;
    }
    t->layout = MOE_LAYOUT_MAJOR_MN;
    by_mn = moe__dims_fit(t, shape, layer->num_experts);
    t->layout = MOE_LAYOUT_MAJOR_K;
    by_k = moe__dims_fit(t, shape, layer->num_experts);
    if (by_k && by_mn) {
        t->layout = layer->source.layout;
        if (flat) t->layout = t->role == MOE_TENSOR_DOWN ? MOE_LAYOUT_MAJOR_MN : MOE_LAYOUT_MAJOR_K;
        if (t->layout == MOE_LAYOUT_UNSET)
            return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "layer.source.layout", t,
                                    "is not set: this tensor's shape fits MOE_LAYOUT_MAJOR_K and MOE_LAYOUT_MAJOR_MN");
    } else if (by_mn) {
        t->layout = MOE_LAYOUT_MAJOR_MN;
    }
    return MOE_OK;
}

static int32_t moe__ckpt_set(moe_weights *weights, moe_tensor *t, moe_error *err)
{
    const moe_layer_desc *layer = &weights->layer;
    moe__tensor_shape shape = moe__tensor_shape_of(layer, t->role);
    int32_t result, shared = shape.kind == MOE__KIND_SHARED;
    if (shape.kind == MOE__KIND_EXPERT && t->expert < 0 && shape.matrix)
        if ((result = moe__ckpt_orient(layer, t, &shape, err)) != MOE_OK) return result;
    if (shape.fused) {
        if (t->halves == MOE_HALVES_UNSET) t->halves = shared ? layer->source.shared_halves : layer->source.halves;
        if (t->halves < MOE_HALVES_GATE_UP)
            return moe__fail_tensor(err, MOE_ERROR_ARGUMENT,
                                    shared ? "layer.source.shared_halves" : "layer.source.halves", t,
                                    "is %d: the tensor is fused, and nothing else tells how", t->halves);
    }
    return moe_weights_set_tensor(weights, t, err);
}

// Shared experts that the layer runs as always-on ones, [X, ...] or one by one: experts behind the routed and special
// ones.
static int32_t moe__ckpt_set_extra(moe_weights *weights, moe_tensor *t, moe_error *err)
{
    const moe_layer_desc *layer = &weights->layer;
    int32_t extra = layer->routing.extra_slots, result = MOE_OK;
    moe_tensor one = *t;
    if (t->role == MOE_TENSOR_SHARED_GATE_UP) one.halves = layer->source.shared_halves;
    one.role += MOE_TENSOR_GATE - MOE_TENSOR_SHARED_GATE;
    one.expert = layer->num_experts + layer->routing.special_experts;
    if (t->index >= 0 || (t->rank == 2 && extra == 1)) {
        if (t->index > 0) one.expert += t->index;
        return moe__ckpt_set(weights, &one, err);
    }
    if (t->rank != 3 || t->dims[0] != extra)
        return moe__fail_tensor(err, MOE_ERROR_ARGUMENT, "tensor.dims", t,
                                "are %d, the first %D: they must be 3, the first layer.routing.extra_slots, %d",
                                t->rank, t->dims[0], extra);
    one.rank = 2;
    memcpy(one.dims, t->dims + 1, 2 * sizeof t->dims[0]);
    one.data_bytes = t->data_bytes / (uint64_t)extra;
    for (int32_t i = 0; i < extra && result == MOE_OK; i++) {
        moe_tensor copy = one;
        copy.expert += i;
        copy.data = (const unsigned char *)t->data + (uint64_t)i * one.data_bytes;
        result = moe__ckpt_set(weights, &copy, err);
    }
    return result;
}

// Behind a latent projection the shared experts read what the routed ones do not: they stay the caller's.
static int32_t moe__ckpt_leaves_shared(const moe_layer_desc *layer)
{
    return layer->shared.count == 0 && layer->routing.extra_slots == 0 &&
           layer->router.input_size != layer->hidden_size;
}

// One tensor of the layer. The same names mean a logit bias in one family and a selection bias in another: the layer
// knows.
static int32_t moe__ckpt_take(moe_weights *weights, const moe_checkpoint_tensor *found, const moe_tensor_name *what,
                              moe_error *err)
{
    const moe_layer_desc *layer = &weights->layer;
    char label[512];
    moe__text text = moe__text_make(label, sizeof label);
    moe_tensor t;
    int32_t result;
    moe__text_format(&text, "%s: %s", found->file, found->name);
    memset(&t, 0, sizeof t);
    t.role = what->role;
    t.part = what->part;
    t.expert = what->expert;
    t.index = what->index;
    t.dtype = found->dtype;
    t.rank = found->rank;
    memcpy(t.dims, found->dims, sizeof t.dims);
    t.data = found->data;
    t.data_bytes = found->data_bytes;
    t.name = label;
    if (t.role == MOE_TENSOR_ROUTER_BIAS && !layer->router.bias && layer->routing.bias_rows > 0)
        t.role = MOE_TENSOR_SELECT_BIAS;
    else if (t.role == MOE_TENSOR_SELECT_BIAS && layer->router.bias && layer->routing.bias_rows == 0)
        t.role = MOE_TENSOR_ROUTER_BIAS;
    if (t.role >= MOE_TENSOR_SHARED_GATE && t.role <= MOE_TENSOR_SHARED_TOKEN_GATE && moe__ckpt_leaves_shared(layer))
        return MOE_OK;
    if (t.role >= MOE_TENSOR_SHARED_GATE && t.role <= MOE_TENSOR_SHARED_DOWN) {
        if (t.expert >= 0) t.index = t.expert;
        t.expert = -1;
        result = layer->shared.count == 0 && layer->routing.extra_slots > 0 ? moe__ckpt_set_extra(weights, &t, err)
                                                                            : moe__ckpt_set(weights, &t, err);
    } else {
        result = moe__ckpt_set(weights, &t, err);
    }
    if (result != MOE_ERROR_ARGUMENT && result != MOE_ERROR_STATE) return result;
    if (err != NULL) err->code = MOE_ERROR_FORMAT; // the checkpoint's fault, not the caller's
    return MOE_ERROR_FORMAT;
}

// A tensor without a known meaning in a module that belongs to the layer alone could change its result.
static int32_t moe__ckpt_check_strays(const moe_checkpoint *ckpt, const moe__ckpt_modules *modules, int32_t layer,
                                      moe_error *err)
{
    for (int32_t i = 0; i < ckpt->num_tensors; i++) {
        moe_checkpoint_tensor found;
        if (ckpt->tensors[i].what.role != MOE_TENSOR_UNSET) continue;
        for (int32_t j = 0; j < modules->count; j++) {
            if (strncmp(ckpt->tensors[i].name, modules->name[j], modules->length[j]) != 0) continue;
            moe__ckpt_describe(ckpt, i, &found);
            return moe__fail(err, MOE_ERROR_UNSUPPORTED, "ckpt",
                             "%s: %q belongs to layer %d, and this moe.h does not know what it is",
                             found.file, found.name, layer);
        }
    }
    return MOE_OK;
}

static int32_t moe__ckpt_seal(moe_weights *weights, const moe_checkpoint *ckpt, moe_error *err)
{
    moe__missing missing = moe__weights_missing(weights);
    int32_t layer = weights->layer.layer_index;
    char what[384];
    moe__text text = moe__text_make(what, sizeof what);
    if (missing.count == 0) return moe_weights_seal(weights, err);
    moe__text_missing(&text, &missing);
    for (int32_t i = 0; i < ckpt->num_tensors; i++) { // a sibling shows how the name would have looked
        const moe_tensor_name *name = &ckpt->tensors[i].what;
        if (name->layer != layer || name->role == MOE_TENSOR_UNSET || name->expert < 0) continue;
        if ((moe__role_bits(name->role) >> missing.role & 1u) == 0) continue;
        moe__text_format(&text, "; that of expert %d is %q", name->expert, ckpt->tensors[i].name);
        break;
    }
    return moe__fail(err, MOE_ERROR_MISSING, "ckpt", "lacks, for layer %d, %s", layer, what);
}

MOE_API int32_t moe_weights_from_checkpoint(moe_context *ctx, const moe_checkpoint *ckpt, const moe_layer_desc *layer,
                                            moe_weights **out, moe_error *err)
{
    moe_weights *weights = NULL;
    moe__ckpt_modules modules;
    int32_t result, index, taken = 0;
    if (out == NULL) return moe__fail_null(err, "out");
    *out = NULL;
    if (ckpt == NULL) return moe__fail_null(err, "ckpt");
    if ((result = moe_weights_create(ctx, layer, NULL, &weights, err)) != MOE_OK) return result;
    index = weights->layer.layer_index;
    modules.count = 0;
    for (int32_t i = 0; i < ckpt->num_tensors && result == MOE_OK; i++) {
        moe_checkpoint_tensor found;
        if (ckpt->tensors[i].what.role == MOE_TENSOR_UNSET || ckpt->tensors[i].what.layer != index) continue;
        moe__ckpt_describe(ckpt, i, &found);
        result = moe__ckpt_take(weights, &found, &ckpt->tensors[i].what, err);
        moe__ckpt_add_module(&modules, found.name);
        taken++;
    }
    if (result == MOE_OK && taken == 0)
        result = moe__fail(err, MOE_ERROR_MISSING, "layer.layer_index",
                           "is %d: the checkpoint has no tensor of a MoE layer with that index", index);
    if (result == MOE_OK) result = moe__ckpt_check_strays(ckpt, &modules, index, err);
    if (result == MOE_OK) result = moe__ckpt_seal(weights, ckpt, err);
    if (result != MOE_OK) {
        moe_weights_destroy(weights);
        return result;
    }
    *out = weights;
    return moe__ok(err);
}
#endif // MOE_NO_CHECKPOINT

// >>cpu  kernels and phases of the CPU back end  One layer is at most four parallel phases: route and widen, GEMM 1
// with its activation, GEMM 2, finalize. Workers (one per thread) take tasks from a counter: a task is up to 32 rows of
// one expert x 96 weight rows, row tiles fastest, so that one hot expert is spread over all threads and its weights are
// read while they are in the cache. Called by >>plan alone. Every instruction set gives the same bits:
//
//   dot product  fp32, 16 lanes: lane l adds x[k] w[k] for k = l, l + 16, l + 32, ... in this order by fused
//                multiply-add, from +0; then lane i += lane i + 8 (i < 8), += lane i + 4, + 2, + 1. Weights and x widen
//                exactly. Rows are padded with zeros to 32 elements, which changes no lane (but -0 becomes +0).
//   GEMM 1       dot (of x, or of x * weight rounded, with the weight on the input), + bias, then
//                moe__activate(), one rounding to the intermediate's type.
//   GEMM 2       dot, + bias (tp_rank 0 alone). Row norm: u = v * (1 + w), each product rounded; s = the dot product of
//                u with itself; row = u * (1 / sqrt(s / H + epsilon)). A pruned expert's row is its constant, as it is.
//   output       acc = +0; over the token's slots in slot order acc = fma(weight, row, acc); the row of an identity
//                expert is x, of a constant one its vector; with the weight on the input the rows of experts have
//                weight 1. acc *= routed scale where it is on the output (scale * global scale, rounded).
//                Shared experts: f = scale * gate rounded, gate = sigmoid(dot(x, gate weights));
//                acc = fma(f, row, acc).
//                acc *= output scale; acc += out with ACCUMULATE; one rounding to out's type.
// A scale that is 1 multiplies too: that changes nothing.

enum {
    MOE__LANES = 16,
    MOE__CELL_ROWS = 4,   // x rows x weight rows whose sums a kernel keeps in registers
    MOE__WIDE_ROWS = 8,   // x rows where there are 32 registers
    MOE__CELL_COLS = 3,
    MOE__STRIP_COLS = 4,  // weight rows of the kernel for a single x row
    MOE__K_BLOCK = 512,   // 4 x rows of it are 8 KB: they stay in L1 while 96 weight rows pass
    MOE__TASK_ROWS = 32,
    MOE__TASK_COLS = 96,  // 96 weight rows of a K block: 96 KB in 16 bits, in L2 for the next 4 x rows
    MOE__SUMS = MOE__TASK_ROWS * MOE__TASK_COLS * MOE__LANES,
    MOE__COLUMN_BLOCK = 512, // of finalize
    MOE__ROWS_PER_TASK = 16
};

// ---- what an expert does between its GEMMs; shared with >>reference ----

static float moe__min_limit(float value, float limit) { return limit > 0 && value > limit ? limit : value; }
static float moe__clamp_limit(float value, float limit)
{
    return limit > 0 && value < -limit ? -limit : moe__min_limit(value, limit);
}

static int32_t moe__activation_has_sigmoid(int32_t kind)
{
    return kind == MOE_ACTIVATION_SWIGLU || kind == MOE_ACTIVATION_SWIGLU_STEP || kind == MOE_ACTIVATION_SITU ||
           kind == MOE_ACTIVATION_SILU;
}

// What the logistic function of these four is taken of.
static float moe__activation_sigmoid_of(const moe_activation_desc *act, float g)
{
    return act->kind == MOE_ACTIVATION_SWIGLU ? act->alpha * moe__min_limit(g, act->limit) : g;
}

// The rest of these four; s is the sigmoid.
static float moe__activation_with_sigmoid(const moe_activation_desc *act, float g, float u, float s)
{
    switch (act->kind) {
    case MOE_ACTIVATION_SWIGLU:
        return moe__min_limit(g, act->limit) * s * (moe__clamp_limit(u, act->limit) + act->beta);
    case MOE_ACTIVATION_SWIGLU_STEP: return moe__min_limit(g * s, act->limit) * moe__clamp_limit(u, act->limit);
    case MOE_ACTIVATION_SITU:
        if (act->beta != 0) u = act->beta * moe__tanhf(u / act->beta);
        return act->alpha * moe__tanhf(g / act->alpha) * s * u;
    default: return g * s;
    }
}

static float moe__gelu_erf(float x) { return 0.5f * x * (1.0f + moe__erff(x * 0.707106781f)); }
static float moe__gelu_tanh(float x)
{
    float inner = moe__fmaf(0.044715f * x * x, x, x);
    return 0.5f * x * (1.0f + moe__tanhf(0.797884561f * inner));
}

// Gated kinds take gate and up, the others x in g.
static float moe__activate(const moe_activation_desc *act, float g, float u)
{
    float positive = g < 0 ? 0 : g; // keeps NaN
    if (moe__activation_has_sigmoid(act->kind))
        return moe__activation_with_sigmoid(act, g, u, moe__sigmoidf(moe__activation_sigmoid_of(act, g)));
    switch (act->kind) {
    case MOE_ACTIVATION_GEGLU_ERF: return moe__gelu_erf(g) * u;
    case MOE_ACTIVATION_GEGLU_TANH: return moe__gelu_tanh(g) * u;
    case MOE_ACTIVATION_GELU_ERF: return moe__gelu_erf(g);
    case MOE_ACTIVATION_GELU_TANH: return moe__gelu_tanh(g);
    case MOE_ACTIVATION_RELU: return positive;
    case MOE_ACTIVATION_RELU2: return positive * positive;
    case MOE_ACTIVATION_RELU2_CLAMP:
        if (act->limit > 0) positive = act->limit * moe__tanhf(positive / act->limit);
        return positive * positive;
    default: return g;
    }
}

// ---- kernels ----

// w and x rows are aligned to 64 bytes or more and padded with zeros; n is a multiple of 32.
typedef struct moe__kernels {
    // sums [4 rows][3 columns][16 lanes] += (first: =) products of 4 x rows and 3 weight rows over n elements; by
    // dtype. The lines `ahead` bytes behind the weights are asked for meanwhile.
    void (*tile[3])(const float *const *x, const void *const *w, int32_t n, int32_t first, size_t ahead, float *sums);
    // sums [4][16] = products of one x row and 4 weight rows.
    void (*strip[3])(const float *x, const void *const *w, int32_t n, size_t ahead, float *sums);
    // out [count] = the lanes of each of `count` sums, added up; count is a multiple of 4.
    void (*reduce)(const float *sums, int32_t count, float *out);
    void (*add_scaled)(float scale, const float *x, float *acc, int32_t n); // acc = fma(scale, x, acc)
    void (*sigmoid)(float *x, int32_t n);                                   // n is a multiple of 16
    // As tile, for 8 x rows; NULL where registers are too few.
    void (*wide[3])(const float *const *x, const void *const *w, int32_t n, int32_t first, size_t ahead, float *sums);
} moe__kernels;

static float moe__same_f32(float value) { return value; }

#define MOE__SCALAR_KERNELS(suffix, type, widen) \
    static void moe__scalar_row_##suffix(const float *x, const type *w, int32_t n, float *sums) \
    { \
        for (int32_t k = 0; k < n; k += MOE__LANES) \
            for (int32_t l = 0; l < MOE__LANES; l++) sums[l] = moe__fmaf(widen(w[k + l]), x[k + l], sums[l]); \
    } \
    static void moe__scalar_tile_##suffix(const float *const *x, const void *const *w, int32_t n, int32_t first, \
                                          size_t ahead, float *sums) \
    { \
        (void)ahead; \
        if (first) memset(sums, 0, MOE__CELL_ROWS * MOE__CELL_COLS * MOE__LANES * sizeof sums[0]); \
        for (int32_t r = 0; r < MOE__CELL_ROWS; r++) \
            for (int32_t c = 0; c < MOE__CELL_COLS; c++) \
                moe__scalar_row_##suffix(x[r], (const type *)w[c], n, sums + (r * MOE__CELL_COLS + c) * MOE__LANES); \
    } \
    static void moe__scalar_strip_##suffix(const float *x, const void *const *w, int32_t n, size_t ahead, float *sums) \
    { \
        (void)ahead; \
        memset(sums, 0, MOE__STRIP_COLS * MOE__LANES * sizeof sums[0]); \
        for (int32_t c = 0; c < MOE__STRIP_COLS; c++) \
            moe__scalar_row_##suffix(x, (const type *)w[c], n, sums + c * MOE__LANES); \
    }
MOE__SCALAR_KERNELS(f32, float, moe__same_f32)
MOE__SCALAR_KERNELS(bf16, uint16_t, moe__bf16_to_f32)
MOE__SCALAR_KERNELS(f16, uint16_t, moe__f16_to_f32)

static void moe__scalar_reduce(const float *sums, int32_t count, float *out)
{
    for (int32_t i = 0; i < count; i++, sums += MOE__LANES) {
        float lane[8];
        for (int32_t l = 0; l < 8; l++) lane[l] = sums[l] + sums[l + 8];
        for (int32_t l = 0; l < 4; l++) lane[l] = lane[l] + lane[l + 4];
        out[i] = (lane[0] + lane[2]) + (lane[1] + lane[3]);
    }
}

static void moe__scalar_add_scaled(float scale, const float *x, float *acc, int32_t n)
{
    for (int32_t i = 0; i < n; i++) acc[i] = moe__fmaf(scale, x[i], acc[i]);
}

static void moe__scalar_sigmoid(float *x, int32_t n)
{
    for (int32_t i = 0; i < n; i++) x[i] = moe__sigmoidf(x[i]);
}

#if defined(MOE__X86) || defined(MOE__NEON)
// One text for all vector lengths: `lanes` of the 16 at a time, so that 12 sums, 3 weights and 1 x fill 16 registers.
// The x stays in its register by force: gcc would load it again for each sum, three loads for one (48 -> 71 GFLOPS a
// core of the tile alone, AVX-512 on a Xeon with H100, November 2026).
#if defined(MOE__NEON)
#  define MOE__KEEP(v) __asm__("" : "+w"(v))
#else
#  define MOE__KEEP(v) __asm__("" : "+v"(v))
#endif
#define MOE__TILE_ROW(r, fma, load) \
    v = load(x##r + k); \
    MOE__KEEP(v); \
    a##r##0 = fma(w0, v, a##r##0); \
    a##r##1 = fma(w1, v, a##r##1); \
    a##r##2 = fma(w2, v, a##r##2);
#define MOE__TILE_BEGIN(r, vec, lanes, load, set1) \
    const float *x##r = x[r] + lane; \
    vec a##r##0 = first ? set1(0) : load(s + 16 * (3 * r)); \
    vec a##r##1 = first ? set1(0) : load(s + 16 * (3 * r + 1)); \
    vec a##r##2 = first ? set1(0) : load(s + 16 * (3 * r + 2));
#define MOE__TILE_END(r, store) \
    store(s + 16 * (3 * r), a##r##0); \
    store(s + 16 * (3 * r + 1), a##r##1); \
    store(s + 16 * (3 * r + 2), a##r##2);
#define MOE__ROWS_4(text, ...) text(0, __VA_ARGS__) text(1, __VA_ARGS__) text(2, __VA_ARGS__) text(3, __VA_ARGS__)
#define MOE__ROWS_8(text, ...) \
    MOE__ROWS_4(text, __VA_ARGS__) \
    text(4, __VA_ARGS__) text(5, __VA_ARGS__) text(6, __VA_ARGS__) text(7, __VA_ARGS__)
#define MOE__VECTOR_TILE(name, rows, target, vec, lanes, type, load, widen, set1, fma, store) \
    target static void name(const float *const *x, const void *const *w, int32_t n, int32_t first, size_t ahead, \
                            float *sums) \
    { \
        for (int32_t lane = 0; lane < MOE__LANES; lane += lanes) { \
            const type *p0 = (const type *)w[0] + lane, *p1 = (const type *)w[1] + lane; \
            const type *p2 = (const type *)w[2] + lane; \
            float *s = sums + lane; \
            rows(MOE__TILE_BEGIN, vec, lanes, load, set1) \
            for (int32_t k = 0; k < n; k += MOE__LANES) { \
                vec w0 = widen(p0 + k), w1 = widen(p1 + k), w2 = widen(p2 + k), v; \
                __builtin_prefetch((const char *)(p0 + k) + ahead); \
                __builtin_prefetch((const char *)(p1 + k) + ahead); \
                __builtin_prefetch((const char *)(p2 + k) + ahead); \
                rows(MOE__TILE_ROW, fma, load) \
            } \
            rows(MOE__TILE_END, store) \
        } \
    }

// Few sums and long runs: memory is the clock here.
#define MOE__VECTOR_STRIP(name, target, vec, lanes, type, load, widen, set1, fma, store) \
    target static void name(const float *x, const void *const *w, int32_t n, size_t ahead, float *sums) \
    { \
        const type *p0 = (const type *)w[0], *p1 = (const type *)w[1]; \
        const type *p2 = (const type *)w[2], *p3 = (const type *)w[3]; \
        vec a[4][MOE__LANES / lanes]; \
        for (int32_t i = 0; i < MOE__LANES / lanes; i++) a[0][i] = a[1][i] = a[2][i] = a[3][i] = set1(0); \
        for (int32_t k = 0; k < n; k += MOE__LANES) { \
            __builtin_prefetch((const char *)(p0 + k) + ahead); \
            __builtin_prefetch((const char *)(p1 + k) + ahead); \
            __builtin_prefetch((const char *)(p2 + k) + ahead); \
            __builtin_prefetch((const char *)(p3 + k) + ahead); \
            _Pragma("GCC unroll 4") \
            for (int32_t i = 0; i < MOE__LANES / lanes; i++) { \
                vec v = load(x + k + lanes * i); \
                a[0][i] = fma(widen(p0 + k + lanes * i), v, a[0][i]); \
                a[1][i] = fma(widen(p1 + k + lanes * i), v, a[1][i]); \
                a[2][i] = fma(widen(p2 + k + lanes * i), v, a[2][i]); \
                a[3][i] = fma(widen(p3 + k + lanes * i), v, a[3][i]); \
            } \
        } \
        for (int32_t i = 0; i < MOE__LANES / lanes; i++) \
            for (int32_t c = 0; c < MOE__STRIP_COLS; c++) store(sums + MOE__LANES * c + lanes * i, a[c][i]); \
    }

// The scalar texts of moe__expf() and moe__sigmoidf(), operation by operation: e^-|x| needs no case for overflow, and a
// power of two in two factors rounds only where the result is denormal, as there.
#define MOE__VECTOR_ELEMENTWISE(prefix, target, vec, ivec, lanes, load, set1, fma, max, store) \
    target static void prefix##_add_scaled(float scale, const float *x, float *acc, int32_t n) \
    { \
        int32_t whole = n / lanes * lanes; \
        vec s = set1(scale); \
        for (int32_t i = 0; i < whole; i += lanes) store(acc + i, fma(s, load(x + i), load(acc + i))); \
        for (int32_t i = whole; i < n; i++) acc[i] = moe__fmaf(scale, x[i], acc[i]); \
    } \
    target static void prefix##_sigmoid(float *x, int32_t n) \
    { \
        const vec magic = set1(12582912.0f), one = set1(1.0f); \
        for (int32_t i = 0; i < n; i += lanes) { \
            vec v = load(x + i), r, q, e; \
            ivec negative = (ivec)v >> 31, k, half; /* all bits or none */ \
            v = max(set1(-104.0f), (vec)((ivec)v | (ivec)set1(-0.0f))); \
            e = fma(v, set1(1.44269502f), magic); \
            k = (ivec)e - (ivec)magic; \
            e = e - magic; \
            r = fma(e, set1(-0.693147182f), v); \
            r = fma(e, set1(1.90465421e-9f), r); \
            q = fma(set1(0.00139406149f), r, set1(0.00836882833f)); \
            q = fma(q, r, set1(0.0416664034f)); \
            q = fma(q, r, set1(0.166665196f)); \
            q = fma(q, r, set1(0.5f)); \
            r = fma(r * r, q, r) + one; \
            half = k >> 1; \
            e = r * (vec)((half + 127) << 23) * (vec)((k - half + 127) << 23); \
            r = (vec)(((ivec)e & negative) | ((ivec)one & ~negative)); \
            store(x + i, r / (one + e)); \
        } \
    }

#define MOE__VECTOR_KERNELS(prefix, target, vec, ivec, lanes, load, load_bf16, load_f16, set1, fma, max, store) \
    MOE__VECTOR_TILE(prefix##_tile_f32, MOE__ROWS_4, target, vec, lanes, float, load, load, set1, fma, store) \
    MOE__VECTOR_TILE(prefix##_tile_bf16, MOE__ROWS_4, target, vec, lanes, uint16_t, load, load_bf16, set1, fma, store) \
    MOE__VECTOR_TILE(prefix##_tile_f16, MOE__ROWS_4, target, vec, lanes, uint16_t, load, load_f16, set1, fma, store) \
    MOE__VECTOR_STRIP(prefix##_strip_f32, target, vec, lanes, float, load, load, set1, fma, store) \
    MOE__VECTOR_STRIP(prefix##_strip_bf16, target, vec, lanes, uint16_t, load, load_bf16, set1, fma, store) \
    MOE__VECTOR_STRIP(prefix##_strip_f16, target, vec, lanes, uint16_t, load, load_f16, set1, fma, store) \
    MOE__VECTOR_ELEMENTWISE(prefix, target, vec, ivec, lanes, load, set1, fma, max, store)
#endif

#if defined(MOE__X86)
#define MOE__AVX2 __attribute__((target("avx2,fma,f16c")))
#define MOE__AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma,f16c")))
typedef int32_t moe__i32x8 __attribute__((vector_size(32)));
typedef int32_t moe__i32x16 __attribute__((vector_size(64)));

MOE__AVX2 static inline __m256 moe__avx2_bf16(const uint16_t *p)
{
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)), 16));
}
MOE__AVX2 static inline __m256 moe__avx2_f16(const uint16_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}
// Masked by all ones, which costs nothing: the plain forms set off gcc 12's warning of uninitialised values.
MOE__AVX512 static inline __m512 moe__avx512_max(__m512 a, __m512 b) { return _mm512_maskz_max_ps(0xffff, a, b); }
MOE__AVX512 static inline __m512 moe__avx512_bf16(const uint16_t *p)
{
    __m256i narrow = _mm256_loadu_si256((const __m256i *)(const void *)p);
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, narrow), 16));
}
MOE__AVX512 static inline __m512 moe__avx512_f16(const uint16_t *p)
{
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i *)(const void *)p));
}

MOE__VECTOR_KERNELS(moe__avx2, MOE__AVX2, __m256, moe__i32x8, 8, _mm256_loadu_ps, moe__avx2_bf16, moe__avx2_f16,
                    _mm256_set1_ps, _mm256_fmadd_ps, _mm256_max_ps, _mm256_storeu_ps)
MOE__VECTOR_KERNELS(moe__avx512, MOE__AVX512, __m512, moe__i32x16, 16, _mm512_loadu_ps, moe__avx512_bf16,
                    moe__avx512_f16, _mm512_set1_ps, _mm512_fmadd_ps, moe__avx512_max, _mm512_storeu_ps)
#define MOE__AVX512_WIDE(name, type, widen) \
    MOE__VECTOR_TILE(name, MOE__ROWS_8, MOE__AVX512, __m512, 16, type, _mm512_loadu_ps, widen, _mm512_set1_ps, \
                     _mm512_fmadd_ps, _mm512_storeu_ps)
MOE__AVX512_WIDE(moe__avx512_wide_f32, float, _mm512_loadu_ps)
MOE__AVX512_WIDE(moe__avx512_wide_bf16, uint16_t, moe__avx512_bf16)
MOE__AVX512_WIDE(moe__avx512_wide_f16, uint16_t, moe__avx512_f16)

// Four sums at a time, so that the last steps have full registers; AVX-512 machines use it too.
MOE__AVX2 static void moe__avx2_reduce(const float *sums, int32_t count, float *out)
{
    for (int32_t i = 0; i < count; i += 4) {
        __m128 a[4], low, high;
        _Pragma("GCC unroll 4") // else a[] goes through memory at -O2
        for (int32_t j = 0; j < 4; j++, sums += MOE__LANES) {
            __m256 v = _mm256_add_ps(_mm256_loadu_ps(sums), _mm256_loadu_ps(sums + 8));
            a[j] = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        }
        low = _mm_add_ps(_mm_movelh_ps(a[0], a[1]), _mm_movehl_ps(a[1], a[0]));
        high = _mm_add_ps(_mm_movelh_ps(a[2], a[3]), _mm_movehl_ps(a[3], a[2]));
        _mm_storeu_ps(out + i, _mm_add_ps(_mm_shuffle_ps(low, high, 0x88), _mm_shuffle_ps(low, high, 0xdd)));
    }
}
#endif

#if defined(MOE__NEON)
typedef int32_t moe__i32x4 __attribute__((vector_size(16)));
static inline float32x4_t moe__neon_bf16(const uint16_t *p)
{
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
static inline float32x4_t moe__neon_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline float32x4_t moe__neon_fma(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }
MOE__VECTOR_KERNELS(moe__neon, , float32x4_t, moe__i32x4, 4, vld1q_f32, moe__neon_bf16, moe__neon_f16, vdupq_n_f32,
                    moe__neon_fma, vmaxq_f32, vst1q_f32)
#endif

static const moe__kernels *moe__kernels_of(int32_t isa)
{
#define MOE__KERNEL_TABLE(isa, reduce, wide_f32, wide_bf16, wide_f16) \
    { { isa##_tile_f32, isa##_tile_bf16, isa##_tile_f16 }, { isa##_strip_f32, isa##_strip_bf16, isa##_strip_f16 }, \
      reduce, isa##_add_scaled, isa##_sigmoid, { wide_f32, wide_bf16, wide_f16 } }
    static const moe__kernels scalar = MOE__KERNEL_TABLE(moe__scalar, moe__scalar_reduce, NULL, NULL, NULL);
#if defined(MOE__X86)
    static const moe__kernels avx2 = MOE__KERNEL_TABLE(moe__avx2, moe__avx2_reduce, NULL, NULL, NULL);
    static const moe__kernels avx512 = MOE__KERNEL_TABLE(moe__avx512, moe__avx2_reduce, moe__avx512_wide_f32,
                                                           moe__avx512_wide_bf16, moe__avx512_wide_f16);
    if (isa == MOE__ISA_AVX512) return &avx512;
    if (isa == MOE__ISA_AVX2) return &avx2;
#endif
#if defined(MOE__NEON)
    static const moe__kernels neon = MOE__KERNEL_TABLE(moe__neon, moe__scalar_reduce, NULL, NULL, NULL);
    if (isa == MOE__ISA_NEON) return &neon;
#endif
#undef MOE__KERNEL_TABLE
    (void)isa;
    return &scalar;
}

// ---- work ----

#if defined(_MSC_VER) && !defined(__GNUC__) && !defined(MOE_NO_THREADS)
#  include <intrin.h>
static int32_t moe__take(int32_t *counter) { return (int32_t)_InterlockedExchangeAdd((volatile long *)counter, 1); }
#elif defined(__GNUC__) // also without threads of our own: the parallel-for hook may bring them
static int32_t moe__take(int32_t *counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }
#else
static int32_t moe__take(int32_t *counter) { return (*counter)++; }
#endif

typedef struct moe__work {
    int32_t next, tasks;
    void (*task)(void *arg, int32_t index, int32_t worker);
    void *arg;
} moe__work;

static void moe__work_loop(void *arg, int32_t worker)
{
    moe__work *work = (moe__work *)arg;
    for (;;) {
        int32_t index = moe__take(&work->next);
        if (index >= work->tasks) return;
        work->task(work->arg, index, worker);
    }
}

// task(arg, i, worker) for i in 0..tasks-1; no two tasks of one worker overlap, so that it can have scratch memory.
static void moe__work_run(moe_context *ctx, int32_t tasks, void (*task)(void *arg, int32_t index, int32_t worker),
                          void *arg)
{
    moe__work work;
    work.next = 0;
    work.tasks = tasks;
    work.task = task;
    work.arg = arg;
    if (tasks > 0) moe__parallel(ctx, moe__min32(tasks, ctx->desc.threads), moe__work_loop, &work);
}

// ---- one layer ----

// What the phases share; filled by >>plan. A group is a local expert, an always-on one, or last the shared experts,
// whose rows are the tokens. Row tables, x and the intermediate are as long as the rows of this call.
typedef struct moe__cpu {
    moe_context *ctx;
    const moe__kernels *kernels;
    const moe_layer_desc *layer;
    const moe_weights *weights;
    int32_t mid_dtype;          // the intermediate is rounded to it
    int32_t blocks, shared_rows; // groups without the shared ones; 0: no shared experts in this call
    const int32_t *expert_of_block; // global id
    const int32_t *offsets;     // [blocks + 1] rows of a group
    const int32_t *slot_of_row; // [rows] NULL: row r is x row r
    int32_t slots;              // per token
    const float *x;             // [T][ld1] fp32, padded with zeros
    const float *slot_weights;  // [T][slots]
    float *x_rows;              // [rows][ld1] x times weight, with the weight on the input; else NULL
    float *mid, *mid_shared;    // [rows][ld2]
    float *rows, *rows_shared;  // [rows][slice_ld]: columns [slice, slice + slice_cols) of GEMM 2
    int32_t slice, slice_cols, slice_ld;
    int32_t *task_begin;        // [blocks + 2] first task of a group
    float *scratch;             // MOE__SCRATCH floats per worker
} moe__cpu;

enum { MOE__SCRATCH = MOE__SUMS + 3 * MOE__TASK_ROWS * MOE__TASK_COLS };

typedef struct moe__cpu_task {
    moe__block block;
    const float *constant;      // of a pruned expert
    const moe_activation_desc *act;
    int32_t group, first, rows; // rows of the task
    int32_t col, cols;          // weight rows
    int32_t is_shared;
} moe__cpu_task;

static int32_t moe__group_rows(const moe__cpu *cpu, int32_t group)
{
    return group < cpu->blocks ? cpu->offsets[group + 1] - cpu->offsets[group] : cpu->shared_rows;
}

// Tasks of GEMM 1 (rows1 columns of each group) or GEMM 2 (the slice); returns their number.
static int32_t moe__cpu_split(const moe__cpu *cpu, int32_t gemm)
{
    const moe__layout *layout = &cpu->weights->layout;
    int32_t groups = cpu->blocks + (cpu->shared_rows > 0), total = 0;
    for (int32_t g = 0; g < groups; g++) {
        int32_t rows = moe__group_rows(cpu, g), cols = cpu->slice_cols;
        if (gemm == 1) {
            cols = g < cpu->blocks ? layout->expert.rows1 : layout->shared.rows1;
            if (g < cpu->blocks && rows > 0 && moe__weights_expert_constant(cpu->weights, g) != NULL) cols = 0;
        }
        cpu->task_begin[g] = total;
        total += (rows + MOE__TASK_ROWS - 1) / MOE__TASK_ROWS * ((cols + MOE__TASK_COLS - 1) / MOE__TASK_COLS);
    }
    cpu->task_begin[groups] = total;
    return total;
}

static void moe__cpu_task_at(const moe__cpu *cpu, int32_t index, int32_t all_cols, moe__cpu_task *task)
{
    int32_t low = 0, high = cpu->blocks + (cpu->shared_rows > 0), rows, tiles, tile;
    while (high - low > 1) { // the last group that begins at or before index
        int32_t middle = (low + high) / 2;
        if (cpu->task_begin[middle] <= index) low = middle;
        else high = middle;
    }
    task->group = low;
    task->is_shared = low == cpu->blocks;
    task->block = task->is_shared ? moe__weights_shared(cpu->weights) : moe__weights_expert(cpu->weights, low);
    task->constant = task->is_shared ? NULL : moe__weights_expert_constant(cpu->weights, low);
    task->act = task->is_shared ? &cpu->layer->shared.activation : &cpu->layer->activation;
    if (all_cols < 0) all_cols = task->block.shape->rows1;
    rows = moe__group_rows(cpu, low);
    tiles = (rows + MOE__TASK_ROWS - 1) / MOE__TASK_ROWS;
    index -= cpu->task_begin[low];
    tile = (rows + tiles - 1) / tiles;              // even tiles
    tile = (tile + MOE__CELL_ROWS - 1) / MOE__CELL_ROWS * MOE__CELL_ROWS;
    task->first = index % tiles * tile;
    task->rows = moe__max32(0, moe__min32(tile, rows - task->first));
    if (!task->is_shared) task->first += cpu->offsets[low];
    task->col = index / tiles * MOE__TASK_COLS;
    task->cols = moe__min32(MOE__TASK_COLS, all_cols - task->col);
}

// dots [rows][96] of up to 32 x rows and 96 weight rows. x has room for MOE__WIDE_ROWS - 1 more pointers.
static void moe__cpu_dots(const moe__kernels *kernels, int32_t dtype, const float **x, int32_t rows,
                          const unsigned char *w, size_t row_bytes, int32_t cols, int32_t n, float *sums, float *dots)
{
    size_t element = dtype == MOE_DTYPE_F32 ? 4 : 2;
    int32_t tiles = (cols + MOE__CELL_COLS - 1) / MOE__CELL_COLS, step = rows <= MOE__CELL_ROWS ? 1 : tiles;
    int32_t wide = rows > MOE__CELL_ROWS && kernels->wide[0] != NULL, cell = wide ? MOE__WIDE_ROWS : MOE__CELL_ROWS;
    const void *weight[MOE__STRIP_COLS];
    float values[MOE__WIDE_ROWS * MOE__CELL_COLS];
    if (rows == 1) {
        for (int32_t c = 0; c < cols; c += MOE__STRIP_COLS) {
            for (int32_t i = 0; i < MOE__STRIP_COLS; i++)
                weight[i] = w + (size_t)moe__min32(c + i, cols - 1) * row_bytes;
            kernels->strip[dtype - MOE_DTYPE_F32](x[0], weight, n, MOE__STRIP_COLS * row_bytes, sums);
            kernels->reduce(sums, MOE__STRIP_COLS, dots + c); // dots has room for whole strips
        }
        return;
    }
    for (int32_t r = rows; r % cell != 0; r++) x[r] = x[rows - 1]; // computed, not used
    for (int32_t t0 = 0; t0 < tiles; t0 += step) {
        for (int32_t k = 0; k < n; k += MOE__K_BLOCK)
            for (int32_t r = 0; r < rows; r += cell) {
                const float *xk[MOE__WIDE_ROWS];
                // Next from memory: the same K block of the next weight rows, as long as no x row has seen them, else
                // the next K block of these.
                size_t ahead = k == 0 || rows <= MOE__CELL_ROWS ? MOE__CELL_COLS * row_bytes : MOE__K_BLOCK * element;
                if (r > 0) ahead = MOE__K_BLOCK * element;
                for (int32_t i = 0; i < cell; i++) xk[i] = x[r + i] + k;
                for (int32_t t = t0; t < t0 + step; t++) {
                    for (int32_t i = 0; i < MOE__CELL_COLS; i++)
                        weight[i] =
                            w + (size_t)moe__min32(t * MOE__CELL_COLS + i, cols - 1) * row_bytes + (size_t)k * element;
                    (wide ? kernels->wide : kernels->tile)[dtype - MOE_DTYPE_F32](
                        xk, weight, moe__min32(MOE__K_BLOCK, n - k), k == 0, ahead,
                        sums + (r / cell * tiles + t) * cell * MOE__CELL_COLS * MOE__LANES);
                }
            }
    }
    for (int32_t r = 0; r < rows; r += cell)
        for (int32_t t = 0; t < tiles; t++) {
            kernels->reduce(sums + (r / cell * tiles + t) * cell * MOE__CELL_COLS * MOE__LANES,
                            cell * MOE__CELL_COLS, values);
            for (int32_t i = 0; i < cell && r + i < rows; i++)
                memcpy(dots + (r + i) * MOE__TASK_COLS + t * MOE__CELL_COLS, values + i * MOE__CELL_COLS,
                       MOE__CELL_COLS * sizeof values[0]);
        }
}

// gate [n] becomes the activation of gate and up; room for whole vectors behind n, and s is scratch of that size.
static void moe__cpu_activate(const moe__kernels *kernels, const moe_activation_desc *act, float *gate, const float *up,
                              float *s, int32_t n)
{
    // The usual case: the operations of moe__activate() without its branches.
    int32_t unclamped = act->kind == MOE_ACTIVATION_SWIGLU && act->limit == 0;
    if (!moe__activation_has_sigmoid(act->kind)) {
        for (int32_t i = 0; i < n; i++) gate[i] = moe__activate(act, gate[i], up[i]);
        return;
    }
    if (unclamped) for (int32_t i = 0; i < n; i++) s[i] = act->alpha * gate[i];
    else for (int32_t i = 0; i < n; i++) s[i] = moe__activation_sigmoid_of(act, gate[i]);
    for (int32_t i = n; i % MOE__LANES != 0; i++) s[i] = 0;
    kernels->sigmoid(s, (n + MOE__LANES - 1) / MOE__LANES * MOE__LANES);
    if (unclamped) for (int32_t i = 0; i < n; i++) gate[i] = gate[i] * s[i] * (up[i] + act->beta);
    else for (int32_t i = 0; i < n; i++) gate[i] = moe__activation_with_sigmoid(act, gate[i], up[i], s[i]);
}

static moe_activation_desc moe__cpu_activation(const moe__cpu *cpu, const moe__cpu_task *task)
{
    moe_activation_desc act = *task->act;
    int32_t expert = task->is_shared ? -1 : cpu->expert_of_block[task->group];
    if (act.per_expert && expert >= 0 && expert < cpu->layer->num_experts) {
        act.alpha = moe__weights_table(cpu->weights, MOE_TENSOR_ALPHA)[expert];
        act.beta = moe__weights_table(cpu->weights, MOE_TENSOR_BETA)[expert];
        act.limit = moe__weights_table(cpu->weights, MOE_TENSOR_LIMIT)[expert];
    }
    return act;
}

static void moe__cpu_gemm1(void *arg, int32_t index, int32_t worker)
{
    const moe__cpu *cpu = (const moe__cpu *)arg;
    const float *x[MOE__TASK_ROWS + MOE__WIDE_ROWS];
    float *sums = cpu->scratch + (size_t)worker * MOE__SCRATCH, *dots = sums + MOE__SUMS;
    float gate[MOE__TASK_COLS], up[MOE__TASK_COLS], s[MOE__TASK_COLS];
    int32_t gated = moe__layer_is_gated(cpu->layer), dtype = cpu->weights->layout.dtype, first, features;
    const moe__block_shape *shape;
    moe_activation_desc act;
    moe__cpu_task task;
    moe__cpu_task_at(cpu, index, -1, &task);
    if (task.rows == 0) return;
    shape = task.block.shape;
    act = moe__cpu_activation(cpu, &task);
    for (int32_t r = 0; r < task.rows; r++) {
        int32_t row = task.first + r;
        if (task.is_shared || cpu->slot_of_row == NULL) x[r] = cpu->x + (size_t)row * (size_t)shape->ld1;
        else if (cpu->x_rows != NULL) x[r] = cpu->x_rows + (size_t)row * (size_t)shape->ld1;
        else x[r] = cpu->x + (size_t)(cpu->slot_of_row[row] / cpu->slots) * (size_t)shape->ld1;
    }
    {
        size_t row_bytes = (size_t)shape->ld1 * (dtype == MOE_DTYPE_F32 ? 4 : 2);
        moe__cpu_dots(cpu->kernels, dtype, x, task.rows, task.block.w1 + (size_t)task.col * row_bytes, row_bytes,
                      task.cols, shape->ld1, sums, dots);
    }
    first = task.col >> gated;
    features = task.cols >> gated;
    for (int32_t r = 0; r < task.rows; r++) {
        float *mid = (task.is_shared ? cpu->mid_shared : cpu->mid) + (size_t)(task.first + r) * (size_t)shape->ld2;
        float *dot = dots + r * MOE__TASK_COLS;
        if (task.block.bias1 != NULL)
            for (int32_t c = 0; c < task.cols; c++) dot[c] += task.block.bias1[task.col + c];
        for (int32_t i = 0; i < features; i++) {
            gate[i] = dot[i << gated];
            up[i] = dot[(i << gated) + gated];
        }
        moe__cpu_activate(cpu->kernels, &act, gate, up, s, features);
        for (int32_t i = 0; i < features; i++) mid[first + i] = moe__round_to(gate[i], cpu->mid_dtype);
        for (int32_t i = first + features; first + features == shape->features && i < shape->ld2; i++) mid[i] = 0;
    }
}

static void moe__cpu_gemm2(void *arg, int32_t index, int32_t worker)
{
    const moe__cpu *cpu = (const moe__cpu *)arg;
    const float *x[MOE__TASK_ROWS + MOE__WIDE_ROWS];
    float *sums = cpu->scratch + (size_t)worker * MOE__SCRATCH, *dots = sums + MOE__SUMS;
    int32_t dtype = cpu->weights->layout.dtype, column;
    const moe__block_shape *shape;
    moe__cpu_task task;
    moe__cpu_task_at(cpu, index, cpu->slice_cols, &task);
    if (task.rows == 0) return;
    shape = task.block.shape;
    column = cpu->slice + task.col;
    if (task.constant == NULL) {
        size_t row_bytes = (size_t)shape->ld2 * (dtype == MOE_DTYPE_F32 ? 4 : 2);
        const float *mid = task.is_shared ? cpu->mid_shared : cpu->mid;
        for (int32_t r = 0; r < task.rows; r++) x[r] = mid + (size_t)(task.first + r) * (size_t)shape->ld2;
        moe__cpu_dots(cpu->kernels, dtype, x, task.rows, task.block.w2 + (size_t)column * row_bytes, row_bytes,
                      task.cols, shape->ld2, sums, dots);
    }
    for (int32_t r = 0; r < task.rows; r++) {
        float *row = (task.is_shared ? cpu->rows_shared : cpu->rows) +
                     (size_t)(task.first + r) * (size_t)cpu->slice_ld + task.col;
        const float *dot = dots + r * MOE__TASK_COLS;
        const float *bias = cpu->layer->parallel.tp_rank == 0 ? task.block.bias2 : NULL;
        for (int32_t c = 0; c < task.cols; c++) {
            if (task.constant != NULL) row[c] = cpu->layer->parallel.tp_rank == 0 ? task.constant[column + c] : 0;
            else row[c] = bias != NULL ? dot[c] + bias[column + c] : dot[c];
        }
    }
}

// One dot product by the rules above; the vectors are padded to 32 with zeros.
static float moe__cpu_dot(const moe__kernels *kernels, const float *x, const float *w, int32_t n)
{
    float sums[MOE__STRIP_COLS * MOE__LANES], dots[MOE__STRIP_COLS];
    const void *weight[MOE__STRIP_COLS];
    for (int32_t i = 0; i < MOE__STRIP_COLS; i++) weight[i] = w;
    kernels->strip[0](x, weight, n, 0, sums);
    kernels->reduce(sums, MOE__STRIP_COLS, dots);
    return dots[0];
}

// Row norm, in place, of a whole GEMM 2 row padded to 32 elements: the padding is set to zero.
static void moe__cpu_row_norm(const moe__cpu *cpu, float *row)
{
    const float *weight = moe__weights_table(cpu->weights, MOE_TENSOR_ROW_NORM);
    int32_t hidden = cpu->layer->hidden_size, ld = (int32_t)moe__align_up((uint64_t)hidden, MOE__ROW_ALIGN);
    float scale;
    for (int32_t i = 0; i < hidden; i++) row[i] = moe__mulf(row[i], 1.0f + weight[i]);
    for (int32_t i = hidden; i < ld; i++) row[i] = 0;
    scale = 1.0f / moe__sqrtf(moe__cpu_dot(cpu->kernels, row, row, ld) / (float)hidden + cpu->layer->row_norm_epsilon);
    for (int32_t i = 0; i < hidden; i++) row[i] = row[i] * scale;
}

// The row norm of every row of an expert with matrices.
static void moe__cpu_norm_rows(void *arg, int32_t index, int32_t worker)
{
    const moe__cpu *cpu = (const moe__cpu *)arg;
    int32_t begin = index * MOE__ROWS_PER_TASK, end = moe__min32(cpu->offsets[cpu->blocks], begin + MOE__ROWS_PER_TASK);
    int32_t group = 0;
    (void)worker;
    for (int32_t row = begin; row < end; row++) {
        while (row >= cpu->offsets[group + 1]) group++;
        if (moe__weights_expert_constant(cpu->weights, group) == NULL)
            moe__cpu_row_norm(cpu, cpu->rows + (size_t)row * (size_t)cpu->slice_ld);
    }
}

// x times weight for GEMM 1, where the weight is on the input.
static void moe__cpu_weigh_rows(void *arg, int32_t index, int32_t worker)
{
    const moe__cpu *cpu = (const moe__cpu *)arg;
    int32_t begin = index * MOE__ROWS_PER_TASK, end = moe__min32(cpu->offsets[cpu->blocks], begin + MOE__ROWS_PER_TASK);
    int64_t ld = cpu->weights->layout.expert.ld1;
    (void)worker;
    for (int32_t row = begin; row < end; row++) {
        int32_t slot = cpu->slot_of_row[row];
        const float *x = cpu->x + slot / cpu->slots * ld;
        for (int64_t i = 0; i < ld; i++) cpu->x_rows[row * ld + i] = x[i] * cpu->slot_weights[slot];
    }
}

// ---- finalize ----

// Sums of tokens from rows, columns [first, first + columns). Rows modes have one slot per token: the row itself.
typedef struct moe__finalize {
    const moe__kernels *kernels;
    const moe_layer_desc *layer;
    const moe_weights *weights;
    int32_t tokens, slots, tokens_per_task;
    const int32_t *ids;         // [T][slots]; NULL: no special experts
    const float *slot_weights;  // [T][slots]; NULL: 1
    const int32_t *row_of_slot; // [T][slots]; NULL: row t
    const void *rows;           // [][rows_ld]
    int32_t rows_dtype;
    int64_t rows_ld;
    const float *rows_shared;   // [T][rows_ld], or NULL
    const float *shared_gate;   // [T], or NULL: the layer's own
    const float *x;             // [T][x_ld] padded with zeros; for identity experts and the layer's gate
    int64_t x_ld;
    float routed_scale;
    int32_t first, columns;
    void *out;                  // [][out_ld]
    const int32_t *out_rows;    // [T] row of out; NULL: row t
    int32_t out_dtype, accumulate;
    int64_t out_ld;
} moe__finalize;

static float moe__shared_factor(const moe__finalize *f, int32_t token)
{
    const float *table = moe__weights_table(f->weights, MOE_TENSOR_SHARED_TOKEN_GATE);
    int32_t padded = (int32_t)moe__align_up((uint64_t)f->layer->hidden_size, MOE__ROW_ALIGN);
    if (f->shared_gate != NULL) return moe__mulf(f->layer->shared.scale, f->shared_gate[token]);
    if (table == NULL) return f->layer->shared.scale;
    return moe__mulf(f->layer->shared.scale,
                     moe__sigmoidf(moe__cpu_dot(f->kernels, f->x + token * f->x_ld, table, padded)));
}

// What a special expert adds, from column `first` on; NULL: nothing, or another rank adds it.
static const float *moe__special_row(const moe__finalize *f, int32_t token, int32_t id, int32_t first)
{
    const moe_layer_desc *layer = f->layer;
    int32_t special = id - layer->num_experts;
    if (special < 0 || special >= layer->routing.special_experts) return NULL;
    if (layer->parallel.omit_common || layer->parallel.tp_rank != 0) return NULL;
    if (layer->routing.special_kind == MOE_SPECIAL_IDENTITY) return f->x + token * f->x_ld + first;
    if (layer->routing.special_kind != MOE_SPECIAL_CONSTANT) return NULL;
    return moe__weights_table(f->weights, MOE_TENSOR_CONSTANT) + (int64_t)special * layer->hidden_size + first;
}

// acc = the routed sum of n columns from column `first` on.
static void moe__finalize_routed(const moe__finalize *f, int32_t token, int32_t first, int32_t n, float *acc)
{
    int32_t on_input = f->layer->routing.weight_on == MOE_WEIGHT_ON_INPUT;
    float wide[MOE__COLUMN_BLOCK];
    for (int32_t i = 0; i < n; i++) acc[i] = 0;
    for (int32_t j = 0; j < f->slots; j++) {
        int64_t slot = (int64_t)token * f->slots + j;
        int32_t row = f->row_of_slot == NULL ? token : f->row_of_slot[slot];
        float weight = f->slot_weights == NULL ? 1 : f->slot_weights[slot];
        int64_t at = row * f->rows_ld + (first - f->first);
        const float *source = wide;
        if (row < 0) source = f->ids == NULL ? NULL : moe__special_row(f, token, f->ids[slot], first);
        else if (f->rows_dtype == MOE_DTYPE_F32) source = (const float *)f->rows + at;
        else for (int32_t i = 0; i < n; i++) wide[i] = moe__load(f->rows, f->rows_dtype, at + i);
        if (row >= 0 && on_input) weight = 1;
        if (source != NULL) f->kernels->add_scaled(weight, source, acc, n);
    }
    for (int32_t i = 0; i < n; i++) acc[i] = moe__mulf(acc[i], f->routed_scale);
}

static void moe__finalize_token(const moe__finalize *f, int32_t token)
{
    float acc[MOE__COLUMN_BLOCK], factor = f->rows_shared != NULL ? moe__shared_factor(f, token) : 0;
    for (int32_t first = f->first; first < f->first + f->columns; first += MOE__COLUMN_BLOCK) {
        int32_t n = moe__min32(MOE__COLUMN_BLOCK, f->first + f->columns - first);
        int64_t out = (f->out_rows == NULL ? token : f->out_rows[token]) * f->out_ld + first;
        moe__finalize_routed(f, token, first, n, acc);
        if (f->rows_shared != NULL)
            f->kernels->add_scaled(factor, f->rows_shared + token * f->rows_ld + (first - f->first), acc, n);
        for (int32_t i = 0; i < n; i++) {
            float value = moe__mulf(acc[i], f->layer->output_scale);
            if (f->accumulate) value += moe__load(f->out, f->out_dtype, out + i);
            moe__store(f->out, f->out_dtype, out + i, value);
        }
    }
}

static void moe__finalize_task(void *arg, int32_t index, int32_t worker)
{
    const moe__finalize *f = (const moe__finalize *)arg;
    int32_t first = index * f->tokens_per_task;
    (void)worker;
    for (int32_t t = first; t < moe__min32(f->tokens, first + f->tokens_per_task); t++) moe__finalize_token(f, t);
}

// Rows as they are, for the caller to finish.
static void moe__rows_out_task(void *arg, int32_t index, int32_t worker)
{
    const moe__finalize *f = (const moe__finalize *)arg;
    int32_t begin = index * f->tokens_per_task;
    (void)worker;
    for (int32_t t = begin; t < moe__min32(f->tokens, begin + f->tokens_per_task); t++)
        for (int32_t i = 0; i < f->columns; i++) {
            int64_t out = (f->out_rows == NULL ? t : f->out_rows[t]) * f->out_ld + f->first + i;
            moe__store(f->out, f->out_dtype, out, ((const float *)f->rows)[t * f->rows_ld + i]);
        }
}

// >>instances  which kernels a plan runs on a chip  Pure: a resolved layer, a resolved plan_desc and a chip in, a list
// of instances out, the same for moe_plan_create() and for compiling ahead without a GPU. The argument structs are
// those of moe_kernels.cu.inc, where each member is explained.
#if !defined(MOE_NO_CUDA)

typedef struct moe__routing_args {
    int32_t score, score_order, select, top_k;
    float logit_multiplier, logit_softcap;
    int32_t bias_rows, groups, groups_kept, group_rule, group_excluded, renormalize;
    float renormalize_epsilon;
    int32_t zero_sum;
    float scale;
    int32_t scale_on, per_expert_scale, forced_rows, marked_token_lo, marked_token_hi;
    int32_t special_experts, special_kind, extra_slots, extra_scored;
    float extra_weight, sparse_mixer;
    int32_t simulate;
    uint32_t simulate_seed;
} moe__routing_args;

typedef struct moe__tokens_args {
    const void *logits, *ids, *weights, *token_ids;
    const int32_t *bias_index, *num_tokens_dev;
    const float *bias, *per_expert_scale;
    const int32_t *forced_ids;
    const float *global_scale;
    int32_t *out_ids;
    float *out_weights;
    int64_t logits_stride;
    int32_t num_tokens, num_experts, width, slots, ids_end, input_mode, logits_dtype, ids_dtype, weights_dtype;
    int32_t end_is_none;
    moe__routing_args routing;
} moe__tokens_args;

typedef struct moe__permute_args {
    int32_t *row_of_slot, *slot_of_row, *expert_offsets, *expert_counts, *tile_expert, *tile_limit, *num_tiles;
    int32_t *out_expert_counts;
    uint32_t *out_faults;
    const int32_t *local_of_id;
    int32_t tile, rows_max, local_experts, local_first, local_routed, tile_shift;
} moe__permute_args;

typedef struct moe__route_one_args {
    moe__tokens_args tokens;
    moe__permute_args permute;
} moe__route_one_args;

typedef struct moe__route_args {
    moe__tokens_args tokens;
    uint16_t *chunk_counts;
    uint32_t *chunk_faults;
    int32_t chunk_tokens, counts_stride;
} moe__route_args;

typedef struct moe__sort_args {
    moe__permute_args permute;
    const int32_t *ids;
    const uint16_t *chunk_counts;
    const uint32_t *chunk_faults;
    const int32_t *num_tokens_dev;
    int32_t num_tokens, chunk_tokens, counts_stride, chunks, num_experts, slots, ids_end, special_experts;
} moe__sort_args;

typedef struct moe__router_args {
    const void *x, *weight;
    const float *bias, *input_scale;
    const int32_t *num_tokens_dev;
    float *out;
    uint32_t *out_faults;
    int64_t x_stride;
    int32_t num_tokens, width, input_size, ld, x_dtype, rms_norm;
    float norm_epsilon, input_multiplier;
} moe__router_args;

enum {
    MOE__KERNEL_ROUTE_ONE, MOE__KERNEL_ROUTE, MOE__KERNEL_SORT, MOE__KERNEL_ROUTER_F32, MOE__KERNEL_ROUTER_BF16,
    MOE__KERNELS
};
enum {
    MOE__ONE_TOKENS = 1024,     // of one launch with clusters; a chip without them has one CTA for it:
    MOE__ONE_TOKENS_ALONE = 64,
    MOE__ONE_WIDTH = 512,       // of the router
    MOE__CLUSTER_MAX = 8,       // what every chip with clusters takes
    MOE__CHUNK_MIN = 16,        // tokens of a CTA in two launches: one for each warp of the first
    MOE__CHUNK_MAX = 1024
};

static int32_t moe__chip_has_clusters(int32_t arch) { return arch >= 90; }

// Tokens that one launch routes and sorts; 0: never in one.
static int32_t moe__one_tokens(int32_t width, int32_t arch)
{
    if (width > MOE__ONE_WIDTH) return 0;
    return moe__chip_has_clusters(arch) ? MOE__ONE_TOKENS : MOE__ONE_TOKENS_ALONE;
}

// Experts that a lane keeps: kernels exist for these.
static int32_t moe__experts_per_lane(int32_t width)
{
    static const int32_t tiers[] = { 4, 8, 12, 16, 32, 64 };
    int32_t i = 0;
    while (i + 1 < MOE__ARRAY_COUNT(tiers) && tiers[i] * 32 < width) i++;
    return tiers[i];
}

// Threads and shared memory as moe_kernels.cu.inc's >>args says.
static int32_t moe__route_threads(int32_t width, int32_t one)
{
    int32_t lanes = moe__experts_per_lane(width);
    int32_t threads = lanes > 16 ? 128 : lanes > 8 ? 512 : 1024;
    return one && lanes <= 16 ? threads / 2 : threads;
}

// CTAs of one launch: a warp for each token until the cluster is full.
static int32_t moe__one_ctas(int32_t tokens, int32_t width, int32_t arch)
{
    int32_t ctas = 1, warps = moe__route_threads(width, 1) / 32;
    while (moe__chip_has_clusters(arch) && ctas < MOE__CLUSTER_MAX && ctas * warps < tokens) ctas *= 2;
    return ctas;
}

static int32_t moe__counter_stride(int32_t ids_end) { return (int32_t)moe__align_up((uint64_t)ids_end, 8); }

static int32_t moe__route_smem(int32_t width, int32_t ids_end)
{
    int32_t warps = moe__route_threads(width, 0) / 32;
    return warps * 8 * 32 * moe__experts_per_lane(width) + 4 * moe__counter_stride(ids_end) + 256;
}

static int32_t moe__sort_smem(int32_t warps, int32_t ids_end)
{
    return (2 * warps + 16) * moe__counter_stride(ids_end) + 256;
}

static int32_t moe__route_one_smem(int32_t width, int32_t ids_end, int32_t slots, int32_t tokens, int32_t ctas)
{
    int32_t each = (tokens + ctas - 1) / ctas * slots, warps = moe__route_threads(width, 1) / 32;
    return (int32_t)moe__align_up((uint64_t)each * 2, 16) + warps * 8 * 32 * moe__experts_per_lane(width) +
           moe__sort_smem(warps, ids_end);
}

// What a CTA of the router's product computes: tokens x experts, and how much of k at a time.
typedef struct moe__router_shape {
    int32_t tokens, experts, k;
} moe__router_shape;

static moe__router_shape moe__router_shape_of(int32_t tokens, int32_t x_dtype)
{
    static const moe__router_shape shapes[] = { { 1, 2, 4096 }, { 8, 2, 1024 }, { 8, 8, 512 }, { 16, 16, 256 },
                                                { 32, 32, 64 } };
    if (x_dtype == MOE_DTYPE_F32) return shapes[3];
    return shapes[tokens <= 1 ? 0 : tokens <= 8 ? 1 : tokens <= 32 ? 2 : tokens <= 512 ? 3 : 4];
}

// Its tiles, at most two CTAs an SM.
static int32_t moe__router_ctas(moe__router_shape shape, int32_t tokens, int32_t width, int32_t sms)
{
    int32_t across = (width + shape.experts - 1) / shape.experts, down = (tokens + shape.tokens - 1) / shape.tokens;
    return down > 2 * sms / across ? 2 * sms : down * across;
}

// Two stages of x and of weights, and a norm for each token.
static int32_t moe__router_smem(moe__router_shape shape, int32_t bf16)
{
    return 8 * shape.tokens * shape.k + 2 * shape.experts * (shape.k + 16) * (bf16 ? 2 : 4) + 4 * shape.tokens;
}

static void moe__instance_make(moe__instance *out, const char *entry, const char *name, const char *parameter,
                               int32_t value, int32_t arch, size_t args_bytes, int32_t threads, int32_t smem_bytes)
{
    moe__text label = moe__text_make(out->name, sizeof out->name);
    moe__text defines = moe__text_make(out->defines, sizeof out->defines);
    memset(out, 0, sizeof *out);
    out->entry = entry;
    out->args_bytes = (int32_t)args_bytes;
    out->threads = threads;
    out->smem_bytes = smem_bytes;
    moe__text_format(&label, "%s%d_sm%d", name, value, arch);
    if (parameter != NULL) moe__text_format(&defines, "-DMOE_P_%s=%d", parameter, value);
}

// The instances that a plan runs, each at its place in out [MOE__KERNELS]; entry NULL where it runs none.
static void moe__instances_select(const moe_layer_desc *layer, const moe_plan_desc *desc, int32_t arch,
                                  moe__instance *out)
{
    int32_t width = moe__routing_width(&layer->routing, layer->num_experts), lanes = moe__experts_per_lane(width);
    int32_t slots = layer->routing.top_k + layer->routing.extra_slots, one = moe__one_tokens(width, arch);
    int32_t ids_end = layer->num_experts + layer->routing.special_experts + layer->routing.extra_slots;
    memset(out, 0, MOE__KERNELS * sizeof out[0]);
    if (one > 0) // fewer tokens are fewer a CTA
        moe__instance_make(&out[MOE__KERNEL_ROUTE_ONE], "moe_k_route_one", "route_one_e", "EXPERTS_PER_LANE", lanes,
                           arch, sizeof(moe__route_one_args), moe__route_threads(width, 1),
                           moe__route_one_smem(width, ids_end, slots, one, moe__one_ctas(one, width, arch)));
    if (desc->max_tokens > one) {
        moe__instance_make(&out[MOE__KERNEL_ROUTE], "moe_k_route", "route_e", "EXPERTS_PER_LANE", lanes, arch,
                           sizeof(moe__route_args), moe__route_threads(width, 0), moe__route_smem(width, ids_end));
        moe__instance_make(&out[MOE__KERNEL_SORT], "moe_k_sort", "sort", NULL, 0, arch, sizeof(moe__sort_args), 256,
                           moe__sort_smem(256 / 32, ids_end));
    }
    for (int32_t bf16 = 0; bf16 < 2; bf16++)
        moe__instance_make(&out[MOE__KERNEL_ROUTER_F32 + bf16], "moe_k_router_logits", "router_logits_bf16_", "BF16",
                           bf16, arch, sizeof(moe__router_args), 256,
                           moe__max32(moe__router_smem(moe__router_shape_of(1, MOE_DTYPE_BF16), bf16),
                                      moe__router_smem(moe__router_shape_of(8, MOE_DTYPE_BF16), bf16))); // the most
}
#endif

// >>plan  plans, checks, and execution on the CPU  A plan is a resolved copy of the layer with the offsets of a
// workspace for max_tokens. One set of checks serves moe_execute() (without words), its stages and moe_execute_check().
// Data that is refused is found before anything but out_faults is written.

enum {
    MOE__TOKENS_MAX = 1 << 22,     // of max_tokens and max_rows
    MOE__TOKENS_PER_TASK = 8,
    MOE__ROWS_BUDGET = 1 << 25,    // bytes of GEMM 2 rows alive at a time: about a last-level cache
    MOE__SLICE_STEP = 96,          // columns: whole tasks, whole cache lines
    MOE__SLICE_MIN = 192
};

// Offsets in the caller's workspace.
typedef struct moe__workspace {
    uint64_t faults, ids, weights, row_of_slot, slot_of_row, offsets, task_begin, x, x_rows, mid, mid_shared, rows,
        scratch;
    uint64_t routing, routing_bytes; // per worker
    uint64_t chunk_counts, chunk_faults; // CUDA
    uint64_t bytes;
} moe__workspace;

#if !defined(MOE_NO_CUDA)
// What the stages launch. Members of the argument structs that no call changes are filled in.
typedef struct moe__stages {
    moe__cu_function kernel[MOE__KERNELS]; // NULL: not this plan's
    int32_t threads[MOE__KERNELS];
    int32_t one_tokens;                    // most tokens of one launch
    int32_t pdl;                           // a launch may depend on the one before programmatically, in graphs too
    moe__tokens_args tokens;
    moe__permute_args permute;
    moe__cu_ptr memory;                    // local_of_id [ids_end] on the device, or 0
    uint64_t bytes;
} moe__stages;
#endif

struct moe_plan {
    moe_context *ctx;
    moe_layer_desc layer;      // resolved; parallel.expert_map points behind this struct
    moe_plan_desc desc;        // resolved
    moe__layout layout;
    moe__workspace workspace;
    int32_t slots, width, ids_end; // ids are 0..ids_end - 1
    int32_t blocks;
    int32_t x_ld;              // floats: of a widened row
    int32_t *expert_of_block;  // [blocks] global id, behind this struct
    uint64_t self_bytes;
#if !defined(MOE_NO_CUDA)
    moe__stages stages;
#endif
};

// ---- create ----

static int32_t moe__plan_dtype(int32_t *dtype, int32_t otherwise, const char *member, moe_error *err)
{
    if (*dtype == 0) *dtype = otherwise;
    if (moe__is_float_dtype(*dtype)) return MOE_OK;
    return moe__fail(err, MOE_ERROR_ARGUMENT, member, "is %d: it must be F32, BF16, F16 or 0 for %s", *dtype,
                     moe_dtype_string(otherwise));
}

static int32_t moe__plan_desc_resolve(moe_plan_desc *desc, int32_t format_dtype, int32_t slots, moe_error *err)
{
    int32_t result;
    if ((desc->flags & ~(uint32_t)MOE_PLAN_BATCH_INVARIANT) != 0)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "desc.flags", "is %u: it must be moe_plan_flags", desc->flags);
    if (desc->max_tokens == 0) desc->max_tokens = 8192;
    if (desc->max_tokens < 1 || desc->max_tokens > MOE__TOKENS_MAX)
        return moe__fail_range(err, "desc.max_tokens", desc->max_tokens, 1, MOE__TOKENS_MAX);
    if (desc->max_rows < 0) return moe__fail_range(err, "desc.max_rows", desc->max_rows, 0, INT32_MAX);
    if (desc->max_rows == 0) desc->max_rows = desc->max_tokens * slots;
    if (desc->ids_dtype == 0) desc->ids_dtype = MOE_DTYPE_I32;
    if (desc->ids_dtype != MOE_DTYPE_I32 && desc->ids_dtype != MOE_DTYPE_I64)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "desc.ids_dtype", "is %d: it must be I32, I64 or 0 for I32",
                         desc->ids_dtype);
    if ((result = moe__plan_dtype(&desc->x_dtype, format_dtype, "desc.x_dtype", err)) != MOE_OK ||
        (result = moe__plan_dtype(&desc->logits_dtype, MOE_DTYPE_F32, "desc.logits_dtype", err)) != MOE_OK ||
        (result = moe__plan_dtype(&desc->weights_dtype, MOE_DTYPE_F32, "desc.weights_dtype", err)) != MOE_OK ||
        (result = moe__plan_dtype(&desc->out_dtype, desc->x_dtype, "desc.out_dtype", err)) != MOE_OK)
        return result;
    return moe__plan_dtype(&desc->intermediate_dtype, format_dtype, "desc.intermediate_dtype", err);
}

// Columns of GEMM 2 that are computed and finished before the next ones.
static int32_t moe__slice_columns(const moe_layer_desc *layer, int64_t rows)
{
    int64_t whole = (int64_t)moe__align_up((uint64_t)layer->hidden_size, MOE__ROW_ALIGN), columns;
    if (layer->row_norm || rows * whole * 4 <= MOE__ROWS_BUDGET) return layer->hidden_size;
    columns = MOE__ROWS_BUDGET / 4 / rows / MOE__SLICE_STEP * MOE__SLICE_STEP;
    if (columns < MOE__SLICE_MIN) columns = MOE__SLICE_MIN;
    return columns < layer->hidden_size ? (int32_t)columns : layer->hidden_size;
}

// *at = the place of rows x columns elements of `size` bytes at the end of *bytes; 0 when that does not fit.
static int32_t moe__workspace_area(uint64_t *bytes, uint64_t *at, uint64_t rows, uint64_t columns, uint64_t size)
{
    uint64_t count, area;
    *at = *bytes;
    if (!moe__mul(rows, columns, &count) || !moe__mul(count, size, &area) || !moe__add(*bytes, area, bytes)) return 0;
    if (*bytes > SIZE_MAX / 4) return 0;
    *bytes = moe__align_up(*bytes, 256);
    return 1;
}

static int32_t moe__workspace_make(moe_plan *plan, moe_error *err)
{
    moe__workspace *ws = &plan->workspace;
    const moe__layout *layout = &plan->layout;
    uint64_t tokens = (uint64_t)plan->desc.max_tokens, slots = tokens * (uint64_t)plan->slots, *end = &ws->bytes;
    uint64_t threads = (uint64_t)plan->ctx->desc.threads, shared = layout->shared.bytes != 0 ? tokens : 0, tasks;
    uint64_t all = slots + shared, whole = moe__align_up((uint64_t)plan->layer.hidden_size, MOE__ROW_ALIGN), rows;
    rows = all * moe__align_up((uint64_t)moe__slice_columns(&plan->layer, (int64_t)all), MOE__ROW_ALIGN);
    if (rows < MOE__ROWS_BUDGET / 4) rows = all * whole < MOE__ROWS_BUDGET / 4 ? all * whole : MOE__ROWS_BUDGET / 4;
    ws->routing_bytes = moe__align_up(moe__routing_scratch_bytes(&plan->layer.routing, plan->layer.num_experts) +
                                      (uint64_t)plan->width * sizeof(float), 256);
    tasks = (all / MOE__TASK_ROWS + (uint64_t)plan->blocks + 1) *
            (uint64_t)(moe__max32(moe__max32(layout->expert.rows1, layout->shared.rows1), plan->layer.hidden_size) /
                       MOE__TASK_COLS + 1);
    if (tasks > INT32_MAX / 2 || slots > INT32_MAX / 2 || !moe__workspace_area(end, &ws->faults, threads, 64, 1) ||
        !moe__workspace_area(end, &ws->ids, slots, 4, 1) || !moe__workspace_area(end, &ws->weights, slots, 4, 1) ||
        !moe__workspace_area(end, &ws->row_of_slot, slots, 4, 1) ||
        !moe__workspace_area(end, &ws->slot_of_row, slots, 4, 1) ||
        !moe__workspace_area(end, &ws->offsets, (uint64_t)plan->blocks + 1, 4, 1) ||
        !moe__workspace_area(end, &ws->task_begin, (uint64_t)plan->blocks + 2, 4, 1) ||
        !moe__workspace_area(end, &ws->x, tokens, (uint64_t)plan->x_ld, 4) ||
        !moe__workspace_area(end, &ws->x_rows, plan->layer.routing.weight_on == MOE_WEIGHT_ON_INPUT ? slots : 0,
                             (uint64_t)layout->expert.ld1, 4) ||
        !moe__workspace_area(end, &ws->mid, slots, (uint64_t)layout->expert.ld2, 4) ||
        !moe__workspace_area(end, &ws->mid_shared, shared, (uint64_t)layout->shared.ld2, 4) ||
        !moe__workspace_area(end, &ws->rows, rows, 4, 1) ||
        !moe__workspace_area(end, &ws->scratch, threads, MOE__SCRATCH, 4) ||
        !moe__workspace_area(end, &ws->routing, threads, ws->routing_bytes, 1))
        return moe__fail(err, MOE_ERROR_ARGUMENT, "desc.max_tokens",
                         "is %d: the workspace for this layer is more than this machine can address",
                         plan->desc.max_tokens);
    return MOE_OK;
}

#if !defined(MOE_NO_CUDA)
// Tokens of one CTA, so that a wave of CTAs takes them all.
static int32_t moe__chunk_tokens(int32_t tokens, int32_t sms)
{
    int32_t each = (int32_t)moe__align_up(((uint64_t)tokens + (uint64_t)sms - 1) / (uint64_t)sms, MOE__CHUNK_MIN);
    return moe__min32(moe__max32(each, MOE__CHUNK_MIN), MOE__CHUNK_MAX);
}

// Fewer tokens than max_tokens never make more chunks than this.
static int32_t moe__chunks_max(int32_t tokens, int32_t sms)
{
    int32_t least = (tokens + MOE__CHUNK_MAX - 1) / MOE__CHUNK_MAX;
    int32_t most = (tokens + MOE__CHUNK_MIN - 1) / MOE__CHUNK_MIN;
    return moe__max32(least, moe__min32(most, sms));
}

static int32_t moe__workspace_make_cuda(moe_plan *plan, moe_error *err)
{
    moe__workspace *ws = &plan->workspace;
    uint64_t slots = (uint64_t)plan->desc.max_tokens * (uint64_t)plan->slots, *end = &ws->bytes;
    uint64_t chunks = (uint64_t)moe__chunks_max(plan->desc.max_tokens, plan->ctx->cuda->sms);
    if (plan->desc.max_tokens <= moe__one_tokens(plan->width, plan->ctx->cuda->arch)) slots = chunks = 0;
    if (slots > INT32_MAX / 2 || !moe__workspace_area(end, &ws->ids, slots, 4, 1) ||
        !moe__workspace_area(end, &ws->chunk_counts, chunks, (uint64_t)moe__counter_stride(plan->ids_end), 2) ||
        !moe__workspace_area(end, &ws->chunk_faults, chunks, MOE_FAULTS, 4) ||
        !moe__workspace_area(end, &ws->faults, 1, 1, 1)) // so that there always is one
        return moe__fail(err, MOE_ERROR_ARGUMENT, "desc.max_tokens", "is %d: %D slots are more than the kernels count",
                         plan->desc.max_tokens, (int64_t)slots);
    return MOE_OK;
}
#endif

// Everything of a plan but its own copies of the tables.
static int32_t moe__plan_resolve(moe_context *ctx, const moe_layer_desc *layer, const moe_plan_desc *desc,
                                 moe_plan *plan, moe_error *err)
{
    int32_t result;
    memset(plan, 0, sizeof *plan);
    if (ctx == NULL) return moe__fail_null(err, "ctx");
    if (layer == NULL) return moe__fail_null(err, "layer");
    plan->ctx = ctx;
    if ((result = moe__copy_desc(&plan->layer, sizeof plan->layer, layer, "layer", err)) != MOE_OK ||
        (result = moe__copy_desc(&plan->desc, sizeof plan->desc, desc, "desc", err)) != MOE_OK ||
        (result = moe__layer_resolve(&plan->layer, err)) != MOE_OK ||
        (result = moe__layout_make(&plan->layout, &plan->layer, err)) != MOE_OK)
        return result;
    plan->slots = plan->layer.routing.top_k + plan->layer.routing.extra_slots;
    plan->width = moe__routing_width(&plan->layer.routing, plan->layer.num_experts);
    plan->ids_end = plan->layer.num_experts + plan->layer.routing.special_experts + plan->layer.routing.extra_slots;
    plan->blocks = plan->layout.blocks;
    plan->x_ld = moe__max32(plan->layout.expert.ld1, plan->layout.router_ld);
    if ((result = moe__plan_desc_resolve(&plan->desc, plan->layout.dtype, plan->slots, err)) != MOE_OK) return result;
#if !defined(MOE_NO_CUDA)
    if (ctx->desc.backend == MOE_BACKEND_CUDA) return moe__workspace_make_cuda(plan, err);
#endif
    return moe__workspace_make(plan, err);
}

#if !defined(MOE_NO_CUDA)
static void moe__plan_candidates_cuda(const moe_plan *plan, moe_plan_info *info)
{
    moe__instance instances[MOE__KERNELS];
    int32_t arch = plan->ctx->cuda->arch, one = moe__one_tokens(plan->width, arch);
    static const char *const stages[MOE__KERNELS] = { "route_one", "route", "sort", "", "" };
    moe__instances_select(&plan->layer, &plan->desc, arch, instances);
    info->num_candidates = MOE__KERNELS + 1;
    for (int32_t i = 0; i < MOE__KERNELS; i++) {
        moe_plan_candidate *c = &info->candidates[i];
        moe__text name = moe__text_make(c->name, sizeof c->name), reason = moe__text_make(c->reason, sizeof c->reason);
        c->chosen = instances[i].entry != NULL;
        moe__text_string(&name, c->chosen ? instances[i].name : stages[i]);
        if (c->chosen) continue;
        if (i == MOE__KERNEL_ROUTE_ONE)
            moe__text_format(&reason, "the router's width %d is more than %d: two launches", plan->width,
                             MOE__ONE_WIDTH);
        else
            moe__text_format(&reason, "one launch takes up to %d tokens, max_tokens is %d", one,
                             plan->desc.max_tokens);
    }
    strcpy(info->candidates[MOE__KERNELS].name, "gemm1, gemm2, finalize");
    strcpy(info->candidates[MOE__KERNELS].reason,
           "not in this version: CUDA runs moe_route, moe_permute and moe_router_logits");
}
#endif

static void moe__plan_candidates(const moe_plan *plan, moe_plan_info *info)
{
    static const int32_t best_first[] = { MOE__ISA_AVX512, MOE__ISA_AVX2, MOE__ISA_NEON, MOE__ISA_SCALAR };
    int32_t isa = plan->ctx->isa, passed = 0;
    info->num_candidates = MOE__ARRAY_COUNT(best_first);
    for (int32_t i = 0; i < info->num_candidates; i++) {
        moe_plan_candidate *c = &info->candidates[i];
        moe__text name = moe__text_make(c->name, sizeof c->name), reason = moe__text_make(c->reason, sizeof c->reason);
        moe__text_format(&name, "cpu_%s_%s", moe__isa_names[best_first[i]], moe_dtype_string(plan->layout.dtype));
        c->chosen = best_first[i] == isa;
        if (c->chosen) passed = 1;
        else if (!moe__isa_available(best_first[i]))
            moe__text_format(&reason, "this processor or build has no %s", moe__isa_names[best_first[i]]);
        else if (!passed) moe__text_format(&reason, "desc.isa of the context chose %s", moe__isa_names[isa]);
        else moe__text_format(&reason, "%s is faster", moe__isa_names[isa]);
    }
}

static void moe__plan_fill_info(const moe_plan *plan, moe_plan_info *info)
{
    memset(info, 0, sizeof *info);
    info->struct_size = sizeof *info;
    info->layout_id = plan->layout.id;
    info->weight_bytes = plan->layout.bytes;
    info->workspace_bytes = plan->workspace.bytes;
    info->slots = plan->slots;
    info->router_width = plan->width;
    info->local_experts = plan->blocks;
#if !defined(MOE_NO_CUDA)
    if (plan->ctx->desc.backend == MOE_BACKEND_CUDA) {
        moe__plan_candidates_cuda(plan, info);
        return;
    }
#endif
    moe__plan_candidates(plan, info);
}

MOE_API int32_t moe_plan_query(const moe_context *ctx, const moe_layer_desc *layer, const moe_plan_desc *desc,
                               moe_plan_info *info, moe_error *err)
{
    moe_plan plan;
    moe_plan_info given;
    int32_t result;
    if (info == NULL) return moe__fail_null(err, "info");
    if ((result = moe__copy_desc(&given, sizeof given, info, "info", err)) != MOE_OK) return result;
    memset(info, 0, sizeof *info);
    if ((result = moe__plan_resolve((moe_context *)(uintptr_t)ctx, layer, desc, &plan, err)) != MOE_OK) return result;
    moe__plan_fill_info(&plan, info);
    return moe__ok(err);
}

#if !defined(MOE_NO_CUDA)
static void moe__stages_fill(moe_plan *plan)
{
    const moe_routing_desc *r = &plan->layer.routing;
    moe__tokens_args *t = &plan->stages.tokens;
    moe__routing_args *a = &t->routing;
    moe__permute_args *p = &plan->stages.permute;
    t->num_experts = plan->layer.num_experts;
    t->width = plan->width;
    t->slots = plan->slots;
    t->ids_end = plan->ids_end;
    t->logits_dtype = plan->desc.logits_dtype;
    t->ids_dtype = plan->desc.ids_dtype;
    t->weights_dtype = plan->desc.weights_dtype;
#define MOE__COPY(member) a->member = r->member
    MOE__COPY(score); MOE__COPY(score_order); MOE__COPY(select); MOE__COPY(top_k); MOE__COPY(logit_multiplier);
    MOE__COPY(logit_softcap); MOE__COPY(bias_rows); MOE__COPY(groups); MOE__COPY(groups_kept); MOE__COPY(group_rule);
    MOE__COPY(group_excluded); MOE__COPY(renormalize); MOE__COPY(renormalize_epsilon); MOE__COPY(zero_sum);
    MOE__COPY(scale); MOE__COPY(scale_on); MOE__COPY(per_expert_scale); MOE__COPY(forced_rows);
    MOE__COPY(marked_token_lo); MOE__COPY(marked_token_hi); MOE__COPY(special_experts); MOE__COPY(special_kind);
    MOE__COPY(extra_slots); MOE__COPY(extra_scored); MOE__COPY(extra_weight); MOE__COPY(sparse_mixer);
    MOE__COPY(simulate); MOE__COPY(simulate_seed);
#undef MOE__COPY
    p->local_of_id = (const int32_t *)(uintptr_t)plan->stages.memory;
    p->local_experts = plan->blocks;
    p->local_first = plan->layer.parallel.expert_offset;
    p->local_routed = plan->layer.parallel.local_experts;
}

// Where experts are local by a map, the kernels read it from a table.
static int32_t moe__stages_upload(moe_plan *plan, moe_error *err)
{
    moe__stages *stages = &plan->stages;
    const moe_allocator *allocator = &plan->ctx->desc.allocator;
    uint64_t bytes = (uint64_t)plan->ids_end * sizeof(int32_t);
    int32_t *table, result;
    if (plan->layer.parallel.expert_map == NULL) return MOE_OK;
    if ((table = (int32_t *)moe__alloc(allocator, bytes)) == NULL) return moe__fail_memory(err, bytes);
    for (int32_t id = 0; id < plan->ids_end; id++) table[id] = moe__layer_local(&plan->layer, id);
    result = moe__device_make(plan->ctx, table, bytes, &stages->memory, err);
    if (result == MOE_OK) stages->bytes = bytes;
    moe__free(allocator, table, bytes);
    return result;
}

// Kernels of the stages, compiled or from the cache, and what they read.
static int32_t moe__stages_create(moe_plan *plan, moe_error *err)
{
    moe__stages *stages = &plan->stages;
    const moe__cuda *cuda = plan->ctx->cuda;
    moe__instance all[MOE__KERNELS], used[MOE__KERNELS];
    moe__cu_function functions[MOE__KERNELS];
    int32_t place[MOE__KERNELS], count = 0, result;
    moe__instances_select(&plan->layer, &plan->desc, cuda->arch, all);
    for (int32_t i = 0; i < MOE__KERNELS; i++) {
        if (all[i].entry == NULL) continue;
        place[count] = i;
        used[count++] = all[i];
    }
    if ((result = moe__jit_load(plan->ctx, used, count, functions, err)) != MOE_OK ||
        (result = moe__stages_upload(plan, err)) != MOE_OK)
        return result;
    for (int32_t i = 0; i < count; i++) {
        stages->kernel[place[i]] = functions[i];
        stages->threads[place[i]] = used[i].threads;
    }
    stages->one_tokens = moe__one_tokens(plan->width, cuda->arch);
    stages->pdl = cuda->arch >= 90 && cuda->driver_version >= 12030; // graphs have such edges since 12.3
    moe__stages_fill(plan);
    return MOE_OK;
}
#endif

MOE_API int32_t moe_plan_create(moe_context *ctx, const moe_layer_desc *layer, const moe_plan_desc *desc,
                                moe_plan **out, moe_error *err)
{
    moe_plan resolved, *plan;
    const int32_t *map;
    int32_t *tables, result;
    uint64_t bytes;
    if (out == NULL) return moe__fail_null(err, "out");
    *out = NULL;
    if ((result = moe__plan_resolve(ctx, layer, desc, &resolved, err)) != MOE_OK) return result;
    bytes = sizeof *plan + ((uint64_t)resolved.blocks + (uint64_t)resolved.layer.num_experts) * sizeof(int32_t);
    plan = (moe_plan *)moe__alloc(&ctx->desc.allocator, bytes);
    if (plan == NULL) return moe__fail_memory(err, bytes);
    *plan = resolved;
    plan->self_bytes = bytes;
    tables = (int32_t *)(void *)(plan + 1);
    plan->expert_of_block = tables;
    map = resolved.layer.parallel.expert_map;
    if (map != NULL) {
        plan->layer.parallel.expert_map = tables + plan->blocks;
        memcpy(tables + plan->blocks, map, (size_t)resolved.layer.num_experts * sizeof map[0]);
    }
    for (int32_t id = 0; id < plan->ids_end; id++) {
        int32_t local = moe__layer_local(&plan->layer, id);
        if (local >= 0) plan->expert_of_block[local] = id;
    }
#if !defined(MOE_NO_CUDA)
    if (ctx->desc.backend == MOE_BACKEND_CUDA && (result = moe__stages_create(plan, err)) != MOE_OK) {
        moe__free(&ctx->desc.allocator, plan, bytes);
        return result;
    }
#endif
    moe__log(ctx, MOE_LOG_INFO, "plan for %d tokens: %s kernels, %U bytes of workspace", plan->desc.max_tokens,
             ctx->desc.backend == MOE_BACKEND_CUDA ? "CUDA" : moe__isa_names[ctx->isa], plan->workspace.bytes);
    *out = plan;
    return moe__ok(err);
}

MOE_API int32_t moe_plan_get_info(const moe_plan *plan, moe_plan_info *info, moe_error *err)
{
    moe_plan_info given;
    int32_t result;
    if (plan == NULL) return moe__fail_null(err, "plan");
    if (info == NULL) return moe__fail_null(err, "info");
    if ((result = moe__copy_desc(&given, sizeof given, info, "info", err)) != MOE_OK) return result;
    moe__plan_fill_info(plan, info);
    return moe__ok(err);
}

MOE_API void moe_plan_destroy(moe_plan *plan)
{
    if (plan == NULL) return;
#if !defined(MOE_NO_CUDA)
    if (plan->stages.memory != 0) moe__device_free(plan->ctx, plan->stages.memory, plan->stages.bytes);
#endif
    moe__free(&plan->ctx->desc.allocator, plan, plan->self_bytes);
}

// ---- checks ----

// One call: the arguments with defaults filled in, and the places in its workspace.
typedef struct moe__run {
    const moe_plan *plan;
    const moe_weights *weights;
    moe_execute_args args;      // strides are never 0
    int32_t tokens;             // of this call, num_tokens_dev looked up
    int32_t *ids;               // [T][slots]; -1: nothing here
    float *slot_weights;
    int32_t *row_of_slot, *slot_of_row, *offsets;
    moe__router router;
    uint32_t *faults;           // [threads][16]
    float *x;
    unsigned char *memory;
} moe__run;

static int32_t moe__run_rows_mode(const moe__run *run)
{
    return run->args.input_mode == MOE_INPUT_MASKED || run->args.input_mode == MOE_INPUT_SORTED;
}

// "args.ids[2][1]"
static const char *moe__member_at(char *buffer, size_t size, const char *name, int64_t row, int64_t column)
{
    moe__text text = moe__text_make(buffer, size);
    moe__text_format(&text, "args.%s[%D]", name, row);
    if (column >= 0) moe__text_format(&text, "[%D]", column);
    return buffer;
}

static int32_t moe__same_block(const moe__block_shape *a, const moe__block_shape *b)
{
    return a->bytes == b->bytes && a->rows1 == b->rows1 && a->ld1 == b->ld1 && a->ld2 == b->ld2 &&
           a->features == b->features && a->first_feature == b->first_feature && a->bias1 == b->bias1 &&
           a->bias2 == b->bias2;
}

static int32_t moe__same_layout(const moe__layout *a, const moe__layout *b)
{
    return a->bytes == b->bytes && a->dtype == b->dtype && a->blocks == b->blocks && a->router_ld == b->router_ld &&
           moe__same_block(&a->expert, &b->expert) && moe__same_block(&a->shared, &b->shared) &&
           memcmp(a->table_offset, b->table_offset, sizeof a->table_offset) == 0 &&
           memcmp(a->table_count, b->table_count, sizeof a->table_count) == 0;
}

// The experts that are local, and where, are the same for both; ids end at the same number.
static int32_t moe__same_locals(const moe_layer_desc *a, const moe_layer_desc *b)
{
    const moe_parallel_desc *p = &a->parallel, *q = &b->parallel;
    if (p->local_experts != q->local_experts || p->omit_common != q->omit_common ||
        a->routing.special_experts != b->routing.special_experts || a->routing.extra_slots != b->routing.extra_slots)
        return 0;
    if (p->expert_map == NULL || q->expert_map == NULL)
        return p->expert_map == q->expert_map && p->expert_offset == q->expert_offset;
    return memcmp(p->expert_map, q->expert_map, (size_t)a->num_experts * sizeof(int32_t)) == 0;
}

// Two layers are of one shape when their packed layouts are, and the same experts and slices are local.
static int32_t moe__check_weights(const moe_plan *plan, const moe_weights *weights, moe_error *err)
{
    const moe_layer_desc *a = &weights->layer, *b = &plan->layer;
    if (!weights->sealed)
        return moe__fail(err, MOE_ERROR_STATE, "weights", "are not sealed: call moe_weights_seal() first");
    if (weights->ctx != plan->ctx)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "weights", "were made with another context than the plan");
    if (weights->layout.id != plan->layout.id)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "weights", "have packed layout %u, the plan reads %u",
                         weights->layout.id, plan->layout.id);
    if (a->hidden_size != b->hidden_size || a->intermediate_size != b->intermediate_size ||
        a->num_experts != b->num_experts || a->format != b->format)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "weights",
                         "are of a layer with H %d, I %d, E %d, %s; the plan's has H %d, I %d, E %d, %s",
                         a->hidden_size, a->intermediate_size, a->num_experts, moe_format_string(a->format),
                         b->hidden_size, b->intermediate_size, b->num_experts, moe_format_string(b->format));
    if (moe__layer_is_gated(a) != moe__layer_is_gated(b) || !moe__same_layout(&weights->layout, &plan->layout))
        return moe__fail(err, MOE_ERROR_ARGUMENT, "weights",
                         "are of a layer with other biases, shared experts, tables or slices than the plan's");
    for (int32_t id = moe__same_locals(a, b) ? plan->ids_end : 0; id < plan->ids_end; id++) // a map may say the same
        if (moe__layer_local(a, id) != moe__layer_local(b, id))
            return moe__fail(err, MOE_ERROR_ARGUMENT, "weights",
                             "have other local experts than the plan: expert %d is at %d, not %d",
                             id, moe__layer_local(a, id), moe__layer_local(b, id));
    if (a->parallel.tp_rank != b->parallel.tp_rank || a->parallel.tp_size != b->parallel.tp_size)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "weights",
                         "are of tensor-parallel rank %d of %d, the plan is of %d of %d", a->parallel.tp_rank,
                         a->parallel.tp_size, b->parallel.tp_rank, b->parallel.tp_size);
    return MOE_OK;
}

static moe__router moe__run_router(const moe_plan *plan, const moe_weights *weights)
{
    const float *global = moe__weights_table(weights, MOE_TENSOR_ROUTER_GLOBAL_SCALE);
    moe__router router;
    router.desc = &plan->layer.routing;
    router.num_experts = plan->layer.num_experts;
    router.bias = moe__weights_table(weights, MOE_TENSOR_SELECT_BIAS);
    router.per_expert_scale = moe__weights_table(weights, MOE_TENSOR_PER_EXPERT_SCALE);
    router.forced_ids = moe__weights_forced_ids(weights);
    router.scale = moe__mulf(plan->layer.routing.scale, global == NULL ? 1 : global[0]);
    return router;
}

static int32_t moe__run_place(moe__run *run, moe_error *err)
{
    const moe__workspace *ws = &run->plan->workspace;
    if (run->args.workspace == NULL) return moe__fail_null(err, "args.workspace");
    if ((uintptr_t)run->args.workspace % 256 != 0)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "args.workspace", "is not aligned to 256 bytes");
    if (run->args.workspace_bytes < ws->bytes)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "args.workspace_bytes", "is %U: this plan needs %U",
                         run->args.workspace_bytes, ws->bytes);
    run->memory = (unsigned char *)run->args.workspace;
    run->ids = (int32_t *)(void *)(run->memory + ws->ids);
    run->slot_weights = (float *)(void *)(run->memory + ws->weights);
    run->row_of_slot = (int32_t *)(void *)(run->memory + ws->row_of_slot);
    run->slot_of_row = (int32_t *)(void *)(run->memory + ws->slot_of_row);
    run->offsets = (int32_t *)(void *)(run->memory + ws->offsets);
    run->faults = (uint32_t *)(void *)(run->memory + ws->faults);
    run->x = (float *)(void *)(run->memory + ws->x);
    return MOE_OK;
}

// What every call needs; places the workspace.
static int32_t moe__run_begin(moe__run *run, const moe_plan *plan, const moe_weights *weights,
                              const moe_execute_args *args, moe_error *err)
{
    const uint32_t legal =
        MOE_EXECUTE_ACCUMULATE | MOE_EXECUTE_ROWS_OUT | MOE_EXECUTE_PDL_IN | MOE_EXECUTE_ID_E_IS_NONE;
    int32_t result;
    if (plan == NULL) return moe__fail_null(err, "plan");
    if (weights == NULL) return moe__fail_null(err, "weights");
    if (args == NULL) return moe__fail_null(err, "args");
    run->plan = plan;
    run->weights = weights;
    if ((result = moe__copy_desc(&run->args, sizeof run->args, args, "args", err)) != MOE_OK ||
        (result = moe__check_weights(plan, weights, err)) != MOE_OK)
        return result;
    if ((run->args.flags & ~legal) != 0)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "args.flags", "is %u: it must be moe_execute_flags", run->args.flags);
    if (run->args.num_tokens < 0 || run->args.num_tokens > plan->desc.max_tokens)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "args.num_tokens", "is %d: it must be 0..%d, the plan's max_tokens",
                         run->args.num_tokens, plan->desc.max_tokens);
    run->tokens = run->args.num_tokens;
    run->router = moe__run_router(plan, weights);
    return moe__run_place(run, err);
}

static int32_t moe__check_stride(int64_t *stride, int32_t width, const char *member, moe_error *err)
{
    if (*stride == 0) *stride = width;
    if (*stride >= width) return MOE_OK;
    return moe__fail(err, MOE_ERROR_ARGUMENT, member, "is %D: it must be 0 for packed rows, or at least %d", *stride,
                     width);
}

static int32_t moe__check_matrix(const void *data, int64_t *stride, int32_t width, const char *member,
                                 const char *stride_member, moe_error *err)
{
    if (data == NULL) return moe__fail_null(err, member);
    return moe__check_stride(stride, width, stride_member, err);
}

static int32_t moe__check_x(moe__run *run, int32_t width, moe_error *err)
{
    if (run->args.x_scale != NULL)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "args.x_scale", "is set, but x of %s has no scales",
                         moe_dtype_string(run->plan->desc.x_dtype));
    return moe__check_matrix(run->args.x, &run->args.x_stride, width, "args.x", "args.x_stride", err);
}

// The members that say which experts a token uses.
static int32_t moe__check_routing_input(moe__run *run, moe_error *err)
{
    const moe_routing_desc *routing = &run->plan->layer.routing;
    const moe_execute_args *args = &run->args;
    int32_t marked = routing->marked_token_hi > routing->marked_token_lo;
    switch (args->input_mode) {
    case MOE_INPUT_UNSET:
        return moe__fail(err, MOE_ERROR_ARGUMENT, "args.input_mode", "is not set: it must be a moe_input_mode");
    case MOE_INPUT_LOGITS:
        if (args->token_ids == NULL &&
            (routing->forced_rows > 0 || (marked && routing->bias_rows == 2 && args->bias_index == NULL)))
            return moe__fail(err, MOE_ERROR_ARGUMENT, "args.token_ids",
                             "is NULL: this layer's routing depends on token ids");
        if (routing->simulate != MOE_SIMULATE_OFF) return MOE_OK;
        return moe__check_matrix(args->logits, &run->args.logits_stride, run->plan->width, "args.logits",
                                 "args.logits_stride", err);
    case MOE_INPUT_IDS:
        if (args->weights == NULL) return moe__fail_null(err, "args.weights");
        return args->ids == NULL ? moe__fail_null(err, "args.ids") : MOE_OK;
    case MOE_INPUT_PACKED: return args->ids == NULL ? moe__fail_null(err, "args.ids") : MOE_OK;
    case MOE_INPUT_MASKED:
    case MOE_INPUT_SORTED:
        return moe__fail(err, MOE_ERROR_ARGUMENT, "args.input_mode",
                         "is %d, which has rows instead of tokens: this call needs LOGITS, IDS or PACKED",
                         args->input_mode);
    default:
        return moe__fail(err, MOE_ERROR_ARGUMENT, "args.input_mode", "is %d: it must be a moe_input_mode",
                         args->input_mode);
    }
}

static int32_t moe__check_rows_input(moe__run *run, moe_error *err)
{
    const moe_execute_args *args = &run->args;
    int64_t rows = (int64_t)run->plan->blocks * args->rows_per_expert;
    if (args->counts_or_offsets == NULL) return moe__fail_null(err, "args.counts_or_offsets");
    if (args->num_tokens_dev != NULL)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "args.num_tokens_dev",
                         "is set, but counts_or_offsets say how many rows there are");
    if (args->input_mode == MOE_INPUT_MASKED && (args->rows_per_expert < 1 || rows > INT32_MAX))
        return moe__fail_range(err, "args.rows_per_expert", args->rows_per_expert, 1,
                               INT32_MAX / moe__max32(1, run->plan->blocks));
    return MOE_OK;
}

// The members that moe_execute() reads and writes beside those of every call.
static int32_t moe__check_execute(moe__run *run, moe_error *err)
{
    const uint32_t both = MOE_EXECUTE_ACCUMULATE | MOE_EXECUTE_ROWS_OUT;
    const moe_execute_args *args = &run->args;
    int32_t hidden = run->plan->layer.hidden_size, rows_mode = moe__run_rows_mode(run), result;
    if ((args->flags & both) == both)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "args.flags",
                         "has both ACCUMULATE and ROWS_OUT: rows are not added to");
    if (!rows_mode && args->num_tokens == 0 && args->input_mode >= MOE_INPUT_LOGITS &&
        args->input_mode <= MOE_INPUT_PACKED)
        return MOE_OK; // nothing is read or written
    result = rows_mode ? moe__check_rows_input(run, err) : moe__check_routing_input(run, err);
    if (result != MOE_OK || (result = moe__check_x(run, hidden, err)) != MOE_OK) return result;
    if (args->shared_gate != NULL && run->plan->layer.shared.count == 0)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "args.shared_gate", "is set, but layer.shared.count is 0");
    if ((args->flags & MOE_EXECUTE_ROWS_OUT) != 0 && !rows_mode && args->out_row_of_slot == NULL)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "args.out_row_of_slot",
                         "is NULL: with ROWS_OUT it says which row is whose");
    return moe__check_matrix(args->out, &run->args.out_stride, hidden, "args.out", "args.out_stride", err);
}

// ---- checks of contents; each counts into faults and describes the first it meets ----

static int32_t moe__check_tokens(moe__run *run, uint32_t *faults, moe_error *err)
{
    if (run->args.num_tokens_dev == NULL) return MOE_OK;
    run->tokens = run->args.num_tokens_dev[0];
    if (run->tokens >= 0 && run->tokens <= run->args.num_tokens) return MOE_OK;
    faults[MOE_FAULT_COUNTS]++;
    return moe__fail(err, MOE_ERROR_DATA, "args.num_tokens_dev", "holds %d: it must be 0..%d, num_tokens", run->tokens,
                     run->args.num_tokens);
}

static int64_t moe__load_id(const void *ids, int32_t dtype, int64_t index)
{
    if (dtype == MOE_DTYPE_I64) return ((const int64_t *)ids)[index];
    return ((const int32_t *)ids)[index];
}

static int32_t moe__check_token_id(const moe__run *run, int32_t token, uint32_t *faults, moe_error *err)
{
    const moe_routing_desc *routing = &run->plan->layer.routing;
    char member[64];
    if (run->args.bias_index != NULL && routing->bias_rows > 0) {
        int32_t row = run->args.bias_index[token];
        if (row < 0 || row >= routing->bias_rows) {
            faults[MOE_FAULT_TOKEN_IDS]++;
            return moe__fail(err, MOE_ERROR_DATA, moe__member_at(member, sizeof member, "bias_index", token, -1),
                             "is %d: it must be 0..%d", row, routing->bias_rows - 1);
        }
    }
    if (routing->forced_rows > 0) {
        int64_t id = moe__load_id(run->args.token_ids, run->plan->desc.ids_dtype, token);
        if (!moe__routing_is_marked(routing, id) && (id < 0 || id >= routing->forced_rows)) {
            faults[MOE_FAULT_TOKEN_IDS]++;
            return moe__fail(err, MOE_ERROR_DATA, moe__member_at(member, sizeof member, "token_ids", token, -1),
                             "is %D: the table of forced ids has rows 0..%d", id, routing->forced_rows - 1);
        }
    }
    return MOE_OK;
}

// The caller's ids of one token into *out, as int32 with -1 for nothing.
static int32_t moe__check_ids(const moe__run *run, int32_t token, int32_t *out, uint32_t *faults, moe_error *err)
{
    char member[64];
    int32_t slots = run->plan->slots, packed = run->args.input_mode == MOE_INPUT_PACKED, result = MOE_OK;
    int32_t none = (run->args.flags & MOE_EXECUTE_ID_E_IS_NONE) != 0;
    for (int32_t j = 0; j < slots; j++) {
        int64_t at = (int64_t)token * slots + j, id;
        if (packed) id = (int16_t)(uint16_t)((uint32_t)((const int32_t *)run->args.ids)[at] >> 16);
        else id = moe__load_id(run->args.ids, run->plan->desc.ids_dtype, at);
        if (none && id == run->plan->ids_end) id = -1;
        out[j] = (int32_t)id;
        if (id >= -1 && id < run->plan->ids_end) continue;
        faults[MOE_FAULT_IDS]++;
        if (result == MOE_OK)
            result =
                moe__fail(err, MOE_ERROR_DATA, moe__member_at(member, sizeof member, "ids", token, j),
                          "is %D: ids are 0..%d, or -1 for nothing%s", id, run->plan->ids_end - 1,
                          none || id != run->plan->ids_end ? "" : " (MOE_EXECUTE_ID_E_IS_NONE would allow this one)");
    }
    return result;
}

// Routes one token from its logits. Scratch of one worker: what >>routing needs, then a row of logits.
static int32_t moe__run_route(const moe__run *run, int32_t token, int32_t worker, int32_t *ids, float *weights,
                              uint32_t *faults, moe_error *err)
{
    const moe_plan *plan = run->plan;
    const moe_execute_args *args = &run->args;
    unsigned char *scratch = run->memory + plan->workspace.routing + (uint64_t)worker * plan->workspace.routing_bytes;
    float *logits = (float *)(void *)(scratch + plan->workspace.routing_bytes) - plan->width;
    int64_t id = args->token_ids == NULL ? -1 : moe__load_id(args->token_ids, plan->desc.ids_dtype, token);
    char member[64];
    int32_t bias_row = -1, result = moe__check_token_id(run, token, faults, err);
    if (result != MOE_OK) return result;
    if (plan->layer.routing.simulate == MOE_SIMULATE_OFF)
        for (int32_t e = 0; e < plan->width; e++)
            logits[e] = moe__load(args->logits, plan->desc.logits_dtype, token * args->logits_stride + e);
    if (args->bias_index != NULL && plan->layer.routing.bias_rows > 0) bias_row = args->bias_index[token];
    if (moe__routing_token(&run->router, logits, token, id, bias_row, scratch, ids, weights) == MOE__ROUTED)
        return MOE_OK;
    faults[MOE_FAULT_NAN_LOGITS]++;
    for (int32_t e = 0; e < plan->width && err != NULL; e++)
        if (moe__is_nan(logits[e]) || moe__f32_bits(logits[e]) == 0x7f800000u)
            return moe__fail(err, MOE_ERROR_DATA, moe__member_at(member, sizeof member, "logits", token, e),
                             "is %s: logits are numbers, or -inf for never",
                             moe__is_nan(logits[e]) ? "NaN" : "+inf");
    return moe__fail(err, MOE_ERROR_DATA, moe__member_at(member, sizeof member, "logits", token, -1),
                     "gives a score that is NaN or infinite with this layer's multiplier, bias or scale");
}

// Contents that one token brings become ids and weights; both have room for the slots.
static int32_t moe__run_token(const moe__run *run, int32_t token, int32_t worker, int32_t *ids, float *weights,
                              uint32_t *faults, moe_error *err)
{
    const moe_plan *plan = run->plan;
    int32_t packed = run->args.input_mode == MOE_INPUT_PACKED, result;
    if (run->args.input_mode == MOE_INPUT_LOGITS) return moe__run_route(run, token, worker, ids, weights, faults, err);
    if ((result = moe__check_ids(run, token, ids, faults, err)) != MOE_OK) return result;
    for (int32_t j = 0; j < plan->slots; j++) {
        int64_t at = (int64_t)token * plan->slots + j;
        if (ids[j] < 0) weights[j] = 0;
        else if (packed) weights[j] = moe__bf16_to_f32((uint16_t)((const int32_t *)run->args.ids)[at]);
        else weights[j] = moe__load(run->args.weights, plan->desc.weights_dtype, at);
    }
    return MOE_OK;
}

static int32_t moe__check_counts(const moe__run *run, uint32_t *faults, moe_error *err)
{
    const int32_t *table = run->args.counts_or_offsets;
    int32_t blocks = run->plan->blocks, masked = run->args.input_mode == MOE_INPUT_MASKED;
    int32_t limit = run->plan->desc.max_rows;
    int64_t rows = 0;
    char member[64];
    for (int32_t e = 0; e < blocks + !masked; e++) {
        int64_t low = masked || e == 0 ? 0 : table[e - 1], high = limit;
        if (masked) high = run->args.rows_per_expert;
        else if (e == 0) high = 0;
        rows = masked ? rows + table[e] : table[e];
        if (table[e] >= low && table[e] <= high && rows <= limit) continue;
        faults[MOE_FAULT_COUNTS]++;
        moe__member_at(member, sizeof member, "counts_or_offsets", e, -1);
        if (table[e] >= low && table[e] <= high)
            return moe__fail(err, MOE_ERROR_DATA, member, "is %d: that makes %D rows, the plan has max_rows %d",
                             table[e], rows, limit);
        return moe__fail(err, MOE_ERROR_DATA, member, "is %d: it must be %D..%D%s", table[e], low, high,
                         masked ? ", rows_per_expert" : ", not below the one before and not above max_rows");
    }
    return MOE_OK;
}

#if !defined(MOE_NO_CUDA)
static int32_t moe__check_aligned(const void *pointer, int32_t bytes, const char *member, moe_error *err)
{
    if ((uintptr_t)pointer % (uintptr_t)bytes == 0) return MOE_OK;
    return moe__fail(err, MOE_ERROR_ARGUMENT, member, "is not aligned to its elements of %d bytes", bytes);
}

// On the device nothing is read to be checked: addresses must be multiples of the elements' size.
static int32_t moe__check_device(const moe__run *run, moe_error *err)
{
    const moe_execute_args *a = &run->args;
    const moe_plan_desc *d = &run->plan->desc;
    int32_t id = moe_dtype_bits(d->ids_dtype) / 8, weight = moe_dtype_bits(d->weights_dtype) / 8;
    int32_t packed = a->input_mode == MOE_INPUT_PACKED, result;
    if ((result = moe__check_aligned(a->logits, moe_dtype_bits(d->logits_dtype) / 8, "args.logits", err)) != MOE_OK ||
        (result = moe__check_aligned(a->ids, packed ? 4 : id, "args.ids", err)) != MOE_OK ||
        (result = moe__check_aligned(a->weights, weight, "args.weights", err)) != MOE_OK ||
        (result = moe__check_aligned(a->token_ids, id, "args.token_ids", err)) != MOE_OK ||
        (result = moe__check_aligned(a->x, moe_dtype_bits(d->x_dtype) / 8, "args.x", err)) != MOE_OK ||
        (result = moe__check_aligned(a->bias_index, 4, "args.bias_index", err)) != MOE_OK ||
        (result = moe__check_aligned(a->num_tokens_dev, 4, "args.num_tokens_dev", err)) != MOE_OK ||
        (result = moe__check_aligned(a->out_ids, 4, "args.out_ids", err)) != MOE_OK ||
        (result = moe__check_aligned(a->out_weights, 4, "args.out_weights", err)) != MOE_OK ||
        (result = moe__check_aligned(a->out_expert_counts, 4, "args.out_expert_counts", err)) != MOE_OK)
        return result;
    return moe__check_aligned(a->out_faults, 4, "args.out_faults", err);
}

// moe_execute_check() of a CUDA plan: what the stages would refuse, and then what this version does.
static int32_t moe__check_cuda(const moe__run *run, moe_error *err)
{
    int32_t result = moe__check_device(run, err);
    if (result != MOE_OK) return result;
    return moe__fail(err, MOE_ERROR_UNSUPPORTED, "plan", "is of the CUDA back end, which in this version runs "
                     "moe_route(), moe_permute() and moe_router_logits(); use MOE_BACKEND_CPU for the whole layer");
}
#endif

MOE_API int32_t moe_execute_check(const moe_plan *plan, const moe_weights *weights, const moe_execute_args *args,
                                  moe_error *err)
{
    moe__run run;
    uint32_t faults[MOE_FAULTS] = { 0 };
    int32_t ids[MOE_MAX_SLOTS], result;
    float slot_weights[MOE_MAX_SLOTS];
    if ((result = moe__run_begin(&run, plan, weights, args, err)) != MOE_OK ||
        (result = moe__check_execute(&run, err)) != MOE_OK)
        return result;
#if !defined(MOE_NO_CUDA)
    if (plan->ctx->desc.backend == MOE_BACKEND_CUDA) return moe__check_cuda(&run, err);
#endif
    if (moe__run_rows_mode(&run)) result = moe__check_counts(&run, faults, err);
    else if ((result = moe__check_tokens(&run, faults, err)) == MOE_OK)
        for (int32_t t = 0; t < run.tokens && result == MOE_OK; t++)
            result = moe__run_token(&run, t, 0, ids, slot_weights, faults, err);
    return result == MOE_OK ? moe__ok(err) : result;
}

// ---- phases ----

static void moe__widen_row(const void *source, int32_t dtype, int64_t first, int32_t n, float *out, int32_t ld)
{
    for (int32_t i = 0; i < n; i++) out[i] = moe__load(source, dtype, first + i);
    for (int32_t i = n; i < ld; i++) out[i] = 0;
}

static void moe__run_tokens_task(void *arg, int32_t index, int32_t worker)
{
    const moe__run *run = (const moe__run *)arg;
    int32_t begin = index * MOE__TOKENS_PER_TASK, end = moe__min32(run->tokens, begin + MOE__TOKENS_PER_TASK);
    int32_t ld = run->plan->layout.expert.ld1;
    for (int32_t t = begin; t < end; t++) {
        moe__run_token(run, t, worker, run->ids + (int64_t)t * run->plan->slots,
                       run->slot_weights + (int64_t)t * run->plan->slots, run->faults + worker * 16, NULL);
        if (run->args.x != NULL)
            moe__widen_row(run->args.x, run->plan->desc.x_dtype, t * run->args.x_stride, run->plan->layer.hidden_size,
                           run->x + (int64_t)t * ld, ld);
    }
}

static int32_t moe__tasks_of(int32_t items, int32_t per_task) { return (items + per_task - 1) / per_task; }

static void moe__run_report_faults(const moe__run *run, const uint32_t *faults)
{
    if (run->args.out_faults != NULL) memcpy(run->args.out_faults, faults, MOE_FAULTS * sizeof faults[0]);
}

// Routes (or reads ids), and widens x where there is one; out_ids, out_weights, out_expert_counts, out_faults.
static int32_t moe__run_route_phase(moe__run *run)
{
    const moe_plan *plan = run->plan;
    uint32_t faults[MOE_FAULTS] = { 0 };
    int32_t threads = plan->ctx->desc.threads, experts = plan->layer.num_experts, bad = 0;
    int64_t slots;
    if (moe__check_tokens(run, faults, NULL) != MOE_OK) {
        moe__run_report_faults(run, faults);
        return MOE_ERROR_DATA;
    }
    memset(run->faults, 0, (size_t)threads * 16 * sizeof run->faults[0]);
    moe__work_run(plan->ctx, moe__tasks_of(run->tokens, MOE__TOKENS_PER_TASK), moe__run_tokens_task, run);
    for (int32_t i = 0; i < threads; i++)
        for (int32_t f = 0; f < MOE_FAULTS; f++) {
            faults[f] += run->faults[i * 16 + f];
            bad |= run->faults[i * 16 + f] != 0;
        }
    moe__run_report_faults(run, faults);
    if (bad) return MOE_ERROR_DATA;
    slots = (int64_t)run->tokens * plan->slots;
    if (run->args.out_ids != NULL) memcpy(run->args.out_ids, run->ids, (size_t)slots * sizeof run->ids[0]);
    if (run->args.out_weights != NULL)
        memcpy(run->args.out_weights, run->slot_weights, (size_t)slots * sizeof run->slot_weights[0]);
    if (run->args.out_expert_counts != NULL) {
        memset(run->args.out_expert_counts, 0, (size_t)experts * sizeof(int32_t));
        for (int64_t s = 0; s < slots; s++)
            if (run->ids[s] >= 0 && run->ids[s] < experts) run->args.out_expert_counts[run->ids[s]]++;
    }
    return MOE_OK;
}

// Slots in expert order, tokens in order inside an expert: a counting sort.
static void moe__run_sort(moe__run *run)
{
    const moe_layer_desc *layer = &run->plan->layer;
    int64_t slots = (int64_t)run->tokens * run->plan->slots;
    int32_t blocks = run->plan->blocks, *next = run->offsets;
    memset(next, 0, ((size_t)blocks + 1) * sizeof next[0]);
    for (int64_t s = 0; s < slots; s++) {
        int32_t local = moe__layer_local(layer, run->ids[s]);
        run->row_of_slot[s] = local;
        if (local >= 0) next[local + 1]++;
    }
    for (int32_t e = 0; e < blocks; e++) next[e + 1] += next[e];
    for (int64_t s = 0; s < slots; s++) { // next[e] runs from the expert's first row to its end
        int32_t local = run->row_of_slot[s];
        if (local < 0) continue;
        run->row_of_slot[s] = next[local];
        run->slot_of_row[next[local]++] = (int32_t)s;
    }
    for (int32_t e = blocks; e > 0; e--) next[e] = next[e - 1];
    next[0] = 0;
}

static void moe__run_cpu(const moe__run *run, moe__cpu *cpu)
{
    const moe_plan *plan = run->plan;
    memset(cpu, 0, sizeof *cpu);
    cpu->ctx = plan->ctx;
    cpu->kernels = moe__kernels_of(plan->ctx->isa);
    cpu->layer = &plan->layer;
    cpu->weights = run->weights;
    cpu->mid_dtype = plan->desc.intermediate_dtype;
    cpu->blocks = plan->blocks;
    cpu->expert_of_block = plan->expert_of_block;
    cpu->offsets = run->offsets;
    cpu->slots = plan->slots;
    cpu->slot_of_row = run->slot_of_row;
    cpu->slot_weights = run->slot_weights;
    cpu->x = run->x;
    if (plan->layer.routing.weight_on == MOE_WEIGHT_ON_INPUT)
        cpu->x_rows = (float *)(void *)(run->memory + plan->workspace.x_rows);
    cpu->mid = (float *)(void *)(run->memory + plan->workspace.mid);
    cpu->mid_shared = (float *)(void *)(run->memory + plan->workspace.mid_shared);
    cpu->rows = (float *)(void *)(run->memory + plan->workspace.rows);
    cpu->task_begin = (int32_t *)(void *)(run->memory + plan->workspace.task_begin);
    cpu->scratch = (float *)(void *)(run->memory + plan->workspace.scratch);
}

static void moe__run_finalize(const moe__run *run, moe__finalize *f)
{
    const moe_plan *plan = run->plan;
    memset(f, 0, sizeof *f);
    f->kernels = moe__kernels_of(plan->ctx->isa);
    f->layer = &plan->layer;
    f->weights = run->weights;
    f->tokens = run->tokens;
    f->slots = plan->slots;
    f->tokens_per_task = moe__max32(1, moe__min32(MOE__TOKENS_PER_TASK, run->tokens / (2 * plan->ctx->desc.threads)));
    f->ids = run->ids;
    f->slot_weights = run->slot_weights;
    f->row_of_slot = run->row_of_slot;
    f->x = run->x;
    f->x_ld = plan->layout.expert.ld1;
    f->shared_gate = run->args.shared_gate;
    f->routed_scale = plan->layer.routing.scale_on == MOE_SCALE_ON_OUTPUT ? run->router.scale : 1;
    f->out = run->args.out;
    f->out_dtype = plan->desc.out_dtype;
    f->out_ld = run->args.out_stride;
    f->accumulate = (run->args.flags & MOE_EXECUTE_ACCUMULATE) != 0;
}

// Both GEMMs and what follows, for rows that are sorted; finish is called for each slice of columns.
static void moe__run_experts(moe__cpu *cpu, moe__finalize *f, int32_t items,
                             void (*finish)(void *arg, int32_t index, int32_t worker))
{
    int32_t rows = cpu->offsets[cpu->blocks], hidden = cpu->layer->hidden_size;
    int32_t columns = moe__slice_columns(cpu->layer, (int64_t)rows + cpu->shared_rows);
    if (cpu->x_rows != NULL) moe__work_run(cpu->ctx, moe__tasks_of(rows, MOE__ROWS_PER_TASK), moe__cpu_weigh_rows, cpu);
    moe__work_run(cpu->ctx, moe__cpu_split(cpu, 1), moe__cpu_gemm1, cpu);
    cpu->slice_ld = (int32_t)moe__align_up((uint64_t)columns, MOE__ROW_ALIGN);
    cpu->rows_shared = cpu->rows + (size_t)rows * (size_t)cpu->slice_ld;
    f->rows = cpu->rows;
    f->rows_dtype = MOE_DTYPE_F32;
    f->rows_ld = cpu->slice_ld;
    f->rows_shared = cpu->shared_rows > 0 ? cpu->rows_shared : NULL;
    for (cpu->slice = 0; cpu->slice < hidden; cpu->slice += columns) {
        f->first = cpu->slice;
        f->columns = cpu->slice_cols = moe__min32(columns, hidden - cpu->slice);
        moe__work_run(cpu->ctx, moe__cpu_split(cpu, 2), moe__cpu_gemm2, cpu);
        if (cpu->layer->row_norm)
            moe__work_run(cpu->ctx, moe__tasks_of(rows, MOE__ROWS_PER_TASK), moe__cpu_norm_rows, cpu);
        moe__work_run(cpu->ctx, moe__tasks_of(items, f->tokens_per_task), finish, f);
    }
}

static int32_t moe__execute_tokens(moe__run *run)
{
    moe__cpu cpu;
    moe__finalize f;
    int32_t rows_out = (run->args.flags & MOE_EXECUTE_ROWS_OUT) != 0, result = moe__run_route_phase(run);
    if (result != MOE_OK || run->tokens == 0) return result;
    moe__run_sort(run);
    if (run->args.out_row_of_slot != NULL)
        memcpy(run->args.out_row_of_slot, run->row_of_slot,
               (size_t)run->tokens * (size_t)run->plan->slots * sizeof(int32_t));
    moe__run_cpu(run, &cpu);
    moe__run_finalize(run, &f);
    if (!rows_out && run->plan->layout.shared.bytes != 0) cpu.shared_rows = run->tokens;
    if (rows_out) f.tokens = run->offsets[cpu.blocks];
    moe__run_experts(&cpu, &f, f.tokens, rows_out ? moe__rows_out_task : moe__finalize_task);
    return MOE_OK;
}

// ---- rows in, rows out ----

static int32_t moe__group_end(const moe__run *run, int32_t begin, int32_t group)
{
    const int32_t *table = run->args.counts_or_offsets;
    return run->args.input_mode == MOE_INPUT_MASKED ? begin + table[group] : table[group + 1];
}

static void moe__run_rows_task(void *arg, int32_t index, int32_t worker)
{
    const moe__run *run = (const moe__run *)arg;
    int32_t begin = index * MOE__TOKENS_PER_TASK, ld = run->plan->layout.expert.ld1;
    (void)worker;
    for (int32_t r = begin; r < moe__min32(run->tokens, begin + MOE__TOKENS_PER_TASK); r++) {
        int64_t at = run->row_of_slot[r];
        run->slot_weights[r] =
            run->args.weights == NULL ? 1 : moe__load(run->args.weights, run->plan->desc.weights_dtype, at);
        moe__widen_row(run->args.x, run->plan->desc.x_dtype, at * run->args.x_stride, run->plan->layer.hidden_size,
                       run->x + (int64_t)r * ld, ld);
    }
}

// Rows [first, last) of the call: their offsets per expert, and where each lies in x and out.
static void moe__run_chunk(moe__run *run, int32_t first, int32_t last)
{
    int32_t begin = 0, masked = run->args.input_mode == MOE_INPUT_MASKED;
    run->offsets[0] = 0;
    for (int32_t g = 0; g < run->plan->blocks; g++) {
        int32_t end = moe__group_end(run, begin, g), low = moe__max32(begin, first), high = moe__min32(end, last);
        for (int32_t r = low; r < high; r++) {
            run->row_of_slot[r - first] = masked ? g * run->args.rows_per_expert + (r - begin) : r;
            run->slot_of_row[r - first] = r - first;
        }
        run->offsets[g + 1] = moe__max32(run->offsets[g], high - first);
        begin = end;
    }
    run->tokens = last - first;
}

// As many rows at a time as the workspace has tokens: rows do not depend on each other.
static int32_t moe__execute_rows(moe__run *run)
{
    uint32_t faults[MOE_FAULTS] = { 0 };
    int32_t result = moe__check_counts(run, faults, NULL), rows_out = (run->args.flags & MOE_EXECUTE_ROWS_OUT) != 0,
            rows = 0;
    moe__run_report_faults(run, faults);
    if (result != MOE_OK) return result;
    for (int32_t g = 0; g < run->plan->blocks; g++) rows = moe__group_end(run, rows, g);
    for (int32_t first = 0; first < rows; first += run->plan->desc.max_tokens) {
        moe__cpu cpu;
        moe__finalize f;
        moe__run_chunk(run, first, moe__min32(rows, first + moe__min32(rows - first, run->plan->desc.max_tokens)));
        moe__work_run(run->plan->ctx, moe__tasks_of(run->tokens, MOE__TOKENS_PER_TASK), moe__run_rows_task, run);
        moe__run_cpu(run, &cpu);
        moe__run_finalize(run, &f);
        cpu.slots = f.slots = 1;
        f.ids = f.row_of_slot = NULL;
        f.out_rows = run->row_of_slot;
        moe__run_experts(&cpu, &f, run->tokens, rows_out ? moe__rows_out_task : moe__finalize_task);
    }
    return MOE_OK;
}

// >>stages  the public calls of execution  On CUDA each enqueues one or two kernels: host arithmetic, then the driver.
// Routing takes one launch up to moe__one_tokens() tokens, a cluster whose CTAs share their counts; beyond that a first
// kernel routes chunks of tokens and counts them, a second adds the counts up and writes the tables, starting early by
// programmatic dependent launch where the chip and the driver have it.

#if !defined(MOE_NO_CUDA)
static int32_t moe__stage_launch(const moe_plan *plan, int32_t kernel, int32_t ctas, int32_t cluster, int32_t pdl,
                                 int32_t smem, void *args, void *stream)
{
    moe__cu_launch_config config;
    moe__cu_launch_attribute attributes[2];
    void *params[1];
    params[0] = args;
    memset(&config, 0, sizeof config);
    config.gridDimX = (unsigned)ctas;
    config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1;
    config.blockDimX = (unsigned)plan->stages.threads[kernel];
    config.sharedMemBytes = (unsigned)smem;
    config.hStream = (moe__cu_stream)stream;
    config.attrs = attributes;
    if (cluster > 1) {
        moe__cu_launch_attribute *a = &attributes[config.numAttrs++];
        memset(a, 0, sizeof *a);
        a->id = MOE__CU_ATTRIBUTE_CLUSTER;
        a->value.cluster.x = (unsigned)cluster;
        a->value.cluster.y = a->value.cluster.z = 1;
    }
    if (pdl) {
        moe__cu_launch_attribute *a = &attributes[config.numAttrs++];
        memset(a, 0, sizeof *a);
        a->id = MOE__CU_ATTRIBUTE_PDL;
        a->value.programmatic = 1;
    }
    return plan->ctx->cuda->cuLaunchKernelEx(&config, plan->stages.kernel[kernel], params, NULL);
}

static void moe__stage_tokens(const moe__run *run, moe__tokens_args *t)
{
    const moe_execute_args *a = &run->args;
    const moe_weights *w = run->weights;
    *t = run->plan->stages.tokens;
    t->num_tokens_dev = a->num_tokens_dev;
    t->num_tokens = a->num_tokens;
    t->input_mode = a->input_mode;
    t->out_ids = a->out_ids;
    t->out_weights = a->out_weights;
    t->end_is_none = (a->flags & MOE_EXECUTE_ID_E_IS_NONE) != 0;
    if (a->input_mode != MOE_INPUT_LOGITS) {
        t->ids = a->ids;
        if (a->input_mode == MOE_INPUT_IDS) t->weights = a->weights;
        return;
    }
    t->logits = a->logits;
    t->logits_stride = a->logits_stride;
    t->token_ids = a->token_ids;
    if (t->routing.bias_rows > 0) t->bias_index = a->bias_index;
    t->bias = (const float *)moe__device_table(w, MOE_TENSOR_SELECT_BIAS);
    t->per_expert_scale = (const float *)moe__device_table(w, MOE_TENSOR_PER_EXPERT_SCALE);
    t->forced_ids = (const int32_t *)moe__device_table(w, MOE_TENSOR_FORCED_IDS);
    t->global_scale = (const float *)moe__device_table(w, MOE_TENSOR_ROUTER_GLOBAL_SCALE);
}

static void moe__stage_permute(const moe__run *run, const moe_permutation *p, moe__permute_args *a)
{
    *a = run->plan->stages.permute;
    a->out_expert_counts = run->args.out_expert_counts;
    a->out_faults = run->args.out_faults;
    a->tile = p->tile;
    a->tile_shift = 0;
    while (p->tile >> a->tile_shift > 1) a->tile_shift++;
    if (1 << a->tile_shift != p->tile) a->tile_shift = -1;
    a->row_of_slot = p->row_of_slot;
    a->slot_of_row = p->slot_of_row;
    a->expert_offsets = p->expert_offsets;
    a->expert_counts = p->expert_counts;
    a->tile_expert = p->tile_expert;
    a->tile_limit = p->tile_limit;
    a->num_tiles = p->num_tiles;
    a->rows_max = (int32_t)moe_permutation_rows((int64_t)run->args.num_tokens * run->plan->slots, run->plan->blocks,
                                                p->tile);
}

// Somebody wants what comes behind the ids and weights.
static int32_t moe__stage_sorts(const moe__permute_args *a)
{
    return a->row_of_slot != NULL || a->slot_of_row != NULL || a->expert_offsets != NULL || a->expert_counts != NULL ||
           a->tile_expert != NULL || a->tile_limit != NULL || a->num_tiles != NULL || a->out_expert_counts != NULL ||
           a->out_faults != NULL;
}

static int32_t moe__stage_route_two(const moe__run *run, const moe__route_one_args *one, void *stream)
{
    const moe_plan *plan = run->plan;
    const moe__workspace *ws = &plan->workspace;
    int32_t tokens = run->args.num_tokens, pdl_in = (run->args.flags & MOE_EXECUTE_PDL_IN) != 0, result;
    int32_t chunk = moe__chunk_tokens(tokens, plan->ctx->cuda->sms);
    int32_t chunks = moe__max32(1, (tokens + chunk - 1) / chunk);
    moe__route_args route;
    moe__sort_args sort;
    route.tokens = one->tokens;
    if (route.tokens.out_ids == NULL) route.tokens.out_ids = run->ids;
    route.chunk_counts = (uint16_t *)(void *)(run->memory + ws->chunk_counts);
    route.chunk_faults = (uint32_t *)(void *)(run->memory + ws->chunk_faults);
    route.chunk_tokens = chunk;
    route.counts_stride = moe__counter_stride(plan->ids_end);
    result = moe__stage_launch(plan, MOE__KERNEL_ROUTE, chunks, 1, pdl_in && plan->stages.pdl,
                               moe__route_smem(plan->width, plan->ids_end), &route, stream);
    if (result != 0 || !moe__stage_sorts(&one->permute)) return result;
    sort.permute = one->permute;
    sort.ids = route.tokens.out_ids;
    sort.chunk_counts = route.chunk_counts;
    sort.chunk_faults = route.chunk_faults;
    sort.num_tokens_dev = run->args.num_tokens_dev;
    sort.num_tokens = tokens;
    sort.chunk_tokens = chunk;
    sort.counts_stride = route.counts_stride;
    sort.chunks = chunks;
    sort.num_experts = plan->layer.num_experts;
    sort.slots = plan->slots;
    sort.ids_end = plan->ids_end;
    sort.special_experts = plan->layer.routing.special_experts;
    return moe__stage_launch(plan, MOE__KERNEL_SORT, chunks, 1, plan->stages.pdl,
                             moe__sort_smem(plan->stages.threads[MOE__KERNEL_SORT] / 32, plan->ids_end), &sort, stream);
}

// K0: ids and weights, and every table that somebody wants.
static int32_t moe__stage_route(const moe__run *run, const moe_permutation *p, void *stream)
{
    const moe_plan *plan = run->plan;
    moe__route_one_args one;
    int32_t tokens = run->args.num_tokens, arch = plan->ctx->cuda->arch, ctas, entered, result;
    if ((result = moe__check_device(run, NULL)) != MOE_OK) return result;
    moe__stage_tokens(run, &one.tokens);
    moe__stage_permute(run, p, &one.permute);
    if ((result = moe__cuda_enter(plan->ctx, &entered)) != MOE_OK) return result;
    if (tokens > plan->stages.one_tokens || plan->stages.one_tokens == 0) {
        result = moe__stage_route_two(run, &one, stream);
    } else {
        ctas = moe__one_ctas(tokens, plan->width, arch);
        result = moe__stage_launch(plan, MOE__KERNEL_ROUTE_ONE, ctas, ctas,
                                   (run->args.flags & MOE_EXECUTE_PDL_IN) != 0 && plan->stages.pdl,
                                   moe__route_one_smem(plan->width, plan->ids_end, plan->slots, tokens, ctas), &one,
                                   stream);
    }
    moe__cuda_leave(plan->ctx, entered);
    return moe__cuda_result(result);
}

static int32_t moe__stage_permute_check(const moe_permutation *p)
{
    const void *const tables[] = { p->row_of_slot, p->slot_of_row, p->expert_offsets, p->expert_counts, p->tile_expert,
                                   p->tile_limit, p->num_tiles };
    for (int32_t i = 0; i < MOE__ARRAY_COUNT(tables); i++)
        if ((uintptr_t)tables[i] % 4 != 0) return MOE_ERROR_ARGUMENT;
    return MOE_OK;
}

static int32_t moe__stage_router(const moe__run *run, float *out, void *stream)
{
    const moe_plan *plan = run->plan;
    const moe_router_desc *router = &plan->layer.router;
    moe__router_args a;
    int32_t entered, result = moe__check_device(run, NULL), bf16 = run->weights->device.router_bf16;
    moe__router_shape shape = moe__router_shape_of(run->args.num_tokens, plan->desc.x_dtype);
    if (result != MOE_OK) return result;
    if ((uintptr_t)out % 4 != 0) return MOE_ERROR_ARGUMENT;
    a.x = run->args.x;
    a.weight = moe__device_table(run->weights, MOE_TENSOR_ROUTER);
    a.bias = (const float *)moe__device_table(run->weights, MOE_TENSOR_ROUTER_BIAS);
    a.input_scale = (const float *)moe__device_table(run->weights, MOE_TENSOR_ROUTER_INPUT_SCALE);
    a.num_tokens_dev = run->args.num_tokens_dev;
    a.out = out;
    a.out_faults = run->args.out_faults;
    a.x_stride = run->args.x_stride;
    a.num_tokens = run->args.num_tokens;
    a.width = plan->width;
    a.input_size = router->input_size;
    a.ld = plan->layout.router_ld;
    a.x_dtype = plan->desc.x_dtype;
    a.rms_norm = router->rms_norm;
    a.norm_epsilon = router->norm_epsilon;
    a.input_multiplier = router->input_multiplier;
    if ((result = moe__cuda_enter(plan->ctx, &entered)) != MOE_OK) return result;
    result = moe__stage_launch(plan, bf16 ? MOE__KERNEL_ROUTER_BF16 : MOE__KERNEL_ROUTER_F32,
                               moe__router_ctas(shape, a.num_tokens, a.width, plan->ctx->cuda->sms), 1,
                               (run->args.flags & MOE_EXECUTE_PDL_IN) != 0 && plan->stages.pdl,
                               moe__router_smem(shape, bf16), &a, stream);
    moe__cuda_leave(plan->ctx, entered);
    return moe__cuda_result(result);
}
#endif

MOE_API int32_t moe_execute(const moe_plan *plan, const moe_weights *weights, const moe_execute_args *args,
                            void *stream)
{
    moe__run run;
    int32_t result;
    (void)stream;
    if ((result = moe__run_begin(&run, plan, weights, args, NULL)) != MOE_OK ||
        (result = moe__check_execute(&run, NULL)) != MOE_OK)
        return result;
#if !defined(MOE_NO_CUDA)
    if (plan->ctx->desc.backend == MOE_BACKEND_CUDA) return moe__check_cuda(&run, NULL);
#endif
    return moe__run_rows_mode(&run) ? moe__execute_rows(&run) : moe__execute_tokens(&run);
}

MOE_API int32_t moe_route(const moe_plan *plan, const moe_weights *weights, const moe_execute_args *args, void *stream)
{
    moe__run run;
    int32_t result;
    (void)stream;
    if ((result = moe__run_begin(&run, plan, weights, args, NULL)) != MOE_OK ||
        (run.tokens > 0 && (result = moe__check_routing_input(&run, NULL)) != MOE_OK))
        return result;
#if !defined(MOE_NO_CUDA)
    if (plan->ctx->desc.backend == MOE_BACKEND_CUDA) {
        moe_permutation none;
        memset(&none, 0, sizeof none);
        none.tile = 1;
        return moe__stage_route(&run, &none, stream);
    }
#endif
    run.args.x = NULL; // not widened
    return moe__run_route_phase(&run);
}

// ---- router's projection ----

typedef struct moe__router_run {
    moe__run *run;
    const float *table, *bias;
    float *out;
} moe__router_run;

// x of the router: norm, scale and multiplier, each product rounded.
static void moe__router_input_task(void *arg, int32_t index, int32_t worker)
{
    const moe__run *run = ((const moe__router_run *)arg)->run;
    const moe_router_desc *router = &run->plan->layer.router;
    const float *scale = moe__weights_table(run->weights, MOE_TENSOR_ROUTER_INPUT_SCALE);
    int32_t begin = index * MOE__TOKENS_PER_TASK, n = router->input_size, ld = run->plan->layout.router_ld;
    (void)worker;
    for (int32_t t = begin; t < moe__min32(run->tokens, begin + MOE__TOKENS_PER_TASK); t++) {
        float *x = run->x + (int64_t)t * ld, norm = 1;
        moe__widen_row(run->args.x, run->plan->desc.x_dtype, t * run->args.x_stride, n, x, ld);
        if (router->rms_norm) {
            float mean = moe__cpu_dot(moe__kernels_of(run->plan->ctx->isa), x, x, ld) / (float)n;
            norm = 1.0f / moe__sqrtf(mean + router->norm_epsilon);
        }
        for (int32_t i = 0; i < n; i++)
            x[i] = x[i] * norm * (scale == NULL ? 1 : scale[i]) * router->input_multiplier;
    }
}

static void moe__router_task(void *arg, int32_t index, int32_t worker)
{
    const moe__router_run *router = (const moe__router_run *)arg;
    const moe__run *run = router->run;
    const moe_plan *plan = run->plan;
    int32_t tiles = moe__tasks_of(run->tokens, MOE__TASK_ROWS), first = index % tiles * MOE__TASK_ROWS,
            ld = plan->layout.router_ld;
    int32_t col = index / tiles * MOE__TASK_COLS, cols = moe__min32(MOE__TASK_COLS, plan->width - col);
    int32_t rows = moe__min32(MOE__TASK_ROWS, run->tokens - first);
    float *sums = (float *)(void *)(run->memory + plan->workspace.scratch) + (size_t)worker * MOE__SCRATCH,
          *dots = sums + MOE__SUMS;
    const float *x[MOE__TASK_ROWS + MOE__WIDE_ROWS];
    for (int32_t r = 0; r < rows; r++) x[r] = run->x + (int64_t)(first + r) * ld;
    moe__cpu_dots(moe__kernels_of(plan->ctx->isa), MOE_DTYPE_F32, x, rows,
                  (const unsigned char *)(router->table + (int64_t)col * ld), (size_t)ld * sizeof(float), cols, ld,
                  sums, dots);
    for (int32_t r = 0; r < rows; r++)
        for (int32_t c = 0; c < cols; c++) {
            float dot = dots[r * MOE__TASK_COLS + c];
            router->out[(int64_t)(first + r) * plan->width + col + c] =
                router->bias == NULL ? dot : dot + router->bias[col + c];
        }
}

MOE_API int32_t moe_router_logits(const moe_plan *plan, const moe_weights *weights, const moe_execute_args *args,
                                  float *logits_out, void *stream)
{
    moe__run run;
    moe__router_run router;
    uint32_t faults[MOE_FAULTS] = { 0 };
    int32_t result;
    (void)stream;
    if ((result = moe__run_begin(&run, plan, weights, args, NULL)) != MOE_OK) return result;
    if ((weights->common_set >> MOE_TENSOR_ROUTER & 1u) == 0) return MOE_ERROR_STATE;
    if (run.tokens == 0) return MOE_OK;
    if ((result = moe__check_x(&run, plan->layer.router.input_size, NULL)) != MOE_OK) return result;
    if (logits_out == NULL) return MOE_ERROR_ARGUMENT;
#if !defined(MOE_NO_CUDA)
    if (plan->ctx->desc.backend == MOE_BACKEND_CUDA) return moe__stage_router(&run, logits_out, stream);
#endif
    result = moe__check_tokens(&run, faults, NULL);
    moe__run_report_faults(&run, faults);
    if (result != MOE_OK) return result;
    router.run = &run;
    router.table = moe__weights_table(weights, MOE_TENSOR_ROUTER);
    router.bias = moe__weights_table(weights, MOE_TENSOR_ROUTER_BIAS);
    router.out = logits_out;
    moe__work_run(plan->ctx, moe__tasks_of(run.tokens, MOE__TOKENS_PER_TASK), moe__router_input_task, &router);
    moe__work_run(plan->ctx, moe__tasks_of(run.tokens, MOE__TASK_ROWS) * moe__tasks_of(plan->width, MOE__TASK_COLS),
                  moe__router_task, &router);
    return MOE_OK;
}

// ---- permute and finalize ----

MOE_API int64_t moe_permutation_rows(int64_t slots, int32_t local_experts, int32_t tile)
{
    int64_t full;
    if (slots < 0 || slots > INT32_MAX || local_experts < 1 || tile < 1) return -1;
    full = slots < local_experts ? slots : local_experts;
    return (full + (slots - full) / tile) * tile;
}

// Fills the tables from counts per local expert; next [El] becomes the first row of each.
static void moe__permute_tables(const moe_permutation *p, const int32_t *counts, int32_t experts, int32_t *next)
{
    int32_t row = 0, tiles = 0;
    for (int32_t e = 0; e < experts; e++) {
        next[e] = row;
        if (p->expert_offsets != NULL) p->expert_offsets[e] = row;
        if (p->expert_counts != NULL) p->expert_counts[e] = counts[e];
        for (int32_t left = counts[e]; left > 0; left -= p->tile, tiles++, row += p->tile) {
            if (p->tile_expert != NULL) p->tile_expert[tiles] = e;
            if (p->tile_limit != NULL) p->tile_limit[tiles] = row + moe__min32(left, p->tile);
        }
    }
    if (p->expert_offsets != NULL) p->expert_offsets[experts] = row;
    if (p->num_tiles != NULL) p->num_tiles[0] = tiles;
}

// What moe_permute() checks: LOGITS is a call like any other; IDS and PACKED do without weights and workspace.
static int32_t moe__permute_begin(moe__run *run, moe_permutation *p, const moe_plan *plan, const moe_weights *weights,
                                  const moe_execute_args *args, const moe_permutation *out)
{
    int32_t result;
    int64_t rows_max;
    if (plan == NULL || args == NULL || out == NULL) return MOE_ERROR_ARGUMENT;
    if (args->input_mode == MOE_INPUT_LOGITS) {
        if ((result = moe__run_begin(run, plan, weights, args, NULL)) != MOE_OK) return result;
    } else {
        run->plan = plan;
        run->weights = NULL;
        if ((result = moe__copy_desc(&run->args, sizeof run->args, args, "args", NULL)) != MOE_OK ||
            (weights != NULL && (result = moe__check_weights(plan, weights, NULL)) != MOE_OK))
            return result;
        run->tokens = run->args.num_tokens;
        if (run->tokens < 0 || run->tokens > plan->desc.max_tokens) return MOE_ERROR_ARGUMENT;
        if (plan->ctx->desc.backend == MOE_BACKEND_CUDA && (result = moe__run_place(run, NULL)) != MOE_OK)
            return result;
    }
    if ((result = moe__copy_desc(p, sizeof *p, out, "out", NULL)) != MOE_OK) return result;
    rows_max = moe_permutation_rows((int64_t)run->tokens * plan->slots, plan->blocks, p->tile);
    if (rows_max < 0 || rows_max > INT32_MAX) return MOE_ERROR_ARGUMENT;
    if (run->tokens == 0 && run->args.input_mode >= MOE_INPUT_LOGITS && run->args.input_mode <= MOE_INPUT_PACKED)
        return MOE_OK; // no row is read
    if (run->args.input_mode == MOE_INPUT_IDS && run->args.weights == NULL) {
        run->args.out_weights = NULL;
        return run->args.ids == NULL ? MOE_ERROR_ARGUMENT : MOE_OK;
    }
    return moe__check_routing_input(run, NULL);
}

// Ids of one token: routed before, or the caller's.
static int32_t moe__permute_ids(const moe__run *run, int32_t token, int32_t *ids, uint32_t *faults)
{
    if (run->args.input_mode != MOE_INPUT_LOGITS) return moe__check_ids(run, token, ids, faults, NULL);
    memcpy(ids, run->ids + (int64_t)token * run->plan->slots, (size_t)run->plan->slots * sizeof ids[0]);
    return MOE_OK;
}

// Slots per local expert into counts, and per routed expert where the caller asks; MOE_ERROR_DATA for the caller's ids.
static int32_t moe__permute_count(moe__run *run, int32_t *counts)
{
    const moe_plan *plan = run->plan;
    uint32_t faults[MOE_FAULTS] = { 0 };
    int32_t ids[MOE_MAX_SLOTS], result = MOE_OK, bad;
    if (run->args.input_mode != MOE_INPUT_LOGITS) result = moe__check_tokens(run, faults, NULL);
    for (int32_t t = 0; t < run->tokens && faults[MOE_FAULT_COUNTS] == 0; t++) {
        if ((bad = moe__permute_ids(run, t, ids, faults)) != MOE_OK) result = bad;
        for (int32_t j = 0; j < plan->slots && result == MOE_OK; j++) {
            int32_t local = moe__layer_local(&plan->layer, ids[j]);
            if (local >= 0) counts[local]++;
        }
    }
    if (run->args.input_mode != MOE_INPUT_LOGITS) moe__run_report_faults(run, faults);
    return result;
}

// What routing would give, from the caller's ids and weights.
static void moe__permute_outputs(const moe__run *run)
{
    const moe_execute_args *args = &run->args;
    int32_t experts = run->plan->layer.num_experts, slots = run->plan->slots, ids[MOE_MAX_SLOTS];
    float weights[MOE_MAX_SLOTS];
    uint32_t faults[MOE_FAULTS] = { 0 };
    if (args->out_expert_counts != NULL) memset(args->out_expert_counts, 0, (size_t)experts * sizeof(int32_t));
    for (int32_t t = 0; t < run->tokens; t++) {
        int64_t at = (int64_t)t * slots;
        if (args->out_weights != NULL) {
            moe__run_token(run, t, 0, ids, weights, faults, NULL);
            memcpy(args->out_weights + at, weights, (size_t)slots * sizeof weights[0]);
        }
        moe__check_ids(run, t, ids, faults, NULL);
        if (args->out_ids != NULL) memcpy(args->out_ids + at, ids, (size_t)slots * sizeof ids[0]);
        for (int32_t j = 0; j < slots && args->out_expert_counts != NULL; j++)
            if (ids[j] >= 0 && ids[j] < experts) args->out_expert_counts[ids[j]]++;
    }
}

static int32_t moe__permute_cpu(moe__run *run, const moe_permutation *p)
{
    const moe_plan *plan = run->plan;
    int32_t counts[MOE_MAX_EXPERTS + MOE_MAX_EXTRA_SLOTS] = { 0 }, next[MOE_MAX_EXPERTS + MOE_MAX_EXTRA_SLOTS];
    int32_t ids[MOE_MAX_SLOTS], result = MOE_OK;
    int64_t rows_max = moe_permutation_rows((int64_t)run->tokens * plan->slots, plan->blocks, p->tile);
    uint32_t faults[MOE_FAULTS] = { 0 };
    if (run->args.input_mode == MOE_INPUT_LOGITS) result = moe__run_route_phase(run);
    if (result != MOE_OK || (result = moe__permute_count(run, counts)) != MOE_OK) return result;
    if (run->args.input_mode != MOE_INPUT_LOGITS) moe__permute_outputs(run);
    moe__permute_tables(p, counts, plan->blocks, next);
    for (int64_t r = 0; r < rows_max && p->slot_of_row != NULL; r++) p->slot_of_row[r] = -1;
    for (int32_t t = 0; t < run->tokens; t++) {
        moe__permute_ids(run, t, ids, faults);
        for (int32_t j = 0; j < plan->slots; j++) {
            int32_t local = moe__layer_local(&plan->layer, ids[j]), slot = t * plan->slots + j;
            if (local >= 0 && p->slot_of_row != NULL) p->slot_of_row[next[local]] = slot;
            if (p->row_of_slot != NULL) p->row_of_slot[slot] = local < 0 ? -1 : next[local];
            if (local >= 0) next[local]++;
        }
    }
    return MOE_OK;
}

MOE_API int32_t moe_permute(const moe_plan *plan, const moe_weights *weights, const moe_execute_args *args,
                            const moe_permutation *out, void *stream)
{
    moe__run run;
    moe_permutation p;
    int32_t result = moe__permute_begin(&run, &p, plan, weights, args, out);
    (void)stream;
    if (result != MOE_OK) return result;
#if !defined(MOE_NO_CUDA)
    if (plan->ctx->desc.backend == MOE_BACKEND_CUDA)
        return (result = moe__stage_permute_check(&p)) != MOE_OK ? result : moe__stage_route(&run, &p, stream);
#endif
    run.args.x = NULL; // not widened
    return moe__permute_cpu(&run, &p);
}

MOE_API int32_t moe_finalize(const moe_plan *plan, const moe_weights *weights, const moe_execute_args *args,
                             const void *rows, int32_t rows_dtype, const int32_t *row_of_slot, void *stream)
{
    moe__run run;
    moe__finalize f;
    int32_t result, hidden;
    (void)stream;
    if ((result = moe__run_begin(&run, plan, weights, args, NULL)) != MOE_OK) return result;
    hidden = plan->layer.hidden_size;
    if (run.args.input_mode != MOE_INPUT_IDS && run.args.input_mode != MOE_INPUT_PACKED) return MOE_ERROR_ARGUMENT;
    if ((run.args.flags & MOE_EXECUTE_ROWS_OUT) != 0 || !moe__is_float_dtype(rows_dtype)) return MOE_ERROR_ARGUMENT;
    if (plan->ctx->desc.backend == MOE_BACKEND_CUDA) return MOE_ERROR_UNSUPPORTED;
    if (run.tokens == 0) return MOE_OK;
    if (rows == NULL || row_of_slot == NULL) return MOE_ERROR_ARGUMENT;
    if ((result = moe__check_routing_input(&run, NULL)) != MOE_OK ||
        (result = moe__check_matrix(run.args.out, &run.args.out_stride, hidden, "args.out", "args.out_stride", NULL)) !=
            MOE_OK)
        return result;
    if (plan->layer.routing.special_kind != MOE_SPECIAL_IDENTITY) run.args.x = NULL;
    else if ((result = moe__check_x(&run, hidden, NULL)) != MOE_OK) return result;
    if ((result = moe__run_route_phase(&run)) != MOE_OK || run.tokens == 0) return result;
    moe__run_finalize(&run, &f);
    f.row_of_slot = row_of_slot;
    f.rows = rows;
    f.rows_dtype = rows_dtype;
    f.rows_ld = hidden;
    f.columns = hidden;
    moe__work_run(plan->ctx, moe__tasks_of(run.tokens, f.tokens_per_task), moe__finalize_task, &f);
    return MOE_OK;
}

// >>ahead  compiling without a device  The same instances as plans choose, for chips that need not be here: into the
// cache folder, or into a C file.
#if !defined(MOE_NO_CUDA) && !defined(MOE_NO_FILES)

// Kernels of a job, each once.
typedef struct moe__ahead {
    moe_context *ctx; // of the CPU: threads, allocator, log; no driver
    moe_precompile_desc desc;
    moe__instance *instances;
    moe__build *builds;
    int32_t count, capacity;
} moe__ahead;

static int32_t moe__ahead_check(const moe_precompile_desc *desc, moe_error *err)
{
    if (desc->num_chips < 1 || desc->chips == NULL)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "desc.chips", "has no chip: name one at least, as \"sm_90a\"");
    if (desc->num_layers < 1 || desc->layers == NULL)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "desc.layers", "has no layer: give one at least");
    if (desc->num_chips > 64 || desc->num_layers > 4096)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "desc.num_layers", "is %d for %d chips: it must be 1..4096 for 1..64",
                         desc->num_layers, desc->num_chips);
    return MOE_OK;
}

// Compute capability of a chip in the list. PTX is for files only.
static int32_t moe__ahead_chip(const char *chip, int32_t files_only, int32_t *arch, moe_error *err)
{
    int32_t ptx = 0;
    *arch = chip != NULL ? moe__chip_arch(chip, &ptx) : 0;
    if (*arch != 0 && (!ptx || (files_only && (*arch == 80 || *arch == 90)))) return MOE_OK;
    return moe__fail(err, MOE_ERROR_ARGUMENT, "desc.chips", "has %q: it must be sm_80, sm_86, sm_89, sm_90a, sm_100f, "
                     "sm_120f or the like%s", chip != NULL ? chip : "NULL",
                     files_only ? ", or compute_80 or compute_90 for PTX" : "");
}

static void moe__ahead_add(moe__ahead *ahead, const moe__instance *instance, const char *chip)
{
    moe__build *build = &ahead->builds[ahead->count];
    ahead->instances[ahead->count] = *instance;
    moe__build_init(build, &ahead->instances[ahead->count], chip);
    for (int32_t i = 0; i < ahead->count; i++)
        if (memcmp(ahead->builds[i].key, build->key, 32) == 0) return;
    ahead->count++;
}

static int32_t moe__ahead_layer(moe__ahead *ahead, const moe_layer_desc *given, const char *chip, int32_t arch,
                                moe_error *err)
{
    moe_layer_desc layer;
    moe_plan_desc plan;
    moe__instance instances[MOE__KERNELS];
    int32_t result;
    if ((result = moe__copy_desc(&layer, sizeof layer, given, "layer", err)) != MOE_OK ||
        (result = moe__copy_desc(&plan, sizeof plan, ahead->desc.plan, "desc.plan", err)) != MOE_OK ||
        (result = moe__layer_resolve(&layer, err)) != MOE_OK ||
        (result = moe__plan_desc_resolve(&plan, MOE_DTYPE_BF16, layer.routing.top_k + layer.routing.extra_slots,
                                         err)) != MOE_OK)
        return result;
    moe__instances_select(&layer, &plan, arch, instances);
    for (int32_t i = 0; i < MOE__KERNELS; i++)
        if (instances[i].entry != NULL) moe__ahead_add(ahead, &instances[i], chip);
    return MOE_OK;
}

static void moe__ahead_end(moe__ahead *ahead)
{
    moe_context *ctx = ahead->ctx;
    if (ctx == NULL) return;
    for (int32_t i = 0; i < ahead->count; i++) moe__build_drop(ctx, &ahead->builds[i]);
    moe__free(&ctx->desc.allocator, ahead->builds, (uint64_t)ahead->capacity * sizeof ahead->builds[0]);
    moe__free(&ctx->desc.allocator, ahead->instances, (uint64_t)ahead->capacity * sizeof ahead->instances[0]);
    moe_context_destroy(ctx);
}

// A context without a device, and the list of kernels. moe__ahead_end() undoes it, also after a failure.
static int32_t moe__ahead_begin(moe__ahead *ahead, const moe_precompile_desc *desc, int32_t files_only, moe_error *err)
{
    moe_context_desc context;
    int32_t result, arch;
    memset(ahead, 0, sizeof *ahead);
    memset(&context, 0, sizeof context);
    if ((result = moe__copy_desc(&ahead->desc, sizeof ahead->desc, desc, "desc", err)) != MOE_OK ||
        (result = moe__ahead_check(&ahead->desc, err)) != MOE_OK)
        return result;
    context.backend = MOE_BACKEND_CPU;
    context.allocator = ahead->desc.allocator;
    context.threads = ahead->desc.threads;
    if ((result = moe_context_create(&context, &ahead->ctx, err)) != MOE_OK) return result;
    ahead->ctx->desc.log = ahead->desc.log; // from here on: nobody asked for a back end
    ahead->ctx->desc.log_user = ahead->desc.log_user;
    if ((result = moe__jit_open(ahead->ctx, &ahead->desc.jit, err)) != MOE_OK)
        return result;
    ahead->capacity = ahead->desc.num_chips * ahead->desc.num_layers * MOE__KERNELS + 1;
    ahead->instances = (moe__instance *)moe__alloc(&ahead->ctx->desc.allocator,
                                                   (uint64_t)ahead->capacity * sizeof ahead->instances[0]);
    ahead->builds = (moe__build *)moe__alloc(&ahead->ctx->desc.allocator,
                                             (uint64_t)ahead->capacity * sizeof ahead->builds[0]);
    if (ahead->instances == NULL || ahead->builds == NULL)
        return moe__fail_memory(err, (uint64_t)ahead->capacity * sizeof ahead->builds[0]);
    for (int32_t c = 0; c < ahead->desc.num_chips; c++) {
        if ((result = moe__ahead_chip(ahead->desc.chips[c], files_only, &arch, err)) != MOE_OK) return result;
        for (int32_t l = 0; l < ahead->desc.num_layers; l++)
            if ((result = moe__ahead_layer(ahead, &ahead->desc.layers[l], ahead->desc.chips[c], arch, err)) != MOE_OK)
                return result;
    }
    return MOE_OK;
}

static void moe__ahead_tell(const moe__ahead *ahead, int32_t done, const moe__build *build, int32_t cached)
{
    moe_jit_progress progress;
    if (ahead->desc.progress == NULL) return;
    memset(&progress, 0, sizeof progress);
    progress.done = done;
    progress.total = ahead->count;
    progress.cached = cached;
    progress.bytes = build->bytes;
    progress.name = build->instance->name;
    progress.chip = build->chip;
    ahead->desc.progress(ahead->desc.progress_user, &progress);
}

// Compiles what is not there yet, as many kernels at a time as there are threads and all of one chip. `keep`: images
// stay in memory; else they go to the cache folder.
static int32_t moe__ahead_run(moe__ahead *ahead, int32_t keep, moe_error *err)
{
    moe_context *ctx = ahead->ctx;
    moe__build *group[MOE__BUILDS_MAX];
    int32_t most = moe__min32(ctx->desc.threads, MOE__BUILDS_MAX), done = 0, result = MOE_OK;
    for (int32_t i = 0; i < ahead->count;) {
        int32_t size = 0;
        for (; i < ahead->count && size < most; i++) {
            moe__build *build = &ahead->builds[i];
            if (size > 0 && strcmp(group[0]->chip, build->chip) != 0) break;
            if ((result = moe__jit_read(ctx, build, MOE__PLACE_CACHE, err)) != MOE_OK) return result;
            if (build->image == NULL) {
                group[size++] = build;
                continue;
            }
            moe__ahead_tell(ahead, ++done, build, 1);
            if (!keep) moe__build_drop(ctx, build);
        }
        if (size > 0 && (result = moe__jit_compile(ctx, group, size, err)) != MOE_OK) return result;
        for (int32_t j = 0; j < size; j++) {
            if (!keep && !moe__cache_write(ctx, group[j]))
                return moe__fail(err, MOE_ERROR_FILE, "desc.jit.cache_dir", "is %q, which cannot be written or is not "
                                 "to be trusted: the log says why", ctx->jit->cache_dir);
            moe__ahead_tell(ahead, ++done, group[j], 0);
            if (!keep) moe__build_drop(ctx, group[j]);
        }
    }
    return MOE_OK;
}

MOE_API int32_t moe_jit_precompile(const moe_precompile_desc *desc, moe_error *err)
{
    moe__ahead ahead;
    int32_t result = moe__ahead_begin(&ahead, desc, 0, err);
    if (result == MOE_OK && (ahead.ctx->jit->cache_dir[0] == 0 || ahead.ctx->jit->cache_mode != MOE_CACHE_READ_WRITE))
        result = moe__fail(err, MOE_ERROR_ARGUMENT, "desc.jit.cache_dir", "is needed: no folder is given or found, or "
                           "desc.jit.cache_mode does not let it be written");
    if (result == MOE_OK) result = moe__ahead_run(&ahead, 0, err);
    moe__ahead_end(&ahead);
    return result == MOE_OK ? moe__ok(err) : result;
}

static void moe__export_image(moe__text *text, const char *name, int32_t index, const moe__build *build)
{
    moe__text_format(text, "\n// %s for %s\nstatic const unsigned char %s_%d[] = {", build->instance->name, build->chip,
                     name, index);
    for (uint64_t i = 0; i < build->bytes; i++)
        moe__text_format(text, "%s%d,", i % 28 == 0 ? "\n    " : "", (int32_t)build->image[i]);
    moe__text_string(text, "\n};\n");
}

static void moe__export_table(moe__text *text, const char *name, const moe__ahead *ahead)
{
    moe__text_format(text, "\nenum { %s_count = %d };\nstatic const moe_jit_image %s[] = {\n", name, ahead->count,
                     name);
    for (int32_t i = 0; i < ahead->count; i++) {
        moe__text_string(text, "    { \"");
        moe__text_hex(text, ahead->builds[i].key, 32);
        moe__text_format(text, "\", %s_%d, sizeof %s_%d },\n", name, i, name, i);
    }
    moe__text_string(text, "};\n");
}

static int32_t moe__export_write(const moe__ahead *ahead, const char *path, const char *name, moe_error *err)
{
    const moe_allocator *allocator = &ahead->ctx->desc.allocator;
    uint64_t capacity = 4096;
    moe__text text;
    moe__span span;
    char *data;
    int32_t result;
    for (int32_t i = 0; i < ahead->count; i++) capacity += ahead->builds[i].bytes * 5 + 1024;
    if ((data = (char *)moe__alloc(allocator, capacity)) == NULL) return moe__fail_memory(err, capacity);
    text = moe__text_make(data, (size_t)capacity);
    moe__text_format(&text, "// Kernels of moe.h, text %s, written by moe_jit_export(). Include it behind moe.h\n"
                     "// and set desc.jit.images to %s, num_images to %s_count.\n", moe__kernel_digest(), name, name);
    for (int32_t i = 0; i < ahead->count; i++) moe__export_image(&text, name, i, &ahead->builds[i]);
    moe__export_table(&text, name, ahead);
    span.data = data;
    span.size = text.length;
    result = moe__file_write_atomic(path, &span, 1, err);
    moe__free(allocator, data, capacity);
    return result;
}

MOE_API int32_t moe_jit_export(const moe_precompile_desc *desc, const char *path, const char *name, moe_error *err)
{
    moe__ahead ahead;
    int32_t result;
    const char *c = name;
    if (path == NULL) return moe__fail_null(err, "path");
    if (name == NULL) return moe__fail_null(err, "name");
    while ((*c >= 'a' && *c <= 'z') || (*c >= 'A' && *c <= 'Z') || *c == '_' || (c > name && *c >= '0' && *c <= '9'))
        c++;
    if (*c != 0 || c == name || c - name > 200)
        return moe__fail(err, MOE_ERROR_ARGUMENT, "name", "is %q: it must be a C identifier of at most 200 characters",
                         name);
    result = moe__ahead_begin(&ahead, desc, 1, err);
    if (result == MOE_OK) result = moe__ahead_run(&ahead, 1, err);
    if (result == MOE_OK) result = moe__export_write(&ahead, path, name, err);
    moe__ahead_end(&ahead);
    return result == MOE_OK ? moe__ok(err) : result;
}

// ---- trimming ----

#if !defined(_WIN32)
enum { MOE__TRIM_TEMP_AGE = 3600 }; // seconds after which a temporary file is a leftover

typedef struct moe__trim {
    char path[MOE__PATH_MAX]; // of the oldest entry seen in this round
    int64_t oldest;
    uint64_t bytes;           // of all entries
} moe__trim;

static int32_t moe__trim_ends(const char *name, const char *ending)
{
    size_t length = strlen(name), tail = strlen(ending);
    return length > tail && strcmp(name + length - tail, ending) == 0;
}

// Adds up one folder's entries and remembers the oldest; leftovers of killed writers are removed.
static void moe__trim_folder(moe__trim *trim, const char *folder)
{
    DIR *dir = opendir(folder);
    struct dirent *entry;
    struct stat info;
    char path[MOE__PATH_MAX];
    while (dir != NULL && (entry = readdir(dir)) != NULL) {
        if (moe__path_join(path, folder, entry->d_name, NULL) != MOE_OK || stat(path, &info) != 0 ||
            !S_ISREG(info.st_mode))
            continue;
        if (moe__trim_ends(entry->d_name, ".tmp") && info.st_mtime + MOE__TRIM_TEMP_AGE < time(NULL)) unlink(path);
        if (!moe__trim_ends(entry->d_name, ".bin")) continue;
        trim->bytes += (uint64_t)info.st_size;
        if (trim->path[0] != 0 && (int64_t)info.st_mtime >= trim->oldest) continue;
        trim->oldest = (int64_t)info.st_mtime;
        strcpy(trim->path, path);
    }
    if (dir != NULL) closedir(dir);
}

// All folders of this format: of this build and of others. Empty ones go.
static void moe__trim_look(moe__trim *trim, const char *format)
{
    DIR *dir = opendir(format);
    struct dirent *entry;
    char path[MOE__PATH_MAX];
    trim->bytes = 0;
    trim->path[0] = 0;
    while (dir != NULL && (entry = readdir(dir)) != NULL) {
        if (strlen(entry->d_name) != 16 || moe__path_join(path, format, entry->d_name, NULL) != MOE_OK) continue;
        moe__trim_folder(trim, path);
        rmdir(path); // only if nothing is in it
    }
    if (dir != NULL) closedir(dir);
}
#endif

MOE_API int32_t moe_cache_trim(const char *cache_dir, uint64_t max_bytes, moe_error *err)
{
#if defined(_WIN32)
    (void)cache_dir;
    (void)max_bytes;
    return moe__fail(err, MOE_ERROR_UNSUPPORTED, "", "moe_cache_trim() is not there on Windows: delete the folder");
#else
    moe__trim trim;
    char dir[MOE__PATH_MAX], format[MOE__PATH_MAX];
    const char *why;
    int32_t result;
    int fd;
    dir[0] = 0;
    if ((result = moe__jit_path(dir, cache_dir, "cache_dir", err)) != MOE_OK) return result;
    if (dir[0] == 0) moe__cache_default(dir);
    if (dir[0] == 0) return moe__fail(err, MOE_ERROR_ARGUMENT, "cache_dir", "is NULL, and there is no default folder");
    if ((fd = moe__folder_step(-1, dir, 0, &why)) < 0) {
        if (why == NULL && errno == ENOENT) return moe__ok(err);
        return moe__fail(err, MOE_ERROR_FILE, "cache_dir", "is %q, which %s", dir,
                         why != NULL ? why : "cannot be opened");
    }
    close(fd);
    if ((result = moe__path_join(format, dir, "v1", err)) != MOE_OK) return result;
    for (;;) {
        moe__trim_look(&trim, format);
        if (trim.bytes <= max_bytes || trim.path[0] == 0) return moe__ok(err);
        if (unlink(trim.path) != 0 && errno != ENOENT)
            return moe__fail_file(err, MOE_ERROR_FILE, trim.path, "cannot be removed", (int32_t)errno);
    }
#endif
}
#else

static int32_t moe__ahead_unsupported(moe_error *err)
{
    return moe__fail(err, MOE_ERROR_UNSUPPORTED, "", "this build leaves out CUDA or files (MOE_NO_CUDA, MOE_NO_FILES)");
}

MOE_API int32_t moe_jit_precompile(const moe_precompile_desc *desc, moe_error *err)
{
    (void)desc;
    return moe__ahead_unsupported(err);
}

MOE_API int32_t moe_jit_export(const moe_precompile_desc *desc, const char *path, const char *name, moe_error *err)
{
    (void)desc;
    (void)path;
    (void)name;
    return moe__ahead_unsupported(err);
}

MOE_API int32_t moe_cache_trim(const char *cache_dir, uint64_t max_bytes, moe_error *err)
{
    (void)cache_dir;
    (void)max_bytes;
    return moe__ahead_unsupported(err);
}
#endif

// >>reference  the layer behind the routing, plainly  One thread, one token and slot after the other, every weight
// through the caller's callback: no kernel, layout or table of >>cpu is used, only its statement of the order (see
// there) and moe__activate(). tests/test_layer.c holds both to the same bits.

typedef struct moe__reference {
    const moe_layer_desc *layer;
    const moe_reference_layer_args *args;
    int32_t mid_dtype;
    float *weight;      // [wide] a matrix row or a vector
    float *x;           // [H] what the expert sees
    float *gate, *up;   // [wide] products, then the intermediate in gate
    float *row, *total; // [H]
} moe__reference;

// 16 lanes; as if both were padded to 32 with zeros.
static float moe__reference_dot(const float *a, const float *b, int32_t n)
{
    float lane[16];
    for (int32_t l = 0; l < 16; l++) lane[l] = 0;
    for (int32_t k = 0; k < (n + 31) / 32 * 32; k++)
        lane[k % 16] = moe__fmaf(k < n ? a[k] : 0, k < n ? b[k] : 0, lane[k % 16]);
    for (int32_t half = 8; half > 0; half /= 2)
        for (int32_t l = 0; l < half; l++) lane[l] = lane[l] + lane[l + half];
    return lane[0];
}

// Into ref->weight; 0 is success.
static int32_t moe__reference_read(const moe__reference *ref, int32_t role, int32_t expert, int32_t row)
{
    return ref->args->rows(ref->args->rows_user, role, expert, row, ref->weight);
}

// out [rows] = matrix times x [n], + bias where the callback has one (0: the layer has none).
static int32_t moe__reference_product(const moe__reference *ref, int32_t role, int32_t bias_role, int32_t expert,
                                      int32_t rows, const float *x, int32_t n, float *out, moe_error *err)
{
    for (int32_t r = 0; r < rows; r++) {
        int32_t code = moe__reference_read(ref, role, expert, r);
        if (code != 0)
            return moe__fail(err, MOE_ERROR_DATA, "args.rows", "returned %d for row %d of %s of expert %d", code, r,
                             moe_role_string(role), expert);
        out[r] = moe__reference_dot(ref->weight, x, n);
    }
    if (bias_role != 0 && moe__reference_read(ref, bias_role, expert, 0) == 0)
        for (int32_t r = 0; r < rows; r++) out[r] = out[r] + ref->weight[r];
    return MOE_OK;
}

static int32_t moe__reference_table(const moe__reference *ref, int32_t role, int32_t index, float *value,
                                    moe_error *err)
{
    int32_t code = moe__reference_read(ref, role, -1, 0);
    if (code != 0)
        return moe__fail(err, MOE_ERROR_DATA, "args.rows", "returned %d for %s", code, moe_role_string(role));
    *value = ref->weight[index];
    return MOE_OK;
}

// ref->row = GEMM 2 of the activation of GEMM 1 of ref->x, for one expert; -1: the shared experts.
static int32_t moe__reference_expert(moe__reference *ref, int32_t expert, moe_error *err)
{
    const moe_layer_desc *layer = ref->layer;
    moe_activation_desc act = expert < 0 ? layer->shared.activation : layer->activation;
    int32_t size = expert < 0 ? layer->shared.count * layer->shared.intermediate_size : layer->intermediate_size;
    int32_t bias1 = layer->gemm1_bias && expert >= 0,
            bias2 = layer->gemm2_bias && expert >= 0 && layer->parallel.tp_rank == 0;
    int32_t gated = moe__layer_is_gated(layer), first, n, result;
    moe__parallel_slice(&layer->parallel, size, moe__format_group(layer), &first, &n);
    if (act.per_expert && expert < layer->num_experts &&
        ((result = moe__reference_table(ref, MOE_TENSOR_ALPHA, expert, &act.alpha, err)) != MOE_OK ||
         (result = moe__reference_table(ref, MOE_TENSOR_BETA, expert, &act.beta, err)) != MOE_OK ||
         (result = moe__reference_table(ref, MOE_TENSOR_LIMIT, expert, &act.limit, err)) != MOE_OK))
        return result;
    result =
        moe__reference_product(ref, expert < 0 ? MOE_TENSOR_SHARED_UP : MOE_TENSOR_UP, bias1 ? MOE_TENSOR_UP_BIAS : 0,
                               expert, n, ref->x, layer->hidden_size, gated ? ref->up : ref->gate, err);
    if (result == MOE_OK && gated)
        result = moe__reference_product(ref, expert < 0 ? MOE_TENSOR_SHARED_GATE : MOE_TENSOR_GATE,
                                        bias1 ? MOE_TENSOR_GATE_BIAS : 0, expert, n, ref->x, layer->hidden_size,
                                        ref->gate, err);
    if (result != MOE_OK) return result;
    for (int32_t i = 0; i < n; i++)
        ref->gate[i] = moe__round_to(moe__activate(&act, ref->gate[i], gated ? ref->up[i] : 0), ref->mid_dtype);
    return moe__reference_product(ref, expert < 0 ? MOE_TENSOR_SHARED_DOWN : MOE_TENSOR_DOWN,
                                  bias2 ? MOE_TENSOR_DOWN_BIAS : 0, expert, layer->hidden_size, ref->gate, n, ref->row,
                                  err);
}

static int32_t moe__reference_norm(moe__reference *ref, moe_error *err)
{
    int32_t n = ref->layer->hidden_size, code = moe__reference_read(ref, MOE_TENSOR_ROW_NORM, -1, 0);
    float scale;
    if (code != 0) return moe__fail(err, MOE_ERROR_DATA, "args.rows", "returned %d for row norm", code);
    for (int32_t i = 0; i < n; i++) ref->row[i] = moe__mulf(ref->row[i], 1.0f + ref->weight[i]);
    scale = 1.0f / moe__sqrtf(moe__reference_dot(ref->row, ref->row, n) / (float)n + ref->layer->row_norm_epsilon);
    for (int32_t i = 0; i < n; i++) ref->row[i] = ref->row[i] * scale;
    return MOE_OK;
}

static void moe__reference_add(moe__reference *ref, float weight, const float *row)
{
    for (int32_t i = 0; i < ref->layer->hidden_size; i++)
        ref->total[i] = moe__fmaf(weight, moe__round_to(row[i], ref->args->rows_dtype), ref->total[i]);
}

// Adds what one slot brings to ref->total.
static int32_t moe__reference_slot(moe__reference *ref, const float *x, int32_t id, float weight, moe_error *err)
{
    const moe_layer_desc *layer = ref->layer;
    int32_t special = id - layer->num_experts, n = layer->hidden_size, result;
    int32_t on_input = layer->routing.weight_on == MOE_WEIGHT_ON_INPUT, kind = layer->routing.special_kind;
    if (special >= 0 && special < layer->routing.special_experts) {
        if (layer->parallel.omit_common || layer->parallel.tp_rank != 0) return MOE_OK;
        if (kind != MOE_SPECIAL_IDENTITY && kind != MOE_SPECIAL_CONSTANT) return MOE_OK;
        if (kind == MOE_SPECIAL_CONSTANT && moe__reference_read(ref, MOE_TENSOR_CONSTANT, id, 0) != 0)
            return moe__fail(err, MOE_ERROR_DATA, "args.rows", "has no constant of expert %d", id);
        for (int32_t i = 0; i < n; i++)
            ref->total[i] = moe__fmaf(weight, kind == MOE_SPECIAL_CONSTANT ? ref->weight[i] : x[i], ref->total[i]);
        return MOE_OK;
    }
    if (moe__layer_local(layer, id) < 0) return MOE_OK;
    if (id < layer->num_experts && moe__reference_read(ref, MOE_TENSOR_CONSTANT, id, 0) == 0) { // pruned
        for (int32_t i = 0; i < n; i++) ref->row[i] = layer->parallel.tp_rank == 0 ? ref->weight[i] : 0;
    } else {
        for (int32_t i = 0; i < n; i++) ref->x[i] = on_input ? x[i] * weight : x[i];
        if ((result = moe__reference_expert(ref, id, err)) != MOE_OK) return result;
        if (layer->row_norm && (result = moe__reference_norm(ref, err)) != MOE_OK) return result;
    }
    moe__reference_add(ref, on_input ? 1 : weight, ref->row);
    return MOE_OK;
}

static int32_t moe__reference_shared(moe__reference *ref, const float *x, int32_t token, moe_error *err)
{
    float factor = ref->layer->shared.scale;
    int32_t n = ref->layer->hidden_size, result;
    if (ref->args->shared_gate != NULL) {
        factor = moe__mulf(factor, ref->args->shared_gate[token]);
    } else if (ref->layer->shared.gate) {
        int32_t code = moe__reference_read(ref, MOE_TENSOR_SHARED_TOKEN_GATE, -1, 0);
        if (code != 0) return moe__fail(err, MOE_ERROR_DATA, "args.rows", "returned %d for shared token gate", code);
        factor = moe__mulf(factor, moe__sigmoidf(moe__reference_dot(x, ref->weight, n)));
    }
    memcpy(ref->x, x, (size_t)n * sizeof x[0]);
    if ((result = moe__reference_expert(ref, -1, err)) != MOE_OK) return result;
    moe__reference_add(ref, factor, ref->row);
    return MOE_OK;
}

static int32_t moe__reference_token(moe__reference *ref, int32_t token, moe_error *err)
{
    const moe_layer_desc *layer = ref->layer;
    const moe_reference_layer_args *args = ref->args;
    int32_t slots = layer->routing.top_k + layer->routing.extra_slots, n = layer->hidden_size, result;
    int32_t ids_end = layer->num_experts + layer->routing.special_experts + layer->routing.extra_slots;
    const float *x = args->x + (int64_t)token * n;
    float scale = 1;
    for (int32_t i = 0; i < n; i++) ref->total[i] = 0;
    for (int32_t j = 0; j < slots; j++) {
        int32_t id = args->ids[(int64_t)token * slots + j];
        if (id < -1 || id >= ids_end)
            return moe__fail(err, MOE_ERROR_DATA, "args.ids", "[%d][%d] is %d: ids are 0..%d, or -1", token, j, id,
                             ids_end - 1);
        if (id < 0) continue;
        if ((result = moe__reference_slot(ref, x, id, args->weights[(int64_t)token * slots + j], err)) != MOE_OK)
            return result;
    }
    if (layer->routing.scale_on == MOE_SCALE_ON_OUTPUT) {
        float global = 1;
        if (layer->routing.global_scale &&
            (result = moe__reference_table(ref, MOE_TENSOR_ROUTER_GLOBAL_SCALE, 0, &global, err)) != MOE_OK)
            return result;
        scale = layer->routing.scale * global;
    }
    for (int32_t i = 0; i < n; i++) ref->total[i] = moe__mulf(ref->total[i], scale);
    if (layer->shared.count > 0 && !layer->parallel.omit_common &&
        (result = moe__reference_shared(ref, x, token, err)) != MOE_OK)
        return result;
    for (int32_t i = 0; i < n; i++) args->out[(int64_t)token * n + i] = moe__mulf(ref->total[i], layer->output_scale);
    return MOE_OK;
}

static int32_t moe__reference_check(const moe_reference_layer_args *args, moe_error *err)
{
    if (args->num_tokens < 0) return moe__fail_range(err, "args.num_tokens", args->num_tokens, 0, INT32_MAX);
    if (args->rows == NULL) return moe__fail_null(err, "args.rows");
    if (args->num_tokens > 0 && args->x == NULL) return moe__fail_null(err, "args.x");
    if (args->num_tokens > 0 && args->ids == NULL) return moe__fail_null(err, "args.ids");
    if (args->num_tokens > 0 && args->weights == NULL) return moe__fail_null(err, "args.weights");
    if (args->num_tokens > 0 && args->out == NULL) return moe__fail_null(err, "args.out");
    if (args->intermediate_dtype != 0 && !moe__is_float_dtype(args->intermediate_dtype))
        return moe__fail(err, MOE_ERROR_ARGUMENT, "args.intermediate_dtype", "is %d: it must be 0, F32, BF16 or F16",
                         args->intermediate_dtype);
    if (args->rows_dtype != 0 && !moe__is_float_dtype(args->rows_dtype))
        return moe__fail(err, MOE_ERROR_ARGUMENT, "args.rows_dtype", "is %d: it must be 0, F32, BF16 or F16",
                         args->rows_dtype);
    return MOE_OK;
}

MOE_API int32_t moe_reference_layer(const moe_layer_desc *layer, const moe_reference_layer_args *args, moe_error *err)
{
    moe_layer_desc resolved;
    moe_reference_layer_args copy;
    moe__reference ref;
    uint64_t wide, floats;
    int32_t result;
    if (layer == NULL) return moe__fail_null(err, "layer");
    if (args == NULL) return moe__fail_null(err, "args");
    if ((result = moe__copy_desc(&resolved, sizeof resolved, layer, "layer", err)) != MOE_OK ||
        (result = moe__copy_desc(&copy, sizeof copy, args, "args", err)) != MOE_OK ||
        (result = moe__layer_resolve(&resolved, err)) != MOE_OK ||
        (result = moe__reference_check(&copy, err)) != MOE_OK)
        return result;
    ref.layer = &resolved;
    ref.args = &copy;
    ref.mid_dtype = copy.intermediate_dtype != 0 ? copy.intermediate_dtype : moe__format_dtype(resolved.format);
    if (ref.mid_dtype == MOE_DTYPE_UNSET)
        return moe__fail(err, MOE_ERROR_UNSUPPORTED, "layer.format",
                         "is %s: this version of moe.h executes f32, bf16 and f16", moe_format_string(resolved.format));
    wide = (uint64_t)moe__max32(moe__max32(resolved.hidden_size, resolved.intermediate_size),
                                moe__max32(resolved.shared.count * resolved.shared.intermediate_size,
                                           resolved.num_experts));
    floats = 3 * wide + 3 * (uint64_t)resolved.hidden_size;
    ref.weight = (float *)MOE_MALLOC((size_t)floats * sizeof(float));
    if (ref.weight == NULL) return moe__fail_memory(err, floats * sizeof(float));
    ref.gate = ref.weight + wide;
    ref.up = ref.gate + wide;
    ref.x = ref.up + wide;
    ref.row = ref.x + resolved.hidden_size;
    ref.total = ref.row + resolved.hidden_size;
    for (int32_t t = 0; t < copy.num_tokens && result == MOE_OK; t++) result = moe__reference_token(&ref, t, err);
    MOE_FREE(ref.weight);
    return result == MOE_OK ? moe__ok(err) : result;
}

// >>kernels-begin  moe_kernels.cu.inc in pieces; written by `make embed`
#if !defined(MOE_NO_CUDA)
static const char *const moe__kernel_text[] = {
"// -*- c++ -*-\n"
"// >>how  moe_kernels.cu.inc - the device code of moe.h. CUDA C++17 that includes nothing; NVRTC, nvcc, clang and g++\n"
"// accept it. `make embed` copies it into moe.h. A program is this whole text with one MOE_K_... (which entry) and its\n"
"// MOE_P_... (parameters) defined.\n"
"\n"
"// >>types  fixed-width integers, small vectors\n"
"\n"
"typedef unsigned char u8;\n"
"typedef unsigned short u16;\n"
"typedef unsigned int u32;\n"
"typedef unsigned long long u64;\n"
"typedef signed char i8;\n"
"typedef short i16;\n"
"typedef int i32;\n"
"typedef long long i64;\n"
"typedef float f32;\n"
"\n"
"// 8- and 16-byte accesses: one instruction each.\n"
"struct alignas(8) u32x2 { u32 x, y; };\n"
"struct alignas(16) u32x4 { u32 x, y, z, w; };\n"
"struct alignas(8) f32x2 { f32 x, y; };\n"
"struct alignas(16) f32x4 { f32 x, y, z, w; };\n"
"struct alignas(64) tensor_map { u8 opaque[128]; }; // cuTensorMapEncodeTiled() fills it\n"
"\n"
"// >>ptx  one instruction each  Named after it; a note where the name does not say all. Pointers are generic, into\n"
"// shared memory where the instruction wants that; u32 addresses come from mapa(). Without the instruction on the chip a\n"
"// wrapper traps. tests/emu/device.h has the same names over the emulated device: the only other definition there is.\n"
"#ifndef MOE_EMU\n"
"\n"
"#define DI __device__ __forceinline__\n"
"#define ballot warp_ballot // a header that nvcc includes by itself has another function of this name\n"
"#if defined(__CUDA_ARCH__)\n"
"#define MOE_ARCH (__CUDA_ARCH__ / 10)\n"
"#else\n"
"#define MOE_ARCH 90 // an editor's or a host compiler's pass\n"
"#endif\n"
"#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)\n"
"#define MOE_ARCH_A 1\n"
"#else\n"
"#define MOE_ARCH_A 0\n"
"#endif\n"
"\n"
"#define MOE_ENTRY(name, args_type, threads, min_ctas) \\\n"
"    extern \"C\" __global__ void __launch_bounds__(threads, min_ctas) name(const __grid_constant__ args_type a)\n"
"\n"
"extern __shared__ __align__(1024) u8 moe_smem[];\n"
"\n"
"DI void trap() { asm volatile(\"trap;\"); }\n"
"\n"
"// ---- threads, synchronisation, warps ----\n"
"\n"
"DI u32 tid() { return threadIdx.x; }\n"
"DI u32 ntid() { return blockDim.x; }\n"
"DI u32 cta() { return blockIdx.x; }\n"
"DI u32 cta_y() { return blockIdx.y; }\n"
"DI u32 ncta() { return gridDim.x; }\n"
"DI u32 lane() { return threadIdx.x & 31; }\n"
"DI u32 warp() { return threadIdx.x >> 5; }\n"
"DI u8 *smem() { return moe_smem; }\n"
"DI u32 saddr(const void *p) { return (u32)__cvta_generic_to_shared(p); }\n"
"DI u32 dyn_smem_bytes()\n"
"{\n"
"    u32 bytes;\n"
"    asm(\"mov.u32 %0, %%dynamic_smem_size;\" : \"=r\"(bytes));\n"
"    return bytes;\n"
"}\n"
"\n"
"DI void cta_sync() { asm volatile(\"bar.sync 0;\" ::: \"memory\"); }\n"
"DI void bar_sync(u32 id, u32 threads) { asm volatile(\"bar.sync %0, %1;\" ::\"r\"(id), \"r\"(threads) : \"memory\"); }\n"
"DI void bar_arrive(u32 id, u32 threads) { asm volatile(\"bar.arrive %0, %1;\" ::\"r\"(id), \"r\"(threads) : \"memory\"); }\n"
"DI void warp_sync() { asm volatile(\"bar.warp.sync 0xffffffff;\" ::: \"memory\"); }\n"
"\n"
"DI u32 bits(f32 v) { return __float_as_uint(v); }\n"
"DI f32 from_bits(u32 v) { return __uint_as_float(v); }\n"
"DI u32 shfl(u32 v, u32 lane) { return __shfl_sync(~0u, v, lane); }\n"
"DI u32 shfl_xor(u32 v, u32 m) { return __shfl_xor_sync(~0u, v, m); }\n"
"DI u32 shfl_up(u32 v, u32 d) { return __shfl_up_sync(~0u, v, d); }\n"
"DI u32 shfl_down(u32 v, u32 d) { return __shfl_down_sync(~0u, v, d); }\n"
"DI f32 shfl(f32 v, u32 lane) { return from_bits(shfl(bits(v), lane)); }\n"
"DI f32 shfl_xor(f32 v, u32 m) { return from_bits(shfl_xor(bits(v), m)); }\n"
"DI f32 shfl_up(f32 v, u32 d) { return from_bits(shfl_up(bits(v), d)); }\n"
"DI f32 shfl_down(f32 v, u32 d) { return from_bits(shfl_down(bits(v), d)); }\n"
"DI u32 ballot(bool v) { return __ballot_sync(~0u, v); }\n"
"DI u32 match_any(u32 v) { return __match_any_sync(~0u, v); }\n"
"DI u32 redux_max(u32 v) { return __reduce_max_sync(~0u, v); }\n"
"DI u32 redux_min(u32 v) { return __reduce_min_sync(~0u, v); }\n"
"DI u32 redux_add(u32 v) { return __reduce_add_sync(~0u, v); }\n"
"DI u32 redux_or(u32 v) { return __reduce_or_sync(~0u, v); }\n"
"\n"
"// ---- atomics, memory ---- scope gpu\n"
"\n"
"DI u32 atom_add(u32 *p, u32 v)\n"
"{\n"
"    u32 old;\n",
"    asm volatile(\"atom.relaxed.gpu.add.u32 %0, [%1], %2;\" : \"=r\"(old) : \"l\"(p), \"r\"(v) : \"memory\");\n"
"    return old;\n"
"}\n"
"DI void red_add(u32 *p, u32 v) { asm volatile(\"red.relaxed.gpu.add.u32 [%0], %1;\" ::\"l\"(p), \"r\"(v) : \"memory\"); }\n"
"DI void red_add_shared(u32 *p, u32 v) // no generic address: that would be an atomic on any memory\n"
"{\n"
"    asm volatile(\"red.relaxed.cta.shared.add.u32 [%0], %1;\" ::\"r\"(saddr(p)), \"r\"(v) : \"memory\");\n"
"}\n"
"DI u32 atom_add_acq_rel(u32 *p, u32 v)\n"
"{\n"
"    u32 old;\n"
"    asm volatile(\"atom.acq_rel.gpu.add.u32 %0, [%1], %2;\" : \"=r\"(old) : \"l\"(p), \"r\"(v) : \"memory\");\n"
"    return old;\n"
"}\n"
"DI u32 atom_max(u32 *p, u32 v)\n"
"{\n"
"    u32 old;\n"
"    asm volatile(\"atom.relaxed.gpu.max.u32 %0, [%1], %2;\" : \"=r\"(old) : \"l\"(p), \"r\"(v) : \"memory\");\n"
"    return old;\n"
"}\n"
"DI u32 ld_acquire(const u32 *p)\n"
"{\n"
"    u32 v;\n"
"    asm volatile(\"ld.acquire.gpu.u32 %0, [%1];\" : \"=r\"(v) : \"l\"(p) : \"memory\");\n"
"    return v;\n"
"}\n"
"DI u32 ld_relaxed(const u32 *p)\n"
"{\n"
"    u32 v;\n"
"    asm volatile(\"ld.relaxed.gpu.u32 %0, [%1];\" : \"=r\"(v) : \"l\"(p) : \"memory\");\n"
"    return v;\n"
"}\n"
"DI void st_release(u32 *p, u32 v) { asm volatile(\"st.release.gpu.u32 [%0], %1;\" ::\"l\"(p), \"r\"(v) : \"memory\"); }\n"
"DI void st_relaxed(u32 *p, u32 v) { asm volatile(\"st.relaxed.gpu.u32 [%0], %1;\" ::\"l\"(p), \"r\"(v) : \"memory\"); }\n"
"DI void red_release_add(u32 *p, u32 v)\n"
"{\n"
"    asm volatile(\"red.release.gpu.add.u32 [%0], %1;\" ::\"l\"(p), \"r\"(v) : \"memory\");\n"
"}\n"
"DI void fence_acq_rel_gpu() { asm volatile(\"fence.acq_rel.gpu;\" ::: \"memory\"); }\n"
"DI void fence_acq_rel_cta() { asm volatile(\"fence.acq_rel.cta;\" ::: \"memory\"); }\n"
"\n"
"DI u32x4 ld_nc_v4(const void *p) // read once: not kept in L1\n"
"{\n"
"    u32x4 v;\n"
"    asm(\"ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\"\n"
"        : \"=r\"(v.x), \"=r\"(v.y), \"=r\"(v.z), \"=r\"(v.w) : \"l\"(p));\n"
"    return v;\n"
"}\n"
"DI u32x4 ld_cg_v4(const void *p)\n"
"{\n"
"    u32x4 v;\n"
"    asm volatile(\"ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\"\n"
"                 : \"=r\"(v.x), \"=r\"(v.y), \"=r\"(v.z), \"=r\"(v.w) : \"l\"(p) : \"memory\");\n"
"    return v;\n"
"}\n"
"DI u32 ld_nc(const u32 *p)\n"
"{\n"
"    u32 v;\n"
"    asm(\"ld.global.nc.u32 %0, [%1];\" : \"=r\"(v) : \"l\"(p));\n"
"    return v;\n"
"}\n"
"DI void prefetch_l2(const void *p) { asm volatile(\"prefetch.global.L2 [%0];\" ::\"l\"(p)); }\n"
"\n"
"// ---- cp.async ---- bytes behind src_bytes become zeros\n"
"\n"
"DI void cp_async_16(void *dst, const void *src, u32 src_bytes)\n"
"{\n"
"    asm volatile(\"cp.async.cg.shared.global [%0], [%1], 16, %2;\" ::\"r\"(saddr(dst)), \"l\"(src), \"r\"(src_bytes)\n"
"                 : \"memory\");\n"
"}\n"
"DI void cp_async_4(void *dst, const void *src, u32 src_bytes)\n"
"{\n"
"    asm volatile(\"cp.async.ca.shared.global [%0], [%1], 4, %2;\" ::\"r\"(saddr(dst)), \"l\"(src), \"r\"(src_bytes)\n"
"                 : \"memory\");\n"
"}\n"
"DI void cp_async_commit() { asm volatile(\"cp.async.commit_group;\" ::: \"memory\"); }\n"
"template <int N> DI void cp_async_wait() { asm volatile(\"cp.async.wait_group %0;\" ::\"n\"(N) : \"memory\"); }\n"
"\n"
"// ---- mbarriers of the own CTA ---- a try_wait that suspends exists from 9.0 on\n"
"\n"
"DI void mbar_init(u64 *b, u32 n)\n"
"{\n"
"    asm volatile(\"mbarrier.init.shared.b64 [%0], %1;\" ::\"r\"(saddr(b)), \"r\"(n) : \"memory\");\n"
"}\n"
"DI void mbar_inval(u64 *b) { asm volatile(\"mbarrier.inval.shared.b64 [%0];\" ::\"r\"(saddr(b)) : \"memory\"); }\n"
"DI void mbar_arrive(u64 *b)\n"
"{\n"
"    asm volatile(\"mbarrier.arrive.shared.b64 _, [%0];\" ::\"r\"(saddr(b)) : \"memory\");\n"
"}\n"
"DI void cp_async_mbar_arrive(u64 *b) // .noinc: counts among the barrier's expected arrivals\n"
"{\n"
"    asm volatile(\"cp.async.mbarrier.arrive.noinc.shared.b64 [%0];\" ::\"r\"(saddr(b)) : \"memory\");\n"
"}\n"
"\n"
"// What Hopper has: traps on older chips, and the matrix instructions of sm_90a on every other chip.\n"
"#if MOE_ARCH >= 90\n"
"#define ASM_90(...) asm volatile(__VA_ARGS__)\n"
"#else\n"
"#define ASM_90(...) trap()\n"
"#endif\n"
"#if MOE_ARCH_A\n"
"#define ASM_90A(...) asm volatile(__VA_ARGS__)\n"
"#else\n"
"#define ASM_90A(...) trap()\n"
"#endif\n"
"#if MOE_ARCH >= 89\n"
"#define ASM_89(...) asm(__VA_ARGS__)\n"
"#else\n"
"#define ASM_89(...) trap()\n"
"#endif\n"
"\n"
"DI bool elect() // one lane of a converged warp\n"
"{\n"
"#if MOE_ARCH >= 90\n"
"    u32 elected;\n",
"    asm volatile(\"{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }\" : \"=r\"(elected));\n"
"    return elected != 0;\n"
"#else\n"
"    return lane() == 0;\n"
"#endif\n"
"}\n"
"\n"
"DI void mbar_arrive_n(u64 *b, u32 n)\n"
"{\n"
"    ASM_90(\"mbarrier.arrive.shared::cta.b64 _, [%0], %1;\" ::\"r\"(saddr(b)), \"r\"(n) : \"memory\");\n"
"}\n"
"DI void mbar_arrive_expect_tx(u64 *b, u32 bytes)\n"
"{\n"
"    ASM_90(\"mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\" ::\"r\"(saddr(b)), \"r\"(bytes) : \"memory\");\n"
"}\n"
"DI void mbar_expect_tx(u64 *b, u32 bytes)\n"
"{\n"
"    ASM_90(\"mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;\" ::\"r\"(saddr(b)), \"r\"(bytes) : \"memory\");\n"
"}\n"
"DI void mbar_arrive_cluster(u32 addr)\n"
"{\n"
"    ASM_90(\"mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];\" ::\"r\"(addr) : \"memory\");\n"
"}\n"
"DI void mbar_arrive_expect_tx_cluster(u32 addr, u32 bytes)\n"
"{\n"
"    ASM_90(\"mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%0], %1;\" ::\"r\"(addr), \"r\"(bytes)\n"
"           : \"memory\");\n"
"}\n"
"DI bool mbar_test(u64 *b, u32 parity) // has the phase of this parity completed\?\n"
"{\n"
"    u32 done;\n"
"    asm volatile(\"{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }\"\n"
"                 : \"=r\"(done) : \"r\"(saddr(b)), \"r\"(parity) : \"memory\");\n"
"    return done != 0;\n"
"}\n"
"DI void mbar_wait(u64 *b, u32 parity)\n"
"{\n"
"#if MOE_ARCH >= 90\n"
"    u32 done = 0;\n"
"    while (done == 0)\n"
"        asm volatile(\"{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }\"\n"
"                     : \"=r\"(done) : \"r\"(saddr(b)), \"r\"(parity) : \"memory\");\n"
"#else\n"
"    while (!mbar_test(b, parity)) {}\n"
"#endif\n"
"}\n"
"DI void mbar_wait_cluster(u64 *b, u32 parity) // acquires what other CTAs of the cluster released\n"
"{\n"
"    u32 done = 0;\n"
"    while (done == 0)\n"
"        ASM_90(\"{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; \"\n"
"               \"selp.u32 %0, 1, 0, p; }\" : \"=r\"(done) : \"r\"(saddr(b)), \"r\"(parity) : \"memory\");\n"
"}\n"
"DI void fence_mbar_init() { ASM_90(\"fence.mbarrier_init.release.cluster;\" ::: \"memory\"); }\n"
"\n"
"// ---- clusters ----\n"
"\n"
"DI u32 cluster_rank()\n"
"{\n"
"    u32 rank = 0;\n"
"    ASM_90(\"mov.u32 %0, %%cluster_ctarank;\" : \"=r\"(rank));\n"
"    return rank;\n"
"}\n"
"DI u32 cluster_size()\n"
"{\n"
"    u32 size = 1;\n"
"    ASM_90(\"mov.u32 %0, %%cluster_nctarank;\" : \"=r\"(size));\n"
"    return size;\n"
"}\n"
"DI void cluster_arrive() { ASM_90(\"barrier.cluster.arrive.release.aligned;\" ::: \"memory\"); }\n"
"DI void cluster_wait() { ASM_90(\"barrier.cluster.wait.acquire.aligned;\" ::: \"memory\"); }\n"
"DI void cluster_sync()\n"
"{\n"
"    cluster_arrive();\n"
"    cluster_wait();\n"
"}\n"
"DI u32 mapa(const void *p, u32 rank)\n"
"{\n"
"    u32 addr = 0;\n"
"    ASM_90(\"mapa.shared::cluster.u32 %0, %1, %2;\" : \"=r\"(addr) : \"r\"(saddr(p)), \"r\"(rank));\n"
"    return addr;\n"
"}\n"
"DI u32 ld_cluster(u32 addr)\n"
"{\n"
"    u32 v = 0;\n"
"    ASM_90(\"ld.shared::cluster.u32 %0, [%1];\" : \"=r\"(v) : \"r\"(addr) : \"memory\");\n"
"    return v;\n"
"}\n"
"DI f32x4 ld_cluster_v4(u32 addr)\n"
"{\n"
"    f32x4 v = { 0, 0, 0, 0 };\n"
"    ASM_90(\"ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];\"\n"
"           : \"=f\"(v.x), \"=f\"(v.y), \"=f\"(v.z), \"=f\"(v.w) : \"r\"(addr) : \"memory\");\n"
"    return v;\n"
"}\n"
"DI void st_cluster(u32 addr, u32 v) { ASM_90(\"st.shared::cluster.u32 [%0], %1;\" ::\"r\"(addr), \"r\"(v) : \"memory\"); }\n"
"DI u32 atom_add_cluster(u32 addr, u32 v)\n"
"{\n"
"    u32 old = 0;\n"
"    ASM_90(\"atom.relaxed.cluster.shared::cluster.add.u32 %0, [%1], %2;\" : \"=r\"(old) : \"r\"(addr), \"r\"(v) : \"memory\");\n"
"    return old;\n"
"}\n"
"DI void red_add_cluster(u32 addr, u32 v)\n"
"{\n"
"    ASM_90(\"red.relaxed.cluster.shared::cluster.add.u32 [%0], %1;\" ::\"r\"(addr), \"r\"(v) : \"memory\");\n"
"}\n"
"DI void red_add_cluster_f32(u32 addr, f32 v)\n"
"{\n"
"    ASM_90(\"red.relaxed.cluster.shared::cluster.add.f32 [%0], %1;\" ::\"r\"(addr), \"f\"(v) : \"memory\");\n"
"}\n"
"DI void st_async(u32 addr, u32 v, u32 bar) // counts 4 bytes at the barrier beside it\n"
"{\n"
"    ASM_90(\"st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];\" ::\"r\"(addr), \"r\"(v), \"r\"(bar)\n"
"           : \"memory\");\n"
"}\n"
"\n"
"// ---- bulk and tensor copies ---- by the asynchronous proxy\n"
"\n",
"DI u64 policy_evict_first()\n"
"{\n"
"    u64 policy = 0;\n"
"    ASM_90(\"createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\" : \"=l\"(policy));\n"
"    return policy;\n"
"}\n"
"DI u64 policy_evict_last()\n"
"{\n"
"    u64 policy = 0;\n"
"    ASM_90(\"createpolicy.fractional.L2::evict_last.b64 %0, 1.0;\" : \"=l\"(policy));\n"
"    return policy;\n"
"}\n"
"DI void bulk_g2s(void *dst, const void *src, u32 bytes, u64 *bar)\n"
"{\n"
"    ASM_90(\"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\"\n"
"           ::\"r\"(saddr(dst)), \"l\"(src), \"r\"(bytes), \"r\"(saddr(bar)) : \"memory\");\n"
"}\n"
"DI void bulk_g2s_hint(void *dst, const void *src, u32 bytes, u64 *bar, u64 policy)\n"
"{\n"
"    ASM_90(\"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;\"\n"
"           ::\"r\"(saddr(dst)), \"l\"(src), \"r\"(bytes), \"r\"(saddr(bar)), \"l\"(policy) : \"memory\");\n"
"}\n"
"DI void bulk_g2s_multicast(void *dst, const void *src, u32 bytes, u64 *bar, u16 mask) // same place in each CTA\n"
"{\n"
"    ASM_90(\"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], \"\n"
"           \"%4;\" ::\"r\"(saddr(dst)), \"l\"(src), \"r\"(bytes), \"r\"(saddr(bar)), \"h\"(mask) : \"memory\");\n"
"}\n"
"DI void bulk_s2g(void *dst, const void *src, u32 bytes)\n"
"{\n"
"    ASM_90(\"cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\" ::\"l\"(dst), \"r\"(saddr(src)), \"r\"(bytes)\n"
"           : \"memory\");\n"
"}\n"
"DI void bulk_s2s_cluster(u32 dst, const void *src, u32 bytes, u32 bar)\n"
"{\n"
"    ASM_90(\"cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\"\n"
"           ::\"r\"(dst), \"r\"(saddr(src)), \"r\"(bytes), \"r\"(bar) : \"memory\");\n"
"}\n"
"DI void bulk_red_add_f32(void *dst, const void *src, u32 bytes)\n"
"{\n"
"    ASM_90(\"cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\"\n"
"           ::\"l\"(dst), \"r\"(saddr(src)), \"r\"(bytes) : \"memory\");\n"
"}\n"
"DI void bulk_red_add_bf16(void *dst, const void *src, u32 bytes)\n"
"{\n"
"    ASM_90(\"cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16 [%0], [%1], %2;\"\n"
"           ::\"l\"(dst), \"r\"(saddr(src)), \"r\"(bytes) : \"memory\");\n"
"}\n"
"DI void bulk_prefetch(const void *src, u32 bytes)\n"
"{\n"
"    ASM_90(\"cp.async.bulk.prefetch.L2.global [%0], %1;\" ::\"l\"(src), \"r\"(bytes) : \"memory\");\n"
"}\n"
"DI void bulk_commit() { ASM_90(\"cp.async.bulk.commit_group;\" ::: \"memory\"); }\n"
"template <int N> DI void bulk_wait() { ASM_90(\"cp.async.bulk.wait_group %0;\" ::\"n\"(N) : \"memory\"); }\n"
"template <int N> DI void bulk_wait_read() { ASM_90(\"cp.async.bulk.wait_group.read %0;\" ::\"n\"(N) : \"memory\"); }\n"
"\n"
"DI void tma_load_2d(void *dst, const tensor_map *map, i32 x, i32 y, u64 *bar)\n"
"{\n"
"    ASM_90(\"cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];\"\n"
"           ::\"r\"(saddr(dst)), \"l\"(map), \"r\"(x), \"r\"(y), \"r\"(saddr(bar)) : \"memory\");\n"
"}\n"
"DI void tma_load_3d(void *dst, const tensor_map *map, i32 x, i32 y, i32 z, u64 *bar)\n"
"{\n"
"    ASM_90(\"cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], \"\n"
"           \"[%5];\" ::\"r\"(saddr(dst)), \"l\"(map), \"r\"(x), \"r\"(y), \"r\"(z), \"r\"(saddr(bar)) : \"memory\");\n"
"}\n"
"DI void tma_load_2d_multicast(void *dst, const tensor_map *map, i32 x, i32 y, u64 *bar, u16 mask)\n"
"{\n"
"    ASM_90(\"cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], \"\n"
"           \"[%1, {%2, %3}], [%4], %5;\" ::\"r\"(saddr(dst)), \"l\"(map), \"r\"(x), \"r\"(y), \"r\"(saddr(bar)), \"h\"(mask)\n"
"           : \"memory\");\n"
"}\n"
"DI void tma_store_2d(const tensor_map *map, i32 x, i32 y, const void *src)\n"
"{\n"
"    ASM_90(\"cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\"\n"
"           ::\"l\"(map), \"r\"(x), \"r\"(y), \"r\"(saddr(src)) : \"memory\");\n"
"}\n"
"DI void tma_red_add_2d(const tensor_map *map, i32 x, i32 y, const void *src)\n"
"{\n"
"    ASM_90(\"cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%1, %2}], [%3];\"\n"
"           ::\"l\"(map), \"r\"(x), \"r\"(y), \"r\"(saddr(src)) : \"memory\");\n"
"}\n",
"DI void tma_prefetch(const tensor_map *map) { ASM_90(\"prefetch.tensormap [%0];\" ::\"l\"(map) : \"memory\"); }\n"
"\n"
"DI void fence_proxy_async() { ASM_90(\"fence.proxy.async.shared::cta;\" ::: \"memory\"); }\n"
"DI void fence_proxy_async_all() { ASM_90(\"fence.proxy.async;\" ::: \"memory\"); }\n"
"DI void fence_proxy_async_global() { ASM_90(\"fence.proxy.async.global;\" ::: \"memory\"); }\n"
"\n"
"// ---- warp matrix products ---- fragments as the PTX manual draws them; mma accumulates into d\n"
"\n"
"#define LDMATRIX(count, trans, suffix, list, n, ...) \\\n"
"    DI void ldmatrix_x##count##suffix(u32 (&r)[count], const void *p) \\\n"
"    { \\\n"
"        asm volatile(\"ldmatrix.sync.aligned.m8n8.x\" #count trans \".shared.b16 {\" list \"}, [%\" #n \"];\" \\\n"
"                     : __VA_ARGS__ : \"r\"(saddr(p)) : \"memory\"); \\\n"
"    }\n"
"LDMATRIX(1, \"\", , \"%0\", 1, \"=r\"(r[0]))\n"
"LDMATRIX(2, \"\", , \"%0, %1\", 2, \"=r\"(r[0]), \"=r\"(r[1]))\n"
"LDMATRIX(4, \"\", , \"%0, %1, %2, %3\", 4, \"=r\"(r[0]), \"=r\"(r[1]), \"=r\"(r[2]), \"=r\"(r[3]))\n"
"LDMATRIX(1, \".trans\", _trans, \"%0\", 1, \"=r\"(r[0]))\n"
"LDMATRIX(2, \".trans\", _trans, \"%0, %1\", 2, \"=r\"(r[0]), \"=r\"(r[1]))\n"
"LDMATRIX(4, \".trans\", _trans, \"%0, %1, %2, %3\", 4, \"=r\"(r[0]), \"=r\"(r[1]), \"=r\"(r[2]), \"=r\"(r[3]))\n"
"\n"
"#define STMATRIX(count, trans, suffix, list, ...) \\\n"
"    DI void stmatrix_x##count##suffix(void *p, const u32 (&r)[count]) \\\n"
"    { \\\n"
"        ASM_90(\"stmatrix.sync.aligned.m8n8.x\" #count trans \".shared.b16 [%0], {\" list \"};\" \\\n"
"               ::\"r\"(saddr(p)), __VA_ARGS__ : \"memory\"); \\\n"
"    }\n"
"STMATRIX(1, \"\", , \"%1\", \"r\"(r[0]))\n"
"STMATRIX(2, \"\", , \"%1, %2\", \"r\"(r[0]), \"r\"(r[1]))\n"
"STMATRIX(4, \"\", , \"%1, %2, %3, %4\", \"r\"(r[0]), \"r\"(r[1]), \"r\"(r[2]), \"r\"(r[3]))\n"
"STMATRIX(1, \".trans\", _trans, \"%1\", \"r\"(r[0]))\n"
"STMATRIX(2, \".trans\", _trans, \"%1, %2\", \"r\"(r[0]), \"r\"(r[1]))\n"
"STMATRIX(4, \".trans\", _trans, \"%1, %2, %3, %4\", \"r\"(r[0]), \"r\"(r[1]), \"r\"(r[2]), \"r\"(r[3]))\n"
"\n"
"#define MMA_OPERANDS \\\n"
"    : \"+f\"(d[0]), \"+f\"(d[1]), \"+f\"(d[2]), \"+f\"(d[3]) \\\n"
"    : \"r\"(a[0]), \"r\"(a[1]), \"r\"(a[2]), \"r\"(a[3]), \"r\"(b[0]), \"r\"(b[1])\n"
"#define MMA_LIST \" {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\"\n"
"DI void mma_bf16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2])\n"
"{\n"
"    asm(\"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32\" MMA_LIST MMA_OPERANDS);\n"
"}\n"
"DI void mma_f16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2])\n"
"{\n"
"    asm(\"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32\" MMA_LIST MMA_OPERANDS);\n"
"}\n"
"DI void mma_e4m3(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2])\n"
"{\n"
"    ASM_89(\"mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32\" MMA_LIST MMA_OPERANDS);\n"
"}\n"
"\n"
"// ---- warpgroup matrix products ---- d (64 x N, fp32) = a b^T, + d where accumulate is not 0; both K-major, b from\n"
"// shared memory. ss: a from shared memory; rs: a in registers. N as in the table. d is not touched until\n"
"// wgmma_wait(), and a of rs neither.\n"
"\n"
"DI void wgmma_fence() { ASM_90A(\"wgmma.fence.sync.aligned;\" ::: \"memory\"); }\n"
"DI void wgmma_commit() { ASM_90A(\"wgmma.commit_group.sync.aligned;\" ::: \"memory\"); }\n"
"template <int N> DI void wgmma_wait() { ASM_90A(\"wgmma.wait_group.sync.aligned %0;\" ::\"n\"(N) : \"memory\"); }\n"
"template <int R> DI void reg_dec() { ASM_90A(\"setmaxnreg.dec.sync.aligned.u32 %0;\" ::\"n\"(R)); }\n"
"template <int R> DI void reg_inc() { ASM_90A(\"setmaxnreg.inc.sync.aligned.u32 %0;\" ::\"n\"(R)); }\n"
"\n"
"#define TEN(t) \"%\" #t \"0, %\" #t \"1, %\" #t \"2, %\" #t \"3, %\" #t \"4, %\" #t \"5, %\" #t \"6, %\" #t \"7, %\" #t \"8, %\" #t \"9\"\n"
"#define LIST_4 \"%0, %1, %2, %3\"\n"
"#define LIST_8 LIST_4 \", %4, %5, %6, %7\"\n"
"#define LIST_12 TEN() \", %10, %11\"\n"
"#define LIST_16 LIST_12 \", %12, %13, %14, %15\"\n"
"#define LIST_24 TEN() \", \" TEN(1) \", %20, %21, %22, %23\"\n"
"#define LIST_30 TEN() \", \" TEN(1) \", \" TEN(2)\n"
"#define LIST_32 LIST_30 \", %30, %31\"\n"
"#define LIST_40 LIST_30 \", \" TEN(3)\n"
"#define LIST_48 LIST_40 \", %40, %41, %42, %43, %44, %45, %46, %47\"\n"
"#define LIST_50 LIST_40 \", \" TEN(4)\n"
"#define LIST_56 LIST_50 \", %50, %51, %52, %53, %54, %55\"\n"
"#define LIST_60 LIST_50 \", \" TEN(5)\n"
"#define LIST_64 LIST_60 \", %60, %61, %62, %63\"\n"
"#define LIST_80 LIST_60 \", \" TEN(6) \", \" TEN(7)\n",
"#define LIST_90 LIST_80 \", \" TEN(8)\n"
"#define LIST_96 LIST_90 \", %90, %91, %92, %93, %94, %95\"\n"
"#define LIST_110 LIST_90 \", \" TEN(9) \", \" TEN(10)\n"
"#define LIST_112 LIST_110 \", %110, %111\"\n"
"#define LIST_120 LIST_110 \", \" TEN(11)\n"
"#define LIST_128 LIST_120 \", %120, %121, %122, %123, %124, %125, %126, %127\"\n"
"\n"
"#define D_4(i) \"+f\"(d[i]), \"+f\"(d[i + 1]), \"+f\"(d[i + 2]), \"+f\"(d[i + 3])\n"
"#define D_8(i) D_4(i), D_4(i + 4)\n"
"#define D_16(i) D_8(i), D_8(i + 8)\n"
"#define D_32(i) D_16(i), D_16(i + 16)\n"
"#define D_64(i) D_32(i), D_32(i + 32)\n"
"\n"
"// p0..p5: numbers of the operands behind d.\n"
"#define WGMMA(name, type, ss_trans, rs_trans, n, list, p0, p1, p2, p3, p4, p5, ...) \\\n"
"    template <> struct name<n> { \\\n"
"        static DI void ss(f32 (&d)[n / 2], u64 a, u64 b, u32 accumulate) \\\n"
"        { \\\n"
"            ASM_90A(\"{ .reg .pred p; setp.ne.b32 p, %\" #p2 \", 0; wgmma.mma_async.sync.aligned.m64n\" #n type \" {\" list \\\n"
"                    \"}, %\" #p0 \", %\" #p1 \", p, 1, 1\" ss_trans \"; }\" : __VA_ARGS__ : \"l\"(a), \"l\"(b), \"r\"(accumulate)); \\\n"
"        } \\\n"
"        static DI void rs(f32 (&d)[n / 2], const u32 (&a)[4], u64 b, u32 accumulate) \\\n"
"        { \\\n"
"            ASM_90A(\"{ .reg .pred p; setp.ne.b32 p, %\" #p5 \", 0; wgmma.mma_async.sync.aligned.m64n\" #n type \" {\" list \\\n"
"                    \"}, {%\" #p0 \", %\" #p1 \", %\" #p2 \", %\" #p3 \"}, %\" #p4 \", p, 1, 1\" rs_trans \"; }\" \\\n"
"                    : __VA_ARGS__ : \"r\"(a[0]), \"r\"(a[1]), \"r\"(a[2]), \"r\"(a[3]), \"l\"(b), \"r\"(accumulate)); \\\n"
"        } \\\n"
"    };\n"
"#define WGMMA_TABLE(name, type, ss_trans, rs_trans) \\\n"
"    template <int N> struct name; \\\n"
"    WGMMA(name, type, ss_trans, rs_trans, 8, LIST_4, 4, 5, 6, 7, 8, 9, D_4(0)) \\\n"
"    WGMMA(name, type, ss_trans, rs_trans, 16, LIST_8, 8, 9, 10, 11, 12, 13, D_8(0)) \\\n"
"    WGMMA(name, type, ss_trans, rs_trans, 24, LIST_12, 12, 13, 14, 15, 16, 17, D_8(0), D_4(8)) \\\n"
"    WGMMA(name, type, ss_trans, rs_trans, 32, LIST_16, 16, 17, 18, 19, 20, 21, D_16(0)) \\\n"
"    WGMMA(name, type, ss_trans, rs_trans, 48, LIST_24, 24, 25, 26, 27, 28, 29, D_16(0), D_8(16)) \\\n"
"    WGMMA(name, type, ss_trans, rs_trans, 64, LIST_32, 32, 33, 34, 35, 36, 37, D_32(0)) \\\n"
"    WGMMA(name, type, ss_trans, rs_trans, 80, LIST_40, 40, 41, 42, 43, 44, 45, D_32(0), D_8(32)) \\\n"
"    WGMMA(name, type, ss_trans, rs_trans, 96, LIST_48, 48, 49, 50, 51, 52, 53, D_32(0), D_16(32)) \\\n"
"    WGMMA(name, type, ss_trans, rs_trans, 112, LIST_56, 56, 57, 58, 59, 60, 61, D_32(0), D_16(32), D_8(48)) \\\n"
"    WGMMA(name, type, ss_trans, rs_trans, 128, LIST_64, 64, 65, 66, 67, 68, 69, D_64(0)) \\\n"
"    WGMMA(name, type, ss_trans, rs_trans, 160, LIST_80, 80, 81, 82, 83, 84, 85, D_64(0), D_16(64)) \\\n"
"    WGMMA(name, type, ss_trans, rs_trans, 192, LIST_96, 96, 97, 98, 99, 100, 101, D_64(0), D_32(64)) \\\n"
"    WGMMA(name, type, ss_trans, rs_trans, 224, LIST_112, 112, 113, 114, 115, 116, 117, D_64(0), D_32(64), D_16(96)) \\\n"
"    WGMMA(name, type, ss_trans, rs_trans, 256, LIST_128, 128, 129, 130, 131, 132, 133, D_64(0), D_64(64))\n"
"\n"
"WGMMA_TABLE(wgmma_bf16, \"k16.f32.bf16.bf16\", \", 0, 0\", \", 0\")\n"
"WGMMA_TABLE(wgmma_f16, \"k16.f32.f16.f16\", \", 0, 0\", \", 0\")\n"
"WGMMA_TABLE(wgmma_e4m3, \"k32.f32.e4m3.e4m3\", \"\", \"\")\n"
"WGMMA_TABLE(wgmma_e5m2, \"k32.f32.e5m2.e5m2\", \"\", \"\")\n"
"\n"
"// ---- conversions, arithmetic, dependent launches ---- to nearest even; fp8 saturates\n"
"\n"
"DI u32 cvt_bf16x2(f32 lo, f32 hi)\n"
"{\n"
"    u32 v;\n"
"    asm(\"cvt.rn.bf16x2.f32 %0, %1, %2;\" : \"=r\"(v) : \"f\"(hi), \"f\"(lo));\n"
"    return v;\n"
"}\n"
"DI u32 cvt_f16x2(f32 lo, f32 hi)\n"
"{\n"
"    u32 v;\n"
"    asm(\"cvt.rn.f16x2.f32 %0, %1, %2;\" : \"=r\"(v) : \"f\"(hi), \"f\"(lo));\n"
"    return v;\n"
"}\n"
"DI f32 cvt_f16(u16 v)\n"
"{\n"
"    f32 wide;\n"
"    asm(\"cvt.f32.f16 %0, %1;\" : \"=f\"(wide) : \"h\"(v));\n"
"    return wide;\n"
"}\n"
"DI u16 cvt_e4m3x2(f32 lo, f32 hi)\n"
"{\n"
"    u16 v = 0;\n"
"    ASM_89(\"cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;\" : \"=h\"(v) : \"f\"(hi), \"f\"(lo));\n"
"    return v;\n"
"}\n"
"DI u16 cvt_e5m2x2(f32 lo, f32 hi)\n"
"{\n"
"    u16 v = 0;\n"
"    ASM_89(\"cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;\" : \"=h\"(v) : \"f\"(hi), \"f\"(lo));\n"
"    return v;\n"
"}\n"
"DI u32 cvt_e4m3x2_f16x2(u16 v)\n"
"{\n"
"    u32 wide = 0;\n",
"    ASM_89(\"cvt.rn.f16x2.e4m3x2 %0, %1;\" : \"=r\"(wide) : \"h\"(v));\n"
"    return wide;\n"
"}\n"
"\n"
"DI f32 sqrt_rn(f32 v) { return __fsqrt_rn(v); }\n"
"DI u32 popc(u32 v) { return (u32)__popc((int)v); }\n"
"DI u32 clz(u32 v) { return (u32)__clz((int)v); }\n"
"DI u32 ffs(u32 v) { return (u32)__ffs((int)v); }\n"
"DI u64 umulhi64(u64 a, u64 b) { return __umul64hi(a, b); }\n"
"\n"
"// Nothing to wait for or to release on chips without dependent launches.\n"
"DI void grid_wait()\n"
"{\n"
"#if MOE_ARCH >= 90\n"
"    asm volatile(\"griddepcontrol.wait;\" ::: \"memory\");\n"
"#endif\n"
"}\n"
"DI void grid_launch()\n"
"{\n"
"#if MOE_ARCH >= 90\n"
"    asm volatile(\"griddepcontrol.launch_dependents;\" ::: \"memory\");\n"
"#endif\n"
"}\n"
"\n"
"#endif\n"
"\n"
"// >>args  one argument struct for each entry; moe.h has the same ones for the host. Pointers first, then 64-bit, then\n"
"// 32-bit members. Enumerations are moe.h's public ones. A pointer that may be NULL says so.\n"
"\n"
"// Values of moe.h's enumerations.\n"
"enum {\n"
"    DTYPE_F32 = 1, DTYPE_BF16 = 2, DTYPE_F16 = 3, DTYPE_I32 = 14, DTYPE_I64 = 16,\n"
"    INPUT_LOGITS = 1, INPUT_IDS = 2, INPUT_PACKED = 3,\n"
"    SCORE_RAW = 1, SCORE_SOFTMAX = 2, SCORE_SIGMOID = 3, SCORE_SQRT_SOFTPLUS = 4,\n"
"    SCORE_BEFORE_TOPK = 1, SCORE_AFTER_TOPK = 2,\n"
"    SELECT_SCORE = 1, SELECT_LOGIT = 2,\n"
"    GROUP_MAX = 1, GROUP_TOP2_SUM = 2, GROUP_EACH = 3,\n"
"    EXCLUDED_NEG_INF = 0, EXCLUDED_ZERO = 1,\n"
"    RENORMALIZE_OFF = 0, RENORMALIZE_SUM = 1, RENORMALIZE_CLAMP_MIN = 2,\n"
"    ZERO_SUM_DIVIDE = 0, ZERO_SUM_ONE = 1,\n"
"    SCALE_ON_WEIGHTS = 0, SCALE_ON_OUTPUT = 1,\n"
"    SPECIAL_SKIP = 3,\n"
"    SIMULATE_OFF = 0, SIMULATE_UNIFORM = 1, SIMULATE_ZIPF = 2, SIMULATE_ONE_HOT = 3, SIMULATE_ROUND_ROBIN = 4,\n"
"    FAULT_NAN_LOGITS = 0, FAULT_IDS = 1, FAULT_TOKEN_IDS = 2, FAULT_COUNTS = 3\n"
"};\n"
"\n"
"// A resolved moe_routing_desc.\n"
"struct routing_args {\n"
"    i32 score, score_order, select, top_k;\n"
"    f32 logit_multiplier, logit_softcap;\n"
"    i32 bias_rows, groups, groups_kept, group_rule, group_excluded, renormalize;\n"
"    f32 renormalize_epsilon;\n"
"    i32 zero_sum;\n"
"    f32 scale;\n"
"    i32 scale_on, per_expert_scale, forced_rows, marked_token_lo, marked_token_hi;\n"
"    i32 special_experts, special_kind, extra_slots, extra_scored;\n"
"    f32 extra_weight, sparse_mixer;\n"
"    i32 simulate;\n"
"    u32 simulate_seed;\n"
"}; // 112 bytes\n"
"\n"
"// Where ids and weights of tokens come from and go to.\n"
"struct tokens_args {\n"
"    const void *logits;          // [T, logits_stride]; LOGITS, not simulated\n"
"    const void *ids;             // [T, slots]; IDS and PACKED\n"
"    const void *weights;         // [T, slots]; IDS; NULL: out_weights is NULL too\n"
"    const void *token_ids;       // [T] ids_dtype, or NULL\n"
"    const i32 *bias_index;       // [T] or NULL\n"
"    const i32 *num_tokens_dev;   // [1] or NULL\n"
"    const f32 *bias;             // [bias_rows, E + S]\n"
"    const f32 *per_expert_scale; // [E + S]\n"
"    const i32 *forced_ids;       // [forced_rows, top_k]\n"
"    const f32 *global_scale;     // [1] multiplies routing.scale, or NULL\n"
"    i32 *out_ids;                // [T, slots]; moe_k_route_one: or NULL\n"
"    f32 *out_weights;            // [T, slots] or NULL\n"
"    i64 logits_stride;\n"
"    i32 num_tokens;\n"
"    i32 num_experts;             // E\n"
"    i32 width;                   // of the router: E + S + scored extra slots\n"
"    i32 slots;                   // top_k + extra_slots\n"
"    i32 ids_end;                 // E + S + X: ids are 0..ids_end - 1\n"
"    i32 input_mode;              // MOE_INPUT_LOGITS, _IDS or _PACKED\n"
"    i32 logits_dtype, ids_dtype, weights_dtype;\n"
"    i32 end_is_none;             // MOE_EXECUTE_ID_E_IS_NONE\n"
"    routing_args routing;\n"
"}; // 256 bytes\n"
"\n"
"// The tables of moe_permutation, each of them NULL where nobody wants it, and which experts are local.\n"
"struct permute_args {\n"
"    i32 *row_of_slot;      // [T, slots]\n"
"    i32 *slot_of_row;      // [rows_max]\n"
"    i32 *expert_offsets;   // [local_experts + 1]\n"
"    i32 *expert_counts;    // [local_experts]\n"
"    i32 *tile_expert;      // [rows_max / tile]\n"
"    i32 *tile_limit;       // [rows_max / tile]\n"
"    i32 *num_tiles;        // [1]\n",
"    i32 *out_expert_counts; // [E]\n"
"    u32 *out_faults;       // [4]\n"
"    const i32 *local_of_id; // [ids_end] local expert or -1; NULL: the range below\n"
"    i32 tile;\n"
"    i32 rows_max;\n"
"    i32 local_experts;     // with matrices here: routed ones, then the always-on ones\n"
"    i32 local_first;       // range: ids local_first .. local_first + local_routed - 1 are local experts 0, 1, ...;\n"
"    i32 local_routed;      // ids from E + S on are the local experts behind them, as many as there are left\n"
"    i32 tile_shift;        // tile is 1 << tile_shift; -1: no power of two\n"
"}; // 104 bytes\n"
"\n"
"// How they are launched. R = 32 MOE_P_EXPERTS_PER_LANE >= width (4, 8, 12, 16, 32 or 64 a lane; any with IDS and\n"
"// PACKED). T = num_tokens of the host, C CTAs, W warps a CTA, S = ids_end rounded up to 8. Dynamic shared memory in\n"
"// bytes:\n"
"//\n"
"//   entry                threads                grid = C                     shared memory\n"
"//   moe_k_route_one      512; R > 256: 256;     1..8, one cluster            I + W (8 R + 2 S) + 16 S + 256,\n"
"//                        R > 512: 128           T <= 1024                    I = 2 ceil(T / C) slots rounded up to 16\n"
"//   moe_k_route          1024; R > 256: 512;    ceil(T / chunk_tokens)       8 W R + 4 S + 256\n"
"//                        R > 512: 128\n"
"//   moe_k_sort           256                    the same, at least 1         2 W S + 16 S + 256\n"
"//   moe_k_router_logits  256                    any; good: 2 an SM, but      8 h K + 2 b (K + 16) word + 4 h, tiles\n"
"//                                               not more than tiles          of h x b, stages of K (>>router)\n"
"//\n"
"// moe_k_route triggers its dependents, and moe_k_sort waits for it (programmatic launch). Good chunks: T over the\n"
"// number of SMs, rounded up to 16.\n"
"\n"
"// moe_k_route_one. Grid = cluster = 1..8 CTAs.\n"
"struct route_one_args {\n"
"    tokens_args tokens;\n"
"    permute_args permute;\n"
"};\n"
"\n"
"// moe_k_route. Chunk c is tokens [c chunk_tokens, (c + 1) chunk_tokens); a CTA does one chunk.\n"
"struct route_args {\n"
"    tokens_args tokens;  // out_ids is not NULL\n"
"    u16 *chunk_counts;   // [chunks, counts_stride] slots of each id\n"
"    u32 *chunk_faults;   // [chunks, 4]\n"
"    i32 chunk_tokens;    // at most 1024\n"
"    i32 counts_stride;   // ids_end rounded up to 8\n"
"};\n"
"\n"
"// moe_k_sort. One CTA for each chunk, at least one.\n"
"struct sort_args {\n"
"    permute_args permute;\n"
"    const i32 *ids;            // [T, slots] as moe_k_route has left them\n"
"    const u16 *chunk_counts;\n"
"    const u32 *chunk_faults;\n"
"    const i32 *num_tokens_dev; // [1] or NULL\n"
"    i32 num_tokens, chunk_tokens, counts_stride, chunks;\n"
"    i32 num_experts, slots, ids_end, special_experts;\n"
"};\n"
"\n"
"// moe_k_router_logits.\n"
"struct router_args {\n"
"    const void *x;             // [T, x_stride]\n"
"    const void *weight;        // [width, ld] f32, or bf16 with MOE_P_BF16; zeros behind input_size\n"
"    const f32 *bias;           // [width] or NULL\n"
"    const f32 *input_scale;    // [input_size] or NULL\n"
"    const i32 *num_tokens_dev; // [1] or NULL\n"
"    f32 *out;                  // [T, width]\n"
"    u32 *out_faults;           // [4] or NULL\n"
"    i64 x_stride;\n"
"    i32 num_tokens, width, input_size;\n"
"    i32 ld;                    // input_size rounded up to 32\n"
"    i32 x_dtype, rms_norm;\n"
"    f32 norm_epsilon, input_multiplier;\n"
"}; // 96 bytes\n"
"\n"
"// >>math  functions of moe.h's >>math, bit by bit  Operation by operation, but where a branch would stand between the\n"
"// elements of a row; there the comment says why the bits are the same. Products that are added to are plain: every\n"
"// compiler of this text is told not to contract (--fmad=false, -ffp-contract=off).\n"
"\n"
"#define INF_F32 from_bits(0x7f800000u)\n"
"\n"
"DI f32 abs_f32(f32 x) { return from_bits(bits(x) & 0x7fffffffu); }\n"
"DI u32 max_u32(u32 a, u32 b) { return a > b \? a : b; }\n"
"DI i32 min_i32(i32 a, i32 b) { return a < b \? a : b; }\n"
"DI i32 max_i32(i32 a, i32 b) { return a > b \? a : b; }\n"
"\n",
"// e^x without a branch, so that the exponentials of a row overlap: what moe.h returns early is what the limits give,\n"
"// and of the products by two powers of two only the second rounds, if any does. Of no use for NaN.\n"
"DI f32 exp_f32(f32 x)\n"
"{\n"
"    const f32 magic = 12582912.0f;\n"
"    f32 n, r, q;\n"
"    i32 k;\n"
"    x = x < -104.0f \? -104.0f : x;\n"
"    x = x > 89.0f \? 89.0f : x;\n"
"    n = fmaf(x, 1.44269502f, magic);\n"
"    k = (i32)(bits(n) - bits(magic));\n"
"    n = n - magic;\n"
"    r = fmaf(n, -0.693147182f, x);\n"
"    r = fmaf(n, 1.90465421e-9f, r);\n"
"    q = 0.00139406149f;\n"
"    q = fmaf(q, r, 0.00836882833f);\n"
"    q = fmaf(q, r, 0.0416664034f);\n"
"    q = fmaf(q, r, 0.166665196f);\n"
"    q = fmaf(q, r, 0.5f);\n"
"    r = fmaf(r * r, q, r) + 1.0f;\n"
"    return r * from_bits(((u32)(k >> 1) << 23) + 0x3f800000u) * from_bits(((u32)(k - (k >> 1)) << 23) + 0x3f800000u);\n"
"}\n"
"\n"
"// log(1 + x) for x in 0..1.\n"
"DI f32 log1p_f32(f32 x)\n"
"{\n"
"    f32 f, q, k;\n"
"    u32 e;\n"
"    e = (bits(1.0f + x) - 0x3f3504f3u) & 0xff800000u;\n"
"    k = (f32)(e >> 23);\n"
"    f = from_bits(bits(x) - e);\n"
"    f = f + (e < 0x10000000u \? from_bits(0x3f800000u - e) - 1.0f : -1.0f);\n"
"    q = 0.067491293f;\n"
"    q = fmaf(q, f, -0.11672435f);\n"
"    q = fmaf(q, f, 0.118847661f);\n"
"    q = fmaf(q, f, -0.124060042f);\n"
"    q = fmaf(q, f, 0.142202079f);\n"
"    q = fmaf(q, f, -0.166679934f);\n"
"    q = fmaf(q, f, 0.20002076f);\n"
"    q = fmaf(q, f, -0.250000089f);\n"
"    q = fmaf(q, f, 0.333333135f);\n"
"    q = fmaf(q, f, -0.5f);\n"
"    f = fmaf(f * f, q, f);\n"
"    return fmaf(k, 0.693147182f, fmaf(k, -1.90465421e-9f, f));\n"
"}\n"
"\n"
"DI f32 tanh_f32(f32 x)\n"
"{\n"
"    f32 a = abs_f32(x), s, q;\n"
"    if (a < 0.6f) {\n"
"        s = x * x;\n"
"        q = -0.00589796668f;\n"
"        q = fmaf(q, s, 0.0207986254f);\n"
"        q = fmaf(q, s, -0.0537847169f);\n"
"        q = fmaf(q, s, 0.133319363f);\n"
"        q = fmaf(q, s, -0.333332986f);\n"
"        return fmaf(x * s, q, x);\n"
"    }\n"
"    q = 1.0f - 2.0f / (exp_f32(2.0f * a) + 1.0f);\n"
"    return x < 0 \? -q : q;\n"
"}\n"
"\n"
"// x / d rounded to nearest, from y = 1 / d (rounded to nearest, or nearly): two corrections by the remainder, of which\n"
"// the second rounds rightly (Markstein). No branch. Neither quotient nor remainder may be denormal.\n"
"DI f32 divide_by(f32 x, f32 d, f32 y)\n"
"{\n"
"    f32 q = x * y;\n"
"    q = fmaf(fmaf(-d, q, x), y, q);\n"
"    return fmaf(fmaf(-d, q, x), y, q);\n"
"}\n"
"\n"
"// The same bits as moe.h's for every x. 1 / d for d in 1..2 by Newton from a parabola; the greatest d below 2 alone\n"
"// would come out one too low.\n"
"DI f32 sigmoid_f32(f32 x)\n"
"{\n"
"    f32 e = exp_f32(-abs_f32(x)), d = 1.0f + e, y = fmaf(d, fmaf(d, 0.32323232f, -1.4545455f), 2.1212121f);\n"
"    y = fmaf(y, fmaf(-d, y, 1), y);\n"
"    y = fmaf(y, fmaf(-d, y, 1), y);\n"
"    y = bits(d) == 0x3fffffffu \? from_bits(0x3f000001u) : y;\n"
"    return divide_by(x < 0 \? e : 1.0f, d, y);\n"
"}\n"
"\n"
"DI f32 softplus_f32(f32 x)\n"
"{\n"
"    f32 tail = log1p_f32(exp_f32(-abs_f32(x)));\n"
"    return x > 0 \? x + tail : tail;\n"
"}\n"
"\n"
"DI f32 sqrt_softplus_f32(f32 x) { return x < -20.0f \? exp_f32(0.5f * x) : sqrt_rn(softplus_f32(x)); }\n"
"\n"
"DI f32 bf16_f32(u16 value) { return from_bits((u32)value << 16); }\n"
"\n"
"// Element `at` of an array of f32, bf16 or f16.\n"
"DI f32 load_float(const void *data, i32 dtype, i64 at)\n"
"{\n"
"    if (dtype == DTYPE_F32) return ((const f32 *)data)[at];\n"
"    u16 half = ((const u16 *)data)[at];\n"
"    return dtype == DTYPE_BF16 \? bf16_f32(half) : cvt_f16(half);\n"
"}\n"
"\n"
"// The sum of 32 lanes in the order of moe.h: lane ^ 16, ^ 8, ^ 4, ^ 2, ^ 1. Every lane gets it.\n"
"DI f32 lanes_sum(f32 x)\n"
"{\n"
"    for (u32 step = 16; step > 0; step /= 2) x = x + shfl_xor(x, step);\n"
"    return x;\n"
"}\n"
"\n"
"// Unsigned numbers that order as floats do, -0 equal to +0. Only NaN gives 0.\n"
"DI u32 order_of(f32 x)\n"
"{\n"
"    u32 b = bits(x + 0.0f);\n"
"    return b ^ ((u32)((i32)b >> 31) | 0x80000000u);\n"
"}\n"
"\n"
"DI f32 of_order(u32 key) { return from_bits(key >> 31 != 0 \? key ^ 0x80000000u : ~key); }\n"
"\n"
"// >>routing  logits -> experts and weights of a token  A warp routes a token, as moe.h's >>routing does: what that says\n",
"// about sums, ties and -inf holds here, and where data is legal all bits are the same. Data that it refuses: a logit or\n"
"// a key that is NaN or +inf counts as -inf, so that it sorts last; the token is counted in MOE_FAULT_NAN_LOGITS and\n"
"// routed all the same. A token without a row in the forced table or the bias gets ids -1 and weights 0. An id outside\n"
"// its range becomes -1 with weight 0.\n"
"//\n"
"//   registers     key[P], P = MOE_P_EXPERTS_PER_LANE: expert e lies in lane e % 32, register e / 32\n"
"//   shared memory two rows of 32 P words a warp: the logits behind multiplier and soft cap; keys of groups, flags\n"
"//   slots         slot s lies in lane s % 32, register s / 32 (40 at most)\n"
"\n"
"#ifndef MOE_P_EXPERTS_PER_LANE\n"
"#define MOE_P_EXPERTS_PER_LANE 8\n"
"#endif\n"
"\n"
"#define PER_LANE MOE_P_EXPERTS_PER_LANE\n"
"#define KEY_NEG_INF 0x007fffffu // order_of(-inf)\n"
"#define KEY_ZERO 0x80000000u    // order_of(0)\n"
"\n"
"struct warp_rows {\n"
"    f32 *logit;\n"
"    u32 *key;\n"
"};\n"
"\n"
"struct token_slots {\n"
"    i32 id[2];\n"
"    f32 weight[2];\n"
"};\n"
"\n"
"// What a softmax over a row needs to score one of its elements again.\n"
"struct softmax_sum {\n"
"    f32 best, sum;\n"
"};\n"
"\n"
"// The largest of key[0 .. N) and its place, of equal ones the lowest: a tree, in which the left one wins ties.\n"
"template <u32 N> DI void best_key(const u32 *key, u32 base, u32 &top, u32 &place)\n"
"{\n"
"    u32 t[N], p[N];\n"
"#pragma unroll\n"
"    for (u32 i = 0; i < N; i++) {\n"
"        t[i] = key[base + i];\n"
"        p[i] = 32 * (base + i);\n"
"    }\n"
"#pragma unroll\n"
"    for (u32 step = 1; step < N; step *= 2)\n"
"#pragma unroll\n"
"        for (u32 i = 0; i + step < N; i += 2 * step) {\n"
"            p[i] = t[i + step] > t[i] \? p[i + step] : p[i];\n"
"            t[i] = max_u32(t[i], t[i + step]);\n"
"        }\n"
"    top = t[0];\n"
"    place = lane() + p[0];\n"
"}\n"
"\n"
"// The first `count` lanes from `first` on get the places of the `count` largest keys, best first, of equal ones the\n"
"// lowest place; those keys become 0. Keys that may not be chosen are 0.\n"
"template <u32 N> DI void top_k(u32 (&key)[N], i32 first, i32 count, i32 &chosen)\n"
"{\n"
"    constexpr u32 part = N < 16 \? N : 16; // a tree of all 64 would need three times as many registers\n"
"    for (i32 j = first; j < first + count; j++) {\n"
"        u32 top, place;\n"
"        best_key<part>(key, 0, top, place);\n"
"#pragma unroll\n"
"        for (u32 base = part; base < N; base += part) {\n"
"            u32 t, p;\n"
"            best_key<part>(key, base, t, p);\n"
"            place = t > top \? p : place;\n"
"            top = max_u32(top, t);\n"
"        }\n"
"        u32 best = redux_max(top), equal = ballot(top == best), at;\n"
"        if ((equal & (equal - 1)) == 0) { // one lane: nothing waits for it to tell the others\n"
"            at = shfl(place, ffs(equal) - 1);\n"
"            place = top == best \? place : 0xffffffffu;\n"
"        } else {\n"
"            at = redux_min(top == best \? place : 0xffffffffu);\n"
"            place = at;\n"
"        }\n"
"#pragma unroll\n"
"        for (u32 i = 0; i < N; i++) key[i] = place - lane() == 32 * i \? 0 : key[i];\n"
"        if ((i32)lane() == j) chosen = (i32)at;\n"
"    }\n"
"}\n"
"\n"
"// The same for a whole row, from lane 0 on; keys stay. A bound that at least `count` keys reach comes from the lanes'\n"
"// largest ones. What reaches it, usually few more than `count`, goes to found[64] in order of place, a lane each, and\n"
"// is ranked by counting what beats it.\n"
"template <u32 N> DI void top_k_row(u32 (&key)[N], i32 count, u32 *found, i32 &chosen)\n"
"{\n"
"    u32 most = key[0], bound = 0, n = 0;\n"
"#pragma unroll\n"
"    for (u32 i = 1; i < N; i++) most = max_u32(most, key[i]);\n"
"    for (i32 j = 0; j < count; j++) {\n"
"        u32 best = redux_max(most);\n"
"        bound = best != 0 \? best : bound;\n"
"        most = most == best \? 0 : most;\n"
"    }\n"
"#pragma unroll\n"
"    for (u32 i = 0; i < N; i++) {\n"
"        u32 those = ballot(key[i] >= bound), at = n + popc(those & ((1u << lane()) - 1));\n"
"        if (key[i] >= bound && at < 32) {\n"
"            found[at] = key[i];\n"
"            found[32 + at] = lane() + 32 * i;\n"
"        }\n"
"        n += popc(those);\n"
"    }\n"
"    warp_sync();\n",
"    if (n > 32) { // many equal ones\n"
"        top_k(key, 0, count, chosen);\n"
"        return;\n"
"    }\n"
"    u32 mine = lane() < n \? found[lane()] : 0, place = found[32 + (lane() < n \? lane() : 0)], rank = 0;\n"
"#pragma unroll 4\n"
"    for (u32 c = 0; c < n; c++) {\n"
"        u32 other = found[c];\n"
"        rank += other > mine || (other == mine && c < lane());\n"
"    }\n"
"    warp_sync();\n"
"    if (lane() < n) found[rank] = place;\n"
"    warp_sync();\n"
"    if ((i32)lane() < count) chosen = (i32)found[lane()];\n"
"    warp_sync();\n"
"}\n"
"\n"
"// x[i] = element lane + 32 i of `width` ones; -inf behind them.\n"
"template <class T> DI void load_row(const T *row, u32 width, T none, T (&x)[PER_LANE])\n"
"{\n"
"    const i32 left = (i32)(width - lane()); // compared with constants: 32 i + lane would be a register each\n"
"#pragma unroll\n"
"    for (u32 i = 0; i < PER_LANE; i++) x[i] = (i32)(32 * i) < left \? row[lane() + 32 * i] : none;\n"
"}\n"
"\n"
"// The logits of a token behind multiplier and soft cap, into x and rows.logit. Says whether one was NaN or +inf.\n"
"DI bool route_logits(const tokens_args &a, i64 token, const warp_rows &rows, f32 (&x)[PER_LANE])\n"
"{\n"
"    const routing_args &r = a.routing;\n"
"    const u32 width = (u32)a.width;\n"
"    const i64 at = token * a.logits_stride;\n"
"    bool bad = false;\n"
"    if (a.logits_dtype == DTYPE_F32) {\n"
"        load_row((const f32 *)a.logits + at, width, -INF_F32, x);\n"
"    } else {\n"
"        u16 half[PER_LANE];\n"
"        load_row((const u16 *)a.logits + at, width, (u16)(a.logits_dtype == DTYPE_BF16 \? 0xff80 : 0xfc00), half);\n"
"#pragma unroll\n"
"        for (u32 i = 0; i < PER_LANE; i++) x[i] = a.logits_dtype == DTYPE_BF16 \? bf16_f32(half[i]) : cvt_f16(half[i]);\n"
"    }\n"
"#pragma unroll\n"
"    for (u32 i = 0; i < PER_LANE; i++) {\n"
"        x[i] = x[i] * r.logit_multiplier; // 1 where there is none; -inf stays\n"
"        bool wrong = !(x[i] < INF_F32);\n"
"        bad |= wrong;\n"
"        if (wrong && !(r.logit_softcap > 0)) x[i] = -INF_F32;\n"
"        rows.logit[lane() + 32 * i] = x[i];\n"
"    }\n"
"    if (r.logit_softcap > 0) { // rolled: rare, and long\n"
"        for (u32 e = lane(); e < width; e += 32) {\n"
"            f32 v = rows.logit[e];\n"
"            rows.logit[e] = v < INF_F32 \? r.logit_softcap * tanh_f32(v / r.logit_softcap) : -INF_F32;\n"
"        }\n"
"        load_row(rows.logit, width, -INF_F32, x);\n"
"    }\n"
"    warp_sync();\n"
"    return ballot(bad) != 0;\n"
"}\n"
"\n"
"// The score of x; with softmax, in the row that `s` was made of.\n"
"DI f32 score_of(i32 score, f32 x, const softmax_sum &s)\n"
"{\n"
"    if (score == SCORE_SIGMOID) return sigmoid_f32(x);\n"
"    if (score == SCORE_SQRT_SOFTPLUS) return sqrt_softplus_f32(x);\n"
"    if (score != SCORE_SOFTMAX) return x;\n"
"    f32 e = s.best == -INF_F32 \? 0 : exp_f32(x - s.best);\n"
"    return s.sum > 0 \? e / s.sum : e;\n"
"}\n"
"\n"
"// Applies f to each of `width` elements, through rows.key: rolled, for what is rare or long.\n"
"template <class F> DI void map_row(const warp_rows &rows, u32 width, f32 (&x)[PER_LANE], F f)\n"
"{\n"
"    f32 *row = (f32 *)rows.key;\n"
"#pragma unroll\n"
"    for (u32 i = 0; i < PER_LANE; i++) row[lane() + 32 * i] = x[i];\n"
"    for (u32 e = lane(); e < width; e += 32) row[e] = f(row[e]); // what this lane wrote\n"
"    load_row(row, width, -INF_F32, x);\n"
"    warp_sync(); // other lanes may write the row again\n"
"}\n"
"\n"
"// The same unrolled, so that elements overlap, where there are registers for it.\n"
"template <class F> DI void map_fast(const warp_rows &rows, u32 width, f32 (&x)[PER_LANE], F f)\n"
"{\n"
"    if (PER_LANE > 16) {\n"
"        map_row(rows, width, x, f);\n"
"    } else {\n"
"#pragma unroll\n"
"        for (u32 i = 0; i < PER_LANE; i++) x[i] = f(x[i]);\n"
"    }\n"
"}\n"
"\n"
"// x[i] / d for x within 0..d. Quotients that might be denormal take the long way.\n"
"DI void divide_row(const warp_rows &rows, u32 width, f32 (&x)[PER_LANE], f32 d)\n"
"{\n"
"    const f32 y = 1.0f / d;\n"
"    bool small = false;\n"
"#pragma unroll\n"
"    for (u32 i = 0; i < PER_LANE; i++) small |= x[i] > 0 && x[i] < 1e-25f;\n"
"    if (ballot(small) == 0) map_fast(rows, width, x, [=](f32 v) { return divide_by(v, d, y); });\n"
"    else map_row(rows, width, x, [=](f32 v) { return v / d; });\n"
"}\n"
"\n",
"// Scores of a row, in place, where `all`; else only what score_of() needs.\n"
"DI softmax_sum route_scores(i32 score, bool all, const warp_rows &rows, u32 width, f32 (&x)[PER_LANE])\n"
"{\n"
"    softmax_sum s = { 0, 0 };\n"
"    if (score == SCORE_SOFTMAX) {\n"
"        u32 top = KEY_NEG_INF;\n"
"        f32 sum = 0;\n"
"#pragma unroll\n"
"        for (u32 i = 0; i < PER_LANE; i++) top = max_u32(top, order_of(x[i]));\n"
"        s.best = of_order(redux_max(top));\n"
"        const f32 best = s.best;\n"
"        if (best != -INF_F32) {\n"
"            map_fast(rows, width, x, [=](f32 v) { return exp_f32(v - best); });\n"
"        } else {\n"
"#pragma unroll\n"
"            for (u32 i = 0; i < PER_LANE; i++) x[i] = 0;\n"
"        }\n"
"#pragma unroll\n"
"        for (u32 i = 0; i < PER_LANE; i++) sum = (i32)(32 * i) < (i32)(width - lane()) \? sum + x[i] : sum;\n"
"        s.sum = lanes_sum(sum);\n"
"        if (all && s.sum > 0) divide_row(rows, width, x, s.sum);\n"
"    } else if (all && score == SCORE_SIGMOID) {\n"
"        map_fast(rows, width, x, [](f32 v) { return sigmoid_f32(v); });\n"
"    } else if (all && score == SCORE_SQRT_SOFTPLUS) {\n"
"        map_row(rows, width, x, [](f32 v) { return sqrt_softplus_f32(v); });\n"
"    }\n"
"    return s;\n"
"}\n"
"\n"
"// How a group ranks, from its keys in rows.key: the larger key, or the sum of the two largest.\n"
"DI u32 group_rank(const u32 *key, u32 size, bool two)\n"
"{\n"
"    u32 first = KEY_NEG_INF, second = KEY_NEG_INF;\n"
"    for (u32 i = 0; i < size; i++) {\n"
"        u32 k = key[i];\n"
"        if (k > first) { second = first; first = k; }\n"
"        else if (k > second) second = k;\n"
"    }\n"
"    return two \? order_of(of_order(first) + of_order(second)) : first;\n"
"}\n"
"\n"
"// The same for groups of 32, which are a register each (too many of them would be under way with P > 16).\n"
"DI void group_ranks_32(const u32 (&key)[PER_LANE], u32 groups, bool two, u32 *rank)\n"
"{\n"
"#pragma unroll\n"
"    for (u32 i = 0; i < PER_LANE; i++) {\n"
"        if (i >= groups) break;\n"
"        u32 first = redux_max(key[i]), value = first;\n"
"        if (two) {\n"
"            u32 equal = ballot(key[i] == first);\n"
"            u32 second = redux_max(popc(equal) > 1 || key[i] != first \? key[i] : 0);\n"
"            value = order_of(of_order(first) + of_order(second));\n"
"        }\n"
"        if (lane() == 0) rank[i] = value;\n"
"    }\n"
"}\n"
"\n"
"// rank[g] becomes 0 for the groups that are kept.\n"
"DI void keep_groups(u32 groups, i32 kept, u32 *rank)\n"
"{\n"
"    if (groups <= 32) {\n"
"        u32 key[1] = { lane() < groups \? rank[lane()] : 0 };\n"
"        i32 unused = 0;\n"
"        top_k(key, 0, kept, unused);\n"
"        if (lane() < groups) rank[lane()] = key[0];\n"
"        return;\n"
"    }\n"
"    for (i32 j = 0; j < kept; j++) {\n"
"        u32 best = 0, place = lane();\n"
"        for (u32 g = lane(); g < groups; g += 32) {\n"
"            u32 key = rank[g]; // only this lane reads and writes it\n"
"            if (key > best) { best = key; place = g; }\n"
"        }\n"
"        u32 most = redux_max(best);\n"
"        if (place == redux_min(best == most \? place : 0xffffffffu)) rank[place] = 0;\n"
"    }\n"
"}\n"
"\n"
"// Ranks groups; the keys of those that are not kept become the excluded value.\n"
"DI void route_groups(const tokens_args &a, const warp_rows &rows, u32 (&key)[PER_LANE])\n"
"{\n"
"    const routing_args &r = a.routing;\n"
"    const u32 experts = (u32)a.num_experts, groups = (u32)r.groups, size = experts / groups;\n"
"    const u32 inverse = (1u << 21) / size + 1; // e * inverse >> 21 is e / size for e < 2048\n"
"    const u32 excluded = r.group_excluded == EXCLUDED_ZERO \? KEY_ZERO : KEY_NEG_INF;\n"
"    const bool two = r.group_rule == GROUP_TOP2_SUM;\n"
"    if (size == 32 && PER_LANE <= 16) {\n"
"        group_ranks_32(key, groups, two, rows.key);\n"
"        warp_sync();\n"
"    } else {\n"
"#pragma unroll\n"
"        for (u32 i = 0; i < PER_LANE; i++) rows.key[lane() + 32 * i] = key[i];\n"
"        warp_sync();\n"
"        for (u32 base = 0; base < groups; base += 32) { // ranks overwrite keys that have been read\n"
"            u32 g = base + lane(), rank = g < groups \? group_rank(rows.key + g * size, size, two) : 0;\n"
"            warp_sync();\n"
"            if (g < groups) rows.key[g] = rank;\n",
"            warp_sync();\n"
"        }\n"
"    }\n"
"    keep_groups(groups, r.groups_kept, rows.key);\n"
"    warp_sync();\n"
"#pragma unroll\n"
"    for (u32 i = 0; i < PER_LANE; i++) {\n"
"        u32 e = lane() + 32 * i;\n"
"        if (e < experts && rows.key[e * inverse >> 21] != 0) key[i] = excluded;\n"
"    }\n"
"    warp_sync();\n"
"}\n"
"\n"
"// Lane j < top_k gets the j-th expert. x: what ranks, behind which the bias is added. Says whether a key was NaN or\n"
"// +inf.\n"
"DI bool route_choose(const tokens_args &a, i32 bias_row, const warp_rows &rows, f32 (&x)[PER_LANE], i32 &chosen)\n"
"{\n"
"    const routing_args &r = a.routing;\n"
"    const u32 ranked = (u32)(a.num_experts + r.special_experts);\n"
"    u32 key[PER_LANE];\n"
"    bool bad = false;\n"
"    if (r.bias_rows > 0) {\n"
"        f32 bias[PER_LANE];\n"
"        load_row(a.bias + (i64)bias_row * ranked, ranked, 0.0f, bias);\n"
"#pragma unroll\n"
"        for (u32 i = 0; i < PER_LANE; i++) x[i] = x[i] + bias[i];\n"
"    }\n"
"#pragma unroll\n"
"    for (u32 i = 0; i < PER_LANE; i++) {\n"
"        bool wrong = !(x[i] < INF_F32), there = (i32)(32 * i) < (i32)(ranked - lane());\n"
"        bad |= wrong && there;\n"
"        key[i] = !there \? 0 : wrong \? KEY_NEG_INF : order_of(x[i]);\n"
"    }\n"
"    const bool each = r.groups > 1 && r.group_rule == GROUP_EACH; // top_k / groups of each group, in group order\n"
"    const i32 parts = each \? r.groups : 1, count = r.top_k / parts;\n"
"    const u32 size = ranked / (u32)parts;\n"
"    if (!each) {\n"
"        if (r.groups > 1) route_groups(a, rows, key);\n"
"        top_k_row(key, count, rows.key, chosen);\n"
"        return ballot(bad) != 0;\n"
"    }\n"
"#pragma unroll\n"
"    for (u32 i = 0; i < PER_LANE; i++) rows.key[lane() + 32 * i] = key[i];\n"
"    for (i32 part = 0; part < parts; part++) {\n"
"#pragma unroll\n"
"        for (u32 i = 0; i < PER_LANE; i++) { // the keys of this part, which this lane wrote\n"
"            u32 e = lane() + 32 * i;\n"
"            key[i] = e - (u32)part * size < size \? rows.key[e] : 0;\n"
"        }\n"
"        top_k(key, part * count, count, chosen);\n"
"    }\n"
"    return ballot(bad) != 0;\n"
"}\n"
"\n"
"// PhiMoE: k times the best of the rest, weighted by a softmax over those of the rest that are close to it.\n"
"DI void route_sparse_mixer(const tokens_args &a, const warp_rows &rows, token_slots &s)\n"
"{\n"
"    const u32 ranked = (u32)(a.num_experts + a.routing.special_experts);\n"
"    const f32 threshold = 2.0f * a.routing.sparse_mixer;\n"
"    f32 *rest = (f32 *)rows.key;\n"
"    for (u32 e = lane(); e < ranked; e += 32) rest[e] = rows.logit[e];\n"
"    for (i32 j = 0; j < a.routing.top_k; j++) {\n"
"        u32 best = 0, place = lane();\n"
"        for (u32 e = lane(); e < ranked; e += 32) {\n"
"            u32 key = order_of(rest[e]);\n"
"            if (key > best) { best = key; place = e; }\n"
"        }\n"
"        u32 most = redux_max(best), id = redux_min(best == most \? place : 0xffffffffu);\n"
"        warp_sync();\n"
"        f32 top = rest[id], sum = 0;\n"
"        for (u32 e = lane(); e < ranked; e += 32) {\n"
"            f32 logit = rows.logit[e], size = abs_f32(logit), far = (top - logit) / (size > top \? size : top);\n"
"            sum = sum + (far > threshold || top == -INF_F32 \? 0 : exp_f32(rest[e] - top));\n"
"        }\n"
"        sum = lanes_sum(sum);\n"
"        if ((i32)lane() == j) {\n"
"            s.id[0] = (i32)id;\n"
"            s.weight[0] = sum > 0 \? 1.0f / sum : 0;\n"
"        }\n"
"        warp_sync();\n"
"        if (lane() == id % 32) rest[id] = -INF_F32;\n"
"    }\n"
"    warp_sync();\n"
"}\n"
"\n"
"// Scores of the chosen, and of the always-on experts where the router scores them; renormalised.\n"
"DI void route_weights(const tokens_args &a, const warp_rows &rows, softmax_sum sum_of_row, token_slots &s)\n"
"{\n"
"    const routing_args &r = a.routing;\n"
"    const u32 n = (u32)(r.top_k + (r.extra_scored \? r.extra_slots : 0));\n"
"    const bool second = n > 32;\n"
"    f32 x[2], w[2] = { 0, 0 };\n"
"    for (u32 h = 0; h < 2; h++) x[h] = lane() + 32 * h < n \? rows.logit[s.id[h]] : -INF_F32;\n"
"    if (r.score_order == SCORE_AFTER_TOPK && r.score == SCORE_SOFTMAX) {\n"
"        f32 best = of_order(redux_max(max_u32(order_of(x[0]), order_of(x[1]))));\n",
"        f32 sum = best == -INF_F32 \? 0 : exp_f32(x[0] - best);\n"
"        if (second) sum = sum + (best == -INF_F32 \? 0 : exp_f32(x[1] - best));\n"
"        sum_of_row.best = best;\n"
"        sum_of_row.sum = lanes_sum(sum);\n"
"    }\n"
"    w[0] = score_of(r.score, x[0], sum_of_row);\n"
"    if (second) w[1] = score_of(r.score, x[1], sum_of_row);\n"
"    for (u32 h = 0; h < 2; h++)\n"
"        if (lane() + 32 * h >= n || w[h] == -INF_F32) w[h] = 0;\n"
"    if (r.renormalize != RENORMALIZE_OFF) {\n"
"        f32 sum = lanes_sum(0.0f + w[0] + w[1]), divisor = sum;\n"
"        if (r.renormalize == RENORMALIZE_SUM) divisor = sum + r.renormalize_epsilon;\n"
"        else if (sum < r.renormalize_epsilon) divisor = r.renormalize_epsilon;\n"
"        if (r.zero_sum == ZERO_SUM_ONE && !(sum > 0)) divisor = 1;\n"
"        if (w[0] != 0) w[0] = w[0] / divisor;\n"
"        if (second && w[1] != 0) w[1] = w[1] / divisor;\n"
"    }\n"
"    for (u32 h = 0; h < 2; h++)\n"
"        if (lane() + 32 * h < n) s.weight[h] = w[h];\n"
"}\n"
"\n"
"// Pseudo-random 32 bits of (seed, token, draw): splitmix64's finaliser.\n"
"DI u32 route_random(u32 seed, i64 token, i32 draw)\n"
"{\n"
"    u64 z = (((u64)seed << 32) ^ ((u64)token << 6 | (u64)draw)) + 0x9e3779b97f4a7c15ull;\n"
"    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;\n"
"    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;\n"
"    return (u32)((z ^ (z >> 31)) >> 32);\n"
"}\n"
"\n"
"// Weight of expert e in a draw: nothing behind the last one, and for those drawn before.\n"
"DI u32 draw_weight(const tokens_args &a, const u32 *drawn, u32 e)\n"
"{\n"
"    if (e >= (u32)a.num_experts || drawn[e] != 0) return 0;\n"
"    return a.routing.simulate == SIMULATE_ZIPF \? 0x1000000u / (e + 1) : 1;\n"
"}\n"
"\n"
"// Draws without replacement, by integers. 32 experts at a time: the first whose running sum passes the number drawn.\n"
"DI void route_simulate(const tokens_args &a, i64 token, const warp_rows &rows, i32 &chosen)\n"
"{\n"
"    const routing_args &r = a.routing;\n"
"    const u32 experts = (u32)a.num_experts;\n"
"    u32 *drawn = rows.key, total = 0;\n"
"    if (r.simulate == SIMULATE_ROUND_ROBIN)\n"
"        chosen = (i32)(((u64)token * (u64)r.top_k + lane()) % experts);\n"
"    else chosen = (i32)lane();\n"
"    if (r.simulate != SIMULATE_UNIFORM && r.simulate != SIMULATE_ZIPF) return;\n"
"    for (u32 e = lane(); e < experts; e += 32) {\n"
"        drawn[e] = 0;\n"
"        total += draw_weight(a, drawn, e);\n"
"    }\n"
"    total = redux_add(total); // below 2^28\n"
"    for (i32 j = 0; j < r.top_k; j++) {\n"
"        u32 at = (u32)((u64)route_random(r.simulate_seed, token, j) * total >> 32), id = 0, mine = 0;\n"
"        for (u32 base = 0; base < experts; base += 32) {\n"
"            u32 running = mine = draw_weight(a, drawn, base + lane());\n"
"            for (u32 step = 1; step < 32; step *= 2) {\n"
"                u32 below = shfl_up(running, step);\n"
"                if (lane() >= step) running += below;\n"
"            }\n"
"            u32 past = ballot(at < running);\n"
"            if (past != 0) { id = base + ffs(past) - 1; break; }\n"
"            at -= shfl(running, 31);\n"
"        }\n"
"        total -= shfl(mine, id % 32);\n"
"        if (lane() == id % 32) drawn[id] = 1; // only this lane reads it\n"
"        if ((i32)lane() == j) chosen = (i32)id;\n"
"    }\n"
"}\n"
"\n"
"// Scores, choice and weights of a token that is not simulated. forced: its row of the forced table, or NULL. Says\n"
"// whether a logit or a key was NaN or +inf.\n"
"DI bool route_run(const tokens_args &a, i64 token, const i32 *forced, i32 bias_row, const warp_rows &rows,\n"
"                  token_slots &s)\n"
"{\n"
"    const routing_args &r = a.routing;\n"
"    f32 x[PER_LANE];\n"
"    softmax_sum sum = { 0, 0 };\n"
"    bool bad = route_logits(a, token, rows, x);\n"
"    if (r.sparse_mixer > 0) {\n"
"        route_sparse_mixer(a, rows, s);\n"
"        return bad;\n"
"    }\n"
"    if (r.score_order == SCORE_BEFORE_TOPK && (r.score == SCORE_SOFTMAX || (r.select == SELECT_SCORE && !forced)))\n"
"        sum = route_scores(r.score, r.select == SELECT_SCORE && !forced, rows, (u32)a.width, x);\n"
"    if (forced != nullptr) {\n"
"        if ((i32)lane() < r.top_k) s.id[0] = forced[lane()];\n"
"    } else {\n",
"        if (r.score_order == SCORE_BEFORE_TOPK && r.score == SCORE_SOFTMAX && r.select == SELECT_LOGIT)\n"
"            load_row(rows.logit, (u32)a.width, -INF_F32, x); // the softmax has taken their place\n"
"        bad |= route_choose(a, bias_row, rows, x, s.id[0]);\n"
"    }\n"
"    route_weights(a, rows, sum, s);\n"
"    return bad;\n"
"}\n"
"\n"
"// Scales, special experts, faults: what is done to every slot at the end.\n"
"DI void route_finish(const tokens_args &a, bool lost, token_slots &s)\n"
"{\n"
"    const routing_args &r = a.routing;\n"
"    f32 scale = a.global_scale != nullptr \? r.scale * *a.global_scale : r.scale;\n"
"    for (u32 h = 0; h < 2; h++) {\n"
"        i32 slot = (i32)(lane() + 32 * h);\n"
"        if (slot >= a.slots) break;\n"
"        if (lost) { s.id[h] = -1; s.weight[h] = 0; continue; }\n"
"        if (slot >= r.top_k && !r.extra_scored) continue;\n"
"        if (r.scale_on == SCALE_ON_WEIGHTS) s.weight[h] = s.weight[h] * scale;\n"
"        if (slot >= r.top_k) continue;\n"
"        if (r.per_expert_scale) s.weight[h] = s.weight[h] * a.per_expert_scale[s.id[h]];\n"
"        if (s.id[h] >= a.num_experts && r.special_kind == SPECIAL_SKIP) { s.id[h] = -1; s.weight[h] = 0; }\n"
"    }\n"
"}\n"
"\n"
"DI i64 load_id(const void *ids, i32 dtype, i64 at)\n"
"{\n"
"    return dtype == DTYPE_I64 \? ((const i64 *)ids)[at] : ((const i32 *)ids)[at];\n"
"}\n"
"\n"
"// Routes one token from its logits. Returns 1 << MOE_FAULT_... of what was wrong.\n"
"DI u32 route_token(const tokens_args &a, i64 token, const warp_rows &rows, token_slots &s)\n"
"{\n"
"    const routing_args &r = a.routing;\n"
"    const i64 token_id = a.token_ids == nullptr \? -1 : load_id(a.token_ids, a.ids_dtype, token);\n"
"    const bool marked = token_id >= r.marked_token_lo && token_id < r.marked_token_hi;\n"
"    const i32 *forced = nullptr;\n"
"    i32 bias_row = r.bias_rows == 2 && marked;\n"
"    bool lost = false, bad = false;\n"
"    for (u32 h = 0; h < 2; h++) {\n"
"        i32 slot = (i32)(lane() + 32 * h);\n"
"        s.id[h] = slot < r.top_k \? -1 : a.num_experts + r.special_experts + slot - r.top_k;\n"
"        s.weight[h] = slot < r.top_k \? 1.0f / (f32)r.top_k : r.extra_weight;\n"
"    }\n"
"    if (a.bias_index != nullptr && r.bias_rows > 0) {\n"
"        bias_row = a.bias_index[token];\n"
"        lost = bias_row < 0 || bias_row >= r.bias_rows;\n"
"    }\n"
"    if (r.forced_rows > 0 && !marked) {\n"
"        if (token_id < 0 || token_id >= r.forced_rows) lost = true;\n"
"        else forced = a.forced_ids + token_id * r.top_k;\n"
"    }\n"
"    if (r.simulate != SIMULATE_OFF) {\n"
"        i32 chosen = 0;\n"
"        route_simulate(a, token, rows, chosen);\n"
"        if ((i32)lane() < r.top_k) s.id[0] = chosen;\n"
"        if (lost) s = { { -1, -1 }, { 0, 0 } };\n"
"        return lost \? 1u << FAULT_TOKEN_IDS : 0;\n"
"    }\n"
"    if (!lost) bad = route_run(a, token, forced, bias_row, rows, s);\n"
"    route_finish(a, lost, s);\n"
"    return lost \? 1u << FAULT_TOKEN_IDS : bad \? 1u << FAULT_NAN_LOGITS : 0;\n"
"}\n"
"\n"
"// The caller's ids and weights of one token. Returns how many of its ids are out of range.\n"
"DI u32 read_token(const tokens_args &a, i64 token, token_slots &s)\n"
"{\n"
"    u32 wrong = 0;\n"
"    for (u32 h = 0; h < 2; h++) {\n"
"        i32 slot = (i32)(lane() + 32 * h);\n"
"        i64 at = token * a.slots + slot, id = -1;\n"
"        bool there = slot < a.slots, outside;\n"
"        u32 packed = 0;\n"
"        s.weight[h] = 0;\n"
"        if (there && a.input_mode == INPUT_PACKED) {\n"
"            packed = ((const u32 *)a.ids)[at];\n"
"            id = (i16)(u16)(packed >> 16);\n"
"        } else if (there) {\n"
"            id = load_id(a.ids, a.ids_dtype, at);\n"
"        }\n"
"        if (a.end_is_none && id == a.ids_end) id = -1;\n"
"        outside = id < -1 || id >= a.ids_end;\n"
"        wrong += popc(ballot(outside));\n"
"        s.id[h] = outside \? -1 : (i32)id;\n"
"        if (s.id[h] < 0) continue;\n"
"        if (a.input_mode == INPUT_PACKED) s.weight[h] = bf16_f32((u16)packed);\n"
"        else if (a.weights != nullptr) s.weight[h] = load_float(a.weights, a.weights_dtype, at);\n"
"    }\n"
"    return wrong;\n"
"}\n"
"\n"
"// Ids and weights of one token, by input mode, to where they go; adds to this warp's faults.\n",
"DI void do_token(const tokens_args &a, i64 token, const warp_rows &rows, token_slots &s, u32 (&faults)[4])\n"
"{\n"
"    if (a.input_mode == INPUT_LOGITS) {\n"
"        u32 fault = route_token(a, token, rows, s);\n"
"        faults[FAULT_NAN_LOGITS] += fault >> FAULT_NAN_LOGITS & 1;\n"
"        faults[FAULT_TOKEN_IDS] += fault >> FAULT_TOKEN_IDS & 1;\n"
"    } else {\n"
"        faults[FAULT_IDS] += read_token(a, token, s);\n"
"    }\n"
"    for (u32 h = 0; h < 2; h++) {\n"
"        i32 slot = (i32)(lane() + 32 * h);\n"
"        if (slot >= a.slots) break;\n"
"        if (a.out_ids != nullptr) a.out_ids[token * a.slots + slot] = s.id[h];\n"
"        if (a.out_weights != nullptr) a.out_weights[token * a.slots + slot] = s.weight[h];\n"
"    }\n"
"    warp_sync(); // the next token overwrites the rows\n"
"}\n"
"\n"
"// >>permute  slots in expert order  A counting sort, stable: tokens stay in order inside an expert. Every warp has a\n"
"// run of neighbouring slots and counts ids in 16-bit counters of its own; counters become the places of its slots among\n"
"// those of the CTA; CTAs (of the cluster, or one a chunk) and experts are then added up. moe.h's moe_permute() gives\n"
"// the same tables.\n"
"//\n"
"//   u16 counter[W][S]  per warp and id: its slots; then those of the CTA's warps before; then where its next one goes\n"
"//   u32 own[S]         per id: slots of this CTA\n"
"//   u32 all[S]         per id: slots of all CTAs\n"
"//   i32 row[S]         per id: slots of the CTAs before; then the row of this CTA's first slot, -1 where not local\n"
"//   u32 first[S + 8]   per local expert: first row; behind the last one the end\n"
"\n"
"struct sort_memory {\n"
"    u16 *counter;\n"
"    u32 *own, *all;\n"
"    i32 *row;\n"
"    u32 *first;\n"
"    u32 *scan;   // [32] sums of warps\n"
"    u32 *faults; // [4]\n"
"    u32 stride;  // S\n"
"};\n"
"\n"
"// Lays them out from `memory` on (16-aligned); returns what is behind.\n"
"DI u8 *sort_layout(u8 *memory, u32 ids_end, sort_memory &m)\n"
"{\n"
"    m.stride = (ids_end + 7) / 8 * 8;\n"
"    m.counter = (u16 *)memory;\n"
"    m.own = (u32 *)(memory + 2 * m.stride * (ntid() / 32));\n"
"    m.all = m.own + m.stride;\n"
"    m.row = (i32 *)(m.all + m.stride);\n"
"    m.first = m.all + 2 * m.stride;\n"
"    m.scan = m.first + m.stride + 8;\n"
"    m.faults = m.scan + 32;\n"
"    return (u8 *)(m.faults + 24);\n"
"}\n"
"\n"
"// Local expert of an id, or -1.\n"
"DI i32 local_of(const permute_args &p, i32 id, i32 experts, i32 special)\n"
"{\n"
"    if (p.local_of_id != nullptr) return p.local_of_id[id];\n"
"    if (id < experts) {\n"
"        i32 local = id - p.local_first;\n"
"        return local >= 0 && local < p.local_routed \? local : -1;\n"
"    }\n"
"    i32 local = p.local_routed + id - experts - special;\n"
"    return id >= experts + special && local < p.local_experts \? local : -1;\n"
"}\n"
"\n"
"// Adds the warp's 32 ids (-1: none) to its counters. Returns what each slot's counter was, lower lanes of the same id\n"
"// included.\n"
"DI u32 count_ids(u16 *counter, i32 id)\n"
"{\n"
"    u32 same = match_any((u32)id), below = popc(same & ((1u << lane()) - 1)), before = 0;\n"
"    if (id >= 0) before = counter[id];\n"
"    warp_sync();\n"
"    if (id >= 0 && below == 0) counter[id] = (u16)(before + popc(same));\n"
"    warp_sync();\n"
"    return before + below;\n"
"}\n"
"\n"
"// rows / tile.\n"
"DI u32 tiles_of(const permute_args &p, u32 rows)\n"
"{\n"
"    return p.tile_shift >= 0 \? rows >> p.tile_shift : rows / (u32)p.tile;\n"
"}\n"
"\n"
"DI void clear_words(u32 *word, u32 n)\n"
"{\n"
"    for (u32 i = tid(); i < n; i += ntid()) word[i] = 0;\n"
"}\n"
"\n"
"// Counters of each id become sums over the warps before; own[id] their sum.\n"
"template <u32 WARPS> DI void sum_warps(const sort_memory &m, u32 ids_end)\n"
"{\n"
"    for (u32 id = tid(); id < ids_end; id += ntid()) {\n"
"        u32 count[WARPS], sum = 0;\n"
"#pragma unroll\n"
"        for (u32 w = 0; w < WARPS; w++) count[w] = m.counter[w * m.stride + id];\n"
"#pragma unroll\n"
"        for (u32 w = 0; w < WARPS; w++) {\n"
"            m.counter[w * m.stride + id] = (u16)sum;\n"
"            sum += count[w];\n"
"        }\n"
"        m.own[id] = sum;\n"
"    }\n"
"}\n"
"\n"
"// value[0 .. n) becomes the sum of those before it, each rounded up to p.tile; value[n] the sum of all.\n",
"DI void scan_tiles(const permute_args &p, u32 *value, u32 n, u32 *scan)\n"
"{\n"
"    u32 each = 1, sum = 0, running, before;\n"
"    while (each * ntid() < n) each++;\n"
"    const u32 begin = tid() * each < n \? tid() * each : n, end = begin + each < n \? begin + each : n;\n"
"    for (u32 i = begin; i < end; i++) {\n"
"        u32 count = value[i], padded = tiles_of(p, count + (u32)p.tile - 1) * (u32)p.tile;\n"
"        value[i] = sum;\n"
"        sum += padded;\n"
"    }\n"
"    running = sum;\n"
"    for (u32 step = 1; step < 32; step *= 2) {\n"
"        u32 below = shfl_up(running, step);\n"
"        if (lane() >= step) running += below;\n"
"    }\n"
"    if (lane() == 31) scan[warp()] = running;\n"
"    cta_sync();\n"
"    before = redux_add(lane() < warp() \? scan[lane()] : 0) + running - sum;\n"
"    for (u32 i = begin; i < end; i++) value[i] += before;\n"
"    if (tid() == ntid() - 1) value[n] = before + sum;\n"
"    cta_sync();\n"
"}\n"
"\n"
"// From all[id] and row[id]: first row of each local expert, first row of this CTA for each id. A thread takes the ids\n"
"// that it wrote. first[] is zero before.\n"
"DI void place_experts(const permute_args &p, const sort_memory &m, u32 ids_end, i32 experts, i32 special)\n"
"{\n"
"    const u32 local_experts = (u32)p.local_experts;\n"
"    for (u32 id = tid(); id < ids_end; id += ntid()) {\n"
"        i32 local = local_of(p, (i32)id, experts, special);\n"
"        if (local >= 0) m.first[local] = m.all[id];\n"
"    }\n"
"    cta_sync();\n"
"    scan_tiles(p, m.first, local_experts, m.scan);\n"
"    for (u32 id = tid(); id < ids_end; id += ntid()) {\n"
"        i32 local = local_of(p, (i32)id, experts, special);\n"
"        m.row[id] = local >= 0 \? m.row[id] + (i32)m.first[local] : -1;\n"
"    }\n"
"}\n"
"\n"
"// What an expert has: its count, its tiles, -1 in the rows of its last tile that no slot has. By `team` threads, this\n"
"// one is number `at`.\n"
"DI void write_expert(const permute_args &p, const sort_memory &m, i32 local, u32 count, u32 at, u32 team)\n"
"{\n"
"    const u32 begin = m.first[local], next = m.first[local + 1], limit = begin + count, tile = (u32)p.tile;\n"
"    if (p.expert_counts != nullptr && at == 0) p.expert_counts[local] = (i32)count;\n"
"    for (u32 i = tiles_of(p, begin) + at; i < tiles_of(p, next); i += team) {\n"
"        u32 end = (i + 1) * tile;\n"
"        if (p.tile_expert != nullptr) p.tile_expert[i] = local;\n"
"        if (p.tile_limit != nullptr) p.tile_limit[i] = (i32)(end < limit \? end : limit);\n"
"    }\n"
"    if (p.slot_of_row != nullptr)\n"
"        for (u32 row = limit + at; row < next; row += team) p.slot_of_row[row] = -1;\n"
"}\n"
"\n"
"// Tables that do not depend on single slots; CTA `part` of `parts` writes its share, of the experts every parts-th one.\n"
"DI void write_tables(const permute_args &p, const sort_memory &m, u32 ids_end, i32 experts, i32 special, u32 part,\n"
"                     u32 parts)\n"
"{\n"
"    const u32 local_experts = (u32)p.local_experts, end = m.first[local_experts], thread = part * ntid() + tid();\n"
"    const u32 threads = parts * ntid(), team = p.tile <= 16 \? 1 : 8; // threads of an expert\n"
"    for (u32 id = part + tid() / team * parts; id < ids_end; id += ntid() / team * parts) {\n"
"        i32 local = local_of(p, (i32)id, experts, special);\n"
"        if ((i32)id < experts && p.out_expert_counts != nullptr && tid() % team == 0)\n"
"            p.out_expert_counts[id] = (i32)m.all[id];\n"
"        if (local >= 0) write_expert(p, m, local, m.all[id], tid() % team, team);\n"
"    }\n"
"    if (p.expert_offsets != nullptr)\n"
"        for (u32 e = thread; e <= local_experts; e += threads) p.expert_offsets[e] = (i32)m.first[e];\n"
"    if (p.slot_of_row != nullptr)\n"
"        for (u32 row = end + thread; row < (u32)p.rows_max; row += threads) p.slot_of_row[row] = -1;\n"
"    if (thread == 0 && p.num_tiles != nullptr) p.num_tiles[0] = (i32)tiles_of(p, end);\n"
"}\n"
"\n"
"// Rows of the warp's next 32 slots; `id` of the slot in this lane, -1 where it has none.\n"
"DI void place_slots(const permute_args &p, const sort_memory &m, u16 *counter, i64 slot, bool there, i32 id)\n"
"{\n"
"    u32 before = count_ids(counter, id);\n"
"    i32 row = id >= 0 \? m.row[id] : -1;\n",
"    if (row >= 0) row += (i32)before;\n"
"    if (!there) return;\n"
"    if (p.row_of_slot != nullptr) p.row_of_slot[slot] = row;\n"
"    if (p.slot_of_row != nullptr && row >= 0) p.slot_of_row[row] = (i32)slot;\n"
"}\n"
"\n"
"// >>router  the router's own product  logits = W (x norm scale multiplier) + bias in fp32, in the order of moe.h's dot\n"
"// product: 16 lanes, lane l adds elements l, l + 16, ... That order leaves no choice of who multiplies what: 16 threads\n"
"// own a (token, expert) pair from end to end. So a half-warp is the unit; it keeps a tile of TM tokens x TN experts.\n"
"//\n"
"//   T         CTA tile, tokens x experts   half-warps   each    K of a stage\n"
"//   1         1 x 2                        1 x 2        1 x 1   4096\n"
"//   to 8      8 x 2                        8 x 2        1 x 1   1024\n"
"//   to 32     8 x 8                        4 x 4        2 x 2   512\n"
"//   to 512    16 x 16                      4 x 4        4 x 4   256\n"
"//   more      32 x 32                      4 x 4        8 x 8   64\n"
"//\n"
"// A CTA takes tiles cta, cta + ncta, ... It has two stages: while one is multiplied, cp.async fills the other's weights\n"
"// and x is on its way to registers. Behind norm and scale x is put down in pairs, k and k + 16 side by side. Rows of\n"
"// weights are 16 words longer than their contents, so that the halves of a warp do not meet in a bank.\n"
"\n"
"#ifndef MOE_P_BF16\n"
"#define MOE_P_BF16 0\n"
"#endif\n"
"\n"
"#if MOE_P_BF16\n"
"typedef u16 router_weight;\n"
"DI f32 widen_weight(router_weight w) { return bf16_f32(w); }\n"
"#else\n"
"typedef f32 router_weight;\n"
"DI f32 widen_weight(router_weight w) { return w; }\n"
"#endif\n"
"\n"
"enum { ROUTER_PAD = 16 };\n"
"\n"
"DI u32 lane16() { return tid() % 16; }\n"
"\n"
"// The sum of 16 lanes in the order of moe.h: lane + 8, + 4, + 2, + 1. All 16 get it.\n"
"DI f32 lanes16_sum(f32 x)\n"
"{\n"
"    for (u32 step = 8; step > 0; step /= 2) x = x + shfl_xor(x, step);\n"
"    return x;\n"
"}\n"
"\n"
"// x as it lies in memory, and later what that is: a conversion beside the load would make each load wait for the one\n"
"// before.\n"
"template <class X> DI X load_x(const router_args &a, u32 token, u32 k)\n"
"{\n"
"    return k < (u32)a.input_size \? ((const X *)a.x)[(i64)token * a.x_stride + k] : (X)0;\n"
"}\n"
"\n"
"DI f32 widen_x(const router_args &, f32 x) { return x; }\n"
"DI f32 widen_x(const router_args &a, u16 x) { return a.x_dtype == DTYPE_BF16 \? bf16_f32(x) : cvt_f16(x); }\n"
"\n"
"// 1 / sqrt(mean of squares + epsilon) of a token, by 16 threads; 1 without norm. Squares of the zeros behind the last\n"
"// element change no bit of the sum.\n"
"template <class X> DI f32 router_norm(const router_args &a, u32 token)\n"
"{\n"
"    f32 sum = 0;\n"
"    if (!a.rms_norm) return 1;\n"
"    for (u32 k = lane16(); k < (u32)a.ld; k += 16 * 16) {\n"
"        X raw[16];\n"
"#pragma unroll\n"
"        for (u32 i = 0; i < 16; i++) raw[i] = load_x<X>(a, token, k + 16 * i);\n"
"#pragma unroll\n"
"        for (u32 i = 0; i < 16; i++) {\n"
"            f32 x = widen_x(a, raw[i]);\n"
"            sum = fmaf(x, x, sum);\n"
"        }\n"
"    }\n"
"    return 1.0f / sqrt_rn(lanes16_sum(sum) / (f32)a.input_size + a.norm_epsilon);\n"
"}\n"
"\n"
"DI f32 router_scaled(const router_args &a, f32 x, f32 norm, u32 k)\n"
"{\n"
"    f32 scale = a.input_scale != nullptr && k < (u32)a.input_size \? a.input_scale[k] : 1;\n"
"    return x * norm * scale * a.input_multiplier;\n"
"}\n"
"\n"
"// Weights [first, first + ROWS) x [k0, k0 + K) into a stage, by all threads; zeros where there are none.\n"
"template <u32 ROWS, u32 K> DI void load_weights(const router_args &a, router_weight *stage, u32 first, u32 k0)\n"
"{\n"
"    const u32 piece = 16 / sizeof(router_weight), pieces = K / piece;\n"
"    const router_weight *w = (const router_weight *)a.weight;\n"
"    for (u32 i = tid(); i < ROWS * pieces; i += ntid()) {\n"
"        u32 row = i / pieces, k = k0 + i % pieces * piece;\n"
"        bool there = first + row < (u32)a.width && k < (u32)a.ld;\n"
"        cp_async_16(stage + row * (K + ROUTER_PAD) + i % pieces * piece,\n"
"                    there \? w + (i64)(first + row) * a.ld + k : w, there \? 16 : 0);\n"
"    }\n"
"}\n"
"\n"
"DI void router_store(const router_args &a, f32 sum, u32 token, u32 expert, u32 tokens)\n"
"{\n",
"    if (lane16() != 0 || token >= tokens || expert >= (u32)a.width) return;\n"
"    a.out[(i64)token * a.width + expert] = a.bias == nullptr \? sum : sum + a.bias[expert];\n"
"}\n"
"\n"
"// Adds `pairs` times 32 elements of a stage. x: this thread's of the first token; w: of the first expert.\n"
"template <u32 TM, u32 TN, u32 WN, u32 K> DI void router_multiply(const f32x2 *x, const router_weight *w, u32 pairs,\n"
"                                                                 f32 (&sum)[TM][TN])\n"
"{\n"
"#pragma unroll (TM * TN < 4 \? 8 : 1)\n"
"    for (u32 s = 0; s < pairs; s++) {\n"
"        f32x2 xs[TM];\n"
"#pragma unroll\n"
"        for (u32 i = 0; i < TM; i++) xs[i] = x[i * (K / 2) + 16 * s];\n"
"#pragma unroll\n"
"        for (u32 h = 0; h < 2; h++) {\n"
"            f32 ws[TN];\n"
"#pragma unroll\n"
"            for (u32 j = 0; j < TN; j++) ws[j] = widen_weight(w[j * WN * (K + ROUTER_PAD) + 32 * s + 16 * h]);\n"
"#pragma unroll\n"
"            for (u32 i = 0; i < TM; i++)\n"
"#pragma unroll\n"
"                for (u32 j = 0; j < TN; j++) sum[i][j] = fmaf(h == 0 \? xs[i].x : xs[i].y, ws[j], sum[i][j]);\n"
"        }\n"
"    }\n"
"}\n"
"\n"
"// TM WM tokens from `first_token` on x TN WN experts from `first` on. Half-warp h has tokens h / WN TM ..., experts\n"
"// h % WN, + WN, + 2 WN, ...\n"
"template <class X, u32 TM, u32 TN, u32 WM, u32 WN, u32 K>\n"
"DI void router_tile(const router_args &a, u32 first_token, u32 first, u32 tokens)\n"
"{\n"
"    const u32 height = TM * WM, breadth = TN * WN, each = height * K / 512, chunks = ((u32)a.ld + K - 1) / K;\n"
"    const u32 token0 = tid() / 16 / WN * TM, expert0 = tid() / 16 % WN;\n"
"    const bool busy = token0 < height && first_token + token0 < tokens;\n"
"    f32x2 *x_stage = (f32x2 *)smem();\n"
"    router_weight *w_stage = (router_weight *)(x_stage + height * K);\n"
"    f32 *norms = (f32 *)(w_stage + 2 * breadth * (K + ROUTER_PAD)), sum[TM][TN];\n"
"    for (u32 i = tid() / 16; i < (height + 15) / 16 * 16; i += 16) {\n"
"        f32 norm = router_norm<X>(a, first_token + i < tokens \? first_token + i : tokens - 1);\n"
"        if (lane16() == 0 && i < height) norms[i] = norm;\n"
"    }\n"
"#pragma unroll\n"
"    for (u32 i = 0; i < TM; i++)\n"
"#pragma unroll\n"
"        for (u32 j = 0; j < TN; j++) sum[i][j] = 0;\n"
"    cta_sync();\n"
"    for (u32 c = 0; c <= chunks; c++) { // loads chunk c, multiplies chunk c - 1\n"
"        X next[2 * each];\n"
"        if (c < chunks) {\n"
"            load_weights<breadth, K>(a, w_stage + c % 2 * breadth * (K + ROUTER_PAD), first, c * K);\n"
"#pragma unroll\n"
"            for (u32 i = 0; i < 2 * each; i++) {\n"
"                u32 pair = tid() + i / 2 * 256, token = first_token + pair / (K / 2);\n"
"                u32 k = c * K + pair % (K / 2) / 16 * 32 + i % 2 * 16 + lane16();\n"
"                next[i] = token < tokens \? load_x<X>(a, token, k) : (X)0;\n"
"            }\n"
"        }\n"
"        cp_async_commit();\n"
"        if (c > 0 && busy)\n"
"            router_multiply<TM, TN, WN, K>(\n"
"                x_stage + ((c - 1) % 2 * height + token0) * (K / 2) + lane16(),\n"
"                w_stage + ((c - 1) % 2 * breadth + expert0) * (K + ROUTER_PAD) + lane16(),\n"
"                (c < chunks \? K : (u32)a.ld - (chunks - 1) * K) / 32, sum);\n"
"        if (c < chunks) {\n"
"#pragma unroll\n"
"            for (u32 i = 0; i < each; i++) {\n"
"                u32 pair = tid() + i * 256, k = c * K + pair % (K / 2) / 16 * 32 + lane16();\n"
"                f32 norm = norms[pair / (K / 2)], x = router_scaled(a, widen_x(a, next[2 * i]), norm, k);\n"
"                f32 y = router_scaled(a, widen_x(a, next[2 * i + 1]), norm, k + 16);\n"
"                x_stage[c % 2 * height * (K / 2) + pair] = { x, y };\n"
"            }\n"
"        }\n"
"        cp_async_wait<0>();\n"
"        cta_sync();\n"
"    }\n"
"#pragma unroll\n"
"    for (u32 i = 0; i < TM; i++)\n"
"#pragma unroll\n"
"        for (u32 j = 0; j < TN; j++)\n"
"            router_store(a, lanes16_sum(sum[i][j]), busy \? first_token + token0 + i : tokens, first + expert0 + WN * j,\n"
"                         tokens);\n"
"}\n"
"\n"
"// All tiles of this CTA, experts fastest.\n"
"template <class X, u32 TM, u32 TN, u32 WM, u32 WN, u32 K> DI void router_tiles(const router_args &a, u32 tokens)\n"
"{\n",
"    const u32 height = TM * WM, breadth = TN * WN, across = ((u32)a.width + breadth - 1) / breadth;\n"
"    const u32 tiles = across * ((tokens + height - 1) / height);\n"
"    for (u32 tile = cta(); tile < tiles; tile += ncta())\n"
"        router_tile<X, TM, TN, WM, WN, K>(a, tile / across * height, tile % across * breadth, tokens);\n"
"}\n"
"\n"
"// Shapes go by the number of tokens that the host knows, because the grid does.\n"
"DI void router_run(const router_args &a, u32 tokens)\n"
"{\n"
"    const u32 bound = (u32)a.num_tokens;\n"
"    if (a.x_dtype == DTYPE_F32) router_tiles<f32, 4, 4, 4, 4, 256>(a, tokens);\n"
"    else if (bound <= 1) router_tiles<u16, 1, 1, 1, 2, 4096>(a, tokens);\n"
"    else if (bound <= 8) router_tiles<u16, 1, 1, 8, 2, 1024>(a, tokens);\n"
"    else if (bound <= 32) router_tiles<u16, 2, 2, 4, 4, 512>(a, tokens);\n"
"    else if (bound <= 512) router_tiles<u16, 4, 4, 4, 4, 256>(a, tokens);\n"
"    else router_tiles<u16, 8, 8, 4, 4, 64>(a, tokens);\n"
"}\n"
"\n"
"// >>entry  kernels\n"
"\n"
"#if PER_LANE > 16\n"
"#define ROUTE_ONE_THREADS 128\n"
"#define ROUTE_THREADS 128\n"
"#else\n"
"#define ROUTE_ONE_THREADS (PER_LANE > 8 \? 256 : 512)\n"
"#define ROUTE_THREADS (PER_LANE > 8 \? 512 : 1024)\n"
"#endif\n"
"\n"
"// Tokens of this call. A count on the device that is not within 0..num_tokens is a fault, and nothing is routed.\n"
"DI u32 count_tokens(const i32 *num_tokens_dev, i32 num_tokens, u32 &fault)\n"
"{\n"
"    i32 tokens = num_tokens_dev == nullptr \? num_tokens : *num_tokens_dev;\n"
"    bool wrong = tokens < 0 || tokens > num_tokens;\n"
"    fault = wrong;\n"
"    return wrong \? 0 : (u32)tokens;\n"
"}\n"
"\n"
"#if defined(MOE_K_ROUTE_ONE) || defined(MOE_K_ALL)\n"
"\n"
"// Sums of a word of shared memory over the cluster's CTAs: of all, and of those before this one. Always 8 loads, all\n"
"// under way at once.\n"
"DI u32 cluster_sums(const u32 *own, u32 rank, u32 ctas, u32 &before)\n"
"{\n"
"    u32 all = 0, count[8];\n"
"    before = 0;\n"
"    if (ctas == 1) return *own;\n"
"#pragma unroll\n"
"    for (u32 c = 0; c < 8; c++) count[c] = ld_cluster(mapa(own, c < ctas \? c : rank));\n"
"#pragma unroll\n"
"    for (u32 c = 0; c < 8; c++) {\n"
"        all += c < ctas \? count[c] : 0;\n"
"        before += c < rank \? count[c] : 0;\n"
"    }\n"
"    return all;\n"
"}\n"
"\n"
"// The whole of K0 for few tokens: a cluster of C CTAs, each with T / C neighbouring tokens, each of its warps with a\n"
"// run of those.\n"
"//\n"
"//   route      warps: token -> ids, weights; ids to shared memory, counters          | CTA barrier\n"
"//   sum        threads: ids; counters over warps -> own                              | cluster barrier\n"
"//   exchange   every CTA reads the others' own -> all, row                           | cluster barrier, whose\n"
"//   place      experts -> rows, then each warp its slots; tables shared out by CTA   | wait is the last thing\n"
"//\n"
"//   shared memory: u16 id[ceil(T / C) slots], sort_memory, two rows a warp. At most 128 registers.\n"
"MOE_ENTRY(moe_k_route_one, route_one_args, ROUTE_ONE_THREADS, 1)\n"
"{\n"
"    const u32 warps = ntid() / 32, slots = (u32)a.tokens.slots, ids_end = (u32)a.tokens.ids_end;\n"
"    const u32 ctas = MOE_ARCH >= 90 \? cluster_size() : 1, rank = MOE_ARCH >= 90 \? cluster_rank() : 0;\n"
"    const i32 experts = a.tokens.num_experts, special = a.tokens.routing.special_experts;\n"
"    const u32 room = ((u32)a.tokens.num_tokens + ctas - 1) / ctas * slots;\n"
"    u16 *ids = (u16 *)smem();\n"
"    u32 faults[4] = { 0, 0, 0, 0 };\n"
"    sort_memory m;\n"
"    warp_rows rows;\n"
"    u8 *behind = sort_layout(smem() + (room * 2 + 15) / 16 * 16, ids_end, m);\n"
"    u16 *counter = m.counter + warp() * m.stride;\n"
"    rows.logit = (f32 *)behind + warp() * 64 * PER_LANE;\n"
"    rows.key = (u32 *)rows.logit + 32 * PER_LANE;\n"
"    clear_words((u32 *)m.counter, warps * m.stride / 2);\n"
"    clear_words(m.first, m.stride + 8);\n"
"    clear_words(m.faults, 4);\n"
"    cta_sync();\n"
"    grid_wait();\n"
"    const u32 tokens = count_tokens(a.tokens.num_tokens_dev, a.tokens.num_tokens, faults[FAULT_COUNTS]);\n"
"    if (rank != 0 || tid() != 0) faults[FAULT_COUNTS] = 0;\n"
"    const u32 each = (tokens + ctas - 1) / ctas, begin = rank * each;\n",
"    const u32 mine = begin < tokens \? (tokens - begin < each \? tokens - begin : each) : 0;\n"
"    const u32 per_warp = (mine + warps - 1) / warps;\n"
"    const u32 from = warp() * per_warp < mine \? warp() * per_warp : mine;\n"
"    const u32 to = from + per_warp < mine \? from + per_warp : mine;\n"
"    for (u32 t = from; t < to; t++) {\n"
"        token_slots s;\n"
"        do_token(a.tokens, (i64)(begin + t), rows, s, faults);\n"
"        for (u32 h = 0; h < 2 && 32 * h < slots; h++) {\n"
"            u32 slot = lane() + 32 * h;\n"
"            i32 id = slot < slots \? s.id[h] : -1;\n"
"            if (slot < slots) ids[t * slots + slot] = (u16)id;\n"
"            count_ids(counter, id);\n"
"        }\n"
"    }\n"
"    if (lane() == 0)\n"
"        for (u32 f = 0; f < 4; f++)\n"
"            if (faults[f] != 0) red_add_shared(&m.faults[f], faults[f]);\n"
"    cta_sync();\n"
"    sum_warps<ROUTE_ONE_THREADS / 32>(m, ids_end);\n"
"    if (ctas > 1) cluster_sync();\n"
"    else cta_sync();\n"
"    u32 fault = 0, before;\n"
"    if (tid() < 4) fault = cluster_sums(&m.faults[tid()], rank, ctas, before);\n"
"    for (u32 id = tid(); id < ids_end; id += ntid()) {\n"
"        m.all[id] = cluster_sums(&m.own[id], rank, ctas, before);\n"
"        m.row[id] = (i32)before;\n"
"    }\n"
"    if (ctas > 1) cluster_arrive();\n"
"    place_experts(a.permute, m, ids_end, experts, special);\n"
"    cta_sync();\n"
"    write_tables(a.permute, m, ids_end, experts, special, rank, ctas);\n"
"    if (rank == 0 && tid() < 4 && a.permute.out_faults != nullptr) a.permute.out_faults[tid()] = fault;\n"
"    for (u32 at = from * slots; at < to * slots; at += 32) {\n"
"        bool there = at + lane() < to * slots;\n"
"        i32 id = there \? (i32)(i16)ids[at + lane()] : -1;\n"
"        place_slots(a.permute, m, counter, (i64)begin * slots + at + lane(), there, id);\n"
"    }\n"
"    if (ctas > 1) cluster_wait();\n"
"}\n"
"\n"
"#endif\n"
"\n"
"#if defined(MOE_K_ROUTE) || defined(MOE_K_ALL)\n"
"\n"
"// First half of K0 for many tokens: a CTA routes a chunk of neighbouring tokens, a warp one token after the other, and\n"
"// leaves behind how often each id occurs in it.\n"
"//\n"
"//   shared memory: u32 count[S], u32 fault[4], two rows a warp. 64 registers (128 for P > 8, 255 for P > 16).\n"
"MOE_ENTRY(moe_k_route, route_args, ROUTE_THREADS, 1)\n"
"{\n"
"    const u32 stride = (u32)a.counts_stride, slots = (u32)a.tokens.slots, chunk_tokens = (u32)a.chunk_tokens;\n"
"    u32 faults[4] = { 0, 0, 0, 0 }, *count = (u32 *)smem(), *fault = count + stride;\n"
"    warp_rows rows;\n"
"    rows.logit = (f32 *)(fault + 64) + warp() * 64 * PER_LANE;\n"
"    rows.key = (u32 *)rows.logit + 32 * PER_LANE;\n"
"    clear_words(count, stride + 4);\n"
"    cta_sync();\n"
"    grid_wait();\n"
"    grid_launch();\n"
"    const u32 tokens = count_tokens(a.tokens.num_tokens_dev, a.tokens.num_tokens, faults[FAULT_COUNTS]);\n"
"    if (cta() != 0 || tid() != 0) faults[FAULT_COUNTS] = 0;\n"
"    const u32 begin = cta() * chunk_tokens, end = begin + chunk_tokens < tokens \? begin + chunk_tokens : tokens;\n"
"    for (u32 t = begin + warp(); t < end; t += ntid() / 32) {\n"
"        token_slots s;\n"
"        do_token(a.tokens, (i64)t, rows, s, faults);\n"
"        for (u32 h = 0; h < 2 && 32 * h < slots; h++)\n"
"            if (lane() + 32 * h < slots && s.id[h] >= 0) red_add_shared(&count[s.id[h]], 1);\n"
"    }\n"
"    if (lane() == 0)\n"
"        for (u32 f = 0; f < 4; f++)\n"
"            if (faults[f] != 0) red_add_shared(&fault[f], faults[f]);\n"
"    cta_sync();\n"
"    u32 *pairs = (u32 *)(a.chunk_counts + (i64)cta() * stride);\n"
"    for (u32 i = tid(); i < stride / 2; i += ntid()) pairs[i] = count[2 * i] | count[2 * i + 1] << 16;\n"
"    if (tid() < 4) a.chunk_faults[4 * cta() + tid()] = fault[tid()];\n"
"}\n"
"\n"
"#endif\n"
"\n"
"#if defined(MOE_K_SORT) || defined(MOE_K_ALL)\n"
"\n"
"// Sums of the chunks' counters: all chunks into m.all, those before this CTA's into m.row. A thread takes two ids of\n"
"// every G-th chunk, so that a warp reads lines.\n"
"DI void sum_chunks(const sort_args &a, const sort_memory &m)\n"
"{\n"
"    const u32 pairs = (u32)a.counts_stride / 2, chunks = (u32)a.chunks;\n"
"    const u32 groups = pairs < ntid() \? ntid() / pairs : 1, step = pairs < ntid() \? pairs : ntid();\n",
"    const u32 group = pairs < ntid() \? tid() / pairs : 0;\n"
"    const u32 *counts = (const u32 *)a.chunk_counts;\n"
"    for (u32 pair = tid() % step; pair < pairs && group < groups; pair += step) {\n"
"        u32 low = 0, high = 0, low_before = 0, high_before = 0;\n"
"        for (u32 base = group; base < chunks; base += 32 * groups) { // 32 loads under way; their sums fit 16 bits\n"
"            u32 two[32], sum = 0, before = 0;\n"
"#pragma unroll\n"
"            for (u32 i = 0; i < 32; i++) {\n"
"                u32 c = base + i * groups;\n"
"                two[i] = c < chunks \? counts[c * pairs + pair] : 0;\n"
"            }\n"
"#pragma unroll\n"
"            for (u32 i = 0; i < 32; i++) {\n"
"                sum += two[i];\n"
"                before += base + i * groups < cta() \? two[i] : 0;\n"
"            }\n"
"            low += sum & 0xffff;\n"
"            high += sum >> 16;\n"
"            low_before += before & 0xffff;\n"
"            high_before += before >> 16;\n"
"        }\n"
"        red_add_shared(&m.all[2 * pair], low);\n"
"        red_add_shared(&m.all[2 * pair + 1], high);\n"
"        red_add_shared((u32 *)&m.row[2 * pair], low_before);\n"
"        red_add_shared((u32 *)&m.row[2 * pair + 1], high_before);\n"
"    }\n"
"    for (u32 i = tid(); i < 4 * chunks && cta() == 0; i += ntid())\n"
"        if (a.chunk_faults[i] != 0) red_add_shared(&m.faults[i % 4], a.chunk_faults[i]);\n"
"}\n"
"\n"
"// Second half of K0: a CTA places the slots of a chunk, each of its warps a run of them.\n"
"//\n"
"//   sum     threads: pairs of ids; counters of all chunks -> all, row\n"
"//   count   warps: their slots -> counter; threads: ids; counters over warps   | CTA barriers between\n"
"//   place   experts -> rows, then each warp its slots; tables shared out by CTA\n"
"//\n"
"//   shared memory: sort_memory. At most 80 registers.\n"
"MOE_ENTRY(moe_k_sort, sort_args, 256, 3)\n"
"{\n"
"    const u32 warps = ntid() / 32, slots = (u32)a.slots, ids_end = (u32)a.ids_end;\n"
"    u32 wrong;\n"
"    sort_memory m;\n"
"    sort_layout(smem(), ids_end, m);\n"
"    u16 *counter = m.counter + warp() * m.stride;\n"
"    clear_words((u32 *)m.counter, warps * m.stride / 2 + 4 * m.stride + 8);\n"
"    clear_words(m.faults, 4);\n"
"    cta_sync();\n"
"    grid_wait();\n"
"    const u32 tokens = count_tokens(a.num_tokens_dev, a.num_tokens, wrong);\n"
"    const u32 begin = cta() * (u32)a.chunk_tokens, left = begin < tokens \? tokens - begin : 0;\n"
"    const u32 mine = (left < (u32)a.chunk_tokens \? left : (u32)a.chunk_tokens) * slots;\n"
"    const u32 per_warp = (mine + 32 * warps - 1) / (32 * warps) * 32;\n"
"    const u32 from = warp() * per_warp < mine \? warp() * per_warp : mine;\n"
"    const u32 to = from + per_warp < mine \? from + per_warp : mine;\n"
"    const i32 *ids = a.ids + (i64)begin * slots;\n"
"    i32 next = from + lane() < to \? ids[from + lane()] : -1; // a step ahead of the loop\n"
"    sum_chunks(a, m);\n"
"    for (u32 at = from; at < to; at += 32) {\n"
"        i32 id = next;\n"
"        next = at + 32 + lane() < to \? ids[at + 32 + lane()] : -1;\n"
"        count_ids(counter, id);\n"
"    }\n"
"    cta_sync();\n"
"    sum_warps<8>(m, ids_end);\n"
"    place_experts(a.permute, m, ids_end, a.num_experts, a.special_experts);\n"
"    cta_sync();\n"
"    write_tables(a.permute, m, ids_end, a.num_experts, a.special_experts, cta(), ncta());\n"
"    if (cta() == 0 && tid() < 4 && a.permute.out_faults != nullptr) a.permute.out_faults[tid()] = m.faults[tid()];\n"
"    for (u32 at = from; at < to; at += 32) {\n"
"        bool there = at + lane() < to;\n"
"        place_slots(a.permute, m, counter, (i64)begin * slots + at + lane(), there, there \? ids[at + lane()] : -1);\n"
"    }\n"
"}\n"
"\n"
"#endif\n"
"\n"
"#if defined(MOE_K_ROUTER_LOGITS) || defined(MOE_K_ALL)\n"
"\n"
"// At most 128 registers.\n"
"MOE_ENTRY(moe_k_router_logits, router_args, 256, 2)\n"
"{\n"
"    u32 wrong;\n"
"    grid_wait();\n"
"    const u32 tokens = count_tokens(a.num_tokens_dev, a.num_tokens, wrong);\n"
"    if (cta() == 0 && tid() < 4 && a.out_faults != nullptr) a.out_faults[tid()] = tid() == FAULT_COUNTS \? wrong : 0;\n"
"    router_run(a, tokens);\n"
"}\n"
"\n"
"#endif\n"
};

static const char *const *moe__kernel_pieces(int32_t *count)
{
    *count = MOE__ARRAY_COUNT(moe__kernel_text);
    return moe__kernel_text;
}

static const char *moe__kernel_digest(void)
{
    return "8eeb777618dcbb7e874747b5b30ef3dde084326ec32b66dcce85660338455c5a";
}
#endif
// >>kernels-end

#endif // MOE__IMPLEMENTED
#endif // MOE_IMPLEMENTATION

// ---------------------------------------------------------------------------------------------------------------------
// >>history
//     0.1.0   routing, configuration, checkpoints, weights, CPU back end, reference
//
// MIT License
//
// Copyright (c) 2026 The moe.h authors
//
// Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
// documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
// rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
// permit persons to whom the Software is furnished to do so, subject to the following conditions:
//
// The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
// Software.
//
// THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
// WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
// COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
// OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
