"""What a snapshot says of itself, and the network and encoder that are built from it."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dnnlib.errors import UserError, one_line
from dnnlib.util import code_version
from torch_utils import safe_pickle
from training.conditioning import DataSpec
from training.encoders import Encoder, encoder_from_record
from training.families import ARCHITECTURES, architecture_name

FORMAT_VERSION = 2
METADATA_KEY = "openedm2"  # under which the JSON block stands in a file


@dataclass(frozen=True)
class Part:
    """Something that a file names, to be built with these arguments. The name is looked up in a table of ours."""

    name: str
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Description:
    """The JSON block of a snapshot. What a file does not say is None.

    Args:
        architecture: the network, of `ARCHITECTURES`.
        encoder: between stored data and what the network sees, of `ENCODERS`.
        format_version: of the file.
        preconditioning: what turns the network into a denoiser; None = the architecture has its own, or needs none.
        data: what the network works on; None = no images.
        class_names: what the classes are called.
        text_encoder: what made the contexts of captions, as `text_encoder_from_record` reads it.
        nimg: images that it was trained on.
        ema_std: relative width of its EMA profile.
        config: training configuration.
        dataset: fingerprint of the training data.
        code_version: of this code, when the snapshot was saved.
        source: name of the published file that it was converted from.
        license: of the weights, as the Hugging Face hub names it.
        reconstructed_from: names of the snapshots that post-hoc EMA combined.
        dataset_kwargs, loss_kwargs, use_fp16: what published pickles say of their training, and what they compute in.
        notes: what else was known when the snapshot was saved.
    """

    architecture: Part
    encoder: Part
    format_version: int = FORMAT_VERSION
    preconditioning: Part | None = None
    data: DataSpec | None = None
    class_names: list[str] | None = None
    text_encoder: dict[str, Any] | None = None
    nimg: int | None = None
    ema_std: float | None = None
    config: dict[str, Any] | None = None
    dataset: dict[str, Any] | None = None
    code_version: str | None = None
    source: str | None = None
    license: str | None = None
    reconstructed_from: list[str] | None = None
    dataset_kwargs: dict[str, Any] | None = None
    loss_kwargs: dict[str, Any] | None = None
    use_fp16: bool | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, source: str, block: Any) -> "Description":
        """The description in a JSON block of format 1 or 2.

        Args:
            source: names the file in errors.

        Raises:
            UserError: the format is unknown, an entry is unknown, missing or of the wrong type.
        """
        if not isinstance(block, dict):
            raise UserError(f"{source}: its description is not that of a network of this project")
        block = safe_pickle.plain(block, source)
        version = block.get("format_version")
        if version not in (1, FORMAT_VERSION):
            raise UserError(f"{source}: format version {one_line(version)[:50]} is unknown: update this code")
        if version == 1:  # notes stood among the rest
            block["notes"] = {key: block.pop(key) for key in list(block) if key not in _FORMAT_1}
        for key, value in block.items():
            if key not in _JSON_TYPES:
                raise UserError(f"{source}: its description has an unknown entry {key[:50]!r}: update this code")
            if value is not None and type(value) is not _JSON_TYPES[key]:
                kind = _JSON_TYPES[key].__name__
                raise UserError(f"{source}: its description is damaged: {key} is not of type {kind}")
            if type(value) is list and not all(type(item) is str for item in value):
                raise UserError(f"{source}: its description is damaged: {key} is not a list of names")
        values: dict[str, Any] = {key: value for key, value in block.items() if value is not None}
        try:
            for key in ("architecture", "encoder", "preconditioning"):
                if key in values:
                    values[key] = Part(**values[key])
            if "data" in values:
                values["data"] = DataSpec.from_json(values["data"])
            return cls(**values)
        except (KeyError, TypeError, UserError) as err:
            reason = err if isinstance(err, UserError) else repr(err)
            raise UserError(f"{source}: its description is incomplete ({one_line(reason)[:100]})") from None

    def to_json(self) -> dict[str, Any]:
        """The JSON block, in the current format."""
        block: dict[str, Any] = dataclasses.asdict(self) | {"format_version": FORMAT_VERSION}
        block = {key: value for key, value in block.items() if value is not None and (key, value) != ("notes", {})}
        return json.loads(json.dumps(block))  # lists in place of tuples

    @property
    def metadata(self) -> dict[str, Any]:
        """All that is known, as plain JSON values in one dictionary: the JSON block, with the notes among the rest."""
        block = self.to_json()
        notes = block.pop("notes", {})
        return {**notes, **block, "format_version": self.format_version}

    def with_data(self, net: nn.Module) -> "Description":
        """The same, with what the network works on where the file does not say it."""
        return dataclasses.replace(self, data=self.data or _data_of(net))

    def build(self, source: str) -> tuple[nn.Module, Encoder]:
        """The network, still without values (on the meta device), and the encoder.

        Args:
            source: names the file in errors.

        Raises:
            UserError: unknown names, or arguments that do not make a network.
        """
        if self.preconditioning is not None:
            raise UserError(f"{source}: unknown preconditioning {_shown(self.preconditioning)}: update this code")
        architecture = ARCHITECTURES.get(_name(source, self.architecture))
        if architecture is None:
            known = ", ".join(ARCHITECTURES)
            raise UserError(f"{source}: unknown architecture {_shown(self.architecture)} (known: {known})")
        try:
            with torch.device("meta"):
                net = architecture.rebuild(self.architecture.kwargs, self.data)
        except Exception as err:  # what a damaged or foreign description asks for can fail in any way
            raise misfit(source, err) from None
        encoder = self.build_encoder(source)
        data = _data_of(net)
        if self.data is not None and not _agree(self.data, data):
            raise misfit(source, "the description of the data is not that of the network")
        if data is not None and not encoder.fits(data.channels):
            raise misfit(source, f"the encoder has statistics of another number of channels than {data.channels}")
        return net, encoder

    def build_encoder(self, source: str) -> Encoder:
        """The encoder alone. Argument and errors as for `build`."""
        return encoder_from_record(source, self.encoder.name, self.encoder.kwargs)


# Type of each entry of the JSON block.
_JSON_TYPES: dict[str, type] = {
    **dict.fromkeys(["architecture", "encoder", "preconditioning", "data"], dict),
    **dict.fromkeys(["text_encoder", "config", "dataset", "dataset_kwargs", "loss_kwargs", "notes"], dict),
    **dict.fromkeys(["source", "license", "code_version"], str),
    **dict.fromkeys(["format_version", "nimg"], int),
    "use_fp16": bool,
    "ema_std": float,
    **dict.fromkeys(["reconstructed_from", "class_names"], list),
}
_FORMAT_1 = _JSON_TYPES.keys() - {"preconditioning", "data", "notes"}


def describe(
    net: nn.Module, encoder: Encoder, metadata: Mapping[str, Any], source: str = "the snapshot"
) -> Description:
    """The description of a network and its encoder.

    Args:
        metadata: what else is known, as JSON values: fields of `Description`, and notes. What it says of network,
            encoder and data gives way to what they are.
        source: names the file in errors.

    Raises:
        UserError: the network's class is not in `ARCHITECTURES`, or `metadata` is not as it should be.
    """
    name = architecture_name(net)
    try:
        block = json.loads(json.dumps(dict(metadata)))
    except (TypeError, ValueError) as err:
        raise UserError(f"{source}: its metadata must be JSON values ({one_line(err)})") from None
    notes = {key: block.pop(key) for key in list(block) if key == "notes" or key not in _JSON_TYPES}
    block |= {
        "format_version": FORMAT_VERSION,
        "architecture": {"name": name, "kwargs": safe_pickle.plain(net.init_kwargs, name)},
        "encoder": encoder.record,
        "preconditioning": None,
        "code_version": code_version(),
        "notes": notes,
    }
    description, data = Description.from_json(source, block), _data_of(net)
    return description if _agree(description.data, data) else dataclasses.replace(description, data=data)


def _data_of(net: Any) -> DataSpec | None:
    """What a network works on; None = no images."""
    return getattr(net, "spec", None)


def misfit(source: str, err: Exception | str) -> UserError:
    """The error for a file whose parts do not go together."""
    return UserError(f"{source}: the weights do not fit the architecture: {one_line(err)[:300]}")


def _name(source: str, part: Part) -> str:
    if type(part.name) is not str or type(part.kwargs) is not dict:
        raise UserError(f"{source}: its description is incomplete (a name or arguments are of the wrong type)")
    return part.name


def _shown(part: Part) -> str:
    return repr(part.name)[:50]


def _agree(said: DataSpec | None, found: DataSpec | None) -> bool:
    """Whether they are the same to a network, which takes classes as vectors."""
    if said is not None and said.conditioning.kind == "vector":
        said = dataclasses.replace(said, conditioning=dataclasses.replace(said.conditioning, kind="classes"))
    return said == found
