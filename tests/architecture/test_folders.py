"""Every method's folder is complete, and its parts agree with its card."""

from __future__ import annotations

import json

import pytest
import yaml

from temper.core import config, registry
from temper.core.card import CAPABILITIES, PRODUCTS, VERBS

FILES = ("card.py", "method.py", "recipes.yaml", "evidence.jsonl")
STORY = ("Paper", "What you get", "Idea", "Maths", "Departures", "Limits", "Reference code")
SLUGS = registry.slugs()


def test_there_are_methods() -> None:
    assert len(SLUGS) >= 5


@pytest.mark.parametrize("slug", SLUGS)
def test_folder_is_complete(slug: str) -> None:
    entry = registry.find(slug)
    missing = [name for name in (*FILES, f"test_{entry.folder.name}.py") if not entry.file(name).is_file()]
    assert not missing
    assert entry.file("evidence.jsonl").stat().st_size > 0


@pytest.mark.parametrize("slug", SLUGS)
def test_story_has_every_part_in_order(slug: str) -> None:
    story = registry.load_story(slug)
    places = [story.find(f"\n{part}") for part in STORY]
    assert -1 not in places, [part for part, place in zip(STORY, places, strict=True) if place == -1]
    assert places == sorted(places)


@pytest.mark.parametrize("slug", SLUGS)
def test_card_is_sound(slug: str) -> None:
    card = registry.load_card(slug)
    assert set(card.verbs) <= set(VERBS)
    assert card.verbs
    assert card.needs <= set(CAPABILITIES)
    assert set(card.produces) <= set(PRODUCTS)
    assert set(card.data) == set(card.verbs)
    assert len({claim.id for claim in card.claims}) == len(card.claims) > 0
    assert all(field.doc for field in config.describe(card.config)), "a setting has no docstring"


@pytest.mark.parametrize("slug", SLUGS)
def test_recipes_are_the_three(slug: str) -> None:
    recipes = yaml.safe_load(registry.find(slug).file("recipes.yaml").read_text())
    assert set(recipes) >= {"tiny", "small", "paper"}


@pytest.mark.parametrize("slug", SLUGS)
def test_evidence_names_the_claims_arms(slug: str) -> None:
    rows = [json.loads(line) for line in registry.find(slug).file("evidence.jsonl").read_text().splitlines()]
    arms = {row["arm"] for row in rows}
    metrics = {row["metric"] for row in rows}
    for claim in registry.load_card(slug).claims:
        assert claim.metric in metrics, claim.id
        assert claim.arm in arms, claim.id
        assert not isinstance(claim.baseline, str) or claim.baseline in arms, claim.id
