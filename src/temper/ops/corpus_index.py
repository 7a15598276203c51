"""A corpus embedded and ready to search, with the identity of what embedded it.

A row of vectors that belongs to another document, or to another encoder, ruins training without a sign. So an index
carries the fingerprint of its document encoder and a hash of its texts, and is refused where either differs.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from temper.core.errors import DataError, ModelError
from temper.core.types import Run
from temper.ops.embed import embed
from temper.ops.retrieve import DenseIndex, Found, build_index, search
from temper.store.cache import Cache

if TYPE_CHECKING:
    from temper.systems.encoder import Encoder

__all__ = ["CorpusIndex", "check_rows", "index_corpus", "load_index", "save_index", "search_texts"]

log = logging.getLogger(__name__)
FACTS, VECTORS = "index.json", "vectors.safetensors"
KEPT_BYTES = 1 << 28
"""Vectors of a larger corpus are for `save_index`, where the user says so."""
TOLERANCE = 0.05
"""Distance, by the vector's length, that the same text's vector may move between two precisions."""


@dataclass(frozen=True, eq=False)
class CorpusIndex:
    """Vectors of documents in the corpus's order, the encoder they came from and a hash of the texts."""

    dense: DenseIndex
    encoder: str
    texts: str

    @property
    def vectors_MD(self) -> Tensor:
        """The document vectors, float32; 4 M D bytes."""
        return self.dense.corpus_MD

    def check(self, system: Encoder, texts: Sequence[str]) -> None:
        """Raise ModelError for another document encoder, DataError for other texts."""
        if self.encoder != system.document_fingerprint:
            raise ModelError(
                f"The index was made by document encoder {self.encoder[:12]}, this one is {system.document_fingerprint[:12]}",
                cure="Embed the corpus again: a changed document encoder voids its index.",
            )
        if self.texts != _hash(texts):
            raise DataError("The index was made from other documents", cure="Embed the corpus again.")


def _hash(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def index_corpus(system: Encoder, texts: Sequence[str], run: Run, *, prompt: str = "") -> CorpusIndex:
    """The texts embedded by the document encoder; up to KEPT_BYTES of vectors are kept in the store's cache."""
    encoder, hashed = system.document_fingerprint, _hash(texts)
    key = {
        "encoder": encoder,
        "texts": hashed,
        "prompt": prompt,
        "precision": run.precision,
        "exact": run.exact,
        "device": torch.device(run.device).type,
    }
    cache = Cache("documents")
    stored = cache.get(key)
    vectors_MD = torch.from_numpy(stored["vectors"]) if stored else embed(system, texts, run, prompt=prompt)
    if stored is None and 4 * vectors_MD.numel() <= KEPT_BYTES:
        cache.put(key, {"vectors": vectors_MD.numpy()})
    log.info("an index of %d documents, %.1f MB", len(vectors_MD), 4 * vectors_MD.numel() / 1e6)
    index = CorpusIndex(build_index(vectors_MD, run), encoder, hashed)
    check_rows(index, system, texts, run, prompt=prompt)
    return index


def check_rows(
    index: CorpusIndex, system: Encoder, texts: Sequence[str], run: Run, *, prompt: str = "", num: int = 4
) -> None:
    """Embed a few documents again and raise ModelError unless the nearest row of each is its own.

    By distance: an inner product may prefer a longer vector. One off by a place would be seen at once.
    """
    places = sorted({round(n * (len(texts) - 1) / max(num - 1, 1)) for n in range(num)})
    again_KD = embed(system, [texts[place] for place in places], run, prompt=prompt).to(index.vectors_MD)
    distance_KM = torch.cdist(again_KD, index.vectors_MD)
    for place, distance_M, again_D in zip(places, distance_KM, again_KD, strict=True):
        if distance_M[place] > distance_M.min() + TOLERANCE * again_D.norm():
            raise ModelError(
                f"Document {place} does not find itself: row {int(distance_M.argmin())} is nearer",
                cure="The rows of the index are not those of this corpus; embed it again.",
            )


def search_texts(
    system: Encoder, queries: Sequence[str], index: CorpusIndex, k: int, run: Run, *, prompt: str = ""
) -> Found:
    """The k documents of the largest inner product for each query, embedded by the system's query side."""
    return search(embed(system.for_queries, queries, run, prompt=prompt), index.dense, k, run)


def save_index(index: CorpusIndex, folder: Path | str) -> None:
    """Write the vectors and what they belong to."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"vectors": index.vectors_MD.cpu().contiguous()}, folder / VECTORS)
    (folder / FACTS).write_text(json.dumps({"encoder": index.encoder, "texts": index.texts}) + "\n")


def load_index(folder: Path | str, system: Encoder, texts: Sequence[str], run: Run) -> CorpusIndex:
    """The index in a folder, if it belongs to this encoder and these texts.

    Raises ModelError or DataError where it belongs to others, DataError where it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        facts = json.loads((folder / FACTS).read_text())
        vectors_MD = load_file(folder / VECTORS)["vectors"]
        index = CorpusIndex(build_index(vectors_MD, run), str(facts["encoder"]), str(facts["texts"]))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(
            f"The index cannot be read: {error!r}", where=str(folder), cure="Embed the corpus again."
        ) from None
    index.check(system, texts)
    return index
