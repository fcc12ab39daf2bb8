"""Everything that moves bytes between peers, behind the seam in `base.py`."""
