"""What a person looks at: `report.py` has the tables and the page, `pictures.py` the drawings,
`frames.py` videos.
"""
