"""Measurements: scripts to run by hand (README.md says how), and what they share."""
