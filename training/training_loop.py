"""The training loop."""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from dnnlib.util import RunError, UserError, code_version, format_time
from torch_utils import checkpoint, distributed
from torch_utils.device import check_compiler, resolve_precision, select_device, set_up_device
from torch_utils.gradients import channels_last_views, flat_gradients, replace_nonfinite_, use_channels_last
from torch_utils.training_stats import Collector
from training.config.training import TrainConfig
from training.dataset.images import ImageFolderDataset, RunSampler, begin_loader_process, collate
from training.encoders import encoder_for, final_channels
from training.losses import EDM2Loss
from training.lr import learning_rate_schedule
from training.monitoring.journal import Journal
from training.monitoring.previews import Previews
from training.monitoring.snapshot_metrics import SnapshotEvaluation
from training.networks.edm2 import Precond, effective_weights
from training.phema import PowerFunctionEMA
from training.samplers.edm import StackedRandomGenerator
from training.snapshot import save_network

STATE_PATTERN = r"training-state-(\d+)\.pt"
OPTIONS_NAME = "training_options.json"
SNAPSHOT_PATTERN = r"network-snapshot-.*\.safetensors"
SMALL_DATASET = 1 << 26  # bytes; decoded datasets up to this size are kept in memory in any case
SIGMA_DATA = 0.5


def build_network(config: TrainConfig, channels: int) -> Precond:
    """A freshly initialised network: the same for the same seed, on every device and process."""
    torch.manual_seed(config.seed)
    return Precond(
        config.dataset.resolution, channels, precision="fp32", sigma_data=SIGMA_DATA, **config.network_kwargs()
    )


def image_seeds(seed: int, run_indices: np.ndarray) -> np.ndarray:
    """Random seed of each image of a run, int64 [n]: all noise that an image meets depends on it alone."""
    return (seed * 0x9E3779B1 % 2**32 + run_indices) % 2**32


def training_loop(config: TrainConfig, dataset: ImageFolderDataset, outdir: Path, resume: bool = True) -> None:
    """Train until `config.duration` images, continuing what `outdir` holds.

    Progress is counted in images (nimg). Data order, noise levels and noise are functions of (seed, index of the
    image in the run), so a resumed run continues as if it had never stopped, on any number of processes.
    Dropout masks depend on the index of the first image of their round: to continue exactly with dropout on
    another number of processes, keep `batch_gpu`.

    Raises:
        UserError: `outdir` holds another configuration, or a run although `resume` is False.
        RunError: no image since the last status report had a finite loss.
    """
    with distributed.fail_together():
        journal = Journal(outdir)
    with journal, distributed.SuspendSignals() as suspend:
        with distributed.fail_together():
            _check_outdir(outdir, config, resume)
        if distributed.get_rank() == 0:
            config.save(outdir / OPTIONS_NAME)
        _train(config, dataset, outdir, journal, suspend)


def _check_outdir(outdir: Path, config: TrainConfig, resume: bool) -> None:
    """Check that `outdir` holds this run or none."""
    options_path = outdir / OPTIONS_NAME
    results = [path for path in outdir.iterdir() if re.fullmatch(f"{STATE_PATTERN}|{SNAPSHOT_PATTERN}", path.name)]
    if results:  # a run that failed before it had any may start anew with other options
        if not resume:
            raise UserError(f"{outdir} already holds a run: choose another --outdir, or continue it with --resume")
        if not options_path.is_file():
            raise UserError(f"{outdir} holds {results[0].name}, but no {options_path.name}: choose another --outdir")
        config.check_resumable(TrainConfig.load(options_path), outdir)


def _train(
    config: TrainConfig,
    dataset: ImageFolderDataset,
    outdir: Path,
    journal: Journal,
    suspend: distributed.SuspendSignals,
) -> None:
    device = select_device(config.device)
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    set_up_device(device, huge_pages=True)
    torch.backends.cudnn.benchmark = config.bench

    # Share of this process in each optimiser step: `rounds` rounds of `batch_gpu` images.
    batch_process = config.batch // world_size
    batch_gpu = min(config.batch_gpu or batch_process, batch_process)
    rounds = batch_process // batch_gpu
    assert config.batch == batch_gpu * rounds * world_size
    part = (rank * batch_process, (rank + 1) * batch_process)

    # Data, network, optimiser.
    if config.cache or dataset.decoded_bytes() <= SMALL_DATASET:
        dataset.keep_in_memory()
    encoder = encoder_for(dataset)
    net = build_network(config, final_channels(dataset)).to(device)
    net.precision = resolve_precision(config.precision, device)
    if device.type != "mps":
        use_channels_last(net)
    ema = PowerFunctionEMA(net, config.ema_std)
    net.unet.checkpoint_activations = config.checkpoint_activations
    if config.compile:
        check_compiler(device)
        net.unet.compile(dynamic=False)
    loss_fn = EDM2Loss(config.P_mean, config.P_std, SIGMA_DATA)
    gradients = flat_gradients(net.parameters())
    fused = device.type != "mps"
    views = channels_last_views(net.parameters())
    optimizer = torch.optim.Adam(views, lr=config.lr, betas=(0.9, 0.99), eps=1e-8, fused=fused)
    stats = Collector(device)
    nonfinite = torch.zeros([], dtype=torch.int64, device=device)  # gradient elements since the start of the run
    nimg, seconds = 0, 0.0

    def restore(state: dict[str, Any]) -> None:
        nonlocal nimg, seconds
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(_permuted(state["optimizer"], (0, 2, 3, 1)))
        for group in optimizer.param_groups:
            group["fused"] = fused  # a matter of the device, which may have changed
        ema.load_state_dict(state["ema"])
        stats.load_state_dict(state["stats"])
        nonfinite.fill_(state["nonfinite"])
        nimg, seconds = state["nimg"], state["seconds"]

    with distributed.fail_together():
        found = checkpoint.restore_newest_state(outdir, STATE_PATTERN, restore, journal.log)
    newest = torch.tensor([nimg])
    distributed.broadcast_([newest])
    if distributed.any_rank(newest.item() != nimg):
        raise RunError(f"{outdir}: the processes read different training states: check the disk, and try again")
    if found:
        if nimg >= config.duration:
            journal.log(f"Nothing to do: {outdir} has its {nimg} images. A longer --duration continues it.")
            return
        journal.log(f"Resuming at {nimg} images from {outdir}")
    elif list(outdir.glob("network-snapshot-*")):
        journal.log(f"There are snapshots but no training state in {outdir}: starting again from 0 images")
    distributed.broadcast_([*net.parameters(), *net.buffers()])
    journal.log(
        f"Training on {len(dataset)} images of {dataset.resolution}x{dataset.resolution}x{dataset.num_channels}, "
        f"{config.dataset.label_dim} classes: {sum(p.numel() for p in net.parameters())} parameters, {net.precision}, "
        f"{world_size} x {device.type}, {rounds} round{'s' * (rounds > 1)} of {batch_gpu} images per step"
    )

    sampler = RunSampler(len(dataset), config.seed, nimg, config.batch, part, batch_gpu)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=config.workers,
        collate_fn=collate,
        worker_init_fn=begin_loader_process,
        pin_memory=device.type == "cuda",
        multiprocessing_context="spawn" if config.workers > 0 else None,
    )
    evaluation = None
    if config.metrics:
        evaluation = SnapshotEvaluation(config.metrics, config.metrics_ref, config.metrics_num, net, encoder, device)
    with distributed.fail_together():
        previews = Previews(dataset, encoder, device, outdir, journal.log) if rank == 0 else None
    journal.start(nimg, config.duration)
    start_nimg, tick_nimg, tick_nonfinite = nimg, nimg, int(nonfinite)
    start_time, tick_time = time.time() - seconds, time.time()
    net.train()
    batches = iter(loader)  # last, since loader processes do not like it when the start fails

    def due(interval: int, nimg: int) -> bool:
        return nimg > start_nimg and (nimg >= config.duration or (interval > 0 and nimg % interval == 0))

    while True:
        done = nimg >= config.duration
        suspended = distributed.any_rank(suspend.received)

        # Status: what happened since the last one.
        if due(config.status, nimg):
            now = time.time()
            fields = {
                "nimg": nimg,
                **stats.collect(),
                "lr": learning_rate_schedule(nimg, config.batch, config.lr, config.decay, config.rampup_Mimg),
                "nonfinite_gradients": int(nonfinite) - tick_nonfinite,
                "images_per_second": (nimg - tick_nimg) / (now - tick_time),
                "seconds": now - start_time,
                "cpu_mem_gb": psutil.Process().memory_info().rss / 2**30,
                "gpu_mem_gb": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0,
                "time": now,
            }
            journal.report(fields)
            journal.log(status_line(fields, config.duration))
            if fields["nonfinite_gradients"] > 0:
                journal.log(f"Warning: {fields['nonfinite_gradients']} non-finite gradients were replaced by 0")
            if math.isnan(fields["loss"]):
                raise RunError(
                    f"the loss is not finite at {nimg} images: start in a new --outdir with a lower --lr or --ls; "
                    f"or repeat the command with --precision=bf16 or fp32 to go on from the last training state"
                )
            tick_time, tick_nimg, tick_nonfinite = now, nimg, int(nonfinite)

        # Network snapshots and a picture of what they make.
        if previews is not None and due(config.snapshot, nimg):
            averaged = ema.get()
            for std, (ema_net, suffix) in zip(ema.stds, averaged, strict=True):
                metadata = {
                    "nimg": nimg,
                    "ema_std": std,
                    "config": config.to_json(),
                    "dataset": dataclasses.asdict(config.dataset),
                }
                path = outdir / snapshot_name(nimg, suffix)
                save_network(path, _as_precond(ema_net), encoder, metadata)
            previews.draw(_as_precond(averaged[-1][0]), outdir / f"fakes-{nimg // 1000:07d}.png")

        # Training state.
        saving = due(config.checkpoint, nimg) or (suspended and nimg > start_nimg)
        moments = stats.state_dict() if saving else {}  # of all processes
        if rank == 0 and saving:
            path = outdir / f"training-state-{nimg // 1000:07d}.pt"
            checkpoint.save_state(
                path,
                {
                    "net": net.state_dict(),
                    "optimizer": _permuted(optimizer.state_dict(), (0, 3, 1, 2)),
                    "ema": ema.state_dict(),
                    "stats": moments,
                    "nonfinite": int(nonfinite),
                    "nimg": nimg,
                    "seconds": time.time() - start_time,
                    "code_version": code_version(),
                },
            )

        # Metrics of the snapshots, which take long: the state is safe.
        if evaluation is not None and due(config.snapshot, nimg):
            for ema_net, suffix in ema.get():
                path = outdir / snapshot_name(nimg, suffix)
                results = evaluation(_as_precond(ema_net), path, nimg)
                journal.report_metrics(nimg, f"EMA{suffix}", results)
            tick_time = time.time()
        if done or suspended:
            break

        # One optimiser step on `batch` images.
        gradients.zero_()
        with effective_weights(net, normalize_first=True):
            for first in range(nimg + part[0], nimg + part[1], batch_gpu):
                seeds = image_seeds(config.seed, np.arange(first, first + batch_gpu))
                rnd = StackedRandomGenerator(device, seeds.tolist())
                if config.dropout > 0:
                    torch.manual_seed(int(seeds[0]))
                images, labels = next(batches)
                images = encoder.encode_latents(images.to(device, non_blocking=True), rnd.randn_like)
                sigma = loss_fn.noise_levels(rnd.randn([batch_gpu]))
                noise = rnd.randn(images.shape)
                loss = loss_fn(net, images, labels.to(device, non_blocking=True), sigma=sigma, noise=noise)
                stats.report("loss", loss.mean(dim=(1, 2, 3)))
                (loss.sum() * (config.ls / config.batch)).backward()
        distributed.all_reduce_sum_(gradients)
        if config.ls != 1:
            gradients /= config.ls
        nonfinite += replace_nonfinite_(gradients)
        lr = learning_rate_schedule(nimg, config.batch, config.lr, config.decay, config.rampup_Mimg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        nimg += config.batch
        ema.update(nimg, config.batch)
        journal.advance(config.batch)

    journal.log(
        f"Done: {nimg} images in {outdir}" if done else f"Suspended at {nimg} images; repeat the command to go on"
    )


def _permuted(state: dict[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """Adam's state with the dimensions of its moments permuted: files hold them as the weights are, [out, in, ...]."""
    moments = {
        idx: {name: x.permute(*order).contiguous() if x.ndim == 4 else x for name, x in values.items()}
        for idx, values in state["state"].items()
    }
    return {**state, "state": moments}


def snapshot_name(nimg: int, suffix: str) -> str:
    return f"network-snapshot-{nimg // 1000:07d}{suffix}.safetensors"


def status_line(fields: dict[str, float], duration: int) -> str:
    left = (duration - fields["nimg"]) / fields["images_per_second"]
    gpu = f"  gpu {fields['gpu_mem_gb']:.1f} GB" if fields["gpu_mem_gb"] else ""
    return (
        f"nimg {fields['nimg']:<10d} loss {fields['loss']:<8.4f} lr {fields['lr']:<8.5f} "
        f"{fields['images_per_second']:.1f} img/s  elapsed {format_time(fields['seconds'])}  "
        f"left {format_time(left)}  mem {fields['cpu_mem_gb']:.1f} GB{gpu}"
    )


def _as_precond(net: torch.nn.Module) -> Precond:
    assert isinstance(net, Precond)
    return net
