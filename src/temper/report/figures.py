"""Figures as inline SVG: drawn by matplotlib, coloured by the page's CSS variables, no script, no network.

The format of `figures.json` that methods write is in `temper.report.folder`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import Any, NamedTuple

from temper.core.errors import NeedsError
from temper.core.types import Attempt

__all__ = [
    "Figure",
    "budget_figure",
    "curve_figures",
    "reliability_figure",
    "roc_figure",
    "shared_curve_figures",
    "threshold_figure",
]

# Colours stand for CSS variables of the page, so that one drawing serves light and dark.
INK, SOFT, LINE = "#010203", "#040506", "#070809"
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06")
_VARIABLES = {INK: "--ink", SOFT: "--soft", LINE: "--line"} | {c: f"--c{i}" for i, c in enumerate(SERIES, 1)}
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

Line = Mapping[str, Any]
"""One line's numbers by name, as `figures.json` holds them."""


class Figure(NamedTuple):
    """An SVG with its caption; `alt` tells in words what is drawn."""

    title: str
    caption: str
    alt: str
    svg: str


class _Canvas:
    """One pair of axes, styled; turns itself into an SVG."""

    def __init__(self, width: float = 4.6, height: float = 3.5) -> None:
        try:
            import matplotlib as mpl
        except ImportError:
            raise NeedsError(
                "The report's figures need matplotlib", where="temper.report",
                cure='Install it: pip install "temper-ml[report]".',
            ) from None  # fmt: skip
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure as MplFigure

        self._mpl = mpl
        with self._style():
            self.figure = MplFigure(figsize=(width, height), layout="constrained")
            FigureCanvasSVG(self.figure)
            self.axes = self.figure.add_subplot()
            self.axes.grid(True, color=LINE, linewidth=0.6)
            self.axes.spines[["top", "right"]].set_visible(False)
            self.axes.set_axisbelow(True)

    @contextmanager
    def _style(self):  # type: ignore[no-untyped-def]
        settings = {
            "svg.fonttype": "none", "svg.hashsalt": "temper", "font.size": 9.5, "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"], "text.color": INK, "axes.edgecolor": SOFT, "axes.labelcolor": INK,
            "xtick.color": SOFT, "ytick.color": SOFT, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
            "axes.linewidth": 0.8, "legend.frameon": False, "lines.linewidth": 1.8, "savefig.transparent": True,
            "text.parse_math": False,
        }  # fmt: skip
        with self._mpl.rc_context(settings):
            yield

    def label(self, x: str, y: str) -> None:
        self.axes.set_xlabel(x)
        self.axes.set_ylabel(y)

    def svg(self, prefix: str, *, legend: bool = True) -> str:
        with self._style():
            handles, names = self.axes.get_legend_handles_labels()
            unique = dict(zip(names, handles, strict=True))
            if legend and unique and (len(unique) > 1 or next(iter(unique))):
                self.figure.legend(
                    unique.values(), unique.keys(), loc="outside upper left", ncols=min(3, len(unique)), fontsize=8.5,
                    handlelength=2.2, columnspacing=1.4,
                )  # fmt: skip
            out = StringIO()
            self.figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        return _embed(out.getvalue(), prefix)


def _embed(svg: str, prefix: str) -> str:
    """The `<svg>` element alone, ids made unique on the page, sentinel colours as variables, fonts the page's."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{prefix}-", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--sans)", body)
    body = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", body, count=1)
    body = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", body, count=1)
    return body.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1).strip()


def _colours(names: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """A colour and a dash for each name; dashes tell lines apart without colour."""
    return {
        name: (SERIES[i % len(SERIES)], DASHES[(i // len(SERIES) + i) % len(DASHES)])
        for i, name in enumerate(dict.fromkeys(names))
    }


def roc_figure(curves: Sequence[tuple[str, Line]], prefix: str = "roc") -> Figure:
    """True against false refusals; lines of one name (seeds of an arm) share a colour."""
    canvas = _Canvas()
    style = _colours([name for name, _ in curves])
    with canvas._style():
        canvas.axes.plot([0, 1], [0, 1], color=SOFT, linewidth=0.8, linestyle=":")
        for name, line in curves:
            colour, dash = style[name]
            canvas.axes.plot(
                line["fpr"], line["tpr"], color=colour, linestyle=dash, label=name, drawstyle="steps-post"
            )
        canvas.axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        canvas.label("Refused among requests to answer (FPR)", "Refused among requests to refuse (TPR)")
    areas = ", ".join(f"{name or 'all'} {_area(line):.3f}" for name, line in curves)
    return Figure(
        "ROC", "Every threshold at once: what refusing more of what should be refused costs in false refusals.",
        f"ROC curves; areas under them: {areas}.", canvas.svg(prefix),
    )  # fmt: skip


def _area(line: Line) -> float:
    x, y = [float(v or 0) for v in line["fpr"]], [float(v or 0) for v in line["tpr"]]
    return sum((x[i + 1] - x[i]) * (y[i + 1] + y[i]) / 2 for i in range(len(x) - 1))


def threshold_figure(
    name: str, line: Line, chosen: Sequence[float] = (), prefix: str = "threshold"
) -> Figure:
    """TPR and FPR over the threshold, on a scale that opens up both ends."""
    canvas = _Canvas()
    points = [
        (float(t), float(p or 0), float(f or 0))
        for t, p, f in zip(line["threshold"], line["tpr"], line["fpr"], strict=True)
        if t is not None
    ]
    with canvas._style():
        threshold = [min(max(t, 1e-6), 1 - 1e-6) for t, _, _ in points]
        canvas.axes.plot(
            threshold, [p for _, p, _ in points], color=SERIES[0], label="TPR: refused, should be"
        )
        canvas.axes.plot(
            threshold,
            [f for _, _, f in points],
            color=SERIES[1],
            linestyle=DASHES[1],
            label="FPR: refused, should not be",
        )
        for value in chosen:
            canvas.axes.axvline(value, color=SOFT, linewidth=1, linestyle=":")
        if threshold and (min(threshold) < 0.02 or max(threshold) > 0.98):
            canvas.axes.set_xscale("logit")
            _plain_ticks(canvas, threshold)
        canvas.axes.set(ylim=(-0.02, 1.02))
        canvas.label("Threshold on the refusal probability", "Share refused")
    title = f"Threshold: {name}" if name else "Threshold"
    return Figure(
        title, "Both rates fall as the threshold rises; the gap between the lines is what a threshold can buy.",
        "True and false refusal rates over the threshold; both never rise as it rises.", canvas.svg(prefix),
    )  # fmt: skip


def _plain_ticks(canvas: _Canvas, values: Sequence[float]) -> None:
    wanted = [1e-6, 1e-4, 0.01, 0.1, 0.5, 0.9, 0.99, 0.9999, 1 - 1e-6]
    low, high = min(values), max(values)
    ticks = [t for t in wanted if low / 2 <= t <= 1 - (1 - high) / 2] or [0.5]
    canvas.axes.set_xticks(ticks, [f"{t:.6f}".rstrip("0") if t > 1e-5 else "10⁻⁶" for t in ticks])
    canvas.axes.minorticks_off()


def reliability_figure(curves: Sequence[tuple[str, Line]], prefix: str = "reliability") -> Figure:
    """Share refused by right against the mean probability of each bin; dots grow with the bin's count."""
    canvas = _Canvas()
    style = _colours([name for name, _ in curves])
    with canvas._style():
        canvas.axes.plot([0, 1], [0, 1], color=SOFT, linewidth=0.8, linestyle=":")
        for name, line in curves:
            colour, dash = style[name]
            canvas.axes.plot(
                line["confidence"], line["share"], color=colour, linestyle=dash, label=name, linewidth=1.3
            )
            counts = [float(c or 0) for c in line.get("counts", [1] * len(line["share"]))]
            sizes = [12 + 90 * c / max(1.0, *counts) for c in counts]
            canvas.axes.scatter(
                line["confidence"], line["share"], s=sizes, color=colour, alpha=0.75, linewidths=0
            )
        canvas.axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        canvas.label("Mean predicted probability in the bin", "Share that should be refused")
    return Figure(
        "Calibration", "On the dotted diagonal a probability means what it says; larger dots rest on more items.",
        "Reliability diagram in ten bins.", canvas.svg(prefix),
    )  # fmt: skip


def curve_figures(curves: Mapping[str, Mapping[str, Any]], prefix: str = "curve") -> list[Figure]:
    """The curves a method drew up itself: `{TITLE: {"x": label, "y": label, "lines": {NAME: {"x", "y"}}}}`."""
    return [
        _curve(title, curve, list(curve["lines"].items()), f"{prefix}{i}")
        for i, (title, curve) in enumerate(curves.items())
    ]


def shared_curve_figures(
    drawn: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]], prefix: str = "shared"
) -> list[Figure]:
    """The same of several arms in one picture a title, from pairs of an arm and its curves; a line is named by its arm.

    Lines of one name (seeds of an arm) share a colour.
    """
    found: dict[str, tuple[Mapping[str, Any], list[tuple[str, Line]]]] = {}
    for arm, curves in drawn:
        for title, curve in curves.items():
            several = len(curve["lines"]) > 1 or not arm
            named = [
                (" · ".join(part for part in (arm, name if several else "") if part), line)
                for name, line in curve["lines"].items()
            ]
            found.setdefault(title, (curve, []))[1].extend(named)
    return [_curve(title, *both, f"{prefix}{i}") for i, (title, both) in enumerate(found.items())]


def _curve(title: str, curve: Mapping[str, Any], lines: Sequence[tuple[str, Line]], prefix: str) -> Figure:
    canvas = _Canvas()
    style = _colours([name for name, _ in lines])
    with canvas._style():
        for name, line in lines:
            colour, dash = style[name]
            canvas.axes.plot(line["x"], line["y"], color=colour, linestyle=dash, label=name)
            if "low" in line and "high" in line:
                canvas.axes.fill_between(
                    line["x"], line["low"], line["high"], color=colour, alpha=0.18, linewidth=0
                )
        canvas.label(str(curve.get("x", "")), str(curve.get("y", "")))
    return Figure(title, str(curve.get("caption", "")), f"{title}: {', '.join(style)}.", canvas.svg(prefix))


def budget_figure(attempts: Sequence[Attempt], arms: Sequence[str], prefix: str = "budget") -> Figure | None:
    """Share of goals reached within a budget of queries, one line an arm and attack; None without counted queries."""
    found: dict[str, dict[str, tuple[float, bool]]] = {}
    for attempt, arm in zip(attempts, arms, strict=True):
        if "queries" not in attempt.cost:
            continue
        goals = found.setdefault(" · ".join(p for p in (arm, attempt.attack) if p), {})
        spent, reached = goals.get(attempt.goal, (0.0, False))
        if not reached:  # what comes after the first success costs the goal nothing
            goals[attempt.goal] = (spent + float(attempt.cost["queries"]), attempt.success is True)
    if not found:
        return None
    canvas = _Canvas(height=3.2)
    style = _colours(list(found))
    limit = max(spent for goals in found.values() for spent, _ in goals.values())
    with canvas._style():
        for name, goals in found.items():
            x, y = _reached(list(goals.values()), limit)
            canvas.axes.plot(
                x, y, color=style[name][0], linestyle=style[name][1], label=name, drawstyle="steps-post"
            )
        canvas.axes.set(ylim=(-0.02, 1.02), xlim=(0, limit * 1.02))
        canvas.label("Queries spent on a goal", "Share of goals reached")
    ends = ", ".join(
        f"{name} {sum(r for _, r in goals.values())} of {len(goals)}" for name, goals in found.items()
    )
    return Figure(
        "Attack effect over budget", "How many goals were reached with at most that many queries each.",
        f"Goals reached at the full budget: {ends}.", canvas.svg(prefix),
    )  # fmt: skip


def _reached(goals: Sequence[tuple[float, bool]], limit: float) -> tuple[list[float], list[float]]:
    costs = sorted(spent for spent, reached in goals if reached)
    x = [0.0, *costs, limit]
    y = [i / len(goals) for i in range(len(costs) + 1)]
    return x, [*y, y[-1]]
