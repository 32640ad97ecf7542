"""The site that `make docs` builds: strictly, without links that lead nowhere, and it works in a browser."""

import functools
import re
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import pytest

CHROMIUM, DRIVER = (
    next(filter(None, map(shutil.which, names)), None)
    for names in (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))
)


def test_no_link_leads_nowhere(site, pages):
    assert len(pages) > 20
    for file, page in pages.items():
        for link in [*page.links, *page.loaded]:
            parts = urlparse(link)
            if parts.scheme:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{file.relative_to(site)}: {link}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in pages[target].ids, f"{file.relative_to(site)}: {link}"


def test_pages_load_nothing_from_elsewhere(site, pages):
    for file, page in pages.items():
        assert not [link for link in page.loaded if urlparse(link).netloc], file.relative_to(site)
    styles = "".join(file.read_text() for file in site.rglob("*.css"))
    assert not re.findall(r"url\(['\"]?(?:https?:)?//[^)]*", styles)


@pytest.fixture(scope="module")
def browser(site):
    """A headless Chromium, and the address of the site on loopback."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install '.[dev]'")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium with chromedriver on the PATH: apt-get install chromium chromium-driver")
    from selenium.webdriver.chrome.service import Service

    handler = functools.partial(QuietHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for one in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--window-size=1400,900",
        ):
            options.add_argument(one)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        try:
            driver = webdriver.Chrome(options=options, service=Service(DRIVER))
            driver.implicitly_wait(20)
            try:
                yield driver, f"http://127.0.0.1:{server.server_port}"
            finally:
                driver.quit()
        finally:
            server.shutdown()
            thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files and prints nothing."""

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_search_finds_a_page(browser):
    driver, address = browser
    driver.get(f"{address}/index.html")
    driver.find_element("css selector", "input.md-search__input").click()
    driver.find_element("css selector", "input.md-search__input").send_keys("PREFT_ADMIN_TOKEN")
    found = driver.find_elements("css selector", "a.md-search-result__link")
    assert any("reference/environment.html" in one.get_attribute("href") for one in found)


def test_code_is_highlighted_and_can_be_copied(browser):
    driver, address = browser
    driver.get(f"{address}/get-started/tutorial.html")
    blocks = driver.find_elements("css selector", "div.highlight")
    assert len(blocks) > 5
    assert blocks[0].find_elements("css selector", "code span.kn"), "no keyword is marked"
    assert driver.find_elements("css selector", "div.highlight button.md-code__button")


def test_dark_mode_is_a_click_away_and_stays(browser):
    driver, address = browser
    driver.get(f"{address}/index.html")

    def scheme() -> str:
        return driver.find_element("css selector", "body").get_attribute("data-md-color-scheme")

    def background() -> str:
        return driver.execute_script("return getComputedStyle(document.body).backgroundColor")

    before = scheme(), background()
    driver.find_element("css selector", "form.md-header__option label:not([hidden])").click()
    after = scheme(), background()
    assert {before[0], after[0]} == {"default", "slate"}
    assert before[1] != after[1]
    driver.get(f"{address}/explain/semantics.html")
    assert scheme() == after[0]


def test_pages_run_without_errors(browser):
    driver, address = browser
    for page in ("index.html", "explain/speed.html", "reference/preft_hf.html"):
        driver.get_log("browser")
        driver.get(f"{address}/{page}")
        assert not [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
        hosts = driver.execute_script(
            "return performance.getEntriesByType('resource').map(one => new URL(one.name).host)"
        )
        assert set(hosts) <= {urlparse(address).netloc}
        images = driver.execute_script("return [...document.images].map(one => one.naturalWidth)")
        assert all(images)
