"""Who may import whom, and what nobody may do: read from the source, not from a running program."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEAVES = ("cache_policies", "storage", "kernels")
PACKAGES = ("flashmoe", *LEAVES)
MAY_PRINT = {"flashmoe/cli.py", "flashmoe/terminal_chat.py"}


@cache  # parsed once for all tests; none changes a tree
def sources(package: str) -> dict[str, ast.Module]:
    """Path from the root -> syntax tree of every module below `package`."""
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package} has no modules: is this the repository's root?"
    return {f.relative_to(ROOT).as_posix(): ast.parse(f.read_text("utf-8"), str(f)) for f in files}


def imported(tree: ast.Module) -> Iterator[str]:
    """Full names of all modules that a file imports, inside functions too, and as a constant string."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, level=level):
                assert level == 0, "imports are absolute"
                yield module or ""
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__"), args=[ast.Constant(value=str(name)), *_]
            ):
                yield name


def imports_of(package: str) -> set[tuple[str, str]]:
    """(file, top-level package it imports)."""
    return {(path, name.split(".")[0]) for path, tree in sources(package).items() for name in imported(tree)}


def calls(tree: ast.Module) -> Iterator[str]:
    """Dotted names of everything a file calls."""
    return (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))


def modules_after(statement: str) -> set[str]:
    """The modules that a fresh interpreter has loaded once it has run `statement`."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_imports_neither_flashmoe_nor_another_leaf(leaf: str) -> None:
    forbidden = set(PACKAGES) - {leaf}
    assert {(path, name) for path, name in imports_of(leaf) if name in forbidden} == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_imports_tests_or_scripts(package: str) -> None:
    assert {(path, name) for path, name in imports_of(package) if name in ("tests", "scripts")} == set()


def test_flashmoe_knows_all_three_leaves() -> None:
    """Otherwise the tests above would hold for a tree in which nothing is connected."""
    assert set(LEAVES) <= {name for _, name in imports_of("flashmoe")}


@pytest.mark.parametrize(
    "leaf, forbidden",
    [("cache_policies", {"torch", "safetensors"}), ("storage", {"torch", "numpy", "safetensors"})],
)
def test_a_leaf_keeps_to_its_plain_data(leaf: str, forbidden: set[str]) -> None:
    assert {(path, name) for path, name in imports_of(leaf) if name in forbidden} == set()
    loaded = modules_after("\n".join(f"import {name}" for name in module_names(leaf)))
    assert not loaded & forbidden


def module_names(leaf: str) -> list[str]:
    return [path.removesuffix(".py").replace("/", ".") for path in sources(leaf)]


def test_policies_open_no_files() -> None:
    """Ids in, ids out."""
    opens = {(path, name) for path, tree in sources("cache_policies").items() for name in calls(tree)
             if name == "open" or name.endswith((".open", ".read_text", ".read_bytes"))}  # fmt: skip
    assert opens == set()


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_has_no_init_file_and_its_modules_are_imported_by_path(leaf: str) -> None:
    """Hugging Face ships a package called `kernels`: ours must not take its place."""
    assert not list((ROOT / leaf).rglob("__init__.py"))
    for package in (*PACKAGES, "scripts", "tests"):
        for path, tree in sources(package).items():
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    assert leaf not in {alias.name for alias in node.names}, path
                if isinstance(node, ast.ImportFrom) and node.module == leaf:
                    assert all((ROOT / leaf / f"{alias.name}.py").is_file() for alias in node.names), path


def test_flashmoe_and_the_folders_below_it_are_packages() -> None:
    folders = {(ROOT / path).parent for path in sources("flashmoe")}
    assert {folder for folder in folders if not (folder / "__init__.py").is_file()} == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_only_the_terminal_prints(package: str) -> None:
    printing = {path for path, tree in sources(package).items() if "print" in set(calls(tree))}
    assert printing <= MAY_PRINT


@pytest.mark.parametrize("package", [*PACKAGES, "scripts"])
def test_nobody_unpickles(package: str) -> None:
    """A pickle is a program; models come from strangers."""
    unpickling = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    assert {(path, name) for path, name in imports_of(package) if name in unpickling} == set()
    loading = {(path, name) for path, tree in sources(package).items() for name in calls(tree)
               if name in ("torch.load", "np.load", "numpy.load", "eval", "exec")}  # fmt: skip
    assert loading == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_no_function_rebinds_a_module_global(package: str) -> None:
    """What a function changes comes in as an argument."""
    changing = {
        path
        for path, tree in sources(package).items()
        if any(isinstance(n, ast.Global) for n in ast.walk(tree))
    }
    assert changing == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is_for(package: str) -> None:
    assert {path for path, tree in sources(package).items() if not ast.get_docstring(tree)} == set()


def test_importing_flashmoe_loads_no_torch() -> None:
    """`flashmoe --help` answers at once."""
    heavy = {
        "torch",
        "numpy",
        "transformers",
        "tokenizers",
        "jinja2",
        "huggingface_hub",
        "prompt_toolkit",
        "rich",
    }
    assert not modules_after("import flashmoe; flashmoe.__version__") & heavy
    assert "torch" in modules_after("from flashmoe import LLM")


def test_importing_the_command_line_loads_no_torch() -> None:
    assert not modules_after("import flashmoe.cli") & {"torch", "numpy", "transformers", "tokenizers"}


def test_public_names_are_all_there_and_an_unknown_one_is_an_attribute_error() -> None:
    import flashmoe

    assert all(getattr(flashmoe, name).__name__ == name for name in flashmoe.__all__)
    with pytest.raises(AttributeError, match="module 'flashmoe' has no attribute 'Nonsense'"):
        flashmoe.Nonsense  # noqa: B018
