"""Where methods act: `attention.py` runs one attention call."""
