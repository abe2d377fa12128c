"""Runs a command that must not outlive its parent: ``python guard.py COMMAND...``. Standard library only.

Standard input is a pipe that only the parent holds. When it closes, because the parent wants it or because the parent
is gone, the command's whole process group ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType

GRACE_S = 10.0
"""Time between asking the group to end and ending it."""
_PR_SET_PDEATHSIG = 1


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(
        sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_guard
    )

    def asked(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=end_group, args=(child,)).start()

    signal.signal(signal.SIGTERM, asked)
    threading.Thread(target=_end_with_parent, args=(child,), daemon=True).start()
    code = child.wait()
    end_group(child, grace=0.0)  # what the command left behind
    return code if code >= 0 else 128 - code


def end_group(child: subprocess.Popen[bytes], grace: float = GRACE_S) -> None:
    """SIGTERM, then after ``grace`` seconds SIGKILL, to every process of the child's group."""
    try:
        if grace:
            os.killpg(child.pid, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.05)
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # the group is gone


def _end_with_parent(child: subprocess.Popen[bytes]) -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    end_group(child)


def _die_with_guard() -> None:
    """Should the guard itself be killed, the kernel kills the command."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
