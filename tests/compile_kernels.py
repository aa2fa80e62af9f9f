"""Compiles every shipped Triton kernel for GPUs that need not be present, and prints what each kernel takes.

    python tests/compile_kernels.py                a table
    python tests/compile_kernels.py --all          a table of every case
    python tests/compile_kernels.py --json FILE    a table, and its records in FILE for tests/kernels/test_compile.py

helpers/compile_cases_*.py list the cases, helpers/compile_jobs.py says which of them are compiled for which GPU, and
helpers/compiled.py compiles them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

# The package need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# These import neither triton nor a kernel: main() has to remove TRITON_INTERPRET first.
from helpers.compile_jobs import compile_all, jobs, one_of_each_kernel
from helpers.compiled import compile_case
from helpers.compiled_table import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="leave no case out; takes minutes")
    parser.add_argument("--quick", action="store_true", help="one case of each kernel, on Hopper")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    arguments = parser.parse_args()
    # The interpreter compiles nothing, and a cache may hold what an older source gave.
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        # The few cases of --quick are done before other processes would have started.
        records = [*map(compile_case, one_of_each_kernel())] if arguments.quick else compile_all(jobs(arguments.all))
    if arguments.json:
        # A constant may be one of Triton's types.
        arguments.json.write_text(json.dumps(records, default=str))
    print(table(records))


if __name__ == "__main__":
    main()
