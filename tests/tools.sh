# tools.sh - need_tools: a C compiler and make, installed where that can be done; sourced by demo.sh and run.sh.

have() { command -v "$1" >/dev/null 2>&1; }

# Whether a C compiler is here that links programs: some systems have one without the C library's headers.
compiles() {
    for compiler in ${CC:-} cc gcc clang; do
        have "$compiler" || continue
        folder=$(mktemp -d "${TMPDIR:-/tmp}/moe.XXXXXX") || return 1
        echo '#include <stdio.h>
int main(void) { return puts("") < 0; }' >"$folder/a.c"
        if "$compiler" -o "$folder/a" "$folder/a.c" >/dev/null 2>&1; then
            rm -rf "$folder"
            CC=$compiler
            export CC
            return 0
        fi
        rm -rf "$folder"
    done
    return 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

# What this system's package manager would be told; empty where there is none that we know. g++ compiles the emulated
# device of the tests.
install_command() {
    if have apt-get; then echo "apt-get install -y --no-install-recommends gcc g++ libc6-dev make"
    elif have dnf; then echo "dnf install -y gcc gcc-c++ glibc-devel make"
    elif have yum; then echo "yum install -y gcc gcc-c++ glibc-devel make"
    elif have apk; then echo "apk add gcc g++ musl-dev make"
    elif have pacman; then echo "pacman -S --noconfirm --needed gcc make"
    elif have zypper; then echo "zypper --non-interactive install gcc gcc-c++ glibc-devel make"
    elif have xbps-install; then echo "xbps-install -Sy gcc glibc-devel make"
    elif have brew; then echo "brew install gcc make"
    fi
}

need_tools() {
    if compiles && have make; then return 0; fi
    command=$(install_command)
    if [ -z "$command" ]; then
        echo "A C compiler (gcc or clang, with the C library's headers) and GNU make are needed. Install them, then run this again." >&2
        exit 1
    fi
    case $command in
    brew*) runs_as= ;;
    *)
        runs_as=as_root
        if [ "$(id -u)" != 0 ] && ! { have sudo && sudo -n true 2>/dev/null; }; then
            echo "A C compiler and make are needed. Run this as root, then start again:  $command" >&2
            exit 1
        fi
        ;;
    esac
    echo "Installing a C compiler and make: $command"
    case $command in apt-get*)
        # A new machine has no package lists yet.
        DEBIAN_FRONTEND=noninteractive
        export DEBIAN_FRONTEND
        $runs_as apt-get update -qq || { echo "apt-get update failed; install gcc, libc6-dev and make, then run this again" >&2; exit 1; }
        ;;
    esac
    # shellcheck disable=SC2086
    if ! $runs_as $command >"${TMPDIR:-/tmp}/moe-install.log" 2>&1; then
        cat "${TMPDIR:-/tmp}/moe-install.log" >&2
        echo "That did not work. Install a C compiler and make yourself, then run this again." >&2
        exit 1
    fi
    if ! compiles || ! have make; then
        echo "A C compiler and make are still missing after: $command" >&2
        exit 1
    fi
}
