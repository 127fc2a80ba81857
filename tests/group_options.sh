#!/bin/sh
# Each option switched off: compiled without a warning, linked, one call of each part run; several of them and none with
# every compiler.
. tests/group.sh
PARTS_FILE=$temp/parts.moe
MOE_CUDA_LIB=not/absolute/libcuda.so.1
export PARTS_FILE MOE_CUDA_LIB
warn="-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror"
threads="-lpthread"
for option in NONE MOE_NO_THREADS MOE_NO_FILES MOE_NO_CONFIG MOE_NO_CHECKPOINT MOE_NO_CPU_SIMD MOE_STATIC \
    MOE_NO_CUDA MOE_NO_ENV "MOE_NO_CUDA -DMOE_NO_FILES" "MOE_NO_THREADS -DMOE_NO_FILES" \
    "MOE_NO_THREADS -DMOE_NO_FILES -DMOE_NO_CONFIG -DMOE_NO_CPU_SIMD -DMOE_NO_CUDA -DMOE_NO_ENV"; do
    case $option in *NO_THREADS*) libs= ;; *) libs=$threads ;; esac
    case $option in *" "* | NONE) compilers="gcc clang g++" ;; *) compilers=$CC ;; esac
    for compiler in $compilers; do
        have $compiler || { skip "$option, $compiler" "not installed"; continue; }
        case $compiler in g++) language="-x c++ -std=c++11" ;; *) language=-std=c99 ;; esac
        try "$option builds, $compiler" $compiler -O0 $language $warn -D$option -o "$temp/parts" tests/compile/parts.c $libs
        try "$option runs, $compiler" "$temp/parts"
        rm -f "$temp/parts"
    done
done
finish options
