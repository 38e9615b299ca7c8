import pytest
import torch
from clients import Exchange, exchanged

pytest_plugins = ["part"]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)  # two workers on two cores


@pytest.fixture(autouse=True)
def one_draw() -> None:
    torch.manual_seed(0)  # of layers that a test initialises, whatever ran before


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def exchange() -> Exchange:
    """What the server sees of a client, and the client's batch: exchange(model, ...) -> (obs, x, y)."""
    return exchanged
