"""Figures as text: one line a measurement while running, and tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from .cases import KINDS
from .coders import OURS
from .measure import Row
from .report import Measured, Report

__all__ = ["HEADER", "class_size", "class_speed", "insert", "line", "markdown", "summary"]

HEADER = (
    f"{'case':30} {'coder':14} {'bytes':>9} {'bits/par':>9} {'vs H0':>8} "
    f"{'enc':>6} {'dec':>6} MB/s  {'side':>6}  memory enc/dec"
)


def line(case: Measured, coder: str) -> str:
    """One measurement."""
    row = case.rows[coder]
    gap = case.against_entropy(coder)
    encode, decode = case.speeds(coder)
    side = "" if row.side_information is None else f"{row.side_information:.1%}"
    return (
        f"{case.name:30} {coder:14} {row.bytes:9d} {case.bits(coder):9.4f} "
        f"{'' if gap is None else f'{gap:+.1%}':>8} {encode:6.0f} {decode:6.0f}       "
        f"{side:>6}  {_memory(case, row)}"
    )


def _memory(case: Measured, row: Row) -> str:
    """Peaks beyond the input, in multiples of the tensors as float32."""
    pairs = (
        (row.encode_resident, row.decode_resident),
        (row.encode_traced, row.decode_traced),
    )
    for encode, decode in pairs:
        if encode is not None and decode is not None:
            return f"{encode / case.raw:.1f}/{decode / case.raw:.1f}"
    return ""


def _mean(ratios: Sequence[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def class_speed(cases: Sequence[Measured], coder: str) -> tuple[float, float]:
    """MB/s over all cases together."""
    some = [c for c in cases if coder in c.rows]
    raw = sum(c.raw for c in some) / 1e6
    return (
        raw / sum(c.rows[coder].encode_seconds for c in some),
        raw / sum(c.rows[coder].decode_seconds for c in some),
    )


def class_size(cases: Sequence[Measured], coder: str) -> float | None:
    """Size against zeroth-order entropy, geometric mean less one."""
    gaps = [c.against_entropy(coder) for c in cases if coder in c.rows]
    ratios = [1 + g for g in gaps if g is not None]
    return _mean(ratios) - 1 if ratios else None


def _named(shares: dict[str, float]) -> str:
    """Peers and by how much they are smaller."""
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())


def _rows(head: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'|'.join(['---'] + ['---:'] * (len(head) - 1))}|"
    for row in body:
        yield f"| {' | '.join(row)} |"


def _size_table(report: Report) -> Iterator[str]:
    coders = report.coders_in_order()
    body = []
    for kind, cases in report.kinds().items():
        entropy = _mean([max(c.entropy_bits, 1e-9) / c.parameters for c in cases])
        cells = [class_size(cases, coder) for coder in coders]
        best = min((c for c in cells if c is not None), default=None)
        texts = ["" if c is None else f"{100 * c:+.1f}" for c in cells]
        marked = [f"**{t}**" if t and c == best else t for t, c in zip(texts, cells, strict=True)]
        body.append([kind, str(len(cases)), f"{entropy:.3f}", *marked])
    yield from _rows(["class", "cases", "H0", *coders], body)


def _speed_table(report: Report) -> Iterator[str]:
    coders = report.coders_in_order()
    body = []
    for kind, cases in report.kinds().items():
        cells = []
        for coder in coders:
            if any(coder in c.rows for c in cases):
                encode, decode = class_speed(cases, coder)
                cells.append(f"{encode:.0f} / {decode:.0f}")
            else:
                cells.append("")
        body.append([kind, *cells])
    yield from _rows(["class", *coders], body)


def _memory_table(report: Report) -> Iterator[str]:
    coders = report.coders_in_order()
    body = []
    for kind, cases in report.kinds().items():
        cells = []
        for coder in coders:
            pairs = [
                (r.encode_resident / c.raw, r.decode_resident / c.raw)
                for c in cases
                if (r := c.rows.get(coder)) is not None
                and r.encode_resident is not None
                and r.decode_resident is not None
            ]
            peak = [max(p[i] for p in pairs) for i in (0, 1)] if pairs else []
            cells.append(" / ".join(f"{p:.1f}" for p in peak))
        if any(cells):
            body.append([kind, *cells])
    yield from _rows(["class", *coders], body)


def _case_table(report: Report) -> Iterator[str]:
    body = []
    for case in report.cases:
        row = case.rows[OURS]
        gap = case.against_entropy(OURS)
        peers = {n: r.bytes for n, r in case.rows.items() if n != OURS}
        best = min(peers, key=lambda n: peers[n], default=None)
        body.append(
            [
                case.name,
                f"{case.parameters:,}",
                f"{row.bytes:,}",
                f"{case.bits(OURS):.4f}",
                "" if gap is None else f"{100 * gap:+.1f}",
                "" if row.side_information is None else f"{100 * row.side_information:.1f}",
                *(f"{s:.0f}" for s in case.speeds(OURS)),
                "" if best is None else f"{best} {100 * (peers[best] / row.bytes - 1):+.1f}",
            ]
        )
    head = ["case", "parameters", "bytes", "bits/par", "vs H0 %", "side %", "enc MB/s", "dec MB/s"]
    yield from _rows([*head, "best peer, % of ours"], body)


def markdown(report: Report, picture: str | None = None) -> str:
    """All tables, with the machine and the settings, for docs/benchmarks.md.

    Args:
        report: what was measured.
        picture: address of the chart, seen from the file.
    """
    m = report.machine
    out = [
        f"Measured {m['date']} with prunecast {m['prunecast']}, Python {m['python']}, "
        f"numpy {m['numpy']} on {m['cpu']} ({m['architecture']}), {m['cores']} cores of which one "
        "is used.",
        "",
        *([f"![Size and speed by class and coder]({picture})", ""] if picture else []),
        "### Size",
        "",
        "Bytes against zeroth-order entropy, in percent; geometric mean over the class. H0 is that "
        "entropy in bits per parameter (geometric mean); the smallest coder is bold.",
        "",
        *_size_table(report),
        "",
        "### Speed",
        "",
        "Encode / decode, MB of float32 tensors per CPU second, all cases of the class together.",
        "",
        *_speed_table(report),
        "",
        "### Memory",
        "",
        "Encode / decode: largest growth of the resident set, in multiples of the tensors as "
        "float32, over cases of at least a million parameters.",
        "",
        *_memory_table(report),
        "",
        "### Where a peer is smaller",
        "",
        "By what share of our bytes; the worst first.",
        "",
        *(
            [f"- {case.name}: {_named(smaller)}" for case, smaller in report.losses()]
            or ["Nowhere in this run."]
        ),
        "",
        "### Every case, our codec",
        "",
        "<details><summary>All cases</summary>",
        "",
        *_case_table(report),
        "",
        "</details>",
        "",
        "### Settings",
        "",
        *(f"- {name}: {settings}" for name, settings in report.coders.items()),
        *(f"- {name}: absent ({why})" for name, why in report.absent.items()),
    ]
    return "\n".join(out) + "\n"


def insert(path: Path, text: str) -> None:
    """Write `text` to a file, between the file's marks if it has them."""
    begin, end = "<!-- measured -->", "<!-- /measured -->"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    before, found, rest = old.partition(begin)
    _, closed, after = rest.partition(end)
    whole = f"{before}{begin}\n\n{text}\n{end}{after}" if found and closed else text
    path.write_text(whole, encoding="utf-8")


def summary(report: Report) -> str:
    """What a reader of the terminal wants to know at the end."""
    out = ["", "class, size against H0 (ours, best peer), ours encode / decode MB/s"]
    peers = [n for n in report.coders_in_order() if n != OURS]
    for kind, cases in report.kinds().items():
        ours = class_size(cases, OURS)
        sizes = {n: s for n in peers if (s := class_size(cases, n)) is not None}
        best = min(sizes, key=lambda n: sizes[n], default=None)
        encode, decode = class_speed(cases, OURS)
        out.append(
            f"{kind:13} {'' if ours is None else f'{ours:+.1%}':>7}  "
            f"{'' if best is None else f'{best} {sizes[best]:+.1%}':22} "
            f"{encode:5.0f} / {decode:.0f}   {KINDS.get(kind, '')}"
        )
    losses = report.losses()
    out.append("")
    out.append("a peer is smaller on:" if losses else "no peer is smaller on any case")
    out += [f"  {case.name:30} {_named(smaller)}" for case, smaller in losses]
    return "\n".join(out)
