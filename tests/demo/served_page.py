"""The page as programs and a browser see it; test_page.py runs this file in its own process."""

import re
import shutil
import threading
import time
import types

import gradio_client
import numpy as np
import pytest

from r0_jax.demo import page
from r0_jax.demo.studio import Drawing, Studio
from r0_jax.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")  # of gradio and what it brings
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Painter(Studio):
    """Draws a colour that depends on what is asked; says what it was asked."""

    models = tuple(
        types.SimpleNamespace(name=name, steps=steps, guidance_scale=scale)
        for name, steps, scale in [("base <b>", 25, 7.5), ("R0", 4, 1.0)]
    )

    def __init__(self):
        self.asked, self.at_once, self.most = [], 0, 0

    def draw(self, number, prompt, seed, steps, guidance_scale):
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        time.sleep(0.05)
        self.at_once -= 1
        self.asked.append((number, prompt, seed, steps, guidance_scale))
        if "too long" in prompt:
            raise InputError("the prompt does not fit")
        image = np.full((8, 8, 3), (0.9, 0.1, 0.1) if number else (0.1, 0.1, 0.9), np.float32)
        return Drawing(image, 0.25, number == 0, 2 * steps, {"clip|x": 0.5, "<i>": 2.0})


@pytest.fixture
def served():
    studio = Painter()
    built = page.build(studio, ["a red circle", "红色的圆"])
    address = page.launch(built, "127.0.0.1", None)
    yield studio, address
    built.close()


def test_a_program_draws_with_all_models(served):
    studio, address = served
    client = gradio_client.Client(address, verbose=False)
    *_, gallery, link = client.predict("  a  blue\nsquare ", 5, 25, 7.5, 3, 1, api_name="/draw")
    assert studio.asked == [(0, "a blue square", 5, 25, 7.5), (1, "a blue square", 5, 3, 1.0)]
    captions = [item["caption"] for item in gallery]
    assert captions[0].startswith("base <b>, 25 steps, guidance 7.5, seed 5: a blue square")
    assert captions[1].startswith("R0, 3 steps") and "seed=5" in link


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("", 0, 25, 7.5, 4, 1), "Write a prompt first"),
        (("x" * 1001, 0, 25, 7.5, 4, 1), "longer than 1000"),
        (("x", -1, 25, 7.5, 4, 1), "[Ss]eed|minimum|0"),
        (("x", 0, 99, 7.5, 4, 1), "50"),
        (("too long", 0, 25, 7.5, 4, 1), "base <b>: the prompt does not fit"),
    ],
)
def test_what_cannot_be_drawn_is_said(served, asked, said):
    _, address = served
    client = gradio_client.Client(address, verbose=False)
    with pytest.raises(Exception, match=said):
        client.predict(*asked, api_name="/draw")


def test_ten_people_at_once_wait_for_each_other(served):
    studio, address = served
    clients = [gradio_client.Client(address, verbose=False) for _ in range(10)]
    found = []

    def draw(i):
        found.append(clients[i].predict(f"prompt {i}", i, 25, 7.5, 4, 1, api_name="/draw")[-1])

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(10)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert studio.most == 1 and len(studio.asked) == 20
    assert sorted(int(re.search(r"seed=(\d+)", link)[1]) for link in found) == list(range(10))


def test_a_port_that_is_taken_is_one_line(served):
    _, address = served
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(OSError):
        page.launch(page.build(Painter(), []), "127.0.0.1", port)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_in_a_browser(served, tmp_path):
    """Someone opens the page, writes a prompt and compares two pictures; then follows the link."""
    playwright = pytest.importorskip("playwright.sync_api")
    studio, address = served
    quiet = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"]
    quiet += ["disable-background-networking", "disable-component-update"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=[f"--{name}" for name in quiet]
        )
        seen = browser.new_page()
        outside = []
        seen.on("request", lambda request: outside.append(request.url))
        seen.goto(address)
        seen.wait_for_selector("#draw")
        seen.wait_for_timeout(1000)
        seen.fill("#prompt textarea", "红色的圆")
        seen.click("#draw")
        seen.wait_for_selector("#link a")
        assert studio.asked[0][1] == "红色的圆"
        colours = [
            seen.eval_on_selector(
                f"#image_{i} img",
                "x => { const c = document.createElement('canvas'); c.width = c.height = 1;"
                "const d = c.getContext('2d'); d.drawImage(x, 0, 0, 1, 1);"
                "return Array.from(d.getImageData(0, 0, 1, 1).data); }",
            )
            for i in range(2)
        ]
        assert colours[0][2] > 200 > 100 > colours[0][0] and colours[1][0] > 200
        assert "8 network calls, 0.25 s" in seen.inner_text("#caption_1")
        assert seen.locator("#caption_0 i").count() == 0  # names are text
        assert all(url.startswith((address, "data:", "blob:")) for url in outside), outside
        seen.screenshot(path=tmp_path / "page.png", full_page=True)
        seen.goto(address + seen.get_attribute("#link a", "href"))
        seen.wait_for_selector("#prompt textarea")
        seen.wait_for_function("document.querySelector('#prompt textarea').value == '红色的圆'")
        browser.close()
