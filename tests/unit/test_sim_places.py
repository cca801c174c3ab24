"""An error in a TOML file names its line, wherever the key stands."""

import pytest

from peerturb_sim.places import locate

TEXT = """name = "x" # a comment
"quoted key" = 1
a.b.c = 2

[round]
count = 3

[[peers]]
name = "one"
line = { up_mbit = 3 }
[peers.life]
stay_s = 4

[[peers]]
name = "two"
[peers.life]
stay_s = 5
[[peers.rows]]
x = 1
[[peers.rows]]
x = 2
[mixed]
inline = { low = [1, 2], deep = { x = "}" } } # { y = 3 }
rows = [ { x = 1 }, { x = 2 } ]
several = [
    { x = 1 },
]
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("name",), 1),
        (("quoted key",), 2),
        (("a", "b"), 3),
        (("a", "b", "c"), 3),
        (("round",), 5),
        (("round", "count"), 6),
        (("round", "missing"), 5),
        (("peers",), 8),
        (("peers", 0), 8),
        (("peers", 0, "name"), 9),
        (("peers", 0, "line", "LineSpec", "up_mbit"), 10),
        (("peers", 0, "life", "stay_s"), 12),
        (("peers", 1), 14),
        (("peers", 1, "name"), 15),
        (("peers", 1, "life", "stay_s"), 17),
        (("peers", 1, "rows", 1, "x"), 21),
        (("mixed", "inline", "low"), 23),
        (("mixed", "inline", "deep", "x"), 23),
        (("mixed", "rows", 1, "x"), 24),
        (("mixed", "several", 0, "x"), 25),
        (("nowhere",), None),
        ((), None),
    ],
)
def test_a_path_has_the_line_of_its_key_or_of_what_it_belongs_to(path: tuple[str | int, ...], line: int | None) -> None:
    assert locate(TEXT, path)[1] == line


def test_parts_that_the_text_does_not_have_are_passed_over() -> None:
    assert locate(TEXT, ("peers", 0, "line", "LineSpec", "up_mbit"))[0] == ("peers", 0, "line", "up_mbit")
    assert locate(TEXT, ("mixed", "inline", "low", 1))[0] == ("mixed", "inline", "low")
    assert locate(TEXT, ("round", "toy", "count", "extra"))[0] == ("round", "count")
