"""Any config, manifest, tar, log or command-line word gives one line and a status of the table, and nothing else."""

from hypothesis import given

from tests.fuzz import strategies
from tests.fuzz.forms import FORM


@FORM
@given(case=strategies.configs())
def test_configs(ledger, case):
    ledger.try_case(case)


@FORM
@given(case=strategies.manifests())
def test_manifests(ledger, case):
    ledger.try_case(case)


@FORM
@given(case=strategies.tars())
def test_tars(ledger, case):
    ledger.try_case(case)


@FORM
@given(case=strategies.logs())
def test_logs(ledger, case):
    ledger.try_case(case)


@FORM
@given(case=strategies.words())
def test_words(ledger, case):
    ledger.try_case(case)
