"""The runner that the cases share, and the ledger of one test's failures."""

import pytest

from tests.fuzz.case import Runner
from tests.fuzz.ledger import Ledger


@pytest.fixture(scope="session")
def runner():
    made = Runner()
    yield made
    made.close()


@pytest.fixture
def ledger(runner):
    made = Ledger(runner)
    yield made
    made.close()
