"""`peerturb node run --idle`: give way to other work on the machine, and go on by itself afterwards."""
