"""Seeds -> images, shared out over processes: options, networks, batches, decoded and saved."""

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dnnlib.download import is_url
from dnnlib.errors import UserError, one_line
from dnnlib.files import atomic_write, clear_leftovers, file_sha256
from dnnlib.progress import Progress
from dnnlib.util import EasyDict, code_version
from torch_utils import distributed, pictures
from torch_utils.device import check_compiler, resolve_precision, select_device, set_up_device
from training.classes import ClassChoice, find_classes
from training.conditioning import DataSpec
from training.config.generation import GenerationConfig, NetworksConfig, SamplingConfig, VAESampling
from training.encoders import (
    Encoder,
    StandardRGBEncoder,
    VAEEncoder,
)
from training.families import accelerated, architecture_of, is_other_than_denoiser
from training.generators import DiffusionGenerator, Generator, PromptChoice
from training.guides import ReadNetwork, check_guide, load_guide, load_image_network, that_knows_classes
from training.prompts import prompts_for
from training.provenance import ImageRecord, format_seeds, name_of, plain, png_text, weights_sha256
from training.samplers import StackedRandomGenerator, edm_sampler
from training.snapshot import Snapshot, load_network, open_snapshot


def image_path(outdir: str | os.PathLike, seed: int, subdirs: bool = False, suffix: str = ".png") -> Path:
    """File of a seed: {seed:06d}.png, with `subdirs` in a folder per thousand."""
    folder = Path(outdir) / f"{seed // 1000 * 1000:06d}" if subdirs else Path(outdir)
    return folder / f"{seed:06d}{suffix}"


def image_resolution(spec: DataSpec, encoder: Encoder, device: torch.device | str) -> int:
    """Height and width of the images that `encoder` makes of a network's latents."""
    with torch.inference_mode():
        return encoder.decode(torch.zeros([1, *spec.shape], device=device)).shape[-1]


class ImageBatches:
    """This process's share of the batches of images of some seeds, generated as they are asked for.

    Iterating gives an `EasyDict` per batch: images (uint8 [N, C, H, W], or float32 where the encoder knows no pixels),
    labels (conditions [N, ...] or None), noise, seeds, indices (into `seeds`), batch_idx and num_batches.

    Args:
        make_generator: largest batch -> generator; called when the iteration starts.
        encoder: decodes latents, `encoder_batch_size` at a time.
        seeds: one integer per image, over all processes.
        device: where the random numbers are drawn.
        record: generator -> the record of the folder in which images are saved; called when the iteration starts. None
            = they are saved nowhere.
        subdirs: save in a folder per thousand seeds (see `image_path`).
        class_names: names of the classes, for the same.
        prompts: texts that images follow in turn, for the same.
        max_batch_size: images per batch and process.
        verbose: show a progress bar on terminals.
    """

    def __init__(
        self,
        make_generator: Callable[[int], Generator],
        encoder: Encoder,
        seeds: Sequence[int],
        device: torch.device | str,
        record: Callable[[Generator], ImageRecord] | None = None,
        subdirs: bool = False,
        max_batch_size: int = 32,
        encoder_batch_size: int = 32,
        verbose: bool = True,
        class_names: Sequence[str] | None = None,
        prompts: Sequence[str] = (),
    ):
        # As few batches as possible, of nearly equal size, and a whole number of them per process.
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        count = -(-len(seeds) // (max_batch_size * world_size)) * world_size
        batches = [part for part in np.array_split(np.arange(len(seeds)), max(count, 1)) if len(part) > 0]
        self.largest = max((len(batch) for batch in batches), default=1)
        self.num_batches, self.num_images = len(batches), len(seeds)
        self.own = [(idx, indices) for idx, indices in enumerate(batches) if idx % world_size == rank]
        self.make_generator, self.encoder, self.seeds, self.device = make_generator, encoder, seeds, device
        self.record, self.subdirs, self.encoder_batch_size, self.verbose = record, subdirs, encoder_batch_size, verbose
        self.class_names, self.prompts = class_names, prompts

    def __len__(self) -> int:
        return len(self.own)

    def __iter__(self) -> Iterator[EasyDict]:
        hidden = not self.verbose or distributed.get_rank() != 0
        generator = self.make_generator(self.largest)
        with self._recorded(generator) as record:
            for batch_idx, indices in Progress(self.own, unit="batch", hidden=hidden):
                r = EasyDict(images=None, labels=None, noise=None, batch_idx=batch_idx, num_batches=self.num_batches)
                r.indices = indices
                r.seeds = [self.seeds[i] for i in indices]
                self._make(generator, r)
                if record is not None:
                    self._save(record, generator, r)
                yield r

    @contextlib.contextmanager
    def _recorded(self, generator: Generator) -> Iterator[ImageRecord | None]:
        """Inside, images are saved in the folder of a record: leftovers of killed runs are gone, others pointed out."""
        if self.record is None:
            yield None
            return
        first, suffix = distributed.get_rank() == 0, self.encoder.output_suffix(generator.spec.channels)
        with distributed.fail_together():
            record = self.record(generator)
            files = [image_path(record.folder, seed, self.subdirs, suffix) for seed in self.seeds]
            if first:
                clear_leftovers(files)
        if first and (note := record.note_of_others(files, suffix)):
            print(note)
        with record.of(self.seeds) if first else contextlib.nullcontext():
            yield record
            distributed.barrier()  # the record is complete when all processes are done

    def _make(self, generator: Generator, r: EasyDict) -> None:
        rnd = StackedRandomGenerator(self.device, r.seeds)
        r.noise = generator.noise(rnd)
        r.labels = generator.condition(rnd)
        with torch.inference_mode():
            latents = generator(r.noise, r.labels, rnd)
            r.images = torch.cat([self.encoder.decode(part) for part in latents.split(self.encoder_batch_size)])

    def _save(self, record: ImageRecord, generator: Generator, r: EasyDict) -> None:
        suffix = self.encoder.output_suffix(generator.spec.channels)
        labels: torch.Tensor | None = r.labels
        of_classes = generator.spec.conditioning.kind == "classes"
        classes = labels.argmax(dim=1).tolist() if labels is not None and of_classes else [None] * len(r.seeds)
        for seed, class_idx, image in zip(r.seeds, classes, r.images.cpu().numpy(), strict=True):
            path = image_path(record.folder, seed, self.subdirs, suffix)
            if suffix == ".png":
                pictures.save_image(path, image, png_text(record.facts, **self._of_image(seed, class_idx)))
            else:
                with atomic_write(path, sync=False) as f:
                    np.save(f, image)

    def _of_image(self, seed: int, class_idx: int | None) -> dict[str, Any]:
        """What the text of a PNG file says of its image alone."""
        of_image: dict[str, Any] = {"seed": int(seed)}
        if self.prompts:
            of_image["prompt"] = self.prompts[seed % len(self.prompts)]
        if class_idx is not None:
            of_image["class"] = class_idx
            if self.class_names is not None and class_idx < len(self.class_names):
                of_image["class_name"] = self.class_names[class_idx]
        return of_image


def generate_images(
    net: Any,
    gnet: Any = None,
    encoder: Encoder | None = None,
    outdir: str | os.PathLike | None = None,
    subdirs: bool = False,
    seeds: Sequence[int] = range(16, 24),
    class_idx: int | None = None,
    max_batch_size: int = 32,
    encoder_batch_size: int = 32,
    verbose: bool = True,
    device: torch.device | str = "cpu",
    compiled: bool = False,
    sampler_fn: Callable[..., torch.Tensor] = edm_sampler,
    spec: DataSpec | None = None,
    **sampler_kwargs: Any,
) -> ImageBatches:
    """Generate one image per seed. An image depends on its seed alone, not on batches or processes.

    Args:
        net, gnet: main and guiding denoiser: networks, files or URLs of them (whose encoder then decodes, if none is
            given), or any callables D(x, sigma, cond). `gnet` is used where `sampler_kwargs` ask for guidance. `net`
            may also be an NVAE; `sampler_kwargs` are then those of `VAESampling`.
        encoder: decodes what the sampler returns; default: 8-bit pixels.
        outdir: where images are saved as {seed:06d}.png, with generation.json, which says what made them; None =
            nowhere.
        subdirs: save in a folder per thousand seeds.
        seeds: one integer per image, over all processes.
        class_idx: class of all images; None = drawn from the seed.
        max_batch_size, encoder_batch_size: images sampled, and decoded, at a time.
        verbose: show a progress bar on terminals.
        device: where to compute; networks are moved there.
        compiled: on GPUs, let torch.compile make the networks' kernels.
        sampler_fn, sampler_kwargs: the sampler and its arguments. It gets the networks in their fastest form
            (`families.accelerated`), with the weights that they have when the iteration starts.
        spec: shape of the images and kind of the conditions; default: `net.spec`.

    Returns:
        An `ImageBatches`. Nothing is generated until it is iterated.

    Raises:
        UserError: `class_idx` is out of range, `gnet` does not fit `net`, `spec` is missing, or the sampler has no
            such argument.
    """
    if isinstance(net, (str, Path)):
        snapshot = load_network(net)
        net, encoder = snapshot.net, snapshot.encoder if encoder is None else encoder
    if isinstance(gnet, (str, Path)):
        gnet = load_network(gnet).net
    spec = spec if spec is not None else getattr(net, "spec", None)
    if spec is None:
        raise UserError("the denoiser has no `spec` that says what its images look like: give spec=DataSpec(...)")
    encoder = encoder if encoder is not None else StandardRGBEncoder(*spec.pixel_range)
    classes = (
        None if class_idx is None else ClassChoice(find_classes(str(class_idx), spec.conditioning.num_classes), "fixed")
    )
    batches = partial(
        ImageBatches, encoder=encoder, seeds=seeds, device=device, subdirs=subdirs, max_batch_size=max_batch_size,
        encoder_batch_size=encoder_batch_size, verbose=verbose,
    )  # fmt: skip
    if is_other_than_denoiser(net):
        sampling = SamplingConfig(vae=VAESampling.from_json(sampler_kwargs))
        make = architecture_of(net.to(device).eval()).generator
        return batches(lambda _: make(net, sampling, None), record=_record_in(outdir, encoder, net=net))
    _check_arguments(sampler_fn, sampler_kwargs)
    if hasattr(gnet, "spec"):
        check_guide(spec, gnet.spec)
    for network in (net, gnet):
        if isinstance(network, nn.Module):
            network.to(device).eval()
    make_generator = partial(_sampler_generator, net, gnet, sampler_fn, sampler_kwargs, spec, classes, compiled)
    return batches(make_generator, record=_record_in(outdir, encoder, net=net, gnet=gnet))


def _sampler_generator(
    net: Any,
    gnet: Any,
    sampler_fn: Callable[..., torch.Tensor],
    sampler_kwargs: dict[str, Any],
    spec: DataSpec,
    classes: ClassChoice | None,
    compiled: bool,
    largest: int,
) -> Generator:
    """The generator that a sampler and its denoisers are, for batches of up to `largest` images."""
    main = accelerated(net, largest, compiled)
    guided = gnet is not None and sampler_kwargs.get("guidance", 1) != 1
    guide = accelerated(gnet, largest, compiled) if guided else gnet

    def sample(noise: torch.Tensor, cond: torch.Tensor | None, rnd: StackedRandomGenerator) -> torch.Tensor:
        return sampler_fn(net=main, noise=noise, labels=cond, gnet=guide, randn_like=rnd.randn_like, **sampler_kwargs)

    facts = {"function": name_of(sampler_fn), **{key: plain(value) for key, value in sampler_kwargs.items()}}
    return DiffusionGenerator(spec, sample, classes, {"sampler": facts})


def _record_in(
    outdir: str | os.PathLike | None, encoder: Encoder, **networks: Any
) -> Callable[[Generator], ImageRecord] | None:
    """Gives the record of a folder in which images of networks in memory are saved; None where there is no folder.

    Args:
        networks: by the names of the options that they would be; None = there is none.
    """
    if outdir is None:
        return None

    def record(generator: Generator) -> ImageRecord:
        facts: dict[str, Any] = {}
        for key, network in networks.items():
            if network is not None:
                facts[key] = name_of(network)
            if isinstance(network, nn.Module):
                facts[f"{key}_weights_sha256"] = weights_sha256(network)
                facts[f"{key}_precision"] = getattr(network, "precision", "fp32")
        return ImageRecord(
            Path(outdir), {**facts, **generator.describe(), "encoder": encoder.record, "code_version": code_version()}
        )

    return record


def _check_arguments(function: Callable, arguments: dict[str, Any]) -> None:
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    unknown = [name for name in arguments if name not in parameters]
    if unknown:
        raise UserError(f"{function.__name__} has no argument {unknown[0]!r} (it has {', '.join(parameters)})")


# ---------------------------------------------------------------------------------------------------------
# From options


def fetch(networks: NetworksConfig) -> None:
    """Fetch networks that are URLs: once for all processes of a machine. To be called by all of them."""
    with distributed.fail_together():
        if distributed.get_local_rank() == 0:
            for network in (networks.net, networks.gnet, networks.classifier):
                if network is not None and is_url(network):
                    open_snapshot(network, preset=networks.arch)


@dataclass(frozen=True)
class LoadedGenerator:
    """Networks that are ready to generate; `guide` is a denoiser or a classifier."""

    config: GenerationConfig
    snapshot: Snapshot
    guide: Snapshot | None
    device: torch.device
    prompts: PromptChoice | None = None

    @property
    def suffix(self) -> str:
        """File type of the images."""
        return self.snapshot.encoder.output_suffix(self.snapshot.net.spec.channels)

    @property
    def resolution(self) -> int:
        """Height and width of the images."""
        return image_resolution(self.snapshot.net.spec, self.snapshot.encoder, self.device)

    def generator(self, batch_size: int | None) -> Generator:
        """What makes latents, by up to `batch_size` at a time; None = with the networks as they are."""
        sampling = self.config.sampling
        guide = None if self.guide is None else self.guide.net
        if guide is not None and batch_size is not None:
            guide = accelerated(guide, batch_size, sampling.compiled)
        net = self.snapshot.net
        generator = architecture_of(net).generator(net, sampling, batch_size, guide)
        if self.prompts is not None:
            assert isinstance(generator, DiffusionGenerator)
            generator.prompts = self.prompts
        return generator

    def images(self, seeds: Sequence[int], **kwargs: Any) -> ImageBatches:
        """The images of these seeds; further arguments are those of `ImageBatches`."""
        prompts = () if self.prompts is None else self.prompts.prompts
        texts: dict[str, Any] = dict(class_names=self.class_names, prompts=prompts)
        return ImageBatches(self.generator, self.snapshot.encoder, seeds, self.device, **texts, **kwargs)

    @property
    def class_names(self) -> list[str] | None:
        """What the classes are called; None = the network, or the classifier, does not say."""
        return that_knows_classes(self.snapshot, self.guide).metadata.get("class_names")

    def describe(self, seeds: Sequence[int]) -> dict[str, Any]:
        """What makes the images of these seeds, as plain JSON values."""
        networks = self.config.networks
        facts: dict[str, Any] = {}
        guides = {"gnet": networks.gnet, "classifier": networks.classifier}
        for key, source in {"net": networks.net, **guides}.items():
            loaded = self.snapshot if key == "net" else self.guide
            if source is not None and loaded is not None:
                facts |= {key: source, f"{key}_sha256": file_sha256(loaded.path)}
        encoder = self.snapshot.encoder
        if isinstance(encoder, VAEEncoder) and not encoder.vae_sha256:
            encoder = encoder.identified()
        made_by = {"encoder": encoder.record, "code_version": code_version()}
        return {**facts, "seeds": format_seeds(seeds), **self.generator(None).describe(), **made_by}


def _chosen_encoder(encoder: Encoder, networks: NetworksConfig) -> Encoder:
    """The encoder of a snapshot, with the VAE that the user names or trusts.

    Raises:
        UserError: it has no VAE.
    """
    if networks.encoder is None and not networks.trust_encoder:
        return encoder
    if not isinstance(encoder, VAEEncoder):
        given = "--encoder" if networks.encoder is not None else "--trust-encoder"
        raise UserError(f"{given} is for networks that make latents of a VAE, and --net={networks.net} makes none")
    return encoder.named_by("") if networks.encoder is None else encoder.with_vae(networks.encoder)


def _numbered_classes(sampling: SamplingConfig, snapshot: Snapshot) -> SamplingConfig:
    """The options with numbers in place of the names of classes.

    Raises:
        UserError: the network knows no such class.
    """
    text, names = sampling.class_idx, snapshot.metadata.get("class_names")
    classes = ClassChoice.of(sampling, snapshot.net.spec.conditioning.num_classes, names)
    if text is None or classes.classes is None:
        return sampling
    if names and text.isdigit() and text in names and (called := names[classes.classes[0]]) != text:
        distributed.print0(
            f"Note: --class={text} is the number, of the class called {one_line(called)}; for the class called {text} "
            f"write --class='\"{text}\"'"
        )
    return dataclasses.replace(sampling, class_idx=",".join(map(str, classes.classes)))


def _say_what_does_not_fit(sampling: SamplingConfig, snapshot: Snapshot, name: str) -> None:
    """Print a note where a denoiser is sampled as a consistency model, or the other way round."""
    by_consistency = sampling.sampler.solver == "consistency"
    if by_consistency and not snapshot.is_consistency_model:
        distributed.print0(
            f"Note: --sampler=consistency is for networks of train_consistency.py, and --net={name} is none: as a "
            f"denoiser, it gives averages of images at high noise levels"
        )
    elif snapshot.is_consistency_model and not by_consistency:
        distributed.print0(
            f"Note: --net={name} was tuned by train_consistency.py and is no denoiser any more: "
            f"--sampler={sampling.sampler.solver} relies on one, --sampler=consistency does not"
        )


def load(config: GenerationConfig, read: ReadNetwork = load_image_network) -> LoadedGenerator:
    """The networks of a configuration, on its device.

    Args:
        read: loads a network; for callers that keep those that they have loaded.

    Raises:
        UserError: a network cannot be loaded, or they do not go together.
    """
    networks, sampling = config.networks, config.sampling
    device = select_device(sampling.device)
    set_up_device(device)
    if sampling.compiled and device.type != "cpu":
        check_compiler(device)
    assert networks.net is not None
    snapshot = read(networks.net, device, networks.arch)
    architecture = architecture_of(snapshot.net)
    sampling.check_kind(architecture.is_denoiser, architecture.family)
    _say_what_does_not_fit(sampling, snapshot, networks.net)
    guide = load_guide(networks, sampling, snapshot, device, read)
    chosen = _numbered_classes(sampling, that_knows_classes(snapshot, guide))
    config = dataclasses.replace(config, sampling=chosen)
    snapshot.net.precision = resolve_precision(sampling.precision, device)
    snapshot = dataclasses.replace(snapshot, encoder=_chosen_encoder(snapshot.encoder, networks))
    snapshot.encoder.prepare(device)
    if isinstance(snapshot.encoder, VAEEncoder):
        snapshot.encoder.check_channels(snapshot.net.spec.channels)
    return LoadedGenerator(config, snapshot, guide, device, prompts_for(config, snapshot, device))
