"""What the README says that commands print, they print."""

import re

import pytest
from conftest import ROOT, run_cli

import count_flops

README = (ROOT / "README.md").read_text()
# Each command whose output stands in the block behind it.
PRINTED = re.findall(r"```bash\npython count_flops\.py ([\w-]+)[^\n]*\n```\n\n```text\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize(("name", "text"), PRINTED, ids=[name for name, _ in PRINTED])
def test_costs(name, text):
    result = run_cli(count_flops.main, name)
    assert result.exit_code == 0, result.output
    memory = "peak memory per sample"  # there is none without a GPU
    ours, theirs = ([line for line in lines.splitlines() if memory not in line] for lines in (result.output, text))
    assert ours == theirs


def test_there_is_such_a_block():
    assert PRINTED
