"""The paper's logistic toy (Sec. 4), exactly: random ReLU features, two classes, gradient ascent beside NPO.

Shape letters: N samples, D inputs, F random features. One parameter vector a_F; the second class has logit 0.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from temper.core.types import Row, Run
from temper.methods.unlearning.npo.card import Config
from temper.methods.unlearning.npo.losses import ga_loss, npo_loss

__all__ = ["Problem", "Trace", "answer_logp", "build", "measure", "retain_kl", "unlearn"]

NUM_INPUTS, NUM_FEATURES = 16, 128
NUM_FORGET, NUM_RETAIN, NUM_EVAL = 200, 1000, 1000
FIRST_STEPS, EVAL_EVERY = 2000, 25
"""Losses are compared after the toy's usual 2000 steps; the law of the drift (Sec. 3) shows in 10,000, as in the paper."""
UNLEARN_LR, PRETRAIN_LR, BETA = 5e-4, 0.05, 1.0
LOSSES = ("ga", "npo")


class Problem(NamedTuple):
    """Features and signs (+1 for the first class) of the forget rows, features of held-out retain rows, and two models."""

    forget_NF: Tensor
    forget_sign_N: Tensor
    held_out_NF: Tensor
    target_F: Tensor
    retain_only_F: Tensor


class Trace(NamedTuple):
    """Every `EVAL_EVERY` steps: KL to the retain-only model on retain inputs, in nats, and the parameters' drift."""

    step: list[int]
    kl: list[float]
    drift: list[float]


def answer_logp(features_NF: Tensor, sign_N: Tensor, a_F: Tensor) -> Tensor:
    """Log-probability of the label, log p(label | x) under softmax([features a, 0])."""
    return F.logsigmoid(sign_N * (features_NF @ a_F))


def _draw(num: int, centre: float, first_class: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs around `centre`, labels from a logistic model in the offset from it, with intercept 1 for one class."""
    x_ND = torch.randn(num, NUM_INPUTS, generator=generator, dtype=torch.float64) + centre
    logit_N = (x_ND - centre).sum(1) / math.sqrt(NUM_INPUTS) + 1
    hit_N = torch.rand(num, generator=generator, dtype=torch.float64) < torch.sigmoid(logit_N)
    sign_N = torch.where(hit_N == first_class, 1.0, -1.0).double()
    return x_ND, sign_N


def _pretrain(features_NF: Tensor, sign_N: Tensor, num_steps: int) -> Tensor:
    """Full-batch gradient descent on the cross-entropy from 0, its gradient written out: thousands of small steps."""
    a_F = torch.zeros(features_NF.shape[1], dtype=torch.float64)
    signed_NF = features_NF * sign_N[:, None]
    step = PRETRAIN_LR / len(sign_N)
    for _ in range(num_steps):
        a_F.addmv_(signed_NF.T, torch.sigmoid(-(signed_NF @ a_F)), alpha=step)
    return a_F


def build(seed: int, pretrain_steps: int) -> Problem:
    """The data of a seed, the target fitted on all of it and the model fitted on its retain part."""
    generator = torch.Generator().manual_seed(seed)
    weights_FD = torch.randn(NUM_FEATURES, NUM_INPUTS, generator=generator, dtype=torch.float64)
    weights_FD /= math.sqrt(NUM_INPUTS)
    retain = _draw(NUM_RETAIN, -1.0, True, generator)
    forget = _draw(NUM_FORGET, 1.0, False, generator)
    held_out_ND, _ = _draw(NUM_EVAL, -1.0, True, generator)
    retain_NF, forget_NF, held_out_NF = (
        torch.relu(x @ weights_FD.T) for x in (retain[0], forget[0], held_out_ND)
    )
    both_NF, both_sign_N = torch.cat([retain_NF, forget_NF]), torch.cat([retain[1], forget[1]])
    return Problem(
        forget_NF,
        forget[1],
        held_out_NF,
        _pretrain(both_NF, both_sign_N, pretrain_steps),
        _pretrain(retain_NF, retain[1], pretrain_steps),
    )


def retain_kl(problem: Problem, a_F: Tensor) -> float:
    """KL(retain-only model || model), mean over held-out retain inputs, in nats."""
    z_N, ref_N = problem.held_out_NF @ a_F, problem.held_out_NF @ problem.retain_only_F
    kl_N = torch.sigmoid(ref_N) * (F.logsigmoid(ref_N) - F.logsigmoid(z_N))
    kl_N += torch.sigmoid(-ref_N) * (F.logsigmoid(-ref_N) - F.logsigmoid(-z_N))
    return float(kl_N.mean())


def unlearn(problem: Problem, loss: str, num_steps: int) -> Trace:
    """Full-batch gradient steps on the forget rows with this package's own losses."""
    a_F = problem.target_F.clone().requires_grad_()
    ref_N = answer_logp(problem.forget_NF, problem.forget_sign_N, problem.target_F)
    trace = Trace([], [], [])
    for step in range(num_steps + 1):
        if step % EVAL_EVERY == 0:
            trace.step.append(step)
            trace.kl.append(retain_kl(problem, a_F.detach()))
            trace.drift.append(float((a_F.detach() - problem.target_F).norm()))
        logp_N = answer_logp(problem.forget_NF, problem.forget_sign_N, a_F)
        total = ga_loss(logp_N) if loss == "ga" else npo_loss(logp_N, ref_N, BETA)
        (grad_F,) = torch.autograd.grad(total / len(logp_N), a_F)
        with torch.no_grad():
            a_F -= UNLEARN_LR * grad_F
    return trace


def measure(config: Config, run: Run) -> tuple[list[Row], dict[str, Any]]:
    """Rows by seed (as items): end KL of both losses, their gap, and drift at the end over drift at half time."""
    rows: list[Row] = []
    traces: dict[str, list[Trace]] = {loss: [] for loss in LOSSES}
    for seed in run.ticker(config.toy_seeds, total=len(config.toy_seeds), label="toy"):
        problem = build(seed, config.toy_pretrain_steps)
        ends = {}
        for loss in LOSSES:
            trace = unlearn(problem, loss, config.toy_steps)
            traces[loss].append(trace)
            ends[loss] = trace.kl[min(FIRST_STEPS // EVAL_EVERY, len(trace.kl) - 1)]
            ratio = trace.drift[-1] / trace.drift[len(trace.drift) // 2]
            rows.append(_row(f"toy_{loss}_retain_kl_nats", trace.kl[-1], seed, False))
            rows.append(_row(f"toy_{loss}_drift_ratio", ratio, seed, None))
        rows.append(_row("toy_retain_kl_gap", ends["ga"] - ends["npo"], seed, None))
    return rows, _figures(traces)


def _row(metric: str, value: float, seed: int, better: bool | None) -> Row:
    return Row(metric=metric, value=value, item=f"toy seed {seed}", split="toy", higher_is_better=better)


def _figures(traces: dict[str, list[Trace]]) -> dict[str, Any]:
    def lines(field: str) -> dict[str, Any]:
        found = {}
        for loss, runs in traces.items():
            columns = list(zip(*(getattr(trace, field) for trace in runs), strict=True))
            found[loss] = {
                "x": runs[0].step,
                "y": [sum(column) / len(column) for column in columns],
                "low": [min(column) for column in columns],
                "high": [max(column) for column in columns],
            }
        return found

    return {
        "curves": {
            "Toy: distance on retain inputs": {
                "x": "step",
                "y": "KL to the retain-only model, nats",
                "lines": lines("kl"),
            },
            "Toy: drift of the parameters": {
                "x": "step",
                "y": "distance from the target model",
                "lines": lines("drift"),
            },
        }
    }
