"""A check's result, and how results are shown."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

Outcome = Literal["ok", "fail", "skip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    outcome: Outcome
    found: str
    """What was seen, in a sentence."""
    remedy: str = ""
    """What to do about it; empty when in order."""


def ok(name: str, found: str) -> Check:
    """In order."""
    return Check(name=name, outcome="ok", found=found)


def fail(name: str, found: str, remedy: str) -> Check:
    """Would keep the node from taking part."""
    return Check(name=name, outcome="fail", found=found, remedy=remedy)


def skip(name: str, why: str) -> Check:
    """Could not be looked at."""
    return Check(name=name, outcome="skip", found=why)


def print_checks(checks: Iterable[Check], *, as_json: bool) -> bool:
    """Show checks as they come in; return True if none failed."""
    seen: list[Check] = []
    if as_json:
        seen = list(checks)
        print(json.dumps([asdict(check) for check in seen], indent=2))
    else:
        from rich.console import Console
        from rich.text import Text

        console = Console()
        marks = {"ok": ("OK  ", "green"), "fail": ("FAIL", "bold red"), "skip": ("skip", "dim")}
        for check in checks:
            seen.append(check)
            word, style = marks[check.outcome]
            console.print(Text.assemble((word, style), f"  {check.name}: {check.found}"), soft_wrap=True)
            if check.remedy:
                console.print(Text(f"      -> {check.remedy}"), soft_wrap=True)
        failures = sum(check.outcome == "fail" for check in seen)
        console.print("everything is in order" if not failures else f"{failures} to put right")
    return all(check.outcome != "fail" for check in seen)
