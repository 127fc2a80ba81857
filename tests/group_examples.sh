#!/bin/sh
# The examples: each builds with the line in its first comment, runs, and prints what it is for.
. tests/group.sh

says() { # TEXT COMMAND...: the command succeeds and prints TEXT
    text=$1
    shift
    "$@" >"$temp/said" 2>&1 || { code=$?; cat "$temp/said"; return $code; }
    grep -Eq -- "$text" "$temp/said" || { cat "$temp/said"; echo "does not say \"$text\""; return 1; }
}

# The build line of an example's comment, with the compiler of this run and the program in the temporary folder.
build_line_of() {
    sed -n 's,^//  *\(cc .*\) && .*,\1,p' "$1" | head -n 1 | sed "s,-o \([a-z_]*\),-o $temp/\1,; s,^cc,$CC,"
}
build_line() {
    line=$(build_line_of "$1")
    [ -n "$line" ] || { echo "$1 has no build line"; return 1; }
    echo "$line"
    $line
}

example() { # NAME TEXT ARGUMENTS...
    name=$1 text=$2
    shift 2
    try "$name builds with the line in its comment" build_line "examples/$name.c"
    try "$name runs" says "$text" "$temp/$name" "$@"
}

example hello 'experts 1 and 0, weights 0.750 and 0.250, output -0.1828 -2.1433'
example route '^MOE_ROUTING_DEFAULT|^default|2:0.[0-9]+ 7:0.[0-9]+'
try "route shows a refusal" says 'routing.groups' "$temp/route"
example checkpoint_layer '^token 3: -?[0-9.]+ -?[0-9.]+' tests/golden/mixtral 0
example own_loader '^[0-9]+ tensors set, 8 experts' tests/golden/mixtral 0
example hooks '0 of them by moe_execute' tests/golden/mixtral 0
try "hooks: the parallel-for was called and all bytes came back" says 'bytes not given back: 0' "$temp/hooks" tests/golden/mixtral 0
for folder in qwen3_moe gpt_oss llama4 deepseek_v3; do # other layouts: stacked, interleaved, input-major, shared
    layer=$(dd if=tests/golden/$folder/golden.safetensors bs=4096 count=1 2>/dev/null | tr ',{' '\n\n' |
        sed -n 's/.*"layers": *"\([0-9]*\).*/\1/p' | head -n 1)
    try "own_loader, $folder layer ${layer:-0}" says 'tensors set' "$temp/own_loader" tests/golden/$folder "${layer:-0}"
done

# A program on the emulated device, as tests/gpu.sh runs its own.
emulated() { # COMMAND...
    env LD_LIBRARY_PATH=build/emu MOE_CUDA_LIB="$(pwd)/build/emu/libcuda.so.1" \
        MOE_NVRTC_LIB="$(pwd)/build/emu/libnvrtc.so.13" MOE_EMU_DEVICE_H="$(pwd)/tests/emu/device.h" \
        MOE_EMU_CACHE="$(pwd)/build/emu/objects" MOE_CACHE=off "$@"
}

# ---- kernels ahead of time, with the NVRTC of the emulated device --------------------------------------------------
prewarm() { # FOLDER ARGUMENTS...
    mkdir -p build/emu/objects
    folder=$(pwd)/$temp/$1
    shift
    env MOE_NVRTC_LIB="${nvrtc:-$(pwd)/build/emu/libnvrtc.so.13}" MOE_EMU_DEVICE_H="$(pwd)/tests/emu/device.h" \
        MOE_EMU_CACHE="$(pwd)/build/emu/objects" "$temp/prewarm" "$folder" "$@"
}
lists() { # COUNT CACHED ARGUMENTS...: as many lines, each numbered, of kernels, and a total of what is in the folder
    count=$1 cached=$2
    shift 2
    prewarm "$@" >"$temp/lines" || { cat "$temp/lines"; return 1; }
    stored=$(find "$temp/$1" -name '*.bin' | wc -l)
    awk -v count="$count" -v cached="$cached" '
        $1 == ++n "/" count && $4 > 0 && $5 == "bytes" { bytes += $4; there += / there already$/; next }
        { total = $0 }
        END { exit !(n == count + 1 && there == cached && index(total, bytes " bytes in /") == 1) }' "$temp/lines" &&
        [ "$stored" -eq "$count" ] || { cat "$temp/lines"; echo "$stored files"; return 1; }
}
if have g++ && [ "$(uname -s) $(uname -m)" = "Linux x86_64" ]; then
    qwen=tests/golden/qwen3_moe/config.json
    rm -rf "$temp/kernels" "$temp/common"
    try "the emulated NVRTC builds" ${MAKE:-make} -s build/emu/libnvrtc.so.13
    try "prewarm builds with the line in its comment" build_line examples/prewarm.c
    try "prewarm has a line for each kernel of a config.json for two chips, and a total" \
        lists 43 0 kernels $qwen sm_80 sm_90a
    nvrtc=/nonexistent/libnvrtc.so
    try "the second time all are there, and NVRTC need not be" lists 43 43 kernels $qwen sm_80 sm_90a
    refuse "for another chip it says where NVRTC is not" $nvrtc prewarm kernels $qwen sm_86
    nvrtc=
    try "prewarm without a config has the common shapes" lists 36 0 common
    refuse "a chip that there is not is refused" "desc.chips" prewarm none $qwen sm_90

    gpu_example() { # NAME TEXT
        try "$1 builds with the line in its comment" env LIBRARY_PATH=build/emu sh -c "$(build_line_of "examples/$1.c")"
        try "$1 runs" says "$2" emulated "$temp/$1"
    }
    try "the emulated driver builds" ${MAKE:-make} -s build/emu/libcuda.so.1
    gpu_example cuda_layer 'experts 1 and 0, weights 0.750 and 0.250, output -0.1826 -2.1406'
    gpu_example cuda_graph '^3 of 4: -0.1826 -2.1406'
    gpu_example cuda_ids '^apart, token 0: -0.1826 -2.1406'
    try "cuda_ids: packed ids, and a slot without an expert" \
        says '^packed, token 1: 0.3652 4.2812' emulated "$temp/cuda_ids"
    gpu_example cuda_overlap '^routed -0.1826 -2.1406, shared 1.4609 17.1250'
    gpu_example cuda_offload '^experts 31 and 20: -0.1826 -2.1406'
    try "cuda_offload: a replaced expert" \
        says '^31 replaced: 1.4609 17.1250' emulated "$temp/cuda_offload"
else
    skip "prewarm" "the emulated NVRTC needs g++, Linux and an x86-64 processor"
fi

# ---- other languages ------------------------------------------------------------------------------------------------
if have "$CXX"; then
    cpp() { $CXX -std=c++11 -o "$temp/hello_cpp" examples/ffi/hello.cpp -lpthread; }
    try "hello.cpp builds" cpp
    try "hello.cpp runs" says '^output ' "$temp/hello_cpp" tests/golden/mixtral 0
    refuse "hello.cpp throws what went wrong" "moe:" "$temp/hello_cpp" tests/golden/none 0
else
    skip "hello.cpp" "no $CXX"
fi
try "make lib" ${MAKE:-make} -s lib
if have python3; then
    try "hello.py runs" says 'experts \[2, 3\], weights \[0.6225, 0.3775\]' python3 examples/ffi/hello.py
    block=examples/ffi/transformers_block.py
    layout() { # what the script says of its structures is what the header has
        python3 $block --layout >"$temp/layout" || return 1
        grep -c '^member' "$temp/layout" | awk '{ exit $1 < 80 }' || { echo "too few members"; return 1; }
        if grep -Fvx -f tests/data/abi_layout.txt "$temp/layout"; then return 1; fi
    }
    try "transformers_block.py's structures are those of moe.h" layout
    try "transformers_block.py runs hello.c's layer from plain arrays" says '^hello.c: -0.1828 -2.1433$' python3 $block
    # Nothing of Debian's has transformers: where it is missing the script must say so.
    try "transformers_block.py compares with transformers, or says that it is not here" \
        says '^2 layers of [0-9]+ experts replaced|^not compared: .*(torch|transformers)' python3 $block
else
    skip "hello.py" "no python3"
fi
if have rustc && rustc --version >/dev/null 2>&1; then
    try "hello.rs builds" rustc -L build -o "$temp/hello_rs" examples/ffi/hello.rs
    try "hello.rs runs" says 'experts \[2, 3\]' env LD_LIBRARY_PATH=build "$temp/hello_rs"
else
    skip "hello.rs" "no rustc"
fi

# ---- README ---------------------------------------------------------------------------------------------------------
if [ -f README.md ]; then
    readme() { # NUMBER NAME LIBRARIES...: its n-th program, at most 25 lines
        awk -v n="$1" '/^```c$/ { on = ++i == n; next } /^```/ { on = 0 } on' README.md >"$temp/$2.c"
        lines=$(grep -c . "$temp/$2.c")
        [ "$lines" -ge 15 ] && [ "$lines" -le 25 ] || { echo "$lines lines"; return 1; }
        program=$2
        shift 2
        $CC -std=c99 -Wall -Wextra -Werror -I. -o "$temp/$program" "$temp/$program.c" "$@" -lpthread
    }
    try "README's program builds" readme 1 readme
    try "README's program runs" says "^[0-9.-]" "$temp/readme"
    if [ -f build/emu/libcuda.so.1 ]; then
        close_to() { # both programs print the same numbers, but for the rounding of bf16
            { "$temp/readme" && emulated "$temp/readme_gpu"; } >"$temp/numbers" || return 1
            cat "$temp/numbers"
            awk '{ for (i = 1; i <= 3; i++) { v[NR, i] = $i; if ($i * $i > most) most = $i * $i } }
                 END { for (i = 1; i <= 3; i++) bad += (v[1, i] - v[2, i]) ^ 2 > most / 4096
                       exit NR != 2 || most == 0 || bad }' "$temp/numbers"
        }
        try "README's program on a GPU builds" readme 2 readme_gpu -Lbuild/emu -l:libcuda.so.1
        try "README's program on a GPU prints what the other does" close_to
    fi
    links() {
        bad=0
        for path in $(grep -oE '\]\([A-Za-z0-9_./-]+\)|src="[A-Za-z0-9_./-]+"' README.md | sed 's/^](//; s/)$//; s/^src="//; s/"$//'); do
            [ -e "$path" ] || { echo "README names $path, which is not there"; bad=1; }
        done
        return $bad
    }
    try "README's links lead somewhere" links
    targets() {
        bad=0
        for target in $(grep -oE '`make [a-z-]+`' README.md | sed 's/`make //; s/`//' | sort -u); do
            grep -q "^[a-z -]*\<$target\>[a-z -]*:" Makefile || { echo "README names make $target"; bad=1; }
        done
        return $bad
    }
    try "README's make targets are there" targets
else
    skip "README's program" "no README.md"
fi
finish examples
