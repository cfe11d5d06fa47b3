"""How samples of the toy example are measured, and what the models in the repository show."""

import numpy as np
import pytest
import torch

from toy_example import CFG_NET, GNET, NET
from training.snapshot import load_network, read_metadata
from training.toy.data import gt
from training.toy.evaluation import measure, support_level
from training.toy.sampling import sample_toy


def test_measures():
    distribution = gt("A")
    generator = torch.Generator().manual_seed(1)
    x = distribution.sample(20_000, generator=generator)
    good = measure(distribution, x)
    assert good.outliers.value == pytest.approx(0.01, abs=4 * good.outliers.error)
    assert good.nll.value == pytest.approx(-distribution.logp(x).mean().item(), rel=1e-4)
    assert 0 <= good.branch_kl.value < 0.01
    # All samples off the tree, and half of the tree without samples.
    assert measure(distribution, x + 3).outliers.value == 1
    left = x[x[:, 0] < x[:, 1]]
    lost = measure(distribution, left)
    assert lost.branch_kl.value == pytest.approx(np.log(len(x) / len(left)), abs=0.15)
    assert lost.branch_kl.value > 20 * lost.branch_kl.error
    # Standard errors are those of repetitions.
    repeated = [measure(distribution, part) for part in x.split(1000)]
    for estimates in zip(*repeated, strict=True):
        spread = np.std([e.value for e in estimates], ddof=1)
        assert np.mean([e.error for e in estimates]) == pytest.approx(spread, rel=0.6)


def test_support_holds_99_percent():
    x = gt("B").sample(50_000, generator=torch.Generator().manual_seed(5))
    assert (gt("B").logp(x) > support_level(gt("B"))).float().mean().item() == pytest.approx(0.99, abs=0.002)


def test_models_in_the_repository():
    """Autoguidance makes fewer outliers than no guidance, and keeps branches that classifier-free guidance loses."""
    expected = {NET: ("A", 64, 4096), GNET: ("A", 32, 512), CFG_NET: ("AB", 32, 512)}
    for path, facts in expected.items():
        metadata = read_metadata(path)
        config = metadata["config"]
        assert (config["cls"], config["hidden_dim"], config["iterations"]) == facts
        assert metadata["command"].startswith("python toy_example.py train --cls=") and metadata["date"]
        assert path.stat().st_size < 100_000
    net, gnet, cfg_net = (load_network(path).net for path in expected)
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    plain, cfg, auto = (
        measure(gt("A"), sample_toy(net, noise, guide, w)) for guide, w in [(None, 1), (cfg_net, 2), (gnet, 2)]
    )
    assert auto.outliers.value < plain.outliers.value - 4 * auto.outliers.error
    assert auto.outliers.value < cfg.outliers.value
    assert auto.branch_kl.value < cfg.branch_kl.value / 2
