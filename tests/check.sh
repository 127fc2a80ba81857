# check.sh - what `make check` runs after the tests; sourced by suite.sh.
strict=-fno-omit-frame-pointer

$MAKE -s -k -j"$JOBS" all
groups matrix options include
groups kernels
grep '^omitted: ' build/log/group_kernels.log # not counted as missing in CI: NVRTC is nothing that Debian has
if can_emulate; then
    emulated sm_80 build/sm_80 MOE_EMU_DEVICES=80,90 MOE_EMU_SEED=2
    groups mutants
fi

# Beside what follows, up to valgrind. With this processor's fused multiply-add: 3 times as fast as
# the one in software, which the other variants hold to the same digests.
if [ -f tests/test_math.c ]; then
    rm -f build/full/log/test_math.log
    $MAKE -s MOE_TEST_FULL=1 TEST_SECONDS=1200 B=build/full TEST_FLAGS="-O2 -march=native" \
        build/full/log/test_math.log &
fi

if command -v clang >/dev/null 2>&1; then
    variant asan build/asan CC=clang OPT=-O0 ASAN_OPTIONS=detect_leaks=1 \
        EXTRA="-fsanitize=address,undefined -fno-sanitize-recover=undefined $strict"
    only="cache context cpu execute layer loader resolve routing tiles weights" # those with a context, so with threads
    variant tsan build/tsan CC=clang OPT=-O0 EXTRA="-fsanitize=thread $strict"
    only=
    groups fuzz
else
    omitted "sanitizers and fuzzing: no clang"
fi

if command -v valgrind >/dev/null 2>&1; then
    only=$(programs | sed 's/^test_//' | grep -v '^math$') # its digests need no memory
    mkdir -p build/valgrind
    cp -pr build/tests build/valgrind/ # the same programs
    variant valgrind build/valgrind TEST_SECONDS=900 MOE_TEST_SMALL=1 \
        RUN="valgrind -q --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite \
            --child-silent-after-fork=yes"
    only=
else
    omitted "valgrind"
fi

wait
if [ -f tests/test_math.c ]; then collect "every float:" build/full test_math; fi

# Whatever the optimiser may do with fused multiply-adds and this processor's instructions, the results are the same bits.
only="math numeric routing cpu formats layer execute weights"
variant native build/native TEST_FLAGS="-O3 -march=native -ffp-contract=fast"
only=

if command -v aarch64-linux-gnu-gcc >/dev/null 2>&1 && command -v qemu-aarch64 >/dev/null 2>&1; then
    variant aarch64 build/aarch64 TEST_SECONDS=900 CC=aarch64-linux-gnu-gcc TEST_FLAGS=-O1 \
        RUN="qemu-aarch64 -L /usr/aarch64-linux-gnu"
else
    omitted "aarch64: no aarch64-linux-gnu-gcc and qemu-aarch64"
fi

if command -v x86_64-w64-mingw32-gcc >/dev/null 2>&1; then
    wine=$(command -v wine || command -v wine64 || ls /usr/lib/wine/wine64 2>/dev/null)
    if [ -n "$wine" ]; then
        variant windows build/windows WINEDEBUG=-all WINEPREFIX="$(pwd)/build/wine" TEST_SECONDS=900 TEST_FLAGS=-O0 \
            CC=x86_64-w64-mingw32-gcc EXE=.exe EXTRA="-static -D__USE_MINGW_ANSI_STDIO=1" RUN="$wine"
    else
        omitted "Windows: no wine"
    fi
else
    omitted "Windows: no x86_64-w64-mingw32-gcc"
fi
