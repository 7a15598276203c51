"""Dense retrieval with hard negatives: STAR trains a bi-encoder stably, ADORE then its query side against the real index.

Paper         Optimizing Dense Retrieval Model Training with Hard Negatives. Zhan, Mao, Liu, Guo, Zhang and Ma, SIGIR 2021,
              https://arxiv.org/abs/2104.08051 (Sec. 4: why static hard negatives are unstable; Sec. 5: STAR, ADORE).
              LAMB: https://arxiv.org/abs/1904.00962. LambdaRank: Burges, MSR-TR-2010-82.
What you get  From queries with relevant documents and a corpus, a better encoder of both (stage=star), as weights or an
              adapter of any transformers encoder; on top of it a query encoder of its own (stage=adore), for which the
              indexed documents stay as they are. Measures of both, of BM25 and of the untouched encoder, by query.

Idea          Random negatives are too easy: the mistakes that cost rank are a few documents near the top. Training on those
              alone, mined once, forgets the rest of the corpus. STAR mixes both. ADORE need not guess what is near the top:
              with the documents frozen, it searches the real index at every step and trains on what came back.

Maths         f(q, d)  scale * <q, d>, inner product of the two vectors
              p_i, h_i  a relevant document of query i, and one drawn from what the warm-up model ranks highest and no label
                       calls relevant (the top num_hard, mined once, frozen)
              l(q, p, n) = log(1 + exp(f(q, n) - f(q, p)))
              STAR     [sum_{i,j} M_ij l(q_i, p_i, p_j) + sum_{i,j} H_ij l(q_i, p_i, h_j)] / [sum M + sum H]
              M_ij     1 unless p_j is a known relevant document of q_i (so 0 for i = j); H_ij the same for h_j.
                       One normaliser: random and hard negatives weigh about (B - 1) : B in a batch of B.
              softmax  the other form: cross-entropy of p_i among all documents of the batch that M and H leave
              ADORE    d_1..d_m = the top_k documents of query i now, in order, y_r = f(q_i, d_r); if none of them is
                       relevant, all relevant ones follow behind
              L_i      (1/N) sum over pairs (r relevant, s not) of |a_r - a_s| log(1 + exp(-(y_r - y_s))),
                       a_r = 1/r for r <= metric_cut, else 0 (LambdaRank for the reciprocal rank), N = number of pairs

Departures    1. The encoder's own pooling and head are used; the paper puts a linear layer and a norm on RoBERTa's first
                 token. Where an encoder ends in a normalisation, f carries a scale of 20; the paper's has none, and none
                 is needed. So what is trained is what other libraries will compute.
              2. metric_cut is top_k unless it is given. The released code's default cuts everything: every weight is 0.
              3. Sums over ordered pairs once, divided by N; the released code sums twice and divides by 2 N.
              4. So many documents are searched that num_hard are left without the relevant ones; the released code
                 searches ten more. Documents with the text of a relevant one count as relevant.
              5. negatives=random and negatives=hard are the comparisons: the same batches and number of documents, with
                 h_i drawn from the whole corpus, or with no document of another query in the loss.
              6. Weight decay spares vectors (biases and norms) by their shape, not by their name.
              7. reset_layers draws an encoder's last layers anew before training: for checks on encoders that have been
                 trained for retrieval already. Nothing of the paper.

Limits        Unlabelled relevant documents among the hard negatives harm: filter_by drops what a stronger model rates like
              the relevant one. Queries without a relevant document are left out of training and measures. A query encoder
              from stage=adore fits one document encoder; nothing can be applied or trained on top of it. The index is
              exact and in memory: 4 bytes times documents times width.
Reference code  github.com/jingtaozhan/DRhard (BSD-3-Clause; facts only).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from temper.core.card import Card, Claim


class StageDefaults(NamedTuple):
    """The paper's settings of a stage."""

    optimizer: str
    lr: float
    batch_rows: int
    warmup_steps: int
    max_steps: int
    num_epochs: float


STAGES = {
    "star": StageDefaults("lamb", 1e-4, 256, 1000, 50_000, 0.0),
    "adore": StageDefaults("adamw", 5e-6, 32, 2000, 0, 6.0),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of both stages and of the measures."""

    stage: Literal["star", "adore"] = "star"
    """Train the whole encoder, or a query encoder for documents that stay as they are."""
    negatives: Literal["star", "random", "hard", "in-batch"] = "star"
    """star: other queries' relevant documents and mined ones; random: the mined ones drawn from the corpus instead; hard: a
    query's own mined one alone; in-batch: other queries' relevant documents alone."""
    loss: Literal["pairwise", "softmax"] = "pairwise"
    """STAR's loss: over pairs (released code), or over all candidates of the batch."""
    scale: float = 0.0
    """Factor on inner products; 0 = 1, and 20 for an encoder that normalises its vectors."""
    mine_with: Literal["dense", "bm25"] = "dense"
    """What finds the hard negatives: the encoder as it stands, or BM25."""
    num_hard: int = 200
    """Hard negatives kept for each query."""
    filter_by: str = ""
    """An encoder, or a cross-encoder as `cross:FOLDER`, that drops likely relevant ones from the hard negatives; "" = none."""
    filter_margin: float = 0.0
    """What a hard negative is rated must be so far below the worst-rated relevant document."""
    top_k: int = 200
    """Documents that ADORE retrieves at every step."""
    metric_cut: int = 0
    """Last rank that counts in the reciprocal rank; 0 = top_k."""
    index: str = ""
    """A folder for ADORE's document vectors: read if it is there, else written; "" = the user's cache."""
    mode: Literal["full", "lora"] = "full"
    """Train all weights (paper) or LoRA adapters."""
    rank: int = 16
    """LoRA rank; unused in full mode."""
    dropout: bool = True
    """Whether the encoder's own dropout acts in training."""
    reset_layers: int = 0
    """Last layers drawn anew before training."""
    optimizer: Literal["", "lamb", "adamw"] = ""
    """"" = LAMB for star, AdamW for adore."""
    lr: float = 0.0
    """Peak learning rate; 0 = 1e-4 for star, 5e-6 for adore."""
    weight_decay: float = 0.01
    """Decay of matrices."""
    batch_rows: int = 0
    """Queries of one step; 0 = 256 for star, 32 for adore."""
    warmup_steps: int = -1
    """Steps over which the learning rate rises, then it falls linearly; -1 = 1000 for star, 2000 for adore."""
    max_steps: int = 0
    """Optimiser steps; 0 = 50,000 for star, 6 epochs for adore."""
    clip_norm: float = 1.0
    """Largest gradient norm; 0 = no clipping."""
    query_tokens: int = 32
    """Tokens of a query that are read (the released code: 24 in STAR, 32 or 64 in ADORE)."""
    document_tokens: int = 120
    """Tokens of a document that are read (512 for long documents)."""
    query_prompt: str = ""
    """The encoder's own prompt for queries, by name; "" = its default."""
    document_prompt: str = ""
    """The same for documents."""
    engine: Literal["dense", "bm25"] = "dense"
    """What is measured: the system, or BM25 on the same data."""
    metrics: tuple[str, ...] = ("MRR@10", "nDCG@10", "R@100")
    """Ranking metrics, as ir-measures names them; MRR and MAP as well."""
    depth: int = 1000
    """Documents ranked for each query when measuring."""
    export: bool = False
    """Write the measured encoder into the step's folder as sentence-transformers reads it."""

    def __post_init__(self) -> None:
        for name in ("num_hard", "top_k", "depth", "query_tokens", "document_tokens", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("scale", "metric_cut", "lr", "batch_rows", "max_steps", "reset_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.reset_layers and self.mode == "lora":
            raise ValueError("reset_layers changes whole weights and needs mode=full")


_CORPUS = {"corpus?": "Text"}

CARD = Card(
    title="STAR and ADORE: dense retrieval trained with hard negatives",
    paper="arXiv:2104.08051",
    verbs=("fit", "measure"),
    config=Config,
    needs=frozenset({"embed", "grads"}),
    data={"fit": {"train": "Ranking", **_CORPUS}, "measure": {"test": "Ranking", **_CORPUS}},
    kinds=("Encoder",),
    produces=("weights", "adapter"),
    extras=("bm25s", "ir-measures"),
    claims=(
        Claim(
            id="star-beats-random",
            sentence="After equally many steps STAR puts the first relevant document higher than random negatives do.",
            metric="MRR@10",
            arm="star",
            baseline="random",
            direction="higher",
            paper="MS MARCO passage dev MRR@10 0.340 against 0.301",
        ),
        Claim(
            id="star-steadies-hard",
            sentence="Static hard negatives alone lose relevant documents from the first hundred that STAR keeps.",
            metric="R@100",
            arm="star",
            baseline="hard",
            direction="higher",
            paper="static hard negatives alone are unstable (Sec. 4)",
        ),
        Claim(
            id="adore-improves-random",
            sentence="ADORE improves a system that was trained with random negatives.",
            metric="MRR@10",
            arm="adore_random",
            baseline="random",
            direction="higher",
            paper="MS MARCO passage dev MRR@10 0.326 against 0.301",
        ),
        Claim(
            id="adore-improves-star",
            sentence="ADORE improves a system that was trained with STAR.",
            metric="MRR@10",
            arm="adore_star",
            baseline="star",
            direction="higher",
            paper="MS MARCO passage dev MRR@10 0.347 against 0.340",
        ),
        Claim(
            id="beats-bm25",
            sentence="The two together rank better than BM25.",
            metric="MRR@10",
            arm="adore_star",
            baseline="bm25",
            direction="higher",
            paper="MS MARCO passage dev MRR@10 0.347; BM25 is known there at about 0.187",
        ),
    ),
)
