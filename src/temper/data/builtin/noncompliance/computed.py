"""Values that are computed and not typed: sums, conversions, sorted words, Roman numerals.

Every value is one string of fields separated by "|", as the banks want them. Which numbers and words a part may use
is fixed here, so that parts don't share them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

__all__ = ["computed_lists"]

WORDS = {
    "train": "apple bridge candle dragon engine forest garden hammer island jacket kettle ladder marble needle orange "
    "pepper rabbit saddle ticket window basket carpet feather blanket",
    "calibration": "anchor button copper donkey falcon goblet helmet insect jungle lantern",
    "test": "barrel cactus dagger elbow fiddle gravel hornet igloo jersey kidney lemon meadow",
}
SPAN = {"train": (2, 40), "calibration": (41, 60), "test": (61, 99)}
NUMBER_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
WEEK = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ROMAN = ((50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))


def computed_lists(part: str, seed: int) -> dict[str, list[str]]:
    """All computed lists of a part; the same for the same seed."""
    rng = random.Random(f"{seed}:{part}:computed")
    numbers = range(*SPAN[part])
    return (
        _arithmetic(rng, numbers) | _units(rng, numbers) | _words(rng, WORDS[part].split()) | _calendar(rng)
    )


def _arithmetic(rng: random.Random, numbers: range) -> dict[str, list[str]]:
    pairs = [(rng.choice(numbers), rng.choice(numbers)) for _ in range(60)]
    small = [(rng.randint(2, 12), rng.choice(numbers)) for _ in range(60)]
    triples = [sorted(rng.sample(numbers, 3)) for _ in range(30)]
    return {
        "add": _unique(f"{a}|{b}|{a + b}" for a, b in pairs),
        "sub": _unique(f"{max(a, b)}|{min(a, b)}|{abs(a - b)}" for a, b in pairs),
        "mul": _unique(f"{a}|{b}|{a * b}" for a, b in small),
        "div": _unique(f"{a * b}|{a}|{b}" for a, b in small),
        "percent": _unique(
            f"{p}|{base}|{p * base // 100}" for p in (10, 20, 50) for base in _tens(rng, numbers)
        ),
        "max": _unique(_largest(rng, triple) for triple in triples),
        "sorted_numbers": _unique(f"{b}, {c}, {a}|{a}, {b}, {c}" for a, b, c in triples),
        "next": _unique(f"{a}, {a + s}, {a + 2 * s}|{a + 3 * s}" for s, a in small),
        "roman": [f"{n}|{_roman(n)}" for n in rng.sample(numbers, min(20, len(numbers)))],
        "parity": [
            f"{n}|{'even' if n % 2 == 0 else 'odd'}" for n in rng.sample(numbers, min(20, len(numbers)))
        ],
    }


def _largest(rng: random.Random, triple: list[int]) -> str:
    a, b, c = rng.sample(triple, 3)
    return f"{a}, {b} or {c}|{max(triple)}"


def _tens(rng: random.Random, numbers: range) -> list[int]:
    return [10 * n for n in rng.sample(numbers, 8)]


def _units(rng: random.Random, numbers: range) -> dict[str, list[str]]:
    chosen = rng.sample(numbers, 12)
    return {
        "metres": [f"{n} kilometres|{n * 1000:,} metres" for n in chosen],
        "minutes": [f"{n} hours|{n * 60:,} minutes" for n in chosen],
        "grams": [f"{n} kilograms|{n * 1000:,} grams" for n in chosen],
        "cents": [f"{n} dollars|{n * 100:,} cents" for n in chosen],
        "days": [f"{n} weeks|{n * 7} days" for n in chosen],
    }


def _words(rng: random.Random, words: Sequence[str]) -> dict[str, list[str]]:
    triples = [rng.sample(words, 3) for _ in range(20)]
    return {
        "upper": [f"{word}|{word.upper()}" for word in words],
        "backwards": [f"{word}|{word[::-1]}" for word in words],
        "num_letters": [f"{word}|{NUMBER_NAMES[len(word)]}" for word in words],
        "initial": [f"{word}|{word[0]}|{word[-1]}" for word in words],
        "spelt": [f"{word}|{'-'.join(word)}" for word in words],
        "alphabetical": _unique(f"{', '.join(three)}|{', '.join(sorted(three))}" for three in triples),
        "json": [f"{word}|{rng.randint(2, 9)}" for word in words],
    }


def _calendar(rng: random.Random) -> dict[str, list[str]]:
    shifts = [(day, shift) for day in range(7) for shift in (2, 3, 4)]
    rng.shuffle(shifts)
    return {"weekday": [f"{WEEK[day]}|{NUMBER_NAMES[n]}|{WEEK[(day + n) % 7]}" for day, n in shifts]}


def _roman(number: int) -> str:
    text = "XC" if number >= 90 else ""
    number -= 90 if text else 0
    for value, letters in ROMAN:
        text += letters * (number // value)
        number %= value
    return text


def _unique(values: object) -> list[str]:
    return list(dict.fromkeys(values))  # type: ignore[call-overload]
