"""Pictures of the toy example."""

import numpy as np
import pytest
import torch

from toy_example import CFG_NET, GNET, NET
from training.snapshot import load_network
from training.toy.data import gt
from training.toy.figure import CLOSEUP, TRAJECTORIES, draw_paper_figure, new_figure, save_figure
from training.toy.models import Models


@pytest.mark.parametrize("cls", ["A", "B", "AB"])
def test_closeup(monkeypatch, cls):
    """The lower panels look where the class is, and paths start there."""
    from matplotlib.figure import Figure

    monkeypatch.setattr("training.toy.figure.SAMPLES", 1000)
    monkeypatch.setattr("training.toy.figure.GRID", 40)
    (x0, x1), (y0, y1) = box = CLOSEUP[cls]
    x, y = gt(cls).sample(10_000, generator=torch.Generator().manual_seed(0)).T
    assert ((x > x0) & (x < x1) & (y > y0) & (y < y1)).float().mean() > 0.05
    net, gnet, cfg_net = (load_network(path).net for path in (NET, GNET, CFG_NET))
    figure = Figure()
    draw_paper_figure(figure, Models(net, gnet, cfg_net, cls, names={}), guidance=2, cfg_guidance=2, seed=0)
    upper, lower = figure.axes[:4], figure.axes[4:]
    for axes in upper:
        corners = np.array(axes.lines[0].get_data())
        assert (corners.min(axis=1) == (x0, y0)).all() and (corners.max(axis=1) == (x1, y1)).all()
    assert [(axes.get_xlim(), axes.get_ylim()) for axes in lower] == [box] * 4
    paths = lower[-1].lines
    assert len(paths) == 2 * (TRAJECTORIES + 1)  # without and with guidance; the last of each are the ends
    starts = np.array([path.get_xydata() for path in paths[:TRAJECTORIES]])[:, 0]
    assert (starts > (x0, y0)).all() and (starts < (x1, y1)).all()


@pytest.mark.parametrize(
    ("suffix", "start"), [("png", b"\x89PNG"), ("PNG", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_saved_figures(tmp_path, suffix, start):
    figure, window = new_figure(window=False)
    path = tmp_path / f"toy.{suffix}"
    save_figure(figure, path, "made by a test")
    assert not window and path.read_bytes().startswith(start) and b"made by a test" in path.read_bytes()
