"""Trains the bundled encoder, compares encoders, and adopts one."""
