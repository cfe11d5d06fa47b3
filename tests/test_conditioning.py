"""Conditions: drawn, dropped, and none."""

import pytest
import torch

from dnnlib.errors import UserError
from training.conditioning import Conditioning, DataSpec
from training.samplers import StackedRandomGenerator

CLASSES = Conditioning(kind="classes", size=5)


def rnd(seeds):
    return StackedRandomGenerator("cpu", seeds)


def test_no_conditions():
    none = Conditioning.of_labels(0)
    assert none == Conditioning()
    assert none.null(3, "cpu") is None
    assert none.draw(rnd(range(3)), 3) is None
    assert none.drop(None, 0.5, rnd(range(3))) is None


def test_classes_depend_on_the_seed_alone():
    drawn = CLASSES.draw(rnd(range(200)), 200)
    assert drawn.shape == (200, 5) and (drawn.sum(1) == 1).all()
    assert (drawn.sum(0) > 20).all()
    assert torch.equal(drawn[7:8], CLASSES.draw(rnd([7]), 1))


def test_a_given_class_takes_the_same_draws():
    free, fixed = rnd([3]), rnd([3])
    CLASSES.draw(free, 1)
    assert CLASSES.draw(fixed, 1, class_idx=2).tolist() == [[0, 0, 1, 0, 0]]
    assert torch.equal(free.randn([1, 4]), fixed.randn([1, 4]))


def test_dropping_is_decided_by_each_image():
    n, p = 2000, 0.25
    cond = torch.eye(5)[torch.arange(n) % 5]
    dropped = CLASSES.drop(cond, p, rnd(range(n)))
    is_null = (dropped == 0).all(1)
    assert is_null.float().mean().item() == pytest.approx(p, abs=0.04)
    assert torch.equal(dropped[~is_null], cond[~is_null])
    assert torch.equal(dropped[30:31], CLASSES.drop(cond[30:31], p, rnd([30])))
    assert torch.equal(CLASSES.drop(cond, 0, rnd(range(n))), cond)
    vectors = torch.randn(4, 7)
    assert torch.equal(Conditioning(kind="vector", size=7).drop(vectors, 1.0, rnd(range(4))), torch.zeros(4, 7))


def test_bounds():
    assert DataSpec(channels=3, resolution=8).shape == (3, 8, 8)
    for kwargs in [dict(channels=0, resolution=8), dict(channels=3, resolution=1 << 20)]:
        with pytest.raises(UserError):
            DataSpec(**kwargs)
    with pytest.raises(UserError, match="must be one of none, classes, vector"):
        Conditioning(kind="text", size=3)
