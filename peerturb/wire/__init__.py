"""The wire: generated protobuf code (`v1/`) and total conversions between its messages and the protocol's values.

It knows no sockets. Importing it does not import gRPC; `peerturb.wire.v1.coordinator_pb2_grpc` does.
"""

from peerturb.wire.errors import WireError

__all__ = ["WireError"]
