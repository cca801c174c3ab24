"""What liars put in the place of an honest contribution. The machine beneath is the production one."""

import random
from dataclasses import replace

from peerturb import codec, stepping
from peerturb.ids import RoundNumber
from peerturb.protocol.messages import Contribution
from peerturb_sim.scenario import Lie

_OTHER_DIGEST = 1


class Liar:
    """One peer's way of lying. Whether it pays is the run's business."""

    def __init__(self, lie: Lie, draws: random.Random) -> None:
        self.lie = lie
        self.doubts = lie != "digest"
        """Whether its machine may doubt its weights: who names false ones cares for nobody's digests."""
        self._draws = draws
        self._last: Contribution | None = None

    def falsify(self, honest: Contribution) -> Contribution | None:
        """Return what is sent instead; None for nothing."""
        last, self._last = self._last, honest
        match self.lie:
            case "random":
                return replace(honest, codes=self._draws.randbytes(len(honest.codes)))
            case "flipped":
                flipped = codec.decode(honest.codes)
                return replace(honest, codes=(-flipped).tobytes())
            case "extreme":
                extreme = (stepping.CODE_MAX, 256 - stepping.CODE_MAX)
                return replace(honest, codes=bytes(self._draws.choice(extreme) for _ in honest.codes))
            case "replayed":
                return honest if last is None else replace(honest, codes=last.codes, loss=last.loss)
            case "stale":
                return replace(honest, round=RoundNumber(max(0, honest.round - 1)))
            case "silent":
                return None
            case "digest":
                return replace(honest, digest=honest.digest ^ _OTHER_DIGEST)
