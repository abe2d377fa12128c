"""``rewardmap show``: a generated map with a route, a question or an answer laid over it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from rewardmap.rewards.parse import clean, split_legs
from rewardmap.transit import Leg, Network, load_dataset
from rewardmap.transit.draw import draw_map
from rewardmap.transit.overlay import draw_ride, draw_route, draw_stops, with_caption
from rewardmap.transit.topology import read_network
from rewardmap.types import DataError, Problem

_FOLDERS = ("maps", "geometry", "stations")


def show(
    path: Path,
    *,
    route: tuple[str, str] | None = None,
    question: str | None = None,
    answer: str | None = None,
) -> Image.Image:
    """The map with at most one thing laid over it: the best route between two stations, the question of a uid with
    its steps, or a planning answer (text, or a file with it). RGB. Raises DataError for what cannot be shown."""
    root, network = read_map(path)
    if route is not None:
        return best_route(network, route)
    if question is not None:
        return question_on_map(network, find_problem(root, network.network_id, question))
    if answer is not None:
        return answer_on_map(network, read_answer(answer))
    return draw_map(network)


def read_map(path: Path) -> tuple[Path, Network]:
    """The data folder and the network of a map: any of its files under maps/, geometry/ or stations/.

    Raises DataError for another path, and for a map whose geometry the folder does not have.
    """
    whole = path.absolute()
    country, kind = whole.parent, whole.parent.parent
    root, network_id = kind.parent, f"{country.name}/{path.stem}"
    geometry = root / "geometry" / f"{network_id}.json"
    if not path.is_file() or kind.name not in _FOLDERS:
        fault = "not the file of a map" if path.is_file() else "no such file"
        raise DataError(f"{path}: {fault}; name a map of a data folder, such as DIR/maps/COUNTRY/CITY.png")
    if not geometry.is_file():
        raise DataError(
            f"{path}: its coordinates are not known ({geometry} is missing); only generated maps, inside the folder "
            "that `rewardmap generate` wrote, can be drawn over"
        )
    return root, read_network(root, network_id, {})


def find_problem(root: Path, network_id: str, uid: str) -> Problem:
    """The question of that name about that map. Raises DataError naming near misses."""
    saved = [path.parent.name for path in root.glob("data/ReasonMap-Train/*/state.json")]
    splits = sorted({*saved, *(path.name.split("-")[0] for path in root.glob("data/*.parquet"))})
    about: list[str] = []
    for split in splits:
        for problem in load_dataset(root, split).problems:
            if problem.network_id == network_id:
                if problem.uid == uid:
                    return problem
                about.append(problem.uid)
    some = f"the map has {len(about)}, such as {about[0]} and {about[-1]}" if about else "the map has none"
    raise DataError(f"{root}: no question {uid!r} about {network_id}; {some}")


def best_route(network: Network, ends: Sequence[str]) -> Image.Image:
    """The first optimal route between two stations, with its legs below. Raises DataError for a name not on the map."""
    start, goal = (_station(network, name) for name in ends)
    if start == goal:
        raise DataError(f"--route needs two different stations, got {start!r} twice")
    routes = network.shortest_routes(start, goal)
    if not routes:
        raise DataError(f"{network.network_id}: no way leads from {start!r} to {goal!r}")
    legs = routes[0]
    more = f" (one of {len(routes)} equally good routes)" if len(routes) > 1 else ""
    return with_caption(draw_route(network, legs), "\n".join(map(_told, legs)) + more)


def question_on_map(network: Network, problem: Problem) -> Image.Image:
    """What a question is about and the steps to its answer, with its text and answer below."""
    steps, text = problem.fine_grained_answer, problem.question.strip()
    if problem.kind == "planning":
        plan = [
            Leg(leg["route_name"], leg["departure_stop"], leg["arrival_stop"], tuple(leg["via_stops"]))
            for leg in steps[0]
        ]
        asked = text.split("?")[0] + "?"  # without how to write the answer
        return with_caption(draw_route(network, plan), "\n".join([asked, *map(_told, plan)]))
    if problem.kind == "Counting1":
        picture = draw_ride(network, [problem.station_1, *steps, problem.station_2])
        answer = f"{'ABCD'[problem.answer]} ({len(steps)} stops between)"
    elif problem.kind == "Counting3":
        picture, answer = draw_stops(network, [], steps), f"{problem.answer}: {', '.join(steps)}"
    else:
        stops = [name for name in (problem.station_1, problem.station_2) if name in network.positions]
        lines = list(dict.fromkeys(line for through in steps.values() for line in through))
        picture = draw_stops(network, stops, lines)
        told = "; ".join(f"{stop}: {', '.join(through)}" for stop, through in steps.items())
        answer = str(problem.answer) if problem.kind == "Counting2" else "yes" if problem.answer else "no"
        answer += f" ({told})"
    asked = text[max(0, text.find("According to")) :]
    return with_caption(picture, f"{asked}\nAnswer: {answer}")


def answer_on_map(network: Network, answer: str) -> Image.Image:
    """The legs that an answer states, read as the reward reads them, with what is wrong with each below.

    A leg that no train makes runs straight, dashed in red; one with an unknown line or station is only told.
    Raises DataError for an answer without a leg.
    """
    stated, _ = split_legs(answer)
    if not stated:
        raise DataError("the answer states no leg: it needs 'Route Name: ', 'Departure Stop: ' and 'Arrival Stop: '")
    known = {clean(clean(stop)): stop for stop in network.stations}
    names = {line.name for line in network.lines}
    legs: list[Leg] = []
    told: list[str] = []
    before: str | None = None
    for leg in stated:
        ends = [known.get(leg.departure), known.get(leg.arrival)]
        faults = [f"no line {leg.line!r}"] if leg.line not in names else []
        faults += [f"no station {said!r}" for said, end in zip(leg[1:3], ends, strict=True) if end is None]
        if not faults:
            start, goal = str(ends[0]), str(ends[1])
            ride = network.ride(leg.line, start, goal)
            legs.append(ride or Leg(leg.line, start, goal, ()))
            faults += [] if ride else ["no train of this line makes this ride"]
            faults += ["does not begin where the leg before ends"] if before not in (None, start) else []
            before = goal
        told.append(
            f"{leg.line}: {ends[0] or leg.departure} → {ends[1] or leg.arrival}"
            + (f"   WRONG: {', '.join(faults)}" if faults else "")
        )
    return with_caption(draw_route(network, legs), "\n".join(told))


def read_answer(text: str) -> str:
    """``text`` itself, or the content of the file of that name (a JSON object's ``response``). Raises DataError."""
    path = Path(text)
    if "\n" in text or len(text) > 250 or not path.is_file():
        if path.suffix in (".txt", ".json"):
            raise DataError(f"--answer {text}: no such file; give the answer itself or the file that holds it")
        return text.replace("\\n", "\n")
    try:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            return str(json.loads(content)["response"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: not text, nor a JSON object with a 'response' ({error!r})") from error
    return content


def _station(network: Network, name: str) -> str:
    for stop in network.stations:
        if name == stop or clean(clean(name)) == clean(clean(stop)):
            return stop
    from difflib import get_close_matches

    near = get_close_matches(name, network.stations, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has, for example, {network.stations[0]!r}"
    raise DataError(f"{network.network_id}: no station {name!r}; {hint}")


def _told(leg: Leg) -> str:
    via = f", {len(leg.via)} between" if leg.via else ""
    return f"{leg.line}: {leg.departure} → {leg.arrival}{via}"
