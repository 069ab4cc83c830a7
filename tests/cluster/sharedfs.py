"""A directory seen through FUSE, so that one node can lose it: `python -I sharedfs.py SOURCE TARGET`.

A bind mount cannot be taken away from a process that has a file open in it; a network file system can, and what
a program meets then is the worst part of a cut: its calls hang, on old descriptors too. This is a loopback file
system that speaks the FUSE protocol (linux/fuse.h, version 7.31) itself, one server per node, ruled by signals:

- SIGSTOP: every call on the node hangs, yet its caller can be killed, as on a hard NFS mount without its server.
  SIGCONT: they go on.
- SIGHUP: requests are taken and not answered: their callers cannot be killed either (state D), as behind a dead
  disk or a lost Lustre target. SIGUSR2: all are answered.
- SIGUSR1: every call fails with EIO, as after an eviction by Lustre. SIGUSR2: back to normal.
- SIGRTMIN: whatever takes room fails with EDQUOT; SIGRTMIN+1: fsync fails with EIO; SIGRTMIN+2: nothing can be made,
  EACCES. SIGUSR2: back to normal.

Nodes share the files of SOURCE, not a page cache: each has its own, checked at every call (no attribute cache), so
they agree as the clients of a coherent network file system do. Pages stay in it when a file is opened again, unless the
file has changed. When it is unmounted, a server says on stderr how many bytes have been read from it. Locks (flock,
fcntl) hold within a node only, as on NFS without a lock manager. No extended attributes, no device files. Standard
library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import select
import signal
import socket
import stat
import struct
import sys
import time
from dataclasses import dataclass, field
from enum import Enum, IntEnum, auto
from pathlib import Path

MAX_WRITE = 1 << 20
ROOT = 1
KEEP_CACHE = 1 << 1
SERVER_FLAGS = os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_DIRECT

HEADER = struct.Struct("=IIQQIIIHH")
REPLY = struct.Struct("=IiQ")
ATTRIBUTES = struct.Struct("=6Q10I")
SETATTR = struct.Struct("=II6Q8I")


class Op(IntEnum):
    LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK = 1, 2, 3, 4, 5, 6
    MKDIR, UNLINK, RMDIR, RENAME, LINK, OPEN, READ, WRITE, STATFS, RELEASE = 9, 10, 11, 12, 13, 14, 15, 16, 17, 18
    FSYNC, INIT, OPENDIR, READDIR, RELEASEDIR, FSYNCDIR = 20, 26, 27, 28, 29, 30
    CREATE, INTERRUPT, DESTROY, BATCH_FORGET, FALLOCATE = 35, 36, 38, 42, 43


UNANSWERED = (Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT)


@dataclass(slots=True)
class Node:
    """A file the kernel knows: held by an O_PATH descriptor, so that its inode number cannot be reused."""

    fd: int
    key: tuple[int, int]
    lookups: int = 0


@dataclass(slots=True)
class Caller:
    node: int
    uid: int
    gid: int


@dataclass(slots=True)
class Files:
    root: int
    nodes: dict[int, Node] = field(default_factory=dict)
    known: dict[tuple[int, int], int] = field(default_factory=dict)
    listings: dict[int, list[tuple[bytes, int, int]]] = field(default_factory=dict)
    next_node: int = ROOT + 1
    next_listing: int = 1
    read_bytes: int = 0

    def __post_init__(self) -> None:
        self.nodes[ROOT] = Node(self.root, _key(os.fstat(self.root)))
        self.known[self.nodes[ROOT].key] = ROOT

    # What the kernel asks. Each gets the caller and the bytes behind the header and returns the bytes of its reply.

    def init(self, caller: Caller, body: bytes) -> bytes:
        _, _, readahead, offered = struct.unpack_from("=4I", body)
        async_read, atomic_trunc, big_writes, auto_inval, max_pages = 1, 1 << 3, 1 << 5, 1 << 12, 1 << 22
        flags = offered & (async_read | atomic_trunc | big_writes | auto_inval | max_pages)
        return struct.pack("=4I2H2I2H8I", 7, 31, readahead, flags, 16, 12, MAX_WRITE, 1, 256, 0, *[0] * 8)

    def destroy(self, caller: Caller, body: bytes) -> bytes:
        return b""

    def lookup(self, caller: Caller, body: bytes) -> bytes:
        return self._entry(caller.node, _names(body)[0])

    def forget(self, caller: Caller, body: bytes) -> bytes:
        self._forget(caller.node, struct.unpack_from("=Q", body)[0])
        return b""

    def batch_forget(self, caller: Caller, body: bytes) -> bytes:
        count = struct.unpack_from("=I", body)[0]
        for node, lookups in struct.iter_unpack("=QQ", body[8 : 8 + 16 * count]):
            self._forget(node, lookups)
        return b""

    def getattr(self, caller: Caller, body: bytes) -> bytes:
        return bytes(16) + _attributes(os.fstat(self.nodes[caller.node].fd))

    def setattr(self, caller: Caller, body: bytes) -> bytes:
        valid, _, fh, size, _, atime, mtime, _, atimens, mtimens, _, mode, _, uid, gid, _ = SETATTR.unpack_from(body)
        path = f"/proc/self/fd/{self.nodes[caller.node].fd}"
        if valid & 1:
            Path(path).chmod(stat.S_IMODE(mode))
        if valid & 6:
            os.chown(path, uid if valid & 2 else -1, gid if valid & 4 else -1)
        if valid & 8:
            os.truncate(fh if valid & 64 else path, size)
        if valid & (16 | 32):
            now = os.fstat(self.nodes[caller.node].fd)
            clock = time.time_ns()
            accessed = clock if valid & 128 else atime * 10**9 + atimens if valid & 16 else now.st_atime_ns
            modified = clock if valid & 256 else mtime * 10**9 + mtimens if valid & 32 else now.st_mtime_ns
            os.utime(path, ns=(accessed, modified))
        return self.getattr(caller, body)

    def readlink(self, caller: Caller, body: bytes) -> bytes:
        return os.readlink(b"", dir_fd=self.nodes[caller.node].fd)

    def symlink(self, caller: Caller, body: bytes) -> bytes:
        name, target = _names(body)
        os.symlink(target, name, dir_fd=self.nodes[caller.node].fd)
        return self._created(caller, name)

    def mkdir(self, caller: Caller, body: bytes) -> bytes:
        name = _names(body[8:])[0]
        os.mkdir(name, struct.unpack_from("=I", body)[0], dir_fd=self.nodes[caller.node].fd)
        return self._created(caller, name)

    def unlink(self, caller: Caller, body: bytes) -> bytes:
        os.unlink(_names(body)[0], dir_fd=self.nodes[caller.node].fd)
        return b""

    def rmdir(self, caller: Caller, body: bytes) -> bytes:
        os.rmdir(_names(body)[0], dir_fd=self.nodes[caller.node].fd)
        return b""

    def rename(self, caller: Caller, body: bytes) -> bytes:
        old, new = _names(body[8:])
        target = self.nodes[struct.unpack_from("=Q", body)[0]].fd
        os.rename(old, new, src_dir_fd=self.nodes[caller.node].fd, dst_dir_fd=target)
        return b""

    def link(self, caller: Caller, body: bytes) -> bytes:
        name = _names(body[8:])[0]
        source = self.nodes[struct.unpack_from("=Q", body)[0]].fd
        os.link(f"/proc/self/fd/{source}", name, dst_dir_fd=self.nodes[caller.node].fd)
        return self._entry(caller.node, name)

    def open(self, caller: Caller, body: bytes) -> bytes:
        flags = struct.unpack_from("=I", body)[0] & ~SERVER_FLAGS
        return struct.pack("=QIi", os.open(f"/proc/self/fd/{self.nodes[caller.node].fd}", flags), KEEP_CACHE, 0)

    def create(self, caller: Caller, body: bytes) -> bytes:
        flags, mode = struct.unpack_from("=II", body)
        name = _names(body[16:])[0]
        keep = flags & ~(SERVER_FLAGS ^ os.O_EXCL) | os.O_CREAT | os.O_NOFOLLOW
        parent = self.nodes[caller.node].fd
        try:
            fd = os.open(name, keep | os.O_EXCL, mode, dir_fd=parent)
            os.fchown(fd, caller.uid, caller.gid)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            fd = os.open(name, keep, mode, dir_fd=parent)
        return self._entry(caller.node, name) + struct.pack("=QIi", fd, 0, 0)

    def read(self, caller: Caller, body: bytes) -> bytes:
        fh, offset, size = struct.unpack_from("=QQI", body)
        data = os.pread(fh, size, offset)
        self.read_bytes += len(data)
        return data

    def write(self, caller: Caller, body: bytes) -> bytes:
        fh, offset, size = struct.unpack_from("=QQI", body)
        return struct.pack("=II", os.pwrite(fh, memoryview(body)[40 : 40 + size], offset), 0)

    def statfs(self, caller: Caller, body: bytes) -> bytes:
        fs = os.statvfs(self.root)
        counts = (fs.f_blocks, fs.f_bfree, fs.f_bavail, fs.f_files, fs.f_ffree)
        return struct.pack("=5Q4I24x", *counts, fs.f_bsize, fs.f_namemax, fs.f_frsize, 0)

    def release(self, caller: Caller, body: bytes) -> bytes:
        os.close(struct.unpack_from("=Q", body)[0])
        return b""

    def fsync(self, caller: Caller, body: bytes) -> bytes:
        os.fsync(struct.unpack_from("=Q", body)[0])
        return b""

    def fallocate(self, caller: Caller, body: bytes) -> bytes:
        fh, offset, length, mode = struct.unpack_from("=QQQI", body)
        if mode:
            raise OSError(errno.EOPNOTSUPP, "only plain allocation")
        os.posix_fallocate(fh, offset, length)
        return b""

    def opendir(self, caller: Caller, body: bytes) -> bytes:
        self.next_listing += 1
        return struct.pack("=QIi", self.next_listing, 0, 0)

    def readdir(self, caller: Caller, body: bytes) -> bytes:
        fh, offset, size = struct.unpack_from("=QQI", body)
        if offset == 0 or fh not in self.listings:
            fd = os.open(f"/proc/self/fd/{self.nodes[caller.node].fd}", os.O_RDONLY | os.O_DIRECTORY)
            try:
                with os.scandir(fd) as found:
                    kinds = [(os.fsencode(e.name), e.inode(), e.stat(follow_symlinks=False).st_mode) for e in found]
            finally:
                os.close(fd)
            dots = [(b".", caller.node, stat.S_IFDIR), (b"..", ROOT, stat.S_IFDIR)]
            self.listings[fh] = dots + kinds
        reply = bytearray()
        for index, (name, inode, mode) in enumerate(self.listings[fh][offset:], start=offset + 1):
            entry = struct.pack("=QQII", inode, index, len(name), mode >> 12) + name
            entry += bytes(-len(entry) % 8)
            if len(reply) + len(entry) > size:
                break
            reply += entry
        return bytes(reply)

    def releasedir(self, caller: Caller, body: bytes) -> bytes:
        self.listings.pop(struct.unpack_from("=Q", body)[0], None)
        return b""

    def fsyncdir(self, caller: Caller, body: bytes) -> bytes:
        fd = os.open(f"/proc/self/fd/{self.nodes[caller.node].fd}", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        return b""

    def _created(self, caller: Caller, name: bytes) -> bytes:
        parent = self.nodes[caller.node].fd
        os.chown(name, caller.uid, caller.gid, dir_fd=parent, follow_symlinks=False)
        return self._entry(caller.node, name)

    def _entry(self, parent: int, name: bytes) -> bytes:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self.nodes[parent].fd)
        found = os.fstat(fd)
        key = _key(found)
        number = self.known.get(key)
        if number is None:
            number = self.next_node
            self.next_node += 1
            self.nodes[number] = Node(fd, key)
            self.known[key] = number
        else:
            os.close(fd)
        self.nodes[number].lookups += 1
        return struct.pack("=QQQQII", number, 0, 0, 0, 0, 0) + _attributes(found)

    def _forget(self, number: int, lookups: int) -> None:
        node = self.nodes[number]
        node.lookups -= lookups
        if node.lookups <= 0 and number != ROOT:
            os.close(node.fd)
            del self.nodes[number], self.known[node.key]


def _key(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _names(body: bytes) -> list[bytes]:
    return body.split(b"\0")[:-1]


def _attributes(found: os.stat_result) -> bytes:
    times = [divmod(at, 10**9) for at in (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns)]
    return ATTRIBUTES.pack(
        found.st_ino, found.st_size, found.st_blocks, *(second for second, _ in times), *(nano for _, nano in times),
        found.st_mode, found.st_nlink, found.st_uid, found.st_gid, found.st_rdev, found.st_blksize, 0,
    )  # fmt: skip


class Mood(Enum):
    GOOD, BROKEN, SILENT, FULL, UNSYNCED, DENIED = auto(), auto(), auto(), auto(), auto(), auto()


MOODS = {
    signal.SIGUSR1: Mood.BROKEN,
    signal.SIGUSR2: Mood.GOOD,
    signal.SIGHUP: Mood.SILENT,
    signal.SIGRTMIN: Mood.FULL,
    signal.SIGRTMIN + 1: Mood.UNSYNCED,
    signal.SIGRTMIN + 2: Mood.DENIED,
}
FAULTS = {
    Mood.BROKEN: (errno.EIO, set(Op) - {Op.RELEASE, Op.RELEASEDIR, *UNANSWERED}),
    Mood.FULL: (errno.EDQUOT, {Op.CREATE, Op.MKDIR, Op.SYMLINK, Op.WRITE, Op.FALLOCATE}),
    Mood.UNSYNCED: (errno.EIO, {Op.FSYNC, Op.FSYNCDIR}),
    Mood.DENIED: (errno.EACCES, {Op.CREATE, Op.MKDIR, Op.SYMLINK, Op.LINK, Op.RENAME, Op.UNLINK, Op.RMDIR}),
}


def reply_to(files: Files, op: int, caller: Caller, body: bytes, mood: Mood) -> tuple[int, bytes]:
    """The error number (0 for none) and the bytes of the reply. What is not implemented is ENOSYS, which the kernel
    remembers (FLUSH among them: nothing is written back late, so closing a file waits for nobody)."""
    answer = getattr(files, Op(op).name.lower(), None) if op in set(Op) else None
    if answer is None:
        return errno.ENOSYS, b""
    fault, faulty = FAULTS.get(mood, (0, ()))
    if op in faulty:
        return fault, b""
    try:
        return 0, answer(caller, body)
    except OSError as error:
        return error.errno or errno.EIO, b""


def serve(files: Files, fuse: int) -> None:
    mood = Mood.GOOD
    waiting: list[bytes] = []

    def change(to: Mood) -> None:
        nonlocal mood
        mood = to

    woken, wake = socket.socketpair()
    wake.setblocking(False)
    woken.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    for number, to in MOODS.items():
        signal.signal(number, lambda *_, to=to: change(to))
    poll = select.poll()
    poll.register(fuse, select.POLLIN)
    poll.register(woken, select.POLLIN)
    while True:
        poll.poll()
        try:
            waiting.append(os.read(fuse, MAX_WRITE + 4096))
        except OSError as error:
            if error.errno == errno.ENODEV:  # unmounted
                with contextlib.suppress(OSError):
                    os.write(2, b"read: %d bytes\n" % files.read_bytes)
                return
            if error.errno not in (errno.EAGAIN, errno.ENOENT, errno.EINTR):  # ENOENT: the caller was interrupted
                raise
            with contextlib.suppress(BlockingIOError):
                woken.recv(4096)
        while waiting and mood is not Mood.SILENT:
            request = waiting.pop(0)
            _, op, unique, node, uid, gid, _, _, _ = HEADER.unpack_from(request)
            failed, reply = reply_to(files, op, Caller(node, uid, gid), request[HEADER.size :], mood)
            if op not in UNANSWERED:
                with contextlib.suppress(FileNotFoundError):  # the caller was killed meanwhile
                    os.write(fuse, REPLY.pack(REPLY.size + len(reply), -failed, unique) + reply)


def main() -> None:
    source, target = sys.argv[1:]
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    files = Files(os.open(source, os.O_PATH | os.O_DIRECTORY))
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,max_read={MAX_WRITE}"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"shared", target.encode(), b"fuse.hpcft", 0, options.encode()):
        raise OSError(ctypes.get_errno(), f"mount {target}: {os.strerror(ctypes.get_errno())}")
    if os.fork():
        # One file is opened and closed before anything can hang, so that the kernel learns not to ask for FLUSH.
        probe = Path(target) / f".mounted-{os.getpid()}"
        probe.touch()
        probe.unlink()
        os._exit(0)
    os.setsid()  # a stopped member of a process group that loses its parent would get SIGHUP
    os.umask(0)  # the kernel has applied the caller's
    os.chdir("/")
    serve(files, fuse)


if __name__ == "__main__":
    main()
