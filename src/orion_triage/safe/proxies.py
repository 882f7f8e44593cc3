"""Proxies of the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY): who is asked through which.

A server on this machine is never asked through a proxy. The libraries' own reading of these variables is not used where
it can be avoided: httpx ends in a traceback at SOCKS without its extra package, and at `[::1]` in NO_PROXY.
"""

import importlib.util
import ipaddress
import os
import re
import urllib.request
from dataclasses import dataclass
from urllib.parse import urlsplit

from orion_triage.errors import OrionError

_SCHEMES = ("http", "https", "socks5", "socks5h")


@dataclass(frozen=True)
class Proxy:
    """A proxy's URL, and the variable that names it."""

    url: str
    variable: str

    def __str__(self) -> str:
        """Without the user's name and password, which may be in the URL."""
        parts = urlsplit(self.url)
        return f"{self.variable}={parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")


def without_credentials(address: str) -> str:
    """An address as it may be shown and stored: without the user's name and password."""
    return re.sub(r"(^|//)[^/@#]*@", r"\1", address)


def spare_loopback() -> None:
    """Add this machine's names to NO_PROXY, for the libraries that read it themselves; call it before they are loaded.

    Brackets around an address there, as curl accepts them, are taken off: httpx ends in a traceback.
    """
    if not any(name.lower().endswith("_proxy") for name in os.environ):
        return
    chosen = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    named = [part.strip().removeprefix("[").removesuffix("]") for part in chosen.split(",")]
    value = ",".join(dict.fromkeys(filter(None, [*named, "localhost", "127.0.0.1", "::1"])))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = value if "*" not in named else "*"


def is_loopback(host: str) -> bool:
    """Whether the host is this machine: localhost, 127.x.x.x, ::1, and 0.0.0.0, which clients take for it."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def proxy_for(url: str, *, socks_package: str = "socksio") -> Proxy | None:
    """The proxy through which `url` is asked, or None; `socks_package` is what the HTTP library needs for SOCKS.

    Raises OrionError for a proxy that cannot be used.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host) or _is_excepted(host, parts.port):
        return None
    for name in (f"{parts.scheme}_proxy", "all_proxy"):
        for variable in (name, name.upper()):
            if chosen := os.environ.get(variable, "").strip():
                return _checked(Proxy(chosen if "://" in chosen else f"http://{chosen}", variable), socks_package)
    return None


def _is_excepted(host: str, port: int | None) -> bool:
    """Whether NO_PROXY names the host, a domain above it, or its network."""
    exceptions = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    for exception in (part.strip() for part in exceptions.split(",")):
        if "/" in exception:
            try:
                if ipaddress.ip_address(host) in ipaddress.ip_network(exception, strict=False):
                    return True
            except ValueError:
                continue
        elif exception.strip("[]") == host:
            return True
    netloc = f"{host}:{port}" if port else host
    return bool(exceptions) and bool(urllib.request.proxy_bypass_environment(netloc, {"no": exceptions}))  # type: ignore[attr-defined]


def _checked(proxy: Proxy, socks_package: str) -> Proxy:
    try:
        parts = urlsplit(proxy.url)
        good = parts.scheme in _SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        shown = proxy.url.rpartition("@")[2]
        raise OrionError(
            f"{proxy.variable}: {shown!r} is not a usable proxy: its URL must be one of {', '.join(_SCHEMES)}.",
            f"Correct {proxy.variable}, or unset it.",
        )
    if parts.scheme.startswith("socks") and importlib.util.find_spec(socks_package) is None:
        package = {"socksio": "socksio", "socks": "pysocks"}[socks_package]
        raise OrionError(
            f"{proxy} is a SOCKS proxy, for which the package {package} is missing.",
            f"Run 'pip install {package}', set {proxy.variable} to an HTTP proxy, or unset it.",
        )
    return proxy
