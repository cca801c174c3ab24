"""The one error of decoding."""

from peerturb.errors import PeerturbError, RejectCode


class WireError(PeerturbError):
    """Bytes or a message from the other side break a rule: `code` says which, the text what was found."""

    exit_code = 4

    def __init__(self, code: RejectCode, why: str) -> None:
        super().__init__(why)
        self.code = code
        self.why = why
