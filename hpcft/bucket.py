"""Objects in an S3-compatible store: put, get, list, delete. Every call blocks, and may for minutes.

The one place that knows `obstore`, the optional extra `hpcft[s3]`, which is imported when a bucket is opened and not
before. Credentials are found by obstore in the environment or from the instance (docs/object-storage.md); they are in
no setting, message or file of ours.

A request has a time limit, and is tried a few times by obstore; what is then still wrong is a `BucketError` of one
line. How long to go on trying is for callers to decide.

While it waits, obstore does not look for signals. So the main thread leaves its requests to threads that nobody has to
wait for, and can be interrupted. After that the process has to end by `lanes.end_process`: one of these threads
may come back while Python is being taken down.
"""

from __future__ import annotations

import importlib.util
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from hpcft.errors import NotFoundError, UnusableError, UsageError
from hpcft.places import ADDRESS_HINT, Place, endpoint_of, flaw_of_url

if TYPE_CHECKING:
    from hpcft.durable import Buffer

_T = TypeVar("_T")

REQUEST_SECONDS = 120.0
"""For one request: 16 MiB within it need 0.14 MB/s."""

_CODE = re.compile(r"<Code>(\w+)</Code>")
_STATUS = re.compile(r"status code: (\d{3}[\w ]*)")


class BucketError(UnusableError):
    """The store refused a request, gave no answer, or cannot be reached."""


def begun(work: Callable[[], _T]) -> Future[_T]:
    """Does it on a thread of its own, which nobody has to wait for, not even the end of the process."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # whatever it is: it is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name="hpcft-request", daemon=True).start()
    return future


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
        if flaw := flaw_of_url(place.url):
            raise UsageError(f"the address of the object store {flaw}")
        endpoint, flaw = endpoint_of(place, os.environ)
        if flaw:
            raise UsageError(flaw, ADDRESS_HINT)
        import obstore
        from obstore.store import S3Store

        self._obstore = obstore
        self.url = place.url.rstrip("/")
        options: dict[str, Any] = {}
        if endpoint:
            options["endpoint"] = endpoint
        if place.region:
            options["region"] = place.region
        client: dict[str, Any] = {
            "timeout": timedelta(seconds=request_seconds),
            "connect_timeout": timedelta(seconds=10),
        }
        if endpoint.startswith("http://"):
            client["allow_http"] = True
        retries = {"max_retries": 3, "retry_timeout": timedelta(seconds=request_seconds)}
        try:
            self._store = S3Store.from_url(self.url, client_options=client, retry_config=retries, **options)  # type: ignore[arg-type]
        except (obstore.exceptions.BaseError, ValueError) as error:
            raise UsageError(f"{self.url} cannot be opened: {_first_line(error)}") from error

    def put(self, key: str, data: Buffer) -> str:
        """Returns the ETag, unquoted. The object is there as a whole, or not at all."""
        done = self._ask("put", key, lambda: self._obstore.put(self._store, key, data, use_multipart=False))
        return (done["e_tag"] or "").strip('"')

    def get(self, key: str) -> tuple[memoryview, str]:
        """All of an object, and its ETag. NotFoundError: there is no such object."""
        return self._read(key)

    def get_range(self, key: str, start: int, length: int, etag: str) -> memoryview:
        """A part of the object that has this ETag. NotFoundError: there is none, or it is another one by now."""
        return self._read(key, options={"range": (start, start + length), "if_match": etag})[0]

    def _read(self, key: str, **options: Any) -> tuple[memoryview, str]:
        def request() -> tuple[memoryview, str]:
            found = self._obstore.get(self._store, key, **options)
            return memoryview(found.bytes()), (found.meta["e_tag"] or "").strip('"')

        return self._ask("read", key, request)

    def objects(self, prefix: str) -> Iterator[ObjectMeta]:
        """What is below `prefix`, which ends with a slash or is empty, in the order of the keys."""
        pages = iter(self._obstore.list(self._store, prefix or None))
        while (page := self._ask("list", prefix, lambda: next(pages, None))) is not None:
            for each in page:
                etag = (each["e_tag"] or "").strip('"')
                yield ObjectMeta(each["path"], each["size"], etag, each["last_modified"])

    def names(self, prefix: str) -> list[str]:
        """The next parts of the keys below `prefix`, where more follows: what would be directories."""
        found = self._ask("list", prefix, lambda: self._obstore.list_with_delimiter(self._store, prefix or None))
        return sorted(each.rstrip("/").rpartition("/")[2] for each in found["common_prefixes"])

    def delete(self, keys: list[str]) -> None:
        """Those that are not there are passed over."""
        if keys:
            with suppress(NotFoundError):
                self._ask("delete", keys[0], lambda: self._obstore.delete(self._store, keys))

    def _ask(self, what: str, key: str, request: Callable[[], _T]) -> _T:
        try:
            if threading.current_thread() is threading.main_thread():
                return begun(request).result()
            return request()
        except Exception as error:
            raise self._refused(what, key, error) from error
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust; it is no Exception, and is exported nowhere
                raise
            raise BucketError(
                f"{self.url}/{key} cannot be {_PAST[what]}: the client of the store has failed: {_first_line(error)}",
                "are the address, the region and the credentials right, and without line breaks?",
            ) from error

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


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]
