#!/bin/sh
# The header with this machine's compilers, warnings as errors; make check has all standards and compilers, optimised.
. tests/group.sh
flags="-O0 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror -c -o $temp/o.o"
try "$CC -std=c99" $CC -std=c99 $flags tests/compile/implementation.c
try "$CC -std=c99, declarations" $CC -std=c99 $flags tests/compile/declarations.c
if have "$CXX"; then
    try "$CXX -std=c++11" $CXX -std=c++11 $flags -x c++ tests/compile/implementation.c
    try "$CXX -std=c++11, declarations" $CXX -std=c++11 $flags -x c++ tests/compile/declarations.c
else
    skip "C++" "no $CXX"
fi
try "the tests' frame in C99" $CC -std=c99 $flags -Wno-shadow tests/compile/frame.c
finish compile
