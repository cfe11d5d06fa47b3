"""Which encoder goes with a dataset, with a record in a file, or with a VAE that the user names."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dnnlib.errors import UserError, one_line
from training.conditioning import Conditioning, DataSpec
from training.config.data import HUGE, TINY, EncoderArguments
from training.dataset.images import ImageFolderDataset
from training.dataset.order import evenly_spaced
from training.encoders.autoencoders import (
    PUBLISHED_MEAN,
    PUBLISHED_STD,
    AutoencoderDCEncoder,
    AutoencoderEncoder,
    StabilityVAEEncoder,
)
from training.encoders.base import Encoder, Moments, RawLatentEncoder, StandardRGBEncoder
from training.encoders.models import PUBLISHED_SUFFIX, PUBLISHED_VAE, ModelFiles, absolute
from training.encoders.nvae import NVAEEncoder
from training.encoders.vae import VAEEncoder

# The registry: names in files.
ENCODERS: dict[str, type[Encoder]] = {
    cls.__name__: cls
    for cls in (StandardRGBEncoder, RawLatentEncoder, StabilityVAEEncoder, AutoencoderDCEncoder, NVAEEncoder)
}
RAW = "raw"  # in place of the name of a VAE: there is none
MAX_MEASURED = 10000  # items whose statistics are taken for those of all


def encoder_from_record(source: str, name: Any, kwargs: Any) -> Encoder:
    """The encoder that a file names.

    Args:
        source: names the file in errors.

    Raises:
        UserError: an unknown name, or arguments that do not make an encoder.
    """
    if type(name) is not str or type(kwargs) is not dict:
        raise UserError(f"{source}: its encoder has no name and arguments")
    encoder_class = ENCODERS.get(name)
    if encoder_class is None:
        raise UserError(f"{source}: unknown encoder {name[:50]!r} (known: {', '.join(ENCODERS)})")
    try:
        EncoderArguments.from_json(kwargs)
        encoder = encoder_class(**kwargs)
    except (UserError, TypeError) as err:
        raise UserError(f"{source}: the arguments of its encoder do not fit ({one_line(err)[:100]})") from None
    return encoder.named_by(source) if isinstance(encoder, VAEEncoder) else encoder


def encoder_of_vae(vae_name: str) -> VAEEncoder:
    """The encoder of a VAE that the user names: the published one with its statistics, others with none yet, or that of
    an NVAE, which needs none.

    Raises:
        UserError: there is no such VAE, or none that is known here.
        RunError: it, or its configuration, could not be downloaded now.
    """
    return NVAEEncoder(absolute(vae_name)) if NVAEEncoder.recognises(vae_name) else encoder_of_autoencoder(vae_name)


def encoder_of_autoencoder(vae_name: str, **kwargs: Any) -> AutoencoderEncoder:
    """As `encoder_of_vae`, of a VAE of diffusers.

    Args:
        kwargs: arguments of the encoder.
    """
    if vae_name == PUBLISHED_VAE:
        return StabilityVAEEncoder(**kwargs)
    files = ModelFiles(vae_name, with_weights=False)
    model_class = files.class_name()
    if files.is_published:
        kwargs = {"pixel_range": (-1.0, 1.0), **kwargs}
    classes = {cls.model_class: cls for cls in ENCODERS.values() if issubclass(cls, AutoencoderEncoder)}
    if model_class not in classes:
        raise UserError(f"the VAE {vae_name} is an {one_line(model_class)[:50]}; known are {', '.join(classes)}")
    return classes[model_class](absolute(vae_name), **{"raw_mean": (), "raw_std": (), **kwargs})


def encoder_for(
    dataset: ImageFolderDataset,
    override: str = "",
    trusted: bool = False,
    log: Callable[[str], None] = lambda _line: None,
    max_items: int = MAX_MEASURED,
) -> Encoder:
    """The encoder that suits a dataset's contents.

    Pixels: `StandardRGBEncoder`. Latents: as dataset.json records it; without a record, `StabilityVAEEncoder` for 8
    channels, else `RawLatentEncoder`. Statistics that are not known are measured on up to `max_items` evenly spaced
    items.

    Args:
        override: VAE that the user names in place of the recorded or assumed one, or 'raw': there is none.
        trusted: whether whatever VAE dataset.json names may be fetched.
        log: shows a line where a VAE had to be assumed.

    Raises:
        UserError: there is no such VAE, the record does not fit the latents, or a channel of them is constant or holds
            numbers that are far too large.
        RunError: the configuration of a VAE could not be downloaded now.
    """
    if dataset.dtype == np.uint8:
        if override:
            raise UserError(f"--encoder={override} is for latents, and {dataset.path} holds pixels")
        return StandardRGBEncoder()
    encoder = None if override == RAW else recorded_encoder(dataset, override, trusted)
    if encoder is None and override != RAW and dataset.num_channels == 8:
        return assumed_encoder(dataset, log)
    return _with_statistics(encoder or RawLatentEncoder([], []), dataset, max_items)


def recorded_encoder(dataset: ImageFolderDataset, override: str = "", trusted: bool = False) -> Encoder | None:
    """The encoder of latents that the user names or dataset.json records; None = neither.

    Its statistics may be unknown yet. Arguments and errors as for `encoder_for`.
    """
    record, encoder = dataset.encoder_record, None
    if record is not None:
        source = f"{dataset.path}: dataset.json"
        encoder = encoder_from_record(source, record.get("name"), record.get("kwargs"))
    if override:  # the statistics of the record are those of the latents, wherever the VAE is now
        return encoder.with_vae(override) if isinstance(encoder, VAEEncoder) else encoder_of_vae(override)
    return encoder.named_by("") if trusted and isinstance(encoder, VAEEncoder) else encoder


def encoder_to_encode(
    vae_name: str | None, scale: float | str | None = None, pixel_range: Sequence[float] | None = None
) -> tuple[VAEEncoder, str]:
    """The encoder for new latents, and what it does in a line.

    Args:
        vae_name: VAE; None = the published one.
        scale: factor of the latents; 'config' = that of the VAE's configuration; 'published' or 'measured' = whitened
            with these statistics, measured ones being those of the latents to come; None = published for the
            published VAE, config for that of U-ViT, else measured.
        pixel_range: values of black and white; None = those of the encoder's kind.

    Raises:
        UserError: there is no such VAE, it has no published statistics, or it is an NVAE, for which the other arguments
            have no meaning.
        RunError: it could not be downloaded now.
    """
    if vae_name is not None and NVAEEncoder.recognises(vae_name):
        if scale is not None or pixel_range is not None:
            given = "--scale" if scale is not None else "--pixel-range"
            raise UserError(f"{given} has no meaning for latents of an NVAE: leave it out")
        encoder = NVAEEncoder(absolute(vae_name))
        return encoder, f"Encoder: {encoder.describe()}"
    kwargs: dict[str, Any] = {} if pixel_range is None else dict(pixel_range=pixel_range)
    encoder = encoder_of_autoencoder(vae_name or PUBLISHED_VAE, **kwargs)
    if scale == "measured":
        encoder = encoder.measured((), ())
    elif scale == "config" or (scale is None and (vae_name or "").endswith(PUBLISHED_SUFFIX)):
        encoder = encoder.scaled_as_configured()
    elif scale == "published":
        if encoder.latent_channels() != len(PUBLISHED_MEAN) or not encoder.distribution:
            raise UserError(f"--scale=published is for copies of {PUBLISHED_VAE}, and {vae_name} is none: leave it out")
        encoder = encoder.measured(PUBLISHED_MEAN, PUBLISHED_STD)
    elif isinstance(scale, float):
        encoder = encoder.scaled(scale)
    return encoder, f"Encoder: {encoder.describe()}"


def encoder_to_decode(dataset: ImageFolderDataset, override: str = "", trusted: bool = False) -> tuple[VAEEncoder, str]:
    """The encoder for latents that are to become pixels, and how it was found in a line.

    Arguments and errors as for `encoder_for`.
    """
    encoder = recorded_encoder(dataset, override, trusted)
    if encoder is None:
        lines: list[str] = []
        return assumed_encoder(dataset, lines.append), lines[0]
    if not isinstance(encoder, VAEEncoder):
        raise UserError(f"{dataset.path}: no VAE made these latents: name one by --encoder")
    return encoder, f"Encoder: {encoder.describe()}"


def assumed_encoder(dataset: ImageFolderDataset, log: Callable[[str], None]) -> StabilityVAEEncoder:
    """The encoder of the published VAE, for latents of which nothing is known; says so."""
    log(
        f"Note: {dataset.path} does not say which VAE made its latents: assuming {PUBLISHED_VAE} (--encoder names "
        f"another)"
    )
    return StabilityVAEEncoder()


def _with_statistics(encoder: Encoder, dataset: ImageFolderDataset, max_items: int) -> Encoder:
    """The encoder with the statistics of the latents that it needs, which fit these."""
    if isinstance(encoder, NVAEEncoder):
        return encoder
    distribution = isinstance(encoder, AutoencoderEncoder) and encoder.distribution
    if not isinstance(encoder, (AutoencoderEncoder, RawLatentEncoder)):
        raise UserError(f"{dataset.path}: holds latents, and its dataset.json names a {type(encoder).__name__}")
    if distribution and dataset.num_channels % 2 != 0:
        raise UserError(
            f"{dataset.path}: holds {dataset.num_channels} channels, not mean and standard deviation of each as of "
            f"{encoder.vae_name}"
        )
    if not encoder.raw_std:
        raw_mean, raw_std = measure(dataset, distribution, max_items)
        return encoder.measured(raw_mean, raw_std)
    channels = encoder.final_channels(dataset.num_channels)
    if not encoder.fits(channels):
        raise UserError(
            f"{dataset.path}: dataset.json has statistics of {len(encoder.raw_std)} channels, and the latents have "
            f"{channels}"
        )
    return encoder


def measure(
    dataset: ImageFolderDataset, distribution: bool, max_items: int = MAX_MEASURED
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of latents per channel, of up to `max_items` evenly spaced items.

    Raises:
        UserError: a channel is constant, or holds numbers that are far too large.
    """
    moments = Moments(distribution)
    largest, largest_name = 0.0, ""
    for idx in evenly_spaced(len(dataset), max_items):
        image = dataset[int(idx)][0]
        moments.add(image)
        if (size := float(np.abs(image).max())) > largest:
            largest, largest_name = size, dataset.name(int(idx))
    mean, std = moments.result()
    if not TINY <= min(std) <= max(std) <= HUGE:
        raise UserError(
            f"{dataset.path}: the latents must be of moderate size and not constant (mean {np.array(mean)}, standard "
            f"deviation {np.array(std)} per channel; the largest number is {largest:g}, in {largest_name}): encode "
            f"them again"
        )
    return mean, std


def same_latents(one: Encoder, other: Encoder) -> bool:
    """Whether what two encoders make means the same: the same VAE, as far as is known, and the same statistics."""
    ours, theirs = one.init_kwargs, other.init_kwargs
    names = [kwargs.pop("vae_name", "") for kwargs in (ours, theirs)]
    sums = [kwargs.pop("vae_sha256", "") for kwargs in (ours, theirs)]
    same_vae = sums[0] == sums[1] if all(sums) else names[0] == names[1]
    return type(one) is type(other) and ours == theirs and same_vae


def data_spec(dataset: ImageFolderDataset, encoder: Encoder) -> DataSpec:
    """What the model sees of a dataset."""
    captions = dataset.captions
    conditioning = (
        Conditioning.of_labels(dataset.label_dim) if captions is None else Conditioning.of_text(*captions.shape)
    )
    channels = encoder.final_channels(dataset.num_channels)
    return DataSpec(channels=channels, resolution=dataset.resolution, conditioning=conditioning)
