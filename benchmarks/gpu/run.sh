#!/usr/bin/env bash
# A GPU session's second act, the numbers (the first, the checks: python -m benchmarks.gpu.checks): bash benchmarks/gpu/run.sh OUTDIR [BUDGET_SECONDS [DENIED.json]]
# Most valuable first, within the budget (440 s unless given); at most 8 files in OUTDIR, each written as soon as there is
# something to say, so that a run may be stopped at any point. Without a GPU it runs dry. See session.py.
set -euo pipefail
if [ $# -lt 1 ] || [ $# -gt 3 ]; then
    echo "usage: bash $0 OUTDIR [BUDGET_SECONDS [DENIED.json]]" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
denied=${3:+$(realpath "$3")}
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python}" -m benchmarks.gpu.session "$out" --seconds "${2:-440}" ${denied:+--denied "$denied"}
