"""Downloads from a local server that behaves as badly as real ones."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, fails_with, run_cli, torchrun
from servers import DATA, PACKED, endless, headers, hub_file, packed, partial, serve, status

import dnnlib.download
import dnnlib.transfer
from dnnlib.download import open_url
from dnnlib.errors import RunError, UserError
from generate_images import main as generate
from snapshot_tool import main as snapshot_tool
from training.config.edm2 import GENERATION_PRESETS, files_for
from training.metrics import load_stats
from training.snapshot import load_network


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(dnnlib.transfer, "BACK_OFF", 0.01)
    monkeypatch.setattr(dnnlib.transfer, "TIMEOUT", (2, 0.5))
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / "downloads"


def read(url: str, **kwargs) -> bytes:
    with open_url(url, **kwargs) as f:
        return f.read()


def kept(cache) -> list[str]:
    """Names without the hash; helper files begin with 'tmp_'."""
    names = [path.name for path in cache.iterdir() if path.suffix != ".lock"]
    return sorted(
        "tmp_" + name.split("_", 2)[2] if name.startswith("tmp_") else name.partition("_")[2] for name in names
    )


# ---------------------------------------------------------------------------------------------------------
# Success, sooner or later


def test_download_and_cache(server, cache):
    assert read(f"{server.url}/a.pkl") == DATA
    assert read(f"{server.url}/a.pkl") == DATA
    assert server.requests == [("/a.pkl", None)]
    assert kept(cache) == ["a.pkl"]
    assert read(f"{server.url}/a.pkl?x=1") == DATA  # another address
    assert len(server.requests) == 2


def test_local_files(tmp_path):
    path = tmp_path / "a b.bin"
    path.write_bytes(b"x")
    assert read(str(path)) == read(path.as_uri()) == b"x"
    assert open_url(path, return_filename=True) == str(path)
    for missing in ("nowhere", f"file://{tmp_path}/nowhere"):
        with pytest.raises(UserError, match="nowhere: no such file"):
            open_url(missing)


def test_explicit_cache_dir(server, tmp_path):
    assert read(f"{server.url}/a.pkl", cache_dir=tmp_path / "other") == DATA
    assert kept(tmp_path / "other") == ["a.pkl"]


BAD_STARTS = {
    "truncated": [serve(stop_after=300_000)],
    "truncated three times": [serve(stop_after=300_000)] * 3,
    "stalled": [serve(stop_after=300_000, stall=True)],
    "server errors": [status(500), status(503), status(502)],
    "too many requests": [status(429, **{"Retry-After": "0"})],
    "range refused": [serve(stop_after=300_000), status(416)],
    "range ignored": [serve(stop_after=300_000), serve(ranges=False)],
    "no version": [serve(stop_after=300_000, version={})],
    "weak version": [serve(stop_after=300_000, version={"ETag": 'W/"v1"'})],
    "date as the version": [serve(stop_after=300_000, version={"Last-Modified": "Fri, 20 Nov 2026 10:00:00 GMT"})],
    "new version meanwhile": [serve(bytes(len(DATA)), version={"ETag": '"v0"'}, stop_after=300_000)],
    "more announced than there is": [serve(claim=len(DATA) + 5)],
    "a piece at a time": [serve(stop_after=300_000), partial(end=200_000), partial(end=200_000)],
    "a piece that was not asked for": [partial(end=1000)],
    "a piece of unknown length": [serve(stop_after=300_000), partial(total="*")],
    "a piece of another version": [serve(stop_after=300_000), partial(bytes(len(DATA)), ETag='"v2"')],
    "a piece of another length": [serve(stop_after=300_000), partial(DATA + b"x")],
    "a piece from elsewhere": [serve(stop_after=300_000), partial(start=500_000)],
    "nothing": [serve(b"")],
    "odd waiting time": [status(429, **{"Retry-After": "\u00b2"})],
    "closed at once": [lambda handler: setattr(handler, "close_connection", True)],
}


@pytest.mark.parametrize("case", BAD_STARTS)
def test_ends_well(case, server, cache):
    server.script["/a.pkl"] = [*BAD_STARTS[case], serve()]
    assert read(f"{server.url}/a.pkl") == DATA
    assert kept(cache) == ["a.pkl"]


def test_packed_answers_are_kept_as_sent(server, capsys):
    """Unpacked, they could be of any size."""
    server.script["/a.bin"] = [packed(stop_after=100_000), packed()]
    assert read(f"{server.url}/a.bin") == PACKED
    assert "a.bin comes packed (gzip) and is kept as it comes" in capsys.readouterr().err


def test_small_steps(server):
    # As many attempts as it takes, as long as each gets further.
    server.script["/a.pkl"] = [serve(stop_after=100_000)]
    assert read(f"{server.url}/a.pkl", num_attempts=2) == DATA
    assert len(server.requests) > 10


@pytest.mark.parametrize(("answer", "longest", "seconds"), [("1", 60, 1.0), ("3600", 0.3, 0.3)])
def test_the_server_says_when_to_try_again(answer, longest, seconds, server, monkeypatch):
    monkeypatch.setattr(dnnlib.transfer, "MAX_BACK_OFF", longest)
    server.script["/a.pkl"] = [status(503, **{"Retry-After": answer}), serve()]
    start = time.monotonic()
    assert read(f"{server.url}/a.pkl") == DATA
    assert seconds <= time.monotonic() - start < 60


def test_everything_was_there(server, cache):
    server.script["/a.pkl"] = [status(416, **{"Content-Range": f"bytes */{len(DATA)}"})]
    url = f"{server.url}/a.pkl"
    name = f"tmp_{hashlib.md5(url.encode()).hexdigest()}_a.pkl"
    cache.mkdir(parents=True)
    (cache / f"{name}.partial").write_bytes(DATA)
    (cache / f"{name}.version").write_text(f'{len(DATA)} "v1"')
    assert read(url) == DATA
    assert kept(cache) == ["a.pkl"]


@pytest.mark.parametrize("text", ["", "\udcff", '"v1"', f'{len(DATA)} "v0"', f"{len(DATA)} a\nb", '5 "v1"'])
def test_doubtful_beginnings(text, server, cache):
    url = f"{server.url}/a.pkl"
    name = f"tmp_{hashlib.md5(url.encode()).hexdigest()}_a.pkl"
    cache.mkdir(parents=True)
    (cache / f"{name}.partial").write_bytes(b"something else")
    (cache / f"{name}.version").write_text(text, errors="surrogateescape")
    assert read(url) == DATA


def assert_resumed(server) -> None:
    """The second request asked for no more than what was missing, and a little."""
    first, second = (request[1] for request in server.requests)
    assert first is None
    assert 200_000 < int(second.removeprefix("bytes=").removesuffix("-")) <= 300_000


def test_interrupted_downloads_resume(server):
    server.script["/a.pkl"] = [serve(stop_after=300_000), serve()]
    assert read(f"{server.url}/a.pkl") == DATA
    assert_resumed(server)


def test_redirect(server):
    server.script["/a.pkl"] = [status(302, Location="/b.pkl")]
    assert read(f"{server.url}/a.pkl") == DATA


def test_without_a_length(server):
    def behave(handler):
        headers(handler, 200, {"Transfer-Encoding": "chunked"})
        handler.wfile.write(b"5\r\nhello\r\n0\r\n\r\n")

    server.script["/a.txt"] = [behave]
    assert read(f"{server.url}/a.txt") == b"hello"


def test_copies_of_the_published_tools_are_used(server, cache):
    url = f"{server.url}/a.pkl"
    cache.mkdir(parents=True)
    (cache / f"{hashlib.md5(url.encode()).hexdigest()}_http___some_name.pkl").write_bytes(b"kept")
    assert read(url) == b"kept"
    assert server.requests == []


FETCH = """
import sys
sys.path.insert(0, {root!r})
from dnnlib.download import open_url
print(len(open_url({url!r}).read()))
"""


def fetch_in_process(url: str) -> subprocess.Popen:
    code = FETCH.format(root=str(ROOT), url=url)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_one_process_fetches_for_all(server):
    server.script["/a.pkl"] = [serve(delay=1.0)]
    processes = [fetch_in_process(f"{server.url}/a.pkl") for _ in range(3)]
    outputs = [process.communicate() for process in processes]
    assert [out for out, _ in outputs] == [f"{len(DATA)}\n"] * 3, outputs
    assert len(server.requests) == 1
    assert any("Waiting for another process" in err for _, err in outputs)


def test_killed_process(server):
    server.script["/a.pkl"] = [serve(stop_after=300_000, stall=True), serve()]
    process = fetch_in_process(f"{server.url}/a.pkl")
    deadline = time.monotonic() + 30
    while not server.requests and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert read(f"{server.url}/a.pkl") == DATA
    assert_resumed(server)


# ---------------------------------------------------------------------------------------------------------
# Failure


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_wrong_address(code, server, cache):
    server.script["/a.pkl"] = [status(code)]
    with pytest.raises(UserError, match=f"/a.pkl: the server says {code} .*check the address"):
        open_url(f"{server.url}/a.pkl")
    assert len(server.requests) == 1
    assert kept(cache) == []


def test_endless_redirect(server):
    server.script["/a.pkl"] = [status(302, Location="/a.pkl")]
    with pytest.raises(UserError, match="check the address"):
        open_url(f"{server.url}/a.pkl")


@pytest.mark.parametrize("behave", [status(503), serve(stop_after=0)])
def test_giving_up(behave, server, cache):
    server.script["/a.pkl"] = [behave]
    with pytest.raises(RunError, match="/a.pkl: not fetched after 3 attempts") as err:
        open_url(f"{server.url}/a.pkl", num_attempts=3)
    assert "\n" not in str(err.value)
    assert len(server.requests) == 3
    assert "a.pkl" not in kept(cache)


def test_progress_renews_the_attempts(server):
    server.script["/a.pkl"] = [status(503), status(503), serve(stop_after=300_000), status(503), serve()]
    assert read(f"{server.url}/a.pkl", num_attempts=3) == DATA
    server.script["/b.pkl"] = [status(503), serve(stop_after=300_000), status(503), serve(stop_after=0), serve()]
    with pytest.raises(RunError, match="b.pkl: not fetched after 3 attempts .*; [1-9][0-9]+ bytes are kept"):
        open_url(f"{server.url}/b.pkl", num_attempts=3)
    assert read(f"{server.url}/b.pkl") == DATA


# ---------------------------------------------------------------------------------------------------------
# Endless, slow and damaged files


@pytest.mark.parametrize("behave", [endless(), endless(length=10**15)])
def test_files_that_are_too_large(behave, server, cache, monkeypatch):
    monkeypatch.setattr(dnnlib.transfer, "MAX_BYTES", 5 << 20)
    server.script["/a.pkl"] = [behave]
    with pytest.raises(
        UserError, match="a.pkl: (more than 0 GB, and no end of it|has 1000000.0 GB, and there is room)"
    ):
        open_url(f"{server.url}/a.pkl")
    assert not any(name.endswith(".partial") for name in kept(cache)) and len(server.requests) == 1


@pytest.mark.parametrize("behave", [endless(b"x", 0.01), endless(b"x", 0.01, length=1 << 20)])
def test_a_drip_is_no_progress(behave, server, monkeypatch):
    monkeypatch.setattr(dnnlib.transfer, "SLOW", (1000, 0.2))
    server.script["/a.pkl"] = [behave]
    with pytest.raises(RunError, match=r"a.pkl: not fetched after 2 attempts \(less than 1000 bytes per second\)"):
        open_url(f"{server.url}/a.pkl", num_attempts=2)
    assert len(server.requests) == 2


def test_downloads_take_no_longer_than(server, monkeypatch):
    monkeypatch.setattr(dnnlib.transfer, "MAX_SECONDS", 0.5)
    server.script["/a.pkl"] = [endless(bytes(1000), 0.01, length=1 << 20)]
    with pytest.raises(
        RunError, match="a.pkl: not fetched within 0.0 hours; [1-9][0-9]* bytes are kept: repeat the command"
    ):
        open_url(f"{server.url}/a.pkl")
    monkeypatch.setattr(dnnlib.transfer, "MAX_SECONDS", 60)
    server.script["/a.pkl"] = [serve(bytes(1 << 20))]
    assert read(f"{server.url}/a.pkl") == bytes(1 << 20) and server.requests[1][1] is not None


def flipped(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 0x40]) + data[-8:]


@pytest.mark.parametrize("damage", [flipped, lambda data: data[:3000], lambda data: b""], ids=["bit", "cut", "empty"])
def test_a_damaged_copy_is_fetched_again(damage, server, cache, snapshot_file, capsys):
    good = snapshot_file.read_bytes()
    server.script["/net.safetensors"] = [serve(good)]
    url = f"{server.url}/net.safetensors"
    (kept_copy := cache / f"{hashlib.md5(url.encode()).hexdigest()}_net.safetensors").parent.mkdir(parents=True)
    kept_copy.write_bytes(damage(good))
    assert load_network(url).metadata == load_network(snapshot_file).metadata
    assert kept_copy.read_bytes() == good and len(server.requests) == 1
    assert "fetching it again" in capsys.readouterr().err


def test_a_file_that_is_damaged_at_its_source_is_fetched_twice(server, cache, snapshot_file):
    server.script["/net.safetensors"] = [serve(flipped(snapshot_file.read_bytes()))]
    url = f"{server.url}/net.safetensors"
    for _ in range(3):
        with pytest.raises(UserError, match="checksum mismatch.*; it has come so twice: delete .*_net.safetensors to"):
            load_network(url)
        assert len(server.requests) == 2
    server.script["/net.safetensors"] = [serve(snapshot_file.read_bytes())]
    next(cache.glob("*_net.safetensors")).unlink()
    load_network(url)
    assert len(server.requests) == 3


def test_damaged_copies_stay_offline(server, cache, snapshot_file, monkeypatch):
    server.script["/net.safetensors"] = [serve(flipped(snapshot_file.read_bytes()))]
    url = f"{server.url}/net.safetensors"
    open_url(url, return_filename=True)
    monkeypatch.setenv("OPENEDM2_OFFLINE", "1")
    with pytest.raises(UserError, match="checksum mismatch"):
        load_network(url)
    assert len(server.requests) == 1


def test_damaged_statistics_are_fetched_again(server, cache, digits_ref):
    server.script["/ref.safetensors"] = [serve(digits_ref.read_bytes()[:5000]), serve(digits_ref.read_bytes())]
    assert load_stats(f"{server.url}/ref.safetensors").num_images == 1797
    assert len(server.requests) == 2


def test_a_copy_of_another_checksum_is_fetched_again(server, cache, snapshot_file):
    data = snapshot_file.read_bytes()
    server.script["/net.safetensors"] = [serve(b"something else"), serve(data)]
    open_url(f"{server.url}/net.safetensors", return_filename=True)
    load_network(f"{server.url}/net.safetensors#sha256={hashlib.sha256(data).hexdigest()}")


def test_no_server():
    with pytest.raises(RunError, match="not fetched after 2 attempts"):
        open_url("http://127.0.0.1:9/a.pkl", num_attempts=2)


def test_web_page_instead_of_a_file(server, cache):
    server.script["/a.pkl"] = [
        lambda handler: headers(handler, 200, {"Content-Type": "text/html", "Content-Length": 0})
    ]
    with pytest.raises(UserError, match="a web page instead of the file"):
        open_url(f"{server.url}/a.pkl")
    assert kept(cache) == []


@pytest.mark.parametrize(
    "url",
    [
        "http://", "http:///x", "ftp://x/y", "hf://owner", "hf://o/r/a\nb", "htp://x/y", "http://[bad]/x", "http://a..b/x",
        "http://h/\udcff", "file://relative", "file://", "http://x/y#sha256=abc", "http://x/y#sha256=", "http://x/y#SHA256=0",
    ],
)  # fmt: skip
def test_no_address(url):
    with pytest.raises(UserError) as err:
        open_url(url)
    assert "\n" not in str(err.value)


@pytest.mark.parametrize("target", ["ftp://x/y", "file:///etc/hostname", "http://[bad"])
def test_redirects_to_no_address(target, server):
    server.script["/a.pkl"] = [status(302, Location=target)]
    with pytest.raises(UserError, match="check the address"):
        open_url(f"{server.url}/a.pkl")
    assert len(server.requests) == 1


def test_passwords_are_not_shown(server):
    server.script["/a.pkl"] = [status(404)]
    with pytest.raises(UserError) as err:
        open_url(server.url.replace("//", "//me:secret@") + "/a.pkl")
    assert "secret" not in str(err.value)


def test_checksum(server, cache):
    good = hashlib.sha256(DATA).hexdigest()
    assert read(f"{server.url}/a.pkl#sha256={good.upper()}") == DATA
    with pytest.raises(UserError, match=f"wrong checksum.* {good}"):
        open_url(f"{server.url}/b.pkl#sha256={'0' * 64}")
    assert kept(cache) == ["a.pkl", "tmp_b.pkl.mismatch"]
    assert (next(cache.glob("*.mismatch"))).read_bytes() == DATA
    with pytest.raises(UserError, match="wrong checksum"):  # of a copy that was not checked when it came
        open_url(f"{server.url}/a.pkl#sha256={'0' * 64}")
    assert read(f"{server.url}/b.pkl") == DATA


def test_known_checksums(server, cache, monkeypatch):
    monkeypatch.setitem(dnnlib.download.KNOWN_SHA256, f"{server.url}/a.pkl", "0" * 64)
    with pytest.raises(UserError, match="wrong checksum"):
        open_url(f"{server.url}/a.pkl")
    url = f"{server.url}/a.pkl"
    (cache / f"{hashlib.md5(url.encode()).hexdigest()}_a.pkl").write_bytes(b"kept before")
    with pytest.raises(UserError, match="wrong checksum.*delete it to fetch it again"):
        open_url(url)


def test_checksum_of_what_another_process_fetches(server):
    server.script["/a.pkl"] = [serve(delay=1.0)]
    first, second = fetch_in_process(f"{server.url}/a.pkl"), fetch_in_process(f"{server.url}/a.pkl#sha256={'0' * 64}")
    (out, _), (_, err) = first.communicate(), second.communicate()
    assert out == f"{len(DATA)}\n"
    assert "wrong checksum" in err


def test_files_of_the_user_stay(tmp_path):
    path = tmp_path / "mine.partial"
    path.write_bytes(b"x")
    with pytest.raises(UserError, match="wrong checksum"):
        open_url(f"{path.as_uri()}#sha256={'0' * 64}")
    assert path.read_bytes() == b"x"


def test_offline(server, cache, monkeypatch):
    monkeypatch.setenv("OPENEDM2_OFFLINE", "1")
    with pytest.raises(UserError, match=f"{server.url}/a.pkl is needed and no network is wanted") as err:
        open_url(f"{server.url}/a.pkl")
    place = str(err.value).rsplit(" ", 1)[-1]
    assert server.requests == []
    os.makedirs(os.path.dirname(place), exist_ok=True)
    with open(place, "wb") as f:
        f.write(b"put there")
    assert read(f"{server.url}/a.pkl") == b"put there"


def test_cache_that_is_no_directory(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match="file/downloads: cannot keep downloads here .*set DNNLIB_CACHE_DIR"):
        open_url(f"{server.url}/a.pkl")


# ---------------------------------------------------------------------------------------------------------
# Where they are used


def test_networks_at_urls(server, tmp_path, snapshot_file):
    server.script["/net.safetensors"] = [serve(snapshot_file.read_bytes())]
    url = f"{server.url}/net.safetensors"
    for net in (url, snapshot_file, snapshot_file.as_uri()):
        out = tmp_path / str(len(str(net)))
        result = run_cli(generate, f"--net={net}", f"--outdir={out}", "--seeds=1", "--steps=1")
        assert result.exit_code == 0, result.output
        assert (out / "000001.png").is_file()
    count = len(server.requests)
    fails_with(
        run_cli(generate, f"--net={server.url}/net.bin", f"--outdir={tmp_path}"), "net.bin", ".safetensors or .pkl"
    )
    assert len(server.requests) == count


def test_two_processes_with_a_wrong_address(server, tmp_path):
    server.script["/net.pkl"] = [status(404)]
    done = torchrun(2, "generate_images.py", f"--net={server.url}/net.pkl", f"--outdir={tmp_path}")
    assert done.returncode != 0
    message = f"Error: {server.url}/net.pkl: the server says 404 Not Found: check the address"
    # Once by us, and once where torchrun's own report ends (which it may begin by what it thinks of files of errors).
    lines = [line for line in done.stderr.splitlines() if "404" in line and "torch/distributed/elastic" not in line]
    assert [line.split(": ", 1)[0] for line in lines] == ["Error", "  traceback "]
    assert message in done.stderr and done.stderr.splitlines()[-2].endswith(message)
    assert len(server.requests) == 1


def test_prefetch(server, monkeypatch):
    result = run_cli(snapshot_tool, "prefetch", f"{server.url}/a.pkl", f"{server.url}/b.pkl")
    assert result.exit_code == 0, result.output
    for path in result.output.split():
        with open(path, "rb") as f:
            assert f.read() == DATA
    urls = []
    monkeypatch.setattr("snapshot_tool.open_url", lambda url, **_: urls.append(url) or "path")
    assert run_cli(snapshot_tool, "prefetch", "edm2-img512-s-guid-fid", "fid", "fd_dinov2").exit_code == 0
    preset = GENERATION_PRESETS["edm2-img512-s-guid-fid"]
    assert urls[:2] == [preset.net, preset.gnet]
    assert any("sd-vae-ft-mse" in url for url in urls)
    assert urls.count("https://nvlabs-fi-cdn.nvidia.com/edm2/dataset-refs/img512.pkl") == 1
    assert sum("dinov2" in url for url in urls) == 2
    assert not any("vae" in url for url in files_for("edm2-img64-s-fid"))
    assert files_for("cmmd") == files_for("fd_clip") != files_for("fd_dinov2")
    fails_with(
        run_cli(snapshot_tool, "prefetch", "edm2-img512-s-guid-fidd"), "unknown preset", "edm2-img512-s-guid-fid"
    )


def test_prefetch_of_models_of_the_hub(monkeypatch):
    urls = []
    monkeypatch.setattr("snapshot_tool.open_url", lambda url, **_: urls.append(url) or "path")
    assert run_cli(snapshot_tool, "prefetch", "openai/clip-vit-large-patch14").exit_code == 0
    assert {"hf://openai/clip-vit-large-patch14/" + name for name in ("model.safetensors", "vocab.json")} < set(urls)


def test_without_a_network_the_hub_is_one_line_at_once(tmp_path):
    env = {key: value for key, value in os.environ.items() if "proxy" not in key.lower() and key != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": "http://hub.invalid", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "snapshot_tool.py", "inspect", "hf://me/digits"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.stderr.startswith("Error: hf://me/digits/config.json: not fetched from the hub (no network")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_offline_option(tmp_path):
    result = run_cli(generate, "--preset=edm2-img512-xs-fid", f"--outdir={tmp_path}", "--offline")
    fails_with(result, "edm2-img512-xs-2147483-0.135.pkl is needed and no network is wanted", "prefetch http")


# ---------------------------------------------------------------------------------------------------------
# The hub


def on_the_hub(server, tmp_path, *command) -> subprocess.CompletedProcess:
    """Run a command that takes the local server for the hub."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "OPENEDM2_"))}
    env.update(HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / "hub"))
    command = [sys.executable, "snapshot_tool.py", *map(str, command)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_hub(server, tmp_path, snapshot_file):
    folder = tmp_path / "folder"
    assert run_cli(snapshot_tool, "export", snapshot_file, folder, "--license=mit").exit_code == 0
    for name in ("config.json", "model.safetensors"):
        server.script[f"/me/digits/resolve/main/{name}"] = [hub_file((folder / name).read_bytes())]
    server.script["/me/digits/resolve/main/other.safetensors"] = [status(404, **{"X-Error-Code": "EntryNotFound"})]

    for source in ("hf://me/digits", "hf://me/digits/model.safetensors"):
        done = on_the_hub(server, tmp_path, "inspect", source, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["nimg"] == 1024
    fetched = len(server.requests)
    assert on_the_hub(server, tmp_path, "inspect", "hf://me/digits", "--offline").returncode == 0
    assert len(server.requests) == fetched

    for source, fragment in [
        ("hf://me/digits/other.safetensors", "not found on the hub"),
        ("hf://me/none --offline", "prefetch"),
    ]:
        done = on_the_hub(server, tmp_path, "inspect", *source.split())
        assert done.returncode == 2
        assert done.stderr.startswith("Error: hf://me/") and done.stderr.count("\n") == 1
        assert fragment in done.stderr
