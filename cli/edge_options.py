"""Options of `prunecast edge`, and what the agent is made of by them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunecast.cli.console import warn, warn_of_exposure

if TYPE_CHECKING:
    from prunecast.client.edge import AgentConfig
    from prunecast.client.edge.control import ControlSettings
    from prunecast.client.edge.updating.transport import Fetcher, HttpFetcher

__all__ = [
    "Bandwidth",
    "CaFile",
    "Certificate",
    "Control",
    "ControlCa",
    "ControlCertificate",
    "ControlKey",
    "ControlToken",
    "InferenceMemory",
    "InferenceSeconds",
    "Key",
    "Listen",
    "Name",
    "Optimise",
    "Quiet",
    "Root",
    "State",
    "Threads",
    "TokenFile",
    "Url",
    "agent_config",
    "control_settings",
    "limited",
    "make_fetcher",
]

State = Annotated[Path, typer.Option(help="Folder for everything the agent keeps.")]
Url = Annotated[str, typer.Option(help="URL of the release repository.")]
Name = Annotated[str, typer.Option(help="Name of the release to follow.")]
Root = Annotated[
    Path, typer.Option(help="Root metadata of the repository, provisioned with the device.")
]
CaFile = Annotated[Path | None, typer.Option(help="PEM file of the authorities to trust for TLS.")]
Certificate = Annotated[
    Path | None, typer.Option(help="PEM file with the device's TLS certificate.")
]
Key = Annotated[Path | None, typer.Option(help="PEM file with its private key.")]
TokenFile = Annotated[
    Path | None, typer.Option(help="File with a bearer token for the repository's server.")
]
Threads = Annotated[int | None, typer.Option(help="Threads of the inference session.", min=1)]
Bandwidth = Annotated[
    float | None, typer.Option(help="Bytes per second that downloads may take.", min=1.0)
]
Quiet = Annotated[
    str | None, typer.Option(help="Local time without downloads of releases, such as 07:00-19:30.")
]
Optimise = Annotated[
    bool,
    typer.Option(
        "--optimise", help="Keep releases as optimised for this CPU: quicker starts, more disk."
    ),
]
InferenceMemory = Annotated[
    int | None,
    typer.Option(
        help="Bytes that inferences may take besides the weights; by default half of the memory, "
        "and at most 512 MiB.",
        min=2**20,
    ),
]
InferenceSeconds = Annotated[
    float,
    typer.Option(help="Seconds after which an inference of --listen is broken off.", min=0.001),
]
Listen = Annotated[
    list[str] | None,
    typer.Option(
        help="Serve the model to other programs on this device: unix:/path or 127.0.0.1:PORT; "
        "may be given several times."
    ),
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


def agent_config(
    state: Path,
    url: str,
    name: str,
    root: Path,
    threads: int | None,
    quiet: str | None,
    optimise: bool,
    inference_memory: int | None,
    *,
    given: bool = True,
) -> AgentConfig:
    """What the agent is told; usage errors name their option.

    Args:
        given: whether `url` was given, and is not that of the fleet's server.
        The others are the options of these names.
    """
    from prunecast.client.edge.config import AgentConfig, Bounds, QuietHours, check_url
    from prunecast.client.edge.errors import UrlRefused

    try:
        check_url(url)
        if url.startswith("grpcs://") and given:
            raise UrlRefused("it begins with http:// or https://; a fleet is named by --control")
    except UrlRefused as error:
        raise typer.BadParameter(str(error), param_hint="--url") from None
    try:
        hours = QuietHours.parse(quiet) if quiet else None
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--quiet") from error
    content = root.read_bytes()
    return AgentConfig(
        *(state, url, name, content),
        threads=threads,
        quiet=hours,
        bounds=Bounds(inference_bytes=inference_memory),
        optimise=optimise,
    )


def limited(fetcher: Fetcher, bandwidth: float | None, sleep: Callable[[float], None]) -> Fetcher:
    """A fetcher that takes so many bytes per second, where a bandwidth is given."""
    from prunecast.client.edge.updating.transport import Passing, TokenBucket

    return Passing(fetcher, TokenBucket(bandwidth, sleep=sleep).slow) if bandwidth else fetcher


def make_fetcher(
    url: str,
    ca_file: Path | None,
    certificate: Path | None,
    key: Path | None,
    token_file: Path | None,
) -> HttpFetcher:
    """The network to the repository at `url`; usage errors name their option."""
    from prunecast.client.edge.updating.transport import HttpFetcher, bearer, is_exposed

    pair = _pair(certificate, key, "--")
    headers = bearer(token_file) if token_file else {}
    warn_of_exposure(key, token_file)
    if headers and is_exposed(url):
        warn(
            "the token of --token-file goes over plain http, where everybody on the way can read "
            "and use it: serve the repository over https"
        )
    return HttpFetcher(ca_file=ca_file, client_certificate=pair, headers=headers)


def _pair(certificate: Path | None, key: Path | None, prefix: str) -> tuple[Path, Path] | None:
    if (certificate is None) != (key is None):
        raise typer.BadParameter(f"{prefix}certificate and {prefix}key belong together")
    return (certificate, key) if certificate and key else None


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

    pair = _pair(certificate, key, "--control-")
    warn_of_exposure(key, token)
    return ControlSettings(control, ca, token, pair)
