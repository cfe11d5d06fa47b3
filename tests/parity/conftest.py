"""Fixtures of the comparisons with golden values."""

import pytest


@pytest.fixture
def close(record_property):
    """Compare by the largest difference; the largest error of the test is recorded in the JUnit report."""
    from nvae_golden import largest_error

    largest = [0.0]

    def compare(actual, expected, tolerance: float, name: str = "") -> None:
        error = largest_error(actual, expected)
        largest[0] = max(largest[0], error)
        assert error <= tolerance, f"{name}: error {error:.2e} > {tolerance:.0e}"

    yield compare
    record_property("largest_error", largest[0])
