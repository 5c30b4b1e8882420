"""A run as data: machine, coders, cases, rows; to JSON and back."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .cases import KINDS, Case, case_entropy
from .coders import OURS
from .measure import Row

__all__ = ["Measured", "Report", "machine"]

_FORMAT = 2


@dataclass(frozen=True)
class Measured:
    """One case with the rows of all coders.

    Attributes:
        name: of the case.
        kind: its class.
        parameters: number of elements.
        digest: of tensors and context; figures of two runs compare only if it is the same.
        entropy_bits: zeroth-order, each tensor by itself, under what both sides know.
        rows: by coder, ours first; a coder that is not made for the case is absent.
    """

    name: str
    kind: str
    parameters: int
    digest: str
    entropy_bits: float
    rows: dict[str, Row] = field(default_factory=dict)

    @classmethod
    def of(cls, case: Case) -> Measured:
        """A case without rows."""
        return cls(case.name, case.kind, case.parameters, case.digest, case_entropy(case))

    @property
    def raw(self) -> int:
        """Bytes of the tensors as float32."""
        return 4 * self.parameters

    def bits(self, coder: str) -> float:
        """Bits per parameter."""
        return 8 * self.rows[coder].bytes / self.parameters

    def against_entropy(self, coder: str) -> float | None:
        """Size over zeroth-order entropy, less one; None where that entropy is zero."""
        bits = self.entropy_bits
        return 8 * self.rows[coder].bytes / bits - 1 if bits else None

    def speeds(self, coder: str) -> tuple[float, float]:
        """MB of float32 per CPU second, encoding and decoding."""
        row = self.rows[coder]
        return self.raw / row.encode_seconds / 1e6, self.raw / row.decode_seconds / 1e6


@dataclass
class Report:
    """A whole run."""

    machine: dict[str, Any]
    coders: dict[str, str]
    absent: dict[str, str]
    cases: list[Measured] = field(default_factory=list)

    def to_json(self) -> str:
        """Text of the JSON file, derived figures included for readers without this code."""
        cases = []
        for case in self.cases:
            rows = []
            for name, row in case.rows.items():
                encode, decode = case.speeds(name)
                rows.append(
                    dataclasses.asdict(row)
                    | {
                        "bits_per_parameter": case.bits(name),
                        "against_entropy": case.against_entropy(name),
                        "encode_mb_s": encode,
                        "decode_mb_s": decode,
                    }
                )
            cases.append(dataclasses.asdict(case) | {"rows": rows})
        whole = {
            "format": _FORMAT,
            "machine": self.machine,
            "coders": self.coders,
            "absent": self.absent,
            "cases": cases,
        }
        return json.dumps(whole, indent=1) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> Report:
        """Read a file that :meth:`to_json` made.

        Raises:
            ValueError: it is something else.
        """
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict) or raw.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a report of this benchmark in format {_FORMAT}")
        known = {f.name for f in dataclasses.fields(Row)}
        cases = []
        for c in raw["cases"]:
            rows = [Row(**{k: r[k] for k in known}) for r in c["rows"]]
            cases.append(Measured(**c | {"rows": {r.coder: r for r in rows}}))
        return cls(raw["machine"], raw["coders"], raw["absent"], cases)

    def coders_in_order(self) -> list[str]:
        """Coders that have rows, ours first."""
        return [n for n in self.coders if any(n in c.rows for c in self.cases)]

    def kinds(self) -> dict[str, list[Measured]]:
        """Cases by class, classes in the order of :data:`KINDS`."""
        out: dict[str, list[Measured]] = {kind: [] for kind in KINDS}
        for case in self.cases:
            out.setdefault(case.kind, []).append(case)
        return {kind: cases for kind, cases in out.items() if cases}

    def losses(self) -> list[tuple[Measured, dict[str, float]]]:
        """Cases where a peer is smaller than ours, and by what share each; the worst first."""
        found = []
        for case in self.cases:
            saved = {n: 1 - r.bytes / case.rows[OURS].bytes for n, r in case.rows.items()}
            smaller = sorted(((s, n) for n, s in saved.items() if s > 0), reverse=True)
            if smaller:
                found.append((case, {n: s for s, n in smaller}))
        return sorted(found, key=lambda item: -max(item[1].values()))


def machine() -> dict[str, Any]:
    """Facts that figures depend on."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "system": platform.platform(terse=True),
        "load_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "prunecast": _version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python", *sys.argv]),
    }


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith(("model name", "Model")):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _version() -> str:
    """Version and commit, as far as they can be known."""
    try:
        version = metadata.version("prunecast")
    except metadata.PackageNotFoundError:
        version = "unknown"
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=here, capture_output=True, text=True, check=True, timeout=10,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version} ({commit})"
