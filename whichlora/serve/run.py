"""Running the server: one process, one store, until a signal; then what was begun is finished."""

from __future__ import annotations

import importlib.util
import signal
import sys
from types import FrameType

from whichlora_estimators.errors import WhichloraError

from .settings import Settings

#: How long answers that are under way may take once the server is to stop.
LAST_ANSWERS_S = 30


def run(settings: Settings, *, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM. Raises WhichloraError where the extra is missing, StoreBusy for a store in use."""
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise WhichloraError("the server needs more packages", todo="Run: pip install 'whichlora[serve]'.")
    import uvicorn

    from .app import make_app
    from .keeper import Keeper

    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn sends itself again what ended it, once all is answered
        signal.signal(number, _end)
    with Keeper(settings.store, jobs=settings.jobs) as keeper:
        uvicorn.run(
            make_app(settings, keeper),
            host=host,
            port=port,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=LAST_ANSWERS_S,
            timeout_keep_alive=30,
            limit_concurrency=2000,
        )


def _end(number: int, frame: FrameType | None) -> None:
    """End as after the last line: what was submitted is written, and the store closed."""
    sys.exit(0)
