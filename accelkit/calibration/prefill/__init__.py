"""Calibration of language models' prefill, by head. Begin with `calibrate.py`: `measure.py` fills
tables, `plan.py` has plans searched and checked by `check.py`, `blame.py` learns from what failed.
"""
