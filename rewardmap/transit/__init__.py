"""Transit maps: networks, pictures, questions and data sets. No torch here."""

from rewardmap.transit.graph import Branch, Leg, Line, Network, Route
from rewardmap.transit.questions import gold_response
from rewardmap.transit.reasonmap import MapData, load_dataset, write_dataset

__all__ = [
    "Branch",
    "Leg",
    "Line",
    "MapData",
    "Network",
    "Route",
    "gold_response",
    "load_dataset",
    "write_dataset",
]
