"""Runs the code of the pages in docs/systems and writes below each block what it prints.

A page is one program: its Python blocks run in order and share their names, and so do the lines `python -m resnet_kernels ...`
of a shell block that has an output. The output stands below its block, between two marks:

    <!-- output -->                  a test compares it with a new run, letter by letter
    <!-- output: numbers vary -->    losses, accuracies, errors, times: a test compares all but the numbers
    <!-- /output -->

Empty marks are filled. The line between `<!-- machine -->` and `<!-- /machine -->` names the machine of the run.

    python docs/write_outputs.py                          writes all pages anew
    python docs/write_outputs.py docs/systems/slim.md     this page only
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from resnet_kernels.cli import main as cli
from resnet_kernels.ops import device_key

PAGES = Path(__file__).resolve().parent / "systems"
OUTPUT, VARYING, END = "<!-- output -->", "<!-- output: numbers vary -->", "<!-- /output -->"

_BLOCK = re.compile(
    rf"^```(?P<language>python|bash)\n(?P<code>.*?)^```\n(?:\n(?P<mark>{OUTPUT}|{VARYING})\n(?P<shown>.*?)^{END}\n)?",
    re.S | re.M,
)
_MACHINE = re.compile(r"(?<=<!-- machine -->\n).*?(?=<!-- /machine -->)", re.S)
# A number, an exponent, a time of day or a version; and the blanks and dashes that align a table's numbers.
_NUMBER = re.compile(r"[-+]?\d([\w.,:+]*\w)?(-\d+)?")
_ALIGNMENT = re.compile(r"(?<=[ -])[ -]+")


class Output(NamedTuple):
    """What a block printed, what its page shows (None without marks), and whether the numbers may differ."""

    printed: str
    shown: str | None
    numbers_vary: bool

    def agrees(self) -> bool:
        """Whether the page shows this output, apart from numbers where they vary."""
        mask = _masked if self.numbers_vary else str
        return mask(self.printed) == mask(self.shown or "")


def main(arguments: list[str]) -> None:
    for path in [Path(name).resolve() for name in arguments] or sorted(PAGES.glob("*.md")):
        path.write_text(written(path.read_text(), outputs(path)))


def outputs(path: Path) -> list[Output]:
    """Runs a page, and returns the output of each block.

    Raises:
        ValueError: if marks have no block above them, or a block prints something and has no marks.
    """
    text = path.read_text()
    found, names = [], {"__name__": "page"}
    blocks = list(_BLOCK.finditer(text))
    if sum(block["mark"] is not None for block in blocks) != text.count(END):
        raise ValueError(f"{path.name}: each {END} must end the output of the block right above it")
    for block in blocks:
        line = text.count("\n", 0, block.start("code"))
        printed = "\n".join(_run(block, path, line, names).splitlines())
        if printed and block["mark"] is None:
            raise ValueError(f"{path.name}, line {line}: the block prints something, and has no {OUTPUT} below it")
        shown = block["mark"] and block["shown"].removeprefix("```text\n").removesuffix("```\n").rstrip("\n")
        found.append(Output(printed, shown, block["mark"] == VARYING))
    return found


def written(text: str, found: list[Output]) -> str:
    """Returns a page's text with the outputs of a run, and with the machine's name."""
    rest: Iterator[Output] = iter(found)

    def fill(block: re.Match[str]) -> str:
        printed = next(rest).printed
        if block["mark"] is None:
            return block[0]
        start, end = (place - block.start() for place in block.span("shown"))
        return f"{block[0][:start]}```text\n{printed}\n```\n{block[0][end:]}"

    return _MACHINE.sub(lambda _: f"{machine()}\n", _BLOCK.sub(fill, text))


def machine() -> str:
    """Returns a sentence about the machine."""
    count = torch.get_num_threads()
    threads = f"{count} thread{'s' if count > 1 else ''}"
    return f"Printed on one {device_key.cpu_name()} CPU with {threads} by PyTorch {torch.__version__}."


def _run(block: re.Match[str], path: Path, line: int, names: dict[str, Any]) -> str:
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        if block["language"] == "python":
            # Blank lines in front let a traceback, and inspect.getsource, find the code in the page.
            exec(compile("\n" * line + block["code"], str(path), "exec"), names)
        elif block["mark"] is not None:
            for command in re.findall(r"^python -m resnet_kernels (.+)$", block["code"], re.M):
                cli.main(command.split())
    return stream.getvalue()


def _masked(text: str) -> str:
    return _ALIGNMENT.sub("", _NUMBER.sub("#", text))


if __name__ == "__main__":
    main(sys.argv[1:])
