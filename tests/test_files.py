"""Whole files and safe names: what a kill, a full disk, a read-only folder and hostile ids leave behind."""

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import in_a_process

from peft_read.files import safe_name, write_whole


def test_text_and_bytes_arrive(tmp_path):
    with write_whole(tmp_path / "a.txt") as file:
        file.write("Zürich 東京\n")
    with write_whole(tmp_path / "b.bin", "wb") as file:
        file.write(b"\x00\xff")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "Zürich 東京\n"
    assert (tmp_path / "b.bin").read_bytes() == b"\x00\xff"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.bin"]


def test_until_the_end_of_the_block_the_old_content_stands(tmp_path):
    target = tmp_path / "run.json"
    target.write_text("old")
    with write_whole(target) as file:
        file.write("new")
        file.flush()
        assert target.read_text() == "old"
    assert target.read_text() == "new"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_content_and_no_other_file(tmp_path, error):
    target = tmp_path / "run.json"
    target.write_text("old")
    with pytest.raises(type(error)), write_whole(target) as file:
        file.write("half")
        raise error
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_killed_process_leaves_the_old_content(tmp_path):
    target = tmp_path / "run.json"
    target.write_text("old")

    def write_half():
        with write_whole(target) as file:
            file.write("x" * 100_000)
            file.flush()
            os._exit(9)  # as a killed process ends

    assert in_a_process(write_half) == 9
    assert target.read_text() == "old"
    left = [path.name for path in tmp_path.iterdir() if path != target]
    assert len(left) == 1 and left[0].startswith(".run.json.") and left[0].endswith(".part")


def test_mode_link_and_long_name_are_kept(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    with write_whole(link) as file:
        file.write("new")
    assert link.is_symlink() and real.read_text() == "new" and stat.S_IMODE(real.stat().st_mode) == 0o640
    long = tmp_path / ("n" * 255)
    with write_whole(long) as file:
        file.write("text")
    assert long.read_text() == "text"


def test_what_cannot_be_written_is_an_error_at_once(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path, error in {
        "folder": IsADirectoryError,
        "absent/run.json": FileNotFoundError,
        "pipe": OSError,
    }.items():
        with pytest.raises(error), write_whole(tmp_path / path):
            raise AssertionError("the block must not begin")
    with pytest.raises(ValueError, match="'a'"), write_whole(tmp_path / "x", "a"):
        pass


@pytest.mark.parametrize("text", ["-esJrBWj2d8", "J0nA4VgnoCo", "video_1.part-2", "a" * 120])
def test_harmless_names_stay_as_they_are(text):
    assert safe_name(text) == text


HOSTILE = [
    "",
    ".",
    "..",
    "../x",
    "..\\x",
    "/etc/passwd",
    "C:\\x",
    "C:x",
    "a/b",
    "a\\b",
    "x\0y",
    "x\ny",
    "con",
    "NUL.txt",
]
HOSTILE += [
    ".hidden",
    "ends.",
    "ends ",
    " ",
    "~",
    "*?",
    "é",
    "e\u0301",
    "東京",
    "\ud800",
    "n" * 300,
    "n" * 301,
    "é" * 300,
]


def assert_safe(name):
    assert name and name.isascii() and len(name) <= 137 and Path(name).name == name
    assert not set(name) & set('<>:"/\\|?* \0') and name.isprintable()
    assert not name.startswith(".") and not name.endswith(".")
    assert name.split(".")[0].lower() not in {"con", "prn", "aux", "nul", "com1", "lpt9"}


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_become_safe(text, tmp_path):
    assert_safe(safe_name(text))
    (tmp_path / f"{safe_name(text)}.json").write_text("{}")
    assert len(list(tmp_path.iterdir())) == 1


def test_different_texts_get_different_names():
    texts = {*HOSTILE, *(safe_name(text) for text in HOSTILE), "a_b", "_x"}
    assert len({safe_name(text) for text in texts}) == len(texts)
    with pytest.raises(TypeError, match="3"):
        safe_name(3)


@given(st.text())
def test_every_text_becomes_a_safe_name(text):
    assert_safe(safe_name(text))
