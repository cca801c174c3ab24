"""The torch numerics: directions, perturbed forward, update, digest, objectives, models and data.

It knows nothing of rounds' lives, sockets or logs; the daemon and the replay tools call it.
"""
