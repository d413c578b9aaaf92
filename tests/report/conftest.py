import pytest
import tiny_run


@pytest.fixture(scope="session")
def full_run(tmp_path_factory):
    """A run that has all that a run can have; to be read, not changed."""
    return tiny_run.write_run(tmp_path_factory.mktemp("runs") / "full")
