"""STAR and ADORE by hand, every departure, what is bad input, and the result in sentence-transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from temper.core.errors import ConfigError, DataError
from temper.core.types import Run
from temper.data.retrieval import corpus_of, questions_of
from temper.data.schemas import Data, Ranking, Text
from temper.methods.retrieval.star_adore.card import STAGES, Config
from temper.methods.retrieval.star_adore.conftest import PAIRS, items_of, pairs, quick
from temper.methods.retrieval.star_adore.losses import lambda_rank_loss, rank_values
from temper.methods.retrieval.star_adore.method import fit
from temper.methods.retrieval.star_adore.training import (
    AdoreObjective,
    Asked,
    Query,
    hard_negatives,
    live_lists,
    ranked_lists,
    reset_last_layers,
    scale_of,
    star_items,
    train_settings,
)
from temper.ops.contrast import ContrastObjective, pairwise_loss
from temper.ops.corpus_index import index_corpus
from temper.ops.embed import vectors
from temper.ops.objectives import SumCount
from temper.systems.sentence_layout import Layout

# ---- the maths


def star(query_BD: Any, positive_BD: Any, hard_BD: Any, counts_BK: Any) -> float:
    scores_BK = query_BD @ torch.cat([positive_BD, hard_BD]).T
    found = pairwise_loss(scores_BK, torch.arange(len(query_BD)), counts_BK)
    return float(found.total / found.count)


def test_star_by_hand() -> None:
    eye = torch.eye(2)
    everything = torch.ones(2, 4, dtype=torch.bool)
    by_hand = (
        2 * math.log(1 + math.exp(-1)) + 2 * math.log(1 + math.exp(-0.5)) + 2 * math.log(1 + math.exp(-1))
    ) / 6
    assert star(eye, eye, 0.5 * eye, everything) == pytest.approx(by_hand)
    assert by_hand == pytest.approx(0.366867, abs=1e-6)


def test_a_false_negative_in_the_batch_changes_nothing(system: Any) -> None:
    """Query 0 knows document 1, which is query 1's positive and query 0's own hard negative's neighbour."""
    ids = system.ids([text for pair in PAIRS for text in pair])
    documents = ids[1::2]
    asked = Asked(ids[0::2][:2], [(0, 1), (1,)], [[2], [2]], 6, lambda places: [documents[p] for p in places])

    def gradient(**masked: Any) -> Any:
        items = [
            item._replace(candidates=(item.candidates[0],), names=(item.names[0],))
            for item in star_items(asked, Config(), 3, 0)
        ]
        items[0] = items[0]._replace(candidates=(documents[0],), names=("0",), **masked)
        objective = ContrastObjective(system, cosine=False, loss=pairwise_loss, per="pair")
        loss = objective(system.model, items)["contrast"]
        return objective.counts(items), loss

    counts, loss = gradient()
    assert counts == {"contrast": 1.0}, "of the two pairs of two queries one is masked"
    more_counts, more = gradient(relevant=frozenset({"0"}))
    assert more_counts == {"contrast": 2.0}
    assert more.total > loss.total


@pytest.mark.parametrize(("relevant", "cut", "value"), [([0, 1, 0], 200, 0.354421), ([0, 0, 1], 2, 1.391779)])
def test_adore_by_hand(relevant: list[int], cut: int, value: float) -> None:
    scores_BM = torch.tensor([[3.0, 2.0, 1.0]])
    everything = torch.ones(1, 3, dtype=torch.bool)
    found = lambda_rank_loss(scores_BM, torch.tensor([relevant]).bool(), everything, cut)
    assert found.item() == pytest.approx(value, abs=1e-6)


def test_departure_3_pairs_once_is_pairs_twice_over_2n() -> None:
    torch.manual_seed(0)
    scores, relevant = torch.randn(7), torch.tensor([0, 1, 0, 0, 1, 0, 0]).bool()
    value = rank_values(7, 5)
    total = 0.0
    for i in range(7):
        for j in range(7):
            if relevant[i] != relevant[j]:
                better, worse = (i, j) if relevant[i] else (j, i)
                total += float((value[i] - value[j]).abs()) * math.log(
                    1 + math.exp(float(scores[worse] - scores[better]))
                )
    expected = total / (2 * 2 * 5)
    found = lambda_rank_loss(scores[None], relevant[None], torch.ones(1, 7, dtype=torch.bool), 5)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_departure_2_the_cut_is_top_k_and_a_cut_of_nothing_is_zero() -> None:
    assert rank_values(4, 2).tolist() == [1, 0.5, 0, 0]
    scores, everything = torch.randn(1, 3), torch.ones(1, 3, dtype=torch.bool)
    relevant = torch.tensor([[False, True, False]])
    assert lambda_rank_loss(scores, relevant, everything, 0).item() == 0, "what the released default does"
    assert Config().metric_cut == 0
    # With a cut of 2 a relevant document behind both has a = 0: the weight is 1/r of the other.
    late = lambda_rank_loss(torch.zeros(1, 3), torch.tensor([[False, False, True]]), everything, 2)
    assert late.item() == pytest.approx((1 + 0.5) * math.log(2) / 2)


def test_padding_and_other_queries_change_nothing() -> None:
    lists = [[3, 1, 2], [0, 4], [5, 6, 7, 8]]
    known = [(1,), (4,), (7, 8)]
    place_BM, relevant_BM, real_BM = ranked_lists(lists, known)
    assert real_BM.sum(1).tolist() == [3, 2, 4]
    scores_BM = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    together = lambda_rank_loss(scores_BM, relevant_BM, real_BM, 4)
    for row, length in enumerate([3, 2, 4]):
        alone = lambda_rank_loss(
            scores_BM[row : row + 1, :length],
            relevant_BM[row : row + 1, :length],
            real_BM[row : row + 1, :length],
            4,
        )
        assert together[row].item() == pytest.approx(alone.item(), rel=1e-5)
    assert place_BM[1].tolist() == [0, 4, 0, 0]
    assert relevant_BM[1].tolist() == [False, True, False, False]


def test_relevant_documents_follow_where_none_was_found() -> None:
    found_BK = torch.tensor([[4, 2], [1, 3]])
    assert live_lists(found_BK, [(0, 5), (3, 9)]) == [[4, 2, 0, 5], [1, 3]]


def test_adore_searches_what_the_query_is_now(system: Any) -> None:
    texts = [text for _, text in PAIRS]
    index = index_corpus(system, texts, Run())
    items = [Query(ids, (place,)) for place, ids in enumerate(system.ids([query for query, _ in PAIRS]))]
    objective = AdoreObjective(system, index, 3, 3, 1.0, Run())
    assert objective.counts(items) == {"lambda_rank": 6.0}
    whole = objective(system.model, items)["lambda_rank"]
    parts = [objective(system.model, [item])["lambda_rank"] for item in items]
    assert whole.total.item() == pytest.approx(sum(part.total.item() for part in parts), rel=1e-5)
    with torch.no_grad():
        query_BD = vectors(system, [item.ids for item in items])
    order = (query_BD @ index.vectors_MD.T).argsort(1, descending=True)[:, :3].tolist()
    expected = 0.0
    for number, row in enumerate(order):
        places = row if number in row else [*row, number]
        scores = (query_BD[number] @ index.vectors_MD[places].T)[None]
        relevant = torch.tensor([[place == number for place in places]])
        expected += lambda_rank_loss(scores, relevant, torch.ones_like(relevant), 3).item()
    assert whole.total.item() == pytest.approx(expected, rel=1e-4)
    assert isinstance(whole, SumCount)
    assert whole.total.requires_grad
    assert not index.vectors_MD.requires_grad


def test_scores_are_float32_under_bfloat16(system: Any) -> None:
    index = index_corpus(system, [1000 * text for _, text in PAIRS[:2]], Run())
    objective = AdoreObjective(system, index, 2, 2, 1e4, Run(precision="bf16"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = objective(system.model, [Query(system.ids(["the fox"])[0], (0,))])["lambda_rank"]
    assert found.total.dtype == torch.float32
    assert torch.isfinite(found.total)


# ---- what a step sees


def test_departure_5_negatives_by_name(system: Any) -> None:
    corpus = corpus_of(pairs())
    questions = questions_of(pairs().records("train", Ranking), corpus)
    mined = hard_negatives(system, questions, corpus, quick(), Run())
    for kind, size in (("star", 2), ("random", 2), ("hard", 2), ("in-batch", 1)):
        items = items_of(system, quick(negatives=kind))
        assert [len(item.candidates) for item in items] == [size] * 6
        assert sorted(item.names[0] for item in items) == list("012345")
        for item in items:
            assert item.relevant == {item.names[0]}
            assert item.names[0] not in item.names[1:]
            if kind in ("star", "hard"):
                assert int(item.names[1]) in mined[int(item.names[0])]
    assert items_of(system, quick()) == items_of(system, quick())
    assert items_of(system, quick(), epoch=1) != items_of(system, quick())


def test_departure_4_enough_are_searched(system: Any) -> None:
    rows = [Ranking("q", text, id=str(n)) for n, (_, text) in enumerate(PAIRS[:4])]
    data = Data(
        {"train": rows, "corpus": [Text(text, id=text) for _, text in PAIRS] + [Text(PAIRS[0][1], id="twin")]}
    )
    corpus = corpus_of(data)
    (question,) = questions_of(rows, corpus)
    assert len(question.relevant) == 5, "the twin of a relevant document is relevant"
    (hard,) = hard_negatives(system, [question], corpus, quick(num_hard=2), Run())
    assert sorted(corpus.texts[place] for place in hard) == sorted(text for _, text in PAIRS[4:])


@pytest.mark.parametrize("kind", ["dense", "bm25"])
def test_own_negatives_come_first_and_positives_never(system: Any, kind: str) -> None:
    rows = [
        Ranking(query, text, (PAIRS[(n + 1) % 6][1], text), id=str(n))
        for n, (query, text) in enumerate(PAIRS)
    ]
    corpus = corpus_of(Data({"train": rows}))
    hard = hard_negatives(system, questions_of(rows, corpus), corpus, quick(mine_with=kind), Run())
    for number, places in enumerate(hard):
        assert places[0] == (number + 1) % 6
        assert number not in places
        assert len(places) == len(set(places)) == 3


def test_a_filter_drops_what_it_rates_like_the_relevant(system: Any) -> None:
    corpus = corpus_of(pairs())
    questions = questions_of(pairs().records("train", Ranking), corpus)
    loose = hard_negatives(system, questions, corpus, quick(filter_by="tiny:bert", filter_margin=-9.0), Run())
    assert loose == hard_negatives(system, questions, corpus, quick(), Run())
    strict = hard_negatives(system, questions, corpus, quick(filter_by="tiny:bert", filter_margin=9.0), Run())
    assert strict == [[]] * 6
    with pytest.raises(DataError, match="0 queries are left"):
        fit(system, pairs(), quick(negatives="hard", filter_by="tiny:bert", filter_margin=9.0), Run())
    with pytest.raises(ConfigError, match="is no encoder"):
        hard_negatives(system, questions, corpus, quick(filter_by="tiny:llama"), Run())


def test_departure_1_scale_follows_the_encoder(system: Any) -> None:
    assert scale_of(system, Config()) == 1
    unit = system.with_(layout=Layout(steps=("normalize",)))
    assert scale_of(unit, Config()) == 20
    assert scale_of(unit, Config(scale=3.0)) == 3


def test_the_papers_settings_stand_where_none_is_given() -> None:
    star_settings = train_settings(1000, Config())
    assert (star_settings.lr, star_settings.batch_rows, star_settings.max_steps) == (1e-4, 256, 50_000)
    assert star_settings.warmup_ratio == pytest.approx(1000 / 50_000)
    adore = train_settings(3200, Config(stage="adore"))
    assert (adore.lr, adore.batch_rows, adore.max_steps, adore.clip_norm) == (5e-6, 32, 600, 1.0)
    assert adore.warmup_ratio == 1, "the paper's 2000 steps are more than these"
    assert STAGES["star"].optimizer == "lamb"


def test_departure_7_last_layers_are_drawn_anew(system: Any) -> None:
    before = {name: value.clone() for name, value in system.model.state_dict().items()}
    reset_last_layers(system.model, 1, 0)
    changed = {
        name for name, value in system.model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed
    assert all(name.startswith("encoder.layer.1.") for name in changed)
    with pytest.raises(ConfigError, match="the encoder has 2 layers"):
        reset_last_layers(system.model, 3, 0)
