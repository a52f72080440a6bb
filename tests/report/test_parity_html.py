"""The HTML report: sound, self-contained, escaped, and with everything that it promises."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sam_export.errors import ParityError
from sam_export.report.parity_heat import COLUMNS, ROWS, heat_map
from sam_export.report.parity_html import to_html, write_html
from sam_export.report.parity_words import number
from tests.report.parity_values import EVIL, bad, good, report, row, series

VOID = {"meta", "link", "br", "hr", "img", "input"}
SVG_LEAVES = {"line", "rect", "circle", "polyline"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and keeps what tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"double attribute of {tag}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SVG_LEAVES, f"<{tag}/> is not closed in HTML"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def text() -> str:
    return to_html(report())


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_nothing_is_loaded_and_nothing_runs(text: str, page: Page) -> None:
    assert not {"script", "iframe", "object", "embed", "img", "base"} & {t for t, _ in page.tags}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} has a handler"
            if name in ("href", "src", "action", "data", "srcset"):
                assert value is not None
                assert value.startswith(("#", "data:,")), f"{tag} {name}={value}"
    assert not re.search(r"https?://|url\(|@import", text)
    policies = [a["content"] for t, a in page.tags if a.get("http-equiv")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_links_within_the_page_have_their_ends(page: Page) -> None:
    ends = [a["id"] for _, a in page.tags if "id" in a]
    assert len(set(ends)) == len(ends)
    links = {str(a["href"])[1:] for t, a in page.tags if t == "a"}
    assert links == {"target-0", "target-1", "target-2"}
    assert links <= set(ends)


def test_what_comes_from_outside_is_text(text: str, page: Page) -> None:
    assert EVIL in page.text, "shown as it is"
    assert "alert(" not in re.sub(r"&lt;script&gt;alert\(", "", text)
    assert "<i>no</i>" not in text
    assert "build: RuntimeError: <i>no</i> compiler" in page.text
    assert "judged by <eager>" in page.text
    assert "A & B" in page.text
    assert "sam-export parity 'a b.py:recipe' && echo `x`" in page.text


def test_the_verdict_comes_first(page: Page) -> None:
    assert page.text.index("Not equal") < page.text.index("Targets")
    assert (
        "2 of 3 targets not equal to eager SAM + AdamW: torch-compile, aot-inductor." in page.text
    )
    assert f"torch-compile differs first in lock-step step 2, stage slots: {EVIL}" in page.text
    equal = Page(to_html(report(good())))
    assert "✓ Equal 1 target equals eager SAM + AdamW within the tolerances." in equal.text
    assert "Not equal" not in equal.text


def test_the_first_difference_has_its_figures(page: Page) -> None:
    text = page.text
    for part in (
        "worst element [1, 2]",
        "found not finite",
        "expected 0.5",
        "before the step 0.25",
        "not finite 1 of 6 elements",
        "cosine of the changes 0.875000",
        "length of the change 1.25 × eager's",
        "distance 3 ulp at most, 0.5 in the median",
        "why gone <b>",
    ):
        assert part in text, part
    assert "✓ loss – grad_norm" in text
    assert "✗ slots ✗ parameters – buffers" in text


def test_pictures_have_names_for_those_who_do_not_see_them(text: str, page: Page) -> None:
    pictures = re.findall(r'<svg[^>]*role="img".*?</svg>', text, re.S)
    assert len(pictures) == 4, "two drift plots, one (no free-running), one histogram"
    for picture in pictures:
        assert re.search(r"<title>[^<]+</title><desc>[^<]+</desc>", picture)
    assert "metrics: at most 0.2 of the bound, in step 2" in unescape(text)
    assert "slots: at most ∞ of the bound, in step 3" in unescape(text)
    assert all(a.get("scope") in ("row", "col") for t, a in page.tags if t == "th")


def test_points_of_a_plot_are_where_their_values_are(text: str) -> None:
    held = (series("a.weight", "lock-step", 0.01, 1.0, 0.0), series("b", "lock-step", 0.001, 0, 0))
    target = good()
    drawn = to_html(report(type(target)(**{**vars(target), "series": held})))
    plot = re.search(r"<svg.*?class=\"plot\".*?</svg>", drawn, re.S)
    assert plot is not None
    (edge,) = re.findall(r'class="band"[^>]*y1="([\d.]+)"', plot.group())
    ticks = {
        label: float(y) - 4
        for y, label in re.findall(r'y="([\d.]+)" text-anchor="end">([^<]+)<', plot.group())
    }
    (line,) = re.findall(r'class="l2">.*?points="([^"]+)"', plot.group())
    heights = [float(point.split(",")[1]) for point in line.split()]
    assert ticks["1"] == float(edge) == heights[1]
    assert heights[0] == ticks["10⁻²"]
    assert heights[2] == max(ticks.values()), "0 is at the bottom"


def test_a_gap_is_a_gap_and_infinity_is_at_the_top(text: str) -> None:
    metrics = re.search(r'<g class="l0"><title>metrics</title>(.*?)</g>', text, re.S)
    slots = re.search(r'<g class="l1"><title>slots</title>(.*?)</g>', text, re.S)
    assert metrics is not None
    assert slots is not None
    assert metrics.group(1).count("<circle") == 2
    assert slots.group(1).count("<circle") == 2
    assert slots.group(1).count("▲") == 2
    assert set(re.findall(r'cy="([\d.]+)"', slots.group(1))) == {"14.0"}


def cells(table: str, name: str) -> list[str]:
    (line,) = re.findall(rf'title="{re.escape(name)}">.*?</tr>', table)
    return re.findall(r'<td(?: class="(\w+)")?', line)


def test_the_heat_map_has_a_colour_and_a_mark_for_each_cell() -> None:
    values = json.loads(json.dumps(report(bad()).to_dict()))
    table = heat_map(values["targets"][0], "lock-step")
    Page(table)
    assert cells(table, "a.weight") == ["h3", "h6", "h5"]
    assert cells(table, "loss") == ["h3", "h4", ""]
    assert table.count("×") == 4, "the two of a.weight and the two that are not finite"
    assert table.index("a.weight") < table.index(">loss<"), "what differs is on top"
    assert "step 2: 1000 of the bound, relative 0.001" in table
    assert heat_map(values["targets"][0], "free-running") == ""


def test_a_long_heat_map_says_what_it_leaves_out() -> None:
    steps, names = 3 * COLUMNS, [f"p{i:03}" for i in range(ROWS + 7)]
    worst = {name: 1e-4 * (index + 1) for index, name in enumerate(names)}
    held = tuple(
        series(name, "lock-step", *([0.0] * (steps - 2)), worst[name], 0.0) for name in names
    )
    target = {
        "series": [vars(item) for item in held],
        "rows": [vars(row(n, "parameter", "lock-step", 0.0, "ok")) for n in names],
    }
    table = heat_map(target, "lock-step")
    assert f"the {ROWS} worst rows, 7 more are not shown" in table
    assert "a column is the worst of 3 steps" in table
    assert table.count("<tr>") == ROWS + 1
    shown = cells(table, names[-1])
    assert len(shown) == COLUMNS
    assert shown[-1] == "h2", "the worst of the last three steps"
    assert set(shown[:-1]) == {"h0"}
    assert names[6] not in table
    assert names[7] in table


def test_ledger_tolerances_and_command_are_there(page: Page) -> None:
    assert "cudnn_conv_float32 tf32" in page.text
    assert f"graphs step.onnx {'ab' * 32}" in page.text
    assert "Environment variables that matter none set" in page.text
    assert "Target torch-compile facts its session tells none" in page.text
    assert "kernel 16 Below float64, lock-step" in page.text
    assert page.text.index("Run it again") < page.text.index("sam-export parity 'a b.py")


def test_a_stored_report_gives_the_same_page(tmp_path: Path, text: str) -> None:
    made = report()
    made.to_json(tmp_path / "parity.json")
    write_html(json.loads((tmp_path / "parity.json").read_text()), tmp_path / "parity.html")
    assert (tmp_path / "parity.html").read_text() == text
    with pytest.raises(ParityError, match=r"format is 1; .* shows format 2"):
        to_html({"format": 1})
    with pytest.raises(ParityError, match="cannot be written"):
        write_html(made, tmp_path / "no" / "parity.html")


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_the_contrast_that_wcag_asks_for(text: str) -> None:
    light, dark = re.findall(r":root\{(.*?)\}", text, re.S)
    for block in (light, dark):
        found = dict(re.findall(r"--([\w-]+):(#[0-9a-f]{3,6})", block))
        colours = {
            name: value if len(value) == 7 else "#" + "".join(digit * 2 for digit in value[1:])
            for name, value in found.items()
        }
        pairs = [(front, back, 4.5) for front in ("ink", "soft", "link") for back in ("bg", "card")]
        pairs += [(word, ground, 4.5) for word in ("ok", "bad") for ground in ("bg", f"{word}-bg")]
        pairs += [("ink", "ok-bg", 4.5), ("ink", "bad-bg", 4.5), ("bad", "outside", 4.5)]
        pairs += [(f"t{n}", f"h{n}", 4.5) for n in (5, 6, 7)]
        # Lines of a plot have to stand out by 3 from both grounds.
        pairs += [(c, g, 3.0) for c in ("blue", "red", "green", "pink") for g in ("bg", "outside")]
        for front, back, least in pairs:
            a, b = sorted((luminance(colours[front]), luminance(colours[back])), reverse=True)
            assert (a + 0.05) / (b + 0.05) >= least, (front, back)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "∞"),
        (0.0, "0"),
        (12, "12"),
        (1234.5, "1230"),
        (999.7, "1000"),
        (0.012345, "0.0123"),
        (1.5e-7, "1.50e-7"),
        (2.5e9, "2.50e9"),
        (2**60, "1.15e18"),
        (float("inf"), "∞"),
    ],
)
def test_numbers_are_short(value: float | None, shown: str) -> None:
    assert number(value) == shown
