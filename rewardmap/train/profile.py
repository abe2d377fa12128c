"""``rewardmap profile``: a few steps under ``torch.profiler``; a trace, a table by phase, a roofline picture."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity

from rewardmap.config import Config
from rewardmap.files import replacing, write_text
from rewardmap.train.parallel import computes_in
from rewardmap.train.plan import HFU
from rewardmap.train.run import timed_step
from rewardmap.train.shared_pictures import share_pictures
from rewardmap.train.start import begin_folder, join, set_up

WARMUP = 1
"""Steps before the profiled ones: what compiles or is cached at first use does so there."""
INK, MUTED, GRID, POINT = "#1c2430", "#5d6673", "#e6e8ec", "#1a5fd0"


@dataclass(frozen=True)
class Product:
    """All matrix products of one shape."""

    name: str
    flop: float
    bytes: float
    """Of both factors and the result, once each: the least that must move."""
    seconds: float
    count: int

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flop / self.bytes

    @property
    def rate(self) -> float:
        """FLOP/s."""
        return self.flop / self.seconds


def profile(config: Config, out: Path, *, steps: int, console: Console) -> Path:
    """Make the first steps of a run and write ``trace-rank<N>.json.gz`` of every rank and, from rank 0, ``profile.md``
    and ``roofline.png`` into a new folder.

    Raises:
        ConfigError, DataError: as a run's.
    """
    with join(config) as ranks:
        out = Path(ranks.gather(str(out))[0])
        ranks.first(lambda: begin_folder(config, out))
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        with share_pictures(ranks, config.policy.image_cache_bytes) as pictures:
            quiet = Console(quiet=True)
            trainer, _, _ = set_up(config, out, console if ranks.is_first else quiet, ranks, pictures)
            try:
                for _ in range(WARMUP):
                    trainer.train_step()
                trainer.timer.end_step()
                with torch.profiler.profile(activities=activities, record_shapes=True, with_flops=True) as profiler:
                    rows = [timed_step(trainer) for _ in range(steps)]
            finally:
                trainer.engine.close()
        profiler.export_chrome_trace(str(out / f"trace-rank{ranks.rank}.json.gz"))
        if ranks.is_first:
            events = profiler.key_averages(group_by_input_shape=True)
            itemsize = computes_in(config).itemsize
            products = sorted(matrix_products(events, itemsize), key=lambda product: -product.seconds)
            flops, bandwidth = ceilings(trainer.policy.device, config)
            text = report(rows, products, profiler.key_averages(), flops)
            write_text(out / "profile.md", text)
            draw_roofline(products, flops, bandwidth, out / "roofline.png")
            console.print(text, highlight=False, markup=False, soft_wrap=True)
            where = f"folder: {out} (open the trace in chrome://tracing or ui.perfetto.dev)"
            console.print(where, highlight=False, soft_wrap=True)
        ranks.wait()
    return out


def report(rows: Sequence[Mapping[str, Any]], products: Sequence[Product], events: Any, flops: float) -> str:
    """Markdown: mean seconds of a step by phase, what ``rewardmap plan`` says of them, speed, the operators and matrix
    products that took longest. ``flops``: the device's ceiling in FLOP/s."""
    phases: dict[str, float] = {}
    for row in rows:
        for phase, seconds in row["seconds"].items():
            phases[phase] = phases.get(phase, 0.0) + seconds / len(rows)
    whole = sum(phases.values())
    lines = [f"Mean of {len(rows)} steps, under the profiler.", "", "| phase | s | share |", "| --- | ---: | ---: |"]
    lines += [f"| {phase} | {s:.3f} | {s / whole:.0%} |" for phase, s in sorted(phases.items(), key=lambda x: -x[1])]
    lines.append(f"| in all | {whole:.3f} | |")
    planned = sum(row["slowest_flop"] for row in rows) / len(rows) / (flops * HFU)
    if planned:
        lines += [
            "",
            f"`train` as `rewardmap plan` counts it, at {HFU:.0%} of the {flops / 1e9:,.0f} GFLOP/s of a large matrix "
            f"product here: {planned:.3f} s; measured {phases['train'] / planned - 1:+.0%}.",
        ]
    lines += ["", "| speed | |", "| --- | ---: |"]
    names = list(dict.fromkeys(name for row in rows for name in row["speed"]))
    for name in names:
        values = [row["speed"][name] for row in rows if name in row["speed"]]
        lines.append(f"| {name} | {sum(values) / len(values):,.4g} |")
    lines += ["", "| operator | s, itself | calls |", "| --- | ---: | ---: |"]
    slowest = sorted(events, key=lambda event: -_seconds(event))[:12]
    lines += [
        f"| {event.key} | {_seconds(event):.3f} | {event.count} |" for event in slowest if event.key not in phases
    ]
    lines += ["", "| matrix product | GFLOP/s | FLOP per byte | s | calls |", "| --- | ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {p.name} | {p.rate / 1e9:,.1f} | {p.intensity:,.1f} | {p.seconds:.3f} | {p.count} |" for p in products[:12]
    ]
    return "\n".join(lines) + "\n"


def matrix_products(events: Any, itemsize: int) -> Iterator[Product]:
    """Those among a profiler's events, which are grouped by shape; factors of ``itemsize`` bytes an entry."""
    for event in events:
        factors = [shape for shape in event.input_shapes or [] if len(shape) >= 2][-2:]
        seconds = _seconds(event)
        if (
            event.key not in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
            or len(factors) < 2
            or not seconds
        ):
            continue
        left, right = factors
        moved = prod(left) + prod(right) + prod(left[:-1]) * right[-1]
        name = f"{event.key.removeprefix('aten::')} {'×'.join(map(str, left))} by {'×'.join(map(str, right))}"
        yield Product(name, float(event.flops), float(event.count * moved * itemsize), seconds, event.count)


def _seconds(event: Any) -> float:
    """An operator's own time: on the GPU where there is one, else on the CPU."""
    micro = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
    return float(micro) / 1e6


def ceilings(device: torch.device, config: Config) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s of a large copy, measured here: the best of a few. The product is of
    random numbers: a GPU multiplies equal ones faster, on less power."""
    dtype = computes_in(config)
    size = 8192 if device.type == "cuda" else 1024
    square = torch.randn(size, size, dtype=dtype, device=device)
    block = torch.ones(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    return 2 * size**3 / _best(lambda: square @ square), 2 * block.numel() / _best(lambda: other.copy_(block))


def _best(work: Any, tries: int = 20) -> float:
    times = []
    for _ in range(tries):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def draw_roofline(products: Sequence[Product], flops: float, bandwidth: float, path: Path) -> None:
    """Matrix products under the device's two ceilings (Williams et al., 2009); a point's area is its share of their
    time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ridge = flops / bandwidth
    low, high = (f(p.intensity for p in products) if products else ridge for f in (min, max))
    ends = [min(low, ridge) / 4, ridge, max(high, ridge) * 4]
    axes.plot(ends, [ends[0] * bandwidth, flops, flops], color=INK, linewidth=1.6)
    axes.annotate(f"{bandwidth / 1e9:,.0f} GB/s", (ends[0], ends[0] * bandwidth), (14, 0), textcoords="offset points",
                  color=MUTED)  # fmt: skip
    axes.annotate(f"{flops / 1e9:,.0f} GFLOP/s", (ends[2], flops), (-4, 6), textcoords="offset points", color=MUTED,
                  ha="right")  # fmt: skip
    whole = sum(product.seconds for product in products) or 1.0
    axes.scatter([p.intensity for p in products], [p.rate for p in products],
                 s=[20 + 900 * p.seconds / whole for p in products], color=POINT, alpha=0.45, linewidths=0)  # fmt: skip
    for place, product in enumerate(products[:5], 1):
        axes.annotate(str(place), (product.intensity, product.rate), (9, 5), fontsize=9, color=INK,
                      textcoords="offset points")  # fmt: skip
    slowest = [f"{place}  {product.name}" for place, product in enumerate(products[:5], 1)]
    axes.text(0.98, 0.04, "\n".join(slowest), transform=axes.transAxes, ha="right", fontsize=8, color=INK)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte", color=MUTED)
    axes.set_ylabel("FLOP/s", color=MUTED)
    axes.set_title("matrix products under the ceilings measured on this device", loc="left", fontsize=11, color=INK)
    axes.grid(True, which="major", color=GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with replacing(path) as file:
        figure.savefig(file, format="png")
