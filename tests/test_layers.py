"""The import rule of the code base: imports point down, and importing does nothing."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"dnnlib", "dnnlib.util"},
    {
        "torch_utils",
        "torch_utils.distributed",
        "torch_utils.checkpoint",
        "torch_utils.training_stats",
        "torch_utils.misc",
        "torch_utils.safe_pickle",
    },
    {"training", "training.schedules", "training.solvers", "training.choices"},
    {"training.denoiser"},
    {
        "training.networks_edm2",
        "training.compiled_inference",
        "training.fast_inference",
        "training.losses",
        "training.samplers",
        "training.guidance",
        "training.phema",
        "training.lr",
        "training.dataset",
        "training.archives",
        "training.image_sources",
        "training.image_transforms",
        "training.encoders",
        "training.detectors",
        "training.distances",
        "training.snapshot",
        "training.snapshot.description",
        "training.snapshot.files",
        "training.snapshot.hub",
        "training.snapshot.native",
        "training.snapshot.published",
        "training.networks_toy",
        "training.toy_data",
        "training.flops",
    },
    {"training.config"},
    {"training.presets", "training.previews"},
    {
        "training.training_loop",
        "training.generation",
        "training.generation_options",
        "training.reconstruction",
        "training.metrics",
        "training.evaluation",
        "training.feature_stats",
        "training.conversion",
        "training.dataset_check",
        "training.toy_training",
        "training.toy_sampling",
        "training.toy_figure",
    },
    {
        "train_edm2",
        "generate_images",
        "reconstruct_phema",
        "count_flops",
        "dataset_tool",
        "calculate_metrics",
        "toy_example",
        "training.snapshot.__main__",
    },
]
LAYER_OF = {module: layer for layer, modules in enumerate(LAYERS) for module in modules}
SCRIPTS = LAYERS[-1]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(p): p
    for p in [*ROOT.glob("*.py"), *(p for d in ("dnnlib", "torch_utils", "training") for p in (ROOT / d).rglob("*.py"))]
}


def imports(module: str) -> set[str]:
    """Modules of ours that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(SOURCES)


def test_every_module_has_a_layer():
    assert set(SOURCES) == set(LAYER_OF)


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_point_down(module):
    for imported in imports(module) - {module}:
        assert LAYER_OF[imported] <= LAYER_OF[module], f"{module} imports {imported} from above"
        assert imported not in SCRIPTS, f"{module} imports the script {imported}"


def test_no_import_cycles():
    graph = {module: imports(module) for module in SOURCES}
    graph["dnnlib.util"].remove("dnnlib")  # for the version, which setuptools wants there
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle {' -> '.join([*path, module])}"
        if module not in done:
            for imported in graph[module] - {module}:
                visit(imported, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", sorted(set(SOURCES) - {"torch_utils.distributed"}))
def test_only_distributed_knows_ranks(module):
    text = SOURCES[module].read_text()
    assert "torch.distributed" not in text and "WORLD_SIZE" not in text


def test_phema_stands_alone():
    assert imports("training.phema") == set()


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_nothing_happens_at_import(module):
    """Module level code reads neither the environment nor the command line, and starts no CUDA."""
    for node in ast.parse(SOURCES[module].read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.If)):
            continue
        text = ast.unparse(node)
        assert not any(word in text for word in ("os.environ", "getenv", "sys.argv", "cuda.")), f"{module}: {text}"


def test_import_starts_no_cuda():
    code = (
        "import torch, "
        + ", ".join(sorted(SOURCES))
        + "; assert not torch.cuda.is_initialized(); assert not torch.distributed.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_help_needs_no_torch():
    scripts = sorted(SCRIPTS - {"training.snapshot.__main__"})
    code = f"import sys, {', '.join(scripts)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("script", ["calculate_metrics", "generate_images", "toy_example"])
def test_exports_for_python_callers(script):
    module = importlib.import_module(script)
    for name in module.__all__:
        assert callable(getattr(module, name))
    with pytest.raises(AttributeError):
        module.nothing_of_that_name  # noqa: B018
