#!/bin/sh
# Every compiler and standard that the header is promised for, warnings as errors; optimised in one standard, because
# some warnings need that.
. tests/group.sh
warn="-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror -c -o $temp/o.o"
for cc in gcc clang; do
    have $cc || { skip "$cc" "not installed"; continue; }
    for std in c99 c11 c17; do
        case $std in c99) flags="-O2 $warn" ;; *) flags="-O0 $warn" ;; esac
        try "$cc -std=$std" $cc -std=$std $flags tests/compile/implementation.c
        try "$cc -std=$std, declarations" $cc -std=$std $flags tests/compile/declarations.c
        try "$cc -std=$std, private" $cc -std=$std -DMOE_STATIC $flags tests/compile/implementation.c
    done
done
for cxx in g++ clang++; do
    have $cxx || { skip "$cxx" "not installed"; continue; }
    for std in c++11 c++17; do
        case $std in c++11) flags="-O2 $warn" ;; *) flags="-O0 $warn" ;; esac
        try "$cxx -std=$std" $cxx -std=$std $flags -x c++ tests/compile/implementation.c
        try "$cxx -std=$std, declarations" $cxx -std=$std $flags -x c++ tests/compile/declarations.c
    done
done
refuse "-ffast-math is refused" "-ffast-math" ${CC} -ffast-math $warn tests/compile/implementation.c
finish matrix
