"""CoOp and CoCoOp: prompts equal to words, the shift of every context vector, protocols by hand, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from temper.artefacts import load_artefact
from temper.core.errors import ConfigError, DataError
from temper.core.types import Run
from temper.data.schemas import Data
from temper.methods.vision_language.cocoop.conftest import quick, shapes
from temper.methods.vision_language.cocoop.learner import (
    FewShot,
    LearnedPrompts,
    PromptLearner,
    PromptObjective,
    augment,
    start_learner,
)
from temper.methods.vision_language.cocoop.method import fit, learn, measure
from temper.methods.vision_language.cocoop.prompts import build_prompts, fill, readable
from temper.methods.vision_language.cocoop.protocols import class_names, draw_shots
from temper.systems.dual_encoder import DualEncoder

NAMES = ("red star", "blue ring", "small orange bar")
WORDS = "a photo of a"


def word_context(system: DualEncoder, words: str = WORDS) -> torch.Tensor:
    return system.token_embeddings(torch.tensor(system.ids([words])[0][1:-1])).detach()


# ---- prompts


@pytest.mark.parametrize("ending", ["", "."])
def test_words_as_context_give_the_ordinary_model(system: DualEncoder, ending: str) -> None:
    """With V the embeddings of real words, scores are those of transformers' own forward pass."""
    prompts = build_prompts(system, NAMES, 4, "end", ending)
    pixels_BCHW = torch.rand(2, 3, 16, 16)
    texts = system.token_rows([f"{WORDS} {name}{ending}" for name in NAMES])
    with torch.no_grad():
        ours_BC = system.logits(
            system.image_vectors(pixels_BCHW),
            PromptLearner(word_context(system)).class_vectors(system, prompts, torch.empty(0)),
        )
        ordinary = system.model(
            input_ids=texts.ids_BT,
            attention_mask=(texts.ids_BT != 0).long(),
            pixel_values=(pixels_BCHW - 0.5) / 0.25,
        )
    assert torch.allclose(ours_BC, ordinary.logits_per_image, atol=1e-4)


@pytest.mark.parametrize(
    ("position", "text"),
    [
        ("end", "a photo of a red star"),
        ("middle", "a photo red star of a"),
        ("front", "red star a photo of a"),
    ],
)
def test_the_class_name_stands_where_it_is_put(system: DualEncoder, position: Any, text: str) -> None:
    prompts = build_prompts(system, ("red star", "ring"), 4, position, ".")
    rows_CTD = fill(prompts, word_context(system))
    wanted = system.token_rows([f"{text}."])
    assert torch.equal(rows_CTD[0], system.token_embeddings(wanted.ids_BT)[0])
    assert prompts.end_C[0] == wanted.end_B[0]
    assert prompts.end_C[1] == wanted.end_B[0] - 1, "a shorter name ends earlier"


def test_an_odd_context_in_the_middle(system: DualEncoder) -> None:
    prompts = build_prompts(system, ("red star", "ring"), 3, "middle", "")
    assert prompts.places_CM.tolist() == [[1, 4, 5], [1, 3, 4]]


def test_departure_1_no_placeholder_stands_in_a_text(system: DualEncoder) -> None:
    """The tiny tokenizer has no word "x", which would be the placeholder; prompts are built all the same."""
    with pytest.raises(DataError, match="'x' is not among"):
        system.ids(["x x x x red star"])
    assert build_prompts(system, NAMES, 16, "end", "").places_CM.shape == (3, 16)


def test_departure_2_the_end_is_not_the_largest_id(system: DualEncoder) -> None:
    (row,) = system.ids(["red star"])
    assert max(row) != system.end_id
    prompts = build_prompts(system, NAMES, 2, "end", "")
    assert prompts.end_C.tolist() == [5, 5, 6]


def test_names_are_read_as_words() -> None:
    assert readable("forest_path_") == "forest path"


def test_a_name_that_does_not_fit_is_named(system: DualEncoder) -> None:
    with pytest.raises(DataError, match=r"33 tokens and tiny:clip reads 32.*class 'red red.*16 context"):
        build_prompts(system, ("star", "red " * 15), 16, "end", "")


# ---- CoCoOp


def test_every_context_vector_moves_by_the_same_shift(system: DualEncoder) -> None:
    learner = PromptLearner(torch.randn(4, 32), 1, 16)
    prompts = build_prompts(system, NAMES, 4, "end", "")
    image_BE = F.normalize(torch.randn(2, 16), dim=-1)
    found_BCE = learner.class_vectors(system, prompts, image_BE)
    assert learner.meta is not None
    first, second = learner.meta[0], learner.meta[2]
    for number, image_E in enumerate(image_BE):
        shift_D = second.weight @ torch.relu(first.weight @ image_E + first.bias) + second.bias
        alone = PromptLearner(learner.context.detach() + shift_D)
        by_hand_CE = alone.class_vectors(system, prompts, image_BE)
        assert torch.allclose(found_BCE[number], by_hand_CE, atol=1e-5)


def test_a_meta_net_of_zeros_is_coop(system: DualEncoder) -> None:
    learner = PromptLearner(word_context(system), 1, 16)
    assert learner.meta is not None
    for parameter in learner.meta[2].parameters():
        torch.nn.init.zeros_(parameter)
    prompts = build_prompts(system, NAMES, 4, "end", "")
    image_BE = F.normalize(torch.randn(2, 16), dim=-1)
    static = PromptLearner(word_context(system)).class_vectors(system, prompts, image_BE)
    moved = learner.class_vectors(system, prompts, image_BE)
    assert torch.allclose(moved, static.expand(2, -1, -1), atol=1e-6)


def test_departure_4_batches_and_chunks_change_nothing(system: DualEncoder) -> None:
    learner = start_learner(system, 3, quick(), 0)
    settings = {"position": "end", "ending": "", "names": list(NAMES), "chunk_prompts": 2000}
    image_BE = F.normalize(torch.randn(5, 16), dim=-1)
    whole = LearnedPrompts(learner, settings, "cocoop").score(system, image_BE, NAMES)
    parts = LearnedPrompts(learner, settings | {"chunk_prompts": 6}, "cocoop").score(system, image_BE, NAMES)
    assert torch.allclose(whole, parts, atol=1e-5)
    data, results = shapes(), []
    for budget in (1, 100_000):
        results.append(fit(system, data, quick(), Run(batch_tokens=budget)).tensors)
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], atol=1e-5), name


def test_loss_by_hand(system: DualEncoder) -> None:
    learner = PromptLearner(word_context(system))
    prompts = build_prompts(system, NAMES, 4, "end", "")
    image_NE = F.normalize(torch.randn(3, 16), dim=-1)
    shots = FewShot(image_NE, None, torch.tensor([0, 2, 1]))
    found = PromptObjective(system, prompts, shots)(learner, [0, 1])["nll"]
    scores = (system.logit_scale * image_NE @ learner.class_vectors(system, prompts, image_NE).T).softmax(1)
    assert found.total.item() == pytest.approx(-(scores[0, 0].log() + scores[1, 2].log()).item(), rel=1e-5)
    assert found.count == 2


def test_trained_parameter_counts(system: DualEncoder) -> None:
    width, common = 32, 16
    meta = common * 1 + 1 + 1 * width + width
    assert start_learner(system, 5, quick(kind="coop"), 0).num_parameters == 4 * width
    assert start_learner(system, 5, quick(), 0).num_parameters == 4 * width + meta
    per_class = start_learner(system, 5, quick(kind="coop", per_class=True, init_words="", num_context=2), 0)
    assert per_class.num_parameters == 5 * 2 * width


def test_first_context(system: DualEncoder) -> None:
    assert torch.equal(start_learner(system, 3, quick(), 0).context, word_context(system))
    drawn = [
        start_learner(system, 3, quick(init_words="", num_context=64), seed).context for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].std().item() == pytest.approx(0.02, rel=0.1)


# ---- training


@pytest.mark.parametrize("kind", ["coop", "cocoop"])
@pytest.mark.parametrize("augmented", [True, False])
def test_fit_learns_and_leaves_the_model_alone(system: DualEncoder, kind: Any, augmented: bool) -> None:
    before = {name: value.clone() for name, value in system.model.state_dict().items()}
    config = quick(kind=kind, protocol="all", num_epochs=20, augment=augmented, lr=0.2)
    names = class_names(shapes()["train"])  # type: ignore[arg-type]
    rows = draw_shots(shapes()["train"], names, 2, 0)  # type: ignore[arg-type]
    log = learn(system, start_learner(system, len(names), config, 0), rows, names, config, Run())
    assert np.mean(log.loss[-5:]) < np.mean(log.loss[:5])
    artefact = fit(system, shapes(), config, Run())
    assert set(artefact.tensors) == {"context"} | (
        {f"meta.{at}.{part}" for at in (0, 2) for part in ("weight", "bias")} if kind == "cocoop" else set()
    )
    assert all(torch.equal(value, before[name]) for name, value in system.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in system.model.parameters())


def test_the_frozen_model_collects_no_gradient(system: DualEncoder) -> None:
    fit(system, shapes(), quick(), Run())
    assert all(parameter.grad is None for parameter in system.model.parameters())


def test_departure_3_learning_rate(system: DualEncoder) -> None:
    names = class_names(shapes()["train"])  # type: ignore[arg-type]
    config = quick(protocol="all", num_epochs=4, batch_rows=5)
    rows = draw_shots(shapes()["train"], names, 2, 0)  # type: ignore[arg-type]
    log = learn(system, start_learner(system, len(names), config, 0), rows, names, config, Run())
    assert log.num_steps == 16
    assert log.lr[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert log.lr[4:] == pytest.approx([0.05 * (1 + np.cos(np.pi * step / 12)) for step in range(12)])


def test_departure_5_bf16_is_autocast(system: DualEncoder) -> None:
    data, config = shapes(part="test"), quick(protocol="all")
    full, half = (
        fit(system, Data({"train": data["test"]}), config, Run(precision=p)) for p in ("float32", "bf16")
    )
    assert half.tensors["context"].dtype == torch.float32
    assert torch.allclose(full.tensors["context"], half.tensors["context"], atol=0.05)
    assert not torch.equal(full.tensors["context"], half.tensors["context"])


def test_scaled_cosines_are_never_rounded_to_bf16(system: DualEncoder) -> None:
    """A cosine in bf16 has three digits; times the logit scale that would be a tenth of a nat."""
    image_BE, class_BCE = (F.normalize(torch.randn(*shape), dim=-1) for shape in ((4, 16), (4, 3, 16)))
    for classes in (class_BCE, class_BCE[0]):
        full = system.logits(image_BE, classes)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = system.logits(image_BE, classes)
        assert half.dtype == torch.float32
        assert torch.equal(full, half)


def test_departure_6_rows_end_behind_the_longest_prompt(system: DualEncoder) -> None:
    prompts = build_prompts(system, NAMES, 4, "end", "")
    assert prompts.embeddings_CTD.shape[1] == prompts.end_C.max() + 1 == 9


def test_departure_7_vectors_are_taken_once_or_drawn_anew(system: DualEncoder) -> None:
    torch.manual_seed(0)
    pixels_BCHW = torch.rand(2, 3, 16, 16)
    looks = [augment(pixels_BCHW) for _ in range(2)]
    assert looks[0].shape == pixels_BCHW.shape
    assert not torch.allclose(looks[0], looks[1])
    assert (looks[0].min() >= 0) & (looks[0].max() <= 1)
    once, anew = (fit(system, shapes(), quick(augment=on), Run()) for on in (False, True))
    striped = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])
    assert torch.allclose(augment(striped), striped, atol=1e-5), (
        "nothing comes from outside the picture or from another one"
    )
    assert not torch.allclose(once.tensors["context"], anew.tensors["context"], atol=1e-7)
    again = fit(system, shapes(), quick(augment=True), Run())
    assert torch.equal(anew.tensors["context"], again.tensors["context"])


def test_an_artefact_serves_names_it_never_saw(system: DualEncoder, tmp_path: Path) -> None:
    artefact = fit(system, shapes(), quick(kind="coop"), Run())
    artefact.save(tmp_path / "prompts")
    pixels_BCHW = torch.rand(2, 3, 16, 16)
    with load_artefact(tmp_path / "prompts").apply(system) as changed:
        scores_BC = changed.class_logits(pixels_BCHW, ["purple heart", "green ring"])
    prompts = build_prompts(system, ["purple heart", "green ring"], 4, "end", "")
    by_hand = PromptLearner(artefact.tensors["context"]).class_vectors(system, prompts, torch.empty(0))
    assert torch.allclose(scores_BC, system.logits(system.image_vectors(pixels_BCHW), by_hand), atol=1e-5)


def test_contexts_of_one_set_a_class_know_only_their_own(system: DualEncoder) -> None:
    config = quick(kind="coop", per_class=True, protocol="all")
    artefact = fit(system, shapes(), config, Run())
    with artefact.apply(system) as changed:
        rows = list(measure(changed, shapes(part="test"), config, Run()))
        assert rows[0].metric == "accuracy"
        with pytest.raises(ConfigError, match=r"know only the classes.*per_class: false"):
            changed.class_logits(torch.rand(1, 3, 16, 16), ["red star", "ring"])


def test_strength_is_refused(system: DualEncoder) -> None:
    artefact = fit(system, shapes(), quick(), Run())
    with pytest.raises(ConfigError, match="no strength"), artefact.apply(system, 0.5):
        pass
