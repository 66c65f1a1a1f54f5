"""Where methods act: `attention.py` runs one attention call, `order.py` lays its tokens out and
`reuse.py` keeps lists for others.
"""
