"""True topology out of the flat lists of the released data, and networks as JSON.

How a flat list is read, in this order:

1. Markers and surrounding spaces are removed; a transfer is where two lines list one name, whatever is marked.
2. A list that ends with its own first stop is a loop. The released lists that are circular but stored open
   (``CIRCULAR``) are loops too.
3. A stop marked as branch point is a junction: the list runs to the end of the trunk, then goes on with the branch,
   whose stops follow each other away from the junction. The list does not say where it starts, so the first stops of
   the released branches are given in ``BRANCH_STARTS`` (or by the caller). The branch's trains run through to the
   longer arm of the trunk. A branch whose start is unknown stays in the trunk, as the published reward has it.
4. Lines that list the same neighbours share that track; nothing needs to be said about it.

A name that stands twice in one list without closing it (two New York lines) means two stations; both stay in
the order of the list.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from rewardmap.transit.graph import Branch, Line, Network
from rewardmap.types import DataError, MetroData

TRANSFER_MARKS = ("(Transfer Station)", "（换乘站）")
BRANCH_MARKS = ("(Branch-starting Station)", "（支线起始站）")
CIRCULAR: dict[str, tuple[str, ...]] = {"china/beijing": ("Line 2", "Line 10"), "china/xian": ("Line 8",)}
"""Lines of the released data that are circular although their lists are open."""
BRANCH_STARTS = frozenset(
    (
        "通世泰站",
        "复兴集站",
        "市级行政中心站",
        "江川路站",
        "龙柏新村站",
        "上海赛车场站",
        "lbn Battuta Station",
        "Bayfront Station",
        "S. Agnese Station",
    )
)
"""First stops of the branches of Dalian 3, Hefei 4, Kunming 1, Shanghai 5, 10 and 11, Dubai Red, Singapore
Circle and Rome B, spelt as the released lists spell them."""


def bare_name(stop: str) -> str:
    """The station's name without markers and surrounding spaces."""
    for mark in (*TRANSFER_MARKS, *BRANCH_MARKS):
        stop = stop.replace(mark, "")
    return stop.strip()


def is_junction(stop: str) -> bool:
    """Whether a list marks the station as one where a branch leaves."""
    return any(mark in stop for mark in BRANCH_MARKS)


def network_from_lists(
    network_id: str,
    lists: MetroData,
    *,
    level: str = "middle",
    branch_starts: Collection[str] = BRANCH_STARTS,
) -> Network:
    """The network behind flat lists, by the rules above. It has no picture; ``metro_data`` gives the lists
    back.

    ``branch_starts``: bare names of the first stops of branches. Raises DataError for a list without two
    stops.
    """
    lines = []
    for name, stops in lists.items():
        if len(stops) < 2:
            raise DataError(f"{network_id}: line {name!r} has {len(stops)} stop(s), at least 2 are needed")
        lines.append(_line(name, stops, name in CIRCULAR.get(network_id, ()), branch_starts))
    extras = {"lists": {name: list(stops) for name, stops in lists.items()}}
    return Network(network_id, level, tuple(lines), {}, style="none", extras=extras)


def _line(name: str, stops: Sequence[str], circular: bool, branch_starts: Collection[str]) -> Line:
    bare = [bare_name(stop) for stop in stops]
    closed = len(bare) > 3 and bare[0] == bare[-1]
    if closed or circular:
        return Line(name, "#000000", tuple(bare[:-1] if closed else bare), loop=True)
    joints = [at for at, stop in enumerate(stops) if is_junction(stop)]
    cuts = [at for at, stop in enumerate(bare) if stop in branch_starts and joints and at > joints[0]]
    if not cuts or len(cuts) != len(joints) or joints[-1] >= cuts[0]:
        return Line(name, "#000000", tuple(bare))
    trunk = bare[: cuts[0]]
    branches = []
    for joint, first, end in zip(joints, cuts, [*cuts[1:], len(bare)], strict=True):
        towards = "start" if joint >= len(trunk) - 1 - joint else "end"
        branches.append(Branch((bare[joint], *bare[first:end]), towards))
    return Line(name, "#000000", tuple(trunk), branches=tuple(branches))


def network_as_json(network: Network) -> dict[str, Any]:
    """Everything about a network as JSON values: topology, positions, and the geometry of its picture."""
    return {
        "network_id": network.network_id,
        "level": network.level,
        "size": list(network.size),
        "style": network.style,
        "lines": [
            {
                "name": line.name,
                "colour": line.colour,
                "stations": list(line.stations),
                "loop": line.loop,
                "branches": [{"stations": list(b.stations), "towards": b.towards} for b in line.branches],
                **({"one_way": True} if line.one_way else {}),
            }
            for line in network.lines
        ],
        "positions": {stop: list(at) for stop, at in network.positions.items()},
        "extras": dict(network.extras),
    }


def network_from_json(content: Mapping[str, Any]) -> Network:
    """The network that ``network_as_json`` wrote. Raises KeyError or TypeError for anything else."""
    return Network(
        content["network_id"],
        content["level"],
        tuple(
            Line(
                line["name"],
                line["colour"],
                tuple(line["stations"]),
                line["loop"],
                tuple(Branch(tuple(branch["stations"]), branch["towards"]) for branch in line["branches"]),
                line.get("one_way", False),
            )
            for line in content["lines"]
        ),
        {stop: (float(x), float(y)) for stop, (x, y) in content["positions"].items()},
        (content["size"][0], content["size"][1]),
        content["style"],
        content["extras"],
    )


def read_network(root: Path, network_id: str, lists: MetroData) -> Network:
    """The true network of a map: from ``geometry/<network_id>.json`` where the data set has it, else from the
    lists. A name that leads out of ``geometry/`` has no file there.

    Raises DataError for a geometry file that cannot be read.
    """
    name = PurePosixPath(f"{network_id}.json")
    path = root / "geometry" / name
    # Path.is_file raises for a name that is too long.
    if name.is_absolute() or ".." in name.parts or not os.path.isfile(path):
        return network_from_lists(network_id, lists)
    try:
        return network_from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: not a network as this package writes it ({error!r}); remove the file") from error
