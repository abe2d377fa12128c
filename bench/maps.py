"""What a map costs: seconds to invent, draw and write one, by level and number of stations.

    python bench/maps.py    # writes bench/results/maps.json and the table in docs/maps/README.md

Processor seconds of one thread; drawing is the least of three. ``exponent``: slope of log(seconds to draw) over
log(stations), and of log(seconds) over log(pixels), for all maps together; 1 is linear.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from records import processor, write_between

from rewardmap.transit.draw import draw_map, encode_png
from rewardmap.transit.export import GENERATOR_VERSION
from rewardmap.transit.generate import generate_network
from rewardmap.transit.questions import Balance, make_questions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "maps.json"
PAGE = ROOT / "docs" / "maps" / "README.md"
START, END = "<!-- cost-table:start -->", "<!-- cost-table:end -->"
COUNTS = {"easy": 8, "middle": 8, "hard": 6}


def main() -> None:
    rows = [measure(level, seed) for level, count in COUNTS.items() for seed in range(count)]
    logs = {key: np.log([row[key] for row in rows]) for key in ("draw_seconds", "stations", "pixels")}
    exponents = {
        key: round(float(np.polyfit(logs[key], logs["draw_seconds"], 1)[0]), 2) for key in ("stations", "pixels")
    }
    about_4_megapixels = [row["draw_seconds"] for row in rows if row["level"] == "hard" and row["pixels"] <= 4_400_000]
    result = {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "pillow": PIL.__version__,
        "generator_version": GENERATOR_VERSION,
        "draw_exponent": exponents,
        "hard_up_to_4.4_megapixels": {"maps": len(about_4_megapixels), "slowest_draw": max(about_4_megapixels)},
        "maps": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_between(PAGE, START, END, table(result))
    print(table(result))


def measure(level: str, seed: int) -> dict[str, Any]:
    """One map: its size and what each step took."""
    rng = np.random.default_rng([21, seed])
    start = time.process_time()
    network = generate_network(level, rng, f"bench/{level}")
    invent = time.process_time() - start
    draws = []
    for _ in range(3):
        start = time.process_time()
        picture = draw_map(network)
        draws.append(time.process_time() - start)
    start = time.process_time()
    encode_png(picture)
    encode = time.process_time() - start
    start = time.process_time()
    make_questions(network, "full", rng, Balance())
    ask = time.process_time() - start
    return {
        "level": level,
        "seed": seed,
        "lines": len(network.lines),
        "stations": len(network.stations),
        "size": list(network.size),
        "pixels": network.size[0] * network.size[1],
        "invent_seconds": round(invent, 3),
        "draw_seconds": round(min(draws), 4),
        "png_seconds": round(encode, 4),
        "questions_seconds": round(ask, 3),
    }


def table(result: dict[str, Any]) -> str:
    """Medians and, in brackets, the most by level."""
    lines = [
        "| level | stations | megapixels | invent | draw | PNG | questions |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for level in COUNTS:
        rows = [row for row in result["maps"] if row["level"] == level]
        cells = [f"{statistics.median(row['stations'] for row in rows):.0f}"]
        cells.append(f"{statistics.median(row['pixels'] for row in rows) / 1e6:.1f}")
        for key in ("invent_seconds", "draw_seconds", "png_seconds", "questions_seconds"):
            values = [row[key] for row in rows]
            cells.append(f"{statistics.median(values):.2f} ({max(values):.2f})")
        lines.append(f"| {level} | {' | '.join(cells)} |")
    exponents = result["draw_exponent"]
    near = result["hard_up_to_4.4_megapixels"]
    lines.append("")
    lines.append(
        f"Processor seconds of one thread on {result['machine']['processor']}: median and, in brackets, the most of "
        f"the maps measured. Drawing grows with stations to the power {exponents['stations']}, with pixels to the "
        f"power {exponents['pixels']}; of the {near['maps']} hard maps of up to 4.4 megapixels (about 2,000 × 2,000) "
        f"none took more than {near['slowest_draw']:.2f} s to draw."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
