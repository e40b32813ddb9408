"""Charts of a page: figures in, markup out. How they look is tested in test_browser.py."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from lib_dpo.pictures.curve import Point, heat_map, size_curve, spectrum_curve

CURVE = [Point(1e6, 0.1), Point(1e7, 0.4), Point(1e9, 0.9)]


def places(html: str, kind: str) -> list[tuple[float, float]]:
    """Left and bottom of the points of a kind, in per cent."""
    found = re.findall(rf'{kind}" [^>]*style="left:([\d.]+)%;bottom:([\d.]+)%"', html)
    return [(float(left), float(bottom)) for left, bottom in found]


def test_sizes_are_logarithmic_and_all_lies_inside():
    html = size_curve(CURVE, CURVE, Point(1e8, 0.7, "here"), "sizes")
    dots = places(html, "dpo-dot-small")
    assert [bottom for _, bottom in dots] == pytest.approx([10, 40, 90])
    lefts = [left for left, _ in dots]
    assert (lefts[2] - lefts[1]) == pytest.approx(2 * (lefts[1] - lefts[0]), rel=0.01)
    ((left, bottom),) = places(html, "dpo-dot-marked")
    assert bottom == pytest.approx(70)
    assert left == pytest.approx((lefts[1] + lefts[2]) / 2, abs=0.1)
    assert 0 <= min(lefts) < max(lefts) <= 100
    for label in ("1 MB", "100 MB", "1 GB", "50 %"):
        assert f">{label}<" in html
    assert "dpo-dot-marked" not in size_curve(CURVE, CURVE, None, "sizes")


@pytest.mark.parametrize("curve", [[Point(5e4, 1.0)], [Point(3.1e9, 0.0), Point(3.1e9, 1.0)]])
def test_a_curve_of_one_size_is_drawn_too(curve: list[Point]):
    assert "nan" not in size_curve(curve, curve, curve[0], "sizes")


@pytest.mark.parametrize("values", [[1.0], [1.0, 0.5, 0.0], [1.0] * 1280, []])
def test_any_spectrum_is_drawn(values: list[float]):
    html = spectrum_curve(values, "spectrum")
    assert "nan" not in html
    assert all(0 <= number <= 100 for place in places(html, "dpo-dot-small") for number in place)


def test_the_heat_map_groups_blocks_and_leaves_out_what_is_not_there():
    html = heat_map({"<b>": {"IN00": 0.01, "OUT": 0.0}}, ["TIME", "IN00", "IN01", "MID", "OUT00", "OUT"], "where")
    assert re.findall(r'colspan="(\d)">(\w+)<', html) == [("1", "TIME"), ("2", "IN"), ("1", "MID"), ("2", "OUT")]
    assert html.count("dpo-shade") == 2
    assert 'title="IN00, &lt;b&gt;: 1 %"' in html
    seen: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: seen.append(tag)  # type: ignore[method-assign]  # the parser calls it
    parser.feed(html)
    assert "b" not in seen
    assert "nan" not in heat_map({"all": {"IN00": 0.0}}, ["IN00"], "where")
