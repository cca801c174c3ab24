"""Make or mend `.venv` so that it holds one extra of peerturb, pinned by constraints.txt; do nothing if it does.

Called by make with any Python >= 3.11; standard library only. It knows pip and the file system, nothing of peerturb.

The environment's state is told by files inside it:
- `.installing`: an installation was cut off. What it left cannot be trusted, so the environment is made anew.
- `.ready-EXTRA`: the fingerprint of everything the installation depended on. It is written last.
- `pyvenv.cfg`: where the environment was made. Elsewhere its scripts do not run, so after a move it is made anew.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INPUTS = ("pyproject.toml", "constraints.txt")
EXTRAS = {"node": "node,fast", "dev": "dev"}
"""What an environment's name stands for."""
IMPLIED_BY = {"node": ("dev",)}
"""Extra -> extras that contain it: an environment for one serves the other."""


def main(arguments: list[str]) -> int:
    """Set up the extra named by the only argument; return the exit code."""
    if len(arguments) != 1 or arguments[0] not in EXTRAS:
        print("usage: setup.py node|dev", file=sys.stderr)
        return 2
    # One at a time: `make demo` and `make test` may be started together. The lock ends with the process.
    with Path(__file__).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            ensure(arguments[0], ROOT / ".venv")
        except subprocess.CalledProcessError as error:
            print(
                f"error: pip ended with code {error.returncode}, its message is above; run make again", file=sys.stderr
            )
            return 1
        except KeyboardInterrupt:
            print("interrupted: run make again, it sets up from the start", file=sys.stderr)
            return 130
    return 0


def ensure(extra: str, environment: Path) -> None:
    """Bring `environment` to hold `extra`.

    Raises:
        subprocess.CalledProcessError: pip failed; its own message has been printed.
    """
    if is_sound(environment):
        stamps = [environment / f".ready-{name}" for name in (extra, *IMPLIED_BY.get(extra, ()))]
        if any(read(stamp) == fingerprint(environment) for stamp in stamps):
            return
    started_s = time.monotonic()
    unfinished = environment / ".installing"
    if not is_sound(environment):
        print(f"making {environment.name} with Python {sys.version.split()[0]}", flush=True)
        shutil.rmtree(environment, ignore_errors=True)
        environment.mkdir()
        unfinished.touch()
        venv.create(environment, with_pip=True)
    unfinished.touch()
    for stale in environment.glob(".ready-*"):
        stale.unlink()
    try:
        install(extra, environment)
    except subprocess.CalledProcessError as error:
        if error.returncode == 1:
            # pip that says no has undone what it did; only a killed one leaves half a package behind.
            unfinished.unlink()
        raise
    (environment / f".ready-{extra}").write_text(fingerprint(environment))
    unfinished.unlink()
    print(f"set up [{extra}] in {time.monotonic() - started_s:.0f} s", flush=True)


def install(extra: str, environment: Path) -> None:
    """Install torch, then the build backend, then peerturb with `extra`, all at the pinned versions."""
    print(
        f"installing peerturb[{EXTRAS[extra]}] and what it needs (torch is large: minutes on a slow line)", flush=True
    )
    # torch first and alone: it is most of the download, and whatever needs torch later finds the pinned one in place.
    pip(environment, pinned("torch"))
    # The backend comes from the same pins; build isolation would fetch the newest one.
    pip(environment, pinned("hatchling"))
    pip(environment, "--no-build-isolation", "-e", f".[{EXTRAS[extra]}]")


def pip(environment: Path, *arguments: str) -> None:
    """Run `pip install` under the constraints."""
    python = environment / "bin" / "python"
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "-c", "constraints.txt"]
    subprocess.run([*command, *arguments], cwd=ROOT, check=True)


def pinned(package: str) -> str:
    """Return the requirement `package==version` that constraints.txt fixes."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    match = re.search(rf"^{re.escape(package)}==\S+$", text, re.MULTILINE)
    assert match, f"constraints.txt pins no {package}"
    return match.group()


def is_sound(environment: Path) -> bool:
    """Tell whether the environment is whole, can run, and lies where it was made."""
    if (environment / ".installing").exists():
        return False
    settings = dict(re.findall(r"^(\w+) = (.*)$", read(environment / "pyvenv.cfg"), re.MULTILINE))
    made_at = settings.get("command", "").partition(" -m venv ")[2]
    # With options before it the folder stands last; a folder's name may hold blanks, so compare from the end.
    if not made_at.endswith(str(environment)):
        return False
    # The interpreter is a link that dangles once the system's Python has been replaced.
    return all(os.access(environment / "bin" / name, os.X_OK) for name in ("python", "pip"))


def fingerprint(environment: Path) -> str:
    """Return a digest of the inputs and of the environment's interpreter."""
    digest = hashlib.sha256()
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    digest.update(read(environment / "pyvenv.cfg").encode())
    return digest.hexdigest()


def read(path: Path) -> str:
    """Return the file's text, empty where there is no file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
