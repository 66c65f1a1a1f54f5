"""Measures kernels, estimators and methods on the device at hand; fits the cost table. Begin with
`fit.py`; `kernels/cost.py` is what it fits.
"""
