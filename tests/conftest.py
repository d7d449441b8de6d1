"""Fixtures for every test; see the plugins for what they start."""

pytest_plugins = ["tests.stacks"]
