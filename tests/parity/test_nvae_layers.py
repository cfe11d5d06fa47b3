"""NVAE's layers and distributions against golden values (layers.npz)."""

import re

import pytest
import torch
from conftest import Golden
from nvae_golden import FORWARD, largest_error
from torch import nn

from training.networks.nvae_cells import UP, Cell, MConvOp, ResOp
from training.networks.nvae_distributions import (
    BernoulliDecoder,
    LogisticMixtureDecoder,
    Normal,
    NormalDecoder,
    soft_clamp,
)
from training.networks.nvae_flows import FlowCell, FlowStep, MaskedConv2d
from training.networks.nvae_layers import SE, BNSwish, Conv2d, DecoderCombiner, EncoderCombiner, SkipDown, SkipUp

LAYERS = Golden("nvae/layers")


def prefixes(kind: str, suffix: str) -> list[str]:
    """What comes before `suffix` in the names of arrays that begin with `kind`."""
    return sorted(
        {name[: -len(suffix)] for name in LAYERS.arrays.files if name.startswith(kind) and name.endswith(suffix)}
    )


def build(prefix: str) -> nn.Module:
    """The layer that an entry describes, by its notes and the shapes of its state and input."""
    note = LAYERS.meta["notes"].get(prefix)
    state, kind, *rest = LAYERS.state(f"{prefix}/state"), *prefix.split("/")
    channels = LAYERS[f"{prefix}/in0"].shape[1]
    if kind == "conv2d":
        (inputs, outputs, kernel), options = note
        chosen = {"bias": False, **options}
        padding = chosen.pop("padding", 0)
        conv = Conv2d(inputs, outputs, kernel, **chosen)
        assert conv.padding == (padding, padding)
        return conv
    if kind == "se":
        return SE(channels)
    if kind == "bnswish":
        return BNSwish(channels)
    if kind == "skip":
        if rest[0].startswith("down"):
            return SkipDown(channels, sum(w.shape[0] for key, w in state.items() if key.endswith("bias")))
        return SkipUp(channels, state["1.weight"].shape[0])
    if kind in ("op", "res_elu"):
        inputs, outputs, stride = note or [channels, state["conv_0.weight"].shape[0], int(rest[0][1:])]
        name = rest[0] if kind == "op" else kind
        return (ResOp if name.startswith("res_") else MConvOp)(name, inputs, outputs, stride)
    if kind == "cell":
        stride = {"normal": 1, "down": 2, "up": UP}[rest[1].split("_")[0]]
        return Cell(tuple(note["arch"]), note["Cin"], note["Cout"], stride, note["use_se"])
    if kind == "combiner":
        out, inputs = state["conv.weight"].shape[:2]
        return EncoderCombiner(out, inputs) if rest[0] == "enc" else DecoderCombiner(out, inputs - out)
    assert kind == "flow", prefix
    return FlowCell(channels) if rest[0] == "paired" else FlowStep(channels, mirror=rest[0] == "mirror")


def masked_conv(prefix: str) -> MaskedConv2d:
    """A convolution of a flow, taken out of one."""
    _, place, direction = prefix.split("/")
    weight = LAYERS[f"{prefix}/state/weight"]
    latents = {"first": weight.shape[1], "depthwise": weight.shape[0] // 6, "last": weight.shape[0]}[place]
    step = FlowStep(latents, mirror=direction == "mirror")
    first, _, depthwise, _ = step.conv["convz"]
    return {"first": first, "depthwise": depthwise, "last": step.mu["conv_0"]}[place]


@pytest.mark.parametrize("prefix", prefixes("", "/out_eval"))
def test_layer(prefix, close):
    """Outputs in both modes, gradients of inputs and parameters, running statistics."""
    layer = masked_conv(prefix) if prefix.startswith("arconv") else build(prefix)
    layer.load_state_dict(LAYERS.state(f"{prefix}/state"))
    inputs = [LAYERS[f"{prefix}/in{i}"].requires_grad_() for i in range(2) if f"{prefix}/in{i}" in LAYERS.arrays]
    close(layer.eval()(*inputs), LAYERS[f"{prefix}/out_eval"], FORWARD, "eval")
    out = layer.train()(*inputs)
    close(out, LAYERS[f"{prefix}/out_train"], FORWARD, "train")
    out.backward(LAYERS[f"{prefix}/cotangent"])
    gradients = LAYERS.state(f"{prefix}/grad")
    assert gradients.keys() == dict(layer.named_parameters()).keys()
    # Biases before a batch norm have gradient 0, and hold rounding noise: the scale is the largest gradient.
    largest = max(g.abs().max() for g in gradients.values())
    for name, parameter in layer.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() <= FORWARD * largest, name
    for i, x in enumerate(inputs):
        close(x.grad, LAYERS[f"{prefix}/gin{i}"], FORWARD, f"input {i}")
    state = layer.state_dict()
    for name, value in LAYERS.state(f"{prefix}/bn_after").items():
        close(state[name], value, FORWARD, name)
    for name in ("mask", "weight_normalized"):
        if f"{prefix}/{name}" in LAYERS.arrays:
            close(layer.mask if name == "mask" else layer.effective_weight(), LAYERS[f"{prefix}/{name}"], FORWARD, name)


@pytest.mark.parametrize("prefix", prefixes("res_elu", "/out_first"))
def test_data_dependent_start(prefix, close):
    op = build(prefix)
    missing, unexpected = op.load_state_dict(LAYERS.state(f"{prefix}/state"), strict=False)
    assert missing == ["conv_0.init_done"] and not unexpected
    x = LAYERS[f"{prefix}/in0"]
    close(op.train()(x), LAYERS[f"{prefix}/out_first"], FORWARD)
    for name, value in LAYERS.state(f"{prefix}/after_init").items():
        close(op.state_dict()[name], value, FORWARD, name)
    close(op(2 * x), LAYERS[f"{prefix}/out_second"], FORWARD)


def test_first_scale_of_weights(close):
    """log_weight_norm starts as the log of the norm + .01; that of the last convolution of a flow lower by ln 10."""
    conv = Conv2d(4, 6, 3)
    assert torch.allclose(conv.log_weight_norm.exp(), conv.weight.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) + 0.01)
    latents = LAYERS["arconv/mu_init_weight"].shape[0]
    last = FlowStep(latents, mirror=False).mu["conv_0"]
    for conv, scale in [(last, 0.1), (masked_conv(prefixes("arconv/first", "/out_eval")[0]), 1)]:
        norm = (conv.weight * conv.mask).flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        assert torch.allclose(conv.log_weight_norm.exp(), scale * (norm + 0.01))
    masked = LAYERS["arconv/mu_init_weight"] * last.mask
    norms = (masked.flatten(1).norm(dim=1) + 0.01).log() - torch.tensor(10.0).log()
    close(norms.reshape(-1, 1, 1, 1), LAYERS["arconv/mu_init_log_weight_norm"], FORWARD)


def test_jacobian_of_a_flow(close):
    """Triangular in the order of pixels with ones on the diagonal: the volume stays."""
    x = LAYERS["flow/jacobian/in0"]
    step = FlowStep(x.shape[1], mirror=False)
    step.load_state_dict(LAYERS.state("flow/jacobian/state"))
    jacobian = torch.autograd.functional.jacobian(step, x).reshape(x.numel(), x.numel())
    close(jacobian, LAYERS["flow/jacobian/J"], FORWARD)
    order = torch.arange(x.numel()).reshape(x.shape[1:]).permute(1, 2, 0).flatten()  # pixel by pixel, then channels
    assert torch.equal(jacobian[order][:, order].tril(), jacobian[order][:, order])
    assert torch.equal(jacobian.diagonal(), torch.ones(x.numel()))


# ---------------------------------------------------------------------------------------------------------
# Distributions


def test_soft_clamp(close):
    close(soft_clamp(LAYERS["normal/soft_clamp_in"]), LAYERS["normal/soft_clamp_out"], FORWARD)


@pytest.mark.parametrize("prefix", prefixes("normal/t", "/sigma"))
def test_normal(prefix, close):
    temperature = float(prefix.split("/t")[1])
    normal = Normal(LAYERS["normal/mu"], LAYERS["normal/log_sigma"], temperature)
    close(normal.mu, LAYERS[f"{prefix}/mean"], FORWARD)
    close(normal.sigma, LAYERS[f"{prefix}/sigma"], FORWARD)
    close(normal.sample(LAYERS["normal/eps"]), LAYERS[f"{prefix}/sample"], FORWARD)
    close(normal.log_prob(LAYERS["normal/value"]), LAYERS[f"{prefix}/log_p"], FORWARD)
    other = Normal(LAYERS["normal/mu2"], LAYERS["normal/log_sigma2"])
    close(normal.kl(other), LAYERS[f"{prefix}/kl_to_2"], FORWARD)
    assert torch.allclose(normal.standardize(normal.sample(LAYERS["normal/eps"])), LAYERS["normal/eps"], atol=1e-4)


def test_gradient_of_kl(close):
    names = ("mu", "log_sigma", "mu2", "log_sigma2")
    mu, log_sigma, mu2, log_sigma2 = inputs = [LAYERS[f"normal/{name}"].requires_grad_() for name in names]
    Normal(mu, log_sigma).kl(Normal(mu2, log_sigma2)).sum().backward()
    for name, x in zip(names, inputs, strict=True):
        close(x.grad, LAYERS[f"normal/kl_grad/{name}"], FORWARD, name)


@pytest.mark.parametrize("prefix", prefixes("dml/K", "/logits"))
def test_mixture(prefix, close):
    mixtures, bits = map(int, re.fullmatch(r"dml/K(\d+)_b(\d+)", prefix).groups())
    decoder = LogisticMixtureDecoder(3, mixtures, 2**bits, published=True)
    logits, x = LAYERS[f"{prefix}/logits"].requires_grad_(), LAYERS[f"{prefix}/x"]
    assert logits.shape[1] == decoder.logit_channels
    log_prob = decoder.log_prob(logits, x)
    close(log_prob.squeeze(1), LAYERS[f"{prefix}/log_prob"], FORWARD)
    log_prob.sum().backward()
    close(logits.grad, LAYERS[f"{prefix}/grad_logits"], FORWARD, "gradient")
    close(decoder.mean(logits), LAYERS[f"{prefix}/mean"], FORWARD, "mean")
    for draw in prefixes(f"{prefix}/t", "/u_component"):
        uniforms = [LAYERS[f"{draw}/u_component"], LAYERS[f"{draw}/u_logistic"]]
        sample = decoder.sample(logits, uniforms, float(draw.rsplit("/t", 1)[1]))
        close(sample, LAYERS[f"{draw}/sample"], 1e-4, draw)


def test_mixture_at_every_level(close):
    """The published probabilities of grey levels, and ours, which differ for 254 and sum to 1."""
    params, expected = LAYERS["dml/table/params"], LAYERS["dml/table/log_prob_grey"]
    grey = torch.arange(256).reshape(-1, 1, 1, 1).expand(-1, 3, -1, -1) / 255
    logits = params.expand(256, -1, -1, -1)
    mixtures = params.shape[1] // 10
    published = LogisticMixtureDecoder(3, mixtures, published=True).log_prob(logits, grey).flatten()
    close(published, expected, FORWARD)
    ours = LogisticMixtureDecoder(3, mixtures).log_prob(logits, grey).flatten()
    assert (ours != published).nonzero().flatten().tolist() == [254]


def test_bernoulli(close):
    decoder = BernoulliDecoder()
    logits = LAYERS["bernoulli/logits"].requires_grad_()
    log_prob = decoder.log_prob(logits, LAYERS["bernoulli/x"])
    close(log_prob, LAYERS["bernoulli/log_prob"], FORWARD)
    close(decoder.mean(logits), LAYERS["bernoulli/mean"], FORWARD)
    log_prob.sum().backward()
    close(logits.grad, LAYERS["bernoulli/grad_logits"], FORWARD)


def test_normal_decoder(close):
    logits = LAYERS["normal_decoder/logits"].requires_grad_()
    decoder = NormalDecoder(logits.shape[1] // 2, published=True)
    log_prob = decoder.log_prob(logits, LAYERS["normal_decoder/x"])
    close(log_prob, LAYERS["normal_decoder/log_prob"], FORWARD)
    log_prob.sum().backward()
    close(logits.grad, LAYERS["normal_decoder/grad_logits"], FORWARD)
    close(decoder.sample(logits, [LAYERS["normal_decoder/eps"]]), LAYERS["normal_decoder/sample"], 1e-4)


def test_every_entry_is_compared():
    """No entry of the file is left out by these tests."""
    compared = {
        *prefixes("", "/out_eval"),
        *prefixes("res_elu", "/out_first"),
        "flow/jacobian",
        "arconv",
        "normal",
        "dml",
    }
    compared |= {"bernoulli", "normal_decoder"}
    for name in set(LAYERS.arrays.files) - {"meta_json"}:
        assert any(name.startswith(f"{prefix}/") for prefix in compared), name
    assert largest_error(torch.ones(1), torch.zeros(1)) > 1
