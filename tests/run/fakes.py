"""Methods without tensors, written to a folder, for tests of everything around a method."""

from __future__ import annotations

from pathlib import Path

import pytest

CARD = '''"""{title}.

Paper         None; a stand-in.
"""
from dataclasses import dataclass
from temper.core.card import Card, Claim

@dataclass(frozen=True, kw_only=True)
class Config:
    scale: float = 1.0
    """Multiplies every number."""
    num_items: int = 8
    """How many items there are."""
    pause_s: float = 0.0
    """Seconds each item takes."""

CARD = Card(title="{title}", paper="none", verbs={verbs}, config=Config, needs=frozenset(), kinds=(),
            data={data}, produces={produces}, claims={claims})
'''

MAKE = """
def make(system, data, config, run):
    import random, time
    from temper.data.schemas import Data, Text
    records = []
    for number in range(config.num_items):
        time.sleep(config.pause_s)
        records.append(Text(f"{random.random() * config.scale:.6f}", id=f"t{number}"))
    return Data({"train": records})
"""

FIT = '''
import json, random, time
from pathlib import Path

class Numbers:
    def __init__(self, values): self.values = values
    def save(self, folder):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "artefact.json").write_text(json.dumps(self.values))

def fit(system, data, config, run):
    """Sums with a checkpoint after every item, so that a killed run goes on."""
    state, at = run.folder / "checkpoint" / "state.json", 0
    values = []
    if run.resume and state.exists():
        values = json.loads(state.read_text())
    for record in data["train"][len(values):]:
        time.sleep(config.pause_s)
        values.append(float(record.text) * config.scale)
        state.parent.mkdir(exist_ok=True)
        draft = state.with_suffix(".tmp")
        draft.write_text(json.dumps(values))
        draft.replace(state)
    return Numbers(values)
'''

MEASURE = """
import random, time
from temper.core.types import Row

def measure(system, data, config, run):
    total = 0.0
    items = data.rows if len(data) else range(config.num_items)
    for number, item in enumerate(items):
        time.sleep(config.pause_s)
        value = config.scale + number + random.random() / 10
        total += value
        yield Row(metric="score", value=value, item=f"i{number}", higher_is_better=True)
    yield Row(metric="mean_score", value=total / (number + 1), n=number + 1, higher_is_better=True)
"""

ATTACK = """
import random, time
from temper.core.types import Attempt

def attack(system, data, config, run):
    for number in range(config.num_items):
        time.sleep(config.pause_s)
        yield Attempt(goal=f"g{number}", attack="fake", input="x", reply="y", success=number % 2 == 0,
                      cost={"queries": number + 1, "wall_s": time.time()}, detail={"loss": random.random()})
"""

RECIPES = """\
tiny:
  settings: {{num_items: 3}}
small:
  settings: {{num_items: 6}}
  arms:
    big: {{settings: {{scale: 5}}}}
    plain: {{}}
"""

CLAIMS = """(
    Claim(id="bigger", sentence="A larger scale scores higher.", metric="score", arm="big", baseline="plain",
          direction="higher", paper="none"),
    Claim(id="above", sentence="It is above 100.", metric="mean_score", arm="big", baseline=100.0, direction="higher"),
)"""

METHODS = {
    "fake_make": ("make", MAKE, "{}", "()", "()"),
    "fake_fit": ("fit", FIT, '{"fit": {"train": "Text"}}', '("weights",)', "()"),
    "fake_measure": ("measure", MEASURE, '{"measure": {"train?": "Text"}}', "()", CLAIMS),
    "fake_attack": ("attack", ATTACK, "{}", "()", "()"),
}

PIPELINE = """\
name: chain
matrix: {{seed: [0, 1]}}
steps:
  - {{id: rows, make: fake-make, settings: {{pause_s: {pause}}}}}
  - {{id: sums, fit: fake-fit, data: rows, settings: {{pause_s: {pause}}}}}
  - {{id: score, measure: fake-measure, data: rows, settings: {{pause_s: {pause}}}}}
  - {{id: red, attack: fake-attack, settings: {{pause_s: {pause}}}}}
arms:
  one: {{}}
  two: {{rows: {{settings: {{scale: 2}}}}}}
"""


def write_methods(root: Path) -> Path:
    """A TEMPER_METHODS folder with one method a verb."""
    for name, (verb, code, data, produces, claims) in METHODS.items():
        folder = root / "fakes" / name
        folder.mkdir(parents=True)
        card = CARD.format(
            title=f"Fake {verb}", verbs=f'("{verb}",)', data=data, produces=produces, claims=claims
        )
        (folder / "card.py").write_text(card)
        (folder / "method.py").write_text(code)
        (folder / "recipes.yaml").write_text(RECIPES.format())
    return root


def own_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in `path`, with a cache of its own and these methods; gives the folder of the methods."""
    root = write_methods(path / "methods")
    monkeypatch.setenv("TEMPER_METHODS", str(root))
    monkeypatch.setenv("TEMPER_CACHE", str(path / "cache"))
    monkeypatch.chdir(path)
    return root


def write_pipeline(path: Path, pause_s: float = 0.0) -> Path:
    path.write_text(PIPELINE.format(pause=pause_s))
    return path
