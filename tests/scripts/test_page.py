"""export.py and docs/index.html: the same images by PyTorch, by ONNX Runtime and in a real browser."""

import base64
import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import sys
import tarfile
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, arguments, run_script
from filelock import FileLock
from PIL import Image
from playwright.sync_api import sync_playwright
from torch import nn

import export
import train
from src import generation
from src.samplers import SAMPLERS, time_grid
from src.utils import checkpoint, flags

DOCS = ROOT / "docs"
FAST = ROOT / "weights/fashion-mnist-fast.pth"
MODULE = (DOCS / "diffusion.js").read_text(encoding="utf-8")
CDN = re.search(r'RUNTIME = "(.*?)"', MODULE)[1]
pytestmark = pytest.mark.slow


def make_checkpoint(folder: Path, classes: list[str], *given: object) -> Path:
    """A checkpoint of random weights, small enough for seconds."""
    args = arguments(train, "--unet_dim", 8, "--unet_dim_mults", 1, 2, "--time_steps", 100, *given)
    settings = {**vars(args), "classes": classes, "class_counts": [1] * len(classes)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet, _ = generation.build(settings)
        nn.init.normal_(unet.conv_out.weight, std=0.1)  # else it would predict zeros
        if unet.label is not None:
            nn.init.normal_(unet.label.weight[: unet.no_class])  # else all classes would be alike
    path = folder / f"{settings['prediction']}.pth"
    checkpoint.save(path, {"settings": settings, "ema": unet.state_dict()})
    return path


MODELS = {  # file → classes and settings; the bundled model beside small ones of other kinds
    "fashion-mnist-fast.onnx": None,
    "colour.onnx": (["circle", "square"], "--channels", 3, "--image_size", 16, "--prediction", "noise"),
    "plain.onnx": ([], "--image_size", 16, "--schedule_type", "linear", "--prediction", "x0"),
    "v.onnx": (["circle", "square"], "--image_size", 16, "--prediction", "v"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: FAST if how is None else make_checkpoint(folder, *how) for name, how in MODELS.items()}


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder of this run of pytest, the same in all its processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "page"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def site(checkpoints, shared) -> Iterator[tuple[Path, str]]:
    """The folder of the page with all models, exported by export.py, and the address that serves it."""
    folder = shared / "site"
    with FileLock(shared / "site.lock"):  # the first process makes it for all
        if not folder.exists():
            (making := shared / "making").mkdir()
            (making / "blank.html").write_text("<!DOCTYPE html><title>Blank</title>")
            for name in "index.html", "diffusion.js":
                shutil.copy(DOCS / name, making)
            for name, path in checkpoints.items():
                done = run_script("export.py", "--checkpoint", path, "--output", making / name, cwd=shared)
                assert done.returncode == 0, done.stderr
                assert f"wrote {making / name}" in done.stdout
            content = (making / "v.onnx").read_bytes()
            (making / "damaged.onnx").write_bytes(content[: len(content) // 2])
            making.rename(folder)
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://localhost:{server.server_port}/index.html"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Without a line for each request; /isolated/... has the headers that give a page several threads."""

    def log_message(self, *_args: object) -> None:
        pass

    def translate_path(self, path: str) -> str:
        return super().translate_path(path.removeprefix("/isolated"))

    def end_headers(self) -> None:
        if self.path.startswith("/isolated"):
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()


@pytest.fixture(scope="module")
def runtime(shared) -> dict[str, bytes]:
    """ONNX Runtime Web from the npm registry, which the content delivery network serves, too: file → content."""
    version, package = re.search(r"onnxruntime-web@([\d.]+)", CDN)[1], shared / "onnxruntime-web.tgz"
    with FileLock(shared / "runtime.lock"):
        if not package.exists():
            about = json.load(
                urllib.request.urlopen(f"https://registry.npmjs.org/onnxruntime-web/{version}", timeout=60)
            )
            content = urllib.request.urlopen(about["dist"]["tarball"], timeout=600).read()
            hashed = base64.b64encode(hashlib.sha512(content).digest()).decode()
            assert about["dist"]["integrity"] == f"sha512-{hashed}"
            package.write_bytes(content)
    with tarfile.open(package) as archive:
        names = re.findall(r'"([\w.-]+\.(?:mjs|wasm))"', MODULE)
        assert len(names) == 4
        return {name: archive.extractfile(f"package/dist/{name}").read() for name in names}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # which root needs
        yield browser
        browser.close()


def open_page(browser: Any, runtime: dict[str, bytes], address: str, width: int = 1200) -> Any:
    """A tab in which the network's files come from `runtime`, and in which no error is overlooked."""
    page = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True).new_page()
    page.set_default_timeout(600_000)  # for slow machines that do other things, too
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))

    def serve(route: Any) -> None:
        name = route.request.url.removeprefix(CDN)
        kind = "application/wasm" if name.endswith(".wasm") else "text/javascript"
        if name in runtime:
            route.fulfill(body=runtime[name], headers={"Access-Control-Allow-Origin": "*", "Content-Type": kind})
        else:
            route.abort()

    page.context.route(f"{CDN}**", serve)
    page.goto(address)
    return page


def ready(page: Any) -> Any:
    """Wait for everything that the page shows at the start."""
    page.wait_for_function("document.getElementById('drawn').ariaLabel.startsWith('From the sketch')")
    page.wait_for_function("!document.querySelector('[aria-busy=true]')")
    assert (page.text_content("#error"), page.problems) == ("", [])
    return page


def pixels(page: Any, canvas: str) -> np.ndarray:
    """What a canvas shows, (H, W) int: the first of its channels."""
    code = f"""() => {{ const c = document.getElementById('{canvas}');
        return [c.height, c.width, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]; }}"""
    height, width, values = page.evaluate(code)
    return np.array(values).reshape(height, width, 4)[:, :, 0]


def changed(page: Any, canvas: str, act: Any) -> np.ndarray:
    """What a canvas shows after an action that changes it, once the page has done everything."""
    before = pixels(page, canvas)
    act()
    page.wait_for_function("!document.querySelector('main').inert && !document.querySelector('[aria-busy=true]')")
    now = pixels(page, canvas)
    assert now.shape != before.shape or not np.array_equal(now, before), f"#{canvas} did not change"
    return now


# ---- the mathematics -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blank(browser, site, runtime) -> Any:
    """A tab with nothing but the module, as `simple`."""
    page = open_page(browser, runtime, site[1].replace("index", "blank"))
    page.evaluate("async () => { window.simple = await import('./diffusion.js'); }")
    return page


def test_the_page_visits_the_timesteps_of_the_samplers(blank):
    cases = [
        (T, min(T, steps), strength, power)
        for T in (1, 7, 100, 1000)
        for steps in (1, 2, 3, 16, 50)
        for strength in (0.05, 0.5, 0.7, 1)
        for power in (1, 3)
    ]
    theirs = blank.evaluate("cases => cases.map((case_) => simple.timeGrid(...case_))", cases)
    for (T, *way), grid in zip(cases, theirs, strict=True):
        assert [tuple(pair) for pair in grid] == time_grid(generation.Diffusion(T, "cosine"), *way), (T, *way)


def test_its_noise_is_standard_normal_and_of_each_seed_its_own(blank):
    n, seeds = 4000, 50
    x = np.array(blank.evaluate(f"() => Array.from({{ length: {seeds} }}, (_, i) => [...simple.gaussian(i, {n})])"))
    assert abs(x.mean()) < 5 / np.sqrt(x.size)
    assert abs(x.var() - 1) < 5 * np.sqrt(2 / x.size)
    assert abs((x**4).mean() - 3) < 5 * np.sqrt(96 / x.size)  # the fourth moment has variance 105 - 9
    between, lagged = np.corrcoef(x) - np.eye(seeds), [(row[1:] * row[:-1]).mean() for row in x]
    assert np.abs(between).max() < 5 / np.sqrt(n)
    assert np.abs(lagged).max() < 5 / np.sqrt(n)


def test_its_interpolation_is_slerp(blank):
    a, b = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for weight in 0.0, 0.3, 1.0:
        theirs = blank.evaluate(
            "([a, b, w]) => [...simple.slerp(Float32Array.from(a), Float32Array.from(b), w)]",
            [a.flatten().tolist(), b.flatten().tolist(), weight],
        )
        ours = generation.slerp(a, b, torch.tensor([weight])).flatten()
        torch.testing.assert_close(torch.tensor(theirs), ours, rtol=0, atol=1e-5)


WAYS = [  # model, steps, guidance, strength
    ("fashion-mnist-fast.onnx", 1, 1.0, 1.0),
    ("fashion-mnist-fast.onnx", 2, 1.0, 1.0),
    ("fashion-mnist-fast.onnx", 4, 2.0, 0.5),
    ("colour.onnx", 7, 2.0, 1.0),
    ("colour.onnx", 10, 1.0, 0.7),
    ("plain.onnx", 10, 1.0, 1.0),
    ("v.onnx", 10, 0.5, 0.3),
    ("v.onnx", 10, 1.0, 0.001),  # no step at all: the image itself
]


@pytest.mark.parametrize(("name", "steps", "guidance", "strength"), WAYS)
def test_the_browser_computes_the_images_of_pytorch(blank, site, checkpoints, name, steps, guidance, strength):
    """For random weights, of the network in the file: by few steps, they make much of the rounding to float16."""
    state = checkpoint.load(checkpoints[name])
    unet, diffusion = generation.restore(state)
    shape, classes = (3, unet.channels, unet.image_size, unet.image_size), state["settings"]["classes"]
    draw = torch.Generator().manual_seed(steps)
    noise = torch.randn(steps, *shape, generator=draw)
    image = torch.rand(shape[1:], generator=draw) * 2 - 1
    labels = [i % len(classes) for i in (1, 2, 3)] if classes else [0] * 3

    sampler = flags.pick_sampler("dpmpp_2m_sde", (), state["settings"])
    how = (sampler, steps, 0.0, torch.float32, labels, (), guidance, image, strength)
    generator, stream = generation.Generator(unet, diffusion, *how), iter(noise)
    if checkpoints[name] != FAST:
        generator.unet = export.OnnxNetwork(onnx.load(site[0] / name), unet)
    y = torch.tensor(labels) if classes else None
    ours = generator._sample(next(stream), lambda: next(stream), y).int().numpy()

    request = {"labels": labels, "steps": steps, "guidance": guidance, "strength": strength}
    theirs = blank.evaluate(
        """async ([url, request, noise, image]) => {
            const model = simple.connect();
            await model.load({ url });
            request.noise = noise.map((x) => Float32Array.from(x));
            request.image = Float32Array.from([...image, ...image, ...image]);
            return [...(await model.sample(request))];
        }""",
        [name, request, noise.flatten(1).tolist(), image.flatten().tolist()],
    )
    theirs = generation.to_uint8(torch.tensor(theirs).view(shape)).int().numpy()
    assert np.abs(theirs - ours).max() <= 1
    assert ours.std() > 10  # they are images, not one grey


def test_the_module_is_short_enough_to_be_read():
    assert sum(bool(line.strip()) for line in MODULE.splitlines()) < 400


def test_samplers_of_the_page_go_by_our_names():
    names = set(re.findall(r"async \*(\w+)\(", MODULE))
    assert names <= set(SAMPLERS)
    assert {"consistency", "dpmpp_2m_sde"} <= names  # the defaults of both kinds of model


# ---- the page --------------------------------------------------------------------------------------------------


def test_every_control_does_something(browser, site, runtime, tmp_path):
    page = ready(open_page(browser, runtime, site[1]))
    assert page.text_content("#status") == "fashion-mnist-fast.onnx: ready, on the processor."
    assert re.fullmatch(r"Step 2 of 2, \d+\.\d s", page.text_content("#progress"))
    start = pixels(page, "grid")
    assert start.shape == (131, 131)  # 4 × 4 images with a line between them

    first = page.locator("#walked")
    assert first.evaluate("c => c.width") == 32
    assert np.array_equal(pixels(page, "walked"), start[:32, :32])  # the walk begins at image 0
    end = changed(page, "walked", lambda: page.fill("#weight", "1"))
    assert np.abs(end - start[:32, :32]).mean() > 5

    one = changed(page, "grid", lambda: page.select_option("#count", "1"))
    assert np.array_equal(one, start[:32, :32])  # an image does not depend on its neighbours
    bag = changed(page, "grid", lambda: page.select_option("#class", label="bag"))
    assert page.get_attribute("#grid", "aria-label") == "Generated: bag"
    more = changed(page, "grid", lambda: page.select_option("#steps", "4"))
    guided = changed(page, "grid", lambda: page.fill("#guidance", "3"))
    assert page.text_content("#scale") == "3"
    other = changed(page, "grid", lambda: (page.fill("#seed", "1"), page.press("#seed", "Enter")))
    assert len({picture.tobytes() for picture in (one, bag, more, guided, other)}) == 5
    again = changed(page, "grid", lambda: (page.fill("#seed", "-5"), page.press("#seed", "Enter")))
    assert np.array_equal(again, guided) and page.input_value("#seed") == "0"  # the nearest seed that there is
    changed(page, "grid", lambda: page.click("#again"))
    assert page.input_value("#seed") != "0"

    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(tmp_path / "saved.png")
    with Image.open(tmp_path / "saved.png") as saved:
        assert np.array_equal(np.asarray(saved.convert("L")).astype(int), pixels(page, "grid"))

    page.click("#clear")
    assert pixels(page, "sketch").max() == 0
    box = page.locator("#sketch").bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 60)
    drawn = changed(page, "drawn", page.mouse.up)
    line = (pixels(page, "sketch") > 0).sum()
    assert 60 <= line <= 70  # 20 pixels long, 3 thick, and its ends
    page.select_option("#brush", "0")
    page.focus("#sketch")
    for key in ("ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
    erased = changed(page, "drawn", lambda: page.keyboard.press("Space"))
    assert 0 < (pixels(page, "sketch") > 0).sum() < line  # the eraser at the end of the line
    seeded = changed(page, "drawn", lambda: page.click("#again"))
    boots = changed(page, "drawn", lambda: page.select_option("#kind", label="ankle-boot"))
    weak = changed(page, "drawn", lambda: page.fill("#strength", "0.05"))
    assert page.text_content("#amount") == "0.05"
    sketch = pixels(page, "sketch")
    assert np.abs(weak[:32, :32] - sketch).mean() < np.abs(boots[:32, :32] - sketch).mean() / 2
    shirt = changed(page, "drawn", lambda: page.click("#example"))
    assert len({picture.tobytes() for picture in (drawn, erased, seeded, boots, weak, shirt)}) == 6
    assert (page.text_content("#error"), page.problems) == ("", [])

    page.set_input_files("#file", site[0] / "colour.onnx")
    page.wait_for_function("document.getElementById('status').textContent.startsWith('colour.onnx: ready')")
    assert page.locator("#class option").all_text_contents() == ["each in turn", "circle", "square", "no class"]
    assert page.locator("#steps option").all_text_contents() == ["10", "20", "30", "50"]


def test_a_model_of_ones_own_without_classes(browser, site, runtime):
    page = ready(open_page(browser, runtime, f"{site[1]}?model=plain.onnx"))
    assert page.locator("#class option").all_text_contents() == ["no class"]
    assert page.is_disabled("#guidance")
    assert page.input_value("#steps") == "50"


def test_several_threads_where_the_page_is_isolated(browser, site, runtime):
    code = "async (url) => (await (await import('./diffusion.js')).connect().load({ url })).threads"
    for folder, several in ("", False), ("isolated/", True):
        page = open_page(browser, runtime, site[1].replace("index", f"{folder}blank"))
        assert page.evaluate("crossOriginIsolated") == several
        expected = min(4, page.evaluate("navigator.hardwareConcurrency")) if several else 1
        assert page.evaluate(code, "v.onnx") == expected


def test_controls_rest_until_there_is_a_model_and_a_file_that_fails_changes_nothing(browser, site, runtime):
    page = open_page(browser, runtime, f"{site[1]}?model=none.onnx")
    page.wait_for_function("document.getElementById('error').textContent")
    page.locator("#again").dispatch_event("click", timeout=1000)  # a click by hand is not delivered at all
    assert page.evaluate("document.getElementById('controls').inert")
    for name in "v.onnx", "damaged.onnx", "colour.onnx":
        page.set_input_files("#file", site[0] / name)
        if name == "damaged.onnx":
            page.wait_for_function("document.getElementById('error').textContent.startsWith('damaged')")
            assert page.text_content("#status").startswith("v.onnx: ready")
            changed(page, "grid", lambda: page.click("#again"))
        else:
            page.wait_for_function(f"document.getElementById('status').textContent.startsWith('{name}: ready')")
        assert not page.evaluate("document.getElementById('controls').inert")
    ready(page)


def test_new_settings_stop_the_images_that_are_on_their_way(browser, site, runtime):
    page = ready(open_page(browser, runtime, f"{site[1]}?model=v.onnx"))
    page.evaluate("""() => {
        const [steps, progress] = ["steps", "progress"].map((id) => document.getElementById(id));
        const choose = (n) => ((steps.value = n), steps.onchange());
        window.seen = [];
        new MutationObserver(() => {
            seen.push(progress.textContent.split(",")[0]);
            if (seen.length === 1) choose(10); // at the first step of the first images
        }).observe(progress, { childList: true });
        choose(50);
    }""")
    page.wait_for_function("document.getElementById('progress').textContent.startsWith('Step 10 of 10')")
    seen = page.evaluate("seen")
    assert seen[0] == "Step 1 of 50" and "Step 50 of 50" not in seen
    ready(page)


def test_an_error_stays_until_its_own_task_succeeds(browser, site, runtime):
    page = ready(open_page(browser, runtime, f"{site[1]}?model=v.onnx"))
    page.evaluate("document.getElementById('kind').append(new Option('none', 'x'))")  # a class that fails
    page.select_option("#kind", "x")
    page.wait_for_function("document.getElementById('error').textContent")
    changed(page, "walked", lambda: page.fill("#weight", "0.5"))
    assert page.text_content("#error")
    changed(page, "drawn", lambda: page.select_option("#kind", "1"))
    assert page.text_content("#error") == ""


def test_it_fits_a_phone(browser, site, runtime):
    page = ready(open_page(browser, runtime, site[1], width=360))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_each_control_has_a_name_and_can_be_reached_by_keyboard(browser, site, runtime):
    page = ready(open_page(browser, runtime, site[1]))
    page.get_by_role("button", name="Choose File").or_(page.get_by_label("ONNX file")).first.focus()
    for name in ("Class", "Images", "Steps", "Guidance", "Seed", "From seed to seed + 1", "Sketch", "Brush", "Noise"):
        page.get_by_label(name).first.focus()
    for name in ("New seed", "Save as PNG", "Clear", "Example"):
        page.get_by_role("button", name=name).focus()
    controls = page.locator("select, input, button, #sketch")
    for i in range(controls.count()):
        controls.nth(i).focus()
        assert controls.nth(i).evaluate("c => c === document.activeElement && (c.labels?.length || c.id)")


ERRORS = {
    "missing": ("?model=none.onnx", "none.onnx is not there (404). Make it with python export.py."),
    "damaged": ("?model=damaged.onnx", "damaged.onnx is no network that export.py wrote, or is damaged"),
    "text": ("?model=diffusion.js", "diffusion.js is no network that export.py wrote, or is damaged"),
    "elsewhere": ("?model=https://example.org/model.onnx", "https://example.org/model.onnx is on another server."),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_shown_in_words(browser, site, runtime, case):
    query, message = ERRORS[case]
    page = open_page(browser, runtime, site[1] + query)
    page.wait_for_function("document.getElementById('error').textContent")
    assert page.text_content("#error").startswith(message)
    assert page.text_content("#status") == ""
    assert page.problems == []


@pytest.mark.parametrize("content", [None, b"export const InferenceSession = {};"], ids=["unreachable", "tampered"])
def test_a_runtime_that_is_unreachable_or_not_the_pinned_one_is_not_run(browser, site, runtime, content):
    files = {} if content is None else {**runtime, next(name for name in runtime if "ort.wasm" in name): content}
    page = open_page(browser, files, site[1])
    page.wait_for_function("document.getElementById('error').textContent")
    assert page.text_content("#error").startswith("ONNX Runtime was not found at https://")


def test_a_browser_without_webassembly_is_told_so(browser, site, runtime):
    page = open_page(browser, runtime, site[1].replace("index", "blank"))
    script = {"body": f"delete self.WebAssembly;\n{MODULE}", "headers": {"Content-Type": "text/javascript"}}
    page.context.route("**/diffusion.js", lambda route: route.fulfill(**script))
    page.goto(site[1])
    page.wait_for_function("document.getElementById('error').textContent")
    assert page.text_content("#error") == "This browser has no WebAssembly, which the page needs."


# ---- export.py -------------------------------------------------------------------------------------------------


def test_the_bundled_file_is_that_of_the_bundled_weights(site):
    torch.manual_seed(0)
    inputs = {"x_t": torch.randn(2, 1, 32, 32).numpy(), "t": np.array([500]), "y": np.array([3, 10])}
    outputs, facts = [], []
    for folder in (DOCS, site[0]):
        session = onnxruntime.InferenceSession(folder / "fashion-mnist-fast.onnx", providers=["CPUExecutionProvider"])
        outputs.append(session.run(None, inputs)[0])
        facts.append(session.get_modelmeta().custom_metadata_map)
    assert np.abs(outputs[0] - outputs[1]).max() < 0.02  # of v, about 1; float16 has 11 bits
    schedules = [json.loads(fact.pop("alpha_bar")) for fact in facts]
    # Other processors round otherwise: an argument of the cosine by 2e-16, where the cosine falls to 1.6e-3.
    np.testing.assert_allclose(*schedules, rtol=1e-11)
    assert facts[0] == facts[1]


def test_the_file_says_how_to_sample_and_nothing_about_the_machine(site):
    model = onnx.load(site[0] / "colour.onnx")
    about = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert (about["classes"], about["channels"], about["prediction"]) == (["circle", "square"], 3, "noise")
    assert (about["sampler"], about["steps"], about["time_steps"]) == ("dpmpp_2m_sde", 50, 100)
    assert about["alpha_bar"] == generation.Diffusion(100, "cosine").alpha_bar.tolist()
    for place in (ROOT, sys.prefix, Path.home()):
        assert f"{place}/".encode() not in (site[0] / "colour.onnx").read_bytes()


def test_export_refuses_in_one_line(tmp_path, checkpoints):
    done = run_script("export.py", "--checkpoint", tmp_path / "none.pth", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    done = run_script("export.py", "--checkpoint", checkpoints["v.onnx"], "--output", "file/v.onnx", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    done = run_script("export.py", "--checkpoint", checkpoints["v.onnx"], "--output", tmp_path, cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    os.mkfifo(tmp_path / "pipe")  # a device would be replaced likewise
    done = run_script("export.py", "--checkpoint", checkpoints["v.onnx"], "--output", "pipe", cwd=tmp_path)
    assert (done.returncode, (tmp_path / "pipe").is_fifo()) == (2, True), done.stderr
    done = run_script("export.py", "--checkpont", "x", cwd=tmp_path)
    assert (done.returncode, "did you mean --checkpoint?" in done.stderr) == (2, True)
