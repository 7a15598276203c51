"""NPO, SimNPO, GradDiff, DPO and their relatives beside plain float64 versions and TRL, and both ways to train.

The first version shares nothing with the code it checks: padded ids through the model, softmax over full logits, loops over
rows and tokens, one formula a loss. The second goes row by row and has KTO too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import temper
from temper.artefacts import tuning
from temper.core.errors import TemperError
from temper.core.types import Run
from temper.data.loading import load_data
from temper.methods.unlearning.npo import training
from temper.methods.unlearning.npo.card import Config
from temper.methods.unlearning.npo.conftest import make_pairs, objective_of, slow_logp, value_of
from temper.methods.unlearning.npo.losses import parse
from temper.methods.unlearning.npo.objective import Pair, UnlearnObjective
from temper.ops.batching import Example, collate, encode
from temper.ops.logprobs import response_logprobs
from temper.ops.objectives import SumCount
from temper.systems.loading import load_base

KINDS = ("llama", "gpt2", "qwen2", "gemma", "gemma2")
BETA, DELTA = 0.3, 0.2
PAD = 3


def random_row(draw: random.Random, begin: Sequence[int] = ()) -> Example:
    prompt = [*begin, *(draw.randrange(4, 512) for _ in range(draw.randint(1, 12)))]
    reply = [draw.randrange(4, 512) for _ in range(draw.randint(1, 15))]
    return Example(prompt + reply, [False] * len(prompt) + [True] * len(reply))


def random_pairs(seed: int) -> list[Pair]:
    """Rows of many lengths; in odd seeds all begin alike, as rows with one system prompt do."""
    draw = random.Random(seed)
    begin = [draw.randrange(4, 512) for _ in range(14)] if seed % 2 else []
    return [
        Pair(
            random_row(draw, begin),
            draw.uniform(-60, -5),
            random_row(draw, begin),
            draw.uniform(-60, -5),
            random_row(draw, begin),
        )
        for _ in range(4)
    ]


# ---- the plain version


def answers(model: Any, rows: Sequence[Example]) -> list[Tensor]:
    """The log-probabilities of each row's answer tokens, from one padded batch."""
    width = max(len(row.ids) for row in rows) + 2
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        for t, token in enumerate(row.ids):
            ids[b, t], mask[b, t] = token, 1
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert logits.dtype == torch.float64
    found = []
    for b, row in enumerate(rows):
        values = []
        for t in range(1, len(row.ids)):
            if row.scored[t]:
                values.append(logits[b, t - 1, row.ids[t]] - torch.logsumexp(logits[b, t - 1], 0))
        found.append(torch.stack(values))
    return found


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log(1 + torch.exp(-x))


def mean(values: Sequence[Tensor]) -> Tensor:
    return sum(values[1:], values[0]) / len(values)


def token_mean(rows: Sequence[Tensor]) -> Tensor:
    return mean([value for row in rows for value in row])


def npo(items: Sequence[Pair], forget: Sequence[Tensor], idk: Sequence[Tensor]) -> Tensor:
    ratios = [lp.sum() - item.forget_ref for lp, item in zip(forget, items, strict=True)]
    return 2 / BETA * mean([torch.log(1 + torch.exp(BETA * ratio)) for ratio in ratios])


def simnpo(items: Sequence[Pair], forget: Sequence[Tensor], idk: Sequence[Tensor]) -> Tensor:
    return -2 / BETA * mean([log_sigmoid(BETA * (-lp.sum() / len(lp) - DELTA)) for lp in forget])


def dpo(items: Sequence[Pair], forget: Sequence[Tensor], idk: Sequence[Tensor]) -> Tensor:
    margins = [
        (win.sum() - item.idk_ref) - (lose.sum() - item.forget_ref)
        for win, lose, item in zip(idk, forget, items, strict=True)
    ]
    return -2 / BETA * mean([log_sigmoid(BETA * margin) for margin in margins])


def ga(items: Sequence[Pair], forget: Sequence[Tensor], idk: Sequence[Tensor]) -> Tensor:
    return token_mean(forget)


def only_idk(items: Sequence[Pair], forget: Sequence[Tensor], idk: Sequence[Tensor]) -> Tensor:
    return -token_mean(idk)


PLAIN: dict[str, Callable[..., Tensor]] = {
    "ga": ga,
    "npo": npo,
    "simnpo": simnpo,
    "dpo": dpo,
    "idk": only_idk,
}


def plain_loss(model: Any, items: Sequence[Pair], name: str) -> Tensor:
    forget_name, _, retains = name.partition("+")
    forget = answers(model, [item.forget for item in items])
    idk = answers(model, [item.row("idk") for item in items])
    loss = PLAIN[forget_name](items, forget, idk)
    if retains:
        loss = loss - token_mean(answers(model, [item.row("retain") for item in items]))
    return loss


# ---- the two beside each other


def our_loss(system: Any, items: Sequence[Pair], name: str) -> Tensor:
    objective = UnlearnObjective(
        parse(name),
        Config(loss=name, beta=BETA, delta=DELTA),
        pad_id=PAD,
        device="cpu",
        reference=lambda: nullcontext(system),
    )
    terms: dict[str, SumCount] = objective(system.model, items)
    counts = objective.counts(items)
    weighted = [objective.weights[part] * term.total / counts[part] for part, term in terms.items()]
    return sum(weighted[1:], weighted[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["ga", "graddiff", "npo", "npo+rt", "simnpo", "simnpo+rt", "dpo", "dpo+rt", "idk+rt"]
)
def test_values_and_gradients_are_those_of_the_plain_version(kind: str, name: str) -> None:
    system = load_base(f"tiny:{kind}")
    model = system.model.double()
    for seed in (0, 1, 2):
        items = random_pairs(seed)
        found = our_loss(system, items, name)
        expected = plain_loss(model, items, "ga+rt" if name == "graddiff" else name)
        assert found.item() == pytest.approx(expected.item(), abs=1e-6, rel=1e-6)
        if seed:
            weights = list(model.parameters())
            ours, theirs = (torch.autograd.grad(loss, weights) for loss in (found, expected))
            for one, other in zip(ours, theirs, strict=True):
                # Norms and rotations compute in float32 inside, whatever the weights are.
                assert (one - other).abs().max() <= 1e-5 * max(1e-3, float(other.abs().max()))


def test_the_plain_version_is_no_echo_of_ours() -> None:
    """By hand, from numbers alone: p(answer) = 1/8, p_ref = 1/2, p(idk) = p_ref(idk) = 1/4."""
    item = Pair(Example([], []), math.log(1 / 2), Example([], []), math.log(1 / 4))
    forget, idk = [torch.tensor([0.5, 0.25]).double().log()], [torch.tensor([0.25]).double().log()]
    ratio = 0.25**BETA
    assert npo([item], forget, idk).item() == pytest.approx(2 / BETA * math.log(1 + ratio))
    assert dpo([item], forget, idk).item() == pytest.approx(2 / BETA * math.log(1 + ratio))
    by_length = math.exp(-BETA * (math.log(8) / 2 - DELTA))
    assert simnpo([item], forget, idk).item() == pytest.approx(2 / BETA * math.log(1 + by_length))
    assert ga([item], forget, idk).item() == pytest.approx(-math.log(8) / 2)


# ---- full fine-tuning and LoRA, on any architecture


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_to_train_forget_on_every_architecture(kind: str, mode: str) -> None:

    data = load_data("builtin:people", {"forget": "Dialogue", "retain": "Dialogue"}, limit=4)
    system: Any = load_base(f"tiny:{kind}")
    base = {name: value.clone() for name, value in system.model.state_dict().items()}
    rows = [encode(system, record, train_on="last") for record in data["forget"]]
    before = response_logprobs(system, rows, run=Run())
    artefact = temper.fit(
        "npo",
        system,
        data,
        mode=mode,
        rank=4,
        lr=1e-2,
        num_epochs=6,
        min_steps=0,
        batch_rows=4,
        watch_every=0,
    )
    assert artefact.kind == {"full": "weights", "lora": "adapter"}[mode]
    with artefact.apply(system) as unlearnt:
        assert (response_logprobs(unlearnt, rows, run=Run()) < before - 1).all()
    assert all(torch.equal(value, base[name]) for name, value in system.model.state_dict().items())


# ---- the reference is the model that unlearning starts from, and no other


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_target_with_an_adapter_is_its_own_reference_and_not_its_base(mode: str) -> None:
    """At the first step the log-ratio is 0: npo costs 2 log 2 / beta and weighs every answer as gradient ascent does."""
    data = load_data("builtin:people", {"forget": "Dialogue", "retain": "Dialogue"}, limit=4)
    system: Any = load_base("tiny:llama")
    quick = {"rank": 2, "num_epochs": 2, "min_steps": 0, "batch_rows": 4, "watch_every": 0, "mode": mode}
    learnt = temper.fit(
        "npo", system, data, loss="learn", **(quick | {"lr": 3e-2, "num_epochs": 8, "mode": "lora"})
    )
    with learnt.apply(system) as target:
        config = Config(loss="npo+kl", lr=1e-2, **quick)  # type: ignore[arg-type]
        rows = training.prepare(target, data, config, Run())
        now = response_logprobs(target, rows.forget, run=Run())
        assert torch.allclose(rows.forget_ref, now, atol=1e-4)
        with tuning(target, training.tune(config, Run()), Run()) as tuned:
            log, _ = training.unlearn(tuned, rows, config, Run())
            with tuned.reference() as before:
                assert torch.allclose(response_logprobs(before, rows.forget, run=Run()), now, atol=1e-3)
    assert log.terms["forget"][0] == pytest.approx(2 / config.beta * math.log(2), rel=1e-4)
    assert log.terms["kl"][0] == pytest.approx(0, abs=1e-5)
    base = response_logprobs(system, rows.forget, run=Run())
    assert (now - base).min() > 1, "the base would be another reference"


def test_a_measured_model_named_as_its_own_retain_only_model_is_warned_about(caplog: Any) -> None:
    data = load_data("builtin:people", {"forget": "Dialogue"}, limit=3)
    system: Any = load_base("tiny:llama")
    with caplog.at_level("WARNING"):
        list(temper.measure("npo", system, data, reference="tiny:llama:1", reply_tokens=0))
        assert "whatever it still knows" not in caplog.text
        list(temper.measure("npo", system, data, reference="tiny:llama", reply_tokens=0))
    assert "whatever it still knows" in caplog.text


def test_empty_parts_are_refused() -> None:
    data = load_data("builtin:people", {"forget": "Dialogue", "retain": "Dialogue"}, limit=3)
    for loss in ("npo+rt", "ga+kl", "npo"):
        with pytest.raises(TemperError, match="'retain' is empty"):
            temper.fit("npo", "tiny:llama", data.with_part("retain", []), loss=loss)


# ---- a second version from full logits, TRL's own loss, and any split of a step


def slow_loss(model: Any, items: list[Pair], name: str, beta: float, delta: float) -> torch.Tensor:
    """The released losses, row by row, in float64: no batches, no padding, no shared pieces."""
    forget = [slow_logp(model, item.forget) for item in items]
    idk = [slow_logp(model, item.row("idk")) for item in items]
    retain = torch.cat([slow_logp(model, item.row("retain")) for item in items])
    ratios = torch.stack([a.sum() - item.forget_ref for a, item in zip(forget, items, strict=True)])
    wins = torch.stack([a.sum() - item.idk_ref for a, item in zip(idk, items, strict=True)])
    means = torch.stack([-a.mean() for a in forget])
    kind, _, term = name.partition("+")
    found = {
        "ga": lambda: torch.cat(forget).mean(),
        "npo": lambda: -F.logsigmoid(-beta * ratios).mean() * 2 / beta,
        "simnpo": lambda: -F.logsigmoid(beta * (means - delta)).mean() * 2 / beta,
        "dpo": lambda: -F.logsigmoid(beta * (wins - ratios)).mean() * 2 / beta,
        "kto": lambda: (1 - torch.sigmoid(wins.mean() - beta * ratios)).mean() * 2 / beta,
        "idk": lambda: -torch.cat(idk).mean(),
    }[kind]()
    return found - retain.mean() if term else found


@pytest.mark.parametrize(
    "name", ["ga", "ga+rt", "npo", "npo+rt", "simnpo", "simnpo+rt", "dpo", "dpo+rt", "kto", "idk+rt"]
)
def test_losses_agree_with_a_slow_float64_version(system: Any, name: str) -> None:
    model = load_base("tiny:llama").model.double()
    objective = objective_of(system, name, beta=0.3, delta=0.2)
    for seed in range(3):
        items = make_pairs(seed)
        with torch.no_grad():
            expected = slow_loss(model, items, name, 0.3, 0.2).item()
        assert value_of(objective, model, items) == pytest.approx(expected, abs=1e-6, rel=1e-6)


def test_dpo_agrees_with_trl(system: Any) -> None:
    """TRL's own loss on the same padded batch: ours is 2 / beta times its sigmoid loss."""
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    items, beta = make_pairs(3), 0.2
    batch = collate([*(item.row("idk") for item in items), *(item.forget for item in items)], 3)

    def model(input_ids: torch.Tensor, labels: torch.Tensor, **more: Any) -> Any:
        logp = system.model(input_ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        target, known = labels[:, 1:], labels[:, 1:] != -100
        picked = logp.gather(-1, target.clamp(min=0)[..., None])[..., 0]
        zeros = torch.zeros_like(picked)
        return MagicMock(log_probs=picked * known, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    trainer = MagicMock()
    trainer.loss_types, trainer.loss_weights, trainer.beta, trainer.ld_alpha = ["sigmoid"], [1.0], beta, None
    trainer.f_divergence_type, trainer.precompute_ref_logps, trainer.aux_loss_enabled = (
        "reverse_kl",
        True,
        False,
    )
    trainer.use_weighting, trainer.args.rpo_alpha, trainer.label_smoothing = False, None, 0.0
    trainer.accelerator.gather_for_metrics = lambda tensor: tensor
    inputs = {
        "input_ids": batch.ids_BT,
        "attention_mask": batch.mask_BT.long(),
        "completion_mask": batch.scored_BT.long(),
        "ref_chosen_logps": torch.tensor([item.idk_ref for item in items]),
        "ref_rejected_logps": torch.tensor([item.forget_ref for item in items]),
    }
    with torch.no_grad():
        theirs = trl.DPOTrainer._compute_loss(trainer, model, inputs, False)
        ours = value_of(objective_of(system, "dpo", beta=beta), system.model, items)
    assert ours == pytest.approx(2 / beta * float(theirs), rel=1e-6)


def test_departure_4_any_split_of_a_step_gives_its_loss_and_gradient(system: Any) -> None:
    items = make_pairs(5)
    for name in ("npo+rt", "ga+kl", "dpo+kl", "ga+fkl"):
        for which in ("nonpad", "answer", "all"):
            objective = objective_of(system, name, kl_positions=which)
            model = system.model
            counts = objective.counts(items)

            def loss_of(
                split: list[list[Pair]], objective: Any = objective, counts: Any = counts, model: Any = model
            ) -> Any:
                terms = [objective(model, part) for part in split]
                return sum(
                    objective.weights[n] * t.total / counts[n] for part in terms for n, t in part.items()
                )

            weight = model.model.layers[0].mlp.up_proj.weight
            (whole,) = torch.autograd.grad(loss_of([items]), weight)
            (parts,) = torch.autograd.grad(loss_of([items[:1], items[1:]]), weight)
            assert torch.allclose(whole, parts, atol=1e-6), (name, which)


def test_kto_compares_the_rows_of_a_step_and_says_so(system: Any) -> None:
    assert objective_of(system, "kto").unsplittable
    assert not objective_of(system, "dpo").unsplittable
