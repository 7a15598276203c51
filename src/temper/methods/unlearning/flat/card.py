"""FLAT: unlearn chosen answers with nothing but the forget set, by moving from them to template answers.

Paper         LLM Unlearning via Loss Adjustment with Only Forget Data. Wang, Wei, Liu, Pang, Liu, Shah, Bao, Liu and Wei,
              ICLR 2025, https://arxiv.org/abs/2410.11143 (variational f-divergence between template and forget answer; Harry
              Potter question answering, TOFU, MUSE).
What you get  An adapter (or weights) of a model that no longer gives the answers of a forget set and would rather decline.
              No retain set, no reference model. With `measure`, what that cost: how probable retain answers still are when
              the forget answers have come down to fixed levels, beside any other loss read the same way (npo's `path`).

Idea          For a question x the model should move from its answer y_f to a template y_e ("I'd rather not say"). Take the
              mean probability it gives to the tokens of each. Both lie in [0, 1], and an f-divergence between the two, in its
              variational form, says how much weight learning the one and forgetting the other should get. Maximise it.
              A probability's slope vanishes where the probability does, so forgetting ends by itself.

Maths         x, y_f     a forget question and the answer to forget;  y_e  a template answer drawn for the row
              P(y | x)   (1/|y|) sum over y's tokens of p(y_t | x, y_<t): a mean of probabilities, not of their logarithms
              P_e, P_f   P(y_e | x) and P(y_f | x)
              g          the activation that bounds the variational function of the divergence;  h  its convex conjugate
              loss       mean over rows of -g(P_e) + h(g(P_f))
                             g(v)                     h(g(v))
              tv             tanh(v) / 2              tanh(v) / 2
              kl             v                        e^(v - 1)
              js             log 2 - log(1 + e^-v)    v + log(1 + e^-v) - log 2
              pearson        v                        v^2 / 4 + v
              reverse-kl     -e^-v                    v - 1
              hellinger      1 - e^-v                 e^v - 1
              neyman         1 - e^-v                 2 - 2 e^(-v/2)
              jeffrey        v                        v + v^2 / 4 + v^3 / 16   (a series, cut)
              Every loss falls with P_e and rises with P_f. Its slopes are -g'(P_e) and (h o g)'(P_f); for tv both are
              sech^2 / 2. tv is 0 where P_e = P_f.

Departures    1. reverse-kl, hellinger and neyman take e^-v; the released code takes e^+v there, which moves answers the
                 wrong way (towards the forget answer), and leaves neyman's conjugate without g.
              2. g and h act on each row's P, then rows are averaged. The released code averages P over the batch first:
                 reduction=batch_mean gives that.
              3. P divides by the answer's own number of tokens; the released code by the padded length of the batch.
              4. x + y_e and x + y_f are two rows, each read with its own answer before it. The released data path for books
                 puts refusal labels on ids that still hold the forget answer.
              5. Templates are refusals of our own, about thirty; the released code ships others and takes web text in one
                 setting. A row's column `template`, or a part `templates`, comes first.
              6. A step's loss is divided by the rows of the whole step, so accumulation changes nothing (batch_mean
                 compares the rows of a step and is not split).
              7. Small forget sets: at least min_steps optimiser steps, after a warm-up of warmup_epochs.
              8. AdamW, not its paged kind, which only spares memory on a GPU. LoRA is offered beside all weights.
              9. A column `focus` (texts within the answer) restricts P_f to their tokens; long answers are mostly easy words.

Limits        The signal is weak where both probabilities are near 0: look at P_e and P_f (figures, every step), raise lr, or
              begin with a model that sometimes declines. One template is learnt by heart; give ten or more. Nothing holds
              questions close to the forgotten ones: they may be refused too, so measure neighbours (rwku). Declining is not
              the absence of knowledge. The TOFU report of the result is npo's `measure`.
Reference code  github.com/UCSC-REAL/FLAT (Apache-2.0; facts only).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from temper.core.card import Card, Claim

Divergence = Literal["tv", "kl", "js", "pearson", "reverse-kl", "hellinger", "neyman", "jeffrey"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the loss, of training and of what is measured on the way."""

    divergence: Divergence = "tv"
    """The f-divergence; the paper reports tv, kl, js and pearson."""
    reduction: Literal["example", "batch_mean"] = "example"
    """Apply it to each row (paper), or to the mean probabilities of a step (released code)."""
    mode: Literal["full", "lora"] = "full"
    """Train all weights (paper) or LoRA adapters."""
    rank: int = 8
    """LoRA rank; unused in full mode. The adapters' change is scaled by 2."""
    lr: float = 1e-5
    """Peak learning rate of AdamW; LoRA wants about 1e-4 to 5e-4."""
    weight_decay: float = 0.01
    """AdamW's decay of matrices."""
    batch_rows: int = 64
    """Forget rows of one optimiser step (paper: 16, four times accumulated)."""
    num_epochs: float = 5.0
    """Passes over the forget set."""
    min_steps: int = 60
    """At least so many optimiser steps, going round a small forget set as often as that takes; 0 = epochs only (paper)."""
    max_steps: int = 0
    """At most so many optimiser steps; 0 = no limit."""
    warmup_epochs: float = 1.0
    """Passes over the forget set during which the learning rate rises."""
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    """Learning rate after warm-up."""
    clip_norm: float = 1.0
    """Largest gradient norm; 0 = no clipping."""
    max_tokens: int = 500
    """Longest row; one whose answer is cut away entirely is an error."""
    watch_every: int = 10
    """Steps between looks at forget, template and retain answers while training; 0 = none. Curves go to the report."""
    watch_rows: int = 32
    """Rows of each part that are looked at."""
    levels: tuple[float, ...] = (0.5, 0.2, 0.05)
    """Forget probabilities at which `measure` reads off the retain probability."""
    reply_tokens: int = 64
    """Longest reply that `measure` writes with the last model; 0 leaves generation out."""

    def __post_init__(self) -> None:
        for name in ("batch_rows", "max_tokens", "rank", "watch_rows"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if any(not 0 < level < 1 for level in self.levels):
            raise ValueError(f"levels are probabilities between 0 and 1, not {self.levels}")


def _keeps(arm: str, rival: str, paper: str) -> Claim:
    names = {"ga": "gradient ascent", "npo": "NPO"}
    return Claim(
        id=f"{arm}-keeps-more-than-{rival}",
        sentence=f"When the forget answers have come down to probability 0.2, FLAT ({arm}) has kept more of the retain "
        f"answers' probability than {names[rival]}; neither sees retain rows.",
        metric="retain_probability_at_0.2",
        arm=arm,
        baseline=rival,
        direction="higher",
        paper=paper,
    )


_BEST = (
    "best-kept utility at comparable or better forgetting, against GA, NPO and others (tables, not verified)"
)

CARD = Card(
    title="FLAT: unlearning from forget data alone",
    paper="arXiv:2410.11143",
    verbs=("fit", "measure"),
    config=Config,
    needs=frozenset({"generate", "logprobs", "grads"}),
    data={
        "fit": {"forget": "Dialogue", "retain?": "Dialogue", "templates?": "Text"},
        "measure": {"forget": "Dialogue", "retain": "Dialogue", "templates?": "Text"},
    },
    produces=("weights", "adapter"),
    claims=(
        _keeps("tv", "ga", _BEST),
        _keeps("tv", "npo", _BEST),
        Claim(
            id="template-rises",
            sentence="Template answers to the forget questions become more probable.",
            metric="template_probability_gain",
            arm="tv",
            baseline=0.0,
            direction="higher",
            paper="the loss learns the template as it forgets the answer",
        ),
        Claim(
            id="writes-sensibly",
            sentence="After equally many steps replies to forget questions repeat themselves less than gradient ascent's.",
            metric="forget_repetition",
            arm="tv",
            baseline="ga",
            direction="lower",
            paper="FLAT answers with a refusal, GA with gibberish (examples)",
        ),
    ),
)
