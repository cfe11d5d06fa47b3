"""The rewritten network computes what the network computes."""

import pytest
import torch
from conftest import relative_error, tiny_network

from training.generation import generate_images
from training.networks import edm2_cpu
from training.networks.edm2_cpu import FastDenoiser, can_prepack
from training.networks.edm2_gpu import CompiledDenoiser
from training.networks.edm2_layers import MPConv

WIDE = dict(img_resolution=32, model_channels=128, attn_resolutions=[16])  # wide enough for Winograd from 2 images on


def example(net, batch):
    torch.manual_seed(1)
    x = torch.randn(batch, net.img_channels, net.img_resolution, net.img_resolution)
    labels = torch.eye(net.label_dim)[torch.arange(batch) % net.label_dim] if net.label_dim else None
    return x, torch.rand(batch) * 3 + 0.1, labels


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "architecture",
    [
        {},
        {"label_dim": 0},
        WIDE,
        {**WIDE, "channels_per_head": 64, "channel_mult": [1, 2, 3], "img_channels": 3},
        {"model_channels": 12, "channel_mult": [1, 3], "attn_resolutions": [8, 4], "channels_per_head": 6},
        {**WIDE, "model_channels": 136, "img_resolution": 20},
        {"num_blocks": 3, "label_balance": 0.3, "concat_balance": 0.7, "res_balance": 0.6, "attn_balance": 0.2},
        {"num_blocks": 0, "channel_mult": [2, 1, 1]},
        {"resample_filter": [1, 3, 3, 1]},
        {"resample_filter": [1, 2]},
        {"channel_mult_noise": 3, "channel_mult_emb": 5, "sigma_data": 0.3, "dropout": 0.5},
        {"noise_embedding": "positional"},
        {"noise_bandwidth": 0.2, "clip_act": 0.7},
        {"clip_act": None},
    ],
    ids=str,
)
def test_equals_the_network(architecture, batch):
    net = tiny_network(**architecture)
    x, sigma, labels = example(net, batch)
    fast = FastDenoiser(net, batch)
    assert relative_error(fast(x, sigma, labels), net(x, sigma, labels)) < 1e-5
    assert relative_error(fast(x, sigma[:1]), net(x, sigma[:1])) < 1e-5  # no class, one noise level


def test_wide_networks_use_winograd():
    net = tiny_network(**WIDE)
    kinds = [[type(block.conv_res1).__name__ for block in FastDenoiser(net, batch).enc] for batch in (1, 2)]
    assert [("_WinogradSiLUConv" in names) for names in kinds] == [False, can_prepack(torch.float32)]


@pytest.mark.skipif(not can_prepack(torch.float32), reason="no Winograd here")
def test_winograd_computes_with_one_shape(monkeypatch):
    """For others, oneDNN would convert the weights in each call."""
    monkeypatch.setattr(edm2_cpu, "_WINOGRAD_CHUNK", 1 << 14)  # two images of 32x32 at a time
    net = tiny_network(**WIDE)
    fast = FastDenoiser(net, 3)
    shapes = {}
    call = edm2_cpu._PackedConv.__call__

    def recorded(conv, x):
        if conv.groups > 1:
            shapes.setdefault(conv, set()).add(x.shape)
        return call(conv, x)

    monkeypatch.setattr(edm2_cpu._PackedConv, "__call__", recorded)
    for batch in (3, 1, 2, 5):
        assert relative_error(fast(*example(net, batch)), net(*example(net, batch))) < 1e-5
    assert shapes and all(len(found) == 1 for found in shapes.values())


def test_equals_the_network_without_private_operators(monkeypatch):
    monkeypatch.setattr(edm2_cpu, "can_prepack", lambda dtype: False)
    net = tiny_network(**WIDE)
    example_inputs = example(net, 2)
    assert relative_error(FastDenoiser(net, 2)(*example_inputs), net(*example_inputs)) < 1e-5


def test_operators_that_are_missing_are_noticed(monkeypatch):
    def missing(*_args):
        raise AttributeError("no such operator")

    monkeypatch.setattr(edm2_cpu._PackedConv, "__init__", missing)
    assert not can_prepack.__wrapped__(torch.float32)


def test_bfloat16_is_close():
    net = tiny_network(**WIDE)
    x, sigma, labels = example(net, 4)
    exact = net(x, sigma, labels)
    net.precision = "bf16"
    assert 0 < relative_error(FastDenoiser(net, 4)(x, sigma, labels), exact) < 0.02


def test_fp16_computes_in_float32():
    net = tiny_network()
    inputs = example(net, 2)
    exact = FastDenoiser(net, 2)(*inputs)
    net.precision = "fp16"
    assert torch.equal(FastDenoiser(net, 2)(*inputs), exact)


def test_samples_do_not_depend_on_their_batch():
    net = tiny_network(**WIDE)
    x, sigma, labels = example(net, 5)
    fast = FastDenoiser(net, 3)  # also right for other batches than the one expected
    alone = torch.cat([fast(x[i : i + 1], sigma[i : i + 1], labels[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(fast(x, sigma, labels), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("architecture", [{}, {"label_dim": 0}, {"attn_resolutions": [8], "channels_per_head": 8}])
def test_compiled_network_equals_the_network(architecture, precision, monkeypatch):
    """All but the compiler: filled batches, and weights that are transformed once."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_options: None)
    net = tiny_network(**architecture)
    net.precision = precision
    x, sigma, labels = example(net, 3)
    expected, of_one_level = net(x, sigma, labels), net(x, sigma[:1])
    compiled, of_full_batches = CompiledDenoiser(net, 5), CompiledDenoiser(net, 3)
    for conv in net.modules():
        if isinstance(conv, MPConv):
            conv.weight.zero_()  # which a copy does not follow
    for denoiser in (compiled, of_full_batches):
        torch.testing.assert_close(denoiser(x, sigma.double(), labels), expected)
        torch.testing.assert_close(denoiser(x, sigma[0]), of_one_level)
    if net.label_dim == 0:  # as a guide that is given the labels of the main network
        torch.testing.assert_close(compiled(x, sigma, torch.eye(10)[:3]), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_graphs_equal_the_network(precision):
    net = tiny_network(**WIDE).cuda()
    net.precision = precision
    compiled = CompiledDenoiser(net, 4)
    tolerance = {"fp32": 1e-5, "fp16": 0.01, "bf16": 0.05}[precision]
    with torch.inference_mode():
        for batch in (4, 3):
            inputs = [t.cuda() for t in example(net, batch)]
            for _ in range(3):  # graphs are recorded in the second call
                assert relative_error(compiled(*inputs), net(*inputs)) < tolerance


@pytest.mark.gpu
def test_compiled_images_equal_others():
    net, gnet = tiny_network(label_dim=3), tiny_network(label_dim=3, seed=1)

    def images(compiled):
        options = dict(max_batch_size=3, num_steps=4, guidance=2, device="cuda", compiled=compiled)
        return torch.cat([r.images for r in generate_images(net, gnet, seeds=range(5), **options)]).int()

    assert (images(True) - images(False)).abs().float().mean() < 1


def test_inputs_and_network_stay_as_they_are():
    net = tiny_network()
    inputs = example(net, 2)
    copies = [t.clone() for t in inputs]
    state = {name: t.clone() for name, t in net.state_dict().items()}
    FastDenoiser(net, 2)(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())


def test_weights_are_those_at_the_start_of_the_iteration():
    net = tiny_network()
    images = generate_images(net, seeds=[0, 1], num_steps=2, verbose=False)
    first = next(iter(images)).images
    net.unet.out_gain.data.fill_(2)
    changed = next(iter(images)).images
    assert not torch.equal(first, changed)
    expected = next(iter(generate_images(net, seeds=[0, 1], num_steps=2, verbose=False))).images
    assert torch.equal(changed, expected)


def test_guide_is_prepared_only_where_it_is_used():
    net, gnet = tiny_network(), tiny_network(seed=1)
    seen = []

    def sampler(net, noise, labels, gnet, randn_like, **_kwargs):
        seen.append((type(net), type(gnet)))
        return net(noise, torch.tensor(1.0), labels)

    for guidance in (1, 2):
        next(iter(generate_images(net, gnet, seeds=[0], sampler_fn=sampler, guidance=guidance, verbose=False)))
    assert seen == [(FastDenoiser, type(gnet)), (FastDenoiser, FastDenoiser)]
