// hello.rs - routes a token from Rust, linked to the shared library; and an error with its text
//
//     make lib && rustc -L build -o build/hello_rs examples/ffi/hello.rs && LD_LIBRARY_PATH=build build/hello_rs
use std::ffi::CStr;
use std::os::raw::{c_char, c_void};

#[repr(C)]
struct Error {
    code: i32,
    member: [c_char; 92],
    text: [c_char; 672],
}

#[repr(C)]
#[derive(Default)]
struct Routing { // moe_routing_desc, member by member
    struct_size: u32, score: i32, score_order: i32, select: i32, top_k: i32, logit_multiplier: f32, logit_softcap: f32,
    bias_rows: i32, groups: i32, groups_kept: i32, group_rule: i32, group_excluded: i32, renormalize: i32,
    renormalize_epsilon: f32, zero_sum: i32, scale: f32, scale_on: i32, per_expert_scale: i32, weight_on: i32,
    forced_rows: i32, marked_token_lo: i32, marked_token_hi: i32, special_experts: i32, special_kind: i32,
    extra_slots: i32, extra_scored: i32, extra_weight: f32, sparse_mixer: f32, global_scale: i32, simulate: i32,
    simulate_seed: u32, reserved: [u32; 5],
}

#[repr(C)]
struct RouteArgs { // moe_reference_route_args
    struct_size: u32, num_tokens: i32, num_experts: i32, ids_dtype: i32, logits: *const f32, bias: *const f32,
    bias_index: *const i32, per_expert_scale: *const f32, forced_ids: *const i32, token_ids: *const c_void,
    global_scale: f32, reserved0: i32, out_ids: *mut i32, out_weights: *mut f32, reserved: [u32; 4],
}

#[link(name = "moe")]
extern "C" {
    fn moe_version() -> i32;
    fn moe_routing_preset(method: i32, out: *mut Routing, err: *mut Error) -> i32;
    fn moe_reference_route(routing: *const Routing, args: *const RouteArgs, err: *mut Error) -> i32;
}

fn check(result: i32, err: &Error) -> Result<(), String> {
    if result == 0 { return Ok(()); }
    Err(unsafe { CStr::from_ptr(err.text.as_ptr()) }.to_string_lossy().into_owned())
}

fn route(logits: &[f32], top_k: usize) -> Result<(Vec<i32>, Vec<f32>), String> {
    let mut err: Error = unsafe { std::mem::zeroed() };
    let mut routing = Routing::default();
    routing.struct_size = std::mem::size_of::<Routing>() as u32;
    check(unsafe { moe_routing_preset(1, &mut routing, &mut err) }, &err)?; // MOE_ROUTING_RENORMALIZE
    routing.struct_size = std::mem::size_of::<Routing>() as u32;
    routing.top_k = top_k as i32;
    let (mut ids, mut weights) = (vec![0i32; top_k], vec![0f32; top_k]);
    let mut args: RouteArgs = unsafe { std::mem::zeroed() };
    args.struct_size = std::mem::size_of::<RouteArgs>() as u32;
    args.num_tokens = 1;
    args.num_experts = logits.len() as i32;
    args.logits = logits.as_ptr();
    args.out_ids = ids.as_mut_ptr();
    args.out_weights = weights.as_mut_ptr();
    check(unsafe { moe_reference_route(&routing, &args, &mut err) }, &err)?;
    Ok((ids, weights))
}

fn main() {
    let logits = [0.5, -1.0, 2.0, 1.5];
    println!("moe.h {}", unsafe { moe_version() });
    let (ids, weights) = route(&logits, 2).expect("two of four");
    println!("experts {:?}, weights {:?}", ids, weights);
    println!("{}", route(&logits, 5).expect_err("five of four"));
}
