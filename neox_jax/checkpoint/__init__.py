"""Checkpoints of whole runs and of models alone, by Orbax."""
