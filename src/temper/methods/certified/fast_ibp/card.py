"""Fast certified training: a classifier with proven L-infinity robustness, by interval bounds that start at the right size.

Paper         Fast Certified Robust Training with Short Warmup. Shi, Wang, Zhang, Yi and Hsieh, NeurIPS 2021,
              https://arxiv.org/abs/2103.17268 (Sec. 3.2: initialisation and batch norm; Sec. 3.3: the regularisers;
              Sec. 4 and App. C: schedules and networks).
What you get  Weights of a ReLU classifier trained so that many of its answers hold for every image within eps of the
              given one, in tens of epochs. And the report on any image classifier: standard, verified and PGD error,
              a certificate for each image, how certified accuracy falls with eps, how bounds grow through the layers,
              how many neurons are active, inactive or unstable.

Idea          Push a box through the network and train on the worst logits it allows. With usual first weights the box
              grows manyfold at every layer, so training needs hundreds of epochs of warm-up. Draw the weights so that
              boxes keep their size, put batch norm behind every hidden layer so that neurons do not all go dead, hold both
              properties with two regularisers while eps grows, and a short warm-up is enough.

Maths         x, y     pixels in [0, 1] and label;  box  [max(x - eps, 0), min(x + eps, 1)], normalised afterwards
              m, r     centre and radius of a box;  l, u = m - r, m + r
              affine   m' = W m + b, r' = |W| r (convolution and pooling by averages alike);  residual sum: both add
              rising   [phi(l), phi(u)], ReLU and max pooling among them
              lb_j     lower bound of z_y - z_j: the rows w_y - w_j as one affine map, j != y;  verified: all lb_j > 0
              L_robust mean over the batch of log(1 + sum_j exp(-lb_j))
              init     every affine layer but the last: w ~ N(0, 2 pi / n^2), n inputs of one output (kernel area times
                       channels). Half of the radius survives a ReLU and E|w| = 2 / n, so the radius stays. Layers that a
                       sum of two branches feeds (through ReLU) get half of that.
              norm     z -> w (z - mean) / sqrt(var + 1e-5) + b with mean and variance of the batch's clean images;
                       the same affine map for boxes (radius times |w| / sqrt(var + 1e-5)); gradients through both.
                       When testing the running statistics.
              c, D     centre and radius of what enters a ReLU layer i of I;  D_0 radius of the input;  tau = 0.5
              L_tight  (1 / (tau I)) sum_i max(0, tau - mean(D_0) / mean(D_i))
              L_relu   (1 / (tau I)) sum_i [max(0, tau - min(a_i, 1/a_i)) + max(0, tau - min(b_i, 1/b_i))], with the active
                       neurons A (l > 0) and the inactive N (u < 0) of all images of the batch:
                       a_i = sum_A c / -sum_N c,   b_i = sum_A (c - mean c)^2 / sum_N (c - mean c)^2
              total    L_robust + lambda (1 - eps_t / eps) (L_tight + L_relu) until the ramp ends, L_robust afterwards;
                       while eps_t = 0 cross-entropy of the clean images stands for L_robust and the regularisers
                       look at boxes of 1e-6
              eps_t    0 in the first epochs; over the ramp's steps s = 0 .. S: alpha s^4 up to M = S/4, then linear up to
                       eps, alpha = eps / ((S - M) 4 M^3 + M^4): value and slope match at M
              crown    lb_j = f CROWN_j + (1 - f) IBP_j with f = 1 - eps_t / eps in L_robust. CROWN_j: z_y - z_j followed back
                       as one linear function; at a ReLU with l < 0 < u coefficients above 0 take the line of slope 1
                       (u > -l) or 0, those below 0 the line u (z - l) / (u - l); l, u by IBP. Then its least value in the box.
              growth   mean(D_I) / mean(D_0): by how much boxes grow on their way to the last hidden layer

Departures    1. A step's images are always a full batch: what is left over sits out that epoch (another part in each).
                 A smaller last batch would have statistics of its own.
              2. L_relu of a layer without an active or without an inactive neuron is left out. The released code skips it
                 where the ratio is not a number; where it is 0 the code adds a constant, which moves no weight.
              3. The last layer keeps its first weights, by its place in the graph; the released code takes the last tensor
                 of the list for it.
              4. Every certificate of the first `checked_rows` images is computed again in float64 by interval
                 arithmetic through the network's own forward pass, which shares no code with the bounds. The paper
                 reports the bounds alone.

Limits        Certificates hold for real arithmetic: float rounding can matter where a margin is about 1e-6. L-infinity
              only. Certificates are those of plain IBP, with crown too: linear bounds act in training alone. Layers
              without a bound rule (GELU, softmax attention, layer norm) are refused by name, and networks that do not end
              in a linear layer or whose forward pass branches on values. Images only; the bounds themselves take tables
              too (`temper.ops.network_bounds`). Networks trained otherwise verify almost nothing at the eps used here.
              That says little of their robustness: compare the PGD error. One process: a batch shares its statistics and
              is never split. All images are held in memory as float32.
Reference code  github.com/shizhouxing/Fast-Certified-Robust-Training (BSD-3-Clause; facts only).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from temper.core.card import Card, Claim

__all__ = ["CARD", "Config"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the training and of the report; the defaults are the paper's for MNIST."""

    eps: float = 0.4
    """Radius in units of [0, 1] pixels, when training (0: ordinary training) and when measuring. 8 of 255 is 0.0314."""
    init: Literal["ibp", "default", "keep"] = "ibp"
    """First weights: ibp keeps the size of boxes (paper), default draws torch's own, keep trains on the given ones."""
    reg_weight: float = 0.5
    """Weight lambda of the regularisers; 0 leaves them out. The paper takes 0.1 to 0.2 for TinyImageNet."""
    regularisers: tuple[Literal["tight", "relu"], ...] = ("tight", "relu")
    """Which regularisers act until the ramp ends."""
    crown: bool = False
    """CROWN-IBP: while eps grows, margins are in part linear bounds (1 - eps_t / eps of them). Dearer by a pass a class."""
    tau: float = 0.5
    """What the regularisers ask of a ratio; above it they vanish."""
    batch_rows: int = 256
    """Images of one step (paper: 256 for MNIST, 128 for CIFAR-10)."""
    num_epochs: int = 70
    """Passes over the images, all phases together; 0 only draws the first weights."""
    clean_epochs: int = 1
    """Epochs at eps 0 before the ramp."""
    ramp_epochs: int = 20
    """Epochs over which eps grows (paper: 20, or 80 for CIFAR-10)."""
    lr: float = 5e-4
    """Learning rate of Adam, without decay of the weights."""
    lr_drops: tuple[int, ...] = (50, 60)
    """Epochs after which the learning rate is multiplied by lr_factor."""
    lr_factor: float = 0.2
    """See lr_drops."""
    clip_norm: float = 10.0
    """Largest gradient norm; 0 = no clipping."""
    crop_padding: int = 0
    """Pixels by which images are padded with black and cropped at random again (paper: 4 for CIFAR-10)."""
    flip: bool = False
    """Whether half of the images are mirrored (paper: for CIFAR-10)."""
    at_start: bool = False
    """Measure the bounds of the untrained network that `init` gives, instead of the system's."""
    max_rows: int = 10_000
    """Images that are measured."""
    more_eps: tuple[float, ...] = ()
    """Further radii at which the share of verified images is measured."""
    curve_points: int = 9
    """Radii of the curve of certified accuracy, from 0 to twice eps; 0 = no curve."""
    attack_steps: int = 40
    """Steps of PGD; 0 = no attack."""
    attack_restarts: int = 3
    """Random starts of PGD."""
    checked_rows: int = 64
    """Images whose certificates are computed a second time (Departure 4)."""

    def __post_init__(self) -> None:
        for name in ("eps", *(["more_eps"] if self.more_eps else [])):
            value = getattr(self, name)
            for eps in (value,) if name == "eps" else value:
                if not 0 <= eps <= 1:
                    raise ValueError(
                        f"{name} is {eps:g}: radii are in units of [0, 1] pixels, an eps out of 255 is divided by 255"
                    )
        for name in ("batch_rows", "max_rows", "attack_restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not (self.tau > 0 and self.lr > 0):
            raise ValueError("tau and lr must be above 0")
        if self.num_epochs and self.clean_epochs + self.ramp_epochs > self.num_epochs:
            raise ValueError(
                f"clean_epochs and ramp_epochs make {self.clean_epochs + self.ramp_epochs} epochs of {self.num_epochs}: "
                "the ramp must end before the training does"
            )
        if not self.num_epochs and self.init == "keep":
            raise ValueError("num_epochs 0 only draws first weights, and init=keep draws none")


CARD = Card(
    title="Fast certified training with interval bounds and a short warm-up",
    paper="arXiv:2103.17268",
    verbs=("fit", "measure"),
    config=Config,
    needs=frozenset({"classify", "grads"}),
    data={"fit": {"train": "Labelled"}, "measure": {"test": "Labelled"}},
    kinds=("ImageClassifier",),
    produces=("weights",),
    extras=("pillow",),
    claims=(
        Claim(
            id="boxes-keep-their-size",
            sentence="Before training, boxes grow less on their way through a network with IBP initialisation than "
            "with torch's own.",
            metric="start_growth",
            arm="init",
            baseline="vanilla",
            direction="lower",
            paper="growth by sqrt(n)-like factors a layer with Xavier or Kaiming weights, about 1 with its own",
        ),
        Claim(
            id="norm-helps",
            sentence="With the same short warm-up, batch norm behind every hidden layer lets more test images be verified.",
            metric="certified",
            arm="bn",
            baseline="vanilla",
            direction="higher",
            paper="lower verified error with batch norm everywhere (tables of Sec. 4)",
        ),
        Claim(
            id="whole-method-helps",
            sentence="IBP initialisation and the regularisers, on top of batch norm, let more test images be verified.",
            metric="certified",
            arm="full",
            baseline="bn",
            direction="higher",
            paper="MNIST eps 0.4: 10.98 % verified error (released code), CIFAR-10 eps 8/255: 65.03 %, both lowest for the "
            "whole method",
        ),
        Claim(
            id="better-than-vanilla",
            sentence="The whole method lets more test images be verified than plain IBP training for the same epochs.",
            metric="certified",
            arm="full",
            baseline="vanilla",
            direction="higher",
            paper="as above",
        ),
        Claim(
            id="fewer-dead-neurons",
            sentence="Fewer neurons are inactive on all of a test image's box with the whole method than with plain IBP training.",
            metric="inactive_share",
            arm="full",
            baseline="vanilla",
            direction="lower",
            paper="plain IBP training makes most neurons inactive, batch norm and L_relu balance them (figures)",
        ),
        Claim(
            id="training-is-needed",
            sentence="Ordinary training leaves fewer test images verified than the whole method.",
            metric="certified",
            arm="full",
            baseline="ordinary",
            direction="higher",
            paper="the premise of certified training",
        ),
    ),
)
