#!/bin/sh
# run_one.sh BUILD NAME COMMAND... - runs one test program or group, keeps what it prints in BUILD/log/NAME.log and shows
# what failed. A program that ends without its closing line (a crash, a time-out) gets one that counts a failure.
build=$1
name=$2
shift 2
log=$build/log/$name.log
MOE_TEST_TEMP=$build/tmp/$name
export MOE_TEST_TEMP
mkdir -p "$build/log" "$MOE_TEST_TEMP"
limit=
if command -v timeout >/dev/null 2>&1; then limit="timeout ${TEST_SECONDS:-600}"; fi

start=$(date +%s)
$limit "$@" >"$log.new" 2>&1 </dev/null
code=$?
seconds=$(($(date +%s) - start))
tr -d '\r' <"$log.new" >"$log.text"
rm -f "$log.new"
if ! tail -n 1 "$log.text" | grep -Eq '^[A-Za-z0-9_]+: [0-9]+ passed, [0-9]+ failed'; then
    echo "$name: 0 passed, 1 failed (ended with code $code and no closing line)" >>"$log.text"
elif [ $code -ne 0 ] && tail -n 1 "$log.text" | grep -q ' 0 failed'; then
    echo "$name: 0 passed, 1 failed (all tests passed, but the program ended with code $code)" >>"$log.text"
fi
mv "$log.text" "$log"
rm -rf "$MOE_TEST_TEMP"

closing=$(tail -n 1 "$log")
if echo "$closing" | grep -q ' 0 failed'; then
    grep '^skipped ' "$log"
else
    echo "---- $log"
    grep -v '^passed ' "$log" | tail -n 60
fi
echo "$closing ($seconds s)"
