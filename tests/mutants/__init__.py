"""Planted defects, each with the test that must see it: ``python -m tests.mutants`` plants them one at a time."""
