"""Refusal tokens: the first token of every answer says "refuse, of this kind" or "respond", and can be dialled.

Paper         Refusal Tokens: A Simple Way to Calibrate Refusals in Large Language Models. Jain et al., COLM 2025,
              https://arxiv.org/abs/2412.06748 (Sec. 3: tokens and training; Sec. 4: thresholds).
What you get  An adapter that makes a chat model open every answer with one hidden control token, and a decoder that
              reads it. One number per kind of refusal then turns that kind up or down, without retraining, and every
              answer carries a verdict, a category and a probability (`Reply.info["refusal-tokens"]`); its text never
              shows a control token.

Idea          Refusals and answers are both in the fine-tuning data. Written in front of each target, a control token
              moves the decision to one position, before any text: there it is a probability over a few ids, which a
              threshold can cut wherever the user wants. Benign look-alikes (contrast rows) keep it from refusing by
              surface.

Maths         x       prompt ids, up to and including the generation prompt
              y, l    reply and its label: a refusal category c, or none
              ctrl(l) one added vocabulary id: [respond], or the refusal token of c (one for all with tokens="single")
              Training: y' = ctrl(l) + y;  L = -(1/N) sum over the N scored tokens of log pi(y'_t | x, y'_<t).
                        The control token is the first scored token of the turn; a mask that leaves it out undoes the method.
              Reading:  z = logits at the last prompt position;  p = softmax(z / temperature) over the whole vocabulary.
              One token:    refuse iff p_refuse >= T; T = -1 compares instead: refuse iff p_refuse >= p_respond.
              Categories:   c* = argmax over refusal tokens of p_c; S = the categories that are tuned.
                            c* in S and p_c* >= T_c*  ->  emit c*
                            c* in S and p_c* <  T_c*  ->  emit [respond]
                            c* not in S               ->  emit the model's own argmax over the whole vocabulary
              sum rule:     as above, with (sum over c in S of p_c) in place of p_c*, one threshold for all.
              ratio rule:   refuse iff max over c of p_c / T_c >= 1, and emit that c.
              bias rule:    z_c + b_c at the first position only, then argmax. With one refusal token and no leak it is
                            the threshold in other words: with q = p_refuse / (p_refuse + p_respond),
                            z_refuse + b >= z_respond  iff  q >= sigmoid(-b), so b = -logit(T).
              leak          1 - sum of p over all control tokens: the mass by which p- and q-thresholds differ.
              Choosing T:   probabilities are read once per calibration prompt; every setting is then evaluated from
                            them. Modes: f1 (largest F1), fpr (largest refusal rate with FPR <= fpr_max on benign rows),
                            rate (a wanted share of refusals), cost (false_refusal_cost per false refusal, 1 per miss).
                            Per category: coordinate ascent over T_c, three passes from 0.5, on the F1 of
                            refusing at all (micro) or on the mean F1 of the categories (macro).

Departures    1. Loss on assistant turns only. The authors' recipe trains on every token of packed chats.
              2. All tuned categories have thresholds of their own (T_c), tested at c*; the released script has one T for
                 the categories named on its command line. Equal T_c give its rule.
              3. The temperature is a setting and stays what it is; the released script loops over 1, 1.5, 2 and leaves
                 2 in force.
              4. The reply is decoded on the cache of the same prefill; the released script runs the prompt again.
              5. Later positions may not emit a control token; the released script does not forbid it.
              6. Control strings in user text become ordinary tokens; they can never become control ids.
              7. Every assistant turn of a dialogue opens with a token; turns before the labelled last one with [respond].
              8. A refusal at exactly the threshold is a refusal (>=), as in the script; ties of c* go to the first category.
              9. Under LoRA the control rows may have a learning rate of their own: a row of norm 3 moves by at most the
                 learning rate an entry and step, too little in some hundred steps. The paper trains all weights at one rate.

Limits        Thresholds belong to one template and system prompt: their file holds the template's hash and another one is
              refused; recalibrate with a `fit` that is given calibration rows and no train rows. Below 30 rows a category
              gets a warning. Hosted APIs apply `logit_bias` at every position: ask for one token first, then go on. It
              does not stop jailbreaks that start after the control token. What "refuse" means is what the labels say.
Reference code  github.com/neelsjain/refusal-tokens (no licence file; facts only).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from temper.core.card import Card, Claim

RESPOND = "[respond]"
REFUSE = "[refuse]"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of refusal tokens."""

    tokens: Literal["category", "single", "none"] = "category"
    """One refusal token per category (Sec. 3.2), one for all (Sec. 3.1), or none: plain SFT on the same data."""
    contrast: bool = True
    """Train on benign look-alikes too (rows whose `kind` is "contrast")."""
    placement: Literal["add", "reuse"] = "add"
    """Add vocabulary ids, or train unused special ids of the tokenizer (the shape of the checkpoint stays)."""
    mode: Literal["full", "lora"] = "full"
    """Train all weights (paper) or LoRA adapters and the control rows."""
    rank: int = 16
    """LoRA rank; unused in full mode."""
    lr: float = 2e-5
    """Peak learning rate (the recipe the authors name)."""
    token_lr: float = 0.0
    """Learning rate of the control rows under LoRA; 0 = `lr`. Few steps need more (Departure 9)."""
    num_epochs: int = 1
    """Passes over the training rows."""
    batch_rows: int = 128
    """Dialogues per optimiser step."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning-rate schedule."""
    warmup_ratio: float = 0.1
    """Share of the steps spent warming up."""
    max_tokens: int = 2048
    """Longest dialogue; a reply cut away by it is an error."""
    max_train_rows: int = 0
    """Train on the first rows after a seeded shuffle that keeps the share of each kind; 0 = all."""
    rule: Literal["gate", "sum", "ratio", "bias"] = "gate"
    """Decision rule at the first position."""
    choose: Literal["f1", "fpr", "rate", "cost"] = "f1"
    """How thresholds are chosen on the calibration rows."""
    average: Literal["micro", "macro"] = "micro"
    """F1 that thresholds by category maximise: of refusing at all, or the mean over categories."""
    fpr_max: float = 0.05
    """Largest false refusal rate on benign calibration rows (choose="fpr")."""
    refusal_rate: float = 0.1
    """Wanted share of refusals on the calibration rows (choose="rate")."""
    false_refusal_cost: float = 1.0
    """Cost of one false refusal against 1 for a missed one (choose="cost")."""
    temperature: float = 1.0
    """Divides the logits before the softmax that thresholds see."""
    selected: tuple[str, ...] = ()
    """Categories that thresholds tune (S); empty = all."""
    thresholds: dict[str, float] = field(default_factory=dict)
    """Thresholds set by hand, by category (single: the key "refuse"); they replace the chosen ones."""
    reply_tokens: int = 48
    """Longest reply written when measuring; 0 leaves the text out and reads first tokens only."""
    judge: str = "refusal-classifier"
    """Judge of the reply's text when measuring."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")
        if self.rule == "sum" and self.thresholds and len(set(self.thresholds.values())) > 1:
            raise ValueError("the sum rule has one threshold: give every category the same")


CARD = Card(
    title="Refusal tokens: calibrated refusals by a first control token",
    paper="arXiv:2412.06748",
    verbs=("fit", "measure"),
    config=Config,
    needs=frozenset({"generate", "logprobs", "grads"}),
    data={
        "fit": {"train?": "Dialogue", "calibration?": "Dialogue"},
        "measure": {"test": "Dialogue"},
    },
    produces=("adapter", "decoder"),
    claims=(
        Claim(
            id="tokens-do-not-hurt",
            sentence="Adding category tokens alone, without thresholds, does not lower F1 of refusals in the text.",
            metric="f1_text",
            arm="category",
            baseline="plain",
            direction="higher",
            margin=-0.02,
            paper="direction only; the abstract carries no figures",
        ),
        Claim(
            id="tuning-helps",
            sentence="Thresholds chosen on a held-out part raise F1 above the default decode.",
            metric="f1_gain",
            arm="category",
            baseline=0.0,
            direction="higher",
            paper="direction only",
        ),
        Claim(
            id="ranks-refusals",
            sentence="The refusal probability separates must-refuse from benign prompts (AUROC above 0.8).",
            metric="auroc",
            arm="category",
            baseline=0.8,
            direction="higher",
            paper="one model spans a whole refusal-rate curve",
        ),
        Claim(
            id="category-off",
            sentence="Switching a category off lowers its refusal rate by at least fifty points.",
            metric="off_drop",
            arm="category",
            baseline=0.5,
            direction="higher",
            paper="category tokens move one category's rate",
        ),
        Claim(
            id="little-spill",
            sentence="Switching a category off moves the other categories by at most ten points on average.",
            metric="off_spill",
            arm="category",
            baseline=0.1,
            direction="lower",
            paper="the others stay nearly unchanged",
        ),
        Claim(
            id="contrast-data",
            sentence="Contrast rows in training cut false refusals of look-alikes.",
            metric="contrast_refused",
            arm="single",
            baseline="no_contrast",
            direction="lower",
            paper="direction only",
        ),
        Claim(
            id="token-agrees-with-text",
            sentence="The token's verdict and the judge's verdict on the text agree on at least nine replies in ten.",
            metric="agreement",
            arm="category",
            baseline=0.9,
            direction="higher",
            paper="not reported",
        ),
    ),
)
