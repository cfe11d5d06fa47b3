"""--tracker: what services are sent, and that a training does not depend on them."""

import sys
import types

import pytest
from conftest import DIGITS, TINY, run_cli

from train_edm2 import main as train


class Service(types.ModuleType):
    """A package as wandb and trackio are, which keeps what it is sent."""

    def __init__(self, name, fails=False):
        super().__init__(name)
        self.fails, self.inits, self.sent, self.finished = fails, [], [], 0

    def init(self, **options):
        self.inits.append(options)

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "nimg")

    def Image(self, path):
        return ("image", path)

    def log(self, values):
        if self.fails:
            raise ConnectionError("the service is away")
        self.sent.append(values)

    def finish(self):
        self.finished += 1


@pytest.fixture(params=["wandb", "trackio"])
def service(request, monkeypatch):
    module = Service(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def trained(tmp_path, name, duration="1Ki"):
    options = [f"--outdir={tmp_path / 'run'}", f"--data={DIGITS}", *TINY, f"--duration={duration}"]
    return run_cli(train, *options, f"--tracker={name}")


def test_numbers_and_pictures_are_sent_and_resumed_runs_continue(service, tmp_path):
    result = trained(tmp_path, service.__name__)
    assert result.exit_code == 0, result.output
    assert service.inits[0]["config"]["batch"] == 256 and service.finished == 1
    assert {values["nimg"] for values in service.sent if "loss" in values} == {512, 1024}
    pictures = {name: values[name][1] for values in service.sent for name in ("reals", "fakes") if name in values}
    assert pictures["fakes"].endswith("fakes-0000001.png") and pictures["reals"].endswith("reals.png")
    assert trained(tmp_path, service.__name__, "2Ki").exit_code == 0
    first, second = service.inits
    assert first["name"] == second["name"] and first.get("id") == second.get("id") and second["resume"] == "allow"


def test_a_service_that_fails_is_left_alone(service, tmp_path):
    service.fails = True
    result = trained(tmp_path, service.__name__)
    assert result.exit_code == 0, result.output
    assert result.output.count("failed (the service is away); the training goes on without it") == 1


def test_a_picture_that_fails_ends_nothing(service, monkeypatch, tmp_path):
    monkeypatch.setattr(service, "Image", lambda _path: 1 / 0)
    result = trained(tmp_path, service.__name__)
    assert result.exit_code == 0, result.output
    assert result.output.count("failed (division by zero); the training goes on without it") == 1


def test_a_missing_package_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = trained(tmp_path, "wandb")
    assert result.exit_code == 2 and "pip install wandb" in result.stderr.splitlines()[-1]
