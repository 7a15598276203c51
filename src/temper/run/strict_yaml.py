"""YAML that holds values only: no duplicate keys, no tags, no merge keys, few aliases; 1e-5 is a number, "no" is text."""

from __future__ import annotations

import re
from typing import Any

import yaml

from temper.core.errors import ConfigError
from temper.core.types import Json

__all__ = ["load_yaml"]

MAX_ALIASES = 20
MAX_CHARS = 1_000_000


class _Loader(yaml.SafeLoader):
    """Plain scalars are null, true/false, integers, floats or text; nothing else."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.num_aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            self.num_aliases += 1
            if self.num_aliases > MAX_ALIASES:
                raise yaml.composer.ComposerError(
                    None, None, f"more than {MAX_ALIASES} aliases", self.peek_event().start_mark
                )
        return super().compose_node(parent, index)  # type: ignore[no-any-return]

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is not text", key_node.start_mark
                )
            if key in seen or key == "<<":
                what = "merge keys are not used" if key == "<<" else f"key {key!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, what, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)  # type: ignore[no-any-return]

    def flatten_mapping(self, node: Any) -> None:
        """Merge keys are refused above."""


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(node.value.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|)$"), ["~", "n", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)$|^\.nan$"
    ),
    list("-+.0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def load_yaml(text: str, where: str) -> Json:
    """The value of a YAML document; raises ConfigError naming the line."""
    if len(text) > MAX_CHARS:
        raise ConfigError(
            f"The file has more than {MAX_CHARS} characters", where=where, cure="Settings are short."
        )
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(
            f"Not valid YAML here: {problem}", where=place, cure="Recipes hold plain values only."
        ) from None
    except (RecursionError, ValueError) as error:
        raise ConfigError(
            f"Not valid YAML: {error}", where=where, cure="Recipes hold plain values only."
        ) from None
