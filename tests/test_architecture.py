"""The arrows between the rooms of the house: who may import whom."""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "peft_read"
FLOOR_0 = {
    "recurrence", "transport", "spans", "files", "values", "plain", "names", "checkpointing", "tasks", "data",
    "metrics",
}  # fmt: skip
MAY_IMPORT = {
    "versions": set(),
    "backends": set(),
    "kernel_launch": set(),
    "recurrence": {"backends", "kernel_launch"},
    "transport": {"backends", "kernel_launch"},
    "spans": {"values"},
    "values": set(),
    "plain": set(),
    "names": set(),
    "checkpointing": set(),
    "tasks": {"checkpointing"},
    "files": set(),
    "data": {"spans", "files", "values"},
    "metrics": {"spans", "files", "values"},
    "peft_methods": {"files", "plain", "names"},
    "adapter": FLOOR_0 | {"peft_methods"},
    "bottleneck": FLOOR_0 | {"peft_methods"},
    "alignment": FLOOR_0,
    "models": FLOOR_0,
    "baselines": FLOOR_0 | {"adapter", "alignment", "models"},
    "vl_adapter": FLOOR_0 | {"adapter", "alignment", "bottleneck", "models"},
    "inspection": {"models"},
    "demonstration": {"adapter"},
    "command_line": {"bottleneck", "peft_methods", "backends", "demonstration", "inspection"},
}


def imported_rooms(path: Path) -> set[str]:
    """The rooms of peft_read that one file imports, relative imports resolved."""
    package = ("peft_read", *path.relative_to(PACKAGE).parts[:-1])
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names = [".".join((*base, *(node.module or "").split("."))).strip(".")]
            names += [f"{names[0]}.{alias.name}" for alias in node.names]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("peft_read.")}
    return rooms & set(MAY_IMPORT)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_the_rooms_below_it(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room in ("__init__", "__main__"):
        return
    assert imported_rooms(path) - {room} <= MAY_IMPORT[room]


def imported_files(path: Path) -> set[Path]:
    """The files of peft_read that one file imports; a package's `__init__` only collects names.

    Imports inside functions count in the rooms whose parts are chosen at run time, elsewhere they break no order.
    """
    package = ("peft_read", *path.relative_to(PACKAGE).parts[:-1])
    files = set()
    tree = ast.parse(path.read_text())
    everywhere = path.relative_to(PACKAGE).parts[0] in ("recurrence", "transport")
    for node in ast.walk(tree) if everywhere else tree.body:
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
        folder = PACKAGE.joinpath(*(part for part in base[1:] if part))
        for candidate in (folder.with_suffix(".py"), *(folder / f"{alias.name}.py" for alias in node.names)):
            if candidate.is_file():
                files.add(candidate)
    return files - {path}


def test_no_circles_between_files():
    left = {path: imported_files(path) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    while left:
        free = [path for path, needs in left.items() if not needs & set(left)]
        assert free, "these import each other: " + ", ".join(str(path.relative_to(PACKAGE)) for path in left)
        for path in free:
            del left[path]


def test_no_catch_all_modules():
    names = {path.stem for path in PACKAGE.rglob("*")}
    assert not names & {"utils", "common", "helpers"}


def test_no_script_has_the_name_of_a_module_that_others_import():
    """A script's folder comes first in the search for modules: pandas would take our `bottleneck` for its own."""
    scripts = {path.stem for path in (PACKAGE.parents[1] / "examples").rglob("*.py")}
    optional = {"bottleneck", "numexpr", "odfpy", "tables", "xarray"}  # of pandas
    taken = optional | set(sys.stdlib_module_names) | set(packages_distributions()) - {"examples"}
    assert not scripts & taken


def test_the_picture_of_the_house_is_drawn_from_these_imports(monkeypatch):
    monkeypatch.syspath_prepend(str(PACKAGE.parents[1] / "docs" / "drawings"))
    import house

    assert {name for floor in house.FLOORS for name in floor} == set(house.parts()) == set(MAY_IMPORT)
    assert house.PICTURE.read_text(encoding="utf-8") == house.picture(), "run docs/drawings/house.py"
