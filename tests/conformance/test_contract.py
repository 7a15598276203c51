"""Contract x registry: what every method owes, whoever wrote it."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from temper.artefacts import load_artefact
from temper.core import config, registry
from temper.core.errors import ConfigError, DataError, NeedsError, TemperError
from temper.core.types import Run
from temper.data.schemas import Data
from temper.run import verbs
from temper.run.checks import check_system

sys.path.insert(0, str(Path(__file__).parent))
from conftest import Stage, answers, files, find, plain, stages, weights

SLUGS = registry.slugs()
VERBS = [(slug, verb) for slug in SLUGS for verb in registry.load_card(slug).verbs]
FITS = [slug for slug in SLUGS if "fit" in registry.load_card(slug).verbs]
each_method = pytest.mark.parametrize("slug", SLUGS)
each_verb = pytest.mark.parametrize(("slug", "verb"), VERBS, ids=lambda value: str(value))
each_fit = pytest.mark.parametrize("slug", FITS)


@pytest.fixture(autouse=True)
def quiet_warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR")


@each_method
def test_settings_round_trip(slug: str) -> None:
    card = registry.load_card(slug)
    default = config.build(card.config).config
    again = config.build(card.config, [("again", config.to_dict(default))]).config
    assert again == default
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(default, dataclasses.fields(default)[0].name, None)


@each_method
def test_an_unknown_setting_stops(slug: str) -> None:
    with pytest.raises(ConfigError, match="no_such_setting"):
        config.build(registry.load_card(slug).config, [("test", {"no_such_setting": 1})])


@each_verb
def test_tiny_exercises_the_verb(slug: str, verb: str) -> None:
    assert find(slug, verb), f"the tiny recipe of {slug} has no {verb} step"


@each_verb
def test_same_call_same_result_and_inputs_unchanged(slug: str, verb: str) -> None:
    for stage in find(slug, verb):
        step = stage.step
        before = (config.to_dict(step.config), step.loaded.fingerprint if step.loaded else None)
        with stage.opened() as system:
            held = weights(system) if system is not None else {}
            first, second = stage.call(system=system), stage.call(system=system)
            after = weights(system) if system is not None else {}
        assert held.keys() == after.keys()
        assert all(torch.equal(held[name], after[name]) for name in held), "the caller's model changed"
        assert (config.to_dict(step.config), step.loaded.fingerprint if step.loaded else None) == before
        if verb in ("fit", "make"):
            assert first.fingerprint == second.fingerprint
        else:
            assert plain(first) == plain(second)
            assert plain(first)


@each_fit
def test_an_artefact_leaves_no_trace_and_survives_the_disk(slug: str, tmp_path: Path) -> None:
    for stage in find(slug, "fit"):
        artefact = stage.call()
        with stage.opened() as system:
            held, calm = weights(system), answers(system)
            with artefact.apply(system) as changed:
                applied = answers(changed)
            assert torch.equal(answers(system), calm)
            with pytest.raises(ZeroDivisionError), artefact.apply(system):
                raise ZeroDivisionError
            assert torch.equal(answers(system), calm)
            artefact.save(tmp_path / stage.step.id)
            loaded = load_artefact(tmp_path / stage.step.id)
            assert loaded.fingerprint == artefact.fingerprint
            with loaded.apply(system) as changed:
                assert torch.equal(answers(changed), applied)
            assert all(torch.equal(held[name], tensor) for name, tensor in weights(system).items())
        names = files(tmp_path / stage.step.id)
        assert not [name for name in names if Path(name).suffix not in (".json", ".safetensors", ".md")], (
            names
        )


@each_fit
def test_an_artefact_for_another_base_is_refused(slug: str) -> None:
    for stage in find(slug, "fit"):
        artefact = stage.call()
        if artefact.base == "*":
            continue
        from temper.systems.loading import load_base

        other = load_base("tiny:llama:7")
        with pytest.raises(TemperError, match="base"), artefact.apply(other):
            pass


@each_verb
def test_empty_parts_are_refused(slug: str, verb: str) -> None:
    required = [part for part in registry.load_card(slug).data[verb] if not part.endswith("?")]
    stage = find(slug, verb)[0]
    if not required:
        return
    empty = Data(dict.fromkeys(required, ()), "empty")
    call: Callable[..., object] = getattr(verbs, verb)
    with stage.opened() as system, pytest.raises((DataError, ConfigError)):
        call(slug, system, empty, config=stage.step.config)  # checks come before the first row


@each_method
def test_needs_are_checked_before_work(slug: str) -> None:
    """A remote system lacks gradients and hidden states; one of the wrong kind is refused by name."""
    from temper.systems.remote import Remote

    card = registry.load_card(slug)
    remote = Remote(model="none", base_url="http://127.0.0.1:9")
    needs_more = "Remote" not in card.kinds or card.needs - {"generate", "logprobs"}
    if needs_more:
        with pytest.raises((NeedsError, ConfigError)):
            check_system(slug, card, remote)


def one_row_at_a_time(stage: Stage) -> list:
    return plain(stage.call(Run(seed=stage.step.seed, batch_tokens=1)))


@each_verb
def test_batches_change_nothing(slug: str, verb: str) -> None:
    """Row by row and batched give the same numbers to 1e-3 in float32 (exact mode owes equality, tested in ops)."""
    if verb not in ("measure", "attack"):
        return
    for stage in find(slug, verb):
        with contextlib.suppress(NeedsError):
            alone, together = (
                one_row_at_a_time(stage),
                plain(stage.call(Run(seed=stage.step.seed, batch_tokens=100_000))),
            )
            assert len(alone) == len(together)
            for one, other in zip(alone, together, strict=True):
                if "value" in one and one["value"] is not None:
                    assert one["value"] == pytest.approx(other["value"], rel=1e-3, abs=1e-3), one
                else:
                    assert one == other


@each_method
def test_tiny_is_short(slug: str) -> None:
    import time

    stages(slug)
    began = time.monotonic()
    for stage in stages(slug):
        stage.call()
    assert time.monotonic() - began < 30, "tiny should take seconds; this bound allows for a busy machine"
