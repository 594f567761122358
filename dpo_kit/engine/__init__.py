"""Pair store and configuration to run folder: the step, the loop, the reference, checkpoints, what a rank runs."""
