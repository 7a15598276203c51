"""Learned prompts for CLIP: one static prompt (CoOp), or one that each picture moves, so that it still fits unseen classes (CoCoOp).

Paper         Conditional Prompt Learning for Vision-Language Models. Zhou, Yang, Loy and Liu, CVPR 2022,
              https://arxiv.org/abs/2203.05557 (Sec. 3.2: CoCoOp; Sec. 4.1: base to new; 4.2: cross-dataset; 4.3: domains).
              CoOp: Learning to Prompt for Vision-Language Models. Zhou, Yang, Loy and Liu, IJCV 2022,
              https://arxiv.org/abs/2109.01134 (Sec. 3.2: unified and class-specific context, place of the class token).
What you get  A classifier of a frozen CLIP whose text prompt is learned from a few labelled pictures a class. The artefact
              holds the context vectors and the meta-net and nothing else: prompts are built anew for whatever class names are
              asked for. With it the paper's protocols: base to new, other data sets, other domains, zero-shot and a linear
              probe beside them. The report shows the words nearest to each vector, which visual tokens the score of the
              right class comes from, and what the shift of each picture changes.

Idea          The words around a class name ("a photo of a ...") decide much of CLIP's accuracy. CoOp replaces them by free
              vectors and trains those alone, through the frozen text tower. Such a prompt fits the classes it was trained on
              and loses others. CoCoOp adds to every context vector a shift computed from the picture's own vector, so that
              the prompt describes an instance instead of a set of classes.

Maths         f, g     image and text tower;  z = f(x) / ||f(x)||, of width E;  s the exponential of CLIP's logit scale
              V        M context vectors of width D, learned: shared by all classes, or one set a class (per_class)
              t_i      prompt of class i: [first][V][embedding of name i][ending][end]  (position: end, middle, front)
              w_i      g(t_i) read at the end token, projected, of length 1
              CoOp     p(i | x) = softmax_i (s <z, w_i>);  loss = -log p(y | x)                    (CoOp, Eq. 2 and 3)
              h        meta-net: Linear(E, E // 16), ReLU, Linear(E // 16, D)
              CoCoOp   pi = h(z), v_m(x) = v_m + pi for every m, t_i(x) with them, w_i(x) = g(t_i(x)),
                       p(i | x) = softmax_i (s <z, w_i(x)>)                                        (Sec. 3.2)
              b, n     accuracy on base pictures among base names, and on new pictures among new names
              H        2 b n / (b + n), 0 when either is 0;  gap  b - n
              Base are the first half of the classes in the order of their labels, rounded up; new the rest.

Departures    1. Prompts are built from ids; no placeholder word stands in a text, so none can be split into two tokens.
              2. The end token is the tokenizer's; the released code takes the largest id, which is true of CLIP's own only.
              3. The learning rate rises over the first epoch and falls by a cosine of the step; the released code holds 1e-5
                 for the first epoch and changes it once an epoch.
              4. All of a batch's prompts are one tensor, (B * C) rows, split by the run's token budget; the released code
                 loops over pictures with batch 1.
              5. float32 or bf16 autocast; the released code trains CoCoOp in fp16.
              6. Rows end behind the longest prompt instead of at 77 tokens; what stands behind the end is never read.
              7. Crops are cut from the picture as the model takes it, resized and cut to its square; the released code
                 cuts them from the file. augment: false takes the pictures' vectors once, before training.
              8. Without `name` or text labels it stops: prompts of bare numbers mean nothing.

Limits        Classes need names that the tokenizer knows and that fit beside the context. Pictures of other sizes are
              resized and cropped as the model's own image processor does. per_class prompts know only the
              classes they were trained on. CoCoOp runs the text tower once a picture and class: with 1000 classes a step of
              one picture costs as much as 1000 texts. A linear probe has no scores for new classes. Where CLIP already
              separates the new classes well there is little to lose, and CoOp's weakness stays small.
              The meta-net of a small CLIP has few units (E // 16); a large learning rate can switch all of them off for every
              picture, and CoCoOp is then CoOp with another start. The report's table of shifts tells.
Reference code  github.com/KaiyangZhou/CoOp (MIT; facts only).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from temper.core.card import Card, Claim

__all__ = ["CARD", "Config"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the prompts, of their training and of what is measured; the defaults are the paper's for CoCoOp."""

    kind: Literal["cocoop", "coop"] = "cocoop"
    """Context moved by each picture, or one static context."""
    protocol: Literal["base-to-new", "all"] = "base-to-new"
    """Learn and measure half of the classes and the other half apart, or all classes together (cross-dataset, domains)."""
    base: tuple[str, ...] = ()
    """Names of the base classes; () is the first half."""
    new: tuple[str, ...] = ()
    """Names of the new classes where `base` is given; () is all others."""
    shots: int = 16
    """Training pictures a class, drawn by the seed; a class with fewer gives all."""
    init_words: str = "a photo of a"
    """Words whose embeddings the context starts from, one vector a token; "" draws `num_context` vectors."""
    num_context: int = 16
    """Context vectors where init_words is "" (CoOp's M)."""
    position: Literal["end", "middle", "front"] = "end"
    """Where the class name stands in the prompt."""
    ending: str = "."
    """What follows the name."""
    per_class: bool = False
    """One set of context vectors a class (CoOp's CSC); such prompts know no new classes."""
    lr: float = 0.002
    """Peak learning rate of SGD. A small CLIP needs 0.05 to 0.1."""
    momentum: float = 0.9
    """Of SGD (the released framework's default)."""
    weight_decay: float = 5e-4
    """Of SGD (the released framework's default)."""
    num_epochs: int = 10
    """Passes over the pictures (CoOp: 200 with 16 or 8 shots, 100 with 4 or 2, 50 with 1 and on ImageNet)."""
    batch_rows: int = 1
    """Pictures of one step (CoOp: 32)."""
    augment: bool = True
    """A random crop, resized, mirrored half the time, at every look; else each picture's vector is taken once."""
    chunk_prompts: int = 2000
    """Prompts that go through the text tower together when CoCoOp is asked for scores."""
    max_rows: int = 0
    """Test pictures that are measured; 0 = all."""
    domain_column: str = ""
    """Column that names a picture's domain: accuracy is then reported for each."""
    source_domain: str = ""
    """The domain that was learned; the mean over the others is reported as accuracy_shifted."""
    probe: bool = False
    """Train a linear probe on the image vectors of `shots` rows of the part train and report its accuracy too."""
    label: str = ""
    """Put before the names of the metrics, to tell the steps of one experiment apart."""

    def __post_init__(self) -> None:
        for name in ("shots", "num_context", "num_epochs", "batch_rows", "chunk_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")
        if self.per_class and self.kind == "cocoop":
            raise ValueError("per_class belongs to coop: cocoop shares its context between classes")
        if self.source_domain and not self.domain_column:
            raise ValueError("source_domain needs domain_column, the column that names a row's domain")
        if self.new and not self.base:
            raise ValueError("new needs base: name the classes that are learned as well")


_TRAIN = {"train": "Labelled"}

CARD = Card(
    title="CoOp and CoCoOp: learned prompts for CLIP",
    paper="arXiv:2203.05557",
    verbs=("fit", "measure"),
    config=Config,
    needs=frozenset({"see", "classify", "grads"}),
    data={"fit": _TRAIN, "measure": {"test": "Labelled", "train?": "Labelled"}},
    kinds=("DualEncoder",),
    produces=("steer",),
    extras=("pillow", "scikit-learn"),
    claims=(
        Claim(
            id="coop-learns-base",
            sentence="On the classes it was trained on, CoOp is more than 5 points more accurate than the zero-shot model.",
            metric="accuracy_base",
            arm="coop",
            baseline="zero_shot",
            direction="higher",
            margin=0.05,
            paper="mean of 11 data sets, ViT-B/16, 16 shots: 69.34 -> 82.69",
        ),
        Claim(
            id="cocoop-learns-base",
            sentence="On the classes it was trained on, CoCoOp is more than 5 points more accurate than the zero-shot model.",
            metric="accuracy_base",
            arm="cocoop",
            baseline="zero_shot",
            direction="higher",
            margin=0.05,
            paper="69.34 -> 80.47",
        ),
        Claim(
            id="coop-loses-new",
            sentence="On unseen classes CoOp is less accurate than the zero-shot model.",
            metric="accuracy_new",
            arm="coop",
            baseline="zero_shot",
            direction="lower",
            paper="74.22 -> 63.22",
        ),
        Claim(
            id="coop-loses-new-attribute",
            sentence="The same where the unseen classes differ in another attribute (base: ten shapes in one colour, new: one "
            "shape in the other colours).",
            metric="attribute_accuracy_new",
            arm="coop",
            baseline="zero_shot",
            direction="lower",
            paper="74.22 -> 63.22",
        ),
        Claim(
            id="cocoop-keeps-new",
            sentence="On unseen classes CoCoOp is more accurate than CoOp.",
            metric="accuracy_new",
            arm="cocoop",
            baseline="coop",
            direction="higher",
            paper="63.22 -> 71.69",
        ),
        Claim(
            id="cocoop-keeps-new-attribute",
            sentence="The same where the unseen classes differ in another attribute.",
            metric="attribute_accuracy_new",
            arm="cocoop",
            baseline="coop",
            direction="higher",
            paper="63.22 -> 71.69",
        ),
        Claim(
            id="better-harmonic-mean",
            sentence="The harmonic mean of base and new accuracy is higher with CoCoOp than with CoOp.",
            metric="harmonic_mean",
            arm="cocoop",
            baseline="coop",
            direction="higher",
            paper="71.66 -> 75.83",
        ),
        Claim(
            id="better-in-other-domains",
            sentence="Learned on one domain, CoCoOp is more accurate than CoOp on the same classes in other domains.",
            metric="domains_accuracy_shifted",
            arm="cocoop",
            baseline="coop",
            direction="higher",
            paper="mean of four ImageNet variants: 59.28 -> 59.90",
        ),
        Claim(
            id="better-on-other-data",
            sentence="Learned on one data set, CoCoOp is more accurate than CoOp on the classes of another.",
            metric="cross_accuracy",
            arm="cocoop",
            baseline="coop",
            direction="higher",
            paper="mean of 10 data sets: 63.88 -> 65.74",
        ),
    ),
)
