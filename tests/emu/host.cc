#include "host.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <set>

extern char **environ;

#ifndef EMU_DEVICE_H
#define EMU_DEVICE_H "tests/emu/device.h"
#endif

// ---- environment ----------------------------------------------------------------------------------------------------

namespace {

struct fault {
    int nth, result;
};

struct settings {
    std::recursive_mutex lock;
    std::multimap<std::string, fault> faults;
    std::map<std::string, int> calls;
    std::set<std::string> missing;
    std::string log_file, kept;
    bool keeps = false, read = false;
};

// Never destroyed: libraries are called until the last exit handler.
settings &state()
{
    static settings *s = new settings;
    return *s;
}

int thread_number()
{
    static std::atomic<int> last{0};
    static thread_local int number = ++last;
    return number;
}

void append(const std::string &path, const std::string &text)
{
    int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (fd < 0) return;
    if (write(fd, text.data(), text.size()) < 0) perror(path.c_str());
    close(fd);
}

} // namespace

std::string host_env(const char *name, const char *otherwise)
{
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

std::vector<std::string> host_split(const std::string &list, char separator)
{
    std::vector<std::string> parts;
    for (size_t at = 0; at < list.size();) {
        size_t end = std::min(list.find(separator, at), list.size());
        if (end > at) parts.push_back(list.substr(at, end - at));
        at = end + 1;
    }
    return parts;
}

void host_read_settings()
{
    settings &s = state();
    std::lock_guard<std::recursive_mutex> guard(s.lock);
    s.faults.clear();
    s.calls.clear();
    s.missing.clear();
    for (const std::string &item : host_split(host_env("MOE_EMU_FAIL", ""), ',')) {
        char name[128];
        fault f;
        if (sscanf(item.c_str(), "%127[^:]:%d=%d", name, &f.nth, &f.result) == 3) s.faults.emplace(name, f);
        else host_report("MOE_EMU_FAIL: \"" + item + "\" is not name:call=code\n");
    }
    for (const std::string &item : host_split(host_env("MOE_EMU_MISSING", ""), ',')) s.missing.insert(item);
    s.log_file = host_env("MOE_EMU_LOG", "");
    s.read = true;
}

int host_fault(const char *function)
{
    settings &s = state();
    std::lock_guard<std::recursive_mutex> guard(s.lock);
    if (!s.read) host_read_settings();
    if (s.faults.empty()) return 0;
    int call = ++s.calls[function];
    auto range = s.faults.equal_range(function);
    for (auto i = range.first; i != range.second; ++i)
        if (i->second.nth == call || !i->second.nth) return i->second.result;
    return 0;
}

bool host_missing(const char *function)
{
    settings &s = state();
    std::lock_guard<std::recursive_mutex> guard(s.lock);
    if (!s.read) host_read_settings();
    return s.missing.count(function) != 0;
}

void host_log(const char *function, long stream, int capture, int result)
{
    settings &s = state();
    std::lock_guard<std::recursive_mutex> guard(s.lock);
    if (s.log_file.empty() && !s.keeps) return;
    static const char *const states[] = { "-", "capturing", "invalidated" };
    std::string name = stream == 0 ? "-" : stream == -1 ? "legacy" : stream == -2 ? "thread" : std::to_string(stream);
    std::string line = std::string(function) + " " + std::to_string(thread_number()) + " " + name + " " +
                       states[capture] + " " + std::to_string(result) + "\n";
    if (s.keeps) s.kept += line;
    if (!s.log_file.empty()) append(s.log_file, line);
}

void host_log_begin()
{
    settings &s = state();
    std::lock_guard<std::recursive_mutex> guard(s.lock);
    s.kept.clear();
    s.keeps = true;
}

const char *host_log_end()
{
    settings &s = state();
    std::lock_guard<std::recursive_mutex> guard(s.lock);
    s.keeps = false;
    return s.kept.c_str();
}

void host_report(const std::string &text)
{
    fputs(text.c_str(), stderr);
    std::string path = host_env("MOE_EMU_REPORT", "");
    if (!path.empty()) append(path, text);
}

// ---- files and hashes -----------------------------------------------------------------------------------------------

namespace {

uint64_t fnv(const std::string &bytes, uint64_t h)
{
    for (unsigned char c : bytes) h = (h ^ c) * 0x100000001b3ull;
    return h;
}

bool read_file(const std::string &path, std::string *bytes)
{
    FILE *f = fopen(path.c_str(), "rb");
    if (!f) return false;
    bytes->clear();
    char block[65536];
    for (size_t n; (n = fread(block, 1, sizeof block, f)) > 0;) bytes->append(block, n);
    fclose(f);
    return true;
}

bool write_file(const std::string &path, const std::string &bytes)
{
    FILE *f = fopen(path.c_str(), "wb");
    if (!f) return false;
    bool ok = fwrite(bytes.data(), 1, bytes.size(), f) == bytes.size();
    return fclose(f) == 0 && ok;
}

// A folder that goes away with what is in it.
struct temp_folder {
    std::string path;
    temp_folder()
    {
        std::string name = host_env("TMPDIR", "/tmp") + "/emu.XXXXXX";
        if (mkdtemp(&name[0])) path = name;
    }
    ~temp_folder()
    {
        if (path.empty()) return;
        for (const char *name : { "/text.cc", "/text.so", "/text.log" }) unlink((path + name).c_str());
        rmdir(path.c_str());
    }
};

// Runs a program with its output in `log`; its exit status, or -1.
int run(const std::vector<std::string> &words, const std::string &log)
{
    std::vector<char *> argv;
    for (const std::string &w : words) argv.push_back(const_cast<char *>(w.c_str()));
    argv.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 1, log.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    posix_spawn_file_actions_adddup2(&actions, 1, 2);
    pid_t pid;
    int failed = posix_spawnp(&pid, argv[0], &actions, nullptr, argv.data(), environ), status = -1;
    posix_spawn_file_actions_destroy(&actions);
    if (failed) return -1;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

std::string folder_of(const std::string &path)
{
    size_t slash = path.rfind('/');
    return slash == std::string::npos ? "." : path.substr(0, slash);
}

// Everything that decides the compiled bytes, in one string. device.h and the headers beside it are part of it.
std::string cache_key(const std::vector<std::string> &command, const std::string &text, const std::string &device_h)
{
    std::vector<std::string> names;
    if (DIR *d = opendir(folder_of(device_h).c_str())) {
        while (const dirent *e = readdir(d)) {
            std::string name = e->d_name;
            if (name.size() > 2 && name.compare(name.size() - 2, 2, ".h") == 0) names.push_back(name);
        }
        closedir(d);
    }
    std::sort(names.begin(), names.end());
    std::string key = text;
    for (const std::string &w : command) key += "\n" + w;
    for (const std::string &name : names) {
        std::string bytes;
        if (read_file(folder_of(device_h) + "/" + name, &bytes)) key += "\n" + name + "\n" + bytes;
    }
    return key;
}

std::string cache_path(const std::string &folder, const std::string &key)
{
    char name[64];
    snprintf(name, sizeof name, "/%016llx%016llx.emu", (unsigned long long)fnv(key, 0xcbf29ce484222325ull),
             (unsigned long long)fnv(key, 0x84222325cbf29ce4ull));
    return folder + name;
}

bool cache_store(const std::string &path, const std::string &bytes)
{
    std::string temporary = path + "." + std::to_string(getpid()) + "." + std::to_string(thread_number());
    if (write_file(temporary, bytes) && rename(temporary.c_str(), path.c_str()) == 0) return true;
    unlink(temporary.c_str());
    return false;
}

} // namespace

// ---- compiling ------------------------------------------------------------------------------------------------------

bool host_parse_chip(const std::string &name, host_chip *chip)
{
    size_t at = name.compare(0, 3, "sm_") == 0 ? 3 : name.compare(0, 8, "compute_") == 0 ? 8 : 0;
    if (!at) return false;
    size_t end = at;
    while (end < name.size() && isdigit((unsigned char)name[end])) end++;
    if (end - at < 2 || end - at > 3 || name.size() > end + 1) return false;
    chip->major_minor = atoi(name.substr(at, end - at).c_str());
    chip->variant = end < name.size() ? name[end] : 0;
    chip->is_virtual = at == 8;
    return !chip->variant || chip->variant == 'a' || chip->variant == 'f';
}

// -fno-strict-aliasing: kernel text reads bytes as vectors, as CUDA code does. Without the sanitizers' libraries
// (-nodefaultlibs) their functions stay undefined until the engine's own meet them at load. Hidden, not unique: two
// programs in one process never share a function.
static std::vector<std::string> compile_command(const std::vector<std::string> &defines, const host_chip &chip)
{
    std::vector<std::string> c = {
        host_env("MOE_EMU_CXX", "g++"), "-x", "c++", "-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing",
        "-fsanitize=thread,alignment", "--param=tsan-instrument-func-entry-exit=0", "-fPIC",
        "-shared", "-nodefaultlibs", "-fvisibility=hidden", "-fno-gnu-unique", "-fno-exceptions", "-fno-rtti",
        "-fno-stack-protector",
        "-fno-threadsafe-statics", "-w", "-Wl,-Bsymbolic", "-DMOE_EMU", "-include",
        host_env("MOE_EMU_DEVICE_H", EMU_DEVICE_H), "-DMOE_ARCH=" + std::to_string(chip.major_minor),
        std::string("-DMOE_ARCH_A=") + (chip.variant == 'a' ? "1" : "0")
    };
    c.insert(c.end(), defines.begin(), defines.end());
    return c;
}

bool host_compile(const std::string &name, const std::string &text, const std::vector<std::string> &defines,
                  const host_chip &chip, std::string *shared_object, std::string *log)
{
    std::vector<std::string> command = compile_command(defines, chip);
    std::string cache = host_env("MOE_EMU_CACHE", ""), cached;
    if (!cache.empty()) {
        cached = cache_path(cache, cache_key(command, text, host_env("MOE_EMU_DEVICE_H", EMU_DEVICE_H)));
        if (read_file(cached, shared_object)) return true;
    }
    temp_folder folder;
    std::string source = folder.path + "/text.cc", object = folder.path + "/text.so";
    std::string output = folder.path + "/text.log";
    if (folder.path.empty() || !write_file(source, "#line 1 \"" + name + "\"\n" + text)) {
        *log = "cannot write to the folder of temporary files";
        return false;
    }
    command.insert(command.end(), { "-o", object, source, "-lm", "-lc", "-lgcc" });
    int status = run(command, output);
    read_file(output, log);
    if (status < 0) *log += "cannot run " + command[0];
    if (status || !read_file(object, shared_object)) return false;
    if (!cache.empty()) cache_store(cached, *shared_object);
    return true;
}

// ---- images ---------------------------------------------------------------------------------------------------------

namespace {

struct image_header {
    char magic[8];
    uint32_t header_bytes, chip, variant, reserved;
    uint64_t payload_bytes, payload_hash, header_hash;
    uint64_t zero[2];
};
static_assert(sizeof(image_header) == 64, "an emulated cubin starts with 64 bytes");

const char emulated_line[] = "// emu ";

uint64_t header_hash(image_header h)
{
    h.header_hash = 0;
    return fnv(std::string((const char *)&h, sizeof h), 1);
}

int hex_digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

// "// moe: -DMOE_K_ROUTE -DMOE_P_EXPERTS=256": how embedded PTX says which program it is.
void parse_ptx_comment(const std::string &line, host_image *image)
{
    if (line.compare(0, 2, "//") != 0) return;
    for (const std::string &word : host_split(line, ' '))
        if (word.compare(0, 2, "-D") == 0) image->defines.push_back(word);
}

host_image parse_ptx(const char *text)
{
    host_image image;
    std::string cubin;
    int major, minor;
    char target[32];
    for (const std::string &line : host_split(text, '\n')) {
        if (line.compare(0, sizeof emulated_line - 1, emulated_line) == 0) {
            for (size_t i = sizeof emulated_line - 1; i + 1 < line.size(); i += 2)
                cubin += (char)(hex_digit(line[i]) << 4 | hex_digit(line[i + 1]));
        } else if (sscanf(line.c_str(), ".version %d.%d", &major, &minor) == 2) {
            image.ptx_version = major * 10 + minor;
        } else if (sscanf(line.c_str(), ".target %31[a-z0-9_]", target) == 1) {
            if (!host_parse_chip(target, &image.chip)) return host_image();
        } else {
            parse_ptx_comment(line, &image);
        }
    }
    if (!image.ptx_version || !image.chip.major_minor) return host_image();
    image.kind = HOST_IMAGE_PTX_TEXT;
    if (cubin.size() < sizeof(image_header)) return image;
    host_image inner = host_parse_image(cubin.data());
    image.kind = inner.kind == HOST_IMAGE_CUBIN ? HOST_IMAGE_PTX : HOST_IMAGE_BAD;
    image.shared_object = inner.shared_object;
    return image;
}

} // namespace

std::string host_make_cubin(const host_chip &chip, const std::string &shared_object)
{
    image_header h = {};
    memcpy(h.magic, "EMUCUBIN", 8);
    h.header_bytes = sizeof h;
    h.chip = (uint32_t)chip.major_minor;
    h.variant = (uint32_t)chip.variant;
    h.payload_bytes = shared_object.size();
    h.payload_hash = fnv(shared_object, 1);
    h.header_hash = header_hash(h);
    return std::string((const char *)&h, sizeof h) + shared_object;
}

std::string host_make_ptx(const host_chip &chip, int ptx_version, const std::string &shared_object)
{
    static const char digits[] = "0123456789abcdef";
    std::string cubin = host_make_cubin(chip, shared_object), target = std::to_string(chip.major_minor);
    if (chip.variant) target += chip.variant;
    std::string text = "//\n// PTX of the emulated device\n//\n.version " + std::to_string(ptx_version / 10) + "." +
                       std::to_string(ptx_version % 10) + "\n.target sm_" + target + "\n.address_size 64\n";
    for (size_t at = 0; at < cubin.size(); at += 56) {
        text += emulated_line;
        for (size_t i = at; i < std::min(at + 56, cubin.size()); i++) {
            text += digits[(unsigned char)cubin[i] >> 4];
            text += digits[(unsigned char)cubin[i] & 15];
        }
        text += '\n';
    }
    return text;
}

host_image host_parse_image(const void *bytes)
{
    host_image image;
    image_header h;
    const char *text = (const char *)bytes;
    if (strncmp(text, "EMUCUBIN", 8) != 0)
        return text[0] == '/' || text[0] == '.' || isspace((unsigned char)text[0]) ? parse_ptx(text) : image;
    memcpy(&h, bytes, sizeof h);
    if (h.header_bytes != sizeof h || h.header_hash != header_hash(h)) return image;
    image.shared_object.assign(text + sizeof h, h.payload_bytes);
    if (fnv(image.shared_object, 1) != h.payload_hash) return host_image();
    image.chip.major_minor = (int)h.chip;
    image.chip.variant = (char)h.variant;
    image.kind = HOST_IMAGE_CUBIN;
    return image;
}

// The PTX ISA's release notes: CUDA 11.8 brought 7.8, 12.0 8.0 to 12.5 8.5, 12.6 no new one, 13.0 9.0.
int host_ptx_version(int cuda_version)
{
    int major = cuda_version / 1000, minor = cuda_version / 10 % 100;
    if (major < 12) return 70 + minor;
    if (major > 12) return major * 10 - 40 + minor;
    return 80 + (minor < 6 ? minor : minor - 1);
}
