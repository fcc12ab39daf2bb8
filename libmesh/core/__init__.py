"""Decides, and never awaits: no trio, no clock, no I/O, no logging. Time and randomness are arguments."""
