"""docs/cluster.md: its scripts are shell, their commands are commands, and they are queued again where they should be."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import DIGITS, ROOT, run_cli

from train_edm2 import main as train_edm2

TEXT = (ROOT / "docs" / "cluster.md").read_text()
SCRIPTS = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", TEXT, re.DOTALL)
# What stands for Slurm and torchrun: commands without their own options, and at the end what they start, printed.
STUBS = {
    "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
    "torchrun": 'while [[ $1 == -* ]]; do shift; done; exec python "$@"',
    "python": 'printf "%s\\n" "$@"',
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; else echo "$@" >> "$ASKED"; fi',
}


def run(script: str, folder: Path, last_line: str) -> subprocess.CompletedProcess:
    """Run a script whose run has ended with a line in its log."""
    stubs, out = folder / "stubs", folder / "out"
    for path in (stubs, out):
        path.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{text}\n")
        (stubs / name).chmod(0o755)
    (out / "log.txt").write_text(f"Training on ...\n{last_line}\n")
    (out / ".lock.held").touch()
    variables = {"OUT": str(out), "DATA": str(DIGITS), "ASKED": str(folder / "asked"), "SLURM_JOB_ID": "7"}
    variables |= {"SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "localhost", "PATH": f"{stubs}:{os.environ['PATH']}"}
    (folder / "train.sh").write_text(script)
    command = ["bash", str(folder / "train.sh")]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=200)


def test_there_are_scripts():
    assert len(SCRIPTS) == 3
    for script in SCRIPTS:
        assert "#SBATCH --requeue" in script and re.search(r"#SBATCH --signal=(B:)?(USR1|TERM)@\d+", script)


@pytest.mark.parametrize("script", SCRIPTS, ids=["srun", "torchrun", "torchrun on several machines"])
def test_scripts(script, tmp_path):
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    done = run(script, tmp_path, "Suspended at 1024 images; repeat the command to continue")
    assert done.stderr == "" and done.stdout.splitlines() == ["train_edm2.py", *options(tmp_path / "out")]
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert not (tmp_path / "out" / ".lock.held").exists()


def options(out: Path) -> list[str]:
    """Of the training command that all scripts start."""
    return [f"--outdir={out}", f"--data={DIGITS}", "--preset=edm2-img512-s", "--batch-gpu=32"]


def test_their_command(tmp_path):
    result = run_cli(train_edm2, *options(tmp_path / "out"), "--dry-run")
    assert "Would start at 0 images" in result.output and "Dry run; exiting." in result.output


def test_a_finished_run_is_not_queued_again(tmp_path):
    done = run(SCRIPTS[0], tmp_path, "Done: 1024 images in out. A longer --duration continues it.")
    assert done.stdout.startswith("train_edm2.py") and not (tmp_path / "asked").exists()


def test_a_signal_to_the_script_of_torchrun_reaches_the_training(tmp_path):
    """As SIGTERM, and the script waits for its end."""
    script = SCRIPTS[1]
    stub = 'trap "echo asked to stop; sleep 1; echo saved; exit 0" TERM; echo ready; while true; do sleep 0.1; done'
    (tmp_path / "torchrun").write_text(f"#!/bin/bash\n{stub}\n")
    (tmp_path / "torchrun").chmod(0o755)
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$@"\n')
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "log.txt").write_text("Suspended at 1024 images\n")
    (tmp_path / "train.sh").write_text(script)
    variables = {"OUT": str(tmp_path), "SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        ["bash", str(tmp_path / "train.sh")], env=os.environ | variables, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=30)
    assert output.splitlines() == ["asked to stop", "saved", "requeue 7"]
