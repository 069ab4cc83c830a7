"""Addresses of object stores, as a configuration has them. Nothing in them is secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

_URL = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^?#]*)?")
_ENDPOINT = re.compile(r"https?://[^@/?#\s]+/?")


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
    if not _ENDPOINT.fullmatch(endpoint):
        return f"{endpoint!r} is not of the form https://host or https://host:port"
    return ""
