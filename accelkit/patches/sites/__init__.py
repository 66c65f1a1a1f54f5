"""Where methods act: `attention.py` runs one attention call, `reuse.py` keeps lists for others."""
