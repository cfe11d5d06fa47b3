"""docs/examples/quickstart.ipynb runs from its first cell to its last."""

import ast
import json
import math
from typing import Any

import PIL.Image
from conftest import ROOT

NOTEBOOK = ROOT / "docs" / "examples" / "quickstart.ipynb"
# Less of everything: text of a cell -> what stands in its place.
SHORT = {
    "DURATION = 144 * 1024": "DURATION = 18 * 128",
    'ROOT / "out" / "notebook"': "Path(OUTDIR)",
    "range(1000)": "range(200)",
    "num_steps=18": "num_steps=3",
}


def run_cell(source: str, namespace: dict[str, Any]) -> Any:
    """Run a cell as Jupyter does: the value of its last expression is what it shows; None = nothing."""
    module = ast.parse(source)
    last = module.body.pop() if isinstance(module.body[-1], ast.Expr) else None
    exec(compile(module, str(NOTEBOOK), "exec"), namespace)
    return None if last is None else eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), namespace)


def test_the_quickstart_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    cells = [
        "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    text = "\0".join(cells)
    for there, instead in SHORT.items():
        assert there in text
        text = text.replace(there, instead)
    namespace: dict[str, Any] = {"OUTDIR": str(tmp_path)}
    shown = [run_cell(cell, namespace) for cell in text.split("\0")]
    pictures = [value for value in shown if isinstance(value, PIL.Image.Image)]
    assert len(pictures) == 3 and len({picture.size for picture in pictures}) == 1
    assert len({picture.tobytes() for picture in pictures}) == 3
    assert math.isfinite(shown[-1]["fd_pixels"]) and shown[-1]["fd_pixels"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["guide", "main"]
