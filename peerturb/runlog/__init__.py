"""The run log as a file: framing, hash chain, reading, writing, verifying, folding. No torch, no network.

Base weights + this file = the model. `docs/log-format.md` describes the bytes.
"""
