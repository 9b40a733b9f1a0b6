"""ecar_dist: sharded training of multistage continuous autoregressive image generators (ECAR)."""

__version__ = "0.1.0"
