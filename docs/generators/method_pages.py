"""One page a method: its story, settings, data, claims with computed verdicts, and recipes."""

from __future__ import annotations

import json
import re
import textwrap
from typing import Any

from generators.markdown import NOTE, cell, escape, fence, number, table
from temper.core import config, registry
from temper.core.card import Card
from temper.run.evidence import findings
from temper.run.verdicts import Finding

__all__ = ["method_page", "split_story"]

PARTS = ("Paper", "What you get", "Idea", "Maths", "Departures", "Limits", "Reference code")
AS_WRITTEN = ("Maths",)


def method_page(slug: str) -> str:
    """The page of a method."""
    card = registry.load_card(slug)
    summary, parts = split_story(registry.load_story(slug))
    blocks = [NOTE, f"# {escape(card.title)}", escape(summary), _facts(slug, card)]
    for name, text in parts.items():
        blocks += [f"## {name}", _prose(name, text)]
    blocks += ["## Data", _data(card), "## Settings", _settings(card), "## Claims", _claims(slug, card)]
    blocks += ["## Recipes", _recipes(slug)]
    return "\n\n".join(blocks) + "\n"


def split_story(story: str) -> tuple[str, dict[str, str]]:
    """The first paragraph of a card's docstring and its parts, each dedented."""
    names = "|".join(PARTS)
    pieces = re.split(rf"^({names})[ \t]*(?=\S|$)", story, flags=re.MULTILINE)
    parts = {}
    for name, text in zip(pieces[1::2], pieces[2::2], strict=True):
        first, _, rest = text.partition("\n")
        parts[name] = (first.strip() + "\n" + textwrap.dedent(rest)).strip()
    return " ".join(pieces[0].split()), parts


def _facts(slug: str, card: Card) -> str:
    rows: list[tuple[str, str]] = [
        ("slug", f"`{slug}`"),
        ("family", registry.find(slug).family.replace("_", " ")),
        ("verbs", ", ".join(f"`{verb}`" for verb in card.verbs)),
        ("paper", escape(card.paper)),
        ("runs on", ", ".join(card.kinds)),
        ("needs", ", ".join(sorted(card.needs)) or "-"),
        ("`fit` leaves", ", ".join(card.produces) or "-"),
        ("extras", ", ".join(card.extras) or "-"),
    ]
    return table(("", ""), rows)


def _prose(name: str, text: str) -> str:
    if name in AS_WRITTEN:
        return fence(text)
    if name == "Departures":
        return _numbered(text)
    return "\n\n".join(escape(" ".join(part.split())) for part in re.split(r"\n\s*\n", text) if part.strip())


def _numbered(text: str) -> str:
    """`1. ... 2. ...` as a list; a story without numbers is a paragraph."""
    items = [item for item in re.split(r"^\s*\d+\.\s+", text, flags=re.MULTILINE) if item.strip()]
    if not re.match(r"\s*1\.", text):
        return escape(" ".join(text.split()))
    return "\n".join(f"{n}. {escape(' '.join(item.split()))}" for n, item in enumerate(items, 1))


def _data(card: Card) -> str:
    rows = [
        (f"`{verb}`", f"`{part.removesuffix('?')}`", schema, "optional" if part.endswith("?") else "required")
        for verb, parts in card.data.items()
        for part, schema in parts.items()
    ]
    if not rows:
        return "It reads no data."
    return (
        table(("verb", "part", "schema", ""), rows)
        + "\n\nColumns of each schema: [data](../concepts/data.md)."
    )


def _settings(card: Card) -> str:
    rows = [
        (
            f"`{field.name}`",
            f"`{field.type}`".replace("|", r"\|"),
            f"`{_default(field.default)}`",
            cell(field.doc),
        )
        for field in config.describe(card.config)
    ]
    return table(("setting", "type", "default", "meaning"), rows)


def _default(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple | frozenset) else value
    return json.dumps(plain, default=str).replace("|", r"\|")


def _claims(slug: str, card: Card) -> str:
    lead = (
        "Verdicts are computed from the rows of `evidence.jsonl`, never typed; "
        "[how](../concepts/evidence.md). `temper evidence " + slug + "` prints the same."
    )
    rows = [
        (
            f"**{finding.verdict}**",
            cell(claim.sentence) + f"<br>`{claim.id}`",
            cell(claim.paper),
            _ours(finding),
            _difference(finding),
        )
        for claim, finding in zip(card.claims, findings(slug), strict=True)
    ]
    columns = ("verdict", "claim", "the paper", "ours", "difference, 95% interval")
    return lead + "\n\n" + table(columns, rows)


def _ours(finding: Finding) -> str:
    if not finding.arms:
        return cell(finding.reason)
    return "<br>".join(f"{cell(arm.arm or 'mean')}: {number(arm.mean)}" for arm in finding.arms)


def _difference(finding: Finding) -> str:
    if finding.difference is None:
        return "-"
    interval = f" [{number(finding.low)}, {number(finding.high)}]" if finding.low is not None else ""
    seeds = f"{len(finding.seeds)} seed" + ("" if len(finding.seeds) == 1 else "s")
    return f"{number(finding.difference)}{interval}<br>{finding.n} {finding.pairing}, {seeds}"


def _recipes(slug: str) -> str:
    path = registry.find(slug).file("recipes.yaml")
    if not path.is_file():
        return "It has none."
    text = path.read_text(encoding="utf-8")
    return f"`temper run {slug} --recipe tiny`, `small` or `paper`.\n\n" + fence(text, "yaml")
