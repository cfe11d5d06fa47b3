"""What commands say to bad input about SDEs: one line each, and nothing is written."""

import dataclasses

import pytest
from conftest import fails_with, run_cli

from generate_images import main as generate
from training.config.score_sde_presets import SCORE_PRESETS
from training.encoders import StandardRGBEncoder
from training.families import preset_network
from training.snapshot import save_network

NETWORKS = {
    "ve": ("digits-ve", {}),
    "vp": ("digits-vp", {}),
    "subvp": ("digits-subvp", {}),
    "discrete-vp": ("digits-vp", {"continuous": False}),
}


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nets")
    for name, (preset, changes) in NETWORKS.items():
        chosen = SCORE_PRESETS[preset]
        network = dataclasses.replace(chosen.config.network, **changes)
        net = preset_network(dataclasses.replace(chosen, config=dataclasses.replace(chosen.config, network=network)))
        save_network(folder / f"{name}.safetensors", net, StandardRGBEncoder(*net.spec.pixel_range), {})
    return folder


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("subvp", ["--sampler=pc", "--predictor=ancestral_sampling"], "no ancestral sampling for sub-VP"),
        ("ve", ["--sampler=pc", "--schedule=subvp", "--predictor=ancestral_sampling"], "no ancestral sampling for sub-VP"),
        ("vp", ["--sampler=pc", "--steps=20"], "20 steps are too few for this schedule (beta_max / N is 1): use more"),
        ("vp", ["--sampler=pc", "--steps=20", "--predictor=ancestral_sampling", "--corrector=none"], "too few"),
        ("discrete-vp", ["--sampler=pc", "--steps=10"], "10 steps are too few for this schedule"),
        ("ve", ["--sampler=pc", "--snr=0"], "--snr must be positive"),
        ("ve", ["--sampler=pc", "--snr=-0.1"], "--snr must be positive"),
        ("ve", ["--sigma_max=6"], "--sigma_max=6 is beyond the noise levels of the network, 0.01 to 5"),
        ("ve", ["--sampler=pc", "--sigma_min=0.001"], "--sigma_min=0.001 is beyond the noise levels of the network"),
        ("vp", ["--sampler=rk45", "--sigma_max=200"], "--sigma_max=200 is beyond the noise levels of the network"),
        ("vp", ["--sampler=pc", "--predictor=ancestral_sampling", "--probability-flow=1"], "no probability flow"),
        ("vp", ["--sampler=rk45", "--rtol=0"], "--rtol must be positive"),
        ("vp", ["--class=3"], "class"),
    ],
)  # fmt: skip
def test_bad_samplers(nets, tmp_path, name, options, message):
    out = tmp_path / "out"
    fails_with(run_cli(generate, f"--net={nets / name}.safetensors", f"--outdir={out}", "--seeds=0", *options), message)
    assert not list(out.rglob("*.png"))
