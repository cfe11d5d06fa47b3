"""Properties of the network that hold whatever its weights."""

import math

import pytest
import torch
from conftest import tiny_network

from training.config.edm2 import TRAINING_PRESETS
from training.encoders import StandardRGBEncoder
from training.families import preset_network
from training.networks.edm2 import Precond, UNet
from training.networks.edm2_layers import (
    MPConv,
    MPPositional,
    effective_weights,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
    normalize_weights_,
)
from training.snapshot import load_network, save_network


def test_denoiser_is_identity_without_noise():
    net = tiny_network()
    x = torch.randn(4, 1, 8, 8)
    errors = [(net(x, torch.tensor(sigma)) - x).norm() / x.norm() for sigma in (1e-1, 1e-2, 1e-3)]
    assert errors[2] < 5e-3 and errors[0] > errors[1] > errors[2]


def test_samples_do_not_depend_on_their_batch():
    net = tiny_network(attn_resolutions=[8, 4])
    x, sigma, labels = torch.randn(5, 1, 8, 8), torch.rand(5) + 0.1, torch.eye(10)[:5]
    together = net(x, sigma, labels)
    alone = torch.cat([net(x[i : i + 1], sigma[i : i + 1], labels[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_layers_preserve_magnitude():
    torch.manual_seed(0)
    a, b = torch.randn(8, 64, 32, 32), torch.randn(8, 32, 32, 32)
    conv = MPConv(64, 96, kernel=[3, 3])
    linear = MPConv(64, 96)
    inner = conv(a)[:, :, 1:-1, 1:-1]  # away from the zero padding
    outputs = [
        inner,
        linear(torch.randn(4096, 64)),
        mp_silu(a),
        mp_sum(a, a.roll(1, 0), t=0.3),
        mp_cat(a, b, t=0.3),
        normalize(a * 7, dim=1),
    ]
    for out in outputs:
        assert out.square().mean().sqrt().item() == pytest.approx(1, abs=0.03)


def test_activations_keep_unit_magnitude_through_the_network():
    torch.manual_seed(0)
    unet = UNet(16, 3, 10, model_channels=64, channel_mult=[1, 2], num_blocks=2, attn_resolutions=[8])
    magnitudes = []
    for module in [*unet.enc.values(), *unet.dec.values()]:
        module.register_forward_hook(lambda _m, _x, out: magnitudes.append(out.square().mean().sqrt().item()))
    unet(torch.randn(4, 3, 16, 16), torch.randn(4), torch.eye(10)[:4])
    assert len(magnitudes) > 10 and all(0.6 < m < 1.4 for m in magnitudes), magnitudes


def test_positional_embedding():
    """Cosine and sine of x / 10000^(2 j / n), the same in every network."""
    features = MPPositional(8)(torch.tensor([0.0, 1.5])) / math.sqrt(2)
    angles = [1.5 / 10000 ** (2 * j / 8) for j in range(4)]
    torch.testing.assert_close(features[0], torch.tensor([1.0, 0.0] * 4))
    wanted = torch.tensor([f(angle) for angle in angles for f in (math.cos, math.sin)])
    torch.testing.assert_close(features[1], wanted)
    assert not MPPositional(8).state_dict()
    magnitudes = MPPositional(64)(torch.linspace(-2, 2, 50)).square().mean(dim=1)  # exactly 1 at each noise level
    torch.testing.assert_close(magnitudes, torch.ones(50))


def test_bandwidth_scales_the_frequencies():
    unets = []
    for options in ({}, {"noise_bandwidth": 0.25}):
        torch.manual_seed(0)
        unets.append(UNet(8, 1, 0, model_channels=8, channel_mult=[1], num_blocks=1, **options))
    wide, narrow = (unet.emb_fourier for unet in unets)
    torch.testing.assert_close(narrow.freqs, wide.freqs / 4)
    assert torch.equal(narrow.phases, wide.phases)


def test_files_without_an_embedding_have_the_published_one(tmp_path):
    net = tiny_network()
    assert not {"noise_embedding", "noise_bandwidth"} & net.init_kwargs.keys()  # as in files of earlier versions
    save_network(tmp_path / "net.safetensors", net, StandardRGBEncoder(), {}, torch.float32)
    loaded = load_network(tmp_path / "net.safetensors").net
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(x, torch.tensor(0.7)), net(x, torch.tensor(0.7)))


def test_positional_networks_go_to_files_and_back(tmp_path):
    net = tiny_network(noise_embedding="positional")
    save_network(tmp_path / "net.safetensors", net, StandardRGBEncoder(), {}, torch.float32)
    loaded = load_network(tmp_path / "net.safetensors").net
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(x, torch.tensor(0.7)), net(x, torch.tensor(0.7)))
    assert not torch.equal(net(x, torch.tensor(0.7)), tiny_network()(x, torch.tensor(0.7)))


def test_forced_normalization_makes_unit_weights():
    net = tiny_network()
    for m in net.modules():
        if isinstance(m, MPConv):
            m.weight.mul_(5)
    normalize_weights_(net)
    for m in net.modules():
        if isinstance(m, MPConv):
            rms = m.weight.flatten(1).square().mean(1).sqrt()
            torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [None, 1, (2, 3)])
def test_gradient_of_normalization(dtype, dim):
    torch.manual_seed(0)
    x = torch.randn(4, 6, 3, 5)
    x[0] *= 1e-3  # of the size of eps
    x[1] = 0
    x, grad = x.to(dtype).float(), torch.randn_like(x).to(dtype).float()
    plain = x.clone().requires_grad_(True)
    dims = [1, 2, 3] if dim is None else dim
    n = plain[0].numel() if dim is None else 6 if dim == 1 else 15
    magnitude = (plain.square().sum(dims, keepdim=True) + 1e-30).sqrt() / n**0.5 + 1e-4
    (plain / magnitude).backward(grad)
    ours = x.to(dtype).requires_grad_(True)
    normalize(ours, dim=dim).backward(grad.to(dtype))
    assert plain.grad is not None and ours.grad is not None
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for row, expected in zip(ours.grad.float(), plain.grad, strict=True):
        assert (row - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("grad", [True, False])
def test_normalization_of_an_empty_batch(grad):
    with torch.set_grad_enabled(grad):
        assert normalize(torch.zeros(0, 3, 2, 2)).shape == (0, 3, 2, 2)


def test_weights_normalized_on_the_way():
    net, plain = tiny_network(), tiny_network()
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor(0.7)
    normalize_weights_(plain)
    with effective_weights(plain):
        expected = plain(x, sigma)
    with effective_weights(net, normalize_first=True):
        torch.testing.assert_close(net(x, sigma), expected)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_weight_scale_does_not_matter():
    net, scaled = tiny_network(), tiny_network()
    for m in scaled.modules():
        if isinstance(m, MPConv):
            m.weight.mul_(3)
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor(0.7)
    torch.testing.assert_close(net(x, sigma), scaled(x, sigma), rtol=1e-3, atol=1e-3)


def test_effective_weights_leave_nothing_behind():
    net = tiny_network()
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor(0.7)
    expected = net(x, sigma)
    with pytest.raises(RuntimeError), effective_weights(net):
        raise RuntimeError
    assert all(m.shared_weight is None for m in net.modules() if isinstance(m, MPConv))
    assert torch.equal(net(x, sigma), expected)


def test_effective_weights_accumulate_gradients():
    net = tiny_network().requires_grad_(True)
    x, sigma = torch.randn(4, 1, 8, 8), torch.tensor(0.7)
    net(x, sigma).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    with effective_weights(net):
        for part in x.split(2):
            net(part, sigma).square().sum().backward()
    for name, gradient in expected.items():
        accumulated = net.get_parameter(name).grad
        assert accumulated is not None
        error = (accumulated - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 1e-4, name


def test_both_ways_of_attention_agree(monkeypatch):
    net = tiny_network(attn_resolutions=[8])
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor(0.7)
    plain = net(x, sigma)
    monkeypatch.setattr("training.networks.edm2.MAX_PLAIN_TOKENS", 0)
    fused = net(x, sigma)
    assert not torch.equal(plain, fused)
    torch.testing.assert_close(plain, fused, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_close(precision):
    net = tiny_network()
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor(0.7)
    expected = net(x, sigma)
    net.precision = precision
    out = net(x, sigma)
    assert out.dtype == torch.float32
    assert (out - expected).norm() / expected.norm() < 0.03
    # fp16 on a CPU means fp32; bf16 is really used.
    assert torch.equal(out, expected) == (precision == "fp16")


def test_compiles_into_one_graph():
    net = tiny_network(attn_resolutions=[8])
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.rand(2) + 0.1, torch.eye(10)[:2]
    torch.testing.assert_close(compiled(x, sigma, labels), net(x, sigma, labels))
    with effective_weights(net):
        torch.testing.assert_close(compiled(x, sigma, labels), net(x, sigma, labels))


def test_attention_does_not_vanish_on_narrow_networks():
    net = Precond(8, 1, 0, precision="fp32", model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[8])
    assert net.unet.enc["8x8_block0"].num_heads == 1
    assert "unet.enc.8x8_block0.attn_qkv.weight" in net.state_dict()


def test_heads_divide_the_channels():
    net = Precond(8, 1, 0, precision="fp32", model_channels=150, channel_mult=[1], num_blocks=1, attn_resolutions=[8])
    assert net.unet.enc["8x8_block0"].num_heads == 2
    net = tiny_network(model_channels=25, channels_per_head=8, channel_mult=[1], attn_resolutions=[8])  # not 3 heads
    assert net.unet.enc["8x8_block0"].num_heads == 1
    assert net(torch.randn(1, 1, 8, 8), torch.tensor(1.0)).shape == (1, 1, 8, 8)


def test_bad_arguments():
    with pytest.raises(ValueError, match="resolution 12 is not divisible by 8"):
        Precond(12, 3, 0, channel_mult=[1, 2, 3, 4])
    with pytest.raises(ValueError, match="precision"):
        Precond(8, 3, 0, precision="fp8")
    with pytest.raises(ValueError, match="noise_embedding must be fourier or positional, not 'learned'"):
        Precond(8, 3, 0, noise_embedding="learned")


@pytest.mark.parametrize(
    ("preset", "millions"),
    [
        ("edm2-img512-xxs", 31.31),
        ("edm2-img512-xs", 124.71),
        ("edm2-img512-s", 280.21),
        ("edm2-img512-m", 497.81),
        ("edm2-img512-xxl", 1523.16),
    ],
)
def test_published_sizes(preset, millions):
    with torch.device("meta"):
        net = preset_network(TRAINING_PRESETS[preset])
    # The published counts include the Fourier features.
    count = sum(t.numel() for t in net.state_dict().values())
    assert count / 1e6 == pytest.approx(millions, abs=0.01)


def gradients_and_kept_bytes(net: Precond) -> tuple[list[torch.Tensor], int]:
    """Gradients of a small batch, and the memory of what was kept for the backward pass."""
    torch.manual_seed(1)
    x, sigma, labels = torch.randn(4, 3, 16, 16), torch.rand(4) + 0.1, torch.eye(4)
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    net.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = net(x, sigma, labels).square().sum()
    loss.backward()
    return [p.grad for p in net.parameters() if p.grad is not None], sum(kept.values())


def test_checkpointed_activations_give_the_same_gradients_in_less_memory():
    torch.manual_seed(0)
    net = Precond(16, 3, 4, "fp32", model_channels=16, channel_mult=[1, 2], num_blocks=2, dropout=0.1)
    for p in net.parameters():
        if p.ndim == 0:
            p.data.fill_(0.5)
    expected, kept = gradients_and_kept_bytes(net)
    net.unet.checkpoint_activations = True
    result, kept_now = gradients_and_kept_bytes(net)
    assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))
    assert kept_now < kept / 3
