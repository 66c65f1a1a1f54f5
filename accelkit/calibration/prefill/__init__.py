"""Calibration of language models' prefill, by head."""
