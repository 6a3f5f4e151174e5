"""The pages of the site: their Python runs, links lead somewhere, each page is reachable, quoted errors exist."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest
import yaml

from peft_read import backends

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if not path.name.endswith("_benchmark.md"))
NOT_RUN = "# Needs "  # the first line of a block that needs downloads, files of the reader's own, or other libraries
ELSEWHERE = {"trl"}  # libraries that no environment of this project has


def python_blocks(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def name_of(path):
    return str(path.relative_to(DOCS))


@pytest.mark.parametrize("path", [path for path in PAGES if python_blocks(path)], ids=name_of)
def test_the_blocks_of_a_page_run_one_after_the_other(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backends, "_forced", None)  # a page may choose one for "this process, from here on"
    page = {"__name__": "page"}
    for block in python_blocks(path):
        code = compile(block, name_of(path), "exec")
        if block.startswith(NOT_RUN):
            check_imports(block)
        else:
            exec(code, page)


def check_imports(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] not in ELSEWHERE:
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_a_name_that_does_not_exist_is_seen():
    with pytest.raises(AssertionError):
        check_imports("from peft_read import Nothing")


def pages_of(entry):
    if isinstance(entry, str):
        return [entry]
    values = entry.values() if isinstance(entry, dict) else entry
    return [page for value in values for page in pages_of(value)]


def test_every_page_is_in_the_navigation_once():
    navigation = pages_of(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(navigation) == sorted(name_of(path) for path in PAGES)


def test_the_site_is_built_strictly():
    """Quietly, mkdocs would count no warnings, and the strict build pass whatever is wrong."""
    recipe = (REPOSITORY / "Makefile").read_text(encoding="utf-8").partition("docs: .venv-docs")[2].splitlines()[1]
    assert "mkdocs build --strict" in recipe and "-q" not in recipe


def anchors(path):
    """The anchors of a page's headings, as GitHub and mkdocs make them of plain words."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*PAGES, REPOSITORY / "README.md", REPOSITORY / "examples" / "README.md"], ids=str)
def test_links_lead_to_files_and_headings(path):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def source():
    """All text of the package, as its messages read once their pieces are joined."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "src").rglob("*.py"))
    return re.sub(r"\"\s*\n\s*f?\"", "", text)


def test_troubleshooting_quotes_messages_that_exist():
    rows = re.findall(r"^\| `+ ?([^|]+?) ?`+ \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 20
    code = source()
    for row in rows:
        for part in re.split(r"\.\.\.|`", row):
            part = part.strip(" ;()")
            if len(part) > 3 and part != "KeyError: 'READ'":
                assert part in code, part


def modules_with_examples():
    package = REPOSITORY / "src"
    for path in sorted(package.rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            yield ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("name", list(modules_with_examples()))
def test_examples_of_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not result.failed
