"""Our numbers against the golden values in tests/golden (tolerances in its README)."""

import numpy as np
import pytest
import torch
from conftest import Golden

from training import networks_edm2 as edm2
from training import phema
from training.config.ema import parse_std_list
from training.losses import EDM2Loss
from training.lr import learning_rate_schedule
from training.samplers.edm import edm_sampler
from training.samplers.noise import StackedRandomGenerator

FORWARD, TRAJECTORY = 1e-5, 1e-4


def test_primitives(check):
    g = Golden("primitives")
    x, y, z = g["x"], g["y"], g["z"]
    check(edm2.normalize(x), g["normalize_all"], FORWARD)
    check(edm2.normalize(x, dim=1), g["normalize_dim1"], FORWARD)
    check(edm2.normalize(g["w"]), g["normalize_w"], FORWARD)
    for taps, name in [((1, 1), "11"), ((1, 3, 3, 1), "1331")]:
        check(edm2.resample(x, f=taps, mode="down"), g[f"down_{name}"], FORWARD)
        check(edm2.resample(x, f=taps, mode="up"), g[f"up_{name}"], FORWARD)
    assert edm2.resample(x, mode="keep") is x
    check(edm2.mp_silu(x), g["mp_silu"], FORWARD)
    check(edm2.mp_sum(x, y, t=0.3), g["mp_sum_03"], FORWARD)
    check(edm2.mp_sum(x, y), g["mp_sum_05"], FORWARD)
    check(edm2.mp_cat(x, z), g["mp_cat_05"], FORWARD)
    check(edm2.mp_cat(x, z, t=0.3), g["mp_cat_03"], FORWARD)


def test_fourier(check):
    g = Golden("primitives")
    fourier = edm2.MPFourier(16)
    fourier.load_state_dict({"freqs": g["fourier_freqs"], "phases": g["fourier_phases"]})
    check(fourier(g["fourier_in"]), g["fourier_out"], FORWARD)


def test_mpconv(check):
    g = Golden("primitives")
    conv = edm2.MPConv(6, 5, kernel=[3, 3])
    conv.load_state_dict({"weight": g["mpconv_train_w_after"]})
    check(conv(g["x"]), g["mpconv_train_out"], FORWARD)
    # The file holds the weight only as it was after its forced normalisation. The eval outputs came before
    # that, from a weight that normalises to this one.
    assert torch.equal(g["mpconv_w"], g["mpconv_train_w_after"])
    conv.shared_weight = g["mpconv_w"] / 54**0.5
    check(conv(g["x"]), g["mpconv_eval_gain1"], FORWARD)
    check(conv(g["x"], gain=0.7), g["mpconv_eval_gain07"], FORWARD)
    edm2.normalize_weights_(conv)
    check(conv.weight, edm2.normalize(g["mpconv_w"]), FORWARD)
    linear = edm2.MPConv(6, 4, kernel=[])
    linear.load_state_dict({"weight": g["mplinear_w"]})
    check(linear(g["mplinear_in"]), g["mplinear_out"], FORWARD)


@pytest.mark.parametrize("shared", [False, True], ids=["per-call", "effective_weights"])
@pytest.mark.parametrize("name", ["network_plain", "network_uncond", "network_variants"])
def test_network(name, shared, check):
    g = Golden(name)
    net = g.network()
    x, sigma = g["x"], g["sigma"]
    labels = g["labels"] if "labels" in g.arrays else None

    def run():
        D_x, logvar = net(x, sigma, labels, return_logvar=True)
        return D_x, logvar, net(x, sigma)

    if shared:
        with torch.inference_mode(), edm2.effective_weights(net):
            D_x, logvar, D_x_nolabel = run()
    else:
        D_x, logvar, D_x_nolabel = run()
    check(D_x, g["D_x"], FORWARD)
    check(logvar, g["logvar"], FORWARD)
    check(D_x_nolabel, g["D_x_nolabel"], FORWARD)

    net.train()
    edm2.normalize_weights_(net)

    def backward():
        D_x, logvar = net(x, sigma, labels, return_logvar=True)
        ((D_x**2).mean() + logvar.mean()).backward()

    if shared:
        with edm2.effective_weights(net):
            backward()
    else:
        backward()
    expected = g.state("grad")
    assert expected.keys() == dict(net.named_parameters()).keys()
    for key, parameter in net.named_parameters():
        check(parameter.grad, expected[key], TRAJECTORY, key)


def test_unet(check):
    for name in ["network_plain", "network_uncond", "network_variants"]:
        g = Golden(name)
        labels = g["labels"] if "labels" in g.arrays else None
        out = g.network().unet(g["x"], g["sigma"].log() / 4, labels)
        check(out, g["unet_out"], FORWARD, name)


def test_loss(check):
    g = Golden("loss_and_lr")
    net = g.network()
    for P_mean, P_std in [(-0.4, 1.0), (-0.8, 1.6)]:
        loss_fn = EDM2Loss(P_mean, P_std)
        sigma = loss_fn.noise_levels(g["rnd_normal"].flatten())
        loss = loss_fn(net, g["images"], g["labels"], sigma=sigma, noise=g["noise"])
        check(loss, g[f"loss_Pmean{P_mean}_Pstd{P_std}"], FORWARD)


def test_learning_rate(check):
    g = Golden("loss_and_lr")
    for batch, lr, batches, rampup in [
        (2048, 0.012, 70000, 10),
        (2048, 0.01, 35000, 10),
        (128, 0.017, 1000, 0),
        (512, 0.01, 0, 1),
    ]:
        expected = g[f"lr_batch{batch}_ref{lr}_batches{batches}_rampup{rampup}"]
        actual = [learning_rate_schedule(int(n), batch, lr, batches, rampup) for n in g["lr_nimg"]]
        check(actual, expected, 1e-12)


def test_phema_maths(check):
    g = Golden("phema_math").arrays
    check(phema.std_to_exp(g["std"]), g["std_to_exp"], 1e-9)
    check(phema.exp_to_std(g["exp"]), g["exp_to_std"], 1e-12)
    stds = [0.05, 0.1, 0.2]
    check(phema.power_function_response(100, stds, 120), g["response_ofs100_std"], 1e-9)
    corr = phema.power_function_correlation(g["corr_a_ofs"], g["corr_a_std"], g["corr_b_ofs"], g["corr_b_std"])
    check(corr, g["corr"], 1e-9)
    for std in [0.05, 0.10]:
        beta = phema.power_function_beta(std, g["beta_t_next"], 2048)
        check(beta, g[f"beta_std{std:.2f}_delta2048"], 1e-9)
    coefs = phema.solve_posthoc_coefficients(
        g["solve_in_ofs"], g["solve_in_std"], g["solve_out_ofs"], g["solve_out_std"]
    )
    check(coefs, g["solve_coefs"], 1e-6)
    check(parse_std_list("0.010,0.015,...,0.250"), g["parse_std"], 1e-12)


def test_sampler(check):
    g = Golden("sampler")
    net, gnet = g.network(), g.network("gstate", "gkwargs")
    seeds = g.arrays["seeds"].tolist()
    rnd = StackedRandomGenerator("cpu", seeds)
    noise = rnd.randn([len(seeds), 3, 16, 16])
    assert torch.equal(noise, g["noise"])
    label_idx = rnd.randint(net.label_dim, [len(seeds)])
    assert torch.equal(label_idx, g["label_idx"])
    labels = torch.eye(net.label_dim)[label_idx]
    with torch.inference_mode():
        images = edm_sampler(net, noise, labels, num_steps=18)
        check(images, g["heun18"], TRAJECTORY)
        check(edm_sampler(net, noise, labels, gnet, num_steps=8, guidance=2), g["heun8_guidance2"], TRAJECTORY)
        out = edm_sampler(net, noise, labels, num_steps=6, sigma_min=0.01, sigma_max=10, rho=5, dtype=torch.float64)
        check(out, g["heun6_f64"], TRAJECTORY)
        churn = StackedRandomGenerator("cpu", seeds)
        out = edm_sampler(
            net,
            noise,
            labels,
            num_steps=8,
            S_churn=40,
            S_min=0.05,
            S_max=50,
            S_noise=1.003,
            randn_like=churn.randn_like,
        )
        check(out, g["churn_heun8"], TRAJECTORY)


def test_training_trajectory(check):
    """Six optimiser steps of two accumulation rounds each, with all EMAs."""
    g = Golden("training_trajectory")
    m = g.meta
    batch, rounds = m["batch"], m["accumulation_rounds"]
    net = g.network("init").train()
    loss_fn = EDM2Loss(m["P_mean"], m["P_std"], m["sigma_data"])
    optimizer = torch.optim.Adam(net.parameters(), betas=tuple(m["betas"]), eps=m["eps"])
    ema = phema.PowerFunctionEMA(net, m["ema_stds"])
    traditional = phema.TraditionalEMA(net, **m["traditional_ema"])
    labels = torch.eye(net.label_dim)[g["label_idx"]]
    losses, lrs = [], []
    for step in range(m["steps"]):
        nimg = step * batch
        lrs.append(learning_rate_schedule(nimg, batch, **m["lr"]))
        optimizer.param_groups[0]["lr"] = lrs[-1]
        optimizer.zero_grad()
        with edm2.effective_weights(net, normalize_first=True):
            for part in torch.arange(nimg, nimg + batch).chunk(rounds):
                sigma = loss_fn.noise_levels(g["rnd_normal"][part].flatten())
                loss = loss_fn(net, g["images"][part], labels[part], sigma=sigma, noise=g["noise"][part])
                (loss.sum() / batch).backward()
                losses.append(loss.mean().item())
        optimizer.step()
        ema.update(nimg + batch, batch)
        traditional.update(nimg + batch, batch)
    check(lrs, g["lrs"], 1e-9)
    check(np.reshape(losses, [m["steps"], rounds]), g["losses"], TRAJECTORY)
    averaged = {f"ema{suffix}": ema_net for ema_net, suffix in ema.get()}
    for prefix, trained in [("final", net), *averaged.items(), ("trad", traditional.get())]:
        state = trained.state_dict()
        for key, expected in g.state(prefix).items():
            check(state[key], expected, TRAJECTORY, f"{prefix}/{key}")
