"""The numbers of the originals that are in the repository are those of the whole set, which is not."""

import json

import pytest
from conftest import GOLDEN, REFERENCE_DATA

FILES = sorted(path.relative_to(GOLDEN) for path in GOLDEN.rglob("*.json"))


def parts_of(committed, whole):
    """Whether everything committed stands in the whole set with the same value."""
    if isinstance(committed, dict):
        return set(committed) <= set(whole) and all(parts_of(value, whole[key]) for key, value in committed.items())
    return committed == whole


def test_every_file_is_small_and_named_in_the_readme():
    readme = (GOLDEN / "README.md").read_text()
    assert FILES
    for file in FILES:
        assert (GOLDEN / file).stat().st_size < 20_000
        assert f"`{file.as_posix()}`" in readme


@pytest.mark.parametrize("file", FILES, ids=str)
def test_the_numbers_are_those_of_the_whole_set(file):
    whole = REFERENCE_DATA / "golden" / file
    if not whole.exists():
        pytest.skip("the whole set is not beside this checkout (set PEFT_READ_REFERENCE_DATA)")
    assert parts_of(json.loads((GOLDEN / file).read_text()), json.loads(whole.read_text()))
