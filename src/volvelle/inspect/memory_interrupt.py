"""Ctrl-C while a plan is made: noted when it comes, raised at the next operation.

Storages end in callbacks of weak references, and torch has more of them. Python writes an exception from such a
callback to stderr and goes on, so a KeyboardInterrupt raised there would be lost, and the callback left half done.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any


class Deferred:
    """A context in which the first Ctrl-C waits for `check`, which calls the handler from before; a second does not.

    What that handler raised is raised again by every `check` and at the end, should something on the way have swallowed
    it. Outside the main thread, and where Ctrl-C is ignored or ends the process, the context does nothing.

    >>> import os
    >>> try:
    ...     with Deferred() as ctrl_c:
    ...         os.kill(os.getpid(), signal.SIGINT)
    ...         print("still here")
    ...         ctrl_c.check()
    ... except KeyboardInterrupt:
    ...     print("heard")
    still here
    heard
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._noted = False
        self._raised: BaseException | None = None

    def __enter__(self) -> Deferred:
        before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(before):
            self._before = before
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        in_flight = sys.exc_info()[1]
        if in_flight is None or in_flight is not self._raised:
            self.check()

    def check(self) -> None:
        """Let a Ctrl-C that has come do its work now; to be called where exceptions reach the caller."""
        if not self._noted:
            return
        if self._raised is not None:
            raise self._raised
        try:
            self._before(signal.SIGINT, None)
        except BaseException as error:
            self._raised = error
            raise
        self._noted = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted:
            self._before(number, frame)
        self._noted = True
