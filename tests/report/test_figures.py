"""Numbers behind the figures."""

import pytest

from temper.core.types import Attempt
from temper.report import figures


def attempt(goal, queries, success):
    cost = {"queries": queries} if queries is not None else {}
    return Attempt(goal=goal, attack="gcg", input="i", reply="r", success=success, cost=cost)


def test_budget_counts_queries_until_the_first_success():
    attempts = [
        attempt("a", 10, False),
        attempt("a", 20, True),
        attempt("a", 500, True),
        attempt("b", 100, None),
        attempt("c", 5, True),
    ]
    figure = figures.budget_figure(attempts, [""] * 5)
    assert "gcg 2 of 3" in figure.alt
    assert figures._reached([(30.0, True), (100.0, False), (5.0, True)], 100.0) == (
        [0.0, 5.0, 30.0, 100.0],
        [0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), pytest.approx(2 / 3)],
    )


def test_no_counted_queries_no_figure():
    assert figures.budget_figure([attempt("a", None, True)], [""]) is None


def test_area_is_in_words():
    line = {"fpr": [0, 0, 1], "tpr": [0, 1, 1], "threshold": [None, 0.5, 0.1]}
    assert "arm 1.000" in figures.roc_figure([("arm", line)]).alt


def test_thresholds_at_both_ends_are_drawn():
    line = {"fpr": [0, 0, 1], "tpr": [0, 1, 1], "threshold": [None, 1.0, 0.0]}
    svg = figures.threshold_figure("x", line).svg
    assert "10⁻⁶" in svg
    assert svg.startswith("<svg")


def test_own_curves_with_bands():
    curves = {
        "Loss": {
            "x": "step",
            "y": "nats",
            "lines": {"a": {"x": [0, 1], "y": [2, 1], "low": [1, 0], "high": [3, 2]}},
        }
    }
    (figure,) = figures.curve_figures(curves)
    assert figure.title == "Loss"
    assert "nats" in figure.svg
    assert 'id="curve0-' in figure.svg


def test_arms_share_a_picture_and_seeds_a_colour():
    curves = {"Accuracy": {"x": "eps", "y": "share", "lines": {"verified": {"x": [0, 1], "y": [1, 0]}}}}
    (figure,) = figures.shared_curve_figures([("full", curves), ("full", curves), ("bn", curves)])
    assert figure.alt == "Accuracy: full, bn."
    assert (figure.svg.count("var(--c1)"), figure.svg.count("var(--c2)")) == (3, 2)  # lines and legend
    (alone,) = figures.shared_curve_figures([("", curves)])
    assert alone.alt == "Accuracy: verified."
    assert figures.shared_curve_figures([("full", {})]) == []


def test_names_of_lines_are_text_and_never_markup_or_formulas():
    line = {"fpr": [0, 1], "tpr": [0, 1], "threshold": [None, 0.5]}
    svg = figures.roc_figure([("<b>$\\frac$ & co", line), ("y", line)]).svg
    assert "&lt;b&gt;$\\frac$ &amp; co" in svg
    assert "<b>" not in svg
