"""Published files of U-ViT and its autoencoder against the golden values (tolerances in their README)."""

import csv

import pytest
import torch
from conftest import ROOT
from uvit_golden import ROOM, GoldenFile, error, names

from training.encoders import FINAL_STD, StabilityVAEEncoder
from training.encoders.published_autoencoder import convert_autoencoder, diffusers_name
from training.snapshot.published_uvit import read

FORWARD, DECODED = 2e-5, 1e-4
GUESSED = ("num_heads", "num_clip_token")  # what shapes do not tell of networks that are not published
NETWORKS = {"ema": "nnet_ema", "net": "nnet"}
FILES = {name: GoldenFile(name) for name in names("checkpoints/expected*")}
SINGLE = [(name, key) for name, g in FILES.items() for key, value in g.meta.items() if "file" in value]
assert SINGLE


def known(kwargs: dict) -> dict:
    return {key: kwargs[key] for key in GUESSED if key in kwargs}


def given(kwargs: dict) -> dict:
    """What a guess must agree with: of an odd depth, shapes show the even one below."""
    return {**kwargs, "depth": kwargs["depth"] - kwargs["depth"] % 2}


@pytest.mark.parametrize(("name", "key"), SINGLE)
def test_state_dict(name, key):
    g, meta = FILES[name], FILES[name].meta[key]
    checkpoint = read(ROOM / "checkpoints" / meta["file"], **known(meta["kwargs"]))
    assert {k: checkpoint.arguments[k] for k in meta["kwargs"]} == given(meta["kwargs"])
    out = checkpoint.build()(g[f"{key}/x"], g[f"{key}/t"], g.get(f"{key}/y", f"{key}/context"))
    assert error(out, g[f"{key}/out"]) <= FORWARD


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("which", NETWORKS)
def test_training_checkpoints(name, which):
    g = FILES[name]
    kwargs = g.meta["ckpt"]["kwargs"]
    folders = {path.stem: path for path in ROOM.glob("checkpoints/run/ckpts/*.ckpt")}
    assert folders
    (inputs,) = [key for _, key in SINGLE if g.meta[key]["kwargs"] == kwargs]
    for step, folder in folders.items():
        net = read(folder, which, **known(kwargs)).build()
        out = net(g[f"{inputs}/x"], g[f"{inputs}/t"], g.get(f"{inputs}/y"))
        assert error(out, g[f"ckpt{step}/{NETWORKS[which]}_out"]) <= FORWARD
    latest = max(folders, key=int)
    assert read(folders[latest].parent, which, **known(kwargs)).path.parent == folders[latest]


AUTOENCODERS = sorted(ROOM.glob("autoencoder*.npz"))
if ROOM != ROOT / "tests" / "golden" / "uvit":  # where its weights are left out for their size
    assert AUTOENCODERS, f"{ROOM}: no golden file autoencoder*.npz"


@pytest.mark.parametrize("name", [path.stem for path in AUTOENCODERS])
def test_autoencoder(name, tmp_path):
    g = GoldenFile(name)
    scale = g.meta["scale_factor"]
    convert_autoencoder(ROOM / g.meta["state"].split()[0], tmp_path / "vae", scale)
    channels = g.meta["embed_dim"]
    encoder = StabilityVAEEncoder(str(tmp_path / "vae"), [0.0] * channels, [FINAL_STD / scale] * channels)
    vae = encoder.vae(torch.device("cpu"))
    with torch.inference_mode():
        for suffix in ("", "_rect"):
            moments = vae.encode(g[f"img{suffix}"]).latent_dist.parameters
            assert (moments - g[f"moments{suffix}"]).abs().max() <= DECODED
        assert (vae.decode(g["z"] / scale).sample - g["dec"]).abs().max() <= DECODED
        mean = g["moments_rect"].chunk(2, dim=1)[0]
        assert (vae.decode(mean / scale).sample - g["dec_rect"]).abs().max() <= DECODED


@pytest.mark.parametrize("path", sorted(ROOM.glob("autoencoder_key_map*.csv")), ids=lambda path: path.stem)
def test_names_of_the_autoencoder(path):
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    levels = len(
        {row["reference_key"].split(".")[2] for row in rows if row["reference_key"].startswith("encoder.down.")}
    )
    assert rows and all(diffusers_name(row["reference_key"], levels) == row["diffusers_key"] for row in rows)
