"""Objects in an S3-compatible store: put, get, list, delete. Every call blocks, and may for minutes.

The one place that knows `obstore`, the optional extra `hpcft[s3]`, which is imported when a bucket is opened and not
before. Credentials are found by obstore in the environment or from the instance (docs/object-storage.md); they are in
no setting, message or file of ours.

A request has a time limit, and is tried a few times by obstore; what is then still wrong is a `BucketError` of one
line. How long to go on trying is for callers to decide.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from hpcft.errors import NotFoundError, UnusableError, UsageError
from hpcft.places import Place, flaw_of_endpoint, flaw_of_url

if TYPE_CHECKING:
    from hpcft.durable import Buffer

REQUEST_SECONDS = 120.0
"""For one request: 16 MiB within it need 0.14 MB/s."""

_CODE = re.compile(r"<Code>(\w+)</Code>")
_STATUS = re.compile(r"status code: (\d{3}[\w ]*)")


class BucketError(UnusableError):
    """The store refused a request, gave no answer, or cannot be reached."""


def require_extra(wanted_by: str) -> None:
    """Raises UsageError where obstore is not installed; imports nothing."""
    if importlib.util.find_spec("obstore") is None:
        raise UsageError(f"{wanted_by} needs obstore, which is not installed", "pip install 'hpcft[s3]'")


@dataclass(frozen=True, slots=True)
class ObjectMeta:
    key: str
    size: int
    etag: str
    """Without quotes. The MD5 of the bytes in most stores, where they were put at once and are not encrypted by key."""
    modified: datetime
    """By the store's clock."""


class Bucket:
    """The objects below a prefix, by keys relative to it. May be used by several threads.

    Raises from all its methods: BucketError; NotFoundError where said.
    """

    def __init__(self, place: Place, request_seconds: float = REQUEST_SECONDS) -> None:
        """UsageError: the extra is missing, or the address is none."""
        require_extra(place.url)
        if flaw := flaw_of_url(place.url) or (place.endpoint and flaw_of_endpoint(place.endpoint)):
            raise UsageError(f"the address of the object store {flaw}")
        import obstore
        from obstore.store import S3Store

        self._obstore = obstore
        self.url = place.url.rstrip("/")
        options: dict[str, Any] = {}
        if place.endpoint:
            options["endpoint"] = place.endpoint
        if place.region:
            options["region"] = place.region
        client: dict[str, Any] = {
            "timeout": timedelta(seconds=request_seconds),
            "connect_timeout": timedelta(seconds=10),
        }
        if place.endpoint.startswith("http://"):
            client["allow_http"] = True
        retries = {"max_retries": 3, "retry_timeout": timedelta(seconds=request_seconds)}
        try:
            self._store = S3Store.from_url(self.url, client_options=client, retry_config=retries, **options)  # type: ignore[arg-type]
        except (obstore.exceptions.BaseError, ValueError) as error:
            raise UsageError(f"{self.url} cannot be opened: {_first_line(error)}") from error

    def put(self, key: str, data: Buffer) -> str:
        """Returns the ETag, unquoted. The object is there as a whole, or not at all."""
        try:
            done = self._obstore.put(self._store, key, data, use_multipart=False)
        except Exception as error:
            raise self._refused("put", key, error) from error
        return (done["e_tag"] or "").strip('"')

    def get(self, key: str) -> tuple[memoryview, str]:
        """All of an object, and its ETag. NotFoundError: there is no such object."""
        try:
            found = self._obstore.get(self._store, key)
            return memoryview(found.bytes()), (found.meta["e_tag"] or "").strip('"')
        except Exception as error:
            raise self._refused("read", key, error) from error

    def get_range(self, key: str, start: int, length: int, etag: str) -> memoryview:
        """A part of the object that has this ETag. NotFoundError: there is none, or it is another one by now."""
        try:
            found = self._obstore.get(self._store, key, options={"range": (start, start + length), "if_match": etag})
            return memoryview(found.bytes())
        except Exception as error:
            raise self._refused("read", key, error) from error

    def objects(self, prefix: str) -> Iterator[ObjectMeta]:
        """What is below `prefix`, which ends with a slash or is empty, in the order of the keys."""
        try:
            for page in self._obstore.list(self._store, prefix or None):
                for each in page:
                    etag = (each["e_tag"] or "").strip('"')
                    yield ObjectMeta(each["path"], each["size"], etag, each["last_modified"])
        except Exception as error:
            raise self._refused("list", prefix, error) from error

    def names(self, prefix: str) -> list[str]:
        """The next parts of the keys below `prefix`, where more follows: what would be directories."""
        try:
            found = self._obstore.list_with_delimiter(self._store, prefix or None)
        except Exception as error:
            raise self._refused("list", prefix, error) from error
        return sorted(each.rstrip("/").rpartition("/")[2] for each in found["common_prefixes"])

    def delete(self, keys: list[str]) -> None:
        """Those that are not there are passed over."""
        try:
            if keys:
                self._obstore.delete(self._store, keys)
        except FileNotFoundError:
            return
        except Exception as error:
            raise self._refused("delete", keys[0], error) from error

    def _refused(self, what: str, key: str, error: Exception) -> BucketError | NotFoundError:
        known = self._obstore.exceptions
        if not isinstance(error, (known.BaseError, OSError, ValueError)):
            raise error
        said = str(error)
        place = f"{self.url}/{key}"
        missing = isinstance(error, (FileNotFoundError, known.PreconditionError))
        if missing and "NoSuchBucket" not in said:
            return NotFoundError(f"there is no object {place}")
        code, status = _CODE.search(said), _STATUS.search(said)
        denied = status is not None and status[1][:3] in ("401", "403")
        if denied or isinstance(error, known.UnauthenticatedError | known.PermissionDeniedError):
            why = f"it refuses our credentials{f' ({code[1]})' if code else ''}"
            hint = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the instance's role: docs/object-storage.md"
            return BucketError(f"{place} cannot be {_PAST[what]}: {why}", hint)
        if code:
            why = code[1]
        elif status:
            why = f"the store answered {status[1].strip()}"
        elif "error sending request" in said or "timed out" in said or "timeout" in said:
            why = "the store gave no answer"
        else:
            why = _first_line(error)
        return BucketError(f"{place} cannot be {_PAST[what]}: {why}", "is the store up, and the address right?")


_PAST = {"put": "written", "read": "read", "list": "listed", "delete": "deleted"}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
