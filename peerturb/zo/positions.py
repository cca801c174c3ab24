"""How configurations of transformers models say what their longest sequence is. Knows no model, needs no torch."""

POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
"""Fields of a configuration that say how many places there are."""
