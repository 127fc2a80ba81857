#!/bin/sh
# What every kernel needs on every kind of chip, as in tests/data/resources.tsv, and what is not taken.
. tests/group.sh
table=tests/data/resources.tsv
run=build/kernels
try "the program builds" ${MAKE:-make} -s $run

# ---- logs of ptxas --------------------------------------------------------------------------------------------------
ptxas_log() { # FRAME USED [LINE]: a log with these two lines and one more
    {
        echo "ptxas info    : 0 bytes gmem"
        echo "ptxas info    : Compiling entry function 'moe_k_sort' for 'sm_90a'"
        echo "${3:-ptxas info    : Function properties for moe_k_sort}"
        echo "    $1"
        echo "ptxas info    : Used $2, used 1 barriers"
        echo "ptxas info    : Compile time = 12.345 ms"
    } >"$temp/log"
}
frame="16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
reads() { $run --log "$temp/log" | grep -Fx "registers $1, stack $2, spills 0, smem $3"; }

ptxas_log "$frame" "80 registers"
try "registers and stack are read" reads 80 16 0
ptxas_log "$frame" "255 registers, 1024 bytes smem"
try "static shared memory is read" reads 255 16 1024
ptxas_log "0 bytes stack frame, 0 bytes spill stores, 4 bytes spill loads" "80 registers"
refuse "a spill is not taken" "4 bytes spill loads" $run --log "$temp/log"
ptxas_log "8 bytes stack frame, 8 bytes spill stores, 0 bytes spill loads" "80 registers"
refuse "a spilled store is not taken" "8 bytes spill stores" $run --log "$temp/log"
for code in C7508 C7510 C7512; do
    ptxas_log "$frame" "80 registers" "ptxas info    : ($code) Function properties for wgmma that is serialized"
    refuse "$code is not taken" $code $run --log "$temp/log"
done
ptxas_log "$frame" "80 registers" "ptxas warning : Value of threads per SM is out of range"
refuse "a warning of ptxas is not taken" "out of range" $run --log "$temp/log"
ptxas_log "$frame" "80 registers" "route(7): warning #177-D: variable \"x\" was declared but never referenced"
refuse "a warning of the compiler is not taken" "177-D" $run --log "$temp/log"
echo "ptxas info    : 0 bytes gmem" >"$temp/log"
refuse "a log that says nothing is not taken" "does not say" $run --log "$temp/log"

refuse "an option that there is not is no table" "usage:" $run --tables

# ---- the table ------------------------------------------------------------------------------------------------------
sed '1s/text ....../text 000000/' $table >"$temp/other.tsv"
refuse "a table of another text is refused" "run make kernels" $run --check "$temp/other.tsv"
sorted() {
    sed 1,2d $table >"$temp/rows" && LC_ALL=C sort -c "$temp/rows" && [ "$(awk -F '\t' 'NF != 8' "$temp/rows")" = "" ]
}
try "rows are sorted and have 8 columns" sorted
awk -F '\t' -v OFS='\t' '$1 == "sort_sm90" { $3++ } { print }' $table >"$temp/register.tsv"
sed '/^sort_sm80	/d' $table >"$temp/row.tsv"
if $run --check $table sort_sm90 >"$temp/omitted" 2>&1 && grep '^omitted: ' "$temp/omitted"; then
    try "without its NVRTC the table is of moe.h's text" $run --check $table
else
    refuse "a register more is found" "differs" $run --check "$temp/register.tsv" sort_sm90
    refuse "a row that is not there is found" "differs" $run --check "$temp/row.tsv" sort_sm80
    # make check-kernels compiles all; here some of each kind
    try "kernels compile and need what the table says" $run --check $table e8_softmax sort group pack \
        router_logits_bf16_4 finalize_rows_f32_x_bf16 bf16_gated_x_bf16_sm90 gemm1_t64_bf16_gated_x_bf16 \
        gemm2_t16_bf16_rows_f32 t128_bf16_rows_bf16_sm90 gemm2_t64_e4m3_r_f32_128_rows_bf16_sm90 \
        gemm1_t32_int4_bf16_32_swiglu_x_bf16_sm80 gemm2_t16_e2m1_e4m3_16_rows_f32_sm100 round_block_spread_x_f32
    cat "$temp/output"
fi
finish kernels
