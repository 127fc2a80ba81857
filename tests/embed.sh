#!/bin/sh
# embed.sh BUILD embed|check-embed - the generated region of moe.h. `embed` renews its PTX where NVRTC 12.1 can be had;
# `check-embed` makes it again only under CI=true, where not having that compiler is a failure.
cd "$(dirname "$0")/.." || exit 1
embed=$1/embed
folder=$1/ptx
library=
if [ "$2" = embed ] || [ "${CI:-}" = true ]; then library=$(sh tests/nvrtc12.sh); fi
if [ "$2" = check-embed ]; then
    if [ "${CI:-}" != true ]; then exec "$embed" --check moe.h moe_kernels.cu.inc; fi
    if [ -z "$library" ]; then
        echo "embed.sh: there is no NVRTC 12.1" >&2
        exit 1
    fi
elif [ -z "$library" ]; then
    exec "$embed" moe.h moe_kernels.cu.inc
else
    "$embed" moe.h moe_kernels.cu.inc 2>"$1/embed.log" || { cat "$1/embed.log"; exit 1; }
fi
rm -rf "$folder" && mkdir -p "$folder" && ${MAKE:-make} -s B="$1" "$1/make_ptx" &&
    "$1/make_ptx" "$library" moe_kernels.cu.inc "$folder" || exit 1
if [ "$2" = embed ]; then exec "$embed" moe.h moe_kernels.cu.inc "$folder"; fi
exec "$embed" --check moe.h moe_kernels.cu.inc "$folder"
