"""A small scenario in which much goes wrong, for tests."""

from pathlib import Path

SMALL = """
name = "small"
seed = 3
until_s = 600

[round]
count = 12
probes_max = 16
deadline_ms_max = 5_000
lease_ms = 2_000

[[peers]]
name = "home"
count = 6
evaluates = true
crashes_per_hour = 60
disk_losses = 0.5
pauses_per_hour = 60
pause_s = 1
down_s = 2
drift_ppm = 1_000

[[faults]]
kind = "coordinator_crash"
at_s = 3
for_s = 1

[[faults]]
kind = "partition"
at_s = 6
for_s = 3
share = 0.5
"""


def write(folder: Path, text: str = SMALL) -> Path:
    path = folder / "small.toml"
    path.write_text(text)
    return path
