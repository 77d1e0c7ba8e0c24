"""Imports between the folders of the package run one way: nothing imports upwards, and there are no circles."""

import ast
from graphlib import TopologicalSorter

import pytest

from tests.processes import ROOT

PACKAGE = "llava_cot_jax"

KNOWS = {
    "model": set(),
    "costs": {"model"},
    "processing": {"model"},
    "data": {"model", "processing"},
    "inference": {"model", "processing"},
    "hosts": set(),
    "search": {"costs", "inference", "model", "processing"},
    "training": {"costs", "data", "hosts", "model", "processing"},
    "evaluation": {"data", "hosts", "inference", "model", "processing", "search"},
    "serving": {"inference", "model", "processing", "search"},
    "annotation": {"data", "evaluation", "inference", "model", "processing", "search"},
    "values": {"data", "evaluation", "hosts", "model", "processing", "search"},
    "benchmark": {"costs", "inference", "model", "processing", "search"},
    "planning": {"benchmark", "costs", "model", "processing", "search", "training"},
}
"""Folders that each folder may import, besides the modules that stand beside all of them."""

COMMANDS = {
    "annotate",
    "bench",
    "convert",
    "evaluate",
    "generate",
    "plan",
    "prepare",
    "rollout",
    "serve",
    "train",
    "__main__",
}
"""Modules that no folder may import."""


def imports() -> dict[str, set[str]]:
    """Return the modules of the package that each module imports, anywhere in it."""
    trees = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    found: dict[str, set[str]] = {}
    for name, tree in trees.items():
        froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        targets = {
            full if (full := f"{node.module}.{alias.name}") in trees else str(node.module)
            for node in froms
            for alias in node.names
        }
        found[name] = {target for target in targets if target in trees} - {name, PACKAGE}
    return found


IMPORTS = imports()


def folder_of(module: str) -> str:
    return module.split(".")[1] if module.count(".") > 1 or module.removeprefix(f"{PACKAGE}.") in KNOWS else ""


def test_no_module_imports_itself_through_others():
    list(TopologicalSorter(IMPORTS).static_order())  # raises CycleError


@pytest.mark.parametrize("folder", KNOWS)
def test_a_folder_imports_only_what_is_below_it(folder):
    own = [module for module in IMPORTS if folder_of(module) == folder]
    assert len(own) > 1
    for module in own:
        targets = IMPORTS[module]
        assert {folder_of(target) for target in targets} - {"", folder} <= KNOWS[folder], module
        assert not {target for target in targets if target.removeprefix(f"{PACKAGE}.") in COMMANDS}, module


def test_each_folder_is_listed():
    assert {folder_of(module) for module in IMPORTS} - {""} == KNOWS.keys()


def test_training_does_not_pass_through_search():
    reached, rest = set(), [f"{PACKAGE}.train"]
    while rest:
        if (module := rest.pop()) not in reached:
            reached.add(module)
            rest += IMPORTS[module]
    assert f"{PACKAGE}.training.loop" in reached
    assert not [module for module in reached if folder_of(module) == "search"]
