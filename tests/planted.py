"""The faults that once passed all tests, planted one by one: each must be seen by the test that is named for it.

python tests/planted.py [WORD ...]       # all, or those with a word of these in their names; docs/testing.md holds the last run

Every fault is planted into a copy of the project, and its tests run in a fork of a process that has imported the libraries.
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import peft  # noqa: F401
import pytest
import trl.trainer.sft_trainer  # noqa: F401
from mutants import ROOT, project_files


@dataclass(frozen=True, slots=True)
class Fault:
    """One line that is wrong.

    Attributes:
        name: what goes wrong.
        file: where.
        right: a text that stands there once.
        wrong: what takes its place.
        test: the test that must fail.
    """

    name: str
    file: str
    right: str
    wrong: str
    test: str


PROMPT = "test_faults.py::test_inference_asks_with_the_run_s_prompt_scale_and_limit_of_tokens"
LOSS = "test_faults.py::test_the_loss_is_of_the_run_s_prompts_at_its_scale"
PATIENCE = "test_faults.py::test_patience_ends_and_the_best_epoch_s_adapter_is_kept"
LIMIT = "test_faults.py::test_prompts_are_cut_to_the_limit_of_tokens_in_training_and_inference"
RATE = "test_faults.py::test_the_rate_rises_for_the_share_of_warm_up"
LORA = "test_faults.py::test_alpha_and_rslora_reach_the_adapter"
AXIS = "test_blending_exact.py::test_weights_belong_to_members_and_not_to_rows_or_choices"
FAULTS = (
    Fault(
        "inference with the default prompt instead of the run's", "inference.py", 'PromptTemplate(**setup["template"]),',
        '__import__("ksat.prompts").prompts.DEFAULT_TEMPLATES[setup["score_by"]],', PROMPT,
    ),
    Fault("no scale in inference", "inference.py", 'else scores, setup["scale"])', "else scores, 1.0)", PROMPT),
    Fault("no scale in the loss", "ksat/training.py", "answers, self.settings.scale)", "answers, 1.0)", LOSS),
    Fault("no scale handed to training", "train.py", "scale=validation.scale)", "scale=1.0)", LOSS),
    Fault(
        "the last epoch instead of the best", "ksat/validation.py", 'key=lambda e: _log_loss(e) if self.chooses else -e["epoch"]',
        'key=lambda e: -e["epoch"]', PATIENCE,
    ),
    Fault(
        "patience without end", "ksat/validation.py",
        'return self.chooses and self.progress["epochs"][-1]["epoch"] - self.best_epoch >= self.patience', "return False", PATIENCE,
    ),
    Fault(
        "weight decay 0", "ksat/training.py", "weight_decay=settings.weight_decay,", "weight_decay=0.0,",
        "test_faults.py::test_weight_decay_shrinks_what_has_no_gradient",
    ),
    Fault("warm-up 0", "ksat/training.py", "warmup_steps=int(settings.warmup * num_steps),", "warmup_steps=0,", RATE),
    Fault(
        "dropout 0", "train.py", 'settings["alpha"], settings["dropout"],', 'settings["alpha"], 0.0,',
        "test_faults.py::test_dropout_changes_the_gradients",
    ),
    Fault(
        "alpha does not reach the LoRA", "train.py", '(settings["rank"], settings["alpha"],',
        '(settings["rank"], 2.0 * settings["rank"] ** 0.5,', LORA,
    ),
    Fault("rsLoRA does not reach the LoRA", "train.py", 'settings["dropout"], settings["rslora"])', 'settings["dropout"], True)', LORA),
    Fault(
        "the seed does not reach the LoRA", "train.py", 'lora=lora, seed=settings["seed"])', "lora=lora)",
        "test_faults.py::test_the_seed_draws_the_fresh_lora",
    ),
    Fault(
        "a run may be replaced while inference reads it", "inference.py", "require_same_run(Path(args.ckpt), run)", "pass",
        "test_faults.py::test_a_run_that_is_replaced_while_it_is_read_is_not_scored",
    ),
    Fault("max_tokens times ten in the encoder", "ksat/encoding.py", "self.num_shots = max_tokens,", "self.num_shots = 10 * max_tokens,", LIMIT),
    Fault(
        "max_tokens times ten in inference", "inference.py", 'max_tokens=setup["max_tokens"],\n', 'max_tokens=10 * setup["max_tokens"],\n',
        PROMPT,
    ),
    Fault(
        "max_tokens times ten in training", "train.py", 'settings["score_by"], max_tokens=settings["max_tokens"]\n',
        'settings["score_by"], max_tokens=10 * settings["max_tokens"]\n', LIMIT,
    ),
    Fault(
        "a constant journal key", "ksat/journal.py", "self._key = json.dumps(self._settings, sort_keys=True)", 'self._key = ""',
        "test_journal.py::test_lines_of_another_journal_are_not_taken",
    ),
    Fault(
        "another journal's settings are not looked at", "ksat/journal.py", 'if header["settings"] != self._settings:', "if False:",
        "test_journal.py::test_other_settings_neither_go_on_nor_drop_what_was_scored",
    ),
    Fault("weights on the rows", "ksat/blending.py", "np.array(weights)[:, None, None]", "np.array(weights)[None, :, None]", AXIS),
    Fault("weights on the choices", "ksat/blending.py", "np.array(weights)[:, None, None]", "np.array(weights)[None, None, :]", AXIS),
)  # fmt: skip


def plant(fault: Fault | None, tests: Sequence[str], folder: Path) -> tuple[int, str]:
    """pytest's exit code for these tests on a copy of the project with the fault in it, and what it printed."""
    for name in project_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    if fault is not None:
        text = (folder / fault.file).read_text(encoding="utf-8")
        if text.count(fault.right) != 1:
            sys.exit(f"{fault.name}: {fault.file} has {fault.right!r} {text.count(fault.right)} times, expected once")
        (folder / fault.file).write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")
    output = folder / "pytest.log"
    pid = os.fork()
    if pid == 0:
        with output.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        flags = ["-q", "-p", "no:cacheprovider", "--tb=line", "--show-capture=no", "--rootdir", str(folder)]
        os._exit(int(pytest.main([*flags, *(str(folder / "tests" / test) for test in tests)])))
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), output.read_text(encoding="utf-8", errors="replace")


def main() -> None:
    """Prints a line a fault; exit code 1 if one was not seen, or if a test fails without a fault."""
    words = sys.argv[1:]
    chosen = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    all_tests = list(dict.fromkeys(fault.test for fault in chosen))
    failed = False
    for fault in (None, *chosen):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            code, printed = plant(fault, all_tests if fault is None else [fault.test], Path(folder))
        as_expected = code == 0 if fault is None else code == 1 and " error" not in printed.splitlines()[-1]
        failed |= not as_expected
        name, test = ("no fault", f"{len(all_tests)} tests") if fault is None else (fault.name, fault.test)
        said = ("pass" if fault is None else "fails") if as_expected else f"NOT SO:\n{printed}"
        print(f"{name}: {test} {said} ({time.monotonic() - started:.0f} s)", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
