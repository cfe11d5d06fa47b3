"""Write docs/cli.md from the commands' own help texts."""

import importlib
import sys
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "train_edm2": "train_edm2.py",
    "train_score_sde": "train_score_sde.py",
    "train_classifier": "train_classifier.py",
    "train_uvit": "train_uvit.py",
    "train_nvae": "train_nvae.py",
    "train_consistency": "train_consistency.py",
    "generate_images": "generate_images.py",
    "edit_images": "edit_images.py",
    "explore": "explore.py",
    "calculate_likelihood": "calculate_likelihood.py",
    "calculate_metrics": "calculate_metrics.py",
    "reconstruct_phema": "reconstruct_phema.py",
    "count_flops": "count_flops.py",
    "dataset_tool": "dataset_tool.py",
    "toy_example": "toy_example.py",
    "snapshot_tool": "snapshot_tool.py",
}
INTRODUCTION = """# Command line reference

What `--help` prints. Written by `python scripts/write_cli_docs.py`; a test compares it with the commands.
"""


def help_texts(command: click.Command, name: str) -> list[str]:
    """What `--help` prints for a command, and for each of its subcommands."""
    texts = [command.get_help(click.Context(command, info_name=name, terminal_width=100))]
    if isinstance(command, click.Group):
        for subcommand in command.commands.values():
            texts += help_texts(subcommand, f"{name} {subcommand.name}")
    return texts


def render() -> str:
    text = INTRODUCTION
    for module, name in COMMANDS.items():
        texts = help_texts(importlib.import_module(module).main, f"python {name}")
        text += f"\n## {name}\n" + "".join(f"\n```text\n{help_text}\n```\n" for help_text in texts)
    return text


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    (ROOT / "docs" / "cli.md").write_text(render())
