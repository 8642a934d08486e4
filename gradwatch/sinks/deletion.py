"""Whether a file that is being written has been deleted, which no write notices."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any


def refuse_deleted(file: IO[Any]) -> None:
    """Raise a FileNotFoundError if nobody will ever read what is written to this open file; one that was moved is fine."""
    if os.fstat(file.fileno()).st_nlink == 0 and not Path(file.name).exists():
        raise FileNotFoundError(f"{file.name} was deleted while it was written")
