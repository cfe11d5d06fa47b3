"""What a network is guided by: another network, a classifier of noisy images, or itself."""

from collections.abc import Callable
from pathlib import Path

import torch

from dnnlib.errors import UserError
from torch_utils import distributed
from torch_utils.device import resolve_precision
from training.conditioning import DataSpec
from training.config.generation import NetworksConfig, SamplingConfig
from training.encoders import same_latents
from training.families import ARCHITECTURES, Architecture, architecture_of
from training.networks.classifier import NoisyClassifier
from training.snapshot import Snapshot, load_network, open_snapshot


def load_with_note(path_or_url: str | Path, device: torch.device | str, arch: str | None = None) -> Snapshot:
    """As `load_network`, and prints how the file was understood, if there is anything to say."""
    snapshot = load_network(path_or_url, device, preset=arch)
    if snapshot.note:
        distributed.print0(f"Note: {path_or_url}: {snapshot.note}")
    return snapshot


def load_image_network(
    path_or_url: str | Path, device: torch.device | str = "cpu", arch: str | None = None
) -> Snapshot:
    """As `load_network`, for a network that makes images.

    Raises:
        UserError: also if it makes none.
    """
    snapshot = load_with_note(path_or_url, device, arch)
    check_makes_images(architecture_of(snapshot.net), path_or_url)
    return snapshot


def check_makes_images(architecture: Architecture, source: str | Path) -> None:
    """Check that networks of an architecture can be asked for images.

    Raises:
        UserError: they cannot; the message names `source`, which holds one.
    """
    if not architecture.makes_images:
        raise UserError(f"{source}: holds a {architecture.network_class.__name__}, which makes no images")


def architecture_of_file(path_or_url: str, arch: str | None) -> Architecture | None:
    """The architecture that a snapshot names, of which nothing else is read; None = it is unknown here.

    Raises:
        UserError: it cannot be read.
    """
    return ARCHITECTURES.get(open_snapshot(path_or_url, preset=arch).description.architecture.name)


def check_denoiser(snapshot: Snapshot, net: str) -> None:
    """Check that a network gives E[x0 | x], on which paths from noise to images, and likelihoods, rely.

    Raises:
        UserError: it does not.
    """
    architecture = architecture_of(snapshot.net)
    if not architecture.is_denoiser:
        raise UserError(f"--net={net}: {architecture.family} is no denoiser, which this needs")
    if snapshot.is_consistency_model:
        raise UserError(
            f"--net={net}: was tuned by train_consistency.py and is no denoiser any more, which this needs: give the "
            f"network that it was tuned from"
        )


def that_knows_classes(snapshot: Snapshot, guide: Snapshot | None) -> Snapshot:
    """The network, or the classifier that guides it."""
    return guide if guide is not None and isinstance(guide.net, NoisyClassifier) else snapshot


ReadNetwork = Callable[[str, torch.device, str | None], Snapshot]  # as `load_image_network`


def load_guide(
    networks: NetworksConfig,
    sampling: SamplingConfig,
    snapshot: Snapshot,
    device: torch.device,
    read: ReadNetwork = load_image_network,
) -> Snapshot | None:
    """What guides a network: another, or a classifier of noisy images; None = nothing, or the network itself.

    Args:
        read: loads the other network.

    Raises:
        UserError: it cannot be loaded, or the two do not go together.
    """
    if networks.classifier is not None:
        method = sampling.guidance.guidance_method
        if method != "cfg":
            raise UserError(f"--guidance-method={method} combines two networks: leave it out with --classifier")
        return _load_classifier(networks.classifier, snapshot, device)
    guidance, given = sampling.guidance, networks.gnet
    if not guidance.acts:
        for useless in ["--gnet"] * (given is not None) + guidance.changed():
            distributed.print0(f"Note: {useless} has no effect without --guidance")
        return None
    if given is None:
        if not snapshot.net.spec.conditioning.optional:
            asked = "--guidance-table" if guidance.guidance_table is not None else f"--guidance={guidance.guidance:g}"
            raise UserError(
                f"{asked} needs a guiding network: give --gnet (that of --net knows no images without a condition)"
            )
        return None
    guide = read(given, device, networks.arch)
    check_guide(snapshot.net.spec, guide.net.spec)
    guide.net.precision = resolve_precision(sampling.precision, device)
    _check_same_latents("--gnet", snapshot, guide)
    return guide


def _load_classifier(path_or_url: str, snapshot: Snapshot, device: torch.device) -> Snapshot:
    """A classifier that can guide a network. It computes in float32: gradients are small.

    Raises:
        UserError: it is none, or the two do not go together.
    """
    architecture = architecture_of(snapshot.net)
    if not architecture.is_denoiser:
        raise UserError(f"--classifier has no meaning for {architecture.family} networks: leave it out")
    if snapshot.net.spec.conditioning.kind != "none":
        raise UserError("--classifier is for networks that know no conditions, and --net has its own: leave it out")
    classifier = load_with_note(path_or_url, device)
    if not isinstance(classifier.net, NoisyClassifier):
        raise UserError(
            f"--classifier={path_or_url}: holds a {type(classifier.net).__name__}, which is no classifier of noisy "
            f"images (train_classifier.py makes them)"
        )
    _check_same_data("--classifier", snapshot.net.spec, classifier.net.spec)
    _check_same_latents("--classifier", snapshot, classifier)
    return classifier


def _check_same_latents(flag: str, snapshot: Snapshot, guide: Snapshot) -> None:
    """Check that two networks share an encoder.

    Raises:
        UserError: they do not.
    """
    if not same_latents(snapshot.encoder, guide.encoder):
        raise UserError(f"{flag} works on other latents than --net: they must share an encoder")


def _check_same_data(flag: str, spec: DataSpec, guide: DataSpec) -> None:
    """Check that what guides a network sees images like its own.

    Raises:
        UserError: it does not.
    """
    parts = [("resolution", "resolution"), ("channels", "number of channels"), ("pixel_range", "range of pixels")]
    for name, what in parts:
        ours, theirs = getattr(spec, name), getattr(guide, name)
        if ours != theirs:
            raise UserError(f"{flag} has {what} {theirs}, but --net has {ours}: they must agree")


def check_guide(spec: DataSpec, guide: DataSpec) -> None:
    """Check that a network can be guided by another.

    Raises:
        UserError: their data differ.
    """
    _check_same_data("--gnet", spec, guide)
    ours, theirs = spec.conditioning, guide.conditioning
    if theirs.kind != "none" and (ours.kind, ours.shape) != (theirs.kind, theirs.shape):
        raise UserError(
            f"--gnet follows {theirs.describe()}, but --net follows {ours.describe()}: they must agree, or the guide "
            f"follow nothing"
        )
