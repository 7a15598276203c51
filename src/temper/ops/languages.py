"""Questions about people put in other languages: translated for the facts of `builtin:people`, framed otherwise."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import yaml

import temper.data.builtin.people as people
from temper.core.errors import ConfigError, nearest

__all__ = ["LANGUAGES", "asked_in"]

LANGUAGES = ("fr", "de", "es")


def asked_in(language: str, question: str, *, person: str = "", field: str = "") -> str:
    """The question in one of `LANGUAGES`: a translation where the field of `builtin:people` has one, else the English
    question after a request in that language to answer it.
    """
    if language not in LANGUAGES:
        raise ConfigError(f"Questions are not put in {language!r}", cure=nearest(language, LANGUAGES))
    wordings = _table().get(field) or _table()["frame"]
    return wordings[language].format(person=person, question=question)


@cache
def _table() -> dict[str, dict[str, str]]:
    text = (Path(people.__file__).parent / "languages.yaml").read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = yaml.safe_load(text)
    return found
