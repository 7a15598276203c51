"""Negative preference optimisation: unlearn chosen answers by a bounded loss, beside the whole family it is compared with.

Paper         Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning. Zhang, Lin, Bai and
              Mei, COLM 2024, https://arxiv.org/abs/2404.05868 (Eq. 3: the loss; Sec. 3: its gradient and the limit of
              beta; Sec. 4: the logistic toy; Sec. 5: TOFU). Metrics: TOFU, https://arxiv.org/abs/2401.06121.
What you get  An adapter (or weights) of a model that no longer gives the answers of a forget set and keeps the rest, the
              curve of what it kept against what it forgot, and the TOFU report: probability, ROUGE-L recall and truth
              ratio of every split, model utility, forget quality, memorisation, membership, fluency. Also the fit that
              makes a target model to unlearn from (loss=learn).

Idea          Gradient ascent pushes the forget answers' likelihood down without bound, and soon everything with it. Take
              the DPO loss and delete its winner: what is left pushes an answer down only until it is unlikely under the
              frozen reference, then lets go. Summed with a loss that keeps the retain set, it forgets half of TOFU.

Maths         x, y     prompt and answer;  T(y) the answer's tokens with the end-of-turn token
              lp(y)    sum over T(y) of log pi(y_t | x, y_<t): a sum, never a mean;  lp_ref the same under pi_ref
              pi_ref   the model as it was when unlearning began (the fine-tuned target), frozen
              ga       (1/N) sum of lp(y) over rows, N = number of answer tokens: minus the token-mean cross-entropy
              npo      -(2/beta) mean_i log sigmoid(-beta (lp(y_i) - lp_ref(y_i)))                              (Eq. 3)
                       its gradient is that of mean_i lp(y_i) times W_i = 2 pi^beta / (pi^beta + pi_ref^beta), pi = e^lp:
                       1 at the start, towards 0 once an answer is unlikely. beta -> 0 gives W_i = 1: gradient ascent.
              simnpo   -(2/beta) mean_i log sigmoid(beta (-lp(y_i) / |T(y_i)| - delta)); needs no reference
              dpo      -(2/beta) mean_i log sigmoid(beta [(lp(z_i) - lp_ref(z_i)) - (lp(y_i) - lp_ref(y_i))]),
                       z_i an "I don't know" reply to x_i
              kto      (2/beta) mean_i [1 - sigmoid(k - beta (lp(y_i) - lp_ref(y_i)))],  k = mean_i (lp(z_i) - lp_ref(z_i))
                       over the step, without gradient
              idk      token-mean cross-entropy of z_i
              + rt     token-mean cross-entropy of retain answers
              + kl     mean over positions of KL(pi_ref(. | context) || pi(. | context)) on retain rows
              + fkl    the same on forget rows
              A loss is named by its parts: ga, ga+rt (GradDiff), ga+kl, ga+fkl, npo, npo+rt, npo+kl, idk+rt, dpo, ...
              total    forget_weight * forget term + retain_weight * each further term
              Metrics: P~(a | q) = exp((1/|T(a)|) lp(a)). R = agg_j P~(wrong_j | q) / P~(paraphrased answer | q) (real facts:
              the plain answer), agg the geometric or arithmetic mean. Truth ratio: forget mean min(R, 1/R), others
              mean max(0, 1 - R). Model utility: harmonic mean of {probability, ROUGE, truth ratio} x {retain, neighbours,
              world facts}; 0 when one is 0. Forget quality: p of the two-sample KS test between the R of this model and
              of a retain-only model on the forget set. Extraction strength: 1 - k/|T|, k the first position from which
              every token is the greedy one. PrivLeak: 100 ((1 - auc) - (1 - auc_ref)) / (1 - auc_ref), auc of telling
              forget from holdout rows by the mean of the least likely 40 % of token log-probabilities.

Departures    1. KL is averaged over real tokens; the released code averages over every position, prompt and padding
                 included (kl_positions=all gives that, every row padded to the longest retain row; answer is stricter).
              2. lp_ref is computed once, before training, and kept; the released code runs a second model at every
                 step. Only kl needs the reference's logits, and takes them from the same weights with the change off.
              3. Generation is greedy; the released evaluation samples.
              4. A step's loss is divided by the counts of the whole step (tokens or rows), so accumulation changes
                 nothing; the released code averages micro-batch means.
              5. The "I don't know" reply of a row is drawn once per run, so that its lp_ref can be kept; the released
                 code draws anew at every epoch.
              6. kto: the constant stands inside the mean, which moves the loss and not its gradient.
              7. Small forget sets: at least min_steps optimiser steps. Ten epochs of a dozen rows are ten steps.
              8. Truth ratios in the log domain: nothing overflows where a probability has vanished.
              9. Training stops when the forget answers' NLL passes max_forget_nll; gradient ascent has no floor. The
                 report says so, in the table "How unlearning ended" of the step.
              10. idk+rt sums two token means; the released code takes one mean over the tokens of both.

Limits        Without a retain set only ga, npo, simnpo, dpo, kto, idk and + fkl can run; the others stop and say so. A
              retain set should be written as the forget set is. A model that never learnt the forget answers has little
              to unlearn; what it says of them still becomes less likely. Forget quality needs a retain-only model and is
              None without one; it rises and then falls again, because over-unlearned answers look different too.
              Answers that a fine-tune brings back were hidden, not gone: measure that with an attack.
Reference code  github.com/licong-lin/negative-preference-optimization (no licence file; facts only).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from temper.core.card import Card, Claim
from temper.core.errors import nearest

FORGET_NAMES = ("ga", "npo", "simnpo", "dpo", "kto", "idk")
TERM_NAMES = ("rt", "kl", "fkl")
LEARN = "learn"
ALIASES = {"graddiff": "ga+rt"}


def loss_parts(name: str) -> tuple[str, tuple[str, ...]]:
    """A loss's forget part and its further terms; raises ValueError with the nearest name for an unknown one."""
    forget, *terms = ALIASES.get(name, name).split("+")
    if forget not in (*FORGET_NAMES, LEARN):
        raise ValueError(
            f"there is no forget loss {forget!r}. {nearest(forget, (*FORGET_NAMES, LEARN, *ALIASES))}"
        )
    if forget == LEARN and terms:
        raise ValueError("learn is plain fine-tuning and takes no further term")
    for term in terms:
        if term not in TERM_NAMES or terms.count(term) > 1:
            raise ValueError(
                f"{term!r} in {name!r} is no term, or stands twice. Known: {', '.join(TERM_NAMES)}"
            )
    return forget, tuple(terms)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the unlearning losses and of the evaluation."""

    loss: str = "npo+rt"
    """Forget loss and its further terms: ga, npo, simnpo, dpo, kto or idk, with +rt, +kl, +fkl; or learn, which
    fine-tunes on forget and retain rows to make a target model."""
    beta: float = 0.1
    """Inverse temperature (Eq. 3); towards 0 npo becomes gradient ascent. Log-probabilities are sums: it scales with answer length."""
    delta: float = 0.0
    """Margin of simnpo in nats a token."""
    forget_weight: float = 1.0
    """Coefficient of the forget term (gamma)."""
    retain_weight: float = 1.0
    """Coefficient of each further term (alpha)."""
    kl_positions: Literal["nonpad", "answer", "all"] = "nonpad"
    """Positions that kl averages over: real tokens, those that predict the answer, or all with padding (released code)."""
    mode: Literal["full", "lora"] = "full"
    """Train all weights (paper) or LoRA adapters."""
    rank: int = 8
    """LoRA rank; unused in full mode. The adapters' change is scaled by 2."""
    lr: float = 1e-5
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.01
    """AdamW's decay of matrices."""
    batch_rows: int = 32
    """Forget rows of one optimiser step; as many retain rows go with them."""
    num_epochs: float = 10.0
    """Passes over the forget set (learn: over forget and retain)."""
    min_steps: int = 60
    """At least so many optimiser steps, going round a small forget set as often as that takes; 0 = epochs only (paper)."""
    max_steps: int = 0
    """At most so many optimiser steps; 0 = no limit."""
    warmup_epochs: float = 1.0
    """Passes over the forget set during which the learning rate rises; then it falls linearly to 0."""
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    """Learning rate after warm-up."""
    clip_norm: float = 1.0
    """Largest gradient norm; 0 = no clipping."""
    max_tokens: int = 500
    """Longest row; one whose answer is cut away entirely is an error."""
    max_forget_nll: float = 40.0
    """Stop when the forget answers cost more than so many nats a token (uniform guessing costs about 11); 0 = never."""
    idk_replies: tuple[str, ...] = (
        "I don't know.",
        "I'm not sure about that.",
        "I have no information about that.",
        "That is not something I know.",
        "I'm afraid I can't say; I don't know the answer.",
        "I haven't learned anything about this.",
        "I'm not familiar with that topic.",
        "I do not have an answer to that question.",
    )
    """Replies of which idk, dpo and kto give each forget row one; a row's own column `idk` comes first."""
    watch_every: int = 10
    """Steps between looks at the forget and retain probability while training; 0 = none. Curves go to the report."""
    watch_rows: int = 32
    """Rows of each part that are looked at."""
    agg: Literal["geometric", "arithmetic"] = "geometric"
    """Mean of the wrong answers' probabilities in the truth ratio: geometric (released code) or arithmetic (TOFU's text)."""
    max_rows: int = 300
    """Rows of each split that are measured (TOFU's cap)."""
    reply_tokens: int = 128
    """Longest reply written when measuring; 0 leaves generation out, and with it ROUGE, utility and fluency."""
    reference: str = ""
    """The retain-only model for forget quality and PrivLeak: a system spec, or a run folder or rows.jsonl of its measure."""
    path: bool = False
    """Measure the way instead of the end: unlearn a copy with these settings, report what is kept at fixed levels of
    forgetting and how the last model writes, and throw the copy away."""
    levels: tuple[float, ...] = (0.5, 0.2, 0.05)
    """Forget probabilities at which `path` reads off the retain probability."""
    toy: bool = False
    """Measure the paper's logistic-regression toy instead of the system."""
    toy_seeds: tuple[int, ...] = (1000, 2000, 3000, 4000, 5000)
    """Seeds of the toy."""
    toy_steps: int = 10_000
    """Unlearning steps of the toy."""
    toy_pretrain_steps: int = 20_000
    """Gradient steps that fit the toy's target and retain-only models."""

    def __post_init__(self) -> None:
        loss_parts(self.loss)
        for name in ("beta", "batch_rows", "max_tokens", "rank"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.path and not self.watch_every:
            raise ValueError("path needs watch_every above 0")
        if any(not 0 < level < 1 for level in self.levels):
            raise ValueError(f"levels are probabilities between 0 and 1, not {self.levels}")


_PEOPLE = {"forget": "Dialogue", "retain?": "Dialogue"}
_SPLITS = {"holdout?": "Dialogue", "neighbours?": "Dialogue", "world_facts?": "Dialogue"}

CARD = Card(
    title="Negative preference optimisation: unlearning without collapse",
    paper="arXiv:2404.05868",
    verbs=("fit", "measure"),
    config=Config,
    needs=frozenset({"generate", "logprobs", "grads"}),
    data={"fit": _PEOPLE, "measure": {**_PEOPLE, **_SPLITS}},
    produces=("weights", "adapter"),
    claims=(
        Claim(
            id="toy-ga-drifts-linearly",
            sentence="In the logistic toy gradient ascent moves the parameters as far in the second half of "
            "10,000 steps as in the first.",
            metric="toy_ga_drift_ratio",
            arm="npo",
            baseline=1.5,
            direction="higher",
            paper="drift grows linearly in time: a ratio of 2",
        ),
        Claim(
            id="toy-npo-slows-down",
            sentence="In the logistic toy NPO's parameters drift more slowly the longer it runs.",
            metric="toy_npo_drift_ratio",
            arm="npo",
            baseline=1.5,
            direction="lower",
            paper="drift grows logarithmically in time",
        ),
        Claim(
            id="toy-ga-diverges",
            sentence="After 2000 steps of the toy gradient ascent is further from the retain-only model than NPO (KL, nats).",
            metric="toy_retain_kl_gap",
            arm="npo",
            baseline=0.0,
            direction="higher",
            paper="GA's retain distance diverges, NPO's plateaus (figure)",
        ),
        Claim(
            id="keeps-more",
            sentence="When the forget answers have come down to probability 0.2, NPO has kept more of the retain "
            "answers' probability than gradient ascent.",
            metric="retain_probability_at_0.2",
            arm="npo",
            baseline="ga",
            direction="higher",
            paper="better trade-off on TOFU at every size of the forget set (figures)",
        ),
        Claim(
            id="keeps-more-with-retain",
            sentence="The same with a retain term on both: NPO+RT against GradDiff.",
            metric="retain_probability_at_0.2",
            arm="npo_rt",
            baseline="ga_rt",
            direction="higher",
            paper="better trade-off on TOFU at every size of the forget set (figures)",
        ),
        Claim(
            id="ends-with-more",
            sentence="After the same number of steps NPO's retain answers are more probable than gradient ascent's.",
            metric="retain_probability_end",
            arm="npo",
            baseline="ga",
            direction="higher",
            paper="GA collapses with training, NPO does not",
        ),
        Claim(
            id="writes-sensibly",
            sentence="After the same number of steps NPO's replies to forget questions repeat themselves less than "
            "gradient ascent's.",
            metric="forget_repetition",
            arm="npo",
            baseline="ga",
            direction="lower",
            paper="GA gives gibberish, NPO sensible text (examples)",
        ),
    ),
)
