"""Draws docs/pictures/house.svg from the imports of the package: its parts on their floors, an arrow for each import.

python docs/drawings/house.py            # writes the picture
python docs/drawings/house.py --check    # exit 1 where the picture is not that of the code
"""

import argparse
import ast
import sys
from html import escape
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "peft_read"
PICTURE = Path(__file__).parents[1] / "pictures" / "house.svg"
# From the ground up. What stands on no floor here is drawn nowhere, which the test of the architecture notices.
FLOORS = (
    ("files", "values", "plain", "names", "backends", "kernel_launch", "checkpointing", "versions"),
    ("recurrence", "transport", "spans", "data", "metrics", "tasks"),
    ("peft_methods",),
    ("adapter", "bottleneck", "alignment", "models"),
    ("baselines", "vl_adapter", "inspection", "demonstration"),
    ("command_line",),
)
WIDTH, BOX, HEIGHT, STEP = 900, 130, 34, 110


def parts() -> list[str]:
    """The folders and files of the package, apart from its `__init__` and `__main__`."""
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    return sorted(names - {"__init__", "__main__"})


def imports(part: str) -> set[str]:
    """The other parts that a part imports, inside functions too."""
    folder = PACKAGE / part
    found = set()
    for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]:
        package = ("peft_read", *path.relative_to(PACKAGE).parts[:-1])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = (*package[: len(package) - node.level + 1], *filter(None, (node.module or "").split(".")))
                found |= {base[1]} if len(base) > 1 else {alias.name for alias in node.names}
    return (found & set(parts())) - {part}


def picture() -> str:
    """The drawing, as SVG."""
    places, boxes, arrows = {}, [], []
    for floor, names in enumerate(FLOORS):
        y = (len(FLOORS) - 1 - floor) * STEP + 10
        for index, name in enumerate(names):
            x = (index + 1) * WIDTH / (len(names) + 1)
            places[name] = x, y
            boxes.append(
                f'<rect x="{x - BOX / 2:.0f}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="5" fill="#e8eaf6" '
                f'stroke="#3f51b5"/><text x="{x:.0f}" y="{y + 22}" text-anchor="middle">{escape(name)}</text>'
            )
    for name, (x, y) in places.items():
        for other in sorted(imports(name) & set(places)):
            to_x, to_y = places[other]
            if to_y == y:  # beside each other: an arc below both
                path = f"M{x:.0f} {y + HEIGHT} Q{(x + to_x) / 2:.0f} {y + HEIGHT + 34} {to_x:.0f} {to_y + HEIGHT + 4}"
            else:
                path = f"M{x:.0f} {y + HEIGHT} L{to_x:.0f} {to_y - 4}"
            arrows.append(f'<path d="{path}" fill="none" stroke="#9e9e9e" marker-end="url(#head)"/>')
    height = len(FLOORS) * STEP
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
            'font-size="13">',
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#9e9e9e"/></marker></defs>',
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            *arrows,
            *boxes,
            "</svg>\n",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        return int(PICTURE.read_text(encoding="utf-8") != picture())
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(picture(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
