"""This machine and its operating system; knows no run."""
