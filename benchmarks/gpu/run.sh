#!/usr/bin/env bash
# Act 2 of a GPU session, the measurements (act 1, the checks: python -m benchmarks.gpu.checks):
#     bash benchmarks/gpu/run.sh OUTDIR [BUDGET_SECONDS [DENIED.json]]
# The most valuable come first, within the budget (440 s unless given). OUTDIR gets at most 8 files, each written as soon as
# it has a result, so that a run may be stopped at any point. Without a GPU this is a dry run. See session.py.
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
