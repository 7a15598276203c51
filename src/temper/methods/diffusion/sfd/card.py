"""Score forgetting distillation: turn a diffusion model into a one-step generator that no longer draws a class or concept.

Paper         Score Forgetting Distillation: A Swift, Data-Free Method for Machine Unlearning in Diffusion Models. Chen,
              Zhang and Zhou, ICLR 2025, https://arxiv.org/abs/2409.11219. It builds on score identity distillation
              (SiD), https://arxiv.org/abs/2404.04057. The baseline esd: https://arxiv.org/abs/2303.07345.
What you get  A stack of weights and a drawing rule. Applied to its teacher it gives a system that draws in ONE call of
              the network and draws an override class where the forgotten one is asked for. It replaces the sampler: it
              is a generator and no edited multi-step model, so steps and guidance have no say any more, and eps of the
              weights means nothing to another sampler. Also the fits it is compared with (sid, relabel, esd), the
              measurement of both kinds, and a toy that needs no system.

Idea          Learn three networks from one: the frozen teacher, a generator that draws in a single call, and a fake score
              that follows what the generator draws. Where teacher and fake score agree about noised drawings, the
              generator draws from the teacher's distribution. For the forgotten class, compare the fake score of that
              class with the teacher's score of the override class: the generator then draws the override class under
              the forgotten name. No image is needed: the generator makes all training pictures itself.

Maths         eps_phi, eps_psi, eps_theta   teacher, fake score, generator: one architecture, all start as the teacher
              ab_t     share of signal power at timestep t;  x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) e, e ~ N(0, I)
              x^(x_t, t, c) = (x_t - sqrt(1 - ab_t) eps(x_t, t, c)) / sqrt(ab_t): the x_0 that a network sees
              drawing  x_init = sqrt(1 - ab_init) z, z ~ N(0, I);  x_g(c) = x^_theta(x_init, t_init, c)
              c_r, c_f, c_o   a remaining condition, the forgotten one, its override
              each iteration, with t uniform over t_min .. t_max - 1:
              fake     L_psi = w_r E |e - eps_psi(x_t, t, c_r)|^2 + w_f E |e - eps_psi(x_t^f, t, c_f)|^2, on x_g(c_r)
                       and x_g(c_f); sums over a picture's numbers, means over pictures
              SiD      L(c_p, c_s) = E sum [(p - s) ((p - x_g) - alpha (p - s))] / omega, with p = x^_phi(x_t, t, c_p),
                       s = x^_psi(x_t, t, c_s), x_g drawn for c_s, omega = max(1e-5, mean |p - x_g|) without gradient.
                       The gradient runs through x_g, x_t, p and s. alpha = 1 gives (p - s)(s - x_g) / omega.
              theta    L_theta = v_r L(c_r, c_r) + v_f L(c_o, c_f): the second term is the forgetting
              then     gradients are cut to [-1, 1] number by number, Adam with betas (0, 0.999), an average of theta
              override fixed: one label; rand: uniform over the others at each step; amax, prob: what a classifier says
                       of s, the forgotten class shut out, the likeliest or a draw
              two stages  distil_steps of L(c, c) over all classes first, then the above
              guidance u + g (c - u) in three places: fake score in training, fake score and teacher in L
              diff_instruct  p and s without gradient, alpha = 1: the gradient is that of -(p - s) / omega at x_g
              baselines   sid: only L(c, c), all classes. relabel: the teacher's drawings of the override under the
                       forgotten condition, others under their own, plain denoising. esd: under c_f eps goes to
                       eps_phi(none) - eta (eps_phi(c_f) - eps_phi(none)). The last two keep the sampler.
              Metrics  forget_rate: share of drawings under the forgotten condition that an independent detector still
                       takes for it; unlearning_accuracy = 1 - forget_rate; forget_probability and
                       forget_entropy_nats of its answers there; override_rate; retain_rate: share under other
                       conditions taken for theirs. frechet, mmd: distances of drawings under other conditions from
                       real pictures, or from the reference system's, in the detector's features (the toy: in the plane).
                       calls_per_sample: passes of a picture through the network; sample_s: seconds a picture. The
                       toy's metrics begin with toy_; its frechet is the mean over classes of the distance to true
                       points of the class.

Departures    1. Times are shares of the schedule's levels, so one setting serves schedules of any length.
              2. Guidance is written as in diffusers, 1 for none; the released code for classes writes 0 for none.
              3. In the second of two stages the teacher stays the pretrained model. The released class code loads the
                 first stage's fake score as the teacher too.
              4. The fake score is always trained on eps. For a teacher of velocities this equals the released weight
                 snr / (snr + 1) on the velocity error; the released text code drops that target before it is used.
              5. A loss that is not finite stops the run. The released text code, in float16, leaves such pictures out
                 and writes 0 for a gradient that is NaN; here losses are float32 and there is no float16.
              6. The average of the generator starts as a copy after the first step; it becomes the artefact.
              7. relabel and esd train on noised drawings of the teacher, made once. ESD noises by running the sampler
                 of the model in training part of the way.

Limits        Three networks and two optimisers in memory. Class- or text-conditional teachers only. Too large a
              forget_weight spoils the other classes, too small a one does not forget in a short run: the paper's 0.01 is
              for 50,000 steps. A fake score that learns too slowly for the generator, and a strongly guided teacher, lose
              classes that nothing was to be forgotten of: look at sid first. After a short run the drawings are grainy,
              which the rates do not see: look at the grids in the report. What is drawn under conditions that were never
              trained on (other words for a concept, other languages) is not looked at. A fit keeps no checkpoints: one that
              was stopped begins anew. esd and guidance need a model that can be asked for nothing.

Reference code  github.com/tqch/score-forgetting-distillation (Apache-2.0; folders DDPM and SD).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from temper.core.card import Card, Claim

ONE_STEP = ("sfd", "sid")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the distillation, its baselines, the measurement and the toy."""

    objective: Literal["sfd", "sid", "relabel", "esd", "untouched"] = "sfd"
    """What is trained: the method, distillation that forgets nothing, two fine-tunings that keep the sampler; untouched
    is for the toy alone."""
    forget: int | str = 0
    """Class to forget, by name or number; with a model of texts the phrase to forget."""
    override: int | str = 1
    """What is drawn instead, in the same way; not read with rand, amax and prob."""
    override_mode: Literal["fixed", "rand", "amax", "prob"] = "fixed"
    """How the override is chosen: as named, any other class, or by a classifier (not with relabel)."""
    classifier: str = ""
    """System that amax and prob ask; its classes are those of the model, in order."""
    templates: tuple[str, ...] = ("a photo of a {}", "a {}")
    """Texts around the phrase, for a model of texts; the phrase takes the place of {}."""
    alpha: float = 1.2
    """Weight of the second part of the SiD loss; 1 for text models."""
    t_min: float = 0.038
    """Smallest time of a loss, as a share of the noise levels."""
    t_max: float = 0.712
    """Largest time of a loss."""
    t_init: float = 0.44
    """Time at which the generator is asked; 0.625 for text models."""
    fake_remain_weight: float = 1.0
    """w_r."""
    fake_forget_weight: float = 0.01
    """w_f; 1 for text models."""
    remain_weight: float = 1.0
    """v_r; of the baseline relabel too."""
    forget_weight: float = 0.01
    """v_f; 1 for text models."""
    guidance_fake_train: float = 1.0
    """Guidance of the fake score in its own training; 4.5 for text models."""
    guidance_fake_eval: float = 1.0
    """Guidance of the fake score in the generator's loss; 4.5 for text models."""
    guidance_teacher: float = 1.0
    """Guidance of the teacher in the generator's loss; 4.5 for text models."""
    diff_instruct: bool = False
    """No gradient through the two scores."""
    forget_warmup: float = 0.0
    """Share of the steps in which the forgetting terms draw times from 2 % to 98 % of the levels."""
    distil_steps: int = 0
    """Steps of plain distillation before: the first of two stages."""
    num_steps: int = 50_000
    """Steps of the objective."""
    batch_rows: int = 128
    """Pictures of each term of a step."""
    lr: float = 1e-5
    """Learning rate of the generator; of the baselines too."""
    fake_lr: float = 1e-5
    """Learning rate of the fake score; the paper's second stage takes 3e-5."""
    betas: tuple[float, float] = (0.0, 0.999)
    """Adam's moment decays."""
    clip_value: float = 1.0
    """Largest absolute value of any number of a gradient; 0 = no limit."""
    ema: float = 0.9999
    """Decay of the generator's average; 0 = none (text models). In a short run it must be lower."""
    esd_eta: float = 1.0
    """How far esd goes beyond the unconditional eps."""
    bank_rows: int = 256
    """Pictures that the teacher draws for a term of a baseline."""
    detector: str = "world:attributes"
    """Image classifier that says what was drawn; its classes hold the names of the model's."""
    num_samples: int = 40
    """Pictures drawn for each condition."""
    sample_steps: int = 20
    """Steps of the sampler, where one draws."""
    guidance: float = 1.0
    """Guidance of the sampler."""
    reference: str = ""
    """System whose drawings stand for real pictures where the data holds none: a spec; "" for no such distance."""
    toy: bool = False
    """Measure the toy instead of a system: eight Gaussians in the plane, their model trained on the spot."""
    toy_steps: int = 3000
    """Training steps of the toy's teacher."""

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in ("t_min", "t_max", "t_init", "forget_warmup")}
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is a share between 0 and 1, not {value}")
        if not self.t_min < self.t_max:
            raise ValueError(f"t_min {self.t_min} must be below t_max {self.t_max}")
        for name in ("num_steps", "batch_rows", "lr", "fake_lr", "num_samples", "bank_rows", "sample_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.override_mode == "fixed" and self.override == self.forget:
            raise ValueError(f"override and forget are the same: {self.forget!r}")
        if self.override_mode in ("amax", "prob") and not self.classifier and not self.toy:
            raise ValueError(f"override_mode {self.override_mode} needs a classifier")
        if self.override_mode in ("amax", "prob") and self.objective == "relabel":
            raise ValueError(f"relabel needs override_mode fixed or rand, not {self.override_mode}")
        if not self.templates or any("{}" not in text for text in self.templates):
            raise ValueError("every template needs {} where the phrase goes")


CARD = Card(
    title="Score forgetting distillation: a one-step generator that forgot",
    paper="arXiv:2409.11219",
    verbs=("fit", "measure"),
    config=Config,
    kinds=("Diffusion",),
    needs=frozenset({"draw", "grads"}),
    data={"fit": {"prompts?": "Text"}, "measure": {"prompts?": "Labelled", "real?": "Labelled"}},
    produces=("weights", "steer"),
    extras=("diffusers",),
    claims=(
        Claim(
            id="toy-forgets",
            sentence="In the toy, asked for the forgotten class, the generator draws it less often than distillation that forgets nothing.",
            metric="toy_forget_rate",
            arm="sfd",
            baseline="sid",
            direction="lower",
            paper="CIFAR-10: probability of the forgotten class 0.0057 (released example)",
        ),
        Claim(
            id="toy-forgets-nearly-all",
            sentence="In the toy less than 5 % of what it draws under the forgotten class is still that class.",
            metric="toy_forget_rate",
            arm="sfd",
            baseline=0.05,
            direction="lower",
            paper="CIFAR-10: classifier accuracy on the forgotten class 0.0036 (released example)",
        ),
        Claim(
            id="toy-keeps-the-rest",
            sentence="In the toy the share of right drawings of the other classes is at most 5 points below that of plain distillation.",
            metric="toy_retain_rate",
            arm="sfd",
            baseline="sid",
            direction="higher",
            margin=-0.05,
            paper="quality of the other classes is kept: FID 5.32 on CIFAR-10 without class 0 (released example)",
        ),
        Claim(
            id="toy-keeps-more-than-esd",
            sentence="In the toy the other classes' drawings are nearer to real ones than after ESD.",
            metric="toy_frechet",
            arm="sfd",
            baseline="esd",
            direction="lower",
            paper="better than ESD and others at equal forgetting (tables)",
        ),
        Claim(
            id="toy-draws-in-one-call",
            sentence="In the toy it needs fewer calls of the network for a picture than the untouched teacher.",
            metric="toy_calls_per_sample",
            arm="sfd",
            baseline="untouched",
            direction="lower",
            paper="one call instead of the sampler's many",
        ),
        Claim(
            id="shapes-plain-distillation-draws-stars",
            sentence="In the caption world plain distillation, which forgets nothing, still draws stars: at most 10 points less often than the guided teacher.",
            metric="forget_rate",
            arm="shapes-sid",
            baseline="shapes-untouched",
            direction="higher",
            margin=-0.1,
            paper="not a claim of the paper: without it a loss of stars could not be credited to forgetting",
        ),
        Claim(
            id="shapes-forgets",
            sentence="In the caption world it draws stars less often than plain distillation.",
            metric="forget_rate",
            arm="shapes-sfd",
            baseline="shapes-sid",
            direction="lower",
            paper="CIFAR-10: probability of the forgotten class 0.0057 (released example)",
        ),
        Claim(
            id="shapes-forgets-nearly-all",
            sentence="In the caption world less than 10 % of what it draws when asked for a star is a star.",
            metric="forget_rate",
            arm="shapes-sfd",
            baseline=0.1,
            direction="lower",
            paper="CIFAR-10: classifier accuracy on the forgotten class 0.0036 (released example)",
        ),
        Claim(
            id="shapes-keeps-the-rest",
            sentence="In the caption world its other shapes are right at most 10 points less often than those of the guided teacher.",
            metric="retain_rate",
            arm="shapes-sfd",
            baseline="shapes-untouched",
            direction="higher",
            margin=-0.1,
            paper="quality of the other classes is kept: FID 5.32 on CIFAR-10 without class 0 (released example)",
        ),
        Claim(
            id="shapes-draws-in-one-call",
            sentence="In the caption world a picture takes it one call of the network and the sampler more than ten.",
            metric="calls_per_sample",
            arm="shapes-sfd",
            baseline="shapes-untouched",
            direction="lower",
            margin=9.0,
            paper="one call instead of the sampler's many",
        ),
    ),
)
