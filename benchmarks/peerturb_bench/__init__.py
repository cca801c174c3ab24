"""Benchmarks: `peerturb bench NAME` measures one claim of the project and compares it with its reference.

One module per name; each offers `run(quick: bool) -> list[Row]`. Nothing else imports this package.
"""
