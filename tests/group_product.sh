#!/bin/sh
# The header as a product: several files, symbols, what it links to, layout of public structs, the shared library.
. tests/group.sh
o=$temp
PARTS_FILE=$temp/parts.moe
export PARTS_FILE

compile() { $CC -O0 "$@"; }

# ---- several files --------------------------------------------------------------------------------------------------
try "the implementation compiles on its own" compile -std=c99 -c -o "$o/implementation.o" tests/compile/implementation.c
try "a second file includes the declarations" compile -std=c99 -o "$o/two" tests/compile/user.c "$o/implementation.o" -lpthread
try "two files, run" "$o/two"
if have "$CXX"; then
    try "a C++ file calls a C implementation" $CXX -O0 -std=c++11 -o "$o/mixed" -x c++ tests/compile/user.c -x none \
        "$o/implementation.o" -lpthread
    try "C and C++, run" "$o/mixed"
else
    skip "a C++ file calls a C implementation" "no $CXX"
fi
try "two private copies in one program" compile -std=c99 -o "$o/private" tests/compile/static_a.c tests/compile/static_b.c -lpthread
try "two private copies, run" "$o/private"

# ---- symbols --------------------------------------------------------------------------------------------------------
foreign_symbols() { # prints external symbols that are not moe_..., and fails if there are any
    nm -g --defined-only "$1" | awk '$3 !~ /^_?moe_[a-z0-9]/ { print "foreign symbol", $3; bad = 1 } END { exit bad }'
}
few_symbols() { [ "$(nm -g --defined-only "$1" | wc -l)" -ge 40 ]; }
writable() { # sections that hold writable data; .data.rel.ro is const data with addresses
    size -A "$1" | awk '$1 ~ /^\.(data|bss|tdata|tbss|data\.rel|data\.rel\.local)$/ && $2 > 0 { print; bad = 1 }
                        END { exit bad }'
}
if have nm && have size; then
    try "external symbols are all moe_" foreign_symbols "$o/implementation.o"
    try "the external symbols are there" few_symbols "$o/implementation.o"
    try "no writable globals" writable "$o/implementation.o"
else
    skip "symbols" "no nm and size"
fi

# ---- libraries ------------------------------------------------------------------------------------------------------
libc_only() {
    compile -std=c99 -nodefaultlibs -o "$o/libc_only" tests/compile/parts.c -lc -lgcc ||
        compile -std=c99 -nodefaultlibs -o "$o/libc_only" tests/compile/parts.c -lc -lpthread -lgcc
}
try "links with the C library alone" libc_only
try "one call of each part with the C library alone" "$o/libc_only"

# ---- layout of public structs ---------------------------------------------------------------------------------------
members() { # struct.member of every public struct, as moe.h declares them
    awk '/^typedef struct [a-z_]+ \{/ { name = $3; next }
         /^} [a-z_]+;/ { name = "" }
         name == "" || /^ *\/\// { next }
         {
             sub(/\/\/.*/, "")
             if ($0 !~ /;/) next
             sub(/;.*/, "")
             if (match($0, /\(\*[a-z_0-9]+\)/)) { print name "." substr($0, RSTART + 2, RLENGTH - 3); next }
             gsub(/\[[^]]*\]/, "")
             n = split($0, words, /[ *]+/)
             print name "." words[n]
         }' "$1"
}
public_part() { sed -n '1,/^#endif \/\/ MOE_H/p' moe.h; }
complete() {
    public_part >"$o/public.h"
    members "$o/public.h" | sort >"$o/declared"
    "$o/abi_layout" | awk '$1 == "member" { print $2 }' | sort >"$o/listed"
    [ -s "$o/declared" ] && diff "$o/declared" "$o/listed"
}
as_committed() { "$o/abi_layout" | diff tests/data/abi_layout.txt -; }
try "the layout program builds" compile -std=c99 -o "$o/abi_layout" tests/abi_layout.c
try "the layout program knows every public member" complete
try "sizes and offsets are as in tests/data/abi_layout.txt" as_committed

# ---- text of the header ---------------------------------------------------------------------------------------------
clean_text() {
    if LC_ALL=C grep -n '[^ -~]' moe.h | head -n 5 | grep .; then echo "not ASCII, or a tab"; return 1; fi
    # The generated region quotes lines that are checked in their own file.
    if awk '/>>kernels-end/ { quoted = 0 } length > 120 && !quoted { print FILENAME ":" FNR ": " length " columns"; bad = 1 }
            /^\/\/ >>kernels-begin/ { quoted = 1 } END { exit !bad }' moe_kernels.cu.inc moe.h; then return 1; fi
    if grep -nE 'TODO|FIXME|XXX' moe.h; then return 1; fi
}
tags() { # the index and the text have the same tags
    awk '/^\/\/ INDEX/ { index_part = 1 } /^\/\/ VOCABULARY/ { index_part = 0 }
         index_part { line = $0; while (match(line, />>[a-z]+/)) { print substr(line, RSTART, RLENGTH); line = substr(line, RSTART + RLENGTH) } }' moe.h \
        | sort -u >"$o/index"
    grep -oE '^// >>[a-z]+' moe.h | sed 's,// ,,' | sort -u >"$o/sections"
    [ -s "$o/index" ] && diff "$o/index" "$o/sections"
}
try "moe.h is ASCII, without tabs, at most 120 columns" clean_text
try "the index has the sections that there are" tags

if have python3; then
    try "the scripts of bench/ are Python" python3 -c 'import ast, sys
for name in sys.argv[1:]:
    ast.parse(open(name).read(), name)' bench/*.py bench/compare/*.py
else
    skip "the scripts of bench/" "no python3"
fi

# ---- shared library -------------------------------------------------------------------------------------------------
exports() {
    nm -D --defined-only build/libmoe.so | awk '$2 ~ /[A-Z]/ && $3 !~ /^moe_[a-z]|^_(init|fini)$/ { print $3; bad = 1 }
                                               END { exit bad }'
}
case $(uname -s) in
Linux)
    try "make lib" ${MAKE:-make} -s lib
    try "it exports moe_ symbols and no others" exports
    try "a program links to it" compile -std=c99 -o "$o/shared" tests/compile/shared.c -Lbuild -lmoe
    mkdir -p "$o/cache" build/emu/objects && chmod 700 "$o/cache"
    shared() { # SETTINGS...
        env "$@" LD_LIBRARY_PATH=build "$o/shared" tests/golden/qwen3_moe "$(cd "$o" && pwd)/cache"
    }
    try "it refuses struct_size 0, and gives it in its own calls" shared -u MOE_CUDA_LIB
    if have g++ && [ "$(uname -m)" = x86_64 ]; then
        try "the emulated device builds" ${MAKE:-make} -s build/emu/libcuda.so.1 build/emu/libnvrtc.so.13
        try "so it does on the emulated device" shared MOE_CUDA_LIB="$(pwd)/build/emu/libcuda.so.1" \
            MOE_NVRTC_LIB="$(pwd)/build/emu/libnvrtc.so.13" MOE_EMU_DEVICE_H="$(pwd)/tests/emu/device.h" \
            MOE_EMU_CACHE="$(pwd)/build/emu/objects" MOE_CACHE=off
    else
        skip "the shared library on the emulated device" "it needs g++ and an x86-64 processor"
    fi
    ;;
*) skip "the shared library" "only built on Linux" ;;
esac
finish product
