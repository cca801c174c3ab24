"""The live page: what a browser sees of a run while it goes on. Nothing here is needed for training."""
