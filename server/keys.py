"""KeyRing: whose key is presented, by a file that may change, and how often each may ask; `make_key`: one more key.

Knows nothing of HTTP or of what a right allows. The log never holds a hash or a key.
"""

from __future__ import annotations

import hmac
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from adapters.version_files import sync_directory
from server.caller import Caller
from server.key_file import KEY_PREFIX, InvalidKeyFile, digest_of, parse_keys, read_keys, stat_keys

__all__ = ["InvalidKey", "InvalidKeyFile", "KeyRing", "RateExceeded", "make_key"]

logger = logging.getLogger(__name__)

KEY_BYTES = 32
LOOK_EVERY_S = 1.0
MINUTE_S = 60.0
ROUNDING_S = 1e-6
"""More than differences of a clock's readings are off by."""

State = tuple[int, int, int] | str
"""mtime in ns, size and inode of the file that was read; or why there was none to read."""


class InvalidKey(Exception):
    """No key was presented, or none that is known."""


class RateExceeded(Exception):
    """A caller asked more often than its key allows."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """When the next request is within the rate; at least 1."""


class KeyRing:
    """The callers of a key file, and how often each may ask. Event loop only; the file is small."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: in seconds. Raises InvalidKeyFile, also when there is no file."""
        self._path = path
        self._clock = clock
        self._looked_at = clock()
        self._state: State = ""
        self._callers: list[tuple[bytes, Caller]] = []
        self._full_at: dict[str, float] = {}
        """Name -> when its bucket will have all its tokens again, if nothing more is taken."""
        self._read_if_changed()

    def find(self, presented: str) -> Caller | None:
        """Whose key `presented` is, by the file as it was at most a second ago.

        Keys are random, with 256 bits: nobody can try them all, so a plain hash protects them as well as a slow one
        would. Every entry is compared, each in constant time, so that the time taken tells nothing of what matched.
        """
        self._look()
        digest = digest_of(presented)
        found = None
        for expected, caller in self._callers:
            if hmac.compare_digest(digest, expected):
                found = caller
        return found

    def take(self, caller: Caller) -> None:
        """One token of the caller's bucket, for one request. Raises RateExceeded when there is none.

        The bucket holds one minute's worth and fills evenly. So who asks at most `requests_per_minute` times in any
        minute is never refused, however unevenly, and in no minute does anyone get more than twice that. It is kept as
        the time at which it will be full again: so its fill stays in proportion when the rate changes.
        """
        if caller.requests_per_minute is None:
            return
        now = self._clock()
        full_at = max(now, self._full_at.get(caller.name, now)) + MINUTE_S / caller.requests_per_minute
        wait_s = full_at - now - MINUTE_S
        if wait_s > ROUNDING_S:
            retry_after_s = max(1, math.ceil(wait_s - ROUNDING_S))
            raise RateExceeded(
                f"the key {caller.name} may make {caller.requests_per_minute} requests a minute; "
                f"the next is within that in {retry_after_s} s",
                retry_after_s,
            )
        self._full_at[caller.name] = full_at

    def _look(self) -> None:
        now = self._clock()
        if now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        try:
            self._read_if_changed()
        except InvalidKeyFile as error:
            logger.error("%s; the keys read before stay valid", error)

    def _read_if_changed(self) -> None:
        """Raises InvalidKeyFile, once for each change; then the callers are those from before."""
        try:
            found = stat_keys(self._path)
            state = (found.st_mtime_ns, found.st_size, found.st_ino)
            if state == self._state:
                return
            content = read_keys(self._path)
        except OSError as error:
            reason = f"it cannot be read: {error.strerror}"
            if reason == self._state:
                return
            self._state = reason
            raise InvalidKeyFile(f"key file {self._path}: {reason}") from error
        self._state = state
        entries = parse_keys(content, self._path).keys
        if found.st_mode & 0o077 and os.name != "nt":  # which has no such bits
            logger.warning("key file %s: others than its owner may read or write it (chmod 600 mends that)", self._path)
        self._callers = [(bytes.fromhex(entry.sha256), entry.caller()) for entry in entries]
        names = {entry.name for entry in entries}
        self._full_at = {name: full_at for name, full_at in self._full_at.items() if name in names}
        logger.info("key file %s: %d keys", self._path, len(entries))


def make_key(path: Path, name: str, **settings: Any) -> str:
    """A new key, whose hash is now in the file under `name`; the file is made when there is none.

    settings: further fields of KeyEntry. Raises InvalidKeyFile, when the file is broken or would be, and OSError; then
    the file is as it was. It is replaced as a whole, readable by its owner alone, who stays the same where we may.
    """
    target = Path(os.path.realpath(path))  # of a link, the file
    new = target.with_name(f".{target.name}.new")
    key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    try:  # before what is there is read: the new file is a lock too
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise InvalidKeyFile(f"{new} is there: remove it, unless another key is being made just now") from None
    try:
        with open(descriptor, "wb") as handle:
            entries: list[dict[str, Any]] = []
            if os.path.lexists(target):
                owner = stat_keys(target)
                entries = parse_keys(read_keys(target), path).model_dump(exclude_unset=True)["keys"]
                if hasattr(os, "fchown"):
                    with suppress(PermissionError):
                        os.fchown(handle.fileno(), owner.st_uid, owner.st_gid)
            if any(entry["name"] == name for entry in entries):
                raise InvalidKeyFile(f"key file {path}: there is a key named {name} already")
            entries.append({"name": name, "sha256": digest_of(key).hex(), **settings})
            content = json.dumps({"keys": entries}, indent=2).encode() + b"\n"
            parse_keys(content, path)
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(new, target)
    except BaseException:
        new.unlink()
        raise
    sync_directory(target.parent)
    return key
