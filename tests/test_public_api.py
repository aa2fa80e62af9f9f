"""Public names and their signatures are those of data/public_api.txt, so that none changes by accident.

`PYTHONPATH=. python tests/test_public_api.py` writes the file anew.
"""

import difflib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import resnet_kernels as rk

FILE = Path(__file__).parent / "data" / "public_api.txt"
MODULES = {"resnet_kernels": rk, "ops": rk.ops, "models": rk.models, "timing": rk.timing}


def public_names(module: ModuleType) -> list[str]:
    """Sorted names of a module's `__all__`, or of what is defined in it."""
    defined = (name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__)
    return sorted(getattr(module, "__all__", None) or (name for name in defined if not name.startswith("_")))


def signature(value: object) -> str:
    """A signature with its annotations as the source has them, or the type of what can't be called."""
    if not callable(value):
        return f": {type(value).__name__}"
    # A string stands in quotes, and a named tuple's in a ForwardRef.
    text = re.sub(r"ForwardRef\(('.*?')(?:, [^)]*)?\)", r"\1", str(inspect.signature(value)))
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)


def lines() -> Iterator[str]:
    for path, module in MODULES.items():
        for name in public_names(module):
            yield f"{path}.{name}{signature(getattr(module, name))}\n"


def test_public_names_and_signatures():
    before, now = FILE.read_text().splitlines(keepends=True), [*lines()]
    changes = "".join(line for line in difflib.unified_diff(before, now, "public_api.txt", "now", n=0))
    assert not changes, (
        f"the public API changed:\n{changes}If that is meant, tell users in CHANGELOG.md, and write the file anew by\n"
        "PYTHONPATH=. python tests/test_public_api.py"
    )


if __name__ == "__main__":
    FILE.write_text("".join(lines()))
