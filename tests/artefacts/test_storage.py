"""Artefacts on disk: whole or not at all, checked when read, never pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from temper.artefacts import ANY_BASE, Prompt, Stack, Steer, Weights, load_artefact
from temper.core.errors import ConfigError, StoreError
from temper.core.types import Message


def example() -> Steer:
    tensors = {"direction": torch.arange(6.0).reshape(2, 3), "half": torch.ones((), dtype=torch.bfloat16)}
    return Steer("base-fingerprint", "made-up", {"layer": 3}, tensors)


def test_round_trip_and_what_lies_on_disk(tmp_path: Path) -> None:
    folder = example().save(tmp_path / "a")
    assert sorted(path.name for path in folder.iterdir()) == ["artefact.json", "tensors.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    manifest = json.loads((folder / "artefact.json").read_text())
    assert (manifest["kind"], manifest["method"], manifest["base"]) == (
        "steer",
        "made-up",
        "base-fingerprint",
    )
    assert manifest["settings"] == {"layer": 3}
    loaded = load_artefact(folder)
    assert isinstance(loaded, Steer)
    assert torch.equal(loaded.tensors["direction"], example().tensors["direction"])
    assert loaded.tensors["half"].dtype == torch.bfloat16
    assert loaded.fingerprint == example().fingerprint == manifest["fingerprint"]


def test_the_fingerprint_sees_everything() -> None:
    tensors = example().tensors
    others = [
        Steer("other", "made-up", {"layer": 3}, tensors),
        Steer("base-fingerprint", "made-out", {"layer": 3}, tensors),
        Steer("base-fingerprint", "made-up", {"layer": 4}, tensors),
        Steer(
            "base-fingerprint",
            "made-up",
            {"layer": 3},
            {**tensors, "half": torch.zeros((), dtype=torch.bfloat16)},
        ),
        Steer(
            "base-fingerprint",
            "made-up",
            {"layer": 3},
            {**tensors, "direction": torch.arange(6.0).reshape(3, 2)},
        ),
        Weights("base-fingerprint", "made-up", tensors),
    ]
    assert len({example().fingerprint, *(other.fingerprint for other in others)}) == 7


@pytest.mark.parametrize("where", ["{run}", "{run}/steps/fit", "{run}/steps/fit/artefact"])
def test_a_run_folder_will_do(tmp_path: Path, where: str) -> None:
    run = tmp_path / "runs" / "r1"
    example().save(run / "steps" / "fit" / "artefact")
    (run / "steps" / "test").mkdir()
    assert load_artefact(where.format(run=run)).method == "made-up"


def test_several_or_none_is_an_error(tmp_path: Path) -> None:
    for step in ("one", "two"):
        example().save(tmp_path / "steps" / step / "artefact")
    with pytest.raises(ConfigError, match=r"Several steps.*one.*two"):
        load_artefact(tmp_path)
    with pytest.raises(ConfigError, match="no artefact"):
        load_artefact(tmp_path / "nowhere")


def test_saving_again_replaces_but_never_what_is_no_artefact(tmp_path: Path) -> None:
    example().save(tmp_path / "a")
    Steer("base-fingerprint", "made-up", {"layer": 9}).save(tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["artefact.json"]
    assert load_artefact(tmp_path / "a").parts().settings == {"layer": 9}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="not an artefact"):
        example().save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "mine"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left")])
def test_a_failed_save_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("temper.artefacts.loading.save_file", full)
    with pytest.raises(StoreError, match="No space left"):
        example().save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_move_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example().save(tmp_path / "a")
    renamed = []

    def once(path: Path, target: Path) -> Path:
        renamed.append(path)
        if len(renamed) == 2:
            raise OSError(5, "Input/output error")
        os.rename(path, target)
        return target

    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(StoreError, match="Input/output"):
        Steer("base-fingerprint", "made-up", {"layer": 9}).save(tmp_path / "a")
    assert load_artefact(tmp_path / "a").parts().settings == {"layer": 3}


def damage(folder: Path, how: str) -> None:
    tensors, manifest = folder / "tensors.safetensors", folder / "artefact.json"
    content = json.loads(manifest.read_text())
    if how == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-3])
    elif how == "flipped":
        raw = bytearray(tensors.read_bytes())
        raw[-1] ^= 1
        tensors.write_bytes(raw)
    elif how == "missing":
        tensors.unlink()
    elif how == "not json":
        manifest.write_text("{")
    elif how == "kind":
        manifest.write_text(json.dumps({**content, "kind": "stear"}))
    elif how == "format":
        manifest.write_text(json.dumps({**content, "format": 99}))
    elif how == "key":
        manifest.write_text(json.dumps({k: v for k, v in content.items() if k != "base"}))
    elif how == "path":
        manifest.write_text(json.dumps({**content, "files": {"../../x": "0"}}))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated", "damaged"),
        ("flipped", "damaged"),
        ("missing", "lacks tensors.safetensors"),
        ("not json", "cannot be read"),
        ("kind", "no artefact kind 'stear'.*Did you mean steer"),
        ("format", "format 99"),
        ("key", "incomplete"),
        ("path", "leaves the folder"),
    ],
)
def test_damage_is_one_clear_error(tmp_path: Path, how: str, words: str) -> None:
    folder = example().save(tmp_path / "a")
    damage(folder, how)
    with pytest.raises(StoreError, match=words):
        load_artefact(folder)


def test_a_stack_keeps_its_members_in_order(tmp_path: Path) -> None:
    prompt = Prompt(
        "base-fingerprint", "made-up", demonstrations=(Message("user", "a"), Message("assistant", "b"))
    )
    inner = Stack.of([prompt, example()], "made-up")
    stack = Stack.of([example(), *[prompt] * 10, inner], "outer")
    loaded = load_artefact(stack.save(tmp_path / "s"))
    assert isinstance(loaded, Stack)
    assert [member.kind for member in loaded.members] == ["steer", *["prompt"] * 10, "stack"]
    assert [m.fingerprint for m in loaded.members] == [m.fingerprint for m in stack.members]
    assert loaded.fingerprint == stack.fingerprint
    with pytest.raises(ConfigError, match="no artefacts"):
        Stack.of([], "outer")


def test_prompt_with_control_tokens_comes_back_and_adds_them_behind_the_last_user_message(tmp_path):
    shown = (Message("user", "q", ("[A]",)), Message("assistant", "r"))
    prompt = Prompt(ANY_BASE, "made-up", demonstrations=shown, control=("[B]",))
    loaded = load_artefact(prompt.save(tmp_path / "p"))
    assert loaded.fingerprint == prompt.fingerprint
    first, _, last = loaded.rewrite([Message("user", "now", ("[A]",))])
    assert (first, last.content, last.control) == (shown[0], "now", ("[A]", "[B]"))
