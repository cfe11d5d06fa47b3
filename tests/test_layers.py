"""The import rule of the code base: imports point down, and importing does nothing."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom up: rooms (packages, all of their modules) and single modules. A module imports only what stands
# in an earlier group, or in its own room.
ORDER = [
    {"dnnlib"},
    {"torch_utils", "training.config", "training"},
    {
        "training.schedules",
        "training.conditioning",
        "training.classes",
        "training.provenance",
        "training.phema",
        "training.lr",
        "training.rounds",
        "training.flops",
    },
    {
        "training.schedules_uvit",
        "training.preconditioning",
        "training.control",
        "training.optimizers",
        "training.dataset",
    },
    {"training.denoiser", "training.losses", "training.losses_vae", "training.encoders"},
    {
        "training.guidance",
        "training.losses_consistency",
        "training.networks",
        "training.restoration",
        "training.adapters",
    },
    {"training.samplers", "training.networks_edm2"},
    {
        "training.likelihood",
        "training.likelihood_vae",
        "training.generators",
        "training.metrics",
        "training.conversion",
        "training.toy",
    },
    {"training.families"},
    {"training.snapshot"},
    {"training.prompts", "training.guides", "training.tuning"},
    {"training.generation"},
    {"training.editing", "training.dataset_likelihood", "training.shelf"},
    {"training.monitoring", "training.sweep"},
    {"training.holding"},
    {"training.training_loop"},
    {"training.planning"},
    {"training.launch"},
    {"training.advice", "training.explore", "training.release"},
]
GROUP_OF = {room: group for group, rooms in enumerate(ORDER) for room in rooms}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
# Torch's modules that say the rank of a process, and the environment's names for it.
RANKS = ("torch.distributed", "WORLD_SIZE", "LOCAL_RANK")
KNOWS_RANKS = {"torch_utils.distributed", "torch_utils.sharding", "torch_utils.sharded_state"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(p): p
    for p in [*ROOT.glob("*.py"), *(p for d in ("dnnlib", "torch_utils", "training") for p in (ROOT / d).rglob("*.py"))]
}


def room(module: str) -> str:
    """A folder of `training`, a module of it that is in none, `torch_utils`, `dnnlib`, or a script."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "training" else parts[0]


def imports(module: str) -> set[str]:
    """Modules of ours that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names} & set(SOURCES)
            found |= names or {node.module}
    return found & set(SOURCES) - {module}


def at_import(statements: list[ast.stmt]) -> Iterator[ast.AST]:
    """What runs when a module is imported: also under module-level `if`, `try` and `with`, in class bodies, in
    decorators and default arguments; not function bodies."""
    for statement in statements:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = statement.args
            yield from [*statement.decorator_list, *arguments.defaults, *filter(None, arguments.kw_defaults)]
        elif isinstance(statement, ast.If) and ast.unparse(statement.test) in (
            "TYPE_CHECKING",
            "__name__ == '__main__'",
        ):
            continue
        elif isinstance(statement, (ast.ClassDef, ast.If, ast.Try, ast.With, ast.For, ast.While)):
            for _, value in ast.iter_fields(statement):
                for part in value if isinstance(value, list) else [value]:
                    if isinstance(part, ast.stmt):
                        yield from at_import([part])
                    elif isinstance(part, ast.ExceptHandler):
                        yield from at_import(part.body)
                    elif isinstance(part, ast.AST):
                        yield part
        else:
            yield statement


def test_every_module_has_a_place():
    assert {room(module) for module in SOURCES} - SCRIPTS <= set(GROUP_OF)


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_point_down(module):
    for imported in imports(module):
        assert imported not in SCRIPTS, f"{module} imports the script {imported}"
        if module not in SCRIPTS and room(imported) != room(module):
            above = GROUP_OF[room(imported)] >= GROUP_OF[room(module)]
            assert not above, f"{module} imports {imported}, which stands no lower"


def test_all_are_installed():
    """pyproject.toml lists the packages and scripts."""
    text = (ROOT / "pyproject.toml").read_text()
    packages = {name for name, path in SOURCES.items() if path.name == "__init__.py"}
    for key, wanted in {"packages": packages, "py-modules": SCRIPTS}.items():
        (listed,) = re.findall(rf"^{key} = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
        assert set(re.findall(r'"([\w.]+)"', listed)) == wanted


def test_no_import_cycles():
    graph = {module: imports(module) for module in SOURCES}
    graph["dnnlib.util"].discard("dnnlib")  # for the version, which setuptools wants there
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle {' -> '.join([*path, module])}"
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_desk_stands_alone():
    """All that a user can choose: known without torch, and without the rest of `training`."""
    for module in (m for m in SOURCES if room(m) == "training.config"):
        foreign = {name for name in imports(module) if room(name) not in ("dnnlib", "training.config")}
        assert not foreign, f"{module} imports {foreign}"
    desk = sorted(m for m in SOURCES if room(m) == "training.config")
    code = f"import sys, {', '.join(desk)}; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("module", sorted(set(SOURCES) - {"torch_utils.distributed"}))
def test_only_distributed_knows_ranks(module):
    text = SOURCES[module].read_text()
    assert not [name for name in RANKS[module in KNOWS_RANKS :] if name in text]  # FSDP2 has a home of its own


def test_phema_stands_alone():
    assert imports("training.phema") == set()


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_nothing_happens_at_import(module):
    """Importing reads neither the environment nor the command line, and starts no CUDA."""
    for node in at_import(ast.parse(SOURCES[module].read_text()).body):
        text = ast.unparse(node)
        assert not any(word in text for word in ("os.environ", "getenv", "sys.argv", "cuda.")), f"{module}: {text}"


@pytest.mark.parametrize(
    "text",
    [
        "import os\nif os.environ.get('X'):\n    y = 1",
        "import os\nclass A:\n    x = os.environ['X']",
        "import os\ndef f(x=os.getenv('X')): ...",
        "import os\ntry:\n    x = 1\nexcept ValueError:\n    x = os.environ['X']",
        "import torch\nwith torch.no_grad():\n    torch.cuda.init()",
        "import os\nx = [os.environ[k] for k in 'ab']",
    ],
)
def test_what_runs_at_import_is_seen(text):
    assert any(w in ast.unparse(n) for n in at_import(ast.parse(text).body) for w in ("environ", "getenv", "cuda."))


def test_import_starts_no_cuda():
    code = (
        "import torch, "
        + ", ".join(sorted(SOURCES))
        + "; assert not torch.cuda.is_initialized(); assert not torch.distributed.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_help_needs_no_torch():
    scripts = sorted(SCRIPTS)
    code = f"import sys, {', '.join(scripts)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "script", ["calculate_metrics", "generate_images", "reconstruct_phema", "toy_example", "train_edm2"]
)
def test_exports_for_python_callers(script):
    module = importlib.import_module(script)
    for name in module.__all__:
        assert hasattr(module, name)
    with pytest.raises(AttributeError):
        module.nothing_of_that_name  # noqa: B018
