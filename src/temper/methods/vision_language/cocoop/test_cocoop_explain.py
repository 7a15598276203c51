"""CoOp and CoCoOp in the report: words near the context, where scores come from, what a picture's shift changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from temper.core.types import Run
from temper.data.schemas import Data
from temper.data.worlds import load_world
from temper.methods.vision_language.cocoop.card import Config
from temper.methods.vision_language.cocoop.explain import nearest_words, shifts, token_maps
from temper.methods.vision_language.cocoop.figures import HEAT, MAPS, SHIFTS, WORDS, heated
from temper.methods.vision_language.cocoop.learner import LearnedPrompts, PromptLearner
from temper.methods.vision_language.cocoop.method import fit, measure
from temper.systems.dual_encoder import DualEncoder

NAMES = ("red star", "blue ring", "green bar")
SETTINGS = {"position": "end", "ending": "", "names": list(NAMES), "chunk_prompts": 2000}


def words(system: DualEncoder, text: str) -> torch.Tensor:
    return system.token_embeddings(torch.tensor(system.ids([text])[0][1:-1])).detach()


def moved(system: DualEncoder, scale: float = 1.0) -> DualEncoder:
    """A system whose prompts are shifted by each picture, by `scale` times what fresh weights say."""
    torch.manual_seed(0)
    learner = PromptLearner(words(system, "a photo of a"), 1, 16)
    assert learner.meta is not None
    with torch.no_grad():
        for parameter in learner.meta[2].parameters():
            parameter *= scale
    return system.with_(scorer=LearnedPrompts(learner, SETTINGS, "cocoop"))


def test_the_words_that_a_context_starts_from_are_nearest(system: DualEncoder) -> None:
    found = nearest_words(system, words(system, "a photo of a"))
    assert [row[0][0] for row in found] == ["a", "photo", "of", "a"]
    assert all(row[0][1] == pytest.approx(0, abs=1e-4) and row[1][1] < row[2][1] for row in found)
    table = system.token_embeddings(torch.arange(len(system.tokenizer)))
    special = table[torch.tensor(system.tokenizer.all_special_ids)].detach()
    assert all(row[0][1] > 0 for row in nearest_words(system, special)), "control tokens are no words"


def test_maps_are_attention_times_its_gradient(system: DualEncoder) -> None:
    """The same from the model's own eager attention, for two pictures and the zero-shot prompts."""
    pixels_BCHW, right = torch.rand(2, 3, 16, 16), [0, 2]
    found = token_maps(system, pixels_BCHW, right, NAMES)
    assert found.shape == (2, 2, 2)
    assert system.model.config._attn_implementation == "sdpa"
    system.model.set_attn_implementation("eager")
    seen = system.model.vision_model(pixel_values=(pixels_BCHW - 0.5) / 0.25, output_attentions=True)
    image_BE = F.normalize(system.model.visual_projection(seen.pooler_output), dim=-1)
    classes_CE = system.class_vectors(NAMES)
    scores_BC = image_BE @ classes_CE.T
    others = [
        int(row.index_fill(0, torch.tensor([y]), -9.0).argmax())
        for row, y in zip(scores_BC, right, strict=True)
    ]
    margin = sum(
        scores_BC[b, y] - scores_BC[b, other] for b, (y, other) in enumerate(zip(right, others, strict=True))
    )
    (slope,) = torch.autograd.grad(margin, [seen.attentions[-1]])  # type: ignore[list-item]
    by_hand = (slope * seen.attentions[-1]).clamp(min=0).mean(1)[:, 0, 1:].reshape(2, 2, 2)
    assert torch.allclose(found, by_hand, atol=1e-6)


def test_maps_leave_the_model_as_it_was(system: DualEncoder) -> None:
    pixels_BCHW = torch.rand(1, 3, 16, 16)
    before = system.image_vectors(pixels_BCHW)
    for parameter in system.model.parameters():
        parameter.requires_grad_(False)
    for changed in (system, moved(system)):
        assert token_maps(changed, pixels_BCHW, [1], NAMES).isfinite().all()
    with pytest.raises(IndexError):
        token_maps(system, pixels_BCHW, [7], NAMES)
    attention = system.model.vision_model.encoder.layers[-1].self_attn
    assert not attention._forward_hooks
    assert torch.equal(system.image_vectors(pixels_BCHW), before)


def test_what_a_shift_changes(system: DualEncoder) -> None:
    image_BE = F.normalize(torch.randn(3, 16), dim=-1)
    assert shifts(system, image_BE, [0, 1, 2], NAMES) == []
    changed = moved(system)
    found = shifts(changed, image_BE, [0, 1, 2], NAMES)
    scorer: Any = changed.scorer
    scores_BC = scorer.score(changed, image_BE, NAMES).softmax(1)
    assert [one.answer for one in found] == [NAMES[int(row.argmax())] for row in scores_BC]
    assert [one.probability for one in found] == pytest.approx(scores_BC.diagonal().tolist())
    learner = scorer.learner
    lengths = learner.meta(image_BE).norm(dim=1) / learner.context.norm(dim=1).mean()
    assert [one.length for one in found] == pytest.approx(lengths.tolist())
    shift_BD = learner.meta(image_BE) / learner.context.norm(dim=1).mean()
    assert [one.own for one in found] == pytest.approx((shift_BD - shift_BD.mean(0)).norm(dim=1).tolist())
    for one in shifts(moved(system, scale=0.0), image_BE, [0, 1, 2], NAMES):
        assert one.length == 0
        assert one.probability == pytest.approx(one.probability_without)


def test_heat_lies_where_the_map_is_high() -> None:
    picture = np.full((16, 16, 3), 200, np.uint8)
    hot = heated(picture, np.array([[1.0, 0.0], [0.0, 0.0]]))
    assert hot.shape == (16, 16, 3)
    far = np.linalg.norm(hot.astype(float) - HEAT, axis=2)
    assert far[1, 1] < 80 < far[14, 14]
    assert (heated(picture, np.zeros((2, 2))) == 200).all(), "nothing to show leaves the grey"


@pytest.mark.parametrize(("kind", "per_class"), [("cocoop", False), ("coop", False), ("coop", True)])
def test_runs_leave_maps_and_tables(system: DualEncoder, tmp_path: Path, kind: Any, per_class: bool) -> None:
    protocol: Any = "all" if per_class else "base-to-new"
    config = Config(
        kind=kind, per_class=per_class, protocol=protocol, shots=2, num_epochs=1, batch_rows=4, ending="", augment=False, label="here",
    )  # fmt: skip
    data = Data({part: load_world(f"captions:DOM32:flat:{part}", 20)[part] for part in ("train", "test")})
    run = Run(folder=tmp_path)
    artefact = fit(system, data, config, run)
    with artefact.apply(system) as changed:
        list(measure(changed, data, config, run))
    figures = json.loads((tmp_path / "figures.json").read_text())
    table = figures["tables"][WORDS]
    assert len(table["rows"]) == (16 if per_class else 4)
    assert all(len(row) == len(table["columns"]) == 4 for row in table["rows"])
    groups = ["All classes"] if per_class else ["Base classes", "New classes"]
    assert list(figures["grids"][f"{MAPS} (here)"]) == groups
    shifted = [title for title in figures["tables"] if title.startswith(SHIFTS)]
    assert len(shifted) == (2 if kind == "cocoop" else 0)


def test_without_a_folder_nothing_is_drawn(system: DualEncoder) -> None:
    data = Data({"test": load_world("captions:DOM32:flat:test", 20)["test"]})
    rows = list(measure(system, data, Config(ending="", augment=False), Run()))
    assert rows[0].metric == "accuracy_base"
