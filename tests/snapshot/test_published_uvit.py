"""Published weights of U-ViT: architectures guessed from shapes, files written and read, and files that are none."""

import os
import pickle

import pytest
import torch

from dnnlib.errors import UserError
from training.networks.uvit import UViT
from training.snapshot import published_uvit
from training.snapshot.published_uvit import guess_architecture, read, write

TINY = dict(img_size=8, patch_size=2, in_chans=3, embed_dim=16, depth=4, num_heads=2)
VARIANTS = [
    {},
    dict(num_classes=5, conv=False),
    dict(clip_dim=6, num_clip_token=3),
    dict(clip_dim=6),
    dict(skip=False, mlp_time_embed=True),
    dict(skip_norm=True, qkv_bias=True),
    dict(depth=0, patch_size=4),
    dict(depth=3, in_chans=1, patch_size=1),
    dict(mlp_ratio=2.7),
]


def saved(path, **kwargs) -> UViT:
    net = UViT(**{**TINY, **kwargs})
    write(path, net.state_dict())
    return net


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_read_is_what_was_written(tmp_path, variant):
    net = saved(tmp_path / "a.pth", **variant)
    known = {"num_heads": 2} | {key: value for key, value in variant.items() if key == "num_clip_token"}
    checkpoint = read(tmp_path / "a.pth", **known)
    found = checkpoint.build()
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    assert list(found.state_dict()) == list(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), net.state_dict().values(), strict=True))
    wanted = {**TINY, **variant}
    wanted["depth"] -= wanted["depth"] % 2
    ratio = wanted.pop("mlp_ratio", 4)
    assert {key: checkpoint.arguments[key] for key in wanted} == wanted
    assert int(16 * checkpoint.arguments["mlp_ratio"]) == int(16 * ratio)


@pytest.mark.parametrize(
    ("arguments", "heads"),
    [
        (dict(img_size=32, patch_size=2, in_chans=3, embed_dim=512, depth=12), 8),
        (dict(img_size=64, patch_size=4, in_chans=3, embed_dim=768, depth=16, num_classes=1000), 12),
        (dict(img_size=64, patch_size=4, in_chans=4, embed_dim=1152, depth=28, num_classes=1001, conv=False), 16),
        (dict(img_size=32, patch_size=2, in_chans=4, embed_dim=512, depth=16, clip_dim=768), 8),
    ],
)
def test_published_widths_say_the_heads(arguments, heads):
    with torch.device("meta"):
        net = UViT(num_heads=heads, **arguments)
    guess = guess_architecture({name: tuple(t.shape) for name, t in net.state_dict().items()})
    assert guess["num_heads"] == heads and {key: guess[key] for key in arguments} == arguments


def test_half_weights_are_read_as_float32(tmp_path):
    write(tmp_path / "a.pth", UViT(**TINY).half().state_dict())
    assert all(p.dtype == torch.float32 for p in read(tmp_path / "a.pth", num_heads=2).build().parameters())


def test_older_files_of_torch_are_read(tmp_path):
    net = UViT(**TINY)
    torch.save(net.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    found = read(tmp_path / "old.pth", num_heads=2)
    assert torch.equal(found.state["pos_embed"], net.pos_embed)


def test_training_checkpoints(tmp_path):
    for step in (5, 40, 300):
        saved(tmp_path / f"{step}.ckpt" / "nnet_ema.pth")
        saved(tmp_path / f"{step}.ckpt" / "nnet.pth")
    (tmp_path / "999.ckpt").mkdir()  # not complete
    assert read(tmp_path, num_heads=2).path == tmp_path / "300.ckpt" / "nnet_ema.pth"
    assert read(tmp_path / "5.ckpt", "net", num_heads=2).path == tmp_path / "5.ckpt" / "nnet.pth"


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-code-ran",)


def changed_state(change) -> dict:
    state = dict(UViT(**TINY).state_dict())
    change(state)
    return state


def fails(path, *fragments, **known):
    with pytest.raises(UserError) as err:
        read(path, **{"num_heads": 2, **known})
    message = str(err.value)
    assert "\n" not in message and all(fragment in message for fragment in (str(path), *fragments)), message


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(changed_state(lambda s: s.update(x=Hostile())), "a.pth")
    fails("a.pth", "nothing in the file was run")
    with open("b.pth", "wb") as f:
        pickle.dump(Hostile(), f)
    fails("b.pth", "b.pth")
    assert not (tmp_path / "hostile-code-ran").exists()


def test_damaged_files(tmp_path):
    saved(tmp_path / "a.pth")
    data = (tmp_path / "a.pth").read_bytes()
    for name, content in [("short.pth", data[: len(data) // 2]), ("none.pth", b""), ("text.pth", b"hello" * 100)]:
        (tmp_path / name).write_bytes(content)
        fails(tmp_path / name)
    fails(tmp_path / "missing.pth", "no such file")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "nnet_ema.pth", "N.ckpt")


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda s: s.pop("norm.bias"), ("lacks norm.bias",)),
        (lambda s: s.update(other=torch.ones(1)), ("also holds other",)),
        (lambda s: s.update({"norm.bias": torch.ones(3)}), ("norm.bias is [3] instead of [16]",)),
        (lambda s: s.update({"norm.bias": torch.ones(16, dtype=torch.int64)}), ("norm.bias", "no tensor")),
        (lambda s: s.update({"norm.bias": torch.ones(0)}), ("norm.bias", "no tensor")),
        (lambda s: s.update({"norm.bias": 3}), ("norm.bias", "no tensor")),
        (lambda s: s.update(big=torch.ones(1).expand(1 << 30)), ("share their values",)),
        (lambda s: s.pop("pos_embed"), ("holds no U-ViT",)),
        (lambda s: s.update(pos_embed=torch.ones(16)), ("holds no U-ViT",)),
        (lambda s: s.update(pos_embed=torch.ones(1, 16, 16)), ("16 tokens", "square")),
    ],
)
def test_files_that_do_not_fit(tmp_path, change, fragments):
    torch.save(changed_state(change), tmp_path / "a.pth")
    fails(tmp_path / "a.pth", *fragments)


def test_what_shapes_do_not_tell(tmp_path):
    saved(tmp_path / "a.pth", clip_dim=6, num_clip_token=3)
    fails(tmp_path / "a.pth", "num_heads", num_heads=None, num_clip_token=3)
    fails(tmp_path / "a.pth", "num_clip_token")
    fails(tmp_path / "a.pth", "not a multiple of num_heads 3", num_heads=3, num_clip_token=3)
    torch.save([1, 2], tmp_path / "list.pth")
    fails(tmp_path / "list.pth", "no weights by name")


def test_networks_that_a_path_does_not_hold(tmp_path):
    saved(tmp_path / "a.pth")
    for which in ("net", "gnet"):
        with pytest.raises(UserError, match=f"holds no network '{which}'"):
            read(tmp_path / "a.pth", which, num_heads=2)


def test_half_written_files_do_not_appear(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(published_uvit.torch, "save", fail)
    with pytest.raises(OSError, match=r"a\.pth"):
        write(tmp_path / "a.pth", UViT(**TINY).state_dict())
    assert not list(tmp_path.iterdir())
