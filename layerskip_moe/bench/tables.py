"""A benchmark's result as text for a terminal: aligned columns, units in the heads.

Knows nothing of how it was measured. Next: `figure.py`, for the same as a picture.
"""

from collections.abc import Sequence
from typing import Any


def result_text(result: dict[str, Any]) -> str:
    """The tables of what a benchmark returned."""
    parts = [_group_text(result, name) for name in result["groups"]]
    parts += [f"{entry['peer']} at {entry['precision']} is left out: {entry['reason']}." for entry in result["skipped"]]
    if "scaling" in result:
        parts += _scaling_texts(result["scaling"])
    if "first_token" in result:
        parts.append(_first_token_text(result["first_token"]))
    return "\n\n".join(parts)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in columns, the first flush left and the others flush right; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _group_text(result: dict[str, Any], name: str) -> str:
    group = result["groups"][name]
    if result["benchmark"] == "memory":
        rows = [["", "MB", "of what is needed"]]
        rows += [
            [row["name"], _number(row["value"]["median"]), f"{row['bytes'] / group['needed']:.2f} x"]
            for row in group["rows"]
        ]
        needed = "weights, gradients and AdamW's moments" if name == "training step" else "weights and cache"
        return f"{name}: {needed} are {group['needed'] / 1e6:.1f} MB\n{aligned(rows)}"
    head = [result["unit"], "quartiles", "ours is", "quartiles"]
    extra = {"decode": ["of the floor", "tokens as ours"], "train": ["of the peak", "last loss"]}.get(
        result["benchmark"], []
    )
    rows = [["", *head, *extra]]
    for row in group["rows"]:
        speed, times = row["value"], row["ours_over_this"]
        cells = [row["name"], _number(speed["median"]), _range(speed), f"{times['median']:.2f} x", _range(times)]
        if result["benchmark"] == "decode":
            cells += [f"{row['share_of_floor']:.0%}", f"{row['equal']} of {row['tokens']}"]
        if result["benchmark"] == "train":
            cells += [f"{row['share_of_peak']:.1%}", f"{row['losses'][-1]:.4f}"]
        rows.append(cells)
    return "\n".join([f"{name}: {_roofline_text(group)}", aligned(rows)])


def _roofline_text(group: dict[str, Any]) -> str:
    """What bounds the group's speeds, in a sentence."""
    measured = group["roofline"]
    told = [f"reads {measured['read bandwidth']['peak'] / 1e9:.1f} GB/s"]
    if "matrix peak" in measured:
        told.append(f"multiplies {measured['matrix peak']['peak'] / 1e9:.0f} GFLOP/s")
    if "floor" in group:
        floor = group["floor"]
        read = (
            f"{floor['weight_bytes'] / 1e6:.1f} MB of weights and {floor['cache_bytes'] / 1e6:.2f} MB of cache a token"
        )
        told.append(f"{read} allow {floor['tokens_per_second']:.1f} tokens/s")
    if "flop" in group:
        told.append(f"{group['flop'] / 1e9:.0f} GFLOP a step ({group['flop_formula']})")
    return "; ".join(told)


def _scaling_texts(scaling: dict[str, Any]) -> list[str]:
    texts = []
    if "expert_rows" in scaling:
        rows = [["rows verified", "ms a layer", "over one row", "experts needed / top-k", "time over experts"]]
        for row in scaling["expert_rows"]["rows"]:
            times = row["over_one_row"]["median"]
            rows.append(
                [
                    str(row["rows"]),
                    f"{row['seconds']['median'] * 1e3:.3f}",
                    f"{times:.2f} x",
                    f"{row['union']:.2f} x",
                    f"{times / row['union']:.2f}",
                ]
            )
        texts.append(f"the experts' part of a verification\n{aligned(rows)}")
    for name, axis in (("expert_count", "experts"), ("late_position", "positions")):
        part = scaling[name]
        if "skipped" in part:
            texts.append(f"{axis}: left out, as {part['skipped']}.")
            continue
        few, many = part[axis]
        before, after = (entry["median"] * 1e3 for entry in part["seconds_per_token"])
        text = f"a token with {many} {axis} takes {after:.2f} ms, with {few} {before:.2f} ms"
        if name == "late_position":
            text = f"a token at position {many} takes {after:.2f} ms, at {few} {before:.2f} ms"
        text += f": {part['ratio']['median']:.3f} x (quartiles {_range(part['ratio'])})"
        if name == "late_position":
            more = (part["bytes"][1] - part["bytes"][0]) / 1e6
            text += f"; reading {more:.1f} MB more takes {part['read_seconds'] * 1e3:.2f} ms, "
            text += f"which is {part['explained']:.0%} of the difference"
        texts.append(text)
    return texts


def _first_token_text(first_token: dict[str, Any]) -> str:
    rows = [["seconds to the first token", "empty caches", "a new process", "compile=False"]]
    for precision, cases in first_token.items():
        rows.append([precision, *(f"{cases[name]['seconds']:.2f}" for name in rows[0][1:])])
    return aligned(rows)


def _range(entry: dict[str, Any]) -> str:
    low, high = entry["quartiles"]
    return f"{_number(low)}-{_number(high)}"


def _number(value: float) -> str:
    """Four digits or so."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 20 else f"{value:.2f}"
