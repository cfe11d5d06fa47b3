"""U-ViT: properties beyond those that the golden values show."""

import pytest
import torch

from dnnlib.errors import UserError
from training.networks.uvit import UViT

SMALL = dict(img_size=8, patch_size=2, in_chans=3, embed_dim=32, depth=4, num_heads=4)
KINDS = {"none": {}, "classes": dict(num_classes=5), "text": dict(clip_dim=6, num_clip_token=3)}


def network(**kwargs) -> UViT:
    torch.manual_seed(0)
    return UViT(**{**SMALL, **kwargs})


def inputs(kind: str = "none", n: int = 3, size: tuple[int, int] = (8, 8)):
    rnd = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, *size, generator=rnd)
    label = torch.rand(n, generator=rnd) * 999
    cond = {"none": None, "classes": torch.arange(n) % 5, "text": torch.randn(n, 3, 6, generator=rnd)}[kind]
    return x, label, cond


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_into_one_graph(kind):
    net = network(**KINDS[kind], mlp_time_embed=True, skip_norm=True)
    args = inputs(kind)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), net(*args))


@pytest.mark.slow
def test_compiles_to_the_same():
    net = network(num_classes=5)
    args = inputs("classes")
    torch.testing.assert_close(torch.compile(net, fullgraph=True)(*args), net(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_computes_in_the_type_of_its_input(kind, dtype, tolerance):
    net = network(**KINDS[kind])
    x, label, cond = inputs(kind)
    out, expected = net(x.to(dtype), label, cond), net(x, label, cond)
    assert out.dtype == dtype and all(p.dtype == torch.float32 for p in net.parameters())
    assert (out.float() - expected).norm() <= tolerance * expected.norm()
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_does_not_depend_on_its_batch(kind):
    net = network(**KINDS[kind])
    x, label, cond = inputs(kind)
    for i in range(len(x)):
        alone = net(x[i : i + 1], label[i : i + 1], None if cond is None else cond[i : i + 1])
        torch.testing.assert_close(alone[0], net(x, label, cond)[i], rtol=1e-5, atol=1e-6)


def test_one_label_for_all():
    x, label, _ = inputs()
    net = network()
    torch.testing.assert_close(net(x, label[:1]), net(x, label[:1].expand(3)))


def test_class_vectors_stand_for_classes():
    net = network(num_classes=5)
    x, label, classes = inputs("classes")
    assert classes is not None
    vectors = torch.nn.functional.one_hot(classes, 5).float()
    assert torch.equal(net(x, label, vectors), net(x, label, classes))


def test_checkpointed_activations_give_the_same_gradients_in_less_memory():
    def gradients_and_kept_bytes(net: UViT) -> tuple[list[torch.Tensor], int]:
        weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
        kept: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = net(*inputs()).square().sum()
        return list(torch.autograd.grad(loss, list(net.parameters()))), sum(kept.values())

    expected, kept = gradients_and_kept_bytes(network())
    result, kept_now = gradients_and_kept_bytes(network(use_checkpoint=True))
    assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))
    assert kept_now < kept / 4


@pytest.mark.parametrize("size", [(8, 12), (16, 16), (4, 6)])
def test_other_resolutions(size):
    net = network()
    x, label, _ = inputs(size=size)
    assert net(x, label).shape == x.shape
    # Where all patches have one embedding, interpolation leaves it.
    net.pos_embed.data[:, net.extras :] = 0.3
    patches = net.patch_embed(x) + 0.3
    seen = []
    net.in_blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(x, label)
    torch.testing.assert_close(seen[0][:, net.extras :], patches)


def test_interpolated_positions_follow_the_grid():
    """An embedding that grows along one axis still does, at the same relative place."""
    net = network(embed_dim=4, num_heads=1)
    column = torch.arange(4.0).expand(4, 4).flatten()
    net.pos_embed.data[0, net.extras :] = column[:, None]
    seen = []
    net.in_blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for width in (8, 16):
        x = torch.zeros(1, 3, 8, width)
        net(x, torch.zeros(1))
        seen[-1] = (seen[-1][:, net.extras :] - net.patch_embed(x))[0, :, 0].reshape(4, width // 2)
    torch.testing.assert_close(seen[0], column.reshape(4, 4))
    assert (seen[1].diff(dim=1) > 0).all() and torch.allclose(seen[1], seen[1][:1])
    torch.testing.assert_close(seen[1][:, 2:-2].reshape(4, 2, 2).mean(dim=2), seen[0][:, 1:3], rtol=0, atol=0.05)


def test_skip_norm_keeps_magnitudes():
    """Merged tokens do not grow with those that are merged."""
    tokens = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))

    def growth(net: UViT) -> float:
        block = net.out_blocks[0]
        block.attn.proj.weight.data.zero_()
        block.mlp.fc2.weight.data.zero_()
        return (block(1000 * tokens, 1000 * tokens).norm() / block(tokens, tokens).norm()).item()

    assert growth(network()) == pytest.approx(1000, rel=1e-3)
    assert growth(network(skip_norm=True)) == pytest.approx(1, rel=1e-3)
    assert {k for k in network(skip_norm=True).state_dict() if "skip_norm" in k} == {
        f"out_blocks.{i}.skip_norm.{name}" for i in range(2) for name in ("weight", "bias")
    }


def test_without_skips_there_is_nothing_to_merge():
    assert not [key for key in network(skip=False, skip_norm=True).state_dict() if "skip" in key]


@pytest.mark.parametrize(
    ("kwargs", "fragments"),
    [
        (dict(num_heads=5), ("embed_dim 32", "num_heads 5")),
        (dict(patch_size=3), ("img_size 8", "patch_size 3")),
        (dict(num_classes=5, clip_dim=6), ("classes or text",)),
    ],
)
def test_arguments_that_do_not_fit(kwargs, fragments):
    with pytest.raises(UserError) as err:
        network(**kwargs)
    assert all(fragment in str(err.value) for fragment in fragments)


@pytest.mark.parametrize(
    ("kind", "cond", "fragment"),
    [
        ("none", torch.zeros(3, dtype=torch.int64), "takes no condition"),
        ("classes", None, "needs a condition"),
        ("text", None, "needs a condition"),
        ("text", torch.zeros(3, 3, 7), "[3, 6]"),
        ("text", torch.zeros(3, 4, 6), "[3, 6]"),
    ],
)
def test_conditions_that_do_not_fit(kind, cond, fragment):
    x, label, _ = inputs()
    with pytest.raises(UserError) as err:
        network(**KINDS[kind])(x, label, cond)
    assert fragment in str(err.value)


def test_sizes_that_are_no_whole_patches():
    with pytest.raises(UserError, match="7x8"):
        network()(torch.zeros(1, 3, 7, 8), torch.zeros(1))
