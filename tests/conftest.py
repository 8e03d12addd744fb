"""Settings of the tests: one thread, so that small tensors are quick and exact."""

import pytest
import torch


@pytest.fixture(autouse=True)
def settings() -> None:
    """One thread and a fixed seed for every test."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
