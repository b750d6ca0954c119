"""Failure drills: inject realistic failures into runs, and check that nothing is lost. `python -m tests.drills`"""
