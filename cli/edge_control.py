"""Options of `prunecast edge run` that put an agent under the control of a fleet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from prunecast.client.edge.control import ControlSettings
    from prunecast.client.edge.errors import ControlProblem

__all__ = [
    "Control",
    "ControlCa",
    "ControlCertificate",
    "ControlKey",
    "ControlToken",
    "control_settings",
    "event_line",
]

Control = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Control server of the fleet: it decides which release this device runs.",
    ),
]
ControlToken = Annotated[
    Path | None,
    typer.Option(help="File with the device's token, printed by `prunecast fleet device add`."),
]
ControlCa = Annotated[
    Path | None, typer.Option(help="PEM file of the authorities to trust for the control server.")
]
ControlCertificate = Annotated[
    Path | None, typer.Option(help="PEM file with the device's certificate, instead of a token.")
]
ControlKey = Annotated[Path | None, typer.Option(help="PEM file with its private key.")]


def control_settings(
    control: str | None,
    token: Path | None,
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
) -> ControlSettings | None:
    """The connection to the fleet; None: the agent decides by itself."""
    if control is None:
        if token or ca or certificate or key:
            raise typer.BadParameter("--control-... needs --control HOST:PORT")
        return None
    from prunecast.client.edge.control import ControlSettings

    if (certificate is None) != (key is None):
        raise typer.BadParameter("--control-certificate and --control-key belong together")
    pair = (certificate, key) if certificate and key else None
    return ControlSettings(control, ca, token, pair)


def event_line(event: bool | ControlProblem, as_json: bool) -> str:
    """What happened to the connection, in one line."""
    if event is True:
        told = {"outcome": "control", "connected": True}
        return json.dumps(told) if as_json else "the fleet's control server is connected"
    told = {"outcome": "control", "connected": False, "reason": str(event)}
    return json.dumps(told) if as_json else f"control: {event}"
