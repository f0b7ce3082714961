"""Who may import whom: read from the source, so that a shortcut fails here and not in a review."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAPPED = {
    "kernels": "prophetkv_rag.kernels",
    "integrations": "prophetkv_rag.integrations",
    "prophetkv_rag": "prophetkv_rag",
}
FRAMEWORKS = ("llama_index", "langchain", "langchain_core", "langchain_chroma", "langchain_classic")
OUTER = ("prophetkv_rag.integrations", "prophetkv_rag.cli", "prophetkv_rag.server", "prophetkv_rag.evaluation")
"""What stands on the engine; everything else is the core."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join((MAPPED[parts[0]], *parts[1:]))
    return name.removesuffix(".__init__")


MODULES = {name_of(path): path for folder in MAPPED for path in sorted((ROOT / folder).rglob("*.py"))}
CORE = [name for name in MODULES if not name.startswith((*OUTER, "prophetkv_rag.kernels"))]


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def imports(module: str, *, run_time_only: bool = False) -> set[str]:
    """Full names of what a module imports, also inside functions; for `from a import b` both `a` and `a.b`."""
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    found: set[str] = set()
    for node in _nodes(tree, skip_type_checking=run_time_only):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            assert node.module is not None
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def _nodes(tree: ast.AST, *, skip_type_checking: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if skip_type_checking and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _nodes(node, skip_type_checking=skip_type_checking)


def offenders(modules: list[str], *packages: str, run_time_only: bool = False) -> list[str]:
    """Each `module -> import` that reaches into one of the packages."""
    return [
        f"{module} -> {name}"
        for module in modules
        for name in sorted(imports(module, run_time_only=run_time_only))
        if any(is_inside(name, package) for package in packages)
    ]


def test_the_rules_see_every_module() -> None:
    assert "prophetkv_rag.engine" in CORE
    assert "prophetkv_rag.kernels" in MODULES
    assert "prophetkv_rag.integrations.llama_index.llm" in MODULES
    assert "prophetkv_rag.cli.app" not in CORE


def test_kernels_import_nothing_of_ours() -> None:
    kernels = [name for name in MODULES if is_inside(name, "prophetkv_rag.kernels")]
    found = offenders(kernels, "prophetkv_rag")
    assert [line for line in found if "-> prophetkv_rag.kernels" not in line] == []
    assert offenders(kernels, "transformers", "chromadb", *FRAMEWORKS) == []


@pytest.mark.parametrize("folder", ["kernels", "integrations"])
def test_mapped_folders_have_a_docstring_only(folder: str) -> None:
    """transformers finds a top-level `kernels` by accident, so importing ours must do nothing."""
    body = ast.parse((ROOT / folder / "__init__.py").read_text("utf-8")).body
    assert [type(node) for node in body] == [ast.Expr]


def test_the_core_knows_nothing_of_what_stands_on_it() -> None:
    assert offenders(CORE, *OUTER) == []


def test_no_framework_outside_integrations_and_programs() -> None:
    assert offenders(CORE, *FRAMEWORKS) == []


def test_only_the_chroma_modules_import_chromadb() -> None:
    allowed = [name for name in CORE if name.rpartition(".")[2].startswith("chroma")]
    assert offenders([name for name in CORE if name not in allowed], "chromadb") == []


def test_integrations_hold_no_tensor_code() -> None:
    modules = [name for name in MODULES if is_inside(name, "prophetkv_rag.integrations")]
    assert offenders(modules, "torch", "transformers", "triton", "numpy") == []


def test_frameworks_do_not_know_each_other() -> None:
    llama_index = [name for name in MODULES if is_inside(name, "prophetkv_rag.integrations.llama_index")]
    langchain = [name for name in MODULES if is_inside(name, "prophetkv_rag.integrations.langchain")]
    assert offenders(llama_index, "prophetkv_rag.integrations.langchain", *FRAMEWORKS[1:]) == []
    assert offenders(langchain, "prophetkv_rag.integrations.llama_index", "llama_index") == []


def test_only_the_outer_ring_needs_the_engine() -> None:
    others = [name for name in CORE if name not in ("prophetkv_rag", "prophetkv_rag.engine")]
    assert offenders(others, "prophetkv_rag.engine", run_time_only=True) == []


def test_stores_stand_on_the_chunk_cache_alone() -> None:
    stores = [name for name in MODULES if is_inside(name, "prophetkv_rag.store")]
    allowed = ("prophetkv_rag.store", "prophetkv_rag.chunk_cache", "prophetkv_rag.packed_cache", "prophetkv_rag.errors")
    found = offenders(stores, "prophetkv_rag")
    assert [line for line in found if not line.partition("-> ")[2].startswith(allowed)] == []


def test_no_import_cycle() -> None:
    graph = {
        name: {target for target in imports(name, run_time_only=True) if target in MODULES and target != name}
        for name in MODULES
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import cycle: {' -> '.join((*path, name))}"
        if name not in done:
            for target in sorted(graph[name]):
                # A package's __init__ runs before its own modules anyway.
                if not is_inside(name, target):
                    visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("module", ["prophetkv_rag", "prophetkv_rag.cli.app", "prophetkv_rag.integrations"])
def test_importing_is_cheap(module: str, tmp_path: Path) -> None:
    """No torch, no transformers, no database, no framework: `import prophetkv_rag` and `--help` answer at once."""
    heavy = ("torch", "transformers", "chromadb", "numpy", "triton", "safetensors", *FRAMEWORKS)
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.strip() == "[]"


def test_modules_stay_short() -> None:
    """One concept a file; 300 lines is the hard stop."""
    lengths = {name: len(path.read_text("utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: length for name, length in lengths.items() if length > 300} == {}
