"""Pickles of NVIDIA's EDM2 release: networks, raw snapshots and toy models, read as snapshots and written."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dnnlib.errors import UserError, one_line
from dnnlib.util import EasyDict
from torch_utils import safe_pickle
from torch_utils.safe_pickle import LazyTensor, PersistentObject
from training.config.edm2 import EDM2Network
from training.encoders import FINAL_STD, Encoder, StabilityVAEEncoder, StandardRGBEncoder
from training.networks.edm2 import Block, Precond, UNet
from training.networks.edm2_layers import MPConv
from training.networks.toy import ToyModel
from training.snapshot.description import FORMAT_VERSION, METADATA_KEY, Description
from training.snapshot.layout import GetTensor, Request, check_storable
from training.snapshot.places import FileOfPlaces

# Positional arguments of the published classes.
PRECOND_ARGS = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_data", "logvar_channels")
VAE_ARGS = ("vae_name", "raw_mean", "raw_std", "final_mean", "final_std", "batch_size")
TOY_ARGS = ("in_dim", "num_layers", "hidden_dim", "sigma_data")
LOSS_KEYS = ("P_mean", "P_std", "sigma_data")
OURS_ALONE = ("noise_embedding", "noise_bandwidth")  # arguments of networks that the published classes lack
OTHER_FAMILIES = {
    **dict.fromkeys(["EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"], "an EDM (2022) network"),
    **dict.fromkeys(["Generator", "Discriminator"], "a StyleGAN network"),
}
PUBLISHED_ARCHITECTURES = ("edm2.Precond", "toy.ToyModel")  # that these pickles can hold
# Where the published classes are.
NETWORKS_MODULE, ENCODERS_MODULE, LOSS_MODULE, TOY_MODULE = (
    "training.networks_edm2",
    "training.encoders",
    "training.training_loop",
    "toy_example",
)
PUBLISHED_NAME = r"edm2-img(512|64)-.*\.pkl"  # files of NVIDIA's release
PUBLISHED_PLACE = "https://nvlabs-fi-cdn.nvidia.com/edm2/"
PUBLISHED_LICENSE = "cc-by-nc-sa-4.0"


class PublishedFile(FileOfPlaces):
    """A network in a published pickle.

    Args:
        request: its address says training time and EMA width in its end, '...-{kimg}-{std}.pkl'.

    Raises:
        UserError: no such file, a damaged or hostile one, or one of another kind.
    """

    def __init__(self, request: Request):
        self.path = request.fetch()
        source = str(self.path)
        data = safe_pickle.load(self.path)
        record = self._find_network(data, request)
        self._tensors = safe_pickle.module_tensors(record, source)
        self.names = list(self._tensors)
        others = data if isinstance(data, dict) else {}
        block: dict[str, Any] = {"format_version": FORMAT_VERSION, **_provenance(request.path), **_own_block(others)}
        toy = record.class_name == "ToyModel"
        arguments = _arguments(record, TOY_ARGS if toy else PRECOND_ARGS, source)
        use_fp16 = arguments.pop("use_fp16", True)
        if not toy:
            block["use_fp16"] = bool(record.state.get("use_fp16", use_fp16))
        block["architecture"] = {"name": "toy.ToyModel" if toy else "edm2.Precond", "kwargs": arguments}
        block["encoder"] = _encoder(others.get("encoder"), source)
        if isinstance(others.get("dataset_kwargs"), dict):
            block["dataset_kwargs"] = others["dataset_kwargs"]
        if isinstance(others.get("loss_fn"), PersistentObject):
            state = others["loss_fn"].state
            block["loss_kwargs"] = {key: state[key] for key in LOSS_KEYS if key in state}
        self.description = Description.from_json(source, block)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].size

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name].load()

    def place(self, name: str) -> tuple[int, int] | None:
        elements = self._tensors[name].elements
        if elements is None or len(elements) == 0:
            return None
        begin, file = (_address(data) for data in (elements, elements.obj))
        return begin - file, begin - file + len(elements)

    def _find_network(self, data: Any, request: Request) -> PersistentObject:
        """The record of the network that is asked for."""
        if isinstance(data, PersistentObject):
            record = data
        elif isinstance(data, dict):
            if any(isinstance(value, dict) and {"mu", "sigma"} <= value.keys() for value in data.values()):
                raise UserError(f"{self.path}: holds reference statistics of a dataset, not a network")
            networks = [
                key for key, value in data.items() if isinstance(value, PersistentObject) and "_modules" in value.state
            ]
            if request.which not in networks:
                self._check_family([data[key].class_name for key in networks])
                held = _listed(networks or data)
                raise UserError(f"{self.path}: holds no network {request.which!r}, only {held}")
            record = data[request.which]
        else:
            raise UserError(f"{self.path}: a pickle, but not of a network")
        self._check_family([record.class_name])
        if record.class_name not in ("Precond", "ToyModel"):
            raise UserError(
                f"{self.path}: unknown architecture {record.class_name[:50]!r} (known: 'Precond', 'ToyModel')"
            )
        return record

    def _check_family(self, class_names: list[str]) -> None:
        for class_name in class_names:
            if class_name in OTHER_FAMILIES:
                family = OTHER_FAMILIES[class_name]
                raise UserError(f"{self.path}: holds {family} ({class_name}), not one of EDM2 or its toy example")


def _address(data: Any) -> int:
    """Where bytes, or a file that is mapped into memory, begin there."""
    return np.frombuffer(data, np.uint8).ctypes.data


def _listed(keys: Any) -> str:
    return one_line(", ".join(repr(key)[:30] for key in list(keys)[:6]))


def _provenance(address: str) -> dict[str, Any]:
    """What the path or URL of a published file says. Its snapshots were taken at multiples of 1024 images."""
    name = address.rsplit("/", 1)[-1]
    block: dict[str, Any] = {"source": name}
    match = re.search(r"-(\d{7})-(0\.\d+)\.pkl$", name)
    if match is not None:
        block.update(nimg=-(-int(match[1]) * 1000 // 1024) * 1024, ema_std=float(match[2]))
    if re.fullmatch(PUBLISHED_NAME, name) or address.startswith(PUBLISHED_PLACE):
        block["license"] = PUBLISHED_LICENSE
    return block


def _own_block(data: dict[str, Any]) -> dict[str, Any]:
    """The JSON block of a pickle that we wrote, which knows better than a file's name."""
    if METADATA_KEY not in data:
        return {}
    try:
        block = json.loads(data[METADATA_KEY])
    except (TypeError, ValueError, RecursionError):
        return {}
    return {"license": None, **block} if isinstance(block, dict) else {}


def _arguments(record: PersistentObject, names: tuple[str, ...], source: str) -> dict[str, Any]:
    """Arguments that a library object was made with, by name; `names` are those of positional ones."""
    args = dict(zip(names, record.init_args, strict=False))
    return safe_pickle.plain({**args, **record.init_kwargs}, source)


def _encoder(record: Any, source: str) -> dict[str, Any]:
    if record is None:
        return {"name": "StandardRGBEncoder", "kwargs": {}}
    if type(record) is not PersistentObject:
        raise UserError(f"{source}: its encoder is not that of a network")
    if record.class_name != "StabilityVAEEncoder":
        return {"name": record.class_name, "kwargs": {}}
    kwargs = {**StabilityVAEEncoder().init_kwargs, "final_mean": 0, "final_std": FINAL_STD}
    kwargs.update(_arguments(record, VAE_ARGS, source))
    kwargs.pop("batch_size", None)
    channels = len(kwargs["raw_mean"]) if isinstance(kwargs["raw_mean"], list) else 1
    mean, std, final_mean, final_std = (
        _per_channel(kwargs.pop(key), channels, f"{source}: {key} of its encoder")
        for key in ("raw_mean", "raw_std", "final_mean", "final_std")
    )
    # Other final statistics than ours amount to other raw ones.
    kwargs["raw_mean"] = [m - fm * s / fs for m, s, fm, fs in zip(mean, std, final_mean, final_std, strict=True)]
    kwargs["raw_std"] = [s * FINAL_STD / fs for s, fs in zip(std, final_std, strict=True)]
    return {"name": record.class_name, "kwargs": kwargs}


def _per_channel(value: Any, channels: int, what: str) -> list[float]:
    """One number per channel, of a list of them or one for all."""
    numbers = value if isinstance(value, list) else [value] * channels
    low = 1e-12 if "_std" in what else -1e12
    if len(numbers) != channels or not all(type(n) in (int, float) and low <= n <= 1e12 for n in numbers):
        raise UserError(f"{what} is not a sensible number, or one per channel")
    return numbers


# ---------------------------------------------------------------------------------------------------------
# Writing


def write_published(
    path: str | Path, net: nn.Module, get_tensor: GetTensor, dtype: torch.dtype, description: Description
) -> None:
    """Write a pickle that the published tools can read, complete or not at all.

    Args: as `training.snapshot.native.write_native`. Buffers become float16, as all of a published file is, where that
        keeps their values.

    Raises:
        UserError: the published tools know no such encoder or noise embedding, or a value is NaN or infinite in the
            type it is stored in.
        OSError: it could not be written.
    """
    arguments = description.architecture.kwargs
    for name in OURS_ALONE:
        default = getattr(EDM2Network, name)
        if arguments.get(name, default) != default:
            raise UserError(
                f"the published tools know no {name.replace('_', ' ')} {arguments[name]}, which this network has: keep "
                f"it as .safetensors"
            )
    parameters = {name for name, _ in net.named_parameters()}

    def get_stored(name: str) -> torch.Tensor:
        tensor = get_tensor(name)
        exact = dtype != torch.float32 and torch.equal(tensor.half().float(), tensor.float())
        stored = tensor.to(dtype if name in parameters else torch.float16 if exact else torch.float32)
        check_storable(path, name, stored)
        return stored

    record = _module_record(net, get_stored)
    if isinstance(net, ToyModel):
        safe_pickle.save(path, record)
        return
    config = description.config or {}
    use_fp16 = config.get("precision") != "fp32" if description.use_fp16 is None else description.use_fp16
    record.state.update(use_fp16=use_fp16, _init_kwargs={"use_fp16": use_fp16, **record.init_kwargs})
    loss_kwargs = description.loss_kwargs or {key: config[key] for key in ("P_mean", "P_std") if key in config}
    dataset_kwargs = description.dataset_kwargs or dict(
        class_name="training.dataset.ImageFolderDataset",
        path=config.get("data", ""),
        use_labels=config.get("cond", False),
    )
    loss_state = {"P_mean": -0.4, "P_std": 1.0, "sigma_data": 0.5, **loss_kwargs}
    data = EasyDict(
        encoder=_encoder_record(description.build_encoder(str(path))),
        dataset_kwargs=EasyDict(dataset_kwargs),
        loss_fn=_record(LOSS_MODULE, "EDM2Loss", loss_state, loss_kwargs),
        ema=record,
    )
    ours = {key: value for key, value in description.to_json().items() if key not in ("architecture", "encoder")}
    data[METADATA_KEY] = json.dumps(ours)  # the published tools do not look at it
    safe_pickle.save(path, data)


def _record(module: str, class_name: str, state: dict[str, Any], kwargs: dict[str, Any]) -> PersistentObject:
    return PersistentObject(class_name, {**state, "_init_args": (), "_init_kwargs": kwargs}, module)


def _encoder_record(encoder: Encoder) -> PersistentObject:
    if isinstance(encoder, StandardRGBEncoder):
        return _record(ENCODERS_MODULE, "StandardRGBEncoder", {}, {})
    if not isinstance(encoder, StabilityVAEEncoder) or encoder.pixel_range != [0, 1]:
        pixels = f" with pixels from {encoder.pixel_range}" if isinstance(encoder, StabilityVAEEncoder) else ""
        raise UserError(
            f"the published tools have no {type(encoder).__name__}{pixels}, which this network needs: keep it as "
            ".safetensors"
        )
    mean, std = np.array(encoder.raw_mean, np.float32), np.array(encoder.raw_std, np.float32)
    scale = np.float32(FINAL_STD) / std
    state = dict(vae_name=encoder.vae_name, scale=scale, bias=-mean * scale, batch_size=encoder.batch_size, _vae=None)
    kwargs = dict(vae_name=encoder.vae_name, raw_mean=encoder.raw_mean, raw_std=encoder.raw_std)
    return _record(ENCODERS_MODULE, "StabilityVAEEncoder", state, kwargs)


def _module_record(module: nn.Module, get_tensor: GetTensor, prefix: str = "") -> PersistentObject:
    """The record of a module: torch's attributes, our tensors, and the attributes of the published class."""

    def lazy(name: str, is_parameter: bool) -> LazyTensor:
        return LazyTensor(lambda: get_tensor(prefix + name), is_parameter)

    state = {**nn.Module().__dict__, "training": False}
    state["_parameters"] = {name: lazy(name, True) for name in module._parameters}
    state["_buffers"] = {name: lazy(name, False) for name in module._buffers}
    state["_modules"] = {
        name: _module_record(child, get_tensor, f"{prefix}{name}.") for name, child in module.named_children()
    }
    kind = type(module).__name__
    if kind in safe_pickle.CONTAINERS:
        return PersistentObject(kind, state)
    kwargs = module.init_kwargs if isinstance(module, (Precond, ToyModel)) else {}
    kwargs = {name: value for name, value in kwargs.items() if name not in OURS_ALONE}
    if isinstance(module, Precond):
        state.update(_attributes(module, "img_resolution img_channels label_dim sigma_data"))
    elif isinstance(module, UNet):
        state.update(_attributes(module, "label_balance concat_balance"))
    elif isinstance(module, Block):
        names = "flavor resample_filter resample_mode num_heads dropout res_balance attn_balance clip_act"
        state.update(_attributes(module, names), out_channels=module.emb_linear.weight.shape[0])
    elif isinstance(module, ToyModel):
        state["sigma_data"] = module.sigma_data
    elif isinstance(module, MPConv) and prefix.startswith("layers."):
        kind = "MPLinear"
    elif isinstance(module, MPConv):
        state["out_channels"] = module.weight.shape[0]
    # Layers that are left out are attributes, too.
    state.update(
        {name: None for name in ("emb_label", "conv_skip", "attn_qkv", "attn_proj") if name in module.__dict__}
    )
    place = TOY_MODULE if kind in ("ToyModel", "MPLinear", "MPSiLU") else NETWORKS_MODULE
    return _record(place, kind, state, kwargs)


def _attributes(module: nn.Module, names: str) -> dict[str, Any]:
    values = {name: getattr(module, name) for name in names.split()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
