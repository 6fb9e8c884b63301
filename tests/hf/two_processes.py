"""Both trainings that change their matrices, one after the other; run by `torchrun` with a folder, on two processes."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.hf import dynamic_rank_worker, straight_through_worker

if __name__ == "__main__":
    straight_through_worker.main(Path(sys.argv[1]))
    dynamic_rank_worker.main(Path(sys.argv[1]))
