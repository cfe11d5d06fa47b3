"""NVAE's objective: schedules, balancing, regularisers, exact resumes, processes."""

import math

import pytest
import torch
import torch.multiprocessing as mp

from torch_utils import distributed
from training.losses_vae import (
    SpectralNorms,
    VAEObjective,
    balanced_kl,
    balancing_factors,
    image_values,
    kl_coefficient,
)
from training.lr import warmup_cosine
from training.networks.nvae import NVAE
from training.networks.nvae_distributions import BernoulliDecoder, LogisticMixtureDecoder
from training.networks.nvae_layers import effective_weights
from training.samplers import StackedRandomGenerator

OPTIONS = dict(
    num_latent_scales=2,
    num_groups_per_scale=1,
    num_latent_per_group=3,
    num_channels_enc=4,
    num_channels_dec=4,
    num_preprocess_blocks=0,
    num_postprocess_blocks=0,
    num_mixture_dec=2,
    use_se=True,
    res_dist=True,
    num_nf=1,
)
TOTAL = 400


def training(seed: int = 0):
    torch.manual_seed(seed)
    net = NVAE(8, 1, **OPTIONS).train()
    objective = VAEObjective(net, TOTAL, weight_decay_norm=0.1)
    optimizer = torch.optim.Adamax(net.parameters(), lr=0.01, eps=1e-3, foreach=True)
    return net, objective, optimizer


def step(net, objective, optimizer, nimg: int, batch: int = 8, part=slice(None)) -> torch.Tensor:
    """One step on images and noise that depend on `nimg` alone; `part` of the batch is this process's."""
    images = torch.randint(256, (batch, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(nimg))[
        part
    ]
    rnd = StackedRandomGenerator("cpu", list(range(nimg, nimg + batch))[part])
    optimizer.zero_grad()
    with effective_weights(net):
        losses = objective(net, images, rnd=rnd, nimg=nimg)
        regularizer = objective.regularizer(net, nimg) / distributed.get_world_size()
        (losses.sum() / batch + regularizer).backward()
    for p in net.parameters():
        if p.grad is not None:
            distributed.all_reduce_sum_(p.grad)
    optimizer.step()
    return losses.detach()


def test_resume_is_exact():
    net, objective, optimizer = training()
    for nimg in range(0, 32, 8):
        step(net, objective, optimizer, nimg)
    states = [
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in m.state_dict().items()}
        for m in (net, objective)
    ]
    optimizer_state = optimizer.state_dict()
    optimizer_state = {
        **optimizer_state,
        "state": {i: {k: v.clone() for k, v in s.items()} for i, s in optimizer_state["state"].items()},
    }
    for nimg in range(32, 64, 8):
        step(net, objective, optimizer, nimg)
    other, other_objective, other_optimizer = training(seed=1)
    other.load_state_dict(states[0])
    other_objective.load_state_dict(states[1])
    other_optimizer.load_state_dict(optimizer_state)
    for nimg in range(32, 64, 8):
        step(other, other_objective, other_optimizer, nimg)
    for key, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    for key, value in objective.state_dict().items():
        assert torch.equal(other_objective.state_dict()[key], value), key


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    state = train(world, rank)
    if rank == 0:
        torch.save(state, f"{folder}/state.pt")
    distributed.shutdown()


def train(world: int, rank: int) -> dict[str, torch.Tensor]:
    net, objective, optimizer = training()
    share = 8 // world
    for nimg in range(0, 32, 8):
        step(net, objective, optimizer, nimg, part=slice(rank * share, (rank + 1) * share))
    return net.state_dict()


def test_two_processes_equal_one(tmp_path):
    """Batch norm and the balancing of KL terms see the whole batch, so that the weights agree to rounding."""
    mp.spawn(work, args=(2, str(tmp_path)), nprocs=2)
    two, one = torch.load(tmp_path / "state.pt"), train(1, 0)
    for key, value in one.items():
        difference = (two[key].double() - value.double()).abs().max()
        assert difference <= 2e-4 * max(1.0, value.abs().max()), f"{key}: {difference:.1e}"


def test_report():
    net, objective, optimizer = training()
    losses = step(net, objective, optimizer, 8)
    report = objective.report()
    assert report["beta"] == kl_coefficient(8, TOTAL)
    assert report["lambda"] == 0.1
    assert report["kl_groups"].shape == report["kl_coeffs"].shape == (net.num_groups,)
    assert report["kl_groups"].sum() == pytest.approx(float(report["kl"]), rel=1e-5)
    assert 0 <= report["active_units"] <= net.num_groups * 3
    assert losses.mean() > report["recon"]
    assert report["spectral_norms"] > 0 and report["bn_scales"] > 0
    assert not any(v.requires_grad for v in report.values() if isinstance(v, torch.Tensor))


def test_regulariser_that_is_off():
    net, _, _ = training()
    assert VAEObjective(net, TOTAL).regularizer(net, 0) is None


def test_annealing_of_lambda():
    net, _, _ = training()
    objective = VAEObjective(
        net, TOTAL, weight_decay_norm=0.01, weight_decay_norm_init=1.0, weight_decay_norm_anneal=True
    )
    weights = [objective.regularizer_weight(nimg) for nimg in (0, TOTAL // 10, TOTAL)]
    assert weights[0] == pytest.approx(1, rel=1e-3) and 0.01 < weights[1] < 1
    assert weights[2] == pytest.approx(0.01)


@pytest.mark.parametrize("shape", [(8, 72), (24, 25), (6, 6)])
def test_power_method_finds_the_largest_singular_values(shape):
    w = torch.randn(5, *shape)
    norms = SpectralNorms({shape: 5})
    for _ in range(100):
        total = norms({shape: w})
    assert total == pytest.approx(float(torch.linalg.matrix_norm(w, 2).sum()), rel=1e-4)


def test_autocast_leaves_power_method_in_float32():
    w = torch.randn(3, 8, 30)
    plain, cast = SpectralNorms({(8, 30): 3}), SpectralNorms({(8, 30): 3})
    with torch.autocast("cpu", torch.bfloat16):
        value = cast({(8, 30): w})
    assert value.dtype == torch.float32 and torch.equal(value, plain({(8, 30): w}))


def test_autocast_leaves_likelihood_in_float32():
    net, objective, _ = training()
    images = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        losses = objective(net, images, nimg=0)
        out = net(image_values(net.decoder, images))
    assert losses.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in out)
    losses.sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in net.parameters())


def test_balancing_keeps_the_mean_and_ignores_signs():
    kl = torch.tensor([[-2.0, 1.0, 4.0], [2.0, 1.0, 4.0]])
    value, coeffs = balanced_kl(kl, [1, 1, 1], 0.5)
    assert coeffs.mean() == pytest.approx(1) and coeffs.argmin() == 1
    assert torch.allclose(value, 0.5 * (kl * coeffs).sum(dim=1))
    assert balancing_factors([4, 1]) == [1, 1, 1, 1, 1]
    assert balancing_factors([20, 10, 5]) == [1] * 5 + [2] * 10 + [4] * 20


@pytest.mark.parametrize("levels", [2, 17, 32, 256])
def test_image_values(levels):
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    decoder = BernoulliDecoder() if levels == 2 else LogisticMixtureDecoder(1, 1, levels)
    values = image_values(decoder, images, pad=1)
    assert values.shape == (1, 1, 18, 18) and (values[:, :, 0] == 0).all()
    assert torch.equal(values.unique(), torch.arange(levels) / (levels - 1))
    inner = values[0, 0, 1:-1, 1:-1].flatten()
    if levels > 2:
        assert (inner.diff() >= 0).all()
    assert torch.equal(image_values(decoder, inner), inner)


def test_seventeen_levels_keep_the_digits():
    """The 17 levels of the digits, stored as round(255 k / 16), come back as k / 16."""
    images = torch.tensor([round(255 * k / 16) for k in range(17)], dtype=torch.uint8).reshape(1, 1, 1, 17)
    values = image_values(LogisticMixtureDecoder(1, 1, 17), images)
    assert torch.equal(values.flatten(), torch.arange(17) / 16)


def test_warmup_cosine():
    assert warmup_cosine(0, 1000, 0.1, 0.01, 100) == 0
    assert warmup_cosine(50, 1000, 0.1, 0.01, 100) == pytest.approx(0.05)
    assert warmup_cosine(100, 1000, 0.1, 0.01, 100) == pytest.approx(0.1)
    assert warmup_cosine(550, 1000, 0.1, 0.01, 100) == pytest.approx(0.055)
    assert warmup_cosine(1000, 1000, 0.1, 0.01, 100) == warmup_cosine(2000, 1000, 0.1, 0.01, 100) == pytest.approx(0.01)
    assert warmup_cosine(0, 1000, 0.1) == pytest.approx(0.1)
    assert math.isclose(warmup_cosine(500, 1000, 0.1), 0.05)
