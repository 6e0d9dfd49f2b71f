"""The parts of whichlora.nulldevice that run on the device, for environments that have nothing else of whichlora.

`from whichlora_null import control` works in every Python that `environment(gpu)` started, whatever is installed there.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2])]
