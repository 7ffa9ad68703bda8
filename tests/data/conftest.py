"""What the tests of the data share with those of the engine."""
from tests.engine.conftest import one_thread  # noqa: F401
