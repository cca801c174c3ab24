"""Asks the machine what other processes do: CPU time and battery through psutil, a CUDA card through NVML.

It decides nothing. A node's own process, and what it started, is not counted.
"""

import os
import time
from collections.abc import Callable
from typing import Any, Protocol

import psutil

from peerturb.errors import SpecError
from peerturb_node.idle.rule import Sample


class Load(Protocol):
    """Something whose use by other processes can be told."""

    def percent(self) -> float:
        """Return the part that others used since the last call: 0 to 100."""

    def close(self) -> None:
        """Let go of what was opened."""


class CpuLoad:
    """All cores of the machine."""

    def __init__(self) -> None:
        self._own = psutil.Process()
        self._last = self._times()

    def percent(self) -> float:
        """Return the part of all cores' time that others used since the last call."""
        times, last = self._times(), self._last
        busy, own, total = (now - before for now, before in zip(times, last, strict=True))
        self._last = times
        # The kernel counts in ticks: over short times own work may seem more than all.
        return min(max(100 * (busy - own) / total, 0.0), 100.0) if total > 0 else 0.0

    def close(self) -> None:
        """Nothing is open."""

    def _times(self) -> tuple[float, float, float]:
        """Busy and own seconds, and all there were, of all cores together."""
        whole, own = psutil.cpu_times(), self._own.cpu_times()
        # A guest's time is counted in user's and nice's already.
        parts = {name: value for name, value in whole._asdict().items() if not name.startswith("guest")}
        total = sum(parts.values())
        idle = parts["idle"] + parts.get("iowait", 0.0)
        children = getattr(own, "children_user", 0.0) + getattr(own, "children_system", 0.0)
        return total - idle, own.user + own.system + children, total


class CardLoad:
    """One CUDA card.

    Raises:
        SpecError: what others do on the card cannot be told; the message says why and what to do.
    """

    def __init__(self, uuid: str) -> None:
        """Open the card with this UUID (without the prefix `GPU-`), on which this process has memory already."""
        self._nvml: Any = _nvml()
        try:
            self._nvml.nvmlInit()
            self._card = self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            running = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._card)
            self._seen = 0
            self.percent()
        except self._nvml.NVMLError as error:
            raise SpecError(
                f"--idle cannot ask the card {uuid} what others do on it: {error}; "
                "leave --idle out, or run where the driver tells (no MIG, no virtual card)"
            ) from error
        if os.getpid() not in {row.pid for row in running}:
            self.close()
            raise SpecError(
                "--idle cannot tell this node from other processes on the card, because process numbers are hidden "
                "from it; give its container the host's (docker run --pid=host), or leave --idle out"
            )

    def percent(self) -> float:
        """Return the part of the card's multiprocessors that others kept busy, by the newest sample of each."""
        try:
            rows = self._nvml.nvmlDeviceGetProcessUtilization(self._card, self._seen)
        except self._nvml.NVMLError_NotFound:  # nobody has used it since
            return 0.0
        newest: dict[int, Any] = {}
        for row in sorted(rows, key=lambda row: row.timeStamp):
            newest[row.pid] = row
        self._seen = max((row.timeStamp for row in rows), default=self._seen)
        return float(min(sum(row.smUtil for pid, row in newest.items() if pid != os.getpid()), 100))

    def close(self) -> None:
        """Close the library."""
        self._nvml.nvmlShutdown()


class Machine:
    """The samples of this computer, one for each call.

    Args:
        load: what to watch; the card where the node computes on one.
        now_s: a monotonic clock.
    """

    def __init__(self, load: Load, *, now_s: Callable[[], float] = time.monotonic) -> None:
        self.load = load
        self._where = "card" if isinstance(load, CardLoad) else "cpu"
        self._now_s = now_s
        self._last_s = now_s()

    def sample(self) -> Sample:
        """Return what went on since the last call."""
        now_s = self._now_s()
        seconds, self._last_s = now_s - self._last_s, now_s
        percent = self.load.percent()
        return Sample(
            seconds=seconds,
            load=percent,
            where="card" if self._where == "card" else "cpu",
            on_battery=on_battery(),
        )


def on_battery() -> bool:
    """Return whether the computer runs on a battery now; False where it has none or does not tell."""
    sensor: Callable[[], Any] | None = getattr(psutil, "sensors_battery", None)  # missing on some systems
    battery = None if sensor is None else sensor()
    return battery is not None and battery.power_plugged is False


def _nvml() -> Any:
    try:
        import pynvml
    except ModuleNotFoundError as error:
        raise SpecError(
            "--idle on a CUDA card needs the package nvidia-ml-py, which is not installed; install it with: "
            'pip install "peerturb[idle]"'
        ) from error
    return pynvml
