"""The demo's child processes: what they print arrives, and none outlives the demo, whatever happens to it."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from peerturb_node.demo.processes import Child, ChildError, Family, last_lines
from peerturb_node.demo.signals import run_until_signal

SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
STUBBORN = [
    sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
]  # fmt: skip
PARENT = """
import asyncio, sys
from pathlib import Path
from peerturb_node.demo.processes import Family
from peerturb_node.demo.signals import run_until_signal

async def main():
    async with Family(Path(sys.argv[1]), {}) as family:
        child = await family.start("sleeper", [sys.executable, "-c", "import time; time.sleep(600)"])
        print(child.pid, flush=True)
        await asyncio.sleep(600)

run_until_signal(main())
"""


def is_running(pid: int) -> bool:
    """Whether a process exists and is not merely waiting to be reaped by whoever adopted it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for_end(pid: int) -> None:
    """Return when the process is gone; the test's own timeout is the limit."""
    while is_running(pid):
        time.sleep(0.02)


async def test_lines_arrive_in_order_and_are_kept_in_files(tmp_path: Path) -> None:
    lines: list[str] = []
    async with Family(tmp_path, {"WORD": "hello"}) as family:
        code = "import os, sys; print(os.environ['WORD']); print('second'); print('complaint', file=sys.stderr)"
        child = await family.start("talker", [sys.executable, "-c", code], on_line=lines.append)
        assert await child.wait(timeout_s=60) == 0
    assert lines == ["hello", "second"]
    assert (tmp_path / "talker.out").read_text(encoding="utf-8") == "hello\nsecond\n"
    assert last_lines(child.log, 5) == ["complaint"]


async def test_the_user_s_own_settings_stay_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERTURB_NODE_TOKEN", "secret")
    monkeypatch.setenv("OTHER", "kept")
    async with Family(tmp_path, {}) as family:
        code = "import os; print(os.environ.get('PEERTURB_NODE_TOKEN'), os.environ['OTHER'])"
        child = await family.start("tool", [sys.executable, "-c", code], is_tool=True)
        await child.wait(timeout_s=60)
    assert child.output() == "None kept\n"


async def test_a_child_has_its_own_process_group(tmp_path: Path) -> None:
    async with Family(tmp_path, {}) as family:
        child = await family.start("sleeper", SLEEPER)
        assert os.getpgid(child.pid) == child.pid != os.getpgrp()


async def test_leaving_ends_children_that_ignore_sigterm_even_after_an_error(tmp_path: Path) -> None:
    children: list[Child] = []

    async def fail() -> None:
        started = asyncio.Event()
        async with Family(tmp_path, {}) as family:
            children.append(await family.start("stubborn", STUBBORN, on_line=lambda _: started.set()))
            await started.wait()
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        await fail()
    assert children[0].code == -signal.SIGKILL
    assert not is_running(children[0].pid)


async def test_an_ordered_end_falls_back_to_a_hard_one(tmp_path: Path) -> None:
    started = asyncio.Event()
    async with Family(tmp_path, {}) as family:
        child = await family.start("stubborn", STUBBORN, on_line=lambda _: started.set())
        await started.wait()
        assert await child.end(signal.SIGTERM, timeout_s=0.2) == -signal.SIGKILL
        family.raise_for_dead()


async def test_an_unexpected_end_is_told_with_the_end_of_the_log(tmp_path: Path) -> None:
    async with Family(tmp_path, {}) as family:
        code = "import sys; print('\\n'.join(f'line {i}' for i in range(50)), file=sys.stderr); sys.exit(3)"
        child = await family.start("fragile", [sys.executable, "-c", code])
        await child.wait(timeout_s=60)
        with pytest.raises(ChildError, match=r"fragile ended with exit code 3") as error:
            family.raise_for_dead()
    assert "line 49" in str(error.value)
    assert "line 20" not in str(error.value)


async def test_a_tool_may_end_whenever_it_is_done(tmp_path: Path) -> None:
    async with Family(tmp_path, {}) as family:
        child = await family.start("tool", [sys.executable, "-c", "print('result')"], is_tool=True)
        await child.wait(timeout_s=60)
        family.raise_for_dead()
    assert child.output() == "result\n"


async def test_a_death_by_signal_is_named(tmp_path: Path) -> None:
    async with Family(tmp_path, {}) as family:
        child = await family.start("sleeper", SLEEPER)
        os.kill(child.pid, signal.SIGKILL)
        await child.wait(timeout_s=60)
        with pytest.raises(ChildError, match="sleeper ended with signal SIGKILL"):
            family.raise_for_dead()


async def test_a_command_that_does_not_exist_is_an_error_that_names_it(tmp_path: Path) -> None:
    async with Family(tmp_path, {}) as family:
        with pytest.raises(ChildError, match="cannot start ghost"):
            await family.start("ghost", [str(tmp_path / "no-such-program")])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_demo_and_its_children(tmp_path: Path, number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(number)
        assert parent.wait() == 128 + number
    wait_for_end(child)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tie a child's life to its parent's")
def test_even_sigkill_of_the_demo_leaves_no_orphans(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    wait_for_end(child)


def test_without_a_signal_the_result_comes_back() -> None:
    async def work() -> int:
        return 7

    assert run_until_signal(work()) == 7


def test_last_lines_of_a_missing_file_are_none(tmp_path: Path) -> None:
    assert last_lines(tmp_path / "nothing", 3) == []
