"""Sampling in the toy example."""

import torch
from conftest import Golden

from training.toy.data import gt
from training.toy.sampling import sample_toy


def test_trajectories(check):
    golden = Golden("toy")
    sampler = golden.meta["sampler"]  # its sigma_min and rho are our defaults
    net, gnet = golden.toy_model("model"), golden.toy_model("gmodel")
    x = golden["sample_x_init"] / sampler["sigma_max"]
    names = [name for name in golden.arrays.files if name.startswith("trajectory")]
    assert names
    for name in names:
        kind = name.removeprefix("trajectory").removeprefix("_")  # "", "gt", or "guided" with the weight
        model = gt("A") if kind == "gt" else net
        guidance = float(kind.removeprefix("guided")) if kind.startswith("guided") else 1
        path: list[torch.Tensor] = []
        sample_toy(model, x, gnet, guidance, sampler["num_steps"], sampler["sigma_max"], path.append)
        check(torch.stack(path), golden[name], 1e-4, name)


def test_guidance_of_weight_one_is_none():
    golden = Golden("toy")
    net, gnet = golden.toy_model("model"), golden.toy_model("gmodel")
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    plain = sample_toy(net, noise, num_steps=4)
    assert torch.equal(sample_toy(net, noise, gnet, 1, num_steps=4), plain)
    assert not torch.equal(sample_toy(net, noise, gnet, 2, num_steps=4), plain)
