#!/bin/sh
# The kernel text inside moe.h: what `make check-embed` finds and `make embed` mends.
. tests/group.sh
embed="$temp/embed"
$CC -std=c99 -O1 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror -o "$embed" tests/embed.c || exit 1

mends() { # the copy that the test damaged becomes moe.h again
    "$embed" "$temp/moe.h" moe_kernels.cu.inc && cmp moe.h "$temp/moe.h"
}
damaged() { sed "$1" moe.h >"$temp/moe.h" && ! cmp -s moe.h "$temp/moe.h"; }

try "moe.h has the text of moe_kernels.cu.inc" "$embed" --check moe.h moe_kernels.cu.inc
try "a line of the region is changed" damaged 's,^"typedef float f32;,"typedef double f32;,'
refuse "the check finds it" "run make embed" "$embed" --check "$temp/moe.h" moe_kernels.cu.inc
try "it is mended" mends
try "a line of the region is lost" damaged '/^"typedef float f32;/d'
refuse "the check finds that" "run make embed" "$embed" --check "$temp/moe.h" moe_kernels.cu.inc
try "that is mended" mends
try "the text is another than that of its PTX" damaged 's,^// >>kernels-ptx .,&0,'
refuse "the check finds that too" "PTX is not of this text" "$embed" --check "$temp/moe.h" moe_kernels.cu.inc
try "the region's end is lost" damaged '/^\/\/ >>kernels-end/d'
refuse "a header without the mark is left alone" "no mark" "$embed" "$temp/moe.h" moe_kernels.cu.inc
printf 'a\tb\n' >"$temp/tab.inc"
refuse "a text with a tab is refused" "printable" "$embed" --check moe.h "$temp/tab.inc"
finish embed
