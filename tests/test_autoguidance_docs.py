"""The tables of the documents show the figures of the files beside them."""

import json

import pytest
from conftest import ROOT


@pytest.mark.parametrize("name", ["README.md", "docs/autoguidance.md"])
def test_tables_show_the_evaluation(name):
    """What the documents say is what docs/toy-evaluation.json holds, rounded."""
    rows = json.loads((ROOT / "docs" / "toy-evaluation.json").read_text())["rows"]
    outliers = {(row["sampling"], row["weight"]): f"{row['outliers']['value']:.2%}" for row in rows}
    lines = [
        line.split("|")[1:] for line in (ROOT / name).read_text().splitlines() if line.startswith("| ") and "%" in line
    ]
    sampling, shown = "", 0
    for cells in ([cell.strip() for cell in line] for line in lines):
        sampling = cells[0] or sampling
        if sampling in {row["sampling"] for row in rows}:
            weight = float(cells[1]) if cells[1] else None
            assert cells[3].split(" ±")[0] + "%" == outliers[sampling, weight]
            shown += 1
    assert shown >= 6


def test_table_shows_the_sweep():
    """What docs/autoguidance.md says of digits is what docs/autoguidance-digits.json holds, rounded."""
    facts = json.loads((ROOT / "docs" / "autoguidance-digits.json").read_text())
    expected = [
        f"| {row['weight']:g} | {100 * row['class_agreement']:.1f} ± {100 * row['class_agreement_error']:.1f} %"
        f" | {row['nn_distance_ratio']:.3f} | {row['diversity']:.0f} |"
        for row in facts["rows"]
    ]
    real = facts["real"]
    expected.append(f"| real digits | {100 * real['class_agreement']:.1f} % | 1 | {real['diversity']:.0f} |")
    text = (ROOT / "docs" / "autoguidance.md").read_text()
    heading, _rule, *table = text[text.index("| w | class as asked for") :].splitlines()
    assert heading.count("|") == 5 and table[: len(expected) + 1] == [*expected, ""]
    assert f"{facts['samples']} samples each" in text and f"All samples are of {facts['steps']} steps" in text
