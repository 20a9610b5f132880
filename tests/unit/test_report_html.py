"""parity.html: one file that loads and runs nothing, says the verdict first, and shows every figure twice."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from gptoss_export.validators.layers import Bisection
from gptoss_export.validators.report import to_html
from gptoss_export.validators.report.again import judged_again
from gptoss_export.validators.report.heat_map import LEVELS, level
from gptoss_export.validators.report.schema import Binding, KLByPosition, ParityReport, ProbeRecord
from gptoss_export.validators.report.svg import Linear, Log

VOID = {"meta", "br", "path", "circle", "rect"}
TAGS = VOID | set(
    re.findall(
        r"\w+",
        "html head title style body main header h1 h2 h3 p span nav a section div figure figcaption svg desc text ul "
        "li details summary table caption thead tbody tr th td footer defs pattern",
    )
)


class Page(HTMLParser):
    """The page's tags, checked to be closed in order; its text, and the text of every section."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def with_tag(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


KINDS = ("passing", "failing", "not_executed", "failing_graph", "loosened", "not_finite", "not_measured", "largest")


@pytest.mark.parametrize("kind", KINDS)
def test_any_report_is_one_well_formed_page_that_loads_nothing(kind: str, samples: Any) -> None:
    html = to_html(getattr(samples, kind))
    page = Page(html)
    assert {tag for tag, _ in page.tags} <= TAGS
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") or name in ("src", "srcset", "action", "data") for name in attrs), tag
        if "href" in attrs:
            assert tag == "a"
            assert (attrs["href"] or "").startswith("#")
    policy = page.with_tag("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert (policy["content"] or "").startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    for foreign in ("http:", "https:", "//", "@import", "url(h"):
        assert foreign not in html.replace("url(#hatching)", "")


@pytest.mark.parametrize(
    ("kind", "word", "tone"),
    [
        ("passing", "PASS", "pass"),
        ("failing", "FAIL", "fail"),
        ("not_executed", "NOT EXECUTED", "wait"),
        ("failing_graph", "FAIL", "fail"),
        ("not_measured", "FAIL", "fail"),
    ],
)
def test_the_verdict_is_first_by_word_and_sign_and_colour(kind: str, word: str, tone: str, samples: Any) -> None:
    page = Page(to_html(getattr(samples, kind)))
    assert page.with_tag("header")[0]["class"] == f"verdict {tone}"
    report = getattr(samples, kind)
    assert page.text.startswith(f"{word}: parity of {report.target} {word} {report.target} ")
    assert ("is the model within" in page.text) == (word == "PASS")


def test_loosened_gates_stand_out(samples: Any) -> None:
    html = to_html(samples.loosened)
    assert '<p class="loosened">With loosened gates: max_logit_diff 6 (table 0.0001), max_layer' in html
    assert '<p class="loosened">' not in to_html(samples.passing)
    assert '<p class="loosened">' not in to_html(judged_again(samples.passing, {"max_kl_mean": 1e-12}))


def test_every_chart_is_named_and_has_its_figures_in_a_table(samples: Any) -> None:
    page = Page(to_html(samples.largest))
    drawings = [attrs for attrs in page.with_tag("svg") if attrs.get("role") == "img"]
    assert len(drawings) == 5
    idents = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(set(idents)) == len(idents)
    for attrs in drawings:
        for ident in (attrs["aria-labelledby"] or "").split():
            assert ident in idents
    for svg in page.with_tag("svg"):
        assert svg.get("role") == "img" or svg.get("aria-hidden") == "true"
    for caption in ("visits by layer and expert", "positions by KL", "KL by position", "by layer"):
        assert caption in page.text
    boxes = [attrs for attrs in page.with_tag("div") if attrs.get("class") == "box"]
    assert boxes
    assert all(attrs["tabindex"] == "0" and attrs["role"] == "region" and attrs["aria-label"] for attrs in boxes)
    assert len(boxes) == len(page.with_tag("table"))


def test_links_lead_to_sections(samples: Any) -> None:
    page = Page(to_html(samples.largest))
    sections = [attrs["id"] for attrs in page.with_tag("section")]
    assert [attrs["href"] for attrs in page.with_tag("a")] == [f"#{name}" for name in sections]
    assert sections[:3] == ["failures", "bisection", "gates"]


def test_the_heat_map_marks_every_untested_expert(samples: Any) -> None:
    html = to_html(samples.largest)
    untested = len(samples.largest.evidence.routing.untested)
    assert untested > 36
    hatched = next(re.finditer(r'<path class="hatch" d="([^"]*)"', html)).group(1)
    assert hatched.count("M") == untested
    assert (
        sum(path.count("M") for path in re.findall(r'<path class="h[0-5]" d="([^"]*)"/>(?!</svg>)', html)) == 36 * 128
    )
    assert f"untested: {untested} of 4,608" in html


@pytest.mark.parametrize("most", [1, 2, 5, 100, 10**6])
def test_levels_of_the_heat_map(most: int) -> None:
    levels = [level(visits, most) for visits in range(min(most, 2000) + 1)]
    assert levels[0] == 0
    assert levels[1:] == sorted(levels[1:])
    assert all(1 <= found <= LEVELS for found in levels[1:])
    assert level(most, most) <= LEVELS


def test_the_largest_model_stays_below_a_megabyte(samples: Any) -> None:
    assert len(to_html(samples.largest).encode()) < 1_000_000


def test_many_long_probes_stay_below_a_megabyte(samples: Any) -> None:
    edges = tuple(range(257))
    courses = tuple(KLByPosition(f"p{k}", edges[:-1], edges[1:], (1e-12,) * 256, (2e-12,) * 256) for k in range(256))
    probes = tuple(ProbeRecord(f"p{k}", 256, "e" * 64) for k in range(256))
    html = to_html(replace(samples.largest, kl_by_position=courses, probes=probes))
    assert "The longest 6 of 256 probes." in html
    assert len(html.encode()) < 1_000_000


def test_everything_foreign_is_escaped(samples: Any) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=y>&lt;\u202eevil\u2066\x00\x1b[31m\ud800\n</style></main>"
    report: ParityReport = samples.failing_graph
    evidence = replace(
        report.evidence,
        scenarios=tuple(replace(s, name=f"{evil}{k}") for k, s in enumerate(report.evidence.scenarios)),
        layers=tuple(replace(r, kind=evil) for r in report.evidence.layers),
        ranges=tuple(replace(r, activation_op=evil, weight_name=evil) for r in report.evidence.ranges),
        looked_into=evil,
    )
    report = replace(
        report,
        target=evil,
        reference=evil,
        command=(evil, evil),
        versions={evil: evil, "gptoss-export": evil},
        created_at=evil,
        machine=replace(report.machine, cpu=evil, platform=evil),
        engine=replace(report.engine, name=evil, not_executed_reason=evil, ran_instead=evil),
        probes=tuple(replace(p, name=f"{evil}{k}") for k, p in enumerate(report.probes)),
        evidence=evidence,
        worst=(replace(report.worst[0], probe=evil, scenario=evil, context=evil, text_candidate=evil),),
        kl_by_position=(replace(report.kl_by_position[0], probe=evil),),
        bisection=Bisection((), evil),
        binding=Binding({evil: "e" * 64}, {evil: "f" * 64}),
    )
    html = to_html(judged_again(report, {}))
    page = Page(html)
    html.encode()
    assert {tag for tag, _ in page.tags} <= TAGS
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    for character in ("\u202e", "\u2066", "\x00", "\x1b", "\ud800"):
        assert character not in html
    assert html.count("</style>") == html.count("<main>") == html.count("</main>") == 1
    assert "\\u202e" in page.text
    assert "<script>alert(1)</script>" in page.text


@pytest.mark.parametrize("values", [(), (0.0,), (1e-300, 1e300), (1.0,), (5e-324,)])
def test_logarithmic_scales_hold_any_values(values: tuple[float, ...]) -> None:
    scale = Log.around(values)
    assert scale.low < scale.high
    assert all(0 <= scale.place(value) <= 1 for value in (*values, 0.0))
    assert 2 <= len(scale.ticks()) <= 8


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.5, 1.5), (0, 0.0004), (0, 131072), (-0.5, 35.5)])
def test_linear_scales_have_a_few_ticks_within(low: float, high: float) -> None:
    for scale in (Linear(low, high), Linear(low, high, whole=True)):
        ticks = scale.ticks()
        assert 1 <= len(ticks) <= 8
        assert all(low <= value <= high * (1 + 1e-9) for value, _ in ticks)
        assert len({text for _, text in ticks}) == len(ticks)


def test_a_course_of_zeros_and_of_one_position_is_drawn(samples: Any) -> None:
    nothing = KLByPosition("chat-41", (0,), (1,), (0.0,), (0.0,))
    html = to_html(replace(samples.passing, kl_by_position=(nothing,)))
    assert not re.search(r'[ "MLHVhv](nan|inf)', html)
    assert '<circle class="dot s1"' in html
