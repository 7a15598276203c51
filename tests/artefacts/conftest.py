"""Tiny random systems of three families and a strict record of everything a model is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from temper.artefacts import Tuning
from temper.core.types import Run
from temper.systems.causal_lm import CausalLM
from temper.systems.chat import Chat

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL = ["<|start|>", "<|end|>", "<|spare_a|>", "<|spare_b|>"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["refuse respond legal the a question assistant user"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|start|>", eos_token="<|end|>")
    tokenizer.add_tokens(["<|spare_a|>", "<|spare_b|>"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(family: str, vocab_size: int) -> Any:
    torch.manual_seed(7)
    small = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if family == "llama-tied":
        return LlamaForCausalLM(LlamaConfig(**small, tie_word_embeddings=True))
    if family == "llama-untied":
        return LlamaForCausalLM(LlamaConfig(**small, tie_word_embeddings=False))
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**small, tie_word_embeddings=True))
    if family == "phi":
        return PhiForCausalLM(PhiConfig(**small))
    assert family == "gpt2"
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=128,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


FAMILIES = ("llama-tied", "llama-untied", "gpt2", "qwen2", "phi")


def make_system(family: str) -> CausalLM:
    tokenizer = tiny_tokenizer()
    model = tiny_model(family, len(tokenizer) + 4).eval()  # as many families do, more rows than tokens
    return CausalLM(model=model, tokenizer=tokenizer, chat=Chat(tokenizer), spec=f"tiny:{family}")


@pytest.fixture(params=FAMILIES)
def system(request: pytest.FixtureRequest) -> CausalLM:
    return make_system(request.param)


@pytest.fixture
def llama() -> CausalLM:
    return make_system("llama-tied")


@pytest.fixture
def run() -> Run:
    return Run(seed=3)


IDS = torch.tensor([[5, 9, 17, 30, 2], [8, 8, 100, 41, 77]])


def train(t: Tuning, ids: torch.Tensor = IDS, steps: int = 3, lr: float = 0.05) -> None:
    optimiser = torch.optim.AdamW(t.parameters(), lr=lr)
    t.system.model.train()
    for _ in range(steps):
        out = t.system.model(input_ids=ids, labels=ids)
        out.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    t.system.model.eval()


@torch.no_grad()
def logits(system: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # GPT-2 has dropout of its own, on when a test has it in training mode
        return system.model(input_ids=ids, use_cache=False).logits.clone()


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (
        tensor.dtype,
        tuple(tensor.shape),
        tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist(),
    )


def record(system: CausalLM) -> dict[str, Any]:
    """Everything that must be the same afterwards: bits, objects, ties, hooks, flags, config, tokenizer, outputs."""
    model = system.model
    named = list(model.named_parameters(remove_duplicate=False)) + list(
        model.named_buffers(remove_duplicate=False)
    )
    return {
        "bits": {name: bits(tensor) for name, tensor in named},
        "objects": {name: id(tensor) for name, tensor in named},
        "storage": {name: tensor.data_ptr() for name, tensor in named},
        "grads": {name: (tensor.requires_grad, tensor.grad is None) for name, tensor in named},
        "tree": [(name, type(module).__name__, id(module)) for name, module in model.named_modules()],
        "reprs": repr(model),
        "training": [module.training for module in model.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "config": model.config.to_dict(),
        "vocabulary": (len(system.tokenizer), system.tokenizer.get_vocab()),
        "chat": (id(system.chat), system.chat.sha256),
        "fingerprint": system.fingerprint,
        "outputs": bits(logits(system)),
    }
