"""Two runs side by side: what grew, what became slower."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .coders import OURS
from .report import Report

__all__ = ["compare"]

_SIZE, _TIME = 0.001, 0.10  # changes below these are left out


def _old_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Our rows of an earlier run by case, from files of the first format too."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    if "rows" in raw:
        return {r["case"]: r for r in raw["rows"] if r["coder"] == OURS}
    return {
        c["name"]: r | {"digest": c["digest"], "parameters": c["parameters"]}
        for c in raw["cases"]
        for r in c["rows"]
        if r["coder"] == OURS
    }


def compare(new: Report, old: Path) -> str:
    """Our figures in this run against those of an earlier one, as text.

    Cases are compared only if their tensors are the same. Sizes do not depend on the machine;
    speeds do, so compare runs of one machine.

    Raises:
        ValueError: `old` is not a report.
    """
    try:
        before = _old_rows(old)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{old} is not a report of this benchmark: {error!r}") from error
    lines, other, ratios = [], [], []
    for case in new.cases:
        row = before.get(case.name)
        if row is None:
            continue
        if row.get("digest", case.digest) != case.digest or row["parameters"] != case.parameters:
            other.append(case.name)
            continue
        encode, decode = case.speeds(OURS)
        change = (
            case.rows[OURS].bytes / row["bytes"],
            encode / row["encode_mb_s"],
            decode / row["decode_mb_s"],
        )
        ratios.append(change)
        if abs(change[0] - 1) >= _SIZE or any(abs(r - 1) >= _TIME for r in change[1:]):
            text = "".join(f"{r - 1:+9.1%}" for r in change)
            lines.append((change, f"{case.name:30}{text}"))
    out = ["", f"against {old}: {len(ratios)} cases in common"]
    if ratios:
        means = [math.exp(sum(math.log(r[i]) for r in ratios) / len(ratios)) for i in range(3)]
        out.append(f"{'case':30}{'bytes':>9}{'enc MB/s':>9}{'dec MB/s':>9}")
        out += [text for _, text in sorted(lines, key=lambda item: -item[0][0])]
        out.append(f"{'geometric mean':30}" + "".join(f"{m - 1:+9.1%}" for m in means))
    out += [f"{name}: other tensors, not compared" for name in other]
    return "\n".join(out)
