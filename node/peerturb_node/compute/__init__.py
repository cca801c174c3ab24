"""What a node computes with: a model on a device, a toy, or nothing at all. `base` holds the contract."""
