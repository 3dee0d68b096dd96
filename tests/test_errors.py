"""The one door: an error is one line that stands alone, and neither a closed pipe nor a poor console ends the work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ksat import children
from ksat.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, InputError, bad_rows, error_line, exit_code, show

ROOT = Path(__file__).resolve().parent.parent


def run(code: str, *, shell: str = "", limit: int = 0, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    """A script whose main is `code`, under its own exit_code; `shell` stands behind it, `limit` is the KiB that a file may have."""
    indented = "".join(f"    {line}\n" for line in code.splitlines())
    program = (
        f"import sys\nfrom ksat.errors import InputError, exit_code\ndef main():\n{indented}sys.exit(exit_code(main))\n"
    )
    command = [sys.executable, "-c", program]
    if shell:
        command = [
            "bash",
            "-c",
            f'set -o pipefail; {f"ulimit -f {limit}; " if limit else ""}"$@" {shell}',
            "bash",
            *command,
        ]
    return subprocess.run(command, capture_output=True, cwd=ROOT, env=os.environ | environment, check=False)


def test_an_error_line_is_one_line_whatever_stands_in_it() -> None:
    assert error_line("a.csv: 'x\ny\r\t\x1b[2J\x07\u2028\u202e\ud800' is no answer") == (
        r"error: a.csv: 'x\ny\r\t\x1b[2J\x07\u2028\u202e\ud800' is no answer"
    )
    assert error_line("한글 👍 é …; ok") == "error: 한글 👍 é …; ok"
    long = error_line(f"place/{'x' * 100_000}: rule; the remedy")
    assert len(long) == 1000
    assert long.startswith("error: place/xxx") and " … x" in long and long.endswith("xxx: rule; the remedy")
    assert len(error_line("\n" * 100_000)) == 1000
    assert error_line("y" * 993) == "error: " + "y" * 993


def test_a_row_s_id_and_what_was_found_stay_in_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise bad_rows("a\nb.csv", "are bad", [("i\x1b" + "d" * 3000, "x\ny")] * 9, "mend them")

    assert exit_code(main) == EXIT_BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(r"error: a\nb.csv: 9 of the rows are bad (first id 'i\x1bd") and line.endswith("; mend them")


def test_any_value_can_be_shown() -> None:
    assert show(10**5000) == "int with more digits than can be printed"
    assert show([10**5000]) == "list with more digits than can be printed"
    assert show("가\n") == "'가\\n'"
    assert show("x" * 100) == "'" + "x" * 79 + "…"


def test_an_error_and_an_interruption_stand_on_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Bars of ours, of a library in the background, and one that was never closed."""
    from tqdm.auto import tqdm

    for error, code in ((InputError("x.csv: bad"), EXIT_BAD_INPUT), (KeyboardInterrupt(), EXIT_INTERRUPTED)):

        def main(error: BaseException = error) -> None:
            for _ in tqdm(range(9), desc="loading"):
                with tqdm(total=5, desc="scoring", position=1) as bar:
                    bar.update(2)
                    raise error

        assert exit_code(main, "the same command goes on") == code
        expected = "error: x.csv: bad" if code == EXIT_BAD_INPUT else "interrupted; the same command goes on"
        text = capsys.readouterr().err
        assert text.endswith(f"\n{expected}\n") and "scoring" in text
        assert not tqdm._instances


def test_a_bar_that_is_open_in_a_process_ends_before_the_error() -> None:
    result = run("from tqdm import tqdm\nbar = tqdm(total=9)\nbar.update(3)\nraise InputError('x: bad')")
    assert result.returncode == EXIT_BAD_INPUT
    assert result.stderr.endswith(b"\nerror: x: bad\n")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_pipe_costs_no_work(tmp_path: Path, stream: str) -> None:
    """The reader has gone before the first line, and there is far more than a pipe holds."""
    done = tmp_path / "done"
    code = (
        f"import os, time\nfor i in range(20000):\n    print('가' * 20, file=sys.{stream}, flush=i % 100 == 0)\n"
        f"os.system('echo child')\nopen({str(done)!r}, 'w').close()\nprint('not flushed', file=sys.{stream})"
    )
    result = run(code, shell="| head -1" if stream == "stdout" else "2>&1 >/dev/null | head -1")
    assert result.returncode == 0, result.stderr
    assert done.exists()
    assert result.stderr == b""  # neither a traceback nor "Exception ignored in ..."
    assert result.stdout.decode() == "가" * 20 + "\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_full_disk_under_a_stream_costs_no_work(tmp_path: Path, stream: str) -> None:
    done = tmp_path / "done"
    code = f"for i in range(3000):\n    print('가' * 20, file=sys.{stream}, flush=i % 100 == 0)\nopen({str(done)!r}, 'w').close()"
    note = b"note: the output can't be written any more (No space left on device); the work goes on\n"
    result = run(code, shell=f"{'' if stream == 'stdout' else '2'}>/dev/full")
    assert (result.returncode, result.stdout) == (0, b"")
    assert result.stderr == (note if stream == "stdout" else b"")
    assert done.exists()
    # The largest size that a file may have here: what fits is kept.
    result = run(
        f"{code}\nraise InputError('bad')", shell=f"{'' if stream == 'stdout' else '2'}>{tmp_path}/log", limit=8
    )
    assert result.returncode == EXIT_BAD_INPUT
    assert 0 < (tmp_path / "log").stat().st_size <= 8 * 1024
    assert b"Traceback" not in result.stderr
    # Both at once, and an error behind them.
    assert run(f"{code}\nraise InputError('bad')", shell=">/dev/full 2>/dev/full").returncode == EXIT_BAD_INPUT


def test_streams_that_are_closed_from_the_start_cost_no_work(tmp_path: Path) -> None:
    done = tmp_path / "done"
    code = f"f = open({str(done)!r}, 'w')\nprint('가', flush=True)\nprint('나', file=sys.stderr)\nf.write('all')\nf.close()"
    result = run(code, shell=">&- 2>&-")
    assert (result.returncode, done.read_text()) == (0, "all")


def test_an_error_behind_a_closed_pipe_keeps_its_exit_code() -> None:
    assert run("print('x' * 99999, flush=True)\nraise InputError('bad')", shell="| true").returncode == EXIT_BAD_INPUT


@pytest.mark.parametrize("encoding", ["cp949", "latin-1", "ascii", "ascii:strict"])
def test_a_console_that_lacks_a_letter_shows_its_escape(encoding: str) -> None:
    code = "print('가 é 👍 ⟦1⟧')\nprint('가 é 👍', file=sys.stderr)\nraise InputError('가: 👍')"
    result = run(code, PYTHONIOENCODING=encoding)
    name = encoding.partition(":")[0]
    assert result.returncode == EXIT_BAD_INPUT
    assert result.stdout == "가 é 👍 ⟦1⟧\n".encode(name, "backslashreplace")
    assert result.stderr == "가 é 👍\nerror: 가: 👍\n".encode(name, "backslashreplace")


@pytest.mark.parametrize("encoding", ["cp949", "ascii"])
def test_a_child_s_words_reach_its_log_whatever_the_console(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    (tmp_path / "script.py").write_text("print('가 ⟦1⟧ 👍')\nraise SystemExit('error: 나쁨 é')\n", encoding="utf-8")
    monkeypatch.setattr(children, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    assert children.run_script(["script.py"], tmp_path / "log") == "나쁨 é"
    assert children.run_script(["script.py"], Path("/dev/full")) == "나쁨 é"  # a full disk under the log
    assert (tmp_path / "log").read_text(encoding="utf-8") == "가 ⟦1⟧ 👍\nerror: 나쁨 é\n"


def test_a_folder_in_a_log_s_place_is_a_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"can't be written \(Is a directory\); nothing was changed, free or choose"):
        children.run_script(["script.py"], tmp_path)


def test_what_ctrl_c_says_fits_the_script() -> None:
    for script, words in [
        ("train.py", "--run NAME --resume, --all with the same command"),
        ("inference.py", "the same command goes on with what is scored"),
        ("explore.py", "with --score the same command goes on"),
    ]:
        assert words in (ROOT / script).read_text(encoding="utf-8")
