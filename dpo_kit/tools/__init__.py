"""Beside a run: estimate, doctor, samples, scores, lists, clean-up."""
