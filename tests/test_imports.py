"""Imports go one way, and the folders shadow nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP_FOLDERS = ("common", "compression", "server", "client", "simulations", "cli")

# What each component may import besides itself: everything in the layers before its own.
LAYERS = (
    {"common"},
    {"compression.codec"},
    {"compression.versions", "compression.schemes"},
    {"compression.pruning", "compression.release", "compression.flower"},
    {"compression.files"},
    {"compression.onnx"},
    {"client.training", "client.edge", "server.fleet"},
    {"server.repository"},  # asks its fleets what they stand on
    {"client", "server.federation"},
    {"server.control"},
    {"server"},
    {"simulations"},
    {"cli"},
)
LAYER = {component: depth for depth, layer in enumerate(LAYERS) for component in layer}

PURE = ("compression.codec", "compression.schemes", "compression.versions")
FLOWER = {
    *("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"),
    "flwr.simulation",
}
NEVER_ON_A_DEVICE = {"torch", "flwr", "ray", "onnx", "onnxscript", "mlxtend", "matplotlib"}


def component_of(module: str) -> str:
    """Component of a module path below `prunecast`; common, simulations and cli are one each."""
    first, *rest = module.removesuffix(".__init__").split(".")
    return first if first in ("common", "simulations", "cli") else ".".join([first, *rest[:1]])


def sources() -> list[Path]:
    return [path for folder in TOP_FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything a file imports, at any depth of the code."""
    package = ["prunecast", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, module
            for alias in node.names:  # `from prunecast.compression import codec`
                yield node.lineno, f"{module}.{alias.name}"


def names_flowers_insides(name: str) -> bool:
    """Whether an imported name of Flower is not one that its documentation shows."""
    package, _, attribute = name.rpartition(".")
    return name.split(".")[0] == "flwr" and not (
        name in FLOWER or (package in FLOWER and attribute[:1].isalpha())
    )


def own_imports(path: Path) -> Iterator[tuple[int, str]]:
    for line, name in imports(path):
        if name.startswith("prunecast."):
            component = component_of(name.removeprefix("prunecast."))
            if component in LAYER:
                yield line, component


def identity(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources(), ids=identity)
def test_imports_go_one_way(path: Path) -> None:
    mine = component_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for line, theirs in own_imports(path):
        assert theirs == mine or LAYER[theirs] < LAYER[mine], (
            f"{identity(path)}:{line} imports {theirs}, which is not below {mine}"
        )


@pytest.mark.parametrize(
    "path", [p for p in sources() if p != ROOT / "compression/flower/internals.py"], ids=identity
)
def test_one_module_touches_the_insides_of_flower(path: Path) -> None:
    for line, name in imports(path):
        assert not names_flowers_insides(name), f"{identity(path)}:{line} imports {name}"
    for inside in ("metadata.__dict__", ".deflate(", "get_all_nested_objects"):
        assert inside not in path.read_text(encoding="utf-8"), f"{identity(path)}: {inside}"


@pytest.mark.parametrize(("mine", "theirs"), [("client", "server"), ("server", "client")])
def test_client_and_server_never_import_each_other(mine: str, theirs: str) -> None:
    for path in sorted((ROOT / mine).rglob("*.py")):
        for line, component in own_imports(path):
            assert component.split(".")[0] != theirs, f"{identity(path)}:{line}: {component}"


@pytest.mark.parametrize("component", PURE)
def test_core_needs_numpy_and_the_standard_library_only(component: str) -> None:
    for path in sorted((ROOT / component.replace(".", "/")).rglob("*.py")):
        for line, name in imports(path):
            top = name.split(".")[0]
            allowed = top in sys.stdlib_module_names or top in ("numpy", "prunecast")
            assert allowed, f"{identity(path)}:{line} imports {name}"


def test_edge_agent_names_no_training_library() -> None:
    for path in sorted((ROOT / "client/edge").rglob("*.py")):
        for line, name in imports(path):
            assert name.split(".")[0] not in NEVER_ON_A_DEVICE, f"{identity(path)}:{line}: {name}"
        assert {component for _, component in own_imports(path)} <= {
            "client.edge",
            "common",
            "compression.codec",
            "compression.versions",
            "compression.release",
        }


@pytest.mark.parametrize(
    "package",
    [
        *("compression.codec", "compression.schemes", "compression.versions"),
        *("compression.files", "compression.release", "client.edge", "cli"),
    ],
)
def test_imports_where_training_libraries_are_not_installed(package: str) -> None:
    """Every module of a package, in an interpreter that refuses to import them."""
    modules = [
        ".".join(["prunecast", *path.relative_to(ROOT).with_suffix("").parts])
        for path in sorted((ROOT / package.replace(".", "/")).rglob("*.py"))
    ]
    program = (
        "import importlib, sys\n"
        f"for name in {sorted(NEVER_ON_A_DEVICE)}: sys.modules[name] = None\n"
        f"for name in {modules}: importlib.import_module(name.removesuffix('.__init__'))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT.parent,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("folder", ["compression", "simulations"])
def test_top_folders_without_a_face_are_namespaces(folder: str) -> None:
    """Python 3.14 owns a package `compression`; one of ours would shadow it."""
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize(
    ("face", "names"),
    [
        (
            "server",
            [
                *("Checkpoint", "CompressedGrid", "Deadlines", "Ledger", "MetricsServer", "Policy"),
                *("Run", "RunMetrics", "SecureStrategy", "leading_slices", "module_chooser"),
                "staleness_weight",
            ],
        ),
        (
            "client",
            [
                *("compression_mod", "current_channels", "current_masks", "hold_masks"),
                *("prune_module", "recalibrate", "shared_mask_mod"),
            ],
        ),
    ],
)
def test_public_names(face: str, names: list[str]) -> None:
    """What users import; nothing of it is imported before it is asked for."""
    program = (
        f"import sys, prunecast.{face} as face\n"
        f"assert face.__all__ == {names}, face.__all__\n"
        "assert set(face.__all__) <= set(dir(face))\n"
        "assert not {'flwr', 'torch', 'numpy'} & set(sys.modules)\n"
        "assert not hasattr(face, 'Nothing')\n"
        f"from prunecast.{face} import *\n"
        f"for name in {names}: assert globals()[name] is getattr(face, name), name\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT.parent,
    )
    assert result.returncode == 0, result.stderr


def test_the_agent_has_a_face() -> None:
    from prunecast.client.edge import Agent, EdgeModel

    assert Agent.__module__.startswith("prunecast.client.edge.")
    assert EdgeModel.__module__.startswith("prunecast.client.edge.")


def test_every_component_is_packaged() -> None:
    listed = set(
        (ROOT / "pyproject.toml")
        .read_text()
        .split("packages = [", 1)[1]
        .split("]", 1)[0]
        .replace(",", " ")
        .replace('"', " ")
        .split()
    )
    found = {
        "prunecast." + ".".join(path.parent.relative_to(ROOT).parts)
        for folder in TOP_FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert listed == found
    for package in sorted(found):
        folder = ROOT.joinpath(*package.split(".")[1:])
        if package.count(".") <= 2:
            assert (folder / "py.typed").exists(), f"{folder} has no py.typed"


def test_root_on_the_path_shadows_no_standard_module() -> None:
    modules = "gzip, bz2, lzma, zlib, zipfile, tarfile, shutil, importlib.resources"
    program = f"import sys; assert {str(ROOT)!r} in map(str, sys.path); import {modules}"
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr


def test_prunecast_is_a_namespace() -> None:
    """A real `prunecast/__init__.py` would hide the folders that the editable install maps."""
    assert not (ROOT / "prunecast").exists()


def test_every_requirement_is_pinned() -> None:
    """`make demo` next year installs what was tested this year."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {_normalised(line.split("==")[0]) for line in lines if "==" in line}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = {
        _normalised(re.split(r"[^A-Za-z0-9._-]", requirement)[0])
        for requirement in [*project["dependencies"], *(r for extra in extras for r in extra)]
    }
    assert wanted - {"prunecast"} <= pinned


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
