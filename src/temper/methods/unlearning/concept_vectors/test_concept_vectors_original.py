"""ConceptVectors: an original that was recorded otherwise is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from temper.core.errors import ConfigError
from temper.core.types import Run
from temper.data.schemas import Data, Text
from temper.methods.unlearning.concept_vectors.card import Config
from temper.methods.unlearning.concept_vectors.method import measure
from temper.systems.loading import load_base
from temper.systems.tiny import build_tiny

FAST = {"reply_tokens": 2, "num_questions": 1, "drift_rows": 64, "top_k": 20}
ITEMS = Data({
    "items": [
        Text("The sea.", extra={"Concept": "X", "QA": ["Q?"], "unrelated_QA": ["U?"], "Layer": 1, "Dim": 3})
    ]
})  # fmt: skip


@pytest.fixture(scope="module")
def system() -> Any:
    return load_base("tiny:llama")


@pytest.fixture
def recorded(system: Any, tmp_path: Path) -> Path:
    list(measure(system, ITEMS, Config(**FAST), Run(folder=tmp_path)))  # type: ignore[arg-type]
    return tmp_path


def against(system: Any, reference: str, **changes: Any) -> list[Any]:
    return list(measure(system, ITEMS, Config(**{**FAST, **changes, "reference": reference}), Run()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 30}, "top_k 20, here 30"),
        ({"reply_tokens": 3}, "reply_tokens 2, here 3"),
        ({"plain": True}, "plain False, here True"),
        ({"drift_rows": 32}, "drift_rows 64, here 32"),
        ({"top_k": 30, "plain": True}, "top_k 20, here 30; plain False, here True"),
    ],
)
def test_an_original_of_other_settings_is_refused(
    system: Any, recorded: Path, changes: dict[str, Any], message: str
) -> None:
    assert against(system, str(recorded))
    with pytest.raises(ConfigError, match=f"cannot be compared: {message}"):
        against(system, str(recorded), **changes)


def test_an_original_of_another_shape_is_refused(system: Any, recorded: Path, tmp_path: Path) -> None:
    """Recorded, or named as a system: vectors of other lengths, or rows of the embedding for other tokens."""
    model, tokenizer = build_tiny("llama")
    model.resize_token_embeddings(system.num_embeddings + 8)
    model.save_pretrained(tmp_path / "wider")
    tokenizer.save_pretrained(tmp_path / "wider")
    size = system.num_embeddings
    with pytest.raises(ConfigError, match=rf"output_embedding \[{size + 8}, 32\], here \[{size}, 32\]"):
        against(system, str(tmp_path / "wider"))
    with pytest.raises(ConfigError, match=rf"output_embedding \[{size}, 32\], here \[{size + 8}, 32\]"):
        against(load_base(str(tmp_path / "wider")), str(recorded))


def test_an_original_of_an_earlier_version_is_refused(system: Any, recorded: Path) -> None:
    """By what settings it was taken is not known."""
    told = json.loads((recorded / "original.json").read_text())
    del told["settings"]
    (recorded / "original.json").write_text(json.dumps(told))
    with pytest.raises(ConfigError, match="top_k not recorded, here 20.*measured again"):
        against(system, str(recorded))
