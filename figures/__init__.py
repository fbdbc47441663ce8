"""Figures of the paper, drawn with a tuned text encoder: one program each, `python -m figures.NAME`."""
