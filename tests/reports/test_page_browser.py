"""The page in headless Chromium: it draws, says nothing on the console, asks for nothing, sorts, fits, prints.

RUNNER_SCREENSHOTS=DIR keeps pictures of every page, to be looked at.
"""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from runner.comparison.comparison import read
from runner.reports.compare import write_files
from tests.machine import wait_for
from tests.reports.cases import CASES

pytestmark = pytest.mark.browser
DRAWN = "return [...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('.main-svg').length > 0)"
SIZES = {"wide": 1280, "phone": 390}


@pytest.fixture(scope="module")
def driver():
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("no chromium and chromedriver here (Debian's packages chromium, chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Case → its page, written once."""
    root, made = tmp_path_factory.mktemp("sweeps"), {}

    def make(name: str) -> Path:
        if name not in made:
            sweep = CASES[name](root / name)
            made[name] = write_files(read(sweep), sweep).files["html"]
        return made[name]

    return make


def show(driver, page: Path, *, width: int = 1280, dark: bool = False) -> None:
    """Open the page, and scroll through it so that every chart is drawn."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": [scheme]})
    for log in ("browser", "performance"):
        driver.get_log(log)
    driver.get(page.as_uri())
    scroll = (
        "const open = [...document.querySelectorAll('.plot')].find(p => !p.querySelector('.main-svg'));"
        "if (open) open.scrollIntoView(); return !open"
    )
    wait_for(lambda: driver.execute_script(scroll), "a chart is not drawn")


def requests(driver) -> list[str]:
    """The addresses beyond the file itself that the page asked for; the log is seen to work by the file's own."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith("file:") for url in urls)
    return [url for url in urls if not url.startswith(("file:", "data:", "blob:"))]


def keep_screenshot(driver, name: str, width: int) -> None:
    directory = os.environ.get("RUNNER_SCREENSHOTS")
    if directory:
        driver.execute_script("scrollTo(0, 0)")
        height = driver.execute_script("return document.documentElement.scrollHeight")
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        time.sleep(0.5)  # for the charts to find their new width; only for eyes
        driver.save_screenshot(str(Path(directory) / f"{name}.png"))


@pytest.mark.parametrize(("size", "dark"), [("wide", False), ("phone", True)])
@pytest.mark.parametrize("name", sorted(CASES))
def test_every_page_draws_all_its_charts_quietly_and_fits(driver, pages, name, size, dark):
    show(driver, pages(name), width=SIZES[size], dark=dark)
    assert all(driver.execute_script(DRAWN))
    assert [entry["message"] for entry in driver.get_log("browser")] == []
    assert requests(driver) == []
    width = driver.execute_script("return document.documentElement.scrollWidth")
    assert width <= SIZES[size]
    keep_screenshot(driver, f"{name}-{size}-{'dark' if dark else 'light'}", SIZES[size])


@pytest.mark.parametrize("size", sorted(SIZES))
def test_a_long_legend_leaves_the_curves_their_room(driver, pages, size):
    show(driver, pages("many_runs"), width=SIZES[size])
    heights = driver.execute_script(
        "return [...document.querySelectorAll('.plot .nsewdrag')].map(area => area.getBBox().height)"
    )
    assert len(heights) > 5
    assert min(heights) > 150


def test_the_page_of_200_jobs_fires_its_load_event_soon(driver, pages, capsys):
    times = []
    for _ in range(3):
        driver.get(pages("many").as_uri())
        times.append(load_event_end(driver))
    with capsys.disabled():
        print(f"\nload event of the page of 200 jobs: {min(times):.0f} ms, at most {max(times):.0f} ms")


def load_event_end(driver) -> float:
    """Milliseconds from the request to the end of the load event; 0 while the event's listeners still run."""
    ask = "return performance.getEntriesByType('navigation')[0].loadEventEnd"
    wait_for(lambda: driver.execute_script(ask), "the load event never ended")
    return driver.execute_script(ask)


def column(driver, name: str) -> list[str]:
    """The texts of a column of the table of jobs, top to bottom."""
    return driver.execute_script(
        "const table = document.querySelector('table.jobs');"
        "const i = [...table.tHead.rows[0].cells].findIndex(c => c.textContent.trim() === arguments[0]);"
        "return [...table.tBodies[0].rows].map(r => r.cells[i].textContent.trim())",
        name,
    )


def click(driver, name: str) -> str:
    return driver.execute_script(
        "const head = [...document.querySelectorAll('table.jobs th')].find(c => c.textContent.trim() === arguments[0]);"
        "head.querySelector('button').click(); return head.getAttribute('aria-sort')",
        name,
    )


def test_a_click_on_a_column_sorts_by_it_and_rows_without_a_value_stay_last(driver, pages):
    show(driver, pages("failures"))
    assert click(driver, "mse") == "ascending"
    rising = column(driver, "mse")
    values = [float(text) for text in rising[:32]]
    assert (values, set(rising[32:])) == (sorted(values), {"–"})
    assert click(driver, "mse") == "descending"
    falling = column(driver, "mse")
    assert ([float(text) for text in falling[:32]], set(falling[32:])) == (values[::-1], {"–"})
    click(driver, "job")
    numbers = [int(text.partition("_")[0]) for text in column(driver, "job")]
    assert numbers == sorted(numbers)
    click(driver, "step")
    steps = [int(text.replace(",", "")) for text in column(driver, "step") if text != "–"]
    assert steps == sorted(steps)


def test_a_change_of_the_colour_scheme_repaints(driver, pages):
    show(driver, pages("plain"))
    ask = (
        "return [getComputedStyle(document.documentElement).backgroundColor,"
        " document.querySelector('#plot-mse .scatterlayer .js-line:last-child').style.stroke]"
    )
    light = driver.execute_script(ask)
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": [scheme]})
    wait_for(
        lambda: all(a != b for a, b in zip(light, driver.execute_script(ask), strict=True)), "nothing is repainted"
    )


def test_printing_draws_every_chart_on_white(driver, pages):
    page = pages("two_tiers_and_runs")
    metrics = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    driver.get(page.as_uri())
    wait_for(lambda: driver.execute_script("return Boolean(window.Plotly)"))
    assert not all(driver.execute_script(DRAWN))
    printed = driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
    assert len(printed) > 50_000
    assert all(driver.execute_script(DRAWN))
    widths = (
        "const plot = document.querySelector('#plot-mse');"
        "return [plot.clientWidth, plot.querySelector('.main-svg').getBoundingClientRect().width]"
    )

    def fits() -> bool:
        room, drawn = driver.execute_script(widths)
        return room > 1000 and room == pytest.approx(drawn, abs=2)

    wait_for(fits, "the chart does not get its width back")


def test_the_policy_stops_a_script_and_an_address_that_are_not_ours(driver, pages, tmp_path):
    page = tmp_path / "page.html"
    foreign = "<script>window.foreign = 1</script><img src='http://127.0.0.1:9/x.png'></body>"
    page.write_text(pages("plain").read_text().replace("</body>", foreign))
    show(driver, page)
    assert driver.execute_script("return window.foreign") is None
    messages = [entry["message"] for entry in driver.get_log("browser")]
    assert [("script-src" in text, "img-src" in text) for text in messages] == [(True, False), (False, True)]


def test_hostile_text_runs_nothing(driver, pages):
    show(driver, pages("hostile"))
    from selenium.common.exceptions import NoAlertPresentException

    with pytest.raises(NoAlertPresentException):
        _ = driver.switch_to.alert
    assert driver.execute_script("return document.querySelectorAll('img, body script:not([id])').length") == 1
