"""The node: the program that holds a replica, measures probes and applies sealed rounds.

Settings, gRPC session, compute thread, checkpoints, commands. It may use all of `peerturb`; it knows nothing of
`peerturb_coordinator`, which it meets only on the wire.
"""
