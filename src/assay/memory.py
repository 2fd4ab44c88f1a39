"""Memory budgets, taken before the work: on a CPU running out of memory is a kill, not an
exception.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from assay.errors import InputError

if TYPE_CHECKING:
    import torch

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available(device: torch.device | None = None) -> int:
    """Return the bytes that can still be taken on a device (for the CPU: the smaller of the
    cgroup's room and the free memory).
    """
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    rooms = []
    for limit, used in _CGROUPS:
        try:
            rooms.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        rooms += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        pass
    return max(min(rooms), 0) if rooms else 1 << 30


def require_memory(size: int, what: str) -> None:
    """Raise InputError when work that keeps at least `size` bytes does not fit the memory that is
    available.
    """
    room = available()
    if size > room:
        raise InputError(
            f"{what} takes at least {_shown(size)}, and {_shown(room)} of memory are available"
        )


def rows_within(
    bytes_per_row: int,
    budget: int | None = None,
    *,
    device: torch.device | None = None,
    most: int = 64,
) -> int:
    """Return how many rows fit into a budget in bytes (default: a quarter of what is available),
    at least 1, at most `most`.
    """
    room = available(device) // 4 if budget is None else budget
    return max(1, min(most, room // max(bytes_per_row, 1)))


def _shown(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size < 1e15 else "more than a million GB"
