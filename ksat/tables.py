"""Markdown tables that read well in a terminal."""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, num_texts: int = 1) -> str:
    """The table; its first `num_texts` columns stand on the left, figures on the right."""
    widths = [max(3, *(len(cells[column]) for cells in [header, *rows])) for column in range(len(header))]
    rule = ["-" * width if i < num_texts else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(_line(cells, widths, num_texts) for cells in [header, rule, *rows])


def _line(cells: Sequence[str], widths: Sequence[int], num_texts: int) -> str:
    padded = (
        cell.ljust(width) if i < num_texts else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return f"| {' | '.join(padded)} |"
