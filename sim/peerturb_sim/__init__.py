"""The simulator: the production state machines under a virtual clock, network and disk. One seed decides everything."""
