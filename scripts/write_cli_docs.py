"""Write docs/cli.md from the commands' own help texts."""

import sys
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
COMMANDS = ["train_edm2", "generate_images", "reconstruct_phema"]
INTRODUCTION = """# Command line reference

What `--help` prints. Written by `python scripts/write_cli_docs.py`; a test compares it with the commands.
"""


def help_text(name: str) -> str:
    command: click.Command = __import__(name).main
    return command.get_help(click.Context(command, info_name=f"python {name}.py", terminal_width=100))


def render() -> str:
    return INTRODUCTION + "".join(f"\n## {name}.py\n\n```text\n{help_text(name)}\n```\n" for name in COMMANDS)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    (ROOT / "docs" / "cli.md").write_text(render())
