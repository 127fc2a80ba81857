#!/bin/sh
# What including the header costs: processor time, the least of several runs.
. tests/group.sh
costs() { # LIMIT_MS RUNS SOURCE [FLAGS...]: compiling SOURCE takes at most LIMIT_MS more than an empty file
    limit=$1 runs=$2 source=$3
    shift 3
    empty=$("$temp/cpu_time" "$runs" $CC -c -o "$temp/o.o" "$@" tests/compile/empty.c) || return 1
    full=$("$temp/cpu_time" "$runs" $CC -c -o "$temp/o.o" "$@" "$source") || return 1
    echo "$source $*: $((full - empty)) ms over an empty file, $limit allowed" | tee -a "$temp/costs"
    [ $((full - empty)) -le "$limit" ]
}
try "the timer builds" $CC -O1 -o "$temp/cpu_time" tests/compile/cpu_time.c
try "declarations cost at most 20 ms" costs 20 30 tests/compile/declarations.c -O2
try "the implementation costs at most 10 s at -O2" costs 10000 2 tests/compile/implementation.c -O2
cat "$temp/costs"
finish include
