"""What is the program's own doing, and what is not."""

from __future__ import annotations

import errno
import os

import pytest
from torch._utils import ExceptionWrapper

from hpcft.surroundings import fault


def refused(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/data/part-0")


def relayed(error: Exception) -> Exception:
    """As torch brings it from a loader process."""
    try:
        raise error
    except Exception:
        wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(Exception) as again:
        wrapper.reraise()
    return again.value


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "EREMOTEIO", "ECONNRESET", "ENODEV"])
def test_what_a_file_system_or_a_network_says(name: str) -> None:
    assert fault(refused(getattr(errno, name))) == name
    assert fault(relayed(refused(getattr(errno, name)))) == name


@pytest.mark.parametrize("name", ["ENOENT", "EACCES", "ENOSPC", "EISDIR", "EMFILE", "ENOMEM"])
def test_what_may_be_the_programs_own_mistake(name: str) -> None:
    assert fault(refused(getattr(errno, name))) == ""
    assert fault(relayed(refused(getattr(errno, name)))) == ""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be …", "uncorrectable ECC error"),
        (
            "NCCL error in: work.cpp:1: unhandled cuda error, Cuda failure 'uncorrectable ECC error encountered'",
            "uncorrectable ECC error",
        ),
        ("CUDA error: uncorrectable NVLink error detected during the execution", "uncorrectable NVLink error"),
        (
            "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
            "CUDA-capable device(s) is/are busy or unavailable",
        ),
        ("CUDA error: device-side assert triggered", ""),
        ("CUDA error: unspecified launch failure", ""),
        ("CUDA error: an illegal memory access was encountered", ""),
        ("CUDA out of memory", ""),
    ],
)
def test_what_a_gpu_says(text: str, found: str) -> None:
    assert fault(RuntimeError(text)) == found
    assert fault(ValueError(text)) == "", "somebody quotes it"


def test_an_exception_that_was_made_of_another() -> None:
    def read(how: str) -> None:
        try:
            raise refused(errno.EIO)
        except OSError as error:
            if how == "from":
                raise ValueError("cannot decode") from error
            if how == "none":
                raise ValueError("cannot decode") from None
            raise ValueError("cannot decode")  # noqa: B904

    for how, found in (("from", "EIO"), ("while", "EIO"), ("none", "")):
        with pytest.raises(ValueError, match="decode") as caught:
            read(how)
        assert fault(caught.value) == found
        assert fault(relayed(caught.value)) == found


def test_what_only_looks_like_it() -> None:
    assert fault(TimeoutError()) == "", "a limit that the program has set itself"
    assert fault(ValueError("OSError: [Errno 5] Input/output error")) == ""
    error = KeyError("x")
    error.fault = "EIO"  # type: ignore[attr-defined]
    assert fault(error) == "", "the program's own attribute"
    ring = ValueError("a ring")
    ring.__context__ = other = ValueError("of two")
    other.__context__ = ring
    assert fault(ring) == ""
