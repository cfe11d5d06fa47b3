"""Likelihoods of a dataset under a network: image by image, shared over processes, resumable."""

import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.errors import UserError, one_line
from dnnlib.files import append_line, atomic_write, check_not_input, file_sha256
from dnnlib.progress import Progress
from dnnlib.util import code_version
from torch_utils import distributed
from torch_utils.device import select_device, set_up_device
from training.config.fields import all_fields
from training.config.likelihood import LikelihoodConfig
from training.dataset.images import ImageFolderDataset
from training.encoders import StandardRGBEncoder
from training.families import architecture_of
from training.guides import check_denoiser, load_image_network
from training.likelihood import FlowLikelihood, Likelihood
from training.likelihood_vae import VAELikelihood
from training.samplers import StackedRandomGenerator
from training.snapshot import Snapshot

LATENTS_RECORD = "latents.json"  # says what the latents of a folder are of


@dataclass(frozen=True)
class DatasetLikelihood:
    """A network and the images whose likelihood it is asked for.

    Args:
        likelihood: what computes them.
        dataset: the images.
        indices: those of them that count.
        seed: the draws of image i come from seed + i.
        device: where to compute.
        facts: what all of this is, as plain JSON values: results of other facts do not go together.
        latents: folder for the noise that the probability flow carries each image to; None = it is not kept.
    """

    likelihood: Likelihood
    dataset: ImageFolderDataset
    indices: Sequence[int]
    seed: int
    device: torch.device
    facts: dict[str, Any]
    latents: Path | None = None

    def check_batch(self, batch: int) -> None:
        """Check that so many images can be computed at a time.

        Raises:
            UserError: they cannot.
        """
        if isinstance(self.likelihood, VAELikelihood) and batch > self.likelihood.max_batch:
            raise UserError(f"--max-batch={self.likelihood.max_batch} is below --batch={batch}: lower --batch, too")

    def figures(self, indices: Sequence[int]) -> list[dict[str, float]]:
        """Figures of images by name, with the index of each; their latents are saved where they are to be kept."""
        images, labels = zip(*(self.dataset[i] for i in indices), strict=True)
        captions = self.dataset.captions
        if captions is not None:
            labels = [captions.contexts(i)[0] for i in indices]
        rnd = StackedRandomGenerator(self.device, [self.seed + i for i in indices])
        conditions = self.dataset.label_dim > 0 or captions is not None
        cond = torch.from_numpy(np.stack(labels)).to(self.device) if conditions else None
        pixels = torch.from_numpy(np.stack(images)).to(self.device)
        if self.latents is None:
            found = self.likelihood.figures(pixels, rnd, cond)
        else:
            assert isinstance(self.likelihood, FlowLikelihood)
            found, latents = self.likelihood.figures_and_latents(pixels, rnd, cond)
            for i, z in zip(indices, latents, strict=True):
                with atomic_write(_latents_file(self.latents, i)) as f:
                    np.save(f, z.cpu().numpy())
        rows = torch.stack(list(found.values()), dim=1).tolist()
        return [{"index": i, **dict(zip(found, row, strict=True))} for i, row in zip(indices, rows, strict=True)]


def prepare(
    net: str,
    data: str,
    config: LikelihoodConfig,
    num: int | None = None,
    seed: int = 0,
    arch: str | None = None,
    given: Collection[str] = (),
    latents: Path | None = None,
) -> DatasetLikelihood:
    """Network and images, ready.

    Args:
        net: a snapshot.
        data: folder or ZIP file of images.
        num: only so many of the images, the first ones; None = all.
        arch: training preset that names the architecture of published files that do not say it.
        given: names of the options that were given, which this network's likelihood must look at.
        latents: see `DatasetLikelihood`.

    Raises:
        UserError: the network has no likelihood (or no such latents), or the images are not such as it was trained on.
    """
    device = select_device(config.device)
    set_up_device(device)
    snapshot = load_image_network(net, device, arch)
    architecture = architecture_of(snapshot.net)
    if architecture.likelihood is None:
        raise UserError(f"--net={net}: likelihoods of {architecture.family} networks are not computed here")
    if architecture.is_denoiser:
        check_denoiser(snapshot, net)
    if not isinstance(snapshot.encoder, StandardRGBEncoder):
        raise UserError(f"--net={net}: works on latents, and its encoder gives no density of pixels")
    snapshot.net.precision = config.precision
    dataset = _images_for(snapshot, net, data)
    likelihood = architecture.likelihood(snapshot.net, config)
    others = {"vae", "flow"} - {likelihood.section}
    for field in (field for name in others for field in all_fields(type(getattr(config, name)))):
        if field.key in given:
            raise UserError(f"{field.flag} has no effect on {architecture.family} networks: leave it out")
    if latents is not None:
        check_not_input("--latents", latents, {"--data": data, "--net": net})
        if not isinstance(likelihood, FlowLikelihood):
            raise UserError(
                f"--latents: {architecture.family} networks have no flow that carries images to noise: leave it out "
                f"(edit_images.py reconstruct shows what their latents hold)"
            )
    indices = range(len(dataset) if num is None else min(num, len(dataset)))
    facts = {
        "net": net,
        "net_sha256": file_sha256(snapshot.path),
        "data": data,
        "dataset": dataset.info().to_json(),
        "num_images": len(indices),
        "seed": seed,
        **likelihood.describe(),
        "code_version": code_version(),
    }
    return DatasetLikelihood(likelihood, dataset, indices, seed, device, facts, latents)


def _images_for(snapshot: Snapshot, net: str, data: str) -> ImageFolderDataset:
    """The images of --data, with the conditions that the network of --net takes: nothing, labels, or the contexts of
    the first caption of each.

    Raises:
        UserError: they are not such as it was trained on.
    """
    spec = snapshot.net.spec
    kind = spec.conditioning.kind
    follows_texts = kind == "tokens"
    dataset = ImageFolderDataset(data, use_labels=kind != "none", use_captions=follows_texts)
    if dataset.dtype != np.uint8:
        raise UserError(f"--data={data}: holds latents; likelihoods are those of 8-bit images")
    ours = (dataset.num_channels, dataset.resolution, dataset.label_dim)
    wanted = (spec.channels, spec.resolution, 0 if follows_texts else spec.conditioning.size)
    if ours != wanted:
        raise UserError(
            f"--data={data}: images of (channels, resolution, classes) = {ours}, but --net={net} knows {wanted}: "
            f"convert them as its training data were"
        )
    captions = dataset.captions
    if captions is not None and captions.shape != spec.conditioning.shape:
        raise UserError(
            f"--data={data}: its captions are {captions.shape[0]} tokens of width {captions.shape[1]}, and --net={net} "
            f"takes {spec.conditioning.tokens} of width {spec.conditioning.size}: encode them as those of its training "
            f"data were (dataset_tool.py captions)"
        )
    record = snapshot.metadata.get("text_encoder")
    if captions is not None and record is not None and captions.encoder != record:
        raise UserError(
            f"--data={data}: its captions are by another text encoder ({one_line(captions.encoder)}) than those of "
            f"--net={net} ({one_line(record)}): encode them with that one (dataset_tool.py captions)"
        )
    return dataset


def evaluate(task: DatasetLikelihood, out: Path, batch: int) -> dict[str, Any] | None:
    """The summary of a task, whose results are in `out` (JSON lines): on the first process, None on the others.

    The first line says what was computed, then there is a line per image, and the summary comes last. Where the file
    holds a part of them, the rest is computed. An image's figures depend on itself and the seed alone.

    Args:
        batch: images at a time in each process.

    Raises:
        UserError: `out` holds something else.
    """
    first = distributed.get_rank() == 0
    with distributed.fail_together():
        kept = _kept(task) if first else set()
        done = _read(out, task.facts) if first else {}
        if first and task.latents is not None:
            with atomic_write(task.latents / LATENTS_RECORD, "w") as f:
                json.dump(task.facts, f, indent=2)
    done, kept = distributed.from_first((done, kept))
    todo = [i for i in task.indices if i not in done or i not in kept]
    chunks = [todo[start : start + batch] for start in range(0, len(todo), batch)]
    for own in _shared(chunks):
        rows = task.figures(own) if own else []
        text = json.dumps(rows).encode()
        parts = distributed.gather_to_first(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        with distributed.fail_together():
            for row in (row for part in parts for row in json.loads(part.numpy().tobytes())):
                if row["index"] not in done:  # otherwise, only its latents were missing
                    done[row["index"]] = row
                    append_line(out, json.dumps(row))
    if not first:
        return None
    summary = summarize([done[i] for i in task.indices])
    append_line(out, json.dumps({"summary": summary}))
    return summary


def summarize(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Mean of each figure, and its standard error (`..._error`), over the images of rows in this order."""
    summary: dict[str, Any] = {"num_images": len(rows)}
    for name in (name for name in rows[0] if name != "index"):
        values = np.array([row[name] for row in rows])
        summary[name] = float(values.mean())
        summary[f"{name}_error"] = float(values.std(ddof=1) / math.sqrt(len(rows))) if len(rows) > 1 else 0.0
    return summary


def _shared(chunks: Sequence[list[int]]) -> Iterator[list[int]]:
    """The chunks of this process, as many as every other has: the last one may be empty."""
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    rounds = range(-(-len(chunks) // processes))
    for k in Progress(rounds, unit="batch", hidden=rank != 0):
        position = k * processes + rank
        yield chunks[position] if position < len(chunks) else []


def _read(out: Path, facts: dict[str, Any]) -> dict[int, dict[str, float]]:
    """The rows that a file holds; it is begun where there is none, and loses lines that are cut off or damaged."""
    lines = out.read_text(errors="replace").splitlines() if out.is_file() else []
    good = [line for line in map(_parsed, lines) if line is not None]
    if lines and not (good and isinstance(good[0].get("facts"), dict)):
        raise UserError(f"--out={out}: exists, and holds no likelihoods: choose another name")
    if lines and (other := _difference(good[0]["facts"], facts)):
        raise UserError(f"--out={out}: holds likelihoods of another {other}: choose another name, or delete it")
    rows = [line for line in good if "index" in line and all(map(_is_number, line.values()))]
    rows = [row for row in rows if row.keys() == rows[0].keys()]
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out, "w") as f:
        f.writelines(json.dumps(line) + "\n" for line in [{"facts": facts}, *rows])
    return {row["index"]: row for row in rows}


def _latents_file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.npy"


def _kept(task: DatasetLikelihood) -> set[int]:
    """Images whose latents are saved already, or not wanted.

    Raises:
        UserError: the folder holds others.
    """
    folder = task.latents
    if folder is None:
        return set(task.indices)
    record = folder / LATENTS_RECORD
    if record.is_file():
        theirs = _parsed(record.read_text()) or {}
        if other := _difference(theirs, task.facts):
            raise UserError(f"--latents={folder}: holds latents of another {other}: choose another folder")
    elif any(folder.glob("*.npy")):
        raise UserError(f"--latents={folder}: holds arrays, and does not say of what: choose another folder")
    return {i for i in task.indices if _latents_file(folder, i).is_file()}


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """Name of a fact that differs, of those that results depend on. More images may follow."""
    harmless = {"net", "data", "num_images", "code_version"}
    return next((key for key in ours if key not in harmless and theirs.get(key) != ours[key]), None)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
