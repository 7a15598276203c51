"""What the training jobs share: their rows, and TRL's trainers with temper's settings.

`rows` and `pairs` run in temper's environment, everything named `trl_*` in TRL's.
"""

from __future__ import annotations

import random
import tempfile
from functools import partial
from typing import Any

from harness import Job, Measured, Side, model_folder, timed

CHATS, STEP_ROWS = {"lora": 200, "full": 100}, 8
COMPARED = 3
"""Steps whose losses are compared: adapters that began with other random numbers part ways."""
LR = {"lora": 2e-4, "full": 1e-5}
RANK, ALPHA = 16, 32
DPO_ROWS, DPO_EPOCHS = 4, 2
DPO_LR = {"lora": 5e-5, "full": 1e-6}


def chat_and_records() -> tuple[Any, list[Any]]:
    """The model's template without a system prompt, and requests with their refusals."""
    from transformers import AutoTokenizer

    from temper.data.loading import load_data
    from temper.systems.chat import Chat

    chat = Chat(AutoTokenizer.from_pretrained(model_folder()), system_prompt="none")
    return chat, [record for part in load_data("builtin:noncompliance").values() for record in part]


def rows(num: int, shortest: int = 30, longest: int = 300) -> dict[str, Any]:
    """Chats of several turns, their lengths uniform between the bounds; the assistant's turns are scored."""
    chat, records = chat_and_records()
    draw = random.Random(7)
    out = []
    for _ in range(num + 2):
        wanted, messages = draw.randint(shortest, longest), list(draw.choice(records).messages)
        while len(chat.dialogue(messages).ids) < wanted:
            messages += draw.choice(records).messages
        rendered = chat.dialogue(messages)
        scored = [False] * len(rendered.ids)
        for span in rendered.spans:
            if span.role == "assistant":
                scored[span.start : span.end] = [True] * (span.end - span.start)
        out.append({"ids": rendered.ids[:longest], "scored": scored[:longest]})
    return {"model": model_folder(), "rows": out[2:], "warm": out[:2]}


def pairs(num: int) -> dict[str, Any]:
    """Prompts of 40 to 200 tokens, several turns long, with two replies of 20 to 120 tokens each."""
    chat, records = chat_and_records()
    draw = random.Random(8)

    def reply(wanted: int) -> list[int]:
        text = ""
        while len(ids := chat.tokenizer(text, add_special_tokens=False)["input_ids"]) < wanted:
            text += draw.choice(records).messages[-1].content + " "
        return [*ids[: wanted - 1], chat.tokenizer.eos_token_id]

    out = []
    for _ in range(num + 2):
        wanted, messages = draw.randint(40, 200), []
        while not messages or len(chat.dialogue(messages).ids) < wanted:
            messages += draw.choice(records).messages
        prompt = chat.prompt(messages[:-1]).ids
        out.append(
            {
                "prompt_ids": prompt,
                "chosen_ids": reply(draw.randint(20, 120)),
                "rejected_ids": reply(draw.randint(20, 120)),
            }
        )
    return {"model": model_folder(), "rows": out[2:], "warm": out[:2]}


def num_pair_tokens(given: dict[str, Any]) -> int:
    """Tokens of both rows of every pair, the prompt counted in each, times `DPO_EPOCHS`."""
    sizes = [2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in given["rows"]]
    return DPO_EPOCHS * sum(sizes)


def temper_dpo(given: dict[str, Any], mode: str) -> Measured:
    """Reference log-probabilities and training, both timed; nothing comes from an earlier run's cache."""
    import os

    from temper.artefacts import tuning
    from temper.core.types import Run
    from temper.ops.batching import Example
    from temper.ops.preference import PreferenceObjective, PreferencePair, dpo, with_reference
    from temper.ops.train import TrainSettings, train
    from temper.systems.loading import load_base

    os.environ["TEMPER_CACHE"] = tempfile.mkdtemp()
    system, run = load_base(given["model"]), Run(precision="bf16")
    settings = TrainSettings(lr=DPO_LR[mode], batch_rows=DPO_ROWS, num_epochs=DPO_EPOCHS, shuffle=False)

    def row(prompt: list[int], reply: list[int]) -> Any:
        return Example([*prompt, *reply], [False] * len(prompt) + [True] * len(reply))

    def fit(name: str) -> Any:
        made = [
            PreferencePair(row(r["prompt_ids"], r["chosen_ids"]), row(r["prompt_ids"], r["rejected_ids"]))
            for r in given[name]
        ]
        made = with_reference(system, made, run)
        with tuning(system, temper_tune(mode), run) as tuned:
            return train(
                tuned.system.model,
                tuned.parameters(),
                lambda epoch: made,
                PreferenceObjective(partial(dpo, beta=0.1), tuned.system.pad_id),
                settings,
                run,
                length=lambda pair: pair.num_tokens,
            )

    fit("warm")
    log, seconds = timed(lambda: fit("rows"))
    return Measured(num_pair_tokens(given), seconds, {"loss": log.loss})


def trl_dpo(given: dict[str, Any], mode: str, **options: Any) -> Measured:
    """TRL's DPOTrainer on the same ids; its reference is timed too, with the trainer that may compute it beforehand."""
    import copy

    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    own = {
        "per_device_train_batch_size": DPO_ROWS,
        "learning_rate": DPO_LR[mode],
        "num_train_epochs": DPO_EPOCHS,
    }
    settings = trl_arguments(mode) | {"beta": 0.1, "max_length": None} | own | options
    model, tokenizer = trl_model(given["model"], mode), _tokenizer(given["model"])

    def fit(name: str) -> Any:
        trainer = Tokenised(
            copy.deepcopy(model),
            args=DPOConfig(tempfile.mkdtemp(), **settings),
            train_dataset=Dataset.from_list(given[name]),
            processing_class=tokenizer,
            peft_config=trl_lora(mode),
        )
        trainer.train()
        return trainer.state.log_history

    fit("warm")
    history, seconds = timed(lambda: fit("rows"))
    return Measured(
        num_pair_tokens(given), seconds, {"loss": [entry["loss"] for entry in history if "loss" in entry]}
    )


def num_tokens(given: dict[str, Any]) -> int:
    """Real tokens of the rows."""
    return sum(len(row["ids"]) for row in given["rows"])


def temper_tune(mode: str) -> Any:
    """The same adapters as `trl_lora`, on frozen weights in bf16 as there; or all weights."""
    from temper.artefacts import Tune

    return Tune(mode="full") if mode == "full" else Tune(r=RANK, alpha=ALPHA, frozen_dtype="bf16")


def temper_sft(given: dict[str, Any], mode: str) -> Measured:
    """Trains on the rows by temper's loop, `STEP_ROWS` a step."""
    from temper.artefacts import tuning
    from temper.core.types import Run
    from temper.ops.batching import Example
    from temper.ops.train import SftObjective, TrainSettings, train
    from temper.systems.loading import load_base

    system, run = load_base(given["model"]), Run(precision="bf16")
    settings = TrainSettings(lr=LR[mode], batch_rows=STEP_ROWS, shuffle=False)

    def fit(name: str) -> Any:
        examples = [Example(row["ids"], row["scored"]) for row in given[name]]
        with tuning(system, temper_tune(mode), run) as tuned:
            objective = SftObjective(tuned.system.pad_id)
            return train(
                tuned.system.model,
                tuned.parameters(),
                lambda epoch: examples,
                objective,
                settings,
                run,
                length=lambda item: len(item.ids),
            )

    fit("warm")
    log, seconds = timed(lambda: fit("rows"))
    return Measured(num_tokens(given), seconds, {"loss": log.loss})


def trl_sft(given: dict[str, Any], mode: str, **options: Any) -> Measured:
    """TRL's SFTTrainer on the rows; `options` are its own."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    def trainer(name: str) -> Any:
        labels = [[i if s else -100 for i, s in zip(r["ids"], r["scored"], strict=True)] for r in given[name]]
        data = Dataset.from_dict({"input_ids": [row["ids"] for row in given[name]], "labels": labels})
        return SFTTrainer(
            trl_model(given["model"], mode),
            SFTConfig(tempfile.mkdtemp(), **trl_arguments(mode) | {"max_length": None} | options),
            train_dataset=data,
            processing_class=_tokenizer(given["model"]),
            peft_config=trl_lora(mode),
        )

    trainer("warm").train()
    made = trainer("rows")
    _, seconds = timed(made.train)
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return Measured(num_tokens(given), seconds, {"loss": losses})


def trl_arguments(mode: str) -> dict[str, Any]:
    """The settings of the run, as transformers names them."""
    return {
        "bf16": True,
        "use_cpu": True,
        "per_device_train_batch_size": STEP_ROWS,
        "learning_rate": LR[mode],
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "seed": 0,
    }


def trl_model(folder: str, mode: str) -> Any:
    """Float32 weights where they train, bf16 where they stay frozen."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if mode == "full" else torch.bfloat16
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def trl_lora(mode: str) -> Any:
    """Adapters on every linear layer of the blocks; None for all weights."""
    from peft import LoraConfig

    if mode == "full":
        return None
    return LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


WEIGHTS = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
"""Of SmolLM2-135M's blocks."""
HEAD = 576 * 49152


def flops(mode: str, tokens: int, scored: int) -> int:
    """Products of training on so many tokens, the vocabulary where they are scored; "read" is a pass without gradient."""
    return {"full": 6, "lora": 4, "read": 2}[mode] * (tokens * WEIGHTS + scored * HEAD)


def most_tokens(given: dict[str, Any], mode: str, limits: dict[str, float]) -> float:
    """Tokens a second if nothing but products at the machine's bf16 rate took time."""
    scored = sum(sum(row["scored"]) for row in given["rows"])
    return num_tokens(given) * limits["flops_bf16"] / flops(mode, num_tokens(given), scored)


def most_pair_tokens(given: dict[str, Any], mode: str, limits: dict[str, float]) -> float:
    """The same for pairs: a prompt once for both replies, and the reference once for all epochs."""
    replies = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in given["rows"])
    tokens = replies + sum(len(row["prompt_ids"]) for row in given["rows"])
    work = DPO_EPOCHS * flops(mode, tokens, replies) + flops("read", tokens, replies)
    return num_pair_tokens(given) * limits["flops_bf16"] / work


def losses_agree(outputs: dict[str, Any], same_batches: set[str], tolerance: float) -> str:
    """Asserts that sides with temper's batches end with its loss; gives the sentence for the table."""
    ours = outputs.get("temper", {}).get("loss", [])
    seen = {}
    for name in same_batches & set(outputs):
        gap = max(abs(a - b) for a, b in zip(ours, outputs[name]["loss"], strict=True)) if ours else 0.0
        assert gap <= tolerance, f"{name}: losses differ by {gap:.3f}: {ours} and {outputs[name]['loss']}"
        seen[name] = gap
    return "; ".join(f"loss of each step within {gap:.3f} of {name}" for name, gap in sorted(seen.items()))


def first_losses_agree(outputs: dict[str, Any], same_batches: set[str], tolerance: float) -> str:
    """`losses_agree` of the first `COMPARED` steps."""
    first = {name: {"loss": found["loss"][:COMPARED]} for name, found in outputs.items()}
    return f"first {COMPARED} steps: " + losses_agree(first, same_batches, tolerance)


WHAT = {
    "lora": "LoRA of rank 16 on every linear layer",
    "full": "All weights in float32 under bf16 autocast",
}


def sft_job(mode: str) -> Job:
    """Fine-tuning beside TRL at its settings against padding; packed rows of 1024 tokens are about eight chats."""
    packed = {"packing": True, "max_length": 1024, "per_device_train_batch_size": 1}
    options: dict[str, dict[str, Any]] = {
        "padded": {},
        "padding-free": {"padding_free": True},
        "packing": packed,
        "length-grouped": {"train_sampling_strategy": "group_by_length"},
    }
    peers = {f"trl {name}": Side(partial(trl_sft, mode=mode, **own), "trl") for name, own in options.items()}
    return Job(
        name=f"sft-{mode}",
        about=f"{WHAT[mode]}: {CHATS[mode]} chats, 8 a step, one epoch.",
        unit="tokens/s",
        target=2.0,
        inputs=lambda: rows(CHATS[mode]),
        sides={"temper": Side(partial(temper_sft, mode=mode)), **peers},
        check=lambda outputs: first_losses_agree(outputs, {"trl padded", "trl padding-free"}, 0.05),
        limit=lambda given, limits: most_tokens(given, mode, limits),
    )


def dpo_job(mode: str) -> Job:
    """DPO beside TRL, its reference computed in each step or beforehand."""
    stored = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 8}
    return Job(
        name=f"dpo-{mode}",
        about=f"{WHAT[mode]}: 4 pairs, two epochs, the reference included.",
        unit="tokens/s",
        target=3.0,
        inputs=lambda: pairs(4),
        sides={
            "temper": Side(partial(temper_dpo, mode=mode)),
            "trl": Side(partial(trl_dpo, mode=mode), "trl"),
            "trl precomputed": Side(partial(trl_dpo, mode=mode, **stored), "trl"),
        },
        check=lambda outputs: losses_agree(outputs, {"trl", "trl precomputed"}, 0.05),
        limit=lambda given, limits: most_pair_tokens(given, mode, limits),
    )
