"""Models and a server for the tests of this folder.

`serving` is imported inside the fixtures: it skips a test file where the server's packages are
missing, which this file must not do.
"""

import pytest


@pytest.fixture(scope="session")
def trained():
    """The tiny model of the repository: tests that look at its words."""
    import minomni

    return minomni.load("tiny")


@pytest.fixture(scope="session")
def untrained(tiny_folder):
    """Random weights, which answer briefly: tests that look at the server alone."""
    import minomni

    return minomni.load(tiny_folder)


@pytest.fixture(scope="module")
def server(trained):
    """A server of the trained model, with the default settings."""
    from serving import running

    with running(trained) as made:
        yield made
