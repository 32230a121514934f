"""Checkpoint files <-> dictionaries of numpy arrays; no Jittor in here."""
