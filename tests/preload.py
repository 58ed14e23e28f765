"""What a server of ranks imports for them, as the commands do, and what a report then needs."""
# ruff: noqa: F401

from megatron_scalebio.compat import light_imports

with light_imports():
    import matplotlib.backends.backend_svg
    import matplotlib.projections

    import megatron_scalebio.methods.run
    import megatron_scalebio.report.html
