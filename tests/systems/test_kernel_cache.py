"""How many prepared products stay, in a process of its own: the libraries are told before they begin."""

import os
import subprocess
import sys

import pytest
import torch

from temper.systems.kernel_cache import VARIABLES

LOOK = """
import os, sys
from temper.systems.loading import load_base
load_base(sys.argv[1])
import torch
weight = torch.randn(64, 64).bfloat16()
for again in (False, True):
    for rows in range(1, 301):
        torch.randn(rows, 64).bfloat16() @ weight
print("said", *(os.environ.get(name, "-") for name in sys.argv[2:]))
"""


def look(system, **more):
    """How many of 600 products of 300 shapes were prepared, and what the environment says then."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | more
    done = subprocess.run(
        [sys.executable, "-c", LOOK, system, *VARIABLES],
        env=environment | {"ONEDNN_VERBOSE": "profile_create"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    said = next(line for line in done.stdout.splitlines() if line.startswith("said"))
    return done.stdout.count("create:cache_miss"), said.split()[1:]


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="bf16 products by oneDNN")
def test_a_text_model_leaves_few_products_behind():
    prepared, said = look("tiny:llama")
    assert said == ["128", "128"]
    assert prepared > 500, "the second round finds hardly any of the first"


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="bf16 products by oneDNN")
def test_what_the_user_has_set_stays():
    prepared, said = look("tiny:llama", **dict.fromkeys(VARIABLES, "1000"))
    assert said == ["1000", "1000"]
    assert prepared < 400


def test_pictures_of_one_size_keep_what_they_need():
    assert look("tiny:resnet")[1] == ["-", "-"]


def test_encoders_keep_more():
    assert look("tiny:bert")[1] == ["512", "512"]
