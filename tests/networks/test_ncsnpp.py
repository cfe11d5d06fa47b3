"""Networks of score-SDE models: what golden values do not show."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dnnlib.errors import UserError
from training.networks import fir
from training.networks.ncsnpp import DDPM, NCSNpp
from training.networks.ncsnv2 import NCSN, NCSNv2
from training.networks.score_layers import GroupNorm, activation, positional_embedding

# Small networks that between them have every kind of layer.
SMALL = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,), "dropout": 0.0, "init_scale": 1.0}
NETWORKS = {
    "ve": lambda: NCSNpp(16, 3, progressive_input="residual", **SMALL),
    "pyramids": lambda: NCSNpp(16, 3, progressive="output_skip", progressive_input="input_skip", **SMALL),
    "cat": lambda: NCSNpp(
        16, 3, progressive="residual", progressive_input="input_skip", progressive_combine="cat", **SMALL
    ),
    "ddpmpp": lambda: NCSNpp(
        16, 3, fir=False, embedding_type="positional", scale_by_sigma=False, centered=True, **SMALL
    ),
    "ddpm-blocks": lambda: NCSNpp(16, 3, resblock_type="ddpm", **SMALL),
    "ddpm-blocks-nofir": lambda: NCSNpp(16, 3, resblock_type="ddpm", fir=False, **SMALL),
    "unconditional": lambda: NCSNpp(16, 3, conditional=False, **SMALL),
    "ddpm": lambda: DDPM(16, 3, **{**SMALL, "nf": 32}),
    "ncsn": lambda: NCSN(16, 3, nf=8, num_scales=10),
    "ncsnv2": lambda: NCSNv2(16, 3, nf=8, num_scales=10, sigma_min=0.5, sigma_max=9),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    return NETWORKS[name]().eval()


def inputs(n: int = 2, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(n, 3, 16, 16).to(dtype), torch.linspace(0.5, 9, n)


@pytest.mark.parametrize("name", NETWORKS)
def test_an_image_does_not_depend_on_its_batch(name):
    net = build(name)
    x, labels = inputs(3)
    with torch.inference_mode():
        together = net(x, labels)
        assert together.shape == x.shape and together.dtype == torch.float32
        for k in range(3):
            torch.testing.assert_close(net(x[k : k + 1], labels[k : k + 1]), together[k : k + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_one_label_serves_the_batch(name):
    net = build(name)
    x, _ = inputs(3)
    with torch.inference_mode():
        torch.testing.assert_close(net(x, torch.tensor([3.0])), net(x, torch.full([3], 3.0)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_with_checkpointed_blocks(name):
    net = build(name)
    x, labels = inputs()
    gradients = []
    for checkpointed in (False, True):
        net.checkpoint_activations = checkpointed
        net.zero_grad()
        net(x, labels).square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.05), (torch.float16, 0.006)])
def test_half_precision_is_near_float32(name, dtype, error):
    net = build(name)
    x, labels = inputs()
    with torch.inference_mode():
        expected = net(x, labels)
        out = net(x.to(dtype), labels).float()
    assert float((out - expected).norm() / expected.norm()) < error


@pytest.mark.parametrize("name", NETWORKS)
def test_memory_formats_give_the_same(name):
    net = build(name)
    x, labels = inputs()
    with torch.inference_mode():
        expected = net(x, labels)
        net.to(memory_format=torch.channels_last)
        for image in (x, x.contiguous(memory_format=torch.channels_last)):
            torch.testing.assert_close(net(image, labels), expected, rtol=1e-4, atol=1e-5)


def test_fourier_frequencies_are_frozen():
    net = build("ve")
    net(*inputs()).sum().backward()
    frozen = [name for name, p in net.named_parameters() if not p.requires_grad]
    assert frozen == ["all_modules.0.W"]
    net.requires_grad_(True)  # even if someone asks for its gradient
    net(*inputs()).sum().backward()
    assert net.all_modules[0].W.grad is None


def test_copies_are_independent():
    net = build("cat")
    x, labels = inputs()
    with torch.no_grad():
        expected = net(x, labels)
        twin = copy.deepcopy(net)
        for p in twin.parameters():
            p.zero_()
        assert torch.equal(net(x, labels), expected)
        assert float(twin(x, labels).abs().max()) == 0


def test_state_dict_names_every_tensor_once():
    for name in NETWORKS.keys() - {"ncsn", "ncsnv2"}:
        net = build(name)
        assert all(key == "sigmas" or key.startswith("all_modules.") for key in net.state_dict())
        assert sum(p.numel() for p in net.parameters()) == sum(
            v.numel() for k, v in net.state_dict().items() if k != "sigmas"
        )


def test_no_levels_are_needed_where_labels_are_not_looked_up():
    """Positional labels of continuous VP exceed a short list of noise levels (the original fails)."""
    torch.manual_seed(0)
    net = NCSNpp(16, 3, embedding_type="positional", scale_by_sigma=False, num_scales=10, **SMALL)
    assert net(inputs()[0], torch.tensor([999.0, 0.5])).isfinite().all()


def test_built_on_the_meta_device():
    with torch.device("meta"):
        net = NETWORKS["ve"]()
    own = build("ve")
    net.load_state_dict(own.state_dict(), assign=True)
    x, labels = inputs()
    torch.testing.assert_close(net.eval()(x, labels), own(x, labels))


COMPILED_AT_LEISURE = [pytest.param(name, marks=pytest.mark.slow) for name in ("pyramids", "ddpmpp", "ncsn", "ncsnv2")]


@pytest.mark.parametrize("name", ["ve", *COMPILED_AT_LEISURE])
def test_compiles_in_one_piece(name):
    net = build(name)
    x, labels = inputs()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            torch.testing.assert_close(compiled(x, labels), net(x, labels), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_by_inductor():
    net = build("ve")
    x, labels = inputs()
    compiled = torch.compile(net, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, labels), net(x, labels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"resblock_type": "stylegan"}, "resblock_type"),
        ({"progressive": "input_skip"}, "progressive"),
        ({"progressive_input": "output_skip"}, "progressive_input"),
        ({"progressive_combine": "mul"}, "progressive_combine"),
        ({"embedding_type": "sigma"}, "embedding_type"),
        ({"nonlinearity": "gelu"}, "nonlinearity"),
        ({"ch_mult": (1, 1, 1, 1, 1, 1)}, "not divisible"),
    ],
)
def test_bad_options(options, fragment):
    with pytest.raises(UserError, match=fragment):
        NCSNpp(16, 3, **{"nf": 8, **options})


def test_groups_of_unequal_size():
    with pytest.raises(UserError, match="groups of equal size"):
        DDPM(16, 3, nf=24)


# ---------------------------------------------------------------------------------------------------------
# Layers


def test_filters_keep_what_is_constant():
    x = torch.full([1, 2, 8, 8], 3.0)
    for taps in [None, (1, 1), (1, 3, 3, 1), (1, 2, 1)]:
        for image in (fir.upsample(x, taps), fir.downsample(x, taps)):
            inner = image[:, :, 2:-2, 2:-2] if image.shape[-1] > 4 else image[:, :, 1:-1, 1:-1]
            torch.testing.assert_close(inner, torch.full_like(inner, 3.0))


@pytest.mark.parametrize("taps", [None, (1, 3, 3, 1), (1, 2, 3, 4), (1, 2, 1)])
def test_fused_convolutions_equal_their_parts(taps):
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 3, 3)
    kernel = fir.fir_kernel(taps, 1, x.device)
    p = len(kernel) - 2 + 2
    blurred = fir.upfirdn(x, kernel, pad=((p + 1) // 2, p // 2))
    torch.testing.assert_close(fir.conv_downsample(x, w, taps), F.conv2d(blurred, w)[:, :, ::2, ::2])
    zeros = torch.zeros(2, 3, 16, 16)
    zeros[:, :, ::2, ::2] = x
    kernel = fir.fir_kernel(taps, 4, x.device)
    p = len(kernel) - 2
    expected = fir.upfirdn(F.conv2d(zeros, w, padding=1), kernel, pad=((p + 1) // 2 + 1, p // 2))
    out = fir.conv_upsample(x, w, taps)
    assert out.shape == expected.shape
    # At the edges the filter also sees what the convolution leaves beyond them.
    torch.testing.assert_close(out[:, :, 3:-3, 3:-3], expected[:, :, 3:-3, 3:-3], rtol=1e-4, atol=1e-5)


def test_memory_format_does_not_matter():
    x = torch.randn(2, 4, 8, 8)
    last = x.contiguous(memory_format=torch.channels_last)
    for taps in (None, (1, 3, 3, 1)):
        for function in (fir.upsample, fir.downsample):
            torch.testing.assert_close(function(x, taps), function(last, taps))
            assert function(last, taps).is_contiguous(memory_format=torch.channels_last)


def test_group_norm_counts_groups():
    assert GroupNorm(8).groups == 2 and GroupNorm(256).groups == 32 and GroupNorm(64, narrow_groups=False).groups == 32


def test_positional_embedding_of_odd_length_ends_in_zero():
    emb = positional_embedding(torch.tensor([1.0, 5.0]), 9)
    assert emb.shape == (2, 9) and float(emb[:, -1].abs().max()) == 0


def test_activations():
    x = torch.linspace(-2, 2, 5)
    for name in ("swish", "elu", "relu", "lrelu"):
        act = activation(name)
        torch.testing.assert_close(act(x.clone(), inplace=True), act(x))
    torch.testing.assert_close(activation("lrelu")(x), torch.tensor([-0.4, -0.2, 0, 1, 2]))
