"""Second floor: measure, then choose.

`calibrate.py` is the way in. `prefill/` and `denoise/` calibrate language models and pipelines,
each from its own `calibrate.py`, and do not know each other: what both need stands beside them
here. `bench/`, `evaluation/` and `show/` serve the commands, `opening/` loads models.
"""
