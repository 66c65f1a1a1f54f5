"""Second floor: measure, then choose."""
