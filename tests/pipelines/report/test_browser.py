"""The report in a real browser: no errors, nothing loaded, and the live view's answers are those of numpy."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import BrowserUnavailable, browser
from set_scenes import Scene
from shown_store import add_clusters, add_matches, add_parts, scenes, shown_store

from dino_ops.compact_descriptors import cosines, region_query
from pipelines import report
from pipelines.settings.loading import load_config

IDS = ["cat/<b onclick=alert(1)>0</b>.png", "cat/1.png", "dog/</script><script>alert(2)</script>", "dog/3.png", "e.png"]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    try:
        with browser() as running:
            yield running
    except BrowserUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def made() -> dict[str, Scene]:
    return scenes(IDS)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, made: dict[str, Scene]) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    store = shown_store(folder, made)
    add_clusters(store, made)
    add_parts(store, made)
    add_matches(store, {(IDS[0], IDS[1]): [0.9, 0.8]})
    return Path(report.run(load_config(), store=store.uri).output)


class Opened:
    """A page in the browser, and everything that it complained of or asked for."""

    def __init__(self, chromium: Any, file: Path, **options: Any) -> None:
        # reduced motion: what is pointed at does not scroll away meanwhile
        self.context = chromium.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce", **options)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(f"dialog {dialog.message}"))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())
        self.data = json.loads(self.page.text_content("#live-data"))
        self.ids = [one["id"] for one in self.data["images"]]
        self.grids = [tuple(one["grid"]) for one in self.data["images"]]
        self.firsts = np.concatenate([[0], np.cumsum([rows * columns for rows, columns in self.grids])])
        codes = np.frombuffer(base64.b64decode(self.data["codes"]), np.int8)
        self.codes = codes.reshape(-1, self.data["dimensions"])
        self.page.evaluate("document.getElementById('live-gallery').scrollIntoView({block: 'center'})")

    def close(self) -> None:
        self.context.close()

    def settle(self) -> None:
        """Until what was asked is drawn: two frames."""
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def spot(self, image: int, row: int, column: int) -> tuple[float, float]:
        """Where on the screen the middle of a patch is."""
        bounds = self.page.locator(".tile.live .stack").nth(image).bounding_box()
        rows, columns = self.grids[image]
        return (
            bounds["x"] + (column + 0.5) / columns * bounds["width"],
            bounds["y"] + (row + 0.5) / rows * bounds["height"],
        )

    def answers(self) -> list[tuple[int, float] | None]:
        """Of each image its best patch and similarity; None for the one that is pointed at."""
        return self.page.evaluate(
            """() => [...document.querySelectorAll('.tile.live')].map(tile => tile.classList.contains('source')
                ? null : [Number(tile.dataset.best), Number(tile.dataset.similarity)])"""
        )

    def expected(self, image: int, patches: list[int]) -> list[list[float] | None]:
        """The same from numpy, on the same codes."""
        query = region_query(self.codes[self.firsts[image] + np.array(patches)])
        similar = cosines(self.codes, query)
        found: list[list[float] | None] = []
        for other in range(len(self.grids)):
            own = similar[self.firsts[other] : self.firsts[other + 1]]
            found.append(None if other == image else [int(own.argmax()), float(own.max())])
        return found

    def heat(self, image: int) -> np.ndarray:
        """The pixels of a heat map: (rows, columns, 4)."""
        values = self.page.evaluate(
            """image => { const canvas = document.querySelectorAll('.tile.live canvas')[image];
                return [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]; }""",
            image,
        )
        return np.array(values).reshape(*self.grids[image], 4)


@pytest.fixture
def opened(chromium: Any, file: Path) -> Iterator[Opened]:
    page = Opened(chromium, file)
    yield page
    assert page.said == [], "the console stays empty"
    assert [url for url in page.asked if not url.startswith("data:image/")] == [file.as_uri()]
    page.close()


def test_pointing_at_a_patch_lights_up_the_others_as_numpy_says(opened: Opened, made: dict[str, Scene]) -> None:
    assert opened.answers()[0] is None and opened.answers() == opened.expected(0, [_asked(opened)])
    before = opened.heat(1)
    for image, row, column in ((1, 0, 0), (2, 11, 11), (3, 5, 6)):
        opened.page.mouse.move(*opened.spot(image, row, column))
        opened.settle()
        assert opened.answers() == opened.expected(image, [row * 12 + column])
    assert (opened.heat(1) != before).any() and not opened.heat(3).any(), "the photo itself is left as it is"
    similar = cosines(opened.codes, region_query(opened.codes[opened.firsts[3] + 5 * 12 + 6][None]))[:144]
    level = np.clip((similar - opened.data["low"]) / (opened.data["high"] - opened.data["low"]), 0, 1)
    right = np.array([list(bytes.fromhex(opened.data["colours"][int(255 * one)])) for one in level])
    np.testing.assert_allclose(opened.heat(0).reshape(-1, 4)[:, :3], right, atol=5)
    best = made[opened.ids[0]].kinds.reshape(-1)[opened.answers()[0][0]]
    assert best == made[opened.ids[3]].kinds[5, 6], "and the best match is of the same kind"


def test_names_with_markup_are_text(opened: Opened) -> None:
    page = opened.page
    shown = page.evaluate("[...document.querySelectorAll('#layer-gallery .name')].map(one => one.title)")
    assert sorted(shown) == sorted(IDS)
    assert page.evaluate("document.querySelectorAll('b[onclick], img').length") == 0
    opened.page.mouse.move(*opened.spot(opened.ids.index(IDS[2]), 3, 4))
    opened.settle()
    assert page.text_content("#live-status") == f"{IDS[2]}, row 4 of 12, column 5 of 12."


def test_a_click_keeps_a_patch_and_a_box_is_a_region(opened: Opened) -> None:
    mouse, page = opened.page.mouse, opened.page
    mouse.click(*opened.spot(1, 2, 3))
    opened.settle()
    kept = opened.answers()
    mouse.move(*opened.spot(2, 8, 8))
    opened.settle()
    assert opened.answers() == kept == opened.expected(1, [2 * 12 + 3])
    assert page.text_content("#live-status").startswith("Kept: ")
    mouse.move(*opened.spot(3, 1, 1))
    mouse.down()
    mouse.move(*opened.spot(3, 2, 2))
    mouse.move(*opened.spot(3, 3, 4))
    mouse.up()
    opened.settle()
    region = [row * 12 + column for row in range(1, 4) for column in range(1, 5)]
    assert opened.answers() == opened.expected(3, region)
    assert "a box of 12 patches" in page.text_content("#live-status")
    page.click("#live-release")
    mouse.move(*opened.spot(0, 6, 6))
    opened.settle()
    assert opened.answers() == opened.expected(0, [6 * 12 + 6])


def test_everything_can_be_done_with_the_keyboard(opened: Opened) -> None:
    page, press = opened.page, opened.page.keyboard.press
    page.focus("#live-box")
    press("Tab")
    press("Tab") if page.evaluate("document.activeElement.id") == "live-release" else None
    press("Tab") if page.evaluate("document.activeElement.dataset.image") == "0" else None
    assert page.evaluate("document.activeElement.dataset.image") == "1", "each photo is a stop"
    opened.settle()
    assert opened.answers() == opened.expected(1, [6 * 12 + 6]), "the middle"
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowLeft", "ArrowUp"):
        press(key)
    opened.settle()
    assert opened.answers() == opened.expected(1, [7 * 12 + 5])
    press("Shift+ArrowRight")
    press("Shift+ArrowDown")
    opened.settle()
    assert opened.answers() == opened.expected(1, [7 * 12 + 5, 7 * 12 + 6, 8 * 12 + 5, 8 * 12 + 6])
    press("Enter")
    opened.settle()
    assert page.is_enabled("#live-release")
    page.wait_for_selector("#live-said:has-text('Kept.')", state="attached")
    best = max((one[1], opened.ids[at]) for at, one in enumerate(opened.answers()) if one)
    assert f"Most similar: {best[1]} ({best[0]:.2f})" in page.text_content("#live-said")
    press("Escape")
    opened.settle()
    assert not page.is_enabled("#live-release")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid", "and where the focus is can be seen"


def test_a_tap_keeps_a_patch(chromium: Any, file: Path) -> None:
    opened = Opened(chromium, file, has_touch=True, color_scheme="dark")
    opened.page.touchscreen.tap(*opened.spot(2, 4, 9))
    opened.settle()
    assert opened.answers() == opened.expected(2, [4 * 12 + 9]) and opened.page.is_enabled("#live-release")
    assert opened.page.evaluate("document.documentElement.dataset.theme") == "dark"
    opened.page.click("#theme")
    assert opened.page.evaluate("document.documentElement.dataset.theme") == "light"
    assert opened.said == []
    opened.close()


def test_layers_are_chosen_and_fade(opened: Opened) -> None:
    page = opened.page

    def visible() -> set[str]:
        return set(page.evaluate("[...document.querySelectorAll('.layer')].filter(one => getComputedStyle(one).display "
                                 "!== 'none').map(one => one.dataset.layer)"))  # fmt: skip

    assert visible() == {"descriptors"}
    page.check('input[value="clusters-0"]', force=True)
    assert visible() == {"clusters-0"}
    assert page.is_visible('.about[data-layer="clusters-0"] .kinds') and page.is_hidden(
        '[data-layer="saliency"] .scale'
    )
    page.evaluate("const one = document.getElementById('layer-opacity'); one.value = 30; "
                  "one.dispatchEvent(new Event('input'))")  # fmt: skip
    opacity = "getComputedStyle(document.querySelector('.layer[data-layer=\"clusters-0\"]')).opacity"
    assert float(page.evaluate(opacity)) == pytest.approx(0.3)
    page.check('input[value=""]', force=True)
    assert visible() == set()


@pytest.mark.slow
@pytest.mark.parametrize(("images", "milliseconds"), [(60, 16), (200, 60)])
def test_it_follows_the_pointer(chromium: Any, tmp_path: Path, images: int, milliseconds: float) -> None:
    """Many images of 28 x 28 patches in 64 dimensions; the quickest of all, since machines that test are busy."""
    ids = [f"{number:03}.png" for number in range(images)]
    generator = np.random.default_rng(0)
    directions = generator.standard_normal((8, 64))
    made = {}
    for image_id, one in scenes(ids, size=28).items():
        descriptor = one.features.descriptor @ directions + 0.1 * generator.standard_normal((28, 28, 64))
        described = replace(one.features, descriptor=descriptor.astype(np.float32))
        made[image_id] = replace(one, features=described)
    store = shown_store(tmp_path, made)
    config = load_config([], [f"report.sample={images}"])
    opened = Opened(chromium, Path(report.run(config, store=store.uri).output))
    assert opened.codes.shape == (images * 784, 64)
    opened.page.evaluate("document.querySelector('.tile.live').scrollIntoView({block: 'center'})")
    took = []
    for number in range(60):
        opened.page.mouse.move(*opened.spot(number % 6, number % 28, 3 * number % 28))
        opened.settle()
        took.append(opened.page.evaluate("performance.getEntriesByName('dinoray-live')[0].duration"))
    assert opened.said == [] and min(took) < milliseconds, sorted(took)
    opened.close()


def _asked(opened: Opened) -> int:
    """The patch that the page begins with."""
    _, row, column = opened.data["start"]
    return row * opened.grids[0][1] + column
