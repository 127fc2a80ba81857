#!/bin/sh
# suite.sh test | check - runs the groups and adds up their closing lines (`make test`, `make check`).
cd "$(dirname "$0")/.." || exit 1
suite=${1:-test}
MAKE=${MAKE:-make}
JOBS=${JOBS:-2}
unset MAKEFLAGS MFLAGS MAKELEVEL # CC and the like arrive through the environment
summary=build/summary-$suite.txt
mkdir -p build
if ! mkdir build/running 2>/dev/null; then
    owner=$(cat build/running/pid 2>/dev/null)
    if [ -n "$owner" ] && kill -0 "$owner" 2>/dev/null; then
        echo "make test or make check is running in this folder (process $owner)"
        echo "0 passed, 1 failed"
        exit 1
    fi
fi
echo $$ >build/running/pid
trap 'rm -rf build/running' EXIT
trap 'exit 1' INT TERM HUP
: >"$summary"

# collect LABEL BUILD NAME...: the closing lines of these logs; a log that is not there did not compile.
collect() {
    label=$1
    build=$2
    shift 2
    for name; do
        if [ -f "$build/log/$name.log" ]; then
            echo "${label:+$label }$(tail -n 1 "$build/log/$name.log")" >>"$summary"
        else
            echo "${label:+$label }$name: 0 passed, 1 failed (it did not build)" | tee -a "$summary"
        fi
    done
}

only= # some of the test programs, without test_
programs() {
    if [ -n "$only" ]; then
        for name in $only; do echo "test_$name"; done
        return
    fi
    for file in tests/test_*.c; do
        [ -f "$file" ] && basename "$file" .c
    done
}

# variant LABEL BUILD VARIABLE=VALUE...: the test programs built and run in another way.
variant() {
    label=$1
    build=$2
    shift 2
    echo "==== ${label:-tests}"
    rm -rf "$build/log"
    # shellcheck disable=SC2046
    $MAKE -s -k -j"$JOBS" B="$build" "$@" $(programs | sed "s,.*,$build/log/&.log,")
    # shellcheck disable=SC2046
    collect "$label" "$build" $(programs)
}

# emulated LABEL BUILD VARIABLE=VALUE...: the tests of GPU code, on the emulated device.
emulated() {
    label=$1
    build=$2
    shift 2
    echo "==== ${label:+$label }GPU code on the emulated device"
    rm -f "$build"/log/gpu_*.log "$build"/log/emu_*.log
    # shellcheck disable=SC2086
    env "$@" $MAKE -s -k -j"$JOBS" B="$build" emu-logs
    # shellcheck disable=SC2046
    collect "$label" "$build" emu_test_engine emu_test_driver \
        $(for file in tests/gpu_*.c; do basename "$file" .c; done)
}

can_emulate() {
    command -v g++ >/dev/null 2>&1 && [ "$(uname -s) $(uname -m)" = "Linux x86_64" ]
}

omitted() {
    echo "omitted: $1" | tee -a "$summary"
}

groups() {
    logs=
    for group; do logs="$logs build/log/group_$group.log"; done
    # shellcheck disable=SC2086
    $MAKE -s -k -j"$JOBS" $logs
    for group; do collect "" build "group_$group"; done
}

rm -rf build/log
if can_emulate; then also=emu; else also=; fi
$MAKE -s -k -j"$JOBS" build/moe_layer $also
variant "" build
groups examples product layer compile frame embed # the longest first
if can_emulate; then emulated "" build
else omitted "GPU code: the emulated device needs g++, Linux and an x86-64 processor"
fi
if [ "$suite" = check ]; then . tests/check.sh; fi

echo "==== summary"
cat "$summary"
awk -v ci="${CI:-}" -f tests/sum.awk "$summary"
