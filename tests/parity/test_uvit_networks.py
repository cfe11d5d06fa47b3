"""U-ViT's network against the golden values of the published one (tolerances in the README of the golden files)."""

import pytest
import torch
from uvit_golden import GoldenFile, error, names, network, rule_p

from training.networks.uvit import UViT, patchify, timestep_embedding, unpatchify

FORWARD, GRADIENT, PRESET, EMBEDDING = 2e-5, 1e-4, 5e-4, 1e-4
LARGE = 100_000_000  # parameters


def tokens_of(net: UViT, blocks: list[str]) -> dict[str, torch.Tensor]:
    """Where the outputs of these modules will be after a call."""
    seen = {}
    for block in blocks:
        net.get_submodule(block).register_forward_hook(lambda _m, _i, out, block=block: seen.update({block: out}))
    return seen


NETWORKS = [name for name in names("networks_*") if "out" in GoldenFile(name).arrays]
assert NETWORKS


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name, record_property):
    g = GoldenFile(name)
    net = network(g.meta["kwargs"], g.meta["cls"], g.below("state"))
    assert list(net.state_dict()) == g.meta["state_keys"]
    assert sum(p.numel() for p in net.parameters()) == g.meta["params"]
    x = g["x"].requires_grad_()
    cond = g.get("y", "context")
    if cond is not None and cond.is_floating_point():
        cond.requires_grad_()
    expected_tokens = g.below("tokens")
    seen = tokens_of(net, list(expected_tokens))
    out = net(x, g["t"], cond)
    errors = {"out": error(out, g["out"])}
    errors |= {block: error(seen[block], value) for block, value in expected_tokens.items()}
    record_property("largest_error", max(errors.values()))
    assert max(errors.values()) <= FORWARD, errors

    out.square().mean().backward()
    gradients = {key: p.grad for key, p in net.named_parameters() if p.grad is not None}
    expected = g.below("grad")
    assert expected.keys() == gradients.keys() - set(g.meta["no_grad_params"])
    errors = {key: error(gradients[key], value) for key, value in expected.items()}
    errors["x"] = error(x.grad, g["grad_x"])
    if cond is not None and cond.requires_grad:
        assert cond.grad is not None
        errors["context"] = error(cond.grad, g["grad_context"])
    record_property("largest_gradient_error", max(errors.values()))
    assert max(errors.values()) <= GRADIENT, errors


@pytest.mark.parametrize("name", names("networks_functions*"))
def test_functions(name):
    g = GoldenFile(name)
    embeddings = [key.split("_")[1:] for key in g.arrays if key.startswith("emb_") and key != "emb_t"]
    images = [key.split("_")[1:] for key in g.arrays if key.startswith("img_")]
    assert embeddings and images
    for dim, *rest in embeddings:
        options = {"max_period": float(rest[0].removeprefix("maxperiod"))} if rest else {}
        actual = timestep_embedding(g["emb_t"], int(dim), **options)
        assert (actual - g["_".join(["emb", dim, *rest])]).abs().max() <= EMBEDDING
    for key in ("_".join(parts) for parts in images):
        x, p = g[f"img_{key}"], int(key.rsplit("p", 1)[1])
        assert torch.equal(patchify(x, p), g[f"patches_{key}"])
        assert torch.equal(unpatchify(patchify(x, p), (x.shape[2] // p, x.shape[3] // p), p), x)


@pytest.mark.parametrize("name", names("networks_init_stats*"))
def test_initial_values(name):
    g = GoldenFile(name)
    torch.manual_seed(0)
    net = network(g.meta["kwargs"])
    assert g.meta["names"] == [key for key, _ in net.named_parameters()]
    for key, (mean, std, absmax) in zip(g.meta["names"], g["stats"].tolist(), strict=True):
        p = net.get_parameter(key)
        if std == 0:
            assert (p == mean).all(), key
        elif p.numel() > 500:
            assert p.std().item() == pytest.approx(std, rel=0.1), key
            assert abs(p.mean().item() - mean) <= 6 * std / p.numel() ** 0.5, key
        assert p.abs().max() <= 2 * absmax + 1e-12, key


PRESETS = {name: GoldenFile(name).meta["params"] > LARGE for name in names("preset_*")}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if slow else ()) for n, slow in PRESETS.items()]
)
def test_preset(name, record_property):
    g = GoldenFile(name)
    meta = g.meta
    net = network(meta["kwargs"], meta["cls"]).requires_grad_(False)
    assert sum(p.numel() for p in net.parameters()) == meta["params"]
    rule_p(net)

    def sines(shape: list[int]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return torch.sin(0.37 * torch.arange(count, dtype=torch.float64)).reshape(shape).float()

    x = sines(list(g["out"].shape))
    cond = g.get("y")
    if meta["context"] is not None:
        cond = sines([len(x), net.extras - 1, meta["kwargs"]["clip_dim"]])
    out = net(x, g["t"], cond)
    difference = (out - g["out"]).abs().max().item()
    record_property("largest_error", difference)
    assert difference <= PRESET
    assert out.mean().item() == pytest.approx(meta["mean"], abs=PRESET)
    assert out.std(correction=0).item() == pytest.approx(meta["std_population"], abs=PRESET)
