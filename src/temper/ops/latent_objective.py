"""Training against perturbations inside the model: search one, then lower the defence's losses while it stands.

What the two sides want is a `Game`; the search is `ops/latent.attack`. One forward pass holds the bad rows and the good
rows with their shared perturbation and the benign rows without.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from temper.core.types import Json, Run
from temper.ops.batching import Batch, Example, collate, plan_batches
from temper.ops.hooks import capture
from temper.ops.latent import Ball, Found, attack
from temper.ops.objectives import SumCount
from temper.ops.optim import adamw
from temper.ops.precision import autocast, float32_products
from temper.ops.toward_away import TokenScores, mean_rows, score_tokens, toward_tokens
from temper.ops.train import TrainLog, TrainSettings, train

__all__ = [
    "Attacked",
    "Game",
    "LatentItem",
    "LatentObjective",
    "Search",
    "Seen",
    "attack_figures",
    "attack_items",
    "attacked_columns",
    "mean_bad_loss",
    "rounds",
    "scored_count",
    "train_rounds",
]

Kind = Literal["bad", "good"]


@dataclass(frozen=True)
class LatentItem:
    """A prompt with the reply the attack wants and the one it should have; benign rows that go with it.

    `ref_bad` and `ref_good` are the reference's log-probabilities, where a game wants them.
    """

    bad: Example
    good: Example | None = None
    benign: tuple[Example, ...] = ()
    ref_bad: float = 0.0
    ref_good: float = 0.0
    place: int = 0
    """Tells the items of one optimiser step apart."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all its rows."""
        return sum(len(row.ids) for row in (self.bad, self.good, *self.benign) if row is not None)

    @property
    def longest(self) -> int:
        """Tokens of its longest row."""
        return max(len(row.ids) for row in (self.bad, self.good, *self.benign) if row is not None)

    def row(self, kind: Kind) -> Example:
        """The bad or the good row."""
        row = self.bad if kind == "bad" else self.good
        assert row is not None, "the item has no good row"
        return row


class Seen(NamedTuple):
    """What a forward pass gave: scores by kind of row ("bad", "good", "benign"), hidden states by site and the batch."""

    scores: Mapping[str, TokenScores]
    hidden: Mapping[str, Tensor]
    batch: Batch


class Game(Protocol):
    """What the attack lowers and what the defence lowers."""

    attack_reads: Sequence[Kind]
    """Rows that the attack's loss reads."""
    defence_reads: Sequence[Kind]
    captures: Sequence[str]
    """Sites whose hidden states the defence's terms read."""
    weights: Mapping[str, float]

    def counts(self, items: Sequence[LatentItem]) -> Mapping[str, float]:
        """Term -> its denominator over `items`."""

    def attack_loss(self, scores: Mapping[str, TokenScores], items: Sequence[LatentItem]) -> Tensor:
        """What the attack lowers, one number an item, (B,), from that item's rows alone."""

    def reference(self, model: nn.Module, items: Sequence[LatentItem], found: Found) -> Any:
        """What the terms need of the model as it was, worked out before their forward pass; None where nothing."""

    def terms(self, seen: Seen, items: Sequence[LatentItem], reference: Any) -> Mapping[str, SumCount]:
        """The defence's losses, with gradient."""


@dataclass(frozen=True)
class Search:
    """How the perturbation is looked for, and which columns of a row it may touch."""

    balls: Mapping[str, Ball]
    num_steps: int
    step: Literal["sign", "adamw"]
    positions: Literal["prompt", "prompt+reply", "scored"] = "prompt"
    """The tokens before the reply, those and the bad reply's, or the bad row's scored tokens."""


WATCHED = ("attack_before", "attack_after", "boundary_share", "forward_passes", "backward_passes")
"""Terms of weight 0 for the log: the attack's loss without and with its perturbation, the share of perturbed tokens on the
boundary, and passes of one row through the model for each item."""


def scored_count(rows: Sequence[Example]) -> float:
    """Scored tokens of all rows."""
    return float(sum(sum(row.scored) for row in rows))


def rounds(
    items: Sequence[LatentItem], batch_rows: int, num_repeats: int, seed: int, epoch: int
) -> list[LatentItem]:
    """An epoch in the order it is trained in: shuffled, cut into batches, each standing `num_repeats` times in a row.

    The last batch is filled up from the beginning.
    """
    order = list(range(len(items)))
    random.Random(f"{seed}/rounds/{epoch}").shuffle(order)
    order += [order[place % len(order)] for place in range(-len(order) % batch_rows)]
    out: list[LatentItem] = []
    for start in range(0, len(order), batch_rows):
        batch = [
            replace(items[at], place=place) for place, at in enumerate(order[start : start + batch_rows])
        ]
        out += batch * num_repeats
    return out


class LatentObjective:
    """The defence's terms under a perturbation that is searched for at the first of `num_repeats` steps and then kept.

    Used as a context manager: hooks stay on the model from a forward pass to the next, so that activations computed
    again in the backward pass get the same perturbation; on leaving, also after an error, they are gone.
    `next_step` belongs in front of every optimiser step.
    """

    def __init__(
        self, game: Game, search: Search, *, pad_id: int, device: str | torch.device, num_repeats: int = 1
    ) -> None:
        self.game, self.search, self.pad_id, self.device = game, search, pad_id, device
        self.num_repeats = num_repeats
        self.weights = {**game.weights, **dict.fromkeys(WATCHED, 0.0)}
        self._hooks = ExitStack()
        self._kept: dict[tuple[int, ...], Found] = {}

    def __enter__(self) -> LatentObjective:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()

    def next_step(self, step: int) -> None:
        """Forget the perturbations of the last round where a new one begins."""
        if step % self.num_repeats == 0:
            self._kept.clear()

    def longest(self, item: LatentItem) -> int:
        """Tokens of the item's longest row."""
        return item.longest

    def counts(self, items: Sequence[LatentItem]) -> dict[str, float]:
        """The game's, and the items for what is watched."""
        return {**self.game.counts(items), **dict.fromkeys(WATCHED, float(len(items)))}

    def __call__(self, model: nn.Module, items: Sequence[LatentItem]) -> dict[str, SumCount]:
        """Search (or take the kept perturbation), then one forward pass of all rows."""
        self._hooks.close()
        key = tuple(item.place for item in items)
        new = key not in self._kept
        if new:
            self._kept[key] = self.find(model, items)
        found = self._kept[key]
        reference = self.game.reference(model, items, found)
        rows, of = _rows(items, self.game.defence_reads)
        benign = [row for item in items for row in item.benign]
        batch = collate([*rows, *benign], self.pad_id, self.device)
        self._hooks.enter_context(found.perturbation.applied(model, [*of, *[None] * len(benign)]))
        if self.game.captures:
            with capture(model, self.game.captures, grad=True) as hidden:
                scores = score_tokens(model, batch)
            states = dict(hidden)
        else:
            scores, states = score_tokens(model, batch), {}
        parts = _split(scores, self.game.defence_reads, len(items))
        parts["benign"] = scores.of(len(rows), scores.num_rows)
        terms = self.game.terms(Seen(parts, states, batch), items, reference)
        return {**terms, **self._watched(found, items, len(batch.ids_BT), new)}

    def find(self, model: nn.Module, items: Sequence[LatentItem]) -> Found:
        """The attack on these items."""
        reads = self.game.attack_reads
        rows, of = _rows(items, reads)
        batch = collate(rows, self.pad_id, self.device)

        def losses() -> Tensor:
            return self.game.attack_loss(_split(score_tokens(model, batch), reads, len(items)), items)

        mask_NP = attacked_columns(items, self.search.positions, batch.ids_BT.shape[1]).to(self.device)
        return attack(
            model,
            losses,
            mask_NP,
            of,
            self.search.balls,
            num_steps=self.search.num_steps,
            step=self.search.step,
        )

    def _watched(
        self, found: Found, items: Sequence[LatentItem], num_rows: int, new: bool
    ) -> dict[str, SumCount]:
        reads = len(self.game.attack_reads) * len(items)
        passes = {
            "forward_passes": num_rows + new * reads * found.num_forward,
            "backward_passes": num_rows + new * reads * found.num_backward,
        }
        totals = {
            "attack_before": found.before_N.sum(),
            "attack_after": found.after_N.sum(),
            "boundary_share": torch.tensor(found.boundary_share * len(items)),
            **{name: torch.tensor(float(value)) for name, value in passes.items()},
        }
        return {name: SumCount(total.to(self.device), len(items)) for name, total in totals.items()}


def attacked_columns(items: Sequence[LatentItem], positions: str, width: int) -> Tensor:
    """Where each item's perturbation may stand, (N, P) bool."""
    mask_NP = torch.zeros(len(items), width, dtype=torch.bool)
    for number, item in enumerate(items):
        scored = torch.tensor(item.bad.scored)
        start = item.bad.scored.index(True)
        if positions != "scored":
            mask_NP[number, :start] = True
        if positions != "prompt":
            mask_NP[number, : len(scored)] |= scored
    return mask_NP


def _rows(items: Sequence[LatentItem], kinds: Sequence[Kind]) -> tuple[list[Example], list[int | None]]:
    """The items' rows, kind by kind, and which item each belongs to."""
    rows = [item.row(kind) for kind in kinds for item in items]
    of: list[int | None] = list(range(len(items)))
    return rows, of * len(kinds)


def _split(scores: TokenScores, kinds: Sequence[Kind], size: int) -> dict[str, TokenScores]:
    return {str(kind): scores.of(at * size, (at + 1) * size) for at, kind in enumerate(kinds)}


def mean_bad_loss(scores: Mapping[str, TokenScores]) -> Tensor:
    """Each bad reply's cross-entropy a token, (B,): what the plain attack lowers."""
    return mean_rows(toward_tokens(scores["bad"]), scores["bad"])


class Attacked(NamedTuple):
    """Each item's attack loss without and with its perturbation, (N,), on the CPU, and the share on the boundary."""

    before_N: Tensor
    after_N: Tensor
    boundary_share: float


def attack_items(
    model: nn.Module, items: Sequence[LatentItem], objective: LatentObjective, run: Run
) -> Attacked:
    """The objective's attack on every item, in batches of the run's token budget; nothing is trained."""
    before_N, after_N, on_boundary = torch.zeros(len(items)), torch.zeros(len(items)), 0.0
    for places in plan_batches([item.num_tokens for item in items], run):
        with autocast(run), float32_products(run):
            found = objective.find(model, [items[place] for place in places])
        before_N[places] = found.before_N.float().cpu()
        after_N[places] = found.after_N.float().cpu()
        on_boundary += found.boundary_share * len(places) / len(items)
    return Attacked(before_N, after_N, on_boundary)


def train_rounds(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    items_of: Callable[[int], Sequence[LatentItem]],
    objective: LatentObjective,
    settings: TrainSettings,
    run: Run,
    *,
    restart_optimizer: bool = False,
) -> TrainLog:
    """`train` in rounds of `num_repeats` steps on one batch and its perturbations; checkpoints fall between rounds.

    `items_of(epoch)` gives an epoch's items, always as many. `restart_optimizer` forgets AdamW's moments at every round.
    """
    repeats, built = objective.num_repeats, []

    def build(trained: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        built.append(adamw(trained, settings.lr, settings.weight_decay, settings.betas, settings.eps))
        return built[0]

    def before_step(step: int) -> None:
        objective.next_step(step)
        if restart_optimizer and step % repeats == 0:
            built[0].state.clear()

    run = replace(run, checkpoint_every=math.ceil(run.checkpoint_every / repeats) * repeats)
    with objective:
        return train(
            model,
            parameters,
            lambda epoch: rounds(items_of(epoch), settings.batch_rows, repeats, run.seed, epoch),
            objective,
            replace(settings, shuffle=False),
            run,
            length=lambda item: item.num_tokens,
            build_optimizer=build,
            before_step=before_step,
        )


def attack_figures(log: TrainLog) -> dict[str, Json]:
    """Curves for the report: the attack's losses, the share on the boundary and the passes of each step."""
    steps = list(range(log.num_steps))

    def curve(y: str, **names: str) -> dict[str, Json]:
        lines = {label: {"x": steps, "y": log.terms[name]} for label, name in names.items()}
        return {"x": "optimiser step", "y": y, "lines": lines}

    return {
        "curves": {
            "Attack loss": curve("nats a token", without="attack_before", attacked="attack_after"),
            "Perturbed tokens on the boundary": curve("share", tokens="boundary_share"),
            "Passes of one row for each item": curve(
                "passes", forward="forward_passes", backward="backward_passes"
            ),
        }
    }
