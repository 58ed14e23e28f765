"""ScaleBiO on Megatron-Core: learn data mixtures by first-order bilevel optimization."""

__version__ = "0.1.0"
