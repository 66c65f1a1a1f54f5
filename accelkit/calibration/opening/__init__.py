"""Opens models and pipelines, and says plainly what is wrong when that fails. Begin with
`pipelines.open_any`, which takes either.
"""
