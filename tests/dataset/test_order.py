"""The order of training, and its batches."""

import multiprocessing
import os
import re
from pathlib import Path

import numpy as np
import torch
from conftest import DIGITS

from training.dataset.images import ImageFolderDataset
from training.dataset.order import RunSampler, begin_loader_process, collate, dataset_indices, start_loading


def test_each_pass_shows_every_image_once():
    order = dataset_indices(np.arange(300), 100, seed=1)
    for epoch in order.reshape(3, 100):
        assert sorted(epoch) == list(range(100))
    assert not np.array_equal(order[:100], order[100:200])
    assert not np.array_equal(order[:100], dataset_indices(np.arange(100), 100, seed=2))


def test_order_does_not_depend_on_the_split():
    whole = RunSampler(100, seed=0, start=48, batch=24, part=(0, 24), round_size=24)
    steps = [batch for batch, _ in zip(whole, range(5), strict=False)]
    parts = [iter(RunSampler(100, seed=0, start=48, batch=24, part=part, round_size=6)) for part in [(0, 12), (12, 24)]]
    for step in steps:
        assert step == [i for part in parts for _round in range(2) for i in next(part)]
    resumed = iter(RunSampler(100, seed=0, start=48 + 24 * 3, batch=24, part=(0, 24), round_size=24))
    assert next(resumed) == steps[3]


def test_loader_processes_give_the_same_batches():
    def batches(**kwargs):
        sampler = RunSampler(1797, seed=0, start=0, batch=8, part=(0, 8), round_size=8)
        loader = torch.utils.data.DataLoader(
            ImageFolderDataset(DIGITS), batch_sampler=sampler, collate_fn=collate, **kwargs
        )
        batches = start_loading(loader)
        images = [next(batches)[0] for _ in range(3)]
        for process in multiprocessing.active_children():  # which leave signals to the group to this one
            status = Path(f"/proc/{process.pid}/status")
            assert os.getsid(process.pid) == process.pid
            assert not status.exists() or int(re.search(r"SigBlk:\s*(\w+)", status.read_text())[1], 16) & 1 << 1
        return images

    spawned = batches(num_workers=2, multiprocessing_context="spawn", worker_init_fn=begin_loader_process)
    for a, b in zip(batches(), spawned, strict=True):
        assert torch.equal(a, b)
