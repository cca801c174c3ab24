"""`peerturb init`: from a model, a data file and a few answers to RUN.toml. Nothing here needs torch but `digest`."""
