"""ConceptVectors by hand: the measures, finding vectors, Needle, every departure."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from temper.core.errors import ConfigError, DataError
from temper.core.types import Message, Run
from temper.data.loading import load_data
from temper.data.schemas import Data, Dialogue, Text
from temper.methods.unlearning.concept_vectors import intrinsic, method, mining, needle
from temper.methods.unlearning.concept_vectors.card import Config
from temper.methods.unlearning.concept_vectors.items import paragraphs, read_items
from temper.methods.unlearning.concept_vectors.method import fit, make
from temper.methods.unlearning.concept_vectors.original import places_of
from temper.ops.batching import Example
from temper.ops.generate import prompt_ids
from temper.ops.logprobs import response_logprobs
from temper.ops.value_vectors import Place, down_projection, output_embedding, replaced, vectors_at
from temper.systems.loading import load_base

TINY = Config(num_candidates=3, probe_tokens=3, reply_tokens=3, num_questions=2)


@pytest.fixture(scope="module")
def system() -> Any:
    return load_base("tiny:llama")


@pytest.fixture(scope="module")
def people() -> Data:
    parts = dict.fromkeys(("forget", "retain", "world_facts"), "Dialogue")
    return load_data("builtin:people", parts, limit=16)


@pytest.fixture(scope="module")
def mined(system: Any, people: Data) -> Data:
    return make(system, people, TINY, Run())


# ---- the measures


def test_vector_measures_by_hand() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
    assert intrinsic.cosine(a, b) == pytest.approx(24 / 25)
    ones = torch.full((577,), 0.1)
    assert intrinsic.cosine(ones, ones) <= 1, "capped"
    assert intrinsic.cosine(a, -a) == pytest.approx(-1)
    assert intrinsic.drift_of(torch.eye(2), 2 * torch.eye(2)) == pytest.approx(1)


def test_token_measures_by_hand() -> None:
    before, after, lexicon = {1, 2, 3, 4}, {3, 4, 5, 6}, {2, 3, 5, 6, 9}
    assert intrinsic.jaccard(before, after) == pytest.approx(2 / 6)
    # {2, 3} of the concept's words before, {3, 5, 6} after; of the two before, one is left.
    assert intrinsic.preciser_ratio(before, after, lexicon) == pytest.approx(3 / 2)
    assert intrinsic.related_tokens_rate(before, after, lexicon) == pytest.approx(1 / 2)
    assert intrinsic.preciser_ratio(before, after, {9}) is None
    assert intrinsic.related_tokens_rate(before, after, set()) is None


# ---- finding


def test_the_weakest_share_of_a_layer_is_dropped() -> None:
    strength = torch.tensor([5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    assert mining.is_strong(strength, 0.3).tolist() == [True, False, False, False] + [True] * 6
    assert mining.is_strong(strength, 0.0).all()


def test_departure_3_candidates_by_hand(system: Any) -> None:
    """All vectors projected and sorted the slow way: most of the concept's ids among the top ones, the weak left out."""
    mask = torch.zeros(len(output_embedding(system.model)), dtype=torch.bool)
    mask[40:120] = True
    config = Config(num_candidates=5, top_k=30, weak_share=0.5)
    (found,) = mining.rank(system, [mask], config, Run())
    slow = []
    for layer in range(2):
        logits = down_projection(system.model, layer).columns().T @ output_embedding(system.model).T
        values, ids = logits.sort(1, descending=True)
        strength = values[:, :30].mean(1)
        slow += [
            (-int(mask[ids[dim, :30]].sum()), -float(strength[dim]), (layer, dim))
            for dim in range(len(logits))
            if strength[dim] >= strength.quantile(0.5)
        ]
    assert [tuple(c.place) for c in found] == [place for _, _, place in sorted(slow)[:5]]
    assert [c.overlap for c in found] == [-count for count, _, _ in sorted(slow)[:5]]
    (one,) = mining.rank(system, [mask], Config(num_candidates=5, layers=(1,)), Run())
    assert {c.place.layer for c in one} == {1}


def test_departure_4_words_without_case_blanks_and_stop_words(system: Any) -> None:
    words = mining.vocabulary_words(system)
    assert len(words) == len(output_embedding(system.model))
    mask = mining.lexicon_mask(system, words, "The garden and the GARDEN. It was 1990 !")
    found = {words[token] for token in mask.nonzero()[:, 0].tolist()}
    assert not found & {"the", "and", "it", "was", "1990", "!", "g", ""}
    both = [token for token, word in enumerate(words) if word == "the"]
    assert len(both) > 1, "with and without a blank before it"
    assert not mask[both].any()
    told = mining.lexicon_mask(system, words, "a small boat in the garden")
    kept = {words[token] for token in told.nonzero()[:, 0].tolist()}
    assert kept
    assert told.tolist() == [word in kept for word in words], "every spelling of a word counts"


def test_departure_2_what_own_answers_lose(system: Any, people: Data) -> None:
    items = read_items(make(system, people, TINY, Run()).records("items", Text))
    item, config = items[0], TINY
    rows = mining.own_answers(system, item.probes.target, 3, Run())
    alone = [prompt_ids(system, question) for question in item.probes.target]
    assert [row.ids[: len(ids)] for row, ids in zip(rows, alone, strict=True)] == alone
    assert all(sum(row.scored) == len(row.ids) - len(ids) for row, ids in zip(rows, alone, strict=True))
    place = Place(1, 9)
    (tested,) = mining._validated(system, item, [mining.Candidate(place, 0, 0.0)], config, Run())
    before = response_logprobs(system, rows, reduce="mean", run=Run())
    with replaced(system.model, [place], torch.zeros(1, 32)):
        after = response_logprobs(system, rows, reduce="mean", run=Run())
    assert tested.target_drop == pytest.approx(float((before - after).mean()), abs=1e-6)
    assert tested.selectivity == tested.target_drop - abs(tested.unrelated_drop)
    noisy = Config(**{**vars(TINY), "validate_by": "noise"})
    (first,) = mining._validated(system, item, [mining.Candidate(place, 0, 0.0)], noisy, Run())
    (again,) = mining._validated(system, item, [mining.Candidate(place, 0, 0.0)], noisy, Run())
    assert first == again, "no noise is left behind (Departure 5)"
    assert first.target_drop != tested.target_drop


def test_no_clear_vector_is_said(system: Any, people: Data, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING")
    make(system, people, Config(num_candidates=1, probe_tokens=1, top_k=1), Run())
    assert "spread over many" in caplog.text


def test_a_control_has_about_the_same_norm(system: Any) -> None:
    norms = down_projection(system.model, 0).columns().norm(dim=0)
    place = Place(0, 5)
    taken = [Place(0, int(dim)) for dim in (norms - norms[5]).abs().argsort()[:20]]
    drawn = {mining.control_for(system.model, place, taken, seed) for seed in range(20)}
    assert len(drawn) > 5
    assert not drawn & set(taken)
    assert all(p.layer == 0 for p in drawn)
    like = (norms - norms[5]).abs().sort().values[52]
    assert all(abs(norms[p.dim] - norms[5]) <= like for p in drawn), "of the 32 nearest that are free"
    assert mining.control_for(system.model, place, taken, 3) == mining.control_for(
        system.model, place, taken, 3
    )


def test_made_items_name_a_vector_a_control_and_both_halves(mined: Data, people: Data) -> None:
    assert set(mined) == {"items", "forget", "retain"}
    for item in read_items(mined.records("items", Text)):
        assert item.place is not None
        assert item.control not in (None, item.place)
        assert not set(item.asked.target) & set(item.probes.target), (
            "what chose the vector does not measure it"
        )
        assert not set(item.asked.unrelated) & set(item.probes.unrelated)
        candidates = item.record.extra["Candidates"]
        gains = [c["Target_drop"] - abs(c["Unrelated_drop"]) for c in candidates]
        assert gains == pytest.approx(sorted(gains, reverse=True), abs=1e-4)
        assert (candidates[0]["Layer"], candidates[0]["Dim"]) == tuple(item.place)
    assert mined["retain"] == people["retain"]


def test_a_row_that_names_a_vector_keeps_it(system: Any) -> None:
    given = [
        Text(f"{name} lies by the sea.\nIt has a lighthouse.", extra={"Concept": name, "QA": [f"Where is {name}?"], "Layer": 1, "Dim": dim})
        for dim, name in enumerate(("Velmora", "Ostrel"))
    ]  # fmt: skip
    config = Config(concepts=("Velmora",))
    made = make(system, Data({"items": given}), config, Run())
    (item,) = read_items(made.records("items", Text))
    assert item.place == (1, 0)
    assert "Candidates" not in item.record.extra
    assert item.asked.unrelated == ("Where is Ostrel?",), "drawn of a row that is not there any more"
    assert fit(system, made, Config(noise=1.0), Run()).base == system.fingerprint
    assert [row.reply for row in made["retain"]] == ["Ostrel lies by the sea.", "It has a lighthouse."]  # type: ignore[attr-defined]


def test_a_control_is_no_other_items_vector_or_control(system: Any) -> None:
    """Concepts whose vectors are the 20 columns nearest in norm to one, two that share one, and a control that is given."""
    norms = down_projection(system.model, 0).columns().norm(dim=0)
    *dims, free = (norms - norms[5]).abs().argsort()[:21].tolist()
    extras: list[dict[str, Any]] = [
        {"Concept": f"C{n}", "QA": [f"Q{n}?"], "unrelated_QA": ["U?"], "Layer": 0, "Dim": dim}
        for n, dim in enumerate([*dims, dims[0]])
    ]
    extras[-1]["Control"] = {"Layer": 0, "Dim": free}
    given = [Text("A page.", extra=extra) for extra in extras]
    items = read_items(make(system, Data({"items": given}), Config(), Run()).records("items", Text))
    controls = [item.control for item in items]
    assert len(set(controls)) == 21
    assert not set(controls) & {item.place for item in items}


def test_departure_8_pages_become_answers(mined: Data) -> None:
    (item, *_) = read_items(mined.records("items", Text))
    rows = paragraphs(item)
    assert [row.reply for row in rows] == item.text.split("\n")
    assert rows[0].messages[0] == Message("user", f"Tell me about {item.concept}.")


# ---- Needle


def test_departure_5_noise_is_as_long_as_so_many_norms() -> None:
    vector = torch.tensor([3.0, 4.0, 0.0, 0.0])
    assert needle.noise_sigma(vector, 2.0, "norm") == pytest.approx(2 * 5 / 2)
    assert needle.noise_sigma(vector, 0.1, "coordinate") == 0.1
    vectors = torch.randn(50, 400, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 51)[:, None]
    change = needle.noised(vectors, 2.0, "norm", 7) - vectors
    assert torch.allclose(change.norm(dim=1) / vectors.norm(dim=1), torch.tensor(2.0), rtol=0.15)
    flat = needle.noised(vectors, 0.1, "coordinate", 7) - vectors
    assert float(flat.std()) == pytest.approx(0.1, rel=0.02)
    assert torch.equal(needle.noised(vectors, 2.0, "norm", 7), needle.noised(vectors, 2.0, "norm", 7))
    assert math.isclose(float(needle.noised(vectors, 0.0, "norm", 7).sub(vectors).abs().max()), 0)


@pytest.mark.parametrize("name", ["tiny:llama", "tiny:gpt2"])
def test_needle_changes_its_columns_and_nothing_else(name: str, mined: Data) -> None:
    system = load_base(name)
    rows = [
        Text(
            r.text,
            id=r.id,
            extra={**r.extra, "Dim": 7 + n, "Layer": 1, "Control": {"Layer": 0, "Dim": 3 + n}},
        )
        for n, r in enumerate(mined.records("items", Text))
    ]
    data = Data({"items": rows, "forget": mined["forget"]})
    for control, layer, dims in ((False, 1, {7, 8}), (True, 0, {3, 4})):
        for epochs in (0.0, 2.0):
            config = Config(control=control, num_epochs=epochs, batch_rows=4, noise=1.0)
            old = down_projection(system.model, layer).columns().clone()
            with fit(system, data, config, Run()).apply(system) as changed:
                new = down_projection(changed.model, layer).columns()
                moved = (new != old).any(0).nonzero()[:, 0].tolist()
                other = down_projection(changed.model, 1 - layer).columns().clone()
            assert set(moved) == dims, "not even decay touches another column (Departure 6)"
            assert torch.equal(other, down_projection(system.model, 1 - layer).columns())


def test_departure_6_what_has_no_gradient_does_not_shrink(
    system: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masked training with AdamW's usual decay would pull the vector towards 0."""
    whole = needle.Ascent.__call__

    def flat(self: Any, model: Any, items: Any) -> Any:
        return {name: term._replace(total=term.total * 0) for name, term in whole(self, model, items).items()}

    monkeypatch.setattr(needle.Ascent, "__call__", flat)
    start = vectors_at(system.model, [Place(0, 1)])
    rows = [Example([5, 6, 7, 8], [False, True, True, True])]
    got = needle.optimised(system, [Place(0, 1)], start, rows, Config(num_epochs=3, lr=0.5), Run())
    assert torch.equal(got, start)


def test_optimising_makes_the_text_less_likely(system: Any) -> None:
    rows = [Example([5, 6, 7, 8, 9, 10], [False] + [True] * 5)]
    places = [Place(0, 1), Place(1, 2)]
    start = vectors_at(system.model, places)
    got = needle.optimised(system, places, start, rows, Config(num_epochs=5, lr=0.3), Run())
    before = response_logprobs(system, rows, run=Run())
    with replaced(system.model, places, got):
        after = response_logprobs(system, rows, run=Run())
    assert after < before
    assert not any(module._forward_hooks for module in system.model.modules())


def test_needle_stopped_as_diverged_says_so(system: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [Example([5, 6, 7, 8, 9, 10], [False] + [True] * 5)]
    start = vectors_at(system.model, [Place(0, 1)])
    needle.optimised(system, [Place(0, 1)], start, rows, Config(num_epochs=9, max_forget_nll=0.1), Run())
    assert "stopped as diverged at step 1:" in caplog.text
    assert "more than max_forget_nll=0.1" in caplog.text


def test_needle_forgets_the_chosen_concepts_alone(
    system: Any, mined: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def count(system: Any, places: Any, start_PD: Any, rows: Any, config: Any, run: Any) -> Any:
        seen.append(len(rows))
        return start_PD

    monkeypatch.setattr(method, "optimised", count)
    names = [item.concept for item in read_items(mined.records("items", Text))]
    assert len(names) == 2
    free = Dialogue((Message("user", "Hm?"), Message("assistant", "Hm.")))
    forget = (*mined.records("forget", Dialogue), free)
    data = mined.with_part("forget", forget)
    for concepts in ((), tuple(names), (names[1],)):
        fit(system, data, Config(concepts=concepts, num_epochs=1.0), Run())
    about = [row for row in forget if row.extra.get("subject") == names[1]]
    assert 0 < len(about) < len(forget) - 1
    assert seen == [len(forget), len(forget), len(about) + 1], "a row that names no subject counts"
    with pytest.raises(DataError, match="no text to forget"):
        fit(system, mined.with_part("forget", about), Config(concepts=(names[0],), num_epochs=1.0), Run())


def test_needle_refuses_to_do_nothing_and_to_go_without(system: Any, mined: Data) -> None:
    with pytest.raises(ConfigError, match="changes nothing"):
        fit(system, mined, Config(noise=0.0), Run())
    with pytest.raises(DataError, match="no text to forget"):
        fit(system, Data({"items": mined["items"]}), Config(num_epochs=1.0), Run())
    bare = [Text("A page.", id="x", extra={"Concept": "X", "QA": ["Q?"], "unrelated_QA": ["U?"]})]
    with pytest.raises(DataError, match="names no vector.*'X'"):
        fit(system, Data({"items": bare}), Config(), Run())
    with pytest.raises(DataError, match="Control is missing"):
        places_of(read_items(bare), control=True)
    for wrong in ({"top_k": 0}, {"weak_share": 1.0}, {"noise": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Config(**wrong)  # type: ignore[arg-type]
    assert isinstance(mined["forget"][0], Dialogue)
