"""Opens models and pipelines, and says plainly what is wrong when that fails."""
