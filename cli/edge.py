"""`prunecast edge`: the agent on a device."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunecast.cli.console import AsJson, MaxBytes, show, warn
from prunecast.cli.edge_options import (
    Bandwidth,
    CaFile,
    Certificate,
    Control,
    ControlCa,
    ControlCertificate,
    ControlKey,
    ControlToken,
    InferenceMemory,
    InferenceSeconds,
    Key,
    Listen,
    Name,
    Optimise,
    Quiet,
    Root,
    State,
    Threads,
    TokenFile,
    Url,
    agent_config,
    control_settings,
    limited,
    make_fetcher,
)
from prunecast.common.fleet_protocol import CONFIRM_SECONDS

if TYPE_CHECKING:
    from prunecast.client.edge import Agent
    from prunecast.client.edge.config import UpdateResult
    from prunecast.client.edge.errors import ControlProblem, EdgeError
    from prunecast.client.edge.updating.transport import Fetcher

__all__ = ["app"]

_PROBE_SECONDS = 5.0
_LATE_SECONDS = 30.0  # after which native code that should have ended is taken for hanging

app = typer.Typer(no_args_is_help=True, help="Follow signed releases on a device and run them.")


@app.command()
def update(
    state: State,
    url: Url,
    name: Name,
    root: Root,
    ca_file: CaFile = None,
    certificate: Certificate = None,
    key: Key = None,
    token_file: TokenFile = None,
    threads: Threads = None,
    bandwidth: Bandwidth = None,
    quiet: Quiet = None,
    optimise: Optimise = False,
    inference_memory: InferenceMemory = None,
    as_json: AsJson = False,
) -> None:
    """Check once for a newer release; download, verify, self-test and activate it."""
    from prunecast.client.edge import Agent

    config = agent_config(state, url, name, root, threads, quiet, optimise, inference_memory)
    fetcher = limited(
        make_fetcher(url, ca_file, certificate, key, token_file), bandwidth, time.sleep
    )
    # a timer that has waited too long, a terminal that is closed: ended by itself nevertheless
    _on_signals(lambda *_: sys.exit(143))
    with Agent(config, fetcher=fetcher, on_warning=warn) as agent:
        result = agent.update_once()
        agent.confirm()  # it was loaded and self-tested, which is all one command can tell
    show(asdict(result), as_json, _line(result))
    if result.outcome == "rejected":
        raise typer.Exit(1)


@app.command()
def run(
    state: State,
    name: Name,
    root: Root,
    url: Annotated[
        str | None,
        typer.Option(help="URL of the release repository; may be left out with --control."),
    ] = None,
    interval: Annotated[float, typer.Option(help="Seconds between checks.", min=0.1)] = 300.0,
    jitter: Annotated[
        float, typer.Option(help="Share by which each wait varies.", min=0.0, max=1.0)
    ] = 0.2,
    ca_file: CaFile = None,
    certificate: Certificate = None,
    key: Key = None,
    token_file: TokenFile = None,
    threads: Threads = None,
    bandwidth: Bandwidth = None,
    quiet: Quiet = None,
    optimise: Optimise = False,
    inference_memory: InferenceMemory = None,
    inference_seconds: InferenceSeconds = 30.0,
    confirm_after: Annotated[
        float,
        typer.Option(help="Seconds of service after which a release has proved itself.", min=0.0),
    ] = CONFIRM_SECONDS,
    listen: Listen = None,
    control: Control = None,
    control_token: ControlToken = None,
    control_ca: ControlCa = None,
    control_certificate: ControlCertificate = None,
    control_key: ControlKey = None,
    as_json: AsJson = False,
) -> None:
    """Follow releases until interrupted; one line per check.

    With --control the fleet decides which of the live releases runs here, a lower one too;
    without, always the highest.
    """
    from prunecast.client.edge import Agent
    from prunecast.client.edge.errors import EdgeError, NetworkError

    fleet = control_settings(control, control_token, control_ca, control_certificate, control_key)
    if url is None and fleet is None:
        raise typer.BadParameter("either --url or --control is needed", param_hint="--url")
    stop, wake = threading.Event(), threading.Event()

    def end(*_: object) -> None:
        stop.set()
        wake.set()

    signal.signal(signal.SIGINT, end)
    _on_signals(end)

    def tell(result: UpdateResult | EdgeError) -> None:
        if isinstance(result, EdgeError):
            text, kind = f"failed: {result}", type(result).__name__
            document = {"outcome": "failed", "error": kind, "reason": str(result)}
        else:
            text, document = _line(result), asdict(result)
        show(document, as_json, text)
        tell_manager(text)

    def wait(seconds: float) -> None:
        if stop.wait(seconds):
            raise NetworkError("the agent was asked to end; what has come is kept")

    source: Fetcher = make_fetcher(url or "", ca_file, certificate, key, token_file)
    here = url if fleet is None or url is not None else fleet.url
    config = agent_config(
        *(state, here or "", name, root, threads, quiet, optimise, inference_memory),
        given=url is not None,
    )
    config = replace(config, confirm_after=confirm_after)
    if fleet is not None:
        from prunecast.client.edge.control import ControlChannel, ControlFetcher, Controller

        channel = ControlChannel(fleet)
        if url is None:
            source = ControlFetcher(channel)
    fetcher = limited(source, bandwidth, wait)
    with (
        Agent(config, fetcher=fetcher, wait=wait, on_warning=warn) as agent,
        _serving(agent, name, listen or (), inference_seconds, as_json) as tell_manager,
    ):
        follow = partial(agent.run, interval, stop=stop, jitter=jitter)
        if fleet is None:
            follow(on_result=tell)
            return
        show_event = partial(_show_event, as_json)
        with Controller(agent, channel, wake=wake, on_event=show_event) as controller:

            def note(result: UpdateResult | EdgeError) -> None:
                tell(result)
                controller.note(result)

            follow(on_result=note, order=controller.order, wake=wake)


@app.command()
def status(state: State, as_json: AsJson = False) -> None:
    """What runs on this device, and what the last check did."""
    from prunecast.client.edge.state import read_status

    found = read_status(state)
    active, previous = found["active"], found["previous"]
    confirmed = not active or active["confirmed"]
    lines = [
        f"release  {found['name']} {active['version']}" if active else "release  none",
        *([] if confirmed else ["         not confirmed yet: it has to serve for a while"]),
        f"previous {previous['version']}" if previous else "previous none",
        f"checked  {found.get('last_check', 'never')}",
    ]
    if found.get("last_error"):
        lines.append(f"problem  {found['last_error']}")
    if found.get("last_warning"):
        lines.append(f"warning  {found['last_warning']}")
    lines += _fleet_lines(found["control"])
    lines += [
        f"failed   {version}: {failed['kind']}: {failed['reason']}"
        for version, failed in found["failures"].items()
    ]
    lines += _figures_lines(found["telemetry"])
    show(found, as_json, "\n".join(lines))


@app.command()
def infer(
    state: State,
    inputs: Annotated[Path, typer.Option(help=".npz with one array per input of the model.")],
    outputs: Annotated[Path, typer.Option(help=".npz to write, one array per output.")],
    threads: Threads = None,
    max_bytes: MaxBytes = None,
    as_json: AsJson = False,
) -> None:
    """Run the active release on arrays in a file; needs no network."""
    from prunecast.client.edge import open_model
    from prunecast.common.files import write_atomically
    from prunecast.common.npz import NpzArchive
    from prunecast.compression.release.selftest import pack_arrays

    arrays = NpzArchive(inputs, max_bytes=max_bytes).read_all()
    model = open_model(state, threads=threads)
    begun = time.perf_counter()
    served = model.infer(arrays)
    seconds = time.perf_counter() - begun
    write_atomically(outputs, pack_arrays(served.outputs))
    report: dict[str, Any] = {
        "version": served.version,
        "outputs": {name: list(values.shape) for name, values in served.outputs.items()},
        "seconds": seconds,
    }
    show(report, as_json, f"release {served.version}: {outputs} in {seconds * 1000:.1f} ms")


@contextmanager
def _serving(
    agent: Agent, name: str, addresses: Sequence[str], seconds: float, as_json: bool
) -> Iterator[Callable[[str], None]]:
    """Listen while the block runs, with the service manager told; one line per endpoint.

    Yields:
        A function that shows the manager one line about what the agent does.
    """
    from prunecast.client.edge.inference import EndpointLimits, InferenceServer, is_answering
    from prunecast.common.service_manager import ServiceManager
    from prunecast.compression.release.overseer import OVERSEER

    limits = EndpointLimits(inference_seconds=seconds)
    manager = ServiceManager()
    with ExitStack() as stack:
        listening = []
        for address in addresses:
            endpoint = stack.enter_context(
                InferenceServer(agent.model, name, address, limits=limits)
            )
            listening.append(endpoint.address)
            told = {"outcome": "listening", "address": endpoint.address}
            show(told, as_json, f"listening on {endpoint.address}")

        def alive() -> bool:
            answers = all(is_answering(address, _PROBE_SECONDS) for address in listening)
            return answers and not OVERSEER.is_late(_LATE_SECONDS)

        with manager.watching(alive):
            yield lambda line: manager.tell(STATUS=line)


def _on_signals(end: Callable[..., object]) -> None:
    """Call `end` when the process is asked to end; `nohup` keeps its meaning."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


def _show_event(as_json: bool, event: bool | ControlProblem) -> None:
    """Print what happened to the connection to the fleet."""
    if event is True:
        told = {"outcome": "control", "connected": True}
        show(told, as_json, "the fleet's control server is connected")
    else:
        told = {"outcome": "control", "connected": False, "reason": str(event)}
        show(told, as_json, f"control: {event}")


def _line(result: UpdateResult) -> str:
    from prunecast.compression.release.runtime import settings_text

    if result.outcome == "rejected":
        return f"rejected: {result.reason}; release {result.version or 'none'} stays"
    if result.outcome == "current":
        if result.version is None:
            return f"no release is active: {result.reason or 'all that are listed were rejected'}"
        waits = f"; {result.reason}" if result.reason else ""
        return f"release {result.version} is current{waits}"
    received = ", ".join(f"{kind} {size:,}" for kind, size in sorted(result.downloaded.items()))
    came = "its weights were here" if result.payload == "none" else f"came as {result.payload}"
    ran = settings_text(result.settings)
    with_settings = f"; onnxruntime: {ran}" if ran else ""
    return f"release {result.version} is active, {came} (bytes: {received}){with_settings}"


def _fleet_lines(control: dict[str, Any] | None) -> list[str]:
    """What the fleet wants and what was answered, for people."""
    if control is None:
        return []
    said, answer = control["directive"] or {}, control["answered"] or {}
    wants = "nothing" if said.get("version") is None else f"{said['release']} {said['version']}"
    line = f"fleet    told {wants}"
    if answer and answer.get("serial") == said.get("serial"):
        line += f", answered {answer['outcome']}"
    if waiting := control["waiting_reports"]:
        line += f"; {waiting} reports wait"
    return [line]


def _figures_lines(telemetry: dict[str, Any] | None) -> list[str]:
    """What the device has counted, for people: a line for each release that was asked."""
    from prunecast.compression.release.runtime import settings_text

    lines = []
    for release in (telemetry or {}).get("releases", ()):
        counts = ", ".join(f"{release[key]:,} {key}" for key in ("answered", "refused", "failed"))
        line = f"counted  release {release['version']}: {counts}"
        if release["answered"]:
            times = [f"{release[f'latency_{p}_seconds'] * 1e3:.3g}" for p in ("p50", "p90", "p99")]
            line += f"; p50/p90/p99 {'/'.join(times)} ms"
        if release["self_test"]:
            line += f"; self-test {release['self_test']}"
        if settings := settings_text(release["settings"]):
            line += f"; onnxruntime: {settings}"
        lines.append(line)
    return lines
