"""Pictures and networks that rows of a data set point to: found, checked once, and shared between rows."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

from rewardmap.files import open_picture
from rewardmap.types import DataError, MetroData

_BEFORE_JSON = "\ufeff \t\r\n"
"""A byte-order mark, which many editors write, and JSON's own white space."""
_LONGEST_PATH = 1024
_LONGEST_SIDE = 200
"""Times the shorter one, at most: Qwen's image processors take no longer pictures."""


class Assets:
    """Checks each picture and stations file of a data folder once. ``networks`` fills as rows name them."""

    def __init__(self, root: Path, store: Path, max_image_pixels: int) -> None:
        """``root``: where paths begin. ``store``: the folder that they must not lead out of."""
        self.root = root
        self._store = store.resolve()
        self.networks: dict[str, MetroData] = {}
        self._max_pixels = max_image_pixels
        self._images: dict[str, str | bytes] = {}
        self._sources: dict[str, str] = {}
        self._bad: dict[str, str] = {}

    def image(self, figure: Any, where: str) -> str | bytes:
        """Absolute path, or encoded bytes, of a picture that opens and is complete. Raises DataError."""
        if isinstance(figure, dict):
            figure = figure.get("bytes") or figure.get("path")
        if isinstance(figure, str) and len(figure) <= _LONGEST_PATH:
            key, encoded = figure, None
        elif isinstance(figure, str):
            try:
                encoded = base64.b64decode(figure.rpartition("base64,")[2], validate=True)
            except binascii.Error as error:
                raise DataError(f"{where}: neither a path nor base64 ({error}): {figure[:40]!r}...") from error
            key = hashlib.sha256(encoded).hexdigest()
        elif isinstance(figure, bytes):
            key, encoded = hashlib.sha256(figure).hexdigest(), figure
        else:
            raise DataError(f"{where}: must be a path, base64 text or bytes, got {figure!r}")
        if key in self._bad:
            raise DataError(f"{where}: {self._bad[key]}")
        if key not in self._images:
            try:
                self._images[key] = self._checked(key, encoded)
            except DataError as error:
                self._bad[key] = str(error)
                raise DataError(f"{where}: {error}") from error
        return self._images[key]

    def _checked(self, key: str, encoded: bytes | None) -> str | bytes:
        name = f"the {len(encoded)} bytes of the picture" if encoded is not None else repr(key)
        path = self._inside(key) if encoded is None else None
        try:
            with open_picture(path if path is not None else encoded or b"") as picture:
                pixels = picture.width * picture.height
                if pixels > self._max_pixels:
                    raise DataError(
                        f"{name} has {picture.width} x {picture.height} pixels, more than the limit of "
                        f"{self._max_pixels}; make it smaller"
                    )
                if max(picture.size) > _LONGEST_SIDE * min(picture.size):
                    raise DataError(
                        f"{name} has {picture.width} x {picture.height} pixels; no side may be more than "
                        f"{_LONGEST_SIDE} times the other"
                    )
                # verify() walks a PNG's chunks and checksums without decoding; other formats must be decoded.
                if picture.format == "PNG":
                    picture.verify()
                else:
                    picture.load()
        except DataError:
            raise
        except FileNotFoundError:
            raise DataError(f"{name} does not exist under {self.root}; the maps folder is incomplete") from None
        except Exception as error:  # Pillow's decoders raise many types for broken data
            raise DataError(f"{name} is not a complete picture ({error}); fetch it again") from error
        return str(path) if path is not None else encoded or b""

    def _inside(self, name: str) -> Path:
        path = self.root / name
        try:
            inside = path.resolve().is_relative_to(self._store)
        except (OSError, ValueError, RuntimeError) as error:  # a null character, links in a circle
            raise DataError(f"{name!r} is no path ({error})") from error
        if not inside:
            raise DataError(f"{name!r} lies outside the data folder {self.root}; only files inside are read")
        return path

    def network(self, network_id: str, source: Any, where: str) -> str:
        """Registers the network a row names and returns its id. Raises DataError, also if two rows disagree."""
        key = source if isinstance(source, str) else json.dumps(source, sort_keys=True, ensure_ascii=False)
        known = self._sources.get(network_id)
        if known is not None:
            if known != key:
                raise DataError(f"{where}: {network_id} has another network in an earlier row: {known[:80]!r}")
            return network_id
        if key in self._bad:
            raise DataError(f"{where}: {self._bad[key]}")
        try:
            self.networks[network_id] = self._network(source)
        except DataError as error:
            self._bad[key] = str(error)
            raise DataError(f"{where}: {error}") from error
        self._sources[network_id] = key
        return network_id

    def _network(self, source: Any) -> MetroData:
        name = "the network"
        if isinstance(source, str) and not source.lstrip(_BEFORE_JSON).startswith("{"):
            name = f"stations file {source!r}"
            try:
                source = self._inside(source).read_bytes()
            except OSError as error:
                raise DataError(
                    f"{name} cannot be read under {self.root} ({error.strerror}); "
                    "ReasonMap ships these files, RewardMap does not"
                ) from error
        return parse_metro_data(source, name) if isinstance(source, (str, bytes)) else check_metro_data(source, name)


def parse_metro_data(content: str | bytes, name: str) -> MetroData:
    """What a stations file, or a table's JSON text, holds as a flat network. Raises DataError for what is not JSON, for
    a line that it holds twice, and as ``check_metro_data``."""

    def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        named = dict(pairs)
        if len(named) < len(pairs):  # of a name's values only the last would be kept
            [(line, _)] = Counter(line for line, _ in pairs).most_common(1)
            raise DataError(f"{name}: line {line!r} stands twice; give the line one list with all its stations")
        return named

    try:
        text = content.decode() if isinstance(content, bytes) else content
        return check_metro_data(json.loads(text.lstrip(_BEFORE_JSON), object_pairs_hook=each_once), name)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 ({error}); save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is not JSON ({error})") from error


def check_metro_data(source: Any, name: str) -> MetroData:
    """``source`` as a flat network. Columns that a table holds for other cities' lines come as None and are
    dropped.

    Raises DataError, naming the line, unless it is an object of lists of at least two station names each, whose lines
    differ in more than case and spaces. Names are given ``composed``.
    """
    if not isinstance(source, dict):
        raise DataError(f"{name} must be an object of line names and station lists, got {type(source).__name__}")
    network = {line: stops for line, stops in source.items() if stops is not None}
    if not network:
        raise DataError(f"{name} has no lines")
    names: dict[str, str] = {}
    for line, stops in network.items():
        other = names.setdefault(" ".join(composed(line).split()).casefold(), line)
        if other != line:
            remedy = "give the line one list with all its stations"
            raise DataError(f"{name}: lines {other!r} and {line!r} differ in case and spaces only; {remedy}")
        if not isinstance(stops, list) or not all(isinstance(stop, str) and stop.strip() for stop in stops):
            raise DataError(f"{name}: line {line!r} must be a list of station names, got {stops!r}")
        if len(stops) < 2:
            raise DataError(f"{name}: line {line!r} has {len(stops)} stop(s), at least 2 are needed")
    return {composed(line): composed(stops) for line, stops in network.items()}


def composed(value: Any) -> Any:
    """JSON values with all text in Unicode's composed form (NFC), the one that tokenizers write: the published rewards
    compare names letter by letter, and ``ü`` may also be stored as ``u`` and a mark."""
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    if isinstance(value, list):
        return [composed(item) for item in value]
    if isinstance(value, dict):
        return {composed(key): composed(item) for key, item in value.items()}
    return value
