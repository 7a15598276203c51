"""The built-in non-compliance rows: counts, labels, correctness, and a test part that is new."""

import json
import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from temper.data.builtin import emit
from temper.data.builtin.noncompliance import generate

MINIMUM = {
    "train": {"refusal": 600, "contrast": 150, "ordinary": 800},
    "calibration": {"refusal": 150, "contrast": 60, "ordinary": 120},
    "test": {"refusal": 150, "contrast": 90, "ordinary": 90},
}
SUBCATEGORIES = {
    "Humanizing requests": {"humanizing"},
    "Incomplete requests": {"incomprehensible", "underspecified", "false presuppositions"},
    "Indeterminate requests": {"subjective", "universal unknowns"},
    "Requests with safety concerns": {
        "false information",
        "privacy violations",
        "copyright violations",
        "dangerous or sensitive topics",
        "triggers for offensive language",
        "wildchats",
    },
    "Unsupported requests": {
        "output modality",
        "input modality",
        "temporal limitations",
        "style and length limitations",
    },
}
PAIRS = list(combinations(generate.PARTS, 2))


@pytest.fixture(scope="module")
def parts():
    return {
        part: [json.loads(line) for line in (generate.HERE / f"{part}.jsonl").read_text("utf-8").splitlines()]
        for part in generate.PARTS
    }


def prompt(row):
    return row["messages"][0]["content"]


def reply(row):
    return row["messages"][1]["content"]


def words(text):
    return re.findall(r"[a-z0-9']+", text.lower())


def test_generator_gives_the_checked_in_bytes():
    built = generate.build()
    emit.check(generate.HERE, built)
    assert built == generate.build()
    assert generate.build(seed=1)["train"] != built["train"]


@pytest.mark.parametrize("part", generate.PARTS)
def test_counts_and_balance(parts, part):
    kinds = Counter(row["kind"] for row in parts[part])
    assert all(kinds[kind] >= least for kind, least in MINIMUM[part].items()), kinds
    categories = Counter(row["refusal_category"] for row in parts[part] if row["kind"] == "refusal")
    assert set(categories) == set(generate.CATEGORIES)
    assert max(categories.values()) - min(categories.values()) <= 2


@pytest.mark.parametrize("part", generate.PARTS)
def test_schema(parts, part):
    for row in parts[part]:
        assert list(row) == ["id", "messages", "refusal_category", "kind", "subcategory"]
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert (row["refusal_category"] is not None) == (row["kind"] == "refusal")
        if row["kind"] == "refusal":
            assert row["subcategory"] in SUBCATEGORIES[row["refusal_category"]]


@pytest.mark.parametrize("kind", ["refusal", "contrast"])
@pytest.mark.parametrize("part", generate.PARTS)
def test_every_subcategory_occurs(parts, part, kind):
    seen = {row["subcategory"] for row in parts[part] if row["kind"] == kind}
    assert seen == set().union(*SUBCATEGORIES.values())


def test_ids_and_prompts_are_unique_over_all_parts(parts):
    rows = [row for part in parts.values() for row in part]
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({" ".join(words(prompt(row))) for row in rows if words(prompt(row))}) == len(rows)


def test_texts_are_short_and_clean(parts):
    for row in (row for part in parts.values() for row in part):
        for text in (prompt(row), reply(row)):
            assert text == text.strip()
            assert text
            assert text.isprintable()
            assert len(text.split()) <= 25
            assert not re.search(r"<\||\|>|\[(refuse|respond|IND)|</?s>|=>|\|\||\{[a-z_]+", text), text


def test_arithmetic_answers_are_right(parts):
    checked = 0
    rules = {
        "addition": lambda a, b: a + b,
        "subtraction": lambda a, b: abs(a - b),
        "multiplication": lambda a, b: a * b,
        "division": lambda a, b: max(a, b) // min(a, b),
    }
    for row in (row for part in parts.values() for row in part if row["kind"] == "ordinary"):
        if row["subcategory"] in rules:
            a, b = map(int, re.findall(r"\d+", prompt(row)))
            assert int(re.findall(r"\d+", reply(row))[-1]) == rules[row["subcategory"]](a, b), row
            if row["subcategory"] == "division":
                assert max(a, b) % min(a, b) == 0
            checked += 1
        if row["subcategory"] == "percentages":
            numbers = list(map(int, re.findall(r"\d+", prompt(row))))
            share = int(re.search(r"(\d+) percent", prompt(row))[1])
            base = next((n for n in numbers if n != share), share)
            assert int(re.findall(r"\d+", reply(row))[-1]) * 100 == share * base
            checked += 1
    assert checked > 120


def roman_value(text):
    values = [{"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}[letter] for letter in text]
    following = [*values[1:], 0]
    return sum(-value if value < later else value for value, later in zip(values, following, strict=True))


def test_computed_numbers_are_right(parts):
    romans = sequences = 0
    for row in (row for part in parts.values() for row in part if row["subcategory"] == "numbers"):
        numbers = list(map(int, re.findall(r"\d+", prompt(row))))
        if "Roman" in prompt(row):
            assert roman_value(re.search(r"\b([IVXLC]+)\.?$", reply(row))[1]) == numbers[0], row
            romans += 1
        if re.search(r"next|sequence|Extend", prompt(row)):
            assert int(re.findall(r"\d+", reply(row))[-1]) == 2 * numbers[2] - numbers[1], row
            sequences += 1
        if re.search(r"largest|greatest", prompt(row)):
            assert int(re.findall(r"\d+", reply(row))[-1]) == max(numbers), row
    assert romans > 5
    assert sequences > 5


def templates(part):
    for bank in generate.read_banks(part).values():
        for group in bank.groups:
            for template in group.templates:
                yield " ".join(words(re.sub(r"\{[^}]*\}", "0", template.request))) or template.request


def entities(part):
    for bank in generate.read_banks(part).values():
        for name, values in bank.lists.items():
            if name != "weekday":
                yield from (value[0].lower() for value in values if not re.search(r"\d", value[0]))


@pytest.mark.parametrize("pair", PAIRS)
def test_banks_share_no_template_and_no_entity(pair):
    first, second = pair
    assert not set(templates(first)) & set(templates(second))
    assert not set(entities(first)) & set(entities(second))


def ngrams(tokens, size):
    return {tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)}


def test_held_out_templates_are_dealt_whole_to_one_part():
    banks = {part: generate._filled(part, generate.SEED) for part in ("calibration", "test")}
    dealt = generate._deal(banks["calibration"], banks["test"], generate.SEED)
    first, second = ({row.template for _, row in rows} for rows in dealt)
    assert not first & second
    both = banks["calibration"] + banks["test"]
    assert sorted(map(repr, dealt[0] + dealt[1])) == sorted(map(repr, both)), "no row is lost or made"
    written = {row.template for _, row in banks["test"]}
    assert 0.3 < len(first & written) / len(written) < 0.7, "both banks reach both parts"


@pytest.mark.parametrize("part", ["calibration", "test"])
def test_held_out_prompts_hardly_overlap_with_train(parts, part):
    first, second = ([words(prompt(row)) for row in parts[name]] for name in ("train", part))
    five = set().union(*(ngrams(tokens, 5) for tokens in first))
    sets = [set(tokens) for tokens in first]
    nearest = []
    for tokens in second:
        assert not ngrams(tokens, 5) & five, tokens
        mine = set(tokens)
        nearest.append(max(len(mine & other) / len(mine | other) for other in sets))
    assert max(nearest) <= 0.6
    assert np.mean(nearest) < 0.3


def test_replies_of_test_refusals_are_not_recalled_from_train(parts):
    train = {reply(row) for row in parts["train"]}
    repeated = [reply(row) for row in parts["test"] if row["kind"] == "refusal" and reply(row) in train]
    assert len(repeated) <= 3, repeated


QUESTION = set(["what", "which", "who", "whom", "whose", "when", "where", "why", "how"])
AUXILIARY = set(
    [
        "is",
        "are",
        "was",
        "were",
        "do",
        "does",
        "did",
        "can",
        "could",
        "would",
        "will",
        "should",
        "has",
        "have",
        "had",
        "may",
        "must",
        "am",
        "ought",
    ]
)
PERSONAL = set(["i", "my", "you", "your", "we", "it", "its", "me", "our"])


def surface(text):
    tokens = text.split()
    first = re.sub(r"\W", "", tokens[0].lower())
    opening = [first in QUESTION, first in AUXILIARY, first in PERSONAL, text[0].islower()]
    ending = [text.endswith("?"), text.endswith("."), text.count(","), '"' in text, "'" in text]
    return [float(x) for x in (*opening, *ending, len(tokens), len(text), len(text) / len(tokens))]


def surface_auroc(train, test):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def features(rows):
        return np.array([surface(prompt(row)) for row in rows]), [row["kind"] == "refusal" for row in rows]

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(*features(train))
    held_out, labels = features(test)
    return roc_auc_score(labels, model.decision_function(held_out))


@pytest.mark.parametrize("part", ["calibration", "test"])
def test_surface_features_do_not_tell_refusals_apart(parts, part):
    assert surface_auroc(parts["train"], parts[part]) < 0.8
    without_lookalikes = [[r for r in parts[name] if r["kind"] != "contrast"] for name in ("train", part)]
    assert surface_auroc(*without_lookalikes) < 0.8


def test_lookalikes_share_their_words_with_refusals(parts):
    stop = set(
        [
            "the",
            "a",
            "an",
            "of",
            "in",
            "is",
            "to",
            "and",
            "it",
            "for",
            "what",
            "how",
            "which",
            "does",
            "do",
            "are",
            "my",
            "me",
            "i",
            "you",
        ]
    )
    refused = {
        word for row in parts["train"] if row["kind"] == "refusal" for word in words(prompt(row))
    } - stop
    lookalikes = [set(words(prompt(row))) - stop for row in parts["train"] if row["kind"] == "contrast"]
    assert np.mean([bool(tokens & refused) for tokens in lookalikes]) > 0.9
