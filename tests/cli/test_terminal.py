"""Tables on a terminal: as wide as it is. And the help of every command: examples, the same words for the same options."""

import argparse
import re
import subprocess
import sys

import pytest

from helpers.tiny import ENVIRONMENT
from resnet_kernels.cli import main as cli
from resnet_kernels.cli import terminal
from resnet_kernels.fusion.report import table

COMMANDS = ("demo", "explain", "verify", *cli.MODULES)
HEAD = ("module", "kernels, or why not", "ms")
ROWS = [
    ("layer1.0", "conv1+bn1+relu -> conv2+bn2+relu -> conv3+bn3+add+relu", "12.5"),
    ("a", "", "1"),
    ("b", "x y", ""),
]


def words(text):
    return sorted(re.sub(r"-{3,}", " ", text).split())


@pytest.mark.parametrize("width", (40, 60, 69))
def test_a_wide_table_is_wrapped(width):
    text = table(HEAD, ROWS)
    fitted = terminal.fit(
        f"before it\n{text}\n1 fused, and a sentence that is longer than any of the widths here", width
    )
    lines = fitted.splitlines()
    assert lines[0] == "before it" and lines[-1].startswith("1 fused")
    assert max(map(len, lines[1:-1])) <= width < max(map(len, text.splitlines()))
    assert words("\n".join(lines[1:-1])) == words(text)
    # A row's first line begins with its first cell, and the other lines of it don't.
    assert [line.split()[0] for line in lines[3:-1] if not line.startswith(" ")] == ["layer1.0", "a", "b"]


def test_a_word_is_cut_only_where_all_else_is_not_enough():
    rows = [("x" * 30, "y" * 10)]
    assert terminal.fit(table(("a", "b"), rows), 42) == table(("a", "b"), rows)
    lines = terminal.fit(table(("a", "b"), rows), 32).splitlines()
    assert [line.split() for line in lines[2:]] == [["x" * 20, "y" * 10], ["x" * 10]]


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    (
        ("layer3.1.conv1+bn1+relu", 16, ["layer3.1.conv1+", "bn1+relu"]),
        ("conv1+bn1 -> conv2+bn2", 12, ["conv1+bn1 ->", "conv2+bn2"]),
        ("resnet_kernels::conv", 16, ["resnet_kernels::", "conv"]),
        ("0123456789", 4, ["0123", "4567", "89"]),
        ("four", 4, ["four"]),
        ("", 4, [""]),
    ),
)
def test_where_a_cell_is_cut(text, width, lines):
    assert terminal._wrap(text, width) == lines


def test_what_fits_and_what_is_no_table_stay():
    text = f"{table(HEAD, ROWS)}\n\n{'a long line ' * 20}\n--------\n- - -"
    assert terminal.fit(text, 100) == text


def test_two_tables_are_laid_out_apart():
    both = f"{table(HEAD, ROWS)}\n\n{table(('a', 'b'), [('1', '2')])}"
    assert terminal.fit(both, 50).endswith(f"\n\n{table(('a', 'b'), [('1', '2')])}")


def test_explain_fits_a_terminal_and_is_whole_in_a_pipe(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["explain", "--model", "resnet50", "--device", "cpu"]
    assert cli.main(arguments) == 0
    piped = capsys.readouterr().out
    assert "conv1+bn1+relu -> conv2+bn2+relu -> downsample.0+downsample.1 -> conv3+bn3+add+relu\n" in piped
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    end = shown.index("17 fused")
    assert max(map(len, shown[:end].splitlines())) <= 80 and words(shown) == words(piped)


@pytest.mark.slow
def test_verify_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert (
        cli.main(["verify", "--model", "resnet_v2_50", "--device", "cpu", "--image-size", "32", "--batch-size", "1"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "parity holds" in shown and max(map(len, shown.splitlines())) <= 80


def helps():
    parser = cli._parser()
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return parser, commands.choices


def test_every_command_has_examples_that_it_takes(monkeypatch):
    """Two or three, and each is a command line that the parser accepts."""
    monkeypatch.setenv("COLUMNS", "80")
    parser, commands = helps()
    assert tuple(commands) == COMMANDS
    for name, command in commands.items():
        text = command.format_help()
        lines = re.findall(r"^  python -m resnet_kernels (.+)$", text[text.index("examples:") :], re.M)
        assert 2 <= len(lines) <= 3, name
        for line in lines:
            assert parser.parse_args(line.split()).command == name
        assert max(map(len, text.splitlines())) <= 80, name


def test_the_exit_statuses_are_in_the_help():
    parser, _ = helps()
    assert re.findall(r"^  (\d+) ", parser.format_help().split("exit status:")[1], re.M) == [
        "0",
        "1",
        "2",
        "130",
        "141",
    ]


def test_an_option_means_the_same_everywhere():
    """Up to the default, which its text names in the same way in every command."""
    _, commands = helps()
    texts = {}
    for command in commands.values():
        for action in command._actions:
            for option in {"--model", "--dtype", "--device", "--backend", "--seed", "--json", "--image-size"} & {
                *action.option_strings
            }:
                texts.setdefault(option, set()).add(
                    re.sub(r"\(default: .*?\)$|, which are resized", "", action.help).strip()
                )
    assert texts.keys() == {"--model", "--dtype", "--device", "--backend", "--seed", "--json", "--image-size"}
    dtypes = texts.pop("--dtype")
    assert all(text.endswith("or PyTorch's names, such as float32") for text in dtypes)
    assert all(len(text) == 1 for text in texts.values()), texts
    takes_a_model = {"demo", "explain", "verify", "time", "profile", "train", "tune", "roofline"}
    assert {name for name, command in commands.items() if "--model" in command.format_help()} == takes_a_model
    images = takes_a_model - {"explain"}
    for option in ("--batch-size", "--image-size"):
        assert {name for name, command in commands.items() if option in command.format_help()} == images
    assert {name for name, command in commands.items() if "--json" not in command.format_help()} == {"train", "report"}


@pytest.mark.parametrize(
    ("given", "dtype"), (("fp16", "fp16"), ("float16", "fp16"), ("bfloat16", "bf16"), ("bf16", "bf16"))
)
@pytest.mark.parametrize("command", ("verify", "tune", "roofline"))
def test_a_dtype_has_two_names(command, given, dtype):
    assert cli._parser().parse_args([command, "--dtype", given]).dtype == dtype


@pytest.mark.parametrize(("command", "dtype"), (("roofline", "float64"), ("verify", "tf32"), ("tune", "int8")))
def test_a_dtype_that_a_command_has_not(command, dtype, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--dtype", dtype])
    assert f"got {dtype!r}" in capsys.readouterr().err


def test_ctrl_c_is_a_line_and_status_130(monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("resnet_kernels.explain", stop)
    assert cli.main(["explain", "--model", "resnet18", "--device", "cpu"]) == 130
    assert capsys.readouterr().err == "\nstopped\n"


@pytest.mark.slow
def test_a_reader_that_has_ended():
    """As in `explain | head -1`: no traceback."""
    command = [sys.executable, "-m", "resnet_kernels", "explain", "--model", "resnet18", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141
