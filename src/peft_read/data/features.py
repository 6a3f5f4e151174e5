"""FeatureStore: the video features of a dataset, read item by item from files or from one archive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

__all__ = ["FeatureStore"]

SHOWN = 5  # ids listed in an error message


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

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: an archive without the arrays above.

    Example:
        ```python
        store = FeatureStore("how2/video_features")
        store["abc123"].shape  # (frames, width)
        ```
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._archive: dict[str, np.ndarray] | None = None
        self._files: dict[str, Path] = {}
        if self.path.is_dir():
            self._files = {file.stem: file for file in sorted(self.path.iterdir()) if file.suffix in (".npy", ".npz")}
            if not self._files:
                raise FileNotFoundError(f"{self.path} holds no .npy or .npz feature file")
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
        return _read_file(self._files[video_id])

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
        problems: dict[str, list[str]] = {}
        for video_id in dict.fromkeys(video_ids):
            if video_id not in self:
                problems.setdefault("have no features", []).append(video_id)
                continue
            features = self[video_id]
            width = features.shape[1] if width is None else width
            if features.shape[1] != width:
                problems.setdefault(f"have not the width {width}", []).append(f"{video_id} ({features.shape[1]})")
            elif not len(features):
                problems.setdefault("have no frame", []).append(video_id)
            elif not np.isfinite(features).all():
                frame = int(np.flatnonzero(~np.isfinite(features).all(1))[0])
                problems.setdefault("hold NaN or infinite values", []).append(f"{video_id} (frame {frame})")
        if problems:
            listed = "; ".join(
                f"{len(ids)} ids {what}: {', '.join(ids[:SHOWN])}{' ...' if len(ids) > SHOWN else ''}"
                for what, ids in problems.items()
            )
            raise ValueError(f"features in {self.path}: {listed}")
        if width is None:
            raise ValueError("no ids were given to check")
        return width


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


def _read_file(path: Path) -> np.ndarray:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        features = loaded
    else:
        with loaded:
            name = "features" if "features" in loaded.files else loaded.files[0]
            if name != "features" and len(loaded.files) > 1:
                raise ValueError(f"{path} holds {loaded.files}; name the feature array 'features'")
            features = loaded[name]
    if features.ndim != 2:
        raise ValueError(f"{path} holds an array of shape {features.shape}; features are (frames, width)")
    return features.astype(np.float32)
