"""The protocol as pure state machines: no clock, socket, thread, random source, torch or gRPC in here.

Time comes in as `now_ms`, decisions go out as ordered lists of outputs (`peerturb.protocol.outputs`).
"""
