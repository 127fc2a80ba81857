#!/bin/sh
# The tests' own frame: what fails, crashes, hangs or is left out is counted.
. tests/group.sh
$CC -O1 -o "$temp/fails" tests/compile/fails.c || exit 1

ends() { # NAME TEXT: run_one's log of the program, given that test's name, ends in TEXT
    env TEST_SECONDS=2 sh tests/run_one.sh "$temp" "$1" "$temp/fails" "$1" >"$temp/printed"
    tail -n 1 "$temp/log/$1.log" | grep -F "$2" || { cat "$temp/log/$1.log"; return 1; }
}
refuse_quietly() { ! "$@"; }
sums() { # CI LINES EXPECTED
    [ "$(printf "$2" | awk -v ci="$1" -f tests/sum.awk)" = "$3" ] || { printf "$2" | awk -v ci="$1" -f tests/sum.awk; return 1; }
}
try "a passed test" ends good "fails: 1 passed, 0 failed"
try "a failed check fails the program" refuse_quietly "$temp/fails" check
try "each check can fail" ends check "fails: 0 passed, 8 failed"
try "a crash is one failure" ends crash "crash: 0 passed, 1 failed"
try "a wrong exit code is a failure" ends leaves "leaves: 0 passed, 1 failed"
try "a hanging program is a failure" ends hangs "hangs: 0 passed, 1 failed"
try "a test left out is named" ends omits "0 passed, 0 failed, 1 skipped"
try "sums add up" sums "" "a: 2 passed, 1 failed\nb: 3 passed, 0 failed, 1 skipped\n" "5 passed, 1 failed"
try "what is left out fails in CI" sums true "a: 2 passed, 0 failed\nb: 3 passed, 0 failed, 1 skipped\nomitted: c\n" "5 passed, 2 failed"
try "nothing run is a failure" refuse_quietly awk -f tests/sum.awk /dev/null
finish frame
