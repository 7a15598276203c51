"""Every example runs: on a random model, with a few rows, in two of its arms."""

import re
from pathlib import Path

import pytest

from temper.run.execute import run_recipe
from temper.run.recipe import load_recipe

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_to_its_rows(example, tmp_path, caplog):
    caplog.set_level("ERROR")
    text = example.read_text().replace("smollm2-135m", "tiny:llama").replace("bf16", "float32")
    # Calibration wants a row of every category.
    limit = "limit: 60" if "noncompliance" in text else "limit: 3"
    text = re.sub(r"^limit: \d+$", limit, text, flags=re.MULTILINE)
    if "\nlimit:" not in text:
        text = text.replace("\nsteps:", f"\n{limit}\nsteps:")
    small = tmp_path / example.name
    small.write_text(text)
    arms = tuple(load_recipe(str(small)).arms)[:2]
    result = run_recipe(str(small), out=str(tmp_path / "runs"), arms=arms)
    assert result.num_rows > 0
    assert set(result.outcomes.values()) == {"ran"}
