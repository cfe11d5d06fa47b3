"""Published files with flipped bits, and those that unpack to more than they hold."""

import io
import zipfile

import pytest
import torch

from dnnlib.errors import UserError
from torch_utils.checkpoint import load_checked
from training.metrics.weights import read_state
from training.networks.uvit import UViT
from training.snapshot import load_network, published_score_sde, published_uvit

STATE = {"all_modules.0.weight": torch.arange(3000.0), "all_modules.0.bias": torch.arange(3000.0).square()}


def uvit(path):
    net = UViT(img_size=8, patch_size=2, in_chans=3, embed_dim=16, depth=4, num_heads=2)
    published_uvit.write(path, net.state_dict())
    return lambda: published_uvit.read(path, num_heads=2).state


def score_sde(path):
    checkpoint = published_score_sde.Checkpoint(STATE, STATE, step=5, decay=0.999, num_updates=5)
    published_score_sde.write(path, checkpoint)
    return lambda: published_score_sde.read(path).ema


def detector(path):
    torch.save(STATE, path)
    return lambda: read_state(path, STATE)


LAYOUTS = {"uvit.pth": uvit, "score_sde.pth": score_sde, "detector.pth": detector}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_flipped_bit_of_a_weight_is_found(name, tmp_path):
    """torch.load itself compares no checksums."""
    path = tmp_path / name
    read = LAYOUTS[name](path)
    data = path.read_bytes()
    values = max(read().values(), key=torch.Tensor.numel)
    begin = data.index(values.numpy().tobytes())
    for position in (0, 1234, 4 * values.numel() - 1):
        flipped = bytearray(data)
        flipped[begin + position] ^= 0x20
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=rf"{name}: .*(checksum mismatch|damaged)"):
            read()


def test_damaged_names_in_an_archive(tmp_path):
    """Python's zipfile fails on them in a way of its own."""
    path = tmp_path / "uvit.pth"
    uvit(path)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\1\2") + 46] = 0xD8  # no UTF-8
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"uvit\.pth: .*damaged"):
        load_network(path)


@pytest.mark.parametrize("count", [1, 300])
def test_archives_larger_than_they_are(count, tmp_path):
    """One compressed part, or many that are the same bytes of the file."""
    f = io.BytesIO()
    with zipfile.ZipFile(f, "w") as archive:
        archive.writestr("a/data.pkl", bytes(10**6), zipfile.ZIP_DEFLATED if count == 1 else zipfile.ZIP_STORED)
        archive.filelist *= count
    (tmp_path / "a.pt").write_bytes(f.getvalue())
    with pytest.raises(ValueError, match="larger than the file"):
        load_checked(tmp_path / "a.pt")


def test_older_files_have_no_checksums(tmp_path):
    torch.save(STATE, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert load_checked(tmp_path / "a.pt", mmap=True).keys() == STATE.keys()
