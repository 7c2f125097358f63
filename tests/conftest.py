"""What every test shares: one thread, deterministic properties, and the option that adds the complete registry."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # they are scripts, imported by their tests
torch.set_num_threads(1)
settings.register_profile(
    "smoothops",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("smoothops")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the whole registry, not only a representative selection")


def pytest_configure(config: pytest.Config) -> None:
    # torch's own, at the first forward-mode derivative
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full") or "full" in config.getoption("-m"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """The same random numbers and number of threads for every test; examples set their own."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_compiler():
    """Compiled code of one test neither serves nor slows another."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
