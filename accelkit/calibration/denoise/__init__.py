"""Calibration of diffusers pipelines, by site and share of the denoising steps. Begin with
`calibrate.py`: `look.py` sees what is called, `measure.py`, `weights.py` and `caches.py` fill
tables, `plan.py` searches, `check.py` runs whole denoisings; `video.py` is a run, `shots.py` what
it is run on, `fidelity.py` what two runs differ by.
"""
