"""The tiny presets keep their bytes: the shipped warm start and the README's table were made on them."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from rewardmap.transit.draw import draw_map
from rewardmap.transit.export import PRESET_LEVELS
from rewardmap.transit.generate import generate_network
from rewardmap.transit.questions import Balance, make_questions
from rewardmap.transit.topology import network_as_json

KEPT = {
    "tiny": {
        "networks": "cc07542e7f67b109c34c9573ef0151b382c50d34536bfe24e9d1ccc7844422a4",
        "pictures": "d7d25fd8018cb68ba521148d4bc914bb95cd543f4203e9f9e675b3d865f5d181",
        "questions": "51b72c3fce8d9d44da8664e504fb976ea9e3865f616d05d45e5e5817482069f8",
    },
    "grid-tiny": {
        "networks": "eb8c2a61a959a48da99833f0ef07a310f8dcd6c60b84a67e9c9f82e87b2b7015",
        "pictures": "9a21233e7a045de9920fa73ddabd05f502a9581ab28b52a8de965a8b704f71d4",
        "questions": "15b73100a8758ab710ca84f48161bf7b1e0bd2378673bf4efce99bf4d0992254",
    },
}
"""SHA-256 over 60 maps, the same since generator version 1.0. A new value needs new weights and a new table."""


@pytest.mark.parametrize("preset", list(KEPT))
def test_a_seed_gives_the_bytes_it_always_gave(preset: str) -> None:
    found = {name: hashlib.sha256() for name in KEPT[preset]}
    levels, balance = PRESET_LEVELS[preset], Balance()
    for index in range(60):
        rng = np.random.default_rng([0, index])
        network = generate_network(levels[index % len(levels)], rng, f"tiny/{index}")
        found["networks"].update(json.dumps([network_as_json(network), network.metro_data()]).encode())
        found["pictures"].update(draw_map(network).tobytes())
        found["questions"].update(json.dumps(make_questions(network, preset, rng, balance)).encode())
    assert {name: digest.hexdigest() for name, digest in found.items()} == KEPT[preset]
