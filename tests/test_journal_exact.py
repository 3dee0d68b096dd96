"""Whose scores a journal gives back: those of an inference with the very same settings."""

from pathlib import Path

import pytest

from ksat.journal import Journal

SETTINGS = {"base": "a", "template": {"system": "", "user": "{passage}"}, "scale": 1.0}


@pytest.mark.parametrize("changed", [{"base": "b"}, {"template": {"system": "", "user": "{question}"}}, {"scale": 2.0}])
def test_scores_of_other_settings_are_never_taken(tmp_path: Path, changed: dict[str, object]) -> None:
    path = tmp_path / ".out.partial"
    first = Journal(path, SETTINGS, pack_tokens=100)
    first.add({"q-1": [0.25, -1.5]})
    assert Journal(path, SETTINGS, pack_tokens=100).scores == {"q-1": [0.25, -1.5]}
    assert Journal(path, SETTINGS | changed, pack_tokens=100).scores == {}
    assert Journal(path, SETTINGS, pack_tokens=100).scores == {}  # the other one has started it anew


def test_the_same_settings_in_another_order_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / ".out.partial"
    Journal(path, SETTINGS, pack_tokens=100).add({"q-1": [0.25, -1.5]})
    again = Journal(path, dict(reversed(SETTINGS.items())), pack_tokens=999)
    assert (again.scores, again.pack_tokens) == ({"q-1": [0.25, -1.5]}, 100)
