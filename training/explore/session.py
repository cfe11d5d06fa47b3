"""What the page asks for -> images, the way to one of them, and the command lines that make the same."""

import base64
import contextlib
import io
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from dnnlib.cli import one_line_errors
from dnnlib.errors import UserError
from torch_utils.pictures import drawable, write_png
from training.config.explore import NetworkChoice, PageRequest
from training.config.generation import GenerationConfig
from training.denoiser import Denoiser
from training.explore.jobs import Job, SupersededError, Watched
from training.explore.options import Options, Words, seeds_of
from training.explore.sources import Found, Source
from training.generation import LoadedGenerator, load
from training.generators import DiffusionGenerator
from training.samplers import StackedRandomGenerator
from training.shelf import Shelf

AT_A_TIME = 4  # networks: two settings and their guides


class Session:
    """The networks that can be chosen, and a thread that makes images with them, one request after the other.

    Args:
        config, words: options of generate_images.py that the page begins with, and the same as words of a command line.
        also: addresses of further networks.
        workdir: a folder for averages that are made, which others delete when it is closed.

    Raises:
        UserError: a network cannot be read, or makes no images.
    """

    def __init__(self, config: GenerationConfig, words: Words, also: Sequence[str], workdir: Path):
        addresses = list(dict.fromkeys(filter(None, [config.networks.net, config.networks.gnet, *also])))
        self.sources = [Source(address, workdir / str(i), config.networks.arch) for i, address in enumerate(addresses)]
        self.options = Options(config, words)
        self.shelf = Shelf(workdir, at_least=AT_A_TIME)
        # One thread for all images: they take turns, and each has the processor to itself.
        self._worker = ThreadPoolExecutor(1)
        self._newest: dict[str, Job] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Cancel all jobs."""
        with self._lock:
            for job in self._newest.values():
                job.cancel()
        self._worker.shutdown(cancel_futures=True)

    def describe(self) -> dict[str, Any]:
        """What the page must know to begin, as plain JSON values."""
        for source in self.sources:
            source.refresh()
        return {"networks": [source.describe() for source in self.sources], **self.options.describe()}

    def submit(self, request: PageRequest) -> Job:
        """A job that makes what is asked for. The last one of the same pane, if it is not done, is cancelled.

        Its future gives what the page shows, as plain JSON values: `make`, or an `error`, which is a line for the user.
        Of a cancelled job, it raises `SupersededError`.
        """
        job = Job()
        with self._lock:
            if request.pane in self._newest:
                self._newest[request.pane].cancel()
            self._newest[request.pane] = job
        job.future = self._worker.submit(self._run, job, request)
        return job

    def _run(self, job: Job, request: PageRequest) -> dict[str, Any]:
        try:
            with one_line_errors():
                return self.make(job, request)
        except click.ClickException as err:
            return {"error": err.format_message()}
        except SupersededError:
            raise
        except Exception:  # a mistake of ours, at which the page should not end
            traceback.print_exc()
            return {"error": "this failed in an unexpected way, which the terminal of explore.py shows"}
        finally:
            with self._lock:
                if self._newest.get(request.pane) is job:
                    del self._newest[request.pane]

    def make(self, job: Job, request: PageRequest) -> dict[str, Any]:
        """What a request asks for, as plain JSON values.

        Raises:
            UserError: its options do not go together, or there is no such network.
            SupersededError: the job was cancelled.
        """
        job.check()
        start = time.perf_counter()
        seeds, setting = seeds_of(request), request.setting
        printed = io.StringIO()  # what commands would say
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            words = self.options.of_page(setting)
            main = self._find(setting.main)
            config, guide = self.options.read(words, main.path), None
            if setting.guide == "network" and config.sampling.guidance.acts:
                guide = self._find(setting.guiding)
                config = self.options.read(words, main.path, guide.path)
            for network in filter(None, (main, guide)):
                self.shelf.hold(network.path)
            loaded = load(config, self.shelf)
        made = self._images(job, loaded, seeds, request.path_of)
        notes = [network.note for network in (main, guide) if network is not None and network.note]
        if setting.guide != "none" and not config.sampling.guidance.acts:
            notes.append(f"A guide has no effect with weight {config.sampling.guidance.guidance:g}")
        return {
            **made,
            "command": self.options.command(words, main, guide, seeds),
            "notes": notes + [line for line in printed.getvalue().splitlines() if line.strip()],
            "seconds": time.perf_counter() - start,
        }

    def _find(self, choice: NetworkChoice) -> Found:
        if choice.network >= len(self.sources):
            raise UserError(f"there is no network {choice.network} any more: reload the page")
        return self.sources[choice.network].find(choice)

    def _images(self, job: Job, loaded: LoadedGenerator, seeds: Sequence[int], path_of: int | None) -> dict[str, Any]:
        """Images, and the way to one of them where they come from a denoiser."""
        generator = loaded.generator(len(seeds))
        rnd = StackedRandomGenerator(loaded.device, seeds)
        noise, cond = generator.noise(rnd), generator.condition(rnd)
        decode = loaded.snapshot.encoder.decode
        way: dict[str, Any] = {"path": [], "evaluations": None}
        with torch.inference_mode():
            if isinstance(generator, DiffusionGenerator):
                facts, watched = generator.describe()["sampler"], []
                levels = facts["sigma_max"], facts["sigma_min"]
                index = None if path_of is None else min(path_of, len(seeds) - 1)

                def wrap(denoiser: Denoiser) -> Denoiser:
                    watched.append(Watched(denoiser, job, index, levels))
                    return watched[0]

                images = decode(generator(noise, cond, rnd, wrap=wrap))
                way = _way(watched[0], decode)
            else:
                images = decode(generator(noise, cond, rnd))
        shown = zip(_pngs(images), seeds, _labels(loaded, seeds, cond), strict=True)
        return {
            "images": [{"png": png, "seed": seed, "label": label} for png, seed, label in shown],
            "resolution": images.shape[-1],
            "are_latents": images.dtype != torch.uint8,
            **way,
        }


def _way(watched: Watched, decode: Any) -> dict[str, Any]:
    """What a denoiser saw in an image on the way to it."""
    frames = watched.frames()
    pngs = _pngs(decode(torch.cat([D for _, D in frames]))) if frames else []
    path = [{"sigma": level, "png": png} for (level, _), png in zip(frames, pngs, strict=True)]
    return {"path": path, "evaluations": watched.calls}


def _labels(loaded: LoadedGenerator, seeds: Sequence[int], cond: torch.Tensor | None) -> list[str]:
    """What each image is asked to show; '' = nothing."""
    if loaded.prompts is not None:
        texts = loaded.prompts.prompts
        return [texts[seed % len(texts)] for seed in seeds]
    if cond is None or cond.ndim != 2:
        return [""] * len(seeds)
    names, classes = loaded.class_names, cond.argmax(dim=1).tolist()
    return [str(names[k]) if names is not None and k < len(names) else f"class {k}" for k in classes]


def _pngs(images: torch.Tensor) -> list[str]:
    """Images [N, C, H, W], or three channels of latents, as PNG files in base64."""
    shown = images if images.dtype == torch.uint8 else images[:, :3]  # a fourth would be how opaque they are
    return [_png(picture) for picture in drawable(shown)]


def _png(picture: np.ndarray) -> str:
    f = io.BytesIO()
    write_png(f, picture)
    return base64.b64encode(f.getvalue()).decode()
