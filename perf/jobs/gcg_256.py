"""A step of greedy coordinate gradient at width 256: the job of `gcg_64` with four times the candidates."""

from __future__ import annotations

from gcg_64 import job
from harness import main

JOB = job(256, 3)

if __name__ == "__main__":
    main(JOB)
