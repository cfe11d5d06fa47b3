"""Checkpoints of the published NVAE code (`checkpoint.pt`): read without executing anything in them, and written.

They hold the network's state, the options of the run (an `argparse.Namespace`) and the state of its training.
"""

import argparse
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import DamagedFileError, UserError, one_line
from dnnlib.files import atomic_write
from torch_utils.checkpoint import load_checked
from torch_utils.tensor_files import refused
from training.config.nvae import NVAENetwork
from training.networks.nvae import NVAE
from training.networks.nvae_cells import ARCHITECTURES
from training.networks.nvae_layers import Conv2d
from training.snapshot.description import FORMAT_VERSION, Description
from training.snapshot.layout import GetTensor, LoadedFile, Request, is_training_state

INIT_DONE = "init_done"  # a buffer of ours that published files lack
TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64)
ALIAS = ".weight_normalized"  # second name of a convolution's weight, where that is not normalised
MAX_BITS = 8  # of a pixel
ARCHITECTURE = "nvae.NVAE"  # that these files hold
NOTE = "published"  # under which a snapshot keeps what a checkpoint says of its run

# Options that files older than the option lack, with what they meant.
OLD_ARGS = {"ada_groups": False, "min_groups_per_scale": 1, "num_mixture_dec": 10}
NETWORK_ARGS = (
    "arch_instance",
    "num_latent_scales",
    "num_groups_per_scale",
    "num_latent_per_group",
    "ada_groups",
    "min_groups_per_scale",
    "num_channels_enc",
    "num_channels_dec",
    "num_preprocess_blocks",
    "num_preprocess_cells",
    "num_cell_per_cond_enc",
    "num_postprocess_blocks",
    "num_postprocess_cells",
    "num_cell_per_cond_dec",
    "num_mixture_dec",
    "num_nf",
    "use_se",
    "res_dist",
)


def network_options(args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `NVAE` for the options of a published run, which name the dataset instead of the images' size.

    Raises:
        UserError: an option is missing, or the dataset is unknown.
    """
    args = {**OLD_ARGS, **args}
    missing = [name for name in ("dataset", "num_x_bits", *NETWORK_ARGS) if name not in args]
    if missing:
        raise UserError(f"the options of the run lack {', '.join(missing)}")
    dataset = str(args["dataset"])
    if dataset in ("mnist", "omniglot"):
        images = dict(img_resolution=32, img_channels=1, decoder="bernoulli", loss_crop=2)
    else:
        decoder = "normal" if args["num_mixture_dec"] == 1 else "mixture"
        images = dict(img_resolution=_resolution(dataset), img_channels=3, decoder=decoder)
    bits = args["num_x_bits"]
    if type(bits) is not int or not 1 <= bits <= MAX_BITS:
        raise UserError(f"num_x_bits={one_line(bits)[:50]} of the run is no number of bits from 1 to {MAX_BITS}")
    options = {name: args[name] for name in NETWORK_ARGS}
    return {**images, "levels": 2**bits, "published_decoder": True, **options}


def _resolution(dataset: str) -> int:
    known = {"cifar10": 32, "ffhq": 256}
    sized = re.fullmatch(r"(?:celeba|imagenet|lsun_[a-z]+)_(\d{2,4})", dataset)
    if dataset not in known and not sized:
        raise UserError(f"dataset {one_line(dataset)[:50]!r} of the run is unknown, and with it the size of images")
    return int(sized[1]) if sized else known[dataset]


@dataclass
class Checkpoint:
    """A published checkpoint.

    Attributes:
        net: the network, in eval mode.
        args: options of the run, with `OLD_ARGS` for those that it lacks.
        epoch: epochs completed.
        global_step: steps completed.
        optimizer: per parameter `step`, `exp_avg` and `exp_inf` of Adamax; empty if the file has none.
        scheduler: state of torch's `CosineAnnealingLR`.
        grad_scalar: state of torch's `GradScaler`.
    """

    net: NVAE
    args: dict[str, Any]
    epoch: int = 0
    global_step: int = 0
    optimizer: dict[str, dict[str, Any]] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    grad_scalar: dict[str, Any] = field(default_factory=dict)


def load_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read a published checkpoint, of any age and device, without executing anything in it.

    Raises:
        UserError: no such file, a damaged one, one that asks for more than data, or one whose parts do not fit.
    """
    data = _read(path)
    try:
        args = {**OLD_ARGS, **_plain(vars(data["args"]))}
        state = {key: value for key, value in data["state_dict"].items() if not key.endswith(ALIAS)}
        _check_tensors(state, os.path.getsize(path))
        net = _build(args, state)
        optimizer = _named_optimizer_state(net, data.get("optimizer", {"state": {}}))
        epoch, global_step = int(data.get("epoch", 0)), int(data.get("global_step", 0))
        scheduler, grad_scalar = (_plain(data.get(key) or {}) for key in ("scheduler", "grad_scalar"))
    except UserError as err:
        raise UserError(f"{os.fspath(path)}: {err}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as err:
        raise UserError(f"{os.fspath(path)}: not a checkpoint of NVAE ({one_line(err)})") from None
    return Checkpoint(net, args, epoch, global_step, optimizer, scheduler, grad_scalar)


def _read(path: str | os.PathLike) -> dict[str, Any]:
    """The contents of the file, reduced to tensors, plain values and a namespace."""
    if not os.path.isfile(path):
        raise UserError(f"{os.fspath(path)}: no such file")
    try:
        _check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = load_checked(path)
    except UserError:
        raise
    except pickle.UnpicklingError as err:
        raise refused(path, err) from None
    except Exception as err:  # torch has many ways to say that a file is damaged
        raise DamagedFileError(f"{os.fspath(path)}: damaged checkpoint ({one_line(err)}): copy it again") from None
    if not isinstance(data, dict) or not {"args", "state_dict"} <= data.keys():
        raise UserError(f"{os.fspath(path)}: not a checkpoint of NVAE: it has no 'args' and 'state_dict'")
    return data


def _check_archive(path: str | os.PathLike) -> None:
    """Check that a ZIP archive is not compressed: published files are not, and small ones could become large."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise UserError(f"{os.fspath(path)}: a compressed archive, which no published checkpoint is")


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that are numbers, text, or lists of them; the others are left out."""
    kinds = (bool, int, float, str, type(None))
    return {
        str(key): value
        for key, value in values.items()
        if type(value) in kinds or (type(value) is list and all(type(item) in kinds for item in value))
    }


def _check_tensors(state: Mapping[str, Any], size: int) -> None:
    """Check that a state is made of tensors, which a file of that size can hold one beside the other."""
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or value.dtype not in TYPES:
            raise UserError(f"{one_line(key)[:50]!r} in it is no tensor of numbers")
    if sum(value.numel() * value.itemsize for value in state.values()) > size:
        raise UserError("its tensors share their values, which no published checkpoint needs")


def _build(args: dict[str, Any], state: dict[str, torch.Tensor]) -> NVAE:
    """The network of the options, whose tensors are those of the state."""
    options = network_options(args)
    groups = sum(NVAENetwork(**{name: options[name] for name in NETWORK_ARGS}).groups)
    if f"enc_sampler.{groups - 1}.weight" not in state:  # a large network would take its time to make
        raise UserError(f"its options ask for {groups} groups, which it lacks: another architecture")
    with torch.device("meta"):
        net = NVAE(**options)
    expected = {key: value for key, value in net.state_dict().items() if not key.endswith(INIT_DONE)}
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unknown:
        example = min(missing or unknown)
        raise UserError(
            f"{'it lacks' if missing else 'its options have no place for'} {example!r}: another architecture"
        )
    for key, value in expected.items():
        if state[key].shape != value.shape:
            raise UserError(f"{key!r} is of shape {list(state[key].shape)}, its options ask for {list(value.shape)}")
    values = {key: state[key].to(value.dtype).contiguous() for key, value in expected.items()}
    done = {key: torch.tensor(True) for key in net.state_dict() if key.endswith(INIT_DONE)}
    net.load_state_dict({**values, **done}, assign=True)
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    return net.eval()


def _named_optimizer_state(net: NVAE, optimizer: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The optimiser's state by name: it counts parameters in the order in which the network registers them."""
    names = [name for name, _ in net.named_parameters()]
    return {names[i]: dict(values) for i, values in optimizer["state"].items()}


# ---------------------------------------------------------------------------------------------------------
# Writing


def save_checkpoint(path: str | os.PathLike, checkpoint: Checkpoint) -> None:
    """Write a checkpoint that the published code loads and continues from.

    Raises:
        UserError: the network is none that the published options can describe.
        OSError: the file could not be written.
    """
    net, args = checkpoint.net, checkpoint.args
    state = OrderedDict(
        (key, value.detach().cpu()) for key, value in net.state_dict().items() if not key.endswith(INIT_DONE)
    )
    expected = network_options(args)
    with torch.device("meta"):
        described = NVAE(**expected)
    shapes = {key: value.shape for key, value in described.state_dict().items() if not key.endswith(INIT_DONE)}
    if shapes != {key: value.shape for key, value in state.items()}:
        raise UserError(f"{os.fspath(path)}: the published options do not describe this network")
    ops = ARCHITECTURES[args["arch_instance"]]
    names = [name for name, _ in net.named_parameters()]
    lr, decay = args.get("learning_rate", 0.01), args.get("weight_decay", 3e-4)
    hyper = dict(lr=lr, betas=(0.9, 0.999), eps=1e-3, weight_decay=decay, initial_lr=lr)
    data = {
        "epoch": checkpoint.epoch,
        "state_dict": _with_aliases(net, state),
        "optimizer": {
            "state": {names.index(name): values for name, values in checkpoint.optimizer.items()},
            "param_groups": [{**hyper, "params": list(range(len(names)))}],
        },
        "global_step": checkpoint.global_step,
        "args": argparse.Namespace(**args),
        "arch_instance": {
            **{f"{kind}_enc": list(ops.encoder) for kind in ("normal", "down")},
            **{f"{kind}_dec": list(ops.decoder) for kind in ("normal", "up")},
            **{f"{kind}_pre": list(ops.pre) for kind in ("normal", "down")},
            **{f"{kind}_post": list(ops.post) for kind in ("normal", "up")},
            "ar_nn": [""],
        },
        "scheduler": checkpoint.scheduler,
        "grad_scalar": checkpoint.grad_scalar,
    }
    with atomic_write(path) as f:
        torch.save(data, f)


def _with_aliases(net: NVAE, state: OrderedDict[str, torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
    """The state with the second names of plain convolutions' weights, each after the first one."""
    plain = {f"{name}.weight" for name, m in net.named_modules() if isinstance(m, Conv2d) and m.log_weight_norm is None}
    result: OrderedDict[str, torch.Tensor] = OrderedDict()
    for key, value in state.items():
        result[key] = value
        if key in plain:
            result[key.removesuffix(".weight") + ALIAS] = value
    return result


# ---------------------------------------------------------------------------------------------------------
# As snapshots


def may_be_nvae(request: Request) -> bool:
    """Whether a .pt file can be a published checkpoint."""
    return not is_training_state(Path(request.path))


class PublishedNVAEFile(LoadedFile):
    """A published checkpoint as a snapshot. What it says of its run is kept among the notes.

    Raises:
        UserError: as `load_checkpoint`.
    """

    def __init__(self, request: Request):
        self.path = request.fetch()
        request.check_which(self.path)
        checkpoint = load_checkpoint(self.path)
        net = checkpoint.net
        self._tensors = net.state_dict()
        self.names = list(self._tensors)
        run = {"args": checkpoint.args, "epoch": checkpoint.epoch, "global_step": checkpoint.global_step}
        block = {
            "format_version": FORMAT_VERSION,
            "architecture": {"name": ARCHITECTURE, "kwargs": net.init_kwargs},
            "encoder": {"name": "StandardRGBEncoder", "kwargs": {}},
            "data": net.spec.to_json(),
            "source": self.path.name,
            "notes": {NOTE: run},
        }
        self.description = Description.from_json(str(self.path), block)


def write_nvae(
    path: Path, net: torch.nn.Module, get_tensor: GetTensor, dtype: torch.dtype, description: Description
) -> None:
    """Write a snapshot as a published checkpoint, in float32, without the state of an optimiser.

    Raises:
        UserError: the network is none that the published options can describe.
        OSError: the file could not be written.
    """
    assert isinstance(net, NVAE)
    run = description.notes.get(NOTE, {})
    args = run.get("args") or published_args(net, str(path))
    with torch.device("meta"):
        filled = NVAE(net.img_resolution, net.img_channels, **net.init_kwargs)
    values = {name: get_tensor(name).detach().to("cpu", tensor.dtype) for name, tensor in filled.state_dict().items()}
    filled.load_state_dict(values, assign=True)
    save_checkpoint(path, Checkpoint(filled, args, run.get("epoch", 0), run.get("global_step", 0)))


def published_args(net: NVAE, source: str) -> dict[str, Any]:
    """Options of a published run with such a network.

    Raises:
        UserError: there are none; `source` names the file.
    """
    options = net.init_kwargs
    bits = net.decoder.levels.bit_length() - 1
    args: dict[str, Any] = {name: options[name] for name in NETWORK_ARGS}
    args |= {"num_x_bits": 8 if options["decoder"] == "bernoulli" else bits}
    if options["decoder"] == "normal":
        args["num_mixture_dec"] = 1
    names = {32: "cifar10"} if net.img_channels == 3 else {32: "mnist"}
    args["dataset"] = names.get(net.img_resolution, f"celeba_{net.img_resolution}")
    ignored = {"published_decoder", *(["levels"] if options["decoder"] == "bernoulli" else [])}
    wanted = {"img_resolution": net.img_resolution, "img_channels": net.img_channels, **options}
    try:
        found = network_options(args)
    except UserError as err:
        raise UserError(f"{source}: the published code has no such networks ({err})") from None
    other = next((key for key in found if key not in ignored and found[key] != wanted[key]), None)
    if other is not None:
        raise UserError(f"{source}: the published code has no networks with {other}={wanted[other]}: keep .safetensors")
    return args
