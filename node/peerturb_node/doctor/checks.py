"""All checks in their order: the network first, since the run's RunSpec comes from there."""

from collections.abc import Iterator

from peerturb_node.doctor.network import Network
from peerturb_node.doctor.replica import NAMES, Replica
from peerturb_node.doctor.report import Check, skip
from peerturb_node.settings import NodeSettings


def examine(settings: NodeSettings, *, is_speed_measured: bool) -> Iterator[Check]:
    """Yield checks as they are made."""
    network = Network(settings)
    yield from network.checks()
    if network.description is None:
        for name in NAMES:
            yield skip(name, "the RunSpec is not known")
        return
    replica = Replica(settings=settings, spec=network.description.spec, is_speed_measured=is_speed_measured)
    yield from replica.checks()
