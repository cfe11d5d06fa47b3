"""The page of explore.py in a real browser, where Chromium is installed."""

import contextlib
import tempfile
import threading
from pathlib import Path

import pytest
from browser import Browser, find_chromium

from training.explore.server import PageServer
from training.explore.session import Session
from training.sweep import read_options

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium or Chrome (apt-get install chromium, or whatever your system calls it)"
)
DONE = "typeof panes === 'object' && panes.length > 0 && panes.every(p => !p.timer && !p.running && !p.waiting && $('.cell img, .error', p.view))"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    assert CHROMIUM is not None
    browser = Browser(CHROMIUM, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(run, nvae, browser):
    """The page of a run and an NVAE, with few steps, as it begins."""
    words = [f"--net={run}", "--steps=4"]
    with tempfile.TemporaryDirectory() as folder:
        session = Session(read_options(words), words, [str(nvae)], Path(folder))
        with contextlib.closing(session), PageServer(session, 0) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                browser.log.clear()
                browser.open(server.url)
                browser.wait_for(DONE)
                yield browser
            finally:
                server.shutdown()
                thread.join()


def choose(page: Browser, field: str, value: str, pane: int = 0) -> None:
    """Give a field of a setting a value, as typing does, and wait for what comes of it."""
    page.run(f"{{ const f = {field}; f.value = '{value}'; f.dispatchEvent(new Event('input', {{bubbles: true}})) }}")
    page.wait_for(DONE)


def pictures(page: Browser, pane: int = 0) -> list[str]:
    return page.run(f"all('.cell img', panes[{pane}].view).map(image => image.src)")


def commands(page: Browser, pane: int = 0) -> str:
    return page.run(f"$('code', panes[{pane}].element).textContent")


def error(page: Browser, pane: int = 0) -> str | None:
    """The message that is shown; None = none is."""
    return page.run(
        f"$('.error', panes[{pane}].view).checkVisibility() ? $('.error', panes[{pane}].view).textContent : null"
    )


def test_sliders_change_the_pictures(page):
    first = pictures(page)
    assert len(first) == 16 and len(set(first)) == 16 and "reconstruct_phema.py" not in commands(page)
    page.run("$('[data-for=ema]', panes[0].form).focus()")
    page.press("ArrowLeft", 37)  # as readers without a mouse do
    page.wait_for(DONE)
    second = pictures(page)
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert page.run("panes[0].form.ema.value") == "0.099"
    assert "--outstd=0.099 --outkimg=3" in commands(page) and "EMA length 0.099 made of" in page.run(
        "$('.status').textContent"
    )
    choose(page, "panes[0].form.ema", "0.100")
    assert pictures(page) == first
    choose(page, "$('[data-for=steps]', panes[0].form)", "7")
    assert pictures(page) != first and "--steps=7" in commands(page)
    assert page.log == []


def test_the_path_is_of_the_image_that_is_chosen(page):
    frames = "all('.path img').map(image => image.src)"
    first = page.run(frames)
    assert len(first) > 3 and page.run("all('.path figcaption').at(0).textContent") == "80"
    page.run("all('.cell')[0].focus()")
    page.press("ArrowDown", 40)
    page.wait_for(f"{DONE} && all('.cell')[4].ariaPressed === 'true' && {frames}[0] !== '{first[0]}'")
    assert page.run(frames)[-1] == pictures(page)[4]  # with 4 steps of Heun's method, the last image seen is the result
    page.run("shared.path.click()")
    page.wait_for(f"{DONE} && {frames}.length === 0")
    assert page.log == []


def test_bad_input_is_a_message(page):
    first = pictures(page)
    assert error(page) is None
    choose(page, "panes[0].form.steps", "many")
    assert error(page) == "Invalid value for '--steps': 'many' is not a valid integer."
    assert page.run("panes[0].form.steps.value") == "many" and pictures(page) == first
    page.wait_for("getComputedStyle($('.cells')).opacity < 0.5")  # these are not what is asked for
    choose(page, "panes[0].form.steps", "4")
    assert error(page) is None and pictures(page) == first
    choose(page, "shared.seed", "-1")
    assert error(page) == "seed '-1' is no whole number, such as 0 or 16"
    choose(page, "shared.class", "12")
    choose(page, "shared.seed", "0")
    assert error(page) == "--class=12 is out of range: the classes are 0 to 9"
    assert page.log == []


def test_commands_are_copied(page):
    page.allow_clipboard()
    page.run("$('.copy').click()")
    page.wait_for("$('.copy').textContent === 'Copied'")
    copied = page.run("navigator.clipboard.readText()")
    assert (
        copied == commands(page)
        and copied.startswith("python generate_images.py \\\n    --net=")
        and "--steps=4" in copied
    )


def test_two_settings(page):
    page.run("$('#compare').click()")
    page.wait_for(f"panes.length === 2 && {DONE}")
    assert pictures(page, 0) == pictures(page, 1)
    choose(page, "panes[1].form.guide", "network")
    assert pictures(page, 0) != pictures(page, 1)
    assert (
        "--gnet=" in commands(page, 1) and "--guidance=1.5" in commands(page, 1) and "--gnet=" not in commands(page, 0)
    )
    differ = "all('.differs', panes[0].form).map(label => label.textContent)"
    assert page.run(differ) == ["Guide", "Weight"]
    choose(page, "panes[1].form.network", "1")
    assert "temperature" not in commands(page, 1) and page.run("all('.path img', panes[1].view).length") == 0
    choose(page, "panes[1].form.temperature", "0.5")
    assert "--temperature=0.5" in commands(page, 1) and "--steps" not in commands(page, 1)
    choose(page, "shared.seed", "7")
    assert all("--seeds=7-22" in commands(page, pane) for pane in (0, 1))
    before = [commands(page, pane) for pane in (0, 1)]
    page.run("window.isOld = true")
    page("Page.reload")
    page.wait_for(f"!window.isOld && {DONE} && panes.length === 2")
    assert [commands(page, pane) for pane in (0, 1)] == before
    assert page.log == []


def test_it_says_when_the_server_has_gone(page, run):
    page.run("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    choose(page, "panes[0].form.steps", "5")
    assert error(page).startswith("The server does not answer: start explore.py again")
