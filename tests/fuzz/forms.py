"""The two forms of the suite.

quick   80 cases of each family, the same ones every time: part of the tests
long    FUZZ_CASES of each, different ones every time, and failures listed by cause at the end: `make fuzz`
"""

import os

from hypothesis import HealthCheck, Phase, settings

from tests.fuzz.ledger import COLLECTING

_QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
# A failure is already small when drawn: one to three changes. Shrinking it takes longer than reading it.
_NEVER_SHRUNK = (Phase.explicit, Phase.generate)
settings.register_profile(
    "fuzz-quick", max_examples=80, derandomize=True, database=None, phases=_NEVER_SHRUNK, **_QUIET
)
settings.register_profile(
    "fuzz-long",
    max_examples=int(os.environ.get("FUZZ_CASES", "20000")),
    phases=_NEVER_SHRUNK if COLLECTING else tuple(Phase),
    **_QUIET,
)
FORM = settings.get_profile("fuzz-long" if "FUZZ_CASES" in os.environ else "fuzz-quick")
