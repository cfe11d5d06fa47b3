"""Functions of score-SDE models against the published ones (tolerances in the README of the golden files)."""

import ast
import re

import pytest
import torch
from golden_files import error
from score_sde_golden import GoldenFile, denoiser, entries, gradient_errors, names, schedule, shared_network

from training.losses import ScoreLoss
from training.networks import fir, ncsnv2, score_layers
from training.networks.ncsnpp import Combine
from training.samplers.grids import sde_grid
from training.samplers.predictor_corrector import Times, reverse_diffusion
from training.schedules import VE, DiscreteVE, DiscreteVP, SubVP

EXACT, CLOSE, FOURIER = 1e-10, 1e-6, 1e-4  # 1 - exp costs the published std some digits even in float64


def check(actual: torch.Tensor, expected: torch.Tensor, relative: float = CLOSE) -> None:
    """Compare numbers one by one."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=relative, atol=1e-30)


def columns(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, 1, 1, 1)


# ---------------------------------------------------------------------------------------------------------
# SDEs

SDES = [(name, entry) for name, entry in entries("sdes*") if not entry.startswith("grid/")]
GRIDS = [(name, entry) for name, entry in entries("sdes*") if entry.startswith("grid/")]


def sde_of(meta: dict):
    arguments = dict(zip(meta["arg_names"], meta["args"], strict=True))
    return schedule(meta["kind"], arguments), arguments["N"]


@pytest.mark.parametrize(("name", "entry"), SDES)
def test_sde(name, entry):
    g = GoldenFile(name)
    own, _ = sde_of(g.meta[entry])
    t, x = g["t"], g["x"]
    check(own.std(t), g[f"{entry}/std_f64"], EXACT)
    check(own.diffusion(t), g[f"{entry}/diffusion_f64"], EXACT)
    check(columns(own.scale(t)) * x, g[f"{entry}/mean"])
    check(columns(own.drift(t)) * x, g[f"{entry}/drift"])
    # log p of the prior, N(0, prior_std^2).
    u = x.double() * own.prior_std if isinstance(own, VE) else x.double()
    log_p = torch.distributions.Normal(0, own.prior_std).log_prob(u).flatten(1).sum(1)
    check(log_p, g[f"{entry}/prior_logp"])


@pytest.mark.parametrize(("name", "entry"), SDES)
@pytest.mark.parametrize("flow", [False, True])
def test_reverse_diffusion(name, entry, flow):
    """u - F + G^2 score, of the published index floor(t (N - 1))."""
    g = GoldenFile(name)
    meta = g.meta[entry]
    own, N = sde_of(meta)
    x, t = g["x"].double(), g["t"].double()
    tau = g[f"{entry}/index_floor"].double() / (N - 1)
    a, b, c = (columns(value) for value in reverse_diffusion(own, Times(t, tau), N, flow))
    of_x, of_t = map(float, re.fullmatch(r"(.+)\*x(.+)\*t", meta["score"]).groups())  # type: ignore[union-attr]
    score = of_x * x + of_t * columns(t)
    rev_F = x - (a * x + b * score)
    # Differences of float32 tables are rounded; the description says by how much.
    rounding = meta["rel_err_f32_vs_f64"]
    key = f"{entry}/rev_F/pf{int(flow)}"
    assert error(rev_F, g[key]) <= max(CLOSE, 2 * rounding[f"rev_F/pf{int(flow)}"])
    G = g[f"{entry}/rev_G/pf{int(flow)}"]
    assert error(c.flatten(), G) <= max(CLOSE, 2 * rounding[f"rev_G/pf{int(flow)}"])
    if not flow:
        assert error(c.flatten(), g[f"{entry}/G"]) <= max(CLOSE, 2 * rounding["G"])
        assert error((1 - a) * x, g[f"{entry}/F"]) <= max(CLOSE, 2 * rounding["F"])
    weight = 0.5 if flow else 1.0
    drift = columns(own.drift(t)) * x - weight * columns(own.diffusion(t)) ** 2 * score
    assert error(drift, g[f"{entry}/rev_drift/pf{int(flow)}"]) <= CLOSE


@pytest.mark.parametrize(("name", "entry"), SDES)
def test_tables(name, entry):
    g = GoldenFile(name)
    own, N = sde_of(g.meta[entry])
    tables = g.below(f"{entry}/table")
    tau = torch.linspace(0, 1, N, dtype=torch.float64)
    if isinstance(own, VE):
        check(own.sigma(tau), tables.pop("discrete_sigmas"))
    elif not isinstance(own, SubVP):
        discrete = DiscreteVP(own.beta_min, own.beta_max, N)
        alpha_bar = discrete.log_alpha_bar.exp()
        betas = own.beta(tau) / N
        check(betas, tables.pop("discrete_betas"))
        check(1 - betas, tables.pop("alphas"))
        assert error(discrete.scale(tau), tables.pop("sqrt_alphas_cumprod")) <= CLOSE
        assert error(alpha_bar, tables.pop("alphas_cumprod")) <= CLOSE
        # 1 - alpha_bar has the absolute errors of alpha_bar.
        assert error(1 - alpha_bar, tables.pop("sqrt_1m_alphas_cumprod").double() ** 2) <= CLOSE
    assert not tables


@pytest.mark.parametrize(("name", "entry"), GRIDS)
def test_grid(name, entry):
    g = GoldenFile(name)
    N, end = re.fullmatch(r"grid/N(\d+)_eps(.+)", entry).groups()  # type: ignore[union-attr]
    own = sde_grid(VE(), int(N), float(end))
    assert own.times is not None
    torch.testing.assert_close(own.times[:-1].float(), g[f"{entry}/t"], rtol=CLOSE, atol=0)
    tau = Times.of(own.times[:-1]).tau
    assert torch.equal((tau * (int(N) - 1)).round().int(), g[f"{entry}/index_floor"])
    assert torch.equal(DiscreteVE(num_scales=int(N)).label(own.times[:-1]).int(), g[f"{entry}/ve_label_round"])


# ---------------------------------------------------------------------------------------------------------
# Filters, embeddings and layers


@pytest.mark.parametrize("name", names("fir*"))
def test_filters(name):
    g = GoldenFile(name)
    of_names = re.findall(r"(\w+)=(?:\(([\d,]+)\)|None)", g.meta["kernels"])
    taps = {key: [float(v) for v in values.split(",")] if values else None for key, values in of_names}
    compared = []

    def compare(key: str, actual: torch.Tensor) -> None:
        compared.append(key)
        assert actual.shape == g[key].shape, key
        assert error(actual, g[key]) <= CLOSE, key

    for image in (key[:-2] for key in g.arrays if re.fullmatch(r"\w/x", key)):
        x = g[f"{image}/x"]
        for kernel, values in taps.items():
            compare(f"{image}/up/{kernel}", fir.upsample(x, values))
            compare(f"{image}/down/{kernel}", fir.downsample(x, values))
            compare(f"{image}/conv_down/{kernel}", fir.conv_downsample(x, g[f"{image}/w"], values))
        compare(f"{image}/up_gain2", fir.upsample(x, taps["1331"], gain=2))
        compare(f"{image}/naive_up", score_layers.double(x, None))
        compare(f"{image}/naive_down", score_layers.halve(x, None))
    compare("conv_up/out_repaired", fir.conv_upsample(g["conv_up/x"], g["conv_up/w"], taps["1331"]))
    for entry, meta in g.entries().items():
        compare(entry, fir.upfirdn(g["upfirdn/x"], g["upfirdn/kernel"], meta["up"], meta["down"], tuple(meta["pad"])))
    assert not set(g.arrays) - set(compared) - {key for key in g.arrays if key.endswith(("/x", "/w", "/kernel"))}


@pytest.mark.parametrize("name", names("embeddings*"))
def test_embeddings(name):
    g = GoldenFile(name)
    for labels, prefix in [(g["labels"], "positional"), (g["positional_int/labels"], "positional_int")]:
        found = {key: value for key, value in g.below(prefix).items() if key != "labels"}
        assert found
        for dim, expected in found.items():
            actual = score_layers.positional_embedding(labels, int(dim))
            torch.testing.assert_close(actual, expected, rtol=0, atol=FOURIER)
    layer = score_layers.GaussianFourierProjection(len(g["fourier/W"]), 16.0)
    layer.load_state_dict({"W": g["fourier/W"]})
    torch.testing.assert_close(layer(g["fourier/sigma"].log()), g["fourier/out"], rtol=0, atol=FOURIER)


TAPS = (1, 3, 3, 1)


def layer_of(entry: str, note: str, g: GoldenFile, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The layer of an entry, whose name says which, and its sizes its weights or images."""
    C, out = g[f"{entry}/x"].shape[1], g[f"{entry}/out"].shape[1]
    with_conv, taps = "_conv" in entry, TAPS if entry.endswith("_fir") else None
    if entry.startswith(("biggan", "ddpmpp")):
        o = ast.literal_eval(note)
        biggan = entry.startswith("biggan")
        shortcut = "Conv_2" if biggan else "Conv_2 3x3" if o.get("conv_shortcut") else "NIN_0"
        temb = g.get(f"{entry}/temb")
        return score_layers.ResnetBlock(
            C,
            out,
            emb_channels=None if temb is None else temb.shape[1],
            skip_rescale=o.get("skip_rescale", biggan),
            shortcut=shortcut,
            up=o.get("up", False),
            down=o.get("down", False),
            fir=TAPS if o.get("fir") else None,
        )
    if entry.startswith("ncsn_res"):
        down = "'down'" in note
        dilation = int(re.search(r"dil(\d+)|$", entry).group(1) or 1)  # type: ignore[union-attr]
        return ncsnv2.ResidualBlock(C, out, ncsnv2.InstanceNormPlus, torch.nn.functional.elu, down, dilation)
    layers = {
        "nin": lambda: score_layers.NIN(C, out),
        "attnpp": lambda: score_layers.AttnBlock(C, skip_rescale=entry.endswith("1")),
        "down": lambda: score_layers.Downsample(C, out, with_conv, taps),
        "up": lambda: score_layers.Upsample(C, out, with_conv, taps),
        "ddpm_down": lambda: score_layers.Downsample(C, out, with_conv, None),
        "ddpm_up": lambda: score_layers.Upsample(C, out, with_conv, None),
        "combine": lambda: Combine(C, g[f"{entry}/y"].shape[1], entry.split("_")[1]),
        "instancenormpp": lambda: ncsnv2.InstanceNormPlus(C),
        "cond_instancenormpp": lambda: ncsnv2.ConditionalInstanceNormPlus(C, len(state["embed.weight"])),
        "rcu": lambda: ncsnv2.RCUBlock(C, 2, torch.nn.functional.elu),
        "crp": lambda: ncsnv2.CRPBlock(C, torch.nn.functional.elu),
        "msf": lambda: ncsnv2.MSFBlock([C, g[f"{entry}/y"].shape[1]], out),
    }
    return layers[max((key for key in layers if entry.startswith(key)), key=len)]()


@pytest.mark.parametrize(("name", "entry"), entries("ops*"))
def test_layer(name, entry):
    g = GoldenFile(name)
    meta, state = g.meta[entry], g.below(f"{entry}/state")
    net = layer_of(entry, meta["note"], g, state)
    assert net.state_dict().keys() == state.keys()
    net.load_state_dict(state)
    x, y, temb = g[f"{entry}/x"].requires_grad_(), g.get(f"{entry}/y"), g.get(f"{entry}/temb")
    if isinstance(net, ncsnv2.MSFBlock):
        out = net([x, y])
    elif isinstance(net, score_layers.ResnetBlock):
        out = net(x, None if temb is None else torch.nn.functional.silu(temb))  # ours wants it activated
    else:
        out = net(x, *(value for value in (y, temb) if value is not None))
    assert error(out, g[f"{entry}/out"]) <= CLOSE
    out.square().mean().backward()
    assert x.grad is not None
    assert error(x.grad, g[f"{entry}/grad_x"]) <= 2 * CLOSE
    if meta["grad_order"]:
        assert max(gradient_errors(net, meta["grad_order"], g, entry).values()) <= CLOSE


# ---------------------------------------------------------------------------------------------------------
# Scores and losses


@pytest.mark.parametrize(("name", "entry"), entries("scores*"))
def test_score(name, entry, record_property):
    g = GoldenFile(name)
    meta = g.meta[entry]
    of = schedule(meta["sde"], g.meta["sde_params"][meta["sde"]], None if meta["continuous"] else meta["N"])
    D = denoiser(shared_network(meta["net"]), of)
    u, t = g[f"{entry}/x"], g[f"{entry}/t"].double()
    sigma, s = of.sigma(t), columns(of.scale(t))
    torch.testing.assert_close(of.label(t).float(), g[f"{entry}/labels"].float(), rtol=CLOSE, atol=0)
    if isinstance(of, DiscreteVP):  # where labels are fractions, and D only knows the level below
        score = -D.net(u, of.label(t)) / (s * columns(sigma))
    else:
        F_x, c = D.raw(u / s, sigma)
        torch.testing.assert_close(c.c_noise.flatten(), g[f"{entry}/labels"].float(), rtol=CLOSE, atol=0)
        score = c.c_out / (s * columns(sigma) ** 2) * F_x

    # In float32, 1 - exp costs the published std digits at small t; the description says how many.
    tolerances = [max(CLOSE, 2 * rounding) for rounding in meta["rel_err_per_t_f32_vs_f64"]]

    def check_by_time(actual: torch.Tensor, key: str) -> None:
        errors = [error(a, b) for a, b in zip(actual, g[f"{entry}/{key}"], strict=True)]
        record_property(f"largest_error_of_{key}", max(errors))
        assert all(e <= tolerance for e, tolerance in zip(errors, tolerances, strict=True)), (errors, tolerances)

    check_by_time(score, "score")
    if f"{entry}/pf_drift" in g.arrays:
        check_by_time(columns(of.drift(t)) * u - columns(of.diffusion(t)) ** 2 * score / 2, "pf_drift")


@pytest.mark.parametrize(("name", "entry"), entries("losses*"))
def test_loss(name, entry, record_property):
    g = GoldenFile(name)
    meta = g.meta[entry]
    kind, *options = entry.split("/")
    options = {option[:-1]: option[-1] == "1" for option in options}
    discrete = {"smld": "VE", "ddpm": "VP"}
    sde = discrete.get(kind, kind)
    of = schedule(sde, g.meta["sde_params"][sde], meta["N"] if kind in discrete else None)
    loss_fn = ScoreLoss(of, **options)
    if kind in discrete:
        levels = g[f"{kind}/labels"].double() / (meta["N"] - 1)
        t = 1 - levels if sde == "VE" else levels
    else:
        t = loss_fn.times(g[f"{kind}/u"])
        torch.testing.assert_close(t.float(), g[f"{kind}/t"], rtol=CLOSE, atol=0)
    D = denoiser(shared_network(meta["net"]), of)
    loss = loss_fn(D, g[f"{kind}/batch"], t=t, noise=g[f"{kind}/z"]).mean()
    loss.backward()
    expected = float(g[f"{entry}/loss"])
    record_property("largest_error", abs(loss.item() / expected - 1))
    assert loss.item() == pytest.approx(expected, rel=CLOSE)
    errors = gradient_errors(D.net, g.meta[f"grad_order_{meta['net']}"], g, entry)
    record_property("largest_gradient_error", max(errors.values()))
    assert max(errors.values()) <= CLOSE, errors
