"""Who may import whom: read from the source, so that a shortcut fails here and not in a review."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_public_api import PUBLIC

ROOT = Path(__file__).resolve().parents[1]
MAPPED = {
    "kernels": "prophetkv_rag.kernels",
    "integrations": "prophetkv_rag.integrations",
    "prophetkv_rag": "prophetkv_rag",
}
FRAMEWORKS = ("llama_index", "langchain", "langchain_core", "langchain_chroma", "langchain_classic")

MAY_IMPORT = {
    # Every package along the data path, the lowest first, and those it may import, which all stand above it.
    "lazy": "",
    "once": "",
    "errors": "",
    "text": "errors",
    "extras": "errors",
    "forks": "",
    "home": "errors",
    "waiting": "",
    "kernels": "once",
    "config": "errors",
    "report": "once",
    "model": "errors extras forks kernels",
    "generation": "errors extras forks report model",
    "defaults": "errors text extras forks home model",
    "store": "once errors forks kernels",
    "store.encryption": "errors extras",
    "store.blobs": "errors store store.encryption",
    "store.catalog": "errors forks store",
    "store.remote": "errors extras forks store store.encryption store.catalog",
    "store.disk": "errors forks store store.encryption store.blobs store.catalog store.remote",
    "prompt": "once errors text forks config store",
    "chunks": "errors text forks config report model store prompt",
    "conversations": "errors forks model store prompt",
    "tools": "errors generation prompt",
    "reuse": "errors config report model generation store prompt chunks conversations",
    "profile": "errors config store",
    "engine": "waiting config model generation store prompt chunks conversations reuse profile",
    "vector_stores": "errors forks store chunks",
    "chroma": "errors text forks store store.disk vector_stores",
    "prophetkv_rag": "lazy errors waiting config report generation prompt reuse engine",
    "distributed": "lazy errors text extras config model defaults store store.encryption store.remote store.disk "
    "engine",
    "evaluation": "lazy once errors extras kernels config model defaults store store.blobs store.catalog store.disk "
    "prompt reuse profile engine",
    "server": "lazy errors text extras report generation store prompt conversations tools",
    "integrations.shared": "errors forks engine vector_stores",
    "integrations.llama_index": "once errors extras forks config report generation defaults store prompt tools engine "
    "vector_stores chroma integrations.shared",
    "integrations.langchain": "lazy errors text extras config report generation defaults store prompt tools engine "
    "vector_stores "
    "chroma integrations.shared",
    "integrations.vllm": "once errors extras kernels config report model generation store store.blobs store.disk "
    "prompt chunks reuse",
    "cli": "errors text extras home kernels config profile report model defaults store store.encryption store.blobs "
    "store.catalog "
    "store.remote store.disk prompt chunks reuse engine chroma distributed evaluation server integrations.llama_index "
    "integrations.vllm",
}
CORE = list(MAY_IMPORT)[: list(MAY_IMPORT).index("prophetkv_rag") + 1]
"""What knows no framework: everything below the programs and integrations."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join((MAPPED[parts[0]], *parts[1:])).removesuffix(".__init__")


MODULES = {name_of(path): path for folder in MAPPED for path in sorted((ROOT / folder).rglob("*.py"))}
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def package_of(module: str) -> str:
    """The line of the table that a module belongs to: the longest that its name begins with."""
    own = module.removeprefix("prophetkv_rag.")
    found = [package for package in MAY_IMPORT if is_inside(own, package)]
    assert found or module in PACKAGES, f"{module} belongs to no line of the table"
    return max(found, key=len, default="")


def imports(module: str) -> Iterator[tuple[str, str | None]]:
    """(Module, name taken from it) of everything a module imports: inside functions and under TYPE_CHECKING as well."""
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full, None) if full in MODULES else (node.module, alias.name)


def inner_imports() -> Iterator[tuple[str, str, str | None]]:
    """(Importing module, module of ours, name taken from it)."""
    for module in MODULES:
        for target, name in imports(module):
            if target in MODULES and target != module:
                yield module, target, name


def offenders(modules: list[str], *packages: str) -> list[str]:
    """Each `module -> import` that reaches into one of the packages."""
    return [
        f"{module} -> {target}"
        for module in modules
        for target, name in imports(module)
        if any(is_inside(target, package) for package in packages)
    ]


def modules_of(*packages: str) -> list[str]:
    return [name for name in MODULES if package_of(name) in packages]


def test_the_rules_see_every_module() -> None:
    for name in ("engine", "kernels.ops", "integrations.llama_index.llm", "store.disk.store", "reuse.selection.epic"):
        assert f"prophetkv_rag.{name}" in MODULES
    assert package_of("prophetkv_rag.store.disk.store") == "store.disk"
    assert package_of("prophetkv_rag.store.memory") == "store"
    assert {package_of(name) for name in MODULES} - {""} == set(MAY_IMPORT)


def test_imports_run_down_the_table() -> None:
    lines = list(MAY_IMPORT)
    for package, allowed in MAY_IMPORT.items():
        assert [name for name in allowed.split() if name not in lines[: lines.index(package)]] == [], package


def test_packages_import_what_the_table_says_and_nothing_else() -> None:
    found: dict[str, set[str]] = {package: set() for package in MAY_IMPORT}
    for module, target, _ in inner_imports():
        if package_of(module) != package_of(target):
            found[package_of(module)].add(package_of(target))
    assert {package: sorted(names) for package, names in found.items()} == {
        package: sorted(allowed.split()) for package, allowed in MAY_IMPORT.items()
    }


def handed_on(package: str) -> list[str]:
    for node in ast.parse(MODULES[package].read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def test_packages_take_only_what_is_handed_on() -> None:
    """From another package: names in the `__all__` of a folder, or of the one module that is a package by itself."""
    taken = []
    for module, target, name in inner_imports():
        package = package_of(target)
        if package_of(module) == package:
            continue
        is_module_by_itself = target == f"prophetkv_rag.{package}" and target not in PACKAGES
        parent, _, last = target.rpartition(".")
        names = handed_on(target) if target in PACKAGES else handed_on(parent)
        is_handed_on = (name if target in PACKAGES else last) in names
        # The folder `kernels` must hand on nothing by itself (below); `ops` is its face.
        is_the_kernels_face = target == "prophetkv_rag.kernels.ops"
        if not (is_module_by_itself or is_handed_on or is_the_kernels_face):
            taken.append(f"{module} -> {target}: {name}")
    assert taken == []


def test_nothing_is_handed_on_in_vain() -> None:
    """What a package hands on is taken by another one, by a program of ours, or is public."""
    programs = [path for folder in ("benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    taken = {(target, name) for module, target, name in inner_imports() if package_of(module) != package_of(target)}
    taken |= {(target.rpartition(".")[0], target.rpartition(".")[2]) for target, name in taken if name is None}
    for path in programs:
        taken |= {
            (node.module, alias.name)
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
    vain = {
        f"{package}.{name}"
        for package in {f"prophetkv_rag.{line}" for line in MAY_IMPORT} & PACKAGES - PUBLIC.keys()
        for name in handed_on(package)
        if (package, name) not in taken
    }
    assert vain == set()


def test_no_import_cycle() -> None:
    """No two files need each other, be it for a type or inside a function."""
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for module, target, _ in inner_imports():
        graph[module].add(target)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import cycle: {' -> '.join((*path, name))}"
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("package", sorted(PACKAGES - {"prophetkv_rag"}))
def test_every_package_says_what_it_is_for(package: str) -> None:
    tree = ast.parse(MODULES[package].read_text("utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body:
        assert not isinstance(node, ast.ClassDef), "a package's __init__ hands on, it defines nothing"


@pytest.mark.parametrize("folder", ["kernels", "integrations"])
def test_mapped_folders_have_a_docstring_only(folder: str) -> None:
    """transformers finds a top-level `kernels` by accident, so importing ours must do nothing."""
    body = ast.parse((ROOT / folder / "__init__.py").read_text("utf-8")).body
    assert [type(node) for node in body] == [ast.Expr]


def test_no_framework_outside_integrations_and_programs() -> None:
    assert offenders(modules_of(*CORE), *FRAMEWORKS) == []


def test_only_one_package_imports_vllm() -> None:
    assert offenders([name for name in MODULES if package_of(name) != "integrations.vllm"], "vllm") == []


def test_only_one_package_imports_ray() -> None:
    """But for the look whether it is there, before anything is fetched."""
    others = [name for name in MODULES if package_of(name) != "distributed"]
    assert offenders(others, "ray") == ["prophetkv_rag.cli.on_ray -> ray"]


def test_only_one_package_imports_chromadb() -> None:
    assert offenders(modules_of(*(name for name in CORE if name != "chroma")), "chromadb") == []


def test_kernels_know_tensors_only() -> None:
    assert offenders(modules_of("kernels"), "transformers", "chromadb", *FRAMEWORKS) == []


def test_integrations_hold_no_tensor_code() -> None:
    """But vLLM's, which is no framework above the engine: it runs our stages on another one's model."""
    frameworks = [name for name in MODULES if is_inside(name, "prophetkv_rag.integrations")]
    modules = [name for name in frameworks if package_of(name) != "integrations.vllm"]
    assert offenders(modules, "torch", "transformers", "triton", "numpy") == []


def test_frameworks_do_not_know_each_other() -> None:
    assert offenders(modules_of("integrations.llama_index"), *FRAMEWORKS[1:]) == []
    assert offenders(modules_of("integrations.langchain"), "llama_index") == []


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


def test_tests_mirror_the_tree() -> None:
    """Every folder of tests is a folder of what it tests."""
    known = {
        "examples",
        "kernels",
        "integrations",
        "vllm",
    }  # vLLM has an environment of its own, without the frameworks
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    strays = [
        str(folder)
        for folder in folders
        if folder.parts and folder.parts[0] not in known and not (ROOT / "prophetkv_rag" / folder).is_dir()
    ]
    assert [stray for stray in strays if not stray.endswith("naive")] == []
