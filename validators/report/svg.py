"""The few pieces that charts are drawn with: an area with two scales, axes, and lines in it.

    area = Area(Log(1e-13, 1e-9), Linear(0, 1))
    svg("kl", "Title", "What it shows.", [*area.x_axis("nats"), area.line([(1e-12, 0.5), ...], "s1")])

Colours are classes that the page's style sheet defines, so that light and dark need no second drawing. Sizes are in
user units of a view box that is as wide as WIDTH.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol

WIDTH = 520.0
HEIGHT = 250.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 14.0, 30.0, 46.0
TICKS = 6
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Scale(Protocol):
    """place: where a value lies, 0 to 1; a value outside is drawn at the nearer end."""

    def place(self, value: float) -> float: ...

    def ticks(self) -> list[tuple[float, str]]: ...


@dataclass(frozen=True)
class Linear:
    """low < high. whole: ticks are integers; share: they are written as per cent."""

    low: float
    high: float
    whole: bool = False
    share: bool = False

    def place(self, value: float) -> float:
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def ticks(self) -> list[tuple[float, str]]:
        step = nice_step((self.high - self.low) / TICKS, self.whole)
        first = math.ceil(self.low / step)
        values = [k * step for k in range(first, first + 2 * TICKS + 2) if k * step <= self.high * (1 + 1e-9)]
        return [(value, f"{100 * value:.3g} %" if self.share else f"{value:.4g}") for value in values]


@dataclass(frozen=True)
class Log:
    """Whole decades from 10**low to 10**high, low < high."""

    low: int
    high: int

    @classmethod
    def around(cls, values: Iterable[float]) -> Log:
        """The decades that hold all values above 0."""
        found = [math.log10(value) for value in values if value > 0]
        if not found:
            return cls(-1, 0)
        low, high = math.floor(min(found)), math.ceil(max(found))
        return cls(low, max(high, low + 1))

    def place(self, value: float) -> float:
        if value <= 0:
            return 0.0
        return min(max((math.log10(value) - self.low) / (self.high - self.low), 0.0), 1.0)

    def ticks(self) -> list[tuple[float, str]]:
        step = math.ceil((self.high - self.low) / TICKS)
        exponents = range(self.high, self.low - 1, -step)
        return [(10.0**k, f"10{str(k).translate(_SUPERSCRIPT)}") for k in exponents]


@dataclass(frozen=True)
class Area:
    """The plotting area and its scales."""

    x: Scale
    y: Scale

    def at(self, x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + self.x.place(x) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - self.y.place(y) * (HEIGHT - TOP - BOTTOM),
        )

    def axes(self, x_name: str, y_name: str) -> list[str]:
        """Ticks, grid lines of y, and the names of both."""
        parts = []
        bottom = HEIGHT - BOTTOM
        for value, text in self.y.ticks():
            y = HEIGHT - BOTTOM - self.y.place(value) * (HEIGHT - TOP - BOTTOM)
            parts.append(f'<path class="grid" d="M{LEFT:g} {y:.1f}H{WIDTH - RIGHT:g}"/>')
            parts.append(label(LEFT - 7, y + 4, text, "end"))
        for value, text in self.x.ticks():
            x = LEFT + self.x.place(value) * (WIDTH - LEFT - RIGHT)
            parts.append(f'<path class="axis" d="M{x:.1f} {bottom:g}v4"/>')
            parts.append(label(x, bottom + 18, text, "end" if x > WIDTH - RIGHT - 20 else "middle"))
        parts.append(f'<path class="axis" d="M{LEFT:g} {bottom:g}H{WIDTH - RIGHT:g}"/>')
        parts.append(label(WIDTH - RIGHT, HEIGHT - 6, x_name, "end", "name"))
        parts.append(label(LEFT, 16, y_name, "start", "name"))
        return parts

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> str:
        """Points joined; one alone is a dot."""
        placed = [self.at(x, y) for x, y in points]
        if len(placed) == 1:
            return self.dots(points, kind)
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        return f'<path class="line {kind}" d="M{path}"/>'

    def dots(self, points: Sequence[tuple[float, float]], kind: str) -> str:
        return "".join(
            f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>'
            for x, y in (self.at(x, y) for x, y in points)
        )

    def bar(self, x_from: float, x_to: float, y_from: float, y_to: float, kind: str) -> str:
        (left, top), (right, bottom) = self.at(x_from, y_to), self.at(x_to, y_from)
        return (
            f'<rect class="bar {kind}" x="{left:.1f}" y="{top:.1f}" width="{max(right - left - 1, 0.8):.1f}" '
            f'height="{max(bottom - top, 0):.1f}"/>'
        )

    def across(self, y: float, kind: str) -> str:
        """A horizontal line at y."""
        return f'<path class="mark {kind}" d="M{LEFT:g} {self.at(0, y)[1]:.1f}H{WIDTH - RIGHT:g}"/>'

    def upright(self, x: float, kind: str) -> str:
        """A vertical line at x."""
        return f'<path class="mark {kind}" d="M{self.at(x, 0)[0]:.1f} {TOP:g}V{HEIGHT - BOTTOM:g}"/>'

    def cross(self, x: float, kind: str) -> str:
        """A cross at the upper edge: a value that is none."""
        left = self.at(x, 0)[0] - 4
        return f'<path class="cross {kind}" d="M{left:.1f} {TOP:g}l8 8m0 -8l-8 8"/>'


def nice_step(rough: float, whole: bool) -> float:
    """1, 2 or 5 times a power of ten, at least `rough`; at least 1 where ticks are whole."""
    if whole and rough <= 1:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next((m * power for m in (1, 2, 5) if m * power >= rough * (1 - 1e-9)), 10 * power)


def label(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def svg(name: str, title: str, description: str, parts: Iterable[str], size: tuple[float, float] | None = None) -> str:
    """A drawing with a title and a description for those who do not see it. name: an identifier in the page."""
    width, height = size or (WIDTH, HEIGHT)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )
