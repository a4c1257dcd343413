"""The socket between the trainer and a worker: one JSON document a line; lines of any other
process are dropped.

A worker's children cannot answer in its place: their programs do not inherit the socket, in
their forks it is /dev/null, and on Linux the kernel names the sender of all data, so that data of
another process is dropped. Every answer repeats the number and the random token of
its question. Code that runs in the worker itself can read both: what grades is trusted, what it
starts is not.
"""

import json
import logging
import os
import socket
import struct
from typing import TypeGuard, TypeVar

from jaxrft.host.files import UnreadableJSON, parse_json

logger = logging.getLogger(__name__)

T = TypeVar("T")

# an answer has fewer than 5,000 bytes, the names of a function's parameters are a few more
LINE_BYTES = 1 << 16
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid
_SCM_CREDENTIALS = getattr(socket, "SCM_CREDENTIALS", None)  # Linux only

# a reward, or None with the kind of the failure and a sentence
Answer = tuple[float | None] | tuple[None, str, str]
LARGEST = 3.4028234e38  # of float32, in which rewards are added up
KINDS_OF_WORKER = ("wrong_length", "error", "invalid")


class Garbled(ValueError):
    """Reports bytes that are no answer."""


def is_reward(value: object) -> TypeGuard[float | None]:
    """Decides whether a reward function may give this: None, or a finite number of float32."""
    return value is None or (isinstance(value, float) and abs(value) <= LARGEST)


class Wire:
    """The trainer's end."""

    def __init__(self, timeout: float) -> None:
        """Opens both ends; `timeout` bounds the seconds that `send` waits for a worker that does
        not read.
        """
        self._socket, self.worker_end = socket.socketpair()
        self._socket.settimeout(timeout)
        if _SCM_CREDENTIALS is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._worker: int | None = None  # the process that spoke first, before it loaded any reward
        self._rest = b""
        self._warned = False

    def fileno(self) -> int:
        """Returns the descriptor to wait for."""
        return self._socket.fileno()

    def close(self) -> None:
        """Closes the trainer's end."""
        self._socket.close()

    def send(self, message: dict[str, object]) -> None:
        """Sends a message; raises OSError for a worker that is dead or does not read."""
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[bytes]:
        """Returns the whole lines that have come from the worker; raises EOFError at its end, and
        Garbled.

        A line of more than LINE_BYTES bytes is Garbled, whether its end has come or not.
        """
        try:
            data, ancillary, _, _ = self._socket.recvmsg(
                1 << 16, socket.CMSG_SPACE(_CREDENTIALS.size)
            )
        except OSError:
            data = b""
            ancillary = []
        if not data:
            raise EOFError
        if not self._is_from_worker(ancillary):
            return []
        *lines, self._rest = (self._rest + data).split(b"\n")
        if max(map(len, (*lines, self._rest))) > LINE_BYTES:
            raise Garbled
        return lines

    def _is_from_worker(self, ancillary: list[tuple[int, int, bytes]]) -> bool:
        """Checks whether the kernel names the worker as the sender; data without a sender counts as
        the worker's.
        """
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, _SCM_CREDENTIALS):
                sender = _CREDENTIALS.unpack(data[: _CREDENTIALS.size])[0]
                self._worker = self._worker or sender
                if sender != self._worker and not self._warned:
                    self._warned = True
                    logger.warning(
                        "a process that a reward started wrote to its worker's "
                        "socket: this is ignored"
                    )
                return sender == self._worker
        return True


def keep_from_children(descriptor: int) -> None:
    """Replaces a descriptor by /dev/null in all forks of this process, and closes it in the
    programs that they execute.
    """
    os.set_inheritable(descriptor, False)
    null = os.open(os.devnull, os.O_RDWR)
    os.register_at_fork(after_in_child=lambda: os.dup2(null, descriptor, inheritable=False))


def parse_answer(line: bytes, number: int, token: str) -> Answer:
    """Reads the answer [number, token, reward] or [number, token, null, kind, sentence] to the
    question of `token`.

    Raises Garbled for anything else, be it an answer to another question, a number that is not
    finite or no JSON.
    """
    match _parse(line, list):
        case [int(answered), str(word), reward] if (answered, word) == (number, token):
            if is_reward(reward):
                return (reward,)
        case [int(answered), str(word), None, str(kind), str(sentence)] if (answered, word) == (
            number,
            token,
        ):
            if kind in KINDS_OF_WORKER:
                return (None, kind, sentence)
    raise Garbled


def parse_greeting(line: bytes, token: str) -> dict[str, object]:
    """Reads an object that repeats `token`; raises Garbled for anything else."""
    message = _parse(line, dict)
    if message.get("token") != token:
        raise Garbled
    return message


def _parse(line: bytes, kind: type[T]) -> T:
    try:
        return parse_json(line, kind, max_bytes=LINE_BYTES)
    except UnreadableJSON as error:
        raise Garbled from error
