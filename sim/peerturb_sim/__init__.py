"""The simulator arrives in a later release: the production state machines under a virtual clock and network.

Until then this package is empty; it is here so that its name and its place above node and coordinator are fixed.
"""
