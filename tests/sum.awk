# sum.awk - adds up closing lines to "N passed, N failed". With ci=true what was left out counts as failed.
/^omitted: / { if (ci == "true") failed++; next }
{
    for (i = 2; i <= NF; i++) {
        if ($i ~ /^passed,?$/) passed += $(i - 1)
        if ($i ~ /^failed,?$/) failed += $(i - 1)
        if ($i ~ /^skipped,?$/ && ci == "true") failed += $(i - 1)
    }
}
END {
    printf "%d passed, %d failed\n", passed, failed
    exit failed != 0 || passed == 0
}
