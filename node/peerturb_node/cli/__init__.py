"""Typer apps of the node's commands. Heavy imports happen inside the commands, so that `--help` answers at once."""
