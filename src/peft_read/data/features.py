"""FeatureStore: the video features of a dataset, read item by item from files or from one archive."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..files import write_whole
from ..values import array_of, id_of, listed, shown

__all__ = [
    "FeatureStore",
    "Features",
    "check_features",
    "read_arrays",
    "read_features",
    "row_count",
    "write_feature_archive",
]

REAL = "fiu"  # kinds of dtype that hold real numbers


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

    The files of a folder are read when they are asked for. An archive is read whole, and held in memory as it was
    stored (int8 with `scale` takes a quarter of float32). Integer ids are converted to strings.

    Args:
        path: folder or archive.
        name: pattern of the file names in a folder, with `{id}` for the id: `"{id}_rgb"`, `"qid{id}"`. Other files are
            ignored.
        array: the array of a `.npz` file, such as `"last_hidden_state"` or `"token"` of published text features.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: an archive that cannot be read, lacks the arrays above, or whose arrays do not fit each other; an
            id with two files; a name without `{id}`.

    Example:
        ```python
        store = FeatureStore("how2/video_features")
        store["abc123"].shape  # (frames, width)
        queries = FeatureStore("qvhighlights/clip_text", name="qid{id}", array="last_hidden_state")
        ```
    """

    def __init__(self, path: str | Path, *, name: str = "{id}", array: str = "features") -> None:
        if not isinstance(name, str) or name.count("{id}") != 1:
            raise ValueError(f"name={name!r} must contain {{id}} once, as in '{{id}}_rgb'")
        self.path, self.array = Path(path), array
        self._archive: dict[str, np.ndarray] | None = None
        self._files: dict[str, Path] = {}
        if self.path.is_dir():
            self._files = _files_by_id(self.path, name)
        elif self.path.is_file():
            self._archive = _read_archive(self.path)
            self._rows = {str(name): index for index, name in enumerate(self._archive["ids"].tolist())}
        else:
            raise FileNotFoundError(f"{self.path} is neither a folder of features nor a feature archive (.npz)")

    def __len__(self) -> int:
        return len(self._files if self._archive is None else self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files if self._archive is None else self._rows)

    def __contains__(self, video_id: object) -> bool:
        try:
            return id_of(video_id, "id") in (self._files if self._archive is None else self._rows)
        except ValueError:
            return False

    def __getitem__(self, video_id: str | int) -> np.ndarray:
        """Features of one video, (frames, width) float32.

        Raises:
            KeyError: no features of that id.
            ValueError: a file that cannot be read, or does not hold one (frames, width) array of numbers.
        """
        if self._archive is None:
            return _read_file(self._file(video_id), self.array)
        start, stop = self._bounds(video_id)
        features = self._archive["features"][start:stop].astype(np.float32)
        if "scale" in self._archive:
            features *= self._archive["scale"][start:stop].astype(np.float32)[:, None]
        return features

    def num_rows(self, video_id: str | int) -> int:
        """Number of frames of one video, from the offsets of an archive or the head of a `.npy`; a `.npz` is read.

        Raises:
            KeyError: no features of that id.
            ValueError: a file that cannot be read, or does not hold one array of frames.
        """
        if self._archive is None:
            file = self._file(video_id)
            return len(_read_file(file, self.array) if file.suffix == ".npz" else _load(file, memory_map=True))
        start, stop = self._bounds(video_id)
        return int(stop - start)

    def check(self, video_ids: Iterable[str | int], *, width: int | None = None) -> int:
        """Reads the features of these ids once and reports everything that is wrong with them, by id.

        Args:
            video_ids: those that will be used.
            width: what the model expects; None = the width of the first.

        Returns:
            The width.

        Raises:
            ValueError: missing ids, files that cannot be read, empty features, another width, NaN or infinite values.
        """
        return check_features(self, video_ids, name=f"features in {self.path}", width=width)

    def _file(self, video_id: str | int) -> Path:
        if video_id not in self:
            raise KeyError(f"{self.path} has no features of {video_id!r}")
        return self._files[id_of(video_id, "id")]

    def _bounds(self, video_id: str | int) -> tuple[int, int]:
        if video_id not in self or self._archive is None:
            raise KeyError(f"{self.path} has no features of {video_id!r}")
        row = self._rows[id_of(video_id, "id")]
        return self._archive["offsets"][row], self._archive["offsets"][row + 1]


def read_features(features: Features | Mapping[str, Any], key: str) -> NDArray[np.float32]:
    """Features of one id (length, width), from a store or from any mapping of lists, arrays or tensors.

    Raises:
        KeyError: no features of that id.
        ValueError: a file that cannot be read, or features that are not one (length, width) array of numbers.
    """
    if key not in features:
        raise KeyError(f"{place_of(features) or 'the mapping of features'} has no features of {key!r}")
    rows = array_of(features[key])
    if rows.ndim != 2 or rows.dtype.kind not in REAL:
        raise ValueError(f"the features of {key!r} are {_described(rows)}; they must be numbers (length, width)")
    return rows.astype(np.float32, copy=False)


def row_count(features: Features | Mapping[str, Any], key: str) -> int | None:
    """Number of rows of one id, from the index where there is one; None: it has no features.

    Raises:
        ValueError: a file that cannot be read.
    """
    if key not in features:
        return None
    if isinstance(features, FeatureStore):
        return features.num_rows(key)
    counted = getattr(features, "num_rows", None)
    return int(counted(key)) if counted is not None else len(features[key])


def place_of(features: object) -> str:
    """The path of the features for messages; empty if unknown."""
    return str(getattr(features, "path", ""))


def check_features(
    features: Features | Mapping[str, Any], ids: Iterable[str | int], *, name: str, width: int | None = None
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
        ValueError: missing ids, features that cannot be read, are empty or have another shape or width, NaN or
            infinite values, or no ids at all.
    """
    problems: dict[str, list[str]] = {}
    if isinstance(ids, str):
        raise ValueError(f"{name}: a list of ids is expected, not the string {ids!r}")
    for key in dict.fromkeys(id_of(key, f"{name}: an id") for key in ids):
        if key not in features:
            problems.setdefault("have no features", []).append(key)
            continue
        try:
            rows = array_of(features[key])
        except (ValueError, KeyError, OSError) as error:
            problems.setdefault("cannot be read", []).append(f"{key} ({_message(error)})")
            continue
        if rows.ndim != 2 or rows.dtype.kind not in REAL:
            problems.setdefault("are not (frames, width)", []).append(f"{key} {_described(rows)}")
            continue
        width = rows.shape[1] if width is None else width
        if rows.shape[1] != width:
            problems.setdefault(f"do not have the width {width}", []).append(f"{key} ({rows.shape[1]})")
        elif not len(rows):
            problems.setdefault("have no frame", []).append(key)
        elif not np.isfinite(rows).all():
            frame = int(np.flatnonzero(~np.isfinite(rows).all(1))[0])
            problems.setdefault("hold NaN or infinite values", []).append(f"{key} (frame {frame})")
    if problems:
        described = "; ".join(f"{len(keys)} ids {what}: {listed(keys)}" for what, keys in problems.items())
        raise ValueError(f"{name}: {described}")
    if width is None:
        raise ValueError(f"{name}: no ids were given to check")
    return width


def write_feature_archive(
    path: str | Path, features: Mapping[str, Any], *, extra: Mapping[str, NDArray] | None = None
) -> Path:
    """Writes the features of many items atomically into one archive that `FeatureStore` reads.

    Args:
        path: the archive; no suffix is added.
        features: by id, each (frames, width), all of one width.
        extra: further arrays, which `FeatureStore` ignores.

    Returns:
        The path.

    Raises:
        ValueError: no features, an invalid id, or features (by id) that are not (frames, width), not finite, or of
            another width than the first.
    """
    ids = [id_of(key, "an id of the archive") for key in features]
    if len(set(ids)) < len(ids):
        raise ValueError(f"two ids of the archive are the same string: {shown(list(features))}")
    check_features({key: features[given] for key, given in zip(ids, features, strict=True)}, ids, name=f"{path}")
    rows = [array_of(part) for part in features.values()]
    rows = [part if part.dtype.kind == "f" else part.astype(np.float32) for part in rows]
    with write_whole(path, "wb") as file:
        np.savez(
            file,
            ids=np.array(ids),
            offsets=np.concatenate(([0], np.cumsum([len(part) for part in rows], dtype=np.int64))),
            features=np.concatenate(rows),
            **dict(extra or {}),  # type: ignore[arg-type]
        )
    return Path(path)


def _files_by_id(folder: Path, name: str) -> dict[str, Path]:
    pattern = re.compile("(.+)".join(map(re.escape, name.split("{id}"))), re.DOTALL)
    files: dict[str, Path] = {}
    twice = []
    for file in sorted(folder.iterdir()):
        if file.suffix in (".npy", ".npz") and (match := pattern.fullmatch(file.stem)):
            if match.group(1) in files:
                twice.append(f"{files[match.group(1)].name} and {file.name}")
            files[match.group(1)] = file
    if twice:
        raise ValueError(f"{folder}: {len(twice)} ids have two files, unclear which to read: {listed(twice)}")
    if not files:
        called = "" if name == "{id}" else f" called {name.replace('{id}', '<id>')!r}"
        raise FileNotFoundError(f"{folder} holds no .npy or .npz feature file{called}")
    return files


def _load(path: Path, *, memory_map: bool = False) -> Any:
    """Loads a file with numpy, without pickled objects.

    Raises:
        ValueError: it is not a regular file, or numpy cannot read it.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file (a broken link, a pipe or a folder?)")
    try:
        return np.load(path, allow_pickle=False, mmap_mode="r" if memory_map else None)
    except Exception as error:  # a damaged file fails anywhere inside zip, zlib or numpy's header
        raise ValueError(f"{path} cannot be read as .npy or .npz: {_message(error)}") from error


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` file.

    Raises:
        ValueError: it cannot be read.
    """
    loaded = _load(path)
    if isinstance(loaded, np.ndarray):
        raise ValueError(f"{path} is a single array, not a .npz file")
    with loaded:
        try:
            return {name: loaded[name] for name in loaded.files}
        except Exception as error:  # as in _load
            raise ValueError(f"{path} cannot be read as .npz: {_message(error)}") from error


def _read_archive(path: Path) -> dict[str, np.ndarray]:
    archive = read_arrays(path)
    if missing := {"ids", "offsets", "features"} - set(archive):
        raise ValueError(
            f"{path} is not a feature archive: it has no arrays {sorted(missing)}, only {sorted(archive)}"
        )
    ids, offsets, features = archive["ids"], archive["offsets"], archive["features"]
    if ids.ndim != 1 or ids.dtype.kind not in "Uiu":
        raise ValueError(f"{path}: 'ids' is {_described(ids)}; it must be a list of strings")
    names = [str(name) for name in ids.tolist()]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: {next(n for n in names if names.count(n) > 1)!r} appears twice in 'ids'")
    if features.ndim != 2 or features.dtype.kind not in REAL:
        raise ValueError(f"{path}: 'features' is {_described(features)}; it must be numbers (frames, width)")
    if offsets.shape != (len(ids) + 1,) or offsets.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: 'offsets' is {_described(offsets)}; {len(ids)} ids need {len(ids) + 1} whole numbers"
        )
    offsets = offsets.astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != len(features) or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"{path}: 'offsets' must increase from 0 to {len(features)}, the rows of features; they go from "
            f"{offsets[0]} to {offsets[-1]}{'' if (np.diff(offsets) >= 0).all() else ' and decrease in between'}"
        )
    archive["offsets"] = offsets
    if features.dtype == np.int8 and "scale" not in archive:
        raise ValueError(f"{path} holds int8 features without their scale")
    if "scale" in archive and (archive["scale"].shape != (len(features),) or archive["scale"].dtype.kind not in REAL):
        raise ValueError(
            f"{path}: 'scale' is {_described(archive['scale'])}; {len(features)} rows of features need as many numbers"
        )
    return archive


def _read_file(path: Path, array: str) -> NDArray[np.float32]:
    loaded = _load(path)
    if not isinstance(loaded, np.ndarray):
        with loaded:
            if not loaded.files:
                raise ValueError(f"{path} holds no array")
            if array not in loaded.files and len(loaded.files) > 1:
                raise ValueError(f"{path} holds {loaded.files}; name the feature array {array!r}, or pass array=")
            try:
                loaded = loaded[array if array in loaded.files else loaded.files[0]]
            except Exception as error:  # as in _load
                raise ValueError(f"{path} cannot be read as .npz: {_message(error)}") from error
    if not isinstance(loaded, np.ndarray) or loaded.ndim != 2:
        raise ValueError(f"{path} holds an array of shape {np.shape(loaded)}; features are (frames, width)")
    if loaded.dtype.kind not in REAL:
        raise ValueError(f"{path} holds {_described(loaded)}; features are real numbers")
    return loaded.astype(np.float32)


def _described(array: NDArray) -> str:
    return f"{array.dtype} of the shape {array.shape}" if array.dtype.kind not in REAL else f"{array.shape}"


def _message(error: Exception) -> str:
    """An error of another library on one line."""
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    return text or type(error).__name__
