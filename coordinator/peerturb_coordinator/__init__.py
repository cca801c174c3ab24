"""The coordinator: the service that admits peers, seals rounds and keeps the run log.

Settings, gRPC shell, log store, commands. It orders bytes: it holds no weights and runs where torch is not installed.
"""
