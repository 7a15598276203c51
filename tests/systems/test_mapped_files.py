"""Pages of weights that a file is mapped to: gone when they are let go, and back with the same values."""

import mmap
import struct
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from temper.artefacts import Tune, tuning
from temper.core.types import Run
from temper.systems.loading import load_base
from temper.systems.mapped_files import MappedFiles

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's account of memory")


def pages_here(tensor):
    """How many pages of the tensor stand in memory."""
    first, last = tensor.data_ptr() // mmap.PAGESIZE, (tensor.data_ptr() + tensor.nbytes - 1) // mmap.PAGESIZE
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(8 * first)
        found = file.read(8 * (last - first + 1))
    return sum(entry >> 63 for (entry,) in struct.iter_unpack("Q", found))


@pytest.fixture
def stored(tmp_path):
    """Two tensors of 4 MB in a file, and what they hold."""
    values = torch.randn(2, 1 << 20, generator=torch.Generator().manual_seed(0))
    save_file({"one": values[0].clone(), "two": values[1].clone()}, tmp_path / "model.safetensors")
    return load_file(tmp_path / "model.safetensors"), values


def test_a_files_pages_go_and_come_back(stored):
    tensors, values = stored
    assert torch.equal(tensors["one"], values[0])
    before = pages_here(tensors["one"])
    assert MappedFiles().let_go(tensors["one"])
    assert pages_here(tensors["one"]) < before // 100
    assert torch.equal(tensors["one"], values[0])
    assert pages_here(tensors["one"]) == before


def test_what_was_written_stays(stored):
    tensors, values = stored
    tensors["one"][5] = 7.0
    assert not MappedFiles().let_go(tensors["one"])
    assert not MappedFiles().let_go(tensors["two"]), "of a file that was written to anywhere nothing goes"
    assert tensors["one"][5] == 7.0
    assert torch.equal(tensors["two"], values[1])


def test_other_memory_stays(stored):
    tensors, _ = stored
    files = MappedFiles()
    own = torch.randn(1 << 20)
    assert not files.let_go(own)
    assert not files.let_go(tensors["one"].view(1024, 1024).T)


@pytest.mark.parametrize("tune", [Tune(mode="full"), Tune(r=2, frozen_dtype="bf16")])
def test_originals_of_what_trains_are_not_in_memory(tmp_path, tune):
    base = load_base("tiny:llama")
    config = LlamaConfig(vocab_size=16384, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    system = base.with_(model=LlamaForCausalLM.from_pretrained(tmp_path))
    original = system.model.model.embed_tokens.weight.data
    values = original.clone()
    with tuning(system, tune, Run()) as tuned:
        assert pages_here(original) < original.nbytes / mmap.PAGESIZE / 10
        assert torch.equal(tuned.system.model.model.embed_tokens.weight, values.to(tuned.system.model.dtype))
    assert system.model.model.embed_tokens.weight.data.data_ptr() == original.data_ptr()
    assert torch.equal(original, values)
