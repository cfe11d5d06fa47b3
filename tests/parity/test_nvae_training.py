"""NVAE's objective, regularisers, optimiser and schedules against golden values, and whole trainings with them."""

import itertools

import pytest
import torch
from conftest import Golden
from nvae_golden import (
    EXPECTED,
    FORWARD,
    GRADIENT,
    SMALL_SET,
    files,
    published_network,
    published_objective,
    start_power_method,
    stored_noise,
)

from training.losses_vae import (
    annealed_weight,
    balanced_kl,
    balancing_factors,
    image_values,
    kl_coefficient,
    max_abs_scales,
    reconstruction_loss,
)
from training.lr import warmup_cosine_by_epochs
from training.networks.nvae_distributions import BernoulliDecoder, LogisticMixtureDecoder, NormalDecoder
from training.networks.nvae_layers import batch_norms, convolutions, effective_weights

LOSSES, OPTIMISER = Golden("nvae/losses"), Golden("nvae/optimiser")
SCHEDULE, OPTIMISER_STEP, TRAJECTORY, BIAS = 1e-6, 1e-6, 1e-4, 1e-3
TRAININGS = sorted({"/".join(name.split("/")[:2]) for name in OPTIMISER.arrays.files if name.startswith("train/")})


# ---------------------------------------------------------------------------------------------------------
# Parts of the objective


def test_kl_coefficient(close):
    total = int(LOSSES["kl_coeff/total_iter"])
    betas = [kl_coefficient(int(step), total) for step in LOSSES.arrays["kl_coeff/step"]]
    close(betas, LOSSES["kl_coeff/value"], SCHEDULE)


def test_annealed_weight(close):
    betas = [kl_coefficient(int(step), int(LOSSES["kl_coeff/total_iter"])) for step in LOSSES.arrays["kl_coeff/step"]]
    initial, final = LOSSES.arrays["wdn_anneal/init_final"]
    close([annealed_weight(beta, initial, final) for beta in betas], LOSSES["wdn_anneal/value"], SCHEDULE)


@pytest.mark.parametrize("i", range(len(LOSSES.meta["balancer_groups"])))
def test_balancer(i, close):
    alpha = balancing_factors(LOSSES.meta["balancer_groups"][i])
    close(alpha, LOSSES[f"balancer/{i}/alpha_square"], SCHEDULE)
    cases = {name.split("/")[2] for name in LOSSES.arrays.files if name.startswith(f"balancer/{i}/beta")}
    assert cases
    for case in cases:
        kl_all = LOSSES[f"balancer/{i}/kl"].requires_grad_()
        kl, coeffs = balanced_kl(kl_all, alpha, float(case.removeprefix("beta")))
        close(kl, LOSSES[f"balancer/{i}/{case}/kl"], FORWARD, case)
        close(coeffs, LOSSES[f"balancer/{i}/{case}/coeffs"], SCHEDULE, case)
        close(kl_all.mean(dim=0), LOSSES[f"balancer/{i}/{case}/kl_vals"], FORWARD, case)
        kl.mean().backward()
        close(kl_all.grad, LOSSES[f"balancer/{i}/{case}/grad_of_mean"], SCHEDULE, case)


class Net:
    """A decoder and what the reconstruction loss asks of a network."""

    def __init__(self, decoder, loss_crop: int = 0):
        self.decoder, self.loss_crop = decoder, loss_crop


def test_reconstruction(close):
    logits, x = LOSSES["recon/bernoulli/logits"], LOSSES["recon/bernoulli/x"]
    for crop, name in [(2, "crop"), (0, "nocrop")]:
        close(reconstruction_loss(Net(BernoulliDecoder(), crop), logits, x), LOSSES[f"recon/bernoulli/{name}"], FORWARD)
    logits, x = LOSSES["recon/dml/logits"], LOSSES["recon/dml/x"]
    net = Net(LogisticMixtureDecoder(3, logits.shape[1] // 10, published=True))
    close(reconstruction_loss(net, logits, x), LOSSES["recon/dml/loss"], FORWARD)
    net = Net(NormalDecoder(3, published=True))
    close(reconstruction_loss(net, LOSSES["recon/normal/logits"], x), LOSSES["recon/normal/loss"], FORWARD)


def spectral_case():
    args = {**LOSSES.meta["spectral_args"], "num_x_bits": 8}
    net = published_network(args, LOSSES.state("spectral/state"))
    objective = published_objective(net, {"weight_decay_norm": 1.0}, total=1)
    start = {f"{kind}/{key}": draws for kind in "uv" for key, draws in LOSSES.state(f"spectral/init_{kind}").items()}
    start_power_method(objective, start)
    return net, objective.spectral_norms


def test_spectral_norms(close):
    """Five calls in a row: sums, vectors, gradients; then the singular values of each layer against the exact ones."""
    net, norms = spectral_case()
    names = {conv: name for name, conv in net.named_modules()}
    assert [names[conv] for conv in convolutions(net)] == LOSSES.arrays["spectral/conv_order"].tolist()
    for call, expected in enumerate(LOSSES["spectral/loss_calls"], 1):
        close(norms(net.weight_stacks()), expected, FORWARD, f"call {call}")
        for key, vectors in LOSSES.state(f"spectral/after{call}").items():
            close(norms.get_buffer(key.replace("/", "_")), vectors, 1e-3, key)  # directions converge last
    total = norms(net.weight_stacks())
    close(total, LOSSES["spectral/loss_call5"], FORWARD)
    total.backward()
    gradients = LOSSES.state("spectral/grad5")
    largest = max(g.abs().max() for g in gradients.values())
    assert {name for name, p in net.named_parameters() if p.grad is not None} == set(gradients)
    for name, expected in gradients.items():
        assert (net.get_parameter(name).grad - expected).abs().max() <= GRADIENT * largest, name
    stacks = {shape: iter(w) for shape, w in net.weight_stacks().items()}
    shapes = [tuple(shape) for shape in LOSSES["spectral/conv_shape_out_cols"].tolist()]
    exact = [torch.linalg.matrix_norm(next(stacks[shape]).double(), 2).item() for shape in shapes]
    close(exact, LOSSES["spectral/exact_sigma"], FORWARD)
    close(total, LOSSES["spectral/exact_sum"], 1e-3)


def test_batch_norm_scales(close):
    net, _ = spectral_case()
    names = {norm: name for name, norm in net.named_modules()}
    assert [names[norm] for norm in batch_norms(net)] == LOSSES.arrays["spectral/bn_order"].tolist()
    close(max_abs_scales(net.batch_norm_scales()), LOSSES["batchnorm/loss"], FORWARD)
    close([max_abs_scales([gamma]).item() for gamma in net.batch_norm_scales()], LOSSES["batchnorm/per_layer"], FORWARD)


# ---------------------------------------------------------------------------------------------------------
# Optimiser and learning rate


def test_adamax(close):
    m, g = OPTIMISER.meta["adamax"], OPTIMISER
    count = len({name.split("/")[1] for name in g.arrays.files if name.startswith("adamax/p")})
    params = [torch.nn.Parameter(g[f"adamax/p{i}/init"]) for i in range(count)]
    optimizer = torch.optim.Adamax(
        params, m["lr"], tuple(m["betas"]), m["eps"], weight_decay=m["weight_decay"], foreach=True
    )
    for step in itertools.takewhile(lambda t: f"adamax/step{t}/p0/grad" in g.arrays, itertools.count()):
        optimizer.param_groups[0]["lr"] = m["lr"] if step < 3 else m["lr_from_step3"]
        for i, p in enumerate(params):
            p.grad = g[f"adamax/step{step}/p{i}/grad"]
        optimizer.step()
        for i, p in enumerate(params):
            close(p, g[f"adamax/step{step}/p{i}/value"], OPTIMISER_STEP)
            for name in ("exp_avg", "exp_inf"):
                close(optimizer.state[p][name], g[f"adamax/step{step}/p{i}/{name}"], OPTIMISER_STEP)
    assert optimizer.state[params[0]]["step"] > 1


@pytest.mark.parametrize("i", range(len(OPTIMISER.meta["lr_cases"])))
def test_learning_rate(i, close):
    case, batch = OPTIMISER.meta["lr_cases"][i], 7

    def lr(step: int) -> float:
        return warmup_cosine_by_epochs(
            step * batch,
            batch,
            case["iters_per_epoch"],
            case["epochs"],
            case["warmup_epochs"],
            case["learning_rate"],
            case["learning_rate_min"],
        )

    steps = case["epochs"] * case["iters_per_epoch"]
    close([lr(step) for step in range(steps)], OPTIMISER[f"lr/{i}/per_iteration"], SCHEDULE)
    ends = [lr((epoch + 1) * case["iters_per_epoch"] - 1) for epoch in range(case["epochs"])]
    close(ends, OPTIMISER[f"lr/{i}/end_of_epoch"], SCHEDULE)


# ---------------------------------------------------------------------------------------------------------
# Whole trainings


@pytest.mark.parametrize("prefix", TRAININGS)
def test_training(prefix, close):
    """Every step of a published training: losses, weights, batch norm, optimiser and power method at its end."""
    g, m = OPTIMISER, OPTIMISER.meta[prefix]
    args = m["args"]
    net = published_network(args, g.state(f"{prefix}/state0")).train()
    objective = published_objective(net, args, args["num_total_iter"])
    start_power_method(objective, g.state(f"{prefix}/sr_init"))
    optimizer = torch.optim.Adamax(net.parameters(), eps=1e-3, weight_decay=args["weight_decay"], foreach=True)
    records: dict[str, list] = {}
    for step in range(m["steps"]):
        lr = warmup_cosine_by_epochs(
            step,
            1,
            m["iters_per_epoch"],
            args["epochs"],
            args["warmup_epochs"],
            args["learning_rate"],
            args["learning_rate_min"],
        )
        optimizer.param_groups[0]["lr"] = lr
        images = g[f"{prefix}/x/{step}"]
        x = images.float() / 255 if net.decoder.levels == 2 else image_values(net.decoder, images)
        optimizer.zero_grad()
        with effective_weights(net):
            losses = objective(net, x, nimg=step, noise=stored_noise(g, f"{prefix}/eps/{step}"))
            loss = losses.mean() + objective.regularizer(net, step)
            loss.backward()
        optimizer.step()
        report = objective.report()
        values = dict(
            loss=loss, recon=report["recon"], balanced_kl=losses.mean() - report["recon"], kl_sum=report["kl"], lr=lr
        )
        values |= dict(beta=report["beta"], norm_loss=report["spectral_norms"], bn_loss=report["bn_scales"])
        values |= dict(coeffs=report["kl_coeffs"], kl_vals=report["kl_groups"])
        for key, value in values.items():
            records.setdefault(key, []).append(value.tolist() if isinstance(value, torch.Tensor) else value)
        if step + 1 == m["iters_per_epoch"]:
            compare_weights(net, g.state(f"{prefix}/after_epoch0"))
    for key in ("loss", "recon", "kl_sum", "beta", "norm_loss", "bn_loss", "lr"):
        close(records[key], g[f"{prefix}/{key}"], FORWARD, key)
    for key in ("balanced_kl", "coeffs", "kl_vals"):
        close(records[key], g[f"{prefix}/{key}"], TRAJECTORY, key)
    compare_weights(net, g.state(f"{prefix}/final"))
    for kind in ("exp_avg", "exp_inf"):
        for name, expected in g.state(f"{prefix}/final_{kind}").items():
            actual = optimizer.state[net.get_parameter(name)][kind]
            largest = max(value.abs().max() for value in g.state(f"{prefix}/final_{kind}").values())
            assert (actual - expected).abs().max() <= TRAJECTORY * largest, f"{kind} {name}"


def compare_weights(net, expected: dict[str, torch.Tensor]) -> None:
    """Biases before a batch norm have gradient 0: rounding decides where they go."""
    state = net.state_dict()
    assert expected
    for name, value in expected.items():
        error = (state[name].double() - value.double()).abs().max()
        assert error <= (BIAS if name.endswith("bias") else TRAJECTORY), f"{name}: {error:.1e}"


@pytest.mark.skipif(EXPECTED == SMALL_SET, reason="only the whole set has them")
def test_there_are_trainings():
    assert TRAININGS and files("optimiser")
