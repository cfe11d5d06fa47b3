"""Ground truth of the toy example: parameters, densities, scores, samples."""

import pytest
import torch
from conftest import Golden

from dnnlib.errors import UserError
from training.toy.data import GaussianMixture, gt


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("toy")


@pytest.mark.parametrize("cls", ["A", "B"])
def test_parameters(golden, cls):
    distribution = gt(cls)
    for name in ("phi", "mu", "Sigma"):
        assert torch.equal(getattr(distribution, name), golden[f"gt{cls}_{name}"]), name


@pytest.mark.parametrize("classes", ["A", "B", "AB"])
def test_density_and_score(golden, check, classes):
    distribution = gt(classes)
    x, sigma = golden[f"{classes}_x"], golden[f"{classes}_sigma"]
    check(distribution.pdf(x, sigma), golden[f"{classes}_pdf"], 1e-5)
    check(distribution.logp(x, 0.1), golden[f"{classes}_logp_sigma0.1"], 1e-5)
    score, expected = distribution.score(x, sigma), golden[f"{classes}_score"]
    assert score.isfinite().all()
    # Where the density is no normal float32 number, the reference, computed from it, is NaN or has lost its digits.
    normal = golden[f"{classes}_pdf"] > torch.finfo(torch.float32).tiny
    assert normal.float().mean() > 0.6
    check(score[normal], expected[normal], 1e-5)


@pytest.mark.parametrize("classes", ["A", "AB"])
def test_score_is_the_gradient_of_logp(golden, check, classes):
    distribution = GaussianMixture(*(getattr(gt(classes), name).double() for name in ("phi", "mu", "Sigma")))
    x, sigma = golden[f"{classes}_x"].double(), golden[f"{classes}_sigma"].double()
    with torch.enable_grad():
        x.requires_grad_()
        gradient = torch.autograd.grad(distribution.logp(x, sigma).sum(), x)[0]
    check(distribution.score(x, sigma), gradient, 1e-12)
    check(gt(classes).score(x.detach().float(), sigma.float()), gradient, 1e-5)


def test_far_away_everything_is_finite():
    x = torch.tensor([[1e3, -1e3], [0.0, 5.0]])
    assert gt("A").logp(x).isfinite().all() and gt("A").score(x).isfinite().all()
    assert torch.equal(gt("A").pdf(x), torch.zeros(2))


def test_any_shape():
    x, sigma = torch.randn(3, 50, 2), torch.rand(3, 50)
    distribution = gt("B")
    flat = distribution.score(x.reshape(-1, 2), sigma.reshape(-1))
    torch.testing.assert_close(distribution.score(x, sigma), flat.reshape(x.shape))
    assert distribution.logp(x, 0.1).shape == (3, 50)
    assert distribution.posterior(x, sigma).shape == (3, 50, 1016)
    assert distribution.logp(x[:0]).shape == (0, 50)


def test_samples_have_the_moments_of_the_mixture():
    distribution = gt("A")
    x = distribution.sample([400, 250], 0.3, torch.Generator().manual_seed(0))
    assert x.shape == (400, 250, 2)
    mean = distribution.phi @ distribution.mu
    second = torch.einsum("k,ki,kj->ij", distribution.phi, distribution.mu, distribution.mu)
    covariance = (distribution.phi[:, None, None] * distribution.Sigma).sum(0) + second - torch.outer(mean, mean)
    x = x.reshape(-1, 2)
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.006)
    torch.testing.assert_close(x.T.cov(), covariance + 0.3**2 * torch.eye(2), rtol=0, atol=0.006)


def test_both_classes_are_standardised():
    x = gt("AB").sample(100_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x.mean(0), torch.zeros(2), rtol=0, atol=0.05)
    torch.testing.assert_close(x.std(0), torch.full([2], 0.5), rtol=0, atol=0.02)


def test_unknown_class():
    with pytest.raises(UserError, match="unknown class 'C'"):
        gt("C")
