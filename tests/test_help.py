"""Help texts."""

import re
import subprocess
import sys

import pytest
from conftest import (
    ROOT,
)
from write_cli_docs import render

from calculate_likelihood import main as calculate_likelihood
from count_flops import main as count_flops
from generate_images import main as generate
from reconstruct_phema import main as reconstruct
from train_classifier import main as train_classifier
from train_consistency import main as train_consistency
from train_edm2 import main as train
from train_nvae import main as train_nvae
from train_score_sde import main as train_score_sde
from train_uvit import main as train_uvit

sys.path.insert(0, str(ROOT / "scripts"))


COMMANDS = {
    "train_edm2": train,
    "train_classifier": train_classifier,
    "train_score_sde": train_score_sde,
    "train_uvit": train_uvit,
    "train_nvae": train_nvae,
    "train_consistency": train_consistency,
    "calculate_likelihood": calculate_likelihood,
    "generate_images": generate,
    "reconstruct_phema": reconstruct,
    "count_flops": count_flops,
}


def test_help_equals_docs():
    assert (ROOT / "docs" / "cli.md").read_text() == render(), "run python scripts/write_cli_docs.py"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_through_the_shell(name):
    done = subprocess.run([sys.executable, f"{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: {name}.py [OPTIONS]")
    assert done.stderr == ""


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_what_the_readme_writes_is_no_part_of_the_repository():
    text = (ROOT / "README.md").read_text()
    written = {match[1] for match in re.finditer(r"--(?:outdir|dest|out|grid|save)=(\S+)", text)}
    written |= {match[1] for match in re.finditer(r"snapshot_tool\.py (?:convert|export) \S+ (\S+)", text)}
    assert len(written) > 10
    for path in written:
        file = path if "." in path else f"{path}/file"
        assert subprocess.run(["git", "check-ignore", "-q", "--no-index", file], cwd=ROOT).returncode == 0, path
