"""Write a tuned text encoder in the forms that other programs read: export.py."""
