"""Average the LoRA adapters of finished runs into one run, so that five folds cost one pass.

python -m ksat.soup checkpoints/a-fold0 checkpoints/a-fold1 --run a-soup
python -m ksat.soup checkpoints/a checkpoints/b --run mixed --weights 2 1 --rank 32

The mean of updates of ranks r1, r2, ... has rank r1 + r2 + ...: without --rank it is kept exactly, and costs at each layer
what the members' ranks cost together. Only runs with one base, prompt and way of scoring can be averaged.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ksat.adapter_mean import Member, Soup, mean_adapter, read_member, require_one_kind
from ksat.blending import check_weights
from ksat.errors import InputError, exit_code
from ksat.files import file_sha256, write_atomic, write_json
from ksat.flags import ArgumentParser, file_name, number, positive
from ksat.metrics import SCALE_RANGE
from ksat.run_folders import RunFolder, claim_run, remove_run, require_run
from ksat.runs import (
    ADAPTER_FILE,
    ADAPTER_FOLDER,
    CONFIG_FILE,
    Run,
    library_versions,
    require_same_run,
    write_run,
)

SCALE_TOLERANCE = 0.1  # relative: folds that fit their scales on rows of their own are seldom nearer


def common_scale(members: Sequence[Member], given: float | None) -> float:
    """The factor on the soup's scores: the given one, else the mean of the members' where they lie within 10 %.

    Raises:
        InputError: they do not, and none is given. No mean of two that far apart is right: each member was trained at its own.
    """
    scales = [member.run.scale for member in members]
    if given is not None:
        return given
    low, high = min(scales), max(scales)
    if high > (1 + SCALE_TOLERANCE) * low:
        at = {scale: member.folder for scale, member in zip(scales, members, strict=True)}
        raise InputError(
            f"the runs' scales differ: {low:.6g} in {at[low]}, {high:.6g} in {at[high]}; name the soup's with --scale S"
        )
    return sum(scales) / len(scales)


def soup_run(members: Sequence[Member], weights: Sequence[float], soup: Soup, scale: float) -> Run:
    """The soup's run.json, but for its adapter's hashes; `settings` tells who is in it.

    Args:
        members: the runs.
        weights: one of each.
        soup: their mean.
        scale: factor on the scores.
    """
    told = [
        {"run": str(member.folder), "adapter_sha256": member.run.adapter_sha256, "weight": weight, "rank": member.rank}
        for member, weight in zip(members, weights, strict=True)
    ]
    settings = {
        "soup": told, "rank": soup.rank, "alpha": float(soup.rank), "rslora": False, "norm_kept": soup.kept,
        "context_when": members[0].run.context_rule.name, "kinds": members[0].run.settings.get("kinds"),
        "choices_tell_kinds": members[0].run.choices_tell_kinds, "worst_module": soup.worst[0], "worst_norm_kept": soup.worst[1],
    }  # fmt: skip
    data = {entry["sha256"]: entry for member in members for entry in member.run.data}
    return replace(
        members[0].run,
        scale=scale,
        adapter_sha256="",
        adapter_config_sha256="",
        settings=settings,
        data=list(data.values()),
        versions=library_versions(),
    )


def write_soup(place: RunFolder, soup: Soup, run: Run, config: dict[str, Any]) -> None:
    """Writes a finished run beside its place, which it takes when it is complete.

    Args:
        place: claimed; what has it is replaced.
        soup: the adapter.
        run: from soup_run.
        config: adapter_config.json of a member; its rank and scaling are replaced.

    Raises:
        InputError: it can't be written; nothing of it is left then.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def save(path: Path) -> None:
        try:
            save_file(soup.tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk is one of them
            raise OSError(str(error)) from error

    plain = {"r": soup.rank, "lora_alpha": soup.rank, "use_rslora": False, "lora_dropout": 0.0}
    if place.new.exists():
        remove_run(place.new)
    adapter = place.new / ADAPTER_FOLDER / ADAPTER_FILE
    try:
        write_atomic(adapter, save)
        config_path = adapter.with_name(CONFIG_FILE)
        write_json(config_path, config | plain | {"base_model_name_or_path": run.base})
        complete = replace(run, adapter_sha256=file_sha256(adapter), adapter_config_sha256=file_sha256(config_path))
        write_run(place.new, complete)
    except InputError:
        if place.new.exists():
            remove_run(place.new)
        raise
    place.settle()


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ArgumentParser(__doc__, prog="python -m ksat.soup")
    add = parser.add_argument
    add("runs", nargs="+", type=file_name, metavar="FOLDER", help="finished runs, checkpoints/<run>")
    add("--run", required=True, metavar="NAME", help="the soup's own name, checkpoints/NAME")
    add("--weights", nargs="+", type=_positive_number, metavar="W", help="one a run, in any unit (default: equal)")
    add(
        "--rank",
        type=positive,
        metavar="R",
        help="keep the mean's best approximation of this rank, which scores as fast as one member of it (default: exact)",
    )
    add(
        "--scale",
        type=_scale,
        metavar="S",
        help="factor on the scores before the softmax (default: the runs', where they agree)",
    )
    add("--overwrite", action="store_true", help="replace the run of this name")
    return parser


def _positive_number(text: str) -> float:
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _scale(text: str) -> float:
    value, (low, high) = number(text), SCALE_RANGE
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text} is not a number from {low:g} to {high:g}")
    return value


def main(argv: list[str] | None = None) -> None:
    """Averages the runs and says what came of it."""
    args = build_parser().parse_args(argv)
    with claim_run(args.run) as place:
        _require_free(args, place)  # before minutes of work, not after them
        _average(args, place)


def _require_free(args: argparse.Namespace, place: RunFolder) -> None:
    """Raises InputError if the soup would replace one of its members, or anything unasked, or what is no run."""
    if os.path.realpath(place.place) in map(os.path.realpath, args.runs):
        raise InputError(f"--run {args.run}: is one of the runs to average; take another name")
    if (place.is_taken or place.new.exists()) and not args.overwrite:
        raise InputError(f"--run {args.run}: {place.place} exists; take another name, or --overwrite")
    if place.is_taken:
        require_run(place.place)


def _average(args: argparse.Namespace, place: RunFolder) -> None:
    folder, folders = place.place, [Path(run) for run in args.runs]
    weights = check_weights(args.weights, len(folders))
    members = [read_member(member) for member in folders]
    require_one_kind(members)
    scale = common_scale(members, args.scale)
    soup = mean_adapter(members, weights, args.rank)
    for member in members:
        require_same_run(member.folder, member.run)
    write_soup(place, soup, soup_run(members, weights, soup, scale), members[0].config)
    ranks = "+".join(str(member.rank) for member in members)
    kept = "the exact mean" if args.rank is None else (
        f"{soup.kept:.1%} of the exact mean's Frobenius norm kept, {soup.worst[1]:.1%} in the worst layer, {soup.worst[0]}"
    )  # fmt: skip
    print(
        f"wrote {folder}: rank {soup.rank} of {ranks}, {kept}; score with: python inference.py --ckpt {folder}\n"
        "Rows that a member was trained on are no test of it, and out-of-fold rows of one fold were trained on by the others."
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
