"""explore.py: what its server answers and refuses, and images that its commands make again."""

import base64
import contextlib
import http.client
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import ROOT, fails_with, images_in, run_cli, tiny_network, tiny_uvit

from dnnlib.errors import UserError
from explore import main as explore
from generate_images import main as generate
from reconstruct_phema import main as reconstruct
from training.conditioning import Conditioning, DataSpec
from training.config.explore import PageRequest
from training.encoders import RawLatentEncoder, StandardRGBEncoder, WordEncoder, text_record
from training.explore.jobs import FRAMES, Job, SupersededError, Watched
from training.explore.server import PageServer
from training.explore.session import Session
from training.networks.classifier import NoisyClassifier
from training.shelf import Shelf
from training.snapshot import save_network
from training.sweep import read_options

COMMANDS = {"generate_images.py": generate, "reconstruct_phema.py": reconstruct}


@pytest.fixture(scope="module")
def own_run(run, tmp_path_factory) -> Path:
    """A copy of the run, into which commands may write."""
    folder = tmp_path_factory.mktemp("explored") / "run"
    shutil.copytree(run, folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Networks with conditions of all kinds."""
    folder = tmp_path_factory.mktemp("networks")
    text = WordEncoder(4, 16)
    networks = {
        "uvit": (tiny_uvit(Conditioning(kind="classes", size=10, optional=True)), {"class_names": [*"abcdefghij"]}),
        "text": (tiny_uvit(Conditioning.of_text(4, 16)), {"text_encoder": text_record(text)}),
    }
    for name, (net, metadata) in networks.items():
        save_network(folder / f"{name}.safetensors", net, StandardRGBEncoder(), metadata, torch.float32)
    return {name: folder / f"{name}.safetensors" for name in networks}


@contextlib.contextmanager
def session_of(*networks, words=()):
    words = [f"--net={networks[0]}", *words]
    with tempfile.TemporaryDirectory() as folder:
        session = Session(read_options(words), words, [str(path) for path in networks[1:]], Path(folder))
        with contextlib.closing(session):
            yield session


@pytest.fixture(scope="module")
def session(own_run, files, nvae):
    with session_of(own_run, files["uvit"], files["text"], nvae) as session:
        yield session


@pytest.fixture(scope="module")
def page(session):
    """A server of the page."""
    with PageServer(session, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(session: Session, **request) -> dict:
    """What the page gets for a request."""
    return session.submit(PageRequest.from_json(request)).future.result(timeout=60)


def pixels(png: str) -> np.ndarray:
    with PIL.Image.open(io.BytesIO(base64.b64decode(png))) as image:
        return np.asarray(image)


def http_request(page: PageServer, method: str, path: str, body: bytes | None = None, **headers: str):
    """Status, headers and body of an answer; `headers` have _ for -."""
    connection = http.client.HTTPConnection("127.0.0.1", page.server_port, timeout=60)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


def run_commands(text: str, folder: Path, monkeypatch) -> dict[str, np.ndarray]:
    """Run the page's commands in a folder, as a shell does; the images that they make."""
    monkeypatch.chdir(folder)
    for line in text.replace("\\\n", " ").splitlines():
        python, script, *arguments = shlex.split(line)
        assert python == "python"
        result = run_cli(COMMANDS[script], *arguments)
        assert result.exit_code == 0, result.output
    return images_in(folder / "out" / "explore")


# ---------------------------------------------------------------------------------------------------------
# Images


MADE = {
    "as the folder stands for": {"setting": {}},
    "reconstructed": {"setting": {"main": {"ema": "0.073"}, "options": ["--steps=5", "--class=3"]}},
    "of an earlier time": {"setting": {"main": {"kimg": 2, "ema": "0.12"}, "options": ["--sampler=sqrt-3m", "--steps=4"]}},
    "guided by another average": {
        "setting": {
            "guide": "network",
            "guiding": {"kimg": 2, "ema": "0.2"},
            "options": ["--sampler=heun", "--steps=6", "--guidance=2", "--guidance-interval=0.1,inf"],
            "more": "--rho=5 --S_churn=3",
        }
    },
    "guided by itself": {
        "setting": {"main": {"network": 1}, "guide": "itself", "options": ["--steps=5", "--guidance=1.5", "--class=a,b"]}
    },
    "of texts": {"setting": {"main": {"network": 2}, "options": ["--steps=4", "--prompt=a seven", "--prompt=it's two"]}},
    "of an NVAE": {"setting": {"main": {"network": 3}, "options": ["--temperature=0.7"]}},
    "at levels of their own": {"setting": {"options": ["--steps=7"], "more": "--sigmas=20,5,1,.2 --class-policy=balanced"}},
    "with steps of their own": {"setting": {"main": {"network": 1}, "options": ["--sampler=rk45"], "more": "--rtol=0.01"}},
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_commands_make_the_same_pixels(session, own_run, tmp_path, monkeypatch, name):
    result = ask(session, seed="16", images=3, **MADE[name])
    assert "error" not in result
    made = run_commands(result["command"], tmp_path, monkeypatch)
    assert list(made) == ["000016.png", "000017.png", "000018.png"]
    for image, theirs in zip(result["images"], made.values(), strict=True):
        assert np.array_equal(pixels(image["png"]), theirs)
    assert len({image["png"] for image in result["images"]}) == 3


def test_only_what_differs_from_defaults_is_in_commands(session, own_run):
    options = ["--sampler=heun", "--steps=32", "--guidance=1.0"]
    command = ask(session, setting={"guide": "network", "options": options})["command"].replace("\\\n", "").split()
    net = f"--net={own_run}/network-snapshot-0000003-0.100.safetensors"
    assert command == ["python", "generate_images.py", net, "--seeds=0", "--outdir=out/explore"]


def test_images_say_what_they_were_asked_for(session):
    labels = [
        [image["label"] for image in ask(session, images=3, setting=setting)["images"]]
        for setting in (
            {"options": ["--steps=1", "--class=4,5"]},
            {"main": {"network": 1}, "options": ["--steps=1", "--class=b"]},
            {"main": {"network": 2}, "options": ["--steps=1", "--prompt=one", "--prompt=two"]},
            {"main": {"network": 2}, "options": ["--steps=1"]},
            {"main": {"network": 3}},
        )
    ]
    assert labels == [["class 4", "class 5", "class 4"], ["b"] * 3, ["one", "two", "one"], [""] * 3, [""] * 3]


def test_the_way_to_an_image(session):
    """It goes from the highest noise level to the lowest, where the denoiser gives the image itself."""
    result = ask(session, images=2, path_of=1, setting={"options": ["--steps=12"]})
    levels = [frame["sigma"] for frame in result["path"]]
    assert result["evaluations"] == 23 and len(levels) == FRAMES
    assert levels[0] == pytest.approx(80) and levels[-1] == pytest.approx(0.002)
    assert levels == sorted(levels, reverse=True)
    assert np.array_equal(pixels(result["path"][-1]["png"]), pixels(result["images"][1]["png"]))
    assert ask(session, images=2, setting={})["path"] == []
    assert ask(session, images=2, path_of=0, setting={"main": {"network": 3}})["path"] == []


def test_latents_that_nothing_decodes(tmp_path):
    """They are shown as brightness, and saved as they are."""
    encoder = RawLatentEncoder([0.0] * 4, [1.0] * 4)
    save_network(tmp_path / "net.safetensors", tiny_network(img_channels=4), encoder, {})
    with session_of(tmp_path / "net.safetensors") as session:
        assert not session.describe()["networks"][0]["pixels"]
        result = ask(session, images=2, path_of=0, setting={"options": ["--steps=2"]})
        assert (
            result["are_latents"]
            and result["resolution"] == 8
            and pixels(result["images"][1]["png"]).shape == (8, 8, 3)
        )
        assert [len(frame["png"]) > 100 for frame in result["path"]] == [True, True]


def test_averages_say_how_they_came_to_be(session):
    (note,) = ask(session, setting={"main": {"ema": "0.073"}, "options": ["--steps=1"]})["notes"]
    assert re.fullmatch(r"EMA length 0\.073 made of 6 snapshots, expected error \d+\.\d%", note)
    weightless = ask(session, setting={"guide": "network", "options": ["--steps=1"]})
    assert weightless["notes"] == ["A guide has no effect with weight 1"]
    (note,) = ask(session, setting={"main": {"network": 2}, "options": ["--steps=1"]})["notes"]
    assert note == "Note: no --prompt is given: images follow the empty text"


@pytest.mark.parametrize(
    ("request_", "fragments"),
    [
        ({"seed": "many"}, ["seed 'many' is no whole number"]),
        ({"seed": str(2**32 - 1), "images": 2}, ["seed 4294967296 is too large"]),
        ({"setting": {"options": ["--steps=abc"]}}, ["--steps", "'abc' is not a valid integer"]),
        ({"setting": {"options": ["--steps=0"]}}, ["--steps must be at least 1, not 0"]),
        ({"setting": {"options": ["--steps=5000"]}}, ["--steps=5000: this page takes at most 4000"]),
        ({"setting": {"options": ["--class=11"]}}, ["--class=11 is out of range: the classes are 0 to 9"]),
        ({"setting": {"main": {"ema": "0.5"}}}, ["EMA length '0.5'", "between 0.001 and 0.289"]),
        ({"setting": {"main": {"ema": "0.05,0.06"}}}, ["EMA length '0.05,0.06' is not one number"]),
        ({"setting": {"main": {"ema": "long"}}}, ["EMA length 'long': 'long' is not a number"]),
        ({"setting": {"main": {"kimg": 7, "ema": "0.05"}}}, ["there is no snapshot of that time", "from 1 to 3"]),
        ({"setting": {"main": {"network": 9}}}, ["no network 9 any more: reload the page"]),
        ({"setting": {"guide": "itself", "options": ["--guidance=2"]}}, ["--guidance=2 needs a guiding network"]),
        ({"setting": {"main": {"network": 3}, "more": "--rho=5"}}, ["--rho has no meaning for NVAE networks"]),
        ({"setting": {"more": "--rho"}}, ["'--rho' is not of the form --name=value"]),
        ({"setting": {"more": "--steps=3"}}, ["--steps has its own place on this page"]),
        ({"setting": {"more": "--rho='5"}}, ["further options: --rho='5: No closing quotation"]),
        ({"setting": {"more": "--net=/etc/passwd"}}, ["--net=/etc/passwd cannot be chosen on this page"]),
        ({"setting": {"options": ["--gnet=/etc/passwd"]}}, ["--gnet=/etc/passwd cannot be chosen on this page"]),
        ({"setting": {"more": "--prompts=/etc/passwd"}}, ["--prompts=/etc/passwd cannot be chosen"]),
        ({"setting": {"more": "--guidance-table=/etc/passwd"}}, ["--guidance-table=/etc/passwd cannot be chosen"]),
        ({"setting": {"more": "--encoder=/etc"}}, ["--encoder=/etc cannot be chosen on this page"]),
        ({"setting": {"more": "--sigmas=/etc/passwd"}}, ["--sigmas=/etc/passwd is no list of numbers"]),
        ({"setting": {"more": "--sigmas=1.2.3"}}, ["--sigmas=1.2.3 is no list of numbers"]),
    ],
)  # fmt: skip
def test_bad_input_is_a_message(session, request_, fragments):
    result = ask(session, **request_)
    assert set(result) == {"error"} and "\n" not in result["error"]
    for fragment in fragments:
        assert fragment in result["error"]


def test_the_newest_request_wins(session):
    """Images that nobody waits for any more are not made to their end; those of others are."""
    slow = {"images": 4, "setting": {"options": ["--steps=4000"]}}
    first = session.submit(PageRequest.from_json({"pane": "a", **slow}))
    while first.progress == 0 and not first.future.done():
        pass
    second = session.submit(PageRequest.from_json({"pane": "a", **slow}))
    other = session.submit(PageRequest.from_json({"pane": "b", "setting": {"options": ["--steps=1"]}}))
    third = session.submit(PageRequest.from_json({"pane": "a", "setting": {"options": ["--steps=2"]}}))
    assert other.future.result(timeout=60)["evaluations"] == 1 and third.future.result(timeout=60)["evaluations"] == 3
    for job in (first, second):
        with pytest.raises(SupersededError):
            job.future.result()
        assert job.progress < 1


def test_frames_of_long_ways():
    """Few are kept of thousands of evaluations, first and last among them."""
    levels = np.geomspace(100, 0.01, 5001)
    watched = Watched(lambda x, sigma, cond: x + sigma, Job(), 0, (100.0, 0.01))
    for level in levels:
        watched(torch.zeros(2, 1, 1, 1), torch.tensor(level))
    frames = watched.frames()
    assert len(frames) == FRAMES and frames[0][0] == 100 and frames[-1][0] == pytest.approx(0.01)
    assert all(float(D) == pytest.approx(sigma) for sigma, D in frames)
    steps = np.diff(np.log([sigma for sigma, _ in frames]))
    assert steps.min() > 1.5 * steps.mean()  # evenly, as far as that goes (they fall)
    assert watched.job.progress == pytest.approx(1)


def test_networks_of_unlimited_number_are_not_kept(tmp_path):
    paths = [tmp_path / place / f"{i}.safetensors" for place in ("work", "theirs") for i in range(4)]
    for i, path in enumerate(paths):
        save_network(path, tiny_network(seed=i), StandardRGBEncoder(), {})
    shelf = Shelf(tmp_path / "work", limit=0, at_least=4)
    kept = [shelf(str(path)) for path in paths]
    assert [path.is_file() for path in paths] == [False] * 4 + [True] * 4  # of ours, those in memory stay
    assert shelf(str(paths[7])) is kept[7]
    save_network(paths[7], tiny_network(seed=9), StandardRGBEncoder(), {})
    assert shelf(str(paths[7])) is not kept[7]  # it has changed


def test_a_guide_that_is_there_is_not_deleted_before_it_is_used(own_run, tmp_path):
    """The network that comes first takes the place of the one that was used longest ago, which may be the guide."""
    words = [f"--net={own_run}"]
    session = Session(read_options(words), words, [], tmp_path)
    session.shelf = Shelf(tmp_path, limit=0, at_least=4)
    with contextlib.closing(session):
        for main, guide in [("0.060", "0.070"), ("0.061", "0.071"), ("0.062", "0.060"), ("0.063", "0.071")]:
            setting = {"main": {"ema": main}, "guiding": {"ema": guide}, "guide": "network"}
            result = ask(session, setting={**setting, "options": ["--steps=1", "--guidance=2"]})
            assert "error" not in result, result
        assert len(list((tmp_path / "0").iterdir())) == 4


# ---------------------------------------------------------------------------------------------------------
# What can be chosen


def test_networks(session, own_run):
    edm2, uvit, text, nvae = session.describe()["networks"]
    assert edm2["name"] == str(own_run) and edm2["about"].startswith("EDM2, 8x8")
    assert (edm2["times"], edm2["tracked"], edm2["other_averages"]) == ([1, 2, 3], [0.05, 0.1], [])
    assert edm2["start"] == {"network": 0, "kimg": 3, "ema": "0.100"}
    assert (uvit["classes"], uvit["class_names"], uvit["times"], uvit["knows_none"]) == (10, [*"abcdefghij"], [], True)
    assert text["text"] and text["classes"] == 0
    assert not nvae["denoiser"] and all(network["pixels"] for network in (edm2, uvit, text, nvae))


def test_averages_that_have_no_width(tmp_path):
    """Of runs without power-function averages, there are the snapshots, and why there is no more."""
    for kimg, end in [(1, ""), (2, ""), (2, "-ema")]:
        path = tmp_path / f"network-snapshot-{kimg:07d}{end}.safetensors"
        save_network(path, tiny_network(seed=len(end) + kimg), StandardRGBEncoder(), {"nimg": kimg * 1000})
    with session_of(tmp_path) as session:
        (network,) = session.describe()["networks"]
        assert (network["times"], network["tracked"], network["other_averages"]) == ([1, 2], [], ["", "ema"])
        assert "no snapshots named" in network["obstacle"]
        assert network["start"] == {"network": 0, "kimg": 2, "ema": "ema"}
        names = [
            re.findall(r"--net=\S+/(\S+)", ask(session, setting={"main": main, "options": ["--steps=1"]})["command"])
            for main in ({}, {"kimg": 1, "ema": ""})
        ]
        assert names == [["network-snapshot-0000002-ema.safetensors"], ["network-snapshot-0000001.safetensors"]]
        missing = ask(session, setting={"main": {"kimg": 1, "ema": "ema"}})["error"]
        assert "no snapshot 'ema' of 1 thousand images (there are 2)" in missing
        assert "cannot be made" in ask(session, setting={"main": {"ema": "0.05"}})["error"]


def test_obstacles_pass(own_run, tmp_path):
    """A snapshot that could not be read is there when the page is loaded again."""
    folder = tmp_path / "run"
    shutil.copytree(own_run, folder, ignore=shutil.ignore_patterns("phema*"))
    damaged = folder / "network-snapshot-0000001-0.050.safetensors"
    damaged.write_bytes(b"")
    with session_of(folder) as session:
        (network,) = session.describe()["networks"]
        assert damaged.name in network["obstacle"] and network["tracked"] == []
        shutil.copy(own_run / damaged.name, damaged)
        (network,) = session.describe()["networks"]
        assert network["obstacle"] == "" and network["tracked"] == [0.05, 0.1]


def test_new_snapshots_are_found(own_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(
        own_run,
        folder,
        ignore=lambda _, names: [n for n in names if n.startswith(("network-snapshot-0000003", "phema"))],
    )
    with session_of(folder) as session:
        assert session.describe()["networks"][0]["times"] == [1, 2]
        for path in own_run.glob("network-snapshot-0000003*"):
            shutil.copy(path, folder)
        assert session.describe()["networks"][0]["times"] == [1, 2, 3]


def test_the_page_begins_with_the_options_of_the_command(own_run, files):
    words = [
        f"--gnet={own_run}", "--guidance=2", "--guidance-interval=0.2,5", "--class=3", "--rho=5", "--steps=7", "--device=cpu",
    ]  # fmt: skip
    with session_of(own_run, files["uvit"], words=words) as session:
        described = session.describe()
        assert len(described["networks"]) == 2 and described["guide"] == "network"
        assert described["first"] == {
            "guidance": ["2"], "guidance-interval": ["0.2,5"], "class": ["3"], "steps": ["7"],
        }  # fmt: skip
        assert described["more"] == "--rho=5"
        assert "--device=cpu" in ask(session, setting={"options": ["--steps=1"]})["command"]


def test_a_classifier_guides(tmp_path):
    torch.manual_seed(0)
    data = DataSpec(channels=1, resolution=8, conditioning=Conditioning.of_labels(10))
    classifier = NoisyClassifier(data, depth=10, width=1, nf=4).eval().requires_grad_(False)
    files = {name: tmp_path / f"{name}.safetensors" for name in ("net", "classifier")}
    for name, network in {"net": tiny_network(label_dim=0), "classifier": classifier}.items():
        save_network(files[name], network, StandardRGBEncoder(), {})
    with session_of(files["net"], words=[f"--classifier={files['classifier']}"]) as session:
        assert session.describe()["classifier"] == str(files["classifier"])
        result = ask(session, images=2, setting={"options": ["--steps=2", "--guidance=3", "--class=4"]})
        assert f"--classifier={files['classifier']}" in result["command"] and "--guidance=3" in result["command"]
        assert [image["label"] for image in result["images"]] == ["class 4"] * 2


# ---------------------------------------------------------------------------------------------------------
# The server


def test_it_serves_its_own_files_alone(page):
    for path, kind in {"/": "html", "/page.css": "css", "/pane.js": "javascript", "/page.js": "javascript"}.items():
        status, headers, text = http_request(page, "GET", path)
        assert status == 200 and headers["Content-Type"] == f"text/{kind}; charset=utf-8" and len(text) > 1000
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
        assert http_request(page, "HEAD", path)[::2] == (200, "")
    for path in (
        "/page.html", "/session.py", "/../session.py", "/page.js/../session.py", "/%2e%2e/session.py", "//etc/passwd",
        "/..%2f..%2f..%2fetc/passwd", "/../../../../etc/passwd", "/page.css/", "/PAGE.JS", "/page.js%00", "/api", "/api/images",
        "/.", "/training/explore/page.js",
    ):  # fmt: skip
        status, _, text = http_request(page, "GET", path)
        assert status == 404 and text == f"there is only the page at {page.url}\n", path
    assert http_request(page, "POST", "/", b"{}", Content_Type="application/json")[0] == 404
    for method in ("PUT", "DELETE", "OPTIONS", "TRACE"):
        assert http_request(page, method, "/")[0] == 501


def test_it_listens_on_this_machine_alone(page):
    assert page.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost.evil.example:1"]
)
def test_other_names_that_lead_here_are_refused(page, host):
    """DNS rebinding: a page of another server has its name lead to this one."""
    for method, path in (("GET", "/"), ("GET", "/api/networks"), ("POST", "/api/images")):
        status, _, text = http_request(page, method, path, b"{}", Host=host, Content_Type="application/json")
        assert status == 403 and page.url in text


def test_other_pages_are_refused(page):
    body = json.dumps({"setting": {"options": ["--steps=1"]}}).encode()
    own = f"127.0.0.1:{page.server_port}"
    for host in (own, f"localhost:{page.server_port}"):
        accepted = http_request(
            page, "POST", "/api/images", body, Host=host, Origin=f"http://{host}", Content_Type="application/json"
        )
        assert accepted[0] == 200
        assert not any(name.lower().startswith("access-control") for name in accepted[1])
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"https://{own}"):
        for method, path in (("GET", "/api/networks"), ("POST", "/api/images")):
            status, _, _ = http_request(page, method, path, body, Origin=origin, Content_Type="application/json")
            assert status == 403
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):  # what forms can send
        assert http_request(page, "POST", "/api/images", body, Content_Type=kind)[0] == 415


@pytest.mark.parametrize(
    ("body", "status", "fragment"),
    [
        (b"", 400, "no JSON"),
        (b"{", 400, "no JSON"),
        (b"[" * 20000, 400, "no JSON"),
        (b"[]", 400, "list where a dictionary of options belongs"),
        (b'{"path": "/etc/passwd"}', 400, "unknown option 'path'"),
        (b'{"images": 33}', 400, "images must be at most 32, not 33"),
        (b'{"images": "3"}', 400, "images must be a whole number, not '3'"),
        (b'{"setting": {"guide": "me"}}', 400, "guide must be one of none, itself, network, not 'me'"),
        (b'{"seed": "%s"}' % (b"1" * 70000), 413, "at most 65536 bytes"),
    ],
)
def test_bad_requests(page, body, status, fragment):
    answer = http_request(page, "POST", "/api/images", body, Content_Type="application/json")
    assert answer[0] == status and fragment in answer[2] and answer[2].count("\n") == 1


def test_images_come_after_progress(page):
    body = json.dumps({"images": 4, "setting": {"options": ["--steps=400"]}}).encode()
    status, headers, text = http_request(page, "POST", "/api/images", body, Content_Type="application/json")
    *before, last = [json.loads(line) for line in text.splitlines()]
    assert status == 200 and headers["Content-Type"] == "application/x-ndjson"
    assert [list(line) for line in before] == [["progress"]] * len(before) and before
    progress = [line["progress"] for line in before]
    assert progress == sorted(progress) and 0 < progress[-1] <= 1
    assert last["evaluations"] == 799 and len(last["images"]) == 4
    status, _, text = http_request(page, "POST", "/api/images", b'{"seed": "x"}', Content_Type="application/json")
    assert status == 200 and "seed 'x'" in json.loads(text.splitlines()[-1])["error"]


def test_who_hangs_up_waits_no_more(page, session, monkeypatch):
    jobs: list[Job] = []
    submit = session.submit
    monkeypatch.setattr(session, "submit", lambda request: jobs.append(submit(request)) or jobs[-1])
    body = json.dumps({"setting": {"options": ["--steps=4000"]}}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", page.server_port, timeout=60)
    connection.request("POST", "/api/images", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert "progress" in json.loads(answer.readline())
    answer.close()
    connection.close()
    with pytest.raises(SupersededError):
        jobs[0].future.result(timeout=60)


# ---------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_the_command(own_run, nvae, tmp_path, asked):
    """It ends when it is asked to, with images under way, and leaves nothing."""
    before = {path: path.stat().st_mtime_ns for path in own_run.iterdir()}
    with subprocess.Popen(
        [sys.executable, ROOT / "explore.py", f"--net={own_run}", f"--also={nvae}", "--port=0"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which jobs in the background ignore
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = re.fullmatch(r"Open http://127\.0\.0\.1:(\d+) in a browser\. Ctrl-C ends\.\n", line)
            assert match, process.communicate(timeout=120)
            connection = http.client.HTTPConnection("127.0.0.1", int(match[1]), timeout=120)
            connection.request("GET", "/api/networks")
            assert len(json.loads(connection.getresponse().read())["networks"]) == 2
            connection.close()
            waiting = [http.client.HTTPConnection("127.0.0.1", int(match[1]), timeout=120) for _ in range(2)]
            for pane, connection in enumerate(waiting):
                request = {"pane": str(pane), "setting": {"main": {"ema": "0.07"}, "options": ["--steps=4000"]}}
                body = json.dumps(request).encode()
                connection.request("POST", "/api/images", body, {"Content-Type": "application/json"})
                assert "progress" in json.loads(connection.getresponse().readline())
            process.send_signal(asked)
            _, errors = process.communicate(timeout=120)
            assert (process.returncode, errors) == (0, "")
        finally:
            process.kill()
    assert {path: path.stat().st_mtime_ns for path in own_run.iterdir()} == before and not any(tmp_path.iterdir())


def test_bad_options(own_run, page, tmp_path):
    fails_with(run_cli(explore), "which network?")
    fails_with(run_cli(explore, "--net=nowhere"), "nowhere")
    fails_with(run_cli(explore, f"--net={own_run}", "--also=nowhere"), "nowhere")
    fails_with(run_cli(explore, f"--net={own_run}", "--port=65536"), "--port must be at most 65535, not 65536")
    fails_with(run_cli(explore, f"--net={own_run}", f"--port={page.server_port}"), "is in use: choose another one")
    with (
        pytest.raises(UserError, match="makes no images"),
        session_of(ROOT / "models" / "toy" / "clsA-layers04-dim32-iter0512.safetensors"),
    ):
        pass
