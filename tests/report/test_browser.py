"""The page in a real browser, opened from disk as a person opens it."""

import json
import shutil

import pytest

from trl_diffusion_rank.report import make_report


selenium = pytest.importorskip("selenium", reason="selenium is not installed")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium (or google-chrome) and chromedriver on the PATH"
)
FLAGS = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "window-size=1280,900",
)
DESKTOP, PHONE = {"width": 1280, "height": 900, "mobile": False}, {"width": 360, "height": 780, "mobile": True}


class Page:
    """The report in the browser."""

    def __init__(self, driver, url: str):
        self.driver, self.url = driver, url

    def open(self, screen=DESKTOP, theme="light"):
        self.driver.get("about:blank")
        self.driver.get_log("browser"), self.driver.get_log("performance")
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**screen, "deviceScaleFactor": 1})
        # Without smooth scrolling, so that what is clicked stands still
        media = {"prefers-color-scheme": theme, "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in media.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get(self.url)
        return self

    def js(self, script: str, *args):
        return self.driver.execute_script(f"return {script}", *args)

    def wait(self, script: str):
        return WebDriverWait(self.driver, 30).until(lambda _: self.js(script))

    def find(self, css: str):
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def press(self, *keys: str):
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def choose(self, control: str, text: str):
        Select(self.find(f"#{control}")).select_by_visible_text(text)

    @property
    def prompts(self) -> list[str]:
        return self.js("[...document.querySelectorAll('#list .prompt')].map((prompt) => prompt.textContent)")

    @property
    def focused(self) -> str | None:
        """The prompt of the pair that has the focus."""
        return self.js("document.activeElement.querySelector('.prompt')?.textContent ?? null")

    def draw_all(self):
        """Scroll over the whole page, so that all plots come into view."""
        for plot in self.driver.find_elements(By.CSS_SELECTOR, ".plot"):
            self.js("arguments[0].scrollIntoView({behavior: 'instant'})", plot)
            WebDriverWait(self.driver, 30).until(
                lambda _, plot=plot: self.js("arguments[0].querySelector('.xtick')", plot)
            )


@pytest.fixture(scope="module")
def page(full_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    path = make_report(full_run, folder / "report.html")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"user-data-dir={folder / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield Page(driver, path.as_uri())
    driver.quit()


def test_opens_from_disk_and_asks_for_nothing_else(page):
    page.open()
    page.draw_all()
    assert page.driver.title == "full · report"
    # A request that the policy stops would be an error in the log, as any error of the script
    assert page.driver.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert page.url in sent
    assert [url for url in sent if not url.startswith(("file://", "data:"))] == []


def test_the_policy_stops_requests(page):
    page.open()
    page.js("fetch('https://example.com/').catch(() => { window.refused = true; })")
    page.wait("window.refused")
    assert any("Content Security Policy" in entry["message"] for entry in page.driver.get_log("browser"))


def test_plots_show_their_data(page):
    page.open()
    page.draw_all()
    assert page.js("document.querySelector('#plot-0').data[0].x[0]") == pytest.approx(70.4)
    assert page.js("document.querySelector('#plotly')") is None  # its source is kept once
    assert page.js("document.querySelectorAll('#plot-0 .errorbar').length") > 0


@pytest.mark.parametrize("screen", [PHONE, DESKTOP])
def test_the_page_never_scrolls_sideways(page, screen):
    page.open(screen)
    page.draw_all()
    assert page.js("document.documentElement.scrollWidth") <= screen["width"]
    assert page.js("document.querySelector('#plot-0 .main-svg').getBoundingClientRect().right") <= screen["width"]


def test_themes(page):
    background = "getComputedStyle(document.body).backgroundColor"
    tick = "getComputedStyle(document.querySelector('#plot-0 .ytick text')).fill"
    page.open(theme="dark")
    page.draw_all()
    dark = page.js(background), page.js(tick)
    page.open(theme="light")
    page.draw_all()
    light = page.js(background), page.js(tick)
    assert light[0] == "rgb(255, 255, 255)"
    assert dark[0] == "rgb(21, 23, 26)"
    assert (light[1], dark[1]) == ("rgb(27, 29, 32)", "rgb(228, 229, 231)")
    page.find("#theme").click()  # plots that are drawn follow
    assert (page.js(background), page.js(tick)) == dark


def test_pairs_stand_in_the_order_of_the_prompts(page):
    page.open()
    assert (
        page.prompts[:4]
        == ["</script><script>document.title='taken over'</script>"] * 2 + ["\"quotes\" & 'more' <b>bold</b>"] * 2
    )
    assert page.find("#count").text == "24 pairs: 12 wins, 8 ties, 4 losses by digits good"
    page.wait("[...document.querySelectorAll('#list img')].every((image) => image.naturalWidth === 16)")
    assert page.find("#list img").get_attribute("class") == "tiny"
    assert page.find("#list img").get_attribute("alt").startswith("base: </script>")


def test_filters_and_order(page):
    page.open()
    page.find("#search").send_keys("NUMBER 1")
    assert page.prompts == ["prompt number 10"] * 2 + ["prompt number 11"] * 2
    page.choose("category", "Animals")
    assert page.prompts == ["prompt number 10"] * 2
    page.find("#search").clear()
    page.find("#search").send_keys(" ")
    page.choose("category", "all")
    page.choose("outcome", "losses")
    assert page.prompts == ["prompt number 4"] * 2 + ["prompt number 8"] * 2
    page.choose("outcome", "all")
    page.choose("order", "gain, largest first")
    assert page.prompts[0] == "prompt number 11"
    assert page.prompts[-1] == "prompt number 8"
    page.choose("order", "gain, smallest first")
    assert page.prompts[0] == "prompt number 4"
    page.choose("metric", "digits clean")
    assert page.find("#count").text == "24 pairs: 0 wins, 24 ties, 0 losses by digits clean"
    page.choose("steps", "all")
    assert page.find("#count").text.startswith("48 pairs")
    page.find("#later").click()
    assert page.find("#page").text == "25 to 48 of 48"


def test_the_gain_is_of_the_chosen_metric_for_every_adapter(page):
    page.open()
    page.find("#search").send_keys("number 10")
    labels = (
        "[...document.querySelectorAll('#list li:first-child .label')].map((label) => label.innerText.split('\\n'))"
    )
    assert page.js(labels) == [["base"], ["dpo", "▲ +0.1"], ["cpo", "▲ +0.2"]]
    page.choose("metric", "digits clean")
    assert page.js(labels) == [["base"], ["dpo", "= 0"], ["cpo", "= 0"]]


def test_the_keyboard_moves_searches_and_opens(page):
    page.open()
    page.press("j")
    assert page.focused.startswith("</script>")
    page.press("j", "j")
    assert page.focused.startswith('"quotes"')
    page.press("k", "k", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page.focused.startswith('"quotes"')
    page.press("/")
    page.press("number 7")
    assert page.prompts == ["prompt number 7"] * 2
    page.press(Keys.ESCAPE)
    page.press("j", Keys.ENTER)
    assert page.js("document.querySelector('#large').open")
    assert page.find("#large-prompt").text == "prompt number 7"
    assert page.find("#large-facts").text == f"20 steps · People · image 1 · seed {2**62 + 14}"
    page.press("j")
    assert page.find("#large-facts").text.endswith(f"image 2 · seed {2**62 + 15}")
    page.press(Keys.ESCAPE)
    assert not page.js("document.querySelector('#large').open")
    assert page.focused == "prompt number 7"
    assert page.js("document.activeElement.dataset.place") == page.js(
        "document.querySelectorAll('.pair')[1].dataset.place"
    )


def test_flipping_while_the_key_is_held(page):
    page.open()
    page.press("j", Keys.ENTER)
    sources = "[...document.querySelectorAll('#large img')].map((image) => image.src)"
    names = "[...document.querySelectorAll('#large .label span:first-child')].map((name) => name.textContent)"
    base, dpo, cpo = page.js(sources)
    assert len({base, dpo, cpo}) == 3
    webdriver.ActionChains(page.driver).key_down("f").perform()
    assert page.js(sources) == [base] * 3
    assert page.js(names) == ["base"] * 3
    webdriver.ActionChains(page.driver).key_up("f").perform()
    assert page.js(sources) == [base, dpo, cpo]
    button = page.find("#flip")
    webdriver.ActionChains(page.driver).click_and_hold(button).perform()
    assert page.js(sources) == [base] * 3
    webdriver.ActionChains(page.driver).release().perform()
    assert page.js(names) == ["base", "dpo", "cpo"]
    page.find("#close").click()
    assert not page.js("document.querySelector('#large').open")


def test_moving_over_the_end_of_a_page_turns_it(page):
    page.open()
    page.choose("steps", "all")
    page.js("document.querySelectorAll('.pair')[23].focus()")
    page.press("j")
    assert page.find("#page").text == "25 to 48 of 48"
    page.press("k")
    assert page.find("#page").text == "1 to 24 of 48"
    assert page.js("document.activeElement === document.querySelectorAll('.pair')[23]")


def test_samples_follow_the_slider(page):
    page.open()
    page.find(".grids input").send_keys(Keys.ARROW_LEFT)
    assert page.find(".grids output").text == "100"
    first, chosen = page.driver.find_elements(By.CSS_SELECTOR, ".grids[data-stage=dpo] img")
    assert first.get_attribute("alt") == "Samples of dpo at step 0"
    assert chosen.get_attribute("alt") == "Samples of dpo at step 100"
    assert first.get_attribute("src") != chosen.get_attribute("src")


def test_every_control_has_a_name(page):
    page.open()
    unnamed = """[...document.querySelectorAll('button, input, select, img, .scroll')].filter((element) => !(
        element.textContent.trim() || element.labels?.length || element.alt || element.getAttribute('aria-label')
    )).map((element) => element.outerHTML.slice(0, 100))"""
    assert page.js(unnamed) == []
