// mutants.c - breaks one thing at a time and checks that a test reports it: `make mutants`
//
// cc -std=gnu99 -o build/run_mutants tests/mutants/mutants.c; runs in the repository's root, behind what `make emu`
// builds. Arguments: only mutants whose name contains one of them; MOE_MUTANTS_STEP=n: every n-th of these alone.
// tests/mutants/list.txt has the mutants, pipeline.txt those of tests/gpu_pipeline.c where it is there:
//
//     mutant scales_without_release                  name
//     class a store that no arrival releases         what it stands for
//     file tests/pipeline.cu.inc                     where the text lies; it must be there exactly once
//     run gpu_pipeline scales                        the test program and which of its tests guard it
//     report race                                    what the output must contain, beside a failed test
//     <<<<                                           the text,
//     ====
//     >>>>                                           and what takes its place
//
// Each mutant is a tree of links to the repository (build/mutants/NAME) with the broken file in place. The guards pass
// on the unbroken tree first. Last line: N mutants, N caught.
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 128, NAME = 64, LINE = 256, PATH = 1024, COMMAND = 4096, LIMIT_S = 40 };

typedef struct mutant {
    char name[LINE], type[LINE], file[LINE], run[LINE], report[LINE];
    char *old_text, *new_text;
} mutant;

static mutant mutants[MOST];
static int mutant_count;
static char root[PATH], compiler[LINE];

static void die(const char *what, const char *which)
{
    fprintf(stderr, "mutants: %s: %s\n", what, which);
    exit(2);
}

// ---- files ----------------------------------------------------------------------------------------------------------

static char *read_file(const char *path)
{
    FILE *f = fopen(path, "rb");
    char *text = NULL;
    size_t used = 0, n = 0;
    if (f == NULL) return NULL;
    do {
        text = (char *)realloc(text, used + 65537);
        n = fread(text + used, 1, 65536, f);
        used += n;
    } while (n > 0);
    text[used] = 0;
    fclose(f);
    return text;
}

static void write_file(const char *path, const char *text)
{
    FILE *f = fopen(path, "wb");
    if (f == NULL || fputs(text, f) < 0 || fclose(f) != 0) die("cannot write", path);
}

// Every entry of `from` as a link in `to`, but tests/ and build/.
static void link_entries(const char *from, const char *to)
{
    char source[3 * PATH], target[3 * PATH];
    DIR *d = opendir(from);
    const struct dirent *e;
    if (d == NULL) die("cannot read", from);
    while ((e = readdir(d)) != NULL) {
        if (e->d_name[0] == '.' || !strcmp(e->d_name, "tests") || !strcmp(e->d_name, "build")) continue;
        snprintf(source, sizeof source, "%s/%s/%s", root, from, e->d_name);
        snprintf(target, sizeof target, "%s/%s", to, e->d_name);
        unlink(target);
        if (symlink(source, target) != 0) die("cannot link", target);
    }
    closedir(d);
}

// build/mutants/NAME: the repository, with tests/ and build/ folders of its own.
static void make_tree(const char *tree)
{
    char path[PATH];
    mkdir(tree, 0777);
    link_entries(".", tree);
    snprintf(path, sizeof path, "%s/tests", tree);
    mkdir(path, 0777);
    link_entries("tests", path);
    snprintf(path, sizeof path, "%s/build", tree);
    mkdir(path, 0777);
}

// ---- the list -------------------------------------------------------------------------------------------------------

static int keyword(const char *line, const char *word, char *value)
{
    size_t n = strlen(word);
    if (strncmp(line, word, n) != 0 || line[n] != ' ') return 0;
    snprintf(value, LINE, "%s", line + n + 1);
    value[strcspn(value, "\n")] = 0;
    return 1;
}

// Lines up to the one that is `end`.
static char *block(FILE *f, const char *end)
{
    char line[LINE], *text = (char *)calloc(1, 1);
    while (fgets(line, sizeof line, f) != NULL && strcmp(line, end) != 0) {
        text = (char *)realloc(text, strlen(text) + strlen(line) + 1);
        strcat(text, line);
    }
    return text;
}

static int chosen(const char *name, int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        if (strstr(name, argv[i]) != NULL) return 1;
    return argc < 2;
}

static void read_list(const char *path, int argc, char **argv)
{
    char line[LINE];
    FILE *f = fopen(path, "rb");
    mutant m;
    if (f == NULL) die("cannot read", path);
    memset(&m, 0, sizeof m);
    while (fgets(line, sizeof line, f) != NULL) {
        if (line[0] == '#' || line[0] == '\n' || keyword(line, "mutant", m.name) || keyword(line, "class", m.type) ||
            keyword(line, "file", m.file) || keyword(line, "run", m.run) || keyword(line, "report", m.report)) continue;
        if (strcmp(line, "<<<<\n") != 0) die("cannot understand", line);
        m.old_text = block(f, "====\n");
        m.new_text = block(f, ">>>>\n");
        if (mutant_count == MOST) die("too many mutants", m.name);
        if (chosen(m.name, argc, argv)) mutants[mutant_count++] = m;
        memset(m.name, 0, sizeof m.name);
    }
    fclose(f);
}

// ---- one mutant -----------------------------------------------------------------------------------------------------

// Kernel text as moe.h holds it: a string literal per line.
static char *quote(const char *text)
{
    char *quoted = (char *)malloc(8 * strlen(text) + 8), *to = quoted;
    for (; *text != 0; text++) {
        if (text[0] == '\n') {
            to += sprintf(to, "\\n\"\n");
            continue;
        }
        if (to == quoted || to[-1] == '\n') *to++ = '"';
        if (*text == '"' || *text == '\\') *to++ = '\\';
        *to++ = *text;
    }
    *to = 0;
    return quoted;
}

// moe.h's kernel text as one piece, without escapes that quote() does not make: pieces end anywhere.
static void join_pieces(char *text)
{
    char *from = strstr(text, "// >>kernels-begin"), *to = from;
    if (from == NULL) die("no kernel text in", "moe.h");
    for (; *from != 0; from++)
        if (!(from[0] == '\\' && from[1] == '?') && !(strncmp(from - 1, "\",\n\"", 4) == 0)) *to++ = *from;
    *to = 0;
}

// What lies in moe.h of kernel text, which is broken where it is compiled from.
static const char *file_of(const mutant *m) { return strcmp(m->file, "moe_kernels.cu.inc") == 0 ? "moe.h" : m->file; }

// The broken file's text, to be freed; NULL: *wrong says why not.
static char *broken_text(const mutant *m, const char **wrong)
{
    int embedded = strcmp(m->file, file_of(m)) != 0;
    const char *old_text = embedded ? quote(m->old_text) : m->old_text;
    const char *new_text = embedded ? quote(m->new_text) : m->new_text;
    char *text = read_file(file_of(m)), *at, *broken = NULL;
    if (text != NULL && embedded) join_pieces(text);
    at = text == NULL ? NULL : strstr(text, old_text);
    *wrong = at == NULL ? "the text is not in the file any more" : NULL;
    if (at != NULL && strstr(at + 1, old_text) != NULL) *wrong = "the text is in the file more than once";
    if (*wrong == NULL) {
        broken = (char *)malloc(strlen(text) + strlen(new_text) + 1);
        memcpy(broken, text, (size_t)(at - text));
        strcpy(broken + (at - text), new_text);
        strcat(broken, at + strlen(old_text));
    }
    free(text);
    return broken;
}

// The broken file in the tree.
static const char *break_file(const mutant *m, const char *tree)
{
    const char *wrong;
    char path[PATH], *broken = broken_text(m, &wrong);
    if (broken == NULL) return wrong;
    snprintf(path, sizeof path, "%s/%s", tree, file_of(m));
    unlink(path);
    write_file(path, broken);
    free(broken);
    return NULL;
}

// The test program. Kernel text of tests/ is read when it runs: the unbroken tree's program will do.
static int build(const char *tree, const mutant *m, int part, const char *program)
{
    char command[COMMAND], unbroken[NAME];
    snprintf(command, sizeof command, "%s/build/%s", tree, program);
    if (m == NULL && access(command, X_OK) == 0) return 1;
    if (m != NULL && strncmp(m->file, "tests/", 6) == 0 && strstr(m->file, ".cu.inc") != NULL) {
        snprintf(unbroken, sizeof unbroken, "build/mutants/unbroken%d", part);
        make_tree(unbroken);
        if (!build(unbroken, NULL, part, program)) return 0;
        snprintf(command, sizeof command, "ln -sf %s/%s/build/%s %s/build/%s", root, unbroken, program, tree, program);
        return system(command) == 0;
    }
    snprintf(command, sizeof command, "cd %s && %s -std=gnu99 -O0 -o build/%s tests/%s.c -ldl -lpthread -lm "
             ">build/%s.build.log 2>&1", tree, compiler, program, program, program);
    return system(command) == 0;
}

// Runs the guards. 0: they pass; else they fail, or end in a crash or by the time limit.
static int run_guards(const mutant *m, const char *tree, const char *program)
{
    char command[COMMAND];
    const char *filter = strchr(m->run, ' ');
    snprintf(command, sizeof command, "cd %s && MOE_EMU_REPORT=$PWD/build/report timeout -s KILL %d build/%s%s "
             ">build/%s.log 2>&1", tree, LIMIT_S, program, filter == NULL ? "" : filter, program);
    return system(command);
}

// What is wrong, or NULL: the guard reported it.
static const char *try_mutant(const mutant *m, int part, int broken)
{
    char tree[LINE], program[NAME], path[PATH];
    const char *wrong;
    char *log;
    int status;
    if (broken) snprintf(tree, sizeof tree, "build/mutants/%.64s", m->name);
    else snprintf(tree, sizeof tree, "build/mutants/unbroken%d", part);
    snprintf(program, sizeof program, "%.*s", (int)strcspn(m->run, " ") & 63, m->run);
    make_tree(tree);
    if (broken && (wrong = break_file(m, tree)) != NULL) return wrong;
    if (!build(tree, broken ? m : NULL, part, program)) return "does not build";
    status = run_guards(m, tree, program);
    snprintf(path, sizeof path, "%s/build/%s.log", tree, program);
    log = read_file(path);
    if (log == NULL) return "no output";
    if (!broken) return status == 0 && strstr(log, " 0 failed") != NULL && strstr(log, ": 0 passed") == NULL
                        ? NULL : "the guard fails on the unbroken text";
    if (status == 0) return "not caught";
    if (strstr(log, m->report) == NULL) return "caught, but not by the report that was expected";
    free(log);
    return NULL;
}

// ---- all of them, two at a time -------------------------------------------------------------------------------------

static int same_run(const mutant *m)
{
    for (const mutant *each = mutants; each < m; each++)
        if (strcmp(each->run, m->run) == 0) return 1;
    return 0;
}

static void report(const mutant *m, int broken, int ok, const char *verdict)
{
    if (!broken && ok) return;
    printf("%-34s %-6s %s: %s%s%s\n", m->name, ok ? "caught" : "MISSED", m->run, m->type, ok ? "" : ": ",
           ok ? "" : verdict);
    fflush(stdout);
}

// Works on the mutants that are `part` modulo 2. Returns how many were caught.
static int work(int part, int broken)
{
    int caught = 0;
    for (int i = part; i < mutant_count; i += 2) {
        const mutant *m = &mutants[i];
        const char *wrong;
        if (!broken && same_run(m)) continue;
        wrong = try_mutant(m, part, broken);
        caught += wrong == NULL;
        report(m, broken, wrong == NULL, wrong);
        if (!broken && wrong != NULL) return -1;
    }
    return caught;
}

// The number caught, or -1.
static int work_on_both_cores(int broken)
{
    int status, first;
    pid_t other = fork();
    if (other == 0) _exit(work(1, broken) & 255);
    first = work(0, broken);
    if (other < 0 || waitpid(other, &status, 0) < 0 || !WIFEXITED(status)) return -1;
    if (first < 0 || WEXITSTATUS(status) == 255) return -1;
    return first + WEXITSTATUS(status);
}

static void set_library(const char *variable, const char *name)
{
    char path[2 * PATH];
    snprintf(path, sizeof path, "%s/build/emu/%s", root, name);
    if (access(path, R_OK) != 0) die("not built", path);
    setenv(variable, path, 1);
}

int main(int argc, char **argv)
{
    char cache[2 * PATH];
    time_t start = time(NULL);
    int caught, step = getenv("MOE_MUTANTS_STEP") != NULL ? atoi(getenv("MOE_MUTANTS_STEP")) : 1;
    if (getcwd(root, sizeof root) == NULL) die("no folder", ".");
    snprintf(compiler, sizeof compiler, "%s", getenv("CC") != NULL && getenv("CC")[0] ? getenv("CC") : "cc");
    set_library("MOE_CUDA_LIB", "libcuda.so.1");
    set_library("MOE_NVRTC_LIB", "libnvrtc.so.13");
    read_list("tests/mutants/list.txt", argc, argv);
    if (access("tests/gpu_pipeline.c", R_OK) == 0) read_list("tests/mutants/pipeline.txt", argc, argv);
    for (int i = 0; i < mutant_count; i++) { // also of those that are left out
        const char *wrong;
        char *broken = broken_text(&mutants[i], &wrong);
        if (broken == NULL) die(mutants[i].name, wrong);
        free(broken);
    }
    if (step > 1) {
        mutant_count = (mutant_count + step - 1) / step;
        for (int i = 0; i < mutant_count; i++) mutants[i] = mutants[i * step];
    }
    mkdir("build/mutants", 0777);
    if (system("cd build/mutants && find . -mindepth 1 -maxdepth 1 ! -name cache -exec rm -rf {} +") != 0)
        die("cannot empty", "build/mutants");
    snprintf(cache, sizeof cache, "%s/build/mutants/cache", root);
    mkdir(cache, 0777);
    setenv("MOE_EMU_CACHE", cache, 1);
    setenv("MOE_CACHE", "off", 1);
    unsetenv("MOE_EMU_SEED");
    unsetenv("MOE_TEST_TEMP"); // a folder that the tree of a mutant has not
    if (work_on_both_cores(0) < 0) return 1;
    caught = work_on_both_cores(1);
    printf("%d s\n%d mutants, %d caught\n", (int)(time(NULL) - start), mutant_count, caught);
    return caught != mutant_count;
}
