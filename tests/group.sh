# group.sh - frame of the test groups that are shell scripts; sourced. A group is a list of
#     try "promise" COMMAND...      passes when the command succeeds; what it prints is shown when it does not
#     refuse "promise" TEXT COMMAND...    passes when the command fails by itself and prints TEXT
#     skip "promise" "why"
# and ends with `finish NAME`.
passed=0
failed=0
skipped=0
CC=${CC:-cc}
CXX=${CXX:-c++}
temp=${MOE_TEST_TEMP:-build/tmp/group}
mkdir -p "$temp"

have() { command -v "$1" >/dev/null 2>&1; }

try() {
    promise=$1
    shift
    if "$@" >"$temp/output" 2>&1 </dev/null; then
        passed=$((passed + 1))
        echo "passed $promise"
    else
        echo "FAILED $promise (code $?): $*"
        head -n 40 "$temp/output"
        failed=$((failed + 1))
    fi
}

refuse() {
    promise=$1
    text=$2
    shift 2
    "$@" >"$temp/output" 2>&1 </dev/null
    code=$?
    if [ $code -ge 1 ] && [ $code -lt 120 ] && grep -Fq -- "$text" "$temp/output"; then
        passed=$((passed + 1))
        echo "passed $promise"
    else
        echo "FAILED $promise (code $code, expected 1..119 and \"$text\"): $*"
        head -n 40 "$temp/output"
        failed=$((failed + 1))
    fi
}

skip() {
    echo "skipped $1: $2"
    skipped=$((skipped + 1))
}

finish() {
    if [ $skipped -gt 0 ]; then
        echo "$1: $passed passed, $failed failed, $skipped skipped"
    else
        echo "$1: $passed passed, $failed failed"
    fi
    [ $failed -eq 0 ]
    exit
}
