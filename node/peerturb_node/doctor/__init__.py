"""The checks behind `peerturb doctor`: `network`, `replica` and `machine` make them, `report` shows them."""
