// The emulated device, as its driver sees it: memory, operations with an order, waiting. C++17.
//
// A device executes nothing by itself. emu_submit() only notes an operation and what must come before it; it runs while
// somebody waits, in an order and an interleaving that a seeded generator picks among the legal ones (MOE_EMU_SEED=n
// repeats one exactly). A host that reads a result too early reads the poison that device memory starts with.
// A defect of a kernel (a race, an access out of bounds, a deadlock, ...) is a report on stderr and in the file that
// MOE_EMU_REPORT names, if any; the device then fails everything that is still queued, as hardware does.
// Calls may come from several threads.
#ifndef EMU_H
#define EMU_H

#include <stddef.h>
#include <stdint.h>

struct emu_device;
struct emu_op;

// What MOE_ENTRY makes of a kernel: exported by its shared object as <name>__emu.
struct emu_kernel {
    const char *name;
    uint32_t args_bytes, args_align;    // of the one argument, a struct by value
    uint32_t threads, min_ctas;         // as in __launch_bounds__
    void (*run)(const void *args);      // one thread of it
};

// What a chip has, by compute capability.
struct emu_device_config {
    int capability;                     // 90
    int sms;
    uint32_t threads_per_sm, ctas_per_sm;
    uint32_t smem_per_sm, smem_per_cta; // bytes; the second is the opt-in limit
    uint32_t smem_reserved;             // of each CTA, by the system
    uint32_t cluster_max;               // portable; 1: none
};

enum emu_op_kind { EMU_OP_KERNEL, EMU_OP_COPY, EMU_OP_FILL, EMU_OP_HOST, EMU_OP_EMPTY };

// How an operation ended.
enum emu_status {
    EMU_OK,
    EMU_ILLEGAL_ADDRESS,
    EMU_MISALIGNED,
    EMU_LAUNCH_FAILED,                  // any other report
    EMU_INVALID                         // the device cannot launch this: too much shared memory, a wrong cluster
};

struct emu_op_desc {
    emu_op_kind kind;
    const emu_kernel *kernel;           // EMU_OP_KERNEL; with the code, alive until the operation has ended
    const void *args;                   // kernel->args_bytes; copied
    uint32_t grid[3], block[3], cluster[3]; // block: its product is the number of threads; cluster 0 or 1: none
    uint32_t smem_bytes;                // dynamic
    uint32_t sm_limit;                  // multiprocessors that the grid may use; 0: all
    void *dst;                          // EMU_OP_COPY, EMU_OP_FILL
    const void *src;                    // EMU_OP_COPY; any memory of the process that is no device memory is the host's
    size_t bytes;                       // EMU_OP_COPY, EMU_OP_FILL
    uint32_t value, width;              // EMU_OP_FILL: width 1, 2 or 4 bytes
    void (*call)(void *data);           // EMU_OP_HOST: may call emu_alloc and emu_free, and no other function
    void *data;
};

emu_device_config emu_config(int capability, int sms);

// sms 0: MOE_EMU_SMS, or 6. NULL where the capability is unknown.
emu_device *emu_device_create(int capability, int sms);
void emu_device_destroy(emu_device *dev);           // drops what has not run
const emu_device_config *emu_device_info(const emu_device *dev);
void emu_device_recover(emu_device *dev);           // a new context after a failure: drops what is queued, clears it

// Device memory (poisoned 0xff, "never written") or pinned host memory. emu_free: false where p is not allocated,
// which it reports. Freed memory stays known, so that a late use of it is reported.
void *emu_alloc(emu_device *dev, size_t bytes, bool host);
bool emu_free(emu_device *dev, void *p);
void emu_host_register(emu_device *dev, void *p, size_t bytes);
void emu_host_unregister(emu_device *dev, void *p);

// preds[i] comes before the new operation; where programmatic[i] is set (both are kernels) the new one may start as
// soon as every CTA of preds[i] has called grid_launch() or ended, and sees its writes after grid_wait(); before that,
// where all those CTAs had returned from grid_wait() themselves, what came before preds[i]. programmatic may be NULL. The returned handle lives until emu_release(), whether or not the operation has run.
emu_op *emu_submit(emu_device *dev, const emu_op_desc *desc, emu_op *const *preds, const unsigned char *programmatic,
                   int count);
void emu_release(emu_op *op);
int emu_wait(emu_op *op);                           // emu_status
int emu_wait_all(emu_device *dev);
bool emu_done(emu_op *op);                          // lets the device work a little, does not wait

// What cuTensorMapEncodeTiled() writes into its 128 bytes here; its arguments and enumerations. False: not legal.
bool emu_tensor_map_encode(void *map, int type, uint32_t rank, void *base, const uint64_t *dims,
                           const uint64_t *strides, const uint32_t *box, const uint32_t *steps,
                           int interleave, int swizzle, int promotion, int fill);

// Reports since the process began, and the text of the last one ("" if none).
int emu_reports();
const char *emu_last_report();

// A new seed for a device, as MOE_EMU_SEED would give it.
void emu_device_seed(emu_device *dev, uint64_t seed);

// ---- between kernel text and engine (device.h) ----------------------------------------------------------------------

enum emu_warp_op {
    EMU_SHFL, EMU_SHFL_XOR, EMU_SHFL_UP, EMU_SHFL_DOWN, EMU_BALLOT, EMU_MATCH_ANY, EMU_REDUX_MAX, EMU_REDUX_MIN,
    EMU_REDUX_ADD, EMU_REDUX_OR, EMU_ELECT, EMU_WARP_SYNC
};
enum emu_atomic_op { EMU_ADD, EMU_MAX, EMU_LOAD, EMU_STORE };
enum emu_order { EMU_RELAXED = 0, EMU_ACQUIRE = 1, EMU_RELEASE = 2, EMU_ACQ_REL = 3 };
enum emu_mbar_op {
    EMU_MBAR_INIT, EMU_MBAR_INVAL, EMU_MBAR_ARRIVE, EMU_MBAR_EXPECT_TX, EMU_MBAR_ARRIVE_EXPECT_TX, EMU_MBAR_CP_ASYNC
};
enum emu_async_kind { EMU_G2S, EMU_S2G, EMU_S2S, EMU_RED_F32, EMU_RED_BF16, EMU_CP_ASYNC, EMU_ST_ASYNC };
enum emu_type { EMU_BF16, EMU_F16, EMU_E4M3, EMU_E5M2 };
enum emu_fence_kind { EMU_FENCE_GPU, EMU_FENCE_CTA, EMU_FENCE_ASYNC, EMU_FENCE_MBAR };

#endif
