// What the emulated driver and the emulated NVRTC share: environment, injected faults, the call log, compiling kernel
// text with g++, and the images that come of it. Environment, read again by cuInit and nvrtcVersion:
//
//   MOE_EMU_FAIL=cuMemAlloc:1=2,nvrtcCompileProgram:2=6   the n-th call of a function (0: every call) returns a code
//   MOE_EMU_MISSING=cuLaunchKernelEx,...                  names that cuGetProcAddress does not know
//   MOE_EMU_LOG=file                                      a line per call: function, thread, stream, capture, result
//   MOE_EMU_CXX (g++), MOE_EMU_DEVICE_H                   compiler and the header forced in front of the kernel text
//   MOE_EMU_CACHE=folder                                  keeps compiled images; off if not set
//   MOE_EMU_PTX_SOURCE=moe_kernels.cu.inc                 what an embedded PTX image was made from
#ifndef EMU_HOST_H
#define EMU_HOST_H

#include <stdint.h>

#include <string>
#include <vector>

#define EMU_API extern "C" __attribute__((visibility("default")))

// ---- environment ----------------------------------------------------------------------------------------------------

std::string host_env(const char *name, const char *otherwise);
std::vector<std::string> host_split(const std::string &list, char separator);
void host_read_settings();                      // faults, missing names, log file
int host_fault(const char *function);           // counts a call; the code it must return, or 0
bool host_missing(const char *function);

// One line of the log. stream 0 is none, -1 the legacy stream, -2 the thread's own; capture 0 none, 1 active, 2 broken.
void host_log(const char *function, long stream, int capture, int result);
void host_log_begin();                          // starts keeping this process's lines in memory
const char *host_log_end();                     // stops; the lines, valid until the next host_log_begin
void host_report(const std::string &text);      // to stderr and to the file in MOE_EMU_REPORT

// ---- kernel text -> image -------------------------------------------------------------------------------------------

struct host_chip {
    int major_minor;     // 90
    char variant;        // 'a', 'f' or 0
    bool is_virtual;     // compute_..: PTX only
};

bool host_parse_chip(const std::string &name, host_chip *chip);     // "sm_90a", "compute_80"
// Compiles for the emulated device. defines: "-DMOE_K_ROUTE" and so on. False: log says why.
bool host_compile(const std::string &name, const std::string &text, const std::vector<std::string> &defines,
                  const host_chip &chip, std::string *shared_object, std::string *log);

// "Cubin": 64 bytes, then an ELF shared object. "PTX": text with .version and .target, the object in comments.
std::string host_make_cubin(const host_chip &chip, const std::string &shared_object);
std::string host_make_ptx(const host_chip &chip, int ptx_version, const std::string &shared_object);

enum host_image_kind { HOST_IMAGE_BAD, HOST_IMAGE_CUBIN, HOST_IMAGE_PTX, HOST_IMAGE_PTX_TEXT };
struct host_image {
    host_image_kind kind = HOST_IMAGE_BAD;
    host_chip chip = {};
    int ptx_version = 0;                        // 81: 8.1
    std::string shared_object;                  // empty for HOST_IMAGE_PTX_TEXT, which is real PTX
    std::vector<std::string> defines;           // of real PTX that says what it was made of
};
host_image host_parse_image(const void *image);

int host_ptx_version(int cuda_version);         // 13000 -> 90: the newest PTX of that release

#endif
