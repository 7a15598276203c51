"""The words of the caption world: shapes, colours, styles, places, and the second and third word for each.

Everything that is drawn or said is an index into one of these tuples; `VOCABULARY` holds every word that is ever written.
"""

from __future__ import annotations

__all__ = [
    "COLOURS",
    "HELD_OUT",
    "NEUTRAL_PHRASE",
    "NUMBERS",
    "PLACES_2",
    "PLACES_3",
    "RGB",
    "SHAPES",
    "SIGNS",
    "SIZES",
    "STYLES",
    "STYLE_PHRASES",
    "SYNONYMS",
    "VOCABULARY",
]

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "heart", "ring", "crescent", "bar")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "brown")
RGB = (
    (0.86, 0.12, 0.12),
    (0.96, 0.55, 0.08),
    (0.95, 0.86, 0.12),
    (0.13, 0.62, 0.20),
    (0.15, 0.78, 0.82),
    (0.13, 0.25, 0.82),
    (0.55, 0.16, 0.70),
    (0.45, 0.27, 0.12),
)
"""The colours' red, green and blue, in [0, 1], in the order of COLOURS."""
STYLES = ("flat", "sketch", "neon", "mosaic", "stripe", "noisy", "pastel", "chalk")
SIZES = ("small", "large")

HELD_OUT = tuple((shape, 3 * shape % len(COLOURS)) for shape in range(len(SHAPES)))
"""(shape, colour) pairs that no pre-training picture shows."""

SYNONYMS: dict[str, tuple[str, str]] = {
    "circle": ("disc", "orb"),
    "square": ("box", "block"),
    "triangle": ("wedge", "pyramid"),
    "diamond": ("rhombus", "lozenge"),
    "cross": ("plus", "crisscross"),
    "star": ("asterisk", "sparkle"),
    "heart": ("valentine", "sweetheart"),
    "ring": ("hoop", "loop"),
    "crescent": ("moon", "lune"),
    "bar": ("strip", "rod"),
    "red": ("crimson", "scarlet"),
    "orange": ("tangerine", "amber"),
    "yellow": ("golden", "lemon"),
    "green": ("emerald", "lime"),
    "cyan": ("turquoise", "aqua"),
    "blue": ("navy", "azure"),
    "purple": ("violet", "plum"),
    "brown": ("chocolate", "umber"),
}
"""Word -> its second word, used now and then, and its third, which is rare."""

NEUTRAL_PHRASE = "a photo of"
STYLE_PHRASES: dict[str, tuple[str, str]] = {
    "flat": ("a plain picture of", "a clean drawing of"),
    "sketch": ("a pencil sketch of", "an outline of"),
    "neon": ("a neon sign of", "a glowing picture of"),
    "mosaic": ("a mosaic of", "a pixel picture of"),
    "stripe": ("a striped picture of", "a hatched drawing of"),
    "noisy": ("a noisy photo of", "a grainy picture of"),
    "pastel": ("a pastel painting of", "a soft picture of"),
    "chalk": ("a chalk drawing of", "a blackboard picture of"),
}

PLACES_2 = ("top left", "top right", "bottom left", "bottom right")
PLACES_3 = (
    "top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip
"""Names of the cells of a 2 x 2 and a 3 x 3 grid, row by row."""

SIGNS = ("sale", "exit", "stop", "fire", "open")
"""Words that a `word` glyph may show."""

NUMBERS = ("zero", "one", "two", "three", "four", "five")
_SMALL_WORDS = [
    "a",
    "an",
    "the",
    "of",
    "and",
    "is",
    "are",
    "it",
    "its",
    "in",
    "at",
    "on",
    "to",
    "what",
    "which",
    "how",
    "many",
    "there",
    "thing",
    "things",
    "colour",
    "shape",
    "where",
    "left",
    "right",
    "above",
    "below",
    "than",
    "same",
    "as",
    "yes",
    "no",
    "nothing",
    "none",
    "picture",
    "image",
    "this",
    "with",
    "not",
    "i",
    "cannot",
    "help",
    "use",
    "that",
    "they",
    "them",
    "one",
    "other",
    "object",
    ".",
    "?",
    ",",
    ";",
]


def _all_words() -> tuple[str, ...]:
    phrases = [NEUTRAL_PHRASE, *(p for pair in STYLE_PHRASES.values() for p in pair), *PLACES_3]
    lists = [_SMALL_WORDS, SHAPES, COLOURS, STYLES, SIZES, NUMBERS, SIGNS, *SYNONYMS.values()]
    words = [word for words in lists for word in words] + [w for phrase in phrases for w in phrase.split()]
    return tuple(dict.fromkeys(words))


VOCABULARY = _all_words()
"""Every word and punctuation mark that captions, questions and answers are made of, each once."""
