import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny networks are quickest on one thread, and equal runs give equal bits on it."""
    torch.set_num_threads(1)
