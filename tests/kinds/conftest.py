from tests.plan.conftest import make_config

__all__ = ["make_config"]
