"""Questions in other languages: every field of the set has its translations, the rest is framed."""

import pytest

from temper.core.errors import ConfigError
from temper.data.loading import load_data
from temper.data.schemas import Dialogue
from temper.ops.languages import LANGUAGES, asked_in


def test_every_fact_of_the_people_is_translated():
    rows = load_data("builtin:people:forget", "Dialogue").records("forget", Dialogue)
    for row in rows:
        asked = {
            language: asked_in(language, "Q?", person="Ada", field=row.extra["field"])
            for language in LANGUAGES
        }
        assert len(set(asked.values())) == len(LANGUAGES)
        assert all("Ada" in text and "Q?" not in text for text in asked.values())


def test_other_questions_are_framed():
    assert asked_in("de", "Who rules?", person="Ada", field="no such field").count("Who rules?") == 1
    assert asked_in("fr", "Who rules?") != asked_in("es", "Who rules?")
    with pytest.raises(ConfigError, match="'it'"):
        asked_in("it", "Who rules?")
