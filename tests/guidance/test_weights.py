"""Weights of guidance as functions of the noise level, and the options that describe them."""

import math

import pytest
import torch

from dnnlib.errors import UserError
from training.config.guidance import APG, GuidanceConfig, read_table
from training.config.samplers import Churn, SamplerConfig
from training.guidance import GuidedDenoiser, weight_of

SIGMA = torch.tensor([0.002, 0.02, math.sqrt(0.02), 1.0, 80.0], dtype=torch.float64)  # the middle one in ln sigma


def weights(**config) -> list[float]:
    return weight_of(GuidanceConfig(**config))(SIGMA).tolist()


def test_linear_and_cosine():
    ramp = dict(guidance=3.0, guidance_ramp=(0.02, 1.0))
    assert weights(**ramp, guidance_schedule="linear") == pytest.approx([3, 3, 2, 1, 1])
    assert weights(**ramp, guidance_schedule="linear", guidance_end=5.0) == pytest.approx([3, 3, 4, 5, 5])
    assert weights(**ramp, guidance_schedule="cosine") == pytest.approx([3, 3, 2, 1, 1])
    quarter = torch.tensor([0.02**0.75], dtype=torch.float64)  # of the way from 0.02 to 1 in ln sigma
    linear, cosine = (
        weight_of(GuidanceConfig(**ramp, guidance_schedule=shape))(quarter).item() for shape in ("linear", "cosine")
    )
    assert (linear, cosine) == pytest.approx((2.5, 2 + math.cos(math.pi / 4)))


def test_interval_and_table():
    assert weights(guidance=2.0, guidance_interval=(0.002, 1.0)) == [1, 2, 2, 2, 1]
    table = (0.02, 3.0, 1.0, 1.0, 10.0, 2.0)
    assert weights(guidance_table=table) == pytest.approx([3, 3, 2, 1, 2])
    assert weights(guidance_table=table, guidance_interval=(0.01, 0.5)) == pytest.approx([1, 3, 2, 1, 1])
    assert weights(guidance_table=(1.0, 4.0)) == [4] * 5


def test_table_of_a_file(tmp_path):
    path = tmp_path / "weights.txt"
    path.write_text("# sigma weight\n1, 1\n\n0.02 3  # the lowest\n")
    assert read_table(str(path)) == (0.02, 3, 1, 1)
    for text, message in [
        ("1 2\n1 3\n", "each in one line"),
        ("0 2\n", "must be positive"),
        ("1 2 3\n", "line 1: '1 2 3' where 2 numbers should be"),
        ("1 2\nx 3\n", "line 2: 'x 3'"),
        ("# nothing\n", "holds 0 lines"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_table(str(path))
    with pytest.raises(UserError, match="no such file"):
        read_table(str(tmp_path / "nowhere"))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is no text file"):
        read_table(str(path))


def test_the_guide_is_asked_only_where_it_counts():
    seen = []

    def guide(x, sigma, labels=None):
        seen.append(sigma.tolist())
        return x

    weight = weight_of(GuidanceConfig(guidance=3.0, guidance_schedule="linear", guidance_ramp=(0.02, 1.0)))
    guided = GuidedDenoiser(lambda x, sigma, labels: 2 * x, guide, weight)
    x = torch.ones(5, 1, 1, 1)
    torch.testing.assert_close(guided(x, SIGMA).flatten(), torch.tensor([4.0, 4, 3, 2, 2]))
    assert torch.equal(guided(x, torch.tensor(2.0)), 2 * x) and len(seen) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(guidance_schedule="linear"), "--guidance-schedule=linear needs --guidance-ramp=LO,HI"),
        (dict(guidance_ramp=(0.1, 1.0)), "--guidance-ramp has no effect with --guidance-schedule=constant"),
        (dict(guidance_end=2.0), "--guidance-end has no effect"),
        (dict(guidance_table=(1.0, 2.0), guidance=2.0), "leave --guidance out"),
        (dict(guidance_schedule="cosine", guidance_ramp=(0.0, 1.0)), "--guidance-ramp must be positive"),
        (dict(guidance_method="cfg+"), "--guidance-method must be one of"),
    ],
)
def test_options_that_do_not_go_together(config, message):
    with pytest.raises(UserError, match=message):
        GuidanceConfig(**config)


def test_rules_that_need_given_steps():
    rk45, churned = SamplerConfig(solver="rk45"), SamplerConfig(solver="euler", churn=Churn(S_churn=1.0))
    for config, sampler, message in [
        (GuidanceConfig(guidance_method="cfg++"), SamplerConfig(), "use --sampler=euler"),
        (GuidanceConfig(guidance_method="cfg++"), churned, "adds noise to its steps: leave it out"),
        (GuidanceConfig(guidance_method="apg"), rk45, "--apg-momentum needs steps that are given"),
        (GuidanceConfig(guidance_method="cfg-zero"), rk45, "--zero-init-steps needs steps that are given"),
    ]:
        with pytest.raises(UserError, match=message):
            config.check_sampler(sampler)
    GuidanceConfig(guidance_method="cfg++").check_sampler(SamplerConfig(solver="euler"))
    GuidanceConfig(guidance_method="apg", apg=APG(momentum=0.0)).check_sampler(rk45)
    GuidanceConfig(guidance_method="cfg-zero", zero_init_steps=0).check_sampler(rk45)


def test_whether_guidance_acts():
    ramp = dict(guidance_schedule="linear", guidance_ramp=(0.1, 1.0))
    assert not GuidanceConfig().acts and not GuidanceConfig(**ramp).acts
    assert not GuidanceConfig(guidance_table=(1.0, 1.0, 2.0, 1.0)).acts
    assert GuidanceConfig(guidance=2.0).acts and GuidanceConfig(**ramp, guidance_end=2.0).acts
    assert GuidanceConfig(guidance_table=(1.0, 1.0, 2.0, 1.5)).acts and GuidanceConfig(guidance_method="cfg++").acts
