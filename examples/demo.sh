#!/bin/sh
# demo.sh - from a clone to a running layer: finds a C compiler and make, or installs them, then `make demo`.
cd "$(dirname "$0")/.." || exit 1
. tests/tools.sh
need_tools
exec make demo
