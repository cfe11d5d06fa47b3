"""Shared fixtures: tiny data, networks and runs."""

import io
import json
import math
import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import click
import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from forked import Forks
from servers import server  # noqa: F401 - a fixture

import calculate_metrics
import train_edm2
from training.conditioning import Conditioning, DataSpec
from training.config.nvae import TRAINING_PRESETS as NVAE_PRESETS
from training.encoders import StandardRGBEncoder
from training.families import preset_network
from training.networks.edm2 import Precond
from training.networks.toy import ToyModel
from training.networks.uvit_denoiser import UViTDenoiser
from training.snapshot import save_network

ROOT = Path(__file__).parent.parent
# In the environment, what makes an x86 processor do as one that has AVX2 and nothing newer.
AVX2_ALONE = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
DIGITS = ROOT / "datasets" / "digits.zip"
# Options of a training run of about a second.
TINY = [
    "--preset=digits",
    "--channels=4",
    "--channel-mult=1",
    "--batch=256",
    "--duration=1024",
    "--status=512",
    "--snapshot=1024",
    "--checkpoint=1024",
]


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:  # the other cores have work of their own
        os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    os.environ["HF_HUB_OFFLINE"] = "1"  # tests need no network


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def no_lines_on_slow_machines(monkeypatch):
    """Progress lines come after half a minute, which a busy machine can make of any test."""
    monkeypatch.setattr("dnnlib.progress.INTERVAL", math.inf)


@pytest.fixture(autouse=True)
def offline_only_where_said(monkeypatch):
    """--offline sets a variable of the process; put it back after each test."""
    monkeypatch.setenv("OPENEDM2_OFFLINE", "0")


def png(image: np.ndarray) -> bytes:
    """PNG file of uint8 [H, W] or [H, W, C]."""
    f = io.BytesIO()
    PIL.Image.fromarray(image).save(f, format="png")
    return f.getvalue()


def npy(array: np.ndarray) -> bytes:
    f = io.BytesIO()
    np.save(f, array)
    return f.getvalue()


def make_dataset(path: Path, files: dict[str, bytes], labels=None, compression=zipfile.ZIP_STORED) -> Path:
    """Write a dataset as a ZIP file (by suffix) or a folder; `labels` maps names to labels."""
    if labels is not None:
        files = {**files, "dataset.json": json.dumps({"labels": list(labels.items())}).encode()}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def random_images(count: int, size: int = 8, channels: int | None = 3, seed: int = 0) -> dict[str, bytes]:
    """Files of random PNG images, `channels=None` for grayscale."""
    rng = np.random.default_rng(seed)
    shape = [size, size] if channels is None else [size, size, channels]
    return {f"00000/img{i:08d}.png": png(rng.integers(0, 256, shape, dtype=np.uint8)) for i in range(count)}


def tiny_network(seed: int = 0, **kwargs) -> Precond:
    """A small network whose output is not zero."""
    torch.manual_seed(seed)
    defaults = dict(
        img_resolution=8,
        img_channels=1,
        label_dim=10,
        model_channels=8,
        channel_mult=[1, 2],
        num_blocks=1,
        attn_resolutions=[],
        channels_per_head=8,
    )
    net = Precond(**{**defaults, **kwargs}, precision="fp32").eval().requires_grad_(False)
    for name, parameter in net.named_parameters():
        if name.endswith("gain"):
            parameter.fill_(0.5)
    return net


@pytest.fixture
def snapshot_file(tmp_path) -> Path:
    path = tmp_path / "tiny.safetensors"
    save_network(path, tiny_network(), StandardRGBEncoder(), {"nimg": 1024, "ema_std": 0.05})
    return path


def change_tensor(path: Path, name: str, change) -> None:
    """Put `change(tensor)` in the place of a tensor of a snapshot, as another program would."""
    with safetensors.safe_open(path, framework="pt") as f:
        tensors = {key: f.get_tensor(key) for key in f.keys()}
        metadata = f.metadata()
    safetensors.torch.save_file({**tensors, name: change(tensors[name])}, path, metadata)


def run_cli(command, *args) -> Result:
    """Run a command line in this process; an error that is not the user's fails the test."""
    result = CliRunner().invoke(command, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def torchrun(processes: int, *args, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run a script of ours in several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run([*command, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def fails_with(result: Result, *fragments: str, exit_code: int = 2) -> None:
    """Assert that a command ended with one clear line that holds all fragments."""
    assert result.exit_code == exit_code, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.output
    for fragment in fragments:
        assert fragment in lines[0], f"{fragment!r} is not in {lines[0]!r}"


def images_in(folder: Path) -> dict[str, np.ndarray]:
    return {str(p.relative_to(folder)): np.asarray(PIL.Image.open(p)) for p in sorted(folder.rglob("*.png"))}


def options_of(command, args: list[str]) -> set[str]:
    """Names of the parameters that a command line sets."""
    names = {option: p.name for p in command.params for option in [*p.opts, *p.secondary_opts]}
    return {names[arg.split("=")[0]] for arg in args if arg.startswith("-")}


def assert_all_options(command, args: list[str], but_those_of: click.Command | None = None) -> None:
    """Assert that a command line sets all options of a command, but for those that another one's tests set."""
    others = set() if but_those_of is None else {p.name for p in but_those_of.params}
    wanted = {p.name for p in command.params} - {"help"} - others
    assert options_of(command, args) - others == wanted


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A finished run with snapshots at three times."""
    path = tmp_path_factory.mktemp("cli") / "run"
    result = run_cli(train_edm2.main, f"--outdir={path}", f"--data={DIGITS}", *TINY, "--duration=3Ki")
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """What runs training commands in processes that start at once."""
    with Forks(tmp_path_factory.mktemp("forks") / "log.txt") as forks:
        yield forks


# Another set of golden files of the same layout can be named.
GOLDEN = Path(os.environ.get("OPENEDM2_GOLDEN") or ROOT / "tests" / "golden")


class Golden:
    """One golden file; `check` compares and keeps the largest relative error."""

    def __init__(self, name: str):
        self.arrays = np.load(GOLDEN / f"{name}.npz")
        self.meta = json.loads(str(self.arrays["meta_json"])) if "meta_json" in self.arrays else {}

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key])

    def state(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k[len(prefix) + 1 :]: self[k] for k in self.arrays.files if k.startswith(prefix + "/")}

    def network(self, prefix: str = "state", kwargs: str = "kwargs") -> Precond:
        net = Precond(**self.meta[kwargs], precision="fp32")
        net.load_state_dict(self.state(prefix))
        return net.eval()

    def toy_model(self, prefix: str, kwargs: str | None = None) -> ToyModel:
        """Of toy.npz; its arguments have the name of the state unless `kwargs` says otherwise."""
        meta = self.meta[kwargs or prefix]
        net = ToyModel(2, meta["num_layers"], meta["hidden_dim"], meta.get("sigma_data", 0.5))
        net.load_state_dict(self.state(prefix))
        return net


def relative_error(actual, expected) -> float:
    actual, expected = np.float64(actual), np.float64(expected)
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30))


@pytest.fixture
def check(record_property):
    """Compare with a tolerance; the largest error of the test is recorded in the JUnit report."""
    largest = [0.0]

    def compare(actual, expected, tolerance: float, name: str = "") -> None:
        if isinstance(actual, torch.Tensor):
            actual = actual.detach().cpu()
        error = relative_error(actual, expected)
        largest[0] = max(largest[0], error)
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"

    yield compare
    record_property("largest_relative_error", largest[0])


# ---------------------------------------------------------------------------------------------------------
# Metrics


@pytest.fixture(scope="session")
def digits_ref(tmp_path_factory) -> Path:
    """Reference statistics of the digits, for all metrics of pixels."""
    path = tmp_path_factory.mktemp("ref") / "digits.safetensors"
    options = ["--metrics=fd_pixels,kd_pixels,prdc_pixels", "--workers=0"]
    result = run_cli(calculate_metrics.main, "ref", f"--data={DIGITS}", f"--dest={path}", *options)
    assert result.exit_code == 0, result.output
    return path


def filled(key: str, shape: list[int], seed: int) -> torch.Tensor:
    """Weights by the rule in the description of inception.npz."""
    generator = torch.Generator().manual_seed((zlib.crc32(key.encode()) + seed) % 2**32)
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    r = torch.randn(shape, generator=generator)
    if len(shape) >= 2:
        return r * math.sqrt(2 / r[0].numel())
    if key.endswith("running_var"):
        return 1 + 0.5 * torch.rand(shape, generator=generator)
    return 1 + 0.1 * r if key.endswith("bn.weight") else 0.1 * r


@pytest.fixture(scope="session")
def inception_state():
    meta = Golden("inception").meta
    return {key: filled(key, shape, meta["fill_seed"]) for key, shape in meta["keys"].items()}


@pytest.fixture(scope="session")
def inception_file(inception_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(inception_state, path)
    return path


def write_dinov2(folder, state: dict[str, torch.Tensor] | None = None, **changes):
    """The folder of the tiny golden network, with changes."""
    golden = Golden("dinov2_tiny")
    folder.mkdir(exist_ok=True)
    config = {"model_type": "dinov2", **golden.meta["dinov2_config"], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(golden.state("state") if state is None else state, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def dinov2_folder(tmp_path_factory):
    return write_dinov2(tmp_path_factory.mktemp("dinov2"))


def write_clip(folder, tensors: str = "model.safetensors", seed: int = 0, **changes):
    """The folder of a tiny CLIP with random weights, as the hub has the whole of it."""
    from transformers import CLIPConfig, CLIPModel

    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    vision = dict(**sizes, image_size=28, patch_size=14, projection_dim=12)
    text = dict(**sizes, vocab_size=20, max_position_embeddings=8, projection_dim=12)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    torch.manual_seed(seed)
    state = {name: tensor.contiguous() for name, tensor in CLIPModel(config).state_dict().items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), **changes}))
    if tensors == "model.safetensors":
        safetensors.torch.save_file(state, folder / tensors)
    else:  # with what older files hold besides
        torch.save({**state, "vision_model.embeddings.position_ids": torch.arange(5)[None]}, folder / tensors)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


# ---------------------------------------------------------------------------------------------------------
# Latents


@pytest.fixture(scope="session")
def vae(tmp_path_factory) -> Path:
    """A small AutoencoderKL with random weights that makes latents of an eighth of the size."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        latent_channels=4,
    )
    path = tmp_path_factory.mktemp("vae")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def vae16(tmp_path_factory) -> Path:
    """As `vae`, with 16 channels, and latents that are shifted and scaled."""
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    model = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=16,
        scaling_factor=1.5,
        shift_factor=0.25,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    path = tmp_path_factory.mktemp("vae16")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def dc_ae(tmp_path_factory) -> Path:
    """A small AutoencoderDC with random weights that makes latents of half the size."""
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    kinds, channels, layers, scales = ("ResBlock", "EfficientViTBlock"), (8, 16), (1, 1), ((), (5,))
    options: dict[str, Any] = {"latent_channels": 4, "attention_head_dim": 4}
    for part in ("encoder", "decoder"):
        options |= {f"{part}_block_types": kinds, f"{part}_block_out_channels": channels}
        options |= {f"{part}_layers_per_block": layers, f"{part}_qkv_multiscales": scales}
    path = tmp_path_factory.mktemp("dc_ae")
    AutoencoderDC(**options).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def nvae(tmp_path_factory) -> Path:
    """A snapshot of the NVAE of digits-nvae with random weights."""
    torch.manual_seed(0)
    net = preset_network(NVAE_PRESETS["digits-nvae"])
    with torch.no_grad():
        for _ in range(20):
            net(torch.rand(16, 1, 8, 8))
    path = tmp_path_factory.mktemp("nvae") / "nvae.safetensors"
    save_network(path, net, StandardRGBEncoder(), {}, torch.float32)
    return path


@pytest.fixture(scope="session")
def pixels(tmp_path_factory) -> Path:
    """A dataset of ten RGB images in three classes."""
    path = tmp_path_factory.mktemp("pixels") / "pixels.zip"
    labels = {f"00000/img{i:08d}.png": i % 3 for i in range(10)}
    return make_dataset(path, random_images(10, size=16), labels)


def tiny_uvit(conditioning: Conditioning | None = None, **arguments) -> UViTDenoiser:
    """A small U-ViT of 8x8 grey images with ten classes, or other conditions."""
    torch.manual_seed(0)
    data = DataSpec(channels=1, resolution=8, conditioning=conditioning or Conditioning.of_labels(10))
    small = dict(embed_dim=16, depth=3, num_heads=2)
    return UViTDenoiser(data, **{**small, **arguments}).eval().requires_grad_(False)
