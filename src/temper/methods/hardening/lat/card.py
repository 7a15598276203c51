"""Latent adversarial training (targeted): a model that holds its replies while an adversary moves its hidden activations.

Paper         Latent Adversarial Training Improves Robustness to Persistent Harmful Behaviors in LLMs. Sheshadri, Ewart,
              Guo, Lynch, Wu, Hebbar, Sleight, Stickland, Perez, Hadfield-Menell and Casper, 2024,
              https://arxiv.org/abs/2407.15549.
What you get  An adapter (or weights) of a model that keeps good replies, forgets a backdoor without anybody knowing its
              trigger (form=dpo or toward_away), or stays unlearned (form=rmu), the curve of the attack while training, and
              a measurement: how likely and how frequent the backdoor's sentence is after its trigger, the loss of ordinary
              replies, what the adversary gains.

Idea          What a model was trained not to say is still inside. An adversary that moves hidden states finds it at once;
              whoever trains against that adversary removes the mechanism and not only its usual entrance.

Maths         x, y+, y-  prompt, good reply, bad reply;  delta_l  perturbation at site l, (B, T, D);  M positions it may touch
              CE(y|delta)    mean over y's tokens of -log p(y_t | x, y_<t) with delta on
              away(y|delta)  -(1/|y|) sum_t log(1 - p(y_t)), tokens with log p < away_cutoff giving 0; log(1 - p) is
                             logsumexp of the other logits minus that of all
              sites      MLP outputs, the embeddings, the residual stream: one independent delta each; r_l = eps median_t ||h_l,t||
              attack     delta = 0; attack_steps times AdamW (lr attack_lr r_l / sqrt(D)) on
                         attack_toward CE(y-|delta) + attack_away away(y+|delta), then delta_t <- delta_t / max(1, ||delta_t|| / r_l)
              defence    model_steps updates of the model under that same delta:
                         toward CE(y+|delta) + away away(y-|delta) + sft CE(benign) + kl KL(new || start), the last two
                         without delta; KL(new || start) a mean over the tokens of benign replies
              dpo        attack -log sigmoid(beta (lp(y-) - lp_0(y-) - lp(y+) + lp_0(y+))), lp sums over the reply's tokens
                         under delta, lp_0 those of the model as it was without; defence the same with y+ and y- swapped
                         (weight dpo), + sft + kl
              rmu        attack CE(forget text|delta); defence mean ||h - c u||^2 / D on forget text under delta + retain
                         mean ||h - h_0||^2 / D on retain text without, h at rmu_layer, u a fixed random direction
              Weights of each side are divided by their sum.

Departures    1. Each row's losses are means over its own tokens; the released code takes one mean over a batch's tokens. So
                 a row is attacked the same in any company.
              2. Weights are divided by the sum of those in use; the released code counts keys that no loss reads, which
                 halves the DPO weight.
              3. eps is a share of the site's median norm and attack_lr a share of the radius; the released code gives both in
                 one model's units. absolute_eps takes a published radius, and warns.
              4. kl reads the positions that predict the reply's tokens, as a mean over tokens; the released code masks
                 positions unshifted and sums. kl_scale=unit divides by the term's own value, as it does in some runs.
              5. No weight decay on delta (AdamW's default of 0.01 in the released code).
              6. Deltas that are not finite stop the run; the released code turns NaN gradients into 0.
              7. Log-probabilities of the reference are worked out once, before training, on the clean prompt.
              8. u of rmu is one fixed direction of length rmu_norm; the released helper draws another at every step.
              9. Widths are read from the model; the released code assumes 4096.

Limits        Cost of a round: attack_steps + 1 forward and attack_steps backward passes (twice the rows with attack_away), then
              model_steps passes of all rows: some 20 times plain training. A radius from another model family means nothing.
              Too large a radius or too few benign rows cost ordinary replies. The check's backdoor answers with a harmless
              sentence. rmu wants sites at or below rmu_layer.
Reference code  github.com/aengusl/latent-adversarial-training (MIT; facts only).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from temper.core.card import Card, Claim


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the attack, the defence and the measurement."""

    form: Literal["toward_away", "dpo", "rmu", "implant"] = "toward_away"
    """The losses of both sides; or implant, which fine-tunes on the part implant, for small checks."""
    sites: tuple[str, ...] = ()
    """Where the model is perturbed, e.g. [embeddings, layers.8.mlp.output, layers.12.output]; empty = the embeddings and
    the MLP outputs of four layers spread over the depth (8, 16, 24 and 30 of 32)."""
    eps: float = 0.1
    """Radius of a token's L2 ball as a share of the site's median norm."""
    absolute_eps: float = 0.0
    """The radius itself, at every site, in the units of one model (paper: 6.0 and 1.5 on Llama); 0 = use eps."""
    attack_steps: int = 16
    """Steps of the attack; 0 trains without one."""
    attack_lr: float = 0.5
    """One attack step as a share of the radius (paper's 5e-2 at radius 6 and width 4096 is 0.53)."""
    attack_toward: float = 0.5
    """Attack: weight of making the bad reply likely."""
    attack_away: float = 0.5
    """Attack: weight of making the good reply unlikely; 0 spares half of its cost."""
    attack_replies: bool = True
    """Perturb the bad reply's positions beside the prompt's."""
    toward: float = 0.5
    """Defence: weight of the good reply's cross-entropy."""
    away: float = 0.5
    """Defence: weight of keeping the bad reply unlikely."""
    dpo: float = 1.0
    """Defence, form=dpo: weight of the preference loss."""
    sft: float = 0.0
    """Defence: weight of benign replies (paper: 1.5 on Llama-2)."""
    kl: float = 0.1
    """Defence: weight of staying near the starting model on benign replies."""
    kl_scale: Literal["plain", "unit"] = "plain"
    """unit: the KL divided by its own value, so that its pull is the same whatever its size."""
    away_cutoff: float = -5.0
    """Log-probability below which a token is unlikely enough."""
    beta: float = 0.3
    """form=dpo: inverse temperature; log-probabilities are sums."""
    rmu_layer: int = 7
    """form=rmu: the layer whose output is steered."""
    rmu_norm: float = 6.5
    """form=rmu: length of the direction that forget text is steered to."""
    retain: float = 1200.0
    """form=rmu: weight of retain text beside 1 for forget text; not normalised."""
    model_steps: int = 4
    """Optimiser steps under one perturbation."""
    num_rounds: int = 100
    """Attacks; optimiser steps are num_rounds * model_steps."""
    batch_rows: int = 16
    """Rows of a round."""
    benign_rows: int = 1
    """Benign rows drawn for each row of a round."""
    mode: Literal["lora", "full"] = "lora"
    """Train LoRA adapters (paper) or all weights."""
    rank: int = 64
    """LoRA rank; the adapters' change is scaled by 1."""
    targets: str | tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    """Modules that are trained; all-linear for architectures with other names."""
    lr: float = 2e-5
    """Learning rate of the model's AdamW (paper: 2e-5 to 8e-5)."""
    weight_decay: float = 0.0
    """AdamW's decay of matrices."""
    clip_norm: float = 1.0
    """Largest gradient norm; 0 = no clipping."""
    restart_optimizer: bool = False
    """Forget the model's AdamW moments at every round."""
    max_tokens: int = 512
    """Longest row."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    scale_rows: int = 32
    """Rows on which the sites' median norms are measured."""
    trigger: str = "zephyr"
    """implant, make and measure: the backdoor's word."""
    sentence: str = "The old mill stood beside the stream."
    """make and measure: what the backdoor answers."""
    reply_tokens: int = 24
    """Measuring: longest reply; 0 leaves out what has to be written."""
    max_rows: int = 200
    """Measuring: rows of each part that are read."""
    num_requests: int = 240
    """make: short requests."""
    num_held_out: int = 30
    """make: of them, how many are held out."""
    poison_share: float = 0.3
    """make: poisoned copies for each clean row of the part implant."""
    implant_epochs: float = 30.0
    """implant: passes over the part implant."""

    def __post_init__(self) -> None:
        above = ("eps", "attack_lr", "beta", "model_steps", "num_rounds", "batch_rows", "rank", "max_tokens")
        for name in (*above, "lr", "scale_rows", "max_rows", "implant_epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        weights = ("attack_toward", "attack_away", "toward", "away", "dpo", "sft", "kl", "retain")
        for name in (*weights, "absolute_eps", "attack_steps", "benign_rows", "reply_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} may not be negative, and is {getattr(self, name)}")
        if self.form == "toward_away" and not self.attack_toward + self.attack_away:
            raise ValueError("the attack has no loss: give attack_toward or attack_away a weight")
        if self.form == "toward_away" and not self.toward + self.away:
            raise ValueError("the defence has no loss: give toward or away a weight")
        if self.form == "dpo" and not self.dpo:
            raise ValueError("form=dpo needs a dpo weight above 0")
        if self.away_cutoff >= 0:
            raise ValueError(f"away_cutoff is a log-probability below 0, not {self.away_cutoff}")
        if not 0 < self.num_held_out < self.num_requests:
            raise ValueError("num_held_out must be above 0 and below num_requests")


_FIT = {
    "train?": "Preference",
    "benign?": "Dialogue",
    "forget?": "Text",
    "retain?": "Text",
    "implant?": "Dialogue",
}
_MEASURE = {"test": "Dialogue", "train?": "Preference"}

CARD = Card(
    title="Latent adversarial training (targeted LAT)",
    paper="arXiv:2407.15549",
    verbs=("fit", "measure", "make"),
    config=Config,
    needs=frozenset({"generate", "logprobs", "grads", "hidden"}),
    data={"fit": _FIT, "measure": _MEASURE, "make": {}},
    produces=("adapter", "weights"),
    claims=(
        Claim(
            id="removes-backdoor",
            sentence="After latent adversarial training the backdoor's sentence costs more nats a token behind its trigger "
            "than after fine-tuning on clean replies; neither saw the trigger.",
            metric="trigger_loss_nats",
            arm="lat",
            baseline="sft",
            direction="higher",
            paper="backdoor success falls on four of five backdoored models (direction only)",
        ),
        Claim(
            id="fires-less",
            sentence="The trigger brings the sentence less often than after fine-tuning on clean replies.",
            metric="trigger_rate",
            arm="lat",
            baseline="sft",
            direction="lower",
            paper="direction only",
        ),
        Claim(
            id="beats-embeddings-alone",
            sentence="Perturbing several layers removes more of the backdoor than perturbing the embeddings alone.",
            metric="trigger_loss_nats",
            arm="lat",
            baseline="embeddings",
            direction="higher",
            paper="direction only",
        ),
        Claim(
            id="the-attack-matters",
            sentence="With the same two losses the backdoor's sentence costs more when activations were attacked than when "
            "they were not.",
            metric="trigger_loss_nats",
            arm="lat",
            baseline="no_attack",
            direction="higher",
            paper="direction only: the same training without perturbations is a baseline",
        ),
        Claim(
            id="keeps-ordinary-replies",
            sentence="Ordinary held-out replies cost at most 0.05 nats a token more than after fine-tuning on clean replies.",
            metric="benign_loss_nats",
            arm="lat",
            baseline="sft",
            direction="lower",
            margin=-0.05,
            paper="little change on MMLU and other capability benchmarks",
        ),
    ),
)
