"""What is done once to the unpacked members of an asset: weights to safetensors, texts to our columns.

A conversion works in the asset's own folder and removes the members it no longer needs.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import hashlib
import html
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path

from temper.core.errors import StoreError
from temper.core.types import Json, Message
from temper.data import image_conversions
from temper.data.loading import write_jsonl
from temper.data.schemas import Choice, Dialogue, Labelled

__all__ = ["STEPS", "convert"]

TEST_SHARE = 5
"""One film in this many is kept for the test part."""
TAB_HEADER = 3
"""Lines of names and types before the rows."""


def convert(step: str, folder: Path) -> None:
    """Run a named conversion in `folder`."""
    STEPS[step](folder)


def _gguf(folder: Path) -> None:
    """`model.gguf` as a plain Hugging Face folder: float32 safetensors, config and tokenizer."""
    import torch
    import transformers

    # Dequantising draws its bar whether or not there is a terminal; errors are raised, not printed.
    with contextlib.redirect_stderr(io.StringIO()):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file="model.gguf", dtype=torch.float32
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        _plain_copy(loaded).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "model.gguf").unlink()


def _plain_copy(loaded: Json) -> Json:
    """The same weights in a fresh model; one that came from GGUF refuses to be saved."""
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.tie_weights()
    _check_tied(plain)
    return plain


def _check_tied(model: Json) -> None:
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    if model.config.tie_word_embeddings and not tied:
        raise StoreError("The output embeddings were not tied to the input ones", where=type(model).__name__)


def _rotten_tomatoes(folder: Path) -> None:
    """Reviews as Labelled; a film's reviews are all in one part."""
    path = folder / "reviews.csv.bz2"
    reader = csv.DictReader(io.StringIO(bz2.decompress(path.read_bytes()).decode("utf-8")))
    parts: dict[str, list[Labelled]] = {"train": [], "test": []}
    for number, row in enumerate(reader, start=1):
        if row["category"] == "plot":
            continue  # what a film is about, not what someone thought of it
        label, text, film = row["category"], row["text"], row["movie_name"]
        part = "test" if _bucket(film) == 0 else "train"
        parts[part].append(Labelled(text, label, id=f"review-{number}", extra={"film": film}))
    for part, records in parts.items():
        write_jsonl(folder / f"{part}.jsonl", records)
    path.unlink()


def _bucket(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % TEST_SHARE


def _chitchat(folder: Path) -> None:
    """Conversations as Dialogue: whoever opens is the user; one-sided ones are left out."""
    path = folder / "dataset.json"
    conversations = json.loads(path.read_text("utf-8"))
    write_jsonl(folder / "train.jsonl", _dialogues(conversations))
    path.unlink()


def _dialogues(conversations: dict[str, Json]) -> Iterator[Dialogue]:
    for name, conversation in conversations.items():
        lines = [line for turn in conversation["messages"] for line in turn if line["text"].strip()]
        turns = [
            (who, [line["text"] for line in group])
            for who, group in groupby(lines, lambda line: line["sender"])
        ]
        if len({who for who, _ in turns}) == 2:
            messages = tuple(
                Message("user" if who == turns[0][0] else "assistant", "\n".join(texts))
                for who, texts in turns
            )
            topic = {"topic": conversation["prompt"]} if "prompt" in conversation else {}
            yield Dialogue(messages, id=name, extra={**topic, **conversation.get("ratings", {})})


def _refusal_labels(folder: Path) -> None:
    """Replies with people's labels: 1 refusal, 0 not."""
    for file, part in (("refusal.csv", "test"), ("refusal_extra.csv", "extra")):
        path = folder / file
        lines = path.read_text("utf-8-sig").splitlines(keepends=True)
        first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
        write_jsonl(folder / f"{part}.jsonl", _labelled_replies(csv.DictReader(lines[first:]), part))
        path.unlink()


def _labelled_replies(rows: Iterable[dict[str, str]], part: str) -> Iterator[Labelled]:
    for number, row in enumerate(rows, start=1):
        extra = {"prompt": row["objective"]}
        yield Labelled(row["assistant_response"], int(row["human_score"]), id=f"{part}-{number}", extra=extra)


def _mmlu_parallel(folder: Path) -> None:
    """One part a language; a question has the same id in all of them."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML values; a reference to a function is read as its name."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: suffix)
    for path in folder.glob("*.yaml"):
        # The file is many documents joined, each beginning with the same key.
        documents = re.split(r"(?m)^(?=fewshot_config:)", path.read_text("utf-8"))[1:]
        tasks = [yaml.load(text, Loader) for text in documents]
        write_jsonl(folder / f"{path.stem}.jsonl", _questions(tasks))
        path.unlink()


def _questions(tasks: Iterable[dict[str, Json]]) -> Iterator[Choice]:
    for task in tasks:
        for number, sample in enumerate(task["fewshot_config"]["samples"], start=1):
            letters = sorted(sample["input_choice_list"])
            choices = tuple(html.unescape(str(sample["input_choice_list"][letter])) for letter in letters)
            yield Choice(
                html.unescape(sample["input_question"]), choices, letters.index(sample["input_correct_responses"][0]),
                id=f"{task['task_alias']}-{number}", extra={"subject": task["task_alias"]},
            )  # fmt: skip


def _newsgroups(folder: Path) -> None:
    """Posts as Labelled, under the set's own parts; the few without a word are left out."""
    for part in ("train", "test"):
        path = folder / f"{part}.tab"
        rows = (
            line.split("\t") for line in path.read_text("utf-8").splitlines()[TAB_HEADER:] if line.strip()
        )
        write_jsonl(
            folder / f"{part}.jsonl",
            (
                Labelled(text.strip(), group, id=f"{part}-{number}")
                for number, (group, text) in enumerate(rows, start=1)
                if text.strip()
            ),
        )
        path.unlink()


STEPS: dict[str, Callable[[Path], None]] = {
    "gguf": _gguf,
    "rotten-tomatoes": _rotten_tomatoes,
    "chitchat": _chitchat,
    "refusal-labels": _refusal_labels,
    "mmlu-parallel": _mmlu_parallel,
    "20newsgroups": _newsgroups,
    "mnist-5k": image_conversions.mnist_5k,
    "fashion-mnist": image_conversions.fashion_mnist,
    "efficientnet-lite0": image_conversions.efficientnet_lite0,
}
