"""What is said to the allocator, in a process of its own: it holds for all that follows."""

import json
import os
import subprocess
import sys

import pytest

from temper.systems.freed_memory import USERS_OWN

LOOK = """
import json, resource, sys
from temper.systems.freed_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        bytearray(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
said = keep_freed_memory()
faults()
print(json.dumps([said, faults()]))
"""


def look(**more: str) -> tuple[bool, int]:
    environment = {name: value for name, value in os.environ.items() if name not in USERS_OWN} | more
    done = subprocess.run(
        [sys.executable, "-c", LOOK], env=environment, capture_output=True, text=True, check=True
    )
    said, faults = json.loads(done.stdout)
    return said, faults


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_memory_that_was_freed_is_used_again():
    said, faults = look()
    assert said
    # Twenty blocks of 4096 pages each; all of them would be fresh.
    assert faults < 4096


def test_who_set_it_in_the_environment_is_not_overruled():
    said, _ = look(MALLOC_TRIM_THRESHOLD_="131072")
    assert not said
