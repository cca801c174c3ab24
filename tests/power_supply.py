"""A battery as Linux shows it, in a folder of the test's."""

from pathlib import Path


def power_supply(folder: Path, *, online: bool) -> None:
    """Write what stands in /sys/class/power_supply beside a battery half full."""
    battery, mains = folder / "BAT0", folder / "AC0"
    for device in (battery, mains):
        device.mkdir(parents=True, exist_ok=True)
    for name, text in {"energy_now": "50", "energy_full": "100", "power_now": "10", "capacity": "50"}.items():
        (battery / name).write_text(text)
    (battery / "status").write_text("Charging" if online else "Discharging")
    (mains / "online").write_text(str(int(online)))
