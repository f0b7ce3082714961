"""Measuring quality and speed on one's own machine and data; every number in the docs comes from here."""
