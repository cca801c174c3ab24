"""Work side by side: every item once, errors come out, nesting does not wait for itself, torch keeps its threads."""

import threading
from collections.abc import Iterator

import pytest
import torch

from peerturb.zo.parallel import in_parallel


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_item_is_done_once(threads: int) -> None:
    done: list[int] = []
    in_parallel(done.append, range(50))
    assert sorted(done) == list(range(50))
    assert torch.get_num_threads() == threads


def test_nested_calls_do_not_wait_for_each_other(threads: int) -> None:
    done: list[tuple[int, int]] = []
    in_parallel(lambda outer: in_parallel(lambda inner: done.append((outer, inner)), range(3)), range(8))
    assert sorted(done) == [(outer, inner) for outer in range(8) for inner in range(3)]


def test_pieces_run_on_different_threads_with_one_torch_thread_each() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    meeting = threading.Barrier(2, timeout=30)

    def meet(_: int) -> None:
        meeting.wait()  # passes only if two pieces run at the same time
        counts.append(torch.get_num_threads())

    counts: list[int] = []
    in_parallel(meet, range(2))
    assert counts == [1, 1]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_an_error_in_a_piece_comes_out(threads: int) -> None:
    def fail(item: int) -> None:
        if item == 3:
            raise ValueError("piece 3")

    with pytest.raises(ValueError, match="piece 3"):
        in_parallel(fail, range(5))


def test_another_device_takes_the_pieces_one_by_one() -> None:
    seen: list[str] = []
    in_parallel(lambda item: seen.append(threading.current_thread().name), range(8), on="cuda")
    assert seen == [threading.current_thread().name] * 8


def test_pieces_that_are_not_shared_run_in_order_on_one_thread() -> None:
    seen: list[tuple[int, int]] = []

    def work(item: int) -> None:
        seen.append((item, threading.get_ident()))

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        in_parallel(work, range(20), is_shared=False)
    finally:
        torch.set_num_threads(before)
    assert [item for item, _ in seen] == list(range(20))
    assert len({thread for _, thread in seen}) == 1
