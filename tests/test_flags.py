"""Flags of all scripts: numbers and names that argparse's own types take and nothing after them does; one line for each."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import compare
import demo
import ensemble
import explore
import inference
import train
from ksat import retrieve, soup
from ksat.errors import EXIT_BAD_INPUT

ROOT = Path(__file__).resolve().parent.parent
LONG, DEEP = "가" * 86, "/".join(["a"] * 2100)  # 258 bytes a name, 4,199 a path
FILE_FLAGS = [
    (train, ("--train", "--prompt", "--against", "--oof", "--base")),
    (inference, ("--ckpt", "--base", "--prompt", "--train", "--test", "--answers", "--out")),
    (ensemble, ("--test", "--fit", "--apply", "--answers", "--check", "--log", "--oof", "--out")),
    (compare, ("--answers", "--questions", "--out")),
    (explore, ("--score", "--answers", "--train", "--leaderboard", "--explain", "--bases", "--out")),
    (retrieve, ("--corpus", "--questions", "--out")),
]


def refused(script: ModuleType, flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a script says before it exits with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        script.main(flags)
    assert stopped.value.code == EXIT_BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ") and len(line) <= 1000
    return line


@pytest.mark.parametrize(("script", "flag"), [(script, flag) for script, flags in FILE_FLAGS for flag in flags])
def test_names_that_no_file_system_takes(script: ModuleType, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rule in (
        (f"data/{LONG}", "is too long; a name has at most 255 bytes"),
        (DEEP, "is too long"),
        ("a\0b", "NUL"),
        ("a\udcff", "is not UTF-8; rename it"),
    ):
        line = refused(script, [flag, name], capsys)
        assert line.startswith(f"error: argument {flag}: ") and rule in line


@pytest.mark.parametrize(
    ("script", "flag"), [(train, "--prompt"), (inference, "--test"), (ensemble, "--answers"), (explore, "--score")]
)
def test_an_empty_name_is_no_file(script: ModuleType, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"argument {flag}: the name is empty" in refused(script, [flag, ""], capsys)


@pytest.mark.parametrize(
    ("script", "flag", "value"),
    [
        *((train, "--rank", text) for text in ("9" * 22, "9" * 5000, "٣", "1_0", "+1", " 1", "0", "-1", "1.0", "")),
        (train, "--seed", "-1"),
        (train, "--seed", str(2**32)),
        (inference, "--limit", "٣"),
        (inference, "--choice-orders", "٣"),
        (inference, "--context-when", "short:1٣"),
        *(
            (train, flag, "nan")
            for flag in ("--lr", "--alpha", "--dropout", "--warmup", "--weight-decay", "--valid-fraction")
        ),
        *((train, "--lr", text) for text in ("inf", "1e999", "٣", "1_0", "0x1", "", "9" * 400)),
        *((ensemble, flag, "nan") for flag in ("--weights", "--margin", "--public", "--private")),
        *((soup, flag, "nan") for flag in ("--weights", "--scale")),
        *((inference, "--gpu-memory", text) for text in ("1e400GiB", "9" * 400, "٣GiB", "nan")),
    ],
)
def test_numbers_that_are_none(script: ModuleType, flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(script, [flag, value], capsys).startswith(f"error: argument {flag}: ")


def test_what_numbers_are_taken() -> None:
    args = train.build_parser().parse_args(
        ["--lr", "5e-5", "--alpha", ".5", "--dropout", "0.", "--seed", str(2**32 - 1), "--rank", "064"]
    )
    assert (args.lr, args.alpha, args.dropout, args.seed, args.rank) == (5e-5, 0.5, 0.0, 2**32 - 1, 64)
    assert ensemble.build_parser().parse_args(["--weights", "2", "1"]).weights == [2.0, 1.0]


@pytest.mark.parametrize("script", [train, inference, ensemble, compare, explore, retrieve, soup])
def test_what_is_no_flag_is_one_line_with_the_way_to_the_usage(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = {
        compare: ["a", "--answers", "b"],
        retrieve: ["--corpus", "a", "--questions", "b", "--out", "c"],
        soup: ["a", "--run", "b"],
    }
    line = refused(script, [*needed.get(script, []), "--nothing\n\x1b[31merror:x" + "y" * 5000], capsys)
    assert line.startswith("error: unrecognized arguments: --nothing\\n\\x1b[31merror:x")
    name = f"-m ksat.{script.__name__.rpartition('.')[2]}" if script in (retrieve, soup) else ""
    assert line.endswith(f"python {name} --help" if name else "--help")


def test_the_demo_helps_and_runs_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", "--help"])
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **how: pytest.fail("a step ran"))
    with pytest.raises(SystemExit) as stopped:
        demo.main()
    assert stopped.value.code == 0
    assert "usage: demo.py" in capsys.readouterr().out


def test_the_usage_is_named_as_it_is_called() -> None:
    result = subprocess.run([sys.executable, str(ROOT / "compare.py")], capture_output=True, text=True, check=False)
    assert result.returncode == EXIT_BAD_INPUT
    assert (
        result.stderr == "error: the following arguments are required: CSV, --answers; see python compare.py --help\n"
    )


@pytest.mark.parametrize("path", ["시험.csv", b"\xbd.csv"])
def test_a_path_that_the_locale_hides_is_not_called_wrong(path: str | bytes) -> None:
    """Where the C locale holds, Python reads file names as ASCII: a name in UTF-8 need not be changed."""
    command = [sys.executable, str(ROOT / "compare.py"), "a", "--answers", path]
    env = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert result.returncode == EXIT_BAD_INPUT
    assert "can't be read in the locale's ascii; set PYTHONUTF8=1; see python compare.py --help" in result.stderr
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env | {"PYTHONUTF8": "1"})
    assert "rename it" in result.stderr if isinstance(path, bytes) else "no such file" in result.stderr
