"""Networks of score-SDE models against the published ones (tolerances in the README of the golden files)."""

import pytest
import torch
from golden_files import error, rule_p
from score_sde_golden import GoldenFile, entries, filled_network, gradient_errors, names, network, shared_network

# Largest errors of outputs, relative to the largest value, by published names of networks.
FORWARD = {"ncsnpp": 1e-6, "ddpm": 5e-6, "ncsn": 5e-6, "ncsnv2_64": 5e-6, "ncsnv2_128": 2e-5, "ncsnv2_256": 2e-5}
GRADIENT = 1e-6  # relative to the norm of all gradients
PRESET = 1e-3  # absolute
LARGE = 10_000_000  # parameters


@pytest.mark.parametrize(("name", "entry"), entries("networks_*"))
def test_network(name, entry, record_property):
    """Where rounding alone costs the published network more than the tolerance, twice that is allowed: both round."""
    g = GoldenFile(name)
    meta = g.meta[entry]
    if meta.get("weights", "state") == "state":
        net = network(meta["config"])
        state = g.state(entry, meta.get("state_index"))
        assert net.state_dict().keys() == state.keys()
        net.load_state_dict(state)
    else:
        net = filled_network(meta["config"], meta["weights"])
        shapes = {key: list(value.shape) for key, value in net.state_dict().items()}
        assert shapes == meta.get("key_shapes", shapes)
    assert sum(p.numel() for p in net.parameters()) == meta["n_params"]

    x = g[f"{entry}/x"].requires_grad_()
    out = net(x, g[f"{entry}/labels"])
    out.square().mean().backward()
    forward = error(out, g[f"{entry}/out"])
    errors = gradient_errors(net, meta["grad_order"], g, entry)
    record_property("largest_error", forward)
    record_property("largest_gradient_error", max(errors.values()))
    tolerance = FORWARD[meta["config"]["model"]["name"]]
    assert forward <= max(tolerance, 2 * meta["max_abs_f32_vs_f64"] / meta["out_abs_max"])
    rounding = meta["grad_max_abs_err_over_total_grad_norm"]
    assert max(errors.values()) <= max(GRADIENT, 2 * rounding), errors

    assert x.grad is not None
    expected = g[f"{entry}/grad_x"]
    input_error = float((x.grad - expected).abs().max() / expected.norm())
    record_property("largest_input_gradient_error", input_error)
    # What rounding costs the one gradient that it affects most is measured against all of them: see ncsnv2_256, whose
    # published gradient of the input is off by 2e-4 (ours by 2e-5).
    assert input_error <= max(tolerance, 10 * rounding)


@pytest.mark.parametrize("name", names("nets*"))
def test_shared_networks(name):
    """The networks of other files are complete, and give finite images."""
    g = GoldenFile(name)
    for entry, meta in g.entries().items():
        net = shared_network(entry)
        assert net.state_dict().keys() == g.below(entry).keys()
        data = meta["config"]["data"]
        x = torch.zeros(1, data["num_channels"], data["image_size"], data["image_size"])
        assert net(x, torch.ones(1)).isfinite().all()


# What presets change in the network's options; the rest are its defaults.
LARGE_IMAGES = {"progressive": "output_skip", "progressive_input": "input_skip"}
DDPMPP = {"fir": False, "embedding_type": "positional", "scale_by_sigma": False, "centered": True}
PRESETS = {
    "ve/cifar10_ncsnpp_continuous": {"name": "ncsnpp", "progressive_input": "residual"},
    "vp/cifar10_ddpmpp_continuous": {"name": "ncsnpp", **DDPMPP},
    "vp/ddpm/cifar10": {"name": "ddpm"},
    "ve/ffhq_256_ncsnpp_continuous": {
        "name": "ncsnpp",
        "sigma_max": 348,
        "num_scales": 2000,
        "ch_mult": (1, 1, 2, 2, 2, 2, 2),
        "num_res_blocks": 2,
        **LARGE_IMAGES,
    },
    "ve/ffhq_ncsnpp_continuous": {
        "name": "ncsnpp",
        "nf": 16,
        "sigma_max": 1348,
        "num_scales": 2000,
        "ch_mult": (1, 2, 4, 8, 16, 32, 32, 32),
        "num_res_blocks": 1,
        **LARGE_IMAGES,
    },
}
FULL = entries("full_*")


@pytest.mark.parametrize(
    ("name", "entry"),
    [pytest.param(*e, marks=[pytest.mark.slow] * (GoldenFile(e[0]).meta[e[1]]["n_params"] > LARGE)) for e in FULL],
)
def test_preset(name, entry, record_property):
    g = GoldenFile(name)
    meta, expected = g.meta[entry], g[f"{entry}/out"]
    X = meta["X"]
    data = {"image_size": meta["image_size"], "num_channels": X["shape"][1]}
    net = network({"model": PRESETS[meta["preset"]], "data": data}).requires_grad_(False)
    assert sum(p.numel() for p in net.parameters()) == meta["n_params"]
    assert len(net.state_dict()) == meta["n_keys"]
    assert len(net.get_submodule("all_modules")._modules) == meta["n_modules"]
    rule_p(net, meta["phase"])
    k = torch.arange(torch.Size(X["shape"]).numel(), dtype=torch.float64)
    x = X["lo"] + (X["hi"] - X["lo"]) * (0.5 + 0.5 * (X["freq"] * k).sin())
    out = net(x.reshape(X["shape"]).float(), g[f"{entry}/labels"])
    stride = out.shape[-1] // expected.shape[-1]
    record_property("largest_error", error(out[..., ::stride, ::stride], expected))
    torch.testing.assert_close(out[..., ::stride, ::stride], expected, rtol=0, atol=PRESET)
    statistics = [out.mean(), out.std(correction=0), out.flatten()[0], out.flatten()[-1]]
    for value, key in zip(statistics, ("mean", "std", "first", "last"), strict=True):
        assert float(value) == pytest.approx(meta[key], abs=PRESET), key
