"""Fused CUDA kernels in Triton, optional: `peerturb.zo.fast` decides whether a device uses them."""
