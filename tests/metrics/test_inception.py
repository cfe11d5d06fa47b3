"""The weights of Inception-v3: checked, downloaded once."""

import hashlib
import math

import pytest
import torch
from conftest import run_cli
from measuring import uint8_images
from servers import serve

from dnnlib.errors import UserError
from snapshot_tool import main as snapshot_tool
from training.config.metrics import METRIC_FILES
from training.metrics.detectors import load_detector


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda s: s.pop("Mixed_6a.branch3x3.conv.weight"), r"\(missing Mixed_6a.branch3x3.conv.weight\)"),
        (lambda s: s["fc.bias"].fill_(math.inf), "fc.bias holds NaN or infinity"),
    ],
    ids=["missing", "infinite"],
)
def test_wrong_states(change, fragment, inception_state, tmp_path):
    state = {**inception_state, "fc.bias": inception_state["fc.bias"].clone()}
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=f"w.pth: .*{fragment}"):
        load_detector("inception", "cpu", tmp_path / "w.pth")


def test_inception_is_fetched_once(server, inception_file, tmp_path, monkeypatch):
    data = inception_file.read_bytes()
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    url = f"{server.url}/inception-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    monkeypatch.setitem(METRIC_FILES, "fid", [url])
    server.script[url.removeprefix(server.url)] = [serve(data)]

    monkeypatch.setenv("OPENEDM2_OFFLINE", "1")
    with pytest.raises(
        UserError, match=f"{url} is needed and no network is wanted.*snapshot_tool.py prefetch fid"
    ) as err:
        load_detector("inception", "cpu")
    assert "\n" not in str(err.value)
    monkeypatch.setenv("OPENEDM2_OFFLINE", "0")
    assert run_cli(snapshot_tool, "prefetch", "fid").exit_code == 0
    monkeypatch.setenv("OPENEDM2_OFFLINE", "1")
    images = uint8_images(1, 3, 32, 32)
    fetched, local = (load_detector("inception", "cpu", weights) for weights in (None, inception_file))
    assert torch.equal(fetched(images), local(images))
    assert len(server.requests) == 1


def test_name_states_the_checksum(server, inception_file, tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    name = METRIC_FILES["fid"][0].rsplit("/", 1)[1]
    monkeypatch.setitem(METRIC_FILES, "fid", [f"{server.url}/{name}"])
    server.script[f"/{name}"] = [serve(inception_file.read_bytes())]
    (tmp_path / name).symlink_to(inception_file)
    for weights in (None, tmp_path / name):
        with pytest.raises(UserError, match=r"mismatch: SHA-256 is [0-9a-f]{64}, not 6726825d\.\.\.: delete it"):
            load_detector("inception", "cpu", weights)
