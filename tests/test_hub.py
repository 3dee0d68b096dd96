"""A hub that is silent, refuses or has no name for a base: one line, soon, with the flag's own name and what was meant."""

import socket
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from tiny import base_folder

from ksat import hub
from ksat.errors import InputError
from ksat.models import load_config, load_tokenizer


@pytest.fixture(params=["refuses", "silent"])
def endpoint(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a hub that can't be reached, asked for the first time."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "silent":
            server.listen()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        hub._why_unreachable.cache_clear()
        yield address
        hub._why_unreachable.cache_clear()


def test_a_hub_that_can_t_be_reached_is_told_at_once(endpoint: str) -> None:
    load_config(str(base_folder()))  # a folder, and what transformers imports: no hub is asked
    for _ in range(2):
        with pytest.raises(InputError) as told:
            load_config("nobody/nothing", flag="--explain")
    assert hub.SECONDS < 10 and huggingface_hub.constants.HF_HUB_OFFLINE  # asked once, and nothing tries it six times
    assert str(told.value).startswith(
        f"--explain nobody/nothing: can't be loaded (the hub, {endpoint}, can't be reached: "
    )
    assert "\n" not in str(told.value)
    with pytest.raises(InputError, match="^--ckpt runs/a, base nobody/nothing: can't be loaded"):
        load_tokenizer("nobody/nothing", flag="--ckpt runs/a, base")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Qwen2.5-32B", "did you mean unsloth/Qwen2.5-32B-Instruct-bnb-4bit? "),
        ("qwen/qwen3-8b", "did you mean Qwen/Qwen3-8B? "),
        ("Qwen3-14", "did you mean Qwen/Qwen3-14B? "),
        ("google/gema-3-12b-it", "did you mean google/gemma-3-12b-it"),
        ("Qwen/Qwen3-8B", ""),
        ("nobody/nothing", ""),
    ],
)
def test_names_that_were_meant(monkeypatch: pytest.MonkeyPatch, name: str, meant: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.did_you_mean(name).startswith(meant) and bool(meant) == bool(hub.did_you_mean(name))
    with pytest.raises(InputError) as told:
        load_config(name)
    assert f"; {meant}" in str(told.value)


def test_a_folder_was_meant_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("Qwen3-14").mkdir()
    assert hub.did_you_mean("Qwen3-14") == ""
    assert not hub.is_hub_name("Qwen3-14") and not hub.is_hub_name("./a/b/c") and hub.is_hub_name("a/b")


def test_a_base_that_is_here_asks_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded one has the form of a hub's name."""
    monkeypatch.setattr(hub, "_why_unreachable", lambda: pytest.fail("the hub is asked"))
    monkeypatch.setattr("ksat.models.base_path", lambda base: str(base_folder()))
    load_config("embedded")
    load_tokenizer("embedded-small")
