"""The shape of the distribution: which module may import which, what an import costs, what is public."""

from __future__ import annotations

import ast
import copy
import importlib.metadata
import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import implicit
import smoothops as so

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (so, implicit)

# Each module imports from its own row or from rows above it; within a row there is no cycle.
LAYERS = {
    "smoothops": (
        ("_axes", "_blend", "_opaque", "_reduction", "solvers", "kernels", "kernels.*"),
        ("smoothing",),
        ("_regularizer",),
        ("regularizers",),
        ("polytopes._traced",),
        ("polytopes._dual", "polytopes._mixing", "polytopes._fused"),
        ("polytopes", "polytopes.*"),
        ("relaxations", "noises", "sorting_network", "stochastic", "lapsum", "soft_permutation"),
        ("operators", "operators.*", "elementwise", "envelopes", "dynamic_programming"),
        ("comparisons", "logic", "selection"),
        ("control", "control.*"),
        ("soften", "soften.*"),
        (
            "softened",
            "_soft_values",
            "_soft_boolean",
            "_soft_choices",
            "_soft_integer",
            "_soft_reading",
            "_soft_masks",
            "_composites",
            "_replaced",
        ),
        ("fenchel_young", "metrics", "metrics.*"),
        ("losses", "losses.*"),
        ("nn", "nn.*"),
    ),
    "implicit": (
        ("operator", "_pytree"),
        ("_closure", "_solve", "krylov"),
        ("linear",),
        ("_jacobian",),
        ("adjoint",),
        ("_loop", "iterate", "conditions", "report"),
        ("root", "fixed_point", "minimize"),
        (
            "_qp_status",
            "_qp_dual",
            "_qp_native",
            "_qp_native_kkt",
            "_qp_singular",
            "_qp_solve",
            "_qp_kkt",
            "_qp_report",
            "_qp_batch",
        ),
        (
            "_program_cones",
            "_program_solvers",
            "_program_form",
            "_program_dpp",
            "_program_factors",
            "_program_solve",
        ),
        ("qp", "program", "bilevel", "equilibrium"),
    ),
}
# smoothops may use implicit from here only, and only inside a function
USERS_OF_IMPLICIT = {"polytopes.transport", "polytopes.program", "polytopes.generic"}

SMOOTHINGS = {
    "Hard": so.Hard(),
    "StraightThrough": so.StraightThrough(so.Entropy(0.5)),
    "Quadratic": so.Quadratic(0.5),
    "Quadratic, tensor": so.Quadratic(torch.tensor(0.5)),
    "Quadratic, mixing": so.Quadratic(so.Mixing(2.0)),
    "Entropy": so.Entropy(0.5),
    "Tsallis": so.Tsallis(1.5, 0.5),
    "BinaryEntropy": so.BinaryEntropy(0.5),
    "Laplace": so.Laplace(0.5),
    "SoftSort": so.SoftSort(0.5),
    "NeuralSort": so.NeuralSort(torch.tensor(0.5)),
    "SortingNetwork": so.SortingNetwork(0.5, so.Logistic(), so.OddEven()),
    "Perturbed": so.Perturbed(0.5, so.Gumbel(), 10),
}


def sources(package: str) -> dict[str, Path]:
    """Module name within the package ("" for the package itself) -> file."""
    folder = ROOT / package
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(package: str, module: str, path: Path) -> list[tuple[str, bool]]:
    """(absolute name, at top level) of everything that a module imports, ``if TYPE_CHECKING`` aside."""
    tree = ast.parse(path.read_text())
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for inner in ast.walk(node)
    }
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    here = [package, *module.split(".")] if module else [package]
    if path.name != "__init__.py":
        here = here[:-1]
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        found += [(name, id(node) not in lazy) for name in names]
    return found


def edges(package: str) -> list[tuple[str, str, bool]]:
    """(importer, imported, at top level) within one package."""
    known = sources(package)
    found = []
    for module, path in known.items():
        for name, top in imports(package, module, path):
            parts = name.split(".")
            if parts[0] != package:
                continue
            target = ".".join(parts[1:])
            while target and target not in known:  # from .regularizers import Entropy
                target = target.rpartition(".")[0]
            if target != module:
                found.append((module, target, top))
    return found


def layer(package: str, module: str) -> int:
    for wildcard in (False, True):
        for number, row in enumerate(LAYERS[package]):
            if module in row or (wildcard and any(e.endswith(".*") and module.startswith(e[:-1]) for e in row)):
                return number
    pytest.fail(f"{package}/{module} has no layer: add it to LAYERS, below everything that it imports")


@pytest.mark.parametrize("package", LAYERS)
def test_imports_point_one_way(package: str) -> None:
    for importer, imported, _ in edges(package):
        if importer == "":  # the table of contents
            continue
        assert imported != "", f"{package}.{importer} imports from the package itself; name the module"
        assert layer(package, importer) >= layer(package, imported), f"{importer} imports {imported}"


@pytest.mark.parametrize("package", LAYERS)
def test_every_module_has_a_layer(package: str) -> None:
    for module in sources(package):
        if module:
            layer(package, module)


@pytest.mark.parametrize("package", LAYERS)
def test_no_import_cycle(package: str) -> None:
    graph: dict[str, set[str]] = {module: set() for module in sources(package)}
    for importer, imported, top in edges(package):
        # a package loads its own modules, and those may name it: that is not a cycle
        if top and not importer.startswith(f"{imported}."):
            graph[importer].add(imported)
    while graph:
        free = {module for module, needs in graph.items() if not needs & graph.keys()}
        assert free, f"modules that import each other: {graph}"
        graph = {module: needs for module, needs in graph.items() if module not in free}


def test_the_two_packages() -> None:
    for module, path in sources("implicit").items():
        for name, _ in imports("implicit", module, path):
            assert name.split(".")[0] != "smoothops", f"implicit.{module} imports {name}"
    for module, path in sources("smoothops").items():
        for name, top in imports("smoothops", module, path):
            if name.split(".")[0] == "implicit":
                assert module in USERS_OF_IMPLICIT, f"smoothops.{module} imports {name}"
                assert not top, f"smoothops.{module} imports {name} at its top, which costs every user"


def fresh(code: str) -> Any:
    """What a new process prints, as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


HEAVY = {"numba", "llvmlite", "scipy", "cvxpy", "cvxpylayers", "matplotlib", "sklearn", "pandas", "sympy"}


def test_import_loads_nothing_heavy() -> None:
    new = fresh(
        "import sys, json, torch; before = set(sys.modules)\n"
        "import smoothops, implicit; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    roots = {name.split(".")[0] for name in new}
    assert "smoothops" in roots
    assert not roots & HEAVY
    compiler = [name for name in new if name.startswith(("torch._dynamo", "torch._inductor", "torch.fx.experimental"))]
    assert not compiler
    assert not [name for name in new if name.startswith("smoothops.kernels.c")]


def test_first_use_loads_only_what_it_needs() -> None:
    choice, order = fresh(
        "import sys, json, torch, smoothops as so; before = set(sys.modules)\n"
        "x = torch.tensor([3.0, 1.0, 2.0], requires_grad=True)\n"
        "so.argmax(x).prod().backward(); so.amax(x).backward(); choice = set(sys.modules)\n"
        "so.rank(x).prod().backward(); so.sort(x).prod().backward(); order = set(sys.modules)\n"
        "print(json.dumps([sorted(choice - before), sorted(order - before)]))"
    )
    assert not {name.split(".")[0] for name in choice} & HEAVY
    assert not {name.split(".")[0] for name in order} & (HEAVY - {"numba", "llvmlite", "scipy"})
    for name in choice + order:
        assert not name.startswith(("torch._dynamo", "torch._inductor")), name


@pytest.mark.parametrize("package", LAYERS)
def test_files_are_short(package: str) -> None:
    for path in sources(package).values():
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines; is there a second concept inside?"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
def test_table_of_contents(package: ModuleType) -> None:
    names = package.__all__
    assert len(names) == len(set(names))
    for name in names:
        assert not name.startswith("_")
        getattr(package, name)
    hidden = {n for n, v in vars(package).items() if not n.startswith("_") and not isinstance(v, ModuleType)}
    assert hidden <= set(names), f"importable but not listed: {hidden - set(names)}"


def test_every_smoothing_is_listed_here() -> None:
    concrete = {
        n
        for n in so.__all__
        if isinstance(getattr(so, n), type)
        and issubclass(getattr(so, n), so.Smoothing)
        and getattr(so, n) not in (so.Smoothing, so.Regularizer)
    }
    assert concrete == {type(s).__name__ for s in SMOOTHINGS.values()}


@pytest.mark.parametrize("name", SMOOTHINGS)
@pytest.mark.parametrize("duplicate", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy, copy.copy])
def test_smoothings_can_be_copied(name: str, duplicate: Any) -> None:
    smoothing = SMOOTHINGS[name]
    twin = duplicate(smoothing)
    assert type(twin) is type(smoothing)
    assert repr(twin) == repr(smoothing)
    x = torch.tensor([1.0, 0.3, -0.2, 0.8])
    operator = (
        so.sort if name in ("SoftSort", "NeuralSort", "SortingNetwork") else lambda x, **k: so.topk_mask(x, 2, **k)
    )
    answers = []
    for one in (smoothing, twin):
        torch.manual_seed(0)
        answers.append(operator(x, smoothing=one))
    assert torch.equal(*answers)


@pytest.mark.parametrize("name", SMOOTHINGS)
def test_smoothings_are_frozen_and_hashable(name: str) -> None:
    smoothing = SMOOTHINGS[name]
    assert hash(smoothing) == hash(smoothing)
    assert smoothing != copy.deepcopy(smoothing)  # by identity: a tensor eps has no truth value
    with pytest.raises(AttributeError):
        smoothing.anything = 1  # type: ignore[attr-defined]


def test_version() -> None:
    assert importlib.metadata.version("smoothops") == so.__version__
    assert f"## {so.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_typed() -> None:
    for package in PACKAGES:
        assert (Path(package.__file__ or "").parent / "py.typed").exists()


def test_top_level() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    allowed = {"pyproject.toml", "README.md", "Makefile", "constraints.txt", "LICENSE", "CHANGELOG.md"}
    allowed |= {"smoothops", "implicit", "tests", "examples", "docs"}
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= allowed
