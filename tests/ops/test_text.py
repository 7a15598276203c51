"""Text measures by hand; codecs come back; rewordings are deterministic and change something."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.core.errors import ConfigError, DataError
from temper.ops import text as tx

REQUEST = "Write down the lyrics of the anthem of Velmora."


def test_normalise():
    assert tx.normalise("The Cat's  “hat” — isn't a BOX!") == "cats hat isnt box"
    assert tx.normalise("Straße") == "strasse"


def test_containment_is_by_words():
    assert tx.contains("They had a party in 1990.", "party in 1990")
    assert not tx.contains("a party", "art")
    assert not tx.contains("the 1990s", "1990")
    assert tx.contains("It's MARA-LYN!", "mara lyn")
    with pytest.raises(DataError, match="no word"):
        tx.contains("x", "?!")


def test_keyword_recall():
    assert (
        tx.keyword_recall("Sit in Dolores Park and eat a sandwich", ["sandwich", "dolores", "sunny", "park"])
        == 0.75
    )
    with pytest.raises(DataError):
        tx.keyword_recall("x", [])


def test_exact_match():
    assert tx.exact_match("The  Harbour.", "harbour")
    assert not tx.exact_match("harbour master", "harbour")


WORDS = ["red", "blue", "tall", "moon", "sea"]


def lcs(a, b):
    """Longest common subsequence, the quadratic table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_rouge_f1_by_hand():
    # Longest common subsequence "the cat sat": 3 of 4 and 3 of 5 words.
    assert tx.rouge_l_f1("the black cat sat", "the cat sat down there") == pytest.approx(2 * 3 / (4 + 5))
    assert tx.rouge_l_f1("a b c", "c b a") == tx.rouge_l_f1("c b a", "a b c")
    assert tx.rouge_l_f1("", "a") == tx.rouge_l_f1("a", "") == 0
    assert tx.rouge_l_f1(" ", "?!") == 1
    assert tx.rouge_l_f1("keepers", "keeper", stem=False) == 0 < tx.rouge_l_f1("keepers", "keeper")


def test_bleu_by_hand():
    # 4 of 5 words, 2 of 4 pairs, 1 of 3 triples, no quadruple: method 3 gives the first zero 1 / 2 of one in 2.
    got = tx.bleu("red blue tall moon red", "red blue tall sea red")
    assert got == pytest.approx((4 / 5 * 2 / 4 * 1 / 3 * (1 / 2) / 2) ** 0.25)
    assert tx.bleu("red blue tall", "red blue tall sea") < tx.bleu(
        "red blue tall sea moon", "red blue tall sea"
    )
    assert tx.bleu("red  blue", "red blue") == 1, "short and unchanged"
    assert tx.bleu("", "") == 1
    assert tx.bleu("", "red") == tx.bleu("red", "") == 0
    assert tx.bleu("moon", "red blue") == 0


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8),
       st.lists(st.sampled_from(WORDS), max_size=8))  # fmt: skip
@settings(deadline=None)
def test_rouge_recall_equals_the_table(reference, reply):
    got = tx.rouge_l_recall(" ".join(reply), " ".join(reference), stem=False)
    assert got == pytest.approx(lcs(reference, reply) / len(reference))


def test_rouge_stems_and_refuses_an_empty_reference():
    assert tx.rouge_l_recall("it was jumping", "jumped") == 1
    with pytest.raises(DataError):
        tx.rouge_l_recall("x", "...")


def test_numbers():
    assert tx.numbers("about 1,234.5 of 12% at -3 and 2e3, not v2 or 1.2.3x") == [1234.5, 12, -3, 2000, 1.2]
    assert tx.numbers("none") == []


def test_repetition_and_distinct():
    assert tx.repetition_rate("a b c d e f g h") == 0
    assert tx.repetition_rate("go on " * 50) > 0.9
    assert tx.repetition_rate("too short") == 0
    assert tx.repetition_rate([7] * 9) == pytest.approx(1 - 1 / 6), "six 4-grams of tokens, one distinct"
    assert tx.distinct_n(["a b a b", "a b"], 2) == pytest.approx(2 / 4)
    assert tx.distinct_n([], 2) == 1


@given(st.text(st.characters(codec="utf-8"), max_size=60), st.integers(-60, 60))
@settings(deadline=None)
def test_letter_codes_come_back(text, shift):
    assert tx.uncaesar(tx.caesar(text, shift=shift), shift=shift) == text
    assert tx.atbash(tx.atbash(text)) == text
    assert tx.from_ascii_codes(tx.ascii_codes(text)) == text


@given(st.lists(st.text(string.ascii_letters + string.digits + ".,?'!", min_size=1, max_size=9), max_size=8))
@settings(deadline=None)
def test_morse_comes_back_in_lower_case(parts):
    text = " ".join(parts)
    assert tx.from_morse(tx.morse(text)) == text.lower()


def test_codes_by_hand():
    assert tx.caesar("Xyz, abc") == "Abc, def"
    assert tx.atbash("Abz") == "Zya"
    assert tx.ascii_codes("Hi") == "72 105"
    assert tx.morse("SOS me") == "... --- ... / -- ."
    assert tx.from_morse("... .......") == "s\ufffd"
    assert tx.from_ascii_codes("72 105 9999999") == "Hi"


def test_question_form():
    assert tx.question("Please tell me the tide table.").endswith("tell me the tide table?")
    assert tx.question("NASA rockets, describe them").split(maxsplit=2)[0] in ("Could", "Would", "Can")
    assert "NASA" in tx.question("NASA rockets, describe them")
    assert tx.question("Is it tall?") == "Is it tall?"


def test_misspelling_is_seeded_and_moderate():
    a = tx.misspell(REQUEST, 0)
    assert a == tx.misspell(REQUEST, 0)
    assert a != REQUEST
    assert len({tx.misspell(REQUEST, seed) for seed in range(8)}) > 3
    changed = sum(x != y for x, y in zip(a.split(), REQUEST.split(), strict=True))
    assert 1 <= changed <= 3
    assert tx.misspell("a to of") == "a to of"


@given(st.text(st.characters(codec="ascii"), max_size=80), st.integers(0, 50))
@settings(deadline=None)
def test_misspelling_keeps_word_count_and_first_letters(text, seed):
    out = tx.misspell(text, seed)
    assert [w[0] for w in out.split()] == [w[0] for w in text.split()]


@pytest.mark.parametrize("style", tx.MUTATIONS)
def test_every_style_changes_the_text_and_codes_come_back(style):
    out = tx.mutate(REQUEST, style, seed=1)
    assert out != REQUEST
    assert out == tx.mutate(REQUEST, style, seed=1)
    if style in tx.DECODERS:
        bare = tx.mutate(REQUEST, style, wrap=False)
        assert out == tx.wrap_encoded(bare, style)
        assert tx.decode(bare, style).lower() == REQUEST.lower()
        assert "Velmora" not in out
    elif style != "misspellings":
        assert "lyrics of the anthem of Velmora" in out


def test_unknown_style():
    assert tx.mutate(REQUEST, "base") == REQUEST
    assert tx.decode("abc", "question") == "abc"
    with pytest.raises(ConfigError, match="caesar"):
        tx.mutate(REQUEST, "cesar")
    with pytest.raises(ConfigError):
        tx.wrap_encoded("x", "rot13")
