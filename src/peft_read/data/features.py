"""FeatureStore: the video features of a dataset, read item by item from files or from one archive."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["FeatureStore", "Features", "check_features", "listed", "write_feature_archive"]

SHOWN = 5  # ids listed in an error message


class Features(Protocol):
    """A `FeatureStore`, or anything else that gives (length, width) by id."""

    def __contains__(self, key: object) -> bool: ...

    def __getitem__(self, key: str, /) -> NDArray: ...


class FeatureStore:
    """Video features by id, each a float32 array (frames, width).

    Three layouts are understood:

    * a folder of `<id>.npy` files, each (frames, width);
    * a folder of `<id>.npz` files, with an array named `features` (or a single array);
    * one `.npz` archive with `ids` (n,), `offsets` (n + 1,), `features` (frames of all items, width) and, where these
      are int8, `scale` (frames,): row = features x scale.

    Nothing is read before it is asked for, but the archive's index.

    Args:
        path: folder or archive.
        name: how the files of a folder are called, with `{id}` where the id is: `"{id}_rgb"`, `"qid{id}"`. Files that
            are called otherwise are left aside.
        array: the array of a `.npz` file, such as `"last_hidden_state"` or `"token"` of published text features.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: an archive without the arrays above, or a name without `{id}`.

    Example:
        ```python
        store = FeatureStore("how2/video_features")
        store["abc123"].shape  # (frames, width)
        queries = FeatureStore("qvhighlights/clip_text", name="qid{id}", array="last_hidden_state")
        ```
    """

    def __init__(self, path: str | Path, *, name: str = "{id}", array: str = "features") -> None:
        if name.count("{id}") != 1:
            raise ValueError(f"name={name!r} must contain {{id}} once, as in '{{id}}_rgb'")
        self.path, self.array = Path(path), array
        self._archive: dict[str, np.ndarray] | None = None
        self._files: dict[str, Path] = {}
        if self.path.is_dir():
            pattern = re.compile("(.+)".join(map(re.escape, name.split("{id}"))))
            for file in sorted(self.path.iterdir()):
                if file.suffix in (".npy", ".npz") and (match := pattern.fullmatch(file.stem)):
                    self._files[match.group(1)] = file
            if not self._files:
                called = "" if name == "{id}" else f" called {name.replace('{id}', '<id>')!r}"
                raise FileNotFoundError(f"{self.path} holds no .npy or .npz feature file{called}")
        elif self.path.is_file():
            self._archive = _read_archive(self.path)
            self._rows = {str(name): index for index, name in enumerate(self._archive["ids"])}
        else:
            raise FileNotFoundError(f"{self.path} is neither a folder of features nor a feature archive (.npz)")

    def __len__(self) -> int:
        return len(self._files if self._archive is None else self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files if self._archive is None else self._rows)

    def __contains__(self, video_id: object) -> bool:
        return video_id in (self._files if self._archive is None else self._rows)

    def __getitem__(self, video_id: str) -> np.ndarray:
        """Features of one video, (frames, width) float32.

        Raises:
            KeyError: no features of that id.
            ValueError: a file that holds something else than one (frames, width) array.
        """
        if video_id not in self:
            raise KeyError(f"{self.path} has no features of {video_id!r}")
        if self._archive is not None:
            row = self._rows[video_id]
            start, stop = self._archive["offsets"][row : row + 2]
            features = self._archive["features"][start:stop].astype(np.float32)
            if "scale" in self._archive:
                features *= self._archive["scale"][start:stop].astype(np.float32)[:, None]
            return features
        return _read_file(self._files[video_id], self.array)

    def check(self, video_ids: Iterable[str], *, width: int | None = None) -> int:
        """Reads the features of these ids once and reports everything that is wrong with them, by id.

        Args:
            video_ids: those that will be used.
            width: what the model expects; None = the width of the first.

        Returns:
            The width.

        Raises:
            ValueError: missing ids, empty features, another width, NaN or infinite values.
        """
        return check_features(self, video_ids, name=f"features in {self.path}", width=width)


def check_features(
    features: Features | Mapping[str, NDArray], ids: Iterable[str], *, name: str, width: int | None = None
) -> int:
    """Reads the features of these ids once and reports everything that is wrong with them, by id.

    Args:
        features: by id, each (frames, width).
        ids: those that will be used.
        name: what the message calls them.
        width: what the model expects; None = the width of the first.

    Returns:
        The width.

    Raises:
        ValueError: missing ids, empty features, another shape or width, NaN or infinite values, or no ids at all.
    """
    problems: dict[str, list[str]] = {}
    for key in dict.fromkeys(ids):
        if key not in features:
            problems.setdefault("have no features", []).append(key)
            continue
        rows = np.asarray(features[key])
        if rows.ndim != 2:
            problems.setdefault("are not (frames, width)", []).append(f"{key} {rows.shape}")
            continue
        width = rows.shape[1] if width is None else width
        if rows.shape[1] != width:
            problems.setdefault(f"have not the width {width}", []).append(f"{key} ({rows.shape[1]})")
        elif not len(rows):
            problems.setdefault("have no frame", []).append(key)
        elif not np.isfinite(rows).all():
            frame = int(np.flatnonzero(~np.isfinite(rows).all(1))[0])
            problems.setdefault("hold NaN or infinite values", []).append(f"{key} (frame {frame})")
    if problems:
        found = "; ".join(f"{len(keys)} ids {what}: {listed(keys)}" for what, keys in problems.items())
        raise ValueError(f"{name}: {found}")
    if width is None:
        raise ValueError(f"{name}: no ids were given to check")
    return width


def write_feature_archive(path: str | Path, features: Mapping[str, NDArray]) -> Path:
    """Writes the features of many items into one `.npz` that `FeatureStore` reads.

    Args:
        path: the archive.
        features: by id, each (frames, width), all of one width.

    Returns:
        The path.
    """
    lengths = [len(rows) for rows in features.values()]
    path = Path(path)
    np.savez(
        path,
        ids=np.array(list(features)),
        offsets=np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))),
        features=np.concatenate(list(features.values())),
    )
    return path


def listed(names: Sequence[str]) -> str:
    """The first few names, and dots where there are more."""
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")


def _read_archive(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        archive = {name: file[name] for name in file.files}
    if missing := {"ids", "offsets", "features"} - set(archive):
        raise ValueError(
            f"{path} is not a feature archive: it has no arrays {sorted(missing)}, only {sorted(archive)}"
        )
    if archive["features"].dtype == np.int8 and "scale" not in archive:
        raise ValueError(f"{path} holds int8 features without their scale")
    return archive


def _read_file(path: Path, array: str) -> np.ndarray:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        features = loaded
    else:
        with loaded:
            if array not in loaded.files and len(loaded.files) > 1:
                raise ValueError(f"{path} holds {loaded.files}; name the feature array {array!r}, or pass array=")
            features = loaded[array if array in loaded.files else loaded.files[0]]
    if features.ndim != 2:
        raise ValueError(f"{path} holds an array of shape {features.shape}; features are (frames, width)")
    return features.astype(np.float32)
