"""Second floor: measure, then choose.

`calibrate.py` is the way in. `prefill/` and `denoise/` calibrate language models and pipelines,
each from its own `calibrate.py`, and do not know each other: what both need stands beside them
here. The commands `patch`, `bench`, `eval` and `show` are served by `compare/`, `bench/`,
`evaluation/` and `show/`; `opening/` loads models.
"""
