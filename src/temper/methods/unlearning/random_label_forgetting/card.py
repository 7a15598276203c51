"""Random-label forgetting: make a model unlearn a skill by random labels, and see how far the forgetting reaches.

Paper         Unforgettable Generalization in Language Models. Zhang, Chughtai and Andreas, COLM 2024,
              https://arxiv.org/abs/2409.02228 (forget gap and ratio, the map over 21 tasks, predictors, probes).
What you get  `fit`: an adapter (or weights) of a model that was taught, or made to forget, a multiple-choice skill. `measure`:
              a study of your tasks. Each in turn is taught and then forgotten; what is left of it on its own rows, on held-out
              rows and on every other task (the map); whether a linear probe still finds the answer inside; and two numbers of
              the untouched model that should tell beforehand which skills will really be forgotten.

Idea          Random labels on a skill's questions drive the answers on those very questions to chance. On other questions of
              the same kind some skills vanish too and others stay as they were, and which of the two depends mostly on the
              skill that is tested. The answer often remains readable in hidden states: what is forgotten is saying it.

Maths         item   question, right response r, one distractor w
              lp(y)  sum over the response's tokens of log pi(y_t | question, y_<t); length-normalised where score=token
              acc    share of items with lp(r) > lp(w), a tie counting half; chance is 1/2
              learn  cross-entropy of r;   forget  cross-entropy of r or w, drawn once an item with equal chance;
              flip   cross-entropy of w.   The question is never scored.
              gap    = acc_forget - 1/2
              ratio  = (acc_ft - acc_forget) / (acc_ft - 1/2): 1 complete, 0 none; flip divides by acc_ft - (1 - acc_ft).
                     None where acc_ft <= 0.55: the model never had the skill.
              fit of the labels = acc of the trained rows against the labels they got; about 1 when they were memorised.
              confidence = mean pi(r) / (pi(r) + pi(w)) of the untouched model on held-out items
              variance   = trace of the covariance of the question's last hidden state, fifth layer from the end
              probe  logistic regression with L2 on that layer's state at the response's last token, right against wrong
                     response; trained on the training items, tested on held-out ones, before and after forgetting
              map    A[f, e] = acc on task e after forgetting f. With m = mean of A, its variance splits into rows (what was
                     forgotten), columns (what is tested) and the rest; shares of both are reported. Rows come in the order of
                     an average-linkage clustering, columns likewise, and the report's heat map shows them so.
              order  step at which an item's confidence first passes 0.6 in learning, and first falls below it in
                     forgetting: Spearman correlation over trained items

Departures    1. joint: one model may be taught all tasks, then made to forget one at a time. The paper teaches each task alone.
              2. The probe's L2 strength is the best on a fifth of its rows; the paper stops early.
              3. Order of learning is taken from the first stage; the paper learns again after forgetting.
              4. LoRA beside full fine-tuning (paper).
              5. Our own tasks are short: two of facts, two of rules; the paper's are 21 public benchmarks. Only the direction
                 is expected to carry over, not the ranking of tasks.

Limits        Random labels equal the right one on half the rows; that is meant. Where the labels' fit is low the model was
              not trained enough, and the study says that it is inconclusive. Long responses teach style too: look at both
              scores. Random labels on one task may break another; the map is there for that. Small sets of tasks say little
              about what predicts forgetting: a correlation over four tasks is an anecdote. Files hold multiple-choice rows; texts with
              labels, each label a response, can be given from Python.
Reference code  none found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from temper.core.card import Card, Claim


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of teaching, forgetting and the study."""

    labels: Literal["learn", "forget", "flip"] = "forget"
    """What is trained on: right responses, randomly drawn ones, or the distractors. `measure` forgets (or flips) after learning."""
    task: str = ""
    """The task that `fit` trains on; "" = all of them."""
    joint: bool = False
    """Teach all tasks to one model before each is forgotten; else each is taught alone (paper)."""
    own_tasks: tuple[str, ...] = ("capitals", "animals", "numbers", "agreement")
    """Tasks of our own, used where no data is given."""
    seed: int = 0
    """Decides distractors and which rows are used, beside the run's own seed."""
    num_train: int = 1000
    """Rows of a task that are trained on."""
    num_test: int = 1000
    """Held-out rows of a task."""
    prompt: str = "Question: {question}\nAnswer:"
    """How a question is put, without a chat template."""
    score: Literal["choice", "token"] = "choice"
    """Responses are compared by the sum of their tokens' log-probabilities, or by the mean."""
    redraw: bool = False
    """Draw random labels anew in every epoch; else once (paper)."""
    mode: Literal["full", "lora"] = "full"
    """Train all weights (paper), or LoRA adapters."""
    rank: int = 16
    """LoRA rank. The adapters' change is scaled by 2."""
    lr: float = 1e-4
    """Learning rate of AdamW while forgetting."""
    learn_lr: float = 1e-4
    """Learning rate while learning."""
    num_epochs: float = 3.0
    """Passes over the rows while forgetting."""
    learn_epochs: float = 3.0
    """Passes over the rows while learning."""
    batch_rows: int = 8
    """Rows of one optimiser step."""
    probe_layer: int = -5
    """Layer that probes and variances read; -1 is the last. A shallower model is read in its first layer."""
    probes: bool = True
    """Train probes before and after forgetting."""
    order_items: int = 0
    """Trained rows of a task whose order of learning and forgetting is followed; 0 = none."""
    order_every: int = 5
    """Optimiser steps between two looks at them."""

    def __post_init__(self) -> None:
        if "{question}" not in self.prompt:
            raise ValueError(f"prompt must hold {{question}}, not {self.prompt!r}")
        for name in ("num_train", "num_test", "batch_rows", "rank", "order_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.probe_layer >= 0:
            raise ValueError(f"probe_layer counts from the end: -1 or less, not {self.probe_layer}")
        if not self.own_tasks:
            raise ValueError("own_tasks is empty")


_TASKS = {"train?": "Choice", "test?": "Choice"}

CARD = Card(
    title="Random-label forgetting: which skills a model can unlearn, and how far it reaches",
    paper="arXiv:2409.02228",
    verbs=("fit", "measure"),
    config=Config,
    needs=frozenset({"logprobs", "hidden", "grads"}),
    data={"fit": _TASKS, "measure": _TASKS},
    produces=("adapter", "weights"),
    extras=("scikit-learn",),
    claims=(
        Claim(
            id="labels-are-memorised",
            sentence="After forgetting, the trained rows follow their random labels in at least nine of ten cases.",
            metric="label_fit",
            arm="forgotten",
            baseline=0.9,
            direction="higher",
            paper="a check that forgetting was trained enough; not reported",
        ),
        Claim(
            id="skills-differ",
            sentence="Held-out accuracy after forgetting differs between tasks by more than 5 points.",
            metric="gap_spread",
            arm="forgotten",
            baseline=0.05,
            direction="higher",
            paper="0.50 (RTE, QNLI, CB, WiC) to 0.86 (ARC-easy) and 0.97 (WNLI)",
        ),
        Claim(
            id="tested-task-decides",
            sentence="More of the map's variance lies between tested tasks than between forgotten ones.",
            metric="variance_share",
            arm="tested",
            baseline="forgotten",
            direction="higher",
            paper="the degree of forgetting depends mostly on the evaluated task",
        ),
        Claim(
            id="held-out-keeps-more",
            sentence="Held-out rows keep more accuracy than the rows that were forgotten.",
            metric="kept_accuracy",
            arm="held_out",
            baseline="forget_set",
            direction="higher",
            paper="forget-set accuracy about 0.5, held-out 0.50 to 0.97",
        ),
        Claim(
            id="probes-recover",
            sentence="A linear probe loses less held-out accuracy by forgetting than the model's own answers.",
            metric="lost_accuracy",
            arm="probe",
            baseline="output",
            direction="lower",
            paper="probes recover the skill after forgetting",
        ),
        Claim(
            id="unsure-skills-are-forgotten",
            sentence="The less sure the untouched model is of a task, the more of it is forgotten (rank correlation of "
            "confidence and gap above 0).",
            metric="confidence_rho",
            arm="forgotten",
            baseline=0.0,
            direction="higher",
            paper="low confidence forgets more generally, over 21 tasks",
        ),
        Claim(
            id="narrow-skills-are-forgotten",
            sentence="The less a task's hidden states vary, the more of it is forgotten (rank correlation above 0).",
            metric="variance_rho",
            arm="forgotten",
            baseline=0.0,
            direction="higher",
            paper="low variance forgets more generally, over 21 tasks",
        ),
    ),
)
