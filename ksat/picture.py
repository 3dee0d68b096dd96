"""exploration.png: accuracy against peak memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ksat.standings import Row

WIDTH, HEIGHT = 9.0, 5.5  # inches


def draw(path: Path, rows: Sequence[Row], *, uniform: float, limit_gib: float | None, memory: str, title: str) -> None:
    """Writes the picture: a point a base with its 95 % interval, labelled without overlap; guessing and the GPU as lines.

    Args:
        path: of the PNG file, whatever its ending.
        rows: with figures.
        uniform: accuracy of guessing.
        limit_gib: memory of the GPU; None on a machine without one.
        memory: whose memory it is, for the axis.
        title: above the picture.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display
    import matplotlib.pyplot as plt

    use_fonts()
    figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
    xs = [row.peak_gib or 0.0 for row in rows]
    accuracies = [row.metrics["all"].accuracy for row in rows]
    ys = [accuracy.value for accuracy in accuracies]
    below = [y - (accuracy.low if accuracy.low is not None else y) for y, accuracy in zip(ys, accuracies, strict=True)]
    above = [
        (accuracy.high if accuracy.high is not None else y) - y for y, accuracy in zip(ys, accuracies, strict=True)
    ]
    for i, (x, y, low, high) in enumerate(
        zip(xs, ys, below, above, strict=True)
    ):  # each its colour: bars may lie on bars
        drawn = axes.errorbar(x, y, yerr=[[low], [high]], fmt="o", capsize=3 + i % 4, color=f"C{i % 10}")
        for bar in drawn.lines[2]:
            bar.set_alpha(0.5)
    axes.axhline(uniform, color="gray", linestyle=":", label=f"uniform guess, {uniform:.3f}")
    if limit_gib is not None:
        axes.axvline(limit_gib, color="tab:red", linestyle="--", label=f"memory of the GPU, {limit_gib:.1f} GiB")
    right = max([*xs, limit_gib or 0.0])
    axes.set_xlim(0, right * 1.15)
    axes.set_xlabel(f"peak memory of {memory}, GiB")
    axes.set_ylabel("accuracy, 95 % interval")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
    _label(axes, [row.name.rsplit("/", 1)[-1] for row in rows], xs, ys, below, above, limit_gib)
    figure.savefig(path, format="png", dpi=150)
    plt.close(figure)


def use_fonts() -> None:
    """Lets matplotlib write Hangul where a font that has it is installed; DejaVu Sans, its own, has none."""
    import matplotlib
    from matplotlib.font_manager import fontManager

    there = {font.name for font in fontManager.ttflist}
    wanted = (
        "Noto Sans CJK KR",
        "Noto Sans KR",
        "NanumGothic",
        "Malgun Gothic",
        "AppleGothic",
        "UnDotum",
        "Baekmuk Gulim",
    )
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", *(name for name in wanted if name in there)]


def _label(
    axes: Any, names: Sequence[str], xs: Sequence[float], ys: Sequence[float], below: Sequence[float],
    above: Sequence[float], limit_gib: float | None,
) -> None:  # fmt: skip
    """Puts the names beside their points, clear of each other, of the points and their bars, and of the GPU's line."""
    from adjustText import adjust_text

    start = 0.01 * axes.get_xlim()[1]  # a label begins clear of its point
    texts = [
        axes.text(x + start, y, name, fontsize=9, color=f"C{i % 10}")
        for i, (x, y, name) in enumerate(zip(xs, ys, names, strict=True))
    ]
    axes.figure.draw_without_rendering()
    avoided = [(x, at) for x, y, a, b in zip(xs, ys, below, above, strict=True) for at in np.linspace(y - a, y + b, 9)]
    if limit_gib is not None:
        avoided += [(limit_gib, at) for at in np.linspace(axes.get_ylim()[0], axes.get_ylim()[1], 40)]
    # It gives no guarantee: what it found is looked at, and the labels push harder if some still overlap.
    for push in (0.5, 0.7, 1.0, 1.4, 2.0):
        for text, x, y in zip(texts, xs, ys, strict=True):
            text.set_position((x + start, y))
        # As many iterations on every machine; by default it is a second.
        _, lines = adjust_text(
            texts, x=[x for x, _ in avoided], y=[y for _, y in avoided], target_x=xs, target_y=ys, ax=axes, iter_lim=2000,
            expand=(1.08, 1.3), force_text=(0.2, push), arrowprops={"arrowstyle": "-", "color": "gray", "lw": 0.5},
        )  # fmt: skip
        boxes = [text.get_window_extent() for text in texts]
        if not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i]):
            return
        if push < 2.0:
            for line in lines:
                line.remove()
