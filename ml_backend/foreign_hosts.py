"""Which hosts outside Label Studio may be asked for images. Anybody who may import tasks chooses the addresses that
this service asks, so private networks (and the metadata service of clouds) stay closed unless a setting opens them."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Self
from urllib.parse import urlsplit

import httpx

from model.errors import TSPError

_Address = IPv4Address | IPv6Address

_NAT64 = IPv6Network("64:ff9b::/96")  # IPv4 addresses as IPv6-only networks spell them


class PrivateAddressError(TSPError):
    """A host has private addresses alone; the message lists them."""


@dataclass(frozen=True)
class AllowedHosts:
    """TSP_ALLOWED_IMAGE_HOSTS, parsed. A host that is allowed by name may have any address, and is reached through the
    proxy of the environment if there is one."""

    text: str = ""
    names: frozenset[str] = frozenset()
    domains: tuple[str, ...] = ()  # ".example.com" for "*.example.com"
    networks: tuple[IPv4Network | IPv6Network, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """From names, `*.domain`, addresses and networks, separated by commas; ValueError names what is none."""
        names: list[str] = []
        domains: list[str] = []
        networks: list[IPv4Network | IPv6Network] = []
        for entry in filter(None, (part.strip() for part in text.split(","))):
            network = _network(entry)
            if network is not None:
                networks.append(network)
            elif entry.startswith("*."):
                domains.append(f".{_name(entry.removeprefix('*.'), entry)}")
            else:
                names.append(_name(entry, entry))
        return cls(text.strip(), frozenset(names), tuple(domains), tuple(networks))

    def has_name(self, host: str) -> bool:
        """Whether this host, as it stands in an address, is allowed by its name."""
        name = _folded(host)
        return name in self.names or name.endswith(self.domains or "\0")

    def allows(self, address: _Address) -> bool:
        """Whether images may be fetched from this address: a public one, or one of the networks."""
        return _is_public(address) or any(
            form in network for form in (address, _ipv4_in(address)) if form for network in self.networks
        )

    def with_host(self, host: str) -> str:
        """The setting that would allow this host, too."""
        return ",".join(filter(None, (self.text, host)))


class JudgingTransport(httpx.HTTPTransport):
    """Looks a host's addresses up, judges them, and connects to the very addresses that were judged: what the name
    stands for a moment later does not matter. `Host` and the name in the certificate stay those of the address.

    Raises PrivateAddressError when no address of a host may be asked. Uses no proxy: that would look the name up anew.
    """

    def __init__(self, allowed: AllowedHosts) -> None:
        # A connection that is kept would be shared by all names with its address, whatever their certificates say.
        super().__init__(limits=httpx.Limits(max_keepalive_connections=0), trust_env=True)
        self._allowed = allowed

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        addresses = list(_addresses(request.url))
        permitted = [address for address in addresses if self._allowed.allows(address)]
        if not permitted:
            raise PrivateAddressError(", ".join(map(str, addresses)))
        for address in permitted[:-1]:
            try:
                return super().handle_request(_to(address, request))
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue  # such as IPv6 where there is none
        return super().handle_request(_to(permitted[-1], request))


def host_of(uri: str) -> str:
    """The host of a web address, with the port if it names one; "" of any other."""
    try:
        parts = urlsplit(uri)
        return f"{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}"
    except ValueError:  # no address at all, which the image store says better
        return ""


def _addresses(url: httpx.URL) -> Iterator[_Address]:
    """What the system makes of the host, in its order; that includes 127.1, 0x7f000001 and other spellings."""
    try:
        found = socket.getaddrinfo(url.raw_host.decode().strip("[]"), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise httpx.ConnectError(f"the host {url.host} is not known ({error})") from error
    for *_, place in found:
        yield ip_address(place[0])


def _to(address: _Address, request: httpx.Request) -> httpx.Request:
    """The same request, sent to this address; `Host` is among the headers already."""
    host = request.url.raw_host.decode().strip("[]")
    return httpx.Request(
        request.method,
        request.url.copy_with(host=str(address)),
        headers=request.headers,
        stream=request.stream,
        extensions={**request.extensions, "sni_hostname": host},
    )


def _is_public(address: _Address) -> bool:
    inner = _ipv4_in(address)
    if inner is not None:
        return _is_public(inner)
    return address.is_global and not (address.is_multicast or address.is_reserved)


def _ipv4_in(address: _Address) -> IPv4Address | None:
    """The IPv4 address that an IPv6 address leads to (mapped, 6to4, NAT64), if it is of such a kind."""
    if isinstance(address, IPv4Address):
        return None
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def _network(entry: str) -> IPv4Network | IPv6Network | None:
    try:
        return ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        return None


def _name(name: str, entry: str) -> str:
    """A host's name as it stands in addresses; whatever else an address has is refused."""
    try:
        url = httpx.URL(f"http://{name}")
    except httpx.InvalidURL:
        url = httpx.URL("")
    host = _folded(url.host)
    if not host or "*" in host or _folded(name) not in (host, _folded(url.raw_host.decode())):
        raise ValueError(
            f"expected host names, *.domain, addresses or networks separated by commas, without scheme, port or path, "
            f"such as images.example.com,*.example.org,10.0.0.0/8; got {entry!r}"
        )
    return host


def _folded(host: str) -> str:
    return host.lower().removesuffix(".")
