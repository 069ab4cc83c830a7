"""Addresses of object stores, as a configuration has them. Nothing in them is secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

_URL = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^?#]*)?")
_ENDPOINT = re.compile(r"https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::(\d{1,5}))?/?")
_LAST_PORT = 65535
_OVERRIDING = "AWS_ENDPOINT_URL_S3"
_VARIABLES = (_OVERRIDING, "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


@dataclass(frozen=True, slots=True)
class Place:
    """Where objects lie. Nothing in it is secret."""

    url: str
    endpoint: str = ""
    """Of a store that is not Amazon's; empty: as the environment says."""
    region: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        return cls(str(raw["url"]), str(raw["endpoint"]), str(raw["region"]))


def flaw_of_url(url: str) -> str:
    """Why this is not the place of objects; empty when it is. Credentials in it are refused without being repeated."""
    if "@" in url:
        return "has an @ in it: credentials come from the environment, never from an address"
    if not _URL.fullmatch(url):
        return f"{url!r} is not of the form s3://bucket or s3://bucket/prefix"
    return ""


def flaw_of_endpoint(endpoint: str) -> str:
    """As `flaw_of_url`, of the address of a store."""
    if "@" in endpoint:
        return "has an @ in it: credentials come from the environment, never from an address"
    found = _ENDPOINT.fullmatch(endpoint)
    if found is None:
        return f"{endpoint!r} is not of the form https://host or https://host:port"
    if found[1] is not None and not 0 < int(found[1]) <= _LAST_PORT:
        return f"{endpoint!r} has a port that there is not: they go from 1 to {_LAST_PORT}"
    return ""


ADDRESS_HINT = "unset the variable, or correct the address: docs/object-storage.md"


def endpoint_of(place: Place, environment: Mapping[str, str]) -> tuple[str, str]:
    """The address of the store, and why it cannot be used, or nothing. Both empty: Amazon's own.

    What the client would find in the environment is told to it, so that it is checked like a configured one.
    """
    overriding = environment.get(_OVERRIDING, "")
    if place.endpoint:
        if flaw := flaw_of_endpoint(place.endpoint):
            return place.endpoint, f"the address of the object store {flaw}"
        if overriding and overriding.rstrip("/") != place.endpoint.rstrip("/"):
            # Its client prefers the variable, whatever it is told.
            return place.endpoint, f"{_OVERRIDING} in the environment is another address than {place.endpoint}"
        return place.endpoint, ""
    for name in _VARIABLES:
        if endpoint := environment.get(name, ""):
            flaw = flaw_of_endpoint(endpoint)
            return endpoint, f"the address of the object store in the environment, {name}, {flaw}" if flaw else ""
    return "", ""
