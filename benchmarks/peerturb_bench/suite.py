"""Several benchmarks one after the other, their rows in one file together with the machine they were measured on.

One that fails is noted with its reason and does not keep the others from running. The file is written anew after each
benchmark, so that an interruption costs only the one that was running.
"""

import json
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from peerturb.errors import PeerturbError
from peerturb_bench.machine import describe
from peerturb_bench.registry import BENCHMARKS, SUITE, measure
from peerturb_bench.rows import Row, to_json

FILE = "suite.json"


def run(*, quick: bool, out: Path, show: Callable[[str, Sequence[Row]], None]) -> dict[str, Any]:
    """Run `SUITE`, write plots and `FILE` into `out`, and return what the file holds.

    Args:
        show: is given each benchmark's rows as they come.
    """
    console = Console(stderr=True)
    document: dict[str, Any] = {"machine": describe(), "quick": quick, "benchmarks": {}}
    for number, name in enumerate(SUITE, 1):
        console.print(f"[{number}/{len(SUITE)}] {name}", markup=False, highlight=False)
        document["benchmarks"][name] = _run_one(name, quick=quick, out=out, show=show)
        text = json.dumps(document, indent=2, allow_nan=False)
        (out / FILE).write_text(text + "\n", encoding="utf-8")
    return document


def failures(document: dict[str, Any]) -> dict[str, str]:
    """Return name -> reason of the benchmarks that failed."""
    return {name: found["error"] for name, found in document["benchmarks"].items() if "error" in found}


def _run_one(name: str, *, quick: bool, out: Path, show: Callable[[str, Sequence[Row]], None]) -> dict[str, Any]:
    entry: dict[str, Any] = {"summary": BENCHMARKS[name].summary}
    started_s = time.perf_counter()
    try:
        rows = measure(name, quick=quick, out=out)
        plain = json.loads(to_json(rows))
    except PeerturbError as error:
        return {**entry, "error": str(error)}
    except Exception as error:  # a fault of this benchmark, and no reason to lose the hour that the others take
        traceback.print_exc()
        return {**entry, "error": f"{type(error).__name__}: {error}"}
    seconds = round(time.perf_counter() - started_s, 1)
    show(name, rows)
    return {**entry, "seconds": seconds, "rows": plain}
