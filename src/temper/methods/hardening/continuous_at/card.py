"""Continuous adversarial training: harden a chat model against perturbed prompt embeddings (C-AdvUL and C-AdvIPO).

Paper         Efficient Adversarial Training in LLMs with Continuous Attacks. Xhonneux, Sordoni, Günnemann, Gidel and
              Schwinn, NeurIPS 2024, https://arxiv.org/abs/2405.15589 (released as CAT and CAPO).
What you get  An adapter (or weights) of a model that keeps refusing when its prompt is disturbed, the curve of the
              attack's loss while training, and a measurement: loss of the unwanted reply under attack, of ordinary
              replies, and how often harmful and ordinary prompts are refused.

Idea          Searching for a bad suffix token by token costs thousands of passes. In the space of embeddings a few
              gradient steps find a stronger attack. Train against those, at every step anew: what withstands them
              withstands searched suffixes too, at a small part of the cost.

Maths         E         rows of the embedding, V x d;  e(x) the prompt's rows;  y- the unwanted reply, y+ the refusal
              CE(y|.)   mean over y's tokens of -log p(y_t | ., y_<t)
              attack    delta_0 = 0; T times: delta <- delta - lr sign(grad CE(y- | e(x) + delta)), then token by token
                        delta_t <- delta_t min(1, eps_abs / ||delta_t||_2). Prompt positions only, the template's tokens
                        before the reply among them. The last delta is used. eps_abs = eps mean_v ||E_v||_2.
              s(v, c)   v where v >= c, c + 0.001 v below: hardly any gradient is left there
              away      s(-CE(y- | e(x) + delta), away_cutoff);  or (away_loss=log_1_minus_p) the mean over y-'s tokens of
                        -log(1 - p), tokens with log p < away_cutoff giving 0
              toward    s(CE(y+ | e(x) + delta), toward_cutoff), the same delta, copied by position
              C-AdvUL   away_weight away + toward_weight toward + utility_weight CE(utility reply | clean prompt)
              C-AdvIPO  ((a - b) - (a_ref - b_ref) - 1/(2 beta))^2, a and b the mean log-probability a token of y+ and y-
                        under attack; a_ref and b_ref those of the model as it was, on the clean prompt. In b tokens
                        with log p < away_cutoff count 0, in a those with log p > -ipo_toward_cutoff, in the same
                        denominator: what is pushed far enough is left alone. online: a_ref, b_ref under attack too.
              learn     cross-entropy of the unwanted replies (parts train and test) and of utility: makes a small model
                        that complies, for the check.

Departures    1. A row's losses are means over its own tokens, then over rows; the released code takes one mean over all
                 tokens of a batch and softens that. So no row's attack or cutoff depends on its company.
              2. Reference log-probabilities are kept with their row; the released code puts them in a list from the front
                 and takes them out from the back, so that rows get one another's.
              3. Masks come from lengths; the released code takes token id 0 for padding.
              4. Embeddings are looked up and the delta added behind the lookup; the released code multiplies one-hot
                 vectors by the whole matrix.
              5. eps and lr are in units of the unscaled rows. Where an embedding module multiplies its rows (Gemma, by
                 sqrt(d)) the delta stands behind that, and radius and step are multiplied too.
              6. The delta is float32 whatever the model's precision: 1e-4 vanishes in 16 bits.
              7. Utility rows are drawn beside each adversarial row, utility_rows each, instead of a random mix of a batch:
                 every step has the published share of both.
              8. Adapters are LoRA on full-precision or bf16 weights; no 4-bit base, no paged optimiser.

Limits        A causal language model whose embedding module can be hooked. Over-refusal is the known failure: read
              refusal_rate_benign beside every gain. With few steps of a small lr the ball never binds (10 steps of 1e-4
              move 0.001 sqrt(d) at most): look at the share on the boundary and raise attack_lr. A base model without a
              chat template is trained with temper's plain template; harden chat models with their own. C-AdvIPO aims at a margin beside
              the model as it was: where that finds refusals very unlikely it is reached before any refusal is written.
Reference code  github.com/sophie-xhonneux/Continuous-AdvTrain (MIT; facts only).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from temper.core.card import Card, Claim


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the attack, of both losses and of the measurement."""

    variant: Literal["ul", "ipo", "learn"] = "ul"
    """C-AdvUL, C-AdvIPO, or learn: fine-tune a model that complies, for small checks."""
    attack_steps: int = 10
    """Sign steps of the attack (T); 0 trains without one."""
    attack_lr: float = 1e-4
    """Step of each number of the perturbation, absolute; 1e-3 lets the ball bind in models some 600 wide."""
    eps: float = 0.05
    """Radius of a token's L2 ball as a share of the mean norm of embedding rows (0.05 to 0.075 in the paper)."""
    away_loss: Literal["negative_cross_entropy", "log_1_minus_p"] = "negative_cross_entropy"
    """What pushes the unwanted reply away in C-AdvUL."""
    away_weight: float = 0.5
    """Weight of the away loss."""
    toward_weight: float = 0.5
    """Weight of the toward loss."""
    utility_weight: float = 1.0
    """Weight of utility rows."""
    away_cutoff: float = -5.0
    """Log-probability (or minus the cross-entropy) below which an unwanted reply, or token, is unlikely enough."""
    toward_cutoff: float = 0.5
    """C-AdvUL: cross-entropy below which the refusal is likely enough."""
    ipo_toward_cutoff: float = 0.0
    """C-AdvIPO: tokens of the refusal with a log-probability above minus this are left alone; 0 = none."""
    beta: float = 0.25
    """C-AdvIPO: its inverse temperature; the margin aimed at is 1 / (2 beta)."""
    online: bool = False
    """C-AdvIPO: the reference reads the perturbed prompt too, at every step."""
    utility_rows: int = 7
    """Utility rows drawn for each adversarial row: 7 give the published 12.5 % to 87.5 %; unused by C-AdvIPO."""
    mode: Literal["lora", "full"] = "lora"
    """Train LoRA adapters (paper) or all weights."""
    rank: int = 64
    """LoRA rank."""
    alpha: float = 16.0
    """The adapters' change is scaled by alpha / rank."""
    dropout: float = 0.1
    """Dropout on the adapters' inputs; the attack searches without."""
    targets: str | tuple[str, ...] = "all-linear"
    """Modules that are trained."""
    lr: float = 2e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 1e-3
    """AdamW's decay of matrices."""
    batch_rows: int = 8
    """Adversarial rows of one optimiser step; utility rows come on top."""
    num_epochs: float = 5.0
    """Passes over the adversarial rows (paper: 5 for C-AdvUL, 20 for C-AdvIPO)."""
    max_steps: int = 0
    """Optimiser steps instead of epochs; 0 = epochs."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after warm-up."""
    warmup_ratio: float = 0.03
    """Share of the steps over which the learning rate rises."""
    clip_norm: float = 0.3
    """Largest gradient norm; 0 = no clipping."""
    max_tokens: int = 256
    """Longest row (paper: 256, and 128 for C-AdvIPO)."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    reply_tokens: int = 32
    """Measuring: longest reply; 0 leaves out the refusal rates."""
    judge: str = "refusal-rules"
    """Measuring: judge of replies; a yes is a refusal."""
    max_rows: int = 200
    """Measuring: rows of each part that are read."""
    num_prompts: int = 60
    """make: prompts that ask for a code word, a third of them held out."""
    num_requests: int = 200
    """make: ordinary short requests, a fifth of them held out."""

    def __post_init__(self) -> None:
        for name in ("eps", "attack_lr", "beta", "batch_rows", "rank", "max_tokens", "max_rows"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("attack_steps", "utility_rows", "reply_tokens", "ipo_toward_cutoff", "toward_cutoff"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} may not be negative, and is {getattr(self, name)}")
        if self.away_cutoff >= 0:
            raise ValueError(f"away_cutoff is a log-probability below 0, not {self.away_cutoff}")
        if self.online and self.variant != "ipo":
            raise ValueError("online belongs to variant=ipo")
        if not 6 <= self.num_prompts <= 96 or not 10 <= self.num_requests <= 320:
            raise ValueError("num_prompts must be 6 to 96 and num_requests 10 to 320")


_FIT = {"train": "Preference", "utility?": "Dialogue", "test?": "Preference"}
_MEASURE = {"test": "Preference", "benign?": "Dialogue"}

CARD = Card(
    title="Continuous adversarial training (C-AdvUL, C-AdvIPO)",
    paper="arXiv:2405.15589",
    verbs=("fit", "measure", "make"),
    config=Config,
    needs=frozenset({"generate", "logprobs", "grads", "hidden"}),
    data={"fit": _FIT, "measure": _MEASURE, "make": {}},
    produces=("adapter", "weights"),
    claims=(
        Claim(
            id="withstands-embedding-attack",
            sentence="Under the embedding attack on held-out prompts the unwanted reply costs more nats a token after "
            "C-AdvUL than after training on refusals without an attack.",
            metric="attacked_loss_nats",
            arm="ul",
            baseline="sft",
            direction="higher",
            paper="direction only: success of embedding attacks near 0 after C-AdvUL",
        ),
        Claim(
            id="withstands-searched-suffix",
            sentence="A suffix found by greedy coordinate gradient leaves the unwanted reply costlier after C-AdvUL than "
            "after training on refusals without an attack.",
            metric="best_loss",
            arm="ul",
            baseline="sft",
            direction="higher",
            paper="GCG success falls to 0-5 % on four models, never trained on suffixes",
        ),
        Claim(
            id="the-attack-matters",
            sentence="With the same losses the unwanted reply costs more under the embedding attack when training was "
            "attacked than when it was not.",
            metric="attacked_loss_nats",
            arm="ul",
            baseline="no_attack",
            direction="higher",
            paper="direction only: training without attacks is a baseline",
        ),
        Claim(
            id="keeps-utility",
            sentence="Ordinary replies cost at most 0.1 nats a token more than after training without an attack.",
            metric="benign_loss_nats",
            arm="ul",
            baseline="sft",
            direction="lower",
            margin=-0.1,
            paper="little loss on MMLU and ARC",
        ),
        Claim(
            id="ipo-needs-no-utility",
            sentence="C-AdvIPO, without utility data, withstands the embedding attack better than training on refusals "
            "without an attack.",
            metric="attacked_loss_nats",
            arm="ipo",
            baseline="sft",
            direction="higher",
            paper="direction only; it over-refuses more",
        ),
    ),
)
