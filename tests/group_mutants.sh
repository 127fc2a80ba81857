#!/bin/sh
# Every second mutant is reported by the test that guards it: caught is passed, anything else failed. `make mutants`
# runs all.
mkdir -p build/tmp
out=build/tmp/mutants.out
MOE_MUTANTS_STEP=2 ${MAKE:-make} -s mutants >"$out" 2>&1
cat "$out"
awk '$2 == "mutants," && $4 ~ /^caught/ { all = $1; caught = $3 }
     END {
         if (all < 24) { print "mutants: " caught + 0 " passed, " (all > caught ? all - caught : 1) " failed"; exit 1 }
         print "mutants: " caught " passed, " all - caught " failed"
         exit all != caught
     }' "$out"
