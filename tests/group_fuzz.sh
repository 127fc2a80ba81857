#!/bin/sh
# libFuzzer targets from their committed corpora, side by side for FUZZ_SECONDS, under ASan and UBSan. 30 s of six on
# two cores are 10 s of processor time each.
. tests/group.sh
seconds=${FUZZ_SECONDS:-30}
if ! have clang; then
    skip "fuzzing" "no clang"
    finish fuzz
fi

fuzz() { # NAME: leaves its output and its code
    corpus=tests/fuzz/corpus/${1#fuzz_}
    dictionary=tests/fuzz/${1#fuzz_}.dict
    mkdir -p "$temp/$1.corpus"
    [ -d "$corpus" ] || corpus=
    if [ -f "$dictionary" ]; then dictionary=-dict=$dictionary; else dictionary=; fi
    "$temp/$1" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 $dictionary \
        -artifact_prefix="$temp/" "$temp/$1.corpus" $corpus >"$temp/$1.output" 2>&1 </dev/null
    echo $? >"$temp/$1.code"
}
result() { cat "$temp/$1.output"; return "$(cat "$temp/$1.code")"; }
executions() { sed -n 's/^stat::number_of_executed_units: */executions: /p; s/^Done \([0-9]*\) runs.*/runs: \1/p' "$temp/output" | head -n 1; }

names=
waiting=0
for source in tests/fuzz/fuzz_*.c; do
    name=$(basename "$source" .c)
    names="$names $name"
    # Two at a time; what a compiler says is shown by the trial of it.
    clang -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined -o "$temp/$name" "$source" \
        -lpthread >"$temp/$name.built" 2>&1 &
    waiting=$((waiting + 1))
    [ $((waiting % 2)) -eq 0 ] && wait
done
wait
built() { cat "$temp/$1.built"; [ -x "$temp/$1" ]; }
for name in $names; do try "$name builds" built "$name"; done
for name in $names; do fuzz "$name" & done
wait
for name in $names; do
    try "$name, $seconds s" result "$name"
    echo "$name $(executions)"
done
finish fuzz
