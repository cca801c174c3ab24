"""A made-up course of the demo, told in the nodes' own events, for tests of everything that shows or sums it."""

import math
from typing import Any

from peerturb_node.demo.events import Story

CODES = 32
"""Codes each node sends in a round."""
KILL, JOIN, RESTART = 15, 20, 25
"""Rounds after which node-4 dies, node-5 trains, and the coordinator restarts."""


def round_event(round: int, *, own: bool, codes: int, digest: str | None, loss: float = 0.5) -> dict[str, Any]:
    """Return a node's event about a sealed round; `round` counts applied rounds."""
    return {
        "event": "round", "time": 0.0, "round": round, "loss": loss, "digest": digest, "codes": codes,
        "peers": codes // CODES, "own": own, "ms": 1.0, "alpha": 0.1,
    }  # fmt: skip


def digest_after(round: int) -> str:
    """Return the digest that honest nodes have after a round."""
    return f"{(round * 2654435761) & 0xFFFFFFFF:08x}"


def tell(story: Story, name: str, round: int, nodes: int, *, loss: float = 0.5, digest: str | None = None) -> None:
    """Let a node measure and apply a round in which `nodes` nodes took part."""
    story.take(name, {"event": "measured", "round": round - 1, "codes": CODES, "loss": loss})
    story.take(name, round_event(round, own=True, codes=nodes * CODES, digest=digest or digest_after(round), loss=loss))


def begin(nodes: int = 4) -> Story:
    """Return a story whose nodes have joined."""
    story = Story(rounds_planned=40, seconds_planned=100)
    story.say("cutting the data")
    for index in range(nodes):
        name = f"node-{index + 1}"
        story.add_peer(name, pid=100 + index)
        story.take(name, {"event": "start"})
        story.take(name, {"event": "model", "parameters": 869_504})
        story.take(name, {"event": "joined", "slot": index})
        story.take(name, {"event": "training", "round": 0, "seconds": 0.3})
    return story


def whole(rounds: int = 40) -> Story:
    """Return a story with all of the demo's blows, `rounds` rounds long."""
    story = begin()
    alive = [f"node-{index + 1}" for index in range(4)]
    for round in range(1, rounds + 1):
        story.at_s = 5 + 0.7 * round
        if round == KILL + 1:
            alive.remove("node-4")
            story.peers["node-4"].state = "killed"
            story.killed += 1
            story.mark("kill", "node-4 killed")
            story.say("node-4 killed with SIGKILL; the round seals without it", tone="act")
        if round == JOIN + 1:
            _join(story, JOIN)
            alive.append("node-5")
        if round == RESTART + 1:
            story.coordinator_restarts += 1
            story.mark("restart", "coordinator restarted")
        loss = 0.1 + 0.8 / (1 + math.exp((round - 15) / 4))
        for name in alive:
            story.peers[name].bytes_up += CODES + 50
            story.peers[name].bytes_down += len(alive) * CODES + 60
            tell(story, name, round, len(alive), loss=loss)
        if round % 5 == 0:
            accuracy = 0.97 - 0.47 / (1 + math.exp((round - 15) / 3))
            story.take("node-1", {"event": "eval", "round": round, "loss": loss, "accuracy": accuracy, "examples": 9})
    return story


def _join(story: Story, rounds: int) -> None:
    story.add_peer("node-5", pid=105, is_late=True)
    story.take("node-5", {"event": "joined", "slot": 4})
    story.take("node-5", {"event": "behind", "round": None, "rounds": rounds})
    for round in range(1, rounds + 1):
        story.take("node-5", round_event(round, own=False, codes=4 * CODES, digest=None))
    story.take("node-5", {"event": "training", "round": rounds, "seconds": 1.3})
    story.joined += 1
    story.mark("join", "node-5 joined")
