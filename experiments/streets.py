"""Measures a chapter's claims on CamVid's streets: `python -m experiments.streets unet`.

The same as `python -m experiments.claims unet --on streets`, options included.
"""

import sys

from experiments import claims

if __name__ == "__main__":
    claims.main([*sys.argv[1:], "--on", "streets"])
