"""The tables of docs/kernels.md from the result files: ``python bench/kernel_tables.py [--check]``.

Reads ``bench/results/kernels-*.json`` (``pytest bench/bench_kernels.py``) and ``kernels-*.jsonl`` (``bench/gpu.py
--stage kernels``; the last passing row of each case) and rewrites the text between the two markers. ``--check``
writes nothing and exits with 1 where the page is out of date. Ratios everywhere; absolute times from GPUs alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
from records import RESULTS, ROOT, Row, between, read_rows

PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
TITLES = {
    "linear_policy_loss": "Head with policy loss, forward and backward",
    "linear_policy_loss.frozen": "The same with a frozen head",
    "logits_policy_loss": "Policy loss from logits, gradient included",
    "selective_log_softmax": "Log-probabilities and entropy of logits, forward",
    "group_advantage": "Group advantage",
    "tree_attention": "Attention of a prompt with eight answers, forward and backward",
    "tune": "Row kernels by block and warps",
}


def machines(folder: Path) -> dict[str, tuple[bool, dict[str, Row]]]:
    """Heading -> (whether it is a GPU, rows by case) of every result file."""
    found: dict[str, tuple[bool, dict[str, Row]]] = {}
    for path in sorted(folder.glob("kernels-*.json")):
        stored = json.loads(path.read_text(encoding="utf-8"))
        threads = f"{stored['threads']} thread{'s' * (stored['threads'] > 1)}"
        gpu = any("peak_bytes" in row for row in stored["rows"].values())
        found[f"{stored['device']}, {threads}, torch {stored['torch']}"] = (gpu, stored["rows"])
    for path in sorted(folder.glob("kernels-*.jsonl")):
        good = [row for row in read_rows(path) if row.get("ok") and row.get("counts") and row["device"] == "cuda"]
        for row in good:
            commit = (row["commit"] or "no commit")[:12]
            about = f"{row['gpu']}, driver {row['driver']}, torch {row['torch']}, triton {row['triton']}, {commit}"
            found.setdefault(about, (True, {}))[1][row["item"]] = row
    return found


def tables(gpu: bool, rows: dict[str, Row]) -> list[str]:
    """Lines of Markdown: a table per operation, a line per case, a column per peer."""
    lines: list[str] = []
    for operation, title in TITLES.items():
        mine = {name: row for name, row in rows.items() if row["operation"] == operation}
        if not mine:
            continue
        peers = list(dict.fromkeys(p for row in mine.values() for p in row["times_faster_than"] if p != "floor"))
        heads = ["case", "ran by", *(["ours"] if gpu else []), *(f"× {peer}" for peer in peers), "of the floor"]
        heads += ["TFLOP/s useful", "GB/s", "peak GB"] * gpu + ["error", "eager's"]
        lines += [f"**{title}**", "", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
        for name, row in mine.items():
            lines.append(f"| {' | '.join([name, *_cells(row, peers, gpu)])} |")
        if gpu and operation == "group_advantage":
            lines += [line for row in mine.values() for line in _launches(row)]
        reasons = sorted({f"{peer}: {why}" for row in mine.values() for peer, why in row["failed"].items()})
        lines += ["", *(["Not timed: " + "; ".join(reasons) + ".", ""] if reasons else [])]
    return lines


def _cells(row: Row, peers: list[str], gpu: bool) -> list[str]:
    def ratio(peer: str) -> str:
        if peer in row["times_faster_than"]:
            return f"{row['times_faster_than'][peer]:.2f}"
        return "out of memory" if "OutOfMemory" in row["failed"].get(peer, "") else "–"

    floor = row["times_faster_than"].get("floor")
    by = row["path"][0] if row["path"] else "–"
    cells = [ratio(peer) for peer in peers] + ["–" if floor is None else f"{100 * floor:.0f} %"]
    if gpu:
        cells.insert(0, f"{1e3 * row['fastest_s']['ours']:.3g} ms")
        useful = row["useful_gflop_per_s"]["ours"] / 1e3
        cells += [f"{useful:.0f}" if useful >= 1 else "–", f"{row['gbyte_per_s']:.0f}" if row["gbyte_per_s"] else "–"]
        peak = row.get("peak_bytes", {}).get("ours")  # nothing where the row was cut short
        cells.append("–" if peak is None else f"{peak / 1e9:.2f}")
    errors = row["error"]
    return [by, *cells, f"{errors['ours']:.1e}", f"{errors['torch eager']:.1e}" if "torch eager" in errors else "–"]


def _launches(row: Row) -> list[str]:
    """A table of what a call costs the host and the GPU."""
    if "on_device" not in row:  # cut short
        return []
    ours_host, ours_device = row["host_s"]["ours"], row["on_device"]["ours"].get("seconds")
    lines = ["", "| provider | launches | GPU time, × ours | host time, × ours |", "| --- | --- | --- | --- |"]
    for name, device in row["on_device"].items():
        seen = ours_device and "seconds" in device  # not where the profiler may not look
        gpu = f"{device['seconds'] / ours_device:.2f}" if seen else "–"
        times = f"{gpu} | {row['host_s'][name] / ours_host:.2f}"
        lines.append(f"| {name} | {device.get('launches', '–')} | {times} |")
    return lines


def section(folder: Path) -> str:
    """The text between the markers."""
    lines: list[str] = []
    for heading, (gpu, rows) in machines(folder).items():
        lines += ["", f"### {heading}", "", *tables(gpu, rows)]
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = PAGE.read_text(encoding="utf-8")
    made = between(text, BEGIN, END, section(RESULTS))
    if parser.parse_args().check:
        return int(made != text)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
