"""Label-agnostic forgetting: take the influence of some images out of a classifier without any label.

Paper         Label-Agnostic Forgetting: A Supervision-Free Unlearning in Deep Models. Shen, Zhang, Zhao, Bialkowski, Chen
              and Xu, ICLR 2024, https://arxiv.org/abs/2404.00506 (Sec. 4: extractor unlearning, representation
              alignment, LAF+R; Sec. 5: removal of data, classes and noisy labels).
What you get  Weights of a classifier that has left the forget images' features, from two sets of images without labels;
              repair mends the last layer with a few (LAF+R). Beside it what it is compared with: learning,
              retraining without the forget rows, gradient ascent and fine-tuning with labels. `make` draws what to forget
              (a class, a share of rows, wrong labels, a stamped trigger); `measure` reports accuracy on the remaining and
              the forgotten rows, membership attacks, a linear probe, and the distance to a retrained model.

Idea          A classifier is an extractor g and a linear head. Learn what the embeddings of the remaining images look like
              (one variational autoencoder) and what those of the forget images look like (another). Then change g so that
              the second no longer knows the forget embeddings while the first still knows the remaining ones, and hold
              the remaining embeddings at their old direction. The head never moves: predictions change because features do.

Maths         e = g(x)   embedding, the input of the last linear layer; g_0 the extractor as it was; n_r retain rows of a step
              h, h_f     autoencoders of e on the remaining and on the forget rows, fitted on the original model and frozen:
                         D -> 128 -> 32 -> (mu, log var) -> z -> 32 -> 128 -> D,  z = mu + sigma * noise
              vae        (1/B) [sum |h(e) - e|^2 - kl_weight/2 sum (log(sigma^2 + 1e-8) + 1 - mu^2 - sigma^2)]
              N(e; h)    sum_i exp(s_i / (s_i + 1)),  s_i = |h(e_i) - e_i|^2: each row between 1 and e
              L_UE       N(g(x_r); h) - N(g(x_f); h_f): keep the remaining rows where h knows them, take the forget rows off
                         what h_f knows
              d          1 - cos(g(x), g_0(x))
              L_RA       sum_i log( exp(d_i) / sum_j exp(d_j / tau) ) = sum_i d_i - n_r logsumexp_j(d_j / tau),
                         i over retain rows, j over forget rows: remaining directions stay, forgotten ones turn away
              step       (a) Adam(lr_ue) on L_UE, then (b) a fresh pass and Adam(lr_ra) on L_RA; both on the extractor
              LAF+R      cross-entropy of repair_rows labelled retain rows, over the last linear layer alone

Departures    1. The autoencoders' output is linear: embeddings have no bound, and behind the released code's sigmoid the
                 error stays large (decoder=sigmoid gives that).
              2. h is fitted on the remaining rows, as the paper says; the released notebook takes the whole training set.
              3. Embeddings of the original model are computed once, for both autoencoders and as teacher; the released code
                 runs the teacher at every step. Norm layers and dropout stay in inference mode, so both are the same.
              4. A step's last rows, fewer than min_rows, are left out: over one forget row the log-sum-exp is but that row.
              5. The embedding is the input of the last linear layer, whatever the model; the paper's networks end in
                 linear layers without a non-linearity, of which the second and third are the head.
              6. Wrong labels are drawn among all other classes; the released code never draws the last one.
              7. Learning, retraining, ascent and fine-tuning use AdamW instead of Adam with L2 decay.
              8. The membership attack is gradient boosting of scikit-learn (paper: XGBoost, 100 trees as here), and its
                 test rows are not those it was trained on in any seed; members and others are as many.
              9. Backdoor removal is ours: the paper removes data, classes and noisy labels.

Limits        A random share of the data has the embeddings of the rest, so the two autoencoders agree and little happens: a
              warning says so. s sums over the embedding's width, so N is mostly flat near e and Adam blows up what is left
              of its gradient: on digits (one development seed) step (a) alone ruins the remaining rows, and step (b) alone
              forgets a class as well as both. Neither bounds how far features go; choose the rates on rows that are not
              for the test. The loss sums over a step's rows, so rates go with batch_rows. A linear probe may read a
              forgotten class from the features still (probe_f_accuracy). All pixels of the parts are held in memory. LAF
              reads no labels; rows without any need one in their file all the same: write 0.
Reference code  github.com/ShaofeiShen768/LAF (MIT; facts only).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from temper.core.card import Card, Claim

ABOVE_0 = (
    "latent", "vae_epochs", "vae_lr", "num_epochs", "lr_ue", "lr_ra", "tau", "batch_rows", "min_rows", "repair_rows",
    "repair_epochs", "learn_epochs", "ascent_epochs", "finetune_epochs", "patch_px", "max_rows",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of unlearning, of what it is compared with, of the tasks and of the measurement."""

    technique: Literal["laf", "repair", "learn", "retrain", "ascent", "finetune"] = "laf"
    """What `fit` does: unlearn without labels; repair the last layer after that with a few (LAF+R); learn forget and retain
    rows (the original model); learn retain rows alone (retrain, on a fresh model); gradient ascent on the forget rows;
    fine-tune on the retain rows."""
    layer: str = ""
    """Where embeddings are read: "" for the input of the last linear layer, or a module's name."""
    latent: int = 8
    """Width of the autoencoders' latent: 8 for the small network, 16 for ResNet-18."""
    vae_epochs: int = 10
    """Passes over the embeddings for each autoencoder."""
    vae_lr: float = 1e-3
    """Their learning rate (Adam)."""
    kl_weight: float = 0.025
    """Weight of their divergence from the unit normal."""
    decoder: Literal["linear", "sigmoid"] = "linear"
    """Last layer of the autoencoders: linear, or with a sigmoid (released code)."""
    num_epochs: int = 20
    """Passes over the smaller of the forget and the retain rows: 20 for the small network, 40 for ResNet-18."""
    lr_ue: float = 5e-5
    """Learning rate of extractor unlearning: 5e-5 for the small network, 1e-5 for ResNet-18."""
    lr_ra: float = 1e-4
    """Learning rate of representation alignment: 1e-4, or 4e-5 to 5e-5 for ResNet-18."""
    tau: float = 20.0
    """Temperature of the forget term: 20 for classes and noisy labels, 5 for random rows (small network)."""
    batch_rows: int = 32
    """Rows of a step: as many of the forget as of the retain rows."""
    min_rows: int = 8
    """Fewest forget rows of a step."""
    repair_rows: int = 200
    """Labelled retain rows on which repair trains the last layer."""
    repair_epochs: int = 5
    """Passes over them."""
    repair_lr: float = 1e-4
    """Learning rate of the repair."""
    learn_epochs: int = 20
    """Passes of learning and retraining."""
    learn_lr: float = 1e-4
    """Learning rate of learning, retraining and fine-tuning."""
    weight_decay: float = 1e-4
    """AdamW's decay in them."""
    ascent_epochs: int = 5
    """Passes over the forget rows of gradient ascent."""
    ascent_lr: float = 1e-4
    """Its learning rate."""
    finetune_epochs: int = 5
    """Passes over the retain rows of fine-tuning."""
    task: Literal["class", "random", "noisy", "backdoor"] = "class"
    """What `make` has forgotten: all rows of `classes`; a share of them; a share with wrong labels; a share with a white
    square and the label `target`."""
    classes: tuple[str, ...] = ()
    """Classes, by label, that the forget rows come from; () for all. Paper: the second five (random), the first five (noisy)."""
    share: float = 0.4
    """Share of those classes' rows: 0.4 for random rows, 0.6 for noisy labels (released code)."""
    target: str = "0"
    """The class that the trigger leads to."""
    patch_px: int = 3
    """Side of the trigger, a white square."""
    compare: tuple[Literal["laf", "laf_r", "ascent", "finetune"], ...] = ()
    """What `measure` fits on a copy and reports, each as an arm, beside the original and the retrained model; it then
    wants a fresh network. () measures the system as it is."""
    reference: str = ""
    """The retrained model, a system spec, that distances are measured to; unused with compare."""
    max_rows: int = 5000
    """Rows of each part that are measured."""

    def __post_init__(self) -> None:
        for name in ABOVE_0:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, not {self.share}")


_ROWS = {"forget": "Labelled", "retain": "Labelled"}

CARD = Card(
    title="Label-agnostic forgetting: unlearn images without labels",
    paper="arXiv:2404.00506",
    verbs=("fit", "make", "measure"),
    config=Config,
    needs=frozenset({"classify", "grads", "hidden"}),
    data={
        "make": {"train": "Labelled", "test": "Labelled"},
        "fit": _ROWS,
        "measure": {**_ROWS, "test": "Labelled", "test_forget?": "Labelled", "triggered?": "Labelled"},
    },
    kinds=("ImageClassifier",),
    produces=("weights",),
    extras=("pillow", "scikit-learn"),
    claims=(
        Claim(
            id="class-forgotten",
            sentence="After the removal of a class without labels, fewer than one test picture of that class in five is "
            "still recognised.",
            metric="test_f_accuracy",
            arm="class/laf",
            baseline=0.2,
            direction="lower",
            paper="CIFAR-10 class 0: 83.4 -> 2.0 %, retrained 0.0",
        ),
        Claim(
            id="class-rest-kept",
            sentence="Test accuracy on the other classes falls by less than 5 points.",
            metric="test_r_accuracy",
            arm="class/laf",
            baseline="class/original",
            direction="higher",
            margin=-0.05,
            paper="CIFAR-10 class 0: 83.0 -> 80.5 %",
        ),
        Claim(
            id="class-like-supervised",
            sentence="In class removal LAF ends as near to the retrained model as gradient ascent with labels, within 5 "
            "points of accuracy.",
            metric="retrained_gap",
            arm="class/laf",
            baseline="class/ascent",
            direction="lower",
            margin=-0.05,
            paper="comparable to supervised unlearning",
        ),
        Claim(
            id="class-repair-nearer",
            sentence="With a few labels (LAF+R) class removal ends nearer to the retrained model than LAF.",
            metric="retrained_gap",
            arm="class/laf_r",
            baseline="class/laf",
            direction="lower",
            paper="LAF+R improves on LAF",
        ),
        Claim(
            id="random-nearer",
            sentence="After random removal the accuracy on the forgotten training rows is nearer to the retrained model's "
            "than the original's is.",
            metric="train_f_gap",
            arm="random/laf",
            baseline="random/original",
            direction="lower",
            paper="Train_f comes down towards retraining (tables)",
        ),
        Claim(
            id="random-beats-supervised",
            sentence="In random removal LAF+R ends nearer to the retrained model than gradient ascent with labels.",
            metric="retrained_gap",
            arm="random/laf_r",
            baseline="random/ascent",
            direction="lower",
            paper="LAF+R best among all methods in most columns",
        ),
        Claim(
            id="noisy-heals",
            sentence="Removing mislabelled rows without any label raises test accuracy.",
            metric="test_r_accuracy",
            arm="noisy/laf",
            baseline="noisy/original",
            direction="higher",
            paper="test accuracy rises towards retraining (tables)",
        ),
        Claim(
            id="noisy-repair-heals",
            sentence="LAF+R does so, too.",
            metric="test_r_accuracy",
            arm="noisy/laf_r",
            baseline="noisy/original",
            direction="higher",
            paper="best test accuracy with few labels (tables)",
        ),
        Claim(
            id="backdoor-gone",
            sentence="Forgetting the stamped rows without labels lowers the trigger's success.",
            metric="trigger_success",
            arm="backdoor/laf",
            baseline="backdoor/original",
            direction="lower",
            paper="not in the paper",
        ),
    ),
)
