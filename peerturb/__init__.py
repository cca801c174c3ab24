"""peerturb: fine-tune one language model on many unreliable computers, one byte per gradient.

The core library. It opens no sockets, starts no threads and reads no clock.
"""

__version__ = "0.1.0"
