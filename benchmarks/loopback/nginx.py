"""nginx in the foreground with the configuration that the repository documents.

The configuration is deploy/nginx/prunecast.conf itself; only port, paths and TLS are replaced.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CONFIGURATION", "Nginx", "nginx", "program", "render"]

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "nginx" / "prunecast.conf"
_PLACES = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/bin")
_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


@dataclass(frozen=True)
class Nginx:
    """A running nginx.

    Attributes:
        url: of the repository, with a slash at the end.
        port: of 127.0.0.1.
        pid: of the master process.
        log: one line per request: status, bytes of the body, path, range.
    """

    url: str
    port: int
    pid: int
    log: Path


def program() -> str | None:
    """Where nginx is, or None."""
    return shutil.which("nginx", path=os.pathsep.join((os.environ.get("PATH", ""), *_PLACES)))


def render(
    text: str, port: int, repository: Path, certificate: Path | None, key: Path | None
) -> str:
    """The configuration for this machine: every replaced directive must stand there once.

    Raises:
        ValueError: a directive is missing or ambiguous.
    """
    tls = certificate is not None
    changes = {
        r"listen 443 ssl;": f"listen 127.0.0.1:{port}{' ssl' if tls else ''};",
        r"root [^;]+;": f"root {repository};",
        r"ssl_certificate [^;]+;": f"ssl_certificate {certificate};" if tls else "",
        r"ssl_certificate_key [^;]+;": f"ssl_certificate_key {key};" if tls else "",
    }
    for pattern, replacement in changes.items():
        text, count = re.subn(rf"(?m)^(\s*){pattern}$", rf"\g<1>{replacement}", text)
        if count != 1:
            raise ValueError(f"{pattern!r} stands {count} times in the nginx configuration")
    return text


@contextmanager
def nginx(
    repository: Path,
    scratch: Path,
    *,
    certificate: Path | None = None,
    key: Path | None = None,
    log: bool = True,
) -> Iterator[Nginx]:
    """nginx with one worker on a free port of 127.0.0.1, until the block ends.

    Args:
        repository: folder to serve.
        scratch: an empty folder for its files.
        certificate: PEM file; plain HTTP without.
        key: PEM file.
        log: whether requests are logged.

    Raises:
        FileNotFoundError: there is no nginx.
        RuntimeError: it refuses the configuration.
    """
    found = program()
    if found is None:
        raise FileNotFoundError("nginx is not installed (apt-get install nginx-light)")
    # nginx takes over sockets that its environment names, so the port cannot be lost to another
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listening:
        listening.set_inheritable(True)
        port = listening.getsockname()[1]
        text = render(CONFIGURATION.read_text("utf-8"), port, repository, certificate, key)
        access = scratch / "access.log"
        (scratch / "site.conf").write_text(text)
        (scratch / "nginx.conf").write_text(_around(scratch, access if log else None))
        command = [found, "-p", str(scratch), "-c", str(scratch / "nginx.conf")]
        checked = subprocess.run([*command, "-t"], capture_output=True, text=True)
        if checked.returncode:
            raise RuntimeError(f"nginx refuses the configuration: {checked.stderr}")
        with open(scratch / "stderr.log", "wb") as said:
            process = subprocess.Popen(
                command,
                env={**os.environ, "NGINX": f"{listening.fileno()};"},
                pass_fds=(listening.fileno(),),
                stderr=said,
            )
    try:
        scheme = "https" if certificate else "http"
        yield Nginx(f"{scheme}://127.0.0.1:{port}/", port, process.pid, access)
    finally:
        process.terminate()
        process.wait(timeout=30)


def _around(scratch: Path, log: Path | None) -> str:
    """What /etc/nginx/nginx.conf is on a real machine; one worker under the caller's name."""
    # workers of root would become nobody, who cannot read a folder that only root can
    user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""
    temporary = "\n".join(f"    {n}_temp_path {scratch / f'temp-{n}'};" for n in _TEMPORARY)
    shown = f"{log} brief" if log else "off"
    return f"""\
daemon off;
{user}
worker_processes 1;
pid {scratch / "nginx.pid"};
error_log {scratch / "error.log"};
events {{ worker_connections 4096; }}
http {{
    log_format brief '$status $body_bytes_sent $request_uri "$http_range"';
    access_log {shown};
{temporary}
    include {scratch / "site.conf"};
}}
"""
