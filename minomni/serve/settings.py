"""Settings of one server."""

import ipaddress
import re
from dataclasses import dataclass

from minomni.errors import UserError, quote

TOKEN = re.compile(r"[A-Za-z0-9._~-]{16,256}")
HOST_NAME = re.compile(r"[a-z0-9._-]{1,253}")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Settings:
    """Address, access and limits of one server."""

    host: str = "127.0.0.1"
    port: int = 8000
    names: tuple[str, ...] = ()  # host names that requests may give, of a proxy for example
    token: str | None = None  # a client must give it; None for a server of this machine alone
    sessions: int = 32  # requests and conversations at once; others get status 429
    decoders: int = 4  # threads that decode media; further media wait, see Server.decode()
    body_bytes: int = 32 * 2**20  # of a request
    frame_bytes: int = 2**20  # of a WebSocket message
    body_s: float = 60.0  # seconds that a request may take to arrive
    send_s: float = 20.0  # seconds until a client that does not read is dropped
    session_s: float = 3600.0  # seconds that a conversation may last

    def check(self) -> None:
        """Raises UserError for settings that would be unsafe or cannot work."""
        if self.token is not None and not TOKEN.fullmatch(self.token):
            raise UserError(
                "the token has characters or a length that headers do not carry well; give 16 to "
                "256 letters, digits and . _ ~ -"
            )
        for name in self.names:
            if not HOST_NAME.fullmatch(name):
                raise UserError(
                    f"--allow-host {quote(name)} is no host name; give it in lower case, without "
                    f"https:// and without a port"
                )
        if not is_loopback(self.host) and self.token is None:
            raise UserError(
                f"--host {quote(self.host)} can be reached from other machines; set a token in the "
                f"environment variable MINOMNI_TOKEN, or leave --host out"
            )
        if self.names and self.token is None:
            raise UserError(
                "--allow-host is for a proxy that other machines reach; set a token in the "
                "environment variable MINOMNI_TOKEN"
            )

    def allows_host(self, host: str) -> bool:
        """Whether a request may name this host, without its port.

        A page of another site can make its own name point here (DNS rebinding), but it cannot own
        an address: addresses are allowed where the server is meant for other machines.
        """
        if host in LOOPBACK_NAMES or host in (self.host.lower(), *self.names):
            return True
        return not is_loopback(self.host) and is_address(host)


def is_address(host: str) -> bool:
    """Whether a host is a numeric address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at this host."""
    if host == "localhost":
        return True
    return is_address(host) and ipaddress.ip_address(host).is_loopback
