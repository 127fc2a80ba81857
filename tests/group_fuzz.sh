#!/bin/sh
# libFuzzer targets from their committed corpora, FUZZ_SECONDS each (20), under ASan and UBSan.
. tests/group.sh
seconds=${FUZZ_SECONDS:-20}
executions() { sed -n 's/^stat::number_of_executed_units: */executions: /p; s/^Done \([0-9]*\) runs.*/runs: \1/p' "$temp/output" | head -n 1; }
if ! have clang; then
    skip "fuzzing" "no clang"
    finish fuzz
fi
for source in tests/fuzz/fuzz_*.c; do
    [ -f "$source" ] || { skip "fuzzing" "no targets"; break; }
    name=$(basename "$source" .c)
    corpus=tests/fuzz/corpus/${name#fuzz_}
    try "$name builds" clang -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined \
        -o "$temp/$name" "$source" -lpthread
    mkdir -p "$temp/$name.corpus"
    committed=
    dictionary=
    if [ -d "$corpus" ]; then committed=$corpus; fi
    if [ -f "tests/fuzz/${name#fuzz_}.dict" ]; then dictionary=-dict=tests/fuzz/${name#fuzz_}.dict; fi
    try "$name, $seconds s" "$temp/$name" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 \
        $dictionary -artifact_prefix="$temp/" "$temp/$name.corpus" $committed
    echo "$name $(executions)"
done
finish fuzz
