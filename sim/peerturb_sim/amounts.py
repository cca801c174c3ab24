"""Amounts for people: three figures and a unit."""


def seconds(value: float) -> str:
    """Return a duration, from microseconds to days."""
    for limit, scale, unit in ((1e-3, 1e-6, "µs"), (1.0, 1e-3, "ms"), (120.0, 1.0, "s"), (7_200.0, 60.0, "min")):
        if value < limit:
            return f"{_three(value / scale)} {unit}"
    return f"{_three(value / 3_600)} h" if value < 172_800 else f"{_three(value / 86_400)} days"


def size(count: float) -> str:
    """Return a number of bytes, decimal units."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB", "PB"))


def many(count: float, unit: str) -> str:
    """Return a large number of something: 1.1 TFLOP, 78 G/s, 2.2 G parameters."""
    gap = "" if unit[0].isupper() or unit[0] == "/" else " "
    return _scaled(count, (unit.strip(), *(f"{prefix}{gap}{unit}" for prefix in "kMGTPE")))


def _scaled(count: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if count < 999.5:
            return f"{_three(count)} {unit}"
        count /= 1_000
    return f"{_three(count)} {units[-1]}"


def _three(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"
