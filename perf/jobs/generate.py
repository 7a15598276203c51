"""Greedy replies to 64 chat prompts, half of them questions and half texts to sum up, in float32.

All sides get the same ids, stop at the same end token and write the same text. Peers take 32 prompts at a time; other
batch sizes were not tried. lm-evaluation-harness is timed with its tokenising and decoding of text, temper with its decoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness import Job, Measured, Side, main, model_folder, timed

NUM_PROMPTS = 64
NEW_TOKENS = 48
WORDS = (12, 130)
"""Words of the shortest and the longest text to sum up; the lengths between grow by a constant factor."""
BATCH = 32


def inputs() -> dict[str, Any]:
    """Prompts as ids and as the text that gives these ids."""
    import random

    from temper.core.types import Message
    from temper.data.loading import load_data
    from temper.data.schemas import Dialogue
    from temper.systems.loading import load_base

    system = load_base("smollm2-135m")
    drawn = random.Random(0)
    asked = [row.prompt[-1].content for row in load_data("builtin:noncompliance").records("test", Dialogue)]
    told = [row.reply for row in load_data("builtin:people").records("retain", Dialogue)]
    low, high = WORDS
    counts = [round(low * (high / low) ** (n / (NUM_PROMPTS // 2 - 1))) for n in range(NUM_PROMPTS // 2)]
    texts = [" ".join(" ".join(drawn.sample(told, 24)).split()[:count]) for count in counts]
    messages = drawn.sample(asked, NUM_PROMPTS // 2) + [f"Sum up in a sentence: {text}" for text in texts]
    drawn.shuffle(messages)
    prompts = []
    for message in messages:
        rendered = system.chat.prompt([Message("user", message)])
        assert system.tokenizer(rendered.text)["input_ids"] == list(rendered.ids)
        prompts.append({"ids": list(rendered.ids), "text": rendered.text})
    return {"model": model_folder(), "prompts": prompts, "end": sorted(system.stop_ids)}


def temper(given: Any) -> Measured:
    """`generate` as anybody calls it."""
    from temper.core.types import Run
    from temper.ops.generate import Sampling, generate
    from temper.systems.loading import load_base

    system = load_base(given["model"])
    prompts = [prompt["ids"] for prompt in given["prompts"]]
    generate(system, prompts[:2], Sampling(max_new_tokens=4), Run())
    replies, seconds = timed(lambda: generate(system, prompts, Sampling(max_new_tokens=NEW_TOKENS), Run()))
    return _measured(given, [reply.ids for reply in replies], seconds)


def plain(given: Any) -> Measured:
    """Padded batches in the order of the prompts."""
    return _transformers(given, sort=False)


def by_length(given: Any) -> Measured:
    """Padded batches of prompts sorted by length."""
    return _transformers(given, sort=True)


def _transformers(given: Any, *, sort: bool) -> Measured:
    import torch

    model = _load(given, "sdpa")
    prompts = [prompt["ids"] for prompt in given["prompts"]]

    def work(order: Sequence[int], new_tokens: int) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            longest = max(len(prompts[row]) for row in rows)
            ids = torch.zeros(len(rows), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(rows):
                ids[place, longest - len(prompts[row]) :] = torch.tensor(prompts[row])
                mask[place, longest - len(prompts[row]) :] = 1
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
            )
            found |= dict(zip(rows, out[:, longest:].tolist(), strict=True))
        return [found[row] for row in sorted(found)]

    order = list(range(len(prompts)))
    if sort:
        order.sort(key=lambda row: -len(prompts[row]))
    work(order[:2], 4)
    replies, seconds = timed(lambda: work(order, NEW_TOKENS))
    return _measured(given, replies, seconds)


def continuous(given: Any) -> Measured:
    """`generate_batch`, rows entering and leaving a paged cache."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = _load(given, "paged|sdpa")
    prompts = [prompt["ids"] for prompt in given["prompts"]]
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=given["end"][0], pad_token_id=0
    )
    # Its own guess of the cache's size takes 14 GB here.
    cache = ContinuousBatchingConfig(num_blocks=4 * NUM_PROMPTS, page_size=128, max_batch_tokens=512)

    def work(some: Sequence[list[int]]) -> Any:
        return model.generate_batch(inputs=some, generation_config=settings, continuous_batching_config=cache)

    work(prompts[:2])
    found, seconds = timed(lambda: work(prompts))
    outputs = [
        found[key].generated_tokens for key in sorted(found, key=lambda key: int(key.rsplit("_", 1)[-1]))
    ]
    return _measured(given, outputs, seconds)


def harness_lm(given: Any) -> Measured:
    """`HFLM.generate_until`; its padding token is another than the end token, else no padding is masked."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=given["model"], device="cpu", dtype="float32", batch_size=BATCH)
    lm.tokenizer.pad_token_id = 0

    def work(texts: Sequence[str], new_tokens: int) -> list[str]:
        settings = {"until": [], "max_gen_toks": new_tokens, "do_sample": False}
        rows = [Instance("generate_until", {}, (text, settings), n) for n, text in enumerate(texts)]
        return lm.generate_until(rows, disable_tqdm=True)

    texts = [prompt["text"] for prompt in given["prompts"]]
    work(texts[:2], 4)
    replies, seconds = timed(lambda: work(texts, NEW_TOKENS))
    units = sum(min(NEW_TOKENS, 1 + len(lm.tokenizer(text)["input_ids"])) for text in replies)
    return Measured(units, seconds, [text.strip() for text in replies])


def _load(given: Any, attention: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        given["model"], dtype=torch.float32, attn_implementation=attention
    ).eval()


def _measured(given: Any, replies: Sequence[Sequence[int]], seconds: float) -> Measured:
    """Tokens up to the end token, it included; the text without it."""
    from transformers import AutoTokenizer

    tokenizer, ends = AutoTokenizer.from_pretrained(given["model"]), set(given["end"])
    written = []
    for ids in replies:
        stop = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
        written.append(list(ids[: stop + 1]))
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    return Measured(sum(map(len, written)), seconds, [text.strip() for text in texts])


def check(outputs: Mapping[str, Sequence[str]]) -> str:
    """Every side's texts against temper's."""
    ours = outputs.get("temper") or next(iter(outputs.values()))
    for name, texts in outputs.items():
        differ = sum(a != b for a, b in zip(ours, texts, strict=True))
        assert not differ, f"{name}: {differ} of {len(ours)} texts differ"
    return f"{len(ours)} identical texts on every side"


def limit(given: Any, machine: Mapping[str, float]) -> float:
    """Every prompt token once through the layers, every written one through the vocabulary as well."""
    read = sum(len(prompt["ids"]) for prompt in given["prompts"])
    written = NUM_PROMPTS * NEW_TOKENS
    layers, vocabulary = 2 * 106.2e6, 2 * 28.3e6
    return written / ((read * layers + written * (layers + vocabulary)) / machine["flops_fp32"])


JOB = Job(
    name="generate",
    about=__doc__ or "",
    unit="tokens/s",
    target=2.0,
    inputs=inputs,
    sides={
        "temper": Side(temper),
        "transformers": Side(plain, env="transformers"),
        "transformers-sorted": Side(by_length, env="transformers"),
        "transformers-continuous": Side(continuous, env="transformers"),
        "lm-evaluation-harness": Side(harness_lm, env="lm_eval"),
    },
    check=check,
    limit=limit,
)

if __name__ == "__main__":
    main(JOB)
