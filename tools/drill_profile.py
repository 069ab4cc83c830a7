"""How hypothesis searches in `make drills`; a pytest plugin. A test that sets its own number of examples keeps it."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "drills", max_examples=5000, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
