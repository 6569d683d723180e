"""Who may import whom: the house's import rule, read from the syntax tree, imports inside functions included."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jaxlm", "torchref", "convert", "experiments")
MAY_NOT_IMPORT = {
    "jaxlm": {"torch", "transformers", "torchref", "convert", "experiments", "tests"},
    "torchref": {
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax",
        "transformers",
        "convert",
        "experiments",
        "tests",
    },
    "convert": {"experiments", "tests"},
    "experiments": {"tests"},
}
TORCHREF_MAY_IMPORT = {
    "torch",
    "numpy",
    "safetensors",
    "jaxtyping",
    "torchref",
    "jaxlm",
    *sys.stdlib_module_names,
}
# Rooms of jaxlm that hold no framework; torchref may share them, all but what is private to jaxlm.
FRAMEWORK_FREE = {
    "config",
    "adapter_config",
    "tune_config",
    "policy",
    "presets",
    "tokenizer",
    "tokenizer_base",
    "tokenizer_bytes",
    "tokenizer_metaspace",
    "tokenizer_named",
    "rope_table",
    "count",
    "shapes",
    "run_dir",
    "cli",
    "compilation",
    "json_file",
    "tensor_file",
    "checkpoint_files",
    "bad_batches",
    "trace",
    "model_dir",
    "sampling",
    "text",
    "chat",
    "chat_escape",
    "chat_masks",
    "chat_template",
    "chat_turns",
    "windows",
    "supervise",
    "disk",
    "estimate",
    "estimate_lora",
    "data.batches",
    "data.blocks",
    "data.chat_report",
    "data.chat_rows",
    "data.chat_sources",
    "data.conversations",
    "data.corpus",
    "data.example_rows",
    "data.examples",
    "data.folder",
    "data.loader",
    "data.mixture",
    "data.order",
    "data.packing",
    "data.prepare",
    "data.run_data",
    "data.schemas",
    "data.shards",
    "data.sources",
    "data.tokenise",
    "data.tune_batches",
    "data.verify",
    "data.writer",
}
SHARED_WITH_TORCHREF = {
    "config",
    "adapter_config",
    "tune_config",
    "policy",
    "presets",
    "tokenizer",
    "rope_table",
    "count",
    "disk",
    "sampling",
    "text",
    "windows",
    "checkpoint_files",
}
FRAMEWORKS = {"jax", "jaxlib", "flax", "optax", "orbax", "torch", "transformers"}
# A room imports from its own row or a row above it.
ORDER = [
    {"config", "adapter_config", "tune_config", "shapes", "json_file", "disk", "host_memory", "compilation"},
    {
        "policy",
        "presets",
        "tokenizer",
        "tokenizer_base",
        "tokenizer_bytes",
        "tokenizer_metaspace",
        "tokenizer_named",
        "rope_table",
        "count",
        "cli",
        "supervise",
        "tensor_file",
        "sampling",
        "run_dir",
    },
    {"data", "text", "chat", "chat_escape", "chat_masks", "chat_template", "chat_turns", "windows"},
    {"sharding", "distributed"},
    {"matmul", "causal_attention", "quant_host"},
    {"layers"},
    {"dispatch", "grouped_kernels", "grouped_pallas", "grouped", "token_attention"},
    {"attention", "moe"},
    {"model"},
    {
        "loss",
        "head_loss",
        "logits",
        "cached",
        "generate",
        "beam",
        "quant",
        "decode_form",
        "evaluate",
    },
    {
        "optim",
        "muon",
        "moments8",
        "guard",
        "vitals",
        "estimate",
        "estimate_lora",
        "hlo",
        "sinks",
        "reporter",
        "checkpoint",
        "checkpoint_files",
        "compile_meter",
        "metrics",
        "perplexity",
        "plots",
        "plots_parity",
        "plots_evaluation",
        "plots_ablation",
        "plots_benchmark",
        "plots_reasoning",
        "plots_run",
        "plots_axes",
        "plots_overlay",
        "live_plots",
        "curves",
        "memory",
        "metric_names",
        "wandb_sink",
        "model_dir",
    },
    {"train"},
    {"finetune.lora"},
    {
        "engine",
        "loop",
        "bad_batches",
        "trace",
        "plan",
        "variants",
        "layerwise",
        "ablation",
        "finetune.sft",
        "finetune.dpo",
        "finetune.tasks",
    },
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
# Slow to import or missing on some machines: only inside the functions that use them.
LAZY = {"grain", "tyro", "beartype"}
DRAWING = {"jaxlm.plots"} | {
    f"jaxlm.plots_{of}"
    for of in ("parity", "evaluation", "ablation", "benchmark", "reasoning", "run", "axes", "overlay")
}


class Import(NamedTuple):
    """One imported dotted name."""

    target: str
    line: int
    inside_function: bool


def imports(module: str, source: str, is_package: bool = False) -> list[Import]:
    """Every import of a source text: statements at any depth, relative ones, and import_module("literal")."""
    found: list[Import] = []

    def visit(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend(Import(alias.name, child.lineno, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parents = module.split(".")
                    keep = len(parents) - child.level + is_package
                    base = ".".join([*parents[:keep], *([base] if base else [])])
                found.extend(Import(f"{base}.{alias.name}", child.lineno, inside) for alias in child.names)
            elif isinstance(child, ast.Call) and child.args and isinstance(child.args[0], ast.Constant):
                name = ast.unparse(child.func).rpartition(".")[2]
                if name in ("import_module", "__import__"):
                    found.append(Import(str(child.args[0].value), child.lineno, inside))
            deeper = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            visit(child, inside or deeper)

    visit(ast.parse(source), False)
    return found


def room(dotted: str) -> str:
    """`jaxlm.data.loader.make` -> `data`, `jaxlm.finetune.lora.merge` -> `finetune.lora`, `jaxlm` -> ''."""
    parts = dotted.split(".")[1:]
    return ".".join(parts[:2]) if parts[:1] == ["finetune"] else ".".join(parts[:1])


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What a module's imports break, one line each."""
    package = module.partition(".")[0]
    broken: list[str] = []
    for target, line, inside in imports(module, source, is_package):
        root = target.partition(".")[0]
        where = f"{module}:{line} imports {target}: "
        if root in MAY_NOT_IMPORT[package]:
            broken.append(where + f"{package} never imports {root}")
        entry_point = package == "experiments" or module.endswith("__main__")
        if root in LAZY and not inside and not entry_point:
            broken.append(where + f"{root} is imported inside the functions that use it")
        if root == "matplotlib" and module not in DRAWING:
            broken.append(where + "only jaxlm.plots and jaxlm.plots_* draw")
        if package == "torchref" and root not in TORCHREF_MAY_IMPORT:
            broken.append(where + "torchref imports torch, numpy and safetensors only")
        if package == "torchref" and root == "jaxlm" and room(target) not in SHARED_WITH_TORCHREF:
            broken.append(where + f"torchref shares only {', '.join(sorted(SHARED_WITH_TORCHREF))}")
        if package == "jaxlm" and _in(module, FRAMEWORK_FREE) and root in FRAMEWORKS:
            broken.append(where + "this room is free of frameworks")
        if package == "jaxlm" and root == "jaxlm":
            broken.extend(where + reason for reason in _against_order(module, target))
    return broken


def _in(module: str, rooms: set[str]) -> bool:
    inner = module.partition(".")[2]
    return inner in rooms or room(module) in rooms


def _against_order(module: str, target: str) -> list[str]:
    here, there = room(module), room(target)
    if not here or here == "finetune":
        return ["the package's docstring imports nothing"]
    unknown = [name for name in (here, there) if name not in RANK]
    if unknown:
        return [f"room {name!r} has no place in ORDER of this test" for name in unknown]
    return [f"{here} stands below {there}"] if RANK[there] > RANK[here] else []


def sources() -> dict[str, tuple[str, bool]]:
    """Dotted module name -> its text and whether it is a package's __init__."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            found[".".join(parts[:-1] if is_package else parts)] = (
                path.read_text(encoding="utf-8"),
                is_package,
            )
    return found


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Some circle of modules that import each other, or []."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for following in sorted(graph.get(node, ())):
            if circle := walk(following, [*path, node]):
                return circle
        done.add(node)
        return []

    return next((circle for node in sorted(graph) if (circle := walk(node, []))), [])


def import_graph(modules: dict[str, tuple[str, bool]]) -> dict[str, set[str]]:
    """Module -> the modules of this project that it imports, inside functions too."""
    graph: dict[str, set[str]] = {}
    for module, (source, is_package) in modules.items():
        targets = [found.target for found in imports(module, source, is_package)]
        known = [t if t in modules else t.rpartition(".")[0] for t in targets]
        graph[module] = {t for t in known if t in modules and t != module}
    return graph


def test_imports_follow_the_rule() -> None:
    """No module of the four packages imports what its room may not."""
    modules = sources()
    assert "jaxlm.config" in modules
    broken = [
        line for module, (source, package) in modules.items() for line in violations(module, source, package)
    ]
    assert not broken, "\n".join(broken)


def test_no_modules_import_in_a_circle() -> None:
    """The import graph has no cycle, not even one hidden inside functions."""
    assert cycle(import_graph(sources())) == []


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        pytest.param("jaxlm.model", "import torch", "never imports torch", id="torch-in-jaxlm"),
        pytest.param(
            "jaxlm.model", "def f():\n    from torch import nn", "never imports torch", id="in-a-function"
        ),
        pytest.param(
            "jaxlm.model", "import importlib\nimportlib.import_module('torch')", "never imports", id="by-name"
        ),
        pytest.param(
            "jaxlm.loss", "from convert import tree", "never imports convert", id="convert-in-jaxlm"
        ),
        pytest.param(
            "jaxlm.layers", "from jaxlm.model import Decoder", "layers stands below model", id="upwards"
        ),
        pytest.param(
            "jaxlm.layers", "from jaxlm import train", "layers stands below train", id="upwards-as-name"
        ),
        pytest.param(
            "jaxlm.layers", "from . import train", "layers stands below train", id="upwards-relative"
        ),
        pytest.param(
            "jaxlm.finetune.lora", "from jaxlm.finetune import dpo", "stands below", id="lora-above-dpo"
        ),
        pytest.param(
            "jaxlm.novel", "from jaxlm import config", "no place in ORDER", id="room-without-a-place"
        ),
        pytest.param("jaxlm.presets", "import jax.numpy as jnp", "free of frameworks", id="jax-in-presets"),
        pytest.param("jaxlm.data.loader", "import grain", "inside the functions", id="grain-at-import"),
        pytest.param("jaxlm.metrics", "import matplotlib.pyplot", "only jaxlm.plots", id="matplotlib"),
        pytest.param("torchref.model", "import jax", "never imports jax", id="jax-in-torchref"),
        pytest.param(
            "torchref.model", "from jaxlm.layers import RMSNorm", "shares only", id="shared-numerics"
        ),
        pytest.param("torchref.model", "import jaxlm.layers", "shares only", id="shared-numerics-as-module"),
        pytest.param(
            "torchref.model", "import einops", "torch, numpy and safetensors", id="einops-in-torchref"
        ),
        pytest.param(
            "convert.tree", "import experiments.pretrain", "never imports experiments", id="entry-point"
        ),
        pytest.param("experiments.pretrain", "from tests import helpers", "never imports tests", id="tests"),
    ],
)
def test_planted_import_is_caught(module: str, source: str, reason: str) -> None:
    """The checker goes red on each kind of forbidden import."""
    assert any(reason in line for line in violations(module, source)), violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        pytest.param("jaxlm.train", "import optax\nfrom jaxlm.loss import total_loss", id="downwards"),
        pytest.param("jaxlm.data.loader", "def f():\n    import grain", id="lazy-grain"),
        pytest.param("jaxlm.plots", "import matplotlib", id="plots"),
        pytest.param("jaxlm.plots_parity", "import matplotlib", id="plots-of-parity"),
        pytest.param(
            "torchref.model", "import math\nimport torch\nfrom jaxlm.config import ModelConfig", id="torchref"
        ),
        pytest.param("convert.tree", "import jax\nimport torch\nimport jaxlm.model", id="bridge"),
        pytest.param("experiments.cli", "import tyro", id="entry-point"),
    ],
)
def test_allowed_import_passes(module: str, source: str) -> None:
    """The checker raises no false alarm."""
    assert violations(module, source) == []


def test_planted_circle_is_found() -> None:
    """Two modules that import each other, one of them inside a function, are a circle."""
    modules = {
        "jaxlm.a": ("from jaxlm.b import x", False),
        "jaxlm.b": ("def f():\n    from jaxlm import a", False),
    }
    assert cycle(import_graph(modules)) == ["jaxlm.a", "jaxlm.b", "jaxlm.a"]


@pytest.mark.parametrize("package", ["jaxlm", "torchref", "convert", "experiments"])
def test_package_init_imports_nothing(package: str) -> None:
    """`import jaxlm` costs nothing: a package's __init__ is a docstring."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


def loaded(module: str, frameworks: set[str]) -> set[str]:
    """Which frameworks importing a module loads in a fresh interpreter."""
    script = f"import sys, {module}; print(*{frameworks} & sys.modules.keys())"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "module", ["torchref.model", "torchref.train", "torchref.generate", "torchref.engine"]
)
def test_reference_runs_without_jax(module: str) -> None:
    """Importing the PyTorch column loads no jax, whatever its libraries do."""
    pytest.importorskip("torch")
    assert loaded(module, {"jax", "flax", "torch"}) == {"torch"}


@pytest.mark.parametrize("module", sorted(SHARED_WITH_TORCHREF))
def test_shared_rooms_load_no_framework(module: str) -> None:
    """What both columns share loads neither jax nor torch."""
    assert loaded(f"jaxlm.{module}", {"jax", "torch"}) == set()
