"""Scores, controls and intervals."""
