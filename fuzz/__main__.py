"""Fuzz the decoder: python -m fuzz [libFuzzer's options] FOLDER...; see README.md."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import atheris  # type: ignore[import-untyped]

# Two copies of the codec: the mutators use a plain one, as instrumented code takes several times
# as long, and the oracle the other.
from fuzz.mutate import cross, mutate

for name in [n for n in sys.modules if n.startswith(("prunecast.compression.codec", "fuzz."))]:
    del sys.modules[name]
with atheris.instrument_imports(include=["prunecast.compression.codec"]):
    from fuzz.oracle import Finding, check

_ADDRESS_SPACE = 4 << 30
_TRACE_EVERY = 256
_REPORT_EVERY = 5000
_FOLDER = Path("runs") / "fuzz"


class _Session:
    """Counts executions and keeps findings, one file for each place in the code."""

    def __init__(self) -> None:
        self.started = time.time()
        self.executions = 0
        self.results: collections.Counter[str] = collections.Counter()
        self.unforeseen: collections.Counter[str] = collections.Counter()
        self.findings: dict[str, str] = {}
        self.slowest: tuple[float, str] = (0.0, "")
        self.peak: tuple[int, str] = (0, "")
        _FOLDER.mkdir(parents=True, exist_ok=True)
        self._path = _FOLDER / f"session-{int(self.started)}-{os.getpid()}.json"

    def run(self, data: bytes) -> None:
        """One execution."""
        self.executions += 1
        try:
            outcome = check(data, trace=self.executions % _TRACE_EVERY == 0)
        except Finding as error:
            self._keep(data, error)
        else:
            self.results[outcome.result] += 1
            if outcome.unforeseen:
                place = "".join(c for c in outcome.unforeseen if not c.isdigit())[:80]
                if place not in self.unforeseen:
                    self._save(data, "unforeseen")
                self.unforeseen[place] += 1
            if outcome.seconds > self.slowest[0]:
                self.slowest = outcome.seconds, self._save(data, "slowest")
            if outcome.peak > self.peak[0]:
                self.peak = outcome.peak, self._save(data, "peak")
        if self.executions % _REPORT_EVERY == 0:
            self.report()

    def _keep(self, data: bytes, error: Finding) -> None:
        frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
        last = frames[-1]
        place = f"{Path(last.filename).name}:{last.lineno} {str(error)[:40]}"
        if place in self.findings:
            return
        self.findings[place] = self._save(data, "findings")
        traceback.print_exception(error)
        self.report()

    def _save(self, data: bytes, kind: str) -> str:
        path = _FOLDER / kind / hashlib.sha1(data).hexdigest()
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return str(path)

    def report(self) -> None:
        """Write what happened so far."""
        seconds = time.time() - self.started
        usage = resource.getrusage(resource.RUSAGE_SELF)
        report: dict[str, Any] = {
            "executions": self.executions,
            "seconds": round(seconds),
            "executions_per_second": round(self.executions / max(seconds, 1e-9)),
            "results": dict(self.results.most_common()),
            "unforeseen": dict(self.unforeseen.most_common()),
            "slowest": {"processor_seconds": self.slowest[0], "input": self.slowest[1]},
            "traced_peak": {"bytes": self.peak[0], "input": self.peak[1]},
            "resident_peak_bytes": usage.ru_maxrss << 10,
            "findings": self.findings,
        }
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(report, indent=2))
        temporary.replace(self._path)


def main() -> None:
    """Hand everything to libFuzzer; it ends the process."""
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    session = _Session()

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        return mutate(data, max_size, seed, atheris.Mutate)

    # For -merge, libFuzzer starts itself again through a shell, by the name it was given.
    arguments = [f"{sys.executable} -m fuzz", *sys.argv[1:]]
    atheris.Setup(arguments, session.run, custom_mutator=mutator, custom_crossover=cross)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
