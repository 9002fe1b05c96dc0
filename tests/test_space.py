"""The page of a published model, in a real browser: click, wait, look. Screenshots go to build/screenshots."""

import ast
import importlib.util
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import RepoCard
from models import make_autoencoder, make_prior_pipeline, save_run
from PIL import Image
from test_conditions import COLUMNS
from test_conditions import make_pipeline as make_conditional_pipeline

from dae_diffusers.hub.settings import PushConfig
from dae_diffusers.hub.upload import space_files
from dae_diffusers.plots import image_grid
from dae_diffusers.training import push

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "dae_diffusers" / "hub" / "space" / "app.py"
SCREENSHOTS = ROOT / "build" / "screenshots"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
NAMES = {0: "cat", 1: "dog", 2: "a, rather long, name"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    run = save_run(tmp_path_factory.mktemp("run"), NAMES)
    (run / "evaluation").mkdir()
    Image.effect_noise((300, 200), 90).save(run / "evaluation" / "sweep.png")
    folder = run / "exported"
    push.main(PushConfig(folder=str(run), repo_id="user/tiny", export_dir=str(folder), space=True))
    return folder


@contextmanager
def serving(model: Path):
    """The app of a model, served on 127.0.0.1 by a process of its own: its address."""
    pytest.importorskip("gradio", reason='the Space needs gradio: pip install -e ".[browser]"')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "MODEL": str(model),
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    log = model.parent / "app.log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, APP], env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.5)
        yield url
        assert "Traceback" not in log.read_text()
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def page_url(exported):
    with serving(exported) as url:
        yield url


@pytest.fixture(params=SIZES)
def page(request, page_url):
    """A fresh tab; at the end, nothing on it has gone wrong and nothing is wider than the screen."""
    playwright = pytest.importorskip("playwright.sync_api", reason='needs playwright: pip install -e ".[browser]"')
    if CHROMIUM is None:
        pytest.skip("needs an installed Chromium or Chrome")
    width, height = SIZES[request.param]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height})
        errors, outside = [], []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda call: outside.append(call.url) if re.match(r"https?://(?!127)", call.url) else None)
        page.goto(page_url)
        page.wait_for_selector("#samples img")
        yield page
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"{request.node.originalname}-{request.param}.png", full_page=True)
        scroll_width = page.evaluate("document.documentElement.scrollWidth")
        browser.close()
    assert errors == [] and outside == []
    assert scroll_width <= width


def picture(page, selector: str, other_than: str | None = None) -> Image.Image:
    """Waits for a picture, another one than before, and fetches it."""
    page.wait_for_function(
        "([selector, old]) => { const i = document.querySelector(selector + ' img'); return i && i.src && i.src !== old }",
        arg=[selector, other_than],
    )
    answer = page.request.get(page.get_attribute(f"{selector} img", "src"))
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"space-{os.getpid()}.png"
    path.write_bytes(answer.body())
    with Image.open(path) as image:
        image.load()
    path.unlink()
    return image


def draw(page) -> list[dict]:
    """Presses Draw, waits for other pictures, and returns each one's name, address, and box on the page."""
    before = page.get_attribute("#samples img", "src")
    page.click("#draw")
    page.wait_for_function("old => document.querySelector('#samples img')?.src !== old", arg=before)
    page.wait_for_function("[...document.querySelectorAll('#samples img')].every(image => image.naturalWidth > 0)")
    return page.evaluate(
        """[...document.querySelectorAll('#samples .gallery-item')].map(item => ({
            name: item.innerText, src: item.querySelector('img').src, box: item.querySelector('img').getBoundingClientRect()
        }))"""
    )


def fetch(page, address: str) -> Image.Image:
    with Image.open(io.BytesIO(page.request.get(address).body())) as image:
        image.load()
    return image


def overlap(one: dict, other: dict) -> bool:
    """Whether two boxes share more than a line of pixels."""
    return all(
        min(one[start] + one[size], other[start] + other[size]) - max(one[start], other[start]) > 1
        for start, size in (("x", "width"), ("y", "height"))
    )


def boxes(page, selector: str) -> list[dict]:
    return [box for box in (each.bounding_box() for each in page.locator(selector).all()) if box is not None]


@pytest.mark.slow
def test_pictures_are_drawn_by_class_and_seed(page):
    every = draw(page)
    assert [each["name"] for each in every] == [name for name in NAMES.values() for _ in range(6)]
    assert len(fetch(page, every[0]["src"]).getcolors(2**20)) > 100
    rows = [[each["box"]["y"] for each in every if each["name"] == name] for name in NAMES.values()]
    assert all(len(set(row)) == 1 for row in rows) and rows == sorted(rows)  # a class has a row of its own
    assert all(abs(each["box"]["width"] - each["box"]["height"]) < 1 for each in every)
    seed = page.get_by_role("spinbutton", name="Seed").input_value()
    again = draw(page)
    assert {each["src"] for each in every}.isdisjoint(each["src"] for each in again)
    assert page.get_by_role("spinbutton", name="Seed").input_value() != seed
    page.get_by_label("A new seed each time").uncheck()
    page.get_by_role("spinbutton", name="Seed").fill(seed)
    page.keyboard.press("Tab")
    assert [fetch(page, each["src"]).tobytes() for each in draw(page)[:2]] == [
        fetch(page, each["src"]).tobytes() for each in every[:2]
    ]
    page.get_by_label("Class", exact=True).click()
    page.get_by_role("option", name="dog").click()
    page.get_by_role("spinbutton", name="Pictures per class").fill("1")
    page.get_by_role("spinbutton", name="Seed").fill("4")
    page.keyboard.press("Tab")
    (one,) = draw(page)
    picture = fetch(page, one["src"])
    assert one["name"] == "dog" and picture.width == picture.height
    page.get_by_role("spinbutton", name="Seed").fill("5")
    page.keyboard.press("Tab")
    (other,) = draw(page)
    assert fetch(page, other["src"]).tobytes() != picture.tobytes()


@pytest.mark.slow
def test_nothing_covers_a_picture_and_one_can_be_downloaded(page):
    pictures = [each["box"] for each in draw(page)]
    covering = boxes(page, "#samples .icon-button") + boxes(page, "#samples .caption-label")
    assert not any(overlap(picture, each) for picture in pictures for each in covering)
    result, button = page.locator("#samples").bounding_box(), page.locator("#draw").bounding_box()
    if page.viewport_size["width"] < 640:
        assert result["y"] + result["height"] <= button["y"]  # above the controls
    else:
        assert result["x"] > button["x"] + button["width"]
    page.get_by_label("Thumbnail 2 of 18").click()
    shown = page.get_by_test_id("detailed-image")
    shown.wait_for()
    covering = boxes(page, "#samples .icon-button") + boxes(page, "#samples .caption, #samples .thumbnails")
    assert len(covering) >= 5 and not any(overlap(shown.bounding_box(), each) for each in covering)
    with page.expect_download() as download:
        page.get_by_label("Download", exact=True).click()
    with Image.open(download.value.path()) as image:
        assert image.format == "PNG" and image.size == (256, 256)


@pytest.mark.slow
def test_draw_can_be_stopped(page):
    before = page.get_attribute("#samples img", "src")
    page.get_by_role("spinbutton", name="Pictures per class").fill("16")
    page.get_by_role("spinbutton", name="Steps").fill("100")
    page.keyboard.press("Tab")
    page.click("#draw")
    page.get_by_text("/100 steps").wait_for()
    page.click("#stop")
    page.get_by_text("Stopped.").wait_for()
    assert page.get_attribute("#samples img", "src") == before
    page.get_by_role("spinbutton", name="Steps").fill("1")
    page.keyboard.press("Tab")
    assert len(draw(page)) == 48


@pytest.mark.slow
def test_page_says_what_the_model_is_and_how_good(page):
    words = page.inner_text("#title")
    assert "A Diffusion Transformer (flow matching)" in words and "cat, dog, a, rather long, name" in words
    assert "Class agreement 0.5" in words and "Try it in its Space" not in words
    page.get_by_role("tab", name="Numbers").click()
    captions = page.locator(".caption").all_inner_texts()
    assert any(text.startswith("Distance to the training images over") for text in captions)
    assert any(text.startswith("Samples, by class: cat") for text in captions)


@pytest.mark.slow
def test_example_shows_its_latent_space(page):
    page.get_by_role("tab", name="Latent space").click()
    page.locator("#examples tbody tr").first.click()
    assert picture(page, "#between").width > 5 * picture(page, "#between").height
    assert "PSNR" in page.inner_text("#psnr")
    result, button = page.locator("#pair").bounding_box(), page.locator("#reconstruct").bounding_box()
    assert (result["y"] < button["y"]) == (page.viewport_size["width"] < 640)
    buttons, pictures = (boxes(page, f":is(#pair, #channels, #between) {part}") for part in (".icon-button", "img"))
    assert len(buttons) == 6 and not any(overlap(one, other) for one in buttons for other in pictures)


@pytest.mark.slow
def test_latent_space_of_an_uploaded_picture(page, tmp_path):
    for name, mode in (("first", "RGB"), ("second", "LA")):
        Image.effect_noise((50, 30), 90).convert(mode).save(tmp_path / f"{name}.png")
    page.get_by_role("tab", name="Latent space").click()
    for name in ("first", "second"):
        page.locator(f"#{name} input[type=file]").set_input_files(tmp_path / f"{name}.png")
        page.wait_for_selector(f"#{name} img")
    page.click("#reconstruct")
    assert picture(page, "#between").width > 5 * picture(page, "#between").height
    pair = picture(page, "#pair")
    assert pair.width > 1.9 * pair.height
    assert picture(page, "#channels").width > 2.9 * picture(page, "#channels").height  # three channels
    assert re.search(r"PSNR -?\d+\.\d dB", page.inner_text("#psnr")) and "3x8x8" in page.inner_text("#psnr")


@pytest.mark.slow
def test_bad_uploads_are_answered_with_a_sentence(page, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    page.get_by_role("tab", name="Latent space").click()
    page.click("#reconstruct")
    page.get_by_text("Choose a picture first.").wait_for()
    page.locator("#first input[type=file]").set_input_files(tmp_path / "bad.png")
    page.wait_for_timeout(1000)  # the upload itself shows nothing that could be waited for
    page.click("#reconstruct")
    page.get_by_text("This file cannot be read as a picture.").wait_for()


@pytest.mark.slow
def test_conditions_have_inputs_that_change_what_is_drawn(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason='needs playwright: pip install -e ".[browser]"')
    columns = {**COLUMNS, "mask": {"channels": 1, "value_range": None}}
    make_conditional_pipeline(columns).save_pretrained(tmp_path / "model")
    Image.linear_gradient("L").save(tmp_path / "mask.png")
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with serving(tmp_path / "model") as url, playwright.sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]).new_page()
        page.goto(url)
        page.get_by_label("A new seed each time").uncheck()
        page.get_by_label("color", exact=True).wait_for()
        drawn = []

        def draw_again():
            before = page.get_attribute("#samples img", "src") if drawn else None
            page.click("#draw")
            drawn.append(picture(page, "#samples", before).tobytes())

        draw_again()  # with the first classes, the mean of each number, and no image
        page.get_by_label("color", exact=True).click()
        page.get_by_role("option", name="red").click()
        draw_again()
        page.locator("input[type=number][aria-label*=angle]").fill("50")
        draw_again()
        page.locator("#condition-mask input[type=file]").set_input_files(tmp_path / "mask.png")
        page.wait_for_selector("#condition-mask img")
        draw_again()
        assert len(set(drawn)) == 4
        page.reload()
        page.locator("#condition-mask input[type=file]").set_input_files(tmp_path / "bad.png")
        page.wait_for_timeout(1000)
        page.click("#draw")
        page.get_by_text("This file cannot be read as a picture.").wait_for()


@pytest.mark.slow
def test_numbers_are_those_of_the_card(page):
    page.get_by_role("tab", name="Numbers").click()
    page.wait_for_selector("#numbers td")
    cells = page.locator("#numbers td").all_inner_texts()
    assert cells[:3] == ["Class agreement", "0.5", "images 10"]
    page.get_by_text("The whole card").click()
    page.get_by_text("The author has stated no license.").wait_for()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["pipeline", "vae", "vqgan"])
def test_app_serves_models_without_classes_and_autoencoders_alone(part, tmp_path):
    pytest.importorskip("gradio", reason='the Space needs gradio: pip install -e ".[browser]"')
    run = save_run(tmp_path / "run", None)
    shutil.copytree(run / "pipeline" / "vae", run / "vae")
    make_prior_pipeline(num_classes=0, id2label=None).save_pretrained(run / "vqgan")
    folder = tmp_path / "exported"
    push.main(PushConfig(folder=str(run / part), repo_id="user/tiny", export_dir=str(folder), space=True))
    if part != "vae":
        (folder / "images").mkdir()
        names = {"row_names": ["the first row", "second"], "column_names": ["a", "b", "c"]}
        side = 8 if part == "vqgan" else 16  # the prior's grid is smaller than what its autoencoder was made for
        image_grid(torch.rand(6, 3, side, side) * 2 - 1, columns=3, **names).save(folder / "images" / "samples.png")
    absent = ["dae_diffusers", *([] if part == "vqgan" else ["transformers"])]  # which only a VQGAN needs
    code = f"import sys; sys.modules.update(dict.fromkeys({absent}))"
    code += """
sys.path.insert(0, "space")
import app
from PIL import Image

app.build()
noise = Image.effect_noise((40, 40), 50)
if app.PIPE is None:
    picture = noise
else:
    gallery, seed = app.draw(None, 5, 2.0, 2, 7, False, progress=lambda *args, **kwargs: None)
    assert len(gallery.value) == 5 and seed == 7
    picture = app.draw_one()
    for path in app.example_pictures():  # each is one picture of the grid, enlarged
        example = Image.open(path)
        small = example.resize((app.WIDTH, app.HEIGHT), Image.NEAREST)
        assert small.resize(example.size, Image.NEAREST).tobytes() == example.tobytes()
assert len(app.example_pictures()) == 2
pair, text, channels, between, _ = app.reconstruct(picture, noise.convert("P"))
print(app.PIPE is None, pair.size, "PSNR" in text)
"""
    environment = {**os.environ, "MODEL": str(folder), "GRADIO_ANALYTICS_ENABLED": "False"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip().endswith(f"{part == 'vae'} (516, 256) True")


@pytest.mark.slow
def test_draw_stops_when_its_visitor_has_gone(page_url):
    """Spoken as a browser speaks: join the queue, leave the page in the middle of a long draw, and another gets its turn."""
    gradio_client = pytest.importorskip("gradio_client", reason='needs gradio: pip install -e ".[browser]"')
    first, second = (gradio_client.Client(page_url, verbose=False) for _ in range(2))
    arguments = {
        "class_id": "every class",
        "count": 16,
        "guidance_scale": 2,
        "steps": 100,
        "seed": 0,
        "is_random": True,
    }
    start = time.monotonic()
    first.predict(**arguments, api_name="/draw")
    whole = time.monotonic() - start
    job = first.submit(**arguments, api_name="/draw")
    time.sleep(whole / 5)
    first.close()  # as a closed tab does
    start = time.monotonic()
    second.predict(**{**arguments, "count": 1, "steps": 1}, api_name="/draw")
    assert time.monotonic() - start < 0.6 * whole
    del job


def load_app(model: Path, monkeypatch) -> ModuleType:
    """The app's module, without a page."""
    monkeypatch.setenv("MODEL", str(model))
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(Request=object, Progress=object))
    specification = importlib.util.spec_from_file_location("app", APP)
    app = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(app)
    return app


@pytest.mark.parametrize("size", [(16, 24), (24, 16), (70, 40)])
def test_examples_are_whole_pictures_of_a_model_that_is_no_square(size, tmp_path, monkeypatch):
    make_autoencoder(sample_size=size).to_diffusers().save_pretrained(tmp_path / "vae")
    images = torch.rand(10, 3, *size) * 2 - 1
    names = {"row_names": ["image", "again"], "column_names": list("abcde")}
    (tmp_path / "images").mkdir()
    image_grid(images, columns=5, **names).save(tmp_path / "images" / "reconstructions.png")
    app = load_app(tmp_path, monkeypatch)
    whole = [image_grid(images[number : number + 1]).tobytes() for number in (4, 2, 0)]
    assert [Image.open(path).tobytes() for path in app.example_pictures()][:3] == whole


def test_sliders_hold_the_defaults_of_the_pipeline(tmp_path, monkeypatch):
    make_autoencoder().to_diffusers().save_pretrained(tmp_path / "vae")
    app = load_app(tmp_path, monkeypatch)
    for default, expected in {None: (1, 8, 2), 0: (0, 8, 0), 1.5: (1, 8, 1.5), 10: (1, 10, 10)}.items():
        app.PIPE = SimpleNamespace(config={"default_guidance_scale": default})
        assert app.slider_range("guidance_scale", 1, 8, 2) == expected


def test_space_installs_what_every_pipeline_imports():
    requirements = [line for line in space_files("user/tiny")["requirements.txt"].decode().split("\n") if ">=" in line]
    installed = {line.split(">=")[0] for line in requirements}
    for path in (ROOT / "pipelines").glob("dae_*.py"):
        nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        imported = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}
        imported -= {
            f"dae_diffusers.pipelines.{other.stem}" for other in (ROOT / "pipelines").glob("dae_dit*.py")
        }  # beside it
        packages = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
        assert packages and packages <= installed, path
    dependencies = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{line}"' in dependencies for line in requirements)


def test_space_names_its_model_and_a_version_of_gradio_that_is_tested():
    card = RepoCard(space_files("user/tiny")["README.md"].decode())
    assert card.data.models == ["user/tiny"] and card.data.title == "tiny" and card.data.sdk == "gradio"
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert card.data.sdk_version == pinned["gradio"]
    assert (APP.parent / card.data.app_file).exists()


def test_space_is_pushed_beside_its_model(tmp_path):
    run = save_run(tmp_path / "run", None)
    with HubServer() as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        command = [sys.executable, "-m", "dae_diffusers.training.push", run, "tiny", "--space", "--private"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "give the Space a secret HF_TOKEN" in result.stderr
        assert hub.files("writer/tiny", type="space").keys() == {"app.py", "requirements.txt", "README.md"}
        assert hub.repositories["space", "writer/tiny"].private and hub.repositories["model", "writer/tiny"].private
