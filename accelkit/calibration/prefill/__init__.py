"""Calibration of language models' prefill, by head. Begin with `calibrate.py`: `measure.py` fills
tables, lists of earlier layers through `loans.py`; `plan.py` has plans searched and checked by
`check.py`, `blame.py` learns from what failed.
"""
