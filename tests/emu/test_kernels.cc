// Kernels of test_engine.cc: each is correct with a.broken == 0 and has one defect for every other value. Compiled as
// kernel text is, with device.h forced in front.
struct alignas(16) u32x4 { u32 x, y, z, w; };
struct alignas(16) f32x4 { f32 x, y, z, w; };

struct test_args {
    u32 *in, *out, *flag;
    i32 broken, n;
};

// ---- shared memory --------------------------------------------------------------------------------------------------

// A value to the neighbour. 1: no barrier; 2: the value is overwritten while it is read.
MOE_ENTRY(k_smem, test_args, 256, 1)
{
    u32 *s = (u32 *)smem(), i = cta() * ntid() + tid();
    s[tid()] = 0;
    s[tid()] = a.in[i];
    if (a.broken != 1) cta_sync();
    u32 v = s[(tid() + 1) % ntid()];
    if (a.broken != 2) cta_sync();
    s[tid()] = v;
    a.out[i] = s[tid()];
}

// Within a warp. 1: a shuffle is taken for a barrier.
MOE_ENTRY(k_warp, test_args, 32, 1)
{
    u32 *s = (u32 *)smem();
    s[lane()] = a.in[lane()];
    if (a.broken) shfl(0u, 0);
    else warp_sync();
    a.out[lane()] = s[lane() ^ 1];
}

// Halves of a word by different threads. 1: both write the same half.
MOE_ENTRY(k_halves, test_args, 64, 1)
{
    u16 *s = (u16 *)smem();
    s[a.broken ? tid() / 2 * 2 : tid()] = (u16)a.in[tid()];
    if (a.broken) return;
    cta_sync();
    a.out[tid()] = s[tid()];
}

// 1: behind the end of shared memory; 2: behind an allocation; 3: in front of it; 4: misaligned; 5: misaligned vector;
// 6: never written, shared; 7: never written, global; 8: a null pointer; 9: of another thread; 10: the arguments
MOE_ENTRY(k_access, test_args, 32, 1)
{
    u32 *s = (u32 *)smem(), n = dyn_smem_bytes() / 4;
    s[lane()] = a.in[lane()];
    u32 v = s[lane()];
    if (a.broken == 1) s[n + lane()] = 1;
    if (a.broken == 2) v = a.in[a.n];
    if (a.broken == 3) v = a.in[-1];
    if (a.broken == 4 && lane() == 3) v = *(const u32 *)((const u8 *)a.in + 2);
    if (a.broken == 5 && lane() == 3) v = ((const u32x4 *)(a.in + 1))->x;
    if (a.broken == 6) v = s[32 + lane()];
    if (a.broken == 7) v = a.out[lane()];
    if (a.broken == 8) v = *(const volatile u32 *)nullptr;
    if (a.broken == 9) {
        u32 local = lane();
        u64 p = (u64)&local;
        u32 low = shfl((u32)p, 0), high = shfl((u32)(p >> 32), 0);
        v = *(u32 *)((u64)high << 32 | low);
    }
    if (a.broken == 10) ((test_args *)&a)->n = 1;
    a.out[lane()] = v;
}

// ---- warps and barriers ---------------------------------------------------------------------------------------------

// Every collective against what it means. 1: lanes take different ones; 2: one lane leaves.
MOE_ENTRY(k_collectives, test_args, 32, 1)
{
    u32 v = a.in[lane()], l = lane(), ok = 1;
    if (a.broken == 1 && l == 5) ballot(true);
    if (a.broken == 2 && l == 5) return;
    ok &= shfl(v, 7) == a.in[7] && shfl_xor(v, 3) == a.in[l ^ 3];
    ok &= shfl_up(v, 2) == a.in[l < 2 ? l : l - 2] && shfl_down(v, 4) == a.in[l < 28 ? l + 4 : l];
    ok &= ballot(l % 3 == 0) == 0x49249249u && match_any(l / 8) == 255u << l / 8 * 8;
    ok &= redux_max(l) == 31 && redux_min(l + 5) == 5 && redux_add(l) == 496 && redux_or(1u << l) == ~0u;
    ok &= popc(ballot(elect())) == 1 && from_bits(bits(1.5f)) == 1.5f && shfl(1.0f + (f32)l, 2) == 3.0f;
    a.out[l] = ok;
}

// Half of the block produces, the other consumes, by named barriers. 1: the producer does not arrive; 2: a wrong count;
// 3: the consumer does not wait; 4: arrives twice
MOE_ENTRY(k_named, test_args, 128, 1)
{
    u32 *s = (u32 *)smem();
    if (tid() < 64) {
        s[tid()] = a.in[tid()];
        if (a.broken != 1) bar_arrive(3, a.broken == 2 ? 64 : 128);
        if (a.broken == 4) bar_arrive(3, 128);
    } else {
        if (a.broken != 3) bar_sync(3, 128);
        a.out[tid()] = s[tid() - 64];
    }
}

// 1: half of the block skips the barrier.
MOE_ENTRY(k_divergent, test_args, 64, 1)
{
    if (!a.broken || tid() < 32) cta_sync();
    a.out[tid()] = tid();
}

// ---- atomics and order across CTAs ----------------------------------------------------------------------------------

// The last CTA adds up what the others have stored. 1: relaxed instead of acq_rel; 2: no barrier in front.
MOE_ENTRY(k_last, test_args, 64, 1)
{
    a.out[cta() * 64 + tid()] = a.in[cta() * 64 + tid()];
    u32 *s = (u32 *)smem();
    if (a.broken != 2) cta_sync();
    if (tid() == 0) s[0] = a.broken == 1 ? atom_add(a.flag, 1) : atom_add_acq_rel(a.flag, 1);
    cta_sync();
    if (s[0] != ncta() - 1) return;
    u32 sum = 0;
    for (u32 c = 0; c < ncta(); c++) sum += a.out[c * 64 + tid()];
    a.out[ncta() * 64 + tid()] = sum;
}

// CTA 0 sends to CTA 1, which polls. 1: the store does not release; 2: the load does not acquire; 3: fences instead of
// both (correct); 4: those of one CTA only; 5: never stored
MOE_ENTRY(k_flag, test_args, 32, 1)
{
    u32 m = (u32)a.broken;
    if (cta() == 0) {
        if (lane() == 0) a.out[0] = 42;
        if (lane() == 0 && m == 3) fence_acq_rel_gpu();
        if (lane() == 0 && m == 4) fence_acq_rel_cta();
        if (lane() == 0 && m != 5) {
            if (m == 1 || m == 3 || m == 4) st_relaxed(a.flag, 1);
            else st_release(a.flag, 1);
        }
        return;
    }
    if (lane() == 0) {
        if (m == 2 || m == 3 || m == 4) while (ld_relaxed(a.flag) == 0) {}
        else while (ld_acquire(a.flag) == 0) {}
        if (m == 3) fence_acq_rel_gpu();
        if (m == 4) fence_acq_rel_cta();
        a.out[1] = a.out[0];
    }
}

// Counters. 1: one lane adds without an atomic; 2: read without a barrier.
MOE_ENTRY(k_atomics, test_args, 128, 1)
{
    u32 *s = (u32 *)smem();
    if (tid() == 0) s[0] = s[1] = 0;
    cta_sync();
    if (a.broken == 1 && tid() == 77) s[0]++;
    else red_add(&s[0], 1);
    atom_max(&s[1], tid());
    if (a.broken != 2) cta_sync();
    a.out[tid()] = s[0] * 1000 + s[1];
}

// 1: every CTA writes the same word.
MOE_ENTRY(k_ctas, test_args, 32, 1)
{
    a.out[a.broken ? lane() : cta() * 32 + lane()] = cta();
}

// 1: a read-only load of what the launch itself has written.
MOE_ENTRY(k_constant, test_args, 32, 1)
{
    if (a.broken) a.in[lane()] = 5;
    a.out[lane()] = ld_nc(a.in + lane()) + ld_nc_v4(a.in + lane() / 4 * 4).y + ld_cg_v4(a.in).x;
}

// ---- mbarriers, copies ----------------------------------------------------------------------------------------------

// 1: no fence or barrier behind the init; 2: waits for the wrong phase; 3: one arrival too many; 4: one too few; 5: not
// initialised; 6: a plain store into it; 7: count 0
MOE_ENTRY(k_mbar, test_args, 64, 1)
{
    u64 *bar = (u64 *)smem();
    u32 *s = (u32 *)(smem() + 64), m = (u32)a.broken;
    if (tid() == 0 && m != 5) mbar_init(bar, m == 7 ? 0 : 32);
    if (m != 1) cta_sync();
    if (tid() == 0 && m == 6) *bar = 0;
    for (u32 round = 0; round < 3; round++) {
        if (tid() < 32) {
            s[tid()] = a.in[tid()] + round;
            if (m == 3 && tid() == 9) mbar_arrive_n(bar, 33);
            else if (m != 4 || tid() != 9) mbar_arrive(bar);
        } else {
            mbar_wait(bar, m == 2 ? (round & 1) ^ (round == 2) : round & 1);
            a.out[tid() - 32] = s[tid() - 32];
        }
        cta_sync();
    }
}

// cp.async. 1: not waited for; 2: waits for too few groups; 3: only its own thread has waited; 4: overwrites while in
// flight; 5: misaligned; 6: behind the source; 7: an arrival is taken to release plain stores too
MOE_ENTRY(k_cp_async, test_args, 32, 1)
{
    u32 *s = (u32 *)smem(), m = (u32)a.broken, *d = s + lane() * 4;
    u64 *bar = (u64 *)(smem() + 2048);
    if (lane() == 0) mbar_init(bar, 32);
    cta_sync();
    if (m != 6 || lane() != 31) cp_async_16(d, a.in + lane() * 4 + (m == 5), 16);
    else cp_async_16(d, a.in + a.n, 16);
    cp_async_commit();
    cp_async_16(d + 128, a.in + lane() * 4, lane() < 16 ? 8 : 0);
    cp_async_commit();
    if (m == 4) d[0] = 1;
    if (m == 2) cp_async_wait<1>();
    else if (m != 1) cp_async_wait<0>();
    u32 other = lane() ^ 1;
    if (m != 3) cta_sync();
    a.out[lane()] = s[other * 4] + s[128 + other * 4 + 1] + s[128 + other * 4 + 2];
    cta_sync();
    u32 *e = s + 300;
    if (m == 7) e[lane()] = 1;
    cp_async_4(s + 256 + lane(), a.in + lane(), 4);
    cp_async_mbar_arrive(bar);
    mbar_wait(bar, 0);
    a.out[lane()] += s[256 + other] + (m == 7 ? e[other] : 0);
}

// A bulk copy in, one out. 1: no expect_tx; 2: not waited for; 3: no fence behind the init; 4: 8 bytes; 5: behind the
// source; 6: no fence_proxy_async before the copy out; 7: the source of the copy out is overwritten; 8: block ends
// before it is read; 9: misaligned destination
MOE_ENTRY(k_bulk, test_args, 32, 1)
{
    u64 *bar = (u64 *)(smem() + 1024);
    u32 *s = (u32 *)smem(), m = (u32)a.broken;
    if (lane() == 0) {
        mbar_init(bar, 1);
        if (m != 3) fence_mbar_init();
    }
    cta_sync();
    if (lane() == 0) {
        if (m == 1) mbar_arrive(bar);
        else mbar_arrive_expect_tx(bar, 512);
        bulk_g2s(s + (m == 9), m == 5 ? a.in + a.n - 4 : a.in, m == 4 ? 8 : 512, bar);
    }
    if (m != 2) mbar_wait(bar, 0);
    for (u32 i = lane(); i < 128; i += 32) s[i] += 1;
    if (m != 6) fence_proxy_async();
    cta_sync();
    if (lane() == 0) {
        bulk_s2g(a.out, s, 512);
        bulk_commit();
        if (m == 7) s[5] = 0;
        if (m != 8) bulk_wait_read<0>();
    }
}

// What was copied out is read back by the thread that waited. 1: it waits for the read only.
MOE_ENTRY(k_bulk_wait, test_args, 32, 1)
{
    u32 *s = (u32 *)smem();
    if (lane() != 0) return;
    for (u32 i = 0; i < 8; i++) s[i] = a.in[i];
    fence_proxy_async();
    bulk_s2g(a.out, s, 32);
    bulk_commit();
    if (a.broken) bulk_wait_read<0>();
    else bulk_wait<0>();
    a.out[8] = a.out[3];
    f32 *f = (f32 *)s;
    for (u32 i = 0; i < 4; i++) f[i] = 1.5f;
    fence_proxy_async();
    bulk_red_add_f32(a.flag, f, 16);
    bulk_commit();
    bulk_wait<0>();
}

// ---- clusters -------------------------------------------------------------------------------------------------------

// Reads the neighbour's shared memory. 1: no barrier before; 2: none after, so that the neighbour may have ended; 3: a
// rank that is not there; 4: behind its end; 5: wait without arrive; 6: arrives twice; 7: ends after the neighbour has
// read, which only a relaxed counter says
MOE_ENTRY(k_cluster, test_args, 64, 1)
{
    u32 *s = (u32 *)smem(), m = (u32)a.broken;
    s[tid()] = cta() * 64 + tid();
    if (m == 5) cluster_wait();
    if (m == 6) cluster_arrive();
    if (m == 1) cta_sync();
    else cluster_sync();
    u32 next = (cluster_rank() + 1) % cluster_size();
    a.out[cta() * 64 + tid()] = ld_cluster(mapa(s + tid() + (m == 4 ? 3100 : 0), m == 3 ? cluster_size() : next));
    if (m == 7) {
        red_add(a.flag, 1);
        while (tid() == 0 && ld_relaxed(a.flag) != ncta() * 64) {}
    } else if (m != 2) {
        cluster_sync();
    }
}

// Pushes to the neighbour by st_async, a copy and an arrival. 1: too few bytes expected; 2: no wait for the cluster's
// barrier before, so that the neighbour's mbarrier may not be there yet
MOE_ENTRY(k_push, test_args, 32, 1)
{
    u32 *s = (u32 *)smem(), m = (u32)a.broken, next = (cluster_rank() + 1) % cluster_size();
    u64 *bar = (u64 *)(smem() + 1024);
    if (lane() == 0) {
        mbar_init(bar, 2);
        fence_mbar_init();
    }
    s[lane()] = a.in[lane()];
    fence_proxy_async();
    if (m != 2) cluster_sync();
    if (lane() == 0) {
        mbar_arrive_expect_tx(bar, m == 1 ? 4 : 4 + 128);
        st_async(mapa(s + 64, next), 7, mapa(bar, next));
        bulk_s2s_cluster(mapa(s + 32, next), s, 128, mapa(bar, next));
        mbar_arrive_cluster(mapa(bar, next));
    }
    mbar_wait_cluster(bar, 0);
    a.out[cta() * 32 + lane()] = s[32 + lane()] + s[64];
    cluster_sync();
}

// Multicast to every CTA of the cluster. 1: one of them expects nothing.
MOE_ENTRY(k_multicast, test_args, 32, 1)
{
    u64 *bar = (u64 *)(smem() + 1024);
    u32 *s = (u32 *)smem();
    if (lane() == 0) {
        mbar_init(bar, 1);
        fence_mbar_init();
        if (!a.broken || cluster_rank() == 0) mbar_arrive_expect_tx(bar, 128);
    }
    cluster_sync();
    if (cluster_rank() == 0 && lane() == 0) bulk_g2s_multicast(s, a.in, 128, bar, (u16)((1u << cluster_size()) - 1));
    mbar_wait(bar, 0);
    a.out[cta() * 32 + lane()] = s[lane()];
    cluster_sync();
}

// ---- launches -------------------------------------------------------------------------------------------------------

MOE_ENTRY(k_primary, test_args, 32, 1)
{
    grid_launch();
    a.flag[cta() * 32 + lane()] = a.in[lane()] + 1;
}

// 1: reads without grid_wait().
MOE_ENTRY(k_dependent, test_args, 32, 1)
{
    u32 before = a.in[lane()];
    if (!a.broken) grid_wait();
    a.out[cta() * 32 + lane()] = a.flag[cta() * 32 + lane()] + before;
}

// Between two others. 1: lets its dependents start before the first one's writes are known.
MOE_ENTRY(k_forward, test_args, 32, 1)
{
    if (a.broken) grid_launch();
    grid_wait();
    if (!a.broken) grid_launch();
    a.out[cta() * 32 + lane()] = a.in[lane()];
}

// Reads what the kernel before the one before has written.
MOE_ENTRY(k_second, test_args, 32, 1)
{
    u32 early = a.flag[cta() * 32 + lane()];
    grid_wait();
    a.out[cta() * 32 + lane()] = early + a.out[cta() * 32 + lane()];
}

MOE_ENTRY(k_copy, test_args, 32, 1)
{
    a.out[cta() * 32 + lane()] = a.in[cta() * 32 + lane()];
}

// Registers move from two warps of four to the others. 1: more than there are.
MOE_ENTRY(k_registers, test_args, 128, 4)
{
    if (warp() < 2) reg_dec<64>();
    else if (a.broken) reg_inc<248>();
    else reg_inc<192>();
    a.out[tid()] = tid();
}

MOE_ENTRY(k_trap, test_args, 32, 1)
{
    if (a.broken && lane() == 3) trap();
    a.out[lane()] = lane();
}

// ---- matrices -------------------------------------------------------------------------------------------------------

DI f32 small(u32 row, u32 k) { return (f32)((row * 7 + k * 3) % 11) - 5; }
DI u16 bf16_of(f32 v) { return (u16)cvt_bf16x2(v, 0); }

// Element (row, k) of a K-major operand of 64 bf16 a row, 128-byte swizzle.
DI void put(u8 *operand, u32 row, u32 k, f32 v)
{
    u32 at = row * 128 + k * 2;
    *(u16 *)(operand + (at ^ (row & 7) << 4)) = bf16_of(v);
}

DI u64 describe(const void *p, u32 stride)
{
    return (u64)(saddr(p) >> 4) | 1ull << 16 | (u64)(stride >> 4) << 32 | 1ull << 62;
}

// D (64 x 16) = A (64 x 64) B^T, the first step of K from registers, against a loop. 1: no wgmma_wait; 2: no proxy
// fence; 3: an operand changes in flight; 4: no wgmma_fence; 5: no barrier; 6: a descriptor behind shared memory;
// 7: the block ends without a wait; 8: lanes disagree
MOE_ENTRY(k_wgmma, test_args, 128, 1)
{
    u8 *left = smem(), *right = smem() + 8192;
    u32 m = (u32)a.broken, row = warp() * 16 + lane() / 4, ok = 1;
    for (u32 i = tid(); i < 64 * 64; i += 128) put(left, i / 64, i % 64, small(i / 64, i % 64));
    for (u32 i = tid(); i < 16 * 64; i += 128) put(right, i / 64, i % 64, small(i / 64 + 3, i % 64));
    if (m != 2) fence_proxy_async();
    if (m != 5) cta_sync();
    u64 x = describe(left, 1024), y = describe(right, 1024);
    if (m == 6) y += 1024;
    if (m == 8 && lane() == 4) y += 2;
    u32 regs[4];
    for (u32 i = 0; i < 4; i++) {
        u32 r = row + (i & 1) * 8, k = (i >> 1) * 8 + lane() % 4 * 2;
        regs[i] = cvt_bf16x2(small(r, k), small(r, k + 1));
    }
    f32 d[8];
    for (u32 i = 0; i < 8; i++) d[i] = 1;
    if (m != 4) wgmma_fence();
    wgmma_bf16<16>::rs(d, regs, y, 1);
    for (u32 step = 1; step < 4; step++) wgmma_bf16<16>::ss(d, x + step * 2, y + step * 2, 1);
    wgmma_commit();
    if (m == 3) put(right, tid() % 16, 20, 0);
    if (m != 1 && m != 7) wgmma_wait<0>();
    for (u32 i = 0; i < 8; i++) {
        u32 r = row + (i >> 1 & 1) * 8, n = i / 4 * 8 + lane() % 4 * 2 + (i & 1);
        f32 want = 1;
        for (u32 k = 0; k < 64; k++) want += small(r, k) * small(n + 3, k);
        ok &= d[i] == want;
    }
    if (m == 1) {
        wgmma_wait<0>();
        if (ok == 0) trap();
    }
    a.out[tid()] = ok;
}

// ldmatrix, mma, stmatrix. 1: a row is misaligned; 2: rows that another warp has not finished.
MOE_ENTRY(k_mma, test_args, 64, 1)
{
    u16 *left = (u16 *)smem(), *right = left + 256, *back = right + 128 + warp() * 256;
    u32 ok = 1, l = lane();
    for (u32 i = tid(); i < 256; i += 64) left[i] = bf16_of(small(i / 16, i % 16));
    for (u32 i = tid(); i < 128; i += 64) right[i] = bf16_of(small(i / 16 + 2, i % 16));
    if (a.broken != 2) cta_sync();
    u32 x[4], y[2], t[2];
    ldmatrix_x4(x, left + (l % 16) * 16 + l / 16 * 8 + (a.broken == 1));
    ldmatrix_x2(y, right + (l % 8) * 16 + l / 8 % 2 * 8);
    ldmatrix_x2_trans(t, right + (l % 8) * 16 + l / 8 % 2 * 8);
    f32 d[4] = { 1, 1, 1, 1 };
    mma_bf16(d, x, y);
    for (u32 i = 0; i < 4; i++) {
        f32 want = 1;
        for (u32 k = 0; k < 16; k++) want += small(l / 4 + (i >> 1) * 8, k) * small(l % 4 * 2 + (i & 1) + 2, k);
        ok &= d[i] == want;
    }
    for (u32 i = 0; i < 2; i++)
        ok &= t[i] == cvt_bf16x2(small(l % 4 * 2 + 2, l / 4 + i * 8), small(l % 4 * 2 + 3, l / 4 + i * 8));
    if (MOE_ARCH >= 90) {
        stmatrix_x4(back + (l % 16) * 16 + l / 16 * 8, x);
        warp_sync();
        for (u32 i = l; i < 256; i += 32) ok &= back[i] == left[i];
    }
    a.out[tid()] = ok;
}

// Formats: what conversions give for every value of 16 and 8 bits, there and back.
MOE_ENTRY(k_convert, test_args, 32, 1)
{
    u32 ok = 1;
    for (u32 i = lane(); i < 65536; i += 32) {
        f32 h = cvt_f16((u16)i);
        bool nan = h != h;
        ok &= nan || (cvt_f16x2(h, 1) & 0xffff) == i;
        f32 b = from_bits(i << 16);
        ok &= b != b || (cvt_bf16x2(0, b) >> 16) == i;
    }
    ok &= cvt_e4m3x2(448, -1000) == 0xfe7e && cvt_e4m3x2(0.0009765625f, 0.015625f) == 0x0800;
    ok &= cvt_e5m2x2(57344, 1e9f) == 0x7b7b && cvt_e4m3x2_f16x2(0x3878) == 0x3c005c00;
    ok &= cvt_bf16x2(1.00390625f, 1.01171875f) == 0x3f823f80;
    a.out[lane()] = ok;
}

// A box of 8 x 32 words of a 16 x 64 tensor that begins at (-8, 60): in, out again. 1: read before it is there; 2: the
// block ends while the box is still read; 3: a box that begins at a multiple of 4 bytes.
MOE_ENTRY(k_tensor, test_args, 32, 1)
{
    u64 *bar = (u64 *)(smem() + 8192);
    const u32 *s = (const u32 *)smem();
    const tensor_map *map = (const tensor_map *)a.flag;
    if (lane() == 0) {
        mbar_init(bar, 1);
        fence_mbar_init();
    }
    cta_sync();
    if (lane() == 0) {
        mbar_arrive_expect_tx(bar, 1024);
        tma_load_2d(smem(), map, a.broken == 3 ? -7 : -8, 60, bar);
    }
    if (a.broken != 1) mbar_wait(bar, 0);
    u32 ok = 1, row = lane() % 8;
    for (u32 x = 0; x < 32; x++) {
        u32 v = s[((row * 128 + x * 4) ^ row << 4) / 4];
        ok &= v == (x >= 8 && x < 24 && row < 4 ? (60 + row) * 16 + x - 8 : 0);
    }
    cta_sync();
    if (lane() == 0) {
        tma_store_2d(map, a.broken == 4 ? -8 : 8, 60, smem());
        bulk_commit();
        if (a.broken != 2) bulk_wait<0>();
        ok &= a.broken == 2 || (a.in[60 * 16] == 60 * 16 && a.in[60 * 16 + 8] == 0 && a.in[1023] == 0);
    }
    a.out[lane()] = ok;
}
