"""Tiny systems whose random weights are large enough that every token has a say in the next."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
)

from temper.systems.causal_lm import CausalLM
from temper.systems.chat import Chat
from temper.systems.tiny import build_tokenizer

SHARED = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 160,
    "initializer_range": 0.3,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHARED, num_key_value_heads=2),
    "qwen2": lambda: Qwen2Config(**SHARED, num_key_value_heads=2),
    "gemma": lambda: GemmaConfig(**SHARED, num_key_value_heads=1, head_dim=8),
    "gemma2": lambda: Gemma2Config(**SHARED, num_key_value_heads=2, head_dim=8, sliding_window=8),
    "mistral": lambda: MistralConfig(**SHARED, num_key_value_heads=2, sliding_window=8),
    "mistral-wide": lambda: MistralConfig(**SHARED, num_key_value_heads=2, sliding_window=128),
    "neox": lambda: GPTNeoXConfig(**SHARED),
    "gpt2": lambda: GPT2Config(
        vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=160, initializer_range=0.3,
        pad_token_id=3, bos_token_id=1, eos_token_id=2,
    ),
    "mamba": lambda: MambaConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=3, bos_token_id=1,
        eos_token_id=2,
    ),
}  # fmt: skip


def build_lively(kind, attention="sdpa", seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), attn_implementation=attention).eval()
    tokenizer = build_tokenizer()
    return CausalLM(model, tokenizer, Chat(tokenizer), spec=f"lively:{kind}")


def draw_prompts(lengths, seed=0, prefix=()):
    generator = torch.Generator().manual_seed(seed)
    return [[*prefix, *torch.randint(4, 512, (length,), generator=generator).tolist()] for length in lengths]


@torch.no_grad()
def slow_greedy_ids(system, ids, num_tokens):
    """The slow twin: the whole text through the model for every token, no cache, one row."""
    out = list(ids)
    for _ in range(num_tokens):
        logits_V = system.model(input_ids=torch.tensor([out]), use_cache=False).logits[0, -1]
        out.append(int(logits_V.float().argmax()))
        if out[-1] in system.stop_ids:
            break
    return out[len(ids) :]


@pytest.fixture(scope="session")
def lively():
    """`lively(kind, attention="sdpa", seed=0)` builds a system."""
    return build_lively


@pytest.fixture(scope="session")
def random_prompts():
    """`random_prompts(lengths, seed=0, prefix=())` draws lists of ids."""
    return draw_prompts


@pytest.fixture(scope="session")
def slow_greedy():
    """`slow_greedy(system, ids, num_tokens)` is the slow twin of greedy generation."""
    return slow_greedy_ids
