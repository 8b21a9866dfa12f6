import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def generators_as_before():
    """These tests set every global generator, and put it back."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])
