"""The playground page: in a real browser, against unwelcome requests, and as a Space.

Everything runs on loopback. The browser resolves no names, and the page has to look right all the same.
"""

import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from conftest import photo
from hub_server import LoopbackHub, Repository
from huggingface_hub import SpaceCard
from PIL import Image

from hf_vqgan.app import playground

pytest.importorskip("gradio", reason="the page needs gradio: pip install -e '.[app]'")

APP = Path(__file__).parent.parent / "scripts" / "app.py"
CHROMIUM, CHROMEDRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1280,1600"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
# Runs a script that may talk to this machine only: anything else ends it.
GUARDED = """
import os, runpy, sys

def guard(event, arguments):
    address = arguments[1] if event == "socket.connect" else None
    if isinstance(address, tuple) and not address[0].startswith(("127.", "::1")):
        print("CONNECTION TO", address, file=sys.stderr, flush=True)
        os._exit(1)

sys.addaudithook(guard)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(trained_model, tiny_pipeline, tmp_path_factory):
    """A model, a pipeline, and two pictures to upload, one of them transparent."""
    folder = tmp_path_factory.mktemp("app")
    trained_model.save_pretrained(folder / "model")
    tiny_pipeline.save_pretrained(folder / "pipeline")
    photo(0, (32, 24)).save(folder / "one.png")
    two = photo(1, (40, 24)).convert("RGBA")
    two.putalpha(128)
    two.save(folder / "two.png")
    return folder


class Server:
    """A script that serves the page in a process of its own, at `address`."""

    def __init__(self, script: Path, *arguments: object, folder: Path, environment: dict | None = None):
        self.log = folder / "log.txt"
        command = [sys.executable, "-c", GUARDED, str(script), *map(str, arguments)]
        variables = {"GRADIO_TEMP_DIR": str(folder / "gradio"), "PYTHONUNBUFFERED": "1"}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "GRADIO_"))}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=inherited | variables | (environment or {}), stdout=log, stderr=log
            )
        end = time.monotonic() + 240
        while not (line := re.search(r"http://127\.0\.0\.1:\d+", self.log.read_text())):
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)
        self.address = line.group()

    def close(self) -> None:
        running = self.process.poll() is None
        self.process.kill()
        self.process.wait()
        assert running, self.log.read_text()


class Browser:
    """Chromium, and what a visitor does in it."""

    def __init__(self, profile: Path):
        self.selenium = pytest.importorskip("selenium.webdriver", reason="the browser test needs selenium")
        options = self.selenium.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.driver = self.selenium.Chrome(options=options, service=self.selenium.ChromeService(CHROMEDRIVER))

    def find(self, selector: str):
        """The first element, once it is there."""
        return self.wait(lambda: self.driver.find_elements("css selector", selector), selector)[0]

    def wait(self, condition, what: str, seconds: float = 120):
        end = time.monotonic() + seconds
        while not (result := condition()):
            assert time.monotonic() < end, f"waited in vain for {what}; the page says: {self.find('body').text}"
            time.sleep(0.05)
        return result

    def open_tab(self, name: str) -> None:
        tabs = self.driver.find_elements("css selector", "button[role=tab]")
        next(tab for tab in tabs if tab.text == name).click()

    def type(self, component: str, text: str) -> None:
        """Replace the text in a box."""
        box = self.find(f"#{component} input")
        box.click()
        box.send_keys(self.selenium.Keys.CONTROL, "a")
        box.send_keys(text)

    def upload(self, component: str, file: Path) -> None:
        self.find(f"#{component} input[type=file]").send_keys(str(file))

    def address(self, component: str) -> str | None:
        shown = self.driver.find_elements("css selector", f"#{component} img")
        return shown[0].get_attribute("src") if shown else None

    def picture(self, component: str, unlike: str | None = None) -> np.ndarray:
        """The pixels shown, as soon as there are any, and others than those at the address `unlike`."""
        self.wait(lambda: self.address(component) not in (None, unlike), f"a picture in #{component}")
        return np.asarray(Image.open(io.BytesIO(httpx.get(self.address(component)).content)).convert("RGB"))

    def click(self, component: str, x: float, y: float) -> None:
        """Click on a picture at a share of its width and height."""
        image = self.find(f"#{component} img")
        self.wait(lambda: image.get_attribute("naturalWidth") != "0", f"the picture in #{component} to load")
        scale = min(
            image.size[side] / int(image.get_attribute(f"natural{side.title()}")) for side in ("width", "height")
        )
        scale = min(scale, 1)  # what is smaller than its frame is shown as it is
        width, height = (int(image.get_attribute(name)) * scale for name in ("naturalWidth", "naturalHeight"))
        actions = self.selenium.ActionChains(self.driver)
        actions.move_to_element_with_offset(
            image, round((x - 0.5) * width), round((y - 0.5) * height)
        ).click().perform()

    def hosts(self) -> set[str]:
        """Hosts that pages asked for anything."""
        messages = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        requests = (message["params"]["request"]["url"] for message in messages if "request" in message["params"])
        return {re.sub(r"https?://([^/:]*).*", r"\1", url) for url in requests if url.startswith("http")}


@pytest.fixture(scope="module")
def browser(folder, tmp_path_factory):
    """On the page as a user serves it at home."""
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip("no chromium and chromedriver: apt-get install chromium chromium-driver")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    server = Server(APP, folder / "model", "--pipeline", folder / "pipeline", folder=tmp_path_factory.mktemp("server"))
    browser.driver.get(server.address)
    browser.find("#about strong")  # the page has spoken with the server
    yield browser
    browser.driver.quit()
    server.close()


def assert_shows(picture: np.ndarray, pixels: torch.Tensor) -> None:
    """The picture is `pixels`, enlarged a whole number of times."""
    expected = np.asarray(playground.to_image(pixels, len(picture) // pixels.shape[2]))
    assert abs(picture.astype(int) - expected).max() <= 1  # the server may have rounded otherwise


def test_codes_in_a_browser(browser, trained_model, folder, tmp_path):
    """Upload, see the reconstruction and the code map, pick up a code, paint with it, take a screenshot, undo."""
    pixels = playground.fit_image(trained_model, Image.open(folder / "one.png"), 256)
    canvas = playground.open_canvas(trained_model, pixels)
    browser.upload("original", folder / "one.png")
    assert_shows(browser.picture("reconstruction"), canvas.sample)
    assert_shows(browser.picture("code-map"), playground.code_map(canvas))
    assert "16 x 12 positions" in browser.find("#facts").text

    codes = playground.code_patches(canvas, 96)[0].tolist()
    code = browser.find("#code input")
    browser.wait(lambda: code.get_attribute("value") == str(codes[0]), "the commonest code")
    rows = -(-len(codes) // playground.PALETTE_COLUMNS)
    browser.picture("palette")
    browser.click("palette", 2.5 / playground.PALETTE_COLUMNS, 0.5 / rows)
    browser.wait(lambda: code.get_attribute("value") == str(codes[2]), "the third code")

    edited = playground.paint(canvas, row=9, column=3, code=codes[2])
    assert not torch.equal(edited.indices, canvas.indices)
    before = browser.address("reconstruction")
    browser.click("code-map", 3.5 / 16, 9.5 / 12)
    assert_shows(browser.picture("reconstruction", unlike=before), edited.sample)
    browser.wait(lambda: "Edited: 1," in browser.find("#facts").text, "the number of edits")
    assert_shows(browser.picture("code-map"), playground.code_map(edited))

    browser.driver.save_screenshot(str(tmp_path / "page.png"))
    assert len(Image.open(tmp_path / "page.png").convert("RGB").getcolors(2**24)) > 100  # not a blank page

    before = browser.address("reconstruction")
    browser.find("#undo").click()
    assert_shows(browser.picture("reconstruction", unlike=before), canvas.sample)


def test_walk_in_a_browser(browser, trained_model, folder):
    """Upload two pictures, see the middle of the way, move the slider."""
    browser.open_tab("Walk")
    names = {"from": "one.png", "to": "two.png"}
    for component, name in names.items():
        browser.upload(component, folder / name)
    images = (Image.open(folder / name) for name in names.values())
    journey = playground.open_journey(trained_model, playground.fit_pair(trained_model, *images, 256))
    ways = ("pixels", "codes", "nearest")
    for way, pixels in zip(ways, playground.walk(journey, 0.5), strict=True):
        assert_shows(browser.picture(way), pixels)
    before = {way: browser.address(way) for way in ways}
    slide = "arguments[0].value = 0.9; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
    browser.driver.execute_script(slide, browser.find("#position input[type=range]"))
    for way, pixels in zip(ways, playground.walk(journey, 0.9), strict=True):
        assert_shows(browser.picture(way, unlike=before[way]), pixels)


def test_sampling_in_a_browser(browser, tiny_pipeline):
    browser.open_tab("Sample")
    browser.type("steps", "2\t")
    browser.type("count", "2\t")
    browser.type("class", "dog\n")
    browser.wait(lambda: browser.find("#class input").get_attribute("value") == "1 dog", "the class")
    browser.find("#draw").click()
    expected = playground.sample_images(tiny_pipeline, 2, 1, num_inference_steps=2, guidance_scale=2.0)[0]
    picture = browser.picture("samples")
    smaller = Image.fromarray(picture).resize(expected.size, Image.Resampling.NEAREST)
    assert abs(np.asarray(smaller).astype(int) - np.asarray(expected)).max() <= 1
    assert browser.hosts() == {"127.0.0.1"}  # in all the visits of this file so far


def test_bad_names_are_explained_in_a_browser(browser, tmp_path):
    browser.type("model", f"{tmp_path}/nowhere\n")
    browser.wait(lambda: "nowhere" in browser.find(".toast-body").text, "a message")


def run_app(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["app.py", *map(str, arguments)])
    runpy.run_path(str(APP), run_name="__main__")


class Space(Server):
    """The page as a Space serves it to strangers."""

    def visit(self, component: str, event: str, *data: object) -> bool:
        """Whether the server does what an event, which may be forged, asks for."""
        config = httpx.get(f"{self.address}/config").json()
        number = {part["props"].get("elem_id"): part["id"] for part in config["components"]}[component]
        function = next(it["id"] for it in config["dependencies"] if [number, event] in it["targets"])
        message = {"data": data, "fn_index": function, "session_hash": "stranger"}
        httpx.post(f"{self.address}/gradio_api/queue/join", json=message).raise_for_status()
        answer = httpx.get(f"{self.address}/gradio_api/queue/data?session_hash=stranger", timeout=120).text
        return json.loads(re.search(r'data: (.*"process_completed".*)', answer).group(1))["success"]

    def upload(self, file: Path) -> str:
        """The name under which the server keeps an uploaded file."""
        files = {"files": (file.name, file.read_bytes(), "image/png")}
        return httpx.post(f"{self.address}/gradio_api/upload", files=files).json()[0]


@pytest.fixture(scope="module")
def space(folder, tmp_path_factory):
    hub, patch, written = LoopbackHub(), pytest.MonkeyPatch(), tmp_path_factory.mktemp("spaces") / "space"
    for name in ("model", "pipeline"):
        files = {str(file.relative_to(folder / name)): file for file in (folder / name).rglob("*") if file.is_file()}
        hub.repositories["model", f"user/{name}"] = repository = Repository(private=False)
        repository.commit({name: file.read_bytes() for name, file in files.items()})
    run_app(patch, "user/model", "--pipeline", "user/pipeline", "--space", written)
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(written.parent / "home"), "HF_HUB_DISABLE_XET": "1"}
    server = Space(written / "app.py", folder=written, environment=environment)
    yield server
    server.close()
    patch.undo()
    hub.close()


def picture_at(path: str) -> dict:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def test_space_serves_its_models_from_the_hub(space, folder):
    uploaded = picture_at(space.upload(folder / "one.png"))
    assert space.visit("original", "change", "user/model", uploaded, 256)
    assert space.visit("draw", "click", "user/pipeline", -1, 2.0, 0, 1, 1)
    settings = SpaceCard.load(space.log.parent / "README.md").data
    assert (settings.sdk, settings.app_file, settings.models) == ("gradio", "app.py", ["user/model", "user/pipeline"])
    requirements = (space.log.parent / "requirements.txt").read_text()
    assert "torch>=" in requirements and "pytest" not in requirements


def test_strangers_cannot_name_models(space, folder):
    uploaded = picture_at(space.upload(folder / "one.png"))
    assert not space.visit("original", "change", str(folder / "model"), uploaded, 256)
    assert not space.visit("model", "change", "user/other")
    assert not space.visit("draw", "click", str(folder / "pipeline"), -1, 2.0, 0, 1, 1)


def test_strangers_read_nothing_but_uploads(space, folder):
    uploaded = space.upload(folder / "one.png")
    assert httpx.get(f"{space.address}/gradio_api/file={uploaded}").status_code == 200
    for path in (folder / "one.png", space.log, f"{uploaded}/../../../../app.py", "app.py", "/etc/hostname"):
        answer = httpx.get(f"{space.address}/gradio_api/file={path}")
        assert answer.status_code in (403, 404), path
        assert not space.visit("original", "change", "user/model", picture_at(str(path)), 256), path
    inside = f"{space.address}/gradio_api/file={uploaded}"  # an address only the server may reach
    assert not space.visit("original", "change", "user/model", picture_at(inside), 256)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--space", "{}/new"], "name at least one model"),
        (["{}", "--space", "{}/new"], "a Space needs the name of a model on the Hub"),
        (["user/model", "--space", "{}"], "is not empty"),
        (["--server_name", "0.0.0.0"], "name at least one model"),
    ],
)
def test_bad_arguments(monkeypatch, tmp_path, arguments, message):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=message):
        run_app(monkeypatch, *(argument.format(tmp_path) for argument in arguments))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_missing_gradio_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "hf_vqgan.app.page", raising=False)
    with pytest.raises(SystemExit, match=r'gradio is not installed: pip install "hf_vqgan\[app\]"'):
        run_app(monkeypatch, "user/model")
