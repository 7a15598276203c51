"""What every system under test offers, and the small types that go in and come out of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from temper.core.card import CAPABILITIES
from temper.core.errors import ConfigError, NeedsError, nearest
from temper.core.types import Json, Message

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Reply", "Rewrite", "Sampling", "StepRule", "System"]

Rewrite = Callable[[tuple[Message, ...]], Sequence[Message]]
"""What a prompt artefact does to a conversation before the template sees it."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a reply is drawn; part of every result that rests on one."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the most probable token; `top_p`, `top_k` and `seed` then change nothing."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """A reply ends before the first of these texts."""

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "a list of non-empty texts"),
        )
        for name, good, wanted in checks:
            if not good:
                raise ConfigError(f"Sampling.{name} is {getattr(self, name)!r}", cure=f"It must be {wanted}.")


class Reply(NamedTuple):
    """What a system wrote. `finish` is "stop" for an end-of-turn token or stop text, else "length"."""

    text: str
    ids: list[int]
    """Empty when an endpoint does not say."""
    finish: Literal["stop", "length"]
    num_prompt_tokens: int
    info: dict[str, Json]


@runtime_checkable
class StepRule(Protocol):
    """What may change the next token while a system generates.

    `start` gives a row's state from its prompt ids; the state ends up in `Reply.info[name]`.
    A call returns the logits to draw from; row b of the batch is about to write its
    `position_B[b]`-th reply token (from 0) and has the state `states[b]`, which the call may change.
    """

    name: str

    def start(self, prompt_ids: list[int]) -> dict[str, Json]: ...

    def __call__(self, logits_BV: Tensor, position_B: list[int], states: list[dict[str, Json]]) -> Tensor: ...


class System(ABC):
    """The thing under test. `spec` is the name it was asked for by."""

    kind: ClassVar[str]
    spec: str

    @abstractmethod
    def probe(self) -> Mapping[str, bool | None]:
        """Each capability tried: True works, False does not, None not known."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of what decides its answers."""

    @property
    def capabilities(self) -> frozenset[str]:
        """The capabilities that were tried and work."""
        return frozenset(name for name, works in self.probe().items() if works)

    def require(self, *names: str) -> None:
        """Raise NeedsError for the first capability that is missing or not known to work."""
        missing = self.missing(names)
        if missing:
            name = missing[0]
            have = ", ".join(sorted(self.capabilities)) or "nothing"
            raise NeedsError(
                f"{self.spec or self.kind} lacks {name!r} ({CAPABILITIES[name]})",
                where=f"{self.kind} system; it offers {have}",
                cure=self.cure_for(name),
            )

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are not known to work; raises ConfigError for a name that is no capability."""
        wanted = list(names)
        for name in wanted:
            if name not in CAPABILITIES:
                raise ConfigError(f"{name!r} is not a capability", cure=nearest(name, CAPABILITIES))
        return [name for name in wanted if name not in self.capabilities]

    def cure_for(self, capability: str) -> str:
        """What a user can do about a missing capability."""
        return f"Choose a system that can {capability!r}."
