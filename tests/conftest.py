"""What every test shares: one thread, seeds, and the optional data beside the checkout."""

import os
import random
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"  # the small part of the reference data that is in the repository
REFERENCE_DATA = Path(os.environ.get("PEFT_READ_REFERENCE_DATA", REPOSITORY.parent / "shared"))

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def choices_of_the_process():
    """What every later test of this process computes with."""
    backends = sys.modules.get("peft_read.backends")
    return {
        "backend": backends and backends._forced,
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "PEFT_READ_BACKEND": os.environ.get("PEFT_READ_BACKEND"),
    }


@pytest.fixture(autouse=True)
def leaves_the_process_as_it_was():
    """The order of the tests differs between machines; what one leaves behind would fail another, there only."""
    before = choices_of_the_process()
    yield
    assert choices_of_the_process() == before, "the test changed what later tests of this process compute with"


@pytest.fixture(scope="session")
def reference_data():
    """A function from a relative path to a reference file; skips the test where the data is absent.

    What `tests/golden` holds is taken from there, so that every checkout compares with it.
    """

    def path_of(relative: str) -> Path:
        committed = GOLDEN.parent / relative
        path = committed if committed.exists() else REFERENCE_DATA / relative
        if not path.exists():
            pytest.skip(f"reference data {relative!r} is not beside this checkout (set PEFT_READ_REFERENCE_DATA)")
        return path

    return path_of
