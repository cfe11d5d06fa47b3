"""Checkpoints of the published NVAE code (`checkpoint.pt`): read without executing anything in them, and written.

They hold the network's state, the options of the run (an `argparse.Namespace`) and the state of its training.
"""

import argparse
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dnnlib.errors import DamagedFileError, UserError, one_line
from dnnlib.files import atomic_write
from torch_utils.checkpoint import load_checked
from training.networks.nvae import NVAE
from training.networks.nvae_cells import ARCHITECTURES
from training.networks.nvae_layers import Conv2d, DataInitConv2d, convolutions

ALIAS = ".weight_normalized"  # second name of a convolution's weight, where that is not normalised
MAX_OPTION = 4096  # of a whole number; against hostile files

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
    options = {name: args[name] for name in NETWORK_ARGS}
    return {**images, "levels": 2 ** args["num_x_bits"], "published_decoder": True, **options}


def _resolution(dataset: str) -> int:
    known = {"cifar10": 32, "ffhq": 256}
    sized = re.fullmatch(r"(?:celeba|imagenet|lsun_[a-z]+)_(\d{2,4})", dataset)
    if dataset not in known and not sized:
        raise UserError(f"dataset {dataset!r} of the run is unknown, and with it the size of images")
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
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = load_checked(path)
    except pickle.UnpicklingError as err:
        asked = re.search(r"Unsupported global: GLOBAL (\S+)", str(err))
        what = f"it asks for {asked[1][:100]!r}, which no published checkpoint needs" if asked else one_line(err)
        raise UserError(f"{os.fspath(path)}: {what}; nothing in the file was run") from None
    except Exception as err:  # torch has many ways to say that a file is damaged
        raise DamagedFileError(f"{os.fspath(path)}: damaged checkpoint ({one_line(err)}): copy it again") from None
    if not isinstance(data, dict) or not {"args", "state_dict"} <= data.keys():
        raise UserError(f"{os.fspath(path)}: not a checkpoint of NVAE: it has no 'args' and 'state_dict'")
    return data


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that are numbers, text, or lists of them; the others are left out."""
    kinds = (bool, int, float, str, type(None))
    return {
        str(key): value
        for key, value in values.items()
        if type(value) in kinds or (type(value) is list and all(type(item) in kinds for item in value))
    }


def _build(args: dict[str, Any], state: dict[str, torch.Tensor]) -> NVAE:
    """The network of the options, with the state. Nothing larger than the state is allocated on the way."""
    options = network_options(args)
    for name, value in options.items():
        if type(value) is int and not 0 <= value <= MAX_OPTION:
            raise UserError(f"{name}={value} is out of range (0 to {MAX_OPTION})")
    groups = sum(key.startswith("enc_sampler.") and key.endswith(".weight") for key in state)
    cells = options["num_preprocess_blocks"] * options["num_preprocess_cells"]
    if options["num_groups_per_scale"] > groups or max(cells, options["num_cell_per_cond_enc"]) > len(state):
        raise UserError("its options ask for more layers than it has")
    with torch.device("meta"):
        net = NVAE(**options)
    expected = {key: value for key, value in net.state_dict().items() if not key.endswith("init_done")}
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unknown:
        example = min(missing or unknown)
        raise UserError(
            f"{'it lacks' if missing else 'its options have no place for'} {example!r}: another architecture"
        )
    for key, value in expected.items():
        if state[key].shape != value.shape:
            raise UserError(f"{key!r} is of shape {list(state[key].shape)}, its options ask for {list(value.shape)}")
    net = NVAE(**options)
    net.load_state_dict(state, strict=False)
    for conv in convolutions(net):
        if isinstance(conv, DataInitConv2d):
            conv.init_done.fill_(True)
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
        (key, value.detach().cpu()) for key, value in net.state_dict().items() if not key.endswith("init_done")
    )
    expected = network_options(args)
    with torch.device("meta"):
        described = NVAE(**expected)
    shapes = {key: value.shape for key, value in described.state_dict().items() if not key.endswith("init_done")}
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
