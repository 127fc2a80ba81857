#!/bin/sh
# nvrtc12.sh - prints the path of NVRTC 12.1, which makes the PTX inside moe.h: drivers from 530 on take what it writes.
# It is fetched once, into build/nvrtc12. Code 1: it cannot be had here.
cd "$(dirname "$0")/.." || exit 1
folder=$(pwd)/build/nvrtc12
library=$folder/nvidia/cuda_nvrtc/lib/libnvrtc.so.12
if [ ! -f "$library" ]; then
    mkdir -p "$folder" || exit 1
    echo "nvidia-cuda-nvrtc-cu12==12.1.105" \
        "--hash=sha256:339b385f50c309763ca65456ec75e17bbefcbbf2893f462cb8b90584cd27a1c2" >"$folder/wanted"
    "${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --platform manylinux1_x86_64 --require-hashes --dest "$folder" --requirement "$folder/wanted" >&2 &&
        "${PYTHON:-python3}" -m zipfile -e "$folder"/nvidia_cuda_nvrtc_cu12-12.1.105-*.whl "$folder" >&2 || exit 1
    rm -f "$folder"/*.whl
fi
[ -f "$library" ] && echo "$library"
