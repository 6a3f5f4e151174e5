"""The window of versions: one warning outside it, none inside, and one truth in the files that name it."""

import tomllib
import warnings
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from peft_read import versions

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
WINDOW = [
    "torch>=2.6.0",
    "transformers!=5.19.1,>=5.18.0",
    'numba>=0.60; extra == "fast"',
    'torch==2.13.0; extra == "tried"',
    'transformers==5.24.0; extra == "tried"',
]


def pins(name: str) -> dict[str, str]:
    lines = (REPOSITORY / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.fixture
def warned(monkeypatch):
    """A function from faked versions to the warnings of the check."""

    def check(**installed: str) -> list[str]:
        monkeypatch.setattr(metadata, "requires", lambda name: WINDOW)
        monkeypatch.setattr(metadata, "version", lambda name: installed.get(name, "2.13.0"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            versions.warn_outside_windows()
        return [str(warning.message) for warning in caught]

    return check


@pytest.mark.parametrize(
    "version",
    # the ends, a patch release after the newest one tried, and what is not yet released
    ["5.18.0", "5.23.0", "5.24.0", "5.24.3", "5.25.0.dev0", "6.0.0rc1"],
)
def test_no_warning_inside_the_window(warned, version):
    assert warned(transformers=version) == []


def test_a_local_build_of_a_version_is_that_version(warned):
    assert warned(transformers="5.24.0", torch="2.13.0+cpu") == []
    assert warned(transformers="5.24.0", torch="2.6.0+cu124") == []


@pytest.mark.parametrize("version", ["5.17.0", "4.57.6", "5.18.0.dev0", "5.19.1", "5.25.0", "6.0.0"])
def test_a_version_outside_is_named_with_its_window(warned, version):
    (message,) = warned(transformers=version)
    assert f"transformers {version} " in message and "torch" not in message
    assert ">=5.18.0" in message and "tried up to 5.24.0" in message


def test_one_warning_names_all_that_lie_outside(warned):
    (message,) = warned(transformers="5.0.0", torch="2.5.1")
    assert "transformers 5.0.0" in message and "torch 2.5.1" in message


def test_a_source_tree_that_is_not_installed_is_not_checked(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_outside_windows()


def test_the_check_comes_before_the_imports():
    """The check stands before the imports that an older library cannot serve."""
    lines = (REPOSITORY / "src/peft_read/__init__.py").read_text().splitlines()
    assert lines.index("from . import bottleneck, models") > next(
        index for index, line in enumerate(lines) if line.startswith("warn_outside_windows()")
    )


def test_the_lower_ends_are_those_that_the_oldest_run_installs():
    oldest = pins("constraints-oldest.txt")
    for line in PROJECT["dependencies"]:
        needs = Requirement(line)
        (bound,) = needs.specifier
        assert bound.operator == ">=", f"{line}: a bound above would have to be tested"
        if needs.name in oldest:
            assert Version(oldest[needs.name]) == Version(bound.version), needs.name
        else:
            assert needs.name in {"torch", "packaging"}, f"{needs.name}: no run has its oldest version"


def test_the_upper_ends_are_those_that_every_test_is_run_with():
    constraints = pins("constraints.txt")
    tried = {Requirement(line).name: line.split("==")[1] for line in PROJECT["optional-dependencies"]["tried"]}
    assert set(tried) == {"peft", "transformers", "accelerate"}  # torch keeps its interface from release to release
    assert tried == {name: constraints[name] for name in tried}
    windows = versions.read_windows(
        [*PROJECT["dependencies"], *(f'{name}=={version}; extra == "tried"' for name, version in tried.items())]
    )
    for window in windows:
        assert window.newest_tried is None or window.contains(window.newest_tried)


def test_the_docs_name_the_window():
    page = (REPOSITORY / "docs" / "versions.md").read_text()
    for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["tried"]]:
        needs = Requirement(line)
        (bound,) = needs.specifier
        if needs.name != "packaging":
            row = next(row for row in page.splitlines() if row.startswith(f"| {needs.name} |"))
            assert bound.version in row, line
