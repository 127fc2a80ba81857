// build/emu/libnvrtc.so.13: NVRTC's interface over g++ (host.cc). The program it makes runs on the emulated device.
// Environment beside host.h's: MOE_EMU_NVRTC_VERSION (13000), MOE_EMU_ARCHS (75,80,...: what it compiles for).
#include "host.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <mutex>
#include <set>

typedef int nvrtcResult;
enum {
    NVRTC_SUCCESS = 0, NVRTC_OUT_OF_MEMORY, NVRTC_PROGRAM_CREATION_FAILURE, NVRTC_INVALID_INPUT, NVRTC_INVALID_PROGRAM,
    NVRTC_INVALID_OPTION, NVRTC_COMPILATION, NVRTC_BUILTIN_OPERATION_FAILURE, NVRTC_NO_NAMES_AFTER_COMPILATION,
    NVRTC_NO_LOWERED_NAMES_BEFORE_COMPILATION, NVRTC_NAME_NOT_VALID, NVRTC_INTERNAL_ERROR
};

struct nvrtc_program {
    std::string text, name, log, cubin, ptx;
    std::set<std::string> names;
    bool compiled = false;
};
typedef nvrtc_program *nvrtcProgram;

namespace {

struct live_programs {
    std::mutex lock;
    std::set<nvrtcProgram> all;
};

void report_programs();

// Never destroyed, as threads may still compile when the process leaves.
live_programs &live()
{
    static live_programs *l = (atexit(report_programs), new live_programs);
    return *l;
}

void report_programs()
{
    std::lock_guard<std::mutex> guard(live().lock);
    if (!live().all.empty() && host_env("MOE_EMU_LEAKS", "1") != "0")
        host_report("emu: " + std::to_string(live().all.size()) + " NVRTC programs were never destroyed\n");
}

bool is_live(nvrtcProgram p)
{
    std::lock_guard<std::mutex> guard(live().lock);
    return live().all.count(p) != 0;
}

nvrtcResult done(const char *function, nvrtcResult result)
{
    host_log(function, 0, 0, result);
    return result;
}

int version()
{
    return atoi(host_env("MOE_EMU_NVRTC_VERSION", "13000").c_str());
}

std::vector<int> archs()
{
    std::vector<int> list;
    for (const std::string &a : host_split(host_env("MOE_EMU_ARCHS", "75,80,86,87,88,89,90,100,103,110,120,121"), ','))
        list.push_back(atoi(a.c_str()));
    return list;
}

struct options {
    host_chip chip = { 75, 0, true };
    std::vector<std::string> defines;
};

// "--name=value", "-name=value" or "--name value": true if options[*at] is this one; *at moves over what it used.
bool takes(const std::vector<std::string> &words, size_t *at, const char *name, std::string *value)
{
    const std::string &word = words[*at];
    std::string wanted = name;
    if (word.compare(0, wanted.size() + 1, wanted + "=") == 0) *value = word.substr(wanted.size() + 1);
    else if (word == wanted && *at + 1 < words.size()) *value = words[++*at];
    else return false;
    return true;
}

bool parse_arch(const std::string &value, options *o, std::string *log)
{
    bool known = false;
    if (host_parse_chip(value, &o->chip))
        for (int a : archs()) known = known || a == o->chip.major_minor;
    // 'a' since CUDA 12.0 and compute capability 9.0, 'f' since 12.9 and 10.0.
    if (o->chip.variant == 'a' && o->chip.major_minor < 90) known = false;
    if (o->chip.variant == 'f' && (o->chip.major_minor < 100 || version() < 12090)) known = false;
    if (!known) *log += "nvrtc: error: invalid value for --gpu-architecture (-arch)\n";
    return known;
}

// The options that programs of moe.h may carry. -ffp-contract=off is always given to g++, so that only --fmad=false
// describes what it does.
bool parse_options(const std::vector<std::string> &words, options *o, std::string *log)
{
    static const std::set<std::string> ignored = {
        "--device-as-default-execution-space", "-default-device", "--generate-line-info", "-lineinfo", "--minimal",
        "--restrict", "--extra-device-vectorization", "--dopt=on", "--ftz=false", "--prec-div=true", "--prec-sqrt=true",
        "--relocatable-device-code=false", "--ptxas-options=-v", "--ptxas-options=--warn-on-spills"
    };
    for (size_t i = 0; i < words.size(); i++) {
        std::string value;
        if (takes(words, &i, "--gpu-architecture", &value) || takes(words, &i, "-arch", &value)) {
            if (!parse_arch(value, o, log)) return false;
        } else if (takes(words, &i, "--std", &value) || takes(words, &i, "-std", &value)) {
            if (value != "c++17") { *log += "nvrtc: error: the emulated device compiles C++17 only\n"; return false; }
        } else if (takes(words, &i, "--fmad", &value) || takes(words, &i, "-fmad", &value)) {
            if (value != "false") { *log += "nvrtc: error: the emulated device needs --fmad=false\n"; return false; }
        } else if (takes(words, &i, "--define-macro", &value)) {
            o->defines.push_back("-D" + value);
        } else if (words[i] == "-D" && i + 1 < words.size()) {
            o->defines.push_back("-D" + words[++i]);
        } else if (words[i].compare(0, 2, "-D") == 0) {
            o->defines.push_back(words[i]);
        } else if (!ignored.count(words[i])) {
            *log += "nvrtc: error: unrecognized option " + words[i] + " found\n";
            return false;
        }
    }
    return true;
}

nvrtcResult compile(nvrtcProgram p, const std::vector<std::string> &words)
{
    options o;
    std::string object;
    p->log.clear();
    p->cubin.clear();
    p->ptx.clear();
    p->compiled = true;
    if (!parse_options(words, &o, &p->log)) return NVRTC_INVALID_OPTION;
    if (!host_compile(p->name, p->text, o.defines, o.chip, &object, &p->log)) return NVRTC_COMPILATION;
    if (!o.chip.is_virtual) p->cubin = host_make_cubin(o.chip, object);
    p->ptx = host_make_ptx(o.chip, host_ptx_version(version()), object);
    return NVRTC_SUCCESS;
}

// The two calls of each kind of output. Text counts its final zero.
nvrtcResult size_of(const char *function, nvrtcProgram p, const std::string nvrtc_program::*part, bool text,
                    size_t *size)
{
    if (int fault = host_fault(function)) return done(function, fault);
    if (!is_live(p)) return done(function, NVRTC_INVALID_PROGRAM);
    if (!size) return done(function, NVRTC_INVALID_INPUT);
    *size = (p->*part).size() + (text ? 1 : 0);
    return done(function, NVRTC_SUCCESS);
}

nvrtcResult copy_of(const char *function, nvrtcProgram p, const std::string nvrtc_program::*part, bool text, char *to)
{
    if (int fault = host_fault(function)) return done(function, fault);
    if (!is_live(p)) return done(function, NVRTC_INVALID_PROGRAM);
    if (!to) return done(function, NVRTC_INVALID_INPUT);
    memcpy(to, (p->*part).data(), (p->*part).size() + (text ? 1 : 0));
    return done(function, NVRTC_SUCCESS);
}

} // namespace

EMU_API const char *nvrtcGetErrorString(nvrtcResult result)
{
    static const char *const names[] = {
        "NVRTC_SUCCESS", "NVRTC_ERROR_OUT_OF_MEMORY", "NVRTC_ERROR_PROGRAM_CREATION_FAILURE",
        "NVRTC_ERROR_INVALID_INPUT", "NVRTC_ERROR_INVALID_PROGRAM", "NVRTC_ERROR_INVALID_OPTION",
        "NVRTC_ERROR_COMPILATION", "NVRTC_ERROR_BUILTIN_OPERATION_FAILURE",
        "NVRTC_ERROR_NO_NAME_EXPRESSIONS_AFTER_COMPILATION", "NVRTC_ERROR_NO_LOWERED_NAMES_BEFORE_COMPILATION",
        "NVRTC_ERROR_NAME_EXPRESSION_NOT_VALID", "NVRTC_ERROR_INTERNAL_ERROR"
    };
    return result >= 0 && result <= NVRTC_INTERNAL_ERROR ? names[result] : "NVRTC_ERROR unknown";
}

EMU_API nvrtcResult nvrtcVersion(int *major, int *minor)
{
    host_read_settings();
    if (int fault = host_fault("nvrtcVersion")) return done("nvrtcVersion", fault);
    if (!major || !minor) return done("nvrtcVersion", NVRTC_INVALID_INPUT);
    *major = version() / 1000;
    *minor = version() / 10 % 100;
    return done("nvrtcVersion", NVRTC_SUCCESS);
}

EMU_API nvrtcResult nvrtcGetNumSupportedArchs(int *count)
{
    if (int fault = host_fault("nvrtcGetNumSupportedArchs")) return done("nvrtcGetNumSupportedArchs", fault);
    if (!count) return done("nvrtcGetNumSupportedArchs", NVRTC_INVALID_INPUT);
    *count = (int)archs().size();
    return done("nvrtcGetNumSupportedArchs", NVRTC_SUCCESS);
}

EMU_API nvrtcResult nvrtcGetSupportedArchs(int *list)
{
    if (int fault = host_fault("nvrtcGetSupportedArchs")) return done("nvrtcGetSupportedArchs", fault);
    if (!list) return done("nvrtcGetSupportedArchs", NVRTC_INVALID_INPUT);
    for (int a : archs()) *list++ = a;
    return done("nvrtcGetSupportedArchs", NVRTC_SUCCESS);
}

EMU_API nvrtcResult nvrtcCreateProgram(nvrtcProgram *out, const char *text, const char *name, int headers,
                                       const char *const *, const char *const *)
{
    if (int fault = host_fault("nvrtcCreateProgram")) return done("nvrtcCreateProgram", fault);
    if (!out || !text || headers) return done("nvrtcCreateProgram", NVRTC_INVALID_INPUT);
    *out = new nvrtc_program;
    (*out)->text = text;
    (*out)->name = name ? name : "default_program";
    std::lock_guard<std::mutex> guard(live().lock);
    live().all.insert(*out);
    return done("nvrtcCreateProgram", NVRTC_SUCCESS);
}

EMU_API nvrtcResult nvrtcDestroyProgram(nvrtcProgram *p)
{
    if (!p || !is_live(*p)) return done("nvrtcDestroyProgram", NVRTC_INVALID_PROGRAM);
    {
        std::lock_guard<std::mutex> guard(live().lock);
        live().all.erase(*p);
    }
    delete *p;
    *p = nullptr;
    return done("nvrtcDestroyProgram", NVRTC_SUCCESS);
}

EMU_API nvrtcResult nvrtcCompileProgram(nvrtcProgram p, int count, const char *const *words)
{
    if (int fault = host_fault("nvrtcCompileProgram")) return done("nvrtcCompileProgram", fault);
    if (!is_live(p)) return done("nvrtcCompileProgram", NVRTC_INVALID_PROGRAM);
    if (count < 0 || (count && !words)) return done("nvrtcCompileProgram", NVRTC_INVALID_INPUT);
    return done("nvrtcCompileProgram", compile(p, std::vector<std::string>(words, words + count)));
}

EMU_API nvrtcResult nvrtcGetProgramLogSize(nvrtcProgram p, size_t *n)
{
    return size_of("nvrtcGetProgramLogSize", p, &nvrtc_program::log, true, n);
}

EMU_API nvrtcResult nvrtcGetProgramLog(nvrtcProgram p, char *to)
{
    return copy_of("nvrtcGetProgramLog", p, &nvrtc_program::log, true, to);
}

EMU_API nvrtcResult nvrtcGetCUBINSize(nvrtcProgram p, size_t *n)
{
    return size_of("nvrtcGetCUBINSize", p, &nvrtc_program::cubin, false, n);
}

EMU_API nvrtcResult nvrtcGetCUBIN(nvrtcProgram p, char *to)
{
    return copy_of("nvrtcGetCUBIN", p, &nvrtc_program::cubin, false, to);
}

EMU_API nvrtcResult nvrtcGetPTXSize(nvrtcProgram p, size_t *n)
{
    return size_of("nvrtcGetPTXSize", p, &nvrtc_program::ptx, true, n);
}

EMU_API nvrtcResult nvrtcGetPTX(nvrtcProgram p, char *to)
{
    return copy_of("nvrtcGetPTX", p, &nvrtc_program::ptx, true, to);
}

// Entries are extern "C": a name's lowered form is the name.
EMU_API nvrtcResult nvrtcAddNameExpression(nvrtcProgram p, const char *name)
{
    if (!is_live(p)) return done("nvrtcAddNameExpression", NVRTC_INVALID_PROGRAM);
    if (!name) return done("nvrtcAddNameExpression", NVRTC_INVALID_INPUT);
    if (p->compiled) return done("nvrtcAddNameExpression", NVRTC_NO_NAMES_AFTER_COMPILATION);
    p->names.insert(name);
    return done("nvrtcAddNameExpression", NVRTC_SUCCESS);
}

EMU_API nvrtcResult nvrtcGetLoweredName(nvrtcProgram p, const char *name, const char **lowered)
{
    if (!is_live(p)) return done("nvrtcGetLoweredName", NVRTC_INVALID_PROGRAM);
    if (!name || !lowered) return done("nvrtcGetLoweredName", NVRTC_INVALID_INPUT);
    if (!p->compiled) return done("nvrtcGetLoweredName", NVRTC_NO_LOWERED_NAMES_BEFORE_COMPILATION);
    auto found = p->names.find(name);
    if (found == p->names.end()) return done("nvrtcGetLoweredName", NVRTC_NAME_NOT_VALID);
    *lowered = found->c_str();
    return done("nvrtcGetLoweredName", NVRTC_SUCCESS);
}
