"""Engines in processes of their own: each module runs in its engine's environment (locks/), with the standard library,
numpy and the engine. Nothing here imports the rest of the project, which imports `wire` alone of these modules.
"""
