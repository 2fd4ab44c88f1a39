"""A reader's view: headless Chromium at a phone's and a desktop's width, in both schemes."""

import polars as pl
import pytest
import report_browser
import report_demo

from assay import charts
from assay.io.files import write_text
from assay.report.page import Section, Table, render

BINARY = report_browser.find()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARY is None, reason="no chromium on PATH"),
]
ATTACK = "</script><script>window.hit=1</script><img src=x onerror='window.hit=1'>"
CAUGHT = "'hit' in window || document.querySelectorAll('main img, #tip img').length > 0"


@pytest.fixture(scope="module")
def browser():
    with report_browser.Browser(str(BINARY)) as opened:
        yield opened


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    page = render(
        "Digits, opened into channels",
        report_demo.LEAD,
        report_demo.facts(),
        report_demo.sections(),
    )
    return write_text(tmp_path_factory.mktemp("run") / "report.html", page)


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, False), (390, True)])
def test_every_picture_fits_and_nothing_is_loaded(browser, demo, width, dark):
    browser.show(demo, width, dark=dark)
    assert browser.complaints() == []
    assert browser.requests() == [demo.as_uri()]
    assert (
        browser.run("document.querySelectorAll('.chart.ready svg').length")
        == browser.run("document.querySelectorAll('.chart').length")
        > 10
    )
    assert browser.run("document.documentElement.scrollWidth") <= width
    too_wide = (
        "[...document.querySelectorAll('.chart')].filter(box => box.scrollWidth >"
        " box.clientWidth).map(box => box.dataset.spec)"
    )
    assert browser.run(too_wide) == []
    assert browser.run("document.querySelectorAll('.chart svg text').length") > 100


def test_pictures_follow_the_width_and_the_scheme(browser, demo):
    browser.show(demo, 1280)
    first = "document.querySelector('.chart svg')"
    wide, light = (
        browser.run(f"{first}.clientWidth"),
        browser.run(f"{first}.querySelector('text').getAttribute('fill')"),
    )
    browser.call(
        "Emulation.setDeviceMetricsOverride",
        width=390,
        height=1000,
        deviceScaleFactor=1,
        mobile=True,
    )
    browser.wait(f"{first}.clientWidth < 370")
    assert wide > 370
    browser.call(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    browser.wait(f"{first}.querySelector('text').getAttribute('fill') !== {light!r}")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    browser.wait(f"{first}.querySelector('text').getAttribute('fill') === {light!r}")
    assert browser.complaints() == []


def test_hostile_data_stays_text_even_in_tooltips(browser, tmp_path):
    frame = pl.DataFrame({ATTACK: [1.0, 2.0, 3.0], "image": [ATTACK] * 3, "y": [1.0, 2.0, 3.0]})
    drawn = [
        charts.scatter_identity(
            frame, ATTACK, "y", colour="image", tooltip=["image", ATTACK], title=ATTACK
        ),
        charts.bars(frame, "image", "y", tooltip=[ATTACK]),
    ]
    page = write_text(
        tmp_path / "report.html",
        render(ATTACK, ATTACK, [], [Section(ATTACK, ATTACK, drawn, [Table(frame, ATTACK)])]),
    )
    browser.show(page, 1280)
    corner = "document.querySelector('.mark-symbol path').getBoundingClientRect()"
    place = browser.run(f"[{corner}.x + {corner}.width / 2, {corner}.y + {corner}.height / 2]")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    browser.wait("!document.getElementById('tip').hidden")
    assert "<img" in browser.run("document.getElementById('tip').textContent")
    assert browser.run(CAUGHT) is False
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]


def test_the_policy_stops_what_escaping_would_miss(browser, tmp_path):
    page = render(
        "t",
        "",
        [],
        [Section("s", "", [charts.bars(pl.DataFrame({"a": ["b"], "y": [1.0]}), "a", "y")])],
    )
    path = write_text(tmp_path / "report.html", page.replace("</main>", f"{ATTACK}</main>"))
    browser.show(path, 1280)
    assert browser.run("'hit' in window") is False
    assert len(browser.complaints()) >= 2
    assert browser.run("document.querySelectorAll('.chart.ready').length") == 1
    assert all(address.startswith("file:") for address in browser.requests())


def test_empty_pictures_are_drawn_without_complaint(browser, tmp_path):
    frame = pl.DataFrame(
        schema={"x": pl.Float64, "y": pl.Float64, "name": pl.String, "step": pl.Int64}
    )
    drawn = [
        charts.scatter_identity(frame, "x", "y", colour="name"),
        charts.line(frame, "x", "y", log_x=True, log_y=True),
        charts.bars(frame, "name", "y"),
        charts.heatmap(frame, "name", "name", "y", text=True),
        charts.histogram(frame, "x", log_y=True),
        charts.ecdf(frame, "x", log_x=True),
        charts.training_curves(frame.select("step", "x")),
        charts.calibration(frame, "x", "y"),
        charts.intervals(frame, "name", "y", "x", "x"),
        charts.tradeoff(frame, "x", "y", label="name"),
    ]
    page = render("t", "", [], [Section("s", "", drawn, [Table(frame)])])
    path = write_text(tmp_path / "report.html", page)
    browser.show(path, 390)
    assert browser.complaints() == []
    assert browser.run("document.querySelectorAll('.chart.ready').length") == len(drawn)
    assert browser.run("document.documentElement.scrollWidth") <= 390
