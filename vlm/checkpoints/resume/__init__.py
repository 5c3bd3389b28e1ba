"""Checkpoints that a run goes on from."""
