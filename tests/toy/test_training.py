"""Training of the toy example."""

import shutil

import pytest
import torch
from conftest import Golden

from training.config.toy import ToyConfig
from training.toy.data import gt
from training.toy.training import ToyTrainer, run_training

HAS_COMPILER = any(map(shutil.which, ("g++", "c++", "clang++")))


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("toy")


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler"))]
)
def test_six_iterations(golden, check, compiled, capsys):
    meta = golden.meta["train"]
    net = golden.toy_model("train_init", "train")
    batch = golden["train_x"].shape[1]
    config = ToyConfig(batch=batch, lr=meta["lr_ref"], lr_iter=meta["lr_iter"], ema_std=meta["ema_std"])
    trainer = ToyTrainer(net, gt("A"), config, compiled)
    losses = [trainer.step(x, sigma).item() for x, sigma in zip(golden["train_x"], golden["train_sigma"], strict=True)]
    check(losses, golden["train_losses"], 1e-5)
    for model, prefix in [(net, "train_final"), (trainer.ema, "train_ema")]:
        for name, expected in golden.state(prefix).items():
            check(model.state_dict()[name], expected, 1e-4, name)
    assert "torch.compile does not work" not in capsys.readouterr().out


def test_training_without_a_compiler(monkeypatch, capsys, golden):
    def fail(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: fail)
    trainer = ToyTrainer(golden.toy_model("train_init", "train"), gt("A"), ToyConfig(batch=256))
    assert torch.isfinite(trainer.step(golden["train_x"][0], golden["train_sigma"][0]))
    assert capsys.readouterr().out.splitlines() == [
        "Note: torch.compile does not work here, training takes longer (no C++ compiler found)"
    ]


class Recorder:
    """A view that somebody watches up to an iteration."""

    def __init__(self, until: int):
        self.until, self.drawn, self.finished = until, [], False

    @property
    def wanted(self) -> bool:
        return len(self.drawn) < self.until

    def draw(self, iteration, loss, net):
        self.drawn.append(iteration)

    def finish(self):
        self.finished = True


def test_snapshots_and_views(monkeypatch, capsys):
    monkeypatch.setattr("training.toy.training.FIRST_SNAPSHOT", 2)
    monkeypatch.setattr("training.toy.training.FRAME_INTERVAL", 3)
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    saved: list[int] = []
    view = Recorder(until=3)
    config = ToyConfig(num_layers=1, hidden_dim=4, iterations=11, batch=16)
    run_training(
        config, torch.device("cpu"), view, lambda iteration, _net: saved.append(iteration) or f"file {iteration}"
    )
    assert saved == [2, 4, 8, 11]
    assert view.drawn == [3, 6, 9] and view.finished  # and not 11, when nobody looks any more
    assert [line for line in capsys.readouterr().out.splitlines() if line] == [f"file {i}" for i in saved]
