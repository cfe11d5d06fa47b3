"""The Vendi score and the balance of classes, in closed form and by their definitions."""

import numpy as np
import pytest

from dnnlib.errors import UserError
from training.metrics import diversity
from training.metrics.diversity import class_balance, vendi_score


def test_vendi_score_counts_what_is_different():
    """k kinds of images with nothing in common: k, if all are equally frequent; else the exponential of the entropy."""
    kinds = np.eye(5)
    assert vendi_score(np.repeat(kinds, 7, axis=0)) == pytest.approx(5)
    assert vendi_score(np.ones([9, 3])) == pytest.approx(1)
    shares = np.array([0.5, 0.3, 0.2])
    uneven = np.repeat(kinds[:3], [50, 30, 20], axis=0)
    assert vendi_score(uneven) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    # The length of features says nothing.
    assert vendi_score(uneven * np.random.default_rng(0).uniform(0.1, 10, [100, 1])) == pytest.approx(
        vendi_score(uneven)
    )


@pytest.mark.parametrize("shape", [(30, 4), (6, 40)])
def test_vendi_score_by_its_definition(shape, monkeypatch):
    """By the eigenvalues of the matrix of similarities, [N, N]."""
    monkeypatch.setattr(diversity, "ROWS", 8)
    x = np.random.default_rng(1).standard_normal(shape)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / len(x)).clip(1e-300)
    assert vendi_score(x.astype(np.float32)) == pytest.approx(np.exp(-(values * np.log(values)).sum()), rel=1e-5)
    assert vendi_score(x) == pytest.approx(np.exp(-(values * np.log(values)).sum()), rel=1e-9)


def test_vendi_score_of_nothing():
    with pytest.raises(UserError, match="those of an image are all zero"):
        vendi_score(np.array([[1.0, 0], [0, 0]]))
    with pytest.raises(UserError, match=r"shape \[N, D\], not \[0, 4\]"):
        vendi_score(np.zeros([0, 4]))


def test_class_balance():
    """Classes 3, 5 and 9, at 0, 10 and 20 on a line."""
    real = np.array([[0.0], [0.1], [10], [20]])
    classes = np.array([3, 3, 5, 9])
    even = class_balance(real, classes, np.array([[0.2], [0.3], [9], [19]]))
    assert even == {"imbalance": 0, "rarest": 1}
    # Shares 1/2, 1/4, 1/4 against 3/4, 1/4, 0.
    assert class_balance(real, classes, np.array([[0.2], [0.3], [-5], [9]])) == {"imbalance": 0.25, "rarest": 0}
    assert class_balance(real, classes, np.array([[0.0], [10], [20]])) == pytest.approx(
        {"imbalance": 1 / 6, "rarest": 2 / 3}
    )
    with pytest.raises(UserError, match="has 3 classes for the features of 4 images"):
        class_balance(real, classes[:3], real)
