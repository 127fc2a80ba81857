#!/bin/sh
# The header with this machine's compilers, warnings as errors; make check has all standards and compilers.
. tests/group.sh
flags="-O1 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror -c -o $temp/o.o"
for std in c99 c11; do
    try "$CC -std=$std" $CC -std=$std $flags tests/compile/implementation.c
    try "$CC -std=$std, declarations" $CC -std=$std $flags tests/compile/declarations.c
done
if have "$CXX"; then
    try "$CXX -std=c++11" $CXX -std=c++11 $flags -x c++ tests/compile/implementation.c
    try "$CXX -std=c++11, declarations" $CXX -std=c++11 $flags -x c++ tests/compile/declarations.c
else
    skip "C++" "no $CXX"
fi
try "the tests' frame in C99" $CC -std=c99 $flags -Wno-shadow tests/compile/frame.c
finish compile
