"""Adapters: PEFT reads what is saved; strength, composition and merging are the arithmetic they claim."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from temper.artefacts import Adapter, Tune, Weights, load_artefact, tuning
from temper.core.errors import ConfigError, ModelError
from temper.core.types import Run

from .conftest import IDS, logits, make_system, record, train

# PEFT asks the model under an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def fitted(system: Any, run: Run, **settings: Any) -> Adapter:
    with tuning(system, Tune(r=4, alpha=6, **settings), run) as t:
        train(t)
        artefact = t.finish("made-up")
    assert isinstance(artefact, Adapter)
    return artefact


def test_peft_loads_the_folder_unchanged(system: Any, run: Run, tmp_path: Path) -> None:
    adapter = fitted(system, run)
    adapter.save(tmp_path / "a")
    peft = PeftModel.from_pretrained(copy.deepcopy(system.model), str(tmp_path / "a")).eval()
    assert not [name for name, p in peft.named_parameters() if p.requires_grad]
    with adapter.apply(system) as changed, torch.no_grad():
        torch.testing.assert_close(logits(changed), peft(IDS, use_cache=False).logits, atol=1e-5, rtol=1e-5)
    assert (logits(system) - peft(IDS, use_cache=False).logits).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama-tied", "llama-untied", "gpt2", "qwen2"])
def test_peft_loads_new_rows_after_a_resize(family: str, run: Run, tmp_path: Path) -> None:
    system = make_system(family)
    adapter = fitted(system, run, new_tokens=("[a]", "[b]", "[c]", "[d]", "[REFUSE_legal]"), reuse_ids=(2,))
    adapter.save(tmp_path / "a")
    assert adapter.vocabulary is not None
    ids = torch.tensor([[5, 2, *adapter.vocabulary.ids, 9]])
    base = copy.deepcopy(system.model)
    with adapter.apply(system) as changed:
        wanted = logits(changed, ids)
    base.resize_token_embeddings(wanted.shape[-1], mean_resizing=False)
    peft = PeftModel.from_pretrained(base, str(tmp_path / "a")).eval()
    with torch.no_grad():
        torch.testing.assert_close(peft(ids, use_cache=False).logits, wanted, atol=1e-5, rtol=1e-5)


def test_a_head_with_a_bias_keeps_it(run: Run) -> None:
    """PEFT's token layer leaves the bias out, so it is no oracle here: the merged matrices are."""
    system = make_system("phi")
    system.model.lm_head.bias.data.normal_()
    with tuning(system, Tune(r=2, new_tokens=("[a]",)), run) as t:
        train(t)
        trained = logits(t.system)
        artefact = t.finish("made-up")
    with artefact.apply(system) as changed:
        torch.testing.assert_close(logits(changed), trained, atol=1e-5, rtol=1e-5)


def test_strength_scales_the_low_rank_change(system: Any, run: Run, tmp_path: Path) -> None:
    adapter = fitted(system, run)
    with adapter.apply(system, 0.0) as changed:
        assert torch.equal(logits(changed), logits_before(system, adapter))
    adapter.save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 3}))
    halved = PeftModel.from_pretrained(copy.deepcopy(system.model), str(tmp_path / "a")).eval()
    with adapter.apply(system, 0.5) as changed, torch.no_grad():
        torch.testing.assert_close(logits(changed), halved(IDS, use_cache=False).logits, atol=1e-5, rtol=1e-5)


def logits_before(system: Any, adapter: Adapter) -> torch.Tensor:
    return logits(make_system(system.spec.removeprefix("tiny:")))


def test_strength_by_hand(llama: Any) -> None:
    """One pair of rank 1: W + 0.5 * (3 / 1) * b a."""
    name = "model.layers.0.mlp.up_proj"
    down, up = torch.zeros(1, 16), torch.zeros(24, 1)
    down[0, 3], up[5, 0] = 2.0, 7.0
    prefix = f"base_model.model.{name}"
    adapter = Adapter(
        llama.fingerprint,
        "made-up",
        {"r": 1, "lora_alpha": 3},
        {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up},
    )
    before = llama.model.get_submodule(name).weight.detach().clone()
    with adapter.apply(llama, 0.5) as changed:
        delta = changed.model.get_submodule(name).weight - before
    wanted = torch.zeros(24, 16)
    wanted[5, 3] = 21.0
    torch.testing.assert_close(delta, wanted, atol=1e-6, rtol=1e-6)


def test_adapters_compose_and_a_second_fits_only_on_the_first(system: Any, run: Run) -> None:
    before = record(system)
    first = fitted(system, run, new_tokens=("[REFUSE]",))
    with first.apply(system) as once:
        second = fitted(once, Run(seed=9), new_tokens=("[RESPOND]",))
        with second.apply(once) as twice:
            both = logits(twice)
            assert len(twice.tokenizer) == len(system.tokenizer) + 2
            fingerprint = twice.fingerprint
    assert record(system) == before
    assert not second.fits(system)
    with pytest.raises(ModelError, match="fitted on base") as wrong, second.apply(system):
        pass
    assert second.base[:12] in str(wrong.value)
    assert system.fingerprint[:12] in str(wrong.value)
    with first.apply(system, 0.9) as weaker:
        assert not second.fits(weaker)
    with first.apply(system) as once, second.apply(once) as twice:
        assert torch.equal(logits(twice), both)
        assert twice.fingerprint == fingerprint
        assert len({system.fingerprint, once.fingerprint, twice.fingerprint}) == 3
    assert record(system) == before


def test_merge_equals_apply_and_takes_a_fresh_adapter(system: Any, run: Run, tmp_path: Path) -> None:
    before = record(system)
    adapter = fitted(system, run, new_tokens=("[REFUSE]",), reuse_ids=(3,))
    merged = adapter.merge(system)
    assert record(system) == before
    assert isinstance(merged, Weights)
    loaded = load_artefact(merged.save(tmp_path / "w"))
    with adapter.apply(system) as changed:
        wanted, size = logits(changed), len(changed.tokenizer)
    with loaded.apply(system) as changed:
        assert torch.equal(logits(changed), wanted)
        assert len(changed.tokenizer) == size
        fresh = fitted(changed, run)
        assert fresh.fits(changed)
    assert record(system) == before


def test_save_and_load_give_the_same_answers(system: Any, run: Run, tmp_path: Path) -> None:
    adapter = fitted(system, run, new_tokens=("[REFUSE]",))
    loaded = load_artefact(adapter.save(tmp_path / "a"))
    assert (loaded.base, loaded.method, loaded.fingerprint) == (
        adapter.base,
        adapter.method,
        adapter.fingerprint,
    )
    with adapter.apply(system, 0.8) as one:
        wanted = logits(one)
    with loaded.apply(system, 0.8) as two:
        assert torch.equal(logits(two), wanted)


def test_bf16_base_keeps_its_dtype(llama: Any, run: Run) -> None:
    llama.model.to(torch.bfloat16)
    adapter = fitted(llama, run)
    with adapter.apply(llama) as changed:
        assert {p.dtype for p in changed.model.parameters()} == {torch.bfloat16}
    assert {t.dtype for t in adapter.tensors.values()} == {torch.float32}


def test_strength_must_be_finite(llama: Any, run: Run) -> None:
    adapter = fitted(llama, run)
    with pytest.raises(ConfigError, match="not a finite number"), adapter.apply(llama, float("nan")):
        pass
