#!/bin/sh
# examples/moe_layer, the main job: real input, every option, every refusal.
. tests/group.sh
run=build/moe_layer
qwen=tests/golden/qwen3_moe # 64 tokens, hidden 72, 16 experts, 4 per token; layers 1 and 2

npy() { # FILE DESCR FORTRAN SHAPE BYTES: an array of zeros; its header takes 128 bytes
    {
        printf '\223NUMPY\001\000\166\000'
        printf "%-117s\n" "{'descr': '$2', 'fortran_order': $3, 'shape': ($4), }"
        dd if=/dev/zero bs="$5" count=1 2>/dev/null
    } >"$1"
}

copy() { rm -rf "$temp/copy" && cp -r $qwen "$temp/copy"; }

flip() { # FILE OFFSET: changes the top exponent bits of a byte
    byte=$(od -An -tu1 -j "$2" -N 1 "$1" | tr -d ' ')
    printf "\\$(printf %o $((byte ^ 64)))" | dd of="$1" bs=1 seek="$2" conv=notrunc 2>/dev/null
}
size() { wc -c <"$1" | tr -d ' '; }

demo() {
    rm -f build/demo.html
    ${MAKE:-make} -s demo >"$temp/demo" && grep -q 'largest error' "$temp/demo" && grep -q 'num_experts_per_tok' "$temp/demo" &&
        grep -Eq '^ +[0-9]+ +#' "$temp/demo" && [ -s build/demo.html ]
}
try "make demo" demo
alone() { # no address but the name space, no scripts
    ! tr '<' '\n' <build/demo.html | grep -v 'www.w3.org/2000/svg' | grep -Ei '(https?:)?//|^script|^link|@import|url\([^#]'
}
try "the page needs nothing from elsewhere" alone
balanced() { # FILE: every element is closed
    tr '<' '\n' <"$1" | awk '
        /^(meta|!doctype)/ || $0 == "" { next }
        /^\// { sub(/^\//, ""); sub(/[ >].*/, ""); if (stack[--n] != $0) { print "wrong end", $0; bad = 1 } next }
        { name = $0; sub(/[ >\/].*/, "", name); if ($0 !~ /\/>/ && NR > 1) stack[n++] = name }
        END { if (n != 0) print n, "open"; exit bad || n != 0 }'
}
try "the page is well formed" balanced build/demo.html
picture() {
    $run $qwen --layer 1 --svg "$temp/a.svg" && balanced "$temp/a.svg" && ! grep -Eq '[0-9] ms' "$temp/a.svg" &&
        $run $qwen --layer 1 --svg "$temp/b.svg" && cmp "$temp/a.svg" "$temp/b.svg"
}
try "the picture is well formed, has no times, and is the same each time" picture
try "examples/demo.svg is what make picture writes" cmp "$temp/a.svg" examples/demo.svg

# ---- every family ---------------------------------------------------------------------------------------------------
for folder in tests/golden/*/; do
    folder=${folder%/}
    [ -f "$folder/config.json" ] || continue
    layers=$($run "$folder" 2>"$temp/why" | sed -n 's/^  layer \([0-9]*\):.*/\1/p')
    if [ -z "$layers" ]; then
        try "$folder lists its layers" cat "$temp/why" "$temp/none"
        continue
    fi
    for layer in $layers; do
        golden=$(tr ',{' '\n\n' <"$folder/golden.safetensors" 2>/dev/null | LC_ALL=C grep -ac "^\"layers.$layer.out\"")
        compared() { $run "$folder" --layer "$layer" >"$temp/said" 2>&1 && grep "largest error" "$temp/said" || { tail -n 3 "$temp/said"; return 1; }; }
        if [ "${golden:-0}" -gt 0 ]; then try "$folder layer $layer: experts and output of transformers' module" compared; fi
    done
done

# ---- damage ---------------------------------------------------------------------------------------------------------
weights=$(ls $qwen/model-*.safetensors | tail -n 1 | xargs basename)
copy && flip "$temp/copy/$weights" $(($(size "$temp/copy/$weights") - 1))
refuse "one flipped byte of the weights: the sum differs" "$weights: its FNV-1a sum is" $run "$temp/copy" --layer 1
copy && flip "$temp/copy/golden.safetensors" $(($(size "$temp/copy/golden.safetensors") - 1))
refuse "one flipped byte of the golden output: the sum differs" "golden.safetensors: its FNV-1a sum is" $run "$temp/copy" --layer 1
copy && flip "$temp/copy/config.json" 20
refuse "one flipped byte of config.json: the sum differs" "config.json: its FNV-1a sum is" $run "$temp/copy" --layer 1
any_weight() { # without CHECKSUMS, the last byte (exponent) of a matrix in each shard shows in the output of its layer
    worked=0
    for shard in $qwen/model-*.safetensors; do
        copy && rm "$temp/copy/CHECKSUMS"
        file=$temp/copy/$(basename "$shard")
        flip "$file" $(($(size "$file") - 1))
        for layer in 1 2; do $run "$temp/copy" --layer $layer >/dev/null 2>"$temp/why" || { grep FAILED "$temp/why" && worked=$((worked + 1)); }; done
    done
    [ $worked -ge 1 ]
}
try "one flipped byte of the weights, without sums: the output differs" any_weight
copy && rm "$temp/copy/CHECKSUMS"
golden_output() { # of layer 1, from the header's offsets
    header=$(od -An -tu8 -N 8 "$temp/copy/golden.safetensors" | tr -d ' ')
    end=$(dd if="$temp/copy/golden.safetensors" bs=1 skip=8 count="$header" 2>/dev/null | tr '}' '\n' |
        sed -n 's/.*"layers.1.out".*"data_offsets": *\[[0-9]*, *\([0-9]*\)\].*/\1/p')
    flip "$temp/copy/golden.safetensors" $((8 + header + end - 1))
}
golden_output
refuse "one flipped byte of the golden output, without sums: named with token and error" "FAILED: token 63" $run "$temp/copy" --layer 1
copy && echo "hello" >>"$temp/copy/CHECKSUMS"
refuse "a damaged list of sums" "CHECKSUMS, line" $run "$temp/copy"
copy && rm "$temp/copy/golden.safetensors"
refuse "a listed file that is missing" "golden.safetensors: CHECKSUMS lists it" $run "$temp/copy"
copy && rm "$temp/copy/golden.safetensors" "$temp/copy/CHECKSUMS"
without() { $run "$temp/copy" --layer 1 >"$temp/said" && grep -q 'no golden output' "$temp/said" && grep -q 'seeded random' "$temp/said"; }
try "a checkpoint without golden output runs on random tokens" without
copy && rm "$temp/copy/CHECKSUMS" "$temp/copy/$weights"
refuse "a missing shard" "$weights" $run "$temp/copy" --layer 2
copy && rm "$temp/copy/CHECKSUMS" && dd if=/dev/null of="$temp/copy/$weights" bs=1 seek=100 2>/dev/null
refuse "a truncated shard" "$weights" $run "$temp/copy" --layer 2
copy && rm "$temp/copy/CHECKSUMS" && echo '{"model_type": "qwen3_moe"' >"$temp/copy/config.json"
refuse "a broken config.json" "config.json" $run "$temp/copy" --layer 1

# ---- options --------------------------------------------------------------------------------------------------------
lists() { $run $qwen >"$temp/said" && grep -q '^  layer 1: 16 experts, 4 per token' "$temp/said" && ! grep -q 'layer 0' "$temp/said"; }
try "without --layer it lists the MoE layers" lists
writes() {
    $run $qwen --layer 1 --tokens 5 --output "$temp/y.npy" --ids "$temp/i.npy" --weights "$temp/w.npy" >"$temp/said" &&
        [ "$(size "$temp/y.npy")" = $((128 + 5 * 72 * 4)) ] && [ "$(size "$temp/i.npy")" = $((128 + 5 * 4 * 4)) ] &&
        [ "$(size "$temp/w.npy")" = $((128 + 5 * 4 * 4)) ] &&
        [ "$(dd if="$temp/i.npy" bs=128 count=1 2>/dev/null | grep -ac "'<i4'.*(5, 4)")" = 1 ]
}
try "--tokens, --output, --ids, --weights" writes
again() {
    $run $qwen --layer 1 --input "$temp/y.npy" --output "$temp/z.npy" >"$temp/said" && grep -q 'no golden output' "$temp/said" &&
        $run $qwen --layer 1 --input "$temp/y.npy" --output "$temp/z2.npy" >/dev/null && cmp "$temp/z.npy" "$temp/z2.npy" &&
        ! cmp -s "$temp/y.npy" "$temp/z.npy"
}
try "an output is read back as --input, and two runs agree to the bit" again
npy "$temp/x.npy" '<f4' False '3, 72' $((3 * 72 * 4))
npy "$temp/l.npy" '<f4' False '3, 16' $((3 * 16 * 4))
zeros() { # equal logits: experts 0 to 3, a quarter each; zero in, zero out
    $run $qwen --layer 1 --input "$temp/x.npy" --logits "$temp/l.npy" --output "$temp/y.npy" --ids "$temp/i.npy" --weights "$temp/w.npy" >/dev/null || return 1
    for t in 1 2 3; do printf '\000\000\000\000\001\000\000\000\002\000\000\000\003\000\000\000'; done >"$temp/ids"
    for i in 1 2 3 4 5 6 7 8 9 10 11 12; do printf '\000\000\200\076'; done >"$temp/quarters"
    cmp "$temp/x.npy" "$temp/y.npy" && tail -c 48 "$temp/i.npy" | cmp - "$temp/ids" && tail -c 48 "$temp/w.npy" | cmp - "$temp/quarters"
}
try "--input and --logits: ties go to the lower ids, zero in gives zero out" zeros
page() { $run $qwen --layer 2 --tokens 3 --html "$temp/p.html" >/dev/null && balanced "$temp/p.html"; }
try "--html" page
npy "$temp/t.npy" '<i4' False '3,' 12
tokens() {
    [ -d tests/golden/deepseek_v4 ] || return 0
    npy "$temp/x4.npy" '<f4' False '3, 64' $((3 * 64 * 4))
    $run tests/golden/deepseek_v4 --layer 0 --input "$temp/x4.npy" --token-ids "$temp/t.npy"
}
try "--token-ids for a layer with a table of experts" tokens
if [ -d tests/golden/deepseek_v4 ]; then
    refuse "a layer with a table and --input needs them" "--token-ids" $run tests/golden/deepseek_v4 --layer 0 --input "$temp/x4.npy"
fi

# ---- refusals -------------------------------------------------------------------------------------------------------
refuse "no folder" "usage:" $run
refuse "a folder that is not there" "nowhere" $run "$temp/nowhere"
refuse "an unknown option" "--frob is not known" $run $qwen --frob 1
refuse "an option without its value" "--layer has no value" $run $qwen --layer
refuse "a layer that is no number" "--layer is x1" $run $qwen --layer x1
refuse "a dense layer" "layer" $run $qwen --layer 0
refuse "a layer that is not there" "99" $run $qwen --layer 99
refuse "zero tokens" "--tokens is 0" $run $qwen --layer 1 --tokens 0
refuse "more tokens than there are" "golden.safetensors" $run $qwen --layer 1 --tokens 65
refuse "an input that is not there" "gone.npy: cannot be opened" $run $qwen --layer 1 --input "$temp/gone.npy"
refuse "an input that is no .npy" "is not a .npy file" $run $qwen --layer 1 --input $qwen/config.json
npy "$temp/b.npy" '<f4' False '3, 71' $((3 * 71 * 4))
refuse "an input of another width" "needs 72 columns" $run $qwen --layer 1 --input "$temp/b.npy"
npy "$temp/b.npy" '<f8' False '3, 72' $((3 * 72 * 8))
refuse "an input of another type" "dtype is '<f8'" $run $qwen --layer 1 --input "$temp/b.npy"
npy "$temp/b.npy" '<f4' True '3, 72' $((3 * 72 * 4))
refuse "an input in Fortran order" "fortran_order" $run $qwen --layer 1 --input "$temp/b.npy"
npy "$temp/b.npy" '<f4' False '3, 2, 36' $((3 * 72 * 4))
refuse "an input of another rank" "has 3 dimensions" $run $qwen --layer 1 --input "$temp/b.npy"
npy "$temp/b.npy" '<f4' False '3, 72' $((3 * 72 * 4 - 1))
refuse "a truncated input" "the data is not the 216 values" $run $qwen --layer 1 --input "$temp/b.npy"
npy "$temp/b.npy" '<f4' False '3, 72' $((3 * 72 * 4 + 1))
refuse "an input with more bytes" "the data is not the 216 values" $run $qwen --layer 1 --input "$temp/b.npy"
npy "$temp/b.npy" '<f4' False '-3, 72' 12
refuse "a negative shape" "shape is not readable" $run $qwen --layer 1 --input "$temp/b.npy"
npy "$temp/b.npy" '<f4' False '0, 72' 1
refuse "an input without rows" "b.npy" $run $qwen --layer 1 --input "$temp/b.npy"
printf '\223NUMPY\011\000\166\000' >"$temp/b.npy"
refuse "a future .npy version" "version 9" $run $qwen --layer 1 --input "$temp/b.npy"
printf '\223NUMPY\002\000\377\377\377\377' >"$temp/b.npy"
refuse "a hostile header length" "too long" $run $qwen --layer 1 --input "$temp/b.npy"
npy "$temp/b.npy" '<f4' False '2, 16' $((2 * 16 * 4))
refuse "logits for fewer tokens" "3 tokens are needed" $run $qwen --layer 1 --tokens 3 --input "$temp/x.npy" --logits "$temp/b.npy"
npy "$temp/b.npy" '<f4' False '3, 15' $((3 * 15 * 4))
refuse "logits of another width" "needs 16 columns" $run $qwen --layer 1 --input "$temp/x.npy" --logits "$temp/b.npy"
nan() { printf '\000\000\300\177' | dd of="$temp/l.npy" bs=1 seek=128 conv=notrunc 2>/dev/null; }
nan
refuse "NaN logits" "logits" $run $qwen --layer 1 --input "$temp/x.npy" --logits "$temp/l.npy"
refuse "an output that cannot be written" "cannot be written" $run $qwen --layer 1 --output "$temp/none/y.npy"
refuse "a page that cannot be written" "cannot be written" $run $qwen --layer 1 --html "$temp/none/y.html"
finish layer
