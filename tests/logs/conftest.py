from tests.synthetic_run import make_run  # noqa: F401
