"""Payloads inside Flower records: what the grid and the mod agree on.

The only place below client and server that knows Flower; `versions` stays free of it.
"""

from prunecast.compression.flower.records import (
    CONTROL_RECORD,
    STATISTICS_RECORD,
    STYPE,
    array_record,
    coded_record,
    dense_arrays,
    float_names,
    is_codable,
    open_coded,
    payload_of,
    payload_record,
    stated_round,
    stream_id,
)

__all__ = [
    "CONTROL_RECORD",
    "STATISTICS_RECORD",
    "STYPE",
    "array_record",
    "coded_record",
    "dense_arrays",
    "float_names",
    "is_codable",
    "open_coded",
    "payload_of",
    "payload_record",
    "stated_round",
    "stream_id",
]
