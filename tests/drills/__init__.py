"""Failure drills: break a run in every way that happens, and see that nothing is lost. `python -m tests.drills`"""
