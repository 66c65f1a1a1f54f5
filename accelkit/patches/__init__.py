"""First floor: models and methods.

`patch.py` is the way in: `adapters/` find the sites of a model, `sites/attention.py` runs a call as
the plan says, `methods/` hold one published technique each, on `parts/` that they share. A method
needs `method.py` and `call.py` alone.
"""
