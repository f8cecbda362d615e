"""The page of a report in headless Chromium, from disk: hover, slider, themes, a phone."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from report_checkpoints import SIZES, save_both

from hf_depthattn.cli.main import main

pytest.importorskip("altair")
pytest.importorskip("vl_convert")


webdriver = pytest.importorskip("selenium.webdriver")


pytestmark = pytest.mark.slow


# Selenium's `Keys`.
ARROW_LEFT, ARROW_RIGHT = "\ue012", "\ue014"


ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    model, stock, text = save_both(folder)
    arguments = [model, "--compare", stock, "--text", text, "--out", folder / "out", "--no-progress"]
    assert main(["report", *map(str, arguments), *SIZES]) == 0
    return folder / "out" / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium with chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    for argument in (*ARGUMENTS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture
def opened(browser, page):
    """Opens the page with everything drawn, at a width and in a colour scheme; afterwards the console is clean."""

    def open_page(width: int = 1280, scheme: str = "light"):
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.get(page.as_uri())
        browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
        wait_until_drawn(browser)
        return browser

    yield open_page
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def wait_until_drawn(browser) -> None:
    places = "[...document.querySelectorAll('.chart')]"
    wait_for(lambda: browser.execute_script(f"return {places}.every((place) => place.dataset.state === 'drawn')"))


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def cells(browser, chart: str) -> list:
    return browser.find_elements("css selector", f"#{chart} .mark-rect.role-mark path")


def background(browser) -> str:
    return browser.execute_script("return getComputedStyle(document.body).backgroundColor")


def bars(browser) -> list[str]:
    """The shapes of the bars in the charts of one layer."""
    paths = "[...document.querySelectorAll('#layer .mark-rect.role-mark path')]"
    return browser.execute_script(f"return {paths}.map((path) => path.getAttribute('d'))")


def test_every_chart_is_drawn(opened):
    browser = opened()
    charts = browser.find_elements("css selector", ".chart")
    assert len(charts) > 20
    assert all(chart.find_elements("css selector", "svg .marks, svg.marks") for chart in charts)


def test_hovering_a_cell_shows_its_value(opened):
    browser = opened()
    found = cells(browser, "panel-depth_weights-0")
    assert len(found) >= 4
    for cell in (found[0], found[-1]):
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", cell)
        webdriver.ActionChains(browser).move_to_element(cell).perform()
        tooltip = browser.find_element("id", "vg-tooltip-element")
        wait_for(lambda tooltip=tooltip: tooltip.is_displayed() and "weight × sources" in tooltip.text)
        assert "attn" in tooltip.text and "std over tokens" in tooltip.text
        # The chart's own description of the cell has the same value.
        title = "weight × sources (1 = uniform)"
        value = float(tooltip.text.split(title)[1].split()[0])
        described = float(cell.get_attribute("aria-label").split(f"{title}: ")[1].split(";")[0])
        assert value > 0 and described == pytest.approx(value, rel=5e-3)


def test_the_slider_changes_what_is_shown(opened):
    browser = opened()
    before, table = bars(browser), browser.find_element("id", "layer-numbers").text
    assert browser.find_element("id", "layer-shown").text == "1" and table.startswith("layer 1")
    slider = browser.find_element("id", "layer-slider")
    slider.send_keys(ARROW_RIGHT)
    wait_for(lambda: bars(browser) != before)
    assert browser.find_element("id", "layer-shown").text == "2"
    after = browser.find_element("id", "layer-numbers").text
    assert after.startswith("layer 2") and after.splitlines()[1:] != table.splitlines()[1:]
    slider.send_keys(ARROW_LEFT)
    wait_for(lambda: bars(browser) == before)


def test_light_and_dark_follow_the_system_and_the_button(opened):
    browser = opened(scheme="dark")
    dark = background(browser)
    button = browser.find_element("id", "theme-toggle")
    assert button.text == "Light"
    slider = browser.find_element("id", "layer-slider")
    slider.send_keys(ARROW_RIGHT)
    ink = "return document.querySelector('#panel-logit_lens-0 svg .role-axis-title text').getAttribute('fill')"
    light_on_dark = browser.execute_script(ink)
    button.click()
    wait_until_drawn(browser)
    wait_for(lambda: browser.execute_script(ink) != light_on_dark)
    assert background(browser) != dark and button.text == "Dark"
    # The charts of one layer still show the chosen one.
    wait_until_drawn(browser)
    chosen = bars(browser)
    slider.send_keys(ARROW_LEFT)
    wait_for(lambda: bars(browser) != chosen)
    assert background(opened(scheme="light")) != dark


@pytest.mark.parametrize("width", [320, 390, 768])
def test_narrow_screens_need_no_sideways_scrolling(opened, width):
    browser = opened(width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    for chart in browser.find_elements("css selector", ".chart svg"):
        assert chart.rect["x"] >= 0 and chart.rect["x"] + chart.rect["width"] <= width


def test_the_page_asks_for_nothing(opened):
    browser = opened()
    names = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in names if not name.startswith(("file:", "data:", "blob:"))] == []
