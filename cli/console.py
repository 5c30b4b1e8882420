"""What all subcommands share: consoles, and errors in one line."""

from __future__ import annotations

from rich.console import Console

__all__ = ["explain", "is_usage", "make_console"]

_EXTRAS = {
    "edge": "edge",
    "fleet": "server",
    "release": "server",
    "serve": "server",
    "compress": "files",
    "decompress": "files",
    "inspect": "files",
}
_USAGE = {"ScenarioError", "PolicyError", "StrategyError"}


def make_console(*, stderr: bool = False) -> Console:
    """A console that neither cuts nor colours what goes into a pipe."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = 160
    return console


def is_usage(error: BaseException) -> bool:
    """Whether the caller gave something wrong, rather than something going wrong."""
    return type(error).__name__ in _USAGE and type(error).__module__.startswith("prunecast.")


def explain(error: BaseException, command: str | None) -> str:
    """One line: what went wrong and what to do.

    Args:
        error: what a subcommand raised.
        command: name of the subcommand.
    """
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("prunecast"):
        extra = _EXTRAS.get(command or "", "sim")
        if extra == "edge" and (error.name or "").partition(".")[0] in ("grpc", "google"):
            extra = "edge-fleet"
        return f"{error.name} is not installed: pip install 'prunecast[{extra}]'"
    if type(error).__module__.startswith("prunecast."):
        return text
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or text}"
    return f"{type(error).__name__}: {text} (run with prunecast --debug for the traceback)"
