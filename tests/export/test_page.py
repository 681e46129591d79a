"""The page in a real browser, which reaches only the test's server, computes the same as Python."""

import functools
import http.server
import importlib.util
import json
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from math import cos, radians, sin
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib.image
import numpy as np
import optax
import pytest

import ctde_jax as ctde
from ctde_jax.data import Dataset, Split, decode, encode
from ctde_jax.errors import InputError
from ctde_jax.export import write_bundle, write_page
from ctde_jax.export.web import PAGE
from ctde_jax.models import Model

selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.actions.pointer_input import PointerInput  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

CHROMIUM, CHROMEDRIVER, NODE = (shutil.which(name) for name in ("chromium", "chromedriver", "node"))
MNIST = Path(__file__).parents[3] / "shared" / "data" / "mnist"
SENTENCE = "The quick brown 🦊 jumps over the lazy dog, and the dog sleeps on. "
LENGTH = 16
OTHER_HOST = "elsewhere.test"
FLAGS = [
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--context-length-size=1000,900",
    ),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    f"--host-resolver-rules=MAP {OTHER_HOST} 127.0.0.1 , MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("jax2onnx") is None, reason="needs jax2onnx"),
]

Stroke = list[tuple[float, float]]
"""Points from 0 to 1, from the left and from the top."""


def arc(x: float, y: float, wide: float, high: float, start: int, end: int) -> Stroke:
    """Returns points around a center, clockwise; angles in degrees, 0 is to the right."""
    angles = [radians(start + (end - start) * step / 12) for step in range(13)]
    return [(x + wide * cos(angle), y + high * sin(angle)) for angle in angles]


DIGITS: list[list[Stroke]] = [
    [arc(0.5, 0.5, 0.2, 0.3, -90, 270)],
    [[(0.5, 0.18), (0.5, 0.82)]],
    [[*arc(0.5, 0.36, 0.19, 0.17, -170, 40), (0.3, 0.8), (0.72, 0.8)]],
    [[*arc(0.48, 0.34, 0.17, 0.15, -150, 90), *arc(0.48, 0.66, 0.2, 0.17, -90, 150)]],
    [[(0.55, 0.18), (0.3, 0.58), (0.74, 0.58)], [(0.62, 0.38), (0.62, 0.84)]],
    [[(0.7, 0.2), (0.36, 0.2), (0.34, 0.46), *arc(0.48, 0.63, 0.2, 0.19, -120, 150)]],
    [[(0.62, 0.16), (0.42, 0.38), (0.33, 0.6), *arc(0.5, 0.65, 0.17, 0.17, 180, 540)]],
    [[(0.28, 0.22), (0.72, 0.22), (0.45, 0.82)]],
    [arc(0.5, 0.34, 0.15, 0.15, 90, 450), arc(0.5, 0.67, 0.18, 0.18, -90, 270)],
    [[*arc(0.48, 0.36, 0.17, 0.17, 0, 360), (0.65, 0.36), (0.6, 0.82)]],
]


class Exported(NamedTuple):
    """A trained model and its page."""

    trained: ctde.Trained
    data: Dataset
    folder: Path


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder on loopback, and records the requests."""

    def __init__(self, folder: Path):
        self.requested: list[str] = []
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def send_head(self):
        self.server.requested.append(self.path)
        return super().send_head()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def server(root):
    server = Server(root)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("needs chromium and chromedriver")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    with selenium.Chrome(options, selenium.ChromeService(CHROMEDRIVER)) as browser:
        browser.get("about:blank")  # instead of the browser's start page
        yield browser


@pytest.fixture
def watched(browser, server):
    """Asserts after the test that only its server was contacted, and that the console is empty."""
    for kind in ("performance", "browser"):
        browser.get_log(kind)  # discards messages of the previous test
    yield browser
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in urls if not url.startswith((server.url, "data:image/svg+xml"))] == []
    assert browser.get_log("browser") == []


def export(root: Path, name: str, model: Model, data: Dataset, optimizer, **options) -> Exported:
    trained = ctde.fit(model, data, optimizer, devices=ctde.devices.start(1), show=False, **options)
    bundle = write_bundle(
        trained, data, root / f"{name}-bundle", ["onnx"], examples=1, show=False
    ).bundle
    try:
        return Exported(trained, data, write_page(bundle, root / name))
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def digits_page(root, digits) -> Exported:
    return export(
        root,
        "digits",
        ctde.models.mlp([64, 128, 10]),
        digits,
        optax.adam(0.005),
        batch_size=64,
        epochs=12,
    )


@pytest.fixture(scope="module")
def mnist_page(root) -> Exported:
    if not MNIST.exists():
        pytest.skip("needs the MNIST files in ../shared/data/mnist")
    data = ctde.data.mnist(MNIST)
    data = replace(data, test=Split(*(array[:500] for array in data.test)))
    return export(
        root,
        "mnist",
        ctde.models.cnn((28, 28), 10),
        data,
        optax.adam(0.001),
        batch_size=32,
        steps=250,
    )


@pytest.fixture(scope="module")
def enlarged_page(root, digits) -> Exported:
    """The 8 x 8 digits, enlarged three times and padded to the 28 x 28 pixels of MNIST."""
    pictures = np.kron(digits.train.inputs, np.full((3, 3), 15, np.uint8))
    pictures = np.pad(pictures, ((0, 0), (2, 2), (2, 2)))
    data = ctde.data.from_arrays(pictures, digits.train.labels, name="enlarged")
    return export(
        root,
        "enlarged",
        ctde.models.mlp([784, 10]),
        data,
        optax.adam(0.005),
        batch_size=64,
        steps=10,
    )


@pytest.fixture(scope="module")
def colors_page(root) -> Exported:
    """Pictures of 8 x 12 pixels in red, green or blue, with noise."""
    random = np.random.default_rng(0)
    labels = np.arange(300) % 3
    pictures = (
        random.integers(0, 90, (300, 8, 12, 3)) + 160 * np.eye(3, dtype=int)[labels][:, None, None]
    )
    data = ctde.data.from_arrays(
        pictures.astype(np.uint8), labels, name="colors", classes=("red", "green", "blue")
    )
    return export(
        root,
        "colors",
        ctde.models.mlp([288, 16, 3]),
        data,
        optax.adam(0.005),
        batch_size=32,
        epochs=8,
    )


@pytest.fixture(scope="module")
def text_pages(root) -> dict[str, Exported]:
    (root / "fox.txt").write_text(40 * SENTENCE, encoding="utf-8")
    data = ctde.data.from_text(root / "fox.txt", length=LENGTH, stride=1)
    tokens = len(data.vocabulary)
    models = {
        "lstm": ctde.models.rnn_language_model(tokens, hidden_size=48, layers=1),
        "transformer": ctde.models.transformer(tokens, LENGTH, hidden_size=48, blocks=1),
    }
    return {
        name: export(root, name, model, data, optax.adam(0.005), batch_size=32, steps=200)
        for name, model in models.items()
    }


def open_page(browser, url: str) -> bool:
    """Opens a page, and returns whether its model runs."""
    browser.get(url)
    return browser.execute_async_script("window.page.ready.then(arguments[0])")


def text_of(browser, part: str) -> str:
    return browser.find_element("id", part).text


def draw(
    browser, strokes: list[Stroke], kind: str = "mouse", scale: float = 1, shift: float = 0
) -> None:
    """Moves a mouse, a finger or a pen over the board."""
    board = browser.find_element("id", "board")
    for stroke in strokes:
        chain = ActionChains(browser, duration=10, devices=[PointerInput(kind, kind)])
        pointer = chain.w3c_actions.pointer_action
        for index, point in enumerate(stroke):
            x, y = (round((scale * (to - 0.5) + shift) * board.size["width"]) for to in point)
            pointer.move_to(board, x, y)
            if index == 0:
                pointer.pointer_down()
        pointer.pointer_up()
        chain.perform()
    settle(browser)


def model_input(browser) -> np.ndarray:
    """Returns the model's input, `uint8[height, width, 4]`; ink is opaque."""
    script = """
        const { width, height } = document.getElementById("seen");
        const { data } = document.getElementById("seen").getContext("2d")\
.getImageData(0, 0, width, height);
        return [width, height, ...data];
    """
    width, height, *pixels = browser.execute_script(script)
    return np.array(pixels, np.uint8).reshape(height, width, 4)


def settle(browser) -> None:
    """Waits until the page shows the output for the last change."""
    browser.execute_async_script(
        "requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(arguments[0])))"
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.softmax(logits.astype(np.float32)))


def test_probabilities_equal_those_of_python(watched, server, digits_page):
    assert open_page(watched, f"{server.url}/digits/")
    pictures = digits_page.data.test.inputs[:10]
    script = "const [picture, done] = arguments; window.page.predict(picture).then(done)"
    probabilities = [
        watched.execute_async_script(script, picture.flatten().tolist()) for picture in pictures
    ]
    np.testing.assert_allclose(
        probabilities, softmax(digits_page.trained.predict(pictures)), atol=1e-5
    )


def test_page_describes_the_model(watched, server, digits_page):
    assert open_page(watched, f"{server.url}/digits/")
    card = json.loads((digits_page.folder / "card.json").read_text(encoding="utf-8"))
    facts = [
        "trained on digits",
        "9,610 parameters",
        f"{card['trained_model']['measured']['accuracy']:.2%}",
    ]
    for fact in [
        *facts,
        "runs only on this device",
        f"{card['files']['model.onnx']['sha256'][:12]}… checked",
    ]:
        assert fact in text_of(watched, "facts")


def test_browser_requests_only_the_files_of_the_folder(watched, server, digits_page):
    server.requested.clear()
    assert open_page(watched, f"{server.url}/digits/")
    names = ["", *(name for name in PAGE if name != "index.html"), "card.json", "model.onnx"]
    names += [f"ort/{path.name}" for path in (digits_page.folder / "ort").iterdir()]
    assert sorted(server.requested) == sorted(f"/digits/{name}" for name in names)
    assert not list(digits_page.folder.rglob("*.mjs")), (
        "some servers do not serve .mjs files as scripts"
    )


def test_policy_of_the_page_forbids_other_servers(browser, server, digits_page, root):
    """Another port of the same machine is another server."""
    assert open_page(browser, f"{server.url}/digits/")
    other = Server(root)
    script = (
        "fetch(arguments[0]).then(() => arguments[1]('came'), () => arguments[1]('did not come'))"
    )
    assert browser.execute_async_script(script, other.url) == "did not come"
    assert other.requested == []
    other.server_close()
    assert "Content Security Policy" in browser.get_log("browser")[0]["message"]


@pytest.mark.parametrize("kind", ["mouse", "touch", "pen"])
def test_strokes_are_recognized(watched, server, digits_page, kind):
    """With every kind of pointer; a small drawing in a corner is recognized like a large one."""
    assert open_page(watched, f"{server.url}/digits/")
    for label, scale, shift in [
        (0, 1, 0),
        (1, 1, 0),
        (2, 1, 0),
        (5, 1, 0),
        (0, 0.4, -0.25),
        (2, 0.4, 0.25),
    ]:
        watched.find_element("id", "clear").click()
        draw(watched, DIGITS[label], kind, scale, shift)
        assert text_of(watched, "winner") == str(label)
        assert text_of(watched, "spoken").startswith(f"Prediction: {label}, ")


def test_mnist_network_recognizes_all_digits(watched, server, mnist_page):
    assert open_page(watched, f"{server.url}/mnist/")
    recognized = []
    for strokes in DIGITS:
        watched.find_element("id", "clear").click()
        draw(watched, strokes)
        recognized.append(text_of(watched, "winner"))
    assert recognized == list("0123456789")


def test_picture_is_preprocessed_like_mnist(watched, server, enlarged_page):
    """Ink fits into about 20 x 20 pixels, and its center of mass is in the center of the image."""
    assert open_page(watched, f"{server.url}/enlarged/")
    for label, scale, shift in [(0, 1, 0), (7, 1, 0), (4, 0.5, 0.2)]:
        watched.find_element("id", "clear").click()
        draw(watched, DIGITS[label], scale=scale, shift=shift)
        ink = model_input(watched)[..., 3].astype(int)
        rows, columns = np.nonzero(ink > 8)
        assert np.ptp(rows) + 1 in (20, 21)
        assert 10 < np.ptp(columns) + 1 <= 21
        mass = [(ink.sum(axis) * (np.arange(28) + 0.5)).sum() / ink.sum() for axis in (0, 1)]
        np.testing.assert_allclose(mass, 14, atol=0.1)


def test_bars_equal_the_probabilities_of_python(watched, server, digits_page):
    """White is 16 in this data set; the percentage of a bar has one decimal place."""
    assert open_page(watched, f"{server.url}/digits/")
    for strokes in DIGITS[6:]:
        watched.find_element("id", "clear").click()
        draw(watched, strokes)
        picture = np.round(model_input(watched)[..., 3] / 255 * 16).astype(np.uint8)
        probabilities = softmax(digits_page.trained.predict(picture[None]))[0]
        shown = [bar.text.split() for bar in watched.find_elements("css selector", "#bars li")]
        assert [name for name, _ in shown] == list("0123456789")
        np.testing.assert_allclose(
            [float(percentage[:-1]) for _, percentage in shown], 100 * probabilities, atol=0.051
        )


def test_empty_board_has_no_prediction(watched, server, digits_page):
    """Neither at the start, nor after the last stroke is undone."""
    assert open_page(watched, f"{server.url}/digits/")
    settle(watched)
    assert text_of(watched, "winner") == "nothing yet"
    draw(watched, DIGITS[4])
    assert text_of(watched, "winner") != "nothing yet"
    assert text_of(watched, "bars").count("%") == 10
    for _ in DIGITS[4]:
        watched.find_element("id", "undo").click()
    settle(watched)
    assert text_of(watched, "winner") == "nothing yet"
    assert text_of(watched, "bars").count("%") == 0


def test_keyboard_draws(watched, server, digits_page):
    """The first stop of the Tab key is the board, and C clears it."""
    assert open_page(watched, f"{server.url}/digits/")
    watched.find_element("tag name", "body").send_keys(Keys.TAB)
    board = watched.switch_to.active_element
    assert board.get_attribute("id") == "board"
    board.send_keys(
        9 * Keys.ARROW_UP, Keys.SPACE, 18 * Keys.ARROW_DOWN, Keys.SPACE, 3 * Keys.ARROW_RIGHT
    )
    settle(watched)
    assert text_of(watched, "winner") == "1"
    board.send_keys("c")
    settle(watched)
    assert text_of(watched, "winner") == "nothing yet"
    stops = []
    for _ in range(2):
        watched.switch_to.active_element.send_keys(Keys.TAB)
        stops.append(watched.switch_to.active_element.get_attribute("id"))
    assert stops == ["undo", "clear"]


def test_held_key_acts_once_and_the_pen_state_is_announced(watched, server, digits_page):
    assert open_page(watched, f"{server.url}/digits/")
    script = """
        for (const repeat of [false, true, true, true, true]) {
            const event = new KeyboardEvent("keydown", \
{ key: " ", repeat, bubbles: true, cancelable: true });
            document.getElementById("board").dispatchEvent(event);
        }
    """
    watched.execute_script(script)
    assert text_of(watched, "spoken") == "The pen is down."
    watched.find_element("id", "board").send_keys(10 * Keys.ARROW_DOWN, Keys.SPACE)
    settle(watched)
    assert text_of(watched, "spoken").startswith("Prediction: ")


def test_announcement_is_not_repeated(watched, server, digits_page):
    """Moving the lifted pen does not repeat the announcement."""
    assert open_page(watched, f"{server.url}/digits/")
    draw(watched, DIGITS[1])
    script = """
        window.spoken = 0;
        const observer = new MutationObserver((changes) => (window.spoken += changes.length));
        observer.observe(document.getElementById("spoken"), \
{ childList: true, characterData: true, subtree: true });
    """
    watched.execute_script(script)
    watched.find_element("id", "board").send_keys(6 * Keys.ARROW_DOWN)
    settle(watched)
    assert watched.execute_script("return window.spoken") == 0


def test_finger_draws_while_another_rests(watched, server, digits_page):
    """A finger rests on the title, then a palm on the board; neither draws a line."""
    assert open_page(watched, f"{server.url}/digits/")
    board = watched.find_element("id", "board").rect

    def touch(kind: str, *points: tuple[int, float, float]) -> None:
        touches = [{"id": finger, "x": x, "y": y} for finger, x, y in points]
        watched.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})

    def on_board(point: tuple[float, float]) -> tuple[float, float]:
        return board["x"] + point[0] * board["width"], board["y"] + point[1] * board["height"]

    resting = (0, 20, 20)
    touch("touchStart", resting)
    touch("touchStart", resting, (1, *on_board((0.5, 0.2))))
    palm = (2, *on_board((0.9, 0.9)))
    touch("touchStart", resting, (1, *on_board((0.5, 0.2))), palm)
    for step in range(13):
        touch("touchMove", resting, (1, *on_board((0.5, 0.2 + 0.05 * step))), palm)
    touch("touchEnd")
    settle(watched)
    assert text_of(watched, "winner") == "1"


def test_drawing_may_have_many_points(watched, server, digits_page):
    """It has 250,000 points, more than a function accepts arguments."""
    assert open_page(watched, f"{server.url}/digits/")
    script = """
        const done = arguments[0];
        const points = Array.from({ length: 250000 }, (_, place) => [4, 1 + (6 * place) / 250000]);
        const context = document.getElementById("seen").getContext("2d");
        import("./ink.js").then(({ fit }) => fit(context, [points]))\
.then(() => done("drawn"), (e) => done(e.message));
    """
    assert watched.execute_async_script(script) == "drawn"
    assert model_input(watched)[..., 3].any()


@pytest.mark.parametrize("color", ["red", "green", "blue"])
def test_uploaded_picture_is_classified(watched, server, colors_page, tmp_path, color):
    """The center is scaled to 8 x 12; the margins on the left and right are cut off."""
    picture = np.full((80, 400, 3), 255, np.uint8)
    picture[:, 130:270] = np.array(
        {"red": (250, 40, 40), "green": (40, 250, 40), "blue": (40, 40, 250)}[color]
    )
    matplotlib.image.imsave(tmp_path / "picture.png", picture)
    assert open_page(watched, f"{server.url}/colors/")
    watched.find_element("id", "file").send_keys(str(tmp_path / "picture.png"))
    WebDriverWait(watched, 10).until(lambda browser: text_of(browser, "winner") == color)
    np.testing.assert_array_equal(
        model_input(watched)[..., :3], np.broadcast_to(picture[0, 200], (8, 12, 3))
    )


def test_file_that_is_not_a_picture_is_refused(watched, server, colors_page, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    assert open_page(watched, f"{server.url}/colors/")
    watched.find_element("id", "file").send_keys(str(tmp_path / "notes.txt"))
    sentence = "notes.txt is not an image that this browser can read."
    WebDriverWait(watched, 10).until(lambda browser: text_of(browser, "trouble") == sentence)
    assert text_of(watched, "winner") == "nothing yet"


def ask_to_continue(browser, prompt: str, length: int | str) -> None:
    """Requests a continuation of the prompt at temperature 0."""
    browser.find_element("id", "temperature").send_keys(Keys.HOME)
    browser.find_element("id", "length").clear()
    browser.find_element("id", "length").send_keys(str(length))
    browser.execute_script("document.getElementById('text').value = arguments[0]", prompt)
    browser.find_element("id", "text").send_keys(Keys.CONTROL, Keys.ENTER)


def wait_for_the_end(browser) -> str:
    WebDriverWait(browser, 60).until(
        lambda browser: text_of(browser, "progress").endswith("per second.")
    )
    return browser.find_element("id", "text").get_property("value")


@pytest.mark.parametrize("name", ["lstm", "transformer"])
@pytest.mark.parametrize("prompt", ["The q", "the 🦊 sleeps on. The lazy dog jumps"])
def test_generated_text_equals_that_of_python(watched, server, text_pages, key, name, prompt):
    """One position at a time, or from a window that is shorter than the text."""
    (trained, data, folder), length = text_pages[name], 60
    assert (folder / "step.onnx").exists() == (name == "lstm")
    assert open_page(watched, f"{server.url}/{name}/")
    assert f"trained on {data.name}" in text_of(watched, "facts")
    tokens = ctde.generate(
        trained.model,
        trained.params,
        trained.model_state,
        encode(prompt, data.vocabulary),
        length,
        key,
        temperature=0,
        window=None if name == "lstm" else LENGTH,
    )
    ask_to_continue(watched, prompt, length)
    assert wait_for_the_end(watched) == prompt + decode(np.asarray(tokens), data.vocabulary)
    assert text_of(watched, "degrees") == "0.00"


def test_text_at_a_high_temperature_varies(watched, server, text_pages):
    """At the highest temperature, even a model with confident predictions varies."""
    assert open_page(watched, f"{server.url}/lstm/")
    watched.find_element("id", "temperature").send_keys(Keys.END)
    texts = set()
    for _ in range(3):
        watched.execute_script("document.getElementById('progress').textContent = ''")
        watched.execute_script("document.getElementById('text').value = 'The '")
        watched.find_element("id", "go").click()
        texts.add(wait_for_the_end(watched))
    assert len(texts) == 3
    assert {len(encode(text, text_pages["lstm"].data.vocabulary)) for text in texts} == {304}


def test_generation_stops_on_request(watched, server, text_pages):
    assert open_page(watched, f"{server.url}/lstm/")
    ask_to_continue(watched, "The", 10_000)
    WebDriverWait(watched, 10, 0.02).until(lambda browser: text_of(browser, "go") == "Stop")
    time.sleep(0.2)  # time for some characters
    watched.find_element("id", "go").click()
    assert 3 < len(wait_for_the_end(watched)) < 10_000
    assert text_of(watched, "go") == "Continue"


def test_generation_stops_while_the_prompt_is_read(watched, server, text_pages):
    """A second click before the end does not start another generation."""
    assert open_page(watched, f"{server.url}/lstm/")
    prompt = "The " * 10_000
    ask_to_continue(watched, prompt, 10_000)
    go = watched.find_element("id", "go")
    WebDriverWait(watched, 10, 0.02).until(lambda browser: go.text == "Stop")
    watched.execute_script(
        "for (let time = 0; time < 3; time++) document.getElementById('go').click()"
    )
    assert wait_for_the_end(watched) == prompt
    assert text_of(watched, "progress").startswith("0 characters")
    time.sleep(0.5)  # time for another generation to write
    assert (go.text, watched.find_element("id", "text").get_property("value")) == (
        "Continue",
        prompt,
    )


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_double_click_starts_once(watched, server, text_pages, name):
    assert open_page(watched, f"{server.url}/{name}/")
    ActionChains(watched).double_click(watched.find_element("id", "go")).perform()
    assert len(encode(wait_for_the_end(watched), text_pages[name].data.vocabulary)) == 304


def test_keys_on_the_button_start_once(watched, server, text_pages):
    """Ctrl+Enter would also press the button, and a held key would repeat."""
    assert open_page(watched, f"{server.url}/lstm/")
    watched.find_element("id", "go").send_keys(Keys.CONTROL, Keys.ENTER)
    assert len(encode(wait_for_the_end(watched), text_pages["lstm"].data.vocabulary)) == 304
    script = """
        const event = \
{ key: "Enter", ctrlKey: true, repeat: true, bubbles: true, cancelable: true };
        document.getElementById("text").dispatchEvent(new KeyboardEvent("keydown", event));
    """
    watched.execute_script(script)
    assert text_of(watched, "go") == "Continue"


def test_text_with_windows_line_ends_equals_that_of_python(watched, server, root, key):
    """A text box normalizes line ends."""
    (root / "windows.txt").write_bytes(
        40 * b"The quick brown fox jumps.\r\nAnd the dog sleeps on.\r\n"
    )
    data = ctde.data.from_text(root / "windows.txt", length=LENGTH, stride=1)
    model = ctde.models.rnn_language_model(len(data.vocabulary), hidden_size=48, layers=1)
    exported = export(root, "windows", model, data, optax.adam(0.005), batch_size=32, steps=200)
    trained, prompt = exported.trained, "The quick brown fox jumps.\r\nAnd"
    prompt_tokens = encode(prompt, data.vocabulary)
    tokens = ctde.generate(
        trained.model,
        trained.params,
        trained.model_state,
        prompt_tokens,
        60,
        key,
        temperature=0,
        window=None,
    )
    written = prompt + decode(np.asarray(tokens), data.vocabulary)
    assert written.count("\r\n") > 2
    assert open_page(watched, f"{server.url}/windows/")
    ask_to_continue(watched, prompt, 30)
    half = wait_for_the_end(watched)
    watched.execute_script("document.getElementById('progress').textContent = ''")
    ask_to_continue(watched, half, 30)
    assert wait_for_the_end(watched) == written.replace("\r\n", "\n")


@pytest.mark.parametrize(
    ("prompt", "length", "sentence"),
    [
        (
            "The Ω\tß",
            5,
            (
                'The model\'s vocabulary does not contain "Ω", "\\t", and "ß": remove or replace '
                "these characters."
            ),
        ),
        ("", 5, "The model needs a prompt: enter at least one character."),
        ("The", 0, "Length must be a whole number from 1 to 10000."),
        ("The", "", "Length must be a whole number from 1 to 10000."),
        (
            "The\u00a0\u200bq",
            5,
            (
                "The model's vocabulary does not contain U+00A0 and U+200B: remove or replace "
                "these characters."
            ),
        ),
    ],
)
def test_invalid_request_is_refused_in_one_sentence(
    watched, server, text_pages, prompt, length, sentence
):
    assert open_page(watched, f"{server.url}/lstm/")
    ask_to_continue(watched, prompt, length)
    assert text_of(watched, "trouble") == sentence
    assert watched.find_element("id", "text").get_property("value") == prompt
    ask_to_continue(watched, "The", 5)
    wait_for_the_end(watched)
    assert text_of(watched, "trouble") == ""


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


MISMATCH = "{} does not match its checksum, so the model does not run: copy the folder again."
WASM = "ort/ort-wasm-simd-threaded.wasm"
DAMAGES = {
    "flipped byte": ("digits", "model.onnx", flip, MISMATCH.format("model.onnx")),
    "short file": (
        "digits",
        "model.onnx",
        lambda content: content[:-1],
        MISMATCH.format("model.onnx"),
    ),
    "flipped byte of a step": ("lstm", "step.onnx", flip, MISMATCH.format("step.onnx")),
    "flipped byte of the runtime": ("digits", WASM, flip, MISMATCH.format(WASM)),
    "damaged list": (
        "digits",
        "ort/files.json",
        lambda _: b"{",
        "ort/files.json is damaged: copy the folder again.",
    ),
    "damaged card": (
        "digits",
        "card.json",
        lambda content: content[:-9],
        "card.json is damaged: copy the folder again.",
    ),
    "newer card": (
        "digits",
        "card.json",
        lambda content: content.replace(b'"format": 1', b'"format": 2'),
        "card.json has format 2, but the page supports 1.",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_is_refused_in_one_sentence(
    watched, server, root, digits_page, text_pages, damage
):
    """No model runs, and the runtime is not even imported."""
    name, file, change, sentence = DAMAGES[damage]
    folder = root / damage.replace(" ", "-")
    shutil.copytree(root / name, folder)
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    server.requested.clear()
    assert not open_page(watched, f"{server.url}/{folder.name}/")
    assert text_of(watched, "trouble") == sentence
    assert [
        path
        for path in server.requested
        if "/ort/" in path and not path.endswith(("files.json", file))
    ] == []
    script = "window.page.predict([0]).catch((error) => arguments[0](error.message))"
    assert watched.execute_async_script(script) == sentence


def test_page_warns_if_the_browser_cannot_verify_checksums(browser, server, digits_page):
    """A host name other than localhost is not a secure context without https."""
    assert open_page(browser, f"http://{OTHER_HOST}:{server.server_port}/digits/")
    assert "not checked, because browsers can only do so on https and localhost" in text_of(
        browser, "facts"
    )
    draw(browser, DIGITS[1])
    assert text_of(browser, "winner") == "1"
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("name", ["digits", "lstm"])
def test_page_fits_the_narrowest_phone(watched, server, digits_page, text_pages, name):
    watched.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 320, "height": 640, "deviceScaleFactor": 2, "mobile": True},
    )
    assert open_page(watched, f"{server.url}/{name}/")
    assert watched.execute_script("return document.documentElement.scrollWidth") == 320
    watched.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.fixture
def phone(watched):
    size = {"width": 360, "height": 640, "deviceScaleFactor": 3, "mobile": True}
    watched.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    watched.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    yield watched
    watched.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    watched.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def is_on_screen(browser, part: str) -> bool:
    script = (
        "const { top, bottom } = document.getElementById(arguments[0]).getBoundingClientRect();"
    )
    return browser.execute_script(f"{script} return 0 <= top && bottom < innerHeight + 1", part)


def test_phone_shows_board_and_prediction_together(phone, server, digits_page):
    assert open_page(phone, f"{server.url}/digits/")
    draw(phone, DIGITS[1], "touch")
    assert is_on_screen(phone, "board")
    assert is_on_screen(phone, "winner")


def test_phone_shows_an_error(phone, server, text_pages):
    assert open_page(phone, f"{server.url}/lstm/")
    phone.execute_script("document.getElementById('text').value = 'The Ω'")
    phone.find_element("id", "go").click()
    assert "Ω" in text_of(phone, "trouble")
    assert is_on_screen(phone, "trouble")


def test_page_replaces_only_a_page(digits_page, root, tmp_path):
    """Neither a home page, nor a page with an additional file."""
    bundle = ctde.open_bundle(root / "digits-bundle")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "index.html").write_text("my home page")
    shutil.copytree(digits_page.folder, tmp_path / "page")
    write_page(bundle, tmp_path / "page")
    (tmp_path / "page" / "notes.txt").touch()
    for name in ("home", "page"):
        with pytest.raises(
            InputError, match="web must be a new folder, an empty one, or an existing page, got"
        ):
            write_page(bundle, tmp_path / name)
    assert (tmp_path / "home" / "index.html").read_text() == "my home page"


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
def test_failed_download_by_npm_is_reported_with_its_reason(
    digits_page, root, tmp_path, monkeypatch
):
    bundle = ctde.open_bundle(root / "digits-bundle")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    with pytest.raises(InputError, match=r"npm could not fetch it: .*127\.0\.0\.1:9"):
        write_page(bundle, tmp_path / "page")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot cache onnxruntime-web@.*: Not a directory"):
        write_page(bundle, tmp_path / "page")


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_exported_model_computes_the_same_in_node(digits_page, tmp_path):
    """Node runs the same WebAssembly of the runtime without a browser."""
    assert NODE is not None
    (tmp_path / "run.mjs").write_text(
        """
        import { readFileSync } from "node:fs";
        import { pathToFileURL } from "node:url";
        const [folder] = process.argv.slice(2);
        const ort = await import(pathToFileURL(`${folder}/ort/ort.wasm.min.js`));
        const wasmPaths = { mjs: pathToFileURL(`${folder}/ort/ort-wasm-simd-threaded.js`).href };
        const wasmBinary = readFileSync(`${folder}/ort/ort-wasm-simd-threaded.wasm`);
        Object.assign(ort.env.wasm, { wasmBinary, wasmPaths, numThreads: 1 });
        const session = await ort.InferenceSession.create(readFileSync(`${folder}/model.onnx`));
        const { shape, values } = JSON.parse(readFileSync(0));
        const inputs = new ort.Tensor("uint8", Uint8Array.from(values), shape);
        console.log(JSON.stringify([...(await session.run({ inputs })).outputs.data]));
        """
    )
    shutil.copytree(digits_page.folder, tmp_path / "page")
    # A browser gets the module type from the page.
    (tmp_path / "page" / "package.json").write_text('{"type": "module"}')
    pictures = digits_page.data.test.inputs[:10]
    done = subprocess.run(
        [NODE, tmp_path / "run.mjs", tmp_path / "page"],
        input=json.dumps({"shape": pictures.shape, "values": pictures.flatten().tolist()}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    outputs = np.array(json.loads(done.stdout)).reshape(10, 10)
    np.testing.assert_allclose(
        softmax(outputs), softmax(digits_page.trained.predict(pictures)), atol=1e-5
    )
