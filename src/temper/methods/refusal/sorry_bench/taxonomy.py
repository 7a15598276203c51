"""The benchmark's classes and domains in both releases, and how a file's category column names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from temper.core.errors import ConfigError, DataError, nearest

__all__ = ["PER_CLASS", "RELEASES", "Category", "Release", "classify", "in_policy", "release_of"]

PER_CLASS = 10
"""Base prompts of a class."""
DROPPED = "Impersonation"
"""The class that the second release leaves out; those after it move up by one."""
NAMES = (
    "Personal Insult Words", "Social-group Insult Words", "Threatening Words", "Lewd and Obscene Words",
    "Libelous Words", "Self-Harm", "Violent Crimes", "Harassment", "Sexual Crimes", "Property Crimes",
    "Public Order Crimes", "Impersonation", "System Intrusion", "Malware", "Fraud", "Financial Crimes",
    "IP Infringement", "PII Violations", "Illegal Crafting", "Terrorism", "Child-related Crimes",
    "Animal-related Crimes", "Environmental Crimes", "Evasion of Law", "Human Elimination",
    "Advice on Adult Content", "Sexual Explicit Content", "Non-sexual Explicit Content", "Fake News",
    "False Advertising", "Discrimination", "Military Use", "Political Belief", "Ethical Belief", "Religion",
    "Social Stereotypes", "Extremist Content", "Conspiracy Theories", "False Common Knowledge",
    "Unhealthy Behaviors", "Medical Advice", "Financial Advice", "Legal Consulting Advice",
    "Governance Decision Advice", "Machinery Operation Advice",
)  # fmt: skip
DOMAINS = (
    "Hate speech generation",
    "Assistance with crimes or torts",
    "Potentially inappropriate topics",
    "Potentially unqualified advice",
)


class Release(NamedTuple):
    """Class names in order, and the number of the last class of each domain."""

    name: str
    classes: tuple[str, ...]
    ends: tuple[int, ...]

    def category(self, number: int) -> Category:
        """The class of a number, counted from 1."""
        domain = next(name for name, end in zip(DOMAINS, self.ends, strict=True) if number <= end)
        return Category(self.classes[number - 1], domain, number)


class Category(NamedTuple):
    """A class; `number` is None for a set with a taxonomy of its own."""

    name: str
    domain: str
    number: int | None = None

    @property
    def label(self) -> str:
        """The name as rows show it, numbered where the taxonomy numbers."""
        return self.name if self.number is None else f"{self.number:02d} {self.name}"


RELEASES = {
    "2024-06": Release("2024-06", NAMES, (5, 25, 40, 45)),
    "2025-03": Release("2025-03", tuple(name for name in NAMES if name != DROPPED), (5, 24, 39, 44)),
}


def release_of(categories: Sequence[str]) -> str:
    """The release that a file's categories speak of, or "own" for names of its own.

    Numbers up to 45 mean the first, all of 1 to 44 the second; names are the same in both but one.
    Raises ConfigError where numbers fit both, DataError for a mixture.
    """
    found = {category.strip() for category in categories}
    known = {name.casefold() for name in NAMES}
    if all(category.isdecimal() for category in found):
        numbers = {int(category) for category in found}
        if 45 in numbers or numbers == set(range(1, 45)):
            return "2024-06" if 45 in numbers else "2025-03"
        raise ConfigError(
            f"The categories are numbers ({len(numbers)} of them) that both releases know",
            cure="Set release to 2024-06 (45 classes) or 2025-03 (44 classes).",
        )
    spoken = {category.casefold() for category in found}
    if 2 * len(spoken & known) <= len(spoken) and not any(category.isdecimal() for category in found):
        return "own"  # a taxonomy of one's own may share a name or two
    if not spoken <= known:
        odd = sorted(category for category in found if category.casefold() not in known)[0]
        raise DataError(
            f"Most categories are of the published taxonomy, {odd!r} is not", where="column category",
            cure="Use its names throughout, or set release to own.",
        )  # fmt: skip
    full = spoken == known - {DROPPED.casefold()}
    return "2025-03" if full else "2024-06"


def classify(text: str, question_id: int, release: str, domain: str = "") -> Category:
    """The class of a row: by name, by number from 1, or by `question_id` in the first release's layout.

    Raises DataError for an unknown name, a number out of range, or no category where it cannot be derived.
    """
    text = text.strip()
    if release == "own":
        if not text:
            raise DataError("The row has no category", cure="Name its class in the column category.")
        return Category(text, domain)
    known = RELEASES[release]
    if text and not text.isdecimal():
        names = {name.casefold(): number for number, name in enumerate(known.classes, start=1)}
        if text.casefold() not in names:
            raise DataError(f"{text!r} is no class of release {release}", cure=nearest(text, known.classes))
        return known.category(names[text.casefold()])
    if not text and release != "2024-06":
        raise DataError("The row has no category", cure="Only release 2024-06 derives it from question_id.")
    number = int(text) if text else (question_id - 1) // PER_CLASS + 1
    if not 1 <= number <= len(known.classes):
        raise DataError(
            f"{'Category' if text else 'The category of question_id'} {text or question_id} is out of range",
            cure=f"Release {release} numbers its classes from 1 to {len(known.classes)}.",
        )
    return known.category(number)


def in_policy(category: Category, policy: Sequence[str | int], all_categories: Sequence[Category]) -> bool:
    """Whether a policy (class names, numbers, domains; empty = all) covers a class; ConfigError for an unknown one."""
    known = {key for found in all_categories for key in _keys(found)}
    wanted = [str(name).casefold() for name in policy]
    for name in wanted:
        if name not in known:
            names = [found.name for found in all_categories] + [found.domain for found in all_categories]
            raise ConfigError(
                f"policy names no class {name!r}", cure=nearest(name.title(), set(filter(None, names)))
            )
    return not policy or bool(set(wanted) & _keys(category))


def _keys(category: Category) -> set[str]:
    number = "" if category.number is None else str(category.number)
    keys = {category.name, category.label, category.domain, number}
    return {key.casefold() for key in keys if key}
