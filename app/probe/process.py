"""Measuring processes: started early, given one job each, ended when their time is over. Only our own are ended."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..errors import PlanError
from .recording import Recording, read_recording

COMMAND = (sys.executable, "-m", f"{__package__}.child")
RAISED = re.compile(r"[\w.]+(Error|Exception|Interrupt): ")
"""A traceback's last line; CUDA's errors have more lines after it."""
READY_SECONDS = 300
"""How long the imports of a measuring process may take."""


class Child:
    """One measuring process. It imports while others measure, and waits for its request."""

    def __init__(self, command: tuple[str, ...] = COMMAND, environment: dict[str, str] | None = None):
        self._log = tempfile.TemporaryFile()
        root = str(Path(__file__).parents[2])
        inherited = {**os.environ, **(environment or {})}
        inherited["PYTHONPATH"] = os.pathsep.join(filter(None, [root, inherited.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=inherited,
            start_new_session=True,
            text=True,
        )
        self._said: queue.Queue[dict | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.phase = ("start", 0)

    def _listen(self) -> None:
        for line in self._process.stdout:
            self._said.put(json.loads(line))
        self._said.put(None)

    def run(self, request: dict, seconds: float, tell: Callable[[str, int], None] = lambda *_: None) -> Recording:
        """Have ``request`` measured within ``seconds``. Raises :class:`PlanError` where the process does not live to
        tell, is stopped at its time limit, or fails."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "recording.json.gz")
            try:
                if self._hear(READY_SECONDS) is None:
                    raise self._ended()
                self._process.stdin.write(json.dumps({**request, "out": str(out)}) + "\n")
                self._process.stdin.flush()
                deadline = time.monotonic() + seconds
                while (said := self._hear(deadline - time.monotonic())) is not None and "done" not in said:
                    self.phase = (said["phase"], said["step"])
                    tell(*self.phase)
                if said is None:
                    raise self._ended()
                return read_recording(out)
            except BrokenPipeError:
                raise self._ended() from None
            except queue.Empty:
                where = _place(*self.phase)
                raise PlanError(
                    f"the measuring process was stopped after {seconds:.0f} s, {where}", "give it longer with --timeout"
                ) from None
            finally:
                self.end()

    def _hear(self, seconds: float) -> dict | None:
        return self._said.get(timeout=max(seconds, 0.01))

    def _ended(self) -> PlanError:
        code = self._process.wait(timeout=30)
        where = _place(*self.phase)
        if code < 0:
            name = signal.Signals(-code).name if -code in signal.Signals._value2member_map_ else str(-code)
            return PlanError(
                f"the measuring process was killed ({name}), {where}",
                "the system ran out of memory, or somebody ended it; the card is released",
            )
        return PlanError(f"the measuring process failed, {where}: {self._last_words()}", "see what nvidia-smi says")

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        raised = [line for line in lines if RAISED.match(line)]
        return (raised or lines or ["it said nothing"])[-1][:300]

    def end(self) -> None:
        """End the process, if it has not ended, with everything that it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._log):
            with suppress(OSError):
                stream.close()


def _place(phase: str, step: int) -> str:
    return f"in {phase} of step {step}" if step else f"during {phase}"
