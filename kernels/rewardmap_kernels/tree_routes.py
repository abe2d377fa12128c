"""What computes attention on a GPU: our kernels or flash attention over variable lengths, by a measured table.

``attention_routes.json`` beside this file holds what ``bench/routes.py`` measured, GPU by GPU. The choice is made once
per shape and said once; a GPU without a table gets our kernels. Nothing here is guessed from another GPU's numbers.
"""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .tree_varlen import why_not

TABLE = Path(__file__).with_name("attention_routes.json")
KERNELS = "tree_attention"
"""The name of our kernels among the routes."""
SEGMENTS = 0
"""In place of a forest's number of calls: segments that see themselves wholly, as in a vision tower."""

_LOGGER = logging.getLogger("rewardmap_kernels")


@cache
def table() -> dict[str, Any]:
    """By GPU name ``rows``: each with ``calls`` (of a forest; 0: the tower), ``dtype``, ``head_dim`` and ``seconds`` by
    route, forward and backward. Empty where nothing was measured."""
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.is_file() else {}
    return found


@cache
def choose_route(gpu: str, dtype: torch.dtype, head_dim: int, calls: int) -> tuple[str, str]:
    """(route, why) for forests of so many calls (``tree_varlen.Calls``) on a GPU of this name.

    The fastest of those that were measured there and can run here, summed over the measured forests of as many calls,
    or of the next more. A forest of more calls than any measured one runs by our kernels.
    """
    rows = [
        row
        for row in table().get(gpu, {}).get("rows", ())
        if row["dtype"] == str(dtype).removeprefix("torch.") and row["head_dim"] == head_dim and row["calls"] >= calls
    ]
    if calls == SEGMENTS:
        rows = [row for row in rows if row["calls"] == SEGMENTS]
    else:
        rows = [row for row in rows if row["calls"] == min(row["calls"] for row in rows)]
    usual = KERNELS if calls else _first_that_runs(dtype, head_dim)
    if not rows:
        return usual, f"nothing measured on {gpu} for {dtype}, head dimension {head_dim}"
    seconds = {
        route: sum(row["seconds"][route] for row in rows)
        for route in rows[0]["seconds"]
        if all(route in row["seconds"] for row in rows)
        and (route in (KERNELS, "sdpa") or why_not(route, dtype, head_dim) is None)
    }
    best = min(seconds, key=lambda route: seconds[route])
    others = ", ".join(f"{name} {1e3 * took:.2f} ms" for name, took in sorted(seconds.items(), key=lambda x: x[1]))
    return best, f"measured on {gpu}: {others}"


def _first_that_runs(dtype: torch.dtype, head_dim: int) -> str:
    return next((name for name in ("flash-attn", "torch-flash") if why_not(name, dtype, head_dim) is None), "sdpa")


@cache
def route_of(device: torch.device, dtype: torch.dtype, head_dim: int, calls: int) -> str:
    """The route for tensors on a device; said once."""
    route, why = choose_route(torch.cuda.get_device_name(device), dtype, head_dim, calls)
    what = f"forests of {calls} calls" if calls else "segments"
    _LOGGER.info("attention, head dimension %d, %s: %s (%s)", head_dim, what, route, why)
    return route


def describe(device: torch.device, dtype: torch.dtype, head_dim: int, tower_head_dim: int | None = None) -> str:
    """One line for people: what computes attention in a run on ``device``."""
    if device.type != "cuda":
        return "attention: torch's flash attention, block by block"
    gpu = torch.cuda.get_device_name(device)
    chosen: dict[str, list[str]] = {}
    why = ""
    for calls, what in ((1, "rows without sharing"), (2, "prompts with answers"), (3, "maps with questions")):
        route, why = choose_route(gpu, dtype, head_dim, calls)
        chosen.setdefault(route, []).append(what)
    parts = [next(iter(chosen))] if len(chosen) == 1 else [f"{name} for {', '.join(w)}" for name, w in chosen.items()]
    tower = f"; vision tower: {choose_route(gpu, dtype, tower_head_dim, SEGMENTS)[0]}" if tower_head_dim else ""
    return f"attention: {'; '.join(parts)} ({why}){tower}"
