// Forced in front of the kernel text where g++ compiles it for the emulated device: the names of >>ptx, each a call of
// the engine. Plain loads and stores reach the engine through -fsanitize=thread, whose callbacks it provides, and
// misaligned ones through -fsanitize=alignment.
#ifndef EMU_DEVICE_H
#define EMU_DEVICE_H

#include "emu.h"

#include <math.h>

#ifndef MOE_EMU
#define MOE_EMU 1
#endif
#ifndef MOE_ARCH
#define MOE_ARCH 90
#endif
#ifndef MOE_ARCH_A
#define MOE_ARCH_A (MOE_ARCH == 90)
#endif

#define __device__
#define __host__
#define __global__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict
#define DI __device__ __forceinline__

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef short i16;
typedef int i32;
typedef long long i64;
typedef float f32;
struct u32x4;
struct f32x4;
struct tensor_map;

// The body takes its argument by reference to the launch's own copy, as a __grid_constant__ is one.
#define MOE_ENTRY(name, args_type, threads, min_ctas)                                                                  \
    static void name(const args_type &a);                                                                              \
    static void name##__run(const void *args) { name(*(const args_type *)args); }                                      \
    extern "C" {                                                                                                       \
    extern const emu_kernel name##__emu __attribute__((visibility("default")));                                        \
    const emu_kernel name##__emu = { #name, (u32)sizeof(args_type), (u32)alignof(args_type), threads, min_ctas,        \
                                     name##__run };                                                                    \
    }                                                                                                                  \
    static void name(const args_type &a)

// ---- the engine -----------------------------------------------------------------------------------------------------


extern "C" {
u32 emu_tid(); u32 emu_ntid(); u32 emu_cta(); u32 emu_cta_y(); u32 emu_ncta();
u8 *emu_smem(); u32 emu_saddr(const void *p); u32 emu_smem_bytes();
void emu_cta_sync(); void emu_bar(u32 id, u32 threads, bool wait); void emu_warp_sync();
u32 emu_warp(u32 op, u32 value, u32 operand);
u32 emu_atomic(u32 op, u32 order, const void *p, u32 value, const char *name); void emu_fence(u32 kind);
void emu_load(void *dst, const void *src, u32 bytes, bool nc, const char *name); void emu_prefetch(const void *p);
u32 emu_cluster_rank(); u32 emu_cluster_size(); void emu_cluster_arrive(); void emu_cluster_wait();
u32 emu_mapa(const void *p, u32 rank); void emu_load_cluster(void *dst, u32 addr, u32 bytes, const char *name);
void emu_store_cluster(u32 addr, u32 value);
u32 emu_atomic_cluster(u32 addr, u32 value, bool is_float, const char *name);
void emu_st_async(u32 addr, u32 value, u32 bar);
void emu_mbar(u32 op, u64 *bar, u32 count, u32 bytes); void emu_mbar_remote(u32 op, u32 addr, u32 bytes);
bool emu_mbar_test(u64 *bar, u32 parity); void emu_mbar_wait(u64 *bar, u32 parity, bool cluster);
void emu_cp_async(void *dst, const void *src, u32 bytes, u32 src_bytes); void emu_cp_async_commit();
void emu_cp_async_wait(u32 left);
void emu_bulk(u32 kind, void *dst, const void *src, u32 bytes, u64 *bar, u32 mask, const char *name);
void emu_bulk_cluster(u32 dst, const void *src, u32 bytes, u32 bar); void emu_bulk_commit();
void emu_bulk_wait(u32 left, bool read); void emu_bulk_prefetch(const void *src, u32 bytes);
void emu_tma_load(void *dst, const void *map, u32 rank, const i32 *at, u64 *bar, u32 mask, const char *name);
void emu_tma_store(const void *map, u32 rank, const i32 *at, const void *src, bool add, const char *name);
void emu_wgmma(u32 type, u32 n, f32 *d, u64 a, const u32 *a_regs, u64 b, u32 accumulate);
void emu_wgmma_fence(); void emu_wgmma_commit(); void emu_wgmma_wait(u32 left); void emu_setmaxnreg(u32 regs, bool inc);
void emu_ldmatrix(u32 *r, u32 count, const void *row, bool trans);
void emu_stmatrix(void *row, const u32 *r, u32 count, bool trans);
void emu_mma(u32 type, f32 *d, const u32 *a, const u32 *b);
u32 emu_encode(u32 type, f32 v); f32 emu_decode(u32 type, u32 bits);
u32 emu_fma_bf16x2(u32 a, u32 b, u32 c);
void emu_grid_wait(); void emu_grid_launch(); void emu_trap();
}

// ---- threads, synchronisation, warps --------------------------------------------------------------------------------

DI u32 tid() { return emu_tid(); }
DI u32 ntid() { return emu_ntid(); }
DI u32 cta() { return emu_cta(); }
DI u32 cta_y() { return emu_cta_y(); }
DI u32 ncta() { return emu_ncta(); }
DI u32 lane() { return emu_tid() & 31; }
DI u32 warp() { return emu_tid() >> 5; }
DI u8 *smem() { return emu_smem(); }
DI u32 saddr(const void *p) { return emu_saddr(p); }
DI u32 dyn_smem_bytes() { return emu_smem_bytes(); }

DI void cta_sync() { emu_cta_sync(); }
DI void bar_sync(u32 id, u32 threads) { emu_bar(id, threads, true); }
DI void bar_arrive(u32 id, u32 threads) { emu_bar(id, threads, false); }
DI void warp_sync() { emu_warp_sync(); }

DI u32 bits(f32 v) { u32 u; __builtin_memcpy(&u, &v, 4); return u; }
DI f32 from_bits(u32 u) { f32 v; __builtin_memcpy(&v, &u, 4); return v; }
DI u32 shfl(u32 v, u32 lane) { return emu_warp(EMU_SHFL, v, lane); }
DI u32 shfl_xor(u32 v, u32 m) { return emu_warp(EMU_SHFL_XOR, v, m); }
DI u32 shfl_up(u32 v, u32 d) { return emu_warp(EMU_SHFL_UP, v, d); }
DI u32 shfl_down(u32 v, u32 d) { return emu_warp(EMU_SHFL_DOWN, v, d); }
DI f32 shfl(f32 v, u32 lane) { return from_bits(shfl(bits(v), lane)); }
DI f32 shfl_xor(f32 v, u32 m) { return from_bits(shfl_xor(bits(v), m)); }
DI f32 shfl_up(f32 v, u32 d) { return from_bits(shfl_up(bits(v), d)); }
DI f32 shfl_down(f32 v, u32 d) { return from_bits(shfl_down(bits(v), d)); }
DI u32 ballot(bool v) { return emu_warp(EMU_BALLOT, v, 0); }
DI u32 match_any(u32 v) { return emu_warp(EMU_MATCH_ANY, v, 0); }
DI u32 redux_max(u32 v) { return emu_warp(EMU_REDUX_MAX, v, 0); }
DI u32 redux_min(u32 v) { return emu_warp(EMU_REDUX_MIN, v, 0); }
DI u32 redux_add(u32 v) { return emu_warp(EMU_REDUX_ADD, v, 0); }
DI u32 redux_or(u32 v) { return emu_warp(EMU_REDUX_OR, v, 0); }
DI bool elect() { return emu_warp(EMU_ELECT, 0, 0) != 0; }

// ---- atomics, memory ------------------------------------------------------------------------------------------------

DI u32 atom_add(u32 *p, u32 v) { return emu_atomic(EMU_ADD, EMU_RELAXED, p, v, "atom_add"); }
DI void red_add_shared(u32 *p, u32 v) { emu_atomic(EMU_ADD, EMU_RELAXED, p, v, "red_add_shared"); }
DI void red_add(u32 *p, u32 v) { emu_atomic(EMU_ADD, EMU_RELAXED, p, v, "red_add"); }
DI u32 atom_add_acq_rel(u32 *p, u32 v) { return emu_atomic(EMU_ADD, EMU_ACQ_REL, p, v, "atom_add_acq_rel"); }
DI u32 atom_max(u32 *p, u32 v) { return emu_atomic(EMU_MAX, EMU_RELAXED, p, v, "atom_max"); }
DI u32 ld_acquire(const u32 *p) { return emu_atomic(EMU_LOAD, EMU_ACQUIRE, p, 0, "ld_acquire"); }
DI u32 ld_relaxed(const u32 *p) { return emu_atomic(EMU_LOAD, EMU_RELAXED, p, 0, "ld_relaxed"); }
DI void st_release(u32 *p, u32 v) { emu_atomic(EMU_STORE, EMU_RELEASE, p, v, "st_release"); }
DI void st_relaxed(u32 *p, u32 v) { emu_atomic(EMU_STORE, EMU_RELAXED, p, v, "st_relaxed"); }
DI void red_release_add(u32 *p, u32 v) { emu_atomic(EMU_ADD, EMU_RELEASE, p, v, "red_release_add"); }
DI void fence_acq_rel_gpu() { emu_fence(EMU_FENCE_GPU); }
DI void fence_acq_rel_cta() { emu_fence(EMU_FENCE_CTA); }

// Vectors are templates because >>types defines them further down.
template <class V = u32x4> DI V ld_nc_v4(const void *p) { V v; emu_load(&v, p, 16, true, "ld_nc_v4"); return v; }
template <class V = u32x4> DI V ld_cg_v4(const void *p) { V v; emu_load(&v, p, 16, false, "ld_cg_v4"); return v; }
DI u32 ld_nc(const u32 *p) { u32 v; emu_load(&v, p, 4, true, "ld_nc"); return v; }
DI void prefetch_l2(const void *p) { emu_prefetch(p); }

// ---- clusters -------------------------------------------------------------------------------------------------------

DI u32 cluster_rank() { return emu_cluster_rank(); }
DI u32 cluster_size() { return emu_cluster_size(); }
DI void cluster_arrive() { emu_cluster_arrive(); }
DI void cluster_wait() { emu_cluster_wait(); }
DI void cluster_sync() { emu_cluster_arrive(); emu_cluster_wait(); }
DI u32 mapa(const void *p, u32 rank) { return emu_mapa(p, rank); }
DI u32 ld_cluster(u32 addr) { u32 v; emu_load_cluster(&v, addr, 4, "ld_cluster"); return v; }
template <class V = f32x4> DI V ld_cluster_v4(u32 addr)
{
    V v;
    emu_load_cluster(&v, addr, 16, "ld_cluster_v4");
    return v;
}
DI void st_cluster(u32 addr, u32 v) { emu_store_cluster(addr, v); }
DI u32 atom_add_cluster(u32 addr, u32 v) { return emu_atomic_cluster(addr, v, false, "atom_add_cluster"); }
DI void red_add_cluster(u32 addr, u32 v) { emu_atomic_cluster(addr, v, false, "red_add_cluster"); }
DI void red_add_cluster_f32(u32 addr, f32 v) { emu_atomic_cluster(addr, bits(v), true, "red_add_cluster_f32"); }
DI void st_async(u32 addr, u32 v, u32 bar) { emu_st_async(addr, v, bar); }

// ---- mbarriers ------------------------------------------------------------------------------------------------------

DI void mbar_init(u64 *b, u32 n) { emu_mbar(EMU_MBAR_INIT, b, n, 0); }
DI void mbar_inval(u64 *b) { emu_mbar(EMU_MBAR_INVAL, b, 0, 0); }
DI void mbar_arrive(u64 *b) { emu_mbar(EMU_MBAR_ARRIVE, b, 1, 0); }
DI void mbar_arrive_n(u64 *b, u32 n) { emu_mbar(EMU_MBAR_ARRIVE, b, n, 0); }
DI void mbar_arrive_expect_tx(u64 *b, u32 bytes) { emu_mbar(EMU_MBAR_ARRIVE_EXPECT_TX, b, 1, bytes); }
DI void mbar_expect_tx(u64 *b, u32 bytes) { emu_mbar(EMU_MBAR_EXPECT_TX, b, 0, bytes); }
DI void mbar_arrive_cluster(u32 addr) { emu_mbar_remote(EMU_MBAR_ARRIVE, addr, 0); }
DI void mbar_arrive_expect_tx_cluster(u32 addr, u32 bytes) { emu_mbar_remote(EMU_MBAR_ARRIVE_EXPECT_TX, addr, bytes); }
DI bool mbar_test(u64 *b, u32 parity) { return emu_mbar_test(b, parity); }
DI void mbar_wait(u64 *b, u32 parity) { emu_mbar_wait(b, parity, false); }
DI void mbar_wait_cluster(u64 *b, u32 parity) { emu_mbar_wait(b, parity, true); }
DI void fence_mbar_init() { emu_fence(EMU_FENCE_MBAR); }

// ---- copies that complete later -------------------------------------------------------------------------------------

DI void cp_async_16(void *dst, const void *src, u32 src_bytes) { emu_cp_async(dst, src, 16, src_bytes); }
DI void cp_async_4(void *dst, const void *src, u32 src_bytes) { emu_cp_async(dst, src, 4, src_bytes); }
DI void cp_async_commit() { emu_cp_async_commit(); }
template <int N> DI void cp_async_wait() { emu_cp_async_wait(N); }
DI void cp_async_mbar_arrive(u64 *b) { emu_mbar(EMU_MBAR_CP_ASYNC, b, 1, 0); }

DI void bulk_g2s(void *dst, const void *src, u32 bytes, u64 *bar)
{
    emu_bulk(EMU_G2S, dst, src, bytes, bar, 0, "bulk_g2s");
}
DI void bulk_g2s_hint(void *dst, const void *src, u32 bytes, u64 *bar, u64)
{
    emu_bulk(EMU_G2S, dst, src, bytes, bar, 0, "bulk_g2s_hint");
}
DI void bulk_g2s_multicast(void *dst, const void *src, u32 bytes, u64 *bar, u16 mask)
{
    emu_bulk(EMU_G2S, dst, src, bytes, bar, 0x10000u | mask, "bulk_g2s_multicast");
}
DI void bulk_s2g(void *dst, const void *src, u32 bytes) { emu_bulk(EMU_S2G, dst, src, bytes, 0, 0, "bulk_s2g"); }
DI void bulk_s2s_cluster(u32 dst, const void *src, u32 bytes, u32 bar) { emu_bulk_cluster(dst, src, bytes, bar); }
DI void bulk_red_add_f32(void *dst, const void *src, u32 bytes)
{
    emu_bulk(EMU_RED_F32, dst, src, bytes, 0, 0, "bulk_red_add_f32");
}
DI void bulk_red_add_bf16(void *dst, const void *src, u32 bytes)
{
    emu_bulk(EMU_RED_BF16, dst, src, bytes, 0, 0, "bulk_red_add_bf16");
}
DI void bulk_prefetch(const void *src, u32 bytes) { emu_bulk_prefetch(src, bytes); }
DI void bulk_commit() { emu_bulk_commit(); }
template <int N> DI void bulk_wait() { emu_bulk_wait(N, false); }
template <int N> DI void bulk_wait_read() { emu_bulk_wait(N, true); }
DI u64 policy_evict_first() { return 1; }
DI u64 policy_evict_last() { return 2; }

DI void tma_load_2d(void *dst, const tensor_map *map, i32 x, i32 y, u64 *bar)
{
    i32 at[2] = { x, y };
    emu_tma_load(dst, map, 2, at, bar, 0, "tma_load_2d");
}
DI void tma_load_3d(void *dst, const tensor_map *map, i32 x, i32 y, i32 z, u64 *bar)
{
    i32 at[3] = { x, y, z };
    emu_tma_load(dst, map, 3, at, bar, 0, "tma_load_3d");
}
DI void tma_load_2d_multicast(void *dst, const tensor_map *map, i32 x, i32 y, u64 *bar, u16 mask)
{
    i32 at[2] = { x, y };
    emu_tma_load(dst, map, 2, at, bar, 0x10000u | mask, "tma_load_2d_multicast");
}
DI void tma_store_2d(const tensor_map *map, i32 x, i32 y, const void *src)
{
    i32 at[2] = { x, y };
    emu_tma_store(map, 2, at, src, false, "tma_store_2d");
}
DI void tma_red_add_2d(const tensor_map *map, i32 x, i32 y, const void *src)
{
    i32 at[2] = { x, y };
    emu_tma_store(map, 2, at, src, true, "tma_red_add_2d");
}
DI void tma_prefetch(const tensor_map *) {}

DI void fence_proxy_async() { emu_fence(EMU_FENCE_ASYNC); }
DI void fence_proxy_async_all() { emu_fence(EMU_FENCE_ASYNC); }
DI void fence_proxy_async_global() { emu_fence(EMU_FENCE_ASYNC); }

// ---- matrix products ------------------------------------------------------------------------------------------------

DI void wgmma_fence() { emu_wgmma_fence(); }
DI void wgmma_commit() { emu_wgmma_commit(); }
template <int N> DI void wgmma_wait() { emu_wgmma_wait(N); }
template <int R> DI void reg_dec() { emu_setmaxnreg(R, false); }
template <int R> DI void reg_inc() { emu_setmaxnreg(R, true); }

constexpr bool emu_wgmma_n(int n)
{
    return n == 8 || n == 16 || n == 24 || n == 32 || n == 48 || n == 64 || n == 80 || n == 96 || n == 112 ||
           n == 128 || n == 160 || n == 192 || n == 224 || n == 256;
}
template <int N, int T> struct emu_wgmma_of {
    static_assert(emu_wgmma_n(N), "no wgmma of this N");
    static DI void ss(f32 (&d)[N / 2], u64 a, u64 b, u32 accumulate) { emu_wgmma(T, N, d, a, nullptr, b, accumulate); }
    static DI void rs(f32 (&d)[N / 2], const u32 (&a)[4], u64 b, u32 accumulate)
    {
        emu_wgmma(T, N, d, 0, a, b, accumulate);
    }
};
template <int N> struct wgmma_bf16 : emu_wgmma_of<N, EMU_BF16> {};
template <int N> struct wgmma_f16 : emu_wgmma_of<N, EMU_F16> {};
template <int N> struct wgmma_e4m3 : emu_wgmma_of<N, EMU_E4M3> {};
template <int N> struct wgmma_e5m2 : emu_wgmma_of<N, EMU_E5M2> {};

DI void ldmatrix_x1(u32 (&r)[1], const void *p) { emu_ldmatrix(r, 1, p, false); }
DI void ldmatrix_x2(u32 (&r)[2], const void *p) { emu_ldmatrix(r, 2, p, false); }
DI void ldmatrix_x4(u32 (&r)[4], const void *p) { emu_ldmatrix(r, 4, p, false); }
DI void ldmatrix_x1_trans(u32 (&r)[1], const void *p) { emu_ldmatrix(r, 1, p, true); }
DI void ldmatrix_x2_trans(u32 (&r)[2], const void *p) { emu_ldmatrix(r, 2, p, true); }
DI void ldmatrix_x4_trans(u32 (&r)[4], const void *p) { emu_ldmatrix(r, 4, p, true); }
DI void stmatrix_x1(void *p, const u32 (&r)[1]) { emu_stmatrix(p, r, 1, false); }
DI void stmatrix_x2(void *p, const u32 (&r)[2]) { emu_stmatrix(p, r, 2, false); }
DI void stmatrix_x4(void *p, const u32 (&r)[4]) { emu_stmatrix(p, r, 4, false); }
DI void stmatrix_x1_trans(void *p, const u32 (&r)[1]) { emu_stmatrix(p, r, 1, true); }
DI void stmatrix_x2_trans(void *p, const u32 (&r)[2]) { emu_stmatrix(p, r, 2, true); }
DI void stmatrix_x4_trans(void *p, const u32 (&r)[4]) { emu_stmatrix(p, r, 4, true); }
DI void mma_bf16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { emu_mma(EMU_BF16, d, a, b); }
DI void mma_f16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { emu_mma(EMU_F16, d, a, b); }
DI void mma_e4m3(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { emu_mma(EMU_E4M3, d, a, b); }

// ---- conversions, arithmetic, dependent launches --------------------------------------------------------------------

DI u32 cvt_bf16x2(f32 lo, f32 hi) { return emu_encode(EMU_BF16, lo) | emu_encode(EMU_BF16, hi) << 16; }
DI u32 cvt_f16x2(f32 lo, f32 hi) { return emu_encode(EMU_F16, lo) | emu_encode(EMU_F16, hi) << 16; }
DI f32 cvt_f16(u16 v) { return emu_decode(EMU_F16, v); }
DI u16 cvt_e4m3x2(f32 lo, f32 hi) { return (u16)(emu_encode(EMU_E4M3, lo) | emu_encode(EMU_E4M3, hi) << 8); }
DI u16 cvt_e5m2x2(f32 lo, f32 hi) { return (u16)(emu_encode(EMU_E5M2, lo) | emu_encode(EMU_E5M2, hi) << 8); }
DI u32 cvt_e4m3x2_f16x2(u16 v)
{
    return cvt_f16x2(emu_decode(EMU_E4M3, v & 255u), emu_decode(EMU_E4M3, (u32)v >> 8));
}
DI u32 fma_bf16x2(u32 a, u32 b, u32 c) { return emu_fma_bf16x2(a, b, c); }

DI f32 sqrt_rn(f32 v) { return __builtin_sqrtf(v); }
DI u32 popc(u32 v) { return (u32)__builtin_popcount(v); }
DI u32 clz(u32 v) { return v ? (u32)__builtin_clz(v) : 32; }
DI u32 ffs(u32 v) { return (u32)__builtin_ffs((int)v); }
DI u64 umulhi64(u64 a, u64 b) { return (u64)((unsigned __int128)a * b >> 64); }

DI void grid_wait() { emu_grid_wait(); }
DI void grid_launch() { emu_grid_launch(); }
DI void trap() { emu_trap(); }

#endif
