"""Warns once, at import, where an installed library lies outside the window of versions that were tried.

The window is written in `pyproject.toml` alone and read back from the package's metadata: the lower bounds are those
of its dependencies, the upper ends the versions of its extra `tried`, the newest that is tried.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from importlib import metadata
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

__all__ = ["Window", "read_windows", "warn_outside_windows"]

DISTRIBUTION = "peft-read"


class Window(NamedTuple):
    """The versions of one library: those that pip may install, and the newest that was tried."""

    package: str
    allowed: SpecifierSet
    newest_tried: Version | None

    def contains(self, installed: Version) -> bool:
        """Whether a version lies in the window.

        Patch releases after the newest version tried lie inside. So do development versions and pre-releases above
        it: whoever installs one knows that nobody has tried it.
        """
        if not self.allowed.contains(installed, prereleases=True):
            return False
        if self.newest_tried is None or installed.is_prerelease:
            return True
        return installed.release[:2] <= self.newest_tried.release[:2]

    def __str__(self) -> str:
        newest = "" if self.newest_tried is None else f", tried up to {self.newest_tried}"
        return f"{self.package}{self.allowed}{newest}"


def read_windows(requirements: Iterable[str]) -> list[Window]:
    """The windows from a distribution's requirements, as `importlib.metadata.requires` returns them."""
    parsed = [Requirement(line) for line in requirements]
    tried = {
        requirement.name: Version(specifier.version)
        for requirement in parsed
        if requirement.marker is not None and requirement.marker.evaluate({"extra": "tried"})
        for specifier in requirement.specifier
        if specifier.operator == "=="
    }
    needed = [requirement for requirement in parsed if requirement.marker is None or requirement.marker.evaluate()]
    return [Window(needs.name, needs.specifier, tried.get(needs.name)) for needs in needed]


def warn_outside_windows() -> None:
    """One warning that names every library outside its window; none where all are inside.

    A source tree that is on the path without being installed has no metadata, and is not checked.
    """
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return
    outside = []
    for window in read_windows(requirements):
        try:
            installed = Version(metadata.version(window.package))
        except (metadata.PackageNotFoundError, InvalidVersion):
            continue  # the import that needs the library says more
        if not window.contains(installed):
            outside.append(f"{window.package} {installed} (the window: {window})")
    if outside:
        warnings.warn(
            f"peft_read was not tested with {'; '.join(outside)}. Results may be wrong without an error; install a "
            'version inside the window, for example by `pip install "peft-read[tried]"` from its checkout or wheel.',
            stacklevel=3,
        )
