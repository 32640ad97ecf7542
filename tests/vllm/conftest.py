"""The Hub on loopback, for tests of adapters that vLLM reads from it."""

from tests.core.hub.conftest import hub  # noqa: F401
