"""The two variational autoencoders of embeddings, and the loss that takes features off one and keeps them on the other.

Shape letters: D width of an embedding, Z of the latent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temper.core.errors import NumericsError
from temper.methods.unlearning.laf.card import Config
from temper.ops.objectives import SumCount

__all__ = ["Passed", "Vae", "alignment_loss", "batches", "extractor_loss", "misfit", "train_vae", "vae_loss"]

HIDDEN = (128, 32)
LOG_FLOOR = 1e-8


class Passed(NamedTuple):
    """An embedding's reconstruction and its latent's distribution."""

    out_BD: Tensor
    mean_BZ: Tensor
    std_BZ: Tensor


class Vae(nn.Module):
    """D -> 128 -> 32 -> Z -> 32 -> 128 -> D with ReLU; the last layer is linear, or ends in a sigmoid."""

    def __init__(self, width: int, latent: int, has_sigmoid: bool) -> None:
        super().__init__()
        wide, narrow = HIDDEN
        self.encoder = nn.Sequential(nn.Linear(width, wide), nn.ReLU(), nn.Linear(wide, narrow), nn.ReLU())
        self.mean, self.log_var = nn.Linear(narrow, latent), nn.Linear(narrow, latent)
        last: list[nn.Module] = [nn.Linear(wide, width), *([nn.Sigmoid()] if has_sigmoid else [])]
        self.decoder = nn.Sequential(
            nn.Linear(latent, narrow), nn.ReLU(), nn.Linear(narrow, wide), nn.ReLU(), *last
        )

    def forward(self, embedding_BD: Tensor, generator: torch.Generator) -> Passed:
        """One draw of the latent for each embedding, always: the released code samples when it unlearns, too."""
        hidden = self.encoder(embedding_BD)
        mean_BZ, std_BZ = self.mean(hidden), (0.5 * self.log_var(hidden)).exp()
        noise_BZ = torch.randn(mean_BZ.shape, generator=generator).to(mean_BZ)
        return Passed(self.decoder(mean_BZ + std_BZ * noise_BZ), mean_BZ, std_BZ)


def vae_loss(passed: Passed, embedding_BD: Tensor, kl_weight: float) -> SumCount:
    """Squared error and kl_weight times the divergence from the unit normal, summed over everything; counts rows."""
    error = (passed.out_BD - embedding_BD).square().sum()
    square = passed.std_BZ.square()
    divergence = -0.5 * ((square + LOG_FLOOR).log() + 1 - passed.mean_BZ.square() - square).sum()
    return SumCount(error + kl_weight * divergence, len(embedding_BD))


def misfit(out_BD: Tensor, embedding_BD: Tensor) -> Tensor:
    """exp(s / (s + 1)) for each row, (B,), s its squared error: from 1 to e."""
    error_B = (out_BD - embedding_BD).square().sum(1)
    return (error_B / (error_B + 1)).exp()


def extractor_loss(
    retain_vae: Vae, forget_vae: Vae, retain_BD: Tensor, forget_BD: Tensor, generator: torch.Generator
) -> Tensor:
    """L_UE: the retain rows' misfit to their autoencoder minus the forget rows' to theirs, each summed."""
    kept = misfit(retain_vae(retain_BD, generator).out_BD, retain_BD).sum()
    return kept - misfit(forget_vae(forget_BD, generator).out_BD, forget_BD).sum()


def batches(num_rows: int, size: int, least: int, generator: torch.Generator) -> Iterator[Tensor]:
    """A new order of the rows in pieces of `size`; a last one of fewer than `least` is left out, unless it is all."""
    for rows in torch.randperm(num_rows, generator=generator).split(size):
        if len(rows) >= min(least, num_rows):
            yield rows


def train_vae(embedding_ND: Tensor, config: Config, seed: int) -> Vae:
    """An autoencoder of these embeddings, frozen; raises NumericsError when its loss is not finite."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = Vae(embedding_ND.shape[1], config.latent, config.decoder == "sigmoid").to(embedding_ND.device)
    optimizer = torch.optim.Adam(vae.parameters(), lr=config.vae_lr)
    for _ in range(config.vae_epochs):
        for rows in batches(len(embedding_ND), config.batch_rows, 1, generator):
            given_BD = embedding_ND[rows]
            loss = vae_loss(vae(given_BD, generator), given_BD, config.kl_weight)
            optimizer.zero_grad(set_to_none=True)
            (loss.total / loss.count).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if not bool(loss.total.isfinite()):
            raise NumericsError("The autoencoder's loss is not finite", where="laf", cure="Lower vae_lr.")
    return vae.requires_grad_(False).eval()


def alignment_loss(
    retain_BD: Tensor, retain0_BD: Tensor, forget_BD: Tensor, forget0_BD: Tensor, tau: float
) -> Tensor:
    """L_RA: retain features stay at the teacher's, forget features leave them (angles), summed over retain rows."""
    kept_B = 1 - F.cosine_similarity(retain_BD, retain0_BD)
    left_B = 1 - F.cosine_similarity(forget_BD, forget0_BD)
    return kept_B.sum() - len(kept_B) * (left_B / tau).logsumexp(0)
