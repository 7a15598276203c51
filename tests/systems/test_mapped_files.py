"""Pages of weights that a file is mapped to: gone when they are let go, and back with the same values."""

import mmap
import struct
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

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
