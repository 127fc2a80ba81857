#!/bin/sh
# run.sh - finds a C compiler and make, or installs them, then `make test`. Ends in N passed, N failed.
cd "$(dirname "$0")/.." || exit 1
. tests/tools.sh
need_tools
exec make test
