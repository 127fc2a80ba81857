#!/bin/sh
# gpu.sh - the tests of GPU code
#
#     sh tests/gpu.sh run BUILD NAME PROGRAM   one program on the emulated device, as run_one.sh does
#     sh tests/gpu.sh test-gpu                 all on this machine's GPU, large sizes too; N passed, N failed
#     sh tests/gpu.sh test-sanitizer           all under each tool of compute-sanitizer; N passed, N failed
cd "$(dirname "$0")/.." || exit 1
root=$(pwd)
MAKE=${MAKE:-make}

if [ "$1" = run ]; then
    MOE_CUDA_LIB=$root/build/emu/libcuda.so.1
    MOE_NVRTC_LIB=$root/build/emu/libnvrtc.so.13
    MOE_EMU_DEVICE_H=$root/tests/emu/device.h
    MOE_EMU_CACHE=$root/build/emu/objects
    MOE_EMU_PTX_SOURCE=$root/moe_kernels.cu.inc
    MOE_EMU_DEVICES=${MOE_EMU_DEVICES:-90,80}
    MOE_CACHE_DIR=$root/$2/cache
    export MOE_CUDA_LIB MOE_NVRTC_LIB MOE_EMU_DEVICE_H MOE_EMU_CACHE MOE_EMU_PTX_SOURCE MOE_EMU_DEVICES
    export MOE_CACHE_DIR
    mkdir -p "$MOE_EMU_CACHE" "$2" && chmod 700 "$2"
    exec sh tests/run_one.sh "$2" "$3" "$4"
fi

summary=build/summary-$1.txt
mkdir -p build/gpu
: >"$summary"
programs=
for file in tests/gpu_*.c; do programs="$programs build/gpu/tests/$(basename "$file" .c)"; done
# shellcheck disable=SC2086
$MAKE -s -k -j8 B=build/gpu TEST_FLAGS="-O2 -g1" $programs # references of large layers run here
rm -rf build/gpu/log build/gpu/cache
MOE_CACHE_DIR=$root/build/gpu/cache
export MOE_CACHE_DIR

if [ "$1" = test-gpu ]; then
    MOE_TEST_GPU=1
    export MOE_TEST_GPU
    for program in $programs; do
        sh tests/run_one.sh build/gpu "$(basename "$program")" "$program"
        tail -n 1 "build/gpu/log/$(basename "$program").log" >>"$summary"
    done
else
    # Sizes of the emulated device; a tool's report ends the program with code 9.
    for tool in memcheck racecheck initcheck synccheck; do
        for program in $programs; do
            name=$(basename "$program")
            TEST_SECONDS=300 sh tests/run_one.sh build/gpu "$name" compute-sanitizer --tool "$tool" --error-exitcode 9 \
                "$program"
            cp "build/gpu/log/$name.log" "build/gpu/log/$tool-$name.log"
            echo "$tool $(tail -n 1 "build/gpu/log/$name.log")" >>"$summary"
        done
    done
fi
echo "==== summary"
cat "$summary"
awk -f tests/sum.awk "$summary"
