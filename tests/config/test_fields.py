"""Fields: options, ranges, JSON and the command line from one description."""

import dataclasses
import json
import math
from dataclasses import dataclass

import click
import pytest
from conftest import fails_with, run_cli

from dnnlib.cli import CommandLine, parse_nimg, with_options
from dnnlib.errors import UserError
from training.config.data import DatasetInfo
from training.config.edm2 import TRAINING_PRESETS, EDM2Network, EDM2Training
from training.config.fields import Config, all_fields, click_options, option
from training.config.training import RunConfig


@dataclass(frozen=True, kw_only=True)
class Inner(Config):
    width: int = option(4, "Width", low=1, high=64)
    share: float = option(0.5, "Share", flag="--S_share", above=0, below=1)
    limit: float = option(math.inf, "Limit", low=0, infinite=True)
    hidden: int = option(3, flag=None, low=0)


@dataclass(frozen=True, kw_only=True)
class Outer(Config):
    images: int = option(help="Images", low=1, parse=parse_nimg, metavar="NIMG")
    mode: str = option("fast", "Mode", choices=("fast", "slow"))
    sizes: tuple[int, ...] = option((1, 2), "Sizes", low=1, items=(1, 3))
    maybe: int | None = option(None, "Perhaps", low=0)
    quick: bool = option(False, "Quick")
    inner: Inner = Inner()


def test_values_by_name():
    config = Outer(images=5, sizes=[3], inner=Inner(width=2))
    assert config.sizes == (3,)
    assert config.flat() == {
        "images": 5, "mode": "fast", "sizes": (3,), "maybe": None, "quick": False, "width": 2, "S_share": 0.5,
        "limit": math.inf, "hidden": 3,
    }  # fmt: skip
    assert Outer.from_flat(config.flat()) == config
    assert Outer.from_flat({"width": 8}, config) == dataclasses.replace(config, inner=Inner(width=8))
    assert Outer.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images": 0}, "--images must be at least 1, not 0"),
        ({"images": 1.5}, "--images must be a whole number, not 1.5"),
        ({"images": True}, "--images must be a whole number, not True"),
        ({"width": 65}, "--width must be at most 64, not 65"),
        ({"S_share": 0.0}, "--S_share must be positive, not 0.0"),
        ({"S_share": 1.0}, "--S_share must be less than 1, not 1.0"),
        ({"S_share": math.nan}, "--S_share must be a finite number, not nan"),
        ({"limit": -math.inf}, "--limit must be a finite number, not -inf"),
        ({"mode": "medium"}, "--mode must be one of fast, slow, not 'medium'"),
        ({"mode": 3}, "--mode must be text, not 3"),
        ({"sizes": ()}, "--sizes must have 1 to 3 values, not 0"),
        ({"sizes": (1, 2, 3, 4)}, "--sizes must have 1 to 3 values, not 4"),
        ({"sizes": (1, 0)}, "--sizes must be at least 1, not 0"),
        ({"sizes": 3}, "--sizes must be a list, not 3"),
        ({"maybe": -1}, "--maybe must be at least 0, not -1"),
        ({"quick": 1}, "--quick must be true or false, not 1"),
        ({"hidden": -1}, "hidden must be at least 0, not -1"),
    ],
)
def test_what_is_not_allowed_is_named(values, message):
    with pytest.raises(UserError) as err:
        Outer.from_flat({"images": 1, **values})
    assert str(err.value) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images": 1, "bogus": 2}, "unknown option 'bogus'"),
        ({}, "option 'images' is missing"),
        ({"images": 1, "inner": 3}, "int where a dictionary of options belongs"),
        ({"images": 1, "inner": {"widht": 3}}, "unknown option 'widht'"),
        ([], "list where a dictionary of options belongs"),
    ],
)
def test_json_is_strict(values, message):
    with pytest.raises(UserError, match=message):
        Outer.from_json(values)


def test_command_line():
    seen = {}

    @click.command(cls=CommandLine)
    @with_options(click_options(Outer, {"quick": "sometimes"}))
    def command(**opts):
        seen.update({key: value for key, value in opts.items() if value is not None})
        Outer.from_flat(seen)

    text = run_cli(command, "--help").output
    for fragment in ["--images NIMG", "[default: from preset]", "--mode [fast|slow]", "[default: 4; 1<=x<=64]",
                     "[default: 0.5; 0<x<1]", "--S_share", "[default: sometimes]", "[default: 1,2]"]:  # fmt: skip
        assert fragment in text
    assert "hidden" not in text
    assert run_cli(command, "--images=2Ki", "--width=3", "--quick=1").exit_code == 0
    assert seen == {"images": 2048, "width": 3, "quick": True}
    fails_with(run_cli(command, "--images=2Ki", "--width=0"), "--width must be at least 1, not 0")


def test_names_are_unique():
    names = [field.key for field in all_fields(EDM2Training)]
    assert len(set(names)) == len(names)


def test_python_callers_meet_the_same_rules():
    with pytest.raises(UserError, match="--batch must be at least 1, not -3"):
        RunConfig(duration=1, batch=-3)
    with pytest.raises(UserError, match="--status=100 must be multiples of --batch=64"):
        RunConfig(duration=64, batch=64, status=100)
    with pytest.raises(UserError, match="sum other than 0"):
        EDM2Network(resample_filter=(1.0, -1.0))
    with pytest.raises(UserError, match="--metrics and --metrics-ref belong together"):
        RunConfig(duration=64, batch=64, status=64, snapshot=0, checkpoint=0, metrics=("fid",))


DATASET = DatasetInfo(count=10, resolution=8, channels=1, label_dim=10, content_hash="00")


def test_options_of_a_run_by_an_earlier_version(tmp_path):
    """Flat, without the options that came later."""
    config = dataclasses.replace(TRAINING_PRESETS["digits"].config, dataset=DATASET)
    path = tmp_path / "options.json"
    config.save(path)
    values = json.loads(path.read_text())
    for name in (
        "family",
        "xflip",
        "cache",
        "verify",
        "timeout",
        "metrics",
        "metrics_ref",
        "compile",
        "betas",
        "clip_act",
        "sigma_data",
    ):
        del values[name]
    path.write_text(json.dumps(values))
    assert EDM2Training.load(path) == config


@pytest.mark.parametrize(
    "change", [{"bogus": 1}, {"batch": "many"}, {"dataset": None}, {"family": "nvae"}, {"lr": None}]
)
def test_damaged_options(tmp_path, change):
    config = dataclasses.replace(TRAINING_PRESETS["digits"].config, dataset=DATASET)
    path = tmp_path / "options.json"
    path.write_text(json.dumps({**config.to_json(), **change}))
    with pytest.raises(UserError, match="not the options of a training run"):
        EDM2Training.load(path)
